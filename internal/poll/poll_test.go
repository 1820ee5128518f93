package poll

import (
	"context"
	"fmt"
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

// member takes what comes while it has room.
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
		Client: c, Line: pipeline.New(c, 2, true), Group: group, Consumer: "consumer", Block: 10 * time.Second, Batch: 100, Unwakable: func() {},
	}), client
}

func eventually(t *testing.T, condition func() bool, what string, args ...any) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		require.True(t, time.Now().Before(deadline), what, args)
	}
}

// serve has the seat served until t ends, or the function is called.
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

// Subscriptions of one topic share its connection: in a group each entry goes to one,
// in fan-out to each, also to one that has fallen behind and has room again.
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

// Many topics share few connections, and one with a backlog moves to another one and
// back.
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

// A read without an answer has taken entries: they are found before the next one, but
// for those that somebody here has, or has disowned.
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
	for _, id := range []string{"2-1", "3-1"} { // read in our name, unknown to the poller
		pipe := client.TxPipeline()
		pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: id, Values: []any{"a", "b"}})
		pipe.XReadGroup(t.Context(), &redis.XReadGroupArgs{Group: "group", Consumer: "consumer", Streams: []string{key, ">"}, Count: 1})
		_, err := pipe.Exec(t.Context())
		require.NoError(t, err)
	}
	p.Disown(key, "3-1")
	p.Unsure(key)
	eventually(t, func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return slices.Equal(m.orphans, []string{"2-1"})
	}, "orphans: %v", m.orphans)
}

// A server that does not answer holds nobody up who abandons its seat.
func TestSeat_Abandon(t *testing.T) {
	server := testserver.Private(t)
	client := server.Client()
	c := redisx.Client{UniversalClient: client}
	p := New(Config{Client: c, Line: pipeline.New(c, 2, true), Group: "group", Consumer: "consumer", Block: time.Minute, Batch: 10, Unwakable: func() {}})
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
