package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	// slack is what a busy machine may add to that: all that a bound from above tells is that nothing else was waited
	// for. (How long things take exactly is shown in virtual time.)
	slack = 5 * time.Second
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

// total returns how many messages were handled, those that were handled more than
// once as often.
func (c *tally) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, times := range c.uuids {
		n += times
	}
	return n
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
// have. Both begin when each has a message, and take as long as the other for
// each: whoever has most of them says how long all of them take.
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

// TestBounds: whatever waits in the stream, a process holds its prefetch of it
// and no more, also when handlers that were fast stop answering.
func TestBounds(t *testing.T) {
	const batchSize, warmUp = 100, 2000 // that many are enough for the prefetch to grow to its most
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
				const most = 2 * batchSize // a prefetch, and the one that was read while that was queued
				// Acks on their way, and a read that their arrival makes room for, come
				// to an end, since no handler answers any more.
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

// TestRestart: the server is restarted twice while 10 goroutines publish and a
// subscription consumes. Everything arrives.
func TestRestart(t *testing.T) {
	t.Parallel()
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
							time.Sleep(10 * time.Millisecond) // or the log fills up; how long does not matter
						}
						published.Add(1)
						time.Sleep(2 * time.Millisecond) // so that the restarts hit more of it
					}
				})
			}
			for _, part := range []int{3, 2} {
				eventuallyAll(t, func() int { return int(published.Load()) }, publishers*each/part)
				server.Restart()
			}
			running.Wait()
			eventuallyAll(t, handled.len, len(all))
			assert.True(t, handled.has(all), "not everything arrives")
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
// no holder can renew. Then all that is in hand looks abandoned, and is not:
// claiming on idle time alone takes it from living holders, if one of them is a
// little slower to come back than a claimer. Here all of them are.
func TestServerAway(t *testing.T) {
	t.Parallel()
	for name, away := range map[string]func(s *testserver.Server, d time.Duration){
		"Frozen": func(s *testserver.Server, d time.Duration) { s.Freeze(); time.Sleep(d); s.Thaw() },
		"Down":   func(s *testserver.Server, d time.Duration) { s.Kill(); time.Sleep(d); s.Restart() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always")
			client, topic := server.Client(), topic(t)
			const minIdle = 2400 * time.Millisecond // the slower holders are within a third of it
			var unreachable atomic.Bool
			slow := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if unreachable.Load() && isRenewal(cmd) {
					return io.EOF
				}
				return next()
			}}
			var subs [2]*goxstreams.Subscriber
			var out [2]<-chan *message.Message
			for i := range subs {
				config := claiming(server.Client())
				config.Client.(*redis.Client).AddHook(slow)
				config.ClaimMinIdle = minIdle
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
			unreachable.Store(true)
			away(server, 2*minIdle+minIdle/2)
			time.AfterFunc(minIdle/16, func() { unreachable.Store(false) })
			// A claim on idle time alone comes at the first look, one on two
			// sightings without a renewal between them within claimTime.
			during(t, minIdle*4/3+2*claimInterval+minIdle/3, func() bool {
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
// time that is guaranteed and not before. The dead one had the name that the other's
// begins with.
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
	t.Parallel()
	for _, thief := range []string{"thief", "one"} { // which is what the holder's name begins with
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
// the message: when it arrives it must not take the message back, nor touch it,
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
	t.Parallel()
	for name, consumer := range map[string]string{"GeneratedName": "", "GivenName": "given"} {
		t.Run("XREADGROUP/"+name, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			hook, lost := loseReply(1, isCommand("xreadgroup"))
			config := grouped(newClient(t, hook))
			config.Consumer = consumer
			config.ClaimMinIdle = 5 * time.Minute // the reader finds it by itself
			messages := subscribe(t, newSubscriber(t, config), topic)
			publish(t, client, topic, "")
			msg := next(t, messages)
			assert.EqualValues(t, 1, lost.Load())
			assert.EqualValues(t, 1, delivery(t, msg).Count, "nobody has seen it before")
			msg.Ack()
			eventuallySettled(t, client, topic, testGroup)
		})
	}
	// Found by internal/chaos (-one-by-one -seed 7, cut-before-reply): what is read, with the answer lost, keeps its place. When
	// the claim of it, or the look before, loses its answer too, its successors came first.
	t.Run("XREADGROUP/InOrder", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		createGroup(t, client, topic, testGroup)
		uuids := publishN(t, client, topic, 3)
		read, lost := loseReply(1, isCommand("xreadgroup"))
		claimed, lostToo := loseReply(1, isClaim)
		config := grouped(newClient(t, read, claimed))
		config.ClaimMinIdle = 5 * time.Minute
		config.Retry = quickRetry()
		messages := subscribe(t, newSubscriber(t, config), topic)
		for _, uuid := range uuids {
			msg := next(t, messages)
			assert.Equal(t, uuid, msg.UUID)
			assert.EqualValues(t, 1, delivery(t, msg).Count, "nobody has seen it before")
			msg.Ack()
		}
		assert.EqualValues(t, 1, lost.Load())
		assert.EqualValues(t, 1, lostToo.Load())
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
		hook, lost := loseReply(1, isClaim)
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
			hook, lost := loseReply(1, isClaim)
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
		hook, lost := loseReply(1, isRenewal)
		messages := subscribe(t, newSubscriber(t, claiming(newClient(t, hook))), topic)
		publish(t, client, topic, "")
		msg := next(t, messages)
		rival := newSubscriber(t, claiming(newClient(t)))
		subscribe(t, rival, topic)
		eventually(t, func() bool { return lost.Load() == 1 })
		during(t, claimTime+minIdle/3, func() bool { return msg.Context().Err() == nil && stats(t, rival).Claimed == 0 },
			"the lease is lost, though it was renewed")
		assert.EqualValues(t, 1, pendingOf(t, client, topic, testGroup)[0].RetryCount)
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("XCLAIM/Release", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isRelease)
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
			hook, lost := loseReply(1, isMove)
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

// TestGroupLost: the group disappears, in one of the ways in which that happens.
func TestGroupLost(t *testing.T) {
	t.Parallel()
	type server struct{ client *redis.Client }
	losses := []struct {
		name     string
		entries  bool // the stream stays
		disaster func(t *testing.T, client *redis.Client, topic string)
	}{
		{"Destroy", true, func(t *testing.T, client *redis.Client, topic string) {
			require.NoError(t, client.XGroupDestroy(t.Context(), topic, testGroup).Err())
		}},
		{"DestroyAndCreateAtTheEnd", true, func(t *testing.T, client *redis.Client, topic string) {
			_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
				p.XGroupDestroy(t.Context(), topic, testGroup)
				p.XGroupCreate(t.Context(), topic, testGroup, "$")
				return nil
			})
			require.NoError(t, err)
		}},
		{"Delete", false, func(t *testing.T, client *redis.Client, topic string) {
			require.NoError(t, client.Del(t.Context(), topic).Err())
		}},
		{"Flush", false, func(t *testing.T, client *redis.Client, _ string) {
			require.NoError(t, client.FlushAll(t.Context()).Err())
		}},
	}
	for _, loss := range losses {
		open := func(t *testing.T) server {
			if loss.name == "Flush" {
				return server{testserver.Private(t).Client()}
			}
			testserver.RequireReal(t)
			return server{newClient(t)}
		}
		t.Run(loss.name+"/Idle", func(t *testing.T) {
			t.Parallel()
			client, topic := open(t).client, topic(t)
			messages := subscribe(t, newSubscriber(t, claiming(client)), topic)
			publish(t, client, topic, "before")
			before := next(t, messages)
			before.Ack()
			eventuallySettled(t, client, topic, testGroup)

			eventuallyLater(t, client, delivery(t, before).ID)
			loss.disaster(t, client, topic)
			publish(t, client, topic, "after")
			msg := next(t, messages)
			assert.Equal(t, "after", string(msg.Payload))
			assert.EqualValues(t, 1, delivery(t, msg).Count)
			msg.Ack()
			eventuallySettled(t, client, topic, testGroup)
		})
		t.Run(loss.name+"/InFlight", func(t *testing.T) {
			t.Parallel()
			client, topic := open(t).client, topic(t)
			log := newLogRecorder()
			config := claiming(client)
			config.MaxConcurrency = 4
			config.Retry = &goxstreams.Retry{InitialInterval: 2 * time.Second} // the disaster comes before that
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			in := make(map[string]*message.Message)
			publish(t, client, topic, "acked", "nacked", "finishes", "waits")
			for range 4 {
				msg := next(t, messages)
				in[string(msg.Payload)] = msg
			}
			in["acked"].Ack()
			in["waits"].Nack()
			eventually(t, func() bool { s := stats(t, sub); return s.Waiting == 1 && s.InFlight == 3 })

			eventuallyLater(t, client, delivery(t, in["waits"]).ID)
			loss.disaster(t, client, topic)
			publish(t, client, topic, "after")
			in["after"] = next(t, messages)
			assert.EqualValues(t, 1, delivery(t, in["after"]).Count)
			in["after"].Ack()
			assert.NoError(t, in["nacked"].Context().Err())
			assert.NoError(t, in["finishes"].Context().Err())
			in["nacked"].Nack()
			in["finishes"].Ack()

			if loss.entries {
				again := make(map[string]int64)
				for range 2 {
					msg := next(t, messages)
					again[string(msg.Payload)] = delivery(t, msg).Count
					msg.Ack()
				}
				assert.Equal(t, map[string]int64{"nacked": 2, "waits": 2}, again)
			}
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "something is kept for ever")
			eventuallySettled(t, client, topic, testGroup)
			// Whatever is to come once more would come before this one, or instead.
			publish(t, client, topic, "last")
			msg := next(t, messages)
			assert.Equal(t, "last", string(msg.Payload))
			msg.Ack()
			if !loss.entries {
				eventually(t, func() bool { return stats(t, sub).Lost >= 2 }, "that messages are lost is not said")
			}
			eventually(t, func() bool { return stats(t, sub).Err == nil })
			assert.True(t, slices.ContainsFunc(log.Errors(), func(l string) bool { return strings.Contains(l, "group") }), "it is not logged: %v", log.Errors())
		})
	}
}

// TestClose is about how long Close takes and what it leaves.
func TestClose(t *testing.T) {
	t.Parallel()
	// An idle subscription is blocked in a read. What wakes it may be slow.
	for name, when := range map[string]string{"SlowRequest": "before", "SlowAnswer": "after", "Undisturbed": ""} {
		t.Run("Idle/"+name, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			var slow atomic.Bool
			wait := func(now string) {
				if slow.Load() && when == now {
					time.Sleep(time.Second) // the fault
				}
			}
			config := grouped(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if !isCommand("client", "unblock")(cmd) {
					return next()
				}
				wait("before")
				err := next()
				wait("after")
				return err
			}}))
			config.BlockTime = time.Minute
			config.CloseTimeout = patience
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "first")
			next(t, messages).Ack()
			eventuallySettled(t, client, topic, testGroup)
			slow.Store(true)
			began := time.Now()
			closing := make(chan error)
			go func() { closing <- sub.Close() }()
			publish(t, client, topic, "while it closes")
			require.NoError(t, <-closing)
			assert.Less(t, time.Since(began), time.Second+slack, "it waits for the read")
			publish(t, client, topic, "after")
			takesNothing(t, client, topic, "while it closes", "after")
		})
	}
	for _, right := range []string{"-client|unblock", "-client|id", "-client"} {
		t.Run("Idle/Without"+right, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			config := grouped(aclUser(t, client, right))
			config.BlockTime = time.Minute
			config.CloseTimeout = patience
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "first")
			next(t, messages).Ack()
			eventuallySettled(t, client, topic, testGroup)
			began := time.Now()
			require.NoError(t, sub.Close())
			assert.Less(t, time.Since(began), time.Second+slack)
			publish(t, client, topic, "after")
			takesNothing(t, client, topic, "after")
		})
	}

	const timeout, grace = 2 * time.Second, time.Second
	open := func(t *testing.T) (*redis.Client, string, *goxstreams.Subscriber, func() chan struct{}, *message.Message) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		config := claiming(client)
		config.CloseTimeout = timeout
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		publish(t, client, topic, "")
		msg := next(t, messages)
		closing := func() chan struct{} {
			done := make(chan struct{})
			go func() {
				defer close(done)
				assert.NoError(t, sub.Close())
				_, open := <-messages
				assert.False(t, open, "the channel is not closed")
			}()
			return done
		}
		return client, topic, sub, closing, msg
	}
	t.Run("Drain", func(t *testing.T) {
		client, topic, _, closing, msg := open(t)
		done := closing()
		during(t, grace/2, func() bool { return msg.Context().Err() == nil }, "the context ends before the grace")
		msg.Ack()
		<-done
		assert.Empty(t, pendingOf(t, client, topic, testGroup), "the ack is lost")
	})
	t.Run("Grace", func(t *testing.T) {
		client, topic, _, closing, msg := open(t)
		began := time.Now()
		done := closing()
		<-msg.Context().Done()
		took := time.Since(began)
		assert.ErrorIs(t, context.Cause(msg.Context()), goxstreams.ErrSubscriberClosed)
		assert.GreaterOrEqual(t, took, timeout-grace-50*time.Millisecond)
		msg.Nack() // because of the shutdown, which is no failure; later than timeout it would not be released any more
		<-done
		rows := pendingOf(t, client, topic, testGroup)
		require.Len(t, rows, 1)
		assert.Equal(t, "released", rows[0].Consumer)
		config := grouped(client)
		config.ClaimMinIdle = 5 * time.Minute
		msg = next(t, subscribe(t, newSubscriber(t, config), topic))
		assert.EqualValues(t, 1, delivery(t, msg).Count)
		msg.Ack()
	})
	t.Run("AckInTheGrace", func(t *testing.T) {
		client, topic, _, closing, msg := open(t)
		done := closing()
		<-msg.Context().Done()
		msg.Ack()
		<-done
		assert.Empty(t, pendingOf(t, client, topic, testGroup), "the ack is lost")
	})
	t.Run("Abandon", func(t *testing.T) {
		client, topic, _, closing, msg := open(t)
		consumer := delivery(t, msg).Consumer
		began := time.Now()
		done := closing()
		<-done // the handler ignores it all
		took := time.Since(began)
		assert.GreaterOrEqual(t, took, timeout-50*time.Millisecond)
		assert.Less(t, took, timeout+slack)
		select {
		case <-msg.Nacked():
		default:
			assert.Fail(t, "whoever waits for the outcome waits for ever")
		}
		assert.False(t, msg.Ack())
		rows := pendingOf(t, client, topic, testGroup)
		require.Len(t, rows, 1)
		assert.Equal(t, consumer, rows[0].Consumer, "the handler may still be at work")
		assert.Zero(t, rows[0].RetryCount, "this delivery does not count")
		msg = next(t, subscribe(t, newSubscriber(t, claiming(client)), topic))
		assert.GreaterOrEqual(t, time.Since(began), minIdle)
		assert.EqualValues(t, 1, delivery(t, msg).Count)
		msg.Ack()
	})
}

// takesNothing shows that a closed consumer has not kept these messages: another
// one gets them at once, as if they had never been delivered.
func takesNothing(t testing.TB, client *redis.Client, topic string, want ...string) {
	t.Helper()
	config := grouped(client)
	config.ClaimMinIdle = 5 * time.Minute
	messages := subscribe(t, newSubscriber(t, config), topic)
	var got []string
	for range want {
		msg := next(t, messages)
		assert.EqualValues(t, 1, delivery(t, msg).Count)
		got = append(got, string(msg.Payload))
		msg.Ack()
	}
	assert.ElementsMatch(t, want, got)
	eventuallySettled(t, client, topic, testGroup)
}

// aclUser returns a client with all rights but for the rules given.
func aclUser(t testing.TB, admin *redis.Client, rules ...string) *redis.Client {
	t.Helper()
	name := watermill.NewShortUUID()
	setUser(t, admin, name, append([]string{"on", ">" + name, "~*", "&*", "+@all"}, rules...)...)
	t.Cleanup(func() { admin.Do(context.Background(), "acl", "deluser", name) })
	client := redis.NewClient(&redis.Options{Addr: admin.Options().Addr, Username: name, Password: name})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func setUser(t testing.TB, admin *redis.Client, name string, rules ...string) {
	t.Helper()
	args := []any{"acl", "setuser", name}
	for _, rule := range rules {
		args = append(args, rule)
	}
	require.NoError(t, admin.Do(context.Background(), args...).Err())
}

// TestRetryLimit: a message whose handler fails is handled MaxRetries+1 times,
// counted by Redis, and is then dead.
func TestRetryLimit(t *testing.T) {
	t.Parallel()
	for _, maxRetries := range []int{-1, 1, 3} {
		for _, concurrency := range []int{1, 4} {
			t.Run(fmt.Sprintf("MaxRetries=%d/MaxConcurrency=%d", maxRetries, concurrency), func(t *testing.T) {
				t.Parallel()
				topic, client := topic(t), newClient(t)
				var hooks []int
				var dead []goxstreams.DeadMessage
				config := grouped(client)
				config.MaxConcurrency = concurrency
				config.Retry = &goxstreams.Retry{
					MaxRetries: maxRetries, InitialInterval: time.Millisecond,
					OnRetryHook: func(n int, delay time.Duration) {
						hooks = append(hooks, n)
						assert.Equal(t, time.Millisecond<<(n-1), delay)
					},
				}
				config.OnDead = func(_ context.Context, d goxstreams.DeadMessage) { dead = append(dead, d) }
				sub := newSubscriber(t, config)
				messages := subscribe(t, sub, topic)
				msg := message.NewMessage("uuid", []byte("payload"))
				msg.Metadata.Set("key", "value")
				require.NoError(t, newPublisher(t, client).Publish(topic, msg))

				var last goxstreams.Delivery
				for count := range int64(max(maxRetries, 0) + 1) {
					msg := next(t, messages)
					last = delivery(t, msg)
					assert.Equal(t, count+1, last.Count)
					assert.Equal(t, count, last.RetryCount())
					assert.Equal(t, maxRetries, last.MaxRetries)
					assert.Equal(t, count+1, pendingOf(t, client, topic, testGroup)[0].RetryCount)
					msg.Metadata.Set("key", "changed by the handler")
					msg.Nack()
				}
				eventually(t, func() bool { return stats(t, sub).Dead == 1 }, "it does not die")
				publish(t, client, topic, "sentinel")
				sentinel := next(t, messages)
				assert.Equal(t, "sentinel", string(sentinel.Payload), "the dead one came again")
				sentinel.Ack()
				require.NoError(t, sub.Close())

				var wantHooks []int
				for n := 1; n <= maxRetries; n++ {
					wantHooks = append(wantHooks, n)
				}
				assert.Equal(t, wantHooks, hooks)
				letters := deadLetters(t, client, topic)
				require.Len(t, letters, 1)
				letter := letters[0]
				assert.Equal(t, "uuid", letter.UUID)
				assert.Equal(t, "payload", string(letter.Payload))
				diedAt, err := time.Parse(time.RFC3339, letter.Metadata.Get(goxstreams.DeadDiedAtKey))
				assert.NoError(t, err)
				assert.WithinDuration(t, time.Now(), diedAt, time.Minute)
				delete(letter.Metadata, goxstreams.DeadDiedAtKey)
				assert.Equal(t, message.Metadata{
					"key":                            "value",
					middleware.ReasonForPoisonedKey:  goxstreams.ErrRetriesExhausted.Error(),
					middleware.PoisonedTopicKey:      topic,
					middleware.PoisonedHandlerKey:    "",
					middleware.PoisonedSubscriberKey: "goxstreams.Subscriber",
					goxstreams.DeadEntryIDKey:        last.ID,
					goxstreams.DeadGroupKey:          testGroup,
					goxstreams.DeadConsumerKey:       last.Consumer,
					goxstreams.DeadKindKey:           "exhausted",
					goxstreams.DeadDeliveriesKey:     fmt.Sprint(last.Count),
				}, letter.Metadata)
				require.Len(t, dead, 1)
				assert.Equal(t, last.ID, dead[0].EntryID)
				assert.Equal(t, last.Count, dead[0].Deliveries)
				assert.Equal(t, goxstreams.Exhausted, dead[0].Kind)
				assert.Equal(t, "value", dead[0].Message.Metadata.Get("key"))
				assert.Empty(t, pendingOf(t, client, topic, testGroup))
			})
		}
	}
	t.Run("ShouldRetry", func(t *testing.T) {
		t.Parallel()
		topic, client := topic(t), newClient(t)
		config := grouped(client)
		config.Retry = &goxstreams.Retry{ShouldRetry: func(p middleware.RetryParams) bool {
			assert.ErrorIs(t, p.Err, goxstreams.ErrNacked)
			return p.RetryNum < 2
		}, InitialInterval: time.Millisecond}
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		publish(t, client, topic, "")
		next(t, messages).Nack()
		next(t, messages).Nack()
		eventually(t, func() bool { return stats(t, sub).Dead == 1 })
		require.NoError(t, sub.Close())
		letters := deadLetters(t, client, topic)
		require.Len(t, letters, 1)
		assert.Equal(t, "permanent", letters[0].Metadata.Get(goxstreams.DeadKindKey))
	})
}

// picky rejects entries with the field "broken".
type picky struct{ goxstreams.BodyMarshaler }

func (p picky) Unmarshal(values map[string]any) (*message.Message, error) {
	if _, ok := values["broken"]; ok {
		return nil, errors.New("this is broken")
	}
	return p.BodyMarshaler.Unmarshal(values)
}

func addRaw(t testing.TB, client *redis.Client, topic string, fields ...string) string {
	t.Helper()
	id, err := client.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, Values: fields}).Result()
	require.NoError(t, err)
	return id
}

// TestBroken: an entry that cannot be unmarshaled stops nothing.
func TestBroken(t *testing.T) {
	t.Parallel()
	fields := []string{"z", "1", "broken", "\x00\xff\r\n", "a", "", "z", "2", "", "empty name", "z", "1"}
	body := func(s string) []string { return []string{"body", `"` + s + `"`} }
	open := func(t *testing.T, onBroken func(context.Context, goxstreams.BrokenMessage) error) (*redis.Client, string, *goxstreams.Subscriber, <-chan *message.Message) {
		t.Parallel()
		topic, client := topic(t), newClient(t)
		config := grouped(client)
		config.Unmarshaler = picky{}
		config.Retry = quickRetry()
		config.OnBroken = onBroken
		sub := newSubscriber(t, config)
		return client, topic, sub, subscribe(t, sub, topic)
	}
	follows := func(t *testing.T, client *redis.Client, topic string, messages <-chan *message.Message) {
		t.Helper()
		addRaw(t, client, topic, body("next")...)
		msg := next(t, messages)
		assert.Equal(t, `"next"`, string(msg.Payload))
		msg.Ack()
	}

	t.Run("Moved", func(t *testing.T) {
		client, topic, sub, messages := open(t, nil)
		id := addRaw(t, client, topic, fields...)
		follows(t, client, topic, messages)
		eventuallySettled(t, client, topic, testGroup)
		letters := deadLetters(t, client, topic)
		require.Len(t, letters, 1)

		// A Subscriber reads it whatever format it is set to.
		config := grouped(client)
		config.Unmarshaler = goxstreams.BodyMarshaler{}
		letter := next(t, subscribe(t, newSubscriber(t, config), goxstreams.DeadLetterTopic(topic)))
		letter.Ack()
		assert.True(t, letters[0].Equals(letter))
		restored, err := goxstreams.UnpackFields(letter.Payload)
		require.NoError(t, err)
		assert.Equal(t, fields, restored)
		assert.Equal(t, id, letter.UUID)
		assert.Contains(t, letter.Metadata.Get(middleware.ReasonForPoisonedKey), "this is broken")
		assert.Equal(t, topic, letter.Metadata.Get(middleware.PoisonedTopicKey))
		assert.Equal(t, id, letter.Metadata.Get(goxstreams.DeadEntryIDKey))
		assert.Equal(t, testGroup, letter.Metadata.Get(goxstreams.DeadGroupKey))
		assert.Equal(t, "broken", letter.Metadata.Get(goxstreams.DeadKindKey))
		assert.Equal(t, "1", letter.Metadata.Get(goxstreams.DeadDeliveriesKey))
		eventually(t, func() bool { s := stats(t, sub); return s.Broken == 1 && s.Dead == 1 })
	})
	t.Run("Handled", func(t *testing.T) {
		calls := make(chan goxstreams.BrokenMessage, 10)
		client, topic, sub, messages := open(t, func(ctx context.Context, b goxstreams.BrokenMessage) error {
			calls <- b
			return ctx.Err()
		})
		id := addRaw(t, client, topic, fields...)
		follows(t, client, topic, messages)
		eventuallySettled(t, client, topic, testGroup)
		require.NoError(t, sub.Close())
		require.Len(t, calls, 1)
		b := <-calls
		assert.ErrorIs(t, b.Err, goxstreams.ErrBroken)
		assert.ErrorContains(t, b.Err, "this is broken")
		b.Err = nil
		assert.Equal(t, goxstreams.BrokenMessage{Topic: topic, ID: id, Fields: fields}, b)
		assert.Empty(t, deadLetters(t, client, topic))
	})
	for _, how := range []string{"Error", "Panic"} {
		t.Run(how, func(t *testing.T) {
			calls := make(chan int64, 10)
			client, topic, _, messages := open(t, func(_ context.Context, b goxstreams.BrokenMessage) error {
				calls <- b.RetryCount
				switch {
				case b.RetryCount == 3:
					return nil
				case how == "Panic":
					panic("test")
				}
				return errors.New("test")
			})
			addRaw(t, client, topic, fields...)
			follows(t, client, topic, messages)
			for n := range int64(4) {
				select {
				case got := <-calls:
					assert.Equal(t, n, got)
				case <-time.After(patience):
					require.FailNow(t, "it does not come again")
				}
			}
			follows(t, client, topic, messages)
			eventuallySettled(t, client, topic, testGroup)
			assert.Empty(t, deadLetters(t, client, topic))
		})
	}
	t.Run("Hangs", func(t *testing.T) {
		hangs, goOn := make(chan struct{}), make(chan struct{})
		client, topic, _, messages := open(t, func(context.Context, goxstreams.BrokenMessage) error {
			close(hangs)
			<-goOn
			return nil
		})
		addRaw(t, client, topic, fields...)
		select {
		case <-hangs:
		case <-time.After(patience):
			require.FailNow(t, "OnBroken is not called")
		}
		follows(t, client, topic, messages)
		follows(t, client, topic, messages)
		eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == 1 }, "only the broken one is pending")
		close(goOn)
		eventuallySettled(t, client, topic, testGroup)
	})
}

// TestTrimmed: an entry is deleted from the stream while it is pending. Nothing
// can be done about it, but to say so.
func TestTrimmed(t *testing.T) {
	t.Parallel()
	isLost := func(log logRecorder, id string) func() bool {
		return func() bool {
			return slices.ContainsFunc(logLinesWith(log.Errors(), "lost: trimmed or deleted while pending"), func(l string) bool { return strings.Contains(l, id) })
		}
	}
	for _, at := range []string{"Acked", "Nacked", "Waiting", "Dead", "OfADeadConsumer"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client, log := topic(t), newClient(t), newLogRecorder()
			config := claiming(client)
			config.Retry = &goxstreams.Retry{InitialInterval: 50 * time.Millisecond}
			if at == "Waiting" {
				config.Retry.InitialInterval = 2 * minIdle
			}
			if at == "Dead" {
				config.Retry.MaxRetries = -1
			}
			lost := 1
			if at == "OfADeadConsumer" {
				lost = 700 // more than a look at them sees at a time
			}
			publishN(t, client, topic, lost)
			createGroup(t, client, topic, testGroup)
			del := func(ids ...string) { require.NoError(t, client.XDel(t.Context(), topic, ids...).Err()) }
			if at == "OfADeadConsumer" {
				ids := readAs(t, client, topic, testGroup, "dead", lost)
				aged := []any{"xclaim", topic, testGroup, "dead", 0} // 7.0 takes the time anew for each that is read
				for _, id := range ids {
					aged = append(aged, id)
				}
				require.NoError(t, client.Do(t.Context(), append(aged, "idle", minIdle.Milliseconds(), "justid")...).Err())
				del(ids...)
			}
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			if at == "OfADeadConsumer" {
				eventually(t, isLost(log, fmt.Sprintf("entries:%d", lost)), "that they are lost is not logged")
			} else {
				msg := next(t, messages)
				id := delivery(t, msg).ID
				switch at {
				case "Acked":
					del(id)
					eventually(t, isLost(log, id))
					assert.NoError(t, msg.Context().Err(), "nobody else can have it")
					msg.Ack()
				case "Nacked", "Dead":
					del(id)
					msg.Nack()
				case "Waiting":
					msg.Nack()
					eventually(t, func() bool { return stats(t, sub).Waiting == 1 })
					del(id)
				}
				eventually(t, isLost(log, id), "that it is lost is not logged")
			}
			eventually(t, func() bool { return stats(t, sub).Lost == int64(lost) })
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
			eventuallySettled(t, client, topic, testGroup)
			publish(t, client, topic, "last")
			msg := next(t, messages)
			assert.Equal(t, "last", string(msg.Payload))
			msg.Ack()
			require.NoError(t, sub.Close())
			assert.Empty(t, deadLetters(t, client, topic))
			assert.Len(t, log.Errors(), 1)
		})
	}
}

// hasCommand reports whether the server knows the command.
func hasCommand(t testing.TB, client *redis.Client, name string) bool {
	t.Helper()
	v, err := client.Do(context.Background(), "command", "info", name).Slice()
	require.NoError(t, err)
	return len(v) > 0 && v[0] != nil
}

// TestDeleteAcked: acked entries leave the stream, when nobody needs them.
func TestDeleteAcked(t *testing.T) {
	t.Parallel()
	consume := func(t *testing.T, client *redis.Client, topic, group string, n int) *goxstreams.Subscriber {
		t.Helper()
		config := grouped(client)
		config.ConsumerGroup = group
		config.DeleteAcked = true
		config.Retry = quickRetry()
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		next(t, messages).Nack() // it stays
		require.Len(t, collect(messages, n, patience), n)
		eventuallySettled(t, client, topic, group)
		return sub
	}
	t.Run("OneGroup", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		publishN(t, client, topic, 50)
		sub := consume(t, client, topic, "a", 50)
		require.NoError(t, sub.Close())
		assert.Zero(t, client.XLen(t.Context(), topic).Val())
	})
	t.Run("SeveralGroups", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		publishN(t, client, topic, 50)
		createGroup(t, client, topic, "a")
		createGroup(t, client, topic, "b")
		if !hasCommand(t, client, "xackdel") {
			config := grouped(client)
			config.ConsumerGroup = "a"
			config.DeleteAcked = true
			_, err := newSubscriber(t, config).Subscribe(t.Context(), topic)
			require.ErrorIs(t, err, goxstreams.ErrUnsupported)
			assert.Empty(t, client.XInfoConsumers(t.Context(), topic, "a").Val(), "a name is left of a refused Subscribe")
			return
		}
		require.NoError(t, consume(t, client, topic, "a", 50).Close())
		assert.EqualValues(t, 50, client.XLen(t.Context(), topic).Val(), "the other group needs them")
		require.NoError(t, consume(t, client, topic, "b", 50).Close())
		assert.Zero(t, client.XLen(t.Context(), topic).Val())
	})
	t.Run("AnotherGroupLater", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		config := grouped(client)
		config.ConsumerGroup = "a"
		config.DeleteAcked = true
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		createGroup(t, client, topic, "b")
		publishN(t, client, topic, 10)
		require.Len(t, collect(messages, 10, patience), 10)
		eventuallySettled(t, client, topic, "a")
		config = grouped(client)
		config.ConsumerGroup = "b"
		assert.Len(t, collect(subscribe(t, newSubscriber(t, config), topic), 10, patience), 10, "the later group's messages are deleted")
	})
}

// TestNoAck: at most once.
func TestNoAck(t *testing.T) {
	t.Parallel()
	topic, client := topic(t), newClient(t)
	config := grouped(client)
	config.NoAck = true
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "nacked", "acked")
	msg := next(t, messages)
	assert.Equal(t, "nacked", string(msg.Payload))
	assert.Empty(t, pendingOf(t, client, topic, testGroup))
	msg.Nack()
	msg = next(t, messages)
	assert.Equal(t, "acked", string(msg.Payload), "it came again")
	msg.Ack()
	require.NoError(t, sub.Close())
	messages = subscribe(t, newSubscriber(t, config), topic)
	publish(t, client, topic, "last")
	msg = next(t, messages)
	assert.Equal(t, "last", string(msg.Payload), "it came again, to another consumer")
	msg.Ack()
	assert.Empty(t, pendingOf(t, client, topic, testGroup))
}

func consumersOf(t testing.TB, client *redis.Client, topic string) []string {
	t.Helper()
	infos, err := client.XInfoConsumers(context.Background(), topic, testGroup).Result()
	require.NoError(t, err)
	var names []string
	for _, info := range infos {
		names = append(names, info.Name)
	}
	return names
}

// TestConsumerNames: names that nobody uses leave the group, with nothing lost.
func TestConsumerNames(t *testing.T) {
	t.Parallel()
	t.Run("Close", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		config := grouped(client)
		config.CloseTimeout = patience // after which the name would stay
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		publish(t, client, topic, "")
		next(t, messages).Ack()
		assert.Len(t, consumersOf(t, client, topic), 1)
		require.NoError(t, sub.Close())
		assert.Empty(t, consumersOf(t, client, topic))
	})
	t.Run("CloseWithSomethingPending", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		config := grouped(client)
		config.CloseTimeout = 10 * time.Millisecond
		sub := newSubscriber(t, config)
		publish(t, client, topic, "")
		msg := next(t, subscribe(t, sub, topic))
		require.NoError(t, sub.Close()) // abandons it
		assert.Equal(t, []string{delivery(t, msg).Consumer}, consumersOf(t, client, topic))
		assert.Len(t, pendingOf(t, client, topic, testGroup), 1)
	})
	t.Run("Janitor", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		publishN(t, client, topic, 2)
		createGroup(t, client, topic, testGroup)
		require.NoError(t, client.XGroupCreateConsumer(t.Context(), topic, testGroup, "idle").Err())
		busy := readAs(t, client, topic, testGroup, "busy", 1)
		config := grouped(client)
		config.ClaimMinIdle = 5 * time.Minute
		config.ConsumerTimeout = 200 * time.Millisecond
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		held := next(t, messages)
		live := delivery(t, held).Consumer
		eventually(t, func() bool { return !slices.Contains(consumersOf(t, client, topic), "idle") })
		// Longer than two rounds of the janitor, in which whoever is idle goes.
		during(t, 3*config.ConsumerTimeout, func() bool {
			names := consumersOf(t, client, topic)
			return slices.Contains(names, "busy") && slices.Contains(names, live)
		}, "a consumer with something pending is removed")
		held.Ack()
		eventually(t, func() bool {
			rows := pendingOf(t, client, topic, testGroup)
			return len(rows) == 1 && rows[0].ID == busy[0]
		})
		// If the live one is removed, that must not cost it a message.
		require.NoError(t, client.XGroupDelConsumer(t.Context(), topic, testGroup, live).Err())
		publish(t, client, topic, "last")
		msg := next(t, messages)
		assert.Equal(t, "last", string(msg.Payload))
		msg.Ack()
	})
}

// outageLogged counts what a log says of outages' beginnings and ends.
func outageLogged(log logRecorder) (began, ended int) {
	for _, l := range log.Errors() {
		if strings.Contains(l, "does not serve") {
			began++
		}
	}
	for _, l := range log.Infos() {
		if strings.Contains(l, "serves the subscription again") {
			ended++
		}
	}
	return began, ended
}

// eventuallyLogged waits until the log says that so many outages began, and as
// many ended: Stats knows of an end a moment before.
func eventuallyLogged(t testing.TB, log logRecorder, outages int) {
	t.Helper()
	eventually(t, func() bool { _, ended := outageLogged(log); return ended >= outages }, "the end is not logged")
	began, ended := outageLogged(log)
	assert.Equal(t, outages, began, "logged: %v", log.Errors())
	assert.Equal(t, outages, ended)
}

// TestRecovery: Redis refuses a command for a while.
func TestRecovery(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"xreadgroup", "xack", "xclaim"} {
		t.Run("NOPERM/"+command, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, admin, log := topic(t), newClient(t), newLogRecorder()
			client := aclUser(t, admin)
			var tries atomic.Int64
			client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if cmd.Name() == command || command == "xclaim" && isRenewal(cmd) {
					tries.Add(1)
				}
				return next()
			}})
			config := claiming(client)
			config.MaxConcurrency = 2
			config.BlockTime = 50 * time.Millisecond // 7.0 still serves a read that waits
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			publish(t, admin, topic, "held")
			held := next(t, messages)

			setUser(t, admin, client.Options().Username, "-"+command)
			if command == "xack" {
				held.Ack()
			}
			eventually(t, func() bool { return stats(t, sub).Err != nil })
			assert.Regexp(t, "NOPERM|ACL failure in script|executing the script can't", stats(t, sub).Err.Error())
			assert.WithinDuration(t, time.Now(), stats(t, sub).Since, patience)
			before := tries.Load()
			eventually(t, func() bool { return tries.Load() >= before+3 }, "it does not try again")
			publish(t, admin, topic, "meanwhile")
			began, ended := outageLogged(log)
			assert.Equal(t, 1, began, "logged: %v", log.Errors())
			assert.Zero(t, ended)

			setUser(t, admin, client.Options().Username, "+"+command)
			msg := next(t, messages)
			assert.Equal(t, "meanwhile", string(msg.Payload))
			assert.EqualValues(t, 1, delivery(t, msg).Count)
			msg.Ack()
			if command != "xack" {
				assert.NoError(t, held.Context().Err(), "the lease is lost")
				held.Ack()
			}
			eventuallySettled(t, admin, topic, testGroup)
			eventually(t, func() bool { return stats(t, sub).Err == nil })
			assert.EqualValues(t, 2, stats(t, sub).Delivered)
			eventuallyLogged(t, log, 1)
		})
	}
	t.Run("OOM", func(t *testing.T) {
		t.Parallel()
		server := testserver.Private(t)
		topic, admin, log := topic(t), server.Client(), newLogRecorder()
		client := server.Client()
		var moves atomic.Int64
		client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
			if isMove(cmd) {
				moves.Add(1)
			}
			return next()
		}})
		config := claiming(client)
		config.Retry = &goxstreams.Retry{MaxRetries: -1, InitialInterval: 20 * time.Millisecond}
		sub := newSubscriberLog(t, config, log)
		messages := subscribe(t, sub, topic)
		publish(t, admin, topic, "dies", "lives")
		msg := next(t, messages)
		require.NoError(t, admin.ConfigSet(t.Context(), "maxmemory", "1").Err())
		msg.Nack()
		msg = next(t, messages)
		assert.Equal(t, "lives", string(msg.Payload), "the dead one is handled again, or holds up the others")
		msg.Ack()
		eventually(t, func() bool { return moves.Load() >= 3 }, "it does not try again")
		require.Error(t, stats(t, sub).Err)
		assert.ErrorContains(t, stats(t, sub).Err, "OOM")
		began, _ := outageLogged(log)
		assert.Equal(t, 1, began, "logged: %v", log.Errors())
		assert.Len(t, pendingOf(t, admin, topic, testGroup), 1)

		require.NoError(t, admin.ConfigSet(t.Context(), "maxmemory", "0").Err())
		eventuallySettled(t, admin, topic, testGroup)
		eventually(t, func() bool { return stats(t, sub).Err == nil })
		eventuallyLogged(t, log, 1)
		require.NoError(t, sub.Close())
		letters := deadLetters(t, admin, topic)
		require.Len(t, letters, 1)
		assert.Equal(t, "dies", string(letters[0].Payload))
	})
}

// TestFlakyConnection: commands are lost on their way, or their answers, one in
// ten. Two consumers with failing and succeeding handlers lose nothing, bury
// nothing twice and count right.
func TestFlakyConnection(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 16} {
		t.Run(fmt.Sprintf("MaxConcurrency=%d", concurrency), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			const maxRetries, each = 3, 150
			topic, client := topic(t), newClient(t)
			var n atomic.Int64
			var on atomic.Bool // once all have subscribed
			flaky := &hook{process: func(_ context.Context, _ redis.Cmder, next func() error) error {
				if !on.Load() {
					return next()
				}
				switch n.Add(1) % 20 {
				case 7:
					return io.EOF
				case 14:
					_ = next()
					return io.EOF
				}
				return next()
			}}
			handled := newTally()
			var subs []*goxstreams.Subscriber
			for range 2 {
				config := grouped(newClient(t, flaky))
				config.MaxConcurrency = concurrency
				config.Retry = &goxstreams.Retry{MaxRetries: maxRetries, InitialInterval: time.Millisecond, MaxInterval: 5 * time.Millisecond}
				sub := newSubscriber(t, config)
				messages := subscribe(t, sub, topic)
				subs = append(subs, sub)
				go func() {
					for msg := range messages {
						handled.add(msg)
						if string(msg.Payload) == "bad" {
							msg.Nack()
						} else {
							msg.Ack()
						}
					}
				}()
			}
			on.Store(true)
			var good, bad []string
			for range each {
				uuids := publish(t, client, topic, "good", "bad")
				good, bad = append(good, uuids[0]), append(bad, uuids[1])
			}
			eventually(t, func() bool {
				info, err := client.XInfoGroups(t.Context(), topic).Result()
				return err == nil && info[0].Pending == 0 && info[0].Lag == 0
			}, "something is stranded")
			for _, sub := range subs {
				require.NoError(t, sub.Close())
			}
			for _, uuid := range good {
				assert.Equal(t, 1, handled.uuids[uuid], "good message %s", uuid)
			}
			for _, uuid := range bad {
				assert.Equal(t, maxRetries+1, handled.uuids[uuid], "bad message %s", uuid)
			}
			assert.Equal(t, map[int64]int{1: 2 * each, 2: each, 3: each, 4: each}, handled.counts)
			assert.ElementsMatch(t, bad, uuids(deadLetters(t, client, topic)))
		})
	}
}
