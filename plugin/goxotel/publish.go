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
// A message's span is a child of the one in the message's context. A call of several
// messages makes a span for each, and one for the call, with links to them; see
// Config.OmitCreateSpans. Closing it closes pub.
//
// A message whose metadata carries a trace's context already keeps it: it was created
// elsewhere, and is sent on. The call's span has a link to the one that created it,
// and is its child if the message's context has no span.
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
	s := p.t.startSending(topic, messages)
	err := p.Publisher.Publish(topic, s.copies...)
	s.end(time.Since(began), err)
	return err
}

// sending is a call of Publish.
type sending struct {
	t      *Telemetry
	topic  string
	copies []*message.Message
	ctx    context.Context // the call's span is in it
	spans  []trace.Span    // of the messages, and then the call's
}

// startSending copies the messages, and sees to it that each copy carries the context
// of the span that created it.
func (t *Telemetry) startSending(topic string, messages []*message.Message) *sending {
	s := &sending{t: t, topic: topic, ctx: context.Background()}
	var links []trace.Link
	var uncreated []*message.Message // the call's span creates them
	for _, msg := range messages {
		if msg == nil { // for the Publisher to refuse
			s.copies = append(s.copies, nil)
			continue
		}
		copied := msg.CopyWithContext()
		s.copies = append(s.copies, copied)
		creation := t.creation(msg.Metadata)
		switch {
		case creation.IsValid():
		case t.omitCreateSpans || len(messages) == 1:
			uncreated = append(uncreated, copied)
			continue
		default:
			creation = s.create(copied)
		}
		links = append(links, trace.Link{SpanContext: creation, Attributes: []attribute.KeyValue{messageID(msg)}})
	}
	s.send(messages, links, len(uncreated) > 0)
	for _, copied := range uncreated {
		t.propagator.Inject(s.ctx, propagation.MapCarrier(copied.Metadata))
	}
	return s
}

// create starts a message's span, and puts its context into the metadata.
func (s *sending) create(msg *message.Message) trace.SpanContext {
	ctx, span := s.t.tracer.Start(msg.Context(), "create "+statswatch.Label(s.topic), trace.WithSpanKind(trace.SpanKindProducer),
		trace.WithAttributes(s.attributes(semconv.MessagingOperationName("create"), semconv.MessagingOperationTypeCreate, messageID(msg))...))
	s.spans = append(s.spans, span)
	s.t.propagator.Inject(ctx, propagation.MapCarrier(msg.Metadata))
	return span.SpanContext()
}

// send starts the call's span, in the context of the first message.
func (s *sending) send(messages []*message.Message, links []trace.Link, creates bool) {
	attributes := s.attributes(semconv.MessagingOperationName("send"), semconv.MessagingOperationTypeSend)
	if first := messages[0]; first != nil {
		if s.ctx = first.Context(); !trace.SpanContextFromContext(s.ctx).IsValid() {
			s.ctx = s.t.propagator.Extract(s.ctx, propagation.MapCarrier(first.Metadata))
		}
		if len(messages) == 1 {
			attributes = append(attributes, messageID(first))
		}
	}
	if len(messages) > 1 {
		attributes = append(attributes, semconv.MessagingBatchMessageCount(len(messages)))
	}
	kind := trace.SpanKindClient
	if creates {
		kind = trace.SpanKindProducer
	}
	var span trace.Span
	s.ctx, span = s.t.tracer.Start(s.ctx, "send "+statswatch.Label(s.topic),
		trace.WithSpanKind(kind), trace.WithLinks(links...), trace.WithAttributes(attributes...))
	s.spans = append(s.spans, span)
}

func (s *sending) end(took time.Duration, err error) {
	labels := s.t.destination(s.topic, "")
	if err != nil {
		kind := errorType(err)
		labels = append(labels, kind)
		for _, span := range s.spans {
			s.t.fail(span, err, kind)
		}
	}
	for _, span := range s.spans {
		span.End()
	}
	s.t.sent.Add(s.ctx, int64(len(s.copies)), "send", system, labels...)
	s.t.operation.Record(s.ctx, took.Seconds(), "send", system, append(labels, s.t.operation.AttrOperationType(messagingconv.OperationTypeSend))...)
}

// attributes returns those of a span of the call, with more.
func (s *sending) attributes(more ...attribute.KeyValue) []attribute.KeyValue {
	return append(append(s.t.destination(s.topic, ""), semconv.MessagingSystemKey.String(string(system))), more...)
}

func messageID(msg *message.Message) attribute.KeyValue {
	return semconv.MessagingMessageID(statswatch.Label(msg.UUID))
}
