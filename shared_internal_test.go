package goxstreams

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// processHook lets a test inject faults into a client's commands.
type processHook struct {
	process func(cmd redis.Cmder, next func() error) error
}

func (h processHook) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

func (h processHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		return h.process(cmd, func() error { return next(ctx, cmd) })
	}
}

func (h processHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// TestShared_AheadDrifts: the reply to a NoAck read arrived after Close had given
// up on it. Its entries counted as read ahead for the lifetime of the Subscriber,
// at the cost of its other topics.
func TestShared_AheadDrifts(t *testing.T) {
	testserver.RequireReal(t)
	client := testserver.Client(t)
	hold, holding := make(chan struct{}), make(chan struct{})
	var published, held atomic.Bool
	client.AddHook(processHook{func(cmd redis.Cmder, next func() error) error {
		err := next()
		if cmd.Name() == "xreadgroup" && err == nil && published.Load() && held.CompareAndSwap(false, true) {
			close(holding)
			<-hold
		}
		return err
	}})
	sub, err := NewSubscriber(SubscriberConfig{
		Client: client, ConsumerGroup: "group", NoAck: true, CloseTimeout: 200 * time.Millisecond,
	}, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sub.Close()) })
	topic := t.Name() + watermill.NewShortUUID()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	messages, err := sub.Subscribe(ctx, topic)
	require.NoError(t, err)
	plain := testserver.Client(t)
	delivered := func() string {
		groups, err := plain.XInfoGroups(t.Context(), topic).Result()
		require.NoError(t, err)
		require.Len(t, groups, 1)
		return groups[0].LastDeliveredID
	}
	before := delivered()
	pub, err := NewPublisher(PublisherConfig{Client: plain}, nil)
	require.NoError(t, err)
	published.Store(true)
	require.NoError(t, pub.Publish(topic, message.NewMessage("a", nil), message.NewMessage("b", nil)))
	select {
	case <-holding:
	case <-time.After(30 * time.Second):
		require.FailNow(t, "the messages are not read")
	}
	require.NotEqual(t, before, delivered(), "the answer that is held has none of them")
	cancel()
	for msg := range messages {
		assert.Fail(t, "a message that was not read", msg.UUID)
	}
	close(hold)
	require.NoError(t, sub.Close())
	assert.Zero(t, sub.shared.Bounds.Ahead(), "entries read ahead, and no subscription")
}
