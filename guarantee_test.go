package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Each test here is one guarantee of the library, or one mechanism that a
// guarantee rests on, shown on a real server in real time.

const (
	// minIdle is ClaimMinIdle where its running out is waited for: so long that
	// a busy machine does not let a lease run out by itself.
	minIdle = 1500 * time.Millisecond
	// claimInterval is ClaimInterval there.
	claimInterval = 100 * time.Millisecond
	// claimTime is how long a takeover takes at most, by the guarantee.
	claimTime = minIdle*4/3 + 2*claimInterval
	// slack is what the goroutines and the server of a busy machine may add.
	slack = time.Second
)

// claiming is grouped, with the times above.
func claiming(client redis.UniversalClient) goxstreams.SubscriberConfig {
	config := grouped(client)
	config.ClaimMinIdle = minIdle
	config.ClaimInterval = claimInterval
	return config
}

// during checks a condition again and again for as long as given. It is for
// what must not happen: the caller says why it would have happened by then.
func during(t testing.TB, d time.Duration, condition func() bool, msgAndArgs ...any) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if !condition() {
			require.FailNow(t, "it happened", msgAndArgs...)
		}
	}
}

// tally collects what several consumers have handled.
type tally struct {
	mu      sync.Mutex
	uuids   map[string]int
	entries map[string]int // by entry ID
	counts  map[int64]int  // by delivery count
}

func newTally() *tally {
	return &tally{uuids: make(map[string]int), entries: make(map[string]int), counts: make(map[int64]int)}
}

func (c *tally) add(msg *message.Message) {
	d, _ := goxstreams.DeliveryFromContext(msg.Context())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uuids[msg.UUID]++
	c.entries[d.ID]++
	c.counts[d.Count]++
}

// has reports whether each of the messages was handled.
func (c *tally) has(uuids []string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.uuids) >= len(uuids) && hasAll(c.uuids, uuids)
}

func (c *tally) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.uuids)
}

// handle acks every message after calling work, each in a goroutine of its own
// as Watermill's router does, and counts it.
func (c *tally) handle(messages <-chan *message.Message, work func(*message.Message)) {
	go func() {
		var handlers sync.WaitGroup
		for msg := range messages {
			handlers.Go(func() {
				if work != nil {
					work(msg)
				}
				c.add(msg)
				msg.Ack()
			})
		}
		handlers.Wait()
	}()
}

// TestFairness: a consumer that is busy does not sit on what an idle one could
// have.
func TestFairness(t *testing.T) {
	for _, waiting := range []bool{true, false} {
		t.Run(fmt.Sprintf("PublishedBefore=%t", waiting), func(t *testing.T) {
			topic, client := topic(t), newClient(t)
			if waiting {
				publishN(t, client, topic, 100)
			}
			handled := newTally()
			var subs [2]*goxstreams.Subscriber
			for i := range subs {
				config := grouped(newClient(t))
				config.BatchSize = 100
				subs[i] = newSubscriber(t, config)
			}
			start := time.Now()
			for i := range subs {
				handled.handle(subscribe(t, subs[i], topic), func(*message.Message) { time.Sleep(50 * time.Millisecond) })
			}
			if !waiting {
				start = time.Now()
				publishN(t, client, topic, 100)
			}
			eventually(t, func() bool { return handled.len() == 100 })
			took := time.Since(start)
			t.Logf("took %s", took)
			assert.Less(t, took, 1300*2500*time.Microsecond, "1.3 times the best that two can do")
			assert.Equal(t, map[int64]int{1: 100}, handled.counts)
		})
	}
}

// TestBounds: whatever waits in the stream, a process holds its prefetch of it
// and no more, also when handlers that were fast stop answering.
func TestBounds(t *testing.T) {
	const batchSize, warmUp = 100, 20_000
	topic, client := topic(t), newClient(t)
	t.Cleanup(func() { client.Del(context.Background(), topic) })
	payload := strings.Repeat("x", 1024)
	for range 120 {
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
				eventually(t, func() bool { return held() == pending() }, "the acks do not arrive")
				const most = batchSize + batchSize/2 // the prefetch
				// A read that is to come is triggered by what just happened, and takes
				// a millisecond.
				during(t, 300*time.Millisecond, func() bool {
					return held() <= most+concurrency && pending() <= most+concurrency
				}, "more than the prefetch is held")
				t.Logf("holds %d", held())
				assert.GreaterOrEqual(t, held(), concurrency)
			})
		}
	}
}

// TestRestart: the server is restarted twice while 10 goroutines publish and a
// subscription consumes. Everything arrives.
func TestRestart(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			const publishers, each = 10, 200
			server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always")
			client, topic := server.Client(), topic(t)
			config := goxstreams.SubscriberConfig{Client: client, MaxConcurrency: mode.concurrency}
			if mode.grouped {
				config = claiming(client)
				config.MaxConcurrency = mode.concurrency
			}
			sub := newSubscriber(t, config)
			handled := newTally()
			handled.handle(subscribe(t, sub, topic), nil)

			var published, unknown atomic.Int64
			var all []string
			var running sync.WaitGroup
			for p := range publishers {
				for i := range each {
					all = append(all, fmt.Sprintf("%d-%d", p, i))
				}
				running.Go(func() {
					pub := newPublisher(t, client)
					for i := range each {
						msg := message.NewMessage(fmt.Sprintf("%d-%d", p, i), nil)
						for err := pub.Publish(topic, msg); err != nil; err = pub.Publish(topic, msg) {
							if errors.Is(err, goxstreams.ErrOutcomeUnknown) {
								unknown.Add(1) // it may be stored twice now
							}
							time.Sleep(10 * time.Millisecond) // or the log fills up
						}
						published.Add(1)
						time.Sleep(2 * time.Millisecond) // so that the restarts hit it
					}
				})
			}
			for _, part := range []int64{3, 2} {
				eventually(t, func() bool { return published.Load() > publishers*each/part })
				server.Restart()
			}
			running.Wait()
			eventually(t, func() bool { return handled.has(all) }, "not everything arrives")
			t.Logf("%d outcomes were unknown", unknown.Load())
			if !mode.grouped {
				return
			}
			eventuallySettled(t, client, topic, testGroup)
			require.NoError(t, sub.Close())
			// The server had written down what it had delivered, so that no entry
			// comes twice.
			for id, n := range handled.entries {
				assert.Equal(t, 1, n, "entry %s", id)
			}
			assert.Equal(t, map[int64]int{1: len(handled.entries)}, handled.counts, "entries by delivery count")
			assert.LessOrEqual(t, len(handled.entries), len(all)+int(unknown.Load()))
		})
	}
}

// TestServerAway: Redis counts idle time also while it is frozen or down, and
// no holder can renew. Then all that is in hand looks abandoned, and is not.
func TestServerAway(t *testing.T) {
	for name, away := range map[string]func(s *testserver.Server, d time.Duration){
		"Frozen": func(s *testserver.Server, d time.Duration) { s.Freeze(); time.Sleep(d); s.Thaw() },
		"Down":   func(s *testserver.Server, d time.Duration) { s.Kill(); time.Sleep(d); s.Restart() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always")
			client, topic := server.Client(), topic(t)
			var subs [2]*goxstreams.Subscriber
			var out [2]<-chan *message.Message
			for i := range subs {
				config := claiming(server.Client())
				config.MaxConcurrency = 16 // room for what the other one has, all of it
				subs[i] = newSubscriber(t, config)
				out[i] = subscribe(t, subs[i], topic)
			}
			publishN(t, client, topic, 8)
			var held []*message.Message
			for len(held) < 8 {
				select {
				case msg := <-out[0]:
					held = append(held, msg)
				case msg := <-out[1]:
					held = append(held, msg)
				case <-time.After(patience):
					require.FailNow(t, "no message came")
				}
			}
			for _, messages := range out {
				go func() {
					for msg := range messages {
						d, _ := goxstreams.DeliveryFromContext(msg.Context())
						assert.Fail(t, "a message in hand was claimed", "%+v", d)
						msg.Ack()
					}
				}()
			}
			away(server, 2*minIdle+minIdle/2)
			// A claim on idle time alone comes at the first look, one on two
			// sightings without a renewal between them within claimTime.
			during(t, claimTime+slack, func() bool {
				return !slices.ContainsFunc(held, func(msg *message.Message) bool { return msg.Context().Err() != nil })
			}, "a context ended")
			for _, sub := range subs {
				assert.Zero(t, stats(t, sub).Claimed)
				assert.NoError(t, stats(t, sub).Err)
			}
			rows := pendingOf(t, client, topic, testGroup)
			require.Len(t, rows, len(held))
			for _, row := range rows {
				assert.EqualValues(t, 1, row.RetryCount)
			}
			for _, msg := range held {
				msg.Ack()
			}
			eventuallySettled(t, client, topic, testGroup)
		})
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

// TestTakeover: what a dead consumer held comes to one with a free slot in the
// time that is guaranteed and not before, whatever the two are named.
func TestTakeover(t *testing.T) {
	for _, concurrency := range []int{1, 8} {
		for _, sameName := range []bool{false, true} {
			t.Run(fmt.Sprintf("MaxConcurrency=%d/SameName=%t", concurrency, sameName), func(t *testing.T) {
				t.Parallel()
				testserver.RequireReal(t)
				topic, client := topic(t), newClient(t)
				publishN(t, client, topic, concurrency)
				createGroup(t, client, topic, testGroup)
				config := claiming(client)
				config.MaxConcurrency = concurrency
				config.Consumer = "one"
				holder := "other"
				if sameName {
					holder = config.Consumer
				}
				sub := newSubscriber(t, config)
				before := time.Now()
				ids := readAs(t, client, topic, testGroup, holder, concurrency)
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
					assert.Equal(t, "one", row.Consumer)
					assert.EqualValues(t, 2, row.RetryCount)
				}
				assert.EqualValues(t, concurrency, stats(t, sub).Claimed)
			})
		}
	}
}

// claimAs takes the entry over, as a consumer does that thinks the holder dead.
func claimAs(t testing.TB, client redis.UniversalClient, topic, consumer, id string) {
	t.Helper()
	got, err := client.XClaim(context.Background(), &redis.XClaimArgs{
		Stream: topic, Group: testGroup, Consumer: consumer, Messages: []string{id},
	}).Result()
	require.NoError(t, err)
	require.Len(t, got, 1)
}

// leaseLost waits until the message's context has ended because of a lost lease.
func leaseLost(t testing.TB, msg *message.Message) {
	t.Helper()
	select {
	case <-msg.Context().Done():
		require.ErrorIs(t, context.Cause(msg.Context()), goxstreams.ErrLeaseLost)
	case <-time.After(patience):
		require.FailNow(t, "the context of a message whose lease is lost does not end")
	}
}

// TestLeaseLost: somebody else claims a message that is being handled.
func TestLeaseLost(t *testing.T) {
	for _, thief := range []string{"thief", "one"} { // names need not be unique
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
				// Leases are kept in milliseconds: who steals within the same one as
				// the delivery cannot be told from its consumer. A claim comes later.
				eventually(t, func() bool { return pendingOf(t, client, topic, testGroup)[0].Idle >= 20*time.Millisecond })

				claimAs(t, client, topic, thief, id)
				began := time.Now()
				leaseLost(t, msg)
				assert.Less(t, time.Since(began), minIdle/3+slack)

				if settle == "Ack" {
					msg.Ack() // the work is done
					eventuallySettled(t, client, topic, testGroup)
					require.NoError(t, sub.Close())
					return
				}
				msg.Nack()
				// What a nack does is done when the one slot hands out another message.
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

// TestLateRenewal: a renewal is on its way, slowly, while somebody else claims
// the message: when it arrives it must not take the message back.
func TestLateRenewal(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, client := topic(t), newClient(t)
	underway, arrives := make(chan struct{}), make(chan struct{})
	var once sync.Once
	config := claiming(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if cmd.Name() == "xclaim" {
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
	claimAs(t, client, topic, "thief", delivery(t, msg).ID)
	close(arrives)
	leaseLost(t, msg)
	rows := pendingOf(t, client, topic, testGroup)
	require.Len(t, rows, 1)
	assert.Equal(t, "thief", rows[0].Consumer)
	msg.Nack()
}

// loseReply returns a hook that says that the connection broke, after the n-th
// command for which match is true has run; and the number of commands that it
// did that to.
func loseReply(n int64, match func(cmd redis.Cmder) bool) (*hook, *atomic.Int64) {
	var seen, lost atomic.Int64
	return &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		err := next()
		if err != nil || !match(cmd) || seen.Add(1) != n {
			return err
		}
		lost.Add(1)
		return io.EOF
	}}, &lost
}

func isCommand(name string, args ...any) func(redis.Cmder) bool {
	return func(cmd redis.Cmder) bool {
		if cmd.Name() != name {
			return false
		}
		for _, arg := range args {
			if !slices.Contains(cmd.Args(), arg) {
				return false
			}
		}
		return true
	}
}

// TestLostReplies: commands run, and nobody learns of it.
func TestLostReplies(t *testing.T) {
	t.Run("XREADGROUP/GeneratedName", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isCommand("xreadgroup"))
		config := grouped(newClient(t, hook))
		config.ClaimMinIdle = 5 * time.Minute // the reader finds it by itself
		messages := subscribe(t, newSubscriber(t, config), topic)
		publish(t, client, topic, "")
		msg := next(t, messages)
		assert.EqualValues(t, 1, lost.Load())
		assert.EqualValues(t, 1, delivery(t, msg).Count, "nobody has seen it before")
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("XREADGROUP/GivenName", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isCommand("xreadgroup"))
		config := claiming(newClient(t, hook))
		config.Consumer = "given"
		messages := subscribe(t, newSubscriber(t, config), topic)
		publish(t, client, topic, "")
		began := time.Now()
		msg := next(t, messages)
		assert.LessOrEqual(t, time.Since(began), claimTime+slack)
		assert.EqualValues(t, 1, lost.Load())
		assert.EqualValues(t, 2, delivery(t, msg).Count, "it could be a namesake's")
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("XCLAIM/Takeover", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		publish(t, client, topic, "")
		createGroup(t, client, topic, testGroup)
		readAs(t, client, topic, testGroup, "dead", 1)
		began := time.Now()
		hook, lost := loseReply(1, isCommand("xclaim"))
		messages := subscribe(t, newSubscriber(t, claiming(newClient(t, hook))), topic)
		msg := next(t, messages)
		assert.LessOrEqual(t, time.Since(began), claimTime+2*claimInterval+slack)
		assert.EqualValues(t, 1, lost.Load())
		assert.EqualValues(t, 2, delivery(t, msg).Count, "the lost claim reached nobody")
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	for _, concurrency := range []int{1, 4} {
		t.Run(fmt.Sprintf("XCLAIM/Retry/MaxConcurrency=%d", concurrency), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			hook, lost := loseReply(1, isCommand("xclaim", "retrycount"))
			config := grouped(newClient(t, hook))
			config.MaxConcurrency = concurrency
			config.Retry = quickRetry()
			messages := subscribe(t, newSubscriber(t, config), topic)
			publish(t, client, topic, "")
			for count := range int64(4) {
				msg := next(t, messages)
				assert.Equal(t, count+1, delivery(t, msg).Count)
				assert.Equal(t, count+1, pendingOf(t, client, topic, testGroup)[0].RetryCount)
				if count < 3 {
					msg.Nack()
				} else {
					msg.Ack()
				}
			}
			assert.EqualValues(t, 1, lost.Load())
			eventuallySettled(t, client, topic, testGroup)
		})
	}
	t.Run("XCLAIM/Renewal", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isCommand("xclaim", "justid"))
		messages := subscribe(t, newSubscriber(t, claiming(newClient(t, hook))), topic)
		publish(t, client, topic, "")
		msg := next(t, messages)
		rival := newSubscriber(t, claiming(newClient(t)))
		subscribe(t, rival, topic)
		eventually(t, func() bool { return lost.Load() == 1 })
		during(t, claimTime+slack, func() bool { return msg.Context().Err() == nil && stats(t, rival).Claimed == 0 },
			"the lease is lost, though it was renewed")
		assert.EqualValues(t, 1, pendingOf(t, client, topic, testGroup)[0].RetryCount)
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("XCLAIM/Release", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isCommand("xclaim", "released"))
		config := grouped(newClient(t, hook))
		config.ClaimMinIdle = 5 * time.Minute
		sub := newSubscriber(t, config)
		subscribe(t, sub, topic) // and nobody takes what it offers
		publish(t, client, topic, "")
		eventually(t, func() bool { return stats(t, sub).InFlight == 1 })
		require.NoError(t, sub.Close())
		require.EqualValues(t, 1, lost.Load())
		config.Client = newClient(t)
		msg := next(t, subscribe(t, newSubscriber(t, config), topic))
		assert.EqualValues(t, 1, delivery(t, msg).Count)
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("XACK", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isCommand("xack"))
		sub := newSubscriber(t, claiming(newClient(t, hook)))
		handled := newTally()
		handled.handle(subscribe(t, sub, topic), nil)
		uuids := publishN(t, client, topic, 20)
		eventually(t, func() bool { return handled.has(uuids) && lost.Load() == 1 })
		eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "acks that never end")
		require.NoError(t, sub.Close())
		assert.Empty(t, pendingOf(t, client, topic, testGroup))
		assert.Equal(t, map[int64]int{1: 20}, handled.counts)
	})
	for name, retryIn := range map[string]time.Duration{"AtOnce": time.Millisecond, "AfterRenewals": minIdle} {
		t.Run("EVAL/"+name, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			hook, lost := loseReply(1, isCommand("eval"))
			config := claiming(newClient(t, hook))
			config.Retry = &goxstreams.Retry{MaxRetries: -1, InitialInterval: retryIn}
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			uuid := publish(t, client, topic, "")[0]
			next(t, messages).Nack()
			eventually(t, func() bool { return lost.Load() == 1 })
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "the dead message is kept")
			require.NoError(t, sub.Close())
			dead := deadLetters(t, client, topic)
			require.Len(t, dead, 1)
			assert.Equal(t, uuid, dead[0].UUID)
			assert.Empty(t, pendingOf(t, client, topic, testGroup))
		})
	}
}

var _ = math.MaxInt64
var _ = middleware.RetryParams{}
