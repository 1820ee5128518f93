// The cluster example: several topics on a Redis Cluster, each with its dead
// letters in its own slot, handled by one Subscriber.
//
//	cluster          shows it, and ends by itself
//	cluster consume  handles messages until SIGTERM or Ctrl-C, and says at :8080/ready whether it is ready
//	cluster ready    asks that; it is the health check of compose.yaml
//	cluster produce  publishes ten messages a second until SIGTERM or Ctrl-C
//
// REDIS_ADDRS names some nodes of the Cluster: "host:port,host:port". Without
// it the first starts a Cluster of three masters itself, if redis-server is in
// the PATH, else an embedded server. compose.yaml is a deployment of the rest.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// names of topics. A topic is one key, and so lives in one shard: what shall be
// spread over the shards needs several.
var names = []string{"orders", "payments", "invoices", "parcels", "returns", "mails"}

// deadLetters names a topic's dead-letter stream. The braces are a hash tag, by
// which it is in the slot of its topic: Subscribe refuses another one.
func deadLetters(topic string) string { return "dead-letters.{" + topic + "}" }

const group = "example"

// newSubscriber makes one for all topics: it shares connections among them.
func newSubscriber(client redis.UniversalClient, logger watermill.LoggerAdapter) (*goxstreams.Subscriber, error) {
	return goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:          client,
		ConsumerGroup:   group,
		MaxConcurrency:  10,
		DeadLetterTopic: deadLetters,
		Retry:           &goxstreams.Retry{MaxRetries: 2, InitialInterval: 50 * time.Millisecond},
		// Below the router's 30s, which is below compose.yaml's stop_grace_period.
		CloseTimeout: 25 * time.Second,
	}, logger)
}

// newRouter handles all topics.
func newRouter(subscriber message.Subscriber, topics []string, handle message.NoPublishHandlerFunc) (*message.Router, error) {
	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: 30 * time.Second}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	for _, topic := range topics {
		router.AddConsumerHandler("handle "+topic, topic, subscriber, handle)
	}
	return router, nil
}

// handle stands for work. Every hundredth message is hopeless.
func handle(msg *message.Message) error {
	if strings.HasSuffix(string(msg.Payload), "13") {
		return errors.New("there is no hope for it")
	}
	return nil
}

// consume runs until ctx ends, and returns when what is under way is done and acked.
func consume(ctx context.Context, client redis.UniversalClient) error {
	subscriber, err := newSubscriber(client, watermill.NewSlogLogger(nil))
	if err != nil {
		return err
	}
	router, err := newRouter(subscriber, names, handle)
	if err != nil {
		return err
	}
	server := &http.Server{Addr: readyAddr, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !router.IsRunning() {
			http.Error(w, "starting, or stopping", http.StatusServiceUnavailable)
			return
		}
		var lines strings.Builder
		for _, s := range subscriber.Stats() { // no call to Redis
			if s.Err != nil {
				http.Error(w, fmt.Sprintf("%s, since %v: %v", s.Topic, s.Since, s.Err), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintf(&lines, "%s: delivered %d, acked %d, claimed %d, dead %d, lost %d\n", s.Topic, s.Delivered, s.Acked, s.Claimed, s.Dead, s.Lost)
		}
		_, _ = io.WriteString(w, lines.String())
	})}
	go func() { log.Println("the readiness probe ended:", server.ListenAndServe()) }()
	defer server.Close()
	log.Println("consuming", names)
	err = router.Run(ctx)
	log.Println("drained")
	return err
}

const readyAddr = ":8080"

func ready() error {
	response, err := (&http.Client{Timeout: 2 * time.Second}).Get("http://127.0.0.1" + readyAddr + "/ready")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// produce publishes to each topic in turn until ctx ends. What was not stored
// is published again with the same UUID, by which handlers know it.
func produce(ctx context.Context, client redis.UniversalClient) error {
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	log.Println("producing for", names)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		msg := message.NewMessage(watermill.NewUUID(), fmt.Append(nil, n))
		for err := publisher.Publish(names[n%len(names)], msg); err != nil; err = publisher.Publish(names[n%len(names)], msg) {
			log.Println("not published:", err)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
				return err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			log.Println("published", n+1)
			return nil
		}
	}
}

// show publishes to topics of its own, handles that, and looks at the end.
func show(ctx context.Context, client *redis.ClusterClient) error {
	const each = 14 // messages of a topic; the last one is hopeless
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	subscriber, err := newSubscriber(client, nil)
	if err != nil {
		return err
	}
	suffix := "-" + watermill.NewShortUUID()[:8]
	var topics []string
	for _, name := range names {
		topic := name + suffix
		topics = append(topics, topic)
		defer func() {
			for _, key := range []string{topic, deadLetters(topic)} {
				client.Del(context.WithoutCancel(ctx), key) // one by one: only a slot's keys can go together
			}
		}()
		var messages []*message.Message
		for n := range each {
			messages = append(messages, message.NewMessage(watermill.NewUUID(), fmt.Append(nil, n)))
		}
		if err := publisher.Publish(topic, messages...); err != nil {
			return err
		}
	}
	router, err := newRouter(subscriber, topics, handle)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- router.Run(ctx) }()
	acked := map[string]int64{}
	for done := false; !done && ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
		stats := subscriber.Stats()
		done = len(stats) == len(topics)
		for _, s := range stats {
			acked[s.Topic] = s.Acked
			done = done && s.Acked+s.Dead == each
		}
	}
	if err := errors.Join(router.Close(), <-ended, ctx.Err()); err != nil {
		return err
	}

	shards := map[string]bool{}
	for _, topic := range topics {
		shard, err := client.MasterForKey(ctx, topic)
		if err != nil {
			return err
		}
		shards[shard.Options().Addr] = true
		slot, deadSlot := client.ClusterKeySlot(ctx, topic).Val(), client.ClusterKeySlot(ctx, deadLetters(topic)).Val()
		pending, err := client.XPending(ctx, topic, group).Result()
		if err != nil {
			return err
		}
		dead := client.XLen(ctx, deadLetters(topic)).Val()
		fmt.Printf("slot %5d of %s: %d acked in %s, %d in %s\n",
			slot, shard.Options().Addr, acked[topic], topic, dead, deadLetters(topic))
		if slot != deadSlot || acked[topic] != each-1 || dead != 1 || pending.Count != 0 {
			return errors.New("that is not what should be")
		}
	}
	fmt.Printf("%d topics on %d shards; all is handled or dead, nothing is pending.\n", len(topics), len(shards))
	return nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := start(ctx, append(os.Args[1:], "")[0]); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func start(ctx context.Context, command string) error {
	if command == "ready" {
		return ready()
	}
	addrs := strings.Split(os.Getenv("REDIS_ADDRS"), ",")
	if addrs[0] == "" {
		if command != "" {
			return errors.New("REDIS_ADDRS names no node of a Cluster")
		}
		own, stop, err := startServers(ctx)
		if err != nil {
			return err
		}
		defer stop()
		addrs = own
	}
	client := redis.NewClusterClient(&redis.ClusterOptions{
		Addrs:       addrs,
		DialTimeout: time.Second, // a machine that is gone does not answer, and go-redis tries five times (5s each by default)
	})
	defer client.Close() // the library leaves that to you
	switch command {
	case "consume":
		return consume(ctx, client)
	case "produce":
		return produce(ctx, client)
	case "":
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		return show(ctx, client)
	}
	return fmt.Errorf("no such command: %s", command)
}
