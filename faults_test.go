package goxstreams_test

import (
	"context"
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

// Each test is named after a fault of the libraries that came before,
// watermill-redisstream and goxstreams, and keeps it out of this one.

// watermill-redisstream: one entry that is no message ends the subscription. Its
// channel closes, while its reader goes on taking entries that nobody gets; the
// entry stays pending, and the next subscriber dies on claiming it.
//
// Here a broken entry is moved aside, the first time or after a claim, and the
// next entry follows.
func TestFault01_BrokenEntryStopsNothing(t *testing.T) {
	client := newClient(t)
	topic := topic(t)
	addBroken := func() {
		// Its metadata is no MessagePack.
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{
			goxstreams.UUIDHeaderKey, "broken", "metadata", "\xc1", "payload", "x",
		}}).Err())
	}
	dead := func() int64 { return client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val() }

	// What a process left that died on it.
	createGroup(t, client, topic, testGroup)
	addBroken()
	readAs(t, client, topic, testGroup, "died", 1)

	config := grouped(client)
	config.ClaimMinIdle = 300 * time.Millisecond
	messages := subscribe(t, newSubscriber(t, config), topic)
	eventually(t, func() bool { return dead() == 1 }, "the pending entry is not moved")

	publish(t, client, topic, "before")
	addBroken()
	addBroken()
	publish(t, client, topic, "after")
	require.Equal(t, []string{"before", "after"}, payloads(collect(messages, 2, patience)))
	eventuallySettled(t, client, topic, testGroup)
	require.EqualValues(t, 3, dead())

	// The subscription that met them is alive, and so is the next one.
	publish(t, client, topic, "alive")
	require.Equal(t, []string{"alive"}, payloads(collect(messages, 1, patience)))
}

// watermill-redisstream: Router.Close cancels the subscription's context, and
// the subscription does not wait for the handler that is at work. That handler
// succeeds, its ack is dropped, and the message is handled again.
func TestFault02_RouterCloseKeepsAcks(t *testing.T) {
	for _, concurrency := range []int{1, 4} {
		t.Run(fmt.Sprint("MaxConcurrency", concurrency), func(t *testing.T) {
			client := newClient(t)
			topic := topic(t)
			config := grouped(client)
			config.MaxConcurrency = concurrency
			config.CloseTimeout = patience

			router, err := message.NewRouter(message.RouterConfig{CloseTimeout: patience}, watermill.NopLogger{})
			require.NoError(t, err)
			sub := &contextCatcher{Subscriber: newSubscriber(t, config)}
			var working sync.WaitGroup
			working.Add(concurrency)
			var early atomic.Value
			router.AddConsumerHandler("handler", topic, sub, func(msg *message.Message) error {
				working.Done()
				<-sub.ctx.Done() // the router is closing
				if err := msg.Context().Err(); err != nil {
					early.Store(err)
				}
				return nil
			})
			ran := make(chan error, 1)
			go func() { ran <- router.Run(context.Background()) }()

			publishN(t, client, topic, concurrency)
			working.Wait()
			require.NoError(t, router.Close())
			require.NoError(t, <-ran)

			require.Empty(t, pendingOf(t, client, topic, testGroup), "an ack is lost")
			require.Nil(t, early.Load(), "the handler's context ended while it had time")
			publish(t, client, topic, "next")
			again := subscribe(t, newSubscriber(t, grouped(client)), topic)
			require.Equal(t, []string{"next"}, payloads(collect(again, 1, patience)))
		})
	}
}

// contextCatcher remembers the context that it was subscribed with.
type contextCatcher struct {
	message.Subscriber
	ctx context.Context
}

func (c *contextCatcher) Subscribe(ctx context.Context, topic string) (<-chan *message.Message, error) {
	c.ctx = ctx
	return c.Subscriber.Subscribe(ctx, topic)
}

// watermill-redisstream: closing a Subscriber, or a Publisher, closes the client
// that it was given. Whoever else uses it gets "redis: client is closed".
func TestFault03_CloseLeavesTheClientOpen(t *testing.T) {
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

// Both peers take a message that has been at work for long for an abandoned one.
// watermill-redisstream handled one three times, twice at once; goxstreams then
// declared it dead and deleted it.
//
// Here the holder renews its lease. That the other consumer would have claimed
// the slow message is shown by what it does claim: an entry that was left
// pending by a dead process, after the slow handler had begun.
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

type contextKey struct{}

// watermill-redisstream: after a nack it sends a copy of the message, which has
// lost its context: no values, and it never ends. What the handler did to the
// metadata is still there.
//
// Here each delivery is made of the entry anew.
func TestFault05_RedeliveryIsAFreshMessage(t *testing.T) {
	for _, tt := range []struct {
		name        string
		group       string
		concurrency int
	}{{"GroupOrdered", testGroup, 1}, {"GroupConcurrent", testGroup, 2}, {"FanOut", "", 1}} {
		t.Run(tt.name, func(t *testing.T) {
			client := newClient(t)
			topic := topic(t)
			config := goxstreams.SubscriberConfig{Client: client, ConsumerGroup: tt.group, MaxConcurrency: tt.concurrency}
			if tt.group != "" {
				config.Retry = quickRetry()
			}
			sub := newSubscriber(t, config)
			messages, err := sub.Subscribe(context.WithValue(context.Background(), contextKey{}, "value"), topic)
			require.NoError(t, err)
			sent := message.NewMessage("uuid", message.Payload("payload"))
			sent.Metadata.Set("key", "value")
			require.NoError(t, newPublisher(t, client).Publish(topic, sent))

			for n := int64(1); n <= 3; n++ {
				msg := next(t, messages)
				require.Equal(t, "uuid", msg.UUID)
				require.Equal(t, "payload", string(msg.Payload))
				require.Equal(t, message.Metadata{"key": "value"}, msg.Metadata)
				require.Equal(t, "value", msg.Context().Value(contextKey{}))
				require.Equal(t, n, delivery(t, msg).Count)
				require.NoError(t, msg.Context().Err())

				msg.Metadata.Set("key", "changed")
				msg.Metadata.Set("more", "added")
				copy(msg.Payload, "changed")
				if n < 3 {
					require.True(t, msg.Nack())
				} else {
					require.True(t, msg.Ack())
				}
				eventually(t, func() bool { return msg.Context().Err() != nil }, "the context outlives the delivery")
			}
		})
	}
}

// watermill-redisstream: nacks are its own affair. After ten of them Redis still
// counts one delivery; nothing limits them, and a restart begins at the beginning.
func TestFault06_RedisCountsNacks(t *testing.T) {
	for _, concurrency := range []int{1, 2} {
		t.Run(fmt.Sprint("MaxConcurrency", concurrency), func(t *testing.T) {
			client := newClient(t)
			topic := topic(t)
			publish(t, client, topic, "bad")
			died := make(chan goxstreams.DeadMessage, 1)
			config := grouped(client)
			config.MaxConcurrency = concurrency
			config.Retry = quickRetry()
			config.Retry.MaxRetries = 10
			config.OnDead = func(_ context.Context, dead goxstreams.DeadMessage) { died <- dead }

			nack := func(messages <-chan *message.Message, count int64) {
				msg := next(t, messages)
				d := delivery(t, msg)
				require.Equal(t, count, d.Count)
				require.Equal(t, count-1, d.RetryCount())
				rows := pendingOf(t, client, topic, testGroup)
				require.Len(t, rows, 1)
				require.Equal(t, count, rows[0].RetryCount, "Redis counts differently")
				require.True(t, msg.Nack())
			}
			first := newSubscriber(t, config)
			messages := subscribe(t, first, topic)
			for n := int64(1); n <= 4; n++ {
				nack(messages, n)
			}
			// Closed once the nack has taken effect: a nack that a closing
			// subscription sees counts as no failure.
			eventually(t, func() bool { return stats(t, first).Nacked == 4 })
			eventually(t, func() bool {
				rows := pendingOf(t, client, topic, testGroup)
				return len(rows) == 1 && rows[0].RetryCount == 5
			}, "the fifth delivery never began")
			require.NoError(t, first.Close())

			messages = subscribe(t, newSubscriber(t, config), topic)
			for n := int64(5); n <= 11; n++ {
				nack(messages, n)
			}
			select {
			case dead := <-died:
				assert.Equal(t, goxstreams.Exhausted, dead.Kind)
				assert.EqualValues(t, 11, dead.Deliveries)
			case <-time.After(patience):
				require.FailNow(t, "it did not die")
			}
			require.Empty(t, pendingOf(t, client, topic, testGroup))
			require.EqualValues(t, 1, client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val())
		})
	}
}

// Both peers: after FLUSHALL, XGROUP DESTROY or DEL, every read fails with
// NOGROUP for ever; the group is made only when subscribing.
//
// Here the group is made again. What was in hand then is still this
// subscription's: nobody gets it a second time, and its ack counts.
func TestFault07_LostGroupIsMadeAgain(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, tt := range []struct {
		name  string
		lose  func(ctx context.Context, client *redis.Client, topic string) error
		stays bool // the stream's entries
	}{
		{"DESTROY", func(ctx context.Context, client *redis.Client, topic string) error {
			return client.XGroupDestroy(ctx, topic, testGroup).Err()
		}, true},
		{"DEL", func(ctx context.Context, client *redis.Client, topic string) error {
			return client.Del(ctx, topic).Err()
		}, false},
		{"FLUSHALL", func(ctx context.Context, client *redis.Client, _ string) error {
			return client.FlushAll(ctx).Err()
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client := testserver.Private(t).Client()
			topic := topic(t)
			log := newLogRecorder()
			config := grouped(client)
			config.MaxConcurrency = 2
			config.BlockTime = time.Minute // it must notice sooner
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "acked")
			require.Len(t, collect(messages, 1, patience), 1)
			eventuallySettled(t, client, topic, testGroup)
			publish(t, client, topic, "in hand")
			held := next(t, messages)
			eventuallyBlocked(t, client)
			eventuallyLater(t, client, delivery(t, held).ID)
			require.NoError(t, tt.lose(t.Context(), client, topic))
			publish(t, client, topic, "1", "2", "3")
			require.Equal(t, []string{"1", "2", "3"}, payloads(collect(messages, 3, patience)))
			require.NoError(t, held.Context().Err())
			if tt.stays {
				eventually(t, func() bool {
					rows := pendingOf(t, client, topic, testGroup)
					return len(rows) == 1 && rows[0].ID == delivery(t, held).ID
				}, "what is in hand is not pending again")
			}
			require.True(t, held.Ack())
			eventuallySettled(t, client, topic, testGroup)
			eventually(t, func() bool { return stats(t, sub).Err == nil }, "the outage goes on")

			publish(t, client, topic, "after")
			require.Equal(t, []string{"after"}, payloads(collect(messages, 1, patience)))
			require.LessOrEqual(t, len(log.Errors()), 3, "the log is flooded: %s", log.Errors())
			require.Contains(t, strings.Join(log.Errors(), "\n"), "group was lost")
		})
	}

	// The stream that follows may begin with IDs that the old one has passed: the
	// server's clock was set back, or the IDs are given by hand.
	t.Run("SmallerIDs", func(t *testing.T) {
		client := newClient(t)
		topic := topic(t)
		messages := subscribe(t, newSubscriber(t, grouped(client)), topic)
		publish(t, client, topic, "old")
		require.Len(t, collect(messages, 1, patience), 1)
		eventuallySettled(t, client, topic, testGroup)
		require.NoError(t, client.Del(t.Context(), topic).Err())
		for _, id := range []string{"1-1", "1-2"} {
			require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: id, Values: []string{
				goxstreams.UUIDHeaderKey, id, "payload", id,
			}}).Err())
		}
		require.Equal(t, []string{"1-1", "1-2"}, payloads(collect(messages, 2, patience)))
	})
}

// eventuallyBlocked waits until a client of the server is blocked in a read.
func eventuallyBlocked(t *testing.T, client *redis.Client) {
	t.Helper()
	eventually(t, func() bool { return blocked(t, client) > 0 }, "nobody reads")
}

// blocked returns how many clients of the server wait in a read.
func blocked(t *testing.T, client *redis.Client) int {
	t.Helper()
	list, err := client.ClientList(context.Background()).Result()
	require.NoError(t, err)
	n := 0
	for line := range strings.Lines(list) {
		if strings.Contains(line, " flags=b") && strings.Contains(line, " cmd=xread") {
			n++
		}
	}
	return n
}

// watermill-redisstream: a nacked message's delay is a sleep, and Close waits for
// it: 4 s of 4 s.
func TestFault08_CloseDoesNotWaitForARetry(t *testing.T) {
	for _, concurrency := range []int{1, 2} {
		t.Run(fmt.Sprint("MaxConcurrency", concurrency), func(t *testing.T) {
			const delay = time.Minute
			client := newClient(t)
			topic := topic(t)
			config := grouped(client)
			config.MaxConcurrency = concurrency
			config.Retry = &goxstreams.Retry{InitialInterval: delay}
			config.CloseTimeout = 10 * time.Minute
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "nacked")
			require.True(t, next(t, messages).Nack())
			eventually(t, func() bool { return stats(t, sub).Waiting == 1 }, "it does not wait for its retry")

			began := time.Now()
			require.NoError(t, sub.Close())
			require.Less(t, time.Since(began), delay/2, "Close waited for the retry")

			// Nor does the next consumer wait. The failure counts.
			msg := next(t, subscribe(t, newSubscriber(t, config), topic))
			require.EqualValues(t, 2, delivery(t, msg).Count)
			msg.Ack()
		})
	}
}

// watermill-redisstream: a cancelled context does not end a blocked read. It goes
// on after Close, for a minute, takes the next message that is published, and
// that one is pending with a consumer that does not exist any more.
//
// Here Close wakes the read and waits until it has ended.
func TestFault09_NoReadOutlivesClose(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, tt := range []struct{ name, group string }{{"Group", testGroup}, {"FanOut", ""}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			// A server of its own, so that no blocked read is somebody else's.
			client := testserver.Private(t).Client()
			topic := topic(t)
			config := goxstreams.SubscriberConfig{Client: client, ConsumerGroup: tt.group, BlockTime: 2 * patience, CloseTimeout: patience}
			sub := newSubscriber(t, config)
			subscribe(t, sub, topic)
			eventuallyBlocked(t, client)

			began := time.Now()
			require.NoError(t, sub.Close())
			require.Less(t, time.Since(began), config.BlockTime/2, "Close waited for the read")
			require.Zero(t, blocked(t, client), "a read goes on")
			if tt.group == "" {
				return
			}
			publish(t, client, topic, "next")
			msg := next(t, subscribe(t, newSubscriber(t, config), topic))
			require.EqualValues(t, 1, delivery(t, msg).Count)
			msg.Ack()
		})
	}

	// CLIENT UNBLOCK does nothing if it arrives before the read that it is for.
	t.Run("WokenTooEarly", func(t *testing.T) {
		t.Parallel()
		woken := make(chan struct{})
		once := sync.Once{}
		var closing atomic.Bool
		reading := make(chan struct{}, 1)
		client := testserver.Private(t).Client()
		client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, run func() error) error {
			switch cmd.Name() {
			case "xreadgroup": // held up until a wake-up was in vain
				select {
				case reading <- struct{}{}:
				default:
				}
				<-woken
			case "client":
				err := run()
				if closing.Load() && strings.EqualFold(fmt.Sprint(cmd.Args()[1]), "unblock") {
					once.Do(func() { close(woken) })
				}
				return err
			}
			return run()
		}})
		config := grouped(client)
		config.BlockTime = 2 * patience
		config.CloseTimeout = patience
		sub := newSubscriber(t, config)
		subscribe(t, sub, topic(t))
		<-reading
		closing.Store(true)
		began := time.Now()
		require.NoError(t, sub.Close())
		require.Less(t, time.Since(began), config.BlockTime/2, "the read was woken once only, too early")
	})
}

// watermill-redisstream looks at one page of the pending entries, from the
// beginning. When that is full of entries that may not be claimed yet, it never
// comes to a later one, and a subscriber that meets such a page at its start
// never comes to read what is new.
//
// Here more entries than a page has are idle for just long enough to be listed,
// every time; their holder is alive, so that no claim of them is granted.
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

	// The living holder is heard of before each look and before each claim.
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

// watermill-redisstream reads one entry at a time and acks each by itself:
// 14,600 messages/s where the server gives 250,000.
//
// How fast a machine is proves nothing, how many commands it takes does. The
// first XACK is answered when the handler is through, so that all later acks
// have gathered meanwhile.
func TestFault11_ReadsAndAcksComeInBatches(t *testing.T) {
	const n = 5000
	handled := make(chan struct{})
	counter, counts := countCommands()
	client := newClient(t, counter, &hook{process: func(_ context.Context, cmd redis.Cmder, run func() error) error {
		if cmd.Name() == "xack" {
			select {
			case <-handled:
			case <-time.After(patience):
			}
		}
		return run()
	}})
	topic := topic(t)
	plain := newClient(t)
	sent := publishN(t, plain, topic, n)
	sub := newSubscriber(t, grouped(client))
	got := collect(subscribe(t, sub, topic), n, 2*patience)
	close(handled)
	require.Equal(t, sent, uuids(got))
	eventuallySettled(t, plain, topic, testGroup)

	// 100 a read and 1,000 an ack, but the prefetch starts small, and is made
	// smaller where a slow machine consumes it slowly.
	t.Logf("%d messages: %d XREADGROUP, %d XACK", n, counts.of("xreadgroup"), counts.of("xack"))
	require.Less(t, counts.of("xreadgroup"), n/10)
	require.Less(t, counts.of("xack"), n/100)
}

// watermill-redisstream: in fan-out the first read asks for "$", what comes after
// the moment at which the server sees it. What was published between
// Subscribe's return and that moment is lost: 10 messages of 20.
//
// Here that moment is held up until the message is there.
func TestFault12_FanOutLosesNothingAfterSubscribe(t *testing.T) {
	for _, old := range []int{0, 3} {
		t.Run(fmt.Sprint("OldEntries", old), func(t *testing.T) {
			published := make(chan struct{})
			client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, run func() error) error {
				if cmd.Name() == "xread" {
					<-published
				}
				return run()
			}})
			topic := topic(t)
			publishN(t, client, topic, old)
			one := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), topic)
			two := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), topic)
			sent := publish(t, client, topic, "a", "b", "c")
			close(published)
			require.Equal(t, sent, uuids(collect(one, 3, patience)))
			require.Equal(t, sent, uuids(collect(two, 3, patience)))
		})
	}
}
