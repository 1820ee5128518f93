package takeover

import (
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
	_, err := stream.CreateGroup(t.Context(), "0")
	require.NoError(t, err)
	for range entries {
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: stream.Key, Values: []string{"a", "b"}}).Err())
	}
	bounds := ledger.NewBounds()
	l := ledger.New(ledger.Config{Slots: 5, Leased: true, Bounds: bounds})
	return &setup{
		Finder: New(Config{
			Stream: &stream, Ledger: l, Bounds: bounds, MinIdle: minIdle, Interval: minIdle / 10, Page: 5, Timeout: time.Hour, Log: watermill.NopLogger{},
			Keeper: lease.New(lease.Config{Stream: &stream, Ledger: l, MinIdle: minIdle, Log: watermill.NopLogger{}}),
		}),
		t: t, client: client, stream: &stream, ledger: l,
	}
}

func (s *setup) readAs(consumer string, n int64) {
	s.t.Helper()
	require.NoError(s.t, s.client.XReadGroup(s.t.Context(), &redis.XReadGroupArgs{
		Group: "group", Consumer: consumer, Streams: []string{s.stream.Key, ">"}, Count: n, Block: -1,
	}).Err())
}

// look looks again and again, and returns after which time all were offered.
func (s *setup) lookUntil(n int, limit time.Duration) (took time.Duration) {
	s.t.Helper()
	began := time.Now()
	for s.ledger.Candidates() < n && time.Since(began) < limit {
		_, _ = s.Look(s.t.Context())
		time.Sleep(minIdle / 10)
	}
	return time.Since(began)
}

// What a dead consumer left is offered on its second sighting.
func TestLook_Dead(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 3)
	s.readAs("dead", 3)
	took := s.lookUntil(3, 10*time.Second)
	require.Equal(t, 3, s.ledger.Candidates())
	require.GreaterOrEqual(t, took, minIdle+minIdle/3)
}

// A living holder renews between two sightings, however idle its entries looked before.
func TestLook_Living(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 1)
	s.readAs("living", 1)
	rows, err := s.stream.Pending(t.Context(), 0, "-", "+", 1, "")
	require.NoError(t, err)
	for range 30 {
		// It was late each time: what is looked at has run out.
		require.NoError(t, s.client.Do(t.Context(), "xclaim", s.stream.Key, "group", "living", 0, rows[0].ID, "idle", 2*minIdle.Milliseconds(), "justid").Err())
		_, err := s.Look(t.Context())
		require.NoError(t, err)
		time.Sleep(minIdle / 10)
		if s.ledger.Candidates() > 0 { // it was looked at once: the claim is the second time
			require.NoError(t, s.client.Do(t.Context(), "xclaim", s.stream.Key, "group", "living", 0, rows[0].ID, "idle", 2*minIdle.Milliseconds(), "justid").Err())
			e, _ := s.ledger.Take(time.Now())
			ok, err := s.cfg.Keeper.Take(t.Context(), e)
			require.NoError(t, err)
			require.False(t, ok, "robbed")
			s.ledger.Remove(time.Now(), e)
		}
	}
}

// While the server refuses writes no holder can renew: what is seen then is no sign, and
// holders get time afterwards.
func TestLook_WritesAreRefused(t *testing.T) {
	server := testserver.Private(t)
	client := server.Client()
	s := newSetup(t, client, 1)
	s.readAs("living", 1)
	_, err := s.Look(t.Context())
	require.NoError(t, err)
	require.NoError(t, client.ConfigSet(t.Context(), "min-replicas-to-write", "1").Err())
	for began := time.Now(); time.Since(began) < 3*minIdle; time.Sleep(minIdle / 10) {
		_, err := s.Look(t.Context())
		require.ErrorContains(t, err, "NOREPLICAS")
	}
	require.NoError(t, client.ConfigSet(t.Context(), "min-replicas-to-write", "0").Err())
	took := s.lookUntil(1, 30*time.Second)
	require.Equal(t, 1, s.ledger.Candidates(), "in the end it is dead")
	require.GreaterOrEqual(t, took, reconnectTime)
}

// What was released is offered at once, a page at a time, and the next one as soon as
// that is used up.
func TestLook_Released(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 12)
	s.readAs(lease.Released, 12)
	fx, err := s.Look(t.Context())
	require.NoError(t, err)
	require.Equal(t, 5, s.ledger.Candidates())
	require.Equal(t, 1, fx.Slots)
	require.False(t, fx.Look)
	e, fx := s.ledger.Take(time.Now())
	require.True(t, e.Released)
	require.True(t, fx.Look, "there are more")
}

// Entries in our own name that the ledger does not know are found like a dead
// consumer's.
func TestLook_OwnName(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 2)
	s.readAs("we", 2)
	s.lookUntil(2, 10*time.Second)
	require.Equal(t, 2, s.ledger.Candidates())
}

// Nothing is asked that costs more, as long as all that is pending is ours.
func TestLook_AllIsOurs(t *testing.T) {
	s := newSetup(t, testserver.Client(t), 1)
	s.readAs("we", 1)
	rows, err := s.stream.Pending(t.Context(), 0, "-", "+", 1, "")
	require.NoError(t, err)
	s.ledger.Add(time.Now(), time.Now(), []*ledger.Entry{(&ledger.Entry{ID: rows[0].ID, Fields: []string{"a", "b"}}).SetCount(1, 2)})
	for range 3 {
		_, err := s.Look(t.Context())
		require.NoError(t, err)
	}
	require.True(t, s.sweptAt.IsZero())
	require.True(t, s.steady.IsZero(), "it has not asked for a write")
}
