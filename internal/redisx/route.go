package redisx

import (
	"context"
	"sync"
	"time"
)

// Route finds out when connections lead to the wrong server. Those of a Cluster or
// a Ring are compared with what their client knows. Of a single server nobody tells:
// Sentinel has named another master, or a DNS name has moved, while the old server
// goes on answering. So a new connection is dialed now and then, by the client's own
// Dialer, and closed again: its address is the answer.
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
	// maxMoves a minute are followed. A name with several addresses leads somewhere
	// else each time, which is no move.
	maxMoves = 2
	// minProbe keeps a short BlockTime from dialing all the time.
	minProbe = 100 * time.Millisecond
)

// NewRoute returns a Route. While it is asked, it dials every so often, and calls
// moved, in a goroutine of its own, with the address to which new connections lead.
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

// Ask has it found out, beside what the caller does, whether new connections lead
// elsewhere, if that was not asked for some time. It ends with ctx.
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

// Follow reports whether the connection leads elsewhere than to the address, and is
// to be opened anew: not more often than maxMoves.
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

// Followed notes that connections were opened anew.
func (r *Route) Followed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.moves = append(r.moves, time.Now())
}
