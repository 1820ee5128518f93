package goxstreams_test

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// What the consumers of a topic keep in Redis.
func ExampleRetention() {
	client := redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	defer client.Close()
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:        client,
		ConsumerGroup: "billing",
		Retention: goxstreams.Retention{
			KeepLast:   100_000,        // for a look at what happened
			KeepFor:    24 * time.Hour, // to handle a day again, by goxstreams group reset
			HardMaxLen: 20_000_000,     // what fits into Redis
		},
		KeepDeadLetters: 30 * 24 * time.Hour,
	}, nil)
	must(err)
	must(sub.Close())
	// Output:
}

// A cron job for a topic whose consumers do not trim it.
func ExampleTrim() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	for i := range 10 {
		must(client.XAdd(ctx, &redis.XAddArgs{Stream: "events", Values: []any{"payload", i}}).Err())
	}
	result, err := goxstreams.Trim(ctx, client, "events", goxstreams.Retention{KeepFor: 24 * time.Hour})
	must(err)
	fmt.Println(result.Length, "left")
	if result.Pin.ID != "" {
		fmt.Printf("group %s has not acked %s, which is %v old\n", result.Pin.Group, result.Pin.ID, result.Pin.Age)
	}
	// Output: 10 left
}
