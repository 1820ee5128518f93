package goxstreams

import (
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
	// What cenkalti/backoff, and so Watermill's example configuration, uses.
	defaultRandomizationFactor = 0.5
)

// Retry says how often and when a failed message comes again. As
// SubscriberConfig.Retry it holds for every message of the Subscriber; as a
// middleware (Retry.Middleware) for the handlers that have it, knowing their
// errors. The count is Redis's own delivery count: it survives the process. The
// fields are named as in Watermill's middleware.Retry; unlike there, the delay is
// not a sleep that occupies the handler, it passes while other messages are
// handled. (With MaxConcurrency 1 the order is kept instead: the topic waits.)
type Retry struct {
	// MaxRetries is how many times a message is delivered again after its first
	// delivery; then it goes to the dead-letter stream. 0: without limit. -1:
	// never again, the first failure is final. A message that kills its process
	// is delivered once more than that, because the crash says nothing about
	// which of the messages in flight was to blame.
	MaxRetries int

	// InitialInterval is the delay before the first retry. 0: 100ms.
	InitialInterval time.Duration

	// MaxInterval bounds the delay. 0: 30s, or InitialInterval if that is more.
	MaxInterval time.Duration

	// Multiplier is what each delay is multiplied by to get the next one, 1 at
	// least. 0: 2.
	Multiplier float64

	// RandomizationFactor spreads each delay evenly over
	// [delay*(1-f), delay*(1+f)], so that messages that failed together do not
	// come again together. From 0 (no spread) to 1.
	RandomizationFactor float64

	// ShouldRetry, if set, is asked before each retry; false: the message is
	// dead at once. RetryNum counts from 1. Err is the handler's error, or
	// ErrNacked in SubscriberConfig.Retry, which sees a Nack only.
	ShouldRetry func(middleware.RetryParams) bool

	// OnRetryHook, if set, is told of each redelivery that is scheduled: the 1-based
	// retry number, and the delay before it. It is not called for Snooze.
	OnRetryHook func(retryNum int, delay time.Duration)
}

// defaultRetry is what SubscriberConfig.Retry's nil stands for.
var defaultRetry = Retry{RandomizationFactor: defaultRandomizationFactor}

// fanOutRetry is for fan-out, where nothing is stored about a failure: the one
// subscription that failed tries again, steadily.
var fanOutRetry = Retry{
	InitialInterval: defaultInitialInterval, MaxInterval: defaultInitialInterval,
	RandomizationFactor: defaultRandomizationFactor,
}

func (r Retry) withDefaults() Retry {
	r.MaxRetries = min(r.MaxRetries, math.MaxInt32) // a few more must not overflow
	if r.InitialInterval == 0 {
		r.InitialInterval = defaultInitialInterval
	}
	if r.MaxInterval == 0 {
		r.MaxInterval = max(defaultMaxInterval, r.InitialInterval)
	}
	if r.Multiplier == 0 {
		r.Multiplier = defaultMultiplier
	}
	return r
}

// Middleware applies the policy to a handler. It decides when the handler fails,
// and the decision is carried out when the message is nacked, which the router
// does with the error that the middleware passes up. If another middleware
// swallows that error, the message is acked: nothing comes again.
//
//   - The error of a message whose retries are used up is marked: IsDead is true
//     for it. Its text stays the same.
//   - Permanent, RetryAfter and Snooze are obeyed, and so are the PermanentError
//     and RetryAfterError of cenkalti/backoff.
//   - Of several Retry middlewares around a handler the innermost decides. The
//     limit of SubscriberConfig.Retry holds before all of them.
//   - A panic is a failure. It is not recovered here.
//   - A failure with context.Canceled while the subscription closes, and any in
//     the last second of CloseTimeout, is none: the message is released with its
//     count as before. Where the subscription does not close (yet),
//     context.Canceled waits a second for it, and then is an error like others.
//   - A message that crashed MaxRetries+2 processes is dead before the handler
//     sees it again. Of several Retry middlewares the innermost one's number
//     counts; that there is one, those around it know from the first message on.
//
// Messages of other Subscribers pass through unchanged, and so do copies of ours:
// wrap what copies messages in the middleware, not the other way round.
//
// With a mistake in its fields (negative, or out of range) it handles no message:
// it returns an error that names the field, which uses no retry up.
func (r Retry) Middleware(h message.HandlerFunc) message.HandlerFunc {
	errs := configErrors{}
	r.validate(&errs)
	invalid := errs.err()
	r = r.withDefaults()
	others := bystander{name: "Retry"}
	var inner atomic.Bool // there is a Retry further inside
	return func(msg *message.Message) ([]*message.Message, error) {
		d := deliveryOf(msg)
		switch {
		case invalid != nil && d != nil:
			err := Snooze(invalid, defaultMaxInterval)
			d.verdict.Store(&verdict{fate: snoozed, err: err, delay: defaultMaxInterval})
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
		if r.exhaustedBefore(d.delivery.Count) && !inner.Load() {
			d.verdict.Store(&verdict{fate: dead, kind: Exhausted, err: ErrRetriesExhausted})
			return nil, ErrRetriesExhausted
		}
		return d.judged(h, r.judge)
	}
}

// judge decides what becomes of a message whose handler failed, unless that is
// decided.
func (r Retry) judge(d *deliveryContext, err error) error {
	v, err := d.consider(err)
	if v.fate == undecided {
		count := d.delivery.Count
		if v.delay < 0 {
			v.delay = r.delay(count)
		}
		switch {
		case r.exhausted(count):
			v.fate, v.kind = dead, Exhausted
			err = mark(err, ErrRetriesExhausted)
		case r.ShouldRetry != nil && !r.ShouldRetry(middleware.RetryParams{Err: err, RetryNum: int(count), Delay: v.delay}):
			v.fate, v.kind = dead, PermanentFailure
			err = mark(err, ErrPermanent)
		default:
			v.fate, v.hook = again, r.OnRetryHook
		}
	} else if v.fate == dead && v.kind == Filtered && r.exhausted(d.delivery.Count) {
		// By a DeadLetter further inside. One further outside would find it so.
		v.kind, err = Exhausted, mark(err, ErrRetriesExhausted)
	}
	d.verdict.Store(v)
	return err
}

func (r Retry) validate(errs *configErrors) {
	if r.MaxRetries < -1 {
		errs.add("Retry.MaxRetries", "is %d; it must be -1 (no retries), 0 (no limit) or more", r.MaxRetries)
	}
	if r.InitialInterval < 0 {
		errs.add("Retry.InitialInterval", "is negative: %v", r.InitialInterval)
	}
	if r.MaxInterval < 0 {
		errs.add("Retry.MaxInterval", "is negative: %v", r.MaxInterval)
	} else if r.MaxInterval > 0 && r.MaxInterval < r.InitialInterval {
		errs.add("Retry.MaxInterval", "%v is below InitialInterval %v", r.MaxInterval, r.InitialInterval)
	}
	if r.Multiplier != 0 && !(r.Multiplier >= 1) || math.IsInf(r.Multiplier, 0) {
		errs.add("Retry.Multiplier", "is %v; it must be 1 or more", r.Multiplier)
	}
	if !(r.RandomizationFactor >= 0 && r.RandomizationFactor <= 1) {
		errs.add("Retry.RandomizationFactor", "is %v; it must be between 0 and 1", r.RandomizationFactor)
	}
}

// exhausted reports whether a message that failed in its count-th delivery has
// no retry left.
func (r Retry) exhausted(count int64) bool {
	return r.MaxRetries != 0 && count > int64(max(r.MaxRetries, 0))
}

// exhaustedBefore reports whether a message is dead before its count-th
// delivery. One delivery more than failures are granted is in reserve: a crash
// counts for every message that was in flight, guilty or not.
func (r Retry) exhaustedBefore(count int64) bool {
	return r.exhausted(count - 2)
}

// suspects returns the delivery counts from which on a claimed message is suspected of
// having crashed its holder, and the last one that is granted; 0 without a limit, since
// nothing can die then. Two crashes may be somebody else's doing. What is delivered for
// the last time must not lose that to another message's crash.
func (r Retry) suspects() (from, last int64) {
	if r.MaxRetries == 0 {
		return 0, 0
	}
	return 3, int64(max(r.MaxRetries, 0)) + 2
}

// delay returns the time from the failure of the count-th delivery to the next.
func (r Retry) delay(count int64) time.Duration {
	d := float64(r.InitialInterval) * math.Pow(r.Multiplier, float64(max(count, 1)-1))
	d = min(d, float64(r.MaxInterval)) // also what Pow made infinite
	if f := r.RandomizationFactor; f > 0 {
		d *= 1 - f + 2*f*rand.Float64()
	}
	if d >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(d)
}
