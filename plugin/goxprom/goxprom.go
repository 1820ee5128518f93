// Package goxprom exports what watermill-goxstreams does, and what Redis holds
// for it, as Prometheus metrics.
//
//	collector := goxprom.NewCollector(goxprom.Config{})
//	collector.Add("billing", subscriber) // the Subscriber's ConsumerGroup
//	prometheus.MustRegister(collector)
//
// All metrics have the labels topic and group, and are sums over the
// subscriptions of both.
package goxprom

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// defaultTimeout leaves most of Prometheus's 10s for a scrape to others.
const defaultTimeout = 2 * time.Second

// Config configures a Collector. The zero value is fine.
type Config struct {
	// TopicTimeout bounds how long a scrape waits for Redis to say what it holds
	// of the topics (Subscriber.TopicStats). What is not answered by then is
	// missing, and goxstreams_topic_stats_success is 0. Default 2s; negative: Redis
	// is not asked, and the metrics goxstreams_topic_... do not exist.
	TopicTimeout time.Duration
}

// Collector is a prometheus.Collector. It may be used by several goroutines at
// once.
//
// Its counters begin at 0 and only grow, for as long as it lives: those of a
// subscription that closed stay in the sum. What a subscription did between the
// last scrape and its end is missing there.
//
// It keeps a topic's counters, and its Sources, for good. Where Subscribers or
// topics come and go without end, give each batch a Collector, and unregister
// that. Where one topic's name stands for streams on two servers, give each a
// Collector, and tell them apart by prometheus.WrapRegistererWith.
type Collector struct {
	watcher *watcher
	timeout time.Duration
}

var _ prometheus.Collector = (*Collector)(nil)

// NewCollector returns a Collector that watches nothing yet.
func NewCollector(config Config) *Collector {
	if config.TopicTimeout == 0 {
		config.TopicTimeout = defaultTimeout
	}
	return &Collector{newWatcher(), config.TopicTimeout}
}

// Add makes the Collector watch Subscribers of a consumer group, whatever topics
// they subscribe to; empty: fan-out. A Subscriber that is added twice counts
// twice.
func (c *Collector) Add(group string, sources ...Source) { c.watcher.add(group, sources) }

var labels = []string{"topic", "group"}

func desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("goxstreams_"+name, help, labels, nil)
}

var counterDescs = [numCounters]*prometheus.Desc{
	delivered: desc("delivered_total", "Messages handed out, retries included."),
	retried:   desc("retried_total", "Messages handed out that had been delivered before, as Redis counts."),
	acked:     desc("acked_total", "Messages acked."),
	nacked:    desc("nacked_total", "Messages nacked."),
	claimed:   desc("claimed_total", "Messages taken over from other consumers, or from what they released."),
	released:  desc("released_total", "Messages given back when closing."),
	broken:    desc("broken_total", "Deliveries of entries that could not be unmarshaled."),
	dead:      desc("dead_total", "Messages moved to the dead-letter stream (in fan-out: dropped)."),
	lost:      desc("lost_total", "Messages trimmed or deleted while pending."),
}

// gauge is a metric of a state; ok is false where there is none.
type gauge struct {
	desc  *prometheus.Desc
	value func(*state) (v float64, ok bool)
}

var gauges = []gauge{
	{desc("subscriptions", "Open subscriptions."),
		func(s *state) (float64, bool) { return float64(s.open), true }},
	{desc("in_flight", "Messages pending and held by this process: prefetched, handed out, or waiting for a retry."),
		func(s *state) (float64, bool) { return float64(s.inFlight), true }},
	{desc("waiting", "Messages in flight that wait for a retry."),
		func(s *state) (float64, bool) { return float64(s.waiting), true }},
	{desc("up", "1 if Redis serves all open subscriptions, 0 during an outage; absent if none is open."),
		func(s *state) (float64, bool) { return number(!s.failing), s.open > 0 }},
	{desc("outage_seconds", "Time since the outage under way began; 0 if there is none."),
		func(s *state) (float64, bool) { return s.outage.Seconds(), true }},
}

var topicGauges = []gauge{
	{desc("topic_stats_success", "1 if Redis answered this scrape's questions about the topic in time, 0 if not."),
		func(s *state) (float64, bool) { return number(s.redis != nil), s.asked }},
	{desc("topic_length", "Entries in the stream, handled ones included."),
		ofTopic(func(s *state) float64 { return float64(s.redis.Length) })},
	{desc("topic_lag", "Entries that the group has not been given yet; absent if Redis cannot tell."),
		func(s *state) (float64, bool) {
			if !s.inGroup() || s.redis.Lag < 0 {
				return 0, false
			}
			return float64(s.redis.Lag), true
		}},
	{desc("topic_pending", "Entries that the group has been given and has not acked."),
		ofGroup(func(s *state) float64 { return float64(s.redis.Pending) })},
	{desc("topic_oldest_pending_seconds", "Time since the first of the pending entries was published; 0 if nothing is pending."),
		ofGroup(func(s *state) float64 { return s.redis.OldestPending.Seconds() })},
	{desc("topic_consumers", "Names of consumers in the group."),
		ofGroup(func(s *state) float64 { return float64(s.redis.Consumers) })},
	{desc("topic_dead_letters", "Entries in the topic's dead-letter stream, those of other groups included."),
		ofGroup(func(s *state) float64 { return float64(s.redis.DeadLetters) })},
}

// inGroup reports whether Redis has answered, and has a group to tell of.
func (s *state) inGroup() bool { return s.redis != nil && s.redis.Group != "" }

func ofTopic(value func(*state) float64) func(*state) (float64, bool) {
	return func(s *state) (float64, bool) {
		if s.redis == nil {
			return 0, false
		}
		return value(s), true
	}
}

func ofGroup(value func(*state) float64) func(*state) (float64, bool) {
	return func(s *state) (float64, bool) {
		if !s.inGroup() {
			return 0, false
		}
		return value(s), true
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range counterDescs {
		descs <- d
	}
	for _, g := range c.gauges() {
		descs <- g.desc
	}
}

func (c *Collector) gauges() []gauge {
	if c.timeout < 0 {
		return gauges
	}
	return append(gauges[:len(gauges):len(gauges)], topicGauges...)
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(metrics chan<- prometheus.Metric) {
	states := c.watcher.look()
	if c.timeout > 0 {
		c.watcher.ask(states, c.timeout)
	}
	for _, s := range states {
		topic, group := label(s.topic), label(s.group)
		for i, total := range s.total {
			metrics <- prometheus.MustNewConstMetric(counterDescs[i], prometheus.CounterValue, float64(total), topic, group)
		}
		for _, g := range c.gauges() {
			if v, ok := g.value(s); ok {
				metrics <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, v, topic, group)
			}
		}
	}
}
