// The observability example watches a Watermill router: by metrics, Watermill's
// and this library's on one Prometheus endpoint, and by traces, where one trace
// spans a message's publication, its deliveries, its way to the dead-letter
// stream, and what the handler publishes.
//
// It runs on an embedded Redis, or on the one at REDIS_ADDR, scrapes itself once,
// prints the traces, and fails if one is not whole or a metric is missing. With
// -serve it goes on, with some load, until Ctrl-C: for a Prometheus of yours.
//
// What to copy comes first: watch. The rest publishes, and looks at the end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/metrics"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxprom"
)

const group = "billing"

// shop is all that the example's process has.
type shop struct {
	client           *redis.Client
	orders, invoices string // topics
	registry         *prometheus.Registry
	tracing          *sdktrace.TracerProvider
	publisher        message.Publisher
	router           *message.Router
}

// watch makes a router with a handler, and all that watches both.
func (s *shop) watch(spans sdktrace.SpanExporter, handler message.HandlerFunc) error {
	// An application sets these up once, with an exporter for its own backend.
	s.tracing = sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	otel.SetTracerProvider(s.tracing)
	otel.SetTextMapPropagator(propagation.TraceContext{})
	telemetry, err := goxotel.New(goxotel.Config{Client: s.client})
	if err != nil {
		return err
	}
	s.client.AddHook(telemetry.Hook()) // to measure acks

	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: s.client}, nil)
	if err != nil {
		return err
	}
	if s.publisher, err = telemetry.Publisher(publisher); err != nil {
		return err
	}
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: s.client, ConsumerGroup: group, MaxConcurrency: 4,
		OnDead: telemetry.OnDead(nil), // or your own OnDead
	}, nil)
	if err != nil {
		return err
	}
	if s.router, err = message.NewRouter(message.RouterConfig{}, watermill.NopLogger{}); err != nil {
		return err
	}

	// Watermill's metrics of publishers, subscribers and handlers, and ours, on
	// one registry.
	s.registry = prometheus.NewRegistry()
	metrics.NewPrometheusMetricsBuilder(s.registry, "", "").AddPrometheusRouterMetrics(s.router)
	collector := goxprom.NewCollector(goxprom.Config{})
	collector.Add(subscriber)
	s.router.AddPublisherDecorators(collector.Publisher)
	s.router.AddMiddleware(collector.Middleware) // before Retry, so that it sees what that returns
	if s.publisher, err = collector.Publisher(s.publisher); err != nil {
		return err
	}
	if err := s.registry.Register(collector); err != nil {
		return err
	}

	s.router.AddPublisherDecorators(telemetry.Publisher)
	s.router.AddMiddleware(
		telemetry.Middleware, // first, so that it sees what the others return
		goxstreams.Retry{MaxRetries: 1, InitialInterval: 50 * time.Millisecond}.Middleware,
	)

	s.router.AddHandler("invoice", s.orders, subscriber, s.invoices, publisher, handler)
	return nil
}

// serve opens the endpoint that a Prometheus scrapes.
func (s *shop) serve(addr string) (url string, closeServer func() error, err error) {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return "", nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(listener) }() // until it is closed
	return fmt.Sprintf("http://%s/metrics", listener.Addr()), server.Close, nil
}

// makeInvoice is the handler. Spans of yours within msg.Context() belong to the
// trace too.
func makeInvoice(order *message.Message) ([]*message.Message, error) {
	_, span := otel.Tracer("shop").Start(order.Context(), "ask the tax service")
	defer span.End()
	delivery, _ := goxstreams.DeliveryFromContext(order.Context())
	switch {
	case order.UUID == "flaky" && delivery.RetryCount() == 0:
		return nil, errors.New("the tax service does not answer")
	case order.UUID == "hopeless":
		return nil, errors.New("the customer has no address")
	case order.UUID == "slow":
		time.Sleep(50 * time.Millisecond)
	}
	return []*message.Message{message.NewMessage(order.UUID+"-invoice", []byte("for "+order.UUID))}, nil
}

// wantTrees are the traces of the three orders, as they must be.
const wantTrees = `send orders: fine
  process orders: fine, delivery 1
    ask the tax service
    send invoices: fine-invoice
send orders: flaky
  process orders: flaky, delivery 1, failed: the tax service does not answer
    ask the tax service
  process orders: flaky, delivery 2
    ask the tax service
    send invoices: flaky-invoice
send orders: hopeless
  process orders: hopeless, delivery 1, failed: the customer has no address
    ask the tax service
  process orders: hopeless, delivery 2, failed: the customer has no address, dead
    ask the tax service
  dead_letter orders: hopeless, exhausted after delivery 2
`

// wantMetrics are the lines of the scrape that must be there.
var wantMetrics = []string{
	`goxstreams_messages_acked_total{group="billing",topic="orders"} 2`,
	`goxstreams_messages_dead_lettered_total{group="billing",topic="orders"} 1`,
	`goxstreams_messages_delivered_total{group="billing",topic="orders"} 5`,
	`goxstreams_messages_nacked_total{group="billing",topic="orders"} 3`,
	`goxstreams_messages_redelivered_total{group="billing",topic="orders"} 2`,
	`goxstreams_topic_dead_letters{dead_letter_topic="orders.dead{orders}",topic="orders"} 1`,
	`goxstreams_topic_entries{topic="orders"} 3`,
	`goxstreams_group_pending_entries{group="billing",topic="orders"} 0`,
	`goxstreams_subscriptions_failing{group="billing",topic="orders"} 0`,
	`goxstreams_handler_duration_seconds_count{group="billing",success="false",topic="orders"} 3`,
	`goxstreams_handler_duration_seconds_count{group="billing",success="true",topic="orders"} 2`,
	`goxstreams_message_latency_seconds_count{group="billing",topic="orders"} 2`,
	`goxstreams_publisher_messages_total{outcome="stored",topic="invoices"} 2`,
	`goxstreams_publisher_messages_total{outcome="stored",topic="orders"} 3`,
	`handler_execution_time_seconds_count{handler_name="invoice",success="false"} 3`,
	`handler_execution_time_seconds_count{handler_name="invoice",success="true"} 2`,
	`publish_time_seconds_count{handler_name="invoice",publisher_name="goxstreams.Publisher",success="true"} 2`,
	`subscriber_messages_received_total{acked="acked",handler_name="invoice",subscriber_name="goxstreams.Subscriber"} 2`,
	`subscriber_messages_received_total{acked="nacked",handler_name="invoice",subscriber_name="goxstreams.Subscriber"} 3`,
}

func (s *shop) run(ctx context.Context, addr string, serve bool) error {
	defer s.client.Del(context.WithoutCancel(ctx), s.orders, s.invoices, goxstreams.DeadLetterTopic(s.orders))
	spans := tracetest.NewInMemoryExporter()
	if err := s.watch(spans, makeInvoice); err != nil {
		return err
	}
	url, closeServer, err := s.serve(addr)
	if err != nil {
		return err
	}
	defer closeServer()

	for _, uuid := range []string{"fine", "flaky", "hopeless"} {
		if err := s.publisher.Publish(s.orders, message.NewMessage(uuid, nil)); err != nil {
			return err
		}
	}
	routing, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- s.router.Run(routing) }()

	// The topics' names have a suffix, so that runs on one Redis do not meet.
	plain := strings.NewReplacer(s.invoices, "invoices", s.orders, "orders").Replace
	var scraped, trees string
	var missing []string
	bounded, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	for {
		if scraped, err = scrape(bounded, url); err != nil {
			return err
		}
		trees = plain(tree(spans.GetSpans()))
		missing = slices.DeleteFunc(slices.Clone(wantMetrics), func(line string) bool {
			return slices.Contains(strings.Split(plain(scraped), "\n"), line)
		})
		if trees == wantTrees && len(missing) == 0 {
			break
		}
		select {
		case <-time.After(50 * time.Millisecond):
			continue
		case <-bounded.Done():
		}
		break
	}
	fmt.Print("\nScraped from the endpoint:\n\n")
	for line := range strings.Lines(plain(scraped)) {
		if slices.Contains(wantMetrics, strings.TrimSuffix(line, "\n")) {
			fmt.Print("  ", line)
		}
	}
	fmt.Printf("\nThe traces:\n\n%s\n", trees)
	if trees != wantTrees {
		return errors.Join(fmt.Errorf("the traces should be:\n%s", wantTrees), ctx.Err())
	}
	if len(missing) > 0 {
		return errors.Join(fmt.Errorf("of the metrics these are missing:\n%s\nin:\n%s", strings.Join(missing, "\n"), plain(scraped)), ctx.Err())
	}
	if serve {
		fmt.Printf("Serving %s until Ctrl-C.\n", url)
		s.load(ctx)
	}
	stop()
	return errors.Join(s.router.Close(), <-ended)
}

// load publishes orders until ctx ends, more and fewer of them, every minute
// many slow ones at once. One in five fails once, one in fifty dies.
func (s *shop) load(ctx context.Context) {
	if err := s.tracing.Shutdown(ctx); err != nil { // what is in memory has been printed
		fmt.Fprintln(os.Stderr, "traces:", err)
	}
	burst := time.NewTicker(time.Minute)
	defer burst.Stop()
	for n := 0; ; n++ {
		uuids := []string{"order"}
		switch {
		case n%50 == 0:
			uuids[0] = "hopeless"
		case n%5 == 0:
			uuids[0] = "flaky"
		}
		wave := 1 + math.Sin(2*math.Pi*float64(time.Now().UnixMilli()%90_000)/90_000) // 0 to 2
		select {
		case <-burst.C:
			uuids = slices.Repeat([]string{"slow"}, 1000)
		case <-time.After(time.Duration(float64(10*time.Millisecond) + (2-wave)*float64(50*time.Millisecond))):
		case <-ctx.Done():
			return
		}
		orders := make([]*message.Message, len(uuids))
		for i, uuid := range uuids {
			orders[i] = message.NewMessage(uuid, nil)
		}
		if err := s.publisher.Publish(s.orders, orders...); err != nil {
			fmt.Fprintln(os.Stderr, "publish:", err)
		}
	}
}

func scrape(ctx context.Context, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("scrape: %s: %s", response.Status, body)
	}
	return string(body), err
}

func main() {
	serve := flag.Bool("serve", false, "keep the endpoint open, with some load, until Ctrl-C")
	addr := flag.String("addr", "127.0.0.1:0", "where the endpoint listens")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := start(ctx, *addr, *serve); err != nil {
		fmt.Fprintln(os.Stderr, "observability:", err)
		os.Exit(1)
	}
}

func start(ctx context.Context, endpoint string, serve bool) error {
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
	orders := "orders-" + watermill.NewShortUUID()
	s := &shop{client: client, orders: orders, invoices: orders + "-invoices"}
	return s.run(ctx, endpoint, serve)
}
