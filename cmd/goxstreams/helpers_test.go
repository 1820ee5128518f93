package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestMain(m *testing.M) { testserver.Main(m) }

// command is the command line against the shared server.
type command struct {
	url      string
	in       string // typed on a terminal; empty: there is no terminal
	draws    bool
	ctx      context.Context
	out, err syncBuffer
}

// syncBuffer can be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (c *command) run(args ...string) int {
	if c.ctx == nil {
		c.ctx = context.Background()
	}
	if c.url != "" {
		args = append([]string{"--url", c.url}, args...)
	}
	return run(c.ctx, args, streams{in: strings.NewReader(c.in), out: &c.out, err: &c.err, asks: c.in != "", draws: c.draws})
}

// onTest returns the command for the shared server.
func onTest(t *testing.T) *command {
	return &command{url: "redis://" + testserver.Addr(t)}
}

// ran runs the command, which must end with the code given, and returns what it printed.
func ran(t *testing.T, code int, args ...string) (out, err string) {
	t.Helper()
	c := onTest(t)
	got := c.run(args...)
	require.Equal(t, code, got, "%v\n%s\n%s", args, c.out.String(), c.err.String())
	return c.out.String(), c.err.String()
}

// parsed returns the lines of a command with --json.
func parsed(t *testing.T, args ...string) []map[string]any {
	t.Helper()
	out, _ := ran(t, 0, append(args, "--json")...)
	return lines(t, out)
}

func lines(t *testing.T, out string) []map[string]any {
	t.Helper()
	var rows []map[string]any
	for line := range strings.Lines(out) {
		var row map[string]any
		require.NoError(t, json.Unmarshal([]byte(line), &row), line)
		rows = append(rows, row)
	}
	return rows
}

func column(rows []map[string]any, name string) []string {
	var values []string
	for _, r := range rows {
		values = append(values, fmt.Sprint(r[name]))
	}
	return values
}

// topic returns a name of this test's own.
func topic(t *testing.T) string {
	return fmt.Sprintf("cmd-%s-%s", t.Name(), watermill.NewShortUUID())
}

// death is how one message dies.
type death struct {
	handler string // and the group's name
	payload string
	err     error
	uuid    string
	meta    message.Metadata
}

// die publishes messages, each of which dies in the group of its handler, as the library does it.
func die(t *testing.T, client redis.UniversalClient, topic string, deaths ...death) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	logger := watermill.NopLogger{}
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
	require.NoError(t, err)
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	require.NoError(t, err)
	router.AddMiddleware(goxstreams.Retry{MaxRetries: -1}.Middleware)
	byUUID := make(map[string]death)
	var msgs []*message.Message
	handlers := make(map[string]bool)
	for _, d := range deaths {
		uuid := d.uuid
		if uuid == "" {
			uuid = watermill.NewUUID()
		}
		msg := message.NewMessage(uuid, []byte(d.payload))
		for k, v := range d.meta {
			msg.Metadata.Set(k, v)
		}
		byUUID[uuid] = d
		msgs = append(msgs, msg)
		handlers[d.handler] = true
	}
	var dead sync.WaitGroup
	dead.Add(len(deaths))
	for name := range handlers {
		sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
			Client: client, ConsumerGroup: name, MaxConcurrency: 50,
			OnDead: func(context.Context, goxstreams.DeadMessage) { dead.Done() },
		}, logger)
		require.NoError(t, err)
		require.NoError(t, sub.SubscribeInitialize(topic))
		router.AddConsumerHandler(name, topic, sub, func(msg *message.Message) error {
			if d := byUUID[msg.UUID]; d.handler == name {
				return d.err
			}
			return nil
		})
	}
	require.NoError(t, pub.Publish(topic, msgs...))
	ended := make(chan error, 1)
	go func() { ended <- router.Run(ctx) }()
	done := make(chan struct{})
	go func() { dead.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		t.Fatal("the messages do not die")
	}
	require.NoError(t, router.Close())
	require.NoError(t, <-ended)
	require.NoError(t, pub.Close())
}

// stored returns all entries of a stream.
func stored(t *testing.T, client redis.UniversalClient, stream string) []redis.XMessage {
	t.Helper()
	entries, err := client.XRange(t.Context(), stream, "-", "+").Result()
	require.NoError(t, err)
	return entries
}

// deadOf returns the IDs of the topic's dead letters.
func deadOf(t *testing.T, client redis.UniversalClient, topic string) []string {
	t.Helper()
	var ids []string
	for _, e := range stored(t, client, goxstreams.DeadLetterTopic(topic)) {
		ids = append(ids, e.ID)
	}
	return ids
}

// received subscribes to the topic in a group until there are n messages, and returns their payloads.
func received(t *testing.T, client redis.UniversalClient, topic, group string, n int) []string {
	t.Helper()
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: group}, watermill.NopLogger{})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	messages, err := sub.Subscribe(ctx, topic)
	require.NoError(t, err)
	var payloads []string
	for len(payloads) < n {
		msg, ok := <-messages
		require.True(t, ok, "%d of %d", len(payloads), n)
		payloads = append(payloads, string(msg.Payload))
		msg.Ack()
	}
	require.NoError(t, sub.Close())
	return payloads
}
