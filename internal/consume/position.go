package consume

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
	// positionTTL is how long Redis keeps the position of a fan-out that does not
	// update it: its process is dead.
	positionTTL = time.Minute

	// positionTick is how often a fan-out updates its position.
	positionTick = time.Second

	// positionRest is how often it does so if the position has not changed.
	positionRest = 5 * time.Second

	// maxRecent limits the IDs that a fan-out remembers between two looks.
	maxRecent = 10_000
)

// position is how far a fan-out has read its stream. It reports that to Redis, so
// that retention does not trim unread entries. It also detects
// that the stream was deleted and recreated: a read after an ID of the old stream
// would skip entries with smaller IDs.
type position struct {
	s    *Subscription
	name string // in the stream's positions

	denied    bool      // the missing permission is logged already
	unstored  bool      // the last update failed
	notBefore time.Time // no update before that time

	mu     sync.Mutex
	last   xstream.Mark      // the last entry read; at first StartID
	any    bool              // something was read
	first  xstream.Mark      // the first entry read that the last look did not describe
	recent map[string]uint64 // fingerprints of the entries read since then, up to maxRecent
	replay map[string]uint64 // entries that a stream which is being reread had already delivered

	// State of the last look.
	info   xstream.Info
	mark   xstream.Mark // last, at that time
	before xstream.Mark // the previous value of mark
	at     time.Time
}

func newPosition(s *Subscription) *position {
	return &position{s: s, name: watermill.NewUUID(), recent: make(map[string]uint64)}
}

// begin reports the start position, before Subscribe returns.
func (p *position) begin(ctx context.Context, after string, info xstream.Info) error {
	p.last, p.info, p.at = xstream.Mark{ID: after}, info, time.Now()
	p.mark = p.last
	return p.report(ctx, after, info)
}

// report tells Redis that everything up to the ID was read, of the stream of that info. A missing permission is logged
// and not an error.
func (p *position) report(ctx context.Context, id string, info xstream.Info) error {
	s := p.s
	if time.Now().Before(p.notBefore) {
		return nil
	}
	ms, seq := xstream.SplitID(id)
	id = fmt.Sprintf("%d-%d", ms, seq) // the form that scripts compare
	err := s.stream.SetPosition(ctx, p.name, id, info, positionTTL)
	if redisx.IsDenied(err) || redisx.ReplyHas(err, "CROSSSLOT", "can't access non local key", "READONLY You can't write against a read only replica") {
		p.notBefore = time.Now().Add(positionRest)
		if !p.denied {
			p.denied = true
			s.cfg.Log.Info("No permission to store the read position of a fan-out; retention and DeleteAcked may delete entries that it has not read: "+err.Error(), s.cfg.Fields)
		}
		err = nil
	}
	return err
}

// unseen drops the entries that were already delivered, from a stream that is being
// reread.
func (p *position) unseen(entries []xstream.Entry) []xstream.Entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := entries[:0:0]
	for _, e := range entries {
		m := e.Mark()
		if p.last, p.any = m, true; p.first.ID == "" {
			p.first = m
		}
		if p.replay[m.ID] != m.Print && p.recent[m.ID] != m.Print {
			kept = append(kept, e)
		}
		delete(p.replay, m.ID) // it is recent now
		if len(p.recent) < maxRecent {
			p.recent[m.ID] = m.Print
		}
	}
	return kept
}

// run looks at the stream until the subscription closes.
func (p *position) run() {
	repeat(p.s.life.closing.Done(), nil, positionTick, func() time.Duration {
		p.look(p.s.life.ctx)
		return positionTick
	})
}

// look checks whether the stream was recreated, and reports the position.
func (p *position) look(ctx context.Context) {
	s := p.s
	p.mu.Lock()
	was := p.seenLocked()
	p.mu.Unlock()
	idle := was.last == p.mark
	if idle && !p.unstored && time.Since(p.at) < positionRest {
		return
	}
	info, err := s.stream.Info(ctx)
	again := ""
	if err == nil && was.differs(info) {
		again, err = p.survivor(ctx, was, info)
	}
	if redisx.IsDenied(err) { // continue without the check
		info.Added, err = -1, nil
	}
	if err != nil {
		return // the reader reports the outage
	}
	p.at = time.Now()
	was.last = p.looked(was.last, info, again)
	if again != "" {
		s.reader.seat.Rewind(again)
		s.cfg.Log.Error("The stream was deleted and recreated, or a failover lost its end; rereading it from where it changed",
			errors.New("stream changed"), s.cfg.Fields.Add(watermill.LogFields{"start_id": again}))
	}
	err = p.report(ctx, was.last.ID, info)
	p.unstored = err != nil
	s.mark(dutyPosition, err)
}

// looked notes what a look has found: the info, of a stream that had been read up to last
// before, and where it is to be reread. It returns up to where it counts as read.
func (p *position) looked(last xstream.Mark, info xstream.Info, again string) xstream.Mark {
	p.mu.Lock()
	defer p.mu.Unlock()
	if again != "" {
		p.replay, p.recent = p.recent, make(map[string]uint64)
		p.last = xstream.Mark{ID: again}
		last = p.last
	} else {
		// Entries that were read during the call may be among those that the server
		// has counted, and follow those that it has described.
		p.recent = p.afterLocked(info.Last)
	}
	p.first = xstream.Mark{}
	for id, print := range p.recent {
		if p.first.ID == "" || xstream.CompareIDs(id, p.first.ID) < 0 {
			p.first = xstream.Mark{ID: id, Print: print}
		}
	}
	if last != p.mark {
		p.mark, p.before = last, p.mark
	}
	p.info = info
	return last
}

// seen is what a look knows about the stream.
type seen struct {
	xstream.Info                // as of the last look; Added is a lower bound
	last         xstream.Mark   // the last entry read; StartID may not exist as an entry
	marks        []xstream.Mark // entries that existed, the latest first
}

func (p *position) seenLocked() seen {
	was := seen{Info: p.info, last: p.last}
	for _, m := range []xstream.Mark{p.first, p.mark, p.before} {
		if ms, seq := xstream.SplitID(m.ID); ms != 0 || seq != 0 {
			was.marks = append(was.marks, m)
		}
	}
	if p.any && xstream.CompareIDs(p.last.ID, was.Last) > 0 {
		was.Last = p.last.ID
	}
	if was.First == "0-0" && p.first.ID != "" {
		was.First, was.FirstPrint = p.first.ID, "" // the stream was empty: the first entry that was added
	}
	if was.Added >= 0 {
		was.Added += int64(len(p.afterLocked(p.info.Last)))
	}
	return was
}

// afterLocked returns the entries that were read since the last look and follow the
// ID.
func (p *position) afterLocked(id string) map[string]uint64 {
	later := make(map[string]uint64)
	for recent, print := range p.recent {
		if xstream.CompareIDs(recent, id) > 0 {
			later[recent] = print
		}
	}
	return later
}

// differs reports whether this is not the same stream. The last ID, the number of
// added entries and the first ID of a stream never decrease, and an ID keeps its
// entry. (A missing entry means nothing: it may be trimmed.)
func (was seen) differs(now xstream.Info) bool {
	switch {
	case xstream.CompareIDs(now.Last, was.Last) < 0, was.Added >= 0 && now.Added >= 0 && now.Added < was.Added:
		return true
	case now.First == "0-0" || was.First == "0-0":
		return false
	}
	return xstream.CompareIDs(now.First, was.First) < 0 || was.otherFirst(now)
}

// otherFirst reports whether the first entry's ID is another entry's now. A digest may be unknown.
func (was seen) otherFirst(now xstream.Info) bool {
	return now.First == was.First && was.FirstPrint != "" && now.FirstPrint != "" && now.FirstPrint != was.FirstPrint
}

// survivor returns the entry after which to reread the stream: the latest one that
// was read and still exists, if a failover has lost the end of the stream; "0-0" if
// the stream was deleted and recreated.
func (p *position) survivor(ctx context.Context, was seen, now xstream.Info) (string, error) {
	if was.otherFirst(now) {
		return "0-0", nil
	}
	for _, m := range was.marks {
		if there, err := p.s.stream.Has(ctx, m); there || err != nil {
			return m.ID, err
		}
	}
	return "0-0", nil
}

// remove deletes the position from Redis.
func (p *position) remove() {
	_ = p.s.stream.RemovePosition(p.s.life.ctx, p.name)
}
