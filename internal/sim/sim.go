// Package sim runs the whole library in virtual time against a model of Redis in memory,
// with processes that die, a network that breaks and a server that forgets. A seed decides
// what happens, and package rules judges the result.
package sim

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/model"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// Options say what is reported of a run; they do not change it.
type Options struct {
	Verbose bool // keep the library's log too
}

// A Result is the result of a run.
type Result struct {
	Schedule   *Schedule
	Violations []Violation
	Journal    []string
	Stats      Stats
}

// A Violation is a broken rule and its group.
type Violation struct {
	Group string
	rules.Violation
}

func (v Violation) String() string { return v.Group + ": " + v.Violation.String() }

// Stats are totals.
type Stats struct {
	Seeds       int
	Virtual     time.Duration
	Messages    int
	Delayed     int
	Cancelled   int
	Rescheduled int
	Deliveries  int
	Duplicates  int
	Dead        int
	Lost        int // by Redis
	Crashes     int
	Faults      map[string]int
	Violations  map[string]int
}

// A simulation is one run.
type simulation struct {
	schedule  *Schedule
	options   Options
	limits    limits
	t         testing.TB
	server    *model.Server
	network   *network
	journal   journal
	delays    map[string]Delay // by UUID
	places    map[string]*place
	order     []*place     // as scheduled
	snapshots atomic.Int64 // of Redis's data, to which it will return
	lossy     atomic.Bool  // Redis may have lost something since the watcher looked
	lost      atomic.Int64 // when Redis last lost something

	calm    chan struct{} // closed: handlers and hooks that take long or misbehave end
	settled chan struct{} // closed: everything is handled, or never will be
	over    chan struct{} // closed: hanging functions return
	group   sync.WaitGroup

	handlers atomic.Int64 // that run

	mu         sync.Mutex
	clock      time.Duration // the server's, relative to the bubble's
	latest     time.Duration // its maximum
	counts     map[string]int
	begun      map[string]rules.Event // the latest delivery of each entry in a group
	complaints []Violation
}

// Run runs a schedule in a bubble of its own.
func Run(t *testing.T, schedule *Schedule, options Options) (result Result) {
	synctest.Test(t, func(t *testing.T) {
		s := &simulation{
			schedule: schedule, options: options, limits: schedule.limits(), t: t,
			server: model.New(model.Config{Version: schedule.Version}), places: make(map[string]*place), delays: make(map[string]Delay),
			calm: make(chan struct{}), settled: make(chan struct{}), over: make(chan struct{}), counts: make(map[string]int), begun: make(map[string]rules.Event),
		}
		s.journal.began = time.Now()
		s.network = newNetwork(schedule.Seed, s.server.Serve)
		result = s.run()
	})
	return result
}

func (s *simulation) run() Result {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.makeGroups()
	s.clocked()
	watcher := s.newWatcher()
	watched := make(chan struct{})
	s.goes(func() { defer close(watched); watcher.run() })
	for _, d := range s.schedule.Delays {
		if s.delays[d.UUID] = d; d.Change != nil {
			s.goes(func() { s.change(d) })
		}
	}
	s.start(ctx)
	var faults sync.WaitGroup
	for _, f := range s.schedule.Faults {
		faults.Add(1)
		s.goes(func() { defer faults.Done(); s.happen(f) })
	}
	time.Sleep(s.schedule.Load)
	faults.Wait()
	for _, topic := range s.schedule.Topics {
		s.mendDeadLetters(topic) // a snapshot may have restored the wrong key
	}
	close(s.calm)
	cancel()
	for _, p := range s.order {
		p.start()
	}
	s.endAll(func(name string) bool { return strings.HasPrefix(name, "producer") })
	s.settle()
	s.journal.add(everyGroup, rules.Event{Kind: rules.Settled})
	close(s.settled)
	<-watched
	watcher.look()
	s.endAll(func(string) bool { return true })
	result := s.judge(watcher)
	close(s.over)
	s.group.Wait()
	time.Sleep(lingering)
	return result
}

// lingering is how long go-redis may still dial for callers that have given up. The bubble's
// clock stops when its main function returns.
const lingering = time.Minute

// goes runs f in the background. The run waits for it at its end.
func (s *simulation) goes(f func()) {
	s.group.Add(1)
	go func() {
		defer s.group.Done()
		f()
	}()
}

func (s *simulation) makeGroups() {
	for _, g := range s.schedule.Groups {
		for _, topic := range s.schedule.Topics {
			if g.Name != "" {
				s.do("XGROUP", "CREATE", topic, g.Name, "0", "MKSTREAM")
			}
		}
	}
}

// start starts all processes.
func (s *simulation) start(ctx context.Context) {
	for _, spec := range s.schedule.Consumers {
		p := &place{sim: s, name: spec.name()}
		p.boot = func(life int) runner { return s.bootConsumer(spec, p, life) }
		s.add(p)
		p.startLater(spec.Start)
	}
	for _, spec := range s.schedule.Producers {
		calls := make(chan Call)
		p := &place{sim: s, name: spec.name()}
		p.boot = func(life int) runner { return s.bootProducer(spec, life, calls) }
		s.add(p)
		p.start()
		own := slices.DeleteFunc(slices.Clone(s.schedule.Calls), func(c Call) bool { return c.Producer != spec.Number })
		s.goes(func() { s.feed(ctx, own, calls) })
	}
}

func (s *simulation) add(p *place) {
	s.places[p.name] = p
	s.order = append(s.order, p)
}

// endAll ends processes for good, concurrently.
func (s *simulation) endAll(which func(name string) bool) {
	var ended sync.WaitGroup
	for _, p := range s.order {
		if which(p.name) {
			ended.Add(1)
			s.goes(func() { defer ended.Done(); p.endForGood() })
		}
	}
	ended.Wait()
}

const (
	// patience is how long nothing may happen before settle gives up: more than the
	// longest takeover and retry.
	patience = 5 * time.Minute
	// utmost is a limit for handling everything that is left.
	utmost = 2 * time.Hour
)

// settle waits until everything is handled, or nothing happens any more.
func (s *simulation) settle() {
	moved, state, calm := time.Now(), "", 0
	for began := time.Now(); time.Since(began) < utmost && time.Since(moved) < patience; time.Sleep(500 * time.Millisecond) {
		done, now := s.progress()
		if calm++; !done || s.elapsed() < s.unsettled() {
			calm = 0
		}
		if calm > 3 {
			return
		}
		if now != state {
			moved, state = time.Now(), now
		}
	}
}

// unsettled returns until when a loss may not have shown yet: living consumers put back what
// they have at the next renewal.
func (s *simulation) unsettled() (until time.Duration) {
	for _, g := range s.schedule.Groups {
		until = max(until, time.Duration(s.lost.Load())+g.ClaimMinIdle)
	}
	return until
}

// progress returns whether the groups have handled everything, and how far they are.
func (s *simulation) progress() (done bool, state string) {
	done = true
	var b strings.Builder
	for _, g := range s.schedule.Groups {
		if !g.leased() {
			continue
		}
		for _, topic := range s.schedule.Topics {
			pending, unread := s.pending(topic, g.Name), s.unread(topic, g.Name)
			done = done && len(pending)+len(unread) == 0 && s.handlers.Load() == 0
			fmt.Fprint(&b, pending, len(unread), s.journal.len())
		}
	}
	for _, topic := range s.schedule.Topics {
		if waiting, due := s.waiting(topic); waiting > 0 {
			done = false
			if fmt.Fprint(&b, waiting); !due {
				fmt.Fprint(&b, s.elapsed()) // time will tell
			}
		}
	}
	return done, b.String()
}

func (s *simulation) elapsed() time.Duration { return time.Since(s.journal.began) }

func (s *simulation) isLoaded() bool { return s.elapsed() < s.schedule.Load }

// wait waits for d. It returns false if the run ends before.
func (s *simulation) wait(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.settled:
		return false
	}
}

func (s *simulation) waitUntil(at time.Duration) bool { return s.wait(at - s.elapsed()) }

// count returns how often it was called with these arguments before.
func (s *simulation) count(what string, group int, uuid string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := fmt.Sprint(what, group, uuid)
	s.counts[key]++
	return s.counts[key] - 1
}

func (s *simulation) once(what string, group int, uuid string) bool {
	return s.count(what, group, uuid) == 0
}

// begin notes that a handler was given an entry.
func (s *simulation) begin(group int, e rules.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begun[fmt.Sprint(group, e.Topic, e.ID)] = e
}

// hasBegun reports whether this is the latest delivery that a handler was given.
func (s *simulation) hasBegun(group int, topic string, p rules.Pending) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.begun[fmt.Sprint(group, topic, p.ID)]
	return e.Consumer == p.Consumer && e.Count == p.Count
}

// complain reports a violation that no rule covers.
func (s *simulation) complain(group int, rule string, e rules.Event, words string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.complaints = append(s.complaints, Violation{s.schedule.Groups[group].Name, rules.Violation{
		Rule: rule, Topic: e.Topic, ID: e.ID, UUID: e.UUID, Process: e.Process, Words: words,
	}})
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// parsePrefix returns the process of a consumer's name; "" for other names.
func parsePrefix(consumer string) (process string, life int) {
	name, rest, ok := strings.Cut(consumer, ".")
	number, _, _ := strings.Cut(rest, "-")
	life, err := strconv.Atoi(number)
	if !ok || err != nil {
		return "", 0
	}
	return name, life
}
