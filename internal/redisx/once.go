package redisx

import (
	"context"
	"slices"

	"github.com/redis/go-redis/v9"
)

// Processor runs a command: a client, one of its connections, or a
// pipeline.Pipeline.
type Processor interface {
	Process(ctx context.Context, cmd redis.Cmder) error
}

// go-redis resends a command that timed out or lost its connection (three times by
// default), although the first copy may have run. It does not resend a command
// whose NoRetry is true.

// OnceCmd is a command that go-redis does not resend.
type OnceCmd struct{ *redis.Cmd }

// NoRetry overrides go-redis's method, which returns false.
func (OnceCmd) NoRetry() bool { return true }

// OnceRawCmd is OnceCmd for an unparsed reply.
type OnceRawCmd struct{ *redis.RawCmd }

// NoRetry overrides go-redis's method, which returns false.
func (OnceRawCmd) NoRetry() bool { return true }

// OnceStringCmd is OnceCmd for a string reply.
type OnceStringCmd struct{ *redis.StringCmd }

// NoRetry overrides go-redis's method, which returns false.
func (OnceStringCmd) NoRetry() bool { return true }

// NewOnce returns a command with the given arguments.
func NewOnce(ctx context.Context, args ...any) OnceCmd {
	return OnceCmd{redis.NewCmd(ctx, args...)}
}

// NewOnceRaw returns a command with the given arguments, for an unparsed reply.
func NewOnceRaw(ctx context.Context, args ...any) OnceRawCmd {
	return OnceRawCmd{redis.NewRawCmd(ctx, args...)}
}

// DoOnce runs a command that must not run twice, and returns its reply.
func DoOnce(ctx context.Context, p Processor, args ...any) (any, error) {
	cmd := NewOnce(ctx, args...)
	if err := p.Process(ctx, cmd); err != nil {
		return nil, Redacted(err) // cmd may still be in flight
	}
	return cmd.Val(), nil
}

// Do runs a command that may run twice: it is resent once if the connection broke,
// since that connection may have been stale. (go-redis would retry three times, but
// not in a pipeline with commands that must not run twice.)
func Do(ctx context.Context, p Processor, args ...any) (any, error) {
	v, err := DoOnce(ctx, p, args...)
	if err != nil && !IsReply(err) && !IsClosed(err) && ctx.Err() == nil {
		v, err = DoOnce(ctx, p, args...)
	}
	return v, err
}

// ExecPipeline sends the commands together. Afterwards each has its own error, even
// where go-redis sets none: if the server rejects the connection (after a change of
// password, for example), go-redis returns that error, but leaves the commands as
// if they had succeeded with empty replies.
func ExecPipeline(ctx context.Context, client redis.Cmdable, cmds []redis.Cmder) {
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
