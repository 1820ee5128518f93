package rules

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The rules, as Violation.Rule names them. None may be broken where Redis kept what it acknowledged.
const (
	RuleLost        = "lost"            // stored and kept by Redis, and neither handled nor dead
	RuleVanished    = "vanished"        // acknowledged and not stored, though no fault made Redis lose anything
	RulePending     = "left pending"    // nobody finished it
	RuleOverlap     = "handled at once" // by two holders whose leases were both good
	RuleOrder       = "out of order"    // first deliveries of a topic with MaxConcurrency 1, or of a key
	RuleRetryOrder  = "overtaken"       // a nacked message comes again before its successors
	RuleKey         = "key at once"     // two messages of a key, in one subscription
	RuleConcurrency = "too many at once"
	RuleLimit       = "past the limit" // handled more often than MaxRetries allows
	RuleDeadTwice   = "dead twice"
	RuleInnocent    = "innocent dead"
	RuleImmortal    = "doomed not dead"
	RuleStoredTwice = "stored twice" // by one call of Publish, or by its repetitions
	RuleRefused     = "refused, but stored"
	RuleTorn        = "torn batch"
	RuleSuspect     = "suspect not alone" // who may have crashed two processes, beside another such; or in its last delivery, beside anything
	RuleHandled     = "broken, but handled"
	RuleDied        = "process died" // by itself
	RuleCloseLate   = "close late"
	RuleProgress    = "progress" // something waits that an idle consumer should take

	// Of delayed messages.
	RuleEarly     = "early"        // in the stream before it is due
	RuleMoved     = "moved late"   // due, and not moved into the stream, though somebody could
	RuleWaiting   = "left waiting" // nobody ever did
	RuleCancelled = "cancelled, but stored"
	RuleNotFound  = "not found, but waiting"
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

	Delayed, Cancelled, Rescheduled int // messages, calls that succeeded
}

// Broken returns the rules that were broken, each once.
func (v Verdict) Broken() []string {
	var rules []string
	for _, violation := range v.Violations {
		rules = append(rules, violation.Rule)
	}
	slices.Sort(rules)
	return slices.Compact(rules)
}

// A checker has the evidence in the forms that the rules need.
type checker struct {
	*Evidence
	verdict Verdict
	entries map[entryKey][]*Run
	stored  map[string][]entryKey // by UUID: more than one is too many
	handled map[string][]*Run     // by UUID: the runs that succeeded
	dead    map[entryKey]bool
	trimmed map[entryKey]time.Duration
}

// Check applies the rules. It is a pure function: the same evidence comes to the same verdict.
func Check(e *Evidence) Verdict {
	c := &checker{
		Evidence: e, entries: e.byEntry(), dead: make(map[entryKey]bool),
		stored: make(map[string][]entryKey), handled: make(map[string][]*Run),
		trimmed: make(map[entryKey]time.Duration),
	}
	c.index()
	c.count()
	c.published()
	c.delayed()
	c.settled()
	c.alone()
	c.ordered()
	c.concurrency()
	c.limits()
	c.deaths()
	c.suspects()
	c.alive()
	c.closes()
	c.progress()
	c.paused()
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
	c.indexTrimmed()
}

// indexTrimmed: what was settled and then trimmed was stored. What was trimmed before that has vanished, unless the group was
// lost with it, and its holder could not put it back; or the group did not exist, so that nobody could know that it is for it.
func (c *checker) indexTrimmed() {
	for _, event := range c.Events {
		key := entryKey{event.Topic, event.ID}
		if event.Kind != Trimmed {
			continue
		}
		c.trimmed[key] = event.Mono
		handled := slices.ContainsFunc(c.entries[key], func(r *Run) bool { return r.Ending == Acked && r.End <= event.Mono })
		if handled || c.dead[key] || c.forgotten(key) != nil || c.groupless(key.topic, event.UUID) {
			c.stored[event.UUID] = append(c.stored[event.UUID], key)
		}
	}
}

// groupless tells whether the message was published after Redis had lost the group, and before one of its consumers was there to
// make it again.
func (c *checker) groupless(topic, uuid string) bool {
	m := c.Messages[uuid]
	return m != nil && slices.ContainsFunc(c.Faults, func(w *Window) bool {
		return w.loses(topic) && (w.Destroys || w.Group) && w.To <= m.From && !c.someThere(topic, Span{w.From, m.At})
	})
}

// someThere tells whether a consumer of the topic was there at some time of the span.
func (c *checker) someThere(topic string, span Span) bool {
	return slices.ContainsFunc(c.Events, func(e Event) bool {
		l := c.Lives[LifeID{e.Process, e.Life}]
		if e.Kind != Subscribed && e.Kind != Started || e.Topic != topic || l == nil || e.Mono > span.To {
			return false
		}
		end := l.To
		if l.Closing != 0 {
			end = min(end, l.Closing)
		}
		return end >= span.From
	})
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
	slices.SortFunc(c.verdict.Duplicates, func(a, b Duplicate) int { return cmp.Or(cmp.Compare(a.At, b.At), cmp.Compare(a.UUID, b.UUID)) })
}

// published compares what Publish said with what Redis has.
func (c *checker) published() {
	for _, m := range c.sortedMessages() {
		places := c.stored[m.UUID]
		switch {
		case len(places) > 1 && !(m.Delay > 0 && c.relapsed(m.Topic, m.From, c.End)): // moved, forgotten, and moved again
			c.violate(RuleStoredTwice, places[0], m.UUID, "it is in the stream %d times: %v", len(places), places)
		case len(places) == 1 && m.Outcome == Refused:
			c.violate(RuleRefused, places[0], m.UUID, "Publish said that nothing is stored")
		case len(places) == 0 && m.Outcome == Published && !m.cancelled(forever) && !slices.Contains(c.Final[m.Topic].Waiting, m.UUID):
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
		c.violate(RuleVanished, entryKey{topic: m.Topic}, m.UUID, "Publish returned nil, and Redis does not have it; no fault made Redis lose it")
	case len(c.handled[m.UUID]) == 0 && !c.diedBefore(m.UUID):
		c.verdict.LostByRedis = append(c.verdict.LostByRedis, Loss{m.UUID, m.Topic, culprit})
	}
}

// culprit returns the fault that made Redis lose the message: of those that may have and one that surely has, the latter.
func (c *checker) culprit(m *Message) (culprit *Window) {
	for _, w := range c.Faults {
		switch {
		case !w.loses(m.Topic) || w.Group || c.spared(m, w):
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
// But what was trimmed, and so surely stored, is not lost with the rest of its call.
func (c *checker) whole(first *Message) {
	if len(c.trimmed) > 0 && c.culprit(first) != nil {
		return
	}
	if c.delayedCall(first) {
		c.sameCall(first)
		return
	}
	var ids []string
	for _, uuid := range first.Batch {
		if places := c.stored[uuid]; len(places) > 0 {
			ids = append(ids, places[0].id)
		}
	}
	key := entryKey{topic: first.Topic}
	if len(ids) != 0 && len(ids) != len(first.Batch) {
		c.violate(RuleTorn, key, first.UUID, "%d of %d messages of one call are stored", len(ids), len(first.Batch))
	}
	if !slices.IsSortedFunc(ids, CompareIDs) {
		c.violate(RuleTorn, key, first.UUID, "the messages of one call are stored in another order: %v", ids)
	}
}

// settled: in the end everything that Redis kept is handled or dead, and nothing is pending.
func (c *checker) settled() {
	for _, topic := range c.topicNames() {
		state := c.Final[topic]
		pending := make(map[string]bool)
		for _, p := range state.Pending {
			pending[p.ID] = true
			c.violate(RulePending, entryKey{topic, p.ID}, "", "with %s, delivered %d times", p.Consumer, p.Count)
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
			rule := RuleLost
			if Doomed(entry.UUID) && (Nature(entry.UUID) == Broken || len(c.entries[key]) > 0) {
				rule = RuleImmortal
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

// forgotten returns the loss of the group by which Redis forgot that the entry was delivered to a holder who was dead or away, or
// died before it could notice, and so could not put it back.
func (c *checker) forgotten(key entryKey) *Window {
	for _, w := range c.Faults {
		if !w.Group || !w.loses(key.topic) {
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

func (c *checker) lastHolder(key entryKey, before time.Duration) (holder LifeID, seen bool) {
	for _, e := range c.holdings(key) {
		if e.Mono < before {
			holder, seen = LifeID{e.Process, e.Life}, true
		}
	}
	return holder, seen
}

// noticing is how long a holder may take to notice that the group has forgotten its entries: until it has renewed all its leases.
func (c *checker) noticing() time.Duration { return c.Rules.ClaimMinIdle / 3 }

// over tells whether a process had ended, or died before it could notice. (One that closes notices.)
func (c *checker) over(l *Life, at time.Duration) bool {
	return l.To <= at || l.Closing == 0 && l.To <= at+c.noticing()
}

func (c *checker) absent(holder LifeID, at time.Duration) bool {
	l := c.Lives[holder]
	return c.over(l, at) || l.Closing != 0 && l.Closing <= at || c.awayAt(holder.Process, at)
}

func (c *checker) awayAt(process string, at time.Duration) bool {
	return slices.ContainsFunc(c.Away[process], func(s Span) bool {
		return s.Length() >= c.Rules.ClaimMinIdle && s.From <= at && at <= s.To
	})
}

// someAbsent tells whether a process had died, or was away, so recently that what it held may not have been taken over yet, or
// died soon after.
func (c *checker) someAbsent(at time.Duration) bool {
	for key, l := range c.Lives {
		recent := c.over(l, at) && at-l.To < 10*c.Rules.ClaimMinIdle
		if recent || c.awayAt(key.Process, at) {
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
				c.violate(RuleOverlap, key, first.Start.UUID, "by %s (run %d) until %v and by %s (run %d) from %v on",
					first.Start.Process, first.Start.Run, first.End, second.Start.Process, second.Start.Run, second.Start.Mono)
			}
		}
	}
}

func (c *checker) sortedEntries() []entryKey { return sortedKeys(c.entries) }

func sortedKeys[V any](entries map[entryKey]V) []entryKey {
	var keys []entryKey
	for key := range entries {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b entryKey) int { return cmp.Or(cmp.Compare(a.topic, b.topic), CompareIDs(a.id, b.id)) })
	return keys
}

// leaseEnd returns until when the run had a good lease. What was read ahead may still be started right after an absence; it
// takes until the next renewal for the holder to notice that it lost it: then the lease was never good.
func (c *checker) leaseEnd(r *Run) time.Duration {
	for _, s := range c.Away[r.Start.Process] {
		if s.Length() >= c.Rules.ClaimMinIdle && r.Start.Mono <= s.To+c.Rules.ClaimMinIdle && r.End >= s.From {
			return max(s.From, 0)
		}
	}
	return r.End
}

// lostSince tells whether Redis may have lost the first run's lease before the second began.
func (c *checker) lostSince(first, second *Run) bool {
	return c.lostWithin(first.Start.Topic, first.Start.Mono, second.Start.Mono)
}

func (c *checker) lostWithin(topic string, from, to time.Duration) bool {
	return slices.ContainsFunc(c.Faults, func(w *Window) bool { return w.loses(topic) && w.From <= to && w.To+late >= from })
}

// ordered: on a topic with MaxConcurrency 1 the first deliveries to each subscription ascend, and what failed comes again
// before its successors. With ordering keys that holds for each key, of which a subscription handles one message at a time.
// What a process that died or closed had is no first delivery, or may come late: other processes have handled its successors
// meanwhile, or do so at the same time.
func (c *checker) ordered() {
	for _, all := range groups(c.Runs, (*Run).subscription) {
		topic := c.Rules.Topics[all[0].Start.Topic]
		if topic.MaxConcurrency == 1 {
			c.ascending(all)
			c.notOvertaken(all)
		}
		if topic.Keys == 0 {
			continue
		}
		for _, ofKey := range groups(all, func(r *Run) string { return KeyOf(r.Start.UUID, topic.Keys) }) {
			if KeyOf(ofKey[0].Start.UUID, topic.Keys) != "" {
				c.ascending(ofKey)
				c.notOvertaken(ofKey)
				c.oneByOne(ofKey)
			}
		}
	}
}

// oneByOne: no run begins before the one before it has ended.
func (c *checker) oneByOne(runs []*Run) {
	var last *Run
	for _, r := range runs {
		if last != nil && r.Start.Mono < last.End {
			c.violate(RuleKey, r.key(), r.Start.UUID, "%s handles it (run %d) while it handles %s (run %d), which has the same key",
				r.Start.Process, r.Start.Run, last.Start.ID, last.Start.Run)
		}
		if last == nil || r.End > last.End {
			last = r
		}
	}
}

// groups returns the runs of each group, in the order of their first runs.
func groups[K comparable](runs []*Run, key func(*Run) K) [][]*Run {
	places := make(map[K]int)
	var all [][]*Run
	for _, r := range runs {
		place, ok := places[key(r)]
		if !ok {
			place = len(all)
			places[key(r)], all = place, append(all, nil)
		}
		all[place] = append(all[place], r)
	}
	return all
}

func (c *checker) ascending(runs []*Run) {
	var last *Run
	for _, r := range runs {
		if r.Start.Count != 1 || c.entries[r.key()][0] != r { // what was snoozed is handled with that count again
			continue
		}
		if last != nil && CompareIDs(r.Start.ID, last.Start.ID) < 0 && !c.mayComeLate(last, r) {
			c.violate(RuleOrder, r.key(), r.Start.UUID, "%s got it after its successor %s", r.Start.Process, last.Start.ID)
		}
		if last == nil || CompareIDs(r.Start.ID, last.Start.ID) > 0 {
			last = r
		}
	}
}

// mayComeLate tells whether r's entry may come after its successor and still be delivered for the first time by its count:
// because one of the two was released by a process that closed its subscriptions (which does not count) or by another subscription
// in a pause, because Redis lost the group's position, or because the reply that brought it was lost on its way to somebody who did
// not handle it.
func (c *checker) mayComeLate(successor, r *Run) bool {
	for _, l := range c.Lives {
		if l.Closing != 0 && l.Closing <= r.Start.Mono && c.addedBefore(r, l.To) {
			return true
		}
	}
	for _, s := range c.Reopened {
		if s.From <= r.Start.Mono && c.addedBefore(r, s.To) {
			return true
		}
	}
	for _, p := range c.pauses() {
		if p.topic == r.Start.Topic && p.From <= r.Start.Mono && c.addedBefore(r, p.To) && c.hadOthers(r, p.Span) {
			return true
		}
	}
	for _, w := range c.Faults {
		if w.From > r.Start.Mono {
			continue
		}
		if w.loses(r.Start.Topic) && w.To+late >= successor.Start.Mono {
			return true
		}
		// What is delivered to a name of its own, the process looks for before it reads on.
		if w.Breaks && c.Rules.Topics[r.Start.Topic].Named && c.addedBefore(r, w.To) {
			return true
		}
	}
	return slices.ContainsFunc(c.entries[r.key()], func(other *Run) bool { return other.Ending == Closed && other.Start.Mono < r.Start.Mono })
}

// hadOthers tells whether there was another consumer in that time, another life of the same one, or another subscription.
func (c *checker) hadOthers(r *Run, s Span) bool {
	for other, l := range c.Lives {
		if other != r.LifeID() && strings.HasPrefix(other.Process, "consumer") && l.From <= s.To && l.To >= s.From {
			return true
		}
	}
	return slices.ContainsFunc(c.Runs, func(other *Run) bool {
		return other.LifeID() == r.LifeID() && other.Start.Topic == r.Start.Topic && other.Start.Consumer != r.Start.Consumer
	})
}

// addedBefore tells whether the run's entry may have been in the stream by then. A delayed message is there when it is moved.
func (c *checker) addedBefore(r *Run, at time.Duration) bool {
	m, ok := c.Messages[r.Start.UUID]
	if ok && m.Delay > 0 && len(c.clock) > 0 {
		return (appearance{entryKey: r.key()}).added() <= c.clock.latest(at)+c.tolerance(m)
	}
	return ok && m.From <= at
}

// notOvertaken: after a nack nothing new is delivered to the subscription before the message itself.
func (c *checker) notOvertaken(runs []*Run) {
	for i, nacked := range runs {
		if nacked.Ending != Nacked || c.leaseEnd(nacked) <= nacked.Start.Mono {
			continue
		}
		again := slices.IndexFunc(runs[i+1:], func(r *Run) bool { return r.Start.ID == nacked.Start.ID })
		if again <= 0 {
			continue // at once, or not here: it is dead, or its lease was lost
		}
		for _, between := range runs[i+1 : i+1+again] {
			if between.Start.Count == 1 && CompareIDs(between.Start.ID, nacked.Start.ID) > 0 && !c.lostSince(nacked, between) &&
				!c.wasAway(nacked, between.Start.Mono) {
				c.violate(RuleRetryOrder, nacked.key(), nacked.Start.UUID, "%s got %s between a failure and its retry",
					nacked.Start.Process, between.Start.ID)
			}
		}
	}
}

// wasAway tells whether the run's process may have lost its lease between the run and that time.
func (c *checker) wasAway(r *Run, until time.Duration) bool {
	return slices.ContainsFunc(c.Away[r.Start.Process], func(s Span) bool {
		return s.Length() >= c.Rules.ClaimMinIdle && s.From <= until && s.To >= r.Start.Mono
	})
}

// concurrency: a subscription has MaxConcurrency messages out at most.
func (c *checker) concurrency() {
	out := make(map[subscription][]*Run)
	for _, r := range c.Runs {
		key := r.subscription()
		running := slices.DeleteFunc(out[key], func(o *Run) bool { return o.End <= r.Start.Mono })
		out[key] = append(running, r)
		if most := c.Rules.Topics[r.Start.Topic].MaxConcurrency; len(out[key]) > most {
			c.violate(RuleConcurrency, r.key(), r.Start.UUID, "%s has %d of the topic at once; MaxConcurrency is %d",
				r.Start.Process, len(out[key]), most)
		}
	}
}

// limits: a message that fails by error is handled MaxRetries+1 times, and one more at most if processes died or lost it.
// Deliveries that a shutdown took back do not count.
func (c *checker) limits() {
	most, limited := c.Rules.last()
	for _, key := range c.sortedEntries() {
		runs := c.entries[key]
		if Nature(runs[0].Start.UUID) == Broken {
			c.violate(RuleHandled, key, runs[0].Start.UUID, "%s was given it", runs[0].Start.Process)
		}
		if !limited {
			continue
		}
		var handled, failed int64
		for i, r := range runs {
			if r.Start.Count > most {
				c.violate(RuleLimit, key, r.Start.UUID, "%s was given delivery %d; %d are allowed", r.Start.Process, r.Start.Count, most)
			}
			if c.leaseEnd(r) <= r.Start.Mono {
				continue // it had been away, and had not noticed yet
			}
			if r.Ending != Closed {
				handled++
			}
			if r.Ending == Nacked && (i+1 == len(runs) || !c.crashedAfter(r, runs[i+1])) {
				failed++
			}
		}
		// Redis may have forgotten deliveries; and a group that began anew reads again what was read ahead then.
		excused := func() bool { return c.lostWithin(key.topic, c.holdings(key)[0].Mono, runs[len(runs)-1].Start.Mono) }
		if handled > most && !excused() {
			c.violate(RuleLimit, key, runs[0].Start.UUID, "it was handled %d times; %d are allowed", handled, most)
		} else if failed > most-1 && !excused() {
			c.violate(RuleLimit, key, runs[0].Start.UUID, "it failed %d times; %d are allowed", failed, most-1)
		}
	}
}

// crashedAfter tells whether the failed run is a crash to Redis, because its process ended, or was away, before it could tell.
func (c *checker) crashedAfter(r, next *Run) bool {
	return c.Lives[r.LifeID()].To <= next.Start.Mono || c.wasAway(r, next.Start.Mono)
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
	for _, key := range sortedKeys(told) {
		events := told[key]
		for i, event := range events[1:] {
			if !c.mayDieAgain(key, events[i].Mono, event.Mono) {
				c.violate(RuleDeadTwice, key, event.UUID, "OnDead was called %d times", len(events))
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
		case Doomed(letter.UUID):
		case c.victim(key):
			c.verdict.Victims++
		default:
			c.violate(RuleInnocent, key, letter.UUID, "dead by %s after %d deliveries: %s", letter.Consumer, letter.Deliveries, letter.Reason)
		}
		if before, ok := seen[letter.EntryID]; ok && !c.mayDieAgain(key, before.At, letter.At+time.Millisecond) { // an ID has whole ones
			c.violate(RuleDeadTwice, key, letter.UUID, "it is in the dead-letter stream as %s and %s", before.ID, letter.ID)
		}
		seen[letter.EntryID] = letter
	}
}

// mayDieAgain tells whether an entry that died may be dead a second time.
func (c *checker) mayDieAgain(key entryKey, first, second time.Duration) bool {
	return c.lostBetween(key.topic, first, second) || c.readAnew(key, first, second) || c.restoredLate(key, first, second)
}

// readAnew tells whether the group was given the entry as if it were new, because Redis had lost how far the group had read.
// That shows when it reads on, which may be long after the loss.
func (c *checker) readAnew(key entryKey, first, second time.Duration) bool {
	seen, anew := forever, false
	for _, e := range c.holdings(key) {
		seen = min(seen, e.Mono)
		anew = anew || e.Count == 1 && first < e.Mono && e.Mono <= second
	}
	return anew && slices.ContainsFunc(c.Faults, func(w *Window) bool {
		return w.loses(key.topic) && !w.Keeps && w.From <= second && w.To+late >= seen
	})
}

// restoredLate tells whether a former holder may have put the entry back that another one had moved: it was cut off for longer
// than its lease, and meanwhile the group was lost, so that nothing told it of what had happened.
func (c *checker) restoredLate(key entryKey, first, second time.Duration) bool {
	return slices.ContainsFunc(c.holdings(key), func(e Event) bool {
		return slices.ContainsFunc(c.Away[e.Process], func(away Span) bool {
			back := away.Length() >= c.Rules.ClaimMinIdle && c.Lives[LifeID{e.Process, e.Life}].To > away.To
			return back && e.Mono <= first && away.From <= first && away.To <= second && slices.ContainsFunc(c.Faults, func(w *Window) bool {
				return w.Group && w.loses(key.topic) && away.From <= w.From && w.From <= away.To
			})
		})
	})
}

// holdings returns the events that show who had the entry.
func (c *checker) holdings(key entryKey) (events []Event) {
	for _, e := range c.Events {
		if (e.Kind == Started || e.Kind == Delivered) && e.ID == key.id && e.Topic == key.topic {
			events = append(events, e)
		}
	}
	return events
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
	from, last := c.Rules.suspects()
	for count := from; count <= last; count++ {
		if !ended[count] {
			return false
		}
	}
	return from > 0
}

// suspectFrom is the delivery count from which on the library suspects a claimed message.
const suspectFrom = 3

// suspects returns that, or the last count if that is less, and the last count; zeros where nothing can die.
func (r Rules) suspects() (from, last int64) {
	last, ok := r.last()
	if !ok {
		return 0, 0
	}
	return min(suspectFrom, last), last
}

// suspects: of messages that were claimed, and not given back, for the third time or more a subscription handles one at a time; in
// the last delivery before the limit, nothing else.
func (c *checker) suspects() {
	_, limit := c.Rules.suspects()
	for _, all := range groups(c.Runs, (*Run).subscription) {
		for i, r := range all {
			if !c.suspect(r) {
				continue
			}
			last := r.Start.Count >= limit
			for j, other := range all {
				if i != j && (last || c.suspect(other)) && other.Start.Mono < r.End && r.Start.Mono < other.End && !c.wasAway(other, r.End) && !c.wasAway(r, other.End) &&
					!c.lostSince(r, r) {
					c.violate(RuleSuspect, r.key(), r.Start.UUID, "%s handles it in delivery %d, and %s of run %d at the same time",
						r.Start.Process, r.Start.Count, other.Start.ID, other.Start.Run)
				}
			}
		}
	}
}

// suspect tells whether the run's process claimed the message from one that did not finish it.
func (c *checker) suspect(r *Run) bool {
	if from, _ := c.Rules.suspects(); from == 0 || r.Start.Count < from {
		return false
	}
	var last time.Duration // when it was last handled before
	for _, before := range c.entries[r.key()] {
		if before.Start.Mono >= r.Start.Mono {
			continue
		}
		if before.LifeID() == r.LifeID() && before.Ending == Nacked && before.Start.Count == r.Start.Count-1 || before.Ending == Closed {
			return false // its own retry, or what a shutdown gave back
		}
		last = max(last, min(before.End, r.Start.Mono))
	}
	for _, p := range c.pauses() {
		if p.topic == r.Start.Topic && c.Rules.Topics[p.topic].Keys > 0 && p.From <= r.Start.Mono && p.To >= last {
			return false // it may have been released in a pause: then the order of its key comes first
		}
	}
	for _, l := range c.Lives {
		if l.Closing != 0 && l.Closing <= r.Start.Mono && l.To >= last {
			return false // it may have given the message back before a handler had it
		}
	}
	for _, s := range c.Reopened {
		if s.From <= r.Start.Mono && s.To >= last {
			return false
		}
	}
	return true
}

// lostBetween tells whether Redis may have lost an ack or a move that happened by the first time, before the second one.
func (c *checker) lostBetween(topic string, first, second time.Duration) bool {
	return slices.ContainsFunc(c.Faults, func(w *Window) bool {
		return w.loses(topic) && !w.Keeps && w.From <= second && w.To+late >= first
	})
}

// alive: no process ends by itself, unless it handles what ends it.
func (c *checker) alive() {
	for _, key := range c.sortedLives() {
		l := c.Lives[key]
		if l.Crashed != nil {
			c.verdict.Crashes++
		} else if l.Died != "" {
			c.verdict.Violations = append(c.verdict.Violations, Violation{Rule: RuleDied, Process: key.Process, Words: l.Died})
		}
	}
}

// closes: Close comes to an end, whatever handlers and the server do. The time that a process does not run does not count.
func (c *checker) closes() {
	if c.Rules.CloseBound == 0 {
		return
	}
	most := c.Rules.CloseTimeout + c.Rules.CloseBound
	for _, key := range c.sortedLives() {
		l := c.Lives[key]
		if l.Closing == 0 || l.Died != "" {
			continue
		}
		took := l.To - l.Closing
		for _, s := range intersect(c.Halted[key.Process], []Span{{l.Closing, l.To}}) {
			took -= s.Length()
		}
		if took > most {
			c.verdict.Violations = append(c.verdict.Violations, Violation{
				Rule: RuleCloseLate, Process: key.Process,
				Words: fmt.Sprintf("life %d closes for %v; %v are allowed", key.Number, took, most),
			})
		}
	}
}

func (c *checker) sortedLives() []LifeID {
	var keys []LifeID
	for key := range c.Lives {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b LifeID) int {
		return cmp.Or(cmp.Compare(a.Process, b.Process), cmp.Compare(a.Number, b.Number))
	})
	return keys
}
