package goxotel

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel/internal/statswatch"
)

// A Source is a *goxstreams.Subscriber, or a *goxstreams.Consumer of any type.
type Source = statswatch.Source

// Add makes the metrics tell of Subscribers, whatever topics they subscribe to. A
// Subscriber that is added twice counts twice.
//
// All are sums over the subscriptions of a topic and group, which are attributes
// by the names of the semantic conventions. Counters begin at 0 and only grow:
// those of a subscription that closed stay in the sum; what it did between the
// last reading and its end is missing there. Sources and counters are kept for
// good. Close ends these metrics.
func (t *Telemetry) Add(sources ...Source) { t.watcher.Add(sources...) }

// observe registers the metrics that are read, rather than counted here.
func (t *Telemetry) observe(meter metric.Meter) error {
	var errs []error
	var all []metric.Observable
	instruments := map[*statswatch.Metric]metric.Float64Observable{}
	for _, m := range statswatch.Metrics(t.timeout) {
		var instrument metric.Float64Observable
		var err error
		if m.Counter {
			instrument, err = meter.Float64ObservableCounter(m.Name, metric.WithUnit(m.Unit), metric.WithDescription(m.Help))
		} else {
			instrument, err = meter.Float64ObservableGauge(m.Name, metric.WithUnit(m.Unit), metric.WithDescription(m.Help))
		}
		instruments[m], all, errs = instrument, append(all, instrument), append(errs, err)
	}
	observing, err := meter.RegisterCallback(func(ctx context.Context, observer metric.Observer) error {
		samples := t.watcher.Samples(ctx, t.timeout)
		if err := ctx.Err(); err != nil {
			return err // that Redis has not answered is not its failure
		}
		for _, s := range samples {
			observer.ObserveFloat64(instruments[s.Metric], s.Value, metric.WithAttributes(attributesOf(s)...))
		}
		return nil
	}, all...)
	t.observing = observing
	return errors.Join(append(errs, err)...)
}

// attributesOf returns a sample's labels by the names of the semantic conventions,
// without a group in fan-out.
func attributesOf(s statswatch.Sample) (attributes []attribute.KeyValue) {
	for i, value := range s.LabelValues {
		switch name := s.Labels[i]; {
		case name == statswatch.Topic:
			attributes = append(attributes, semconv.MessagingDestinationName(value))
		case name == statswatch.DeadLetterTopic:
			attributes = append(attributes, DeadLetterTopicKey.String(value))
		case value != "":
			attributes = append(attributes, semconv.MessagingConsumerGroupName(value))
		}
	}
	return attributes
}
