package goxstreams_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Tests in virtual time: minutes of backoff, leases and timeouts take no time, and
// are exact. They prove timing, not Redis: the server is the embedded one, whose
// XCLAIM ignores min-idle. Redis's behavior is tested on Redis.

// virtually runs a test in a bubble of virtual time, with an embedded server that
// is connected in memory.
func virtually(t *testing.T, f func(t *testing.T, v *virtualServer)) {
	synctest.Test(t, func(t *testing.T) {
		// go-redis tries a server that it could not reach once a second, and notices only
		// then that its client is closed: the bubble must not end before.
		t.Cleanup(func() { time.Sleep(2 * time.Second) })
		v := &virtualServer{mini: miniredis.NewMiniRedis()}
		require.NoError(t, v.mini.Start())
		v.mini.Server().Close() // the listener is outside of the bubble
		defer v.mini.Close()
		f(t, v)
	})
}

type virtualServer struct {
	mini *miniredis.Miniredis
	down atomic.Bool // refuses new connections
}

// client returns a client of the server, which is closed at the end of the test.
func (v *virtualServer) client(hooks ...redis.Hook) *redis.Client {
	client := redis.NewClient(&redis.Options{
		Addr: "127.0.0.1:6379", // never dialed; a name would be looked up outside of the bubble
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			if v.down.Load() {
				return nil, &net.OpError{Op: "dial", Net: "memory", Err: errors.New("the server is down")}
			}
			ours, theirs := newMemoryConn()
			v.mini.Server().ServeConn(theirs)
			return ours, nil
		},
	})
	for _, h := range hooks {
		client.AddHook(h)
	}
	return client
}

// memoryConn is one end of a buffered connection in memory. (net.Pipe has no
// buffer, and deadlocks when both sides write.)
type memoryConn struct {
	in, out  *memoryBuffer
	deadline atomic.Pointer[time.Time]
}

type memoryBuffer struct {
	mu     sync.Mutex
	data   bytes.Buffer
	closed bool
	change chan struct{} // closed at the next change
}

func newMemoryConn() (a, b *memoryConn) {
	x, y := &memoryBuffer{change: make(chan struct{})}, &memoryBuffer{change: make(chan struct{})}
	return &memoryConn{in: x, out: y}, &memoryConn{in: y, out: x}
}

func (b *memoryBuffer) update(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
	close(b.change)
	b.change = make(chan struct{})
}

func (c *memoryConn) Read(p []byte) (int, error) {
	for {
		c.in.mu.Lock()
		change := c.in.change
		if c.in.data.Len() > 0 {
			defer c.in.mu.Unlock()
			return c.in.data.Read(p)
		}
		closed := c.in.closed
		c.in.mu.Unlock()
		if closed {
			return 0, io.EOF
		}
		var timeout <-chan time.Time
		if d := c.deadline.Load(); d != nil && !d.IsZero() {
			timer := time.NewTimer(time.Until(*d))
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-change:
		case <-timeout:
			return 0, os.ErrDeadlineExceeded
		}
	}
}

func (c *memoryConn) Write(p []byte) (n int, err error) {
	c.out.update(func() {
		if c.out.closed {
			err = io.ErrClosedPipe
			return
		}
		n, err = c.out.data.Write(p)
	})
	return n, err
}

func (c *memoryConn) Close() error {
	c.in.update(func() { c.in.closed = true })
	c.out.update(func() { c.out.closed = true })
	return nil
}

func (c *memoryConn) SetReadDeadline(d time.Time) error { c.deadline.Store(&d); return nil }
func (c *memoryConn) SetDeadline(d time.Time) error     { return c.SetReadDeadline(d) }
func (*memoryConn) SetWriteDeadline(time.Time) error    { return nil }
func (*memoryConn) LocalAddr() net.Addr                 { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }
func (*memoryConn) RemoteAddr() net.Addr                { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// open subscribes in virtual time. The returned function closes everything.
func (v *virtualServer) open(t *testing.T, client *redis.Client, config goxstreams.SubscriberConfig) (*goxstreams.Subscriber, <-chan *message.Message) {
	t.Helper()
	config.Client = client
	config.ConsumerGroup = testGroup
	sub, err := goxstreams.NewSubscriber(config, nil)
	require.NoError(t, err)
	messages, err := sub.Subscribe(context.Background(), "topic")
	require.NoError(t, err)
	return sub, messages
}

// roundTrips is the virtual time that a few commands may take: none, except for the
// pauses of the reader and the claimer.
const roundTrips = 50 * time.Millisecond

func TestVirtualBackoff(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 4} {
		virtually(t, func(t *testing.T, v *virtualServer) {
			client := v.client()
			defer client.Close()
			var hooked []time.Duration
			sub, messages := v.open(t, client, goxstreams.SubscriberConfig{
				MaxConcurrency: concurrency,
				Retry: &goxstreams.Retry{
					MaxRetries: 5, InitialInterval: time.Second, MaxInterval: 8 * time.Second, Multiplier: 2,
					OnRetryHook: func(n int, d time.Duration) { hooked = append(hooked, d) },
				},
			})
			defer sub.Close()
			publish(t, client, "topic", "x")
			last := time.Now()
			for i, want := range []time.Duration{0, 1, 2, 4, 8, 8} {
				msg := <-messages
				took := time.Since(last)
				require.InDelta(t, want*time.Second, took, float64(roundTrips), "delivery %d", i+1)
				d, ok := goxstreams.DeliveryFromContext(msg.Context())
				require.True(t, ok)
				require.EqualValues(t, i+1, d.Count)
				last = time.Now()
				msg.Nack()
			}
			require.Eventually(t, func() bool { return sub.Stats()[0].Dead == 1 }, time.Minute, time.Second)
			require.Equal(t, []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 8 * time.Second}, hooked)
		})
	}
}

// A wait frees the slot: with two slots, others are handled while one waits.
func TestVirtualWaitFreesTheSlot(t *testing.T) {
	t.Parallel()
	virtually(t, func(t *testing.T, v *virtualServer) {
		client := v.client()
		defer client.Close()
		sub, messages := v.open(t, client, goxstreams.SubscriberConfig{
			MaxConcurrency: 2,
			Retry:          &goxstreams.Retry{InitialInterval: time.Hour, MaxInterval: time.Hour},
		})
		defer sub.Close()
		publish(t, client, "topic", "bad")
		(<-messages).Nack()
		start := time.Now()
		publish(t, client, "topic", "a", "b", "c")
		for range 3 {
			(<-messages).Ack()
		}
		require.Less(t, time.Since(start), time.Minute)
		msg := <-messages
		require.Equal(t, "bad", string(msg.Payload))
		require.InDelta(t, time.Hour, time.Since(start), float64(roundTrips))
		msg.Ack()
	})
}

// A lease is renewed every third of ClaimMinIdle, however long the handler takes,
// and another consumer does not get the message meanwhile.
func TestVirtualLease(t *testing.T) {
	t.Parallel()
	virtually(t, func(t *testing.T, v *virtualServer) {
		const minIdle = time.Minute
		var renewals []time.Time
		var mu sync.Mutex
		client := v.client(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
			if isRenewal(cmd) {
				mu.Lock()
				renewals = append(renewals, time.Now())
				mu.Unlock()
			}
			return next()
		}})
		defer client.Close()
		publish(t, client, "topic", "slow")
		first, messages := v.open(t, client, goxstreams.SubscriberConfig{ClaimMinIdle: minIdle})
		defer first.Close()
		msg := <-messages
		start := time.Now()
		second, others := v.open(t, client, goxstreams.SubscriberConfig{ClaimMinIdle: minIdle})
		defer second.Close()

		select {
		case <-others:
			t.Fatal("a second consumer got the message of a living one")
		case <-msg.Context().Done():
			t.Fatal("the lease was not kept")
		case <-time.After(20 * minIdle):
		}
		mu.Lock()
		defer mu.Unlock()
		last := start
		for _, at := range renewals {
			require.LessOrEqual(t, at.Sub(last), minIdle/3+roundTrips)
			last = at
		}
		require.LessOrEqual(t, time.Since(last), minIdle/3+roundTrips)
		require.LessOrEqual(t, len(renewals), 20*6, "no more than twice as often as need be")
		require.True(t, msg.Ack())
	})
}

// A dead consumer's messages come within 4/3 ClaimMinIdle + 2 ClaimInterval, not
// before 4/3 ClaimMinIdle (they must be found idle twice), with a count of one
// more.
func TestVirtualTakeover(t *testing.T) {
	t.Parallel()
	virtually(t, func(t *testing.T, v *virtualServer) {
		const minIdle, interval = time.Minute, 2 * time.Second
		client := v.client()
		defer client.Close()
		sub, messages := v.open(t, client, goxstreams.SubscriberConfig{ClaimMinIdle: minIdle, ClaimInterval: interval})
		defer sub.Close()
		msg := func() *message.Message { // being handled, so that the ghost gets the next ones
			publish(t, client, "topic", "first")
			return <-messages
		}()
		publish(t, client, "topic", "taken by a ghost")
		ghost, err := client.XReadGroup(context.Background(), &redis.XReadGroupArgs{
			Group: testGroup, Consumer: "ghost", Streams: []string{"topic", ">"}, Count: 10, Block: -1,
		}).Result()
		require.NoError(t, err)
		require.Len(t, ghost[0].Messages, 1)
		died := time.Now()
		msg.Ack()

		msg = <-messages
		took := time.Since(died)
		d, _ := goxstreams.DeliveryFromContext(msg.Context())
		require.Equal(t, ghost[0].Messages[0].ID, d.ID)
		require.EqualValues(t, 2, d.Count)
		require.GreaterOrEqual(t, took, minIdle*4/3)
		require.LessOrEqual(t, took, minIdle*4/3+2*interval+roundTrips)
		msg.Ack()
	})
}

// A dead consumer that left more entries than one XPENDING returns is found on the
// embedded server, too: it does not know XPENDING's "(", and the subscription was in
// an outage for good.
func TestVirtualTakeover_Pages(t *testing.T) {
	t.Parallel()
	virtually(t, func(t *testing.T, v *virtualServer) {
		const n = 600 // a page, and a part of one: the embedded server takes a time that grows with its square
		client := v.client()
		defer client.Close()
		createGroup(t, client, "topic", testGroup)
		publishN(t, client, "topic", n)
		readAs(t, client, "topic", testGroup, "died", n)
		sub, messages := v.open(t, client, goxstreams.SubscriberConfig{ClaimMinIdle: time.Minute})
		defer sub.Close()
		for range n {
			select {
			case msg := <-messages:
				msg.Ack()
			case <-time.After(time.Hour):
				t.Fatalf("a message is not taken over: %+v", sub.Stats())
			}
		}
	})
}

func TestVirtualClose(t *testing.T) {
	t.Parallel()
	const timeout = 25 * time.Second // the default
	inHand := func(t *testing.T, v *virtualServer) (*redis.Client, *goxstreams.Subscriber, *message.Message) {
		client := v.client()
		publish(t, client, "topic", "x")
		sub, messages := v.open(t, client, goxstreams.SubscriberConfig{})
		return client, sub, <-messages
	}

	t.Run("WaitsForTheHandler", func(t *testing.T) {
		virtually(t, func(t *testing.T, v *virtualServer) {
			client, sub, msg := inHand(t, v)
			defer client.Close()
			start := time.Now()
			time.AfterFunc(10*time.Second, func() {
				if msg.Context().Err() == nil {
					msg.Ack()
				}
			})
			require.NoError(t, sub.Close())
			require.InDelta(t, 10*time.Second, time.Since(start), float64(time.Second))
			pending, err := client.XPending(context.Background(), "topic", testGroup).Result()
			require.NoError(t, err)
			require.Zero(t, pending.Count)
		})
	})
	t.Run("EndsContextsASecondBefore", func(t *testing.T) {
		virtually(t, func(t *testing.T, v *virtualServer) {
			client, sub, msg := inHand(t, v)
			defer client.Close()
			start := time.Now()
			var ended time.Duration
			go func() {
				<-msg.Context().Done()
				ended = time.Since(start)
				msg.Nack()
			}()
			require.NoError(t, sub.Close())
			require.Equal(t, timeout-time.Second, ended)
			require.ErrorIs(t, context.Cause(msg.Context()), goxstreams.ErrSubscriberClosed)
			requireReleased(t, client, 0)
		})
	})
	t.Run("GivesUpOnAHandlerThatIgnoresIt", func(t *testing.T) {
		virtually(t, func(t *testing.T, v *virtualServer) {
			client, sub, msg := inHand(t, v)
			defer client.Close()
			start := time.Now()
			require.NoError(t, sub.Close())
			require.InDelta(t, timeout, time.Since(start), float64(time.Second))
			select {
			case <-msg.Nacked():
			default:
				t.Fatal("whoever waits for the message's outcome waits forever")
			}
			require.False(t, msg.Ack())
			pending, err := client.XPendingExt(context.Background(), &redis.XPendingExtArgs{
				Stream: "topic", Group: testGroup, Start: "-", End: "+", Count: 10,
			}).Result()
			require.NoError(t, err)
			require.Len(t, pending, 1)
			require.Zero(t, pending[0].RetryCount, "the delivery does not count")
			require.NotEqual(t, "released", pending[0].Consumer, "the handler may still be at work")
		})
	})
	// A waiting retry is released at once, without waiting for its delay (FAULTS
	// 8).
	t.Run("DoesNotWaitForRetries", func(t *testing.T) {
		for _, concurrency := range []int{1, 4} {
			virtually(t, func(t *testing.T, v *virtualServer) {
				client := v.client()
				defer client.Close()
				publish(t, client, "topic", "x")
				sub, messages := v.open(t, client, goxstreams.SubscriberConfig{
					MaxConcurrency: concurrency,
					Retry:          &goxstreams.Retry{InitialInterval: time.Hour, MaxInterval: time.Hour},
				})
				(<-messages).Nack()
				require.Eventually(t, func() bool { return sub.Stats()[0].Waiting == 1 }, time.Minute, time.Millisecond)
				start := time.Now()
				require.NoError(t, sub.Close())
				require.LessOrEqual(t, time.Since(start), 2*time.Second) // the embedded server's read cannot be woken
				requireReleased(t, client, 1)
			})
		}
	})
}

// requireReleased requires that the topic's only pending entry is released, with
// the given count.
func requireReleased(t *testing.T, client *redis.Client, count int64) {
	t.Helper()
	pending, err := client.XPendingExt(context.Background(), &redis.XPendingExtArgs{
		Stream: "topic", Group: testGroup, Start: "-", End: "+", Count: 10,
	}).Result()
	require.NoError(t, err)
	require.Len(t, pending, 1)
	require.Equal(t, "released", pending[0].Consumer)
	require.Equal(t, count, pending[0].RetryCount)
}

// While Redis is unavailable the subscription retries about once a second, logs
// that once, and recovers.
func TestVirtualOutage(t *testing.T) {
	t.Parallel()
	virtually(t, func(t *testing.T, v *virtualServer) {
		client := v.client()
		defer client.Close()
		logger := newLogRecorder()
		sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: testGroup}, logger)
		require.NoError(t, err)
		defer sub.Close()
		messages, err := sub.Subscribe(context.Background(), "topic")
		require.NoError(t, err)
		publish(t, client, "topic", "before")
		(<-messages).Ack()

		v.down.Store(true)
		v.mini.SetError("LOADING Redis is loading the dataset in memory")
		time.Sleep(10 * time.Minute) // in virtual time
		stats := sub.Stats()[0]
		require.Error(t, stats.Err)
		require.InDelta(t, 10*time.Minute, time.Since(stats.Since), float64(10*time.Second))
		require.Len(t, logger.Errors(), 1, "an outage is logged once")

		v.mini.SetError("")
		v.down.Store(false)
		back := time.Now()
		pub := newPublisher(t, client)
		require.Eventually(t, func() bool { // go-redis dials once a second after many failures
			return pub.Publish("topic", message.NewMessage("after", nil)) == nil
		}, time.Minute, 100*time.Millisecond)
		msg := <-messages
		require.Less(t, time.Since(back), 5*time.Second)
		msg.Ack()
		require.Eventually(t, func() bool { return sub.Stats()[0].Err == nil }, time.Minute, time.Second)
		require.Len(t, logger.Errors(), 1)
	})
}
