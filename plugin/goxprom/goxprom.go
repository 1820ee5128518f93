// Package goxprom exports what watermill-goxstreams does, and what Redis holds
// for it, as Prometheus metrics.
//
//	collector := goxprom.NewCollector(goxprom.Config{})
//	collector.Add(subscriber)
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

	"github.com/goxstreams/watermill-goxstreams/plugin/goxprom/internal/statswatch"
)

// A Source is a *goxstreams.Subscriber, or a *goxstreams.Consumer of any type.
type Source = statswatch.Source

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
	watcher *statswatch.Watcher
	timeout time.Duration
}

var _ prometheus.Collector = (*Collector)(nil)

// NewCollector returns a Collector that watches nothing yet.
func NewCollector(config Config) *Collector {
	return &Collector{statswatch.New(), cmp.Or(config.TopicTimeout, statswatch.DefaultTimeout)}
}

// Add makes the Collector watch Subscribers, whatever topics they subscribe to. A
// Subscriber that is added twice counts twice.
func (c *Collector) Add(sources ...Source) { c.watcher.Add(sources...) }

// descs are of the counters, and of the gauges by their names there.
var (
	counterDescs [len(statswatch.Counters)]*prometheus.Desc
	gaugeDescs   = map[string]*prometheus.Desc{}
)

func init() {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("goxstreams_"+strings.ReplaceAll(name, ".", "_"), help, []string{"topic", "group"}, nil)
	}
	for i, c := range statswatch.Counters {
		counterDescs[i] = desc(c.Name+"_total", c.Help)
	}
	for _, g := range statswatch.Gauges(statswatch.DefaultTimeout) {
		suffix := ""
		if g.Unit == "s" {
			suffix = "_seconds"
		}
		gaugeDescs[g.Name] = desc(g.Name+suffix, g.Help)
	}
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range counterDescs {
		descs <- d
	}
	for _, g := range statswatch.Gauges(c.timeout) {
		descs <- gaugeDescs[g.Name]
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(metrics chan<- prometheus.Metric) {
	for _, s := range c.watcher.Look(c.timeout) {
		topic, group := statswatch.Label(s.Topic), statswatch.Label(s.Group)
		for i, total := range s.Total {
			metrics <- prometheus.MustNewConstMetric(counterDescs[i], prometheus.CounterValue, float64(total), topic, group)
		}
		for _, g := range statswatch.Gauges(c.timeout) {
			if v, ok := g.Value(s); ok {
				metrics <- prometheus.MustNewConstMetric(gaugeDescs[g.Name], prometheus.GaugeValue, v, topic, group)
			}
		}
	}
}
