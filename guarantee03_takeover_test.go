package goxstreams_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 3: nobody takes what a living process holds, and what a dead one held is
// taken over soon, whatever the load.

// steadily publishes n messages a second until the test is over or stop is called.
func steadily(t *testing.T, client *redis.Client, topic string, n int) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		pub := newPublisher(t, client)
		tick := time.NewTicker(time.Second / time.Duration(n))
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-tick.C:
				assert.NoError(t, pub.Publish(topic, message.NewMessage(fmt.Sprint("fresh", i), nil)))
			case <-ctx.Done():
				return
			}
		}
	})
	stop = sync.OnceFunc(func() { cancel(); done.Wait() })
	t.Cleanup(stop)
	return stop
}

// abandoned leaves n entries in a dead consumer's name, with that count, and that idle.
func abandoned(t *testing.T, client *redis.Client, topic string, n int, count int64) []string {
	t.Helper()
	createGroup(t, client, topic, testGroup)
	publishN(t, client, topic, n)
	ids := readAs(t, client, topic, testGroup, "dead", n)
	args := []any{"xclaim", topic, testGroup, "dead", 0}
	for _, id := range ids {
		args = append(args, id)
	}
	require.NoError(t, client.Do(t.Context(), append(args, "retrycount", count, "justid")...).Err())
	return ids
}

// Entries that a crash had left, each with one delivery to go, had to wait until nothing
// else was in flight, which steady load never gives.
func TestFault27_SuspectsUnderSteadyLoad(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const work = 300 * time.Millisecond
	client, topic := newClient(t), topic(t)
	ids := abandoned(t, client, topic, 5, 1)
	config := claiming(client)
	config.MaxConcurrency = 20
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	steadily(t, client, topic, 10)
	var mu sync.Mutex
	running, together := 0, 0
	seen, fresh := make(map[string]int64), 0
	go func() {
		for msg := range messages {
			go func() {
				d, _ := goxstreams.DeliveryFromContext(msg.Context())
				mu.Lock()
				running++
				if d.Count > 1 {
					seen[d.ID] = d.Count
					together = max(together, running)
				} else {
					fresh++
				}
				mu.Unlock()
				time.Sleep(work)
				mu.Lock()
				running--
				mu.Unlock()
				msg.Ack()
			}()
		}
	}()
	eventually(t, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(seen) == len(ids)
	}, "suspects starve")
	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, 1, together, "what runs beside a message that must not die of others")
	require.Greater(t, fresh, 10, "ordinary work starves")
}

// The hundred entries that a crash had left stood in the way of all that was new, though
// none of them was near its limit.
func TestFault28_SuspectsLeaveRoom(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n, work = 30, 100 * time.Millisecond
	client, topic := newClient(t), topic(t)
	abandoned(t, client, topic, n, 4)
	config := claiming(client)
	config.MaxConcurrency = 50
	config.Retry = &goxstreams.Retry{MaxRetries: 10}
	messages := subscribe(t, newSubscriber(t, config), topic)
	steadily(t, client, topic, 50)
	var old, fresh, oldRunning, oldTogether atomic.Int64
	var first atomic.Pointer[time.Time]
	var freshMeanwhile atomic.Int64
	go func() {
		for msg := range messages {
			go func() {
				d, _ := goxstreams.DeliveryFromContext(msg.Context())
				if d.Count > 1 {
					now := time.Now()
					first.CompareAndSwap(nil, &now)
					if together := oldRunning.Add(1); together > oldTogether.Load() {
						oldTogether.Store(together)
					}
				} else {
					fresh.Add(1)
					if first.Load() != nil && old.Load() < n {
						freshMeanwhile.Add(1)
					}
				}
				time.Sleep(work)
				msg.Ack()
				if d.Count > 1 {
					oldRunning.Add(-1)
					old.Add(1)
				}
			}()
		}
	}()
	eventuallyAll(t, func() int { return int(old.Load()) }, n)
	took := time.Since(*first.Load())
	require.LessOrEqual(t, oldTogether.Load(), int64(2), "suspects at once (the ack of one is counted late here)")
	require.Greater(t, float64(freshMeanwhile.Load()), took.Seconds()*50/4, "fresh messages in %s", took)
}

// Writes were refused for a while, and reads were not: no holder could renew its leases,
// and whoever looked saw them run out. When writes were taken again, others were faster
// than the holders.
func TestFault30_WritesAreRefused(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const subscribers, messages, rounds = 4, 40, 3
	const minIdle = 900 * time.Millisecond
	set := func(name, value string) func(context.Context, *redis.Client) error {
		return func(ctx context.Context, admin *redis.Client) error { return admin.ConfigSet(ctx, name, value).Err() }
	}
	for _, tt := range []struct {
		name          string
		refuse, allow func(context.Context, *redis.Client) error
	}{
		{"NOREPLICAS", set("min-replicas-to-write", "1"), set("min-replicas-to-write", "0")},
		{"READONLY",
			func(ctx context.Context, admin *redis.Client) error {
				if err := admin.ConfigSet(ctx, "replica-serve-stale-data", "yes").Err(); err != nil {
					return err
				}
				return admin.Do(ctx, "replicaof", "127.0.0.1", "1").Err()
			},
			func(ctx context.Context, admin *redis.Client) error {
				return admin.Do(ctx, "replicaof", "no", "one").Err()
			}},
		{"NOPERM",
			func(ctx context.Context, admin *redis.Client) error {
				return admin.Do(ctx, "acl", "setuser", "default", "-xclaim").Err()
			},
			func(ctx context.Context, admin *redis.Client) error {
				return admin.Do(ctx, "acl", "setuser", "default", "+xclaim").Err()
			}},
		{"PauseOfWrites",
			func(ctx context.Context, admin *redis.Client) error {
				return admin.Do(ctx, "client", "pause", 60_000, "write").Err()
			},
			func(ctx context.Context, admin *redis.Client) error { return admin.Do(ctx, "client", "unpause").Err() }},
		{"PauseOfAll",
			func(ctx context.Context, admin *redis.Client) error {
				return admin.Do(ctx, "client", "pause", 2*minIdle.Milliseconds(), "all").Err()
			},
			func(ctx context.Context, admin *redis.Client) error { return admin.Do(ctx, "client", "unpause").Err() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := testserver.Private(t)
			admin, topic := server.Client(), topic(t)
			var held []*message.Message
			var subs []*goxstreams.Subscriber
			var mu sync.Mutex
			publishN(t, admin, topic, messages)
			for range subscribers {
				config := grouped(server.Client())
				config.ClaimMinIdle, config.MaxConcurrency, config.BatchSize = minIdle, messages, 1
				sub := newSubscriber(t, config)
				in := subscribe(t, sub, topic)
				subs = append(subs, sub)
				go func() {
					for msg := range in { // and never settles them
						mu.Lock()
						held = append(held, msg)
						mu.Unlock()
					}
				}()
			}
			count := func() int {
				mu.Lock()
				defer mu.Unlock()
				return len(held)
			}
			eventuallyAll(t, count, messages)
			for round := range rounds {
				for _, length := range []float64{0.5, 1, 3} {
					require.NoError(t, tt.refuse(t.Context(), admin))
					time.Sleep(time.Duration(length * float64(minIdle)))
					require.NoError(t, tt.allow(t.Context(), admin))
					time.Sleep(2 * minIdle) // for whoever is quick
					require.Equal(t, messages, count(), "messages handled twice at once, round %d", round)
				}
			}
			for i, msg := range held {
				require.NoError(t, msg.Context().Err(), "message %d", i)
				require.EqualValues(t, 1, delivery(t, msg).Count)
				msg.Ack()
			}
			for _, sub := range subs {
				require.Zero(t, stats(t, sub).Claimed)
			}
			eventuallySettled(t, admin, topic, testGroup)
		})
	}
}

// What a consumer released when it closed was taken over one look's worth at a time: ten
// a second, however quick the handlers were.
func TestFault42_ReleasedEntries(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n = 300
	client, topic := newClient(t), topic(t)
	config := grouped(client)
	config.BatchSize, config.MaxConcurrency = 1000, 1000
	first := newSubscriber(t, config)
	messages := subscribe(t, first, topic)
	publishN(t, client, topic, n)
	require.Len(t, collect(messages, 1, patience), 1) // acked; the others are offered
	eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == min(n-1, 1000) })
	require.NoError(t, first.Close())
	config.BatchSize, config.MaxConcurrency = 10, 10
	second := newSubscriber(t, config)
	handled := newTally()
	began := time.Now()
	handled.handle(subscribe(t, second, topic), nil)
	eventuallyAll(t, handled.len, n-1)
	require.Less(t, time.Since(began), 5*time.Second, "looks, not handlers, set the pace")
	require.Equal(t, map[int64]int{1: n - 1}, handled.counts)
}
