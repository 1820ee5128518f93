package sim

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var (
	seeds  = flag.Int("seeds", 200, "how many seeds TestSeeds runs")
	from   = flag.Uint64("from", 1, "its first seed")
	one    = flag.Uint64("seed", 0, "the only seed of TestSeeds; with -v it prints everything that happens")
	shrink = flag.Int("shrink", 150, "how many runs a failing seed is shrunk with; 0: not at all")
	keep   = flag.String("keep", "", "a directory for what happened in the seeds that fail")
	twice  = flag.Bool("twice", false, "each consumer subscribes twice to each topic")
	leftIn = flag.String("without", "", "what the only seed is run without: faults/calls/consumers/producers/delays, such as 1-3,5//2//")
)

func TestSeeds(t *testing.T) {
	var total totals
	t.Cleanup(func() { total.print(t) })
	first, number := *from, *seeds
	if *one != 0 {
		first, number = *one, 1
	}
	t.Run("all", func(t *testing.T) {
		for seed := first; seed < first+uint64(number); seed++ {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				t.Parallel()
				check(t, seed, parseWithout(*leftIn), &total)
			})
		}
	})
}

func parseWithout(text string) Without {
	parts := append(strings.Split(text, "/"), "", "", "", "")
	return Without{parts[0], parts[1], parts[2], parts[3], parts[4]}
}

// check runs a seed, and shrinks it if it breaks a rule.
func check(t *testing.T, seed uint64, without Without, total *totals) {
	schedule := without.Apply(Draw(seed))
	schedule.Twice = *twice
	result := runWatched(t, schedule, Options{Verbose: *one != 0 || *keep != ""})
	total.add(result.Stats)
	if *one != 0 && testing.Verbose() {
		fmt.Println(schedule.Describe())
		fmt.Println(strings.Join(result.Journal, "\n"))
	}
	if len(result.Violations) == 0 {
		return
	}
	for _, v := range result.Violations {
		t.Error(v)
	}
	if *keep != "" {
		all := schedule.Describe() + strings.Join(result.Journal, "\n") + "\n" + fmt.Sprintln(result.Violations)
		require.NoError(t, os.WriteFile(filepath.Join(*keep, fmt.Sprintf("seed-%d.txt", seed)), []byte(all), 0o600))
	}
	if *shrink == 0 || *one == 0 {
		t.Logf("go test -run TestSeeds -seed %d -v prints what happened, and -shrink 150 shrinks it", seed)
		return
	}
	rule := result.Violations[0].Rule
	out := Shrink(schedule, *shrink, func(s *Schedule) bool {
		return slices.ContainsFunc(runWatched(t, s, Options{}).Violations, func(v Violation) bool { return v.Rule == rule })
	})
	less := out.Apply(schedule)
	t.Logf("%q is broken by this too:\n{%q, %d, %#v},\n%s", rule, rule, seed, out, less.Describe())
	last := runWatched(t, less, Options{Verbose: true})
	t.Log("\n" + strings.Join(last.Journal, "\n"))
	for _, v := range last.Violations {
		t.Log(v)
	}
}

// stuck is how long a run may take in real time.
const stuck = 2 * time.Minute

// runWatched ends the program if the bubble's clock stops because a goroutine of the run
// waits for something that is not durably blocking.
func runWatched(t *testing.T, schedule *Schedule, options Options) Result {
	timer := time.AfterFunc(stuck, func() {
		stacks := make([]byte, 64<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		fmt.Fprintf(os.Stderr, "seed %d is stuck; is a mutex held while something waits?\n%s\n", schedule.Seed, stacks)
		os.Exit(2)
	})
	defer timer.Stop()
	return Run(t, schedule, options)
}

// totals sums up the seeds.
type totals struct {
	mu sync.Mutex
	Stats
}

func (s *totals) add(other Stats) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Faults == nil {
		s.Faults, s.Violations = make(map[string]int), make(map[string]int)
	}
	s.Seeds += other.Seeds
	s.Virtual += other.Virtual
	s.Messages += other.Messages
	s.Delayed += other.Delayed
	s.Cancelled += other.Cancelled
	s.Rescheduled += other.Rescheduled
	s.Deliveries += other.Deliveries
	s.Duplicates += other.Duplicates
	s.Dead += other.Dead
	s.Lost += other.Lost
	s.Crashes += other.Crashes
	for kind, n := range other.Faults {
		s.Faults[kind] += n
	}
	for rule, n := range other.Violations {
		s.Violations[rule] += n
	}
}

func (s *totals) print(t *testing.T) {
	t.Logf("%d seeds, %.1f virtual hours, %d messages (%d delayed, %d cancelled, %d rescheduled), %d deliveries, %d handled again, %d dead, %d lost by Redis, %d crashes by messages",
		s.Seeds, s.Virtual.Hours(), s.Messages, s.Delayed, s.Cancelled, s.Rescheduled, s.Deliveries, s.Duplicates, s.Dead, s.Lost, s.Crashes)
	for _, kind := range slices.Sorted(maps.Keys(s.Faults)) {
		t.Logf("%6d times %s", s.Faults[kind], kind)
	}
	for _, rule := range slices.Sorted(maps.Keys(s.Violations)) {
		t.Logf("%6d VIOLATIONS of %q", s.Violations[rule], rule)
	}
}

// A seed gives the same schedule and verdict each time.
func TestRepeats(t *testing.T) {
	for seed := uint64(1); seed <= 5; seed++ {
		require.Equal(t, Draw(seed), Draw(seed))
		a, b := runWatched(t, Draw(seed), Options{}), runWatched(t, Draw(seed), Options{})
		require.Equal(t, a.Stats.Violations, b.Stats.Violations)
		require.Equal(t, a.Stats.Messages, b.Stats.Messages)
	}
}
