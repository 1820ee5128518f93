package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
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
	"go.uber.org/goleak"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 6: Close returns at CloseTimeout plus one command's timeout at the
// latest, whatever the user's code does, and however long the client's timeouts
// are.

// closeSlack is how long Close may take beyond CloseTimeout here: a command's
// timeout, plus the delays of a busy machine.
const closeSlack = 6 * time.Second

// endsWithin runs a function in a goroutine, and fails the test if it does not
// return in time.
func endsWithin(t testing.TB, limit time.Duration, what string, run func()) {
	t.Helper()
	began, done := time.Now(), make(chan struct{})
	go func() { defer close(done); run() }()
	select {
	case <-done:
		t.Logf("%s returned after %s", what, time.Since(began).Round(time.Millisecond))
	case <-time.After(limit):
		assert.Failf(t, "it does not return", "%s, within %s", what, limit)
	}
}

type unmarshalerFunc func(values map[string]any) (*message.Message, error)

func (f unmarshalerFunc) Unmarshal(values map[string]any) (*message.Message, error) { return f(values) }

// OnRetryHook called Close of its own Subscriber, because of an error that it
// considered fatal. Close waited for the slot, and the slot for the hook, both
// forever, and with them all other callers of Close. A hook that hangs blocked a
// Close from outside in the same way. Now Close gives up on any function of the
// user's at CloseTimeout.
func TestFault35_CloseFromTheUsersCode(t *testing.T) {
	t.Parallel()
	const closeTimeout = 500 * time.Millisecond
	malformed := unmarshalerFunc(func(map[string]any) (*message.Message, error) { return nil, errors.New("malformed") })
	nack := func(*message.Message) ([]*message.Message, error) { return nil, errors.New("failed") }
	ack := func(*message.Message) ([]*message.Message, error) { return nil, nil }
	for _, tt := range []struct {
		name   string
		set    func(c *goxstreams.SubscriberConfig, call func())
		handle func(call func()) message.HandlerFunc
	}{
		{"OnRetryHook", func(c *goxstreams.SubscriberConfig, call func()) {
			c.Retry.OnRetryHook = func(int, time.Duration) { call() }
		}, func(func()) message.HandlerFunc { return nack }},
		{"OnRetryHook of the middleware", func(*goxstreams.SubscriberConfig, func()) {}, func(call func()) message.HandlerFunc {
			return goxstreams.Retry{OnRetryHook: func(int, time.Duration) { call() }}.Middleware(nack)
		}},
		{"ShouldRetry", func(c *goxstreams.SubscriberConfig, call func()) {
			c.Retry.ShouldRetry = func(middleware.RetryParams) bool { call(); return true }
		}, func(func()) message.HandlerFunc { return nack }},
		{"DeadLetter.Topic", func(*goxstreams.SubscriberConfig, func()) {}, func(call func()) message.HandlerFunc {
			return goxstreams.DeadLetter{
				ShouldDeadLetter: func(error) bool { return true },
				Topic:            func(topic string) string { call(); return topic + ".failed" },
			}.Middleware(nack)
		}},
		{"Unmarshaler", func(c *goxstreams.SubscriberConfig, call func()) {
			c.Unmarshaler = unmarshalerFunc(func(values map[string]any) (*message.Message, error) {
				call()
				return goxstreams.DefaultMarshaler{}.Unmarshal(values)
			})
		}, func(func()) message.HandlerFunc { return ack }},
		{"Unmarshaler in fan-out", func(c *goxstreams.SubscriberConfig, call func()) {
			c.ConsumerGroup, c.Retry = "", nil
			c.Unmarshaler = unmarshalerFunc(func(values map[string]any) (*message.Message, error) {
				call()
				return goxstreams.DefaultMarshaler{}.Unmarshal(values)
			})
		}, func(func()) message.HandlerFunc { return ack }},
		{"OnBroken", func(c *goxstreams.SubscriberConfig, call func()) {
			c.Unmarshaler = malformed
			c.OnBroken = func(context.Context, goxstreams.BrokenMessage) error { call(); return nil }
		}, func(func()) message.HandlerFunc { return ack }},
		{"OnDead", func(c *goxstreams.SubscriberConfig, call func()) {
			c.Retry.MaxRetries = -1
			c.OnDead = func(context.Context, goxstreams.DeadMessage) { call() }
		}, func(func()) message.HandlerFunc { return nack }},
		{"OnOutcome", func(c *goxstreams.SubscriberConfig, call func()) {
			c.OnOutcome = func(goxstreams.Outcome) { call() }
		}, func(func()) message.HandlerFunc { return ack }},
		{"handler", func(*goxstreams.SubscriberConfig, func()) {}, func(call func()) message.HandlerFunc {
			return func(*message.Message) ([]*message.Message, error) { call(); return nil, nil }
		}},
	} {
		for _, hangs := range []bool{false, true} {
			name := tt.name + " closes"
			if hangs {
				name = tt.name + " hangs"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				var sub *goxstreams.Subscriber
				var once sync.Once
				called, returned, release := make(chan struct{}), make(chan struct{}), make(chan struct{})
				defer close(release)
				call := func() {
					once.Do(func() {
						close(called)
						if hangs {
							<-release
							return
						}
						_ = sub.Close()
						close(returned)
					})
				}
				client, topic := newClient(t), topic(t)
				config := grouped(client)
				config.Retry = quickRetry()
				config.CloseTimeout = closeTimeout
				tt.set(&config, call)
				var err error
				sub, err = goxstreams.NewSubscriber(config, nil)
				require.NoError(t, err)
				messages := subscribe(t, sub, topic)
				handler := tt.handle(call)
				go func() {
					for msg := range messages {
						go func() {
							if _, err := handler(msg); err != nil {
								msg.Nack()
								return
							}
							msg.Ack()
						}()
					}
				}()
				publish(t, client, topic, "x")
				select {
				case <-called:
				case <-time.After(patience):
					require.FailNow(t, "it is never called")
				}
				endsWithin(t, closeTimeout+closeSlack, "Close from outside", func() { _ = sub.Close() })
				if !hangs {
					endsWithin(t, closeSlack, "Close from within", func() { <-returned })
				}
			})
		}
	}

	// Subscribe asks for the name of the dead-letter stream, and Close waits for a
	// Subscribe in progress.
	for _, hangs := range []bool{false, true} {
		name := "DeadLetterTopic closes"
		if hangs {
			name = "DeadLetterTopic hangs"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var sub *goxstreams.Subscriber
			called, release := make(chan struct{}), make(chan struct{})
			config := grouped(newClient(t))
			config.CloseTimeout = closeTimeout
			config.DeadLetterTopic = func(topic string) string {
				close(called)
				if hangs {
					<-release
				} else {
					_ = sub.Close()
				}
				return goxstreams.DeadLetterTopic(topic)
			}
			var err error
			sub, err = goxstreams.NewSubscriber(config, nil)
			require.NoError(t, err)
			subscribed := make(chan error, 1)
			topic := topic(t)
			go func() {
				messages, err := sub.Subscribe(t.Context(), topic)
				if err == nil {
					closed(messages, patience)
				}
				subscribed <- err
			}()
			<-called
			endsWithin(t, closeTimeout+closeSlack, "Close", func() { _ = sub.Close() })
			close(release)
			endsWithin(t, closeTimeout+closeSlack, "Subscribe", func() {
				if err := <-subscribed; err != nil {
					assert.ErrorIs(t, err, goxstreams.ErrSubscriberClosed)
				}
			})
		})
	}

	// A Consumer's Codec.
	t.Run("Codec hangs", func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		codec := &hangingCodec{called: make(chan struct{}), release: make(chan struct{})}
		defer close(codec.release)
		config := grouped(client)
		config.CloseTimeout = closeTimeout
		consumer, err := goxstreams.NewConsumer[string](idleWorker{}, goxstreams.ConsumerConfig{
			Subscriber: config, Topic: topic, Codec: codec,
		}, nil)
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		ended := make(chan struct{})
		go func() { defer close(ended); _ = consumer.Run(ctx) }()
		publish(t, client, topic, "x")
		select {
		case <-codec.called:
		case <-time.After(patience):
			require.FailNow(t, "it is never called")
		}
		cancel()
		endsWithin(t, closeTimeout+closeSlack, "Run", func() { <-ended })
	})
}

type hangingCodec struct {
	once            sync.Once
	called, release chan struct{}
}

func (*hangingCodec) Encode(any) ([]byte, error) { return nil, errors.New("not used") }

func (c *hangingCodec) Decode([]byte, any) error {
	c.once.Do(func() { close(c.called) })
	<-c.release
	return nil
}

type idleWorker struct{}

func (idleWorker) Process(context.Context, goxstreams.Message[string]) error     { return nil }
func (idleWorker) ProcessBroken(context.Context, goxstreams.BrokenMessage) error { return nil }
func (idleWorker) ProcessDead(context.Context, goxstreams.Message[string]) error { return nil }

// go-redis treats a ReadTimeout of -1 or -2 as none. Such a client hung on a server
// that had been frozen, and Close waited for its commands, which ignore their
// contexts, too: it never returned. Now it gives up on them soon after
// CloseTimeout, whatever the client waits for.
func TestFault55_CloseHasAnEnd(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)

	t.Run("frozen", func(t *testing.T) {
		t.Parallel()
		const closeTimeout = time.Second
		server := testserver.Private(t)
		admin := server.Client()
		open := func(readTimeout time.Duration, config goxstreams.SubscriberConfig, hooks ...redis.Hook) *goxstreams.Subscriber {
			client := redis.NewClient(&redis.Options{Addr: server.Addr(), ReadTimeout: readTimeout})
			t.Cleanup(func() { _ = client.Close() })
			for _, h := range hooks {
				client.AddHook(h)
			}
			config.Client, config.CloseTimeout = client, closeTimeout
			sub, err := goxstreams.NewSubscriber(config, nil)
			require.NoError(t, err)
			return sub
		}
		closes := make(map[string]func())
		group, noAck := grouped(nil), grouped(nil)
		group.MaxConcurrency, noAck.NoAck = 2, true
		var late []*message.Message // acked after the server has stopped answering
		for _, readTimeout := range []time.Duration{-1, -2} {
			for _, tt := range []struct {
				name     string
				config   goxstreams.SubscriberConfig
				messages int
			}{
				{"an idle group", group, 0},
				{"an unacked message", group, 1},
				{"an unacked message and an acked one", group, 2},
				{"NoAck", noAck, 1},
				{"fan-out", goxstreams.SubscriberConfig{}, 0},
			} {
				sub, topic := open(readTimeout, tt.config), topic(t)
				messages := subscribe(t, sub, topic)
				publishN(t, admin, topic, tt.messages)
				for i := range tt.messages {
					if msg := next(t, messages); i > 0 {
						late = append(late, msg)
					}
				}
				closes[fmt.Sprintf("Close with ReadTimeout %d, %s", readTimeout, tt.name)] = func() { _ = sub.Close() }
			}
		}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		endless, err := open(-1, group).Subscribe(ctx, topic(t))
		require.NoError(t, err)
		closes["the end of Subscribe's context"] = func() {
			cancel()
			for range endless {
			}
		}
		opening := make(chan struct{})
		asks := sync.OnceFunc(func() { close(opening) })
		stuck := open(-1, group, &hook{process: func(_ context.Context, _ redis.Cmder, next func() error) error {
			asks()
			return next()
		}})
		closes["Close while Subscribe is under way"] = func() { _ = stuck.Close() }

		server.Freeze()
		defer server.Thaw()
		for _, msg := range late {
			msg.Ack()
		}
		stuckTopic := topic(t)
		go func() { _, _ = stuck.Subscribe(context.Background(), stuckTopic) }()
		<-opening
		var all sync.WaitGroup
		for name, run := range closes {
			all.Go(func() { endsWithin(t, closeTimeout+closeSlack, name, run) })
		}
		all.Wait()
	})

	// Without the client nothing can be done any more, so there is nothing to wait
	// for.
	t.Run("client closed", func(t *testing.T) {
		t.Parallel()
		const closeTimeout = 20 * time.Second
		for _, acked := range []bool{false, true} {
			t.Run(fmt.Sprintf("acked %t", acked), func(t *testing.T) {
				t.Parallel()
				client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t)})
				config := grouped(client)
				config.CloseTimeout = closeTimeout
				topic := topic(t)
				sub, err := goxstreams.NewSubscriber(config, nil)
				require.NoError(t, err)
				messages := subscribe(t, sub, topic)
				publish(t, client, topic, "x")
				msg := next(t, messages)
				require.NoError(t, client.Close())
				if acked {
					msg.Ack()
				}
				endsWithin(t, closeTimeout/4, "Close", func() { _ = sub.Close() })
			})
		}
	})
}

// watermill-redisstream's Close cancels its read, which it then logs as an error,
// and the claiming goroutine stays until its next tick: a clean shutdown looks like
// a failure, and tests with goleak fail.
func TestFault14_CloseLogsAnErrorAndLeaksAGoroutine(t *testing.T) {
	testserver.RequireReal(t) // the embedded server's goroutines are this process's too
	nothing := func(*testing.T, *goxstreams.Subscriber, <-chan *message.Message) {}
	unsettled := func(t *testing.T, _ *goxstreams.Subscriber, messages <-chan *message.Message) {
		msg := next(t, messages)
		go func() { // a handler that finishes when its context ends
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
				config.Client, config.CloseTimeout = client, 2*time.Second // half of it is for the handlers
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

// Both earlier libraries write flags and batches in one goroutine and read them in
// another. Here everything that the API allows happens concurrently, under the race
// detector (which must be enabled for this test to be meaningful).
func TestFault17_DataRaces(t *testing.T) {
	t.Parallel()
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
				// Any moment of their work will do. Lives grow, since on a busy machine
				// a short one ends before it has handled anything.
				life := time.Duration(30+round) * time.Millisecond
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
							time.AfterFunc(life-10*time.Millisecond, cancel)
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
						time.Sleep(life)
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

// goxstreams' Run returns at once, so main cannot wait for running handlers; their
// work is lost when main returns. Here main can wait for Close, or for the end of
// the channel: by then handlers are done and their acks are in Redis.
func TestFault22_EndCanBeAwaited(t *testing.T) {
	t.Parallel()
	for _, byContext := range []bool{false, true} {
		t.Run(fmt.Sprintf("by context %t", byContext), func(t *testing.T) {
			client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if cmd.Name() == "xack" {
					time.Sleep(50 * time.Millisecond) // an end that does not wait would overtake it: the longer, the more certain
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
			// It waits for each of them. That it does not end early can only be
			// shown by allowing the time that an end takes.
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

// watermill-redisstream: Router.Close cancels the subscription's context, and the
// subscription does not wait for the running handler. The handler succeeds, its ack
// is dropped, and the message is handled again.
func TestFault02_RouterCloseKeepsAcks(t *testing.T) {
	t.Parallel()
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

// watermill-redisstream: a nacked message's delay is a sleep, and Close waits for
// it: 4 s of 4 s.
func TestFault08_CloseDoesNotWaitForARetry(t *testing.T) {
	t.Parallel()
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

			// The next consumer does not wait either. The failure counts.
			msg := next(t, subscribe(t, newSubscriber(t, config), topic))
			require.EqualValues(t, 2, delivery(t, msg).Count)
			msg.Ack()
		})
	}
}

// watermill-redisstream: a canceled context does not end a blocking read. After
// Close it continues for a minute, and takes the next message that is published,
// which is then pending for a consumer that no longer exists.
//
// Here Close wakes the read and waits for its end.
func TestFault09_NoReadOutlivesClose(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, tt := range []struct{ name, group string }{{"Group", testGroup}, {"FanOut", ""}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			// A server of its own, so that no other test's read is blocking there.
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

	// CLIENT UNBLOCK does nothing if it arrives before its read.
	t.Run("WokenTooEarly", func(t *testing.T) {
		t.Parallel()
		woken := make(chan struct{})
		once := sync.Once{}
		var closing atomic.Bool
		reading := make(chan struct{}, 1)
		client := testserver.Private(t).Client()
		client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, run func() error) error {
			switch cmd.Name() {
			case "xreadgroup": // delayed until a wake-up had no effect
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

// TestClose tests how long Close takes and what it leaves behind.
func TestClose(t *testing.T) {
	t.Parallel()
	// An idle subscription is in a blocking read. Waking it may be slow.
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
		msg.Nack() // because of the shutdown, which is not a failure; after timeout it would no longer be released
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

// takesNothing checks that a closed consumer has not kept these messages: another
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

// TestConsumerNames: unused names leave the group, and nothing is lost.
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
		// Longer than two rounds of the janitor, which removes idle consumers.
		during(t, 3*config.ConsumerTimeout, func() bool {
			names := consumersOf(t, client, topic)
			return slices.Contains(names, "busy") && slices.Contains(names, live)
		}, "a consumer with something pending is removed")
		held.Ack()
		eventually(t, func() bool {
			rows := pendingOf(t, client, topic, testGroup)
			return len(rows) == 1 && rows[0].ID == busy[0]
		})
		// If the live one is removed, it must not lose a message.
		require.NoError(t, client.XGroupDelConsumer(t.Context(), topic, testGroup, live).Err())
		publish(t, client, topic, "last")
		msg := next(t, messages)
		assert.Equal(t, "last", string(msg.Payload))
		msg.Ack()
	})
}

// Found by TestFault17 on a busy machine: a renewal that is sent late takes back
// entries that its own process has released in the meantime. The entries are then
// pending for a consumer that is gone, and are redelivered only when their leases
// expire.
func TestRelease_LateRenewalTakesNothingBack(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	admin := newClient(t)
	topic := topic(t)
	const n = 20
	publishN(t, admin, topic, n)

	renewing, released, renewed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	begin, end, again := sync.OnceFunc(func() { close(renewing) }), sync.OnceFunc(func() { close(released) }), sync.OnceFunc(func() { close(renewed) })
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		switch {
		case isRenewal(cmd):
			begin()
			select {
			case <-released:
				defer again()
			case <-time.After(300 * time.Millisecond): // a Close that does not wait takes a fraction of that
			}
		case isRelease(cmd):
			defer end()
		}
		return next()
	}})
	config := grouped(client)
	config.ClaimMinIdle = 600 * time.Millisecond
	config.CloseTimeout = patience
	config.MaxConcurrency = n
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	inHand := next(t, messages) // the others are offered, or prefetched
	eventually(t, func() bool { return len(pendingOf(t, admin, topic, testGroup)) > 1 })
	<-renewing
	go func() {
		<-renewed // while a handler runs, leases are renewed
		inHand.Ack()
	}()
	require.NoError(t, sub.Close())
	for _, p := range pendingOf(t, admin, topic, testGroup) {
		require.Equal(t, "released", p.Consumer, "who holds %s", p.ID)
		require.Zero(t, p.RetryCount)
	}
}

// A handler ignores the end of its context, and CloseTimeout passes. The message
// stays pending for its consumer, since the handler may still be running. But a
// shutdown is not a failure, so this delivery does not count.
func TestRelease_AbandonedDeliveryDoesNotCount(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	const n = 5
	config := grouped(client)
	config.MaxConcurrency, config.CloseTimeout = n, 100*time.Millisecond
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	publishN(t, client, topic, n)
	for range n {
		next(t, messages)
	}
	require.NoError(t, sub.Close())
	rows := pendingOf(t, client, topic, testGroup)
	require.Len(t, rows, n)
	for _, p := range rows {
		require.NotEqual(t, "released", p.Consumer)
		require.Zero(t, p.RetryCount)
	}
	require.Empty(t, log.Errors())
}

// A middleware gave up on a handler that kept running, and gave the message a new
// context, while the subscription read the handler's name from it: a data race,
// which the race detector finds here, and a dead letter without the name.
func TestStragglerSetsContext(t *testing.T) {
	t.Parallel()
	const n = 20
	client, topic := newClient(t), topic(t)
	config := limited(client, 3)
	config.MaxConcurrency = n
	var stragglers sync.WaitGroup
	hardTimeout := func(message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) {
			stragglers.Go(func() { msg.SetContext(context.Background()) })
			return nil, goxstreams.Permanent(errBad)
		}
	}
	publishN(t, client, topic, n)
	stop := routed(t, newSubscriber(t, config), topic, nil, goxstreams.Retry{}.Middleware, hardTimeout)
	eventually(t, func() bool { return len(deadOf(t, client, topic)) == n })
	stop()
	stragglers.Wait()
	for _, letter := range deadOf(t, client, topic) {
		require.Equal(t, "handler", letter.Handler)
	}
}

// An entry turns out to be malformed while its subscription closes: it is released
// at once and uncounted, and does not wait for a call that nobody makes any more.
func TestClose_WhileDecoding(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	decoding, decoded := make(chan struct{}), make(chan struct{})
	config := grouped(client)
	config.CloseTimeout = patience
	config.Unmarshaler = unmarshalerFunc(func(map[string]any) (*message.Message, error) {
		close(decoding)
		<-decoded
		return nil, errFails
	})
	config.OnBroken = func(context.Context, goxstreams.BrokenMessage) error { return errFails }
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "x")
	<-decoding
	closing := make(chan struct{})
	go func() { defer close(closing); _ = sub.Close() }()
	eventually(t, func() bool {
		_, err := sub.Subscribe(t.Context(), topic)
		return errors.Is(err, goxstreams.ErrSubscriberClosed)
	})
	close(decoded)
	<-closing
	_, open := <-messages
	require.False(t, open)
	rows := pendingOf(t, client, topic, testGroup)
	require.Len(t, rows, 1)
	require.Equal(t, "released", rows[0].Consumer)
	require.Zero(t, rows[0].RetryCount)
}
