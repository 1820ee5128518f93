package main

import (
	"cmp"
	"slices"
	"time"
)

// Rules are what the checker must know of the consumers.
type Rules struct {
	ClaimMinIdle time.Duration
	MaxRetries   int
	Topics       map[string]Topic
}

func (s Settings) rules() Rules {
	rules := Rules{s.ClaimMinIdle, s.MaxRetries, make(map[string]Topic)}
	for _, t := range topics {
		rules.Topics[t.Name] = t
	}
	return rules
}

// Evidence is the logs, sorted for the checker, and what Redis has in the end.
type Evidence struct {
	Rules    Rules
	Events   []Event // in the order of time
	Final    map[string]TopicState
	Messages map[string]*Message // by UUID
	Runs     []*Run              // in the order of their beginnings
	Faults   []*Window
	Away     map[string][]Span // by process: when it did not run, or did not reach Redis
	Lives    map[life]*Life
	End      time.Duration
}

// A Message is what a producer logged about it.
type Message struct {
	UUID, Topic string
	Outcome     Kind          // Published, Unknown, Refused
	From        time.Duration // the beginning of the first call
	Last        time.Duration // the beginning of the last one, which is the first one unless calls are repeated
	At          time.Duration // its end, or, of a call that never ended, its beginning
	Batch       []string
}

// A life is one process of a place.
type life struct {
	process string
	number  int
}

// A Life is when it was.
type Life struct {
	From, To time.Duration
	Closing  time.Duration // SIGTERM; 0: never
	Died     string        // by itself, and how
	Crashed  *Event        // the delivery that ended it
}

// A Run is one call of a handler.
type Run struct {
	Start    Event
	End      time.Duration
	Ending   Kind // Acked, Nacked, Lost, Closed; Ended: with its process
	Finished bool // by an event of its own
}

func (r *Run) life() life { return life{r.Start.Process, r.Start.Life} }

// An entryKey is an entry's place in Redis.
type entryKey struct{ topic, id string }

func (r *Run) key() entryKey { return entryKey{r.Start.Topic, r.Start.ID} }

// A Span is some time.
type Span struct{ From, To time.Duration }

func (s Span) length() time.Duration { return s.To - s.From }

// A Window is a fault from its injection to its healing.
type Window struct {
	Effect
	Span
	Wall [2]time.Time
}

// sift sorts the logs.
func sift(rules Rules, events []Event, final map[string]TopicState) *Evidence {
	e := &Evidence{
		Rules: rules, Events: events, Final: final,
		Messages: make(map[string]*Message), Away: make(map[string][]Span), Lives: make(map[life]*Life),
	}
	sortEvents(e.Events)
	if n := len(events); n > 0 {
		e.End = events[n-1].Mono
	}
	e.siftFaults()
	e.siftLives()
	e.siftMessages()
	e.siftRuns()
	e.siftAway()
	return e
}

func (e *Evidence) siftMessages() {
	for _, event := range e.Events {
		switch event.Kind {
		case Publishing, Published, Unknown, Refused:
		default:
			continue
		}
		for _, uuid := range event.UUIDs {
			m, ok := e.Messages[uuid]
			if !ok {
				m = &Message{UUID: uuid, Topic: event.Topic, From: event.Mono, Batch: event.UUIDs}
				e.Messages[uuid] = m
			}
			m.Outcome, m.At = event.Kind, event.Mono
			if event.Kind == Publishing {
				m.Outcome, m.Last = Unknown, event.Mono // until its outcome is logged
			}
		}
	}
}

func (e *Evidence) siftFaults() {
	byNumber := make(map[int]*Window)
	for _, event := range e.Events {
		switch event.Kind {
		case Injected:
			w := &Window{Effect: *event.Strike, Span: Span{event.Mono, e.End}, Wall: [2]time.Time{event.Wall, event.Wall.Add(e.End - event.Mono)}}
			byNumber[event.Strike.Number] = w
			e.Faults = append(e.Faults, w)
		case Healed:
			w := byNumber[event.Strike.Number]
			w.To, w.Wall[1] = event.Mono, event.Wall
		}
	}
}

func (e *Evidence) siftLives() {
	for _, event := range e.Events {
		key := life{event.Process, event.Life}
		switch event.Kind {
		case Spawned:
			e.Lives[key] = &Life{From: event.Mono, To: e.End}
		case Closing:
			e.Lives[key].Closing = event.Mono
		case Crashed:
			if l, ok := e.Lives[key]; ok {
				l.Crashed = &event
			}
		case Ended, Died:
			l := e.Lives[key]
			l.To = event.Mono
			if event.Kind == Died {
				l.Died = cmp.Or(event.Error, "exit status 0")
			}
		}
	}
}

func (e *Evidence) siftRuns() {
	type number struct {
		life
		run int64
	}
	open := make(map[number]*Run)
	for _, event := range e.Events {
		key := number{life{event.Process, event.Life}, event.Run}
		switch event.Kind {
		case Started:
			r := &Run{Start: event, End: e.End, Ending: Ended}
			if l, ok := e.Lives[key.life]; ok {
				r.End = l.To
			}
			open[key] = r
			e.Runs = append(e.Runs, r)
		case Acked, Nacked, Lost, Closed:
			if r, ok := open[key]; ok {
				r.End, r.Ending, r.Finished = event.Mono, event.Kind, true
			}
		}
	}
}

// siftAway finds when a process could not renew its leases: stopped by us, not scheduled by the machine, or cut off.
func (e *Evidence) siftAway() {
	stopped := make(map[life]time.Duration)
	for _, event := range e.Events {
		key := life{event.Process, event.Life}
		switch event.Kind {
		case Stopped:
			if _, ok := stopped[key]; !ok { // by another fault
				stopped[key] = event.Mono
			}
		case Continued, Ended, Died:
			if from, ok := stopped[key]; ok {
				e.Away[event.Process] = append(e.Away[event.Process], Span{from, event.Mono})
				delete(stopped, key)
			}
		case Stalled:
			e.Away[event.Process] = append(e.Away[event.Process], Span{event.Mono - event.Took, event.Mono})
		}
	}
	for _, w := range e.Faults {
		for _, process := range w.Isolates {
			e.Away[process] = append(e.Away[process], w.Span)
		}
	}
	for process, spans := range e.Away {
		// A living holder renews every third of ClaimMinIdle: between two absences closer than that it may not have come to it.
		e.Away[process] = merge(spans, e.Rules.ClaimMinIdle/3)
	}
}

// merge makes one of spans that are less than gap apart.
func merge(spans []Span, gap time.Duration) []Span {
	slices.SortFunc(spans, func(a, b Span) int { return cmp.Compare(a.From, b.From) })
	var merged []Span
	for _, s := range spans {
		if n := len(merged); n > 0 && s.From-merged[n-1].To < gap {
			merged[n-1].To = max(merged[n-1].To, s.To)
			continue
		}
		merged = append(merged, s)
	}
	return merged
}

// tells whether the fault may lose what the topic had.
func (w *Window) losesOf(topic string) bool {
	return slices.Contains(w.Loses, topic) || slices.Equal(w.Loses, everything)
}

// byEntry returns the runs of each entry, in the order of their beginnings.
func (e *Evidence) byEntry() map[entryKey][]*Run {
	all := make(map[entryKey][]*Run)
	for _, r := range e.Runs {
		all[r.key()] = append(all[r.key()], r)
	}
	return all
}
