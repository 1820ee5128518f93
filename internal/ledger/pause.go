package ledger

import (
	"cmp"
	"slices"
	"time"
)

// Pause stops reading, deliveries, retries, claims and calls of OnBroken, until Resume.
// Entries that are running come to their outcomes; those that wait for their retries
// remain, and so do candidates. What was read ahead is for Withdraw.
func (l *Ledger) Pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused = true
	// Nobody waits for an entry to run alone now; what is measured in time begins anew.
	l.apart.idle, l.apart.until = time.Time{}, time.Time{}
	if l.apart.alone == nil {
		l.apart.from = time.Time{}
	}
	l.seeTurn(time.Time{})
}

// Resume ends a pause.
func (l *Ledger) Resume(now time.Time) Effects {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused = false
	l.keys.taken = now
	if !l.apart.from.IsZero() {
		l.apart.from = now
	}
	for _, e := range []*Entry{l.apart.alone, l.apart.suspect} {
		if e != nil && e.in == &l.recalls { // it could not be called: see callEnds
			l.recalls.drop(e)
			e.due = now
			l.recalls.insert(e)
		}
	}
	return l.effects(now)
}

// IsPaused reports whether the group is paused.
func (l *Ledger) IsPaused() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.paused
}

// HoldBack queues an entry again whose handler has not begun, because of a pause; its
// delivery counts already. After Close it does nothing, and returns false.
func (l *Ledger) HoldBack(now time.Time, e *Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return false
	}
	if e.Detach(); e.lost.Load() || e.Gone() {
		l.remove(now, e)
		return true
	}
	to := &l.fresh
	if !l.inOrder() {
		to = cmp.Or(l.origin(e), to)
	}
	l.settle(now, e, true)
	l.enter(e, Queued)
	to.push(e)
	l.sort(to.entries)
	return true
}

// Withdraw takes back, during a pause, the entries that are ours and that nobody has
// taken, in stream order, to be released; none if they cannot be released, or while the
// keyer has some: these would come before others of their keys that precede them. Pass
// them to Withdrawn.
func (l *Ledger) Withdraw() (queued []*Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.paused || l.over || !l.cfg.Leased || l.use.in[Keying] > 0 {
		return nil
	}
	for _, e := range l.entries {
		if e.state == Queued || e.unsure {
			queued = append(queued, e)
		}
	}
	l.sort(queued)
	for _, e := range queued {
		l.enter(e, Releasing)
		e.unsure = false
	}
	for _, e := range queued {
		l.free(e)
	}
	return queued
}

// Unsure reports whether a release by Withdraw had no answer: see Withdrawn.
func (l *Ledger) Unsure() bool { return len(l.those(func(e *Entry) bool { return e.unsure })) > 0 }

// Withdrawn ends a release of the entries by Withdraw. Released entries become candidates
// that belong to owner, so that they precede after the pause what is read then; other
// consumers may take them first. If the release has failed, they are queued again. If it had
// no answer, they may be somebody else's: they are neither renewed nor delivered, and Withdraw
// returns them again. After Close it does nothing, and returns false: they are late.
func (l *Ledger) Withdrawn(now time.Time, entries []*Entry, owner string, released, unsure bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return false
	}
	for _, e := range entries {
		switch {
		case e.lost.Load() || e.Gone() || l.entries[e.ID] != e:
			l.remove(now, e)
			continue
		case unsure:
			e.unsure = true
			continue
		case released:
			e.Fields, e.Prepared, e.Owner, e.Idle = nil, nil, owner, 0
			e.Released = e.Released || e.Count() <= 1 || l.cfg.Keyed || l.inOrder() // the order comes before its crashes
			e.orphan, e.again, e.uncounted = false, nil, false
			count := max(e.Count()-1, 0)
			l.candidate(e.SetCount(count, count+1))
			e.Withdrawn = true
		default:
			l.enqueue(e)
		}
		e.keyed = false
	}
	// More may have been read meanwhile, and what was with a slot comes after its successors.
	l.sort(l.claims.entries, l.keys.released.entries, l.fresh.entries, l.keys.queue.entries)
	return true
}

// sort puts entries in stream order.
func (l *Ledger) sort(lists ...[]*Entry) {
	for _, list := range lists {
		slices.SortFunc(list, func(a, b *Entry) int { return l.cfg.Compare(a.ID, b.ID) })
	}
}

// Withdrawals returns the candidates that Withdraw has taken back, in stream order.
func (l *Ledger) Withdrawals() []*Entry {
	return l.those(func(e *Entry) bool { return e.state == Candidate && e.Withdrawn })
}

// Reclaim makes withdrawn entries ours again, to be restored in a group that was lost:
// nobody else would.
func (l *Ledger) Reclaim() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if e.state == Candidate && e.Withdrawn {
			l.own(e)
			l.enqueue(e)
		}
	}
	l.sort(l.fresh.entries, l.keys.queue.entries)
}

// Own is Reclaim for an entry that has just been taken.
func (l *Ledger) Own(e *Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.own(e)
}

// own makes a withdrawn entry ours, with an unchanged count.
func (l *Ledger) own(e *Entry) {
	e.Owner, e.Released, e.Withdrawn = "", false, false
	l.clock++
	e.since, e.sure = l.clock, l.clock
	e.SetCount(e.Next, e.Next)
}
