package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
)

// PublisherConfig configures a Publisher. Only Client is required. The config is
// copied; nothing in it is changed.
type PublisherConfig struct {
	// Client is required. It stays the caller's: the Publisher does not close it.
	Client redis.UniversalClient

	// Marshaler turns a message into an entry's fields. Default:
	// DefaultMarshaler{}.
	Marshaler Marshaler

	// DefaultMaxLen trims each stream, as messages are added, to about as many
	// entries: never fewer. 0: unbounded. What is trimmed before every group has
	// handled it is lost; Stats().Lost counts what was pending.
	DefaultMaxLen int64

	// MaxLens is DefaultMaxLen by topic. 0: that topic is unbounded.
	MaxLens map[string]int64
}

func (c PublisherConfig) validate() error {
	errs := configErrors{typeName: "PublisherConfig"}
	if isNilClient(c.Client) {
		errs.add("Client", "is required")
	}
	if c.DefaultMaxLen < 0 {
		errs.add("DefaultMaxLen", "is negative: %d", c.DefaultMaxLen)
	}
	if m, ok := c.Marshaler.(BodyMarshaler); ok {
		if err := m.validate(); err != nil {
			errs.add("Marshaler", "%v", err)
		}
	}
	for _, topic := range slices.Sorted(maps.Keys(c.MaxLens)) {
		if n := c.MaxLens[topic]; n < 0 {
			errs.add(fmt.Sprintf("MaxLens[%q]", topic), "is negative: %d", n)
		}
	}
	return errs.err()
}

// Publisher is a Watermill Publisher over Redis Streams. It may be used by
// several goroutines at once; calls that come while one is under way share a
// pipeline.
type Publisher struct {
	config PublisherConfig
	client redis.UniversalClient
	single *redis.Client // nil: no raw MULTI in a pipeline (Cluster, Ring)
	logger watermill.LoggerAdapter
	quiet  bool // the logger discards everything

	probe sync.Mutex
	multi bool // MULTI is known to be allowed; guarded by probe

	mu     sync.Mutex
	queue  []*publishing // what gathers while a pipeline is under way
	flying bool

	calls sync.RWMutex // held by each call; Close waits for it
}

var _ message.Publisher = (*Publisher)(nil)

// NewPublisher returns a Publisher. Its error names every mistake in the config.
// A nil logger logs nothing.
func NewPublisher(config PublisherConfig, logger watermill.LoggerAdapter) (*Publisher, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	if config.Marshaler == nil {
		config.Marshaler = DefaultMarshaler{}
	}
	config.MaxLens = maps.Clone(config.MaxLens)
	if logger == nil {
		logger = watermill.NopLogger{}
	}
	single, _ := config.Client.(*redis.Client)
	_, quiet := logger.(watermill.NopLogger)
	return &Publisher{config: config, client: config.Client, single: single, logger: logger, quiet: quiet}, nil
}

// String names the Publisher in Watermill's logs and metadata.
func (p *Publisher) String() string { return "goxstreams.Publisher" }

// Publish adds the messages to the topic's stream, in their order, in one round
// trip: all of them, or none. It returns nil when Redis has stored them, and an
// error when it has not, with one exception: errors.Is(err, ErrOutcomeUnknown)
// says that the connection broke before the answer. Nothing is sent a second
// time. (The first call of several messages asks for the right to MULTI before.)
//
// The messages' contexts are there for their values (tracing); their end is
// ignored, the client's timeouts bound the call. To publish nothing does nothing.
func (p *Publisher) Publish(topic string, messages ...*message.Message) error {
	p.calls.RLock()
	defer p.calls.RUnlock()
	if len(messages) == 0 {
		return nil
	}
	if err := p.publish(topic, messages); err != nil {
		return fmt.Errorf("goxstreams: publish to %q: %w", topic, err)
	}
	if p.quiet {
		return nil
	}
	for _, msg := range messages {
		p.logger.Trace("Published to Redis stream", watermill.LogFields{"provider": "redis", "topic": topic, "message_uuid": msg.UUID})
	}
	return nil
}

func (p *Publisher) publish(topic string, messages []*message.Message) error {
	if topic == "" {
		return errors.New("the topic is empty")
	}
	call := &publishing{adds: make([]onceCmd, len(messages))}
	for i, msg := range messages {
		fields, err := marshalFields(p.config.Marshaler, topic, msg)
		if err != nil {
			uuid := ""
			if msg != nil {
				uuid = msg.UUID
			}
			return fmt.Errorf("marshal message %d of %d (UUID %q): %w", i+1, len(messages), uuid, err)
		}
		call.adds[i] = newOnce(context.Background(), p.addArgs(topic, fields)...)
	}
	call.ctx = context.WithoutCancel(messages[0].Context())
	switch {
	case p.single == nil:
		return p.publishTx(call)
	case len(call.adds) > 1:
		if err := p.probeMulti(call.ctx); err != nil {
			return err
		}
	}
	return p.share(call)
}

func (p *Publisher) addArgs(topic string, fields []any) []any {
	maxLen, ok := p.config.MaxLens[topic]
	if !ok {
		maxLen = p.config.DefaultMaxLen
	}
	args := make([]any, 0, 6+len(fields))
	args = append(args, "xadd", topic)
	if maxLen > 0 {
		args = append(args, "maxlen", "~", maxLen)
	}
	return append(append(args, "*"), fields...)
}

// probeMulti makes sure, once, that MULTI is allowed: where it is denied, what
// follows it in a pipeline runs all the same, but not as one.
func (p *Publisher) probeMulti(ctx context.Context) error {
	p.probe.Lock()
	defer p.probe.Unlock()
	if p.multi {
		return nil
	}
	multi, exec := newOnce(ctx, "multi"), newOnce(ctx, "exec")
	_, _ = p.single.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		_ = pipe.Process(ctx, multi)
		return pipe.Process(ctx, exec)
	})
	for _, err := range []error{multi.Err(), exec.Err()} {
		if denied(err) {
			return fmt.Errorf("several messages in one call need the right to MULTI and EXEC; nothing is stored: %w", err)
		}
		if err != nil { // nothing of the call was sent: not unknown
			return fmt.Errorf("nothing is stored: %w", err)
		}
	}
	p.multi = true
	return nil
}

// publishing is one call of Publish on its way.
type publishing struct {
	ctx  context.Context
	adds []onceCmd
	// What is around several adds.
	multi, exec onceCmd

	err  error
	done chan struct{} // the error is known
	lead chan struct{} // the call is to send the next pipeline
}

// maxShared bounds the messages of one pipeline of several calls: a call must
// not wait for very many others.
const maxShared = 1000

// share sends the call in a pipeline with those that came while the last one
// was under way. The caller's goroutine does it: whoever finds no pipeline under
// way sends one, and then passes the duty on to the first who waits.
func (p *Publisher) share(call *publishing) error {
	p.mu.Lock()
	if p.flying {
		call.done, call.lead = make(chan struct{}), make(chan struct{})
		p.queue = append(p.queue, call)
		p.mu.Unlock()
		select {
		case <-call.done:
			return call.err
		case <-call.lead:
		}
		p.mu.Lock()
	} else {
		p.flying = true
	}
	batch := []*publishing{call}
	for n := len(call.adds); len(p.queue) > 0 && n+len(p.queue[0].adds) <= maxShared; {
		next := p.queue[0]
		p.queue[0], p.queue = nil, p.queue[1:]
		n += len(next.adds)
		batch = append(batch, next)
	}
	p.mu.Unlock()

	defer p.pass(batch)
	p.send(batch)
	return call.err
}

// pass ends the batch's calls and hands the duty on. A panic in a hook of the
// client comes through here too.
func (p *Publisher) pass(batch []*publishing) {
	for _, call := range batch[1:] {
		close(call.done)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		p.flying = false
		return
	}
	next := p.queue[0]
	p.queue[0], p.queue = nil, p.queue[1:]
	close(next.lead)
}

// send sends the batch in one round trip: a single message as a bare XADD, more
// of one call within MULTI and EXEC.
func (p *Publisher) send(batch []*publishing) {
	ctx := batch[0].ctx
	if len(batch) == 1 && len(batch[0].adds) == 1 {
		add := batch[0].adds[0]
		batch[0].err = outcome(p.single.Process(ctx, add))
		return
	}
	for _, call := range batch {
		call.err = fmt.Errorf("%w: the sender panicked", ErrOutcomeUnknown) // until the answer is there
	}
	pipe := p.single.Pipeline()
	for _, call := range batch {
		several := len(call.adds) > 1
		if several {
			call.multi, call.exec = newOnce(ctx, "multi"), newOnce(ctx, "exec")
			_ = pipe.Process(ctx, call.multi)
		}
		for _, add := range call.adds {
			_ = pipe.Process(ctx, add)
		}
		if several {
			_ = pipe.Process(ctx, call.exec)
		}
	}
	_, _ = pipe.Exec(ctx) // each command has its own error
	for _, call := range batch {
		call.err = call.result()
		if len(call.adds) > 1 && (denied(call.multi.Err()) || denied(call.exec.Err())) {
			p.probe.Lock()
			p.multi = false
			p.probe.Unlock()
		}
	}
}

// result reads the answers to the call's commands.
func (c *publishing) result() error {
	if len(c.adds) == 1 || c.multi.Err() != nil {
		return c.bareResult()
	}
	if err := c.exec.Err(); err != nil {
		// EXECABORT says that a command was refused, but not why.
		for _, add := range c.adds {
			if add.Err() != nil && isReply(add.Err()) && isReply(err) {
				return outcome(add.Err())
			}
		}
		return outcome(err)
	}
	replies, _ := c.exec.Val().([]any)
	for _, reply := range replies {
		if err, ok := reply.(error); ok {
			return outcome(err)
		}
	}
	return nil
}

// errQueued says that a command was queued in a transaction that nobody can
// execute: EXEC was denied to whoever began it on this connection. It is then
// never executed, so that nothing is stored.
var errQueued = redisReply("ERR queued on a connection whose EXEC was denied")

// bareResult reads the answers to messages that ran by themselves: a single
// one, or several whose MULTI was refused (the right to it was taken away since
// probeMulti asked).
func (c *publishing) bareResult() error {
	stored := 0
	var first error
	for _, add := range c.adds {
		err := add.Err()
		if err == nil && add.Val() == "QUEUED" {
			err = errQueued
		}
		if err == nil {
			stored++
		} else if first == nil {
			first = err
		}
	}
	switch stored {
	case len(c.adds):
		return nil
	case 0:
		return outcome(first)
	}
	return fmt.Errorf("%w: MULTI was refused, and %d of %d messages are stored: %w", ErrOutcomeUnknown, stored, len(c.adds), first)
}

// publishTx publishes a call by itself, where a pipeline is not one connection:
// the client routes the transaction to the key's node.
func (p *Publisher) publishTx(call *publishing) error {
	if len(call.adds) == 1 {
		return outcome(p.client.Process(call.ctx, call.adds[0]))
	}
	_, err := p.client.TxPipelined(call.ctx, func(pipe redis.Pipeliner) error {
		for _, add := range call.adds {
			_ = pipe.Process(call.ctx, add)
		}
		return nil
	})
	return outcome(err)
}

// outcome tells an answer of the server, and what never reached it, from a
// connection that broke in between.
func outcome(err error) error {
	if err == nil || isReply(err) || neverSent(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
}

// Close waits for the calls under way. It does not close the client, and since
// there is nothing else to close, the Publisher can be used again: Watermill's
// router closes a handler's publisher when that handler ends, and one that other
// handlers share must outlive it.
func (p *Publisher) Close() error {
	p.calls.Lock()
	defer p.calls.Unlock()
	return nil
}
