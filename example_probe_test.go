package goxstreams_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// readiness reports whether the router runs and every subscription is served. It
// makes no call to Redis.
func readiness(router *message.Router, subscriber *goxstreams.Subscriber) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !router.IsRunning() || router.IsClosed() {
			http.Error(w, "starting, or shutting down", http.StatusServiceUnavailable)
			return
		}
		paused := ""
		for _, s := range subscriber.Stats() {
			if s.Err != nil && time.Since(s.Since) > time.Minute { // shorter outages recover without help
				http.Error(w, fmt.Sprintf("%s, since %v: %v", s.Topic, s.Since, s.Err), http.StatusServiceUnavailable)
				return
			}
			if !s.PausedSince.IsZero() { // by somebody, on purpose: ready
				paused += fmt.Sprintf("%s is paused since %v\n", s.Topic, s.PausedSince)
			}
		}
		_, _ = fmt.Fprint(w, paused)
	})
}

// A readiness probe for Kubernetes.
func Example_readiness() {
	client, stop := exampleClient()
	defer stop()
	logger := watermill.NopLogger{}
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "billing"}, logger)
	must(err)
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	must(err)
	router.AddConsumerHandler("bill", "orders", subscriber, func(*message.Message) error { return nil })

	probe := func() int {
		recorder := httptest.NewRecorder()
		readiness(router, subscriber).ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/ready", nil))
		return recorder.Code
	}
	fmt.Println("before:", probe())
	stopRouter := exampleRun(router)
	<-router.Running()
	fmt.Println("running:", probe())
	stopRouter()
	fmt.Println("closed:", probe())
	// Output:
	// before: 503
	// running: 200
	// closed: 503
}
