package goxstreams

import (
	"context"
	"sync/atomic"
	"time"
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

	// orphanPage is how many pending entries one look for orphans sees.
	orphanPage = 1000
)

// reader is the goroutine that reads what is new in the stream. While it waits in
// a watch, its fields are those of whoever leads there.
type reader struct {
	s     *subscription
	after string // fan-out: the last ID read

	last   time.Time // of the last read
	asked  int       // entries; 0: with other streams, of which one entry is read at a time
	got    int
	size   int  // of an entry of the last read, in bytes
	failed bool // the answer to the last read may be lost
	alone  bool // reads by itself, since there is more in the stream
	shy    bool // a read with others was refused: not again at once
	full   int  // the watch's last round that left more in the stream
	pause  backoff

	watch atomic.Pointer[watch] // set while the reader waits in one
	turn  chan turn
	key   watchKey
	group *watchGroup // set under hub.mu

	done chan struct{}
}

func newReader(s *subscription) *reader {
	return &reader{s: s, turn: make(chan turn, 1), done: make(chan struct{})}
}

// run reads until the subscription stops.
func (r *reader) run() {
	defer close(r.done)
	s := r.s
	defer s.hub.part(r)
	for {
		count := s.awaitRoom(r)
		if count == 0 {
			return
		}
		switch err := r.fetch(count); {
		case err == nil:
		case err == errLookAlone:
			r.shy = true
		default:
			r.failed = true
			s.failing(dutyRead, err)
			if groupLost(err) {
				_ = s.regroup() // if that fails, the next read says so again
			}
			if !r.pause.wait(s.closing) {
				return
			}
		}
	}
}

// fetch enqueues entries: what is there at once if the reader is by itself, or
// what comes while it waits for more.
func (r *reader) fetch(count int) error {
	s := r.s
	if r.failed {
		// The answer to the failed read may be lost, but not what it took.
		if err := s.findOrphans(s.ctx); err != nil {
			return err
		}
	}
	if r.failed || r.shy {
		// Whether it works is to be known at once, and of this stream.
		sent := time.Now()
		entries, err := s.stream.readNow(s.ctx, r.cursor(), 1, s.cfg.NoAck)
		if err != nil {
			return err
		}
		r.serves()
		if r.took(entries, 1, sent, time.Now()); len(entries) > 0 {
			return nil
		}
	}
	if r.alone {
		s.hub.ahead.Add(int64(count)) // so that others do not count on the same room
		sent := time.Now()
		entries, err := r.group.readAlone(r, count)
		s.hub.ahead.Add(-int64(count))
		if err != nil {
			return err
		}
		r.alone = len(entries) == count
		if r.took(entries, count, sent, time.Now()); len(entries) > 0 {
			r.serves()
			return nil
		}
	}
	if r.shy {
		r.shy = false
		if !r.pause.wait(s.closing) {
			return nil
		}
	}
	return s.hub.wait(r)
}

// cursor is where the reader goes on.
func (r *reader) cursor() cursor {
	if r.s.fanOut() {
		return cursor{r.s.topic, r.after}
	}
	return cursor{r.s.topic, ">"}
}

// took enqueues what was read.
func (r *reader) took(entries []entry, asked int, sent, at time.Time) {
	if len(entries) == 0 {
		return
	}
	r.after = entries[len(entries)-1].id
	size := 0
	for _, e := range entries {
		for _, f := range e.fields {
			size += len(f)
		}
	}
	r.size = size / len(entries)
	r.asked, r.got, r.last = asked, len(entries), at
	r.s.enqueue(entries, sent, at)
}

// fits returns how many entries like the last ones are read at a time, and ahead.
func (r *reader) fits() int { return max(1, maxRead/max(1, r.size)) }

// serves notes that reading works.
func (r *reader) serves() {
	r.failed = false
	r.s.works(dutyRead)
}

// findOrphans offers what is pending in this consumer's name and not held: the
// answer to a read or claim was lost, so that nobody knows of these entries.
// Only a generated name says that they are ours; with a given one, and once too many
// waited for a retry, the claimer finds them when their time is up.
func (s *subscription) findOrphans(ctx context.Context) error {
	if !s.leased() || !s.uniqueName || s.overflowed.Load() {
		return nil
	}
	var orphans []*held
	for start := "-"; ; {
		rows, err := s.stream.pending(ctx, 0, start, "+", orphanPage, s.stream.consumer)
		if err != nil {
			return err
		}
		now := time.Now()
		for _, p := range rows {
			orphans = append(orphans, &held{id: p.id, count: p.count, next: p.count, since: now.Add(-p.idle)})
		}
		if len(rows) < orphanPage {
			break
		}
		start = "(" + rows[len(rows)-1].id
	}
	s.offerClaims(orphans) // but for those that are in flight here
	return nil
}

// adapt returns the prefetch for the next read, given the one so far. It is
// asked when there is room for a read again.
func (r *reader) adapt(prefetch, batchSize int) int {
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
		// leave its watch and wake it to come back.
		prefetch = min(max(prefetch, sharedPrefetch), batchSize)
	}
	r.last = time.Time{}
	return prefetch
}

// interrupt ends a blocked read, again and again until stopped reports that
// the reader has noticed.
func (r *reader) interrupt(stopped func() bool) {
	var pause wakePause
	timer := time.NewTimer(0)
	defer timer.Stop()
	for !stopped() {
		w := r.watch.Load()
		timer.Reset(pause.next(w != nil && w.wake(r))) // from the answer on, however slow that was
		select {
		case <-r.done:
			return
		case <-timer.C:
		}
	}
}
