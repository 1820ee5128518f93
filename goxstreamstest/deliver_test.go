package goxstreamstest_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/goxstreamstest"
)

var errDown = errors.New("the bank does not answer")

var policy = goxstreams.Retry{MaxRetries: 3, InitialInterval: time.Hour, MaxInterval: 24 * time.Hour}

// failing returns a handler that fails with the error, and acks without one.
func failing(err error) message.NoPublishHandlerFunc {
	return func(*message.Message) error { return err }
}

// TestDeliver_Outcomes: every outcome, with a policy in the config and in a middleware, and
// none of the delays is waited for.
func TestDeliver_Outcomes(t *testing.T) {
	t.Parallel()
	inConfig := func(err error) *goxstreamstest.Receiver {
		return goxstreamstest.ConsumerHandler(failing(err), goxstreams.SubscriberConfig{Retry: &policy})
	}
	inRouter := func(err error) *goxstreamstest.Receiver {
		return goxstreamstest.ConsumerHandler(failing(err), goxstreams.SubscriberConfig{}, policy.Middleware)
	}
	for _, tt := range []struct {
		name     string
		receiver *goxstreamstest.Receiver
		count    int64
		require  func(*goxstreamstest.Result, testing.TB)
	}{
		{"acked", inConfig(nil), 1, (*goxstreamstest.Result).RequireAcked},
		{"acked at last", inRouter(nil), 4, (*goxstreamstest.Result).RequireAcked},
		{"first retry", inRouter(errDown), 1, retried(time.Hour)},
		{"first retry, by the config", inConfig(errDown), 1, retried(time.Hour)},
		{"third retry", inRouter(errDown), 3, retried(4 * time.Hour)},
		{"third retry, by the config", inConfig(errDown), 3, retried(4 * time.Hour)},
		{"out of retries", inRouter(errDown), 4, dead(goxstreams.Exhausted, "the bank")},
		{"out of retries, by the config", inConfig(errDown), 4, dead(goxstreams.Exhausted, "retries exhausted")},
		{"crashed too often", inConfig(nil), 6, dead(goxstreams.Exhausted, "retries exhausted")},
		{"RetryAfter", inRouter(goxstreams.RetryAfter(errDown, time.Minute)), 2, retried(time.Minute)},
		{"RetryAfter 0", inRouter(goxstreams.RetryAfter(errDown, 0)), 1, retried(0)},
		{"Snooze", inRouter(goxstreams.Snooze(errDown, 8*time.Hour)), 1, snoozed(8 * time.Hour)},
		{"Snooze before the last delivery", inRouter(goxstreams.Snooze(errDown, 0)), 4, snoozed(0)},
		{"Permanent", inRouter(goxstreams.Permanent(errDown)), 1, dead(goxstreams.PermanentFailure, "the bank")},
		{"filtered", goxstreamstest.ConsumerHandler(failing(errDown), goxstreams.SubscriberConfig{},
			goxstreams.DeadLetter{ShouldDeadLetter: func(err error) bool { return errors.Is(err, errDown) }}.Middleware,
		), 1, dead(goxstreams.Filtered, "the bank")},
		{"no policy", goxstreamstest.ConsumerHandler(failing(errDown), goxstreams.SubscriberConfig{}), 1, func(r *goxstreamstest.Result, tb testing.TB) {
			r.RequireRetriedBetween(tb, 50*time.Millisecond, 150*time.Millisecond)
		}},
		{"swallowed", goxstreamstest.ConsumerHandler(failing(errDown), goxstreams.SubscriberConfig{}, middleware.NewIgnoreErrors([]error{errDown}).Middleware), 1, (*goxstreamstest.Result).RequireAcked},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			result := tt.receiver.Deliver(t, goxstreamstest.Delivery{Message: message.NewMessage("1", []byte("1 kettle")), Count: tt.count})
			tt.require(result, t)
			if result.Count != tt.count {
				t.Errorf("delivery %d", result.Count)
			}
		})
	}
}

func retried(delay time.Duration) func(*goxstreamstest.Result, testing.TB) {
	return func(r *goxstreamstest.Result, tb testing.TB) { tb.Helper(); r.RequireRetried(tb, delay) }
}

func snoozed(delay time.Duration) func(*goxstreamstest.Result, testing.TB) {
	return func(r *goxstreamstest.Result, tb testing.TB) { tb.Helper(); r.RequireSnoozed(tb, delay) }
}

func dead(kind goxstreams.DeadKind, reason string) func(*goxstreamstest.Result, testing.TB) {
	return func(r *goxstreamstest.Result, tb testing.TB) { tb.Helper(); r.RequireDead(tb, kind, reason) }
}

// The handler sees the delivery that the test chose, and the message as it was published.
func TestDeliver_Delivery(t *testing.T) {
	t.Parallel()
	var got goxstreams.Delivery
	var seen *message.Message
	calls := 0
	var told []goxstreams.Outcome
	receiver := goxstreamstest.ConsumerHandler(func(msg *message.Message) error {
		calls++
		seen = msg
		got, _ = goxstreams.DeliveryFromContext(msg.Context())
		return errDown
	}, goxstreams.SubscriberConfig{
		ConsumerGroup: "billing", Consumer: "till", Unmarshaler: goxstreams.BodyMarshaler{},
		Retry:     &goxstreams.Retry{MaxRetries: 9, InitialInterval: time.Nanosecond},
		OnOutcome: func(o goxstreams.Outcome) { told = append(told, o) },
	})
	msg := message.NewMessage("4711", []byte(`{"article":"kettle"}`))
	result := receiver.Deliver(t, goxstreamstest.Delivery{Message: msg, Topic: "orders", ID: "1700000000000-7", Count: 3})
	result.RequireRetried(t, 4*time.Nanosecond)
	if calls != 1 {
		t.Errorf("the handler was called %d times", calls)
	}
	if !strings.HasPrefix(got.Consumer, "till") {
		t.Errorf("consumer %q", got.Consumer)
	}
	got.Consumer = ""
	if want := (goxstreams.Delivery{Topic: "orders", Group: "billing", ID: "1700000000000-7", Count: 3, MaxRetries: 9}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if seen == msg || string(seen.Payload) != string(msg.Payload) {
		t.Errorf("the handler got %q", seen.Payload)
	}
	if len(told) != 1 || told[0].Kind != result.Kind {
		t.Errorf("the config's own OnOutcome was told %v", told)
	}
	if !errors.Is(result.Err, errDown) {
		t.Errorf("error %v", result.Err)
	}
}

// What a handler returns to be published is in the Result.
func TestDeliver_Produced(t *testing.T) {
	t.Parallel()
	receiver := goxstreamstest.Handler(func(msg *message.Message) ([]*message.Message, error) {
		if string(msg.Payload) == "unicorn" {
			return []*message.Message{msg}, errDown
		}
		return []*message.Message{message.NewMessage("bill", msg.Payload)}, nil
	}, goxstreams.SubscriberConfig{Retry: &policy})
	result := receiver.Deliver(t, goxstreamstest.Delivery{Message: message.NewMessage("1", []byte("kettle"))})
	result.RequireAcked(t)
	if len(result.Produced) != 1 || result.Produced[0].UUID != "bill" {
		t.Errorf("produced %v", result.Produced)
	}
	result = receiver.Deliver(t, goxstreamstest.Delivery{Message: message.NewMessage("1", []byte("unicorn"))})
	result.RequireRetried(t, time.Hour)
	if len(result.Produced) != 0 {
		t.Errorf("produced %v", result.Produced)
	}
}

// A handler that panics fails as in a router; one that ends its goroutine does not hang the
// test; an early Ack stays one.
func TestDeliver_Unusual(t *testing.T) {
	t.Parallel()
	config := goxstreams.SubscriberConfig{Retry: &policy}
	for _, tt := range []struct {
		name    string
		handler message.NoPublishHandlerFunc
		kind    goxstreams.OutcomeKind
		err     string
	}{
		{"panic", func(*message.Message) error { panic("at the till") }, goxstreams.OutcomeRetried, "panic: at the till\n"},
		{"FailNow", func(*message.Message) error { runtime.Goexit(); return nil }, goxstreams.OutcomeRetried, "ended its goroutine"},
		{"early Ack", func(msg *message.Message) error { msg.Ack(); return errDown }, goxstreams.OutcomeAcked, "the bank"},
		{"context.Canceled", failing(context.Canceled), goxstreams.OutcomeRetried, "canceled"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			result := goxstreamstest.ConsumerHandler(tt.handler, config).Deliver(t, goxstreamstest.Delivery{Event: 1})
			if result.Kind != tt.kind || result.Err == nil || !strings.Contains(result.Err.Error(), tt.err) {
				t.Errorf("%v, error %v", result, result.Err)
			}
		})
	}
}

type order struct {
	Article  string
	Quantity int
}

// shop is a Worker that does as it is told.
type shop struct {
	process, broken, dead error
	seen                  *goxstreams.Message[order]
}

func (s shop) Process(_ context.Context, msg goxstreams.Message[order]) error {
	if s.seen != nil {
		*s.seen = msg
	}
	return s.process
}
func (s shop) ProcessBroken(context.Context, goxstreams.BrokenMessage) error { return s.broken }
func (s shop) ProcessDead(_ context.Context, msg goxstreams.Message[order]) error {
	if s.seen != nil {
		*s.seen = msg
	}
	return s.dead
}

// The three methods of a Worker.
func TestDeliver_Worker(t *testing.T) {
	t.Parallel()
	kettle := goxstreamstest.Delivery{Event: order{"kettle", 1}}
	last := goxstreamstest.Delivery{Event: order{"kettle", 1}, Count: 4}
	malformed := goxstreamstest.Delivery{Message: message.NewMessage("1", []byte("no JSON"))}
	noMessage := goxstreamstest.Delivery{Fields: []string{"no", "message"}}
	for _, tt := range []struct {
		name     string
		worker   shop
		delivery goxstreamstest.Delivery
		require  func(*goxstreamstest.Result, testing.TB)
	}{
		{"processed", shop{}, kettle, (*goxstreamstest.Result).RequireAcked},
		{"failed", shop{process: errDown}, kettle, retried(time.Hour)},
		{"snoozed", shop{process: goxstreams.Snooze(errDown, time.Minute)}, kettle, snoozed(time.Minute)},
		{"dead, kept", shop{process: errDown, dead: goxstreams.ErrDead}, last, dead(goxstreams.Exhausted, "the bank")},
		{"dead, dropped", shop{process: errDown}, last, (*goxstreamstest.Result).RequireAcked},
		{"dead, asked again", shop{process: goxstreams.Permanent(errDown), dead: errors.New("disk full")}, kettle, retried(time.Hour)},
		{"malformed, kept", shop{broken: goxstreams.ErrDead}, malformed, dead(goxstreams.Broken, "decode the payload")},
		{"malformed, dropped", shop{}, noMessage, (*goxstreamstest.Result).RequireAcked},
		{"malformed, asked again", shop{broken: errDown}, noMessage, retried(time.Hour)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			receiver := goxstreamstest.Worker(tt.worker, goxstreams.ConsumerConfig{Subscriber: goxstreams.SubscriberConfig{Retry: &policy}})
			tt.require(receiver.Deliver(t, tt.delivery), t)
		})
	}
}

// spell is a Codec.
type spell struct{}

func (spell) Encode(event any) ([]byte, error) {
	o, ok := event.(order)
	if !ok {
		return nil, fmt.Errorf("%T is no order", event)
	}
	return []byte(strings.Repeat("|", o.Quantity) + o.Article), nil
}

func (spell) Decode(payload []byte, event any) error {
	article := strings.TrimLeft(string(payload), "|")
	*event.(*order) = order{article, len(payload) - len(article)}
	return nil
}

// An Event is encoded by the Worker's Codec, into the Message if there is one.
func TestDeliver_Event(t *testing.T) {
	t.Parallel()
	var seen goxstreams.Message[order]
	receiver := goxstreamstest.Worker(shop{seen: &seen}, goxstreams.ConsumerConfig{Topic: "orders", Codec: spell{}})
	msg := message.NewMessage("4711", nil)
	msg.Metadata.Set("tenant", "7")
	result := receiver.Deliver(t, goxstreamstest.Delivery{Message: msg, Event: order{"kettle", 3}, Count: 2})
	result.RequireAcked(t)
	if seen.Body != (order{"kettle", 3}) || seen.Metadata.Get("tenant") != "7" || seen.RetryCount != 1 || result.Topic != "orders" {
		t.Errorf("%+v of %s", seen, result.Topic)
	}
	if msg.Payload != nil {
		t.Error("the test's message was changed")
	}
	failed := failure(t, func(tb testing.TB) { receiver.Deliver(tb, goxstreamstest.Delivery{Event: 7}) })
	requireContains(t, failed, "int is no order")
}

// A Receiver can be used concurrently.
func TestDeliver_Concurrent(t *testing.T) {
	t.Parallel()
	receiver := goxstreamstest.ConsumerHandler(failing(errDown), goxstreams.SubscriberConfig{}, policy.Middleware)
	var deliveries sync.WaitGroup
	for i := range 8 {
		deliveries.Go(func() {
			result := receiver.Deliver(t, goxstreamstest.Delivery{Event: i, Count: int64(i%3 + 1)})
			if want := time.Hour << (i % 3); result.Delay != want {
				t.Errorf("delay %v, want %v", result.Delay, want)
			}
		})
	}
	deliveries.Wait()
}

// In a bubble of virtual time it works, too.
func TestDeliver_Bubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		receiver := goxstreamstest.ConsumerHandler(failing(errDown), goxstreams.SubscriberConfig{Retry: &policy})
		receiver.Deliver(t, goxstreamstest.Delivery{Event: 1, Count: 2}).RequireRetried(t, 2*time.Hour)
	})
}

// Mistakes fail the test, and are named.
func TestDeliver_Mistakes(t *testing.T) {
	t.Parallel()
	client := goxstreamstest.NewServer(t).Client()
	msg := goxstreamstest.Delivery{Message: message.NewMessage("1", nil)}
	handler := func(config goxstreams.SubscriberConfig) *goxstreamstest.Receiver {
		return goxstreamstest.ConsumerHandler(failing(nil), config)
	}
	for _, tt := range []struct {
		name     string
		receiver *goxstreamstest.Receiver
		delivery goxstreamstest.Delivery
		want     string
	}{
		{"client", handler(goxstreams.SubscriberConfig{Client: client}), msg, "SubscriberConfig.Client must be nil"},
		{"NoAck", handler(goxstreams.SubscriberConfig{NoAck: true}), msg, "SubscriberConfig.NoAck"},
		{"nothing", handler(goxstreams.SubscriberConfig{}), goxstreamstest.Delivery{}, "one of Message, Event and Fields is required"},
		{"too much", handler(goxstreams.SubscriberConfig{}), goxstreamstest.Delivery{Event: 1, Fields: []string{"a", "b"}}, "Delivery.Fields excludes"},
		{"odd", handler(goxstreams.SubscriberConfig{}), goxstreamstest.Delivery{Fields: []string{"a"}}, "1 is no even number"},
		{"Count", handler(goxstreams.SubscriberConfig{}), goxstreamstest.Delivery{Event: 1, Count: -1}, "Delivery.Count is negative: -1"},
		{"ID", handler(goxstreams.SubscriberConfig{}), goxstreamstest.Delivery{Event: 1, ID: "x"}, `add the entry "x"`},
		{"config", handler(goxstreams.SubscriberConfig{MaxConcurrency: -1}), msg, "SubscriberConfig.MaxConcurrency: is negative"},
		{"worker", goxstreamstest.Worker[order](nil, goxstreams.ConsumerConfig{}), msg, "a worker is required"},
		{"format", handler(goxstreams.SubscriberConfig{Unmarshaler: oneWay{}}), msg, "Delivery.Fields is required"},
		{"message", handler(goxstreams.SubscriberConfig{}), goxstreamstest.Delivery{
			Message: &message.Message{Payload: []byte("x"), Metadata: message.Metadata{goxstreams.UUIDHeaderKey: "y"}},
		}, goxstreams.UUIDHeaderKey},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			requireContains(t, failure(t, func(tb testing.TB) { tt.receiver.Deliver(tb, tt.delivery) }), tt.want)
		})
	}
}

// oneWay is an Unmarshaler, and no Marshaler.
type oneWay struct{}

func (oneWay) Unmarshal(map[string]any) (*message.Message, error) { return nil, errDown }
