package goxstreams_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 5: with MaxConcurrency 1 messages are delivered in stream order.

// All connections are cut repeatedly, while answers are on their way. With a
// consumer name given by the user, entries with a lost answer were found by a
// claim, which counted as a delivery, and after entries that were read later.
func TestFault46_OrderWhileConnectionsAreCut(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, consumer := range []string{"", "pod-1"} {
		t.Run(fmt.Sprintf("Consumer%q", consumer), func(t *testing.T) {
			t.Parallel()
			const n = 1500
			server := testserver.Private(t)
			admin, topic := server.Client(), topic(t)
			config := grouped(server.Client())
			config.Consumer = consumer
			messages := subscribe(t, newSubscriber(t, config), topic)
			ctx, cancel := context.WithCancel(t.Context())
			var cutting sync.WaitGroup
			defer func() { cancel(); cutting.Wait() }()
			var arrived atomic.Int64
			cutting.Go(func() {
				for last, cuts := int64(-1), 0; ctx.Err() == nil; cuts++ {
					if now := arrived.Load(); now != last {
						last, cuts = now, 0
					}
					if cuts%50 == 49 { // 20 ms may be too short for a busy machine to connect in
						time.Sleep(time.Second)
					}
					_ = admin.ClientKillByFilter(ctx, "TYPE", "normal", "SKIPME", "yes").Err()
					time.Sleep(20 * time.Millisecond)
				}
			})
			publisher := server.Client()
			cutting.Go(func() {
				for i := 0; i < n; {
					// The ID shows whether it was stored.
					id := fmt.Sprintf("%d-0", i+1)
					err := publisher.Do(ctx, "xadd", topic, id, "_watermill_message_uuid", id, "payload", i).Err()
					if err == nil || len(publisher.XRange(ctx, topic, id, id).Val()) > 0 {
						i++
					}
					if ctx.Err() != nil {
						return
					}
					time.Sleep(2 * time.Millisecond)
				}
			})
			for i := range n {
				msg := next(t, messages)
				require.Equal(t, strconv.Itoa(i), string(msg.Payload), "message %d", i)
				require.EqualValues(t, 1, delivery(t, msg).Count, "message %d", i)
				msg.Ack()
				arrived.Add(1)
			}
			cancel()
			eventuallySettled(t, server.Client(), topic, testGroup)
		})
	}
}

// The read's connection breaks, and the server does not notice: the read continues
// there, and takes the next message to nobody. Its successors came first. (Found by
// internal/chaos, behind a proxy that cuts connections.)
func TestOrder_ReadGoesOnAtTheServer(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	srv := testserver.Private(t)
	broken := make(chan struct{})
	client := redis.NewClient(&redis.Options{Addr: srv.Addr(), Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err == nil {
			t.Cleanup(func() { _ = conn.Close() })
		}
		return &halfBroken{Conn: conn, broken: broken}, err
	}})
	t.Cleanup(func() { _ = client.Close() }) // some of its connections are closed
	admin := redis.NewClient(&redis.Options{Addr: srv.Addr()})
	t.Cleanup(func() { require.NoError(t, admin.Close()) })
	log, topic := newLogRecorder(), topic(t)
	config := grouped(client)
	config.BlockTime, config.ClaimMinIdle = time.Minute, 5*time.Minute
	messages := subscribe(t, newSubscriberLog(t, config, log), topic)
	blocked := func() bool { return strings.Contains(admin.Info(t.Context(), "clients").Val(), "blocked_clients:1\r") }
	eventually(t, blocked, "nothing is read")
	close(broken)
	eventually(t, func() bool { return len(logLinesWith(log.Infos(), "Redis is available to the subscription again")) > 0 }, "it does not recover")
	eventually(t, blocked, "the old read goes on")
	sent := publishN(t, admin, topic, 3)
	for _, uuid := range sent {
		msg := next(t, messages)
		require.Equal(t, uuid, msg.UUID)
		msg.Ack()
	}
}

// halfBroken is a connection whose end only this side notices, if it is reading
// when broken is closed.
type halfBroken struct {
	net.Conn
	broken <-chan struct{}
	isCut  atomic.Bool
}

func (c *halfBroken) Read(b []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	if c.isCut.Load() {
		return 0, io.EOF
	}
	select {
	case <-c.broken: // later connections are intact
		return c.Conn.Read(b)
	default:
	}
	done := make(chan result, 1)
	go func() {
		n, err := c.Conn.Read(b)
		done <- result{n, err}
	}()
	select {
	case r := <-done:
		return r.n, r.err
	case <-c.broken:
		c.isCut.Store(true)
		return 0, io.EOF
	}
}

func (c *halfBroken) Close() error {
	if c.isCut.Load() {
		return nil // the test ends it
	}
	return c.Conn.Close()
}
