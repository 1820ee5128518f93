package ledger

import (
	"slices"
	"time"
)

// This file is what the ledger knows of ownership, and of acks.

// Renewals returns what was not known to be ours for age, in the order of less.
func (l *Ledger) Renewals(now time.Time, age time.Duration, compare func(a, b string) int) []*Entry {
	ours := l.Ours()
	l.mu.Lock()
	defer l.mu.Unlock()
	ours = slices.DeleteFunc(ours, func(e *Entry) bool { return now.Sub(e.renewed) < age })
	slices.SortFunc(ours, func(a, b *Entry) int { return compare(a.ID, b.ID) })
	return ours
}

// Owns reports whether an entry with the ID is ours.
func (l *Ledger) Owns(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[id]
	return e != nil && !e.gone && e.Owner == ""
}

// Pending returns how many entries must be pending in our name.
func (l *Ledger) Pending() (n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if e.ours() && e.state != Acked && !e.moving {
			n++
		}
	}
	return n
}

// Leased reports whether entries stay pending until they are acked.
func (l *Ledger) Leased() bool { return l.cfg.Leased }

// Ours returns what is pending in our name and must stay so.
func (l *Ledger) Ours() []*Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	ours := make([]*Entry, 0, len(l.entries))
	for _, e := range l.entries {
		if e.ours() {
			ours = append(ours, e)
		}
	}
	return ours
}

// ours reports whether the entry should be pending in our name.
func (e *Entry) ours() bool {
	return e.Owner == "" && e.state != None && e.state != Releasing && !e.lost.Load() && !e.gone && !e.moved
}

// Owned reports whether the entry must be pending in our name: nothing was sent that
// ends that.
func (l *Ledger) Owned(e *Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return e.ours() && e.state != Acked && !e.moving && !e.orphan
}

// Moving notes whether the entry may have been moved to the dead-letter stream, and
// Moved that it has: it is not pending any more, though it is in hand.
func (l *Ledger) Moving(e *Entry, moving bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.moving = moving
}

// Moved: see Moving.
func (l *Ledger) Moved(e *Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.moved = true
}

// Renewed notes that the entries are ours, by a command sent at that time.
func (l *Ledger) Renewed(sent time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	for _, e := range entries {
		l.touch(sent, e)
	}
}

// Missing is what is known of an entry that is not pending any more.
type Missing struct {
	Taken   bool // by somebody else: others are pending that were ours when it was last known to be
	Expired bool // its lease may have run out
	ReadOn  bool // something became ours since, maybe of another group with the same name; false if it was put back lately
}

// ackedByHand is for how long what was put back because of ReadOn is not put back so again,
// while it waits for the same delivery. Whoever acks it by hand does so again within that
// time; a group is hardly made anew twice.
const ackedByHand = 10 * time.Minute

// Missing compares such an entry with those that are pending. Its lease runs for so long.
func (l *Ledger) Missing(now time.Time, missing *Entry, lease time.Duration, others []*Entry) (m Missing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range others {
		if e != missing && e.since <= missing.sure {
			m.Taken = true
		}
	}
	m.ReadOn = l.joined > missing.sure && (missing.putBack.IsZero() || now.Sub(missing.putBack) > ackedByHand)
	m.Expired = now.Sub(missing.renewed) > lease
	return m
}

// PutBack notes that the entries are put back, and may have been acked by hand: see Missing.
func (l *Ledger) PutBack(now time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		e.putBack = now
	}
}

// IsIdle reports whether nothing is in hand, and nothing waits.
func (l *Ledger) IsIdle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.use.running == 0 && l.use.waiting == 0
}

// Lose ends the lease of an entry that somebody else has, or may have.
func (l *Ledger) Lose(now time.Time, e *Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.lost.Store(true)
	e.end(l.cfg.Lost)
	if e.state == Queued || e.state == Waiting || e.in != nil {
		l.remove(now, e)
	}
}

// Gone notes that entries are not in the stream any more. Nobody can claim them, so
// that whoever handles them may finish; what is added under their IDs are other
// entries. It returns for how many this is news.
func (l *Ledger) Gone(now time.Time, entries ...*Entry) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		if e.moving {
			continue // that is found out when it is tried again
		}
		if !e.gone {
			e.gone = true
			n++
		}
		if e.state == Waiting || e.state == Queued && e.Fields == nil {
			l.remove(now, e)
		}
	}
	return n
}

// IsGone reports whether the entry was found not to be in the stream.
func (l *Ledger) IsGone(e *Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return e.gone
}

// CancelAll ends the contexts of all messages that are handed out.
func (l *Ledger) CancelAll(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		e.end(cause)
	}
	for _, e := range l.strays {
		e.end(cause)
	}
}

// Counts returns how many entries are ours, and how many of these wait.
func (l *Ledger) Counts() (ours, wait int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if e.Owner == "" && !e.lost.Load() && !e.gone {
			ours++
		}
	}
	return ours, l.use.waiting
}

// Acks returns the entries to ack next, n at most. They stay until Confirmed.
func (l *Ledger) Acks(n int) []*Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acks[:min(len(l.acks), n)]
}

// ToAck appends the IDs of those of the entries that are in the stream, as far as is
// known: an ID may be another entry's by now. (A pointer in an interface is no
// allocation.)
func (l *Ledger) ToAck(entries []*Entry, ids []any) []any {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		if !e.gone {
			ids = append(ids, &e.ID)
		}
	}
	return ids
}

// Confirmed ends the first n entries to ack.
func (l *Ledger) Confirmed(now time.Time, n int) Effects {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.acks[:n] {
		l.remove(now, e)
	}
	rest := copy(l.acks, l.acks[n:])
	clear(l.acks[rest:])
	l.acks = l.acks[:rest]
	return l.effects(now)
}

// EndAcks has no ack wait any more, and returns how many did.
func (l *Ledger) EndAcks() (left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.cfg.Bounds.Unacked.Use(-len(l.acks))
	return len(l.acks)
}
