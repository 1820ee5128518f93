package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// This file is about what cannot be handled: broken entries, and dead messages.

// brokenPatience is how long a slot waits for OnBroken before it goes on
// without it, so that one which hangs stops nothing; maxBrokenCalls bounds how
// many can hang.
const (
	brokenPatience = time.Second
	maxBrokenCalls = 16
)

// handleBroken hands an entry that is no message to OnBroken, outside the order.
func (s *subscription) handleBroken(h *held, err error) {
	fields := h.fields
	h.fields = nil
	s.stats.broken.Add(1)
	s.log.Error("Broken entry", err, s.entryFields(h))
	if s.cfg.OnBroken == nil {
		if s.leased() {
			h.doom = &doom{kind: Broken, err: err}
			s.bury(h)
		} else { // every subscriber gets it, or nobody can get it again
			s.leases.remove(h)
		}
		return
	}

	select {
	case s.brokenCalls <- struct{}{}:
	case <-s.abandon:
		s.giveBack(h, h.count-1)
		return
	}
	h.slot = nil // the call may outlast its slot
	done := make(chan struct{})
	s.calls.Go(func() {
		defer close(done)
		defer func() { <-s.brokenCalls }()
		s.callOnBroken(h, BrokenMessage{Topic: s.topic, ID: h.id, Fields: fields, RetryCount: h.count - 1, Err: err})
	})
	patience := time.NewTimer(brokenPatience)
	defer patience.Stop()
	select {
	case <-done:
	case <-patience.C:
	}
}

func (s *subscription) callOnBroken(h *held, b BrokenMessage) {
	ctx, cancel := context.WithCancelCause(s.calling)
	defer cancel(nil)
	if !s.leases.move(h, out, cancel) {
		s.leases.remove(h)
		return
	}
	err := errPanicked // or ended its goroutine
	defer s.settled()
	defer func() { s.brokenCalled(h, b, err) }()
	err = guard(func() error { return s.cfg.OnBroken(ctx, b) })
}

// brokenCalled acts on what OnBroken returned.
func (s *subscription) brokenCalled(h *held, b BrokenMessage, err error) {
	lost, gone := s.leases.lapsed(h)
	switch {
	case err == nil:
		s.settle(h)
	case lost || gone || s.cfg.NoAck:
		s.leases.remove(h)
	case IsDead(err):
		h.doom = &doom{kind: Broken, err: b.Err}
		s.bury(h)
	case s.isClosing():
		s.giveBack(h, h.count-1)
	default:
		s.log.Error("OnBroken failed; the entry comes again", err, s.entryFields(h))
		if s.fanOut() {
			h.fields = b.Fields
		}
		s.wait(h, s.retry.delay(h.count))
	}
}

// doom is the decision that an entry is dead. It stays until the entry is moved.
type doom struct {
	kind    DeadKind
	err     error
	topic   string // a DeadLetter's; empty: the subscription's
	handler string // the router's name of the one that failed; empty: none had it
	crashed bool   // dead before Unmarshal, which may be what kills
	final   bool   // the worker wants it moved
	tries   int    // to move it, which failed

	deliveries int64 // when its worker was asked first; 0: the entry's count
}

// cause returns the error with its kind, for errors.Is.
func (d *doom) cause() error {
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
func (s *subscription) route(h *held, letters []DeadLetter) (topic string) {
	for _, l := range letters {
		err := h.user(func() error {
			if l.Topic != nil && l.matches(h.doom.cause()) {
				topic = l.Topic(s.topic)
			}
			return nil
		})
		if err != nil {
			s.log.Error("DeadLetter panicked; using "+s.deadLetters, err, s.entryFields(h))
		}
		if topic != "" {
			break
		}
	}
	return topic
}

// bury moves the entry to the dead-letter stream, unless a Consumer's worker
// takes it.
func (s *subscription) bury(h *held) {
	// Not settled yet: should the group be lost now, the entry is put back with
	// the others.
	s.leases.move(h, out, nil)
	fields := h.fields // of what cannot be looked at again
	if s.leased() {
		var there bool
		if fields, there = s.deadFields(h); !there {
			return
		}
	}
	dead := s.deadMessage(h, fields)
	switch {
	case s.typed != nil && dead.Message != nil && !s.process(h, dead):
	case !s.leased():
		s.stats.dead.Add(1)
		s.log.Error("Dead message; without a group it is not stored, since every subscriber would", h.doom.err, s.entryFields(h))
		s.leases.remove(h)
	case isDeadLetter(fields): // it is where the dead go already
		s.markHealthy(dutyBury)
		if !h.stuck {
			s.log.Error("A message died on a dead-letter stream; it stays pending there", h.doom.err, s.entryFields(h))
		}
		h.doom, h.stuck = nil, true
		s.wait(h, s.retry.MaxInterval)
	default:
		s.entomb(h, dead)
	}
}

// deadFields returns the entry's fields as the stream has them. If there is
// nothing to be moved, it sees to what becomes of the entry.
func (s *subscription) deadFields(h *held) (fields []string, there bool) {
	h.fields = nil
	e, p, err := s.stream.Look(s.ctx, h.id)
	if err != nil {
		s.buryFailed(h, err)
		return nil, false
	}
	if e != nil {
		return e.Fields, true
	}
	s.markHealthy(dutyBury)
	switch {
	case p != nil:
		s.ackTrimmed(h)
	case !s.cfg.DeleteAcked && !s.leases.maybeMoved(h): // as in verify
		s.trimmed(h)
	}
	s.leases.remove(h)
	return nil, false
}

// entomb moves the entry.
func (s *subscription) entomb(h *held, dead DeadMessage) {
	topic := s.deadLetters
	switch h.doom.topic {
	case "":
	case s.topic:
		s.log.Error("Using "+s.deadLetters, errors.New("DeadLetter.Topic returned the message's own topic"), s.entryFields(h))
	default:
		topic = h.doom.topic
	}
	unsure := s.leases.maybeMoved(h) // by a try before, the answer of which was lost
	s.leases.burying(h, true)
	id, err := s.moveToDeadLetters(s.ctx, topic, h, dead.letter())
	if err != nil {
		err = fmt.Errorf("moving %s to %s: %w", h.id, topic, err)
		s.leases.burying(h, unsure || !redisx.IsReply(err))
		if topic != s.deadLetters && redisx.ReplyHas(err, "CROSSSLOT") {
			s.log.Error("DeadLetter.Topic is in another slot of the Cluster than the topic; using "+s.deadLetters, err, s.entryFields(h))
			h.doom.topic = ""
			s.entomb(h, dead)
			return
		}
		s.buryFailed(h, err)
		return
	}
	if id == "" && s.stream.ConsumerUnknown(s.ctx) { // nobody settled it: the group was made anew
		s.leases.burying(h, false)
		s.buryFailed(h, xstream.ErrNoGroup)
		return
	}
	s.markHealthy(dutyBury)
	s.leases.remove(h)
	s.settled()
	if id == "" {
		s.log.Info("A dead message was settled or claimed elsewhere before it could be moved", s.entryFields(h))
		return
	}
	dead.ID = id
	s.stats.dead.Add(1)
	s.log.Info("Dead message moved to "+topic, s.entryFields(h).Add(watermill.LogFields{
		"reason": dead.Reason, "kind": string(dead.Kind), "deliveries": strconv.FormatInt(dead.Deliveries, 10),
	}))
	if s.cfg.OnDead != nil {
		s.callOnDead(h, dead)
	}
}

// dyingCrashes is how many processes a dead message may crash in its worker's
// ProcessDead, or in decoding it for that. Then it is moved unseen.
const dyingCrashes = 3

// process lets a Consumer's worker decide about its dead message, and returns
// true if that is to be moved. A worker that fails is asked again; it runs in
// the message's place, until CloseTimeout.
func (s *subscription) process(h *held, dead DeadMessage) (move bool) {
	if h.doom.final || dead.Kind == Broken || s.diedTooOften(h) {
		return true
	}
	h.doom.deliveries = dead.Deliveries
	if !s.engrave(h) {
		return false
	}
	s.markHealthy(dutyBury)
	ctx, cancel := context.WithCancelCause(s.calling)
	if !s.leases.move(h, out, cancel) {
		cancel(nil)
		s.leases.remove(h)
		return false
	}
	err := errPanicked // or ended its goroutine
	done := make(chan struct{})
	s.calls.Go(func() {
		defer close(done)
		defer cancel(nil)
		err = guard(func() error { return s.typed.dead(ctx, dead, h.doom.cause()) })
	})
	select {
	case <-done:
	case <-s.abandon:
		s.abandoned(h)
		return false
	}
	lost, _ := s.leases.lapsed(h)
	switch {
	case err == nil:
		s.stats.dead.Add(1)
		s.settle(h)
		return false
	case IsDead(err):
		h.doom.final = true
		s.leases.move(h, out, nil)
		return true
	case !lost && s.calling.Err() == nil:
		s.log.Error("The worker failed to process a dead message; it is asked again", err, s.entryFields(h))
	}
	s.wait(h, s.retry.delay(dead.Deliveries))
	return false
}

func (s *subscription) diedTooOften(h *held) bool {
	return s.retry.exhaustedBefore(h.count - dyingCrashes)
}

// engrave gives the entry, in Redis, the least count with which everybody takes
// it for dead: should the worker crash now, it is the dead message that crashed.
// It returns false if the entry is not ours, or Redis does not answer.
func (s *subscription) engrave(h *held) bool {
	if !s.leased() || s.retry.MaxRetries == 0 || s.retry.exhaustedBefore(h.count) {
		return true
	}
	count := int64(max(s.retry.MaxRetries, 0)) + 3
	s.leases.recounting(h, count)
	sent := time.Now()
	ours, err := s.setCount(h, count)
	switch {
	case err != nil:
		s.buryFailed(h, err)
	case !ours:
		s.leases.remove(h)
	default:
		s.leases.claimed(h, sent, count)
		return true
	}
	return false
}

// callOnDead waits for OnDead in the message's place, until CloseTimeout.
func (s *subscription) callOnDead(h *held, dead DeadMessage) {
	done := make(chan struct{})
	s.calls.Go(func() {
		defer close(done)
		if err := guard(func() error { s.cfg.OnDead(s.calling, dead); return nil }); err != nil {
			s.log.Error("OnDead panicked", err, s.entryFields(h))
		}
	})
	select {
	case <-done:
	case <-s.abandon:
	}
}

func (s *subscription) moveToDeadLetters(ctx context.Context, topic string, h *held, fields []string) (string, error) {
	id, err := s.stream.DeadLetter(ctx, topic, h.id, h.count, s.deletes, fields)
	if err == nil && s.deletes != xstream.DeleteNever {
		s.kept.Store(true) // a fan-out may need it still
	}
	return id, err
}

// buryFailed keeps the dead entry, for the move to be tried again; its handler
// does not see it again.
func (s *subscription) buryFailed(h *held, err error) {
	s.markFailed(dutyBury, err)
	if xstream.GroupLost(err) {
		_ = s.regroup()
	}
	if s.isClosing() {
		s.giveBack(h, h.count)
		return
	}
	h.doom.tries++
	s.wait(h, jitter(min(minBackoff<<min(h.doom.tries, 11), defaultMaxInterval)))
}
