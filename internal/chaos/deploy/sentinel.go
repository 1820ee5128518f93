package deploy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	masterName = "chaos"
	sentinels  = 3
	quorum     = 2

	// downAfter is how long a master may not answer before it is considered dead.
	downAfter = time.Second
	// failoverTimeout bounds each part of a failover; a failed one is repeated after twice as long.
	failoverTimeout = 3 * time.Second
)

// A SentinelDeployment is a master, two replicas, and three Sentinels that elect another master.
type SentinelDeployment struct{ *base }

// Sentinel starts one whose servers are processes.
func Sentinel(ctx context.Context, config Config) (*SentinelDeployment, error) {
	b, err := newBase(config)
	if err != nil {
		return nil, err
	}
	d := &SentinelDeployment{b}
	if err := d.start(ctx); err != nil {
		return nil, b.failed("a Sentinel deployment", err)
	}
	return d, nil
}

func (d *SentinelDeployment) start(ctx context.Context) error {
	settings := append(d.config.persistence(),
		setting{"repl-diskless-sync-delay", "0"}, // else each replica waits 5 s for others to share the copy with
	)
	for i := range 3 {
		plan := nodePlan{name: fmt.Sprintf("redis-%d", i+1), settings: settings, args: d.config.Args}
		if i > 0 {
			plan.settings = append(plan.settings[:len(plan.settings):len(plan.settings)], setting{"replicaof", configAddr(d.nodes[0])})
		}
		if err := d.add(ctx, plan); err != nil {
			return err
		}
	}
	d.data = len(d.nodes)
	options := redis.UniversalOptions{MasterName: masterName}
	for i := range sentinels {
		if err := d.add(ctx, nodePlan{name: fmt.Sprintf("sentinel-%d", i+1), args: []string{"--sentinel"}, settings: []setting{
			{"sentinel monitor", fmt.Sprintf("%s %s %d", masterName, configAddr(d.nodes[0]), quorum)},
			{"sentinel down-after-milliseconds", fmt.Sprintf("%s %d", masterName, downAfter.Milliseconds())},
			{"sentinel failover-timeout", fmt.Sprintf("%s %d", masterName, failoverTimeout.Milliseconds())},
			{"sentinel parallel-syncs", masterName + " 2"},
		}}); err != nil {
			return err
		}
		n := d.nodes[len(d.nodes)-1]
		n.started = func(ctx context.Context) error { return hurry(ctx, n) }
		if err := n.started(ctx); err != nil {
			return err
		}
		options.Addrs = append(options.Addrs, n.Addr)
	}
	d.serve(options)
	return d.Settle(ctx)
}

func (b *base) add(ctx context.Context, plan nodePlan) error {
	n, err := b.startNode(ctx, plan)
	if err != nil {
		return fmt.Errorf("%s: %w", plan.name, err)
	}
	b.nodes = append(b.nodes, n)
	return nil
}

// configAddr is how a config names a server: with a space, not a colon.
func configAddr(n *Node) string { return strings.Replace(n.Addr, ":", " ", 1) }

// hurry makes a Sentinel look more often than every 2 s and 10 s, with which an old master remains a second one for some 10 s.
// One that lost the CPU for 2 s distrusts its clock for 3 s, not 30 s. And a new master gets its first PING before downAfter has
// passed: with 1 s for both, Sentinel considered it dead 1 s after each failover, and often started another one. Only
// SENTINEL DEBUG can set these.
func hurry(ctx context.Context, n *Node) error {
	return n.client.Do(ctx, "sentinel", "debug", "ping-period", 200, "publish-period", 500, "info-period", 500, "tilt-period", 3000).Err()
}

// Sentinels returns the Sentinels, which Nodes does not.
func (d *SentinelDeployment) Sentinels() []*Node { return append([]*Node(nil), d.nodes[d.data:]...) }

// Master returns the master, once all running Sentinels and the server itself agree on it.
func (d *SentinelDeployment) Master(ctx context.Context) (*Node, error) {
	return d.AwaitMaster(ctx, nil)
}

// AwaitMaster returns the master, once it is a different one than not.
func (d *SentinelDeployment) AwaitMaster(ctx context.Context, not *Node) (*Node, error) {
	var master *Node
	err := until(ctx, func(ctx context.Context) (err error) {
		master, err = d.agreed(ctx)
		if err == nil && master == not {
			err = fmt.Errorf("the master is still %s", not)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("await a master: %w", err)
	}
	return master, nil
}

// agreed returns the master, or an error that says what the servers disagree on.
func (d *SentinelDeployment) agreed(ctx context.Context) (*Node, error) {
	masters := map[string]bool{}
	for _, s := range running(d.Sentinels()) {
		answer, err := s.client.Do(ctx, "sentinel", "get-master-addr-by-name", masterName).StringSlice()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s, err)
		}
		masters[net.JoinHostPort(answer[0], answer[1])] = true
	}
	if len(masters) != 1 {
		return nil, fmt.Errorf("the Sentinels do not agree on one master: %v", masters)
	}
	for addr := range masters {
		master, err := d.node(addr)
		if err != nil {
			return nil, err
		}
		return master, master.is(ctx, RoleMaster)
	}
	panic("unreachable")
}

// Settle waits until the Sentinels that run agree on a master and know each other and the replicas, and all servers that run
// replicate it.
func (d *SentinelDeployment) Settle(ctx context.Context) error {
	if err := until(ctx, d.settled); err != nil {
		return fmt.Errorf("settle: %w", err)
	}
	return nil
}

func (d *SentinelDeployment) settled(ctx context.Context) error {
	master, err := d.agreed(ctx)
	if err != nil {
		return err
	}
	for _, n := range running(d.Nodes()) {
		if n == master {
			continue
		}
		if err := n.replicates(ctx, master); err != nil {
			return err
		}
	}
	for _, s := range running(d.Sentinels()) {
		if err := d.calm(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// calm returns an error while the Sentinel could not lead a failover: one is under way, it does not know the others yet, or it
// considers a running server dead.
func (d *SentinelDeployment) calm(ctx context.Context, s *Node) error {
	m, err := s.client.Do(ctx, "sentinel", "master", masterName).Result()
	if err != nil {
		return err
	}
	fields, err := stringMap(m)
	if err != nil {
		return err
	}
	if fields["flags"] != "master" || fields["num-other-sentinels"] != strconv.Itoa(sentinels-1) {
		return fmt.Errorf("%s: the master is %q, other Sentinels %s", s, fields["flags"], fields["num-other-sentinels"])
	}
	replicas, err := s.client.Do(ctx, "sentinel", "replicas", masterName).Slice()
	if err != nil {
		return err
	}
	fine := 0
	for _, r := range replicas {
		fields, err := stringMap(r)
		if err != nil {
			return err
		}
		if fields["flags"] == "slave" && fields["master-link-status"] == "ok" {
			fine++
		}
	}
	if want := len(running(d.Nodes())) - 1; fine < want {
		return fmt.Errorf("%s: %d of %d replicas are fine", s, fine, want)
	}
	return nil
}

// stringMap turns a reply of names and values into a map, in either version of the protocol.
func stringMap(reply any) (map[string]string, error) {
	fields := map[string]string{}
	switch reply := reply.(type) {
	case map[any]any:
		for name, value := range reply {
			fields[fmt.Sprint(name)] = fmt.Sprint(value)
		}
	case []any:
		for i := 0; i+1 < len(reply); i += 2 {
			fields[fmt.Sprint(reply[i])] = fmt.Sprint(reply[i+1])
		}
	default:
		return nil, fmt.Errorf("names and values expected: %T", reply)
	}
	return fields, nil
}

// Failover makes a Sentinel promote a replica while the master is healthy, and waits until all replicate the new one. It waits
// for Settle first, because Sentinel refuses until then.
func (d *SentinelDeployment) Failover(ctx context.Context) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	if err := d.failover(ctx); err != nil {
		return fmt.Errorf("failover: %w", err)
	}
	return nil
}

func (d *SentinelDeployment) failover(ctx context.Context) error {
	if err := d.Settle(ctx); err != nil {
		return err
	}
	old, err := d.Master(ctx)
	if err != nil {
		return err
	}
	var asked time.Time // a failover that failed is not reported, so it is asked for again
	err = until(ctx, func(ctx context.Context) error {
		master, err := d.agreed(ctx)
		if err == nil && master != old {
			return nil
		}
		if time.Since(asked) > 2*failoverTimeout {
			if err := d.Sentinels()[0].client.Do(ctx, "sentinel", "failover", masterName).Err(); err != nil {
				return err
			}
			asked = time.Now()
		}
		return errors.Join(err, fmt.Errorf("the master is still %s", old))
	})
	if err != nil {
		return err
	}
	return d.Settle(ctx)
}

// KillMaster kills the master, awaits a new one, starts the old one again and waits until it is a replica.
func (d *SentinelDeployment) KillMaster(ctx context.Context) error {
	return d.replaceMaster(ctx, "kill the master", (*Node).Kill, func(n *Node) error { return n.Restart(ctx) })
}

// FreezeMaster freezes the master, awaits a new one, thaws the old one and waits until it is a replica. Until Sentinel makes
// it one, the old one is a second master and accepts writes, which are lost.
func (d *SentinelDeployment) FreezeMaster(ctx context.Context) error {
	return d.replaceMaster(ctx, "freeze the master", (*Node).Freeze, (*Node).Thaw)
}

func (d *SentinelDeployment) replaceMaster(ctx context.Context, what string, end, back func(*Node) error) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	old, err := d.Master(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := end(old); err != nil {
		return err
	}
	_, err = d.AwaitMaster(ctx, old)
	if err := errors.Join(err, back(old)); err != nil { // in any case, or it stays frozen
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := d.Settle(ctx); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
