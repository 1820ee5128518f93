package goxstreams

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	cenkalti "github.com/cenkalti/backoff/v5"
)

// This file holds what Retry, DeadLetter and the subscription share: the errors by
// which a handler decides what happens to its message, and the verdict in which the
// middlewares record the decision.

// Permanent marks an error as permanent: retrying is pointless, so the message is
// dead at once. The text is that of err. A nil err stays nil.
//
// It needs the middleware Retry or DeadLetter, which see the handler's error.
// Watermill's own Retry stops at it too, and returns it. Permanent takes precedence
// over RetryAfter and Snooze in the same error.
func Permanent(err error) error { return mark(err, ErrPermanent) }

// RetryAfter marks an error so that the message is redelivered after d, instead of
// after the backoff. It counts as a retry. A negative d counts as 0. The text is
// that of err. A nil err stays nil.
//
// It needs the middleware Retry or DeadLetter. Watermill's own Retry honors it too.
func RetryAfter(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &delayedError{err: err, delay: max(d, 0)}
}

// Snooze marks an error so that the message is redelivered after d, and this
// delivery does not count: neither in Redis nor for any limit. Use it when nobody
// is at fault: it is too early, or a service is known to be down. (With
// MaxConcurrency 1 the following messages wait, as for every retry.) A negative d
// counts as 0. The text is that of err. A nil err stays nil.
//
// It needs the middleware Retry or DeadLetter.
func Snooze(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &delayedError{err: err, delay: max(d, 0), snooze: true}
}

// IsDead reports whether err makes its message dead: an error marked by Permanent
// (or cenkalti/backoff's PermanentError), the error that Retry returns when the
// message is out of retries, or one that DeadLetter chose. Use it to store dead
// letters elsewhere: for example, Watermill's PoisonQueueWithFilter(pub, topic,
// IsDead) outside of Retry.
func IsDead(err error) bool {
	var permanent *cenkalti.PermanentError
	return errors.Is(err, ErrDead) || errors.As(err, &permanent)
}

// mark makes errors.Is(err, sentinel) true.
func mark(err, sentinel error) error {
	if err == nil || errors.Is(err, sentinel) {
		return err
	}
	return &deadError{err, sentinel}
}

type deadError struct {
	error
	sentinel error
}

func (e *deadError) Unwrap() error        { return e.error }
func (e *deadError) Is(target error) bool { return errors.Is(e.sentinel, target) }

// As stops Watermill's Retry, without losing the mark.
func (e *deadError) As(target any) bool {
	p, ok := target.(**cenkalti.PermanentError)
	if ok {
		*p = &cenkalti.PermanentError{Err: e}
	}
	return ok
}

type delayedError struct {
	err    error
	delay  time.Duration
	snooze bool
}

func (e *delayedError) Error() string { return e.err.Error() }
func (e *delayedError) Unwrap() error { return e.err }

func (e *delayedError) As(target any) bool {
	p, ok := target.(**cenkalti.RetryAfterError)
	if ok = ok && !e.snooze; ok {
		*p = &cenkalti.RetryAfterError{Duration: e.delay}
	}
	return ok
}

// delayOf returns the delay that err requests, or a negative one, and whether it is a Snooze.
func delayOf(err error) (delay time.Duration, snooze bool) {
	var ours *delayedError
	var theirs *cenkalti.RetryAfterError
	switch {
	case errors.As(err, &ours):
		return ours.delay, ours.snooze
	case errors.As(err, &theirs):
		return max(theirs.Duration, 0), false
	}
	return -1, false
}

// errPanicked stands for a panic, which the middlewares notice but do not recover.
var errPanicked = errors.New("goxstreams: the handler panicked")

// verdict is the middlewares' decision about a failed delivery. The subscription
// acts on it if the message is nacked; an Ack always acks. It is immutable once
// stored, since the subscription may read it at any time after that.
type verdict struct {
	fate    OutcomeKind // empty: the subscription's config decides; OutcomeReleased: not a failure
	err     error       // the handler's error
	kind    DeadKind
	delay   time.Duration            // before the redelivery; negative: the policy's
	hook    func(int, time.Duration) // called with the retry number and the delay
	letters []DeadLetter             // that the error passed through; they choose the dead-letter stream
}

// deliveryOf returns the delivery of the message. It returns nil for a message of
// another library, and for a copy: the outcome of a copy decides nothing.
func deliveryOf(msg *message.Message) *deliveryContext {
	d, _ := msg.Context().Value(deliveryKey{}).(*deliveryContext)
	if d == nil || d.msg != msg {
		return nil
	}
	return d
}

// judged calls the handler, and judge if the handler fails. judge returns the error
// to pass up. A panic is a failure too; it is not recovered.
func (d *deliveryContext) judged(h message.HandlerFunc, judge func(*deliveryContext, error) error) (produced []*message.Message, err error) {
	d.verdict.Store(nil)         // from an earlier attempt within the same delivery
	if d.handler.Load() == nil { // now: an abandoned handler may still set the context while the message is nacked
		name := message.HandlerNameFromCtx(d.msg.Context())
		d.handler.Store(&name)
	}
	failure := errPanicked
	defer func() {
		if failure != nil {
			err = judge(d, failure)
		}
	}()
	produced, failure = h(d.msg)
	failure = usable(failure)
	if failure == nil {
		d.verdict.Store(nil) // a middleware further inside recovered from the failure
	}
	return produced, failure
}

// consider returns a copy of the verdict so far, for the caller to complete and
// store, and the error to pass up. The first call for an error decides everything
// that does not depend on a middleware's fields.
func (d *deliveryContext) consider(err error) (*verdict, error) {
	if v := d.verdict.Load(); v != nil {
		c := *v
		return &c, err
	}
	delay, snooze := delayOf(err)
	v := &verdict{err: err, delay: delay}
	switch {
	case d.interrupted(err):
		v.fate = OutcomeReleased
	case errors.Is(err, ErrRetriesExhausted):
		v.fate, v.kind = OutcomeDead, Exhausted
	case IsDead(err):
		v.fate, v.kind = OutcomeDead, PermanentFailure
	case snooze:
		v.fate = OutcomeSnoozed
	case d.sub.retry.exhausted(d.count):
		err = v.die(Exhausted, err, ErrRetriesExhausted)
	}
	return v, err
}

// die makes the message dead, and marks err, or stands for it if it is unknown.
func (v *verdict) die(kind DeadKind, err, sentinel error) error {
	v.fate, v.kind, v.err = OutcomeDead, kind, cmp.Or(v.err, sentinel)
	return mark(err, sentinel)
}

// shutdownNotice is how long a handler's context.Canceled is held back, so that the
// subscription can notice the shutdown too: the handler may watch the same signal
// that closes the router, and the router passes it on a little later.
const shutdownNotice = time.Second

// interrupted reports whether the handler failed because its subscription closes or
// its lease is lost, and not on its own account.
func (d *deliveryContext) interrupted(err error) bool {
	if d.Err() != nil {
		return true
	}
	if !errors.Is(err, context.Canceled) {
		return false
	}
	wait := shutdownNotice
	if !d.returned.IsZero() {
		wait -= time.Since(d.returned)
	}
	select {
	case <-d.sub.Closing():
		return true
	case <-d.Done():
		return true
	case <-time.After(wait):
		return d.sub.IsClosing()
	}
}

// bystander lets messages pass for which a middleware can record no verdict, and
// logs that once.
type bystander struct {
	name string
	once sync.Once
}

func (b *bystander) pass(msg *message.Message) {
	b.once.Do(func() {
		ctx := msg.Context()
		s := latest.Load()
		if d, ok := ctx.Value(deliveryKey{}).(*deliveryContext); ok {
			s = d.sub
		}
		if s == nil {
			return
		}
		fields := watermill.LogFields{
			"message_uuid": msg.UUID, "topic": message.SubscribeTopicFromCtx(ctx), "handler_name": message.HandlerNameFromCtx(ctx),
		}
		// A router puts the Subscriber's name into every message's context. If the
		// name is missing, the copy was made after that.
		if name := message.SubscriberNameFromCtx(ctx); name == subscriberName || name == "" {
			s.log.Error("The "+b.name+" middleware has no effect here", errCopied, fields)
			return
		}
		s.log.Info("The "+b.name+" middleware has no effect on messages that are not from this library's Subscriber", fields)
	})
}

var errCopied = errors.New("the message is a copy of the delivered one, or has lost its context: put the middleware outside of the code that copies it")
