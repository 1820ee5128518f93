package goxstreams_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
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

var (
	errBad   = errors.New("bad")
	errOther = errors.New("other")
)

// brief is grouped, with short blocking reads: the embedded server cannot wake one,
// so Close waits for it.
func brief(client redis.UniversalClient) goxstreams.SubscriberConfig {
	config := grouped(client)
	config.BlockTime = 50 * time.Millisecond
	return config
}

// settling settles messages as the router does: by the handler's error.
func settling(messages <-chan *message.Message, h message.HandlerFunc) {
	for msg := range messages {
		go func() {
			if _, err := h(msg); err != nil {
				msg.Nack()
			} else {
				msg.Ack()
			}
		}()
	}
}

// failing returns a handler that fails with the errors in turn, then succeeds,
// and the number of its calls.
func failing(errs ...error) (message.HandlerFunc, *atomic.Int64) {
	var calls atomic.Int64
	return func(*message.Message) ([]*message.Message, error) {
		if n := int(calls.Add(1)); n <= len(errs) {
			return nil, errs[n-1]
		}
		return nil, nil
	}, &calls
}

// always returns the same error often enough.
func always(err error) []error { return slices.Repeat([]error{err}, 20) }

// elsewhere is a DeadLetter.Topic in the topic's slot.
func elsewhere(name string) func(string) string {
	return func(topic string) string { return topic + "." + name + "{" + topic + "}" }
}

func isBad(err error) bool { return errors.Is(err, errBad) }

func queueOf(t testing.TB, client redis.UniversalClient, stream string) *goxstreams.DeadLetterQueue {
	t.Helper()
	q, err := goxstreams.NewDeadLetterQueue(client, stream)
	require.NoError(t, err)
	return q
}

// lettersIn returns everything in the dead-letter stream.
func lettersIn(t testing.TB, client redis.UniversalClient, stream string) []goxstreams.DeadMessage {
	t.Helper()
	var letters []goxstreams.DeadMessage
	for d, err := range queueOf(t, client, stream).All(context.Background(), "") {
		require.NoError(t, err)
		letters = append(letters, d)
	}
	return letters
}

// A rawEntry is an entry as XRANGE returns it, in order.
type rawEntry struct {
	id     string
	fields []string
}

func entriesOf(t testing.TB, client redis.UniversalClient, stream string) []rawEntry {
	t.Helper()
	rows, err := client.Do(context.Background(), "xrange", stream, "-", "+").Slice()
	require.NoError(t, err)
	entries := make([]rawEntry, len(rows))
	for i, row := range rows {
		pair := row.([]any)
		entries[i].id = pair[0].(string)
		for _, f := range pair[1].([]any) {
			entries[i].fields = append(entries[i].fields, f.(string))
		}
	}
	return entries
}

// TestDeadLetter_WithRetry: DeadLetter and Retry, in either order, with everything
// that a handler can return.
func TestDeadLetter_WithRetry(t *testing.T) {
	t.Parallel()
	const maxRetries = 2
	outcomes := []struct {
		name string
		errs []error
		bad  bool // what the custom filter is true for
		// Without that filter:
		kind  goxstreams.DeadKind // empty: it does not die
		calls int64
	}{
		{"exhausted", always(errOther), false, goxstreams.Exhausted, maxRetries + 1},
		{"permanent", []error{goxstreams.Permanent(errOther)}, false, goxstreams.PermanentFailure, 1},
		{"permanent and filtered", []error{goxstreams.Permanent(errBad)}, true, goxstreams.PermanentFailure, 1},
		{"filtered", always(fmt.Errorf("wrapped: %w", errBad)), true, goxstreams.Exhausted, maxRetries + 1},
		{"filtered at last", []error{errOther, errOther, errBad}, true, goxstreams.Exhausted, maxRetries + 1},
		{"no match", []error{errOther, errOther}, false, "", maxRetries + 1},
	}
	for _, tt := range outcomes {
		for _, inside := range []bool{true, false} {
			for _, custom := range []bool{true, false} {
				for _, routed := range []bool{true, false} {
					t.Run(fmt.Sprintf("%s/inside=%t/custom filter=%t/Topic=%t", tt.name, inside, custom, routed), func(t *testing.T) {
						t.Parallel()
						topic, client := topic(t), newClient(t)
						var deadLetter goxstreams.DeadLetter
						if custom {
							deadLetter.ShouldDeadLetter = isBad
						}
						if routed {
							deadLetter.Topic = elsewhere("bad")
						}
						retry := *quickRetry()
						retry.MaxRetries = maxRetries

						handler, calls := failing(tt.errs...)
						var up error // what is passed up last
						watch := func(h message.HandlerFunc) message.HandlerFunc {
							return func(msg *message.Message) ([]*message.Message, error) {
								out, err := h(msg)
								up = err
								return out, err
							}
						}
						var chain message.HandlerFunc
						if inside {
							chain = watch(retry.Middleware(deadLetter.Middleware(handler)))
						} else {
							chain = watch(deadLetter.Middleware(retry.Middleware(handler)))
						}
						sub := newSubscriber(t, brief(client))
						messages := subscribe(t, sub, topic)
						uuid := publish(t, client, topic, "payload")[0]
						go settling(messages, chain)

						kind, wantCalls := tt.kind, tt.calls
						if custom && tt.bad && kind == goxstreams.Exhausted && tt.name == "filtered" {
							kind, wantCalls = goxstreams.Filtered, 1
						}
						eventually(t, func() bool { s := stats(t, sub); return s.Dead+s.Acked == 1 })
						require.NoError(t, sub.Close())
						require.Equal(t, wantCalls, calls.Load())
						require.Empty(t, pendingOf(t, client, topic, testGroup))

						own, other := goxstreams.DeadLetterTopic(topic), elsewhere("bad")(topic)
						if kind == "" {
							require.NoError(t, up)
							require.Empty(t, lettersIn(t, client, own))
							require.Empty(t, lettersIn(t, client, other))
							return
						}
						require.True(t, goxstreams.IsDead(up), "IsDead is to be true for what is passed up")
						require.Equal(t, tt.errs[wantCalls-1].Error(), up.Error())
						if routed && (!custom || tt.bad) {
							own, other = other, own
						}
						require.Empty(t, lettersIn(t, client, other))
						letters := lettersIn(t, client, own)
						require.Len(t, letters, 1)
						assert.Equal(t, uuid, letters[0].Message.UUID)
						assert.Equal(t, kind, letters[0].Kind)
						assert.Equal(t, wantCalls, letters[0].Deliveries)
						assert.Equal(t, up.Error(), letters[0].Reason)
					})
				}
			}
		}
	}
}

// TestDeadLetter_Composition: chains other than one DeadLetter and one Retry.
func TestDeadLetter_Composition(t *testing.T) {
	t.Parallel()
	type mw = message.HandlerMiddleware
	deadLetter := func(filter func(error) bool, name string) mw {
		l := goxstreams.DeadLetter{ShouldDeadLetter: filter}
		if name != "" {
			l.Topic = elsewhere(name)
		}
		return l.Middleware
	}
	named := func(name func(string) string) mw { return goxstreams.DeadLetter{Topic: name}.Middleware }
	any, none := func(error) bool { return true }, func(error) bool { return false }
	swallow := func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) {
			_, _ = h(msg)
			return nil, nil
		}
	}
	for _, tt := range []struct {
		name       string
		chain      []mw // outermost first
		maxRetries int  // of the config
		errs       []error
		kind       goxstreams.DeadKind // empty: no dead letter
		where      string              // empty: the subscription's
		calls      int64
	}{
		{"of two that match the inner one", []mw{deadLetter(any, "outer"), deadLetter(any, "inner")}, 0, always(errOther), goxstreams.Filtered, "inner", 1},
		{"the outer one, if the inner does not match", []mw{deadLetter(isBad, "outer"), deadLetter(none, "inner")}, 0, always(errBad), goxstreams.Filtered, "outer", 1},
		{"the inner one, if the outer does not match", []mw{deadLetter(none, "outer"), deadLetter(isBad, "inner")}, 0, always(errBad), goxstreams.Filtered, "inner", 1},
		{"the inner one without a Topic leaves it to the outer", []mw{deadLetter(any, "outer"), deadLetter(any, "")}, 0, always(errOther), goxstreams.Filtered, "outer", 1},
		{"three around a Retry", []mw{deadLetter(any, "outer"), goxstreams.Retry{MaxRetries: 5}.Middleware, deadLetter(isBad, "middle"), deadLetter(none, "inner")}, 0, always(errBad), goxstreams.Filtered, "middle", 1},
		{"inside, asked again when Retry gives up", []mw{goxstreams.Retry{MaxRetries: -1}.Middleware, deadLetter(nil, "outer"), deadLetter(none, "inner")}, 0, always(errOther), goxstreams.Exhausted, "outer", 1},
		{"without Retry, the config's limit", []mw{deadLetter(nil, "dead")}, 2, always(errOther), goxstreams.Exhausted, "dead", 3},
		{"without Retry, no retries", []mw{deadLetter(nil, "dead")}, -1, always(errOther), goxstreams.Exhausted, "dead", 1},
		{"without Retry, Permanent", []mw{deadLetter(nil, "dead")}, 2, always(goxstreams.Permanent(errOther)), goxstreams.PermanentFailure, "dead", 1},
		{"without Retry, filtered", []mw{deadLetter(isBad, "bad")}, 2, always(errBad), goxstreams.Filtered, "bad", 1},
		{"without Retry, no match", []mw{deadLetter(isBad, "bad")}, 2, always(errOther), goxstreams.Exhausted, "", 3},
		{"a filter for exhausted ones", []mw{deadLetter(func(err error) bool { return errors.Is(err, goxstreams.ErrRetriesExhausted) }, "tired")}, 1, always(errOther), goxstreams.Exhausted, "tired", 2},
		{"that filter, and a permanent one", []mw{deadLetter(func(err error) bool { return errors.Is(err, goxstreams.ErrRetriesExhausted) }, "tired")}, 1, always(goxstreams.Permanent(errOther)), goxstreams.PermanentFailure, "", 1},
		{"no middleware, the config's limit", nil, 1, always(errOther), goxstreams.Exhausted, "", 2},
		{"Topic returns nothing", []mw{named(func(string) string { return "" })}, -1, always(errOther), goxstreams.Exhausted, "", 1},
		{"Topic returns the topic", []mw{named(func(topic string) string { return topic })}, -1, always(errOther), goxstreams.Exhausted, "", 1},
		{"a snoozed one is not filtered", []mw{deadLetter(any, "dead")}, 1, []error{goxstreams.Snooze(errBad, 0), goxstreams.Snooze(errBad, 0), goxstreams.Snooze(errBad, 0)}, "", "", 4},
		{"Watermill's Retry inside overcomes it", []mw{deadLetter(any, "dead"), middleware.Retry{MaxRetries: 3}.Middleware}, -1, []error{errBad, errBad}, "", "", 3},
		{"Watermill's Retry outside gives up", []mw{middleware.Retry{MaxRetries: 3}.Middleware, deadLetter(isBad, "bad")}, 5, always(errBad), goxstreams.Filtered, "bad", 1},
		{"swallowed outside", []mw{swallow, deadLetter(any, "dead")}, -1, always(errBad), "", "", 1},
		{"acked at once", []mw{middleware.InstantAck, deadLetter(any, "dead")}, -1, always(errBad), "", "", 1},
		{"acked at once inside", []mw{deadLetter(any, "dead"), middleware.InstantAck}, -1, always(goxstreams.Permanent(errBad)), "", "", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			topic, client, log := topic(t), newClient(t), newLogRecorder()
			var told atomic.Int64
			config := brief(client)
			config.Retry = quickRetry()
			config.Retry.MaxRetries = tt.maxRetries
			config.OnDead = func(context.Context, goxstreams.DeadMessage) { told.Add(1) }
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			handler, calls := failing(tt.errs...)
			for _, m := range slices.Backward(tt.chain) {
				handler = m(handler)
			}
			id := publish(t, client, topic, "payload")
			go settling(messages, handler)

			eventually(t, func() bool { s := stats(t, sub); return s.Dead+s.Acked == 1 })
			require.NoError(t, sub.Close())
			require.Empty(t, pendingOf(t, client, topic, testGroup))
			require.Equal(t, tt.calls, calls.Load())
			where := goxstreams.DeadLetterTopic(topic)
			if tt.where != "" {
				where = elsewhere(tt.where)(topic)
			}
			letters := lettersIn(t, client, where)
			for _, name := range []string{goxstreams.DeadLetterTopic(topic), elsewhere("inner")(topic), elsewhere("middle")(topic), elsewhere("outer")(topic), elsewhere("dead")(topic)} {
				if name != where {
					require.Empty(t, lettersIn(t, client, name))
				}
			}
			if tt.kind == "" {
				require.Empty(t, letters)
				require.Zero(t, told.Load())
				return
			}
			require.Len(t, letters, 1)
			require.Equal(t, id, []string{letters[0].Message.UUID})
			require.EqualValues(t, 1, told.Load())
			require.Equal(t, tt.kind, letters[0].Kind)
			isTopic := strings.Contains(strings.Join(log.Errors(), "\n"), "DeadLetter.Topic returned the message's own topic")
			require.Equal(t, tt.name == "Topic returns the topic", isTopic, "logged errors: %q", log.Errors())
		})
	}
}

// TestDeadLetter_OnDead: OnDead is called for every way to die, with the contents
// of the dead-letter stream.
func TestDeadLetter_OnDead(t *testing.T) {
	t.Parallel()
	ack := func(*message.Message) ([]*message.Message, error) { return nil, nil }
	fail := func(err error) message.HandlerFunc {
		return func(*message.Message) ([]*message.Message, error) { return nil, err }
	}
	for _, tt := range []struct {
		name    string
		handler message.HandlerFunc
		change  func(*goxstreams.SubscriberConfig)
		broken  bool
		crashed bool
		want    goxstreams.DeadMessage // Kind, Reason and Deliveries
		message bool                   // it can be unmarshaled
	}{
		{name: "exhausted", handler: fail(errOther), message: true,
			want: goxstreams.DeadMessage{Kind: goxstreams.Exhausted, Reason: "other", Deliveries: 2}},
		{name: "permanent", handler: fail(goxstreams.Permanent(errOther)), message: true,
			want: goxstreams.DeadMessage{Kind: goxstreams.PermanentFailure, Reason: "other", Deliveries: 1}},
		{name: "filtered", handler: fail(errBad), message: true,
			want: goxstreams.DeadMessage{Kind: goxstreams.Filtered, Reason: "bad", Deliveries: 1}},
		{name: "broken", handler: ack, broken: true,
			want: goxstreams.DeadMessage{Kind: goxstreams.Broken, Reason: `goxstreams: broken entry: field "_watermill_message_uuid" is missing`, Deliveries: 1}},
		{name: "broken, by OnBroken", handler: ack, broken: true,
			change: func(c *goxstreams.SubscriberConfig) {
				c.OnBroken = func(context.Context, goxstreams.BrokenMessage) error { return fmt.Errorf("no: %w", goxstreams.ErrDead) }
			},
			want: goxstreams.DeadMessage{Kind: goxstreams.Broken, Reason: `goxstreams: broken entry: field "_watermill_message_uuid" is missing`, Deliveries: 1}},
		{name: "crash", handler: ack, crashed: true, message: true,
			want: goxstreams.DeadMessage{Kind: goxstreams.Exhausted, Reason: "goxstreams: dead message: retries exhausted", Deliveries: 4}},
		{name: "crash, with an Unmarshaler that may be what crashes", handler: ack, crashed: true,
			change: func(c *goxstreams.SubscriberConfig) { c.Unmarshaler = panicking{} },
			want:   goxstreams.DeadMessage{Kind: goxstreams.Exhausted, Reason: "goxstreams: dead message: retries exhausted", Deliveries: 4}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if tt.crashed {
				testserver.RequireReal(t) // claims by idle time
			}
			topic, client := topic(t), newClient(t)
			told := make(chan goxstreams.DeadMessage, 10)
			config := brief(client)
			config.Retry = quickRetry()
			config.Retry.MaxRetries = 1
			config.OnDead = func(_ context.Context, d goxstreams.DeadMessage) { told <- d }
			if tt.change != nil {
				tt.change(&config)
			}
			fields := []string{"no message", "\x00\xff", "twice", "1", "twice", "2"}
			if !tt.broken {
				publish(t, client, topic, "payload")
				fields = entriesOf(t, client, topic)[0].fields
			} else {
				addRaw(t, client, topic, fields...)
			}
			entryID := entriesOf(t, client, topic)[0].id
			if tt.crashed { // as often as a message may crash its process
				createGroup(t, client, topic, testGroup)
				readAs(t, client, topic, testGroup, "crashed", 1)
				require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, "released", 0, entryID, "retrycount", 3, "justid").Err())
			}
			before := time.Now().Add(-time.Millisecond)
			sub := newSubscriber(t, config)
			go settling(subscribe(t, sub, topic), goxstreams.DeadLetter{ShouldDeadLetter: isBad}.Middleware(tt.handler))

			var dead goxstreams.DeadMessage
			select {
			case dead = <-told:
			case <-time.After(patience):
				require.FailNow(t, "OnDead is not called")
			}
			publish(t, client, topic, "sentinel") // after messages that may be redelivered
			eventually(t, func() bool { s := stats(t, sub); return s.Acked+s.Dead >= 2 })
			require.NoError(t, sub.Close())
			letters := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
			if tt.name == "exhausted" || tt.name == "permanent" || tt.name == "filtered" { // the sentinel dies as well
				require.Len(t, letters, 2)
				require.Len(t, told, 1)
			} else {
				require.Len(t, letters, 1)
				require.Empty(t, told)
			}

			letter := letters[0]
			assert.WithinRange(t, letter.DiedAt, before, time.Now())
			assert.Equal(t, time.UTC, letter.DiedAt.Location())
			assert.Contains(t, letter.Consumer, "-")
			if tt.message {
				require.NotNil(t, letter.Message)
				require.NotNil(t, dead.Message)
				assert.True(t, letter.Message.Equals(dead.Message), "%v is not %v", dead.Message, letter.Message)
				assert.Equal(t, "payload", string(letter.Message.Payload))
				assert.Empty(t, letter.Message.Metadata)
			} else {
				assert.Nil(t, letter.Message)
				assert.Nil(t, dead.Message)
			}
			letter.Message, dead.Message = nil, nil
			assert.Equal(t, letter, dead, "OnDead is told what is stored")
			want := tt.want
			want.ID, want.EntryID, want.Topic, want.Group, want.Fields = letter.ID, entryID, topic, testGroup, fields
			want.Consumer, want.DiedAt = letter.Consumer, letter.DiedAt
			assert.Equal(t, want, letter)
			assert.Equal(t, entriesOf(t, client, goxstreams.DeadLetterTopic(topic))[0].id, letter.ID)
		})
	}
}

// TestDeadLetter_Content: the message in a dead letter is the published one, byte
// for byte, whatever its handler did to it; with the details of its death.
func TestDeadLetter_Content(t *testing.T) {
	t.Parallel()
	binary := "\x00\xff\xfe \r\n$5\r\n\xc3"
	for _, tt := range []struct {
		name string
		msg  *message.Message
	}{
		{"plain", &message.Message{UUID: "uuid", Metadata: message.Metadata{"key": "value"}, Payload: []byte("payload")}},
		{"binary", &message.Message{UUID: binary, Metadata: message.Metadata{binary: binary, "": "", "empty": ""}, Payload: []byte(binary)}},
		{"empty", &message.Message{}},
		{"large", &message.Message{UUID: "uuid", Metadata: message.Metadata{"large": strings.Repeat("m", 1<<17)}, Payload: bytes.Repeat([]byte{0, 1, 0xff}, 1<<18)}},
		{"the keys of another middleware", &message.Message{UUID: "uuid", Metadata: message.Metadata{middleware.CorrelationIDMetadataKey: "c", "reason": "none"}, Payload: []byte("payload")}},
	} {
		for _, unmarshaler := range []goxstreams.Unmarshaler{goxstreams.DefaultMarshaler{}, panicking{}} { // ours, and one that is not
			t.Run(fmt.Sprintf("%s/%T", tt.name, unmarshaler), func(t *testing.T) {
				t.Parallel()
				topic, client := topic(t), newClient(t)
				config := brief(client)
				config.Consumer = "consumer"
				var consumer string
				config.Unmarshaler = unmarshaler
				config.Retry = quickRetry()
				config.Retry.MaxRetries = 1
				sub := newSubscriber(t, config)
				require.NoError(t, newPublisher(t, client).Publish(topic, tt.msg.Copy()))
				entry := entriesOf(t, client, topic)[0]

				router, err := message.NewRouter(message.RouterConfig{CloseTimeout: patience}, nil)
				require.NoError(t, err)
				router.AddConsumerHandler("the handler", topic, sub, func(msg *message.Message) error {
					consumer = delivery(t, msg).Consumer
					for i := range msg.Payload {
						msg.Payload[i] = '!'
					}
					msg.UUID, msg.Payload = "changed", append(msg.Payload, "changed"...)
					clear(msg.Metadata)
					msg.Metadata.Set("key", "changed")
					return errOther
				}).AddMiddleware(goxstreams.DeadLetter{}.Middleware)
				ended := make(chan error, 1)
				go func() { ended <- router.Run(context.Background()) }()
				stream := goxstreams.DeadLetterTopic(topic)
				eventually(t, func() bool { return len(sub.Stats()) == 1 && stats(t, sub).Dead == 1 })
				require.NoError(t, router.Close())
				require.NoError(t, <-ended)

				want := tt.msg.Copy()
				if want.UUID == "" {
					want.UUID = entry.id
				}
				letters := lettersIn(t, client, stream)
				require.Len(t, letters, 1)
				letter := letters[0]
				require.NotNil(t, letter.Message)
				assert.True(t, want.Equals(letter.Message), "%v", letter.Message)
				assert.Equal(t, entry.fields, letter.Fields)
				assert.Equal(t, "the handler", letter.Handler)
				assert.Regexp(t, "^consumer-.+", letter.Consumer)
				assert.Equal(t, consumer, letter.Consumer)
				assert.Equal(t, "other", letter.Reason)
				assert.EqualValues(t, 2, letter.Deliveries)
				assert.Equal(t, entry.id, letter.EntryID)

				// To a consumer of the stream it is the message with Watermill's
				// four keys, and ours.
				config.Consumer, config.Unmarshaler = "", goxstreams.BodyMarshaler{}
				msg := next(t, subscribe(t, newSubscriber(t, config), stream))
				msg.Ack()
				for key, value := range map[string]string{
					middleware.ReasonForPoisonedKey: "other", middleware.PoisonedTopicKey: topic,
					middleware.PoisonedHandlerKey: "the handler", middleware.PoisonedSubscriberKey: sub.String(),
					goxstreams.DeadEntryIDKey: entry.id, goxstreams.DeadGroupKey: testGroup, goxstreams.DeadConsumerKey: consumer,
					goxstreams.DeadKindKey: "exhausted", goxstreams.DeadDeliveriesKey: "2",
					goxstreams.DeadDiedAtKey: letter.DiedAt.Format(time.RFC3339Nano),
				} {
					assert.Equal(t, value, msg.Metadata.Get(key), key)
					delete(msg.Metadata, key)
				}
				assert.True(t, want.Equals(msg), "%v", msg)
			})
		}
	}
}

// withMetadata gives every message the metadata, as a foreign format might.
type withMetadata struct {
	goxstreams.DefaultMarshaler
	metadata message.Metadata
}

func (u withMetadata) Unmarshal(values map[string]any) (*message.Message, error) {
	msg, err := u.DefaultMarshaler.Unmarshal(values)
	if err == nil {
		maps.Copy(msg.Metadata, u.metadata)
	}
	return msg, err
}

// TestDeadLetter_ReservedMetadata: metadata that a message has under a dead
// letter's keys neither prevents the move nor changes the letter.
func TestDeadLetter_ReservedMetadata(t *testing.T) {
	t.Parallel()
	topic, client := topic(t), newClient(t)
	config := brief(client)
	u := withMetadata{metadata: message.Metadata{"key": "value"}}
	for _, key := range []string{
		goxstreams.UUIDHeaderKey, middleware.ReasonForPoisonedKey, middleware.PoisonedTopicKey, middleware.PoisonedHandlerKey,
		middleware.PoisonedSubscriberKey, goxstreams.DeadEntryIDKey, goxstreams.DeadGroupKey, goxstreams.DeadConsumerKey,
		goxstreams.DeadKindKey, goxstreams.DeadDeliveriesKey, goxstreams.DeadDiedAtKey, goxstreams.DeadReplaysKey,
	} {
		u.metadata[key] = "7"
	}
	config.Unmarshaler = u
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "payload")
	handler, _ := failing(goxstreams.Permanent(errBad))
	go settling(messages, goxstreams.DeadLetter{}.Middleware(handler))
	eventually(t, func() bool { return stats(t, sub).Dead == 1 }, "it cannot die")
	require.NoError(t, sub.Close())
	letters := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
	require.Len(t, letters, 1)
	entry := entriesOf(t, client, topic)[0]
	want := letters[0]
	want.Topic, want.Group, want.EntryID, want.Reason, want.Kind = topic, testGroup, entry.id, "bad", goxstreams.PermanentFailure
	want.Deliveries, want.Replays, want.Handler, want.Fields = 1, 0, "", entry.fields
	require.Equal(t, want, letters[0])
	require.Equal(t, message.Metadata{"key": "value"}, letters[0].Message.Metadata)
	require.WithinDuration(t, time.Now(), letters[0].DiedAt, time.Minute)
}

// TestDeadLetter_Reason: a long text is cut to 1 KiB, between two characters.
func TestDeadLetter_Reason(t *testing.T) {
	t.Parallel()
	const limit = 1024
	fill := func(n int) string { return strings.Repeat("x", n) }
	for _, tt := range []struct{ name, text, want string }{
		{"none", "", ""},
		{"just so", fill(limit), fill(limit)},
		{"one too many", fill(limit + 1), fill(limit)},
		{"just so, by a character", fill(limit-2) + "é", fill(limit-2) + "é"},
		{"a character across, of 2 bytes", fill(limit-1) + "é", fill(limit - 1)},
		{"of 3 bytes, 1 within", fill(limit-1) + "€", fill(limit - 1)},
		{"of 3 bytes, 2 within", fill(limit-2) + "€", fill(limit - 2)},
		{"of 4 bytes, 1 within", fill(limit-1) + "😀", fill(limit - 1)},
		{"of 4 bytes, 3 within", fill(limit-3) + "😀", fill(limit - 3)},
		{"at the boundary", fill(limit-4) + "😀😀", fill(limit-4) + "😀"},
		{"no text", strings.Repeat("\xff", 2*limit), strings.Repeat("\xff", limit)},
		{"a replacement character before", fill(limit-4) + "\ufffdé!", fill(limit-4) + "\ufffd"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			topic, client := topic(t), newClient(t)
			sub := newSubscriber(t, brief(client))
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "")
			handler, _ := failing(goxstreams.Permanent(errors.New(tt.text)))
			go settling(messages, goxstreams.DeadLetter{}.Middleware(handler))
			eventually(t, func() bool { return stats(t, sub).Dead == 1 })
			letters := lettersIn(t, client, goxstreams.DeadLetterTopic(topic))
			require.Len(t, letters, 1)
			require.Equal(t, tt.want, letters[0].Reason)
			require.NotNil(t, letters[0].Message)
		})
	}
}

// TestDeadLetter_OnADeadLetterStream: a message that dies on a dead-letter stream
// stays pending there.
func TestDeadLetter_OnADeadLetterStream(t *testing.T) {
	t.Parallel()
	topic, client, log := topic(t), newClient(t), newLogRecorder()
	sub := newSubscriber(t, brief(client))
	publish(t, client, topic, "payload")
	handler, _ := failing(goxstreams.Permanent(errBad))
	go settling(subscribe(t, sub, topic), goxstreams.DeadLetter{}.Middleware(handler))
	eventually(t, func() bool { return stats(t, sub).Dead == 1 })

	stream := goxstreams.DeadLetterTopic(topic)
	config := brief(client)
	config.Retry = quickRetry()
	sub = newSubscriberLog(t, config, log)
	handler, calls := failing(always(goxstreams.Permanent(errOther))[:5]...)
	go settling(subscribe(t, sub, stream), goxstreams.DeadLetter{Topic: elsewhere("worse")}.Middleware(handler))
	eventually(t, func() bool { return stats(t, sub).Acked == 1 })
	require.NoError(t, sub.Close())
	require.EqualValues(t, 6, calls.Load())
	require.Contains(t, strings.Join(log.Errors(), "\n"), "A message died on a dead-letter stream")
	require.Len(t, lettersIn(t, client, stream), 1)
	require.Empty(t, lettersIn(t, client, goxstreams.DeadLetterTopic(stream)))
	require.Empty(t, lettersIn(t, client, elsewhere("worse")(stream)))
}

// TestDeadLetter_PoisonQueue: Watermill's PoisonQueueWithFilter outside of Retry
// stores dead messages elsewhere, with any Publisher.
func TestDeadLetter_PoisonQueue(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		errs   []error
		poison bool
		calls  int64
	}{
		{"exhausted", always(errOther), true, 3},
		{"permanent", always(goxstreams.Permanent(errOther)), true, 1},
		{"transient", []error{errOther, errOther}, false, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			topic, client := topic(t), newClient(t)
			sub := newSubscriber(t, brief(client))
			poison, err := middleware.PoisonQueueWithFilter(newPublisher(t, client), topic+"-poison", goxstreams.IsDead)
			require.NoError(t, err)
			retry := *quickRetry()
			retry.MaxRetries = 2
			handler, calls := failing(tt.errs...)
			messages := subscribe(t, sub, topic)
			uuid := publish(t, client, topic, "payload")
			go settling(messages, poison(retry.Middleware(handler)))
			eventually(t, func() bool { return stats(t, sub).Acked == 1 })
			require.NoError(t, sub.Close())
			require.Equal(t, tt.calls, calls.Load())
			require.Empty(t, pendingOf(t, client, topic, testGroup))
			require.Empty(t, lettersIn(t, client, goxstreams.DeadLetterTopic(topic)))
			var want []string
			if tt.poison {
				want = uuid
			}
			require.ElementsMatch(t, want, stored(t, client, topic+"-poison"))
		})
	}
}

// scissors act at one command of a client: on the wire, below go-redis and its
// retries. Commands that do not belong to a move are not counted: handshakes, and
// blocking reads.
type scissors struct {
	mu     sync.Mutex
	at     int  // at which command, from 1
	before bool // before it is sent; else when its answer is there
	do     func() (cut bool)
	n      int // commands since they were armed
	armed  bool
	killed bool // nothing passes any more
	seen   map[string]bool
	names  []string
}

func (s *scissors) arm(at int, before bool, do func() (cut bool)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.before, s.do, s.n, s.armed, s.names = at, before, do, 0, true, nil
}

// disarm ends the counting. It returns the commands sent since arming, and whether
// the command was among them.
func (s *scissors) disarm() (commands string, hit bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.armed = false
	return strings.Join(s.names, " "), s.n >= s.at
}

func (s *scissors) saw(command string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[command]
}

// kill ends everything that passes through them, as the end of the process would.
func (s *scissors) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.killed = true
}

func (s *scissors) alive() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.killed
}

var errCut = fmt.Errorf("cut: %w", io.ErrUnexpectedEOF)

func (s *scissors) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	// Even if killed: otherwise go-redis retries for seconds.
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	return &cutConn{turnConn: turnConn{Conn: conn}, s: s}, err
}

type cutConn struct {
	turnConn
	s       *scissors
	pending bool // the next reply is the one
	cut     bool
}

// commandsIn returns the names of the commands in the bytes sent: *n, and n times
// $size, value.
func commandsIn(b []byte) (names []string) {
	r := bufio.NewReader(bytes.NewReader(b))
	number := func(kind byte) int {
		line, err := r.ReadString('\n')
		if err != nil || line[0] != kind {
			return 0
		}
		n, _ := strconv.Atoi(strings.TrimSpace(line[1:]))
		return n
	}
	for n := number('*'); n > 0; n = number('*') {
		for i := range n {
			value := make([]byte, number('$')+len("\r\n"))
			if _, err := io.ReadFull(r, value); err != nil {
				return names
			}
			if i == 0 {
				names = append(names, strings.ToLower(string(bytes.TrimSpace(value))))
			}
		}
	}
	return names
}

func (c *cutConn) Write(b []byte) (int, error) {
	if c.send(commandsIn(b)) {
		c.cut = true
		_ = c.Conn.Close()
		return 0, errCut
	}
	return c.turnConn.Write(b)
}

// send counts commands that are sent together as one, and reports whether to drop
// them. The action at a command runs under the lock: no other command comes in
// between. What a subscription sends whatever happens, to read and once a second, does
// not count.
func (c *cutConn) send(names []string) (cut bool) {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen == nil {
		s.seen = make(map[string]bool)
	}
	for _, name := range names {
		s.seen[name] = true
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		return slices.Contains([]string{"hello", "client", "xreadgroup", "xread", "zrange", "hmget"}, name)
	})
	if s.armed && len(names) > 0 {
		s.n++
		s.names = append(s.names, strings.Join(names, "+"))
		if s.n == s.at && s.before {
			cut = s.do()
		} else if s.n == s.at {
			c.pending = true
		}
	}
	return cut || c.cut || s.killed
}

func (c *cutConn) Read(b []byte) (int, error) {
	if c.cut || !c.s.alive() {
		return 0, errCut
	}
	n, err := c.turnConn.Read(b)
	if !c.pending {
		return n, err
	}
	c.pending = false
	c.s.mu.Lock()
	c.cut = c.s.do() || c.s.killed
	c.s.mu.Unlock()
	if !c.cut {
		return n, err
	}
	if err == nil {
		c.readAll(b[:n])
	}
	_ = c.Close()
	return 0, errCut
}

// client returns a client of the shared server that is cut by the scissors.
func (s *scissors) client(t testing.TB) *redis.Client {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Dialer: s.dial})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// A meddler interferes with a message between two commands of its move.
type meddler struct {
	admin     *redis.Client
	topic, id string

	claimed, acked, deleted, destroyed bool // it came in time
}

func (m *meddler) do(t testing.TB, what string) (cut bool) {
	ctx := context.Background()
	what, cut = strings.CutSuffix(what, "cut")
	switch strings.TrimSuffix(what, " and ") {
	case "claim":
		got, err := m.admin.XClaim(ctx, &redis.XClaimArgs{Stream: m.topic, Group: testGroup, Consumer: "thief", Messages: []string{m.id}}).Result()
		assert.NoError(t, err)
		m.claimed = len(got) == 1
	case "ack":
		n, err := m.admin.XAck(ctx, m.topic, testGroup, m.id).Result()
		assert.NoError(t, err)
		m.acked = n == 1
	case "delete":
		n, err := m.admin.XDel(ctx, m.topic, m.id).Result()
		assert.NoError(t, err)
		m.deleted = n == 1
	case "destroy":
		assert.NoError(t, m.admin.XGroupDestroy(ctx, m.topic, testGroup).Err())
		m.destroyed = true
	}
	return cut
}

// dying describes messages on their way to the dead-letter stream, with all
// commands from the decision on.
type dying struct {
	name   string
	broken bool
}

// deadLetter lets one message die while something happens at its at-th command, and
// returns the commands that were sent if there was such a command.
func (d dying) deadLetter(t *testing.T, what string, at int, before bool) (commands string, hit bool) {
	topic, admin := topic(t), newClient(t)
	cut := &scissors{}
	log := newLogRecorder()
	config := grouped(cut.client(t))
	config.ClaimMinIdle, config.ClaimInterval = 10*time.Minute, 10*time.Minute // nothing else is sent
	config.Retry = quickRetry()
	config.Retry.MaxRetries = -1
	config.MaxConcurrency = 2
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	eventually(t, func() bool { return cut.saw("xinfo") }, "the only look at the group")
	// Another message is being handled: if all were gone, the group would look
	// recreated.
	publish(t, admin, topic, "kept")
	kept := next(t, messages)

	m := &meddler{admin: admin, topic: topic}
	do := func() bool { return m.do(t, what) }
	fields := []string{"no message", "\x00\xff", "twice", "1", "twice", "2"}
	if d.broken {
		// Its ID is known before it is read: the meddler needs it.
		m.id = fmt.Sprintf("%d-7", time.Now().UnixMilli())
		cut.arm(at, before, do)
		args := []any{"xadd", topic, m.id}
		for _, f := range fields {
			args = append(args, f)
		}
		require.NoError(t, admin.Do(t.Context(), args...).Err())
		eventually(t, func() bool { return stats(t, sub).Broken > 0 })
	} else {
		publish(t, admin, topic, "payload")
		entry := entriesOf(t, admin, topic)[1]
		m.id, fields = entry.id, entry.fields
		msg := next(t, messages)
		cut.arm(at, before, do)
		msg.Nack()
	}
	eventually(t, func() bool { return stats(t, sub).InFlight == 1 }, "it is kept")
	commands, hit = cut.disarm()
	st := stats(t, sub)
	// The reader may notice the loss of the group only now.
	if m.destroyed {
		eventually(t, func() bool { return admin.XPending(t.Context(), topic, testGroup).Err() == nil }, "the group is not made again")
	}
	require.True(t, kept.Ack())
	require.NoError(t, sub.Close())

	letters := lettersIn(t, admin, goxstreams.DeadLetterTopic(topic))
	rows := pendingOf(t, admin, topic, testGroup)
	require.LessOrEqual(t, len(rows), 1)
	for _, l := range letters {
		require.Equal(t, m.id, l.EntryID)
		require.Equal(t, fields, l.Fields)
	}
	switch {
	case m.claimed:
		require.Empty(t, letters, "it was the thief's, after: %s", commands)
		require.Len(t, rows, 1)
		require.Equal(t, "thief", rows[0].Consumer)
		require.EqualValues(t, 2, rows[0].RetryCount)
		d.deadLetterAtThief(t, admin, m)
	case m.acked:
		require.Empty(t, letters, "it was acked elsewhere, after: %s", commands)
		require.Empty(t, rows)
	case m.deleted && st.Lost == 1:
		require.Empty(t, letters)
		require.Empty(t, rows)
		require.Contains(t, strings.Join(log.Errors(), "\n"), "Message lost")
	default:
		require.Len(t, letters, 1, "after: %s", commands)
		require.Empty(t, rows)
		require.Zero(t, st.Lost)
	}
	return commands, hit
}

// deadLetterAtThief: the thief is a consumer like ours; the message dies there.
func (d dying) deadLetterAtThief(t *testing.T, admin *redis.Client, m *meddler) {
	t.Helper()
	require.NoError(t, admin.Do(t.Context(), "xclaim", m.topic, testGroup, "released", 0, m.id, "retrycount", 1, "justid").Err())
	config := grouped(admin)
	config.Retry = &goxstreams.Retry{MaxRetries: -1}
	sub := newSubscriber(t, config)
	handler, _ := failing(always(errOther)...)
	go settling(subscribe(t, sub, m.topic), handler)
	eventually(t, func() bool { return stats(t, sub).Dead == 1 })
	require.NoError(t, sub.Close())
	require.Len(t, lettersIn(t, admin, goxstreams.DeadLetterTopic(m.topic)), 1)
	require.Empty(t, pendingOf(t, admin, m.topic, testGroup))
}

var deaths = []dying{
	{name: "nacked"},
	{name: "broken", broken: true},
}

// TestDeadLetter_Once: whatever happens between any two commands of a move, or to
// any of them, there is one dead letter, or none if another consumer has the
// message.
func TestDeadLetter_Once(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, d := range deaths {
		for _, what := range []string{"cut", "claim", "claim and cut", "ack", "ack and cut", "delete", "delete and cut", "destroy"} {
			t.Run(d.name+"/"+what, func(t *testing.T) {
				t.Parallel()
				const most = 20
				at := 1
				for ; at < most; at++ {
					var hits [2]bool
					for i, before := range []bool{true, false} {
						var commands string
						commands, hits[i] = d.deadLetter(t, what, at, before)
						t.Logf("%s at command %d, before it=%t: %s", what, at, before, commands)
					}
					if !hits[0] && !hits[1] {
						break
					}
				}
				require.Greater(t, at, 2, "to look and to move at least")
				require.Less(t, at, most, "there is no end")
			})
		}
	}
}

// TestDeadLetter_Resent: each command of a move runs twice, as when a client
// resends it because the reply was lost.
func TestDeadLetter_Resent(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			topic, admin := topic(t), newClient(t)
			var armed atomic.Bool
			var resent sync.Map
			client := newClient(t)
			client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if armed.Load() && cmd.Name() != "xreadgroup" && cmd.Name() != "client" {
					resent.Store(cmd.Name(), true)
					_ = next()
				}
				return next()
			}})
			config := brief(client)
			config.Retry = quickRetry()
			config.Retry.MaxRetries = -1
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			if d.broken {
				armed.Store(true)
				addRaw(t, admin, topic, "no", "message")
			} else {
				publish(t, admin, topic, "payload")
				msg := next(t, messages)
				armed.Store(true)
				msg.Nack()
			}
			stream := goxstreams.DeadLetterTopic(topic)
			eventually(t, func() bool { return admin.XLen(t.Context(), stream).Val() > 0 })
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
			require.NoError(t, sub.Close())
			require.Empty(t, pendingOf(t, admin, topic, testGroup))
			require.Len(t, lettersIn(t, admin, stream), 1)
			_, ok := resent.Load("eval")
			require.True(t, ok)
		})
	}
}
