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
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// DeadLetterTopic returns the default dead-letter stream of a topic:
// "orders.dead{orders}" for "orders". The braces are a Redis Cluster hash tag: they
// put both streams in one slot, which an atomic move requires. A topic that has a
// hash tag keeps it: "a{b}c.dead" for "a{b}c". The name starts with the topic, so
// that one ACL key pattern covers both streams.
//
// A topic that contains a "}" but has no hash tag has no such name: in a Cluster,
// Subscribe rejects it unless SubscriberConfig.DeadLetterTopic returns one.
func DeadLetterTopic(topic string) string { return xstream.Beside(topic, "dead") }

// DeadLetter is a middleware that moves messages to a dead-letter stream at once,
// depending on the handler's error, and chooses that stream. Without it, messages
// are dead-lettered when they are out of retries or their error is Permanent. Its
// position relative to Retry makes no difference.
type DeadLetter struct {
	// ShouldDeadLetter reports whether an error makes the message dead. Default:
	// IsDead, which adds nothing to what Retry dead-letters; use it to set Topic
	// only.
	ShouldDeadLetter func(error) bool

	// Topic returns the dead-letter stream for the message's topic. It applies to
	// errors for which ShouldDeadLetter is true; the innermost DeadLetter wins. In
	// a Cluster it must hash to the same slot as the topic, otherwise the
	// subscription's own stream is used and an error is logged. Default, also for
	// an empty result: SubscriberConfig.DeadLetterTopic.
	//
	// Messages that die without a handler's error go to the subscription's own
	// dead-letter stream: malformed entries, and messages that crashed too many
	// processes.
	Topic func(topic string) string
}

// Middleware wraps a handler. What Retry.Middleware says of nacks, Permanent, Snooze,
// shutdowns and other Subscribers' messages is true here, too. IsDead is true for the
// error that the middleware returns; its text is unchanged. If the message is acked in
// spite of it (InstantAck), it is not dead-lettered.
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
	if (v.fate == "" || v.fate == OutcomeRetried) && l.matches(err) {
		err = v.die(Filtered, err, ErrDead)
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

// BrokenMessage is a malformed entry: one that could not be unmarshaled.
type BrokenMessage struct {
	Topic string
	ID    string // the entry's ID

	// Fields are the entry's names and values in turn, in stream order, including
	// duplicate names and binary values.
	Fields []string

	RetryCount int64 // earlier deliveries
	Err        error // why it could not be unmarshaled; matches ErrBroken
}

// DeadKind says why a message died.
type DeadKind string

// Reasons why a message dies.
const (
	Exhausted        DeadKind = "exhausted" // out of retries, because of failures or crashes
	PermanentFailure DeadKind = "permanent" // its error was marked as permanent
	Broken           DeadKind = "broken"    // it could not be unmarshaled
	Filtered         DeadKind = "filtered"  // chosen by DeadLetter.ShouldDeadLetter
)

// String returns the kind as stored in the dead letter's metadata.
func (k DeadKind) String() string { return string(k) }

// DeadMessage is a message that was moved to the dead-letter stream.
type DeadMessage struct {
	ID      string // its ID in the dead-letter stream
	EntryID string // its ID in the topic
	Topic   string
	Group   string

	Consumer   string // the consumer that moved it
	Handler    string // the router's name of the handler; empty without a router
	Reason     string // the error's text, at most 1 KiB
	Kind       DeadKind
	Deliveries int64
	Replays    int       // number of earlier replays
	DiedAt     time.Time // by the clock of the process that moved it

	// Message is the message as it was published. It is nil if the entry is
	// malformed, and if the crash limit was reached and the Unmarshaler is not one
	// of this library's, since that Unmarshaler may have caused the crashes. A
	// message from a DeadLetterQueue lacks the metadata keys that a dead letter
	// adds, even if the published message had them; Fields is complete.
	Message *message.Message

	Fields []string // the original entry: name, value, ...
}

// Metadata keys of a dead letter, in addition to Watermill's four poison keys
// (reason_poisoned, topic_poisoned, handler_poisoned, subscriber_poisoned).
const (
	DeadEntryIDKey    = "goxstreams_entry_id"
	DeadGroupKey      = "goxstreams_group"
	DeadConsumerKey   = "goxstreams_consumer"
	DeadKindKey       = "goxstreams_kind"
	DeadDeliveriesKey = "goxstreams_deliveries"
	DeadDiedAtKey     = "goxstreams_died_at" // RFC 3339, UTC
	DeadReplaysKey    = "goxstreams_replays" // absent: 0
)

var deadKeys = []string{
	middleware.ReasonForPoisonedKey, middleware.PoisonedTopicKey, middleware.PoisonedHandlerKey, middleware.PoisonedSubscriberKey,
	DeadEntryIDKey, DeadGroupKey, DeadConsumerKey, DeadKindKey, DeadDeliveriesKey, DeadDiedAtKey, DeadReplaysKey,
}

// deadFieldsField holds the packed original fields in an entry of a dead-letter
// stream. It also tells every Subscriber that the entry has DefaultMarshaler's
// format, whatever the topic's format is.
const deadFieldsField = "_goxstreams_fields"

// maxReason is the maximum length of the error's text in a dead letter, in bytes.
const maxReason = 1024

// isDeadLetter reports whether letter made these fields.
func isDeadLetter(fields []string) bool {
	return len(fields) >= 8 && fields[6] == deadFieldsField
}

// deadMessage describes a dead entry before it is moved.
func (s *subscription) deadMessage(h *consume.Task, fields []string) DeadMessage {
	death := deathOf(h)
	fields, replays, _ := cutReplay(fields)
	d := DeadMessage{
		EntryID: h.ID, Topic: s.topic, Group: s.cfg.ConsumerGroup, Consumer: s.Consumer(),
		Handler: cmp.Or(death.handler, s.typed.name), Reason: shorten(death.err.Error()), Kind: death.kind, Deliveries: cmp.Or(death.deliveries, h.Count()),
		DiedAt: time.Now().UTC().Truncate(time.Millisecond), Replays: replays, Fields: fields,
	}
	safe := s.typed.dead != nil && !s.diedTooOften(h) // a crash then counts as one in the worker's ProcessDead
	switch s.cfg.Unmarshaler.(type) {
	case DefaultMarshaler, BodyMarshaler:
		safe = true
	}
	if death.kind == Broken || death.crashed && !safe {
		return d
	}
	// Unmarshal again: the handler may have changed its message.
	if msg, err := s.message(h, fields); err == nil {
		d.Message = msg
	}
	return d
}

// letter returns the dead letter's fields: a message that Watermill can read, with
// the details in its metadata, and the original fields. If the message cannot be
// unmarshaled, the payload is the packed fields (see UnpackFields) and the UUID is
// the entry's ID.
func (d DeadMessage) letter() []string {
	packed := packFields(d.Fields)
	msg := message.NewMessage(d.EntryID, message.Payload(packed))
	if d.Message != nil {
		msg = d.Message.Copy()
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
	delete(msg.Metadata, UUIDHeaderKey) // another library's: DefaultMarshaler would reject the message if it were published again
	return []string{
		UUIDHeaderKey, msg.UUID, metadataField, string(packMetadata(msg.Metadata)), payloadField, string(msg.Payload),
		deadFieldsField, packed,
	}
}

// marks returns parts of the letter's packed metadata by which the dead letter can
// be found again. The last one names the consumer that moved it.
func (d DeadMessage) marks() []string {
	return []string{
		packPair(DeadEntryIDKey, d.EntryID), packPair(DeadGroupKey, d.Group), packPair(middleware.PoisonedTopicKey, d.Topic),
		packPair(DeadConsumerKey, d.Consumer),
	}
}

// readLetter is the inverse of letter.
func readLetter(e xstream.Entry) (DeadMessage, error) {
	if !isDeadLetter(e.Fields) {
		return DeadMessage{ID: e.ID, Fields: e.Fields}, fmt.Errorf("entry %s is not a dead letter of this library", e.ID)
	}
	msg, err := DefaultMarshaler{}.unmarshalFields(e.Fields, newOwnMessage)
	var fields []string
	if err == nil {
		fields, err = UnpackFields([]byte(e.Fields[7]))
	}
	if err != nil {
		return DeadMessage{ID: e.ID, Fields: e.Fields}, fmt.Errorf("entry %s is a malformed dead letter: %w", e.ID, err)
	}
	get := msg.Metadata.Get
	d := DeadMessage{
		ID: e.ID, EntryID: get(DeadEntryIDKey), Topic: get(middleware.PoisonedTopicKey), Group: get(DeadGroupKey),
		Consumer: get(DeadConsumerKey), Handler: get(middleware.PoisonedHandlerKey),
		Reason: get(middleware.ReasonForPoisonedKey), Kind: DeadKind(get(DeadKindKey)), Fields: fields,
	}
	// Invalid numbers and times were not written by this library: they read as
	// zero.
	d.Deliveries, _ = strconv.ParseInt(get(DeadDeliveriesKey), 10, 64)
	d.Replays, _ = strconv.Atoi(get(DeadReplaysKey))
	d.DiedAt, _ = time.Parse(time.RFC3339Nano, get(DeadDiedAtKey))
	if msg.UUID == d.EntryID && string(msg.Payload) == e.Fields[7] {
		return d, nil // the letter has no message: see letter
	}
	for _, key := range deadKeys {
		delete(msg.Metadata, key)
	}
	d.Message = msg
	return d, nil
}

// replayField is the last field of a replayed entry. Its value is the number of
// replays, a space, and the group that it is for; an empty group means all groups.
const replayField = "_goxstreams_replay"

func replayMark(replays int, group string) []string {
	return []string{replayField, strconv.Itoa(replays) + " " + group}
}

// cutReplay returns the published fields, the number of replays, and the group that
// the replay is for.
func cutReplay(fields []string) (published []string, replays int, group string) {
	n := len(fields) - 2
	if n < 0 || fields[n] != replayField {
		return fields, 0, ""
	}
	number, group, ok := strings.Cut(fields[n+1], " ")
	replays, err := strconv.Atoi(number)
	if !ok || err != nil || replays < 1 || replays >= math.MaxInt32 { // forged; also, replays+1 must not overflow
		return fields, 0, ""
	}
	return fields[:n:n], replays, group
}

// shorten cuts a text to at most maxReason bytes, at a character boundary.
func shorten(s string) string {
	if len(s) <= maxReason {
		return s
	}
	end := maxReason
	for end > maxReason-utf8.UTFMax && !utf8.RuneStart(s[end]) { // invalid UTF-8 may have no rune start
		end--
	}
	return s[:end]
}
