package goxotel

import (
	"context"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel/internal/statswatch"
)

type deliveryKey struct{}

// panicked is what a span says of a handler that did not return; with what, only
// whoever recovers it knows.
type panicked struct{}

func (panicked) Error() string     { return "panic" }
func (panicked) ErrorType() string { return "panic" }

// Middleware makes a span of each delivery, a child of the span that the message
// was published in, and measures it. Handlers find the span in the message's
// context. What they return gets it there too, unless it has a span already, so
// that Publisher's spans become its children.
//
// Messages of other Subscribers, and copies of ours, pass through unchanged.
func (t *Telemetry) Middleware(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) (produced []*message.Message, err error) {
		delivery, ours := goxstreams.DeliveryFromContext(msg.Context())
		if !ours {
			return h(msg)
		}
		began, before := time.Now(), msg.Context()
		ctx, span := t.startDelivery(delivery, msg)
		msg.SetContext(ctx)
		err = panicked{}
		defer func() { // a panic goes on, for others to recover with its stack
			msg.SetContext(before)
			t.endDelivery(ctx, span, delivery, time.Since(began), err)
		}()
		produced, err = h(msg)
		for _, p := range produced {
			if p != msg && !trace.SpanContextFromContext(p.Context()).IsValid() {
				p.SetContext(trace.ContextWithSpan(p.Context(), span))
			}
		}
		return produced, err
	}
}

func (t *Telemetry) startDelivery(delivery goxstreams.Delivery, msg *message.Message) (context.Context, trace.Span) {
	ctx := t.propagator.Extract(msg.Context(), propagation.MapCarrier(msg.Metadata))
	attributes := append(destination(delivery.Topic, delivery.Group),
		semconv.MessagingSystemKey.String(string(system)),
		semconv.MessagingOperationName("process"), semconv.MessagingOperationTypeProcess,
		semconv.MessagingMessageID(statswatch.Label(msg.UUID)), EntryIDKey.String(delivery.ID),
		DeliveryCountKey.Int64(delivery.Count), RetryCountKey.Int64(delivery.RetryCount()),
	)
	if delivery.Consumer != "" {
		attributes = append(attributes, semconv.MessagingClientID(statswatch.Label(delivery.Consumer)))
	}
	if name := message.HandlerNameFromCtx(ctx); name != "" {
		attributes = append(attributes, HandlerKey.String(name))
	}
	ctx, span := t.tracer.Start(ctx, "process "+statswatch.Label(delivery.Topic),
		trace.WithSpanKind(trace.SpanKindConsumer), trace.WithAttributes(attributes...))
	return context.WithValue(ctx, deliveryKey{}, true), span
}

func (t *Telemetry) endDelivery(ctx context.Context, span trace.Span, delivery goxstreams.Delivery, took time.Duration, err error) {
	labels := destination(delivery.Topic, delivery.Group)
	if err != nil {
		labels = append(labels, semconv.ErrorType(err))
		t.fail(span, err)
		if goxstreams.IsDead(err) {
			span.SetAttributes(DeadKey.Bool(true))
		}
	}
	span.End()
	t.processed.Record(ctx, took.Seconds(), "process", system, labels...)
}

// destination returns the attributes of a topic and a group; in fan-out there is
// none.
func destination(topic, group string) []attribute.KeyValue {
	attributes := []attribute.KeyValue{semconv.MessagingDestinationName(statswatch.Label(topic))}
	if group != "" {
		attributes = append(attributes, semconv.MessagingConsumerGroupName(statswatch.Label(group)))
	}
	return attributes
}

// OnDead returns a SubscriberConfig.OnDead that makes a span of the move to the
// dead-letter stream, in the message's trace, with the kind of death as an
// attribute and the reason as the status (see Config.OmitErrorText), and within it
// calls next, which may be nil. A broken entry has no message that could tell of a
// trace: its span begins one.
func (t *Telemetry) OnDead(next func(context.Context, goxstreams.DeadMessage)) func(context.Context, goxstreams.DeadMessage) {
	return func(ctx context.Context, dead goxstreams.DeadMessage) {
		attributes := append(destination(dead.Topic, dead.Group),
			semconv.MessagingSystemKey.String(string(system)),
			semconv.MessagingOperationName("dead_letter"), semconv.MessagingOperationTypeSettle,
			semconv.MessagingClientID(statswatch.Label(dead.Consumer)), EntryIDKey.String(dead.EntryID),
			DeliveryCountKey.Int64(dead.Deliveries), RetryCountKey.Int64(max(dead.Deliveries-1, 0)),
			DeadKindKey.String(dead.Kind.String()), ReplaysKey.Int(dead.Replays),
		)
		if dead.Handler != "" {
			attributes = append(attributes, HandlerKey.String(dead.Handler))
		}
		if dead.Message != nil {
			attributes = append(attributes, semconv.MessagingMessageID(statswatch.Label(dead.Message.UUID)))
			ctx = t.propagator.Extract(ctx, propagation.MapCarrier(dead.Message.Metadata))
		}
		ctx, span := t.tracer.Start(ctx, "dead_letter "+statswatch.Label(dead.Topic),
			trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(attributes...))
		defer span.End()
		reason := strings.ToValidUTF8(dead.Reason, "\uFFFD")
		if t.omitErrorText {
			reason = ""
		}
		span.SetStatus(codes.Error, reason)
		if next != nil {
			next(ctx, dead)
		}
	}
}
