package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/cqrs"
	"github.com/ThreeDotsLabs/watermill/message"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Orders of one customer are handled in their order, those of others at the same time. A
// message that fails holds back its customer's, and nobody else's.
func ExampleSubscriberConfig_orderingKey() {
	client, stop := exampleClient()
	defer stop()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	must(err)
	var orders []*message.Message
	for _, order := range []string{"ann 1", "ann 2", "bob 1", "ann 3"} {
		msg := message.NewMessage(watermill.NewUUID(), []byte(order))
		msg.Metadata.Set("customer", order[:3])
		orders = append(orders, msg)
	}
	must(publisher.Publish("orders", orders...))

	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:         client,
		ConsumerGroup:  "billing",
		MaxConcurrency: 100,
		OrderingKey:    func(msg *message.Message) string { return msg.Metadata.Get("customer") },
	}, nil)
	must(err)
	messages, err := subscriber.Subscribe(context.Background(), "orders")
	must(err)
	ann, bob := make(chan string, 10), make(chan string, 10)
	failed := false
	go func() {
		for msg := range messages {
			switch customer := msg.Metadata.Get("customer"); {
			case customer == "ann" && !failed:
				failed = true
				ann <- string(msg.Payload) + " fails"
				msg.Nack()
				continue
			case customer == "ann":
				ann <- string(msg.Payload)
			default:
				bob <- string(msg.Payload)
			}
			msg.Ack()
		}
	}()
	fmt.Println(<-bob)
	fmt.Println(<-ann, "|", <-ann, "|", <-ann, "|", <-ann)
	must(subscriber.Close())
	// Output:
	// bob 1
	// ann 1 fails | ann 1 | ann 2 | ann 3
}

// Subscribed and EmailUpdated are events of a newsletter.
type Subscribed struct{ ID, Email string }

func (e Subscribed) Key() string { return e.ID }

type EmailUpdated struct{ ID, Email string }

func (e EmailUpdated) Key() string { return e.ID }

const partitionKey = "partition_key"

// keyedMarshaler is the CQRS marshaler with the partition key in the metadata.
type keyedMarshaler struct{ cqrs.JSONMarshaler }

func (m keyedMarshaler) Marshal(v any) (*message.Message, error) {
	msg, err := m.JSONMarshaler.Marshal(v)
	if event, ok := v.(interface{ Key() string }); ok && err == nil {
		msg.Metadata.Set(partitionKey, event.Key())
	}
	return msg, err
}

// Events of one subscriber in their order, as in Watermill's example
// basic/6-cqrs-ordered-events, which partitions a Kafka topic for that.
func Example_orderedEvents() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
	must(err)
	router := message.NewDefaultRouter(logger)
	bus, err := cqrs.NewEventBusWithConfig(publisher, cqrs.EventBusConfig{
		GeneratePublishTopic: func(cqrs.GenerateEventPublishTopicParams) (string, error) { return "events", nil },
		Marshaler:            keyedMarshaler{},
	})
	must(err)
	processor, err := cqrs.NewEventGroupProcessorWithConfig(router, cqrs.EventGroupProcessorConfig{
		GenerateSubscribeTopic: func(cqrs.EventGroupProcessorGenerateSubscribeTopicParams) (string, error) { return "events", nil },
		SubscriberConstructor: func(params cqrs.EventGroupProcessorSubscriberConstructorParams) (message.Subscriber, error) {
			return goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
				Client:         client,
				ConsumerGroup:  params.EventGroupName,
				MaxConcurrency: 100,
				OrderingKey:    func(msg *message.Message) string { return msg.Metadata.Get(partitionKey) },
			}, logger)
		},
		Marshaler: keyedMarshaler{},
	})
	must(err)

	var mu sync.Mutex
	emails, failed := make(map[string]string), make(map[string]bool)
	done := make(chan struct{}, 100)
	must(processor.AddHandlersGroup("read-model",
		cqrs.NewGroupEventHandler(func(_ context.Context, e *Subscribed) error {
			mu.Lock()
			defer mu.Unlock()
			if !failed[e.ID] { // the first time; what follows for this subscriber has to wait
				failed[e.ID] = true
				return errors.New("the database is busy")
			}
			emails[e.ID] = e.Email
			return nil
		}),
		cqrs.NewGroupEventHandler(func(_ context.Context, e *EmailUpdated) error {
			mu.Lock()
			defer mu.Unlock()
			if emails[e.ID] == "" {
				return errors.New("nobody has subscribed")
			}
			emails[e.ID] = e.Email
			done <- struct{}{}
			return nil
		}),
	))
	var running sync.WaitGroup
	running.Go(func() { must(router.Run(context.Background())) })
	<-router.Running()
	for i := range 100 {
		id := fmt.Sprint("subscriber-", i)
		must(bus.Publish(context.Background(), Subscribed{id, "old@example.com"}))
		must(bus.Publish(context.Background(), EmailUpdated{id, "new@example.com"}))
	}
	for range 100 {
		<-done
	}
	must(router.Close())
	running.Wait()
	stale := 0
	for _, email := range emails {
		if email != "new@example.com" {
			stale++
		}
	}
	fmt.Println(len(emails), "subscribers,", stale, "with an old address")
	// Output: 100 subscribers, 0 with an old address
}
