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

type Order struct {
	Article  string
	Quantity int
}

// Shop is a Worker: one method for the message, one for the malformed entry, one for
// the dead message.
type Shop struct {
	done chan struct{} // receives once for each message that is settled
}

func (s Shop) Process(ctx context.Context, msg goxstreams.Message[Order]) error {
	if msg.Body.Article == "unicorn" {
		fmt.Println("no unicorns here, retry", msg.RetryCount)
		return errors.New("no such article")
	}
	fmt.Printf("shipped: %d x %s\n", msg.Body.Quantity, msg.Body.Article)
	s.done <- struct{}{}
	return nil // acked; after an error it is redelivered
}

func (s Shop) ProcessBroken(ctx context.Context, broken goxstreams.BrokenMessage) error {
	fmt.Println("broken:", broken.Err)
	s.done <- struct{}{}
	return nil // acked and gone; ErrDead: to the dead-letter stream
}

func (s Shop) ProcessDead(ctx context.Context, dead goxstreams.Message[Order]) error {
	fmt.Println("dead:", dead.Body.Article, "-", dead.Err)
	s.done <- struct{}{}
	return goxstreams.ErrDead // to the dead-letter stream; nil: acked and gone
}

// The whole of the typed layer.
func ExampleWorker() {
	client, stop := exampleClient() // redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	defer stop()
	shop := Shop{make(chan struct{}, 3)}
	consumer, err := goxstreams.NewConsumer(shop, goxstreams.ConsumerConfig{
		Topic: "orders",
		Subscriber: goxstreams.SubscriberConfig{
			Client:        client,
			ConsumerGroup: "shipping",
			Retry:         &goxstreams.Retry{MaxRetries: 1, InitialInterval: 10 * time.Millisecond},
		},
	}, watermill.NopLogger{})
	must(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- consumer.Run(ctx) }()

	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, watermill.NopLogger{})
	must(err)
	producer := goxstreams.NewProducer[Order](publisher, goxstreams.ProducerConfig{})
	must(producer.ProduceBatch(ctx, []Order{{"kettle", 1}, {"unicorn", 1}}, "orders"))
	examplePublish(client, "orders", "no JSON")

	for range 3 {
		<-shop.done
	}
	cancel()
	fmt.Println(<-ended) // after it has drained
	fmt.Println(client.XLen(context.Background(), goxstreams.DeadLetterTopic("orders")).Val(), "in the dead-letter stream")
	// Output:
	// shipped: 1 x kettle
	// no unicorns here, retry 0
	// no unicorns here, retry 1
	// dead: unicorn - no such article
	// broken: goxstreams: broken entry: decode the payload into goxstreams_test.Order: invalid character 'o' in literal null (expecting 'u')
	// <nil>
	// 1 in the dead-letter stream
}

// All events of a batch are stored, in order, or none.
func ExampleNewProducer() {
	client, stop := exampleClient()
	defer stop()
	ctx := context.Background()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	must(err)
	producer := goxstreams.NewProducer[any](publisher, goxstreams.ProducerConfig{})

	fmt.Println(producer.Produce(ctx, Order{"kettle", 1}, "orders"))
	fmt.Println(producer.ProduceBatch(ctx, []any{Order{"cup", 4}, func() {}}, "orders"))
	fmt.Println(client.XLen(ctx, "orders").Val(), "stored")
	// Output:
	// <nil>
	// goxstreams: produce to "orders": encode events[1] of 2: json: unsupported type: func()
	// 1 stored
}

// A Consumer without a router. It drains when the context ends.
func ExampleNewConsumer() {
	client, stop := exampleClient()
	defer stop()
	shop := Shop{make(chan struct{}, 1)}
	consumer, err := goxstreams.NewConsumer(shop, goxstreams.ConsumerConfig{
		Topic: "orders",
		Subscriber: goxstreams.SubscriberConfig{
			Client:         client,
			ConsumerGroup:  "shipping",
			MaxConcurrency: 20,
			Retry:          &goxstreams.Retry{MaxRetries: 3},
		},
	}, nil)
	must(err)
	examplePublish(client, "orders", `{"Article": "kettle", "Quantity": 2}`)

	ctx, cancel := context.WithCancel(context.Background()) // signal.NotifyContext(ctx, syscall.SIGTERM)
	go func() {
		<-shop.done
		cancel()
	}()
	fmt.Println(consumer.Run(ctx))
	// Output:
	// shipped: 2 x kettle
	// <nil>
}

// Consumers in a router, with its middlewares.
func ExampleConsumer_AddTo() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	router.AddMiddleware(middleware.CorrelationID)
	shop := Shop{make(chan struct{}, 2)}
	for _, topic := range []string{"orders", "gifts"} {
		consumer, err := goxstreams.NewConsumer(shop, goxstreams.ConsumerConfig{
			Topic:      topic,
			Subscriber: goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "shipping"},
		}, logger)
		must(err)
		consumer.AddTo(router)
	}

	defer exampleRun(router)()
	examplePublish(client, "orders", `{"Article": "kettle", "Quantity": 1}`)
	<-shop.done
	examplePublish(client, "gifts", `{"Article": "ribbon", "Quantity": 3}`)
	<-shop.done
	// Output:
	// shipped: 1 x kettle
	// shipped: 3 x ribbon
}

// csvCodec encodes an order as a line of text.
type csvCodec struct{}

func (csvCodec) Encode(event any) ([]byte, error) {
	order, ok := event.(Order)
	if !ok {
		return nil, fmt.Errorf("not an order: %T", event)
	}
	return fmt.Appendf(nil, "%d;%s", order.Quantity, order.Article), nil
}

func (csvCodec) Decode(payload []byte, event any) error {
	order, ok := event.(*Order)
	if !ok {
		return fmt.Errorf("not an order: %T", event)
	}
	_, err := fmt.Sscanf(string(payload), "%d;%s", &order.Quantity, &order.Article)
	return err
}

// Payloads need not be JSON.
func ExampleCodec() {
	client, stop := exampleClient()
	defer stop()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	must(err)
	producer := goxstreams.NewProducer[Order](publisher, goxstreams.ProducerConfig{Codec: csvCodec{}})
	shop := Shop{make(chan struct{}, 1)}
	consumer, err := goxstreams.NewConsumer(shop, goxstreams.ConsumerConfig{
		Topic:      "orders",
		Subscriber: goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "shipping"},
		Codec:      csvCodec{},
	}, nil)
	must(err)

	ctx, cancel := context.WithCancel(context.Background())
	must(producer.Produce(ctx, Order{"kettle", 2}, "orders"))
	go func() {
		<-shop.done
		cancel()
	}()
	fmt.Println(consumer.Run(ctx))
	// Output:
	// shipped: 2 x kettle
	// <nil>
}

type traceID struct{}

// A trace passes from the producer's context to the worker's.
func ExampleConsumerConfig_context() {
	client, stop := exampleClient()
	defer stop()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	must(err)
	producer := goxstreams.NewProducer[Order](publisher, goxstreams.ProducerConfig{
		Metadata: func(ctx context.Context) message.Metadata {
			trace, _ := ctx.Value(traceID{}).(string)
			return message.Metadata{"trace_id": trace}
		},
	})
	must(producer.Produce(context.WithValue(context.Background(), traceID{}, "4711"), Order{"kettle", 1}, "orders"))

	ctx, cancel := context.WithCancel(context.Background())
	consumer, err := goxstreams.NewConsumer(tracedShop{cancel: cancel}, goxstreams.ConsumerConfig{
		Topic:      "orders",
		Subscriber: goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "shipping"},
		Context: func(ctx context.Context, metadata message.Metadata) context.Context {
			return context.WithValue(ctx, traceID{}, metadata.Get("trace_id"))
		},
	}, nil)
	must(err)
	must(consumer.Run(ctx))
	// Output: kettle, trace 4711
}

type tracedShop struct {
	Shop
	cancel context.CancelFunc
}

func (s tracedShop) Process(ctx context.Context, msg goxstreams.Message[Order]) error {
	fmt.Printf("%s, trace %v\n", msg.Body.Article, ctx.Value(traceID{}))
	s.cancel()
	return nil
}

// Warehouse is a BatchWorker: it books many orders in one step.
type Warehouse struct {
	Shop
	cancel context.CancelFunc
}

func (w Warehouse) ProcessBatch(ctx context.Context, batch []goxstreams.Message[Order]) []error {
	errs := make([]error, len(batch)) // one for each message; nil: all have succeeded
	booked := 0
	for i, msg := range batch {
		if msg.Body.Quantity < 1 {
			errs[i] = goxstreams.Permanent(errors.New("nothing ordered"))
			continue
		}
		booked += msg.Body.Quantity
	}
	fmt.Printf("%d orders, %d pieces\n", len(batch), booked)
	return errs
}

func (w Warehouse) ProcessDead(ctx context.Context, dead goxstreams.Message[Order]) error {
	fmt.Println("dead:", dead.Body.Article, "-", dead.Err)
	w.cancel()
	return nil
}

// A BatchWorker handles up to MaxSize messages in one call. Each is settled by its own error.
func ExampleNewBatchConsumer() {
	client, stop := exampleClient()
	defer stop()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	must(err)
	producer := goxstreams.NewProducer[Order](publisher, goxstreams.ProducerConfig{})
	ctx, cancel := context.WithCancel(context.Background())
	must(producer.ProduceBatch(ctx, []Order{{"kettle", 1}, {"cup", 4}, {"unicorn", 0}}, "orders"))

	consumer, err := goxstreams.NewBatchConsumer(Warehouse{cancel: cancel}, goxstreams.BatchConsumerConfig{
		Topic:      "orders",
		Subscriber: goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "warehouse"},
		MaxSize:    3,           // messages in a call
		MaxWait:    time.Minute, // until it has so many
	}, nil)
	must(err)
	fmt.Println(consumer.Run(ctx))
	// Output:
	// 3 orders, 5 pieces
	// dead: unicorn - nothing ordered
	// <nil>
}
