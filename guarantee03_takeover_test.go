package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 3: nobody takes the messages of a living process, and those of a dead
// one are taken over soon, whatever the load.

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

// abandoned leaves n entries pending for a dead consumer, with the given count and
// idle time.
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

// Entries left by a crash, each with one delivery left, had to wait until nothing
// else was in flight, which never happens under steady load.
func TestFault27_SuspectsUnderSteadyLoad(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const work = 1500 * time.Millisecond
	client, topic := newClient(t), topic(t)
	ids := abandoned(t, client, topic, 3, 1)
	config := grouped(client)
	config.ClaimMinIdle, config.MaxConcurrency = 1500*time.Millisecond, 20
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	steadily(t, client, topic, 20) // more than is handled, so that there always is other work
	var mu sync.Mutex
	running, together := 0, 0
	seen := make(map[string]int64)
	var begun strings.Builder // in their order: s for a suspect, f for a fresh message
	go func() {
		for msg := range messages {
			go func() {
				d, _ := goxstreams.DeliveryFromContext(msg.Context())
				mu.Lock()
				running++
				if d.Count > 1 {
					seen[d.ID] = d.Count
					together = max(together, running)
					begun.WriteByte('s')
				} else {
					begun.WriteByte('f')
				}
				mu.Unlock()
				select {
				case <-time.After(work):
				case <-t.Context().Done():
				}
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
	require.NotContains(t, begun.String(), "ss", "ordinary work waits for more than one suspect")
}

// The hundred entries that a crash had left blocked all new ones, though none of
// them was near its limit.
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

// Writes were rejected for a while, and reads were not: no consumer could renew its
// leases, and all saw them expire. When writes worked again, other consumers were
// faster than the owners.
func TestFault30_WritesAreRefused(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const subscribers, messages = 4, 40
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
			for _, length := range []float64{0.5, 1, 3} {
				require.NoError(t, tt.refuse(t.Context(), admin))
				time.Sleep(time.Duration(length * float64(minIdle)))
				require.NoError(t, tt.allow(t.Context(), admin))
				time.Sleep(2 * minIdle) // time for a fast consumer
				require.Equal(t, messages, count(), "messages handled twice at once, after %v ClaimMinIdle", length)
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

// Entries that a consumer had released when it closed were taken over one page per
// look: ten a second, however fast the handlers were.
func TestFault42_ReleasedEntries(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n = 300
	client, topic := newClient(t), topic(t)
	config := grouped(client)
	config.ClaimInterval = 10 * time.Second
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
	require.Less(t, time.Since(began), n/10*config.ClaimInterval/2, "looks, not handlers, set the pace")
	require.Equal(t, map[int64]int{1: n - 1}, handled.counts)
}

// goxstreams retries only what is pending under its own consumer name. A pod's name
// changes with each start, so a crashed pod's messages are never handled again.
// Here they are claimed, whatever their consumer's name was.
func TestFault21_CrashedConsumersMessages(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	for _, tt := range []struct{ name, dead, ours string }{
		{"another name", "pod-a", "pod-b"},
		{"the same prefix", "pod-a", "pod"},
		{"generated name", "pod-a", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := newClient(t)
			topic := topic(t)
			createGroup(t, client, topic, testGroup)
			var want []string
			for i := range 3 {
				want = append(want, fmt.Sprint("precious ", i))
				addPending(t, client, topic, tt.dead, want[i])
			}
			config := grouped(client)
			config.Consumer = tt.ours
			config.ClaimMinIdle = 300 * time.Millisecond
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			var got []string
			for range want {
				msg := next(t, messages)
				require.EqualValues(t, 1, delivery(t, msg).RetryCount())
				got = append(got, string(msg.Payload))
				msg.Ack()
			}
			require.ElementsMatch(t, want, got)
			require.EqualValues(t, 3, stats(t, sub).Claimed)
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// Both earlier libraries take a message that is handled for long for an abandoned
// one. watermill-redisstream handled one three times, twice at once; goxstreams
// then declared it dead and deleted it.
//
// Here the consumer renews its lease. An entry that a dead process left pending
// after the slow handler had started is claimed, which shows that the other
// consumer would have claimed the slow message too.
func TestFault04_SlowHandlerKeepsItsMessage(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for name, consumer := range map[string]string{"GeneratedNames": "", "GivenName": "worker"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := newClient(t)
			topic := topic(t)
			config := grouped(client)
			config.Consumer = consumer
			config.ClaimMinIdle = time.Second
			config.Retry = &goxstreams.Retry{MaxRetries: 1, InitialInterval: time.Millisecond}

			holder := newSubscriber(t, config)
			held := subscribe(t, holder, topic)
			publish(t, client, topic, "slow")
			slow := next(t, held)

			addPending(t, client, topic, "died", "abandoned")

			other := newSubscriber(t, config)
			messages := subscribe(t, other, topic)
			claimed := next(t, messages)
			require.Equal(t, "abandoned", string(claimed.Payload))
			require.True(t, claimed.Ack())

			require.NoError(t, slow.Context().Err(), "the lease is lost")
			require.True(t, slow.Ack())
			eventuallySettled(t, client, topic, testGroup)
			publish(t, client, topic, "next")
			select {
			case msg := <-messages:
				require.Equal(t, "next", string(msg.Payload))
				msg.Ack()
			case msg := <-held:
				require.Equal(t, "next", string(msg.Payload))
				msg.Ack()
			case <-time.After(patience):
				require.FailNow(t, "no message came")
			}
			assert.EqualValues(t, 1, stats(t, other).Claimed)
			assert.Zero(t, stats(t, holder).Claimed)
			assert.Zero(t, client.Exists(t.Context(), goxstreams.DeadLetterTopic(topic)).Val(), "declared dead")
		})
	}
}

// watermill-redisstream looks at one page of the pending entries, from the start.
// If that is full of entries that may not be claimed yet, it never reaches a later
// page, and a subscriber that meets such a page at its start never reads new
// entries.
//
// Here more entries than a page holds are always idle long enough to be listed;
// their consumer is alive, so no claim of them succeeds.
func TestFault10_FullPageStarvesNothing(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const alive = 520 // a page is 500
	const minIdle = 6 * time.Second

	plain := newClient(t)
	topic := topic(t)
	createGroup(t, plain, topic, testGroup)
	publishN(t, plain, topic, alive)
	held := map[string]bool{}
	touch := []any{"xclaim", topic, testGroup, "alive", 0}
	for _, id := range readAs(t, plain, topic, testGroup, "alive", alive) {
		held[id] = true
		touch = append(touch, id)
	}
	touch = append(touch, "idle", minIdle.Milliseconds(), "retrycount", 1, "justid")
	publish(t, plain, topic, "abandoned")
	lost := readAs(t, plain, topic, testGroup, "died", 1)
	require.NoError(t, plain.Do(t.Context(), "xclaim", topic, testGroup, "died", 0, lost[0], "idle", time.Hour.Milliseconds(), "justid").Err())

	// The living consumer renews before each look and before each claim.
	client := newClient(t, &hook{process: func(ctx context.Context, cmd redis.Cmder, run func() error) error {
		switch args := cmd.Args(); cmd.Name() {
		case "xpending":
			if len(args) > 3 && fmt.Sprint(args[3]) == "idle" && args[len(args)-1] != "released" {
				assert.NoError(t, plain.Do(ctx, touch...).Err())
			}
		case "eval":
			if !isClaim(cmd) {
				break
			}
			if id := fmt.Sprint(args[5]); held[id] {
				assert.NoError(t, plain.Do(ctx, "xclaim", topic, testGroup, "alive", 0, id,
					"idle", minIdle.Milliseconds(), "retrycount", 1, "justid").Err())
			}
		}
		return run()
	}})
	config := grouped(client)
	config.ClaimMinIdle = minIdle
	messages := subscribe(t, newSubscriber(t, config), topic)
	publish(t, plain, topic, "new")
	got := collect(messages, 2, patience)
	require.ElementsMatch(t, []string{"new", "abandoned"}, payloads(got))
	publish(t, plain, topic, "newer")
	require.Equal(t, []string{"newer"}, payloads(collect(messages, 1, patience)))
	eventually(t, func() bool { return len(pendingOf(t, plain, topic, testGroup)) == alive }, "what was acked stays pending")
}

// TestFairness: a busy consumer does not keep messages that an idle one could
// handle. Both start when each has a message, and need the same time for each
// message: the one with the most messages determines the total time.
func TestFairness(t *testing.T) {
	t.Parallel()
	for _, waiting := range []bool{true, false} {
		t.Run(fmt.Sprintf("PublishedBefore=%t", waiting), func(t *testing.T) {
			t.Parallel()
			const n = 100
			topic, client := topic(t), newClient(t)
			if waiting {
				publishN(t, client, topic, n)
			}
			var began sync.WaitGroup
			var tallies [2]*tally
			began.Add(len(tallies))
			for i := range tallies {
				config := grouped(newClient(t))
				config.BatchSize = n
				tallies[i] = newTally()
				begins := sync.OnceFunc(began.Done)
				tallies[i].handle(subscribe(t, newSubscriber(t, config), topic), func(*message.Message) {
					begins()
					began.Wait()
					time.Sleep(50 * time.Millisecond) // the work
				})
			}
			if !waiting {
				publishN(t, client, topic, n)
			}
			eventuallyAll(t, func() int { return tallies[0].len() + tallies[1].len() }, n)
			for _, handled := range tallies {
				assert.LessOrEqual(t, handled.len(), n/2*13/10, "1.3 times the best that two can do")
				assert.Equal(t, map[int64]int{1: handled.len()}, handled.counts)
			}
		})
	}
}

// TestBounds: whatever waits in the stream, a process keeps no more than its
// prefetch of it, even if handlers that were fast stop returning.
func TestBounds(t *testing.T) {
	t.Parallel()
	const batchSize, warmUp = 100, 2000 // enough for the prefetch to reach its maximum
	topic, client := topic(t), newClient(t)
	t.Cleanup(func() { client.Del(context.Background(), topic) })
	payload := strings.Repeat("x", 1024)
	for range 10 {
		pipe := client.Pipeline()
		for range 1000 {
			pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{
				goxstreams.UUIDHeaderKey, "uuid", "metadata", "", "payload", payload,
			}})
		}
		_, err := pipe.Exec(t.Context())
		require.NoError(t, err)
	}
	for _, concurrency := range []int{1, 32} {
		for _, fast := range []int{0, warmUp} {
			t.Run(fmt.Sprintf("MaxConcurrency=%d/FastBefore=%d", concurrency, fast), func(t *testing.T) {
				t.Parallel()
				group := watermill.NewShortUUID()
				config := grouped(client)
				config.ConsumerGroup = group
				config.MaxConcurrency, config.BatchSize = concurrency, batchSize
				config.CloseTimeout = 50 * time.Millisecond
				sub := newSubscriber(t, config)
				messages := subscribe(t, sub, topic)
				require.Len(t, collect(messages, fast, patience), fast)
				for range concurrency {
					next(t, messages) // and no answer
				}
				held := func() int { return stats(t, sub).InFlight }
				pending := func() int {
					p, err := client.XPending(context.Background(), topic, group).Result()
					require.NoError(t, err)
					return int(p.Count)
				}
				const most = 2 * batchSize // a prefetch, plus the one read while that was queued
				// Acks in flight, and a read for which they make room, finish soon,
				// since no handler returns any more.
				steady := func() bool {
					for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
						if n := pending(); n != held() || n > most+concurrency {
							return false
						}
					}
					return true
				}
				eventually(t, steady, "the acks do not arrive, or more than the prefetch is held")
				t.Logf("holds %d", held())
				assert.GreaterOrEqual(t, held(), concurrency)
			})
		}
	}
}

// TestSlowHandler: a message stays with its handler, however long that takes.
func TestSlowHandler(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, client := topic(t), newClient(t)
	handled := newTally()
	for range 2 {
		sub := newSubscriber(t, claiming(newClient(t)))
		handled.handle(subscribe(t, sub, topic), func(msg *message.Message) {
			select {
			case <-time.After(5 * minIdle):
			case <-msg.Context().Done():
				assert.Fail(t, "the context of a message in hand ended", context.Cause(msg.Context()))
			}
		})
	}
	publish(t, client, topic, "")
	eventually(t, func() bool { return handled.len() == 1 })
	eventuallySettled(t, client, topic, testGroup)
	assert.Equal(t, map[int64]int{1: 1}, handled.counts)
}

// TestTakeover: a dead consumer's messages are delivered to a consumer with a free
// slot within the guaranteed time and not before. The dead consumer has the other's
// name prefix as its name.
func TestTakeover(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 8} {
		t.Run(fmt.Sprintf("MaxConcurrency=%d", concurrency), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			publishN(t, client, topic, concurrency)
			createGroup(t, client, topic, testGroup)
			config := claiming(client)
			config.MaxConcurrency = concurrency
			config.Consumer = "one"
			sub := newSubscriber(t, config)
			before := time.Now()
			ids := readAs(t, client, topic, testGroup, "one", concurrency)
			after := time.Now()
			messages := subscribe(t, sub, topic)
			var got []string
			for range ids {
				msg := next(t, messages)
				at := time.Now()
				assert.GreaterOrEqual(t, at.Sub(before), minIdle, "too early")
				assert.LessOrEqual(t, at.Sub(after), claimTime+slack, "too late")
				d := delivery(t, msg)
				assert.EqualValues(t, 2, d.Count)
				got = append(got, d.ID)
			}
			assert.ElementsMatch(t, ids, got)
			for _, row := range pendingOf(t, client, topic, testGroup) {
				assert.Regexp(t, "^one-.+", row.Consumer)
				assert.EqualValues(t, 2, row.RetryCount)
			}
			assert.EqualValues(t, concurrency, stats(t, sub).Claimed)
		})
	}
}

// TestLeaseLost: another consumer claims a message that is being handled.
func TestLeaseLost(t *testing.T) {
	t.Parallel()
	for _, thief := range []string{"thief", "one"} { // the prefix of the owner's name
		for _, settle := range []string{"Nack", "NackLast", "Ack"} {
			t.Run("By="+thief+"/"+settle, func(t *testing.T) {
				t.Parallel()
				testserver.RequireReal(t)
				topic, client := topic(t), newClient(t)
				config := claiming(client)
				config.Consumer = "one"
				if settle == "NackLast" {
					config.Retry = &goxstreams.Retry{MaxRetries: -1}
				}
				sub := newSubscriber(t, config)
				messages := subscribe(t, sub, topic)
				publish(t, client, topic, "")
				msg := next(t, messages)
				id := delivery(t, msg).ID
				require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, thief, 0, id, "retrycount", 2, "justid").Err())
				leaseLost(t, msg)

				if settle == "Ack" {
					msg.Ack() // the work is done
					eventuallySettled(t, client, topic, testGroup)
					require.NoError(t, sub.Close())
					return
				}
				msg.Nack()
				// The nack has taken effect when the only slot delivers another
				// message.
				publish(t, client, topic, "sentinel")
				next(t, messages).Ack()
				require.NoError(t, sub.Close())
				rows := pendingOf(t, client, topic, testGroup)
				require.Len(t, rows, 1)
				assert.Equal(t, thief, rows[0].Consumer)
				assert.EqualValues(t, 2, rows[0].RetryCount)
				assert.Zero(t, client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val())
			})
		}
	}
}

// TestLateRenewal: a slow renewal is on its way while another consumer claims the
// message: when it arrives it must neither take the message back nor touch it,
// however long the other one has had it.
func TestLateRenewal(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, client := topic(t), newClient(t)
	underway, arrives := make(chan struct{}), make(chan struct{})
	var once sync.Once
	config := claiming(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isRenewal(cmd) {
			once.Do(func() {
				close(underway)
				<-arrives
			})
		}
		return next()
	}}))
	messages := subscribe(t, newSubscriber(t, config), topic)
	publish(t, client, topic, "")
	msg := next(t, messages)
	select {
	case <-underway:
	case <-time.After(patience):
		require.FailNow(t, "no renewal")
	}
	require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, "thief", 0, delivery(t, msg).ID,
		"idle", time.Hour.Milliseconds(), "retrycount", 2, "justid").Err())
	close(arrives)
	leaseLost(t, msg)
	rows := pendingOf(t, client, topic, testGroup)
	require.Len(t, rows, 1)
	assert.Equal(t, "thief", rows[0].Consumer)
	assert.EqualValues(t, 2, rows[0].RetryCount)
	assert.GreaterOrEqual(t, rows[0].Idle, time.Hour)
	msg.Nack()
}

// Two consumers know of a released message, and the second one's claim is slow: the
// first one has the message by then, and keeps it.
func TestRelease_SlowSecondClaimer(t *testing.T) {
	t.Parallel()
	topic := topic(t)
	plain := newClient(t)
	ctx := context.Background()
	createGroup(t, plain, topic, testGroup)
	publish(t, plain, topic, "released")
	entries, err := plain.XReadGroup(ctx, &redis.XReadGroupArgs{Group: testGroup, Consumer: "closing", Streams: []string{topic, ">"}}).Result()
	require.NoError(t, err)
	id := entries[0].Messages[0].ID
	claim := func(consumer string, count int) {
		require.NoError(t, plain.Do(ctx, "xclaim", topic, testGroup, consumer, 0, id, "retrycount", count, "justid").Err())
	}
	claim("released", 0)

	sent := make(chan struct{})
	var seen atomic.Bool
	slow := &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		if !isClaim(cmd) || seen.Swap(true) {
			return next()
		}
		defer close(sent)
		claim("first", 1)
		eventually(t, func() bool { return pendingOf(t, plain, topic, testGroup)[0].Idle > time.Second }, "the first has it for no time")
		return next()
	}}
	config := grouped(newClient(t, slow))
	config.ClaimMinIdle = time.Minute
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	select {
	case <-sent:
	case <-time.After(patience):
		t.Fatal("nobody claims what was released")
	}
	publish(t, plain, topic, "next")
	require.EqualValues(t, "next", next(t, messages).Payload)
	require.Equal(t, "first", pendingOf(t, plain, topic, testGroup)[0].Consumer)
}

// A released message that waits for a slot here is claimed, fails and is released
// again elsewhere: that delivery counts, whatever was known here.
func TestRelease_CountedElsewhereMeanwhile(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // the embedded one counts renewals as deliveries
	topic := topic(t)
	plain := newClient(t)
	ctx := context.Background()
	createGroup(t, plain, topic, testGroup)
	publish(t, plain, topic, "released")
	entries, err := plain.XReadGroup(ctx, &redis.XReadGroupArgs{Group: testGroup, Consumer: "closing", Streams: []string{topic, ">"}}).Result()
	require.NoError(t, err)
	id := entries[0].Messages[0].ID
	release := func(count int) {
		require.NoError(t, plain.Do(ctx, "xclaim", topic, testGroup, "released", 0, id, "retrycount", count, "justid").Err())
	}
	release(0)

	var seen atomic.Bool
	meanwhile := &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		if isClaim(cmd) && !seen.Swap(true) {
			release(1)
		}
		return next()
	}}
	config := grouped(newClient(t, meanwhile))
	config.ClaimMinIdle = time.Minute
	messages := subscribe(t, newSubscriber(t, config), topic)
	msg := next(t, messages)
	delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
	require.EqualValues(t, 2, delivery.Count)
	msg.Ack()
}

// A cannot renew its lease; B takes the message and snoozes it. The Snooze lowered
// Redis's count by B's delivery, so A's late failure passed for the owner's: the
// message was dead-lettered while B had it, without any failure of B's.
func TestSnoozeKeepsTheFence(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // the embedded one claims what is not idle
	client, topic := newClient(t), topic(t)
	noRenewals := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isRenewal(cmd) {
			return errors.New("cut")
		}
		return next()
	}}
	open := func(name string, client *redis.Client, h message.HandlerFunc) *goxstreams.Subscriber {
		config := grouped(client)
		config.Consumer, config.ClaimMinIdle, config.ClaimInterval = name, 500*time.Millisecond, 20*time.Millisecond
		sub := newSubscriber(t, config)
		go settling(subscribe(t, sub, topic), goxstreams.Retry{}.Middleware(h))
		return sub
	}
	publish(t, client, topic, "x")
	hasIt, fail := make(chan struct{}), make(chan struct{})
	subA := open("A", newClient(t, noRenewals), func(*message.Message) ([]*message.Message, error) {
		close(hasIt)
		<-fail
		return nil, goxstreams.Permanent(errors.New("A says no"))
	})
	<-hasIt
	var calls atomic.Int64
	subB := open("B", client, func(*message.Message) ([]*message.Message, error) {
		if calls.Add(1) == 1 {
			return nil, goxstreams.Snooze(errOther, 3*time.Second) // long enough to be seen
		}
		return nil, goxstreams.Permanent(errors.New("B says no"))
	})
	eventually(t, func() bool { return stats(t, subB).Waiting == 1 }, "B does not snooze")
	close(fail)
	eventually(t, func() bool { return stats(t, subA).InFlight == 0 }, "A does not let go")
	letter := eventuallyDies(t, client, topic)
	require.Equal(t, "B says no", letter.Reason)
	require.EqualValues(t, 2, calls.Load())
	require.EqualValues(t, 2, letter.Deliveries, "a Snooze does not count")
	require.Zero(t, stats(t, subA).Dead)
}

// A is frozen; B takes its message, and releases it when it closes, with A's count:
// A's late failure dead-lettered a message that was no longer A's.
func TestFenceByName(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	publish(t, client, topic, "x")
	ids, counts := make(chan string), make(chan int64, 2)
	fail := make(chan struct{})
	config := grouped(client)
	config.ClaimMinIdle = time.Minute
	messages := subscribe(t, newSubscriber(t, config), topic)
	go settling(messages, goxstreams.Retry{}.Middleware(func(msg *message.Message) ([]*message.Message, error) {
		d := delivery(t, msg)
		if counts <- d.Count; d.Count > 1 {
			return nil, nil
		}
		ids <- d.ID
		<-fail
		return nil, goxstreams.Permanent(errBad)
	}))
	id := <-ids
	for i, consumer := range []string{"B", "released"} { // with 2, then with 1 again
		require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, consumer, 0, id, "retrycount", 2-i, "justid").Err())
	}
	close(fail)
	eventuallyDone(t, client, topic)
	require.Empty(t, deadOf(t, client, topic))
	require.EqualValues(t, 1, <-counts)
	require.EqualValues(t, 2, <-counts, "it is to come again")
}

// The subscriptions of one topic on one Subscriber had one consumer name. Each of
// them found the entries of a dead consumer or released ones, and mistook entries
// that another one had claimed for its own claim with a lost answer.
func TestTakeover_SubscriptionsOfOneTopic(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, owner := range []string{"dead", "released"} {
		t.Run(owner, func(t *testing.T) {
			t.Parallel()
			const n, subscriptions = 50, 3
			client, topic := newClient(t), topic(t)
			createGroup(t, client, topic, testGroup)
			uuids := publishN(t, client, topic, n)
			readAs(t, client, topic, testGroup, owner, n)
			config := claiming(client)
			config.MaxConcurrency = 4
			sub := newSubscriber(t, config)
			handled := newTally()
			for range subscriptions {
				handled.handle(subscribe(t, sub, topic), func(*message.Message) { time.Sleep(10 * time.Millisecond) })
			}
			eventually(t, func() bool { return handled.has(uuids) })
			eventuallySettled(t, client, topic, testGroup)
			require.Equal(t, n, handled.total(), "handled twice")
			require.Equal(t, map[int64]int{2: n}, handled.counts)
		})
	}
}
