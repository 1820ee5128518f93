package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// The rules. None may be broken where Redis kept what it acknowledged.
const (
	ruleLost        = "lost"            // stored and kept by Redis, and neither handled nor dead
	ruleVanished    = "vanished"        // acknowledged and not stored, though no fault made Redis lose anything
	rulePending     = "left pending"    // nobody finished it
	ruleOverlap     = "handled at once" // by two holders whose leases were both good
	ruleOrder       = "out of order"    // first deliveries of a topic with MaxConcurrency 1
	ruleRetryOrder  = "overtaken"       // a nacked message comes again before its successors
	ruleConcurrency = "too many at once"
	ruleLimit       = "past the limit" // handled more often than MaxRetries allows
	ruleDeadTwice   = "dead twice"
	ruleInnocent    = "innocent dead"
	ruleImmortal    = "doomed not dead"
	ruleStoredTwice = "stored twice" // by one call of Publish, or by its repetitions
	ruleRefused     = "refused, but stored"
	ruleTorn        = "torn batch"
	ruleSuspect     = "suspect not alone" // who may have crashed two processes, beside another such; or in its last delivery, beside anything
	ruleHandled     = "broken, but handled"
	ruleDied        = "process died" // by itself
)

// A Violation is one breach of a rule.
type Violation struct {
	Rule            string
	Topic, ID, UUID string
	Process         string // where it is about one and no entry
	Words           string
}

func (v Violation) String() string {
	return fmt.Sprintf("%s: %s%s %s %s: %s", v.Rule, v.Topic, v.Process, v.ID, v.UUID, v.Words)
}

// A Loss is a message that Redis acknowledged and did not keep, or whose delivery it forgot while the holder was dead. It was
// not handled.
type Loss struct {
	UUID, Topic string
	Fault       *Window
}

// A Duplicate is a success of a message that had been handled to success before.
type Duplicate struct {
	UUID string
	At   time.Duration
}

// A Verdict is what the evidence comes to.
type Verdict struct {
	Violations  []Violation
	LostByRedis []Loss
	Duplicates  []Duplicate

	Published, Unknown, Refused int // messages, by what Publish said in the end
	Repeated                    int // of the published, those that more than one call was made for
	Handled, Dead               int // of them
	// ExcusedOverlaps are runs at the same time where one holder was away for ClaimMinIdle, or Redis had lost the first
	// one's lease.
	ExcusedOverlaps int
	// Victims are dead, though innocent: in each delivery that they had by themselves, something else ended the process.
	Victims int
	Crashes int // of processes, by messages that do that
}

// A checker has the evidence in the forms that the rules need.
type checker struct {
	*Evidence
	verdict Verdict
	entries map[entryKey][]*Run
	stored  map[string][]entryKey // by UUID: more than one is too many
	handled map[string][]*Run     // by UUID: the runs that succeeded
	dead    map[entryKey]bool
}

// check is a pure function: the same evidence comes to the same verdict.
func check(e *Evidence) Verdict {
	c := &checker{
		Evidence: e, entries: e.byEntry(), dead: make(map[entryKey]bool),
		stored: make(map[string][]entryKey), handled: make(map[string][]*Run),
	}
	c.index()
	c.count()
	c.published()
	c.settled()
	c.alone()
	c.ordered()
	c.concurrency()
	c.limits()
	c.deaths()
	c.suspects()
	c.alive()
	return c.verdict
}

func (c *checker) index() {
	for topic, state := range c.Final {
		for _, entry := range state.Entries {
			c.stored[entry.UUID] = append(c.stored[entry.UUID], entryKey{topic, entry.ID})
		}
		for _, letter := range state.Dead {
			c.dead[entryKey{topic, letter.EntryID}] = true
		}
	}
	for _, event := range c.Events {
		if event.Kind == Dead {
			c.dead[entryKey{event.Topic, event.ID}] = true
		}
	}
	for _, r := range c.Runs {
		if r.Ending == Acked {
			c.handled[r.Start.UUID] = append(c.handled[r.Start.UUID], r)
		}
	}
}

func (c *checker) violate(rule string, key entryKey, uuid, format string, args ...any) {
	c.verdict.Violations = append(c.verdict.Violations, Violation{
		Rule: rule, Topic: key.topic, ID: key.id, UUID: uuid, Words: fmt.Sprintf(format, args...),
	})
}

func (c *checker) count() {
	for _, m := range c.Messages {
		switch m.Outcome {
		case Published:
			c.verdict.Published++
			if m.Last > m.From {
				c.verdict.Repeated++
			}
		case Unknown:
			c.verdict.Unknown++
		case Refused:
			c.verdict.Refused++
		}
	}
	c.verdict.Handled, c.verdict.Dead = len(c.handled), len(c.dead)
	for uuid, runs := range c.handled {
		for _, again := range runs[1:] {
			c.verdict.Duplicates = append(c.verdict.Duplicates, Duplicate{uuid, again.End})
		}
	}
	slices.SortFunc(c.verdict.Duplicates, func(a, b Duplicate) int { return cmp.Compare(a.At, b.At) })
}

// published compares what Publish said with what Redis has.
func (c *checker) published() {
	for _, m := range c.sortedMessages() {
		places := c.stored[m.UUID]
		switch {
		case len(places) > 1:
			c.violate(ruleStoredTwice, places[0], m.UUID, "it is in the stream %d times: %v", len(places), places)
		case len(places) == 1 && m.Outcome == Refused:
			c.violate(ruleRefused, places[0], m.UUID, "Publish said that nothing is stored")
		case len(places) == 0 && m.Outcome == Published:
			c.missing(m)
		}
		if m.UUID == m.Batch[0] {
			c.whole(m)
		}
	}
}

func (c *checker) sortedMessages() []*Message {
	var messages []*Message
	for _, m := range c.Messages {
		messages = append(messages, m)
	}
	slices.SortFunc(messages, func(a, b *Message) int { return cmp.Or(cmp.Compare(a.At, b.At), cmp.Compare(a.UUID, b.UUID)) })
	return messages
}

// late is how long after a fault's end Redis may still lose what it acknowledged until then: a former master that comes back
// has taken writes, and forgets them when it learns what it is. As long before its beginning a write may be on its way to the
// disk, or to the replica.
const late = 10 * time.Second

// missing: Redis acknowledged the message and does not have it. Whose doing that is, the log of faults says.
func (c *checker) missing(m *Message) {
	culprit := c.culprit(m)
	switch {
	case culprit == nil:
		c.violate(ruleVanished, entryKey{topic: m.Topic}, m.UUID, "Publish returned nil, and Redis does not have it; no fault made Redis lose it")
	case len(c.handled[m.UUID]) == 0 && !c.diedBefore(m.UUID):
		c.verdict.LostByRedis = append(c.verdict.LostByRedis, Loss{m.UUID, m.Topic, culprit})
	}
}

// culprit returns the fault that made Redis lose the message: of those that may have and one that surely has, the latter.
func (c *checker) culprit(m *Message) (culprit *Window) {
	for _, w := range c.Faults {
		switch {
		case !w.losesOf(m.Topic) || w.Group:
		case w.Destroys && w.To >= m.Last: // what it destroyed before, the last call would have stored again
			return w
		case !w.Destroys && culprit == nil && w.From-late <= m.At && m.Last <= w.To+late:
			culprit = w
		}
	}
	return culprit
}

// diedBefore tells whether the message was moved to the dead-letter stream at some time.
func (c *checker) diedBefore(uuid string) bool {
	return slices.ContainsFunc(c.Events, func(e Event) bool { return e.Kind == Dead && e.UUID == uuid })
}

// whole: a call of Publish stores all of its messages in their order, or none. Redis writes and replicates a transaction as one,
// so faults are no excuse.
func (c *checker) whole(first *Message) {
	var ids []string
	for _, uuid := range first.Batch {
		if places := c.stored[uuid]; len(places) > 0 {
			ids = append(ids, places[0].id)
		}
	}
	key := entryKey{topic: first.Topic}
	if len(ids) != 0 && len(ids) != len(first.Batch) {
		c.violate(ruleTorn, key, first.UUID, "%d of %d messages of one call are stored", len(ids), len(first.Batch))
	}
	if !slices.IsSortedFunc(ids, compareIDs) {
		c.violate(ruleTorn, key, first.UUID, "the messages of one call are stored in another order: %v", ids)
	}
}

// settled: in the end everything that Redis kept is handled or dead, and nothing is pending.
func (c *checker) settled() {
	for _, topic := range c.topicNames() {
		state := c.Final[topic]
		pending := make(map[string]bool)
		for _, p := range state.Pending {
			pending[p.ID] = true
			c.violate(rulePending, entryKey{topic, p.ID}, "", "with %s, delivered %d times", p.Consumer, p.Count)
		}
		for _, entry := range state.Entries {
			key := entryKey{topic, entry.ID}
			if pending[entry.ID] || c.dead[key] || c.succeeded(key) {
				continue
			}
			if w := c.forgotten(key); w != nil {
				c.verdict.LostByRedis = append(c.verdict.LostByRedis, Loss{entry.UUID, topic, w})
				continue
			}
			rule := ruleLost
			if doomed(entry.UUID) && (natureOf(entry.UUID) == broken || len(c.entries[key]) > 0) {
				rule = ruleImmortal
			}
			c.violate(rule, key, entry.UUID, "it is in the stream, was handled %d times, never to success, and is not dead", len(c.entries[key]))
		}
	}
}

func (c *checker) topicNames() []string {
	var all []string
	for topic := range c.Final {
		all = append(all, topic)
	}
	slices.Sort(all)
	return all
}

func (c *checker) succeeded(key entryKey) bool {
	return slices.ContainsFunc(c.entries[key], func(r *Run) bool { return r.Ending == Acked })
}

// forgotten returns the loss of the group by which Redis forgot that the entry was delivered to a holder who was dead or away,
// and so could not put it back.
func (c *checker) forgotten(key entryKey) *Window {
	for _, w := range c.Faults {
		if !w.Group || !w.losesOf(key.topic) {
			continue
		}
		holder, seen := c.lastHolder(key, w.From)
		switch {
		case w.Held[key.id] == "released":
			return w // nobody's
		case seen && c.absent(holder, w.From):
			return w
		case !seen && w.Held[key.id] != "" && c.someAbsent(w.From):
			return w // read ahead by somebody who did not come to start it
		}
	}
	return nil
}

func (c *checker) lastHolder(key entryKey, before time.Duration) (holder life, seen bool) {
	for _, r := range c.entries[key] {
		if r.Start.Mono < before {
			holder, seen = r.life(), true
		}
	}
	return holder, seen
}

func (c *checker) absent(holder life, at time.Duration) bool {
	l := c.Lives[holder]
	return l.To <= at || l.Closing != 0 && l.Closing <= at || c.awayAt(holder.process, at)
}

func (c *checker) awayAt(process string, at time.Duration) bool {
	return slices.ContainsFunc(c.Away[process], func(s Span) bool {
		return s.length() >= c.Rules.ClaimMinIdle && s.From <= at && at <= s.To
	})
}

// someAbsent tells whether a process had died, or was away, so recently that what it held may not have been taken over yet.
func (c *checker) someAbsent(at time.Duration) bool {
	for key, l := range c.Lives {
		recent := l.To <= at && at-l.To < 10*c.Rules.ClaimMinIdle
		if recent || c.awayAt(key.process, at) {
			return true
		}
	}
	return false
}

// alone: no two handlers have an entry at the same time, as long as the first one's lease is good. It is not for a holder who
// was away for ClaimMinIdle, from then until it notices, nor for one whose lease Redis itself has lost. That Redis answers
// nobody is no excuse.
func (c *checker) alone() {
	for _, key := range c.sortedEntries() {
		runs := c.entries[key]
		for i, first := range runs {
			for _, second := range runs[i+1:] {
				if second.Start.Mono >= first.End {
					continue
				}
				if c.leaseEnd(first) <= second.Start.Mono || c.leaseEnd(second) <= second.Start.Mono || c.lostSince(first, second) {
					c.verdict.ExcusedOverlaps++
					continue
				}
				c.violate(ruleOverlap, key, first.Start.UUID, "by %s (run %d) until %v and by %s (run %d) from %v on",
					first.Start.Process, first.Start.Run, first.End, second.Start.Process, second.Start.Run, second.Start.Mono)
			}
		}
	}
}

func (c *checker) sortedEntries() []entryKey {
	var keys []entryKey
	for key := range c.entries {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b entryKey) int { return cmp.Or(cmp.Compare(a.topic, b.topic), compareIDs(a.id, b.id)) })
	return keys
}

// leaseEnd returns until when the run had a good lease. What was read ahead may still be started right after an absence; it
// takes until the next renewal for the holder to notice that it lost it: then the lease was never good.
func (c *checker) leaseEnd(r *Run) time.Duration {
	for _, s := range c.Away[r.Start.Process] {
		if s.length() >= c.Rules.ClaimMinIdle && r.Start.Mono <= s.To+c.Rules.ClaimMinIdle && r.End >= s.From {
			return max(s.From, 0)
		}
	}
	return r.End
}

// lostSince tells whether Redis may have lost the first run's lease before the second began.
func (c *checker) lostSince(first, second *Run) bool {
	for _, w := range c.Faults {
		if w.losesOf(first.Start.Topic) && w.From <= second.Start.Mono && w.To+late >= first.Start.Mono {
			return true
		}
	}
	return false
}

// compareIDs orders entry IDs as Redis does.
func compareIDs(a, b string) int {
	ams, aseq := splitID(a)
	bms, bseq := splitID(b)
	return cmp.Or(cmp.Compare(ams, bms), cmp.Compare(aseq, bseq))
}

func splitID(id string) (ms, seq uint64) {
	// An ID without a sequence number, or none at all, leaves zeros.
	_, _ = fmt.Sscanf(id, "%d-%d", &ms, &seq)
	return ms, seq
}

// ordered: on a topic with MaxConcurrency 1 the first deliveries to each subscription ascend, and what failed comes again
// before its successors.
func (c *checker) ordered() {
	type subscription struct {
		life
		topic, consumer string
	}
	runs := make(map[subscription][]*Run)
	for _, r := range c.Runs {
		if topic := c.Rules.Topics[r.Start.Topic]; topic.MaxConcurrency == 1 {
			s := subscription{r.life(), topic.Name, r.Start.Consumer}
			runs[s] = append(runs[s], r)
		}
	}
	for _, all := range runs {
		c.ascending(all)
		c.notOvertaken(all)
	}
}

func (c *checker) ascending(runs []*Run) {
	var last *Run
	for _, r := range runs {
		if r.Start.Count != 1 {
			continue
		}
		if last != nil && compareIDs(r.Start.ID, last.Start.ID) < 0 && !c.mayComeLate(last, r) {
			c.violate(ruleOrder, r.key(), r.Start.UUID, "%s got it after its successor %s", r.Start.Process, last.Start.ID)
		}
		if last == nil || compareIDs(r.Start.ID, last.Start.ID) > 0 {
			last = r
		}
	}
}

// mayComeLate tells whether r's entry may come after its successor and still be delivered for the first time by its count:
// because it was given back by a process that closed (which does not count), because Redis lost the group's position, or because
// the reply that brought it was lost on its way to somebody who did not handle it.
func (c *checker) mayComeLate(successor, r *Run) bool {
	for _, l := range c.Lives {
		if l.Closing != 0 && l.Closing <= r.Start.Mono && c.addedBefore(r, l.To) {
			return true
		}
	}
	for _, w := range c.Faults {
		if w.From > r.Start.Mono {
			continue
		}
		if w.losesOf(r.Start.Topic) && w.To+late >= successor.Start.Mono {
			return true
		}
		// What is delivered to a name of its own, the process looks for before it reads on.
		if w.Breaks && c.Rules.Topics[r.Start.Topic].Named && c.addedBefore(r, w.To) {
			return true
		}
	}
	return slices.ContainsFunc(c.entries[r.key()], func(other *Run) bool { return other.Ending == Closed && other.Start.Mono < r.Start.Mono })
}

func (c *checker) addedBefore(r *Run, at time.Duration) bool {
	m, ok := c.Messages[r.Start.UUID]
	return ok && m.From <= at
}

// notOvertaken: after a nack nothing new is delivered to the subscription before the message itself.
func (c *checker) notOvertaken(runs []*Run) {
	for i, nacked := range runs {
		if nacked.Ending != Nacked {
			continue
		}
		again := slices.IndexFunc(runs[i+1:], func(r *Run) bool { return r.Start.ID == nacked.Start.ID })
		if again <= 0 {
			continue // at once, or not here: it is dead, or its lease was lost
		}
		for _, between := range runs[i+1 : i+1+again] {
			if between.Start.Count == 1 && compareIDs(between.Start.ID, nacked.Start.ID) > 0 && !c.lostSince(nacked, between) &&
				!c.wasAway(nacked, between.Start.Mono) {
				c.violate(ruleRetryOrder, nacked.key(), nacked.Start.UUID, "%s got %s between a failure and its retry",
					nacked.Start.Process, between.Start.ID)
			}
		}
	}
}

// wasAway tells whether the run's process may have lost its lease between the run and that time.
func (c *checker) wasAway(r *Run, until time.Duration) bool {
	return slices.ContainsFunc(c.Away[r.Start.Process], func(s Span) bool {
		return s.length() >= c.Rules.ClaimMinIdle && s.From <= until && s.To >= r.Start.Mono
	})
}

// concurrency: a subscription has MaxConcurrency messages out at most.
func (c *checker) concurrency() {
	type subscription struct {
		life
		topic string
	}
	out := make(map[subscription][]*Run)
	for _, r := range c.Runs {
		key := subscription{r.life(), r.Start.Topic}
		running := slices.DeleteFunc(out[key], func(o *Run) bool { return o.End <= r.Start.Mono })
		out[key] = append(running, r)
		if most := c.Rules.Topics[r.Start.Topic].MaxConcurrency; len(out[key]) > most {
			c.violate(ruleConcurrency, r.key(), r.Start.UUID, "%s has %d of the topic at once; MaxConcurrency is %d",
				r.Start.Process, len(out[key]), most)
		}
	}
}

// limits: a message that fails by error is handled MaxRetries+1 times, and one more at most if processes died or lost it.
// Deliveries that a shutdown took back do not count.
func (c *checker) limits() {
	most := c.Rules.MaxRetries + 2
	for _, key := range c.sortedEntries() {
		runs := c.entries[key]
		if natureOf(runs[0].Start.UUID) == broken {
			c.violate(ruleHandled, key, runs[0].Start.UUID, "%s was given it", runs[0].Start.Process)
		}
		handled, failed := 0, 0
		for i, r := range runs {
			if r.Start.Count > int64(most) {
				c.violate(ruleLimit, key, r.Start.UUID, "%s was given delivery %d; %d are allowed", r.Start.Process, r.Start.Count, most)
			}
			if r.Ending != Closed {
				handled++
			}
			if r.Ending == Nacked && (i+1 == len(runs) || !c.crashedAfter(r, runs[i+1])) {
				failed++
			}
		}
		if c.lostSince(runs[0], runs[len(runs)-1]) {
			continue // Redis may have forgotten deliveries
		}
		if handled > most {
			c.violate(ruleLimit, key, runs[0].Start.UUID, "it was handled %d times; %d are allowed", handled, most)
		} else if failed > c.Rules.MaxRetries+1 {
			c.violate(ruleLimit, key, runs[0].Start.UUID, "it failed %d times; %d are allowed", failed, c.Rules.MaxRetries+1)
		}
	}
}

// crashedAfter tells whether the failed run is a crash to Redis, because its process ended, or was away, before it could tell.
func (c *checker) crashedAfter(r, next *Run) bool {
	return c.Lives[r.life()].To <= next.Start.Mono || c.wasAway(r, next.Start.Mono)
}

// deaths: each poison is dead once, and nothing else is dead. OnDead is told once.
func (c *checker) deaths() {
	told := make(map[entryKey][]Event)
	for _, event := range c.Events {
		if event.Kind == Dead {
			key := entryKey{event.Topic, event.ID}
			told[key] = append(told[key], event)
		}
	}
	for key, events := range told {
		for i, event := range events[1:] {
			if !c.lostBetween(key.topic, events[i].Wall, event.Wall) {
				c.violate(ruleDeadTwice, key, event.UUID, "OnDead was called %d times", len(events))
				break
			}
		}
	}
	for _, topic := range c.topicNames() {
		c.letters(topic, c.Final[topic].Dead)
	}
}

func (c *checker) letters(topic string, letters []Letter) {
	seen := make(map[string]Letter)
	for _, letter := range letters {
		key := entryKey{topic, letter.EntryID}
		switch {
		case doomed(letter.UUID):
		case c.victim(key):
			c.verdict.Victims++
		default:
			c.violate(ruleInnocent, key, letter.UUID, "dead by %s after %d deliveries: %s", letter.Consumer, letter.Deliveries, letter.Reason)
		}
		if before, ok := seen[letter.EntryID]; ok && !c.lostBetween(topic, before.At, letter.At) {
			c.violate(ruleDeadTwice, key, letter.UUID, "it is in the dead-letter stream as %s and %s", before.ID, letter.ID)
		}
		seen[letter.EntryID] = letter
	}
}

// victim tells whether nobody could tell the message from one that ends its process: each of its deliveries from suspectFrom on,
// the last of them with nothing else of its subscription in flight, ended with its process, or while that was away.
func (c *checker) victim(key entryKey) bool {
	ended := make(map[int64]bool)
	for _, r := range c.entries[key] {
		if r.Ending == Ended || r.Ending == Lost {
			ended[r.Start.Count] = true
		}
	}
	for count := int64(suspectFrom); count <= int64(c.Rules.MaxRetries)+2; count++ {
		if !ended[count] {
			return false
		}
	}
	return true
}

// suspectFrom is the delivery count from which on the library suspects a claimed message.
const suspectFrom = 3

// suspects: of messages that were claimed, and not given back, for the third time or more a subscription handles one at a time; in
// the last delivery before the limit, nothing else.
func (c *checker) suspects() {
	type subscription struct {
		life
		topic string
	}
	runs := make(map[subscription][]*Run)
	for _, r := range c.Runs {
		key := subscription{r.life(), r.Start.Topic}
		runs[key] = append(runs[key], r)
	}
	for _, all := range runs {
		for i, r := range all {
			if !c.suspect(r) {
				continue
			}
			last := r.Start.Count >= int64(c.Rules.MaxRetries)+2
			for j, other := range all {
				if i != j && (last || c.suspect(other)) && other.Start.Mono < r.End && r.Start.Mono < other.End && !c.wasAway(other, r.End) && !c.wasAway(r, other.End) &&
					!c.lostSince(r, r) {
					c.violate(ruleSuspect, r.key(), r.Start.UUID, "%s handles it in delivery %d, and %s of run %d at the same time",
						r.Start.Process, r.Start.Count, other.Start.ID, other.Start.Run)
				}
			}
		}
	}
}

// suspect tells whether the run's process claimed the message from one that did not finish it.
func (c *checker) suspect(r *Run) bool {
	if r.Start.Count < suspectFrom {
		return false
	}
	var last time.Duration // when it was last handled before
	for _, before := range c.entries[r.key()] {
		if before.Start.Mono >= r.Start.Mono {
			continue
		}
		if before.life() == r.life() && before.Ending == Nacked && before.Start.Count == r.Start.Count-1 || before.Ending == Closed {
			return false // its own retry, or what a shutdown gave back
		}
		last = max(last, min(before.End, r.Start.Mono))
	}
	for _, l := range c.Lives {
		if l.Closing != 0 && l.Closing <= r.Start.Mono && l.To >= last {
			return false // it may have given the message back before a handler had it
		}
	}
	return true
}

// lostBetween tells whether Redis may have lost an ack or a move that happened by the first time, before the second one.
func (c *checker) lostBetween(topic string, first, second time.Time) bool {
	return slices.ContainsFunc(c.Faults, func(w *Window) bool {
		return w.losesOf(topic) && !w.Wall[0].After(second) && !w.Wall[1].Add(late).Before(first)
	})
}

// alive: no process ends by itself, unless it handles what ends it.
func (c *checker) alive() {
	for key, l := range c.Lives {
		if l.Crashed != nil {
			c.verdict.Crashes++
		} else if l.Died != "" {
			c.verdict.Violations = append(c.verdict.Violations, Violation{Rule: ruleDied, Process: key.process, Words: l.Died})
		}
	}
}
