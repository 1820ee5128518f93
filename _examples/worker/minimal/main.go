// The worker of README.md: it needs no router, and drains on SIGTERM.
package main

import (
	"context"
	"errors"
	"log"
	"os"
	"os/signal"
	"syscall"

	"github.com/ThreeDotsLabs/watermill"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
)

type Order struct {
	Article  string
	Quantity int
}

type shop struct{}

// Process handles a message. After an error it is redelivered.
func (shop) Process(ctx context.Context, msg goxstreams.Message[Order]) error {
	if msg.Body.Quantity < 0 {
		return goxstreams.Permanent(errors.New("the quantity is negative"))
	}
	log.Printf("%s, retry count %d: %d x %s", msg.ID, msg.RetryCount, msg.Body.Quantity, msg.Body.Article)
	return nil
}

// ProcessBroken handles an entry that does not decode into an Order.
func (shop) ProcessBroken(ctx context.Context, broken goxstreams.BrokenMessage) error {
	log.Print(broken.ID, ": ", broken.Err)
	return goxstreams.ErrDead // to the dead-letter stream; nil: drop it; any other error: redeliver it
}

// ProcessDead handles a message that is out of retries, or whose error is Permanent.
func (shop) ProcessDead(ctx context.Context, dead goxstreams.Message[Order]) error {
	log.Print(dead.ID, ": ", dead.Err)
	return goxstreams.ErrDead // as for ProcessBroken
}

// consume handles orders until ctx ends, and returns when it has drained.
func consume(ctx context.Context, client *redis.Client) error {
	consumer, err := goxstreams.NewConsumer(shop{}, goxstreams.ConsumerConfig{
		Topic: "orders",
		Subscriber: goxstreams.SubscriberConfig{
			Client: client, ConsumerGroup: "shipping", MaxConcurrency: 20, Retry: &goxstreams.Retry{MaxRetries: 5},
		},
	}, watermill.NewSlogLogger(nil))
	if err != nil {
		return err
	}
	return consumer.Run(ctx) // or consumer.AddTo(router)
}

// produce publishes all of the orders, or none.
func produce(ctx context.Context, client *redis.Client, orders ...Order) error {
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	return goxstreams.NewProducer[Order](publisher, goxstreams.ProducerConfig{}).ProduceBatch(ctx, orders, "orders")
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	client := redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	if err := produce(ctx, client, Order{"kettle", 1}, Order{"milk jug", -1}); err != nil {
		log.Fatal(err)
	}
	if err := consume(ctx, client); err != nil {
		log.Fatal(err)
	}
}
