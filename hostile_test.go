package goxstreams_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Possible outcomes of a forged entry.
const (
	handled = "handled" // it is a message
	broken  = "broken"  // moved to the dead-letter stream, byte for byte
	unseen  = "unseen"  // acked, as for another group
	stuck   = "stuck"   // it stays pending: it claims to be a dead letter
)

// A hostile entry.
type hostile struct {
	name   string
	fields []string
	fate   string
}

// hostiles are entries that a user with permission for XADD may write.
func hostiles() []hostile {
	const uuid = goxstreams.UUIDHeaderKey
	deep := strings.Repeat("\x91", 100_000)
	with := func(metadata string) []string { return []string{uuid, "1", "metadata", metadata, "payload", "p"} }
	var many []string
	for i := range 50_000 {
		many = append(many, fmt.Sprint("f", i), "")
	}
	letter := func(metadata, packed string) []string { return append(with(metadata), "_goxstreams_fields", packed) }
	all := []hostile{
		{"no field of ours", []string{"a", "b"}, broken},
		{"empty names and values", []string{"", "", "", ""}, broken},
		{"binary", []string{"\x00\xff\r\n*3\r\n", "\xfe\x00$-1\r\n"}, broken},
		{"100,000 names and values", many, broken},
		{"100,000 names and values around a message", slices.Concat(many, with("")), handled},
		{"duplicate names: the last one counts", append([]string{"payload", "first", uuid, "0"}, with("")...), handled},
		{"an empty UUID", []string{uuid, ""}, handled},
		{"a UUID in the metadata", with("\x81\xb7" + uuid + "\xa1x"), handled},
		{"Watermill's poison keys", with("\x81\xaf" + middleware.ReasonForPoisonedKey + "\xa1x"), handled},
		{"replay mark for this group", append(with(""), replayField, "1 "+testGroup), handled},
		{"replay mark for another group", append(with(""), replayField, "1 another"), unseen},
		{"replay mark without a number", append(with(""), replayField, "x another"), handled},
		{"replay mark with a number too great", append(with(""), replayField, "9223372036854775807 another"), handled},
		{"replay mark alone", []string{replayField, "1 " + testGroup}, broken},
		{"dead letter", letter("", "\x92\xa1a\xa1b"), handled},
		{"dead letter with broken fields", letter("", "\xdd\xff\xff\xff\xfe"), handled},
		{"dead letter with broken metadata", letter("\xc1", ""), stuck},
	}
	for name, metadata := range map[string]string{
		"map32 of 2^32-1": "\xdf\xff\xff\xff\xff", "map32 of nils that end": "\xdf\xff\xff\xff\xff" + strings.Repeat("\xc0", 1000), "map16 truncated": "\xde\x00\x02\xa1a",
		"array": "\x92\xa1a\xa1b", "array32 of 2^32-1": "\xdd\xff\xff\xff\xff", "nested arrays": deep, "a map in a map": "\x81\xa1a" + strings.Repeat("\x81\xa1a", 100_000),
		"int": "\x07", "int as a value": "\x81\xa1a\x07", "ext": "\xc7\x01\x01x", "NaN": "\x81\xa1a\xcb\x7f\xf8\x00\x00\x00\x00\x00\x01", "bool": "\xc3", "never used": "\xc1",
		"str32 of 4 GiB": "\x81\xdb\xff\xff\xff\xff", "bin32 of 4 GiB": "\x81\xa1a\xc6\xff\xff\xff\xff", "JSON": `{"a": "b"}`,
	} {
		all = append(all, hostile{"metadata: " + name, with(metadata), broken})
	}
	return all
}

// allocated returns what f allocates, in bytes, by all goroutines.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func sizeOf(fields []string) (n uint64) {
	for _, f := range fields {
		n += 16 + uint64(len(f))
	}
	return n
}

// requireBounded checks that the memory allocated for the entry does not depend on
// the lengths that it states.
func requireBounded(t testing.TB, fields []string, f func()) {
	t.Helper()
	const idle = 32 << 20 // what everything else may allocate meanwhile
	bytes := allocated(f)
	const times = 60 // half of it by the embedded server, whose memory is this process's
	assert.Less(t, bytes, idle+times*sizeOf(fields), "bytes allocated for an entry of %d", sizeOf(fields))
}

func addFields(t testing.TB, client *redis.Client, topic string, fields []string) {
	t.Helper()
	args := []any{"xadd", topic, "*"}
	for _, f := range fields {
		args = append(args, f)
	}
	require.NoError(t, client.Do(context.Background(), args...).Err())
}

// TestHostile_Entries: whatever an entry contains, memory stays bounded, the entry
// has the expected outcome, and the next message is handled.
func TestHostile_Entries(t *testing.T) {
	client, topic := newClient(t), topic(t)
	config := brief(client)
	config.Retry = quickRetry()
	config.Retry.MaxInterval = patience // of those that are stuck
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	letters := 0
	pending := 0
	for _, h := range hostiles() {
		t.Run(h.name, func(t *testing.T) {
			requireBounded(t, h.fields, func() {
				addFields(t, client, topic, h.fields)
				publish(t, client, topic, "good")
				if h.fate == handled {
					msg := next(t, messages)
					assert.NotEmpty(t, msg.UUID)
					assert.NotEqual(t, "good", string(msg.Payload))
					msg.Ack()
				}
				msg := next(t, messages)
				require.Equal(t, "good", string(msg.Payload))
				msg.Ack()
			})
			switch h.fate {
			case broken:
				letters++
			case stuck:
				pending++
			}
			eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == pending })
			stored := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
			require.Len(t, stored, letters)
			if h.fate == broken {
				last := stored[letters-1]
				assert.Equal(t, goxstreams.Broken, last.Kind)
				if h.name != "replay mark alone" { // not the published fields
					assert.Equal(t, h.fields, last.Fields)
				}
			}
		})
	}
}

// TestHostile_OtherReaders: the same entries for BodyMarshaler, with its metadata, and
// for a Worker, in fields that these read.
func TestHostile_OtherReaders(t *testing.T) {
	deep := strings.Repeat("[", 100_000)
	bodies := []string{"", deep, `{"Small":` + deep, `"` + strings.Repeat("\\u0000", 10_000) + `"`, "\xff\xfe", "1e999999999", `{"Small": 300}`, "NaN", "nul"}
	metadata := []string{deep, `[]`, `1`, `"a"`, `{"a": 1}`, `{"a": ` + deep, `{"a": {}}`, `{"` + goxstreams.UUIDHeaderKey + `": []}`, "\xff"}
	client, topic := newClient(t), topic(t)
	worker := &testWorker[secretive]{}
	config := brief(client)
	config.Unmarshaler = goxstreams.BodyMarshaler{MetadataField: "meta"}
	config.Retry = quickRetry()
	consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Topic: topic, Subscriber: config}, nil)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- consumer.Run(ctx) }()
	n := 0
	try := func(fields ...string) {
		n++
		requireBounded(t, fields, func() {
			addFields(t, client, topic, fields)
			addFields(t, client, topic, []string{"body", "{}"})
			eventually(t, func() bool { c := worker.counts(); return c[0] == n && c[1] == n }, "%d: %.40q", n, fields)
		})
		_, broken, _ := worker.calls()
		assert.Equal(t, fields, broken[n-1].Fields)
	}
	for _, body := range bodies {
		try("body", body)
	}
	for _, meta := range metadata {
		try("body", "{}", "meta", meta)
	}
	cancel()
	require.NoError(t, <-ended)
}

// TestHostile_DeadLetterQueue: entries that are not dead letters, or forged ones,
// stop neither All nor operations on the others.
func TestHostile_DeadLetterQueue(t *testing.T) {
	client, topic := newClient(t), topic(t)
	stream := goxstreams.DeadLetterTopic(topic)
	letter := func(packed string) []string {
		return []string{goxstreams.UUIDHeaderKey, "1", "metadata", "", "payload", "p", "_goxstreams_fields", packed}
	}
	forged := [][]string{
		letter("\xdd\xff\xff\xff\xfe"), letter("\xdd\xff\xff\xff\xfe" + strings.Repeat("\xc0", 100_000)), letter("\xdd\x00\x10\x00\x00\xdb\xff\xff\xff\xff"),
		letter("\x92\xa1a"), letter(strings.Repeat("\x91", 100_000)), letter(""),
	}
	for _, h := range hostiles() {
		if len(h.fields) < 7 || h.fields[6] != "_goxstreams_fields" {
			forged = append(forged, h.fields)
		}
	}
	q := queueOf(t, client, stream)
	publishDying(t, client, topic, "good")
	for _, fields := range forged {
		addFields(t, client, stream, fields)
	}
	var all []string
	for _, fields := range forged {
		all = append(all, fields...)
	}
	var ids []string
	requireBounded(t, all, func() {
		for d, err := range q.All(t.Context(), "") {
			ids = append(ids, d.ID)
			if i := len(ids) - 2; i >= 0 {
				assert.Error(t, err)
				assert.Equal(t, forged[i], d.Fields)
			} else {
				require.NoError(t, err)
				assert.Equal(t, "good", string(d.Message.Payload))
			}
		}
	})
	require.Len(t, ids, len(forged)+1)
	n, err := q.Replay(t.Context(), ids...)
	require.Error(t, err)
	require.Equal(t, 1, n)
	n, err = q.Delete(t.Context(), ids[1:]...)
	require.NoError(t, err)
	require.Equal(t, len(forged), n)
}

// TestHostile_Huge: entries of 16 MiB, as a message that dies and as a malformed
// one. The client's timeouts are longer than such a reply may take on a busy
// machine.
func TestHostile_Huge(t *testing.T) {
	admin, topic := newClient(t), topic(t)
	t.Cleanup(func() { admin.Del(context.Background(), topic, goxstreams.DeadLetterTopic(topic)) })
	opt := *admin.Options()
	opt.ReadTimeout, opt.WriteTimeout = patience, patience
	client := redis.NewClient(&opt)
	t.Cleanup(func() { _ = client.Close() })
	huge := strings.Repeat("x", 16<<20)
	config := brief(client)
	config.Retry = quickRetry()
	config.Retry.MaxRetries = -1
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	good := func(messages <-chan *message.Message) {
		publish(t, client, topic, "good")
		msg := next(t, messages)
		require.Equal(t, "good", string(msg.Payload))
		msg.Ack()
	}
	good(messages)
	for i, fields := range [][]string{{"no", huge}, {goxstreams.UUIDHeaderKey, "1", "metadata", "", "payload", huge}} {
		requireBounded(t, fields, func() {
			addFields(t, client, topic, fields)
			if i == 1 {
				next(t, messages).Nack()
			}
			eventually(t, func() bool { return stats(t, sub).Dead == 1 })
			good(messages)
		})
		stream := goxstreams.DeadLetterTopic(topic)
		letters := lettersIn(t, client, stream)
		require.Len(t, letters, 1)
		require.True(t, slices.Equal(fields, letters[0].Fields), "other fields than before")
		require.NoError(t, admin.Del(t.Context(), topic, stream).Err())
		require.NoError(t, sub.Close())
		sub = newSubscriber(t, config)
		messages = subscribe(t, sub, topic)
	}
}
