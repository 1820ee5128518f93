package sim

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Without has the numbers of what is left out of a schedule, as lists of numbers and
// ranges: "1-3,7".
type Without struct{ Faults, Calls, Consumers, Producers, Delays string }

// IsZero reports whether nothing is left out.
func (w Without) IsZero() bool { return w == Without{} }

// Apply returns the schedule without them. Everything else is unchanged, times included.
func (w Without) Apply(s *Schedule) *Schedule {
	less := *s
	less.Faults = leave(s.Faults, w.Faults, func(f Fault) int { return f.Number })
	less.Calls = leave(s.Calls, w.Calls, func(c Call) int { return c.Number })
	less.Consumers = leave(s.Consumers, w.Consumers, func(c Consumer) int { return c.Number })
	less.Producers = leave(s.Producers, w.Producers, func(p Producer) int { return p.Number })
	less.Delays = leave(s.Delays, w.Delays, func(d Delay) int { return d.Number })
	return &less
}

func leave[T any](all []T, list string, number func(T) int) []T {
	numbers := parseList(list)
	return slices.DeleteFunc(slices.Clone(all), func(v T) bool { return slices.Contains(numbers, number(v)) })
}

func parseList(list string) []int {
	var numbers []int
	for _, part := range strings.Split(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		first, err := strconv.Atoi(from)
		if err != nil {
			continue
		}
		last := first
		if isRange {
			last, _ = strconv.Atoi(to)
		}
		for n := first; n <= last; n++ {
			numbers = append(numbers, n)
		}
	}
	return numbers
}

func formatList(numbers []int) string {
	slices.Sort(numbers)
	var parts []string
	for i := 0; i < len(numbers); {
		j := i
		for j+1 < len(numbers) && numbers[j+1] == numbers[j]+1 {
			j++
		}
		part := strconv.Itoa(numbers[i])
		if j > i {
			part += "-" + strconv.Itoa(numbers[j])
		}
		parts = append(parts, part)
		i = j + 1
	}
	return strings.Join(parts, ",")
}

// A shrinker removes as much of a schedule as it can while it still fails.
type shrinker struct {
	schedule *Schedule
	fails    func(*Schedule) bool
	tries    int // that are left
	out      [5][]int
}

// Shrink returns what can be left out while fails is true. It calls fails at most tries
// times.
func Shrink(s *Schedule, tries int, fails func(*Schedule) bool) Without {
	k := &shrinker{schedule: s, fails: fails, tries: tries}
	numbers := [5][]int{}
	for _, f := range s.Faults {
		numbers[0] = append(numbers[0], f.Number)
	}
	for _, c := range s.Calls {
		numbers[1] = append(numbers[1], c.Number)
	}
	for _, c := range s.Consumers {
		numbers[2] = append(numbers[2], c.Number)
	}
	for _, p := range s.Producers {
		numbers[3] = append(numbers[3], p.Number)
	}
	for _, d := range s.Delays {
		numbers[4] = append(numbers[4], d.Number)
	}
	for round := 0; round < 2; round++ { // removals of one round may enable more in the next
		for of := range numbers {
			k.shrink(of, numbers[of])
		}
	}
	return k.without()
}

func (k *shrinker) without() Without {
	return Without{formatList(k.out[0]), formatList(k.out[1]), formatList(k.out[2]), formatList(k.out[3]), formatList(k.out[4])}
}

// shrink tries to remove halves, then quarters, and finally single ones.
func (k *shrinker) shrink(of int, all []int) {
	for size := (len(all) + 1) / 2; size >= 1; size /= 2 {
		left := slices.DeleteFunc(slices.Clone(all), func(n int) bool { return slices.Contains(k.out[of], n) })
		for chunk := range slices.Chunk(left, size) {
			if k.tries <= 0 {
				return
			}
			k.tries--
			before := k.out[of]
			k.out[of] = append(slices.Clone(before), chunk...)
			if less := k.without().Apply(k.schedule); !less.served() || !k.fails(less) {
				k.out[of] = before
			}
		}
	}
}

// served reports whether each group has a consumer; without one every rule is broken.
func (s *Schedule) served() bool {
	for g := range s.Groups {
		if !slices.ContainsFunc(s.Consumers, func(c Consumer) bool { return slices.Contains(c.Groups, g) }) {
			return false
		}
	}
	return true
}

// Describe lists the processes of a schedule, and its faults.
func (s *Schedule) Describe() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: server %d, load %v, latency %v, topics %v\n", s.Seed, s.Version, s.Load, s.Latency, s.Topics)
	for _, g := range s.Groups {
		fmt.Fprintf(&b, "group %+v\n", g)
	}
	for _, c := range s.Consumers {
		fmt.Fprintf(&b, "consumer %+v\n", c)
	}
	for _, p := range s.Producers {
		fmt.Fprintf(&b, "producer %+v\n", p)
	}
	if len(s.Calls) <= 40 {
		for _, c := range s.Calls {
			fmt.Fprintf(&b, "call %d at %v: producer %d publishes %v to %s\n", c.Number, c.At, c.Producer, c.UUIDs, c.Topic)
		}
	} else {
		fmt.Fprintf(&b, "%d calls\n", len(s.Calls))
	}
	if len(s.Delays) <= 40 {
		for _, d := range s.Delays {
			fmt.Fprintf(&b, "%v\n", d)
		}
	} else {
		fmt.Fprintf(&b, "%d delays\n", len(s.Delays))
	}
	for _, f := range s.Faults {
		fmt.Fprintf(&b, "%v\n", f)
	}
	return b.String()
}

// GoString is the entry of a regression table.
func (w Without) GoString() string {
	var parts []string
	for _, f := range []struct{ name, list string }{
		{"Faults", w.Faults}, {"Calls", w.Calls}, {"Consumers", w.Consumers}, {"Producers", w.Producers},
		{"Delays", w.Delays},
	} {
		if f.list != "" {
			parts = append(parts, fmt.Sprintf("%s: %q", f.name, f.list))
		}
	}
	return "Without{" + strings.Join(parts, ", ") + "}"
}
