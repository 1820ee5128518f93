package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/chaos/deploy"
)

// A scenario is a way to run Redis, a way to publish, and a way to lose the server.
type scenario struct {
	name     string
	sentinel bool
	aof      deploy.AOF
	args     []string
	wait     int  // the number of replicas, of two, for which a WAIT follows each Publish
	cut      bool // the replicas get nothing for cutFor before the master is killed
}

// cutFor is longer than min-replicas-max-lag and shorter than Sentinel takes a replica's data for too old (10 s).
const cutFor = 3 * time.Second

var minReplicas = []string{"--min-replicas-to-write", "1", "--min-replicas-max-lag", "1"}

var cases = []scenario{
	{name: "single, appendfsync everysec, killed", aof: deploy.EverySec},
	{name: "single, appendfsync always, killed", aof: deploy.Always},
	{name: "single, no persistence, killed"},
	{name: "Sentinel, master killed", sentinel: true, aof: deploy.EverySec},
	{name: "Sentinel, min-replicas-to-write 1, max-lag 1, master killed", sentinel: true, aof: deploy.EverySec, args: minReplicas},
	{name: "Sentinel, WAIT 1, master killed", sentinel: true, aof: deploy.EverySec, wait: 1},
	{name: "Sentinel, master cut, then killed", sentinel: true, aof: deploy.EverySec, cut: true},
	{name: "Sentinel, min-replicas-to-write 1, max-lag 1, master cut, then killed", sentinel: true, aof: deploy.EverySec, args: minReplicas, cut: true},
	{name: "Sentinel, WAIT 1, master cut, then killed", sentinel: true, aof: deploy.EverySec, wait: 1, cut: true},
	{name: "Sentinel, WAIT 2, master cut, then killed", sentinel: true, aof: deploy.EverySec, wait: 2, cut: true},
}

// measure repeats a scenario on one deployment, with a stream of its own for each run.
func (s scenario) measure(ctx context.Context, runs int) (losses []loss, err error) {
	d, err := s.deploy(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	for i := range runs {
		l, err := s.run(ctx, d, fmt.Sprintf("run-%d", i+1))
		if err != nil {
			return nil, fmt.Errorf("run %d: %w", i+1, err)
		}
		losses = append(losses, l)
	}
	return losses, nil
}

func (s scenario) deploy(ctx context.Context) (deploy.Deployment, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	config := deploy.Config{AOF: s.aof, Args: s.args}
	if s.sentinel {
		return deploy.Sentinel(ctx, config)
	}
	return deploy.Single(ctx, config)
}

func (s scenario) run(ctx context.Context, d deploy.Deployment, topic string) (loss, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	p, err := newProducer(d.Options(), topic, s.wait)
	if err != nil {
		return loss{}, err
	}
	go p.run()
	killed, err := s.strike(ctx, d)
	p.end()
	if err != nil {
		return loss{}, err
	}
	there, err := stored(ctx, d.Client(), topic)
	if err != nil {
		return loss{}, err
	}
	return p.loss(there, killed), nil
}

// strike lets the producer run and kills the server. It returns the time of the kill, once a master serves again and the
// deployment has settled.
func (s scenario) strike(ctx context.Context, d deploy.Deployment) (killed time.Time, err error) {
	// At random within everysec's second.
	if err := pass(ctx, time.Second+rand.N(time.Second)); err != nil {
		return time.Time{}, err
	}
	group, ok := d.(*deploy.SentinelDeployment)
	if !ok {
		node := d.Nodes()[0]
		killed = time.Now()
		return killed, errors.Join(node.Kill(), node.Restart(ctx))
	}
	old, err := group.Master(ctx)
	if err != nil {
		return time.Time{}, err
	}
	if s.cut {
		killed, err = cutAndKill(ctx, group, old)
	} else {
		killed = time.Now()
		err = old.Kill()
	}
	if err != nil {
		return time.Time{}, err
	}
	if _, err := group.AwaitMaster(ctx, old); err != nil {
		return time.Time{}, err
	}
	return killed, errors.Join(old.Restart(ctx), group.Settle(ctx))
}

// cutAndKill cuts the replicas off for a while, and then kills the master. The replicas are back, with what they had at the
// beginning, before Sentinel looks for a new master.
func cutAndKill(ctx context.Context, group *deploy.SentinelDeployment, master *deploy.Node) (killed time.Time, err error) {
	var replicas []*deploy.Node
	for _, n := range group.Nodes() {
		if n != master {
			replicas = append(replicas, n)
		}
	}
	for _, n := range replicas {
		if err := n.Freeze(); err != nil {
			return time.Time{}, err
		}
	}
	if err := pass(ctx, cutFor); err != nil {
		return time.Time{}, err
	}
	killed = time.Now()
	if err := master.Kill(); err != nil {
		return time.Time{}, err
	}
	for _, n := range replicas {
		if err := errors.Join(n.Kill(), n.Restart(ctx)); err != nil {
			return time.Time{}, err
		}
	}
	return killed, nil
}

// pass waits while the producer runs.
func pass(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
