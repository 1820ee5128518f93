package interop

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestMain(m *testing.M) {
	// It sleeps half a second after its Close.
	testserver.Main(m, goleak.IgnoreAnyFunction("github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream.(*Subscriber).read"))
}

const (
	group = "group"

	// maxIdle is the idle time after which either library considers a pending
	// message abandoned.
	maxIdle  = time.Second
	patience = 20 * time.Second
)

// Each test runs both ways: old is watermill-redisstream, new is goxstreams.
func bothWays(t *testing.T, test func(t *testing.T, from, to implementation)) {
	t.Run("old to new", func(t *testing.T) { test(t, oldOne, newOne) })
	t.Run("new to old", func(t *testing.T) { test(t, newOne, oldOne) })
}

func TestLive_PublishAndSubscribe(t *testing.T) {
	for _, group := range []string{group, ""} {
		t.Run("group "+group, func(t *testing.T) {
			bothWays(t, func(t *testing.T, from, to implementation) {
				s := newStream(t)
				sent := randomMessages(300)
				require.NoError(t, from.publisher(s).Publish(s.topic, sent...))
				messages := subscribe(t, to.subscriber(s, group), s.topic)
				for _, want := range sent {
					got := receive(t, messages)
					requireSame(t, want, got)
					got.Ack()
				}
				if group != "" {
					s.requireNothingPending()
				}
			})
		})
	}
}

func TestLive_NackedComesAgain(t *testing.T) {
	bothWays(t, func(t *testing.T, from, to implementation) {
		s := newStream(t)
		sent := randomMessages(1)
		require.NoError(t, from.publisher(s).Publish(s.topic, sent...))
		messages := subscribe(t, to.subscriber(s, group), s.topic)
		for range 3 {
			got := receive(t, messages)
			requireSame(t, sent[0], got)
			got.Nack()
		}
		receive(t, messages).Ack()
		s.requireNothingPending()
	})
}

// A migration without downtime: publishers and consumers of both libraries work on
// one stream, in one group. Each message is handled by exactly one of them.
func TestLive_OneGroup(t *testing.T) {
	s := newStream(t)
	var (
		mu      sync.Mutex
		sent    = map[string]*message.Message{}
		handled = map[string][]*message.Message{}
		by      = map[string]int{}
	)
	consume := func(name string, messages <-chan *message.Message) {
		for msg := range messages {
			mu.Lock()
			handled[msg.UUID] = append(handled[msg.UUID], msg)
			by[name]++
			mu.Unlock()
			msg.Ack()
		}
	}
	publish := func(pub message.Publisher) {
		batch := randomMessages(10)
		mu.Lock()
		for _, msg := range batch {
			sent[msg.UUID] = msg
		}
		mu.Unlock()
		assert.NoError(t, pub.Publish(s.topic, batch...))
	}

	oldPub, newPub := oldOne.publisher(s), newOne.publisher(s)
	patient := s
	patient.maxIdle = time.Minute // the next tests are about claims
	var consumers sync.WaitGroup
	defer consumers.Wait()
	for name, sub := range map[string]message.Subscriber{"old": oldOne.subscriber(patient, group), "new": newOne.subscriber(patient, group)} {
		defer sub.Close()
		messages, err := sub.Subscribe(t.Context(), s.topic)
		require.NoError(t, err)
		consumers.Go(func() { consume(name, messages) })
	}

	enough := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(sent) >= 2000 && by["old"] >= 200 && by["new"] >= 200
	}
	for deadline := time.Now().Add(patience); !enough(); {
		require.True(t, time.Now().Before(deadline), "one of them does not take part")
		var publishers sync.WaitGroup
		publishers.Go(func() { publish(oldPub) })
		publishers.Go(func() { publish(newPub) })
		publishers.Wait()
	}
	s.requireAllAcked(len(sent))
	mu.Lock()
	defer mu.Unlock()
	require.Len(t, handled, len(sent))
	for uuid, messages := range handled {
		require.Len(t, messages, 1)
		requireSame(t, sent[uuid], messages[0])
	}
	t.Logf("%d messages: %v", len(sent), by)
}

// A message of a dead consumer is taken over by one of the other library.
func TestLive_TakeOver(t *testing.T) {
	bothWays(t, func(t *testing.T, from, to implementation) {
		s := newStream(t)
		sent := randomMessages(1)
		require.NoError(t, from.publisher(s).Publish(s.topic, sent...))

		dying := from.subscriber(s, group)
		requireSame(t, sent[0], receive(t, subscribe(t, dying, s.topic)))
		require.NoError(t, dying.(interface{ kill() error }).kill())

		messages := subscribe(t, to.subscriber(s, group), s.topic)
		got := receive(t, messages)
		requireSame(t, sent[0], got)
		got.Ack()
		s.requireNothingPending()
	})
}

// A rolling restart from one library to the other: what the closed consumer had read
// and not handled is handled by the other one.
func TestLive_Close(t *testing.T) {
	bothWays(t, func(t *testing.T, from, to implementation) {
		s := newStream(t)
		sent := randomMessages(20)
		require.NoError(t, from.publisher(s).Publish(s.topic, sent...))

		closing := from.subscriber(s, group)
		before := subscribe(t, closing, s.topic)
		done := map[string]bool{}
		for range 5 {
			got := receive(t, before)
			done[got.UUID] = true
			got.Ack()
		}
		// One is being handled when the process is told to stop.
		var failing sync.WaitGroup
		failing.Go(func() {
			for msg := range before {
				msg.Nack()
			}
		})
		require.NoError(t, closing.Close())
		failing.Wait()

		messages := subscribe(t, to.subscriber(s, group), s.topic)
		for len(done) < len(sent) {
			got := receive(t, messages)
			done[got.UUID] = true
			got.Ack()
		}
		if from.losesAcks {
			go func() {
				for msg := range messages {
					msg.Ack()
				}
			}()
		}
		s.requireNothingPending()
	})
}

// watermill-redisstream takes whatever has been idle for MaxIdleTime. Renewals protect
// a slow handler of ours.
func TestLive_OldLeavesSlowNewAlone(t *testing.T) {
	s := newStream(t)
	require.NoError(t, newOne.publisher(s).Publish(s.topic, randomMessages(1)...))
	slow := receive(t, subscribe(t, newOne.subscriber(s, group), s.topic))
	select {
	case <-subscribe(t, oldOne.subscriber(s, group), s.topic):
		t.Fatal("watermill-redisstream took a message that goxstreams is handling")
	case <-time.After(4 * maxIdle):
	}
	require.NoError(t, slow.Context().Err())
	slow.Ack()
	s.requireNothingPending()
}

// stream is a topic of one test.
type stream struct {
	t       *testing.T
	topic   string
	maxIdle time.Duration
	client  *redis.Client
}

func newStream(t *testing.T) stream {
	testserver.RequireReal(t)
	s := stream{t: t, topic: "interop-" + watermill.NewShortUUID(), maxIdle: maxIdle, client: testserver.Client(t)}
	t.Cleanup(func() { s.client.Del(context.Background(), s.topic) })
	return s
}

func (s stream) requireNothingPending() {
	s.t.Helper()
	s.requireAllAcked(int(s.client.XLen(s.t.Context(), s.topic).Val()))
}

// requireAllAcked waits until the group has read that many entries and acked
// each of them.
func (s stream) requireAllAcked(entries int) {
	s.t.Helper()
	require.Eventually(s.t, func() bool {
		groups, err := s.client.XInfoGroups(s.t.Context(), s.topic).Result()
		return err == nil && len(groups) == 1 && groups[0].Pending == 0 && groups[0].EntriesRead == int64(entries)
	}, patience, 10*time.Millisecond)
}

// implementation makes publishers and subscribers, which the test's cleanup
// closes. Each has a client of its own: watermill-redisstream closes its
// client.
type implementation struct {
	publisher  func(stream) message.Publisher
	subscriber func(s stream, group string) message.Subscriber
	losesAcks  bool // of messages that are acked as Close begins
}

var oldOne = implementation{
	losesAcks: true,
	publisher: func(s stream) message.Publisher {
		pub, err := redisstream.NewPublisher(redisstream.PublisherConfig{Client: testserver.Client(s.t)}, nil)
		require.NoError(s.t, err)
		return pub
	},
	subscriber: func(s stream, group string) message.Subscriber {
		client := testserver.Client(s.t)
		sub, err := redisstream.NewSubscriber(redisstream.SubscriberConfig{
			Client:         client,
			ConsumerGroup:  group,
			MaxIdleTime:    s.maxIdle,
			ClaimInterval:  100 * time.Millisecond,
			FanOutOldestId: "0",
		}, nil)
		require.NoError(s.t, err)
		return closed(s.t, killable{sub, client})
	},
}

var newOne = implementation{
	publisher: func(s stream) message.Publisher {
		pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: testserver.Client(s.t)}, nil)
		require.NoError(s.t, err)
		return pub
	},
	subscriber: func(s stream, group string) message.Subscriber {
		client := testserver.Client(s.t)
		config := goxstreams.SubscriberConfig{
			Client:        client,
			ConsumerGroup: group,
			CloseTimeout:  2 * time.Second,
		}
		if group == "" {
			config.StartID = "0"
		} else {
			config.ClaimMinIdle, config.ClaimInterval = s.maxIdle, 100*time.Millisecond
		}
		sub, err := goxstreams.NewSubscriber(config, nil)
		require.NoError(s.t, err)
		return closed(s.t, killable{sub, client})
	},
}

// killable ends as in a power failure: it sends nothing more to Redis.
type killable struct {
	message.Subscriber
	client *redis.Client
}

func (k killable) kill() error { return k.client.Close() }

func closed(t *testing.T, sub message.Subscriber) message.Subscriber {
	t.Cleanup(func() { _ = sub.Close() }) // its error after a kill does not matter
	return sub
}

func subscribe(t *testing.T, sub message.Subscriber, topic string) <-chan *message.Message {
	t.Helper()
	messages, err := sub.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	return messages
}

func receive(t *testing.T, messages <-chan *message.Message) *message.Message {
	t.Helper()
	select {
	case msg, open := <-messages:
		require.True(t, open, "the subscription closed")
		return msg
	case <-time.After(patience):
		require.Fail(t, "no message")
		return nil
	}
}

func randomMessages(n int) []*message.Message {
	random := rand.New(rand.NewPCG(5, 6))
	messages := make([]*message.Message, n)
	for i := range messages {
		payload := []byte(fmt.Sprint(i, randomString(random)))
		messages[i] = newMessage(watermill.NewUUID(), payload, randomMetadata(random, i%20))
	}
	return messages
}
