package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// exampleClient stands for redis.NewClient: it returns a client of an embedded Redis of
// its own. stop closes both, since the library does not close the client.
func exampleClient() (client *redis.Client, stop func()) {
	server, err := miniredis.Run()
	must(err)
	client = redis.NewClient(&redis.Options{Addr: server.Addr()})
	client.AddHook(&hook{process: blockBriefly})
	return client, func() {
		must(client.Close())
		server.Close()
	}
}

// blockBriefly shortens the blocking of reads to milliseconds. The embedded server
// cannot wake a read (CLIENT UNBLOCK), so each Close would wait for its end: by
// default a second, for each of the Examples, which run one after the other.
func blockBriefly(_ context.Context, cmd redis.Cmder, next func() error) error {
	args := cmd.Args()
	for i, arg := range args[:len(args)-1] {
		if arg == "block" {
			args[i+1] = 20
		}
	}
	return next()
}

// examplePublish publishes a message for each payload.
func examplePublish(client *redis.Client, topic string, payloads ...string) {
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	must(err)
	for _, payload := range payloads {
		must(pub.Publish(topic, message.NewMessage(watermill.NewUUID(), message.Payload(payload))))
	}
}

// exampleRun runs a router until stop is called, which drains it.
func exampleRun(router *message.Router) (stop func()) {
	ended := make(chan error, 1)
	go func() { ended <- router.Run(context.Background()) }()
	return func() {
		must(router.Close())
		must(<-ended)
	}
}

// A Publisher stores all messages of a call, or none.
func ExamplePublisher_Publish() {
	client, stop := exampleClient()
	defer stop()

	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{
		Client:        client,
		DefaultMaxLen: 1_000_000, // the oldest entries go when there are more
	}, watermill.NopLogger{})
	must(err)
	defer pub.Close()

	err = pub.Publish("orders",
		message.NewMessage(watermill.NewUUID(), []byte("4 espresso cups")),
		message.NewMessage(watermill.NewUUID(), []byte("1 kettle")),
	)
	fmt.Println(err)
	fmt.Println(client.XLen(context.Background(), "orders").Val(), "entries")
	// Output:
	// <nil>
	// 2 entries
}

// One consumer of the group gets each message. After an error it is redelivered, as
// the Subscriber's Retry says.
func ExampleNewSubscriber() {
	client, stop := exampleClient() // redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	defer stop()

	logger := watermill.NopLogger{}
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:        client,
		ConsumerGroup: "billing",
		Retry:         &goxstreams.Retry{MaxRetries: 5, InitialInterval: 10 * time.Millisecond},
	}, logger)
	must(err)

	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	done := make(chan struct{})
	router.AddConsumerHandler("bill", "orders", sub, func(msg *message.Message) error {
		delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
		if delivery.RetryCount() == 0 {
			fmt.Println("the bank does not answer")
			return errors.New("the bank does not answer")
		}
		fmt.Printf("billed: %s\n", msg.Payload)
		close(done)
		return nil // acked
	})
	ended := make(chan error)
	go func() { ended <- router.Run(context.Background()) }()

	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
	must(err)
	must(pub.Publish("orders", message.NewMessage(watermill.NewUUID(), []byte("1 kettle"))))

	<-done
	must(router.Close()) // drains: handlers finish, acks arrive
	must(<-ended)
	// Output:
	// the bank does not answer
	// billed: 1 kettle
}

// Without a group a subscription receives every message, here from the beginning of the
// topic, and stores nothing about it.
func ExampleSubscriber_Subscribe_fanOut() {
	client, stop := exampleClient()
	defer stop()
	examplePublish(client, "orders", "4 espresso cups", "1 kettle")

	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, StartID: "0"}, nil)
	must(err)
	defer sub.Close()
	messages, err := sub.Subscribe(context.Background(), "orders")
	must(err)
	for range 2 {
		msg := <-messages
		fmt.Printf("%s\n", msg.Payload)
		msg.Ack()
	}
	// Output:
	// 4 espresso cups
	// 1 kettle
}

// Stats makes no call to Redis. Its Err is for readiness probes.
func ExampleSubscriber_Stats() {
	client, stop := exampleClient()
	defer stop()
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, nil)
	must(err)
	defer sub.Close()
	messages, err := sub.Subscribe(context.Background(), "orders")
	must(err)
	examplePublish(client, "orders", "1 kettle")
	msg := <-messages

	for _, s := range sub.Stats() {
		if s.Err != nil {
			fmt.Printf("not ready: %s since %s: %v\n", s.Topic, s.Since, s.Err)
			continue
		}
		fmt.Printf("%s is fine: delivered %d, in flight %d, dead %d\n", s.Topic, s.Delivered, s.InFlight, s.Dead)
	}
	msg.Ack()
	// Output: orders is fine: delivered 1, in flight 1, dead 0
}

// The state of a topic in Redis: the consumer lag, pending entries and dead letters.
func ExampleSubscriber_TopicStats() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, nil)
	must(err)
	defer sub.Close()
	messages, err := sub.Subscribe(ctx, "orders")
	must(err)
	examplePublish(client, "orders", "1 kettle")
	msg := <-messages

	s, err := sub.TopicStats(ctx, "orders")
	must(err)
	fmt.Printf("%s has %d entry, %d pending in %s for %v\n", s.Topic, s.Length, s.Pending, s.Group, s.OldestPending.Truncate(time.Minute))
	fmt.Printf("%s has %d\n", s.DeadLetterTopic, s.DeadLetters)
	msg.Ack()
	// Output:
	// orders has 1 entry, 1 pending in billing for 0s
	// orders.dead{orders} has 0
}

func ExampleDeliveryFromContext() {
	client, stop := exampleClient()
	defer stop()
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:        client,
		ConsumerGroup: "billing",
		Retry:         &goxstreams.Retry{MaxRetries: 2, InitialInterval: 10 * time.Millisecond},
	}, nil)
	must(err)
	defer sub.Close()
	messages, err := sub.Subscribe(context.Background(), "orders")
	must(err)
	examplePublish(client, "orders", "1 kettle")

	for range 3 {
		msg := <-messages
		d, ok := goxstreams.DeliveryFromContext(msg.Context())
		fmt.Println(ok, d.Topic, d.Group, "retry", d.RetryCount(), "of", d.MaxRetries)
		if d.RetryCount() == int64(d.MaxRetries) {
			fmt.Println("the last try; the entry is", time.Since(d.Time()).Truncate(time.Hour), "old")
			msg.Ack()
			continue
		}
		msg.Nack() // what a router does with an error
	}
	// Output:
	// true orders billing retry 0 of 2
	// true orders billing retry 1 of 2
	// true orders billing retry 2 of 2
	// the last try; the entry is 0s old
}

// When another consumer may have the message, its context ends, and the cause says
// why.
func Example_leaseLost() {
	handler := func(msg *message.Message) error {
		select {
		case <-time.After(10 * time.Millisecond): // the work
			return nil
		case <-msg.Context().Done():
		}
		switch cause := context.Cause(msg.Context()); {
		case errors.Is(cause, goxstreams.ErrLeaseLost):
			fmt.Println("another consumer has it by now: leave everything as it is")
		case errors.Is(cause, goxstreams.ErrSubscriberClosed):
			fmt.Println("a shutdown: finish; the message is redelivered, and this does not count")
		}
		return msg.Context().Err()
	}
	msg := message.NewMessage("1", nil)
	ctx, cancel := context.WithCancelCause(context.Background())
	msg.SetContext(ctx)
	cancel(goxstreams.ErrSubscriberClosed) // what Close does, a second before CloseTimeout
	fmt.Println(handler(msg))
	// Output:
	// a shutdown: finish; the message is redelivered, and this does not count
	// context canceled
}

// Publish never resends messages that may have been stored. If a duplicate is
// acceptable, publish again: it has the same UUID as the first.
func ExampleErrOutcomeUnknown() {
	publish := func(pub message.Publisher, topic string, msg *message.Message) error {
		err := pub.Publish(topic, msg)
		if errors.Is(err, goxstreams.ErrOutcomeUnknown) {
			fmt.Println("the connection broke before the answer: stored, or not")
			err = pub.Publish(topic, msg)
		}
		return err
	}
	err := publish(&unluckyPublisher{}, "orders", message.NewMessage("0193-4711", []byte("1 kettle")))
	fmt.Println(err)
	// Output:
	// the connection broke before the answer: stored, or not
	// <nil>
}

// unluckyPublisher fails once as the Publisher does when the connection breaks.
type unluckyPublisher struct{ calls int }

func (p *unluckyPublisher) Publish(topic string, _ ...*message.Message) error {
	if p.calls++; p.calls == 1 {
		return fmt.Errorf("goxstreams: publish to %q: %w", topic, goxstreams.ErrOutcomeUnknown)
	}
	return nil
}

func (*unluckyPublisher) Close() error { return nil }

// publishOnce publishes the messages again, with the same UUIDs, until the outcome is
// known. The Publisher needs Idempotence, and a Window above the limit.
func publishOnce(ctx context.Context, publisher *goxstreams.Publisher, topic string, messages ...*message.Message) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // well within Window
	defer cancel()
	unknown := false
	for {
		err := publisher.Publish(topic, messages...)
		unknown = unknown || errors.Is(err, goxstreams.ErrOutcomeUnknown)
		if err == nil || !unknown { // stored, or certainly not
			return err
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return errors.Join(goxstreams.ErrOutcomeUnknown, err)
		}
	}
}

// A call whose outcome is unknown is repeated with the same UUIDs until it is
// known: Redis stores each UUID once. This example's server is older than Redis
// 8.6.2, so the error is ErrUnsupported.
func ExampleIdempotence() {
	client, stop := exampleClient()
	defer stop()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{
		Client:      client,
		Idempotence: &goxstreams.Idempotence{Window: 10 * time.Minute},
	}, nil)
	must(err)

	err = publishOnce(context.Background(), publisher, "orders", message.NewMessage("order 4711", []byte("1 kettle")))
	fmt.Println("unsupported:", errors.Is(err, goxstreams.ErrUnsupported))
	fmt.Println(client.XLen(context.Background(), "orders").Val(), "stored")
	// Output:
	// unsupported: true
	// 0 stored
}

// The wire format of goxstreams: the payload in a field "body", the metadata in the
// field that its WithCtxTransmmiter writes.
func ExampleBodyMarshaler() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	marshaler := goxstreams.BodyMarshaler{MetadataField: "ctxField"}

	// As a goxstreams producer does it.
	must(client.XAdd(ctx, &redis.XAddArgs{Stream: "orders", Values: []string{
		"body", `{"Article":"kettle"}`, "ctxField", `{"trace_id":"4711"}`,
	}}).Err())

	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: client, ConsumerGroup: "billing", Unmarshaler: marshaler,
	}, nil)
	must(err)
	defer sub.Close()
	messages, err := sub.Subscribe(ctx, "orders")
	must(err)
	msg := <-messages
	fmt.Printf("%s, trace %s\n", msg.Payload, msg.Metadata.Get("trace_id"))
	msg.Ack()

	// For a goxstreams consumer.
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: goxstreams.BodyMarshaler{}}, nil)
	must(err)
	must(pub.Publish("bills", message.NewMessage(watermill.NewUUID(), []byte(`{"Total":7}`))))
	fmt.Println(client.XRange(ctx, "bills", "-", "+").Val()[0].Values)
	// Output:
	// {"Article":"kettle"}, trace 4711
	// map[body:{"Total":7}]
}

// Malformed entries go to OnBroken. The topic continues.
func ExampleSubscriberConfig_onBroken() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	must(client.XAdd(ctx, &redis.XAddArgs{Stream: "orders", Values: []string{"typed", "by hand"}}).Err())
	must(client.XAdd(ctx, &redis.XAddArgs{Stream: "orders", Values: []string{"order", "1 kettle"}}).Err())

	seen := make(chan struct{}, 2)
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:        client,
		ConsumerGroup: "billing",
		OnBroken: func(ctx context.Context, broken goxstreams.BrokenMessage) error {
			defer func() { seen <- struct{}{} }()
			fmt.Printf("%q: %v\n", broken.Fields, broken.Err)
			if broken.Fields[0] == "typed" {
				return nil // it is acked and gone
			}
			return goxstreams.ErrDead // to the dead-letter stream
		},
	}, nil)
	must(err)
	_, err = sub.Subscribe(ctx, "orders")
	must(err)
	<-seen
	<-seen
	must(sub.Close())
	fmt.Println(client.XLen(ctx, goxstreams.DeadLetterTopic("orders")).Val(), "in the dead-letter stream")
	// Unordered output:
	// ["typed" "by hand"]: goxstreams: broken entry: field "_watermill_message_uuid" is missing
	// ["order" "1 kettle"]: goxstreams: broken entry: field "_watermill_message_uuid" is missing
	// 1 in the dead-letter stream
}

// OnDead is called for every dead message, whatever the reason: for an alert, or a
// metric.
func ExampleSubscriberConfig_onDead() {
	client, stop := exampleClient()
	defer stop()
	dead := make(chan goxstreams.DeadMessage)
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:        client,
		ConsumerGroup: "billing",
		Retry:         &goxstreams.Retry{MaxRetries: 1, InitialInterval: 10 * time.Millisecond},
		OnDead:        func(_ context.Context, d goxstreams.DeadMessage) { dead <- d },
	}, nil)
	must(err)
	defer sub.Close()
	messages, err := sub.Subscribe(context.Background(), "orders")
	must(err)
	examplePublish(client, "orders", "1 unicorn")
	for range 2 {
		(<-messages).Nack()
	}

	d := <-dead
	fmt.Printf("%s of %s is dead: %s after %d deliveries\n", d.Message.Payload, d.Topic, d.Kind, d.Deliveries)
	// Output: 1 unicorn of orders is dead: exhausted after 2 deliveries
}

func ExampleDeadLetterTopic() {
	fmt.Println(goxstreams.DeadLetterTopic("orders"))
	fmt.Println(goxstreams.DeadLetterTopic("{shop}.orders")) // it has a hash tag of its own
	// Output:
	// orders.dead{orders}
	// {shop}.orders.dead
}

// The payload of a malformed entry's dead letter is its packed fields.
func ExampleUnpackFields() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	must(client.XAdd(ctx, &redis.XAddArgs{Stream: "orders", Values: []string{"typed", "by hand"}}).Err())
	billing, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, nil)
	must(err)
	defer billing.Close()
	_, err = billing.Subscribe(ctx, "orders")
	must(err)

	// A dead-letter stream is a topic: here it is read without a group.
	deadSubscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, StartID: "0"}, nil)
	must(err)
	defer deadSubscriber.Close()
	dead, err := deadSubscriber.Subscribe(ctx, goxstreams.DeadLetterTopic("orders"))
	must(err)
	msg := <-dead
	if msg.Metadata.Get(goxstreams.DeadKindKey) == goxstreams.Broken.String() {
		fields, err := goxstreams.UnpackFields(msg.Payload)
		fmt.Printf("%q %v\n", fields, err)
	}
	msg.Ack()
	// Output: ["typed" "by hand"] <nil>
}

// Constructors report every mistake at once.
func ExampleNewSubscriber_mistakes() {
	_, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		ConsumerGroup: "billing",
		ClaimMinIdle:  -time.Second,
		Retry:         &goxstreams.Retry{MaxRetries: -2},
	}, nil)
	for line := range strings.Lines(err.Error()) {
		fmt.Print(line)
	}
	// Output:
	// goxstreams: SubscriberConfig.Client: is required
	// goxstreams: SubscriberConfig.ClaimMinIdle: is negative: -1s
	// goxstreams: SubscriberConfig.Retry.MaxRetries: is -2; it must be -1 (no retries), 0 (no limit) or more
}
