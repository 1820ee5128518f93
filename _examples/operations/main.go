// The operations example serves the operations page of a shop with some traffic: two
// groups, orders that die, and reminders that are delayed.
//
// It runs on an embedded Redis, or on the one at REDIS_ADDR. It looks at its own pages
// once, replays what died by way of them, and fails if that does not work. With -serve
// it goes on until Ctrl-C: open the address that it prints in a browser.
//
// What to copy comes first: mount. The rest is traffic, and a visitor.
package main

import (
	"context"
	"crypto/subtle"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxui"
)

// mount adds the operations page to a program's own pages, at /operations/. Close the
// handler before the server is shut down.
func mount(mux *http.ServeMux, client redis.UniversalClient, password string) (*goxui.Handler, error) {
	pages, err := goxui.New(goxui.Config{
		Client:  client,
		Topics:  []string{orders, reminders}, // also before there is a stream
		Pattern: "shop.*",
		Authorize: func(r *http.Request, a goxui.Action) error {
			if user, _, _ := r.BasicAuth(); a.Verb.Changes() && user != "operator" {
				return errors.New("only operators change something")
			}
			return nil
		},
		Audit: func(r *http.Request, e goxui.AuditEvent) {
			user, _, _ := r.BasicAuth()
			log.Printf("%s: %s %s %s (%d done): %v", user, e.Stage, e.Action.Verb, e.Action.Topic, e.Done, e.Err)
		},
		Interval: time.Second,
	})
	if err != nil {
		return nil, err
	}
	mux.HandleFunc("/operations/", func(w http.ResponseWriter, r *http.Request) {
		if _, given, _ := r.BasicAuth(); subtle.ConstantTimeCompare([]byte(given), []byte(password)) != 1 {
			w.Header().Set("WWW-Authenticate", `Basic realm="operations"`)
			http.Error(w, "Who are you?", http.StatusUnauthorized)
			return
		}
		pages.ServeHTTP(w, r)
	})
	return pages, nil
}

const (
	orders    = "shop.orders"
	reminders = "shop.reminders"
	password  = "example"
)

// shop is the traffic.
type shop struct {
	client    *redis.Client
	publisher *goxstreams.Publisher
	fixed     atomic.Bool // the bug
	number    int
}

// handle opens the shop's two groups, until ctx ends.
func (s *shop) handle(ctx context.Context) (ended <-chan error, err error) {
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	router.AddMiddleware(goxstreams.Retry{MaxRetries: 1, InitialInterval: 50 * time.Millisecond}.Middleware)
	for group, handler := range map[string]message.NoPublishHandlerFunc{
		"billing": func(msg *message.Message) error {
			if !s.fixed.Load() && strings.HasSuffix(msg.UUID, "3") {
				return errors.New("unknown currency CHF")
			}
			return nil
		},
		"shipping": func(*message.Message) error { return nil },
	} {
		subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: s.client, ConsumerGroup: group, MaxConcurrency: 4}, nil)
		if err != nil {
			return nil, err
		}
		router.AddConsumerHandler(group, orders, subscriber, handler)
	}
	done := make(chan error, 1)
	go func() { done <- router.Run(ctx) }()
	select {
	case <-router.Running():
		return done, nil
	case err := <-done:
		return nil, err
	}
}

// order publishes some orders, and for the last one a reminder of tomorrow.
func (s *shop) order(n int) error {
	for range n {
		s.number++
		if err := s.publisher.Publish(orders, message.NewMessage(fmt.Sprintf("order-%d", s.number), []byte(`{"Article": "kettle"}`))); err != nil {
			return err
		}
	}
	reminder := message.NewMessage(fmt.Sprintf("reminder-%d", s.number), []byte(`{}`))
	delay.Message(reminder, delay.For(24*time.Hour))
	return s.publisher.Publish(reminders, reminder)
}

// visitor does what somebody would in a browser.
type visitor struct{ site string }

// visit returns the text of a page, after redirections, and its address.
func (v *visitor) visit(ctx context.Context, method, at string, form url.Values) (page string, final *url.URL, err error) {
	r, err := http.NewRequestWithContext(ctx, method, at, strings.NewReader(form.Encode()))
	if err != nil {
		return "", nil, err
	}
	r.SetBasicAuth("operator", password)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Origin", strings.TrimSuffix(v.site, "/operations/"))
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", nil, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s", method, at, answer.Status)
	}
	return string(body), answer.Request.URL, err
}

// until visits a page until it has what the pattern says, and returns that.
func (v *visitor) until(ctx context.Context, at, pattern string) (string, error) {
	for {
		page, _, err := v.visit(ctx, http.MethodGet, at, nil)
		if err != nil {
			return "", err
		}
		if found := regexp.MustCompile(pattern).FindStringSubmatch(page); found != nil {
			return found[len(found)-1], nil
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("%s has no %q", at, pattern)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// replay replays all dead letters of the topic with the reason, and returns the last line of that page.
func (v *visitor) replay(ctx context.Context, topic, reason string) (string, error) {
	form := url.Values{"do": {"replay"}, "which": {"all"}, "reason": {reason}}
	_, job, err := v.visit(ctx, http.MethodPost, v.site+"dead?t="+url.QueryEscape(topic), form)
	if err != nil {
		return "", err
	}
	count, err := v.until(ctx, job.String(), `name="count" value="(\d+)"`)
	if err != nil {
		return "", err
	}
	if _, _, err := v.visit(ctx, http.MethodPost, job.String(), url.Values{"do": {"confirm"}, "count": {count}}); err != nil {
		return "", err
	}
	return v.until(ctx, job.String(), `Replayed \d+ of \d+ dead letters`)
}

func main() {
	serve := flag.Bool("serve", false, "go on until Ctrl-C")
	flag.Parse()
	log.SetFlags(0)
	log.SetOutput(os.Stdout)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *serve); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, serve bool) error {
	addr := os.Getenv("REDIS_ADDR")
	if addr == "" {
		server, err := miniredis.Run()
		if err != nil {
			return err
		}
		defer server.Close()
		addr = server.Addr()
	}
	client := redis.NewClient(&redis.Options{Addr: addr})
	defer client.Close()
	if err := forget(ctx, client); err != nil {
		return err
	}
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	defer publisher.Close()
	s := &shop{client: client, publisher: publisher}
	handling, stop := context.WithCancel(ctx)
	defer stop()
	ended, err := s.handle(handling)
	if err != nil {
		return err
	}

	mux := http.NewServeMux()
	pages, err := mount(mux, client, password)
	if err != nil {
		return err
	}
	defer pages.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = server.Serve(listener) }() // until it is closed
	defer server.Close()
	site := fmt.Sprintf("http://%s/operations/", listener.Addr())

	if serve {
		fmt.Printf("Open %s as operator, with the password %q.\n", site, password)
		return s.traffic(ctx)
	}
	if err := s.look(ctx, site); err != nil {
		return err
	}
	stop()
	return <-ended
}

// traffic publishes orders until ctx ends.
func (s *shop) traffic(ctx context.Context) error {
	for n := 1; ; n = n*7%40 + 1 {
		if err := s.order(n); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// look is the visitor's part.
func (s *shop) look(ctx context.Context, site string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	v := &visitor{site: site}
	if err := s.order(50); err != nil {
		return err
	}
	letters := site + "dead?t=" + orders
	if _, err := v.until(ctx, letters, `5 entries in`); err != nil {
		return err
	}
	fmt.Println("The pages show 5 dead letters:")
	reason, err := v.until(ctx, letters, `data-label="Reason">([^<]+)<`)
	if err != nil {
		return err
	}
	fmt.Println("  " + reason)
	fmt.Println("The bug is fixed, and they are replayed:")
	s.fixed.Store(true)
	done, err := v.replay(ctx, orders, "currency")
	if err != nil {
		return err
	}
	fmt.Println("  " + done)
	if _, err := v.until(ctx, letters, `0 entries in`); err != nil {
		return err
	}
	waiting, err := v.until(ctx, site+"delayed?t="+reminders, `(\d+) delayed message`)
	if err != nil {
		return err
	}
	fmt.Println("Reminders that wait for tomorrow: " + waiting)
	return nil
}

// forget deletes what an earlier run has left.
func forget(ctx context.Context, client *redis.Client) error {
	keys, err := client.Keys(ctx, "shop.*").Result()
	if err != nil || len(keys) == 0 {
		return err
	}
	return client.Del(ctx, keys...).Err()
}
