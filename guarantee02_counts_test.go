package goxstreams_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 2: a nack, an expired lease and a crash use one delivery each. No cut
// connection, clock step, pause, failover or write outage does.

// The server's clock was set back by half a minute, so that what was delivered before
// was delivered in the future. A nacked message was claimed with a least idle time, which
// it had reached only half a minute later; and with one slot the topic waited for it.
//
// Here its owner is asked for, whatever the clock shows.
func TestFault39_ClockSetBack(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, step := range []time.Duration{-30 * time.Second, -2 * time.Minute, time.Hour} {
		for _, concurrency := range []int{1, 4} {
			t.Run(fmt.Sprint(step, "/MaxConcurrency", concurrency), func(t *testing.T) {
				t.Parallel()
				client, topic := newClient(t), topic(t)
				config := grouped(client)
				config.MaxConcurrency = concurrency
				config.ClaimMinIdle = 2 * time.Second
				config.Retry = &goxstreams.Retry{InitialInterval: 100 * time.Millisecond}
				sub := newSubscriber(t, config)
				messages := subscribe(t, sub, topic)
				rival := newSubscriber(t, config)
				publish(t, client, topic, "x")
				var msg *message.Message
				others := subscribe(t, rival, topic)
				select {
				case msg = <-messages:
				case msg = <-others:
				}
				require.EqualValues(t, 1, delivery(t, msg).Count)
				shiftClock(t, client, topic, testGroup, step)
				// In hand it stays whose it is, for longer than a lease.
				during(t, 2*config.ClaimMinIdle, func() bool { return msg.Context().Err() == nil })
				shiftClock(t, client, topic, testGroup, step)
				holder := delivery(t, msg).Consumer
				began := time.Now()
				require.True(t, msg.Nack())
				select {
				case msg = <-messages:
				case msg = <-others:
				case <-time.After(patience):
					require.FailNow(t, "it does not come again")
				}
				require.Less(t, time.Since(began), 2*time.Second)
				require.EqualValues(t, 2, delivery(t, msg).Count)
				require.Equal(t, holder, delivery(t, msg).Consumer)
				require.True(t, msg.Ack())
				eventuallySettled(t, client, topic, testGroup)
				require.Zero(t, stats(t, sub).Claimed+stats(t, rival).Claimed)
			})
		}
	}
}

// A message waited 25 s for its retry, and with one slot its successors waited for it.
// Meanwhile another consumer claimed and acked it, by hand, say: they waited for nothing.
func TestFault40_WaitingForWhatIsSettledElsewhere(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, how := range []string{"Acked", "Claimed", "ClaimedAndAcked", "Deleted"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := grouped(client)
			config.ClaimMinIdle = time.Second
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "first", "second", "third")
			handler := goxstreams.Retry{}.Middleware(func(*message.Message) ([]*message.Message, error) {
				return nil, goxstreams.RetryAfter(errors.New("later"), 25*time.Second)
			})
			msg := next(t, messages)
			id := delivery(t, msg).ID
			_, err := handler(msg)
			require.Error(t, err)
			require.True(t, msg.Nack())
			eventually(t, func() bool { return stats(t, sub).Waiting == 1 })
			if how != "Acked" && how != "Deleted" {
				require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, "other", 0, id, "justid").Err())
			}
			switch how {
			case "Deleted":
				require.NoError(t, client.XDel(t.Context(), topic, id).Err())
			case "Acked", "ClaimedAndAcked":
				require.EqualValues(t, 1, client.XAck(t.Context(), topic, testGroup, id).Val())
			}
			began := time.Now()
			require.Equal(t, []string{"second", "third"}, payloads(collect(messages, 2, patience)))
			require.Less(t, time.Since(began), 10*time.Second)
		})
	}
}
