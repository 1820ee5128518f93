package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
)

// Delivery is what a handler can know of the delivery that it handles; it takes
// it from the message's context with DeliveryFromContext.
type Delivery struct {
	Topic    string
	Group    string // empty in fan-out
	Consumer string // empty in fan-out
	ID       string // the entry's

	// Count is how many times Redis has delivered the entry to this group, this
	// time included: 1 at first. In fan-out the subscription counts by itself.
	Count int64

	// MaxRetries is the limit of the subscription's Retry: 0 without one, -1
	// for no retries.
	MaxRetries int
}

// RetryCount returns the deliveries before this one.
func (d Delivery) RetryCount() int64 { return d.Count - 1 }

// Time returns when the entry was added, by its ID: the server's clock, in
// milliseconds. The zero time if the ID was given by hand and is no time.
func (d Delivery) Time() time.Time {
	ms, _ := splitID(d.ID)
	if ms == 0 || ms > 1<<53 {
		return time.Time{}
	}
	return time.UnixMilli(int64(ms))
}

type deliveryKey struct{}

// deliveryContext is a context.WithValue of a Delivery, in one piece.
type deliveryContext struct {
	context.Context
	delivery Delivery
}

func (c *deliveryContext) Value(key any) any {
	if _, ok := key.(deliveryKey); ok {
		return &c.delivery
	}
	return c.Context.Value(key)
}

// DeliveryFromContext returns the delivery that a message's context belongs to.
// It is false for a message that does not come from this library, and for one
// that lost its context in a Copy.
func DeliveryFromContext(ctx context.Context) (Delivery, bool) {
	d, ok := ctx.Value(deliveryKey{}).(*Delivery)
	if !ok {
		return Delivery{}, false
	}
	return *d, true
}

// slot is a goroutine that takes one entry at a time all the way to its
// outcome. There are MaxConcurrency of them at most: that is the bound on
// unsettled messages, and with one, the order.
func (s *subscription) slot() {
	for h := s.next(); h != nil; h = s.next() {
		s.handle(h)
		s.free()
	}
}

// handle brings an entry to its outcome: acked, waiting for its retry, moved to
// the dead-letter stream, released, or not ours any more.
func (s *subscription) handle(h *held) {
	for {
		ready, again := s.acquire(h)
		if again {
			continue
		}
		if !ready {
			return
		}
		if h.doom == nil && s.retry.exhaustedBefore(h.count) {
			h.doom = &doom{kind: Exhausted, err: ErrRetriesExhausted, crashed: true}
		}
		if h.doom != nil {
			s.bury(h)
			return
		}
		msg, err := s.unmarshal(h)
		if err != nil {
			s.handleBroken(h, err)
			return
		}
		if !s.deliver(h, msg) {
			return
		}
	}
}

// acquire makes sure that the entry is ours, with its fields: it claims what
// was not read just now. It returns ready if it is, again to be asked once more,
// and neither if the entry is somebody else's business, or comes later.
func (s *subscription) acquire(h *held) (ready, again bool) {
	if h.fields != nil {
		return true, false
	}
	if h.doom != nil {
		if s.leases.move(h, out, nil) {
			return true, false
		}
		s.works(dutyBury) // somebody else's to move
		s.leases.remove(h)
		return false, false
	}
	ctx := s.ctx
	if h.state == found {
		// Looked at first, because a claim of a deleted entry would remove the
		// trace of it.
		e, p, err := s.stream.look(ctx, h.id)
		if err != nil {
			return false, s.acquireFailed(h, err)
		}
		s.works(dutyClaim)
		if p == nil || e == nil {
			if p != nil {
				s.ackTrimmed(h)
			}
			s.leases.remove(h)
			return false, false
		}
	}
	e, err := s.stream.claim(ctx, h.id, s.leases.asking(h), h.next)
	if err != nil {
		return false, s.acquireFailed(h, err)
	}
	if e == nil {
		return false, s.acquireRefused(h)
	}
	if h.state == found {
		s.stats.claimed.Add(1)
	}
	s.leases.claimed(h, time.Now(), h.next)
	s.works(dutyClaim)
	h.fields = e.fields
	return true, false
}

// acquireFailed handles a claim without an answer. It may have happened, which
// the next try finds out.
func (s *subscription) acquireFailed(h *held, err error) (again bool) {
	s.failing(dutyClaim, err)
	if groupLost(err) {
		_ = s.regroup() // if that fails, the claimer tries again
	}
	if h.state == found {
		// Nobody's yet, or an orphan of ours: the claimer finds it either way.
		s.leases.remove(h)
		s.claimer.orphaned.Store(true)
		return false
	}
	return s.again(h, max(s.retry.InitialInterval, minBackoff))
}

// acquireRefused handles a claim that the server did not grant: the entry is
// younger than it would be in our hands, or gone.
func (s *subscription) acquireRefused(h *held) (again bool) {
	if h.state == found {
		s.leases.remove(h) // renewed, acked, or claimed by another consumer
		return false
	}
	ours, err := s.verify(h)
	switch {
	case err != nil:
		return s.acquireFailed(h, err)
	case ours:
		return s.again(h, minBackoff)
	}
	s.leases.remove(h)
	return false
}

// unmarshal turns the entry into a message. A dead letter is decoded the way
// this library wrote it, whatever the topic's format.
func (s *subscription) unmarshal(h *held) (*message.Message, error) {
	u := s.cfg.Unmarshaler
	if isDeadLetter(h.fields) {
		u = DefaultMarshaler{}
	}
	msg, err := unmarshalFields(u, h.fields)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	if msg.UUID == "" {
		msg.UUID = h.id
	}
	return msg, nil
}

// deliver hands the message over and waits for it to be settled. It returns true
// if the entry is to be delivered again in this very slot: with MaxConcurrency 1
// a nacked message keeps its place.
func (s *subscription) deliver(h *held, msg *message.Message) (again bool) {
	ctx, cancel := context.WithCancelCause(&deliveryContext{s.base, Delivery{
		Topic: s.topic, Group: s.stream.group, Consumer: s.stream.consumer,
		ID: h.id, Count: h.count, MaxRetries: s.retry.MaxRetries,
	}})
	defer cancel(nil)
	msg.SetContext(ctx)
	if !s.leases.move(h, out, cancel) {
		s.leases.remove(h)
		return false
	}

	select {
	case s.output <- msg:
	default:
		if !s.offer(ctx, h, msg) {
			return false
		}
	}
	s.stats.delivered.Add(1)
	if !s.fanOut() && !s.cfg.NoAck {
		h.fields = nil
	}

	select {
	case <-msg.Acked():
	case <-msg.Nacked():
		return s.nacked(h, msg)
	case <-s.abandon:
		if msg.Nack() { // so that whoever waits for the outcome goes on
			s.abandoned(h)
			return false
		}
	}
	s.acked(h)
	return false
}

// offer waits for somebody to take the message. It returns false if the
// subscription closes or the lease is lost before.
func (s *subscription) offer(ctx context.Context, h *held, msg *message.Message) bool {
	select {
	case s.output <- msg:
		return true
	case <-s.withdraw:
		if s.cfg.NoAck {
			s.stats.lost.Add(1)
			s.log.Error("Message lost", errors.New("NoAck: nobody took it before CloseTimeout"), s.entryFields(h))
		}
		s.giveBack(h, h.count-1)
	case <-ctx.Done():
		s.leases.remove(h)
	}
	return false
}

func (s *subscription) acked(h *held) {
	s.stats.acked.Add(1)
	if s.fanOut() || s.cfg.NoAck {
		s.leases.remove(h)
		return
	}
	// Even if the lease is lost: the work is done.
	s.leases.move(h, settled, nil)
	s.acker.add(h)
}

// nacked decides what becomes of a message whose handler failed.
func (s *subscription) nacked(h *held, msg *message.Message) (again bool) {
	s.stats.nacked.Add(1)
	lost, gone := s.leases.lapsed(h)
	switch {
	case s.cfg.NoAck:
		s.log.Debug("Nacked, but the subscription is NoAck: dropped", s.entryFields(h))
		s.leases.remove(h)
		return false
	case lost || gone: // another consumer's, or nobody's any more
		s.leases.remove(h)
		return false
	case s.isClosing():
		// A shutdown is no failure: whether the handler failed because of it
		// cannot be told, and a retry too many does less harm than one too few.
		s.giveBack(h, h.count-1)
		return false
	}

	delay := s.retry.delay(h.count)
	if s.retry.exhausted(h.count) {
		h.doom = &doom{kind: Exhausted, err: ErrRetriesExhausted, msg: msg}
	} else if ask := s.retry.ShouldRetry; ask != nil {
		retry := true
		err := guard(func() error {
			retry = ask(middleware.RetryParams{Err: ErrNacked, RetryNum: int(h.count), Delay: delay})
			return nil
		})
		if err != nil {
			s.log.Error("Retry.ShouldRetry panicked; the message is tried again", err, s.entryFields(h))
		}
		if !retry {
			h.doom = &doom{kind: Permanent, err: ErrPermanent, msg: msg}
		}
	}
	if h.doom != nil {
		s.bury(h)
		return false
	}
	if hook := s.retry.OnRetryHook; hook != nil {
		if err := guard(func() error { hook(int(h.count), delay); return nil }); err != nil {
			s.log.Error("Retry.OnRetryHook panicked", err, s.entryFields(h))
		}
	}
	return s.again(h, delay)
}

// abandoned gives up on a handler that did not heed the end of its context. It
// may still be at work, so the entry is not released: it stays in this
// consumer's name until its time is up. This delivery does not count.
func (s *subscription) abandoned(h *held) {
	s.log.Info("The handler did not finish within CloseTimeout; the message is handled again once its lease has run out", s.entryFields(h))
	if s.leased() {
		s.uncount(h)
	}
	s.leases.remove(h)
}

// uncount takes this delivery off the entry's count, while the entry stays ours.
func (s *subscription) uncount(h *held) {
	for range 2 { // a renewal may cross the first: then the entry is younger than we knew
		got, err := s.stream.assign(s.ctx, s.stream.consumer, s.leases.idle(h), h.count-1, []string{h.id})
		if err == nil && !got[h.id] {
			var ours bool
			if ours, err = s.verify(h); ours {
				continue
			}
		}
		if err != nil {
			s.log.Error("The abandoned message keeps its delivery count", err, s.entryFields(h))
		}
		return
	}
}

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
	if s.fanOut() || s.cfg.NoAck {
		// Every subscriber gets it, or nobody can get it again: there is nothing
		// to move.
		if s.cfg.OnBroken == nil {
			s.leases.remove(h)
			return
		}
	} else if s.cfg.OnBroken == nil {
		h.doom = &doom{kind: Broken, err: err}
		s.bury(h)
		return
	}

	select {
	case s.brokenCalls <- struct{}{}:
	case <-s.abandon:
		s.giveBack(h, h.count-1)
		return
	}
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
	err := guard(func() error { return s.cfg.OnBroken(ctx, b) })
	defer s.settled()
	lost, gone := s.leases.lapsed(h)
	switch {
	case err == nil:
		if !s.fanOut() && !s.cfg.NoAck {
			s.leases.move(h, settled, nil)
			s.acker.add(h)
			return
		}
		s.leases.remove(h)
	case lost || gone || s.cfg.NoAck:
		s.leases.remove(h)
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

// guard calls a function of the user and turns its panic into an error.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

// doom is the decision that an entry is dead. It stays until the entry is moved.
type doom struct {
	kind    DeadKind
	err     error
	msg     *message.Message // as the handler had it; nil if no handler had it
	crashed bool             // dead before Unmarshal, which may be what kills
}

// bury moves the entry to the dead-letter stream.
func (s *subscription) bury(h *held) {
	if s.fanOut() || s.cfg.NoAck {
		s.stats.dead.Add(1)
		s.log.Error("Dead message; without a group it is not stored, since every subscriber would", h.doom.err, s.entryFields(h))
		s.leases.remove(h)
		return
	}
	s.leases.move(h, settled, nil) // a renewal that crosses the move finds nothing
	h.fields = nil
	ctx := s.ctx
	e, p, err := s.stream.look(ctx, h.id)
	switch {
	case err != nil:
		s.buryFailed(h, err)
		return
	case e == nil:
		s.works(dutyBury)
		if p != nil {
			s.ackTrimmed(h)
		}
		s.leases.remove(h)
		return
	case isDeadLetter(e.fields):
		// It is where the dead go already.
		s.works(dutyBury)
		s.log.Error("A message died on a dead-letter stream; it stays pending there", h.doom.err, s.entryFields(h))
		h.doom = nil
		s.wait(h, s.retry.MaxInterval)
		return
	}
	dead := s.deadMessage(h, e.fields)
	s.leases.burying(h, true)
	id, err := s.moveToDeadLetters(ctx, h, dead.letter())
	if err != nil {
		s.leases.burying(h, !isReply(err))
		s.buryFailed(h, err)
		return
	}
	s.works(dutyBury)
	s.leases.remove(h)
	s.settled()
	if id == "" {
		s.log.Info("A dead message was settled or claimed elsewhere before it could be moved", s.entryFields(h))
		return
	}
	dead.ID = id
	s.stats.dead.Add(1)
	s.log.Info("Dead message moved to "+s.deadLetters, s.entryFields(h).Add(watermill.LogFields{
		"reason": dead.Reason, "kind": dead.Kind.String(), "deliveries": strconv.FormatInt(dead.Deliveries, 10),
	}))
	if s.cfg.OnDead != nil {
		s.callOnDead(h, dead)
	}
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

func (s *subscription) moveToDeadLetters(ctx context.Context, h *held, fields []any) (string, error) {
	if !s.noScripts.Load() {
		id, err := s.stream.bury(ctx, s.deadLetters, h.id, h.count, fields)
		if !noScripts(err) {
			return id, err
		}
		s.noScripts.Store(true)
		s.log.Info("No right to EVAL: dead letters are moved by XADD, then XACK, which can store one twice if the connection breaks in between", s.logFields)
	}
	return s.stream.buryInTwo(ctx, s.deadLetters, h.id, h.count, fields)
}

// buryFailed keeps the dead entry, for the move to be tried again; its handler
// does not see it again.
func (s *subscription) buryFailed(h *held, err error) {
	s.failing(dutyBury, fmt.Errorf("moving %s to %s: %w", h.id, s.deadLetters, err))
	if groupLost(err) {
		_ = s.regroup()
	}
	if s.isClosing() {
		s.giveBack(h, h.count)
		return
	}
	s.wait(h, max(s.retry.InitialInterval, minBackoff))
}

// ackTrimmed acks an entry away that was deleted from the stream while it was
// pending: its message is lost, and that is said.
func (s *subscription) ackTrimmed(h *held) {
	s.stats.lost.Add(1)
	s.log.Error("Message lost", errors.New("the entry was trimmed or deleted while it was pending"), s.entryFields(h))
	if err := s.stream.ack(s.ctx, []string{h.id}); err != nil {
		s.log.Debug("XACK of a deleted entry failed: "+err.Error(), s.entryFields(h))
	}
}

// verify finds out what became of an entry whose renewal or claim was refused.
// It is still ours if it is pending with our name and our count: a claim by
// anybody else raises the count. (The server's clock may have been set back,
// or two commands of ours have crossed.)
func (s *subscription) verify(h *held) (ours bool, err error) {
	e, p, err := s.stream.look(s.ctx, h.id)
	if err != nil {
		return false, err
	}
	if p == nil && e != nil && !s.leases.maybeMoved(h) {
		// Not pending, not deleted: acked elsewhere, or the group was made anew.
		again, err := s.restoreIfRemade(h)
		if again || err != nil {
			return again, err
		}
	}
	if !s.leases.stillOurs(h) {
		return false, nil // settled meanwhile
	}
	switch {
	case p != nil && p.consumer == s.stream.consumer && s.leases.counted(h, p.count):
		s.leases.confirm(time.Now().Add(-p.idle), h)
		return true, nil
	case p == nil && e == nil && !s.cfg.DeleteAcked: // with it, settled elsewhere looks the same
		s.leases.bereave(h)
		s.ackTrimmed(h)
	default:
		s.leases.lose(h)
		s.log.Info("Lease lost: another consumer has the message, or settled it", s.entryFields(h))
	}
	return false, nil
}
