package goxstreams_test

import (
	"bytes"
	"context"
	"encoding/json"
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
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 4: a malformed entry stops nothing.

// proto-max-bulk-len limits one value of a command, not an entry. An entry of
// several values, each below the limit and together above it, could be published
// but not moved: the dead letter packed all of them into one value, so the server
// rejected it as a protocol error and closed the connection for all of its users.
// This was retried every 30 seconds, forever.
//
// Now everything that could be stored can be dead-lettered, and is restored
// exactly. Other users of the Subscriber's connections notice nothing.
func TestFault36_LargeEntryIsDeadLettered(t *testing.T) {
	t.Parallel()
	server := testserver.Private(t, "--proto-max-bulk-len", "1mb")
	const limit = 1 << 20
	noise := func(n int) string { // every byte, including line ends and invalid UTF-8
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i*7 + i>>8)
		}
		return string(b)
	}
	malformed := func(fields ...string) func(*testing.T, *redis.Client, string) {
		return func(t *testing.T, client *redis.Client, topic string) { addRaw(t, client, topic, fields...) }
	}
	good := func(payload, metadata int) func(*testing.T, *redis.Client, string) {
		return func(t *testing.T, client *redis.Client, topic string) {
			msg := message.NewMessage("good", message.Payload(noise(payload)))
			msg.Metadata.Set("key", strings.Repeat("m", metadata))
			require.NoError(t, newPublisher(t, client).Publish(topic, msg))
		}
	}
	var many []string
	for i := range 5000 {
		many = append(many, fmt.Sprint("field", i), strings.Repeat("x", 300))
	}
	for _, tt := range []struct {
		name string
		add  func(t *testing.T, client *redis.Client, topic string)
		kind goxstreams.DeadKind
	}{
		{"TwoFields", malformed("a", strings.Repeat("a", 600_000), "b", strings.Repeat("b", 600_000)), goxstreams.Broken},
		{"ThreeFields", malformed("a", strings.Repeat("a", 700_000), "b", strings.Repeat("b", 700_000), "c", strings.Repeat("c", 700_000)), goxstreams.Broken},
		{"Binary", malformed("\xff\x00\r\n", noise(600_000), "", noise(600_000)), goxstreams.Broken},
		{"DuplicateNames", malformed("a", strings.Repeat("1", 600_000), "a", strings.Repeat("2", 600_000), "a", "3"), goxstreams.Broken},
		{"ManyFields", malformed(many...), goxstreams.Broken},
		{"ValueAtTheLimit", malformed("a", strings.Repeat("a", limit)), goxstreams.Broken},
		{"NameAtTheLimit", malformed(strings.Repeat("a", limit), "a"), goxstreams.Broken},
		{"GoodMessage", good(600_000, 600_000), goxstreams.Exhausted},
		{"GoodMessagePayloadAtTheLimit", good(limit, 1), goxstreams.Exhausted},
		// The dead letter's own metadata is added to it.
		{"GoodMessageMetadataAtTheLimit", good(1, limit-100), goxstreams.Exhausted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client, topic, log := server.Client(), topic(t), newLogRecorder()
			createGroup(t, client, topic, testGroup)
			tt.add(t, client, topic)
			before := entriesOf(t, client, topic)
			require.Len(t, before, 1)

			config := grouped(client)
			config.Retry = &goxstreams.Retry{MaxRetries: -1}
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			if tt.kind == goxstreams.Exhausted {
				next(t, messages).Nack()
			}
			letter := eventuallyDies(t, client, topic)
			assert.Equal(t, tt.kind, letter.Kind)
			assert.Equal(t, before[0].id, letter.EntryID)
			// Not assert.Equal, which would print megabytes.
			assert.True(t, slices.Equal(before[0].fields, letter.Fields), "the fields are others")
			if tt.kind == goxstreams.Exhausted {
				require.NotNil(t, letter.Message)
				published, err := goxstreams.DefaultMarshaler{}.Unmarshal(valuesOf(before[0]))
				require.NoError(t, err)
				assert.True(t, bytes.Equal(published.Payload, letter.Message.Payload), "the payload is another")
				assert.True(t, published.Metadata.Get("key") == letter.Message.Metadata.Get("key"), "the metadata is another")
			}
			eventually(t, func() bool { return stats(t, sub).Dead == 1 })
			assert.NoError(t, stats(t, sub).Err)
			publish(t, client, topic, "next")
			require.Equal(t, []string{"next"}, payloads(collect(messages, 1, patience)))
			eventuallySettled(t, client, topic, testGroup)
			require.NoError(t, sub.Close())
			for _, line := range log.Errors() { // for example, of a broken connection
				assert.True(t, strings.HasPrefix(line, "Malformed entry"), "%.300s", line)
			}

			n, err := queueOf(t, client, goxstreams.DeadLetterTopic(topic)).Replay(t.Context(), letter.ID)
			require.NoError(t, err)
			require.Equal(t, 1, n)
			require.Zero(t, client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val())
			after := entriesOf(t, client, topic)
			require.Len(t, after, 3)
			replayed := after[2].fields
			require.Len(t, replayed, len(before[0].fields)+2)
			assert.Equal(t, []string{"_goxstreams_replay", "1 " + testGroup}, replayed[len(replayed)-2:])
			assert.True(t, slices.Equal(before[0].fields, replayed[:len(replayed)-2]), "what is replayed is not what died")
			client.Del(t.Context(), topic)
		})
	}
}

// valuesOf returns a raw entry's fields as an Unmarshaler gets them.
func valuesOf(e rawEntry) map[string]any {
	values := make(map[string]any)
	for i := 0; i+1 < len(e.fields); i += 2 {
		values[e.fields[i]] = e.fields[i+1]
	}
	return values
}

// exitingMarshaler calls runtime.Goexit in its first calls.
type exitingMarshaler struct {
	goxstreams.DefaultMarshaler
	left *atomic.Int32
}

func (m exitingMarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	if values["payload"] == "exits" && m.left.Add(-1) >= 0 {
		runtime.Goexit()
	}
	return m.DefaultMarshaler.Unmarshal(values)
}

// A user's function that called runtime.Goexit, as t.FailNow does, stopped the
// topic for good: its slot was gone.
func TestUserCodeEndsItsGoroutine(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, concurrency := range []int{1, 2} {
		t.Run(fmt.Sprint("MaxConcurrency", concurrency), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			left := new(atomic.Int32)
			left.Store(3)
			config := claiming(client)
			config.MaxConcurrency, config.Unmarshaler = concurrency, exitingMarshaler{left: left}
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "exits", "other", "another")
			seen := handledBy(t, messages, func(seen map[string]int) bool { return len(seen) == 3 })
			require.Equal(t, map[string]int{"exits": 1, "other": 1, "another": 1}, seen)
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// OnBroken took a second and failed. With one slot, and sixty malformed entries
// first, good messages were never delivered: the slot waited for each call, and the
// retries were always due before everything else.
func TestFault29_MalformedEntriesFirst(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for name, onBroken := range map[string]func(context.Context, goxstreams.BrokenMessage) error{
		"Slow": func(ctx context.Context, _ goxstreams.BrokenMessage) error {
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			return errFails
		},
		"Hangs": func(ctx context.Context, _ goxstreams.BrokenMessage) error {
			<-ctx.Done()
			return ctx.Err()
		},
		"Fails": func(context.Context, goxstreams.BrokenMessage) error { return errFails },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const broken, good = 60, 100
			client, topic := newClient(t), topic(t)
			for range broken {
				addRaw(t, client, topic, "no", "message")
			}
			publishN(t, client, topic, good)
			config := grouped(client)
			config.OnBroken, config.CloseTimeout = onBroken, 2*time.Second
			sub := newSubscriber(t, config)
			began := time.Now()
			messages := subscribe(t, sub, topic)
			require.Len(t, collect(messages, good, patience), good)
			require.Less(t, time.Since(began), 5*time.Second)
			require.NoError(t, sub.Close())
			require.Len(t, pendingOf(t, client, topic, testGroup), broken, "they come again")
		})
	}
}

// OnBroken panics, then returns an error, then succeeds: it is called again each
// time, and the next message waits for none of that.
func TestFault22_PanicInOnBroken(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	var calls atomic.Int64
	config := grouped(client)
	config.Unmarshaler, config.Retry = panicking{}, quickRetry()
	config.OnBroken = func(_ context.Context, b goxstreams.BrokenMessage) error {
		switch n := calls.Add(1); {
		case b.RetryCount != n-1 || !errors.Is(b.Err, goxstreams.ErrBroken):
			t.Errorf("call %d is told of %d retries and %v", n, b.RetryCount, b.Err)
			return nil
		case n == 1:
			panic("OnBroken")
		case n == 2:
			return errors.New("not now")
		}
		return nil
	}
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "broken", "good")
	require.Equal(t, []string{"good"}, payloads(collect(messages, 1, patience)))
	eventuallySettled(t, client, topic, testGroup)
	require.EqualValues(t, 3, calls.Load())
	require.Contains(t, strings.Join(log.Errors(), "\n"), "panic: OnBroken")
}

// In goxstreams a batch skips events that it cannot convert, stores the rest, and
// returns no error: the producer believes them stored. Here such an event fails the
// call, the error names it, and nothing is stored.
func TestFault23_ABatchSkipsWhatItCannotConvert(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	events := make([]any, 1000)
	for i := range events {
		events[i] = i
	}
	events[637] = make(chan int) // it has no JSON representation
	producer := goxstreams.NewProducer[any](newPublisher(t, client), goxstreams.ProducerConfig{})
	err := producer.ProduceBatch(t.Context(), events, topic)
	require.ErrorContains(t, err, "events[637]")
	require.ErrorContains(t, err, topic)
	var unsupported *json.UnsupportedTypeError
	require.ErrorAs(t, err, &unsupported, "the Codec's own error")
	require.Zero(t, client.Exists(t.Context(), topic).Val(), "something was stored")
	require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)

	err = producer.Produce(t.Context(), events[637], topic)
	require.ErrorContains(t, err, "events[0]")
	require.Zero(t, client.Exists(t.Context(), topic).Val())

	// The same with a Codec, which may reject an event because of its contents.
	refusing := goxstreams.NewProducer[int](newPublisher(t, client), goxstreams.ProducerConfig{Codec: evenCodec{}})
	err = refusing.ProduceBatch(t.Context(), []int{0, 2, 4, 5}, topic)
	require.ErrorContains(t, err, "events[3]")
	require.ErrorIs(t, err, errOdd)
	require.Zero(t, client.Exists(t.Context(), topic).Val())
	require.NoError(t, refusing.ProduceBatch(t.Context(), []int{0, 2, 4}, topic))
	require.EqualValues(t, 3, client.XLen(t.Context(), topic).Val())
}

type evenCodec struct{}

func (evenCodec) Encode(event any) ([]byte, error) {
	if event.(int)%2 != 0 {
		return nil, errOdd
	}
	return json.Marshal(event)
}

func (evenCodec) Decode(payload []byte, event any) error { return json.Unmarshal(payload, event) }

// watermill-redisstream: one malformed entry ends the subscription. Its channel
// closes, while its reader continues to take entries that nobody gets; the entry
// stays pending, and the next subscriber fails when it claims it.
//
// Here a malformed entry is moved, at the first delivery or after a claim, and the
// next entry follows.
func TestFault01_BrokenEntryStopsNothing(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	addBroken := func() {
		// Its metadata is not MessagePack.
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{
			goxstreams.UUIDHeaderKey, "broken", "metadata", "\xc1", "payload", "x",
		}}).Err())
	}
	dead := func() int64 { return client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val() }

	// An entry left by a process that died.
	createGroup(t, client, topic, testGroup)
	addBroken()
	readAs(t, client, topic, testGroup, "died", 1)

	config := grouped(client)
	config.ClaimMinIdle = 300 * time.Millisecond
	messages := subscribe(t, newSubscriber(t, config), topic)
	eventually(t, func() bool { return dead() == 1 }, "the pending entry is not moved")

	publish(t, client, topic, "before")
	addBroken()
	addBroken()
	publish(t, client, topic, "after")
	require.Equal(t, []string{"before", "after"}, payloads(collect(messages, 2, patience)))
	eventuallySettled(t, client, topic, testGroup)
	require.EqualValues(t, 3, dead())

	// The subscription that met them is alive, and so is the next one.
	publish(t, client, topic, "alive")
	require.Equal(t, []string{"alive"}, payloads(collect(messages, 1, patience)))
}

// TestBroken: a malformed entry stops nothing.
func TestBroken(t *testing.T) {
	t.Parallel()
	fields := []string{"z", "1", "broken", "\x00\xff\r\n", "a", "", "z", "2", "", "empty name", "z", "1"}
	body := func(s string) []string { return []string{"body", `"` + s + `"`} }
	open := func(t *testing.T, onBroken func(context.Context, goxstreams.BrokenMessage) error) (*redis.Client, string, *goxstreams.Subscriber, <-chan *message.Message) {
		t.Parallel()
		topic, client := topic(t), newClient(t)
		config := grouped(client)
		config.Unmarshaler = picky{}
		config.Retry = quickRetry()
		config.OnBroken = onBroken
		sub := newSubscriber(t, config)
		return client, topic, sub, subscribe(t, sub, topic)
	}
	follows := func(t *testing.T, client *redis.Client, topic string, messages <-chan *message.Message) {
		t.Helper()
		addRaw(t, client, topic, body("next")...)
		msg := next(t, messages)
		assert.Equal(t, `"next"`, string(msg.Payload))
		msg.Ack()
	}

	t.Run("Moved", func(t *testing.T) {
		client, topic, sub, messages := open(t, nil)
		id := addRaw(t, client, topic, fields...)
		follows(t, client, topic, messages)
		eventuallySettled(t, client, topic, testGroup)
		letters := deadLetters(t, client, topic)
		require.Len(t, letters, 1)

		// A Subscriber reads it, whatever its format is.
		config := grouped(client)
		config.Unmarshaler = goxstreams.BodyMarshaler{}
		letter := next(t, subscribe(t, newSubscriber(t, config), goxstreams.DeadLetterTopic(topic)))
		letter.Ack()
		assert.True(t, letters[0].Equals(letter))
		restored, err := goxstreams.UnpackFields(letter.Payload)
		require.NoError(t, err)
		assert.Equal(t, fields, restored)
		assert.Equal(t, id, letter.UUID)
		assert.Contains(t, letter.Metadata.Get(middleware.ReasonForPoisonedKey), "this is broken")
		assert.Equal(t, topic, letter.Metadata.Get(middleware.PoisonedTopicKey))
		assert.Equal(t, id, letter.Metadata.Get(goxstreams.DeadEntryIDKey))
		assert.Equal(t, testGroup, letter.Metadata.Get(goxstreams.DeadGroupKey))
		assert.Equal(t, "broken", letter.Metadata.Get(goxstreams.DeadKindKey))
		assert.Equal(t, "1", letter.Metadata.Get(goxstreams.DeadDeliveriesKey))
		eventually(t, func() bool { s := stats(t, sub); return s.Broken == 1 && s.Dead == 1 })
	})
	t.Run("Handled", func(t *testing.T) {
		calls := make(chan goxstreams.BrokenMessage, 10)
		client, topic, sub, messages := open(t, func(ctx context.Context, b goxstreams.BrokenMessage) error {
			calls <- b
			return ctx.Err()
		})
		id := addRaw(t, client, topic, fields...)
		follows(t, client, topic, messages)
		eventuallySettled(t, client, topic, testGroup)
		require.NoError(t, sub.Close())
		require.Len(t, calls, 1)
		b := <-calls
		assert.ErrorIs(t, b.Err, goxstreams.ErrBroken)
		assert.ErrorContains(t, b.Err, "this is broken")
		b.Err = nil
		assert.Equal(t, goxstreams.BrokenMessage{Topic: topic, ID: id, Fields: fields}, b)
		assert.Empty(t, deadLetters(t, client, topic))
	})
	for _, how := range []string{"Error", "Panic"} {
		t.Run(how, func(t *testing.T) {
			calls := make(chan int64, 10)
			client, topic, _, messages := open(t, func(_ context.Context, b goxstreams.BrokenMessage) error {
				calls <- b.RetryCount
				switch {
				case b.RetryCount == 3:
					return nil
				case how == "Panic":
					panic("test")
				}
				return errors.New("test")
			})
			addRaw(t, client, topic, fields...)
			follows(t, client, topic, messages)
			for n := range int64(4) {
				select {
				case got := <-calls:
					assert.Equal(t, n, got)
				case <-time.After(patience):
					require.FailNow(t, "it does not come again")
				}
			}
			follows(t, client, topic, messages)
			eventuallySettled(t, client, topic, testGroup)
			assert.Empty(t, deadLetters(t, client, topic))
		})
	}
	t.Run("Hangs", func(t *testing.T) {
		hangs, goOn := make(chan struct{}), make(chan struct{})
		client, topic, _, messages := open(t, func(context.Context, goxstreams.BrokenMessage) error {
			close(hangs)
			<-goOn
			return nil
		})
		addRaw(t, client, topic, fields...)
		select {
		case <-hangs:
		case <-time.After(patience):
			require.FailNow(t, "OnBroken is not called")
		}
		follows(t, client, topic, messages)
		follows(t, client, topic, messages)
		eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == 1 }, "only the broken one is pending")
		close(goOn)
		eventuallySettled(t, client, topic, testGroup)
	})
}

// A worker that called runtime.Goexit, as t.FailNow does, kept its slot for good:
// with MaxConcurrency 1 the topic stopped.
func TestGoexit(t *testing.T) {
	t.Parallel()
	type msg = goxstreams.Message[order]
	for name, tt := range map[string]struct {
		worker *testWorker[order]
		counts [3]int
	}{
		"Process":       {&testWorker[order]{onProcess: goexits[msg](nil)}, [3]int{3, 0, 0}},
		"ProcessDead":   {&testWorker[order]{onProcess: fails[msg](goxstreams.Permanent(errBad)), onDead: goexits[msg](nil)}, [3]int{2, 0, 2}},
		"ProcessBroken": {&testWorker[order]{onBroken: goexits[goxstreams.BrokenMessage](nil)}, [3]int{2, 2, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			if name == "ProcessBroken" {
				require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"no", "message"}}).Err())
			}
			produce(t, client, topic, order{"cup", 1}, order{"cup", 2})
			start(t, tt.worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 3), Topic: topic})
			eventually(t, func() bool { return tt.worker.counts() == tt.counts }, "not all are handled")
			eventuallyDone(t, client, topic)
			require.Empty(t, deadOf(t, client, topic))
		})
	}
}

// goexits calls runtime.Goexit the first time, and then returns err.
func goexits[T any](err error) func(context.Context, T) error {
	var once sync.Once
	return func(context.Context, T) error {
		once.Do(runtime.Goexit)
		return err
	}
}
