package poll

import (
	"context"
	"fmt"
	"net"
	"slices"
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

func TestHands(t *testing.T) {
	entries := make([]xstream.Entry, 7)
	for i := range entries {
		entries[i].ID = fmt.Sprint(i)
	}
	var got [][]string
	for _, hand := range hands(entries, []int{1, 5, 2}) {
		var ids []string
		for _, e := range hand {
			ids = append(ids, e.ID)
		}
		got = append(got, ids)
	}
	require.Equal(t, [][]string{{"0"}, {"1", "3", "5", "6"}, {"2", "4"}}, got)
}

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

func (m *member) Holds(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.got, id)
}

func (m *member) Orphans(rows []xstream.Pending) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range rows {
		m.orphans = append(m.orphans, r.ID)
	}
	return true
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
		Client: c, Pipeline: pipeline.New(c, 2, true), Group: group, Consumer: "consumer", Block: 10 * time.Second, Batch: 100, Unwakable: func() {},
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

// Subscriptions of one topic share its connection: in a group each entry goes to
// one of them, in a fan-out to each, including one that has fallen behind and has
// room again.
func TestPoller_OneTopic(t *testing.T) {
	for _, group := range []string{"group", ""} {
		t.Run("group "+group, func(t *testing.T) {
			p, client := newPoller(t, group)
			key := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
			stream := xstream.New(p.cfg.Client, key, group)
			if group != "" {
				_, err := stream.CreateGroup(t.Context(), "0")
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
				seat := p.NewSeat(key, members[i], "0-0")
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
		_, err := stream.CreateGroup(t.Context(), "0")
		require.NoError(t, err)
		members[i] = &member{room: 2 * backlog}
		serve(t, p.NewSeat(key, members[i], ""))
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
// except those that a member has, or has disowned.
func TestPoller_Orphans(t *testing.T) {
	p, client := newPoller(t, "group")
	key := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
	stream := xstream.New(p.cfg.Client, key, "group")
	_, err := stream.CreateGroup(t.Context(), "0")
	require.NoError(t, err)
	m := &member{room: 10}
	serve(t, p.NewSeat(key, m, ""))
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
	p.Disown(key, "3-1")
	p.Unsure(key)
	eventually(t, func() bool { return slices.Equal(m.found(), []string{"2-1"}) }, "not the orphan, or another one too")
}

// A server that does not answer does not delay a seat that is abandoned.
func TestSeat_Abandon(t *testing.T) {
	server := testserver.Private(t)
	client := server.Client()
	c := redisx.Client{UniversalClient: client}
	p := New(Config{Client: c, Pipeline: pipeline.New(c, 2, true), Group: "group", Consumer: "consumer", Block: time.Minute, Batch: 10, Unwakable: func() {}})
	stream := xstream.New(c, "key", "group")
	_, err := stream.CreateGroup(context.Background(), "0")
	require.NoError(t, err)
	m := &member{room: 10}
	seat := p.NewSeat("key", m, "")
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
	p := New(Config{Client: c, Pipeline: pipeline.New(c, 2, true), Consumer: "consumer", Block: 10 * time.Second, Batch: 10, Unwakable: func() {}})
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
		seat := p.NewSeat("key", m, after)
		serve(t, seat)
	}
	require.NoError(t, client.XDel(context.Background(), "key", "9-0").Err())
	time.Sleep(100 * time.Millisecond) // entries read before it rests do not matter
	before := reads()
	time.Sleep(500 * time.Millisecond)
	require.Less(t, reads()-before, int64(20), "reads in half a second without an entry")
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

// A subscription's entries are not orphans to the others of its topic while its
// seat is not served: in its backoff, or when it drains.
func TestPoller_OrphansOfOthers(t *testing.T) {
	p, client := newPoller(t, "group")
	key := fmt.Sprint(t.Name(), "-", time.Now().UnixNano())
	stream := xstream.New(p.cfg.Client, key, "group")
	_, err := stream.CreateGroup(t.Context(), "0")
	require.NoError(t, err)
	gone, stays := &member{room: 1}, &member{room: 0}
	seat := p.NewSeat(key, gone, "")
	leave := serve(t, seat)
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: "1-1", Values: []any{"a", "b"}}).Err())
	eventually(t, func() bool { return gone.count() == 1 }, "nothing came")
	leave()
	stays.room = 1
	serve(t, p.NewSeat(key, stays, ""))
	look := func(id string) { // until an entry has arrived that was read after the look
		p.Unsure(key)
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: id, Values: []any{"a", "b"}}).Err())
		eventually(t, func() bool { return stays.Holds(id) }, "nothing came")
	}
	look("2-1")
	require.Empty(t, stays.found(), "taken from a subscription that is away")
	seat.Release()
	stays.mu.Lock()
	stays.room = 1
	stays.mu.Unlock()
	look("3-1")
	require.Equal(t, []string{"1-1"}, stays.found(), "nobody has it any more")
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
	p := New(Config{Client: c, Pipeline: pipeline.New(c, 2, true), Group: "group", Consumer: "consumer", Block: time.Minute, Batch: 10, Unwakable: func() {}})
	var seats []*Seat
	var members []*member
	for i := range 1 + maxConns {
		key := fmt.Sprint(t.Name(), i, "-", time.Now().UnixNano())
		require.NoError(t, admin.XGroupCreateMkStream(t.Context(), key, "group", "0").Err())
		require.NoError(t, admin.XAdd(t.Context(), &redis.XAddArgs{Stream: key, Values: []any{"a", "b"}}).Err())
		m := &member{room: 10}
		members = append(members, m)
		seats = append(seats, p.NewSeat(key, m, ""))
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
