package main

import (
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// report prints a run: its numbers, a row for each fault, and the story of each violation.
func report(out io.Writer, o Outcome) {
	v := o.Verdict
	fmt.Fprintf(out, "\nmessages: %d acknowledged, %d of them after their outcome was unknown; %d of unknown outcome, %d refused\n",
		v.Published, v.Repeated, v.Unknown, v.Refused)
	fmt.Fprintf(out, "delayed: %d of these messages\n", v.Delayed)
	fmt.Fprintf(out, "handled: %d; dead: %d; handled again: %d; at once by a holder that was away, or whose lease Redis lost: %d\n",
		v.Handled, v.Dead, len(v.Duplicates), v.ExcusedOverlaps)
	fmt.Fprintf(out, "processes ended by a message: %d; innocent, but in flight by itself in each of their crashes: %d\n", v.Crashes, v.Victims)
	fmt.Fprintf(out, "lost by Redis itself: %d\n", len(v.LostByRedis))
	for _, l := range v.LostByRedis {
		fmt.Fprintf(out, "  fault %d, %s: %s of %s\n", l.Fault.Number, l.Fault.Fault, l.UUID, l.Topic)
	}
	fmt.Fprintln(out)
	printTable(out, o.rows())
	fmt.Fprintf(out, "\nviolations: %d\n", len(v.Violations))
	for i, violation := range v.Violations {
		fmt.Fprintf(out, "\n%s\n", violation)
		if i < stories {
			o.story(out, violation)
		}
	}
}

// stories is how many violations are told in full: the first ones explain the others.
const stories = 10

// story prints everything in the logs about the violation's entry, and what happened to processes and Redis around that time.
func (o Outcome) story(out io.Writer, v rules.Violation) {
	e := o.Evidence
	about := func(event rules.Event) bool {
		switch {
		case v.Process != "":
			return event.Process == v.Process && event.UUID == "" && event.UUIDs == nil
		case v.ID != "" && event.Topic == v.Topic && event.ID == v.ID:
			return true
		}
		return v.UUID != "" && (event.UUID == v.UUID || slices.Contains(event.UUIDs, v.UUID))
	}
	var first, last time.Duration
	processes := make(map[string]bool)
	for _, event := range e.Events {
		if about(event) {
			if first == 0 {
				first = event.Mono
			}
			last = event.Mono
			processes[event.Process] = true
		}
	}
	for _, event := range e.Events {
		near := event.Mono >= first-3*e.Rules.ClaimMinIdle && event.Mono <= last+e.Rules.ClaimMinIdle
		circumstance := event.Topic == "" && event.Kind != rules.Sampled && (processes[event.Process] || event.Strike != nil)
		if about(event) || near && circumstance {
			printEvent(out, e, event)
		}
	}
	for _, p := range e.Final[v.Topic].Pending {
		if p.ID == v.ID {
			fmt.Fprintf(out, "  in the end pending with %s, delivered %d times\n", p.Consumer, p.Count)
		}
	}
}

func printEvent(out io.Writer, e *rules.Evidence, event rules.Event) {
	fmt.Fprintf(out, "  %9.3fs %s", (event.Mono - e.Events[0].Mono).Seconds(), event.Kind)
	if event.Strike != nil {
		fmt.Fprintf(out, " fault %d %s %v\n", event.Strike.Number, event.Strike.Fault, event.Strike.Target)
		return
	}
	fmt.Fprintf(out, " %s/%d", event.Process, event.Life)
	if event.Topic != "" {
		fmt.Fprintf(out, " %s %s %s", event.Topic, event.ID, event.UUID)
	}
	if event.Run != 0 {
		fmt.Fprintf(out, " run %d count %d as %s", event.Run, event.Count, event.Consumer)
	}
	if len(event.UUIDs) > 0 {
		fmt.Fprintf(out, " %d messages", len(event.UUIDs))
	}
	if event.Took != 0 {
		fmt.Fprintf(out, " for %v", event.Took)
	}
	fmt.Fprintf(out, " %s\n", event.Error)
}

// A Row sums up the messages under one fault.
type Row struct {
	Deployment string
	Fault      string
	Times      int
	Messages   int // acknowledged from one of these faults to the next fault
	Lost       int // violations: what Redis kept
	ByRedis    int
	Duplicates int
	Recovery   time.Duration // the longest; unmeasured: other faults were under way whenever it ended
	Others     int           // violations that are no losses
}

const unmeasured time.Duration = -1

func (r Row) recovery() string {
	if r.Recovery == unmeasured {
		return ""
	}
	return fmt.Sprintf("%.1f s", r.Recovery.Seconds())
}

// empty reports whether the row has only the load before a fault.
func (r Row) empty() bool { return r.Times == 0 && r.Lost+r.Others+r.ByRedis+r.Duplicates == 0 }

func (o Outcome) rows() []Row {
	e := o.Evidence
	byName := make(map[string]*Row)
	var rows []*Row
	row := func(name string) *Row {
		r, ok := byName[name]
		if !ok {
			r = &Row{Deployment: o.Settings.Deployment, Fault: name, Recovery: unmeasured}
			byName[name] = r
			rows = append(rows, r)
		}
		return r
	}
	at := func(t time.Duration) *Row { return row(faultAt(e, t)) }
	if len(e.Faults) == 0 {
		row(noFault)
	}
	for _, w := range e.Faults {
		r := row(w.Fault)
		r.Times++
		r.Recovery = max(r.Recovery, recovery(e, w))
	}
	for _, m := range e.Messages {
		if m.Outcome == rules.Published {
			at(m.At).Messages++
		}
	}
	for _, d := range o.Verdict.Duplicates {
		at(d.At).Duplicates++
	}
	for _, l := range o.Verdict.LostByRedis {
		row(l.Fault.Fault).ByRedis++
	}
	for _, v := range o.Verdict.Violations {
		r := at(lastHeard(e, v))
		if v.Rule == rules.RuleLost || v.Rule == rules.RuleVanished || v.Rule == rules.RulePending {
			r.Lost++
		} else {
			r.Others++
		}
	}
	all := make([]Row, len(rows))
	for i, r := range rows {
		all[i] = *r
	}
	slices.SortStableFunc(all, func(a, b Row) int { return b.Times - a.Times })
	return all
}

const noFault = "none yet"

// faultAt returns the last fault before the time.
func faultAt(e *rules.Evidence, t time.Duration) string {
	name := noFault
	for _, w := range e.Faults {
		if w.From <= t {
			name = w.Fault
		}
	}
	return name
}

// lastHeard returns when the violation's entry was last in a log.
func lastHeard(e *rules.Evidence, v rules.Violation) time.Duration {
	var last time.Duration
	for _, event := range e.Events {
		if v.ID != "" && event.ID == v.ID && event.Topic == v.Topic || v.UUID != "" && slices.Contains(event.UUIDs, v.UUID) {
			last = event.Mono
		}
	}
	return last
}

// recovery returns the time from the fault's end until each surviving consumer has received a message again, and a message
// published since has been handled. Of overlapping faults the last one to end has it. The time of other faults does not count:
// a consumer that had nothing to do before the next fault does not make this one's recovery longer.
func recovery(e *rules.Evidence, w *rules.Window) time.Duration {
	if slices.ContainsFunc(e.Faults, func(other *rules.Window) bool { return other.From <= w.To && other.To > w.To }) {
		return unmeasured
	}
	until := e.End
	for _, next := range e.Faults {
		if next.From > w.To {
			until = next.From
			break
		}
	}
	began := make(map[rules.LifeID]time.Duration)
	var flows time.Duration
	for _, r := range e.Runs {
		if r.Start.Mono < w.To {
			continue
		}
		if _, ok := began[r.LifeID()]; !ok {
			began[r.LifeID()] = calm(e, w.To, r.Start.Mono)
		}
		m, took := e.Messages[r.Start.UUID], calm(e, w.To, r.End)
		if m != nil && m.From > w.To && r.Ending == rules.Acked && (flows == 0 || took < flows) {
			flows = took
		}
	}
	longest := flows
	for key, l := range e.Lives {
		if l.From <= w.To && l.To > until {
			longest = max(longest, began[key])
		}
	}
	return longest
}

// calm returns how much of a span was free of faults that began within it.
func calm(e *rules.Evidence, from, to time.Duration) time.Duration {
	var calm time.Duration
	at := from
	for _, f := range e.Faults { // in the order of their beginnings
		if f.From <= from || f.From >= to {
			continue
		}
		calm += max(0, f.From-at)
		at = max(at, f.To)
	}
	return calm + max(0, to-at)
}

func printTable(out io.Writer, rows []Row) {
	fmt.Fprintln(out, "| deployment | fault | times | messages | lost | other violations | lost by Redis | handled again | longest recovery |")
	fmt.Fprintln(out, "|---|---|--:|--:|--:|--:|--:|--:|--:|")
	for _, r := range rows {
		fmt.Fprintf(out, "| %s | %s | %d | %d | %d | %d | %d | %d | %s |\n",
			r.Deployment, r.Fault, r.Times, r.Messages, r.Lost, r.Others, r.ByRedis, r.Duplicates, r.recovery())
	}
}
