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
	"cmp"
	"strings"
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
	return &Collector{newWatcher(), cmp.Or(config.TopicTimeout, defaultTimeout)}
}

// Add makes the Collector watch Subscribers of a consumer group, whatever topics
// they subscribe to; empty: fan-out. A Subscriber that is added twice counts
// twice.
func (c *Collector) Add(group string, sources ...Source) { c.watcher.add(group, sources) }

// descs are of the counters, and of the gauges by their names there.
var (
	counterDescs [len(allCounters)]*prometheus.Desc
	gaugeDescs   = map[string]*prometheus.Desc{}
)

func init() {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("goxstreams_"+strings.ReplaceAll(name, ".", "_"), help, []string{"topic", "group"}, nil)
	}
	for i, c := range allCounters {
		counterDescs[i] = desc(c.name+"_total", c.help)
	}
	for _, g := range gaugesWithin(defaultTimeout) {
		suffix := ""
		if g.unit == "s" {
			suffix = "_seconds"
		}
		gaugeDescs[g.name] = desc(g.name+suffix, g.help)
	}
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range counterDescs {
		descs <- d
	}
	for _, g := range gaugesWithin(c.timeout) {
		descs <- gaugeDescs[g.name]
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(metrics chan<- prometheus.Metric) {
	for _, s := range c.watcher.look(c.timeout) {
		topic, group := label(s.topic), label(s.group)
		for i, total := range s.total {
			metrics <- prometheus.MustNewConstMetric(counterDescs[i], prometheus.CounterValue, float64(total), topic, group)
		}
		for _, g := range gaugesWithin(c.timeout) {
			if v, ok := g.value(s); ok {
				metrics <- prometheus.MustNewConstMetric(gaugeDescs[g.name], prometheus.GaugeValue, v, topic, group)
			}
		}
	}
}
