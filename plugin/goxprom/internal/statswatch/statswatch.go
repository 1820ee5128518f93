// Package statswatch sums up what Sources say of themselves, for metrics.
//
// goxprom and goxotel each have a copy of this file, rather than a package of the
// library that both import: so a plugin works with any version of the library that
// has the exported API it uses. A test of the library (TestDocs_Copies) compares
// the copies. Which metrics there are, metrics.go says: that file is each plugin's
// own.
package statswatch

import (
	"context"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// DefaultTimeout of questions to Redis leaves most of Prometheus's 10s for a scrape
// to others.
const DefaultTimeout = 2 * time.Second

// A Source is a *goxstreams.Subscriber, or a *goxstreams.Consumer of any type.
type Source interface {
	Stats() []goxstreams.SubscriptionStats
	TopicStats(ctx context.Context, topic string) (goxstreams.TopicStats, error)
}

type stats = goxstreams.SubscriptionStats

// counters are the values of Counters.
type counters [len(Counters)]int64

func countersOf(s stats) (values counters) {
	for i, c := range Counters {
		values[i] = c.value(s)
	}
	return values
}

// pair is what all is summed up by.
type pair struct{ Topic, Group string }

// State is what is known of a topic and a group.
type State struct {
	pair
	Total counters // since the first look

	open, inFlight, waiting int
	failing                 bool
	outage                  time.Duration // of the longest one under way

	asked bool                   // Redis, about what it holds
	redis *goxstreams.TopicStats // nil: no answer
}

// Watcher sums up what Sources say. Its counters only grow: a subscription that
// closes takes its counters along, and a sum that falls by one subscription of
// several would look as if all of them had begun anew.
type Watcher struct {
	mu      sync.Mutex
	sources []*watched
	totals  map[pair]counters
	round   *round // the questions to Redis under way; nil: none are
}

type watched struct {
	source Source
	last   map[pair]sum
}

// sum is of a Source's open subscriptions of a topic.
type sum struct {
	open     int
	counters counters
}

// Add makes it watch Sources.
func (w *Watcher) Add(sources ...Source) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, source := range sources {
		w.sources = append(w.sources, &watched{source, map[pair]sum{}})
	}
}

// New returns a Watcher of nothing yet.
func New() *Watcher { return &Watcher{totals: map[pair]counters{}} }

// Look returns the state of every topic and group that ever was subscribed to.
// Redis is asked unless the timeout is negative.
func (w *Watcher) Look(timeout time.Duration) map[pair]*State {
	states := w.count()
	if timeout > 0 {
		w.ask(states, timeout)
	}
	return states
}

func (w *Watcher) count() map[pair]*State {
	w.mu.Lock()
	defer w.mu.Unlock()
	states := map[pair]*State{}
	for key := range w.totals {
		states[key] = &State{pair: key}
	}
	for _, s := range w.sources {
		now := map[pair]sum{}
		for _, sub := range s.source.Stats() {
			key := pair{sub.Topic, sub.Group}
			if states[key] == nil {
				states[key] = &State{pair: key}
			}
			states[key].add(sub)
			now[key] = now[key].plus(sub)
		}
		for key, sum := range now {
			grown, seen := sum.since(s.last[key])
			w.totals[key] = w.totals[key].plus(grown)
			now[key] = seen
		}
		s.last = now
	}
	for key, total := range w.totals {
		states[key].Total = total
	}
	return states
}

func (s *State) add(sub stats) {
	s.open++
	s.inFlight += sub.InFlight
	s.waiting += sub.Waiting
	if sub.Err != nil {
		s.failing = true
		s.outage = max(s.outage, time.Since(sub.Since))
	}
}

func (c counters) plus(d counters) counters {
	for i := range c {
		c[i] += d[i]
	}
	return c
}

func (s sum) plus(sub stats) sum { return sum{s.open + 1, s.counters.plus(countersOf(sub))} }

// since returns by how much the counters have grown since the last look, at
// least, and what to compare the next look with. What a subscription did between
// the last look and its end is not known.
func (s sum) since(last sum) (grown counters, seen sum) {
	closed := s.open < last.open
	for i := range s.counters {
		// Delivered, the first, falls by one also when nobody takes a message.
		closed = closed || i > 0 && s.counters[i] < last.counters[i]
	}
	if closed && s.open == 1 && last.open == 1 {
		return s.counters, s // another one in its place
	}
	seen = s
	for i := range s.counters {
		grown[i] = max(0, s.counters[i]-last.counters[i])
		if !closed {
			seen.counters[i] = max(s.counters[i], last.counters[i])
		}
	}
	return grown, seen
}

// askers is how many topics are asked about at a time.
const askers = 8

// round is one question to Redis for each topic and group.
type round struct {
	done    chan struct{}
	mu      sync.Mutex
	answers map[pair]goxstreams.TopicStats
}

// ask adds to the states what Redis says of those with open subscriptions,
// within the timeout. What is not answered by then goes on: go-redis may wait for
// an answer longer than its context lives. The next call waits for that, rather
// than asking once more a server that does not answer.
func (w *Watcher) ask(states map[pair]*State, timeout time.Duration) {
	w.mu.Lock()
	questions := w.questionsLocked()
	r := w.round
	if r == nil {
		r = &round{done: make(chan struct{}), answers: map[pair]goxstreams.TopicStats{}}
		w.round = r
		go w.run(r, questions, timeout)
	}
	w.mu.Unlock()

	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-r.done:
	case <-timer.C:
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, st := range states {
		st.asked = questions[key] != nil
		if answer, ok := r.answers[key]; ok {
			st.redis = &answer
		}
	}
}

// questionsLocked returns whom to ask: of several Sources of a topic and group
// the first.
func (w *Watcher) questionsLocked() map[pair]Source {
	questions := map[pair]Source{}
	for _, s := range w.sources {
		for key := range s.last {
			if questions[key] == nil {
				questions[key] = s.source
			}
		}
	}
	return questions
}

func (w *Watcher) run(r *round, questions map[pair]Source, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var running sync.WaitGroup
	places := make(chan struct{}, askers)
	for key, source := range questions {
		places <- struct{}{}
		running.Go(func() {
			defer func() { <-places }()
			answer, err := source.TopicStats(ctx, key.Topic)
			if err != nil {
				return
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.answers[key] = answer
		})
	}
	running.Wait()
	w.mu.Lock()
	w.round = nil
	w.mu.Unlock()
	close(r.done)
}

// Label returns a topic's or a group's name as a label's value, which must be
// UTF-8.
func Label(name string) string {
	if utf8.ValidString(name) {
		return name
	}
	return strconv.Quote(name)
}
