package goxstreams_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Found by TestCluster_SlotMoves on a busy machine: a renewal crosses the claim of a
// retry, and is refused. The look at what became of the entry is answered before the
// next claim, and read after it: its count was not the one known by then, and the
// lease was taken for lost. The message came again when its time was up, with one
// retry less.
func TestLease_LookOlderThanTheClaim(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // least idle times
	topic := topic(t)
	var renewalHeld, lookHeld sync.Once
	renewal, claimed, looked, again := make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
	var claims atomic.Int64
	wait := func(ch <-chan struct{}) {
		select {
		case <-ch:
		case <-time.After(patience):
		}
	}
	config := claiming(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		args := cmd.Args()
		switch {
		case cmd.Name() == "xclaim" && slices.Contains(args, any("retrycount")):
			err := next()
			switch claims.Add(1) {
			case 1:
				close(claimed)
			case 2:
				close(again)
			}
			return err
		case cmd.Name() == "xclaim":
			renewalHeld.Do(func() {
				close(renewal)
				wait(claimed)
			})
		case cmd.Name() == "xpending" && fmt.Sprint(args[len(args)-1]) == "1" && claims.Load() == 1:
			err := next()
			lookHeld.Do(func() {
				close(looked)
				wait(again)
				time.Sleep(50 * time.Millisecond) // until that claim's answer has been read: the longer, the surer
			})
			return err
		}
		return next()
	}}))
	config.Retry = quickRetry()
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, newClient(t), topic, "")
	msg := next(t, messages)
	wait(renewal)
	msg.Nack()
	msg = next(t, messages) // and the renewal goes on: it is too late
	require.EqualValues(t, 2, delivery(t, msg).Count)
	wait(looked)
	msg.Nack()
	msg = next(t, messages)
	require.EqualValues(t, 3, delivery(t, msg).Count)
	during(t, minIdle/2, func() bool { return msg.Context().Err() == nil }, "the lease is taken for lost")
	msg.Ack()
	eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
	require.NoError(t, sub.Close())
}
