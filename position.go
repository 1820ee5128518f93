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
	last   string              // the last entry that was read
	recent map[string]struct{} // what was read since the last look, up to maxRecent
	replay map[string]struct{} // what was read already of a stream that began anew

	// Of the last look.
	mark   string // last
	newest string // the stream's last ID
	added  int64  // entries of the stream, ever; -1: not known
	at     time.Time
	first  string // that was read since then
}

func newPosition(s *subscription) *position {
	return &position{s: s, name: watermill.NewUUID(), recent: make(map[string]struct{}), done: make(chan struct{})}
}

// begin says where the fan-out begins, before Subscribe returns.
func (p *position) begin(ctx context.Context, after string, info xstream.Info) {
	p.last, p.mark, p.at = after, after, time.Now()
	p.newest, p.added = info.Last, info.Added
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
	p.last = entries[len(entries)-1].ID
	if p.first == "" {
		p.first = entries[0].ID
	}
	kept := entries[:0:0]
	for _, e := range entries {
		if _, seen := p.replay[e.ID]; seen {
			continue
		}
		kept = append(kept, e)
		if len(p.recent) < maxRecent {
			p.recent[e.ID] = struct{}{}
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
	last, mark := p.last, p.mark
	idle, since := last == mark, p.afterLocked(p.newest)
	if p.first != "" {
		mark = p.first
	}
	p.mu.Unlock()
	if idle && time.Since(p.at) < positionRest {
		return
	}
	anew, info, err := p.beganAnew(ctx, mark, int64(len(since)))
	if redisx.IsDenied(err) { // then without knowing
		anew, info.Added, err = false, -1, nil
	}
	if err != nil {
		return // the reader notices an outage
	}
	p.at = time.Now()
	p.mu.Lock()
	if anew {
		p.replay = p.recent
		p.last = "0-0"
	} else if idle {
		p.replay = nil
	}
	// What was read while the server was asked may be among what it has counted.
	p.recent = p.afterLocked(info.Last)
	p.mark, p.newest, p.added, p.first = last, info.Last, info.Added, ""
	if anew {
		p.mark = "0-0"
	}
	p.mu.Unlock()
	if anew {
		s.reader.seat.Rewind("0-0")
		s.log.Error("The stream was deleted and began anew; reading it from its beginning", errors.New("stream deleted"), s.logFields)
		return
	}
	p.say(ctx, last)
}

// afterLocked returns what was read since the last look and came after the ID.
func (p *position) afterLocked(id string) map[string]struct{} {
	later := make(map[string]struct{})
	for recent := range p.recent {
		if xstream.CompareIDs(recent, id) > 0 {
			later[recent] = struct{}{}
		}
	}
	return later
}

// beganAnew reports whether the stream is another one than at the last look. mark is
// the first entry that was read since then, or the last before. since then so many
// entries were read that were added later: a stream never has fewer than it had, and
// those.
func (p *position) beganAnew(ctx context.Context, mark string, since int64) (bool, xstream.Info, error) {
	info, err := p.s.stream.Info(ctx)
	if err != nil {
		return false, info, err
	}
	if p.added >= 0 && info.Added >= 0 && info.Added < p.added+since {
		return true, info, nil
	}
	ms, seq := xstream.SplitID(mark)
	switch {
	case ms == 0 && seq == 0:
		return false, info, nil // nothing was read
	case xstream.CompareIDs(info.Last, mark) < 0:
		return true, info, nil
	case info.First == "0-0", xstream.CompareIDs(info.First, mark) > 0, xstream.CompareIDs(info.MaxDeleted, mark) >= 0:
		return false, info, nil
	}
	e, err := p.s.stream.Entry(ctx, mark)
	return e == nil && err == nil, info, err
}

// remove takes the position back.
func (p *position) remove() {
	if !p.denied {
		_ = p.s.stream.RemovePosition(p.s.ctx, p.name)
	}
}
