// Package statswatch makes metrics of what Sources report of themselves.
//
// goxprom and goxotel each have a copy of this package, rather than a package of the
// library that both import: so a plugin works with any version of the library that
// has the exported API it uses. A test of the library (TestDocs_Copies) compares
// the copies. metrics.go defines the metrics, the same for both plugins.
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

// totals are the values of counters.
type totals [len(counters)]int64

func totalsOf(s stats) (values totals) {
	for i, c := range counters {
		values[i] = c.value(s)
	}
	return values
}

// pair is what all is summed up by.
type pair struct{ topic, group string }

// state is what is known of a topic and a group.
type state struct {
	total totals // since the first look

	open, failing     int // subscriptions
	inFlight, waiting int
	outage            time.Duration // of the longest one under way

	asked bool                   // Redis, about what it holds
	redis *goxstreams.TopicStats // nil: no answer
}

// Watcher sums up what Sources say. Its counters only grow: a subscription that
// closes takes its counters along, and a sum that falls by one subscription of
// several would look like a reset of all of them.
type Watcher struct {
	mu      sync.Mutex
	sources []*watched
	totals  map[pair]totals
	round   *round // the questions to Redis under way; nil: none are
}

type watched struct {
	source Source
	last   map[pair]sum
}

// sum is of a Source's open subscriptions of a topic.
type sum struct {
	open   int
	totals totals
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
func New() *Watcher { return &Watcher{totals: map[pair]totals{}} }

// look returns the state of every topic and group that ever was subscribed to.
// Redis is asked unless the timeout is negative, until ctx ends.
func (w *Watcher) look(ctx context.Context, timeout time.Duration) map[pair]*state {
	states := w.count()
	if timeout > 0 {
		w.ask(ctx, states, timeout)
	}
	return states
}

func (w *Watcher) count() map[pair]*state {
	w.mu.Lock()
	defer w.mu.Unlock()
	states := map[pair]*state{}
	for key := range w.totals {
		states[key] = &state{}
	}
	for _, s := range w.sources {
		now := map[pair]sum{}
		for _, sub := range s.source.Stats() {
			key := pair{sub.Topic, sub.Group}
			if states[key] == nil {
				states[key] = &state{}
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
		states[key].total = total
	}
	return states
}

func (s *state) add(sub stats) {
	s.open++
	s.inFlight += sub.InFlight
	s.waiting += sub.Waiting
	if sub.Err != nil {
		s.failing++
		s.outage = max(s.outage, time.Since(sub.Since))
	}
}

func (c totals) plus(d totals) totals {
	for i := range c {
		c[i] += d[i]
	}
	return c
}

func (s sum) plus(sub stats) sum { return sum{s.open + 1, s.totals.plus(totalsOf(sub))} }

// since returns by how much the counters have grown since the last look, at
// least, and what to compare the next look with. What a subscription did between
// the last look and its end is not known.
func (s sum) since(last sum) (grown totals, seen sum) {
	closed := s.open < last.open
	for i := range s.totals {
		// Delivered, the first, falls by one also when nobody takes a message.
		closed = closed || i > 0 && s.totals[i] < last.totals[i]
	}
	if closed && s.open == 1 && last.open == 1 {
		return s.totals, s // another one in its place
	}
	seen = s
	for i := range s.totals {
		grown[i] = max(0, s.totals[i]-last.totals[i])
		if !closed {
			seen.totals[i] = max(s.totals[i], last.totals[i])
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
// within the timeout, and until ctx ends. What is not answered by then goes on: go-redis may wait for
// an answer longer than its context lives. The next call waits for that, rather
// than asking once more a server that does not answer.
func (w *Watcher) ask(ctx context.Context, states map[pair]*state, timeout time.Duration) {
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
	case <-ctx.Done():
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
			answer, err := source.TopicStats(ctx, key.topic)
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
