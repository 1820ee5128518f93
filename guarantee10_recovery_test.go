package goxstreams_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 10: outages, failovers and the network between a client and its server:
// a subscription recovers, logs one outage, and uses no more connections than
// allowed.

// blockedConns returns the server's connections of the named clients that are in a
// blocking read, with a group or without.
func blockedConns(t testing.TB, admin *redis.Client, name string) []string {
	t.Helper()
	var blocked []string
	for _, conn := range connections(t, admin, name) {
		if strings.Contains(conn, " flags=b ") && (strings.Contains(conn, " cmd=xread ") || strings.Contains(conn, " cmd=xreadgroup ")) {
			blocked = append(blocked, conn)
		}
	}
	return blocked
}

// clientField returns a field of a line of CLIENT LIST.
func clientField(line, name string) string {
	_, rest, _ := strings.Cut(" "+line, " "+name+"=")
	value, _, _ := strings.Cut(rest, " ")
	return strings.TrimSpace(value)
}

// endpoint is an address that later leads to another server, like a DNS name:
// existing connections stay where they are.
type endpoint struct{ addr atomic.Pointer[string] }

func newEndpoint(addr string) *endpoint {
	e := &endpoint{}
	e.flip(addr)
	return e
}

func (e *endpoint) flip(addr string) { e.addr.Store(&addr) }

func (e *endpoint) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, *e.addr.Load())
}

// miniSentinel is a Sentinel that knows one master, "main". It answers queries, and
// tells its subscribers when the master changes.
type miniSentinel struct {
	*server.Server

	mu        sync.Mutex
	master    string
	listeners []*server.Peer
}

func newMiniSentinel(t testing.TB, master string) *miniSentinel {
	t.Helper()
	srv, err := server.NewServer("127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	s := &miniSentinel{Server: srv, master: master}
	require.NoError(t, srv.Register("PING", func(c *server.Peer, _ string, _ []string) { c.WriteInline("PONG") }))
	require.NoError(t, srv.Register("CLIENT", func(c *server.Peer, _ string, _ []string) { c.WriteOK() }))
	require.NoError(t, srv.Register("SENTINEL", func(c *server.Peer, _ string, args []string) {
		if !strings.EqualFold(args[0], "get-master-addr-by-name") {
			c.WriteLen(0)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		host, port, _ := net.SplitHostPort(s.master)
		c.WriteStrings([]string{host, port})
	}))
	require.NoError(t, srv.Register("SUBSCRIBE", func(c *server.Peer, _ string, channels []string) {
		for i, channel := range channels {
			c.Block(func(w *server.Writer) {
				w.WriteLen(3)
				w.WriteBulk("subscribe")
				w.WriteBulk(channel)
				w.WriteInt(i + 1)
			})
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.listeners = append(s.listeners, c)
	}))
	return s
}

func (s *miniSentinel) flip(master string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.master
	s.master = master
	host, port, _ := net.SplitHostPort(was)
	to, toPort, _ := net.SplitHostPort(master)
	for _, c := range s.listeners {
		c.Block(func(w *server.Writer) {
			w.WriteLen(3)
			w.WriteBulk("message")
			w.WriteBulk("+switch-master")
			w.WriteBulk(strings.Join([]string{"main", host, port, to, toPort}, " "))
		})
		c.Flush()
	}
}

// The blocking connections outside of the pool were opened once, and never again as
// long as their reads returned: go-redis, which closes connections to the old
// master when a Sentinel names another one, knows only those of its own pool. If
// the old master stayed reachable and was not demoted (a partition, a moved DNS
// name), the topics on such a connection waited there forever, without an error.
// Now the library checks after each BLOCK where a connection leads.
func TestFault51_TopicsFollowAFailover(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const (
		n         = 6
		blockTime = time.Second
	)
	before, after := testserver.Private(t), testserver.Private(t)
	old, promoted := before.Client(), after.Client()
	for _, mode := range []string{"Group", "FanOut"} {
		for _, kind := range []string{"Sentinel", "Dialer"} {
			t.Run(kind+mode, func(t *testing.T) {
				t.Parallel()
				name := topic(t) // of the client's connections
				var client *redis.Client
				var flip func()
				if kind == "Sentinel" {
					sentinel := newMiniSentinel(t, before.Addr())
					client = redis.NewFailoverClient(&redis.FailoverOptions{
						MasterName: "main", SentinelAddrs: []string{sentinel.Addr().String()}, ClientName: clientName(name), PoolSize: 3,
					})
					flip = func() { sentinel.flip(after.Addr()) }
				} else {
					to := newEndpoint(before.Addr())
					client = redis.NewClient(&redis.Options{Addr: "primary:6379", Dialer: to.dial, ClientName: clientName(name), PoolSize: 3})
					flip = func() {
						to.flip(after.Addr())
						// The pool's own connections end at some time; those in a
						// blocking read do not.
						eventually(t, func() bool {
							left := 0
							for _, conn := range connections(t, old, clientName(name)) {
								if !strings.HasPrefix(clientField(conn, "cmd"), "xread") {
									left++
									_ = old.ClientKillByFilter(context.Background(), "ID", clientField(conn, "id")).Err()
								}
							}
							return left == 0
						})
					}
				}
				t.Cleanup(func() { _ = client.Close() })
				config := grouped(client)
				if mode == "FanOut" {
					config = goxstreams.SubscriberConfig{Client: client}
				}
				config.BlockTime = blockTime
				topics, channels := manyTopics(t, newSubscriber(t, config), n)
				all, followed := newTally(), newTally()
				for _, messages := range channels {
					all.handle(messages, func(msg *message.Message) {
						if string(msg.Payload) == "after" {
							followed.add(msg)
						}
					})
				}
				for _, topic := range topics {
					publish(t, old, topic, "before")
				}
				eventuallyAll(t, all.len, n)
				eventually(t, func() bool { return len(blockedConns(t, old, clientName(name))) > 0 }, "nothing waits for messages")

				// The entries that replication would have copied.
				for _, topic := range topics {
					publish(t, promoted, topic, "before")
					if mode == "Group" {
						require.NoError(t, promoted.XGroupCreate(t.Context(), topic, testGroup, "$").Err())
					}
				}
				flip()
				// A fan-out continues after the last ID that it read: the new
				// server's IDs are greater, as after a failover.
				began := time.Now()
				for _, topic := range topics {
					publish(t, promoted, topic, "after")
				}
				limit := blockTime + 9*time.Second
				eventually(t, func() bool { return followed.len() >= n || time.Since(began) > limit })
				t.Logf("%d of %d topics follow after %s", followed.len(), n, time.Since(began))
				assert.Equal(t, n, followed.len(), "some topics stay with the old server")
				eventually(t, func() bool {
					return len(blockedConns(t, old, clientName(name))) == 0 || time.Since(began) > limit
				})
				assert.Empty(t, blockedConns(t, old, clientName(name)), "reads wait at the old server")
			})
		}
	}
}

// clientName derives a connection name from a test's topic.
func clientName(topic string) string { return strings.NewReplacer("/", "-", " ", "-").Replace(topic) }

// A client of a type that the library does not know has no dedicated connections:
// each read took one of the pool while it blocked, and with more topics than that
// nothing else got one: Subscribe failed, and so did Publish. And reads with a
// BlockTime above the ReadTimeout were given up, with an error in the log for each.
// Now such a client's reads use at most half of the pool.
func TestFault53_WrappedClient(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const topics, pool = 40, 10
	for _, mode := range []string{"Group", "FanOut"} {
		for _, readTimeout := range []time.Duration{time.Second, 3 * time.Second} {
			t.Run(fmt.Sprintf("%s, ReadTimeout %s", mode, readTimeout), func(t *testing.T) {
				t.Parallel()
				inner, name := named(t, func(opt *redis.Options) {
					opt.PoolSize, opt.ReadTimeout, opt.PoolTimeout = pool, readTimeout, 2*time.Second
				})
				client := struct{ redis.UniversalClient }{inner}
				admin, logs := newClient(t), newLogRecorder()
				config := goxstreams.SubscriberConfig{Client: client}
				if mode == "Group" {
					config = grouped(client)
				}
				config.ClaimInterval = time.Second
				config.BlockTime = 2 * time.Second // between the two timeouts, with room for a busy machine
				sub := newSubscriberLog(t, config, logs)
				base := topic(t)
				handled := newTally()
				var names []string
				for i := range topics {
					names = append(names, fmt.Sprint(base, "-", i))
					began := time.Now()
					messages, err := sub.Subscribe(context.Background(), names[i])
					require.NoError(t, err, "topic %d", i)
					require.Less(t, time.Since(began), 2*time.Second, "Subscribe waits for a connection, topic %d", i)
					handled.handle(messages, nil)
				}
				blocked := func() int { return len(blockedConns(t, admin, name)) }
				eventually(t, func() bool { return blocked() > 0 }, "nothing waits for messages")
				// As long as several reads take; none of them may fail.
				during(t, 1500*time.Millisecond, func() bool { return blocked() <= pool/2 }, "more than half of the pool waits")
				require.Empty(t, logs.Errors())

				pub := newPublisher(t, client)
				for range 3 {
					for _, topic := range names {
						began := time.Now()
						require.NoError(t, pub.Publish(topic, message.NewMessage("", []byte("x"))))
						require.Less(t, time.Since(began), 2*time.Second, "Publish waits for a connection")
					}
				}
				eventuallyAll(t, func() int { return int(delivered(sub)) }, 3*topics)
				assert.EqualValues(t, 3*topics, delivered(sub))
				assert.Empty(t, logs.Errors())
				for _, st := range sub.Stats() {
					assert.NoError(t, st.Err, st.Topic)
				}
			})
		}
	}
}

// delivered returns how many messages all subscriptions together have delivered.
func delivered(sub *goxstreams.Subscriber) (n int64) {
	for _, st := range sub.Stats() {
		n += st.Delivered
	}
	return n
}

// Subscriptions of one topic on one Subscriber, such as a router's handlers or
// waiters for the reply to a request, had a connection each, since one command
// cannot read a stream twice. So 200 of them took 200 connections. Now at most
// eight block, however many subscriptions there are.
func TestFault60_SubscriptionsOfOneTopic(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // CLIENT LIST
	const (
		pool  = 10
		most  = 8 // blocking
		total = 200
	)
	for _, mode := range []string{"Group", "FanOut"} {
		for _, topics := range []int{1, 20} {
			t.Run(fmt.Sprintf("%s, topics %d", mode, topics), func(t *testing.T) {
				t.Parallel()
				const each = total // messages of all topics together
				client, name := named(t, func(opt *redis.Options) { opt.PoolSize = pool })
				admin := newClient(t)
				config := grouped(client)
				copies := 1
				if mode == "FanOut" {
					config = goxstreams.SubscriberConfig{Client: client}
					copies = total / topics
				}
				config.ClaimInterval = time.Second
				config.CloseTimeout = patience
				sub := newSubscriber(t, config)
				base := topic(t)
				var mu sync.Mutex
				got := make(map[string]int) // by subscription and message
				deliveries := 0
				for i := range total {
					messages := subscribe(t, sub, fmt.Sprint(base, "-", i%topics))
					go func() {
						for msg := range messages {
							mu.Lock()
							deliveries++
							if mode == "FanOut" {
								got[fmt.Sprint(i, " ", msg.UUID)]++
							} else {
								got[msg.UUID]++
							}
							mu.Unlock()
							msg.Ack()
						}
					}()
				}
				frugal := func() bool {
					return len(blockedConns(t, admin, name)) <= most && len(connections(t, admin, name)) <= most+pool
				}
				eventually(t, func() bool { return len(blockedConns(t, admin, name)) > 0 }, "nothing waits for messages")
				// All have subscribed: each is blocking by then, or is about to.
				during(t, 500*time.Millisecond, frugal, "too many connections")
				for i := range topics {
					publishN(t, admin, fmt.Sprint(base, "-", i), each/topics)
				}
				count := func() int {
					mu.Lock()
					defer mu.Unlock()
					return len(got)
				}
				eventuallyAll(t, count, each*copies)
				during(t, 300*time.Millisecond, frugal, "too many connections")
				mu.Lock()
				defer mu.Unlock()
				assert.Equal(t, each*copies, deliveries, "some came twice")
				for i := range topics {
					admin.Del(context.Background(), fmt.Sprint(base, "-", i))
				}
			})
		}
	}
}

// A blocking connection ended, and the server rejected another one because it was
// at its limit. Reads through the client's pool in between reported that Redis is
// available again, and the next attempt to block that it is not: an outage and its
// end in the log and in Stats, once a second. Now it is one outage, until the
// subscription can block for messages again.
func TestFault62_RefusedConnection(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, mode := range []string{"Group", "FanOut"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			srv := testserver.Private(t)
			admin := srv.Client()
			ctx := context.Background()
			name := "refused-" + mode
			client := redis.NewClient(&redis.Options{Addr: srv.Addr(), ClientName: name})
			t.Cleanup(func() { _ = client.Close() })
			config := goxstreams.SubscriberConfig{Client: client}
			if mode == "Group" {
				config = grouped(client)
			}
			logs := newLogRecorder()
			sub := newSubscriberLog(t, config, logs)
			topic := topic(t)
			messages := subscribe(t, sub, topic)
			publish(t, admin, topic, "before")
			next(t, messages).Ack()
			eventually(t, func() bool { return len(blockedConns(t, admin, name)) > 0 })
			require.Empty(t, logs.Errors())
			before := len(logs.Infos())

			// Existing connections may stay, except the blocking ones.
			list := connectionsOf(t, admin)
			blocked := blockedConns(t, admin, name)
			require.NoError(t, admin.ConfigSet(ctx, "maxclients", fmt.Sprint(len(list)-len(blocked))).Err())
			for _, conn := range blocked {
				require.NoError(t, admin.ClientKillByFilter(ctx, "ID", clientField(conn, "id")).Err())
			}
			refused := rejected(t, admin)
			eventually(t, func() bool { return stats(t, sub).Err != nil }, "no outage")
			outage := stats(t, sub)
			eventually(t, func() bool { return rejected(t, admin) >= refused+4 }, "it does not try again")
			assert.Len(t, logs.Errors(), 1, "one outage: %q", logs.Errors())
			assert.Empty(t, recoveries(logs, before), "it is not over")
			assert.Error(t, stats(t, sub).Err)
			assert.Equal(t, outage.Since, stats(t, sub).Since)

			require.NoError(t, admin.ConfigSet(ctx, "maxclients", "1000").Err())
			eventually(t, func() bool { return stats(t, sub).Err == nil }, "it does not recover")
			publish(t, admin, topic, "after")
			msg := next(t, messages)
			assert.Equal(t, "after", string(msg.Payload))
			msg.Ack()
			assert.Len(t, logs.Errors(), 1, "one outage: %q", logs.Errors())
			assert.Len(t, recoveries(logs, before), 1)
		})
	}
}

// recoveries returns the lines logged at Info, after the first from lines, about
// the end of an outage.
func recoveries(logs logRecorder, from int) (lines []string) {
	for _, line := range logs.Infos()[from:] {
		if strings.Contains(line, "is available to the subscription again") {
			lines = append(lines, line)
		}
	}
	return lines
}

// connectionsOf returns all of the server's connections, each as CLIENT LIST
// describes it.
func connectionsOf(t testing.TB, admin *redis.Client) []string {
	t.Helper()
	list, err := admin.ClientList(context.Background()).Result()
	require.NoError(t, err)
	return strings.Split(strings.TrimSpace(list), "\n")
}

// rejected returns how many connections the server has rejected.
func rejected(t testing.TB, admin *redis.Client) (n int) {
	t.Helper()
	info, err := admin.Info(context.Background(), "stats").Result()
	require.NoError(t, err)
	_, after, _ := strings.Cut(info, "rejected_connections:")
	_, err = fmt.Sscan(after, &n)
	require.NoError(t, err)
	return n
}

// blackHole makes connections that, once it is open, swallow what is written on
// those that are in a blocking read, and never receive anything: like connections
// that a load balancer has silently forgotten.
type blackHole struct {
	mu    sync.Mutex
	conns map[*blackHoleConn]bool
}

type blackHoleConn struct {
	net.Conn
	hole *blackHole

	mu       sync.Mutex
	waits    bool // the last command written was a blocking read
	dead     bool
	deadline time.Time
	closed   chan struct{}
	once     sync.Once
}

func (b *blackHole) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	c := &blackHoleConn{Conn: conn, hole: b, closed: make(chan struct{})}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns[c] = true
	return c, nil
}

// open breaks the connections that are in a blocking read, and returns their
// number.
func (b *blackHole) open() (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.conns {
		c.mu.Lock()
		if c.waits && !c.dead {
			c.dead = true
			n++
		}
		c.mu.Unlock()
	}
	return n
}

func (c *blackHoleConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.waits = bytes.Contains(b, []byte("\nblock\r\n"))
	dead := c.dead
	c.mu.Unlock()
	if dead {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

func (c *blackHoleConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	c.deadline = t
	c.mu.Unlock()
	return c.Conn.SetReadDeadline(t)
}

func (c *blackHoleConn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	c.deadline = t
	c.mu.Unlock()
	return c.Conn.SetDeadline(t)
}

func (c *blackHoleConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		c.mu.Lock()
		dead, deadline := c.dead, c.deadline
		c.mu.Unlock()
		if !dead || n == 0 && os.IsTimeout(err) {
			return n, err
		}
		if err == nil {
			continue // lost on the way
		}
		// The server has closed it, but nobody is told.
		var timeout <-chan time.Time
		if !deadline.IsZero() {
			timer := time.NewTimer(time.Until(deadline))
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-timeout:
			return 0, os.ErrDeadlineExceeded
		case <-c.closed:
			return 0, net.ErrClosed
		}
	}
}

func (c *blackHoleConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	c.hole.mu.Lock()
	delete(c.hole.conns, c)
	c.hole.mu.Unlock()
	return c.Conn.Close()
}

// A load balancer forgets a connection with a blocking read, without telling either
// side. The read was given up only ten seconds after its BLOCK, whatever the
// client's ReadTimeout: with a BlockTime of a minute nothing was delivered for 70
// s. Now it takes BlockTime and ReadTimeout, and no message is lost.
//
// It measures time, so it is not parallel to other tests.
func TestFault64_SilentlyDroppedConnection(t *testing.T) {
	testserver.RequireReal(t)
	const (
		blockTime   = time.Second
		readTimeout = 500 * time.Millisecond
	)
	for _, mode := range []string{"Group", "FanOut"} {
		for _, topics := range []int{1, 5} {
			t.Run(fmt.Sprintf("%s, topics %d", mode, topics), func(t *testing.T) {
				t.Parallel()
				hole := &blackHole{conns: make(map[*blackHoleConn]bool)}
				client, name := named(t, func(opt *redis.Options) { opt.Dialer, opt.ReadTimeout = hole.dial, readTimeout })
				admin := newClient(t)
				config := grouped(client)
				if mode == "FanOut" {
					config = goxstreams.SubscriberConfig{Client: client}
				}
				config.BlockTime = blockTime
				names, channels := manyTopics(t, newSubscriber(t, config), topics)
				handled := newTally()
				for _, messages := range channels {
					handled.handle(messages, nil)
				}
				for _, topic := range names {
					publish(t, admin, topic, "before")
				}
				eventuallyAll(t, handled.len, topics)
				eventually(t, func() bool { return len(blockedConns(t, admin, name)) > 0 })
				eventually(t, func() bool { return hole.open() > 0 })
				began := time.Now()
				for _, topic := range names {
					publish(t, admin, topic, "after")
				}
				eventuallyAll(t, handled.len, 2*topics)
				took := time.Since(began)
				t.Logf("after %s", took)
				assert.Less(t, took, 3*(blockTime+readTimeout)+time.Second, "not within BlockTime and ReadTimeout")
				assert.Equal(t, 2*topics, handled.total(), "handled twice")
			})
		}
	}
}

// The name of the primary was moved to a promoted replica, as managed services do,
// and the old server became a replica that had no data yet. The pool's remaining
// connections to it reported that the key does not exist, and the next command went
// to the new server, which had had the group all along: "The consumer group was
// lost" was logged at Error for each topic, and the knowledge about the group was
// forgotten. Now a reply over an old connection says nothing about the group, and a
// group that XGROUP CREATE finds was not lost.
func TestFault58_EndpointChangesItsServer(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const topics = 6
	for _, concurrency := range []int{1, 4} {
		t.Run(fmt.Sprint("MaxConcurrency ", concurrency), func(t *testing.T) {
			t.Parallel()
			before, after := testserver.Private(t), testserver.Private(t)
			old, promoted := before.Client(), after.Client()
			ctx := context.Background()
			to := newEndpoint(before.Addr())
			client := redis.NewClient(&redis.Options{Addr: "primary:6379", Dialer: to.dial})
			t.Cleanup(func() { _ = client.Close() })
			config := grouped(client)
			config.BlockTime = time.Second
			config.MaxConcurrency = concurrency
			logs := newLogRecorder()
			sub := newSubscriberLog(t, config, logs)
			names, channels := manyTopics(t, sub, topics)
			all, followed := newTally(), newTally()
			for _, messages := range channels {
				all.handle(messages, func(msg *message.Message) {
					if string(msg.Payload) == "after" {
						followed.add(msg)
					}
				})
			}
			for _, topic := range names {
				publish(t, old, topic, "before")
			}
			eventuallyAll(t, all.len, topics)
			for _, topic := range names {
				eventuallySettled(t, old, topic, testGroup)
				// The entries that replication would have copied.
				publish(t, promoted, topic, "before")
				require.NoError(t, promoted.XGroupCreate(ctx, topic, testGroup, "$").Err())
			}

			to.flip(after.Addr())
			// In one step, so that it is empty only as a replica. It finds no
			// master, otherwise it would not stay empty for long.
			_, err := old.TxPipelined(ctx, func(tx redis.Pipeliner) error {
				tx.FlushAll(ctx)
				tx.Do(ctx, "replicaof", "127.0.0.1", "1")
				return nil
			})
			require.NoError(t, err)
			for _, topic := range names {
				publish(t, promoted, topic, "after")
			}
			eventuallyAll(t, followed.len, topics)
			eventually(t, func() bool {
				for _, st := range sub.Stats() {
					if st.Err != nil {
						return false
					}
				}
				return true
			}, "the outage does not end")
			assert.Equal(t, 2*topics, all.total(), "handled twice")
			for _, line := range logs.Errors() {
				assert.NotContains(t, line, "group was lost")
				assert.NotContains(t, line, "group was recreated")
			}
			for _, topic := range names { // the group is unchanged
				groups, err := promoted.XInfoGroups(ctx, topic).Result()
				require.NoError(t, err)
				require.Len(t, groups, 1)
				last, err := promoted.XInfoStream(ctx, topic).Result()
				require.NoError(t, err)
				assert.Equal(t, last.LastGeneratedID, groups[0].LastDeliveredID)
			}
		})
	}
}

// Messages waited for their retries when the group was destroyed and recreated in
// one step by somebody who knew nothing of them. The first ones that were due were
// found not to be pending, and were given up one by one, since others of them were
// pending again; they were redelivered when their leases expired.
//
// Now they are redelivered when they are due.
func TestFault33_GroupMadeAnewWhileMessagesWait(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for name, lose := range map[string]func(ctx context.Context, p redis.Pipeliner, topic, consumer string){
		"GroupMadeAnew": func(ctx context.Context, p redis.Pipeliner, topic, _ string) {
			p.XGroupDestroy(ctx, topic, testGroup)
			p.XGroupCreate(ctx, topic, testGroup, "$")
		},
		"GroupMadeAnewFromTheBeginning": func(ctx context.Context, p redis.Pipeliner, topic, _ string) {
			p.XGroupDestroy(ctx, topic, testGroup)
			p.XGroupCreate(ctx, topic, testGroup, "0")
		},
		"GroupDestroyed": func(ctx context.Context, p redis.Pipeliner, topic, _ string) { p.XGroupDestroy(ctx, topic, testGroup) },
		"ConsumerRemoved": func(ctx context.Context, p redis.Pipeliner, topic, consumer string) {
			p.XGroupDelConsumer(ctx, topic, testGroup, consumer)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const n = 40
			client, topic := newClient(t), topic(t)
			config := grouped(client)
			config.MaxConcurrency = 20
			config.Retry = &goxstreams.Retry{InitialInterval: 2 * time.Second}
			log := newLogRecorder()
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			consumer := consumersOf(t, client, topic)[0]
			publishN(t, client, topic, n)
			for range n {
				next(t, messages).Nack()
			}
			eventually(t, func() bool { return stats(t, sub).Waiting == n })
			began := time.Now()
			_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
				lose(t.Context(), p, topic, consumer)
				return nil
			})
			require.NoError(t, err)
			handled := newTally()
			for handled.len() < n {
				msg := next(t, messages)
				handled.add(msg)
				msg.Ack()
			}
			require.Less(t, time.Since(began), 8*time.Second)
			require.NotContains(t, strings.Join(log.Infos(), "\n"), "Lease lost")
			require.Equal(t, n, handled.total())
			require.Equal(t, map[int64]int{2: n}, handled.counts)
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// A lease counts from when its read was sent. Where a read blocked for longer than
// ClaimMinIdle, what it brought counted as expired at once: if the group was recreated
// before the first renewal, the messages were given up.
//
// [A seed of the simulation found it.]
func TestFault33_GroupMadeAnewAfterALongRead(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n = 20
	client, topic := newClient(t), topic(t)
	config := grouped(client)
	config.MaxConcurrency, config.BlockTime, config.ClaimMinIdle = n, 5*time.Second, 1500*time.Millisecond
	config.Retry = &goxstreams.Retry{InitialInterval: 500 * time.Millisecond}
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	eventually(t, func() bool { return len(consumersOf(t, client, topic)) == 1 })
	time.Sleep(config.ClaimMinIdle + 100*time.Millisecond) // a read would block for as long
	publishN(t, client, topic, n)
	for range n {
		next(t, messages).Nack()
	}
	_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
		p.XGroupDestroy(t.Context(), topic, testGroup)
		p.XGroupCreate(t.Context(), topic, testGroup, "$")
		p.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"_watermill_message_uuid", "later", "payload", ""}})
		return nil
	})
	require.NoError(t, err)
	handled := newTally()
	for handled.len() < n+1 {
		msg := next(t, messages)
		handled.add(msg)
		msg.Ack()
	}
	require.NotContains(t, strings.Join(log.Infos(), "\n"), "Lease lost")
	eventuallySettled(t, client, topic, testGroup)
}

// goxstreams checks whether the group exists and then creates it: of several
// processes that start at once, some fail with BUSYGROUP (25 of 120). But an
// existing group is what they wanted.
func TestFault18_GroupCreationFailsAtOnce(t *testing.T) {
	t.Parallel()
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

// An existing group must keep its position, too: entries that it has not read yet
// stay unread.
func TestFault18_ExistingGroupKeepsItsPlace(t *testing.T) {
	t.Parallel()
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

// Errors that Redis can return, or no answer. goxstreams ends the process by
// log.Fatal on some of them. Here every command gets the same error for a while,
// and then the subscription continues where it was.
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
			if fault != redis.Nil { // a reply: no entries
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

// In both earlier libraries, after FLUSHALL, XGROUP DESTROY or DEL every read fails
// with NOGROUP forever; the group is created only when subscribing.
//
// Here the group is recreated. Messages that were being handled are still this
// subscription's: nobody gets them a second time, and their acks count.
func TestFault07_LostGroupIsMadeAgain(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, tt := range []struct {
		name  string
		lose  func(ctx context.Context, client *redis.Client, topic string) error
		stays bool // the stream's entries
	}{
		{"DESTROY", func(ctx context.Context, client *redis.Client, topic string) error {
			return client.XGroupDestroy(ctx, topic, testGroup).Err()
		}, true},
		{"DEL", func(ctx context.Context, client *redis.Client, topic string) error {
			return client.Del(ctx, topic).Err()
		}, false},
		{"FLUSHALL", func(ctx context.Context, client *redis.Client, _ string) error {
			return client.FlushAll(ctx).Err()
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client := testserver.Private(t).Client()
			topic := topic(t)
			log := newLogRecorder()
			config := grouped(client)
			config.MaxConcurrency = 2
			config.BlockTime = time.Minute // it must notice earlier than that
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "acked")
			require.Len(t, collect(messages, 1, patience), 1)
			eventuallySettled(t, client, topic, testGroup)
			publish(t, client, topic, "in hand")
			held := next(t, messages)
			eventuallyBlocked(t, client)
			eventuallyLater(t, client, delivery(t, held).ID)
			require.NoError(t, tt.lose(t.Context(), client, topic))
			publish(t, client, topic, "1", "2", "3")
			require.Equal(t, []string{"1", "2", "3"}, payloads(collect(messages, 3, patience)))
			require.NoError(t, held.Context().Err())
			if tt.stays {
				eventually(t, func() bool {
					rows := pendingOf(t, client, topic, testGroup)
					return len(rows) == 1 && rows[0].ID == delivery(t, held).ID
				}, "what is in hand is not pending again")
			}
			require.True(t, held.Ack())
			eventuallySettled(t, client, topic, testGroup)
			eventually(t, func() bool { return stats(t, sub).Err == nil }, "the outage goes on")

			publish(t, client, topic, "after")
			require.Equal(t, []string{"after"}, payloads(collect(messages, 1, patience)))
			// The losses of the stream, those of the group, and the outage: once
			// more if an earlier answer arrived late, to the read or to the look.
			lines := slices.Clone(log.Errors())
			slices.Sort(lines)
			require.Equal(t, slices.Compact(slices.Clone(lines)), lines, "the log is flooded")
			require.LessOrEqual(t, len(lines), 4, "the log is flooded: %s", lines)
			require.Contains(t, strings.Join(lines, "\n"), "group was lost")
		})
	}

	// The new stream may start with IDs that the old one has passed: the server's
	// clock was set back, or the IDs are set explicitly.
	t.Run("SmallerIDs", func(t *testing.T) {
		client := newClient(t)
		topic := topic(t)
		messages := subscribe(t, newSubscriber(t, grouped(client)), topic)
		publish(t, client, topic, "old")
		require.Len(t, collect(messages, 1, patience), 1)
		eventuallySettled(t, client, topic, testGroup)
		require.NoError(t, client.Del(t.Context(), topic).Err())
		for _, id := range []string{"1-1", "1-2"} {
			require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: id, Values: []string{
				goxstreams.UUIDHeaderKey, id, "payload", id,
			}}).Err())
		}
		require.Equal(t, []string{"1-1", "1-2"}, payloads(collect(messages, 2, patience)))
	})
}

// TestRestart: the server is restarted twice while 10 goroutines publish and a
// subscription consumes. Everything arrives.
func TestRestart(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			const publishers, each = 10, 200
			server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always")
			client, topic := server.Client(), topic(t)
			config := goxstreams.SubscriberConfig{Client: client, MaxConcurrency: mode.concurrency}
			if mode.grouped {
				config = claiming(client)
				config.MaxConcurrency = mode.concurrency
			}
			sub := newSubscriber(t, config)
			handled := newTally()
			handled.handle(subscribe(t, sub, topic), nil)

			var published, unknown atomic.Int64
			var all []string
			var running sync.WaitGroup
			for p := range publishers {
				for i := range each {
					all = append(all, fmt.Sprintf("%d-%d", p, i))
				}
				running.Go(func() {
					pub := newPublisher(t, client)
					for i := range each {
						msg := message.NewMessage(fmt.Sprintf("%d-%d", p, i), nil)
						for err := pub.Publish(topic, msg); err != nil; err = pub.Publish(topic, msg) {
							if errors.Is(err, goxstreams.ErrOutcomeUnknown) {
								unknown.Add(1) // it may be stored twice now
							}
							time.Sleep(10 * time.Millisecond) // otherwise the log fills up; the duration does not matter
						}
						published.Add(1)
						time.Sleep(2 * time.Millisecond) // so that the restarts interrupt more of it
					}
				})
			}
			for _, part := range []int{3, 2} {
				eventuallyAll(t, func() int { return int(published.Load()) }, publishers*each/part)
				server.Restart()
			}
			running.Wait()
			eventuallyAll(t, handled.len, len(all))
			assert.True(t, handled.has(all), "not everything arrives")
			t.Logf("%d outcomes were unknown", unknown.Load())
			if !mode.grouped {
				return
			}
			eventuallySettled(t, client, topic, testGroup)
			require.NoError(t, sub.Close())
			// The server had persisted its deliveries, so no entry is delivered
			// twice.
			for id, n := range handled.entries {
				assert.Equal(t, 1, n, "entry %s", id)
			}
			assert.Equal(t, map[int64]int{1: len(handled.entries)}, handled.counts, "entries by delivery count")
			assert.LessOrEqual(t, len(handled.entries), len(all)+int(unknown.Load()))
		})
	}
}

// TestServerAway: Redis counts idle time even while it is frozen or down, and no
// consumer can renew. Then all messages that are being handled look abandoned:
// claiming by idle time alone takes them from living consumers that reconnect a
// little later than a claimer. Here all of them do.
func TestServerAway(t *testing.T) {
	t.Parallel()
	for name, away := range map[string]func(s *testserver.Server, d time.Duration){
		"Frozen": func(s *testserver.Server, d time.Duration) { s.Freeze(); time.Sleep(d); s.Thaw() },
		"Down":   func(s *testserver.Server, d time.Duration) { s.Kill(); time.Sleep(d); s.Restart() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always")
			client, topic := server.Client(), topic(t)
			const minIdle = 2400 * time.Millisecond // the slower consumers are within a third of it
			var unreachable atomic.Bool
			slow := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if unreachable.Load() && isRenewal(cmd) {
					return io.EOF
				}
				return next()
			}}
			var subs [2]*goxstreams.Subscriber
			var out [2]<-chan *message.Message
			for i := range subs {
				config := claiming(server.Client())
				config.Client.(*redis.Client).AddHook(slow)
				config.ClaimMinIdle = minIdle
				config.MaxConcurrency = 16 // room for all of the other one's messages
				subs[i] = newSubscriber(t, config)
				out[i] = subscribe(t, subs[i], topic)
			}
			publishN(t, client, topic, 8)
			var held []*message.Message
			for len(held) < 8 {
				select {
				case msg := <-out[0]:
					held = append(held, msg)
				case msg := <-out[1]:
					held = append(held, msg)
				case <-time.After(patience):
					require.FailNow(t, "no message came")
				}
			}
			for _, messages := range out {
				go func() {
					for msg := range messages {
						d, _ := goxstreams.DeliveryFromContext(msg.Context())
						assert.Fail(t, "a message in hand was claimed", "%+v", d)
						msg.Ack()
					}
				}()
			}
			unreachable.Store(true)
			away(server, 2*minIdle+minIdle/2)
			time.AfterFunc(minIdle/16, func() { unreachable.Store(false) })
			// A claim by idle time alone comes at the first look; one that requires
			// an entry to be found idle twice, without a renewal in between, comes
			// within claimTime.
			during(t, minIdle*4/3+2*claimInterval+minIdle/3, func() bool {
				return !slices.ContainsFunc(held, func(msg *message.Message) bool { return msg.Context().Err() != nil })
			}, "a context ended")
			for _, sub := range subs {
				assert.Zero(t, stats(t, sub).Claimed)
				assert.NoError(t, stats(t, sub).Err)
			}
			rows := pendingOf(t, client, topic, testGroup)
			require.Len(t, rows, len(held))
			for _, row := range rows {
				assert.EqualValues(t, 1, row.RetryCount)
			}
			for _, msg := range held {
				msg.Ack()
			}
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// TestGroupLost: the group disappears in one of several ways.
func TestGroupLost(t *testing.T) {
	t.Parallel()
	type server struct{ client *redis.Client }
	losses := []struct {
		name     string
		entries  bool // the stream stays
		disaster func(t *testing.T, client *redis.Client, topic string)
	}{
		{"Destroy", true, func(t *testing.T, client *redis.Client, topic string) {
			require.NoError(t, client.XGroupDestroy(t.Context(), topic, testGroup).Err())
		}},
		{"DestroyAndCreateAtTheEnd", true, func(t *testing.T, client *redis.Client, topic string) {
			_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
				p.XGroupDestroy(t.Context(), topic, testGroup)
				p.XGroupCreate(t.Context(), topic, testGroup, "$")
				return nil
			})
			require.NoError(t, err)
		}},
		{"Delete", false, func(t *testing.T, client *redis.Client, topic string) {
			require.NoError(t, client.Del(t.Context(), topic).Err())
		}},
		{"Flush", false, func(t *testing.T, client *redis.Client, _ string) {
			require.NoError(t, client.FlushAll(t.Context()).Err())
		}},
	}
	for _, loss := range losses {
		open := func(t *testing.T) server {
			if loss.name == "Flush" {
				return server{testserver.Private(t).Client()}
			}
			testserver.RequireReal(t)
			return server{newClient(t)}
		}
		t.Run(loss.name+"/Idle", func(t *testing.T) {
			t.Parallel()
			client, topic := open(t).client, topic(t)
			messages := subscribe(t, newSubscriber(t, claiming(client)), topic)
			publish(t, client, topic, "before")
			before := next(t, messages)
			before.Ack()
			eventuallySettled(t, client, topic, testGroup)

			eventuallyLater(t, client, delivery(t, before).ID)
			loss.disaster(t, client, topic)
			publish(t, client, topic, "after")
			msg := next(t, messages)
			assert.Equal(t, "after", string(msg.Payload))
			assert.EqualValues(t, 1, delivery(t, msg).Count)
			msg.Ack()
			eventuallySettled(t, client, topic, testGroup)
		})
		t.Run(loss.name+"/InFlight", func(t *testing.T) {
			t.Parallel()
			client, topic := open(t).client, topic(t)
			log := newLogRecorder()
			config := claiming(client)
			config.MaxConcurrency = 4
			config.Retry = &goxstreams.Retry{InitialInterval: 2 * time.Second} // the disaster comes before that
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			in := make(map[string]*message.Message)
			publish(t, client, topic, "acked", "nacked", "finishes", "waits")
			for range 4 {
				msg := next(t, messages)
				in[string(msg.Payload)] = msg
			}
			in["acked"].Ack()
			in["waits"].Nack()
			eventually(t, func() bool { s := stats(t, sub); return s.Waiting == 1 && s.InFlight == 3 })

			eventuallyLater(t, client, delivery(t, in["waits"]).ID)
			loss.disaster(t, client, topic)
			publish(t, client, topic, "after")
			in["after"] = next(t, messages)
			assert.EqualValues(t, 1, delivery(t, in["after"]).Count)
			in["after"].Ack()
			assert.NoError(t, in["nacked"].Context().Err())
			assert.NoError(t, in["finishes"].Context().Err())
			in["nacked"].Nack()
			in["finishes"].Ack()

			if loss.entries {
				again := make(map[string]int64)
				for range 2 {
					msg := next(t, messages)
					again[string(msg.Payload)] = delivery(t, msg).Count
					msg.Ack()
				}
				assert.Equal(t, map[string]int64{"nacked": 2, "waits": 2}, again)
			}
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "something is kept for ever")
			eventuallySettled(t, client, topic, testGroup)
			// Any further redelivery would come before this message, or instead of
			// it.
			publish(t, client, topic, "last")
			msg := next(t, messages)
			assert.Equal(t, "last", string(msg.Payload))
			msg.Ack()
			if !loss.entries {
				eventually(t, func() bool { return stats(t, sub).Lost >= 2 }, "that messages are lost is not said")
			}
			eventually(t, func() bool { return stats(t, sub).Err == nil })
			assert.True(t, slices.ContainsFunc(log.Errors(), func(l string) bool { return strings.Contains(l, "group") }), "it is not logged: %v", log.Errors())
		})
	}
}

// TestRecovery: Redis rejects a command for a while.
func TestRecovery(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"xreadgroup", "xack", "xclaim"} {
		t.Run("NOPERM/"+command, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, admin, log := topic(t), newClient(t), newLogRecorder()
			client := aclUser(t, admin)
			var tries, looks atomic.Int64
			client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if cmd.Name() == command || command == "xclaim" && isRenewal(cmd) {
					tries.Add(1)
				}
				if cmd.Name() == "xpending" {
					looks.Add(1)
				}
				return next()
			}})
			config := claiming(client)
			config.MaxConcurrency = 2
			config.BlockTime = 50 * time.Millisecond // 7.0 still serves a read that is blocking
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			publish(t, admin, topic, "held")
			held := next(t, messages)
			// If a look found it pending before the ledger had it, it would probe
			// whether leases can be renewed, and the next one would not: an outage,
			// and its end.
			seen := looks.Load()
			eventually(t, func() bool { return looks.Load() >= seen+2 }, "nobody looks")

			setUser(t, admin, client.Options().Username, "-"+command)
			if command == "xack" {
				held.Ack()
			}
			eventually(t, func() bool { return stats(t, sub).Err != nil })
			assert.Regexp(t, "NOPERM|ACL failure in script|executing the script can't", stats(t, sub).Err.Error())
			assert.WithinDuration(t, time.Now(), stats(t, sub).Since, patience)
			before := tries.Load()
			eventually(t, func() bool { return tries.Load() >= before+3 }, "it does not try again")
			publish(t, admin, topic, "meanwhile")
			began, ended := outageLogged(log)
			assert.Equal(t, 1, began, "logged: %v", log.Errors())
			assert.Zero(t, ended)

			setUser(t, admin, client.Options().Username, "+"+command)
			msg := next(t, messages)
			assert.Equal(t, "meanwhile", string(msg.Payload))
			assert.EqualValues(t, 1, delivery(t, msg).Count)
			msg.Ack()
			if command != "xack" {
				assert.NoError(t, held.Context().Err(), "the lease is lost")
				held.Ack()
			}
			eventuallySettled(t, admin, topic, testGroup)
			eventually(t, func() bool { return stats(t, sub).Err == nil })
			assert.EqualValues(t, 2, stats(t, sub).Delivered)
			eventuallyLogged(t, log, 1)
		})
	}
	t.Run("OOM", func(t *testing.T) {
		t.Parallel()
		server := testserver.Private(t)
		topic, admin, log := topic(t), server.Client(), newLogRecorder()
		client := server.Client()
		var moves atomic.Int64
		client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
			if isMove(cmd) {
				moves.Add(1)
			}
			return next()
		}})
		config := claiming(client)
		config.Retry = &goxstreams.Retry{MaxRetries: -1, InitialInterval: 20 * time.Millisecond}
		sub := newSubscriberLog(t, config, log)
		messages := subscribe(t, sub, topic)
		publish(t, admin, topic, "dies", "lives")
		msg := next(t, messages)
		require.NoError(t, admin.ConfigSet(t.Context(), "maxmemory", "1").Err())
		msg.Nack()
		msg = next(t, messages)
		assert.Equal(t, "lives", string(msg.Payload), "the dead one is handled again, or holds up the others")
		msg.Ack()
		eventually(t, func() bool { return moves.Load() >= 3 }, "it does not try again")
		require.Error(t, stats(t, sub).Err)
		assert.ErrorContains(t, stats(t, sub).Err, "OOM")
		began, _ := outageLogged(log)
		assert.Equal(t, 1, began, "logged: %v", log.Errors())
		assert.Len(t, pendingOf(t, admin, topic, testGroup), 1)

		require.NoError(t, admin.ConfigSet(t.Context(), "maxmemory", "0").Err())
		eventuallySettled(t, admin, topic, testGroup)
		eventually(t, func() bool { return stats(t, sub).Err == nil })
		eventuallyLogged(t, log, 1)
		require.NoError(t, sub.Close())
		letters := deadLetters(t, admin, topic)
		require.Len(t, letters, 1)
		assert.Equal(t, "dies", string(letters[0].Payload))
	})
}

// A Redis that is out of memory refuses what may need some, so consumers must be able to make
// room: they subscribe, handle, ack, retry, release, take over, pause, resume and recreate
// their group, with the right counts. A consumer that was restarted then could not subscribe,
// and a paused group could not be resumed.
func TestRecovery_RedisFull(t *testing.T) {
	t.Parallel()
	admin := testserver.Private(t).Client()
	const n = 20
	published := make(map[string][]string) // by topic
	for _, topic := range []string{"handle", "take over", "pause", "paused", "lost", "noack", "dead"} {
		createGroup(t, admin, topic, testGroup)
		published[topic] = publishN(t, admin, topic, n)
	}
	readAs(t, admin, "take over", testGroup, "died", n)
	pause(t, admin, "paused")
	trim(t, admin, "lost", goxstreams.Retention{KeepLast: n}) // it knows the group
	setFull(t, admin, true)
	require.ErrorContains(t, admin.XAdd(t.Context(), &redis.XAddArgs{Stream: "x", Values: []string{"a", "b"}}).Err(), "OOM")

	run := func(topic string, test func(t *testing.T, topic string, want []string)) {
		t.Run(topic, func(t *testing.T) { test(t, topic, published[topic]) })
	}
	// settled expects that everything was handled.
	settled := func(t *testing.T, topic string, sub *goxstreams.Subscriber) {
		t.Helper()
		eventuallySettled(t, admin, topic, testGroup)
		require.Zero(t, admin.XInfoGroups(t.Context(), topic).Val()[0].Lag)
		eventually(t, func() bool { return stats(t, sub).Err == nil })
		require.Zero(t, stats(t, sub).Lost)
	}
	run("handle", func(t *testing.T, topic string, want []string) {
		config := grouped(admin)
		config.Retry, config.CloseTimeout = quickRetry(), patience
		first := newSubscriber(t, config)
		require.NoError(t, first.SubscribeInitialize(topic))
		messages := subscribe(t, first, topic)
		next(t, messages).Nack()
		msg := next(t, messages)
		require.Equal(t, want[0], msg.UUID)
		require.EqualValues(t, 2, delivery(t, msg).Count)
		msg.Ack()
		eventually(t, func() bool { return stats(t, first).InFlight > 0 })
		require.NoError(t, first.Close())
		for _, row := range pendingOf(t, admin, topic, testGroup) {
			require.Zero(t, row.RetryCount, "it was released")
		}
		second := newSubscriber(t, config)
		messages = subscribe(t, second, topic)
		for _, id := range want[1:] {
			msg := next(t, messages)
			require.Equal(t, id, msg.UUID)
			require.EqualValues(t, 1, delivery(t, msg).Count)
			msg.Ack()
		}
		settled(t, topic, second)
	})
	run("take over", func(t *testing.T, topic string, want []string) {
		sub := newSubscriber(t, claiming(admin))
		messages := subscribe(t, sub, topic)
		for range want {
			msg := next(t, messages)
			require.EqualValues(t, 2, delivery(t, msg).Count)
			msg.Ack()
		}
		settled(t, topic, sub)
		require.EqualValues(t, n, stats(t, sub).Claimed)
	})
	run("pause", func(t *testing.T, topic string, want []string) {
		sub := newSubscriber(t, grouped(admin))
		messages := subscribe(t, sub, topic)
		next(t, messages).Ack()
		pauseFor(t, admin, topic, sub)
		resume(t, admin, topic)
		require.Subset(t, uuids(collect(messages, n-1, patience)), want[2:])
		settled(t, topic, sub)
	})
	run("paused", func(t *testing.T, topic string, want []string) {
		sub := newSubscriber(t, grouped(admin))
		messages := subscribe(t, sub, topic)
		require.False(t, stats(t, sub).PausedSince.IsZero())
		resume(t, admin, topic)
		require.Equal(t, want, uuids(collect(messages, n, patience)))
		settled(t, topic, sub)
	})
	run("lost", func(t *testing.T, topic string, want []string) {
		config := claiming(admin)
		config.MaxConcurrency = n
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		var unacked []*message.Message
		for len(unacked) < n {
			unacked = append(unacked, next(t, messages))
		}
		require.NoError(t, admin.XGroupDestroy(t.Context(), topic, testGroup).Err())
		eventually(t, func() bool {
			sum, err := admin.XPending(t.Context(), topic, testGroup).Result()
			return err == nil && sum.Count == n
		}, "the group is not restored")
		for _, msg := range unacked {
			require.NoError(t, msg.Context().Err(), "the lease is lost")
			msg.Ack()
		}
		state := admin.HGet(t.Context(), topic+".retention{"+topic+"}", "group "+testGroup).Val()
		require.Contains(t, state, "back ", "what another consumer has to restore may be trimmed")
		settled(t, topic, sub)
	})
	run("noack", func(t *testing.T, topic string, want []string) {
		config := grouped(admin)
		config.NoAck = true
		sub := newSubscriber(t, config)
		require.Equal(t, want, uuids(collect(subscribe(t, sub, topic), n, patience)))
		settled(t, topic, sub)
	})
	// What needs memory fails, visibly, and is not lost.
	run("dead", func(t *testing.T, topic string, want []string) {
		sub := newSubscriber(t, limited(admin, -1))
		messages := subscribe(t, sub, topic)
		next(t, messages).Nack()
		require.Equal(t, want[1:], uuids(collect(messages, n-1, patience)))
		eventually(t, func() bool { return stats(t, sub).Err != nil })
		require.ErrorContains(t, stats(t, sub).Err, "OOM")
		eventually(t, func() bool { return len(pendingOf(t, admin, topic, testGroup)) == 1 })
		setFull(t, admin, false)
		eventually(t, func() bool { return stats(t, sub).Err == nil && len(pendingOf(t, admin, topic, testGroup)) == 0 })
		require.Len(t, deadLetters(t, admin, topic), 1)
	})
}

// Somebody else recreates the group; this consumer reads something new before it
// renews its messages.
func TestGroupRemade_ReadsOn(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	config := claiming(newClient(t))
	config.MaxConcurrency = 2
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, admin, topic, "old")
	old := next(t, messages)
	remade(t, admin, topic)
	fresh := next(t, messages)
	require.Equal(t, "new", string(fresh.Payload))
	select { // until a renewal found it missing, or restored it
	case <-old.Context().Done():
	case <-time.After(2 * minIdle):
	}
	old.Nack()
	fresh.Ack()
	assert.Equal(t, []string{"old"}, payloads(collect(messages, 1, patience)), "lost")
}

// remade recreates the group as somebody who does not know of its messages, and publishes another one.
func remade(t *testing.T, client *redis.Client, topic string) {
	t.Helper()
	_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
		p.XGroupDestroy(t.Context(), topic, testGroup)
		p.XGroupCreate(t.Context(), topic, testGroup, "$")
		p.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{goxstreams.UUIDHeaderKey, "new", "payload", "new"}})
		return nil
	})
	require.NoError(t, err)
}

// The same, and Close comes before a renewal: the group knows the consumer again, and so looked as if others had acked what is
// released.
func TestGroupRemade_ReadsOnThenCloses(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	config := grouped(newClient(t))
	config.MaxConcurrency, config.CloseTimeout = 4, patience
	config.Retry = &goxstreams.Retry{InitialInterval: time.Hour, MaxInterval: time.Hour}
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, admin, topic, "1", "2")
	for range 2 {
		next(t, messages).Nack()
	}
	eventually(t, func() bool { return stats(t, sub).Waiting == 2 })
	remade(t, admin, topic)
	fresh := next(t, messages)
	require.Equal(t, "new", string(fresh.Payload))
	fresh.Ack()
	require.NoError(t, sub.Close())
	left := payloads(collect(subscribe(t, newSubscriber(t, claiming(admin)), topic), 2, patience))
	require.ElementsMatch(t, []string{"1", "2"}, left, "lost")
}

// The same with a pause instead of Close.
func TestGroupRemade_ReadsOnThenPauses(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	sub := newSubscriber(t, grouped(newClient(t)))
	messages := subscribe(t, sub, topic)
	ids := readAhead(t, admin, topic, sub, messages, 1)
	const left = 3
	for range len(ids) - left {
		next(t, messages).Ack()
	}
	first := next(t, messages)
	eventually(t, func() bool { s := stats(t, sub); return s.InFlight == left && int(s.Acked) >= len(ids)-left })
	remade(t, admin, topic)
	eventually(t, func() bool { return stats(t, sub).InFlight == left+1 }, "nothing more is read ahead")
	pauseFor(t, admin, topic, sub)
	eventually(t, func() bool { return stats(t, sub).InFlight == 1 }, "what was read ahead is still in flight")
	first.Ack()
	require.NoError(t, goxstreams.Resume(t.Context(), admin, topic, testGroup))
	require.ElementsMatch(t, append(ids[len(ids)-left+1:], "new"), uuids(collect(messages, left, patience)), "lost")
}

// The same with a dead message whose move to the dead-letter stream has had no answer: it was not moved.
func TestGroupRemade_ReadsOnThenClosesWithAMove(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	var closing atomic.Bool
	tried := make(chan struct{}, 100)
	config := grouped(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if !isScript(cmd, "-- dead-letter") || closing.Load() {
			return next()
		}
		tried <- struct{}{}
		return io.ErrUnexpectedEOF
	}}))
	config.MaxConcurrency, config.CloseTimeout, config.Retry = 4, patience, &goxstreams.Retry{MaxRetries: -1}
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, admin, topic, "deadly")
	next(t, messages).Nack()
	<-tried
	remade(t, admin, topic)
	fresh := next(t, messages)
	require.Equal(t, "new", string(fresh.Payload))
	fresh.Ack()
	closing.Store(true)
	require.NoError(t, sub.Close())
	again := claiming(admin)
	again.Retry = config.Retry
	subscribe(t, newSubscriber(t, again), topic)
	eventually(t, func() bool { return len(deadOf(t, admin, topic)) == 1 }, "lost")
}

// A message that is acked while a lost group is repaired is not delivered again: the restore
// may arrive after the ack.
func TestGroupLost_AckDuringTheRepair(t *testing.T) {
	t.Parallel()
	admin, topic := newClient(t), topic(t)
	acked, restoring := make(chan struct{}, 10), make(chan struct{})
	var once atomic.Bool
	client := newClient(t, &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		if isScript(cmd, "-- restore") && once.CompareAndSwap(false, true) {
			close(restoring)
			<-acked
		}
		err := next()
		if strings.EqualFold(cmd.Name(), "xack") {
			acked <- struct{}{}
		}
		return err
	}})
	config := grouped(client)
	config.MaxConcurrency = 5
	publish(t, admin, topic, "1", "2", "3")
	messages := subscribe(t, newSubscriber(t, config), topic)
	var held []*message.Message
	for range 3 {
		held = append(held, next(t, messages))
	}
	require.NoError(t, admin.XGroupDestroy(t.Context(), topic, testGroup).Err())
	<-restoring
	for _, msg := range held {
		msg.Ack()
	}
	publish(t, admin, topic, "4")
	require.Equal(t, "4", string(next(t, messages).Payload))
	during(t, time.Second, func() bool { return len(pendingOf(t, admin, topic, testGroup)) <= 1 })
	require.Empty(t, collect(messages, 1, time.Second))
}

// While Close releases what was read ahead, the group is lost, and recreated by the renewal of
// the message that is in hand: the release finds nothing, and nobody else has it.
func TestClose_GroupLostMeanwhile(t *testing.T) {
	testserver.RequireReal(t)
	t.Parallel()
	admin, topic := newClient(t), topic(t)
	var once atomic.Bool
	released := make(chan struct{})
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if !isRelease(cmd) || !once.CompareAndSwap(false, true) {
			return next()
		}
		defer close(released)
		ctx := context.Background()
		assert.NoError(t, admin.XGroupDestroy(ctx, topic, testGroup).Err())
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if pending, err := admin.XPending(ctx, topic, testGroup).Result(); err == nil && pending.Count > 0 {
				break
			}
		}
		return next()
	}})
	config := claiming(client)
	config.CloseTimeout = 2 * patience // longer than the hook may wait
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	ids := readAhead(t, admin, topic, sub, messages, 1)
	first := next(t, messages)
	eventually(t, func() bool { return len(pendingOf(t, admin, topic, testGroup)) > 3 }, "nothing is read ahead")
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		_ = sub.Close()
	}()
	<-released
	first.Ack()
	<-closed
	left := uuids(collect(subscribe(t, newSubscriber(t, claiming(admin)), topic), len(ids)-1, patience))
	require.ElementsMatch(t, ids[1:], left)
}

// The subscriptions of a topic on one Subscriber are consumers of their own: when one of them
// has repaired a lost group, or reads from one that others have recreated, another one restores
// its messages all the same, even a single one that waits.
func TestGroupLost_SubscriptionsOfOneTopic(t *testing.T) {
	testserver.RequireReal(t)
	t.Parallel()
	for waiting := 1; waiting <= 2; waiting++ {
		t.Run(fmt.Sprint(waiting, " of 2 have one that waits"), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := claiming(client)
			config.Retry = &goxstreams.Retry{InitialInterval: 3 * minIdle, Multiplier: 1}
			sub := newSubscriber(t, config)
			outputs := []<-chan *message.Message{subscribe(t, sub, topic), subscribe(t, sub, topic)}
			ids := publishN(t, client, topic, 2)
			first, second := next(t, outputs[0]), next(t, outputs[1])
			first.Nack()
			if waiting == 1 {
				second.Ack()
				ids = uuids([]*message.Message{first})
			} else {
				second.Nack()
			}
			eventually(t, func() bool {
				all := sub.Stats()
				return all[0].Waiting+all[1].Waiting == waiting
			})
			_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
				p.XGroupDestroy(t.Context(), topic, testGroup)
				p.XGroupCreate(t.Context(), topic, testGroup, "$")
				return nil
			})
			require.NoError(t, err)
			ids = append(ids, publish(t, client, topic, "after")...)
			handled := newTally()
			for _, messages := range outputs {
				handled.handle(messages, nil)
			}
			eventually(t, func() bool { return handled.has(ids) }, "lost")
		})
	}
}

// Each subscription of a topic is a consumer of its own. A name that has nothing pending is
// used again, so that a topic that is subscribed to again shares a connection with others.
func TestConsumer_OneForEachSubscription(t *testing.T) {
	testserver.RequireReal(t)
	t.Parallel()
	client, topic := newClient(t), topic(t)
	sub := newSubscriber(t, grouped(client))
	names := func() (names []string) {
		consumers, err := client.XInfoConsumers(t.Context(), topic, testGroup).Result()
		require.NoError(t, err)
		for _, c := range consumers {
			names = append(names, c.Name)
		}
		return names
	}
	subscribe(t, sub, topic)
	first := names()
	require.Len(t, first, 1)
	ctx, cancel := context.WithCancel(t.Context())
	messages, err := sub.Subscribe(ctx, topic)
	require.NoError(t, err)
	want := []string{first[0], first[0] + "-2"}
	require.ElementsMatch(t, want, names())
	cancel()
	_, open := <-messages
	require.False(t, open)
	require.Equal(t, first, names())
	subscribe(t, sub, topic)
	require.ElementsMatch(t, want, names())
}
