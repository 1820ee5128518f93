package interop

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
	msgpack4 "github.com/vmihailenco/msgpack"
	msgpack5 "github.com/vmihailenco/msgpack/v5"

	"github.com/goxstreams/watermill-goxstreams"
)

// Code for the interfaces of one library needs only another spelling for those of the
// other.
var (
	_ goxstreams.Marshaler     = redisstream.Marshaller(nil)
	_ redisstream.Marshaller   = goxstreams.Marshaler(nil)
	_ goxstreams.Unmarshaler   = redisstream.Unmarshaller(nil)
	_ redisstream.Unmarshaller = goxstreams.Unmarshaler(nil)

	_ goxstreams.Marshaler               = redisstream.DefaultMarshallerUnmarshaller{}
	_ goxstreams.Unmarshaler             = redisstream.DefaultMarshallerUnmarshaller{}
	_ redisstream.MarshallerUnmarshaller = goxstreams.DefaultMarshaler{}
)

var (
	theirs = redisstream.DefaultMarshallerUnmarshaller{}
	ours   = goxstreams.DefaultMarshaler{}
)

func TestReservedKeyIsTheSame(t *testing.T) {
	require.Equal(t, redisstream.UUIDHeaderKey, goxstreams.UUIDHeaderKey)
	for _, value := range []string{"", "other"} {
		msg := newMessage("u", nil, message.Metadata{redisstream.UUIDHeaderKey: value})
		_, theirErr := theirs.Marshal("topic", msg)
		_, ourErr := ours.Marshal("topic", msg)
		require.Equal(t, theirErr == nil, ourErr == nil)
	}
}

// With at most one key the encodings are the same; with more, watermill-redisstream
// writes the keys in random order, and this library sorts them.
func TestSameBytes(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	check := func(metadata message.Metadata) {
		msg := newMessage(randomString(random), []byte(randomString(random)), metadata)
		require.Equal(t, stored(t, theirs, msg), stored(t, ours, msg))
	}
	check(nil)
	for range 10_000 {
		check(randomMetadata(random, 1))
	}
	for _, n := range []int{31, 32, 255, 256, 65535, 65536, 1 << 20} {
		check(message.Metadata{"key": string(make([]byte, n))})
		check(message.Metadata{string(make([]byte, n)): ""})
	}

	for _, n := range []int{2, 15, 16, 17, 300} {
		metadata := randomMetadata(random, n)
		var sorted bytes.Buffer
		require.NoError(t, msgpack4.NewEncoder(&sorted).SortMapKeys(true).Encode(metadata))
		msg := newMessage("u", nil, metadata)
		require.Equal(t, sorted.String(), stored(t, ours, msg)["metadata"])
	}
}

func TestSameMessages(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	check := func(keys int) {
		msg := newMessage(randomString(random), []byte(randomString(random)), randomMetadata(random, keys))

		got, err := ours.Unmarshal(stored(t, theirs, msg))
		require.NoError(t, err)
		requireSame(t, msg, got)

		got, err = theirs.Unmarshal(stored(t, ours, msg))
		require.NoError(t, err)
		requireSame(t, msg, got)

		var decoded map[string]string // decoded by a third library
		if packed := stored(t, ours, msg)["metadata"].(string); packed != "" {
			require.NoError(t, msgpack5.Unmarshal([]byte(packed), &decoded))
			require.Equal(t, map[string]string(msg.Metadata), decoded)
		}
		packed, err := msgpack5.Marshal(map[string]string(msg.Metadata))
		require.NoError(t, err)
		got, err = ours.Unmarshal(map[string]any{"_watermill_message_uuid": msg.UUID, "metadata": string(packed), "payload": string(msg.Payload)})
		require.NoError(t, err)
		requireSame(t, msg, got)
	}
	for range 5_000 {
		check(random.IntN(20))
	}
	for _, keys := range []int{0, 1, 15, 16, 17, 65535, 65536, 70000} {
		check(keys)
	}
}

// Metadata that watermill-redisstream reads is read the same way here, and what it
// rejects is rejected. The exception is a map within an extension type: its library
// skips that header, and no version of it writes one.
func FuzzSameMetadata(f *testing.F) {
	f.Add([]byte("\x81\xa3key\xa5value"))
	f.Add([]byte("\xde\x00\x02\xd9\x01k\xda\x00\x01v\xdb\x00\x00\x00\x01l\xc0 and more"))
	f.Add([]byte("\xdf\x00\x00\x00\x02\xc4\x01k\xc5\x00\x01v\xc6\x00\x00\x00\x01l\xa0"))
	f.Add([]byte("\xdf\xff\xff\xff\xff\xc0\xc0"))
	f.Add([]byte("\xc0"))
	f.Add([]byte("\x81\xa1k\x01"))
	f.Fuzz(func(t *testing.T, packed []byte) {
		if len(packed) > 0 && (0xc7 <= packed[0] && packed[0] <= 0xc9 || 0xd4 <= packed[0] && packed[0] <= 0xd8) {
			t.Skip("an extension type")
		}
		values := map[string]any{"_watermill_message_uuid": "u", "metadata": string(packed)}
		want, theirErr := theirs.Unmarshal(values)
		got, ourErr := ours.Unmarshal(values)
		require.Equal(t, theirErr == nil, ourErr == nil, "theirs: %v, ours: %v", theirErr, ourErr)
		if ourErr == nil {
			requireSame(t, want, got)
		}
	})
}

// stored returns the entry as go-redis reads it back.
func stored(t *testing.T, m redisstream.Marshaller, msg *message.Message) map[string]any {
	t.Helper()
	values, err := m.Marshal("topic", msg)
	require.NoError(t, err)
	for name, value := range values {
		if b, ok := value.([]byte); ok {
			values[name] = string(b)
		}
	}
	return values
}

func requireSame(t *testing.T, want, got *message.Message) {
	t.Helper()
	require.Equal(t, want.UUID, got.UUID)
	require.True(t, bytes.Equal(want.Payload, got.Payload))
	require.True(t, maps.Equal(want.Metadata, got.Metadata)) // testify is too slow for 70,000 keys
}

func newMessage(uuid string, payload []byte, metadata message.Metadata) *message.Message {
	msg := message.NewMessage(uuid, payload)
	maps.Copy(msg.Metadata, metadata)
	return msg
}

func randomMetadata(random *rand.Rand, keys int) message.Metadata {
	metadata := make(message.Metadata, keys)
	for i := range keys {
		key := fmt.Sprintf("ключ %d ", i)
		if keys < 1000 {
			key += randomString(random)
		}
		metadata[key] = randomString(random)
	}
	return metadata
}

// randomString returns any bytes, of lengths around those at which the encoding
// changes.
func randomString(random *rand.Rand) string {
	limits := []int{0, 1, 8, 8, 8, 8, 8, 40, 40, 300}
	b := make([]byte, random.IntN(limits[random.IntN(len(limits))]+1))
	for i := range b {
		b[i] = byte(random.Uint32())
	}
	return string(b)
}
