package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

var errBankDown = errors.New("the bank does not answer")

// The policy of one handler, which knows its errors. The fields are those of
// Watermill's middleware.Retry; the count is Redis's, and survives the process.
func ExampleRetry_Middleware() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, logger)
	must(err)
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)

	done := make(chan struct{})
	bill := router.AddConsumerHandler("bill", "orders", sub, func(msg *message.Message) error {
		delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
		if delivery.RetryCount() < 2 {
			return errBankDown
		}
		fmt.Printf("billed: %s\n", msg.Payload)
		close(done)
		return nil
	})
	bill.AddMiddleware(goxstreams.Retry{
		MaxRetries:      5,
		InitialInterval: 10 * time.Millisecond,
		Multiplier:      2,
		ShouldRetry: func(p middleware.RetryParams) bool {
			return errors.Is(p.Err, errBankDown) // anything else is dead at once
		},
		OnRetryHook: func(n int, delay time.Duration) { fmt.Printf("retry %d after %v\n", n, delay) },
	}.Middleware)

	defer exampleRun(router)()
	examplePublish(client, "orders", "1 kettle")
	<-done
	// Output:
	// retry 1 after 10ms
	// retry 2 after 20ms
	// billed: 1 kettle
}

// An order for an article that is not sold fails for good, without retries.
func ExamplePermanent() {
	client, stop := exampleClient()
	defer stop()
	dead := make(chan goxstreams.DeadMessage)
	logger := watermill.NopLogger{}
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: client, ConsumerGroup: "billing",
		OnDead: func(_ context.Context, d goxstreams.DeadMessage) { dead <- d },
	}, logger)
	must(err)
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	router.AddMiddleware(goxstreams.Retry{MaxRetries: 5}.Middleware) // sees the handler's error
	router.AddConsumerHandler("bill", "orders", sub, func(msg *message.Message) error {
		return goxstreams.Permanent(fmt.Errorf("no such article: %s", msg.Payload))
	})

	defer exampleRun(router)()
	examplePublish(client, "orders", "1 unicorn")
	d := <-dead
	fmt.Printf("%s: %s, after %d delivery\n", d.Kind, d.Reason, d.Deliveries)
	// Output: permanent: no such article: 1 unicorn, after 1 delivery
}

// The server that was called says when to try again. The retry counts.
func ExampleRetryAfter() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, logger)
	must(err)
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	router.AddMiddleware(goxstreams.Retry{MaxRetries: 5, InitialInterval: time.Hour}.Middleware)
	done := make(chan struct{})
	router.AddConsumerHandler("bill", "orders", sub, func(msg *message.Message) error {
		delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
		fmt.Println("retry", delivery.RetryCount())
		if delivery.RetryCount() == 0 {
			return goxstreams.RetryAfter(errors.New("429 Too Many Requests"), 20*time.Millisecond)
		}
		close(done)
		return nil
	})

	defer exampleRun(router)()
	examplePublish(client, "orders", "1 kettle")
	<-done
	// Output:
	// retry 0
	// retry 1
}

// It is too early, which is not a failure: a Snooze uses up no retry.
func ExampleSnooze() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, logger)
	must(err)
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	router.AddMiddleware(goxstreams.Retry{MaxRetries: -1}.Middleware) // the first failure would be final
	shopOpens := time.Now().Add(30 * time.Millisecond)
	done := make(chan struct{})
	router.AddConsumerHandler("bill", "orders", sub, func(msg *message.Message) error {
		if wait := time.Until(shopOpens); wait > 0 {
			return goxstreams.Snooze(errors.New("the shop is closed"), wait)
		}
		delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
		fmt.Println("billed, retry", delivery.RetryCount())
		close(done)
		return nil
	})

	defer exampleRun(router)()
	examplePublish(client, "orders", "1 kettle")
	<-done
	// Output: billed, retry 0
}

// Dead letters elsewhere: Watermill's PoisonQueue outside of Retry receives dead
// messages only.
func ExampleIsDead() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, logger)
	must(err)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
	must(err)
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	poison, err := middleware.PoisonQueueWithFilter(pub, "graveyard", goxstreams.IsDead)
	must(err)
	router.AddMiddleware(
		poison,
		goxstreams.Retry{MaxRetries: 2, InitialInterval: 10 * time.Millisecond}.Middleware,
	)
	router.AddConsumerHandler("bill", "orders", sub, func(msg *message.Message) error {
		fmt.Println("trying")
		return errBankDown
	})

	// The poison queue is a topic.
	deadSubscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client}, logger)
	must(err)
	defer deadSubscriber.Close()
	dead, err := deadSubscriber.Subscribe(context.Background(), "graveyard")
	must(err)
	defer exampleRun(router)()
	examplePublish(client, "orders", "1 kettle")
	msg := <-dead
	fmt.Printf("%s: %s\n", msg.Payload, msg.Metadata.Get(middleware.ReasonForPoisonedKey))
	msg.Ack()
	// Output:
	// trying
	// trying
	// trying
	// 1 kettle: the bank does not answer
}

// An error that is dead-lettered at once, to a stream of its own.
func ExampleDeadLetter_Middleware() {
	client, stop := exampleClient()
	defer stop()
	errFraud := errors.New("the card was stolen")
	dead := make(chan goxstreams.DeadMessage)
	logger := watermill.NopLogger{}
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: client, ConsumerGroup: "billing",
		OnDead: func(_ context.Context, d goxstreams.DeadMessage) { dead <- d },
	}, logger)
	must(err)
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	router.AddMiddleware(
		goxstreams.Retry{MaxRetries: 5}.Middleware,
		goxstreams.DeadLetter{
			ShouldDeadLetter: func(err error) bool { return errors.Is(err, errFraud) },
			Topic:            func(topic string) string { return topic + ".fraud{" + topic + "}" }, // in one slot of a Cluster
		}.Middleware,
	)
	router.AddConsumerHandler("bill", "orders", sub, func(*message.Message) error { return errFraud })

	defer exampleRun(router)()
	examplePublish(client, "orders", "100 espresso cups")
	d := <-dead
	fmt.Println(d.Kind, d.Handler, d.Reason)
	fmt.Println(client.XLen(context.Background(), "orders.fraud{orders}").Val(), "to be looked at")
	// Output:
	// filtered bill the card was stolen
	// 1 to be looked at
}
