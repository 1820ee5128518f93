package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// patience bounds every wait of a test. They take seconds, and longer only on a machine that stalls.
const patience = 2 * time.Minute

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// needServer skips the test where there is no redis-server.
func needServer(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		missing(t, err)
	}
}

// missing skips the test, or fails it where real servers are required.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("GOXSTREAMS_TEST_REAL") == "1" {
		t.Fatalf("GOXSTREAMS_TEST_REAL=1, and there is no server: %v", err)
	}
	t.Skipf("not tested, it needs real servers: %v", err)
}

func closeLater(t *testing.T, d Deployment) {
	t.Cleanup(func() {
		require.NoError(t, d.Close())
		require.NoError(t, d.Close(), "a second time")
		for _, n := range d.Nodes() {
			require.False(t, n.Running())
		}
	})
}

// add writes an entry with an unsuspecting client, as soon as that is possible.
func add(ctx context.Context, t *testing.T, client redis.UniversalClient, key string) {
	t.Helper()
	require.NoError(t, until(ctx, func(ctx context.Context) error {
		return client.XAdd(ctx, &redis.XAddArgs{Stream: key, Values: []any{"a", "b"}}).Err()
	}))
}

func TestSingle(t *testing.T) {
	t.Parallel()
	needServer(t)
	ctx := testContext(t)
	d, err := Single(ctx, Config{AOF: Always, Args: []string{"--maxmemory", "100mb"}})
	require.NoError(t, err)
	closeLater(t, d)
	require.Equal(t, "104857600", d.Client().ConfigGet(ctx, "maxmemory").Val()["maxmemory"])
	n := d.Node()
	require.NoError(t, n.is(ctx, RoleMaster))

	written := int64(0)
	for _, end := range []func() error{n.Kill, func() error { return n.Stop(ctx) }, func() error { return nil }} {
		add(ctx, t, d.Client(), "s")
		written++
		require.NoError(t, end())
		require.NoError(t, n.Restart(ctx))
		require.GreaterOrEqual(t, n.client.XLen(ctx, "s").Val(), written, "it comes back with its data")
	}

	require.NoError(t, n.Freeze())
	require.Error(t, attemptFor(ctx, 300*time.Millisecond, n))
	require.NoError(t, n.Thaw())
	require.NoError(t, d.Settle(ctx))
	require.ErrorIs(t, n.Disconnect(), errors.ErrUnsupported)
	require.ErrorIs(t, n.Connect(), errors.ErrUnsupported)

	require.NoError(t, n.Freeze())
	require.NoError(t, n.Restart(ctx), "a frozen server can be restarted")
}

func attemptFor(ctx context.Context, d time.Duration, n *Node) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return n.client.Ping(ctx).Err()
}

func TestTwoAtOnceHaveDifferentPorts(t *testing.T) {
	t.Parallel()
	needServer(t)
	ctx := testContext(t)
	a, err := Single(ctx, Config{})
	require.NoError(t, err)
	closeLater(t, a)
	require.NoError(t, a.Node().Kill())
	b, err := Single(ctx, Config{})
	require.NoError(t, err)
	closeLater(t, b)
	require.NotEqual(t, a.Node().Addr, b.Node().Addr, "a dead server's port stays its own")
}

func TestThatCannotStart(t *testing.T) {
	t.Parallel()
	_, err := Single(t.Context(), Config{Binary: "no-such-server"})
	require.ErrorIs(t, err, ErrNoServer)
	needServer(t)
	_, err = Single(testContext(t), Config{Args: []string{"--no-such-option", "1"}})
	require.ErrorContains(t, err, "no-such-option", "it says what the server said")
}

func TestSentinel(t *testing.T) {
	t.Parallel()
	needServer(t)
	ctx := testContext(t)
	d, err := Sentinel(ctx, Config{AOF: EverySec})
	require.NoError(t, err)
	closeLater(t, d)
	require.Len(t, d.Nodes(), 3)
	require.Len(t, d.Sentinels(), 3)
	require.NoError(t, d.Sentinels()[0].is(ctx, RoleSentinel))

	for what, change := range map[string]func(context.Context) error{
		"failover": d.Failover, "kill": d.KillMaster, "freeze": d.FreezeMaster,
	} {
		old, err := d.Master(ctx)
		require.NoError(t, err)
		began := time.Now()
		require.NoError(t, change(ctx), what)
		t.Logf("%s: %s", what, time.Since(began))
		now, err := d.Master(ctx)
		require.NoError(t, err)
		require.NotEqual(t, old, now, what)
		require.NoError(t, old.is(ctx, RoleReplica))
		add(ctx, t, d.Client(), "s")
	}
	require.NoError(t, d.Sentinels()[1].Kill())
	require.NoError(t, d.Sentinels()[1].Restart(ctx))
	require.NoError(t, d.Settle(ctx))
}

func TestCluster(t *testing.T) {
	t.Parallel()
	needServer(t)
	ctx := testContext(t)
	began := time.Now()
	d, err := Cluster(ctx, Config{})
	require.NoError(t, err)
	t.Logf("start: %s", time.Since(began))
	closeLater(t, d)
	require.Len(t, d.Nodes(), 6)
	const key = "orders"

	promotes := map[string]func(context.Context, string) error{
		"failover by agreement": d.Failover,
		"failover":              d.FailoverShard,
		"long pause": func(ctx context.Context, key string) error {
			return d.PauseMaster(ctx, key, 4*nodeTimeout)
		},
	}
	for what, change := range promotes {
		old, err := d.MasterOf(ctx, key)
		require.NoError(t, err)
		began := time.Now()
		require.NoError(t, change(ctx, key), what)
		t.Logf("%s: %s", what, time.Since(began))
		now, err := d.MasterOf(ctx, key)
		require.NoError(t, err)
		if what != "long pause" { // on a slow machine it may not have been long enough
			require.Equal(t, d.partner(old), now, what)
		}
		require.NoError(t, d.partner(now).is(ctx, RoleReplica))
		add(ctx, t, d.Client(), key)
	}
	require.NoError(t, d.PauseMaster(ctx, key, nodeTimeout/10))
	add(ctx, t, d.Client(), key)
}

// A slot moves and comes back while a producer adds to its stream and a group reads it: nothing is lost, and the group's
// pending entries move too.
func TestLiveMoveSlot(t *testing.T) {
	t.Parallel()
	needServer(t)
	ctx := testContext(t)
	d, err := Cluster(ctx, Config{})
	require.NoError(t, err)
	closeLater(t, d)
	const key, group = "{orders}", "g"
	client := d.Client()
	require.NoError(t, client.XGroupCreateMkStream(ctx, key, group, "0").Err())
	for i := range 3 * moveBatch { // several batches
		require.NoError(t, client.Set(ctx, fmt.Sprintf("{orders}%d", i), i, 0).Err())
	}
	add(ctx, t, client, key)
	require.NoError(t, client.XReadGroup(ctx, &redis.XReadGroupArgs{Group: group, Consumer: "c", Streams: []string{key, ">"}}).Err())

	stop, added := make(chan struct{}), make(chan int64)
	go func() {
		n := int64(1)
		for {
			select {
			case <-stop:
				added <- n
				return
			default:
			}
			if client.XAdd(ctx, &redis.XAddArgs{Stream: key, Values: []any{"a", "b"}}).Err() == nil {
				n++
			}
		}
	}()
	from, err := d.MasterOf(ctx, key)
	require.NoError(t, err)
	for range 2 {
		require.NoError(t, d.LiveMoveSlot(ctx, key))
		now, err := d.MasterOf(ctx, key)
		require.NoError(t, err)
		t.Logf("the slot is at %s", now)
	}
	close(stop)
	n := <-added
	now, err := d.MasterOf(ctx, key)
	require.NoError(t, err)
	require.Equal(t, from, now, "the second move is back")
	length, err := client.XLen(ctx, key).Result()
	require.NoError(t, err)
	require.GreaterOrEqual(t, length, n, "what was acknowledged is there")
	pending, err := client.XPending(ctx, key, group).Result()
	require.NoError(t, err)
	require.EqualValues(t, 1, pending.Count)
	for i := range 3 * moveBatch {
		require.Equal(t, fmt.Sprint(i), client.Get(ctx, fmt.Sprintf("{orders}%d", i)).Val())
	}
}

// A move that is interrupted between any two steps can be called again.
func TestAMoveGoesOn(t *testing.T) {
	t.Parallel()
	needServer(t)
	ctx := testContext(t)
	d, err := Cluster(ctx, Config{})
	require.NoError(t, err)
	closeLater(t, d)
	const key = "orders"
	add(ctx, t, d.Client(), key)
	slot, err := d.slot(ctx, key)
	require.NoError(t, err)
	from, err := d.MasterOf(ctx, key)
	require.NoError(t, err)
	to, err := d.target(ctx, from, int(slot))
	require.NoError(t, err)

	require.NoError(t, setSlot(ctx, to, slot, "importing", from))
	require.NoError(t, setSlot(ctx, from, slot, "migrating", to))
	require.NoError(t, moveKeys(ctx, slot, from, to))
	require.NoError(t, d.LiveMoveSlot(ctx, key))
	now, err := d.MasterOf(ctx, key)
	require.NoError(t, err)
	require.Equal(t, to, now)

	require.NoError(t, setSlot(ctx, from, slot, "importing", to))
	require.NoError(t, d.LiveMoveSlot(ctx, key))
	require.EqualValues(t, 1, d.Client().XLen(ctx, key).Val())
}

func TestContainer(t *testing.T) {
	t.Parallel()
	const image = "goxstreams-test/redis:8.6"
	ctx := testContext(t)
	d, err := Container(ctx, Config{Image: image, AOF: Always})
	if errors.Is(err, ErrNoServer) {
		missing(t, err)
	}
	require.NoError(t, err)
	closeLater(t, d)
	n := d.Node()
	version, err := n.infoField(ctx, "redis_version")
	require.NoError(t, err)
	require.Contains(t, version, "8.6")
	add(ctx, t, d.Client(), "s")

	require.NoError(t, n.Disconnect())
	require.Error(t, attemptFor(ctx, 300*time.Millisecond, n))
	require.NoError(t, n.Connect())
	require.NoError(t, n.Freeze())
	require.Error(t, attemptFor(ctx, 300*time.Millisecond, n))
	require.NoError(t, n.Thaw())
	require.NoError(t, d.Settle(ctx))

	require.NoError(t, n.Freeze())
	require.NoError(t, n.Kill(), "a frozen one too")
	require.False(t, n.Running())
	require.NoError(t, n.Restart(ctx))
	require.NoError(t, until(ctx, func(ctx context.Context) error { return n.client.XLen(ctx, "s").Err() }))
	require.EqualValues(t, 1, n.client.XLen(ctx, "s").Val())
	require.NoError(t, n.Restart(ctx))
	require.NoError(t, n.is(ctx, RoleMaster))
}
