package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Close returns at CloseTimeout plus one command's timeout at the latest, whatever
// the user's code does, and however patient the client is.

// closeSlack is what Close may take beyond CloseTimeout here: a command's timeout,
// and a busy machine.
const closeSlack = 6 * time.Second

// endsWithin fails the test if what is run, in a goroutine of its own, does not
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

// OnRetryHook called Close of its own Subscriber, on an error that it took for
// fatal. Close waited for the slot, and the slot for the hook: both for ever, and
// with them whoever else called Close. A hook that hangs did the same to a Close from
// outside. Whichever code of the user's it is, Close gives up on it at CloseTimeout.
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
	// Subscribe that is under way.
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

// go-redis takes a ReadTimeout of -1 or -2 for none. A client with such a one was
// stuck on a server that had been stopped, and Close waited for its commands, which
// do not heed their context either: it never returned. It gives up on them soon after
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
		var late []*message.Message // acked when nothing answers any more
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

	// Nothing can be done any more without the client: there is nothing to wait for.
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
