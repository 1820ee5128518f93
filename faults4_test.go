package goxstreams_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// goxstreams deletes dead and broken entries, and never acks them: they are gone
// for every other group too, handled there or not, and its own group keeps them
// pending for ever. Here they are acked, in their group, and stay in the stream.
func TestFault20_DeadEntriesDeletedNotAcked(t *testing.T) {
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
	// In one of the others the entries are in hand.
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
	// All of the others still get all of it.
	got, err := client.XClaim(t.Context(), &redis.XClaimArgs{Stream: topic, Group: "other0", Consumer: "next", Messages: held}).Result()
	require.NoError(t, err)
	require.Len(t, got, len(before))
	for i := 1; i < groups; i++ {
		readAs(t, client, topic, fmt.Sprint("other", i), "consumer", len(before))
	}
}

// Most who have dead letters add them, and then ack: a process that ends in
// between leaves the message pending, and the next one adds it again. Here both
// are one step. The process ends before and after each of its commands in turn,
// from the handler's error on.
func TestFault26_CrashDuplicatesDeadLetter(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	// What the process has that ends, and the one that takes over.
	type process func(t *testing.T, client *redis.Client, topic string) (*goxstreams.Subscriber, message.HandlerFunc)
	open := func(t *testing.T, client *redis.Client) *goxstreams.Subscriber {
		config := grouped(client)
		config.ClaimMinIdle = 300 * time.Millisecond
		config.Retry = quickRetry()
		config.Retry.MaxRetries = 5
		config.CloseTimeout = 50 * time.Millisecond // of the one whose commands go nowhere
		return newSubscriber(t, config)
	}
	fail := func(*message.Message) ([]*message.Message, error) { return nil, goxstreams.Permanent(errOther) }
	ours := func(t *testing.T, client *redis.Client, topic string) (*goxstreams.Subscriber, message.HandlerFunc) {
		return open(t, client), goxstreams.DeadLetter{}.Middleware(fail)
	}
	// XADD, then XACK: this is how to see that the test would notice.
	theirs := func(t *testing.T, client *redis.Client, topic string) (*goxstreams.Subscriber, message.HandlerFunc) {
		poison, err := middleware.PoisonQueue(newPublisher(t, client), goxstreams.DeadLetterTopic(topic))
		require.NoError(t, err)
		return open(t, client), poison(fail)
	}
	// crash returns how many dead letters there are in the end, and whether the
	// process had so many commands.
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
		// What is pending no more was moved or acked before.
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
			require.Equal(t, tt.once, twice == 0, "%d times there were two", twice)
		})
	}
}
