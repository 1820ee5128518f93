package statswatch

import (
	"context"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Names of labels.
const (
	Topic           = "topic"
	Group           = "group" // empty in fan-out
	DeadLetterTopic = "dead_letter_topic"
)

var (
	byGroup      = []string{Topic, Group}
	byTopic      = []string{Topic}
	byDeadLetter = []string{Topic, DeadLetterTopic}
)

// Metric describes a metric. Name and Unit are OpenTelemetry's; its translation to
// Prometheus gives the names that goxprom uses: underscores for dots, _seconds for
// the unit s, _total for a counter. A gauge has no unit "1", which would become
// _ratio.
type Metric struct {
	Name, Unit, Help string
	Counter          bool // it only grows; else it is a gauge
	Labels           []string
}

// counters are of subscriptions. Delivered is the first: see sum.since.
var counters = [...]struct {
	*Metric
	value func(stats) int64
}{
	{counter("messages.delivered", "{message}", "Messages delivered to handlers, redeliveries included."),
		func(s stats) int64 { return s.Delivered }},
	{counter("messages.redelivered", "{message}", "Messages delivered to handlers that had been delivered before, by Redis's count."),
		func(s stats) int64 { return s.Retried }},
	{counter("messages.acked", "{message}", "Messages acked by handlers."),
		func(s stats) int64 { return s.Acked }},
	{counter("messages.nacked", "{message}", "Messages nacked by handlers."),
		func(s stats) int64 { return s.Nacked }},
	{counter("messages.claimed", "{message}", "Messages taken over from other consumers, or from what they released."),
		func(s stats) int64 { return s.Claimed }},
	{counter("messages.released", "{message}", "Messages released unhandled when their subscription closed, or because of a pause."),
		func(s stats) int64 { return s.Released }},
	{counter("messages.dead_lettered", "{message}", "Messages moved to the dead-letter stream (in fan-out: dropped)."),
		func(s stats) int64 { return s.Dead }},
	{counter("messages.lost", "{message}", "Messages that were trimmed or deleted while pending."),
		func(s stats) int64 { return s.Lost }},
	{counter("entries.malformed", "{entry}", "Deliveries of malformed entries: those that could not be unmarshaled."),
		func(s stats) int64 { return s.Broken }},
	{counter("entries.trimmed", "{entry}", "Entries that retention has trimmed, for all groups of the topic."),
		func(s stats) int64 { return s.Trimmed }},
}

// gauges are of a topic and group. Value returns false where the metric is absent.
var gauges = []struct {
	*Metric
	value func(*state) (float64, bool)
}{
	{gauge("subscriptions.open", "{subscription}", "Open subscriptions."),
		func(s *state) (float64, bool) { return float64(s.open), true }},
	{gauge("subscriptions.failing", "{subscription}", "Open subscriptions that Redis does not serve."),
		func(s *state) (float64, bool) { return float64(s.failing), true }},
	{gauge("subscriptions.outage", "s", "Time since the longest outage under way began; 0 if there is none."),
		func(s *state) (float64, bool) { return s.outage.Seconds(), true }},
	{gauge("messages.in_flight", "{message}", "Messages pending in this process: prefetched, in a handler, or waiting for a retry."),
		func(s *state) (float64, bool) { return float64(s.inFlight), true }},
	{gauge("messages.awaiting_retry", "{message}", "Messages in flight that wait for a retry."),
		func(s *state) (float64, bool) { return float64(s.waiting), true }},
}

// askedGauges are what Redis is asked of a group.
var askedGauges = []struct {
	*Metric
	value func(*state) (float64, bool)
}{
	{gauge("group.stats_success", "", "1 if Redis answered the questions about the topic and the group in time, 0 if not."),
		func(s *state) (float64, bool) {
			if s.redis == nil {
				return 0, s.asked
			}
			return 1, true
		}},
	{gauge("group.lag", "{entry}", "Consumer lag: entries not delivered to the group yet; absent if Redis cannot tell."),
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return float64(t.Lag), t.Lag >= 0 })},
	{gauge("group.pending_entries", "{entry}", "Entries delivered to the group and not acked."),
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return float64(t.Pending), true })},
	{gauge("group.oldest_pending_age", "s", "Time since the oldest of the pending entries was published; 0 if nothing is pending."),
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return t.OldestPending.Seconds(), true })},
	{gauge("group.consumers", "{consumer}", "Names of consumers in the group."),
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return float64(t.Consumers), true })},
	{gauge("group.paused", "", "1 if the group is paused (goxstreams.Pause), 0 if not, or without the permission to read that."),
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) {
			if t.PausedSince.IsZero() {
				return 0, true
			}
			return 1, true
		})},
	{gauge("group.cut_off_entries", "{entry}", "Entries that HardMaxLen cut off before the group acked them, over all times; absent without the permission to read it."),
		inGroup(func(t *goxstreams.TopicStats) (float64, bool) { return float64(t.CutOff), t.CutOff >= 0 })},
}

// Of a topic, whatever groups it has.
var (
	topicEntries = &Metric{Name: "goxstreams.topic.entries", Unit: "{entry}", Labels: byTopic,
		Help: "Entries in the stream, acked ones included."}
	topicDeadLetters = &Metric{Name: "goxstreams.topic.dead_letters", Unit: "{entry}", Labels: byDeadLetter,
		Help: "Entries in the topic's dead-letter stream, of all groups."}
	topicDelayed = &Metric{Name: "goxstreams.topic.delayed_messages", Unit: "{message}", Labels: byTopic,
		Help: "Delayed messages that are not in the stream yet; absent without the permission to count them."}
	topicOverdue = &Metric{Name: "goxstreams.topic.delayed_overdue", Unit: "s", Labels: byTopic,
		Help: "Time since the first of the delayed messages was due; 0 if none is."}
	topicPinAge = &Metric{Name: "goxstreams.topic.pin_age", Unit: "s", Labels: byGroup,
		Help: "Time since the oldest entry was published that a group has not acked: retention keeps it for that group, and all entries after it. Absent if everything is acked."}
)

func counter(name, unit, help string) *Metric {
	return &Metric{Name: "goxstreams." + name, Unit: unit, Help: help, Counter: true, Labels: byGroup}
}

func gauge(name, unit, help string) *Metric {
	return &Metric{Name: "goxstreams." + name, Unit: unit, Help: help, Labels: byGroup}
}

// inGroup makes a value absent in fan-out and where Redis has not answered.
func inGroup(value func(*goxstreams.TopicStats) (float64, bool)) func(*state) (float64, bool) {
	return func(s *state) (float64, bool) {
		if s.redis == nil || s.redis.Group == "" {
			return 0, false
		}
		return value(s.redis)
	}
}

// Metrics returns all metrics, without those that Redis is asked for if the timeout
// is negative.
func Metrics(timeout time.Duration) (all []*Metric) {
	for _, c := range counters {
		all = append(all, c.Metric)
	}
	for _, g := range gauges {
		all = append(all, g.Metric)
	}
	if timeout < 0 {
		return all
	}
	for _, g := range askedGauges {
		all = append(all, g.Metric)
	}
	return append(all, topicEntries, topicDeadLetters, topicDelayed, topicOverdue, topicPinAge)
}

// Sample is one value of a Metric. LabelValues are those of Metric.Labels, in their
// order and in UTF-8.
type Sample struct {
	*Metric
	Value       float64
	LabelValues []string
}

// Samples returns the values of all metrics, for every topic and group that ever was
// subscribed to. Redis is asked, within the timeout and until ctx ends, unless
// the timeout is negative.
func (w *Watcher) Samples(ctx context.Context, timeout time.Duration) (samples []Sample) {
	states := w.look(ctx, timeout)
	for key, s := range states {
		labels := []string{Label(key.topic), Label(key.group)}
		for i, c := range counters {
			samples = append(samples, Sample{c.Metric, float64(s.total[i]), labels})
		}
		for _, g := range gauges {
			if v, ok := g.value(s); ok {
				samples = append(samples, Sample{g.Metric, v, labels})
			}
		}
		for _, g := range askedGauges {
			if v, ok := g.value(s); ok {
				samples = append(samples, Sample{g.Metric, v, labels})
			}
		}
	}
	return append(samples, topicSamples(states)...)
}

// topicSamples returns what does not depend on the group once, whichever group's
// question brought it.
func topicSamples(states map[pair]*state) (samples []Sample) {
	type deadLetters struct{ topic, deadLetterTopic string }
	entries, dead := map[string]int64{}, map[deadLetters]int64{}
	delayed, overdue := map[string]int64{}, map[string]time.Duration{}
	pins := map[string]goxstreams.Pin{}
	for key, s := range states {
		if s.redis == nil {
			continue
		}
		entries[key.topic] = max(entries[key.topic], s.redis.Length)
		if s.redis.Delayed >= 0 {
			delayed[key.topic] = max(delayed[key.topic], s.redis.Delayed)
			overdue[key.topic] = max(overdue[key.topic], s.redis.Overdue)
		}
		if pin := s.redis.Pin; pin.ID != "" && (pins[key.topic].ID == "" || pin.Age > pins[key.topic].Age) {
			pins[key.topic] = pin
		}
		if s.redis.Group != "" {
			to := deadLetters{key.topic, s.redis.DeadLetterTopic}
			dead[to] = max(dead[to], s.redis.DeadLetters)
		}
	}
	for topic, n := range entries {
		samples = append(samples, Sample{topicEntries, float64(n), []string{Label(topic)}})
	}
	for topic, n := range delayed {
		samples = append(samples, Sample{topicDelayed, float64(n), []string{Label(topic)}},
			Sample{topicOverdue, overdue[topic].Seconds(), []string{Label(topic)}})
	}
	for topic, pin := range pins {
		samples = append(samples, Sample{topicPinAge, pin.Age.Seconds(), []string{Label(topic), Label(pin.Group)}})
	}
	for to, n := range dead {
		samples = append(samples, Sample{topicDeadLetters, float64(n), []string{Label(to.topic), Label(to.deadLetterTopic)}})
	}
	return samples
}
