package ledger

import (
	"cmp"
	"slices"
	"time"
)

// This file keeps the order per key. The first entry of a key that is not settled holds
// the key, over all of its retries; later ones wait behind it, in stream order, without a slot.
//
// The keyer, one goroutine at a time, has the keys computed: of what consumers have released,
// which it claims, and then of what was read, both in stream order. The key of any other
// candidate is known only once a slot has claimed it.

// starved is how long slots may find nothing to do, although entries wait behind others,
// until more is read than the read-ahead limit allows. The key of a slow handler, or of one
// that fails for an hour, must not stop the others.
const starved = 100 * time.Millisecond

// lane is a key that is held.
type lane struct {
	key    string
	holder *Entry
	behind []*Entry // in stream order
}

// keying is the state of an entry's key.
type keying struct {
	keyed  bool   // its key is known
	slim   bool   // it waits for its key, without its fields
	most   int    // how large its batch may be, for a claim: see share; 0: any
	lane   *lane  // of its key, which it has or waits for; nil: it has none
	behind *queue // the queue that it joins when it has its key; nil: it has it
}

// keys are the lanes of a ledger, and what is on its way to them.
type keys struct {
	lanes    map[string]*lane
	queue    queue     // read, and to be taken by the keyer
	released queue     // candidates that were released, for the keyer
	keyer    bool      // it runs
	ahead    int       // entries behind others, with their fields
	thin     int       // the same without their fields, which only take memory
	taken    time.Time // when a slot last took an entry
	read     bool      // more is read than the window allows, since slots are idle
	told     bool      // that nothing is read because of thin
}

// HasKey reports whether the key of a running entry is known.
func (e *Entry) HasKey() bool { return e.keyed }

// TakeUnkeyed returns at most n entries whose keys are to be computed, in stream order.
// Those without fields must be claimed, or fetched, first. After none the keyer ends.
func (l *Ledger) TakeUnkeyed(n int) (entries []*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for e := l.unkeyed(); e != nil && len(entries) < n && (!l.closed || l.cfg.Serve) && !l.paused; e = l.unkeyed() {
		l.enter(e, Keying)
		entries = append(entries, e)
	}
	l.keys.keyer = len(entries) > 0
	return entries
}

// unkeyed returns the next entry for the keyer, in stream order. As many released ones are
// claimed as may wait behind others.
func (l *Ledger) unkeyed() *Entry {
	e, read := l.keys.released.peek(), l.keys.queue.peek()
	switch {
	case e == nil, read != nil && l.cfg.Compare(read.ID, e.ID) < 0:
		return read
	case l.closed, l.keys.thin > 0 && l.crowded():
		return nil
	}
	return e
}

// isLate reports whether Close has taken back what nobody was processing, and takes back
// nothing more.
func (l *Ledger) isLate() bool { return l.over && !l.cfg.Serve }

// Keyed gives back what the keyer has taken, in the same order. Entries that came to their
// outcome meanwhile are skipped. It returns those that came after Close, and are to be
// released.
func (l *Ledger) Keyed(now time.Time, entries []*Entry, keys []string) (late []*Entry, fx Effects) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, e := range entries {
		switch {
		case e.state != Keying:
		case e.lost.Load():
			l.remove(now, e)
		case l.isLate():
			late = append(late, e)
		default:
			l.line(e, keys[i], &l.fresh)
		}
	}
	return late, l.effects(now)
}

// Lined is what Line has found.
type Lined uint8

// What Line has found.
const (
	First   Lined = iota // the entry has its key
	Behind               // it waits behind another entry, and its slot is free
	Counted              // another entry has the key: its count must be lowered in Redis first, see Uncounted
	Late                 // the same after Close: it is to be released
)

// Line gives a running entry that was claimed its key, or has it wait.
func (l *Ledger) Line(now time.Time, e *Entry, key string) (how Lined, fx Effects) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch ln := l.keys.lanes[key]; {
	case key == "" || ln == nil:
		l.hold(e, key)
		return First, fx
	case l.isLate():
		return Late, fx
	case !e.uncounted:
		return Counted, fx
	}
	from := cmp.Or(l.origin(e), &l.fresh)
	l.settle(now, e, false)
	l.line(e, key, from)
	return Behind, l.effects(now)
}

// Uncounted notes that a running entry waits for its key, or snoozes, with the count from before its
// delivery in Redis, until it is claimed again: it may wait through any number of crashes that others
// cause. It is as suspect as before. count is that of its delivery.
func (l *Ledger) Uncounted(e *Entry, count int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.SetCount(count, count).Fields = nil
	e.uncounted, e.again = true, l.origin(e)
}

// hold gives a key that nobody has.
func (l *Ledger) hold(e *Entry, key string) {
	if e.keyed = true; key == "" {
		return
	}
	e.lane = &lane{key: key, holder: e}
	l.keys.lanes[key] = e.lane
}

// line queues an entry, or has it wait behind another one of its key.
func (l *Ledger) line(e *Entry, key string, to *queue) {
	l.enter(e, Queued)
	ln := l.keys.lanes[key]
	if key == "" || ln == nil {
		l.hold(e, key)
		to.push(e)
		return
	}
	e.keyed, e.lane, e.behind = true, ln, to
	at := len(ln.behind)
	for at > 0 && l.cfg.Compare(ln.behind[at-1].ID, e.ID) > 0 { // claimed: older than what was read
		at--
	}
	ln.behind = slices.Insert(ln.behind, at, e)
	if l.keys.ahead++; ln.holder.state == Waiting || l.keys.ahead > l.window() {
		l.slim(e)
	}
}

// slim drops what can be fetched again from an entry that waits behind another. Its
// delivery has not begun: it does not count again.
func (l *Ledger) slim(e *Entry) {
	if e.slim {
		return
	}
	e.slim = true
	l.keys.ahead--
	l.keys.thin++
	l.cfg.Bounds.Waiting.used.Add(1)
	if l.cfg.Leased {
		e.Fields, e.Prepared, e.Next = nil, nil, e.Count()
	}
}

// slimAll is for an entry that begins to wait: so do all behind it.
func (l *Ledger) slimAll(e *Entry) {
	if e.lane != nil {
		for _, other := range e.lane.behind {
			l.slim(other)
		}
	}
}

// stepOut removes an entry from behind another.
func (l *Ledger) stepOut(e *Entry) {
	if e.slim {
		e.slim = false
		l.keys.thin--
		l.cfg.Bounds.Waiting.used.Add(-1)
	} else {
		l.keys.ahead--
	}
	e.lane.behind, e.behind = without(e.lane.behind, e), nil
}

// free lets the next entry of the key follow, once one is settled.
func (l *Ledger) free(e *Entry) {
	ln := e.lane
	if e.lane = nil; ln == nil || ln.holder != e {
		return
	}
	if len(ln.behind) == 0 {
		delete(l.keys.lanes, ln.key)
		return
	}
	next := ln.behind[0]
	to := next.behind
	l.stepOut(next)
	ln.holder = next
	if to == &l.fresh && l.cfg.Wait > 0 {
		to.insert(next) // it must not wait again for its batch to fill
	} else {
		to.push(next)
	}
	if to == &l.lonely {
		l.sort(to.entries) // it has waited for longer than those whose keys are not known
	}
}

// window is how many entries with their fields may wait behind others.
func (l *Ledger) window() int { return l.ahead + l.capacity() }

// enough reports whether no more is read since that many entries wait behind others. Half
// of the window is left for them, so that a read brings more than a few.
func (l *Ledger) enough() bool { return 2*l.keys.ahead > l.window() }

// idle reports whether slots find nothing to do although entries wait behind others, which
// may be why nothing is read, or too little for a batch: more is read after starved. It does
// not ask how many they are, since that depends on the read-ahead limit, which changes without
// Effects.
func (l *Ledger) idle() bool {
	return l.keys.ahead > 0 && l.use.in[Running] < l.capacity() && l.keys.queue.len()+l.use.in[Keying] == 0 && l.fresh.len() < max(1, l.cfg.Batch)
}

// crowded reports whether no more entries may wait behind others. Half of the bound is for
// entries that wait for their retries.
func (l *Ledger) crowded() bool {
	b := l.cfg.Bounds
	return 2*l.keys.thin >= b.Most(&b.Waiting, l.waits())
}

// claim returns the next candidate that is no suspect. No more are claimed than may wait
// behind others. (Suspects come one by one; those that others had preceded are not candidates
// any more, and must not wait for room.)
func (l *Ledger) claim() *Entry {
	if l.keys.thin > 0 && l.crowded() {
		return nil
	}
	return l.claims.peek()
}

// waits is the ledger's part of Bounds.Waiting.
func (l *Ledger) waits() int { return l.use.in[Waiting] + l.keys.thin }

// queued is how many entries were read and wait for a slot.
func (l *Ledger) queued() int { return l.fresh.len() + l.keys.queue.len() + l.use.in[Keying] }

// keyEffects returns what has to be done for keys.
func (l *Ledger) keyEffects(now time.Time, fx *Effects) {
	if !l.keys.keyer && l.unkeyed() != nil {
		l.keys.keyer, fx.Key = true, true
	}
	if !l.idle() {
		l.keys.read = false
	} else if !now.Before(l.keys.taken.Add(starved)) {
		l.keys.read = true
	}
	if l.keys.thin > 0 && !l.keys.told && l.crowded() {
		l.keys.told, fx.Crowded = true, true
	}
}
