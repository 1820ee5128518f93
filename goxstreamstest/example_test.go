package goxstreamstest_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/goxstreamstest"
)

// What is tested here: a handler, and a Worker.

var (
	errNoAccount = errors.New("there is no such account")
	errHoliday   = errors.New("the bank is closed today")
)

// till bills orders.
type till struct {
	bank func(ctx context.Context, order []byte) error
}

func (t till) bill(msg *message.Message) error {
	err := t.bank(msg.Context(), msg.Payload)
	switch {
	case errors.Is(err, errNoAccount):
		return goxstreams.Permanent(err)
	case errors.Is(err, errHoliday):
		return goxstreams.Snooze(err, 24*time.Hour)
	}
	return err
}

type Parcel struct {
	Article  string
	Quantity int
}

// Post is a Worker.
type Post struct{}

func (Post) Process(_ context.Context, msg goxstreams.Message[Parcel]) error {
	if msg.Body.Quantity < 0 {
		return goxstreams.Permanent(errors.New("the quantity is negative"))
	}
	return nil
}

func (Post) ProcessBroken(context.Context, goxstreams.BrokenMessage) error { return nil }

func (Post) ProcessDead(context.Context, goxstreams.Message[Parcel]) error {
	return goxstreams.ErrDead
}

func TestExample_Handler(t *testing.T) {
	var answer error // the bank's
	bill := goxstreamstest.ConsumerHandler(
		till{bank: func(context.Context, []byte) error { return answer }}.bill,
		goxstreams.SubscriberConfig{},
		goxstreams.Retry{MaxRetries: 5, InitialInterval: time.Second}.Middleware, // as in your router
	)
	order := message.NewMessage("4711", []byte("1 kettle"))
	bill.Deliver(t, goxstreamstest.Delivery{Message: order}).RequireAcked(t)

	answer = errors.New("the bank does not answer")
	bill.Deliver(t, goxstreamstest.Delivery{Message: order}).RequireRetried(t, time.Second)
	bill.Deliver(t, goxstreamstest.Delivery{Message: order, Count: 3}).RequireRetried(t, 4*time.Second)
	bill.Deliver(t, goxstreamstest.Delivery{Message: order, Count: 6}).RequireDead(t, goxstreams.Exhausted, "does not answer")

	answer = errHoliday
	bill.Deliver(t, goxstreamstest.Delivery{Message: order, Count: 6}).RequireSnoozed(t, 24*time.Hour)
	answer = errNoAccount
	bill.Deliver(t, goxstreamstest.Delivery{Message: order}).RequireDead(t, goxstreams.PermanentFailure, "no such account")
}

func TestExample_Worker(t *testing.T) {
	post := goxstreamstest.Worker(Post{}, goxstreams.ConsumerConfig{
		Subscriber: goxstreams.SubscriberConfig{Retry: &goxstreams.Retry{MaxRetries: 5}},
	})
	post.Deliver(t, goxstreamstest.Delivery{Event: Parcel{"kettle", 1}}).RequireAcked(t)
	post.Deliver(t, goxstreamstest.Delivery{Event: Parcel{"kettle", -1}}).RequireDead(t, goxstreams.PermanentFailure, "negative")

	noJSON := message.NewMessage("4711", []byte("1 kettle"))
	post.Deliver(t, goxstreamstest.Delivery{Message: noJSON}).RequireAcked(t) // ProcessBroken drops it
}

// Two deliveries, and the hour between them, take half a second.
func TestExample_VirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := goxstreamstest.NewServer(t).Client()
		subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
			Client: client, ConsumerGroup: "billing",
			Retry: &goxstreams.Retry{InitialInterval: time.Hour, MaxInterval: time.Hour},
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer subscriber.Close()
		messages, err := subscriber.Subscribe(t.Context(), "orders")
		if err != nil {
			t.Fatal(err)
		}
		publish(t, client, []byte("1 kettle"))

		start := time.Now()
		(<-messages).Nack()
		(<-messages).Ack()
		if took := time.Since(start).Round(time.Second); took != time.Hour {
			t.Errorf("acked after %v", took)
		}
	})
}

// exampleT is what a test's t is in an Example, which has none.
type exampleT struct {
	testing.TB
	cleanups []func()
}

func (*exampleT) Helper()            {}
func (e *exampleT) Cleanup(f func()) { e.cleanups = append(e.cleanups, f) }
func (*exampleT) Fatal(args ...any)  { panic(fmt.Sprint(args...)) }

func (e *exampleT) Fatalf(format string, args ...any) { e.Fatal(fmt.Sprintf(format, args...)) }
func (e *exampleT) Errorf(format string, args ...any) { e.Fatal(fmt.Sprintf(format, args...)) }

func (e *exampleT) end() {
	for len(e.cleanups) > 0 {
		last := len(e.cleanups) - 1
		f := e.cleanups[last]
		e.cleanups = e.cleanups[:last]
		f()
	}
}

// The sixth delivery of a message the handler of which fails.
func ExampleConsumerHandler() {
	t := new(exampleT) // a test's t
	defer t.end()
	bill := goxstreamstest.ConsumerHandler(func(msg *message.Message) error {
		delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
		return fmt.Errorf("the bank does not answer, %d times by now", delivery.Count)
	}, goxstreams.SubscriberConfig{}, goxstreams.Retry{MaxRetries: 5, InitialInterval: time.Second}.Middleware)
	order := message.NewMessage("4711", []byte("1 kettle"))

	result := bill.Deliver(t, goxstreamstest.Delivery{Message: order})
	fmt.Println(result)
	result.RequireRetried(t, time.Second)

	result = bill.Deliver(t, goxstreamstest.Delivery{Message: order, Count: 6})
	fmt.Println(result)
	result.RequireDead(t, goxstreams.Exhausted, "the bank does not answer")
	// Output:
	// retried after 1s
	// dead (exhausted): the bank does not answer, 6 times by now
}

// What a handler produces.
func ExampleHandler() {
	t := new(exampleT) // a test's t
	defer t.end()
	bill := goxstreamstest.Handler(func(msg *message.Message) ([]*message.Message, error) {
		return []*message.Message{message.NewMessage(msg.UUID, []byte("a bill for "+string(msg.Payload)))}, nil
	}, goxstreams.SubscriberConfig{})

	result := bill.Deliver(t, goxstreamstest.Delivery{Message: message.NewMessage("4711", []byte("1 kettle"))})
	result.RequireAcked(t)
	fmt.Printf("%s: %s\n", result, result.Produced[0].Payload)
	// Output: acked: a bill for 1 kettle
}

// The methods of a Worker.
func ExampleWorker() {
	t := new(exampleT) // a test's t
	defer t.end()
	post := goxstreamstest.Worker(Post{}, goxstreams.ConsumerConfig{})

	fmt.Println(post.Deliver(t, goxstreamstest.Delivery{Event: Parcel{"kettle", 1}}))
	fmt.Println(post.Deliver(t, goxstreamstest.Delivery{Event: Parcel{"kettle", -1}}))
	fmt.Println(post.Deliver(t, goxstreamstest.Delivery{Fields: []string{"no", "message"}}))
	// Output:
	// acked
	// dead (permanent): the quantity is negative
	// acked
}

// A server for the whole program, which is given the client, or makes one of Addr.
func ExampleNewServer() {
	t := new(exampleT) // a test's t
	defer t.end()
	client := goxstreamstest.NewServer(t).Client()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = publisher.Publish("orders", message.NewMessage("4711", []byte("1 kettle")))
	fmt.Println(client.XLen(context.Background(), "orders").Val(), err)
	// Output: 1 <nil>
}
