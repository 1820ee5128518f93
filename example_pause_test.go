package goxstreams_test

import (
	"context"
	"fmt"

	"github.com/ThreeDotsLabs/watermill"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// A group is paused, in all processes, and resumed.
func ExamplePause() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, watermill.NopLogger{})
	must(err)
	defer func() { must(subscriber.Close()) }()
	_, err = subscriber.Subscribe(ctx, "orders")
	must(err)

	must(goxstreams.Pause(ctx, client, "orders", "billing"))
	paused, err := goxstreams.Paused(ctx, client, "orders")
	must(err)
	fmt.Println("paused:", !paused["billing"].IsZero())
	must(goxstreams.Resume(ctx, client, "orders", "billing"))

	stats, err := subscriber.TopicStats(ctx, "orders")
	must(err)
	fmt.Println("paused:", !stats.PausedSince.IsZero())
	// Output:
	// paused: true
	// paused: false
}
