package deploy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	shards = 3
	slots  = 16384
	// nodeTimeout is how long a node may not answer before the others consider it dead.
	nodeTimeout = 1500 * time.Millisecond
)

// A ClusterDeployment is a Redis Cluster of three masters with a replica each. Shard i is nodes i and i+3 for good, whichever is
// the master: replicas do not move between shards.
type ClusterDeployment struct{ *base }

// Cluster starts one whose nodes are processes.
func Cluster(ctx context.Context, config Config) (*ClusterDeployment, error) {
	b, err := newBase(config)
	if err != nil {
		return nil, err
	}
	d := &ClusterDeployment{b}
	if err := d.start(ctx); err != nil {
		return nil, b.failed("a Cluster", err)
	}
	return d, nil
}

func (d *ClusterDeployment) start(ctx context.Context) error {
	settings := append(d.config.persistence(),
		setting{"cluster-enabled", "yes"},
		setting{"cluster-node-timeout", fmt.Sprint(nodeTimeout.Milliseconds())},
		setting{"cluster-allow-replica-migration", "no"},
		setting{"repl-diskless-sync-delay", "0"}, // else a replica waits 5 s for others to share the copy with
	)
	options := redis.UniversalOptions{IsClusterMode: true}
	for i := range 2 * shards {
		plan := nodePlan{name: fmt.Sprintf("node-%d", i+1), settings: settings, args: d.config.Args, bus: true}
		if err := d.add(ctx, plan); err != nil {
			return err
		}
		options.Addrs = append(options.Addrs, d.nodes[i].Addr)
	}
	d.data = len(d.nodes)
	if err := d.form(ctx); err != nil {
		return err
	}
	d.serve(options)
	return d.Settle(ctx)
}

// form makes one Cluster of the nodes.
func (d *ClusterDeployment) form(ctx context.Context) error {
	err := each(d.nodes, func(i int, n *Node) (err error) {
		if n.id, err = n.client.Do(ctx, "cluster", "myid").Text(); err != nil {
			return err
		}
		// Different ones from the start, or the nodes would have to agree on them first.
		if err := n.client.Do(ctx, "cluster", "set-config-epoch", i+1).Err(); err != nil || i >= shards {
			return err
		}
		return n.client.ClusterAddSlotsRange(ctx, slots*i/shards, slots*(i+1)/shards-1).Err()
	})
	if err != nil {
		return err
	}
	for i, n := range d.nodes {
		for _, peer := range d.nodes[i+1:] { // each pair by itself: to hear of a third from a second takes a node seconds
			host, port, err := net.SplitHostPort(peer.Addr)
			if err != nil {
				return err
			}
			if err := n.client.Do(ctx, "cluster", "meet", host, port, peer.server.(*process).port.number+busOffset).Err(); err != nil {
				return err
			}
		}
	}
	return each(d.nodes[shards:], func(i int, n *Node) error {
		return until(ctx, func(ctx context.Context) error { // refused until it has met its master
			return n.client.ClusterReplicate(ctx, d.nodes[i].id).Err()
		})
	})
}

// Settle waits until all running nodes agree on the slots' masters, and each node has the role that follows from that.
func (d *ClusterDeployment) Settle(ctx context.Context) error {
	if err := until(ctx, d.settled); err != nil {
		return fmt.Errorf("settle: %w", err)
	}
	return nil
}

func (d *ClusterDeployment) settled(ctx context.Context) error {
	masters, err := d.agreed(ctx)
	if err != nil {
		return err
	}
	return each(running(d.nodes), func(_ int, n *Node) error {
		master := masters[d.shard(n)]
		if n == master {
			return n.is(ctx, RoleMaster)
		}
		return n.replicates(ctx, master)
	})
}

// agreed returns each shard's master, or an error that says what the running nodes disagree on.
func (d *ClusterDeployment) agreed(ctx context.Context) ([]*Node, error) {
	up := running(d.nodes)
	if len(up) == 0 {
		return nil, errors.New("no node runs")
	}
	owners := make([][]*Node, len(up))
	err := each(up, func(i int, n *Node) (err error) {
		owners[i], err = d.owners(ctx, n)
		return err
	})
	if err != nil {
		return nil, err
	}
	masters := make([]*Node, shards)
	for slot, owner := range owners[0] {
		for i := range owners {
			if owners[i][slot] != owner {
				return nil, fmt.Errorf("slot %d: of %s for %s, of %s for %s", slot, owner, up[0], owners[i][slot], up[i])
			}
		}
		shard := d.shard(owner)
		if masters[shard] != nil && masters[shard] != owner {
			return nil, fmt.Errorf("%s and %s are masters of one shard", masters[shard], owner)
		}
		masters[shard] = owner
	}
	return masters, nil
}

// owners returns each slot's master as n knows it, if n serves.
func (d *ClusterDeployment) owners(ctx context.Context, n *Node) ([]*Node, error) {
	info, err := n.client.ClusterInfo(ctx).Result()
	if err != nil {
		return nil, err
	}
	if !strings.Contains(info, "cluster_state:ok") {
		return nil, errors.New("it does not serve: its cluster_state is fail")
	}
	//lint:ignore SA1019 clients go by this very answer
	ranges, err := n.client.ClusterSlots(ctx).Result()
	if err != nil {
		return nil, err
	}
	owners := make([]*Node, slots)
	for _, r := range ranges {
		owner, err := d.node(r.Nodes[0].Addr)
		if err != nil {
			return nil, err
		}
		for slot := r.Start; slot <= r.End; slot++ {
			owners[slot] = owner
		}
	}
	if i := slices.Index(owners, nil); i >= 0 {
		return nil, fmt.Errorf("slot %d is nobody's", i)
	}
	return owners, nil
}

func (d *ClusterDeployment) shard(n *Node) int { return slices.Index(d.nodes, n) % shards }

// partner is the other node of the shard.
func (d *ClusterDeployment) partner(n *Node) *Node {
	return d.nodes[(slices.Index(d.nodes, n)+shards)%len(d.nodes)]
}

// MasterOf returns the master of the key's slot, once all nodes that run agree on it.
func (d *ClusterDeployment) MasterOf(ctx context.Context, key string) (*Node, error) {
	return d.awaitMasterOf(ctx, key, nil)
}

// ReplicaOf returns the replica of the key's master, whether it runs or not.
func (d *ClusterDeployment) ReplicaOf(ctx context.Context, key string) (*Node, error) {
	master, err := d.MasterOf(ctx, key)
	if err != nil {
		return nil, err
	}
	return d.partner(master), nil
}

// awaitMasterOf waits until the key's master is another node than not.
func (d *ClusterDeployment) awaitMasterOf(ctx context.Context, key string, not *Node) (*Node, error) {
	var master *Node
	err := until(ctx, func(ctx context.Context) error {
		slot, err := d.slot(ctx, key)
		if err != nil {
			return err
		}
		return d.sees(ctx, running(d.nodes), int(slot), func(owner *Node) error {
			master = owner
			if owner == not {
				return fmt.Errorf("the master is still %s", not)
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("await the master of %q: %w", key, err)
	}
	return master, nil
}

// sees returns an error while not all nodes see the same owner of the slot, or it is no master, or right says no.
func (d *ClusterDeployment) sees(ctx context.Context, nodes []*Node, slot int, right func(owner *Node) error) error {
	found := make([]*Node, len(nodes))
	err := each(nodes, func(i int, n *Node) error {
		owners, err := d.owners(ctx, n)
		if err == nil {
			found[i] = owners[slot]
		}
		return err
	})
	if err != nil {
		return err
	}
	if len(slices.Compact(found)) != 1 {
		return fmt.Errorf("slot %d has several masters: %v", slot, found)
	}
	if err := right(found[0]); err != nil {
		return err
	}
	return found[0].is(ctx, RoleMaster)
}

// slot asks any node.
func (d *ClusterDeployment) slot(ctx context.Context, key string) (int64, error) {
	up := running(d.nodes)
	if len(up) == 0 {
		return 0, errors.New("no node runs")
	}
	return up[0].client.ClusterKeySlot(ctx, key).Result()
}

// FailoverShard kills the key's master, awaits the promotion of its replica, starts the old one again and waits until it
// replicates the new one.
func (d *ClusterDeployment) FailoverShard(ctx context.Context, key string) error {
	err := d.change(ctx, key, func(old *Node) error {
		if err := old.Kill(); err != nil {
			return err
		}
		_, err := d.awaitMasterOf(ctx, key, old)
		return errors.Join(err, old.Restart(ctx)) // in any case, so that the Cluster is whole again
	})
	if err != nil {
		return fmt.Errorf("fail over the shard of %q: %w", key, err)
	}
	return nil
}

// Failover has the replica of the key's master take its place by agreement (CLUSTER FAILOVER): no write is lost.
func (d *ClusterDeployment) Failover(ctx context.Context, key string) error {
	err := d.change(ctx, key, func(old *Node) error {
		var asked time.Time // Redis says OK, and gives up silently after 5 s: then it is asked again
		return until(ctx, func(ctx context.Context) error {
			if err := d.partner(old).is(ctx, RoleMaster); err == nil {
				return nil
			}
			if time.Since(asked) > 6*time.Second {
				if err := d.partner(old).client.ClusterFailover(ctx).Err(); err != nil {
					return err
				}
				asked = time.Now()
			}
			return fmt.Errorf("the master is still %s", old)
		})
	})
	if err != nil {
		return fmt.Errorf("fail over by agreement the shard of %q: %w", key, err)
	}
	return nil
}

// PauseMaster freezes the key's master for a while. If that is longer than the node timeout (1.5 s), its replica takes its place.
func (d *ClusterDeployment) PauseMaster(ctx context.Context, key string, pause time.Duration) error {
	err := d.change(ctx, key, func(master *Node) error {
		if err := master.Freeze(); err != nil {
			return err
		}
		select {
		case <-time.After(pause):
			return master.Thaw()
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), master.Thaw())
		}
	})
	if err != nil {
		return fmt.Errorf("pause the master of %q: %w", key, err)
	}
	return nil
}

// change calls f with the key's master. It waits until the Cluster has settled before and after, and for other changes to end.
func (d *ClusterDeployment) change(ctx context.Context, key string, f func(master *Node) error) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	if err := d.Settle(ctx); err != nil {
		return err
	}
	master, err := d.MasterOf(ctx, key)
	if err != nil {
		return err
	}
	if err := f(master); err != nil {
		return err
	}
	return d.Settle(ctx)
}
