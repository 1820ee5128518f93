package rules

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Progress is the rule that nothing starves: with a free slot and a healthy server every entry is started within the promised
// time, whatever the load.
//
// An entry waits from when it was stored, when its handler failed, or when its holder ended, was away or gave it back. It is due
// after the delay or the time that is promised for that. From then on it must not wait for longer than Bound while, all the time,
//
//   - no fault of the topic's server is under way, nor was until Recovery ago,
//   - one process that may take the entry is there: it consumes the topic, does not close, and neither is away nor was until
//     Recovery ago,
//   - that process has a free slot; if that is its only one, no other entry waits there for its retry,
//   - and it starts nothing that was due before.
//
// Only its holder may take an entry that is read ahead or waits for its retry; anybody, what nobody holds. Who holds what, the
// events Delivered say. Where evidence has none of them, any process may have an entry that was not started, so that none of them
// may be busy.
//
// A suspect (see suspectFrom) has SuspectBound, and waits for no longer than that since the last run of another suspect. While one
// may wait for its last delivery, or is in it, nothing else need be started: it runs alone.
//
// With ordering keys an entry waits for its turn, too: while another one of its key is handled, wherever that is, or waits, and is
// older or was handled before. That one is to be started in time, and whoever is first of its key waits for nobody.
//
// It is not stated of broken entries, of what Redis may have lost, and of what was handled to success and is delivered again. Where
// a topic is paused, a fault that Pauses says so.
type Progress struct {
	// Bound must cover what the network and hooks of the user's take, and the patience of a subscription that takes nothing new for
	// the sake of a suspect which another process has taken meanwhile (5 s, or ClaimMinIdle/6 if that is more).
	Bound time.Duration
	// SuspectBound must cover the longest handler: a suspect in its last delivery waits for those that run at its turn, or,
	// if they take too long, for its next turn.
	SuspectBound time.Duration
	// Recovery is what a process may need to find its way back after an absence of its own or of the server's, and to begin.
	Recovery time.Duration
}

// A consumer is a process that handles a topic.
type consumer struct {
	LifeID
	*Life
	from time.Duration // of its subscription
	runs []*Run        // of the topic, in the order of their beginnings
	busy []Span        // when it has no free slot
	// heads are when, in the only slot, an entry waits for its retry.
	heads []head
}

type head struct {
	Span
	key entryKey
}

// A laneKey is an ordering key of a topic.
type laneKey struct{ topic, key string }

// A hold is a time during which an entry is handled, or waits.
type hold struct {
	head
	fresh bool // it waits, and was never handled
}

// A wait is a time during which an entry is not handled.
type wait struct {
	Span
	key    entryKey
	uuid   string
	stored time.Duration
	due    time.Duration
	turn   time.Duration // when it was first due: that it was delivered meanwhile does not put it behind others
	why    string
	fresh  bool          // it was never started
	holder LifeID        // who alone may start it; none: anybody may
	settle time.Duration // how long somebody must be there before it is found

	suspect, last bool // it may be that, as far as the evidence tells
}

// A starvation is the evidence in the forms that the rule needs.
type starvation struct {
	*checker
	Progress
	exact     bool // there are Delivered events
	consumers map[string][]*consumer
	waits     []wait
	ended     map[*Run]wait // by the run that began at its end
	alone     map[string][]head
	lanes     map[laneKey][]hold
	unwell    map[string][]Span
	timeless  map[string][]Span // when its idle times may be wrong
	held      map[string][]Span // when it is paused
}

func (c *checker) progress() {
	if c.Rules.Progress == nil {
		return
	}
	s := &starvation{
		checker: c, Progress: *c.Rules.Progress, consumers: make(map[string][]*consumer),
		ended: make(map[*Run]wait), alone: make(map[string][]head), unwell: make(map[string][]Span), timeless: make(map[string][]Span), held: make(map[string][]Span),
	}
	s.exact = slices.ContainsFunc(c.Events, func(e Event) bool { return e.Kind == Delivered })
	s.indexConsumers()
	s.indexFaults()
	s.indexWaits()
	s.indexAlone()
	s.indexKeys()
	s.moved()
	told := make(map[entryKey]bool)
	for _, w := range s.waits {
		if !told[w.key] {
			told[w.key] = s.judge(w)
		}
	}
}

// indexConsumers finds who consumes which topic, and when it has no free slot.
func (s *starvation) indexConsumers() {
	type subscription struct {
		LifeID
		topic string
	}
	known := make(map[subscription]*consumer)
	for _, event := range s.Events {
		if event.Kind != Subscribed && event.Kind != Started && event.Kind != Delivered {
			continue
		}
		id := LifeID{event.Process, event.Life}
		key := subscription{id, event.Topic}
		if l := s.Lives[id]; l != nil && known[key] == nil {
			known[key] = &consumer{LifeID: id, Life: l, from: event.Mono}
			s.consumers[event.Topic] = append(s.consumers[event.Topic], known[key])
		}
	}
	for _, r := range s.Runs {
		if p := known[subscription{r.LifeID(), r.Start.Topic}]; p != nil {
			p.runs = append(p.runs, r)
		}
	}
	for key, p := range known {
		slots := s.Rules.Topics[key.topic].MaxConcurrency
		p.busy = full(p.runs, slots)
		for _, r := range p.runs {
			if slots == 1 && r.Ending == Nacked { // also of an entry of which no story is told, or no more
				p.heads = append(p.heads, head{Span{r.End, r.End + r.Delay}, r.key()})
			}
		}
	}
}

// full returns when as many runs as there are slots are under way.
func full(runs []*Run, slots int) []Span {
	type step struct {
		at    time.Duration
		delta int
	}
	var steps []step
	for _, r := range runs {
		steps = append(steps, step{r.Start.Mono, 1}, step{r.End, -1})
	}
	// What ends makes room for what begins at the same time.
	slices.SortStableFunc(steps, func(a, b step) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.delta, b.delta)) })
	var spans []Span
	running := 0
	for _, st := range steps {
		was := running >= slots
		running += st.delta
		switch is := running >= slots; {
		case is && !was:
			spans = append(spans, Span{st.at, forever})
		case was && !is:
			spans[len(spans)-1].To = st.at
		}
	}
	return spans
}

// indexFaults finds when each topic's server may not have been well, or not for all.
func (s *starvation) indexFaults() {
	for topic := range s.Rules.Topics {
		for _, f := range s.Faults {
			switch {
			case !f.ails(topic):
			case f.Pauses:
				s.held[topic] = append(s.held[topic], f.Span)
			case f.Idle:
				s.timeless[topic] = append(s.timeless[topic], f.Span)
			default:
				s.unwell[topic] = append(s.unwell[topic], f.Span)
			}
		}
	}
}

// indexWaits makes the waits of all entries.
func (s *starvation) indexWaits() {
	for _, story := range s.stories() {
		s.waits = append(s.waits, story.waits()...)
	}
	for _, w := range s.waits {
		if s.Rules.Topics[w.key.topic].MaxConcurrency != 1 || w.why != whyNacked {
			continue
		}
		for _, p := range s.consumers[w.key.topic] {
			if p.LifeID == w.holder {
				p.heads = append(p.heads, head{w.Span, w.key})
			}
		}
	}
}

// indexAlone finds when something may run alone, or wait for that.
func (s *starvation) indexAlone() {
	_, last := s.Rules.suspects()
	if last == 0 {
		return
	}
	for _, w := range s.waits {
		if w.last {
			s.alone[w.key.topic] = append(s.alone[w.key.topic], head{w.Span, w.key})
		}
	}
	for _, r := range s.Runs {
		if r.Start.Count >= last {
			s.alone[r.Start.Topic] = append(s.alone[r.Start.Topic], head{Span{r.Start.Mono, r.End}, r.key()})
		}
	}
}

// indexKeys finds when each ordering key may be held.
func (s *starvation) indexKeys() {
	s.lanes = make(map[laneKey][]hold)
	add := func(uuid string, h hold) {
		if lane := s.lane(h.key, uuid); lane.key != "" {
			s.lanes[lane] = append(s.lanes[lane], h)
		}
	}
	for _, w := range s.waits {
		add(w.uuid, hold{head{w.Span, w.key}, w.fresh})
	}
	for _, r := range s.Runs {
		add(r.Start.UUID, hold{head{Span{r.Start.Mono, r.End}, r.key()}, false})
	}
}

func (s *starvation) lane(key entryKey, uuid string) laneKey {
	return laneKey{key.topic, KeyOf(uuid, s.Rules.Topics[key.topic].Keys)}
}

// precede returns when others of its key come before the entry.
func (s *starvation) precede(w wait) []Span {
	var spans []Span
	for _, h := range s.lanes[s.lane(w.key, w.uuid)] {
		if h.key != w.key && (!h.fresh || CompareIDs(h.key.id, w.key.id) < 0) {
			spans = append(spans, h.Span)
		}
	}
	return spans
}

// judge reports whether the entry waits for too long.
func (s *starvation) judge(w wait) bool {
	bound := s.Bound
	if w.suspect {
		bound = s.SuspectBound
	}
	if w.To-w.due <= bound {
		return false // as nearly all do
	}
	unwell := slices.Concat(s.unwell[w.key.topic], s.held[w.key.topic])
	if w.holder == (LifeID{}) {
		unwell = slices.Concat(unwell, s.timeless[w.key.topic])
	}
	calm := without([]Span{{w.due, min(w.To, s.lossAfter(w))}}, extend(unwell, s.Recovery+w.settle))
	if !w.suspect {
		calm = without(calm, others(s.alone[w.key.topic], w.key))
	}
	calm = without(calm, s.precede(w))
	for _, p := range s.consumers[w.key.topic] {
		if w.holder != (LifeID{}) && w.holder != p.LifeID {
			continue
		}
		for _, span := range s.idle(p, w, calm) {
			if span.Length() > bound {
				s.violate(RuleProgress, w.key, w.uuid, "%s, and due since %v, it was not started from %v to %v, though Redis was well and %s had a free slot",
					w.why, s.at(w.due), s.at(span.From), s.at(span.To), p)
				return true
			}
		}
	}
	return false
}

// at returns a time since the beginning of the evidence.
func (s *starvation) at(t time.Duration) time.Duration { return t - s.Events[0].Mono }

func (p *consumer) String() string { return fmt.Sprintf("%s/%d", p.Process, p.Number) }

// lossAfter returns when Redis may have lost the entry, or what it knew of it. What happens to it then is not judged.
func (s *starvation) lossAfter(w wait) time.Duration {
	loss := forever
	for _, f := range s.Faults {
		if f.loses(w.key.topic) && f.To+late >= w.stored {
			loss = min(loss, f.From)
		}
	}
	return loss
}

// extend returns the spans with so much time at their ends.
func extend(spans []Span, more time.Duration) []Span {
	var longer []Span
	for _, s := range spans {
		longer = append(longer, Span{s.From, s.To + more})
	}
	return longer
}

func others(heads []head, key entryKey) []Span {
	var spans []Span
	for _, h := range heads {
		if h.key != key {
			spans = append(spans, h.Span)
		}
	}
	return spans
}

// idle returns when, in calm times, the process could have started the entry.
func (s *starvation) idle(p *consumer, w wait, calm []Span) []Span {
	idle := s.free(p, w, calm)
	if w.holder == (LifeID{}) && !s.exact {
		for _, other := range s.consumers[w.key.topic] {
			if other != p {
				idle = without(idle, without(s.mayHold(other), s.free(other, w, calm)))
			}
		}
	}
	from, _ := s.Rules.suspects()
	for _, r := range p.runs {
		if w.suspect && from > 0 && r.Start.Count >= from && r.key() != w.key {
			idle = without(idle, []Span{{r.Start.Mono, r.End}})
		}
		if s.before(r, w) {
			idle = split(idle, r.Start.Mono)
		}
	}
	return idle
}

// free returns when the process is there and has a free slot.
func (s *starvation) free(p *consumer, w wait, calm []Span) []Span {
	end := p.To
	if p.Closing != 0 {
		end = min(end, p.Closing)
	}
	there := intersect(calm, []Span{{p.from + s.Recovery + w.settle, end}})
	there = without(there, extend(s.Away[p.Process], s.Recovery+w.settle))
	return without(without(there, p.busy), others(p.heads, w.key))
}

// mayHold returns when the process may have read the entry ahead: while it lives, and then until others must have taken it.
func (s *starvation) mayHold(p *consumer) []Span {
	hold := []Span{{p.From, forever}}
	if p.Over {
		hold[0].To = p.To + s.Rules.takeover()
	}
	for _, away := range s.Away[p.Process] {
		if gone := (Span{away.From + s.Rules.takeover(), away.To}); gone.From < gone.To {
			hold = without(hold, []Span{gone})
		}
	}
	return hold
}

// before reports whether the run was to be started before the entry: the process works its way to it.
func (s *starvation) before(r *Run, w wait) bool {
	other, ok := s.ended[r]
	if !ok && w.suspect && r.Start.Count == 1 { // it began before anybody saw it wait
		return r.Start.Mono <= w.turn
	}
	return !ok || other.turn <= w.turn || other.fresh && w.fresh && CompareIDs(other.key.id, w.key.id) < 0
}

// split ends a span at the time, and begins another one.
func split(spans []Span, at time.Duration) []Span {
	for i, s := range spans {
		if s.From < at && at < s.To {
			return slices.Concat(spans[:i], []Span{{s.From, at}, {at, s.To}}, spans[i+1:])
		}
	}
	return spans
}
