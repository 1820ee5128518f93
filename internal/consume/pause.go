package consume

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// This file holds back a subscription whose group is paused. The ledger takes nothing
// then; what a slot had already taken is held back before it reaches its handler.

// pause is whether the group is paused.
type pause struct {
	turn  chan struct{} // capacity 1: one goroutine at a time asks, and acts on the answer
	begun time.Time     // when this subscription learned of the pause; guarded by turn
	known bool          // which of the released entries others have not taken is known; guarded by turn
	state atomic.Pointer[pauseState]
}

// pauseState is replaced, not changed.
type pauseState struct {
	since time.Time     // zero: the group is not paused
	over  chan struct{} // closed when another state has replaced this one
}

func newPause() *pause {
	p := &pause{turn: make(chan struct{}, 1)}
	p.state.Store(&pauseState{over: make(chan struct{})})
	return p
}

func (p *pause) set(since time.Time) {
	old := p.state.Swap(&pauseState{since: since, over: make(chan struct{})})
	close(old.over)
}

func (p *pauseState) isPaused() bool { return !p.since.IsZero() }

// askPaused asks whether the group is paused, before the subscription reads after an
// outage: the last answer may be old.
func (s *Subscription) askPaused(ctx context.Context) {
	select {
	case s.pause.turn <- struct{}{}:
	case <-s.life.closing.Done():
		return
	}
	s.obey(s.stream.Control(ctx))
	<-s.pause.turn
}

// obey acts on the answer. Without an answer, what was known remains.
func (s *Subscription) obey(c xstream.Control, err error) {
	if s.mark(dutyPause, err) {
		s.cfg.Log.Info("No permission to read whether the group is paused: Pause and Resume have no effect on this subscription: "+err.Error(), s.cfg.Fields)
	}
	if err == nil {
		s.pauseOrResume(c)
	}
	if s.pause.state.Load().isPaused() {
		s.withdraw()
		if err := s.checkReleased(false); err != nil {
			s.markFailed(dutyPause, err)
		}
	}
}

// obeyedBy is how long other subscriptions may take to obey, after this one. Until then they
// may take what this one has released.
const obeyedBy = 2 * DelayedInterval

// checkReleased checks whether the group was lost with what was released: no lease tells.
func (s *Subscription) checkReleased(resuming bool) error {
	p := s.pause
	all := resuming || !p.known
	if all && !resuming {
		if time.Since(p.begun) < obeyedBy {
			return nil
		}
		if _, err := s.keeper.SeeGroup(s.life.ctx); err != nil && !redisx.IsDenied(err) { // nobody reads now, so that this remains true
			return err
		}
	}
	entries := s.ledger.Withdrawals()
	if len(entries) > 2 && !all {
		entries = []*ledger.Entry{entries[0], entries[len(entries)-1]} // a lost group has lost both
	}
	if len(entries) > 0 {
		if err := s.keeper.CheckReleased(s.life.ctx, entries, all); err != nil {
			return err
		}
	}
	p.known = true
	return nil
}

func (s *Subscription) pauseOrResume(c xstream.Control) {
	was := s.pause.state.Load()
	switch {
	case !c.Since.IsZero():
		// What could not be claimed or moved is not tried again before Resume.
		s.markHealthy(dutyClaim)
		s.markHealthy(dutyDeadLetter)
		if was.since.Equal(c.Since) {
			return
		}
		s.ledger.Pause()
		s.pause.set(c.Since)
		if !was.isPaused() {
			s.pause.begun, s.pause.known = time.Now(), false
			s.reader.seat.Wake() // it finds no room
			s.renewAll()
			s.cfg.Log.Info("The group is paused: no handler begins until it is resumed", s.cfg.Fields.Add(watermill.LogFields{"paused_since": c.Since}))
		}
	case was.isPaused():
		if s.ledger.Unsure() { // what was released is not ours
			if s.withdraw(); s.ledger.Unsure() {
				return
			}
		}
		if err := s.checkReleased(true); err != nil { // later it could not be told whether others have settled them
			s.markFailed(dutyPause, err)
			return
		}
		if c.Known {
			s.cfg.Log.Info("The group is resumed", s.cfg.Fields)
		} else {
			s.cfg.Log.Error("The group was paused, and nobody has resumed it, but Redis does not know that any more; the subscription runs on",
				errors.New("pause lost"), s.cfg.Fields)
		}
		s.pause.set(time.Time{})
		s.apply(s.ledger.Resume(time.Now()))
	}
}

// withdraw releases what was read ahead. If that fails, the next tick tries again; if
// it had no answer, so that others may have the entries, nobody here does until then.
func (s *Subscription) withdraw() {
	entries := s.ledger.Withdraw()
	if len(entries) == 0 {
		return
	}
	err := s.mode.release(s.life.ctx, unread(entries))
	if err != nil {
		s.markFailed(dutyPause, err)
	}
	if !s.ledger.Withdrawn(time.Now(), entries, lease.Released, err == nil, unavailable(err)) {
		s.release(entries)
	}
}
