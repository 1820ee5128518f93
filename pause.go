package goxstreams

import (
	"context"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// Pause pauses a consumer group on a topic: in all processes, including those that
// subscribe later, until Resume is called. To pause a paused group changes nothing.
//
// A subscription that can reach Redis obeys within about a second. From then on it
// reads nothing, takes over nothing, and begins no handler, including OnBroken:
// retries that become due wait, with their counts and their leases. Running handlers
// finish, and their messages are settled. What was read ahead is released, with its
// delivery count as before. Messages that are published meanwhile wait in the stream,
// and so do delayed ones from when they are due. With NoAck, what was read ahead waits
// in memory, and is lost if the subscription closes before Resume.
//
// A pause is not an outage: see SubscriptionStats.PausedSince. If Redis loses it
// (FLUSHALL, or a failover right after the call), the subscriptions run on, and log
// that as an error.
//
// The group must exist; a fan-out has none, and cannot be paused. The client stays the
// caller's.
func Pause(ctx context.Context, client redis.UniversalClient, topic, group string) error {
	s, err := pausable("Pause", client, topic, group)
	if err != nil {
		return err
	}
	if err = s.HasGroup(ctx); err == nil {
		err = s.Pause(ctx)
	}
	return wrap(err, "pause group %q on topic %q", group, topic)
}

// Resume ends a Pause. A subscription that can reach Redis continues within about a
// second: with due retries and with what it had read ahead, unless another consumer
// has taken that, and then with what was published meanwhile. To resume a group that
// is not paused changes nothing; one that does not exist is an error, unless it was
// paused at some time.
func Resume(ctx context.Context, client redis.UniversalClient, topic, group string) error {
	s, err := pausable("Resume", client, topic, group)
	if err != nil {
		return err
	}
	known, err := s.Resume(ctx)
	if err == nil && !known {
		err = s.HasGroup(ctx)
	}
	return wrap(err, "resume group %q on topic %q", group, topic)
}

// Paused returns the groups of a topic that are paused, and since when, by the
// server's clock. The map is empty if none is, also if the topic does not exist. For
// one group, Subscriber.TopicStats has it too.
func Paused(ctx context.Context, client redis.UniversalClient, topic string) (map[string]time.Time, error) {
	s, err := pausable("Paused", client, topic, "-")
	if err != nil {
		return nil, err
	}
	paused, err := s.Paused(ctx)
	return paused, wrap(err, "paused groups of %q", topic)
}

// pausable checks the arguments.
func pausable(caller string, client redis.UniversalClient, topic, group string) (xstream.Stream, error) {
	errs := configErrors{typeName: caller}
	errs.arguments("client", client, "topic", topic)
	errs.addIf(group == "", "group", "is empty; a fan-out, which has no group, cannot be paused")
	return xstream.New(redisx.Client{UniversalClient: client}, topic, group), errs.err()
}
