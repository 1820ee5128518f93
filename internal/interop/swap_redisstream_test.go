package interop

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// The steps of docs/from-watermill-redisstream.md, there and back, while a producer
// never stops. Nothing is lost, and only what a stopping old process has in hand is
// handled twice.
func TestSwap_Redisstream(t *testing.T) {
	live := newLiveStream(t)
	live.produce(live.oldPublisher())
	live.start("old-1", live.oldConsumer)
	live.start("old-2", live.oldConsumer)
	live.requireAtWork("old-1", "old-2")

	// Step 2: new consumers beside the old ones.
	live.start("new-1", live.newConsumer)
	live.requireAtWork("old-1", "old-2", "new-1")
	live.start("new-2", live.newConsumer)

	// Step 3: the old ones stop, one by one. What they leave pending is taken over.
	for _, name := range []string{"old-1", "old-2"} {
		live.stop(name)
		live.requireAtWork("new-1", "new-2")
		left := live.timePasses(name)
		live.eventually("what "+name+" left is taken over", func() bool { return live.settled(left) })
	}
	live.requireAllHandled()

	// Step 4: the publishers.
	newPublisher := live.newPublisher()
	live.produce(newPublisher)
	live.requireAtWork("new-1", "new-2")
	live.retire(0)
	live.requireAtWork("new-1", "new-2")

	// Back: publishers first, then the consumers.
	live.produce(live.oldPublisher())
	live.retire(1)
	live.start("old-3", live.oldConsumer)
	live.requireAtWork("new-1", "new-2", "old-3")
	for _, name := range []string{"new-1", "new-2"} {
		live.stop(name)
		live.requireAtWork("old-3")
	}
	left := live.timePasses("released")
	live.eventually("what the new ones released is taken over", func() bool { return live.settled(left) })
	for _, c := range live.client.XInfoConsumers(t.Context(), live.topic, group).Val() {
		require.Contains(t, []string{"old-1", "old-2", "old-3", "released"}, c.Name, "the new ones take their names along")
	}
	live.retire(2)
	live.requireAllHandled()
	require.Zero(t, live.client.XLen(t.Context(), goxstreams.DeadLetterTopic(live.topic)).Val())

	// Acks in flight when an old one stops do not arrive. It has three messages: the
	// first is handled, and a race of its goroutines decides about the others.
	twice := live.twice()
	require.Len(t, twice, 2)
	for _, name := range []string{"old-1", "old-2"} {
		require.Contains(t, []int{1, 2, 3}, twice[name], name)
	}
}

// Why ClaimMinIdle must be three times what an old handler takes: entries wait in the
// old process behind the one in hand, and are not renewed.
func TestSwap_RedisstreamHoldsThree(t *testing.T) {
	s := newStream(t)
	s.maxIdle = longIdle
	require.NoError(t, oldOne.publisher(s).Publish(s.topic, randomMessages(10)...))
	inHand := receive(t, subscribe(t, oldOne.subscriber(s, group), s.topic))
	pending := func() int64 { return s.client.XPending(t.Context(), s.topic, group).Val().Count }
	require.Eventually(t, func() bool { return pending() == 3 }, patience, 10*time.Millisecond)
	inHand.Ack()
	require.Eventually(t, func() bool { return s.client.XInfoGroups(t.Context(), s.topic).Val()[0].EntriesRead == 4 }, patience, 10*time.Millisecond)
	require.EqualValues(t, 3, pending())
}

// longIdle is longer than any pause of a machine, so no living process loses a
// message. timePasses makes entries that old.
const longIdle = 30 * time.Second

// liveStream is a topic with producers that do not stop, and processes that
// handle it: a router and a client each.
type liveStream struct {
	stream
	producers []func()            // stop one each
	processes map[string]*process // by their names

	mu      sync.Mutex
	sent    []string            // UUIDs
	handled map[string][]string // by UUID: the processes that handled it
	failed  map[string]bool
}

type process struct {
	seen    int           // guarded by liveStream.mu
	holds   bool          // likewise: it does not finish the next message until it is told to stop
	inHand  chan struct{} // closed when it has
	stopped chan struct{} // closed when it is told to stop, unless it ignores that: see stop
	stop    func()
}

func newLiveStream(t *testing.T) *liveStream {
	live := &liveStream{
		stream: newStream(t), processes: map[string]*process{}, handled: map[string][]string{}, failed: map[string]bool{},
	}
	live.maxIdle = longIdle
	return live
}

func (l *liveStream) oldPublisher() message.Publisher { return oldOne.publisher(l.stream) }
func (l *liveStream) newPublisher() message.Publisher { return newOne.publisher(l.stream) }

func (l *liveStream) oldConsumer(name string) message.Subscriber {
	sub, err := redisstream.NewSubscriber(redisstream.SubscriberConfig{
		Client: testserver.Client(l.t), ConsumerGroup: group, Consumer: name,
		MaxIdleTime: longIdle, ClaimInterval: 100 * time.Millisecond,
	}, nil)
	require.NoError(l.t, err)
	return sub
}

func (l *liveStream) newConsumer(string) message.Subscriber {
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: testserver.Client(l.t), ConsumerGroup: group,
		ClaimMinIdle: longIdle, ClaimInterval: 100 * time.Millisecond,
	}, nil)
	require.NoError(l.t, err)
	return sub
}

// produce starts a producer, which publishes one message after the other.
func (l *liveStream) produce(pub message.Publisher) {
	done, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			l.publish(pub, 1)
			select {
			case <-time.After(5 * time.Millisecond):
			case <-stop:
				return
			}
		}
	}()
	end := sync.OnceFunc(func() { close(stop); <-done })
	l.producers = append(l.producers, end)
	l.t.Cleanup(end)
}

func (l *liveStream) publish(pub message.Publisher, n int) {
	messages := randomMessages(n)
	assert.NoError(l.t, pub.Publish(l.topic, messages...))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent = append(l.sent, uuids(messages)...)
}

// retire ends a producer; they are numbered in the order of their start.
func (l *liveStream) retire(producer int) { l.producers[producer]() }

// start runs a process.
func (l *liveStream) start(name string, consumer func(name string) message.Subscriber) {
	l.t.Helper()
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	require.NoError(l.t, err)
	sub := consumer(name)
	p := &process{inHand: make(chan struct{}), stopped: make(chan struct{})}
	router.AddConsumerHandler(name, l.topic, sub, func(msg *message.Message) error { return l.handle(name, p, msg) })
	ended := make(chan error, 1)
	go func() { ended <- router.Run(context.Background()) }()
	p.stop = sync.OnceFunc(func() {
		assert.NoError(l.t, router.Close())
		assert.NoError(l.t, <-ended)
		_ = sub.Close() // an old one returns an error: it has closed its client already
	})
	l.processes[name] = p
	l.t.Cleanup(p.stop)
	<-router.Running()
}

// stop ends a process as SIGTERM would, with a message in hand and others waiting. The
// handler then succeeds: in an old process after its message's context has ended, in a
// new one before.
func (l *liveStream) stop(name string) {
	l.t.Helper()
	p := l.processes[name]
	l.mu.Lock()
	p.holds = true
	l.mu.Unlock()
	select {
	case <-p.inHand:
	case <-time.After(2 * time.Minute):
		require.Fail(l.t, name+" gets no message")
	}
	l.publish(l.newPublisher(), 30)
	if strings.HasPrefix(name, "new") {
		close(p.stopped)
	}
	p.stop()
}

// handle fails at the first delivery of some messages.
func (l *liveStream) handle(name string, p *process, msg *message.Message) error {
	l.mu.Lock()
	p.seen++
	if p.holds {
		p.holds = false
		l.mu.Unlock()
		close(p.inHand)
		select {
		case <-p.stopped:
			assert.NoError(l.t, msg.Context().Err())
		case <-msg.Context().Done():
		}
		l.mu.Lock()
	} else if p.seen%50 == 7 && !l.failed[msg.UUID] {
		l.failed[msg.UUID] = true
		l.mu.Unlock()
		return errOnce
	}
	defer l.mu.Unlock()
	l.handled[msg.UUID] = append(l.handled[msg.UUID], name)
	return nil
}

// twice returns how many messages were handled twice, by the first process.
func (l *liveStream) twice() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	twice := map[string]int{}
	for uuid, by := range l.handled {
		if len(by) > 1 {
			assert.Len(l.t, by, 2, uuid)
			twice[by[0]]++
		}
	}
	l.t.Logf("%d messages, %d of them failed once, handled twice: %v", len(l.sent), len(l.failed), twice)
	return twice
}

// requireAtWork waits until each of the processes has handled a new message.
func (l *liveStream) requireAtWork(names ...string) {
	l.t.Helper()
	count := func(name string) int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.processes[name].seen
	}
	for _, name := range names {
		before := count(name)
		l.eventually(name+" takes part", func() bool { return count(name) >= before+20 })
	}
}

// requireAllHandled waits until everything sent so far is handled and acked.
func (l *liveStream) requireAllHandled() {
	l.t.Helper()
	last := l.client.XRevRangeN(l.t.Context(), l.topic, "+", "-", 1).Val()[0].ID
	l.mu.Lock()
	sent := l.sent
	l.mu.Unlock()
	l.eventually("all is acked", func() bool {
		pending := l.client.XPending(l.t.Context(), l.topic, group).Val()
		groups := l.client.XInfoGroups(l.t.Context(), l.topic).Val()
		return pending != nil && len(groups) == 1 &&
			older(last, groups[0].LastDeliveredID) && (pending.Count == 0 || !older(pending.Lower, last))
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, uuid := range sent {
		require.NotEmpty(l.t, l.handled[uuid], "%s is lost", uuid)
	}
}

// older reports whether the first of two entry IDs is not the newer one.
func older(a, b string) bool {
	var x, y struct{ ms, seq int64 }
	_, errA := fmt.Sscanf(a, "%d-%d", &x.ms, &x.seq)
	_, errB := fmt.Sscanf(b, "%d-%d", &y.ms, &y.seq)
	return errA == nil && errB == nil && (x.ms < y.ms || x.ms == y.ms && x.seq <= y.seq)
}

// timePasses makes the pending entries of a stopped consumer an hour old, so that the
// test need not wait, and living ones have plenty of time. It returns the entries' IDs.
func (l *liveStream) timePasses(consumer string) (left []string) {
	l.t.Helper()
	for _, p := range l.pending("-", "+", consumer) {
		left = append(left, p.ID)
		require.NoError(l.t, l.client.Do(l.t.Context(), "xclaim", l.topic, group, consumer, 0, p.ID,
			"idle", strconv.FormatInt(time.Hour.Milliseconds(), 10), "justid").Err())
	}
	l.t.Logf("%s leaves %d pending", consumer, len(left))
	return left
}

// settled reports whether none of the entries is pending any more.
func (l *liveStream) settled(ids []string) bool {
	for _, id := range ids {
		if len(l.pending(id, id, "")) > 0 {
			return false
		}
	}
	return true
}

func (l *liveStream) pending(start, end, consumer string) []redis.XPendingExt {
	pending, err := l.client.XPendingExt(l.t.Context(), &redis.XPendingExtArgs{
		Stream: l.topic, Group: group, Start: start, End: end, Count: 1000, Consumer: consumer,
	}).Result()
	require.NoError(l.t, err)
	return pending
}

func (l *liveStream) eventually(what string, is func() bool) {
	l.t.Helper()
	require.Eventually(l.t, is, 2*time.Minute, 10*time.Millisecond, what)
}
