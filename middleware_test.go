package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/sony/gobreaker"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// keyRepository is a Deduplicator's memory. (Watermill's own leaves a goroutine.)
type keyRepository struct {
	mu   sync.Mutex
	keys map[string]bool
}

func (r *keyRepository) IsDuplicate(_ context.Context, key string) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen := r.keys[key]
	r.keys[key] = true
	return seen, nil
}

func deduplicator(key func(*message.Message) string) message.HandlerMiddleware {
	d := middleware.Deduplicator{
		KeyFactory: func(msg *message.Message) (string, error) { return key(msg), nil },
		Repository: &keyRepository{keys: make(map[string]bool)},
		Timeout:    time.Minute,
	}
	return d.Middleware
}

// Every middleware of Watermill, around and inside Retry{MaxRetries: 2} and
// DeadLetter, in either order of these two. The subscription's own limit is 5
// retries: it applies where a middleware keeps messages from ours.
func TestWatermillsMiddlewares(t *testing.T) {
	t.Parallel()
	const (
		acked    = "acked"
		dead     = "dead"     // in the dead-letter stream
		poisoned = "poisoned" // acked, and where the PoisonQueue puts it
		poison   = ".poison"
	)
	type result struct {
		calls      int    // of the handler
		end        string // the message's outcome
		deliveries int64  // by Redis's count
		reason     string // of its death, as far as it is known in advance; empty: the handler's error
	}
	// Results without another middleware.
	var (
		exhausted = result{3, dead, 3, ""}
		second    = result{2, acked, 2, ""}
		permanent = result{1, dead, 1, ""}
	)
	type handler struct {
		name string
		f    func(msg *message.Message, call int) error
	}
	var (
		always = handler{"Always", func(*message.Message, int) error { return errFails }}
		once   = handler{"Once", func(_ *message.Message, call int) error {
			if call == 1 {
				return errFails
			}
			return nil
		}}
		final   = handler{"Permanent", func(*message.Message, int) error { return goxstreams.Permanent(errFails) }}
		expires = handler{"Expires", func(msg *message.Message, _ int) error {
			<-msg.Context().Done()
			return msg.Context().Err()
		}}
		panics_ = handler{"Panics", func(*message.Message, int) error { panic("help") }}
	)
	type want struct {
		handler
		outside, inside result
	}
	const (
		subscriptions = "goxstreams: dead message: retries exhausted" // the subscription's limit, without a known error
		panicked      = "goxstreams: the handler panicked"
	)
	poisonQueue := func(filter func(error) bool) func(*testing.T, redis.UniversalClient, string) message.HandlerMiddleware {
		return func(t *testing.T, client redis.UniversalClient, topic string) message.HandlerMiddleware {
			mw, err := middleware.PoisonQueueWithFilter(newPublisher(t, client), topic+poison, filter)
			require.NoError(t, err)
			return mw
		}
	}
	plain := func(mw func() message.HandlerMiddleware) func(*testing.T, redis.UniversalClient, string) message.HandlerMiddleware {
		return func(*testing.T, redis.UniversalClient, string) message.HandlerMiddleware { return mw() }
	}
	asWithout := []want{{always, exhausted, exhausted}, {once, second, second}, {final, permanent, permanent}}

	for _, tt := range []struct {
		name string
		mw   func(t *testing.T, client redis.UniversalClient, topic string) message.HandlerMiddleware
		want []want
	}{
		{"None", plain(func() message.HandlerMiddleware {
			return func(h message.HandlerFunc) message.HandlerFunc { return h }
		}), append(asWithout, want{panics_, result{3, dead, 3, panicked}, result{3, dead, 3, panicked}})},

		// Its attempts are within one delivery. Outside, it stops at a dead
		// message.
		{"Retry", plain(func() message.HandlerMiddleware {
			return middleware.Retry{MaxRetries: 1, InitialInterval: time.Millisecond}.Middleware
		}), []want{
			{always, result{2 + 2 + 1, dead, 3, ""}, result{6, dead, 3, ""}},
			{once, result{2, acked, 1, ""}, result{2, acked, 1, ""}},
			{final, permanent, permanent},
		}},

		// Without a filter it takes every error, and nothing is retried.
		{"PoisonQueue", func(t *testing.T, client redis.UniversalClient, topic string) message.HandlerMiddleware {
			mw, err := middleware.PoisonQueue(newPublisher(t, client), topic+poison)
			require.NoError(t, err)
			return mw
		}, []want{
			{always, result{1, poisoned, 1, ""}, result{1, poisoned, 1, ""}},
			{once, result{1, poisoned, 1, ""}, result{1, poisoned, 1, ""}},
			{final, result{1, poisoned, 1, ""}, result{1, poisoned, 1, ""}},
		}},
		// Outside, it receives the dead letters; inside, it does not see exhausted
		// retries.
		{"PoisonQueueWithFilter", poisonQueue(goxstreams.IsDead), []want{
			{always, result{3, poisoned, 3, ""}, exhausted},
			{once, second, second},
			{final, result{1, poisoned, 1, ""}, result{1, poisoned, 1, ""}},
		}},

		{"Timeout", plain(func() message.HandlerMiddleware { return middleware.Timeout(time.Minute) }), asWithout},
		{"TimeoutExpired", plain(func() message.HandlerMiddleware { return middleware.Timeout(time.Millisecond) }), []want{
			{expires, result{3, dead, 3, "context deadline exceeded"}, result{3, dead, 3, "context deadline exceeded"}},
			{always, exhausted, exhausted},
			{final, permanent, permanent},
		}},

		{"Recoverer", plain(func() message.HandlerMiddleware { return middleware.Recoverer }),
			append(asWithout, want{panics_, result{3, dead, 3, panicked}, result{3, dead, 3, `panic occurred: "help", stacktrace:`}})},

		// It opens at the first failure. Outside, it then keeps the messages from
		// Retry, so the subscription's policy applies.
		{"CircuitBreaker", plain(func() message.HandlerMiddleware {
			return middleware.NewCircuitBreaker(gobreaker.Settings{
				Timeout: time.Hour, ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures > 0 },
			}).Middleware
		}), []want{
			{always, result{1, dead, 6, subscriptions}, result{1, dead, 3, gobreaker.ErrOpenState.Error()}},
			{once, result{1, dead, 6, subscriptions}, result{1, dead, 3, gobreaker.ErrOpenState.Error()}},
			{final, permanent, permanent},
		}},
		{"CircuitBreakerClosed", plain(func() message.HandlerMiddleware {
			return middleware.NewCircuitBreaker(gobreaker.Settings{ReadyToTrip: func(gobreaker.Counts) bool { return false }}).Middleware
		}), append(asWithout, want{panics_, result{3, dead, 3, panicked}, result{3, dead, 3, panicked}})},

		{"Throttle", plain(func() message.HandlerMiddleware { return middleware.NewThrottle(1000, time.Second).Middleware }), asWithout},

		{"Deduplicator", plain(func() message.HandlerMiddleware {
			return deduplicator(func(msg *message.Message) string {
				d, _ := goxstreams.DeliveryFromContext(msg.Context())
				return fmt.Sprint(msg.UUID, d.Count)
			})
		}), asWithout},
		// By the UUID alone a retry is a duplicate: the message is lost.
		{"DeduplicatorByUUID", plain(func() message.HandlerMiddleware {
			return deduplicator(func(msg *message.Message) string { return msg.UUID })
		}), []want{
			{always, result{1, acked, 2, ""}, result{1, acked, 2, ""}},
			{once, result{1, acked, 2, ""}, result{1, acked, 2, ""}},
			{final, permanent, permanent},
		}},

		// The metadata that it writes is lost with the delivery.
		{"DelayOnError", plain(func() message.HandlerMiddleware {
			return (&middleware.DelayOnError{InitialInterval: time.Hour, MaxInterval: time.Hour, Multiplier: 2}).Middleware
		}), asWithout},

		// Acked is final.
		{"InstantAck", plain(func() message.HandlerMiddleware { return middleware.InstantAck }), []want{
			{always, result{1, acked, 1, ""}, result{1, acked, 1, ""}},
			{once, result{1, acked, 1, ""}, result{1, acked, 1, ""}},
			{final, result{1, acked, 1, ""}, result{1, acked, 1, ""}},
		}},

		{"Duplicator", plain(func() message.HandlerMiddleware { return middleware.Duplicator }), []want{
			{always, exhausted, exhausted},
			{once, result{1 + 2, acked, 2, ""}, result{1 + 2, acked, 2, ""}},
			{final, permanent, permanent},
		}},

		{"IgnoreErrors", plain(func() message.HandlerMiddleware {
			return middleware.NewIgnoreErrors([]error{errors.New("another")}).Middleware
		}), asWithout},
		{"IgnoreErrorsThis", plain(func() message.HandlerMiddleware {
			return middleware.NewIgnoreErrors([]error{errFails}).Middleware
		}), []want{
			{always, result{1, acked, 1, ""}, result{1, acked, 1, ""}},
			{final, result{1, acked, 1, ""}, result{1, acked, 1, ""}},
		}},

		{"CorrelationID", plain(func() message.HandlerMiddleware { return middleware.CorrelationID }), asWithout},

		// With certainty.
		{"RandomFail", plain(func() message.HandlerMiddleware { return middleware.RandomFail(1) }), []want{
			{once, result{0, dead, 6, subscriptions}, result{0, dead, 3, "random fail occurred"}},
		}},
		{"RandomPanic", plain(func() message.HandlerMiddleware { return middleware.RandomPanic(1) }), []want{
			{once, result{0, dead, 6, subscriptions}, result{0, dead, 3, panicked}},
		}},
	} {
		for _, w := range tt.want {
			for place, want := range map[string]result{"Outside": w.outside, "Inside": w.inside} {
				for _, order := range []string{"RetryDeadLetter", "DeadLetterRetry"} {
					t.Run(tt.name+"/"+w.name+"/"+place+"/"+order, func(t *testing.T) {
						t.Parallel()
						client, topic := newClient(t), topic(t)
						published := message.Metadata{"key": "value", middleware.CorrelationIDMetadataKey: "correlation"}
						msg := message.NewMessage(watermill.NewUUID(), []byte("payload"))
						maps.Copy(msg.Metadata, published)
						require.NoError(t, newPublisher(t, client).Publish(topic, msg))

						limit := quick(5)
						config := grouped(client)
						config.Retry = &limit
						sub := newSubscriber(t, config)
						ours := []message.HandlerMiddleware{quick(2).Middleware, goxstreams.DeadLetter{}.Middleware}
						if order == "DeadLetterRetry" {
							slices.Reverse(ours)
						}
						theirs := tt.mw(t, client, topic)
						router := plainRouter(t)
						if place == "Outside" {
							router.AddMiddleware(theirs)
						}
						router.AddMiddleware(ours...)
						if place == "Inside" {
							router.AddMiddleware(theirs)
						}
						var seen attempts
						router.AddHandler("handler", topic, sub, topic+".out", newPublisher(t, client), func(msg *message.Message) ([]*message.Message, error) {
							msg.Metadata.Set("scratch", "the handler's")
							if err := w.f(msg, seen.add(msg)); err != nil {
								return nil, err
							}
							return []*message.Message{message.NewMessage("produced", nil)}, nil
						})
						stop := goRouter(t, router)
						eventually(t, func() bool { return stats(t, sub).Acked+stats(t, sub).Dead > 0 })
						eventuallySettled(t, client, topic, testGroup)
						eventually(t, func() bool { return seen.len() >= want.calls }) // InstantAck
						after := stats(t, sub)
						stop()

						require.Equal(t, want.calls, seen.len(), "calls of the handler")
						require.Equal(t, want.deliveries, after.Delivered)
						out, err := client.XLen(context.Background(), topic+".out").Result()
						require.NoError(t, err)
						if want.end == acked && tt.name != "InstantAck" && w.name == once.name && seen.len() > 1 {
							require.EqualValues(t, map[bool]int{false: 1, true: 2}[tt.name == "Duplicator"], out, "produced messages")
						} else {
							require.Zero(t, out, "produced messages")
						}

						reason := want.reason
						if reason == "" {
							reason = errFails.Error()
						}
						poisonKeys := message.Metadata{
							middleware.ReasonForPoisonedKey:  reason,
							middleware.PoisonedTopicKey:      topic,
							middleware.PoisonedHandlerKey:    "handler",
							middleware.PoisonedSubscriberKey: "goxstreams.Subscriber",
						}
						letters := allLetters(t, client, topic)
						elsewhere, err := client.XRange(context.Background(), topic+poison, "-", "+").Result()
						require.NoError(t, err)
						if want.end != dead {
							require.Empty(t, letters)
						}
						if want.end != poisoned {
							require.Empty(t, elsewhere)
						}
						switch want.end {
						case acked:
							require.Zero(t, after.Dead)
							require.EqualValues(t, 1, after.Acked)
						case poisoned:
							require.Len(t, elsewhere, 1)
							require.EqualValues(t, 1, after.Acked)
							got, err := goxstreams.DefaultMarshaler{}.Unmarshal(elsewhere[0].Values)
							require.NoError(t, err)
							require.Equal(t, msg.UUID, got.UUID)
							require.Equal(t, msg.Payload, got.Payload)
							// The message as the handler left it, as the
							// PoisonQueue stores it.
							poisonKeys["scratch"] = "the handler's"
							maps.Copy(poisonKeys, published)
							require.Equal(t, poisonKeys, got.Metadata)
						case dead:
							require.Len(t, letters, 1)
							letter := letters[0]
							require.Equal(t, want.deliveries, letter.Deliveries)
							require.Contains(t, letter.Reason, reason)
							require.Equal(t, msg.UUID, letter.Message.UUID)
							require.Equal(t, msg.Payload, letter.Message.Payload)
							require.Equal(t, published, letter.Message.Metadata, "the message's metadata as it was published")
							kind := goxstreams.Exhausted
							if w.name == final.name {
								kind = goxstreams.PermanentFailure
							}
							require.Equal(t, kind, letter.Kind)
							// To Watermill, that and what is known of the death.
							raw := deadLetters(t, client, topic)[0]
							poisonKeys[middleware.ReasonForPoisonedKey] = letter.Reason
							for k, v := range raw.Metadata {
								if slices.Contains([]string{
									goxstreams.DeadEntryIDKey, goxstreams.DeadGroupKey, goxstreams.DeadConsumerKey,
									goxstreams.DeadKindKey, goxstreams.DeadDeliveriesKey, goxstreams.DeadDiedAtKey,
								}, k) {
									poisonKeys[k] = v
								}
							}
							maps.Copy(poisonKeys, published)
							require.Equal(t, poisonKeys, raw.Metadata)
						}
					})
				}
			}
		}
	}
}

// CorrelationID gives a handler's produced messages the same ID after a redelivery.
func TestWatermillsCorrelationID(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	msg := message.NewMessage("1", nil)
	middleware.SetCorrelationID("correlation", msg)
	require.NoError(t, newPublisher(t, client).Publish(topic, msg))
	router := plainRouter(t)
	router.AddMiddleware(middleware.CorrelationID, quick(2).Middleware)
	var seen attempts
	router.AddHandler("handler", topic, newSubscriber(t, grouped(client)), topic+".out", newPublisher(t, client), func(msg *message.Message) ([]*message.Message, error) {
		if seen.add(msg) == 1 {
			return nil, errFails
		}
		return []*message.Message{message.NewMessage("2", nil)}, nil
	})
	goRouter(t, router)
	out := next(t, subscribe(t, newSubscriber(t, grouped(client)), topic+".out"))
	require.Equal(t, "correlation", middleware.MessageCorrelationID(out))
	require.Equal(t, []int64{1, 2}, seen.seen())
	out.Ack()
}

// The worker looked up the delivery of a message that a middleware had copied, and
// saw a RetryCount of -1.
//
// Not parallel: the error about copies is written to the log of the newest
// subscription, which may be another test's that requires an empty log.
func TestRetryCountOfACopy(t *testing.T) {
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{}
	router := newRouter(t)
	consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic}, nil)
	consumer.AddTo(router).AddMiddleware(func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) { return h(msg.Copy()) }
	})
	produce(t, client, topic, order{"cup", 1})
	startRouter(t, router)
	eventuallyDone(t, client, topic)
	processed, _, _ := worker.calls()
	require.Len(t, processed, 1)
	require.Equal(t, order{"cup", 1}, processed[0].Body)
	require.Zero(t, processed[0].RetryCount)
}
