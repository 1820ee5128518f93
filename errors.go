package goxstreams

import (
	"errors"
	"fmt"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
	"github.com/redis/go-redis/v9"
)

// Sentinel errors, for errors.Is.
var (
	// ErrSubscriberClosed is returned by Subscribe after Close. It is also the
	// cause of a message context that is canceled because its subscription closes.
	ErrSubscriberClosed = errors.New("goxstreams: subscriber closed")

	// ErrOutcomeUnknown means that a command was written, at least in part, and the
	// connection broke before its answer: either all of the call's messages are
	// stored, or none. (Or Redis has stored some of the messages and rejected
	// others, since its transactions do not roll back; then the error says how
	// many.) The library does not resend them, because nobody could tell a second
	// copy from the first. With PublisherConfig.Idempotence the caller can safely
	// publish them again.
	ErrOutcomeUnknown = redisx.ErrOutcomeUnknown

	// ErrLeaseLost is the cause of a message context that was canceled because
	// another consumer may have the message.
	ErrLeaseLost = errors.New("goxstreams: lease lost")

	// ErrBroken matches the Err of a BrokenMessage: the entry could not be
	// unmarshaled.
	ErrBroken = errors.New("goxstreams: broken entry")

	// ErrDead matches every error that makes a message dead, such as
	// ErrRetriesExhausted and ErrPermanent.
	ErrDead = errors.New("goxstreams: dead message")

	// ErrRetriesExhausted means that the message is out of retries.
	ErrRetriesExhausted = fmt.Errorf("%w: retries exhausted", ErrDead)

	// ErrPermanent means that retrying is pointless.
	ErrPermanent = fmt.Errorf("%w: permanent error", ErrDead)

	// ErrNacked is the error that Retry.ShouldRetry gets for a message that was
	// nacked without an error.
	ErrNacked = errors.New("goxstreams: message nacked")

	// ErrUnsupported means that the server lacks a feature that an option needs, or
	// that the user lacks the permission for it. The error's text names both.
	ErrUnsupported = xstream.ErrUnsupported
)

// wrap says in an error what failed. A nil err stays nil.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("goxstreams: %s: %w", fmt.Sprintf(format, args...), redisx.Redacted(err))
}

// configErrors collects every mistake in a config, each with its field.
type configErrors struct {
	typeName string // the config type that the fields belong to
	errs     []error
}

// addIf adds a mistake if it was made.
func (c *configErrors) addIf(wrong bool, field, format string, args ...any) {
	if !wrong {
		return
	}
	if c.typeName != "" {
		field = c.typeName + "." + field
	}
	c.errs = append(c.errs, fmt.Errorf("goxstreams: %s: %s", field, fmt.Sprintf(format, args...)))
}

// atLeast notes a number that is negative, or less than least although it is not 0, the default.
func atLeast[N int | int64 | time.Duration](c *configErrors, field string, n, least N) {
	c.addIf(n < 0, field, "is negative: %v", n)
	c.addIf(n > 0 && n < least, field, "is %v; it must be at least %v", n, least)
}

// arguments checks those that functions have in common.
func (c *configErrors) arguments(clientName string, client redis.UniversalClient, topicName, topic string) {
	c.addIf(redisx.IsNil(client), clientName, "a client is required")
	c.addIf(topic == "", topicName, "is empty")
}

func (c *configErrors) err() error { return errors.Join(c.errs...) }
