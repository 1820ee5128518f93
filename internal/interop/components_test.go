package interop

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/cqrs"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/components/fanin"
	"github.com/ThreeDotsLabs/watermill/components/forwarder"
	"github.com/ThreeDotsLabs/watermill/components/metrics"
	"github.com/ThreeDotsLabs/watermill/components/requestreply"
	"github.com/ThreeDotsLabs/watermill/components/requeuer"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Watermill's components, unchanged, on our Publisher and Subscriber, each with
// failures.

// Watermill's requeuer reads our dead letters: topic_poisoned says where they came
// from.
func TestComponents_Requeuer(t *testing.T) {
	s := newSystem(t)
	s.expectErrors("Malformed entry")
	orders, hospital := s.topic("orders"), s.topic("hospital")
	dead := goxstreams.DeadLetterTopic(orders)

	var handled book
	var recovered atomic.Bool
	router := s.router()
	router.AddConsumerHandler("billing", orders, s.subscriber(), func(msg *message.Message) error {
		handled.note(msg)
		if msg.UUID == "hopeless" || msg.UUID == "poisoned" && !recovered.Load() {
			return errors.New(msg.UUID)
		}
		return nil
	})
	s.run(router)
	poisoned := newMessage("poisoned", []byte("payload"), message.Metadata{"key": "value"})
	s.publish(orders, poisoned, message.NewMessage("hopeless", nil))
	fields := []string{"no", "message", "twice", "1", "twice", "2"}
	brokenID := s.client.XAdd(t.Context(), &redis.XAddArgs{Stream: orders, Values: fields}).Val()
	s.requireDead(orders, 3)

	// The first attempt to publish each of them fails, which loses none.
	recovered.Store(true)
	hospitalRouter := s.router()
	_, err := requeuer.NewRequeuer(requeuer.Config{
		Subscriber: s.subscriber(func(c *goxstreams.SubscriberConfig) {
			c.ConsumerGroup = "requeuer"
			c.DeleteAcked = true // a requeued message is not a dead letter any more
			c.Retry = nil
		}),
		SubscribeTopic: dead,
		Publisher:      &failing{Publisher: s.publisher(), fails: func(attempt int, _ string) bool { return attempt == 1 }},
		GeneratePublishTopic: func(p requeuer.GeneratePublishTopicParams) (string, error) {
			if n, _ := strconv.Atoi(p.Message.Metadata.Get(requeuer.RetriesKey)); n >= 2 {
				return hospital, nil
			}
			return p.Message.Metadata.Get(middleware.PoisonedTopicKey), nil
		},
		Router: hospitalRouter,
	}, s.log)
	require.NoError(t, err)
	s.run(hospitalRouter)

	s.eventually("all are requeued", func() bool {
		return handled.count("poisoned") == 4 && handled.count("hopeless") == 9 && handled.count(brokenID) == 1 && s.length(hospital) == 1
	})
	s.requireSettled(orders, group)
	s.requireSettled(dead, "requeuer")
	require.Zero(t, s.length(dead))

	got := handled.last("poisoned")
	require.EqualValues(t, 1, got.delivery.Count, "it is a new message")
	require.Equal(t, "payload", string(got.msg.Payload))
	require.Equal(t, "value", got.msg.Metadata["key"])
	require.Equal(t, "1", got.msg.Metadata[requeuer.RetriesKey], "the attempt that failed has left no trace")
	require.Equal(t, orders, got.msg.Metadata[middleware.PoisonedTopicKey])
	// SubscriberConfig.Retry sees a Nack only: the error's text needs a middleware.
	require.Equal(t, goxstreams.ErrRetriesExhausted.Error(), got.msg.Metadata[middleware.ReasonForPoisonedKey])

	// The handler can reject a broken one by its kind; nothing of it is lost.
	broken := handled.last(brokenID)
	require.Equal(t, goxstreams.Broken.String(), broken.msg.Metadata[goxstreams.DeadKindKey])
	was, err := goxstreams.UnpackFields(broken.msg.Payload)
	require.NoError(t, err)
	require.Equal(t, fields, was)

	// The hopeless one has died three times by now; its metadata is about the last time.
	end := s.entries(hospital)[0]
	require.Equal(t, "hopeless", end.UUID)
	require.Equal(t, "3", end.Metadata[requeuer.RetriesKey])
	require.Equal(t, "3", end.Metadata[goxstreams.DeadDeliveriesKey])
	require.Equal(t, handled.last("hopeless").delivery.ID, end.Metadata[goxstreams.DeadEntryIDKey])
}

// A dead letter that the requeuer refuses stays pending. With a retry limit it stops
// no other; without one it would be retried before its successors.
func TestComponents_RequeuerRefuses(t *testing.T) {
	s := newSystem(t)
	s.expectErrors("A message died on a dead-letter stream; it stays pending there", "Malformed entry")
	orders := s.topic("orders")
	dead := goxstreams.DeadLetterTopic(orders)
	billing := s.router()
	var handled book
	var recovered atomic.Bool
	billing.AddConsumerHandler("billing", orders, s.subscriber(), func(msg *message.Message) error {
		if handled.note(msg); !recovered.Load() {
			return errors.New("not yet")
		}
		return nil
	})
	s.run(billing)
	fields := []string{"no", "message"}
	s.client.XAdd(t.Context(), &redis.XAddArgs{Stream: orders, Values: fields})
	s.publish(orders, message.NewMessage("fine", nil))
	s.requireDead(orders, 2)

	recovered.Store(true)
	router := s.router()
	refused := errors.New("broken ones are for a human")
	_, err := requeuer.NewRequeuer(requeuer.Config{
		Subscriber: s.subscriber(func(c *goxstreams.SubscriberConfig) {
			c.ConsumerGroup, c.DeleteAcked = "requeuer", true
		}),
		SubscribeTopic: dead,
		Publisher:      s.publisher(),
		GeneratePublishTopic: func(p requeuer.GeneratePublishTopicParams) (string, error) {
			if p.Message.Metadata.Get(goxstreams.DeadKindKey) == goxstreams.Broken.String() {
				return "", refused
			}
			return p.Message.Metadata.Get(middleware.PoisonedTopicKey), nil
		},
		Router: router,
	}, s.log)
	require.NoError(t, err)
	stop := s.run(router)
	s.eventually("the one that is fine is handled", func() bool { return handled.count("fine") == 4 })
	s.eventually("the broken one is alone", func() bool { return s.length(dead) == 1 })
	s.eventually("it died once more", func() bool { return s.logged("A message died on a dead-letter stream; it stays pending there") > 0 })
	stop()
	require.EqualValues(t, 1, s.pending(dead, "requeuer"))
	letter := s.requireDead(orders, 1)[0]
	require.Equal(t, goxstreams.Broken, letter.Kind)
	require.Equal(t, fields, letter.Fields)
}

// An outbox: messages of the decorated publisher reach their topic in order, although
// every second attempt to forward one fails, and some fail after it was published.
func TestComponents_Forwarder(t *testing.T) {
	s := newSystem(t)
	outbox, topics := s.topic("outbox"), []string{s.topic("a"), s.topic("b")}

	decorated := forwarder.NewPublisher(s.publisher(), forwarder.PublisherConfig{ForwarderTopic: outbox})
	want := map[string][]*message.Message{}
	for i := range 20 {
		if i == 7 {
			s.publish(outbox, message.NewMessage("no envelope", nil))
		}
		topic := topics[i%2]
		msg := newMessage(fmt.Sprint(i), []byte(fmt.Sprint("payload ", i)), message.Metadata{"i": fmt.Sprint(i)})
		require.NoError(t, decorated.Publish(topic, msg))
		want[topic] = append(want[topic], msg)
		if i%5 == 0 { // its answer gets lost, so it is there twice in a row
			want[topic] = append(want[topic], msg)
		}
	}

	daemon, err := forwarder.NewForwarder(
		s.subscriber(func(c *goxstreams.SubscriberConfig) { c.Retry = nil }),
		&failing{
			Publisher: s.publisher(),
			fails:     func(attempt int, _ string) bool { return attempt == 1 },
			stores:    func(uuid string) bool { i, _ := strconv.Atoi(uuid); return i%5 == 0 },
		},
		s.log,
		forwarder.Config{ForwarderTopic: outbox, Middlewares: []message.HandlerMiddleware{
			goxstreams.DeadLetter{}.Middleware, quickRetry.Middleware,
		}},
	)
	require.NoError(t, err)
	s.run(daemon)
	s.requireSettled(outbox, group)

	for _, topic := range topics {
		got := s.entries(topic)
		require.Len(t, got, len(want[topic]))
		for i := range got {
			requireSame(t, want[topic][i], got[i])
		}
	}
	letter := s.requireDead(outbox, 1)[0]
	require.Equal(t, "no envelope", letter.Message.UUID)
	require.Equal(t, goxstreams.Exhausted, letter.Kind)
	require.EqualValues(t, quickRetry.MaxRetries+1, letter.Deliveries)
	require.Equal(t, "events_forwarder", letter.Handler)
	require.Contains(t, letter.Reason, "cannot unwrap message")
}

// Several topics into one, with one Subscriber and one Publisher for all. FanIn takes
// no middlewares, and only its publishing fails, never its handler: that is a case
// for SubscriberConfig.Retry.
func TestComponents_FanIn(t *testing.T) {
	s := newSystem(t)
	s.expectErrors("Malformed entry")
	sources, target := []string{s.topic("a"), s.topic("b")}, s.topic("target")

	want := map[string][]string{}
	for _, source := range sources {
		for i := range 10 {
			uuid := fmt.Sprint(source, " ", i)
			s.publish(source, newMessage(uuid, []byte(uuid), message.Metadata{"source": source}))
			want[source] = append(want[source], uuid)
		}
	}
	s.publish(sources[0], message.NewMessage("unpublishable", nil))
	s.client.XAdd(t.Context(), &redis.XAddArgs{Stream: sources[1], Values: []string{"no", "message"}})

	in, err := fanin.NewFanIn(s.subscriber(), &failing{
		Publisher: s.publisher(),
		fails:     func(attempt int, uuid string) bool { return attempt == 1 || uuid == "unpublishable" },
	}, fanin.Config{SourceTopics: sources, TargetTopic: target}, s.log)
	require.NoError(t, err)
	s.run(in)
	for _, source := range sources {
		s.requireSettled(source, group)
	}

	got := map[string][]string{}
	for _, msg := range s.entries(target) {
		got[msg.Metadata["source"]] = append(got[msg.Metadata["source"]], msg.UUID)
		require.Equal(t, msg.UUID, string(msg.Payload))
		require.Len(t, msg.Metadata, 1)
	}
	require.Equal(t, want, got)

	letter := s.requireDead(sources[0], 1)[0]
	require.Equal(t, "unpublishable", letter.Message.UUID)
	require.Equal(t, goxstreams.Exhausted, letter.Kind)
	require.Equal(t, "fan_in_"+sources[0], letter.Handler)
	require.Equal(t, goxstreams.Broken, s.requireDead(sources[1], 1)[0].Kind)
}

type (
	bookRoom     struct{ Room string }
	cancelRoom   struct{ Room string }
	roomBooked   struct{ Room string }
	roomCanceled struct{ Room string }
)

// Commands, events and groups of event handlers in one router: one client, a
// Subscriber per handler or group, whose name is the consumer group's.
func TestComponents_CQRS(t *testing.T) {
	for name, policy := range map[string]struct {
		retry       *goxstreams.Retry
		middlewares []message.HandlerMiddleware
	}{
		"the config's Retry": {retry: &quickRetry},
		"our middlewares":    {middlewares: []message.HandlerMiddleware{quickRetry.Middleware, goxstreams.DeadLetter{}.Middleware}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			commands, events := s.topic("commands"), s.topic("events")
			marshaler := cqrs.JSONMarshaler{}
			router := s.router()
			router.AddMiddleware(policy.middlewares...)
			subscriber := func(group string) (message.Subscriber, error) {
				return s.subscriber(func(c *goxstreams.SubscriberConfig) { c.ConsumerGroup, c.Retry = group, policy.retry }), nil
			}

			var handled book
			var recovered atomic.Bool
			handle := func(ctx context.Context, handler, room string) int {
				msg := cqrs.OriginalMessageFromCtx(ctx)
				return handled.noteAs(handler+" "+room, msg)
			}
			bus, err := cqrs.NewEventBusWithConfig(s.publisher(), cqrs.EventBusConfig{
				GeneratePublishTopic: func(cqrs.GenerateEventPublishTopicParams) (string, error) { return events, nil },
				Marshaler:            marshaler,
			})
			require.NoError(t, err)

			commandProcessor, err := cqrs.NewCommandProcessorWithConfig(router, cqrs.CommandProcessorConfig{
				GenerateSubscribeTopic: func(cqrs.CommandProcessorGenerateSubscribeTopicParams) (string, error) { return commands, nil },
				SubscriberConstructor: func(p cqrs.CommandProcessorSubscriberConstructorParams) (message.Subscriber, error) {
					return subscriber(p.HandlerName)
				},
				Marshaler: marshaler, Logger: s.log,
			})
			require.NoError(t, err)
			require.NoError(t, commandProcessor.AddHandlers(
				cqrs.NewCommandHandler("book", func(ctx context.Context, cmd *bookRoom) error {
					switch attempt := handle(ctx, "book", cmd.Room); {
					case cmd.Room == "101" && attempt == 1:
						return errors.New("the first attempt fails")
					case cmd.Room == "102" && attempt == 1, cmd.Room == "105":
						panic("no such room")
					}
					return bus.Publish(ctx, &roomBooked{cmd.Room})
				}),
				cqrs.NewCommandHandler("cancel", func(ctx context.Context, cmd *cancelRoom) error {
					handle(ctx, "cancel", cmd.Room)
					return bus.Publish(ctx, &roomCanceled{cmd.Room})
				}),
			))

			lenient, err := cqrs.NewCommandProcessorWithConfig(router, cqrs.CommandProcessorConfig{
				GenerateSubscribeTopic: func(cqrs.CommandProcessorGenerateSubscribeTopicParams) (string, error) { return commands, nil },
				SubscriberConstructor: func(p cqrs.CommandProcessorSubscriberConstructorParams) (message.Subscriber, error) {
					return subscriber(p.HandlerName)
				},
				AckCommandHandlingErrors: true, Marshaler: marshaler, Logger: s.log,
			})
			require.NoError(t, err)
			require.NoError(t, lenient.AddHandlers(cqrs.NewCommandHandler("lenient", func(ctx context.Context, cmd *bookRoom) error {
				handle(ctx, "lenient", cmd.Room)
				return errors.New("nobody minds")
			})))

			eventProcessor, err := cqrs.NewEventProcessorWithConfig(router, cqrs.EventProcessorConfig{
				GenerateSubscribeTopic: func(cqrs.EventProcessorGenerateSubscribeTopicParams) (string, error) { return events, nil },
				SubscriberConstructor: func(p cqrs.EventProcessorSubscriberConstructorParams) (message.Subscriber, error) {
					return subscriber(p.HandlerName)
				},
				AckOnUnknownEvent: true, Marshaler: marshaler, Logger: s.log,
			})
			require.NoError(t, err)
			require.NoError(t, eventProcessor.AddHandlers(
				cqrs.NewEventHandler("statistics", func(ctx context.Context, e *roomBooked) error {
					handle(ctx, "statistics", e.Room)
					return nil
				}),
			))

			groups := func(ackUnknown bool, name string, handlers ...cqrs.GroupEventHandler) {
				processor, err := cqrs.NewEventGroupProcessorWithConfig(router, cqrs.EventGroupProcessorConfig{
					GenerateSubscribeTopic: func(cqrs.EventGroupProcessorGenerateSubscribeTopicParams) (string, error) { return events, nil },
					SubscriberConstructor: func(p cqrs.EventGroupProcessorSubscriberConstructorParams) (message.Subscriber, error) {
						return subscriber(p.EventGroupName)
					},
					AckOnUnknownEvent: ackUnknown, Marshaler: marshaler, Logger: s.log,
				})
				require.NoError(t, err)
				require.NoError(t, processor.AddHandlersGroup(name, handlers...))
			}
			groups(true, "projections",
				cqrs.NewGroupEventHandler(func(ctx context.Context, e *roomBooked) error {
					handle(ctx, "first", e.Room)
					return nil
				}),
				cqrs.NewGroupEventHandler(func(ctx context.Context, e *roomBooked) error {
					handle(ctx, "second", e.Room)
					if e.Room == "103" && !recovered.Load() {
						return errors.New("no room 103")
					}
					return nil
				}),
			)
			groups(false, "strict", cqrs.NewGroupEventHandler(func(ctx context.Context, e *roomBooked) error {
				handle(ctx, "strict", e.Room)
				return nil
			}))
			s.run(router)

			commandBus, err := cqrs.NewCommandBusWithConfig(s.publisher(), cqrs.CommandBusConfig{
				GeneratePublishTopic: func(cqrs.CommandBusGeneratePublishTopicParams) (string, error) { return commands, nil },
				Marshaler:            marshaler,
			})
			require.NoError(t, err)
			for _, command := range []any{&bookRoom{"101"}, &bookRoom{"102"}, &bookRoom{"103"}, &cancelRoom{"104"}, &bookRoom{"105"}} {
				require.NoError(t, commandBus.Send(t.Context(), command))
			}
			s.requireSettled(commands, "book", "cancel", "lenient")
			require.EqualValues(t, 4, s.length(events))
			s.requireSettled(events, "statistics", "projections", "strict")

			// Groups are independent: what fails in one is acked in the others. The
			// handlers of a group share a message, and its failure.
			require.Equal(t, map[string]int{
				"book 101": 2, "book 102": 2, "book 103": 1, "cancel 104": 1, "book 105": 3,
				"lenient 101": 1, "lenient 102": 1, "lenient 103": 1, "lenient 105": 1,
				"statistics 101": 1, "statistics 102": 1, "statistics 103": 1,
				"first 101": 1, "first 102": 1, "first 103": 3,
				"second 101": 1, "second 102": 1, "second 103": 3,
				"strict 101": 1, "strict 102": 1, "strict 103": 1,
			}, handled.counts())
			for key, group := range map[string]string{"book 101": "book", "statistics 101": "statistics", "second 103": "projections"} {
				require.Equal(t, group, handled.last(key).delivery.Group)
				require.EqualValues(t, handled.count(key), handled.last(key).delivery.Count)
			}

			panicked := s.requireDead(commands, 1)[0]
			require.Equal(t, "book", panicked.Handler)
			letters := map[string]goxstreams.DeadMessage{}
			for _, letter := range s.requireDead(events, 2) {
				letters[letter.Group] = letter
				require.Equal(t, letter.Group, letter.Handler)
				require.EqualValues(t, 3, letter.Deliveries)
				require.Equal(t, goxstreams.Exhausted, letter.Kind)
			}
			failed, unknown := letters["projections"], letters["strict"]
			require.Equal(t, message.Metadata{"name": "interop.roomBooked"}, failed.Message.Metadata)
			require.JSONEq(t, `{"Room":"103"}`, string(failed.Message.Payload))
			require.Equal(t, message.Metadata{"name": "interop.roomCanceled"}, unknown.Message.Metadata)
			if policy.retry != nil { // it sees a Nack only
				require.Equal(t, goxstreams.ErrRetriesExhausted.Error(), failed.Reason)
			} else {
				require.Equal(t, "no room 103", failed.Reason)
				require.Equal(t, "goxstreams: the handler panicked", panicked.Reason)
				require.Equal(t, "no handler found for event interop.roomCanceled", unknown.Reason)
			}

			// A replay reaches all handlers of its group, and no other group.
			recovered.Store(true)
			queue, err := goxstreams.NewDeadLetterQueue(s.client, goxstreams.DeadLetterTopic(events))
			require.NoError(t, err)
			_, err = queue.Replay(t.Context(), failed.ID)
			require.NoError(t, err)
			s.eventually("the replay is handled", func() bool { return handled.count("second 103") == 4 })
			s.requireSettled(events, "statistics", "projections", "strict")
			require.Equal(t, 4, handled.count("first 103"))
			require.Equal(t, 1, handled.count("statistics 103"))
			require.Equal(t, 1, handled.count("strict 103"))
			s.requireDead(events, 1)
		})
	}
}

type (
	divide   struct{ A, B int }
	quotient struct{ Q int }
)

// Replies arrive by fan-out, with a subscription for each command that waits for one.
// Every failed delivery is answered. The subscription ends with the caller's context,
// although nobody calls Close.
func TestComponents_RequestReply(t *testing.T) {
	s := newSystem(t)
	commands, replies := s.topic("commands"), s.topic("replies")
	var subscribers struct {
		sync.Mutex
		all []*goxstreams.Subscriber
	}
	timeout := patience
	backend, err := requestreply.NewPubSubBackend(requestreply.PubSubBackendConfig{
		Publisher: s.publisher(),
		SubscriberConstructor: func(requestreply.PubSubBackendSubscribeParams) (message.Subscriber, error) {
			sub := s.subscriber(func(c *goxstreams.SubscriberConfig) {
				*c = goxstreams.SubscriberConfig{Client: c.Client, CloseTimeout: c.CloseTimeout}
			})
			subscribers.Lock()
			defer subscribers.Unlock()
			subscribers.all = append(subscribers.all, sub)
			return sub, nil
		},
		GeneratePublishTopic:   func(requestreply.PubSubBackendPublishParams) (string, error) { return replies, nil },
		GenerateSubscribeTopic: func(requestreply.PubSubBackendSubscribeParams) (string, error) { return replies, nil },
		ListenForReplyTimeout:  &timeout,
		Logger:                 s.log,
	}, requestreply.BackendPubsubJSONMarshaler[quotient]{})
	require.NoError(t, err)

	router := s.router()
	router.AddMiddleware(quickRetry.Middleware)
	processor, err := cqrs.NewCommandProcessorWithConfig(router, cqrs.CommandProcessorConfig{
		GenerateSubscribeTopic: func(cqrs.CommandProcessorGenerateSubscribeTopicParams) (string, error) { return commands, nil },
		SubscriberConstructor: func(p cqrs.CommandProcessorSubscriberConstructorParams) (message.Subscriber, error) {
			return s.subscriber(func(c *goxstreams.SubscriberConfig) {
				c.ConsumerGroup, c.MaxConcurrency, c.Retry = p.HandlerName, 4, nil
			}), nil
		},
		Marshaler: cqrs.JSONMarshaler{}, Logger: s.log,
	})
	require.NoError(t, err)
	require.NoError(t, processor.AddHandlers(requestreply.NewCommandHandlerWithResult("divide", backend,
		func(ctx context.Context, cmd *divide) (quotient, error) {
			d, _ := goxstreams.DeliveryFromContext(ctx)
			if d.Count <= 2 || cmd.B == 0 {
				return quotient{}, fmt.Errorf("delivery %d", d.Count)
			}
			return quotient{cmd.A / cmd.B}, nil
		})))
	s.run(router)
	bus, err := cqrs.NewCommandBusWithConfig(s.publisher(), cqrs.CommandBusConfig{
		GeneratePublishTopic: func(cqrs.CommandBusGeneratePublishTopicParams) (string, error) { return commands, nil },
		Marshaler:            cqrs.JSONMarshaler{},
	})
	require.NoError(t, err)

	var requests sync.WaitGroup
	for i := range 5 {
		requests.Go(func() {
			cmd := &divide{A: 10 * i, B: i} // the first has no quotient
			answers, cancel, err := requestreply.SendWithReplies(t.Context(), bus, backend, cmd)
			if !assert.NoError(t, err) {
				return
			}
			defer cancel()
			want := []string{"delivery 1", "delivery 2", "10"}
			if i == 0 {
				want[2] = "delivery 3"
			}
			var got []string
			for range want {
				reply := <-answers
				if reply.Error != nil {
					got = append(got, reply.Error.Error())
				} else {
					got = append(got, fmt.Sprint(reply.HandlerResult.Q))
				}
			}
			assert.Equal(t, want, got)
		})
	}
	requests.Wait()
	s.requireSettled(commands, "divide")
	letter := s.requireDead(commands, 1)[0]
	require.JSONEq(t, `{"A":0,"B":0}`, string(letter.Message.Payload))
	require.Equal(t, "delivery 3", letter.Reason)

	require.Len(t, subscribers.all, 5)
	s.eventually("the callers' subscriptions are closed", func() bool {
		return !slices.ContainsFunc(subscribers.all, func(sub *goxstreams.Subscriber) bool { return len(sub.Stats()) > 0 })
	})
}

// Metrics wait for every message's outcome, in a goroutine each: retries, dead messages,
// and one that Close gives up on must all get one.
func TestComponents_Metrics(t *testing.T) {
	testserver.Addr(t) // so that its goroutines are not counted as leaks
	// Goroutines that watermill-redisstream leaves for half a second belong to other tests.
	leaks := append(testserver.LeakOptions(), goleak.IgnoreCurrent())
	t.Cleanup(func() { goleak.VerifyNone(t, leaks...) }) // after the clients are closed

	s := newSystem(t)
	in, out := s.topic("in"), s.topic("out")
	registry := prometheus.NewRegistry()
	builder := metrics.NewPrometheusMetricsBuilder(registry, "", "")
	router := s.router()
	builder.AddPrometheusRouterMetrics(router)
	router.AddMiddleware(goxstreams.DeadLetter{ShouldDeadLetter: func(err error) bool { return err.Error() == "filtered" }}.Middleware,
		quickRetry.Middleware)
	stuck, release := make(chan struct{}), make(chan struct{})
	var attempts book
	router.AddHandler("handler", in, s.subscriber(func(c *goxstreams.SubscriberConfig) {
		c.Retry, c.CloseTimeout = nil, 500*time.Millisecond
	}), out, s.publisher(), func(msg *message.Message) ([]*message.Message, error) {
		attempt := attempts.note(msg)
		switch {
		case msg.UUID == "stuck":
			close(stuck)
			<-release
			return nil, nil
		case msg.UUID == "permanent":
			return nil, goxstreams.Permanent(errors.New("permanent"))
		case msg.UUID == "filtered", msg.UUID == "exhausted", msg.UUID == "flaky" && attempt == 1:
			return nil, errors.New(msg.UUID)
		}
		return []*message.Message{message.NewMessage(msg.UUID, nil)}, nil
	})
	stop := s.run(router)
	for _, uuid := range []string{"fine", "flaky", "filtered", "exhausted", "permanent", "also fine"} {
		s.publish(in, message.NewMessage(uuid, nil))
	}
	s.requireSettled(in, group)

	received := func(acked, handler string) map[string]string {
		return map[string]string{"acked": acked, "handler_name": handler, "subscriber_name": "goxstreams.Subscriber"}
	}
	executed := func(success string) map[string]string {
		return map[string]string{"success": success, "handler_name": "handler"}
	}
	s.requireMetric(registry, 3, "subscriber_messages_received_total", received("acked", "handler"))
	s.requireMetric(registry, 6, "subscriber_messages_received_total", received("nacked", "handler")) // 1 + 1 + 3 + 1
	s.requireMetric(registry, 3, "handler_execution_time_seconds", executed("true"))
	s.requireMetric(registry, 6, "handler_execution_time_seconds", executed("false"))
	s.requireMetric(registry, 3, "publish_time_seconds",
		map[string]string{"success": "true", "handler_name": "handler", "publisher_name": "goxstreams.Publisher"})
	kinds := map[string]goxstreams.DeadKind{}
	for _, letter := range s.requireDead(in, 3) {
		kinds[letter.Message.UUID] = letter.Kind
	}
	require.Equal(t, map[string]goxstreams.DeadKind{
		"filtered": goxstreams.Filtered, "exhausted": goxstreams.Exhausted, "permanent": goxstreams.PermanentFailure,
	}, kinds)

	// A handler that ignores the end of its context.
	s.publish(in, message.NewMessage("stuck", nil))
	<-stuck
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		stop()
	}()
	s.requireMetric(registry, 7, "subscriber_messages_received_total", received("nacked", "handler"))
	close(release)
	<-stopped
	s.requireMetric(registry, 3, "subscriber_messages_received_total", received("acked", "handler"))
	require.EqualValues(t, 1, s.pending(in, group), "it may have been at work: its lease runs out")

	// Without a router.
	other := s.topic("other")
	pub, err := builder.DecoratePublisher(s.publisher())
	require.NoError(t, err)
	require.NoError(t, pub.Publish(other, message.NewMessage("1", nil), message.NewMessage("2", nil)))
	sub, err := builder.DecorateSubscriber(s.subscriber(func(c *goxstreams.SubscriberConfig) { c.CloseTimeout = 500 * time.Millisecond }))
	require.NoError(t, err)
	messages := subscribe(t, sub, other)
	receive(t, messages).Nack()
	receive(t, messages).Ack()
	abandoned := receive(t, messages)
	require.NoError(t, sub.Close())
	require.False(t, abandoned.Ack())
	s.requireMetric(registry, 1, "subscriber_messages_received_total", received("acked", "<no handler>"))
	s.requireMetric(registry, 2, "subscriber_messages_received_total", received("nacked", "<no handler>"))
	s.requireMetric(registry, 1, "publish_time_seconds",
		map[string]string{"success": "true", "handler_name": "<no handler>", "publisher_name": "goxstreams.Publisher"})
}

// A message with Watermill's delay is delivered when it is due, and keeps the metadata
// through retries and dead-lettering.
func TestComponents_Delay(t *testing.T) {
	s := newSystem(t)
	topic := s.topic("topic")
	pub, err := delay.NewPublisher(s.publisher(), delay.PublisherConfig{
		DefaultDelayGenerator: func(delay.DefaultDelayGeneratorParams) (delay.Delay, error) {
			return delay.For(300 * time.Millisecond), nil
		},
	})
	require.NoError(t, err)
	msg := newMessage("delayed", []byte("payload"), message.Metadata{"key": "value"})
	published := time.Now()
	require.NoError(t, pub.Publish(topic, msg))
	require.Equal(t, "300ms", msg.Metadata[delay.DelayedForKey])

	messages := subscribe(t, s.subscriber(), topic)
	for range quickRetry.MaxRetries + 1 {
		got := receive(t, messages)
		require.GreaterOrEqual(t, time.Since(published), 300*time.Millisecond)
		requireSame(t, msg, got)
		got.Nack()
	}
	s.requireSettled(topic, group)
	requireSame(t, msg, s.requireDead(topic, 1)[0].Message)
}

// quickRetry is the policy of these tests.
var quickRetry = goxstreams.Retry{MaxRetries: 2, InitialInterval: time.Millisecond, MaxInterval: 2 * time.Millisecond}

// system is the application of one test, with its own topics, one client and a log. It
// closes what it makes at the end of the test.
type system struct {
	t        *testing.T
	name     string
	client   *redis.Client
	log      *watermill.CaptureLoggerAdapter
	expected []string
}

func newSystem(t *testing.T) *system {
	testserver.RequireReal(t)
	s := &system{t: t, name: "interop-" + watermill.NewShortUUID(), client: testserver.Client(t), log: watermill.NewCaptureLogger()}
	t.Cleanup(func() {
		ctx := context.Background()
		for keys := s.client.Scan(ctx, 0, s.name+"*", 1000).Iterator(); keys.Next(ctx); {
			s.client.Del(ctx, keys.Val())
		}
		s.requireNoErrors()
	})
	return s
}

func (s *system) topic(name string) string { return s.name + "." + name }

// expectErrors names the errors that the library must log. Any other one fails the test.
func (s *system) expectErrors(texts ...string) { s.expected = texts }

// requireNoErrors also fails if a middleware has lost its message.
func (s *system) requireNoErrors() {
	s.t.Helper()
	var logged []string
	for _, m := range s.log.Captured()[watermill.ErrorLogLevel] {
		if m.Fields["provider"] != nil || strings.Contains(m.Msg, "has no effect") {
			logged = append(logged, m.Msg)
		}
	}
	slices.Sort(logged)
	assert.ElementsMatch(s.t, s.expected, slices.Compact(logged))
}

func (s *system) publisher() *goxstreams.Publisher {
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: s.client}, s.log)
	require.NoError(s.t, err)
	return pub
}

func (s *system) publish(topic string, messages ...*message.Message) {
	s.t.Helper()
	require.NoError(s.t, s.publisher().Publish(topic, messages...))
}

// subscriber has the policy quickRetry, in the group of all these tests.
func (s *system) subscriber(changes ...func(*goxstreams.SubscriberConfig)) *goxstreams.Subscriber {
	config := goxstreams.SubscriberConfig{
		Client: s.client, ConsumerGroup: group, Retry: &quickRetry,
		ClaimInterval: 20 * time.Millisecond, CloseTimeout: 10 * time.Second,
	}
	for _, change := range changes {
		change(&config)
	}
	sub, err := goxstreams.NewSubscriber(config, s.log)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { assert.NoError(s.t, sub.Close()) })
	return sub
}

func (s *system) router() *message.Router {
	router, err := message.NewRouter(message.RouterConfig{}, s.log)
	require.NoError(s.t, err)
	return router
}

// daemon is a router, or what has one.
type daemon interface {
	Run(context.Context) error
	Running() chan struct{}
	Close() error
}

// run starts d and returns when it is running. stop may be called twice.
func (s *system) run(d daemon) (stop func()) {
	s.t.Helper()
	done := make(chan error, 1)
	go func() { done <- d.Run(context.Background()) }()
	select {
	case <-d.Running():
	case err := <-done:
		require.NoError(s.t, err)
		require.Fail(s.t, "it did not run")
	}
	stop = sync.OnceFunc(func() {
		assert.NoError(s.t, d.Close())
		assert.NoError(s.t, <-done)
	})
	s.t.Cleanup(stop)
	return stop
}

func (s *system) eventually(what string, is func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.log.PrintCaptured(s.t)
			require.Fail(s.t, "not so: "+what)
		}
	}
}

func (s *system) length(topic string) int64 { return s.client.XLen(context.Background(), topic).Val() }

func (s *system) pending(topic, group string) int64 {
	p, err := s.client.XPending(s.t.Context(), topic, group).Result()
	require.NoError(s.t, err)
	return p.Count
}

// requireSettled waits until each group has read everything and has nothing pending.
func (s *system) requireSettled(topic string, groups ...string) {
	s.t.Helper()
	s.eventually("all of "+topic+" is settled", func() bool {
		stream, err := s.client.XInfoStream(s.t.Context(), topic).Result()
		if err != nil {
			return false
		}
		all, err := s.client.XInfoGroups(s.t.Context(), topic).Result()
		settled := 0
		for _, g := range all {
			if slices.Contains(groups, g.Name) && g.Pending == 0 && g.LastDeliveredID == stream.LastGeneratedID {
				settled++
			}
		}
		return err == nil && settled == len(groups)
	})
}

// requireDead waits for n dead letters of the topic and returns them.
func (s *system) requireDead(topic string, n int) []goxstreams.DeadMessage {
	s.t.Helper()
	dead := goxstreams.DeadLetterTopic(topic)
	s.eventually(fmt.Sprintf("%d in %s", n, dead), func() bool { return s.length(dead) >= int64(n) })
	queue, err := goxstreams.NewDeadLetterQueue(s.client, dead)
	require.NoError(s.t, err)
	var all []goxstreams.DeadMessage
	for letter, err := range queue.All(s.t.Context(), "") {
		require.NoError(s.t, err)
		all = append(all, letter)
	}
	require.Len(s.t, all, n)
	return all
}

// entries returns the messages that a topic holds.
func (s *system) entries(topic string) []*message.Message {
	s.t.Helper()
	entries, err := s.client.XRange(s.t.Context(), topic, "-", "+").Result()
	require.NoError(s.t, err)
	messages := make([]*message.Message, len(entries))
	for i, e := range entries {
		messages[i], err = goxstreams.DefaultMarshaler{}.Unmarshal(e.Values)
		require.NoError(s.t, err)
	}
	return messages
}

// requireMetric waits for a counter's value, or a histogram's number of samples.
func (s *system) requireMetric(registry *prometheus.Registry, want int, name string, labels map[string]string) {
	s.t.Helper()
	value := func() int {
		families, err := registry.Gather()
		require.NoError(s.t, err)
		for _, family := range families {
			for _, m := range family.GetMetric() {
				has := map[string]string{}
				for _, l := range m.GetLabel() {
					has[l.GetName()] = l.GetValue()
				}
				if family.GetName() == name && maps.Equal(has, labels) {
					return int(m.GetCounter().GetValue()) + int(m.GetHistogram().GetSampleCount())
				}
			}
		}
		return 0
	}
	s.eventually(fmt.Sprintf("%s %v reaches %d", name, labels, want), func() bool { return value() >= want })
	require.Equal(s.t, want, value())
}

// failing is a Publisher that fails for some messages, in some attempts; with stores,
// after it has published them.
type failing struct {
	message.Publisher
	fails    func(attempt int, uuid string) bool
	stores   func(uuid string) bool
	attempts book
}

func (p *failing) Publish(topic string, messages ...*message.Message) error {
	for _, msg := range messages {
		fails := p.fails(p.attempts.note(msg), msg.UUID)
		if !fails || p.stores != nil && p.stores(msg.UUID) {
			if err := p.Publisher.Publish(topic, msg); err != nil {
				return err
			}
		}
		if fails {
			return errors.New("it is meant to fail")
		}
	}
	return nil
}

// book is what handlers have seen.
type book struct {
	mu      sync.Mutex
	entries map[string][]sighting
}

type sighting struct {
	msg      *message.Message
	delivery goxstreams.Delivery
}

// note returns how many times the message has been seen.
func (b *book) note(msg *message.Message) int { return b.noteAs(msg.UUID, msg) }

func (b *book) noteAs(key string, msg *message.Message) int {
	d, _ := goxstreams.DeliveryFromContext(msg.Context())
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.entries == nil {
		b.entries = map[string][]sighting{}
	}
	b.entries[key] = append(b.entries[key], sighting{msg.Copy(), d})
	return len(b.entries[key])
}

func (b *book) count(key string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.entries[key])
}

func (b *book) counts() map[string]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	counts := map[string]int{}
	for key, seen := range b.entries {
		counts[key] = len(seen)
	}
	return counts
}

// last returns the last one of a key that exists.
func (b *book) last(key string) sighting {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.entries[key][len(b.entries[key])-1]
}
