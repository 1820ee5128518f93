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
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
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

// handle brings an entry to its outcome: acked, waiting for its retry, moved to
// the dead-letter stream, released, or not ours any more.
func (s *subscription) handle(h *task) {
	if h.Death != nil {
		s.mode.dead(h)
		return
	}
	if !s.acquire(h) {
		return
	}
	published, _, group := cutReplay(h.Fields)
	h.Fields = published
	switch {
	case group != "" && group != s.stream.Group:
		s.settle(h) // a replay for another group
		return
	case s.retry.exhaustedBefore(h.Count()):
		h.Death = &death{kind: Exhausted, err: ErrRetriesExhausted, crashed: true}
		s.mode.dead(h)
		return
	}
	msg, body, err := s.unmarshal(h)
	if err != nil {
		s.handleBroken(h, err)
		return
	}
	s.deliver(h, msg, body)
}

// acquire makes sure that the entry is ours, with its fields: it takes what was not
// read just now. It returns false if the entry is somebody else's business, or comes
// later.
func (s *subscription) acquire(h *task) bool {
	if h.Fields != nil {
		return true
	}
	claim := h.Owner != ""
	if claim { // the Subscriber's other subscriptions of the topic have the same name
		if !s.shared.poller.Reserve(s.topic, h.ID, s.reader) {
			s.ledger.Remove(time.Now(), h.Entry)
			return false
		}
		defer s.shared.poller.Unreserve(s.topic, h.ID)
	}
	own := h.Owner == s.stream.Consumer
	if own && !s.shared.poller.Disowned(s.topic, h.ID) {
		h.Next = h.Count() // the answer to what took it was lost: it has reached nobody
	}
	taken, err := s.keeper.Take(s.life.ctx, h.Entry)
	switch {
	case err != nil && claim: // it may have happened: then it is an orphan
		s.markFailed(dutyLook, err)
		s.ledger.Remove(time.Now(), h.Entry)
		s.shared.poller.Unsure(s.topic)
	case err != nil:
		s.markFailed(dutyClaim, err)
		s.again(h, max(s.retry.InitialInterval, minBackoff))
	case taken:
		s.markHealthy(dutyClaim)
		if claim && !own {
			s.stats.claimed.Add(1)
		}
		return true
	case !claim && s.ledger.Owned(h.Entry): // the group was lost, and it is put back
		s.again(h, minBackoff)
	default:
		s.markHealthy(dutyClaim)
		s.ledger.Remove(time.Now(), h.Entry)
	}
	return false
}

// unmarshal turns the entry into a message, and for a Consumer its payload into
// the body.
func (s *subscription) unmarshal(h *task) (msg *message.Message, body any, err error) {
	msg, err = s.message(h, h.Fields)
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
func (s *subscription) message(h *task, fields []string) (msg *message.Message, err error) {
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
		msg.UUID = h.ID
	}
	return msg, err
}

// deliver hands the message over and waits for it to be settled.
func (s *subscription) deliver(h *task, msg *message.Message, body any) {
	d := &deliveryContext{Context: s.life.base, sub: s, msg: msg, delivery: Delivery{
		Topic: s.topic, Group: s.stream.Group, Consumer: s.stream.Consumer,
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
		s.ledger.Remove(time.Now(), h.Entry)
		return
	}

	s.stats.delivered.Add(1) // before whoever takes it can ask
	select {
	case s.output <- msg:
	default:
		if !s.offer(ctx, h, msg) {
			s.stats.delivered.Add(-1)
			return
		}
	}
	if d.delivery.Count > 1 {
		s.stats.retried.Add(1)
	}
	s.mode.handedOut(h)

	select {
	case <-msg.Acked():
	case <-msg.Nacked():
		s.nacked(h, d)
		return
	case <-s.life.abandon:
		if msg.Nack() { // so that whoever waits for the outcome goes on
			s.abandoned(h)
			return
		}
	}
	s.stats.acked.Add(1)
	s.settle(h)
}

// offer waits for somebody to take the message. It returns false if the
// subscription closes or the lease is lost before.
func (s *subscription) offer(ctx context.Context, h *task, msg *message.Message) bool {
	withdraw, ended := s.mode.offer(ctx)
	select {
	case s.output <- msg:
		return true
	case <-withdraw:
		s.mode.withdrawn(h)
	case <-ended:
		s.ledger.Remove(time.Now(), h.Entry)
	}
	return false
}

// settle is the end of an entry that nobody needs any more.
func (s *subscription) settle(h *task) { s.apply(s.ledger.Acked(time.Now(), h.Entry)) }

// nacked carries the verdict out: what becomes of a message whose handler failed.
func (s *subscription) nacked(h *task, d *deliveryContext) {
	s.stats.nacked.Add(1)
	v := d.verdict.Load()
	closing, count := s.isClosing(), h.Count()
	switch {
	case !s.mode.retries():
		s.log.Debug("Nacked, but the subscription is NoAck: dropped", s.entryFields(h.Entry))
		s.ledger.Remove(time.Now(), h.Entry)
		return
	case h.Lost() || s.ledger.IsGone(h.Entry): // another consumer's, or nobody's any more
		s.ledger.Remove(time.Now(), h.Entry)
		return
	case closing && (v == nil || v.fate == interrupted || v.fate == snoozed || errors.Is(context.Cause(d.own), ErrSubscriberClosed)):
		// A shutdown is no failure. Whether it was one cannot be told of a Nack
		// without an error; a retry too many does less harm than one too few.
		s.giveBack(h, count-1)
		return
	case v == nil:
		v = &verdict{delay: -1}
	case v.fate == snoozed:
		h.Next = count // its next delivery counts for this one
		s.again(h, v.delay)
		return
	}

	v = s.complete(h, *v)
	switch {
	case v.fate == dead:
		death := &death{kind: v.kind, err: v.err, handler: d.handlerName()}
		h.Death = death
		death.topic = s.route(h, v.letters)
		s.mode.dead(h)
		return
	case closing:
		s.giveBack(h, count)
		return
	}
	if v.hook != nil {
		if err := h.user(func() error { v.hook(int(count), v.delay); return nil }); err != nil {
			s.log.Error("Retry.OnRetryHook panicked", err, s.entryFields(h.Entry))
		}
	}
	s.again(h, v.delay)
}

// again has the entry come again after the delay.
func (s *subscription) again(h *task, delay time.Duration) { s.schedule(h, false, delay) }

// schedule has the entry come again after the delay; aside: without holding up the order.
func (s *subscription) schedule(h *task, aside bool, delay time.Duration) {
	if s.isClosing() {
		s.giveBack(h, h.Next-1)
		return
	}
	s.mode.postponed(h)
	now := time.Now()
	dropped, ok := s.ledger.Retry(now, h.Entry, now.Add(delay), aside)
	switch {
	case !ok: // close came in between
		s.giveBack(h, h.Next-1)
	case dropped != nil:
		s.gaveUp(dropped)
	}
}

// gaveUp leaves an entry, for which there is no room among those that wait, to its lease.
func (s *subscription) gaveUp(e *ledger.Entry) {
	s.shared.poller.Disown(s.topic, e.ID)
	s.overflow.Do(func() {
		s.log.Error("Very many messages wait for a retry", errors.New(
			"those that wait longest come again when their leases have run out, whenever they are due"), s.logFields)
	})
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
func (s *subscription) complete(h *task, v verdict) *verdict {
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
	if err := h.user(func() error { retry = s.retry.ShouldRetry(params); return nil }); err != nil {
		s.log.Error("Retry.ShouldRetry panicked; the message is tried again", err, s.entryFields(h.Entry))
	}
	if !retry {
		return v.end(PermanentFailure, ErrPermanent)
	}
	return &v
}

// abandoned gives up on a handler that did not heed the end of its context. It
// may still be at work, so the entry is not released.
func (s *subscription) abandoned(h *task) {
	s.log.Info("The handler did not finish within CloseTimeout; the message is handled again once its lease has run out", s.entryFields(h.Entry))
	s.mode.abandoned(h)
	s.ledger.Remove(time.Now(), h.Entry)
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
