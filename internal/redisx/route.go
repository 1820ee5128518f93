package redisx

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Route detects connections that lead to the wrong server. For a Cluster or a Ring
// it compares a connection with the client's own knowledge. For a single server
// nobody reports that Sentinel has named another master, or that a DNS name has
// moved, while the old server keeps answering: Route dials now and then, and compares
// the addresses.
type Route struct {
	client Client
	every  time.Duration
	moved  func(remote string) bool
	moves  []time.Time // of the last minute; owned by the check that is running

	mu    sync.Mutex
	asked time.Time
	busy  bool // a check is running
}

const (
	// maxMoves is how many moves per minute are followed. A name with several
	// addresses resolves differently each time, which is not a move.
	maxMoves = 2
	// minProbe keeps a short BlockTime from causing constant dialing.
	minProbe = 100 * time.Millisecond
)

// NewRoute returns a Route. While Ask is called, it dials at the given interval,
// and calls moved, in a goroutine of its own, with the address that new connections
// lead to. It returns whether there were connections that lead elsewhere.
func NewRoute(client Client, every time.Duration, moved func(remote string) bool) *Route {
	return &Route{client: client, every: max(every, minProbe), moved: moved, asked: time.Now()}
}

// Leads reports whether the connection leads to the key's server, as far as the
// client knows.
func (r *Route) Leads(ctx context.Context, l *Conn, key string) bool {
	if r.client.Single() != nil || l.node == nil {
		return true
	}
	node, err := r.client.Node(ctx, key)
	return err != nil || node == l.node
}

// Ask checks in the background whether new connections lead elsewhere, unless it
// did so recently. The check ends with ctx.
func (r *Route) Ask(ctx context.Context) {
	node := r.client.Single()
	if node == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.busy || time.Since(r.asked) < r.every {
		return
	}
	r.busy = true
	opt := node.Options()
	go func() {
		ctx, cancel := context.WithTimeout(ctx, max(opt.DialTimeout, time.Second))
		defer cancel()
		remote := ""
		if conn, err := opt.Dialer(ctx, opt.Network, opt.Addr); err == nil {
			remote = remoteOf(conn)
			_ = conn.Close()
		}
		if remote != "" && ctx.Err() == nil && r.mayFollow() && r.moved(remote) {
			r.moves = append(r.moves, time.Now())
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.busy, r.asked = false, time.Now()
	}()
}

// mayFollow reports whether there were fewer than maxMoves in the last minute.
func (r *Route) mayFollow() bool {
	r.moves = slices.DeleteFunc(r.moves, func(at time.Time) bool { return time.Since(at) > time.Minute })
	return len(r.moves) < maxMoves
}
