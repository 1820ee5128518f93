package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
)

// group is the consumer group of every measurement.
const group = "bench"

// options say how a system is used.
type options struct {
	concurrency int  // messages unsettled at once
	workers     int  // goroutines that handle them, where the system does not start its own
	router      bool // through a Watermill router
	keys        int  // messages are handled in the order of so many keys; 0: none
	worker      bool // by the methods of a typed worker, without a router
	batch       int  // that worker gets so many messages at once; 0: one
	pool        int  // the client's PoolSize; 0: the default
	fastRetry   bool // nacked messages are redelivered at once, or as soon as the system can
	fastCheck   bool // polling systems poll often

	claimMinIdle time.Duration // 0: the default
}

// A handler gets a message's payload. After an error the message is redelivered.
type handler func(payload []byte) error

// A backend is a system in one measurement.
type backend interface {
	// batch returns a function that publishes the payloads in one call. It prepares
	// what can be reused, messages for example.
	batch(topic string, payloads [][]byte) func() error
	// prepare creates what a consumer needs, such as the group.
	prepare(topic string) error
	consume(topic string, h handler) error
	// left returns how many messages were delivered and are not settled, stored how
	// many the topic has.
	left(topic string) (int64, error)
	stored(topic string) (int64, error)
	remove(topic string) error
	close() error
}

// systems are the constructors, by name.
var systems = map[string]func(*env, options) (backend, error){
	"ours":        newOurs,
	"redisstream": newRedisstream,
	"raw":         newRaw,
	"bare":        newBare,
	"asynq":       newAsynq,
	"gochannel":   newGoChannel,
}

// systemOrder is the order within a round and in the tables.
var systemOrder = []string{"ours", "redisstream", "raw", "bare", "asynq", "gochannel"}

// stream is what the systems on Redis Streams have in common.
type stream struct{ admin *redis.Client }

func (s stream) prepare(topic string) error {
	return s.admin.XGroupCreateMkStream(context.Background(), topic, group, "0").Err()
}

func (s stream) left(topic string) (int64, error) {
	pending, err := s.admin.XPending(context.Background(), topic, group).Result()
	if err != nil {
		return 0, err
	}
	return pending.Count, nil
}

func (s stream) stored(topic string) (int64, error) {
	return s.admin.XLen(context.Background(), topic).Result()
}

func (s stream) remove(topic string) error {
	return s.admin.Del(context.Background(), topic).Err()
}

// messagesOf makes Watermill's messages of payloads.
func messagesOf(payloads [][]byte) []*message.Message {
	msgs := make([]*message.Message, len(payloads))
	for i, p := range payloads {
		msgs[i] = message.NewMessage(watermill.NewUUID(), p)
	}
	return msgs
}

func publishAll(pub message.Publisher, topic string, payloads [][]byte) func() error {
	msgs := messagesOf(payloads)
	return func() error { return pub.Publish(topic, msgs...) }
}

// subscribe consumes a topic with a Watermill Subscriber, through a router or
// by goroutines that range over its channel. The function that it returns ends a
// router; the goroutines end with the Subscriber.
func subscribe(sub message.Subscriber, topic string, o options, h handler) (func() error, error) {
	if o.router {
		return route(sub, topic, h)
	}
	messages, err := sub.Subscribe(context.Background(), topic)
	if err != nil {
		return nil, err
	}
	for range o.workers {
		go func() {
			for msg := range messages {
				if h(msg.Payload) == nil {
					msg.Ack()
				} else {
					msg.Nack()
				}
			}
		}()
	}
	return func() error { return nil }, nil
}

func route(sub message.Subscriber, topic string, h handler) (func() error, error) {
	router := message.NewDefaultRouter(watermill.NopLogger{})
	router.AddConsumerHandler("bench", topic, sub, func(msg *message.Message) error { return h(msg.Payload) })
	var run sync.WaitGroup
	var failed error
	run.Go(func() { failed = router.Run(context.Background()) })
	select {
	case <-router.Running():
	case <-time.After(stalled):
		return nil, errors.New("the router does not start")
	}
	return func() error {
		err := router.Close()
		run.Wait()
		return errors.Join(err, failed)
	}, nil
}

// watermillBackend is a backend over any Watermill Publisher and Subscriber.
type watermillBackend struct {
	pub     message.Publisher
	sub     message.Subscriber
	options options
	ends    []func() error // of routers
}

func (b *watermillBackend) batch(topic string, payloads [][]byte) func() error {
	return publishAll(b.pub, topic, payloads)
}

func (b *watermillBackend) consume(topic string, h handler) error {
	end, err := subscribe(b.sub, topic, b.options, h)
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	b.ends = append(b.ends, end)
	return nil
}

func (b *watermillBackend) close() error {
	var errs []error
	for _, end := range b.ends {
		errs = append(errs, end())
	}
	for _, err := range append(errs, b.sub.Close(), b.pub.Close()) {
		if err != nil && !errors.Is(err, redis.ErrClosed) {
			return err
		}
	}
	return nil
}
