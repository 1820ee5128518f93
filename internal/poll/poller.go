// Package poll reads what is new in streams, for many subscriptions on few
// connections. It knows no handlers: a subscription is a Member, which says how much
// it has room for and takes what was read.
//
// Each connection has one goroutine, which alone reads there, and a mailbox: who
// joins, leaves, or has room again, pokes it, and it looks at all of its topics anew.
// A read that blocks meanwhile is woken by CLIENT UNBLOCK, again and again until the
// goroutine has noticed, since one that overtakes the read does nothing.
//
// Up to maxConns topics have a connection each; more share these, with COUNT small.
// A topic that has more in it than a read for all should wait for is read by itself
// on one more connection, until it is worked off.
//
// All subscriptions of a Subscriber read in one consumer's name, since a command has
// one. Those of one topic take turns.
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
	// maxConns bounds the connections on which a Subscriber waits for new entries
	// (in a Cluster: for those of each slot), but for the one of topics with a
	// backlog. What a read costs the server grows with its streams (1,000 of them:
	// 0.3 ms), and every reader of one stream more costs a connection.
	maxConns = 7

	// unwakableBlock bounds a read that cannot be woken: Close waits for it; and
	// sharedBlock one that topics may wait to join, or that holds a connection of a
	// wrapped client's pool.
	unwakableBlock = time.Second
	sharedBlock    = 100 * time.Millisecond

	// A read that was interrupted before it arrived at the server blocks all the
	// same, so that the interruption is repeated: soon at first, since it may have
	// crossed the read.
	minWake = 200 * time.Microsecond
	maxWake = 10 * time.Millisecond

	// orphanPage is how many pending entries one command of a look for orphans sees.
	orphanPage = 1000
)

// Member is a subscription as its poller sees it. The methods are called by a
// connection's goroutine, one after the other, and must not block.
type Member interface {
	// Room returns how many entries may be read for it now. After 0 it calls
	// Seat.Wake as soon as there is room.
	Room() int
	// Take takes entries that were read for it.
	Take(Batch)
	// Holds reports whether it has the entry in its hands.
	Holds(id string) bool
	// Orphans takes entries that are pending in the consumer's name and in nobody's
	// hands: the answer to a command that took them was lost. It returns false if it
	// takes none any more.
	Orphans([]xstream.Pending) bool
	// Reading says that reading works again, or that there is no need to.
	Reading()
}

// Batch is what a read has brought.
type Batch struct {
	Entries  []xstream.Entry
	Sent, At time.Time // when it was asked for, and answered
	Asked    int       // how many entries were asked for; 0: of each of several streams
	Shared   bool      // other subscriptions have the same entries
}

// Config is what a Poller needs.
type Config struct {
	Client   redisx.Client
	Pipeline *pipeline.Pipeline // for CLIENT UNBLOCK
	Group    string             // empty: fan-out
	Consumer string
	NoAck    bool
	Block    time.Duration // the longest that a read waits
	Batch    int           // the most entries of a read

	// Unwakable is told once that reads cannot be woken: for want of the right to
	// CLIENT UNBLOCK, or since the client is a wrapped one.
	Unwakable func()
}

// leased reports whether what is read stays pending.
func (c Config) leased() bool { return c.Group != "" && !c.NoAck }

// Poller is the connections of a Subscriber. Without a Seat it has none.
type Poller struct {
	cfg   Config
	route *redisx.Route

	mu       sync.Mutex
	split    bool // the server refuses streams of several slots in one command
	groups   map[string]*group
	topics   map[string]*topic
	members  map[string][]Member        // of each topic, from the first Serve until Release: they may have entries in hand
	disowned map[string]map[string]bool // topic -> entries that a handler may have still, though it was given up
	reserved map[[2]string]bool         // topic and entry: a member claims it just now
	broken   []*redisx.Conn             // connections the reads of which may go on at the server
}

// group is the topics that one command can read.
type group struct {
	name  string
	conns []*conn
	bulk  *conn // for topics with a backlog; nil: none
}

// topic is guarded by Poller.mu.
type topic struct {
	key    string
	conn   *conn // the one whose goroutine reads it
	seats  []*Seat
	turn   int  // counts the reads, for the seats to take turns
	dry    int  // reads in a row that found nothing; its connection's own
	full   int  // reads in a row that left more in the stream
	unsure bool // a command without an answer may have taken entries
}

// Seat is a subscription's place in its Poller.
type Seat struct {
	p      *Poller
	key    string
	member Member
	after  string // fan-out: the last entry that was read

	// Guarded by Poller.mu.
	topic   *topic // nil: not there
	rewind  string // fan-out: go on after this one instead
	leaving bool
	known   bool // among the Poller's members
	failed  bool // at its next read it is to know at once whether reading works
	left    chan error
}

// New returns a Poller.
func New(cfg Config) *Poller {
	p := &Poller{
		cfg: cfg, groups: make(map[string]*group), topics: make(map[string]*topic), members: make(map[string][]Member), disowned: make(map[string]map[string]bool),
		reserved: make(map[[2]string]bool),
	}
	p.cfg.Unwakable = sync.OnceFunc(cfg.Unwakable)
	p.route = redisx.NewRoute(cfg.Client, cfg.Block/2, p.moved)
	return p
}

// NewSeat returns a place for a subscription of the topic. In fan-out it reads what
// comes after the ID.
func (p *Poller) NewSeat(key string, m Member, after string) *Seat {
	return &Seat{p: p, key: key, member: m, after: after, left: make(chan error, 1)}
}

// Serve reads for the subscription until it leaves, for which the error is nil, or
// until reading fails. It may be called again after that.
func (s *Seat) Serve() error {
	p := s.p
	p.mu.Lock()
	if s.leaving {
		p.mu.Unlock()
		return nil
	}
	if !s.known {
		s.known = true
		p.members[s.key] = append(p.members[s.key], s.member)
	}
	t := p.topics[s.key]
	if t == nil {
		t = &topic{key: s.key}
		p.topics[s.key] = t
		p.placeLocked(t)
	}
	if s.failed && p.cfg.leased() {
		t.unsure = true
	}
	s.topic = t
	t.seats = append(t.seats, s)
	t.conn.pokeLocked()
	p.mu.Unlock()
	return <-s.left
}

// Wake has the connection look at the subscription's room again.
func (s *Seat) Wake() {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.topic != nil {
		s.topic.conn.pokeLocked()
	}
}

// Rewind has a fan-out go on after another entry.
func (s *Seat) Rewind(after string) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.rewind = after
	if s.topic != nil {
		s.topic.conn.pokeLocked()
	}
}

// Leave ends Serve, now or in the future. Nothing is taken any more once Serve has
// returned.
func (s *Seat) Leave() {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.leaving = true
	if s.topic != nil {
		s.topic.conn.pokeLocked()
	}
}

// Abandon is Leave that waits for nothing: an answer that comes later is still taken.
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
	link := c.link
	if len(c.topics) > 0 {
		link = nil // others need it
	} else {
		c.retireLocked()
		c.cancel()
	}
	c.pokeLocked()
	p.mu.Unlock()
	if link != nil {
		link.Close()
	}
}

// Release says that the subscription has nothing in hand any more.
func (s *Seat) Release() {
	p := s.p
	p.mu.Lock()
	defer p.mu.Unlock()
	p.members[s.key] = slices.DeleteFunc(p.members[s.key], func(m Member) bool { return m == s.member })
	if len(p.members[s.key]) == 0 {
		delete(p.members, s.key)
	}
}

// Unsure has it looked whether a command without an answer has taken entries of the
// topic.
func (p *Poller) Unsure(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.topics[key]; t != nil {
		t.unsure = true
		t.conn.pokeLocked()
	}
}

// Disown says that an entry stays pending in the consumer's name, though nobody here
// holds it: it is no orphan.
func (p *Poller) Disown(key, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.disowned[key] == nil {
		p.disowned[key] = make(map[string]bool)
	}
	p.disowned[key][id] = true
}

// Disowned reports whether Disown was said of the entry.
func (p *Poller) Disowned(key, id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.disowned[key][id]
}

// Reserve reports whether the member may claim the entry for the consumer: whether no
// other one of the topic does so, or has it.
func (p *Poller) Reserve(key, id string, m Member) bool {
	entry := [2]string{key, id}
	p.mu.Lock()
	if p.reserved[entry] {
		p.mu.Unlock()
		return false
	}
	p.reserved[entry] = true
	others := slices.DeleteFunc(slices.Clone(p.members[key]), func(other Member) bool { return other == m })
	p.mu.Unlock()
	if slices.ContainsFunc(others, func(other Member) bool { return other.Holds(id) }) {
		p.Unreserve(key, id)
		return false
	}
	return true
}

// Unreserve ends what Reserve began, once the member has the entry, or has not got it.
func (p *Poller) Unreserve(key, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.reserved, [2]string{key, id})
}

// Has reports whether a subscription of the topic is there, or may have something in
// hand.
func (p *Poller) Has(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.members[key]) > 0
}

// departLocked takes the seat out of its topic, and ends Serve.
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

// placeLocked gives a topic its connection: one of its own, or the one with the
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
		most = 1 // they are of its pool, of which the size is not known
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

// moveLocked gives a topic to another connection.
func (t *topic) moveLocked(to *conn) {
	t.conn.topics = slices.DeleteFunc(t.conn.topics, func(other *topic) bool { return other == t })
	t.conn, t.full = to, 0
	to.topics = append(to.topics, t)
	to.pokeLocked()
}

// heatLocked gives a topic with a backlog to the connection for these.
func (t *topic) heatLocked() {
	g := t.conn.group
	if g.bulk == nil {
		g.bulk = t.conn.p.startLocked(g)
		g.bulk.alone = true
	}
	t.moveLocked(g.bulk)
}

// coolLocked gives it back to one that waits.
func (t *topic) coolLocked() {
	c := t.conn
	c.topics = slices.DeleteFunc(c.topics, func(other *topic) bool { return other == t })
	c.p.placeLocked(t)
	t.conn.pokeLocked()
}

// moved is told where new connections lead. What leads elsewhere is opened anew: its
// server may go on answering, and would never be left.
func (p *Poller) moved(remote string) {
	var old []*redisx.Conn
	p.mu.Lock()
	for _, g := range p.groups {
		for _, c := range append(slices.Clone(g.conns), g.bulk) {
			if c != nil && c.link != nil && p.route.Follow(c.link, remote) {
				c.astray = true
				old = append(old, c.link)
			}
		}
	}
	p.mu.Unlock()
	for _, link := range old {
		link.Close()
	}
	if len(old) > 0 {
		p.route.Followed()
	}
}
