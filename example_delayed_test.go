package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/components/requeuer"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// A message is delayed by Watermill's own component. Until it is due it can be looked at,
// cancelled and rescheduled.
func ExampleSchedule() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	must(err)

	for _, order := range []string{"order 1", "order 2"} {
		reminder := message.NewMessage("remind "+order, []byte("payment of "+order+" is due"))
		delay.Message(reminder, delay.For(24*time.Hour))
		must(publisher.Publish("reminders", reminder))
	}

	schedule, err := goxstreams.NewSchedule(client, "reminders")
	must(err)
	must(schedule.Cancel(ctx, "remind order 1")) // it was paid
	must(schedule.Reschedule(ctx, "remind order 2", time.Now().Add(48*time.Hour)))
	for waiting, err := range schedule.All(ctx) {
		must(err)
		fmt.Printf("in %.0f hours: %s\n", time.Until(waiting.Due).Hours(), waiting.Message.Payload)
	}
	// Output:
	// in 48 hours: payment of order 2 is due
}

// A message that fails is put aside with a growing delay, and its place in the topic is
// given to the next one: what watermill-sql's DelayedRequeuer does, on Redis alone.
func ExamplePublisher_delayedRequeue() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
	must(err)
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, logger)
	must(err)
	defer func() { must(subscriber.Close()) }()
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)

	requeue, err := requeuer.NewRequeuer(requeuer.Config{
		Subscriber: subscriber, SubscribeTopic: "requeue", Publisher: publisher,
		GeneratePublishTopic: func(p requeuer.GeneratePublishTopicParams) (string, error) {
			return p.Message.Metadata.Get(middleware.PoisonedTopicKey), nil
		},
	}, logger)
	must(err)
	poison, err := middleware.PoisonQueue(publisher, "requeue")
	must(err)
	delayed := middleware.DelayOnError{InitialInterval: 10 * time.Millisecond, MaxInterval: time.Minute, Multiplier: 2}
	router.AddMiddleware(poison, delayed.Middleware)

	tries, done := 0, make(chan struct{})
	router.AddConsumerHandler("bill", "orders", subscriber, func(msg *message.Message) error {
		if tries++; tries < 3 {
			return errors.New("the bank does not answer")
		}
		fmt.Printf("billed at try %d, after a delay of %s\n", tries, msg.Metadata.Get(delay.DelayedForKey))
		close(done)
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { _ = requeue.Run(ctx) }()
	defer exampleRun(router)()
	examplePublish(client, "orders", "1 kettle")
	<-done
	// Output:
	// billed at try 3, after a delay of 20ms
}

// A recurring message: any number of processes may run this, and each occurrence is
// published once. Schedule takes a parsed cron expression of robfig/cron just as well.
func ExamplePublisher_Recur() {
	client, stop := exampleClient()
	defer stop()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	must(err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "reports"}, nil)
	must(err)
	defer func() { must(subscriber.Close()) }()
	messages, err := subscriber.Subscribe(ctx, "reports")
	must(err)

	go func() {
		must(publisher.Recur(ctx, goxstreams.Recurring{
			Name:     "sales",
			Topic:    "reports",
			Schedule: goxstreams.Every(100 * time.Millisecond),
			Message: func(occurrence time.Time) (*message.Message, error) {
				return message.NewMessage("sales "+occurrence.Format(time.RFC3339Nano), nil), nil
			},
		}))
	}()
	var previous time.Time
	for range 3 {
		msg := <-messages
		var occurrence time.Time
		must(occurrence.UnmarshalText([]byte(msg.UUID[len("sales "):])))
		if !previous.IsZero() {
			fmt.Println(occurrence.Sub(previous))
		}
		previous = occurrence
		msg.Ack()
	}
	// Output:
	// 100ms
	// 100ms
}
