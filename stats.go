package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// SubscriptionStats is what one subscription is doing, and has done.
type SubscriptionStats struct {
	Topic string
	Group string // empty in fan-out

	InFlight int // pending and held here: prefetched, handed out, or waiting for a retry
	Waiting  int // of these, waiting for a retry

	Delivered int64 // messages handed out
	Retried   int64 // of these, not for the first time
	Acked     int64
	Nacked    int64
	Claimed   int64 // taken over from other consumers, or from what they released
	Released  int64 // given back when closing
	Broken    int64 // deliveries of entries that could not be unmarshaled
	Dead      int64 // moved to the dead-letter stream (in fan-out: dropped)
	Lost      int64 // trimmed or deleted while pending

	Err   error     // the outage under way; nil if there is none
	Since time.Time // its beginning
}

// Stats returns the state of each subscription that is open, or waits for Redis
// (SubscriberConfig.WaitForRedis), for metrics and readiness
// probes. It makes no call to Redis.
func (s *Subscriber) Stats() []SubscriptionStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := make([]SubscriptionStats, 0, len(s.subs))
	for sub := range s.subs {
		stats = append(stats, sub.snapshot())
	}
	return stats
}

// counters are those sums of SubscriptionStats that are not internal/consume's.
type counters struct {
	delivered, retried, acked, nacked, broken, dead atomic.Int64
}

func (s *subscription) snapshot() SubscriptionStats {
	c := s.Stats()
	return SubscriptionStats{
		Topic: s.topic, Group: s.cfg.ConsumerGroup, InFlight: c.InFlight, Waiting: c.Waiting,
		Delivered: s.stats.delivered.Load(), Retried: s.stats.retried.Load(), Acked: s.stats.acked.Load(), Nacked: s.stats.nacked.Load(),
		Claimed: c.Claimed, Released: c.Released, Broken: s.stats.broken.Load(), Dead: s.stats.dead.Load(), Lost: c.Lost,
		Err: c.Err, Since: c.Since,
	}
}

// TopicStats is what Redis holds of a topic, and of the Subscriber's group there.
type TopicStats struct {
	Topic string
	Group string // empty in fan-out, where only Length is known

	Length  int64 // entries in the stream, handled ones included
	Lag     int64 // entries that the group has not been given yet; -1 if Redis cannot tell, as after XDEL
	Pending int64 // entries that the group has been given and has not acked

	// OldestPending is the time since the first of the pending entries was
	// published, by its ID and this machine's clock; 0 if nothing is pending, or
	// the ID is not a time.
	OldestPending time.Duration

	// Consumers is the number of names in the group. One is "released" where
	// consumers that closed have left entries to others.
	Consumers int64

	DeadLetterTopic string
	DeadLetters     int64 // in the dead-letter stream, of all groups of the topic
}

// TopicStats asks Redis for the state of a topic and of the Subscriber's group
// in it, for what is watched once in a while: its commands cost the server as
// much with a million entries as with one. The topic need not be subscribed to.
// It is an error if the group does not exist; a stream that does not is empty in
// fan-out.
func (s *Subscriber) TopicStats(ctx context.Context, topic string) (TopicStats, error) {
	st, err := s.topicStats(ctx, topic)
	if err != nil {
		return TopicStats{}, fmt.Errorf("goxstreams: stats of %q: %w", topic, err)
	}
	return st, nil
}

func (s *Subscriber) topicStats(ctx context.Context, topic string) (st TopicStats, err error) {
	if topic == "" {
		return st, errors.New("the topic is empty")
	}
	st = TopicStats{Topic: topic, Group: s.config.ConsumerGroup}
	stream := xstream.New(s.client, topic, st.Group)
	if st.Length, err = stream.Length(ctx); err != nil || st.Group == "" {
		return st, err
	}
	group, err := stream.GroupInfo(ctx)
	if err != nil {
		return st, err
	}
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
