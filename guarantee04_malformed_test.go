package goxstreams_test

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
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

// Guarantee 4: a malformed entry stops nothing.

// proto-max-bulk-len bounds one value of a command, not an entry. An entry of
// several values that are each below the limit, and together above it, could be
// published, but not moved: the dead letter packed all of them into one value,
// so the server refused it as a protocol error and closed the connection, with
// whatever shared it. That was tried again every 30 seconds, for ever.
//
// Here whatever could be stored can be dead-lettered, and comes back exactly as it
// was. What else uses the Subscriber's connections notices nothing.
func TestFault36_LargeEntryIsDeadLettered(t *testing.T) {
	t.Parallel()
	server := testserver.Private(t, "--proto-max-bulk-len", "1mb")
	const limit = 1 << 20
	noise := func(n int) string { // every byte, line ends and invalid UTF-8 included
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
		// The dead letter's own metadata comes on top.
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
			for _, line := range log.Errors() { // of a broken connection, say
				assert.True(t, strings.HasPrefix(line, "Broken entry"), "%.300s", line)
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

// exitingMarshaler ends the goroutine that it is called in, the first times.
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

// A function of the user's that ends its goroutine, as t.FailNow does, stopped the
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

// OnBroken took a second and failed. With one slot, and sixty malformed entries before
// them, good messages never came: the slot waited for each call, and the retries of these
// were due before all others.
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
