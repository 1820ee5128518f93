package goxstreams_test

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestTopicStats(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // miniredis does not report the lag
	client, topic := newClient(t), topic(t)
	ctx := context.Background()
	published := time.Now().Add(-time.Hour)
	for i := range 6 {
		id := fmt.Sprintf("%d-%d", published.UnixMilli(), i)
		require.NoError(t, client.XAdd(ctx, &redis.XAddArgs{Stream: topic, ID: id, Values: []any{"a", "b"}}).Err())
	}
	require.NoError(t, client.XGroupCreate(ctx, topic, testGroup, "0").Err())
	read, err := client.XReadGroup(ctx, &redis.XReadGroupArgs{Group: testGroup, Consumer: "c", Streams: []string{topic, ">"}, Count: 3}).Result()
	require.NoError(t, err)
	require.NoError(t, client.XAck(ctx, topic, testGroup, read[0].Messages[0].ID).Err())
	letters := goxstreams.DeadLetterTopic(topic)
	for range 4 {
		require.NoError(t, client.XAdd(ctx, &redis.XAddArgs{Stream: letters, Values: []any{"a", "b"}}).Err())
	}

	sub := newSubscriber(t, grouped(client))
	got, err := sub.TopicStats(ctx, topic)
	require.NoError(t, err)
	require.GreaterOrEqual(t, got.OldestPending, time.Hour)
	require.Less(t, got.OldestPending, time.Since(published)+time.Second)
	want := goxstreams.TopicStats{
		Topic: topic, Group: testGroup, Length: 6, Lag: 3, Pending: 2, OldestPending: got.OldestPending,
		Consumers: 1, DeadLetterTopic: letters, DeadLetters: 4,
		Pin: goxstreams.Pin{Group: testGroup, Consumer: "c", ID: read[0].Messages[1].ID, Age: got.Pin.Age},
	}
	require.Equal(t, want, got)
	require.InDelta(t, got.OldestPending, got.Pin.Age, float64(time.Minute))

	t.Run("FanOut", func(t *testing.T) {
		fanOut := newSubscriber(t, goxstreams.SubscriberConfig{Client: client})
		got, err := fanOut.TopicStats(ctx, topic)
		require.NoError(t, err)
		require.Equal(t, goxstreams.TopicStats{Topic: topic, Length: 6, Pin: got.Pin}, got)
		require.Equal(t, testGroup, got.Pin.Group)
	})
	t.Run("NothingPending", func(t *testing.T) {
		require.NoError(t, client.XAck(ctx, topic, testGroup, read[0].Messages[1].ID, read[0].Messages[2].ID).Err())
		got, err := sub.TopicStats(ctx, topic)
		require.NoError(t, err)
		want.Pending, want.OldestPending = 0, 0
		want.Pin = goxstreams.Pin{Group: testGroup, ID: fmt.Sprintf("%d-3", published.UnixMilli()), Age: got.Pin.Age} // not delivered yet
		require.Equal(t, want, got)
	})
	t.Run("LagUnknown", func(t *testing.T) {
		require.NoError(t, client.XDel(ctx, topic, fmt.Sprintf("%d-4", published.UnixMilli())).Err())
		got, err := sub.TopicStats(ctx, topic)
		require.NoError(t, err)
		require.Equal(t, int64(-1), got.Lag)
	})
	t.Run("Errors", func(t *testing.T) {
		_, err := sub.TopicStats(ctx, "")
		require.ErrorContains(t, err, "the topic is empty")
		for _, other := range []string{topic + "2", letters} { // no stream; no group
			_, err = sub.TopicStats(ctx, other)
			require.ErrorContains(t, err, other)
			require.ErrorContains(t, err, "NOGROUP")
		}
		gone, cancel := context.WithCancel(ctx)
		cancel()
		_, err = sub.TopicStats(gone, topic)
		require.ErrorIs(t, err, context.Canceled)
	})
}

func TestStats_Retried(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	publish(t, client, topic, "x", "y")
	config := grouped(client)
	config.Retry = quickRetry()
	sub := newSubscriber(t, config)
	var seen attempts
	plainly(t, sub, topic, func(msg *message.Message) error {
		if seen.add(msg) <= 2 {
			return errFails
		}
		return nil
	})
	eventually(t, func() bool { return stats(t, sub).Acked == 2 })
	got := stats(t, sub)
	require.Equal(t, int64(4), got.Delivered)
	require.Equal(t, int64(2), got.Retried)
	require.Equal(t, testGroup, got.Group)
}

// A claim fails; others settle the entry meanwhile. Then the outage is over.
func TestStats_FailedClaimSettledElsewhere(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	createGroup(t, admin, topic, testGroup)
	publish(t, admin, topic, "x")
	readAs(t, admin, topic, testGroup, "dead", 1)
	var fail atomic.Bool
	fail.Store(true)
	sub := newSubscriber(t, claiming(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isClaim(cmd) && fail.Load() {
			return io.EOF
		}
		return next()
	}})))
	subscribe(t, sub, topic)
	eventually(t, func() bool { return stats(t, sub).Err != nil })
	next(t, subscribe(t, newSubscriber(t, claiming(admin)), topic)).Ack()
	eventuallySettled(t, admin, topic, testGroup)
	fail.Store(false)
	eventually(t, func() bool { return stats(t, sub).Err == nil })
}

// A read fails while the only slot is busy. Nobody needs to read until it is free.
func TestStats_FailedReadWithoutRoom(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	createGroup(t, admin, topic, testGroup)
	publish(t, admin, topic, "x")
	readAs(t, admin, topic, testGroup, "dead", 1)
	taken, failed := make(chan struct{}), make(chan struct{})
	var first sync.Once
	config := claiming(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		err := next()
		if cmd.Name() == "xreadgroup" {
			first.Do(func() {
				select {
				case <-taken:
				case <-time.After(patience):
				}
				close(failed)
				err = io.EOF
			})
		}
		return err
	}}))
	config.BlockTime = 50 * time.Millisecond
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	msg := next(t, subscribe(t, sub, topic)) // claimed, while the first read continues
	close(taken)
	<-failed
	eventuallyLogged(t, log, 1)
	require.NoError(t, stats(t, sub).Err)
	msg.Ack()
	eventuallySettled(t, admin, topic, testGroup)
}
