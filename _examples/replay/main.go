// The replay example: a bug lets orders die, it is fixed, and those that died
// of it are replayed. What died of something else is deleted.
//
// It runs on an embedded Redis, or on the one at REDIS_ADDR. What to copy comes
// first: replay. The rest is a shop with a bug.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// replay goes through the dead letters, oldest first, and says after each one
// how far it is. It stops at the first error, and can be started again: what it
// has replayed or deleted is not there any more.
func replay(ctx context.Context, queue *goxstreams.DeadLetterQueue, wanted func(goxstreams.DeadMessage) bool) error {
	total, err := queue.Count(ctx)
	if err != nil {
		return err
	}
	done := 0
	for dead, err := range queue.All(ctx, "") { // a page of them in memory
		if err != nil {
			return err
		}
		what, act := "delete", queue.Delete
		if wanted(dead) {
			what, act = "replay", queue.Replay
		}
		if _, err := act(ctx, dead.ID); err != nil {
			return err
		}
		done++
		payload := fmt.Sprintf("fields %q", dead.Fields)
		if dead.Message != nil { // nil: a broken entry
			payload = string(dead.Message.Payload)
		}
		fmt.Printf("  %d/%d %s: %s, %s: %s\n", done, total, what, payload, dead.Kind, dead.Reason)
	}
	return nil
}

type Order struct {
	Number   int
	Currency string
}

var orders = []Order{{1, "EUR"}, {2, "CHF"}, {3, "EUR"}, {4, "CHF"}, {5, "ZZZ"}, {6, "CHF"}}

var (
	errCurrency = errors.New("unknown currency")
	old         = map[string]bool{"EUR": true}              // the bug: one is missing
	fixed       = map[string]bool{"EUR": true, "CHF": true} // without it
)

// handle runs a router until all that is in the topic is handled or dead, and
// returns the numbers of the orders that were handled.
func handle(ctx context.Context, client *redis.Client, topic string, currencies map[string]bool) ([]int, error) {
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: group}, nil)
	if err != nil {
		return nil, err
	}
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	router.AddMiddleware(goxstreams.Retry{MaxRetries: 1, InitialInterval: 50 * time.Millisecond}.Middleware)
	var handled []int // one message at a time: see MaxConcurrency
	router.AddConsumerHandler("pay", topic, subscriber, func(msg *message.Message) error {
		var order Order
		if err := json.Unmarshal(msg.Payload, &order); err != nil {
			return goxstreams.Permanent(err)
		}
		delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
		if !currencies[order.Currency] {
			fmt.Printf("  order %d, delivery %d: %v %s\n", order.Number, delivery.Count, errCurrency, order.Currency)
			return fmt.Errorf("%w %s", errCurrency, order.Currency)
		}
		fmt.Printf("  order %d, delivery %d: paid in %s\n", order.Number, delivery.Count, order.Currency)
		handled = append(handled, order.Number)
		return nil
	})
	ended := make(chan error, 1)
	go func() { ended <- router.Run(ctx) }()
	err = until(ctx, func() bool { return settled(ctx, client, topic) })
	err = errors.Join(err, router.Close(), <-ended)
	return handled, err
}

const group = "payments"

// settled reports whether the group has read all of the topic, and has nothing pending.
func settled(ctx context.Context, client *redis.Client, topic string) bool {
	newest, err := client.XRevRangeN(ctx, topic, "+", "-", 1).Result()
	if err != nil || len(newest) == 0 {
		return false
	}
	groups, err := client.XInfoGroups(ctx, topic).Result()
	return err == nil && len(groups) == 1 && groups[0].LastDeliveredID == newest[0].ID && groups[0].Pending == 0
}

func run(ctx context.Context, client *redis.Client) error {
	topic := "orders-" + watermill.NewShortUUID()
	dead := goxstreams.DeadLetterTopic(topic)
	defer client.Del(context.WithoutCancel(ctx), topic, dead)
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	producer := goxstreams.NewProducer[Order](publisher, goxstreams.ProducerConfig{})
	if err := producer.ProduceBatch(ctx, orders, topic); err != nil {
		return err
	}

	fmt.Println("1. The shop, with a bug.")
	before, err := handle(ctx, client, topic, old)
	if err != nil {
		return err
	}

	fmt.Println("2. The bug is fixed. What died of it is replayed, the rest is deleted.")
	queue, err := goxstreams.NewDeadLetterQueue(client, dead)
	if err != nil {
		return err
	}
	err = replay(ctx, queue, func(d goxstreams.DeadMessage) bool {
		var order Order
		return d.Group == group && d.Message != nil && json.Unmarshal(d.Message.Payload, &order) == nil && fixed[order.Currency]
	})
	if err != nil {
		return err
	}

	fmt.Println("3. The shop again. A replayed order is counted anew.")
	after, err := handle(ctx, client, topic, fixed)
	if err != nil {
		return err
	}
	left, err := queue.Count(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("Paid before: %v, after the replay: %v; dead letters left: %d\n", before, after, left)
	if fmt.Sprint(before, after, left) != "[1 3] [2 4 6] 0" {
		return errors.New("that is not what should be")
	}
	return nil
}

// until waits until done returns true.
func until(ctx context.Context, done func() bool) error {
	for !done() {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := start(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "replay:", err)
		os.Exit(1)
	}
}

func start(ctx context.Context) error {
	addr := os.Getenv("REDIS_ADDR")
	if addr == "" {
		server, err := miniredis.Run()
		if err != nil {
			return err
		}
		defer server.Close()
		addr = server.Addr()
		fmt.Fprintln(os.Stderr, "On an embedded Redis; REDIS_ADDR=host:port names a real one.")
	}
	client := redis.NewClient(&redis.Options{Addr: addr})
	defer client.Close() // the library leaves that to you
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return run(ctx, client)
}
