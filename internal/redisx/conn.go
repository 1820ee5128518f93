package redisx

import (
	"context"
	"net"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// Conn is a dedicated connection for blocking reads, and the means to wake such a
// read, which ignores its context.
//
// It is separate from the client's pool, so that blocking reads do not starve other
// users of the client, and uses the client's options. (ARCHITECTURE.md says why it is
// no redis.Conn.)
type Conn struct {
	Processor
	node   *redis.Client // the node that it leads to; nil for a wrapped client
	own    *redis.Client // the connection; nil for a wrapped client, whose pool is used
	waker  Processor     // to the same server, for CLIENT UNBLOCK; nil: cannot wake
	id     int64
	remote atomic.Pointer[string] // the address that was dialed

	noWake atomic.Bool // the permission for CLIENT UNBLOCK was revoked
}

const (
	// The reply to a read may arrive up to the client's ReadTimeout after its
	// BLOCK, within these bounds. So a connection that was dropped silently, by a
	// load balancer for example, is noticed by then. (go-redis's own blocking calls
	// wait 10s.)
	minGrace = time.Second
	maxGrace = 10 * time.Second
)

func grace(readTimeout time.Duration) time.Duration {
	if readTimeout <= 0 {
		return maxGrace
	}
	return min(max(readTimeout, minGrace), maxGrace)
}

// OpenConn opens a connection to the key's server for reads that block up to block.
// Commands run through the client's hooks. If the client has a single server,
// CLIENT UNBLOCK goes through via.
func (c Client) OpenConn(ctx context.Context, via Processor, key string, block time.Duration) (*Conn, error) {
	node, err := c.Node(ctx, key)
	if err != nil {
		return nil, err
	}
	if node == nil {
		return &Conn{Processor: c.UniversalClient}, nil
	}
	l := &Conn{node: node, waker: node}
	if c.Single() != nil {
		l.waker = via
	}
	l.own = redis.NewClient(l.options(block))
	l.Processor = hooked(node, l.own)
	v, err := DoOnce(ctx, l, "client", "id")
	if err == nil {
		l.id, _ = v.(int64)
		_, err = l.unblock(ctx) // nothing is blocking yet: this only checks the permission
	}
	switch {
	case err == nil:
	case IsDenied(err):
		l.waker = nil
	default:
		l.Close()
		return nil, err
	}
	return l, nil
}

// options returns the client's options, changed for one connection that is not
// replaced.
func (l *Conn) options(block time.Duration) *redis.Options {
	// WithTimeout copies under go-redis's lock: when the client connects, it writes
	// to data that its options point to.
	opt := *l.node.WithTimeout(block).Options()
	theirs := l.node.Options()
	wait := grace(theirs.ReadTimeout)
	opt.ReadTimeout = block + wait
	if opt.WriteTimeout = theirs.WriteTimeout; opt.WriteTimeout <= 0 {
		opt.WriteTimeout = wait
	}
	opt.PoolSize, opt.MinIdleConns, opt.MaxIdleConns, opt.MaxActiveConns = 1, 0, 0, 0
	// The pool must not replace the connection, whose ID is known.
	opt.ConnMaxIdleTime, opt.ConnMaxLifetime, opt.ConnMaxLifetimeJitter = -1, -1, 0
	opt.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	// Nothing read here can be cached, and the caller's cache and its push
	// processor must not be shared.
	opt.ClientSideCacheConfig, opt.ClientSideCache, opt.PushNotificationProcessor = nil, nil, nil
	opt.AutoPipelineOptions = nil
	dial := opt.Dialer
	opt.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err == nil {
			remote := remoteOf(conn)
			l.remote.Store(&remote)
		}
		return conn, err
	}
	return &opt
}

func remoteOf(conn net.Conn) string {
	if addr := conn.RemoteAddr(); addr != nil {
		return addr.String()
	}
	return ""
}

// hooked returns a processor that runs commands on p through the client's hooks:
// tracing and metrics of the client then include the reads. The Conn in between
// only provides the hooks, and never takes a connection.
func hooked(client *redis.Client, p Processor) Processor {
	conn := client.EphemeralConn()
	conn.AddHook(divert{p})
	return conn
}

// divert is the innermost hook: it redirects commands to another processor.
type divert struct{ to Processor }

func (divert) DialHook(next redis.DialHook) redis.DialHook { return next }

func (d divert) ProcessHook(redis.ProcessHook) redis.ProcessHook { return d.to.Process }

func (divert) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
} // there are no pipelines

// LeadsTo reports whether the connection leads to the address, or is not dialed yet.
func (l *Conn) LeadsTo(remote string) bool {
	at := l.remote.Load()
	return at == nil || *at == remote
}

// Close closes the connection: a read in flight ends with an error.
func (l *Conn) Close() {
	if l.own != nil {
		_ = l.own.Close()
	}
}

// Wakable reports whether Wake can end a read.
func (l *Conn) Wakable() bool { return l.waker != nil && l.id != 0 && !l.noWake.Load() }

// Wake ends the read that blocks on the connection, and returns whether there was
// one: if it arrives before the read, it does nothing.
func (l *Conn) Wake(ctx context.Context) bool {
	if !l.Wakable() {
		return false
	}
	woken, err := l.unblock(ctx)
	switch {
	case IsDenied(err):
		l.noWake.Store(true)
	case IsClosed(err): // the client is closed: nobody can wake the read any more
		l.Close()
	}
	return woken
}

func (l *Conn) unblock(ctx context.Context) (bool, error) {
	v, err := Do(ctx, l.waker, "client", "unblock", l.id) // what has broken this connection may have broken pooled ones
	return v == int64(1), err
}
