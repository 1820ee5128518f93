package goxstreams

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/goxstreams/watermill-goxstreams/internal/consume"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// Delivery describes the delivery of a message. A handler gets it from the
// message's context with DeliveryFromContext.
type Delivery struct {
	Topic    string
	Group    string // empty for fan-out
	Consumer string // empty for fan-out
	ID       string // the entry's ID

	// Count is how many times Redis has delivered the entry to this group,
	// including this delivery: 1 the first time. For fan-out the subscription
	// itself counts.
	Count int64

	// MaxRetries is the limit of the subscription's Retry: 0 means no limit, -1
	// means no retries.
	MaxRetries int
}

// RetryCount returns the number of earlier deliveries.
func (d Delivery) RetryCount() int64 { return max(d.Count-1, 0) }

// Time returns when the entry was added, according to its ID: the server's clock,
// in milliseconds. It is the zero time if the ID was set explicitly and is not a
// time.
func (d Delivery) Time() time.Time {
	ms, _ := xstream.SplitID(d.ID)
	if ms == 0 || ms > 1<<53 {
		return time.Time{}
	}
	return time.UnixMilli(int64(ms))
}

type deliveryKey struct{}

// deliveryContext is the context of a delivered message. It becomes cancelable when
// somebody asks for that: most handlers do not, and context.WithCancel would cost
// more than all else here.
type deliveryContext struct {
	context.Context        // carries the values of Subscribe's context; never canceled
	id              string // the entry's
	count           int64  // of this delivery
	sub             *subscription
	msg             *message.Message           // the delivered message itself, not a copy
	own             atomic.Pointer[cancelable] // nil: neither asked for nor canceled yet
	cancel          context.CancelCauseFunc    // for a lost lease, and a shutdown
	verdict         atomic.Pointer[verdict]
	entered         atomic.Pointer[atomic.Bool] // of the innermost Retry that has the message: whether another one is further inside
	body            any                         // a Consumer's decoded payload, for the first caller
	taken           atomic.Bool                 // body has been used
	handler         atomic.Pointer[string]      // the router's name of the handler, once a middleware has seen it
	returned        time.Time                   // when the handler did, if that is longer ago: see interrupted
}

var noRouter string // the name of a handler without a router

// cancelable is the part of a deliveryContext that ends. It has no values.
type cancelable struct {
	context.Context
	cancel context.CancelCauseFunc
}

func newCancelable() *cancelable {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &cancelable{ctx, cancel}
}

// hasEnded is the cancelable of every delivery that ended before somebody asked.
var hasEnded = func() *cancelable {
	c := newCancelable()
	c.cancel(nil)
	return c
}()

func (d *deliveryContext) cancelable() *cancelable {
	if d.own.Load() == nil {
		d.own.CompareAndSwap(nil, newCancelable())
	}
	return d.own.Load()
}

// end cancels the context of a delivery that is settled, unless it has ended before.
func (d *deliveryContext) end() {
	if !d.own.CompareAndSwap(nil, hasEnded) {
		d.own.Load().cancel(nil)
	}
}

func (d *deliveryContext) Done() <-chan struct{} { return d.cancelable().Done() }

func (d *deliveryContext) Err() error {
	if c := d.own.Load(); c != nil {
		return c.Err()
	}
	return nil
}

func (d *deliveryContext) Value(key any) any {
	if _, ok := key.(deliveryKey); ok {
		return d
	}
	if c := d.own.Load(); c != nil {
		if v := c.Value(key); v != nil { // what package context looks for: context.Cause, and derived contexts
			return v
		}
	}
	return d.Context.Value(key)
}

// String keeps the message out of a printed context.
func (d *deliveryContext) String() string { return "goxstreams.Delivery" }

// DeliveryFromContext returns the delivery that a message's context belongs to. It
// returns false for a message of another library, and for a copy without its
// context.
func DeliveryFromContext(ctx context.Context) (Delivery, bool) {
	d, ok := ctx.Value(deliveryKey{}).(*deliveryContext)
	if !ok {
		return Delivery{}, false
	}
	return d.sub.delivery(d.id, d.count), true
}

// Handle brings entries to their outcomes: acked, waiting for their retries, moved to the
// dead-letter stream, released, or lost to another consumer.
func (s *subscription) Handle(tasks []consume.Task) {
	if s.typed.batch != nil {
		s.handleBatch(tasks)
	} else if m, ok := s.prepare(&tasks[0]); ok {
		s.deliver(&tasks[0], m)
	}
}

// prepare decodes an entry. It brings one that is not to be delivered to its outcome, and
// returns false.
func (s *subscription) prepare(h *consume.Task) (m decoded, ok bool) {
	var group string
	h.Fields, _, group = cutReplay(h.Fields)
	switch {
	case h.Death != nil:
		s.dead(h)
		return m, false
	case group != "" && group != s.cfg.ConsumerGroup:
		s.Settle(h) // a replay for another group
		return m, false
	case s.retry.exhaustedBefore(h.Count()):
		h.Death = &death{kind: Exhausted, err: ErrRetriesExhausted, crashed: true}
		if s.typed.batch != nil {
			s.Again(h, 0) // in a slot of its own: ProcessDead may take long, and a batch waits
		} else {
			s.dead(h)
		}
		return m, false
	}
	if m, ok = h.Prepared.(decoded); !ok {
		m = s.unmarshal(h, h.Fields)
	}
	h.Prepared = nil
	if m.err != nil {
		s.handleBroken(h, m.err)
	}
	return m, m.err == nil
}

// decoded is an entry's message and, for a Consumer, its body: an *E.
type decoded struct {
	msg  *message.Message
	body any
	err  error
}

// Key returns the OrderingKey of an entry. One that is malformed, or will not be handled,
// has none.
func (s *subscription) Key(h *consume.Task) (key string) {
	fields, _, group := cutReplay(h.Fields)
	if group != "" && group != s.cfg.ConsumerGroup || s.retry.exhaustedBefore(h.Count()) {
		return ""
	}
	m := s.unmarshal(h, fields)
	if m.err == nil {
		if err := user(h, func() error { key = s.cfg.OrderingKey(m.msg); return nil }); err != nil {
			m.err = fmt.Errorf("%w: OrderingKey: %w", ErrBroken, err)
		}
	}
	h.Prepared = m
	return key
}

// unmarshal decodes an entry's fields.
func (s *subscription) unmarshal(h *consume.Task, fields []string) (m decoded) {
	m.msg, m.err = s.message(h, fields)
	if m.err == nil && s.typed.decode != nil {
		m.err = user(h, func() (err error) { m.body, err = s.typed.decode(m.msg.Payload); return err })
	}
	if m.err != nil {
		m.err = fmt.Errorf("%w: %w", ErrBroken, m.err)
	}
	return m
}

// message unmarshals an entry. It decodes a dead letter in this library's format,
// whatever the topic's format is.
func (s *subscription) message(h *consume.Task, fields []string) (msg *message.Message, err error) {
	u := s.cfg.Unmarshaler
	if isDeadLetter(fields) {
		u = DefaultMarshaler{}
	}
	create := newOwnMessage
	if s.handler != nil && s.typed.alone {
		create = newBareMessage
	}
	switch u.(type) {
	case DefaultMarshaler, BodyMarshaler:
		msg, err = unmarshalFields(u, fields, create)
	default:
		err = user(h, func() error { msg, err = unmarshalFields(u, fields, create); return err })
	}
	if err == nil && msg.UUID == "" {
		msg.UUID = h.ID
	}
	return msg, err
}

// newMessage returns a message with the values of an entry's fields.
type newMessage func(uuid, payload string) *message.Message

// newOwnMessage copies the values: they are parts of a reply with many entries, which a
// message that outlives it must not keep in memory.
func newOwnMessage(uuid, payload string) *message.Message {
	return message.NewMessage(strings.Clone(uuid), []byte(payload))
}

// newBareMessage returns a message for a Worker, who does not see it: its UUID is part of
// the reply, and it lacks the channels of Acked and Nacked. Its Ack and Nack work.
func newBareMessage(uuid, payload string) *message.Message {
	return &message.Message{UUID: uuid, Metadata: message.Metadata{}, Payload: []byte(payload)}
}

// deliver passes the message to its handler, or to the output channel, and waits until
// it is settled.
func (s *subscription) deliver(h *consume.Task, m decoded) {
	msg := m.msg
	d := &deliveryContext{Context: s.Base(), sub: s, msg: msg, id: h.ID, count: h.Count(), body: m.body}
	d.cancel = func(cause error) { d.cancelable().cancel(cause) }
	defer d.end()
	msg.SetContext(d)
	if !h.Attach(&d.cancel) {
		s.Drop(h)
		return
	}

	s.stats.delivered.Add(1) // before the receiver can read Stats
	var passed bool
	if s.handler != nil {
		d.handler.Store(&noRouter)
		passed = s.Begin(h)
	} else {
		passed = consume.HandOver(d, s.Subscription, h, s.output, msg)
	}
	if !passed {
		s.stats.delivered.Add(-1)
		return
	}
	if d.count > 1 {
		s.stats.retried.Add(1)
	}
	if s.handler != nil {
		h.Direct(func() { s.handler(msg) }, func() { s.leave(&consume.Task{Entry: h.Entry}, d) }, func() { s.settle(h, d) })
	} else {
		select {
		case <-msg.Acked():
		case <-msg.Nacked():
		case <-s.Abandon():
			if msg.Nack() { // unblock callers that wait for the outcome
				s.Left(h)
				return
			}
		}
	}
	s.settle(h, d)
}

// settle carries out what the handler has decided: a message that is not acked by now
// is nacked.
func (s *subscription) settle(h *consume.Task, d *deliveryContext) {
	if d.msg.Nack() {
		if s.nacked(h, d) {
			s.dead(h)
		}
		return
	}
	s.stats.acked.Add(1)
	s.told(h, OutcomeAcked, 0, nil, nil)
	s.Settle(h)
}

// nacked carries out the verdict on a message whose handler failed, unless that is that the
// message is dead: then it returns true.
func (s *subscription) nacked(h *consume.Task, d *deliveryContext) (isDead bool) {
	s.stats.nacked.Add(1)
	v := d.verdict.Load()
	closing, count := s.IsClosing(), h.Count()
	switch {
	case !s.Retries():
		s.log.Debug("Nacked message dropped: the subscription is NoAck", s.Fields(h))
		s.Drop(h)
		return false
	case s.IsLost(h): // another consumer has it, or the entry is gone
		s.Drop(h)
		return false
	case closing && (v == nil || v.fate == OutcomeReleased || v.fate == OutcomeSnoozed || errors.Is(context.Cause(d), ErrSubscriberClosed)):
		// A shutdown is not a failure. A Nack without an error does not say whether
		// the shutdown caused it; one retry too many does less harm than one too
		// few.
		s.GiveBack(h, count-1)
		return false
	case v == nil:
		v = &verdict{delay: -1}
	case v.fate == OutcomeSnoozed:
		s.told(h, OutcomeSnoozed, v.delay, v.err, nil)
		s.Snooze(h, v.delay)
		return false
	}

	v = s.complete(h, *v)
	switch {
	case v.fate == OutcomeDead:
		death := &death{kind: v.kind, err: v.err, handler: d.handlerName()}
		h.Death = death
		if s.KeepsDead() {
			death.topic = s.route(h, v.letters)
		}
		return true
	case closing:
		s.GiveBack(h, count)
		return false
	}
	if v.hook != nil {
		if err := user(h, func() error { v.hook(int(count), v.delay); return nil }); err != nil {
			s.log.Error("Retry.OnRetryHook panicked", err, s.Fields(h))
		}
	}
	s.told(h, OutcomeRetried, v.delay, v.err, nil)
	s.Again(h, v.delay)
	return false
}

// handlerName returns the router's name of the handler; "" without a router.
func (d *deliveryContext) handlerName() string {
	if name := d.handler.Load(); name != nil {
		return *name
	}
	return message.HandlerNameFromCtx(d.msg.Context())
}

// complete completes a verdict with the subscription's own policy.
func (s *subscription) complete(h *consume.Task, v verdict) *verdict {
	if v.fate == OutcomeDead || v.fate == OutcomeRetried {
		return &v
	}
	cause := cmp.Or(v.err, ErrNacked)
	if err := user(h, func() error { _ = s.retry.decide(&v, h.Count(), cause); return nil }); err != nil {
		s.log.Error("Retry.ShouldRetry panicked; the message will be retried", err, s.Fields(h))
	}
	return &v
}

// Left gives up on a handler that ignores its canceled context. The handler may still
// be running, so the entry is not released.
func (s *subscription) Left(h *consume.Task) {
	s.log.Info("The handler did not finish within CloseTimeout; its message will be redelivered when its lease expires", s.Fields(h))
	s.Abandoned(h)
}

// leave is Left for a handler that a slot has called, unless a middleware acked the message
// in time. It is not called in the slot, and waits for no user's function.
func (s *subscription) leave(h *consume.Task, d *deliveryContext) {
	if d.msg.Nack() {
		s.Left(h)
		return
	}
	s.stats.acked.Add(1)
	s.Go(func() { s.told(h, OutcomeAcked, 0, nil, nil) })
	s.Settle(h)
}

// user calls a user's function for an entry, in the entry's slot, and converts a
// panic to an error. It does not return if the subscription has ended in the
// meantime.
func user(h *consume.Task, f func() error) (err error) {
	h.Call(func() { err = guard(f) })
	return err
}

// guard calls a user's function and converts a panic to an error.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return usable(f())
}

// usable returns err, or an error that replaces it if its methods panic, as those
// of a nil pointer stored in an error may.
func usable(err error) (fine error) {
	if err == nil {
		return nil
	}
	defer func() {
		if p := recover(); p != nil {
			fine = fmt.Errorf("goxstreams: an error of type %T whose methods panic: %v", err, p)
		}
	}()
	_, _ = err.Error(), IsDead(err)
	return err
}
