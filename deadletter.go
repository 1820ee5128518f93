package goxstreams

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/goxstreams/watermill-goxstreams/internal/consume"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
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
	if redisx.HashTag(topic) != "" {
		return topic + ".dead"
	}
	return topic + ".dead{" + topic + "}"
}

// DeadLetter is a middleware that chooses, by a handler's error, what goes to the
// dead-letter stream at once, and where that is. Without it dead is what used its
// retries up, and what Permanent marked. It stands inside or outside of Retry, to
// the same effect.
type DeadLetter struct {
	// ShouldDeadLetter says whether the message is dead, by its handler's error.
	// Default: IsDead, which adds nothing to Retry: for the sake of Topic.
	ShouldDeadLetter func(error) bool

	// Topic names the dead-letter stream, given the message's topic, for the
	// errors that ShouldDeadLetter is true for; of several the innermost. On
	// Cluster it must be in one slot with the topic, or the subscription's own
	// is used, with an error in the log. Default, and for an empty name:
	// SubscriberConfig.DeadLetterTopic's.
	//
	// What dies without its handler goes to the subscription's dead-letter
	// stream: broken entries, and messages that crashed too many processes.
	Topic func(topic string) string
}

// Middleware applies it to a handler. The decision is carried out when the
// message is nacked; IsDead is true for the error that it passes up, the text of
// which stays the same. If another middleware swallows that error, or has acked
// the message before (InstantAck), there is no dead letter. Permanent and Snooze
// are obeyed here too, and a shutdown is no failure: see Retry.Middleware.
//
// Messages of other Subscribers, and copies of ours, pass through unchanged.
func (l DeadLetter) Middleware(h message.HandlerFunc) message.HandlerFunc {
	others := bystander{name: "DeadLetter"}
	return func(msg *message.Message) ([]*message.Message, error) {
		d := deliveryOf(msg)
		if d == nil {
			others.pass(msg)
			return h(msg)
		}
		return d.judged(h, l.judge)
	}
}

func (l DeadLetter) judge(d *deliveryContext, err error) error {
	v, err := d.consider(err)
	v.letters = append(slices.Clone(v.letters), l)
	if (v.fate == undecided || v.fate == again) && l.matches(err) {
		v.fate, v.kind = dead, Filtered
		err = mark(err, ErrDead)
	}
	d.verdict.Store(v)
	return err
}

func (l DeadLetter) matches(err error) bool {
	if l.ShouldDeadLetter == nil {
		return IsDead(err)
	}
	return l.ShouldDeadLetter(err)
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
	Exhausted        DeadKind = "exhausted" // the retries are used up, by failures or by crashes
	PermanentFailure DeadKind = "permanent" // its error said that trying again is of no use
	Broken           DeadKind = "broken"    // it could not be unmarshaled
	Filtered         DeadKind = "filtered"  // DeadLetter.ShouldDeadLetter chose it
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
	Replays    int       // how often it was replayed before
	DiedAt     time.Time // by this process's clock

	// Message is the message as it was published; nil if the entry is broken,
	// and where a crash limit was reached with an Unmarshaler that is not this
	// library's, which might be what crashed. From a DeadLetterQueue it is
	// without the metadata keys that a dead letter adds, also where the
	// published message had them; Fields has all.
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
	DeadReplaysKey    = "goxstreams_replays" // absent: none
)

var deadKeys = []string{
	middleware.ReasonForPoisonedKey, middleware.PoisonedTopicKey, middleware.PoisonedHandlerKey, middleware.PoisonedSubscriberKey,
	DeadEntryIDKey, DeadGroupKey, DeadConsumerKey, DeadKindKey, DeadDeliveriesKey, DeadDiedAtKey, DeadReplaysKey,
}

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
func (s *subscription) deadMessage(h *consume.Task, fields []string) DeadMessage {
	death := deathOf(h)
	fields, replays, _ := cutReplay(fields)
	d := DeadMessage{
		EntryID: h.ID, Topic: s.topic, Group: s.cfg.ConsumerGroup, Consumer: s.Consumer(),
		Handler: death.handler, Reason: shorten(death.err.Error()), Kind: death.kind, Deliveries: cmp.Or(death.deliveries, h.Count()),
		DiedAt: time.Now().UTC().Truncate(time.Millisecond), Replays: replays, Fields: fields,
	}
	if d.Handler == "" && s.typed != nil {
		d.Handler = s.typed.name
	}
	safe := s.typed != nil && !s.diedTooOften(h) // a crash counts as one of its worker's
	switch s.cfg.Unmarshaler.(type) {
	case DefaultMarshaler, BodyMarshaler:
		safe = true
	}
	if death.kind == Broken || death.crashed && !safe {
		return d
	}
	// Unmarshaled once more: the handler may have changed what it was given.
	if msg, err := s.message(h, fields); err == nil {
		d.Message = msg
	}
	return d
}

// letter returns the dead letter's fields: a message that Watermill can read,
// with the story in its metadata, and the original fields. A message that
// cannot be unmarshaled is represented by its packed fields as the payload
// (see UnpackFields), under the entry's ID.
func (d DeadMessage) letter() []string {
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
		DeadKindKey:                      string(d.Kind),
		DeadDeliveriesKey:                strconv.FormatInt(d.Deliveries, 10),
		DeadDiedAtKey:                    d.DiedAt.Format(time.RFC3339Nano),
	} {
		msg.Metadata.Set(key, value)
	}
	if delete(msg.Metadata, DeadReplaysKey); d.Replays > 0 {
		msg.Metadata.Set(DeadReplaysKey, strconv.Itoa(d.Replays))
	}
	// A UUID key in the metadata was refused when the message was published by
	// this library; a foreign one's must not make it immortal.
	delete(msg.Metadata, UUIDHeaderKey)
	fields, err := DefaultMarshaler{}.appendFields(nil, msg)
	if err != nil {
		panic(fmt.Sprintf("goxstreams: DefaultMarshaler refuses a dead letter: %v", err)) // its only reason was removed
	}
	letter := make([]string, 0, len(fields)+2)
	for _, f := range fields {
		if b, ok := f.([]byte); ok {
			letter = append(letter, string(b))
		} else {
			letter = append(letter, fmt.Sprint(f))
		}
	}
	return append(letter, deadFieldsField, packed)
}

// marks returns what the letter's metadata has in it, by which it can be found: the last
// one says who has moved it.
func (d DeadMessage) marks() []string {
	return []string{
		packPair(DeadEntryIDKey, d.EntryID), packPair(DeadGroupKey, d.Group), packPair(middleware.PoisonedTopicKey, d.Topic),
		packPair(DeadConsumerKey, d.Consumer),
	}
}

// readLetter is letter's inverse.
func readLetter(e xstream.Entry) (DeadMessage, error) {
	if !isDeadLetter(e.Fields) {
		return DeadMessage{ID: e.ID, Fields: e.Fields}, fmt.Errorf("entry %s is no dead letter of this library", e.ID)
	}
	msg, err := DefaultMarshaler{}.unmarshalFields(e.Fields)
	var fields []string
	if err == nil {
		fields, err = UnpackFields([]byte(e.Fields[7]))
	}
	if err != nil {
		return DeadMessage{ID: e.ID, Fields: e.Fields}, fmt.Errorf("entry %s is a broken dead letter: %w", e.ID, err)
	}
	get := msg.Metadata.Get
	d := DeadMessage{
		ID: e.ID, EntryID: get(DeadEntryIDKey), Topic: get(middleware.PoisonedTopicKey), Group: get(DeadGroupKey),
		Consumer: get(DeadConsumerKey), Handler: get(middleware.PoisonedHandlerKey),
		Reason: get(middleware.ReasonForPoisonedKey), Kind: DeadKind(get(DeadKindKey)), Fields: fields,
	}
	// What is not a number, or no time, was not written here: zero.
	d.Deliveries, _ = strconv.ParseInt(get(DeadDeliveriesKey), 10, 64)
	d.Replays, _ = strconv.Atoi(get(DeadReplaysKey))
	d.DiedAt, _ = time.Parse(time.RFC3339Nano, get(DeadDiedAtKey))
	if msg.UUID == d.EntryID && string(msg.Payload) == e.Fields[7] {
		return d, nil // no message: see letter
	}
	for _, key := range deadKeys {
		delete(msg.Metadata, key)
	}
	d.Message = msg
	return d, nil
}

// replayField is the last field of an entry that was replayed. Its value is the
// number of replays, a space, and the group that it is for; no group: for all.
const replayField = "_goxstreams_replay"

func replayMark(replays int, group string) []string {
	return []string{replayField, strconv.Itoa(replays) + " " + group}
}

// cutReplay returns the fields as they were published, how often they were
// replayed, and the group that this is for.
func cutReplay(fields []string) (published []string, replays int, group string) {
	n := len(fields) - 2
	if n < 0 || fields[n] != replayField {
		return fields, 0, ""
	}
	number, group, ok := strings.Cut(fields[n+1], " ")
	replays, err := strconv.Atoi(number)
	if !ok || err != nil || replays < 1 || replays >= math.MaxInt32 { // forged; one more must be a number too
		return fields, 0, ""
	}
	return fields[:n:n], replays, group
}

// shorten cuts a text to maxReason bytes, not within a character.
func shorten(s string) string {
	if len(s) <= maxReason {
		return s
	}
	end := maxReason
	for end > maxReason-utf8.UTFMax && !utf8.RuneStart(s[end]) { // what is no text may have no beginning
		end--
	}
	return s[:end]
}
