package sim

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// A network connects processes to the server in memory. It blocks only on channels and
// timers: waiting for anything else would stop the bubble's clock.
type network struct {
	seed  uint64
	serve func(net.Conn)

	mu         sync.Mutex
	lanes      []*lane
	influences []*influence
	addr       net.Addr // of the current master
}

// An influence is something wrong with the lanes of some processes, including lanes that
// are made later.
type influence struct {
	on       []string // nil: all
	do, undo func(*lane)
	lanes    []*lane // that have it
}

func newNetwork(seed uint64, serve func(net.Conn)) *network {
	return &network{seed: seed, serve: serve, addr: serverAddr(0)}
}

// serverAddr is the address of the master after a number of failovers.
func serverAddr(failovers int) net.Addr {
	return &net.TCPAddr{IP: net.IPv4(10, 0, 0, byte(1+failovers%250)), Port: 6379}
}

// failOver makes new connections lead to another address.
func (n *network) failOver(failovers int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addr = serverAddr(failovers)
}

func (n *network) master() net.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.addr
}

// lane makes the way to the server for one life of a process.
func (n *network) lane(process string, life int, latency time.Duration) *lane {
	l := &lane{
		network: n, process: process, life: life, latency: latency, slowness: 1,
		dice: newDice(n.seed, "lane "+process, life), opened: closedChannel(),
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lanes = append(n.lanes, l)
	for _, i := range n.influences {
		i.addLocked(l)
	}
	return l
}

// influence makes something go wrong with the lanes of these processes, until end is
// called.
func (n *network) influence(on []string, do, undo func(*lane)) (end func()) {
	i := &influence{on: on, do: do, undo: undo}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.influences = append(n.influences, i)
	for _, l := range n.lanes {
		i.addLocked(l)
	}
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.influences = slices.DeleteFunc(n.influences, func(other *influence) bool { return other == i })
		for _, l := range i.lanes {
			i.undo(l)
		}
	}
}

func (i *influence) addLocked(l *lane) {
	if i.on == nil || slices.Contains(i.on, l.process) {
		i.lanes = append(i.lanes, l)
		i.do(l)
	}
}

// A lane is the way to the server for one life of a process, and what is wrong with it.
type lane struct {
	network *network
	process string
	life    int
	latency time.Duration // the mean, one way

	mu       sync.Mutex
	dice     *rand.Rand
	dead     bool
	blocked  int           // partitions and stops in force
	opened   chan struct{} // closed while nothing is blocked
	refused  int           // dials are refused
	slowness int           // multiplies the latency
	ambush   func(sent []byte) (spring func())
	cuts     [points]float64
	links    []*link
	dials    int
}

// Where a connection is cut.
type point int

const (
	beforeCommand point = iota // nothing, or only a part of it, reaches the server
	beforeReply                // the command has run
	midReply
	points
)

// A link is a connection.
type link struct {
	lane *lane
	dice *rand.Rand
	up   *pipe // to the server
	down *pipe
	trap func() // called when the next reply is lost; nil: it is not lost
}

// A pipe is one direction of a link. Its lane's mutex guards it. It has one reader.
type pipe struct {
	link     *link
	queue    []chunk
	last     time.Time // when what was written last arrives
	closed   bool      // by the reader
	severed  bool      // by the writer, or on the way: it accepts no more data
	deadline time.Time // the reader's
	poke     chan struct{}
	timer    *time.Timer
}

// A chunk is what one Write wrote, or the end of the connection.
type chunk struct {
	at   time.Time
	data []byte
	end  error // nil: there are data
}

// dialTimeout is for dials whose context has no deadline.
const dialTimeout = 5 * time.Second

// dial is redis.Options.Dialer.
func (l *lane) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	timeout := time.NewTimer(dialTimeout)
	defer timeout.Stop()
	for {
		trip, opened := l.begin()
		select {
		case <-time.After(trip):
		case <-ctx.Done():
			return nil, dialError(ctx.Err())
		}
		select {
		case <-opened:
		case <-ctx.Done():
			return nil, dialError(ctx.Err())
		case <-timeout.C:
			return nil, dialError(os.ErrDeadlineExceeded)
		}
		conn, server, err := l.connect()
		if conn != nil {
			go l.network.serve(server)
			return conn, nil
		} else if err != nil {
			return nil, dialError(err)
		}
	}
}

func dialError(err error) error { return &net.OpError{Op: "dial", Net: "sim", Err: err} }

// begin returns how long connecting takes, and a channel to wait for after that.
func (l *lane) begin() (trip time.Duration, opened <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.delayLocked(l.dice) + l.delayLocked(l.dice), l.opened
}

// connect returns both ends of a connection, or nils if the lane was blocked again.
func (l *lane) connect() (client, server net.Conn, err error) {
	addr := l.network.master()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.dead, l.refused > 0:
		return nil, nil, syscall.ECONNREFUSED
	case l.blocked > 0:
		return nil, nil, nil
	}
	l.dials++
	k := &link{lane: l, dice: newDice(l.network.seed, "link "+l.process, 10_000*l.life+l.dials)}
	k.up, k.down = newPipe(k), newPipe(k)
	l.links = append(l.links, k)
	client = &conn{link: k, in: k.down, out: k.up, local: &net.TCPAddr{IP: net.IPv4(10, 1, 0, 1), Port: 1024 + l.dials}, remote: addr}
	server = &conn{link: k, in: k.up, out: k.down, local: addr, remote: client.LocalAddr()}
	return client, server, nil
}

func newPipe(k *link) *pipe { return &pipe{link: k, poke: make(chan struct{}, 1)} }

// delayLocked returns how long data take one way: mostly about the latency, sometimes
// much longer.
func (l *lane) delayLocked(dice *rand.Rand) time.Duration {
	d := time.Duration((0.5 + dice.Float64()) * float64(l.latency))
	if dice.IntN(100) == 0 {
		d *= 20
	}
	return d * time.Duration(l.slowness)
}

// set changes the state of the lane.
func (l *lane) set(change func(*lane)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(l)
}

// block stops traffic in both directions. Connections stay open, and what was written
// arrives after unblock.
func (l *lane) block() {
	l.set(func(l *lane) {
		if l.blocked++; l.blocked == 1 && !l.dead {
			l.opened = make(chan struct{})
			l.pokeLocked()
		}
	})
}

func (l *lane) unblock() {
	l.set(func(l *lane) {
		if l.dead {
			return
		}
		if l.blocked--; l.blocked == 0 {
			close(l.opened)
			l.pokeLocked()
		}
	})
}

// cut breaks all connections. What has not arrived is lost.
func (l *lane) cut() {
	l.set(func(l *lane) {
		for _, k := range slices.Clone(l.links) {
			k.resetLocked()
		}
	})
}

// kill takes the process off the network for good. With flush its machine survives, and
// sends what the process has written.
func (l *lane) kill(flush bool) {
	l.set(func(l *lane) {
		l.dead = true
		if l.blocked > 0 {
			l.blocked = 0
			close(l.opened)
		}
		for _, k := range slices.Clone(l.links) {
			k.down.closed = true
			if flush {
				k.up.endLocked(io.EOF)
			} else {
				k.resetLocked()
			}
		}
		l.pokeLocked()
	})
}

func (l *lane) pokeLocked() {
	for _, k := range l.links {
		k.up.wake()
		k.down.wake()
	}
}

// resetLocked breaks the connection for both ends at once.
func (k *link) resetLocked() {
	for _, p := range []*pipe{k.up, k.down} {
		p.queue = nil
		p.severed = false
		p.endLocked(syscall.ECONNRESET)
	}
	k.lane.links = slices.DeleteFunc(k.lane.links, func(other *link) bool { return other == k })
}

// endLocked ends the data: the reader gets all that was written before, then err.
func (p *pipe) endLocked(err error) {
	if p.severed {
		return
	}
	p.severed = true
	p.queue = append(p.queue, chunk{at: p.last, end: err})
	p.wake()
}

func (p *pipe) wake() {
	select {
	case p.poke <- struct{}{}:
	default:
	}
}

// putLocked sends data.
func (p *pipe) putLocked(b []byte) {
	at := time.Now().Add(p.link.lane.delayLocked(p.link.dice))
	if at.Before(p.last) {
		at = p.last // a connection keeps its order
	}
	p.last = at
	p.queue = append(p.queue, chunk{at: at, data: slices.Clone(b)})
	p.wake()
}

// takeLocked reads what has arrived. If nothing has, it returns the time until which to
// wait, if that is known.
func (p *pipe) takeLocked(b []byte, now time.Time) (n int, until time.Time, err error) {
	if p.closed {
		return 0, until, net.ErrClosed
	}
	if !p.deadline.IsZero() && !now.Before(p.deadline) {
		return 0, until, os.ErrDeadlineExceeded
	}
	until = p.deadline
	if len(p.queue) == 0 {
		return 0, until, nil
	}
	head := &p.queue[0]
	reset := head.end != nil && head.end != io.EOF
	switch {
	case p.link.lane.blocked > 0 && !reset:
	case now.Before(head.at) && !reset:
		if until.IsZero() || head.at.Before(until) {
			until = head.at
		}
	case head.end != nil:
		return 0, until, head.end
	default:
		n = copy(b, head.data)
		if head.data = head.data[n:]; len(head.data) == 0 {
			p.queue = p.queue[1:]
		}
	}
	return n, until, nil
}

func (p *pipe) read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		p.link.lane.mu.Lock()
		n, until, err := p.takeLocked(b, time.Now())
		p.link.lane.mu.Unlock()
		if n > 0 || err != nil {
			return n, err
		}
		p.wait(until)
	}
}

// wait waits for a change, or until that time.
func (p *pipe) wait(until time.Time) {
	if until.IsZero() {
		<-p.poke
		return
	}
	if p.timer == nil {
		p.timer = time.NewTimer(time.Until(until))
	} else {
		p.timer.Reset(time.Until(until))
	}
	select {
	case <-p.poke:
	case <-p.timer.C:
	}
	p.timer.Stop()
}

// conn is one end of a link.
type conn struct {
	link          *link
	in, out       *pipe
	local, remote net.Addr
}

func (c *conn) Read(b []byte) (int, error) { return c.in.read(b) }

func (c *conn) Write(b []byte) (int, error) {
	l := c.link.lane
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case c.in.closed:
		return 0, net.ErrClosed
	case c.out.severed || l.dead:
		return 0, syscall.EPIPE
	case len(b) == 0:
		return 0, nil // a reader would wait for an empty chunk
	}
	if c.out == c.link.up {
		return c.sendLocked(b)
	}
	return c.replyLocked(b)
}

// sendLocked writes commands, and may cut the connection before they have arrived.
func (c *conn) sendLocked(b []byte) (int, error) {
	if ambush := c.link.lane.ambush; ambush != nil && c.link.trap == nil {
		c.link.trap = ambush(b)
	}
	if c.link.dice.Float64() >= c.link.lane.cuts[beforeCommand] {
		c.out.putLocked(b)
		return len(b), nil
	}
	switch part := 1 + c.link.dice.IntN(len(b)); c.link.dice.IntN(3) {
	case 0: // the write fails
		c.link.resetLocked()
		return 0, syscall.ECONNRESET
	case 1: // it seems to succeed
		c.link.resetLocked()
	default: // a part of it arrives
		c.out.putLocked(b[:part])
		c.breakLocked()
	}
	return len(b), nil
}

// replyLocked writes a reply, or cuts the connection instead.
func (c *conn) replyLocked(b []byte) (int, error) {
	if c.link.trap != nil {
		c.breakLocked()
		c.link.trap()
		c.link.trap = nil
		return len(b), nil
	}
	switch x := c.link.dice.Float64(); {
	case x < c.link.lane.cuts[beforeReply]:
		c.breakLocked()
	case x < c.link.lane.cuts[beforeReply]+c.link.lane.cuts[midReply]:
		c.out.putLocked(b[:1+c.link.dice.IntN(len(b))])
		c.breakLocked()
	default:
		c.out.putLocked(b)
	}
	return len(b), nil
}

// breakLocked breaks the connection behind what is in transit.
func (c *conn) breakLocked() {
	c.link.up.endLocked(io.EOF)
	c.link.down.endLocked(io.ErrUnexpectedEOF)
}

// Close does not wait; what was written still arrives.
func (c *conn) Close() error {
	l := c.link.lane
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.in.closed {
		return net.ErrClosed
	}
	c.in.closed, c.in.queue = true, nil
	c.in.wake()
	c.out.endLocked(io.EOF)
	if c.link.up.closed && c.link.down.closed {
		l.links = slices.DeleteFunc(l.links, func(k *link) bool { return k == c.link })
	}
	return nil
}

func (c *conn) SetReadDeadline(t time.Time) error {
	l := c.link.lane
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.in.closed {
		return net.ErrClosed
	}
	c.in.deadline = t
	c.in.wake()
	return nil
}

// SetWriteDeadline does nothing: a Write does not wait.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

func (c *conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }
func (c *conn) LocalAddr() net.Addr           { return c.local }
func (c *conn) RemoteAddr() net.Addr          { return c.remote }

func closedChannel() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}
