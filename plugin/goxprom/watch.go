package goxprom

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// This file is the same in goxprom and goxotel, but for the package's name; a
// test of goxotel holds the two together. Neither module can import the other's
// dependencies.

// A Source is a *goxstreams.Subscriber, or a *goxstreams.Consumer of any type.
type Source interface {
	Stats() []goxstreams.SubscriptionStats
}

// asker is a Source that also asks Redis.
type asker interface {
	TopicStats(ctx context.Context, topic string) (goxstreams.TopicStats, error)
}

// counter is a metric that only grows.
type counter struct {
	name, help string
	value      func(stats) int64
}

type stats = goxstreams.SubscriptionStats

var allCounters = [...]counter{
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

// gauge is a metric of a state; ok is false where there is none.
type gauge struct {
	name, unit, help string
	value            func(*state) (v float64, ok bool)
}

var gauges = []gauge{
	{"subscriptions", "{subscription}", "Open subscriptions.",
		func(s *state) (float64, bool) { return float64(s.open), true }},
	{"in_flight", "{message}", "Messages pending and held by this process: prefetched, handed out, or waiting for a retry.",
		func(s *state) (float64, bool) { return float64(s.inFlight), true }},
	{"waiting", "{message}", "Messages in flight that wait for a retry.",
		func(s *state) (float64, bool) { return float64(s.waiting), true }},
	{"up", "1", "1 if Redis serves all open subscriptions, 0 during an outage; absent if none is open.",
		func(s *state) (float64, bool) { return number(!s.failing), s.open > 0 }},
	{"outage", "s", "Time since the outage under way began; 0 if there is none.",
		func(s *state) (float64, bool) { return s.outage.Seconds(), true }},
}

// topicGauges are what Redis is asked for.
var topicGauges = []gauge{
	{"topic.stats_success", "1", "1 if Redis answered the questions about the topic in time, 0 if not.",
		func(s *state) (float64, bool) { return number(s.redis != nil), s.asked }},
	{"topic.length", "{message}", "Entries in the stream, handled ones included.",
		func(s *state) (float64, bool) {
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
func inGroup(value func(*goxstreams.TopicStats) (float64, bool)) func(*state) (float64, bool) {
	return func(s *state) (float64, bool) {
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

func gaugesWithin(timeout time.Duration) []gauge {
	if timeout < 0 {
		return gauges
	}
	return slices.Concat(gauges, topicGauges)
}

// counters are the values of allCounters.
type counters [len(allCounters)]int64

func countersOf(s stats) (values counters) {
	for i, c := range allCounters {
		values[i] = c.value(s)
	}
	return values
}

// pair is what all is summed up by.
type pair struct{ topic, group string }

// state is what is known of a topic and a group.
type state struct {
	pair
	total counters // since the first look

	open, inFlight, waiting int
	failing                 bool
	outage                  time.Duration // of the longest one under way

	asked bool                   // Redis, about what it holds
	redis *goxstreams.TopicStats // nil: no answer
}

// watcher sums up what Sources say. Its counters only grow: a subscription that
// closes takes its counters along, and a sum that falls by one subscription of
// several would look as if all of them had begun anew.
type watcher struct {
	mu      sync.Mutex
	sources []*watched
	totals  map[pair]counters
	round   *round // the questions to Redis under way; nil: none are
}

type watched struct {
	source Source
	group  string
	last   map[string]sum // by topic
}

// sum is of a Source's open subscriptions of a topic.
type sum struct {
	open     int
	counters counters
}

func (w *watcher) add(group string, sources []Source) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, source := range sources {
		w.sources = append(w.sources, &watched{source, group, map[string]sum{}})
	}
}

func newWatcher() *watcher { return &watcher{totals: map[pair]counters{}} }

// look returns the state of every topic and group that ever was subscribed to.
// Redis is asked unless the timeout is negative.
func (w *watcher) look(timeout time.Duration) map[pair]*state {
	states := w.count()
	if timeout > 0 {
		w.ask(states, timeout)
	}
	return states
}

func (w *watcher) count() map[pair]*state {
	w.mu.Lock()
	defer w.mu.Unlock()
	states := map[pair]*state{}
	for key := range w.totals {
		states[key] = &state{pair: key}
	}
	for _, s := range w.sources {
		now := map[string]sum{}
		for _, sub := range s.source.Stats() {
			key := pair{sub.Topic, s.group}
			if states[key] == nil {
				states[key] = &state{pair: key}
			}
			states[key].add(sub)
			now[sub.Topic] = now[sub.Topic].plus(sub)
		}
		for topic, sum := range now {
			key := pair{topic, s.group}
			grown, seen := sum.since(s.last[topic])
			w.totals[key] = w.totals[key].plus(grown)
			now[topic] = seen
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
func (w *watcher) ask(states map[pair]*state, timeout time.Duration) {
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
func (w *watcher) questionsLocked() map[pair]asker {
	questions := map[pair]asker{}
	for _, s := range w.sources {
		source, ok := s.source.(asker)
		for topic := range s.last {
			key := pair{topic, s.group}
			if ok && questions[key] == nil {
				questions[key] = source
			}
		}
	}
	return questions
}

func (w *watcher) run(r *round, questions map[pair]asker, timeout time.Duration) {
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

// label returns a topic's or a group's name as a label's value, which must be
// UTF-8.
func label(name string) string {
	if utf8.ValidString(name) {
		return name
	}
	return strconv.Quote(name)
}
