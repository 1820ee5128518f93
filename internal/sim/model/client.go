package model

import (
	"bufio"
	"net"
	"sync"
)

// client is a connection. One goroutine reads what arrives, also while the server is
// frozen or the client is blocked, and another one executes it.
type client struct {
	s    *Server
	id   int64
	conn net.Conn

	// Used during the server's turns.
	name    string
	proto   int
	cut     bool // nothing that has arrived is executed any more
	gone    bool // the other side has closed the connection
	waiter  *waiter
	multi   bool
	aborted bool
	queued  []*request

	mu      sync.Mutex
	arrived [][]string
	end     bool
	change  chan struct{} // has room for one signal
}

// Serve serves the connection, on goroutines of its own, until either side closes it.
func (s *Server) Serve(conn net.Conn) {
	c := &client{s: s, conn: conn, proto: 2, change: make(chan struct{}, 1)}
	s.mu.Lock()
	s.lastID++
	c.id = s.lastID
	s.clients[c.id] = c
	s.mu.Unlock()
	go c.read()
	go c.execute()
}

// drop forgets a client and what it waits for.
func (s *Server) drop(c *client) {
	c.cut = true
	if s.clients[c.id] == c {
		delete(s.clients, c.id)
	}
	if c.waiter != nil {
		s.unblock(c.waiter, nil)
	}
	queue := s.queue[:0]
	for _, t := range s.queue {
		if t.client == c {
			t.begin <- false
		} else {
			queue = append(queue, t)
		}
	}
	s.queue = queue
}

func (c *client) read() {
	r := bufio.NewReader(c.conn)
	for {
		args, err := readCommand(r)
		c.mu.Lock()
		if err == nil && len(args) > 0 {
			c.arrived = append(c.arrived, args)
		}
		c.end = err != nil
		c.mu.Unlock()
		if r.Buffered() == 0 || err != nil {
			select {
			case c.change <- struct{}{}:
			default:
			}
		}
		if err != nil {
			break
		}
	}
	// Its turn comes after that of what has arrived before, on other connections too.
	if c.s.enter(c) {
		c.gone = true
		if c.waiter != nil {
			c.s.unblock(c.waiter, nil)
		}
		c.s.leave()
	}
}

// take returns the commands that have arrived; none when there will be no more.
func (c *client) take() [][]string {
	for {
		c.mu.Lock()
		cmds, end := c.arrived, c.end
		c.arrived = nil
		c.mu.Unlock()
		if len(cmds) > 0 || end {
			return cmds
		}
		<-c.change
	}
}

func (c *client) execute() {
	defer c.close()
	for {
		cmds := c.take()
		if len(cmds) == 0 {
			return
		}
		for len(cmds) > 0 {
			var out []byte
			var blocked *waiter
			if !c.s.enter(c) {
				return
			}
			for len(cmds) > 0 && blocked == nil {
				reply := c.s.handle(c, cmds[0])
				cmds = cmds[1:]
				if blocked = c.waiter; blocked == nil {
					out = appendReply(out, c.proto, reply)
				}
			}
			c.s.leave()
			if blocked != nil {
				c.write(out)
				if out = blocked.wait(); out == nil {
					return
				}
			}
			c.write(out)
		}
	}
}

// write leaves it to the reading side to notice that a client is gone: what it has sent
// before is executed.
func (c *client) write(out []byte) {
	if len(out) > 0 {
		_, _ = c.conn.Write(out)
	}
}

func (c *client) close() {
	c.s.mu.Lock()
	c.s.drop(c)
	c.s.mu.Unlock()
	_ = c.conn.Close()
}
