package goxstreams

import (
	"context"
	"sync/atomic"
	"time"
)

const (
	// The prefetch doubles while the half of it that makes the reader read again
	// is consumed within prefetchFast, and halves when that takes longer than
	// prefetchSlow: what is prefetched is then 50 to 200 ms of work. More would
	// keep it from consumers that have nothing to do; less would make a fast
	// handler wait for the server.
	prefetchFast = 25 * time.Millisecond
	prefetchSlow = 100 * time.Millisecond

	// A read that was interrupted before it arrived at the server blocks all the
	// same, so that the interruption is repeated until the reader confirms it.
	wakeInterval = 10 * time.Millisecond

	// orphanPage is how many pending entries one look for orphans sees.
	orphanPage = 1000
)

// reader is the goroutine that reads what is new in the stream, and the only
// one to use its link.
type reader struct {
	s      *subscription
	after  string // fan-out: the last ID read
	last   time.Time
	asked  int
	got    int
	failed bool

	link atomic.Pointer[link] // set while a read may block
	done chan struct{}
}

// run reads until the subscription stops.
func (r *reader) run() {
	defer close(r.done)
	s := r.s
	var l *link
	defer func() {
		if l != nil {
			l.close()
		}
	}()
	pause := backoff{}
	for {
		count := s.awaitRoom(r)
		if count == 0 {
			return
		}
		var err error
		if l == nil {
			l, err = newLink(s.ctx, s.client, s.topic, s.cfg.BlockTime)
			if err == nil && !l.wakable() {
				s.once.unwakable.Do(func() {
					s.log.Info("No right to CLIENT ID and CLIENT UNBLOCK: Close waits for the read under way, 1s at most", s.logFields)
				})
			}
		}
		if err == nil && r.failed {
			// The answer to the failed read may be lost, but not what it took.
			err = s.findOrphans(s.ctx)
		}
		var entries []entry
		if err == nil {
			entries, err = r.read(l, count)
		}
		if err != nil {
			r.failed = true
			if l != nil && !groupLost(err) {
				// Also after an answer: the node may be the wrong one by now.
				l.close()
				l = nil
			}
			s.failing(dutyRead, err)
			if groupLost(err) {
				_ = s.regroup() // if that fails, the next read says so again
			}
			if !pause.wait(s.closing) {
				return
			}
			continue
		}
		pause.reset()
		r.failed = false
		s.works(dutyRead)
		r.asked, r.got, r.last = count, len(entries), time.Now()
		s.enqueue(entries, r.last)
	}
}

func (r *reader) read(l *link, count int) ([]entry, error) {
	s := r.s
	block := s.cfg.BlockTime
	if r.failed {
		block = time.Millisecond // whether it works again is to be known at once
	}
	if l.wakable() {
		r.link.Store(l)
		defer r.link.Store(nil)
	} else {
		block = min(block, unwakableBlock)
	}
	if s.fanOut() {
		entries, err := s.stream.readAfter(s.ctx, l.conn, r.after, count, block)
		if len(entries) > 0 {
			r.after = entries[len(entries)-1].id
		}
		return entries, err
	}
	return s.stream.read(s.ctx, l.conn, count, block, s.cfg.NoAck)
}

// findOrphans offers what is pending in this consumer's name and not held: the
// answer to a read or claim was lost, so that nobody knows of these entries.
// Only a generated name says that they are ours; with a given one the claimer
// finds them when their time is up.
func (s *subscription) findOrphans(ctx context.Context) error {
	if !s.leased() || !s.uniqueName {
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
	case took < prefetchFast && r.got == r.asked:
		prefetch = min(max(1, 2*prefetch), batchSize)
	}
	r.last = time.Time{}
	return prefetch
}

// interrupt ends a blocked read, again and again until stopped reports that
// the reader has noticed.
func (r *reader) interrupt(stopped func() bool) {
	pause := time.NewTimer(wakeInterval)
	defer pause.Stop()
	for !stopped() {
		if l := r.link.Load(); l != nil {
			err := l.wake(r.s.ctx)
			if denied(err) {
				r.link.CompareAndSwap(l, nil)
			}
		}
		pause.Reset(wakeInterval) // from the answer on, however slow that was
		select {
		case <-r.done:
			return
		case <-pause.C:
		}
	}
}
