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

var errInvalidOrder = errors.New("the quantity is negative")

// The usual set of middlewares: a retry policy, errors that no retry can fix, and
// Watermill's Recoverer.
func Example_middlewares() {
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

	router.AddMiddleware(
		goxstreams.Retry{MaxRetries: 5, InitialInterval: time.Second, MaxInterval: time.Minute}.Middleware,
		goxstreams.DeadLetter{ShouldDeadLetter: func(err error) bool { return errors.Is(err, errInvalidOrder) }}.Middleware,
		middleware.Recoverer, // Watermill's
	)

	router.AddConsumerHandler("bill", "orders", sub, func(*message.Message) error {
		return fmt.Errorf("line 1: %w", errInvalidOrder)
	})
	defer exampleRun(router)()
	examplePublish(client, "orders", "-1 kettle")
	d := <-dead
	fmt.Println(d.Kind, d.Reason)
	// Output: filtered line 1: the quantity is negative
}
