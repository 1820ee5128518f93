// Package ledger knows which entries a subscription has, in which state each of them
// is, and what is to be done next. It is a state machine behind one mutex: it starts no
// goroutine, makes no call, and is told the time. What its methods want to be done they
// return as Effects.
//
// An entry is in one state at a time:
//
//	Candidate  pending in a dead consumer's name, or released; a slot will claim it
//	Queued     read ahead, or to be asked for again
//	Running    a slot has it
//	Calling    OnBroken has it, or waits to get it, outside of the slots
//	Waiting    comes again when it is due
//	Acked      handled; its ack is not confirmed yet
//	Releasing  being given back
//
// All but candidates are ours: pending in the consumer's name, renewed until they leave
// the ledger. An entry that is not ours any more (lost), or not in the stream (gone),
// leaves at once where nobody has it in hand, else when its handler has ended.
package ledger

import (
	"container/heap"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// State is where an entry is on its way through this process.
type State uint8

// The states.
const (
	None State = iota // not in the ledger, or not any more
	Candidate
	Queued
	Running
	Calling
	Waiting
	Acked
	Releasing
)

// Entry is an entry of the stream. Its exported fields belong to whoever has it in
// hand; nobody else reads or changes them.
type Entry struct {
	ID     string
	Fields []string // nil: to be asked for before its next delivery
	Next   int64    // what its next delivery makes of its count

	// Of a candidate: the consumer in whose name it is pending, and how long it had
	// not been touched when that was seen. Empty: it is ours already.
	Owner string
	Idle  time.Duration

	Released bool  // its holder gave it back: it has crashed nobody
	Death    any   // the decision that it is dead, until it is moved
	Broken   error // why OnBroken has it
	Stuck    bool  // it has died where it can only stay, which was said

	count  atomic.Int64
	cancel atomic.Pointer[context.CancelCauseFunc]
	lost   atomic.Bool

	// Guarded by the ledger.
	state   State
	gone    bool      // not in the stream any more
	orphan  bool      // it was seen pending in our name, and may be acked by now
	putBack time.Time // it was not pending, and was put back since it was last taken; zero: it was not
	moving  bool      // a move to the dead-letter stream was sent, and may have happened
	moved   bool      // it has
	past    bool      // taken as a retry or a candidate, not as a fresh one
	dead    bool      // it waits to be moved
	in      *queue
	heap    *waiting
	place   int       // in the heap
	due     time.Time // when it waits: not before
	renewed time.Time // when it was asked for with success: until MinIdle later nobody can claim it
	since   uint64    // when it became ours, by the ledger's clock
	sure    uint64    // when it was last known to be
}

// Count returns the deliveries by the server's count, the one under way included.
func (e *Entry) Count() int64 { return e.count.Load() }

// SetCount is said by whoever has the entry in hand, of its count and the next one.
func (e *Entry) SetCount(count, next int64) *Entry {
	e.count.Store(count)
	e.Next = next
	return e
}

// Attach has cancel called once the lease is lost, or the subscription ends; Detach
// takes that back. It returns false if the lease is lost already.
func (e *Entry) Attach(cancel *context.CancelCauseFunc) bool {
	e.cancel.Store(cancel)
	return !e.lost.Load()
}

// Detach ends what Attach began.
func (e *Entry) Detach() { e.cancel.Store(nil) }

// Lost reports whether somebody else may have the entry.
func (e *Entry) Lost() bool { return e.lost.Load() }

// InHand reports whether a function of the user's has it.
func (e *Entry) InHand() bool { return e.cancel.Load() != nil }

func (e *Entry) end(cause error) {
	if cancel := e.cancel.Load(); cancel != nil {
		(*cancel)(cause)
	}
}

// readHere reports whether the entry was read here for the first time, though the
// answer was lost: it comes before what is read later.
func (e *Entry) readHere() bool { return e.Owner == "" && e.Next == e.Count() && e.Next == 1 }

// Effects is what is to be done after a change, by whoever made it: none may be passed
// over. What changes often returns them; after anything else, ask for Effects.
type Effects struct {
	Slots   int       // slots to start; each calls Take until that returns nil
	Callers int       // callers of OnBroken to start; each calls TakeBroken until that returns nil
	Room    bool      // the reader, which found no room, is to look again
	Ack     bool      // there are acks to send
	Look    bool      // what was offered is used up, and there was more
	Timer   time.Time // Effects is to be asked for then; zero: nothing new
}

// Config is what a Ledger needs to know.
type Config struct {
	Slots  int  // entries that may run at once; with 1 the order is kept
	Leased bool // entries stay pending until they are acked

	// Serve has what is queued taken after Close, since it cannot be given back.
	Serve bool

	// Suspect is the count from which on a claimed entry may be what crashed its
	// holder, and Last the greatest that an entry is delivered with. 0: there is no
	// such count.
	Suspect, Last int64

	// Patience is for how long nothing new is taken, at first, for the sake of an
	// entry that must run alone.
	Patience time.Duration

	Callers int // calls of OnBroken at once
	Bounds  *Bounds
	Lost    error // the cause of the end of a message's context when its lease is lost
}

// Ledger is the entries of a subscription.
type Ledger struct {
	cfg Config

	mu      sync.Mutex
	clock   uint64 // counts what is learned of ownership
	joined  uint64 // when something became ours last, by that
	entries map[string]*Entry
	strays  []*Entry // gone, in hand still, and their IDs used anew

	fresh    queue
	claims   queue // candidates
	suspects queue // of these, what may have crashed its holder
	lonely   queue // of these, what must not share this delivery with anything
	broken   queue
	retries  waiting
	recalls  waiting // of what is broken
	head     *Entry  // with one slot: what waits, and holds up all others
	acks     []*Entry
	use      usage

	apart apart

	turn   int // counts what was taken: see next
	ahead  int // entries that may be read ahead, when the reader last asked
	parked bool
	armed  time.Time
	more   bool // candidates than were offered
	closed bool // nothing new is taken
	over   bool // nothing more is added
	ended  bool // acks are not sent any more
}

// apart is what keeps messages from each other that may crash their process.
type apart struct {
	alone    *Entry        // the lonely one that runs, or whose ack is not confirmed
	suspect  *Entry        // likewise, of suspects
	from     time.Time     // nothing new is taken since, for a lonely one; zero: it is
	until    time.Time     // no lonely one is taken before, while there is other work
	patience time.Duration // for how long nothing new is taken
}

// usage counts what counts against a bound.
type usage struct {
	slots   int // started, and not ended
	callers int
	running int
	past    int // of these, retries and candidates
	waiting int
	dead    int // of these, to be moved
}

// New returns an empty Ledger.
func New(cfg Config) *Ledger {
	cfg.Bounds.Open.Add(1)
	return &Ledger{cfg: cfg, entries: make(map[string]*Entry), apart: apart{patience: cfg.Patience}}
}

// Add takes entries that were read by a command sent at that time; after Close it takes
// none, and returns false. An entry may come twice: after a failover, or after the group
// was made anew, the server may repeat what it delivered before. It is ours afresh then.
func (l *Ledger) Add(now, sent time.Time, entries []*Entry) (fx Effects, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return fx, false
	}
	l.clock++
	l.joined = l.clock
	for _, e := range entries {
		if old := l.entries[e.ID]; old != nil && !old.gone && !old.lost.Load() && old.state != Candidate {
			old.since = l.clock
			l.touch(sent, old)
			continue
		}
		l.insert(now, sent, e)
		l.enqueue(e)
	}
	return l.effects(now), true
}

// Offer takes candidates that are not known here. If there are more of them, whoever
// finds them is told when these are used up.
func (l *Ledger) Offer(now time.Time, candidates []*Entry, more bool) Effects {
	l.mu.Lock()
	defer l.mu.Unlock()
	added := 0
	for _, e := range candidates {
		if old := l.entries[e.ID]; l.closed || old != nil && !old.gone {
			continue
		}
		added++
		l.clock++
		l.insert(now, now, e)
		e.orphan = e.Owner == ""
		if e.readHere() {
			l.enqueue(e)
			continue
		}
		e.state = Candidate
		switch {
		case l.cfg.Last > 0 && !e.Released && e.Next >= l.cfg.Last:
			l.lonely.push(e)
		case l.cfg.Suspect > 0 && !e.Released && e.Next >= l.cfg.Suspect:
			l.suspects.push(e)
		default:
			l.claims.push(e)
		}
	}
	l.more = more && added > 0 // or they would be looked at again and again
	return l.effects(now)
}

// Candidates returns how many entries wait to be claimed.
func (l *Ledger) Candidates() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.claims.len() + l.suspects.len() + l.lonely.len()
}

// Has reports whether the entry is here.
func (l *Ledger) Has(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[id]
	return e != nil && !e.gone
}

// Claimed notes that a candidate is ours now, or a retry by its new count, by a command
// sent at that time. It returns false if the entry has left the ledger meanwhile.
func (l *Ledger) Claimed(sent time.Time, e *Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	if e.orphan = false; e.Owner != "" {
		e.Owner, e.since, l.joined = "", l.clock, l.clock
	}
	l.touch(sent, e)
	return l.entries[e.ID] == e
}

// Acked ends an entry that nobody needs any more.
func (l *Ledger) Acked(now time.Time, e *Entry) (fx Effects) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Detach()
	if !l.cfg.Leased || l.ended {
		l.remove(now, e)
		return l.effects(now)
	}
	l.leave(e)
	e.state = Acked // also if it is lost: the work is done
	l.acks = append(l.acks, e)
	l.cfg.Bounds.Unacked.used.Add(1)
	fx = l.effects(now)
	fx.Ack = true
	return fx
}

// Retry has the entry come again when it is due, unless the ledger is closed, for which
// it returns false. Aside: without holding up the order of a ledger with one slot. Where
// too many wait, the one that is due last leaves the ledger, and is returned.
func (l *Ledger) Retry(now time.Time, e *Entry, due time.Time, aside bool) (dropped *Entry, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, false
	}
	if e.Detach(); e.lost.Load() || e.gone {
		l.remove(now, e)
		return nil, true
	}
	from := &l.retries
	if e.state == Calling && e.Death == nil {
		from = &l.recalls
	}
	l.settle(now, e)
	l.leave(e)
	e.state, e.due = Waiting, due
	l.use.waiting++
	l.cfg.Bounds.Waiting.used.Add(1)
	if e.dead = e.Death != nil; e.dead {
		l.use.dead++
	}
	if l.cfg.Slots == 1 && !aside && from == &l.retries {
		l.head = e
	} else {
		heap.Push(from, e)
		e.heap = from
	}
	if l.cfg.Leased && !e.dead && l.cfg.Bounds.over(&l.cfg.Bounds.Waiting, l.use.waiting) {
		if dropped = from.latest(); dropped != nil {
			l.remove(now, dropped)
		}
	}
	return dropped, true
}

// Broken hands an entry that a slot has to the callers of OnBroken. It returns false, and
// does nothing, if the ledger is closed. Where too many wait for them, the entry leaves the
// ledger, and full is true.
func (l *Ledger) Broken(now time.Time, e *Entry) (full, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false, false
	}
	if l.cfg.Leased && l.cfg.Bounds.over(&l.cfg.Bounds.Waiting, l.use.waiting+l.broken.len()) {
		l.remove(now, e)
		return true, true
	}
	l.settle(now, e)
	l.leave(e)
	l.call(e)
	return false, true
}

// Remove is the end of entries that are no business of this subscription any more.
func (l *Ledger) Remove(now time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		e.Detach()
		l.remove(now, e)
	}
}

// Releasing takes entries out of all that renews or delivers.
func (l *Ledger) Releasing(now time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		e.Detach()
		l.settle(now, e)
		l.leave(e)
		e.state = Releasing
	}
}

// Effects returns what is to be done now.
func (l *Ledger) Effects(now time.Time) Effects {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.effects(now)
}

// Close takes back what nobody has in hand: the queue, where it can be given back, and
// what waits. Candidates are forgotten. Nothing new is taken any more.
func (l *Ledger) Close(now time.Time) (queued, retries []*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stop()
	l.over = true
	for _, e := range l.strays {
		if e.state == Queued {
			l.leave(e)
		}
	}
	for _, e := range l.entries {
		switch {
		case e.state == Candidate:
			l.remove(now, e)
		case e.state == Queued && !l.cfg.Serve:
			queued = append(queued, e)
		case e.state == Waiting, e.state == Calling && e.in != nil:
			retries = append(retries, e)
		}
	}
	for _, e := range slices.Concat(queued, retries) {
		l.leave(e)
		e.state = Releasing
	}
	return queued, retries
}

// End has nothing taken any more, not even what Serve asks for, and returns how many
// entries nobody has taken.
func (l *Ledger) End(now time.Time) (left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stop()
	l.over, l.cfg.Serve = true, false
	for e := l.fresh.peek(); e != nil; e = l.fresh.peek() {
		l.remove(now, e)
		left++
	}
	return left
}

// Stop has nothing new taken from now on; Close takes back what is there.
func (l *Ledger) Stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stop()
}

func (l *Ledger) stop() {
	if !l.closed {
		l.closed = true
		l.cfg.Bounds.Open.Add(-1)
	}
}

// insert puts an entry under its ID.
func (l *Ledger) insert(now, sent time.Time, e *Entry) {
	if old := l.entries[e.ID]; old != nil {
		if old.state != Candidate {
			l.strays = append(l.strays, old) // another entry with the same ID, or another delivery
		} else {
			l.remove(now, old) // a candidate that was delivered to us instead
		}
	}
	l.entries[e.ID] = e
	e.since = l.clock
	l.touch(sent, e)
}

// call has an entry wait for OnBroken.
func (l *Ledger) call(e *Entry) {
	e.state = Calling
	l.broken.push(e)
	l.cfg.Bounds.Waiting.used.Add(1)
}

func (l *Ledger) enqueue(e *Entry) {
	e.state = Queued
	l.fresh.push(e)
	l.cfg.Bounds.ahead.Add(1)
}

// touch notes that the entry is ours, by a command sent at that time.
func (l *Ledger) touch(sent time.Time, e *Entry) {
	e.renewed, e.sure = sent, l.clock
}

// leave takes an entry out of its state.
func (l *Ledger) leave(e *Entry) {
	if e.in == &l.broken {
		l.cfg.Bounds.Waiting.used.Add(-1)
	}
	if e.in != nil {
		e.in.drop(e)
	}
	switch e.state {
	case Queued:
		l.cfg.Bounds.ahead.Add(-1)
	case Running:
		l.use.running--
		if e.past {
			l.use.past--
		}
	case Waiting:
		l.use.waiting--
		l.cfg.Bounds.Waiting.used.Add(-1)
		if e.dead {
			e.dead = false
			l.use.dead--
		}
		if e == l.head {
			l.head = nil
		} else {
			heap.Remove(e.heap, e.place)
		}
	case Acked:
		l.cfg.Bounds.Unacked.used.Add(-1)
	}
	e.state = None
}

// settle lets others have their turn after an entry that ran alone, or as a suspect.
func (l *Ledger) settle(now time.Time, e *Entry) {
	if e == l.apart.alone {
		l.apart.alone = nil
		l.apart.until = now.Add(now.Sub(l.apart.from))
		l.apart.from, l.apart.patience = time.Time{}, l.cfg.Patience
	}
	if e == l.apart.suspect {
		l.apart.suspect = nil
	}
}

func (l *Ledger) remove(now time.Time, e *Entry) {
	l.settle(now, e)
	l.leave(e)
	e.Fields, e.Death = nil, nil // others of its read may stay for long
	if l.entries[e.ID] == e {
		delete(l.entries, e.ID)
	} else {
		l.strays = slices.DeleteFunc(l.strays, func(other *Entry) bool { return other == e })
	}
}
