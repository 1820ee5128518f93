package main

import (
	"time"

	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
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
	if o.fastRetry {
		config.Retry = &goxstreams.Retry{InitialInterval: time.Nanosecond, MaxInterval: time.Nanosecond} // 0 is the default
	}
	return config
}

func (b *ours) close() error {
	if err := b.watermillBackend.close(); err != nil {
		return err
	}
	return b.client.Close()
}

// redisStream is watermill-redisstream. It closes its clients itself, so that
// Publisher and Subscriber have one each.
type redisStream struct {
	stream
	watermillBackend
}

func newRedisstream(e *env, o options) (backend, error) {
	pub, err := redisstream.NewPublisher(redisstream.PublisherConfig{Client: e.client(o.pool)}, nil)
	if err != nil {
		return nil, err
	}
	// Without a NackResendSleep a nacked message comes again at once.
	config := redisstream.SubscriberConfig{Client: e.client(o.pool), ConsumerGroup: group, MaxIdleTime: o.claimMinIdle}
	sub, err := redisstream.NewSubscriber(config, nil)
	if err != nil {
		return nil, err
	}
	return &redisStream{stream{e.admin}, watermillBackend{pub: pub, sub: sub, options: o}}, nil
}

// goChannel is Watermill's Pub/Sub in memory: what is left is the router's own
// cost. Publish waits for the ack, so that one message is under way at a time.
type goChannel struct{ watermillBackend }

func newGoChannel(_ *env, o options) (backend, error) {
	channel := gochannel.NewGoChannel(gochannel.Config{BlockPublishUntilSubscriberAck: true}, nil)
	return &goChannel{watermillBackend{pub: channel, sub: channel, options: o}}, nil
}

func (goChannel) prepare(string) error         { return nil }
func (goChannel) left(string) (int64, error)   { return 0, nil } // Publish has waited for every ack
func (goChannel) stored(string) (int64, error) { return 0, nil }
func (goChannel) remove(string) error          { return nil }
