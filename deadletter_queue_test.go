package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
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

// replayField marks an entry as a replay. It is part of the wire format: a replay
// by one version is consumed by another.
const replayField = "_goxstreams_replay"

// protocolClient is newClient with RESP2 or RESP3.
func protocolClient(t testing.TB, protocol int) *redis.Client {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Protocol: protocol})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// publishDying publishes messages that die in testGroup, and returns their dead
// letters.
func publishDying(t testing.TB, client redis.UniversalClient, topic string, payloads ...string) []goxstreams.DeadMessage {
	t.Helper()
	config := brief(client)
	config.MaxConcurrency = 10
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	msgs := messagesOf(payloads...)
	require.NoError(t, newPublisher(t, client).Publish(topic, msgs...))
	handler, _ := failing(slices.Repeat([]error{errOther}, len(payloads))...)
	go settling(messages, handler)
	eventually(t, func() bool { return stats(t, sub).Dead == int64(len(payloads)) })
	require.NoError(t, sub.Close())
	letters := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
	return letters[len(letters)-len(payloads):]
}

// multiply adds n copies of a stream's first entry to it.
func multiply(t testing.TB, client redis.UniversalClient, stream string, n int) {
	t.Helper()
	args := []any{"xadd", stream, "*"}
	for _, f := range entriesOf(t, client, stream)[0].fields {
		args = append(args, f)
	}
	for n > 0 {
		_, err := client.Pipelined(context.Background(), func(pipe redis.Pipeliner) error {
			for range min(n, 10_000) {
				pipe.Do(context.Background(), args...)
			}
			return nil
		})
		require.NoError(t, err)
		n -= min(n, 10_000)
	}
}

// lettersOf makes n dead letters of a topic.
func lettersOf(t testing.TB, client redis.UniversalClient, topic string, n int) []goxstreams.DeadMessage {
	t.Helper()
	publishDying(t, client, topic, "payload")
	multiply(t, client, goxstreams.DeadLetterTopic(topic), n-1)
	letters := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
	require.Len(t, letters, n)
	return letters
}

func idsOf(letters []goxstreams.DeadMessage) []string {
	ids := make([]string, len(letters))
	for i, l := range letters {
		ids[i] = l.ID
	}
	return ids
}

func requireNotFound(t testing.TB, err error, stream string, ids ...string) {
	t.Helper()
	var missing *goxstreams.NotFoundError
	require.ErrorAs(t, err, &missing)
	require.Equal(t, ids, missing.IDs)
	require.Equal(t, stream, missing.Topic)
}

func TestNewDeadLetterQueue_Mistakes(t *testing.T) {
	var none *redis.Client
	for _, tt := range []struct {
		client redis.UniversalClient
		stream string
		want   []string
	}{
		{nil, "", []string{"NewDeadLetterQueue.c: ", "NewDeadLetterQueue.deadLetterTopic: "}},
		{none, "dead", []string{"NewDeadLetterQueue.c: "}},
		{offline(t), "", []string{"NewDeadLetterQueue.deadLetterTopic: "}},
	} {
		q, err := goxstreams.NewDeadLetterQueue(tt.client, tt.stream)
		require.Nil(t, q)
		got := mistakes(t, err, "NewDeadLetterQueue")
		require.Len(t, got, len(tt.want))
		for _, want := range tt.want {
			require.ErrorContains(t, err, want)
		}
	}
	_, err := goxstreams.NewDeadLetterQueue(offline(t), "dead")
	require.NoError(t, err)
}

func TestDeadLetterQueue_Empty(t *testing.T) {
	protocols(t, func(t *testing.T, protocol int) {
		client, stream := protocolClient(t, protocol), topic(t)
		q := queueOf(t, client, stream)
		n, err := q.Count(t.Context())
		require.NoError(t, err)
		require.Zero(t, n)
		require.Empty(t, lettersIn(t, client, stream))
		for name, do := range map[string]func(context.Context, ...string) (int, error){"Replay": q.Replay, "ReplayToAll": q.ReplayToAll, "Delete": q.Delete} {
			done, err := do(t.Context())
			require.NoError(t, err, name)
			require.Zero(t, done)
			done, err = do(t.Context(), "5-1", "7")
			requireNotFound(t, err, stream, "5-1", "7-0")
			require.ErrorContains(t, err, stream)
			require.Zero(t, done)
		}
		require.Zero(t, client.Exists(t.Context(), stream).Val(), "nothing is made by looking")
	})
}

func TestDeadLetterQueue_Count(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	lettersOf(t, client, topic, 3)
	stream := goxstreams.DeadLetterTopic(topic)
	addRaw(t, client, stream, "no", "dead letter")
	n, err := queueOf(t, client, stream).Count(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 4, n)

	require.NoError(t, client.Set(t.Context(), stream+"2", "a string", 0).Err())
	_, err = queueOf(t, client, stream+"2").Count(t.Context())
	require.ErrorContains(t, err, "WRONGTYPE")
	require.ErrorContains(t, err, stream+"2")
}

func TestDeadLetterQueue_All(t *testing.T) {
	t.Parallel()
	type seq struct {
		client *redis.Client
		topic  string
		stream string
		q      *goxstreams.DeadLetterQueue
		want   []string
	}
	open := func(t *testing.T, protocol, n int) *seq {
		t.Parallel()
		s := &seq{client: protocolClient(t, protocol), topic: topic(t)}
		s.stream = goxstreams.DeadLetterTopic(s.topic)
		s.q = queueOf(t, s.client, s.stream)
		s.want = idsOf(lettersOf(t, s.client, s.topic, n))
		for i, e := range entriesOf(t, s.client, s.stream) {
			require.Equal(t, e.id, s.want[i])
		}
		return s
	}
	// all iterates, and calls f for each.
	all := func(t *testing.T, s *seq, after string, f func(i int, d goxstreams.DeadMessage)) (got []string) {
		t.Helper()
		for d, err := range s.q.All(t.Context(), after) {
			require.NoError(t, err)
			require.Equal(t, "payload", string(d.Message.Payload))
			got = append(got, d.ID)
			f(len(got)-1, d)
		}
		return got
	}
	nothing := func(int, goxstreams.DeadMessage) {}

	protocols(t, func(t *testing.T, protocol int) {
		for _, n := range []int{1, 99, 100, 101, 200, 250} {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				s := open(t, protocol, n)
				require.Equal(t, s.want, all(t, s, "", nothing))
				for _, i := range []int{0, n / 2, n - 1} {
					require.Equal(t, append([]string{}, s.want[i+1:]...), append([]string{}, all(t, s, s.want[i], nothing)...), "after %d", i)
				}
				require.Equal(t, s.want, all(t, s, "0", nothing))
				require.Equal(t, s.want, all(t, s, "1-1", nothing))
				require.Empty(t, all(t, s, fmt.Sprint(uint64(1<<63)), nothing))
			})
		}
		t.Run("what is added in the loop is not in it", func(t *testing.T) {
			s := open(t, protocol, 150)
			seq := s.q.All(t.Context(), "")
			multiply(t, s.client, s.stream, 1) // before the loop starts
			s.want = idsOf(lettersIn(t, s.client, s.stream))
			var got []string
			for d, err := range seq {
				require.NoError(t, err)
				if got = append(got, d.ID); len(got)%50 == 0 || len(got) == 151 {
					multiply(t, s.client, s.stream, 1)
				}
			}
			require.Equal(t, s.want, got)
			require.Len(t, lettersIn(t, s.client, s.stream), 155)
			got = nil
			for d := range seq { // it can be iterated again
				got = append(got, d.ID)
			}
			require.Len(t, got, 155)
		})
		t.Run("deleted in the loop", func(t *testing.T) {
			s := open(t, protocol, 250)
			got := all(t, s, "", func(i int, d goxstreams.DeadMessage) {
				n, err := s.q.Delete(t.Context(), d.ID)
				require.NoError(t, err)
				require.Equal(t, 1, n)
			})
			require.Equal(t, s.want, got)
			require.Empty(t, entriesOf(t, s.client, s.stream))
		})
		t.Run("the last one deleted in the loop", func(t *testing.T) {
			s := open(t, protocol, 250)
			got := all(t, s, "", func(i int, d goxstreams.DeadMessage) {
				if i == 0 {
					_, err := s.q.Delete(t.Context(), s.want[150], s.want[249])
					require.NoError(t, err)
				}
			})
			require.Equal(t, slices.Concat(s.want[:150], s.want[151:249]), got)
		})
		t.Run("replayed in the loop", func(t *testing.T) {
			s := open(t, protocol, 130)
			got := all(t, s, "", func(i int, d goxstreams.DeadMessage) {
				n, err := s.q.Replay(t.Context(), d.ID)
				require.NoError(t, err)
				require.Equal(t, 1, n)
			})
			require.Equal(t, s.want, got)
			require.Empty(t, entriesOf(t, s.client, s.stream))
			require.Len(t, entriesOf(t, s.client, s.topic), 131)
		})
		t.Run("break", func(t *testing.T) {
			s := open(t, protocol, 250)
			for _, at := range []int{1, 100, 101} {
				n := 0
				for _, err := range s.q.All(t.Context(), "") {
					require.NoError(t, err)
					if n++; n == at {
						break
					}
				}
				require.Equal(t, at, n)
			}
		})
		t.Run("what is no dead letter", func(t *testing.T) {
			s := open(t, protocol, 2)
			foreign := [][]string{
				{"a", "1", "a", "2", "\x00\xff", ""},
				{goxstreams.UUIDHeaderKey, "uuid", "metadata", "", "payload", "published here"},
				{goxstreams.UUIDHeaderKey, "uuid", "metadata", "", "payload", "p", "_goxstreams_fields", "\xc1 no fields"},
				{goxstreams.UUIDHeaderKey, "uuid", "metadata", "\xc1 no metadata", "payload", "p", "_goxstreams_fields", "\x90"},
			}
			var ids []string
			for _, fields := range foreign {
				ids = append(ids, addRaw(t, s.client, s.stream, fields...))
			}
			multiply(t, s.client, s.stream, 1)
			i := 0
			for d, err := range s.q.All(t.Context(), "") {
				if i -= 2; i < 0 || i >= len(foreign) {
					require.NoError(t, err)
				} else {
					require.ErrorContains(t, err, ids[i])
					require.ErrorContains(t, err, s.stream)
					require.Equal(t, goxstreams.DeadMessage{ID: ids[i], Fields: foreign[i]}, d)
				}
				i += 3
			}
			require.Equal(t, 2+len(foreign)+1, i)
		})
	})

	// once requires a single error, without a dead letter.
	once := func(t *testing.T, q *goxstreams.DeadLetterQueue, ctx context.Context, after string) error {
		t.Helper()
		var errs []error
		for d, err := range q.All(ctx, after) {
			require.Zero(t, d)
			errs = append(errs, err)
		}
		require.Len(t, errs, 1)
		require.Error(t, errs[0])
		return errs[0]
	}
	t.Run("the context ends", func(t *testing.T) {
		s := open(t, 3, 250)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		n := 0
		var last error
		for d, err := range s.q.All(ctx, "") {
			require.NoError(t, last, "it goes on after the error")
			if last = err; err != nil {
				require.Zero(t, d)
				continue
			}
			if n++; n == 150 {
				cancel()
			}
		}
		require.ErrorIs(t, last, context.Canceled)
		require.Less(t, n, 250)
		require.ErrorIs(t, once(t, s.q, ctx, ""), context.Canceled)
	})
	t.Run("after what is no ID", func(t *testing.T) {
		s := open(t, 3, 1)
		for _, after := range []string{"$", "-", "+", "(1-0", "x", "1-", "1-x", "1-0 ", "99999999999999999999"} {
			require.ErrorContains(t, once(t, s.q, t.Context(), after), fmt.Sprintf("%q", after))
		}
	})
	t.Run("WRONGTYPE", func(t *testing.T) {
		client, stream := newClient(t), topic(t)
		require.NoError(t, client.Set(t.Context(), stream, "a string", 0).Err())
		require.ErrorContains(t, once(t, queueOf(t, client, stream), t.Context(), ""), "WRONGTYPE")
	})
	t.Run("closed client", func(t *testing.T) {
		client := newClient(t)
		require.NoError(t, client.Close())
		require.ErrorIs(t, once(t, queueOf(t, client, "dead"), t.Context(), ""), redis.ErrClosed)
	})
}

// TestDeadLetterQueue_Many: very many dead letters are iterated with one page of
// them in memory.
func TestDeadLetterQueue_Many(t *testing.T) {
	testserver.RequireReal(t)
	n := 100_000
	if raceEnabled || testing.Short() {
		n = 50_000 // ten times as slow
	}
	client, topic := newClient(t), topic(t)
	stream := goxstreams.DeadLetterTopic(topic)
	t.Cleanup(func() { assert.NoError(t, newClient(t).Unlink(context.Background(), stream).Err()) })
	publishDying(t, client, topic, "p")
	multiply(t, client, stream, n-1)

	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	const most = 16 << 20 // 300 bytes of each are almost as much with the race detector, and four times as much without; All itself allocates more
	before := heap()
	got, last := 0, ""
	q := queueOf(t, client, stream)
	for d, err := range q.All(t.Context(), "") {
		require.NoError(t, err)
		if got++; got%(n/5) == 0 {
			require.Less(t, heap(), before+most, "after %d", got)
		}
		if d.ID == last || d.Message == nil || d.Topic != topic {
			require.FailNow(t, "not the next dead letter", "%+v after %s", d, last)
		}
		last = d.ID
	}
	require.Equal(t, n, got)
	count, err := q.Count(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, n, count)
}

// inbox records what a subscription received, in order.
type inbox struct {
	mu     sync.Mutex
	got    []string
	counts []int64
}

// fill settles messages by f, and records their payloads.
func (b *inbox) fill(messages <-chan *message.Message, f func(payload string) error) {
	for msg := range messages {
		d, _ := goxstreams.DeliveryFromContext(msg.Context())
		b.mu.Lock()
		b.got, b.counts = append(b.got, string(msg.Payload)), append(b.counts, d.Count)
		b.mu.Unlock()
		if f != nil && f(string(msg.Payload)) != nil {
			msg.Nack()
		} else {
			msg.Ack()
		}
	}
}

func (b *inbox) all() ([]string, []int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.got), slices.Clone(b.counts)
}

func (b *inbox) has(payload string) bool {
	got, _ := b.all()
	return slices.Contains(got, payload)
}

// readAll waits until the whole stream was delivered to the group, and nothing of
// it is pending.
func readAll(t testing.TB, client redis.UniversalClient, topic, group string) {
	t.Helper()
	entries := entriesOf(t, client, topic)
	eventually(t, func() bool {
		groups, err := client.XInfoGroups(context.Background(), topic).Result()
		require.NoError(t, err)
		i := slices.IndexFunc(groups, func(g redis.XInfoGroup) bool { return g.Name == group })
		return i >= 0 && groups[i].LastDeliveredID == entries[len(entries)-1].id && groups[i].Pending == 0
	}, "group %s has not read all", group)
}

// TestDeadLetterQueue_ReplayToGroup: a replay is for the group in which the message
// died; Subscribers of other groups, of any kind, never deliver it. ReplayToAll is
// for all groups.
func TestDeadLetterQueue_ReplayToGroup(t *testing.T) {
	t.Parallel()
	for _, toAll := range []bool{false, true} {
		t.Run(fmt.Sprintf("to all %t", toAll), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			const group = testGroup
			configs := map[string]goxstreams.SubscriberConfig{
				group:         {ConsumerGroup: group, Retry: &goxstreams.Retry{MaxRetries: 1, InitialInterval: time.Millisecond}},
				"other":       {ConsumerGroup: "other", Retry: quickRetry()},
				"many":        {ConsumerGroup: "many", MaxConcurrency: 8, BatchSize: 1},
				"no ack":      {ConsumerGroup: "no ack", NoAck: true},
				"fan-out":     {StartID: "0"},
				"prefix":      {ConsumerGroup: group + " of another"},
				"to be found": {ConsumerGroup: "to be found"},
			}
			// Readers of other libraries get all of it.
			createGroup(t, client, topic, "foreign")
			subs, boxes := map[string]*goxstreams.Subscriber{}, map[string]*inbox{}
			var alive atomic.Bool
			for name, config := range configs {
				config.Client = client
				subs[name], boxes[name] = newSubscriber(t, config), &inbox{}
				go boxes[name].fill(subscribe(t, subs[name], topic), func(payload string) error {
					if name == group && payload == "dies" && !alive.Load() {
						return errOther
					}
					return nil
				})
			}
			uuid := publish(t, client, topic, "dies")[0]
			for name := range configs {
				eventually(t, func() bool { return boxes[name].has("dies") }, name)
			}
			stream := goxstreams.DeadLetterTopic(topic)
			eventually(t, func() bool { return client.XLen(t.Context(), stream).Val() == 1 })
			letter := lettersIn(t, client, stream)[0]

			alive.Store(true)
			q := queueOf(t, client, stream)
			replay := q.Replay
			if toAll {
				replay = q.ReplayToAll
			}
			n, err := replay(t.Context(), letter.ID)
			require.NoError(t, err)
			require.Equal(t, 1, n)
			publish(t, client, topic, "sentinel")
			for name, config := range configs {
				eventually(t, func() bool { return boxes[name].has("sentinel") }, name)
				if config.ConsumerGroup != "" {
					readAll(t, client, topic, config.ConsumerGroup)
				}
				got, counts := boxes[name].all()
				want, wantCounts := []string{"dies", "sentinel"}, []int64{1, 1}
				if toAll {
					want, wantCounts = []string{"dies", "dies", "sentinel"}, []int64{1, 1, 1}
				}
				if name == group {
					want, wantCounts = []string{"dies", "dies", "dies", "sentinel"}, []int64{1, 2, 1, 1}
				}
				if name == "many" { // has no order
					require.ElementsMatch(t, want, got, name)
				} else {
					require.Equal(t, want, got, name)
				}
				require.Equal(t, wantCounts, counts, name)
				eventually(t, func() bool { return stats(t, subs[name]).InFlight == 0 })
				st := stats(t, subs[name])
				require.EqualValues(t, len(want), st.Delivered, name)
				require.Zero(t, st.Broken+st.Lost, name)
			}
			require.Empty(t, lettersIn(t, client, stream))
			entries := entriesOf(t, client, topic)
			require.Len(t, entries, 3)
			readAs(t, client, topic, "foreign", "foreign", 3)
			mark := "1 " + group
			if toAll {
				mark = "1 "
			}
			require.Equal(t, slices.Concat(entries[0].fields, []string{replayField, mark}), entries[1].fields)
			require.Equal(t, []string{uuid, uuid}, stored(t, client, topic)[:2])
		})
	}
}

// TestDeadLetterQueue_Replays: a replay starts over, with a count of 1 and all
// retries; the number of replays is counted.
func TestDeadLetterQueue_Replays(t *testing.T) {
	t.Parallel()
	const replays = 3
	for _, unmarshaler := range []goxstreams.Unmarshaler{goxstreams.DefaultMarshaler{}, goxstreams.BodyMarshaler{}, &spyUnmarshaler{}} {
		for _, toAll := range []bool{false, true} {
			t.Run(fmt.Sprintf("%T/to all %t", unmarshaler, toAll), func(t *testing.T) {
				t.Parallel()
				client, topic := newClient(t), topic(t)
				config := grouped(client)
				config.Unmarshaler = unmarshaler
				spy := &spyUnmarshaler{}
				if _, ok := unmarshaler.(*spyUnmarshaler); ok {
					config.Unmarshaler = spy
				}
				config.Retry = quickRetry()
				config.Retry.MaxRetries = 2
				told := make(chan goxstreams.DeadMessage, 1)
				config.OnDead = func(_ context.Context, d goxstreams.DeadMessage) { told <- d }
				sub := newSubscriber(t, config)
				box := &inbox{}
				var alive atomic.Bool
				go box.fill(subscribe(t, sub, topic), func(string) error {
					if alive.Load() {
						return nil
					}
					return errOther
				})
				fields := []string{"body", "payload", goxstreams.UUIDHeaderKey, "uuid", "payload", "payload", "other", "\x00\xff", "other", "again"}
				addRaw(t, client, topic, fields...)

				stream := goxstreams.DeadLetterTopic(topic)
				q := queueOf(t, client, stream)
				for i := range replays {
					var dead goxstreams.DeadMessage
					select {
					case dead = <-told:
					case <-time.After(patience):
						require.FailNow(t, "it does not die")
					}
					letters := lettersIn(t, client, stream)
					require.Len(t, letters, 1)
					for _, d := range []goxstreams.DeadMessage{dead, letters[0]} {
						assert.Equal(t, i, d.Replays)
						assert.Equal(t, fields, d.Fields)
						assert.EqualValues(t, 3, d.Deliveries)
						assert.NotContains(t, d.Message.Metadata, goxstreams.DeadReplaysKey)
					}
					msg, err := goxstreams.DefaultMarshaler{}.Unmarshal(client.XRange(t.Context(), stream, "-", "+").Val()[0].Values)
					require.NoError(t, err)
					replays, marked := msg.Metadata[goxstreams.DeadReplaysKey]
					assert.Equal(t, i > 0, marked)
					assert.True(t, !marked || replays == fmt.Sprint(i))
					entries := entriesOf(t, client, topic)
					require.Len(t, entries, i+1)
					assert.Equal(t, entries[i].id, dead.EntryID)

					alive.Store(i == 2)
					replay, group := q.Replay, testGroup
					if toAll {
						replay, group = q.ReplayToAll, ""
					}
					n, err := replay(t.Context(), letters[0].ID)
					require.NoError(t, err)
					require.Equal(t, 1, n)
					entries = entriesOf(t, client, topic)
					require.Len(t, entries, i+2)
					require.Equal(t, slices.Concat(fields, []string{replayField, fmt.Sprint(i+1, " ", group)}), entries[i+1].fields)
				}
				eventually(t, func() bool { return stats(t, sub).Acked == 1 })
				require.NoError(t, sub.Close())
				_, counts := box.all()
				require.Equal(t, []int64{1, 2, 3, 1, 2, 3, 1, 2, 3, 1}, counts)
				require.Empty(t, lettersIn(t, client, stream))
				require.Equal(t, config.Unmarshaler == goxstreams.Unmarshaler(spy), spy.calls.Load() > 0)
				require.False(t, spy.saw.Load(), "the Unmarshaler is shown the mark")
			})
		}
	}
}

// spyUnmarshaler checks whether it sees that an entry is a replay.
type spyUnmarshaler struct {
	goxstreams.DefaultMarshaler
	calls atomic.Int64
	saw   atomic.Bool
}

func (s *spyUnmarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	s.calls.Add(1)
	if _, ok := values[replayField]; ok {
		s.saw.Store(true)
	}
	return s.DefaultMarshaler.Unmarshal(values)
}

// TestDeadLetterQueue_ReplayBroken: a malformed entry is replayed byte for byte,
// even one with more fields than Lua can take.
func TestDeadLetterQueue_ReplayBroken(t *testing.T) {
	t.Parallel()
	many := make([]string, 0, 20_000)
	for i := range 10_000 {
		many = append(many, fmt.Sprint("name", i%100), fmt.Sprint("\x00", i))
	}
	for _, tt := range []struct {
		name   string
		fields []string
	}{
		{"duplicates, in their order", []string{"z", "1", "a", "2", "z", "3", "z", "1"}},
		{"binary", []string{"\x00\xff\r\n", "\xc1\x80", "", "", "$5\r\n", "*3\r\n"}},
		{"our own names", []string{"metadata", "\xc1", "payload", "p", "_goxstreams_fields", "f"}},
		{"the mark, but not at the end", []string{replayField, "7 " + testGroup, "a", "b"}},
		{"a mark that is none", []string{"a", "b", replayField, "none"}},
		{"3,949 fields", many[:2*3949]},
		{"3,950 fields", many[:2*3950]},
		{"10,000 fields", many},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if len(tt.fields) == 2*3949 {
				testserver.RequireReal(t) // another Lua has other limits
			}
			client, topic := newClient(t), topic(t)
			calls := make(chan goxstreams.BrokenMessage, 10)
			answers := make(chan error, 10)
			config := grouped(client)
			config.OnBroken = func(_ context.Context, b goxstreams.BrokenMessage) error {
				calls <- b
				return <-answers
			}
			sub := newSubscriber(t, config)
			subscribe(t, sub, topic)
			call := func() goxstreams.BrokenMessage {
				select {
				case b := <-calls:
					return b
				case <-time.After(patience):
					require.FailNow(t, "OnBroken is not called")
				}
				panic("unreachable")
			}
			addRaw(t, client, topic, tt.fields...)
			require.Equal(t, tt.fields, call().Fields)
			answers <- goxstreams.ErrDead
			eventually(t, func() bool { return stats(t, sub).Dead == 1 })
			stream := goxstreams.DeadLetterTopic(topic)
			letters := lettersIn(t, client, stream)
			require.Len(t, letters, 1)
			require.Nil(t, letters[0].Message)
			require.Equal(t, goxstreams.Broken, letters[0].Kind)
			require.Equal(t, tt.fields, letters[0].Fields)

			n, err := queueOf(t, client, stream).Replay(t.Context(), letters[0].ID)
			require.NoError(t, err)
			require.Equal(t, 1, n)
			b := call()
			require.Equal(t, tt.fields, b.Fields)
			require.Zero(t, b.RetryCount)
			answers <- nil
			eventuallySettled(t, client, topic, testGroup)
			require.NoError(t, sub.Close())
			require.Empty(t, entriesOf(t, client, stream))
			entries := entriesOf(t, client, topic)
			require.Len(t, entries, 2)
			require.Equal(t, tt.fields, entries[0].fields)
			require.Equal(t, slices.Concat(tt.fields, []string{replayField, "1 " + testGroup}), entries[1].fields)
		})
	}
}

// TestDeadLetterQueue_IDs: letters that exist are handled, the others are listed.
func TestDeadLetterQueue_IDs(t *testing.T) {
	t.Parallel()
	type method func(*goxstreams.DeadLetterQueue, context.Context, ...string) (int, error)
	methods := map[string]method{
		"Replay":      (*goxstreams.DeadLetterQueue).Replay,
		"ReplayToAll": (*goxstreams.DeadLetterQueue).ReplayToAll,
		"Delete":      (*goxstreams.DeadLetterQueue).Delete,
	}
	for name, do := range methods {
		t.Run(name, func(t *testing.T) {
			client := newClient(t)
			open := func(t *testing.T, n int) (q *goxstreams.DeadLetterQueue, stream string, ids []string, left func() (letters, replayed int)) {
				t.Parallel()
				topic := topic(t)
				stream = goxstreams.DeadLetterTopic(topic)
				ids = idsOf(lettersOf(t, client, topic, n))
				return queueOf(t, client, stream), stream, ids, func() (int, int) {
					return len(entriesOf(t, client, stream)), len(entriesOf(t, client, topic)) - 1
				}
			}
			// of returns how many of the deleted ones are in the topic.
			of := func(n int) int {
				if name == "Delete" {
					return 0
				}
				return n
			}

			t.Run("missing ones", func(t *testing.T) {
				q, stream, ids, left := open(t, 250)
				missing := []string{"1-0", strings.TrimSuffix(ids[0], "0") + "7777", "99999999999999-3"}
				asked := slices.Concat(missing[:1], ids[:120], missing[1:2], ids[120:240], missing[2:])
				before := slices.Clone(asked)
				n, err := do(q, t.Context(), asked...)
				requireNotFound(t, err, stream, missing...)
				require.Equal(t, 240, n)
				require.Equal(t, before, asked, "the caller's slice")
				letters, replayed := left()
				require.Equal(t, 10, letters)
				require.Equal(t, of(240), replayed)

				n, err = do(q, t.Context(), ids...) // most of them for the second time
				requireNotFound(t, err, stream, ids[:240]...)
				require.ErrorContains(t, err, ids[9])
				require.NotContains(t, err.Error(), ids[10])
				require.ErrorContains(t, err, "230 more")
				require.Equal(t, 10, n)
				letters, replayed = left()
				require.Zero(t, letters)
				require.Equal(t, of(250), replayed)
			})
			t.Run("twice in one call", func(t *testing.T) {
				q, _, ids, left := open(t, 102)
				same, _ := strings.CutSuffix(ids[0], "-0") // Redis treats it as the same ID, also with more zeros
				n, err := do(q, t.Context(), append([]string{ids[1], ids[0], same, "0" + ids[0], ids[1]}, ids...)...)
				require.NoError(t, err)
				require.Equal(t, 102, n)
				letters, replayed := left()
				require.Zero(t, letters)
				require.Equal(t, of(102), replayed)
			})
			t.Run("what is no ID", func(t *testing.T) {
				q, _, ids, left := open(t, 3)
				for _, id := range []string{"", "$", "-", "+", "*", "x", "(" + ids[0], "1-", "-1", "1-2-3", "1-0 ", "99999999999999999999-0"} {
					n, err := do(q, t.Context(), ids[0], ids[1], id)
					require.ErrorContains(t, err, fmt.Sprintf("%q", id))
					require.Zero(t, n)
					var missing *goxstreams.NotFoundError
					require.False(t, errors.As(err, &missing))
					letters, replayed := left()
					require.Equal(t, 3, letters)
					require.Zero(t, replayed)
				}
			})
			t.Run("the context has ended", func(t *testing.T) {
				q, _, ids, left := open(t, 2)
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				n, err := do(q, ctx, ids...)
				require.ErrorIs(t, err, context.Canceled)
				require.Zero(t, n)
				letters, replayed := left()
				require.Equal(t, 2, letters)
				require.Zero(t, replayed)
			})
			t.Run("two at once", func(t *testing.T) {
				q, stream, ids, left := open(t, 300)
				var done atomic.Int64
				var wg sync.WaitGroup
				for range 3 {
					wg.Go(func() {
						n, err := do(q, t.Context(), ids...)
						done.Add(int64(n))
						var missing *goxstreams.NotFoundError
						if n < len(ids) && assert.ErrorAs(t, err, &missing) {
							assert.Len(t, missing.IDs, len(ids)-n)
							assert.Equal(t, stream, missing.Topic)
						}
					})
				}
				wg.Wait()
				require.EqualValues(t, 300, done.Load())
				letters, replayed := left()
				require.Zero(t, letters)
				require.Equal(t, of(300), replayed)
			})
		})
	}
}

// TestDeadLetterQueue_CannotBeReplayed: such an entry stays, with an error that is
// not a NotFoundError; the rest of its page is replayed, and later pages are not.
func TestDeadLetterQueue_CannotBeReplayed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, client *redis.Client, topic string) (id string) // of what cannot be replayed
		want  string
		toAll bool // ReplayToAll does not help
	}{
		{"no dead letter", func(t *testing.T, client *redis.Client, topic string) string {
			return addRaw(t, client, goxstreams.DeadLetterTopic(topic), "no", "dead letter")
		}, "is not a dead letter", true},
		{"a broken dead letter", func(t *testing.T, client *redis.Client, topic string) string {
			return addRaw(t, client, goxstreams.DeadLetterTopic(topic), goxstreams.UUIDHeaderKey, "uuid", "metadata", "", "payload", "p", "_goxstreams_fields", "\xc1")
		}, "is a malformed dead letter", true},
		{"of a group that is gone", func(t *testing.T, client *redis.Client, topic string) string {
			config := grouped(client)
			config.ConsumerGroup = "gone"
			config.Retry = &goxstreams.Retry{MaxRetries: -1}
			sub := newSubscriber(t, config)
			handler, _ := failing(errOther)
			go settling(subscribe(t, sub, topic), handler)
			eventually(t, func() bool { return stats(t, sub).Dead == 1 })
			require.NoError(t, sub.Close())
			require.NoError(t, client.XGroupDestroy(t.Context(), topic, "gone").Err())
			letters := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
			return letters[len(letters)-1].ID
		}, `has no such group: "gone"`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			stream := goxstreams.DeadLetterTopic(topic)
			good := idsOf(lettersOf(t, client, topic, 150))
			bad := tt.spoil(t, client, topic)
			q := queueOf(t, client, stream)
			asked := slices.Concat(good[:50], []string{"1-0", bad}, good[50:])

			n, err := q.Replay(t.Context(), asked...)
			require.ErrorContains(t, err, tt.want)
			require.ErrorContains(t, err, bad)
			requireNotFound(t, err, stream, "1-0")
			require.Equal(t, 98, n)
			require.Len(t, entriesOf(t, client, topic), 1+98)
			require.Len(t, entriesOf(t, client, stream), 52+1)
			for range 2 { // the second attempt gives the same result
				n, err = q.Replay(t.Context(), bad)
				require.ErrorContains(t, err, tt.want)
				require.Zero(t, n)
				var missing *goxstreams.NotFoundError
				require.False(t, errors.As(err, &missing))
			}
			n, err = q.ReplayToAll(t.Context(), bad)
			if tt.toAll {
				require.ErrorContains(t, err, tt.want)
				require.Zero(t, n)
				require.Len(t, entriesOf(t, client, topic), 1+98)
				n, err = q.Delete(t.Context(), bad)
			} else {
				require.Len(t, entriesOf(t, client, topic), 1+98+1)
			}
			require.NoError(t, err)
			require.Equal(t, 1, n)
			require.Equal(t, good[98:], idsOf(lettersIn(t, client, stream)))
		})
	}
}

// TestDeadLetterQueue_RedisRefuses: the dead letter stays, and the error says why;
// its outcome is known.
func TestDeadLetterQueue_RedisRefuses(t *testing.T) {
	t.Parallel()
	refused := func(t *testing.T, admin, client redis.UniversalClient, stream string, toAll bool, code string) {
		t.Helper()
		before := entriesOf(t, admin, stream)
		q := queueOf(t, client, stream)
		replay := q.Replay
		if toAll {
			replay = q.ReplayToAll
		}
		n, err := replay(t.Context(), before[0].id)
		requireRefused(t, err, code)
		require.Zero(t, n)
		require.Equal(t, before, entriesOf(t, admin, stream))
	}
	for _, toAll := range []bool{false, true} {
		name := fmt.Sprintf("/to all %t", toAll)
		t.Run("WRONGTYPE"+name, func(t *testing.T) {
			testserver.RequireReal(t)
			client, topic := newClient(t), topic(t)
			stream := goxstreams.DeadLetterTopic(topic)
			publishDying(t, client, topic, "payload")
			require.NoError(t, client.Del(t.Context(), topic).Err())
			require.NoError(t, client.Set(t.Context(), topic, "a string", 0).Err())
			refused(t, client, client, stream, toAll, "WRONGTYPE")
			require.Equal(t, "a string", client.Get(t.Context(), topic).Val())
		})
		t.Run("OOM"+name, func(t *testing.T) {
			t.Parallel()
			client := testserver.Private(t).Client()
			topic := topic(t)
			stream := goxstreams.DeadLetterTopic(topic)
			publishDying(t, client, topic, "payload")
			require.NoError(t, client.ConfigSet(t.Context(), "maxmemory", "1").Err())
			refused(t, client, client, stream, toAll, "OOM")
			require.Len(t, entriesOf(t, client, topic), 1)
			require.NoError(t, client.ConfigSet(t.Context(), "maxmemory", "0").Err())
			n, err := queueOf(t, client, stream).Replay(t.Context(), entriesOf(t, client, stream)[0].id)
			require.NoError(t, err)
			require.Equal(t, 1, n)
			require.Len(t, entriesOf(t, client, topic), 2)
		})
	}
	t.Run("NOPERM", func(t *testing.T) {
		testserver.RequireReal(t)
		client, topic := newClient(t), topic(t)
		stream := goxstreams.DeadLetterTopic(topic)
		publishDying(t, client, topic, "payload")
		refused(t, client, aclUser(t, client, "-xadd"), stream, false, "")
		refused(t, client, aclUser(t, client, "-xrange"), stream, false, "NOPERM")
		for _, toAll := range []bool{false, true} {
			refused(t, client, aclUser(t, client, "-eval"), stream, toAll, "'eval'")
		}
		_, err := queueOf(t, aclUser(t, client, "-xdel"), stream).Delete(t.Context(), "1-1")
		requireRefused(t, err, "NOPERM")
		// The permission to look for the group is not needed.
		n, err := queueOf(t, aclUser(t, client, "-xinfo"), stream).Replay(t.Context(), entriesOf(t, client, stream)[0].id)
		require.NoError(t, err)
		require.Equal(t, 1, n)
	})
	t.Run("closed client", func(t *testing.T) {
		client := newClient(t)
		require.NoError(t, client.Close())
		q := queueOf(t, client, "dead")
		for _, do := range []func(context.Context, ...string) (int, error){q.Replay, q.ReplayToAll, q.Delete} {
			n, err := do(t.Context(), "1-1")
			require.ErrorIs(t, err, redis.ErrClosed)
			require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
			require.Zero(t, n)
		}
	})
}

// TestDeadLetterQueue_Cut: the connection breaks before and after each command of a
// replay or deletion in turn. Each message is then in one of the two streams, and
// another call finishes the work.
func TestDeadLetterQueue_Cut(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const letters = 3
	cut := func(t *testing.T, name string, at int, before bool) (commands string, hit bool) {
		topic, admin := topic(t), newClient(t)
		stream := goxstreams.DeadLetterTopic(topic)
		ids := idsOf(publishDying(t, admin, topic, "0", "1", "2"))
		s := &scissors{}
		client := s.client(t)
		do := func(client redis.UniversalClient) (int, error) {
			q := queueOf(t, client, stream)
			switch name {
			case "Replay":
				return q.Replay(t.Context(), ids...)
			case "ReplayToAll":
				return q.ReplayToAll(t.Context(), ids...)
			}
			return q.Delete(t.Context(), ids...)
		}
		// where returns in how many of the streams each message is.
		where := func() map[string]int {
			in := make(map[string]int)
			for _, l := range lettersIn(t, admin, stream) {
				in[string(l.Message.Payload)]++
			}
			for _, e := range entriesOf(t, admin, topic)[letters:] {
				in[e.fields[5]]++
			}
			return in
		}
		s.arm(at, before, func() bool { return true })
		n, err := do(client)
		commands, hit = s.disarm()
		switch {
		case err == nil:
			require.Equal(t, letters, n)
		case errors.Is(err, goxstreams.ErrOutcomeUnknown):
			require.Less(t, n, letters)
		default:
			require.FailNow(t, "neither done nor unknown", "%v after: %s", err, commands)
		}
		each := map[string]int{"0": 1, "1": 1, "2": 1}
		in := where()
		switch {
		case name == "Delete":
			require.LessOrEqual(t, len(in), letters-n)
		default:
			require.Equal(t, each, in, "after: %s", commands)
		}

		again, err := do(admin)
		var missing *goxstreams.NotFoundError
		require.True(t, err == nil || errors.As(err, &missing), err)
		require.LessOrEqual(t, n+again, letters)
		require.Zero(t, admin.XLen(t.Context(), stream).Val())
		in = where()
		switch {
		case name == "Delete":
			require.Empty(t, in)
		default:
			require.Equal(t, each, in)
		}
		return commands, hit
	}
	for _, name := range []string{"Replay", "ReplayToAll", "Delete"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const most = 30
			at := 1
			for ; at < most; at++ {
				var hits [2]bool
				for i, before := range []bool{true, false} {
					var commands string
					commands, hits[i] = cut(t, name, at, before)
					t.Logf("cut at command %d, before it=%t: %s", at, before, commands)
				}
				if !hits[0] && !hits[1] {
					break
				}
			}
			require.Greater(t, at, 1)
			require.Less(t, at, most, "there is no end")
		})
	}
}

// TestDeadLetterQueue_Resent: pipelines that a client sends twice replay once.
func TestDeadLetterQueue_Resent(t *testing.T) {
	t.Parallel()
	topic, admin := topic(t), newClient(t)
	ids := idsOf(publishDying(t, admin, topic, "0", "1", "2"))
	var resent []string
	client := newClient(t, &hook{pipeline: func(_ context.Context, cmds []redis.Cmder, next func() error) error {
		if name := cmds[0].Name(); name != "hello" && name != "client" {
			resent = append(resent, name)
			_ = next()
		}
		return next()
	}})
	stream := goxstreams.DeadLetterTopic(topic)
	n, err := queueOf(t, client, stream).Replay(t.Context(), ids...)
	requireNotFound(t, err, stream, ids...) // the second one's error
	require.Zero(t, n)
	require.Equal(t, []string{"xrange", "eval"}, resent)
	require.Empty(t, entriesOf(t, admin, stream))
	require.Len(t, entriesOf(t, admin, topic), 6)
}

// TestDeadLetterQueue_DeleteAcked: dead messages leave the stream like acked ones,
// and so does a replay when the groups have acked it, including those that it is
// not for.
func TestDeadLetterQueue_DeleteAcked(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	if !hasCommand(t, client, "xackdel") {
		t.Skip("the server has no XACKDEL, so that several groups cannot delete")
	}
	open := func(group string) (*goxstreams.Subscriber, *inbox, *atomic.Bool) {
		config := grouped(client)
		config.ConsumerGroup, config.DeleteAcked = group, true
		config.Retry = &goxstreams.Retry{MaxRetries: -1}
		sub, box, alive := newSubscriber(t, config), &inbox{}, &atomic.Bool{}
		go box.fill(subscribe(t, sub, topic), func(string) error {
			if alive.Load() || group != testGroup {
				return nil
			}
			return errOther
		})
		return sub, box, alive
	}
	sub, box, alive := open(testGroup)
	other, otherBox, _ := open("other")
	publish(t, client, topic, "payload")
	eventually(t, func() bool { return stats(t, sub).Dead == 1 && stats(t, other).Acked == 1 })
	eventuallySettled(t, client, topic, testGroup)
	eventuallySettled(t, client, topic, "other")
	alive.Store(true)
	letters := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
	require.Len(t, letters, 1)
	require.Zero(t, client.XLen(t.Context(), topic).Val())
	n, err := queueOf(t, client, goxstreams.DeadLetterTopic(topic)).Replay(t.Context(), letters[0].ID)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	eventually(t, func() bool { return stats(t, sub).Acked == 1 })
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() == 0 }, "the replay stays in the stream")
	require.EqualValues(t, 1, stats(t, other).Delivered)
	got, _ := box.all()
	require.Equal(t, []string{"payload", "payload"}, got)
	got, _ = otherBox.all()
	require.Equal(t, []string{"payload"}, got)
}

// TestDeadLetterQueue_Cluster: both streams are in one slot, whichever master has
// it, and also while it moves.
func TestDeadLetterQueue_Cluster(t *testing.T) {
	t.Parallel()
	cluster := testserver.Cluster(t)
	client := cluster.Client()
	for _, key := range []string{"a", "b", "c"} { // one of each master's
		t.Run(key, func(t *testing.T) {
			topic := fmt.Sprintf("{%s}%s", key, topic(t))
			if key == "b" {
				topic = strings.NewReplacer("{", "", "}", "").Replace(topic) // without a tag
			}
			stream := goxstreams.DeadLetterTopic(topic)
			q := queueOf(t, client, stream)
			letters := publishDying(t, client, topic, "0", "1", "2", "3")
			slices.SortFunc(letters, func(a, b goxstreams.DeadMessage) int {
				return strings.Compare(string(a.Message.Payload), string(b.Message.Payload))
			})
			ids := idsOf(letters)
			require.Empty(t, pendingOf(t, client, topic, testGroup))
			n, err := q.Replay(t.Context(), ids[0], "1-0", ids[1])
			requireNotFound(t, err, stream, "1-0")
			require.Equal(t, 2, n)
			n, err = q.ReplayToAll(t.Context(), ids[2])
			require.NoError(t, err)
			require.Equal(t, 1, n)
			n, err = q.Delete(t.Context(), ids[2], ids[3])
			requireNotFound(t, err, stream, ids[2])
			require.Equal(t, 1, n)
			require.Empty(t, entriesOf(t, client, stream))
			require.Len(t, entriesOf(t, client, topic), 4+3)

			config := grouped(client)
			sub, box := newSubscriber(t, config), &inbox{}
			go box.fill(subscribe(t, sub, topic), nil)
			eventually(t, func() bool { return stats(t, sub).Acked == 3 })
			require.NoError(t, sub.Close())
			got, counts := box.all()
			require.ElementsMatch(t, []string{"0", "1", "2"}, got)
			require.Equal(t, []int64{1, 1, 1}, counts)
		})
	}
	t.Run("while the slot moves", func(t *testing.T) {
		topic := topicOfOwnSlot(t, client)
		stream := goxstreams.DeadLetterTopic(topic)
		// Each with its own client, so that nothing else refreshes the slots.
		q := queueOf(t, cluster.Client(), stream)
		config := grouped(cluster.Client())
		config.ClaimMinIdle = 10 * time.Minute // nor renewals
		config.MaxConcurrency = 2              // one is offered while another dies
		config.Retry = quickRetry()
		config.Retry.MaxRetries = -1
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		require.NoError(t, newPublisher(t, client).Publish(topic, messagesOf("0", "1", "2")...))
		next(t, messages).Nack()
		eventually(t, func() bool { return stats(t, sub).Dead == 1 })
		second := next(t, messages)
		ids := idsOf(lettersIn(t, client, stream))
		var replayed int
		var halfway error
		cluster.MoveSlot(topic, func() {
			second.Nack()
			replayed, halfway = q.Replay(t.Context(), ids[0])
		})
		require.Equal(t, halfway == nil, replayed == 1)
		eventually(t, func() bool { return stats(t, sub).Dead == 2 })
		if halfway != nil { // the second call succeeds
			eventually(t, func() bool { replayed, err := q.Replay(t.Context(), ids[0]); return err == nil && replayed == 1 }, halfway)
		}
		next(t, messages).Nack()
		eventually(t, func() bool { return stats(t, sub).Dead == 3 })
		next(t, messages).Ack()
		require.NoError(t, sub.Close())
		client := cluster.Client()
		require.Len(t, lettersIn(t, client, stream), 2)
		require.Len(t, entriesOf(t, client, topic), 4)
		require.Empty(t, pendingOf(t, client, topic, testGroup))
	})
	t.Run("a Topic in another slot", func(t *testing.T) {
		topic, log := topic(t), newLogRecorder()
		config := grouped(client)
		config.Retry = &goxstreams.Retry{MaxRetries: -1}
		sub := newSubscriberLog(t, config, log)
		handler, _ := failing(always(errOther)...)
		there := map[string]string{"0": "{other}dead", "1": "dead{" + topic + "}"}
		var n atomic.Int64
		chain := goxstreams.DeadLetter{Topic: func(string) string { return there[fmt.Sprint(n.Add(1)-1)] }}.Middleware(handler)
		go settling(subscribe(t, sub, topic), chain)
		require.NoError(t, newPublisher(t, client).Publish(topic, messagesOf("0", "1")...))
		eventually(t, func() bool { return stats(t, sub).Dead == 2 })
		require.NoError(t, sub.Close())
		require.Contains(t, strings.Join(log.Errors(), "\n"), "DeadLetter.Topic is in another slot")
		letters := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
		require.Len(t, letters, 1)
		require.Equal(t, "0", string(letters[0].Message.Payload))
		require.Len(t, lettersIn(t, client, there["1"]), 1)
		require.Empty(t, pendingOf(t, client, topic, testGroup))
	})
}

// With a context that had already ended, a DeadLetterQueue still sent its commands,
// and could not report the outcome.
func TestQueueOfAnEndedContext(t *testing.T) {
	t.Parallel()
	counter, counts := countCommands()
	client, topic := newClient(t), topic(t)
	letter := publishDying(t, client, topic, "x")[0]
	q := queueOf(t, newClient(t, counter), goxstreams.DeadLetterTopic(topic))
	ended, end := context.WithCancel(t.Context())
	end()
	for _, do := range []func(context.Context, ...string) (int, error){q.Delete, q.Replay, q.ReplayToAll} {
		n, err := do(ended, letter.ID)
		require.ErrorIs(t, err, context.Canceled)
		require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		require.Zero(t, n)
	}
	require.Empty(t, counts.n)
	require.Len(t, deadOf(t, client, topic), 1)
}

// TestReadDeadLetter: an entry that was kept elsewhere is the letter that the queue shows.
func TestReadDeadLetter(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	stream := goxstreams.DeadLetterTopic(topic)
	letters := publishDying(t, client, topic, "payload", "\xff\x00")
	entries := entriesOf(t, client, stream)
	for i, e := range entries {
		d, err := goxstreams.ReadDeadLetter(e.id, e.fields)
		require.NoError(t, err)
		require.Equal(t, letters[i].Message.Payload, d.Message.Payload)
		d.Message, letters[i].Message = nil, nil // each has channels of its own
		require.Equal(t, letters[i], d)
	}
	for want, fields := range map[string][]string{
		"goxstreams: entry 1-1 has 1 names and values, an odd number":            {"a"},
		"goxstreams: entry 1-1 is not a dead letter of this library":             {"a", "b"},
		"goxstreams: entry 1-1 is a malformed dead letter: ":                     append(slices.Clone(entries[0].fields[:7]), "?"),
		"goxstreams: entry 1-1 has 9 names and values, an odd number":            append(slices.Clone(entries[0].fields), "?"),
		"goxstreams: entry 1-1 is not a dead letter of this library ":            nil,
		"goxstreams: entry 1-1 is a malformed dead letter: field \"metadata\": ": append([]string{"a", "b", "metadata", "?"}, append([]string{goxstreams.UUIDHeaderKey, "u"}, entries[0].fields[6:]...)...),
	} {
		d, err := goxstreams.ReadDeadLetter("1-1", fields)
		require.ErrorContains(t, err, strings.TrimSpace(want))
		require.Equal(t, goxstreams.DeadMessage{ID: "1-1", Fields: fields}, d)
	}
}
