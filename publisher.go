package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/goxstreams/watermill-goxstreams/internal/pipeline"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
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

	// Idempotence stores the same UUID once, so that a call with ErrOutcomeUnknown
	// can be repeated. It needs Redis 8.6.2. nil: off. &Idempotence{}: on, with its
	// defaults.
	Idempotence *Idempotence
}

func (c PublisherConfig) validate() error {
	errs := configErrors{typeName: "PublisherConfig"}
	if redisx.IsNil(c.Client) {
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
	if c.Idempotence != nil {
		c.Idempotence.validate(&errs)
	}
	return errs.err()
}

// Publisher is a Watermill Publisher over Redis Streams. It may be used by
// several goroutines at once; calls that come while one is under way share a
// pipeline.
type Publisher struct {
	config PublisherConfig
	client redisx.Client
	logger watermill.LoggerAdapter
	quiet  bool // the logger discards everything

	probe sync.Mutex
	multi map[string]*question // whether MULTI is allowed, by the node's address; guarded by probe

	prepared sync.Map // topics whose streams are set for Idempotence

	pipe *pipeline.Pipeline // what gathers while a pipeline is under way shares the next

	calls calls
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
	if config.Idempotence != nil {
		config.Idempotence = config.Idempotence.withDefaults()
	}
	if logger == nil {
		logger = watermill.NopLogger{}
	}
	client := redisx.Client{UniversalClient: config.Client}
	_, quiet := logger.(watermill.NopLogger)
	return &Publisher{config: config, client: client, pipe: pipeline.New(client, 1, false), logger: logger, quiet: quiet}, nil
}

// String names the Publisher in Watermill's logs and metadata.
func (p *Publisher) String() string { return "goxstreams.Publisher" }

// Publish adds the messages to the topic's stream, in their order, in one round
// trip: all of them, or none. It returns nil when Redis has stored them, and an
// error when it has not, with one exception: errors.Is(err, ErrOutcomeUnknown)
// says that the messages were written to a connection which then broke before the
// answer. Nothing is sent a second time. (The first call of several messages asks
// for the right to MULTI before.)
//
// However many callers wait, it ends within what the client's options allow for one
// command: PoolTimeout for its turn, then the dial, the write and the read. A call
// that did not get its turn has redis.ErrPoolTimeout in its error.
//
// The messages' contexts are there for their values (tracing); their end is
// ignored, the client's timeouts bound the call. Calls that share a pipeline have
// nobody's values. To publish nothing does nothing.
func (p *Publisher) Publish(topic string, messages ...*message.Message) error {
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
	call, err := p.marshal(topic, messages)
	if err != nil {
		return err
	}
	// The Marshaler is over: it may have published, or closed, through this Publisher.
	p.calls.begin()
	defer p.calls.end()
	if p.config.Idempotence != nil {
		return p.sendIdempotent(topic, call)
	}
	return p.send(topic, call)
}

// marshal returns the call's commands.
func (p *Publisher) marshal(topic string, messages []*message.Message) (*xstream.Publishing, error) {
	var call *xstream.Publishing
	prefix := p.addPrefix(topic)
	for i, msg := range messages {
		if call == nil && msg != nil {
			call = xstream.NewPublishing(msg.Context(), len(messages))
		}
		err := p.add(call, prefix, topic, msg)
		if err != nil {
			uuid := ""
			if msg != nil {
				uuid = msg.UUID
			}
			return nil, fmt.Errorf("marshal message %d of %d (UUID %q): %w", i+1, len(messages), uuid, err)
		}
	}
	return call, nil
}

func (p *Publisher) add(call *xstream.Publishing, prefix []any, topic string, msg *message.Message) error {
	if msg == nil {
		_, err := appendFields(nil, p.config.Marshaler, topic, nil)
		return err
	}
	producerID := ""
	if i := p.config.Idempotence; i != nil {
		if msg.UUID == "" {
			return errNoUUID
		}
		producerID = i.ProducerID
	}
	args, err := appendFields(call.Begin(prefix, producerID, msg.UUID), p.config.Marshaler, topic, msg)
	if err == nil {
		call.Add(args)
	}
	return err
}

// addPrefix returns what is the same for all of a topic's messages.
func (p *Publisher) addPrefix(topic string) []any {
	maxLen, ok := p.config.MaxLens[topic]
	if !ok {
		maxLen = p.config.DefaultMaxLen
	}
	return xstream.AddPrefix(topic, maxLen, p.config.Idempotence != nil) // see sendIdempotent
}

func (p *Publisher) send(topic string, call *xstream.Publishing) (err error) {
	var node *redis.Client
	if call.Len() > 1 {
		if node, err = p.client.Node(call.Context(), topic); err == nil {
			err = p.probeMulti(call.Context(), node)
		}
		if err != nil {
			p.client.Refresh(err)
			return fmt.Errorf("nothing is stored: %w", redisx.Redacted(err))
		}
	}
	if p.client.Single() == nil {
		err = call.SendTo(p.client)
	} else {
		err = call.Send(p.pipe)
	}
	if xstream.MultiRefused(err) {
		p.forgetMulti(node)
	}
	return err
}

// A question is asked once: callers that come meanwhile wait for its answer. A
// question without an error stays.
type question struct {
	answered chan struct{}
	err      error
}

// probeMulti makes sure, once for each node, that MULTI is allowed: where it is
// denied, what follows it in a pipeline runs all the same, but not as one.
func (p *Publisher) probeMulti(ctx context.Context, node *redis.Client) error {
	if node == nil {
		return nil
	}
	addr := node.Options().Addr
	p.probe.Lock()
	if q := p.multi[addr]; q != nil {
		p.probe.Unlock()
		<-q.answered
		return q.err
	}
	q := &question{answered: make(chan struct{}), err: errors.New("goxstreams: MULTI was not asked for: a panic")}
	if p.multi == nil {
		p.multi = make(map[string]*question)
	}
	p.multi[addr] = q
	p.probe.Unlock()
	defer close(q.answered)
	defer func() {
		if q.err != nil {
			p.forgetMulti(node)
		}
	}()
	q.err = xstream.AskMulti(ctx, node)
	return q.err
}

// forgetMulti makes the next call ask again.
func (p *Publisher) forgetMulti(node *redis.Client) {
	p.probe.Lock()
	defer p.probe.Unlock()
	if node != nil {
		delete(p.multi, node.Options().Addr)
	}
}

// Close waits for the calls under way: for as long at most as the client's options
// allow for one command. It does not close the client, and since there is nothing
// else to close, the Publisher can be used again: Watermill's router closes a
// handler's publisher when that handler ends, and one that other handlers share must
// outlive it.
func (p *Publisher) Close() error {
	timer := time.NewTimer(p.client.CallTimeout())
	defer timer.Stop()
	select {
	case <-p.calls.idle():
	case <-timer.C: // of a hook that waits for this, say
	}
	return nil
}

// calls counts what is under way.
type calls struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when none is; nil: nobody waits for that
}

func (c *calls) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
}

func (c *calls) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n--; c.n == 0 && c.none != nil {
		close(c.none)
		c.none = nil
	}
}

// idle returns a channel that is closed as soon as nothing is under way.
func (c *calls) idle() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if c.none == nil {
		c.none = make(chan struct{})
	}
	return c.none
}
