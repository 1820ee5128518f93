package goxstreams_test

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Guarantee 9: the library is a guest: it does not close or change what belongs to
// the caller, and does not print.

// watermill-redisstream's constructor changes the MaxLens map of the config: the
// caller's own, which publishers may share, so this is also a race. Here the map is
// copied.
func TestFault19_CallersMaxLensChanged(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	capped, other := topic(t), topic(t)
	lens := map[string]int64{capped: 200, "unused": 0}
	before := maps.Clone(lens)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, DefaultMaxLen: 1000, MaxLens: lens}, nil)
	require.NoError(t, err)
	for _, topic := range []string{capped, other} {
		require.NoError(t, pub.Publish(topic, numbered(500)...))
	}
	require.Equal(t, before, lens)

	// Later changes of the map by the caller do not affect the Publisher.
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 100 {
			lens[fmt.Sprint(i)] = 1
			lens[other] = 1
		}
	})
	require.NoError(t, pub.Publish(other, numbered(100)...))
	wg.Wait()
	require.NoError(t, pub.Publish(other, numbered(100)...))
	require.Len(t, stored(t, client, other), 700)
}

// In goxstreams a panic in a user's function ends the process, with the work of all
// others in it. Here it costs the current message at most a retry.
func TestFault22_PanicInCallback(t *testing.T) {
	t.Parallel()
	type config = goxstreams.SubscriberConfig
	nackAll := func(msg *message.Message) { msg.Nack() }
	ack := func(msg *message.Message) { msg.Ack() }
	secondTime := func(msg *message.Message) {
		if d, _ := goxstreams.DeliveryFromContext(msg.Context()); d.Count > 1 {
			msg.Ack()
		} else {
			msg.Nack()
		}
	}
	retry := func(change func(*goxstreams.Retry)) *goxstreams.Retry {
		r := quickRetry()
		change(r)
		return r
	}
	for _, tt := range []struct {
		name    string
		payload string
		config  config
		handler func(*message.Message)
		logged  string
		dead    int64 // how many of the two move to the dead-letter stream
	}{
		{"Unmarshaler", "broken", config{Unmarshaler: panicking{}}, ack, "panicking panicked: Unmarshal", 1},
		{"Unmarshaler, within a limit", "broken", config{Unmarshaler: panicking{}, Retry: retry(func(r *goxstreams.Retry) { r.MaxRetries = 3 })}, ack, "panicked: Unmarshal", 1},
		{"OnDead", "good", config{
			Retry:  retry(func(r *goxstreams.Retry) { r.MaxRetries = 1 }),
			OnDead: func(context.Context, goxstreams.DeadMessage) { panic("OnDead") },
		}, nackAll, "panic: OnDead", 2},
		{"OnOutcome", "good", config{
			Retry:     quickRetry(),
			OnOutcome: func(goxstreams.Outcome) { panic("OnOutcome") },
		}, secondTime, "panic: OnOutcome", 0},
		{"ShouldRetry", "good", config{
			Retry: retry(func(r *goxstreams.Retry) { r.ShouldRetry = func(middleware.RetryParams) bool { panic("ShouldRetry") } }),
		}, secondTime, "panic: ShouldRetry", 0},
		{"OnRetryHook", "good", config{
			Retry: retry(func(r *goxstreams.Retry) { r.OnRetryHook = func(int, time.Duration) { panic("OnRetryHook") } }),
		}, secondTime, "panic: OnRetryHook", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := newClient(t)
			topic := topic(t)
			tt.config.Client, tt.config.ConsumerGroup = client, testGroup
			log := newLogRecorder()
			sub := newSubscriberLog(t, tt.config, log)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, tt.payload, "good")
			go func() {
				for msg := range messages {
					tt.handler(msg)
				}
			}()
			eventually(t, func() bool {
				s := stats(t, sub)
				return s.Acked+s.Dead == 2
			}, "the subscription did not go on")
			require.Equal(t, tt.dead, stats(t, sub).Dead)
			eventuallySettled(t, client, topic, testGroup)
			require.NoError(t, sub.Close()) // waits for OnDead
			require.Contains(t, strings.Join(log.Errors(), "\n"), tt.logged)
		})
	}
}

// watermill-redisstream: closing a Subscriber or a Publisher closes the client that
// it was given. Other users of it get "redis: client is closed".
func TestFault03_CloseLeavesTheClientOpen(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	one, other := newSubscriber(t, grouped(client)), newSubscriber(t, goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "other"})
	pub := newPublisher(t, client)
	messages, others := subscribe(t, one, topic), subscribe(t, other, topic)
	require.NoError(t, pub.Publish(topic, message.NewMessage("1", nil)))
	require.Len(t, collect(messages, 1, patience), 1)
	require.Len(t, collect(others, 1, patience), 1)

	require.NoError(t, one.Close())
	require.True(t, closed(messages, patience))
	require.NoError(t, pub.Close())

	require.NoError(t, client.Ping(t.Context()).Err())
	require.NoError(t, newPublisher(t, client).Publish(topic, message.NewMessage("2", nil)))
	require.Equal(t, []string{"2"}, uuids(collect(others, 1, patience)))
}

// errText and errUnwrap are errors whose methods panic if their pointers are nil.
// `var err *errText; return err` returns such a nil pointer.
type errText struct{ text string }

func (e *errText) Error() string { return e.text }

type errUnwrap struct{ err error }

func (*errUnwrap) Error() string { return "text" }

func (e *errUnwrap) Unwrap() error { return e.err }

// A handler that returned a nil pointer as its error ended the process: the methods
// of the error panicked in the library's own goroutines.
func TestTypedNilErrors(t *testing.T) {
	t.Parallel()
	for _, failure := range []error{(*errText)(nil), (*errUnwrap)(nil)} {
		name := fmt.Sprintf("%T", failure)
		t.Run("handler/"+name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := limited(client, 1)
			handler, calls := failing(always(failure)...)
			messages := subscribe(t, newSubscriber(t, config), topic)
			go settling(messages, config.Retry.Middleware(goxstreams.DeadLetter{}.Middleware(handler)))
			publish(t, client, topic, "x")
			letter := eventuallyDies(t, client, topic)
			require.EqualValues(t, 2, calls.Load())
			require.Equal(t, goxstreams.Exhausted, letter.Kind)
			require.Contains(t, letter.Reason, name)
		})
		t.Run("OnBroken/"+name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			var retryCounts []int64
			config := limited(client, 3)
			config.OnBroken = func(_ context.Context, b goxstreams.BrokenMessage) error {
				if retryCounts = append(retryCounts, b.RetryCount); len(retryCounts) == 1 {
					return failure
				}
				return nil
			}
			sub := newSubscriber(t, config)
			subscribe(t, sub, topic)
			require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"no", "message"}}).Err())
			eventuallyDone(t, client, topic)
			require.NoError(t, sub.Close())
			require.Equal(t, []int64{0, 1}, retryCounts)
		})
		t.Run("worker/"+name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			worker := &testWorker[order]{
				onProcess: fails[goxstreams.Message[order]](always(failure)...),
				onDead:    fails[goxstreams.Message[order]](failure, nil),
			}
			produce(t, client, topic, order{"cup", 1})
			start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic})
			eventuallyDone(t, client, topic)
			require.Equal(t, [3]int{2, 0, 2}, worker.counts())
			_, _, dead := worker.calls()
			require.ErrorIs(t, dead[0].Err, goxstreams.ErrRetriesExhausted)
		})
	}
}
