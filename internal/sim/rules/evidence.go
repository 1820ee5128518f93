package rules

import (
	"cmp"
	"slices"
	"time"
)

// Rules are what the checker must know of the consumers.
type Rules struct {
	ClaimMinIdle  time.Duration
	ClaimInterval time.Duration
	MaxRetries    int // as in goxstreams.Retry: 0 is no limit, -1 no retries
	Topics        map[string]Topic

	// Progress states that nothing starves. Nil: it is not stated.
	Progress *Progress

	// Delayed states how late delayed messages may be. Nil: it is not stated.
	Delayed *Delayed

	// PauseBound states how long after a group was paused a handler may still begin, and PauseRecovery what a process may take to
	// find its way back to Redis until it can know. 0: it is not stated.
	PauseBound, PauseRecovery time.Duration

	// CloseTimeout and CloseBound state that a process which is Closing has Ended within both together. CloseBound 0: it is
	// not stated.
	CloseTimeout, CloseBound time.Duration
}

// last returns the greatest count that a message is delivered with. ok is false if there is none.
func (r Rules) last() (count int64, ok bool) {
	return int64(max(r.MaxRetries, 0)) + 2, r.MaxRetries != 0
}

// takeover is the promised time from the end of a holder until others have what it held.
func (r Rules) takeover() time.Duration { return r.ClaimMinIdle*4/3 + r.handover() }

// handover is the promised time from a release until others have what was released.
func (r Rules) handover() time.Duration { return 2 * r.ClaimInterval }

// Evidence is the journal, sorted for the checker, and what Redis has in the end. It is about one consumer group.
type Evidence struct {
	Rules    Rules
	Events   []Event // in the order of time
	Final    map[string]TopicState
	Messages map[string]*Message // by UUID
	Runs     []*Run              // in the order of their beginnings
	Faults   []*Window
	Away     map[string][]Span // by process: when it did not run, or did not reach Redis
	Halted   map[string][]Span // by process: when it did not run
	Lives    map[LifeID]*Life
	Reopened []Span // when processes closed their subscriptions and lived on
	End      time.Duration
	clock    clock
}

// A Message is what a producer logged about it.
type Message struct {
	UUID, Topic string
	Outcome     Kind          // Published, Unknown, Refused
	From        time.Duration // the beginning of the first call
	Last        time.Duration // the beginning of the last one, which is the first one unless calls are repeated
	At          time.Duration // its end, or, of a call that never ended, its beginning
	Batch       []string
	Delay       time.Duration // 0: it is not delayed
	Changes     []*Change     // in the order of their beginnings
}

// A LifeID names one process of a place: the first, the second, and so on.
type LifeID struct {
	Process string
	Number  int
}

// A Life is when such a process lived.
type Life struct {
	From, To time.Duration
	Closing  time.Duration // when it was told to end; 0: never
	Over     bool          // it ended; else To is the end of the evidence
	Died     string        // by itself, and how
	Error    string        // what was said of its end; empty: it ended as it was told to
	Crashed  *Event        // the delivery that ended it
}

// A Run is one call of a handler.
type Run struct {
	Start    Event
	End      time.Duration
	Delay    time.Duration // of a nack: until its retry is due
	Ending   Kind          // Acked, Nacked, Lost, Closed; Ended: with its process
	Finished bool          // by an event of its own
}

func (r *Run) LifeID() LifeID { return LifeID{r.Start.Process, r.Start.Life} }

// A subscription has a consumer of its own; a fan-out has none, and there is one of a topic.
type subscription struct {
	LifeID
	topic, consumer string
}

func (r *Run) subscription() subscription {
	return subscription{r.LifeID(), r.Start.Topic, r.Start.Consumer}
}

// An entryKey is an entry's place in Redis.
type entryKey struct{ topic, id string }

func (r *Run) key() entryKey { return entryKey{r.Start.Topic, r.Start.ID} }

// A Window is a fault from its injection to its healing.
type Window struct {
	Effect
	Span
}

// Sift sorts the events of a journal.
func Sift(rules Rules, events []Event, final map[string]TopicState) *Evidence {
	e := &Evidence{
		Rules: rules, Events: events, Final: final,
		Messages: make(map[string]*Message), Away: make(map[string][]Span), Halted: make(map[string][]Span),
		Lives: make(map[LifeID]*Life),
	}
	Sort(e.Events)
	if n := len(events); n > 0 {
		e.End = events[n-1].Mono
	}
	e.siftFaults()
	e.siftLives()
	e.siftClock()
	e.siftMessages()
	e.siftChanges()
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
			m.Delay = max(m.Delay, event.Delays[uuid])
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
			w := &Window{Effect: *event.Strike, Span: Span{event.Mono, e.End}}
			byNumber[event.Strike.Number] = w
			e.Faults = append(e.Faults, w)
		case Healed:
			w := byNumber[event.Strike.Number]
			w.To = event.Mono
		}
	}
}

func (e *Evidence) siftLives() {
	for _, event := range e.Events {
		key := LifeID{event.Process, event.Life}
		switch event.Kind {
		case Spawned:
			e.Lives[key] = &Life{From: event.Mono, To: e.End}
		case Closing:
			if l := e.Lives[key]; l.Closing == 0 { // it may be told again
				l.Closing = event.Mono
			}
		case Reopened:
			e.Reopened = append(e.Reopened, Span{event.Mono - event.Took, event.Mono})
		case Crashed:
			if l, ok := e.Lives[key]; ok {
				l.Crashed = &event
			}
		case Ended, Died:
			l := e.Lives[key]
			l.To, l.Over, l.Error = event.Mono, true, event.Error
			if event.Kind == Died {
				l.Died = cmp.Or(event.Error, "exit status 0")
			}
		}
	}
}

func (e *Evidence) siftRuns() {
	type number struct {
		LifeID
		run int64
	}
	open := make(map[number]*Run)
	for _, event := range e.Events {
		key := number{LifeID{event.Process, event.Life}, event.Run}
		switch event.Kind {
		case Started:
			r := &Run{Start: event, End: e.End, Ending: Ended}
			if l, ok := e.Lives[key.LifeID]; ok {
				r.End = l.To
			}
			open[key] = r
			e.Runs = append(e.Runs, r)
		case Acked, Nacked, Lost, Closed:
			if r, ok := open[key]; ok {
				r.End, r.Ending, r.Finished, r.Delay = event.Mono, event.Kind, true, event.Delay
			}
		}
	}
}

// siftAway finds when a process could not renew its leases: stopped by us, not scheduled by the machine, or cut off.
func (e *Evidence) siftAway() {
	stopped := make(map[LifeID]time.Duration)
	for _, event := range e.Events {
		key := LifeID{event.Process, event.Life}
		switch event.Kind {
		case Stopped:
			if _, ok := stopped[key]; !ok { // by another fault
				stopped[key] = event.Mono
			}
		case Continued, Ended, Died:
			if from, ok := stopped[key]; ok {
				e.Halted[event.Process] = append(e.Halted[event.Process], Span{from, event.Mono})
				delete(stopped, key)
			}
		case Stalled:
			e.Halted[event.Process] = append(e.Halted[event.Process], Span{event.Mono - event.Took, event.Mono})
		}
	}
	for id, from := range stopped { // to the end
		e.Halted[id.Process] = append(e.Halted[id.Process], Span{from, e.End})
	}
	for process, spans := range e.Halted {
		e.Halted[process] = merge(spans, 0)
		e.Away[process] = slices.Clone(spans)
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

// Reach returns for how long the process could reach Redis between two times: it was there, and the topic's server was well.
func (e *Evidence) Reach(process, topic string, from, to time.Duration) (length time.Duration) {
	unreachable := slices.Clone(e.Away[process])
	for _, f := range e.Faults {
		if f.ails(topic) && !f.Idle {
			unreachable = append(unreachable, f.Span)
		}
	}
	for _, s := range without([]Span{{from, to}}, unreachable) {
		length += s.Length()
	}
	return length
}

// byEntry returns the runs of each entry, in the order of their beginnings.
func (e *Evidence) byEntry() map[entryKey][]*Run {
	all := make(map[entryKey][]*Run)
	for _, r := range e.Runs {
		all[r.key()] = append(all[r.key()], r)
	}
	return all
}
