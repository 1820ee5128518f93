package goxstreams

import (
	"cmp"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
)

// Defaults of Retry.
const (
	defaultInitialInterval = 100 * time.Millisecond
	defaultMaxInterval     = 30 * time.Second
	defaultMultiplier      = 2
	// The default of cenkalti/backoff, and so of Watermill's example configuration.
	defaultRandomizationFactor = 0.5
)

// Retry says how often and when a failed message is redelivered. As
// SubscriberConfig.Retry it applies to every message of the Subscriber. As a
// middleware (Retry.Middleware) it applies to the handlers that it wraps, and sees
// their errors. The count is Redis's own delivery count, which survives the
// process. The fields have the names of Watermill's middleware.Retry. Unlike there,
// the delay does not block the handler: other messages are handled meanwhile. (With
// MaxConcurrency 1 the following messages wait, to preserve order.)
type Retry struct {
	// MaxRetries is the maximum number of redeliveries after the first delivery;
	// then the message moves to the dead-letter stream. 0 means no limit. -1 means
	// no retries: the first failure is final. A message that kills its process gets
	// one more delivery, because a crash does not show which of the messages in
	// flight caused it.
	MaxRetries int

	// InitialInterval is the delay before the first retry. Default: 100ms.
	InitialInterval time.Duration

	// MaxInterval is the maximum delay. Default: 30s, or InitialInterval if that is
	// longer.
	MaxInterval time.Duration

	// Multiplier is the factor from each delay to the next, at least 1. Default: 2.
	Multiplier float64

	// RandomizationFactor f spreads each delay uniformly over [delay*(1-f),
	// delay*(1+f)], so that messages that failed together are not retried together.
	// From 0 (no spread, the default) to 1.
	RandomizationFactor float64

	// ShouldRetry, if set, is called before each retry; if it returns false, the
	// message is dead at once. RetryNum starts at 1. Err is the handler's error; in
	// SubscriberConfig.Retry, which sees only the Nack, it is ErrNacked.
	ShouldRetry func(middleware.RetryParams) bool

	// OnRetryHook, if set, is called for each scheduled redelivery with the 1-based
	// retry number and the delay before it. It is not called for Snooze.
	OnRetryHook func(retryNum int, delay time.Duration)
}

// defaultRetry is used if SubscriberConfig.Retry is nil.
var defaultRetry = Retry{RandomizationFactor: defaultRandomizationFactor}

// fanOutRetry is used for fan-out, where Redis stores nothing about a failure: the
// subscription that failed retries at a steady rate.
var fanOutRetry = Retry{
	InitialInterval: defaultInitialInterval, MaxInterval: defaultInitialInterval,
	RandomizationFactor: defaultRandomizationFactor,
}

func (r Retry) withDefaults() Retry {
	r.MaxRetries = min(r.MaxRetries, math.MaxInt32) // adding a few must not overflow
	r.InitialInterval = cmp.Or(r.InitialInterval, defaultInitialInterval)
	r.MaxInterval = cmp.Or(r.MaxInterval, max(defaultMaxInterval, r.InitialInterval))
	r.Multiplier = cmp.Or(r.Multiplier, defaultMultiplier)
	return r
}

// Middleware applies the policy to a handler. It decides when the handler fails.
// The decision takes effect when the message is nacked, which the router does
// because of the error that the middleware returns. If another middleware swallows
// that error, the message is acked and not redelivered.
//
//   - The error of a message that is out of retries is marked: IsDead is true for
//     it. Its text is unchanged.
//   - Permanent, RetryAfter and Snooze are honored, and so are cenkalti/backoff's
//     PermanentError and RetryAfterError.
//   - Of several Retry middlewares around a handler the innermost decides. The
//     limit of SubscriberConfig.Retry takes precedence over all of them.
//   - A panic is a failure. It is not recovered here.
//   - A context.Canceled while the subscription closes, and any error in the last
//     second of CloseTimeout, is not a failure: the message is released with its
//     count unchanged. If the subscription is not closing, a context.Canceled is
//     held back for a second in case it closes, and then counts as an ordinary
//     error.
//   - A message that crashed MaxRetries+2 processes is dead before the handler sees
//     it again. Of several Retry middlewares the innermost one's MaxRetries counts;
//     the outer ones know of the inner one after the first message.
//
// Messages of other Subscribers, and copies of this library's messages, pass
// through unchanged: put the middleware outside of code that copies messages.
//
// If a field is invalid (negative, or out of range), the middleware handles no
// messages: it returns an error that names the field, and this uses up no retries.
func (r Retry) Middleware(h message.HandlerFunc) message.HandlerFunc {
	errs := configErrors{}
	r.validate(&errs)
	invalid := errs.err()
	r = r.withDefaults()
	others := bystander{name: "Retry"}
	var inner atomic.Bool // whether there is a Retry further inside
	return func(msg *message.Message) ([]*message.Message, error) {
		d := deliveryOf(msg)
		switch {
		case invalid != nil && d != nil:
			err := Snooze(invalid, defaultMaxInterval)
			d.verdict.Store(&verdict{fate: OutcomeSnoozed, err: err, delay: defaultMaxInterval})
			return nil, err
		case invalid != nil:
			return nil, invalid
		case d == nil:
			others.pass(msg)
			return h(msg)
		}
		outer := d.entered.Swap(&inner)
		defer d.entered.Store(outer)
		if outer != nil {
			outer.Store(true)
		}
		if r.exhaustedBefore(d.count) && !inner.Load() {
			d.verdict.Store(&verdict{fate: OutcomeDead, kind: Exhausted, err: ErrRetriesExhausted})
			return nil, ErrRetriesExhausted
		}
		return d.judged(h, r.judge)
	}
}

// judge decides what happens to a message whose handler failed, unless that is
// already decided.
func (r Retry) judge(d *deliveryContext, err error) error {
	v, err := d.consider(err)
	if v.fate == "" {
		err = r.decide(v, d.count, err)
	} else if v.kind == Filtered && r.exhausted(d.count) {
		// Decided by a DeadLetter further inside. One further outside would see the
		// exhausted retries, too.
		err = v.die(Exhausted, err, ErrRetriesExhausted)
	}
	d.verdict.Store(v)
	return err
}

// decide decides about the failure of the count-th delivery. It returns err, marked if
// the message is dead.
func (r Retry) decide(v *verdict, count int64, err error) error {
	if v.delay < 0 {
		v.delay = r.delay(count)
	}
	v.fate, v.hook = OutcomeRetried, r.OnRetryHook
	switch {
	case r.exhausted(count):
		return v.die(Exhausted, err, ErrRetriesExhausted)
	case r.ShouldRetry != nil && !r.ShouldRetry(middleware.RetryParams{Err: err, RetryNum: int(count), Delay: v.delay}):
		return v.die(PermanentFailure, err, ErrPermanent)
	}
	return err
}

func (r Retry) validate(errs *configErrors) {
	errs.addIf(r.MaxRetries < -1, "Retry.MaxRetries", "is %d; it must be -1 (no retries), 0 (no limit) or more", r.MaxRetries)
	atLeast(errs, "Retry.InitialInterval", r.InitialInterval, 0)
	atLeast(errs, "Retry.MaxInterval", r.MaxInterval, 0)
	errs.addIf(r.MaxInterval > 0 && r.MaxInterval < r.InitialInterval, "Retry.MaxInterval", "is %v; it must be at least InitialInterval (%v)", r.MaxInterval, r.InitialInterval)
	errs.addIf(r.Multiplier != 0 && !(r.Multiplier >= 1) || math.IsInf(r.Multiplier, 0), "Retry.Multiplier", "is %v; it must be 1 or more", r.Multiplier)
	errs.addIf(!(r.RandomizationFactor >= 0 && r.RandomizationFactor <= 1), "Retry.RandomizationFactor", "is %v; it must be between 0 and 1", r.RandomizationFactor)
}

// exhausted reports whether a message that failed in its count-th delivery has no
// retry left.
func (r Retry) exhausted(count int64) bool {
	return r.MaxRetries != 0 && count > int64(max(r.MaxRetries, 0))
}

// exhaustedBefore reports whether a message is dead before its count-th delivery.
// It allows one delivery more than exhausted does: a crash counts for every message
// that was in flight, guilty or not.
func (r Retry) exhaustedBefore(count int64) bool {
	return r.exhausted(count - 2)
}

// suspects returns the delivery count from which a claimed message is suspected of
// having crashed its consumer, and the last count that is allowed; 0 without a
// limit, since then nothing can die. Other messages may have caused the first two
// crashes. And a message in its last delivery must not lose it to a crash that
// another message causes.
func (r Retry) suspects() (from, last int64) {
	if r.MaxRetries == 0 {
		return 0, 0
	}
	return 3, int64(max(r.MaxRetries, 0)) + 2
}

// delay returns the time between the failure of the count-th delivery and the next
// delivery.
func (r Retry) delay(count int64) time.Duration {
	d := float64(r.InitialInterval) * math.Pow(r.Multiplier, float64(max(count, 1)-1))
	d = min(d, float64(r.MaxInterval)) // also bounds an infinite Pow
	if f := r.RandomizationFactor; f > 0 {
		d *= 1 - f + 2*f*rand.Float64()
	}
	if d >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(d)
}
