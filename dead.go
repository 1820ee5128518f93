package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/consume"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// This file is about what cannot be handled: broken entries, and dead messages.

// handleBroken hands an entry that is no message to OnBroken, outside of the slots and
// of the order: one that hangs stops nothing.
func (s *subscription) handleBroken(h *consume.Task, err error) {
	s.stats.broken.Add(1)
	s.log.Error("Broken entry", err, s.Fields(h))
	switch {
	case s.cfg.OnBroken != nil:
		h.Broken = err
		s.Subscription.Broken(h)
	case s.KeepsDead():
		h.Death = &death{kind: Broken, err: err}
		s.deadLetter(h)
	default:
		s.Drop(h)
	}
}

// CallBroken calls OnBroken with a malformed entry.
func (s *subscription) CallBroken(h *consume.Task) {
	h.Fields, _, _ = cutReplay(h.Fields)
	if s.retry.exhaustedBefore(h.Count()) {
		h.Death = &death{kind: Exhausted, err: ErrRetriesExhausted, crashed: true}
		s.dead(h)
		return
	}
	ctx, cancel := context.WithCancelCause(s.Calling())
	if !h.Attach(&cancel) {
		cancel(nil)
		s.Drop(h)
		return
	}
	err := errPanicked // or it has ended its goroutine
	defer func() {
		cancel(nil)
		h.Detach()
		s.brokenCalled(h, err)
	}()
	b := BrokenMessage{Topic: s.topic, ID: h.ID, Fields: h.Fields, RetryCount: h.Count() - 1, Err: h.Broken}
	err = guard(func() error { return s.cfg.OnBroken(ctx, b) })
}

// brokenCalled acts on what OnBroken returned.
func (s *subscription) brokenCalled(h *consume.Task, err error) {
	switch {
	case err == nil:
		s.Settle(h)
	case s.IsLost(h) || !s.Retries():
		s.Drop(h)
	case IsDead(err):
		h.Death = &death{kind: Broken, err: h.Broken}
		s.dead(h)
	case s.IsClosing():
		s.GiveBack(h, h.Count()-1)
	default:
		s.log.Error("OnBroken failed; the entry comes again", err, s.Fields(h))
		s.Again(h, s.retry.delay(h.Count()))
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
func (s *subscription) route(h *consume.Task, letters []DeadLetter) (topic string) {
	for _, l := range letters {
		err := user(h, func() error {
			if l.Topic != nil && l.matches(deathOf(h).cause()) {
				topic = l.Topic(s.topic)
			}
			return nil
		})
		if err != nil {
			s.log.Error("DeadLetter panicked; using "+s.deadLetters, err, s.Fields(h))
		}
		if topic != "" {
			break
		}
	}
	return topic
}

func deathOf(h *consume.Task) *death { return h.Death.(*death) }

// dead ends a dead entry.
func (s *subscription) dead(h *consume.Task) {
	if s.KeepsDead() {
		s.deadLetter(h)
		return
	}
	d := deathOf(h)
	dead := s.deadMessage(h, h.Fields)
	if s.typed != nil && dead.Message != nil && !s.process(h, dead) {
		return
	}
	s.stats.dead.Add(1)
	s.log.Error("Dead message; without a group it is not stored, since every subscriber would", d.err, s.Fields(h))
	s.Drop(h)
}

// deadLetter moves the entry to the dead-letter stream, unless a Consumer's worker
// takes it.
func (s *subscription) deadLetter(h *consume.Task) {
	d := deathOf(h)
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
		s.MoveEnded()
		if !h.Stuck {
			s.log.Error("A message died on a dead-letter stream; it stays pending there", d.err, s.Fields(h))
		}
		h.Death, h.Stuck = nil, true
		s.Aside(h, s.retry.MaxInterval)
	default:
		s.move(h, dead)
	}
}

// deadFields returns the entry's fields as the stream has them. If there is
// nothing to be moved, it sees to what becomes of the entry.
func (s *subscription) deadFields(h *consume.Task) (fields []string, ok bool) {
	h.Fields = nil
	fields, err := s.Recount(h, h.Count())
	switch {
	case err != nil:
		s.moveFailed(h, err)
	case fields == nil:
		s.NotOurs(h)
	}
	return fields, fields != nil
}

// move moves the entry.
func (s *subscription) move(h *consume.Task, dead DeadMessage) {
	d, topic := deathOf(h), s.deadLetters
	switch d.topic {
	case "":
	case s.topic:
		s.log.Error("Using "+s.deadLetters, errors.New("DeadLetter.Topic returned the message's own topic"), s.Fields(h))
	default:
		topic = d.topic
	}
	id, err := s.Move(h, topic, d.unsure != nil, dead.marks(), dead.letter())
	if err != nil {
		err = fmt.Errorf("moving %s to %s: %w", h.ID, topic, err)
		if !redisx.IsReply(err) {
			first := d.unsure == nil
			d.unsure = &dead
			if first && s.IsClosing() { // else it is given back, for others to move what is moved
				s.move(h, dead)
				return
			}
		}
		if topic != s.deadLetters && redisx.ReplyHas(err, "CROSSSLOT") {
			s.log.Error("DeadLetter.Topic is in another slot of the Cluster than the topic; using "+s.deadLetters, err, s.Fields(h))
			d.topic = ""
			s.move(h, dead)
			return
		}
		s.moveFailed(h, err)
		return
	}
	if id == "" {
		s.NotOurs(h)
		return
	}
	s.MoveEnded()
	dead.ID = id
	s.stats.dead.Add(1)
	s.log.Info("Dead message moved to "+topic, s.Fields(h).Add(watermill.LogFields{
		"reason": dead.Reason, "kind": string(dead.Kind), "deliveries": strconv.FormatInt(dead.Deliveries, 10),
	}))
	if s.cfg.OnDead != nil {
		s.callOnDead(h, dead)
	}
	s.Drop(h)
}

// dyingCrashes is how many processes a dead message may crash in its worker's
// ProcessDead, or in decoding it for that. Then it is moved unseen.
const dyingCrashes = 3

// process lets a Consumer's worker decide about its dead message, and returns
// true if that is to be moved. A worker that fails is asked again; it runs in
// the message's place, until CloseTimeout.
func (s *subscription) process(h *consume.Task, dead DeadMessage) (move bool) {
	d := deathOf(h)
	if d.final || dead.Kind == Broken || s.diedTooOften(h) {
		return true
	}
	d.deliveries = dead.Deliveries
	if !s.countAsDead(h) {
		return false
	}
	s.MoveEnded()
	ctx, cancel := context.WithCancelCause(s.Calling())
	if !h.Attach(&cancel) {
		cancel(nil)
		s.Drop(h)
		return false
	}
	err := errPanicked // or ended its goroutine
	done := make(chan struct{})
	s.Go(func() {
		defer close(done)
		defer cancel(nil)
		err = guard(func() error { return s.typed.dead(ctx, dead, d.cause()) })
	})
	select {
	case <-done:
	case <-s.Abandon():
		s.abandoned(h)
		return false
	}
	h.Detach()
	switch {
	case err == nil:
		s.stats.dead.Add(1)
		s.Settle(h)
		return false
	case IsDead(err):
		d.final = true
		return true
	case !h.Lost() && s.Calling().Err() == nil:
		s.log.Error("The worker failed to process a dead message; it is asked again", err, s.Fields(h))
	}
	s.Aside(h, s.retry.delay(dead.Deliveries))
	return false
}

func (s *subscription) diedTooOften(h *consume.Task) bool {
	return s.retry.exhaustedBefore(h.Count() - dyingCrashes)
}

// countAsDead gives the entry, in Redis, the least count with which everybody takes
// it for dead: should the worker crash now, it is the dead message that crashed.
// It returns false if the entry is not ours, or Redis does not answer.
func (s *subscription) countAsDead(h *consume.Task) bool {
	if !s.KeepsDead() || s.retry.MaxRetries == 0 || s.retry.exhaustedBefore(h.Count()) {
		return true
	}
	fields, err := s.Recount(h, int64(max(s.retry.MaxRetries, 0))+3)
	switch {
	case err != nil:
		s.moveFailed(h, err)
	case fields == nil:
		s.NotOurs(h)
	}
	return fields != nil
}

// callOnDead waits for OnDead in the message's place, until CloseTimeout.
func (s *subscription) callOnDead(h *consume.Task, dead DeadMessage) {
	done := make(chan struct{})
	s.Go(func() {
		defer close(done)
		if err := guard(func() error { s.cfg.OnDead(s.Calling(), dead); return nil }); err != nil {
			s.log.Error("OnDead panicked", err, s.Fields(h))
		}
	})
	select {
	case <-done:
	case <-s.Abandon():
	}
}

// moveFailed keeps the dead entry, for the move to be tried again.
func (s *subscription) moveFailed(h *consume.Task, err error) {
	d := deathOf(h)
	d.tries++
	s.MoveFailed(h, d.tries, err)
}
