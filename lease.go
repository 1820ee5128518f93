package goxstreams

import (
	"container/heap"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// state is where an entry is on its way through this process.
type state uint8

const (
	found   state = iota // seen pending elsewhere; ours once the claim succeeds
	queued               // prefetched
	out                  // offered or handed out
	waiting              // nacked; comes again
	settled              // acked; its XACK is not confirmed yet
	parting              // to be released; not renewed any more
)

// held is an entry that this subscription holds, or is about to claim.
//
// What bounds its lease is time on one clock, ours: since is a moment after
// which the server has surely not seen the entry touched by us, so that now -
// since is the least idle time it must show if nobody else touched it either.
// That is the min-idle of every renewal, claim and release: an entry that
// somebody took in the meantime is younger, and the server refuses.
type held struct {
	id     string
	fields []string // nil once unmarshaled, or before the claim

	// The deliveries that the server counts, this one included. Changed only by
	// the goroutine that has the entry in hand, and under leases.mu.
	count int64
	// What the claim makes of count: one more, but for an orphan, whose
	// delivery did not reach anybody, and after a Snooze.
	next int64

	released bool // its last holder gave it back: it crashed nobody
	orphan   bool // pending in our own name, by a command whose answer was lost

	begun time.Time // when it was read, or taken over; guarded by leases.mu

	slot *slot // that has it in hand; nil: another goroutine has

	stuck bool // it has died on a dead-letter stream, which was said

	doom *doom     // decided to be dead, not yet moved
	due  time.Time // when waiting: not before

	// Guarded by leases.mu.
	state  state
	asked  bool      // a claim to next was sent, and may have happened
	moving bool      // a move to the dead-letter stream was sent, and may have happened
	since  time.Time // when it was last known to be ours
	sent   time.Time // when we asked for that: until ClaimMinIdle later nobody can claim it
	lost   bool      // somebody else may have it
	gone   bool      // deleted from the stream while pending
	cancel context.CancelCauseFunc
}

// readHere reports whether the entry was read here for the first time, though the
// answer was lost: it is ours, and comes before what is read later.
func (h *held) readHere() bool { return h.next == h.count && h.count == 1 }

// leases is the register of what a subscription holds.
type leases struct {
	mu     sync.Mutex
	m      map[string]*held
	strays []*held // deleted from the stream, handled still, and their IDs used anew
}

// add registers entries and returns those that were not held yet. An entry can
// come twice: after a failover, or after the group was made anew, the server may
// repeat what it delivered before. What is held already is ours afresh.
func (l *leases) add(hs []*held) []*held {
	l.mu.Lock()
	defer l.mu.Unlock()
	added := hs[:0]
	for _, h := range hs {
		// What was to be claimed, and is delivered to us instead, is ours already.
		old, ok := l.m[h.id]
		if ok && old.gone {
			l.strays = append(l.strays, old) // another entry with the same ID
		} else if ok && (old.state != found || h.state == found) {
			if h.state != found {
				old.since, old.sent, old.lost = h.since, h.sent, false
			}
			continue
		}
		l.m[h.id] = h
		added = append(added, h)
	}
	return added
}

func (l *leases) remove(hs ...*held) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range hs {
		h.cancel = nil // with its message: one that waits keeps the others of its read
		if l.m[h.id] == h {
			delete(l.m, h.id)
		} else if h.gone {
			l.strays = slices.DeleteFunc(l.strays, func(other *held) bool { return other == h })
		}
	}
}

func (l *leases) has(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	h, ok := l.m[id]
	return ok && !h.gone
}

// hasBefore reports whether the entry with the ID is held, and was before the other
// one was ours for the last time.
func (l *leases) hasBefore(id string, other *held) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	h, ok := l.m[id]
	return ok && !h.begun.After(other.since)
}

// move sets the entry's state, and cancel for as long as it is handed out. It
// returns false if the lease is lost.
func (l *leases) move(h *held, to state, cancel context.CancelCauseFunc) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.state, h.cancel = to, cancel
	return !h.lost
}

// idle returns the least idle time that the server must show for the entry now.
func (l *leases) idle(h *held) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Since(h.since)
}

// claimable reports whether somebody else can have claimed the entry. By since that
// cannot be told: the answer may have been read long after it came, by a process
// that was stopped.
func (l *leases) claimable(h *held, minIdle time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Since(h.sent) >= minIdle
}

// lapsed reports whether the lease is lost, or its entry deleted.
func (l *leases) lapsed(h *held) (lost, gone bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return h.lost, h.gone
}

// claimed notes that the entry is ours with a new delivery count, by a command sent
// at that moment and answered now. It returns false if a read has brought the entry
// meanwhile: what was read is in the queue.
func (l *leases) claimed(h *held, sent time.Time, count int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := time.Now()
	if h.state == found {
		h.begun = at
	}
	h.state, h.sent, h.since, h.count, h.next, h.asked = out, sent, at, count, oneMore(count), false
	return l.m[h.id] == h
}

// countOf returns the entry's delivery count.
func (l *leases) countOf(h *held) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return h.count
}

// snooze makes the entry's next delivery count for this one.
func (l *leases) snooze(h *held) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.next = h.count
}

// recounting notes that the entry's count is being set, which may happen without
// our knowing.
func (l *leases) recounting(h *held, count int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.next, h.asked = count, true
}

// asking notes that a claim of the entry is being sent, and returns its min-idle.
func (l *leases) asking(h *held) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.asked = true
	return time.Since(h.since)
}

// counted reports whether the delivery count is one that we gave the entry: the
// next one only after a claim of ours whose answer is not known, because a
// consumer of the same name would give it that too.
func (l *leases) counted(h *held, count int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return count == h.count || h.asked && count == h.next
}

// burying notes whether a move of the entry to the dead-letter stream may have
// happened: then that it is not pending any more says nothing about the group.
func (l *leases) burying(h *held, moving bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.moving = moving
}

func (l *leases) maybeMoved(h *held) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return h.moving
}

// byCount returns the IDs of the entries for each delivery count, but for those
// that are settled: put back into a group, they might come after their XACK.
func (l *leases) byCount(hs []*held) map[int64][]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	ids := make(map[int64][]string)
	for _, h := range hs {
		if h.state != settled {
			ids[h.count] = append(ids[h.count], h.id)
		}
	}
	return ids
}

// confirm notes that the entries were ours at the moment given, by a command sent
// at another one.
func (l *leases) confirm(sent, at time.Time, hs ...*held) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range hs {
		h.sent, h.since = sent, at
	}
}

// lose ends the lease: the message's context ends with ErrLeaseLost.
func (l *leases) lose(h *held) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.lost = true
	if h.cancel != nil {
		h.cancel(ErrLeaseLost)
	}
}

// bereave notes that the entry is not in the stream any more: nobody can claim
// it, so whoever handles it may finish. What is added under its ID is another entry.
func (l *leases) bereave(hs ...*held) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range hs {
		h.gone = true
	}
}

// there returns those of the entries that were not found deleted.
func (l *leases) there(hs []*held) []*held {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(hs), func(h *held) bool { return h.gone })
}

// cancelAll ends the contexts of all messages that are handed out.
func (l *leases) cancelAll(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.m {
		if h.cancel != nil {
			h.cancel(cause)
		}
	}
	for _, h := range l.strays {
		if h.cancel != nil {
			h.cancel(cause)
		}
	}
}

// ours returns what is pending in our name: not what is lost, deleted, or not
// claimed yet.
func (l *leases) ours() []*held {
	l.mu.Lock()
	defer l.mu.Unlock()
	hs := make([]*held, 0, len(l.m))
	for _, h := range l.m {
		if h.state != found && h.state != parting && !h.lost && !h.gone {
			hs = append(hs, h)
		}
	}
	return hs
}

// pendingSince returns how many entries were surely pending in our name when a
// command was answered that was sent at the moment given.
func (l *leases) pendingSince(sent time.Time) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	var n int64
	for _, h := range l.m {
		if (h.state == queued || h.state == out || h.state == waiting) && !h.lost && !h.gone && h.since.Before(sent) {
			n++
		}
	}
	return n
}

// stillOurs reports whether a renewal may expect the entry: it was not settled,
// lost or found deleted since the caller looked.
func (l *leases) stillOurs(h *held) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.m[h.id] == h && h.state != settled && !h.lost && !h.gone
}

// counts returns how many entries are ours, and how many of these wait.
func (l *leases) counts() (inFlight, wait int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.m {
		if h.state != found && !h.lost && !h.gone {
			inFlight++
			if h.state == waiting {
				wait++
			}
		}
	}
	return inFlight, wait
}

// active returns how many entries a crash of this process would count against
// others: all but those that wait, whose next delivery counts anyway.
func (l *leases) active() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, h := range l.m {
		if h.state == queued || h.state == out || h.state == settled {
			n++
		}
	}
	return n
}

// claiming reports whether an entry is still to be claimed, or its claim has no
// answer.
func (l *leases) claiming() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.m {
		if h.state == found || h.asked {
			return true
		}
	}
	return false
}

// renewals returns what was not confirmed for age, in the order of the IDs.
func (l *leases) renewals(age time.Duration) []*held {
	hs := l.ours()
	l.mu.Lock()
	defer l.mu.Unlock()
	hs = slices.DeleteFunc(hs, func(h *held) bool { return time.Since(h.since) < age })
	slices.SortFunc(hs, func(a, b *held) int { return xstream.CompareIDs(a.id, b.id) })
	return hs
}

// waitHeap orders entries by when they are due.
type waitHeap []*held

func (w waitHeap) Len() int           { return len(w) }
func (w waitHeap) Less(i, j int) bool { return w[i].due.Before(w[j].due) }
func (w waitHeap) Swap(i, j int)      { w[i], w[j] = w[j], w[i] }
func (w *waitHeap) Push(x any)        { *w = append(*w, x.(*held)) }
func (w *waitHeap) Pop() any {
	old := *w
	h := old[len(old)-1]
	old[len(old)-1] = nil
	*w = old[:len(old)-1]
	return h
}

// due returns how many are due.
func (w waitHeap) due(now time.Time) int {
	n := 0
	for _, h := range w {
		if !h.due.After(now) {
			n++
		}
	}
	return n
}

func (w *waitHeap) push(h *held) { heap.Push(w, h) }
func (w *waitHeap) pop() *held   { return heap.Pop(w).(*held) }

// dropLatest takes out the entry that is due last. It looks at all,
// which only a subscription at its bound pays for.
func (w *waitHeap) dropLatest() *held {
	latest := 0
	for i, h := range *w {
		if h.due.After((*w)[latest].due) {
			latest = i
		}
	}
	return heap.Remove(w, latest).(*held)
}
