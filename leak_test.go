package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// secret marks values that must not leak: payloads, metadata values, passwords. The
// number is for places that cannot hold text.
const (
	secret       = "s3cr3t"
	secretNumber = "4711471147114711471147114711"
)

// told is a logger, and a list of errors, that records everything except Trace.
type told struct {
	fields watermill.LogFields
	*toldLines
}

type toldLines struct {
	mu    sync.Mutex
	lines []string
}

func newTold() told { return told{nil, &toldLines{}} }

func (l told) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l told) Error(msg string, err error, fields watermill.LogFields) {
	l.add("ERROR %s: %v %+v %#v", msg, err, err, l.fields.Add(fields))
}
func (l told) Info(msg string, fields watermill.LogFields) {
	l.add("INFO %s %#v", msg, l.fields.Add(fields))
}
func (l told) Debug(msg string, fields watermill.LogFields) {
	l.add("DEBUG %s %#v", msg, l.fields.Add(fields))
}
func (told) Trace(string, watermill.LogFields) {}
func (l told) With(fields watermill.LogFields) watermill.LoggerAdapter {
	return told{l.fields.Add(fields), l.toldLines}
}

// failed notes an error that must be one.
func (l told) failed(t testing.TB, err error) {
	t.Helper()
	require.Error(t, err)
	l.add("returned: %v %+v", err, err)
}

func (l told) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(strings.Join(l.lines, "\n"), text)
}

// requireRedacted requires that something was recorded, without secrets.
func (l told) requireRedacted(t testing.TB) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	require.NotEmpty(t, l.lines)
	for _, line := range l.lines {
		if strings.Contains(line, secret) || strings.Contains(line, secretNumber) {
			assert.Fail(t, "a secret is told", line)
		}
	}
}

func secretMessages(n int) []*message.Message {
	msgs := make([]*message.Message, n)
	for i := range msgs {
		msgs[i] = message.NewMessage(watermill.NewUUID(), message.Payload(secret+"-payload"))
		msgs[i].Metadata.Set("key", secret+"-metadata")
	}
	return msgs
}

// TestLeak_Connections: passwords in the client's options and in a URL.
func TestLeak_Connections(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	nobody := l.Addr().String()
	require.NoError(t, l.Close())
	// Old servers without HELLO, and proxies, quote unknown commands: the arguments
	// of HELLO and AUTH include the password.
	ancient := testserver.Private(t, "--rename-command", "HELLO", "", "--rename-command", "AUTH", "").Addr()
	for name, addr := range map[string]string{"nobody listens": nobody, "wrong password": testserver.Addr(t), "no HELLO": ancient} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fromURL, err := redis.ParseURL("redis://someone:" + secret + "-password@" + addr + "?dial_timeout=1s&max_retries=1")
			require.NoError(t, err)
			for _, opts := range []*redis.Options{fromURL, {Addr: addr, Username: "someone", Password: secret + "-password", DialerRetries: 1, MaxRetries: 1}} {
				told := newTold()
				client := redis.NewClient(opts)
				t.Cleanup(func() { _ = client.Close() })
				pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, told)
				require.NoError(t, err)
				told.failed(t, pub.Publish(topic(t), secretMessages(1)...))
				told.failed(t, pub.Publish(topic(t), secretMessages(3)...))
				sub := newSubscriberLog(t, grouped(client), told)
				_, err = sub.Subscribe(t.Context(), topic(t))
				told.failed(t, err)
				told.failed(t, sub.SubscribeInitialize(topic(t)))
				q := queueOf(t, client, "dead")
				_, err = q.Count(t.Context())
				told.failed(t, err)
				_, err = q.Replay(t.Context(), "1-1")
				told.failed(t, err)
				_, err = q.Delete(t.Context(), "1-1")
				told.failed(t, err)
				for _, err := range q.All(t.Context(), "") {
					told.failed(t, err)
				}
				_, err = goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, DefaultMaxLen: -1, MaxLens: map[string]int64{"a": -1}}, told)
				told.failed(t, err)
				_, err = goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, StartID: "x", BatchSize: -1, NoAck: true}, told)
				told.failed(t, err)
				told.add("%v %+v %v %+v %v %+v", pub, pub, sub, sub, q, q)
				told.requireRedacted(t)
			}
		})
	}
}

// TestLeak_Refused: the server's error when it rejects a message.
func TestLeak_Refused(t *testing.T) {
	testserver.RequireReal(t)
	ctx := t.Context()
	// "unknown command 'xadd', with args beginning with: .."
	server := testserver.Private(t, "--rename-command", "XADD", "", "--rename-command", "EVAL", "")
	told, topic := newTold(), topic(t)
	publishing := func(client redis.UniversalClient, m goxstreams.Marshaler) {
		pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: m}, told)
		require.NoError(t, err)
		told.failed(t, pub.Publish(topic, secretMessages(1)...))
		told.failed(t, pub.Publish(topic, secretMessages(3)...))
	}
	publishing(server.Client(), goxstreams.BodyMarshaler{Field: "b"})
	admin := testserver.Client(t)
	require.NoError(t, admin.Set(ctx, topic, "a string", 0).Err())
	publishing(admin, nil)
	publishing(userOf(t, admin, "another"), nil)
	reserved := secretMessages(1)[0]
	reserved.Metadata.Set(goxstreams.UUIDHeaderKey, secret)
	told.failed(t, newPublisher(t, admin).Publish(topic, reserved))
	noText := secretMessages(1)[0]
	noText.Metadata.Set("k", secret+"\xff")
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: admin, Marshaler: goxstreams.BodyMarshaler{MetadataField: "m"}}, told)
	require.NoError(t, err)
	told.failed(t, pub.Publish(topic, noText))
	require.True(t, told.has("unknown command"))
	told.requireRedacted(t)
}

// A secretive model rejects its payloads in every way that package json has.
type secretive struct {
	Small  int8
	Quoted int `json:",string"`
	Time   time.Time
	Addr   netip.Addr
	Keys   map[int8]string
	Text   string
}

// TestLeak_Worker: decoding errors whose texts, from package json or from the types
// in a model, quote the payload.
func TestLeak_Worker(t *testing.T) {
	t.Parallel()
	payloads := []string{
		secret, `{"Text": "` + secret, `"` + secret + `"`, `{"Small": ` + secretNumber + `}`, `{"Quoted": "` + secret + `"}`, `{"Quoted": ` + secretNumber + `}`,
		`{"Time": "` + secret + `"}`, `{"Addr": "` + secret + `"}`, `{"Keys": {"` + secretNumber + `": ""}}`, `{"Keys": {"` + secret + `": ""}}`, `{"Text": ["` + secret + `"]}`,
		`{"Small": "` + secret + `"}`, strings.Repeat("[", 100_000) + secret,
	}
	told, topic, client := newTold(), topic(t), newClient(t)
	worker := &testWorker[secretive]{onBroken: func(_ context.Context, b goxstreams.BrokenMessage) error {
		told.add("given to the worker: %v", b.Err)
		if b.RetryCount == 0 {
			return errors.New("again")
		}
		return goxstreams.ErrDead
	}}
	consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Topic: topic, Subscriber: limited(client, 3)}, told)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- consumer.Run(ctx) }()
	for _, p := range payloads {
		publish(t, client, topic, p)
	}
	stream := goxstreams.DeadLetterTopic(topic)
	eventually(t, func() bool { return len(entriesOf(t, client, stream)) == len(payloads) }, "they are all broken")
	cancel()
	require.NoError(t, <-ended)
	for _, d := range lettersIn(t, client, stream) {
		told.add("reason of the dead letter: %s", d.Reason)
		assert.NotEmpty(t, d.Reason)
	}
	require.True(t, told.has("ParseError"), "the error's type is told: %v", told.lines)
	require.True(t, told.has("secretive.Small of type int8"), "the field is told")
	told.requireRedacted(t)
	// errors.As still finds the whole error.
	_, broken, _ := worker.calls()
	var parse *time.ParseError
	found := false
	for _, b := range broken {
		found = found || errors.As(b.Err, &parse)
	}
	assert.True(t, found)
}

// TestLeak_Subscription: messages that are malformed, nacked, dead, lost,
// abandoned, or whose handler panics.
func TestLeak_Subscription(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	admin := testserver.Client(t)
	for _, unmarshaler := range []goxstreams.Unmarshaler{goxstreams.DefaultMarshaler{}, goxstreams.BodyMarshaler{MetadataField: "meta"}} {
		t.Run(fmt.Sprintf("%T", unmarshaler), func(t *testing.T) {
			t.Parallel()
			told, topic := newTold(), topic(t)
			client := userOf(t, admin, topic, allRights(t, admin)...)
			config := claiming(client)
			config.Unmarshaler = unmarshaler
			config.Retry = quickRetry()
			config.Retry.MaxRetries = 1
			config.MaxConcurrency = 4
			config.CloseTimeout = 100 * time.Millisecond
			config.BlockTime = 50 * time.Millisecond
			config.OnDead = func(context.Context, goxstreams.DeadMessage) { panic("in OnDead") }
			sub := newSubscriberLog(t, config, told)
			messages := subscribe(t, sub, topic)
			held := make(chan *message.Message, 10)
			handler := config.Retry.Middleware(goxstreams.DeadLetter{}.Middleware(func(msg *message.Message) ([]*message.Message, error) {
				switch msg.Metadata.Get("do") {
				case "panic":
					var none []byte
					_ = none[len(msg.Payload)]
				case "dead":
					return nil, goxstreams.Permanent(errBad)
				case "hold":
					held <- msg
					<-msg.Context().Done()
				}
				return nil, errOther
			}))
			go func() {
				for msg := range messages {
					go func() {
						defer msg.Nack()
						defer func() { _ = recover() }()
						_, _ = handler(msg)
					}()
				}
			}()
			pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: admin, Marshaler: unmarshaler.(goxstreams.Marshaler)}, nil)
			require.NoError(t, err)
			for _, do := range []string{"fail", "panic", "dead", "hold", "hold"} {
				msg := secretMessages(1)[0]
				msg.Metadata.Set("do", do)
				require.NoError(t, pub.Publish(topic, msg))
			}
			lost, stays := <-held, <-held
			for _, fields := range [][]string{
				{"no", secret}, {secret, "name"},
				{goxstreams.UUIDHeaderKey, "1", "metadata", secret, "payload", secret},
				{"body", secret, "meta", secret}, {"body", secret, "meta", `{"a": ` + secretNumber + `}`}, {"body", secret, "meta", `{"` + secret + `": []}`},
			} {
				addRaw(t, admin, topic, fields...)
			}
			eventually(t, func() bool { return stats(t, sub).Dead >= 3+3 })
			require.NoError(t, admin.XDel(t.Context(), topic, delivery(t, lost).ID).Err())
			eventually(t, func() bool { return stats(t, sub).Lost > 0 }, "lost")
			// Repeatedly: in the millisecond after a renewal the next one takes it
			// back.
			theft := &redis.XClaimArgs{Stream: topic, Group: testGroup, Consumer: "thief", Messages: []string{delivery(t, stays).ID}}
			eventually(t, func() bool { return admin.XClaim(t.Context(), theft).Err() == nil && stays.Context().Err() != nil }, "the lease is to be lost")
			require.NoError(t, admin.XGroupDestroy(t.Context(), topic, testGroup).Err())
			eventually(t, func() bool { return told.has("has been recreated") })
			setUser(t, admin, client.Options().Username, "resetpass", ">another", "-@all")
			eventually(t, func() bool { return stats(t, sub).Err != nil })
			told.add("stats: %v", stats(t, sub).Err)
			require.NoError(t, sub.Close())
			told.requireRedacted(t)
		})
	}
}
