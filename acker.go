package goxstreams

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// maxAck bounds one XACK: 1,000 IDs take the server 0.6 ms.
	maxAck = 1000
	// While this many acks have not arrived, nothing new is read: they are all
	// handled again if the process ends now.
	maxUnconfirmed = 10_000
	// Several acks in one batch say that more are coming. To wait this long for
	// them, a few round trips to a near server, saves a fast handler every second
	// XACK (measured: a tenth of its rate), and delays nobody: the work is done.
	ackLinger = 200 * time.Microsecond
)

// acker is the goroutine that acks. A batch is what has gathered while the last
// XACK was under way, and a moment longer: a single ack goes at once, and under
// load one command carries many.
type acker struct {
	s *subscription

	mu      sync.Mutex
	waiting []*held
	ended   bool // what comes now, of a call that outlived CloseTimeout, is too late

	wake chan struct{}
	stop chan struct{} // no more acks come
	done chan struct{}
}

func newAcker(s *subscription) *acker {
	return &acker{s: s, wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
}

func (a *acker) add(h *held) {
	a.mu.Lock()
	if a.ended {
		a.mu.Unlock()
		return
	}
	a.waiting = append(a.waiting, h)
	a.mu.Unlock()
	a.s.shared.unacked.used.Add(1)
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// full reports whether so many acks have not arrived that nothing more is read.
func (a *acker) full() bool {
	n := a.backlog()
	return n >= minShare && n >= a.s.shared.most(&a.s.shared.unacked, n)
}

// backlog returns how many acks have not arrived.
func (a *acker) backlog() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.waiting)
}

// end waits until all has arrived, or CloseTimeout is over. It returns how many
// acks have not.
func (a *acker) end() int {
	close(a.stop)
	<-a.done
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = true
	a.s.shared.unacked.used.Add(-int64(len(a.waiting)))
	return len(a.waiting)
}

// batch returns what is to be acked next. It stays in waiting until confirmed.
func (a *acker) batch() []*held {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.waiting[:min(len(a.waiting), maxAck)]
}

func (a *acker) confirmed(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	rest := copy(a.waiting, a.waiting[n:])
	clear(a.waiting[rest:])
	a.waiting = a.waiting[:rest]
	a.s.shared.unacked.used.Add(-int64(n))
}

// run acks until stop is closed and all has arrived, or the subscription's
// CloseTimeout is over.
func (a *acker) run() {
	defer close(a.done)
	s := a.s
	pause := backoff{}
	ids := make([]any, 0, maxAck)
	lingered := false
	for {
		hs := a.batch()
		if len(hs) == 0 {
			select {
			case <-a.wake:
				continue
			case <-a.stop:
			}
			if a.backlog() == 0 {
				return
			}
			continue
		}
		if len(hs) > 1 && len(hs) < maxAck && !lingered {
			lingered = true
			select {
			case <-time.After(ackLinger):
			case <-a.stop:
			}
			continue
		}
		lingered = false
		ids = ids[:0]
		for _, h := range s.leases.there(hs) {
			ids = append(ids, &h.id) // an interface of it is no allocation
		}
		var err error
		if len(ids) > 0 {
			err = s.ack(s.ctx, ids...)
		}
		if err != nil {
			s.markFailed(dutyAck, err)
			if !pause.wait(s.abandon) {
				return
			}
			continue
		}
		pause.reset()
		s.markHealthy(dutyAck)
		s.leases.remove(hs...)
		a.confirmed(len(hs))
		s.settled()
	}
}

// ack acks in the way that the config asks for.
func (s *subscription) ack(ctx context.Context, ids ...any) error {
	if s.deletes == xstream.DeleteNever {
		return s.stream.Ack(ctx, ids...)
	}
	kept, err := s.stream.AckAndDelete(ctx, s.deletes, ids...)
	if xstream.SeveralGroups(err) {
		// A group was added since Subscribe looked. Its messages matter more
		// than the memory.
		s.once.severalGroups.Do(func() {
			s.log.Error("DeleteAcked: the topic has several groups now and this server no XACKDEL; acked entries stay",
				fmt.Errorf("%w: %s", ErrUnsupported, needsAckDel), s.logFields)
		})
		return s.stream.Ack(ctx, ids...)
	}
	if kept > 0 {
		s.kept.Store(true)
	}
	return err
}

// backoff is the pause after a failure: it doubles up to a second, with jitter,
// so that consumers that failed together do not come back together.
type backoff struct{ d time.Duration }

const (
	minBackoff = 20 * time.Millisecond
	maxBackoff = time.Second
)

func (b *backoff) reset() { b.d = 0 }

// wait returns false if stop was closed before the pause was over.
func (b *backoff) wait(stop <-chan struct{}) bool {
	b.d = min(max(minBackoff, 2*b.d), maxBackoff)
	t := time.NewTimer(jitter(b.d))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
		return false
	}
}

// jitter spreads a duration over [d/2, 3d/2).
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d/2 + rand.N(d)
}
