package goxotel

import (
	"context"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
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

// Middleware makes a span of each delivery, and measures it. The span has a link to
// the one that created the message, and is its child unless Config.LinkOnly is set.
// Handlers find the span in the message's context. What they return gets it there
// too, unless it has a span already, so that Publisher's spans become its children.
//
// The handler's error is the span's, unless it is no failure: after a Snooze, and
// after what a shutdown interrupted, the status is unset, and OutcomeKey and
// ReasonKey tell of it.
//
// Messages of other Subscribers pass through unchanged.
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
			t.endDelivery(ctx, span, delivery, time.Since(began), err, goxstreams.OutcomeOf(msg, err))
		}()
		produced, err = h(msg)
		return inSpan(span, msg, produced), err
	}
}

// inSpan returns what a handler returned, with the span in the contexts. The handled
// message itself keeps its context: a copy is sent on.
func inSpan(span trace.Span, handled *message.Message, produced []*message.Message) []*message.Message {
	messages := make([]*message.Message, len(produced))
	for i, p := range produced {
		switch {
		case p == nil:
		case p == handled:
			p = p.CopyWithContext() // the context has the span
		case !trace.SpanContextFromContext(p.Context()).IsValid():
			p.SetContext(trace.ContextWithSpan(p.Context(), span))
		}
		messages[i] = p
	}
	return messages
}

func (t *Telemetry) startDelivery(delivery goxstreams.Delivery, msg *message.Message) (context.Context, trace.Span) {
	ctx, links := t.within(msg.Context(), msg.Metadata)
	attributes := append(t.destination(delivery.Topic, delivery.Group),
		semconv.MessagingSystemKey.String(string(system)),
		semconv.MessagingOperationName("process"), semconv.MessagingOperationTypeProcess,
		semconv.MessagingMessageID(statswatch.Label(msg.UUID)), EntryIDKey.String(delivery.ID),
		DeliveryCountKey.Int64(delivery.Count), RetryCountKey.Int64(delivery.RetryCount()),
	)
	if delivery.Consumer != "" {
		attributes = append(attributes, semconv.MessagingClientID(statswatch.Label(delivery.Consumer)))
	}
	if name := message.HandlerNameFromCtx(ctx); name != "" {
		attributes = append(attributes, HandlerKey.String(statswatch.Label(name)))
	}
	ctx, span := t.tracer.Start(ctx, "process "+statswatch.Label(delivery.Topic),
		trace.WithSpanKind(trace.SpanKindConsumer), trace.WithLinks(links...), trace.WithAttributes(attributes...))
	return context.WithValue(ctx, deliveryKey{}, true), span
}

func (t *Telemetry) endDelivery(ctx context.Context, span trace.Span, delivery goxstreams.Delivery, took time.Duration, err error, outcome goxstreams.OutcomeKind) {
	labels := t.destination(delivery.Topic, delivery.Group)
	if outcome != "" {
		span.SetAttributes(OutcomeKey.String(string(outcome)))
	}
	switch {
	case err == nil:
		if published := delivery.Time(); !published.IsZero() {
			t.latency.Record(ctx, max(0, time.Since(published).Seconds()), metric.WithAttributes(labels...))
		}
	case outcome == goxstreams.OutcomeSnoozed, outcome == goxstreams.OutcomeReleased:
		span.SetAttributes(t.reason(err.Error())...)
	default:
		kind := deliveryErrorType(err, outcome)
		labels = append(labels, kind)
		t.fail(span, err, kind)
		if goxstreams.IsDead(err) {
			span.SetAttributes(DeadKey.Bool(true))
		}
	}
	span.End()
	t.processed.Record(ctx, took.Seconds(), "process", system, labels...)
	t.consumed.Add(ctx, 1, "process", system, labels...)
}

// deliveryErrorType is the type of a handler's error: the lost lease, whatever the
// handler says of the end of its context.
func deliveryErrorType(err error, outcome goxstreams.OutcomeKind) attribute.KeyValue {
	if outcome == goxstreams.OutcomeLeaseLost {
		err = goxstreams.ErrLeaseLost
	}
	return errorType(err)
}
