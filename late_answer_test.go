package goxstreams_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// A gate keeps back, while it is locked, what connections have read.
type gate struct{ sync.RWMutex }

func (g *gate) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	return gatedConn{conn, g}, err
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c gatedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.gate.RLock()
	defer c.gate.RUnlock()
	return n, err
}

// A process is stopped while its read waits, the entry is delivered to it, and
// another one claims it and buries it. When the process goes on, it has just read
// what is nobody's any more: it must not take that for a lost group, put the entry
// back, and bury it again.
func TestLateAnswer_BuriedOnce(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const minIdle = 500 * time.Millisecond
	client, topic := newClient(t), topic(t)
	config := func(c redis.UniversalClient, retries int) goxstreams.SubscriberConfig {
		return goxstreams.SubscriberConfig{
			Client: c, ConsumerGroup: "g", ClaimMinIdle: minIdle, BlockTime: minIdle / 2,
			Retry: &goxstreams.Retry{MaxRetries: retries, InitialInterval: time.Millisecond},
		}
	}
	g := &gate{}
	gated := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Dialer: g.dial, ReadTimeout: time.Minute})
	t.Cleanup(func() { require.NoError(t, gated.Close()) })
	sub := newSubscriber(t, config(gated, 1))
	stopped, err := sub.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	require.NoError(t, newPublisher(t, client).Publish(topic, numbered(1)...))
	(<-stopped).Ack() // it reads
	require.Eventually(t, func() bool { return pendingCount(t, client, topic) == 0 }, time.Minute, time.Millisecond)
	g.Lock()
	require.NoError(t, newPublisher(t, client).Publish(topic, numbered(1)...))
	require.Eventually(t, func() bool { return pendingCount(t, client, topic) == 1 }, time.Minute, time.Millisecond)

	dead := goxstreams.DeadLetterTopic(topic)
	other, err := newSubscriber(t, config(client, -1)).Subscribe(t.Context(), topic)
	require.NoError(t, err)
	msg := <-other
	msg.Nack()
	require.Eventually(t, func() bool { return client.XLen(t.Context(), dead).Val() == 1 }, time.Minute, time.Millisecond)
	g.Unlock()
	(<-stopped).Nack()
	again := 0
	require.Eventually(t, func() bool {
		select {
		case msg := <-stopped:
			again++
			msg.Nack()
		default:
		}
		return sub.Stats()[0].InFlight == 0
	}, time.Minute, time.Millisecond)
	require.Zero(t, again, "it was put back, and came again")
	require.EqualValues(t, 1, client.XLen(t.Context(), dead).Val())
	require.Zero(t, pendingCount(t, client, topic))
}

func pendingCount(t testing.TB, client redis.UniversalClient, topic string) int64 {
	t.Helper()
	p, err := client.XPending(t.Context(), topic, "g").Result()
	if err != nil && !errors.Is(err, redis.Nil) {
		return -1
	}
	return p.Count
}
