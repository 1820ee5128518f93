package goxotel

import (
	"context"
	"fmt"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/semconv/v1.43.0/messagingconv"
	"go.opentelemetry.io/otel/trace"

	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel/internal/statswatch"
)

// Publisher returns a Publisher that sends copies of messages, with the trace's
// context in their metadata, through pub. It is a decorator for
// Router.AddPublisherDecorators; its error is always nil.
//
// A message's span is a child of the one in the message's context; without one
// there, of the one that its metadata tells of: a message that is sent on stays
// in its trace. A call of several messages makes a span for each, and one for the
// call, with links to them. Closing it closes pub.
//
// A Marshaler that does not store metadata, such as BodyMarshaler without a
// MetadataField, does not carry the context.
func (t *Telemetry) Publisher(pub message.Publisher) (message.Publisher, error) {
	return &publisher{pub, t}, nil
}

type publisher struct {
	message.Publisher
	t *Telemetry
}

// String returns what Watermill would call the Publisher without the decorator.
func (p *publisher) String() string {
	if s, ok := p.Publisher.(fmt.Stringer); ok {
		return s.String()
	}
	return fmt.Sprintf("%T", p.Publisher)
}

func (p *publisher) Publish(topic string, messages ...*message.Message) error {
	if len(messages) == 0 {
		return p.Publisher.Publish(topic)
	}
	began := time.Now()
	destination := semconv.MessagingDestinationName(statswatch.Label(topic))
	attributes := []attribute.KeyValue{
		semconv.MessagingSystemKey.String(string(system)), destination,
		semconv.MessagingOperationName("send"), semconv.MessagingOperationTypeSend,
	}
	var ctx context.Context // the call's
	var spans []trace.Span
	copies := make([]*message.Message, len(messages))
	if len(messages) == 1 {
		var span trace.Span
		ctx, span, copies[0] = p.create("send ", topic, messages[0], attributes)
		spans = append(spans, span)
	} else {
		ctx = p.parent(messages[0])
		var links []trace.Link
		creating := append(attributes[:2:2], semconv.MessagingOperationName("create"), semconv.MessagingOperationTypeCreate)
		for i, msg := range messages {
			var span trace.Span
			_, span, copies[i] = p.create("create ", topic, msg, creating)
			spans = append(spans, span)
			links = append(links, trace.Link{SpanContext: span.SpanContext()})
		}
		var call trace.Span
		ctx, call = p.t.tracer.Start(ctx, "send "+statswatch.Label(topic), trace.WithSpanKind(trace.SpanKindClient), trace.WithLinks(links...),
			trace.WithAttributes(append(attributes, semconv.MessagingBatchMessageCount(len(messages)))...))
		spans = append(spans, call)
	}

	err := p.Publisher.Publish(topic, copies...)

	labels := []attribute.KeyValue{destination}
	if err != nil {
		labels = append(labels, semconv.ErrorType(err))
	}
	for _, span := range spans {
		if err != nil {
			p.t.fail(span, err)
		}
		span.End()
	}
	p.t.sent.Add(ctx, int64(len(messages)), "send", system, labels...)
	p.t.published.Record(ctx, time.Since(began).Seconds(), "send", system, append(labels, p.t.published.AttrOperationType(messagingconv.OperationTypeSend))...)
	return err
}

// create starts a message's span, and returns a copy of the message with the
// span's context in its metadata.
func (p *publisher) create(what, topic string, msg *message.Message, attributes []attribute.KeyValue) (context.Context, trace.Span, *message.Message) {
	ctx, span := p.t.tracer.Start(p.parent(msg), what+statswatch.Label(topic), trace.WithSpanKind(trace.SpanKindProducer),
		trace.WithAttributes(append(attributes[:len(attributes):len(attributes)], semconv.MessagingMessageID(statswatch.Label(msg.UUID)))...))
	sent := msg.CopyWithContext()
	p.t.propagator.Inject(ctx, propagation.MapCarrier(sent.Metadata))
	return ctx, span, sent
}

// parent returns the context of what a message is sent for.
func (p *publisher) parent(msg *message.Message) context.Context {
	if trace.SpanContextFromContext(msg.Context()).IsValid() {
		return msg.Context()
	}
	return p.t.propagator.Extract(msg.Context(), propagation.MapCarrier(msg.Metadata))
}
