// The router example: a Watermill router makes invoices of orders. Of six
// orders and an entry that is no message, each goes another way: it succeeds,
// comes again, waits, or dies. At the end each is an invoice or a dead letter.
//
// It runs on an embedded Redis, or on the one at REDIS_ADDR. What to copy comes
// first: newRouter and makeInvoice. The rest publishes, and looks at the end.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// errInvalid is for orders that no retry makes valid.
var errInvalid = errors.New("the quantity is negative")

func newRouter(client *redis.Client, orders, invoices string) (*message.Router, error) {
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return nil, err
	}
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, nil)
	if err != nil {
		return nil, err
	}
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	router.AddMiddleware(
		report,
		goxstreams.Retry{MaxRetries: 2, InitialInterval: 50 * time.Millisecond}.Middleware,
		goxstreams.DeadLetter{ShouldDeadLetter: func(err error) bool { return errors.Is(err, errInvalid) }}.Middleware,
		middleware.Recoverer,
	)
	router.AddHandler("invoice", orders, subscriber, invoices, publisher, makeInvoice)
	return router, nil
}

// makeInvoice is the handler. What it returns is published, and then the order
// is acked; its error says what becomes of the order.
func makeInvoice(order *message.Message) ([]*message.Message, error) {
	delivery, _ := goxstreams.DeliveryFromContext(order.Context())
	switch {
	case order.UUID == "flaky" && delivery.RetryCount() < 2:
		return nil, errors.New("the tax service does not answer")
	case order.UUID == "panicking" && delivery.RetryCount() == 0:
		panic("a bug")
	case order.UUID == "early" && !office.Swap(true): // it opens meanwhile
		return nil, goxstreams.Snooze(errors.New("the office is closed"), 200*time.Millisecond)
	case order.UUID == "hopeless":
		return nil, errors.New("the customer has no address")
	case order.UUID == "unknown":
		return nil, goxstreams.Permanent(errors.New("no such customer"))
	case order.UUID == "invalid":
		return nil, fmt.Errorf("line 1: %w", errInvalid)
	}
	return []*message.Message{message.NewMessage(order.UUID, []byte("invoice for "+order.UUID))}, nil
}

var office atomic.Bool // whether it is open

// report prints what became of each delivery. As the outermost middleware it
// sees the errors that the others pass up.
func report(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
		produced, err := h(msg)
		outcome := "ok"
		if err != nil {
			outcome, _, _ = strings.Cut(err.Error(), ", stacktrace")
			if goxstreams.IsDead(err) {
				outcome += " -> dead"
			}
		}
		fmt.Printf("%-10s delivery %d: %s\n", msg.UUID, delivery.Count, outcome)
		return produced, err
	}
}

// fates is what shall become of the orders, by their UUIDs.
var fates = map[string]string{
	"fine": "invoice", "flaky": "invoice", "panicking": "invoice", "early": "invoice",
	"hopeless": "exhausted", "unknown": "permanent", "invalid": "filtered", "no message": "broken",
}

func run(ctx context.Context, client *redis.Client) error {
	orders := "orders-" + watermill.NewShortUUID()
	invoices, dead := orders+"-invoices", goxstreams.DeadLetterTopic(orders)
	defer client.Del(context.WithoutCancel(ctx), orders, invoices, dead)

	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	var messages []*message.Message
	for _, uuid := range []string{"fine", "flaky", "panicking", "hopeless", "unknown", "invalid", "early"} {
		messages = append(messages, message.NewMessage(uuid, nil))
	}
	if err := publisher.Publish(orders, messages...); err != nil {
		return err
	}
	if err := client.XAdd(ctx, &redis.XAddArgs{Stream: orders, Values: []string{"by", "hand"}}).Err(); err != nil {
		return err
	}

	router, err := newRouter(client, orders, invoices)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- router.Run(ctx) }()
	for ctx.Err() == nil && client.XLen(ctx, invoices).Val()+client.XLen(ctx, dead).Val() < int64(len(fates)) {
		time.Sleep(10 * time.Millisecond)
	}
	if err := errors.Join(router.Close(), <-ended, ctx.Err()); err != nil {
		return err
	}

	got := map[string]string{}
	fmt.Println("\nInvoices:")
	entries, err := client.XRange(ctx, invoices, "-", "+").Result()
	if err != nil {
		return err
	}
	for _, entry := range entries {
		msg, err := goxstreams.DefaultMarshaler{}.Unmarshal(entry.Values)
		if err != nil {
			return err
		}
		got[msg.UUID] = "invoice"
		fmt.Printf("  %s\n", msg.Payload)
	}
	fmt.Println("Dead letters:")
	queue, err := goxstreams.NewDeadLetterQueue(client, dead)
	if err != nil {
		return err
	}
	var lines []string
	for letter, err := range queue.All(ctx, "") {
		if err != nil {
			return err
		}
		name, what := "no message", fmt.Sprintf("fields %q", letter.Fields)
		if letter.Kind != goxstreams.Broken {
			name, what = letter.Message.UUID, letter.Reason
		}
		got[name] = letter.Kind.String()
		lines = append(lines, fmt.Sprintf("  %s: %s, deliveries: %d, %s", name, letter.Kind, letter.Deliveries, what))
	}
	slices.Sort(lines) // when a broken entry is moved is not in the order of the others
	fmt.Println(strings.Join(lines, "\n"))
	if fmt.Sprint(got) != fmt.Sprint(fates) {
		return fmt.Errorf("the end is %v, and not %v", got, fates)
	}
	return nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := start(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "router:", err)
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
