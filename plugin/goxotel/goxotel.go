// Package goxotel traces and measures watermill-goxstreams with OpenTelemetry, by its
// semantic conventions for messaging.
//
//	telemetry, err := goxotel.New(goxotel.Config{Client: client})
//	config.OnDead = telemetry.OnDead(config.OnDead)     // the SubscriberConfig's
//	router.AddPublisherDecorators(telemetry.Publisher)  // or wrap a publisher: telemetry.Publisher(publisher)
//	router.AddMiddleware(telemetry.Middleware)          // first, so that it sees what the others return
//	telemetry.Add(subscriber)                           // for the metrics
//	client.AddHook(telemetry.Hook())                    // to measure acks
//
// The trace's context travels in the message's metadata. So one trace spans a
// message's publication, all of its deliveries, its way to the dead-letter
// stream, and what handlers publish.
package goxotel

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
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
	OutcomeKey       = attribute.Key("goxstreams.outcome")        // goxstreams.OutcomeKind of a delivery that did not succeed
	ReasonKey        = attribute.Key("goxstreams.reason")         // the text of an error that is no failure, and of a dead letter
	DeadKey          = attribute.Key("goxstreams.dead")           // true: the handler's error says so (goxstreams.IsDead)
	DeadKindKey      = attribute.Key("goxstreams.dead_kind")      // goxstreams.DeadKind
	ReplaysKey       = attribute.Key("goxstreams.replays")        // how often it was replayed before
	HandlerKey       = attribute.Key("goxstreams.handler")        // the router's name of the handler

	DeadLetterTopicKey = attribute.Key("goxstreams.dead_letter_topic") // of the metric goxstreams.topic.dead_letters
)

// Config configures a Telemetry. The zero value is fine for a process that has set
// OpenTelemetry's globals, its propagator too: by default that does nothing.
type Config struct {
	TracerProvider trace.TracerProvider          // default: otel.GetTracerProvider()
	MeterProvider  metric.MeterProvider          // default: otel.GetMeterProvider()
	Propagator     propagation.TextMapPropagator // default: otel.GetTextMapPropagator()

	// Client is the client of the Publishers and Subscribers. Only its options are
	// read, for server.address and server.port of spans and of the metrics
	// messaging...: those of a redis.Client, or of a Cluster's client with one
	// address. Other clients, and a Sentinel's, do not have one server. nil: spans
	// and metrics are without both. A process with several servers needs a
	// Telemetry for each.
	Client redis.UniversalClient

	// LinkOnly lets the spans of deliveries and dead letters begin traces of their
	// own, or stay in the one that the message's context is in (by another
	// middleware's span, or Subscribe's), with a link to the span that created the
	// message. By default they are its children too, so that one trace tells
	// everything: a long one, if messages are retried for days.
	LinkOnly bool

	// OmitCreateSpans makes one span of a call that publishes several messages, which
	// creates all of them. By default each has a span of its own, by which its
	// deliveries can be told from the others', and the call has links to these.
	OmitCreateSpans bool

	// OmitErrorText keeps the texts of errors out of spans: those of handlers and
	// of Publish, and the reasons of dead letters, which are texts of handlers'
	// errors. Their types, and the kinds of death, stay. For handlers whose errors
	// may quote what is in a message. (Payloads and metadata are never in a span.)
	OmitErrorText bool

	// TopicTimeout bounds how long each reading of the metrics waits for Redis to
	// say what it holds of the topics (Subscriber.TopicStats); a reading that is
	// given up before does not wait. What is not answered
	// by then is missing, and goxstreams.group.stats_success is 0. Default 2s;
	// negative: Redis is not asked, and the metrics goxstreams.group... and
	// goxstreams.topic... do not exist.
	TopicTimeout time.Duration
}

// Telemetry is what New returns. It may be used by several goroutines at once,
// and for all Publishers, routers and Subscribers of a process.
type Telemetry struct {
	tracer          trace.Tracer
	propagator      propagation.TextMapPropagator
	server          []attribute.KeyValue
	linkOnly        bool
	omitCreateSpans bool
	omitErrorText   bool
	watcher         *statswatch.Watcher
	timeout         time.Duration

	processed messagingconv.ProcessDuration
	consumed  messagingconv.ClientConsumedMessages
	operation messagingconv.ClientOperationDuration
	sent      messagingconv.ClientSentMessages
	latency   metric.Float64Histogram
	observing metric.Registration
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
		tracer:          config.TracerProvider.Tracer(scope, trace.WithSchemaURL(semconv.SchemaURL)),
		propagator:      config.Propagator,
		server:          serverOf(config.Client),
		linkOnly:        config.LinkOnly,
		omitCreateSpans: config.OmitCreateSpans,
		omitErrorText:   config.OmitErrorText,
		watcher:         statswatch.New(),
		timeout:         cmp.Or(config.TopicTimeout, statswatch.DefaultTimeout),
	}
	// The boundaries that the semantic conventions ask for.
	buckets := metric.WithExplicitBucketBoundaries(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
	var errs [5]error
	t.processed, errs[0] = messagingconv.NewProcessDuration(meter, buckets)
	t.consumed, errs[1] = messagingconv.NewClientConsumedMessages(meter)
	t.operation, errs[2] = messagingconv.NewClientOperationDuration(meter, buckets)
	t.sent, errs[3] = messagingconv.NewClientSentMessages(meter)
	t.latency, errs[4] = meter.Float64Histogram("goxstreams.message.latency", metric.WithUnit("s"),
		metric.WithDescription("Time from a message's publication, by its entry's ID, to the end of the handler that succeeded."),
		metric.WithExplicitBucketBoundaries(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600))
	err := errors.Join(errs[:]...)
	if err == nil {
		err = t.observe(meter) // last: nothing is registered by a New that fails
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Close unregisters the metrics goxstreams..., which are read from what Add was
// given. Spans and the metrics messaging... go on. It may be called twice.
func (t *Telemetry) Close() error { return t.observing.Unregister() }

// Context returns ctx within the trace that the metadata tells of: for
// goxstreams.ConsumerConfig.Context, so that spans of Process and ProcessDead
// belong to the message's trace, whatever LinkOnly is. Within Middleware it returns
// ctx as it is.
func (t *Telemetry) Context(ctx context.Context, metadata message.Metadata) context.Context {
	if ctx.Value(deliveryKey{}) != nil {
		return ctx
	}
	return t.propagator.Extract(ctx, propagation.MapCarrier(metadata))
}

// creation returns the context of the span that created a message, if that carries
// one.
func (t *Telemetry) creation(metadata message.Metadata) trace.SpanContext {
	return trace.SpanContextFromContext(t.propagator.Extract(context.Background(), propagation.MapCarrier(metadata)))
}

// within returns the context to start a span of a consumer in, and the span's links:
// to the one that created the message, and to another one that the context is in.
func (t *Telemetry) within(ctx context.Context, metadata message.Metadata) (context.Context, []trace.Link) {
	around := trace.SpanFromContext(ctx)
	ctx = t.propagator.Extract(ctx, propagation.MapCarrier(metadata)) // its baggage, too
	creation := t.creation(metadata)
	if !creation.IsValid() {
		return ctx, nil
	}
	links := []trace.Link{{SpanContext: creation}}
	if t.linkOnly {
		return trace.ContextWithSpan(ctx, around), links
	}
	if around.SpanContext().IsValid() {
		links = append(links, trace.Link{SpanContext: around.SpanContext()})
	}
	return ctx, links
}

// destination returns the attributes of a topic and a group, which in fan-out is
// empty, and of the server.
func (t *Telemetry) destination(topic, group string) []attribute.KeyValue {
	attributes := append([]attribute.KeyValue{semconv.MessagingDestinationName(statswatch.Label(topic))}, t.server...)
	if group != "" {
		attributes = append(attributes, semconv.MessagingConsumerGroupName(statswatch.Label(group)))
	}
	return attributes
}
