package goxui

import (
	"context"
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// enough is a bound that only a hanging test reaches.
const enough = 30 * time.Second

// eventually waits until something holds.
func eventually(t *testing.T, holds func() bool) {
	t.Helper()
	require.Eventually(t, holds, enough, 5*time.Millisecond)
}

// site is a Handler that is served, and what it shows.
type site struct {
	t       *testing.T
	redis   *miniredis.Miniredis
	client  *redis.Client
	handler *Handler
	server  *httptest.Server
	log     *logged

	mu     sync.Mutex
	events []AuditEvent
}

// everything is an Authorize that allows everything.
func everything(*http.Request, Action) error { return nil }

func newSite(t *testing.T, configure func(*Config)) *site {
	t.Helper()
	s := &site{t: t, redis: miniredis.RunT(t), log: &logged{}}
	s.client = redis.NewClient(&redis.Options{Addr: s.redis.Addr(), MaxRetries: -1})
	t.Cleanup(func() { _ = s.client.Close() })
	config := Config{Client: s.client, Interval: 100 * time.Millisecond, Logger: s.log, Audit: func(_ *http.Request, e AuditEvent) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.events = append(s.events, e)
	}}
	if configure != nil {
		configure(&config)
	}
	var err error
	s.handler, err = New(config)
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.Handle("/ops/", s.handler)
	s.server = httptest.NewServer(mux)
	t.Cleanup(s.server.Close)
	t.Cleanup(s.handler.Close)
	return s
}

// audited returns what Audit was told.
func (s *site) audited() []AuditEvent {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.events
}

// logged is a logger that keeps what it gets.
type logged struct {
	watermill.NopLogger
	mu    sync.Mutex
	lines []string
}

func (l *logged) Error(msg string, err error, fields watermill.LogFields) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprint(msg, ": ", err, " ", fields))
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

// do sends a request as a browser on the page does, and returns the last answer.
func (s *site) do(method, ref string, form url.Values, headers ...string) (*http.Response, string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), enough)
	defer cancel()
	var body io.Reader
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	r, err := http.NewRequestWithContext(ctx, method, s.server.URL+"/ops/"+strings.TrimPrefix(ref, "./"), body)
	require.NoError(s.t, err)
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set("Sec-Fetch-Site", "same-origin")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
		if headers[i+1] == "" {
			r.Header.Del(headers[i])
		}
	}
	answer, err := http.DefaultClient.Do(r)
	require.NoError(s.t, err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	require.NoError(s.t, err)
	return answer, string(text)
}

// get returns a page, which must be one.
func (s *site) get(ref string) string {
	s.t.Helper()
	answer, text := s.do(http.MethodGet, ref, nil)
	require.Equal(s.t, http.StatusOK, answer.StatusCode, "%s\n%s", ref, text)
	return text
}

// post sends a form, and returns the page to which it leads.
func (s *site) post(ref string, pairs ...string) (*http.Response, string) {
	s.t.Helper()
	form := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		form.Add(pairs[i], pairs[i+1])
	}
	return s.do(http.MethodPost, ref, form)
}

var hrefs = regexp.MustCompile(`href="([^"]*)"`)

// links returns what a page links to.
func links(page string) (all []string) {
	for _, m := range hrefs.FindAllStringSubmatch(page, -1) {
		all = append(all, html.UnescapeString(m[1]))
	}
	return all
}

// text returns a page without tags.
func text(page string) string {
	return strings.Join(strings.Fields(html.UnescapeString(regexp.MustCompile(`(?s)<[^>]*>`).ReplaceAllString(page, " "))), " ")
}

// publish publishes messages.
func (s *site) publish(topic string, messages ...*message.Message) {
	s.t.Helper()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: s.client}, nil)
	require.NoError(s.t, err)
	require.NoError(s.t, publisher.Publish(topic, messages...))
	require.NoError(s.t, publisher.Close())
}

// order is a message with a payload that must never be seen.
func order(uuid string) *message.Message {
	msg := message.NewMessage(uuid, []byte(secret+uuid))
	msg.Metadata.Set("tenant", "t7")
	return msg
}

const secret = "a-secret-payload-"

// die lets messages die in a group, one after the other.
func (s *site) die(topic, group, handler, reason string, messages ...*message.Message) {
	s.t.Helper()
	var dead sync.WaitGroup
	dead.Add(len(messages))
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: s.client, ConsumerGroup: group, StartID: "$", MaxConcurrency: 1 + len(messages)/50, OnDead: func(context.Context, goxstreams.DeadMessage) { dead.Done() },
	}, nil)
	require.NoError(s.t, err)
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	require.NoError(s.t, err)
	router.AddMiddleware(goxstreams.Retry{MaxRetries: -1}.Middleware)
	router.AddConsumerHandler(handler, topic, subscriber, func(*message.Message) error { return goxstreams.Permanent(errors.New(reason)) })
	done := make(chan error, 1)
	go func() { done <- router.Run(context.Background()) }()
	<-router.Running()
	s.publish(topic, messages...)
	dead.Wait()
	require.NoError(s.t, router.Close())
	require.NoError(s.t, <-done)
}

// copies adds copies of the topic's first dead letter.
func (s *site) copies(topic string, n int) {
	s.t.Helper()
	ctx := s.t.Context()
	stream := goxstreams.DeadLetterTopic(topic)
	raw, err := s.client.Do(ctx, "xrange", stream, "-", "+", "COUNT", 1).Slice()
	require.NoError(s.t, err)
	fields := raw[0].([]any)[1].([]any)
	for n > 0 {
		pipe := s.client.Pipeline()
		for range min(n, 500) {
			pipe.Do(ctx, append([]any{"xadd", stream, "*"}, fields...)...)
			n--
		}
		_, err := pipe.Exec(ctx)
		require.NoError(s.t, err)
	}
}

// hold leaves messages pending for a consumer.
func (s *site) hold(topic, group, consumer string, n int) {
	s.t.Helper()
	ctx := s.t.Context()
	if err := s.client.XGroupCreateMkStream(ctx, topic, group, "0").Err(); err != nil {
		require.ErrorContains(s.t, err, "BUSYGROUP")
	}
	read, err := s.client.XReadGroup(ctx, &redis.XReadGroupArgs{Group: group, Consumer: consumer, Streams: []string{topic, ">"}, Count: int64(n), Block: -1}).Result()
	require.NoError(s.t, err)
	require.Len(s.t, read[0].Messages, n)
}

// later publishes delayed messages.
func (s *site) later(topic string, uuids ...string) {
	s.t.Helper()
	for i, uuid := range uuids {
		msg := order(uuid)
		delay.Message(msg, delay.For(time.Hour+time.Duration(i)*time.Minute))
		s.publish(topic, msg)
	}
}

// letters returns how many dead letters there are.
func (s *site) letters(topic string) int64 {
	s.t.Helper()
	n, err := s.client.XLen(s.t.Context(), goxstreams.DeadLetterTopic(topic)).Result()
	require.NoError(s.t, err)
	return n
}

// world is a topic with something of everything.
func (s *site) world(topic string) {
	s.t.Helper()
	s.die(topic, "billing", "bill", "card 4711 declined", order("d1"), order("d2"), order("d3"))
	s.publish(topic, order("p1"), order("p2"), order("p3"))
	s.hold(topic, "billing", "pod-1", 2)
	s.later(topic, "l1", "l2")
}

// confirm starts a replay or delete of all that match, and confirms it. It returns the last page.
func (s *site) confirm(topic, verb string, pairs ...string) string {
	s.t.Helper()
	answer, page := s.post(link("dead", "t", topic), append([]string{"do", verb}, pairs...)...)
	require.Equal(s.t, http.StatusOK, answer.StatusCode, page)
	job := "job?" + answer.Request.URL.RawQuery
	eventually(s.t, func() bool { page = s.get(job); return !strings.Contains(page, "Counting the") })
	count := regexp.MustCompile(`name="count" value="(\d+)"`).FindStringSubmatch(page)
	require.NotNil(s.t, count, page)
	answer, page = s.post(job, "do", "confirm", "count", count[1])
	require.Equal(s.t, http.StatusOK, answer.StatusCode, page)
	eventually(s.t, func() bool { page = s.get(job); return !strings.Contains(page, "Stop</button>") })
	return page
}
