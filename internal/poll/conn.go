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
	alone  bool // it reads topics with a backlog, one at a time
	topics []*topic
	link   *redisx.Conn // nil: not connected
	round  int          // counts the looks at the topics
	busy   bool         // a read may be under way
	waking bool         // somebody sees to it that the next round begins
	astray bool         // the link leads to the wrong server, and was closed

	// The goroutine's own.
	sets  []set // what there is, as this round found it
	seats []*Seat
	parts []part
	slots int // of a wrapped client, that take turns
	turn  int
	buf   xstream.Buffer
}

// set is a topic and the number of its seats.
type set struct {
	topic *topic
	turn  int
	n     int
}

// part is a topic's part in a read: the seats that have room, at one place in the
// stream.
type part struct {
	topic *topic
	seats []*Seat
	rooms []int
	after string
	count int  // entries that there is room for
	more  bool // there are seats with room at other places, to be read for next
}

// run reads until no topic is left.
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

// wake interrupts the read under way until the round is over.
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
		over, link := c.round != round || !c.busy, c.link
		if over && c.round == round {
			c.waking = false
		}
		c.p.mu.Unlock()
		if over {
			return
		}
		pause = min(max(minWake, 2*pause), maxWake)
		if link != nil && link.Wake(c.ctx) {
			pause = maxWake
		}
		timer.Reset(pause) // from the answer on, however slow that was
	}
}

// look begins a round: it dismisses the seats that leave, and decides what the next
// read is of. It returns false when there is nobody left to read for.
func (c *conn) look() bool {
	p := c.p
	select {
	case <-c.mail:
	default:
	}
	p.mu.Lock()
	c.round++
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
		}
	}
	if c.endsLocked(leaving) {
		p.mu.Unlock()
		return false
	}
	for _, s := range leaving {
		s.departLocked(nil)
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
		if part, ok := c.part(set.topic, rest[:set.n], set.turn); ok {
			c.parts = append(c.parts, part)
		}
		rest = rest[set.n:]
	}
	switch {
	case c.alone && len(c.parts) > 0:
		c.parts[0] = c.parts[c.round%len(c.parts)]
		c.parts = c.parts[:1]
	case p.cfg.Client.Wrapped():
		c.oneSlot()
	}
	if len(c.parts) == 0 {
		p.mu.Lock()
		c.busy = false
		p.mu.Unlock()
	}
	return true
}

// endsLocked reports whether nobody is left once these have left. The connection is
// closed then, before they are told.
func (c *conn) endsLocked(leaving []*Seat) bool {
	stay := 0
	for _, t := range c.topics {
		stay += len(t.seats)
	}
	if stay > len(leaving) || c.alone && c.group.bulk == c && len(c.group.conns) > 0 {
		return false
	}
	if c.link != nil {
		c.link.Close()
		c.link = nil
	}
	for _, s := range leaving {
		s.departLocked(nil)
	}
	c.retireLocked()
	return true
}

// retireLocked takes the connection out of its group.
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

// part asks a topic's subscriptions for their room. In fan-out they may be at several
// places in the stream, and take turns then; once nothing was found at any of them,
// the read waits at the first of these places, where whatever comes is seen.
func (c *conn) part(t *topic, seats []*Seat, turn int) (part, bool) {
	p := part{topic: t, after: ">"}
	n := len(seats)
	wait := t.dry >= n
	for i := range seats {
		s := seats[(turn+i)%n]
		room := s.member.Room()
		switch {
		case room == 0:
			if s.failed {
				s.failed = false
				s.member.Reading()
			}
			continue
		case c.p.cfg.Group != "":
			p.count += room
		case len(p.seats) == 0, wait && xstream.CompareIDs(s.after, p.after) < 0:
			p.after, p.count = s.after, room
			p.seats, p.rooms = p.seats[:0], p.rooms[:0]
		case s.after != p.after:
			p.more = !wait
			continue
		default:
			p.count = min(p.count, room)
		}
		p.seats, p.rooms = append(p.seats, s), append(p.rooms, room)
	}
	return p, len(p.seats) > 0
}

// oneSlot keeps the parts of one slot, in turn, where the client is a wrapped one: it
// may be one of a Cluster or a Ring, and must do with one connection.
func (c *conn) oneSlot() {
	var tags []string
	for _, p := range c.parts {
		if tag := redisx.TagOf(p.topic.key); !slices.Contains(tags, tag) {
			tags = append(tags, tag)
		}
	}
	if c.slots = len(tags); c.slots < 2 {
		return
	}
	c.turn++
	tag := tags[c.turn%len(tags)]
	c.parts = slices.DeleteFunc(c.parts, func(p part) bool { return redisx.TagOf(p.topic.key) != tag })
}

// connect opens the connection, if there is none or it leads elsewhere by now.
func (c *conn) connect() (*redisx.Conn, error) {
	p := c.p
	key := c.parts[0].topic.key
	if link := c.link; link != nil { // written by this goroutine only
		if p.route.Leads(c.ctx, link, key) {
			return link, nil
		}
		c.disconnect()
	}
	link, err := p.cfg.Client.OpenConn(c.ctx, p.cfg.Pipeline, key, p.cfg.Block)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.ctx.Err() != nil { // nobody waits for it
		link.Close()
		return nil, c.ctx.Err()
	}
	c.link, c.astray = link, false
	return link, nil
}

func (c *conn) disconnect() {
	c.p.mu.Lock()
	link := c.link
	c.link = nil
	c.p.mu.Unlock()
	if link != nil {
		link.Close()
	}
}

// orphans looks, for the topics that have lost an answer, for what is pending in the
// consumer's name and in nobody's hands. Nothing of these topics is being read
// meanwhile, since that is this goroutine's to do.
func (c *conn) orphans() error {
	p := c.p
	for _, part := range c.parts {
		t := part.topic
		p.mu.Lock()
		unsure := t.unsure && p.cfg.leased()
		t.unsure = false
		p.mu.Unlock()
		if !unsure {
			continue
		}
		link, err := c.connect()
		var rows []xstream.Pending
		if err == nil {
			p.wakeBroken(c.ctx)
			stream := xstream.New(p.cfg.Client, t.key, p.cfg.Group)
			rows, err = stream.PendingOn(c.ctx, link, p.cfg.Consumer, orphanPage)
		}
		if err != nil {
			p.mu.Lock()
			t.unsure = true
			p.mu.Unlock()
			if xstream.GroupLost(err) && len(c.parts) > 1 {
				continue // the read will say so again, of this topic
			}
			return err
		}
		if rows = p.unheld(t, rows); len(rows) > 0 &&
			!slices.ContainsFunc(part.seats, func(s *Seat) bool { return s.member.Orphans(rows) }) {
			p.mu.Lock()
			t.unsure = true // all of them leave: for the others to find
			p.mu.Unlock()
		}
	}
	return nil
}

// wakeBroken ends the reads of connections that broke. The server may not have noticed, and
// would give what comes next to nobody, after it was asked what nobody has.
func (p *Poller) wakeBroken(ctx context.Context) {
	p.mu.Lock()
	broken := p.broken
	p.broken = nil
	p.mu.Unlock()
	for _, link := range broken {
		link.Wake(ctx)
	}
}

// unheld returns the rows that nobody here has.
func (p *Poller) unheld(t *topic, rows []xstream.Pending) []xstream.Pending {
	p.mu.Lock()
	members := slices.Clone(p.members[t.key]) // also those that are away, or drain
	disowned := p.disowned[t.key]
	for id := range disowned {
		if !slices.ContainsFunc(rows, func(r xstream.Pending) bool { return r.ID == id }) {
			delete(disowned, id)
		}
	}
	rows = slices.DeleteFunc(rows, func(r xstream.Pending) bool { return disowned[r.ID] })
	p.mu.Unlock()
	return slices.DeleteFunc(rows, func(r xstream.Pending) bool {
		return slices.ContainsFunc(members, func(m Member) bool { return m.Holds(r.ID) })
	})
}

// read reads the parts in one command, and gives out what came.
func (c *conn) read() {
	link, err := c.connect()
	if err != nil {
		c.fail(err)
		return
	}
	if c.dropAbandoned(); len(c.parts) == 0 {
		return
	}
	read := c.command(c.parts)
	if read.Block > 0 && !link.Wakable() {
		c.p.cfg.Unwakable()
		read.Block = min(read.Block, unwakableBlock)
		if len(c.sets) > 1 || c.p.cfg.Client.Wrapped() {
			read.Block = max(min(read.Block, sharedBlock)/time.Duration(max(1, c.slots)), time.Millisecond)
		}
	}
	sent := time.Now()
	readings, err := read.Do(c.ctx, link, &c.buf)
	if err == nil && !c.known(readings) {
		// A hook renames keys, say: an answer for one stream needs no name.
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
	// Handlers begin at once, and those that are quick make room before the next read,
	// which their topics would have to wake.
	runtime.Gosched()
}

// dropAbandoned leaves out the topics of which all seats are gone: to connect may have
// taken long, and what would be read for them is nobody's.
func (c *conn) dropAbandoned() {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	c.parts = slices.DeleteFunc(c.parts, func(p part) bool {
		return !slices.ContainsFunc(p.seats, func(s *Seat) bool { return s.topic != nil })
	})
}

// unsure notes that the read may have taken entries that nobody was told of.
func (c *conn) unsure() {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	for _, part := range c.parts {
		part.topic.unsure = c.p.cfg.leased()
	}
}

// known reports whether all that was read is of streams that were asked for.
func (c *conn) known(readings []xstream.Reading) bool {
	for _, got := range readings {
		if len(c.parts) > 1 && !slices.ContainsFunc(c.parts, func(p part) bool { return p.topic.key == got.Key }) {
			return false
		}
	}
	return true
}

// command returns the read of the parts.
func (c *conn) command(parts []part) xstream.Read {
	cfg := c.p.cfg
	read := xstream.Read{Group: cfg.Group, Consumer: cfg.Consumer, NoAck: cfg.NoAck, Block: cfg.Block, From: make([]xstream.Cursor, len(parts))}
	for i, p := range parts {
		if i == 0 || p.count < read.Count {
			read.Count = p.count
		}
		read.From[i] = xstream.Cursor{Key: p.topic.key, After: p.after}
		// What is to know at once whether reading works does not wait, and what is
		// only a part of what could be read now.
		if p.more || c.alone || slices.ContainsFunc(p.seats, func(s *Seat) bool { return s.failed }) {
			read.Block = -1
		}
	}
	read.Count = max(1, min(read.Count, cfg.Batch/len(parts)))
	return read
}

// deal gives a topic's subscriptions what was read for them.
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
	last := b.Entries[len(b.Entries)-1].ID
	switch {
	case c.p.cfg.Group == "":
		b.Shared = len(p.seats) > 1
		for _, s := range p.seats {
			s.after = last
			s.member.Take(b)
		}
	case len(p.seats) == 1:
		p.seats[0].member.Take(b)
	default:
		for i, entries := range hands(b.Entries, p.rooms) {
			if len(entries) > 0 {
				share := b
				share.Entries = entries
				p.seats[i].member.Take(share)
			}
		}
	}
}

// hands deals entries one by one to those that have room.
func hands(entries []xstream.Entry, rooms []int) [][]xstream.Entry {
	out := make([][]xstream.Entry, len(rooms))
	total := 0
	for _, room := range rooms {
		total += room
	}
	if over := len(entries) - total; over > 0 { // more than was asked for
		rooms = append([]int{rooms[0] + over}, rooms[1:]...)
	}
	for i := 0; len(entries) > 0; i = (i + 1) % len(rooms) {
		if len(out[i]) < rooms[i] {
			out[i] = append(out[i], entries[0])
			entries = entries[1:]
		}
	}
	return out
}

// keepPlace moves a topic to the connection for backlogs and back.
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
		// Full twice in a row: there is more than a read for all should wait for.
		if t.full++; t.full > 1 {
			t.heatLocked()
		}
	}
}

// fail ends Serve for those that the read was for. Of an answer to several streams it
// is not known whose error it is: each is read by itself.
func (c *conn) fail(err error) {
	p := c.p
	if !redisx.IsReply(err) {
		c.unsure()
	}
	p.mu.Lock()
	if c.link != nil && !redisx.IsReply(err) && p.cfg.leased() {
		p.broken = append(p.broken, c.link)
	}
	astray := c.astray
	c.astray = false
	p.mu.Unlock()
	c.disconnect() // also after an answer: it may be the wrong server by now
	if astray && !redisx.IsReply(err) {
		return // it is opened anew at once
	}
	p.cfg.Client.Refresh(err)
	if redisx.ReplyHas(err, "CROSSSLOT") && len(c.parts) > 1 {
		p.splitUp(c)
		return
	}
	if len(c.parts) > 1 && redisx.IsReply(err) {
		for _, part := range c.parts {
			c.readAlone(part)
		}
		return
	}
	c.dismiss(c.parts, err)
}

// readAlone reads what is there of one topic, of several.
func (c *conn) readAlone(p part) {
	link, err := c.connect()
	var readings []xstream.Reading
	sent := time.Now()
	if err == nil {
		read := c.command([]part{p})
		read.Block = -1
		readings, err = read.Do(c.ctx, link, &c.buf)
	}
	if err != nil {
		if !redisx.IsReply(err) {
			c.disconnect()
		}
		c.dismiss([]part{p}, err)
		return
	}
	for _, got := range readings {
		c.deal(p, Batch{Entries: got.Entries, Sent: sent, At: time.Now()})
	}
}

func (c *conn) dismiss(parts []part, err error) {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	for _, part := range parts {
		if !redisx.IsReply(err) {
			part.topic.unsure = c.p.cfg.leased()
		}
		for _, s := range part.seats {
			switch {
			case s.topic == nil: // it has left
			case s.leaving:
				s.departLocked(nil)
			default:
				s.failed = true
				s.departLocked(err)
			}
		}
	}
}

// splitUp gives each slot's topics connections of their own.
func (p *Poller) splitUp(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cfg.Client.Wrapped() {
		return // its topics are read slot by slot already
	}
	p.split = true
	topics := c.topics
	c.topics = nil
	for _, t := range topics {
		p.placeLocked(t)
		t.conn.pokeLocked()
	}
}
