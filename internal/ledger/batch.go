package ledger

import (
	"cmp"
	"slices"
	"time"
)

// This file makes batches. Entries wait for theirs in their queues, without a slot. What was
// claimed from dead consumers waits for nothing, and has batches of its own: see share.

// capacity is how many entries may run.
func (l *Ledger) capacity() int { return l.cfg.Slots * max(1, l.cfg.Batch) }

// inOrder reports whether one slot preserves the order of the stream. Batches, even of one,
// do not, and keys have their own.
func (l *Ledger) inOrder() bool { return l.cfg.Slots == 1 && l.cfg.Batch == 0 && !l.cfg.Keyed }

// single reports whether an entry shares no batch.
func (e *Entry) single() bool { return e.Single || e.Death != nil }

// ripe returns the first fresh entry, unless it waits for others.
func (l *Ledger) ripe(now time.Time) *Entry {
	e := l.fresh.peek()
	if e != nil && l.fresh.len() < l.cfg.Batch && now.Before(e.due.Add(l.cfg.Wait)) {
		return nil
	}
	return e
}

// dueRetry is ripe for retries, of which it returns the one that has waited longest.
func (l *Ledger) dueRetry(now time.Time) *Entry {
	single, e := l.singles.first(now), l.retries.first(now.Add(-l.cfg.Wait))
	if e == nil || single != nil && single.due.Before(e.due.Add(l.cfg.Wait)) {
		return single
	}
	return e
}

// fill fills a batch up to the least that any of its entries allows: with claims, or with due
// retries and fresh entries. While there are fresh ones, the retries are at most every second
// entry, and half of all that runs.
func (l *Ledger) fill(now time.Time, batch []*Entry, claims bool) []*Entry {
	for most := l.most(batch[0]); len(batch) < most; {
		e := l.claim()
		if !claims {
			e = l.fresh.peek()
			retry := l.retries.first(now)
			if retry != nil && (e == nil || len(batch)%2 == 1 && l.use.past < l.capacity()/2) {
				e = retry
			}
		}
		if e == nil || e.single() {
			break
		}
		if most = min(most, l.most(e)); len(batch) >= most {
			break
		}
		l.take(e)
		batch = append(batch, e)
	}
	return batch
}

// most is how large the batch of an entry may be.
func (l *Ledger) most(e *Entry) int { return cmp.Or(e.most, l.cfg.Batch) }

// share is how large the batch of a claimed entry may be. It halves with each delivery of an entry
// that may have crashed its consumer: so one that did is alone after log2(Batch) crashes, and
// the others of its first batch have long been handled.
func (l *Ledger) share(e *Entry) int {
	if e.Released {
		return l.cfg.Batch
	}
	return max(1, l.cfg.Batch>>min(max(e.Next-1, 0), 62))
}

// Round returns the number of the call of Take that returned the entry, to the goroutine that has it.
func (e *Entry) Round() int { return e.round }

// Running returns the entries that have not come to their outcome since that call of Take.
func (l *Ledger) Running(entries []*Entry, round int) []*Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(entries), func(e *Entry) bool { return e.state != Running || e.round != round })
}
