package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
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
func (d Delivery) RetryCount() int64 { return max(d.Count-1, 0) }

// Time returns when the entry was added, by its ID: the server's clock, in
// milliseconds. The zero time if the ID was given by hand and is no time.
func (d Delivery) Time() time.Time {
	ms, _ := xstream.SplitID(d.ID)
	if ms == 0 || ms > 1<<53 {
		return time.Time{}
	}
	return time.UnixMilli(int64(ms))
}

type deliveryKey struct{}

// deliveryContext is what a message's context knows of its delivery.
type deliveryContext struct {
	context.Context // the values of Subscribe's context
	delivery        Delivery
	sub             *subscription
	msg             *message.Message // the one that was delivered
	own             context.Context  // this one, with its end
	verdict         atomic.Pointer[verdict]
	entered         atomic.Pointer[atomic.Bool] // the innermost Retry that has the message: is there one inside of it?
	body            atomic.Pointer[any]         // a Consumer's decoded payload, for the first who takes it
	handler         atomic.Pointer[string]      // the router's name of it, once a middleware has seen it
}

func (d *deliveryContext) Value(key any) any {
	if _, ok := key.(deliveryKey); ok {
		return d
	}
	return d.Context.Value(key)
}

// DeliveryFromContext returns the delivery that a message's context belongs to.
// It is false for a message that does not come from this library, and for one
// that lost its context in a Copy.
func DeliveryFromContext(ctx context.Context) (Delivery, bool) {
	d, ok := ctx.Value(deliveryKey{}).(*deliveryContext)
	if !ok {
		return Delivery{}, false
	}
	return d.delivery, true
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
		published, _, group := cutReplay(h.fields)
		if group != "" && group != s.stream.Group {
			s.settle(h) // a replay for another group
			return
		}
		h.fields = published
		if h.doom == nil && s.retry.exhaustedBefore(h.count) {
			h.doom = &doom{kind: Exhausted, err: ErrRetriesExhausted, crashed: true}
		}
		if h.doom != nil {
			s.bury(h)
			return
		}
		msg, body, err := s.unmarshal(h)
		if err != nil {
			s.handleBroken(h, err)
			return
		}
		if !s.deliver(h, msg, body) {
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
		s.markHealthy(dutyBury) // somebody else's to move
		s.leases.remove(h)
		return false, false
	}
	ctx := s.ctx
	if h.state == found {
		// Looked at first, because a claim of a deleted entry would remove the
		// trace of it.
		e, p, err := s.stream.Look(ctx, h.id)
		if err != nil {
			return false, s.acquireFailed(h, err)
		}
		if p == nil || e == nil {
			s.markHealthy(dutyClaim)
			if p != nil {
				s.ackTrimmed(h)
			}
			s.leases.remove(h)
			return false, false
		}
	}
	sent := time.Now()
	e, err := s.claim(h)
	if err != nil {
		return false, s.acquireFailed(h, err)
	}
	s.markHealthy(dutyClaim)
	if e == nil {
		return false, s.acquireRefused(h)
	}
	if h.state == found && !h.orphan {
		s.stats.claimed.Add(1)
	}
	if !s.leases.claimed(h, sent, h.next) {
		return false, false
	}
	h.fields = e.Fields
	return true, false
}

// claim asks for the entry. Of what was released each claimer knows, and the
// least idle time keeps them apart only if the command is under way for less than
// that: so there the owner's name is the condition.
func (s *subscription) claim(h *held) (*xstream.Entry, error) {
	minIdle := s.leases.asking(h)
	if h.released && h.state == found {
		return s.stream.ClaimFrom(s.ctx, releasedConsumer, h.id, h.next)
	}
	return s.stream.Claim(s.ctx, h.id, minIdle, h.next)
}

// acquireFailed handles a claim without an answer. It may have happened, which
// the next try finds out.
func (s *subscription) acquireFailed(h *held, err error) (again bool) {
	s.markFailed(dutyClaim, err)
	if xstream.GroupLost(err) {
		_ = s.regroup() // if that fails, the claimer tries again
	}
	if h.state == found && !h.readHere() {
		// Nobody's yet, or an orphan of ours: the claimer finds it either way.
		s.leases.remove(h)
		s.shared.poller.Unsure(s.topic)
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

// unmarshal turns the entry into a message, and for a Consumer its payload into
// the body.
func (s *subscription) unmarshal(h *held) (msg *message.Message, body any, err error) {
	msg, err = s.message(h, h.fields)
	if err == nil && s.typed != nil {
		err = h.user(func() error { body, err = s.typed.decode(msg.Payload); return err })
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	return msg, body, nil
}

// message unmarshals an entry. A dead letter is decoded the way this library
// wrote it, whatever the topic's format.
func (s *subscription) message(h *held, fields []string) (msg *message.Message, err error) {
	u := s.cfg.Unmarshaler
	if isDeadLetter(fields) {
		u = DefaultMarshaler{}
	}
	switch u.(type) {
	case DefaultMarshaler, BodyMarshaler:
		msg, err = unmarshalFields(u, fields)
	default:
		err = h.user(func() error { msg, err = unmarshalFields(u, fields); return err })
	}
	if err == nil && msg.UUID == "" {
		msg.UUID = h.id
	}
	return msg, err
}

// deliver hands the message over and waits for it to be settled. It returns true
// if the entry is to be delivered again in this very slot: with MaxConcurrency 1
// a nacked message keeps its place.
func (s *subscription) deliver(h *held, msg *message.Message, body any) (again bool) {
	d := &deliveryContext{Context: s.base, sub: s, msg: msg, delivery: Delivery{
		Topic: s.topic, Group: s.stream.Group, Consumer: s.stream.Consumer,
		ID: h.id, Count: h.count, MaxRetries: s.retry.MaxRetries,
	}}
	if body != nil {
		d.body.Store(&body)
	}
	ctx, cancel := context.WithCancelCause(d)
	defer cancel(nil)
	d.own = ctx
	msg.SetContext(ctx)
	if !s.leases.move(h, out, cancel) {
		s.leases.remove(h)
		return false
	}

	s.stats.delivered.Add(1) // before whoever takes it can ask
	select {
	case s.output <- msg:
	default:
		if !s.offer(ctx, h, msg) {
			s.stats.delivered.Add(-1)
			return false
		}
	}
	if h.count > 1 {
		s.stats.retried.Add(1)
	}
	if !s.fanOut() && !s.cfg.NoAck {
		h.fields = nil
	}

	select {
	case <-msg.Acked():
	case <-msg.Nacked():
		return s.nacked(h, d)
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
	ended := ctx.Done()
	if s.cfg.NoAck {
		ended = nil // there is no lease to be lost, and a second left before CloseTimeout
	}
	select {
	case s.output <- msg:
		return true
	case <-s.withdraw:
		if s.cfg.NoAck {
			s.stats.lost.Add(1)
			s.log.Error("Message lost", errors.New("NoAck: nobody took it before CloseTimeout"), s.entryFields(h))
		}
		s.giveBack(h, h.count-1)
	case <-ended:
		s.leases.remove(h)
	}
	return false
}

func (s *subscription) acked(h *held) {
	s.stats.acked.Add(1)
	s.settle(h)
}

// settle is the end of an entry that nobody needs any more.
func (s *subscription) settle(h *held) {
	if !s.leased() {
		h.fields = nil // one that waits keeps the others of its read
		s.leases.remove(h)
		return
	}
	// Even if the lease is lost: the work is done.
	s.leases.move(h, settled, nil)
	s.acker.add(h)
}

// nacked carries the verdict out: what becomes of a message whose handler failed.
func (s *subscription) nacked(h *held, d *deliveryContext) (comesAgain bool) {
	s.stats.nacked.Add(1)
	v := d.verdict.Load()
	closing := s.isClosing()
	lost, gone := s.leases.lapsed(h)
	switch {
	case s.cfg.NoAck:
		s.log.Debug("Nacked, but the subscription is NoAck: dropped", s.entryFields(h))
		s.leases.remove(h)
		return false
	case lost || gone: // another consumer's, or nobody's any more
		s.leases.remove(h)
		return false
	case closing && (v == nil || v.fate == interrupted || v.fate == snoozed || errors.Is(context.Cause(d.own), ErrSubscriberClosed)):
		// A shutdown is no failure. Whether it was one cannot be told of a Nack
		// without an error; a retry too many does less harm than one too few.
		s.giveBack(h, h.count-1)
		return false
	case v == nil:
		v = &verdict{delay: -1}
	case v.fate == snoozed:
		s.leases.snooze(h)
		return s.again(h, v.delay)
	}

	v = s.apply(h, *v)
	switch {
	case v.fate == dead:
		h.doom = &doom{kind: v.kind, err: v.err, handler: d.handlerName()}
		h.doom.topic = s.route(h, v.letters)
		s.bury(h)
		return false
	case closing:
		s.giveBack(h, h.count)
		return false
	}
	if v.hook != nil {
		if err := h.user(func() error { v.hook(int(h.count), v.delay); return nil }); err != nil {
			s.log.Error("Retry.OnRetryHook panicked", err, s.entryFields(h))
		}
	}
	return s.again(h, v.delay)
}

// handlerName returns the router's name of the handler; "" without a router.
func (d *deliveryContext) handlerName() string {
	if name := d.handler.Load(); name != nil {
		return *name
	}
	return message.HandlerNameFromCtx(d.msg.Context())
}

// apply completes a verdict with the subscription's own policy, the limit of
// which holds whatever a middleware has decided.
func (s *subscription) apply(h *held, v verdict) *verdict {
	switch {
	case v.fate == dead:
		return &v
	case s.retry.exhausted(h.count):
		return v.end(Exhausted, ErrRetriesExhausted)
	case v.fate == again:
		return &v
	}
	if v.delay < 0 {
		v.delay = s.retry.delay(h.count)
	}
	v.hook = s.retry.OnRetryHook
	if s.retry.ShouldRetry == nil {
		return &v
	}
	params := middleware.RetryParams{Err: v.err, RetryNum: int(h.count), Delay: v.delay}
	if v.err == nil {
		params.Err = ErrNacked
	}
	retry := true
	if err := h.user(func() error { retry = s.retry.ShouldRetry(params); return nil }); err != nil {
		s.log.Error("Retry.ShouldRetry panicked; the message is tried again", err, s.entryFields(h))
	}
	if !retry {
		return v.end(PermanentFailure, ErrPermanent)
	}
	return &v
}

// abandoned gives up on a handler that did not heed the end of its context. It
// may still be at work, so the entry is not released: it stays in this
// consumer's name until its time is up. This delivery does not count.
func (s *subscription) abandoned(h *held) {
	s.log.Info("The handler did not finish within CloseTimeout; the message is handled again once its lease has run out", s.entryFields(h))
	if _, gone := s.leases.lapsed(h); s.leased() && !gone {
		s.shared.poller.Disown(s.topic, h.id) // it is no orphan while its handler is at work
		if _, err := s.setCount(h, s.parkCount(h, h.count-1)); err != nil && !redisx.IsClosed(err) {
			s.log.Error("The message keeps a delivery that was not to count", err, s.entryFields(h))
		}
	}
	s.leases.remove(h)
}

// setCount sets the entry's delivery count, while the entry stays ours.
func (s *subscription) setCount(h *held, count int64) (ours bool, err error) {
	for range 2 { // a renewal may cross the first: then the entry is younger than we knew
		sent := time.Now()
		got, err := s.stream.Assign(s.ctx, s.stream.Consumer, s.leases.idle(h), count, []string{h.id})
		if err != nil {
			return false, err
		}
		if got[h.id] {
			s.leases.confirm(sent, time.Now(), h)
			return true, nil
		}
		if ours, err = s.verify(h); !ours || err != nil {
			return false, err
		}
	}
	return false, errors.New("refused, though the entry is ours")
}

var errTrimmed = errors.New("trimmed or deleted while pending")

// trimmed notes that entries were deleted from the stream while they were pending,
// and are not pending any more: their messages are lost. Handlers may finish.
func (s *subscription) trimmed(hs ...*held) {
	hs = s.leases.there(hs) // each is counted once
	if len(hs) == 0 {
		return
	}
	s.leases.bereave(hs...)
	s.stats.lost.Add(int64(len(hs)))
	fields := s.entryFields(hs[0])
	if len(hs) > 1 {
		fields = s.logFields.Add(watermill.LogFields{"entries": len(hs)})
	}
	s.log.Error("Message lost", errTrimmed, fields)
}

// ackTrimmed acks such an entry away, if it is still pending.
func (s *subscription) ackTrimmed(h *held) {
	trimmed, err := s.stream.AckTrimmed(s.ctx, []string{h.id})
	if err != nil {
		s.log.Debug("XACK of a deleted entry failed: "+err.Error(), s.entryFields(h))
	}
	if trimmed[h.id] {
		s.trimmed(h)
	}
}

// verify finds out what became of an entry whose renewal or claim was refused.
// It is still ours if it is pending with our name and our count: a claim by
// anybody else raises the count. (The server's clock may have been set back,
// or two commands of ours have crossed.)
func (s *subscription) verify(h *held) (ours bool, err error) {
	sent, count := time.Now(), s.leases.countOf(h)
	e, p, err := s.stream.Look(s.ctx, h.id)
	if err != nil {
		return false, err
	}
	if s.leases.countOf(h) != count {
		return true, nil // we have claimed it meanwhile: the answer may be older than that
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
	case p != nil && p.Consumer == s.stream.Consumer && s.leases.counted(h, p.Count):
		s.leases.confirm(sent.Add(-p.Idle), time.Now().Add(-p.Idle), h)
		return true, nil
	case p != nil && e == nil:
		s.leases.lose(h)
		s.ackTrimmed(h)
	case p == nil && e == nil && !s.cfg.DeleteAcked: // with it, settled elsewhere looks the same
		s.trimmed(h)
	default:
		s.leases.lose(h)
		s.log.Info("Lease lost: another consumer has the message, or settled it", s.entryFields(h))
	}
	return false, nil
}

// guard calls a function of the user and turns its panic into an error.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return sane(f())
}

// sane returns err, or another one in its place if its methods panic: those of a
// nil pointer that became an error may.
func sane(err error) (usable error) {
	if err == nil {
		return nil
	}
	defer func() {
		if p := recover(); p != nil {
			usable = fmt.Errorf("goxstreams: an error of type %T, the methods of which panic: %v", err, p)
		}
	}()
	_, _ = err.Error(), IsDead(err)
	return err
}
