package goxstreams

import (
	"errors"
	"fmt"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// Sentinels, to be compared with errors.Is.
var (
	// ErrSubscriberClosed is returned by Subscribe after Close. It is also the
	// cause of a message context that ends because its subscription closes.
	ErrSubscriberClosed = errors.New("goxstreams: subscriber closed")

	// ErrOutcomeUnknown means that a command was written, or begun to be, and that
	// the connection broke before its answer: all of the call's messages are stored,
	// or none is. (Or that Redis has stored some of a call's messages and refused
	// others, which its transactions do not undo; the error says how many.) The
	// library does not send them again, because the second copy could not be
	// told from the first. With PublisherConfig.Idempotence the caller may publish
	// them again.
	ErrOutcomeUnknown = redisx.ErrOutcomeUnknown

	// ErrLeaseLost is the cause of a message context that ended because
	// another consumer may have the message by now.
	ErrLeaseLost = errors.New("goxstreams: lease lost")

	// ErrBroken is matched by the reason of a BrokenMessage: the entry could
	// not be unmarshaled.
	ErrBroken = errors.New("goxstreams: broken entry")

	// ErrDead is matched by every error that says a message is dead:
	// ErrRetriesExhausted and ErrPermanent.
	ErrDead = errors.New("goxstreams: dead message")

	// ErrRetriesExhausted means that the retry limit is used up.
	ErrRetriesExhausted = fmt.Errorf("%w: retries exhausted", ErrDead)

	// ErrPermanent means that trying again was judged to be of no use.
	ErrPermanent = fmt.Errorf("%w: permanent error", ErrDead)

	// ErrNacked is what Retry.ShouldRetry sees for a message that was nacked
	// without saying why.
	ErrNacked = errors.New("goxstreams: message nacked")

	// ErrUnsupported means that the server, or the right to use it, lacks what
	// an option needs. The message names both.
	ErrUnsupported = xstream.ErrUnsupported
)

// configErrors collects every mistake of a config, each naming its field.
type configErrors struct {
	typeName string // what the fields belong to
	errs     []error
}

func (c *configErrors) add(field, format string, args ...any) {
	if c.typeName != "" {
		field = c.typeName + "." + field
	}
	c.errs = append(c.errs, fmt.Errorf("goxstreams: %s: %s", field, fmt.Sprintf(format, args...)))
}

func (c *configErrors) err() error { return errors.Join(c.errs...) }
