package goxstreams_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Guarantee 8: a shutdown is not a failure.

// Watermill's PoisonQueue inside its Retry takes every error before Retry sees it:
// nothing is retried. Outside of it, or with any Retry, it also takes messages
// whose handlers failed because of a shutdown: healthy messages end up acked in the
// poison queue. Here both depends on a verdict: whatever the order of the
// middlewares, a message is dead when it is out of retries, and a shutdown is not a
// failure.
func TestFault25_PoisonQueueInsideRetry(t *testing.T) {
	t.Parallel()
	const maxRetries = 2
	ours := quick(maxRetries).Middleware
	theirs := middleware.Retry{MaxRetries: maxRetries, InitialInterval: time.Millisecond}.Middleware
	elsewhere := goxstreams.DeadLetter{Topic: poisonOf}.Middleware
	queue := func(filter func(error) bool) func(testing.TB, redis.UniversalClient, string) message.HandlerMiddleware {
		return func(t testing.TB, client redis.UniversalClient, topic string) message.HandlerMiddleware {
			mw, err := middleware.PoisonQueueWithFilter(newPublisher(t, client), poisonOf(topic), filter)
			require.NoError(t, err)
			return mw
		}
	}
	type middlewares func(testing.TB, redis.UniversalClient, string) []message.HandlerMiddleware
	fixed := func(mws ...message.HandlerMiddleware) middlewares {
		return func(testing.TB, redis.UniversalClient, string) []message.HandlerMiddleware { return mws }
	}
	for _, tt := range []struct {
		name string
		mws  middlewares
		want fault25
	}{
		{"DeadLetterInside", fixed(ours, elsewhere), fault25{flaky: 2, hopeless: 3, poisoned: []string{"hopeless"}}},
		{"DeadLetterOutside", fixed(elsewhere, ours), fault25{flaky: 2, hopeless: 3, poisoned: []string{"hopeless"}}},
		{"PoisonQueueOfTheDeadOutside", func(t testing.TB, client redis.UniversalClient, topic string) []message.HandlerMiddleware {
			return []message.HandlerMiddleware{queue(goxstreams.IsDead)(t, client, topic), ours}
		}, fault25{flaky: 2, hopeless: 3, poisoned: []string{"hopeless"}}},

		// The faulty ways, on the same Subscriber, to show that the test would
		// notice.
		{"Faulty/PoisonQueueInside", func(t testing.TB, client redis.UniversalClient, topic string) []message.HandlerMiddleware {
			return []message.HandlerMiddleware{theirs, queue(isAny)(t, client, topic)}
		}, fault25{flaky: 1, hopeless: 1, poisoned: []string{"flaky", "healthy0", "healthy1", "healthy2", "hopeless"}}},
		{"Faulty/PoisonQueueOutside", func(t testing.TB, client redis.UniversalClient, topic string) []message.HandlerMiddleware {
			return []message.HandlerMiddleware{queue(isAny)(t, client, topic), theirs}
		}, fault25{flaky: 2, hopeless: 3, poisoned: []string{"healthy0", "healthy1", "healthy2", "hopeless"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			require.Equal(t, tt.want, runFault25(t, client, topic, maxRetries, tt.mws(t, client, topic)))
		})
	}
}

type fault25 struct {
	flaky, hopeless int      // calls of the handler
	poisoned        []string // payloads
}

// runFault25 handles a message that fails once and one that always fails, and is
// shut down while three messages are in their handlers for the last time: these
// fail with the signal's context. A second process then handles the rest.
func runFault25(t *testing.T, client *redis.Client, topic string, maxRetries int64, mws []message.HandlerMiddleware) fault25 {
	const healthy = 3
	var result fault25
	var flaky, hopeless, working, healthily atomic.Int64
	var tries sync.Map // for the healthy ones, by payload
	signal, terminate := context.WithCancel(context.Background())
	defer terminate()
	config := grouped(client)
	config.MaxConcurrency = healthy
	sub := newSubscriber(t, config)
	stop := routed(t, sub, topic, func(msg *message.Message) error {
		switch string(msg.Payload) {
		case "flaky":
			if flaky.Add(1) == 1 {
				return errFails
			}
			return nil
		case "hopeless":
			hopeless.Add(1)
			return errFails
		}
		n, _ := tries.LoadOrStore(string(msg.Payload), new(atomic.Int64))
		if n.(*atomic.Int64).Add(1) <= maxRetries {
			return errFails
		}
		working.Add(1)
		<-signal.Done()
		return fmt.Errorf("handling: %w", signal.Err())
	}, mws...)
	publish(t, client, topic, "flaky", "hopeless")
	eventually(t, func() bool { s := stats(t, sub); return s.Acked+s.Dead == 2 })
	for i := range healthy {
		publish(t, client, topic, fmt.Sprint("healthy", i))
	}
	eventually(t, func() bool { s := stats(t, sub); return working.Load()+s.Acked+s.Dead == 2+healthy })
	terminate()
	stop()

	second := routed(t, newSubscriber(t, grouped(client)), topic, func(*message.Message) error {
		healthily.Add(1)
		return nil
	}, mws...)
	eventuallySettled(t, client, topic, testGroup)
	second()

	result.flaky, result.hopeless = int(flaky.Load()), int(hopeless.Load())
	entries, err := client.XRange(context.Background(), poisonOf(topic), "-", "+").Result()
	require.NoError(t, err)
	for _, e := range entries {
		result.poisoned = append(result.poisoned, fmt.Sprint(e.Values["payload"]))
	}
	slices.Sort(result.poisoned)
	require.Empty(t, allLetters(t, client, topic), "in the default stream")
	lost := healthy - int(healthily.Load())
	for _, p := range result.poisoned {
		if p != "flaky" && p != "hopeless" {
			lost--
		}
	}
	require.Zero(t, lost, "messages that are nowhere")
	return result
}

// A worker whose ProcessDead stopped because its context ended at a shutdown was
// logged at Error, as if it had failed.
func TestShutdownInProcessDead(t *testing.T) {
	t.Parallel()
	client, topic, log := newClient(t), topic(t), newLogRecorder()
	entered := make(chan struct{})
	worker := &testWorker[order]{
		onProcess: fails[goxstreams.Message[order]](goxstreams.Permanent(errBad)),
		onDead: func(ctx context.Context, _ goxstreams.Message[order]) error {
			close(entered)
			<-ctx.Done()
			return ctx.Err()
		},
	}
	produce(t, client, topic, order{"cup", 1})
	config := limited(client, 5)
	config.CloseTimeout = 500 * time.Millisecond
	r := run(t, newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic}, log))
	<-entered
	// Another test's middleware messages may arrive here too: they are written to
	// the log of the newest subscription.
	ours := func() []string {
		return slices.DeleteFunc(log.Errors(), func(line string) bool { return !strings.Contains(line, topic) })
	}
	before := ours()
	require.Len(t, before, 1, "that of Process")
	r.stop(t)
	require.Equal(t, before, ours())

	successor := &testWorker[order]{}
	start(t, successor, goxstreams.ConsumerConfig{Subscriber: limited(client, 5), Topic: topic})
	eventuallyDone(t, client, topic)
	require.Equal(t, [3]int{0, 0, 1}, successor.counts())
}

// A canceled context of a worker's own call looked like a shutdown: the failure was
// never logged.
func TestCanceledIsSaid(t *testing.T) {
	t.Parallel()
	client, topic, log := newClient(t), topic(t), newLogRecorder()
	worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](fmt.Errorf("rpc: %w", context.Canceled))}
	produce(t, client, topic, order{"cup", 1})
	run(t, newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, -1), Topic: topic}, log))
	eventually(t, func() bool { return worker.counts() == [3]int{1, 0, 1} })
	lines := logLinesWith(log.Errors(), "Process failed")
	require.Len(t, lines, 1)
	require.Contains(t, lines[0], "rpc: context canceled")
}
