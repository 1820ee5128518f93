package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// watermill-redisstream reads a fan-out subscription's first batch without
// COUNT, and keeps one message of it: from "0" the server sends the whole stream
// (a gigabyte, if it holds one) before the first message is handled. Here a read
// takes what there is room for.
func TestFault13_FanOutReadsTheWholeStream(t *testing.T) {
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

	sub := newSubscriber(t, goxstreams.SubscriberConfig{Client: client, StartID: "0"})
	messages := subscribe(t, sub, topic)
	first := next(t, messages)
	require.Equal(t, payloads[0], string(first.Payload))
	require.Less(t, received.Load(), int64(20*payload), "bytes received for the first message")
	first.Ack()
	// Also later no more than a batch ahead.
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

// watermill-redisstream's Close cancels its read, which it then logs as an
// error, and the goroutine that claims stays until its next tick: a clean
// shutdown looks like a failure, and tests with goleak fail.
func TestFault14_CloseLogsAnErrorAndLeaksAGoroutine(t *testing.T) {
	testserver.RequireReal(t) // the embedded server's goroutines are this process's too
	nothing := func(*testing.T, *goxstreams.Subscriber, <-chan *message.Message) {}
	unsettled := func(t *testing.T, _ *goxstreams.Subscriber, messages <-chan *message.Message) {
		msg := next(t, messages)
		go func() { // a handler that comes to its end when it is told to
			<-msg.Context().Done()
			msg.Nack()
		}()
	}
	waiting := func(t *testing.T, sub *goxstreams.Subscriber, messages <-chan *message.Message) {
		next(t, messages).Nack()
		eventually(t, func() bool { return stats(t, sub).Waiting == 1 })
	}
	group := goxstreams.SubscriberConfig{ConsumerGroup: testGroup}
	concurrent := group
	concurrent.MaxConcurrency = 8
	patient := group
	patient.Retry = &goxstreams.Retry{InitialInterval: time.Hour}
	named := group
	named.Consumer = "named"
	noAck := group
	noAck.NoAck = true
	for _, tt := range []struct {
		name    string
		config  goxstreams.SubscriberConfig
		publish int
		before  func(*testing.T, *goxstreams.Subscriber, <-chan *message.Message)
	}{
		{"idle", group, 0, nothing},
		{"idle, named", named, 0, nothing},
		{"idle, NoAck", noAck, 0, nothing},
		{"idle, fan-out", goxstreams.SubscriberConfig{}, 0, nothing},
		{"offered to nobody", group, 50, nothing},
		{"in a handler", concurrent, 50, unsettled},
		{"waiting for a retry", patient, 1, waiting},
		{"waiting for a retry, concurrently", func() goxstreams.SubscriberConfig {
			c := patient
			c.MaxConcurrency = 8
			return c
		}(), 1, waiting},
	} {
		for _, byContext := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, by context %t", tt.name, byContext), func(t *testing.T) {
				topic := topic(t)
				if tt.publish > 0 {
					publishN(t, newClient(t), topic, tt.publish)
				}
				here := goleak.IgnoreCurrent()
				client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t)})
				reading := make(chan struct{})
				first := sync.OnceFunc(func() { close(reading) })
				client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
					if isRead(cmd) {
						first()
					}
					return next()
				}})
				config := tt.config
				config.Client, config.CloseTimeout = client, 2*time.Second // half of it is the handlers'
				log := newLogRecorder()
				sub, err := goxstreams.NewSubscriber(config, log)
				require.NoError(t, err)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				messages, err := sub.Subscribe(ctx, topic)
				require.NoError(t, err)
				<-reading
				tt.before(t, sub, messages)
				if byContext {
					cancel()
					eventually(t, func() bool { return len(sub.Stats()) == 0 }, "the subscription does not end")
				}
				require.NoError(t, sub.Close())
				select {
				case _, open := <-messages:
					require.False(t, open)
				default:
					require.Fail(t, "Close returned before the channel closed")
				}
				require.NoError(t, client.Close())
				require.Empty(t, log.Errors())
				goleak.VerifyNone(t, append(testserver.LeakOptions(), here)...)
			})
		}
	}
}

func isRead(cmd redis.Cmder) bool { return cmd.Name() == "xreadgroup" || cmd.Name() == "xread" }

// Each of watermill-redisstream's subscriptions keeps a connection of the pool for as
// long as its read waits: with ten for each core, a process with twenty idle
// subscriptions cannot publish any more, which shows after 16 s as a pool
// timeout. Here waiting reads take half of the pool at most.
func TestFault15_IdleSubscriptionsExhaustThePool(t *testing.T) {
	testserver.RequireReal(t) // CLIENT LIST
	const subscriptions, pool = 20, 10
	name := watermill.NewShortUUID() // of the connections, those that the library opens for itself included
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
	// All that can block does; with a connection for each topic that is the pool
	// and more.
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
			publish(t, client, topic, "to "+topic) // which fails after PoolTimeout without a connection
		}
	}
	for topic, messages := range all {
		require.Len(t, collect(messages, 3, patience), 3, topic)
	}
	eventually(t, func() bool { return blocked() > 0 }, "nothing waits for messages")
	require.LessOrEqual(t, blocked(), 8)
}

// watermill-redisstream asks which consumers are idle and have nothing pending,
// and then deletes them. What such a consumer reads in between is lost: deleting
// a consumer drops its pending entries for good, and nobody ever gets them.
func TestFault16_ConsumerRemovalLosesMessages(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	admin := newClient(t)
	topic := topic(t)
	createGroup(t, admin, topic, testGroup)
	ctx := context.Background()
	for _, idler := range []string{"idler", "returns"} {
		require.NoError(t, admin.XGroupCreateConsumer(ctx, topic, testGroup, idler).Err())
	}
	// Right before anything of the library that deletes consumers, the idle one
	// reads a message again. In one step with its XADD: nobody else gets it.
	var read atomic.Bool
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if strings.Contains(strings.ToLower(fmt.Sprint(cmd.Args())), "delconsumer") && !read.Swap(true) {
			addPending(t, admin, topic, "returns", "precious")
		}
		return next()
	}})
	config := grouped(client)
	config.ClaimMinIdle = time.Second
	config.ConsumerTimeout = 50 * time.Millisecond
	messages := subscribe(t, newSubscriber(t, config), topic)

	got := next(t, messages)
	require.Equal(t, "precious", string(got.Payload))
	require.EqualValues(t, 2, delivery(t, got).Count)
	got.Ack()
	eventuallySettled(t, admin, topic, testGroup)
	// And the removal works: now that nothing is pending, both go.
	eventually(t, func() bool {
		consumers, err := admin.XInfoConsumers(ctx, topic, testGroup).Result()
		require.NoError(t, err)
		for _, c := range consumers {
			if c.Name == "idler" || c.Name == "returns" {
				return false
			}
		}
		return true
	}, "idle consumers are not removed")
}

// addPending publishes a message and delivers it to the consumer, in one step,
// so that no other one gets it. It stays pending: its consumer died. It returns
// the entry's ID.
func addPending(t testing.TB, client *redis.Client, topic, consumer, payload string) string {
	t.Helper()
	values, err := goxstreams.DefaultMarshaler{}.Marshal(topic, message.NewMessage(watermill.NewUUID(), message.Payload(payload)))
	require.NoError(t, err)
	var add *redis.StringCmd
	_, err = client.TxPipelined(context.Background(), func(p redis.Pipeliner) error {
		add = p.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, Values: values})
		p.XReadGroup(context.Background(), &redis.XReadGroupArgs{
			Group: testGroup, Consumer: consumer, Streams: []string{topic, ">"}, Count: 1, Block: -1,
		})
		return nil
	})
	require.NoError(t, err)
	return add.Val()
}

// Both peers write flags and batches from one goroutine and read them from
// another. Here everything that the API allows happens at once, under the race
// detector (which has to be on for this test to mean anything).
func TestFault17_DataRaces(t *testing.T) {
	testserver.RequireReal(t) // claims by idle time
	client := newClient(t)
	topic := topic(t)
	config := grouped(client)
	config.MaxConcurrency = 8
	config.Retry = quickRetry()
	config.ClaimMinIdle = 300 * time.Millisecond
	config.ConsumerTimeout = 100 * time.Millisecond
	config.CloseTimeout = patience
	const messages = 600
	var handled sync.Map
	var wg, publishing sync.WaitGroup
	done := make(chan struct{})
	defer func() {
		close(done)
		wg.Wait()
	}()
	// handle acks each message at its second delivery, or later.
	handle := func(ch <-chan *message.Message) {
		for msg := range ch {
			wg.Go(func() {
				if n, _ := handled.LoadOrStore(msg.UUID, new(atomic.Int64)); n.(*atomic.Int64).Add(1) > 1 {
					msg.Ack()
				} else {
					msg.Nack()
				}
			})
		}
	}
	pub := newPublisher(t, client)
	for range 4 {
		publishing.Go(func() {
			for range messages / 12 {
				if err := pub.Publish(topic, numbered(3)...); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() { // subscribers come and go
			for round := 0; ; round++ {
				sub, err := goxstreams.NewSubscriber(config, newLogRecorder())
				if err != nil {
					t.Error(err)
					return
				}
				var subscriptions sync.WaitGroup
				for range 2 {
					subscriptions.Go(func() {
						ctx, cancel := context.WithCancel(context.Background())
						defer cancel()
						ch, err := sub.Subscribe(ctx, topic)
						if errors.Is(err, goxstreams.ErrSubscriberClosed) {
							return
						} else if err != nil {
							t.Error(err)
							return
						}
						if round%2 == 0 {
							time.AfterFunc(20*time.Millisecond, cancel)
						}
						handle(ch)
					})
				}
				for range 2 {
					subscriptions.Go(func() {
						_ = sub.Stats()
						if err := sub.SubscribeInitialize(topic); err != nil {
							t.Error(err)
						}
						time.Sleep(30 * time.Millisecond) // any moment of their work will do
						_ = sub.Close()
						if _, err := sub.Subscribe(context.Background(), topic); !errors.Is(err, goxstreams.ErrSubscriberClosed) {
							t.Errorf("Subscribe after Close: %v", err)
						}
						_ = sub.Stats()
					})
				}
				subscriptions.Wait()
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	publishing.Wait()
	eventuallyAll(t, func() int {
		n := 0
		handled.Range(func(_, deliveries any) bool {
			if deliveries.(*atomic.Int64).Load() > 1 {
				n++
			}
			return true
		})
		return n
	}, messages)
	eventuallySettled(t, client, topic, testGroup)
}

// goxstreams asks whether the group exists and then makes it: of several
// processes that start at once, some fail with BUSYGROUP (25 of 120). That the
// group is there is what was wanted.
func TestFault18_GroupCreationFailsAtOnce(t *testing.T) {
	client := newClient(t)
	for range 5 {
		topic := topic(t)
		start := make(chan struct{})
		var wg sync.WaitGroup
		for i := range 24 {
			sub := newSubscriber(t, grouped(client))
			wg.Go(func() {
				<-start
				if i%2 == 0 {
					if err := sub.SubscribeInitialize(topic); err != nil {
						t.Error(err)
					}
				}
				if _, err := sub.Subscribe(context.Background(), topic); err != nil {
					t.Error(err)
				}
			})
		}
		close(start)
		wg.Wait()
		groups, err := client.XInfoGroups(context.Background(), topic).Result()
		require.NoError(t, err)
		require.Len(t, groups, 1)
	}
}

// That the group exists must not move it either: what it has not read yet stays
// to be read.
func TestFault18_ExistingGroupKeepsItsPlace(t *testing.T) {
	client := newClient(t)
	topic := topic(t)
	config := grouped(client)
	require.NoError(t, newSubscriber(t, config).SubscribeInitialize(topic))
	publishN(t, client, topic, 3)
	config.StartID = "$"
	sub := newSubscriber(t, config)
	require.NoError(t, sub.SubscribeInitialize(topic))
	require.Len(t, collect(subscribe(t, sub, topic), 3, patience), 3)
}

// watermill-redisstream's constructor changes the MaxLens map of the config: the
// caller's own, which may be shared by publishers, a race for a start. Here the map is copied.
func TestFault19_CallersMaxLensChanged(t *testing.T) {
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

	// And what the caller does with the map later is not the Publisher's business.
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

// goxstreams retries what is pending under its own consumer name, and nothing
// else. A pod's name is new with each start, so what a crashed pod held is never
// handled again. Here it is claimed, whatever its consumer was called.
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

// goxstreams' Run returns at once, so that main cannot wait for the work in
// hand; it is lost when main returns. Here Close, and the channel's end, are
// what to wait for: handlers are done and their acks are in Redis by then.
func TestFault22_EndCanBeAwaited(t *testing.T) {
	t.Parallel()
	for _, byContext := range []bool{false, true} {
		t.Run(fmt.Sprintf("by context %t", byContext), func(t *testing.T) {
			client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if cmd.Name() == "xack" {
					time.Sleep(50 * time.Millisecond) // to be overtaken by an end that does not wait: the longer, the surer
				}
				return next()
			}})
			topic := topic(t)
			const n = 4
			config := grouped(client)
			config.MaxConcurrency, config.CloseTimeout = n, patience
			sub := newSubscriber(t, config)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			messages, err := sub.Subscribe(ctx, topic)
			require.NoError(t, err)
			publishN(t, client, topic, n)
			var inHand []*message.Message
			for range n {
				inHand = append(inHand, next(t, messages))
			}

			ended := make(chan struct{})
			go func() {
				defer close(ended)
				if !byContext {
					_ = sub.Close()
				}
				closed(messages, patience)
			}()
			cancelled := make(chan struct{})
			if byContext {
				cancel()
			}
			// It waits for each of them: that it does not end early can only be seen
			// by giving it the time that an end takes.
			go func() {
				defer close(cancelled)
				for i, msg := range inHand {
					select {
					case <-ended:
						t.Errorf("it ended with %d messages in hand", n-i)
						return
					case <-time.After(30 * time.Millisecond):
					}
					if err := msg.Context().Err(); err != nil {
						t.Errorf("the context of a message in hand ended: %v", err)
					}
					msg.Ack()
				}
			}()
			<-cancelled
			<-ended
			require.Empty(t, pendingOf(t, client, topic, testGroup), "acks were not seen off")
		})
	}
}

// panicking panics in Unmarshal until told to stop, for the payload "broken".
type panicking struct{ goxstreams.DefaultMarshaler }

func (p panicking) Unmarshal(values map[string]any) (*message.Message, error) {
	if values["payload"] == "broken" {
		panic("Unmarshal")
	}
	return p.DefaultMarshaler.Unmarshal(values)
}

// A panic in a function that the user gave to goxstreams ends the process, with
// all the work of others in it. Here it costs the message at hand a retry at
// most.
func TestFault22_PanicInCallback(t *testing.T) {
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
		dead    int64 // how many of the two end in the dead-letter stream
	}{
		{"Unmarshaler", "broken", config{Unmarshaler: panicking{}}, ack, "panicking panicked: Unmarshal", 1},
		{"Unmarshaler, within a limit", "broken", config{Unmarshaler: panicking{}, Retry: retry(func(r *goxstreams.Retry) { r.MaxRetries = 3 })}, ack, "panicked: Unmarshal", 1},
		{"OnDead", "good", config{
			Retry:  retry(func(r *goxstreams.Retry) { r.MaxRetries = 1 }),
			OnDead: func(context.Context, goxstreams.DeadMessage) { panic("OnDead") },
		}, nackAll, "panic: OnDead", 2},
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
			require.NoError(t, sub.Close()) // which waits for OnDead
			require.Contains(t, strings.Join(log.Errors(), "\n"), tt.logged)
		})
	}
}

// OnBroken panics, and then returns an error, and then is content: the entry
// comes again each time, and the message behind it waits for none of that.
func TestFault22_PanicInOnBroken(t *testing.T) {
	client := newClient(t)
	topic := topic(t)
	var calls atomic.Int64
	config := grouped(client)
	config.Unmarshaler, config.Retry = panicking{}, quickRetry()
	config.OnBroken = func(_ context.Context, b goxstreams.BrokenMessage) error {
		switch n := calls.Add(1); {
		case b.RetryCount != n-1 || !errors.Is(b.Err, goxstreams.ErrBroken):
			t.Errorf("call %d is told of %d retries and %v", n, b.RetryCount, b.Err)
			return nil
		case n == 1:
			panic("OnBroken")
		case n == 2:
			return errors.New("not now")
		}
		return nil
	}
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "broken", "good")
	require.Equal(t, []string{"good"}, payloads(collect(messages, 1, patience)))
	eventuallySettled(t, client, topic, testGroup)
	require.EqualValues(t, 3, calls.Load())
	require.Contains(t, strings.Join(log.Errors(), "\n"), "panic: OnBroken")
}

// What Redis can answer, or not answer. goxstreams ends the process by log.Fatal
// on some of it. Here every command gets the same error for a while, and
// then the subscription goes on where it was, by itself.
func TestFault22_ErrorEndsTheProcess(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	for _, fault := range []error{
		errors.New("no Redis error at all"),
		net.ErrClosed,
		context.DeadlineExceeded,
		redis.ErrPoolTimeout,
		redisError("ERR unknown command"),
		redisError("NOPERM this user has no permissions"),
		redisError("NOAUTH Authentication required."),
		redisError("LOADING Redis is loading the dataset in memory"),
		redisError("READONLY You can't write against a read only replica."),
		redisError("OOM command not allowed when used memory > 'maxmemory'."),
		redisError("MASTERDOWN Link with MASTER is down"),
		redisError("NOREPLICAS Not enough good replicas to write."),
		redisError("CLUSTERDOWN The cluster is down"),
		redisError("BUSY Redis is busy running a script."),
		redisError("MISCONF Redis is configured to save RDB snapshots"),
		redisError("WRONGTYPE Operation against a key holding the wrong kind of value"),
		redisError("NOGROUP No such key"),
		redisError("UNBLOCKED force unblock from blocking operation, instance state changed"),
		redisError("-1"),
		redis.Nil,
	} {
		t.Run(fmt.Sprint(fault), func(t *testing.T) {
			t.Parallel()
			var failing atomic.Bool
			var failed, worked sync.Map
			client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				name := cmd.Name()
				if isRenewal(cmd) {
					name = "renewal"
				} else if isClaim(cmd) {
					name = "claim"
				}
				if !failing.Load() {
					worked.Store(name, true)
					return next()
				}
				failed.Store(name, true)
				return fault
			}})
			admin := newClient(t)
			topic := topic(t)
			config := grouped(client)
			config.MaxConcurrency, config.Retry = 4, quickRetry()
			config.BlockTime = 50 * time.Millisecond // so that reads notice
			config.ClaimMinIdle = 600 * time.Millisecond
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			want := publishN(t, admin, topic, 3)
			toAck, toNack, toKeep := next(t, messages), next(t, messages), next(t, messages)

			failing.Store(true)
			want = append(want, publishN(t, admin, topic, 10)...)
			toAck.Ack()
			toNack.Nack()
			for _, name := range []string{"xreadgroup", "xack", "claim", "xpending", "renewal"} {
				eventually(t, func() bool { _, ok := failed.Load(name); return ok }, name)
			}
			if fault != redis.Nil { // which is an answer: nothing there
				eventually(t, func() bool { return errors.Is(stats(t, sub).Err, fault) }, "Stats does not show the outage")
			}
			worked.Clear()
			failing.Store(false)

			got := map[string]bool{toAck.UUID: true}
			for len(got) < len(want)-1 { // toNack again, and the new ones
				msg := next(t, messages)
				require.NotEqual(t, toKeep.UUID, msg.UUID, "a message in hand was delivered again")
				msg.Ack()
				got[msg.UUID] = true
			}
			eventually(t, func() bool { _, ok := worked.Load("renewal"); return ok }, "leases are not renewed any more")
			require.NoError(t, context.Cause(toKeep.Context()))
			toKeep.Ack()
			got[toKeep.UUID] = true
			for _, id := range want {
				require.Contains(t, got, id)
			}
			eventuallySettled(t, admin, topic, testGroup)
			eventually(t, func() bool { return stats(t, sub).Err == nil }, "Stats shows the outage still")
		})
	}
}

type redisError string

func (e redisError) Error() string { return string(e) }
func (redisError) RedisError()     {}

// goxstreams reads ahead, and what it has read waits for a free place with
// nobody renewing it: a slow handler makes what is behind it look abandoned, so
// that it is claimed, and counted as another failure, without ever having been
// handled. Here what is prefetched is kept alive too.
func TestFault24_WaitingEntriesAge(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	client := newClient(t)
	topic := topic(t)
	config := claiming(client)
	config.Retry = &goxstreams.Retry{MaxRetries: 1}
	slow := newSubscriber(t, config)
	messages := subscribe(t, slow, topic)
	// A quick handler makes the prefetch grow, until all that is left is prefetched.
	const n = 300
	publishN(t, client, topic, n)
	last, err := client.XRevRangeN(context.Background(), topic, "+", "-", 1).Result()
	require.NoError(t, err)
	inHand, handled := next(t, messages), 1
	for {
		groups, err := client.XInfoGroups(context.Background(), topic).Result()
		require.NoError(t, err)
		if groups[0].LastDeliveredID == last[0].ID {
			break
		}
		inHand.Ack()
		inHand = next(t, messages)
		handled++
	}
	prefetched := n - handled
	require.Positive(t, prefetched)

	// Now the handler is slow, while a second consumer has nothing to do but to
	// claim. What it claims of a consumer that really died says that the time is
	// up for what nobody renewed; three times, for good measure.
	idle := config
	idle.Client = newClient(t)
	claimer := newSubscriber(t, idle)
	claims := subscribe(t, claimer, topic)
	abandoned := make(map[string]bool)
	for range 3 {
		abandoned[addPending(t, client, topic, "dead", "abandoned")] = true
		require.Equal(t, []string{"abandoned"}, payloads(collect(claims, 1, patience)))
	}
	for _, p := range pendingOf(t, client, topic, testGroup) {
		if !abandoned[p.ID] { // whose XACK may still be under way
			require.EqualValues(t, 1, p.RetryCount, "entry %s has lost a retry while it waited", p.ID)
		}
	}
	require.NoError(t, context.Cause(inHand.Context()))
	inHand.Ack()
	for _, msg := range collect(messages, prefetched, patience) {
		require.EqualValues(t, 1, delivery(t, msg).Count)
		handled++
	}
	require.Equal(t, n, handled)
	require.EqualValues(t, 3, stats(t, claimer).Claimed, "only what was abandoned is claimed")
	eventuallySettled(t, client, topic, testGroup)
	require.Zero(t, client.XLen(context.Background(), goxstreams.DeadLetterTopic(topic)).Val())
}
