package goxstreams

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"
)

// Worker handles the messages of a topic, decoded into an E. Its methods are called
// concurrently if SubscriberConfig.MaxConcurrency is greater than 1. A panic counts
// as an error of that message. The contexts end a second before CloseTimeout, and
// when the message's lease is lost.
type Worker[E any] interface {
	// Process handles a message. If it returns nil, the message is acked. After an
	// error it is redelivered as SubscriberConfig.Retry, Permanent, RetryAfter and
	// Snooze specify.
	Process(ctx context.Context, msg Message[E]) error

	// ProcessBroken handles a malformed entry: one that the Unmarshaler rejects, or
	// whose payload does not decode into an E. If it returns nil, the entry is
	// acked and dropped. If it returns ErrDead, or an error that wraps it, the
	// entry moves to the dead-letter stream. After any other error ProcessBroken is
	// called again.
	ProcessBroken(ctx context.Context, broken BrokenMessage) error

	// ProcessDead handles a dead message: one that is out of retries, or whose
	// error is Permanent. Its result means the same as ProcessBroken's. If
	// SubscriberConfig.Retry has a limit, a message that crashes three processes in
	// ProcessDead moves to the dead-letter stream without another call.
	ProcessDead(ctx context.Context, dead Message[E]) error
}

// Message is a message as a Worker receives it.
type Message[E any] struct {
	ID         string // the entry's ID
	RetryCount int64  // earlier deliveries, as counted by Redis
	Body       E
	Metadata   message.Metadata

	// Err says why the message is dead: the error of Process, for which
	// errors.Is(Err, ErrRetriesExhausted) or errors.Is(Err, ErrPermanent) is true.
	// If another process saw the error of Process, only the sentinel remains. Set
	// for ProcessDead only; nil for Process.
	Err error
}

// Codec converts an event to a payload and back. Its methods are called
// concurrently. If Decode panics, the entry is malformed.
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

// jsonError is an error of package json without the parts that quote the payload:
// errors are logged, and payloads must not be. errors.As finds the original.
type jsonError struct {
	text string
	err  error
}

func (e *jsonError) Error() string { return e.text }
func (e *jsonError) Unwrap() error { return e.err }

// redactedJSON keeps error texts that quote at most one character of the payload.
// It drops the texts that a type's own UnmarshalJSON or UnmarshalText returns:
// time.Time, for one, quotes its input.
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
	return &jsonError{fmt.Sprintf("json: error of type %T", err), err}
}

// ProducerConfig configures a Producer. No field is required.
type ProducerConfig struct {
	// Codec encodes events. Default: JSON.
	Codec Codec

	// Metadata returns a message's metadata, such as the trace context of ctx
	// (goxstreams' WithCtxTransmmiter). Default: no metadata.
	Metadata func(ctx context.Context) message.Metadata

	// UUID returns an event's own UUID, such as an order number. With
	// PublisherConfig.Idempotence an event that is produced again, after
	// ErrOutcomeUnknown or a crash, is then stored once. Default: a new UUID for
	// each call.
	UUID func(ctx context.Context, event any) string
}

// Producer publishes events of type E through any Watermill Publisher. It is safe
// for concurrent use.
type Producer[E any] struct {
	pub    message.Publisher
	config ProducerConfig
}

// NewProducer returns a Producer. The caller owns pub; if it is nil, every call
// fails.
func NewProducer[E any](pub message.Publisher, config ProducerConfig) *Producer[E] {
	config.Codec = cmp.Or[Codec](config.Codec, jsonCodec{})
	if config.UUID == nil {
		config.UUID = func(context.Context, any) string { return watermill.NewUUID() }
	}
	return &Producer[E]{pub, config}
}

// Produce publishes one event. See Publisher.Publish for the errors. If ctx has
// already ended, nothing is sent; it is not checked again after that.
func (p *Producer[E]) Produce(ctx context.Context, event E, topic string) error {
	return p.produceIn(ctx, topic, 0, event)
}

// ProduceBatch publishes the events in order; with this library's Publisher, all of
// them or none. If an event cannot be encoded, the call fails with an error that
// names its index, and nothing is stored. Producing no events does nothing.
func (p *Producer[E]) ProduceBatch(ctx context.Context, events []E, topic string) error {
	return p.produceIn(ctx, topic, 0, events...)
}

// ProduceAt publishes an event that is delivered at a given time, as a delayed message:
// see Publisher.Publish. If at is in the past, the event is not delayed; the zero time is
// an error. Other libraries' Publishers may ignore the delay.
func (p *Producer[E]) ProduceAt(ctx context.Context, event E, topic string, at time.Time) error {
	if at.IsZero() {
		return p.failed(topic, errors.New("at is the zero time"))
	}
	return p.ProduceIn(ctx, event, topic, max(0, time.Until(at)))
}

// ProduceIn publishes an event that is delivered after a delay, as a delayed message:
// see Publisher.Publish. 0 means no delay; a negative delay is an error. Other libraries'
// Publishers may ignore the delay.
func (p *Producer[E]) ProduceIn(ctx context.Context, event E, topic string, d time.Duration) error {
	if d < 0 {
		return p.failed(topic, fmt.Errorf("the delay is negative: %v", d))
	}
	return p.produceIn(ctx, topic, d, event)
}

func (p *Producer[E]) failed(topic string, err error) error {
	return fmt.Errorf("goxstreams: produce to %q: %w", topic, err)
}

func (p *Producer[E]) produceIn(ctx context.Context, topic string, d time.Duration, events ...E) error {
	if p.pub == nil {
		return p.failed(topic, errors.New("NewProducer got a nil Publisher"))
	}
	if err := ctx.Err(); err != nil {
		return p.failed(topic, err)
	}
	messages := make([]*message.Message, len(events))
	for i, event := range events {
		payload, err := p.config.Codec.Encode(event)
		if err != nil {
			return p.failed(topic, fmt.Errorf("encode events[%d] of %d: %w", i, len(events), err))
		}
		messages[i] = message.NewMessageWithContext(ctx, p.config.UUID(ctx, event), payload)
		if p.config.Metadata != nil {
			maps.Copy(messages[i].Metadata, p.config.Metadata(ctx))
		}
		if d > 0 {
			delay.Message(messages[i], delay.For(d))
		}
	}
	if len(messages) == 0 {
		return nil
	}
	if err := p.pub.Publish(topic, messages...); err != nil {
		return p.failed(topic, err)
	}
	return nil
}

// ConsumerConfig configures a Consumer. Topic and Subscriber.Client are required,
// and most programs should set Subscriber.ConsumerGroup and Subscriber.Retry.
type ConsumerConfig struct {
	// Subscriber configures the Consumer's Subscriber. OnBroken and OnDead cannot
	// be set: the worker's ProcessBroken and ProcessDead take their place.
	Subscriber SubscriberConfig

	// Topic is the topic that the worker handles.
	Topic string

	// Name is the handler's name in a router and in dead letters. Default:
	// "group:topic".
	Name string

	// Codec decodes payloads. Default: JSON, whose errors are logged without the
	// parts that quote the payload (errors.As finds the original error). The errors
	// of any other Codec are logged and stored in dead letters unchanged.
	Codec Codec

	// Context derives the context for Process and ProcessDead from ctx and the
	// message's metadata (goxstreams' WithCtxReceiver). Default: ctx.
	Context func(ctx context.Context, metadata message.Metadata) context.Context

	// Middlewares wrap the handling of a message, the first one outermost: for
	// tracing and metrics, with or without a router. They are outside of
	// Subscriber.Retry, so that OutcomeOf tells them what becomes of the message.
	// What they return as produced messages is dropped. In a router they are inside
	// of its middlewares: do not apply one in both places. Default: none.
	Middlewares []message.HandlerMiddleware
}

// Consumer runs a Worker on a topic.
type Consumer[E any] struct {
	worker     Worker[E]
	config     ConsumerConfig
	subscriber *Subscriber
	handle     message.NoPublishHandlerFunc
}

// NewConsumer returns a Consumer. The error lists every mistake in the config. A
// nil logger discards all logs.
func NewConsumer[E any](worker Worker[E], config ConsumerConfig, logger watermill.LoggerAdapter) (*Consumer[E], error) {
	errs := configErrors{typeName: "ConsumerConfig"}
	if worker == nil {
		errs.errs = append(errs.errs, errors.New("goxstreams: NewConsumer: a worker is required"))
	}
	return newConsumer(worker, config, errs, logger)
}

// newConsumer adds to the mistakes.
func newConsumer[E any](worker Worker[E], config ConsumerConfig, errs configErrors, logger watermill.LoggerAdapter) (*Consumer[E], error) {
	errs.addIf(config.Topic == "", "Topic", "is required")
	errs.addIf(config.Subscriber.OnBroken != nil, "Subscriber.OnBroken", "cannot be set: it is the worker's ProcessBroken")
	errs.addIf(config.Subscriber.OnDead != nil, "Subscriber.OnDead", "cannot be set: it is the worker's ProcessDead")
	for i, m := range config.Middlewares {
		errs.addIf(m == nil, fmt.Sprintf("Middlewares[%d]", i), "is nil")
	}
	errs.errs = append(errs.errs, config.Subscriber.validate())
	if err := errs.err(); err != nil {
		return nil, err
	}
	config.Name = cmp.Or(config.Name, config.Subscriber.ConsumerGroup+":"+config.Topic)
	config.Codec = cmp.Or[Codec](config.Codec, jsonCodec{})
	config.Subscriber.OnBroken = worker.ProcessBroken
	subscriber, err := NewSubscriber(config.Subscriber, logger)
	if err != nil {
		return nil, err
	}
	c := &Consumer[E]{worker: worker, config: config, subscriber: subscriber}
	subscriber.typed = typed{name: config.Name, alone: len(config.Middlewares) == 0, decode: c.decode, dead: c.processDead}
	handler := subscriber.config.Retry.Middleware(c.process)
	for _, m := range slices.Backward(config.Middlewares) {
		handler = m(handler)
	}
	c.handle = func(msg *message.Message) error {
		_, err := handler(msg)
		return err
	}
	return c, nil
}

// typed is the Consumer's part of a Subscriber.
type typed struct {
	name   string
	alone  bool                                       // nobody else gets the messages: there are no Middlewares
	decode func(payload []byte) (body any, err error) // body is an *E
	dead   func(ctx context.Context, dead DeadMessage, err error) error

	// Those of a BatchConsumer. batch returns an error for each message.
	batch   func(ctx context.Context, batch []*batched, stop func() bool) []error
	maxSize int
	maxWait time.Duration
}

// Run handles messages until ctx ends, and returns when the running handlers have
// finished; Subscriber.Subscribe describes the bounds. It needs no router. An error
// means that it could not subscribe.
func (c *Consumer[E]) Run(ctx context.Context) error {
	sub, err := c.subscriber.subscribe(ctx, c.config.Topic, func(msg *message.Message) {
		err := guard(func() error { return c.handle(msg) }) // ShouldRetry may panic too
		switch over := ctx.Err() != nil || msg.Context().Err() != nil; {
		case err == nil:
			msg.Ack()
		case !over || !errors.Is(err, context.Canceled):
			c.subscriber.logger.Error("Process failed", err, watermill.LogFields{"topic": c.config.Topic, "handler_name": c.config.Name, "message_uuid": msg.UUID})
		}
	})
	if err != nil {
		return err
	}
	<-sub.output
	return nil
}

// AddTo adds the Consumer to a Watermill router, instead of Run: to use the
// router's middlewares, or to run several Consumers together.
// SubscriberConfig.Retry remains the policy for failed messages, whatever Retry
// middleware the router has. But a middleware that swallows the error of a dead
// message acks it, and ProcessDead is not called. Watermill's own Retry middleware
// does not retry in place after the last delivery, since that error is already
// marked as final. The Consumer's name must be unique in the router, otherwise the
// router panics.
func (c *Consumer[E]) AddTo(router *message.Router) *message.Handler {
	return router.AddConsumerHandler(c.config.Name, c.config.Topic, c.subscriber, c.handle)
}

// Stats returns the state of each active Run, and of the router's handler: see
// Subscriber.Stats.
func (c *Consumer[E]) Stats() []SubscriptionStats { return c.subscriber.Stats() }

func (c *Consumer[E]) decode(payload []byte) (any, error) {
	body := new(E)
	if err := c.config.Codec.Decode(payload, body); err != nil {
		return nil, fmt.Errorf("decode the payload into %v: %w", reflect.TypeFor[E](), err)
	}
	return body, nil
}

// process passes a message to the worker's Process.
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

// bodyOf returns the body that the subscription decoded. A second call for the same
// delivery, made by a middleware, decodes again, so that changes to the first body
// do not leak into it. A copy that a middleware made is decoded again too.
func (c *Consumer[E]) bodyOf(msg *message.Message) (E, error) {
	if d := deliveryOf(msg); d != nil && d.body != nil && !d.taken.Swap(true) {
		return *d.body.(*E), nil
	}
	body, err := c.decode(msg.Payload)
	if err != nil {
		return *new(E), err
	}
	return *body.(*E), nil
}

// processDead passes a message to the worker's ProcessDead.
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
