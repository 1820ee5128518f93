package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A Kind says what happened.
type Kind string

const (
	// Of a producer, with UUIDs.
	Publishing Kind = "publishing" // Publish is about to be called: if nothing follows, its outcome is unknown
	Published  Kind = "published"  // nil: acknowledged
	Unknown    Kind = "unknown"    // ErrOutcomeUnknown
	Refused    Kind = "refused"    // any other error: nothing is stored

	// Of a consumer. A run of the handler is one Started and at most one of the next four.
	Started Kind = "started"
	Acked   Kind = "acked"   // the handler returns nil
	Nacked  Kind = "nacked"  // the handler returns an error
	Lost    Kind = "lost"    // the handler gave up because of ErrLeaseLost
	Closed  Kind = "closed"  // the handler gave up because the subscription closes
	Crashed Kind = "crashed" // the handler ends its process
	Dead    Kind = "dead"    // OnDead was called

	// Of any process of ours.
	Stalled Kind = "stalled" // it did not run for Took, by the signal of a fault or by a busy machine
	Sampled Kind = "sampled"

	// Of the runner.
	Spawned   Kind = "spawned" // Process lives
	Closing   Kind = "closing" // Process was sent SIGTERM
	Ended     Kind = "ended"   // Process is gone
	Died      Kind = "died"    // Process is gone, and nobody asked it to
	Stopped   Kind = "stopped" // SIGSTOP
	Continued Kind = "continued"
	Injected  Kind = "injected"
	Healed    Kind = "healed"
	Settled   Kind = "settled"
)

// An Event is one line of a log.
type Event struct {
	Wall time.Time     `json:"wall"`
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

	Took   time.Duration `json:"took,omitempty"`
	Sample *Sample       `json:"sample,omitempty"`
	Strike *Effect       `json:"strike,omitempty"`
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
	// Held is, of a group that is destroyed, the holder of each pending entry.
	Held map[string]string `json:"held,omitempty"`
}

// monotonic returns the time of the machine's clock that only goes forward. Unlike time.Time's it has a meaning in all processes.
func monotonic() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err) // every Linux has it
	}
	return time.Duration(now.Nano())
}

// A Journal is the log of one process. A line is one write to a file opened for appending: what was written before a SIGKILL is
// in the file, whole.
type Journal struct {
	file    *os.File
	process string
	life    int
}

func openJournal(dir, process string, life int) (*Journal, error) {
	file, err := os.OpenFile(filepath.Join(dir, process+".jsonl"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	return &Journal{file, process, life}, nil
}

// write adds the event, with its time and, unless it is about another process, its process. A process that cannot log what it
// does must not do it: it panics.
func (j *Journal) write(e Event) Event {
	e.Wall, e.Mono = time.Now().Round(0), monotonic()
	if e.Process == "" {
		e.Process, e.Life, e.PID = j.process, j.life, os.Getpid()
	}
	line, err := json.Marshal(e)
	if err == nil {
		_, err = j.file.Write(append(line, '\n'))
	}
	if err != nil {
		panic(fmt.Sprintf("journal: %v", err))
	}
	return e
}

func (j *Journal) close() error { return j.file.Close() }

// readJournals returns all events of a run, in the order of time.
func readJournals(dir string) ([]Event, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil {
		return nil, err
	}
	var events []Event
	for _, name := range files {
		if events, err = readJournal(name, events); err != nil {
			return nil, err
		}
	}
	sortEvents(events)
	return events, nil
}

func readJournal(name string, events []Event) ([]Event, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("%s: %w: %s", name, err, lines.Text())
		}
		events = append(events, e)
	}
	return events, lines.Err()
}

func sortEvents(events []Event) {
	slices.SortStableFunc(events, func(a, b Event) int { return int(a.Mono - b.Mono) })
}
