package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// positionTTL is for how long Redis remembers how far a fan-out has come that
	// does not say so again: its process is dead then.
	positionTTL = time.Minute

	// positionTick is how often a fan-out says how far it has come.
	positionTick = time.Second

	// positionRest is how often it does if it has not gone on.
	positionRest = 5 * time.Second

	// maxRecent bounds the IDs that a fan-out remembers between two looks.
	maxRecent = 10_000
)

// position is how far a fan-out has come in its stream. It tells Redis, so that
// consumers with DeleteAcked do not delete what it has not read; and it finds out
// when the stream was deleted and began anew: a read after an ID of the old one would
// pass over what has a smaller one.
type position struct {
	s    *subscription
	name string // in the stream's positions
	done chan struct{}

	denied bool // the right to say so is missing

	mu     sync.Mutex
	last   string            // the last entry that was read; at first StartID
	any    bool              // something was read
	recent map[string]uint64 // what was read since the last look, up to maxRecent: IDs and fingerprints
	replay map[string]uint64 // what was read already of a stream that began anew

	// Of the last look.
	mark   string // last
	before string // the mark of the look before
	oldest string // the stream's first entry; "0-0": it was empty
	newest string // the stream's last ID
	added  int64  // entries of the stream, ever; -1: not known
	at     time.Time
	first  string // that was read since then
}

func newPosition(s *subscription) *position {
	return &position{s: s, name: watermill.NewUUID(), recent: make(map[string]uint64), done: make(chan struct{})}
}

// begin says where the fan-out begins, before Subscribe returns.
func (p *position) begin(ctx context.Context, after string, info xstream.Info) {
	p.last, p.mark, p.at = after, after, time.Now()
	p.oldest, p.newest, p.added = info.First, info.Last, info.Added
	p.say(ctx, after)
}

// say tells Redis that all up to the ID was read.
func (p *position) say(ctx context.Context, id string) {
	s := p.s
	if p.denied {
		return
	}
	ms, seq := xstream.SplitID(id)
	id = fmt.Sprintf("%d-%d", ms, seq) // as scripts compare it
	err := s.stream.SetPosition(ctx, p.name, id, positionTTL)
	if redisx.IsDenied(err) || redisx.ReplyHas(err, "CROSSSLOT", "can't access non local key", "READONLY You can't write against a read only replica") {
		p.denied = true
		s.log.Info("No right to say how far a fan-out has come; consumers with DeleteAcked may delete what it has not read: "+err.Error(), s.logFields)
	}
}

// unseen returns the entries without those that came before, from a stream that began
// anew meanwhile.
func (p *position) unseen(entries []xstream.Entry) []xstream.Entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last, p.any = entries[len(entries)-1].ID, true
	if p.first == "" {
		p.first = entries[0].ID
	}
	kept := entries[:0:0]
	for _, e := range entries {
		print := fingerprint(e.Fields)
		if seen, ok := p.replay[e.ID]; ok && seen == print {
			continue
		}
		kept = append(kept, e)
		if len(p.recent) < maxRecent {
			p.recent[e.ID] = print
		}
	}
	return kept
}

// run looks at the stream until the subscription closes.
func (p *position) run() {
	defer close(p.done)
	timer := time.NewTimer(positionTick)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-p.s.closing:
			return
		}
		p.look(p.s.ctx)
		timer.Reset(positionTick)
	}
}

// look finds out whether the stream began anew, and says how far the fan-out is.
func (p *position) look(ctx context.Context) {
	s := p.s
	p.mu.Lock()
	last, idle := p.last, p.last == p.mark
	seen := *p.seenLocked()
	p.mu.Unlock()
	if idle && time.Since(p.at) < positionRest {
		return
	}
	info, err := s.stream.Info(ctx)
	var changed change
	if err == nil {
		changed, err = p.compare(ctx, seen, info)
	}
	if redisx.IsDenied(err) { // then without knowing
		changed, info.Added, err = same, -1, nil
	}
	if err != nil {
		return // the reader notices an outage
	}
	p.at = time.Now()
	if changed == tailLost && xstream.CompareIDs(last, info.Last) > 0 {
		last = info.Last
		s.reader.seat.Rewind(last)
	}
	p.mu.Lock()
	switch {
	case changed == anew:
		p.replay, p.recent = p.recent, make(map[string]uint64)
		p.last, last = "0-0", "0-0"
	case idle:
		p.replay = nil
		fallthrough
	default:
		// What was read while the server was asked may be among what it has counted.
		p.recent = p.afterLocked(info.Last)
	}
	if changed == tailLost {
		p.recent = make(map[string]uint64) // lost, and maybe more of it
		p.last = last
	}
	p.mark, p.before = last, p.mark
	p.oldest, p.newest, p.added, p.first = info.First, info.Last, info.Added, ""
	p.mu.Unlock()
	if changed == anew {
		s.reader.seat.Rewind("0-0")
		s.log.Error("The stream was deleted and began anew; reading it from its beginning", errors.New("stream deleted"), s.logFields)
		return
	}
	p.say(ctx, last)
}

// seen is what a look knows of the stream.
type seen struct {
	marks  []string // entries that were there: the oldest, and what was read
	oldest string
	newest string
	last   string
	added  int64 // the least that the stream must have had
}

func (p *position) seenLocked() *seen {
	s := &seen{oldest: p.oldest, newest: p.newest, last: p.newest, added: p.added}
	if p.any {
		s.last = p.last
	}
	for _, id := range []string{p.oldest, p.before, p.mark, p.first} {
		if ms, seq := xstream.SplitID(id); ms != 0 || seq != 0 {
			s.marks = append(s.marks, id)
		}
	}
	if s.oldest == "0-0" && p.first != "" {
		s.oldest = p.first // of an empty stream the first that came
	}
	if s.added >= 0 {
		s.added += int64(len(p.afterLocked(p.newest)))
	}
	return s
}

// afterLocked returns what was read since the last look and came after the ID.
func (p *position) afterLocked(id string) map[string]uint64 {
	later := make(map[string]uint64)
	for recent, print := range p.recent {
		if xstream.CompareIDs(recent, id) > 0 {
			later[recent] = print
		}
	}
	return later
}

// change is what became of a stream since the last look.
type change int

const (
	same     change = iota
	tailLost        // by a failover: the last entries are not in it any more
	anew            // it was deleted, and is another one
)

// compare tells what became of the stream. One that goes on never has a smaller last
// ID, or fewer entries, or an older first one. That it has may mean that a failover has
// lost the last of what was done to it; then an entry that was read before is still
// there. (That such an entry is missing means nothing by itself: it may be trimmed.)
func (p *position) compare(ctx context.Context, was seen, info xstream.Info) (change, error) {
	smaller := func(a, b string) bool { return xstream.CompareIDs(a, b) < 0 }
	switch {
	case len(was.marks) == 0: // nothing was there
		return same, nil
	case smaller(info.Last, was.newest), smaller(info.Last, was.last):
	case was.added >= 0 && info.Added >= 0 && info.Added < was.added:
	case info.First != "0-0" && was.oldest != "0-0" && smaller(info.First, was.oldest):
	default:
		return same, nil
	}
	for _, id := range was.marks {
		e, err := p.s.stream.Entry(ctx, id)
		if err != nil {
			return same, err
		}
		if e != nil {
			return tailLost, nil
		}
	}
	return anew, nil
}

// remove takes the position back.
func (p *position) remove() {
	if !p.denied {
		_ = p.s.stream.RemovePosition(p.s.ctx, p.name)
	}
}
