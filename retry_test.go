package goxstreams_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/ThreeDotsLabs/watermill/pubsub/gochannel"
	"github.com/cenkalti/backoff/v5"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Retry as a middleware, and the errors that it honors. SubscriberConfig.Retry
// alone is tested in guarantee02_counts_test.go.

var errFails = errors.New("it fails")

// consumer handles a topic's messages in some way. stop ends it as the caller of a
// Subscriber would, and returns when it has ended; t's cleanup calls it too.
type consumer func(t testing.TB, sub message.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) (stop func())

// eachWay runs a test with Watermill's router, and without one.
func eachWay(t *testing.T, f func(t *testing.T, consume consumer)) {
	t.Helper()
	t.Run("Router", func(t *testing.T) { t.Parallel(); f(t, routed) })
	t.Run("Subscribe", func(t *testing.T) { t.Parallel(); f(t, plainly) })
}

// eachWayVirtually is eachWay in virtual time, where a Sleep takes exactly its
// duration, and ends when everything else waits too.
func eachWayVirtually(t *testing.T, f func(t *testing.T, v *virtualServer, consume consumer)) {
	t.Helper()
	t.Run("Router", func(t *testing.T) {
		virtually(t, func(t *testing.T, v *virtualServer) { f(t, v, routed) })
	})
	t.Run("Subscribe", func(t *testing.T) {
		virtually(t, func(t *testing.T, v *virtualServer) { f(t, v, plainly) })
	})
}

// routed handles the topic with a router. The first middleware is the outermost.
func routed(t testing.TB, sub message.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) func() {
	t.Helper()
	router := plainRouter(t)
	router.AddMiddleware(mws...)
	router.AddConsumerHandler("handler", topic, sub, h)
	return goRouter(t, router)
}

func plainRouter(t testing.TB) *message.Router {
	t.Helper()
	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: 2 * patience}, nil)
	require.NoError(t, err)
	return router
}

func goRouter(t testing.TB, router *message.Router) (stop func()) {
	t.Helper()
	ran := make(chan error, 1)
	go func() { ran <- router.Run(context.Background()) }()
	<-router.Running()
	stop = sync.OnceFunc(func() {
		assert.NoError(t, router.Close())
		assert.NoError(t, <-ran)
	})
	t.Cleanup(stop)
	return stop
}

// plainly subscribes and settles by the handler's error, like the router.
func plainly(t testing.TB, sub message.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) func() {
	t.Helper()
	handler := func(msg *message.Message) ([]*message.Message, error) { return nil, h(msg) }
	for _, mw := range slices.Backward(mws) {
		handler = mw(handler)
	}
	messages := subscribe(t, sub, topic)
	var handlers sync.WaitGroup
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for msg := range messages {
			handlers.Go(func() {
				settled := false
				defer func() {
					if !settled { // a panic, or runtime.Goexit
						_ = recover()
						msg.Nack()
					}
				}()
				_, err := handler(msg)
				settled = true
				if err != nil {
					msg.Nack()
					return
				}
				msg.Ack()
			})
		}
		handlers.Wait()
	}()
	stop := sync.OnceFunc(func() {
		assert.NoError(t, sub.Close())
		<-ended
	})
	t.Cleanup(stop)
	return stop
}

// attempts records the calls of a handler.
type attempts struct {
	mu       sync.Mutex
	payloads []string
	counts   []int64 // by Redis
	times    []time.Time
}

// add notes a call of the handler and returns its 1-based number.
func (a *attempts) add(msg *message.Message) int {
	d, _ := goxstreams.DeliveryFromContext(msg.Context())
	a.mu.Lock()
	defer a.mu.Unlock()
	a.payloads = append(a.payloads, string(msg.Payload))
	a.counts = append(a.counts, d.Count)
	a.times = append(a.times, time.Now())
	return len(a.counts)
}

func (a *attempts) len() int { return len(a.seen()) }

// seen returns the delivery counts that the handler saw, in the order of its calls.
func (a *attempts) seen() []int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.counts)
}

// handled returns the payloads that the handler saw.
func (a *attempts) handled() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.payloads)
}

// gaps returns the times between calls.
func (a *attempts) gaps() []time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	var gaps []time.Duration
	for i := 1; i < len(a.times); i++ {
		gaps = append(gaps, a.times[i].Sub(a.times[i-1]))
	}
	return gaps
}

// allLetters returns the dead letters of a topic.
func allLetters(t testing.TB, client redis.UniversalClient, topic string) []goxstreams.DeadMessage {
	t.Helper()
	return allLettersIn(t, client, goxstreams.DeadLetterTopic(topic))
}

func allLettersIn(t testing.TB, client redis.UniversalClient, stream string) []goxstreams.DeadMessage {
	t.Helper()
	q, err := goxstreams.NewDeadLetterQueue(client, stream)
	require.NoError(t, err)
	var letters []goxstreams.DeadMessage
	for d, err := range q.All(context.Background(), "") {
		require.NoError(t, err)
		letters = append(letters, d)
	}
	return letters
}

// eventuallyDies waits for the topic's only dead letter and returns it.
func eventuallyDies(t testing.TB, client redis.UniversalClient, topic string) goxstreams.DeadMessage {
	t.Helper()
	eventually(t, func() bool { return len(allLetters(t, client, topic)) > 0 }, "no dead letter")
	eventuallySettled(t, client, topic, testGroup)
	letters := allLetters(t, client, topic)
	require.Len(t, letters, 1, "dead letters")
	return letters[0]
}

// onlyPending returns the topic's only pending entry.
func onlyPending(t testing.TB, client redis.UniversalClient, topic string) redis.XPendingExt {
	t.Helper()
	rows := pendingOf(t, client, topic, testGroup)
	require.Len(t, rows, 1, "pending")
	return rows[0]
}

// eventuallyWaits waits until the Subscriber's only message waits for its retry.
func eventuallyWaits(t testing.TB, sub *goxstreams.Subscriber) {
	t.Helper()
	eventually(t, func() bool { return stats(t, sub).Waiting == 1 }, "the message does not wait for a retry")
}

// quick returns a policy with that limit and hardly any delay.
func quick(maxRetries int) goxstreams.Retry {
	return goxstreams.Retry{MaxRetries: maxRetries, InitialInterval: time.Millisecond, MaxInterval: time.Millisecond}
}

// crashed publishes a message and leaves it pending for a dead consumer, with that
// many deliveries.
func crashed(t testing.TB, client redis.UniversalClient, topic string, count int64) {
	t.Helper()
	createGroup(t, client, topic, testGroup)
	publish(t, client, topic, "x")
	id := readAs(t, client, topic, testGroup, "ghost", 1)[0]
	require.NoError(t, client.Do(context.Background(), "XCLAIM", topic, testGroup, "ghost", 0, id, "IDLE", 3_600_000, "RETRYCOUNT", count).Err())
}

// Redis counts: the count is the same for any consumer that takes the message over,
// and no part of it is in the process.
func TestRetry_CountOutlivesTheSubscriber(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // the embedded one counts renewals as deliveries
	for _, end := range []struct {
		name string
		next []int64 // what the handler of the second process sees
		die  func(t *testing.T, client redis.UniversalClient, topic string)
	}{
		{"Closed", []int64{3, 4}, func(*testing.T, redis.UniversalClient, string) {}},
		{"Killed", []int64{4}, func(t *testing.T, client redis.UniversalClient, topic string) {
			claimAs(t, client, topic, "ghost", onlyPending(t, client, topic).ID)
		}},
	} {
		t.Run(end.name, func(t *testing.T) {
			t.Parallel()
			eachWay(t, func(t *testing.T, consume consumer) {
				client, topic := newClient(t), topic(t)
				publish(t, client, topic, "x")
				policy := quick(3)
				var first attempts
				sub := newSubscriber(t, claiming(newClient(t)))
				stop := consume(t, sub, topic, func(msg *message.Message) error {
					if first.add(msg) == 2 {
						return goxstreams.RetryAfter(errFails, time.Hour)
					}
					return errFails
				}, policy.Middleware)
				eventually(t, func() bool { return first.len() == 2 })
				eventuallyWaits(t, sub)
				require.EqualValues(t, 2, onlyPending(t, client, topic).RetryCount)
				stop()
				require.Equal(t, []int64{1, 2}, first.seen())
				require.EqualValues(t, 2, onlyPending(t, client, topic).RetryCount, "Close changed the count")
				end.die(t, client, topic)

				var second attempts
				consume(t, newSubscriber(t, claiming(newClient(t))), topic, func(msg *message.Message) error {
					second.add(msg)
					return errFails
				}, policy.Middleware)
				letter := eventuallyDies(t, client, topic)
				require.Equal(t, end.next, second.seen())
				require.EqualValues(t, 4, letter.Deliveries)
				require.Equal(t, goxstreams.Exhausted, letter.Kind)
				require.Equal(t, errFails.Error(), letter.Reason)
			})
		})
	}
}

// The delay belongs to the redelivery: while one message waits, the others are
// handled; with MaxConcurrency 1 they wait too, to preserve order.
func TestRetry_DelayIsTheRedeliverys(t *testing.T) {
	t.Parallel()
	const delay = 10 * time.Minute
	for _, tt := range []struct {
		concurrency int
		want        []string
	}{
		{1, []string{"bad", "bad", "a", "b", "c"}},
		// As many as there are slots. Those in between come in any order.
		{2, []string{"bad", "bad", "a", "b", "c", "bad", "bad"}},
	} {
		t.Run(fmt.Sprint("MaxConcurrency", tt.concurrency), func(t *testing.T) {
			eachWayVirtually(t, func(t *testing.T, v *virtualServer, consume consumer) {
				client := v.client()
				defer client.Close()
				sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
					Client: client, ConsumerGroup: testGroup, MaxConcurrency: tt.concurrency,
				}, nil)
				require.NoError(t, err)
				var seen attempts
				start := time.Now()
				defer consume(t, sub, "topic", func(msg *message.Message) error {
					seen.add(msg)
					if string(msg.Payload) == "bad" && time.Since(start) < delay {
						return errFails
					}
					return nil
				}, goxstreams.Retry{InitialInterval: delay}.Middleware)()
				for range tt.concurrency {
					publish(t, client, "topic", "bad")
				}
				time.Sleep(time.Minute)
				require.Equal(t, tt.concurrency, sub.Stats()[0].Waiting)
				publish(t, client, "topic", "a", "b", "c")
				time.Sleep(time.Minute) // far below the delay
				if tt.concurrency == 1 {
					require.Equal(t, 1, seen.len(), "the order")
				} else {
					require.Equal(t, 2+3, seen.len(), "the wait occupies the slot")
				}
				time.Sleep(2 * delay)
				handled, gaps := seen.handled(), seen.gaps()
				require.Len(t, handled, len(tt.want))
				if tt.concurrency > 1 {
					slices.Sort(handled[2:5])
				}
				require.Equal(t, tt.want, handled)
				var took time.Duration // from the first one's first delivery to its second
				for _, gap := range gaps[:slices.Index(tt.want[tt.concurrency:], "bad")+tt.concurrency] {
					took += gap
				}
				require.InDelta(t, delay, took, float64(roundTrips))
			})
		})
	}
}

// Ways in which an error reaches a middleware.
var wrappings = []struct {
	name string
	wrap func(error) error
}{
	{"Plain", func(err error) error { return err }},
	{"Errorf", func(err error) error { return fmt.Errorf("handling: %w", err) }},
	{"Join", func(err error) error { return errors.Join(errors.New("another"), err) }},
	{"Type", func(err error) error { return &wrappedError{err} }},
	{"Deep", func(err error) error { return fmt.Errorf("a: %w", errors.Join(nil, fmt.Errorf("b: %w", err))) }},
}

type wrappedError struct{ error }

func (e *wrappedError) Unwrap() error { return e.error }

// Watermill's middlewares that return errors unchanged.
func passing() []message.HandlerMiddleware {
	return []message.HandlerMiddleware{
		middleware.Recoverer, middleware.CorrelationID, middleware.Timeout(time.Hour),
		middleware.NewIgnoreErrors([]error{errors.New("none of these")}).Middleware,
		(&middleware.DelayOnError{InitialInterval: time.Hour}).Middleware,
	}
}

func TestRetry_Permanent(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		err  error
	}{
		{"Permanent", goxstreams.Permanent(errFails)},
		{"ErrPermanent", fmt.Errorf("%w: %w", errFails, goxstreams.ErrPermanent)},
		{"Backoff", backoff.Permanent(errFails)},
		// Whatever else the error says.
		{"OfRetryAfter", goxstreams.Permanent(goxstreams.RetryAfter(errFails, 0))},
		{"InRetryAfter", goxstreams.RetryAfter(goxstreams.Permanent(errFails), 0)},
		{"InSnooze", goxstreams.Snooze(goxstreams.Permanent(errFails), 0)},
		{"OfSnooze", goxstreams.Permanent(goxstreams.Snooze(errFails, 0))},
		{"BesideBoth", errors.Join(goxstreams.Snooze(errFails, 0), goxstreams.RetryAfter(errFails, 0), goxstreams.Permanent(errFails))},
		{"BackoffBesideSnooze", errors.Join(goxstreams.Snooze(errFails, 0), backoff.Permanent(errFails))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, w := range wrappings {
				t.Run(w.name, func(t *testing.T) {
					eachWay(t, func(t *testing.T, consume consumer) {
						err := w.wrap(tt.err)
						require.ErrorIs(t, err, errFails)
						client, topic := newClient(t), topic(t)
						publish(t, client, topic, "x")
						var seen attempts
						mws := append([]message.HandlerMiddleware{quick(5).Middleware}, passing()...)
						consume(t, newSubscriber(t, grouped(client)), topic, func(msg *message.Message) error {
							seen.add(msg)
							return err
						}, mws...)
						letter := eventuallyDies(t, client, topic)
						require.Equal(t, 1, seen.len())
						require.EqualValues(t, 1, letter.Deliveries)
						require.Equal(t, goxstreams.PermanentFailure, letter.Kind)
						require.Equal(t, err.Error(), letter.Reason)
					})
				})
			}
		})
	}
}

// Watermill's Retry inside of ours stops at once, and the error that it returns is
// still permanent.
func TestRetry_PermanentThroughWatermillsRetry(t *testing.T) {
	t.Parallel()
	again := middleware.Retry{MaxRetries: 5, InitialInterval: time.Hour}
	for _, w := range wrappings {
		t.Run(w.name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, consume consumer) {
				client, topic := newClient(t), topic(t)
				publish(t, client, topic, "x")
				var seen attempts
				consume(t, newSubscriber(t, grouped(client)), topic, func(msg *message.Message) error {
					seen.add(msg)
					return w.wrap(goxstreams.Permanent(errFails))
				}, quick(5).Middleware, again.Middleware)
				letter := eventuallyDies(t, client, topic)
				require.Equal(t, 1, seen.len())
				require.Equal(t, goxstreams.PermanentFailure, letter.Kind)
				require.Equal(t, errFails.Error(), letter.Reason) // it removes what wraps the mark
			})
		})
	}
}

func TestRetry_Delays(t *testing.T) {
	t.Parallel()
	const d = 2 * time.Minute
	for _, tt := range []struct {
		name    string
		err     error
		want    time.Duration
		snoozed bool
	}{
		{"RetryAfter", goxstreams.RetryAfter(errFails, d), d, false},
		{"RetryAfterNegative", goxstreams.RetryAfter(errFails, -d), 0, false},
		{"Backoff", &backoff.RetryAfterError{Duration: d}, d, false},
		{"BackoffNegative", &backoff.RetryAfterError{Duration: -d}, 0, false},
		{"Snooze", goxstreams.Snooze(errFails, d), d, true},
		{"SnoozeNegative", goxstreams.Snooze(errFails, -d), 0, true},
		{"BackoffSnoozed", goxstreams.Snooze(&backoff.RetryAfterError{Duration: time.Hour}, d), d, true},
		{"None", errFails, time.Minute, false},
	} {
		for _, w := range wrappings {
			t.Run(tt.name+"/"+w.name, func(t *testing.T) {
				eachWayVirtually(t, func(t *testing.T, v *virtualServer, consume consumer) {
					client := v.client()
					defer client.Close()
					type hooked struct {
						n int
						d time.Duration
					}
					var hooks []hooked
					policy := goxstreams.Retry{
						MaxRetries: 1, InitialInterval: time.Minute, MaxInterval: time.Minute, // which limits only the backoff
						OnRetryHook: func(n int, d time.Duration) { hooks = append(hooks, hooked{n, d}) },
					}
					sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: testGroup}, nil)
					require.NoError(t, err)
					var seen attempts
					mws := append([]message.HandlerMiddleware{policy.Middleware}, passing()...)
					mws = append(mws, middleware.Retry{}.Middleware) // of one attempt
					stop := consume(t, sub, "topic", func(msg *message.Message) error {
						if seen.add(msg) == 1 {
							return w.wrap(tt.err)
						}
						return nil
					}, mws...)
					publish(t, client, "topic", "x")
					time.Sleep(d + time.Minute)
					stop()
					require.Equal(t, 2, seen.len())
					require.InDelta(t, tt.want, seen.gaps()[0], float64(roundTrips))
					if tt.snoozed {
						require.Equal(t, []int64{1, 1}, seen.seen())
						require.Empty(t, hooks, "a Snooze is no retry")
						return
					}
					require.Equal(t, []int64{1, 2}, seen.seen())
					require.Equal(t, []hooked{{1, tt.want}}, hooks)
				})
			})
		}
	}
}

// RetryAfter counts as a retry, up to the limit.
func TestRetry_RetryAfterIsCounted(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, consume consumer) {
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "x")
		var seen attempts
		consume(t, newSubscriber(t, grouped(client)), topic, func(msg *message.Message) error {
			seen.add(msg)
			return goxstreams.RetryAfter(errFails, 0)
		}, quick(2).Middleware)
		require.Equal(t, goxstreams.Exhausted, eventuallyDies(t, client, topic).Kind)
		require.Equal(t, []int64{1, 2, 3}, seen.seen())
	})
}

// However often a message is snoozed, it reaches no limit.
func TestRetry_SnoozeExhaustsNothing(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, consume consumer) {
		const snoozes = 30
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "x")
		var seen attempts
		limit := quick(-1)
		config := grouped(client)
		config.Retry = &limit
		consume(t, newSubscriber(t, config), topic, func(msg *message.Message) error {
			if seen.add(msg) <= snoozes {
				return goxstreams.Snooze(errFails, 0)
			}
			return errFails
		}, limit.Middleware)
		letter := eventuallyDies(t, client, topic)
		require.EqualValues(t, 1, letter.Deliveries)
		require.Equal(t, slices.Repeat([]int64{1}, snoozes+1), seen.seen())
	})
}

// A snoozed message has the count from before the delivery for its next consumer:
// the same one, another one after Close, which releases it, and another one after
// its process died while it waited.
func TestRetry_SnoozedCountInRedis(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // the embedded one counts renewals as deliveries
	for _, before := range []int64{0, 3} {
		for _, concurrency := range []int{1, 4} {
			for _, end := range []string{"Close", "Death"} {
				t.Run(fmt.Sprintf("After%d/MaxConcurrency%d/%s", before, concurrency, end), func(t *testing.T) {
					t.Parallel()
					eachWay(t, func(t *testing.T, consume consumer) {
						client, topic := newClient(t), topic(t)
						publish(t, client, topic, "x")
						// From then on the first consumer's commands do not reach
						// Redis.
						var cut atomic.Bool
						config := claiming(newClient(t, &hook{process: func(_ context.Context, _ redis.Cmder, next func() error) error {
							if cut.Load() {
								return errors.New("the process is dead")
							}
							return next()
						}}))
						config.MaxConcurrency = concurrency
						sub := newSubscriber(t, config)
						var seen attempts
						stop := consume(t, sub, topic, func(msg *message.Message) error {
							if n := seen.add(msg); int64(n) > before {
								return goxstreams.Snooze(errFails, time.Hour)
							}
							return errFails
						}, quick(5).Middleware)
						eventually(t, func() bool { return int64(seen.len()) == before+1 })
						eventuallyWaits(t, sub)

						want := before + 1
						if end == "Close" {
							stop()
							require.Equal(t, before, onlyPending(t, client, topic).RetryCount)
							require.Equal(t, "released", onlyPending(t, client, topic).Consumer)
						} else {
							cut.Store(true) // after the Snooze is stored in Redis: this crash uses up the delivery that it returned
						}
						got := next(t, subscribe(t, newSubscriber(t, claiming(client)), topic))
						require.Equal(t, want, delivery(t, got).Count)
						got.Ack()
						eventuallySettled(t, client, topic, testGroup)
						require.Empty(t, allLetters(t, client, topic))
					})
				})
			}
		}
	}
}

func TestRetryErrors(t *testing.T) {
	t.Run("NilStaysNil", func(t *testing.T) {
		require.NoError(t, goxstreams.Permanent(nil))
		require.NoError(t, goxstreams.RetryAfter(nil, time.Second))
		require.NoError(t, goxstreams.Snooze(nil, time.Second))
		require.False(t, goxstreams.IsDead(nil))
	})
	t.Run("TextAndCause", func(t *testing.T) {
		cause := &customError{"cause"}
		for _, err := range []error{goxstreams.Permanent(cause), goxstreams.RetryAfter(cause, time.Second), goxstreams.Snooze(cause, time.Second)} {
			require.Equal(t, cause.Error(), err.Error())
			require.ErrorIs(t, err, cause)
			var as *customError
			require.ErrorAs(t, err, &as)
			require.Same(t, cause, as)
		}
	})
	t.Run("IsDead", func(t *testing.T) {
		for _, w := range wrappings {
			require.True(t, goxstreams.IsDead(w.wrap(goxstreams.Permanent(errFails))), w.name)
			require.True(t, goxstreams.IsDead(w.wrap(backoff.Permanent(errFails))), w.name)
			require.True(t, goxstreams.IsDead(w.wrap(goxstreams.ErrRetriesExhausted)), w.name)
			require.False(t, goxstreams.IsDead(w.wrap(errFails)), w.name)
			require.False(t, goxstreams.IsDead(w.wrap(goxstreams.RetryAfter(errFails, 0))), w.name)
			require.False(t, goxstreams.IsDead(w.wrap(goxstreams.Snooze(errFails, 0))), w.name)
		}
		require.ErrorIs(t, goxstreams.Permanent(errFails), goxstreams.ErrPermanent)
		require.NotErrorIs(t, goxstreams.Permanent(errFails), goxstreams.ErrRetriesExhausted)
		require.NotErrorIs(t, goxstreams.ErrRetriesExhausted, goxstreams.ErrPermanent)
	})
	t.Run("AsBackoffs", func(t *testing.T) {
		var permanent *backoff.PermanentError
		require.ErrorAs(t, goxstreams.Permanent(errFails), &permanent)
		require.ErrorIs(t, permanent.Unwrap(), goxstreams.ErrPermanent, "Watermill's Retry takes the mark off")
		var after *backoff.RetryAfterError
		require.ErrorAs(t, goxstreams.RetryAfter(errFails, time.Minute), &after)
		require.Equal(t, time.Minute, after.Duration)
	})
}

type customError struct{ text string }

func (e *customError) Error() string { return e.text }

// Which of several policies decides. The handler always fails.
func TestRetry_Precedence(t *testing.T) {
	t.Parallel()
	limit := func(n int) *goxstreams.Retry { r := quick(n); return &r }
	in := func(mws ...message.HandlerMiddleware) []message.HandlerMiddleware { return mws }
	for _, tt := range []struct {
		name    string
		config  *goxstreams.Retry
		router  []message.HandlerMiddleware
		handler []message.HandlerMiddleware
		calls   int
	}{
		{"Config", limit(2), nil, nil, 3},
		{"Router", nil, in(quick(2).Middleware), nil, 3},
		{"Handler", nil, nil, in(quick(1).Middleware), 2},
		{"HandlerBelowRouter", nil, in(quick(4).Middleware), in(quick(1).Middleware), 2},
		{"HandlerAboveRouter", nil, in(quick(1).Middleware), in(quick(5).Middleware), 6},
		{"HandlerWhereTheRouterHasNone", nil, in(quick(-1).Middleware), in(quick(4).Middleware), 5},
		{"HandlerNoneAtAll", nil, in(quick(4).Middleware), in(quick(-1).Middleware), 1},
		{"InnermostOfFour", nil, in(quick(7).Middleware, quick(1).Middleware), in(quick(6).Middleware, quick(3).Middleware), 4},
		{"OthersBetween", nil, in(quick(1).Middleware, middleware.Recoverer, middleware.Retry{}.Middleware),
			in(goxstreams.DeadLetter{}.Middleware, quick(5).Middleware, middleware.Timeout(time.Hour)), 6},
		{"ConfigBelowHandler", limit(1), nil, in(quick(5).Middleware), 2},
		{"ConfigAboveHandler", limit(5), nil, in(quick(1).Middleware), 2},
		{"ConfigNone", limit(-1), in(quick(3).Middleware), in(quick(5).Middleware), 1},
		{"ConfigWithDeadLetterOnly", limit(2), in(goxstreams.DeadLetter{}.Middleware), nil, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			publish(t, client, topic, "x")
			config := grouped(client)
			config.Retry = tt.config
			var seen attempts
			router := plainRouter(t)
			router.AddMiddleware(tt.router...)
			router.AddConsumerHandler("handler", topic, newSubscriber(t, config), func(msg *message.Message) error {
				seen.add(msg)
				return errFails
			}).AddMiddleware(tt.handler...)
			goRouter(t, router)
			letter := eventuallyDies(t, client, topic)
			require.Equal(t, tt.calls, seen.len())
			require.EqualValues(t, tt.calls, letter.Deliveries)
			require.Equal(t, goxstreams.Exhausted, letter.Kind)
			if tt.router != nil || tt.handler != nil {
				require.Equal(t, errFails.Error(), letter.Reason)
			}
			require.Equal(t, "handler", letter.Handler)
		})
	}
}

// The middlewares know the config's limit: a message that reaches it is dead for
// outer middlewares, and for DeadLetter.Topic.
func TestRetry_ConfigsLimitIsSeen(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, consume consumer) {
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "x")
		sub := newSubscriber(t, limited(client, 1))
		var seen attempts
		var err atomic.Pointer[error]
		consume(t, sub, topic, func(msg *message.Message) error {
			seen.add(msg)
			return errFails
		}, func(h message.HandlerFunc) message.HandlerFunc {
			return func(msg *message.Message) ([]*message.Message, error) {
				produced, e := h(msg)
				err.Store(&e)
				return produced, e
			}
		}, goxstreams.DeadLetter{Topic: poisonOf}.Middleware, quick(5).Middleware)
		eventually(t, func() bool { return stats(t, sub).Dead == 1 })
		require.Equal(t, 2, seen.len())
		require.ErrorIs(t, *err.Load(), goxstreams.ErrRetriesExhausted)
		require.ErrorIs(t, *err.Load(), errFails)
		require.Equal(t, errFails.Error(), (*err.Load()).Error())
		letters := allLettersIn(t, client, poisonOf(topic))
		require.Len(t, letters, 1)
		require.Equal(t, goxstreams.Exhausted, letters[0].Kind)
		require.Empty(t, allLetters(t, client, topic))
	})
}

// Of several policies only the innermost one's hook is called, with its own delay.
func TestRetry_InnermostDelayAndHook(t *testing.T) {
	t.Parallel()
	eachWayVirtually(t, func(t *testing.T, v *virtualServer, consume consumer) {
		client := v.client()
		defer client.Close()
		told := make(map[string][]time.Duration)
		policy := func(name string, d time.Duration) goxstreams.Retry {
			return goxstreams.Retry{InitialInterval: d, OnRetryHook: func(_ int, d time.Duration) { told[name] = append(told[name], d) }}
		}
		config := policy("config", time.Hour)
		sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: testGroup, Retry: &config}, nil)
		require.NoError(t, err)
		var seen attempts
		stop := consume(t, sub, "topic", func(msg *message.Message) error {
			if seen.add(msg) < 3 {
				return errFails
			}
			return nil
		}, policy("outer", time.Minute).Middleware, policy("inner", time.Second).Middleware)
		publish(t, client, "topic", "x")
		time.Sleep(time.Hour / 2)
		stop()
		require.Equal(t, map[string][]time.Duration{"inner": {time.Second, 2 * time.Second}}, told)
		require.Len(t, seen.gaps(), 2)
		require.InDelta(t, time.Second, seen.gaps()[0], float64(roundTrips))
		require.InDelta(t, 2*time.Second, seen.gaps()[1], float64(roundTrips))
	})
}

// Several policies in one process: each handler has its own, and all share a
// Subscriber; a handler without one has the config's, which by default has no
// limit.
func TestRetry_PerHandler(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	sub := newSubscriber(t, grouped(client))
	router := plainRouter(t)
	topics := map[int]string{1: topic(t), 3: topic(t), 0: topic(t)}
	seen := map[int]*attempts{1: {}, 3: {}, 0: {}}
	const many = 5 // the default delays grow
	for n, topic := range topics {
		publish(t, client, topic, "x")
		h := router.AddConsumerHandler(fmt.Sprint("handler", n), topic, sub, func(msg *message.Message) error {
			if seen[n].add(msg) == many {
				return nil
			}
			return errFails
		})
		if n > 0 {
			h.AddMiddleware(quick(n).Middleware)
		}
	}
	goRouter(t, router)
	for _, n := range []int{1, 3} {
		letter := eventuallyDies(t, client, topics[n])
		require.EqualValues(t, n+1, letter.Deliveries)
		require.Equal(t, n+1, seen[n].len())
		require.Equal(t, fmt.Sprint("handler", n), letter.Handler)
	}
	eventually(t, func() bool { return seen[0].len() == many })
	eventuallySettled(t, client, topics[0], testGroup)
	require.Empty(t, allLetters(t, client, topics[0]), "the default has no limit")
}

func TestRetry_ShouldRetry(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, consume consumer) {
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "x")
		var mu sync.Mutex
		var asked []middleware.RetryParams
		var hooked []time.Duration
		policy := goxstreams.Retry{
			InitialInterval: time.Millisecond, RandomizationFactor: 0.5,
			ShouldRetry: func(p middleware.RetryParams) bool {
				mu.Lock()
				defer mu.Unlock()
				asked = append(asked, p)
				return p.RetryNum < 4
			},
			OnRetryHook: func(n int, d time.Duration) {
				mu.Lock()
				defer mu.Unlock()
				assert.Equal(t, len(hooked)+1, n)
				hooked = append(hooked, d)
			},
		}
		var seen attempts
		consume(t, newSubscriber(t, grouped(client)), topic, func(msg *message.Message) error {
			switch seen.add(msg) {
			case 2:
				return goxstreams.Snooze(errFails, 0) // not called
			case 3:
				return goxstreams.RetryAfter(errFails, 3*time.Millisecond)
			}
			return errFails
		}, policy.Middleware)
		letter := eventuallyDies(t, client, topic)
		require.Equal(t, goxstreams.PermanentFailure, letter.Kind)
		require.Equal(t, errFails.Error(), letter.Reason)
		require.Equal(t, []int64{1, 2, 2, 3, 4}, seen.seen())
		mu.Lock()
		defer mu.Unlock()
		require.Len(t, asked, 4)
		for i, p := range asked {
			require.Equal(t, i+1, p.RetryNum)
			require.ErrorIs(t, p.Err, errFails)
			if i < 3 {
				require.Equal(t, hooked[i], p.Delay, "the delay that it is asked about is the one that follows")
			}
		}
		require.Len(t, hooked, 3)
		require.Equal(t, 3*time.Millisecond, hooked[1])
	})
	// ShouldRetry is not called when no retry is left.
	t.Run("NotAskedAtTheEnd", func(t *testing.T) {
		eachWay(t, func(t *testing.T, consume consumer) {
			for _, err := range []error{errFails, goxstreams.Permanent(errFails)} {
				client, topic := newClient(t), topic(t)
				publish(t, client, topic, "x")
				policy := quick(-1)
				var asked atomic.Int64
				policy.ShouldRetry = func(middleware.RetryParams) bool { asked.Add(1); return true }
				consume(t, newSubscriber(t, grouped(client)), topic, func(*message.Message) error { return err }, policy.Middleware)
				eventuallyDies(t, client, topic)
				require.Zero(t, asked.Load())
			}
		})
	})
}

// OnRetryHook is called only if a redelivery is scheduled.
func TestRetry_HookIsToldOfRedeliveriesOnly(t *testing.T) {
	t.Parallel()
	t.Run("Swallowed", func(t *testing.T) {
		eachWay(t, func(t *testing.T, consume consumer) {
			client, topic := newClient(t), topic(t)
			publish(t, client, topic, "x")
			var hooks atomic.Int64
			policy := goxstreams.Retry{OnRetryHook: func(int, time.Duration) { hooks.Add(1) }}
			sub := newSubscriber(t, grouped(client))
			consume(t, sub, topic, func(*message.Message) error { return errFails },
				middleware.NewIgnoreErrors([]error{errFails}).Middleware, policy.Middleware)
			eventually(t, func() bool { return stats(t, sub).Acked == 1 })
			eventuallySettled(t, client, topic, testGroup)
			require.Zero(t, hooks.Load())
			require.Zero(t, stats(t, sub).Nacked)
		})
	})
	t.Run("Closing", func(t *testing.T) {
		eachWay(t, func(t *testing.T, consume consumer) {
			client, topic := newClient(t), topic(t)
			publish(t, client, topic, "x")
			var hooks atomic.Int64
			policy := quick(0)
			policy.OnRetryHook = func(int, time.Duration) { hooks.Add(1) }
			config := grouped(client)
			config.CloseTimeout = patience
			config.MaxConcurrency = 2
			sub := newSubscriber(t, config)
			started, closing := make(chan struct{}), make(chan struct{})
			stop := consume(t, sub, topic, withSleeper(func(*message.Message) error {
				close(started)
				<-closing
				return errFails
			}), policy.Middleware)
			closes := sync.OnceFunc(func() { close(closing) })
			t.Cleanup(closes)
			<-started
			sleeping := sleeper(t, sub, topic)
			go stop()
			eventuallyReleased(t, client, topic, sleeping)
			closes()
			stop()
			require.Zero(t, hooks.Load())
			pending := pendingOf(t, client, topic, testGroup)
			require.Len(t, pending, 2)
			require.EqualValues(t, 1, pending[0].RetryCount, "a failure counts")
			require.Equal(t, "released", pending[0].Consumer)
		})
	})
}

var errSleeps = errors.New("it sleeps")

// sleeper publishes a message that the handler snoozes for long, and returns its
// entry's ID when it waits. Its release shows that the subscription closes.
func sleeper(t testing.TB, sub *goxstreams.Subscriber, topic string) string {
	t.Helper()
	client := newClient(t)
	publish(t, client, topic, "sleeper")
	eventually(t, func() bool { return stats(t, sub).Waiting == 1 }, "it does not sleep")
	return pendingOf(t, client, topic, testGroup)[1].ID
}

// withSleeper is a handler for a topic with a sleeper.
func withSleeper(h message.NoPublishHandlerFunc) message.NoPublishHandlerFunc {
	return func(msg *message.Message) error {
		if string(msg.Payload) == "sleeper" {
			return goxstreams.Snooze(errSleeps, time.Hour)
		}
		return h(msg)
	}
}

func eventuallyReleased(t testing.TB, client redis.UniversalClient, topic, id string) {
	t.Helper()
	eventually(t, func() bool {
		return slices.ContainsFunc(pendingOf(t, client, topic, testGroup), func(p redis.XPendingExt) bool {
			return p.ID == id && p.Consumer == "released"
		})
	}, "it is not released")
}

// The user's functions may panic.
func TestRetry_PanickingCallbacks(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, consume consumer) {
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "x")
		policy := quick(2)
		policy.OnRetryHook = func(int, time.Duration) { panic("in the hook") }
		log := newLogRecorder()
		var seen attempts
		consume(t, newSubscriberLog(t, grouped(client), log), topic, func(msg *message.Message) error {
			seen.add(msg)
			return errFails
		}, policy.Middleware)
		eventuallyDies(t, client, topic)
		require.Equal(t, 3, seen.len())
		require.Len(t, log.Errors(), 2)
		require.Contains(t, log.Errors()[0], "in the hook")
	})
}

// Several attempts within one delivery: the last one's verdict counts.
func TestRetry_AttemptsWithinADelivery(t *testing.T) {
	t.Parallel()
	again := middleware.Retry{MaxRetries: 1, InitialInterval: time.Millisecond}.Middleware
	type result struct {
		calls   int
		dead    goxstreams.DeadKind // empty: not dead
		pending int64               // the deliveries that count, if it waits; -1: acked
	}
	hour := quick(5)
	hour.InitialInterval, hour.MaxInterval = time.Hour, time.Hour
	for _, tt := range []struct {
		name   string
		mws    []message.HandlerMiddleware
		errors []error // of the calls in turn
		want   result
	}{
		{"WatermillsOutside/Success", []message.HandlerMiddleware{again, quick(-1).Middleware},
			[]error{goxstreams.Snooze(errFails, 0), nil}, result{2, "", -1}},
		{"WatermillsOutside/LastSnoozes", []message.HandlerMiddleware{again, hour.Middleware},
			[]error{errFails, goxstreams.Snooze(errFails, time.Hour)}, result{2, "", 0}},
		{"WatermillsOutside/LastFails", []message.HandlerMiddleware{again, hour.Middleware},
			[]error{goxstreams.Snooze(errFails, 0), errFails}, result{2, "", 1}},
		{"WatermillsOutside/LastIsPermanent", []message.HandlerMiddleware{again, hour.Middleware},
			[]error{errFails, goxstreams.Permanent(errFails)}, result{2, goxstreams.PermanentFailure, -1}},
		// It does not repeat a message that is already dead.
		{"WatermillsOutside/Exhausted", []message.HandlerMiddleware{again, quick(-1).Middleware},
			[]error{errFails}, result{1, goxstreams.Exhausted, -1}},
		{"WatermillsInside/LastFails", []message.HandlerMiddleware{hour.Middleware, again},
			[]error{goxstreams.RetryAfter(errFails, 0), errFails}, result{2, "", 1}},
		{"WatermillsInside/Success", []message.HandlerMiddleware{quick(-1).Middleware, again},
			[]error{errFails, nil}, result{2, "", -1}},
		{"DuplicatorOutside/SecondFails", []message.HandlerMiddleware{middleware.Duplicator, quick(-1).Middleware},
			[]error{nil, errFails}, result{2, goxstreams.Exhausted, -1}},
		{"DuplicatorOutside/FirstFails", []message.HandlerMiddleware{middleware.Duplicator, quick(-1).Middleware},
			[]error{errFails}, result{1, goxstreams.Exhausted, -1}},
		{"DuplicatorInside/SecondFails", []message.HandlerMiddleware{quick(-1).Middleware, middleware.Duplicator},
			[]error{nil, errFails}, result{2, goxstreams.Exhausted, -1}},
		// A success after a failure: a later failure, outside, has no verdict.
		{"OutsideFailsAfterSuccess", []message.HandlerMiddleware{failsAfterTwo, quick(-1).Middleware},
			[]error{goxstreams.Permanent(errFails), nil}, result{2, "", 1}},
		{"OutsideFailsAfterSuccess/DeadLetter", []message.HandlerMiddleware{failsAfterTwo, goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware},
			[]error{errFails, nil}, result{2, "", 1}},
		{"OutsideFailsAfterInsideOvercome", []message.HandlerMiddleware{failsAfterwards, hour.Middleware, overcomes, goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware},
			[]error{errFails}, result{1, "", 1}},
		{"InsideOvercome", []message.HandlerMiddleware{hour.Middleware, overcomes, goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware},
			[]error{errFails}, result{1, "", -1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, consume consumer) {
				client, topic := newClient(t), topic(t)
				publish(t, client, topic, "x")
				config := grouped(client)
				config.Retry = &goxstreams.Retry{InitialInterval: time.Hour}
				sub := newSubscriber(t, config)
				var seen attempts
				stop := consume(t, sub, topic, func(msg *message.Message) error { return tt.errors[seen.add(msg)-1] }, tt.mws...)
				if tt.want.pending >= 0 {
					eventuallyWaits(t, sub)
					stop()
					require.Equal(t, tt.want.pending, onlyPending(t, client, topic).RetryCount)
				} else {
					eventually(t, func() bool { return stats(t, sub).Acked+stats(t, sub).Dead == 1 })
					eventuallySettled(t, client, topic, testGroup)
				}
				require.Equal(t, tt.want.calls, seen.len())
				letters := allLetters(t, client, topic)
				if tt.want.dead == "" {
					require.Empty(t, letters)
					return
				}
				require.Len(t, letters, 1)
				require.Equal(t, tt.want.dead, letters[0].Kind)
			})
		})
	}
}

func isAny(error) bool { return true }

// failsAfterTwo calls the handler twice, and fails itself.
func failsAfterTwo(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		_, _ = h(msg)
		_, _ = h(msg)
		return nil, errors.New("outside")
	}
}

// failsAfterwards calls the handler, and fails itself.
func failsAfterwards(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		_, _ = h(msg)
		return nil, errors.New("outside")
	}
}

// overcomes swallows the handler's error.
func overcomes(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		produced, _ := h(msg)
		return produced, nil
	}
}

// logLinesWith returns the lines that contain the text.
func logLinesWith(lines []string, text string) []string {
	return slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return !strings.Contains(l, text) })
}

const noEffect = " middleware has no effect"

// Other Subscribers' messages pass through a router that mixes them with ours.
func TestRetry_ForeignMessages(t *testing.T) {
	client, topic := newClient(t), topic(t)
	log := newLogRecorder()
	foreign := gochannel.NewGoChannel(gochannel.Config{}, watermill.NopLogger{})
	t.Cleanup(func() { _ = foreign.Close() })
	router := plainRouter(t)
	var seen attempts
	var passed atomic.Int64
	var unchanged atomic.Bool
	unchanged.Store(true)
	router.AddMiddleware(func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) {
			produced, err := h(msg)
			if _, ours := goxstreams.DeliveryFromContext(msg.Context()); !ours {
				passed.Add(1)
				unchanged.CompareAndSwap(true, err == nil || err == errFails) //nolint:errorlint // the very same
			}
			return produced, err
		}
	}, quick(1).Middleware, goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware)
	router.AddConsumerHandler("ours", topic, newSubscriberLog(t, grouped(client), log), func(msg *message.Message) error {
		seen.add(msg)
		return errFails
	})
	const failures = 4
	var theirs attempts
	router.AddConsumerHandler("theirs", "foreign", foreign, func(msg *message.Message) error {
		if theirs.add(msg) <= failures {
			return errFails
		}
		return nil
	})
	goRouter(t, router)
	require.NoError(t, foreign.Publish("foreign", message.NewMessage("1", nil)))
	eventually(t, func() bool { return theirs.len() == failures+1 }, "GoChannel sends again what is nacked")
	require.NoError(t, foreign.Publish("foreign", message.NewMessage("2", nil)))
	eventually(t, func() bool { return passed.Load() == failures+2 })
	require.True(t, unchanged.Load(), "a foreign message's error was changed")
	require.Len(t, logLinesWith(log.Infos(), "Retry"+noEffect), 1)
	require.Len(t, logLinesWith(log.Infos(), "DeadLetter"+noEffect), 1)
	require.Empty(t, log.Errors())

	publish(t, client, topic, "x")
	require.Equal(t, goxstreams.Filtered, eventuallyDies(t, client, topic).Kind)
	require.Equal(t, 1, seen.len())
}

// copying is a Subscriber that delivers copies, as some decorators do.
type copying struct {
	message.Subscriber
	copyOf func(*message.Message) *message.Message
}

func (c copying) Subscribe(ctx context.Context, topic string) (<-chan *message.Message, error) {
	in, err := c.Subscriber.Subscribe(ctx, topic)
	if err != nil {
		return nil, err
	}
	out := make(chan *message.Message)
	go func() {
		defer close(out)
		for msg := range in {
			other := c.copyOf(msg)
			out <- other
			go func() {
				select {
				case <-other.Acked():
					msg.Ack()
				case <-other.Nacked():
					msg.Nack()
				case <-msg.Context().Done():
				}
			}()
		}
	}()
	return out, nil
}

// ownName makes the router take it for one of ours.
type ownName struct{ copying }

func (o ownName) String() string { return fmt.Sprint(o.Subscriber) }

// A copy carries no verdict: it passes unchanged, and an error is logged once,
// wherever the copy was made.
func TestRetry_Copies(t *testing.T) {
	bare := (*message.Message).Copy
	withContext := (*message.Message).CopyWithContext
	inMiddleware := func(copyOf func(*message.Message) *message.Message) message.HandlerMiddleware {
		return func(h message.HandlerFunc) message.HandlerFunc {
			return func(msg *message.Message) ([]*message.Message, error) { return h(copyOf(msg)) }
		}
	}
	for name, copyOf := range map[string]func(*message.Message) *message.Message{"Copy": bare, "CopyWithContext": withContext} {
		for _, where := range []string{"Subscriber", "Decorator", "Middleware"} {
			t.Run(name+"/"+where, func(t *testing.T) {
				client, topic := newClient(t), topic(t)
				publish(t, client, topic, "x", "y")
				log := newLogRecorder()
				config := grouped(client)
				config.Retry = quickRetry()
				ours := newSubscriberLog(t, config, log)
				var sub message.Subscriber = ours
				router := plainRouter(t)
				switch where {
				case "Subscriber":
					sub = ownName{copying{ours, copyOf}}
				case "Decorator":
					router.AddSubscriberDecorators(func(s message.Subscriber) (message.Subscriber, error) {
						return copying{s, copyOf}, nil
					})
				case "Middleware":
					router.AddMiddleware(inMiddleware(copyOf))
				}
				router.AddMiddleware(quick(-1).Middleware)
				var seen attempts
				router.AddConsumerHandler("handler", topic, sub, func(msg *message.Message) error {
					if seen.add(msg) <= 3 {
						return goxstreams.Permanent(errFails)
					}
					return nil
				})
				goRouter(t, router)
				eventually(t, func() bool { return stats(t, ours).Acked == 2 })
				require.Empty(t, allLetters(t, client, topic), "a verdict on a copy was carried out")
				require.Equal(t, 5, seen.len())
				require.Len(t, logLinesWith(log.Errors(), "Retry"+noEffect), 1, log)
				require.Empty(t, logLinesWith(log.Infos(), noEffect))
			})
		}
	}
	t.Run("CopyWithContext/Plain", func(t *testing.T) {
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "x")
		log := newLogRecorder()
		config := grouped(client)
		config.Retry = quickRetry()
		sub := newSubscriberLog(t, config, log)
		var seen attempts
		plainly(t, sub, topic, func(msg *message.Message) error {
			if seen.add(msg) <= 3 {
				return errFails
			}
			return nil
		}, inMiddleware(withContext), quick(-1).Middleware)
		eventually(t, func() bool { return stats(t, sub).Acked == 1 })
		require.Len(t, logLinesWith(log.Errors(), "Retry"+noEffect), 1)
	})
}

// A message that a handler passes on within the process, with the context of its
// delivery, is a different message: its death is not that of the first.
func TestRetry_SentOnInTheSameProcess(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	inProcess := gochannel.NewGoChannel(gochannel.Config{PreserveContext: true}, watermill.NopLogger{})
	t.Cleanup(func() { _ = inProcess.Close() })
	router := plainRouter(t)
	router.AddMiddleware(quick(-1).Middleware, goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware)
	config := grouped(client)
	config.Retry = quickRetry()
	sub := newSubscriber(t, config)
	failed := make(chan struct{})
	router.AddConsumerHandler("ours", topic, sub, func(msg *message.Message) error {
		if err := inProcess.Publish("sent on", msg.CopyWithContext()); err != nil {
			return err
		}
		<-failed // the copy's handler, while this message is unsettled
		return nil
	})
	var theirs attempts
	router.AddConsumerHandler("theirs", "sent on", inProcess, func(msg *message.Message) error {
		if _, known := goxstreams.DeliveryFromContext(msg.Context()); !known {
			return goxstreams.Permanent(errors.New("the test is wrong: the copy has no delivery"))
		}
		if theirs.add(msg) == 1 {
			return goxstreams.Permanent(errFails)
		}
		close(failed)
		return nil
	})
	goRouter(t, router)
	publish(t, client, topic, "x") // only now: a GoChannel drops messages without subscribers
	eventually(t, func() bool { return stats(t, sub).Acked == 1 })
	eventuallySettled(t, client, topic, testGroup)
	require.Equal(t, 2, theirs.len())
	require.Empty(t, allLetters(t, client, topic))
}

// A panic is a failure like any other, whoever recovers it.
func TestRetry_Panics(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		mws    []message.HandlerMiddleware
		reason string
	}{
		{"RecovererOutside", []message.HandlerMiddleware{middleware.Recoverer, quick(1).Middleware}, "goxstreams: the handler panicked"},
		{"RecovererInside", []message.HandlerMiddleware{quick(1).Middleware, middleware.Recoverer}, `panic occurred: "help"`},
		{"RecoveredByTheCaller", []message.HandlerMiddleware{quick(1).Middleware}, "goxstreams: the handler panicked"},
		{"Between", []message.HandlerMiddleware{goxstreams.DeadLetter{}.Middleware, middleware.Recoverer, quick(1).Middleware}, "goxstreams: the handler panicked"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, consume consumer) {
				client, topic := newClient(t), topic(t)
				publish(t, client, topic, "x")
				var seen attempts
				consume(t, newSubscriber(t, grouped(client)), topic, func(msg *message.Message) error {
					seen.add(msg)
					panic("help")
				}, tt.mws...)
				letter := eventuallyDies(t, client, topic)
				require.Equal(t, []int64{1, 2}, seen.seen())
				require.Equal(t, goxstreams.Exhausted, letter.Kind)
				require.Contains(t, letter.Reason, tt.reason)
				require.LessOrEqual(t, len(letter.Reason), 1024)
			})
		})
	}
	// runtime.Goexit, as called by a test's FailNow, leaves no error. If something
	// then nacks the message, it counts as a failure.
	t.Run("Goexit", func(t *testing.T) {
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "x")
		var seen attempts
		plainly(t, newSubscriber(t, grouped(client)), topic, func(msg *message.Message) error {
			seen.add(msg)
			runtime.Goexit()
			return nil
		}, quick(1).Middleware)
		require.Equal(t, goxstreams.Exhausted, eventuallyDies(t, client, topic).Kind)
		require.Equal(t, []int64{1, 2}, seen.seen())
	})
	// The router does not settle it. It stays in flight, and Close gives up on it,
	// with its count unchanged.
	t.Run("GoexitInTheRouter", func(t *testing.T) {
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "x")
		sub := newSubscriber(t, grouped(client))
		gone := make(chan struct{})
		stop := routed(t, sub, topic, func(*message.Message) error {
			defer close(gone)
			runtime.Goexit()
			return nil
		}, quick(-1).Middleware)
		<-gone
		stop()
		require.Zero(t, onlyPending(t, client, topic).RetryCount)
		require.Empty(t, allLetters(t, client, topic))
	})
}

// A message that has crashed one process more than the allowed failures is not
// delivered to the handler again.
func TestRetry_CrashLimit(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // the embedded one counts renewals as deliveries
	for _, tt := range []struct {
		maxRetries int
		count      int64 // in Redis, before
		called     bool
	}{
		{-1, 1, true}, {-1, 2, false},
		{1, 2, true}, {1, 3, false},
		{3, 4, true}, {3, 5, false}, {3, 50, false},
		{0, 50, true},
	} {
		t.Run(fmt.Sprintf("MaxRetries%d/After%d", tt.maxRetries, tt.count), func(t *testing.T) {
			t.Parallel()
			eachWay(t, func(t *testing.T, consume consumer) {
				client, topic := newClient(t), topic(t)
				crashed(t, client, topic, tt.count)
				var seen attempts
				log := newLogRecorder()
				consume(t, newSubscriberLog(t, claiming(client), log), topic, func(msg *message.Message) error {
					seen.add(msg)
					if tt.maxRetries == 0 {
						return nil
					}
					return errFails
				}, quick(tt.maxRetries).Middleware)
				eventuallySettled(t, client, topic, testGroup)
				want := goxstreams.ErrRetriesExhausted.Error()
				if tt.called {
					require.Equal(t, []int64{tt.count + 1}, seen.seen())
					want = errFails.Error()
				} else {
					require.Empty(t, seen.seen())
				}
				letters := allLetters(t, client, topic)
				if tt.maxRetries == 0 {
					require.Empty(t, letters)
					return
				}
				require.Len(t, letters, 1)
				require.Equal(t, goxstreams.Exhausted, letters[0].Kind)
				require.Equal(t, tt.count+1, letters[0].Deliveries)
				require.Equal(t, want, letters[0].Reason)
				require.Equal(t, "x", string(letters[0].Message.Payload))
				require.Empty(t, log.Errors())
			})
		})
	}
	// An inner policy's own crash limit applies, after the first message.
	t.Run("Nested", func(t *testing.T) {
		client, topic := newClient(t), topic(t)
		publish(t, client, topic, "first")
		var seen attempts
		sub := newSubscriber(t, claiming(client))
		routed(t, sub, topic, func(msg *message.Message) error {
			seen.add(msg)
			return nil
		}, quick(1).Middleware, quick(20).Middleware)
		eventually(t, func() bool { return seen.len() == 1 })
		publishCrashed := func(count int64) {
			id := addPending(t, client, topic, "ghost", "x")
			require.NoError(t, client.Do(context.Background(), "XCLAIM", topic, testGroup, "ghost", 0, id, "IDLE", 3_600_000, "RETRYCOUNT", count).Err())
		}
		publishCrashed(10)
		eventually(t, func() bool { return seen.len() == 2 })
		eventuallySettled(t, client, topic, testGroup)
		publishCrashed(22)
		eventually(t, func() bool { return stats(t, sub).Dead == 1 })
		require.Equal(t, []int64{1, 11}, seen.seen())
	})
}

// If its fields are invalid, the middleware handles nothing, and no message loses a
// retry.
func TestRetry_InvalidFields(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		field string
		retry goxstreams.Retry
	}{
		{"MaxRetries", goxstreams.Retry{MaxRetries: -2}},
		{"InitialInterval", goxstreams.Retry{InitialInterval: -1}},
		{"MaxInterval", goxstreams.Retry{MaxInterval: -1}},
		{"MaxInterval", goxstreams.Retry{InitialInterval: 2, MaxInterval: 1}},
		{"Multiplier", goxstreams.Retry{Multiplier: 0.5}},
		{"Multiplier", goxstreams.Retry{Multiplier: -1}},
		{"Multiplier", goxstreams.Retry{Multiplier: math.NaN()}},
		{"Multiplier", goxstreams.Retry{Multiplier: math.Inf(1)}},
		{"RandomizationFactor", goxstreams.Retry{RandomizationFactor: -0.1}},
		{"RandomizationFactor", goxstreams.Retry{RandomizationFactor: 1.1}},
		{"RandomizationFactor", goxstreams.Retry{RandomizationFactor: math.NaN()}},
	} {
		t.Run(fmt.Sprintf("%+v", tt.retry), func(t *testing.T) {
			eachWay(t, func(t *testing.T, consume consumer) {
				client, topic := newClient(t), topic(t)
				publish(t, client, topic, "x")
				sub := newSubscriber(t, limited(client, -1))
				var seen attempts
				errs := make(chan error, 10)
				stop := consume(t, sub, topic, func(msg *message.Message) error {
					seen.add(msg)
					return nil
				}, func(h message.HandlerFunc) message.HandlerFunc {
					return func(msg *message.Message) ([]*message.Message, error) {
						produced, err := h(msg)
						errs <- err
						return produced, err
					}
				}, tt.retry.Middleware)
				require.ErrorContains(t, <-errs, "Retry."+tt.field+":")
				eventuallyWaits(t, sub)
				stop()
				require.Zero(t, onlyPending(t, client, topic).RetryCount)
				require.Empty(t, seen.seen())
				require.Empty(t, allLetters(t, client, topic))
			})
		})
	}
	t.Run("ForeignMessage", func(t *testing.T) {
		h := goxstreams.Retry{MaxRetries: -2}.Middleware(func(*message.Message) ([]*message.Message, error) {
			require.Fail(t, "handled")
			return nil, nil
		})
		_, err := h(message.NewMessage("1", nil))
		require.ErrorContains(t, err, "Retry.MaxRetries: is -2")
	})
}

// unmarked hides the marks of an error from outer middlewares.
func unmarked(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		produced, err := h(msg)
		if err != nil {
			err = errors.New(err.Error())
		}
		return produced, err
	}
}

// A handler may settle its message itself. Its result then comes too late.
func TestRetry_SettledEarly(t *testing.T) {
	t.Parallel()
	t.Run("Ack", func(t *testing.T) {
		eachWay(t, func(t *testing.T, consume consumer) {
			client, topic := newClient(t), topic(t)
			publish(t, client, topic, "x", "y")
			sub := newSubscriber(t, grouped(client))
			var seen attempts
			consume(t, sub, topic, func(msg *message.Message) error {
				msg.Ack()
				seen.add(msg)
				return goxstreams.Permanent(errFails)
			}, quick(-1).Middleware, goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware)
			eventually(t, func() bool { return stats(t, sub).Acked == 2 && seen.len() == 2 })
			eventuallySettled(t, client, topic, testGroup)
			require.Zero(t, stats(t, sub).Nacked)
			require.Empty(t, allLetters(t, client, topic))
		})
	})
	// The config decides about a Nack without an error.
	for name, result := range map[string]error{"Nil": nil, "Permanent": goxstreams.Permanent(errFails)} {
		t.Run("Nack/"+name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, consume consumer) {
				client, topic := newClient(t), topic(t)
				publish(t, client, topic, "x")
				sub := newSubscriber(t, limited(client, 2))
				var seen attempts
				died := make(chan struct{})
				returns := sync.OnceFunc(func() { close(died) })
				consume(t, sub, topic, func(msg *message.Message) error {
					seen.add(msg)
					msg.Nack()
					<-died // by then all Nacks have taken effect
					return result
				}, quick(5).Middleware)
				t.Cleanup(returns)
				letter := eventuallyDies(t, client, topic)
				returns()
				require.Equal(t, []int64{1, 2, 3}, seen.seen())
				require.Equal(t, goxstreams.ErrRetriesExhausted.Error(), letter.Reason)
			})
		})
	}
	// It is retried within the delivery, although the message is settled, and dead,
	// by then.
	t.Run("NackAndAgain", func(t *testing.T) {
		eachWay(t, func(t *testing.T, consume consumer) {
			client, topic := newClient(t), topic(t)
			const n = 50
			publishN(t, client, topic, n)
			limit := quick(-1)
			config := grouped(client)
			config.MaxConcurrency = 8
			config.Retry = &limit
			sub := newSubscriber(t, config)
			consume(t, sub, topic, func(msg *message.Message) error {
				msg.Nack()
				return errFails
			}, middleware.Retry{MaxRetries: 3, InitialInterval: 2 * time.Millisecond}.Middleware, unmarked, middleware.Timeout(time.Hour), quick(5).Middleware)
			eventually(t, func() bool { return stats(t, sub).Dead == n })
			eventuallySettled(t, client, topic, testGroup)
			require.Len(t, allLetters(t, client, topic), n)
		})
	})
	// The verdict and the Nack cross: whichever comes first, there is no race.
	t.Run("NackAndReturn", func(t *testing.T) {
		eachWay(t, func(t *testing.T, consume consumer) {
			client, topic := newClient(t), topic(t)
			const n = 50
			publishN(t, client, topic, n)
			config := grouped(client)
			config.MaxConcurrency = 8
			config.Retry = quickRetry()
			sub := newSubscriber(t, config)
			var seen attempts
			consume(t, sub, topic, func(msg *message.Message) error {
				if d, _ := goxstreams.DeliveryFromContext(msg.Context()); d.Count > 3 {
					return nil
				}
				seen.add(msg)
				msg.Nack()
				return goxstreams.Permanent(errFails)
			}, quick(0).Middleware, goxstreams.DeadLetter{}.Middleware)
			eventually(t, func() bool { return stats(t, sub).Acked+stats(t, sub).Dead == n })
			eventuallySettled(t, client, topic, testGroup)
			require.Len(t, allLetters(t, client, topic), int(stats(t, sub).Dead))
		})
	})
}

// A subscription ends in one of these ways, and Retry's handlers learn of it, or of
// the signal behind it, sooner or later.
var endings = []struct {
	name string
	// open starts to consume; end starts the shutdown, and the returned channel is
	// closed when it has finished.
	open func(t testing.TB, sub *goxstreams.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) (end func() <-chan struct{})
}{
	{"RouterClose", func(t testing.TB, sub *goxstreams.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) func() <-chan struct{} {
		return inBackground(routed(t, sub, topic, h, mws...))
	}},
	{"RouterContext", func(t testing.TB, sub *goxstreams.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) func() <-chan struct{} {
		router := plainRouter(t)
		router.AddMiddleware(mws...)
		router.AddConsumerHandler("handler", topic, sub, h)
		ctx, cancel := context.WithCancel(context.Background())
		ran := make(chan struct{})
		go func() {
			defer close(ran)
			assert.NoError(t, router.Run(ctx))
		}()
		<-router.Running()
		return func() <-chan struct{} { cancel(); return ran }
	}},
	{"HandlerStop", func(t testing.TB, sub *goxstreams.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) func() <-chan struct{} {
		router := plainRouter(t)
		router.AddMiddleware(mws...)
		handler := router.AddConsumerHandler("handler", topic, sub, h)
		goRouter(t, router)
		return func() <-chan struct{} { handler.Stop(); return handler.Stopped() }
	}},
	{"SubscriberClose", func(t testing.TB, sub *goxstreams.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) func() <-chan struct{} {
		return inBackground(plainly(t, sub, topic, h, mws...))
	}},
	{"SubscribeContext", func(t testing.TB, sub *goxstreams.Subscriber, topic string, h message.NoPublishHandlerFunc, mws ...message.HandlerMiddleware) func() <-chan struct{} {
		ctx, cancel := context.WithCancel(context.Background())
		stop := plainly(t, withContext{sub, ctx}, topic, h, mws...)
		return func() <-chan struct{} {
			cancel()
			return inBackground(func() {
				eventually(t, func() bool { return len(sub.Stats()) == 0 }, "the context's end does not end the subscription")
				stop()
			})()
		}
	}},
}

func inBackground(stop func()) func() <-chan struct{} {
	return func() <-chan struct{} {
		done := make(chan struct{})
		go func() { defer close(done); stop() }()
		return done
	}
}

// withContext subscribes with its own context.
type withContext struct {
	*goxstreams.Subscriber
	ctx context.Context
}

func (w withContext) Subscribe(_ context.Context, topic string) (<-chan *message.Message, error) {
	return w.Subscriber.Subscribe(w.ctx, topic)
}

// A shutdown is not a failure (guarantee 8), and a failure counts even during a
// shutdown. The message is in its handler when the shutdown starts.
func TestRetry_Shutdown(t *testing.T) {
	t.Parallel()
	type shutdown struct {
		signal  context.Context // a SIGTERM's
		closing chan struct{}   // closed when the subscription is certainly closing
	}
	const (
		together = "Together" // the signal's context ends when closing starts
		after    = "After"    // .. when the subscription is certainly closing
		retried  = "InGrace/WatermillsRetryOutside"
	)
	const dead = -1
	canceled := func(_ *message.Message, s shutdown) error {
		<-s.signal.Done()
		return s.signal.Err()
	}
	failing := func(err error) func(*message.Message, shutdown) error {
		return func(_ *message.Message, s shutdown) error {
			<-s.closing
			return err
		}
	}
	inGrace := func(err error) func(*message.Message, shutdown) error {
		return func(msg *message.Message, s shutdown) error {
			<-msg.Context().Done()
			return err
		}
	}
	timedOut := func(msg *message.Message, s shutdown) error {
		<-s.closing
		<-msg.Context().Done()
		return msg.Context().Err()
	}
	all := goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware
	patient := middleware.Retry{
		MaxRetries: 3, InitialInterval: time.Hour,
		ShouldRetry: func(p middleware.RetryParams) bool { return !errors.Is(p.Err, errSleeps) },
	}.Middleware
	limit := func(n int, more ...message.HandlerMiddleware) []message.HandlerMiddleware {
		return append([]message.HandlerMiddleware{quick(n).Middleware}, more...)
	}
	for _, tt := range []struct {
		name    string
		signal  string
		handler func(*message.Message, shutdown) error
		mws     []message.HandlerMiddleware
		grace   bool // the handler waits for it
		count   int64
	}{
		// Not failures, although it is the last retry, and every failure is fatal.
		{"Canceled", together, canceled, limit(-1, all), false, 0},
		{"Canceled", after, canceled, limit(-1, all), false, 0},
		{"CanceledWrapped", together, func(_ *message.Message, s shutdown) error {
			<-s.signal.Done()
			return fmt.Errorf("query: %w", s.signal.Err())
		}, limit(-1, all), false, 0},
		{"CanceledInWatermillsRetry", after, canceled, limit(-1, all, middleware.Retry{}.Middleware), false, 0},
		{"CanceledWithDeadLetterOnly", after, canceled, []message.HandlerMiddleware{all}, false, 0},
		{"Nack", after, func(msg *message.Message, s shutdown) error {
			<-s.closing
			msg.Nack()
			return nil
		}, limit(-1, all), false, 0},
		{"InGrace", after, inGrace(errFails), limit(-1, all), true, 0},
		{"InGrace/Permanent", after, inGrace(goxstreams.Permanent(errFails)), limit(-1, all), true, 0},
		{"InGrace/Panic", after, func(msg *message.Message, _ shutdown) error {
			<-msg.Context().Done()
			panic("in the grace")
		}, limit(-1, all), true, 0},
		{"InGrace/WatermillsRetry", after, inGrace(errFails), limit(-1, all, patient), true, 0},
		{"Snooze", after, failing(goxstreams.Snooze(errFails, time.Hour)), limit(-1, all), false, 0},
		// A program that stores dead letters elsewhere does not see a dead message
		// either.
		{"Canceled/PoisonQueue", after, canceled, append([]message.HandlerMiddleware{acksTheDead}, limit(-1, all)...), false, 0},
		{"InGrace/PoisonQueue", after, inGrace(errFails), append([]message.HandlerMiddleware{acksTheDead}, limit(-1, all)...), true, 0},
		// It has failed before, and waits to be retried within this delivery.
		{retried, after, failing(errFails), append([]message.HandlerMiddleware{patient}, limit(1)...), true, 0},

		// Failures.
		{"Error", after, failing(errFails), limit(1), false, 1},
		{"Error/Last", after, failing(errFails), limit(-1), false, dead},
		{"Error/Filtered", after, failing(errFails), limit(1, all), false, dead},
		{"RetryAfter", after, failing(goxstreams.RetryAfter(errFails, time.Hour)), limit(1), false, 1},
		{"Permanent", after, failing(goxstreams.Permanent(errFails)), limit(1), false, dead},
		{"Timeout", after, timedOut, limit(1, middleware.Timeout(time.Millisecond)), false, 1},
		{"Timeout/Last", after, timedOut, limit(-1, middleware.Timeout(time.Millisecond)), false, dead},
	} {
		t.Run(tt.name+"/"+tt.signal, func(t *testing.T) {
			t.Parallel()
			for _, e := range endings {
				t.Run(e.name, func(t *testing.T) {
					t.Parallel()
					client, topic := newClient(t), topic(t)
					publish(t, client, topic, "x")
					config := grouped(client)
					config.MaxConcurrency = 2
					if tt.count == 0 && tt.name != retried {
						config.Retry = &goxstreams.Retry{MaxRetries: -1}
					}
					config.CloseTimeout = 2 * patience
					if tt.grace {
						config.CloseTimeout = 2 * time.Second
					}
					sub := newSubscriber(t, config)
					signal, kill := context.WithCancel(context.Background())
					defer kill()
					s := shutdown{signal, make(chan struct{})}
					started := make(chan string, 1)
					end := e.open(t, sub, topic, withSleeper(func(msg *message.Message) error {
						d, _ := goxstreams.DeliveryFromContext(msg.Context())
						started <- d.ID
						return tt.handler(msg, s)
					}), tt.mws...)
					closes := sync.OnceFunc(func() { close(s.closing) })
					t.Cleanup(closes)
					id := <-started
					sleeping := sleeper(t, sub, topic)
					if tt.signal == together {
						kill()
					}
					ended := end()
					eventuallyReleased(t, client, topic, sleeping)
					closes()
					kill()
					select {
					case <-ended:
					case <-time.After(patience):
						require.FailNow(t, "it does not end")
					}

					letters := allLetters(t, client, topic)
					if tt.count == dead {
						require.Len(t, letters, 1)
						require.EqualValues(t, 1, letters[0].Deliveries)
						require.Len(t, pendingOf(t, client, topic, testGroup), 1)
						return
					}
					require.Empty(t, letters)
					pending := pendingOf(t, client, topic, testGroup)
					require.Len(t, pending, 2)
					require.Equal(t, id, pending[0].ID)
					require.Equal(t, "released", pending[0].Consumer)
					require.Equal(t, tt.count, pending[0].RetryCount)
					// The next consumer gets it at once: patience is below the
					// lease's duration.
					again := subscribe(t, newSubscriber(t, grouped(client)), topic)
					for range 2 {
						msg := next(t, again)
						if delivery(t, msg).ID == id {
							require.Equal(t, tt.count+1, delivery(t, msg).Count)
						}
						msg.Ack()
					}
				})
			}
		})
	}
}

// acksTheDead is a PoisonQueueWithFilter(IsDead) that loses its messages.
func acksTheDead(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		produced, err := h(msg)
		if goxstreams.IsDead(err) {
			return produced, nil
		}
		return produced, err
	}
}

// A handler that ignores everything is abandoned at CloseTimeout. It may still be
// running, so the message stays pending until its lease expires; the delivery does
// not count, and the handler's later result does not matter.
func TestRetry_ShutdownIgnored(t *testing.T) {
	t.Parallel()
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			publish(t, client, topic, "x")
			started, ignoring, returned := make(chan struct{}), make(chan struct{}), make(chan struct{})
			release := sync.OnceFunc(func() { close(ignoring) })
			sub := newSubscriber(t, grouped(client)) // CloseTimeout 1s
			end := e.open(t, sub, topic, func(*message.Message) error {
				close(started)
				<-ignoring
				return goxstreams.Permanent(errFails)
			}, func(h message.HandlerFunc) message.HandlerFunc {
				return func(msg *message.Message) ([]*message.Message, error) {
					defer close(returned)
					return h(msg)
				}
			}, quick(-1).Middleware, goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware)
			t.Cleanup(release)
			<-started
			ended := end()
			eventually(t, func() bool { return len(sub.Stats()) == 0 })
			given := onlyPending(t, client, topic)
			require.Zero(t, given.RetryCount)
			require.NotEqual(t, "released", given.Consumer)
			release()
			<-returned
			<-ended
			require.Zero(t, onlyPending(t, client, topic).RetryCount)
			require.Empty(t, allLetters(t, client, topic))
		})
	}
}

// The handler may notice the shutdown before the subscription does. For a second
// its context.Canceled may be caused by the shutdown; then it is an ordinary error.
func TestRetry_ShutdownNotice(t *testing.T) {
	for _, tt := range []struct {
		name       string
		maxRetries int
		closeAfter time.Duration // after the handler's error; 0: not at all
		dead       bool
		count      int64
	}{
		{"Before", -1, 900 * time.Millisecond, false, 0},
		{"LongBefore", -1, 1100 * time.Millisecond, true, 1},
		{"LongBefore/NotTheLast", 1, 1100 * time.Millisecond, false, 1},
		{"NotClosing", -1, 0, true, 1},
		{"NotClosing/NotTheLast", 1, 0, false, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachWayVirtually(t, func(t *testing.T, v *virtualServer, consume consumer) {
				client := v.client()
				defer client.Close()
				sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: testGroup}, nil)
				require.NoError(t, err)
				var failed, judged atomic.Pointer[time.Time]
				now := func(at *atomic.Pointer[time.Time]) { n := time.Now(); at.Store(&n) }
				stop := consume(t, sub, "topic", func(*message.Message) error {
					now(&failed)
					return fmt.Errorf("query: %w", context.Canceled)
				}, func(h message.HandlerFunc) message.HandlerFunc {
					return func(msg *message.Message) ([]*message.Message, error) {
						produced, err := h(msg)
						now(&judged)
						return produced, err
					}
				}, goxstreams.Retry{MaxRetries: tt.maxRetries, InitialInterval: time.Hour}.Middleware)
				defer stop()
				publish(t, client, "topic", "x")
				time.Sleep(10 * time.Millisecond)
				require.NotNil(t, failed.Load())
				if tt.closeAfter > 0 {
					time.Sleep(tt.closeAfter - time.Since(*failed.Load()))
					stop()
				} else {
					time.Sleep(2 * time.Second)
				}
				held := min(time.Second, cmp.Or(tt.closeAfter, time.Second))
				require.InDelta(t, held, judged.Load().Sub(*failed.Load()), float64(roundTrips))
				letters := allLetters(t, client, "topic")
				if tt.dead {
					require.Len(t, letters, 1)
					require.Equal(t, tt.count, letters[0].Deliveries)
					require.Equal(t, "query: context canceled", letters[0].Reason)
					return
				}
				require.Empty(t, letters)
				if tt.closeAfter > 0 {
					requireReleased(t, client, tt.count)
					return
				}
				require.Equal(t, tt.count, onlyPending(t, client, "topic").RetryCount)
			})
		})
	}
}

// In a fan-out the subscription itself counts; a dead message is dropped, since
// every subscriber would store it, and this is logged.
func TestRetry_FanOut(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 4} {
		t.Run(fmt.Sprint("MaxConcurrency", concurrency), func(t *testing.T) {
			eachWay(t, func(t *testing.T, consume consumer) {
				client, topic := newClient(t), topic(t)
				log := newLogRecorder()
				var hooks atomic.Int64
				policy := quick(2)
				policy.OnRetryHook = func(int, time.Duration) { hooks.Add(1) }
				sub := newSubscriberLog(t, goxstreams.SubscriberConfig{Client: client, MaxConcurrency: concurrency}, log)
				var bad, snoozed, good attempts
				consume(t, sub, topic, func(msg *message.Message) error {
					switch string(msg.Payload) {
					case "bad":
						bad.add(msg)
						return errFails
					case "snoozed":
						if snoozed.add(msg) < 10 {
							return goxstreams.Snooze(errFails, 0)
						}
						return goxstreams.Permanent(errFails)
					}
					good.add(msg)
					return nil
				}, policy.Middleware)
				publish(t, client, topic, "bad", "snoozed", "good")
				eventually(t, func() bool { return good.len() == 1 && stats(t, sub).Dead == 2 && stats(t, sub).InFlight == 0 })
				require.Equal(t, []int64{1, 2, 3}, bad.seen())
				require.Equal(t, slices.Repeat([]int64{1}, 10), snoozed.seen())
				require.EqualValues(t, 2, hooks.Load())
				require.Len(t, logLinesWith(log.Errors(), "Dead message dropped: only a consumer group without NoAck stores dead letters"), 2)
				require.Len(t, log.Errors(), 2)
				require.Empty(t, allLetters(t, client, topic))
			})
		})
	}
}
