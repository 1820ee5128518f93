package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/goxstreams/watermill-goxstreams/internal/consume"
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
	cancel          context.CancelCauseFunc
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

// Handle brings an entry to its outcome: acked, waiting for its retry, moved to
// the dead-letter stream, released, or not ours any more.
func (s *subscription) Handle(h *consume.Task) {
	if h.Death != nil {
		s.dead(h)
		return
	}
	published, _, group := cutReplay(h.Fields)
	h.Fields = published
	switch {
	case group != "" && group != s.cfg.ConsumerGroup:
		s.Settle(h) // a replay for another group
		return
	case s.retry.exhaustedBefore(h.Count()):
		h.Death = &death{kind: Exhausted, err: ErrRetriesExhausted, crashed: true}
		s.dead(h)
		return
	}
	msg, body, err := s.unmarshal(h)
	if err != nil {
		s.handleBroken(h, err)
		return
	}
	s.deliver(h, msg, body)
}

// unmarshal turns the entry into a message, and for a Consumer its payload into
// the body.
func (s *subscription) unmarshal(h *consume.Task) (msg *message.Message, body any, err error) {
	msg, err = s.message(h, h.Fields)
	if err == nil && s.typed != nil {
		err = user(h, func() error { body, err = s.typed.decode(msg.Payload); return err })
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	return msg, body, nil
}

// message unmarshals an entry. A dead letter is decoded the way this library
// wrote it, whatever the topic's format.
func (s *subscription) message(h *consume.Task, fields []string) (msg *message.Message, err error) {
	u := s.cfg.Unmarshaler
	if isDeadLetter(fields) {
		u = DefaultMarshaler{}
	}
	switch u.(type) {
	case DefaultMarshaler, BodyMarshaler:
		msg, err = unmarshalFields(u, fields)
	default:
		err = user(h, func() error { msg, err = unmarshalFields(u, fields); return err })
	}
	if err == nil && msg.UUID == "" {
		msg.UUID = h.ID
	}
	return msg, err
}

// deliver hands the message over and waits for it to be settled.
func (s *subscription) deliver(h *consume.Task, msg *message.Message, body any) {
	d := &deliveryContext{Context: s.Base(), sub: s, msg: msg, delivery: Delivery{
		Topic: s.topic, Group: s.cfg.ConsumerGroup, Consumer: s.Consumer(),
		ID: h.ID, Count: h.Count(), MaxRetries: s.retry.MaxRetries,
	}}
	if body != nil {
		d.body.Store(&body)
	}
	ctx, cancel := context.WithCancelCause(d)
	defer cancel(nil)
	d.own, d.cancel = ctx, cancel
	msg.SetContext(ctx)
	if !h.Attach(&d.cancel) {
		s.Drop(h)
		return
	}

	s.stats.delivered.Add(1) // before whoever takes it can ask
	if !consume.HandOver(ctx, s.Subscription, h, s.output, msg) {
		s.stats.delivered.Add(-1)
		return
	}
	if d.delivery.Count > 1 {
		s.stats.retried.Add(1)
	}

	select {
	case <-msg.Acked():
	case <-msg.Nacked():
		s.nacked(h, d)
		return
	case <-s.Abandon():
		if msg.Nack() { // so that whoever waits for the outcome goes on
			s.abandoned(h)
			return
		}
	}
	s.stats.acked.Add(1)
	s.Settle(h)
}

// nacked carries the verdict out: what becomes of a message whose handler failed.
func (s *subscription) nacked(h *consume.Task, d *deliveryContext) {
	s.stats.nacked.Add(1)
	v := d.verdict.Load()
	closing, count := s.IsClosing(), h.Count()
	switch {
	case !s.Retries():
		s.log.Debug("Nacked, but the subscription is NoAck: dropped", s.Fields(h))
		s.Drop(h)
		return
	case s.IsLost(h): // another consumer's, or nobody's any more
		s.Drop(h)
		return
	case closing && (v == nil || v.fate == interrupted || v.fate == snoozed || errors.Is(context.Cause(d.own), ErrSubscriberClosed)):
		// A shutdown is no failure. Whether it was one cannot be told of a Nack
		// without an error; a retry too many does less harm than one too few.
		s.GiveBack(h, count-1)
		return
	case v == nil:
		v = &verdict{delay: -1}
	case v.fate == snoozed:
		s.Snooze(h, v.delay)
		return
	}

	v = s.complete(h, *v)
	switch {
	case v.fate == dead:
		death := &death{kind: v.kind, err: v.err, handler: d.handlerName()}
		h.Death = death
		death.topic = s.route(h, v.letters)
		s.dead(h)
		return
	case closing:
		s.GiveBack(h, count)
		return
	}
	if v.hook != nil {
		if err := user(h, func() error { v.hook(int(count), v.delay); return nil }); err != nil {
			s.log.Error("Retry.OnRetryHook panicked", err, s.Fields(h))
		}
	}
	s.Again(h, v.delay)
}

// handlerName returns the router's name of the handler; "" without a router.
func (d *deliveryContext) handlerName() string {
	if name := d.handler.Load(); name != nil {
		return *name
	}
	return message.HandlerNameFromCtx(d.msg.Context())
}

// complete completes a verdict with the subscription's own policy, the limit of
// which holds whatever a middleware has decided.
func (s *subscription) complete(h *consume.Task, v verdict) *verdict {
	switch {
	case v.fate == dead:
		return &v
	case s.retry.exhausted(h.Count()):
		return v.end(Exhausted, ErrRetriesExhausted)
	case v.fate == again:
		return &v
	}
	if v.delay < 0 {
		v.delay = s.retry.delay(h.Count())
	}
	v.hook = s.retry.OnRetryHook
	if s.retry.ShouldRetry == nil {
		return &v
	}
	params := middleware.RetryParams{Err: v.err, RetryNum: int(h.Count()), Delay: v.delay}
	if v.err == nil {
		params.Err = ErrNacked
	}
	retry := true
	if err := user(h, func() error { retry = s.retry.ShouldRetry(params); return nil }); err != nil {
		s.log.Error("Retry.ShouldRetry panicked; the message is tried again", err, s.Fields(h))
	}
	if !retry {
		return v.end(PermanentFailure, ErrPermanent)
	}
	return &v
}

// abandoned gives up on a handler that did not heed the end of its context. It
// may still be at work, so the entry is not released.
func (s *subscription) abandoned(h *consume.Task) {
	s.log.Info("The handler did not finish within CloseTimeout; the message is handled again once its lease has run out", s.Fields(h))
	s.Abandoned(h)
}

// user calls a function of the user's for an entry, in the slot that has it, and turns its
// panic into an error. It does not return if the subscription has ended meanwhile.
func user(h *consume.Task, f func() error) (err error) {
	h.Call(func() { err = guard(f) })
	return err
}

// guard calls a function of the user and turns its panic into an error.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return usable(f())
}

// usable returns err, or another one in its place if its methods panic: those of a
// nil pointer that became an error may.
func usable(err error) (fine error) {
	if err == nil {
		return nil
	}
	defer func() {
		if p := recover(); p != nil {
			fine = fmt.Errorf("goxstreams: an error of type %T, the methods of which panic: %v", err, p)
		}
	}()
	_, _ = err.Error(), IsDead(err)
	return err
}
