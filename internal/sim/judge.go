package sim

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// judge applies the rules to each group.
func (s *simulation) judge(w *watcher) Result {
	w.trimmed()
	s.leftOver()
	result := Result{Schedule: s.schedule, Violations: s.complaints, Stats: Stats{
		Seeds: 1, Virtual: s.elapsed(), Faults: make(map[string]int), Violations: make(map[string]int),
	}}
	for _, f := range s.schedule.Faults {
		result.Stats.Faults[f.Kind]++
	}
	for _, c := range s.schedule.Calls {
		result.Stats.Messages += len(c.UUIDs)
	}
	for i, g := range s.schedule.Groups {
		events := s.journal.events(i)
		for _, e := range events {
			if e.Kind == rules.Started {
				result.Stats.Deliveries++
			}
		}
		if !g.leased() {
			s.judgeUnleased(&result, i, events)
			continue
		}
		evidence := rules.Sift(s.rules(g), events, s.final(g))
		verdict := rules.Check(evidence)
		result.Stats.Duplicates += len(verdict.Duplicates)
		if result.Stats.Dead += verdict.Dead; i == 0 {
			result.Stats.Delayed, result.Stats.Cancelled, result.Stats.Rescheduled = verdict.Delayed, verdict.Cancelled, verdict.Rescheduled
		}
		result.Stats.Lost += len(verdict.LostByRedis)
		result.Stats.Crashes += verdict.Crashes
		for _, v := range verdict.Violations {
			if s.excused(i, v, evidence) {
				continue
			}
			result.Violations = append(result.Violations, Violation{g.Name, v})
		}
	}
	for _, v := range result.Violations {
		result.Stats.Violations[v.Rule]++
	}
	for _, l := range s.journal.lines {
		result.Journal = append(result.Journal, l.String())
	}
	return result
}

// excused: what the rules do not know of. A Snooze counts for nothing, and what comes
// again after one is no suspect by that. XTRIM cuts batches
// in two, and so does the loss of what retention has left of them.
func (s *simulation) excused(group int, v rules.Violation, evidence *rules.Evidence) bool {
	switch v.Rule {
	case rules.RuleInnocent:
		return s.crashedLast(group, v) || rules.Nature(v.UUID) == closer && s.journal.logged("The abandoned delivery counts as a retry")
	case rules.RuleLimit: // a closer is given up when CloseTimeout is over
		nature := rules.Nature(v.UUID)
		return (nature == snoozing || nature == closer) && !strings.Contains(v.Words, "was given delivery")
	case rules.RuleOrder: // what comes again after a loss may do so long after it
		return s.struck("")
	case rules.RuleLost, rules.RuleImmortal:
		return endedSoon(evidence, v) || s.regrouped(group, v) || s.neverArrived(group, v)
	case rules.RuleSuspect:
		return rules.Nature(v.UUID) == snoozing || slices.ContainsFunc(s.journal.lines, func(l line) bool {
			return l.Kind == rules.Started && rules.Nature(l.UUID) == snoozing && strings.Contains(v.Words, " "+l.ID+" ")
		})
	case rules.RuleTorn:
		return s.struck("trim") || s.schedule.trims() && s.struck("")
	case rules.RuleRetryOrder: // what is dead comes again after a loss, as does what came after it
		return s.struck("") && slices.ContainsFunc(s.journal.events(group), func(e rules.Event) bool {
			return e.Kind == rules.Dead && e.Topic == v.Topic && e.ID == v.ID
		})
	}
	return false
}

// endedSoon reports whether a message's holder ended before it could notice that its group,
// or its name there, was lost.
func endedSoon(evidence *rules.Evidence, v rules.Violation) bool {
	lost, holder := time.Duration(-1), ""
	for _, l := range evidence.Events {
		who := fmt.Sprint(l.Process, "/", l.Life)
		switch {
		case l.Kind == rules.Injected && l.Strike.Group:
			lost = l.Mono
		case (l.Kind == rules.Started || l.Kind == rules.Delivered) && l.ID == v.ID && l.Topic == v.Topic:
			holder = who
		case (l.Kind == rules.Closing || l.Kind == rules.Ended || l.Kind == rules.Died) && who == holder && lost >= 0 &&
			evidence.Reach(l.Process, v.Topic, lost, l.Mono) < evidence.Rules.ClaimMinIdle/2:
			return true
		}
	}
	return false
}

// neverArrived reports whether a message may have been in a reply that was cut, when its
// group was lost: its holder had not asked yet what that was.
func (s *simulation) neverArrived(group int, v rules.Violation) bool {
	published, lost := false, false
	for _, l := range s.journal.events(group) {
		switch {
		case l.Kind == rules.Started && l.ID == v.ID && l.Topic == v.Topic:
			return false
		case l.Kind == rules.Publishing:
			published = published || slices.Contains(l.UUIDs, v.UUID)
		case l.Kind == rules.Injected && l.Strike.Group:
			lost = lost || published && s.troubled(l.Mono)
		}
	}
	return lost
}

// regrouped reports whether nobody was given a message, because the group was made again
// where the old stream had ended: whether the stream is another one is told by what was
// read, of which a process may have nothing but what it has claimed.
func (s *simulation) regrouped(group int, v rules.Violation) bool {
	stored, regrouped := false, false
	for _, l := range s.journal.lines {
		switch {
		case l.text != "":
			regrouped = regrouped || stored && strings.Contains(l.text, "has been recreated") &&
				strings.Contains(l.text, " topic="+v.Topic+" ") && !strings.HasSuffix(l.text, "start_id=0")
		case l.ID != v.ID || l.Topic != v.Topic:
		case l.Kind == rules.Stored:
			stored = stored || l.UUID == v.UUID
		case l.group == group && stored && (l.Kind == rules.Delivered || l.Kind == rules.Started):
			return false
		}
	}
	return regrouped
}

// struck reports whether Redis lost something by a fault of that kind; "": of any.
func (s *simulation) struck(kind string) bool {
	return slices.ContainsFunc(s.journal.lines, func(l line) bool {
		return l.Kind == rules.Injected && len(l.Strike.Loses) > 0 && (kind == "" || l.Strike.Fault == kind)
	})
}

// crashedLast reports whether a message that is dead was in its last delivery when its
// process ended, or was claimed for it by a process that ended before a handler had it.
// Nothing else of its subscription was in flight (there is a rule for that), but the
// process has others.
func (s *simulation) crashedLast(group int, v rules.Violation) bool {
	last := int64(max(s.schedule.Groups[group].MaxRetries, 0)) + 2
	crashes := false
	for _, l := range s.journal.events(group) {
		switch {
		case l.Kind == rules.Ended || l.Kind == rules.Died:
			crashes = true
		case l.ID != v.ID || l.Topic != v.Topic || l.Count != last:
		case l.Kind == rules.Nacked && rules.Nature(l.UUID) == snoozing && s.troubled(l.Mono): // Redis was not told of the Snooze
		case l.Kind == rules.Nacked || l.Kind == rules.Closed: // an ack may not have arrived
			return false // it came back from its last delivery
		}
	}
	return crashes
}

// troubled reports whether a fault was under way.
func (s *simulation) troubled(at time.Duration) bool {
	open := make(map[int]bool)
	for _, l := range s.journal.lines {
		if l.Mono > at {
			break
		}
		switch l.Kind {
		case rules.Injected:
			open[l.Strike.Number] = true
		case rules.Healed:
			delete(open, l.Strike.Number)
		}
	}
	return len(open) > 0
}

// rules returns what is promised to the group.
func (s *simulation) rules(g Group) rules.Rules {
	r := rules.Rules{
		ClaimMinIdle: g.ClaimMinIdle, ClaimInterval: g.ClaimInterval, MaxRetries: g.MaxRetries,
		Topics: make(map[string]rules.Topic), CloseTimeout: g.CloseTimeout, CloseBound: closeBound,
		Progress:   &rules.Progress{Bound: bound, SuspectBound: s.suspectBound(g), Recovery: recovery},
		PauseBound: pauseBound, PauseRecovery: recovery,
		Delayed: &rules.Delayed{Bound: moveBound, Punctual: punctual, Tolerance: time.Microsecond, Denied: movesAgain},
	}
	if g.Mood.Hang+g.Mood.Close > 0 {
		// What is in a hook that hangs when the Subscriber closes is not released, but
		// taken over.
		r.Progress.Bound += g.ClaimMinIdle*4/3 + 2*g.ClaimInterval
	}
	for _, topic := range s.schedule.Topics {
		r.Topics[topic] = rules.Topic{Name: topic, MaxConcurrency: g.MaxConcurrency, Keys: g.Keys}
	}
	return r
}

// suspectBound is what a suspect may wait for: subscriptions that take nothing new for its
// sake have patience for 5 s, and twice as long each time that it was not enough for the
// handlers under way; in between others have their turn for as long.
func (s *simulation) suspectBound(g Group) time.Duration {
	longest := s.schedule.longest()
	if g.Mood != (Mood{}) {
		longest += longestHook
	}
	return min(10*longest+bound, 10*time.Minute)
}

const (
	// closeBound is a command's timeout: a dial and a read, at most 2 s and 3 s here.
	closeBound = 6 * time.Second
	// bound is what a free slot may take to begin with what is due. Hooks that hang
	// take up to 6 s of it.
	bound = 10 * time.Second
	// moveBound is how late a delayed message may be moved: the time between two looks, some of the network's, and watchEvery.
	moveBound = 2 * time.Second
	// punctual is what an answer and the next question may take, 90 ms each where the network is slowest, and another
	// flight of the pipeline before that. Without a timer it would be up to a second.
	punctual = 300 * time.Millisecond
	// movesAgain is the longest time until who had no permission to move them tries again: consume.delayedDenied and its jitter.
	movesAgain = 100 * time.Second
	// pauseBound is how long after Pause a handler may begin: a tick, and some of the network's.
	pauseBound = 1500 * time.Millisecond
	// recovery is what a client may take to find its way back: the read that waits,
	// its backoff, and dials that time out.
	recovery = 20 * time.Second
)

// trimmed logs what retention and DeleteAcked have deleted.
func (w *watcher) trimmed() {
	if !w.schedule.trims() {
		return
	}
	for _, l := range slices.Clone(w.journal.lines) {
		if (l.Kind == rules.Started || l.Kind == rules.Dead) && w.seen[l.Topic] != nil {
			w.seen[l.Topic][l.ID] = l.UUID
		}
	}
	for _, g := range w.schedule.Groups {
		for _, topic := range w.schedule.Topics {
			for _, letter := range w.letters(topic, g.Name) {
				w.seen[topic][letter.EntryID] = letter.UUID
			}
		}
	}
	for _, topic := range w.schedule.Topics {
		there := make(map[string]bool)
		for _, e := range w.entries(topic, "-") {
			there[e.ID] = true
		}
		for id, uuid := range w.seen[topic] {
			if !there[id] {
				w.journal.add(everyGroup, rules.Event{Kind: rules.Trimmed, Topic: topic, ID: id, UUID: uuid})
			}
		}
	}
}

// judgeUnleased judges groups that are promised less: a NoAck group gets nothing twice,
// a fan-out everything that was published while it was there.
func (s *simulation) judgeUnleased(result *Result, group int, events []rules.Event) {
	for _, e := range events {
		if e.Kind == rules.Injected && len(e.Strike.Loses) > 0 {
			return // Redis may have forgotten where they were
		}
	}
	if s.schedule.Groups[group].Name != "" {
		s.judgeNoAck(result, group, events)
	} else {
		s.judgeFanOut(result, events)
	}
}

func (s *simulation) judgeNoAck(result *Result, group int, events []rules.Event) {
	begun := make(map[string]rules.Event)
	for _, e := range events {
		if e.Kind != rules.Started {
			continue
		}
		if first, ok := begun[e.UUID]; ok {
			result.Violations = append(result.Violations, Violation{s.schedule.Groups[group].Name, rules.Violation{
				Rule: "at most once", Topic: e.Topic, ID: e.ID, UUID: e.UUID,
				Words: fmt.Sprintf("by %s at %v and by %s at %v", first.Process, first.Mono, e.Process, e.Mono),
			}})
		}
		begun[e.UUID] = e
	}
}

// judgeFanOut is about those that lived until the end.
func (s *simulation) judgeFanOut(result *Result, events []rules.Event) {
	type subscription struct {
		process string
		life    int
		topic   string
	}
	var open []rules.Event
	got := make(map[subscription]map[string]bool)
	cut := make(map[string]int) // by process: its last life
	for _, e := range events {
		key := subscription{e.Process, e.Life, e.Topic}
		switch e.Kind {
		case rules.Spawned:
			cut[e.Process] = e.Life
		case rules.Subscribed:
			open = append(open, e)
			got[key] = make(map[string]bool)
		case rules.Started:
			got[key][e.UUID] = true
		}
	}
	began, cancelled := make(map[string]time.Duration), make(map[string]bool)
	for _, e := range events {
		cancelled[e.UUID] = cancelled[e.UUID] || e.Kind == rules.Changing && e.Due == 0 // or may be
	}
	for _, e := range events {
		if e.Kind == rules.Publishing {
			began[e.UUIDs[0]] = e.Mono
		}
		if e.Kind != rules.Published {
			continue
		}
		for _, sub := range open {
			if sub.Life != cut[sub.Process] || sub.Topic != e.Topic || began[e.UUIDs[0]] < sub.Mono || s.closedEarly(sub, events) {
				continue
			}
			for _, uuid := range e.UUIDs {
				if rules.Nature(uuid) == rules.Broken || cancelled[uuid] || got[subscription{sub.Process, sub.Life, sub.Topic}][uuid] {
					continue
				}
				result.Violations = append(result.Violations, Violation{"fan-out", rules.Violation{
					Rule: "missed", Topic: e.Topic, UUID: uuid, Process: sub.Process,
					Words: fmt.Sprintf("published at %v, subscribed at %v", began[e.UUIDs[0]], sub.Mono),
				}})
			}
		}
	}
}

// closedEarly reports whether the subscription ended before everything was settled.
func (s *simulation) closedEarly(sub rules.Event, events []rules.Event) bool {
	for _, e := range events {
		switch {
		case e.Kind == rules.Settled:
			return false
		case e.Process == sub.Process && e.Life == sub.Life && (e.Kind == rules.Ended || e.Kind == rules.Died || e.Kind == rules.Closing):
			return true
		}
	}
	return false
}
