package goxprom

import (
	"context"
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

// The counters of a subscription, in the order of countersOf.
const (
	delivered = iota
	retried
	acked
	nacked
	claimed
	released
	broken
	dead
	lost
	numCounters
)

type counters [numCounters]int64

func countersOf(s goxstreams.SubscriptionStats) counters {
	return counters{s.Delivered, s.Retried, s.Acked, s.Nacked, s.Claimed, s.Released, s.Broken, s.Dead, s.Lost}
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
func (w *watcher) look() map[pair]*state {
	w.mu.Lock()
	defer w.mu.Unlock()
	states := map[pair]*state{}
	for key := range w.totals {
		states[key] = &state{pair: key}
	}
	for _, s := range w.sources {
		now := map[string]sum{}
		for _, stats := range s.source.Stats() {
			key := pair{stats.Topic, s.group}
			if states[key] == nil {
				states[key] = &state{pair: key}
			}
			states[key].add(stats)
			now[stats.Topic] = now[stats.Topic].plus(stats)
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

func (s *state) add(stats goxstreams.SubscriptionStats) {
	s.open++
	s.inFlight += stats.InFlight
	s.waiting += stats.Waiting
	if stats.Err != nil {
		s.failing = true
		s.outage = max(s.outage, time.Since(stats.Since))
	}
}

func (c counters) plus(d counters) counters {
	for i := range c {
		c[i] += d[i]
	}
	return c
}

func (s sum) plus(stats goxstreams.SubscriptionStats) sum {
	return sum{s.open + 1, s.counters.plus(countersOf(stats))}
}

// since returns by how much the counters have grown since the last look, at
// least, and what to compare the next look with. What a subscription did between
// the last look and its end is not known.
func (s sum) since(last sum) (grown counters, seen sum) {
	closed := s.open < last.open
	for i := range s.counters {
		// Delivered falls by one without that, when nobody takes a message.
		closed = closed || i != delivered && s.counters[i] < last.counters[i]
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
