package goxotel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	pkgerrors "github.com/pkg/errors"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel/internal/statswatch"
)

// named returns the spans of that name that have ended, of n in all.
func (r *rig) named(name string, n int) (spans []sdktrace.ReadOnlySpan) {
	r.t.Helper()
	for _, s := range r.ended(n) {
		if s.Name() == name {
			spans = append(spans, s)
		}
	}
	require.NotEmpty(r.t, spans, name)
	return spans
}

// series returns the attributes of a metric's series, without those of the
// destination and the system, with their counts or values.
func (r *rig) series(name string) map[string]int64 {
	r.t.Helper()
	found := map[string]int64{}
	add := func(set attribute.Set, n int64) {
		var texts []string
		for _, a := range set.ToSlice() {
			switch a.Key {
			case "messaging.system", "messaging.destination.name":
			default:
				texts = append(texts, string(a.Key)+"="+a.Value.String())
			}
		}
		found[strings.Join(texts, " ")] += n
	}
	switch data := r.read()[name].Data.(type) {
	case metricdata.Histogram[float64]:
		for _, p := range data.DataPoints {
			add(p.Attributes, int64(p.Count))
		}
	case metricdata.Sum[int64]:
		for _, p := range data.DataPoints {
			add(p.Attributes, p.Value)
		}
	}
	return found
}

// A Snooze was an error in the trace, and made alarms of error rates ring where nobody
// had failed.
func TestSnoozeIsNoError(t *testing.T) {
	for _, omit := range []bool{false, true} {
		r := newRig(t, Config{OmitErrorText: omit})
		var later atomic.Bool
		r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g"}, "orders", "", func(*message.Message) ([]*message.Message, error) {
			if !later.Swap(true) {
				return nil, fmt.Errorf("bill: %w", goxstreams.Snooze(errors.New("too early"), time.Millisecond))
			}
			return nil, nil
		})
		require.NoError(t, r.publisher().Publish("orders", message.NewMessage("1", nil)))
		spans := r.named("process orders", 3)
		require.Equal(t, sdktrace.Status{}, spans[0].Status())
		require.Empty(t, spans[0].Events(), "no exception")
		require.NotContains(t, attributes(spans[0]), "error.type")
		require.Equal(t, "snoozed", attributes(spans[0])["goxstreams.outcome"])
		if omit {
			require.NotContains(t, attributes(spans[0]), "goxstreams.reason")
		} else {
			require.Equal(t, "bill: too early", attributes(spans[0])["goxstreams.reason"])
		}
		require.NotContains(t, attributes(spans[1]), "goxstreams.outcome", "a success")
		want := map[string]int64{"messaging.consumer.group.name=g messaging.operation.name=process": 2}
		require.Equal(t, want, r.series("messaging.process.duration"))
		require.Equal(t, want, r.series("messaging.client.consumed.messages"))
	}
}

// A handler that a shutdown interrupts has not failed, with our Retry or without.
func TestShutdownIsNoError(t *testing.T) {
	for _, retry := range []bool{true, false} {
		r := newRig(t, Config{})
		subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: r.client, ConsumerGroup: "g"}, nil)
		require.NoError(t, err)
		defer subscriber.Close()
		ctx, stop := context.WithCancel(t.Context())
		messages, err := subscriber.Subscribe(ctx, "orders")
		require.NoError(t, err)
		require.NoError(t, r.publisher().Publish("orders", message.NewMessage("1", nil)))
		msg := <-messages
		stop()
		handler := func(*message.Message) ([]*message.Message, error) { return nil, fmt.Errorf("pay: %w", ctx.Err()) }
		if retry {
			handler = goxstreams.Retry{}.Middleware(handler)
		}
		_, err = r.Middleware(handler)(msg)
		require.Error(t, err, "it is nacked")
		msg.Nack()
		span := r.named("process orders", 2)[0]
		require.Equal(t, sdktrace.Status{}, span.Status())
		require.NotContains(t, attributes(span), "error.type")
		require.Equal(t, "released", attributes(span)["goxstreams.outcome"])
		require.Equal(t, "pay: context canceled", attributes(span)["goxstreams.reason"])
		require.Equal(t, map[string]int64{"messaging.consumer.group.name=g messaging.operation.name=process": 1}, r.series("messaging.process.duration"))
	}
}

// What a message carries is whose creation it tells of. Publish replaced it by its own
// span, so that who forwards messages cut their traces in two.
func TestPassedOnMessagesKeepTheirCreation(t *testing.T) {
	const carried = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for name, messages := range map[string][]string{"one": {"old"}, "several": {"old", "new", "older"}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Config{})
			ctx, request := r.tracer.Start(t.Context(), "request")
			var msgs []*message.Message
			for _, uuid := range messages {
				msg := message.NewMessageWithContext(ctx, uuid, nil)
				if strings.HasPrefix(uuid, "old") {
					msg.Metadata.Set("traceparent", carried)
				}
				msgs = append(msgs, msg)
			}
			require.NoError(t, r.publisher().Publish("orders", msgs...))
			old := r.Context(context.Background(), msgs[0].Metadata)
			require.Equal(t, trace.SpanContextFromContext(old), r.carried("orders")["old"])

			call := r.named("send orders", 1+len(messages)/2)[0]
			require.Equal(t, trace.SpanKindClient, call.SpanKind(), "it creates nothing")
			require.Equal(t, request.SpanContext().SpanID(), call.Parent().SpanID())
			require.Len(t, call.Links(), len(messages))
			for i, l := range call.Links() {
				require.Equal(t, []attribute.KeyValue{attribute.String("messaging.message.id", messages[i])}, l.Attributes)
				require.Equal(t, messages[i] != "new", l.SpanContext.TraceID().String() == "0af7651916cd43dd8448eb211c80319c")
			}
		})
	}

	// Without a span of its own it goes on in that trace.
	r := newRig(t, Config{})
	msg := message.NewMessage("1", nil)
	msg.Metadata.Set("traceparent", carried)
	require.NoError(t, r.publisher().Publish("orders", msg))
	require.Equal(t, "b7ad6b7169203331", r.ended(1)[0].Parent().SpanID().String())
	// What is no context is replaced.
	msg.Metadata.Set("traceparent", "stale")
	require.NoError(t, r.publisher().Publish("others", msg))
	require.Equal(t, r.ended(2)[1].SpanContext().SpanID(), r.carried("others")["1"].SpanID())
}

func TestOmitCreateSpans(t *testing.T) {
	r := newRig(t, Config{OmitCreateSpans: true})
	ctx, request := r.tracer.Start(t.Context(), "request")
	require.NoError(t, r.publisher().Publish("orders", message.NewMessageWithContext(ctx, "1", nil), message.NewMessageWithContext(ctx, "2", nil)))
	call := r.ended(1)[0]
	require.Equal(t, "send orders", call.Name())
	require.Equal(t, trace.SpanKindProducer, call.SpanKind(), "its context creates the messages")
	require.Equal(t, request.SpanContext().SpanID(), call.Parent().SpanID())
	require.Equal(t, int64(2), attributes(call)["messaging.batch.message_count"])
	require.Empty(t, call.Links())
	for _, uuid := range []string{"1", "2"} {
		require.Equal(t, call.SpanContext().SpanID(), r.carried("orders")[uuid].SpanID())
	}
}

// A message that is retried for days makes a trace of days: LinkOnly ends that.
func TestLinkOnly(t *testing.T) {
	r := newRig(t, Config{LinkOnly: true})
	r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g", OnDead: r.OnDead(nil)}, "orders", "archive", func(msg *message.Message) ([]*message.Message, error) {
		if msg.UUID == "bad" {
			return nil, goxstreams.Permanent(errors.New("no"))
		}
		return []*message.Message{msg}, nil
	})
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("good", nil)))
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("bad", nil)))
	created := r.carried("orders")
	for _, s := range r.ended(6) { // 2 send, 2 process, dead_letter, send archive
		uuid, _ := attributes(s)["messaging.message.id"].(string)
		switch s.Name() {
		case "process orders", "dead_letter orders":
			require.False(t, s.Parent().IsValid(), s.Name())
			require.NotEqual(t, created[uuid].TraceID(), s.SpanContext().TraceID())
			require.Equal(t, []trace.SpanID{created[uuid].SpanID()}, linked(s), s.Name())
		case "send archive":
			require.Equal(t, r.parentOf(s).Name(), "process orders")
			require.Equal(t, []trace.SpanID{created["good"].SpanID()}, linked(s))
		}
	}
	require.Equal(t, created["good"].SpanID(), r.carried("archive")["good"].SpanID())
}

func (r *rig) parentOf(s sdktrace.ReadOnlySpan) sdktrace.ReadOnlySpan {
	r.t.Helper()
	for _, p := range r.spans.Ended() {
		if p.SpanContext().SpanID() == s.Parent().SpanID() {
			return p
		}
	}
	require.Fail(r.t, "no parent", s.Name())
	return nil
}

// A span that is around the delivery already, another middleware's say, is not lost.
func TestSpanAroundTheDelivery(t *testing.T) {
	for _, linkOnly := range []bool{false, true} {
		r := newRig(t, Config{LinkOnly: linkOnly})
		subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: r.client, ConsumerGroup: "g"}, nil)
		require.NoError(t, err)
		defer subscriber.Close()
		messages, err := subscriber.Subscribe(t.Context(), "orders")
		require.NoError(t, err)
		require.NoError(t, r.publisher().Publish("orders", message.NewMessage("1", nil)))
		msg := <-messages
		ctx, around := r.tracer.Start(msg.Context(), "around")
		msg.SetContext(ctx)
		_, err = r.Middleware(func(*message.Message) ([]*message.Message, error) { return nil, nil })(msg)
		require.NoError(t, err)
		msg.Ack()
		created := r.carried("orders")["1"].SpanID()
		span := r.named("process orders", 2)[0]
		if linkOnly {
			require.Equal(t, around.SpanContext().SpanID(), span.Parent().SpanID())
			require.Equal(t, []trace.SpanID{created}, linked(span))
		} else {
			require.Equal(t, created, span.Parent().SpanID())
			require.Equal(t, []trace.SpanID{created, around.SpanContext().SpanID()}, linked(span))
		}
	}
}

// The wrapped Publisher refuses it, with an error that says so; this one panicked.
func TestNilMessage(t *testing.T) {
	r := newRig(t, Config{})
	require.Error(t, r.publisher().Publish("orders", nil))
	require.Error(t, r.publisher().Publish("orders", message.NewMessage("1", nil), nil))
}

func TestSettleDuration(t *testing.T) {
	const prefix = "messaging.consumer.group.name=g messaging.operation.name="
	published := "messaging.operation.name=send messaging.operation.type=send"
	for name, deleteAcked := range map[string]bool{"XACK": false, "DeleteAcked": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Config{})
			r.client = realServer(t)
			r.client.AddHook(r.Hook())
			r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g", DeleteAcked: deleteAcked}, "orders", "", func(msg *message.Message) ([]*message.Message, error) {
				if msg.UUID == "bad" {
					return nil, goxstreams.Permanent(errors.New("no"))
				}
				return nil, nil
			})
			require.NoError(t, r.publisher().Publish("orders", message.NewMessage("good", nil)))
			require.NoError(t, r.publisher().Publish("orders", message.NewMessage("bad", nil)))
			require.Eventually(t, func() bool { return len(r.series("messaging.client.operation.duration")) == 3 }, enough, time.Millisecond)
			require.Equal(t, map[string]int64{
				prefix + "ack messaging.operation.type=settle": 1, prefix + "dead_letter messaging.operation.type=settle": 1, published: 2,
			}, r.series("messaging.client.operation.duration"))
		})
	}

	r := newRig(t, Config{})
	r.client.AddHook(r.Hook())
	require.ErrorContains(t, r.client.Do(t.Context(), "xack", "orders").Err(), "wrong number")
	require.NoError(t, r.client.Set(t.Context(), "text", "1", 0).Err())
	require.Error(t, r.client.XAck(t.Context(), "text", "g", "1-1").Err())
	_, err := r.client.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
		pipe.XAck(t.Context(), "text", "g", "1-1")
		pipe.Get(t.Context(), "text")
		return nil
	})
	require.Error(t, err)
	cmd := redis.NewIntCmd(t.Context(), "xack", "text", "g", "1-1")
	refuse := func(context.Context, []redis.Cmder) error { return replyError("NOAUTH Authentication required.") }
	require.Error(t, r.Hook().ProcessPipelineHook(refuse)(t.Context(), []redis.Cmder{cmd}), "the connection is refused, which no command knows")
	require.NoError(t, r.client.Close())
	require.Error(t, r.client.XAck(t.Context(), "text", "g", "1-1").Err())
	require.Equal(t, map[string]int64{
		"error.type=WRONGTYPE " + prefix + "ack messaging.operation.type=settle":       2,
		"error.type=NOAUTH " + prefix + "ack messaging.operation.type=settle":          1,
		"error.type=redis.ErrClosed " + prefix + "ack messaging.operation.type=settle": 1,
	}, r.series("messaging.client.operation.duration"))
}

func TestServer(t *testing.T) {
	address := func(host string, port int) []attribute.KeyValue {
		attributes := []attribute.KeyValue{attribute.String("server.address", host)}
		if port != 0 {
			attributes = append(attributes, attribute.Int("server.port", port))
		}
		return attributes
	}
	for name, tt := range map[string]struct {
		client redis.UniversalClient
		want   []attribute.KeyValue
	}{
		"none":           {nil, nil},
		"nil":            {(*redis.Client)(nil), nil},
		"default":        {redis.NewClient(&redis.Options{}), address("localhost", 6379)},
		"name":           {redis.NewClient(&redis.Options{Addr: "redis.example:7000"}), address("redis.example", 7000)},
		"IPv6":           {redis.NewClient(&redis.Options{Addr: "[::1]:6379"}), address("::1", 6379)},
		"unix":           {redis.NewClient(&redis.Options{Addr: "/run/redis.sock"}), address("/run/redis.sock", 0)},
		"sentinel":       {redis.NewFailoverClient(&redis.FailoverOptions{MasterName: "m", SentinelAddrs: []string{"s:26379"}}), nil},
		"cluster":        {redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"c.example:6379"}}), address("c.example", 6379)},
		"clusterOfMany":  {redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"a:1", "b:2"}}), nil},
		"ring":           {redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "a:1"}}), nil},
		"somebody's own": {struct{ redis.UniversalClient }{redis.NewClient(&redis.Options{})}, nil},
	} {
		require.Equal(t, tt.want, serverOf(tt.client), name)
		if c, ok := tt.client.(*redis.Client); tt.client != nil && (!ok || c != nil) {
			require.NoError(t, tt.client.Close())
		}
	}

	r := newRig(t, Config{Client: redis.NewClient(&redis.Options{Addr: "redis.example:7000"})})
	r.client.AddHook(r.Hook())
	r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g", OnDead: r.OnDead(nil)}, "orders", "", func(*message.Message) ([]*message.Message, error) {
		return nil, goxstreams.Permanent(errors.New("no"))
	})
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("1", nil), message.NewMessage("2", nil)))
	for _, s := range r.ended(3 + 2*2) {
		require.Equal(t, "redis.example", attributes(s)["server.address"], s.Name())
		require.Equal(t, int64(7000), attributes(s)["server.port"], s.Name())
	}
	for _, name := range []string{
		"messaging.process.duration", "messaging.client.consumed.messages", "messaging.client.sent.messages", "messaging.client.operation.duration",
	} {
		series := r.series(name)
		require.NotEmpty(t, series, name)
		for attributes := range series {
			require.Contains(t, attributes, "server.address=redis.example server.port=7000", name)
		}
	}
}

type codedError struct{ code string }

func (e *codedError) Error() string     { return "coded" }
func (e *codedError) ErrorType() string { return e.code }

type replyError string

func (e replyError) Error() string { return string(e) }
func (replyError) RedisError()     {}

// The kind of an error must not depend on who wrapped it, and not on what it quotes.
func TestErrorType(t *testing.T) {
	wrap := func(err error) error { return fmt.Errorf("handle order 4711: %w", fmt.Errorf("store: %w", err)) }
	oom := replyError("OOM command not allowed when used memory > 'maxmemory'.")
	own := &codedError{"card_declined"}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{oom, "OOM"},
		{wrap(oom), "OOM"},
		{goxstreams.Permanent(wrap(oom)), "OOM"},
		{goxstreams.RetryAfter(oom, time.Second), "OOM"},
		{errors.Join(errors.New("store"), oom), "OOM"},
		{pkgerrors.Wrap(oom, "store"), "OOM"},
		{wrap(replyError("NOREPLICAS Not enough good replicas to write.")), "NOREPLICAS"},
		{wrap(replyError("READONLY You can't write against a read only replica.")), "READONLY"},
		{wrap(replyError("ERR value is not an integer")), "ERR"},
		{wrap(replyError("something else, of order 4711")), "github.com/goxstreams/watermill-goxstreams/plugin/goxotel.replyError"},
		{wrap(redis.Nil), "redis.Nil"},
		{wrap(redis.ErrPoolTimeout), "redis.ErrPoolTimeout"},
		{wrap(context.Canceled), "context.Canceled"},
		{wrap(context.DeadlineExceeded), "context.DeadlineExceeded"},
		{wrap(fmt.Errorf("%w: %w", goxstreams.ErrOutcomeUnknown, io.EOF)), "goxstreams.ErrOutcomeUnknown"},
		{wrap(goxstreams.ErrLeaseLost), "goxstreams.ErrLeaseLost"},
		{goxstreams.ErrRetriesExhausted, "goxstreams.ErrRetriesExhausted"},
		{goxstreams.ErrPermanent, "goxstreams.ErrPermanent"},
		{goxstreams.Permanent(own), "card_declined"},
		{wrap(own), "card_declined"},
		{wrap(&codedError{"\xff"}), "\uFFFD"},
		{wrap(&net.OpError{Op: "dial", Err: io.EOF}), "*net.OpError"},
		{pkgerrors.WithStack(&net.OpError{Op: "dial", Err: io.EOF}), "*net.OpError"},
		{wrap(errors.New("order 4711 has no address")), "*errors.errorString"},
		{errors.Join(wrap(errors.New("no"))), "*errors.errorString"},
		{panicked{}, "panic"},
	} {
		require.Equal(t, attribute.String("error.type", tt.want), errorType(tt.err), "%T %v", tt.err, tt.err)
	}
}

// realServer returns a client of a redis-server of the test's own.
func realServer(t *testing.T) *redis.Client {
	t.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		if os.Getenv("GOXSTREAMS_TEST_REAL") != "" {
			require.NoError(t, err)
		}
		t.Skip("no redis-server in the PATH")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := listener.Addr().(*net.TCPAddr).Port
	require.NoError(t, listener.Close())
	server := exec.Command(path, "--port", strconv.Itoa(port), "--save", "", "--dir", t.TempDir())
	require.NoError(t, server.Start())
	t.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait()
	})
	client := redis.NewClient(&redis.Options{Addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), MaxRetries: -1})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	require.Eventually(t, func() bool { return client.Ping(context.Background()).Err() == nil }, enough, 10*time.Millisecond)
	return client
}

// What Redis refuses is told by its code, in spans and in metrics.
func TestRedisCodes(t *testing.T) {
	for code, refuse := range map[string][]any{
		"OOM": {"config", "set", "maxmemory", "1"}, "NOREPLICAS": {"config", "set", "min-replicas-to-write", "1"}, "READONLY": {"replicaof", "127.0.0.1", "1"},
	} {
		t.Run(code, func(t *testing.T) {
			r := newRig(t, Config{})
			r.client = realServer(t)
			pub := r.publisher()
			require.NoError(t, pub.Publish("orders", message.NewMessage("1", nil)))
			require.NoError(t, r.client.Do(t.Context(), refuse...).Err())
			require.Error(t, pub.Publish("orders", message.NewMessage("2", nil)))
			require.Error(t, pub.Publish("orders", message.NewMessage("3", nil), message.NewMessage("4", nil)))
			for _, s := range r.ended(1 + 1 + 3)[1:] {
				require.Equal(t, codes.Error, s.Status().Code, s.Name())
				require.Equal(t, code, attributes(s)["error.type"], "%s: %s", s.Name(), s.Status().Description)
			}
			require.Equal(t, map[string]int64{"messaging.operation.name=send": 1, "error.type=" + code + " messaging.operation.name=send": 3},
				r.series("messaging.client.sent.messages"))
		})
	}
}

func TestLeaseLost(t *testing.T) {
	r := newRig(t, Config{})
	r.client = realServer(t)
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("1", nil)))
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: r.client, ConsumerGroup: "g", ClaimMinIdle: time.Second}, nil)
	require.NoError(t, err)
	defer subscriber.Close()
	messages, err := subscriber.Subscribe(t.Context(), "orders")
	require.NoError(t, err)
	msg := <-messages
	defer msg.Nack()
	delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
	claim := &redis.XClaimArgs{Stream: "orders", Group: "g", Consumer: "other", Messages: []string{delivery.ID}}
	require.NoError(t, r.client.XClaimJustID(t.Context(), claim).Err())
	_, err = r.Middleware(func(msg *message.Message) ([]*message.Message, error) {
		<-msg.Context().Done()
		return nil, msg.Context().Err()
	})(msg)
	require.ErrorIs(t, err, context.Canceled)
	span := r.named("process orders", 2)[0]
	require.Equal(t, codes.Error, span.Status().Code, "the work is done elsewhere once more")
	require.Equal(t, "lease_lost", attributes(span)["goxstreams.outcome"])
	require.Equal(t, "goxstreams.ErrLeaseLost", attributes(span)["error.type"])
}

// slow is a Source that never answers.
type slow struct{ asked chan struct{} }

func (slow) Stats() []goxstreams.SubscriptionStats {
	return []goxstreams.SubscriptionStats{{Topic: "orders", Group: "g"}}
}

func (s slow) TopicStats(ctx context.Context, _ string) (goxstreams.TopicStats, error) {
	close(s.asked)
	<-ctx.Done()
	return goxstreams.TopicStats{}, ctx.Err()
}

// A reading that its collector gives up does not wait for Redis.
func TestReadingEndsWithItsContext(t *testing.T) {
	r := newRig(t, Config{TopicTimeout: time.Hour})
	source := slow{make(chan struct{})}
	r.Add(source)
	ctx, cancel := context.WithCancel(t.Context())
	read := make(chan error, 1)
	var all metricdata.ResourceMetrics
	go func() { read <- r.reader.Collect(ctx, &all) }()
	<-source.asked
	cancel()
	select {
	case err := <-read:
		require.ErrorIs(t, err, context.Canceled)
	case <-time.After(enough):
		t.Fatal("the reading goes on")
	}
}

func TestClose(t *testing.T) {
	r := newRig(t, Config{TopicTimeout: -1})
	r.Add(slow{})
	require.Contains(t, r.read(), "goxstreams.subscriptions.open")
	require.NoError(t, r.Close())
	require.NoError(t, r.Close(), "again")
	require.NotContains(t, r.read(), "goxstreams.subscriptions.open")
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("1", nil)))
	require.Contains(t, r.read(), "messaging.client.sent.messages", "what is counted here goes on")
}

// The names that OpenTelemetry's translation to Prometheus yields are those of goxprom,
// for one dashboard: a unit "1" would have become _ratio.
func TestPrometheusNames(t *testing.T) {
	registry := prometheus.NewRegistry()
	exporter, err := otelprometheus.New(otelprometheus.WithRegisterer(registry), otelprometheus.WithoutScopeInfo(), otelprometheus.WithoutTargetInfo())
	require.NoError(t, err)
	r := newRig(t, Config{})
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter))
	if r.Telemetry, err = New(Config{TopicTimeout: enough, MeterProvider: provider, TracerProvider: sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(r.spans))}); err != nil {
		t.Fatal(err)
	}
	r.client.AddHook(r.Hook())
	r.Add(r.run(goxstreams.SubscriberConfig{ConsumerGroup: "g"}, "orders", "", func(*message.Message) ([]*message.Message, error) { return nil, nil }))
	require.NoError(t, r.publisher().Publish("orders", message.NewMessage("1", nil)))
	r.ended(2)
	require.NoError(t, r.client.XGroupCreate(t.Context(), "orders", "late", "0").Err()) // what pins the stream

	want := map[string]bool{
		"messaging_process_duration_seconds": true, "messaging_client_consumed_messages_total": true, "goxstreams_message_latency_seconds": true,
		"messaging_client_operation_duration_seconds": true, "messaging_client_sent_messages_total": true,
	}
	for _, m := range statswatch.Metrics(enough) {
		name := strings.ReplaceAll(m.Name, ".", "_")
		if m.Unit == "s" {
			name += "_seconds"
		}
		if m.Counter {
			name += "_total"
		}
		want[name] = true
	}
	delete(want, "goxstreams_group_lag") // miniredis may not know it
	got := map[string]bool{}
	families, err := registry.Gather()
	require.NoError(t, err)
	for _, f := range families {
		require.NotContains(t, f.GetName(), "_ratio")
		if f.GetName() != "goxstreams_group_lag" {
			got[f.GetName()] = true
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			require.Equal(t, "orders", labels["messaging_destination_name"], f.GetName())
		}
	}
	require.Equal(t, want, got)
}

// Baggage goes along with what is created here.
func TestBaggage(t *testing.T) {
	r := newRig(t, Config{LinkOnly: true})
	r.propagator = propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})
	metadata := message.Metadata{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "baggage": "customer=1"}
	ctx, links := r.within(t.Context(), metadata)
	require.False(t, trace.SpanContextFromContext(ctx).IsValid())
	require.Len(t, links, 1)
	out := message.Metadata{}
	r.propagator.Inject(ctx, propagation.MapCarrier(out))
	require.Equal(t, message.Metadata{"baggage": "customer=1"}, out)
}
