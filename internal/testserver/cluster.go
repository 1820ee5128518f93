package testserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	clusterMasters = 3
	slotCount      = 16384

	// A new Cluster serves once its masters have seen each other for the node
	// timeout, and at the earliest 2 s after their start. So it starts with a
	// timeout of that length, and then gets one that a busy machine does not
	// exceed.
	formingTimeout = "2000" // ms
	nodeTimeout    = "15000"
)

// Cluster returns the Redis Cluster of three masters that the whole test binary
// shares, and starts it at first use. Without real servers it skips t as
// RequireReal does. Like Private's servers it is never at REDIS_ADDR. A test must
// use keys of its own. All tests share the topology: a test may move slots, but
// must not stop masters.
func Cluster(t testing.TB) *ClusterServer {
	t.Helper()
	return clusterFor(t, &sharedCluster)
}

func clusterFor(t testing.TB, shared *lazyCluster) *ClusterServer {
	t.Helper()
	c, err := shared.get()
	if err != nil {
		notTested(t, "it needs a Cluster of real servers: "+err.Error())
	}
	return &ClusterServer{c, t}
}

// ClusterServer is the shared Cluster, for one test.
type ClusterServer struct {
	*cluster
	tb testing.TB
}

// Client returns a client of the Cluster, which the test's cleanup closes; options
// change its options. Hooks added to it see a command once, wherever it is
// redirected to, but not commands sent to a node's own client (MasterForKey). Hooks
// that OnNewNode adds to the nodes' clients see every command sent.
func (c *ClusterServer) Client(options ...func(*redis.ClusterOptions)) *redis.ClusterClient {
	opt := &redis.ClusterOptions{NewClient: func(opt *redis.Options) *redis.Client {
		opt.Addr = c.outside(opt.Addr)
		return redis.NewClient(opt)
	}}
	for _, n := range c.nodes {
		opt.Addrs = append(opt.Addrs, n.inside)
	}
	for _, change := range options {
		change(opt)
	}
	client := redis.NewClusterClient(opt)
	c.tb.Cleanup(func() {
		if err := client.Close(); err != nil && !errors.Is(err, redis.ErrClosed) {
			c.tb.Errorf("testserver: closing the client: %v", err)
		}
	})
	return client
}

// Addrs returns the address at which tests reach each node, by the one that it
// announces to clients: other processes need both.
func (c *ClusterServer) Addrs() map[string]string {
	addrs := make(map[string]string)
	for _, n := range c.nodes {
		addrs[n.inside] = n.addr
	}
	return addrs
}

// MoveSlot moves the slot of a key, and all keys in it, to the next master. After
// the keys and before the slot it calls halfway (which may be nil): until that
// returns, clients are redirected with ASK. When MoveSlot returns, all masters know
// the new owner.
func (c *ClusterServer) MoveSlot(key string, halfway func()) {
	c.tb.Helper()
	if err := c.moveSlot(key, halfway); err != nil {
		c.tb.Fatalf("testserver: moving the slot of %q: %v", key, err)
	}
}

// cluster is a Cluster of servers that this package has started.
type cluster struct {
	nodes  []*clusterNode
	moving sync.Mutex // one slot at a time
}

type clusterNode struct {
	*Server
	client *redis.Client
	id     string
	inside string // the address that it announces to the other nodes
}

// outside returns the address at which tests reach the node with the given inside
// address.
func (c *cluster) outside(inside string) string {
	for _, n := range c.nodes {
		if n.inside == inside {
			return n.addr
		}
	}
	return inside
}

func (c *cluster) String() string {
	var addrs []string
	for _, n := range c.nodes {
		addrs = append(addrs, n.addr)
	}
	return c.nodes[0].version + " Cluster on " + strings.Join(addrs, ", ")
}

// startCluster starts a Cluster of servers, with start and the given arguments.
func startCluster(start func(args ...string) (*Server, error)) (*cluster, error) {
	c := &cluster{nodes: make([]*clusterNode, clusterMasters)}
	err := c.all(func(i int) error {
		srv, err := start("--cluster-enabled", "yes", "--cluster-node-timeout", formingTimeout)
		if err != nil {
			return err
		}
		c.nodes[i] = &clusterNode{Server: srv, client: redis.NewClient(&redis.Options{Addr: srv.addr})}
		c.nodes[i].inside, err = srv.backend.peerAddr()
		return err
	})
	if err == nil {
		err = c.form()
	}
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// all calls f concurrently for all nodes.
func (c *cluster) all(f func(i int) error) error {
	errs := make([]error, len(c.nodes))
	var calls sync.WaitGroup
	for i := range c.nodes {
		calls.Go(func() { errs[i] = f(i) })
	}
	calls.Wait()
	return errors.Join(errs...)
}

// form joins the nodes to a Cluster, and waits until each of them serves and knows
// the owner of every slot.
func (c *cluster) form() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	err := c.all(func(i int) (err error) {
		n := c.nodes[i]
		if n.id, err = n.client.Do(ctx, "cluster", "myid").Text(); err != nil {
			return err
		}
		// Set distinct epochs, otherwise the nodes would first have to agree on
		// them.
		if err := n.client.Do(ctx, "cluster", "set-config-epoch", i+1).Err(); err != nil {
			return err
		}
		return n.client.ClusterAddSlotsRange(ctx, slotCount*i/clusterMasters, slotCount*(i+1)/clusterMasters-1).Err()
	})
	if err != nil {
		return err
	}
	for i, n := range c.nodes {
		for _, peer := range c.nodes[i+1:] { // each pair explicitly: hearing of a third node from a second one takes seconds
			host, port, err := net.SplitHostPort(peer.inside)
			if err != nil {
				return err
			}
			if err := n.client.ClusterMeet(ctx, host, port).Err(); err != nil {
				return err
			}
		}
	}
	return c.all(func(i int) error {
		n := c.nodes[i]
		if err := until(ctx, func() error { return c.serves(ctx, n) }); err != nil {
			return err
		}
		return n.client.ConfigSet(ctx, "cluster-node-timeout", nodeTimeout).Err()
	})
}

// serves returns an error while the node does not serve, or does not know the owner
// of every slot.
func (c *cluster) serves(ctx context.Context, n *clusterNode) error {
	info, err := n.client.ClusterInfo(ctx).Result()
	if err != nil {
		return err
	}
	if !strings.Contains(info, "cluster_state:ok") {
		return errors.New(info)
	}
	slots, err := n.slots(ctx)
	if err != nil {
		return err
	}
	known := 0
	for _, s := range slots {
		if c.master(s) >= 0 {
			known += s.End - s.Start + 1
		}
	}
	if known != slotCount {
		return fmt.Errorf("%d of %d slots: %v", known, slotCount, slots)
	}
	return nil
}

func (n *clusterNode) slots(ctx context.Context) ([]redis.ClusterSlot, error) {
	//lint:ignore SA1019 the tests' clients go by this very answer
	return n.client.ClusterSlots(ctx).Result()
}

// master returns the index of the node that has the slots; -1 if none has.
func (c *cluster) master(s redis.ClusterSlot) int {
	return slices.IndexFunc(c.nodes, func(n *clusterNode) bool { return n.inside == s.Nodes[0].Addr })
}

// masterOf returns the index of the node that has the slot according to n.
func (c *cluster) masterOf(ctx context.Context, n *clusterNode, slot int64) (int, error) {
	slots, err := n.slots(ctx)
	if err != nil {
		return -1, err
	}
	for _, s := range slots {
		if i := c.master(s); i >= 0 && s.Start <= int(slot) && int(slot) <= s.End {
			return i, nil
		}
	}
	return -1, fmt.Errorf("slot %d has no master", slot)
}

func (c *cluster) moveSlot(key string, halfway func()) error {
	c.moving.Lock()
	defer c.moving.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	slot, err := c.nodes[0].client.ClusterKeySlot(ctx, key).Result()
	if err != nil {
		return err
	}
	var from, to int
	if err := until(ctx, func() error { // a node may still have an older view of the slot
		from, err = c.masterOf(ctx, c.nodes[0], slot)
		if err != nil {
			return err
		}
		to = (from + 1) % len(c.nodes)
		return c.moveKeys(ctx, slot, c.nodes[from], c.nodes[to])
	}); err != nil {
		return err
	}
	if halfway != nil {
		halfway()
	}
	ctx, cancel = context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	// The new master first: a client that asks it in between must not be sent back.
	for _, i := range []int{to, from, (to + 1) % len(c.nodes)} {
		if err := c.nodes[i].setSlot(ctx, slot, "node", c.nodes[to]); err != nil {
			return err
		}
	}
	return c.all(func(i int) error {
		return until(ctx, func() error {
			if master, err := c.masterOf(ctx, c.nodes[i], slot); err != nil || master != to {
				return fmt.Errorf("node %d considers %d the master: %v", i, master, err)
			}
			return nil
		})
	})
}

// moveKeys does the first half of a slot's move.
func (c *cluster) moveKeys(ctx context.Context, slot int64, from, to *clusterNode) error {
	host, port, err := net.SplitHostPort(to.inside)
	if err != nil {
		return err
	}
	if err := to.setSlot(ctx, slot, "importing", from); err != nil {
		return err
	}
	if err := from.setSlot(ctx, slot, "migrating", to); err != nil {
		return err
	}
	for {
		keys, err := from.client.ClusterGetKeysInSlot(ctx, int(slot), 100).Result()
		if err != nil || len(keys) == 0 {
			return err
		}
		for _, k := range keys {
			if err := from.client.Migrate(ctx, host, port, k, 0, startTimeout).Err(); err != nil {
				return err
			}
		}
	}
}

func (n *clusterNode) setSlot(ctx context.Context, slot int64, what string, other *clusterNode) error {
	return n.client.Do(ctx, "cluster", "setslot", slot, what, other.id).Err()
}

func (c *cluster) close() error {
	return c.all(func(i int) error {
		n := c.nodes[i]
		if n == nil {
			return nil
		}
		_ = n.client.Close()
		return n.Server.close()
	})
}

// until calls f until it succeeds or the context ends.
func until(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("timed out: %w", err)
		}
	}
}

// sharedCluster starts lazily: most tests do not need it.
var sharedCluster = lazyCluster{starters: realStarters}

type lazyCluster struct {
	starters starters
	once     sync.Once
	cluster  *cluster
	err      error
}

func (s *lazyCluster) get() (*cluster, error) {
	s.once.Do(func() { s.cluster, s.err = choose(stderr, clusterOptions(s.starters)) })
	return s.cluster, s.err
}

func (s *lazyCluster) close() error {
	s.once.Do(func() { s.err = errors.New("closed") })
	if s.cluster == nil {
		return nil
	}
	return s.cluster.close()
}
