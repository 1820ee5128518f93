package goxprom

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// onServer returns a Publisher, and its client.
func onServer(t *testing.T) (message.Publisher, *redis.Client) {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	require.NoError(t, err)
	return publisher, client
}

// measured returns a Publisher that a Collector measures.
func measured(t *testing.T, c *Collector, pub message.Publisher) message.Publisher {
	t.Helper()
	pub, err := c.Publisher(pub)
	require.NoError(t, err)
	return pub
}

// histogram returns one of the Collector's, by the values of its labels.
func histogram(t *testing.T, v *prometheus.HistogramVec, values ...string) *dto.Histogram {
	t.Helper()
	observer, err := v.GetMetricWithLabelValues(values...)
	require.NoError(t, err)
	var m dto.Metric
	require.NoError(t, observer.(prometheus.Metric).Write(&m))
	return m.GetHistogram()
}

func handlers(group, success string) string {
	return fmt.Sprintf("goxstreams_handler_duration_seconds{group=%q,success=%q,topic=%q}", group, success, "orders")
}

const latencyOfBilling = `goxstreams_message_latency_seconds{group="billing",topic="orders"}`

// A router's handlers and Publishers, by the middleware and the decorator.
func TestRouter(t *testing.T) {
	c := NewCollector(Config{})
	plain, client := onServer(t)
	publisher := measured(t, c, plain)
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing", BlockTime: 20 * time.Millisecond}, nil)
	require.NoError(t, err)
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	require.NoError(t, err)
	router.AddPublisherDecorators(c.Publisher)
	router.AddMiddleware(c.Middleware, goxstreams.Retry{MaxRetries: 1, InitialInterval: time.Millisecond}.Middleware)
	const slow = 30 * time.Millisecond
	var snoozed atomic.Bool
	router.AddHandler("bill", "orders", subscriber, "invoices", plain, func(msg *message.Message) ([]*message.Message, error) {
		delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
		switch {
		case msg.UUID == "bad":
			return nil, errors.New("no")
		case msg.UUID == "panics" && delivery.RetryCount() == 0:
			panic("no")
		case msg.UUID == "snoozes" && !snoozed.Swap(true):
			return nil, goxstreams.Snooze(errors.New("not now"), slow)
		}
		time.Sleep(slow)
		return []*message.Message{message.NewMessage(msg.UUID+" invoice", nil)}, nil
	})
	ended := make(chan error, 1)
	go func() { ended <- router.Run(context.Background()) }()

	require.NoError(t, publisher.Publish("orders", message.NewMessage("good", nil), message.NewMessage("bad", nil)))
	require.NoError(t, publisher.Publish("orders", message.NewMessage("panics", nil)))
	require.NoError(t, publisher.Publish("orders", message.NewMessage("snoozes", nil)))
	require.NoError(t, publisher.Publish("orders"), "nothing")

	want := map[string]float64{
		handlers("billing", "true"): 4, handlers("billing", "false"): 3, latencyOfBilling: 3, // 4 with the Snooze
		`goxstreams_publisher_messages_total{outcome="stored",topic="orders"}`:     4,
		`goxstreams_publisher_messages_total{outcome="failed",topic="orders"}`:     0,
		`goxstreams_publisher_messages_total{outcome="unknown",topic="orders"}`:    0,
		`goxstreams_publisher_duration_seconds{outcome="stored",topic="orders"}`:   3,
		`goxstreams_publisher_messages_total{outcome="stored",topic="invoices"}`:   3,
		`goxstreams_publisher_messages_total{outcome="failed",topic="invoices"}`:   0,
		`goxstreams_publisher_messages_total{outcome="unknown",topic="invoices"}`:  0,
		`goxstreams_publisher_duration_seconds{outcome="stored",topic="invoices"}`: 3,
	}
	var got map[string]float64
	if !waitFor(func() bool { got = gathered(t, c); return mapsEqual(got, want) }) {
		require.Equal(t, want, got)
	}
	require.NoError(t, router.Close())
	require.NoError(t, <-ended)

	took := histogram(t, c.handlers, "orders", "billing", "true")
	require.GreaterOrEqual(t, took.GetSampleSum(), 3*slow.Seconds())
	age := histogram(t, c.latency, "orders", "billing")
	require.GreaterOrEqual(t, age.GetSampleSum(), 3*slow.Seconds()-0.003, "an ID is in milliseconds")
	require.Less(t, age.GetSampleSum(), 3*enough.Seconds())
}

type shop struct{ calls atomic.Int64 }

func (s *shop) Process(_ context.Context, msg goxstreams.Message[string]) error {
	s.calls.Add(1)
	if msg.Body == "bad" {
		return goxstreams.Permanent(errors.New("no"))
	}
	return nil
}
func (*shop) ProcessBroken(context.Context, goxstreams.BrokenMessage) error { return nil }
func (*shop) ProcessDead(context.Context, goxstreams.Message[string]) error { return nil }

// A typed Consumer needs no router to be measured.
func TestConsumer(t *testing.T) {
	c := NewCollector(Config{})
	publisher, client := onServer(t)
	producer := goxstreams.NewProducer[string](measured(t, c, publisher), goxstreams.ProducerConfig{})
	require.NoError(t, producer.ProduceBatch(t.Context(), []string{"good", "bad", "good"}, "orders"))
	consumer, err := goxstreams.NewConsumer(&shop{}, goxstreams.ConsumerConfig{
		Topic:       "orders",
		Subscriber:  goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing", BlockTime: 20 * time.Millisecond},
		Middlewares: []message.HandlerMiddleware{c.Middleware},
	}, nil)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- consumer.Run(ctx) }()

	want := map[string]float64{
		handlers("billing", "true"): 2, handlers("billing", "false"): 1, latencyOfBilling: 2,
		`goxstreams_publisher_messages_total{outcome="stored",topic="orders"}`:   3,
		`goxstreams_publisher_messages_total{outcome="failed",topic="orders"}`:   0,
		`goxstreams_publisher_messages_total{outcome="unknown",topic="orders"}`:  0,
		`goxstreams_publisher_duration_seconds{outcome="stored",topic="orders"}`: 1,
	}
	var got map[string]float64
	if !waitFor(func() bool { got = gathered(t, c); return mapsEqual(got, want) }) {
		require.Equal(t, want, got)
	}
	cancel()
	require.NoError(t, <-ended)
}

// A handler that does not return has failed. Its panic is not swallowed.
func TestHandlersThatDoNotReturn(t *testing.T) {
	for name, end := range map[string]func(){"panic": func() { panic("no") }, "Goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			c := NewCollector(Config{})
			publisher, client := onServer(t)
			subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, nil)
			require.NoError(t, err)
			messages, err := subscriber.Subscribe(t.Context(), "orders")
			require.NoError(t, err)
			require.NoError(t, publisher.Publish("orders", message.NewMessage("1", nil)))
			msg := <-messages
			ended := make(chan any)
			go func() {
				defer func() { ended <- recover() }()
				_, _ = c.Middleware(func(*message.Message) ([]*message.Message, error) { end(); return nil, nil })(msg)
			}()
			if p := <-ended; name == "panic" {
				require.Equal(t, "no", p)
			}
			require.Equal(t, map[string]float64{handlers("billing", "false"): 1}, gathered(t, c))
			msg.Ack()
			require.NoError(t, subscriber.Close())
		})
	}
}

func TestMessagesOfOthers(t *testing.T) {
	c := NewCollector(Config{})
	msg := message.NewMessage("1", nil)
	produced, err := c.Middleware(message.PassthroughHandler)(msg)
	require.NoError(t, err)
	require.Equal(t, []*message.Message{msg}, produced)
	require.Empty(t, gathered(t, c))
}

// An entry's ID that is no time says nothing of its age, and a clock that is behind the
// server's does not make it negative.
func TestLatency(t *testing.T) {
	c := NewCollector(Config{})
	observe := func(id string) { c.handled(goxstreams.Delivery{Topic: "orders", Group: "billing", ID: id}, 0, nil, "") }
	observe("0-1")
	require.Zero(t, histogram(t, c.latency, "orders", "billing").GetSampleCount())
	observe(fmt.Sprintf("%d-0", time.Now().Add(time.Hour).UnixMilli()))
	require.Equal(t, uint64(1), histogram(t, c.latency, "orders", "billing").GetSampleCount())
	require.Zero(t, histogram(t, c.latency, "orders", "billing").GetSampleSum())
	observe(fmt.Sprintf("%d-0", time.Now().Add(-time.Hour).UnixMilli()))
	require.InDelta(t, 3600, histogram(t, c.latency, "orders", "billing").GetSampleSum(), enough.Seconds())
}

type failing struct{ err error }

func (f failing) Publish(string, ...*message.Message) error { return f.err }
func (failing) Close() error                                { return errors.New("closed") }

func TestOutcomesOfPublish(t *testing.T) {
	c := NewCollector(Config{})
	down := errors.New("down")
	for _, err := range []error{nil, down, fmt.Errorf("goxstreams: publish: %w", goxstreams.ErrOutcomeUnknown)} {
		pub := measured(t, c, failing{err})
		require.Equal(t, err, pub.Publish("a\xff", message.NewMessage("1", nil), message.NewMessage("2", nil)))
	}
	want := map[string]float64{}
	for _, outcome := range []string{"stored", "failed", "unknown"} {
		labels := fmt.Sprintf("{outcome=%q,topic=%q}", outcome, `"a\xff"`)
		want["goxstreams_publisher_messages_total"+labels] = 2
		want["goxstreams_publisher_duration_seconds"+labels] = 1
	}
	require.Equal(t, want, gathered(t, c))

	pub := measured(t, c, failing{})
	require.EqualError(t, pub.Close(), "closed")
	require.Equal(t, "goxprom.failing", fmt.Sprint(pub))
	real, _ := onServer(t)
	require.Equal(t, fmt.Sprint(real), fmt.Sprint(measured(t, c, real)), "Watermill's own metrics call it the same")
	_, err := c.Publisher(nil)
	require.EqualError(t, err, "goxprom: Publisher: pub is required")
}

func TestBuckets(t *testing.T) {
	bounds := func(config Config) (bounds []float64) {
		for _, b := range histogram(t, NewCollector(config).handlers, "t", "g", "true").GetBucket() {
			bounds = append(bounds, b.GetUpperBound())
		}
		return bounds
	}
	require.Len(t, bounds(Config{}), 18)
	require.True(t, slices.IsSorted(bounds(Config{})))
	require.Equal(t, []float64{1, 2}, bounds(Config{Buckets: []float64{1, 2}}))
	require.PanicsWithValue(t, "goxprom: Config.Buckets: 2 is followed by 2; they must increase", func() { NewCollector(Config{Buckets: []float64{1, 2, 2}}) })
}
