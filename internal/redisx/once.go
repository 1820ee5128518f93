package redisx

import (
	"context"
	"slices"

	"github.com/redis/go-redis/v9"
)

// Processor runs a command: a client, one connection of it, or a pipeline.Pipeline.
type Processor interface {
	Process(ctx context.Context, cmd redis.Cmder) error
}

// go-redis sends what timed out or lost its connection again (three times by
// default), though the first copy may have run. It does not do so with a command
// whose NoRetry is true.

// OnceCmd is a command that go-redis does not send again.
type OnceCmd struct{ *redis.Cmd }

// NoRetry overrides go-redis's answer, which is no.
func (OnceCmd) NoRetry() bool { return true }

// OnceRawCmd is OnceCmd for a reply that is not parsed.
type OnceRawCmd struct{ *redis.RawCmd }

// NoRetry overrides go-redis's answer, which is no.
func (OnceRawCmd) NoRetry() bool { return true }

// OnceStringCmd is OnceCmd for a reply that is a string.
type OnceStringCmd struct{ *redis.StringCmd }

// NoRetry overrides go-redis's answer, which is no.
func (OnceStringCmd) NoRetry() bool { return true }

// NewOnce returns a command with the arguments.
func NewOnce(ctx context.Context, args ...any) OnceCmd {
	return OnceCmd{redis.NewCmd(ctx, args...)}
}

// DoOnce runs a command that must not run twice, and returns its reply.
func DoOnce(ctx context.Context, p Processor, args ...any) (any, error) {
	cmd := NewOnce(ctx, args...)
	if err := p.Process(ctx, cmd); err != nil {
		return nil, Redacted(err) // and cmd may still be under way
	}
	return cmd.Val(), nil
}

// Do is for a command that may run twice: it is sent again if the connection
// broke, which may have been broken for long. (go-redis would try three more
// times; but in a pipeline with commands that must not run twice it does not.)
func Do(ctx context.Context, p Processor, args ...any) (any, error) {
	v, err := DoOnce(ctx, p, args...)
	if err != nil && !IsReply(err) && !IsClosed(err) && ctx.Err() == nil {
		v, err = DoOnce(ctx, p, args...)
	}
	return v, err
}

// Leaving runs a command beside its caller, who goes when its context ends: go-redis
// does not heed that while it waits for an answer. The command goes on, and must not
// be read then.
type Leaving struct{ Processor }

// Process runs the command.
func (l Leaving) Process(ctx context.Context, cmd redis.Cmder) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- l.Processor.Process(context.WithoutCancel(ctx), cmd) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Pipeliner makes pipelines: a client.
type Pipeliner interface{ Pipeline() redis.Pipeliner }

// ExecPipeline sends the commands together. Each has its own error then, also where
// go-redis has given it none: if the server refuses the connection that they were to
// be sent on (after a change of password, say), go-redis returns that answer, but
// leaves the commands as if they had succeeded, with nothing in their replies.
func ExecPipeline(ctx context.Context, client Pipeliner, cmds []redis.Cmder) {
	pipe := client.Pipeline()
	for _, cmd := range cmds {
		_ = pipe.Process(ctx, cmd)
	}
	_, err := pipe.Exec(ctx)
	if err == nil || slices.ContainsFunc(cmds, func(cmd redis.Cmder) bool { return cmd.Err() != nil }) {
		return
	}
	for _, cmd := range cmds {
		cmd.SetErr(err)
	}
}
