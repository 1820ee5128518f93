package goxstreams

import (
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/poll"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// The prefetch doubles while as much is consumed within prefetchFast, and halves
	// when that takes longer than prefetchSlow: what is read ahead, twice the
	// prefetch at most, is then 50 to 200 ms of work. More would
	// keep it from consumers that have nothing to do; less would make a fast
	// handler wait for the server.
	prefetchFast = 25 * time.Millisecond
	prefetchSlow = 100 * time.Millisecond

	// maxRead is about how many bytes one read takes, and twice that is read ahead,
	// where it is more than one entry.
	maxRead = 1 << 20

	// sharedPrefetch is the prefetch of a fast handler whose topic is read with others.
	sharedPrefetch = 2
)

// reader is the subscription's side of its poller (a poll.Member), and the goroutine
// that sees to it when reading fails.
type reader struct {
	s    *subscription
	seat *poll.Seat
	done chan struct{}

	// Guarded by subscription.mu.
	last  time.Time // of the last read
	asked int       // entries; 0: with other streams, of which one entry is read at a time
	got   int
	size  int // of an entry of the last read, in bytes
}

func newReader(s *subscription) *reader { return &reader{s: s, done: make(chan struct{})} }

// run has the poller read until the subscription leaves.
func (r *reader) run() {
	defer close(r.done)
	s := r.s
	pause := backoff{}
	for {
		began := time.Now()
		err := r.seat.Serve()
		if err == nil {
			return
		}
		if time.Since(began) > 2*maxBackoff {
			pause.reset() // it has worked meanwhile
		}
		s.markFailed(dutyRead, err)
		if xstream.GroupLost(err) {
			_ = s.regroup() // if that fails, the next read says so again
		}
		if !pause.wait(s.closing) {
			return
		}
	}
}

// Take enqueues what was read.
func (r *reader) Take(b poll.Batch) {
	s := r.s
	size := 0
	for _, e := range b.Entries {
		for _, f := range e.Fields {
			size += len(f)
		}
	}
	s.mu.Lock()
	r.size = size / len(b.Entries)
	r.asked, r.got, r.last = b.Asked, len(b.Entries), b.At
	s.mu.Unlock()
	s.enqueue(b)
}

// Holds reports whether the entry is in this subscription's hands.
func (r *reader) Holds(id string) bool { return r.s.leases.has(id) }

// Reading notes that reading works, or that there is no need to.
func (r *reader) Reading() { r.s.markHealthy(dutyRead) }

// Orphans offers what is pending in the consumer's name and in nobody's hands: the
// answer to a read or claim was lost.
func (r *reader) Orphans(rows []xstream.Pending) bool {
	s := r.s
	if s.overflowed.Load() {
		return true // what was given up waits for its lease to run out
	}
	now := time.Now()
	orphans := make([]*held, len(rows))
	for i, p := range rows {
		orphans[i] = &held{id: p.ID, count: p.Count, next: p.Count, since: now.Add(-p.Idle), orphan: true}
	}
	s.offerClaims(orphans)
	return !s.isClosing()
}

// fitsLocked returns how many entries like the last ones are read at a time, and
// ahead.
func (r *reader) fitsLocked() int { return max(1, maxRead/max(1, r.size)) }

// adaptLocked returns the prefetch for the next read, given the one so far. It is
// asked when there is room for a read again.
func (r *reader) adaptLocked(prefetch, batchSize int) int {
	if r.last.IsZero() {
		return prefetch
	}
	took := time.Since(r.last)
	switch {
	case took > prefetchSlow:
		prefetch /= 2
	case took >= prefetchFast:
	case r.got == r.asked:
		prefetch = min(max(1, 2*prefetch), batchSize)
	case r.asked == 0:
		// One entry says little; but a topic with room for the next one needs not
		// leave its connection and wake it to come back.
		prefetch = min(max(prefetch, sharedPrefetch), batchSize)
	}
	r.last = time.Time{}
	return prefetch
}

// leave ends the reading, before abandon if the server answers.
func (r *reader) leave() {
	r.seat.Leave()
	select {
	case <-r.done:
	case <-r.s.abandon:
		r.seat.Abandon()
		<-r.done
	}
}
