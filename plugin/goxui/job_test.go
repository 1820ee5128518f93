package goxui

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Filters choose what is shown, replayed and deleted.
func TestFilters(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	s.die("orders", "billing", "bill", "card declined", order("a"), order("b"))
	s.die("orders", "shipping", "ship", "no such street\nat all", order("c"))
	require.NoError(t, s.client.XAdd(t.Context(), &redis.XAddArgs{Stream: goxstreams.DeadLetterTopic("orders"), Values: []string{"x", "y"}}).Err())
	require.NoError(t, s.client.XAdd(t.Context(), &redis.XAddArgs{Stream: goxstreams.DeadLetterTopic("orders"), ID: "9999999999999-0", Values: []string{"x", "y"}}).Err())
	rows := func(pairs ...string) int {
		return strings.Count(s.get(link("dead", append(pairs, "t", "orders")...)), `aria-label="Select 1`) + strings.Count(s.get(link("dead", append(pairs, "t", "orders")...)), `aria-label="Select 9`)
	}
	total := s.letters("orders")
	require.GreaterOrEqual(t, total, int64(5))
	assert.EqualValues(t, total-2, rows())
	assert.Equal(t, 2, rows("kind", "foreign"))
	assert.Equal(t, 1, rows("kind", "foreign", "older", "0s"))
	assert.EqualValues(t, total-2, rows("kind", "permanent", "kind", "broken"))
	assert.Equal(t, 0, rows("kind", "exhausted"))
	assert.Equal(t, 1, rows("reason", `street\nat`), "as it is shown")
	assert.Equal(t, 1, rows("handler", "ship"))
	assert.EqualValues(t, total-3, rows("group", "billing"))
	assert.Equal(t, 0, rows("older", "1d"))
	assert.EqualValues(t, total-2, rows("newer", "1d"))
	assert.Equal(t, 0, rows("newer", "0s"))

	page := s.confirm("orders", "replay", "which", "all", "handler", "ship")
	assert.Contains(t, text(page), "Replayed 1 of 1 dead letters.")
	assert.Equal(t, total-1, s.letters("orders"))
	page = s.confirm("orders", "delete", "which", "all", "kind", "foreign")
	assert.Contains(t, text(page), "Deleted 2 of 2 dead letters.")
	_, page = s.post("dead?t=orders", "do", "replay", "which", "all", "handler", "ship")
	assert.Contains(t, text(page), "No dead letter matches.")
	assert.Equal(t, total-3, s.letters("orders"))
	events := s.audited()
	require.Len(t, events, 4)
	assert.Equal(t, AuditEvent{Action: Action{Verb: Replay, Topic: "orders", Count: 1}, Stage: Begun}, events[0])
	assert.Equal(t, AuditEvent{Action: Action{Verb: Replay, Topic: "orders", Count: 1}, Stage: Ended, Done: 1}, events[1])
}

// Selected letters, and no others: what is no dead letter of the topic is not replayed into another one.
func TestSelected(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	s.die("orders", "billing", "bill", "declined", order("a"), order("b"), order("c"))
	s.die("other", "billing", "bill", "declined", order("d"))
	ctx := t.Context()
	stream := goxstreams.DeadLetterTopic("orders")
	raw, err := s.client.Do(ctx, "xrange", goxstreams.DeadLetterTopic("other"), "-", "+").Slice()
	require.NoError(t, err)
	forged, err := s.client.Do(ctx, append([]any{"xadd", stream, "*"}, raw[0].([]any)[1].([]any)...)...).Text()
	require.NoError(t, err)
	letters, err := s.client.XRange(ctx, stream, "-", "+").Result()
	require.NoError(t, err)
	page := s.confirm("orders", "replay", "which", "chosen", "id", letters[2].ID, "id", letters[0].ID, "id", forged, "id", "1-1")
	assert.Contains(t, text(page), "Replayed 2 of 2 dead letters.")
	left, err := s.client.XRange(ctx, stream, "-", "+").Result()
	require.NoError(t, err)
	require.Len(t, left, 2)
	assert.Equal(t, letters[1].ID, left[0].ID)
	n, err := s.client.XLen(ctx, "other").Result()
	require.NoError(t, err)
	assert.EqualValues(t, 1, n)

	answer, page := s.post("dead?t=orders", "do", "delete", "which", "chosen", "id", forged)
	require.Contains(t, text(page), "Delete 1 dead letter of orders , for good?")
	job := "job?" + answer.Request.URL.RawQuery
	answer, page = s.post(job, "do", "confirm", "count", "2")
	assert.Equal(t, http.StatusConflict, answer.StatusCode)
	assert.Contains(t, page, "The number to confirm is another one.")
	_, page = s.post(job, "do", "stop")
	assert.Contains(t, text(page), "It ended early. It was stopped.")
	_, _ = s.post(job, "do", "confirm", "count", "1")
	assert.EqualValues(t, 2, s.letters("orders"), "stopped is stopped")
}

// What died after somebody was asked is not moved, and a letter whose group is gone stays and is named.
func TestNoMoreThanConfirmed(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	s.die("orders", "billing", "bill", "declined", order("a"))
	s.die("orders", "shipping", "ship", "declined", order("b"))
	had := s.letters("orders")
	answer, page := s.post("dead?t=orders", "do", "replay", "which", "all")
	require.Contains(t, text(page), "Replay "+strconv.FormatInt(had, 10)+" dead letters")
	s.copies("orders", 5)
	require.NoError(t, s.client.XGroupDestroy(t.Context(), "orders", "billing").Err())
	job := "job?" + answer.Request.URL.RawQuery
	_, _ = s.post(job, "do", "confirm", "count", strconv.FormatInt(had, 10))
	_, _ = s.post(job, "do", "confirm", "count", strconv.FormatInt(had, 10)) // a second click
	eventually(t, func() bool { page = text(s.get(job)); return strings.Contains(page, "could not be") })
	eventually(t, func() bool { page = text(s.get(job)); return !strings.Contains(page, "Stop") })
	assert.Contains(t, page, "still there")
	assert.Contains(t, page, "group")
	assert.GreaterOrEqual(t, s.letters("orders"), int64(6))
	ends := 0
	for _, e := range s.audited() {
		if e.Stage == Ended {
			ends++
			assert.ErrorContains(t, e.Err, "could not be moved")
		}
	}
	assert.Equal(t, 1, ends)
}

// fault is a hook that loses answers, or lets nothing through.
type fault struct {
	lose  atomic.Int64 // answers to every lose-th pipeline are lost; 0: none
	calls atomic.Int64
	down  atomic.Bool
}

var errLost = &lostError{}

// lostError is a network error.
type lostError struct{}

func (*lostError) Error() string   { return "connection reset" }
func (*lostError) Timeout() bool   { return false }
func (*lostError) Temporary() bool { return false }

func (f *fault) DialHook(next redis.DialHook) redis.DialHook { return next }

func (f *fault) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if f.down.Load() {
			cmd.SetErr(errLost)
			return errLost
		}
		return next(ctx, cmd)
	}
}

func (f *fault) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		fail := func() error {
			for _, cmd := range cmds {
				cmd.SetErr(errLost)
			}
			return errLost
		}
		if f.down.Load() {
			return fail()
		}
		err := next(ctx, cmds)
		if n := f.lose.Load(); n > 0 && cmds[0].Name() == "eval" && f.calls.Add(1)%n == 0 {
			return fail()
		}
		return err
	}
}

// faulty returns a site whose client has a fault.
func faulty(t *testing.T) (*site, *fault) {
	f := &fault{}
	s := newSite(t, func(c *Config) {
		c.Authorize = everything
		client := redis.NewClient(&redis.Options{Addr: c.Client.(*redis.Client).Options().Addr, MaxRetries: -1})
		t.Cleanup(func() { _ = client.Close() })
		client.AddHook(f)
		c.Client = client
	})
	return s, f
}

// payloads returns how often each payload is in a stream.
func (s *site) payloads(stream string) map[string]int {
	s.t.Helper()
	entries, err := s.client.XRange(s.t.Context(), stream, "-", "+").Result()
	require.NoError(s.t, err)
	all := map[string]int{}
	for _, e := range entries {
		for _, v := range e.Values {
			if text, _ := v.(string); strings.HasPrefix(text, secret) {
				all[text]++
			}
		}
	}
	return all
}

// Lost answers, an outage, and the end of the process in the middle: no letter is lost, and none is twice
// in the topic.
func TestReplay_Faults(t *testing.T) {
	t.Parallel()
	s, f := faulty(t)
	var orders []*message.Message
	for i := range 1000 {
		orders = append(orders, order(strconv.Itoa(i)))
	}
	s.die("orders", "billing", "bill", "declined", orders...)
	require.NoError(t, s.client.XTrimMaxLen(t.Context(), "orders", 0).Err())
	exactly := func() {
		t.Helper()
		live, dead := s.payloads("orders"), s.payloads(goxstreams.DeadLetterTopic("orders"))
		for i := range 1000 {
			payload := secret + strconv.Itoa(i)
			require.Equal(t, 1, live[payload]+dead[payload], payload)
		}
	}
	f.lose.Store(3)
	answer, page := s.post("dead?t=orders", "do", "replay", "which", "all")
	job := "job?" + answer.Request.URL.RawQuery
	eventually(t, func() bool { page = s.get(job); return strings.Contains(page, "Replay 1,000") })
	_, _ = s.post(job, "do", "confirm", "count", "1000")
	eventually(t, func() bool { return s.letters("orders") < 600 })
	f.down.Store(true)
	eventually(t, func() bool { return strings.Contains(s.get(job), "It goes on when Redis is back") })
	exactly()
	f.down.Store(false)
	f.lose.Store(0)
	eventually(t, func() bool { return s.letters("orders") < 300 || s.letters("orders") == 0 })
	s.handler.Close() // the process ends
	exactly()

	// Another one does the rest.
	second, err := New(s.handler.config)
	require.NoError(t, err)
	defer second.Close()
	queue, err := second.queue("orders")
	require.NoError(t, err)
	j := &job_{}
	j.run(t, second, queue)
	exactly()
	assert.Zero(t, s.letters("orders"))
	assert.NotContains(t, s.log.String(), secret)
}

// job_ runs a job without pages.
type job_ struct{ job }

func (j *job_) run(t *testing.T, h *Handler, queue *goxstreams.DeadLetterQueue) {
	t.Helper()
	j.Verb, j.Topic, j.queue = Replay, "orders", queue
	j.jobState = jobState{Phase: counting, newer: make(chan struct{})}
	h.count(t.Context(), &j.job)
	require.Empty(t, j.Err)
	if j.Phase == counted {
		require.NoError(t, h.move(t.Context(), &j.job))
	}
}

func TestJobs_Bounded(t *testing.T) {
	t.Parallel()
	var js jobs
	for i := range maxActive {
		require.NoError(t, js.add(&job{ID: strconv.Itoa(i), jobState: jobState{Phase: counting}}))
	}
	require.ErrorContains(t, js.add(&job{}), "Too many")
	for _, j := range js.all {
		j.Phase = ended
	}
	for i := range 10 * maxJobs {
		require.NoError(t, js.add(&job{ID: "x" + strconv.Itoa(i), jobState: jobState{Phase: counted}}))
	}
	assert.Len(t, js.all, maxJobs)
	assert.Nil(t, js.find("0"))
	assert.NotNil(t, js.find("x999"))
}

// A panic of Audit ends neither the process nor the replay.
func TestAudit_Panics(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) {
		c.Authorize = everything
		c.Audit = func(*http.Request, AuditEvent) { panic("audit") }
	})
	s.die("orders", "billing", "bill", "declined", order("a"))
	assert.Contains(t, s.confirm("orders", "delete", "which", "all"), "Deleted 1 of 1")
	assert.Contains(t, s.log.String(), "Config.Audit panicked")
}

// All viewers share a look, and nobody's look costs nothing.
func TestCollector(t *testing.T) {
	t.Parallel()
	var commands atomic.Int64
	s := newSite(t, func(c *Config) {
		client := redis.NewClient(&redis.Options{Addr: c.Client.(*redis.Client).Options().Addr, MaxRetries: -1})
		t.Cleanup(func() { _ = client.Close() })
		client.AddHook(counter{&commands})
		c.Client, c.Interval = client, time.Hour
	})
	s.publish("orders", order("a"))
	assert.Zero(t, commands.Load())
	var viewers sync.WaitGroup
	for range 50 {
		viewers.Go(func() { s.get("") })
	}
	viewers.Wait()
	assert.Contains(t, s.get(""), "orders")
	assert.EqualValues(t, 2, commands.Load(), "a SCAN and a pipeline")
}

// counter counts round trips.
type counter struct{ n *atomic.Int64 }

func (c counter) DialHook(next redis.DialHook) redis.DialHook { return next }

func (c counter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if cmd.Name() == "scan" {
			c.n.Add(1)
		}
		return next(ctx, cmd)
	}
}

func (c counter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if len(cmds) > 0 && (cmds[0].Name() == "xlen" || cmds[0].Name() == "xpending") {
			c.n.Add(1)
		}
		return next(ctx, cmds)
	}
}

func TestRates(t *testing.T) {
	t.Parallel()
	at := time.Now()
	last := &topicState{added: 100, at: at, In: []float32{-1}, Groups: []groupState{{Name: "a", read: 50, Out: []float32{7}}, {Name: "b", read: 50}}}
	s := &topicState{added: 120, at: at.Add(2 * time.Second), Groups: []groupState{{Name: "a", read: 60}, {Name: "b", read: 40}, {Name: "c", read: 9}, {Name: "d", read: 1, Lag: -1}}}
	s.rates(last)
	assert.Equal(t, []float32{-1, 10}, s.In)
	assert.Equal(t, []float32{7, 5}, s.Groups[0].Out)
	assert.Equal(t, []float32{-1}, s.Groups[1].Out, "it began anew")
	assert.Equal(t, []float32{-1}, s.Groups[2].Out)
	for range 2 * maxPoints {
		next := &topicState{added: s.added + 1, at: s.at.Add(time.Second)}
		next.rates(s)
		s = next
	}
	assert.Len(t, s.In, maxPoints)
	c := newChart("x", []float32{1, 2, -1, 3, -1, 0, 4})
	assert.Len(t, c.Lines, 2)
	assert.Equal(t, float32(4), c.Most)
	assert.Equal(t, float32(4), c.Last)
}

// events returns the lines that a page's events have.
func (s *site) listen(ref string) (lines <-chan string, close func()) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.server.URL+"/ops/"+ref, nil)
	require.NoError(s.t, err)
	answer, err := http.DefaultClient.Do(r)
	require.NoError(s.t, err)
	require.Equal(s.t, "text/event-stream", answer.Header.Get("Content-Type"))
	out := make(chan string, 100)
	go func() {
		defer answer.Body.Close()
		buf := make([]byte, 1000)
		for {
			n, err := answer.Body.Read(buf)
			if err != nil {
				out <- "end"
				return
			}
			out <- string(buf[:n])
		}
	}()
	return out, cancel
}

// Events say when there is something new, until Close.
func TestEvents(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	s.publish("orders", order("a"))
	lines, stop := s.listen("events")
	defer stop()
	for range 3 {
		assert.Contains(t, <-lines, "data: look")
	}
	assert.EqualValues(t, 1, s.handler.viewers.Load())
	s.handler.Close()
	for line := range lines {
		if line == "end" {
			break
		}
	}
	eventually(t, func() bool { return s.handler.viewers.Load() == 0 })
}

// While Redis is away pages answer, and say what they show; when it is back they go on.
func TestOutage(t *testing.T) {
	t.Parallel()
	s, f := faulty(t)
	s.world("orders")
	require.Contains(t, s.get(""), "orders")
	f.down.Store(true)
	eventually(t, func() bool { return strings.Contains(s.get(""), "Redis does not answer. Numbers are from") })
	assert.Contains(t, text(s.get("topic?t=orders")), "Dead letters 3")
	for _, ref := range []string{"dead?t=orders", "group?t=orders&g=billing", "delayed?t=orders", "message?t=orders&from=delayed&uuid=l1"} {
		answer, page := s.do(http.MethodGet, ref, nil)
		assert.Equal(t, http.StatusServiceUnavailable, answer.StatusCode, ref)
		assert.Contains(t, page, "Redis does not answer.", ref)
	}
	f.down.Store(false)
	eventually(t, func() bool { return !strings.Contains(s.get(""), "does not answer") })
	assert.Equal(t, 1, strings.Count(s.log.String(), "The operations page has no answer"), "an outage is logged once")
}

// A Redis that hangs holds up no page for long, and collects no goroutines.
func TestHangs(t *testing.T) {
	t.Parallel()
	hang := make(chan struct{})
	var hanging atomic.Bool
	s := newSite(t, func(c *Config) {
		client := redis.NewClient(&redis.Options{Addr: c.Client.(*redis.Client).Options().Addr, MaxRetries: -1})
		t.Cleanup(func() { _ = client.Close() })
		client.AddHook(hanger{hang, &hanging})
		c.Client = client
	})
	s.world("orders")
	s.get("")
	hanging.Store(true)
	var statuses sync.Map
	var requests sync.WaitGroup
	for i := range 2 * maxAsking {
		requests.Go(func() {
			answer, _ := s.do(http.MethodGet, "dead?t=orders", nil)
			statuses.Store(i, answer.StatusCode)
		})
	}
	requests.Wait()
	statuses.Range(func(_, status any) bool { return assert.Equal(t, http.StatusServiceUnavailable, status) })
	assert.Contains(t, s.get(""), "orders")
	hanging.Store(false)
	close(hang)
	eventually(t, func() bool { answer, _ := s.do(http.MethodGet, "dead?t=orders", nil); return answer.StatusCode == 200 })
}

type hanger struct {
	until   chan struct{}
	hanging *atomic.Bool
}

func (h hanger) wait() {
	if h.hanging.Load() {
		<-h.until
	}
}

func (h hanger) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h hanger) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { h.wait(); return next(ctx, cmd) }
}

func (h hanger) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error { h.wait(); return next(ctx, cmds) }
}

// Errors of Redis are shown without what it quotes.
func TestExplain(t *testing.T) {
	t.Parallel()
	reply := replyError("ERR unknown command 'x', with args beginning with: '" + secret + "'")
	assert.NotContains(t, explain(reply), secret)
	assert.Contains(t, explain(reply), "unknown command")
	assert.Equal(t, "Redis does not answer.", explain(errLost))
	assert.Equal(t, "Redis does not answer.", explain(errors.Join(context.DeadlineExceeded)))
}

// replyError is an error of the server's.
type replyError string

func (e replyError) Error() string { return string(e) }
func (replyError) RedisError()     {}
