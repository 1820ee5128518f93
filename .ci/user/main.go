// Command user is what somebody makes of a release: .ci/release builds it outside the repository, with the library and the
// plugins as they are fetched, and runs it. Its argument is the installed command goxstreams, which it runs too.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxprom"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxui"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(command string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	server, err := miniredis.Run()
	if err != nil {
		return err
	}
	defer server.Close()
	client := redis.NewClient(&redis.Options{Addr: server.Addr()})
	defer client.Close()
	if err := deliver(ctx, client); err != nil {
		return err
	}
	if err := look(client); err != nil {
		return err
	}
	topics, err := exec.CommandContext(ctx, command, "--url", "redis://"+server.Addr(), "topics").CombinedOutput()
	fmt.Printf("%s", topics)
	if err == nil && !strings.Contains(string(topics), "orders") {
		err = errors.New("the command does not see the topic")
	}
	return err
}

// deliver sends a message through the library and both plugins, and looks for it in the metrics.
func deliver(ctx context.Context, client redis.UniversalClient) error {
	telemetry, err := goxotel.New(goxotel.Config{})
	if err != nil {
		return err
	}
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	traced, err := telemetry.Publisher(publisher)
	if err != nil {
		return err
	}
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, nil)
	if err != nil {
		return err
	}
	defer subscriber.Close()
	telemetry.Add(subscriber)
	messages, err := subscriber.Subscribe(ctx, "orders")
	if err != nil {
		return err
	}
	if err := traced.Publish("orders", message.NewMessage("1", []byte("an order"))); err != nil {
		return err
	}
	msg, open := <-messages
	if !open {
		return errors.New("the message does not come")
	}
	msg.Ack()
	return collect(subscriber)
}

// look looks at the operations page.
func look(client redis.UniversalClient) error {
	pages, err := goxui.New(goxui.Config{Client: client})
	if err != nil {
		return err
	}
	defer pages.Close()
	answer := httptest.NewRecorder()
	pages.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/", nil))
	if !strings.Contains(answer.Body.String(), "orders") {
		return fmt.Errorf("the operations page answers %d, without the topic", answer.Code)
	}
	return nil
}

func collect(subscriber *goxstreams.Subscriber) error {
	collector := goxprom.NewCollector(goxprom.Config{})
	collector.Add(subscriber)
	registry := prometheus.NewRegistry()
	if err := registry.Register(collector); err != nil {
		return err
	}
	families, err := registry.Gather()
	if err != nil {
		return err
	}
	if len(families) == 0 {
		return errors.New("there are no metrics")
	}
	fmt.Printf("a message came, and there are %d metrics\n", len(families))
	return nil
}
