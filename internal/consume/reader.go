package consume

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/poll"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// The prefetch doubles while that many entries are consumed within prefetchFast,
	// and halves when they take longer than prefetchSlow. At most twice the prefetch
	// is read ahead: 50 to 200 ms of work.
	prefetchFast = 25 * time.Millisecond
	prefetchSlow = 100 * time.Millisecond

	// maxRead is the approximate maximum of bytes per read. At most twice that is
	// read ahead, unless a single entry is larger.
	maxRead = 1 << 20

	// sharedPrefetch is the prefetch of a fast handler whose topic shares its reads
	// with others.
	sharedPrefetch = 2
)

// reader is the subscription's side of its poller (a poll.Member), and the
// goroutine that reconnects after read errors.
type reader struct {
	s    *Subscription
	seat *poll.Seat
	done chan struct{}

	disowned sync.Map // the IDs of entries that stay pending for this consumer, but that it gave up

	mu       sync.Mutex
	prefetch int
	last     time.Time // time of the last read
	asked    int       // entries requested; 0: a read of several streams, one entry each
	got      int
	size     int // average entry size of the last read, in bytes
}

func newReader(s *Subscription) *reader { return &reader{s: s, done: make(chan struct{})} }

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
			pause.reset() // reading has worked in between
		}
		s.markFailed(dutyRead, err)
		if !pause.wait(s.life.closing.Done()) {
			return
		}
		s.mode.reconnect(s.life.ctx)
	}
}

// Room returns how many entries may be read now.
func (r *reader) Room() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.s.ledger.Room(r.prefetch) == 0 {
		return 0
	}
	r.prefetch = min(r.adapted(), r.fits())
	return min(r.s.ledger.Room(r.prefetch), r.s.cfg.BatchSize, r.fits())
}

// Take adds a batch to the ledger.
func (r *reader) Take(b poll.Batch) {
	s, entries := r.s, b.Entries
	size := 0
	for _, e := range entries {
		for _, f := range e.Fields {
			size += len(f)
		}
	}
	r.mu.Lock()
	r.size = size / len(entries)
	r.asked, r.got, r.last = b.Asked, len(entries), b.At
	r.mu.Unlock()
	if entries = s.mode.read(entries); len(entries) == 0 {
		return
	}
	batch := make([]ledger.Entry, len(entries)) // one allocation for the whole batch
	add := make([]*ledger.Entry, len(entries))
	for i, e := range entries {
		add[i] = batch[i].SetCount(1, 2)
		add[i].ID, add[i].Fields = e.ID, e.Fields
		if e.Fields == nil {
			add[i].Fields = []string{}
		}
	}
	fx, ok := s.ledger.Add(b.At, b.Sent, add)
	if s.apply(fx); !ok { // a reply that Close did not wait for
		s.mode.late(add)
	}
}

// own copies the fields: the originals are parts of a whole reply, and would keep
// it in memory as long as an entry waits.
func own(fields []string) []string {
	clones := make([]string, len(fields))
	for i, f := range fields {
		clones[i] = strings.Clone(f)
	}
	return clones
}

// Reading notes that reading works, or that there is nothing to read for.
func (r *reader) Reading() { r.s.markHealthy(dutyRead) }

// Orphans takes entries that are pending for this consumer but unknown to it: the answer
// to the command that read or claimed them was lost, so their delivery has reached nobody.
// The rows are all that is pending.
func (r *reader) Orphans(rows []xstream.Pending) {
	s := r.s
	r.disowned.Range(func(id, _ any) bool {
		if !slices.ContainsFunc(rows, func(p xstream.Pending) bool { return p.ID == id }) {
			r.disowned.Delete(id)
		}
		return true
	})
	rows = slices.DeleteFunc(rows, func(p xstream.Pending) bool { return r.isDisowned(p.ID) })
	orphans := make([]*ledger.Entry, len(rows))
	for i, p := range rows {
		orphans[i] = (&ledger.Entry{ID: p.ID}).SetCount(max(p.Count, 1), max(p.Count, 1)) // 0: snoozed, or released
	}
	s.apply(s.ledger.Offer(time.Now(), orphans, false))
}

func (r *reader) isDisowned(id string) bool {
	_, ok := r.disowned.Load(id)
	return ok
}

// fits returns how many entries of the current size fit into one read.
func (r *reader) fits() int { return max(1, maxRead/max(1, r.size)) }

// adapted returns the prefetch for the next read. It is called when there is room
// again.
func (r *reader) adapted() int {
	prefetch, batchSize := r.prefetch, r.s.cfg.BatchSize
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
		// One entry says little. But a topic that has room for the next one need
		// not leave its connection and wake it up to return.
		prefetch = min(max(prefetch, sharedPrefetch), batchSize)
	}
	r.last = time.Time{}
	return prefetch
}

// leave ends reading: before CloseTimeout if the server answers.
func (r *reader) leave() {
	r.seat.Leave()
	select {
	case <-r.done:
	case <-r.s.life.abandon.Done():
		r.seat.Abandon()
		<-r.done
	}
}
