package model

import (
	"slices"
	"time"
)

// waiter is a blocked XREAD or XREADGROUP.
type waiter struct {
	s        *Server
	client   *client
	read     *read
	deadline int64 // in milliseconds of the server's clock; 0: none
	timer    *time.Timer
	reply    chan []byte // one reply; nil if the client is gone
}

// blocked is what a read answers that is to wait.
type blocked struct{ read *read }

func (s *Server) block(c *client, r *read) {
	w := &waiter{s: s, client: c, read: r, timer: time.NewTimer(time.Hour), reply: make(chan []byte, 1)}
	w.timer.Stop()
	if r.block > 0 {
		w.deadline = s.now() + r.block
	}
	c.waiter = w
	s.waiters = append(s.waiters, w)
	s.setTimer(w)
	if c.gone {
		s.unblock(w, nil)
		c.waiter = w // for its own turn to see
	}
}

func (s *Server) setTimer(w *waiter) {
	if w.deadline > 0 {
		w.timer.Reset(time.UnixMilli(w.deadline).Sub(s.time()))
	}
}

func (s *Server) unblock(w *waiter, reply []byte) {
	i := slices.Index(s.waiters, w)
	if i < 0 {
		return
	}
	s.waiters = slices.Delete(s.waiters, i, i+1)
	w.client.waiter = nil
	w.timer.Stop()
	w.reply <- reply
}

// answer unblocks the client with a reply.
func (s *Server) answer(w *waiter, reply any) {
	s.unblock(w, appendReply(nil, w.client.proto, reply))
}

// wait returns the reply; nil if the client is gone.
func (w *waiter) wait() []byte {
	for {
		select {
		case reply := <-w.reply:
			return reply
		case <-w.timer.C:
			if !w.s.enter(w.client) {
				return nil
			}
			if w.s.now() >= w.deadline {
				w.s.answer(w, nullArray{})
			} else {
				w.s.setTimer(w)
			}
			w.s.leave()
		}
	}
}

// signal says that a key was changed in a way that a waiter may be served for.
func (s *Server) signal(key string) {
	if len(s.waiters) > 0 && !slices.Contains(s.ready, key) {
		s.ready = append(s.ready, key)
	}
}

// serveWaiters looks at those that wait for a key that was signalled, after the command,
// the script or the transaction that did.
func (s *Server) serveWaiters() {
	for len(s.ready) > 0 {
		key := s.ready[0]
		s.ready = s.ready[1:]
		for _, w := range slices.Clone(s.waiters) {
			if !slices.Contains(w.read.keys, key) || !slices.Contains(s.waiters, w) {
				continue
			}
			var reply any
			if s.version == Redis70 {
				reply = w.read.serve70(key)
			} else if _, is := s.lookup(key).(*stream); is || w.read.grouped {
				reply = w.read.run()
			} else {
				continue
			}
			if _, wait := reply.(blocked); !wait {
				s.answer(w, reply)
			}
		}
	}
}
