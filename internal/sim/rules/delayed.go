package rules

import (
	"slices"
	"time"
)

// Delayed is what is promised of delayed messages. Those that are due and that somebody could move into the stream, must not wait
// for longer than Bound while, all the time,
//
//   - no fault of the topic's server is under way, nor was until Progress.Recovery ago,
//   - one process is there that consumes the topic, as Progress has it. Whether it has a free slot makes no difference.
//
// That is stated where Progress is. What else the rules know of delayed messages is always stated: none is in the stream before it is
// due, by the server's clock as the events Clocked tell it; what was cancelled never is; and what was not found had been moved.
type Delayed struct {
	// Bound must cover the time between two looks (1 s), and how late an event Stored is.
	Bound time.Duration
	// Punctual is how late a message may be of which a process that is there has known for a second and a half. That process is to have
	// a timer. 0: it is not stated.
	Punctual time.Duration
	// Tolerance is how far the server's clock may be from what the events Clocked say.
	Tolerance time.Duration
	// Denied is, instead of Recovery, how long after a fault that Denies nobody may look.
	Denied time.Duration
}

// A Change is one call of Schedule's Cancel or Reschedule.
type Change struct {
	From, At time.Duration // its beginning and its end; At is the end of the evidence for one that never ended
	Outcome  Kind          // Changed, NotFound or Unsure
	Due      time.Duration // of Reschedule: by the server's clock, since 1970; 0: it is a Cancel
}

// happened reports whether the change may have been made. Reschedule repeats what got no answer: by then the message may have been
// due, and moved.
func (c *Change) happened() bool { return c.Outcome != NotFound || c.Due != 0 }

// cancelled reports whether the message may have been cancelled by that time.
func (m *Message) cancelled(by time.Duration) bool {
	return slices.ContainsFunc(m.Changes, func(c *Change) bool { return c.Due == 0 && c.happened() && c.From <= by })
}

// A tick is the server's clock from some time on: it shows Mono and the offset.
type tick struct {
	Span
	offset time.Duration
}

// A clock is the server's.
type clock []tick

func (e *Evidence) siftClock() {
	for _, event := range e.Events {
		if event.Kind != Clocked {
			continue
		}
		from := event.Mono
		if n := len(e.clock); n > 0 {
			e.clock[n-1].To = from
		} else {
			from = -forever // it was there before it was asked
		}
		e.clock = append(e.clock, tick{Span{from, forever}, event.Clock})
	}
}

// offsets returns the least and the greatest offset in that time, which includes its ends.
func (c clock) offsets(from, to time.Duration) (least, most time.Duration) {
	least, most = forever, -forever
	for _, t := range c {
		if t.From <= to && t.To >= from {
			least, most = min(least, t.offset), max(most, t.offset)
		}
	}
	return least, most
}

// latest returns the greatest time that the clock may have shown until then.
func (c clock) latest(until time.Duration) time.Duration {
	latest := -forever
	for _, t := range c {
		if t.From <= until {
			latest = max(latest, min(t.To, until)+t.offset)
		}
	}
	return latest
}

// since returns when the clock shows that time or a later one.
func (c clock) since(at time.Duration) []Span {
	var spans []Span
	for _, t := range c {
		if s := (Span{max(t.From, at-t.offset), t.To}); s.From < s.To {
			spans = append(spans, s)
		}
	}
	return merge(spans, time.Nanosecond)
}

func (e *Evidence) siftChanges() {
	type number struct {
		LifeID
		run int64
	}
	open := make(map[number]*Change)
	for _, event := range e.Events {
		key := number{LifeID{event.Process, event.Life}, event.Run}
		switch event.Kind {
		case Changing:
			m := e.Messages[event.UUID]
			if m == nil { // it was not published yet: there was nothing to change
				continue
			}
			open[key] = &Change{From: event.Mono, At: e.End, Outcome: Unsure, Due: time.Duration(event.Due) * time.Millisecond}
			m.Changes = append(m.Changes, open[key])
		case Changed, NotFound, Unsure:
			if c := open[key]; c != nil {
				c.Outcome = event.Kind
				if c.At = event.Mono; c.Outcome == Unsure {
					c.At = e.End // it may yet arrive
				}
			}
		}
	}
}

// An appearance is an entry of a delayed message.
type appearance struct {
	entryKey
	seen time.Duration // at the latest
}

// added returns the time that is in the entry's ID. The server's clock had shown it by then.
func (a appearance) added() time.Duration {
	ms, _ := splitID(a.id)
	return time.Duration(ms) * time.Millisecond
}

// appearances returns all entries that there ever were of delayed messages, as far as the evidence tells, by UUID.
func (c *checker) appearances() map[string][]appearance {
	all := make(map[string][]appearance)
	add := func(key entryKey, uuid string, seen time.Duration) {
		if m := c.Messages[uuid]; m == nil || m.Delay == 0 || m.Topic != key.topic {
			return
		}
		if !slices.ContainsFunc(all[uuid], func(a appearance) bool { return a.entryKey == key }) {
			all[uuid] = append(all[uuid], appearance{key, seen})
		}
	}
	for _, e := range c.Events { // in the order of time
		if e.Kind == Stored || e.Kind == Started || e.Kind == Dead || e.Kind == Trimmed {
			add(entryKey{e.Topic, e.ID}, e.UUID, e.Mono)
		}
	}
	for _, topic := range c.topicNames() {
		for _, letter := range c.Final[topic].Dead { // it may have been deleted when it was moved
			add(entryKey{topic, letter.EntryID}, letter.UUID, letter.At)
		}
		for _, e := range c.Final[topic].Entries {
			add(entryKey{topic, e.ID}, e.UUID, c.End)
		}
	}
	return all
}

// relapsed reports whether Redis may have forgotten, between the two times, what it had done with a topic's delayed messages, so
// that it did something once more. What it lost as a whole does not come again.
func (c *checker) relapsed(topic string, from, to time.Duration) bool {
	return slices.ContainsFunc(c.Faults, func(w *Window) bool {
		return w.loses(topic) && !w.Group && !w.Destroys && w.From <= to && w.To+late >= from
	})
}

// dues returns by the server's clock the least and the greatest time when the message may be due, as things were at that time.
func (c *checker) dues(m *Message, at time.Duration) (least, most time.Duration) {
	type due struct{ from, to, least, most time.Duration }
	called := due{from: m.From, to: m.At}
	if m.Outcome == Unknown {
		called.to = max(at, m.From)
	}
	low, high := c.clock.offsets(called.from, called.to)
	called.least, called.most = called.from+low+m.Delay, called.to+high+m.Delay+2*time.Millisecond // which are rounded up
	all := []due{called}
	for _, change := range m.Changes {
		if change.Due != 0 && change.happened() && change.From <= at {
			all = append(all, due{change.From, change.At, change.Due, change.Due})
		}
	}
	// What was surely done before a change that surely was made counts no more.
	var last time.Duration
	for _, change := range m.Changes {
		if change.Due != 0 && change.Outcome == Changed && change.From <= at && !c.relapsed(m.Topic, m.From, at) {
			last = max(last, change.From)
		}
	}
	least, most = forever, -forever
	for _, d := range all {
		if d.to >= last {
			least, most = min(least, d.least), max(most, d.most)
		}
	}
	return least, most
}

// delayed judges delayed messages: when they are in the stream, and what became of calls that change that.
func (c *checker) delayed() {
	all := c.appearances()
	for _, m := range c.sortedMessages() {
		if m.Delay == 0 {
			continue
		}
		c.verdict.Delayed++
		for _, a := range all[m.UUID] {
			c.early(m, a)
		}
		for _, change := range m.Changes {
			switch {
			case change.Outcome == NotFound:
				c.found(m, change, all[m.UUID])
			case change.Outcome == Changed && change.Due == 0:
				c.verdict.Cancelled++
				c.cancelled(m, change, all[m.UUID])
			case change.Outcome == Changed:
				c.verdict.Rescheduled++
			}
		}
	}
	for _, topic := range c.topicNames() {
		for _, uuid := range c.Final[topic].Waiting {
			c.violate(RuleWaiting, entryKey{topic: topic}, uuid, "it is due, and nobody moves it into the stream")
		}
	}
}

// tolerance is how much earlier than by the events a message may be due. What is published again, later than a second after the
// first call, is due by its metadata, which have whole seconds.
func (c *checker) tolerance(m *Message) (d time.Duration) {
	if c.Rules.Delayed != nil {
		d = c.Rules.Delayed.Tolerance
	}
	if m.Last > m.From {
		d += time.Second
	}
	return d
}

// early: a delayed message is not in the stream before it is due by the server's clock. That somebody set the clock forward is no
// breach: then it is due.
func (c *checker) early(m *Message, a appearance) {
	if len(c.clock) == 0 {
		return
	}
	least, _ := c.dues(m, a.seen)
	tolerance := c.tolerance(m)
	if added := min(a.added(), c.clock.latest(a.seen)); added+tolerance < least {
		c.violate(RuleEarly, a.entryKey, m.UUID, "it was in the stream %v before it was due, %v after the call that delayed it for %v",
			least-added, a.seen-m.From, m.Delay)
	}
}

// cancelled: what was cancelled is never in the stream, unless Redis forgot that, or it was published once more.
func (c *checker) cancelled(m *Message, change *Change, all []appearance) {
	for _, a := range all {
		if m.Last > change.From || c.relapsed(m.Topic, min(a.seen, change.From), max(a.seen, change.At)) {
			continue
		}
		c.violate(RuleCancelled, a.entryKey, m.UUID, "it is in the stream, though Cancel returned nil at %v", change.At)
	}
}

// found: what is not found has been moved, or was cancelled, unless Redis lost it.
func (c *checker) found(m *Message, change *Change, all []appearance) {
	lost := slices.ContainsFunc(c.Faults, func(w *Window) bool {
		return w.loses(m.Topic) && !w.Group && w.From <= change.At && w.To+late >= m.From
	})
	if len(c.clock) == 0 || m.Outcome != Published || m.At > change.From || lost || m.cancelled(change.At) {
		return
	}
	key, now, tolerance := entryKey{topic: m.Topic}, c.clock.latest(change.At), c.tolerance(m)
	if least, _ := c.dues(m, change.At); now+tolerance < least {
		c.violate(RuleNotFound, key, m.UUID, "at %v it was not found, %v before it was due", change.At, least-now)
		return
	}
	for _, a := range all {
		if a.added() > now+tolerance {
			c.violate(RuleNotFound, a.entryKey, m.UUID, "at %v it was not found, %v before it was moved into the stream", change.At, a.added()-now)
		}
	}
}

// moved judges whether messages that are due are moved in time.
func (s *starvation) moved() {
	if s.Rules.Delayed == nil || len(s.clock) == 0 {
		return
	}
	all := s.appearances()
	for _, m := range s.sortedMessages() {
		if m.Delay == 0 || m.Outcome != Published || m.cancelled(forever) {
			continue
		}
		from, to := m.At, s.End
		for _, change := range m.Changes {
			if change.happened() {
				from = max(from, change.At)
			}
		}
		for _, a := range all[m.UUID] {
			if s.punctual(m, from, a); a.seen < to {
				to = a.seen
			}
		}
		for _, f := range s.Faults {
			if f.loses(m.Topic) && !f.Group && f.To+late >= m.From {
				to = min(to, f.From)
			}
		}
		s.inTime(m, from, to)
	}
}

// inTime judges the message from the end of the last call about it until it is in the stream.
func (s *starvation) inTime(m *Message, from, to time.Duration) {
	_, due := s.dues(m, from)
	waits := intersect(s.clock.since(due), []Span{{from, to}})
	if !slices.ContainsFunc(waits, func(w Span) bool { return w.Length() > s.Rules.Delayed.Bound }) {
		return // as nearly all do
	}
	waits = s.calm(m, waits)
	for _, p := range s.consumers[m.Topic] {
		for _, w := range intersect(waits, s.there(p)) {
			if w.Length() > s.Rules.Delayed.Bound {
				s.violate(RuleMoved, entryKey{topic: m.Topic}, m.UUID, "it was due, and not in the stream from %v to %v, though Redis was well and %s was there",
					s.at(w.From), s.at(w.To), p)
				return
			}
		}
	}
}

// known is how long before it is due a message must be there, so that those who look once a second have seen it.
const known = 3 * time.Second / 2

// punctual judges by its ID when the message was moved. That is its time only where the clock was never set back.
func (s *starvation) punctual(m *Message, from time.Duration, a appearance) {
	_, due := s.dues(m, from)
	at := s.clock.at(a.seen)
	if s.Rules.Delayed.Punctual == 0 || a.added()-due <= s.Rules.Delayed.Punctual || at == nil {
		return
	}
	wait := Span{due - at.offset - known, a.added() - at.offset}
	if wait.From < max(from, at.From) || wait.To > a.seen || s.relapsed(m.Topic, m.From, a.seen) {
		return
	}
	for _, p := range s.consumers[m.Topic] {
		if slices.Contains(intersect(s.calm(m, []Span{wait}), s.there(p)), wait) {
			s.violate(RuleMoved, a.entryKey, m.UUID, "it was moved %v after it was due, though Redis was well, and %s had known of it for long", a.added()-due, p)
			return
		}
	}
}

// at returns what the clock shows then, if it was never set back before.
func (c clock) at(t time.Duration) *tick {
	for i := range c {
		if i > 0 && c[i].offset < c[i-1].offset {
			break
		}
		if c[i].From <= t && t < c[i].To {
			return &c[i]
		}
	}
	return nil
}

// calm returns when the message's server was well, and gave the permissions to move it.
func (s *starvation) calm(m *Message, spans []Span) []Span {
	spans = without(spans, extend(s.unwell[m.Topic], s.Recovery))
	for _, f := range s.Faults {
		if f.Denies {
			spans = without(spans, []Span{{f.From, f.To + max(s.Recovery, s.Rules.Delayed.Denied)}})
		}
	}
	return spans
}

// there returns when the process moves messages, if there are any that are due.
func (s *starvation) there(p *consumer) []Span {
	end := p.To
	if p.Closing != 0 {
		end = min(end, p.Closing)
	}
	return without([]Span{{p.from + s.Recovery, end}}, extend(s.Away[p.Process], s.Recovery))
}

// sameCall compares what is stored of a call in which messages are delayed. Those that are not are stored at once, in their order;
// the others later, if nobody cancels them.
func (c *checker) sameCall(first *Message) {
	if slices.ContainsFunc(c.Faults, func(w *Window) bool {
		return w.loses(first.Topic) && !w.Group && w.Destroys && w.To >= first.From
	}) {
		return // what had been moved is gone, and what waited may be there
	}
	var ids, missing []string
	stored := 0
	for _, uuid := range first.Batch {
		m, places := c.Messages[uuid], c.stored[uuid]
		switch {
		case len(places) == 0 && !m.cancelled(forever) && !slices.Contains(c.Final[m.Topic].Waiting, uuid):
			missing = append(missing, uuid)
		case len(places) > 0:
			if stored++; m.Delay == 0 {
				ids = append(ids, places[0].id)
			}
		}
	}
	key := entryKey{topic: first.Topic}
	if stored > 0 && len(missing) > 0 {
		c.violate(RuleTorn, key, first.UUID, "of a call some messages are stored, and %v are not", missing)
	}
	if !slices.IsSortedFunc(ids, CompareIDs) {
		c.violate(RuleTorn, key, first.UUID, "the messages of one call are stored in another order: %v", ids)
	}
}

// delayedCall reports whether the message's call has delayed ones.
func (c *checker) delayedCall(m *Message) bool {
	return slices.ContainsFunc(m.Batch, func(uuid string) bool { return c.Messages[uuid].Delay > 0 })
}

// spared reports whether a fault that lost only the stream cannot have lost the message, which waited beside it.
func (c *checker) spared(m *Message, w *Window) bool {
	if m.Delay == 0 || !w.Stream || len(c.clock) == 0 {
		return false
	}
	least, _ := c.dues(m, w.To)
	return c.clock.latest(w.To)+c.tolerance(m) < least
}
