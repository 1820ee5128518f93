package goxstreams_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/auth"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Every client that go-redis can create must support everything: the library
// promises redis.UniversalClient, and programs pass the client that they already
// have.

// TestClients runs the whole life of a topic, from Subscribe to Close, with every
// kind of client and with the options that change how a client connects, waits or
// authenticates. Neither the library logs an error nor does go-redis print
// anything.
//
// The test is not parallel, since go-redis has one logger for the process. Its
// subtests are: nothing else runs meanwhile.
func TestClients(t *testing.T) {
	testserver.RequireReal(t)
	printed := recordPrinted(t)
	addr := testserver.Addr(t)
	second := testserver.Private(t).Addr()
	secured := newSecuredServer(t)

	plain := func(change func(t *testing.T, opt *redis.Options)) func(t *testing.T) redis.UniversalClient {
		return func(t *testing.T) redis.UniversalClient {
			opt := &redis.Options{Addr: addr}
			change(t, opt)
			return closing(t, redis.NewClient(opt))
		}
	}
	option := func(change func(opt *redis.Options)) func(t *testing.T) redis.UniversalClient {
		return plain(func(_ *testing.T, opt *redis.Options) { change(opt) })
	}
	ring := func(addrs ...string) func(t *testing.T) redis.UniversalClient {
		return func(t *testing.T) redis.UniversalClient { return closing(t, newRing(addrs...)) }
	}

	for _, kind := range []struct {
		name   string
		client func(t *testing.T) redis.UniversalClient
		nodes  int // the topics are spread over so many nodes; 0: one node, or it does not matter
	}{
		// Kinds of clients.
		{"Client", option(func(*redis.Options) {}), 0},
		{"FailoverClient", func(t *testing.T) redis.UniversalClient {
			opt, _ := failoverOptions(t, addr)
			return closing(t, redis.NewFailoverClient(opt))
		}, 0},
		{"FailoverClusterClient", func(t *testing.T) redis.UniversalClient {
			client, _ := newFailoverCluster(t, addr, 0)
			return client
		}, 0},
		{"FailoverClusterClient, DB 3", func(t *testing.T) redis.UniversalClient {
			client, _ := newFailoverCluster(t, addr, 3)
			return client
		}, 0},
		{"ClusterClient", func(t *testing.T) redis.UniversalClient { return testserver.Cluster(t).Client() }, 2},
		{"ClusterClient with ClusterSlots, one server", func(t *testing.T) redis.UniversalClient {
			return closing(t, newSlotsClient(addr))
		}, 0},
		{"ClusterClient with ClusterSlots, two servers", func(t *testing.T) redis.UniversalClient {
			return closing(t, newSlotsClient(addr, second))
		}, 2},
		{"Ring of one", ring(addr), 0},
		{"Ring of two", ring(addr, second), 2},

		// Clients of other types, as tracing and metering libraries make them.
		{"wrapped UniversalClient", func(t *testing.T) redis.UniversalClient {
			return struct{ redis.UniversalClient }{closing(t, redis.NewClient(&redis.Options{Addr: addr}))}
		}, 0},
		{"wrapped UniversalClient, ReadTimeout 300ms", func(t *testing.T) redis.UniversalClient {
			opt := &redis.Options{Addr: addr, ReadTimeout: 300 * time.Millisecond}
			return struct{ redis.UniversalClient }{closing(t, redis.NewClient(opt))}
		}, 0},
		{"wrapped Client", func(t *testing.T) redis.UniversalClient {
			return struct{ *redis.Client }{closing(t, redis.NewClient(&redis.Options{Addr: addr}))}
		}, 0},
		{"wrapped ClusterClient", func(t *testing.T) redis.UniversalClient {
			return struct{ redis.UniversalClient }{testserver.Cluster(t).Client()}
		}, 0},
		{"wrapped Ring of two", func(t *testing.T) redis.UniversalClient {
			return struct{ redis.UniversalClient }{closing(t, newRing(addr, second))}
		}, 0},

		// Options.
		{"StreamingCredentialsProvider", func(t *testing.T) redis.UniversalClient {
			return closing(t, secured.client(func(opt *redis.Options) {
				opt.StreamingCredentialsProvider = &credentialStream{now: secured.user(t)}
			}))
		}, 0},
		{"CredentialsProvider", func(t *testing.T) redis.UniversalClient {
			user := secured.user(t)
			return closing(t, secured.client(func(opt *redis.Options) { opt.CredentialsProvider = user.BasicAuth }))
		}, 0},
		{"CredentialsProviderContext", func(t *testing.T) redis.UniversalClient {
			user := secured.user(t)
			return closing(t, secured.client(func(opt *redis.Options) {
				opt.CredentialsProviderContext = func(context.Context) (string, string, error) {
					name, password := user.BasicAuth()
					return name, password, nil
				}
			}))
		}, 0},
		{"Limiter", plain(func(t *testing.T, opt *redis.Options) {
			opt.Limiter = newCountingLimiter(t)
			// Commands that go-redis sends when it connects, and that older servers
			// do not know.
			opt.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
		}), 0},
		{"hooks", func(t *testing.T) redis.UniversalClient {
			h, counts := countCommands()
			client := redis.NewClient(&redis.Options{Addr: addr})
			client.AddHook(h)
			t.Cleanup(func() {
				for _, name := range []string{"xadd", "xreadgroup", "xread", "xack"} {
					assert.Positive(t, counts.of(name), "the hooks have not seen %s", name)
				}
			})
			return closing(t, client)
		}, 0},
		{"ClientSideCacheConfig", option(func(opt *redis.Options) {
			opt.Protocol = 3
			opt.ClientSideCacheConfig = &redis.ClientSideCacheConfig{}
		}), 0},
		{"ClientSideCacheConfig, PoolSize 1", option(func(opt *redis.Options) {
			opt.Protocol, opt.PoolSize = 3, 1
			opt.ClientSideCacheConfig = &redis.ClientSideCacheConfig{}
		}), 0},
		// (With MaxActiveConns below PoolSize go-redis rejects further commands,
		// instead of queueing them.)
		{"PoolSize 4, MaxActiveConns 4", option(func(opt *redis.Options) { opt.PoolSize, opt.MaxActiveConns = 4, 4 }), 0},
		{"PoolSize 1", option(func(opt *redis.Options) { opt.PoolSize = 1 }), 0},
		{"PoolSize 1, MaxActiveConns 1", option(func(opt *redis.Options) { opt.PoolSize, opt.MaxActiveConns = 1, 1 }), 0},
		{"PipelinePoolSize -1", option(func(opt *redis.Options) { opt.PipelinePoolSize = -1 }), 0},
		{"ConnMaxLifetime 100ms", option(func(opt *redis.Options) { opt.ConnMaxLifetime = 100 * time.Millisecond }), 0},
		{"ReadTimeout -1", option(func(opt *redis.Options) { opt.ReadTimeout = -1 }), 0},
		{"ReadTimeout -2", option(func(opt *redis.Options) { opt.ReadTimeout = -2 }), 0},
		// Shorter than BLOCK, and than a busy machine sometimes needs: then
		// go-redis retries.
		{"ReadTimeout 1s", option(func(opt *redis.Options) { opt.ReadTimeout = time.Second }), 0}, // below BlockTime; a busy machine answers later than 300 ms
		{"ContextTimeoutEnabled", option(func(opt *redis.Options) { opt.ContextTimeoutEnabled = true }), 0},
		{"Protocol 2", option(func(opt *redis.Options) { opt.Protocol = 2 }), 0},
		{"DB 3", option(func(opt *redis.Options) { opt.DB = 3 }), 0},
		{"unix socket", func(t *testing.T) redis.UniversalClient {
			return closing(t, redis.NewClient(&redis.Options{Network: "unix", Addr: startOnSocket(t)}))
		}, 0},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			client := kind.client(t)
			topics := topicsOn(t, client, max(1, kind.nodes))
			log := newLogRecorder()
			runThrough(t, client, topics, log)
			for _, line := range log.Errors() {
				if strings.Contains(kind.name, "0ms") && strings.Contains(line, "timeout") {
					t.Log("a busy machine? ", line)
					continue
				}
				t.Error("logged: " + line)
			}
		})
	}
	t.Cleanup(func() { // when the subtests have ended
		assert.Empty(t, printed(), "printed by go-redis")
	})
}

// topicsOn returns two topics, on two nodes of the client if it has several.
func topicsOn(t *testing.T, client redis.UniversalClient, nodes int) []string {
	t.Helper()
	var topics []string
	used := map[string]bool{}
	for len(topics) < 2 {
		topic := topic(t)
		node := nodeOf(t, client, topic)
		if nodes > 1 && used[node] {
			continue
		}
		used[node] = true
		topics = append(topics, topic)
	}
	return topics
}

func nodeOf(t *testing.T, client redis.UniversalClient, key string) string {
	t.Helper()
	switch c := client.(type) {
	case *redis.ClusterClient:
		return masterOf(t, c, key)
	case *redis.Ring:
		shard, err := c.GetShardClientForKey(key)
		require.NoError(t, err)
		return shard.Options().Addr
	}
	return ""
}

// publishSurely publishes once with a client that may time out on a busy machine.
func publishSurely(t *testing.T, client redis.UniversalClient, topic string, payloads ...string) {
	t.Helper()
	var msgs []*message.Message
	for _, payload := range payloads {
		msgs = append(msgs, message.NewMessage(watermill.NewUUID(), message.Payload(payload)))
	}
	pub := newPublisher(t, client)
	for range 20 {
		err := pub.Publish(topic, msgs...)
		if err == nil {
			return
		}
		eventually(t, func() bool { return client.XLen(context.Background(), topic).Err() == nil })
		for _, e := range client.XRange(context.Background(), topic, "-", "+").Val() {
			if e.Values[goxstreams.UUIDHeaderKey] == msgs[0].UUID {
				require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown, "it is stored")
				return
			}
		}
	}
	require.FailNow(t, "no answer")
}

// runThrough uses everything that the library does with the topics: publishing,
// consuming, a nack, a takeover, fan-out, dead-lettering and its queue, stats,
// empty reads, and Close.
func runThrough(t *testing.T, client redis.UniversalClient, topics []string, log logRecorder) {
	t.Helper()
	const doomed = "doomed"
	short := func(config goxstreams.SubscriberConfig) *goxstreams.Subscriber {
		config.Client = client
		config.CloseTimeout = 2 * patience // Close must not need it
		config.ClaimInterval = 50 * time.Millisecond
		sub, err := goxstreams.NewSubscriber(config, log)
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, sub.Close()) })
		return sub
	}
	working := short(goxstreams.SubscriberConfig{
		ConsumerGroup: testGroup, MaxConcurrency: 4, Retry: quickRetry(),
		BlockTime: 200 * time.Millisecond, ClaimMinIdle: 500 * time.Millisecond,
	})
	failing := short(goxstreams.SubscriberConfig{
		ConsumerGroup: doomed, MaxConcurrency: 4, Retry: &goxstreams.Retry{MaxRetries: -1},
		StartID: "$", ClaimMinIdle: 10 * time.Second,
	})
	fanOut := short(goxstreams.SubscriberConfig{BlockTime: patience}) // Close must not wait for it
	const pair = "pair"
	twice := short(goxstreams.SubscriberConfig{ConsumerGroup: pair, StartID: "$", ClaimMinIdle: 10 * time.Second})

	// Entries that a dead process has left in the first topic.
	createGroup(t, client, topics[0], testGroup)
	publishSurely(t, client, topics[0], "left")
	readAs(t, client, topics[0], testGroup, "died", 1)

	var messages, failures, everything []<-chan *message.Message
	var shared []*tally // what two subscriptions of a topic handle together
	var firstEnds []func()
	for i, topic := range topics {
		ctx, cancel := context.WithCancel(t.Context())
		first, err := twice.Subscribe(ctx, topic)
		require.NoError(t, err)
		firstEnds = append(firstEnds, func() { cancel(); eventually(t, func() bool { return len(twice.Stats()) == 2*len(topics)-i-1 }) })
		shared = append(shared, newTally())
		shared[i].handle(first, nil)
		shared[i].handle(subscribe(t, twice, topic), nil)
		assert.Len(t, client.XInfoConsumers(t.Context(), topic, pair).Val(), 2)
		messages = append(messages, subscribe(t, working, topic))
		failures = append(failures, subscribe(t, failing, topic))
		everything = append(everything, subscribe(t, fanOut, topic))
	}
	for _, topic := range topics {
		publishSurely(t, client, topic, "one")
		publishSurely(t, client, topic, "two", "three", "four")
	}

	for i := range topics {
		want := map[string][]int64{"one": {1}, "two": {1, 2}, "three": {1}, "four": {1}}
		if i == 0 {
			want["left"] = []int64{2}
		}
		counts := map[string][]int64{}
		for range len(want) + 1 {
			msg := next(t, messages[i])
			payload := string(msg.Payload)
			counts[payload] = append(counts[payload], delivery(t, msg).Count)
			if payload == "two" && len(counts[payload]) == 1 {
				msg.Nack()
			} else {
				msg.Ack()
			}
		}
		assert.Equal(t, want, counts, "the deliveries of each message")
		assert.Equal(t, []string{"one", "two", "three", "four"}, payloads(collect(everything[i], 4, patience)), "fan-out")
	}

	for i, topic := range topics {
		for range 4 {
			if msg := next(t, failures[i]); string(msg.Payload) == "three" {
				msg.Nack()
			} else {
				msg.Ack()
			}
		}
		letters := goxstreams.DeadLetterTopic(topic)
		queue, err := goxstreams.NewDeadLetterQueue(client, letters)
		require.NoError(t, err)
		eventually(t, func() bool { // a short ReadTimeout may be too short for one attempt
			n, err := queue.Count(t.Context())
			return err == nil && n == 1
		}, "no dead letter")
		var dead []goxstreams.DeadMessage
		for d, err := range queue.All(t.Context(), "") {
			require.NoError(t, err)
			dead = append(dead, d)
		}
		require.Len(t, dead, 1)
		assert.Equal(t, "three", string(dead[0].Message.Payload))
		assert.Equal(t, doomed, dead[0].Group)
		assert.EqualValues(t, 1, dead[0].Deliveries)

		var got goxstreams.TopicStats
		eventually(t, func() bool {
			got, err = failing.TopicStats(t.Context(), topic)
			require.NoError(t, err)
			return got.Pending == 0
		}, "TopicStats: something stays pending")
		assert.Equal(t, goxstreams.TopicStats{
			Topic: topic, Group: doomed, Length: map[bool]int64{true: 5, false: 4}[i == 0],
			Lag: got.Lag, Consumers: 1, DeadLetterTopic: letters, DeadLetters: 1,
			Pin: got.Pin, // of the slowest group or fan-out
		}, got)

		n, err := queue.Replay(t.Context(), dead[0].ID)
		require.NoError(t, err)
		assert.Equal(t, 1, n)
		again := next(t, failures[i])
		assert.Equal(t, "three", string(again.Payload))
		assert.EqualValues(t, 1, delivery(t, again).Count)
		again.Ack()
		n64, err := queue.Count(t.Context())
		require.NoError(t, err)
		assert.Zero(t, n64, "dead letters after Replay")
	}

	time.Sleep(600 * time.Millisecond) // several empty reads: they must not be logged
	for i, topic := range topics {
		eventually(t, func() bool { return shared[i].len() == 4 })
		eventuallySettled(t, client, topic, pair)
		firstEnds[i]()
		publishSurely(t, client, topic, "last")
		for _, channel := range []<-chan *message.Message{messages[i], failures[i]} {
			msg := next(t, channel)
			assert.Equal(t, "last", string(msg.Payload))
			msg.Ack()
		}
		eventuallySettled(t, client, topic, testGroup)
		eventuallySettled(t, client, topic, doomed)
		eventually(t, func() bool { return shared[i].len() == 5 })
		eventuallySettled(t, client, topic, pair)
		assert.Equal(t, 5, shared[i].total(), "two subscriptions of one topic handled one twice")
	}

	began := time.Now()
	var closing sync.WaitGroup
	for _, sub := range []*goxstreams.Subscriber{working, failing, fanOut, twice} {
		for _, st := range sub.Stats() {
			assert.NoError(t, st.Err)
			assert.Zero(t, st.Lost)
		}
		closing.Go(func() { assert.NoError(t, sub.Close()) })
	}
	closing.Wait()
	assert.Less(t, time.Since(began), patience/3, "Close")
	for _, channel := range append(append(messages, failures...), everything...) {
		assert.True(t, closed(channel, patience))
	}
}

// With Options.StreamingCredentialsProvider go-redis keeps a manager of its
// credentials in the client. A Conn has none, so the first connection dialed
// through one dereferenced nil in a goroutine of the library: the process died with
// the second topic, whose read found no idle connection. Now any number of topics
// works, and so does a rotation of the credentials, the purpose of such a provider:
// blocking reads do not continue forever as the old user.
func TestFault48_StreamingCredentials(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	secured := newSecuredServer(t)
	open := func(t *testing.T, poolSize int) (*redis.Client, *credentialStream) {
		provider := &credentialStream{now: secured.user(t)}
		return closing(t, secured.client(func(opt *redis.Options) {
			opt.PoolSize = poolSize
			opt.StreamingCredentialsProvider = provider
		})), provider
	}
	config := func(client *redis.Client) goxstreams.SubscriberConfig {
		c := grouped(client)
		c.BlockTime = 200 * time.Millisecond
		return c
	}

	for _, poolSize := range []int{1, 10} {
		t.Run(fmt.Sprintf("PoolSize %d", poolSize), func(t *testing.T) {
			t.Parallel()
			client, provider := open(t, poolSize)
			log := newLogRecorder()
			subs := make([]*goxstreams.Subscriber, 10)
			topics := make([]string, len(subs))
			messages := make([]<-chan *message.Message, len(subs))
			for i := range subs {
				c := config(client)
				if i%2 == 1 { // fan-out
					c.ConsumerGroup = ""
				}
				subs[i], topics[i] = newSubscriberLog(t, c, log), topic(t)
				messages[i] = subscribe(t, subs[i], topics[i])
			}
			for i, topic := range topics {
				want := publishN(t, client, topic, 300) // more than one read takes
				assert.Equal(t, want, uuids(collect(messages[i], len(want), patience)))
			}
			for _, sub := range subs {
				require.NoError(t, sub.Close())
			}
			require.NoError(t, client.Close())
			eventually(t, func() bool { return provider.listening() == 0 }, "connections that are gone still listen to the provider")
			assert.Empty(t, log.Errors())
		})

		// The old user stays valid for a while: nobody notices anything.
		t.Run(fmt.Sprintf("rotation, PoolSize %d", poolSize), func(t *testing.T) {
			t.Parallel()
			client, provider := open(t, poolSize)
			log := newLogRecorder()
			sub := newSubscriberLog(t, config(client), log)
			topics := []string{topic(t), topic(t), topic(t)}
			var messages []<-chan *message.Message
			for _, topic := range topics {
				messages = append(messages, subscribe(t, sub, topic))
			}
			old := provider.now
			eventually(t, func() bool { return secured.waitingAs(t, old) > 0 }, "nobody waits")
			provider.push(secured.user(t))
			eventually(t, func() bool { return secured.waitingAs(t, old) == 0 && secured.waitingAs(t, provider.now) > 0 },
				"reads go on waiting as the old user")
			for i, topic := range topics {
				want := publishN(t, client, topic, 10)
				assert.Equal(t, want, uuids(collect(messages[i], len(want), patience)))
			}
			assert.Empty(t, log.Errors())
			secured.revoke(t, old)
			for i, topic := range topics {
				publish(t, newClientOf(t, secured, provider.now), topic, "revoked")
				assert.Equal(t, []string{"revoked"}, payloads(collect(messages[i], 1, patience)))
			}
		})

		// The old user is deleted at once, and its connections with it.
		t.Run(fmt.Sprintf("revocation, PoolSize %d", poolSize), func(t *testing.T) {
			t.Parallel()
			client, provider := open(t, poolSize)
			sub := newSubscriber(t, config(client))
			topics := []string{topic(t), topic(t), topic(t)}
			var messages []<-chan *message.Message
			for _, topic := range topics {
				messages = append(messages, subscribe(t, sub, topic))
			}
			old := provider.now
			eventually(t, func() bool { return secured.waitingAs(t, old) > 0 }, "nobody waits")
			provider.push(secured.user(t))
			secured.revoke(t, old)
			admin := newClientOf(t, secured, provider.now)
			for i, topic := range topics {
				want := publishN(t, admin, topic, 10)
				assert.Equal(t, want, uuids(collect(messages[i], len(want), patience)))
				eventuallySettled(t, admin, topic, testGroup)
			}
		})
	}
}

// A ClusterClient need not have a Cluster behind it: NewFailoverClusterClient uses
// Sentinel, to read from replicas, and ClusterSlots lets a program shard its keys
// over plain servers. Subscribe asked such a server for a key's slot and failed:
// "cluster support disabled". But the client itself knows its slots.
func TestFault50_ClusterClientWithoutACluster(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	addr := testserver.Addr(t)
	for _, kind := range []struct {
		name   string
		client func(t *testing.T) *redis.ClusterClient
	}{
		{"FailoverClusterClient", func(t *testing.T) *redis.ClusterClient {
			client, _ := newFailoverCluster(t, addr, 0)
			return client
		}},
		{"ClusterSlots", func(*testing.T) *redis.ClusterClient { return newSlotsClient(addr) }},
		{"ClusterSlots, two servers", func(t *testing.T) *redis.ClusterClient {
			return newSlotsClient(addr, testserver.Private(t).Addr())
		}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			client, topic := closing(t, kind.client(t)), topic(t)
			log := newLogRecorder()
			config := grouped(client)
			config.Retry = &goxstreams.Retry{MaxRetries: -1}
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "dies", "lives")
			next(t, messages).Nack()
			next(t, messages).Ack()
			queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic(topic))
			require.NoError(t, err)
			eventually(t, func() bool {
				n, err := queue.Count(t.Context())
				require.NoError(t, err)
				return n == 1
			}, "no dead letter")
			assert.Empty(t, log.Errors())
		})
	}

	// The case for which the server was asked is still rejected: the two streams
	// are on two servers. On one server that is not a node of a Cluster, any stream
	// will do.
	t.Run("dead letters in another slot", func(t *testing.T) {
		t.Parallel()
		name := topic(t)
		subscribe := func(client redis.UniversalClient, deadLetters string) error {
			config := grouped(client)
			config.DeadLetterTopic = func(string) string { return deadLetters }
			_, err := newSubscriber(t, config).Subscribe(t.Context(), name)
			return err
		}
		one := closing(t, newSlotsClient(addr))
		two := closing(t, newSlotsClient(addr, strings.Replace(addr, "127.0.0.1", "localhost", 1)))
		refused := 0
		for i := range 20 {
			require.NoError(t, subscribe(one, fmt.Sprint(name, i)))
			if err := subscribe(two, fmt.Sprint(name, i)); err != nil {
				require.ErrorContains(t, err, "slot")
				require.ErrorContains(t, err, "hash tag")
				refused++
			}
		}
		require.NotZero(t, refused)
	})
}

// A client made from a copy of another one's options shares the first one's push
// processor, and with ClientSideCacheConfig go-redis complained on stderr that it
// already had a handler. Connections that the library opens itself are quiet, and
// do not affect the client's cache.
//
// The test is not parallel: go-redis has one logger for the process.
func TestFault59_ClientSideCacheIsQuiet(t *testing.T) {
	testserver.RequireReal(t)
	printed := recordPrinted(t)
	for _, poolSize := range []int{1, 10} {
		t.Run(fmt.Sprintf("PoolSize %d", poolSize), func(t *testing.T) {
			client := closing(t, redis.NewClient(&redis.Options{
				Addr: testserver.Addr(t), Protocol: 3, PoolSize: poolSize, ClientSideCacheConfig: &redis.ClientSideCacheConfig{},
			}))
			key := topic(t)
			require.NoError(t, client.Set(t.Context(), key, "cached", 0).Err())
			require.Equal(t, "cached", client.Get(t.Context(), key).Val())

			log := newLogRecorder()
			sub := newSubscriberLog(t, grouped(client), log)
			var topics []string
			var messages []<-chan *message.Message
			for range 3 {
				topics = append(topics, topic(t))
				messages = append(messages, subscribe(t, sub, topics[len(topics)-1]))
			}
			for i, topic := range topics {
				want := publishN(t, client, topic, 300)
				assert.Equal(t, want, uuids(collect(messages[i], len(want), patience)))
			}
			require.NoError(t, sub.Close())

			// The cache still works: an invalidation reaches it.
			require.Equal(t, "cached", client.Get(t.Context(), key).Val())
			require.NoError(t, newClient(t).Set(t.Context(), key, "changed", 0).Err())
			eventually(t, func() bool { return client.Get(t.Context(), key).Val() == "changed" }, "the cache is stale")
			assert.Empty(t, log.Errors())
			assert.Empty(t, printed(), "printed by go-redis")
		})
	}
}

// closing closes the client in t's cleanup, and returns it.
func closing[C redis.UniversalClient](t testing.TB, client C) C {
	t.Cleanup(func() {
		if err := client.Close(); err != nil && !errors.Is(err, redis.ErrClosed) {
			t.Errorf("closing the client: %v", err)
		}
	})
	return client
}

func newRing(addrs ...string) *redis.Ring {
	opt := &redis.RingOptions{Addrs: map[string]string{}, HeartbeatFrequency: 100 * time.Millisecond}
	for i, addr := range addrs {
		opt.Addrs[fmt.Sprint("shard", i)] = addr
	}
	return redis.NewRing(opt)
}

// newSlotsClient returns a ClusterClient that spreads the slots over plain servers.
func newSlotsClient(addrs ...string) *redis.ClusterClient {
	const slots = 16384
	return redis.NewClusterClient(&redis.ClusterOptions{ClusterSlots: func(context.Context) ([]redis.ClusterSlot, error) {
		var all []redis.ClusterSlot
		for i, addr := range addrs {
			all = append(all, redis.ClusterSlot{
				Start: slots * i / len(addrs), End: slots*(i+1)/len(addrs) - 1, Nodes: []redis.ClusterNode{{Addr: addr}},
			})
		}
		return all, nil
	}})
}

// recordPrinted records what go-redis prints until t ends. It leaves out the usual
// messages of Sentinel, and those about a connection that a revoked credential
// closed while it was put back.
func recordPrinted(t testing.TB) (printed func() []string) {
	r := &printRecorder{}
	redis.SetLogger(r)
	t.Cleanup(logging.Enable)
	return func() []string {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.lines
	}
}

type printRecorder struct {
	mu    sync.Mutex
	lines []string
}

func (r *printRecorder) Printf(_ context.Context, format string, v ...any) {
	line := fmt.Sprintf(format, v...)
	if strings.HasPrefix(line, "sentinel: ") || strings.HasPrefix(line, "Unexpected conn") {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
}

// A countingLimiter never rejects. A read without entries is not a failure, or a
// circuit breaker would open on an idle topic.
type countingLimiter struct {
	allowed, reported atomic.Int64

	mu       sync.Mutex
	failures []string
}

func newCountingLimiter(t *testing.T) *countingLimiter {
	l := &countingLimiter{}
	t.Cleanup(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		assert.Empty(t, l.failures, "reported to the Limiter")
		assert.Positive(t, l.allowed.Load())
		assert.Equal(t, l.allowed.Load(), l.reported.Load(), "each command that was allowed has a result")
	})
	return l
}

func (l *countingLimiter) Allow() error {
	l.allowed.Add(1)
	return nil
}

func (l *countingLimiter) ReportResult(err error) {
	l.reported.Add(1)
	if err == nil || strings.HasPrefix(err.Error(), "BUSYGROUP") { // the group exists: an ordinary reply
		return
	}
	if strings.Contains(err.Error(), "'setinfo'") { // go-redis's own command, which Redis 7.0 does not know
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures = append(l.failures, err.Error())
}

// A securedServer has a password, and users that may do everything.
type securedServer struct {
	addr  string
	admin *redis.Client
}

func newSecuredServer(t *testing.T) *securedServer {
	const password = "admin"
	srv := testserver.Private(t)
	require.NoError(t, srv.Client().ConfigSet(t.Context(), "requirepass", password).Err())
	return &securedServer{srv.Addr(), closing(t, redis.NewClient(&redis.Options{Addr: srv.Addr(), Password: password}))}
}

// user creates a user, whose name is also the password.
func (s *securedServer) user(t *testing.T) auth.Credentials {
	t.Helper()
	name := "user-" + watermill.NewShortUUID()
	require.NoError(t, s.admin.Do(t.Context(), "acl", "setuser", name, "on", ">"+name, "~*", "+@all").Err())
	return auth.NewBasicCredentials(name, name)
}

// revoke deletes the user; the server closes its connections.
func (s *securedServer) revoke(t *testing.T, user auth.Credentials) {
	t.Helper()
	name, _ := user.BasicAuth()
	require.NoError(t, s.admin.Do(t.Context(), "acl", "deluser", name).Err())
}

// client returns a client without credentials other than those that change sets.
func (s *securedServer) client(change func(*redis.Options)) *redis.Client {
	opt := &redis.Options{Addr: s.addr}
	change(opt)
	return redis.NewClient(opt)
}

func newClientOf(t *testing.T, s *securedServer, user auth.Credentials) *redis.Client {
	return closing(t, s.client(func(opt *redis.Options) { opt.Username, opt.Password = user.BasicAuth() }))
}

// waitingAs returns the number of the user's connections in a blocking read.
func (s *securedServer) waitingAs(t *testing.T, user auth.Credentials) (n int) {
	t.Helper()
	list, err := s.admin.ClientList(t.Context()).Result()
	require.NoError(t, err)
	name, _ := user.BasicAuth()
	for line := range strings.Lines(list) {
		if strings.Contains(line, " user="+name+" ") && strings.Contains(line, " flags=b ") {
			n++
		}
	}
	return n
}

// A credentialStream is a provider whose credentials a test changes.
type credentialStream struct {
	mu        sync.Mutex
	now       auth.Credentials
	listeners map[auth.CredentialsListener]bool
}

func (s *credentialStream) Subscribe(l auth.CredentialsListener) (auth.Credentials, auth.UnsubscribeFunc, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listeners == nil {
		s.listeners = map[auth.CredentialsListener]bool{}
	}
	s.listeners[l] = true
	return s.now, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.listeners, l)
		return nil
	}, nil
}

func (s *credentialStream) push(now auth.Credentials) {
	s.mu.Lock()
	s.now = now
	var all []auth.CredentialsListener
	for l := range s.listeners {
		all = append(all, l)
	}
	s.mu.Unlock()
	for _, l := range all {
		l.OnNext(now)
	}
}

func (s *credentialStream) listening() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.listeners)
}

// startOnSocket starts a redis-server on a unix socket, and returns its path.
func startOnSocket(t *testing.T) string {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		binary, err = exec.LookPath("valkey-server")
	}
	if err != nil && os.Getenv("GOXSTREAMS_TEST_REAL") == "1" {
		require.NoError(t, err)
	} else if err != nil {
		t.Skip("NOT TESTED: it needs redis-server or valkey-server in the PATH")
	}
	dir, err := os.MkdirTemp("", "gx") // t.TempDir's name is too long for a socket
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, os.RemoveAll(dir)) })
	socket := filepath.Join(dir, "redis.sock")
	server := exec.Command(binary, "--port", "0", "--unixsocket", socket, "--dir", dir, "--save", "", "--appendonly", "no")
	require.NoError(t, server.Start())
	t.Cleanup(func() {
		assert.NoError(t, server.Process.Kill())
		_ = server.Wait()
	})
	eventually(t, func() bool {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return false
		}
		defer conn.Close()
		_, err = io.WriteString(conn, "PING\r\n")
		require.NoError(t, err)
		answer, _ := bufio.NewReader(conn).ReadString('\n')
		return answer == "+PONG\r\n"
	}, "redis-server does not answer on its socket")
	return socket
}

const sentinelMaster = "mymaster"

func failoverOptions(t *testing.T, master string) (*redis.FailoverOptions, *fakeSentinel) {
	t.Helper()
	s := startSentinel(t, master)
	return &redis.FailoverOptions{MasterName: sentinelMaster, SentinelAddrs: []string{s.addr}, DialerRetries: 1}, s
}

// newFailoverCluster returns a client that t's cleanup closes, with its connection
// to the Sentinel: go-redis's Close forgets that one, and closes it only after a
// failed query.
func newFailoverCluster(t *testing.T, master string, db int) (*redis.ClusterClient, *fakeSentinel) {
	t.Helper()
	opt, sentinel := failoverOptions(t, master)
	opt.DB = db
	client := closing(t, redis.NewFailoverClusterClient(opt))
	t.Cleanup(func() {
		sentinel.promote("")
		_ = client.ForEachMaster(context.Background(), func(context.Context, *redis.Client) error { return nil })
	})
	return client, sentinel
}

// A fakeSentinel names the master. It has no replicas and no peers.
type fakeSentinel struct {
	addr     string
	listener net.Listener
	serving  sync.WaitGroup

	mu     sync.Mutex
	master string
	conns  map[net.Conn]bool // true for a subscriber
}

func startSentinel(t *testing.T, master string) *fakeSentinel {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &fakeSentinel{addr: listener.Addr().String(), listener: listener, master: master, conns: map[net.Conn]bool{}}
	s.serving.Go(s.accept)
	t.Cleanup(func() {
		_ = listener.Close()
		s.mu.Lock()
		for conn := range s.conns {
			_ = conn.Close()
		}
		s.mu.Unlock()
		s.serving.Wait()
	})
	return s
}

// promote makes another server the master, and tells the subscribers; "" means that
// there is none.
func (s *fakeSentinel) promote(master string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.master
	s.master = master
	if master == "" {
		return
	}
	fields := []string{sentinelMaster}
	for _, addr := range []string{old, master} {
		host, port, _ := net.SplitHostPort(addr)
		fields = append(fields, host, port)
	}
	for conn, subscribed := range s.conns {
		if subscribed {
			_, _ = io.WriteString(conn, bulks("message", "+switch-master", strings.Join(fields, " ")))
		}
	}
}

func (s *fakeSentinel) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conns[conn] = false
		s.mu.Unlock()
		s.serving.Go(func() { s.serve(conn) })
	}
}

func (s *fakeSentinel) serve(conn net.Conn) {
	defer func() {
		_ = conn.Close()
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
	}()
	r := bufio.NewReader(conn)
	for {
		args, err := readCommand(r)
		if err != nil {
			return
		}
		s.mu.Lock()
		_, err = io.WriteString(conn, s.answerLocked(conn, args))
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (s *fakeSentinel) answerLocked(conn net.Conn, args []string) string {
	switch name := strings.ToLower(strings.Join(args[:min(2, len(args))], " ")); {
	case name == "sentinel get-master-addr-by-name" && s.master == "":
		return "-ERR no such master\r\n"
	case name == "sentinel get-master-addr-by-name":
		host, port, _ := net.SplitHostPort(s.master)
		return bulks(host, port)
	case strings.HasPrefix(name, "sentinel "):
		return "*0\r\n"
	case strings.HasPrefix(name, "subscribe "):
		s.conns[conn] = true
		var answer strings.Builder
		for i, channel := range args[1:] {
			fmt.Fprintf(&answer, "*3\r\n$9\r\nsubscribe\r\n$%d\r\n%s\r\n:%d\r\n", len(channel), channel, i+1)
		}
		return answer.String()
	case strings.HasPrefix(name, "ping") && s.conns[conn]:
		return bulks("pong", "")
	case strings.HasPrefix(name, "hello "):
		return "-ERR unknown command 'HELLO'\r\n"
	}
	return "+OK\r\n"
}

func bulks(texts ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(texts))
	for _, s := range texts {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(s), s)
	}
	return b.String()
}

// readCommand reads a list of strings.
func readCommand(r *bufio.Reader) ([]string, error) {
	length := func() (int, error) {
		line, err := r.ReadString('\n')
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(line[1:]))
	}
	n, err := length()
	args := make([]string, 0, 8)
	for ; n > 0 && err == nil; n-- {
		var size int
		if size, err = length(); err != nil {
			break
		}
		text := make([]byte, size+len("\r\n"))
		if _, err = io.ReadFull(r, text); err == nil {
			args = append(args, string(text[:size]))
		}
	}
	return args, err
}

// uncomparable is a client that cannot be a map's key.
type uncomparable struct {
	redis.UniversalClient
	_ []string
}

// Replay kept known groups in a map by client, and panicked if the client's type
// cannot be compared.
func TestUncomparableClient(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	letter := publishDying(t, client, topic, "x")[0]
	n, err := queueOf(t, uncomparable{UniversalClient: client}, goxstreams.DeadLetterTopic(topic)).Replay(t.Context(), letter.ID)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Empty(t, deadOf(t, client, topic))
}
