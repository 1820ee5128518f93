package goxstreams

import (
	"context"
	"sync/atomic"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"

	"github.com/goxstreams/watermill-goxstreams/internal/consume"
)

// subscription is one call of Subscribe. How entries are read, kept and given back is
// internal/consume's; what they mean and what becomes of them is here: this is its Work.
type subscription struct {
	*consume.Subscription
	cfg         SubscriberConfig
	topic       string
	deadLetters string
	retry       Retry
	typed       *typed // a Consumer's part; nil without
	log         watermill.LoggerAdapter
	stats       counters

	output chan *message.Message
	done   chan struct{} // output is closed
}

func newSubscription(ctx context.Context, s *Subscriber, topic string) *subscription {
	sub := &subscription{
		cfg: s.config, topic: topic, retry: *s.config.Retry, typed: s.typed, log: s.logger,
		output: make(chan *message.Message), done: make(chan struct{}),
	}
	c := &sub.cfg
	if c.ConsumerGroup != "" {
		sub.deadLetters = c.DeadLetterTopic(topic)
	}
	suspect, last := sub.retry.suspects()
	sub.Subscription = consume.New(ctx, s.shared, consume.Config{
		Topic: topic, Group: c.ConsumerGroup, StartID: c.StartID, MaxConcurrency: c.MaxConcurrency, BatchSize: c.BatchSize,
		WaitForRedis: c.WaitForRedis, NoAck: c.NoAck, DeleteAcked: c.DeleteAcked, ClaimMinIdle: c.ClaimMinIdle, ClaimInterval: c.ClaimInterval,
		CloseTimeout: c.CloseTimeout, ConsumerTimeout: c.ConsumerTimeout, DeadLetters: sub.deadLetters, Suspect: suspect, Last: last,
		TakeAgain: sub.retry.InitialInterval, LeaseLost: ErrLeaseLost, Closed: ErrSubscriberClosed,
		Log: s.logger, Fields: watermill.LogFields{"provider": "redis", "topic": topic, "consumer_group": c.ConsumerGroup},
	}, sub)
	return sub
}

// latest is the subscription that was opened last, if it is still open, for its
// logger: the middlewares have none, and a message that lost its context leads to
// none.
var latest atomic.Pointer[subscription]

// start runs the subscription, and calls ended at the end.
func (s *subscription) start(ended func()) {
	latest.Store(s)
	s.Start()
	go func() {
		<-s.Done()
		close(s.output)
		latest.CompareAndSwap(s, nil)
		ended()
		close(s.done)
	}()
}
