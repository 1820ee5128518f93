package statswatch

import (
	"slices"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Counter is a metric that only grows.
type Counter struct {
	Name, Help string
	value      func(stats) int64
}

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
