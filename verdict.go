package goxstreams

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	cenkalti "github.com/cenkalti/backoff/v5"
)

// This file is what Retry, DeadLetter and the subscription have in common: the
// errors by which a handler says what shall become of its message, and the
// verdict in which the middlewares write it down.

// Permanent marks an error: to try again is of no use, so that the message is
// dead at once. The text stays err's. nil stays nil.
//
// It needs Retry's or DeadLetter's middleware, which see the handler's error.
// Watermill's own Retry gives up at it too, and passes it on. Permanent wins over
// RetryAfter and Snooze in the same error.
func Permanent(err error) error { return mark(err, ErrPermanent) }

// RetryAfter marks an error: the message comes again after d instead of the
// backoff's delay. The retry counts. A negative d is 0. The text stays err's.
// nil stays nil.
//
// It needs Retry's or DeadLetter's middleware. Watermill's own Retry heeds it
// too.
func RetryAfter(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &delayedError{err: err, delay: max(d, 0)}
}

// Snooze marks an error: the message comes again after d, and this delivery does
// not count, neither in Redis nor for any limit. That is for what is nobody's
// failure: it is too early, or a service is known to be down. (With
// MaxConcurrency 1 the topic waits meanwhile, as for every retry.) A negative d is 0.
// The text stays err's. nil stays nil.
//
// It needs Retry's or DeadLetter's middleware.
func Snooze(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &delayedError{err: err, delay: max(d, 0), snooze: true}
}

// IsDead reports whether err says that its message is dead: what Permanent
// marked (cenkalti/backoff's PermanentError too), what Retry passes up when the
// retries are used up, and what DeadLetter chose. It is for those who keep dead
// letters elsewhere: Watermill's PoisonQueueWithFilter(pub, topic, IsDead)
// outside Retry.
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

// As makes Watermill's Retry stop, without losing the mark.
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

// delayOf returns the delay that err asks for, and whether it is a Snooze's.
func delayOf(err error) (delay time.Duration, asked, snooze bool) {
	var ours *delayedError
	var theirs *cenkalti.RetryAfterError
	switch {
	case errors.As(err, &ours):
		return ours.delay, true, ours.snooze
	case errors.As(err, &theirs):
		return max(theirs.Duration, 0), true, false
	}
	return 0, false, false
}

// errPanicked stands for a panic, which the middlewares see but do not recover.
var errPanicked = errors.New("goxstreams: the handler panicked")

// fate is what becomes of a message whose handler failed.
type fate uint8

const (
	undecided   fate = iota // the subscription's config decides
	again                   // it comes again, and that counts
	snoozed                 // it comes again; this delivery does not count
	dead                    // it goes to the dead-letter stream
	interrupted             // no failure: the subscription closes, or the lease is lost
)

// verdict is what the middlewares have decided about a failed delivery. The
// subscription acts on it if the message is nacked; an Ack acks, always. It is not
// changed once it is stored, since the subscription may read it then.
type verdict struct {
	fate    fate
	err     error // the handler's
	kind    DeadKind
	delay   time.Duration            // before it comes again; negative: the policy's
	hook    func(int, time.Duration) // to be told of that
	letters []DeadLetter             // that the error came through, to say where the dead letter goes
}

// deliveryOf returns the delivery that brought the message. It is nil for a
// message that is not ours, and for a copy: what becomes of that decides nothing.
func deliveryOf(msg *message.Message) *deliveryContext {
	d, _ := msg.Context().Value(deliveryKey{}).(*deliveryContext)
	if d == nil || d.msg != msg {
		return nil
	}
	return d
}

// judged calls the handler, and judge if it fails. judge returns the error to pass
// up. A panic is a failure too; it is not recovered.
func (d *deliveryContext) judged(h message.HandlerFunc, judge func(*deliveryContext, error) error) (produced []*message.Message, err error) {
	d.verdict.Store(nil)         // of an attempt before, within the same delivery
	if d.handler.Load() == nil { // now, since a handler that is given up may still set the context when it is nacked
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
		d.verdict.Store(nil) // a failure further inside was overcome
	}
	return produced, failure
}

// consider returns the verdict so far, for the caller to complete and store, and
// the error to pass up. The first to consider an error settles what does not
// depend on a middleware's fields.
func (d *deliveryContext) consider(err error) (*verdict, error) {
	if v := d.verdict.Load(); v != nil {
		c := *v
		return &c, err
	}
	v := &verdict{err: err, delay: -1}
	delay, asked, snooze := delayOf(err)
	if asked {
		v.delay = delay
	}
	switch {
	case d.interrupted(err):
		v.fate = interrupted
	case errors.Is(err, ErrRetriesExhausted):
		v.fate, v.kind = dead, Exhausted
	case IsDead(err):
		v.fate, v.kind = dead, PermanentFailure
	case snooze:
		v.fate = snoozed
	case d.sub.retry.exhausted(d.delivery.Count):
		v.fate, v.kind = dead, Exhausted
		err = mark(err, ErrRetriesExhausted)
	}
	return v, err
}

// end makes the message dead, of err if the handler's error is not known.
func (v *verdict) end(kind DeadKind, err error) *verdict {
	v.fate, v.kind = dead, kind
	if v.err == nil {
		v.err = err
	}
	return v
}

// shutdownNotice is how long a handler's context.Canceled is held up, for the
// subscription to hear of the shutdown too: the handler may watch the signal,
// while whoever closes the router is told by the same signal, a little later.
const shutdownNotice = time.Second

// interrupted reports whether the handler failed because of the end of its
// subscription, or of its lease, and not by itself.
func (d *deliveryContext) interrupted(err error) bool {
	if d.own.Err() != nil {
		return true
	}
	if !errors.Is(err, context.Canceled) {
		return false
	}
	notice := time.NewTimer(shutdownNotice)
	defer notice.Stop()
	select {
	case <-d.sub.Closing():
		return true
	case <-d.own.Done():
		return true
	case <-notice.C:
		return false
	}
}

// bystander is what a middleware does with a message that no verdict can be
// bound to: it passes, which is logged once.
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
		// A router names the Subscriber in every message's context. Where no name
		// is left, the copy was made after that.
		if name := message.SubscriberNameFromCtx(ctx); name == subscriberName || name == "" {
			s.log.Error("The "+b.name+" middleware has no effect here", errCopied, fields)
			return
		}
		s.log.Info("The "+b.name+" middleware has no effect on messages that are not from this library's Subscriber", fields)
	})
}

var errCopied = errors.New("the message is a copy of the one that was delivered, or has lost its context: put the middleware outside of what copies it")
