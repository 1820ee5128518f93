package consume

import (
	"errors"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/takeover"
)

// This file holds the goroutines, other than the slots and the reader, that carry
// out what the ledger asks for.

// loops holds their state.
type loops struct {
	ack, look chan struct{} // signal that there is work
	running   sync.WaitGroup
	stop      chan struct{} // closed when the handlers have ended

	mu    sync.Mutex
	timer *time.Timer // for the next due entry; nil until first needed
	at    time.Time   // when the timer fires; zero: it has fired
}

func newLoops() loops {
	return loops{ack: make(chan struct{}, 1), look: make(chan struct{}, 1), stop: make(chan struct{})}
}

// end waits for all loops.
func (l *loops) end() {
	close(l.stop)
	l.mu.Lock()
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	l.running.Wait()
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// apply carries out what a change of the ledger requires.
func (s *Subscription) apply(fx ledger.Effects) {
	if fx.Slots > 0 {
		go s.slots.one(s).run()
	}
	if fx.Key {
		go s.slots.one(s).key(nil)
	}
	if fx.Turn {
		go s.awaitTurn()
	}
	if fx.Crowded {
		s.cfg.Log.Error("Too many messages wait for others with the same ordering key; until these are handled, nothing more is read",
			errors.New("MaxConcurrency or the retries of few keys limit the topic"), s.cfg.Fields)
	}
	if fx.Callers > 0 {
		s.slots.calls.Go(s.callBroken)
	}
	if fx.Room {
		s.reader.seat.Wake()
	}
	if fx.Ack {
		poke(s.loops.ack)
	}
	if fx.Look {
		poke(s.loops.look)
	}
	if !fx.Timer.IsZero() {
		s.arm(fx.Timer)
	}
}

// update carries out what is due now.
func (s *Subscription) update() { s.apply(s.ledger.Effects(time.Now())) }

// arm has update called at that time. An earlier time that is already set remains: update arms
// the timer again. (Concurrent callers may arrive in either order.)
func (s *Subscription) arm(at time.Time) {
	l := &s.loops
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.at.IsZero() && !at.Before(l.at) {
		return
	}
	l.at = at
	if l.timer != nil {
		l.timer.Reset(time.Until(at))
		return
	}
	l.timer = time.AfterFunc(time.Until(at), func() {
		l.mu.Lock()
		l.at = time.Time{}
		l.mu.Unlock()
		s.update()
	})
}

// ackLinger is how long a batch of several acks waits for more. It is a few round
// trips to a nearby server. It saves a fast handler every second XACK (measured: a
// tenth of its rate), and delays nobody, since the work is done.
const ackLinger = 200 * time.Microsecond

// ackLoop acks until stop is closed and all acks have arrived, or until
// CloseTimeout. A single ack is sent at once; under load one command carries many.
func (s *Subscription) ackLoop() {
	pause := backoff{}
	stop, linger := s.loops.stop, false
	for {
		waiting := len(s.ledger.Acks(lease.MaxAck))
		if waiting == 0 {
			if stop == nil {
				return
			}
			select {
			case <-s.loops.ack:
			case <-stop:
				stop = nil
			}
			continue
		}
		if linger = waiting > 1 && waiting < lease.MaxAck && !linger; linger && stop != nil {
			select {
			case <-time.After(ackLinger):
			case <-stop:
			}
			continue
		}
		fx, err := s.keeper.Ack(s.life.ctx)
		s.apply(fx)
		if err != nil {
			s.markFailed(dutyAck, err)
			if !pause.wait(s.life.abandon.Done()) {
				return
			}
			continue
		}
		pause.reset()
		s.markHealthy(dutyAck)
	}
}

// renewLoop renews leases until stop is closed, also while the subscription drains,
// since handlers still have messages. A lease that was confirmed within the last
// sixth of ClaimMinIdle waits for the next round, so each lease is renewed within a
// third of ClaimMinIdle.
func (s *Subscription) renewLoop() {
	every := s.cfg.ClaimMinIdle / (2 * takeover.RenewalsPerLease)
	pause := backoff{}
	repeat(s.loops.stop, nil, every, func() time.Duration {
		next := every
		if err := s.keeper.Renew(s.life.ctx, every*9/10); err != nil {
			s.markFailed(dutyRenew, err)
			next = min(every, pause.next())
		} else {
			pause.reset()
			s.markHealthy(dutyRenew)
			if s.ledger.IsIdle() { // entries that could not be claimed or moved have left this subscription
				s.markHealthy(dutyClaim)
				s.markHealthy(dutyDeadLetter)
			}
		}
		s.update()
		return next
	})
}

// lookLoop looks at the group, and for entries that dead consumers left in it,
// until the subscription closes.
func (s *Subscription) lookLoop() {
	defer s.finder.Forget()
	repeat(s.life.closing.Done(), s.loops.look, 0, func() time.Duration {
		fx, err := s.finder.Look(s.life.ctx)
		s.apply(fx)
		if err != nil {
			s.markFailed(dutyLook, err)
		} else {
			s.markHealthy(dutyLook)
		}
		return s.shared.until(s.shared.tick)
	})
}

// repeat calls f after a time, then each time after what it returns or when poked, until
// stop is closed.
func repeat(stop, poked <-chan struct{}, after time.Duration, f func() time.Duration) {
	timer := time.NewTimer(after)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-poked:
		case <-stop:
			return
		}
		timer.Reset(f())
	}
}

// backoff is the pause after a failure. It doubles up to a second, with jitter, so
// that consumers that failed together do not retry together.
type backoff struct{ d time.Duration }

const (
	minBackoff = 20 * time.Millisecond
	maxBackoff = time.Second
)

func (b *backoff) reset() { b.d = 0 }

func (b *backoff) next() time.Duration {
	b.d = min(max(minBackoff, 2*b.d), maxBackoff)
	return takeover.Jitter(b.d)
}

// wait returns false if stop was closed during the pause.
func (b *backoff) wait(stop <-chan struct{}) bool {
	t := time.NewTimer(b.next())
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
		return false
	}
}
