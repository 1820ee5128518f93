package rules

import (
	"cmp"
	"slices"
	"time"
)

// A Span is some time.
type Span struct{ From, To time.Duration }

// Length returns how long it is.
func (s Span) Length() time.Duration { return s.To - s.From }

func sortSpans(spans []Span) {
	slices.SortFunc(spans, func(a, b Span) int { return cmp.Compare(a.From, b.From) })
}

// merge makes one of spans that are less than gap apart, or overlap.
func merge(spans []Span, gap time.Duration) []Span {
	sortSpans(spans)
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

// forever is after everything that evidence has.
const forever = time.Duration(1<<63 - 1)

// intersect returns what is in both. Each is in order and overlaps nowhere in itself, as the result.
func intersect(a, b []Span) []Span {
	var both []Span
	for i, j := 0, 0; i < len(a) && j < len(b); {
		if s := (Span{max(a[i].From, b[j].From), min(a[i].To, b[j].To)}); s.From < s.To {
			both = append(both, s)
		}
		if a[i].To < b[j].To {
			i++
		} else {
			j++
		}
	}
	return both
}

// without returns what is left of spans without the others. These may overlap, and are in no order.
func without(spans, others []Span) []Span {
	at := time.Duration(-1 << 63)
	var gaps []Span
	for _, s := range merge(slices.Clone(others), 0) {
		gaps = append(gaps, Span{at, s.From})
		at = s.To
	}
	return intersect(spans, append(gaps, Span{at, forever}))
}
