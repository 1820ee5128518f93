package interop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/plugin"
	"github.com/ThreeDotsLabs/watermill/pubsub/gochannel"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Our middlewares on a router with foreign Subscribers: GoChannel, in place of Kafka and
// the like, and watermill-redisstream. They pass foreign messages and errors through,
// however many failures there are.
func TestRouter_ForeignMessagesPass(t *testing.T) {
	s := newSystem(t)
	ours, old, bridge := s.topic("ours"), s.topic("old"), s.topic("bridge")
	const kafkaTopic = "kafka"
	// With the publisher's context, which is that of our delivery for what crosses the
	// bridge. It is another message all the same.
	kafka := gochannel.NewGoChannel(gochannel.Config{PreserveContext: true}, s.log)
	oldSub, err := redisstream.NewSubscriber(redisstream.SubscriberConfig{Client: testserver.Client(t), ConsumerGroup: group}, nil)
	require.NoError(t, err)

	router := s.router()
	var outside struct {
		sync.Mutex
		messages map[*message.Message]string // the handler's name
		errors   map[string][]error
	}
	outside.messages, outside.errors = map[*message.Message]string{}, map[string][]error{}
	router.AddMiddleware(
		func(h message.HandlerFunc) message.HandlerFunc {
			return func(msg *message.Message) ([]*message.Message, error) {
				outside.Lock()
				outside.messages[msg] = message.HandlerNameFromCtx(msg.Context())
				outside.Unlock()
				produced, err := h(msg)
				outside.Lock()
				defer outside.Unlock()
				outside.errors[msg.UUID] = append(outside.errors[msg.UUID], err)
				return produced, err
			}
		},
		quickRetry.Middleware,
		goxstreams.DeadLetter{ShouldDeadLetter: func(err error) bool { return errors.Is(err, errFiltered) }}.Middleware,
	)
	// Each fails five times, in all ways that would make a message of ours dead.
	failures := []error{errFiltered, goxstreams.Permanent(errOnce), errOnce, goxstreams.Snooze(errOnce, time.Hour), errOnce}
	var handled book
	handle := func(msg *message.Message) error {
		outside.Lock()
		name := outside.messages[msg]
		outside.Unlock()
		assert.Contains(t, []string{"old", "kafka"}, name, "it is another message than outside of our middlewares")
		if n := handled.note(msg); n <= len(failures) && !strings.HasPrefix(msg.UUID, "fine") {
			return failures[n-1]
		}
		return nil
	}
	router.AddConsumerHandler("ours", ours, s.subscriber(), func(msg *message.Message) error {
		if handled.note(msg); msg.UUID == "ours" {
			return errOnce
		}
		return nil
	})
	router.AddConsumerHandler("old", old, oldSub, handle)
	router.AddConsumerHandler("kafka", kafkaTopic, kafka, handle)
	router.AddHandler("bridge", bridge, s.subscriber(), kafkaTopic, kafka, message.PassthroughHandler)
	s.run(router)

	sent := map[string]*message.Message{}
	for _, uuid := range []string{"ours", "fine ours", "old", "fine old", "kafka", "fine kafka", "bridge", "fine bridge"} {
		sent[uuid] = newMessage(uuid, []byte("payload of "+uuid), message.Metadata{"key": uuid})
	}
	s.publish(ours, sent["ours"], sent["fine ours"])
	s.publish(old, sent["old"], sent["fine old"])
	s.publish(bridge, sent["bridge"], sent["fine bridge"])
	require.NoError(t, kafka.Publish(kafkaTopic, sent["kafka"], sent["fine kafka"]))

	want := map[string]int{
		"ours": quickRetry.MaxRetries + 1, "fine ours": 1,
		"old": 6, "fine old": 1, "kafka": 6, "fine kafka": 1, "bridge": 6, "fine bridge": 1,
	}
	s.eventually("all is handled", func() bool { return fmt.Sprint(handled.counts()) == fmt.Sprint(want) })
	for _, topic := range []string{ours, old, bridge} {
		s.requireSettled(topic, group)
	}
	require.Equal(t, want, handled.counts())

	outside.Lock()
	defer outside.Unlock()
	for uuid, msg := range sent {
		requireSame(t, msg, handled.last(uuid).msg)
		if uuid == "old" || uuid == "kafka" {
			got := outside.errors[uuid]
			require.Len(t, got, 6)
			for i, err := range failures {
				require.Same(t, err, got[i])
			}
			require.NoError(t, got[5])
		}
	}
	require.Equal(t, "ours", s.requireDead(ours, 1)[0].Message.UUID)
	require.Zero(t, s.length(goxstreams.DeadLetterTopic(bridge)))
	require.Zero(t, s.length(goxstreams.DeadLetterTopic(old)))

	// Logged once by each middleware in each handler.
	var said []any
	for _, m := range s.log.Captured()[watermill.InfoLogLevel] {
		if strings.Contains(m.Msg, "has no effect") {
			said = append(said, m.Fields["handler_name"])
		}
	}
	require.ElementsMatch(t, []any{"kafka", "kafka", "old", "old"}, said)
}

var (
	errOnce     = errors.New("once more, please")
	errFiltered = errors.New("filtered")
)

// A signal closes the router while handlers run: what they produce is published, what
// they have handled is acked. Giving up because of the signal is no failure.
func TestRouter_CloseWithHandlersUnderWay(t *testing.T) {
	s := newSystem(t)
	in, out := s.topic("in"), s.topic("out")
	never := goxstreams.Retry{MaxRetries: -1}
	underWay, proceed := make(chan struct{}, 3), make(chan struct{})
	var handled book
	start := func(proceed <-chan struct{}, plugins ...message.RouterPlugin) (stop func()) {
		router := s.router()
		router.AddPlugin(plugins...)
		router.AddMiddleware(never.Middleware, goxstreams.DeadLetter{}.Middleware)
		router.AddHandler("handler", in, s.subscriber(func(c *goxstreams.SubscriberConfig) { c.MaxConcurrency = 3 }), out, s.publisher(),
			func(msg *message.Message) ([]*message.Message, error) {
				first := handled.note(msg) == 1
				if proceed != nil {
					underWay <- struct{}{}
					<-proceed
				}
				assert.NoError(t, msg.Context().Err())
				if msg.UUID == "gives up" && first {
					return nil, fmt.Errorf("interrupted: %w", context.Canceled)
				}
				return []*message.Message{message.NewMessage(msg.UUID, nil)}, nil
			})
		return s.run(router)
	}

	stop := start(proceed, plugin.SignalsHandler)
	defer signal.Reset(syscall.SIGTERM, syscall.SIGINT) // the plugin does not do this
	for _, uuid := range []string{"1", "gives up", "2", "comes too late"} {
		s.publish(in, message.NewMessage(uuid, nil))
	}
	for range 3 {
		<-underWay
	}
	require.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGTERM))
	s.eventually("the subscription is closing", func() bool { return s.logged("Closing subscription") == 1 })
	close(proceed)
	stop()
	require.ElementsMatch(t, []string{"1", "2"}, uuids(s.entries(out)))

	start(nil)
	s.requireSettled(in, group)
	require.ElementsMatch(t, []string{"1", "2", "gives up", "comes too late"}, uuids(s.entries(out)))
	require.Equal(t, map[string]int{"1": 1, "2": 1, "gives up": 2, "comes too late": 1}, handled.counts())
	require.EqualValues(t, 1, handled.last("gives up").delivery.Count)
	require.EqualValues(t, 1, handled.last("comes too late").delivery.Count)
	require.Zero(t, s.length(goxstreams.DeadLetterTopic(in)))
}

// Handlers that share a Subscriber and a Publisher come and go while the router
// runs. The router closes the Publisher with each that goes.
func TestRouter_HandlersComeAndGo(t *testing.T) {
	s := newSystem(t)
	sub, pub := s.subscriber(), s.publisher()
	out := s.topic("out")
	router := s.router()
	underWay, proceed := make(chan struct{}), make(chan struct{})
	var handled book
	add := func(name string) *message.Handler {
		return router.AddHandler(name, s.topic(name), sub, out, pub, func(msg *message.Message) ([]*message.Message, error) {
			attempt := handled.note(msg)
			switch {
			case msg.UUID == "under way" && attempt == 1:
				close(underWay)
				<-proceed
				return nil, errOnce
			case msg.UUID == "waits" && attempt == 1:
				return nil, goxstreams.RetryAfter(errOnce, time.Hour)
			case strings.HasPrefix(msg.UUID, "flaky") && attempt == 1:
				return nil, errOnce
			}
			return []*message.Message{message.NewMessage(msg.UUID, nil)}, nil
		})
	}
	send := func(name string, ids ...string) {
		for _, uuid := range ids {
			s.publish(s.topic(name), message.NewMessage(uuid, nil))
		}
	}
	requireOut := func(want ...string) {
		s.eventually(fmt.Sprint(want, " are handled"), func() bool {
			got := uuids(s.entries(out))
			return !slices.ContainsFunc(want, func(uuid string) bool { return !slices.Contains(got, uuid) })
		})
	}
	a := add("a")
	add("b")
	waiting := add("waiting")
	waiting.AddMiddleware(goxstreams.Retry{MaxRetries: 1}.Middleware)
	s.run(router)
	send("a", "flaky a1", "under way", "a2")
	send("b", "flaky b1")
	send("waiting", "waits")
	requireOut("flaky a1", "flaky b1")
	<-underWay
	s.eventually("one waits for its retry", func() bool {
		return slices.ContainsFunc(sub.Stats(), func(st goxstreams.SubscriptionStats) bool { return st.Waiting == 1 })
	})

	a.Stop()
	waiting.Stop()
	s.eventually("both are closing", func() bool { return s.logged("Closing subscription") == 2 })
	close(proceed)
	<-a.Stopped()
	<-waiting.Stopped()
	s.eventually("one subscription is left", func() bool { return len(sub.Stats()) == 1 })
	send("b", "flaky b2") // read, and published, although the router has closed both for the others
	requireOut("flaky b2")
	require.Equal(t, 1, handled.count("under way"))
	require.Equal(t, 1, handled.count("waits"))
	require.Zero(t, handled.count("a2"))

	add("a")
	add("waiting")
	add("c")
	require.NoError(t, router.RunHandlers(context.Background()))
	send("a", "flaky a3")
	send("c", "flaky c1")
	requireOut("under way", "waits", "a2", "flaky a3", "flaky c1")
	for _, name := range []string{"a", "b", "waiting", "c"} {
		s.requireSettled(s.topic(name), group)
		require.Zero(t, s.length(goxstreams.DeadLetterTopic(s.topic(name))))
	}
	require.Equal(t, map[string]int{
		"flaky a1": 2, "under way": 2, "a2": 1, "flaky a3": 2, "flaky b1": 2, "flaky b2": 2, "waits": 2, "flaky c1": 2,
	}, handled.counts())
	require.EqualValues(t, 1, handled.last("under way").delivery.Count, "it failed while its subscription closed")
	require.EqualValues(t, 2, handled.last("waits").delivery.Count, "it failed before")
	require.EqualValues(t, 8, s.length(out))
}

// logged returns how often the text was logged.
func (s *system) logged(text string) (n int) {
	for _, messages := range s.log.Captured() {
		for _, m := range messages {
			if m.Msg == text {
				n++
			}
		}
	}
	return n
}

func uuids(messages []*message.Message) []string {
	var ids []string
	for _, msg := range messages {
		ids = append(ids, msg.UUID)
	}
	return ids
}
