package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/chaos/deploy"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// A Fault is something that goes wrong for a while.
type Fault struct {
	Name string
	on   []string // the deployments that can have it; nil: all
	// hold is how long it lasts.
	hold func(Settings, *rand.Rand) time.Duration
	// servers is set for faults that affect a whole server or need healthy ones. One of them is under way at a time.
	servers bool
	// takes is roughly how long injecting and healing take, if that is long.
	takes time.Duration
	// inject makes it happen, and calls effect first with what that may do. It returns a function that heals it.
	inject func(ctx context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (heal func(context.Context) error, err error)
}

// between returns a random time, in multiples of ClaimMinIdle.
func between(least, most float64) func(Settings, *rand.Rand) time.Duration {
	return func(s Settings, dice *rand.Rand) time.Duration {
		return time.Duration((least + (most-least)*dice.Float64()) * float64(s.ClaimMinIdle))
	}
}

func atOnce(Settings, *rand.Rand) time.Duration { return 0 }

// healed is for faults that are over when they have happened.
func healed(context.Context) error { return nil }

func allFaults() []*Fault {
	faults := []*Fault{
		{Name: "consumer-kill", hold: between(0, 2), inject: killPlace((*Bench).consumer)},
		{Name: "producer-kill", hold: between(0, 1), inject: killPlace((*Bench).producer)},
		{Name: "consumer-stop-short", hold: between(0.2, 0.5), inject: stopPlace((*Bench).consumer)},
		{Name: "consumer-stop-long", hold: between(1.5, 3), inject: stopPlace((*Bench).consumer)},
		{Name: "producer-stop", hold: between(0.5, 2), inject: stopPlace((*Bench).producer)},
		{Name: "rolling-restart", hold: atOnce, takes: time.Second, inject: rollingRestart},
		{Name: "rolling-restart-of-everything", servers: true, hold: atOnce, takes: 4 * time.Second, inject: restartEverything},
		// Dead after MaxRetries+2 crashes, each found after ClaimMinIdle.
		{Name: "deadly-message", hold: atOnce, takes: 17 * time.Second, inject: publishDeadly},
		{Name: "redis-restart-always", servers: true, hold: atOnce, inject: restartRedis(deploy.Always)},
		{Name: "redis-restart-everysec", servers: true, hold: atOnce, inject: restartRedis(deploy.EverySec)},
		{Name: "redis-kill-always", servers: true, hold: between(0.1, 2), inject: killRedis(deploy.Always)},
		{Name: "redis-kill-everysec", servers: true, hold: between(0.1, 2), inject: killRedis(deploy.EverySec)},
		{Name: "redis-freeze-short", servers: true, hold: between(0.2, 0.9), inject: freezeRedis},
		// Longer than ClaimMinIdle and the clients' timeouts, including that of a blocking read.
		{Name: "redis-freeze-long", servers: true, hold: between(6, 6.5), inject: freezeRedis},
		{Name: "redis-disconnect", on: []string{container}, servers: true, hold: between(0.2, 3), inject: disconnectRedis},
		{Name: "flushall", hold: atOnce, inject: flushAll},
		{Name: "stream-delete", hold: atOnce, inject: deleteStream},
		{Name: "group-destroy", servers: true, hold: atOnce, inject: destroyGroup},
		{Name: "client-kill", hold: atOnce, inject: killClients},
		{Name: "out-of-memory", servers: true, hold: between(0.5, 2), inject: fillMemory},
		{Name: "partition", hold: between(1.5, 3), inject: partition},
		{Name: "slow", hold: between(1, 2), inject: slowDown},
	}
	faults = append(faults, topologyFaults()...)
	for _, place := range []string{beforeReply, inMidReply, afterReply} {
		faults = append(faults, &Fault{Name: "cut-" + place + "-reply", hold: between(0.5, 2), inject: cutReplies(place)})
	}
	return faults
}

// topologyFaults are those of a deployment. How long they last is up to the servers.
func topologyFaults() []*Fault {
	return []*Fault{
		{Name: "failover", on: []string{sentinel}, servers: true, hold: atOnce, takes: 4 * time.Second,
			inject: change(rules.Everything, sentinelOf((*deploy.SentinelDeployment).Failover))},
		{Name: "master-kill", on: []string{sentinel}, servers: true, hold: atOnce, takes: 5 * time.Second,
			inject: change(rules.Everything, sentinelOf((*deploy.SentinelDeployment).KillMaster))},
		{Name: "master-freeze", on: []string{sentinel}, servers: true, hold: atOnce, takes: 5 * time.Second,
			inject: change(rules.Everything, sentinelOf((*deploy.SentinelDeployment).FreezeMaster))},
		// By agreement, and so without loss, like the move of a slot.
		{Name: "shard-failover", on: []string{cluster}, servers: true, hold: atOnce, takes: 1 * time.Second,
			inject: change(nil, clusterOf((*deploy.ClusterDeployment).Failover))},
		{Name: "slot-move", on: []string{cluster}, servers: true, hold: atOnce, takes: 1 * time.Second,
			inject: change(nil, moveSlot)},
		{Name: "shard-kill", on: []string{cluster}, servers: true, hold: atOnce, takes: 4 * time.Second,
			inject: change(rules.Everything, clusterOf((*deploy.ClusterDeployment).FailoverShard))},
		{Name: "shard-freeze", on: []string{cluster}, servers: true, hold: atOnce, takes: 5 * time.Second,
			inject: change(rules.Everything, clusterOf(freezeShard))},
	}
}

// insist calls f until it succeeds, because another fault may be under way.
func insist(ctx context.Context, f func(context.Context) error) error {
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		if wait(ctx, 100*time.Millisecond) != nil {
			return err
		}
	}
}

type changeTopology func(ctx context.Context, b *Bench, key string) error

func change(loses []string, f changeTopology) func(context.Context, *Bench, Strike, func(rules.Effect)) (func(context.Context) error, error) {
	return func(ctx context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
		key := pick(strike, topics).Name
		effect(rules.Effect{Target: []string{key}, Loses: loses, Breaks: true})
		return healed, f(ctx, b, key)
	}
}

func sentinelOf(f func(*deploy.SentinelDeployment, context.Context) error) changeTopology {
	return func(ctx context.Context, b *Bench, _ string) error {
		return f(b.deployment.(*deploy.SentinelDeployment), ctx)
	}
}

// moveSlot moves the slot again if a move was interrupted.
func moveSlot(ctx context.Context, b *Bench, key string) error {
	b.moving.Lock()
	defer b.moving.Unlock()
	return insist(ctx, func(ctx context.Context) error {
		return b.deployment.(*deploy.ClusterDeployment).LiveMoveSlot(ctx, key)
	})
}

func clusterOf(f func(*deploy.ClusterDeployment, context.Context, string) error) changeTopology {
	return func(ctx context.Context, b *Bench, key string) error {
		return f(b.deployment.(*deploy.ClusterDeployment), ctx, key)
	}
}

// freezeShard lasts for more than two of the Cluster's node timeouts: a replica takes over.
func freezeShard(d *deploy.ClusterDeployment, ctx context.Context, key string) error {
	return d.PauseMaster(ctx, key, 4*time.Second)
}

type choosePlace func(*Bench, Strike) *Place

func killPlace(choose choosePlace) func(context.Context, *Bench, Strike, func(rules.Effect)) (func(context.Context) error, error) {
	return func(_ context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
		place := choose(b, strike)
		effect(rules.Effect{Target: []string{place.name()}, Local: true})
		return func(context.Context) error { return place.start() }, place.kill()
	}
}

func stopPlace(choose choosePlace) func(context.Context, *Bench, Strike, func(rules.Effect)) (func(context.Context) error, error) {
	return func(_ context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
		place := choose(b, strike)
		effect(rules.Effect{Target: []string{place.name()}, Local: true})
		return func(context.Context) error { return place.thaw() }, place.stop()
	}
}

func rollingRestart(_ context.Context, b *Bench, _ Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	effect(rules.Effect{Target: names(b.consumers), Local: true})
	for _, place := range b.consumers {
		if err := errors.Join(place.close(), place.start()); err != nil {
			return nil, err
		}
	}
	return healed, nil
}

// loses returns what may be lost by a fault of one of the servers: nothing if it is alone and writes to disk before it
// answers. Otherwise a replica that does not have everything yet may be the next master.
func (b *Bench) loses(aof deploy.AOF) []string {
	alone := b.settings.Deployment == single || b.settings.Deployment == container
	if alone && aof == deploy.Always {
		return nil
	}
	return rules.Everything
}

func (b *Bench) setAOF(ctx context.Context, aof deploy.AOF) error {
	return insist(ctx, func(ctx context.Context) error {
		return b.eachNode(ctx, func(ctx context.Context, n *deploy.Node) error {
			return n.Client().ConfigSet(ctx, "appendfsync", string(aof)).Err()
		})
	})
}

func restartRedis(aof deploy.AOF) func(context.Context, *Bench, Strike, func(rules.Effect)) (func(context.Context) error, error) {
	return func(ctx context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
		node := pick(strike, b.deployment.Nodes())
		// A clean shutdown loses nothing, whatever appendfsync is, unless a replica takes over.
		effect(rules.Effect{Target: []string{node.Name}, Loses: b.loses(deploy.Always), Breaks: true})
		if err := b.setAOF(ctx, aof); err != nil {
			return nil, err
		}
		return b.deployment.Settle, node.Restart(ctx)
	}
}

// restartEverything restarts one after the other, as an upgrade of everything does.
func restartEverything(ctx context.Context, b *Bench, _ Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	effect(rules.Effect{Loses: b.loses(deploy.Always), Breaks: true})
	for _, place := range slices.Concat(b.consumers, b.producers) {
		if err := errors.Join(place.close(), place.start()); err != nil {
			return nil, err
		}
	}
	nodes := b.deployment.Nodes()
	if d, ok := b.deployment.(*deploy.SentinelDeployment); ok {
		nodes = append(nodes, d.Sentinels()...)
	}
	for _, node := range nodes {
		if err := errors.Join(node.Restart(ctx), b.deployment.Settle(ctx)); err != nil {
			return nil, err
		}
	}
	return healed, nil
}

// publishDeadly publishes a message that ends each process that handles it, and waits until it is dead-lettered.
func publishDeadly(ctx context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	topic := pick(strike, topics).Name
	effect(rules.Effect{Target: []string{topic}, Local: true})
	for try := 1; ; try++ {
		uuid := fmt.Sprintf("%s-%d-%d", rules.Deadly, strike.Number, try)
		kind, err := publish(b.journal, b.publisher, b.settings, &call{topic: topic, uuids: []string{uuid}})
		if kind != rules.Refused {
			break
		}
		if wait(ctx, 100*time.Millisecond) != nil {
			return nil, err
		}
	}
	return func(ctx context.Context) error {
		return insist(ctx, func(ctx context.Context) error { return b.allDead(ctx, topic) })
	}, nil
}

// allDead returns an error while the topic has a deadly message that is not dead-lettered.
func (b *Bench) allDead(ctx context.Context, topic string) error {
	pending, err := pendingOf(ctx, b.deployment.Client(), topic)
	if err != nil {
		return err
	}
	entries, err := entriesOf(ctx, b.deployment.Client(), topic)
	if err != nil {
		return err
	}
	p, err := progressOf(ctx, b.deployment.Client(), topic)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		waits := rules.CompareIDs(entry.ID, p.delivered) > 0 || slices.ContainsFunc(pending, func(p rules.Pending) bool { return p.ID == entry.ID })
		if rules.Nature(entry.UUID) == rules.Deadly && waits {
			return fmt.Errorf("%s of %s is still there", entry.UUID, topic)
		}
	}
	return nil
}

// disconnectRedis takes the container off its network, and puts it back with the same address.
func disconnectRedis(_ context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	node := pick(strike, b.deployment.Nodes())
	effect(rules.Effect{Target: []string{node.Name}, Breaks: true})
	heal := func(ctx context.Context) error {
		return errors.Join(node.Connect(), b.deployment.Settle(ctx))
	}
	return heal, node.Disconnect()
}

func killRedis(aof deploy.AOF) func(context.Context, *Bench, Strike, func(rules.Effect)) (func(context.Context) error, error) {
	return func(ctx context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
		node := pick(strike, b.deployment.Nodes())
		effect(rules.Effect{Target: []string{node.Name}, Loses: b.loses(aof), Breaks: true})
		if err := b.setAOF(ctx, aof); err != nil {
			return nil, err
		}
		heal := func(ctx context.Context) error {
			return errors.Join(node.Restart(ctx), b.deployment.Settle(ctx))
		}
		return heal, node.Kill()
	}
}

func freezeRedis(_ context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	node := pick(strike, b.deployment.Nodes())
	effect(rules.Effect{Target: []string{node.Name}, Loses: b.loses(deploy.Always), Breaks: true})
	heal := func(ctx context.Context) error {
		return errors.Join(node.Thaw(), b.deployment.Settle(ctx))
	}
	return heal, node.Freeze()
}

func flushAll(ctx context.Context, b *Bench, _ Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	effect(rules.Effect{Loses: rules.Everything, Destroys: true})
	return healed, insist(ctx, func(ctx context.Context) error {
		return b.eachMaster(ctx, func(ctx context.Context, n *deploy.Node) error { return n.Client().FlushAll(ctx).Err() })
	})
}

func deleteStream(ctx context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	topic := pick(strike, topics).Name
	effect(rules.Effect{Target: []string{topic}, Loses: []string{topic}, Destroys: true, Stream: true})
	return healed, insist(ctx, func(ctx context.Context) error { return b.deployment.Client().Del(ctx, topic).Err() })
}

// destroyGroup notes the holders of pending entries, because nobody restores those of dead consumers.
func destroyGroup(ctx context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	topic := pick(strike, topics).Name
	client := b.deployment.Client()
	var pending []rules.Pending
	err := insist(ctx, func(ctx context.Context) (err error) {
		pending, err = pendingOf(ctx, client, topic)
		return err
	})
	if err != nil {
		return nil, err
	}
	held := make(map[string]string)
	for _, p := range pending {
		held[p.ID] = p.Consumer
	}
	effect(rules.Effect{Target: []string{topic}, Loses: []string{topic}, Group: true, Held: held})
	return healed, insist(ctx, func(ctx context.Context) error {
		err := client.XGroupDestroy(ctx, topic, group).Err()
		if noGroup(err) { // another fault has destroyed it
			return nil
		}
		return err
	})
}

func killClients(ctx context.Context, b *Bench, _ Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	effect(rules.Effect{Breaks: true})
	b.moving.Lock()
	defer b.moving.Unlock()
	return healed, insist(ctx, func(ctx context.Context) error {
		return b.eachNode(ctx, func(ctx context.Context, n *deploy.Node) error {
			return n.Client().ClientKillByFilter(ctx, "TYPE", "normal", "SKIPME", "yes").Err()
		})
	})
}

// fillMemory sets maxmemory to the used memory: commands that need memory are refused, reading and acking are not.
func fillMemory(ctx context.Context, b *Bench, _ Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	effect(rules.Effect{})
	limit := func(bytes func(*deploy.Node) (string, error)) func(context.Context) error {
		return func(ctx context.Context) error {
			return insist(ctx, func(ctx context.Context) error {
				return b.eachNode(ctx, func(ctx context.Context, n *deploy.Node) error {
					value, err := bytes(n)
					if err != nil {
						return err
					}
					return n.Client().ConfigSet(ctx, "maxmemory", value).Err()
				})
			})
		}
	}
	used := func(n *deploy.Node) (string, error) { return usedMemory(ctx, n.Client()) }
	unlimited := func(*deploy.Node) (string, error) { return "0", nil }
	return limit(unlimited), limit(used)(ctx)
}

func usedMemory(ctx context.Context, client *redis.Client) (string, error) {
	text, err := client.Info(ctx, "memory").Result()
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "used_memory:"); ok {
			bytes, err := strconv.ParseInt(value, 10, 64)
			return strconv.FormatInt(bytes/2, 10), err
		}
	}
	return "", errors.New("INFO memory has no used_memory")
}

// partition blocks all traffic between one consumer and all servers, in both directions; its connections stay open.
func partition(_ context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	process := []string{b.consumer(strike).name()}
	effect(rules.Effect{Target: process, Isolates: process, Breaks: true})
	heal := func(context.Context) error { return b.network.cure(strike, process) }
	return heal, b.network.poison(strike, process, nothing("upstream"), nothing("downstream"))
}

func nothing(direction string) toxic {
	return toxic{Name: "nothing-" + direction, Type: "timeout", Stream: direction, Toxicity: 1, Attributes: map[string]any{"timeout": 0}}
}

// slowDown lets 1 KB/s through between one consumer and the servers: too little for its reads, so it is cut off.
func slowDown(_ context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
	process := []string{b.consumer(strike).name()}
	effect(rules.Effect{Target: process, Isolates: process, Breaks: true})
	heal := func(context.Context) error { return b.network.cure(strike, process) }
	return heal, b.network.poison(strike, process,
		toxic{Name: "crawl", Type: "bandwidth", Stream: "downstream", Toxicity: 1, Attributes: map[string]any{"rate": 1}},
		toxic{Name: "delay", Type: "latency", Stream: "upstream", Toxicity: 1, Attributes: map[string]any{"latency": 300, "jitter": 200}})
}

const cutRate = 0.1

// cutReplies closes connections of all processes, at one reply in ten.
func cutReplies(place string) func(context.Context, *Bench, Strike, func(rules.Effect)) (func(context.Context) error, error) {
	return func(_ context.Context, b *Bench, strike Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
		processes := append(names(b.consumers), names(b.producers)...)
		effect(rules.Effect{Breaks: true})
		heal := func(context.Context) error { return b.network.cure(strike, processes) }
		return heal, b.network.poison(strike, processes, toxic{
			Name: "cut", Type: cutType, Stream: "downstream", Toxicity: 1, Attributes: map[string]any{"place": place, "rate": cutRate},
		})
	}
}

// eachNode calls f for all nodes that run.
func (b *Bench) eachNode(ctx context.Context, f func(context.Context, *deploy.Node) error) error {
	var errs []error
	for _, n := range b.deployment.Nodes() {
		if !n.Running() {
			continue
		}
		if err := f(ctx, n); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", n.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (b *Bench) eachMaster(ctx context.Context, f func(context.Context, *deploy.Node) error) error {
	return b.eachNode(ctx, func(ctx context.Context, n *deploy.Node) error {
		role, err := n.Role(ctx)
		if err != nil || role != deploy.RoleMaster {
			return err
		}
		return f(ctx, n)
	})
}
