// Package ledger knows the entries of a subscription, the state of each, and what
// to do next. It is a state machine behind one mutex: it starts no goroutines,
// makes no calls, and gets the time as an argument. Its methods return what has to
// be done as Effects.
//
// An entry is in one State at a time. All entries except candidates are ours: pending
// for this consumer, and renewed until they leave the ledger. An entry that is no
// longer ours (lost), or no longer in the stream (gone), leaves at once, or when its
// handler has ended if it is in hand.
package ledger

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// State is the state of an entry in this process.
type State uint8

// States of an entry.
const (
	None      State = iota // not in the ledger
	Candidate              // pending for a dead consumer, or released; a slot will claim it
	Queued                 // read ahead, or to be fetched again
	Keying                 // its key is being computed
	Running                // in a slot
	Calling                // in OnBroken, outside of the slots
	Waiting                // will be redelivered, or passed to OnBroken, when it is due
	Acked                  // handled; its ack is not confirmed yet
	Releasing
)

// Entry is an entry of the stream. Only the goroutine that is processing the entry
// may read or change its exported fields.
type Entry struct {
	ID     string
	Fields []string // nil: fetch them before the next delivery
	Next   int64    // the count after its next delivery
	Give   int64    // the count to release it with

	// For a candidate: the consumer that it is pending for, and how long it had
	// been idle when it was found. An empty Owner means that it is already ours.
	Owner string
	Idle  time.Duration

	Prepared  any   // what was decoded for the sake of its key
	Death     any   // the decision that it is dead, until it is moved
	Broken    error // why its retries go to OnBroken, outside of the slots
	Released  bool  // released by its consumer, and has crashed nobody
	Withdrawn bool  // a candidate that was read here, and released because of a pause
	Stuck     bool  // it died on a dead-letter stream, where it stays; logged already
	Single    bool  // it shares no batch: its handler panicked

	count  atomic.Int64
	cancel atomic.Pointer[context.CancelCauseFunc]
	lost   atomic.Bool
	gone   atomic.Bool

	// Guarded by the ledger.
	state State
	ownership
	taking
	keying
	waitPlace
}

// Count returns the server's delivery count, including the current delivery.
func (e *Entry) Count() int64 { return e.count.Load() }

// SetCount sets the count and the next count. Only the goroutine that is processing
// the entry may call it.
func (e *Entry) SetCount(count, next int64) *Entry {
	e.count.Store(count)
	e.Next = next
	return e
}

// Attach registers cancel to be called when the lease is lost or the subscription
// ends. It returns false if the lease is already lost. Detach unregisters it.
func (e *Entry) Attach(cancel *context.CancelCauseFunc) bool {
	e.cancel.Store(cancel)
	return !e.lost.Load()
}

// Detach unregisters what Attach registered.
func (e *Entry) Detach() { e.cancel.Store(nil) }

// Lost reports whether another consumer may have the entry.
func (e *Entry) Lost() bool { return e.lost.Load() }

// Gone reports whether the entry was found to be no longer in the stream.
func (e *Entry) Gone() bool { return e.gone.Load() }

// InHand reports whether a user's function has the entry.
func (e *Entry) InHand() bool { return e.cancel.Load() != nil }

func (e *Entry) end(cause error) {
	if cancel := e.cancel.Load(); cancel != nil {
		(*cancel)(cause)
	}
}

// readHere reports whether the entry was first read by us, with a lost answer: it
// precedes the entries that are read later.
func (e *Entry) readHere() bool { return e.Owner == "" && e.Next == e.Count() && e.Next == 1 }

// Effects is what the caller must do after a change; no effects may be ignored.
// Frequent changes return them; after any other change, call Effects.
type Effects struct {
	Slots   int       // slots to start; each calls Take until Take returns nil
	Callers int       // OnBroken callers to start; each calls TakeBroken until that returns nil
	Key     bool      // start the keyer: see TakeUnkeyed
	Turn    bool      // ask for the turn, and pass it to HaveTurn
	Crowded bool      // too many entries wait for their keys: nothing is read (said once)
	Room    bool      // the reader, which found no room, should check again
	Ack     bool      // there are acks to send
	Look    bool      // the offered candidates are used up, and there were more
	Timer   time.Time // when to call Effects; zero: at no time
}

// Config configures a Ledger.
type Config struct {
	Slots  int  // maximum of slots; 1 preserves the order, unless Keyed, or Batch is set: see inOrder
	Keyed  bool // entries have keys, each of which preserves the order
	Leased bool // entries stay pending until they are acked

	// A slot takes up to Batch entries at once, and waits for as many until the first one
	// has waited for Wait. 0: single entries, of which a failed one blocks those after it
	// if there is one slot. 1: batches of one, where it does not.
	Batch int
	Wait  time.Duration

	// Serve keeps delivering queued entries after Close, since they cannot be
	// released.
	Serve bool

	// Suspect is the delivery count from which a claimed entry may have crashed its
	// consumer. Last is the highest count that an entry is delivered with. 0: no
	// such count.
	Suspect, Last int64

	// Patience is how long, at first, no new entries are taken while an entry waits
	// to run alone, and how long such an entry waits for a call of OnBroken.
	Patience time.Duration

	Callers int                   // maximum of concurrent OnBroken calls
	Compare func(a, b string) int // of IDs
	Bounds  *Bounds
	Lost    error // the cause of a message context that ends because its lease is lost
}

// Ledger holds the entries of a subscription.
type Ledger struct {
	cfg Config

	mu      sync.Mutex
	clock   uint64 // counts the changes of ownership
	joined  uint64 // when an entry last became ours, by clock
	entries map[string]*Entry
	strays  []*Entry // in hand, but gone from the stream and their IDs reused

	queues
	acks []*Entry
	use  usage

	apart apart
	keys  keys

	turn   int // counts the entries taken: see next
	ahead  int // the read-ahead limit at the reader's last call of Room
	parked bool
	more   bool // there are more candidates than were offered
	closed bool // no new entries are taken
	over   bool // no entries are added
	ended  bool // acks are not sent any more
	paused bool // nothing is read and taken: see Pause
}

// apart keeps messages that may crash their process away from others.
type apart struct {
	asked    bool               // an effect asked for the turn
	turn     context.CancelFunc // ends the turn that we have: suspects and lonely entries need it; nil: we have none
	alone    *Entry             // the lonely entry that is running, or whose ack is not confirmed
	suspect  *Entry             // the same for suspects
	from     time.Time          // since when no new entries are taken, for a lonely one; zero: they are taken
	until    time.Time          // while there is other work, no lonely entry is taken before that time
	idle     time.Time          // since when there is no other work here; zero: there is some
	patience time.Duration      // how long no new entries are taken
	called   time.Time          // when OnBroken was last called
}

// usage counts what is limited.
type usage struct {
	slots   int                // started and not ended
	callers int                // of OnBroken
	in      [Releasing + 1]int // entries in each state, except None
	past    int                // retries and candidates, and what they leave unused of their slots
	dead    int                // waiting to be moved; included in those waiting
}

// New returns an empty Ledger.
func New(cfg Config) *Ledger {
	cfg.Bounds.Open.Add(1)
	return &Ledger{cfg: cfg, entries: make(map[string]*Entry), apart: apart{patience: cfg.Patience}, keys: keys{lanes: make(map[string]*lane)}}
}

// Add adds entries that a command sent at that time has read. After Close it adds
// none, and returns false. An entry may be added twice: after a failover, or if the
// group was recreated, the server may deliver it again. Then it is newly ours.
func (l *Ledger) Add(now, sent time.Time, entries []*Entry) (fx Effects, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return fx, false
	}
	l.clock++
	l.joined = l.clock
	for _, e := range entries {
		if old := l.entries[e.ID]; old != nil && !old.Gone() && !old.lost.Load() && old.Owner == "" && old.state != Candidate {
			old.since = l.clock
			l.touch(sent, old)
			continue
		}
		l.insert(now, sent, e)
		l.enqueue(e)
	}
	return l.effects(now), true
}

// Offer adds candidates that are not yet known. If there are more of them, an
// effect requests them when these are used up.
func (l *Ledger) Offer(now time.Time, candidates []*Entry, more bool) Effects {
	l.mu.Lock()
	defer l.mu.Unlock()
	added := 0
	for _, e := range candidates {
		if old := l.entries[e.ID]; l.closed || old != nil && !old.Gone() {
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
		l.candidate(e)
	}
	l.more = l.more || more && added > 0 // otherwise they would be requested forever
	return l.effects(now)
}

// candidate has an entry wait to be claimed.
func (l *Ledger) candidate(e *Entry) {
	l.enter(e, Candidate)
	e.most = l.share(e)
	switch {
	case l.cfg.Keyed && e.Released:
		l.keys.released.push(e)
	case l.cfg.Last > 0 && !e.Released && e.Next >= l.cfg.Last:
		l.lonely.push(e)
	case l.cfg.Suspect > 0 && !e.Released && e.Next >= l.cfg.Suspect:
		l.suspects.push(e)
	default:
		l.claims.push(e)
	}
}

// Candidates returns how many entries wait to be claimed.
func (l *Ledger) Candidates() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.claims.len() + l.suspects.len() + l.lonely.len() + l.keys.released.len()
}

// Has reports whether the ledger has the entry.
func (l *Ledger) Has(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[id]
	return e != nil && !e.Gone()
}

// Claimed notes that a candidate is now ours, or that a retry has its new count, by
// a command sent at that time. It returns false if the entry has left the ledger in
// the meantime.
func (l *Ledger) Claimed(sent time.Time, e *Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	e.again, e.uncounted = nil, false
	if e.orphan = false; e.Owner != "" {
		e.Owner, e.since, l.joined = "", l.clock, l.clock
	}
	l.touch(sent, e)
	return l.entries[e.ID] == e
}

// Acked ends entries that are done.
func (l *Ledger) Acked(now time.Time, entries ...*Entry) (fx Effects) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.cfg.Leased && !l.ended
	for _, e := range entries {
		e.Detach()
		if e.handled = true; !kept {
			l.remove(now, e)
			continue
		}
		l.enter(e, Acked) // even if it is lost: the work is done
		l.free(e)
		l.acks = append(l.acks, e)
	}
	fx = l.effects(now)
	fx.Ack = kept
	return fx
}

// Retry schedules the entry's redelivery. If the ledger is closed, it returns
// false. What is dead or broken, or Stuck, blocks no other entries meanwhile. If too many
// entries wait, the one that is due last leaves the ledger, and is returned.
func (l *Ledger) Retry(now time.Time, e *Entry, due time.Time) (dropped *Entry, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, false
	}
	if e.Detach(); e.lost.Load() || e.Gone() {
		l.remove(now, e)
		return nil, true
	}
	if l.inOrder() && e.uncounted {
		e.again = nil // snoozed: the order comes first
	}
	from := &l.retries
	switch {
	case e.Broken != nil && e.Death == nil:
		from = &l.recalls
	case l.cfg.Batch > 1 && (e.single() || e.again != nil):
		from = &l.singles
	}
	e.most = 0
	if from != &l.recalls || e.state != Running { // the call of OnBroken, too, may crash the process
		l.settle(now, e, true)
	}
	l.enter(e, Waiting)
	e.due = due
	aside := e.Death != nil || e.Stuck || from == &l.recalls
	if aside {
		l.free(e)
	}
	l.slimAll(e)
	if l.inOrder() && !aside && e.again != &l.suspects && e.again != &l.lonely {
		l.head = e
	} else {
		from.insert(e)
	}
	if l.cfg.Leased && e.Death == nil && l.cfg.Bounds.over(&l.cfg.Bounds.Waiting, l.waits()) {
		if dropped = from.latest(); dropped != nil {
			l.remove(now, dropped)
		}
	}
	return dropped, true
}

// Remove ends entries that no longer concern this subscription.
func (l *Ledger) Remove(now time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		e.Detach()
		l.remove(now, e)
	}
}

// Releasing excludes entries from renewals and deliveries.
func (l *Ledger) Releasing(now time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		e.Detach()
		l.settle(now, e, true)
		l.enter(e, Releasing)
		l.free(e)
	}
}

// Effects returns what has to be done now.
func (l *Ledger) Effects(now time.Time) Effects {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.effects(now)
}

// Close takes back the entries that nobody is processing: the queued ones and those whose
// keys are being computed, if they can be released, and the waiting ones. It forgets the candidates. No new entries
// are taken after that.
func (l *Ledger) Close(now time.Time) (queued, retries []*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stop()
	l.over = true
	for _, e := range l.strays {
		if e.state == Queued && !l.cfg.Serve {
			l.enter(e, None)
		}
	}
	for _, e := range l.entries {
		switch {
		case e.state == Candidate && e.Owner != "":
			l.remove(now, e)
		case e.state == Candidate, e.state == Queued && !l.cfg.Serve, e.state == Keying && e.Owner == "" && !l.cfg.Serve, e.unsure:
			queued = append(queued, e)
		case e.state == Waiting:
			retries = append(retries, e)
		}
	}
	for _, e := range slices.Concat(queued, retries) {
		if e.move != MaybeMoved { // the last attempt to move it may find the group remade
			l.enter(e, Releasing)
		}
	}
	return queued, retries
}

// End stops all deliveries, including those for Serve, and returns the number of
// undelivered entries.
func (l *Ledger) End(now time.Time) (left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stop()
	serve := l.cfg.Serve
	l.over, l.cfg.Serve = true, false
	for _, e := range l.all() {
		if e.state == Queued || serve && e.state == Keying { // its function does not return
			l.remove(now, e)
			left++
		}
	}
	return left
}

// all returns all entries, which may then be removed.
func (l *Ledger) all() []*Entry {
	return slices.AppendSeq(slices.Clone(l.strays), maps.Values(l.entries))
}

// Stop stops taking new entries; Close takes back the remaining ones.
func (l *Ledger) Stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stop()
}

func (l *Ledger) stop() {
	if !l.closed {
		l.closed = true
		l.seeTurn(time.Time{})
		l.cfg.Bounds.Open.Add(-1)
	}
}

// insert adds an entry under its ID.
func (l *Ledger) insert(now, sent time.Time, e *Entry) {
	if old := l.entries[e.ID]; old != nil {
		if old.state != Candidate {
			l.strays = append(l.strays, old) // another entry with the same ID, or another delivery
		} else {
			l.remove(now, old) // a candidate that was delivered to us instead
		}
	}
	l.entries[e.ID] = e
	e.since, e.due = l.clock, now
	l.touch(sent, e)
}

func (l *Ledger) enqueue(e *Entry) {
	l.enter(e, Queued)
	if l.cfg.Keyed {
		l.keys.queue.push(e)
	} else {
		l.fresh.push(e)
	}
}

// touch notes that the entry is ours, by a command sent at that time.
func (l *Ledger) touch(sent time.Time, e *Entry) {
	e.renewed, e.sure = sent, l.clock
}

// enter moves an entry to a state, and out of the place where it was.
func (l *Ledger) enter(e *Entry, s State) {
	switch {
	case e.in != nil:
		e.in.drop(e)
	case e.behind != nil:
		l.stepOut(e)
	case e == l.head:
		l.head = nil
	case e.state == Running && e.past:
		l.use.past -= 1 + e.spare
		e.spare = 0
	}
	l.count(e, -1)
	e.state = s
	l.count(e, 1)
}

// count counts an entry in its state.
func (l *Ledger) count(e *Entry, n int) {
	l.use.in[e.state] += n
	switch e.state {
	case Queued:
		l.cfg.Bounds.ahead.Add(int64(n))
	case Waiting:
		l.cfg.Bounds.Waiting.Use(n)
		if e.Death != nil {
			l.use.dead += n
		}
	case Acked:
		l.cfg.Bounds.Unacked.Use(n)
	}
}

// settle lets other entries run after one that ran alone or as a suspect. If it could not run, the
// next one can: the turn is not over, and nothing else runs beside an entry that must run alone.
func (l *Ledger) settle(now time.Time, e *Entry, ran bool) {
	if e == l.apart.suspect {
		if l.apart.suspect = nil; ran {
			l.endTurn()
		}
	}
	if e != l.apart.alone {
		return
	}
	l.apart.alone = nil
	if ran || l.paused || !now.Before(l.apart.from.Add(l.apart.patience)) {
		l.endDrain(now)
		l.apart.patience = l.cfg.Patience
		l.endTurn()
	}
}

func (l *Ledger) remove(now time.Time, e *Entry) {
	l.settle(now, e, e.Owner == "" || e.handled)
	l.enter(e, None)
	l.free(e)
	if !l.over { // otherwise the keyer may be reading them
		e.Fields, e.Prepared, e.Death = nil, nil, nil // other entries of the same read may stay for a long time
	}
	if l.entries[e.ID] == e {
		delete(l.entries, e.ID)
	} else {
		l.strays = without(l.strays, e)
	}
}
