package goxotel

import (
	"context"
	"errors"
	"reflect"
	"regexp"
	"strings"

	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// named are errors that say more than what they wrap, or are wrapped by, the more
// telling ones first.
var named = []struct {
	err  error
	name string
}{
	{goxstreams.ErrOutcomeUnknown, "goxstreams.ErrOutcomeUnknown"},
	{goxstreams.ErrUnsupported, "goxstreams.ErrUnsupported"},
	{goxstreams.ErrBroken, "goxstreams.ErrBroken"},
	{goxstreams.ErrLeaseLost, "goxstreams.ErrLeaseLost"},
	{goxstreams.ErrSubscriberClosed, "goxstreams.ErrSubscriberClosed"},
	{redis.ErrPoolTimeout, "redis.ErrPoolTimeout"},
	{redis.ErrPoolExhausted, "redis.ErrPoolExhausted"},
	{redis.ErrClosed, "redis.ErrClosed"},
	{redis.Nil, "redis.Nil"},
	{context.DeadlineExceeded, "context.DeadlineExceeded"},
	{context.Canceled, "context.Canceled"},
}

// errorCode is the code that begins an error of Redis.
var errorCode = regexp.MustCompile(`^[A-Z][A-Z0-9_]{1,31}(?: |$)`)

// errorType returns error.type of an error, which is the same however it is wrapped:
// what its method ErrorType says, the name of an error that is known here, the code
// of an error of Redis, or its Go type.
func errorType(err error) attribute.KeyValue {
	var own interface{ ErrorType() string }
	if errors.As(err, &own) && own.ErrorType() != "" {
		return semconv.ErrorTypeKey.String(valid(own.ErrorType()))
	}
	for _, n := range named {
		if errors.Is(err, n.err) {
			return semconv.ErrorTypeKey.String(n.name)
		}
	}
	var reply redis.Error
	if errors.As(err, &reply) {
		if code := errorCode.FindString(reply.Error()); code != "" {
			return semconv.ErrorTypeKey.String(strings.TrimSuffix(code, " "))
		}
	}
	cause := unwrapped(err)
	switch cause { // the marks of a message that died without its handler
	case goxstreams.ErrRetriesExhausted:
		return semconv.ErrorTypeKey.String("goxstreams.ErrRetriesExhausted")
	case goxstreams.ErrPermanent:
		return semconv.ErrorTypeKey.String("goxstreams.ErrPermanent")
	case goxstreams.ErrDead:
		return semconv.ErrorTypeKey.String("goxstreams.ErrDead")
	}
	return semconv.ErrorType(cause)
}

// wrappers are the packages of which a type that wraps an error says nothing about
// it: what fmt.Errorf and errors.Join return, the marks of goxstreams and of
// cenkalti/backoff, and a stack.
var wrappers = map[string]bool{
	"fmt": true, "errors": true, "github.com/pkg/errors": true, "github.com/cenkalti/backoff/v5": true,
	"github.com/goxstreams/watermill-goxstreams": true,
}

// unwrapped returns the outermost error that is more than a wrapper, of several the
// first.
func unwrapped(err error) error {
	for {
		if err == goxstreams.ErrRetriesExhausted || err == goxstreams.ErrPermanent {
			return err // which wrap ErrDead
		}
		kind := reflect.TypeOf(err)
		if kind.Kind() == reflect.Pointer {
			kind = kind.Elem()
		}
		if !wrappers[kind.PkgPath()] {
			return err
		}
		var inner error
		switch w := err.(type) {
		case interface{ Unwrap() error }:
			inner = w.Unwrap()
		case interface{ Unwrap() []error }:
			if all := w.Unwrap(); len(all) > 0 {
				inner = all[0]
			}
		}
		if inner == nil {
			return err
		}
		err = inner
	}
}

// valid returns a text as exporters need it: one that is not UTF-8 makes them refuse
// everything that is sent together.
func valid(text string) string { return strings.ToValidUTF8(text, "\uFFFD") }

// fail records an error that made an operation fail.
func (t *Telemetry) fail(span trace.Span, err error, kind attribute.KeyValue) {
	span.SetAttributes(kind)
	if t.omitErrorText {
		span.SetStatus(codes.Error, "")
		return
	}
	text := valid(err.Error())
	if text != err.Error() {
		err = errors.New(text)
	}
	span.RecordError(err)
	span.SetStatus(codes.Error, text)
}

// reason returns the attribute with the text of an error that is no failure of the
// operation; none if texts are left out.
func (t *Telemetry) reason(text string) []attribute.KeyValue {
	if t.omitErrorText {
		return nil
	}
	return []attribute.KeyValue{ReasonKey.String(valid(text))}
}
