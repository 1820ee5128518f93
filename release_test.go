package goxstreams_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Found by TestFault17 on a busy machine: a renewal that is sent late takes back
// what its own process has released in the meantime. The entries are then pending
// for a consumer that is gone, and come again only when their time is up, not at once.
func TestRelease_LateRenewalTakesNothingBack(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	admin := newClient(t)
	topic := topic(t)
	const n = 20
	publishN(t, admin, topic, n)

	renewing, released, renewed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	begin, end, again := sync.OnceFunc(func() { close(renewing) }), sync.OnceFunc(func() { close(released) }), sync.OnceFunc(func() { close(renewed) })
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		switch {
		case isRenewal(cmd):
			begin()
			select {
			case <-released:
				defer again()
			case <-time.After(300 * time.Millisecond): // a Close that does not wait for it takes a fraction of that
			}
		case isRelease(cmd):
			defer end()
		}
		return next()
	}})
	config := grouped(client)
	config.ClaimMinIdle = 600 * time.Millisecond
	config.CloseTimeout = patience
	config.MaxConcurrency = n
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	inHand := next(t, messages) // the others are offered, or prefetched
	eventually(t, func() bool { return len(pendingOf(t, admin, topic, testGroup)) > 1 })
	<-renewing
	go func() {
		<-renewed // while a handler is at work, leases are renewed
		inHand.Ack()
	}()
	require.NoError(t, sub.Close())
	for _, p := range pendingOf(t, admin, topic, testGroup) {
		require.Equal(t, "released", p.Consumer, "who holds %s", p.ID)
		require.Zero(t, p.RetryCount)
	}
}

// A handler does not heed the end of its context, and CloseTimeout is over. The
// message stays pending in its name, since it may still be at work; but a
// shutdown is no failure, so that this delivery does not count.
func TestRelease_AbandonedDeliveryDoesNotCount(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	const n = 5
	config := grouped(client)
	config.MaxConcurrency, config.CloseTimeout = n, 100*time.Millisecond
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	publishN(t, client, topic, n)
	for range n {
		next(t, messages)
	}
	require.NoError(t, sub.Close())
	rows := pendingOf(t, client, topic, testGroup)
	require.Len(t, rows, n)
	for _, p := range rows {
		require.NotEqual(t, "released", p.Consumer)
		require.Zero(t, p.RetryCount)
	}
	require.Empty(t, log.Errors())
}

// A message is dead, and the group is lost just before it is moved. It is put
// back into the group that is made again, and then moved: it must not be taken
// for settled, which it never was.
func TestBury_GroupLostMeanwhile(t *testing.T) {
	t.Parallel()
	topic := topic(t)
	plain := newClient(t)
	var once sync.Once
	lose := &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		if isMove(cmd) {
			once.Do(func() { require.NoError(t, plain.XGroupDestroy(ctx, topic, testGroup).Err()) })
		}
		return next()
	}}
	config := grouped(newClient(t, lose))
	config.MaxConcurrency = 2
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, plain, topic, "held", "dead")
	held, dead := next(t, messages), next(t, messages)
	if string(held.Payload) == "dead" {
		held, dead = dead, held
	}
	dead.Nack()
	eventually(t, func() bool {
		n, err := plain.XLen(context.Background(), goxstreams.DeadLetterTopic(topic)).Result()
		return err == nil && n == 1
	}, "the dead message is in neither stream")
	require.NoError(t, held.Context().Err())
	held.Ack()
	eventually(t, func() bool { return len(pendingOf(t, plain, topic, testGroup)) == 0 }, "something stays pending")
	require.EqualValues(t, 1, plain.XLen(context.Background(), goxstreams.DeadLetterTopic(topic)).Val())
}

// Two consumers know of a released message, and the second one's claim is under
// way for long: the first has it in hand by then, and keeps it.
func TestRelease_SlowSecondClaimer(t *testing.T) {
	t.Parallel()
	topic := topic(t)
	plain := newClient(t)
	ctx := context.Background()
	createGroup(t, plain, topic, testGroup)
	publish(t, plain, topic, "released")
	entries, err := plain.XReadGroup(ctx, &redis.XReadGroupArgs{Group: testGroup, Consumer: "closing", Streams: []string{topic, ">"}}).Result()
	require.NoError(t, err)
	id := entries[0].Messages[0].ID
	claim := func(consumer string, count int) {
		require.NoError(t, plain.Do(ctx, "xclaim", topic, testGroup, consumer, 0, id, "retrycount", count, "justid").Err())
	}
	claim("released", 0)

	sent := make(chan struct{})
	var seen atomic.Bool
	slow := &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		if !isClaim(cmd) || seen.Swap(true) {
			return next()
		}
		defer close(sent)
		claim("first", 1)
		eventually(t, func() bool { return pendingOf(t, plain, topic, testGroup)[0].Idle > time.Second }, "the first has it for no time")
		return next()
	}}
	config := grouped(newClient(t, slow))
	config.ClaimMinIdle = time.Minute
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	select {
	case <-sent:
	case <-time.After(patience):
		t.Fatal("nobody claims what was released")
	}
	publish(t, plain, topic, "next")
	require.EqualValues(t, "next", next(t, messages).Payload)
	require.Equal(t, "first", pendingOf(t, plain, topic, testGroup)[0].Consumer)
}

// A released message that waits for a slot here is claimed, fails and is released
// again elsewhere: that delivery counts, whatever was known of it here.
func TestRelease_CountedElsewhereMeanwhile(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // the embedded one counts renewals as deliveries
	topic := topic(t)
	plain := newClient(t)
	ctx := context.Background()
	createGroup(t, plain, topic, testGroup)
	publish(t, plain, topic, "released")
	entries, err := plain.XReadGroup(ctx, &redis.XReadGroupArgs{Group: testGroup, Consumer: "closing", Streams: []string{topic, ">"}}).Result()
	require.NoError(t, err)
	id := entries[0].Messages[0].ID
	release := func(count int) {
		require.NoError(t, plain.Do(ctx, "xclaim", topic, testGroup, "released", 0, id, "retrycount", count, "justid").Err())
	}
	release(0)

	var seen atomic.Bool
	meanwhile := &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		if isClaim(cmd) && !seen.Swap(true) {
			release(1)
		}
		return next()
	}}
	config := grouped(newClient(t, meanwhile))
	config.ClaimMinIdle = time.Minute
	messages := subscribe(t, newSubscriber(t, config), topic)
	msg := next(t, messages)
	delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
	require.EqualValues(t, 2, delivery.Count)
	msg.Ack()
}
