package rules

import (
	"cmp"
	"slices"
	"time"
)

// A Kind says what happened.
type Kind string

const (
	// Of a producer, with UUIDs.
	Publishing Kind = "publishing" // Publish is about to be called: if nothing follows, its outcome is unknown
	Published  Kind = "published"  // nil: acknowledged
	Unknown    Kind = "unknown"    // ErrOutcomeUnknown
	Refused    Kind = "refused"    // any other error: nothing is stored

	// Of who changes delayed messages, with UUID. Run counts these calls of a process.
	Changing Kind = "changing"  // Cancel, or with Due Reschedule, is about to be called: if nothing follows, its outcome is unknown
	Changed  Kind = "changed"   // nil
	NotFound Kind = "not found" // *NotFoundError
	Unsure   Kind = "unsure"    // any other error: it may have been changed

	// Of a consumer. A run of the handler is one Started and at most one of the next four.
	Started Kind = "started"
	Acked   Kind = "acked"   // the handler returns nil
	Nacked  Kind = "nacked"  // the handler returns an error; Delay is the time until the retry
	Lost    Kind = "lost"    // the handler gave up because of ErrLeaseLost
	Closed  Kind = "closed"  // the handler gave up because the subscription closes
	Crashed Kind = "crashed" // the handler ends its process
	Dead    Kind = "dead"    // OnDead was called
	// Subscribed: the process consumes Topic. Without it a process counts as a consumer of the topic from its first run on.
	Subscribed Kind = "subscribed"

	// Of the server, where it can be asked. The rule of progress is more exact with them.
	Stored    Kind = "stored"    // the entry ID with UUID is in Topic's stream
	Delivered Kind = "delivered" // the entry ID became pending in the name of Process and Life, with that Count; also by a claim
	Trimmed   Kind = "trimmed"   // the entry ID with UUID left the stream by retention or DeleteAcked

	// Clocked: the server's clock shows Mono and Clock, until the next such event. Without any, nothing is judged by that clock.
	Clocked Kind = "clocked"

	// Of who pauses the group on Topic.
	Paused   Kind = "paused"   // Pause has returned nil
	Resuming Kind = "resuming" // Resume is about to be called

	// Of any process of ours.
	Stalled Kind = "stalled" // it did not run for Took, by the signal of a fault or by a busy machine
	// Reopened: the process has closed all of its subscriptions, which took Took, and opens others.
	Reopened Kind = "reopened"
	Sampled  Kind = "sampled"

	// Of the runner. Each process has a Spawned before anything else is said of it.
	Spawned   Kind = "spawned" // Process lives
	Closing   Kind = "closing" // Process is told to end in order: Close is called
	Ended     Kind = "ended"   // Process is gone: Close returned, or, with an Error, it was killed
	Died      Kind = "died"    // Process is gone, and nobody asked it to
	Stopped   Kind = "stopped" // SIGSTOP
	Continued Kind = "continued"
	Injected  Kind = "injected" // of a fault: Strike
	Healed    Kind = "healed"
	Settled   Kind = "settled"
)

// An Event is one line of a journal.
type Event struct {
	Wall time.Time     `json:"wall"` // for the reader: no rule looks at it
	Mono time.Duration `json:"mono"` // on a clock that all processes share and nobody sets
	Kind Kind          `json:"kind"`

	Process string `json:"process"` // "consumer-2": the one that the event is about
	Life    int    `json:"life,omitempty"`
	PID     int    `json:"pid,omitempty"`

	Topic    string   `json:"topic,omitempty"`
	ID       string   `json:"id,omitempty"` // the entry's
	UUID     string   `json:"uuid,omitempty"`
	UUIDs    []string `json:"uuids,omitempty"`
	Run      int64    `json:"run,omitempty"` // counts the handler runs of a process
	Count    int64    `json:"count,omitempty"`
	Consumer string   `json:"consumer,omitempty"`
	Error    string   `json:"error,omitempty"`

	Took  time.Duration `json:"took,omitempty"`
	Delay time.Duration `json:"delay,omitempty"` // of Nacked: until the retry is due

	Delays map[string]time.Duration `json:"delays,omitempty"` // of Publishing, by UUID: those greater than 0
	Due    int64                    `json:"due,omitempty"`    // of Changing: milliseconds by the server's clock
	Clock  time.Duration            `json:"clock,omitempty"`  // of Clocked, since 1970

	Sample *Sample `json:"sample,omitempty"`
	Strike *Effect `json:"strike,omitempty"`
}

// A Sample is a size: of a process of ours, or of what Redis has of us. No rule looks at it.
type Sample struct {
	Goroutines int `json:"goroutines,omitempty"`
	Heap       int `json:"heap,omitempty"` // bytes after a collection

	Connections int `json:"connections,omitempty"`
	Pending     int `json:"pending,omitempty"`
	Consumers   int `json:"consumers,omitempty"` // names in the groups
}

// An Effect is what a fault may do: what is more than that is not its doing.
type Effect struct {
	Number int      `json:"number"` // in its run
	Fault  string   `json:"fault"`
	Target []string `json:"target,omitempty"`
	// Loses are the topics of which Redis itself may lose what it acknowledged.
	Loses []string `json:"loses,omitempty"`
	// Isolates are the processes that cannot reach Redis, though Redis is there for others.
	Isolates []string `json:"isolates,omitempty"`
	// Breaks: replies may get lost on their way.
	Breaks bool `json:"breaks,omitempty"`
	// Destroys: it surely loses all that there is of Loses. Without it Redis may lose the last seconds.
	Destroys bool `json:"destroys,omitempty"`
	// Group: it is only the group that is lost, what was delivered and acked. The entries stay.
	Group bool `json:"group,omitempty"`
	// Stream: it is only the stream that is lost, and what was delayed and has been moved into it. The others wait as before.
	Stream bool `json:"stream,omitempty"`
	// Denies: permissions are missing.
	Denies bool `json:"denies,omitempty"`
	// Keeps, of a group: how far it had got is not lost, so that nothing that is settled is delivered again.
	Keeps bool `json:"keeps,omitempty"`
	// Held is, of a group that is destroyed, the holder of each pending entry.
	Held map[string]string `json:"held,omitempty"`

	// Local: it is about processes only, whose own events say what happens to them. Redis is well, for all others.
	Local bool `json:"local,omitempty"`
	// Ails are the topics whose server is not well while the fault lasts; none: all of them, unless it is Local or isolates.
	Ails []string `json:"ails,omitempty"`
	// Pauses: the group is paused on Ails. That is no excuse for what does not concern handlers.
	Pauses bool `json:"pauses,omitempty"`
	// Idle: idle times are wrong while it lasts. That holds up who takes over, and nobody else.
	Idle bool `json:"idle,omitempty"`
}

// Everything stands for all topics in an Effect.
var Everything = []string{"*"}

// loses reports whether the fault may lose what the topic had.
func (f *Effect) loses(topic string) bool {
	return slices.Contains(f.Loses, topic) || slices.Equal(f.Loses, Everything)
}

// ails reports whether the topic's server may not be well while the fault lasts.
func (f *Effect) ails(topic string) bool {
	switch {
	case len(f.Ails) > 0:
		return slices.Contains(f.Ails, topic) || slices.Equal(f.Ails, Everything)
	case f.loses(topic):
		return true
	}
	return !f.Local && len(f.Isolates) == 0
}

// Sort puts events in the order of time. Those of the same time stay in the order in which they are.
func Sort(events []Event) {
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.Mono, b.Mono) })
}
