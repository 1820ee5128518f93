package goxstreams

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
)

// DeadLetterTopic returns the default name of a topic's dead-letter stream:
// "orders.dead{orders}" for "orders". The braces are a Redis Cluster hash tag:
// they put both streams in one slot, which moving an entry in one step needs.
// A topic with a tag of its own keeps it: "a{b}c.dead" for "a{b}c". The name
// begins with the topic, so that a key pattern of an ACL covers both.
//
// A topic with a "}" but no tag has no such name; on Cluster, Subscribe refuses
// it unless SubscriberConfig.DeadLetterTopic knows one.
func DeadLetterTopic(topic string) string {
	if hasHashTag(topic) {
		return topic + ".dead"
	}
	return topic + ".dead{" + topic + "}"
}

// hasHashTag is Redis's rule: what stands between the first "{" and the first
// "}" after it, if that is not empty.
func hasHashTag(key string) bool {
	_, rest, ok := strings.Cut(key, "{")
	return ok && strings.Index(rest, "}") > 0
}

// BrokenMessage is an entry that could not be unmarshaled.
type BrokenMessage struct {
	Topic string
	ID    string // the entry's

	// Fields are the entry's names and values in turn, in the stream's order,
	// duplicates and binary values as they are.
	Fields []string

	RetryCount int64 // deliveries before this one
	Err        error // why; matches ErrBroken
}

// DeadKind says how a message died.
type DeadKind string

// The kinds of death.
const (
	Exhausted DeadKind = "exhausted" // the retries are used up, by failures or by crashes
	Permanent DeadKind = "permanent" // its error said that trying again is of no use
	Broken    DeadKind = "broken"    // it could not be unmarshaled
	Filtered  DeadKind = "filtered"  // DeadLetter.ShouldDeadLetter chose it
)

// String returns the kind as it stands in the dead letter's metadata.
func (k DeadKind) String() string { return string(k) }

// DeadMessage is a message that was moved to the dead-letter stream.
type DeadMessage struct {
	ID      string // in the dead-letter stream
	EntryID string // in the topic
	Topic   string
	Group   string

	Consumer   string // the one that moved it
	Handler    string // the router's name of the handler; empty without one
	Reason     string // the error's text, 1 KiB at most
	Kind       DeadKind
	Deliveries int64
	Replays    int
	DiedAt     time.Time // by this process's clock

	// Message is the message as it was published; nil if the entry is broken,
	// and where a crash limit was reached with an Unmarshaler that is not this
	// library's, which might be what crashed.
	Message *message.Message

	Fields []string // the entry as it was: name, value, ..
}

// Metadata of a dead letter, beside Watermill's four poison keys
// (reason_poisoned, topic_poisoned, handler_poisoned, subscriber_poisoned).
const (
	DeadEntryIDKey    = "goxstreams_entry_id"
	DeadGroupKey      = "goxstreams_group"
	DeadConsumerKey   = "goxstreams_consumer"
	DeadKindKey       = "goxstreams_kind"
	DeadDeliveriesKey = "goxstreams_deliveries"
	DeadDiedAtKey     = "goxstreams_died_at" // RFC 3339, UTC
)

// deadFieldsField holds the original fields, packed, in an entry of a
// dead-letter stream. It is also the mark by which every Subscriber knows that
// the entry has DefaultMarshaler's format, whatever the topic's is.
const deadFieldsField = "_goxstreams_fields"

// maxReason bounds the error's text in a dead letter.
const maxReason = 1024

// isDeadLetter reports whether the fields are those that letter makes.
func isDeadLetter(fields []string) bool {
	return len(fields) >= 8 && fields[6] == deadFieldsField
}

// deadMessage is what is known of a dead entry before it is moved.
func (s *subscription) deadMessage(h *held, fields []string) DeadMessage {
	d := DeadMessage{
		EntryID: h.id, Topic: s.topic, Group: s.stream.group, Consumer: s.stream.consumer,
		Reason: shorten(h.doom.err.Error()), Kind: h.doom.kind, Deliveries: h.count,
		DiedAt: time.Now().UTC().Truncate(time.Millisecond), Fields: fields,
	}
	if h.doom.msg != nil {
		d.Handler = message.HandlerNameFromCtx(h.doom.msg.Context())
	}
	safe := false
	switch s.cfg.Unmarshaler.(type) {
	case DefaultMarshaler, BodyMarshaler:
		safe = true
	}
	if h.doom.kind == Broken || h.doom.crashed && !safe {
		return d
	}
	// Unmarshaled once more: the handler may have changed what it was given.
	if msg, err := unmarshalFields(s.cfg.Unmarshaler, fields); err == nil {
		if msg.UUID == "" {
			msg.UUID = h.id
		}
		d.Message = msg
	}
	return d
}

// letter returns the dead letter's fields: a message that Watermill can read,
// with the story in its metadata, and the original fields. A message that
// cannot be unmarshaled is represented by its packed fields as the payload
// (see UnpackFields), under the entry's ID.
func (d DeadMessage) letter() []any {
	msg := message.NewMessage(d.EntryID, nil)
	packed := packFields(d.Fields)
	if d.Message != nil {
		msg = d.Message.Copy()
	} else {
		msg.Payload = message.Payload(packed)
	}
	for key, value := range map[string]string{
		middleware.ReasonForPoisonedKey:  d.Reason,
		middleware.PoisonedTopicKey:      d.Topic,
		middleware.PoisonedHandlerKey:    d.Handler,
		middleware.PoisonedSubscriberKey: subscriberName,
		DeadEntryIDKey:                   d.EntryID,
		DeadGroupKey:                     d.Group,
		DeadConsumerKey:                  d.Consumer,
		DeadKindKey:                      d.Kind.String(),
		DeadDeliveriesKey:                strconv.FormatInt(d.Deliveries, 10),
		DeadDiedAtKey:                    d.DiedAt.Format(time.RFC3339Nano),
	} {
		msg.Metadata.Set(key, value)
	}
	// A UUID key in the metadata was refused when the message was published by
	// this library; a foreign one's must not make it immortal.
	delete(msg.Metadata, UUIDHeaderKey)
	fields, err := DefaultMarshaler{}.marshalFields(msg)
	if err != nil {
		panic(fmt.Sprintf("goxstreams: DefaultMarshaler refuses a dead letter: %v", err)) // its only reason was removed
	}
	return append(fields, deadFieldsField, packed)
}

// shorten cuts a text to maxReason bytes, not within a character.
func shorten(s string) string {
	if len(s) <= maxReason {
		return s
	}
	s = s[:maxReason]
	for len(s) > 0 {
		if r, size := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || size > 1 {
			break
		}
		s = s[:len(s)-1]
	}
	return s
}
