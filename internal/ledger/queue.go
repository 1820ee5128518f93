package ledger

import (
	"cmp"
	"slices"
	"time"
)

// queues are where the entries of a ledger wait.
type queues struct {
	fresh    queue
	claims   queue  // candidates
	suspects queue  // claims that may have crashed their consumer
	lonely   queue  // claims that must not share this delivery with any other
	retries  queue  // by due time, like the next two
	singles  queue  // retries that wait for no batch: see single and readmit
	recalls  queue  // calls of OnBroken, and their retries
	head     *Entry // with one slot: the waiting entry that blocks all others
}

// waitPlace is where an entry waits.
type waitPlace struct {
	in  *queue
	due time.Time // for a waiting entry: not before that time; for any other: when it came
}

// queue holds entries in order of arrival, or by due time.
type queue struct{ entries []*Entry }

func (q *queue) len() int { return len(q.entries) }

func (q *queue) push(e *Entry) {
	e.in = q
	q.entries = append(q.entries, e)
}

// insert is push before those that are due later.
func (q *queue) insert(e *Entry) {
	e.in = q
	at, _ := slices.BinarySearchFunc(q.entries, e.due, func(other *Entry, due time.Time) int {
		return cmp.Or(other.due.Compare(due), -1) // after those that are due at the same time
	})
	q.entries = slices.Insert(q.entries, at, e)
}

// peek returns the first entry; nil if the queue is empty.
func (q *queue) peek() *Entry {
	if len(q.entries) == 0 {
		return nil
	}
	return q.entries[0]
}

func (q *queue) drop(e *Entry) { q.entries, e.in = without(q.entries, e), nil }

// without removes an entry, which is nearly always the first.
func without(list []*Entry, e *Entry) []*Entry {
	switch i := slices.Index(list, e); {
	case i == 0:
		list[0] = nil
		return list[1:]
	case i > 0:
		return slices.Delete(list, i, i+1)
	}
	return list
}

// first returns the first entry, if it is due.
func (q *queue) first(now time.Time) *Entry {
	if e := q.peek(); e != nil && !e.due.After(now) {
		return e
	}
	return nil
}

// latest returns the last entry, except those that are to be moved.
func (q *queue) latest() *Entry {
	for _, e := range slices.Backward(q.entries) {
		if e.Death == nil {
			return e
		}
	}
	return nil
}
