// Package poll reads new entries of streams, for many subscriptions on few
// connections. It knows nothing about handlers: a subscription is a Member, which
// reports how much room it has and takes the entries.
//
// Each connection has one goroutine, the only one that reads on it, and a mailbox:
// a seat that joins, leaves, or has room again pokes it, and it looks at all of its
// topics again. If a read is blocking at that time, it is woken.
//
// Up to maxConns topics have a connection each; further topics share these, with a
// small COUNT. A topic with a backlog that would hold up the others is read by
// itself on one more connection, until the backlog is gone.
//
// A command has one consumer, but each subscription of a topic is another one. They
// take turns: see turns.go. Fan-outs of a topic share its reads.
package poll

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/pipeline"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// maxConns limits the connections on which a Subscriber waits for new entries
	// (in a Cluster, per slot), not counting the one for topics with a backlog. The
	// server's cost of a read grows with its streams (1,000 of them: 0.3 ms), and
	// each additional reader of one stream costs a connection.
	maxConns = 7

	// unwakableBlock limits a read that cannot be woken, since Close waits for it.
	// sharedBlock limits such a read if other topics may wait to join, or if it
	// occupies a connection of a wrapped client's pool; and one after which the turn of other
	// consumers comes.
	unwakableBlock = time.Second
	sharedBlock    = 100 * time.Millisecond

	// An UNBLOCK that arrives at the server before the read has no effect, so it is
	// repeated: soon at first, since it may have crossed the read.
	minWake = 200 * time.Microsecond
	maxWake = 10 * time.Millisecond

	// orphanPage is the number of pending entries per command of a search for
	// orphans.
	orphanPage = 1000
)

// Member is a subscription from its poller's point of view. Its methods are called
// by a connection's goroutine, one at a time, and must not block.
type Member interface {
	// Room returns how many entries may be read for it now. After a 0 it calls
	// Seat.Wake as soon as there is room.
	Room() int
	// Take takes entries that were read for it.
	Take(Batch)
	// Orphans is called after the answer to a command that reads or claims was lost, with all
	// entries that are pending for its consumer: it takes those that it does not have.
	Orphans([]xstream.Pending)
	// Reading reports that reading works again, or that there is no need to read.
	Reading()
}

// Batch is the result of a read.
type Batch struct {
	Entries  []xstream.Entry
	Sent, At time.Time // when the command was sent, and answered
	Asked    int       // requested entries; 0: from each of several streams
}

// Config configures a Poller.
type Config struct {
	Client   redisx.Client
	Pipeline *pipeline.Pipeline // for CLIENT UNBLOCK
	Group    string             // empty: fan-out
	NoAck    bool
	Block    time.Duration // maximum blocking time of a read
	Batch    int           // maximum entries per read

	// Unwakable is called once if reads cannot be woken: because CLIENT UNBLOCK is
	// not permitted, or because the client is wrapped.
	Unwakable func()
}

// leased reports whether entries stay pending after they are read.
func (c Config) leased() bool { return c.Group != "" && !c.NoAck }

// Poller manages the blocking connections of a Subscriber. Without seats it has
// none.
type Poller struct {
	cfg   Config
	route *redisx.Route

	mu     sync.Mutex
	split  bool // the server rejects streams of several slots in one command
	groups map[string]*group
	topics map[string]*topic
	rounds int                       // of all connections
	broken map[string][]*redisx.Conn // by group: broken connections whose reads may continue at the server
}

// group is a set of topics that one command can read.
type group struct {
	name  string
	conns []*conn
	bulk  *conn // for topics with a backlog; nil: none
}

// topic is guarded by Poller.mu, except dry and read.
type topic struct {
	key   string
	conn  *conn // whose goroutine reads the topic
	seats []*Seat
	turn  int // counts the reads, so that the seats take turns
	dry   int // consecutive reads without entries; owned by the connection's goroutine
	full  int // consecutive reads that left entries in the stream
	read  int // when it was last read, by Poller.rounds; owned by the connection's goroutine, as dry is
}

// Seat is a subscription's membership in its Poller.
type Seat struct {
	p        *Poller
	key      string
	consumer string // empty: fan-out
	member   Member
	after    string // fan-out: the last entry read; group: ">"

	// Guarded by Poller.mu.
	topic   *topic // nil: not joined
	rewind  string // fan-out: continue after this entry instead
	unsure  bool   // a command without an answer may have taken entries
	leaving bool
	failed  bool // its next read must show at once whether reading works
	left    chan error

	// Owned by the connection's goroutine.
	urgent bool // its turn comes first
	read   int  // when it was last read for, by Poller.rounds
}

// New returns a Poller.
func New(cfg Config) *Poller {
	p := &Poller{cfg: cfg, groups: make(map[string]*group), topics: make(map[string]*topic), broken: make(map[string][]*redisx.Conn)}
	p.cfg.Unwakable = sync.OnceFunc(cfg.Unwakable)
	p.route = redisx.NewRoute(cfg.Client, cfg.Block/2, p.moved)
	return p
}

// NewSeat returns a seat for a subscription of the topic. In a group each has a consumer of
// its own, and reads after ">"; a fan-out has none, and reads the entries after an ID.
func (p *Poller) NewSeat(key, consumer, after string, m Member) *Seat {
	return &Seat{p: p, key: key, consumer: consumer, member: m, after: after, left: make(chan error, 1)}
}

// Serve reads for the subscription until it leaves, and then returns nil, or until
// reading fails. After an error it may be called again.
func (s *Seat) Serve() error {
	p := s.p
	p.mu.Lock()
	if s.leaving {
		p.mu.Unlock()
		return nil
	}
	t := p.topics[s.key]
	if t == nil {
		t = &topic{key: s.key}
		p.topics[s.key] = t
		p.placeLocked(t)
	}
	s.unsure = s.unsure || p.cfg.leased() && (s.failed || len(p.broken[t.conn.group.name]) > 0)
	s.topic = t
	t.seats = append(t.seats, s)
	t.conn.pokeLocked()
	p.mu.Unlock()
	return <-s.left
}

// Wake has the connection check the subscription's room again.
func (s *Seat) Wake() { s.change(func() {}) }

// Rewind makes a fan-out continue after another entry.
func (s *Seat) Rewind(after string) { s.change(func() { s.rewind = after }) }

// Leave ends Serve, now or in the future. No entries are taken after Serve has
// returned.
func (s *Seat) Leave() { s.change(func() { s.leaving = true }) }

// change changes the seat, and has its connection look at it.
func (s *Seat) change(do func()) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if do(); s.topic != nil {
		s.topic.conn.pokeLocked()
	}
}

// Abandon is like Leave, but waits for nothing: a reply that arrives later is still
// taken.
func (s *Seat) Abandon() {
	p := s.p
	p.mu.Lock()
	s.leaving = true
	t := s.topic
	if t == nil {
		p.mu.Unlock()
		return
	}
	c := t.conn
	s.departLocked(nil)
	bconn := c.bconn
	if len(c.topics) > 0 {
		bconn = nil // others need it
	} else {
		c.retireLocked()
		c.cancel()
	}
	c.pokeLocked()
	p.mu.Unlock()
	if bconn != nil {
		bconn.Close()
	}
}

// Unsure requests a search for entries that a command without an answer has taken.
func (s *Seat) Unsure() { s.change(func() { s.unsure = true }) }

// departLocked removes the seat from its topic, and ends Serve.
func (s *Seat) departLocked(err error) {
	t := s.topic
	s.topic = nil
	t.seats = slices.DeleteFunc(t.seats, func(other *Seat) bool { return other == s })
	if len(t.seats) == 0 {
		delete(s.p.topics, t.key)
		t.conn.topics = slices.DeleteFunc(t.conn.topics, func(other *topic) bool { return other == t })
	}
	s.left <- err
}

// placeLocked assigns a topic to a connection: a new one, or the one with the
// fewest topics.
func (p *Poller) placeLocked(t *topic) {
	name := p.cfg.Client.SameRead(t.key)
	if p.split {
		name = redisx.TagOf(t.key)
	}
	g := p.groups[name]
	if g == nil {
		g = &group{name: name}
		p.groups[name] = g
	}
	most := maxConns
	if p.cfg.Client.Wrapped() {
		most = 1 // its connections come from the wrapped client's pool, whose size is unknown
	}
	var least *conn
	for _, c := range g.conns {
		if least == nil || len(c.topics) < len(least.topics) {
			least = c
		}
	}
	if least == nil || len(least.topics) > 0 && len(g.conns) < most {
		least = p.startLocked(g)
		g.conns = append(g.conns, least)
	}
	t.conn, t.full = least, 0
	least.topics = append(least.topics, t)
}

func (p *Poller) startLocked(g *group) *conn {
	c := &conn{p: p, group: g, mail: make(chan struct{}, 1)}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	go c.run()
	return c
}

// heatLocked moves a topic with a backlog to the connection for backlogs.
func (t *topic) heatLocked() {
	g := t.conn.group
	if g.bulk == nil {
		g.bulk = t.conn.p.startLocked(g)
		g.bulk.alone = true
	}
	t.conn.topics = slices.DeleteFunc(t.conn.topics, func(other *topic) bool { return other == t })
	t.conn, t.full = g.bulk, 0
	g.bulk.topics = append(g.bulk.topics, t)
	g.bulk.pokeLocked()
}

// coolLocked moves it back to a connection that blocks.
func (t *topic) coolLocked() {
	c := t.conn
	c.topics = slices.DeleteFunc(c.topics, func(other *topic) bool { return other == t })
	c.p.placeLocked(t)
	t.conn.pokeLocked()
}

// moved is called with the address to which new connections lead. Connections that
// lead elsewhere are reopened: their old server may keep answering, so they would
// never be replaced.
func (p *Poller) moved(remote string) bool {
	var old []*redisx.Conn
	p.mu.Lock()
	for _, g := range p.groups {
		for _, c := range append(slices.Clone(g.conns), g.bulk) {
			if c != nil && c.bconn != nil && !c.bconn.LeadsTo(remote) {
				c.astray = true
				old = append(old, c.bconn)
			}
		}
	}
	p.mu.Unlock()
	for _, bconn := range old {
		bconn.Close()
	}
	return len(old) > 0
}
