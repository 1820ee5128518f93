package ledger

import (
	"slices"
	"time"
)

// queues are where the entries of a ledger wait.
type queues struct {
	fresh    queue
	claims   queue // candidates
	suspects queue // claims that may have crashed their consumer
	lonely   queue // claims that must not share this delivery with any other
	broken   queue
	retries  waiting
	singles  waiting // retries that wait for no batch: see single and readmit
	recalls  waiting // retries for OnBroken
	head     *Entry  // with one slot: the waiting entry that blocks all others
}

// waitPlace is where an entry waits.
type waitPlace struct {
	in    *queue
	heap  *waiting
	place int       // in the heap
	due   time.Time // for a waiting entry: not before that time; for any other: when it came
	dead  bool      // waits to be moved
}

// queue holds entries in order of arrival.
type queue struct{ entries []*Entry }

func (q *queue) len() int { return len(q.entries) }

func (q *queue) push(e *Entry) {
	e.in = q
	q.entries = append(q.entries, e)
}

// insert is push before those that are due later.
func (q *queue) insert(e *Entry) {
	e.in = q
	at, _ := slices.BinarySearchFunc(q.entries, e.due, func(other *Entry, due time.Time) int { return other.due.Compare(due) })
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

// waiting is a heap of entries by due time.
type waiting []*Entry

func (w waiting) Len() int           { return len(w) }
func (w waiting) Less(i, j int) bool { return w[i].due.Before(w[j].due) }
func (w waiting) Swap(i, j int) {
	w[i], w[j] = w[j], w[i]
	w[i].place, w[j].place = i, j
}

func (w *waiting) Push(x any) {
	e := x.(*Entry)
	e.place = len(*w)
	*w = append(*w, e)
}

func (w *waiting) Pop() any {
	old := *w
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*w = old[:len(old)-1]
	return e
}

// first returns the entry that is due first, if it is due.
func (w waiting) first(now time.Time) *Entry {
	if len(w) == 0 || w[0].due.After(now) {
		return nil
	}
	return w[0]
}

// latest returns the entry that is due last, except those that are to be moved. It
// searches the whole heap, which only a ledger at its limit does.
func (w waiting) latest() (latest *Entry) {
	for _, e := range w {
		if !e.dead && (latest == nil || e.due.After(latest.due)) {
			latest = e
		}
	}
	return latest
}
