package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
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

var errNotUp = errors.New("nobody listens yet")

// notUpYet is a server that is unreachable, or not ready, until it is told to be. A
// real one would make the test wait for its start.
type notUpYet struct {
	up      atomic.Bool
	loading bool // it answers, with LOADING
	tries   atomic.Int64
}

func (s *notUpYet) client(t testing.TB) *redis.Client {
	t.Helper()
	client := redis.NewClient(&redis.Options{
		Addr: testserver.Addr(t), MaxRetries: -1, DialerRetries: 1,
		Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if !s.loading && !s.up.Load() {
				s.tries.Add(1)
				return nil, &net.OpError{Op: "dial", Net: network, Err: errNotUp}
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
	})
	t.Cleanup(func() { _ = client.Close() })
	client.AddHook(&hook{process: func(_ context.Context, _ redis.Cmder, next func() error) error {
		if s.loading && !s.up.Load() {
			s.tries.Add(1)
			return redisError("LOADING Redis is loading the dataset in memory")
		}
		return next()
	}})
	return client
}

// opened is the result of a Subscribe in a goroutine.
type opened struct {
	messages <-chan *message.Message
	err      error
}

func subscribeSoon(ctx context.Context, sub *goxstreams.Subscriber, topic string) <-chan opened {
	done := make(chan opened, 1)
	go func() {
		messages, err := sub.Subscribe(ctx, topic)
		done <- opened{messages, err}
	}()
	return done
}

// outcomeOf returns the result, and fails the test if it takes longer.
func outcomeOf(t testing.TB, done <-chan opened, limit time.Duration) opened {
	t.Helper()
	select {
	case o := <-done:
		return o
	case <-time.After(limit):
		require.FailNow(t, "Subscribe does not return")
		return opened{}
	}
}

// waiting waits until the Subscriber's only Subscribe waits for Redis, according to
// Stats.
func waiting(t testing.TB, sub *goxstreams.Subscriber, topic string, done <-chan opened) goxstreams.SubscriptionStats {
	t.Helper()
	var st goxstreams.SubscriptionStats
	eventually(t, func() bool {
		select {
		case o := <-done:
			require.FailNow(t, "Subscribe does not wait", "%v", o.err)
		default:
		}
		for _, st = range sub.Stats() {
			if st.Topic == topic && st.Err != nil {
				return true
			}
		}
		return false
	}, "Stats does not say that it waits")
	return st
}

// A deployment starts everything at once, including Redis: Subscribe failed, and
// the router's Run with it, and the process ended after 0.8 s and was restarted,
// until Redis was ready. With SubscriberConfig.WaitForRedis Subscribe waits that
// long for a Redis that is unreachable or still loading, and reports it.
func TestFault61_RedisIsNotUpYet(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // ACL
	configs := map[string]goxstreams.SubscriberConfig{"Group": grouped(nil), "FanOut": {}}
	for mode, config := range configs {
		for _, loading := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, loading %t", mode, loading), func(t *testing.T) {
				t.Parallel()
				server, topic := &notUpYet{loading: loading}, topic(t)
				logs := newLogRecorder()
				config := config // the subtests run at once
				config.Client, config.WaitForRedis = server.client(t), patience
				sub := newSubscriberLog(t, config, logs)
				before := time.Now()
				done := subscribeSoon(t.Context(), sub, topic)
				st := waiting(t, sub, topic, done)
				assert.False(t, st.Since.Before(before), "the outage begins with Subscribe")
				assert.False(t, st.Since.IsZero())
				if !loading {
					assert.ErrorIs(t, st.Err, errNotUp)
				}
				// It retries, and logs that once.
				tried := server.tries.Load()
				eventually(t, func() bool { return server.tries.Load() >= tried+3 }, "it does not try again")
				lines := slices.Concat(logs.Errors(), logs.Infos())
				assert.Len(t, lines, 1)

				server.up.Store(true)
				o := outcomeOf(t, done, patience)
				require.NoError(t, o.err)
				eventually(t, func() bool { return stats(t, sub).Err == nil }, "the outage does not end")
				publish(t, newClient(t), topic, "x")
				msg := next(t, o.messages)
				assert.Equal(t, "x", string(msg.Payload))
				msg.Ack()
			})
		}
	}

	t.Run("in vain", func(t *testing.T) {
		t.Parallel()
		const wait = 500 * time.Millisecond
		for _, loading := range []bool{false, true} {
			server, topic := &notUpYet{loading: loading}, topic(t)
			config := grouped(server.client(t))
			config.WaitForRedis = wait
			sub := newSubscriber(t, config)
			began := time.Now()
			o := outcomeOf(t, subscribeSoon(t.Context(), sub, topic), patience)
			took := time.Since(began)
			require.Error(t, o.err)
			if loading {
				assert.ErrorContains(t, o.err, "LOADING")
			} else {
				assert.ErrorIs(t, o.err, errNotUp, "the last error")
			}
			assert.GreaterOrEqual(t, took, wait)
			assert.Less(t, took, wait+slack)
			assert.Empty(t, sub.Stats(), "nothing waits any more")
		}
	})

	t.Run("not at all", func(t *testing.T) {
		t.Parallel()
		server, topic := &notUpYet{}, topic(t)
		sub := newSubscriber(t, grouped(server.client(t)))
		o := outcomeOf(t, subscribeSoon(t.Context(), sub, topic), slack)
		assert.ErrorIs(t, o.err, errNotUp)
	})

	// A new group needs memory, of which there may be some again.
	t.Run("out of memory", func(t *testing.T) {
		t.Parallel()
		client, topic := testserver.Private(t).Client(), topic(t)
		setFull(t, client, true)
		config := grouped(client)
		_, err := newSubscriber(t, config).Subscribe(t.Context(), topic)
		require.ErrorContains(t, err, "OOM")
		config.WaitForRedis = patience
		sub := newSubscriber(t, config)
		done := subscribeSoon(t.Context(), sub, topic)
		st := waiting(t, sub, topic, done)
		require.ErrorContains(t, st.Err, "OOM")
		setFull(t, client, false)
		require.NoError(t, outcomeOf(t, done, patience).err)
	})

	t.Run("a negative time", func(t *testing.T) {
		t.Parallel()
		_, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: newClient(t), WaitForRedis: -1}, nil)
		assert.ErrorContains(t, err, "WaitForRedis")
	})

	// Close, and the end of the context, end the wait.
	t.Run("closed meanwhile", func(t *testing.T) {
		t.Parallel()
		for _, loading := range []bool{false, true} {
			for _, byContext := range []bool{false, true} {
				server, topic := &notUpYet{loading: loading}, topic(t)
				config := grouped(server.client(t))
				config.WaitForRedis = time.Hour
				config.CloseTimeout = time.Minute
				sub := newSubscriber(t, config)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				done := subscribeSoon(ctx, sub, topic)
				waiting(t, sub, topic, done)
				want := goxstreams.ErrSubscriberClosed
				if byContext {
					want = context.Canceled
					cancel()
				} else {
					endsWithin(t, slack, "Close", func() { _ = sub.Close() })
				}
				o := outcomeOf(t, done, slack)
				assert.ErrorIs(t, o.err, want)
				assert.Empty(t, sub.Stats())
			}
		}
	})

	// Errors that waiting cannot fix are returned at once.
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		server := testserver.Private(t)
		ctx := context.Background()
		require.NoError(t, server.Client().ConfigSet(ctx, "requirepass", "secret").Err())
		client := func(user, password string) *redis.Client {
			c := redis.NewClient(&redis.Options{Addr: server.Addr(), Username: user, Password: password})
			t.Cleanup(func() { _ = c.Close() })
			return c
		}
		admin := client("", "secret")
		require.NoError(t, admin.Do(ctx, "acl", "setuser", "poor", "on", ">poor", "~*", "+hello", "+auth", "+ping").Err())
		text, stream := topic(t), topic(t)
		require.NoError(t, admin.Set(ctx, text, "no stream", 0).Err())
		for _, tt := range []struct {
			client *redis.Client
			topic  string
			want   string
		}{
			{client("poor", "poor"), stream, "NOPERM"},
			{client("", "wrong"), stream, "WRONGPASS"},
			{client("", ""), stream, "NOAUTH"},
			{admin, text, "WRONGTYPE"},
		} {
			config := grouped(tt.client)
			config.WaitForRedis = time.Hour
			sub := newSubscriber(t, config)
			o := outcomeOf(t, subscribeSoon(t.Context(), sub, tt.topic), slack)
			assert.ErrorContains(t, o.err, tt.want)
		}
	})

	// A router waits in the same way: its Run subscribes.
	t.Run("router", func(t *testing.T) {
		t.Parallel()
		server, topic := &notUpYet{}, topic(t)
		config := grouped(server.client(t))
		config.WaitForRedis = patience
		sub := newSubscriber(t, config)
		router, err := message.NewRouter(message.RouterConfig{CloseTimeout: patience}, nil)
		require.NoError(t, err)
		handled := make(chan struct{})
		once := sync.OnceFunc(func() { close(handled) })
		router.AddConsumerHandler("handler", topic, sub, func(*message.Message) error { once(); return nil })
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- router.Run(ctx) }()
		eventually(t, func() bool { return server.tries.Load() >= 3 || len(ended) > 0 })
		require.Empty(t, ended, "Run ended")
		server.up.Store(true)
		publish(t, newClient(t), topic, "x")
		select {
		case <-handled:
		case err := <-ended:
			require.Fail(t, "Run ended", "%v", err)
		case <-time.After(patience):
			require.Fail(t, "no message came")
		}
		cancel()
		require.NoError(t, <-ended)
	})
}
