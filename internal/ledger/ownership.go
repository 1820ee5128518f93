package ledger

import (
	"slices"
	"time"
)

// This file tracks ownership and acks.

// ownership is what is known of an entry's place in Redis, and since when.
type ownership struct {
	orphan    bool // was found pending for us, and may be acked by now, unless it was renewed since
	move      Move
	handled   bool      // it was acked here, whatever has become of the ack
	uncounted bool      // its count in Redis is one less: see Uncounted
	unsure    bool      // its release at a pause had no answer: see Withdrawn
	renewed   time.Time // when the last successful renewal was sent: nobody can claim it for MinIdle after that
	putBack   time.Time // when it was restored, if it was not pending since it was last taken; zero: never
	since     uint64    // when it became ours, by the ledger's clock
	sure      uint64    // when it was last known to be ours, by the ledger's clock
}

// those returns the entries with a property, in stream order.
func (l *Ledger) those(is func(*Entry) bool) (found []*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if is(e) {
			found = append(found, e)
		}
	}
	l.sort(found)
	return found
}

// Renewals returns our entries that were not confirmed for the given age.
func (l *Ledger) Renewals(now time.Time, age time.Duration) []*Entry {
	return l.those(func(e *Entry) bool { return e.ours() && now.Sub(e.renewed) >= age })
}

// Pending returns how many entries must be pending for us.
func (l *Ledger) Pending() (n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if e.ours() && e.state != Acked && e.move == NotMoved {
			n++
		}
	}
	return n
}

// Oldest returns the first entry in the stream that must be pending for us; "": none.
func (l *Ledger) Oldest() (id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if l.cfg.Leased && e.owned() && (id == "" || l.cfg.Compare(e.ID, id) < 0) {
			id = e.ID
		}
	}
	return id
}

// Leased reports whether entries stay pending until they are acked.
func (l *Ledger) Leased() bool { return l.cfg.Leased }

// ours reports whether the entry should be pending for us.
func (e *Entry) ours() bool { return e.here() && e.state != Releasing }

// here reports the same of an entry that may be on its way to somebody else.
func (e *Entry) here() bool {
	return e.Owner == "" && e.state != None && !e.lost.Load() && !e.Gone() && e.move != Moved
}

// unsettled reports whether no command was sent that settles the entry.
func (e *Entry) unsettled() bool {
	return e.here() && e.state != Acked && e.move == NotMoved && (!e.orphan || e.sure > e.since)
}

// Owned reports whether the entry must be pending for us: no command was sent that
// ends that.
func (l *Ledger) Owned(e *Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return e.owned()
}

func (e *Entry) owned() bool { return e.unsettled() && e.state != Releasing }

// ToRestore returns what must be pending again after the group was lost: what is ours, and
// what is on its way, since a release, or the claim of what a pause has released, that comes
// later finds only what is pending. In a group that we create anew that includes what may have been
// moved, or acked as an orphan: nobody else has it, so that it would be lost if we ended now.
func (l *Ledger) ToRestore(anew bool) []*Entry {
	return l.those(func(e *Entry) bool {
		return e.unsettled() || e.returning() || anew && e.here() && e.state != Acked
	})
}

// returning reports whether an entry that a pause has released is being claimed.
func (e *Entry) returning() bool {
	return e.Withdrawn && e.Owner != "" && (e.state == Running || e.state == Keying) && !e.Gone() && !e.lost.Load()
}

// RestoreCount returns the count to restore an entry with: that of a claim under way is what
// the claim makes it, and an entry that waits for its key is not counted.
func (l *Ledger) RestoreCount(e *Entry) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case e.returning():
		return e.Count() + 1
	case e.uncounted:
		return e.Count() - 1
	}
	return e.Count()
}

// Move is what is known of an entry's move to the dead-letter stream.
type Move uint8

// What is known of a move.
const (
	NotMoved   Move = iota
	MaybeMoved      // its command was sent, and had no answer yet
	Moved           // no longer pending, though still in hand
)

// Moving notes what is known of the entry's move. Only the goroutine that is processing the
// entry calls it.
func (l *Ledger) Moving(e *Entry, move Move) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.move = move
}

// Move returns what Moving noted, to the same goroutine.
func (e *Entry) Move() Move { return e.move }

// Renewed notes that the entries are ours, by a command sent at that time.
func (l *Ledger) Renewed(sent time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	for _, e := range entries {
		l.touch(sent, e)
	}
}

// Restored notes that the entries, which were missing, are ours again, by a command
// sent at that time. Others that are still missing were lost with them.
func (l *Ledger) Restored(sent time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	for _, e := range entries {
		e.since, l.joined = l.clock, l.clock
	}
	l.clock++ // they are known to be ours since
	for _, e := range entries {
		l.touch(sent, e)
	}
}

// Missing describes an entry that is no longer pending.
type Missing struct {
	Ours   bool          // it should be pending for us: see Owned
	Taken  bool          // another consumer took or settled it: other entries are still pending that were ours when it was last known to be
	Age    time.Duration // of its last renewal: its lease may have expired
	ReadOn bool          // something became ours since, perhaps from a new group with the same name; false if the entry was restored recently
}

// ackedByHand is how long an entry that was restored because of ReadOn is not
// restored again for that reason, while it waits for the same delivery. Somebody
// who acks it by hand repeats that within this time; a group is rarely recreated
// twice.
const ackedByHand = 10 * time.Minute

// Missing compares such an entry with those that are still pending. If it may have been
// moved, and its lease is still good, nobody can have claimed it, and from now on nobody can:
// should it turn out that it was not moved, its lease has not expired.
func (l *Ledger) Missing(now time.Time, missing *Entry, lease time.Duration, others []*Entry) (m Missing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m.Ours, m.Age = missing.owned(), now.Sub(missing.renewed)
	if missing.move != NotMoved && m.Age <= lease {
		missing.renewed = now
	}
	m.Taken = slices.ContainsFunc(others, func(e *Entry) bool { return e != missing && e.since <= missing.sure })
	m.ReadOn = l.joined > missing.sure && (missing.putBack.IsZero() || now.Sub(missing.putBack) > ackedByHand)
	return m
}

// PutBack notes that the entries are being restored, and may have been acked by
// hand: see Missing.
func (l *Ledger) PutBack(now time.Time, entries ...*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		e.putBack = now
	}
}

// IsIdle reports whether no entry is running and none is waiting.
func (l *Ledger) IsIdle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.use.in[Running] == 0 && l.use.in[Waiting] == 0
}

// Lose ends the lease of an entry that another consumer has or may have.
func (l *Ledger) Lose(now time.Time, e *Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.lost.Store(true)
	e.end(l.cfg.Lost)
	if e.state == Queued || e.state == Waiting || e.in != nil {
		l.remove(now, e)
	}
}

// Gone notes that entries are no longer in the stream. Nobody can claim them, so
// their handlers may finish; entries added under their IDs are different ones. It
// returns for how many this is news.
func (l *Ledger) Gone(now time.Time, entries ...*Entry) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		if e.move != NotMoved {
			continue // the next attempt to move it finds out
		}
		if !e.Gone() {
			e.gone.Store(true)
			n++
		}
		if e.state == Waiting || e.state == Queued && e.Fields == nil {
			l.remove(now, e)
		}
	}
	return n
}

// CancelAll cancels the contexts of all delivered messages.
func (l *Ledger) CancelAll(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.all() {
		e.end(cause)
	}
}

// Counts returns how many entries are ours, and how many of these wait.
func (l *Ledger) Counts() (ours, wait int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if e.Owner == "" && !e.lost.Load() && !e.Gone() {
			ours++
		}
	}
	return ours, l.use.in[Waiting]
}

// Acks returns at most n entries to ack next. They remain until Confirmed.
func (l *Ledger) Acks(n int) []*Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acks[:min(len(l.acks), n)]
}

// ToAck appends the IDs of those that were acked here, or moved, and that are in the stream,
// as far as known: the ID of any other may belong to another entry now. (A pointer in an
// interface needs no allocation.)
func (l *Ledger) ToAck(entries []*Entry, ids []any) []any {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		if !e.Gone() && (e.handled || e.move == Moved) {
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
	l.acks = slices.Delete(l.acks, 0, n)
	return l.effects(now)
}

// EndAcks discards the remaining acks, and returns their number.
func (l *Ledger) EndAcks() (left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.cfg.Bounds.Unacked.Use(-len(l.acks))
	return len(l.acks)
}
