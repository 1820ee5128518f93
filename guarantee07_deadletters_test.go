package goxstreams_test

import (
	"context"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 7: a dead message is moved once, and no handler sees it again.

// The message was moved and the answer lost. Before the command was sent again, the
// consumer was removed, with nothing pending: the message looked like one of a group that
// was made anew, was put back, and moved once more.
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

// The dead-letter stream's key had another type. More messages died than wait for
// anything, and those that had to go were handled again.
//
// Here nothing more is read while so many wait to be moved.
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
	eventually(t, func() bool { return stats(t, sub).Waiting >= 5000 })
	time.Sleep(3 * minIdle) // for leases to run out that nobody renews
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
