package ledger

import (
	"container/heap"
	"time"
)

// queue holds entries in order of arrival.
type queue struct{ entries []*Entry }

func (q *queue) len() int { return len(q.entries) }

func (q *queue) push(e *Entry) {
	e.in = q
	q.entries = append(q.entries, e)
}

// peek returns the first entry; nil if the queue is empty.
func (q *queue) peek() *Entry {
	if len(q.entries) == 0 {
		return nil
	}
	return q.entries[0]
}

// drop removes an entry, which is nearly always the first.
func (q *queue) drop(e *Entry) {
	e.in = nil
	for i, other := range q.entries {
		if other != e {
			continue
		}
		if i == 0 {
			q.entries[0] = nil
			q.entries = q.entries[1:]
			return
		}
		rest := copy(q.entries[i:], q.entries[i+1:])
		q.entries[i+rest] = nil
		q.entries = q.entries[:i+rest]
		return
	}
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

var _ heap.Interface = (*waiting)(nil)

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
