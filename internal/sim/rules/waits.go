package rules

import (
	"cmp"
	"slices"
	"time"
)

// Why an entry waits.
const (
	whyStored    = "stored"
	whyDelivered = "delivered, and not begun"
	whyNacked    = "to be retried"
	whyLost      = "given up when its lease was lost"
	whyClosed    = "given back"
	whyEnded     = "left by a process that ended"
	whyAway      = "left by a process that was away"
)

// A moment is one thing that happened to an entry.
type moment struct {
	at    time.Duration
	kind  Kind // Stored, Delivered, Started, Dead, Trimmed, or how a run ended
	id    LifeID
	count int64
	run   *Run
}

// A story is all that happened to an entry, told in the order of time.
type story struct {
	*starvation
	key     entryKey
	uuid    string
	stored  time.Duration
	moments []moment

	now     *wait
	list    []wait
	running []*Run
	latest  *Run
	holder  LifeID        // by the last Delivered
	count   int64         // of deliveries, as far as was seen
	counted time.Duration // when that was seen
}

// stories returns those of all entries that are judged.
func (s *starvation) stories() []*story {
	all := make(map[entryKey]*story)
	for topic, state := range s.Final {
		for _, entry := range state.Entries {
			all[entryKey{topic, entry.ID}] = &story{starvation: s, key: entryKey{topic, entry.ID}, uuid: entry.UUID}
		}
	}
	for _, event := range s.Events {
		if key := (entryKey{event.Topic, event.ID}); event.Kind == Trimmed && all[key] == nil {
			all[key] = &story{starvation: s, key: key, uuid: event.UUID}
		}
	}
	s.tell(all)
	var stories []*story
	for _, key := range sortedKeys(all) {
		t := all[key]
		if Nature(t.uuid) == Broken {
			continue
		}
		slices.SortStableFunc(t.moments, func(a, b moment) int { return cmp.Compare(a.at, b.at) })
		if len(t.moments) > 0 {
			t.stored = t.moments[0].at
		}
		stories = append(stories, t)
	}
	return stories
}

// tell gives each story its moments.
func (s *starvation) tell(all map[entryKey]*story) {
	add := func(key entryKey, m moment) {
		if t := all[key]; t != nil {
			t.moments = append(t.moments, m)
		}
	}
	type number struct {
		LifeID
		run int64
	}
	runs := make(map[number]*Run)
	for _, r := range s.Runs {
		runs[number{r.LifeID(), r.Start.Run}] = r
	}
	known, buried := false, make(map[entryKey]bool)
	for _, event := range s.Events {
		m := moment{at: event.Mono, kind: event.Kind, id: LifeID{event.Process, event.Life}, count: event.Count}
		key := entryKey{event.Topic, event.ID}
		switch event.Kind {
		case Started, Acked, Nacked, Lost, Closed:
			if m.run = runs[number{m.id, event.Run}]; m.run != nil {
				add(key, m)
			}
		case Stored, Delivered, Dead, Trimmed:
			known = known || event.Kind == Stored
			buried[key] = buried[key] || event.Kind == Dead
			add(key, m)
		}
	}
	for _, r := range s.Runs {
		if !r.Finished {
			add(r.key(), moment{at: r.End, kind: Ended, id: r.LifeID(), run: r})
		}
	}
	for topic, state := range s.Final {
		for _, letter := range state.Dead {
			if key := (entryKey{topic, letter.EntryID}); !buried[key] {
				add(key, moment{at: letter.At, kind: Dead})
			}
		}
	}
	if !known { // then what Publish said is what there is. When what it delayed was moved, nobody said.
		for _, t := range all {
			if m := s.Messages[t.uuid]; m != nil && m.Outcome == Published && m.Delay == 0 {
				t.moments = slices.Insert(t.moments, 0, moment{at: m.At, kind: Stored})
			}
		}
	}
}

// waits tells the story.
func (t *story) waits() []wait {
	for _, m := range t.moments {
		if t.happens(m) {
			return t.list
		}
	}
	t.end(t.End)
	return t.list
}

// happens goes on with the story, and reports whether it is at its end: the entry is settled.
func (t *story) happens(m moment) (over bool) {
	switch m.kind {
	case Stored:
		if t.latest == nil && t.now == nil && t.holder == (LifeID{}) {
			t.begin(m.at, m.at, whyStored, LifeID{})
		}
	case Delivered:
		t.delivered(m)
	case Started:
		if w, ok := t.end(m.at); ok {
			t.starvation.ended[m.run] = w
		}
		t.latest, t.running = m.run, append(t.running, m.run)
		t.saw(m.at, m.count)
	case Acked, Dead, Trimmed:
		t.end(m.at)
		return true
	case Nacked, Lost, Closed, Ended:
		t.running = slices.DeleteFunc(t.running, func(r *Run) bool { return r == m.run })
		if len(t.running) == 0 && t.latest == m.run && t.now == nil {
			t.failed(m)
		}
	}
	return false
}

func (t *story) saw(at time.Duration, count int64) { t.count, t.counted = count, at }

// delivered: from now on it is the holder who may start the entry.
func (t *story) delivered(m moment) {
	due, turn := m.at, m.at
	if w, ok := t.end(m.at); ok {
		due, turn = max(due, w.due), w.turn
	}
	t.saw(m.at, cmp.Or(m.count, t.count+1))
	t.holder = m.id
	if len(t.running) > 0 {
		return
	}
	t.begin(m.at, due, whyDelivered, m.id)
	t.now.turn = turn
}

// failed begins the wait after a run.
func (t *story) failed(m moment) {
	switch m.kind {
	case Nacked:
		t.begin(m.at, m.at+m.run.Delay, whyNacked, m.id)
	case Closed:
		t.begin(m.at, m.at, whyClosed, m.id)
	case Ended:
		t.begin(m.at, m.at, whyEnded, m.id)
	case Lost:
		if t.holder != (LifeID{}) && t.holder != m.id {
			t.begin(m.at, m.at, whyDelivered, t.holder)
			return
		}
		t.begin(m.at, m.at+t.Rules.takeover(), whyLost, LifeID{})
		t.now.settle = t.Rules.takeover()
	}
}

func (t *story) begin(at, due time.Duration, why string, holder LifeID) {
	t.now = &wait{
		Span: Span{From: at}, key: t.key, uuid: t.uuid, stored: t.stored, due: due, turn: due, why: why, holder: holder, fresh: t.latest == nil,
	}
}

// end ends the wait. It returns its last part: what became of its holder meanwhile may have changed when it was due.
func (t *story) end(at time.Duration) (last wait, ok bool) {
	if t.now == nil {
		return last, false
	}
	w := *t.now
	w.To, t.now = at, nil
	parts := t.fates(w)
	for _, part := range parts {
		part.suspect, part.last = t.suspicion(part)
		t.list = append(t.list, part)
	}
	return parts[len(parts)-1], true
}

// suspicion reports whether the entry's next delivery may be that of a suspect, and the last one before the limit.
func (t *story) suspicion(w wait) (suspect, last bool) {
	from, limit := t.Rules.suspects()
	if from == 0 || w.holder != (LifeID{}) && w.why == whyNacked {
		return false, false
	}
	next := t.count + 1
	if w.why == whyDelivered && w.holder != (LifeID{}) {
		next = t.count
	}
	if !t.exact { // whoever ended since may have had it, and not begun it
		for _, p := range t.consumers[t.key.topic] {
			if p.Over && p.To > t.counted && p.To <= w.To {
				next++
			}
		}
	}
	return next >= from, next >= limit
}

// fates cuts a wait where its holder closes, ends, or is away for so long that its lease is over.
func (t *story) fates(w wait) []wait {
	l := t.Lives[w.holder]
	if l == nil {
		return []wait{w}
	}
	rest := w
	rest.holder, rest.From = LifeID{}, w.To
	if l.Over && l.To < rest.From {
		rest.leave(max(l.To, w.From), t.Rules.takeover(), whyEnded)
	}
	if l.Closing != 0 && l.Closing < rest.From {
		t.closed(&rest, w, l)
	}
	back := w.To
	for _, away := range t.Away[w.holder.Process] {
		if away.Length() >= t.Rules.ClaimMinIdle && away.To > w.From && away.From < rest.From {
			rest.leave(max(away.From, w.From), t.Rules.takeover(), whyAway)
			back = min(away.To, w.To)
		}
	}
	var parts []wait
	if rest.From > w.From || rest.From == w.To {
		w := w
		w.To = rest.From
		parts = append(parts, w)
	}
	if rest.From == w.To {
		return parts
	}
	rest.To = back
	parts = append(parts, rest)
	if back < w.To { // if nobody has taken it, it is the holder's again
		w.From, w.settle = back, t.Rules.takeover()
		w.due = max(w.due, back+w.settle)
		parts = append(parts, t.fates(w)...)
	}
	return parts
}

// leave makes the wait one for anybody, from then on.
func (w *wait) leave(at, promised time.Duration, why string) {
	w.From, w.due, w.turn, w.settle, w.why = at, at+promised, at+promised, promised, why
}

// closed: what a process holds that closes in order, it gives back. What it does not give back in time, or reads meanwhile, is
// taken over.
func (t *story) closed(rest *wait, w wait, l *Life) {
	promised, why := t.Rules.handover(), whyClosed
	whole := []Span{{l.Closing, l.To}}
	disturbed := len(intersect(whole, merge(slices.Concat(t.unwell[w.key.topic], t.timeless[w.key.topic]), 0)))+len(intersect(whole, t.Away[w.holder.Process])) > 0
	if disturbed || l.Died != "" || l.Error != "" || l.Closing <= w.From && w.why != whyClosed || t.unheard(w, l) ||
		t.Rules.CloseBound > 0 && w.From > l.Closing+t.Rules.CloseTimeout { // its handler was left
		promised, why = t.Rules.takeover(), whyEnded
	}
	rest.leave(max(l.Closing, w.From), promised, why)
	rest.due = max(l.To, w.From) + promised
	rest.turn = rest.due
}

// unheard tells whether the reply that brought the entry may not have reached its holder, which closed before it can have
// asked for what it had missed.
func (t *story) unheard(w wait, l *Life) bool {
	return w.why == whyDelivered && slices.ContainsFunc(slices.Concat(t.unwell[w.key.topic], t.Away[w.holder.Process]), func(s Span) bool {
		return s.From <= w.From && l.Closing <= s.To+t.Recovery
	})
}
