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

// lineHook lets a test put faults into a client's commands.
type lineHook struct {
	process  func(cmd redis.Cmder, next func() error) error
	pipeline func(cmds []redis.Cmder, next func() error) error
}

func (h lineHook) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

func (h lineHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if h.process == nil {
			return next(ctx, cmd)
		}
		return h.process(cmd, func() error { return next(ctx, cmd) })
	}
}

func (h lineHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if h.pipeline == nil {
			return next(ctx, cmds)
		}
		return h.pipeline(cmds, func() error { return next(ctx, cmds) })
	}
}

const linePatience = 30 * time.Second

// lineEventually waits until the condition holds.
func lineEventually(t *testing.T, condition func() bool, what string) {
	t.Helper()
	for deadline := time.Now().Add(linePatience); !condition(); time.Sleep(time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "it never happened: %s", what)
	}
}

// lineDone waits for a call's end.
func lineDone(t *testing.T, done <-chan error, what string) {
	t.Helper()
	select {
	case err := <-done:
		assert.NoError(t, err, what)
	case <-time.After(linePatience):
		require.FailNow(t, "it does not end", what)
	}
}

// echo sends a command of its own in the background.
func echo(ctx context.Context, l *line, what string) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := doOnce(ctx, l, "echo", what)
		done <- err
	}()
	return done
}

// isEcho reports whether the command is that echo.
func isEcho(cmd redis.Cmder, what string) bool { return cmd.Name() == "echo" && cmd.Args()[1] == what }

// TestLine_Strands: one call hangs. What came soon after it, or soon after another
// call had been on the second lane, waited behind the one that hangs, though the
// second lane was free, and nobody looked again until the next call came.
func TestLine_Strands(t *testing.T) {
	client := testserver.Client(t)
	hang, hanging := make(chan struct{}), make(chan struct{})
	client.AddHook(lineHook{process: func(cmd redis.Cmder, next func() error) error {
		if isEcho(cmd, "hang") {
			close(hanging)
			<-hang // its connection is dead, or its answer is large
		}
		return next()
	}})
	l := newLine(client, 2)
	ctx := context.Background()
	hung := echo(ctx, l, "hang")
	defer func() {
		close(hang)
		lineDone(t, hung, "hang")
	}()
	select {
	case <-hanging:
	case <-time.After(linePatience):
		require.FailNow(t, "the first call is not sent")
	}
	began := time.Now()
	for _, what := range []string{"soon after the one that hangs", "soon after a quick one", "another"} {
		lineDone(t, echo(ctx, l, what), what)
	}
	t.Logf("three calls in %s beside one that hangs", time.Since(began))
}

// shareFlight has a call under ctx and another one, under its own, wait together
// while a first one is under way, and lets them go: they are sent as one pipeline,
// for which led is called, under ctx.
func shareFlight(t *testing.T, ctx, others context.Context, led func(other <-chan error)) (l *line, leader, other <-chan error) {
	t.Helper()
	client := testserver.Client(t)
	hold := make(chan struct{})
	client.AddHook(lineHook{
		process: func(cmd redis.Cmder, next func() error) error {
			if isEcho(cmd, "first") {
				<-hold
			}
			return next()
		},
		pipeline: func(cmds []redis.Cmder, next func() error) error {
			if isEcho(cmds[0], "leader") {
				led(other)
			}
			return next()
		},
	})
	l = newLine(client, 1)
	queued := func(n int) func() bool {
		return func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.busy == 1 && len(l.queue) == n
		}
	}
	first := echo(context.Background(), l, "first")
	lineEventually(t, queued(0), "the first one is on its way")
	leader = echo(ctx, l, "leader")
	lineEventually(t, queued(1), "the leader waits")
	other = echo(others, l, "other")
	lineEventually(t, queued(2), "the other one waits")
	close(hold)
	lineDone(t, first, "first")
	return l, leader, other
}

// TestLine_LeaderContext: the pipeline of several calls is sent under the context of
// one of them. When that ended while the pipeline waited for a connection, the
// others failed with it, and their topics reported an outage that was none.
func TestLine_LeaderContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var led atomic.Bool
	l, leader, other := shareFlight(t, ctx, context.Background(), func(<-chan error) {
		led.Store(true)
		cancel()
	})
	lineDone(t, other, "other")
	require.ErrorIs(t, <-leader, context.Canceled)
	require.True(t, led.Load(), "they were not sent together")
	lineEventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.busy == 0 && len(l.queue) == 0
	}, "the line is free")
}

// TestHub_AheadDrifts: the answer to a NoAck read came after Close had given it up.
// Its entries stayed counted as read ahead for as long as the Subscriber lived, at
// the cost of its other topics.
func TestHub_AheadDrifts(t *testing.T) {
	testserver.RequireReal(t)
	client := testserver.Client(t)
	hold, holding := make(chan struct{}), make(chan struct{})
	var published, held atomic.Bool
	client.AddHook(lineHook{process: func(cmd redis.Cmder, next func() error) error {
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
	case <-time.After(linePatience):
		require.FailNow(t, "the messages are not read")
	}
	require.NotEqual(t, before, delivered(), "the answer that is held has none of them")
	cancel()
	for msg := range messages {
		assert.Fail(t, "a message that was not read", msg.UUID)
	}
	readers := func() int {
		sub.hub.mu.Lock()
		defer sub.hub.mu.Unlock()
		return len(sub.hub.groups)
	}
	require.Equal(t, 1, readers(), "the reader waits for the answer")
	close(hold)
	lineEventually(t, func() bool { return readers() == 0 }, "the reader ends")
	assert.Zero(t, sub.hub.ahead.Load(), "entries read ahead, and no subscription")
}

// TestHub_OrdinalsPileUp: the consumer of an idle subscription does not exist before
// Redis 7.2, so that Close could not remove it. Its ordinal was then never used
// again, and each further subscription had a name and connections of its own.
func TestHub_OrdinalsPileUp(t *testing.T) {
	testserver.RequireReal(t)
	sub, err := NewSubscriber(SubscriberConfig{Client: testserver.Client(t), ConsumerGroup: "group"}, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sub.Close()) })
	topic := t.Name() + watermill.NewShortUUID()
	reads := func() bool {
		sub.hub.mu.Lock()
		defer sub.hub.mu.Unlock()
		for _, g := range sub.hub.groups {
			for _, w := range g.watches {
				if w.round > 0 {
					return true
				}
			}
		}
		return false
	}
	for range 10 {
		ctx, cancel := context.WithCancel(context.Background())
		messages, err := sub.Subscribe(ctx, topic)
		if err != nil {
			cancel()
		}
		require.NoError(t, err)
		lineEventually(t, reads, "it reads")
		cancel()
		for msg := range messages {
			assert.Fail(t, "nobody sent one", msg.UUID)
		}
	}
	sub.hub.mu.Lock()
	defer sub.hub.mu.Unlock()
	assert.Empty(t, sub.hub.topics[topic], "ordinals of a topic without subscriptions")
}

// TestLine_LeftUnderWay: a call that nobody waited for any more was put back into
// the queue when its pipeline had failed by its leader's context. It was given the
// lane then, and kept it for good: all further calls hung.
func TestLine_LeftUnderWay(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	left := make(chan error, 1)
	l, leader, _ := shareFlight(t, ctx, ctx, func(other <-chan error) {
		cancel()
		left <- <-other
	})
	require.ErrorIs(t, <-leader, context.Canceled)
	require.ErrorIs(t, <-left, context.Canceled)
	lineDone(t, echo(context.Background(), l, "after"), "after")
}
