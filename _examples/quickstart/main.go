// The quickstart ships orders, and things go wrong on the way: a worker process
// is killed, a payment fails twice, an order cannot be shipped at all, and one
// entry of the stream is no message. Nothing is lost.
//
// It runs on an embedded Redis, or on the one at REDIS_ADDR. What to copy comes
// first: consume, ship, publish. The rest makes things go wrong.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

type Order struct {
	ID, Article string
	Quantity    int
}

var orders = []Order{
	{"1001", "espresso cup", 4},
	{"1002", "kettle", 1},         // its worker is killed
	{"1003", "coffee grinder", 1}, // its payment fails twice
	{"1004", "filter paper", 3},
	{"1005", "unicorn", 1}, // it cannot be shipped
	{"1006", "milk jug", 2},
}

const group = "shipping"

// worker is one process that ships orders.
type worker struct {
	name   string
	client *redis.Client
	topic  string
	book   string // a hash: what became of each order; it stands for the shop's database
}

// consume runs a Watermill router over the topic until stop is called.
func (w *worker) consume(ctx context.Context) (stop func() error, err error) {
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:        w.client,
		ConsumerGroup: group,
		Consumer:      w.name, // how its name in the group begins
		Retry:         &goxstreams.Retry{MaxRetries: 3, InitialInterval: 100 * time.Millisecond},

		// So short that the example ends soon. In production leave it at the
		// default, a minute: a worker that is cut off from Redis for longer than
		// this loses its messages to others, and they are handled twice.
		ClaimMinIdle:  time.Second,
		ClaimInterval: 250 * time.Millisecond,

		OnDead: func(_ context.Context, dead goxstreams.DeadMessage) {
			fmt.Printf("   %s: entry %s is dead (%s), moved to the dead-letter stream\n", w.name, dead.EntryID, dead.Kind)
		},
	}, nil) // a logger would tell more
	if err != nil {
		return nil, err
	}
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	router.AddConsumerHandler("ship", w.topic, subscriber, w.ship)

	ended := make(chan error, 1)
	go func() { ended <- router.Run(ctx) }()
	return func() error {
		for _, s := range subscriber.Stats() {
			fmt.Printf("   %s: delivered %d, acked %d, nacked %d, taken over %d, broken %d, dead %d\n",
				w.name, s.Delivered, s.Acked, s.Nacked, s.Claimed, s.Broken, s.Dead)
		}
		return errors.Join(router.Close(), <-ended)
	}, nil
}

// ship is the handler. Its nil acks the message; after an error it comes again.
func (w *worker) ship(msg *message.Message) error {
	var order Order
	if err := json.Unmarshal(msg.Payload, &order); err != nil {
		return err
	}
	ctx := msg.Context()
	delivery, _ := goxstreams.DeliveryFromContext(ctx)
	say := func(what string) {
		fmt.Printf("   %s: order %s, delivery %d (retry count %d): %s\n",
			w.name, order.ID, delivery.Count, delivery.RetryCount(), what)
	}

	before := w.client.HGet(ctx, w.book, order.ID).Val()
	switch {
	case order.ID == "1002" && before == "":
		say("packing ..")
		w.client.HSet(ctx, w.book, order.ID, "in the hands of "+w.name)
		<-ctx.Done() // the process is killed here
		return ctx.Err()
	case order.ID == "1003" && delivery.RetryCount() < 2:
		say("failed: the payment service does not answer")
		return errors.New("the payment service does not answer")
	case order.Article == "unicorn":
		say("failed: no such article")
		return errors.New("no such article")
	}

	// A message can come more than once: writing this twice does no harm.
	if err := w.client.HSet(ctx, w.book, order.ID, "shipped by "+w.name).Err(); err != nil {
		return err
	}
	what := fmt.Sprintf("shipped, %d x %s", order.Quantity, order.Article)
	if before != "" {
		what += "; taken over, it was " + before
	}
	say(what)
	return nil
}

func (w *worker) publish(orders ...Order) error {
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: w.client}, nil)
	if err != nil {
		return err
	}
	var msgs []*message.Message
	for _, order := range orders {
		payload, err := json.Marshal(order)
		if err != nil {
			return err
		}
		msgs = append(msgs, message.NewMessage(watermill.NewUUID(), payload))
	}
	return publisher.Publish(w.topic, msgs...) // all of them, or none
}

// crash lets another process take an order, and kills it in mid-work.
func (w *worker) crash(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	child := exec.Command(self)
	child.Env = append(os.Environ(), "QUICKSTART_TOPIC="+w.topic, "REDIS_ADDR="+w.client.Options().Addr)
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	if err := child.Start(); err != nil {
		return err
	}
	var pending []redis.XPendingExt
	err = until(ctx, func() bool { // it has acked 1001, and has 1002 in hand
		pending = w.client.XPendingExt(ctx, &redis.XPendingExtArgs{Stream: w.topic, Group: group, Start: "-", End: "+", Count: 10}).Val()
		return len(pending) == 1 && w.client.HExists(ctx, w.book, "1002").Val()
	})
	_ = child.Process.Kill()
	_ = child.Wait()
	if err != nil {
		return fmt.Errorf("waiting for worker-1: %w", err)
	}
	// What Redis sends to worker-1 before it notices would be a delivery that
	// nobody sees. No harm, but it would make the output hard to follow.
	time.Sleep(100 * time.Millisecond)
	fmt.Printf("   worker-1 is killed. What Redis knows: entry %s is pending, consumer %s, deliveries: %d\n",
		pending[0].ID, pending[0].Consumer, pending[0].RetryCount)
	return nil
}

// readDeadLetters prints the dead-letter stream, and returns what is in it: the
// IDs of orders, and of an entry that is none.
func (w *worker) readDeadLetters(ctx context.Context, topic string) (map[string]bool, error) {
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:  w.client,
		StartID: "0", // without a group: read all, change nothing
	}, nil)
	if err != nil {
		return nil, err
	}
	defer subscriber.Close()
	messages, err := subscriber.Subscribe(ctx, topic)
	if err != nil {
		return nil, err
	}
	dead := make(map[string]bool)
	for range w.client.XLen(ctx, topic).Val() {
		msg, ok := <-messages
		if !ok {
			return nil, fmt.Errorf("reading %s: %w", topic, context.Cause(ctx))
		}
		var order Order
		what := "message " + string(msg.Payload)
		if msg.Metadata.Get(goxstreams.DeadKindKey) == string(goxstreams.Broken) {
			fields, err := goxstreams.UnpackFields(msg.Payload)
			if err != nil {
				return nil, err
			}
			order.ID = msg.Metadata.Get(goxstreams.DeadEntryIDKey)
			what = fmt.Sprintf("entry %s, fields %q", order.ID, fields)
		} else if err := json.Unmarshal(msg.Payload, &order); err != nil {
			return nil, err
		}
		dead[order.ID] = true
		fmt.Printf("   %s\n      %s, deliveries: %s, reason: %s\n", what, msg.Metadata.Get(goxstreams.DeadKindKey),
			msg.Metadata.Get(goxstreams.DeadDeliveriesKey), msg.Metadata.Get(middleware.ReasonForPoisonedKey))
		msg.Ack()
	}
	return dead, nil
}

func run(ctx context.Context, client *redis.Client) error {
	topic := "orders-" + watermill.NewShortUUID()[:8]
	w := &worker{"worker-2", client, topic, topic + "-book"}
	deadLetters := goxstreams.DeadLetterTopic(topic)
	defer client.Del(context.WithoutCancel(ctx), topic, w.book, deadLetters)

	fmt.Println("\n1. Two orders are published. worker-1, a process of its own, is killed in mid-work.")
	if err := w.publish(orders[:2]...); err != nil {
		return err
	}
	if err := w.crash(ctx); err != nil {
		return err
	}

	fmt.Println("\n2. Four more orders, and an entry that is no message. worker-2 takes over what worker-1 had.")
	if err := w.publish(orders[2:4]...); err != nil {
		return err
	}
	broken, err := client.XAdd(ctx, &redis.XAddArgs{Stream: topic, Values: []string{"order", "1099", "note", "by hand"}}).Result()
	if err != nil {
		return err
	}
	if err := w.publish(orders[4:]...); err != nil {
		return err
	}
	stop, err := w.consume(ctx)
	if err != nil {
		return err
	}
	_ = until(ctx, func() bool { // if that takes too long, the account tells what is missing
		shipped := 0
		for _, fate := range client.HVals(ctx, w.book).Val() {
			if strings.HasPrefix(fate, "shipped") {
				shipped++
			}
		}
		return shipped+int(client.XLen(ctx, deadLetters).Val()) == len(orders)+1
	})
	if err := stop(); err != nil {
		return err
	}

	fmt.Printf("\n3. The dead-letter stream, %s, read like any topic.\n", deadLetters)
	dead, err := w.readDeadLetters(ctx, deadLetters)
	if err != nil {
		return err
	}

	fmt.Println("\n4. The account.")
	lost := 0
	for _, id := range []string{"1001", "1002", "1003", "1004", "1005", "1006", broken} {
		fate := client.HGet(ctx, w.book, id).Val()
		if dead[id] {
			fate = "in the dead-letter stream"
		} else if !strings.HasPrefix(fate, "shipped") {
			fate = "LOST"
			lost++
		}
		fmt.Printf("   %s: %s\n", id, fate)
	}
	pending, err := client.XPending(ctx, topic, group).Result()
	if err != nil {
		return err
	}
	fmt.Printf("   pending: %d\n", pending.Count)
	if lost > 0 || pending.Count > 0 {
		return errors.New("not every message is accounted for")
	}
	return nil
}

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, 9*time.Second)
	defer cancel()
	if err := start(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
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
		fmt.Println("On an embedded Redis; REDIS_ADDR=host:port names a real one.")
	}
	client := redis.NewClient(&redis.Options{Addr: addr})
	defer client.Close() // the library leaves that to you

	topic := os.Getenv("QUICKSTART_TOPIC")
	if topic == "" {
		return run(ctx, client)
	}
	// The child that crash starts.
	child := &worker{"worker-1", client, topic, topic + "-book"}
	stop, err := child.consume(ctx)
	if err != nil {
		return err
	}
	<-ctx.Done()
	return stop()
}

// until waits until done returns true, for 5 seconds at most.
func until(ctx context.Context, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for !done() {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
