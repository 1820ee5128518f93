package redisx

import (
	"context"
	"sync"
	"time"
)

// Route detects connections that lead to the wrong server. For a Cluster or a Ring
// it compares a connection with the client's own knowledge. For a single server
// nobody reports that Sentinel has named another master, or that a DNS name has
// moved, while the old server keeps answering. So Route dials a new connection now
// and then, with the client's own Dialer, and closes it again: its address is the
// answer.
type Route struct {
	client Client
	every  time.Duration
	moved  func(remote string)

	mu    sync.Mutex
	asked time.Time
	busy  bool
	moves []time.Time
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
// lead to.
func NewRoute(client Client, every time.Duration, moved func(remote string)) *Route {
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
		if remote != "" && ctx.Err() == nil {
			r.moved(remote)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.busy, r.asked = false, time.Now()
	}()
}

// Follow reports whether the connection does not lead to the address and should be
// reopened, which is limited to maxMoves.
func (r *Route) Follow(l *Conn, remote string) bool {
	if at := l.remote.Load(); at == nil || *at == remote {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	for len(r.moves) > 0 && now.Sub(r.moves[0]) > time.Minute {
		r.moves = r.moves[1:]
	}
	return len(r.moves) < maxMoves
}

// Followed notes that connections were reopened.
func (r *Route) Followed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.moves = append(r.moves, time.Now())
}
