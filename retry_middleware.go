package goxstreams

import (
	"math"
	"math/rand/v2"
	"time"

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

// Retry says how often and when a nacked message comes again. The count is
// Redis's own delivery count: it survives the process. The fields are named as
// in Watermill's middleware.Retry; unlike there, the delay is not a sleep that
// occupies the handler, it passes in Redis while other messages are handled.
// (With MaxConcurrency 1 the order is kept instead: the topic waits.)
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
	// dead at once. RetryNum counts from 1. Err is ErrNacked where the message
	// was nacked without an error being known.
	ShouldRetry func(middleware.RetryParams) bool

	// OnRetryHook, if set, is told that a redelivery is scheduled: the how
	// manieth, from 1, and after which delay.
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

// suspectFrom is the delivery count from which on a claimed message is handled
// alone. Two crashes may be somebody else's doing; what is in flight by itself
// at the third one is the culprit. With few retries the suspicion comes sooner:
// the delivery in reserve must not be lost to another message's crash.
func (r Retry) suspectFrom() int64 {
	if r.MaxRetries == 0 {
		return 3
	}
	return min(3, int64(max(r.MaxRetries, 0))+2)
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
