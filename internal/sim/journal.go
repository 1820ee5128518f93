package sim

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// everyGroup says that an event is part of the evidence of all groups.
const everyGroup = -1

// A line is an event, and its group.
type line struct {
	group int
	rules.Event
	text string // a line of the library's log instead of an event
}

// A journal is what happened, in the order of time.
type journal struct {
	began time.Time

	mu    sync.Mutex
	lines []line
}

func (j *journal) add(group int, e rules.Event) {
	j.put(line{group: group, Event: e})
}

func (j *journal) put(l line) {
	j.mu.Lock()
	defer j.mu.Unlock()
	l.Wall = time.Now()
	l.Mono = l.Wall.Sub(j.began) + time.Nanosecond // 0 means never to the rules
	j.lines = append(j.lines, l)
}

func (j *journal) len() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.lines)
}

// events returns the group's evidence.
func (j *journal) events(group int) []rules.Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	var events []rules.Event
	struck, ended := make(map[int]bool), make(map[string]bool)
	for _, l := range j.lines {
		if l.text != "" || l.group != everyGroup && l.group != group {
			continue
		}
		switch life := fmt.Sprint(l.Process, "/", l.Life); l.Kind {
		case rules.Injected:
			struck[l.Strike.Number] = true
		case rules.Healed:
			if !struck[l.Strike.Number] {
				continue // it is about another group
			}
		case rules.Ended, rules.Died: // first for this group, then as a whole
			if ended[life] {
				continue
			}
			ended[life] = true
		}
		events = append(events, l.Event)
	}
	return events
}

func (l line) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%12s ", l.Mono.Round(time.Microsecond))
	if l.text != "" {
		b.WriteString(l.text)
		return b.String()
	}
	if l.group != everyGroup {
		fmt.Fprintf(&b, "%d ", l.group)
	} else {
		b.WriteString("  ")
	}
	who := l.Process
	if l.Life > 0 {
		who = fmt.Sprintf("%s.%d", l.Process, l.Life)
	}
	fmt.Fprintf(&b, "%-14s %-10s", who, l.Kind)
	for _, part := range []string{l.Topic, l.ID, l.UUID, strings.Join(l.UUIDs, " ")} {
		if part != "" {
			b.WriteString(" " + part)
		}
	}
	if l.Count > 0 {
		fmt.Fprintf(&b, " delivery %d", l.Count)
	}
	if l.Run > 0 {
		fmt.Fprintf(&b, " run %d", l.Run)
	}
	for _, uuid := range slices.Sorted(maps.Keys(l.Delays)) {
		fmt.Fprintf(&b, " %s in %v", uuid, l.Delays[uuid])
	}
	if l.Kind == rules.Changing && l.Due == 0 {
		b.WriteString(" cancel")
	} else if l.Kind == rules.Changing {
		fmt.Fprintf(&b, " due %d", l.Due)
	}
	if l.Kind == rules.Clocked {
		fmt.Fprintf(&b, " server's clock %d", (l.Mono + l.Clock).Milliseconds())
	}
	if l.Consumer != "" {
		b.WriteString(" as " + l.Consumer)
	}
	if s := l.Strike; s != nil {
		fmt.Fprintf(&b, "%d: %s %v", s.Number, s.Fault, s.Target)
	}
	if l.Error != "" {
		fmt.Fprintf(&b, " (%s)", l.Error)
	}
	return b.String()
}

// A logger writes a process's log into the journal.
type logger struct {
	journal *journal
	name    string
	fields  watermill.LogFields
	verbose bool
}

// logger returns the process's logger. It keeps only errors, unless the journal is to be
// printed.
func (s *simulation) logger(n *node) watermill.LoggerAdapter {
	return logger{&s.journal, fmt.Sprintf("%s.%d", n.name, n.life), nil, s.options.Verbose}
}

// logged reports whether the library has logged an error with these words.
func (j *journal) logged(words string) bool {
	return slices.ContainsFunc(j.lines, func(l line) bool { return strings.Contains(l.text, words) })
}

func (l logger) write(level, msg string, err error, fields watermill.LogFields) {
	text := fmt.Sprintf("  %-14s %s %s", l.name, level, msg)
	if err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n") // a panic's has a stack
		text += ": " + first
	}
	fields = l.fields.Add(fields)
	for _, key := range []string{"topic", "xid", "deliveries", "entries", "start_id"} {
		if v, ok := fields[key]; ok {
			text += fmt.Sprintf(" %s=%v", key, v)
		}
	}
	l.journal.put(line{text: text})
}

func (l logger) Error(msg string, err error, fields watermill.LogFields) {
	l.write("ERROR", msg, err, fields)
}

func (l logger) Info(msg string, fields watermill.LogFields) {
	if l.verbose {
		l.write("info", msg, nil, fields)
	}
}

func (l logger) Debug(msg string, fields watermill.LogFields) {
	if l.verbose {
		l.write("debug", msg, nil, fields)
	}
}

func (logger) Trace(string, watermill.LogFields) {}

func (l logger) With(fields watermill.LogFields) watermill.LoggerAdapter {
	l.fields = l.fields.Add(fields)
	return l
}
