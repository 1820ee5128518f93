package goxstreams

import (
	"cmp"
	"errors"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// maxWatches bounds the connections on which a Subscriber waits for new
	// entries. One would do; but what a read costs the server grows with its
	// streams (1,000 of them: 0.3 ms).
	maxWatches = 2

	// subscriberLanes: a command that takes long must not hold up the others.
	subscriberLanes = 2

	// maxAhead bounds the entries that a Subscriber has read ahead, over all its
	// topics.
	maxAhead = 10_000

	// minShare is what a subscription may have of each quota, however many others
	// there are.
	minShare = 100

	// unwakableBlock bounds a read that cannot be woken: Close waits for it; and
	// sharedBlock one that topics may wait to join.
	unwakableBlock = time.Second
	sharedBlock    = 100 * time.Millisecond

	// A read that was interrupted before it arrived at the server blocks all the
	// same, so that the interruption is repeated: soon at first, since it may have
	// crossed the read.
	minWake = 200 * time.Microsecond
	maxWake = 10 * time.Millisecond
)

// hub is where the subscriptions of a Subscriber share what they need of Redis's
// connections. Up to maxWatches topics have one each for their reads; more topics
// share them. The readers are goroutines of their own all the same, and one of
// those that share a connection reads for the others.
type hub struct {
	client redis.UniversalClient
	line   *line // for all but reads that block
	noAck  bool
	block  time.Duration
	batch  int
	name   string // generated, for consumers without a name

	// The looks at all topics come at the same time, to share a pipeline.
	epoch time.Time
	tick  time.Duration

	open  atomic.Int64 // subscriptions
	ahead atomic.Int64 // entries read ahead, by all of them

	waiting, unacked, sightings quota

	mu     sync.Mutex
	split  bool // the server refuses streams of several slots in one command
	groups map[watchKey]*watchGroup
	topics map[string]map[int]bool // the ordinals of each topic's subscriptions
}

// watchKey says which streams one command can read: those of one consumer, and
// in a Cluster those of one slot.
type watchKey struct {
	ordinal int
	tag     string
}

type watchGroup struct {
	readers int
	watches []*watch

	// For topics with more in them than a read for all should wait for. Not the
	// line: what is read here may take longer than other commands may.
	bulk struct {
		sync.Mutex
		link *link
		buf  replyBuffer
	}
}

// readAlone reads what is there now.
func (g *watchGroup) readAlone(r *reader, count int) ([]entry, error) {
	s, h := r.s, r.s.hub
	g.bulk.Lock()
	defer g.bulk.Unlock()
	if g.bulk.link == nil {
		l, err := newLink(s.ctx, h.client, h.line, s.topic, 0)
		if err != nil {
			return nil, err
		}
		g.bulk.link = l
	}
	readings, err := s.stream.read(s.ctx, g.bulk.link.conn, &g.bulk.buf, []cursor{r.cursor()}, count, -1, h.noAck)
	if err != nil && !groupLost(err) {
		g.bulk.link.close()
		g.bulk.link = nil
	}
	if err != nil || len(readings) == 0 {
		return nil, err
	}
	return readings[0].entries, nil
}

func newHub(c SubscriberConfig) *hub {
	return &hub{
		client: c.Client, line: newLine(c.Client, subscriberLanes),
		noAck: c.NoAck, block: c.BlockTime, batch: c.BatchSize, name: generatedConsumer(),
		epoch: time.Now(), tick: c.ClaimInterval - c.ClaimInterval/10 + jitter(c.ClaimInterval/10),
		groups: make(map[watchKey]*watchGroup), topics: make(map[string]map[int]bool),
		waiting: quota{all: maxWaiting}, unacked: quota{all: maxUnconfirmed}, sightings: quota{all: maxSightings},
	}
}

// enter returns the ordinal of a new subscription: the first that no other one
// of its topic has. They are no two readers of one stream in one command then.
func (h *hub) enter(topic string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.topics[topic] == nil {
		h.topics[topic] = make(map[int]bool)
	}
	n := 0
	for h.topics[topic][n] {
		n++
	}
	h.topics[topic][n] = true
	h.open.Add(1)
	return n
}

// leave ends what enter began. A name that something may still be pending under
// is not given to another subscription.
func (h *hub) leave(topic string, ordinal int, reusable bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open.Add(-1)
	if !reusable {
		return
	}
	delete(h.topics[topic], ordinal)
	if len(h.topics[topic]) == 0 {
		delete(h.topics, topic)
	}
}

// consumer is the generated name of a subscription: streams in one read are read
// in one name.
func (h *hub) consumer(ordinal int) string {
	if ordinal == 0 {
		return h.name
	}
	return h.name + "-" + strconv.Itoa(ordinal)
}

// quota bounds what all subscriptions of a Subscriber have of something.
type quota struct {
	all  int
	used atomic.Int64
}

// most returns how many a subscription may have that has own of them: what the
// others leave, and a part of its own whatever they have.
func (h *hub) most(q *quota, own int) int {
	return max(q.all-int(q.used.Load())+own, q.all/int(max(1, h.open.Load())), minShare)
}

// untilTick returns the time until the next look at the groups.
func (h *hub) untilTick() time.Duration {
	return h.tick - time.Since(h.epoch)%h.tick
}

func (h *hub) keyLocked(s *subscription) watchKey {
	key := watchKey{ordinal: s.ordinal}
	if _, single := h.client.(*redis.Client); single && !h.split {
		return key
	}
	key.tag = cmp.Or(hashTag(s.topic), s.topic)
	return key
}

// groupLocked returns the watches that the reader may wait in.
func (h *hub) groupLocked(r *reader) *watchGroup {
	key := h.keyLocked(r.s)
	if r.group != nil && r.key == key {
		return r.group
	}
	h.partLocked(r)
	r.key, r.group = key, h.groups[key]
	if r.group == nil {
		r.group = &watchGroup{}
		h.groups[key] = r.group
	}
	r.group.readers++
	return r.group
}

// part is said by a reader that ends. The last one closes the connections.
func (h *hub) part(r *reader) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.partLocked(r)
}

func (h *hub) partLocked(r *reader) {
	if r.group == nil {
		return
	}
	if r.group.readers--; r.group.readers == 0 {
		delete(h.groups, r.key)
		for _, w := range r.group.watches {
			w.disconnect()
		}
		if l := r.group.bulk.link; l != nil { // nobody is left who reads
			l.close()
		}
	}
	r.group = nil
}

// watch is a connection on which a read waits for entries of some streams.
type watch struct {
	hub  *hub
	link atomic.Pointer[link] // nil: not connected

	// Guarded by hub.mu.
	led    bool      // one of the readers reads
	size   int       // readers whose streams are in the read, or to be in the next
	joined []*reader // whose streams are to be in the next
	round  int       // counts the reads
	waking bool      // somebody sees to it that the next read begins

	// The leader's.
	set []*reader // whose streams are in the read
	buf replyBuffer
}

// turn ends a reader's wait.
type turn struct {
	lead bool // it is to read for the others
	err  error
}

// errLookAlone says that a read of several streams was refused, which may be on
// account of any of them.
var errLookAlone = errors.New("a read of several streams was refused")

// wait waits until the reader's subscription has no room any more, closes, or
// would better read by itself. What was read until then is enqueued.
func (h *hub) wait(r *reader) error {
	h.mu.Lock()
	g := h.groupLocked(r)
	var w *watch
	for _, other := range g.watches {
		if w == nil || other.size < w.size {
			w = other
		}
	}
	if w == nil || w.size > 0 && len(g.watches) < maxWatches {
		w = &watch{hub: h}
		g.watches = append(g.watches, w)
	}
	r.watch.Store(w)
	defer r.watch.Store(nil)
	w.size++
	w.joined = append(w.joined, r)
	lead := !w.led
	w.led = true
	before, wake := w.round, !lead && !w.waking
	if wake {
		w.waking = true
	}
	h.mu.Unlock()

	t := turn{lead: lead}
	switch {
	case wake:
		t = w.wakeForJoining(r, before)
	case !lead:
		t = <-r.turn
	}
	if t.lead {
		return w.lead(r)
	}
	return t.err
}

// wakeForJoining interrupts the read until the next one begins, and returns the
// reader's turn.
func (w *watch) wakeForJoining(r *reader, before int) turn {
	var pause wakePause
	for {
		timer := time.NewTimer(pause.next(w.wake(r)))
		select {
		case t := <-r.turn:
			timer.Stop()
			return t
		case <-timer.C:
		}
		w.hub.mu.Lock()
		begun := w.round != before
		w.hub.mu.Unlock()
		if begun {
			return <-r.turn
		}
	}
}

// wake interrupts the read under way. It returns whether there was one.
func (w *watch) wake(r *reader) bool {
	l := w.link.Load()
	return l != nil && l.wake(r.s.ctx)
}

// wakePause is the time until an interruption is repeated.
type wakePause time.Duration

func (p *wakePause) next(woken bool) time.Duration {
	switch {
	case woken:
		*p = wakePause(maxWake)
	case *p == 0:
		*p = wakePause(minWake)
	default:
		*p = min(2**p, wakePause(maxWake))
	}
	return time.Duration(*p)
}

// lead reads for all in the watch until r has something else to do. Then another
// one leads.
func (w *watch) lead(r *reader) error {
	for {
		count, block := w.begin(r)
		if count == 0 {
			w.pass()
			return nil
		}
		sent := time.Now()
		readings, err := w.read(r, count, block)
		if err != nil {
			return w.fail(r, err)
		}
		if len(w.set) > 1 && !w.knows(readings) {
			h := w.hub
			h.mu.Lock()
			h.split = true
			h.mu.Unlock()
			return w.fail(r, errors.New("goxstreams: an answer names other streams than were asked for (a hook that renames keys?)"))
		}
		w.deal(readings, count, sent)
		if len(w.set) > 1 {
			// Handlers that are quick make room first, or their topics would have to
			// wake the next read.
			runtime.Gosched()
		}
	}
}

// begin decides whose streams are in the next read, and dismisses the others. It
// returns how many entries are to be read of each, and for how long; none if r is
// among those that are dismissed.
func (w *watch) begin(r *reader) (count int, block time.Duration) {
	h := w.hub
	h.mu.Lock()
	w.set = append(w.set, w.joined...)
	w.joined = nil
	w.waking = false
	w.round++
	crowded := r.group.readers > maxWatches
	h.mu.Unlock()

	var dismissed []*reader
	stays := w.set[:0]
	leads := false
	for _, m := range w.set {
		room := 0
		if !m.alone {
			room = m.s.roomFor(m)
		}
		switch {
		case room == 0 && m != r:
			dismissed = append(dismissed, m)
		case room > 0:
			if count == 0 || room < count {
				count = room
			}
			stays = append(stays, m)
			leads = leads || m == r
		}
	}
	clear(w.set[len(stays):])
	w.set = stays
	gone := len(dismissed)
	if !leads {
		gone++
	}
	h.mu.Lock()
	w.size -= gone
	h.mu.Unlock()
	for _, m := range dismissed {
		m.turn <- turn{}
	}
	if !leads {
		return 0, 0
	}
	block = h.block
	if l := w.link.Load(); l != nil && !l.wakable() {
		block = min(block, unwakableBlock)
		if crowded {
			block = min(block, sharedBlock)
		}
	}
	return max(1, min(count, h.batch/len(w.set))), block
}

// pass lets another reader lead, if there is one.
func (w *watch) pass() {
	h := w.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	w.set = append(w.set, w.joined...)
	w.joined = nil
	w.led = len(w.set) > 0
	if w.led {
		w.set[0].turn <- turn{lead: true}
	}
}

// read reads the streams of the set.
func (w *watch) read(r *reader, count int, block time.Duration) ([]reading, error) {
	h, s := w.hub, r.s
	l := w.link.Load()
	if l == nil {
		var err error
		if l, err = newLink(s.ctx, h.client, h.line, s.topic, h.block); err != nil {
			return nil, err
		}
		if !l.wakable() {
			s.once.unwakable.Do(func() {
				s.log.Info("No right to CLIENT ID and CLIENT UNBLOCK: Close waits for the read under way, 1s at most; "+
					"of very many topics one may be noticed 0.1s late", s.logFields)
			})
			block = min(block, sharedBlock)
		}
		w.link.Store(l)
	}
	from := make([]cursor, len(w.set))
	for i, m := range w.set {
		from[i] = m.cursor()
		m.serves()
	}
	return s.stream.read(s.ctx, l.conn, &w.buf, from, count, block, h.noAck)
}

// knows reports whether all that was read is of streams in the set.
func (w *watch) knows(readings []reading) bool {
	for _, got := range readings {
		if !slices.ContainsFunc(w.set, func(m *reader) bool { return m.s.topic == got.key }) {
			return false
		}
	}
	return true
}

func (w *watch) disconnect() {
	if l := w.link.Swap(nil); l != nil {
		l.close()
	}
}

// deal gives each reader what was read of its stream.
func (w *watch) deal(readings []reading, count int, sent time.Time) {
	at := time.Now()
	for _, m := range w.set {
		m.pause.reset()
	}
	for _, got := range readings {
		for _, m := range w.set {
			if len(w.set) > 1 && m.s.topic != got.key {
				continue
			}
			if len(w.set) == 1 {
				m.took(got.entries, count, sent, at)
				break
			}
			// Full twice in a row: there is more than a read for all should wait for.
			full := len(got.entries) == count
			m.alone = full && m.full == w.round-1
			if full {
				m.full = w.round
			}
			m.took(got.entries, 0, sent, at)
			break
		}
	}
}

// fail ends the wait of all.
func (w *watch) fail(r *reader, err error) error {
	h := w.hub
	if !groupLost(err) {
		w.disconnect() // also after an answer: the node may be the wrong one by now
	}
	h.mu.Lock()
	all := append(w.set, w.joined...)
	w.set, w.joined, w.size = nil, nil, 0
	w.led, w.waking = false, false
	w.round++
	h.split = h.split || replyHas(err, "CROSSSLOT")
	h.mu.Unlock()
	if len(all) > 1 && isReply(err) {
		err = errLookAlone
	}
	for _, m := range all {
		if m != r {
			m.turn <- turn{err: err}
		}
	}
	return err
}
