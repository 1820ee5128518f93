package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	slowRate   = 200 // messages per second
	fastestCap = 50_000
	fastTime   = 3 * time.Second
)

// latencySlow measures at 200 messages/s.
func latencySlow(t *trial) (metrics, error) {
	topic, err := t.newTopic()
	if err != nil {
		return nil, err
	}
	return latency(t, []string{topic}, slowRate, t.n)
}

// latencyHalf measures at half of the rate that publisher and subscriber reach
// together.
func latencyHalf(t *trial) (metrics, error) {
	most, err := together(t)
	if err != nil {
		return nil, err
	}
	if err := t.reopen(t.scenario.options); err != nil {
		return nil, err
	}
	topic, err := t.newTopic()
	if err != nil {
		return nil, err
	}
	perSecond := max(slowRate, min(most/2, fastestCap))
	return latency(t, []string{topic}, perSecond, int(perSecond*t.duration(fastTime).Seconds()))
}

// together returns the rate at which t.n messages are published, in calls of
// 100, and consumed at the same time.
func together(t *trial) (perSecond float64, err error) {
	topic, err := t.newTopic()
	if err != nil {
		return 0, err
	}
	arrived := newTally(t.n, 1)
	start := time.Now()
	if err := t.backend.consume(topic, func(p []byte) error { arrived.got(p); return nil }); err != nil {
		return 0, err
	}
	for first := 0; first < t.n; first += 100 {
		if err := t.backend.batch(topic, payloads(first, min(100, t.n-first), payloadSize))(); err != nil {
			return 0, err
		}
	}
	if err := t.drain(topic, arrived); err != nil {
		return 0, err
	}
	return float64(t.n) / time.Since(start).Seconds(), arrived.check()
}

// A stopwatch notes how long messages took.
type stopwatch struct {
	*tally
	took []time.Duration // by number
}

func newStopwatch(n int) *stopwatch { return &stopwatch{newTally(n, 1), make([]time.Duration, n)} }

// handle notes the time before the arrival, so that all times are there when the last
// message has arrived.
func (s *stopwatch) handle(payload []byte) error {
	took := time.Since(epoch) - sentAt(payload)
	if i := number(payload); i >= 0 && i < len(s.took) {
		s.took[i] = took
	}
	s.got(payload)
	return nil
}

// latency subscribes to topics and sends n messages to them at random, at a rate.
func latency(t *trial, topics []string, perSecond float64, n int) (metrics, error) {
	watch := newStopwatch(n)
	for _, topic := range topics {
		if err := t.backend.consume(topic, watch.handle); err != nil {
			return nil, err
		}
	}
	m, err := timed(t, watch, topics, perSecond)
	if err != nil {
		return nil, err
	}
	return m, t.allSettled(topics)
}

// timed is latency for topics that are subscribed with the stopwatch already; it does
// not wait for the last acks.
func timed(t *trial, watch *stopwatch, topics []string, perSecond float64) (metrics, error) {
	if t.began != nil {
		t.began(t)
	}
	achieved, err := pace(t, topics, perSecond, len(watch.took))
	if err == nil {
		err = watch.wait()
	}
	if t.ended != nil {
		t.ended(t)
	}
	if err != nil {
		return nil, err
	}
	if err := watch.check(); err != nil {
		return nil, err
	}
	slices.Sort(watch.took)
	return metrics{
		p50:  milliseconds(quantile(watch.took, 0.5)),
		p99:  milliseconds(quantile(watch.took, 0.99)),
		sent: achieved,
	}, nil
}

// pace publishes n stamped messages at a rate: one call for each topic, with the
// messages that are due. It returns the actual rate.
func pace(t *trial, topics []string, perSecond float64, n int) (float64, error) {
	start := time.Now()
	for next := 0; next < n; {
		due := min(n, 1+int(time.Since(start).Seconds()*perSecond))
		if next >= due {
			time.Sleep(time.Duration(float64(time.Second)*float64(next)/perSecond) - time.Since(start))
			continue
		}
		if len(topics) > 1 {
			due = next + 1
		}
		batch := payloads(next, due-next, payloadSize)
		for _, p := range batch {
			stamp(p)
		}
		if err := t.backend.batch(topics[rand.IntN(len(topics))], batch)(); err != nil {
			return 0, err
		}
		next = due
	}
	return float64(n) / time.Since(start).Seconds(), nil
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// inTurn hands messages to the measurement under way: topics stay subscribed while one
// follows the other.
type inTurn struct {
	mu  sync.RWMutex
	now handler
}

func (s *inTurn) set(h handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = h
}

func (s *inTurn) handle(payload []byte) error {
	s.mu.RLock()
	h := s.now
	s.mu.RUnlock()
	if h == nil {
		return fmt.Errorf("a message that nobody waits for")
	}
	return h(payload)
}
