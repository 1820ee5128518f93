// Package deploy runs Redis alone, with Sentinel, as a Cluster or in a container, and does to it what happens in production:
// servers die, freeze, restart and change their roles, slots move. When a function returns, what it did is true on the servers.
// Everything ends with the process that started it. Linux only.
package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// AOF is how a server keeps its data: the value of appendfsync.
type AOF string

const (
	// NoAOF means no persistence, no RDB snapshots either: a server that ends has lost everything.
	NoAOF    AOF = ""
	EverySec AOF = "everysec"
	Always   AOF = "always"
)

// Config says what to start. Its zero value will do, except for Container's Image.
type Config struct {
	// Binary is the server's program. Default: redis-server of the PATH.
	Binary string
	// Image is the one of Container. It must exist locally: nothing is pulled.
	Image string
	AOF   AOF
	// Dir gets a folder for each node, with its data, config and log, and keeps them after Close. The nodes' folders must
	// not exist yet. Default: a folder of its own that Close removes.
	Dir string
	// Args are further arguments of each server that holds data, such as "--maxmemory", "100mb". They override the others.
	Args []string
}

// A Deployment is one Redis to its clients, made of one or more servers.
type Deployment interface {
	// Options says how to reach it. Only Addrs, MasterName and IsClusterMode are set: UniversalOptions has functions, which
	// cannot be marshaled to JSON.
	Options() redis.UniversalOptions
	// Client is for administration: the same one at each call, closed by Close.
	Client() redis.UniversalClient
	// Nodes are the servers that hold data.
	Nodes() []*Node
	// Settle waits until all nodes that were not killed or stopped serve, replicate, and agree on who is who. A node that is
	// frozen or disconnected makes it wait in vain.
	Settle(ctx context.Context) error
	// Close ends the servers. It may be called twice.
	Close() error
}

var (
	_ Deployment = (*SingleDeployment)(nil)
	_ Deployment = (*SentinelDeployment)(nil)
	_ Deployment = (*ClusterDeployment)(nil)
)

// ErrNoServer: this machine has no redis-server, or no Docker or image for Container.
var ErrNoServer = errors.New("no server to start")

// A base is what all deployments have in common.
type base struct {
	config  Config
	options redis.UniversalOptions
	client  redis.UniversalClient
	nodes   []*Node // data first, then Sentinels
	data    int     // how many of nodes hold data
	cleanup []func() error
	closing sync.Once
	closed  error

	// changing lets one change of the topology happen at a time.
	changing sync.Mutex
}

func newBase(config Config) (*base, error) {
	b := &base{config: config}
	if config.Dir == "" {
		dir, err := os.MkdirTemp("", "chaos-deploy")
		if err != nil {
			return nil, err
		}
		b.config.Dir = dir
		b.cleanup = append(b.cleanup, func() error { return os.RemoveAll(dir) })
		return b, nil
	}
	dir, err := filepath.Abs(config.Dir)
	if err != nil {
		return nil, err
	}
	b.config.Dir = dir
	return b, os.MkdirAll(dir, 0o755)
}

// binary returns the server's program, looked up at each call: if there is none, the first start fails.
func (c Config) binary() (string, error) {
	name := c.Binary
	if name == "" {
		name = "redis-server"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoServer, err)
	}
	return path, nil
}

// persistence returns the settings of a server's config that are about its data.
func (c Config) persistence() []setting {
	if c.AOF == NoAOF {
		return []setting{{"save", `""`}, {"appendonly", "no"}}
	}
	return []setting{{"save", `""`}, {"appendonly", "yes"}, {"appendfsync", string(c.AOF)}}
}

func (b *base) Options() redis.UniversalOptions { return b.options }
func (b *base) Client() redis.UniversalClient   { return b.client }
func (b *base) Nodes() []*Node                  { return slices.Clone(b.nodes[:b.data]) }

// serve gives the deployment its options and its client.
func (b *base) serve(options redis.UniversalOptions) {
	b.options = options
	b.client = redis.NewUniversalClient(&options)
}

func (b *base) Close() error {
	b.closing.Do(func() {
		var errs []error
		if b.client != nil {
			errs = append(errs, b.client.Close())
		}
		for _, n := range b.nodes {
			errs = append(errs, n.close())
		}
		for _, f := range slices.Backward(b.cleanup) {
			errs = append(errs, f())
		}
		b.closed = errors.Join(errs...)
	})
	return b.closed
}

// failed ends what was started after the rest failed to start.
func (b *base) failed(what string, err error) error {
	return errors.Join(fmt.Errorf("start %s: %w", what, err), b.Close())
}

// node returns the node that the servers know by the address.
func (b *base) node(addr string) (*Node, error) {
	for _, n := range b.nodes {
		if n.Addr == addr {
			return n, nil
		}
	}
	return nil, fmt.Errorf("%s is none of ours", addr)
}

// each calls f for all nodes at once.
func each(nodes []*Node, f func(i int, n *Node) error) error {
	errs := make([]error, len(nodes))
	var calls sync.WaitGroup
	for i, n := range nodes {
		calls.Go(func() {
			if err := f(i, n); err != nil {
				errs[i] = fmt.Errorf("%s: %w", n, err)
			}
		})
	}
	calls.Wait()
	return errors.Join(errs...)
}

// running returns those nodes that were not killed or stopped.
func running(nodes []*Node) []*Node {
	return slices.DeleteFunc(slices.Clone(nodes), func(n *Node) bool { return !n.server.running() })
}

// until calls f until it succeeds or the context ends.
func until(ctx context.Context, f func(ctx context.Context) error) error {
	for {
		err := attempt(ctx, f)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("waited in vain (%w): %w", context.Cause(ctx), err)
		}
	}
}

// attempt gives f 2 s: a frozen server would take all of the time there is.
func attempt(ctx context.Context, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return f(ctx)
}
