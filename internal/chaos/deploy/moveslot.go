package deploy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

const (
	// moveBatch is how many keys one MIGRATE takes, as redis-cli's pipeline.
	moveBatch = 10
	// moveTimeout is redis-cli's timeout of a MIGRATE, which blocks both servers meanwhile.
	moveTimeout = 60 * time.Second
)

// LiveMoveSlot moves the slot of the key, with all of its keys, while clients use them: to the next shard, or back to its first
// one if it was moved before. It returns when all nodes know. Meanwhile clients are told ASK, then MOVED.
//
// The order is redis-cli's: wherever it is interrupted, the slot has one owner, and another call continues from there. Redis
// itself does not survive a failover of the source in the middle: the new source knows of no move, and recreates the keys that
// have moved. The move then fails (BUSYKEY), and only an operator can resolve that.
//
// MIGRATE blocks source and target while a key is on its way. If a stream takes longer than the node timeout, the other nodes
// consider both dead.
func (d *ClusterDeployment) LiveMoveSlot(ctx context.Context, key string) error {
	var to *Node
	err := d.change(ctx, key, func(from *Node) error {
		slot, err := d.slot(ctx, key)
		if err != nil {
			return err
		}
		if to, err = d.target(ctx, from, int(slot)); err != nil {
			return err
		}
		return d.moveSlot(ctx, slot, from, to)
	})
	if err != nil {
		return fmt.Errorf("move the slot of %q to %v: %w", key, to, err)
	}
	return nil
}

// target returns the master that the slot goes to.
func (d *ClusterDeployment) target(ctx context.Context, from *Node, slot int) (*Node, error) {
	masters, err := d.agreed(ctx)
	if err != nil {
		return nil, err
	}
	shard := home(slot)
	if shard == d.shard(from) {
		shard = (shard + 1) % shards
	}
	if masters[shard] == nil {
		return nil, fmt.Errorf("shard %d has no slots, so no master", shard+1)
	}
	return masters[shard], nil
}

// home returns the shard that had the slot at first.
func home(slot int) int {
	shard := 0
	for slot >= slots*(shard+1)/shards {
		shard++
	}
	return shard
}

func (d *ClusterDeployment) moveSlot(ctx context.Context, slot int64, from, to *Node) error {
	// The target first: it sends back clients that come before.
	if err := setSlot(ctx, to, slot, "importing", from); err != nil {
		return err
	}
	if err := setSlot(ctx, from, slot, "migrating", to); err != nil {
		return err
	}
	if err := moveKeys(ctx, slot, from, to); err != nil {
		return err
	}
	// The target first again: between the two calls the source sends clients there, which must not be sent back; and if this is
	// interrupted here, the target has told the source. The other masters would hear of it too, but only after a while.
	if err := setSlot(ctx, to, slot, "node", to); err != nil {
		return err
	}
	if err := setSlot(ctx, from, slot, "node", to); err != nil {
		return err
	}
	for _, n := range running(d.nodes) {
		if n == to || n == from || n.is(ctx, RoleMaster) != nil {
			continue
		}
		if err := setSlot(ctx, n, slot, "node", to); err != nil {
			return err
		}
	}
	return until(ctx, func(ctx context.Context) error {
		return d.sees(ctx, running(d.nodes), int(slot), func(owner *Node) error {
			if owner != to {
				return fmt.Errorf("slot %d is still of %s", slot, owner)
			}
			return nil
		})
	})
}

func setSlot(ctx context.Context, n *Node, slot int64, what string, other *Node) error {
	if err := n.client.Do(ctx, "cluster", "setslot", slot, what, other.id).Err(); err != nil {
		return fmt.Errorf("%s: setslot %d %s: %w", n, slot, what, err)
	}
	return nil
}

// moveKeys moves keys until none is left. None is added while the slot is migrating: new ones are created at the target.
func moveKeys(ctx context.Context, slot int64, from, to *Node) error {
	host, port, err := net.SplitHostPort(to.Addr)
	if err != nil {
		return err
	}
	client := from.client.WithTimeout(moveTimeout)
	for {
		keys, err := client.ClusterGetKeysInSlot(ctx, int(slot), moveBatch).Result()
		if err != nil || len(keys) == 0 {
			return err
		}
		migrate := []any{"migrate", host, port, "", 0, moveTimeout.Milliseconds(), "keys"}
		for _, k := range keys {
			migrate = append(migrate, k)
		}
		// NOKEY is fine: the keys expired or were deleted.
		if err := client.Do(ctx, migrate...).Err(); err != nil {
			return errors.Join(fmt.Errorf("migrate %q from %s to %s", keys, from, to), err)
		}
	}
}
