package deploy

import (
	"context"
	"fmt"

	"github.com/redis/go-redis/v9"
)

// A SingleDeployment is one server, of Single or Container.
type SingleDeployment struct{ *base }

// Single starts one server as a process.
func Single(ctx context.Context, config Config) (*SingleDeployment, error) {
	b, err := newBase(config)
	if err != nil {
		return nil, err
	}
	n, err := b.startNode(ctx, nodePlan{name: "single", settings: config.persistence(), args: config.Args})
	if err != nil {
		return nil, b.failed("a single server", err)
	}
	return b.single(n), nil
}

func (b *base) single(n *Node) *SingleDeployment {
	b.nodes, b.data = []*Node{n}, 1
	b.serve(redis.UniversalOptions{Addrs: []string{n.Addr}})
	return &SingleDeployment{b}
}

// Node is the one server.
func (d *SingleDeployment) Node() *Node { return d.nodes[0] }

// Settle waits until the server answers, if it runs.
func (d *SingleDeployment) Settle(ctx context.Context) error {
	err := until(ctx, func(context.Context) error {
		return each(running(d.nodes), func(_ int, n *Node) error { return ping(n.Addr) })
	})
	if err != nil {
		return fmt.Errorf("settle: %w", err)
	}
	return nil
}
