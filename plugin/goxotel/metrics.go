package goxotel

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/metric"
)

// Add makes the metrics tell of Subscribers of a consumer group, whatever topics
// they subscribe to; empty: fan-out. A Subscriber that is added twice counts
// twice.
//
// All are sums over the subscriptions of a topic and group, which are attributes
// by the names of the semantic conventions. Counters begin at 0 and only grow:
// those of a subscription that closed stay in the sum; what it did between the
// last reading and its end is missing there. Sources and counters are kept for
// good.
func (t *Telemetry) Add(group string, sources ...Source) { t.watcher.add(group, sources) }

// observe registers the metrics that are read, rather than counted here.
func (t *Telemetry) observe(meter metric.Meter) error {
	var errs []error
	var all []metric.Observable
	var counters [len(allCounters)]metric.Int64ObservableCounter
	for i, c := range allCounters {
		counter, err := meter.Int64ObservableCounter("goxstreams."+c.name, metric.WithUnit("{message}"), metric.WithDescription(c.help))
		counters[i], all, errs = counter, append(all, counter), append(errs, err)
	}
	values := map[metric.Float64Observable]func(*state) (float64, bool){}
	for _, g := range gaugesWithin(t.timeout) {
		instrument, err := meter.Float64ObservableGauge("goxstreams."+g.name, metric.WithUnit(g.unit), metric.WithDescription(g.help))
		values[instrument], all, errs = g.value, append(all, instrument), append(errs, err)
	}
	_, err := meter.RegisterCallback(func(_ context.Context, observer metric.Observer) error {
		for _, s := range t.watcher.look(t.timeout) {
			attributes := metric.WithAttributes(destination(s.topic, s.group)...)
			for i, total := range s.total {
				observer.ObserveInt64(counters[i], total, attributes)
			}
			for instrument, value := range values {
				if v, ok := value(s); ok {
					observer.ObserveFloat64(instrument, v, attributes)
				}
			}
		}
		return nil
	}, all...)
	return errors.Join(append(errs, err)...)
}
