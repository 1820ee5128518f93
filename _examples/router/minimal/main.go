// The router of README.md: a Watermill router that drains on SIGTERM.
package main

import (
	"context"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	client := redis.NewClient(&redis.Options{Addr: "localhost:6379"}) // yours: the library never closes it
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		log.Fatal(err)
	}
	order := message.NewMessage(watermill.NewUUID(), []byte(`{"Article": "kettle", "Quantity": 1}`))
	if err := publisher.Publish("orders", order); err != nil { // of several messages it stores all or none
		log.Fatal(err)
	}
	if err := run(ctx, client, bill); err != nil {
		log.Fatal(err)
	}
}

// run handles orders until ctx ends. It returns when the handlers have finished and their acks have reached Redis.
func run(ctx context.Context, client *redis.Client, handler message.NoPublishHandlerFunc) error {
	logger := watermill.NewSlogLogger(nil)
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, logger)
	if err != nil {
		return err
	}
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	if err != nil {
		return err
	}
	router.AddMiddleware(goxstreams.Retry{MaxRetries: 5, InitialInterval: time.Second}.Middleware)
	router.AddConsumerHandler("bill", "orders", subscriber, handler)
	return router.Run(ctx)
}

func bill(msg *message.Message) error {
	delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
	log.Printf("%s, retry count %d: %s", msg.UUID, delivery.RetryCount(), msg.Payload)
	return nil // acked; after an error it is redelivered
}
