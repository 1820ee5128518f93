package goxstreams

import (
	"cmp"
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

// PublisherConfig configures a Publisher. Only Client is required. NewPublisher
// copies the config and never changes it.
type PublisherConfig struct {
	// Client is required. The caller owns it: the Publisher never closes it.
	Client redis.UniversalClient

	// Marshaler converts a message to the fields of an entry. Default:
	// DefaultMarshaler{}.
	Marshaler Marshaler

	// DefaultMaxLen is the approximate length to which XADD trims each stream
	// (MAXLEN ~): a stream may be longer, but is never trimmed below it. 0 means
	// unbounded. Entries trimmed before every group has handled them are lost;
	// Stats().Lost counts those that were pending.
	DefaultMaxLen int64

	// MaxLens overrides DefaultMaxLen by topic. 0 means that the topic is
	// unbounded.
	MaxLens map[string]int64

	// Idempotence stores messages with the same UUID once, so that a call that
	// failed with ErrOutcomeUnknown can be repeated. It needs Redis 8.6.2. Default:
	// nil, off. &Idempotence{} turns it on with its defaults.
	Idempotence *Idempotence
}

func (c PublisherConfig) validate() error {
	errs := configErrors{typeName: "PublisherConfig"}
	errs.addIf(redisx.IsNil(c.Client), "Client", "is required")
	atLeast(&errs, "DefaultMaxLen", c.DefaultMaxLen, 0)
	errs.marshaler("Marshaler", c.Marshaler)
	for _, topic := range slices.Sorted(maps.Keys(c.MaxLens)) {
		atLeast(&errs, fmt.Sprintf("MaxLens[%q]", topic), c.MaxLens[topic], 0)
	}
	if c.Idempotence != nil {
		c.Idempotence.validate(&errs)
	}
	return errs.err()
}

// Publisher is a Watermill Publisher over Redis Streams. It is safe for concurrent
// use; concurrent calls share pipelines.
type Publisher struct {
	config PublisherConfig
	client redisx.Client
	logger watermill.LoggerAdapter
	quiet  bool // the logger discards everything

	multi    sync.Map // the addresses of nodes that allow MULTI
	prepared sync.Map // topics whose streams are configured for Idempotence

	pipe *pipeline.Pipeline // calls that arrive while one pipeline is in flight share the next

	calls calls
	soon  soon // delayed messages that are due soon
}

var _ message.Publisher = (*Publisher)(nil)

// NewPublisher returns a Publisher. The error lists every mistake in the config. A
// nil logger discards all logs.
func NewPublisher(config PublisherConfig, logger watermill.LoggerAdapter) (*Publisher, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	config.Marshaler = cmp.Or[Marshaler](config.Marshaler, DefaultMarshaler{})
	config.MaxLens = maps.Clone(config.MaxLens)
	if config.Idempotence != nil {
		config.Idempotence = config.Idempotence.withDefaults()
	}
	logger = cmp.Or[watermill.LoggerAdapter](logger, watermill.NopLogger{})
	client := redisx.Client{UniversalClient: config.Client}
	_, quiet := logger.(watermill.NopLogger)
	return &Publisher{
		config: config, client: client, pipe: pipeline.New(client, 1), logger: logger, quiet: quiet,
		soon: soon{client: client, logger: logger},
	}, nil
}

// String returns the Publisher's name for Watermill's logs and metadata.
func (p *Publisher) String() string { return "goxstreams.Publisher" }

// Publish adds the messages to the topic's stream, in order and in one round trip.
// It stores all of them or none. A nil error means that Redis has stored them. An
// error means that nothing is stored, unless errors.Is(err, ErrOutcomeUnknown):
// then the messages were written to a connection that broke before the answer
// arrived. Publish never sends a message twice. The first call with several
// messages takes one more round trip, to check the permission for MULTI.
//
// However many callers wait, a call takes no longer than the client's options allow
// for one command: PoolTimeout to wait for its turn, then the dial, write and read
// timeouts. A call whose turn does not come fails with an error that wraps
// redis.ErrPoolTimeout.
//
// A message with the metadata of Watermill's components/delay is delayed: it waits in
// Redis, beside the stream, and any of the topic's Subscribers moves it into the stream
// when it is due, by the server's clock and to the millisecond. Its UUID must not be
// empty. Publishing it again while it waits stores nothing; a different message with the
// same UUID is refused until then. A message that was delayed once, and is published
// again with its metadata, is not delayed again. Delays of more than ten years, negative
// delays and metadata that cannot be parsed are errors. See Schedule for the messages
// that wait. Delayed messages need EVAL.
//
// Publish uses the messages' contexts for their values only (tracing). It ignores
// their cancellation and deadlines: the client's timeouts bound the call. A
// pipeline that several calls share carries no context values. Publishing no
// messages does nothing.
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
	dues, err := duesOf(messages)
	if err != nil {
		return err
	}
	if dues != nil {
		return p.schedule(topic, messages, dues)
	}
	call, err := p.marshal(topic, messages)
	if err != nil {
		return err
	}
	// Begin after the Marshaler has returned, since it may itself call Publish or
	// Close on this Publisher.
	p.calls.add(1)
	defer p.calls.add(-1)
	return p.whilePrepared(call.Context(), topic, len(messages), func() error { return p.send(topic, call) })
}

// marshal returns the XADD commands of one call.
func (p *Publisher) marshal(topic string, messages []*message.Message) (*xstream.Publishing, error) {
	call := xstream.NewPublishing(messages[0].Context(), topic, p.maxLen(topic), p.producerID(), len(messages))
	for i, msg := range messages {
		err := call.Add(msg.UUID, func(args []any) ([]any, error) { return p.appendFields(args, topic, msg) })
		if err != nil {
			return nil, atMessage(i, messages, err)
		}
	}
	return call, nil
}

// atMessage says which message an error is about.
func atMessage(i int, messages []*message.Message, err error) error {
	uuid := ""
	if msg := messages[i]; msg != nil {
		uuid = msg.UUID
	}
	return fmt.Errorf("marshal message %d of %d (UUID %q): %w", i+1, len(messages), uuid, err)
}

// appendFields appends the fields of a message's entry to its arguments.
func (p *Publisher) appendFields(args []any, topic string, msg *message.Message) ([]any, error) {
	if p.config.Idempotence != nil && msg.UUID == "" {
		return nil, errNoUUID
	}
	return appendFields(args, p.config.Marshaler, topic, msg)
}

func (p *Publisher) maxLen(topic string) int64 {
	if maxLen, ok := p.config.MaxLens[topic]; ok {
		return maxLen
	}
	return p.config.DefaultMaxLen
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
	err = call.Send(p.client, p.pipe)
	if call.MultiRefused && node != nil {
		p.multi.Delete(node.Options().Addr) // the next call checks again
	}
	return err
}

// probeMulti checks, once per node, that MULTI is allowed. Without MULTI, Redis
// would run the remaining commands of the pipeline, but not atomically.
func (p *Publisher) probeMulti(ctx context.Context, node *redis.Client) error {
	if node == nil {
		return nil
	}
	if _, ok := p.multi.Load(node.Options().Addr); ok {
		return nil
	}
	err := xstream.AskMulti(ctx, node)
	if err == nil {
		p.multi.Store(node.Options().Addr, struct{}{})
	}
	return err
}

// Close waits for the calls in flight, but no longer than the client's options
// allow for one command. It does not close the client. The Publisher holds no
// resources, so it can still be used after Close: Watermill's router closes a
// handler's publisher when that handler ends, and a publisher that other handlers
// share must keep working.
func (p *Publisher) Close() error {
	timeout := time.After(p.client.CallTimeout())
	for _, idle := range []func() <-chan struct{}{p.calls.idle, p.soon.end} {
		select {
		case <-idle():
		case <-timeout: // for example, a go-redis hook that itself waits for Close
			return nil
		}
	}
	return nil
}

// calls counts the calls in flight.
type calls struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n drops to 0; nil while nobody waits
}

func (c *calls) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n += n; c.n == 0 && c.none != nil {
		close(c.none)
		c.none = nil
	}
}

// idle returns a channel that is closed once no calls are in flight.
func (c *calls) idle() <-chan struct{} {
	c.add(1)
	defer c.add(-1) // closes it at once if there are no others
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.none == nil {
		c.none = make(chan struct{})
	}
	return c.none
}
