package goxstreams

import (
	"bytes"
	"encoding"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/quick"
	"time"
	"unicode/utf8"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
)

// Marshalers as watermill-redisstream's users write them, and ours too.
type (
	redisstreamMarshaller interface {
		Marshal(topic string, msg *message.Message) (map[string]interface{}, error)
	}
	redisstreamUnmarshaller interface {
		Unmarshal(values map[string]interface{}) (msg *message.Message, err error)
	}
)

var (
	_ Marshaler               = redisstreamMarshaller(nil)
	_ redisstreamMarshaller   = Marshaler(nil)
	_ Unmarshaler             = redisstreamUnmarshaller(nil)
	_ redisstreamUnmarshaller = Unmarshaler(nil)

	_ redisstreamMarshaller   = DefaultMarshaler{}
	_ redisstreamUnmarshaller = DefaultMarshaler{}
	_ redisstreamMarshaller   = BodyMarshaler{}
	_ redisstreamUnmarshaller = BodyMarshaler{}
)

// redisstreamMetadata is what watermill-redisstream v1.4.5 wrote
// (internal/interop runs it and compares). head is the beginning of the
// "metadata" field in hex; after it comes the byte v as often as tail says.
var redisstreamMetadata = []struct {
	name     string
	metadata message.Metadata
	head     string
	tail     int
}{
	{"nil", nil, "", 0},
	{"empty", message.Metadata{}, "", 0},
	{"one", message.Metadata{"key": "value"}, "81a36b6579a576616c7565", 0},
	{"empty strings", message.Metadata{"": ""}, "81a0a0", 0},
	{"unicode", message.Metadata{"ключ": "значение ✓"},
		"81a8d0bad0bbd18ed187b4d0b7d0bdd0b0d187d0b5d0bdd0b8d0b520e29c93", 0},
	{"binary", message.Metadata{"\xff\x00": "\x80"}, "81a2ff00a180", 0},
	{"fixstr", metadataOfLength(31), "81a16bbf", 31},
	{"str8 from", metadataOfLength(32), "81a16bd920", 32},
	{"str8 to", metadataOfLength(255), "81a16bd9ff", 255},
	{"str16 from", metadataOfLength(256), "81a16bda0100", 256},
	{"str16 to", metadataOfLength(65535), "81a16bdaffff", 65535},
	{"str32 from", metadataOfLength(65536), "81a16bdb00010000", 65536},
}

func metadataOfLength(n int) message.Metadata { return message.Metadata{"k": strings.Repeat("v", n)} }

func TestDefaultMarshaler_WritesWhatRedisstreamWrites(t *testing.T) {
	for _, fixture := range redisstreamMetadata {
		t.Run(fixture.name, func(t *testing.T) {
			metadata := unhex(t, fixture.head) + strings.Repeat("v", fixture.tail)
			msg := newTestMessage("u", "p\x00\xff", fixture.metadata)

			fields, err := marshalFields(DefaultMarshaler{}, "topic", msg)
			require.NoError(t, err)
			require.Equal(t, []string{"_watermill_message_uuid", "u", "metadata", metadata, "payload", "p\x00\xff"}, onWire(fields))

			values, err := DefaultMarshaler{}.Marshal("topic", msg)
			require.NoError(t, err)
			require.Equal(t, map[string]any{ // the types, too, are those of watermill-redisstream
				"_watermill_message_uuid": "u",
				"metadata":                packMetadata(fixture.metadata),
				"payload":                 []byte("p\x00\xff"),
			}, values)

			got, err := unmarshalFields(DefaultMarshaler{}, onWire(fields), newOwnMessage)
			require.NoError(t, err)
			requireSameMessage(t, msg, got)
		})
	}
}

// watermill-redisstream writes the keys in a random order, so these are read
// only.
func TestDefaultMarshaler_ReadsWhatRedisstreamWrites(t *testing.T) {
	keys := func(n int) message.Metadata {
		metadata := message.Metadata{}
		for i := range n {
			metadata[fmt.Sprintf("%x", i)] = ""
		}
		return metadata
	}
	for packed, want := range map[string]message.Metadata{
		"83a161a131a162a132ae636f7272656c6174696f6e5f6964a83966383664303831":                                     {"a": "1", "b": "2", "correlation_id": "9f86d081"},
		"8fa131a0a135a0a138a0a163a0a165a0a133a0a136a0a137a0a139a0a130a0a132a0a134a0a162a0a161a0a164a0":           keys(15),
		"de0010a131a0a135a0a138a0a163a0a165a0a133a0a136a0a137a0a139a0a130a0a132a0a134a0a162a0a161a0a164a0a166a0": keys(16),
	} {
		require.Equal(t, want, unpack(t, unhex(t, packed)))
	}
}

func TestDefaultMarshaler_RoundTrip(t *testing.T) {
	t.Parallel()
	roundTrip := func(uuid string, payload []byte, metadata message.Metadata) bool {
		delete(metadata, UUIDHeaderKey)
		msg := newTestMessage(uuid, string(payload), metadata)
		requireRoundTrip(t, DefaultMarshaler{}, msg)
		return true
	}
	require.NoError(t, quick.Check(roundTrip, nil))

	for _, n := range []int{0, 1, 15, 16, 17, 65535, 65536, 70000} {
		metadata := make(message.Metadata, n)
		for i := range n {
			metadata[fmt.Sprint("key", i)] = fmt.Sprint("value", i)
		}
		roundTrip("u", nil, metadata)
	}
}

func TestDefaultMarshaler_EqualMessagesGiveEqualEntries(t *testing.T) {
	var first []any
	for range 20 {
		metadata := message.Metadata{}
		for _, i := range rand.Perm(30) {
			metadata[fmt.Sprint(i)] = "value"
		}
		fields, err := marshalFields(DefaultMarshaler{}, "topic", newTestMessage("u", "p", metadata))
		require.NoError(t, err)
		if first == nil {
			first = fields
		}
		require.Equal(t, first, fields)
	}
}

func TestDefaultMarshaler_ReservedKey(t *testing.T) {
	for _, m := range []Marshaler{DefaultMarshaler{}, BodyMarshaler{MetadataField: "ctx"}} {
		_, err := m.Marshal("topic", newTestMessage("u", "", message.Metadata{UUIDHeaderKey: "other"}))
		require.ErrorContains(t, err, UUIDHeaderKey)
	}
	// watermill-redisstream accepts the empty value.
	requireRoundTrip(t, DefaultMarshaler{}, newTestMessage("u", "", message.Metadata{UUIDHeaderKey: ""}))
}

func TestDefaultMarshaler_UnmarshalValues(t *testing.T) {
	for name, test := range map[string]struct {
		values  map[string]any
		want    *message.Message
		wantErr string
	}{
		"strings": {values: map[string]any{UUIDHeaderKey: "u", "metadata": "\x81\xa1k\xa1v", "payload": "p"},
			want: newTestMessage("u", "p", message.Metadata{"k": "v"})},
		"bytes": {values: map[string]any{UUIDHeaderKey: []byte("u"), "metadata": []byte("\x81\xa1k\xa1v"), "payload": []byte("p")},
			want: newTestMessage("u", "p", message.Metadata{"k": "v"})},
		"other fields":           {values: map[string]any{UUIDHeaderKey: "u", "other": 1}, want: newTestMessage("u", "", nil)},
		"empty UUID":             {values: map[string]any{UUIDHeaderKey: ""}, want: newTestMessage("", "", nil)},
		"nil payload, metadata":  {values: map[string]any{UUIDHeaderKey: "u", "metadata": nil, "payload": nil}, want: newTestMessage("u", "", nil)},
		"empty metadata":         {values: map[string]any{UUIDHeaderKey: "u", "metadata": ""}, want: newTestMessage("u", "", nil)},
		"nothing":                {values: nil, wantErr: `field "_watermill_message_uuid" is missing`},
		"no UUID":                {values: map[string]any{"payload": "p"}, wantErr: `field "_watermill_message_uuid" is missing`},
		"nil UUID":               {values: map[string]any{UUIDHeaderKey: nil}, wantErr: `field "_watermill_message_uuid" is missing`},
		"UUID of a wrong type":   {values: map[string]any{UUIDHeaderKey: 1}, wantErr: `field "_watermill_message_uuid": want a string or []byte, got int`},
		"payload of wrong type":  {values: map[string]any{UUIDHeaderKey: "u", "payload": message.Payload("p")}, wantErr: `field "payload": want a string or []byte, got message.Payload`},
		"metadata of wrong type": {values: map[string]any{UUIDHeaderKey: "u", "metadata": message.Metadata{}}, wantErr: `field "metadata": want a string or []byte, got message.Metadata`},
		"metadata no map":        {values: map[string]any{UUIDHeaderKey: "u", "metadata": "{}"}, wantErr: `field "metadata": MessagePack map: it cannot begin with byte 0x7b`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := DefaultMarshaler{}.Unmarshal(test.values)
			if test.wantErr != "" {
				require.EqualError(t, err, test.wantErr)
				require.Nil(t, got)
				return
			}
			require.NoError(t, err)
			requireSameMessage(t, test.want, got)
		})
	}
}

func TestUnmarshalFields_LastOfAName(t *testing.T) {
	got, err := unmarshalFields(DefaultMarshaler{}, []string{"payload", "1", UUIDHeaderKey, "u", "payload", "2", UUIDHeaderKey, "v"}, newOwnMessage)
	require.NoError(t, err)
	requireSameMessage(t, newTestMessage("v", "2", nil), got)

	got, err = unmarshalFields(BodyMarshaler{}, []string{"body", "1", "body", "2"}, newOwnMessage)
	require.NoError(t, err)
	requireSameMessage(t, newTestMessage("", "2", nil), got)

	got, err = unmarshalFields(customMarshaler{}, []string{"id", "u", "data", "1", "data", "2"}, newOwnMessage)
	require.NoError(t, err)
	requireSameMessage(t, newTestMessage("u", "2", nil), got)
}

func TestUnpackMetadata_Forms(t *testing.T) {
	want := message.Metadata{"key": "value"}
	maps := []string{"\x81", "\xde\x00\x01", "\xdf\x00\x00\x00\x01"}
	heads := []string{"\xd9", "\xc4", "\xda\x00", "\xc5\x00", "\xdb\x00\x00\x00", "\xc6\x00\x00\x00"}
	for _, m := range maps {
		require.Equal(t, want, unpack(t, m+"\xa3key\xa5value"))
		for _, head := range heads {
			require.Equal(t, want, unpack(t, m+head+"\x03key"+head+"\x05value"))
			require.Equal(t, message.Metadata{"": ""}, unpack(t, m+head+"\x00"+head+"\x00"))
		}
	}

	require.Empty(t, unpack(t, "\xc0"), "nil is an empty map")
	require.Empty(t, unpack(t, "\xdf\x00\x00\x00\x00"))
	require.Equal(t, message.Metadata{"": ""}, unpack(t, "\x81\xc0\xc0"), "nil is an empty string")
	require.Equal(t, want, unpack(t, "\x82\xa3key\xa0\xa3key\xa5value"), "the last of a key counts")
	require.Equal(t, want, unpack(t, "\x81\xa3key\xa5value, and more"), "what follows is ignored")
}

func TestUnpackMetadata_RejectsOtherTypes(t *testing.T) {
	is := func(b byte, from, to byte) bool { return from <= b && b <= to }
	for i := range 256 {
		b := byte(i)
		if !is(b, fixMap, fixMap+15) && b != nilValue && !is(b, map16, map16+1) {
			require.ErrorContains(t, unpackMetadata(string([]byte{b})+"\xa0\xa0", message.Metadata{}), fmt.Sprintf("0x%02x", b))
		}
		if !is(b, fixStr, fixStr+31) && b != nilValue && !is(b, bin8, bin32) && !is(b, str8, str32) {
			require.ErrorContains(t, unpackMetadata("\x81"+string([]byte{b})+"\xa0", message.Metadata{}), fmt.Sprintf("key at byte 1 of the MessagePack map: a string cannot begin with byte 0x%02x", b))
			require.ErrorContains(t, unpackMetadata("\x81\xa0"+string([]byte{b}), message.Metadata{}), fmt.Sprintf("value at byte 2 of the MessagePack map: a string cannot begin with byte 0x%02x", b))
		}
	}
}

func TestUnpackMetadata_Truncated(t *testing.T) {
	for _, whole := range []string{
		"\x81\xa3key\xa5value",
		"\xde\x00\x02\xd9\x03key\xda\x00\x05value\xdb\x00\x00\x00\x01k\xc0",
		"\xdf\x00\x00\x00\x02\xc4\x03key\xc5\x00\x05value\xc6\x00\x00\x00\x01k\xa0",
	} {
		unpack(t, whole)
		for end := 1; end < len(whole); end++ {
			err := unpackMetadata(whole[:end], message.Metadata{})
			require.ErrorIs(t, err, errTruncated, "%q", whole[:end])
		}
	}
}

// An entry may state any length: only bytes that exist may cost memory.
func TestUnmarshal_HostileLengths(t *testing.T) {
	for _, metadata := range []string{
		"\xdf\xff\xff\xff\xff",                                      // a map of 2^32-1
		"\xdf\xff\xff\xff\xff\xa1k\xa1v",                            // ... that begins well
		"\xdf\xff\xff\xff\xff" + strings.Repeat("\xc0", 1000),       // ... and goes on so
		"\x81\xdb\xff\xff\xff\xff",                                  // a key of 4 GiB
		"\x81\xa1k\xdb\xff\xff\xff\xffv",                            // a value of 4 GiB
		"\x81\xa1k\xc6\xff\xff\xff\xffv",                            // the same as binary
		"\xde\xff\xff\xa1k\xc6\x7f\xff\xff\xff",                     // 2 GiB - 1
		"\xde\xff\xff\xdb\x80\x00\x00\x00" + strings.Repeat("k", 9), // 2 GiB: negative, as an int of 32 bits
	} {
		var err error
		bytes := allocated(func() {
			_, err = unmarshalFields(DefaultMarshaler{}, []string{UUIDHeaderKey, "u", "metadata", metadata}, newOwnMessage)
		})
		require.ErrorContains(t, err, `field "metadata"`)
		require.ErrorContains(t, err, "truncated")
		require.Less(t, bytes, uint64(16<<10))
	}
	for _, packed := range []string{"\xdd\xff\xff\xff\xfe", "\xdd\xff\xff\xff\xfe\xa0\xa0", "\x92\xdb\xff\xff\xff\xff\xa0", "\xdc\xff\xfe\xc0\xc0"} {
		var err error
		bytes := allocated(func() { _, err = UnpackFields([]byte(packed)) })
		require.ErrorIs(t, err, errTruncated)
		require.Less(t, bytes, uint64(16<<10))
	}
}

// What a goxstreams producer writes: XADD stream * body <json.Marshal of the
// event>, and WithCtxTransmmiter's field, before it or after.
var goxstreamsEntries = [][]string{
	{"body", `{"Message":"message","Name":"name","Foo":712,"Bar":947}`},
	{"body", `{"Message":"message","Name":"name","Foo":712,"Bar":947}`, "ctx", `{"any_info":"info","trace_id":"my_trace_id"}`},
	{"ctx", `{"any_info":"info","trace_id":"my_trace_id"}`, "body", `{"Message":"\u003cmessage\u003e"}`},
	{"body", `null`, "ctx", `null`},
	{"body", `"text"`, "ctx", `{}`},
}

func TestBodyMarshaler_ReadsWhatGoxstreamsWrites(t *testing.T) {
	trace := message.Metadata{"any_info": "info", "trace_id": "my_trace_id"}
	for i, want := range []*message.Message{
		newTestMessage("", `{"Message":"message","Name":"name","Foo":712,"Bar":947}`, nil),
		newTestMessage("", `{"Message":"message","Name":"name","Foo":712,"Bar":947}`, trace),
		newTestMessage("", `{"Message":"\u003cmessage\u003e"}`, trace),
		newTestMessage("", `null`, nil),
		newTestMessage("", `"text"`, nil),
	} {
		got, err := unmarshalFields(BodyMarshaler{MetadataField: "ctx"}, goxstreamsEntries[i], newOwnMessage)
		require.NoError(t, err)
		requireSameMessage(t, want, got)

		got, err = unmarshalFields(BodyMarshaler{}, goxstreamsEntries[i], newOwnMessage)
		require.NoError(t, err)
		requireSameMessage(t, newTestMessage("", string(want.Payload), nil), got)
	}
}

func TestBodyMarshaler_WritesWhatGoxstreamsReads(t *testing.T) {
	msg := newTestMessage("u", `{"Foo":712}`, message.Metadata{"trace_id": "<my_trace_id>"})
	for name, test := range map[string]struct {
		marshaler BodyMarshaler
		msg       *message.Message
		want      []string
	}{
		"body":           {BodyMarshaler{}, msg, []string{"body", `{"Foo":712}`}},
		"other field":    {BodyMarshaler{Field: "event"}, msg, []string{"event", `{"Foo":712}`}},
		"context":        {BodyMarshaler{MetadataField: "ctx"}, msg, []string{"body", `{"Foo":712}`, "ctx", `{"_watermill_message_uuid":"u","trace_id":"\u003cmy_trace_id\u003e"}`}},
		"before payload": {BodyMarshaler{MetadataField: "a"}, msg, []string{"body", `{"Foo":712}`, "a", `{"_watermill_message_uuid":"u","trace_id":"\u003cmy_trace_id\u003e"}`}},
		"no metadata":    {BodyMarshaler{MetadataField: "ctx"}, newTestMessage("", `{}`, nil), []string{"body", `{}`, "ctx", `{}`}},
	} {
		t.Run(name, func(t *testing.T) {
			fields, err := marshalFields(test.marshaler, "topic", test.msg)
			require.NoError(t, err)
			require.Equal(t, test.want, onWire(fields))

			var event, transmitted map[string]any // goxstreams' own way to read
			require.NoError(t, json.Unmarshal([]byte(test.want[1]), &event))
			if len(test.want) > 2 {
				require.NoError(t, json.Unmarshal([]byte(test.want[3]), &transmitted))
			}
		})
	}
	require.Equal(t, message.Metadata{"trace_id": "<my_trace_id>"}, msg.Metadata, "the message is the caller's")
}

func TestBodyMarshaler_RoundTrip(t *testing.T) {
	roundTrip := func(uuid string, payload []byte, metadata message.Metadata) bool {
		delete(metadata, UUIDHeaderKey)
		for _, m := range []BodyMarshaler{{MetadataField: "ctx"}, {Field: "x", MetadataField: "body"}} {
			requireRoundTrip(t, m, newTestMessage(uuid, string(payload), metadata))
		}
		got := requireUnmarshal(t, BodyMarshaler{}, newTestMessage(uuid, string(payload), metadata))
		requireSameMessage(t, newTestMessage("", string(payload), nil), got)
		return true
	}
	require.NoError(t, quick.Check(roundTrip, nil))
	roundTrip("<&>\u2028", []byte{0, 0xff}, message.Metadata{"": "", "a\x00\"\\": "\u2028\ufffd&lt;"})
}

func TestBodyMarshaler_Errors(t *testing.T) {
	ctx := BodyMarshaler{MetadataField: "ctx"}
	for name, msg := range map[string]*message.Message{
		"UUID":  newTestMessage("\xff", "", nil),
		"key":   newTestMessage("", "", message.Metadata{"\xff": ""}),
		"value": newTestMessage("", "", message.Metadata{"k": "\xff"}),
	} {
		_, err := ctx.Marshal("topic", msg)
		require.ErrorContains(t, err, "is not UTF-8", name)
		_, err = BodyMarshaler{}.Marshal("topic", msg)
		require.NoError(t, err, name)
	}

	for metadata, want := range map[string]string{
		`{"a":1}`:   "cannot unmarshal number",
		`["a"]`:     "cannot unmarshal array",
		`{"a":"b"`:  "unexpected end of JSON input",
		`{"a":""}x`: "invalid character",
	} {
		_, err := unmarshalFields(ctx, []string{"body", "{}", "ctx", metadata}, newOwnMessage)
		require.ErrorContains(t, err, `field "ctx": `)
		require.ErrorContains(t, err, want)
	}
	_, err := unmarshalFields(BodyMarshaler{Field: "event"}, []string{"body", "{}"}, newOwnMessage)
	require.EqualError(t, err, `field "event" is missing`)
	_, err = BodyMarshaler{}.Unmarshal(map[string]any{"body": 1})
	require.EqualError(t, err, `field "body": want a string or []byte, got int`)
	_, err = ctx.Unmarshal(map[string]any{"body": "", "ctx": map[string]string{}})
	require.EqualError(t, err, `field "ctx": want a string or []byte, got map[string]string`)

	for _, m := range []BodyMarshaler{{MetadataField: "body"}, {Field: "x", MetadataField: "x"}} {
		require.ErrorContains(t, m.validate(), "cannot hold both")
		_, err = m.Marshal("topic", newTestMessage("u", "", nil))
		require.ErrorContains(t, err, "cannot hold both")
		_, err = m.Unmarshal(map[string]any{m.MetadataField: ""})
		require.ErrorContains(t, err, "cannot hold both")
	}
	require.NoError(t, BodyMarshaler{}.validate())
	require.NoError(t, BodyMarshaler{Field: "x", MetadataField: "body"}.validate())
}

// customMarshaler is an example of a user's marshaler.
type customMarshaler struct{}

func (customMarshaler) Marshal(topic string, msg *message.Message) (map[string]any, error) {
	return map[string]any{"topic": topic, "id": msg.UUID, "data": []byte(msg.Payload)}, nil
}

func (customMarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	return message.NewMessage(values["id"].(string), []byte(values["data"].(string))), nil
}

func TestMarshalFields_Custom(t *testing.T) {
	msg := newTestMessage("u", "p", nil)
	for range 20 {
		fields, err := marshalFields(customMarshaler{}, "orders", msg)
		require.NoError(t, err)
		require.Equal(t, []any{"data", []byte("p"), "id", "u", "topic", "orders"}, fields, "always in the same order")
	}
	requireRoundTrip(t, customMarshaler{}, msg)

	_, err := marshalFields(DefaultMarshaler{}, "orders", nil)
	require.EqualError(t, err, "the message is nil")
	_, err = marshalFields(marshalFunc(func() (map[string]any, error) { return nil, nil }), "orders", msg)
	require.EqualError(t, err, "goxstreams.marshalFunc returned no fields: a Redis entry needs at least one")
	boom := errors.New("boom")
	_, err = marshalFields(marshalFunc(func() (map[string]any, error) { return nil, boom }), "orders", msg)
	require.Equal(t, boom, err)
}

type marshalFunc func() (map[string]any, error)

func (f marshalFunc) Marshal(string, *message.Message) (map[string]any, error) { return f() }

type binaryValue struct{ err error }

func (v binaryValue) MarshalBinary() ([]byte, error) { return []byte("binary"), v.err }

var _ encoding.BinaryMarshaler = binaryValue{}

// go-redis rejects values that it cannot write in the middle of a pipeline, with
// other calls' messages in it.
func TestMarshalFields_WritableValues(t *testing.T) {
	marshal := func(v any) ([]any, error) {
		m := marshalFunc(func() (map[string]any, error) { return map[string]any{"f": v}, nil })
		return marshalFields(m, "topic", newTestMessage("u", "p", nil))
	}
	n, s := 1, "s"
	for _, v := range []any{nil, "s", []byte("b"), 1, int64(1), uint8(1), 1.5, true, time.Second, time.Now(), &n, &s, (*int)(nil)} {
		fields, err := marshal(v)
		require.NoError(t, err)
		require.Equal(t, []any{"f", v}, fields)
	}
	fields, err := marshal(binaryValue{})
	require.NoError(t, err)
	require.Equal(t, []any{"f", []byte("binary")}, fields)

	_, err = marshal(binaryValue{errors.New("boom")})
	require.EqualError(t, err, `field "f": boom`)
	_, err = marshal(message.Payload("p"))
	require.EqualError(t, err, `field "f": go-redis cannot write a message.Payload: convert it to a string or []byte`)
}

type unmarshalFunc func(map[string]any) (*message.Message, error)

func (f unmarshalFunc) Unmarshal(values map[string]any) (*message.Message, error) { return f(values) }

func TestUnmarshalFields_Custom(t *testing.T) {
	boom := errors.New("boom")
	for name, test := range map[string]struct {
		unmarshal unmarshalFunc
		wantErr   string
	}{
		"error":         {func(map[string]any) (*message.Message, error) { return message.NewMessage("", nil), boom }, "boom"},
		"nothing":       {func(map[string]any) (*message.Message, error) { return nil, nil }, "goxstreams.unmarshalFunc returned neither a message nor an error"},
		"panic":         {func(values map[string]any) (*message.Message, error) { _ = values["body"].(int); return nil, nil }, "goxstreams.unmarshalFunc panicked: interface conversion: interface {} is string, not int"},
		"panic with it": {func(map[string]any) (*message.Message, error) { panic(boom) }, "marshaler_test.go"}, // the stack
	} {
		t.Run(name, func(t *testing.T) {
			msg, err := unmarshalFields(test.unmarshal, []string{"body", ""}, newOwnMessage)
			require.ErrorContains(t, err, test.wantErr)
			require.Nil(t, msg)
		})
	}
	for _, u := range []Unmarshaler{DefaultMarshaler{}, BodyMarshaler{}, customMarshaler{}} {
		_, err := unmarshalFields(u, []string{"body"}, newOwnMessage)
		require.ErrorContains(t, err, "odd number")
	}
}

// A message that message.NewMessage did not make has no channel to observe its Ack,
// and a nil map for metadata, on which the first middleware that sets a key would
// panic.
func TestUnmarshalFields_MessageWithoutNewMessage(t *testing.T) {
	ctx := t.Context()
	u := unmarshalFunc(func(map[string]any) (*message.Message, error) {
		msg := &message.Message{UUID: "u", Payload: []byte("p")}
		msg.SetContext(ctx)
		return msg, nil
	})
	msg, err := unmarshalFields(u, []string{"body", ""}, newOwnMessage)
	require.NoError(t, err)
	requireSameMessage(t, newTestMessage("u", "p", nil), msg)
	require.Equal(t, ctx, msg.Context())
	require.True(t, msg.Ack())
	<-msg.Acked()
}

// Embedding one of our types promotes its unexported methods as well. A fast path
// that recognizes them would bypass the methods of the embedding type.
type embedding struct{ DefaultMarshaler }

func (embedding) Marshal(string, *message.Message) (map[string]any, error) {
	return map[string]any{"mine": "1"}, nil
}

func (embedding) Unmarshal(values map[string]any) (*message.Message, error) {
	return message.NewMessage(values["mine"].(string), nil), nil
}

func TestMarshalers_EmbeddedOnesAreNotPassedBy(t *testing.T) {
	fields, err := marshalFields(embedding{}, "topic", newTestMessage("u", "p", nil))
	require.NoError(t, err)
	require.Equal(t, []any{"mine", "1"}, fields)
	msg, err := unmarshalFields(embedding{}, []string{"mine", "2"}, newOwnMessage)
	require.NoError(t, err)
	require.Equal(t, "2", msg.UUID)

	requireRoundTrip(t, &DefaultMarshaler{}, newTestMessage("u", "p", message.Metadata{"k": "v"}))
}

func TestPackFields(t *testing.T) {
	for _, fields := range [][]string{
		nil,
		{"", ""},
		{"b", "1", "a", "2", "b", "3", "b", "3"},
		{"\x00\xff", "\xde\xad\xbe\xef", "\r\n", "\xc0"},
		{strings.Repeat("n", 31), strings.Repeat("v", 32), strings.Repeat("n", 255), strings.Repeat("v", 256)},
		{strings.Repeat("n", 65535), strings.Repeat("v", 65536)},
		slices.Repeat([]string{"name", "value"}, 7),
		slices.Repeat([]string{"name", "value"}, 8),
		slices.Repeat([]string{"name", "value"}, 32767),
		slices.Repeat([]string{"name", "value"}, 32768),
	} {
		got, err := UnpackFields([]byte(packFields(fields)))
		require.NoError(t, err)
		require.Equal(t, fields, got)
	}
	require.Equal(t, "\x94\xa1b\xa11\xa1a\xa0", packFields([]string{"b", "1", "a", ""}))
	require.NoError(t, quick.Check(func(fields []string) bool {
		fields = append(fields, fields...)
		got, err := UnpackFields([]byte(packFields(fields)))
		return err == nil && slices.Equal(fields, got)
	}, nil))
}

func TestUnpackFields_Errors(t *testing.T) {
	for packed, want := range map[string]string{
		"":                         "goxstreams: unpack fields: MessagePack array: truncated",
		"\x82\xa1a\xa1b":           "goxstreams: unpack fields: MessagePack array: it cannot begin with byte 0x82",
		"\x91\xa1a":                "goxstreams: unpack fields: 1 names and values, an odd number",
		"\xdc\x00\x03\xa0\xa0":     "goxstreams: unpack fields: 3 names and values, an odd number",
		"\x92\xa1a\x01":            "goxstreams: unpack fields: string at byte 3: a string cannot begin with byte 0x01",
		"\x92\xa1a\xa1b\xa1c":      "goxstreams: unpack fields: 2 bytes follow the array",
		"\xdd\x00\x00\x00\x02\xa0": "goxstreams: unpack fields: 2 names and values in 1 bytes: truncated",
	} {
		_, err := UnpackFields([]byte(packed))
		require.EqualError(t, err, want)
	}
	whole := packFields([]string{"a", strings.Repeat("b", 40), "c", strings.Repeat("d", 300)})
	for end := range len(whole) {
		_, err := UnpackFields([]byte(whole[:end]))
		require.ErrorIs(t, err, errTruncated)
	}
}

// The subscriber's rate depends on this: without metadata a message costs only
// NewMessage and the copies of the payload and the UUID.
func TestUnmarshalFields_AllocatesNothingMore(t *testing.T) {
	payload := strings.Repeat("p", 100)
	least := testing.AllocsPerRun(100, func() { sink = message.NewMessage("u", []byte(payload)) })
	for _, test := range []struct {
		u      Unmarshaler
		fields []string
		uuids  float64
	}{
		{DefaultMarshaler{}, []string{UUIDHeaderKey, "u", "metadata", "", "payload", payload}, 1},
		{BodyMarshaler{}, []string{"body", payload}, 0},
	} {
		allocs := testing.AllocsPerRun(100, func() { sink, _ = unmarshalFields(test.u, test.fields, newOwnMessage) })
		require.Equal(t, least+test.uuids, allocs)
	}
}

var (
	sink       *message.Message
	fieldsSink []any
)

func FuzzDefaultUnmarshal(f *testing.F) {
	f.Add("u", "", "p", "", "")
	f.Add("", "\xc0", "", "payload", "q")
	f.Add("u", "\x81\xa3key\xa5value", "\x00\xff", "metadata", "")
	f.Add("u", "\xde\x00\x01\xd9\x01k\xda\x00\x01v and more", "p", UUIDHeaderKey, "v")
	f.Add("u", "\xdf\x00\x00\x00\x02\xc4\x01k\xc5\x00\x01v\xdb\x00\x00\x00\x01l\xc6\x00\x00\x00\x01w", "p", "body", "{}")
	f.Add("u", "\xdf\xff\xff\xff\xff\xc0\xc0\xdb\xff\xff\xff\xff", "p", "", "")
	f.Add("u", "\xc7\x01\x05\x81\xa0\xa0", "p", "", "")
	f.Add("u", "\x81\xb7_watermill_message_uuid\xa1x", "p", "", "")
	for _, fixture := range redisstreamMetadata[:9] {
		f.Add("u", string(packMetadata(fixture.metadata)), "p", "", "")
	}
	f.Fuzz(func(t *testing.T, uuid, metadata, payload, name, value string) {
		fields := []string{name, value, UUIDHeaderKey, uuid, "metadata", metadata, "payload", payload}
		msg := fuzzUnmarshal(t, DefaultMarshaler{}, fields)
		if msg == nil {
			return
		}
		require.Equal(t, uuid, msg.UUID)
		require.Equal(t, payload, string(msg.Payload))
		if msg.Metadata.Get(UUIDHeaderKey) == "" {
			requireRoundTrip(t, DefaultMarshaler{}, msg)
		}
	})
}

func FuzzBodyUnmarshal(f *testing.F) {
	f.Add("body", "", `{"Foo":712}`, "")
	f.Add("event", "body", "p", `{"a":"b","_watermill_message_uuid":"u"}`)
	for _, entry := range goxstreamsEntries[3:] {
		f.Add("", entry[2], entry[1], entry[3])
	}
	f.Add("", "ctx", "p", `{"a":null,"a":"\ud800","b":"\u2028"}`)
	f.Add("", "ctx", "p", `{"a":1}`)
	f.Add("", "ctx", "p", strings.Repeat(`[`, 100))
	f.Add("", "ctx", "p", strings.Repeat(`{"a":`, 100))
	f.Add("x", "x", "p", `{}`)
	f.Fuzz(func(t *testing.T, field, metadataField, payload, metadata string) {
		m := BodyMarshaler{Field: field, MetadataField: metadataField}
		msg := fuzzUnmarshal(t, m, []string{metadataField, metadata, m.field(), payload})
		if msg == nil {
			return
		}
		require.Equal(t, payload, string(msg.Payload))
		for key, value := range msg.Metadata {
			require.True(t, utf8.ValidString(key+value))
		}
		requireRoundTrip(t, m, msg)
	})
}

func FuzzUnpackFields(f *testing.F) {
	f.Add([]byte("\x90"))
	f.Add([]byte("\xc0"))
	f.Add([]byte("\x94\xa1b\xa11\xa1b\xa0"))
	f.Add([]byte("\xdc\x00\x02\xd9\x01k\xda\x00\x01v"))
	f.Add([]byte("\xdd\x00\x00\x00\x04\xc4\x01k\xc5\x00\x01v\xdb\x00\x00\x00\x01l\xc6\x00\x00\x00\x01w"))
	f.Add([]byte("\xdd\xff\xff\xff\xfe\xc0\xc0"))
	f.Add([]byte("\x92\xa0\xa0\xa0"))
	f.Add([]byte("\x91\xa0"))
	f.Fuzz(func(t *testing.T, packed []byte) {
		var (
			fields []string
			err    error
		)
		requireModest(t, len(packed), func() { fields, err = UnpackFields(packed) })
		if err != nil {
			require.Nil(t, fields)
			return
		}
		require.Zero(t, len(fields)%2)
		repacked := packFields(fields)
		again, err := UnpackFields([]byte(repacked))
		require.NoError(t, err)
		require.Equal(t, fields, again)
		require.LessOrEqual(t, len(repacked), len(packed), "ours is the shortest form")
	})
}

// fuzzUnmarshal checks invariants for arbitrary bytes in a stream. It returns nil
// for a malformed entry.
func fuzzUnmarshal(t *testing.T, u Unmarshaler, fields []string) *message.Message {
	var (
		msg  *message.Message
		err  error
		size int
	)
	values := map[string]any{}
	for i := 0; i < len(fields); i += 2 {
		values[fields[i]] = fields[i+1]
		size += len(fields[i]) + len(fields[i+1])
	}
	requireModest(t, size, func() { msg, err = unmarshalFields(u, fields, newOwnMessage) })
	viaMap, mapErr := u.Unmarshal(values)
	if err != nil {
		require.Nil(t, msg)
		require.Equal(t, err, mapErr)
		return nil
	}
	require.NoError(t, mapErr)
	requireSameMessage(t, msg, viaMap)
	return msg
}

// requireModest fails if fn allocates more than an input of that size justifies.
func requireModest(t *testing.T, size int, fn func()) {
	t.Helper()
	require.Less(t, allocated(fn), uint64(64<<10+256*size))
}

func allocated(fn func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	fn()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func marshalFields(m Marshaler, topic string, msg *message.Message) ([]any, error) {
	return appendFields(nil, m, topic, msg)
}

func newTestMessage(uuid, payload string, metadata message.Metadata) *message.Message {
	msg := message.NewMessage(uuid, []byte(payload))
	maps.Copy(msg.Metadata, metadata)
	return msg
}

type bothWays interface {
	Marshaler
	Unmarshaler
}

// requireRoundTrip passes msg through m as fields and as a map.
func requireRoundTrip(t *testing.T, m bothWays, msg *message.Message) {
	t.Helper()
	if b, ok := m.(BodyMarshaler); ok && b.MetadataField == "" {
		msg = newTestMessage("", string(msg.Payload), nil)
	}
	requireSameMessage(t, msg, requireUnmarshal(t, m, msg))
}

func requireUnmarshal(t *testing.T, m bothWays, msg *message.Message) *message.Message {
	t.Helper()
	fields, err := marshalFields(m, "topic", msg)
	require.NoError(t, err)
	got, err := unmarshalFields(m, onWire(fields), newOwnMessage)
	require.NoError(t, err)

	values, err := m.Marshal("topic", msg)
	require.NoError(t, err)
	for name, value := range values { // as Redis returns it
		if b, ok := value.([]byte); ok {
			values[name] = string(b)
		}
	}
	viaMap, err := m.Unmarshal(values)
	require.NoError(t, err)
	requireSameMessage(t, got, viaMap)
	return got
}

func requireSameMessage(t *testing.T, want, got *message.Message) {
	t.Helper()
	require.Equal(t, want.UUID, got.UUID)
	require.NotNil(t, got.Metadata)
	require.Equal(t, want.Metadata, got.Metadata)
	require.True(t, bytes.Equal(want.Payload, got.Payload))
	require.NotNil(t, got.Acked())
}

// onWire returns the fields as Redis stores them.
func onWire(fields []any) []string {
	wire := make([]string, len(fields))
	for i, field := range fields {
		switch field := field.(type) {
		case string:
			wire[i] = field
		case []byte:
			wire[i] = string(field)
		default:
			panic(fmt.Sprintf("field %d is a %T", i, field))
		}
	}
	return wire
}

func unhex(t *testing.T, s string) string {
	t.Helper()
	b, err := hex.DecodeString(s)
	require.NoError(t, err)
	return string(b)
}

func unpack(t *testing.T, packed string) message.Metadata {
	t.Helper()
	metadata := message.Metadata{}
	require.NoError(t, unpackMetadata(packed, metadata), "%q", packed)
	return metadata
}

func benchmarkMessages() map[string]*message.Message {
	payload := strings.Repeat("p", 100)
	uuid := "b1946ac9-2cb0-4b4e-a3f9-6f1f1f0c9d2a"
	return map[string]*message.Message{
		"plain": newTestMessage(uuid, payload, nil),
		"3 keys": newTestMessage(uuid, payload, message.Metadata{
			"correlation_id": uuid, "name": "OrderPlaced", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		}),
	}
}

func BenchmarkNewMessage(b *testing.B) {
	payload := strings.Repeat("p", 100)
	b.ReportAllocs()
	for b.Loop() {
		sink = message.NewMessage("u", []byte(payload))
	}
}

func BenchmarkMarshalFields(b *testing.B) {
	for name, m := range benchmarkMarshalers {
		for kind, msg := range benchmarkMessages() {
			b.Run(name+"/"+kind, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					fieldsSink, _ = marshalFields(m, "topic", msg)
				}
			})
		}
	}
}

func BenchmarkUnmarshalFields(b *testing.B) {
	for name, m := range benchmarkMarshalers {
		for kind, msg := range benchmarkMessages() {
			b.Run(name+"/"+kind, func(b *testing.B) {
				fields, err := marshalFields(m, "topic", msg)
				require.NoError(b, err)
				wire := onWire(fields)
				b.ReportAllocs()
				for b.Loop() {
					sink, _ = unmarshalFields(m, wire, newOwnMessage)
				}
			})
		}
	}
}

var benchmarkMarshalers = map[string]bothWays{
	"default":        DefaultMarshaler{},
	"default as map": &DefaultMarshaler{},
	"body":           BodyMarshaler{},
	"body+metadata":  BodyMarshaler{MetadataField: "ctx"},
}
