package consume

import (
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/takeover"
)

// This file is the goroutines that see to it that what the ledger wants is done, but
// for the slots and the reader.

// loops are they.
type loops struct {
	ack, look chan struct{} // there is something to do
	first     sync.WaitGroup
	last      sync.WaitGroup // these go on until the handlers have ended
	stop      chan struct{}

	mu    sync.Mutex
	timer *time.Timer // for what is due next; nil: none was needed yet
	at    time.Time   // when it runs out; zero: it has
}

func newLoops() loops {
	return loops{ack: make(chan struct{}, 1), look: make(chan struct{}, 1), stop: make(chan struct{})}
}

func (l *loops) start(run func())     { l.first.Go(run) }
func (l *loops) startLast(run func()) { l.last.Go(run) }

// end waits for all of them.
func (l *loops) end() {
	close(l.stop)
	l.mu.Lock()
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	l.first.Wait()
	l.last.Wait()
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// apply does what a change of the ledger has made necessary.
func (s *Subscription) apply(fx ledger.Effects) {
	if fx.Slots > 0 {
		s.startSlot()
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
		s.loops.arm(fx.Timer, s.update)
	}
}

// update does what is to be done now.
func (s *Subscription) update() { s.apply(s.ledger.Effects(time.Now())) }

// arm has run called at that time. It was called for an earlier one, maybe, by somebody
// whose change was later.
func (l *loops) arm(at time.Time, run func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.at.IsZero() && l.at.Before(at) {
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
		run()
	})
}

// ackLinger: several acks in one batch say that more are coming. To wait this long for
// them, a few round trips to a near server, saves a fast handler every second
// XACK (measured: a tenth of its rate), and delays nobody: the work is done.
const ackLinger = 200 * time.Microsecond

// ackLoop acks until stop is closed and all has arrived, or CloseTimeout is over. A
// batch is what has gathered while the last one was under way, and a moment longer: a
// single ack goes at once, and under load one command carries many.
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
		_, fx, err := s.keeper.Ack(s.life.ctx)
		s.apply(fx)
		if err != nil {
			s.markFailed(dutyAck, err)
			if !pause.wait(s.life.abandon) {
				return
			}
			continue
		}
		pause.reset()
		s.markHealthy(dutyAck)
	}
}

// renewLoop renews leases until stop is closed: messages are in hand while the
// subscription drains. What was confirmed in the last sixth of ClaimMinIdle is left for
// the next round, so that each lease is renewed within a third.
func (s *Subscription) renewLoop() {
	every := s.cfg.ClaimMinIdle / (2 * takeover.RenewalsPerLease)
	pause := backoff{}
	timer := time.NewTimer(every)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.loops.stop:
			return
		}
		next := every
		if err := s.keeper.Renew(s.life.ctx, every*9/10); err != nil {
			s.markFailed(dutyRenew, err)
			next = min(every, pause.next())
		} else {
			pause.reset()
			s.markHealthy(dutyRenew)
			if s.ledger.IsIdle() { // what could not be claimed, or moved, is nobody's business here any more
				s.markHealthy(dutyClaim)
				s.markHealthy(dutyDeadLetter)
			}
		}
		s.update()
		timer.Reset(next)
	}
}

// lookLoop looks at the group, and for what dead consumers left in it, until the
// subscription closes.
func (s *Subscription) lookLoop() {
	defer s.finder.Forget()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.loops.look:
		case <-s.life.closing:
			return
		}
		fx, err := s.finder.Look(s.life.ctx)
		s.apply(fx)
		if err = errors.Join(err, s.keeper.Trim(s.life.ctx)); err != nil {
			s.markFailed(dutyLook, err)
		} else {
			s.markHealthy(dutyLook)
		}
		timer.Reset(s.shared.untilTick())
	}
}

// backoff is the pause after a failure: it doubles up to a second, with jitter,
// so that consumers that failed together do not come back together.
type backoff struct{ d time.Duration }

const (
	minBackoff = 20 * time.Millisecond
	maxBackoff = time.Second
)

func (b *backoff) reset() { b.d = 0 }

func (b *backoff) next() time.Duration {
	b.d = min(max(minBackoff, 2*b.d), maxBackoff)
	return jitter(b.d)
}

// wait returns false if stop was closed before the pause was over.
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

// jitter spreads a duration over [d/2, 3d/2).
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d/2 + rand.N(d)
}
