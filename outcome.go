package goxstreams

import (
	"context"
	"errors"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"github.com/goxstreams/watermill-goxstreams/internal/consume"
)

// Outcome is what became of one delivery: see SubscriberConfig.OnOutcome.
type Outcome struct {
	Delivery
	Kind OutcomeKind

	// Delay is the time until the next delivery; 0 unless it is retried or snoozed.
	Delay time.Duration

	// Err is why the delivery failed, as far as the Subscriber knows: the handler's
	// error if Retry's or DeadLetter's middleware saw it, that of a Worker's method,
	// why the entry is malformed. nil if it is acked, and after a Nack without an error.
	Err error

	Dead *DeadMessage // what OnDead gets; nil unless it is dead
}

// OutcomeKind says what became of a delivery.
type OutcomeKind string

// The kinds of outcomes.
const (
	OutcomeAcked   OutcomeKind = "acked"   // handled, or dropped by OnBroken, ProcessBroken or ProcessDead
	OutcomeRetried OutcomeKind = "retried" // it comes again after Delay, and that counts
	OutcomeSnoozed OutcomeKind = "snoozed" // it comes again after Delay, with the count that it has
	OutcomeDead    OutcomeKind = "dead"    // moved to the dead-letter stream; without a group or with NoAck: dropped

	// OnOutcome is not called with these; OutcomeOf returns them.
	OutcomeReleased  OutcomeKind = "released"   // its subscription closes; this delivery does not count
	OutcomeLeaseLost OutcomeKind = "lease_lost" // another consumer may have it: see ErrLeaseLost
)

// String returns the kind as it stands in logs and metrics.
func (k OutcomeKind) String() string { return string(k) }

// OutcomeOf returns the outcome of a delivery whose handler returned err. It is for
// middlewares outside of Retry and DeadLetter that must not count a Snooze or a shutdown
// as a failure: tracing, metrics, logs. It is the decision of the outermost of the two,
// and takes effect when the message is nacked.
//
// It is empty if err is nil, for a copy or a message of another library, with NoAck, and
// where neither Retry nor DeadLetter decided: then SubscriberConfig.Retry decides when the
// message is nacked. A shutdown and a lost lease are known without a middleware.
func OutcomeOf(msg *message.Message, err error) OutcomeKind {
	d := deliveryOf(msg)
	if d == nil || err == nil || !d.sub.Retries() {
		return ""
	}
	var kind OutcomeKind
	if v := d.verdict.Load(); v != nil {
		kind = v.fate
	} else if d.Err() != nil || errors.Is(err, context.Canceled) && d.sub.IsClosing() {
		kind = OutcomeReleased
	}
	if kind == OutcomeReleased && errors.Is(context.Cause(d), ErrLeaseLost) {
		return OutcomeLeaseLost
	}
	return kind
}

// told tells OnOutcome what becomes of an entry.
func (s *subscription) told(h *consume.Task, kind OutcomeKind, delay time.Duration, err error, dead *DeadMessage) {
	if s.cfg.OnOutcome == nil {
		return
	}
	o := Outcome{Delivery: s.delivery(h.ID, h.Count()), Kind: kind, Delay: delay, Err: err, Dead: dead}
	if d, ok := h.Death.(*death); ok && d.deliveries > 0 { // the entry's own is raised for ProcessDead
		o.Count = d.deliveries
	}
	if err := user(h, func() error { s.cfg.OnOutcome(o); return nil }); err != nil {
		s.log.Error("OnOutcome panicked", err, s.Fields(h))
	}
}

// delivery is the delivery that an entry is in.
func (s *subscription) delivery(id string, count int64) Delivery {
	return Delivery{
		Topic: s.topic, Group: s.cfg.ConsumerGroup, Consumer: s.Consumer(),
		ID: id, Count: count, MaxRetries: s.retry.MaxRetries,
	}
}
