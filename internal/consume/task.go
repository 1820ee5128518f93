package consume

import (
	"context"
	"errors"
	"runtime"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// This file is what a Work can do with an entry.

// Task is an entry in the hands of a slot; without one: of a goroutine beside them.
type Task struct {
	*ledger.Entry
	slot *slot
}

// Call calls a function of the user's, which recovers its panics. It does not return if
// the subscription has ended meanwhile.
func (t *Task) Call(f func()) {
	sl := t.slot
	if sl == nil { // a goroutine of its own
		f()
		return
	}
	sl.state.Store(slotCalls)
	f()
	if !sl.state.CompareAndSwap(slotCalls, slotRuns) {
		runtime.Goexit()
	}
}

// Go runs a function of the user's beside the slots. The drain waits for it until
// CloseTimeout.
func (s *Subscription) Go(f func()) { s.slots.calls.Go(f) }

// acquire makes sure that the entry is ours, with its fields: it takes what was not
// read just now. It returns false if the entry is somebody else's business, or comes
// later.
func (s *Subscription) acquire(t *Task) bool {
	if t.Fields != nil {
		return true
	}
	claim := t.Owner != ""
	if claim { // the Subscriber's other subscriptions of the topic have the same name
		if !s.shared.poller.Reserve(s.cfg.Topic, t.ID, s.reader) {
			s.Drop(t)
			return false
		}
		defer s.shared.poller.Unreserve(s.cfg.Topic, t.ID)
	}
	own := t.Owner == s.stream.Consumer
	if own && !s.shared.poller.Disowned(s.cfg.Topic, t.ID) {
		t.Next = t.Count() // the answer to what took it was lost: it has reached nobody
	}
	taken, err := s.keeper.Take(s.life.ctx, t.Entry)
	switch {
	case err != nil && claim: // it may have happened: then it is an orphan
		s.markFailed(dutyLook, err)
		s.Drop(t)
		s.shared.poller.Unsure(s.cfg.Topic)
	case err != nil:
		s.markFailed(dutyClaim, err)
		s.Again(t, max(s.cfg.TakeAgain, minBackoff))
	case taken:
		s.markHealthy(dutyClaim)
		if claim && !own {
			s.claimed.Add(1)
		}
		return true
	case !claim && s.ledger.Owned(t.Entry): // the group was lost, and it is put back
		s.Again(t, minBackoff)
	default:
		s.markHealthy(dutyClaim)
		s.Drop(t)
	}
	return false
}

// HandOver sends an entry's message to whoever takes it. It returns false, and the entry has
// come to its outcome, if the subscription closes before, or the lease is lost, which ends
// ctx.
func HandOver[M any](ctx context.Context, s *Subscription, t *Task, to chan<- M, message M) bool {
	select {
	case to <- message:
	default:
		withdraw, ended := s.mode.offer(ctx)
		select {
		case to <- message:
		case <-withdraw:
			s.mode.withdrawn(t)
			return false
		case <-ended:
			s.Drop(t)
			return false
		}
	}
	s.mode.handedOut(t)
	return true
}

// Settle is the end of an entry that nobody needs any more: it is acked.
func (s *Subscription) Settle(t *Task) { s.apply(s.ledger.Acked(time.Now(), t.Entry)) }

// Drop ends an entry that is not ours any more, or was never kept.
func (s *Subscription) Drop(t *Task) { s.ledger.Remove(time.Now(), t.Entry) }

// Again has the entry come again after the delay.
func (s *Subscription) Again(t *Task, delay time.Duration) { s.schedule(t, false, delay) }

// Snooze has the entry come again after the delay, with the count that it has: this
// delivery does not count. It does not in Redis either from now on, so that a crash until
// then, which counts one, leaves it as many as it had. (Where Redis does not answer, that
// crash uses one up.)
func (s *Subscription) Snooze(t *Task, delay time.Duration) {
	count := t.Count()
	if s.mode.deadLetters() && !s.IsClosing() {
		_, _ = s.keeper.Recount(s.life.ctx, t.Entry, count-1)
	}
	t.Next = count
	s.Again(t, delay)
}

// Aside has the entry come again after the delay, without holding up the order.
func (s *Subscription) Aside(t *Task, delay time.Duration) { s.schedule(t, true, delay) }

func (s *Subscription) schedule(t *Task, aside bool, delay time.Duration) {
	if s.IsClosing() {
		s.GiveBack(t, t.Next-1)
		return
	}
	s.mode.postponed(t)
	now := time.Now()
	dropped, ok := s.ledger.Retry(now, t.Entry, now.Add(delay), aside)
	switch {
	case !ok: // Close came in between
		s.GiveBack(t, t.Next-1)
	case dropped != nil:
		s.gaveUp(dropped)
	}
}

// Broken has CallBroken called with the entry, outside of the slots and of the order: one
// that hangs stops nothing.
func (s *Subscription) Broken(t *Task) {
	switch full, ok := s.ledger.Broken(time.Now(), t.Entry); {
	case !ok: // the subscription closes
		s.GiveBack(t, t.Count()-1)
	case full:
		s.gaveUp(t.Entry)
	}
}

// callBroken calls CallBroken while there is something for it. There are maxCallers of
// these goroutines at most.
func (s *Subscription) callBroken() {
	ended := false
	defer func() {
		if !ended { // the user's function has ended its goroutine
			s.ledger.CallerEnded()
		}
		s.update()
	}()
	for {
		e, fx := s.ledger.TakeBroken(time.Now())
		s.apply(fx)
		if ended = e == nil; ended {
			return
		}
		if t := (&Task{Entry: e}); s.acquire(t) {
			s.work.CallBroken(t)
		}
	}
}

// gaveUp leaves an entry, for which there is no room among those that wait, to its lease.
func (s *Subscription) gaveUp(e *ledger.Entry) {
	s.shared.poller.Disown(s.cfg.Topic, e.ID)
	s.overflow.Do(func() {
		s.cfg.Log.Error("Very many messages wait for a retry", errors.New(
			"those that wait longest come again when their leases have run out, whenever they are due"), s.cfg.Fields)
	})
}

// Abandoned leaves an entry that may be handled still, after CloseTimeout. This delivery
// does not count.
func (s *Subscription) Abandoned(t *Task) {
	s.mode.abandoned(t)
	s.Drop(t)
}

// GiveBack releases an entry, with the deliveries that are to count.
func (s *Subscription) GiveBack(t *Task, count int64) {
	s.release([]lease.Counted{{Entry: t.Entry, Count: s.releaseCount(t.Entry, count)}})
}

// releaseAll gives back everything that no slot has in hand: prefetched entries as if
// they had never been read, waiting ones with their count.
func (s *Subscription) releaseAll() {
	queued, retries := s.ledger.Close(time.Now())
	give := make([]lease.Counted, 0, len(queued)+len(retries))
	for _, e := range queued {
		give = append(give, lease.Counted{Entry: e, Count: max(e.Count()-1, 0)})
	}
	for _, e := range retries {
		give = append(give, lease.Counted{Entry: e, Count: s.releaseCount(e, e.Next-1)})
	}
	s.release(give)
}

// release gives entries back; where that fails, they come again when their leases have
// run out.
func (s *Subscription) release(give []lease.Counted) {
	if len(give) == 0 {
		return
	}
	entries := make([]*ledger.Entry, len(give))
	for i, g := range give {
		entries[i] = g.Entry
	}
	now := time.Now()
	s.ledger.Releasing(now, entries...)
	if !s.isAbandoned() {
		if err := s.tryRelease(give); err != nil {
			s.cfg.Log.Error("Release failed; the messages come again when their leases have run out", err,
				s.cfg.Fields.Add(watermill.LogFields{"entries": len(give)}))
		}
	}
	s.ledger.Remove(now, entries...)
}

// releaseTries: after a cut each connection that lies in the pool fails once, and who waits
// for the leases to run out waits long.
const releaseTries = 5

func (s *Subscription) tryRelease(give []lease.Counted) (err error) {
	pause := backoff{}
	for range releaseTries {
		err = s.mode.release(s.life.ctx, give)
		if err == nil || redisx.IsReply(err) && !redisx.NotReady(err) || redisx.IsClosed(err) || !pause.wait(s.life.abandon) {
			return err
		}
	}
	return err
}

// releaseCount keeps a dead entry that could not be moved dead for whoever claims
// it, which counts as no more than this delivery of it.
func (s *Subscription) releaseCount(e *ledger.Entry, count int64) int64 {
	if e.Death != nil && s.cfg.Last != 0 {
		return max(e.Count()-1, s.cfg.Last)
	}
	return max(count, 0)
}
