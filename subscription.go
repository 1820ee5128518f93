package goxstreams

import (
	"context"
	"math/bits"
	"sync/atomic"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"

	"github.com/goxstreams/watermill-goxstreams/internal/consume"
)

// subscription is one call of Subscribe. internal/consume reads, keeps and releases
// the entries; this type implements its Work: it decodes entries and decides their
// outcomes.
type subscription struct {
	*consume.Subscription
	cfg         SubscriberConfig
	topic       string
	deadLetters string
	retry       Retry
	typed       typed // the Consumer's part; empty without a Consumer
	log         watermill.LoggerAdapter
	stats       counters

	output  chan *message.Message  // closed when the subscription has ended
	handler func(*message.Message) // acks the message, or it is nacked; nil: output's receiver has it
}

func newSubscription(ctx context.Context, s *Subscriber, topic string, handler func(*message.Message)) *subscription {
	sub := &subscription{
		cfg: s.config, topic: topic, retry: *s.config.Retry, typed: s.typed, log: s.logger,
		output: make(chan *message.Message), handler: handler,
	}
	group := s.config.ConsumerGroup
	if group != "" {
		sub.deadLetters = s.config.DeadLetterTopic(topic)
	}
	cfg := s.settings()
	cfg.Topic, cfg.DeadLetters = topic, sub.deadLetters
	cfg.Fields = watermill.LogFields{"provider": "redis", "topic": topic, "consumer_group": group}
	sub.Subscription = consume.New(ctx, s.shared, cfg, sub)
	return sub
}

// settings returns what the subscriptions of all topics have in common.
func (s *Subscriber) settings() consume.Config {
	c := &s.config
	suspect, last := c.Retry.suspects()
	if suspect > 0 && s.typed.batch != nil { // the first deliveries after crashes find their cause by halving a batch
		suspect += int64(bits.Len(uint(s.typed.maxSize - 1)))
	}
	return consume.Config{
		Group: c.ConsumerGroup, Consumer: c.Consumer, StartID: c.StartID, MaxConcurrency: c.MaxConcurrency,
		MaxBatch: s.typed.maxSize, MaxWait: s.typed.maxWait, BatchSize: c.BatchSize, BlockTime: c.BlockTime,
		WaitForRedis: c.WaitForRedis, NoAck: c.NoAck, DeleteAcked: c.DeleteAcked, Retention: c.retention(),
		KeepDeadLetters: c.KeepDeadLetters, ClaimMinIdle: c.ClaimMinIdle, ClaimInterval: c.ClaimInterval,
		CloseTimeout: c.CloseTimeout, ConsumerTimeout: c.ConsumerTimeout, Suspect: suspect, Last: last, Keyed: c.OrderingKey != nil,
		TakeAgain: c.Retry.InitialInterval, LeaseLost: ErrLeaseLost, Closed: ErrSubscriberClosed, Log: s.logger,
	}
}

// latest is the most recently opened subscription, if it is still open. The
// middlewares log through it: they have no logger of their own, and a message
// without its context does not lead to its subscription.
var latest atomic.Pointer[subscription]
