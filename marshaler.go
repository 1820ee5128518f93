package goxstreams

import (
	"cmp"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"runtime/debug"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ThreeDotsLabs/watermill/message"
)

// UUIDHeaderKey is the field in which a message's UUID is stored. It cannot be used
// as a metadata key.
const UUIDHeaderKey = "_watermill_message_uuid"

const (
	metadataField = "metadata"
	payloadField  = "payload"
)

// Marshaler converts a message to the fields of a stream entry. Its methods are
// called concurrently.
//
// A value must be one that go-redis can write: a string, []byte, number, bool,
// time.Time, time.Duration, net.IP, or an encoding.BinaryMarshaler; nil is stored
// as the empty string. Fields are stored in the order of their names. Redis
// requires at least one field. If Marshal returns an error, Publish stores nothing.
// Marshal must not change msg; its result may share memory with msg.
type Marshaler interface {
	Marshal(topic string, msg *message.Message) (map[string]any, error)
}

// Unmarshaler converts the fields of a stream entry back to a message. Its methods
// are called concurrently.
//
// Every value is a string, and may contain any bytes. If several fields have the
// same name, the last one counts. The Unmarshaler may keep the map. A message with
// an empty UUID gets the entry's ID as its UUID. If Unmarshal panics, or returns an
// error or no message, the entry is malformed: see SubscriberConfig.OnBroken.
type Unmarshaler interface {
	Unmarshal(values map[string]any) (*message.Message, error)
}

var errNilMessage = errors.New("the message is nil")

// appendFields appends the fields of msg's entry to args as name, value, ..., with
// values that go-redis can write. Messages with the same names always have the same
// order of fields: Redis then stores the names once per stream node.
//
// For this library's own marshalers it avoids the map. It recognizes them by type:
// a method would also be promoted to types that embed one of them, and bypass the
// Marshal which such a type defines.
func appendFields(args []any, m Marshaler, topic string, msg *message.Message) ([]any, error) {
	if msg == nil {
		return nil, errNilMessage
	}
	switch m := m.(type) {
	case DefaultMarshaler:
		return m.appendFields(args, msg)
	case BodyMarshaler:
		return m.appendFields(args, msg)
	}
	values, err := m.Marshal(topic, msg)
	if err != nil {
		return nil, err
	}
	if len(values) == 0 {
		return nil, fmt.Errorf("%T returned no fields: a Redis entry needs at least one", m)
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		value, err := writable(values[name])
		if err != nil {
			return nil, fmt.Errorf("field %q: %w", name, err)
		}
		args = append(args, name, value)
	}
	return args, nil
}

// writable returns v as a type that go-redis can write. Otherwise go-redis would
// fail in the middle of a pipeline, where the error would hit other calls too.
func writable(v any) (any, error) {
	switch v := v.(type) {
	case nil, string, []byte, bool, time.Time, time.Duration, net.IP,
		int, int8, int16, int32, int64, uint, uint8, uint16, uint32, uint64, uintptr, float32, float64,
		*string, *bool, *time.Time, *time.Duration,
		*int, *int8, *int16, *int32, *int64, *uint, *uint8, *uint16, *uint32, *uint64, *uintptr, *float32, *float64:
		return v, nil
	case encoding.BinaryMarshaler:
		return v.MarshalBinary()
	default:
		return nil, fmt.Errorf("go-redis cannot write a %T: convert it to a string or []byte", v)
	}
}

// unmarshalFields decodes an entry's fields (name, value, ...) into a message. The
// message's metadata is not nil. This library's own unmarshalers use create.
func unmarshalFields(u Unmarshaler, fields []string, create newMessage) (*message.Message, error) {
	if len(fields)%2 != 0 {
		return nil, fmt.Errorf("the entry has %d names and values, an odd number", len(fields))
	}
	switch u := u.(type) {
	case DefaultMarshaler:
		return u.unmarshalFields(fields, create)
	case BodyMarshaler:
		return u.unmarshalFields(fields, create)
	}
	values := make(map[string]any, len(fields)/2)
	for i := 0; i < len(fields); i += 2 {
		values[strings.Clone(fields[i])] = strings.Clone(fields[i+1]) // see newOwnMessage
	}
	return unmarshalCustom(u, values)
}

// unmarshalCustom calls a user's Unmarshaler.
func unmarshalCustom(u Unmarshaler, values map[string]any) (msg *message.Message, err error) {
	defer func() {
		if r := recover(); r != nil {
			msg, err = nil, fmt.Errorf("%T panicked: %v\n%s", u, r, debug.Stack())
		}
	}()
	msg, err = u.Unmarshal(values)
	if err != nil {
		return nil, err
	}
	if msg == nil {
		return nil, fmt.Errorf("%T returned neither a message nor an error", u)
	}
	if msg.Acked() == nil || msg.Metadata == nil {
		// The message was not made by message.NewMessage: its Ack would have no
		// effect, and its Metadata.Set would panic.
		msg = msg.CopyWithContext()
	}
	return msg, nil
}

// pickFields returns the named fields that values contains, as name, value, ... A
// nil value counts as absent.
func pickFields(values map[string]any, names ...string) ([]string, error) {
	fields := make([]string, 0, 2*len(names))
	for _, name := range names {
		switch value := values[name].(type) {
		case nil:
		case string:
			fields = append(fields, name, value)
		case []byte:
			fields = append(fields, name, string(value))
		default:
			return nil, fmt.Errorf("field %q: want a string or []byte, got %T", name, value)
		}
	}
	return fields, nil
}

// fieldMap converts name, value, ... to the map that Marshaler returns.
func fieldMap(fields []any, err error) (map[string]any, error) {
	if err != nil {
		return nil, err
	}
	values := make(map[string]any, len(fields)/2)
	for i := 0; i < len(fields); i += 2 {
		values[fields[i].(string)] = fields[i+1]
	}
	return values, nil
}

func checkReserved(metadata message.Metadata) error {
	if metadata.Get(UUIDHeaderKey) != "" {
		return fmt.Errorf("metadata key %q is reserved for the message's UUID", UUIDHeaderKey)
	}
	return nil
}

// DefaultMarshaler uses the wire format of watermill-redisstream, byte for byte, so
// that both libraries can share a stream. An entry has three fields:
//
//   - UUIDHeaderKey: the message's UUID; an entry without it is malformed,
//   - "metadata": a MessagePack map of strings to strings, or empty if there is no
//     metadata,
//   - "payload".
//
// Unmarshal treats absent metadata and an absent payload as empty, and ignores
// other fields. Marshal rejects metadata with a value for UUIDHeaderKey. All
// strings may contain any bytes. The metadata keys are sorted, so that equal
// messages make equal entries.
type DefaultMarshaler struct{}

// Marshal implements Marshaler. It ignores the topic. The values are a string and
// two []byte; the payload shares the message's memory.
func (m DefaultMarshaler) Marshal(_ string, msg *message.Message) (map[string]any, error) {
	return fieldMap(m.appendFields(nil, msg))
}

// Unmarshal implements Unmarshaler. Values may be strings or []byte.
func (m DefaultMarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	fields, err := pickFields(values, UUIDHeaderKey, metadataField, payloadField)
	if err != nil {
		return nil, err
	}
	return m.unmarshalFields(fields, newOwnMessage)
}

func (DefaultMarshaler) appendFields(args []any, msg *message.Message) ([]any, error) {
	if err := checkReserved(msg.Metadata); err != nil {
		return nil, err
	}
	return append(args,
		UUIDHeaderKey, msg.UUID,
		metadataField, packMetadata(msg.Metadata),
		payloadField, []byte(msg.Payload),
	), nil
}

func (DefaultMarshaler) unmarshalFields(fields []string, create newMessage) (*message.Message, error) {
	uuid, ok := lookUp(fields, UUIDHeaderKey)
	if !ok {
		return nil, missing(UUIDHeaderKey, fields, BodyMarshaler{}.field(), "use BodyMarshaler for the format of goxstreams")
	}
	payload, _ := lookUp(fields, payloadField)
	metadata, _ := lookUp(fields, metadataField)
	msg := create(uuid, payload)
	if err := unpackMetadata(strings.Clone(metadata), msg.Metadata); err != nil {
		return nil, fmt.Errorf("field %q: %w", metadataField, err)
	}
	return msg, nil
}

// missing returns the error for an entry without the field. If it has the other
// format's field instead, the wrong Unmarshaler is most likely configured.
func missing(field string, fields []string, other, hint string) error {
	if _, ok := lookUp(fields, other); ok {
		return fmt.Errorf("field %q is missing, but field %q is present: %s", field, other, hint)
	}
	return fmt.Errorf("field %q is missing", field)
}

// lookUp returns the last value of a field.
func lookUp(fields []string, name string) (value string, ok bool) {
	for i := len(fields) - 2; i >= 0; i -= 2 {
		if fields[i] == name {
			return fields[i+1], true
		}
	}
	return "", false
}

// BodyMarshaler uses the wire format of goxstreams: the payload is one field, which
// a goxstreams consumer decodes as JSON. Unmarshal accepts any bytes there and
// ignores unknown fields; an entry without the field is malformed.
//
// MetadataField holds the metadata as a JSON object of strings, as goxstreams'
// WithCtxTransmmiter writes it. The UUID is part of it, under UUIDHeaderKey.
// Marshal always writes the field. It rejects metadata that JSON cannot represent
// (not UTF-8), and metadata with a value for UUIDHeaderKey. Unmarshal treats an
// absent or empty field as no metadata. If there is no UUID, the message's UUID is
// empty, and a Subscriber sets it to the entry's ID, which is the same at each
// delivery.
type BodyMarshaler struct {
	Field         string // the payload's field; empty: "body"
	MetadataField string // the metadata's field, which must differ from Field; empty: metadata and UUID are not stored
}

// Marshal implements Marshaler. It ignores the topic. The values are []byte; the
// payload shares the message's memory.
func (m BodyMarshaler) Marshal(_ string, msg *message.Message) (map[string]any, error) {
	return fieldMap(m.appendFields(nil, msg))
}

// Unmarshal implements Unmarshaler. Values may be strings or []byte.
func (m BodyMarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	names := []string{m.field()}
	if m.MetadataField != "" {
		names = append(names, m.MetadataField)
	}
	fields, err := pickFields(values, names...)
	if err != nil {
		return nil, err
	}
	return m.unmarshalFields(fields, newOwnMessage)
}

func (m BodyMarshaler) field() string { return cmp.Or(m.Field, "body") }

// marshaler checks a Marshaler or an Unmarshaler.
func (c *configErrors) marshaler(field string, m any) {
	if m, ok := m.(BodyMarshaler); ok {
		err := m.validate()
		c.addIf(err != nil, field, "%v", err)
	}
}

// validate is called by the constructors: if both used the same field, no entry
// could be read.
func (m BodyMarshaler) validate() error {
	if m.field() == m.MetadataField {
		return fmt.Errorf("BodyMarshaler: field %q cannot hold both payload and metadata", m.MetadataField)
	}
	return nil
}

func (m BodyMarshaler) appendFields(args []any, msg *message.Message) ([]any, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	args = append(args, m.field(), []byte(msg.Payload))
	if m.MetadataField == "" {
		return args, nil
	}
	metadata, err := metadataToJSON(msg)
	if err != nil {
		return nil, err
	}
	return append(args, m.MetadataField, metadata), nil
}

func (m BodyMarshaler) unmarshalFields(fields []string, create newMessage) (*message.Message, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	payload, ok := lookUp(fields, m.field())
	if !ok {
		return nil, missing(m.field(), fields, UUIDHeaderKey, "use DefaultMarshaler for this format")
	}
	msg := create("", payload)
	metadata, _ := lookUp(fields, m.MetadataField)
	if m.MetadataField == "" || metadata == "" {
		return msg, nil
	}
	if err := metadataFromJSON(metadata, msg); err != nil {
		return nil, fmt.Errorf("field %q: %w", m.MetadataField, err)
	}
	return msg, nil
}

func metadataToJSON(msg *message.Message) ([]byte, error) {
	if err := checkReserved(msg.Metadata); err != nil {
		return nil, err
	}
	object := make(map[string]string, len(msg.Metadata)+1)
	maps.Copy(object, msg.Metadata)
	if msg.UUID != "" {
		object[UUIDHeaderKey] = msg.UUID
	}
	// Package json would replace invalid UTF-8, and two keys could become the same.
	for key, value := range object {
		if !utf8.ValidString(key) || !utf8.ValidString(value) {
			return nil, fmt.Errorf("metadata key %q or its value is not UTF-8: JSON cannot hold it", key)
		}
	}
	return json.Marshal(object)
}

func metadataFromJSON(s string, msg *message.Message) error {
	var object map[string]string
	if err := json.Unmarshal([]byte(s), &object); err != nil {
		return redactedJSON(err)
	}
	msg.UUID = object[UUIDHeaderKey]
	delete(object, UUIDHeaderKey)
	if object != nil { // nil after a JSON null
		msg.Metadata = object
	}
	return nil
}
