package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// Schedule lists, shows, cancels and reschedules the delayed messages of a topic. It keeps no
// state, and may be used by several goroutines at once. To delay a message, see
// Publisher.Publish.
type Schedule struct {
	stream xstream.Stream
}

// NewSchedule returns the Schedule of a topic. The client stays the caller's.
func NewSchedule(c redis.UniversalClient, topic string) (*Schedule, error) {
	errs := configErrors{typeName: "NewSchedule"}
	errs.arguments("c", c, "topic", topic)
	if err := errs.err(); err != nil {
		return nil, err
	}
	return &Schedule{xstream.New(redisx.Client{UniversalClient: c}, topic, "")}, nil
}

// DelayedMessage is a message that is not due yet.
type DelayedMessage struct {
	UUID string
	Due  time.Time // by the server's clock, in milliseconds

	// Message is the published message; nil if it is not in DefaultMarshaler's format.
	Message *message.Message

	Fields []string // the fields of the future entry: name, value, ...
}

// Count returns the number of delayed messages.
func (s *Schedule) Count(ctx context.Context) (int64, error) {
	d, err := s.stream.DelayedSummary(ctx)
	return d.Count, s.wrap("count", err)
}

// schedulePage is how many delayed messages are read in one round trip.
const schedulePage = 100

// All returns the delayed messages, in the order in which they are due. It holds one page
// of them in memory. The loop may cancel messages. A message that becomes due or is
// rescheduled during the loop may be missing, or be returned twice.
//
// A message that cannot be read is returned with an error and its UUID; the loop
// continues after it. If Redis does not answer, the error comes with an empty UUID and
// ends the loop.
func (s *Schedule) All(ctx context.Context) iter.Seq2[DelayedMessage, error] {
	return s.After(ctx, time.Time{}, "")
}

// After returns the delayed messages that follow a message with this due time and UUID, as
// All does: to continue later, keep both of the last message. That message need not be
// delayed any more. With an empty UUID, After is All.
func (s *Schedule) After(ctx context.Context, due time.Time, uuid string) iter.Seq2[DelayedMessage, error] {
	return func(yield func(DelayedMessage, error) bool) {
		last := xstream.WaitingAt(due, uuid)
		for {
			page, err := s.stream.DelayedPage(ctx, last, schedulePage)
			if err != nil {
				yield(DelayedMessage{}, s.wrap("read", err))
				return
			}
			if len(page) == 0 {
				return
			}
			for _, w := range page {
				if !yield(readDelayed(w), s.wrap("read "+w.UUID, w.Err)) {
					return
				}
			}
			last = page[len(page)-1]
		}
	}
}

func readDelayed(w xstream.Waiting) DelayedMessage {
	msg, _ := unmarshalFields(DefaultMarshaler{}, w.Fields, newOwnMessage) // nil: another format, or w.Err
	return DelayedMessage{UUID: w.UUID, Due: w.Due, Message: msg, Fields: w.Fields}
}

// Get returns a delayed message. A *NotFoundError means that no message with that UUID is
// delayed. A message that cannot be read is returned with an error and its UUID.
func (s *Schedule) Get(ctx context.Context, uuid string) (DelayedMessage, error) {
	w, err := s.stream.DelayedGet(ctx, uuid)
	if err != nil {
		return DelayedMessage{}, s.one("read", uuid, err)
	}
	return readDelayed(w), s.wrap("read "+uuid, w.Err)
}

// Cancel deletes a delayed message: it will never be delivered. A *NotFoundError means that
// no message with that UUID is delayed: it is in the stream already, or was cancelled, or
// was never delayed. After ErrOutcomeUnknown, call it again; a *NotFoundError can then
// mean that the first call succeeded.
func (s *Schedule) Cancel(ctx context.Context, uuid string) error {
	return s.one("cancel", uuid, s.stream.Cancel(ctx, uuid))
}

// Reschedule changes when a delayed message is due, by the server's clock, rounded up to
// milliseconds. A time in the past makes it due at once. A message that becomes due within
// a second of the call can be up to a second late. Its metadata do not change. For
// *NotFoundError see Cancel.
func (s *Schedule) Reschedule(ctx context.Context, uuid string, at time.Time) error {
	if at.IsZero() {
		return s.wrap("reschedule "+uuid, errors.New("at is the zero time"))
	}
	if time.Until(at) > maxDelay {
		return s.wrap("reschedule "+uuid, fmt.Errorf("at is %s, more than ten years away", at.Format(time.RFC3339)))
	}
	return s.one("reschedule", uuid, s.stream.Reschedule(ctx, uuid, at))
}

func (s *Schedule) one(what, uuid string, err error) error {
	if errors.Is(err, xstream.ErrMissing) {
		err = &NotFoundError{Topic: s.stream.Key, IDs: []string{uuid}}
	}
	return s.wrap(what+" "+uuid, err)
}

func (s *Schedule) wrap(what string, err error) error {
	return wrap(err, "schedule of %q: %s", s.stream.Key, what)
}
