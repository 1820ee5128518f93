package goxotel

import (
	"context"
	"errors"
	"fmt"
	"go/build"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// enough is a bound that only a hanging test reaches.
const enough = 30 * time.Second

// rig is a Telemetry over an embedded Redis, whose spans and metrics can be read.
type rig struct {
	*Telemetry
	t      *testing.T
	server *miniredis.Miniredis
	client *redis.Client
	spans  *tracetest.SpanRecorder
	reader *sdkmetric.ManualReader
	tracer trace.Tracer // the application's
}

func newRig(t *testing.T, config Config) *rig {
	t.Helper()
	r := &rig{t: t, spans: tracetest.NewSpanRecorder(), reader: sdkmetric.NewManualReader()}
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(r.spans))
	r.tracer = provider.Tracer("application")
	config.TracerProvider = provider
	config.MeterProvider = sdkmetric.NewMeterProvider(sdkmetric.WithReader(r.reader))
	config.Propagator = propagation.TraceContext{}
	var err error
	r.Telemetry, err = New(config)
	require.NoError(t, err)
	r.server = miniredis.RunT(t)
	client := redis.NewClient(&redis.Options{Addr: r.server.Addr(), MaxRetries: -1})
	t.Cleanup(func() { _ = client.Close() }) // the test may have closed it
	r.client = client
	return r
}

func (r *rig) publisher() message.Publisher {
	inner, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: r.client}, nil)
	require.NoError(r.t, err)
	pub, err := r.Publisher(inner)
	require.NoError(r.t, err)
	return pub
}

// run runs a router over a topic, with this middleware and our Retry, until the test ends.
func (r *rig) run(config goxstreams.SubscriberConfig, topic, publishTo string, h message.HandlerFunc) *goxstreams.Subscriber {
	config.Client = r.client
	config.BlockTime = 20 * time.Millisecond
	subscriber, err := goxstreams.NewSubscriber(config, nil)
	require.NoError(r.t, err)
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	require.NoError(r.t, err)
	router.AddMiddleware(r.Middleware, goxstreams.Retry{MaxRetries: 2, InitialInterval: time.Millisecond}.Middleware, middleware.Recoverer)
	router.AddPublisherDecorators(r.Publisher)
	if publishTo == "" {
		router.AddConsumerHandler("handler", topic, subscriber, func(msg *message.Message) error { _, err := h(msg); return err })
	} else {
		inner, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: r.client}, nil)
		require.NoError(r.t, err)
		router.AddHandler("handler", topic, subscriber, publishTo, inner, h)
	}
	ended := make(chan error, 1)
	go func() { ended <- router.Run(context.Background()) }()
	r.t.Cleanup(func() {
		require.NoError(r.t, router.Close())
		require.NoError(r.t, <-ended)
	})
	select {
	case <-router.Running():
	case <-time.After(enough):
		r.t.Fatal("the router does not run")
	}
	return subscriber
}

// ended waits for n spans that have ended, in the order of their ends.
func (r *rig) ended(n int) []sdktrace.ReadOnlySpan {
	r.t.Helper()
	for deadline := time.Now().Add(enough); len(r.spans.Ended()) < n && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	spans := r.spans.Ended()
	var names []string
	for _, s := range spans {
		names = append(names, s.Name())
	}
	require.Len(r.t, spans, n, "%q", names)
	return spans
}

// linked returns what a span has links to.
func linked(s sdktrace.ReadOnlySpan) (ids []trace.SpanID) {
	for _, l := range s.Links() {
		ids = append(ids, l.SpanContext.SpanID())
	}
	return ids
}

// carried returns the spans that the metadata of a topic's messages tell of, by their
// UUIDs.
func (r *rig) carried(topic string) map[string]trace.SpanContext {
	r.t.Helper()
	spans := map[string]trace.SpanContext{}
	for _, entry := range r.client.XRange(r.t.Context(), topic, "-", "+").Val() {
		msg, err := goxstreams.DefaultMarshaler{}.Unmarshal(entry.Values)
		require.NoError(r.t, err)
		spans[msg.UUID] = trace.SpanContextFromContext(r.Context(r.t.Context(), msg.Metadata))
	}
	return spans
}

func attributes(s sdktrace.ReadOnlySpan) map[string]any {
	values := map[string]any{}
	for _, a := range s.Attributes() {
		values[string(a.Key)] = a.Value.AsInterface()
	}
	return values
}

func TestOneTrace(t *testing.T) {
	r := newRig(t, Config{})
	told := make(chan trace.SpanContext, 1)
	errDown := errors.New("the tax service does not answer")
	r.run(goxstreams.SubscriberConfig{ConsumerGroup: "billing", Consumer: "c1", OnDead: r.OnDead(
		func(ctx context.Context, _ goxstreams.DeadMessage) { told <- trace.SpanContextFromContext(ctx) },
	)}, "orders", "", func(*message.Message) ([]*message.Message, error) {
		return nil, fmt.Errorf("make invoice: %w", errDown)
	})

	ctx, request := r.tracer.Start(t.Context(), "request")
	msg := message.NewMessageWithContext(ctx, "order-1", []byte("payload-secret"))
	msg.Metadata.Set("customer", "metadata-secret")
	require.NoError(t, r.publisher().Publish("orders", msg))
	request.End()

	spans := r.ended(6) // send, request, 3 deliveries, dead letter
	send := spans[slices.IndexFunc(spans, func(s sdktrace.ReadOnlySpan) bool { return s.Name() == "send orders" })]
	require.Equal(t, trace.SpanKindProducer, send.SpanKind())
	require.Equal(t, request.SpanContext().SpanID(), send.Parent().SpanID())
	require.Equal(t, codes.Unset, send.Status().Code)
	require.Equal(t, map[string]any{
		"messaging.system": "redis", "messaging.destination.name": "orders", "messaging.message.id": "order-1",
		"messaging.operation.name": "send", "messaging.operation.type": "send",
	}, attributes(send))

	entries := r.client.XRange(t.Context(), "orders", "-", "+").Val()
	require.Len(t, entries, 1)
	count := int64(0)
	for _, s := range spans {
		require.Equal(t, request.SpanContext().TraceID(), s.SpanContext().TraceID(), s.Name())
		require.NotContains(t, fmt.Sprint(s.Attributes(), s.Events(), s.Status()), "secret")
		if s.Name() != "process orders" {
			continue
		}
		count++
		require.Equal(t, trace.SpanKindConsumer, s.SpanKind())
		require.Equal(t, send.SpanContext().SpanID(), s.Parent().SpanID())
		require.True(t, s.Parent().IsRemote())
		require.Equal(t, []trace.SpanID{send.SpanContext().SpanID()}, linked(s), "the conventions' way, beside the parent")
		require.Equal(t, sdktrace.Status{Code: codes.Error, Description: "make invoice: the tax service does not answer"}, s.Status())
		require.Len(t, s.Events(), 1)
		want := map[string]any{
			"messaging.system": "redis", "messaging.destination.name": "orders", "messaging.message.id": "order-1",
			"messaging.operation.name": "process", "messaging.operation.type": "process",
			"messaging.consumer.group.name": "billing", "messaging.client.id": attributes(spans[5])["messaging.client.id"], // see below
			"goxstreams.entry_id": entries[0].ID, "goxstreams.handler": "handler",
			"goxstreams.delivery_count": count, "goxstreams.retry_count": count - 1,
			"error.type": "*errors.errorString", "goxstreams.outcome": "retried",
		}
		if count == 3 {
			want["goxstreams.dead"], want["goxstreams.outcome"] = true, "dead"
		}
		require.Equal(t, want, attributes(s))
	}
	require.Equal(t, int64(3), count)

	letter := spans[5]
	consumer := fmt.Sprint(attributes(letter)["messaging.client.id"])
	require.Regexp(t, "^c1-.+", consumer, "the prefix, and what makes it unique")
	require.Equal(t, "dead_letter orders", letter.Name())
	require.Equal(t, send.SpanContext().SpanID(), letter.Parent().SpanID())
	require.Equal(t, letter.SpanContext().SpanID(), (<-told).SpanID(), "OnDead is called within the span")
	require.Equal(t, sdktrace.Status{Code: codes.Unset}, letter.Status(), "the move has succeeded")
	require.Equal(t, []trace.SpanID{send.SpanContext().SpanID()}, linked(letter))
	require.Equal(t, map[string]any{
		"messaging.system": "redis", "messaging.destination.name": "orders", "messaging.message.id": "order-1",
		"messaging.operation.name": "dead_letter", "messaging.operation.type": "settle",
		"messaging.consumer.group.name": "billing", "messaging.client.id": consumer,
		"goxstreams.entry_id": entries[0].ID, "goxstreams.handler": "handler",
		"goxstreams.delivery_count": int64(3), "goxstreams.retry_count": int64(2),
		"goxstreams.dead_kind": "exhausted", "goxstreams.replays": int64(0),
		"goxstreams.reason": "make invoice: the tax service does not answer",
	}, attributes(letter))

	queue, err := goxstreams.NewDeadLetterQueue(r.client, goxstreams.DeadLetterTopic("orders"))
	require.NoError(t, err)
	for dead, err := range queue.All(t.Context(), "") {
		require.NoError(t, err)
		require.Contains(t, dead.Message.Metadata["traceparent"], request.SpanContext().TraceID().String(), "who reads the dead letter goes on in the trace")
	}
}

// What a handler publishes is a child of its delivery. What it sends on was created
// elsewhere: it keeps the context of that, which the call links to.
func TestHandlersPublish(t *testing.T) {
	r := newRig(t, Config{})
	own := make(chan trace.Span, 1)
	r.run(goxstreams.SubscriberConfig{ConsumerGroup: "billing"}, "orders", "invoices", func(msg *message.Message) ([]*message.Message, error) {
		ctx, span := r.tracer.Start(msg.Context(), "own")
		defer span.End()
		own <- span
		return []*message.Message{
			msg, // sent on
			message.NewMessage("plain", nil),
			message.NewMessageWithContext(ctx, "within own", nil),
		}, nil
	})
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("order", nil)))
	parents := map[any]trace.SpanID{}
	var delivery, send, call sdktrace.ReadOnlySpan
	for _, s := range r.ended(6) { // send, own, process, 2 create, send
		require.Equal(t, r.ended(6)[0].SpanContext().TraceID(), s.SpanContext().TraceID(), s.Name())
		switch s.Name() {
		case "process orders":
			delivery = s
		case "send orders":
			send = s
		case "send invoices":
			call = s
		case "create invoices":
			parents[attributes(s)["messaging.message.id"]] = s.Parent().SpanID()
		}
	}
	require.Equal(t, map[any]trace.SpanID{
		"plain": delivery.SpanContext().SpanID(), "within own": (<-own).SpanContext().SpanID(),
	}, parents)
	require.Equal(t, delivery.SpanContext().SpanID(), call.Parent().SpanID())
	require.Equal(t, send.SpanContext().SpanID(), linked(call)[0])
	require.Equal(t, send.SpanContext().SpanID(), r.carried("invoices")["order"].SpanID())
}

func TestBatch(t *testing.T) {
	r := newRig(t, Config{})
	pub := r.publisher()
	var msgs []*message.Message
	for i := range 3 {
		msgs = append(msgs, message.NewMessage(fmt.Sprint("order-", i), nil))
	}
	require.NoError(t, pub.Publish("orders", msgs...))
	spans := r.ended(4)
	call := spans[3]
	require.Equal(t, "send orders", call.Name())
	require.Equal(t, trace.SpanKindClient, call.SpanKind())
	require.Equal(t, int64(3), attributes(call)["messaging.batch.message_count"])
	require.Len(t, call.Links(), 3)
	for i, entry := range r.client.XRange(t.Context(), "orders", "-", "+").Val() {
		msg, err := goxstreams.DefaultMarshaler{}.Unmarshal(entry.Values)
		require.NoError(t, err)
		require.Equal(t, trace.SpanKindProducer, spans[i].SpanKind())
		require.Equal(t, msg.UUID, attributes(spans[i])["messaging.message.id"])
		require.Equal(t, spans[i].SpanContext().SpanID(), call.Links()[i].SpanContext.SpanID())
		carried := trace.SpanContextFromContext(r.Context(t.Context(), msg.Metadata))
		require.Equal(t, spans[i].SpanContext().SpanID(), carried.SpanID(), "each carries its own span")
		require.NotEqual(t, spans[(i+1)%3].SpanContext().TraceID(), carried.TraceID(), "without a common parent each has a trace of its own")
	}

	require.NoError(t, pub.Publish("orders"), "no messages, no span")
	r.ended(4)

	r.server.SetError("OOM command not allowed when used memory > 'maxmemory'")
	require.Error(t, pub.Publish("orders", msgs...))
	for _, s := range r.ended(8)[4:] {
		require.Equal(t, codes.Error, s.Status().Code, s.Name())
	}
}

func TestConcurrency(t *testing.T) {
	r := newRig(t, Config{})
	const publishers, each = 4, 25
	r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g", MaxConcurrency: 8}, "orders", "", func(msg *message.Message) ([]*message.Message, error) {
		if delivery, _ := goxstreams.DeliveryFromContext(msg.Context()); delivery.Count == 1 {
			return nil, errors.New("not yet")
		}
		return nil, nil
	})
	pub := r.publisher()
	shared := message.NewMessage("shared", nil) // by all Publish calls: nobody may write to it
	var publishing sync.WaitGroup
	for i := range publishers {
		publishing.Go(func() {
			for j := range each {
				if err := pub.Publish("orders", message.NewMessage(fmt.Sprint(i, "-", j), nil)); err != nil {
					t.Error(err)
				}
				if err := pub.Publish("elsewhere", shared); err != nil {
					t.Error(err)
				}
			}
		})
	}
	publishing.Wait()
	traces := map[string]map[trace.TraceID]int{}
	for _, s := range r.ended(4 * publishers * each) {
		id := attributes(s)["messaging.message.id"].(string)
		if id == "shared" {
			continue
		}
		if traces[id] == nil {
			traces[id] = map[trace.TraceID]int{}
		}
		traces[id][s.SpanContext().TraceID()]++
	}
	require.Len(t, traces, publishers*each)
	for id, spans := range traces {
		require.Len(t, spans, 1, "%s is in one trace", id)
		for _, n := range spans {
			require.Equal(t, 3, n, "%s: published, delivered, delivered again", id)
		}
	}
}

type contextKey struct{}

func TestMessagesAreNotChanged(t *testing.T) {
	r := newRig(t, Config{})
	ctx := context.WithValue(t.Context(), contextKey{}, "mine")
	for name, metadata := range map[string]message.Metadata{"some": {"a": "b", "traceparent": "stale"}, "none": {}, "nil": nil} {
		msg := message.NewMessageWithContext(ctx, "order", []byte("payload"))
		msg.Metadata = maps.Clone(metadata)
		require.NoError(t, r.publisher().Publish("orders-"+name, msg))
		require.Equal(t, metadata, msg.Metadata)
		require.Equal(t, "payload", string(msg.Payload))
		require.Equal(t, ctx, msg.Context())
	}

	seen := make(chan *message.Message, 1)
	after := make(chan bool, 1)
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: r.client, ConsumerGroup: "g"}, nil)
	require.NoError(t, err)
	defer subscriber.Close()
	messages, err := subscriber.Subscribe(t.Context(), "orders-some")
	require.NoError(t, err)
	msg := <-messages
	metadata, before := maps.Clone(msg.Metadata), msg.Context()
	_, err = r.Middleware(func(msg *message.Message) ([]*message.Message, error) {
		seen <- msg
		after <- trace.SpanFromContext(msg.Context()).IsRecording()
		return nil, nil
	})(msg)
	require.NoError(t, err)
	require.Same(t, msg, <-seen, "a copy would lose its verdict")
	require.True(t, <-after, "the handler has the span")
	require.Equal(t, metadata, msg.Metadata)
	require.Equal(t, before, msg.Context(), "and whoever comes after it has the context of before")
	msg.Ack()
}

func TestOthersMessagesPass(t *testing.T) {
	r := newRig(t, Config{})
	produced := []*message.Message{message.NewMessage("2", nil)}
	errOwn := errors.New("own")
	foreign := message.NewMessage("1", nil)
	before := foreign.Context()
	got, err := r.Middleware(func(msg *message.Message) ([]*message.Message, error) {
		require.Same(t, foreign, msg)
		require.Equal(t, before, msg.Context())
		return produced, errOwn
	})(foreign)
	require.Equal(t, produced, got)
	require.Equal(t, errOwn, err)
	require.Equal(t, context.Background(), produced[0].Context())
	require.Empty(t, r.spans.Started())
}

func TestPanicGoesOn(t *testing.T) {
	r := newRig(t, Config{})
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: r.client, ConsumerGroup: "g"}, nil)
	require.NoError(t, err)
	defer subscriber.Close()
	messages, err := subscriber.Subscribe(t.Context(), "orders")
	require.NoError(t, err)
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("1", nil)))
	msg := <-messages
	before := msg.Context()
	require.PanicsWithValue(t, "a bug", func() {
		_, _ = r.Middleware(func(*message.Message) ([]*message.Message, error) { panic("a bug") })(msg)
	})
	require.Equal(t, before, msg.Context())
	delivery := r.ended(2)[1]
	require.Equal(t, sdktrace.Status{Code: codes.Error, Description: "panic"}, delivery.Status())
	require.Equal(t, "panic", attributes(delivery)["error.type"])
	msg.Ack()
}

// A text that is not UTF-8 would make an exporter refuse all that it sends
// together.
func TestErrorsThatAreNotUTF8(t *testing.T) {
	r := newRig(t, Config{})
	r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g", OnDead: r.OnDead(nil)}, "a\xff", "", func(*message.Message) ([]*message.Message, error) {
		return nil, goxstreams.Permanent(errors.New("no \xff"))
	})
	require.NoError(t, r.publisher().Publish("a\xff", message.NewMessage("1", nil)))
	for _, s := range r.ended(3) {
		all := []string{s.Name(), s.Status().Description}
		for _, a := range s.Attributes() {
			all = append(all, a.Value.String())
		}
		for _, e := range s.Events() {
			for _, a := range e.Attributes {
				all = append(all, a.Value.String())
			}
		}
		for _, l := range s.Links() {
			for _, a := range l.Attributes {
				all = append(all, a.Value.String())
			}
		}
		for _, text := range all {
			require.True(t, utf8.ValidString(text), "%s: %q", s.Name(), text)
		}
		if s.Name() == `process "a\xff"` {
			require.Equal(t, "no \uFFFD", s.Status().Description)
		}
	}
}

func TestOmitErrorText(t *testing.T) {
	r := newRig(t, Config{OmitErrorText: true})
	r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g", OnDead: r.OnDead(nil)}, "orders", "", func(*message.Message) ([]*message.Message, error) {
		return nil, goxstreams.Permanent(errors.New("no customer secret"))
	})
	pub := r.publisher()
	require.NoError(t, pub.Publish("orders", message.NewMessage("1", nil)))
	for _, s := range r.ended(3) { // send, process, dead letter
		require.NotContains(t, fmt.Sprint(s.Attributes(), s.Events(), s.Status()), "secret", s.Name())
		if s.Name() == "process orders" {
			require.Equal(t, codes.Error, s.Status().Code)
			require.Equal(t, "*errors.errorString", attributes(s)["error.type"])
		}
		if s.Name() == "dead_letter orders" {
			require.Equal(t, "permanent", attributes(s)["goxstreams.dead_kind"])
		}
	}
}

// A broken entry tells of no trace.
func TestBrokenEntry(t *testing.T) {
	r := newRig(t, Config{})
	require.NoError(t, r.client.XAdd(t.Context(), &redis.XAddArgs{Stream: "orders", Values: []string{"by", "hand"}}).Err())
	r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g", OnDead: r.OnDead(nil)}, "orders", "", func(*message.Message) ([]*message.Message, error) {
		return nil, nil
	})
	letter := r.ended(1)[0]
	require.Equal(t, "broken", attributes(letter)["goxstreams.dead_kind"])
	require.False(t, letter.Parent().IsValid())
	require.NotContains(t, fmt.Sprint(letter.Attributes(), letter.Status()), "hand")
}

type worker struct {
	contexts chan context.Context
}

func (w worker) Process(ctx context.Context, _ goxstreams.Message[int]) error {
	w.contexts <- ctx
	return goxstreams.Permanent(errors.New("no"))
}
func (w worker) ProcessBroken(context.Context, goxstreams.BrokenMessage) error { return nil }
func (w worker) ProcessDead(ctx context.Context, _ goxstreams.Message[int]) error {
	w.contexts <- ctx
	return nil
}

// A typed worker without a router is in the trace by its Context.
func TestTypedWorker(t *testing.T) {
	r := newRig(t, Config{})
	w := worker{make(chan context.Context, 2)}
	consumer, err := goxstreams.NewConsumer(w, goxstreams.ConsumerConfig{
		Topic: "numbers", Subscriber: goxstreams.SubscriberConfig{Client: r.client, ConsumerGroup: "g"},
		Context: r.Context,
	}, nil)
	require.NoError(t, err)
	r.Add(consumer)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- consumer.Run(ctx) }()
	require.NoError(t, goxstreams.NewProducer[int](r.publisher(), goxstreams.ProducerConfig{}).Produce(t.Context(), 42, "numbers"))
	send := r.ended(1)[0]
	for _, method := range []string{"Process", "ProcessDead"} {
		require.Equal(t, send.SpanContext().SpanID(), trace.SpanContextFromContext(<-w.contexts).SpanID(), method)
	}
	cancel()
	require.NoError(t, <-ended)

	within := context.WithValue(t.Context(), deliveryKey{}, true)
	require.Equal(t, within, r.Context(within, message.Metadata{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}),
		"Middleware's span is nearer")
}

// read returns all metrics, by name.
func (r *rig) read() map[string]metricdata.Metrics {
	r.t.Helper()
	var all metricdata.ResourceMetrics
	require.NoError(r.t, r.reader.Collect(r.t.Context(), &all))
	found := map[string]metricdata.Metrics{}
	for _, s := range all.ScopeMetrics {
		for _, m := range s.Metrics {
			found[m.Name] = m
		}
	}
	return found
}

// only returns the value of the only series of a metric.
func only(t *testing.T, m metricdata.Metrics) (float64, attribute.Set) {
	t.Helper()
	switch data := m.Data.(type) {
	case metricdata.Sum[float64]:
		require.Len(t, data.DataPoints, 1, m.Name)
		require.True(t, data.IsMonotonic, m.Name)
		return data.DataPoints[0].Value, data.DataPoints[0].Attributes
	case metricdata.Gauge[float64]:
		require.Len(t, data.DataPoints, 1, m.Name)
		return data.DataPoints[0].Value, data.DataPoints[0].Attributes
	}
	t.Fatalf("%s is a %T", m.Name, m.Data)
	return 0, attribute.Set{}
}

func TestMetrics(t *testing.T) {
	r := newRig(t, Config{TopicTimeout: enough})
	subscriber := r.run(goxstreams.SubscriberConfig{ConsumerGroup: "billing", OnDead: r.OnDead(nil)}, "orders", "", func(msg *message.Message) ([]*message.Message, error) {
		if msg.UUID == "bad" {
			return nil, errors.New("no")
		}
		return nil, nil
	})
	r.Add(subscriber)
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("good", nil), message.NewMessage("bad", nil)))
	r.ended(3 + 4 + 1)

	want := map[string]float64{
		"messages.delivered": 4, "messages.redelivered": 2, "messages.acked": 1, "messages.nacked": 3, "messages.claimed": 0,
		"messages.released": 0, "messages.dead_lettered": 1, "messages.lost": 0, "entries.malformed": 0, "entries.trimmed": 0, "group.cut_off_entries": 0,
		"subscriptions.open": 1, "subscriptions.failing": 0, "subscriptions.outage": 0, "messages.in_flight": 0, "messages.awaiting_retry": 0,
		"group.stats_success": 1, "group.pending_entries": 0, "group.oldest_pending_age": 0, "group.consumers": 1, "group.paused": 0,
		"topic.entries": 2, "topic.dead_letters": 1, "topic.delayed_messages": 0, "topic.delayed_overdue": 0,
	}
	topic := attribute.String("messaging.destination.name", "orders")
	group := attribute.NewSet(topic, attribute.String("messaging.consumer.group.name", "billing"))
	others := map[string]attribute.Set{
		"topic.entries":          attribute.NewSet(topic),
		"topic.delayed_messages": attribute.NewSet(topic),
		"topic.delayed_overdue":  attribute.NewSet(topic),
		"topic.dead_letters":     attribute.NewSet(topic, attribute.String("goxstreams.dead_letter_topic", goxstreams.DeadLetterTopic("orders"))),
	}
	var got map[string]float64
	var metrics map[string]metricdata.Metrics
	for deadline := time.Now().Add(enough); ; time.Sleep(time.Millisecond) {
		got, metrics = map[string]float64{}, r.read()
		for name, m := range metrics {
			if name, ok := strings.CutPrefix(name, "goxstreams."); ok && name != "message.latency" &&
				name != "group.lag" && name != "topic.pin_age" { // miniredis has numbers of its own there
				v, attributes := only(t, m)
				if set, ok := others[name]; ok {
					require.Equal(t, set, attributes, name)
				} else {
					require.Equal(t, group, attributes, name)
				}
				got[name] = v
			}
		}
		if maps.Equal(want, got) || time.Now().After(deadline) {
			break
		}
	}
	require.Equal(t, want, got)
	require.Contains(t, metrics, "goxstreams.group.lag")

	processed := metrics["messaging.process.duration"]
	require.Equal(t, "s", processed.Unit)
	counts := map[bool]uint64{}
	for _, p := range processed.Data.(metricdata.Histogram[float64]).DataPoints {
		_, failed := p.Attributes.Value("error.type")
		counts[failed] += p.Count
		require.Equal(t, 10.0, p.Bounds[len(p.Bounds)-1])
		name, _ := p.Attributes.Value("messaging.operation.name")
		require.Equal(t, "process", name.AsString())
	}
	require.Equal(t, map[bool]uint64{false: 1, true: 3}, counts)
	require.Equal(t, map[string]int64{"messaging.consumer.group.name=billing": 1}, r.series("goxstreams.message.latency"), "of what succeeded")
	sent := metrics["messaging.client.sent.messages"].Data.(metricdata.Sum[int64]).DataPoints
	require.Len(t, sent, 1)
	require.Equal(t, int64(2), sent[0].Value)
	consumed := map[bool]int64{}
	for _, p := range metrics["messaging.client.consumed.messages"].Data.(metricdata.Sum[int64]).DataPoints {
		_, failed := p.Attributes.Value("error.type")
		consumed[failed] += p.Value
		name, _ := p.Attributes.Value("messaging.operation.name")
		require.Equal(t, "process", name.AsString())
	}
	require.Equal(t, map[bool]int64{false: 1, true: 3}, consumed)
	published := metrics["messaging.client.operation.duration"].Data.(metricdata.Histogram[float64]).DataPoints
	require.Len(t, published, 1)
	require.Equal(t, uint64(1), published[0].Count)
}

// Which SDK a process uses is its own business.
func TestOnlyTheAPI(t *testing.T) {
	pkg, err := build.ImportDir(".", 0)
	require.NoError(t, err)
	for _, path := range pkg.Imports {
		require.NotContains(t, path, "otel/sdk")
		require.NotContains(t, path, "otel/exporters")
	}
}

func TestPublisherKeepsItsName(t *testing.T) {
	r := newRig(t, Config{})
	require.Equal(t, "goxstreams.Publisher", fmt.Sprint(r.publisher()))
}
