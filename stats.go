package goxstreams

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// SubscriptionStats is the current state of one subscription, and its counters
// since it was opened.
type SubscriptionStats struct {
	Topic string
	Group string // empty for fan-out

	InFlight int // pending for this consumer: prefetched, delivered, or waiting for a retry
	Waiting  int // waiting for a retry, or for OnBroken; included in InFlight

	Delivered int64 // messages delivered
	Retried   int64 // redeliveries; included in Delivered
	Acked     int64
	Nacked    int64
	Claimed   int64 // taken over from other consumers, including released ones
	Released  int64 // released when closing, or because of a pause
	Broken    int64 // deliveries of malformed entries
	Dead      int64 // moved to the dead-letter stream (for fan-out: dropped)
	Lost      int64 // trimmed or deleted while pending
	Trimmed   int64 // entries that this subscription has trimmed, for all groups: see Retention

	Err   error     // the current outage; nil if there is none
	Since time.Time // start of the outage

	// PausedSince is when the group was paused, by the server's clock; the zero time
	// if it is not paused. See Pause. A pause is not an outage.
	PausedSince time.Time
}

// Stats returns the state of each open subscription, for metrics and readiness
// probes. It includes subscriptions that wait for Redis
// (SubscriberConfig.WaitForRedis). It makes no call to Redis.
func (s *Subscriber) Stats() []SubscriptionStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := make([]SubscriptionStats, 0, len(s.subs))
	for sub := range s.subs {
		stats = append(stats, sub.snapshot())
	}
	return stats
}

// counters are the counters of SubscriptionStats that internal/consume does not
// keep.
type counters struct {
	delivered, retried, acked, nacked, broken, dead atomic.Int64
}

func (s *subscription) snapshot() SubscriptionStats {
	c := s.Stats()
	return SubscriptionStats{
		Topic: s.topic, Group: s.cfg.ConsumerGroup, InFlight: c.InFlight, Waiting: c.Waiting,
		Delivered: s.stats.delivered.Load(), Retried: s.stats.retried.Load(), Acked: s.stats.acked.Load(), Nacked: s.stats.nacked.Load(),
		Claimed: c.Claimed, Released: c.Released, Broken: s.stats.broken.Load(), Dead: s.stats.dead.Load(), Lost: c.Lost, Trimmed: c.Trimmed,
		Err: c.Err, Since: c.Since, PausedSince: c.PausedSince,
	}
}

// TopicStats is Redis's state of a topic and of the Subscriber's group in it.
type TopicStats struct {
	Topic string
	Group string // empty for fan-out, where only Length, Delayed, Overdue, Pin and CutOff are set

	Length  int64 // entries in the stream, including handled ones
	Lag     int64 // entries not yet delivered to the group; -1 if Redis cannot tell, as after XDEL
	Pending int64 // entries delivered to the group and not acked

	// OldestPending is the time since the oldest pending entry was published,
	// according to its ID and this machine's clock. 0 if nothing is pending, or if
	// the ID is not a time.
	OldestPending time.Duration

	// Consumers is the number of consumer names in the group. It includes the name
	// "released" if consumers that closed have released entries.
	Consumers int64

	DeadLetterTopic string
	DeadLetters     int64 // entries in the dead-letter stream, of all groups of the topic

	// Delayed is the number of delayed messages that are not in the stream yet, for
	// all groups; -1 without the permission to read it. Overdue is how long the first of
	// them has been due, by this machine's clock. More than a second means that no
	// Subscriber of the topic is running, or none may move them.
	Delayed int64
	Overdue time.Duration

	// PausedSince is when the group was paused, by the server's clock; the zero time
	// if it is not paused, or without the permission to read that. See Pause.
	PausedSince time.Time

	// Pin is the oldest entry that a group or fan-out of the topic, not only this one, has
	// not acked. Its Age grows when that group falls behind, or is abandoned, and then
	// Retention trims nothing more. Zero without the permission to read it.
	Pin Pin

	// CutOff is the number of entries that Retention.HardMaxLen has cut off before the
	// group acked them, over all times; for a fan-out, before the slowest one had read them. -1
	// without the permission to read it.
	CutOff int64
}

// TopicStats asks Redis for the state of a topic and of the Subscriber's group in
// it. Its commands cost the server the same with a million entries as with one, so
// it can be polled. The topic need not be subscribed to. If the group does not
// exist, TopicStats returns an error; for fan-out, a stream that does not exist
// counts as empty.
func (s *Subscriber) TopicStats(ctx context.Context, topic string) (TopicStats, error) {
	st, err := s.topicStats(ctx, topic)
	if err != nil {
		return TopicStats{}, wrap(err, "stats of %q", topic)
	}
	return st, nil
}

func (s *Subscriber) topicStats(ctx context.Context, topic string) (st TopicStats, err error) {
	if topic == "" {
		return st, errors.New("the topic is empty")
	}
	st = TopicStats{Topic: topic, Group: s.config.ConsumerGroup}
	stream := xstream.New(s.client, topic, st.Group)
	if st.Length, err = stream.Length(ctx); err != nil {
		return st, err
	}
	delayed, err := stream.DelayedSummary(ctx)
	switch st.Delayed = delayed.Count; {
	case redisx.IsDenied(err), redisx.ReplyHas(err, "CROSSSLOT"):
		st.Delayed = -1
	case err != nil:
		return st, err
	case st.Delayed > 0:
		st.Overdue = max(0, time.Since(delayed.First))
	}
	pin, cut, err := stream.Floor(ctx)
	switch st.Pin, st.CutOff = Pin(pin), cut; {
	case redisx.IsDenied(err), redisx.ReplyHas(err, "CROSSSLOT"):
		st.Pin, st.CutOff = Pin{}, -1
	case err != nil:
		return st, err
	}
	if st.Group == "" {
		return st, nil
	}
	group, err := stream.GroupInfo(ctx)
	if err != nil {
		return st, err
	}
	control, err := stream.Control(ctx)
	if err != nil && !redisx.IsDenied(err) {
		return st, err
	}
	st.PausedSince = control.Since
	st.Lag, st.Consumers = group.Lag, group.Consumers
	pending, err := stream.PendingSummary(ctx)
	if err != nil {
		return st, err
	}
	st.Pending = pending.Count
	if published := (Delivery{ID: pending.First}).Time(); !published.IsZero() {
		st.OldestPending = max(0, time.Since(published))
	}
	st.DeadLetterTopic = s.config.DeadLetterTopic(topic)
	deadLetters := xstream.New(s.client, st.DeadLetterTopic, "")
	st.DeadLetters, err = deadLetters.Length(ctx)
	return st, err
}
