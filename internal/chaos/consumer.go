package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

const (
	subscriberCloseTimeout = 5 * time.Second
	routerCloseTimeout     = 10 * time.Second
)

var (
	errTask   = errors.New("the task fails")
	errDeadly = errors.New("the task ends its process")
)

// consume handles all topics until its context ends. A router does not start while Redis cannot be reached, so it tries again.
func (c child) consume(ctx context.Context) error {
	var runs atomic.Int64
	for {
		err := c.route(ctx, &runs)
		if ctx.Err() != nil {
			return err
		}
		c.logger.Error("The router ended, and begins again", err, nil)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (c child) route(ctx context.Context, runs *atomic.Int64) error {
	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: routerCloseTimeout}, c.logger)
	if err != nil {
		return err
	}
	router.AddMiddleware(c.retry().Middleware)
	var subscribers []*goxstreams.Subscriber
	defer func() {
		began := monotonic()
		for _, subscriber := range subscribers {
			_ = subscriber.Close() // the router has closed those that it started
		}
		if ctx.Err() == nil {
			c.journal.write(rules.Event{Kind: rules.Reopened, Took: monotonic() - began})
		}
	}()
	for _, topic := range topics {
		subscriber, err := goxstreams.NewSubscriber(c.subscriberConfig(topic), c.logger)
		if err != nil {
			return err
		}
		subscribers = append(subscribers, subscriber)
		router.AddConsumerHandler(topic.Name, topic.Name, subscriber, func(msg *message.Message) error {
			return c.handle(msg, runs.Add(1))
		})
	}
	return router.Run(ctx)
}

func (c child) retry() goxstreams.Retry {
	return goxstreams.Retry{
		MaxRetries: c.role.Settings.MaxRetries, InitialInterval: 20 * time.Millisecond, MaxInterval: 200 * time.Millisecond,
	}
}

func (c child) subscriberConfig(topic rules.Topic) goxstreams.SubscriberConfig {
	retry := c.retry()
	config := goxstreams.SubscriberConfig{
		Client: c.client, ConsumerGroup: group, MaxConcurrency: topic.MaxConcurrency,
		BlockTime:    time.Second, // so that a read's own deadline, 10 s later, is within reach of a fault
		ClaimMinIdle: c.role.Settings.ClaimMinIdle, ClaimInterval: c.role.Settings.ClaimInterval,
		Retry: &retry, CloseTimeout: subscriberCloseTimeout, ConsumerTimeout: time.Minute,
		Retention: c.role.Settings.retention(),
		OnDead: func(_ context.Context, dead goxstreams.DeadMessage) {
			c.journal.write(rules.Event{
				Kind: rules.Dead, Topic: dead.Topic, ID: dead.EntryID, UUID: rules.UUIDOf(dead),
				Count: dead.Deliveries, Consumer: dead.Consumer, Error: dead.Reason,
			})
		},
	}
	if topic.Named {
		config.Consumer = c.role.Process
	}
	if topic.Keys > 0 {
		config.OrderingKey = func(msg *message.Message) string { return rules.KeyOf(msg.UUID, topic.Keys) }
	}
	return config
}

// handle does the message's task. It stops when its context ends, because another consumer may have the message then.
func (c child) handle(msg *message.Message, run int64) error {
	delivery, ok := goxstreams.DeliveryFromContext(msg.Context())
	if !ok {
		panic("a message without a delivery")
	}
	event := rules.Event{
		Kind: rules.Started, Topic: delivery.Topic, ID: delivery.ID, UUID: msg.UUID,
		Count: delivery.Count, Consumer: delivery.Consumer, Run: run,
	}
	c.journal.write(event)
	err := work(msg, delivery.Count)
	switch {
	case err == nil:
		event.Kind = rules.Acked
	case errors.Is(err, goxstreams.ErrLeaseLost):
		event.Kind = rules.Lost
	case errors.Is(err, context.Canceled):
		event.Kind = rules.Closed
	case errors.Is(err, errDeadly):
		event.Kind = rules.Crashed
		c.journal.write(event)
		c.crash(delivery.Count)
	default:
		event.Kind = rules.Nacked
	}
	c.journal.write(event)
	return err
}

// crash ends the process as a bug does, or as the kernel does when memory runs out.
func (c child) crash(count int64) {
	if count%2 == 0 {
		os.Exit(2)
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // it takes the kernel a moment
}

func work(msg *message.Message, count int64) error {
	var task Task
	if err := json.Unmarshal(msg.Payload, &task); err != nil {
		return fmt.Errorf("payload of %s: %w", msg.UUID, err)
	}
	timer := time.NewTimer(task.Work)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-msg.Context().Done():
		return fmt.Errorf("%w (%w)", msg.Context().Err(), context.Cause(msg.Context()))
	}
	switch {
	case task.Deadly:
		return errDeadly
	case task.Poison || count <= task.Fails:
		return errTask
	}
	return nil
}
