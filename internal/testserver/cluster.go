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

	// A new Cluster serves once its masters have seen each other for as long as the node timeout, and 2 s after their start at
	// the earliest. So it starts with a timeout of that length, and gets one later that a busy machine does not exceed.
	formingTimeout = "2000" // ms
	nodeTimeout    = "15000"
)

// Cluster returns the Redis Cluster of three masters that the whole test binary shares, and starts it at first use; without
// one, t is skipped as by RequireReal. Like Private's servers it is never at REDIS_ADDR. Keys must be t's own, topology is
// everybody's: a test may move slots, and must not stop masters.
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

// A ClusterServer is the shared Cluster as one test has it.
type ClusterServer struct {
	*cluster
	tb testing.TB
}

// Client returns a client of the Cluster, which the test's cleanup closes; options change what it is made from. Hooks that are
// added to it see a command once, wherever it is redirected to, but not what is sent to a node's own client (MasterForKey).
// Those that OnNewNode adds to the nodes' clients see all that is sent.
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

// MoveSlot moves the slot of a key, and all keys in it, to the next master. When the keys are there and the slot is not yet,
// halfway (which may be nil) is called: until it returns, clients are told ASK. When MoveSlot returns, all masters know.
func (c *ClusterServer) MoveSlot(key string, halfway func()) {
	c.tb.Helper()
	if err := c.moveSlot(key, halfway); err != nil {
		c.tb.Fatalf("testserver: moving the slot of %q: %v", key, err)
	}
}

// cluster is a Cluster of servers of ours.
type cluster struct {
	nodes  []*clusterNode
	moving sync.Mutex // one slot at a time
}

type clusterNode struct {
	*Server
	client *redis.Client
	id     string
	inside string // where the other nodes reach it, and say that it is
}

// outside returns where tests reach the node that the others know as inside.
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

// startCluster makes a Cluster of servers that start starts with the arguments given.
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

// all calls f for all nodes at once.
func (c *cluster) all(f func(i int) error) error {
	errs := make([]error, len(c.nodes))
	var calls sync.WaitGroup
	for i := range c.nodes {
		calls.Go(func() { errs[i] = f(i) })
	}
	calls.Wait()
	return errors.Join(errs...)
}

// form makes one Cluster of the nodes and waits until each of them serves, and knows who has which slots.
func (c *cluster) form() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	err := c.all(func(i int) (err error) {
		n := c.nodes[i]
		if n.id, err = n.client.Do(ctx, "cluster", "myid").Text(); err != nil {
			return err
		}
		// Different ones from the start, or the nodes would have to agree on them first.
		if err := n.client.Do(ctx, "cluster", "set-config-epoch", i+1).Err(); err != nil {
			return err
		}
		return n.client.ClusterAddSlotsRange(ctx, slotCount*i/clusterMasters, slotCount*(i+1)/clusterMasters-1).Err()
	})
	if err != nil {
		return err
	}
	for i, n := range c.nodes {
		for _, peer := range c.nodes[i+1:] { // each pair by itself: to hear of a third from a second takes a node seconds
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

// serves returns an error while the node does not serve, or does not know which of the nodes has each slot.
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

// master returns which of the nodes has the slots; -1 if none.
func (c *cluster) master(s redis.ClusterSlot) int {
	return slices.IndexFunc(c.nodes, func(n *clusterNode) bool { return n.inside == s.Nodes[0].Addr })
}

// masterOf returns which of the nodes has the slot, as n knows it.
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
	return -1, fmt.Errorf("slot %d is nobody's", slot)
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
	from, err := c.masterOf(ctx, c.nodes[0], slot)
	if err != nil {
		return err
	}
	to := (from + 1) % len(c.nodes)
	if err := c.moveKeys(ctx, slot, c.nodes[from], c.nodes[to]); err != nil {
		return err
	}
	if halfway != nil {
		halfway()
	}
	ctx, cancel = context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	// The new master first: should a client ask it in between, it must not be sent back.
	for _, i := range []int{to, from, (to + 1) % len(c.nodes)} {
		if err := c.nodes[i].setSlot(ctx, slot, "node", c.nodes[to]); err != nil {
			return err
		}
	}
	return c.all(func(i int) error {
		return until(ctx, func() error {
			if master, err := c.masterOf(ctx, c.nodes[i], slot); err != nil || master != to {
				return fmt.Errorf("node %d takes %d for the master: %v", i, master, err)
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
			return fmt.Errorf("waited in vain: %w", err)
		}
	}
}

// sharedCluster is lazy: most tests need none.
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
