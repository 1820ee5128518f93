package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// This file tests SubscriberConfig.OrderingKey.

// keyOf is the OrderingKey of these tests: the first word of the payload.
func keyOf(msg *message.Message) string {
	key, _, _ := strings.Cut(string(msg.Payload), " ")
	return key
}

// keyed is a config with that OrderingKey.
func keyed(client redis.UniversalClient) goxstreams.SubscriberConfig {
	config := grouped(client)
	config.MaxConcurrency, config.OrderingKey, config.Retry = 50, keyOf, quickRetry()
	return config
}

// orderly checks messages while they are handled: one at a time of each key, and each one
// first handled after its predecessors.
type orderly struct {
	t       testing.TB
	mu      sync.Mutex
	running map[string]int
	last    map[string]int // the number of the last message of each key that was handled
	handled int
	most    int // at once

	anyOrder bool
}

func newOrderly(t testing.TB) *orderly {
	return &orderly{t: t, running: make(map[string]int), last: make(map[string]int)}
}

// handle calls the function for each message, concurrently, and acks if it returns true.
func (o *orderly) handle(messages <-chan *message.Message, work func(key string, n int, msg *message.Message) bool) {
	go func() {
		for msg := range messages {
			go o.one(msg, work)
		}
	}()
}

func (o *orderly) one(msg *message.Message, work func(key string, n int, msg *message.Message) bool) {
	var key string
	var n int
	_, err := fmt.Sscan(string(msg.Payload), &key, &n)
	assert.NoError(o.t, err)
	o.mu.Lock()
	o.running[key]++
	assert.Equal(o.t, 1, o.running[key], "messages of %s at once", key)
	if !o.anyOrder {
		assert.Equal(o.t, o.last[key]+1, n, "%s: out of order", key)
	}
	all := 0
	for _, r := range o.running {
		all += r
	}
	o.most = max(o.most, all)
	o.mu.Unlock()
	ok := work(key, n, msg)
	o.mu.Lock()
	o.running[key]--
	if ok {
		o.last[key] = n
		o.handled++
	}
	o.mu.Unlock()
	if ok {
		msg.Ack()
	} else {
		msg.Nack()
	}
}

func (o *orderly) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.handled
}

// ordered returns the payloads of n messages for each of the keys, in turn.
func ordered(n int, keys ...string) (payloads []string) {
	for i := range n {
		for _, key := range keys {
			payloads = append(payloads, fmt.Sprintf("%s %d", key, i+1))
		}
	}
	return payloads
}

func manyKeys(n int) (keys []string) {
	for i := range n {
		keys = append(keys, fmt.Sprint("key", i))
	}
	return keys
}

// Messages of one key are handled one at a time and in order, also those that fail now and
// then; others meanwhile.
func TestOrderingKey(t *testing.T) {
	t.Parallel()
	for _, fanOut := range []bool{false, true} {
		for _, concurrency := range []int{1, 50} {
			t.Run(fmt.Sprintf("fan-out=%t, MaxConcurrency=%d", fanOut, concurrency), func(t *testing.T) {
				t.Parallel()
				client, topic := newClient(t), topic(t)
				config := keyed(client)
				config.MaxConcurrency = concurrency
				if fanOut {
					config.ConsumerGroup, config.Retry, config.StartID = "", nil, "0"
				}
				payloads := ordered(20, manyKeys(20)...)
				publish(t, client, topic, payloads...)
				o := newOrderly(t)
				sub := newSubscriber(t, config)
				o.handle(subscribe(t, sub, topic), func(_ string, n int, _ *message.Message) bool {
					time.Sleep(time.Duration(rand.IntN(2_000)) * time.Microsecond) // work
					return n%7 != 3 || rand.IntN(2) == 0
				})
				eventuallyAll(t, o.count, len(payloads))
				require.LessOrEqual(t, o.most, concurrency)
				if concurrency > 1 {
					require.Greater(t, o.most, 5)
				}
				if !fanOut {
					eventuallySettled(t, client, topic, testGroup)
				}
			})
		}
	}
}

// An empty key has no order.
func TestOrderingKey_Empty(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := keyed(client)
	config.MaxConcurrency = 10
	config.OrderingKey = func(*message.Message) string { return "" }
	publishN(t, client, topic, 10)
	require.Len(t, collect(subscribe(t, newSubscriber(t, config), topic), 10, patience), 10, "none of them is acked")
}

// A key whose first message waits for an hour, and one whose handler does not return, stop
// no others, however many messages follow them.
func TestOrderingKey_OthersGoOn(t *testing.T) {
	t.Parallel()
	for name, stuck := range map[string]func(msg *message.Message, end <-chan struct{}){
		"the first one waits":   func(msg *message.Message, _ <-chan struct{}) { msg.Nack() },
		"the first one hangs":   func(msg *message.Message, end <-chan struct{}) { <-end; msg.Nack() },
		"the first ones hang":   func(msg *message.Message, end <-chan struct{}) { <-end; msg.Nack() },
		"the first ones snooze": nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := keyed(client)
			config.BatchSize, config.CloseTimeout = 50, time.Second
			config.Retry = &goxstreams.Retry{InitialInterval: time.Hour, MaxInterval: time.Hour}
			bad := []string{"bad"}
			if strings.HasPrefix(name, "the first ones") {
				bad = manyKeys(30)
			}
			payloads := ordered(1500/len(bad), bad...)
			payloads = append(payloads, ordered(20, "good", "better", "best")...)
			publish(t, client, topic, payloads...)
			end := make(chan struct{})
			defer close(end)
			var others, first atomic.Int64
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			go func() {
				for msg := range messages {
					go func() {
						switch key := keyOf(msg); {
						case strings.HasSuffix(key, "d") && key != "bad", strings.HasPrefix(key, "be"):
							others.Add(1)
							msg.Ack()
						case stuck == nil:
							first.Add(1)
							_, err := config.Retry.Middleware(func(*message.Message) ([]*message.Message, error) {
								return nil, goxstreams.Snooze(errors.New("busy"), time.Hour)
							})(msg)
							assert.Error(t, err)
							msg.Nack()
						default:
							first.Add(1)
							stuck(msg, end)
						}
					}()
				}
			}()
			eventuallyAll(t, func() int { return int(others.Load()) }, 60)
			require.EqualValues(t, len(bad), first.Load(), "their successors wait")
			require.NoError(t, sub.Close())
		})
	}
}

// What waits for its key is released like everything else that no handler has: another
// consumer takes it at once, uncounted.
func TestOrderingKey_Close(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // delivery counts set back
	client, topic := newClient(t), topic(t)
	config := keyed(client)
	config.ClaimInterval = 20 * time.Millisecond
	payloads := ordered(100, manyKeys(5)...)
	publish(t, client, topic, payloads...)
	first := newOrderly(t)
	sub := newSubscriber(t, config)
	first.handle(subscribe(t, sub, topic), func(string, int, *message.Message) bool {
		time.Sleep(time.Millisecond) // work
		return true
	})
	eventually(t, func() bool { return first.count() > 50 })
	require.NoError(t, sub.Close())
	require.Less(t, first.count(), len(payloads), "nothing is left")
	for _, row := range pendingOf(t, client, topic, testGroup) {
		require.Equal(t, "released", row.Consumer)
		require.Zero(t, row.RetryCount)
	}
	second := newOrderly(t)
	second.anyOrder, second.handled = true, first.handled // it reads what is new, and takes what is released
	second.handle(subscribe(t, newSubscriber(t, config), topic), func(_ string, _ int, msg *message.Message) bool {
		d, _ := goxstreams.DeliveryFromContext(msg.Context())
		assert.EqualValues(t, 1, d.Count)
		return true
	})
	eventuallyAll(t, second.count, len(payloads))
	eventuallySettled(t, client, topic, testGroup)
}

// What a dead consumer leaves has keys, too.
func TestOrderingKey_TakeOver(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, count := range []int64{1, 3, 10} { // innocents, suspects, those with one delivery left
		t.Run(fmt.Sprint("count ", count), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			createGroup(t, client, topic, testGroup)
			payloads := ordered(3, manyKeys(4)...)
			publish(t, client, topic, payloads...)
			args := []any{"xclaim", topic, testGroup, "dead", 0}
			for _, id := range readAs(t, client, topic, testGroup, "dead", len(payloads)) {
				args = append(args, id)
			}
			require.NoError(t, client.Do(t.Context(), append(args, "retrycount", count, "justid")...).Err())
			config := keyed(client)
			config.ClaimMinIdle, config.ClaimInterval = minIdle, 20*time.Millisecond
			config.Retry.MaxRetries = 10
			var running, handled sync.Map
			var n atomic.Int64
			messages := subscribe(t, newSubscriber(t, config), topic)
			go func() {
				for msg := range messages {
					go func() {
						_, taken := running.LoadOrStore(keyOf(msg), true)
						assert.False(t, taken, "messages of %s at once", keyOf(msg))
						time.Sleep(time.Millisecond) // work
						running.Delete(keyOf(msg))
						if _, again := handled.LoadOrStore(msg.UUID, true); !again {
							n.Add(1)
						}
						msg.Ack()
					}()
				}
			}()
			eventuallyAll(t, func() int { return int(n.Load()) }, len(payloads))
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// The delivery of a claimed message that waits for its key has not begun, so that a crash
// of its consumer uses up none, however often that happens.
func TestOrderingKey_WaitingCountsNothing(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, count := range []int64{1, 3} { // an innocent, a suspect
		t.Run(fmt.Sprint("count ", count), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			createGroup(t, client, topic, testGroup)
			publish(t, client, topic, "key 1", "key 2")
			ids := readAs(t, client, topic, testGroup, "dead", 2)
			require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, "dead", 0, ids[1], "retrycount", count, "justid").Err())
			config := keyed(client)
			config.ClaimMinIdle, config.ClaimInterval = minIdle, 20*time.Millisecond
			config.Retry.MaxRetries = 10
			messages := subscribe(t, newSubscriber(t, config), topic)
			first := next(t, messages)
			waits, before := ids[1], count
			if delivery(t, first).ID == waits {
				waits, before = ids[0], 1
			}
			eventually(t, func() bool {
				return slices.ContainsFunc(pendingOf(t, client, topic, testGroup), func(p redis.XPendingExt) bool {
					return p.ID == waits && p.Consumer != "dead" && p.RetryCount == before
				})
			}, "its delivery counts")
			require.NoError(t, client.XGroupDestroy(t.Context(), topic, testGroup).Err())
			eventually(t, func() bool {
				pending, err := client.XPending(t.Context(), topic, testGroup).Result()
				return err == nil && pending.Count == 2
			})
			for _, p := range pendingOf(t, client, topic, testGroup) {
				require.True(t, p.ID != waits || p.RetryCount == before, "its delivery counts once the group was lost")
			}
			first.Ack()
			second := next(t, messages)
			require.Equal(t, waits, delivery(t, second).ID)
			require.Equal(t, before+1, delivery(t, second).Count)
			second.Ack()
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// A dead message frees its key, and so does a malformed one.
func TestOrderingKey_Dead(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := keyed(client)
	config.Retry.MaxRetries = 2
	payloads := ordered(3, manyKeys(4)...)
	publish(t, client, topic, payloads...)
	o := newOrderly(t)
	var dead atomic.Int64
	o.handle(subscribe(t, newSubscriber(t, config), topic), func(key string, n int, msg *message.Message) bool {
		d, _ := goxstreams.DeliveryFromContext(msg.Context())
		if n == 2 && d.Count == 3 { // its last delivery
			dead.Add(1)
			o.mu.Lock()
			o.last[key] = n
			o.mu.Unlock()
		}
		return n != 2
	})
	eventuallyAll(t, o.count, len(payloads)-4)
	eventuallySettled(t, client, topic, testGroup)
	require.EqualValues(t, 4, dead.Load())
	require.EqualValues(t, 4, client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val())
}

// An OrderingKey that panics makes the entry malformed; one that calls runtime.Goexit fails
// this delivery; one that hangs delays Close no longer than CloseTimeout.
func TestOrderingKey_Misbehaves(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	setup := func(t *testing.T, bad func()) (client *redis.Client, topicName string, sub *goxstreams.Subscriber, good *atomic.Int64) {
		client, topicName = newClient(t), topic(t)
		config := keyed(client)
		config.CloseTimeout, config.Retry.MaxRetries = time.Second, 2
		config.OrderingKey = func(msg *message.Message) string {
			if keyOf(msg) == "bad" {
				bad()
			}
			return keyOf(msg)
		}
		publish(t, client, topicName, "good 1", "bad 1", "good 2")
		sub, good = newSubscriber(t, config), new(atomic.Int64)
		messages := subscribe(t, sub, topicName)
		go func() {
			for msg := range messages {
				good.Add(1)
				msg.Ack()
			}
		}()
		return client, topicName, sub, good
	}
	t.Run("panics", func(t *testing.T) {
		t.Parallel()
		client, topic, _, good := setup(t, func() { panic("no key") })
		eventually(t, func() bool {
			return good.Load() == 2 && client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val() == 1
		})
		eventuallySettled(t, client, topic, testGroup)
		letters := client.XRange(t.Context(), goxstreams.DeadLetterTopic(topic), "-", "+").Val()
		require.Contains(t, fmt.Sprint(letters[0].Values), "OrderingKey: panic: no key")
	})
	t.Run("exits", func(t *testing.T) {
		t.Parallel()
		client, topic, _, good := setup(t, runtime.Goexit)
		eventually(t, func() bool {
			return good.Load() == 2 && client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val() == 1
		})
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("hangs", func(t *testing.T) {
		t.Parallel()
		begun, end := make(chan struct{}), make(chan struct{})
		defer close(end)
		_, _, sub, _ := setup(t, func() { close(begun); <-end })
		<-begun
		began := time.Now()
		require.NoError(t, sub.Close())
		require.GreaterOrEqual(t, time.Since(began), time.Second)
	})
}

// A Consumer's worker gets its messages in order, too.
func TestOrderingKey_Worker(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{}
	config := keyed(client)
	config.OrderingKey = func(msg *message.Message) string { return msg.Metadata.Get("article") }
	var mu sync.Mutex
	last := make(map[string]int)
	worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
		mu.Lock()
		defer mu.Unlock()
		if msg.RetryCount == 0 && msg.Body.Quantity%5 == 0 {
			return errors.New("again")
		}
		assert.Equal(t, last[msg.Body.Article]+1, msg.Body.Quantity)
		last[msg.Body.Article] = msg.Body.Quantity
		return nil
	}
	pub := newPublisher(t, client)
	for i := range 40 {
		for _, article := range []string{"cup", "pot"} {
			msg := message.NewMessage(fmt.Sprint(article, i), fmt.Appendf(nil, `{"Article":%q,"Quantity":%d}`, article, i+1))
			msg.Metadata.Set("article", article)
			require.NoError(t, pub.Publish(topic, msg))
		}
	}
	start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
	eventuallyDone(t, client, topic)
	require.Equal(t, map[string]int{"cup": 40, "pot": 40}, last)
}

// With NoAck a nacked message is dropped, and its successor follows.
func TestOrderingKey_NoAck(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := keyed(client)
	config.NoAck, config.Retry = true, nil
	createGroup(t, client, topic, testGroup)
	publish(t, client, topic, ordered(50, manyKeys(4)...)...)
	o := newOrderly(t)
	o.handle(subscribe(t, newSubscriber(t, config), topic), func(key string, n int, _ *message.Message) bool {
		if n%3 == 0 {
			o.mu.Lock()
			o.last[key], o.handled = n, o.handled+1
			o.mu.Unlock()
			return false
		}
		return true
	})
	eventuallyAll(t, o.count, 200)
}

// With one slot, messages that fail again and again hold their keys, and nothing else: not
// those of other keys, and not what a dead consumer had.
func TestOrderingKey_RetriesStarveNobody(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"fresh", "fan-out", "claims"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := keyed(client)
			config.MaxConcurrency = 1
			config.ClaimMinIdle, config.ClaimInterval = 500*time.Millisecond, 50*time.Millisecond
			config.Retry = &goxstreams.Retry{InitialInterval: 20 * time.Millisecond, MaxInterval: 20 * time.Millisecond}
			var good, bad []string
			for i := range 10 {
				good, bad = append(good, fmt.Sprintf("good%d 1", i)), append(bad, fmt.Sprintf("bad%d 1", i))
			}
			switch mode {
			case "claims":
				createGroup(t, client, topic, testGroup)
				publish(t, client, topic, good...)
				readAs(t, client, topic, testGroup, "dead", len(good))
				publish(t, client, topic, bad...)
			case "fan-out":
				config = goxstreams.SubscriberConfig{Client: client, OrderingKey: keyOf, StartID: "0"}
				fallthrough
			default:
				publish(t, client, topic, bad...)
				publish(t, client, topic, good...)
			}
			var handled atomic.Int64
			messages := subscribe(t, newSubscriber(t, config), topic)
			go func() {
				for msg := range messages {
					if strings.HasPrefix(string(msg.Payload), "good") {
						handled.Add(1)
						msg.Ack()
						continue
					}
					time.Sleep(5 * time.Millisecond) // ten of these are longer than their backoff
					msg.Nack()
				}
			}()
			eventually(t, func() bool { return handled.Load() == 10 })
		})
	}
}

// Retries of slow handlers, for which nothing is read ahead, keep every slot busy: then
// nothing more was read, for good.
func TestRetriesOfSlowHandlersStarveNobody(t *testing.T) {
	t.Parallel()
	for _, slots := range []int{1, 2, 4} {
		for _, keys := range []bool{true, false} {
			if slots == 1 && !keys {
				continue // the order comes first
			}
			t.Run(fmt.Sprintf("MaxConcurrency %d, keys %v", slots, keys), func(t *testing.T) {
				t.Parallel()
				client, topic := newClient(t), topic(t)
				config := keyed(client)
				if config.MaxConcurrency = slots; !keys {
					config.OrderingKey = nil
				}
				config.Retry = &goxstreams.Retry{InitialInterval: 20 * time.Millisecond, MaxInterval: 20 * time.Millisecond}
				for i := range 20 {
					publish(t, client, topic, fmt.Sprintf("bad%d 1", i))
				}
				publish(t, client, topic, "good1 1", "good2 1", "good3 1")
				var good atomic.Int64
				messages := subscribe(t, newSubscriber(t, config), topic)
				go func() {
					for msg := range messages {
						go func() {
							select {
							case <-time.After(150 * time.Millisecond): // slow, for the prefetch
							case <-t.Context().Done():
							}
							if strings.HasPrefix(string(msg.Payload), "bad") {
								msg.Nack()
								return
							}
							good.Add(1)
							msg.Ack()
						}()
					}
				}()
				eventually(t, func() bool { return good.Load() == 3 }, "good messages are not even read")
			})
		}
	}
}

// Closing uses up no retry of what was read with a message whose OrderingKey hangs, and
// leaves it to others at once.
func TestOrderingKey_HangsAtClose(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := keyed(client)
	config.CloseTimeout = time.Second
	begun, end := make(chan struct{}), make(chan struct{})
	defer close(end)
	var once sync.Once
	config.OrderingKey = func(msg *message.Message) string {
		once.Do(func() { close(begun); <-end })
		return keyOf(msg)
	}
	createGroup(t, client, topic, testGroup)
	publish(t, client, topic, ordered(5, "a", "b")...)
	sub := newSubscriber(t, config)
	subscribe(t, sub, topic)
	<-begun
	eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == 10 })
	require.NoError(t, sub.Close())
	for _, p := range pendingOf(t, client, topic, testGroup) {
		require.Zero(t, p.RetryCount, "%+v", p)
	}
	config.OrderingKey = keyOf
	messages := subscribe(t, newSubscriber(t, config), topic)
	for range 10 {
		msg := next(t, messages)
		require.EqualValues(t, 1, delivery(t, msg).Count)
		msg.Ack()
	}
}
