package consume

import (
	"context"
	"errors"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// This file holds what a Work can do with an entry.

// Task is an entry that is being processed, by a slot or by another goroutine.
type Task struct {
	*ledger.Entry
	slot *slot
}

// Call calls a user's function, which must recover its own panics. It does not
// return if the subscription has ended in the meantime.
func (t *Task) Call(f func()) {
	if t.slot == nil { // not in a slot
		f()
		return
	}
	t.slot.entry = t.Entry
	t.slot.call(f, nil, nil)
}

// Go runs a user's function outside of the slots. The drain waits for it until
// CloseTimeout.
func (s *Subscription) Go(f func()) { s.slots.calls.Go(f) }

// Await is Go, and waits too. It returns false if CloseTimeout passes first.
func (s *Subscription) Await(f func()) bool { return s.await(s.Go, f) }

func (s *Subscription) await(run func(func()), f func()) bool {
	done := make(chan struct{})
	run(func() {
		defer close(done)
		f()
	})
	select {
	case <-done:
		return true
	case <-s.life.abandon.Done():
		return false
	}
}

// acquire makes sure that the entry is ours and has its fields: an entry that was
// not just read is claimed first. It returns false if another consumer has the
// entry, or if it has to wait.
func (s *Subscription) acquire(t *Task) bool {
	if t.Fields != nil {
		return true
	}
	claim := t.Owner != ""
	own := t.Owner == s.stream.Consumer
	if own && !s.reader.isDisowned(t.ID) {
		t.Next = t.Count() // the answer to the command that claimed it was lost: it has reached nobody
	}
	taken, err := s.keeper.Take(s.life.ctx, t.Entry)
	withdrawn := claim && t.Withdrawn
	if withdrawn || t.slot != nil && t.slot.keys { // later it would come after its successors
		for pause := (backoff{}); (unavailable(err) || withdrawn && xstream.GroupLost(err)) && pause.wait(s.life.closing.Done()); taken, err = s.keeper.Take(s.life.ctx, t.Entry) {
			if xstream.GroupLost(err) { // it is to be restored
				s.ledger.Own(t.Entry)
				withdrawn, claim = false, false
			}
			s.markFailed(dutyClaim, err)
		}
	}
	switch {
	case err != nil && claim: // it may be claimed: then it is an orphan
		s.markFailed(dutyLook, err)
		s.Drop(t)
		s.reader.seat.Unsure()
	case err != nil:
		s.markFailed(dutyClaim, err)
		s.Again(t, max(s.cfg.TakeAgain, minBackoff))
	case taken:
		s.markHealthy(dutyClaim)
		if claim && !own && !withdrawn {
			s.claimed.Add(1)
		}
		return true
	case !claim && s.ledger.Owned(t.Entry): // the group was lost, and the entry is being restored
		s.Again(t, minBackoff)
	default:
		s.markHealthy(dutyClaim)
		s.Drop(t)
	}
	return false
}

// unavailable reports whether Redis did not answer, or not yet.
func unavailable(err error) bool {
	return err != nil && (!redisx.IsReply(err) || redisx.NotReady(err)) && !redisx.IsClosed(err)
}

// HandOver sends an entry's message to the channel. It returns false if the
// subscription closes first, if the group is paused, or if the lease is lost, which
// ends ctx; then somebody else has the entry, or it has come to its outcome.
func HandOver[M any](ctx context.Context, s *Subscription, t *Task, to chan<- M, message M) bool {
	for {
		state := s.pause.state.Load()
		if state.isPaused() {
			if !s.mode.held(t, state.over) {
				return false
			}
			continue
		}
		select {
		case to <- message:
			s.mode.handedOut(t)
			return true
		default:
		}
		withdraw, ended := s.mode.offer(ctx)
		select {
		case to <- message:
			s.mode.handedOut(t)
			return true
		case <-state.over:
		case <-withdraw:
			s.mode.withdrawn(t)
			return false
		case <-ended:
			s.Drop(t)
			return false
		}
	}
}

// Begin is HandOver for a handler that is called in the slot itself: see Direct. It
// returns false if the subscription closes, or if the group is paused.
func (s *Subscription) Begin(t *Task) bool {
	for state := s.pause.state.Load(); state.isPaused(); state = s.pause.state.Load() {
		if !s.mode.held(t, state.over) {
			return false
		}
	}
	withdraw, _ := s.mode.offer(s.life.ctx)
	select {
	case <-withdraw:
		s.mode.withdrawn(t)
		return false
	default:
	}
	s.mode.handedOut(t)
	return true
}

// Direct is Call for the handler of a message, or of the slot's batch. If CloseTimeout passes first, left is called,
// by another goroutine, and Direct does not return. If the handler calls runtime.Goexit, as
// t.FailNow does, exited is called, and Direct does not return.
func (t *Task) Direct(handler, left, exited func()) { t.slot.call(handler, left, exited) }

// Settle ends an entry that is done: it is acked.
func (s *Subscription) Settle(t *Task) { s.apply(s.ledger.Acked(time.Now(), t.Entry)) }

// SettleAll is Settle for entries of a batch.
func (s *Subscription) SettleAll(tasks []*Task) {
	entries := make([]*ledger.Entry, len(tasks))
	for i, t := range tasks {
		entries[i] = t.Entry
	}
	s.apply(s.ledger.Acked(time.Now(), entries...))
}

// Drop ends an entry that is no longer ours, or was never pending.
func (s *Subscription) Drop(t *Task) { s.ledger.Remove(time.Now(), t.Entry) }

// Again schedules the entry's redelivery after the delay.
func (s *Subscription) Again(t *Task, delay time.Duration) {
	if !s.IsClosing() {
		s.mode.postponed(t)
		if s.retry(t, delay) {
			return
		}
	}
	s.GiveBack(t, t.Next-1)
}

// Snooze schedules the entry's redelivery after the delay with an unchanged count:
// this delivery does not count. The count in Redis is lowered at once, so that a
// crash in the meantime, which counts as a delivery, uses up no retry. (If Redis
// does not answer, such a crash does.)
func (s *Subscription) Snooze(t *Task, delay time.Duration) {
	count := t.Count()
	if s.KeepsDead() && !s.IsClosing() {
		_, _ = s.Recount(t, count-1)
		s.ledger.Uncounted(t.Entry, count)
	}
	t.Next = count
	s.Again(t, delay)
}

// retry returns false if Close came first.
func (s *Subscription) retry(t *Task, delay time.Duration) (ok bool) {
	now := time.Now()
	dropped, ok := s.ledger.Retry(now, t.Entry, now.Add(delay))
	if dropped != nil {
		s.gaveUp(dropped)
	}
	return ok
}

// Broken has CallBroken called with the entry, outside of the slots and of the
// order, so that a call that hangs blocks nothing.
func (s *Subscription) Broken(t *Task, err error) {
	t.Broken = err
	if !s.retry(t, 0) {
		s.GiveBack(t, t.Count()-1)
	}
}

// callBroken calls CallBroken while there are entries for it. At most maxCallers of
// these goroutines run.
func (s *Subscription) callBroken() {
	ended := false
	defer func() {
		if !ended { // the user's function called runtime.Goexit
			s.slots.calls.Go(s.callBroken)
		}
	}()
	for {
		e, fx := s.ledger.TakeBroken(time.Now())
		s.apply(fx)
		if ended = e == nil; ended {
			return
		}
		t, again := &Task{Entry: e}, e.Fields == nil
		switch {
		case !s.acquire(t):
		case again && s.pause.state.Load().isPaused(): // since it was claimed
			s.Broken(t, t.Broken)
		default:
			s.work.CallBroken(t)
		}
	}
}

// gaveUp drops an entry because too many are waiting. It is redelivered when its
// lease expires.
func (s *Subscription) gaveUp(e *ledger.Entry) {
	s.reader.disowned.Store(e.ID, nil)
	s.overflow.Do(func() {
		s.cfg.Log.Error("Too many messages wait for a retry", errors.New(
			"those with the longest waits are redelivered when their leases expire, whenever they are due"), s.cfg.Fields)
	})
}

// Abandoned leaves an entry whose handler may still be running after CloseTimeout.
// This delivery does not count.
func (s *Subscription) Abandoned(t *Task) {
	s.mode.abandoned(t)
	s.Drop(t)
}

// GiveBack releases an entry with the given delivery count.
func (s *Subscription) GiveBack(t *Task, count int64) {
	t.Give = s.releaseCount(t.Entry, count)
	s.release([]*ledger.Entry{t.Entry})
}

// releaseAll releases all entries that no slot is handling: prefetched entries as
// if they had never been read, waiting ones with their count.
func (s *Subscription) releaseAll() {
	s.renewAll()
	queued, retries := s.ledger.Close(time.Now())
	give := unread(queued)
	var moving []*ledger.Entry
	for _, e := range retries {
		if e.Move() == ledger.MaybeMoved { // it waits on, until that is known
			moving = append(moving, e)
			continue
		}
		e.Give = s.releaseCount(e, e.Next-1)
		give = append(give, e)
	}
	s.release(give)
	give = give[:0]
	answers := true
	for _, e := range moving {
		// After an error there is no time to try this with every entry.
		if answers = answers && s.settleMove(&Task{Entry: e}) == nil; e.Move() == ledger.Moved {
			continue
		}
		e.Give = s.releaseCount(e, e.Next-1)
		give = append(give, e)
	}
	s.release(give)
}

// renewAll is called before entries are released. If the group was recreated by others, and we
// have read from it since, only what is not being released yet shows that.
func (s *Subscription) renewAll() {
	if s.ledger.Leased() {
		_ = s.keeper.Renew(s.life.ctx, 0) // the release has the same error
	}
}

// unread has entries released with their counts from before they were read.
func unread(entries []*ledger.Entry) []*ledger.Entry {
	for _, e := range entries {
		e.Give = max(e.Count()-1, 0)
	}
	return entries
}

// release releases entries. If that fails, they are redelivered when their leases
// expire.
func (s *Subscription) release(entries []*ledger.Entry) {
	if len(entries) == 0 {
		return
	}
	now := time.Now()
	s.ledger.Releasing(now, entries...)
	if !s.isAbandoned() {
		if err := s.try(func() error { return s.mode.release(s.life.ctx, entries) }); err != nil {
			s.cfg.Log.Error("Release failed; the messages will be redelivered when their leases expire", err,
				s.cfg.Fields.Add(watermill.LogFields{"entries": len(entries)}))
		}
	}
	s.ledger.Remove(now, entries...)
}

// releaseTries bounds the attempts of a closing subscription. It allows for several stale connections: after a cut, each connection
// in the pool fails once, and it would take long for the leases to expire.
const releaseTries = 5

// try repeats a command of a closing subscription.
func (s *Subscription) try(command func() error) (err error) {
	pause := backoff{}
	for range releaseTries {
		if err = command(); !unavailable(err) || !pause.wait(s.life.abandon.Done()) {
			return err
		}
	}
	return err
}

// releaseCount returns the count with which to release an entry. A dead entry that
// could not be moved keeps a count that makes it dead for whichever consumer claims
// it; a claim adds no more than the current delivery.
func (s *Subscription) releaseCount(e *ledger.Entry, count int64) int64 {
	if e.Death != nil && s.cfg.Last != 0 {
		return max(e.Count()-1, s.cfg.Last)
	}
	return max(count, 0)
}
