package goxstreams_test

import (
	"context"
	"errors"
	"io"
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

// A claim loses its answer while the answer to a read is on its way. Who looks then
// for what is pending and in nobody's hands sees what was read too, and must not
// take it for that.
func TestLostReplies_ReadUnderWay(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	createGroup(t, admin, topic, testGroup)
	var claimLost, reading, overlap atomic.Bool
	var looks atomic.Int64
	var read sync.Once
	h := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if args := cmd.Args(); cmd.Name() == "xpending" && len(args) == 7 && strings.HasPrefix(args[6].(string), "one-") {
			looks.Add(1)
			overlap.CompareAndSwap(false, reading.Load())
		}
		err := next()
		switch {
		case isClaim(cmd) && claimLost.CompareAndSwap(false, true):
			publish(t, admin, topic, "new")
			eventually(t, reading.Load)
			return io.EOF
		case cmd.Name() == "xreadgroup" && claimLost.Load() && len(pendingOf(t, admin, topic, testGroup)) == 2:
			read.Do(func() {
				reading.Store(true)
				time.Sleep(3 * claimInterval) // the longer, the more can go wrong meanwhile
				reading.Store(false)
			})
		}
		return err
	}}
	config := claiming(newClient(t, h))
	config.Consumer = "one"
	config.MaxConcurrency = 4
	sub := newSubscriber(t, config)
	publish(t, admin, topic, "abandoned")
	readAs(t, admin, topic, testGroup, "dead", 1)
	messages := subscribe(t, sub, topic)
	first, second := next(t, messages), next(t, messages)
	counts := map[string]int64{string(first.Payload): delivery(t, first).Count, string(second.Payload): delivery(t, second).Count}
	require.Equal(t, map[string]int64{"abandoned": 2, "new": 1}, counts)
	select {
	case msg := <-messages:
		t.Errorf("%s comes twice at once", msg.Payload)
	case <-time.After(minIdle): // a longer time would find more
	}
	first.Ack()
	second.Ack()
	require.Positive(t, looks.Load())
	require.False(t, overlap.Load(), "it looks, and reads, at the same time")
}

// A fan-out reads something while it looks whether its stream began anew: what was
// counted twice by then looked like a new stream, and all came again.
func TestFanOut_ReadDuringALook(t *testing.T) {
	t.Parallel()
	topic, admin, log := topic(t), newClient(t), newLogRecorder()
	handled := newTally()
	var looks atomic.Int64
	h := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if handled.len() > 0 && isScript(cmd, "'STREAM'") && looks.Add(1) == 1 {
			publish(t, admin, topic, "while it looks")
			eventually(t, func() bool { return handled.len() == 2 })
		}
		return next()
	}}
	sub := newSubscriberLog(t, goxstreams.SubscriberConfig{Client: newClient(t, h)}, log)
	handled.handle(subscribe(t, sub, topic), nil)
	publish(t, admin, topic, "before")
	eventually(t, func() bool { return looks.Load() >= 2 }, "it looks no more")
	publish(t, admin, topic, "last")
	eventually(t, func() bool { return looks.Load() >= 3 && handled.len() == 3 })
	require.Empty(t, log.Errors())
	require.Equal(t, 3, handled.total(), "something comes twice")
}

// The group is made anew by somebody else while a message is in hand that then dies.
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

// The answer to a burial is lost, and the next tries are refused (a replica, OOM); renewals go on meanwhile.
func TestBury_LostAnswerThenRefused(t *testing.T) {
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

// The group is made anew by somebody else; this consumer reads something new before it renews what it has.
func TestGroupRemade_ReadsOn(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	config := claiming(newClient(t))
	config.MaxConcurrency = 2
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, admin, topic, "old")
	old := next(t, messages)
	_, err := admin.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
		p.XGroupDestroy(t.Context(), topic, testGroup)
		p.XGroupCreate(t.Context(), topic, testGroup, "$")
		p.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{goxstreams.UUIDHeaderKey, "x", "payload", "new"}})
		return nil
	})
	require.NoError(t, err)
	fresh := next(t, messages)
	require.Equal(t, "new", string(fresh.Payload))
	select { // until a renewal found it missing, or put it back
	case <-old.Context().Done():
	case <-time.After(2 * minIdle):
	}
	old.Nack()
	fresh.Ack()
	assert.Equal(t, []string{"old"}, payloads(collect(messages, 1, patience)), "lost")
}

// A pooled connection that somebody left with a WATCH: EXEC answers nil.
func TestPublish_WatchLeftBehind(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	client := redis.NewClient(&redis.Options{Addr: admin.Options().Addr, PoolSize: 1})
	t.Cleanup(func() { client.Close() })
	pub := newPublisher(t, client)
	two := func() error {
		return pub.Publish(topic, message.NewMessage("a", nil), message.NewMessage("b", nil))
	}
	require.NoError(t, two())
	_, err := client.Pipelined(t.Context(), func(p redis.Pipeliner) error { return p.Do(t.Context(), "watch", topic).Err() })
	require.NoError(t, err)
	publish(t, admin, topic, "by somebody else")
	require.ErrorIs(t, two(), redis.TxFailedErr)
	require.Len(t, stored(t, admin, topic), 3)
	require.NoError(t, two(), "EXEC ends the WATCH")
	require.Len(t, stored(t, admin, topic), 5)
}

// DeleteAcked by script: the stream is deleted while the last message is in hand and the subscription closes.
func TestDeleteAcked_CloseWithoutStream(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	client, name := named(t)
	config := grouped(client)
	config.DeleteAcked = true
	config.CloseTimeout = patience
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "x")
	msg := next(t, messages)
	done := make(chan struct{})
	go func() { defer close(done); _ = sub.Close() }()
	// Nobody reads any more who would make the group again, or one does and has.
	eventually(t, func() bool { return blockedReads(t, admin, name) == 0 })
	require.NoError(t, admin.Del(t.Context(), topic).Err())
	msg.Ack()
	<-done
	for _, line := range log.Errors() {
		require.NotContains(t, line, "Closed before all acks", "it waits for acks that nothing can take")
	}
}

// A claim fails; others settle the entry meanwhile. That is no outage any more.
func TestStats_FailedClaimSettledElsewhere(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	createGroup(t, admin, topic, testGroup)
	publish(t, admin, topic, "x")
	readAs(t, admin, topic, testGroup, "dead", 1)
	var fail atomic.Bool
	fail.Store(true)
	sub := newSubscriber(t, claiming(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isClaim(cmd) && fail.Load() {
			return io.EOF
		}
		return next()
	}})))
	subscribe(t, sub, topic)
	eventually(t, func() bool { return stats(t, sub).Err != nil })
	next(t, subscribe(t, newSubscriber(t, claiming(admin)), topic)).Ack()
	eventuallySettled(t, admin, topic, testGroup)
	fail.Store(false)
	eventually(t, func() bool { return stats(t, sub).Err == nil })
}

// A read fails while the only slot is taken. Nobody needs to read until it is free.
func TestStats_FailedReadWithoutRoom(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	createGroup(t, admin, topic, testGroup)
	publish(t, admin, topic, "x")
	readAs(t, admin, topic, testGroup, "dead", 1)
	taken, failed := make(chan struct{}), make(chan struct{})
	var first sync.Once
	config := claiming(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		err := next()
		if cmd.Name() == "xreadgroup" {
			first.Do(func() {
				select {
				case <-taken:
				case <-time.After(patience):
				}
				close(failed)
				err = io.EOF
			})
		}
		return err
	}}))
	config.BlockTime = 50 * time.Millisecond
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	msg := next(t, subscribe(t, sub, topic)) // claimed, while the first read goes on
	close(taken)
	<-failed
	eventuallyLogged(t, log, 1)
	require.NoError(t, stats(t, sub).Err)
	msg.Ack()
	eventuallySettled(t, admin, topic, testGroup)
}

// What waits beyond the bound is left to its lease. A read that fails must not take it for an orphan, which would come again
// at once, and not be counted.
func TestOverflow_IsNoOrphan(t *testing.T) {
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	var fail atomic.Bool
	config := grouped(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if cmd.Name() == "xreadgroup" && fail.CompareAndSwap(true, false) {
			return io.EOF
		}
		return next()
	}}))
	config.BlockTime = 50 * time.Millisecond
	config.MaxConcurrency = 200
	config.Retry = &goxstreams.Retry{MaxRetries: 1, InitialInterval: time.Hour, MaxInterval: time.Hour}
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	const n = 10_020
	publishN(t, admin, topic, n)
	for range n {
		next(t, messages).Nack()
	}
	eventually(t, func() bool { return stats(t, sub).Waiting == 10_000 })
	fail.Store(true)
	eventually(t, func() bool { return !fail.Load() })
	for range 100 { // while orphans would come
		publish(t, admin, topic, "later")
		msg := next(t, messages)
		require.Equal(t, "later", string(msg.Payload), "an hour early, with Count %d", delivery(t, msg).Count)
		msg.Ack()
	}
}
