package takeover

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

func TestMain(m *testing.M) { testserver.Main(m) }

const minIdle = 300 * time.Millisecond

type setup struct {
	*Finder
	t      *testing.T
	client *redis.Client
	stream *xstream.Stream
	ledger *ledger.Ledger
}

func newSetup(t *testing.T, client *redis.Client, entries int) *setup {
	t.Helper()
	testserver.RequireReal(t)
	stream := xstream.New(redisx.Client{UniversalClient: client}, fmt.Sprint(t.Name(), "-", time.Now().UnixNano()), "group")
	stream.Consumer = "we"
	err := stream.CreateGroup(t.Context(), "0", time.Minute)
	require.NoError(t, err)
	for range entries {
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: stream.Key, Values: []string{"a", "b"}}).Err())
	}
	bounds := ledger.NewBounds()
	l := ledger.New(ledger.Config{Slots: 5, Leased: true, Bounds: bounds, Compare: xstream.CompareIDs})
	leases := lease.Config{Stream: &stream, Ledger: l, MinIdle: minIdle, Timeout: time.Hour, Log: watermill.NopLogger{}}
	return &setup{
		Finder: New(Config{Config: leases, Keeper: lease.New(leases), Bounds: bounds, Interval: minIdle / 10, Page: 5}),
		t:      t, client: client, stream: &stream, ledger: l,
	}
}

func (s *setup) readAs(consumer string, n int64) {
	s.t.Helper()
	require.NoError(s.t, s.client.XReadGroup(s.t.Context(), &redis.XReadGroupArgs{
		Group: "group", Consumer: consumer, Streams: []string{s.stream.Key, ">"}, Count: n, Block: -1,
	}).Err())
}

// lookUntil looks repeatedly until n entries were offered, and returns how long
// that took.
func (s *setup) lookUntil(n int, limit time.Duration) (took time.Duration) {
	s.t.Helper()
	began := time.Now()
	for s.ledger.Candidates() < n && time.Since(began) < limit {
		_, _ = s.Look(s.t.Context())
		time.Sleep(minIdle / 10)
	}
	return time.Since(began)
}

// Entries of a dead consumer are offered when they are found idle for the second
// time.
func TestLook_Dead(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 3)
	s.readAs("dead", 3)
	took := s.lookUntil(3, 10*time.Second)
	require.Equal(t, 3, s.ledger.Candidates())
	require.GreaterOrEqual(t, took, minIdle+minIdle/3)
}

// An entry that was moved to another consumer, or delivered once more, was touched,
// whatever idle time it has now: it counts as found for the first time.
func TestSweep_Touched(t *testing.T) {
	for _, tt := range []struct {
		name, consumer string
		count          int64
		touched        bool
	}{{"not", "dead", 1, false}, {"moved", "other", 1, true}, {"delivered again", "dead", 2, true}} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSetup(t, testserver.Client(t), 1)
			s.readAs("dead", 1)
			require.Eventually(t, func() bool { return s.sweepAll(t.Context()) == nil && len(s.seen) == 1 }, 10*time.Second, minIdle/10)
			rows, err := s.stream.Pending(t.Context(), 0, "-", "+", 1, "")
			require.NoError(t, err)
			id := rows[0].ID
			before := s.seen[id]
			require.NoError(t, s.client.Do(t.Context(), "XCLAIM", s.stream.Key, "group", tt.consumer, 0, id,
				"IDLE", time.Hour.Milliseconds(), "RETRYCOUNT", tt.count, "JUSTID").Err())
			require.NoError(t, s.sweepAll(t.Context()))
			after := s.seen[id]
			require.Equal(t, []any{tt.consumer, tt.count}, []any{after.owner, after.count})
			require.Equal(t, tt.touched, after.at.After(before.at))
		})
	}
}

// A living consumer renews between two looks, however idle its entries looked
// before.
func TestLook_Living(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 1)
	s.readAs("living", 1)
	rows, err := s.stream.Pending(t.Context(), 0, "-", "+", 1, "")
	require.NoError(t, err)
	for range 30 {
		// Each time it was late: its leases had expired when they were looked at.
		require.NoError(t, s.client.Do(t.Context(), "xclaim", s.stream.Key, "group", "living", 0, rows[0].ID, "idle", 2*minIdle.Milliseconds(), "justid").Err())
		_, err := s.Look(t.Context())
		require.NoError(t, err)
		time.Sleep(minIdle / 10)
		if s.ledger.Candidates() > 0 { // it was looked at once: the claim would be the second time
			require.NoError(t, s.client.Do(t.Context(), "xclaim", s.stream.Key, "group", "living", 0, rows[0].ID, "idle", 2*minIdle.Milliseconds(), "justid").Err())
			entries, _ := s.ledger.Take(time.Now(), nil)
			ok, err := s.cfg.Keeper.Take(t.Context(), entries[0])
			require.NoError(t, err)
			require.False(t, ok, "robbed")
			s.ledger.Remove(time.Now(), entries[0])
		}
	}
}

// While the server rejects writes no consumer can renew: idle times then mean
// nothing, and consumers get time afterwards, also from a Finder that has never had
// an answer.
func TestLook_WritesAreRefused(t *testing.T) {
	for _, looked := range []bool{true, false} {
		t.Run(fmt.Sprint("looked before: ", looked), func(t *testing.T) {
			t.Parallel()
			server := testserver.Private(t)
			client := server.Client()
			s := newSetup(t, client, 1)
			s.readAs("living", 1)
			if looked {
				_, err := s.Look(t.Context())
				require.NoError(t, err)
			}
			require.NoError(t, client.ConfigSet(t.Context(), "min-replicas-to-write", "1").Err())
			for began := time.Now(); time.Since(began) < 3*minIdle; time.Sleep(minIdle / 10) {
				_, err := s.Look(t.Context())
				require.ErrorContains(t, err, "NOREPLICAS")
			}
			require.NoError(t, client.ConfigSet(t.Context(), "min-replicas-to-write", "0").Err())
			took := s.lookUntil(1, 30*time.Second)
			require.Equal(t, 1, s.ledger.Candidates(), "in the end it is dead")
			require.GreaterOrEqual(t, took, reconnectTime)
		})
	}
}

// A subscription that looks rarely has not had an outage for that.
func TestLook_Rarely(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 1)
	s.cfg.Interval = time.Minute // so that no stall of the machine counts as an outage
	for wait := time.Now().Add(s.third() * 3 / 2); time.Now().Before(wait); time.Sleep(minIdle / 10) {
	}
	s.readAs("dead", 1)
	took := s.lookUntil(1, 10*time.Second)
	require.Equal(t, 1, s.ledger.Candidates())
	require.Less(t, took, reconnectTime)
}

// Released entries are offered at once, a page at a time, and the next page as soon
// as that is used up.
func TestLook_Released(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 12)
	s.readAs(lease.Released, 12)
	fx, err := s.Look(t.Context())
	require.NoError(t, err)
	require.Equal(t, 5, s.ledger.Candidates())
	require.Equal(t, 1, fx.Slots)
	require.False(t, fx.Look)
	entries, fx := s.ledger.Take(time.Now(), nil)
	require.True(t, entries[0].Released)
	require.True(t, fx.Look, "there are more")
}

// Entries pending for our own consumer that the ledger does not know are found like
// a dead consumer's.
func TestLook_OwnName(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 2)
	s.readAs("we", 2)
	s.lookUntil(2, 10*time.Second)
	require.Equal(t, 2, s.ledger.Candidates())
}

// No expensive commands are sent while everything pending is ours.
func TestLook_AllIsOurs(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 1)
	s.readAs("we", 1)
	rows, err := s.stream.Pending(t.Context(), 0, "-", "+", 1, "")
	require.NoError(t, err)
	s.ledger.Add(time.Now(), time.Now(), []*ledger.Entry{(&ledger.Entry{ID: rows[0].ID, Fields: []string{"a", "b"}}).SetCount(1, 2)})
	s.steady = time.Time{} // as after a failure, until a write is answered
	for range 3 {
		_, err := s.Look(t.Context())
		require.NoError(t, err)
	}
	require.True(t, s.sweptAt.IsZero())
	require.True(t, s.steady.IsZero(), "it has not asked for a write")
}

// While sweeps of a long list rest, the entries of dead consumers are found by name. Nobody
// asks for those of consumers that have none, that live, or that is no process.
func TestLook_DeadBetweenSweeps(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 4)
	s.readAs("dead", 2)
	s.readAs("living", 1)
	s.readAs(lease.Released, 1)
	require.NoError(t, s.client.XGroupCreateConsumer(t.Context(), s.stream.Key, "group", "empty").Err())
	s.sweptAt, s.sweepTook = time.Now(), time.Hour
	s.consumers = 1000
	asked := make(map[string]int)
	s.client.AddHook(counting{func(cmd redis.Cmder) {
		if args := cmd.Args(); cmd.Name() == "xpending" && len(args) > 3 && fmt.Sprint(args[3]) == "idle" {
			asked[fmt.Sprint(args[len(args)-1])]++
		}
	}})
	rows, err := s.stream.Pending(t.Context(), 0, "-", "+", 1, "living")
	require.NoError(t, err)
	dead := make(map[string]bool)
	for began := time.Now(); len(dead) < 2 && time.Since(began) < 10*time.Second; time.Sleep(minIdle / 10) {
		read := time.Now()
		require.NoError(t, s.client.Do(t.Context(), "xclaim", s.stream.Key, "group", "living", 0, rows[0].ID, "idle", 2*minIdle.Milliseconds(), "justid").Err())
		_, err := s.Look(t.Context())
		require.NoError(t, err)
		if time.Since(read) >= minIdle { // the test did not live up to that
			delete(asked, "living")
			s.drop(rows[0].ID)
			continue
		}
		for s.ledger.Candidates() > 0 {
			if entries, _ := s.ledger.Take(time.Now(), nil); !entries[0].Released {
				dead[entries[0].Owner+" "+entries[0].ID] = true
			}
		}
	}
	require.Len(t, dead, 2)
	for owner := range dead {
		require.Contains(t, owner, "dead ")
	}
	require.NotZero(t, asked["dead"])
	delete(asked, "dead")
	require.Empty(t, asked)
}

// counting sees all commands.
type counting struct{ see func(redis.Cmder) }

func (counting) DialHook(next redis.DialHook) redis.DialHook { return next }
func (c counting) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { c.see(cmd); return next(ctx, cmd) }
}
func (c counting) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// An entry that a dead consumer had and that was deleted from the stream is acked, and
// counted as lost; nobody is offered it.
func TestLook_Trimmed(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 2)
	s.readAs("dead", 2)
	rows, err := s.stream.Pending(t.Context(), 0, "-", "+", 2, "")
	require.NoError(t, err)
	require.NoError(t, s.client.XDel(t.Context(), s.stream.Key, rows[0].ID).Err())
	s.lookUntil(1, 10*time.Second)
	require.Equal(t, 1, s.ledger.Candidates())
	entries, _ := s.ledger.Take(time.Now(), nil)
	require.Equal(t, rows[1].ID, entries[0].ID)
	require.EqualValues(t, 1, s.cfg.Keeper.Lost.Load())
	left, err := s.stream.Pending(t.Context(), 0, "-", "+", 2, "")
	require.NoError(t, err)
	require.Len(t, left, 1)
}

// Released entries have crashed nobody, however long they wait.
func TestLook_ReleasedLongAgo(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 12)
	s.readAs(lease.Released, 12)
	seen := make(map[string]bool)
	for began := time.Now(); time.Since(began) < 2*minIdle || len(seen) < 5; time.Sleep(minIdle / 10) {
		_, err := s.Look(t.Context())
		require.NoError(t, err)
		require.Empty(t, s.seen)
		for s.ledger.Candidates() > 0 {
			entries, _ := s.ledger.Take(time.Now(), nil)
			e := entries[0]
			require.True(t, e.Released)
			seen[e.ID] = true
			s.ledger.Remove(time.Now(), e)
		}
	}
}

// The group was lost while nothing of ours was pending for us, since a pause had released
// it. That the sweep adds our consumer to the new group does not hide that.
func TestSweep_GroupLostInAPause(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 3)
	ctx, keeper := t.Context(), s.cfg.Keeper
	s.readAs("we", 3)
	rows, err := s.stream.Pending(ctx, 0, "-", "+", 3, "we")
	require.NoError(t, err)
	var entries []*ledger.Entry
	for _, r := range rows {
		entries = append(entries, (&ledger.Entry{ID: r.ID}).SetCount(1, 2))
	}
	keeper.SawEntry(xstream.Entry{ID: rows[2].ID, Fields: []string{"a", "b"}})
	s.ledger.Add(time.Now(), time.Now(), entries)
	require.NoError(t, keeper.Renew(ctx, 0))
	s.ledger.Pause()
	withdrawn := s.ledger.Withdraw()
	require.Len(t, withdrawn, 3)
	require.NoError(t, keeper.Release(ctx, withdrawn))
	require.True(t, s.ledger.Withdrawn(time.Now(), withdrawn, lease.Released, true, false))
	require.NoError(t, keeper.CheckReleased(ctx, s.ledger.Withdrawals(), true))
	require.Len(t, s.ledger.Withdrawals(), 3, "they are as they should be")

	require.NoError(t, s.client.XGroupDestroy(ctx, s.stream.Key, "group").Err())
	require.NoError(t, s.client.XGroupCreate(ctx, s.stream.Key, "group", "$").Err())
	require.NoError(t, s.sweepGone(ctx))
	consumers, err := s.stream.Consumers(ctx)
	require.NoError(t, err)
	require.Len(t, consumers, 1)
	require.NoError(t, keeper.CheckReleased(ctx, s.ledger.Withdrawals(), true))
	rows, err = s.stream.Pending(ctx, 0, "-", "+", 10, "we")
	require.NoError(t, err)
	require.Len(t, rows, 3, "lost")
	// Now the group knows us: what is not pending was settled.
	require.Eventually(t, func() bool { return len(s.ledger.Withdraw()) == 3 }, 10*time.Second, time.Millisecond)
	require.True(t, s.ledger.Withdrawn(time.Now(), withdrawn, lease.Released, true, false))
	require.NoError(t, s.client.XAck(ctx, s.stream.Key, "group", rows[0].ID, rows[1].ID, rows[2].ID).Err())
	require.NoError(t, keeper.CheckReleased(ctx, s.ledger.Withdrawals(), true))
	require.Empty(t, s.ledger.Withdrawals())
	rows, err = s.stream.Pending(ctx, 0, "-", "+", 10, "")
	require.NoError(t, err)
	require.Empty(t, rows, "restored though settled")
}
