package main

import (
	"context"
	"encoding/binary"
	"strconv"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/gochannel"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// ours is this library. Publisher and Subscriber share a client.
type ours struct {
	stream
	watermillBackend
	client *redis.Client
}

func newOurs(e *env, o options) (backend, error) {
	client := e.client(o.pool)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return nil, err
	}
	sub, err := goxstreams.NewSubscriber(oursConfig(client, o), nil)
	if err != nil {
		return nil, err
	}
	return &ours{stream{e.admin}, watermillBackend{pub: pub, sub: sub, options: o}, client}, nil
}

func oursConfig(client redis.UniversalClient, o options) goxstreams.SubscriberConfig {
	config := goxstreams.SubscriberConfig{Client: client, ConsumerGroup: group, MaxConcurrency: o.concurrency, ClaimMinIdle: o.claimMinIdle}
	if o.keys > 0 {
		config.OrderingKey = func(msg *message.Message) string {
			return strconv.FormatUint(binary.BigEndian.Uint64(msg.Payload)%uint64(o.keys), 10)
		}
	}
	if o.fastRetry {
		config.Retry = &goxstreams.Retry{InitialInterval: time.Nanosecond, MaxInterval: time.Nanosecond} // 0 is the default
	}
	return config
}

// consume handles a topic's messages. A worker's payloads are not decoded: JSON takes as
// long whoever calls it.
func (b *ours) consume(topic string, h handler) error {
	if !b.options.worker {
		return b.watermillBackend.consume(topic, h)
	}
	consumer, err := b.consumer(topic, h)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	var failed error
	run.Go(func() { failed = consumer.Run(ctx) })
	b.ends = append(b.ends, func() error {
		cancel()
		run.Wait()
		return failed
	})
	return nil
}

func (b *ours) consumer(topic string, h handler) (interface{ Run(context.Context) error }, error) {
	config := oursConfig(b.client, b.options)
	if b.options.batch > 0 {
		return goxstreams.NewBatchConsumer(worker{h}, goxstreams.BatchConsumerConfig{
			Subscriber: config, Topic: topic, Codec: bytesCodec{}, MaxSize: b.options.batch, MaxWait: 10 * time.Millisecond,
		}, nil)
	}
	return goxstreams.NewConsumer(worker{h}, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic, Codec: bytesCodec{}}, nil)
}

type worker struct{ h handler }

func (w worker) ProcessBatch(_ context.Context, batch []goxstreams.Message[[]byte]) []error {
	var errs []error
	for i, msg := range batch {
		if err := w.h(msg.Body); err != nil {
			if errs == nil {
				errs = make([]error, len(batch))
			}
			errs[i] = err
		}
	}
	return errs
}

func (w worker) Process(_ context.Context, msg goxstreams.Message[[]byte]) error {
	return w.h(msg.Body)
}
func (worker) ProcessBroken(_ context.Context, broken goxstreams.BrokenMessage) error {
	return broken.Err
}
func (worker) ProcessDead(_ context.Context, dead goxstreams.Message[[]byte]) error { return dead.Err }

type bytesCodec struct{}

func (bytesCodec) Encode(event any) ([]byte, error) { return event.([]byte), nil }
func (bytesCodec) Decode(payload []byte, event any) error {
	*event.(*[]byte) = payload
	return nil
}

func (b *ours) close() error {
	if err := b.watermillBackend.close(); err != nil {
		return err
	}
	return b.client.Close()
}

// redisStream is watermill-redisstream. It closes its clients itself, so Publisher and
// Subscriber have one each.
type redisStream struct {
	stream
	watermillBackend
}

func newRedisstream(e *env, o options) (backend, error) {
	pub, err := redisstream.NewPublisher(redisstream.PublisherConfig{Client: e.client(o.pool)}, nil)
	if err != nil {
		return nil, err
	}
	// Without a NackResendSleep a nacked message is redelivered at once.
	config := redisstream.SubscriberConfig{Client: e.client(o.pool), ConsumerGroup: group, MaxIdleTime: o.claimMinIdle}
	sub, err := redisstream.NewSubscriber(config, nil)
	if err != nil {
		return nil, err
	}
	return &redisStream{stream{e.admin}, watermillBackend{pub: pub, sub: sub, options: o}}, nil
}

// goChannel is Watermill's Pub/Sub in memory, for the router's own cost. Publish waits
// for the ack, so only one message is in flight at a time.
type goChannel struct{ watermillBackend }

func newGoChannel(_ *env, o options) (backend, error) {
	channel := gochannel.NewGoChannel(gochannel.Config{BlockPublishUntilSubscriberAck: true}, nil)
	return &goChannel{watermillBackend{pub: channel, sub: channel, options: o}}, nil
}

func (goChannel) prepare(string) error         { return nil }
func (goChannel) left(string) (int64, error)   { return 0, nil } // Publish has waited for every ack
func (goChannel) stored(string) (int64, error) { return 0, nil }
func (goChannel) remove(string) error          { return nil }
