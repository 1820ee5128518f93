// The example of goxstreams, with this library: a producer adds an event every
// 100 ms, and a worker handles them, which fails one time in twenty.
//
// It runs on an embedded Redis, or on the one at REDIS_ADDR, for ten seconds
// (-for changes that) or until Ctrl-C. What to copy comes first: the event, the
// worker, consume, produce. The rest is for the account at the end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

type Event struct {
	Number   int
	Message  string
	SubEvent SubEvent
}

type SubEvent struct {
	Name        string
	SubSubEvent SubSubEvent
}

type SubSubEvent struct {
	Value int
}

// hopeless is the number of an event that fails whenever it is tried.
const hopeless = 13

// Worker handles the events of a topic. Its methods are called concurrently.
type Worker struct {
	account account
}

// Process handles an event. After an error it comes again, later.
func (w *Worker) Process(ctx context.Context, msg goxstreams.Message[Event]) error {
	var err error
	switch {
	case msg.Body.Number == hopeless:
		err = errors.New("there is no hope for it")
	case rand.IntN(20) == 0:
		err = errors.New("bad luck")
	}
	w.account.tried(msg.Body.Number, msg.RetryCount, err)
	if err != nil {
		fmt.Printf("failed     retry %d  %s  %v: %v\n", msg.RetryCount, msg.ID, msg.Body, err)
		return err
	}
	fmt.Printf("processed  retry %d  %s  %v\n", msg.RetryCount, msg.ID, msg.Body)
	return nil
}

// ProcessBroken handles what is no Event.
func (w *Worker) ProcessBroken(ctx context.Context, broken goxstreams.BrokenMessage) error {
	fmt.Printf("BROKEN     retry %d  %s  %q: %v\n", broken.RetryCount, broken.ID, broken.Fields, broken.Err)
	w.account.sawBroken()
	return nil // it is acked and gone
}

// ProcessDead handles an event whose retries are used up.
func (w *Worker) ProcessDead(ctx context.Context, dead goxstreams.Message[Event]) error {
	fmt.Printf("DEAD       retry %d  %s  %v: %v\n", dead.RetryCount, dead.ID, dead.Body, dead.Err)
	w.account.sawDead(dead.Body.Number)
	return goxstreams.ErrDead // to the dead-letter stream with it; nil: gone
}

const group = "mygroup"

// consume handles events until ctx ends, and returns when those under way are
// done and acked.
func consume(ctx context.Context, client *redis.Client, worker *Worker, topic string) error {
	consumer, err := goxstreams.NewConsumer(worker, goxstreams.ConsumerConfig{
		Topic: topic,
		Subscriber: goxstreams.SubscriberConfig{
			Client:         client,
			ConsumerGroup:  group,
			MaxConcurrency: 20,
			Retry:          &goxstreams.Retry{MaxRetries: 3, InitialInterval: 200 * time.Millisecond},
			// A stream that goxstreams writes to, or reads from:
			// Unmarshaler: goxstreams.BodyMarshaler{},
			// (and Marshaler: goxstreams.BodyMarshaler{} in the PublisherConfig).
		},
	}, nil) // a logger would tell more
	if err != nil {
		return err
	}
	return consumer.Run(ctx)
}

// produce adds an event every 100 ms until ctx ends, and returns how many.
func produce(ctx context.Context, client *redis.Client, topic string) (int, error) {
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return 0, err
	}
	producer := goxstreams.NewProducer[Event](publisher, goxstreams.ProducerConfig{})
	for n := 0; ; n++ {
		event := Event{n, "message", SubEvent{"name", SubSubEvent{rand.IntN(1000)}}}
		// Without ctx's end: whether an event was stored shall not depend on it.
		if err := producer.Produce(context.WithoutCancel(ctx), event, topic); err != nil {
			return n, err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return n + 1, nil
		}
	}
}

// account is what became of the events, by their numbers: one that comes twice
// is still one.
type account struct {
	sync.Mutex
	processed, dead map[int]bool
	retries, broken int
}

func (a *account) tried(number int, retryCount int64, err error) {
	a.Lock()
	defer a.Unlock()
	if retryCount > 0 {
		a.retries++
	}
	if err == nil {
		a.processed[number] = true
	}
}

func (a *account) sawBroken() {
	a.Lock()
	defer a.Unlock()
	a.broken++
}

func (a *account) sawDead(number int) {
	a.Lock()
	defer a.Unlock()
	a.dead[number] = true
}

// missing returns how many of the events have not come to their end.
func (a *account) missing(produced int) int {
	a.Lock()
	defer a.Unlock()
	missing := 0
	for n := range produced {
		if !a.processed[n] && !a.dead[n] {
			missing++
		}
	}
	return missing
}

func run(ctx context.Context, client *redis.Client) error {
	topic := "mystream-" + watermill.NewShortUUID()[:8]
	deadLetters := goxstreams.DeadLetterTopic(topic)
	background := context.WithoutCancel(ctx)
	defer client.Del(background, topic, deadLetters)

	worker := &Worker{account{processed: make(map[int]bool), dead: make(map[int]bool)}}
	consuming, stop := context.WithCancel(background)
	defer stop()
	consumed := make(chan error, 1)
	go func() { consumed <- consume(consuming, client, worker, topic) }()

	// One entry is no event: somebody tried something by hand.
	if err := client.XAdd(ctx, &redis.XAddArgs{Stream: topic, Values: []string{"hello", "world"}}).Err(); err != nil {
		return err
	}
	produced, err := produce(ctx, client, topic)
	if err != nil {
		return err
	}

	// The last ones get the time for their retries; then Run drains.
	fmt.Println("\nNo more events.")
	for deadline := time.Now().Add(10 * time.Second); worker.account.missing(produced) > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	if err := <-consumed; err != nil {
		return err
	}

	pending, err := client.XPending(background, topic, group).Result()
	if err != nil {
		return err
	}
	queue, err := goxstreams.NewDeadLetterQueue(client, deadLetters)
	if err != nil {
		return err
	}
	dead := 0
	for d, err := range queue.All(background, "") {
		if err != nil {
			return err
		}
		dead++
		fmt.Printf("In %s: %s, %s after %d deliveries: %s\n", deadLetters, d.Message.Payload, d.Kind, d.Deliveries, d.Reason)
	}
	a := &worker.account
	lost := a.missing(produced)
	fmt.Printf("produced %d, processed %d, retried %d, dead %d, broken %d, pending %d, lost %d\n",
		produced, len(a.processed), a.retries, dead, a.broken, pending.Count, lost)
	if lost > 0 || pending.Count > 0 || a.broken == 0 || dead != len(a.dead) {
		return errors.New("not everything is accounted for")
	}
	return nil
}

func main() {
	duration := flag.Duration("for", 10*time.Second, "how long to produce events")
	flag.Parse()
	if err := start(*duration); err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		os.Exit(1)
	}
}

func start(duration time.Duration) error {
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

	fmt.Printf("An event every 100 ms, for %v; Ctrl-C ends it sooner. Event %d always fails, the others one time in twenty.\n\n", duration, hopeless)
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	context.AfterFunc(ctx, cancel) // a second Ctrl-C ends it at once
	ctx, cancelTime := context.WithTimeout(ctx, duration)
	defer cancelTime()
	return run(ctx, client)
}
