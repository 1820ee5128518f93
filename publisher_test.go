package goxstreams_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// wire observes the bytes between clients and their server, below go-redis and its
// retries: a hook sees a command once, however often it is sent.
type wire struct {
	mu    sync.Mutex
	xadds int // XADD commands sent
	turns int // round trips with an XADD in them
	execs int // EXECs at the end of what was sent
	lose  bool
	gate  chan struct{}
	held  chan struct{} // closed when a reply waits at the gate
}

// loseAnswer breaks the connection when the reply to any further XADD arrives: by
// then the server has run the commands.
func (w *wire) loseAnswer(lose bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lose = lose
}

// hold holds back the reply to the next XADD. The first function waits until it has
// arrived, the second lets it pass.
func (w *wire) hold() (arrived, release func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	gate, held := make(chan struct{}), make(chan struct{})
	w.gate, w.held = gate, held
	return func() { <-held }, sync.OnceFunc(func() { close(gate) })
}

// sent returns the number of XADDs sent so far, and of their round trips.
func (w *wire) sent() (xadds, turns int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.xadds, w.turns
}

// executed reports whether an EXEC was sent since the last call.
func (w *wire) executed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.execs
	w.execs = 0
	return n > 0
}

func (w *wire) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &wireConn{turnConn: turnConn{Conn: conn}, w: w}, nil
}

type wireConn struct {
	turnConn
	w     *wire
	adds  bool // an XADD was sent, and its reply not read yet
	lose  bool
	lost  bool
	gate  chan struct{}
	arriv chan struct{}
}

// The commands' names as go-redis sends them.
var (
	xaddWord = []byte("\r\nxadd\r\n")
	execWord = []byte("\r\nexec\r\n")
)

func (c *wireConn) Write(b []byte) (int, error) {
	if bytes.HasSuffix(bytes.ToLower(b), execWord) {
		c.w.mu.Lock()
		c.w.execs++
		c.w.mu.Unlock()
	}
	if n := bytes.Count(b, xaddWord); n > 0 {
		c.w.mu.Lock()
		c.w.xadds += n
		if !c.adds {
			c.adds = true
			c.w.turns++
		}
		c.lose = c.w.lose
		c.gate, c.arriv = c.w.gate, c.w.held
		c.w.gate, c.w.held = nil, nil
		c.w.mu.Unlock()
	}
	return c.turnConn.Write(b)
}

func (c *wireConn) Read(b []byte) (int, error) {
	if c.lost {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.turnConn.Read(b)
	if !c.adds {
		return n, err
	}
	c.adds = false
	if c.gate != nil {
		close(c.arriv)
		<-c.gate
		c.gate = nil
	}
	if c.lose {
		c.lost = true
		c.readAll(b[:n])
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// wired returns a client of the shared server, and its wire.
func wired(t testing.TB, change func(*redis.Options)) (*redis.Client, *wire) {
	t.Helper()
	w := &wire{}
	opts := &redis.Options{Addr: testserver.Addr(t), Dialer: w.dial}
	if change != nil {
		change(opts)
	}
	client := redis.NewClient(opts)
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	return client, w
}

func messagesOf(payloads ...string) []*message.Message {
	msgs := make([]*message.Message, len(payloads))
	for i, p := range payloads {
		msgs[i] = message.NewMessage(watermill.NewUUID(), message.Payload(p))
	}
	return msgs
}

func numbered(n int) []*message.Message {
	msgs := make([]*message.Message, n)
	for i := range msgs {
		msgs[i] = message.NewMessage(watermill.NewUUID(), message.Payload(fmt.Sprint(i)))
	}
	return msgs
}

// stored returns the UUIDs in the stream, in order.
func stored(t testing.TB, client redis.UniversalClient, topic string) []string {
	t.Helper()
	entries, err := client.XRange(context.Background(), topic, "-", "+").Result()
	require.NoError(t, err)
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		ids = append(ids, e.Values[goxstreams.UUIDHeaderKey].(string))
	}
	return ids
}

// protocols runs a test with both protocols; the errors within EXEC's reply are
// parsed in both.
func protocols(t *testing.T, test func(t *testing.T, protocol int)) {
	for _, p := range []int{2, 3} {
		t.Run(fmt.Sprintf("RESP%d", p), func(t *testing.T) { test(t, p) })
	}
}

// A call is one transaction in one round trip, whatever its size, and its order
// is the stream's.
func TestPublish_OneRoundTripInOrder(t *testing.T) {
	protocols(t, func(t *testing.T, protocol int) {
		client, w := wired(t, func(o *redis.Options) { o.Protocol = protocol })
		pub := newPublisher(t, client)
		// The Publisher's first call with several messages checks once whether
		// MULTI is allowed. No XADD is part of that.
		for _, n := range []int{1, 2, 100, 5000} {
			topic := topic(t)
			msgs := numbered(n)
			if n > 1 {
				require.NoError(t, pub.Publish(topic+"-before", numbered(2)...))
			}
			w.executed()
			adds, turns := w.sent()
			require.NoError(t, pub.Publish(topic, msgs...))
			addsNow, turnsNow := w.sent()
			require.Equal(t, n, addsNow-adds)
			require.Equal(t, 1, turnsNow-turns, "round trips for %d messages", n)
			require.Equal(t, n > 1, w.executed(), "a transaction")
			require.Equal(t, uuids(msgs), stored(t, client, topic))
		}
	})
}

func TestPublish_EmptyCallDoesNothing(t *testing.T) {
	t.Parallel()
	h, counts := countCommands()
	pub := newPublisher(t, newClient(t, h))
	require.NoError(t, pub.Publish(topic(t)))
	require.NoError(t, pub.Publish(topic(t), []*message.Message{}...))
	require.Empty(t, counts.n)
}

// failingMarshaler rejects the payload "bad", and panics on "worse".
type failingMarshaler struct{ goxstreams.DefaultMarshaler }

var errMarshal = errors.New("cannot marshal this")

func (m failingMarshaler) Marshal(topic string, msg *message.Message) (map[string]any, error) {
	switch string(msg.Payload) {
	case "bad":
		return nil, errMarshal
	case "worse":
		panic("cannot marshal this at all")
	case "unwritable": // go-redis finds out in the middle of a pipeline
		return map[string]any{"payload": struct{}{}}, nil
	}
	return m.DefaultMarshaler.Marshal(topic, msg)
}

// The last message of a call cannot be marshaled: none of it is stored, and the
// error names that message.
func TestPublish_MarshalErrorStoresNothing(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: failingMarshaler{}}, nil)
	require.NoError(t, err)

	msgs := messagesOf("good", "good", "bad")
	err = pub.Publish(topic, msgs...)
	require.ErrorIs(t, err, errMarshal)
	require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
	require.ErrorContains(t, err, topic)
	require.ErrorContains(t, err, msgs[2].UUID)

	require.Error(t, pub.Publish(topic, messagesOf("good", "unwritable")...))
	require.Error(t, pub.Publish(topic, messagesOf("good")[0], nil))
	require.Error(t, pub.Publish("", messagesOf("good")...))
	require.Panics(t, func() { _ = pub.Publish(topic, messagesOf("good", "worse")...) })
	require.Empty(t, stored(t, client, topic))

	require.NoError(t, pub.Publish(topic, messagesOf("good")...), "the Publisher goes on after a Marshaler's panic")
	require.NoError(t, pub.Close(), "and holds no lock")
}

// The connection breaks when the server has run the call, before its reply arrives.
// go-redis resends such a command up to three times, and each copy is stored [as
// with watermill-redisstream]. Here the caller learns that the outcome is unknown,
// and each message is stored once.
func TestPublish_LostAnswer(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 2, 100} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			client, w := wired(t, nil)
			topic := topic(t)
			pub := newPublisher(t, client)
			require.NoError(t, pub.Publish(topic, numbered(2)...))
			w.loseAnswer(true)
			err := pub.Publish(topic, numbered(n)...)
			require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
			require.ErrorIs(t, err, io.ErrUnexpectedEOF, "the cause is there too")
			xadds, _ := w.sent()
			require.Equal(t, 2+n, xadds, "sent twice")
			require.Len(t, stored(t, newClient(t), topic), 2+n, "stored")

			w.loseAnswer(false)
			require.NoError(t, pub.Publish(topic, numbered(n)...), "the next call works")
		})
	}
}

// The same on a Cluster, whose client resends in its own way.
func TestPublish_LostAnswerOnCluster(t *testing.T) {
	t.Parallel()
	client, w := clusterOfOne(t)
	for _, n := range []int{1, 2, 100} {
		topic := topic(t)
		pub := newPublisher(t, client)
		require.NoError(t, pub.Publish(topic, numbered(2)...))
		before, _ := w.sent()
		w.loseAnswer(true)
		err := pub.Publish(topic, numbered(n)...)
		w.loseAnswer(false)
		require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		xadds, _ := w.sent()
		require.Equal(t, n, xadds-before, "sent twice")
		require.Len(t, stored(t, client, topic), 2+n, "stored")
	}
}

// clusterOfOne returns a client of a Cluster with one node, and its wire.
func clusterOfOne(t *testing.T) (*redis.ClusterClient, *wire) {
	t.Helper()
	server := testserver.Private(t, "--cluster-enabled", "yes")
	require.NoError(t, server.Client().ClusterAddSlotsRange(t.Context(), 0, 16383).Err())
	w := &wire{}
	client := redis.NewClusterClient(&redis.ClusterOptions{
		Addrs: []string{server.Addr()},
		// A container's node does not know the address at which it is reached.
		Dialer: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return w.dial(ctx, network, server.Addr())
		},
	})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	eventually(t, func() bool {
		info, err := client.ClusterInfo(t.Context()).Result()
		return err == nil && strings.Contains(info, "cluster_state:ok")
	}, "the Cluster is not up")
	return client, w
}

// On a Cluster a call is its own transaction; the guarantees are the same.
func TestPublish_Cluster(t *testing.T) {
	t.Parallel()
	client, w := clusterOfOne(t)
	pub := newPublisher(t, client)
	topic := topic(t)
	msgs := numbered(100)
	w.executed()
	require.NoError(t, pub.Publish(topic, msgs...))
	require.True(t, w.executed(), "a transaction")
	xadds, turns := w.sent()
	require.Equal(t, 100, xadds)
	require.Equal(t, 1, turns)
	require.Equal(t, uuids(msgs), stored(t, client, topic))

	wrong := topic + "-string"
	require.NoError(t, client.Set(t.Context(), wrong, "x", 0).Err())
	for _, n := range []int{1, 3} {
		err := pub.Publish(wrong, numbered(n)...)
		requireRefused(t, err, "WRONGTYPE")
	}
}

// A server that hangs receives the command and runs it when it continues; the
// client has given up by then.
func TestPublish_TimeoutIsOutcomeUnknown(t *testing.T) {
	t.Parallel()
	server := testserver.Private(t)
	for _, n := range []int{1, 3} {
		w := &wire{}
		client := redis.NewClient(&redis.Options{Addr: server.Addr(), Dialer: w.dial, ReadTimeout: 2 * time.Second})
		t.Cleanup(func() { require.NoError(t, client.Close()) })
		topic := topic(t)
		pub := newPublisher(t, client)
		// Connect first: a client that waits for the reply to HELLO has sent
		// nothing. (go-redis has a separate pool for pipelines.)
		require.NoError(t, pub.Publish(topic, numbered(1)...))
		require.NoError(t, pub.Publish(topic, numbered(2)...))
		server.Freeze()
		err := pub.Publish(topic, numbered(n)...)
		server.Thaw()
		require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		xadds, _ := w.sent()
		require.Equal(t, 3+n, xadds, "sent twice")
		eventually(t, func() bool { return len(stored(t, server.Client(), topic)) == 3+n }, "it was run late, once")
	}
}

// requireRefused requires an error with the server's reply, and that nothing is
// stored.
func requireRefused(t testing.TB, err error, code string) {
	t.Helper()
	require.ErrorContains(t, err, code)
	require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
	var reply redis.Error
	require.ErrorAs(t, err, &reply)
}

// A call that never reached the server is not an unknown outcome: it may be sent
// again.
func TestPublish_NeverSent(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	nobody := l.Addr().String()
	require.NoError(t, l.Close())

	clients := map[string]*redis.Client{
		"nobody listens": redis.NewClient(&redis.Options{Addr: nobody, DialerRetries: 1}),
		"closed client":  redis.NewClient(&redis.Options{Addr: testserver.Addr(t)}),
		"full pool":      redis.NewClient(&redis.Options{Addr: testserver.Addr(t), PoolSize: 1, PoolTimeout: 10 * time.Millisecond}),
	}
	require.NoError(t, clients["closed client"].Close())
	busy := clients["full pool"].Conn()
	require.NoError(t, busy.Ping(t.Context()).Err())
	for name, client := range clients {
		t.Run(name, func(t *testing.T) {
			pub := newPublisher(t, client)
			topic := topic(t)
			for _, n := range []int{1, 3} {
				if n > 1 && client == clients["full pool"] {
					continue // go-redis has another pool for pipelines
				}
				err := pub.Publish(topic, numbered(n)...)
				require.Error(t, err)
				require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
			}
			require.Empty(t, stored(t, newClient(t), topic))
		})
	}
	require.NoError(t, busy.Close())
	require.NoError(t, clients["nobody listens"].Close())
	require.NoError(t, clients["full pool"].Close())
}

func TestPublish_WrongTypeStoresNothing(t *testing.T) {
	protocols(t, func(t *testing.T, protocol int) {
		client, _ := wired(t, func(o *redis.Options) { o.Protocol = protocol })
		topic := topic(t)
		require.NoError(t, client.Set(t.Context(), topic, "a string", 0).Err())
		pub := newPublisher(t, client)
		for _, n := range []int{1, 3} {
			requireRefused(t, pub.Publish(topic, numbered(n)...), "WRONGTYPE")
		}
		require.Equal(t, "a string", client.Get(t.Context(), topic).Val())
	})
}

func TestPublish_OutOfMemoryStoresNothing(t *testing.T) {
	t.Parallel()
	client := testserver.Private(t).Client()
	topic := topic(t)
	pub := newPublisher(t, client)
	require.NoError(t, pub.Publish(topic, numbered(2)...))
	require.NoError(t, client.ConfigSet(t.Context(), "maxmemory", "1").Err())
	for _, n := range []int{1, 3} {
		requireRefused(t, pub.Publish(topic, numbered(n)...), "OOM")
	}
	require.Len(t, stored(t, client, topic), 2)
	require.NoError(t, client.ConfigSet(t.Context(), "maxmemory", "0").Err())
	require.NoError(t, pub.Publish(topic, numbered(3)...))
	require.Len(t, stored(t, client, topic), 5)
}

// If MULTI is denied, the remaining commands of a pipeline still run, one by one,
// and go-redis reports that permission was denied: an error, although everything is
// stored. If only EXEC is denied, the connection would stay in the transaction, and
// swallow the commands of its next user.
func TestPublish_DeniedStoresNothing(t *testing.T) {
	t.Parallel()
	server := testserver.Private(t)
	admin := server.Client()
	for _, tt := range []struct {
		user   string
		rights []string
		one    bool // a single message can be published
	}{
		{"nothing", []string{"-@all"}, false},
		{"no-multi", []string{"+xadd"}, true},
		{"no-multi-but-exec", []string{"+xadd", "+exec"}, true},
		{"no-exec", []string{"+xadd", "+multi"}, true},
		{"no-xadd", []string{"+multi", "+exec"}, false},
		{"other-keys", []string{"+xadd", "+multi", "+exec", "resetkeys", "~other:*"}, false},
	} {
		t.Run(tt.user, func(t *testing.T) {
			rules := append([]string{"on", ">secret", "~*"}, tt.rights...)
			require.NoError(t, admin.ACLSetUser(t.Context(), tt.user, rules...).Err())
			client := redis.NewClient(&redis.Options{Addr: server.Addr(), Username: tt.user, Password: "secret", PoolSize: 1})
			t.Cleanup(func() { require.NoError(t, client.Close()) })
			pub := newPublisher(t, client)
			topic := topic(t)
			for range 3 {
				requireRefused(t, pub.Publish(topic, numbered(3)...), "NOPERM")
				require.Empty(t, stored(t, admin, topic))
			}
			err := pub.Publish(topic, numbered(1)...)
			if tt.one {
				require.NoError(t, err)
				require.Len(t, stored(t, admin, topic), 1)
			} else {
				requireRefused(t, err, "NOPERM")
				require.Empty(t, stored(t, admin, topic))
			}
		})
	}
}

// permittedMulti returns a Publisher that has checked that MULTI is permitted to its user, producer.
func permittedMulti(t *testing.T) (pub *goxstreams.Publisher, admin *redis.Client, name string) {
	t.Helper()
	server := testserver.Private(t)
	admin = server.Client()
	require.NoError(t, admin.ACLSetUser(t.Context(), "producer", "on", ">secret", "~*", "+xadd", "+multi", "+exec").Err())
	client := redis.NewClient(&redis.Options{Addr: server.Addr(), Username: "producer", Password: "secret"})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	pub, name = newPublisher(t, client), topic(t)
	require.NoError(t, pub.Publish(name, numbered(2)...))
	return pub, admin, name
}

// The permission for MULTI is revoked after the Publisher has checked it. The
// messages then run one by one. Their replies show whether all were stored, which
// is success; an error would mean that none was.
func TestPublish_MultiDeniedLater(t *testing.T) {
	t.Parallel()
	pub, admin, topic := permittedMulti(t)
	for _, right := range []string{"multi", "exec"} {
		require.NoError(t, admin.ACLSetUser(t.Context(), "producer", "+multi", "+exec", "-"+right).Err())
		for round := range 20 {
			var wg sync.WaitGroup
			for n := 1; n <= 3; n++ { // some of them share pipelines
				wg.Go(func() {
					topic := fmt.Sprint(topic, right, round, n)
					err := pub.Publish(topic, numbered(n)...)
					got := len(stored(t, admin, topic))
					if err == nil && got != n || err != nil && (got != 0 || errors.Is(err, goxstreams.ErrOutcomeUnknown)) {
						t.Errorf("-%s, %d messages: %d are stored, and Publish returned %v", right, n, got, err)
					}
				})
			}
			wg.Wait()
		}
	}
}

// The first call after MULTI was revoked stored its messages one by one, and so did all later
// ones, since the Publisher did not check again after a success.
func TestPublish_MultiDeniedForGood(t *testing.T) {
	t.Parallel()
	pub, admin, topic := permittedMulti(t)
	require.NoError(t, admin.ACLSetUser(t.Context(), "producer", "-multi").Err())
	require.NoError(t, pub.Publish(topic, numbered(2)...), "one by one")
	for range 2 {
		require.ErrorContains(t, pub.Publish(topic, numbered(2)...), "need permission for MULTI and EXEC")
	}
	require.Len(t, stored(t, admin, topic), 4)
	require.NoError(t, admin.ACLSetUser(t.Context(), "producer", "+multi").Err())
	require.NoError(t, pub.Publish(topic, numbered(2)...), "permitted again")
	require.Len(t, stored(t, admin, topic), 6)
}

// Calls that arrive while a pipeline is in flight share the next one: each of them
// is stored as one piece, in its order, and one that the server rejects does not
// affect the others.
func TestPublish_ConcurrentCallsShareRoundTrips(t *testing.T) {
	protocols(t, func(t *testing.T, protocol int) {
		client, w := wired(t, func(o *redis.Options) { o.Protocol = protocol })
		shared, wrong := topic(t), topic(t)
		require.NoError(t, client.Set(t.Context(), wrong, "a string", 0).Err())
		const calls = 60
		ready := make(chan struct{}, 2*calls)
		pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: signalMarshaler{ready: ready}}, nil)
		require.NoError(t, err)
		require.NoError(t, pub.Publish(topic(t), numbered(2)...)) // checks MULTI
		<-ready

		arrived, release := w.hold()
		defer release()
		var wg sync.WaitGroup
		wg.Go(func() { require.NoError(t, pub.Publish(shared, messagesOf("first")...)) })
		arrived()
		<-ready
		_, turns := w.sent()
		sent := make([][]*message.Message, calls)
		for i := range calls {
			sent[i] = numbered(1 + i%4)
			wg.Go(func() {
				if i%10 == 9 {
					err := pub.Publish(wrong, sent[i]...)
					if err == nil || !strings.Contains(err.Error(), "WRONGTYPE") || errors.Is(err, goxstreams.ErrOutcomeUnknown) {
						t.Errorf("call %d to a string: %v", i, err)
					}
				} else if err := pub.Publish(shared, sent[i]...); err != nil {
					t.Errorf("call %d: %v", i, err)
				}
			})
		}
		for range calls {
			<-ready
		}
		release()
		wg.Wait()

		// All went in one pipeline, except calls that were not queued yet when the
		// reply arrived, of which there are a few on a busy machine.
		_, turnsNow := w.sent()
		require.LessOrEqual(t, turnsNow-turns, calls/4, "round trips of %d calls", calls)
		got := strings.Join(stored(t, client, shared), " ")
		n := 1
		for i, msgs := range sent {
			if i%10 != 9 {
				require.Contains(t, got, strings.Join(uuids(msgs), " "), "call %d is not there in one piece", i)
				n += len(msgs)
			}
		}
		require.Len(t, strings.Fields(got), n)
	})
}

// signalMarshaler signals that a call has started: it is about to queue.
type signalMarshaler struct {
	goxstreams.DefaultMarshaler
	ready chan struct{}
}

func (m signalMarshaler) Marshal(topic string, msg *message.Message) (map[string]any, error) {
	if string(msg.Payload) == "0" || string(msg.Payload) == "first" {
		m.ready <- struct{}{}
	}
	return m.DefaultMarshaler.Marshal(topic, msg)
}

// The connection breaks under calls that share it: each of them returns an error,
// and nothing is stored twice.
func TestPublish_LostAnswerOfSharedPipeline(t *testing.T) {
	t.Parallel()
	client, w := wired(t, nil)
	topic := topic(t)
	const calls = 40
	ready := make(chan struct{}, 2*calls)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: signalMarshaler{ready: ready}}, nil)
	require.NoError(t, err)
	require.NoError(t, pub.Publish(topic, numbered(2)...))
	<-ready
	arrived, release := w.hold()
	defer release()
	var wg sync.WaitGroup
	wg.Go(func() { require.NoError(t, pub.Publish(topic, messagesOf("first")...)) })
	arrived()
	<-ready
	w.loseAnswer(true)
	want := 3
	for i := range calls {
		msgs := numbered(1 + i%3)
		want += len(msgs)
		wg.Go(func() {
			if err := pub.Publish(topic, msgs...); !errors.Is(err, goxstreams.ErrOutcomeUnknown) {
				t.Errorf("call %d: %v", i, err)
			}
		})
	}
	for range calls {
		<-ready
	}
	release()
	wg.Wait()
	xadds, _ := w.sent()
	require.Equal(t, want, xadds)
	require.Len(t, stored(t, newClient(t), topic), want)
}

// Watermill's Timeout middleware leaves ended contexts on messages that it passed
// on. They are published nevertheless.
func TestPublish_ContextThatHasEnded(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, n := range []int{1, 3} {
		msgs := numbered(n)
		for _, msg := range msgs {
			msg.SetContext(ctx)
		}
		require.NoError(t, newPublisher(t, client).Publish(topic, msgs...))
	}
	require.Len(t, stored(t, client, topic), 4)
}

// Watermill's router closes a handler's publisher when that handler ends, even if
// other handlers share it. Close waits for the calls in flight, and leaves client
// and Publisher usable.
func TestPublisher_Close(t *testing.T) {
	t.Parallel()
	client, w := wired(t, nil)
	topic := topic(t)
	pub := newPublisher(t, client)
	require.NoError(t, pub.Close())
	require.NoError(t, pub.Close())
	require.NoError(t, pub.Publish(topic, numbered(3)...))

	arrived, release := w.hold()
	defer release()
	published := make(chan error, 1)
	go func() { published <- pub.Publish(topic, numbered(3)...) }()
	arrived()
	var released atomic.Bool
	closed := make(chan bool)
	go func() {
		if err := pub.Close(); err != nil {
			t.Error(err)
		}
		closed <- released.Load()
	}()
	select {
	case <-closed:
		t.Fatal("Close did not wait for the call under way")
	case <-time.After(100 * time.Millisecond): // one that does not wait takes microseconds
	}
	released.Store(true)
	release()
	require.True(t, <-closed)
	require.NoError(t, <-published)
	require.NoError(t, client.Ping(t.Context()).Err(), "the client stays open")
	require.NoError(t, pub.Publish(topic, numbered(3)...))
	require.Len(t, stored(t, client, topic), 9)
}

// The limit is approximate: Redis removes whole nodes of its tree, of 100 entries
// by default, and never trims below the limit.
func TestPublisher_MaxLens(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	byName, unbounded, byDefault := topic(t), topic(t), topic(t)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{
		Client: client, DefaultMaxLen: 500, MaxLens: map[string]int64{byName: 200, unbounded: 0},
	}, nil)
	require.NoError(t, err)
	for _, topic := range []string{byName, unbounded, byDefault} {
		for range 10 {
			require.NoError(t, pub.Publish(topic, numbered(100)...))
		}
	}
	for topic, want := range map[string][2]int{byName: {200, 300}, byDefault: {500, 600}, unbounded: {1000, 1000}} {
		n := len(stored(t, client, topic))
		require.GreaterOrEqual(t, n, want[0])
		require.LessOrEqual(t, n, want[1])
	}
}

func TestPublisher_Names(t *testing.T) {
	t.Parallel()
	require.Equal(t, "goxstreams.Publisher", fmt.Sprint(newPublisher(t, newClient(t))))
	require.Equal(t, "goxstreams.Subscriber", fmt.Sprint(newSubscriber(t, goxstreams.SubscriberConfig{})))
}
