package goxstreams_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Found by TestFault17 on a busy machine: a renewal that has its min-idle, but
// is sent late, takes back what its own process has released in the meantime.
// The entries are then pending for a consumer that is gone, and come again only
// when their time is up, not at once.
func TestRelease_LateRenewalTakesNothingBack(t *testing.T) {
	testserver.RequireReal(t) // claims by idle time
	admin := newClient(t)
	topic := topic(t)
	const n = 20
	publishN(t, admin, topic, n)

	renewing, released := make(chan struct{}), make(chan struct{})
	begin, end := sync.OnceFunc(func() { close(renewing) }), sync.OnceFunc(func() { close(released) })
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		args := fmt.Sprint(cmd.Args())
		switch {
		case strings.HasPrefix(args, "[xclaim") && !strings.Contains(args, "retrycount"):
			begin()
			select {
			case <-released: // long enough ago for the renewal to be granted
				minIdle := cmd.Args()[4].(int64)
				time.Sleep(time.Duration(minIdle+5) * time.Millisecond)
			case <-time.After(300 * time.Millisecond): // Close waits for it, as it must
			}
		case strings.HasPrefix(args, "[xclaim") && strings.Contains(args, " released "):
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
		<-released
		time.Sleep(200 * time.Millisecond) // while a handler is at work, leases are renewed
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
