package goxstreams_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
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

// clientWith returns a client with these options, which t's cleanup closes.
func clientWith(t testing.TB, opt *redis.Options) *redis.Client {
	t.Helper()
	client := redis.NewClient(opt)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func plainMessages(n int) []*message.Message {
	msgs := make([]*message.Message, n)
	for i := range msgs {
		msgs[i] = message.NewMessage(watermill.NewUUID(), message.Payload("x"))
	}
	return msgs
}

// The server hangs, and very many goroutines publish one message each. They waited
// for each other, pipeline after pipeline, as long as their number required, and
// each got an unknown outcome.
//
// Now a call waits for its turn no longer than go-redis waits for a connection; and
// a call that was not sent says so.
func TestFault34_PublishIsBounded(t *testing.T) {
	server := testserver.Private(t)
	const callers, timeout = 3000, 300 * time.Millisecond
	client := clientWith(t, &redis.Options{
		Addr: server.Addr(), PoolSize: 4,
		DialTimeout: timeout, ReadTimeout: timeout, WriteTimeout: timeout, PoolTimeout: timeout, DialerRetries: 1,
	})
	pub := newPublisher(t, client)
	require.NoError(t, pub.Publish(topic(t), plainMessages(1)...))
	server.Freeze()
	defer server.Thaw()
	var unknown, never atomic.Int64
	var slowest atomic.Int64
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			began := time.Now()
			switch err := pub.Publish("orders", plainMessages(1)...); {
			case errors.Is(err, goxstreams.ErrOutcomeUnknown):
				unknown.Add(1)
			case errors.Is(err, redis.ErrPoolTimeout):
				never.Add(1)
			}
			for took := int64(time.Since(began)); ; {
				if before := slowest.Load(); took <= before || slowest.CompareAndSwap(before, took) {
					return
				}
			}
		})
	}
	all.Wait()
	t.Logf("slowest %v, unknown %d, not sent for want of a turn %d", time.Duration(slowest.Load()), unknown.Load(), never.Load())
	// Its turn, the pool's, a dial with its handshake, the write, the read.
	require.Less(t, time.Duration(slowest.Load()), 3*6*timeout, "more than one call may take")
	require.NotZero(t, unknown.Load())
	require.NotZero(t, never.Load(), "those that were never sent")
}

// Redis's transactions do not roll back: of two messages the first was stored and
// the second rejected, which was reported as an ordinary error, as if nothing were
// stored.
func TestFault47_HalfOfACallIsStored(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client := newClient(t)
	pub := newPublisher(t, client)
	const last = "18446744073709551615-18446744073709551614"
	t.Run("one of two", func(t *testing.T) {
		topic := topic(t)
		addID(t, client, topic, last)
		err := pub.Publish(topic, plainMessages(2)...)
		require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		require.ErrorContains(t, err, "1 of 2")
		require.EqualValues(t, 2, client.XLen(t.Context(), topic).Val())
	})
	t.Run("none of two", func(t *testing.T) {
		topic := topic(t)
		addID(t, client, topic, "18446744073709551615-18446744073709551615")
		err := pub.Publish(topic, plainMessages(2)...)
		require.Error(t, err)
		require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		require.EqualValues(t, 1, client.XLen(t.Context(), topic).Val())
	})
	t.Run("no stream", func(t *testing.T) {
		topic := topic(t)
		require.NoError(t, client.Set(t.Context(), topic, "x", time.Minute).Err())
		for n := range 2 {
			err := pub.Publish(topic, plainMessages(n+1)...)
			require.ErrorContains(t, err, "WRONGTYPE")
			require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		}
	})
	t.Run("Cluster", func(t *testing.T) {
		client := testserver.Cluster(t).Client()
		topic := topic(t)
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: last, Values: []string{"a", "b"}}).Err())
		require.ErrorIs(t, newPublisher(t, client).Publish(topic, plainMessages(2)...), goxstreams.ErrOutcomeUnknown)
	})
}

func addID(t testing.TB, client redis.UniversalClient, topic, id string) {
	t.Helper()
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: id, Values: []string{"a", "b"}}).Err())
}

// A large message shared its pipeline with small ones. If the server rejected it
// for its size, their connection was closed with unknown outcomes for all; if it
// took long, it delayed them.
func TestFault54_LargeCallsGoAlone(t *testing.T) {
	large := message.NewMessage("large", bytes.Repeat([]byte("x"), 2<<20))
	during := func(t *testing.T, client *redis.Client, do func()) {
		t.Helper()
		pub, topic := newPublisher(t, client), topic(t)
		end := make(chan struct{})
		var small sync.WaitGroup
		for range 4 {
			small.Go(func() {
				for {
					select {
					case <-end:
						return
					default:
						assert.NoError(t, pub.Publish(topic, plainMessages(1)...))
					}
				}
			})
		}
		do()
		close(end)
		small.Wait()
	}
	t.Run("refused", func(t *testing.T) {
		server := testserver.Private(t, "--proto-max-bulk-len", "1mb")
		client := clientWith(t, &redis.Options{Addr: server.Addr()})
		pub := newPublisher(t, client)
		during(t, client, func() {
			for range 5 {
				require.Error(t, pub.Publish(topic(t), large))
			}
		})
	})
	t.Run("slow", func(t *testing.T) {
		hold := make(chan struct{})
		client := clientWith(t, &redis.Options{Addr: testserver.Addr(t), Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			return heldConn{conn, hold}, err
		}})
		pub := newPublisher(t, client)
		sent := make(chan error, 1)
		during(t, client, func() {
			go func() { sent <- pub.Publish(topic(t), large) }()
			small := topic(t)
			for range 20 { // while the large one is in flight
				require.NoError(t, pub.Publish(small, plainMessages(1)...))
			}
			select {
			case err := <-sent:
				require.FailNow(t, "the large one was not held up", "%v", err)
			default:
			}
			close(hold)
			require.NoError(t, <-sent)
		})
	})
}

// heldConn delays large writes.
type heldConn struct {
	net.Conn
	hold <-chan struct{}
}

func (c heldConn) Write(b []byte) (int, error) {
	if len(b) > 100<<10 {
		<-c.hold
	}
	return c.Conn.Write(b)
}

// The commands of several callers ran in the context of one of them: tracing, or
// code that distinguishes tenants by context values, saw another caller's values.
func TestFault56_NobodysValuesAreShared(t *testing.T) {
	t.Parallel()
	type key struct{}
	var strangers, alone atomic.Int64
	look := func(ctx context.Context, cmds ...redis.Cmder) {
		for _, cmd := range cmds {
			if cmd.Name() != "xadd" {
				continue
			}
			switch v := ctx.Value(key{}); {
			case v == nil:
			case slices.ContainsFunc(cmd.Args(), func(arg any) bool { b, ok := arg.([]byte); return ok && string(b) == v }):
				alone.Add(1)
			default:
				strangers.Add(1)
			}
		}
	}
	client := newClient(t, &hook{
		process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
			look(ctx, cmd)
			return next()
		},
		pipeline: func(ctx context.Context, cmds []redis.Cmder, next func() error) error {
			look(ctx, cmds...)
			return next()
		},
	})
	pub, topic := newPublisher(t, client), topic(t)
	var callers sync.WaitGroup
	for i := range 16 {
		callers.Go(func() {
			for j := range 100 {
				who := fmt.Sprintf("%d-%d", i, j)
				msg := message.NewMessage(watermill.NewUUID(), message.Payload(who))
				msg.SetContext(context.WithValue(context.Background(), key{}, who))
				assert.NoError(t, pub.Publish(topic, msg))
			}
		})
	}
	callers.Wait()
	require.Zero(t, strangers.Load(), "commands in a stranger's context")
	msg := message.NewMessage(watermill.NewUUID(), message.Payload("own"))
	msg.SetContext(context.WithValue(context.Background(), key{}, "own"))
	require.NoError(t, pub.Publish(topic, msg))
	require.NotZero(t, alone.Load(), "what goes alone has its own")
}

type refusing struct{}

func (refusing) Allow() error       { return errors.New("the circuit is open") }
func (refusing) ReportResult(error) {}

// ErrOutcomeUnknown was returned for every failure without an answer. But a command
// that failed before anything was written is not stored.
func TestFault57_NothingWasSent(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	addr := testserver.Addr(t)
	fails := errors.New("it fails")
	refuse := &hook{
		process:  func(context.Context, redis.Cmder, func() error) error { return fails },
		pipeline: func(context.Context, []redis.Cmder, func() error) error { return fails },
	}
	for name, client := range map[string]func(t *testing.T) redis.UniversalClient{
		"dial": func(t *testing.T) redis.UniversalClient {
			return clientWith(t, &redis.Options{Addr: addr, DialerRetries: 1, Dialer: func(context.Context, string, string) (net.Conn, error) { return nil, fails }})
		},
		"TLS handshake": func(t *testing.T) redis.UniversalClient {
			return clientWith(t, &redis.Options{Addr: addr, DialerRetries: 1, DialTimeout: time.Second, TLSConfig: &tls.Config{InsecureSkipVerify: true}})
		},
		"credentials": func(t *testing.T) redis.UniversalClient {
			return clientWith(t, &redis.Options{Addr: addr, CredentialsProviderContext: func(context.Context) (string, string, error) { return "", "", fails }})
		},
		"OnConnect": func(t *testing.T) redis.UniversalClient {
			return clientWith(t, &redis.Options{Addr: addr, OnConnect: func(context.Context, *redis.Conn) error { return fails }})
		},
		"Limiter": func(t *testing.T) redis.UniversalClient {
			return clientWith(t, &redis.Options{Addr: addr, Limiter: refusing{}})
		},
		"hook": func(t *testing.T) redis.UniversalClient {
			client := clientWith(t, &redis.Options{Addr: addr})
			client.AddHook(refuse)
			return client
		},
		"closed": func(t *testing.T) redis.UniversalClient {
			client := clientWith(t, &redis.Options{Addr: addr})
			require.NoError(t, client.Close())
			return client
		},
		"handshake without an answer": func(t *testing.T) redis.UniversalClient {
			return clientWith(t, &redis.Options{Addr: addr, DialerRetries: 1, Dialer: func(context.Context, string, string) (net.Conn, error) {
				ours, theirs := net.Pipe()
				go func() { _, _ = theirs.Read(make([]byte, 1)); _ = theirs.Close() }()
				return ours, nil
			}})
		},
		"no shard": func(t *testing.T) redis.UniversalClient {
			ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "127.0.0.1:1"}, HeartbeatFrequency: 10 * time.Millisecond})
			t.Cleanup(func() { _ = ring.Close() })
			eventually(t, func() bool { _, err := ring.GetShardClientForKey("orders"); return err != nil })
			return ring
		},
		"no node": func(t *testing.T) redis.UniversalClient {
			cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}, DialerRetries: 1, MaxRedirects: 1})
			t.Cleanup(func() { _ = cluster.Close() })
			return cluster
		},
		"wrapped": func(t *testing.T) redis.UniversalClient {
			client := clientWith(t, &redis.Options{Addr: addr})
			client.AddHook(refuse)
			return struct{ redis.UniversalClient }{client}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pub, topic := newPublisher(t, client(t)), topic(t)
			for n := range 2 {
				err := pub.Publish(topic, plainMessages(n+1)...)
				require.Error(t, err)
				require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown, "%d messages", n+1)
			}
		})
	}
	t.Run("pool", func(t *testing.T) {
		t.Parallel()
		client := clientWith(t, &redis.Options{Addr: addr, PoolSize: 1, PipelinePoolSize: -1, PoolTimeout: 50 * time.Millisecond})
		conn := client.Conn()
		require.NoError(t, conn.Ping(t.Context()).Err())
		defer conn.Close()
		for n := range 2 {
			err := newPublisher(t, client).Publish(topic(t), plainMessages(n+1)...)
			require.ErrorIs(t, err, redis.ErrPoolTimeout)
			require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		}
	})
	// A command that was written without an answer has an unknown outcome.
	for name, write := range map[string]func(net.Conn, []byte) (int, error){
		"cut after the write": func(c net.Conn, b []byte) (int, error) {
			n, err := c.Write(b)
			_ = c.Close()
			return n, err
		},
		"cut within the write": func(c net.Conn, b []byte) (int, error) {
			n, _ := c.Write(b[:len(b)/2])
			_ = c.Close()
			return n, io.ErrUnexpectedEOF
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n := range 2 {
				var armed atomic.Bool
				client := clientWith(t, &redis.Options{Addr: addr, Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
					conn, err := new(net.Dialer).DialContext(ctx, network, addr)
					return shearedConn{conn, &armed, write}, err
				}})
				pub, topic := newPublisher(t, client), topic(t)
				require.NoError(t, pub.Publish(topic, plainMessages(n+1)...)) // checks MULTI
				armed.Store(true)
				require.ErrorIs(t, pub.Publish(topic, plainMessages(n+1)...), goxstreams.ErrOutcomeUnknown, "%d messages", n+1)
			}
		})
	}
}

// shearedConn writes differently once it is armed.
type shearedConn struct {
	net.Conn
	armed *atomic.Bool
	write func(net.Conn, []byte) (int, error)
}

func (c shearedConn) Write(b []byte) (int, error) {
	if c.armed.Load() && strings.Contains(strings.ToLower(string(b)), "xadd") {
		return c.write(c.Conn, b)
	}
	return c.Conn.Write(b)
}

// marshalerFunc is a Marshaler that first calls a function.
type marshalerFunc func(topic string)

func (f marshalerFunc) Marshal(topic string, msg *message.Message) (map[string]any, error) {
	f(topic)
	return goxstreams.DefaultMarshaler{}.Marshal(topic, msg)
}

// A Marshaler that published through its own Publisher waited for Close, which
// waited for it.
func TestFault63_PublishWithinPublish(t *testing.T) {
	t.Parallel()
	client, name := newClient(t), topic(t)
	finish := func(t *testing.T, what string, f func() error) {
		t.Helper()
		done := make(chan error, 1)
		go func() { done <- f() }()
		select {
		case err := <-done:
			require.NoError(t, err, what)
		case <-time.After(patience):
			require.FailNow(t, "it does not end", what)
		}
	}
	t.Run("while Close runs", func(t *testing.T) {
		var pub *goxstreams.Publisher
		closing := make(chan struct{})
		marshaler := marshalerFunc(func(topic string) {
			if strings.HasSuffix(topic, "audit") {
				return
			}
			done := make(chan struct{})
			go func() { defer close(done); _ = pub.Close() }()
			select { // it waits for nothing, or for this call
			case <-done:
			case <-time.After(50 * time.Millisecond):
			}
			close(closing)
			assert.NoError(t, pub.Publish(topic+"audit", plainMessages(1)...))
		})
		var err error
		pub, err = goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: marshaler}, nil)
		require.NoError(t, err)
		finish(t, "Publish", func() error { return pub.Publish(name, plainMessages(1)...) })
		<-closing
		finish(t, "Close", pub.Close)
	})
	t.Run("Close within Marshal", func(t *testing.T) {
		var pub *goxstreams.Publisher
		var err error
		pub, err = goxstreams.NewPublisher(goxstreams.PublisherConfig{
			Client: client, Marshaler: marshalerFunc(func(string) { assert.NoError(t, pub.Close()) }),
		}, nil)
		require.NoError(t, err)
		finish(t, "Publish", func() error { return pub.Publish(name, plainMessages(1)...) })
	})
	t.Run("Close within a hook", func(t *testing.T) {
		// It waits for its own call, but no longer than one command may take.
		const short = 500 * time.Millisecond
		client := clientWith(t, &redis.Options{Addr: testserver.Addr(t), DialTimeout: short, ReadTimeout: short, WriteTimeout: short, PoolTimeout: short})
		pub := newPublisher(t, client)
		client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
			assert.NoError(t, pub.Close())
			return next()
		}})
		finish(t, "Publish", func() error { return pub.Publish(name, plainMessages(1)...) })
	})
}

// A pooled connection on which somebody left a WATCH: EXEC returns nil.
func TestPublish_WatchLeftBehind(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	client := redis.NewClient(&redis.Options{Addr: admin.Options().Addr, PoolSize: 1})
	t.Cleanup(func() { client.Close() })
	pub := newPublisher(t, client)
	two := func() error {
		return pub.Publish(topic, message.NewMessage("a", nil), message.NewMessage("b", nil))
	}
	require.NoError(t, two())
	_, err := client.Pipelined(t.Context(), func(p redis.Pipeliner) error { return p.Do(t.Context(), "watch", topic).Err() })
	require.NoError(t, err)
	publish(t, admin, topic, "by somebody else")
	require.ErrorIs(t, two(), redis.TxFailedErr)
	require.Len(t, stored(t, admin, topic), 3)
	require.NoError(t, two(), "EXEC ends the WATCH")
	require.Len(t, stored(t, admin, topic), 5)
}

// TestResend: go-redis by default resends a command when its answer is lost
// (MaxRetries 3). It does not resend this library's commands, and nothing is stored
// or counted twice.
func TestResend(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	admin := testserver.Client(t)
	open := func(t *testing.T) (*mute, *redis.Client) {
		m := &mute{}
		client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Dialer: m.dial})
		t.Cleanup(func() { _ = client.Close() })
		return m, client
	}
	requireLost := func(t *testing.T, m *mute, most int) {
		t.Helper()
		lost, sent := m.done()
		require.True(t, lost, "no answer was lost")
		require.LessOrEqual(t, sent, most, "it was sent again")
	}
	t.Run("go-redis itself stores twice", func(t *testing.T) { // otherwise the rest proves nothing
		m, client := open(t)
		topic := topic(t)
		m.next("xadd")
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"a", "b"}}).Err())
		require.Len(t, entriesOf(t, admin, topic), 2)
	})
	t.Run("Publish", func(t *testing.T) {
		for _, n := range []int{1, 3} {
			m, client := open(t)
			topic := topic(t)
			pub := newPublisher(t, client)
			require.NoError(t, pub.Publish(topic+"-", numbered(2)...)) // checks MULTI
			m.next("xadd")
			err := pub.Publish(topic, numbered(n)...)
			require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
			requireLost(t, m, n)
			require.Len(t, stored(t, admin, topic), n)
		}
	})
	t.Run("Replay and Delete", func(t *testing.T) {
		m, client := open(t)
		topic := topic(t)
		letters := lettersOf(t, admin, topic, 2)
		q := queueOf(t, client, goxstreams.DeadLetterTopic(topic))
		m.next("eval")
		_, err := q.Replay(t.Context(), letters[0].ID)
		require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		requireLost(t, m, 1)
		m.next("xdel")
		_, err = q.Delete(t.Context(), letters[1].ID)
		require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		requireLost(t, m, 1)
		require.Len(t, entriesOf(t, admin, topic), 2)
		require.Empty(t, entriesOf(t, admin, goxstreams.DeadLetterTopic(topic)))
	})
	for _, command := range []string{"-- dead-letter", "-- take", "xack", "xreadgroup"} {
		t.Run("Subscriber/"+command, func(t *testing.T) {
			t.Parallel()
			m, client := open(t)
			topic, log := topic(t), newLogRecorder()
			config := claiming(client)
			config.BlockTime = 100 * time.Millisecond
			config.Retry = quickRetry()
			config.Retry.MaxRetries = 2
			config.ClaimMinIdle = 10 * time.Minute // no renewals; nothing else is claimed
			config.ClaimInterval = 50 * time.Millisecond
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			m.next(command)
			publish(t, admin, topic, "flaky", "dies")
			msg := next(t, messages)
			require.Equal(t, "flaky", string(msg.Payload))
			require.EqualValues(t, 1, delivery(t, msg).Count)
			msg.Nack()
			msg = next(t, messages)
			require.EqualValues(t, 2, delivery(t, msg).Count, "a claim is counted once")
			msg.Ack()
			for count := range int64(3) {
				msg = next(t, messages)
				require.Equal(t, "dies", string(msg.Payload))
				require.EqualValues(t, count+1, delivery(t, msg).Count)
				msg.Nack()
			}
			eventuallySettled(t, admin, topic, testGroup)
			eventually(t, func() bool { lost, _ := m.done(); return lost }, "no answer was lost")
			require.NoError(t, sub.Close())
			letters := lettersIn(t, admin, goxstreams.DeadLetterTopic(topic))
			require.Len(t, letters, 1)
			require.EqualValues(t, 3, letters[0].Deliveries)
			began, _ := outageLogged(log)
			assert.LessOrEqual(t, began, 1, strings.Join(log.Errors(), "\n"))
		})
	}
}
