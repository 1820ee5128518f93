// Package statswatch is what goxprom and goxotel have in common: which metrics
// there are, and how they are summed up.
package statswatch

import (
	"context"
	"slices"
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

// Counter is a metric that only grows.
type Counter struct {
	Name, Help string
	value      func(stats) int64
}

type stats = goxstreams.SubscriptionStats

// Counters are all counters.
var Counters = [...]Counter{
	{"delivered", "Messages handed out, retries included.", func(s stats) int64 { return s.Delivered }},
	{"retried", "Messages handed out that had been delivered before, as Redis counts.", func(s stats) int64 { return s.Retried }},
	{"acked", "Messages acked.", func(s stats) int64 { return s.Acked }},
	{"nacked", "Messages nacked.", func(s stats) int64 { return s.Nacked }},
	{"claimed", "Messages taken over from other consumers, or from what they released.", func(s stats) int64 { return s.Claimed }},
	{"released", "Messages given back when closing.", func(s stats) int64 { return s.Released }},
	{"broken", "Deliveries of entries that could not be unmarshaled.", func(s stats) int64 { return s.Broken }},
	{"dead", "Messages moved to the dead-letter stream (in fan-out: dropped).", func(s stats) int64 { return s.Dead }},
	{"lost", "Messages trimmed or deleted while pending.", func(s stats) int64 { return s.Lost }},
}

// Gauge is a metric of a state; ok is false where there is none.
type Gauge struct {
	Name, Unit, Help string
	Value            func(*State) (v float64, ok bool)
}

var gauges = []Gauge{
	{"subscriptions", "{subscription}", "Open subscriptions.",
		func(s *State) (float64, bool) { return float64(s.open), true }},
	{"in_flight", "{message}", "Messages pending and held by this process: prefetched, handed out, or waiting for a retry.",
		func(s *State) (float64, bool) { return float64(s.inFlight), true }},
	{"waiting", "{message}", "Messages in flight that wait for a retry.",
		func(s *State) (float64, bool) { return float64(s.waiting), true }},
	{"up", "1", "1 if Redis serves all open subscriptions, 0 during an outage; absent if none is open.",
		func(s *State) (float64, bool) { return number(!s.failing), s.open > 0 }},
	{"outage", "s", "Time since the outage under way began; 0 if there is none.",
		func(s *State) (float64, bool) { return s.outage.Seconds(), true }},
}

// topicGauges are what Redis is asked for.
var topicGauges = []Gauge{
	{"topic.stats_success", "1", "1 if Redis answered the questions about the topic in time, 0 if not.",
		func(s *State) (float64, bool) { return number(s.redis != nil), s.asked }},
	{"topic.length", "{message}", "Entries in the stream, handled ones included.",
		func(s *State) (float64, bool) {
			if s.redis == nil {
				return 0, false
			}
			return float64(s.redis.Length), true
		}},
	{"topic.lag", "{message}", "Entries that the group has not been given yet; absent if Redis cannot tell.",
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return float64(t.Lag), t.Lag >= 0 })},
	{"topic.pending", "{message}", "Entries that the group has been given and has not acked.",
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return float64(t.Pending), true })},
	{"topic.oldest_pending", "s", "Time since the first of the pending entries was published; 0 if nothing is pending.",
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return t.OldestPending.Seconds(), true })},
	{"topic.consumers", "{consumer}", "Names of consumers in the group.",
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return float64(t.Consumers), true })},
	{"topic.dead_letters", "{message}", "Entries in the topic's dead-letter stream, those of other groups included.",
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return float64(t.DeadLetters), true })},
}

// inGroup is of what Redis knows of a group: not in fan-out.
func inGroup(value func(*goxstreams.TopicStats) (float64, bool)) func(*State) (float64, bool) {
	return func(s *State) (float64, bool) {
		if s.redis == nil || s.redis.Group == "" {
			return 0, false
		}
		return value(s.redis)
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Gauges are all, but those that Redis is asked for if the timeout is negative.
func Gauges(timeout time.Duration) []Gauge {
	if timeout < 0 {
		return gauges
	}
	return slices.Concat(gauges, topicGauges)
}

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
