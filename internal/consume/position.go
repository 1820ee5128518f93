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
	s    *Subscription
	name string // in the stream's positions

	denied    bool      // the right to say so is missing, or was, which was said
	notBefore time.Time // it is tried again

	mu     sync.Mutex
	last   xstream.Mark      // the last entry that was read; at first StartID
	any    bool              // something was read
	first  xstream.Mark      // the first one that was read since the last look
	recent map[string]uint64 // the prints of what was read since then, up to maxRecent
	replay map[string]uint64 // of what was read already of a stream that is read again

	// Of the last look.
	info   xstream.Info
	mark   xstream.Mark // last
	before xstream.Mark // the mark before that
	at     time.Time
}

func newPosition(s *Subscription) *position {
	return &position{s: s, name: watermill.NewUUID(), recent: make(map[string]uint64)}
}

// begin says where the fan-out begins, before Subscribe returns.
func (p *position) begin(ctx context.Context, after string, info xstream.Info) {
	p.last, p.info, p.at = xstream.Mark{ID: after}, info, time.Now()
	p.mark = p.last
	p.say(ctx, after)
}

// say tells Redis that all up to the ID was read.
func (p *position) say(ctx context.Context, id string) {
	s := p.s
	if time.Now().Before(p.notBefore) {
		return
	}
	ms, seq := xstream.SplitID(id)
	id = fmt.Sprintf("%d-%d", ms, seq) // as scripts compare it
	err := s.stream.SetPosition(ctx, p.name, id, positionTTL)
	if redisx.IsDenied(err) || redisx.ReplyHas(err, "CROSSSLOT", "can't access non local key", "READONLY You can't write against a read only replica") {
		p.notBefore = time.Now().Add(positionRest)
		if p.denied {
			return
		}
		p.denied = true
		s.cfg.Log.Info("No right to say how far a fan-out has come; consumers with DeleteAcked may delete what it has not read: "+err.Error(), s.cfg.Fields)
	}
}

// unseen returns the entries without those that came before, from a stream that is
// read again.
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
		if len(p.recent) < maxRecent {
			p.recent[m.ID] = m.Print
		}
	}
	return kept
}

// run looks at the stream until the subscription closes.
func (p *position) run() {
	timer := time.NewTimer(positionTick)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-p.s.life.closing:
			return
		}
		p.look(p.s.life.ctx)
		timer.Reset(positionTick)
	}
}

// look finds out whether the stream began anew, and says how far the fan-out is.
func (p *position) look(ctx context.Context) {
	s := p.s
	p.mu.Lock()
	was := p.seenLocked()
	p.mu.Unlock()
	idle := was.last == p.mark
	if idle && time.Since(p.at) < positionRest {
		return
	}
	info, err := s.stream.Info(ctx)
	again := ""
	if err == nil && was.differs(info) {
		again, err = p.survivor(ctx, was, info)
	}
	if redisx.IsDenied(err) { // then without knowing
		info.Added, err = -1, nil
	}
	if err != nil {
		return // the reader notices an outage
	}
	p.at = time.Now()
	p.mu.Lock()
	if again != "" {
		p.replay, p.recent = p.recent, make(map[string]uint64)
		p.last = xstream.Mark{ID: again}
		was.last = p.last
	} else {
		if idle {
			p.replay = nil
		}
		// What was read while the server was asked may be among what it has counted.
		p.recent = p.afterLocked(info.Last)
	}
	if was.last != p.mark {
		p.mark, p.before = was.last, p.mark
	}
	p.info, p.first = info, xstream.Mark{}
	p.mu.Unlock()
	if again != "" {
		s.reader.seat.Rewind(again)
		s.cfg.Log.Error("The stream was deleted and began anew, or a failover has lost the end of it; reading it again from where it changed",
			errors.New("stream changed"), s.cfg.Fields.Add(watermill.LogFields{"start_id": again}))
	}
	p.say(ctx, was.last.ID)
}

// seen is what a look knows of the stream.
type seen struct {
	xstream.Info                // of the last look; Added is the least that there must be
	last         xstream.Mark   // that was read; of StartID nobody knows whether it is there
	marks        []xstream.Mark // entries that were there, the latest first
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
		was.First, was.FirstPrint = p.first.ID, "" // of an empty stream the first that came
	}
	if was.Added >= 0 {
		was.Added += int64(len(p.afterLocked(p.info.Last)))
	}
	return was
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

// differs reports whether the stream is not the one that it was. One that goes on never
// has a smaller last ID, or fewer entries, or an older first one, or another one of the
// same ID. (That an entry is missing means nothing: it may be trimmed.)
func (was seen) differs(now xstream.Info) bool {
	switch {
	case xstream.CompareIDs(now.Last, was.Last) < 0, was.Added >= 0 && now.Added >= 0 && now.Added < was.Added:
		return true
	case now.First == "0-0" || was.First == "0-0":
		return false
	case now.First == was.First:
		return was.FirstPrint != "" && now.FirstPrint != was.FirstPrint
	}
	return xstream.CompareIDs(now.First, was.First) < 0
}

// survivor returns after which entry the stream is to be read again: the latest that
// was read and is still there, if a failover has lost the end of the stream; "0-0" if it
// was deleted and began anew.
func (p *position) survivor(ctx context.Context, was seen, now xstream.Info) (string, error) {
	if now.First == was.First && was.FirstPrint != "" && now.FirstPrint != was.FirstPrint {
		return "0-0", nil
	}
	for _, m := range was.marks {
		if there, err := p.s.stream.Has(ctx, m); there || err != nil {
			return m.ID, err
		}
	}
	return "0-0", nil
}

// remove takes the position back.
func (p *position) remove() {
	_ = p.s.stream.RemovePosition(p.s.life.ctx, p.name)
}
