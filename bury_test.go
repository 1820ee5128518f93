package goxstreams_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// With DeleteAcked and one group, what died leaves the stream too, on every
// server: otherwise nothing ever would take it out.
func TestBury_DeleteAcked(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic := topic(t)
	client := newClient(t)
	config := grouped(client)
	config.DeleteAcked = true
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	messages := subscribe(t, newSubscriber(t, config), topic)
	publish(t, client, topic, "dies")
	next(t, messages).Nack()
	ctx := context.Background()
	eventually(t, func() bool { return client.XLen(ctx, goxstreams.DeadLetterTopic(topic)).Val() == 1 }, "no dead letter")
	require.Zero(t, client.XLen(ctx, topic).Val())
	require.Empty(t, pendingOf(t, client, topic, testGroup))
}

// Redis does not take the count of a dead message for a while, before its worker
// is asked: that is one outage, which ends once.
func TestBury_WorkersOutage(t *testing.T) {
	t.Parallel()
	topic := topic(t)
	var refused atomic.Int32
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isClaim(cmd) && refused.Add(1) <= 4 {
			return errors.New("no answer")
		}
		return next()
	}})
	worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](goxstreams.Permanent(errors.New("permanent")))}
	log := newLogRecorder()
	consumer := newConsumer[order](t, worker, goxstreams.ConsumerConfig{Topic: topic, Subscriber: limited(client, 2)}, log)
	running := run(t, consumer)
	produce(t, newClient(t), topic, order{})
	eventually(t, func() bool { return worker.counts()[2] == 1 }, "the worker is not asked")
	running.stop(t)
	outages := slices.DeleteFunc(log.Errors(), func(line string) bool { return !strings.HasPrefix(line, "Redis does not serve") })
	require.Len(t, outages, 1)
}
