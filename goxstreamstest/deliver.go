package goxstreamstest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Delivery is one delivery of one entry, as a test chooses it. One of Message, Event and
// Fields is required.
type Delivery struct {
	// Message is what was published. It is marshaled as the receiver's Unmarshaler
	// expects it, and is not changed.
	Message *message.Message

	// Event is encoded into the payload of the Message, or of a new one, by the Worker's
	// Codec or as JSON.
	Event any

	// Fields are those of the entry as Redis has them, names and values in turn, in the
	// place of a Message: for what does not unmarshal, or has another format.
	Fields []string

	// Count says which delivery it is: 1 for the first, 3 for the one with the retry count
	// 2. Default 1.
	Count int64

	// ID is the entry's, such as "1700000000000-0". Default: one by the present time.
	ID string

	// Topic is the entry's. Default: the Worker's ConsumerConfig.Topic, else "topic".
	Topic string
}

// Result is what became of a Delivery.
type Result struct {
	// Outcome is what the Subscriber did with the message. Its Err is what the handler
	// returned through its middlewares, also if it was acked before (InstantAck); a panic
	// is an error here. For a Worker it is the error of the method that decided.
	goxstreams.Outcome

	// Produced are the messages that a handler returned, and that the router would have
	// published: none if it failed.
	Produced []*message.Message
}

// Receiver is what deliveries are made to. It may be used by several tests at once.
type Receiver struct {
	config goxstreams.SubscriberConfig
	topic  string
	codec  goxstreams.Codec
	run    func(ctx context.Context, topic string, config goxstreams.SubscriberConfig, seen *witness) error
}

// Handler returns a Receiver for a handler that publishes messages, in a router with the
// middlewares, the first one outermost. Of the config Client must be nil, since each
// Delivery has a server of its own, and NoAck false. BlockTime and ClaimInterval are
// shortened. ConsumerGroup is "group" by default.
func Handler(handler message.HandlerFunc, config goxstreams.SubscriberConfig, middlewares ...message.HandlerMiddleware) *Receiver {
	run := func(ctx context.Context, topic string, config goxstreams.SubscriberConfig, seen *witness) error {
		subscriber, err := goxstreams.NewSubscriber(config, nil)
		if err != nil {
			return err
		}
		router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
		if err != nil {
			return err
		}
		router.AddMiddleware(seen.middleware)
		router.AddMiddleware(middlewares...)
		router.AddHandler("handler", topic, subscriber, "produced", seen, handler)
		return errors.Join(router.Run(ctx), subscriber.Close())
	}
	return &Receiver{config: config, run: run}
}

// ConsumerHandler is Handler for a handler that publishes nothing.
func ConsumerHandler(handler message.NoPublishHandlerFunc, config goxstreams.SubscriberConfig, middlewares ...message.HandlerMiddleware) *Receiver {
	return Handler(func(msg *message.Message) ([]*message.Message, error) { return nil, handler(msg) }, config, middlewares...)
}

// Worker returns a Receiver for a Worker. Of the config Subscriber is as for Handler, and
// Topic may be empty.
func Worker[E any](worker goxstreams.Worker[E], config goxstreams.ConsumerConfig) *Receiver {
	run := func(ctx context.Context, topic string, subscriber goxstreams.SubscriberConfig, _ *witness) error {
		config := config // several tests may run it
		config.Topic, config.Subscriber = topic, subscriber
		consumer, err := goxstreams.NewConsumer(worker, config, nil)
		if err != nil {
			return err
		}
		return consumer.Run(ctx)
	}
	return &Receiver{config: config.Subscriber, topic: config.Topic, codec: config.Codec, run: run}
}

// Deliver delivers an entry once, by a Subscriber on an embedded server, and returns what
// became of it. A retry is not waited for: Deliver the next Count instead. It fails the
// test if the config or the Delivery has a mistake.
func (r *Receiver) Deliver(tb testing.TB, d Delivery) *Result {
	tb.Helper()
	result, err := r.deliver(tb, d)
	if err != nil {
		tb.Fatalf("goxstreamstest: %v", err)
	}
	return result
}

func (r *Receiver) deliver(tb testing.TB, d Delivery) (*Result, error) {
	tb.Helper()
	if err := r.validate(d); err != nil {
		return nil, err
	}
	topic, config := cmp.Or(d.Topic, r.topic, "topic"), r.config
	config.ConsumerGroup = cmp.Or(config.ConsumerGroup, "group")
	client := NewServer(tb).Client()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := r.stage(ctx, client, topic, config, d); err != nil {
		return nil, err
	}

	seen := new(witness)
	config.Client, config.BlockTime, config.ClaimInterval = client, brief, brief
	config.OnOutcome = func(o goxstreams.Outcome) {
		seen.once.Do(func() { seen.outcome = &o })
		cancel() // before a retry could begin: it is released instead
		if r.config.OnOutcome != nil {
			r.config.OnOutcome(o)
		}
	}
	if err := r.run(ctx, topic, config, seen); err != nil {
		return nil, err
	}
	return seen.result()
}

// brief is how long reads wait, and how often released entries are looked for.
const brief = 10 * time.Millisecond

func (r *Receiver) validate(d Delivery) error {
	var errs []error
	add := func(condition bool, text string) {
		if condition {
			errs = append(errs, errors.New(text))
		}
	}
	add(r.config.Client != nil, "SubscriberConfig.Client must be nil: each Delivery has an embedded server of its own")
	add(r.config.NoAck, "SubscriberConfig.NoAck: a message that is not kept has no outcome")
	add(d.Message == nil && d.Event == nil && len(d.Fields) == 0, "Delivery: one of Message, Event and Fields is required")
	add((d.Message != nil || d.Event != nil) && len(d.Fields) > 0, "Delivery.Fields excludes Message and Event")
	add(len(d.Fields)%2 != 0, fmt.Sprintf("Delivery.Fields are names and values in turn: %d is no even number", len(d.Fields)))
	add(d.Count < 0, fmt.Sprintf("Delivery.Count is negative: %d", d.Count))
	return errors.Join(errs...)
}

// released is the consumer to which entries belong that consumers released when they
// closed. Subscribers claim them at once, and keep their count.
const released = "released"

// stage adds the entry, with the deliveries that it has had.
func (r *Receiver) stage(ctx context.Context, client *redis.Client, topic string, config goxstreams.SubscriberConfig, d Delivery) error {
	fields, err := r.fields(ctx, client, config, d)
	if err != nil {
		return err
	}
	id, err := client.XAdd(ctx, &redis.XAddArgs{Stream: topic, ID: d.ID, Values: fields}).Result()
	if err != nil {
		return fmt.Errorf("add the entry %q: %w", d.ID, err)
	}
	if err := client.XGroupCreate(ctx, topic, config.ConsumerGroup, "0").Err(); err != nil || d.Count <= 1 {
		return err
	}
	read := &redis.XReadGroupArgs{Group: config.ConsumerGroup, Consumer: released, Streams: []string{topic, ">"}, Count: 1, Block: -1}
	if err := client.XReadGroup(ctx, read).Err(); err != nil {
		return err
	}
	return client.Do(ctx, "xclaim", topic, config.ConsumerGroup, released, 0, id, "retrycount", d.Count-1, "justid").Err()
}

// fields returns the entry's fields: for a message, what a Publisher makes of it.
func (r *Receiver) fields(ctx context.Context, client *redis.Client, config goxstreams.SubscriberConfig, d Delivery) ([]string, error) {
	if len(d.Fields) > 0 {
		return d.Fields, nil
	}
	msg, err := r.message(ctx, d)
	if err != nil {
		return nil, err
	}
	marshaler, ok := config.Unmarshaler.(goxstreams.Marshaler)
	if config.Unmarshaler != nil && !ok {
		return nil, fmt.Errorf("Delivery.Fields is required: the Unmarshaler %T is no Marshaler", config.Unmarshaler)
	}
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: marshaler}, nil)
	if err != nil {
		return nil, err
	}
	const aside = "published"
	if err := publisher.Publish(aside, msg); err != nil {
		return nil, err
	}
	entries, err := client.Do(ctx, "xrange", aside, "-", "+").Slice()
	if err != nil {
		return nil, err
	}
	var fields []string
	for _, field := range entries[0].([]any)[1].([]any) {
		fields = append(fields, field.(string))
	}
	return fields, client.Del(ctx, aside).Err()
}

// message returns what is to be published.
func (r *Receiver) message(ctx context.Context, d Delivery) (*message.Message, error) {
	if d.Event == nil {
		return d.Message, nil
	}
	var encoded witness
	producer := goxstreams.NewProducer[any](&encoded, goxstreams.ProducerConfig{Codec: r.codec})
	if err := producer.Produce(ctx, d.Event, "event"); err != nil {
		return nil, err
	}
	msg := encoded.produced[0]
	if d.Message != nil {
		payload := msg.Payload
		msg = d.Message.Copy()
		msg.Payload = payload
	}
	return msg, nil
}

// witness sees what becomes of a delivery. It is a Publisher and a middleware.
type witness struct {
	once    sync.Once
	outcome *goxstreams.Outcome

	mu       sync.Mutex // a handler may outlive its message
	err      error
	produced []*message.Message
}

func (w *witness) result() (*Result, error) {
	if w.outcome == nil {
		return nil, errors.New("the delivery has ended without an outcome")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r := &Result{Outcome: *w.outcome, Produced: w.produced}
	if w.err != nil {
		r.Err = w.err
	}
	return r, nil
}

// middleware is outside of all others, and sees what the router sees.
func (w *witness) middleware(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) (produced []*message.Message, err error) {
		returned := false
		defer func() {
			if returned {
				w.failed(err)
				return
			}
			p := recover()
			if p == nil { // t.FailNow has ended the goroutine: nobody else would nack
				w.failed(errors.New("the handler has ended its goroutine, as t.FailNow does"))
				msg.Nack()
				return
			}
			w.failed(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
			panic(p) // for the router
		}()
		produced, err = h(msg)
		returned = true
		return produced, err
	}
}

func (w *witness) failed(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
}

// Publish takes the messages that a handler returned.
func (w *witness) Publish(_ string, messages ...*message.Message) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.produced = append(w.produced, messages...)
	return nil
}

// Close does nothing.
func (*witness) Close() error { return nil }
