// Package goxotel traces and measures watermill-goxstreams with OpenTelemetry.
//
//	telemetry, err := goxotel.New(goxotel.Config{})
//	config.OnDead = telemetry.OnDead(config.OnDead)     // the SubscriberConfig's
//	router.AddPublisherDecorators(telemetry.Publisher)  // or wrap a publisher: telemetry.Publisher(publisher)
//	router.AddMiddleware(telemetry.Middleware)          // first, so that it sees what the others return
//	telemetry.Add(subscriber)                           // for the metrics
//
// The trace's context travels in the message's metadata. So one trace spans a
// message's publication, all of its deliveries, its way to the dead-letter
// stream, and what handlers publish.
package goxotel

import (
	"cmp"
	"context"
	"errors"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/semconv/v1.43.0/messagingconv"
	"go.opentelemetry.io/otel/trace"

	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel/internal/statswatch"
)

// scope is the name of what makes the spans and metrics.
const scope = "github.com/goxstreams/watermill-goxstreams/plugin/goxotel"

// system is messaging.system, for which the semantic conventions allow names that
// they do not list.
const system messagingconv.SystemAttr = "redis"

// Attributes of spans, beside those of the semantic conventions for messaging.
const (
	EntryIDKey       = attribute.Key("goxstreams.entry_id")       // the entry's, in the topic
	DeliveryCountKey = attribute.Key("goxstreams.delivery_count") // by Redis's count, from 1
	RetryCountKey    = attribute.Key("goxstreams.retry_count")    // the deliveries before this one
	DeadKey          = attribute.Key("goxstreams.dead")           // true: the handler's error says so (goxstreams.IsDead)
	DeadKindKey      = attribute.Key("goxstreams.dead_kind")      // goxstreams.DeadKind
	ReplaysKey       = attribute.Key("goxstreams.replays")        // how often it was replayed before
	HandlerKey       = attribute.Key("goxstreams.handler")        // the router's name of the handler
)

// Config configures a Telemetry. The zero value is fine for a process that has set
// OpenTelemetry's globals, its propagator too: by default that does nothing.
type Config struct {
	TracerProvider trace.TracerProvider          // default: otel.GetTracerProvider()
	MeterProvider  metric.MeterProvider          // default: otel.GetMeterProvider()
	Propagator     propagation.TextMapPropagator // default: otel.GetTextMapPropagator()

	// OmitErrorText keeps the texts of errors out of spans: those of handlers and
	// of Publish, and the reasons of dead letters, which are texts of handlers'
	// errors. Their types, and the kinds of death, stay. For handlers whose errors
	// may quote what is in a message. (Payloads and metadata are never in a span.)
	OmitErrorText bool

	// TopicTimeout bounds how long each reading of the metrics waits for Redis to
	// say what it holds of the topics (Subscriber.TopicStats). What is not answered
	// by then is missing, and goxstreams.topic.stats_success is 0. Default 2s;
	// negative: Redis is not asked, and the metrics goxstreams.topic... do not
	// exist.
	TopicTimeout time.Duration
}

// Telemetry is what New returns. It may be used by several goroutines at once,
// and for all Publishers, routers and Subscribers of a process.
type Telemetry struct {
	tracer        trace.Tracer
	propagator    propagation.TextMapPropagator
	omitErrorText bool
	watcher       *statswatch.Watcher
	timeout       time.Duration

	processed messagingconv.ProcessDuration
	published messagingconv.ClientOperationDuration
	sent      messagingconv.ClientSentMessages
}

// New returns a Telemetry. Its error is the MeterProvider's.
func New(config Config) (*Telemetry, error) {
	if config.TracerProvider == nil {
		config.TracerProvider = otel.GetTracerProvider()
	}
	if config.MeterProvider == nil {
		config.MeterProvider = otel.GetMeterProvider()
	}
	if config.Propagator == nil {
		config.Propagator = otel.GetTextMapPropagator()
	}
	meter := config.MeterProvider.Meter(scope, metric.WithSchemaURL(semconv.SchemaURL))
	t := &Telemetry{
		tracer:        config.TracerProvider.Tracer(scope, trace.WithSchemaURL(semconv.SchemaURL)),
		propagator:    config.Propagator,
		omitErrorText: config.OmitErrorText,
		watcher:       statswatch.New(),
		timeout:       cmp.Or(config.TopicTimeout, statswatch.DefaultTimeout),
	}
	// The boundaries that the semantic conventions ask for.
	buckets := metric.WithExplicitBucketBoundaries(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
	var errs [4]error
	t.processed, errs[0] = messagingconv.NewProcessDuration(meter, buckets)
	t.published, errs[1] = messagingconv.NewClientOperationDuration(meter, buckets)
	t.sent, errs[2] = messagingconv.NewClientSentMessages(meter)
	errs[3] = t.observe(meter)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return t, nil
}

// Context returns ctx within the trace that the metadata tells of: for
// goxstreams.ConsumerConfig.Context, so that spans of Process and ProcessDead
// belong to the message's trace. Within Middleware it returns ctx as it is.
func (t *Telemetry) Context(ctx context.Context, metadata message.Metadata) context.Context {
	if ctx.Value(deliveryKey{}) != nil {
		return ctx
	}
	return t.propagator.Extract(ctx, propagation.MapCarrier(metadata))
}

// fail writes an error down.
func (t *Telemetry) fail(span trace.Span, err error) {
	span.SetAttributes(semconv.ErrorType(err))
	if t.omitErrorText {
		span.SetStatus(codes.Error, "")
		return
	}
	text := err.Error()
	if !utf8.ValidString(text) { // which exporters refuse, with all that is sent together
		text = strings.ToValidUTF8(text, "\uFFFD")
		err = errors.New(text)
	}
	span.RecordError(err)
	span.SetStatus(codes.Error, text)
}
