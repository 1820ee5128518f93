package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 7: a dead message is moved once, and its handler is not called again.

// The message was moved and the answer lost. Before the command was resent, the
// consumer was removed, with nothing pending: the message looked like one of a
// recreated group, was restored, and moved again.
func TestFault32_MovedOnce(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for name, meddle := range map[string]func(ctx context.Context, admin *redis.Client, topic, consumer string) error{
		"ConsumerRemoved": func(ctx context.Context, admin *redis.Client, topic, consumer string) error {
			return admin.XGroupDelConsumer(ctx, topic, testGroup, consumer).Err()
		},
		"GroupDestroyed": func(ctx context.Context, admin *redis.Client, topic, _ string) error {
			return admin.XGroupDestroy(ctx, topic, testGroup).Err()
		},
		"GroupMadeAnew": func(ctx context.Context, admin *redis.Client, topic, _ string) error {
			_, err := admin.TxPipelined(ctx, func(p redis.Pipeliner) error {
				p.XGroupDestroy(ctx, topic, testGroup)
				p.XGroupCreate(ctx, topic, testGroup, "$")
				return nil
			})
			return err
		},
		"StreamDeleted": func(ctx context.Context, admin *redis.Client, topic, _ string) error {
			return admin.Del(ctx, topic).Err()
		},
		"StreamMadeAnew": func(ctx context.Context, admin *redis.Client, topic, _ string) error {
			_, err := admin.TxPipelined(ctx, func(p redis.Pipeliner) error {
				p.Del(ctx, topic)
				p.XGroupCreateMkStream(ctx, topic, testGroup, "$")
				return nil
			})
			return err
		},
		"Nothing": func(context.Context, *redis.Client, string, string) error { return nil },
	} {
		for _, broken := range []bool{false, true} {
			what := "/Nacked"
			if broken {
				what = "/Malformed"
			}
			t.Run(name+what, func(t *testing.T) {
				t.Parallel()
				admin, topic := newClient(t), topic(t)
				var once sync.Once
				var consumer string
				client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
					err := next()
					if isMove(cmd) {
						once.Do(func() {
							require.NoError(t, err)
							require.NoError(t, meddle(context.Background(), admin, topic, consumer))
							err = io.EOF
						})
					}
					return err
				}})
				config := claiming(client)
				config.Retry = &goxstreams.Retry{MaxRetries: -1}
				sub := newSubscriber(t, config)
				messages := subscribe(t, sub, topic)
				consumer = consumersOf(t, admin, topic)[0]
				if broken {
					addRaw(t, admin, topic, "no", "message")
				} else {
					publish(t, admin, topic, "x")
					next(t, messages).Nack()
				}
				eventually(t, func() bool { return stats(t, sub).Dead == 1 && stats(t, sub).InFlight == 0 })
				publish(t, admin, topic, "after")
				msg := next(t, messages)
				require.Equal(t, "after", string(msg.Payload))
				msg.Ack()
				require.NoError(t, sub.Close())
				require.EqualValues(t, 1, admin.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val())
				require.Empty(t, pendingOf(t, admin, topic, testGroup))
			})
		}
	}
}

// The key of the dead-letter stream had another type. More messages died than may
// wait, and those that had to leave were handled again.
//
// Now nothing more is read while so many wait to be moved.
func TestFault41_ManyCannotBeMoved(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n = 12_000
	client, topic := newClient(t), topic(t)
	dead := goxstreams.DeadLetterTopic(topic)
	require.NoError(t, client.Set(t.Context(), dead, "no stream", 0).Err())
	config := claiming(client)
	config.MaxConcurrency = 50
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	sub := newSubscriber(t, config)
	handled := newTally()
	messages := subscribe(t, sub, topic)
	publishN(t, client, topic, n)
	go func() {
		for msg := range messages {
			handled.add(msg)
			msg.Nack()
		}
	}()
	eventuallyAll(t, func() int { return min(stats(t, sub).Waiting, 5000) }, 5000)
	time.Sleep(3 * minIdle) // time for unrenewed leases to expire
	require.Equal(t, handled.total(), handled.len(), "messages handled again")
	require.NoError(t, client.Del(t.Context(), dead).Err())
	deadline := time.Now().Add(4 * patience)
	for client.XLen(t.Context(), dead).Val() < n {
		require.True(t, time.Now().Before(deadline), "%d of %d are moved", client.XLen(t.Context(), dead).Val(), n)
		time.Sleep(10 * time.Millisecond)
	}
	eventuallySettled(t, client, topic, testGroup)
	require.Equal(t, n, handled.total(), "each is handled once")
	require.EqualValues(t, n, client.XLen(t.Context(), dead).Val())
}

// With DeleteAcked and one group, dead messages leave the stream too, on every
// server: otherwise nothing would ever remove them.
func TestMove_DeleteAcked(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic := topic(t)
	client := newClient(t)
	config := grouped(client)
	config.DeleteAcked = true
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	messages := subscribe(t, newSubscriber(t, config), topic)
	publish(t, client, topic, "dies")
	next(t, messages).Nack()
	ctx := context.Background()
	eventually(t, func() bool { return client.XLen(ctx, goxstreams.DeadLetterTopic(topic)).Val() == 1 }, "no dead letter")
	require.Zero(t, client.XLen(ctx, topic).Val())
	require.Empty(t, pendingOf(t, client, topic, testGroup))
}

// Redis rejects the count of a dead message for a while, before its worker is
// called: that is one outage, which ends once.
func TestMove_WorkersOutage(t *testing.T) {
	t.Parallel()
	topic := topic(t)
	var refused atomic.Int32
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isClaim(cmd) && refused.Add(1) <= 4 {
			return errors.New("no answer")
		}
		return next()
	}})
	worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](goxstreams.Permanent(errors.New("permanent")))}
	log := newLogRecorder()
	consumer := newConsumer[order](t, worker, goxstreams.ConsumerConfig{Topic: topic, Subscriber: limited(client, 2)}, log)
	running := run(t, consumer)
	produce(t, newClient(t), topic, order{})
	eventually(t, func() bool { return worker.counts()[2] == 1 }, "the worker is not asked")
	running.stop(t)
	outages := slices.DeleteFunc(log.Errors(), func(line string) bool { return !strings.HasPrefix(line, "Redis is unavailable") })
	require.Len(t, outages, 1)
}

// goxstreams deletes dead and broken entries, and never acks them: they are gone
// for every other group too, handled there or not, and stay pending in its own
// group forever. Here they are acked in their group, and stay in the stream.
func TestFault20_DeadEntriesDeletedNotAcked(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	const groups = 3
	config := grouped(client)
	config.Retry = quickRetry()
	config.Retry.MaxRetries = 1
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	for i := range groups {
		createGroup(t, client, topic, fmt.Sprint("other", i))
	}
	// One of the other groups is handling the entries.
	publish(t, client, topic, "dead", "filtered", "good")
	addRaw(t, client, topic, "no", "message")
	before := entriesOf(t, client, topic)
	held := readAs(t, client, topic, "other0", "consumer", len(before))
	go settling(messages, goxstreams.DeadLetter{ShouldDeadLetter: isBad}.Middleware(func(msg *message.Message) ([]*message.Message, error) {
		switch string(msg.Payload) {
		case "dead":
			return nil, errOther
		case "filtered":
			return nil, errBad
		}
		return nil, nil
	}))
	eventually(t, func() bool { s := stats(t, sub); return s.Dead == 3 && s.Acked == 1 })
	eventuallySettled(t, client, topic, testGroup)
	require.NoError(t, sub.Close())

	require.Len(t, lettersIn(t, client, goxstreams.DeadLetterTopic(topic)), 3)
	require.Equal(t, before, entriesOf(t, client, topic), "the stream is as it was")
	infos, err := client.XInfoGroups(t.Context(), topic).Result()
	require.NoError(t, err)
	for _, info := range infos {
		switch info.Name {
		case testGroup:
			require.Zero(t, info.Pending)
			require.Equal(t, before[len(before)-1].id, info.LastDeliveredID)
		case "other0":
			require.EqualValues(t, len(before), info.Pending)
		default:
			require.Contains(t, []string{"0-0", "0"}, info.LastDeliveredID)
		}
	}
	// All of the others still receive everything.
	got, err := client.XClaim(t.Context(), &redis.XClaimArgs{Stream: topic, Group: "other0", Consumer: "next", Messages: held}).Result()
	require.NoError(t, err)
	require.Len(t, got, len(before))
	for i := 1; i < groups; i++ {
		readAs(t, client, topic, fmt.Sprint("other", i), "consumer", len(before))
	}
}

// Most implementations of dead letters add them, and then ack: a process that ends
// in between leaves the message pending, and the next one adds it again. Here both
// are one step. The process ends before and after each of its commands in turn,
// from the handler's error on.
func TestFault26_CrashDuplicatesDeadLetter(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	// The process that ends, and the one that takes over.
	type process func(t *testing.T, client *redis.Client, topic string) (*goxstreams.Subscriber, message.HandlerFunc)
	open := func(t *testing.T, client *redis.Client) *goxstreams.Subscriber {
		config := grouped(client)
		config.ClaimMinIdle = 300 * time.Millisecond
		config.Retry = quickRetry()
		config.Retry.MaxRetries = 5
		config.CloseTimeout = 50 * time.Millisecond // for the one whose commands go nowhere
		return newSubscriber(t, config)
	}
	fail := func(*message.Message) ([]*message.Message, error) { return nil, goxstreams.Permanent(errOther) }
	ours := func(t *testing.T, client *redis.Client, topic string) (*goxstreams.Subscriber, message.HandlerFunc) {
		return open(t, client), goxstreams.DeadLetter{}.Middleware(fail)
	}
	// XADD, then XACK: this shows that the test would notice.
	theirs := func(t *testing.T, client *redis.Client, topic string) (*goxstreams.Subscriber, message.HandlerFunc) {
		poison, err := middleware.PoisonQueue(newPublisher(t, client), goxstreams.DeadLetterTopic(topic))
		require.NoError(t, err)
		return open(t, client), poison(fail)
	}
	// crash returns the final number of dead letters, and whether the process sent
	// that many commands.
	crash := func(t *testing.T, p process, at int, before bool) (letters int64, hit bool) {
		topic, admin := topic(t), newClient(t)
		cut := &scissors{}
		sub, handler := p(t, cut.client(t), topic)
		messages := subscribe(t, sub, topic)
		publish(t, admin, topic, "payload")
		msg := next(t, messages)
		cut.arm(at, before, func() bool { cut.killed = true; return true })
		if _, err := handler(msg); err != nil {
			msg.Nack()
		} else {
			msg.Ack()
		}
		stream := goxstreams.DeadLetterTopic(topic)
		// Until it is dead, or has nothing left to do; its renewals and claims are
		// commands too, but come later.
		eventually(t, func() bool { return !cut.alive() || stats(t, sub).InFlight == 0 })
		_, hit = cut.disarm()
		cut.kill()
		go sub.Close() // waited for in the cleanup

		second, handler := p(t, admin, topic)
		go settling(subscribe(t, second, topic), handler)
		eventuallySettled(t, admin, topic, testGroup)
		// Entries that are no longer pending were moved or acked before.
		require.NoError(t, second.Close())
		return admin.XLen(context.Background(), stream).Val(), hit
	}
	for _, tt := range []struct {
		name string
		process
		once bool
	}{{"DeadLetter", ours, true}, {"PoisonQueue", theirs, false}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var twice int
			const most = 30
			// On a busy machine a renewal can be sent just before, so that the command
			// after which there would be two is never the last: the rounds are for that.
			for round := 0; round == 0 || !tt.once && twice == 0 && round < 10; round++ {
				at := 1
				for again := true; again && at < most; at++ {
					again = false
					for _, before := range []bool{true, false} {
						letters, hit := crash(t, tt.process, at, before)
						again = again || hit
						require.Positive(t, letters, "lost, by an end at command %d, before it: %t", at, before)
						if letters > 1 {
							twice++
						}
					}
				}
				require.Less(t, at, most, "there is no end")
			}
			require.Equal(t, tt.once, twice == 0, "%d times there were two", twice)
		})
	}
}

// A process is stopped during a blocking read, the entry is delivered to it, and
// another consumer claims and dead-letters it. When the process continues, it has
// just read an entry that is no longer pending: it must not mistake that for a lost
// group, restore the entry, and dead-letter it again.
func TestLateAnswer_MovedOnce(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const minIdle = 500 * time.Millisecond
	client, topic := newClient(t), topic(t)
	config := func(c redis.UniversalClient, retries int) goxstreams.SubscriberConfig {
		return goxstreams.SubscriberConfig{
			Client: c, ConsumerGroup: "g", ClaimMinIdle: minIdle, BlockTime: minIdle / 2,
			Retry: &goxstreams.Retry{MaxRetries: retries, InitialInterval: time.Millisecond},
		}
	}
	g := &gate{}
	gated := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Dialer: g.dial, ReadTimeout: time.Minute})
	t.Cleanup(func() { require.NoError(t, gated.Close()) })
	sub := newSubscriber(t, config(gated, 1))
	stopped, err := sub.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	require.NoError(t, newPublisher(t, client).Publish(topic, numbered(1)...))
	next(t, stopped).Ack() // it reads
	require.Eventually(t, func() bool { return pendingCount(t, client, topic) == 0 }, time.Minute, time.Millisecond)
	g.Lock()
	require.NoError(t, newPublisher(t, client).Publish(topic, numbered(1)...))
	require.Eventually(t, func() bool { return pendingCount(t, client, topic) == 1 }, time.Minute, time.Millisecond)

	dead := goxstreams.DeadLetterTopic(topic)
	rival := newSubscriber(t, config(client, -1))
	other, err := rival.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	next(t, other).Nack()
	require.Eventually(t, func() bool { return client.XLen(t.Context(), dead).Val() == 1 }, time.Minute, time.Millisecond)
	require.NoError(t, rival.Close())
	g.Unlock()

	// Its renewal may have learned before the reply that the entry is another's. Then
	// it never comes; that the next one does shows that the reply was read.
	require.NoError(t, newPublisher(t, client).Publish(topic, message.NewMessage("last", nil)))
	late := 0
	for {
		msg := next(t, stopped)
		if msg.UUID == "last" {
			msg.Ack()
			break
		}
		late++
		msg.Nack()
	}
	eventually(t, func() bool { return sub.Stats()[0].InFlight == 0 })
	require.LessOrEqual(t, late, 1, "it was put back, and came again")
	require.EqualValues(t, 1, client.XLen(t.Context(), dead).Val())
	require.Zero(t, pendingCount(t, client, topic))
}

func pendingCount(t testing.TB, client redis.UniversalClient, topic string) int64 {
	t.Helper()
	p, err := client.XPending(t.Context(), topic, "g").Result()
	if err != nil && !errors.Is(err, redis.Nil) {
		return -1
	}
	return p.Count
}

// A message is dead, and the group is lost just before the move. The message is
// restored in the recreated group, and then moved: it must not count as settled,
// which it never was.
func TestMove_GroupLostMeanwhile(t *testing.T) {
	t.Parallel()
	topic := topic(t)
	plain := newClient(t)
	var once sync.Once
	lose := &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		if isMove(cmd) {
			once.Do(func() { require.NoError(t, plain.XGroupDestroy(ctx, topic, testGroup).Err()) })
		}
		return next()
	}}
	config := grouped(newClient(t, lose))
	config.MaxConcurrency = 2
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, plain, topic, "held", "dead")
	held, dead := next(t, messages), next(t, messages)
	if string(held.Payload) == "dead" {
		held, dead = dead, held
	}
	dead.Nack()
	eventually(t, func() bool {
		n, err := plain.XLen(context.Background(), goxstreams.DeadLetterTopic(topic)).Result()
		return err == nil && n == 1
	}, "the dead message is in neither stream")
	require.NoError(t, held.Context().Err())
	held.Ack()
	eventually(t, func() bool { return len(pendingOf(t, plain, topic, testGroup)) == 0 }, "something stays pending")
	require.EqualValues(t, 1, plain.XLen(context.Background(), goxstreams.DeadLetterTopic(topic)).Val())
}

// A subscription closes, and moves a message; the answer is lost, and the group is
// recreated at once. The released message was first restored in that group, and
// moved again by the next consumer. (Found by internal/sim.)
func TestMove_LostAnswerAtClose(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	var lost atomic.Int64
	config := grouped(newClient(t, &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		err := next()
		if !isMove(cmd) || lost.Load() == 3 {
			return err
		}
		if lost.Add(1) > 1 { // a connection may be cut more than once
			return io.ErrUnexpectedEOF
		}
		_, failure := admin.TxPipelined(ctx, func(p redis.Pipeliner) error {
			p.XGroupDestroy(ctx, topic, testGroup)
			p.XGroupCreate(ctx, topic, testGroup, "$")
			return nil
		})
		return errors.Join(failure, io.ErrUnexpectedEOF)
	}}))
	config.CloseTimeout = patience
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, admin, topic, "dies")
	msg := next(t, messages)
	closed := make(chan error, 1)
	go func() { closed <- sub.Close() }()
	eventually(t, func() bool {
		_, err := sub.Subscribe(t.Context(), "another")
		return errors.Is(err, goxstreams.ErrSubscriberClosed)
	})
	_, err := quick(5).Middleware(func(*message.Message) ([]*message.Message, error) {
		return nil, goxstreams.Permanent(errFails)
	})(msg)
	require.Error(t, err)
	require.True(t, msg.Nack())
	require.NoError(t, <-closed)
	require.EqualValues(t, 3, lost.Load())
	require.EqualValues(t, 1, admin.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val())
	require.Empty(t, pendingOf(t, admin, topic, testGroup), "it would come again")
}

// The answer to a move is lost, and so is the group or the consumer's name. The entry
// waits for the next attempt when Close begins: it was released, and the next consumer
// moved it again.
//
// [A seed of the simulation found it.]
func TestMove_LostAnswerThenClose(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for name, lose := range map[string]func(ctx context.Context, p redis.Pipeliner, topic, consumer string){
		"nothing": func(context.Context, redis.Pipeliner, string, string) {},
		"the group": func(ctx context.Context, p redis.Pipeliner, topic, _ string) {
			p.XGroupDestroy(ctx, topic, testGroup)
			p.XGroupCreate(ctx, topic, testGroup, "$")
		},
		"the consumer": func(ctx context.Context, p redis.Pipeliner, topic, consumer string) {
			p.XGroupDelConsumer(ctx, topic, testGroup, consumer)
		},
	} {
		for _, moved := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, moved=%t", name, moved), func(t *testing.T) {
				t.Parallel()
				topic, admin := topic(t), newClient(t)
				var attempts, atClose atomic.Int64
				var closing atomic.Bool
				config := grouped(newClient(t, &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
					if !isMove(cmd) || closing.Load() && atClose.Add(1) > 2 {
						return next()
					}
					if attempts.Add(1) == 1 && moved {
						assert.NoError(t, next())
					}
					return io.ErrUnexpectedEOF
				}}))
				config.CloseTimeout = patience
				sub := newSubscriber(t, config)
				messages := subscribe(t, sub, topic)
				consumer := consumersOf(t, admin, topic)[0]
				publish(t, admin, topic, "dies")
				msg := next(t, messages)
				_, err := quick(5).Middleware(func(*message.Message) ([]*message.Message, error) {
					return nil, goxstreams.Permanent(errFails)
				})(msg)
				require.Error(t, err)
				require.True(t, msg.Nack())
				eventually(t, func() bool { return attempts.Load() > 0 && stats(t, sub).Waiting == 1 })
				_, err = admin.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
					lose(t.Context(), p, topic, consumer)
					p.Ping(t.Context())
					return nil
				})
				require.NoError(t, err)
				closing.Store(true)
				require.NoError(t, sub.Close())
				require.Greater(t, atClose.Load(), int64(2), "Close repeats it until there is an answer")
				letters := admin.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val()
				require.EqualValues(t, 1, letters+int64(len(pendingOf(t, admin, topic, testGroup))), "once, and not lost")
			})
		}
	}
}

// Somebody else recreates the group while a message is being handled, which then
// dies.
func TestGroupRemade_Dies(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, how := range []string{"permanent", "exhausted"} {
		t.Run(how, func(t *testing.T) {
			topic, admin := topic(t), newClient(t)
			config := grouped(newClient(t)) // ClaimMinIdle 60s: a renewal is far away
			config.Retry = quickRetry()
			if how == "exhausted" {
				config.Retry.MaxRetries = -1
			}
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			publish(t, admin, topic, "in hand")
			msg := next(t, messages)
			_, err := admin.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
				p.XGroupDestroy(t.Context(), topic, testGroup)
				p.XGroupCreate(t.Context(), topic, testGroup, "$")
				return nil
			})
			require.NoError(t, err)
			if how == "permanent" {
				_, err = goxstreams.Retry{}.Middleware(func(*message.Message) ([]*message.Message, error) {
					return nil, goxstreams.Permanent(errors.New("bad"))
				})(msg)
				require.Error(t, err)
			}
			msg.Nack()
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
			letters := admin.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val()
			pending := len(pendingOf(t, admin, topic, testGroup))
			assert.EqualValues(t, 1, letters+int64(pending), "lost")
		})
	}
}

// The answer to a move is lost, and the next attempts are rejected (a replica,
// OOM); renewals continue meanwhile.
func TestMove_LostAnswerThenRefused(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	var evals atomic.Int64
	h := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if !isMove(cmd) {
			return next()
		}
		switch n := evals.Add(1); {
		case n == 1:
			_ = next()
			return io.EOF
		case n < 7:
			return redisError("READONLY You can't write against a read only replica.")
		}
		return next()
	}}
	config := claiming(newClient(t, h))
	config.Retry = quickRetry()
	config.Retry.MaxRetries = -1
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, admin, topic, "dies")
	next(t, messages).Nack()
	eventually(t, func() bool { return evals.Load() >= 1 })
	eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
	assert.EqualValues(t, 1, admin.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val())
}

// Moves that Redis rejects were retried at a fixed delay, and before anything new:
// with enough of them nothing else was ever handled.
func TestUnmovableDoNotStarve(t *testing.T) {
	t.Parallel()
	const bad = 500
	// starve makes many messages die with that client, and expects the last one.
	starve := func(t *testing.T, admin, client *redis.Client, topic string, refuse func()) {
		var mu sync.Mutex
		tries := make(map[string][]time.Time) // attempts to move an entry
		client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
			if isMove(cmd) {
				mu.Lock()
				id := fmt.Sprint(cmd.Args()[6])
				tries[id] = append(tries[id], time.Now())
				mu.Unlock()
			}
			return next()
		}})
		publishN(t, admin, topic, bad)
		publish(t, admin, topic, "good")
		begin, handled := make(chan struct{}), make(chan struct{})
		messages := subscribe(t, newSubscriber(t, limited(client, 3)), topic)
		go settling(messages, goxstreams.Retry{}.Middleware(func(msg *message.Message) ([]*message.Message, error) {
			<-begin
			if string(msg.Payload) != "good" {
				return nil, goxstreams.Permanent(errBad)
			}
			close(handled)
			return nil, nil
		}))
		refuse()
		close(begin)
		eventuallyAll(t, func() int { // each of the bad ones is tried, and then the good one is handled
			select {
			case <-handled:
				return bad + 1
			default:
			}
			mu.Lock()
			defer mu.Unlock()
			return len(tries)
		}, bad+1)

		const n = 5
		eventually(t, func() bool {
			mu.Lock()
			defer mu.Unlock()
			for _, times := range tries {
				if len(times) < n {
					continue
				}
				for i := 1; i < n; i++ { // 40 ms, doubling, at least half of it
					assert.GreaterOrEqual(t, times[i].Sub(times[i-1]), 10*time.Millisecond<<i, "try %d", i)
				}
				return true
			}
			return false
		}, "it does not try again")
		eventually(t, func() bool { return len(pendingOf(t, admin, topic, testGroup)) == bad }, "the dead are to stay pending, alone")
	}
	t.Run("OOM", func(t *testing.T) {
		t.Parallel()
		server := testserver.Private(t)
		admin := server.Client()
		starve(t, admin, server.Client(), topic(t), func() {
			require.NoError(t, admin.ConfigSet(t.Context(), "maxmemory", "1").Err())
		})
	})
	t.Run("NOPERM", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t) // it has ACLs
		admin, topic := newClient(t), topic(t)
		starve(t, admin, aclUser(t, admin, "resetkeys", "~"+topic), topic, func() {})
	})
}

// A dead message whose stream was deleted before the move vanished: neither the log
// nor Stats mentioned it.
func TestDeletedBeforeTheMove(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"entry", "stream"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			client, topic, log := newClient(t), topic(t), newLogRecorder()
			var full atomic.Bool
			full.Store(true)
			tried := make(chan struct{}, 1000)
			config := limited(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if full.Load() && isMove(cmd) {
					tried <- struct{}{}
					return redisError("OOM command not allowed when used memory > 'maxmemory'.")
				}
				return next()
			}}), -1)
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "x")
			msg := next(t, messages)
			id := delivery(t, msg).ID
			msg.Nack()
			<-tried
			if what == "stream" {
				require.NoError(t, client.Del(t.Context(), topic).Err())
			} else {
				require.NoError(t, client.XDel(t.Context(), topic, id).Err())
			}
			full.Store(false)
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "the deleted message stays in flight")
			eventually(t, func() bool { return client.XPending(t.Context(), topic, testGroup).Err() == nil }, "the group is not made again")
			eventuallySettled(t, client, topic, testGroup)
			said := func() []string {
				return append(logLinesWith(log.Errors(), "Message lost"), logLinesWith(log.Errors(), "Messages lost")...)
			}
			eventually(t, func() bool { return stats(t, sub).Lost == 1 && len(said()) == 1 }, "it is not said")
			// Another attempt, after 80 ms at most, logs nothing more.
			during(t, 300*time.Millisecond, func() bool { return stats(t, sub).Lost == 1 && len(said()) == 1 }, "it is said again")
			require.Zero(t, stats(t, sub).Dead)
			if what == "stream" {
				require.Contains(t, said()[0], "entries:1")
			} else {
				require.Contains(t, said()[0], id)
			}
		})
	}
}

// A message that dies on a dead-letter stream was logged at Error each time it was
// redelivered, forever.
func TestDeadOnADeadLetterStream(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	publishDying(t, client, topic, "x")
	stream := goxstreams.DeadLetterTopic(topic)
	came := int64(0)
	for range 2 { // processes
		log := newLogRecorder()
		sub := newSubscriberLog(t, limited(client, -1), log)
		handler, _ := failing(always(errOther)...)
		go settling(subscribe(t, sub, stream), handler)
		before := came
		eventually(t, func() bool {
			rows := pendingOf(t, client, stream, testGroup)
			if len(rows) == 1 {
				came = rows[0].RetryCount
			}
			return came >= before+5
		}, "it does not come again")
		require.Len(t, logLinesWith(log.Errors(), "died on a dead-letter stream"), 1)
		require.NoError(t, sub.Close())
		rows := pendingOf(t, client, stream, testGroup)
		require.Len(t, rows, 1)
		came = rows[0].RetryCount
		require.Len(t, deadOf(t, client, topic), 1)
	}
}

// DeadLetter.Topic was not called if SubscriberConfig.Retry decided, after the
// middlewares, that the message is dead; and a Topic that panicked ended the
// process.
func TestTopicOfTheDead(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		topic     func(string) string
		elsewhere int
		logged    int
	}{
		"named":  {elsewhere("bad"), 1, 0},
		"panics": {func(string) string { panic("what a pity") }, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic, log := newClient(t), topic(t), newLogRecorder()
			config := grouped(client)
			config.Retry = &goxstreams.Retry{ShouldRetry: func(middleware.RetryParams) bool { return false }}
			sub := newSubscriberLog(t, config, log)
			handler, calls := failing(always(errOther)...)
			go settling(subscribe(t, sub, topic), goxstreams.DeadLetter{Topic: tt.topic}.Middleware(handler))
			publish(t, client, topic, "x")
			eventually(t, func() bool { return stats(t, sub).Dead == 1 })
			require.EqualValues(t, 1, calls.Load())
			require.Len(t, lettersIn(t, client, elsewhere("bad")(topic)), tt.elsewhere)
			require.Len(t, deadOf(t, client, topic), 1-tt.elsewhere)
			require.Len(t, logLinesWith(log.Errors(), "DeadLetter panicked"), tt.logged)
		})
	}
}
