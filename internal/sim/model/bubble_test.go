package model_test

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/model"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// inBubble runs a test of each version in virtual time.
func inBubble(t *testing.T, f func(*testing.T, *model.Server, *redis.Client)) {
	for name, v := range map[string]model.Version{"Redis70": model.Redis70, "Redis86": model.Redis86, "Valkey91": model.Valkey91} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := model.New(model.Config{Version: v})
				client := newClient(s)
				defer func() {
					s.Thaw() // a failed test may have left it frozen
					_ = client.Close()
				}()
				f(t, s, client)
			})
		})
	}
}

// newClient returns a client that sends nothing twice.
func newClient(s *model.Server) *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr:       "127.0.0.1:6379", // a name would be looked up, outside the bubble
		MaxRetries: -1, ReadTimeout: 3 * time.Second,
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			s.Serve(theirs)
			return ours, nil
		},
	})
}

func add(t *testing.T, client *redis.Client, stream, id string) string {
	t.Helper()
	made, err := client.XAdd(t.Context(), &redis.XAddArgs{Stream: stream, ID: id, Values: []string{"a", "b"}}).Result()
	require.NoError(t, err)
	return made
}

// newGroup makes a stream with one entry that is pending in the consumer's name.
func newGroup(t *testing.T, client *redis.Client) {
	t.Helper()
	require.NoError(t, client.XGroupCreateMkStream(t.Context(), "s", "g", "0").Err())
	add(t, client, "s", "1-1")
	require.Len(t, read(t, client, -1), 1)
}

func readArgs(block time.Duration) *redis.XReadGroupArgs {
	return &redis.XReadGroupArgs{Group: "g", Consumer: "c", Streams: []string{"s", ">"}, Block: block}
}

func read(t *testing.T, client *redis.Client, block time.Duration) []redis.XMessage {
	t.Helper()
	streams, err := client.XReadGroup(t.Context(), readArgs(block)).Result()
	if err == redis.Nil {
		return nil
	}
	require.NoError(t, err)
	return streams[0].Messages
}

func pendingRows(t *testing.T, client *redis.Client) []redis.XPendingExt {
	t.Helper()
	rows, err := client.XPendingExt(t.Context(), &redis.XPendingExtArgs{Stream: "s", Group: "g", Start: "-", End: "+", Count: 10}).Result()
	require.NoError(t, err)
	return rows
}

// background runs a call in a goroutine, and returns its outcome later.
func background[T any](call func() (T, error)) func() (T, error) {
	var v T
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		v, err = call()
	}()
	synctest.Wait()
	return func() (T, error) { <-done; return v, err }
}

func TestFreeze(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		newGroup(t, client)
		var conns [4]*redis.Conn
		for i := range conns {
			conns[i] = client.Conn()
			defer conns[i].Close()
			require.NoError(t, conns[i].Ping(t.Context()).Err())
		}
		start := time.Now()
		s.Freeze()
		err := conns[0].XAdd(t.Context(), &redis.XAddArgs{Stream: "s", ID: "2-1", Values: []string{"a", "b"}}).Err()
		require.Error(t, err, "its reply does not come in time")
		require.Equal(t, 3*time.Second, time.Since(start))
		time.Sleep(7 * time.Second)
		require.EqualValues(t, 1, do(t, s, "xlen", "s"))
		var later []func() (string, error)
		for i, id := range []string{"3-1", "4-1", "5-1"} {
			later = append(later, background(func() (string, error) {
				return conns[1+i].XAdd(t.Context(), &redis.XAddArgs{Stream: "s", ID: id, Values: []string{"a", "b"}}).Result()
			}))
		}
		s.Thaw()
		for _, reply := range later {
			_, err := reply()
			require.NoError(t, err, "in the order of arrival")
		}
		require.EqualValues(t, 5, do(t, s, "xlen", "s"), "also what nobody waits for any more")
		require.Equal(t, 10*time.Second, pendingRows(t, client)[0].Idle)
	})
}

func do(t *testing.T, s *model.Server, args ...any) any {
	t.Helper()
	v, err := s.Do(args...)
	require.NoError(t, err)
	return v
}

func TestFreeze_BlockedRead(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		newGroup(t, client)
		start := time.Now()
		reply := background(func() ([]redis.XStream, error) { return client.XReadGroup(t.Context(), readArgs(time.Second)).Result() })
		s.Freeze()
		time.Sleep(5 * time.Second)
		s.Thaw()
		_, err := reply()
		require.ErrorIs(t, err, redis.Nil)
		require.Equal(t, 5*time.Second, time.Since(start))
	})
}

func TestRefuseWrites(t *testing.T) {
	const refusal = "NOREPLICAS Not enough good replicas to write."
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		newGroup(t, client)
		pipe := client.Conn()
		defer pipe.Close()
		require.NoError(t, pipe.Do(t.Context(), "multi").Err())
		require.NoError(t, pipe.Do(t.Context(), "xadd", "s", "2-1", "a", "b").Err())
		s.RefuseWrites(refusal)
		require.EqualError(t, pipe.Do(t.Context(), "exec").Err(), "EXECABORT Transaction discarded because of: "+refusal)
		require.EqualError(t, client.XReadGroup(t.Context(), readArgs(-1)).Err(), refusal)
		_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error { return p.XDel(t.Context(), "s", "1-1").Err() })
		require.ErrorContains(t, err, "EXECABORT Transaction discarded because of previous errors.")
		require.EqualValues(t, 1, client.Eval(t.Context(), "return redis.call('xlen', KEYS[1])", []string{"s"}).Val())
		require.ErrorContains(t, client.Eval(t.Context(), "return redis.call('xdel', KEYS[1], '1-1')", []string{"s"}).Err(), refusal+" script:")
		require.EqualValues(t, 1, do(t, s, "xlen", "s"))
		do(t, s, "xadd", "s", "2-1", "a", "b")
		s.RefuseWrites("OOM command not allowed when used memory > 'maxmemory'.")
		require.Len(t, read(t, client, -1), 1)
		require.ErrorContains(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: "s", Values: []string{"a", "b"}}).Err(), "OOM ")
		require.ErrorContains(t, client.Eval(t.Context(), "return redis.call('hset', KEYS[1], 'a', 'b')", []string{"h"}).Err(), "OOM ")
		require.EqualValues(t, 1, client.Eval(t.Context(), "redis.call('hdel', KEYS[1], ''); return redis.call('hset', KEYS[1], 'a', 'b')", []string{"h"}).Val(),
			"it refuses nothing after the first write of a script")
		s.RefuseWrites("")
		add(t, client, "s", "3-1")
	})
}

func TestStepClock(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		newGroup(t, client)
		s.StepClock(time.Hour)
		require.Equal(t, time.Hour, pendingRows(t, client)[0].Idle)
		ahead := add(t, client, "s", "*")
		s.StepClock(-2 * time.Hour)
		require.Zero(t, pendingRows(t, client)[0].Idle)
		require.Equal(t, ahead[:len(ahead)-1]+"1", add(t, client, "s", "*"), "IDs do not go back")
		claimed := client.XClaimJustID(t.Context(), &redis.XClaimArgs{Stream: "s", Group: "g", Consumer: "d", MinIdle: time.Millisecond, Messages: []string{"1-1"}}).Val()
		require.Empty(t, claimed, "it lies in the future")
		require.Len(t, read(t, client, -1), 2)

		start := time.Now()
		reply := background(func() ([]redis.XStream, error) {
			return client.XReadGroup(t.Context(), readArgs(5*time.Second)).Result()
		})
		time.Sleep(time.Second)
		s.StepClock(3 * time.Second)
		_, err := reply()
		require.ErrorIs(t, err, redis.Nil)
		require.Equal(t, 2*time.Second, time.Since(start))
	})
}

func TestRestore(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		newGroup(t, client)
		sha := client.ScriptLoad(t.Context(), "return 1").Val()
		old := s.Snapshot()
		add(t, client, "s", "2-1")
		require.NoError(t, client.XAck(t.Context(), "s", "g", "1-1").Err())
		reply := background(func() ([]redis.XStream, error) {
			return client.XRead(t.Context(), &redis.XReadArgs{Streams: []string{"s", "$"}, Block: 0}).Result()
		})
		for range 2 {
			s.Restore(old)
			if reply != nil {
				_, err := reply()
				require.Error(t, err)
				require.False(t, err == redis.Nil)
			}
			reply = nil
			client := newClient(s)
			require.EqualValues(t, 1, client.XLen(t.Context(), "s").Val())
			require.Len(t, pendingRows(t, client), 1)
			require.True(t, redis.HasErrorPrefix(client.EvalSha(t.Context(), sha, nil).Err(), "NOSCRIPT"))
			add(t, client, "s", "3-1")
			require.Len(t, read(t, client, -1), 1)
			require.NoError(t, client.Close())
		}
		s.Freeze()
		s.Restore(nil)
		require.EqualValues(t, 0, do(t, s, "exists", "s"))
		again := newClient(s)
		defer again.Close()
		require.NoError(t, again.Ping(t.Context()).Err(), "a restarted server is not frozen")
	})
}

func TestCutAll(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		newGroup(t, client)
		s.Freeze()
		reply := background(func() (string, error) {
			return client.XAdd(t.Context(), &redis.XAddArgs{Stream: "s", ID: "2-1", Values: []string{"a", "b"}}).Result()
		})
		s.CutAll()
		_, err := reply()
		require.Error(t, err)
		s.Thaw()
		synctest.Wait()
		require.EqualValues(t, 1, do(t, s, "xlen", "s"))
	})
}

// What a client has sent is executed though it does not wait for the reply.
func TestClientGoes(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, _ *redis.Client) {
		ours, theirs := net.Pipe()
		s.Serve(theirs)
		c := newRawClient(t, ours)
		s.Freeze()
		for _, id := range []string{"1-1", "2-1"} {
			c.send("xadd", "s", id, "a", "b")
			synctest.Wait()
		}
		require.NoError(t, ours.Close())
		s.Thaw()
		synctest.Wait()
		require.EqualValues(t, 2, do(t, s, "xlen", "s"))
	})
}

// A client that is gone gets nothing, and the next one in the queue does.
func TestBlockedClientGoes(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		newGroup(t, client)
		first := newClient(s)
		gone := background(func() ([]redis.XStream, error) { return first.XReadGroup(t.Context(), readArgs(0)).Result() })
		next := background(func() ([]redis.XStream, error) { return client.XReadGroup(t.Context(), readArgs(0)).Result() })
		require.NoError(t, first.Close())
		synctest.Wait()
		_, err := gone()
		require.Error(t, err)
		do(t, s, "xadd", "s", "2-1", "a", "b")
		streams, err := next()
		require.NoError(t, err)
		require.Equal(t, "2-1", streams[0].Messages[0].ID)
	})
}

func TestClientUnblock(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		newGroup(t, client)
		conn := client.Conn()
		defer conn.Close()
		id := conn.ClientID(t.Context()).Val()
		for _, with := range []string{"timeout", "error"} {
			reply := background(func() ([]redis.XStream, error) { return conn.XReadGroup(t.Context(), readArgs(0)).Result() })
			require.EqualValues(t, 1, client.Do(t.Context(), "client", "unblock", id, with).Val())
			_, err := reply()
			if with == "error" {
				require.EqualError(t, err, "UNBLOCKED client unblocked via CLIENT UNBLOCK")
			} else {
				require.ErrorIs(t, err, redis.Nil)
			}
			require.EqualValues(t, 0, client.Do(t.Context(), "client", "unblock", id).Val())
		}
	})
}

// The library delivers, retries and moves what fails to the dead-letter stream.
func TestLibrary(t *testing.T) {
	inBubble(t, func(t *testing.T, _ *model.Server, client *redis.Client) {
		dead := make(chan goxstreams.DeadMessage, 1)
		sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
			Client: client, ConsumerGroup: "g",
			Retry:  &goxstreams.Retry{MaxRetries: 1, InitialInterval: time.Minute, MaxInterval: time.Minute},
			OnDead: func(_ context.Context, m goxstreams.DeadMessage) { dead <- m },
		}, nil)
		require.NoError(t, err)
		defer sub.Close()
		messages, err := sub.Subscribe(context.Background(), "topic")
		require.NoError(t, err)
		pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
		require.NoError(t, err)
		require.NoError(t, pub.Publish("topic", message.NewMessage("good", nil), message.NewMessage("bad", nil)))

		msg := <-messages
		require.Equal(t, "good", msg.UUID)
		msg.Ack()
		start := time.Now()
		for range 2 {
			msg = <-messages
			require.Equal(t, "bad", msg.UUID)
			msg.Nack()
		}
		letter := <-dead
		require.Equal(t, "bad", letter.Message.UUID)
		require.InDelta(t, time.Minute, time.Since(start), float64(time.Second))
		queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("topic"))
		require.NoError(t, err)
		n, err := queue.Replay(t.Context(), letter.ID)
		require.NoError(t, err)
		require.Equal(t, 1, n)
		msg = <-messages
		require.Equal(t, "bad", msg.UUID)
		msg.Ack()
		require.NoError(t, sub.Close())
		require.NoError(t, pub.Close())
		require.Zero(t, client.XPending(t.Context(), "topic", "g").Val().Count)
	})
}

// A snapshot has what a script has done, or nothing of it: a tail that is lost puts a message that was moved back where it waited.
func TestSnapshotOfDelayed(t *testing.T) {
	inBubble(t, func(t *testing.T, s *model.Server, client *redis.Client) {
		ctx := t.Context()
		stream := xstream.New(redisx.Client{UniversalClient: client}, "s", "")
		call := xstream.NewScheduling(ctx, "s", 0, "")
		require.NoError(t, call.Add("u", xstream.DueIn(time.Second), func(args []any) ([]any, error) { return append(args, "f", "v"), nil }))
		untilNext, err := call.Send(client)
		require.NoError(t, err)
		require.Equal(t, time.Second, untilNext)
		waiting := s.Snapshot()

		time.Sleep(time.Second)
		moved, err := stream.Move(ctx)
		require.NoError(t, err)
		require.Equal(t, 1, moved.Count)
		require.EqualValues(t, 0, client.Exists(ctx, xstream.DueKey("s"), xstream.DelayedKey("s")).Val())

		s.Restore(waiting)
		require.Error(t, client.Ping(ctx).Err(), "its connections are cut")
		require.EqualValues(t, 0, client.XLen(ctx, "s").Val())
		moved, err = stream.Move(ctx)
		require.NoError(t, err)
		require.Equal(t, 1, moved.Count)
		require.EqualValues(t, 1, client.XLen(ctx, "s").Val())

		s.Restore(waiting)
		require.Error(t, client.Ping(ctx).Err(), "its connections are cut")
		require.NoError(t, stream.Cancel(ctx, "u"))
		require.ErrorIs(t, stream.Cancel(ctx, "u"), xstream.ErrMissing)
		require.ErrorIs(t, stream.Reschedule(ctx, "u", time.Now()), xstream.ErrMissing)
	})
}
