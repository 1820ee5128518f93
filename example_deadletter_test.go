package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// exampleDeadLetters dead-letters messages in the group "billing".
func exampleDeadLetters(client *redis.Client, topic string, payloads ...string) {
	dead := make(chan struct{})
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: client, ConsumerGroup: "billing",
		Retry:  &goxstreams.Retry{MaxRetries: -1},
		OnDead: func(context.Context, goxstreams.DeadMessage) { close(dead) },
	}, nil)
	must(err)
	messages, err := sub.Subscribe(context.Background(), topic)
	must(err)
	for _, payload := range payloads {
		dead = make(chan struct{})
		examplePublish(client, topic, payload)
		(<-messages).Nack()
		<-dead
	}
	must(sub.Close())
}

// Inspect dead letters, replay those that can succeed now, and delete the rest.
func ExampleDeadLetterQueue() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	exampleDeadLetters(client, "orders", "1 kettle", "1 unicorn", "2 milk jugs")

	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
	must(err)
	for d, err := range queue.All(ctx, "") {
		must(err)
		if strings.Contains(string(d.Message.Payload), "unicorn") {
			_, err = queue.Delete(ctx, d.ID)
		} else {
			_, err = queue.Replay(ctx, d.ID)
		}
		must(err)
		fmt.Printf("%s: %s, %d replays before\n", d.Message.Payload, d.Kind, d.Replays)
	}
	n, err := queue.Count(ctx)
	fmt.Println(n, "left", err)
	// Output:
	// 1 kettle: exhausted, 0 replays before
	// 1 unicorn: exhausted, 0 replays before
	// 2 milk jugs: exhausted, 0 replays before
	// 0 left <nil>
}

// Continue after the last dead letter that was seen.
func ExampleDeadLetterQueue_All() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
	must(err)
	last := "" // kept in a file, say
	for _, day := range []string{"Monday", "Tuesday"} {
		exampleDeadLetters(client, "orders", day+"'s kettle")
		for d, err := range queue.All(ctx, last) {
			if err != nil {
				fmt.Println(err) // an entry that is not a dead letter, or Redis is unavailable
				continue
			}
			fmt.Printf("%s: %s of group %s, %d delivery\n", day, d.Message.Payload, d.Group, d.Deliveries)
			last = d.ID
		}
	}
	// Output:
	// Monday: Monday's kettle of group billing, 1 delivery
	// Tuesday: Tuesday's kettle of group billing, 1 delivery
}

// A replay is for the group in which the message died; its retry count starts at 0.
func ExampleDeadLetterQueue_Replay() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	exampleDeadLetters(client, "orders", "1 kettle")

	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
	must(err)
	var ids []string
	for d, err := range queue.All(ctx, "") {
		must(err)
		ids = append(ids, d.ID)
	}
	n, err := queue.Replay(ctx, ids...)
	fmt.Println(n, "replayed", err)

	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, nil)
	must(err)
	defer sub.Close()
	messages, err := sub.Subscribe(ctx, "orders")
	must(err)
	msg := <-messages
	d, _ := goxstreams.DeliveryFromContext(msg.Context())
	fmt.Printf("%s, retry count %d\n", msg.Payload, d.RetryCount())
	msg.Ack()
	// Output:
	// 1 replayed <nil>
	// 1 kettle, retry count 0
}

// A replay for every group, whichever the message died in.
func ExampleDeadLetterQueue_ReplayToAll() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	exampleDeadLetters(client, "orders", "1 kettle")
	must(client.XGroupCreate(ctx, "orders", "shipping", "$").Err()) // a group that came later

	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
	must(err)
	for d, err := range queue.All(ctx, "") {
		must(err)
		_, err = queue.ReplayToAll(ctx, d.ID)
		must(err)
	}
	for _, group := range []string{"billing", "shipping"} {
		sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: group}, nil)
		must(err)
		messages, err := sub.Subscribe(ctx, "orders")
		must(err)
		msg := <-messages
		fmt.Printf("%s: %s\n", group, msg.Payload)
		msg.Ack()
		must(sub.Close())
	}
	// Output:
	// billing: 1 kettle
	// shipping: 1 kettle
}

func ExampleDeadLetterQueue_Delete() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	exampleDeadLetters(client, "orders", "1 unicorn", "2 unicorns")

	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
	must(err)
	var ids []string
	for d, err := range queue.All(ctx, "") {
		must(err)
		ids = append(ids, d.ID)
	}
	n, err := queue.Delete(ctx, ids...)
	fmt.Println(n, "deleted", err)
	// Output: 2 deleted <nil>
}

// Dead letters that were replayed or deleted meanwhile are reported; all others are
// replayed.
func ExampleNotFoundError() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	exampleDeadLetters(client, "orders", "1 kettle")
	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
	must(err)
	var ids []string
	for d, err := range queue.All(ctx, "") {
		must(err)
		ids = append(ids, d.ID)
	}

	n, err := queue.Replay(ctx, append(ids, "1700000000000-0")...)
	var missing *goxstreams.NotFoundError
	if errors.As(err, &missing) {
		fmt.Println(n, "replayed, not there any more:", missing.IDs)
	} else {
		must(err)
	}
	// Output: 1 replayed, not there any more: [1700000000000-0]
}

// replaySince replays the messages of the group "billing" that died after an outage
// began, and leaves the other dead letters where they are.
func replaySince(ctx context.Context, client redis.UniversalClient, outage time.Time) error {
	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
	if err != nil {
		return err
	}
	for dead, err := range queue.All(ctx, "") { // holds one page in memory
		if err != nil {
			return err
		}
		if dead.Group != "billing" || dead.DiedAt.Before(outage) {
			continue
		}
		if _, err := queue.Replay(ctx, dead.ID); err != nil { // or Delete
			return err
		}
	}
	return nil
}

// After an outage: replay the messages that died because of it.
func ExampleDeadLetterQueue_outage() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	exampleDeadLetters(client, "orders", "1 unicorn")
	outage := time.Now()
	exampleDeadLetters(client, "orders", "1 kettle")

	must(replaySince(ctx, client, outage))
	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
	must(err)
	for d, err := range queue.All(ctx, "") {
		must(err)
		fmt.Printf("left: %s\n", d.Message.Payload)
	}
	// Output: left: 1 unicorn
}
