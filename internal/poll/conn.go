package poll

import (
	"context"
	"runtime"
	"slices"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// conn is a connection and its goroutine.
type conn struct {
	p      *Poller
	group  *group
	ctx    context.Context // ends with the goroutine, or when nobody waits for it
	cancel context.CancelFunc
	mail   chan struct{}

	// Guarded by Poller.mu.
	alone  bool // reads topics with a backlog, one at a time
	topics []*topic
	bconn  *redisx.Conn // nil: not connected
	round  int          // counts the rounds of the goroutine
	busy   bool         // a read may be in flight
	waking bool         // a goroutine is waking the read
	astray bool         // leads to the wrong server, and was closed

	// Owned by the goroutine.
	sets    []set // the topics of this round
	seats   []*Seat
	time    int // counts the rounds of all connections
	parts   []part
	rest    []part        // those that are read with other commands, on the same server
	block   time.Duration // how long the read may block; -1: not at all
	dry     bool          // the last read has found nothing
	replies xstream.Replies
}

// set is a topic and the number of its seats.
type set struct {
	topic *topic
	turn  int
	n     int
}

// run reads until no topics are left.
func (c *conn) run() {
	defer c.cancel()
	for c.look() {
		if len(c.parts) == 0 {
			<-c.mail
			continue
		}
		c.p.route.Ask(c.ctx)
		if err := c.orphans(); err != nil {
			c.fail(err)
			continue
		}
		c.read()
	}
}

// pokeLocked has the goroutine look at its topics again.
func (c *conn) pokeLocked() {
	select {
	case c.mail <- struct{}{}:
	default:
	}
	if c.busy && !c.waking {
		c.waking = true
		go c.wake(c.round)
	}
}

// wake interrupts the current read until the round is over.
func (c *conn) wake(round int) {
	pause := time.Duration(0)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-c.ctx.Done():
			return
		}
		c.p.mu.Lock()
		over, bconn := c.round != round || !c.busy, c.bconn
		if over && c.round == round {
			c.waking = false
		}
		c.p.mu.Unlock()
		if over {
			return
		}
		pause = min(max(minWake, 2*pause), maxWake)
		if bconn != nil && bconn.Wake(c.ctx) {
			pause = maxWake
		}
		timer.Reset(pause) // counted from the answer, however slow that was
	}
}

// look starts a round: it dismisses the seats that leave, and decides what to read
// next. It returns false if no seats are left.
func (c *conn) look() bool {
	p := c.p
	select {
	case <-c.mail:
	default:
	}
	p.mu.Lock()
	c.round++
	p.rounds++
	c.time = p.rounds
	c.busy, c.waking = true, false
	var leaving []*Seat
	for _, t := range c.topics {
		for _, s := range t.seats {
			if s.leaving {
				leaving = append(leaving, s)
			}
			if s.rewind != "" {
				s.after, s.rewind = s.rewind, ""
			}
			s.urgent = s.failed || s.unsure
		}
	}
	ends := c.endsLocked(leaving)
	for _, s := range leaving {
		s.departLocked(nil)
	}
	if ends {
		c.retireLocked()
		p.mu.Unlock()
		return false
	}
	c.seats = c.seats[:0]
	c.sets = c.sets[:0]
	for _, t := range c.topics {
		c.sets = append(c.sets, set{t, t.turn, len(t.seats)})
		c.seats = append(c.seats, t.seats...)
		t.turn++
	}
	p.mu.Unlock()

	clear(c.parts)
	c.parts = c.parts[:0]
	rest := c.seats
	for _, set := range c.sets {
		if p.cfg.Group == "" {
			c.fanOut(set.topic, rest[:set.n], set.turn)
		} else {
			c.grouped(set.topic, rest[:set.n])
		}
		rest = rest[set.n:]
	}
	c.oneRead()
	if len(c.parts) == 0 {
		p.mu.Lock()
		c.busy = false
		p.mu.Unlock()
	}
	return true
}

// endsLocked reports whether no seats are left without these. If so, it closes the
// connection before they are dismissed.
func (c *conn) endsLocked(leaving []*Seat) bool {
	stay := 0
	for _, t := range c.topics {
		stay += len(t.seats)
	}
	if stay > len(leaving) || c.alone && c.group.bulk == c && len(c.group.conns) > 0 {
		return false
	}
	if c.bconn != nil {
		c.bconn.Close()
		c.bconn = nil
	}
	return true
}

// retireLocked removes the connection from its group.
func (c *conn) retireLocked() {
	g := c.group
	if c.alone {
		if g.bulk == c {
			g.bulk = nil
		}
	} else {
		g.conns = slices.DeleteFunc(g.conns, func(other *conn) bool { return other == c })
	}
	if len(g.conns) > 0 {
		return
	}
	if g.bulk != nil {
		g.bulk.pokeLocked() // it was waiting for this
	} else if c.p.groups[g.name] == g {
		delete(c.p.groups, g.name)
	}
}

// room asks a subscription for its room.
func (s *Seat) room() int {
	room := s.member.Room()
	if room == 0 && s.failed {
		s.failed = false
		s.member.Reading()
	}
	return room
}

// grouped adds the parts of a topic's subscriptions in a group.
func (c *conn) grouped(t *topic, seats []*Seat) {
	for i, s := range seats {
		if room := s.room(); room > 0 {
			c.parts = append(c.parts, part{topic: t, seats: seats[i : i+1], after: s.after, count: room})
		}
	}
}

// fanOut adds the part of a topic's fan-outs. They may be at several positions in the
// stream, and then take turns. Once no entries are found at any of them, the read blocks
// at the first of these positions, where every new entry is seen.
func (c *conn) fanOut(t *topic, seats []*Seat, turn int) {
	p := part{topic: t}
	n := len(seats)
	wait := t.dry >= n
	for i := range seats {
		s := seats[(turn+i)%n]
		room := s.room()
		switch {
		case room == 0:
			continue
		case len(p.seats) == 0, wait && xstream.CompareIDs(s.after, p.after) < 0:
			p.after, p.count = s.after, room
			p.seats = p.seats[:0]
		case s.after != p.after:
			p.more = !wait
			continue
		default:
			p.count = min(p.count, room)
		}
		p.seats = append(p.seats, s)
	}
	if len(p.seats) > 0 {
		c.parts = append(c.parts, p)
	}
}

// connect opens the connection if there is none, or if it no longer leads to the
// right server.
func (c *conn) connect() (*redisx.Conn, error) {
	p := c.p
	key := c.parts[0].topic.key
	if bconn := c.bconn; bconn != nil { // written by this goroutine only
		if p.route.Leads(c.ctx, bconn, key) {
			return bconn, nil
		}
		c.disconnect()
	}
	bconn, err := p.cfg.Client.OpenConn(c.ctx, p.cfg.Pipeline, key, p.cfg.Block)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.ctx.Err() != nil { // nobody waits for it
		bconn.Close()
		return nil, c.ctx.Err()
	}
	c.bconn, c.astray = bconn, false
	return bconn, nil
}

func (c *conn) disconnect() {
	c.p.mu.Lock()
	bconn := c.bconn
	c.bconn = nil
	c.p.mu.Unlock()
	if bconn != nil {
		bconn.Close()
	}
}

// orphans lists, for the members that have lost an answer, the entries that are pending for
// their consumers. Nothing is read for them in the meantime, since only this goroutine does
// that.
func (c *conn) orphans() error {
	p := c.p
	for _, part := range c.parts {
		s := part.seats[0] // the only one of a group
		p.mu.Lock()
		unsure := s.unsure
		s.unsure = false
		p.mu.Unlock()
		if !unsure {
			continue
		}
		bconn, err := c.connect()
		var rows []xstream.Pending
		if err == nil {
			c.wakeBroken()
			stream := xstream.New(p.cfg.Client, s.key, p.cfg.Group)
			rows, err = stream.PendingOn(c.ctx, bconn, s.consumer, orphanPage)
		}
		if err != nil {
			p.mu.Lock()
			s.unsure = true
			p.mu.Unlock()
			if xstream.GroupLost(err) && len(c.parts) > 1 {
				continue // the read will report the topic again
			}
			return err
		}
		s.member.Orphans(rows)
	}
	return nil
}

// wakeBroken ends the reads of broken connections. The server may not have noticed
// the break, and would deliver the next entries to nobody, after the search for
// orphans.
func (c *conn) wakeBroken() {
	p := c.p
	p.mu.Lock()
	broken := p.broken[c.group.name]
	delete(p.broken, c.group.name)
	p.mu.Unlock()
	for _, bconn := range broken {
		bconn.Wake(c.ctx)
	}
}

// read reads the parts with one command, and distributes the entries.
func (c *conn) read() {
	bconn, err := c.connect()
	if err != nil {
		c.fail(err)
		return
	}
	if c.dropAbandoned(); len(c.parts) == 0 {
		return
	}
	read := c.command(c.parts)
	if read.Block > 0 && !bconn.Wakable() {
		c.p.cfg.Unwakable()
		read.Block = min(read.Block, unwakableBlock)
		if len(c.sets) > 1 || c.p.cfg.Client.Wrapped() {
			read.Block = min(read.Block, sharedBlock)
		}
	}
	sent := time.Now()
	readings, err := read.Do(c.ctx, bconn, &c.replies)
	if err == nil && !c.known(readings) {
		// For example, a hook renames keys. A reply for one stream needs no name.
		c.unsure()
		c.p.splitUp(c)
		return
	}
	if err != nil {
		c.fail(err)
		return
	}
	at := time.Now()
	asked := read.Count
	if len(c.parts) > 1 {
		asked = 0
	}
	c.dry = !slices.ContainsFunc(readings, func(got xstream.Reading) bool { return len(got.Entries) > 0 })
	for _, p := range c.parts {
		var entries []xstream.Entry
		for _, got := range readings {
			if len(c.parts) == 1 || got.Key == p.topic.key {
				entries = got.Entries
			}
		}
		c.deal(p, Batch{Entries: entries, Sent: sent, At: at, Asked: asked})
		c.keepPlace(p, len(entries) == read.Count)
	}
	// Let handlers start now: quick ones make room before the next read, which
	// their topics would otherwise have to wake.
	runtime.Gosched()
}

// dropAbandoned drops topics without seats: connecting may have taken long, and
// nobody would take their entries.
func (c *conn) dropAbandoned() {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	c.parts = slices.DeleteFunc(c.parts, func(p part) bool {
		return !slices.ContainsFunc(p.seats, func(s *Seat) bool { return s.topic != nil })
	})
}

// unsure notes that the read may have taken entries without an answer.
func (c *conn) unsure() {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	for _, part := range c.parts {
		for _, s := range part.seats {
			s.unsure = c.p.cfg.leased()
		}
	}
}

// known reports whether all readings are of streams that were requested.
func (c *conn) known(readings []xstream.Reading) bool {
	return len(c.parts) == 1 || !slices.ContainsFunc(readings, func(got xstream.Reading) bool {
		return !slices.ContainsFunc(c.parts, func(p part) bool { return p.topic.key == got.Key })
	})
}

// command returns the command that reads the parts.
func (c *conn) command(parts []part) xstream.Read {
	cfg := c.p.cfg
	read := xstream.Read{Group: cfg.Group, Consumer: parts[0].seats[0].consumer, NoAck: cfg.NoAck, Block: c.block, From: make([]xstream.Cursor, len(parts))}
	read.Count = max(1, cfg.Batch/len(parts))
	for i, p := range parts {
		read.Count = min(read.Count, p.count)
		read.From[i] = xstream.Cursor{Key: p.topic.key, After: p.after}
		// Do not block if a seat must learn at once whether reading works, or if
		// this is only a part of what could be read now.
		if p.more || slices.ContainsFunc(p.seats, func(s *Seat) bool { return s.failed }) {
			read.Block = -1
		}
	}
	return read
}

// deal distributes a topic's entries to its subscriptions.
func (c *conn) deal(p part, b Batch) {
	for _, s := range p.seats {
		if s.failed {
			s.failed = false
			s.member.Reading()
		}
	}
	if len(b.Entries) == 0 {
		p.topic.dry++
		return
	}
	p.topic.dry = 0
	for _, s := range p.seats {
		if c.p.cfg.Group == "" {
			s.after = b.Entries[len(b.Entries)-1].ID
		}
		s.member.Take(b)
	}
}

// keepPlace moves a topic to the connection for backlogs, and back.
func (c *conn) keepPlace(p part, full bool) {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	t := p.topic
	if t.conn != c || len(t.seats) == 0 {
		return
	}
	switch {
	case c.alone:
		if !full && !p.more {
			t.coolLocked()
		}
	case !full || len(c.topics) == 1 || c.p.cfg.Client.Wrapped():
		t.full = 0
	default:
		// Full twice in a row: this backlog would hold up the other topics.
		if t.full++; t.full > 1 {
			t.heatLocked()
		}
	}
}

// fail ends Serve for the seats of a failed read. If a read of several streams
// returns an error reply, its stream is unknown: each is then read by itself.
func (c *conn) fail(err error) {
	p := c.p
	if !redisx.IsReply(err) {
		c.unsure()
	}
	p.mu.Lock()
	if c.bconn != nil && !redisx.IsReply(err) && p.cfg.leased() {
		p.broken[c.group.name] = append(p.broken[c.group.name], c.bconn)
	}
	astray := c.astray
	c.astray = false
	p.mu.Unlock()
	c.disconnect() // even after an error reply: it may be the wrong server by now
	if astray && !redisx.IsReply(err) {
		return // it is reopened at once
	}
	p.cfg.Client.Refresh(err)
	if redisx.ReplyHas(err, "CROSSSLOT") && len(c.parts) > 1 {
		p.splitUp(c)
		return
	}
	if len(c.parts) > 1 && redisx.IsReply(err) {
		for _, p := range slices.Clone(c.parts) {
			c.parts, c.block = []part{p}, -1
			c.read()
		}
		return
	}
	c.dismiss(c.parts, err)
	// The error is also about the other reads on the server; an error reply, about those of the topic.
	c.dismiss(slices.DeleteFunc(slices.Clone(c.rest), func(p part) bool {
		return redisx.IsReply(err) && p.topic != c.parts[0].topic
	}), err)
}

func (c *conn) dismiss(parts []part, err error) {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	for _, part := range parts {
		for _, s := range part.seats {
			switch {
			case s.topic == nil, s.topic.conn != c: // it has left, or is served by another connection since
			case s.leaving:
				s.departLocked(nil)
			default:
				s.failed = true
				s.departLocked(err)
			}
		}
	}
}

// splitUp gives the topics of each slot their own connections.
func (p *Poller) splitUp(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cfg.Client.Wrapped() {
		return // its topics are already read slot by slot
	}
	p.split = true
	topics := c.topics
	c.topics = nil
	for _, t := range topics {
		p.placeLocked(t)
		t.conn.pokeLocked()
	}
}
