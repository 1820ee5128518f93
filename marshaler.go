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

// UUIDHeaderKey is the name under which a message's UUID is stored. Metadata
// cannot use it.
const UUIDHeaderKey = "_watermill_message_uuid"

const (
	metadataField = "metadata"
	payloadField  = "payload"
)

// Marshaler turns a message into the fields of a stream entry. Its methods are
// called concurrently.
//
// A value is what go-redis can write: a string, []byte, number, bool,
// time.Time, time.Duration, net.IP, or an encoding.BinaryMarshaler; nil is
// stored as the empty string. The fields are stored in the order of their
// names. At least one is needed: Redis has no entry without fields. An error
// makes Publish store nothing of its call. Marshal must not change msg; what it
// returns may share memory with it.
type Marshaler interface {
	Marshal(topic string, msg *message.Message) (map[string]any, error)
}

// Unmarshaler turns the fields of a stream entry back into a message. Its
// methods are called concurrently.
//
// Every value is a string, and may hold any bytes; of fields with the same name
// the last one counts. The map is the Unmarshaler's to keep. A message with an
// empty UUID gets the entry's ID for one. An entry for which Unmarshal returns
// an error or no message, or panics, is broken: see SubscriberConfig.OnBroken.
type Unmarshaler interface {
	Unmarshal(values map[string]any) (*message.Message, error)
}

// appendFields appends the fields of msg's entry to args as name, value, ..., each
// value of a type that go-redis can write. Their order does not vary between
// messages with the same names: Redis then stores the names of a stream node's
// entries once.
//
// Our own marshalers are spared the map. They are told by their type: a method
// would be promoted into a type that embeds one of them, and pass by the
// Marshal which that type defines.
func appendFields(args []any, m Marshaler, topic string, msg *message.Message) ([]any, error) {
	if msg == nil {
		return nil, errors.New("the message is nil")
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
		return nil, fmt.Errorf("%T returned no fields: Redis has no entry without any", m)
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

// writable returns v as a type that go-redis writes without an error. go-redis
// itself finds out in the middle of a pipeline, where the error hits other
// calls too.
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

// unmarshalFields makes a message of an entry's fields: name, value, ... The
// message's metadata is not nil.
func unmarshalFields(u Unmarshaler, fields []string) (*message.Message, error) {
	if len(fields)%2 != 0 {
		return nil, fmt.Errorf("the entry has %d names and values, an odd number", len(fields))
	}
	switch u := u.(type) {
	case DefaultMarshaler:
		return u.unmarshalFields(fields)
	case BodyMarshaler:
		return u.unmarshalFields(fields)
	}
	values := make(map[string]any, len(fields)/2)
	for i := 0; i < len(fields); i += 2 {
		values[strings.Clone(fields[i])] = strings.Clone(fields[i+1]) // see DefaultMarshaler's
	}
	return unmarshalCustom(u, values)
}

// unmarshalCustom calls an Unmarshaler that we did not write.
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
		// Not made by message.NewMessage: its Ack would reach nobody, its
		// Metadata.Set would panic.
		msg = msg.CopyWithContext()
	}
	return msg, nil
}

// pickFields returns the fields of these names that values has, as name, value,
// ... A nil value is an absent field.
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
			return nil, fmt.Errorf("field %q: want a string or []byte, have a %T", name, value)
		}
	}
	return fields, nil
}

// fieldMap makes of name, value, ... what Marshaler returns.
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

// DefaultMarshaler speaks the wire format of watermill-redisstream, byte for
// byte, so that both can share a stream. An entry has three fields:
//
//   - UUIDHeaderKey: the message's UUID; an entry without this field is broken,
//   - "metadata": a MessagePack map of strings to strings, or empty if there is no metadata,
//   - "payload".
//
// Unmarshal takes an absent metadata or payload for an empty one, and ignores
// other fields. Marshal refuses metadata that has a value for UUIDHeaderKey.
// All strings may hold any bytes. The keys of the metadata are sorted, so that
// equal messages give equal entries.
type DefaultMarshaler struct{}

// Marshal implements Marshaler. The topic is not used, the values are a string
// and two []byte; that of the payload shares the message's memory.
func (m DefaultMarshaler) Marshal(_ string, msg *message.Message) (map[string]any, error) {
	return fieldMap(m.appendFields(nil, msg))
}

// Unmarshal implements Unmarshaler. Values may be strings or []byte.
func (m DefaultMarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	fields, err := pickFields(values, UUIDHeaderKey, metadataField, payloadField)
	if err != nil {
		return nil, err
	}
	return m.unmarshalFields(fields)
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

func (DefaultMarshaler) unmarshalFields(fields []string) (*message.Message, error) {
	var (
		uuid, metadata, payload string
		hasUUID                 bool
	)
	for i := 0; i < len(fields); i += 2 {
		switch value := fields[i+1]; fields[i] {
		case UUIDHeaderKey:
			uuid, hasUUID = value, true
		case metadataField:
			metadata = value
		case payloadField:
			payload = value
		}
	}
	if !hasUUID {
		return nil, missing(UUIDHeaderKey, fields, BodyMarshaler{}.field(), "BodyMarshaler reads what goxstreams wrote")
	}
	// The fields are parts of what was read with many others, which a message that
	// is kept must not keep.
	msg := message.NewMessage(strings.Clone(uuid), []byte(payload))
	if err := unpackMetadata(strings.Clone(metadata), msg.Metadata); err != nil {
		return nil, fmt.Errorf("field %q: %w", metadataField, err)
	}
	return msg, nil
}

// missing is the error for an entry without the field. One that has another
// format's field instead was most likely given to the wrong Unmarshaler.
func missing(field string, fields []string, other, hint string) error {
	for i := 0; i < len(fields); i += 2 {
		if fields[i] == other {
			return fmt.Errorf("field %q is missing, but there is %q: %s", field, other, hint)
		}
	}
	return fmt.Errorf("field %q is missing", field)
}

// BodyMarshaler speaks the wire format of goxstreams: the payload is one field,
// which a goxstreams consumer decodes as JSON. Unmarshal takes any bytes there,
// and ignores fields it does not know; an entry without the field is broken.
//
// MetadataField is where the metadata goes, as a JSON object of strings: what
// goxstreams' WithCtxTransmmiter writes. The UUID goes with it, under
// UUIDHeaderKey. Marshal always writes the field, and refuses what JSON cannot
// hold (metadata that is not UTF-8) and metadata that has a value for
// UUIDHeaderKey. Unmarshal takes an absent or empty field for no metadata. A
// message that comes without a UUID has an empty one, for which a Subscriber
// sets the entry's ID: that is the same at each delivery.
type BodyMarshaler struct {
	Field         string // the payload's field; empty: "body"
	MetadataField string // the metadata's field, another one; empty: metadata and UUID are not stored
}

// Marshal implements Marshaler. The topic is not used, the values are []byte;
// that of the payload shares the message's memory.
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
	return m.unmarshalFields(fields)
}

func (m BodyMarshaler) field() string { return cmp.Or(m.Field, "body") }

// validate is for the constructors: with one field for both, no entry could be
// read.
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

func (m BodyMarshaler) unmarshalFields(fields []string) (*message.Message, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	var (
		field, payload, metadata string
		hasPayload               bool
	)
	field = m.field()
	for i := 0; i < len(fields); i += 2 {
		switch value := fields[i+1]; fields[i] {
		case field:
			payload, hasPayload = value, true
		case m.MetadataField:
			metadata = value
		}
	}
	if !hasPayload {
		return nil, missing(field, fields, UUIDHeaderKey, "DefaultMarshaler reads that")
	}
	msg := message.NewMessage("", []byte(payload))
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
	// Package json would replace what is not UTF-8, and two keys could become
	// one.
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
	if object != nil { // it is after JSON's null
		msg.Metadata = object
	}
	return nil
}
