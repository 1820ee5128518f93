package pipeline

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// lineHook lets a test inject faults into a client's commands.
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
func echo(ctx context.Context, l *Pipeline, what string) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := redisx.DoOnce(ctx, l, "echo", what)
		done <- err
	}()
	return done
}

// isEcho reports whether the command is that echo.
func isEcho(cmd redis.Cmder, what string) bool { return cmd.Name() == "echo" && cmd.Args()[1] == what }

// TestLine_Strands: one call hangs. Calls that came soon after it, or soon after
// another call had used the second connection, waited behind the one that hangs,
// though the second connection was free, and nobody checked again until the next
// call came.
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
	l := New(redisx.Client{UniversalClient: client}, 2)
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

// shareFlight lets a call under ctx, and another one under its own context, wait
// together while a first one is in flight: they are then sent as one pipeline, for
// which led is called.
func shareFlight(t *testing.T, ctx, others context.Context, led func(other <-chan error)) (l *Pipeline, leader, other <-chan error) {
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
	l = New(redisx.Client{UniversalClient: client}, 1)
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

// TestLine_LeaderContext: the pipeline of several calls was sent under the context
// of one of them. When that ended while the pipeline waited for a connection, the
// others failed with it, and their topics reported an outage although there was
// none.
func TestLine_LeaderContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var led atomic.Bool
	l, leader, other := shareFlight(t, ctx, context.Background(), func(<-chan error) {
		led.Store(true)
		cancel()
	})
	lineDone(t, other, "other")
	require.ErrorIs(t, <-leader, context.Canceled, "a caller goes when its context ends")
	require.True(t, led.Load(), "they were not sent together")
	lineEventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.busy == 0 && len(l.queue) == 0
	}, "the line is free")
}

// TestLine_LeftUnderWay: a call whose caller had returned was put back into the
// queue. It then got the connection, and kept it for good: all further calls hung.
func TestLine_LeftUnderWay(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	left := make(chan error, 1)
	l, leader, _ := shareFlight(t, context.Background(), ctx, func(other <-chan error) {
		cancel()
		left <- <-other
	})
	lineDone(t, leader, "leader")
	require.ErrorIs(t, <-left, context.Canceled)
	lineDone(t, echo(context.Background(), l, "after"), "after")
}

// TestLine_Patience: calls that wait behind one without an answer wait no longer
// than they would for a connection, and report that nothing was sent.
func TestLine_Patience(t *testing.T) {
	hang, hanging := make(chan struct{}), make(chan struct{})
	client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), PoolTimeout: 50 * time.Millisecond})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	client.AddHook(lineHook{process: func(cmd redis.Cmder, next func() error) error {
		if isEcho(cmd, "hang") {
			close(hanging)
			<-hang
		}
		return next()
	}})
	l := New(redisx.Client{UniversalClient: client}, 1)
	hung := echo(context.Background(), l, "hang")
	<-hanging
	for range 2 { // the timer is set again
		select {
		case err := <-echo(context.Background(), l, "waits"):
			require.ErrorIs(t, err, redis.ErrPoolTimeout)
		case <-time.After(linePatience):
			require.FailNow(t, "it waits for ever")
		}
	}
	close(hang)
	lineDone(t, hung, "hang")
	lineDone(t, echo(context.Background(), l, "after"), "after")
}

// refusing is a client of the user's that refuses commands, and leaves them as they were.
type refusing struct{ redis.UniversalClient }

func (refusing) Process(context.Context, redis.Cmder) error { return redis.ErrClosed }

// A command that a wrapped client refused seemed to have succeeded.
func TestLine_WrappedClientRefuses(t *testing.T) {
	l := New(redisx.Client{UniversalClient: refusing{testserver.Client(t)}}, 1)
	lineFails := func(err error) { require.ErrorIs(t, err, redis.ErrClosed) }
	lineFails(<-echo(t.Context(), l, "refused"))
	lineFails(<-echo(t.Context(), New(redisx.Client{UniversalClient: refusing{testserver.Client(t)}}, 0), "refused"))
}
