package goxotel

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/metric"

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
// good.
func (t *Telemetry) Add(sources ...Source) { t.watcher.Add(sources...) }

// observe registers the metrics that are read, rather than counted here.
func (t *Telemetry) observe(meter metric.Meter) error {
	var errs []error
	var all []metric.Observable
	var counters [len(statswatch.Counters)]metric.Int64ObservableCounter
	for i, c := range statswatch.Counters {
		counter, err := meter.Int64ObservableCounter("goxstreams."+c.Name, metric.WithUnit("{message}"), metric.WithDescription(c.Help))
		counters[i], all, errs = counter, append(all, counter), append(errs, err)
	}
	values := map[metric.Float64Observable]func(*statswatch.State) (float64, bool){}
	for _, g := range statswatch.Gauges(t.timeout) {
		instrument, err := meter.Float64ObservableGauge("goxstreams."+g.Name, metric.WithUnit(g.Unit), metric.WithDescription(g.Help))
		values[instrument], all, errs = g.Value, append(all, instrument), append(errs, err)
	}
	_, err := meter.RegisterCallback(func(_ context.Context, observer metric.Observer) error {
		for _, s := range t.watcher.Look(t.timeout) {
			attributes := metric.WithAttributes(destination(s.Topic, s.Group)...)
			for i, total := range s.Total {
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
