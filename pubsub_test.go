package goxstreams_test

import (
	"context"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/tests"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// childEnv names the role of a test binary that another one has started.
const childEnv = "GOXSTREAMS_TEST_CHILD"

func TestMain(m *testing.M) {
	if role := os.Getenv(childEnv); role != "" {
		children[role]()
		return
	}
	// Goroutines that the universal suite leaves behind: a multiplier that forwards
	// to a channel which its tests stop reading, and a range over one that is never
	// closed.
	const suite = "github.com/ThreeDotsLabs/watermill/"
	testserver.Main(m,
		goleak.IgnoreAnyFunction(suite+"internal/subscriber.(*multiplier).Subscribe.func2"),
		goleak.IgnoreAnyFunction(suite+"internal/subscriber.(*multiplier).Subscribe.func3"),
		goleak.IgnoreAnyFunction(suite+"pubsub/tests.TestReconnect.func2"),
	)
}

// The universal suite uses one group name for everything: with a name for each
// subscriber, sharing and takeover would never be tested.
const fixedGroup = "suite"

// suiteConfig fits the suite's timeouts: nacked messages are redelivered quickly
// (it nacks one message 300 times), and so are those of a closed subscriber.
func suiteConfig(client redis.UniversalClient, group string, concurrency int) goxstreams.SubscriberConfig {
	config := goxstreams.SubscriberConfig{
		Client:         client,
		ConsumerGroup:  group,
		MaxConcurrency: concurrency,
		// The suite closes up to 50 subscribers one after the other, many of which
		// have a message that it never settles.
		CloseTimeout: 200 * time.Millisecond,
	}
	if group == "" {
		config.StartID = "0"
		return config
	}
	config.ClaimMinIdle = 3 * time.Second
	config.ClaimInterval = 200 * time.Millisecond
	config.Retry = &goxstreams.Retry{InitialInterval: time.Millisecond, MaxInterval: 10 * time.Millisecond}
	return config
}

func constructors(addr string, grouped bool, concurrency int) (tests.PubSubConstructor, tests.ConsumerGroupPubSubConstructor) {
	open := func(t *testing.T, group string) (message.Publisher, message.Subscriber) {
		client := redis.NewClient(&redis.Options{Addr: addr})
		t.Cleanup(func() { _ = client.Close() })
		logger := watermill.NewStdLogger(false, false)
		pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
		require.NoError(t, err)
		sub, err := goxstreams.NewSubscriber(suiteConfig(client, group, concurrency), logger)
		require.NoError(t, err)
		t.Cleanup(func() { _ = sub.Close() }) // not all of the suite's tests do
		return pub, sub
	}
	single := func(t *testing.T) (message.Publisher, message.Subscriber) {
		if !grouped {
			return open(t, "")
		}
		return open(t, fixedGroup)
	}
	return single, open
}

// modes are the ways to subscribe, with the features that each can honestly
// claim.
var modes = []struct {
	name        string
	grouped     bool
	concurrency int
	features    tests.Features
}{
	{"GroupOrdered", true, 1, tests.Features{
		ConsumerGroups: true, Persistent: true,
		// The second has no effect without the first.
		GuaranteedOrder: true, GuaranteedOrderWithSingleSubscriber: true,
	}},
	{"GroupConcurrent", true, 32, tests.Features{ConsumerGroups: true, Persistent: true}},
	{"FanOut", false, 1, tests.Features{NewSubscriberReceivesOldMessages: true}},
}

// The modes are separate tests: nested levels of parallel tests queue behind all
// others again, and these are the longest.
func TestPubSub_GroupOrdered(t *testing.T)    { testPubSub(t, 0) }
func TestPubSub_GroupConcurrent(t *testing.T) { testPubSub(t, 1) }
func TestPubSub_FanOut(t *testing.T)          { testPubSub(t, 2) }

func testPubSub(t *testing.T, mode int) {
	t.Parallel()
	m := modes[mode]
	require.Equal(t, "TestPubSub_"+m.name, t.Name())
	if m.grouped {
		// An XPENDING of miniredis takes so long with the suite's 10,000 pending
		// entries, under its only lock, that commands of all tests time out.
		testserver.RequireReal(t)
	}
	single, grouped := constructors(testserver.Addr(t), m.grouped, m.concurrency)
	tests.TestPubSub(t, m.features, single, grouped)
}

// TestPubSubOldMessages is the only test of the suite that cannot run with a fixed
// group: it requires each of several subscribers to receive every old message.
func TestPubSubOldMessages(t *testing.T) {
	t.Parallel()
	for _, mode := range modes[:2] {
		t.Run(mode.name, func(t *testing.T) {
			_, grouped := constructors(testserver.Addr(t), true, mode.concurrency)
			features := mode.features
			features.NewSubscriberReceivesOldMessages = true
			tests.TestNewSubscriberReceivesOldMessages(t, tests.TestContext{TestID: tests.NewTestID(), Features: features},
				func(t *testing.T) (message.Publisher, message.Subscriber) {
					return grouped(t, watermill.NewShortUUID())
				})
		})
	}
}

// TestPubSubReconnect restarts a real server twice while 100 goroutines publish
// 10,000 messages, which the suite does only if it is told how.
//
// The suite's test reads the list of published messages while it is still being
// written: the race detector stops it, and without the detector the last messages
// can arrive before they are in the list. So it runs without the detector, and the
// last message is delayed. TestRestart needs neither.
func TestPubSubReconnect(t *testing.T) {
	t.Parallel()
	if raceEnabled {
		t.Skip("the suite's own test has a data race; TestRestart does the same under the race detector")
	}
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always")
			features := mode.features
			features.RestartServiceCommand = server.RestartCommand()
			single, _ := constructors(server.Addr(), mode.grouped, mode.concurrency)
			late := func(t *testing.T) (message.Publisher, message.Subscriber) {
				pub, sub := single(t)
				last := &lastMessage{published: make(chan struct{})}
				return countedPublisher{pub, last}, lateSubscriber{sub, last}
			}
			tests.TestReconnect(t, tests.TestContext{TestID: tests.NewTestID(), Features: features}, late)
		})
	}
}

// lastMessage is the last of the 10,000 messages that the suite publishes one by
// one.
type lastMessage struct {
	calls     atomic.Int64  // of Publish that succeeded
	published chan struct{} // closed when all have
}

type countedPublisher struct {
	message.Publisher
	last *lastMessage
}

func (p countedPublisher) Publish(topic string, messages ...*message.Message) error {
	err := p.Publisher.Publish(topic, messages...)
	if err == nil && p.last.calls.Add(1) == 10_000 {
		close(p.last.published)
	}
	return err
}

// lateSubscriber delays the last message until Publish has returned for all
// messages and the suite's goroutines have had three seconds to append them to
// their list. That takes them microseconds, but cannot be observed from here.
type lateSubscriber struct {
	message.Subscriber
	last *lastMessage
}

func (s lateSubscriber) Subscribe(ctx context.Context, topic string) (<-chan *message.Message, error) {
	in, err := s.Subscriber.Subscribe(ctx, topic)
	if err != nil {
		return nil, err
	}
	out := make(chan *message.Message)
	go func() {
		defer close(out)
		seen := make(map[string]bool) // some may come twice
		for msg := range in {
			if seen[msg.UUID] = true; len(seen) == 10_000 {
				<-s.last.published
				time.Sleep(3 * time.Second)
			}
			out <- msg
		}
	}()
	return out, nil
}

// TestPubSubStress runs the suite ten times at once. It takes minutes, so it needs
// GOXSTREAMS_TEST_STRESS=1.
func TestPubSubStress(t *testing.T) {
	if os.Getenv("GOXSTREAMS_TEST_STRESS") == "" {
		t.Skip("the stress variant runs with GOXSTREAMS_TEST_STRESS=1")
	}
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			single, grouped := constructors(testserver.Addr(t), mode.grouped, mode.concurrency)
			tests.TestPubSubStressTest(t, mode.features, single, grouped)
		})
	}
}

func BenchmarkSubscriber(b *testing.B) {
	client := testserver.Client(b)
	logger := watermill.NopLogger{}
	tests.BenchSubscriber(b, func(n int) (message.Publisher, message.Subscriber) {
		pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
		require.NoError(b, err)
		sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: watermill.NewShortUUID()}, logger)
		require.NoError(b, err)
		return pub, sub
	})
}

// children are the roles of the processes that tests start: this binary, with
// childEnv set.
var children = map[string]func(){}
