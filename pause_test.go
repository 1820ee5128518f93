package goxstreams_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// This file tests Pause and Resume.

// obeyed is how long after Pause a handler may still begin.
const obeyed = 1500 * time.Millisecond

func pause(t testing.TB, client redis.UniversalClient, topic string) {
	t.Helper()
	require.NoError(t, goxstreams.Pause(t.Context(), client, topic, testGroup))
}

func resume(t testing.TB, client redis.UniversalClient, topic string) {
	t.Helper()
	require.NoError(t, goxstreams.Resume(t.Context(), client, topic, testGroup))
}

// eventuallyPaused waits until the subscription knows.
func eventuallyPaused(t testing.TB, sub *goxstreams.Subscriber, paused bool) {
	t.Helper()
	eventually(t, func() bool { return stats(t, sub).PausedSince.IsZero() != paused }, "paused should be %t", paused)
}

// pauseFor pauses, and waits until the subscription knows.
func pauseFor(t testing.TB, client redis.UniversalClient, topic string, sub *goxstreams.Subscriber) {
	t.Helper()
	pause(t, client, topic)
	eventuallyPaused(t, sub, true)
}

// warm is how many messages are handled before a subscription reads far ahead.
const warm = 300

// readAhead has a subscription read ahead of as many running handlers, which it does if
// messages are handled quickly, and returns the messages that remain. On a busy machine the
// first ones may not be.
func readAhead(t testing.TB, client redis.UniversalClient, topic string, sub *goxstreams.Subscriber, messages <-chan *message.Message, running int) (ids []string) {
	t.Helper()
	deadline, acked := time.Now().Add(patience), stats(t, sub).Acked
	isAhead := func() bool { s := stats(t, sub); return s.Acked == acked && s.InFlight > running+3 }
	for !isAhead() {
		require.True(t, time.Now().Before(deadline), "nothing is read ahead")
		ids = append(ids, publishN(t, client, topic, warm+200-len(ids))...)
		for range warm {
			next(t, messages).Ack()
		}
		ids, acked = ids[warm:], acked+warm
		for wait := time.Now().Add(time.Second); !isAhead() && time.Now().Before(wait); time.Sleep(5 * time.Millisecond) {
		}
	}
	return ids
}

// Readers stop, the running handler finishes and is settled, and what was read ahead is
// released with its count as before; after Resume it comes in order.
func TestPause(t *testing.T) {
	testserver.RequireReal(t) // delivery counts set back, or unchanged by a claim
	t.Parallel()
	for _, concurrency := range []int{1, 3} {
		t.Run(fmt.Sprint("MaxConcurrency=", concurrency), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := grouped(client)
			config.MaxConcurrency = concurrency
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			ids := readAhead(t, client, topic, sub, messages, concurrency)
			before := stats(t, sub).Acked
			var running []*message.Message
			for range concurrency {
				running = append(running, next(t, messages))
			}
			eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) > concurrency }, "nothing is read ahead")
			pauseFor(t, client, topic, sub)
			eventually(t, func() bool { return stats(t, sub).InFlight == concurrency }, "what was read ahead is still in flight")
			for _, p := range pendingOf(t, client, topic, testGroup) {
				if p.Consumer == "released" {
					require.Zero(t, p.RetryCount, p.ID)
				} else {
					require.EqualValues(t, 1, p.RetryCount, p.ID)
				}
			}
			for _, msg := range running {
				require.NoError(t, msg.Context().Err())
				msg.Ack()
			}
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "the running ones are not settled")
			ids = append(ids, publishN(t, client, topic, 5)...)
			during(t, obeyed, func() bool {
				select {
				case msg := <-messages:
					t.Error("handed out: ", msg.UUID)
				default:
				}
				return !t.Failed()
			}, "handed out")
			st := stats(t, sub)
			require.NoError(t, st.Err)
			require.EqualValues(t, before+int64(concurrency), st.Acked)
			ts, err := sub.TopicStats(t.Context(), topic)
			require.NoError(t, err)
			require.WithinDuration(t, time.Now(), ts.PausedSince, time.Minute)
			require.Equal(t, ts.PausedSince, st.PausedSince)

			resume(t, client, topic)
			var after []*message.Message
			for range len(ids) - concurrency {
				msg := next(t, messages)
				require.EqualValues(t, 1, delivery(t, msg).Count)
				after = append(after, msg)
				msg.Ack()
			}
			require.ElementsMatch(t, ids[concurrency:], uuids(after))
			if concurrency == 1 {
				require.Equal(t, ids[1:], uuids(after))
			}
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// Bad input is named.
func TestPause_BadInput(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	ctx := context.Background()
	for _, f := range []func(context.Context, redis.UniversalClient, string, string) error{goxstreams.Pause, goxstreams.Resume} {
		require.ErrorContains(t, f(ctx, nil, topic, testGroup), ".client: a client is required")
		require.ErrorContains(t, f(ctx, client, "", testGroup), ".topic: is empty")
		require.ErrorContains(t, f(ctx, client, topic, ""), ".group: is empty; a fan-out")
		require.ErrorContains(t, f(ctx, client, topic, "nobody"), "has no such group")
	}
	createGroup(t, client, topic, testGroup)
	for _, f := range []func(context.Context, redis.UniversalClient, string, string) error{goxstreams.Pause, goxstreams.Resume} {
		require.ErrorContains(t, f(ctx, client, topic, "nobody"), "has no such group")
	}
	paused, err := goxstreams.Paused(ctx, client, topic)
	require.NoError(t, err)
	require.Empty(t, paused)
	_, err = goxstreams.Paused(ctx, client, "")
	require.ErrorContains(t, err, "Paused.topic: is empty")

	resume(t, client, topic) // was never paused
	pause(t, client, topic)
	first, err := goxstreams.Paused(ctx, client, topic)
	require.NoError(t, err)
	require.Contains(t, first, testGroup)
	pause(t, client, topic) // the first time counts
	again, err := goxstreams.Paused(ctx, client, topic)
	require.NoError(t, err)
	require.Equal(t, first, again)
	resume(t, client, topic)
	resume(t, client, topic)
	paused, err = goxstreams.Paused(ctx, client, topic)
	require.NoError(t, err)
	require.Empty(t, paused)
}

// A consumer that subscribes while its group is paused begins nothing until Resume.
func TestPause_SubscribeLater(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, testGroup)
	pause(t, client, topic)
	ids := publishN(t, client, topic, 5)
	sub := newSubscriber(t, grouped(client))
	messages := subscribe(t, sub, topic)
	require.False(t, stats(t, sub).PausedSince.IsZero(), "Subscribe has returned, and does not know")
	during(t, obeyed, func() bool { return stats(t, sub).Delivered == 0 && stats(t, sub).InFlight == 0 }, "it reads")
	resume(t, client, topic)
	for _, id := range ids {
		msg := next(t, messages)
		require.Equal(t, id, msg.UUID)
		msg.Ack()
	}
}

// Retries that become due during a pause wait, with their count and their lease; the order is
// kept. Others do not take them.
func TestPause_Retries(t *testing.T) {
	testserver.RequireReal(t) // delivery counts set back, or unchanged by a claim
	t.Parallel()
	for _, concurrency := range []int{1, 4} {
		t.Run(fmt.Sprint("MaxConcurrency=", concurrency), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := claiming(client)
			config.ClaimMinIdle = 2 * minIdle // renewals may be late on a busy machine
			config.MaxConcurrency, config.Retry = concurrency, quickRetry()
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			first := publish(t, client, topic, "fails")[0]
			msg := next(t, messages)
			pauseFor(t, client, topic, sub)
			msg.Nack()
			eventually(t, func() bool { return stats(t, sub).Waiting == 1 })
			subscribe(t, newSubscriber(t, config), topic) // would take over what nobody renews
			during(t, 2*config.ClaimMinIdle, func() bool { return stats(t, sub).Delivered == 1 && stats(t, sub).Waiting == 1 }, "retried")
			for _, p := range pendingOf(t, client, topic, testGroup) {
				require.EqualValues(t, 1, p.RetryCount)
				require.Less(t, p.Idle, config.ClaimMinIdle, "its lease is not renewed")
			}
			second := publish(t, client, topic, "follows")[0]
			resume(t, client, topic)
			msg = next(t, messages)
			if concurrency > 1 && msg.UUID == second { // the other subscriber may have it
				msg.Ack()
				msg = next(t, messages)
			}
			require.Equal(t, first, msg.UUID)
			require.EqualValues(t, 2, delivery(t, msg).Count)
			msg.Ack()
		})
	}
}

// A running handler keeps its lease during a pause, and what a dead consumer had is taken over
// only after it.
func TestPause_LeasesAndClaims(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, testGroup)
	left := publish(t, client, topic, "left")[0]
	readAs(t, client, topic, testGroup, "died", 1)
	pause(t, client, topic)
	config := claiming(client)
	config.ClaimMinIdle = 2 * minIdle // renewals may be late on a busy machine
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	during(t, 2*config.ClaimMinIdle+2*config.ClaimInterval, func() bool {
		pending := pendingOf(t, client, topic, testGroup)
		return len(pending) == 1 && pending[0].Consumer == "died" && pending[0].RetryCount == 1
	}, "claimed")
	resume(t, client, topic)
	msg := next(t, messages)
	require.Equal(t, left, msg.UUID)
	require.EqualValues(t, 2, delivery(t, msg).Count)
	pauseFor(t, client, topic, sub)
	during(t, 2*config.ClaimMinIdle, func() bool {
		return msg.Context().Err() == nil && pendingOf(t, client, topic, testGroup)[0].Idle < config.ClaimMinIdle
	}, "the lease is lost")
	msg.Ack()
	eventuallySettled(t, client, topic, testGroup)
}

// With an OrderingKey, what was read ahead keeps its order within its key over a pause, also
// behind a message that is retried.
func TestPause_OrderingKey(t *testing.T) {
	testserver.RequireReal(t) // delivery counts set back, or unchanged by a claim
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := keyed(client)
	config.MaxConcurrency, config.BatchSize = 10, 500
	payloads := ordered(150, manyKeys(20)...)
	publish(t, client, topic, payloads...)
	o := newOrderly(t)
	sub := newSubscriber(t, config)
	o.handle(subscribe(t, sub, topic), func(_ string, n int, msg *message.Message) bool {
		time.Sleep(time.Duration(n%3) * 10 * time.Millisecond) // work
		return n%7 != 3 || delivery(t, msg).Count > 1
	})
	released := false
	for range 3 {
		was := o.count()
		eventually(t, func() bool { return o.count() > min(was+50, len(payloads)-1) }, "it stands still")
		pauseFor(t, client, topic, sub)
		eventually(t, func() bool { s := stats(t, sub); return s.InFlight == s.Waiting }, "something is in flight")
		released = released || stats(t, sub).Released > 0
		resume(t, client, topic)
		eventuallyPaused(t, sub, false)
	}
	eventually(t, func() bool { return o.count() == len(payloads) }, "not all are handled")
	require.True(t, released, "nothing was read ahead")
	eventuallySettled(t, client, topic, testGroup)
}

// With NoAck nothing can be released: what was read waits in memory, and is lost if the
// subscription closes, which does not take long.
func TestPause_NoAck(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := grouped(client)
	config.NoAck = true
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	ids := readAhead(t, client, topic, sub, messages, 1)
	before := stats(t, sub).Acked
	running := next(t, messages)
	require.Equal(t, ids[0], running.UUID)
	eventually(t, func() bool { return stats(t, sub).InFlight > 1 }, "nothing is read ahead")
	pauseFor(t, client, topic, sub)
	running.Ack()
	eventually(t, func() bool { return stats(t, sub).Acked == before+1 })
	during(t, obeyed, func() bool {
		select {
		case msg := <-messages:
			t.Error("handed out: ", msg.UUID)
		default:
		}
		return !t.Failed()
	}, "handed out")
	resume(t, client, topic)
	for _, id := range ids[1:11] {
		msg := next(t, messages)
		require.Equal(t, id, msg.UUID)
		msg.Ack()
	}
	msg := next(t, messages)
	pauseFor(t, client, topic, sub)
	eventually(t, func() bool { return stats(t, sub).InFlight > 1 }, "nothing is read ahead")
	msg.Ack()
	began := time.Now()
	require.NoError(t, sub.Close())
	require.Less(t, time.Since(began), config.CloseTimeout+patience/4)
	require.Contains(t, fmt.Sprint(log.Errors()), "NoAck: ")
}

// Close does not wait for Resume. What is released then, and what had been, is there for
// another process, with its count as before.
func TestPause_Close(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	sub := newSubscriber(t, grouped(client))
	messages := subscribe(t, sub, topic)
	ids := readAhead(t, client, topic, sub, messages, 1)
	msg := next(t, messages)
	pauseFor(t, client, topic, sub)
	msg.Nack()
	eventually(t, func() bool { return stats(t, sub).InFlight == 1 && stats(t, sub).Waiting == 1 }, "not released")
	require.NoError(t, sub.Close())
	another := newSubscriber(t, grouped(client))
	messages = subscribe(t, another, topic)
	eventuallyPaused(t, another, true)
	resume(t, client, topic)
	seen := make(map[string]int64)
	for range ids {
		msg := next(t, messages)
		seen[msg.UUID] = delivery(t, msg).Count
		msg.Ack()
	}
	for i, id := range ids {
		require.EqualValues(t, 1+max(0, 1-i), seen[id], i) // the first one was nacked
	}
	eventuallySettled(t, client, topic, testGroup)
}

// A pause that Redis has lost ends, and that is logged; a Resume is not an error.
func TestPause_Lost(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	log := newLogRecorder()
	sub := newSubscriberLog(t, grouped(client), log)
	messages := subscribe(t, sub, topic)
	pauseFor(t, client, topic, sub)
	resume(t, client, topic)
	eventuallyPaused(t, sub, false)
	require.Empty(t, log.Errors())
	pauseFor(t, client, topic, sub)
	require.NoError(t, client.Del(t.Context(), topic+".control{"+topic+"}").Err())
	publish(t, client, topic, "goes on")
	next(t, messages).Ack()
	require.Contains(t, fmt.Sprint(log.Errors()), "The group was paused, and nobody has resumed it")
}

// The group is lost during a pause, and what was released with it: it comes again, whoever
// recreates the group, and however soon Resume is called. A message that a handler had is
// acked.
func TestPause_GroupLost(t *testing.T) {
	testserver.RequireReal(t) // delivery counts set back, or unchanged by a claim
	t.Parallel()
	for _, consumers := range []int{1, 2} {
		for _, when := range []string{"AtOnce", "Recreated", "Known", "Later"} {
			t.Run(fmt.Sprint(consumers, when), func(t *testing.T) {
				t.Parallel()
				client, topic := newClient(t), topic(t)
				subs := make([]*goxstreams.Subscriber, consumers)
				outputs := make([]<-chan *message.Message, consumers)
				// A server that is slow to tell the group's position is asked for it rarely.
				var settled atomic.Bool // nothing is read any more
				asked := make([]atomic.Bool, consumers)
				for i := range subs {
					config := claiming(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
						if cmd.Name() != "xinfo" {
							return next()
						}
						time.Sleep(100 * time.Millisecond)
						final := settled.Load() && strings.EqualFold(fmt.Sprint(cmd.Args()[1]), "groups")
						err := next()
						if final {
							asked[i].Store(true)
						}
						return err
					}}))
					config.BatchSize = 50 // so that each of them gets enough
					if when == "Later" {
						config.ClaimMinIdle = time.Minute // no lease expires, however busy the machine is
					}
					subs[i] = newSubscriber(t, config)
					outputs[i] = subscribe(t, subs[i], topic)
				}
				ids := publishN(t, client, topic, consumers*warm+400)
				handled, names := newTally(), make(map[string]bool)
				for range warm {
					for _, messages := range outputs {
						msg := next(t, messages)
						handled.add(msg)
						names[delivery(t, msg).Consumer] = true
						msg.Ack()
					}
				}
				inHand := next(t, outputs[0])
				pause(t, client, topic)
				for i, sub := range subs {
					eventuallyPaused(t, sub, true)
					eventually(t, func() bool { s := stats(t, sub); return s.InFlight == max(1-i, 0) && s.Released > 0 }, "not released")
				}
				released := func() (n int) {
					for _, p := range pendingOf(t, client, topic, testGroup) {
						if p.Consumer == "released" {
							n++
						}
					}
					return n
				}
				before := released()
				settled.Store(true)
				if when == "Later" { // everybody knows of the pause, and of the group's position
					for i := range subs {
						eventually(t, asked[i].Load, "the group's position is not asked for")
					}
					during(t, time.Second, func() bool { return released() == before }, "somebody has taken one")
				}
				require.NoError(t, client.XGroupDestroy(t.Context(), topic, testGroup).Err())
				if when != "AtOnce" {
					eventually(t, func() bool { return client.XPending(t.Context(), topic, testGroup).Err() == nil }, "the group is not made again")
				}
				switch when {
				case "Known": // all consumers are in the new group, and have had nothing from it
					eventually(t, func() bool {
						known := 0
						for _, c := range client.XInfoConsumers(t.Context(), topic, testGroup).Val() {
							if names[c.Name] {
								known++
							}
						}
						return known == len(names)
					}, "not known")
				case "Later":
					eventually(t, func() bool { return released() == before }, "not restored")
				}
				resume(t, client, topic)
				inHand.Ack()
				handled.add(inHand)
				for _, messages := range outputs {
					handled.handle(messages, nil)
				}
				eventually(t, func() bool { return handled.has(ids) }, "lost")
				eventuallySettled(t, client, topic, testGroup)
				if when == "Later" {
					require.Equal(t, len(ids), handled.total(), "twice")
				}
			})
		}
	}
}

// A claim of what was released has no answer: what was read later does not overtake it.
func TestPause_ClaimFails(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	var fail atomic.Int64
	flaky := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isClaim(cmd) && fail.Add(-1) >= 0 {
			return io.EOF
		}
		return next()
	}})
	sub := newSubscriber(t, claiming(flaky))
	messages := subscribe(t, sub, topic)
	ids := readAhead(t, client, topic, sub, messages, 1)
	pauseFor(t, client, topic, sub)
	eventually(t, func() bool { s := stats(t, sub); return s.InFlight == 0 && s.Released > 0 }, "not released")
	fail.Store(3)
	resume(t, client, topic)
	for _, id := range ids {
		msg := next(t, messages)
		require.Equal(t, id, msg.UUID)
		require.EqualValues(t, 1, delivery(t, msg).Count)
		msg.Ack()
	}
	require.Negative(t, fail.Load(), "no claim has failed")
}

// Delayed messages move into the stream during a pause, and wait there.
func TestPause_Delayed(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	sub := newSubscriber(t, grouped(client))
	messages := subscribe(t, sub, topic)
	pauseFor(t, client, topic, sub)
	publishedIn(t, client, topic, delayedBy("later", 3*time.Second)) // longer than a Publisher waits itself
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() == 1 }, "not moved")
	require.Zero(t, stats(t, sub).Delivered)
	resume(t, client, topic)
	next(t, messages).Ack()
}

// Several topics on few connections: only the paused one waits.
func TestPause_SharedReads(t *testing.T) {
	t.Parallel()
	client, prefix := newClient(t), topic(t)
	sub := newSubscriber(t, grouped(client))
	var topics []string
	var outputs []<-chan *message.Message
	for i := range 12 {
		topics = append(topics, fmt.Sprint(prefix, "-", i))
		outputs = append(outputs, subscribe(t, sub, topics[i]))
	}
	pause(t, client, topics[3])
	eventually(t, func() bool {
		paused := 0
		for _, s := range sub.Stats() {
			if !s.PausedSince.IsZero() {
				paused++
			}
		}
		return paused == 1
	})
	for i, topic := range topics {
		publish(t, client, topic, "x")
		if i != 3 {
			next(t, outputs[i]).Ack()
		}
	}
	select {
	case <-outputs[3]:
		t.Error("handed out during the pause")
	default:
	}
	resume(t, client, topics[3])
	next(t, outputs[3]).Ack()
}

// A Consumer that calls its handler directly.
func TestPause_Direct(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	var begun atomic.Int64
	goOn := make(chan struct{}, 1000)
	consumer, err := goxstreams.NewConsumer(pausable{func() { begun.Add(1); <-goOn }}, goxstreams.ConsumerConfig{Topic: topic, Subscriber: grouped(client)}, watermill.NopLogger{})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- consumer.Run(ctx) }()
	producer := goxstreams.NewProducer[string](newPublisher(t, client), goxstreams.ProducerConfig{})
	for range 400 {
		require.NoError(t, producer.Produce(ctx, "x", topic))
	}
	for range 300 {
		goOn <- struct{}{}
	}
	eventually(t, func() bool { return begun.Load() == 301 })
	pause(t, client, topic)
	during(t, obeyed, func() bool { return begun.Load() == 301 })
	for range 99 {
		goOn <- struct{}{}
	}
	during(t, time.Second, func() bool { return begun.Load() == 301 }, "begun during the pause")
	resume(t, client, topic)
	eventually(t, func() bool { return begun.Load() == 400 }, "not resumed")
	goOn <- struct{}{}
	eventuallySettled(t, client, topic, testGroup)
	cancel()
	require.NoError(t, <-done)
}

type pausable struct{ f func() }

func (p pausable) Process(context.Context, goxstreams.Message[string]) error {
	p.f()
	return nil
}
func (pausable) ProcessBroken(context.Context, goxstreams.BrokenMessage) error {
	return goxstreams.ErrDead
}
func (pausable) ProcessDead(context.Context, goxstreams.Message[string]) error {
	return goxstreams.ErrDead
}

// In a Cluster.
func TestPause_Cluster(t *testing.T) {
	t.Parallel()
	client, topic := testserver.Cluster(t).Client(), topic(t)
	sub := newSubscriber(t, grouped(client))
	messages := subscribe(t, sub, topic)
	pauseFor(t, client, topic, sub)
	publish(t, client, topic, "waits")
	during(t, time.Second, func() bool { return stats(t, sub).Delivered == 0 })
	require.NoError(t, stats(t, sub).Err)
	resume(t, client, topic)
	next(t, messages).Ack()
}

// Ten processes under load: no handler begins later than 1.5 s after Pause has returned, and
// all that run are settled. The pause outlives all of the processes, and a restart of Redis.
// After it each message is handled, once and as a first delivery.
func TestPause_Processes(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always")
	client, topic := server.Client(), topic(t)
	createGroup(t, client, topic, testGroup)
	args := childArgs{
		Addr: client.Options().Addr, Topic: topic, MaxConcurrency: 4, MaxRetries: 3,
		ClaimMinIdle: 30 * time.Second, ClaimInterval: time.Second, Handle: 5 * time.Millisecond,
	}
	processes := 10
	if testing.Short() {
		processes = 4 // each costs a second of CPU
	}
	var all, running []*child
	start := func() {
		running = nil
		for i := range processes {
			running = append(running, startChild(t, fmt.Sprint(i), args))
		}
		all = append(all, running...)
	}
	// What the machine does to everybody is no fault of the library.
	var stalled atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for last := time.Now(); ctx.Err() == nil; last = time.Now() {
			<-time.After(10 * time.Millisecond)
			if d := time.Since(last) - 10*time.Millisecond; int64(d) > stalled.Load() {
				stalled.Store(int64(d))
			}
		}
	}()
	var ids []string
	published := make(chan struct{})
	loaded, unload := context.WithCancel(ctx)
	go func() { // more than they can handle
		defer close(published)
		for loaded.Err() == nil {
			ids = append(ids, publishN(t, client, topic, 200)...)
			<-time.After(20 * time.Millisecond)
		}
	}()
	start()
	eventually(t, func() bool {
		for _, c := range running {
			if len(c.told("ack")) < 50 {
				return false
			}
		}
		return true
	}, "not all have work")
	stalled.Store(0)
	pause(t, client, topic)
	paused := time.Now()
	<-time.After(3 * time.Second)
	unload()
	<-published
	bound := paused.Add(obeyed + 2*time.Duration(stalled.Load()))
	latest, before := paused, 0
	for _, c := range all {
		for _, r := range c.all() {
			if r.Event == "start" && r.At.After(latest) {
				latest = r.At
			}
			if r.Event == "start" {
				before++
			}
		}
		require.Empty(t, c.under(), "a running handler is not settled")
	}
	t.Logf("the last of %d handlers began %v after Pause returned (the machine stalled for %v)", before, latest.Sub(paused), time.Duration(stalled.Load()))
	require.False(t, latest.After(bound), "begun %v after Pause", latest.Sub(paused))
	require.Less(t, before, len(ids), "there was not enough load")
	begun := func() (n int) {
		for _, c := range all {
			n += len(c.told("start"))
		}
		return n
	}
	for _, p := range pendingOf(t, client, topic, testGroup) {
		require.Equal(t, "released", p.Consumer)
		require.Zero(t, p.RetryCount)
	}

	for _, c := range running {
		c.close()
	}
	server.Restart()
	start()
	eventually(t, func() bool {
		consumers, err := client.XInfoConsumers(t.Context(), topic, testGroup).Result()
		return err == nil && len(consumers) >= len(running)
	}, "they do not start")
	server.Restart()
	require.Equal(t, before, begun())
	during(t, 2*time.Second, func() bool { return begun() == before }, "begun after a restart")
	paused2, err := goxstreams.Paused(t.Context(), client, topic)
	require.NoError(t, err)
	require.Contains(t, paused2, testGroup)

	resume(t, client, topic)
	resumed := time.Now()
	eventually(t, func() bool { return begun() > before })
	t.Logf("the first handler began %v after Resume returned", time.Since(resumed))
	eventuallyAll(t, begun, len(ids))
	eventuallySettled(t, client, topic, testGroup)
	cancel()
	for _, c := range all {
		for _, r := range c.all() {
			require.EqualValues(t, 1, r.Count, r.UUID)
		}
	}
	require.Equal(t, len(ids), begun(), "handled twice")
}

// While a slot moves, the node that had it does not answer for keys that do not exist. The
// subscription is none the worse for it, and obeys.
func TestPause_SlotMoves(t *testing.T) {
	t.Parallel()
	cluster, topic := testserver.Cluster(t), topic(t)
	client := cluster.Client()
	sub := newSubscriber(t, grouped(client))
	messages := subscribe(t, sub, topic)
	cluster.MoveSlot(topic, func() {
		later := newSubscriber(t, grouped(client))
		subscribe(t, later, topic)
		require.NoError(t, later.Close())
		pauseFor(t, client, topic, sub)
		resume(t, client, topic)
		eventuallyPaused(t, sub, false)
		pause(t, client, topic)
	})
	eventuallyPaused(t, sub, true)
	publish(t, client, topic, "waits")
	during(t, time.Second, func() bool { return stats(t, sub).Delivered == 0 })
	resume(t, client, topic)
	next(t, messages).Ack()
}

// together counts the round trips that ask whether a group is paused or whether delayed messages
// wait.
type together struct{ atomic.Int64 }

func (c *together) count(cmds ...redis.Cmder) {
	if slices.ContainsFunc(cmds, func(cmd redis.Cmder) bool { return cmd.Name() == "zrange" || cmd.Name() == "hmget" }) {
		c.Add(1)
	}
}

func (c *together) DialHook(next redis.DialHook) redis.DialHook { return next }
func (c *together) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { c.count(cmd); return next(ctx, cmd) }
}

func (c *together) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error { c.count(cmds...); return next(ctx, cmds) }
}

// A Subscriber's topics share the round trips in which they ask whether they are paused.
func TestPause_RoundTrips(t *testing.T) {
	t.Parallel()
	count := &together{}
	client, topic := newClient(t, count), topic(t)
	sub := newSubscriber(t, grouped(client))
	const topics = 20
	for i := range topics {
		subscribe(t, sub, fmt.Sprint(topic, "-", i))
	}
	// On a busy machine some are late and ask alone, which alone proves nothing.
	eventually(t, func() bool {
		began, from := time.Now(), count.Load()
		<-time.After(2 * time.Second)
		n := count.Load() - from
		return n > 0 && n <= (int64(time.Since(began)/time.Second)+2)*topics/2
	}, "topics do not share their round trips")
}

// In a pause longer than ConsumerTimeout others remove the name of a consumer that has released
// all it had. When it found, after Resume, that others had handled that, it took the group for a
// new one, and restored everything, which was handled twice.
func TestPause_LongerThanConsumerTimeout(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // XINFO CONSUMERS
	admin, topic := newClient(t), topic(t)
	config := grouped(admin)
	config.ConsumerTimeout, config.ClaimInterval = 500*time.Millisecond, 50*time.Millisecond
	first := config
	var cut atomic.Pointer[chan struct{}]
	first.Client = newClient(t, &hook{process: func(_ context.Context, _ redis.Cmder, next func() error) error {
		if c := cut.Load(); c != nil {
			<-*c
		}
		return next()
	}})
	sub := newSubscriber(t, first)
	messages := subscribe(t, sub, topic)
	ids := readAhead(t, admin, topic, sub, messages, 1)
	running := next(t, messages)
	name := delivery(t, running).Consumer
	pauseFor(t, admin, topic, sub)
	running.Ack()
	eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
	others := subscribe(t, newSubscriber(t, config), topic)
	late := make(chan struct{})
	cut.Store(&late) // it learns of Resume last
	// Others remove the name once it is idle for ConsumerTimeout. Redis 8 counts a look at what was
	// released as activity, so it is removed here, also if a look that was on its way recreates it.
	if os.Getenv(aclEnv) == "" {
		eventually(t, func() bool {
			dropped, err := admin.XGroupDelConsumer(t.Context(), topic, testGroup, name).Result()
			require.NoError(t, err)
			require.Zero(t, dropped, "entries were pending for it")
			consumers, err := admin.XInfoConsumers(t.Context(), topic, testGroup).Result()
			require.NoError(t, err)
			return !slices.ContainsFunc(consumers, func(c redis.XInfoConsumer) bool { return c.Name == name })
		}, "its name stays")
	}
	handled := newTally()
	handled.handle(others, nil)
	resume(t, admin, topic)
	eventuallyAll(t, handled.len, len(ids)-1)
	eventuallySettled(t, admin, topic, testGroup)
	cut.Store(nil)
	close(late)
	handled.handle(messages, nil)
	eventuallyPaused(t, sub, false)
	eventuallySettled(t, admin, topic, testGroup)
	require.Equal(t, len(ids)-1, handled.total(), "handled twice")
}

// A release without an answer may have happened: until one has come, what was read ahead is
// neither renewed nor handled here, also if the group is resumed meanwhile. So no order is
// broken, and nothing is handled twice.
func TestPause_ReleaseWithoutAnswer(t *testing.T) {
	t.Parallel()
	for _, two := range []bool{false, true} {
		t.Run(fmt.Sprintf("other consumer %v", two), func(t *testing.T) {
			t.Parallel()
			admin, topic := newClient(t), topic(t)
			var once atomic.Bool
			resumed, checked := make(chan struct{}), make(chan struct{})
			client := newClient(t, &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
				err := next()
				switch {
				case isRelease(cmd) && once.CompareAndSwap(false, true):
					resume(t, admin, topic)
					close(resumed)
					return io.EOF
				case isRenewal(cmd) && isClosed(resumed) && !isClosed(checked):
					close(checked)
				}
				return err
			}})
			config := keyed(client)
			config.MaxConcurrency, config.ClaimMinIdle, config.ClaimInterval = 2, 2*time.Second, time.Second
			publish(t, admin, topic, ordered(5, "k")...)
			messages := subscribe(t, newSubscriber(t, config), topic)
			first := next(t, messages)
			eventually(t, func() bool { return len(pendingOf(t, admin, topic, testGroup)) == 5 })
			pause(t, admin, topic)
			<-resumed
			var handled sync.Map
			var order []string
			var mu sync.Mutex
			handle := func(messages <-chan *message.Message) {
				for msg := range messages {
					mu.Lock()
					order = append(order, string(msg.Payload))
					mu.Unlock()
					_, again := handled.LoadOrStore(string(msg.Payload), true)
					assert.False(t, again, "%s was handled twice", msg.Payload)
					msg.Ack()
				}
			}
			want := []string{"k 2", "k 3", "k 4", "k 5"}
			if two {
				other := keyed(admin)
				other.ClaimMinIdle, other.ClaimInterval = 2*time.Second, 50*time.Millisecond
				go handle(subscribe(t, newSubscriber(t, other), topic))
			} else {
				<-checked // a renewal finds what is not ours
				publish(t, admin, topic, "k 6")
				want = append(want, "k 6")
			}
			first.Ack()
			go handle(messages)
			eventuallySettled(t, admin, topic, testGroup)
			eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return len(order) == len(want) })
			mu.Lock()
			defer mu.Unlock()
			require.Equal(t, want, order)
		})
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// The same if the subscription closes before there is an answer: nothing stays behind.
func TestPause_ReleaseWithoutAnswerAtClose(t *testing.T) {
	t.Parallel()
	admin, topic := newClient(t), topic(t)
	var releases atomic.Int64
	client := newClient(t, &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		if isRelease(cmd) && releases.Add(1) <= 3 {
			return io.EOF
		}
		return next()
	}})
	config := keyed(client)
	config.ClaimMinIdle = time.Minute
	config.CloseTimeout = patience // the embedded server may take a second of it until the read ends
	publish(t, admin, topic, ordered(5, "k")...)
	sub := newSubscriber(t, config)
	first := next(t, subscribe(t, sub, topic))
	eventually(t, func() bool { return len(pendingOf(t, admin, topic, testGroup)) == 5 })
	pause(t, admin, topic)
	eventually(t, func() bool { return releases.Load() > 0 })
	first.Ack()
	require.NoError(t, sub.Close())
	for _, p := range pendingOf(t, admin, topic, testGroup) {
		require.Zero(t, p.RetryCount, "%+v", p)
	}
	resume(t, admin, topic)
	config.Client = admin
	messages := subscribe(t, newSubscriber(t, config), topic)
	for i := range 4 {
		msg := next(t, messages)
		require.Equal(t, fmt.Sprint("k ", i+2), string(msg.Payload))
		require.EqualValues(t, 1, delivery(t, msg).Count)
		msg.Ack()
	}
}
