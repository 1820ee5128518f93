package poll

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/pipeline"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

func TestMain(m *testing.M) { testserver.Main(m) }

// member takes entries while it has room.
type member struct {
	mu      sync.Mutex
	room    int
	got     []string
	orphans []string
}

func (m *member) Room() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.room
}

func (m *member) Take(b Batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.room -= len(b.Entries)
	for _, e := range b.Entries {
		m.got = append(m.got, e.ID)
	}
}

func (m *member) Orphans(rows []xstream.Pending) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range rows {
		if !slices.Contains(m.got, r.ID) {
			m.orphans = append(m.orphans, r.ID)
		}
	}
}

func (m *member) Reading() {}

func (m *member) found() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.orphans)
}

func (m *member) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.got)
}

func newPoller(t *testing.T, group string) (*Poller, *redis.Client) {
	t.Helper()
	testserver.RequireReal(t)
	client := testserver.Client(t)
	c := redisx.Client{UniversalClient: client}
	return New(Config{
		Client: c, Pipeline: pipeline.New(c, 2), Group: group, Block: 10 * time.Second, Batch: 100, Unwakable: func() {},
	}), client
}

func eventually(t *testing.T, condition func() bool, what string, args ...any) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		require.True(t, time.Now().Before(deadline), what, args)
	}
}

// serve serves the seat until t ends, or the result is called.
func serve(t *testing.T, s *Seat) (leave func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	leave = sync.OnceFunc(func() {
		s.Leave()
		select {
		case err := <-done:
			assert.NoError(t, err)
		case <-time.After(30 * time.Second):
			assert.Fail(t, "the seat is not left")
		}
	})
	t.Cleanup(leave)
	return leave
}

// Subscriptions of one topic share its connection: in a group each is a consumer, and each
// entry goes to one of them; in a fan-out it goes to each of them, including one that has
// fallen behind and has room again.
func TestPoller_OneTopic(t *testing.T) {
	for _, group := range []string{"group", ""} {
		t.Run("group "+group, func(t *testing.T) {
			p, client := newPoller(t, group)
			key := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
			stream := xstream.New(p.cfg.Client, key, group)
			if group != "" {
				err := stream.CreateGroup(t.Context(), "0", time.Minute)
				require.NoError(t, err)
			}
			const n = 20
			members := make([]*member, n)
			var seats []*Seat
			var leaves []func()
			for i := range members {
				members[i] = &member{room: 1000}
				if i == 0 {
					members[i].room = 1 // it falls behind
				}
				seat := p.NewSeat(key, fmt.Sprint("consumer", i), ">", members[i])
				if group == "" {
					seat = p.NewSeat(key, "", "0-0", members[i])
				}
				seats, leaves = append(seats, seat), append(leaves, serve(t, seat))
			}
			for i := range 3 * n {
				require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: key, Values: []any{"i", i}}).Err())
			}
			want := 3 * n
			if group == "" {
				want = 3*n*(n-1) + 1
			}
			total := func() int {
				sum := 0
				for _, m := range members {
					sum += m.count()
				}
				return sum
			}
			eventually(t, func() bool { return total() == want }, "entries are missing")
			if group == "" {
				members[0].mu.Lock()
				members[0].room = 1000
				members[0].mu.Unlock()
				seats[0].Wake()
				eventually(t, func() bool { return members[0].count() == 3*n }, "what fell behind does not catch up")
				require.True(t, slices.IsSortedFunc(members[0].got, xstream.CompareIDs))
			}
			p.mu.Lock()
			require.Len(t, p.groups[""].conns, 1)
			p.mu.Unlock()
			for _, leave := range leaves {
				leave()
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			require.Empty(t, p.topics)
			require.Empty(t, p.groups)
		})
	}
}

// Many topics share few connections, and one with a backlog moves to another
// connection and back.
func TestPoller_ManyTopics(t *testing.T) {
	p, client := newPoller(t, "group")
	base := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
	const n, backlog = 30, 5000
	members := make([]*member, n)
	for i := range members {
		key := fmt.Sprint(base, i)
		stream := xstream.New(p.cfg.Client, key, "group")
		err := stream.CreateGroup(t.Context(), "0", time.Minute)
		require.NoError(t, err)
		members[i] = &member{room: 2 * backlog}
		serve(t, p.NewSeat(key, "consumer", ">", members[i]))
	}
	pipe := client.Pipeline()
	for i := range backlog {
		pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: base + "0", Values: []any{"i", i}})
	}
	_, err := pipe.Exec(t.Context())
	require.NoError(t, err)
	for i := range members[1:] {
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: fmt.Sprint(base, i+1), Values: []any{"a", "b"}}).Err())
	}
	eventually(t, func() bool { return members[0].count() == backlog }, "the backlog is not worked off")
	for i := range members[1:] {
		eventually(t, func() bool { return members[i+1].count() == 1 }, "an entry is missing")
	}
	p.mu.Lock()
	g := p.groups[""]
	require.Len(t, g.conns, maxConns)
	require.NotNil(t, g.bulk, "the backlog was read among the others")
	p.mu.Unlock()
	eventually(t, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(g.bulk.topics) == 0
	}, "it does not come back")
}

// A read without an answer has taken entries: they are found before the next one,
// except those that the member has.
func TestPoller_Orphans(t *testing.T) {
	p, client := newPoller(t, "group")
	key := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
	stream := xstream.New(p.cfg.Client, key, "group")
	err := stream.CreateGroup(t.Context(), "0", time.Minute)
	require.NoError(t, err)
	m := &member{room: 10}
	seat := p.NewSeat(key, "consumer", ">", m)
	serve(t, seat)
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: "1-1", Values: []any{"a", "b"}}).Err())
	eventually(t, func() bool { return m.count() == 1 }, "nothing came")
	require.NoError(t, client.XGroupCreateConsumer(t.Context(), key, "group", "thief").Err())
	for _, id := range []string{"2-1", "3-1"} { // read as our consumer, unknown to the poller
		pipe := client.TxPipeline()
		pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: id, Values: []any{"a", "b"}})
		pipe.XReadGroup(t.Context(), &redis.XReadGroupArgs{Group: "group", Consumer: "consumer", Streams: []string{key, ">"}, Count: 1})
		_, err := pipe.Exec(t.Context())
		require.NoError(t, err)
	}
	seat.Unsure()
	eventually(t, func() bool { return slices.Equal(m.found(), []string{"2-1", "3-1"}) }, "not the orphans, or another one too")
}

// Several subscriptions of a topic have lost an answer: none waits until another one's read
// has ended.
func TestPoller_OrphansOfSeveral(t *testing.T) {
	testserver.RequireReal(t)
	client := testserver.Client(t)
	c := redisx.Client{UniversalClient: client}
	p := New(Config{Client: c, Pipeline: pipeline.New(c, 2), Group: "group", Block: time.Minute, Batch: 10, Unwakable: func() {}})
	key := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
	require.NoError(t, client.XGroupCreateMkStream(t.Context(), key, "group", "0").Err())
	const n = 5
	var members []*member
	var seats []*Seat
	for i := range n {
		consumer := fmt.Sprint("consumer", i)
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: fmt.Sprint(i+1, "-1"), Values: []any{"a", "b"}}).Err())
		require.NoError(t, client.XReadGroup(t.Context(), &redis.XReadGroupArgs{
			Group: "group", Consumer: consumer, Streams: []string{key, ">"}, Count: 1, Block: -1,
		}).Err())
		m := &member{room: 10}
		members = append(members, m)
		seats = append(seats, p.NewSeat(key, consumer, ">", m))
		seats[i].Unsure()
	}
	for _, seat := range seats {
		serve(t, seat)
	}
	for i, m := range members {
		eventually(t, func() bool { return slices.Equal(m.found(), []string{fmt.Sprint(i+1, "-1")}) }, "not its orphan", m.found())
	}
}

// A server that does not answer does not delay a seat that is abandoned.
func TestSeat_Abandon(t *testing.T) {
	server := testserver.Private(t)
	client := server.Client()
	c := redisx.Client{UniversalClient: client}
	p := New(Config{Client: c, Pipeline: pipeline.New(c, 2), Group: "group", Block: time.Minute, Batch: 10, Unwakable: func() {}})
	stream := xstream.New(c, "key", "group")
	err := stream.CreateGroup(context.Background(), "0", time.Minute)
	require.NoError(t, err)
	m := &member{room: 10}
	seat := p.NewSeat("key", "consumer", ">", m)
	done := make(chan error, 1)
	go func() { done <- seat.Serve() }()
	require.NoError(t, client.XAdd(context.Background(), &redis.XAddArgs{Stream: "key", Values: []any{"a", "b"}}).Err())
	eventually(t, func() bool { return m.count() == 1 }, "nothing came")
	server.Freeze()
	defer server.Thaw()
	seat.Leave()
	seat.Abandon()
	select {
	case err := <-done:
		require.NoError(t, err)
	case <-time.After(30 * time.Second):
		require.FailNow(t, "Serve does not end")
	}
}

// Fan-outs that have read different entries, the last of which are deleted, wait
// for the next one in a blocking read, from the position of the one that is
// furthest behind.
func TestPoller_SeatsAtDifferentPlaces(t *testing.T) {
	server := testserver.Private(t)
	client := server.Client()
	c := redisx.Client{UniversalClient: client}
	p := New(Config{Client: c, Pipeline: pipeline.New(c, 2), Block: 10 * time.Second, Batch: 10, Unwakable: func() {}})
	add := func(id string) {
		t.Helper()
		require.NoError(t, client.XAdd(context.Background(), &redis.XAddArgs{Stream: "key", ID: id, Values: []any{"a", "b"}}).Err())
	}
	reads := func() (n int64) {
		stats, err := client.InfoMap(context.Background(), "commandstats").Result()
		require.NoError(t, err)
		_, _ = fmt.Sscanf(stats["Commandstats"]["cmdstat_xread"], "calls=%d,", &n)
		return n
	}
	add("9-0")
	var members []*member
	for _, after := range []string{"5-0", "9-0", "7-0", "5-0"} {
		m := &member{room: 10}
		members = append(members, m)
		seat := p.NewSeat("key", "", after, m)
		serve(t, seat)
	}
	require.NoError(t, client.XDel(context.Background(), "key", "9-0").Err())
	eventually(t, func() bool { // once it has read the entries
		before := reads()
		time.Sleep(500 * time.Millisecond)
		return reads()-before < 20
	}, "it does not rest without an entry")
	for round := range 3 {
		add(fmt.Sprintf("1%d-0", round))
		for _, m := range members {
			eventually(t, func() bool {
				m.mu.Lock()
				defer m.mu.Unlock()
				return slices.Contains(m.got, fmt.Sprintf("1%d-0", round))
			}, "an entry is passed over")
		}
	}
	for _, m := range members {
		m.mu.Lock()
		got := slices.DeleteFunc(slices.Clone(m.got), func(id string) bool { return id == "9-0" })
		m.mu.Unlock()
		require.Equal(t, []string{"10-0", "11-0", "12-0"}, got)
	}
}

// The read of a connection that broke may go on at the server. A seat that joins later looks
// for what it took.
func TestPoller_OrphansOfAnEarlierSeat(t *testing.T) {
	p, client := newPoller(t, "group")
	key := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
	stream := xstream.New(p.cfg.Client, key, "group")
	err := stream.CreateGroup(t.Context(), "0", time.Minute)
	require.NoError(t, err)
	gone, comes := &member{room: 1}, &member{room: 1}
	seat := p.NewSeat(key, "consumer", ">", gone)
	done := make(chan error, 1)
	go func() { done <- seat.Serve() }()
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: "1-1", Values: []any{"a", "b"}}).Err())
	eventually(t, func() bool { return gone.count() == 1 }, "nothing came")
	gone.mu.Lock()
	gone.room = 1
	gone.mu.Unlock()
	seat.Wake()
	eventually(t, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.topics[seat.key].conn.busy
	}, "it does not read on")
	p.mu.Lock()
	bconn := p.topics[seat.key].conn.bconn
	p.mu.Unlock()
	bconn.Close()
	require.Error(t, <-done)
	serve(t, p.NewSeat(key, "consumer", ">", comes))
	eventually(t, func() bool { return slices.Equal(comes.found(), []string{"1-1"}) }, "it does not look")
}

// A seat that is abandoned while its connection is opened gets nothing, and nothing
// is read for it, though the connection is opened for others too.
func TestSeat_AbandonWhileConnecting(t *testing.T) {
	testserver.RequireReal(t)
	admin := testserver.Client(t)
	dialing, dial := make(chan struct{}), make(chan struct{})
	asks := sync.OnceFunc(func() { close(dialing) })
	options := *admin.Options()
	options.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		asks()
		<-dial
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}
	client := redis.NewClient(&options)
	t.Cleanup(func() { _ = client.Close() }) // after the seats have left
	c := redisx.Client{UniversalClient: client}
	p := New(Config{Client: c, Pipeline: pipeline.New(c, 2), Group: "group", Block: time.Minute, Batch: 10, Unwakable: func() {}})
	var seats []*Seat
	var members []*member
	for i := range 1 + maxConns {
		key := fmt.Sprint(t.Name(), i, "-", time.Now().UnixNano())
		require.NoError(t, admin.XGroupCreateMkStream(t.Context(), key, "group", "0").Err())
		require.NoError(t, admin.XAdd(t.Context(), &redis.XAddArgs{Stream: key, Values: []any{"a", "b"}}).Err())
		m := &member{room: 10}
		members = append(members, m)
		seats = append(seats, p.NewSeat(key, "consumer", ">", m))
	}
	done := make(chan error, 1)
	go func() { done <- seats[0].Serve() }()
	<-dialing
	for i, seat := range seats[1:] {
		serve(t, seat)
		eventually(t, func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.topics) == i+2
		}, "the seat is not there")
	}
	p.mu.Lock()
	shared := p.topics[seats[0].key].conn == p.topics[seats[maxConns].key].conn
	p.mu.Unlock()
	require.True(t, shared)
	seats[0].Abandon()
	require.NoError(t, <-done)
	close(dial)
	eventually(t, func() bool { return members[maxConns].count() == 1 }, "the others wait")
	pending, err := admin.XPending(t.Context(), seats[0].key, "group").Result()
	require.NoError(t, err)
	require.Zero(t, pending.Count)
}

// A connection that fails twice, since it reads its parts one by one after an error reply, gives up
// what it serves; but not a seat that it gave up the first time, and that another one serves now.
func TestConn_DismissesOnlyItsOwn(t *testing.T) {
	p := New(Config{Group: "group", Unwakable: func() {}})
	c, other := &conn{p: p}, &conn{p: p}
	serving := func(key string, at *conn) part {
		s := p.NewSeat(key, "consumer", ">", nil)
		s.topic = &topic{key: key, conn: at, seats: []*Seat{s}}
		p.topics[key], at.topics = s.topic, append(at.topics, s.topic)
		return part{topic: s.topic, seats: []*Seat{s}}
	}
	own, elsewhere := serving("own", c), serving("elsewhere", other)
	c.parts, c.rest = []part{own}, []part{elsewhere}
	c.fail(io.ErrUnexpectedEOF)
	require.ErrorIs(t, <-own.seats[0].left, io.ErrUnexpectedEOF)
	require.Same(t, elsewhere.topic, elsewhere.seats[0].topic)
	require.Equal(t, []*topic{elsewhere.topic}, other.topics)
	require.Empty(t, elsewhere.seats[0].left)
}

// Which consumer a connection reads as next, and for how long that may block. A seat's name
// is its topic and its consumer.
func TestConn_OneRead(t *testing.T) {
	client := redis.NewClient(&redis.Options{})
	t.Cleanup(func() { _ = client.Close() })
	const block = 5 * time.Second
	blocks := map[time.Duration]string{-1: "", sharedBlock: " ~", block: " +"}
	for _, tt := range []struct {
		name   string
		room   []string // seats with room, in order
		urgent string
		dry    bool
		alone  bool
		want   []string // the parts of each read; + if it may block, ~ if only for a short time
	}{
		{name: "one seat", room: []string{"a1"}, want: []string{"a1 +", "a1 +"}},
		{name: "one consumer", room: []string{"a1", "b1"}, want: []string{"a1 b1 +", "a1 b1 +"}},
		{name: "there may be more: all in turn", room: []string{"a1", "b1", "b2"}, want: []string{"a1 b1 +", "b2", "a1 b1 +", "b2"}},
		{name: "there may be more, and none covers all", room: []string{"a1", "b2", "b3"}, want: []string{"a1", "b2", "a1", "b3", "a1", "b2"}},
		{name: "there may be more in one topic", room: []string{"a1", "a2", "a3"}, want: []string{"a1 +", "a2 +", "a3 +", "a1 +"}},
		{name: "idle: who sees everything", room: []string{"a1", "b1", "b2"}, dry: true, want: []string{"a1 b1 +", "a1 b1 +"}},
		{name: "idle, two of one topic", room: []string{"b1", "b2"}, dry: true, want: []string{"b1 +", "b2 +", "b1 +"}},
		{name: "idle, two that see everything", room: []string{"a1", "a2", "b1", "b2"}, dry: true, want: []string{"a1 b1 +", "a2 b2 +", "a1 b1 +"}},
		{name: "idle, and none covers all: one of them waits", room: []string{"a1", "b2", "c2"}, dry: true, want: []string{"b2 c2 ~", "a1", "b2 c2 ~", "a1"}},
		{name: "idle, and many have only one of two topics", room: []string{"a1", "b2", "b3", "b4"}, dry: true, want: []string{"a1 ~", "b2", "a1 ~", "b3", "a1 ~", "b4", "a1 ~", "b2"}},
		{name: "one has failed", room: []string{"a1", "b1", "b2"}, urgent: "b2", dry: true, want: []string{"b2", "b2"}},
		{name: "backlogs", room: []string{"a1", "b1", "b2", "b3"}, alone: true, want: []string{"a1", "b1", "a1", "b2", "a1", "b3"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := New(Config{Client: redisx.Client{UniversalClient: client}, Group: "group", Block: block, Unwakable: func() {}})
			c := &conn{p: p, dry: tt.dry, alone: tt.alone}
			topics := make(map[string]*topic)
			var parts []part
			for _, name := range tt.room {
				key := name[:1]
				if topics[key] == nil {
					topics[key] = &topic{key: key}
				}
				seat := p.NewSeat(key, name[1:], ">", nil)
				seat.urgent = name == tt.urgent
				parts = append(parts, part{topic: topics[key], seats: []*Seat{seat}, count: 1})
			}
			for _, want := range tt.want {
				c.time++
				c.parts = slices.Clone(parts)
				c.oneRead()
				var got []string
				for _, part := range c.parts {
					got = append(got, part.seats[0].key+part.seats[0].consumer)
				}
				require.Equal(t, want, strings.Join(got, " ")+blocks[c.block])
				if !tt.alone {
					require.Len(t, c.rest, len(parts)-len(c.parts))
				}
			}
		})
	}
}

// Topics that share a connection, with subscriptions whose handlers are busy: no consumer
// can read all of them, and none waits for long.
func TestPoller_ConsumersWithoutRoom(t *testing.T) {
	p, client := newPoller(t, "group")
	base := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
	const topics = 3 * maxConns
	var idle []*member
	for i := range topics {
		key := fmt.Sprint(base, i)
		require.NoError(t, client.XGroupCreateMkStream(t.Context(), key, "group", "0").Err())
		for j := range 3 {
			m := &member{}
			if j == i%3 {
				m.room = 100
				idle = append(idle, m)
			}
			serve(t, p.NewSeat(key, fmt.Sprint("consumer", j), ">", m))
		}
	}
	var waits time.Duration
	for round := range 5 {
		for i, m := range idle {
			began := time.Now()
			require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: fmt.Sprint(base, i), Values: []any{"a", "b"}}).Err())
			eventually(t, func() bool { return m.count() == round+1 }, "an entry is missing")
			waits += time.Since(began)
		}
	}
	t.Logf("an entry waited %v on average", waits/(5*topics))
}
