// Package goxprom exports what watermill-goxstreams does, and what Redis holds
// for it, as Prometheus metrics.
//
//	collector := goxprom.NewCollector(goxprom.Config{})
//	prometheus.MustRegister(collector)
//	collector.Add(subscriber)                             // counters and the state of topics
//	router.AddMiddleware(collector.Middleware)            // histograms of handlers
//	router.AddPublisherDecorators(collector.Publisher)    // what Publish does
//
// Metrics of subscriptions have the labels topic and group, and are sums over the
// subscriptions of both. Metrics of a topic as a whole have no group.
package goxprom

import (
	"cmp"
	"context"
	"fmt"
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
	// missing, and goxstreams_group_stats_success is 0. Default 2s; negative: Redis
	// is not asked, and the metrics goxstreams_group_... and goxstreams_topic_... do
	// not exist.
	TopicTimeout time.Duration

	// Buckets are the upper bounds of the histograms' buckets in seconds, in
	// increasing order; NewCollector panics if they are not. Default: 18 from 1 ms to
	// an hour.
	Buckets []float64
}

// Collector is a prometheus.Collector. It may be used by several goroutines at
// once, and for all Publishers, routers and Subscribers of a process.
//
// Its counters begin at 0 and only grow, for as long as it lives: those of a
// subscription that closed stay in the sum. What a subscription did between the
// last scrape and its end is missing there.
//
// It keeps a topic's metrics, and its Sources, for good. Where Subscribers or
// topics come and go without end, give each batch a Collector, and unregister
// that. Where one topic's name stands for streams on two servers, give each a
// Collector, and tell them apart by prometheus.WrapRegistererWith.
type Collector struct {
	watcher *statswatch.Watcher
	timeout time.Duration

	handlers, latency *prometheus.HistogramVec // by Middleware
	published         *prometheus.CounterVec   // by Publisher, as the next
	publishing        *prometheus.HistogramVec
}

var _ prometheus.Collector = (*Collector)(nil)

var defaultBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600}

// NewCollector returns a Collector that watches nothing yet.
func NewCollector(config Config) *Collector {
	buckets := config.Buckets
	if len(buckets) == 0 {
		buckets = defaultBuckets
	}
	for i := range buckets[1:] {
		if !(buckets[i] < buckets[i+1]) {
			panic(fmt.Sprintf("goxprom: Config.Buckets: %v is followed by %v; they must increase", buckets[i], buckets[i+1]))
		}
	}
	histogram := func(name, help string, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "goxstreams", Name: name, Help: help, Buckets: buckets}, labels)
	}
	return &Collector{
		watcher: statswatch.New(),
		timeout: cmp.Or(config.TopicTimeout, statswatch.DefaultTimeout),
		handlers: histogram("handler_duration_seconds", "Duration of handlers, for each delivery, by whether it failed.",
			statswatch.Topic, statswatch.Group, "success"),
		latency: histogram("message_latency_seconds", "Time from a message's publication to the end of the handler that succeeded.",
			statswatch.Topic, statswatch.Group),
		published: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "goxstreams", Name: "publisher_messages_total", Help: "Messages given to Publish, by what became of them.",
		}, []string{statswatch.Topic, "outcome"}),
		publishing: histogram("publisher_duration_seconds", "Duration of calls of Publish, by their outcome.", statswatch.Topic, "outcome"),
	}
}

// Add makes the Collector watch Subscribers, whatever topics they subscribe to. A
// Subscriber that is added twice counts twice.
func (c *Collector) Add(sources ...Source) { c.watcher.Add(sources...) }

// descs are of the metrics that are read from Sources.
var descs = map[*statswatch.Metric]*prometheus.Desc{}

func init() {
	for _, m := range statswatch.Metrics(statswatch.DefaultTimeout) {
		descs[m] = prometheus.NewDesc(name(m), m.Help, m.Labels, nil)
	}
}

// name returns a metric's name in Prometheus: what OpenTelemetry's would be
// translated to.
func name(m *statswatch.Metric) string {
	name := strings.ReplaceAll(m.Name, ".", "_")
	if m.Unit == "s" {
		name += "_seconds"
	}
	if m.Counter {
		name += "_total"
	}
	return name
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range statswatch.Metrics(c.timeout) {
		out <- descs[m]
	}
	for _, own := range c.own() {
		own.Describe(out)
	}
}

// own returns the metrics that the Collector counts itself.
func (c *Collector) own() []prometheus.Collector {
	return []prometheus.Collector{c.handlers, c.latency, c.published, c.publishing}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	for _, s := range c.watcher.Samples(context.Background(), c.timeout) {
		kind := prometheus.GaugeValue
		if s.Counter {
			kind = prometheus.CounterValue
		}
		out <- prometheus.MustNewConstMetric(descs[s.Metric], kind, s.Value, s.LabelValues...)
	}
	for _, own := range c.own() {
		own.Collect(out)
	}
}
