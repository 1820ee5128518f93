package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel"
)

// tree prints spans below their parents, each in the order in which they began;
// traces in the order of their messages' IDs.
func tree(spans tracetest.SpanStubs) string {
	slices.SortStableFunc(spans, func(a, b tracetest.SpanStub) int {
		return cmp.Or(a.StartTime.Compare(b.StartTime), strings.Compare(a.Name, b.Name))
	})
	known := map[trace.SpanID]bool{}
	children := map[trace.SpanID][]tracetest.SpanStub{}
	for _, s := range spans {
		known[s.SpanContext.SpanID()] = true
		children[s.Parent.SpanID()] = append(children[s.Parent.SpanID()], s)
	}
	var out strings.Builder
	var write func(s tracetest.SpanStub, indent string)
	write = func(s tracetest.SpanStub, indent string) {
		out.WriteString(indent + line(s) + "\n")
		for _, child := range children[s.SpanContext.SpanID()] {
			write(child, indent+"  ")
		}
	}
	roots := slices.DeleteFunc(slices.Clone(spans), func(s tracetest.SpanStub) bool { return known[s.Parent.SpanID()] })
	slices.SortStableFunc(roots, func(a, b tracetest.SpanStub) int { return strings.Compare(line(a), line(b)) })
	for _, root := range roots {
		write(root, "")
	}
	return out.String()
}

// line is a span in one line.
func line(s tracetest.SpanStub) string {
	attributes := attribute.NewSet(s.Attributes...)
	text := s.Name
	if id, ok := attributes.Value(semconv.MessagingMessageIDKey); ok {
		text += ": " + id.AsString()
	}
	delivery, delivered := attributes.Value(goxotel.DeliveryCountKey)
	if kind, ok := attributes.Value(goxotel.DeadKindKey); ok {
		return fmt.Sprintf("%s, %s after delivery %d", text, kind.AsString(), delivery.AsInt64())
	}
	if delivered {
		text += fmt.Sprintf(", delivery %d", delivery.AsInt64())
	}
	if s.Status.Code == codes.Error {
		text += ", failed: " + s.Status.Description
	}
	if isDead, _ := attributes.Value(goxotel.DeadKey); isDead.AsBool() {
		text += ", dead"
	}
	return text
}
