package xstream

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/pipeline"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Publishing is one call of Publish: a single XADD, or several within MULTI and
// EXEC.
type Publishing struct {
	ctx        context.Context
	prefix     []any // of each XADD's arguments
	producerID string
	sent       redisx.Sent // the ID of each XADD: "*"
	adds       []redisx.OnceStringCmd

	MultiRefused bool // MULTI or EXEC was not permitted, whatever became of the messages
}

// NewPublishing returns a call of n messages. A positive maxLen trims the stream to about
// that length. With a producer ID the server stores each UUID once, and no stream is
// created. Only the context's values are used.
func NewPublishing(ctx context.Context, key string, maxLen int64, producerID string, n int) *Publishing {
	prefix := []any{"xadd", key}
	if producerID != "" {
		prefix = append(prefix, "nomkstream")
	}
	if maxLen > 0 {
		prefix = append(prefix, "maxlen", "~", maxLen)
	}
	return &Publishing{
		ctx: context.WithoutCancel(ctx), prefix: prefix, producerID: producerID,
		adds: make([]redisx.OnceStringCmd, 0, n),
	}
}

// usualArgs is the number of arguments for an ID, the UUID to remember, and
// DefaultMarshaler's fields.
const usualArgs = 1 + 3 + 6

// Add adds a message. Fields appends its fields to the arguments.
func (c *Publishing) Add(uuid string, fields func(args []any) ([]any, error)) error {
	args := append(make([]any, 0, len(c.prefix)+usualArgs), c.prefix...)
	if c.producerID != "" {
		args = append(args, "idmp", c.producerID, uuid)
	}
	args, err := fields(append(args, &c.sent))
	if err != nil {
		return err
	}
	c.adds = append(c.adds, redisx.OnceStringCmd{StringCmd: redis.NewStringCmd(context.Background(), args...)})
	return nil
}

// Len returns the number of messages.
func (c *Publishing) Len() int { return len(c.adds) }

// Context returns the context of the call's commands.
func (c *Publishing) Context() context.Context { return c.ctx }

// Send sends the call in one round trip: over the pipeline, together with concurrent calls,
// or several messages for a client whose pipelines may use several connections by
// themselves. It may be called again after redis.Nil: nothing is stored.
func (c *Publishing) Send(client redisx.Client, pipe *pipeline.Pipeline) error {
	c.sent.Asterisk()
	c.MultiRefused = false
	cmds := make([]redis.Cmder, 0, len(c.adds)+2)
	for _, add := range c.adds {
		add.SetErr(nil)
		cmds = append(cmds, add)
	}
	several := len(cmds) > 1
	if several && client.Single() == nil {
		return c.sendTo(client, cmds)
	}
	var multi, exec redisx.OnceCmd
	if several {
		multi, exec = redisx.NewOnce(c.ctx, "multi"), redisx.NewOnce(c.ctx, "exec")
		cmds = append(slices.Insert(cmds, 0, redis.Cmder(multi)), exec)
	}
	if err := pipe.Do(c.ctx, cmds...); err != nil {
		return c.sent.Outcome(err)
	}
	if several && multi.Err() == nil {
		c.MultiRefused = redisx.IsDenied(exec.Err())
		return c.executed(exec)
	}
	// One message; or several that ran one by one, since the permission for MULTI was
	// revoked after the Publisher had checked it.
	c.MultiRefused = several && redisx.IsDenied(multi.Err())
	for _, add := range c.adds {
		if add.Err() == nil && add.Val() == "QUEUED" {
			add.SetErr(errQueued)
		}
	}
	return c.sent.Outcome(c.summary())
}

// errQueued means that a command was queued in a transaction that cannot be
// executed, because EXEC was denied on this connection. It will never run, so
// nothing is stored.
var errQueued = redisx.ReplyError("ERR queued in a transaction whose EXEC was denied")

// executed reads EXEC's reply, which contains the errors of the commands. The IDs
// are not needed, but a missing one becomes redis.Nil, as for a single XADD.
func (c *Publishing) executed(exec redisx.OnceCmd) error {
	replies, err := exec.Slice()
	switch {
	case errors.Is(err, redis.Nil): // somebody left a WATCH on the connection
		return redis.TxFailedErr
	case err != nil:
		// EXECABORT means that a command was rejected, but does not say why.
		for _, add := range c.adds {
			if redisx.IsReply(err) && redisx.IsReply(add.Err()) {
				err = add.Err()
				break
			}
		}
		return c.sent.Outcome(err)
	case len(replies) != len(c.adds):
		return fmt.Errorf("%w: %w", redisx.ErrOutcomeUnknown, errReply)
	}
	for i, reply := range replies {
		err, _ := reply.(error)
		if reply == nil {
			err = redis.Nil
		}
		c.adds[i].SetErr(err)
	}
	return c.summary()
}

// summary returns nil if all messages are stored, and the first error if none is.
// If only some are stored, it returns ErrOutcomeUnknown: Redis's transactions do
// not roll back.
func (c *Publishing) summary() error {
	stored := 0
	var first error
	for _, add := range c.adds {
		switch err := add.Err(); {
		case err == nil:
			stored++
		case first == nil, redisx.IsReply(first) && !redisx.IsReply(err): // a broken connection says less about what happened
			first = redisx.Redacted(err)
		}
	}
	if first == nil || stored == 0 {
		return first
	}
	return fmt.Errorf("%w: %d of %d messages are stored: %w", redisx.ErrOutcomeUnknown, stored, len(c.adds), first)
}

// sendTo sends the call by itself: the client routes the transaction to the key's node.
func (c *Publishing) sendTo(client redisx.Client, cmds []redis.Cmder) error {
	_, err := client.TxPipelined(c.ctx, func(pipe redis.Pipeliner) error {
		for _, cmd := range cmds {
			_ = pipe.Process(c.ctx, cmd) // as a wrapped client's pipeline may have it
		}
		return nil
	})
	if redisx.ReplyHas(err, "'multi'") && redisx.IsDenied(err) {
		// Then the messages run one by one, and go-redis does not report the
		// outcome of each.
		c.MultiRefused = true
		return fmt.Errorf("%w: the messages ran one by one: %w", redisx.ErrOutcomeUnknown, redisx.Redacted(err))
	}
	if redisx.IsReply(err) {
		if sum := c.summary(); sum != nil {
			return sum
		}
	}
	return c.sent.Outcome(err)
}

// AskMulti returns an error if the node does not permit MULTI.
func AskMulti(ctx context.Context, node *redis.Client) error {
	multi, exec := redisx.NewOnce(ctx, "multi"), redisx.NewOnce(ctx, "exec")
	redisx.ExecPipeline(ctx, node, []redis.Cmder{multi, exec})
	for _, err := range []error{multi.Err(), exec.Err()} {
		if redisx.IsDenied(err) {
			return fmt.Errorf("several messages in one call need permission for MULTI and EXEC: %w", err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
