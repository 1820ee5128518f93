package ledger

import (
	"cmp"
	"context"
	"time"
)

// This file decides what is taken next, and whether there is room to read. What a batch
// is made of is in batch.go.

// taking is how a slot took an entry.
type taking struct {
	round int    // the number of the call of Take
	past  bool   // as a retry or a candidate, not as a fresh entry
	spare int    // places in its slot that past work leaves unused, counted as used
	again *queue // of candidates, to which it returns when it is due; nil: it does not
}

// quiet is how long there must be no other work here until an entry may run alone
// out of its turn. What waits on a server is here sooner.
const quiet = time.Second

// Take appends what a slot handles next: one entry, or a batch in stream order. After none
// the slot ends.
func (l *Ledger) Take(now time.Time, taken []*Entry) ([]*Entry, Effects) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed && !l.paused {
		l.readmit(now)
		l.drain(now)
	}
	e := l.next(now)
	if e == nil {
		l.use.slots--
		return taken, l.effects(now)
	}
	l.keys.taken, l.keys.read = now, false
	l.turn++
	switch e.in {
	case &l.lonely:
		l.apart.alone = e
	case &l.suspects:
		l.apart.suspect = e
	}
	claimed, before := e.in == &l.claims, len(taken)
	l.take(e)
	if taken = append(taken, e); l.cfg.Batch > 1 && !e.single() && e != l.apart.alone && e != l.apart.suspect {
		taken = l.fill(now, taken, claimed)
		l.sort(taken) // those freed by another of their key are later in the queue
	}
	if e.past {
		e.spare = max(1, l.cfg.Batch) - (len(taken) - before)
		l.use.past += e.spare
	}
	return taken, l.effects(now)
}

// take moves an entry into a slot.
func (l *Ledger) take(e *Entry) {
	past := e.state != Queued
	if e.again = nil; e.state != Waiting && e.Owner == "" && e.Fields == nil && e.in != &l.fresh { // an orphan, or it had waited for its key
		e.again = e.in
	}
	l.enter(e, Running)
	e.past, e.round, e.putBack = past, l.turn, time.Time{}
	if past {
		l.use.past++
	}
}

// TakeBroken returns the next entry for a caller of OnBroken. After nil the caller
// ends.
func (l *Ledger) TakeBroken(now time.Time) (*Entry, Effects) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.recall(now)
	if e == nil {
		l.use.callers--
		return nil, l.effects(now)
	}
	l.enter(e, Calling)
	l.apart.called = now
	return e, l.effects(now)
}

// recall returns what OnBroken is called with next: a suspect first, and nothing beside an entry
// that runs alone, or is about to.
func (l *Ledger) recall(now time.Time) *Entry {
	first := l.recalls.first(now)
	for _, e := range []*Entry{l.apart.alone, l.apart.suspect} {
		if e != nil && e.in == &l.recalls {
			first = e
		}
	}
	if l.closed || l.paused || first != l.apart.alone && !l.apart.from.IsZero() {
		return nil
	}
	return first
}

// callEnds returns until when at the latest others wait for a call of OnBroken that runs alone, or
// as a suspect's: it may hang. It is zero for anything else.
func (l *Ledger) callEnds(e *Entry) (at time.Time) {
	if e != nil && (e.in == &l.recalls || e.state == Calling) {
		at = e.due.Add(l.cfg.Patience)
	}
	return at
}

// next decides what a slot takes; it changes nothing:
//
//   - Nothing, while the group is paused.
//   - With one slot: the entry that waits for its retry, and nothing before it.
//   - An entry that must run alone, once nothing else runs: see drain.
//   - With one slot: claimed entries, which are older than those just read; then
//     those.
//   - Otherwise it alternates between entries just read, and due retries, claims
//     and a suspect. While fresh entries wait, the latter have at most half of the
//     slots, since they may all be slow.
//
// Only one suspect runs at a time, until its ack has arrived: an innocent one must not
// share its process with a guilty one.
func (l *Ledger) next(now time.Time) *Entry {
	switch {
	case l.paused, l.closed && !l.cfg.Serve:
		return nil
	case l.closed:
		return l.fresh.peek()
	case l.apart.alone != nil, l.head != nil && l.head.due.After(now):
		return nil
	case l.head != nil:
		return l.head
	case !l.apart.from.IsZero() && l.busy(now):
		return nil
	case !l.apart.from.IsZero():
		return l.lonely.peek()
	}
	fresh := l.ripe(now)
	if l.inOrder() {
		if c := l.claim(); fresh != nil && c != nil && c.Withdrawn && l.cfg.Compare(fresh.ID, c.ID) < 0 {
			return fresh // held back at a pause that ended before it was withdrawn
		}
		return cmp.Or(l.pastWork(now), fresh)
	}
	if fresh != nil && l.use.past >= max(1, l.capacity()/2) {
		return fresh
	}
	if fresh != nil && l.turn%2 == 1 {
		return fresh
	}
	return cmp.Or(l.pastWork(now), fresh)
}

// readmit lets candidates of ours wait for their turn again that snoozed, or could not be fetched because
// Redis did not answer: as retries they would share it with others.
func (l *Ledger) readmit(now time.Time) {
	for _, q := range []*queue{&l.retries, &l.singles} {
		for e := q.first(now); e != nil && e.again != nil; e = q.first(now) {
			l.enter(e, Queued)
			e.again.push(e)
		}
	}
}

// pastWork returns a due retry, a claim, or a suspect, in turn.
func (l *Ledger) pastWork(now time.Time) *Entry {
	for i := range 3 {
		var e *Entry
		switch (l.turn/2 + i) % 3 {
		case 0:
			e = l.dueRetry(now)
		case 1:
			e = l.claim()
		case 2:
			if l.apart.suspect == nil && l.apart.turn != nil {
				e = l.suspects.peek()
			}
		}
		if e != nil {
			return e
		}
	}
	return nil
}

// drain decides whether to take no new entries for the sake of an entry that must
// run alone, so that the running ones can finish. It does so no longer than its
// patience, so that a very slow handler does not stop everything for good. Other
// work gets as much time after that, and after each entry that has run alone. What
// was not read for its sake may not have arrived yet: so there is no other work
// only after a quiet time.
func (l *Ledger) drain(now time.Time) {
	for _, e := range []*Entry{l.apart.alone, l.apart.suspect} {
		if ends := l.callEnds(e); !ends.IsZero() && !now.Before(ends) {
			l.settle(now, e, true)
		}
	}
	switch {
	case l.busy(now) || l.ordinary(now) || l.apart.alone != nil: // beside which nothing is read
		l.apart.idle = time.Time{}
	case l.apart.idle.IsZero():
		l.apart.idle = now
	}
	switch {
	case l.apart.alone != nil:
	case l.lonely.len() == 0, l.head != nil: // a head blocks new entries anyway
		l.endDrain(now)
	case l.apart.from.IsZero():
		if l.apart.turn != nil && l.apart.suspect == nil && l.mayDrain(now) {
			l.apart.from = now
		}
	case l.busy(now) && !now.Before(l.apart.from.Add(l.apart.patience)):
		l.endDrain(now)
		l.apart.patience *= 2
		l.endTurn()
	}
}

// endDrain gives others as much time as the drain took.
func (l *Ledger) endDrain(now time.Time) {
	if !l.apart.from.IsZero() {
		l.apart.until, l.apart.from = now.Add(now.Sub(l.apart.from)), time.Time{}
	}
}

// mayDrain reports whether others have had their time.
func (l *Ledger) mayDrain(now time.Time) bool {
	return !now.Before(l.apart.until) || !l.apart.idle.IsZero() && !now.Before(l.apart.idle.Add(quiet))
}

// origin returns the queue of a suspect, or of what must run alone, that is running; nil for any other entry.
func (l *Ledger) origin(e *Entry) *queue {
	switch e {
	case l.apart.alone:
		return &l.lonely
	case l.apart.suspect:
		return &l.suspects
	}
	return nil
}

// busy reports whether something is running beside which no entry may run alone. Calls of OnBroken may hang.
func (l *Ledger) busy(now time.Time) bool {
	return l.use.in[Running] > 0 || l.apart.suspect != nil || l.use.in[Calling] > 0 && now.Before(l.apart.called.Add(l.cfg.Patience))
}

// ordinary reports whether there is an entry to take that need not run alone.
func (l *Ledger) ordinary(now time.Time) bool {
	return l.ripe(now) != nil || l.claim() != nil || l.suspects.len() > 0 && l.apart.suspect == nil || l.dueRetry(now) != nil
}

// HaveTurn notes that it is our turn, until end is called. Others may stop waiting for its end; then the
// turn remains good for one entry, which must not wait for ever.
func (l *Ledger) HaveTurn(now time.Time, end context.CancelFunc) Effects {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.apart.asked, l.apart.turn = false, end
	return l.effects(now)
}

func (l *Ledger) endTurn() {
	if l.apart.turn != nil {
		l.apart.turn()
		l.apart.turn = nil
	}
}

// seeTurn ends a turn that is of no use now, or reports whether to ask for one: when there is a free
// slot, since handlers may take long.
func (l *Ledger) seeTurn(now time.Time) (ask bool) {
	a := &l.apart
	useful := !l.closed && !l.paused && l.head == nil && (l.suspects.len() > 0 || l.lonely.len() > 0 && (!a.from.IsZero() || l.mayDrain(now)))
	switch {
	case a.alone != nil, a.suspect != nil:
	case !useful:
		l.endTurn()
	default:
		ask = a.turn == nil && !a.asked && l.use.in[Running] < l.capacity()
		a.asked = a.asked || ask
	}
	return ask
}

// effects returns what has to be done after a change. It starts one slot at a time:
// that slot starts the next one when it takes its entry.
func (l *Ledger) effects(now time.Time) (fx Effects) {
	if !l.closed && !l.paused {
		l.drain(now)
	}
	fx.Turn = l.seeTurn(now)
	if l.use.slots < l.cfg.Slots && l.next(now) != nil {
		l.use.slots++
		fx.Slots = 1
	}
	if l.use.callers < l.cfg.Callers && l.recall(now) != nil {
		l.use.callers++
		fx.Callers = 1
	}
	if l.more && l.claims.len()+l.suspects.len()+l.keys.released.len() < l.capacity() {
		l.more = false
		fx.Look = !l.closed
	}
	if l.cfg.Keyed && (!l.closed || l.cfg.Serve) && !l.paused {
		l.keyEffects(now, &fx)
	}
	if l.parked && l.room() > 0 {
		l.parked = false
		fx.Room = true
	}
	fx.Timer = l.nextTime(now)
	return fx
}

// nextTime returns when Take would return an entry without another change; zero:
// never, or now.
func (l *Ledger) nextTime(now time.Time) (at time.Time) {
	if l.closed || l.paused {
		return at
	}
	first := func(t time.Time) {
		if t.After(now) && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	if l.head != nil {
		first(l.head.due)
	}
	if l.idle() && !l.keys.read {
		first(l.keys.taken.Add(starved))
	}
	for _, q := range []*queue{&l.retries, &l.singles, &l.recalls} {
		if e := q.peek(); e != nil {
			first(e.due)
			first(e.due.Add(l.cfg.Wait))
		}
	}
	if e := l.fresh.peek(); e != nil && l.cfg.Wait > 0 {
		first(e.due.Add(l.cfg.Wait))
	}
	first(l.callEnds(l.apart.alone))
	first(l.callEnds(l.apart.suspect))
	if l.lonely.len() > 0 {
		first(l.apart.until)
		if !l.apart.idle.IsZero() {
			first(l.apart.idle.Add(quiet))
		}
		if !l.apart.from.IsZero() {
			first(l.apart.from.Add(l.apart.patience))
		}
		if l.use.in[Calling] > 0 {
			first(l.apart.called.Add(l.cfg.Patience))
		}
	}
	return at
}

// Room returns how many entries may be read if at most ahead are read ahead: one
// for each free slot, plus ahead. After a 0, an effect tells the reader when to
// check again.
func (l *Ledger) Room(ahead int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ahead = ahead
	n := l.room()
	l.parked = n == 0
	return n
}

func (l *Ledger) room() int {
	b, ahead, queued := l.cfg.Bounds, l.ahead, l.queued()
	if b.ahead.Load() >= maxAhead {
		ahead = 0
	}
	free := max(0, l.capacity()-l.use.in[Running])
	if l.head != nil {
		free = 0
	} else if !l.inOrder() { // what is read has half of the slots: see next
		free += max(0, l.use.past-l.capacity()/2)
	}
	if l.cfg.Batch > 1 { // what waits for its batch to fill is not ahead of the slots
		filled := min(free, queued)
		free, queued = free-filled, queued-filled
	}
	switch {
	case l.closed, l.paused, l.apart.alone != nil, !l.apart.from.IsZero():
		return 0
	case queued > ahead, l.enough() && !l.keys.read, l.keys.thin > 0 && l.crowded():
		return 0
	case b.full(&b.Unacked, len(l.acks)):
		return 0
	case !l.cfg.Leased && b.full(&b.Waiting, l.waits()), 2*l.use.dead >= b.Most(&b.Waiting, l.use.in[Waiting]):
		return 0 // these entries stay in memory in any case
	}
	n := free + ahead
	if !l.keys.read {
		n = max(0, n-l.keys.ahead)
	}
	return n
}
