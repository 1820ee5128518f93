package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// This file is about what cannot be handled: broken entries, and dead messages.

// maxBrokenCalls bounds how many calls of OnBroken can hang.
const maxBrokenCalls = 16

// handleBroken hands an entry that is no message to OnBroken, outside of the slots and
// of the order: one that hangs stops nothing.
func (s *subscription) handleBroken(h *task, err error) {
	s.stats.broken.Add(1)
	s.log.Error("Broken entry", err, s.entryFields(h.Entry))
	if s.cfg.OnBroken == nil {
		s.mode.malformed(h, err)
		return
	}
	h.Broken = err
	switch full, ok := s.ledger.Broken(time.Now(), h.Entry); {
	case !ok: // the subscription closes
		s.giveBack(h, h.Count()-1)
	case full:
		s.gaveUp(h.Entry)
	}
}

// callBroken calls OnBroken while there is something for it. There are maxBrokenCalls of
// these goroutines at most.
func (s *subscription) callBroken() {
	ended := false
	var in *ledger.Entry // OnBroken's
	defer func() {
		if in != nil { // it has ended its goroutine
			s.brokenCalled(&task{Entry: in}, errPanicked)
		}
		if !ended {
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
		h := &task{Entry: e}
		if h.Fields == nil && !s.acquire(h) {
			continue
		}
		h.Fields, _, _ = cutReplay(h.Fields)
		if s.retry.exhaustedBefore(h.Count()) {
			h.Death = &death{kind: Exhausted, err: ErrRetriesExhausted, crashed: true}
			s.mode.dead(h)
			continue
		}
		ctx, cancel := context.WithCancelCause(s.life.calling)
		if !h.Attach(&cancel) {
			cancel(nil)
			s.ledger.Remove(time.Now(), e)
			continue
		}
		in = e
		b := BrokenMessage{Topic: s.topic, ID: e.ID, Fields: h.Fields, RetryCount: e.Count() - 1, Err: e.Broken}
		err := guard(func() error { return s.cfg.OnBroken(ctx, b) })
		in = nil
		cancel(nil)
		s.brokenCalled(h, err)
	}
}

// brokenCalled acts on what OnBroken returned.
func (s *subscription) brokenCalled(h *task, err error) {
	switch {
	case err == nil:
		s.settle(h)
	case h.Lost() || s.ledger.IsGone(h.Entry) || !s.mode.retries():
		s.ledger.Remove(time.Now(), h.Entry)
	case IsDead(err):
		h.Death = &death{kind: Broken, err: h.Broken}
		s.mode.dead(h)
	case s.isClosing():
		s.giveBack(h, h.Count()-1)
	default:
		s.log.Error("OnBroken failed; the entry comes again", err, s.entryFields(h.Entry))
		s.again(h, s.retry.delay(h.Count()))
	}
}

// death is the decision that an entry is dead. It stays until the entry is moved.
type death struct {
	kind    DeadKind
	err     error
	topic   string // a DeadLetter's; empty: the subscription's
	handler string // the router's name of the one that failed; empty: none had it
	crashed bool   // dead before Unmarshal, which may be what kills
	final   bool   // the worker wants it moved
	tries   int    // to move it, which failed

	deliveries int64 // when its worker was asked first; 0: the entry's count

	unsure *DeadMessage // it may have been moved: the answer was lost
}

// cause returns the error with its kind, for errors.Is.
func (d *death) cause() error {
	switch d.kind {
	case Exhausted:
		return mark(d.err, ErrRetriesExhausted)
	case PermanentFailure:
		return mark(d.err, ErrPermanent)
	}
	return mark(d.err, ErrDead)
}

// route returns the dead-letter stream that the innermost DeadLetter names of
// those that are for such errors; "" for the subscription's.
func (s *subscription) route(h *task, letters []DeadLetter) (topic string) {
	for _, l := range letters {
		err := h.user(func() error {
			if l.Topic != nil && l.matches(deathOf(h.Entry).cause()) {
				topic = l.Topic(s.topic)
			}
			return nil
		})
		if err != nil {
			s.log.Error("DeadLetter panicked; using "+s.deadLetters, err, s.entryFields(h.Entry))
		}
		if topic != "" {
			break
		}
	}
	return topic
}

func deathOf(e *ledger.Entry) *death { return e.Death.(*death) }

// deadLetter moves the entry to the dead-letter stream, unless a Consumer's worker
// takes it.
func (s *subscription) deadLetter(h *task) {
	d := deathOf(h.Entry)
	if d.unsure != nil {
		s.move(h, *d.unsure)
		return
	}
	fields, ok := s.deadFields(h)
	if !ok {
		return
	}
	dead := s.deadMessage(h, fields)
	switch {
	case s.typed != nil && dead.Message != nil && !s.process(h, dead):
	case isDeadLetter(fields): // it is where the dead go already
		s.markHealthy(dutyDeadLetter)
		if !h.Stuck {
			s.log.Error("A message died on a dead-letter stream; it stays pending there", d.err, s.entryFields(h.Entry))
		}
		h.Death, h.Stuck = nil, true
		s.schedule(h, true, s.retry.MaxInterval)
	default:
		s.move(h, dead)
	}
}

// deadFields returns the entry's fields as the stream has them. If there is
// nothing to be moved, it sees to what becomes of the entry.
func (s *subscription) deadFields(h *task) (fields []string, ok bool) {
	h.Fields = nil
	fields, err := s.keeper.Recount(s.life.ctx, h.Entry, h.Count())
	if err != nil {
		s.moveFailed(h, err)
		return nil, false
	}
	if fields == nil {
		s.markHealthy(dutyDeadLetter)
		s.notOurs(h)
	}
	return fields, fields != nil
}

// notOurs ends an entry that was to be moved, or has it tried again: the group was lost,
// and it is put back.
func (s *subscription) notOurs(h *task) {
	if s.ledger.Owned(h.Entry) {
		s.schedule(h, true, minBackoff)
		return
	}
	s.ledger.Remove(time.Now(), h.Entry)
	s.log.Info("A dead message was settled or claimed elsewhere before it could be moved", s.entryFields(h.Entry))
}

// move moves the entry.
func (s *subscription) move(h *task, dead DeadMessage) {
	d, topic := deathOf(h.Entry), s.deadLetters
	switch d.topic {
	case "":
	case s.topic:
		s.log.Error("Using "+s.deadLetters, errors.New("DeadLetter.Topic returned the message's own topic"), s.entryFields(h.Entry))
	default:
		topic = d.topic
	}
	id, err := s.keeper.Move(s.life.ctx, h.Entry, topic, d.unsure != nil, dead.marks(), dead.letter())
	if err != nil {
		err = fmt.Errorf("moving %s to %s: %w", h.ID, topic, err)
		if !redisx.IsReply(err) {
			d.unsure = &dead
		}
		if topic != s.deadLetters && redisx.ReplyHas(err, "CROSSSLOT") {
			s.log.Error("DeadLetter.Topic is in another slot of the Cluster than the topic; using "+s.deadLetters, err, s.entryFields(h.Entry))
			d.topic = ""
			s.move(h, dead)
			return
		}
		s.moveFailed(h, err)
		return
	}
	s.markHealthy(dutyDeadLetter)
	if id == "" {
		s.notOurs(h)
		return
	}
	dead.ID = id
	s.stats.dead.Add(1)
	s.log.Info("Dead message moved to "+topic, s.entryFields(h.Entry).Add(watermill.LogFields{
		"reason": dead.Reason, "kind": string(dead.Kind), "deliveries": strconv.FormatInt(dead.Deliveries, 10),
	}))
	if s.cfg.OnDead != nil {
		s.callOnDead(h, dead)
	}
	s.ledger.Remove(time.Now(), h.Entry)
}

// dyingCrashes is how many processes a dead message may crash in its worker's
// ProcessDead, or in decoding it for that. Then it is moved unseen.
const dyingCrashes = 3

// process lets a Consumer's worker decide about its dead message, and returns
// true if that is to be moved. A worker that fails is asked again; it runs in
// the message's place, until CloseTimeout.
func (s *subscription) process(h *task, dead DeadMessage) (move bool) {
	d := deathOf(h.Entry)
	if d.final || dead.Kind == Broken || s.diedTooOften(h.Entry) {
		return true
	}
	d.deliveries = dead.Deliveries
	if !s.countAsDead(h) {
		return false
	}
	s.markHealthy(dutyDeadLetter)
	ctx, cancel := context.WithCancelCause(s.life.calling)
	if !h.Attach(&cancel) {
		cancel(nil)
		s.ledger.Remove(time.Now(), h.Entry)
		return false
	}
	err := errPanicked // or ended its goroutine
	done := make(chan struct{})
	s.slots.calls.Go(func() {
		defer close(done)
		defer cancel(nil)
		err = guard(func() error { return s.typed.dead(ctx, dead, d.cause()) })
	})
	select {
	case <-done:
	case <-s.life.abandon:
		s.abandoned(h)
		return false
	}
	h.Detach()
	switch {
	case err == nil:
		s.stats.dead.Add(1)
		s.settle(h)
		return false
	case IsDead(err):
		d.final = true
		return true
	case !h.Lost() && s.life.calling.Err() == nil:
		s.log.Error("The worker failed to process a dead message; it is asked again", err, s.entryFields(h.Entry))
	}
	s.schedule(h, true, s.retry.delay(dead.Deliveries))
	return false
}

func (s *subscription) diedTooOften(e *ledger.Entry) bool {
	return s.retry.exhaustedBefore(e.Count() - dyingCrashes)
}

// countAsDead gives the entry, in Redis, the least count with which everybody takes
// it for dead: should the worker crash now, it is the dead message that crashed.
// It returns false if the entry is not ours, or Redis does not answer.
func (s *subscription) countAsDead(h *task) bool {
	if !s.ledger.Leased() || s.retry.MaxRetries == 0 || s.retry.exhaustedBefore(h.Count()) {
		return true
	}
	fields, err := s.keeper.Recount(s.life.ctx, h.Entry, int64(max(s.retry.MaxRetries, 0))+3)
	switch {
	case err != nil:
		s.moveFailed(h, err)
	case fields == nil:
		s.notOurs(h)
	}
	return fields != nil
}

// callOnDead waits for OnDead in the message's place, until CloseTimeout.
func (s *subscription) callOnDead(h *task, dead DeadMessage) {
	done := make(chan struct{})
	s.slots.calls.Go(func() {
		defer close(done)
		if err := guard(func() error { s.cfg.OnDead(s.life.calling, dead); return nil }); err != nil {
			s.log.Error("OnDead panicked", err, s.entryFields(h.Entry))
		}
	})
	select {
	case <-done:
	case <-s.life.abandon:
	}
}

// moveFailed keeps the dead entry, for the move to be tried again; its handler
// does not see it again.
func (s *subscription) moveFailed(h *task, err error) {
	s.markFailed(dutyDeadLetter, err)
	if s.isClosing() {
		s.giveBack(h, h.Count())
		return
	}
	d := deathOf(h.Entry)
	d.tries++
	s.schedule(h, true, jitter(min(minBackoff<<min(d.tries, 11), defaultMaxInterval)))
}
