package goxstreams

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/consume"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// This file handles malformed entries and dead messages.

// handleBroken passes a malformed entry to OnBroken, outside of the slots and of
// the order, so that an OnBroken that hangs blocks nothing.
func (s *subscription) handleBroken(h *consume.Task, err error) {
	s.stats.broken.Add(1)
	s.log.Error("Malformed entry", err, s.Fields(h))
	if s.cfg.OnBroken != nil {
		s.Subscription.Broken(h, err)
		return
	}
	h.Death = &death{kind: Broken, err: err}
	s.dead(h)
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
	err := errPanicked // stays if OnBroken calls runtime.Goexit
	defer func() {
		cancel(nil)
		h.Detach()
		s.brokenCalled(h, err)
	}()
	b := BrokenMessage{Topic: s.topic, ID: h.ID, Fields: h.Fields, RetryCount: h.Count() - 1, Err: h.Broken}
	err = guard(func() error { return s.cfg.OnBroken(ctx, b) })
}

// brokenCalled acts on OnBroken's result.
func (s *subscription) brokenCalled(h *consume.Task, err error) {
	switch {
	case err == nil:
		s.told(h, OutcomeAcked, 0, nil, nil)
		s.Settle(h)
	case s.IsLost(h):
		s.Drop(h)
	case IsDead(err), !s.Retries():
		h.Death = &death{kind: Broken, err: h.Broken}
		s.dead(h)
	case s.IsClosing():
		s.GiveBack(h, h.Count()-1)
	default:
		s.log.Error("OnBroken failed; it will be called again", err, s.Fields(h))
		delay := s.retry.delay(h.Count())
		s.told(h, OutcomeRetried, delay, err, nil)
		s.Again(h, delay)
	}
}

// death is the decision that an entry is dead. It remains until the entry is moved.
type death struct {
	kind    DeadKind
	err     error
	topic   string // from a DeadLetter; empty: the subscription's
	handler string // the router's name of the handler that failed; empty: none was called
	crashed bool   // dead before Unmarshal, which may itself cause the crashes
	final   bool   // the worker decided to move it
	tries   int    // failed attempts to move it

	deliveries int64 // when ProcessDead was first called; 0: the entry's count

	unsure *DeadMessage // set if the answer to a move was lost: the entry may already be moved
}

// cause returns the error, marked with its kind for errors.Is.
func (d *death) cause() error {
	switch d.kind {
	case Exhausted:
		return mark(d.err, ErrRetriesExhausted)
	case PermanentFailure:
		return mark(d.err, ErrPermanent)
	}
	return mark(d.err, ErrDead)
}

// route returns the dead-letter stream that the innermost matching DeadLetter
// names; "" means the subscription's.
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
	if topic == s.topic {
		s.log.Error("Using "+s.deadLetters, errors.New("DeadLetter.Topic returned the message's own topic"), s.Fields(h))
		return ""
	}
	return topic
}

func deathOf(h *consume.Task) *death { return h.Death.(*death) }

// dead finishes a dead entry.
func (s *subscription) dead(h *consume.Task) {
	if s.KeepsDead() {
		s.deadLetter(h)
		return
	}
	d := deathOf(h)
	dead := s.deadMessage(h, h.Fields)
	if !s.process(h, dead) {
		return
	}
	s.stats.dead.Add(1)
	s.log.Error("Dead message dropped: only a consumer group without NoAck stores dead letters", d.err, s.Fields(h))
	s.told(h, OutcomeDead, 0, d.cause(), &dead)
	s.Drop(h)
}

// deadLetter moves the entry to the dead-letter stream, unless a Consumer's worker
// settles it.
func (s *subscription) deadLetter(h *consume.Task) {
	d := deathOf(h)
	if d.unsure != nil {
		s.move(h, *d.unsure)
		return
	}
	h.Fields = nil
	fields := s.recount(h, h.Count())
	if fields == nil {
		return
	}
	dead := s.deadMessage(h, fields)
	switch {
	case !s.process(h, dead):
	case isDeadLetter(fields): // the entry already is a dead letter
		s.MoveEnded()
		if !h.Stuck {
			s.log.Error("A message died on a dead-letter stream; it stays pending there", d.err, s.Fields(h))
		}
		s.told(h, OutcomeRetried, s.retry.MaxInterval, d.cause(), nil)
		h.Death, h.Stuck = nil, true
		s.Again(h, s.retry.MaxInterval)
	default:
		s.move(h, dead)
	}
}

// recount sets the entry's delivery count, and returns its fields as stored in the
// stream. If there is nothing to move, it decides what happens to the entry, and returns nil.
func (s *subscription) recount(h *consume.Task, count int64) []string {
	fields, err := s.Recount(h, count)
	switch {
	case err != nil:
		s.moveFailed(h, err)
	case fields == nil:
		s.NotOurs(h)
	}
	return fields
}

// move moves the entry to the dead-letter stream.
func (s *subscription) move(h *consume.Task, dead DeadMessage) {
	d := deathOf(h)
	topic := cmp.Or(d.topic, s.deadLetters)
	id, err := s.Move(h, topic, d.unsure != nil, dead.marks(), dead.letter())
	if err != nil {
		err = fmt.Errorf("moving %s to %s: %w", h.ID, topic, err)
		if !redisx.IsReply(err) {
			d.unsure = &dead
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
	s.moved(h, dead, topic, id)
}

// MoveAgain moves an entry whose last move had no answer, unless it is in the dead-letter
// stream.
func (s *subscription) MoveAgain(h *consume.Task) error {
	d := deathOf(h)
	if d.unsure == nil {
		return nil
	}
	topic := cmp.Or(d.topic, s.deadLetters)
	id, err := s.Move(h, topic, true, d.unsure.marks(), d.unsure.letter())
	if id != "" {
		s.moved(h, *d.unsure, topic, id)
	}
	return err
}

// moved ends an entry that is in the dead-letter stream now.
func (s *subscription) moved(h *consume.Task, dead DeadMessage, topic, id string) {
	s.MoveEnded()
	dead.ID = id
	s.stats.dead.Add(1)
	s.log.Info("Dead message moved to "+topic, s.Fields(h).Add(watermill.LogFields{
		"reason": dead.Reason, "kind": string(dead.Kind), "deliveries": strconv.FormatInt(dead.Deliveries, 10),
	}))
	if s.cfg.OnDead != nil {
		s.Await(func() { // the message's slot waits, until CloseTimeout
			if err := guard(func() error { s.cfg.OnDead(s.Calling(), dead); return nil }); err != nil {
				s.log.Error("OnDead panicked", err, s.Fields(h))
			}
		})
	}
	s.told(h, OutcomeDead, 0, deathOf(h).cause(), &dead)
	s.Drop(h)
}

// dyingCrashes is how many processes a dead message may crash in its worker's
// ProcessDead, or while it is decoded for that. Then it is moved without another
// call.
const dyingCrashes = 3

// process lets a Consumer's worker decide about its dead message, and reports
// whether to move it. After an error the worker is called again. ProcessDead runs
// in the message's slot, until CloseTimeout.
func (s *subscription) process(h *consume.Task, dead DeadMessage) (move bool) {
	d := deathOf(h)
	if s.typed.dead == nil || dead.Message == nil || d.final || s.diedTooOften(h) {
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
	err := errPanicked // stays if ProcessDead calls runtime.Goexit
	if !s.Await(func() {
		defer cancel(nil)
		err = guard(func() error { return s.typed.dead(ctx, dead, d.cause()) })
	}) {
		s.Left(h)
		return false
	}
	h.Detach()
	switch {
	case err == nil:
		s.stats.dead.Add(1)
		s.told(h, OutcomeAcked, 0, nil, nil)
		s.Settle(h)
		return false
	case IsDead(err):
		d.final = true
		return true
	case !h.Lost() && s.Calling().Err() == nil:
		s.log.Error("ProcessDead failed; it will be called again", err, s.Fields(h))
	}
	delay := s.retry.delay(dead.Deliveries)
	if !s.IsClosing() {
		s.told(h, OutcomeRetried, delay, err, nil)
	}
	s.Again(h, delay)
	return false
}

func (s *subscription) diedTooOften(h *consume.Task) bool {
	return s.retry.exhaustedBefore(h.Count() - dyingCrashes)
}

// countAsDead raises the entry's delivery count in Redis to the lowest one that
// every consumer takes for dead: if the worker crashes now, the crash counts
// against the dead message. It returns false if the entry is no longer ours, or
// Redis does not answer.
func (s *subscription) countAsDead(h *consume.Task) bool {
	if !s.KeepsDead() || s.retry.MaxRetries == 0 || s.retry.exhaustedBefore(h.Count()) {
		return true
	}
	return s.recount(h, int64(max(s.retry.MaxRetries, 0))+3) != nil
}

// moveFailed keeps the dead entry and schedules another attempt to move it.
func (s *subscription) moveFailed(h *consume.Task, err error) {
	d := deathOf(h)
	d.tries++
	s.MoveFailed(h, d.tries, err)
}
