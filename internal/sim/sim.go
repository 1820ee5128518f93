// Package sim runs the whole library in virtual time against a model of Redis in memory,
// with processes that die, a network that breaks and a server that forgets. A seed decides
// everything that happens, and the rules of package rules judge what came of it.
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

// Options are about what is told of a run; they change nothing in it.
type Options struct {
	Verbose bool // keep the library's log too
}

// A Result is what a run came to.
type Result struct {
	Schedule   *Schedule
	Violations []Violation
	Journal    []string
	Stats      Stats
}

// A Violation is a rule that was broken, and in which group.
type Violation struct {
	Group string
	rules.Violation
}

func (v Violation) String() string { return v.Group + ": " + v.Violation.String() }

// Stats are sums.
type Stats struct {
	Seeds      int
	Virtual    time.Duration
	Messages   int
	Deliveries int
	Duplicates int
	Dead       int
	Lost       int // by Redis
	Crashes    int
	Faults     map[string]int
	Violations map[string]int
}

// A simulation is one run.
type simulation struct {
	schedule *Schedule
	options  Options
	limits   limits
	t        testing.TB
	server   *model.Server
	network  *network
	journal  journal
	places   map[string]*place
	order    []*place    // as scheduled
	lossy    atomic.Bool // Redis may have lost something since the watcher looked

	calm    chan struct{} // closed: whatever takes long or misbehaves for the fault's sake ends
	settled chan struct{} // closed: all is handled, or never will be
	over    chan struct{} // closed: functions that hang return
	group   sync.WaitGroup

	handlers atomic.Int64 // that run

	mu         sync.Mutex
	clock      time.Duration // of the server, beside the bubble's
	latest     time.Duration // the most that it was
	counts     map[string]int
	begun      map[string]rules.Event // the last run of each entry in a group
	complaints []Violation
}

// Run runs a schedule in a bubble of its own.
func Run(t *testing.T, schedule *Schedule, options Options) (result Result) {
	synctest.Test(t, func(t *testing.T) {
		s := &simulation{
			schedule: schedule, options: options, limits: schedule.limits(), t: t,
			server: model.New(model.Config{Version: schedule.Version}), places: make(map[string]*place),
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
	watcher := s.newWatcher()
	watched := make(chan struct{})
	s.goes(func() { defer close(watched); watcher.run() })
	s.start(ctx)
	var faults sync.WaitGroup
	for _, f := range s.schedule.Faults {
		faults.Add(1)
		s.goes(func() { defer faults.Done(); s.happen(f) })
	}
	time.Sleep(s.schedule.Load)
	faults.Wait()
	for _, topic := range s.schedule.Topics {
		s.mendDeadLetters(topic) // a snapshot may have brought back what was mended
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

// lingering is how long go-redis may still try to dial for callers that have left. The
// bubble's clock stops when its main function returns.
const lingering = time.Minute

// goes runs something in the background, and is awaited in the end.
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

// endAll ends processes for good, all at once.
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
	// patience is how long nothing may move before it is taken for the end: more than
	// the longest takeover and retry.
	patience = 5 * time.Minute
	// utmost is the longest time for everything that is left to be worked off.
	utmost = 2 * time.Hour
)

// settle waits until everything is worked off, or nothing moves any more.
func (s *simulation) settle() {
	moved, state, calm := time.Now(), "", 0
	for began := time.Now(); time.Since(began) < utmost && time.Since(moved) < patience; time.Sleep(500 * time.Millisecond) {
		done, now := s.progress()
		if calm++; !done {
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

// progress returns how far the groups are, and whether they are at the end.
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
	return done, b.String()
}

func (s *simulation) elapsed() time.Duration { return time.Since(s.journal.began) }

func (s *simulation) isLoaded() bool { return s.elapsed() < s.schedule.Load }

// wait returns false if everything is over before.
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

// count returns how often it was called for this before.
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

// hasBegun reports whether it is this delivery that a handler was given last.
func (s *simulation) hasBegun(group int, topic string, p rules.Pending) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.begun[fmt.Sprint(group, topic, p.ID)]
	return e.Consumer == p.Consumer && e.Count == p.Count
}

// complain notes what no rule is about.
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

// parsePrefix returns whose a consumer's name is; "" for none of ours.
func parsePrefix(consumer string) (process string, life int) {
	name, rest, ok := strings.Cut(consumer, ".")
	number, _, _ := strings.Cut(rest, "-")
	life, err := strconv.Atoi(number)
	if !ok || err != nil {
		return "", 0
	}
	return name, life
}
