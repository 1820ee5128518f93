package goxstreams

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// link is a connection of its own for reads that block, and what it takes to
// wake such a read: it does not heed its context.
type link struct {
	conn  processor
	close func()
	waker processor // to the same node, for CLIENT UNBLOCK; nil: cannot wake
	id    int64

	noWake atomic.Bool // the right to CLIENT UNBLOCK was taken away
}

// borrowed counts the pool connections that blocked reads of this process hold,
// for each client, over all Subscribers: more than half of a pool they do not
// take, so that they cannot starve whoever else uses the client.
var borrowed = struct {
	sync.Mutex
	n map[*redis.Client]int
}{n: map[*redis.Client]int{}}

// readGrace is added to a read's BLOCK for the answer to arrive (go-redis adds
// as much).
const readGrace = 10 * time.Second

// newLink opens a connection for reads that block up to block. The connection
// is the client's, with its hooks, as long as its pool has room for that; else
// one made from the same options.
func newLink(ctx context.Context, client redis.UniversalClient, line *line, key string, block time.Duration) (*link, error) {
	var node *redis.Client
	switch c := client.(type) {
	case *redis.Client:
		node = c
	case *redis.ClusterClient:
		master, err := c.MasterForKey(ctx, key)
		if err != nil {
			return nil, err
		}
		node = master
	case *redis.Ring:
		shard, err := c.GetShardClientForKey(key)
		if err != nil {
			return nil, err
		}
		node = shard
	default: // someone's own client: it has no connection to hold on to
		return &link{conn: client, close: func() {}}, nil
	}

	l := &link{waker: node}
	if node == client {
		l.waker = line
	}
	borrowed.Lock()
	limit := node.Options().PoolSize
	if n := node.Options().MaxActiveConns; n > 0 {
		limit = min(limit, n)
	}
	own := borrowed.n[node] >= limit/2
	if !own {
		borrowed.n[node]++
	}
	borrowed.Unlock()

	if own {
		// WithTimeout copies under go-redis's lock: the client writes to what its
		// options point to when it connects.
		opt := *node.WithTimeout(block + readGrace).Options()
		opt.WriteTimeout = node.Options().WriteTimeout
		opt.PoolSize, opt.MinIdleConns, opt.MaxIdleConns, opt.MaxActiveConns = 1, 0, 0, 0
		// The pool must not replace the connection, whose ID is known.
		opt.ConnMaxIdleTime, opt.ConnMaxLifetime = -1, -1
		c := redis.NewClient(&opt)
		l.conn, l.close = hooked(node, c), func() { _ = c.Close() }
	} else {
		c := node.WithTimeout(block + readGrace).EphemeralConn()
		l.conn = hooked(node, c)
		l.close = func() {
			// Not back into the pool: a CLIENT UNBLOCK still under way would wake
			// a stranger's command there.
			_ = c.Close()
			borrowed.Lock()
			if borrowed.n[node]--; borrowed.n[node] == 0 {
				delete(borrowed.n, node)
			}
			borrowed.Unlock()
		}
	}

	v, err := doOnce(ctx, l.conn, "client", "id")
	if err == nil {
		l.id, _ = v.(int64)
		_, err = l.unblock(ctx) // nothing blocks yet: it only asks for the right
	}
	switch {
	case err == nil:
	case denied(err):
		l.waker = nil
	default:
		l.close()
		return nil, err
	}
	return l, nil
}

// hooked returns a processor that runs commands on p, through the client's
// hooks: whoever traces or meters the client sees the reads too. p has none of
// them, because WithTimeout drops them. The Conn in between is there for its
// hooks and never takes a connection.
func hooked(client *redis.Client, p processor) processor {
	conn := client.EphemeralConn()
	conn.AddHook(divert{p})
	return conn
}

// divert is the innermost hook: it sends commands another way.
type divert struct{ to processor }

func (divert) DialHook(next redis.DialHook) redis.DialHook { return next }

func (d divert) ProcessHook(redis.ProcessHook) redis.ProcessHook { return d.to.Process }

func (divert) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// wakable reports whether wake can end a read.
func (l *link) wakable() bool { return l.waker != nil && l.id != 0 && !l.noWake.Load() }

// wake ends the read that blocks on the link, and returns whether one did: sent
// too early, it does nothing.
func (l *link) wake(ctx context.Context) bool {
	if !l.wakable() {
		return false
	}
	woken, err := l.unblock(ctx)
	if denied(err) {
		l.noWake.Store(true)
	}
	return woken
}

func (l *link) unblock(ctx context.Context) (bool, error) {
	v, err := doOnce(ctx, l.waker, "client", "unblock", l.id)
	return v == int64(1), err
}
