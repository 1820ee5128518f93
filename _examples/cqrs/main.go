// The cqrs example: Watermill's cqrs component on this library. A hotel books
// rooms: a command handler, which fails for two of three guests, and two groups
// of event handlers. One Redis client serves them all.
//
// It runs on an embedded Redis, or on the one at REDIS_ADDR. What to copy comes
// first: newHotel, and its two methods. The rest sends commands and looks at the end.
package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/cqrs"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

type (
	BookRoom   struct{ Room, Guest string }
	RoomBooked struct{ Room, Guest string }
)

// hotel is one application: a router, and what sends to it.
type hotel struct {
	router    *message.Router
	commands  *cqrs.CommandBus
	events    *cqrs.EventBus
	client    *redis.Client
	prefix    string // of topics
	marshaler cqrs.CommandEventMarshaler
	desk      desk
}

func newHotel(client *redis.Client, prefix string) (*hotel, error) {
	h := &hotel{client: client, prefix: prefix, marshaler: cqrs.JSONMarshaler{GenerateName: cqrs.StructName}}
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return nil, err
	}
	h.commands, err = cqrs.NewCommandBusWithConfig(publisher, cqrs.CommandBusConfig{
		GeneratePublishTopic: func(p cqrs.CommandBusGeneratePublishTopicParams) (string, error) {
			return h.commandTopic(p.CommandName), nil
		},
		Marshaler: h.marshaler,
	})
	if err != nil {
		return nil, err
	}
	h.events, err = cqrs.NewEventBusWithConfig(publisher, cqrs.EventBusConfig{
		GeneratePublishTopic: func(cqrs.GenerateEventPublishTopicParams) (string, error) { return h.eventTopic(), nil },
		Marshaler:            h.marshaler,
	})
	if err != nil {
		return nil, err
	}
	h.router, err = message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	h.router.AddMiddleware(
		goxstreams.Retry{MaxRetries: 2, InitialInterval: 50 * time.Millisecond}.Middleware,
		middleware.Recoverer,
	)
	return h, errors.Join(h.addCommandHandlers(), h.addEventHandlers())
}

// addCommandHandlers: each command has a topic, and each handler a consumer group of its name.
func (h *hotel) addCommandHandlers() error {
	processor, err := cqrs.NewCommandProcessorWithConfig(h.router, cqrs.CommandProcessorConfig{
		GenerateSubscribeTopic: func(p cqrs.CommandProcessorGenerateSubscribeTopicParams) (string, error) {
			return h.commandTopic(p.CommandName), nil
		},
		SubscriberConstructor: func(p cqrs.CommandProcessorSubscriberConstructorParams) (message.Subscriber, error) {
			return h.newSubscriber(p.HandlerName)
		},
		Marshaler: h.marshaler,
	})
	if err != nil {
		return err
	}
	return processor.AddHandlers(cqrs.NewCommandHandler("book", func(ctx context.Context, cmd *BookRoom) error {
		delivery, _ := goxstreams.DeliveryFromContext(ctx)
		switch {
		case cmd.Room == "102" && delivery.RetryCount() == 0:
			return h.desk.note("book", cmd.Guest, errors.New("102 is being cleaned"))
		case cmd.Room == "13":
			return h.desk.note("book", cmd.Guest, errors.New("there is no room 13"))
		}
		if err := h.events.Publish(ctx, &RoomBooked{cmd.Room, cmd.Guest}); err != nil {
			return err // and the command comes again
		}
		return h.desk.note("book", cmd.Guest, nil)
	}))
}

// addEventHandlers: all events have one topic, so that a group has them in order. A group's handlers share its
// deliveries: if one fails, all of them see the event again.
func (h *hotel) addEventHandlers() error {
	processor, err := cqrs.NewEventGroupProcessorWithConfig(h.router, cqrs.EventGroupProcessorConfig{
		GenerateSubscribeTopic: func(cqrs.EventGroupProcessorGenerateSubscribeTopicParams) (string, error) {
			return h.eventTopic(), nil
		},
		SubscriberConstructor: func(p cqrs.EventGroupProcessorSubscriberConstructorParams) (message.Subscriber, error) {
			return h.newSubscriber(p.EventGroupName)
		},
		AckOnUnknownEvent: true,
		Marshaler:         h.marshaler,
	})
	if err != nil {
		return err
	}
	note := func(what string) cqrs.GroupEventHandler {
		return cqrs.NewGroupEventHandler(func(_ context.Context, e *RoomBooked) error { return h.desk.note(what, e.Guest, nil) })
	}
	return errors.Join(
		processor.AddHandlersGroup("housekeeping", note("make the bed"), note("lay out towels")),
		processor.AddHandlersGroup("kitchen", note("order breakfast")),
	)
}

// newSubscriber makes one for each handler or group, as the component wants it. They share the client.
func (h *hotel) newSubscriber(group string) (message.Subscriber, error) {
	return goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: h.client, ConsumerGroup: group}, nil)
}

func (h *hotel) commandTopic(command string) string { return h.prefix + "commands." + command }
func (h *hotel) eventTopic() string                 { return h.prefix + "events" }

// desk is where all is written down: who did what for whom, and how often.
type desk struct {
	sync.Mutex
	notes map[string]int
}

func (d *desk) note(what, guest string, err error) error {
	d.Lock()
	defer d.Unlock()
	if err != nil {
		what += ", failed"
	}
	if d.notes == nil {
		d.notes = make(map[string]int)
	}
	d.notes[guest+": "+what]++
	return err
}

func (d *desk) all() map[string]int {
	d.Lock()
	defer d.Unlock()
	return maps.Clone(d.notes)
}

// want is what shall be written down in the end.
var want = map[string]int{
	"Ada: book": 1, "Ada: make the bed": 1, "Ada: lay out towels": 1, "Ada: order breakfast": 1,
	"Bob: book, failed": 1,
	"Bob: book":         1, "Bob: make the bed": 1, "Bob: lay out towels": 1, "Bob: order breakfast": 1,
	"Eve: book, failed": 3,
}

func run(ctx context.Context, client *redis.Client) error {
	h, err := newHotel(client, "hotel-"+watermill.NewShortUUID()+".")
	if err != nil {
		return err
	}
	bookings := h.commandTopic("BookRoom")
	dead := goxstreams.DeadLetterTopic(bookings)
	defer client.Del(context.WithoutCancel(ctx), bookings, dead, h.eventTopic())
	ended := make(chan error, 1)
	go func() { ended <- h.router.Run(ctx) }()

	for _, cmd := range []BookRoom{{"101", "Ada"}, {"102", "Bob"}, {"13", "Eve"}} {
		if err := h.commands.Send(ctx, &cmd); err != nil {
			return err
		}
	}
	for ctx.Err() == nil && (!maps.Equal(h.desk.all(), want) || client.XLen(ctx, dead).Val() == 0) {
		time.Sleep(10 * time.Millisecond)
	}
	if err := errors.Join(h.router.Close(), <-ended); err != nil {
		return err
	}

	notes := h.desk.all()
	for _, note := range slices.Sorted(maps.Keys(notes)) {
		fmt.Printf("%s (%d)\n", note, notes[note])
	}
	queue, err := goxstreams.NewDeadLetterQueue(client, dead)
	if err != nil {
		return err
	}
	for letter, err := range queue.All(ctx, "") {
		if err != nil {
			return err
		}
		fmt.Printf("Dead: %s of handler %s, %s after %d deliveries: %s\n",
			letter.Message.Payload, letter.Handler, letter.Kind, letter.Deliveries, letter.Reason)
	}
	if !maps.Equal(notes, want) {
		return fmt.Errorf("the end is %v, and not %v", notes, want)
	}
	return ctx.Err()
}
func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := start(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cqrs:", err)
		os.Exit(1)
	}
}

func start(ctx context.Context) error {
	addr := os.Getenv("REDIS_ADDR")
	if addr == "" {
		server, err := miniredis.Run()
		if err != nil {
			return err
		}
		defer server.Close()
		addr = server.Addr()
		fmt.Fprintln(os.Stderr, "On an embedded Redis; REDIS_ADDR=host:port names a real one.")
	}
	client := redis.NewClient(&redis.Options{Addr: addr})
	defer client.Close() // the library leaves that to you
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return run(ctx, client)
}
