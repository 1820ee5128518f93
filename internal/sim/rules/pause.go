package rules

import (
	"cmp"
	"slices"
	"time"
)

// RulePaused: a handler began although its group was paused.
const RulePaused = "begun in a pause"

// A pauseSpan is a pause, from when Pause has returned until Resume was called.
type pauseSpan struct {
	Span
	topic string
}

func (e *Evidence) pauses() (spans []pauseSpan) {
	for _, event := range e.Events {
		switch event.Kind {
		case Paused:
			spans = append(spans, pauseSpan{Span{event.Mono, e.End}, event.Topic})
		case Resuming:
			for i := range spans {
				if spans[i].topic == event.Topic && spans[i].To == e.End {
					spans[i].To = event.Mono
				}
			}
		}
	}
	return spans
}

// paused: no handler begins later than Rules.PauseBound after its group was paused. Whoever cannot reach Redis has as long
// once it can again, and what Redis loses of the pause ends it.
func (c *checker) paused() {
	if c.Rules.PauseBound == 0 {
		return
	}
	for _, p := range c.pauses() {
		end := min(p.To, c.pauseLost(p))
		for _, r := range c.Runs {
			if r.Start.Topic != p.topic || r.Start.Mono < p.From || r.Start.Mono >= end {
				continue
			}
			if known := c.knows(r.Start.Process, p); r.Start.Mono > known {
				c.violate(RulePaused, r.key(), r.Start.UUID, "paused at %v, which %s had to know by %v, it was started at %v",
					p.From, r.Start.Process, known, r.Start.Mono)
			}
		}
	}
}

// pauseLost returns when Redis may have lost the pause.
func (c *checker) pauseLost(p pauseSpan) time.Duration {
	lost := forever
	for _, f := range c.Faults {
		if f.loses(p.topic) && !f.Group && !f.Stream && f.To+late >= p.From {
			lost = min(lost, f.From)
		}
	}
	return lost
}

// knows returns by when the process must know of the pause.
func (c *checker) knows(process string, p pauseSpan) time.Duration {
	trouble := slices.Clone(c.Away[process])
	for _, f := range c.Faults {
		if f.ails(p.topic) && !f.Pauses {
			trouble = append(trouble, f.Span)
		}
	}
	slices.SortFunc(trouble, func(a, b Span) int { return cmp.Compare(a.From, b.From) })
	known := p.From + c.Rules.PauseBound
	for _, span := range trouble {
		if recovered := span.To + c.Rules.PauseRecovery; span.From <= known && recovered > p.From {
			known = max(known, recovered+c.Rules.PauseBound)
		}
	}
	return known
}
