package ledger

import "time"

// This file is what is taken next, and whether there is room to read.

// Take returns what a slot is to do next; nil: the slot ends.
func (l *Ledger) Take(now time.Time) (*Entry, Effects) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.next(now)
	if e == nil {
		l.use.slots--
		return nil, l.effects(now)
	}
	past := e.state != Queued
	l.leave(e)
	e.state, e.past, e.putBack = Running, past, time.Time{}
	l.use.running++
	if past {
		l.use.past++
	}
	return e, l.effects(now)
}

// SlotEnded is said of a slot that ended without asking Take.
func (l *Ledger) SlotEnded() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.use.slots--
}

// CallerEnded is said of a caller that ended without asking TakeBroken.
func (l *Ledger) CallerEnded() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.use.callers--
}

// TakeBroken returns what a caller of OnBroken is to do next; nil: it ends.
func (l *Ledger) TakeBroken(now time.Time) (*Entry, Effects) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var e *Entry
	if !l.closed {
		l.brokenDue(now)
		if e = l.broken.peek(); e != nil {
			l.leave(e)
			e.state = Calling
		}
	}
	if e == nil {
		l.use.callers--
	}
	return e, l.effects(now)
}

// brokenDue gives what is due back to the callers of OnBroken.
func (l *Ledger) brokenDue(now time.Time) {
	for e := l.recalls.first(now); e != nil; e = l.recalls.first(now) {
		l.leave(e)
		l.call(e)
	}
}

// next decides what a slot takes:
//
//   - With one slot: what waits to come again, and nothing before that.
//   - What must run alone, when nothing else runs: see drain.
//   - With one slot: what was claimed, which is older than what was read; then that.
//   - Else what was read on the one hand, and due retries, claims and a suspect on the
//     other, in turn. Of the latter half of the slots at most have one while something
//     fresh waits: they may all be slow.
//
// Of suspects one runs at a time, until its ack has arrived: one that is innocent does
// not share its process with one that is not. What crashed none has a delivery left
// whatever runs beside it.
func (l *Ledger) next(now time.Time) *Entry {
	if l.closed {
		if l.cfg.Serve {
			return l.fresh.peek()
		}
		return nil
	}
	if l.apart.alone != nil || l.head != nil && l.head.due.After(now) {
		return nil
	}
	if l.head != nil {
		return l.head
	}
	if l.drain(now); !l.apart.from.IsZero() {
		if l.busy() {
			return nil
		}
		l.apart.alone = l.lonely.peek()
		return l.apart.alone
	}
	if l.cfg.Slots == 1 {
		if e := l.pastWork(now); e != nil {
			return e
		}
		return l.fresh.peek()
	}
	fresh := l.fresh.peek()
	if fresh != nil && l.use.past >= max(1, l.cfg.Slots/2) {
		return fresh
	}
	l.turn++
	if fresh != nil && l.turn%2 == 0 {
		return fresh
	}
	if e := l.pastWork(now); e != nil {
		return e
	}
	return fresh
}

// pastWork returns a due retry, a claim, or a suspect, in turn.
func (l *Ledger) pastWork(now time.Time) *Entry {
	for i := range 3 {
		var e *Entry
		switch (l.turn/2 + i) % 3 {
		case 0:
			e = l.retries.first(now)
		case 1:
			e = l.claims.peek()
		case 2:
			if l.apart.suspect == nil {
				e = l.suspects.peek()
				l.apart.suspect = e
			}
		}
		if e != nil {
			return e
		}
	}
	return nil
}

// drain decides whether nothing new is taken, for the sake of what must run alone: what
// runs comes to its end then. Not for longer than its patience, though, so that a handler
// which takes very long stops nothing for good; other work has as long after that, and
// after each that has run alone, before the next one's turn.
func (l *Ledger) drain(now time.Time) {
	switch {
	case l.apart.alone != nil:
	case l.lonely.len() == 0, l.head != nil: // which has nothing taken anyway
		l.apart.from = time.Time{}
	case l.apart.from.IsZero():
		if !now.Before(l.apart.until) || !l.busy() && !l.ordinary(now) {
			l.apart.from = now
		}
	case l.busy() && !now.Before(l.apart.from.Add(l.apart.patience)):
		l.apart.until = now.Add(now.Sub(l.apart.from))
		l.apart.from, l.apart.patience = time.Time{}, 2*l.apart.patience
	}
}

// busy reports whether something is under way beside which nothing may run alone.
func (l *Ledger) busy() bool { return l.use.running > 0 || l.apart.suspect != nil }

// ordinary reports whether there is something to take that need not run alone.
func (l *Ledger) ordinary(now time.Time) bool {
	return l.fresh.len() > 0 || l.claims.len() > 0 || l.suspects.len() > 0 && l.apart.suspect == nil || l.retries.first(now) != nil
}

// takeable reports whether Take would return something.
func (l *Ledger) takeable(now time.Time) bool {
	switch {
	case l.closed:
		return l.cfg.Serve && l.fresh.len() > 0
	case l.apart.alone != nil:
		return false
	case l.head != nil:
		return !l.head.due.After(now)
	case !l.apart.from.IsZero():
		return !l.busy()
	}
	return l.ordinary(now)
}

// effects is what is to be done after a change. One slot is started at a time: it
// starts the next one when it takes its entry.
func (l *Ledger) effects(now time.Time) (fx Effects) {
	if !l.closed {
		l.brokenDue(now)
		l.drain(now)
	}
	if l.use.slots < l.cfg.Slots && l.takeable(now) {
		l.use.slots++
		fx.Slots = 1
	}
	if l.use.callers < l.cfg.Callers && !l.closed && l.broken.len() > 0 {
		l.use.callers++
		fx.Callers = 1
	}
	if l.more && l.claims.len()+l.suspects.len() < l.cfg.Slots {
		l.more = false
		fx.Look = !l.closed
	}
	if l.parked && l.room() > 0 {
		l.parked = false
		fx.Room = true
	}
	if !now.Before(l.armed) {
		l.armed = time.Time{}
	}
	if at := l.nextTime(now); !at.IsZero() && (l.armed.IsZero() || at.Before(l.armed)) {
		l.armed = at
		fx.Timer = at
	}
	return fx
}

// nextTime returns when Take would return something without another change; zero:
// never, or now.
func (l *Ledger) nextTime(now time.Time) (at time.Time) {
	if l.closed {
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
	for _, w := range []waiting{l.retries, l.recalls} {
		if len(w) > 0 {
			first(w[0].due)
		}
	}
	if l.lonely.len() > 0 {
		first(l.apart.until)
		if !l.apart.from.IsZero() {
			first(l.apart.from.Add(l.apart.patience))
		}
	}
	return at
}

// Room returns how many entries may be read, given how many may be read ahead: one for
// each free slot, and those. After 0 the reader is told by Effects when it is to look
// again.
func (l *Ledger) Room(ahead int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ahead = ahead
	n := l.room()
	l.parked = n == 0
	return n
}

func (l *Ledger) room() int {
	b, ahead := l.cfg.Bounds, l.ahead
	if b.ahead.Load() >= maxAhead {
		ahead = 0
	}
	switch {
	case l.closed, l.apart.alone != nil, !l.apart.from.IsZero():
		return 0
	case l.fresh.len() > ahead:
		return 0
	case b.full(&b.Unacked, len(l.acks)):
		return 0
	case !l.cfg.Leased && b.full(&b.Waiting, l.use.waiting+l.broken.len()), 2*l.use.dead >= b.Most(&b.Waiting, l.use.waiting):
		return 0 // they are kept here, come what may
	}
	free := l.cfg.Slots - l.use.running
	if l.head != nil {
		free = 0
	}
	return max(0, free) + ahead
}
