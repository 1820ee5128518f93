package goxstreams

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strings"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
)

// Worker handles the messages of a topic, decoded into an E. Its methods are
// called concurrently if SubscriberConfig.MaxConcurrency is more than 1. A panic
// in one of them is an error of that message. Their contexts end a second before
// CloseTimeout, and when the message's lease is lost.
type Worker[E any] interface {
	// Process handles a message. nil: it is acked. An error: it comes again, as
	// SubscriberConfig.Retry, Permanent, RetryAfter and Snooze say.
	Process(ctx context.Context, msg Message[E]) error

	// ProcessBroken handles an entry that the Unmarshaler rejects, or whose
	// payload is no E. nil: it is acked and gone. ErrDead, or what wraps it: it
	// moves to the dead-letter stream. Any other error: it comes again.
	ProcessBroken(ctx context.Context, broken BrokenMessage) error

	// ProcessDead handles a message that is dead: its retries are used up, or
	// its error is Permanent. What it returns means the same as for
	// ProcessBroken. A message that crashes three processes here is moved to
	// the dead-letter stream unseen, if SubscriberConfig.Retry has a limit.
	ProcessDead(ctx context.Context, dead Message[E]) error
}

// Message is a message as a Worker sees it.
type Message[E any] struct {
	ID         string // the entry's
	RetryCount int64  // deliveries before this one, by Redis's count
	Body       E
	Metadata   message.Metadata

	// Err is why the message is dead, for ProcessDead: the error of Process, for
	// which errors.Is(Err, ErrRetriesExhausted) or ErrPermanent is true; without
	// the error of Process where another process knew it. nil for Process.
	Err error
}

// Codec turns an event into a payload, and back. Its methods are called
// concurrently. A panic in Decode makes the entry a broken one.
type Codec interface {
	Encode(event any) ([]byte, error)
	Decode(payload []byte, event any) error // into the pointer event
}

type jsonCodec struct{}

func (jsonCodec) Encode(event any) ([]byte, error) {
	payload, err := json.Marshal(event)
	return payload, redactedJSON(err)
}

func (jsonCodec) Decode(payload []byte, event any) error {
	return redactedJSON(json.Unmarshal(payload, event))
}

// jsonError is an error of package json without what that quotes of a payload: it
// is logged, and payloads are not. errors.As finds the whole one.
type jsonError struct {
	text string
	err  error
}

func (e *jsonError) Error() string { return e.text }
func (e *jsonError) Unwrap() error { return e.err }

// redactedJSON keeps the texts that quote nothing, or one character. What a type's
// own UnmarshalJSON or UnmarshalText returns is not among them: time.Time's, for
// one, quotes what it could not read.
func redactedJSON(err error) error {
	switch e := err.(type) {
	case nil, *json.SyntaxError, *json.InvalidUnmarshalError, *json.MarshalerError, *json.UnsupportedTypeError, *json.UnsupportedValueError:
		return err
	case *json.UnmarshalTypeError:
		kind, _, _ := strings.Cut(e.Value, " ") // "number 1e99"
		if e.Struct != "" {
			return &jsonError{fmt.Sprintf("json: cannot unmarshal %s at byte %d into field %s.%s of type %v", kind, e.Offset, e.Struct, e.Field, e.Type), err}
		}
		return &jsonError{fmt.Sprintf("json: cannot unmarshal %s at byte %d into a value of type %v", kind, e.Offset, e.Type), err}
	}
	return &jsonError{fmt.Sprintf("json: a value is refused, by an error of type %T", err), err}
}

// ProducerConfig configures a Producer. Nothing in it is required.
type ProducerConfig struct {
	// Codec encodes events. Default: JSON.
	Codec Codec

	// Metadata returns what a message carries beside its event, such as the
	// trace that ctx belongs to (goxstreams' WithCtxTransmmiter). Default: none.
	Metadata func(ctx context.Context) message.Metadata

	// UUID returns an event's own UUID, such as an order's number: with
	// PublisherConfig.Idempotence an event that is produced again, after
	// ErrOutcomeUnknown or a crash, is then stored once. Default: a new one each time.
	UUID func(ctx context.Context, event any) string
}

// Producer publishes events of type E through any Watermill Publisher. It may be
// used by several goroutines at once.
type Producer[E any] struct {
	pub    message.Publisher
	config ProducerConfig
}

// NewProducer returns a Producer. The Publisher stays the caller's; without one,
// every call fails.
func NewProducer[E any](pub message.Publisher, config ProducerConfig) *Producer[E] {
	if config.Codec == nil {
		config.Codec = jsonCodec{}
	}
	return &Producer[E]{pub, config}
}

// Produce publishes one event. See Publisher.Publish for the errors. If ctx has
// ended, nothing is sent; its end later on is ignored.
func (p *Producer[E]) Produce(ctx context.Context, event E, topic string) error {
	return p.produce(ctx, topic, event)
}

// ProduceBatch publishes the events in their order: with this library's Publisher
// all of them, or none. An event that cannot be encoded fails the call: the error
// names its index, and nothing is stored. To produce nothing does nothing.
func (p *Producer[E]) ProduceBatch(ctx context.Context, events []E, topic string) error {
	return p.produce(ctx, topic, events...)
}

func (p *Producer[E]) uuid(ctx context.Context, event E) string {
	if p.config.UUID == nil {
		return watermill.NewUUID()
	}
	return p.config.UUID(ctx, event)
}

func (p *Producer[E]) produce(ctx context.Context, topic string, events ...E) error {
	fail := func(err error) error { return fmt.Errorf("goxstreams: produce to %q: %w", topic, err) }
	if p.pub == nil {
		return fail(errors.New("NewProducer was given no Publisher"))
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	messages := make([]*message.Message, len(events))
	for i, event := range events {
		payload, err := p.config.Codec.Encode(event)
		if err != nil {
			return fail(fmt.Errorf("encode events[%d], of %d: %w", i, len(events), err))
		}
		messages[i] = message.NewMessageWithContext(ctx, p.uuid(ctx, event), payload)
		if p.config.Metadata != nil {
			maps.Copy(messages[i].Metadata, p.config.Metadata(ctx))
		}
	}
	if len(messages) == 0 {
		return nil
	}
	if err := p.pub.Publish(topic, messages...); err != nil {
		return fail(err)
	}
	return nil
}

// ConsumerConfig configures a Consumer. Topic and Subscriber.Client are required,
// and in most cases Subscriber.ConsumerGroup and Subscriber.Retry should be set.
type ConsumerConfig struct {
	// Subscriber is the configuration of the Consumer's Subscriber. OnBroken and
	// OnDead cannot be set: they are the worker's ProcessBroken and ProcessDead.
	Subscriber SubscriberConfig

	// Topic is what the worker handles.
	Topic string

	// Name is the handler's name in a router, and in dead letters. Default:
	// "group:topic".
	Name string

	// Codec decodes payloads. Default: JSON, the errors of which are logged without
	// what they quote of a payload (errors.As finds all). Those of another Codec are
	// logged, and stand in dead letters, as they are.
	Codec Codec

	// Context returns the context for Process and ProcessDead, derived from ctx,
	// given the message's metadata (goxstreams' WithCtxReceiver). Default: ctx.
	Context func(ctx context.Context, metadata message.Metadata) context.Context
}

// Consumer runs a Worker over a topic.
type Consumer[E any] struct {
	worker     Worker[E]
	config     ConsumerConfig
	subscriber *Subscriber
	handler    message.HandlerFunc
	logger     watermill.LoggerAdapter
}

// NewConsumer returns a Consumer. Its error names every mistake in the config. A
// nil logger logs nothing.
func NewConsumer[E any](worker Worker[E], config ConsumerConfig, logger watermill.LoggerAdapter) (*Consumer[E], error) {
	errs := configErrors{typeName: "ConsumerConfig"}
	if worker == nil {
		errs.errs = append(errs.errs, errors.New("goxstreams: NewConsumer: a worker is required"))
	}
	if config.Topic == "" {
		errs.add("Topic", "is required")
	}
	if config.Subscriber.OnBroken != nil {
		errs.add("Subscriber.OnBroken", "is the worker's ProcessBroken")
	}
	if config.Subscriber.OnDead != nil {
		errs.add("Subscriber.OnDead", "is the worker's ProcessDead")
	}
	if err := config.Subscriber.validate(); err != nil {
		errs.errs = append(errs.errs, err)
	}
	if err := errs.err(); err != nil {
		return nil, err
	}
	if config.Name == "" {
		config.Name = config.Subscriber.ConsumerGroup + ":" + config.Topic
	}
	if config.Codec == nil {
		config.Codec = jsonCodec{}
	}
	if logger == nil {
		logger = watermill.NopLogger{}
	}
	config.Subscriber.OnBroken = worker.ProcessBroken
	subscriber, err := NewSubscriber(config.Subscriber, logger)
	if err != nil {
		return nil, err
	}
	c := &Consumer[E]{worker: worker, config: config, subscriber: subscriber, logger: logger}
	subscriber.typed = &typed{name: config.Name, decode: c.decode, dead: c.processDead}
	c.handler = subscriber.config.Retry.Middleware(c.process)
	return c, nil
}

// typed is what a Consumer adds to its Subscriber.
type typed struct {
	name   string
	decode func(payload []byte) (body any, err error) // body: an *E
	dead   func(ctx context.Context, dead DeadMessage, err error) error
}

// Run handles messages until ctx ends, and returns when what was under way has
// come to its end: see Subscriber.Subscribe for how that is bounded. It needs no
// router. Its error says that it could not begin.
func (c *Consumer[E]) Run(ctx context.Context) error {
	messages, err := c.subscriber.Subscribe(ctx, c.config.Topic)
	if err != nil {
		return err
	}
	for msg := range messages {
		go func() { // as many as MaxConcurrency
			defer msg.Nack()            // which does nothing after an Ack; Process may end the goroutine
			err := guard(func() error { // ShouldRetry may panic too
				_, err := c.handler(msg)
				return err
			})
			if err != nil {
				if over := ctx.Err() != nil || msg.Context().Err() != nil; !over || !errors.Is(err, context.Canceled) {
					c.logger.Error("Process failed", err, watermill.LogFields{"topic": c.config.Topic, "handler_name": c.config.Name, "message_uuid": msg.UUID})
				}
				return
			}
			msg.Ack()
		}()
	}
	return nil
}

// AddTo adds the Consumer to a Watermill router, in the place of Run: for its
// middlewares, and to run several Consumers together. The policy for failed
// messages stays that of SubscriberConfig.Retry, whatever Retry the router has;
// but a middleware that swallows the error of a dead message acks it, and
// ProcessDead does not see it. Watermill's Retry does not try again in place
// after the last delivery, the error of which is marked already. The name must be
// unique in the router, which panics if it is not.
func (c *Consumer[E]) AddTo(router *message.Router) *message.Handler {
	return router.AddConsumerHandler(c.config.Name, c.config.Topic, c.subscriber, func(msg *message.Message) error {
		_, err := c.handler(msg)
		return err
	})
}

// Stats returns the state of each Run under way, and of the router's handler: see
// Subscriber.Stats.
func (c *Consumer[E]) Stats() []SubscriptionStats { return c.subscriber.Stats() }

func (c *Consumer[E]) decode(payload []byte) (any, error) {
	body := new(E)
	if err := c.config.Codec.Decode(payload, body); err != nil {
		return nil, fmt.Errorf("decode the payload into %v: %w", reflect.TypeFor[E](), err)
	}
	return body, nil
}

// process hands a message to the worker's Process.
func (c *Consumer[E]) process(msg *message.Message) ([]*message.Message, error) {
	body, err := c.bodyOf(msg)
	if err != nil {
		return nil, err
	}
	delivery, _ := DeliveryFromContext(msg.Context())
	return nil, guard(func() error {
		ctx, err := c.context(msg.Context(), msg.Metadata)
		if err != nil {
			return err
		}
		return c.worker.Process(ctx, Message[E]{ID: delivery.ID, RetryCount: delivery.RetryCount(), Body: body, Metadata: msg.Metadata})
	})
}

// bodyOf returns the body that the subscription decoded. A second call for the
// same delivery, by a middleware, decodes anew: what was done to the first body
// stays there. So does a copy that a middleware made.
func (c *Consumer[E]) bodyOf(msg *message.Message) (E, error) {
	if d := deliveryOf(msg); d != nil {
		if body := d.body.Swap(nil); body != nil {
			return *(*body).(*E), nil
		}
	}
	body, err := c.decode(msg.Payload)
	if err != nil {
		return *new(E), err
	}
	return *body.(*E), nil
}

// processDead hands a message to the worker's ProcessDead.
func (c *Consumer[E]) processDead(ctx context.Context, dead DeadMessage, cause error) error {
	body, err := c.decode(dead.Message.Payload)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDead, err)
	}
	ctx, err = c.context(ctx, dead.Message.Metadata)
	if err != nil {
		return err
	}
	return c.worker.ProcessDead(ctx, Message[E]{
		ID: dead.EntryID, RetryCount: dead.Deliveries - 1, Body: *body.(*E), Metadata: dead.Message.Metadata, Err: cause,
	})
}

func (c *Consumer[E]) context(ctx context.Context, metadata message.Metadata) (context.Context, error) {
	if c.config.Context == nil {
		return ctx, nil
	}
	if ctx = c.config.Context(ctx, metadata); ctx == nil {
		return nil, errors.New("goxstreams: ConsumerConfig.Context returned nil")
	}
	return ctx, nil
}

// TopicStats asks Redis for the state of the Consumer's topic: see
// Subscriber.TopicStats.
func (c *Consumer[E]) TopicStats(ctx context.Context, topic string) (TopicStats, error) {
	return c.subscriber.TopicStats(ctx, topic)
}
