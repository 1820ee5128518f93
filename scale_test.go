package goxstreams_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
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

// manyTopics subscribes to n topics on one Subscriber, and returns them with
// their channels.
func manyTopics(t testing.TB, sub *goxstreams.Subscriber, n int) ([]string, map[string]<-chan *message.Message) {
	t.Helper()
	base := topic(t)
	topics := make([]string, n)
	channels := make(map[string]<-chan *message.Message, n)
	for i := range topics {
		topics[i] = fmt.Sprintf("%s-%d", base, i)
		channels[topics[i]] = subscribe(t, sub, topics[i])
	}
	return topics, channels
}

// named returns a client whose connections, including those that the library opens
// itself, have a unique name at the server.
func named(t testing.TB, change ...func(*redis.Options)) (*redis.Client, string) {
	t.Helper()
	opt := &redis.Options{Addr: testserver.Addr(t), ClientName: watermill.NewShortUUID()}
	for _, f := range change {
		f(opt)
	}
	client := redis.NewClient(opt)
	t.Cleanup(func() { _ = client.Close() })
	return client, opt.ClientName
}

// TestThousandTopics: a thousand topics of one Subscriber use at most eight
// blocking connections and a few others, including the Publisher's on the same
// client; each gets its messages, idle or busy, and Close leaves nothing pending
// and no consumers behind.
func TestThousandTopics(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // CLIENT LIST
	for _, mode := range []string{"Group", "FanOut"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n, each := 1000, 5
			if raceEnabled || testing.Short() {
				n = 200 // the race detector makes it take minutes
			}
			client, name := named(t)
			config := grouped(client)
			if mode == "FanOut" {
				config = goxstreams.SubscriberConfig{Client: client}
			}
			config.CloseTimeout = patience // after which consumers would stay
			// With newSubscriber's short times a thousand idle topics send 20,000
			// commands a second, which starves other tests.
			config.ClaimInterval = time.Second
			sub := newSubscriber(t, config)
			topics, channels := manyTopics(t, sub, n)
			handled := newTally()
			for _, messages := range channels {
				handled.handle(messages, nil)
			}
			admin := newClient(t)
			t.Cleanup(func() { admin.Del(context.Background(), topics...) })

			// One message to each, in random order; then many to all at once.
			pub := newPublisher(t, client)
			for _, i := range rand.Perm(n) {
				require.NoError(t, pub.Publish(topics[i], message.NewMessage(watermill.NewUUID(), nil)))
			}
			eventuallyAll(t, handled.len, n)
			var publishing sync.WaitGroup
			for part := range 10 {
				publishing.Go(func() {
					for i := part; i < n; i += 10 {
						var msgs []*message.Message
						for range each {
							msgs = append(msgs, message.NewMessage(watermill.NewUUID(), nil))
						}
						assert.NoError(t, pub.Publish(topics[i], msgs...))
					}
				})
			}
			publishing.Wait()
			eventuallyAll(t, handled.len, n*(each+1))
			conns := connections(t, admin, name)
			t.Logf("%d connections", len(conns))
			assert.LessOrEqual(t, len(conns), 20, strings.Join(conns, ""))
			assert.LessOrEqual(t, blockedReads(t, admin, name), 8, strings.Join(conns, ""))
			assert.Equal(t, n*(each+1), handled.total(), "handled more than once")
			require.NoError(t, sub.Close())
			if mode == "Group" {
				for _, topic := range topics {
					assert.Empty(t, pendingOf(t, admin, topic, testGroup))
					consumers, err := admin.XInfoConsumers(t.Context(), topic, testGroup).Result()
					require.NoError(t, err)
					assert.Empty(t, consumers, "left behind")
				}
			}
		})
	}
}

// TestSharedReadLosesOneStream: of topics that share their reads some lose their
// stream or group, or become another type, and the others continue; the lost ones
// recover.
func TestSharedReadLosesOneStream(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n = 40
	client := newClient(t)
	logs := newLogRecorder()
	sub, err := goxstreams.NewSubscriber(grouped(client), logs)
	require.NoError(t, err)
	t.Cleanup(func() { _ = sub.Close() })
	topics, channels := manyTopics(t, sub, n)
	get := func(i int, payload string) {
		t.Helper()
		publish(t, client, topics[i], payload)
		msg := next(t, channels[topics[i]])
		require.Equal(t, payload, string(msg.Payload))
		msg.Ack()
	}
	for i := range topics {
		get(i, "before")
	}
	ctx := context.Background()
	require.NoError(t, client.Del(ctx, topics[0]).Err())
	require.NoError(t, client.XGroupDestroy(ctx, topics[1], testGroup).Err())
	_, err = client.TxPipelined(ctx, func(tx redis.Pipeliner) error {
		tx.Del(ctx, topics[2])
		tx.Set(ctx, topics[2], "no stream", 0)
		return nil
	})
	require.NoError(t, err)
	for i := 3; i < n; i++ {
		get(i, "meanwhile")
	}
	get(0, "after")
	get(1, "after")
	eventually(t, func() bool { return outages(sub) == 1 }, "the one of which the key is no stream, and no other")
	require.NoError(t, client.Del(ctx, topics[2]).Err())
	get(2, "after")
	eventually(t, func() bool { return outages(sub) == 0 }, "it works again")
	for i := range topics {
		get(i, "in the end")
	}
}

func outages(sub *goxstreams.Subscriber) int {
	n := 0
	for _, s := range sub.Stats() {
		if s.Err != nil {
			n++
		}
	}
	return n
}

// TestBlockedTopicsDelayNoOther: most topics' handlers do not return, and have more
// messages waiting; the other topics get their messages, and the total number in
// memory stays bounded.
func TestBlockedTopicsDelayNoOther(t *testing.T) {
	t.Parallel()
	const n, blocked, backlog = 300, 200, 300
	client := newClient(t)
	config := grouped(client)
	config.CloseTimeout = 100 * time.Millisecond
	config.ClaimInterval = time.Second // nothing is claimed here
	sub := newSubscriber(t, config)
	topics, channels := manyTopics(t, sub, n)
	t.Cleanup(func() { client.Del(context.Background(), topics...) })
	payloads := make([]string, backlog)
	for i := range payloads {
		payloads[i] = strings.Repeat("x", 100)
	}
	for _, topic := range topics[:blocked] {
		publish(t, client, topic, payloads...)
	}
	// They are fast at first, so that they read ahead.
	for _, topic := range topics[:blocked] {
		require.Len(t, collect(channels[topic], backlog/2, patience), backlog/2)
	}
	for _, topic := range topics[:blocked] {
		next(t, channels[topic]) // and no answer
	}
	for round := range 5 {
		for _, topic := range topics[blocked:] {
			payload := fmt.Sprint(round)
			publish(t, client, topic, payload)
			msg := next(t, channels[topic])
			require.Equal(t, payload, string(msg.Payload))
			msg.Ack()
		}
	}
	held := 0
	for _, s := range sub.Stats() {
		held += s.InFlight
	}
	// Being handled, read ahead (maxAhead), and a last read of each that counted on
	// the same room.
	assert.LessOrEqual(t, held, blocked+10_000+500)
	t.Logf("%d held", held)
}

// TestSharedReadsCannotBeWoken: without permission for CLIENT UNBLOCK topics that
// share reads still get their messages, though later.
func TestSharedReadsCannotBeWoken(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // ACL
	const n = 30
	server := testserver.Private(t)
	ctx := context.Background()
	require.NoError(t, server.Client().Do(ctx, "acl", "setuser", "reader", "on", ">secret", "~*", "+@all", "-client|unblock").Err())
	opt := *server.Client().Options()
	client := redis.NewClient(&redis.Options{Addr: opt.Addr, Username: "reader", Password: "secret"})
	t.Cleanup(func() { _ = client.Close() })
	config := grouped(client)
	config.BlockTime, config.CloseTimeout = 2*patience, 2*patience
	sub := newSubscriber(t, config)
	topics, channels := manyTopics(t, sub, n)
	for range 3 {
		for _, topic := range topics {
			publish(t, client, topic, "to "+topic)
		}
		for topic, messages := range channels {
			msg := next(t, messages)
			require.Equal(t, "to "+topic, string(msg.Payload))
			msg.Ack()
		}
	}
	began := time.Now()
	require.NoError(t, sub.Close())
	assert.Less(t, time.Since(began), patience, "Close waits for more than the reads of 0.1s and their topics' ends")
}

// TestSubscribeAndCloseWhileShared: topics come and go while others that share
// their reads get their messages.
func TestSubscribeAndCloseWhileShared(t *testing.T) {
	t.Parallel()
	const steady, comers, rounds = 20, 8, 30
	client := newClient(t)
	sub := newSubscriber(t, grouped(client))
	topics, channels := manyTopics(t, sub, steady)
	handled := newTally()
	for _, messages := range channels {
		handled.handle(messages, nil)
	}
	base := topic(t)
	var got atomic.Int64
	var coming sync.WaitGroup
	for c := range comers {
		coming.Go(func() {
			name := fmt.Sprintf("%s-%d", base, c)
			for round := range rounds {
				ctx, cancel := context.WithCancel(context.Background())
				messages, err := sub.Subscribe(ctx, name)
				if !assert.NoError(t, err) {
					cancel()
					return
				}
				payload := fmt.Sprint(round)
				publish(t, client, name, payload)
				msg := next(t, messages)
				assert.Equal(t, payload, string(msg.Payload))
				msg.Ack()
				got.Add(1)
				cancel()
				for range messages {
					assert.Fail(t, "a message too many")
				}
			}
		})
	}
	for round := range rounds {
		for _, topic := range topics {
			publish(t, client, topic, fmt.Sprint(round))
		}
	}
	coming.Wait()
	require.EqualValues(t, comers*rounds, got.Load())
	eventuallyAll(t, handled.total, steady*rounds)
	assert.Equal(t, steady*rounds, handled.len())
	for _, topic := range topics {
		eventuallySettled(t, client, topic, testGroup)
	}
}

// TestSameTopicTwice: subscriptions of one topic on one Subscriber compete in a
// group, and each receive everything in a fan-out, whatever else the Subscriber
// reads.
func TestSameTopicTwice(t *testing.T) {
	t.Parallel()
	const others, n = 10, 50
	for _, fanOut := range []bool{false, true} {
		t.Run(fmt.Sprintf("FanOut=%v", fanOut), func(t *testing.T) {
			client := newClient(t)
			config := grouped(client)
			if fanOut {
				config = goxstreams.SubscriberConfig{Client: client}
			}
			sub := newSubscriber(t, config)
			manyTopics(t, sub, others)
			topic := topic(t)
			var tallies []*tally
			for range 3 {
				handled := newTally()
				handled.handle(subscribe(t, sub, topic), nil)
				tallies = append(tallies, handled)
			}
			for i := range n {
				publish(t, client, topic, fmt.Sprint(i))
			}
			sum := func() (total int) {
				for _, handled := range tallies {
					total += handled.total()
				}
				return total
			}
			want := n
			if fanOut {
				want = len(tallies) * n
			}
			eventuallyAll(t, sum, want)
			during(t, 100*time.Millisecond, func() bool { return sum() == want }, "messages too many")
			if fanOut {
				for _, handled := range tallies {
					assert.Equal(t, n, handled.len())
				}
			}
		})
	}
}

// TestDeadAmongMany: a dead consumer's messages are taken over in time, even if the
// list of pending entries is too long, and the consumers too many, for each of them
// to go through it.
func TestDeadAmongMany(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	const living, consumers = 30_000, 1000
	client, topic := newClient(t), topic(t)
	ctx := context.Background()
	createGroup(t, client, topic, testGroup)
	t.Cleanup(func() { client.Del(ctx, topic) })
	publish(t, client, topic, "left behind", "left behind too")
	readAs(t, client, topic, testGroup, "dead", 2)
	for range living / 1000 {
		_, err := client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
			for range 1000 {
				pipe.XAdd(ctx, &redis.XAddArgs{Stream: topic, Values: []string{"k", "v"}})
			}
			return nil
		})
		require.NoError(t, err)
	}
	ids := readAs(t, client, topic, testGroup, "living", living)
	_, err := client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i := range consumers {
			pipe.XGroupCreateConsumer(ctx, topic, testGroup, fmt.Sprint("consumer-", i))
		}
		return nil
	})
	require.NoError(t, err)
	renewing, stop := context.WithCancel(ctx)
	var renewals sync.WaitGroup
	defer renewals.Wait()
	defer stop()
	renewals.Go(func() {
		for renewing.Err() == nil {
			for part := range slices.Chunk(ids, 1000) {
				err := client.XClaimJustID(ctx, &redis.XClaimArgs{Stream: topic, Group: testGroup, Consumer: "living", Messages: part}).Err()
				assert.NoError(t, err)
			}
			time.Sleep(minIdle / 10) // it renews more often than necessary
		}
	})
	config := claiming(client)
	config.MaxConcurrency = 2
	began := time.Now()
	messages := subscribe(t, newSubscriber(t, config), topic)
	got := collect(messages, 2, patience)
	assert.Len(t, got, 2)
	for _, msg := range got {
		assert.EqualValues(t, 2, delivery(t, msg).Count)
	}
	t.Logf("after %s", time.Since(began))
	// Among 1000 consumers even idle ones are looked at only every third of
	// ClaimMinIdle, and the whole list after 10 ClaimMinIdle.
	assert.LessOrEqual(t, time.Since(began), claimTime+minIdle/3+slack)
}

// watermill-redisstream reads a fan-out subscription's first batch without COUNT,
// and keeps one message of it: from "0" the server sends the whole stream (perhaps
// a gigabyte) before the first message is handled. Here a read takes only as much
// as there is room for.
func TestFault13_FanOutReadsTheWholeStream(t *testing.T) {
	t.Parallel()
	const (
		entries = 5000
		payload = 1024
	)
	var received atomic.Int64
	client := redis.NewClient(&redis.Options{
		Addr: testserver.Addr(t),
		Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			return &countingConn{conn, &received}, err
		},
	})
	t.Cleanup(func() { _ = client.Close() })
	topic := topic(t)
	payloads := make([]string, entries)
	for i := range payloads {
		payloads[i] = fmt.Sprintf("%0*d", payload, i)
	}
	publish(t, newClient(t), topic, payloads...)

	sub := newSubscriber(t, goxstreams.SubscriberConfig{Client: client, StartID: "0", BatchSize: 100})
	messages := subscribe(t, sub, topic)
	first := next(t, messages)
	require.Equal(t, payloads[0], string(first.Payload))
	require.Less(t, received.Load(), int64(20*payload), "bytes received for the first message")
	first.Ack()
	// Later, too, at most a batch ahead.
	require.Len(t, collect(messages, 199, patience), 199)
	require.Less(t, received.Load(), int64((200+2*100)*(payload+300)), "bytes received for 200 messages")
}

type countingConn struct {
	net.Conn
	received *atomic.Int64
}

func (c *countingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.received.Add(int64(n))
	return n, err
}

// Each of watermill-redisstream's subscriptions occupies a connection of the pool
// during its blocking read: with ten per core, a process with twenty idle
// subscriptions cannot publish any more, which shows after 16 s as a pool timeout.
// Here blocking reads use at most half of the pool.
func TestFault15_IdleSubscriptionsExhaustThePool(t *testing.T) {
	testserver.RequireReal(t) // CLIENT LIST
	const subscriptions, pool = 20, 10
	name := watermill.NewShortUUID() // of the connections, including those that the library opens itself
	client := redis.NewClient(&redis.Options{
		Addr: testserver.Addr(t), ClientName: name, PoolSize: pool, PoolTimeout: time.Second,
	})
	t.Cleanup(func() { _ = client.Close() })
	sub := newSubscriber(t, grouped(client))
	topics := make([]string, subscriptions)
	all := make(map[string]<-chan *message.Message)
	for i := range topics {
		topics[i] = topic(t)
		all[topics[i]] = subscribe(t, sub, topics[i])
	}
	admin := newClient(t)
	// All that can block do; with a connection for each topic that is the pool and
	// more.
	blocked := func() int {
		n := 0
		for _, conn := range connections(t, admin, name) {
			if strings.Contains(conn, " cmd=xreadgroup ") && strings.Contains(conn, " flags=b ") {
				n++
			}
		}
		return n
	}
	eventually(t, func() bool { return blocked() > 0 }, "nothing waits for messages")
	for range 3 {
		for _, topic := range topics {
			publish(t, client, topic, "to "+topic) // fails after PoolTimeout without a connection
		}
	}
	for topic, messages := range all {
		require.Len(t, collect(messages, 3, patience), 3, topic)
	}
	eventually(t, func() bool { return blocked() > 0 }, "nothing waits for messages")
	require.LessOrEqual(t, blocked(), 8)
}

// watermill-redisstream reads one entry at a time and acks each by itself: 14,600
// messages/s where the server can do 250,000.
//
// A machine's speed proves nothing, but the number of commands does. The first XACK
// is answered when the handler is done, so all later acks have accumulated.
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

	// 100 per read and 1,000 per ack, but the prefetch starts small, and shrinks if
	// a slow machine consumes slowly.
	t.Logf("%d messages: %d XREADGROUP, %d XACK", n, counts.of("xreadgroup"), counts.of("xack"))
	require.Less(t, counts.of("xreadgroup"), n/10)
	require.Less(t, counts.of("xack"), n/100)
}
