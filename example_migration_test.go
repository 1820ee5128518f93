package goxstreams_test

import (
	"context"
	"fmt"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/gochannel"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// besideRedisstream is the first configuration of a consumer that joins consumers of
// watermill-redisstream in their group.
func besideRedisstream(client redis.UniversalClient) goxstreams.SubscriberConfig {
	return goxstreams.SubscriberConfig{
		Client:        client,
		ConsumerGroup: "billing",
		ClaimMinIdle:  60 * time.Second, // not below the old MaxIdleTime
	}
}

// besideGoxstreams is the configuration of a consumer that joins consumers of
// goxstreams in their group.
func besideGoxstreams(client redis.UniversalClient) goxstreams.ConsumerConfig {
	return goxstreams.ConsumerConfig{
		Topic: "orders",
		Subscriber: goxstreams.SubscriberConfig{
			Client:         client,
			ConsumerGroup:  "billing", // no Consumer: the generated name differs from the old one
			Unmarshaler:    goxstreams.BodyMarshaler{},
			MaxConcurrency: 20,
			ClaimMinIdle:   60 * time.Second, // the old FailIdle
			Retry:          &goxstreams.Retry{MaxRetries: 3, InitialInterval: time.Second},
		},
	}
}

// Consumers of this library read a stream that goxstreams writes.
func Example_fromGoxstreams() {
	client, stop := exampleClient()
	defer stop()
	must(client.XAdd(context.Background(), &redis.XAddArgs{Stream: "orders", Values: []string{"body", `{"Article":"kettle","Quantity":1}`}}).Err())

	shop := Shop{make(chan struct{}, 1)}
	consumer, err := goxstreams.NewConsumer(shop, besideGoxstreams(client), nil)
	must(err)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-shop.done
		cancel()
	}()
	must(consumer.Run(ctx))
	// Output: shipped: 1 x kettle
}

// Consumers of this library read a stream that watermill-redisstream writes.
func Example_fromRedisstream() {
	client, stop := exampleClient()
	defer stop()
	must(client.XAdd(context.Background(), &redis.XAddArgs{Stream: "orders", Values: []string{
		"_watermill_message_uuid", "4711", "metadata", "\x80", "payload", "1 kettle",
	}}).Err())

	sub, err := goxstreams.NewSubscriber(besideRedisstream(client), nil)
	must(err)
	defer sub.Close()
	messages, err := sub.Subscribe(context.Background(), "orders")
	must(err)
	msg := <-messages
	fmt.Printf("%s: %s\n", msg.UUID, msg.Payload)
	msg.Ack()
	// Output: 4711: 1 kettle
}

// A router whose handler reads the old backend and Redis, and a bridge that moves
// what is left on the old one. GoChannel stands for the old backend.
func Example_fromAnotherBackend() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	old := gochannel.NewGoChannel(gochannel.Config{}, logger)
	newSubscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: client, ConsumerGroup: "billing", Retry: &goxstreams.Retry{InitialInterval: time.Second, Multiplier: 1},
	}, logger)
	must(err)
	newPublisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
	must(err)

	handled := make(chan string, 2)
	handle := func(msg *message.Message) error {
		handled <- string(msg.Payload)
		return nil
	}
	run := func(oldSubscriber message.Subscriber) func() {
		router, err := message.NewRouter(message.RouterConfig{}, logger)
		must(err)
		router.AddConsumerHandler("billing", "orders", oldSubscriber, handle)
		router.AddConsumerHandler("billing on Redis", "orders", newSubscriber, handle)
		stop := exampleRun(router)
		<-router.Running()
		return stop
	}
	stopBoth := run(old)
	must(old.Publish("orders", message.NewMessage("1", []byte("on the old one"))))
	fmt.Println(<-handled)
	must(newPublisher.Publish("orders", message.NewMessage("2", []byte("on Redis"))))
	fmt.Println(<-handled)
	stopBoth()

	oldSubscriber := gochannel.NewGoChannel(gochannel.Config{}, logger)
	bridge, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	bridge.AddHandler("bridge", "orders", oldSubscriber, "orders", newPublisher, message.PassthroughHandler)
	defer exampleRun(bridge)()
	<-bridge.Running()
	must(oldSubscriber.Publish("orders", message.NewMessage("3", []byte("bridged"))))
	for client.XLen(context.Background(), "orders").Val() < 2 {
		time.Sleep(time.Millisecond)
	}
	fmt.Println("bridged")
	// Output:
	// on the old one
	// on Redis
	// bridged
}
