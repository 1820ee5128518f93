package goxui

import (
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestNew_BadInput(t *testing.T) {
	t.Parallel()
	_, err := New(Config{Client: (*redis.Client)(nil), Topics: []string{""}, Hosts: []string{""}, Interval: time.Millisecond})
	for _, field := range []string{"Client", "Topics", "Hosts", "Interval"} {
		assert.ErrorContains(t, err, "goxui: Config."+field+": ")
	}
}

// Every page has what it is for.
func TestPages(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	s.world("orders")
	for ref, want := range map[string][]string{
		"":                         {"1 topic", "orders", "Oldest pending"},
		"?q=nothing":               {"0 topics"},
		"?sort=dead&page=7":        {"1 topic"},
		"topic?t=orders":           {"Length 6", "Dead letters 3", "Delayed 2", "billing"},
		"group?t=orders&g=billing": {"Consumers", "pod-1", "Pending entries"},
		"group?t=orders&g=billing&consumer=none&idle=1d&deliveries=5": {"None."},
		"dead?t=orders":                         {"3 entries in orders.dead{orders}", "permanent", "billing", "bill", "card 4711 declined", "Replay…", "Delete…"},
		"dead?t=orders&reason=other":            {"None that match"},
		"delayed?t=orders":                      {"2 delayed messages", "l1", "l2", "in 59 min", "Cancel…"},
		"message?t=orders&from=delayed&uuid=l1": {"Due in 59 min", "UUID l1", "tenant t7", "19 bytes, not shown", "Cancel this message"},
	} {
		page := text(s.get(ref))
		for _, w := range want {
			assert.Contains(t, page, w, ref)
		}
	}
	letters := regexp.MustCompile(`message\?[^"]*from=dead[^"]*`).FindAllString(s.get("dead?t=orders"), -1)
	require.Len(t, letters, 3)
	page := text(s.get(strings.ReplaceAll(letters[1], "&amp;", "&")))
	for _, w := range []string{"card 4711 declined", "permanent", "Group billing", "Handler bill", "UUID d2", "tenant t7", "Replay…", "Delete…"} {
		assert.Contains(t, page, w)
	}
	pending := regexp.MustCompile(`message\?id=[^"]*`).FindAllString(s.get("group?t=orders&g=billing"), -1)
	require.Len(t, pending, 2)
	assert.Contains(t, text(s.get(strings.ReplaceAll(pending[0], "&amp;", "&"))), "UUID p1")
}

func TestPages_BadInput(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	s.world("orders")
	for ref, want := range map[string]struct {
		status int
		text   string
	}{
		"nothing":                                {404, "no such page"},
		"topic":                                  {404, "no such topic"},
		"topic?t=other":                          {404, "no such topic"},
		"group?t=orders&g=other":                 {404, "no such group"},
		"group?t=orders&g=billing&idle=x":        {400, "Idle for: want an age"},
		"group?t=orders&g=billing&deliveries=-1": {400, "Deliveries: want a number"},
		"group?t=orders&g=billing&after=x":       {400, "After: an entry ID"},
		"dead?t=orders&kind=x":                   {400, "Kind: "},
		"dead?t=orders&older=-3d":                {400, "Older than: want an age"},
		"dead?t=orders&newer=x":                  {400, "Newer than: want an age"},
		"dead?t=orders&after=x":                  {400, "After: an entry ID"},
		"delayed?t=orders&after=x-y":             {400, "After: want milliseconds"},
		"message?t=orders&id=x":                  {400, "ID: an entry ID"},
		"message?t=orders&id=1-1":                {404, "no such message"},
		"message?t=orders&from=dead&id=1-1":      {404, "no such message"},
		"message?t=orders&from=delayed&uuid=x":   {404, "no such message"},
		"job?id=x":                               {404, "no such replay or delete"},
	} {
		answer, page := s.do(http.MethodGet, ref, nil)
		assert.Equal(t, want.status, answer.StatusCode, ref)
		assert.Contains(t, text(page), want.text, ref)
	}
	for ref, forms := range map[string]map[string][]string{
		"dead?t=orders":    {"Replay, or delete?": nil, "Nothing is selected": {"do", "replay", "which", "chosen"}, "ID: an entry ID": {"do", "delete", "which", "chosen", "id", "x"}, "cannot be replayed": {"do", "replay", "kind", "foreign"}},
		"message?t=orders": {"UUID is missing": nil},
		"topic?t=orders":   {"does not take this method": nil},
		"":                 {"does not take this method": nil},
	} {
		for want, form := range forms {
			answer, page := s.post(ref, form...)
			assert.GreaterOrEqual(t, answer.StatusCode, 400)
			assert.Contains(t, text(page), want, ref)
		}
	}
	assert.EqualValues(t, 3, s.letters("orders"))
}

// crawl gets all pages that are linked to, and returns them.
func (s *site) crawl() map[string]string {
	s.t.Helper()
	pages := map[string]string{}
	todo := []string{""}
	for len(todo) > 0 {
		ref := todo[0]
		todo = todo[1:]
		ref, _, _ = strings.Cut(strings.TrimPrefix(ref, "./"), "#")
		if _, done := pages[ref]; done || strings.Contains(ref, ".css") || strings.Contains(ref, ".svg") {
			continue
		}
		pages[ref] = s.get(ref)
		todo = append(todo, links(pages[ref])...)
	}
	return pages
}

// Whatever topics, groups, consumers, handlers, reasons, UUIDs and metadata are: nothing of it is markup,
// no link leads elsewhere, all pages can be reached, and no page has a payload.
func TestHostile(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	const evil = `"'></textarea></title><script>alert(1)</script><img src=x onerror=alert(2)>{{.}}&amp; javascript:alert(3)`
	const unseen = "\u202eevil\u200b\x1b[2J\x00\xff/../?a=b&c=d#e"
	for i, topic := range []string{evil, unseen, "..", "javascript:alert(4)", "//example.com/"} {
		msg := message.NewMessage(evil+unseen, []byte(secret))
		msg.Metadata.Set(evil, evil)
		msg.Metadata.Set("x"+unseen, unseen)
		s.die(topic, evil, evil+unseen, evil+unseen+secret[:2], msg)
		s.publish(topic, msg)
		s.hold(topic, evil, unseen, 1)
		s.hold(topic, unseen, evil, 2)
		if i == 0 {
			require.NoError(t, s.client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{evil, secret}}).Err())
			s.hold(topic, evil, evil, 1)
		}
		s.later(topic, evil, unseen)
	}
	pages := s.crawl()
	assert.Greater(t, len(pages), 50)
	for _, evilText := range []string{"%3Cscript", "message?", "group?", "dead?", "delayed?", "%E2%80%AEevil"} {
		assert.True(t, slices.ContainsFunc(mapKeys(pages), func(ref string) bool { return strings.Contains(ref, evilText) }), evilText)
	}
	for _, filter := range []string{"reason", "handler", "group", "older"} {
		_, page := s.do(http.MethodGet, link("dead", "t", evil, filter, evil), nil)
		pages[filter] = page
	}
	_, pages["job"] = s.post(link("dead", "t", evil), "do", "replay", "which", "all", "reason", evil[:9])
	_, pages["notice"] = s.do(http.MethodGet, link("topic", "t", "..", "notice", evil), nil)
	_, pages["q"] = s.do(http.MethodGet, link("", "q", evil), nil)
	markup := regexp.MustCompile(`(?s)<[^>]*>`)
	for ref, page := range pages {
		assert.False(t, strings.Contains(page, secret), ref)
		assert.False(t, strings.Contains(page, "\u202e"), ref)
		assert.False(t, strings.Contains(page, "\x1b"), ref)
		assert.Equal(t, 1, strings.Count(page, "<script"), ref) // live.js
		for _, tag := range markup.FindAllString(page, -1) {
			// The attributes' values are quoted, and have neither quotes nor brackets.
			bare := regexp.MustCompile(`"[^"]*"`).ReplaceAllString(tag, "")
			assert.NotRegexp(t, `(?i)script[^ >]|onerror|style|<img|javascript|example`, strings.TrimPrefix(bare, "<script src= defer>"), ref)
		}
		for _, to := range links(page) {
			assert.Regexp(t, `^(\./|#|[a-z]+(\.css|\.svg)?\?)`, to, ref)
		}
	}
	assert.NotContains(t, s.log.String(), secret)
}

func mapKeys(m map[string]string) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	return keys
}

// Answers have the headers that keep scripts, frames and caches out, and pages nothing that they forbid.
func TestHeaders(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	s.world("orders")
	for _, ref := range []string{"", "topic?t=orders", "dead?t=orders", "nothing", "live.js", "style.css"} {
		answer, page := s.do(http.MethodGet, ref, nil)
		policy := answer.Header.Get("Content-Security-Policy")
		for _, directive := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'"} {
			assert.Contains(t, policy, directive)
		}
		assert.NotContains(t, policy, "unsafe")
		assert.Equal(t, "nosniff", answer.Header.Get("X-Content-Type-Options"))
		assert.Equal(t, "DENY", answer.Header.Get("X-Frame-Options"))
		assert.Equal(t, "same-origin", answer.Header.Get("Referrer-Policy"))
		assert.Equal(t, "no-store", answer.Header.Get("Cache-Control"))
		if strings.HasPrefix(answer.Header.Get("Content-Type"), "text/html") {
			assert.NotRegexp(t, `(?i)<style|\sstyle=|\son[a-z]+=|<script>`, page)
		}
	}
	answer, _ := s.do(http.MethodGet, asset("live.js"), nil)
	assert.Contains(t, answer.Header.Get("Cache-Control"), "immutable")
}

// What another site makes a browser send changes nothing.
func TestCrossSite(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	s.world("orders")
	for _, headers := range [][]string{
		{"Sec-Fetch-Site", "cross-site"},
		{"Sec-Fetch-Site", "same-site", "Origin", "http://other.example"},
		{"Sec-Fetch-Site", "", "Origin", "http://evil.example"},
		{"Sec-Fetch-Site", "", "Origin", "null"},
		{"Sec-Fetch-Site", ""}, // neither
	} {
		answer, page := s.do(http.MethodPost, "message?t=orders&uuid=l1", nil, headers...)
		assert.Equal(t, http.StatusForbidden, answer.StatusCode, headers)
		assert.Contains(t, page, "another site")
		answer, _ = s.do(http.MethodPost, "dead?t=orders", map[string][]string{"do": {"delete"}, "which": {"all"}}, headers...)
		assert.Equal(t, http.StatusForbidden, answer.StatusCode, headers)
	}
	assert.Empty(t, s.audited())
	// An old browser, or one that talks plain HTTP.
	answer, page := s.do(http.MethodPost, "message?t=orders&uuid=l1", nil, "Sec-Fetch-Site", "", "Origin", s.server.URL)
	assert.Equal(t, http.StatusOK, answer.StatusCode)
	assert.Contains(t, page, "The message is cancelled.")
}

// Another site may link to a page, and hold nothing else open.
func TestCrossSite_Reads(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	s.publish("orders", order("a"))
	for ref, headers := range map[string][]string{"events": {"Sec-Fetch-Mode", "no-cors"}, "": {"Sec-Fetch-Mode", "cors"}} {
		answer, _ := s.do(http.MethodGet, ref, nil, append(headers, "Sec-Fetch-Site", "cross-site")...)
		assert.Equal(t, http.StatusForbidden, answer.StatusCode)
	}
	answer, _ := s.do(http.MethodGet, "", nil, "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Site", "cross-site")
	assert.Equal(t, http.StatusOK, answer.StatusCode)
}

// Functions of the Config that panic end neither the process nor other pages; after Close there are answers.
func TestPanicsAndClose(t *testing.T) {
	t.Parallel()
	var panics atomic.Bool
	s := newSite(t, func(c *Config) {
		c.Authorize = everything
		c.DeadLetterTopic = func(topic string) string {
			if panics.Load() {
				panic("dead-letter topic")
			}
			return goxstreams.DeadLetterTopic(topic)
		}
	})
	s.world("orders")
	s.get("")
	panics.Store(true)
	eventually(t, func() bool { return strings.Contains(s.get(""), "Something is wrong here") })
	panics.Store(false)
	eventually(t, func() bool { return !strings.Contains(s.get(""), "Something is wrong here") })
	s.handler.Close()
	assert.Contains(t, s.get(""), "orders")
	answer, page := s.do(http.MethodGet, "group?t=orders&g=billing", nil)
	assert.Equal(t, http.StatusServiceUnavailable, answer.StatusCode)
	assert.Contains(t, page, "The page is being closed.")
	_, page = s.post("dead?t=orders", "do", "delete", "which", "all")
	assert.Contains(t, page, "The page is being closed.")
	assert.EqualValues(t, 3, s.letters("orders"))
}

// A message with a lot of everything is shown in part.
func TestLargeMessage(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	msg := order("large")
	for i := range 2 * maxFields {
		msg.Metadata.Set(strings.Repeat("k", i+1), strings.Repeat("v", 10_000))
	}
	s.publish("orders", msg)
	entries, err := s.client.XRange(t.Context(), "orders", "-", "+").Result()
	require.NoError(t, err)
	page := s.get(link("message", "t", "orders", "id", entries[0].ID))
	assert.Contains(t, page, "There are more.")
	assert.Less(t, len(page), 2<<20)
}

func TestHosts(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Hosts = []string{"127.0.0.1", "::1"} })
	s.get("")
	for host, status := range map[string]int{"evil.example": 421, "127.0.0.1.evil.example:80": 421, "[::1]:80": 200, "[::1]": 200} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.server.URL+"/ops/", nil)
		require.NoError(t, err)
		r.Host = host
		answer, err := http.DefaultClient.Do(r)
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		assert.Equal(t, status, answer.StatusCode, host)
	}
}

// Without Authorize nothing can be changed, and no page offers it.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	s.world("orders")
	for ref, page := range s.crawl() {
		assert.NotContains(t, page, `method="post"`+" action", ref+" offers a change")
		assert.NotContains(t, page, "Replay…", ref)
		assert.NotContains(t, page, "Cancel", ref)
	}
	for ref, form := range map[string][]string{
		"dead?t=orders": {"do", "delete", "which", "all"}, "message?t=orders&uuid=l1": nil, "group?t=orders&g=billing": {"do", "pause"},
	} {
		answer, page := s.post(ref, form...)
		assert.Equal(t, http.StatusForbidden, answer.StatusCode)
		assert.Contains(t, page, "Not allowed: the page is read-only")
	}
	assert.EqualValues(t, 3, s.letters("orders"))
	events := s.audited()
	require.Len(t, events, 3)
	assert.Equal(t, Refused, events[0].Stage)
}

// Authorize decides about everything that can be seen and done.
func TestAuthorize(t *testing.T) {
	t.Parallel()
	var refuse Action
	s := newSite(t, func(c *Config) {
		c.Authorize = func(_ *http.Request, a Action) error {
			if a.Verb == refuse.Verb && a.Topic == refuse.Topic {
				return errors.New("ask <the> boss")
			}
			return nil
		}
	})
	s.world("orders")
	s.publish("secrets", order("x"))
	eventually(t, func() bool { return strings.Contains(s.get(""), "secrets") })
	_, job := s.post("dead?t=orders", "do", "replay", "which", "all")
	require.Contains(t, text(job), "Replay 3 dead letters")
	confirm := regexp.MustCompile(`job\?id=\w+`).FindString(job)

	refused := func(a Action, method, ref string, form ...string) {
		t.Helper()
		refuse = a
		send := s.do
		answer, page := send(method, ref, formOf(form...))
		assert.Equal(t, http.StatusForbidden, answer.StatusCode, ref)
		assert.Contains(t, page, "Not allowed: ask &lt;the&gt; boss")
	}
	refused(Action{Verb: View}, http.MethodGet, "")
	refused(Action{Verb: View}, http.MethodGet, "events")
	view := Action{Verb: View, Topic: "orders"}
	for _, ref := range []string{"topic?t=orders", "group?t=orders&g=billing", "dead?t=orders", "delayed?t=orders", "message?t=orders&from=delayed&uuid=l1", "events?t=orders", confirm, strings.Replace(confirm, "job?id", "events?job", 1)} {
		refused(view, http.MethodGet, ref)
	}
	assert.NotContains(t, s.get(""), "orders", "the list does not show it")
	refused(Action{Verb: ViewMessage, Topic: "orders"}, http.MethodGet, "message?t=orders&from=delayed&uuid=l1")
	refused(Action{Verb: Replay, Topic: "orders"}, http.MethodPost, "dead?t=orders", "do", "replay", "which", "all")
	refused(Action{Verb: Replay, Topic: "orders"}, http.MethodPost, confirm, "do", "confirm", "count", "3")
	refused(Action{Verb: Replay, Topic: "orders"}, http.MethodPost, confirm, "do", "stop")
	assert.NotContains(t, s.get("dead?t=orders"), "Replay…")
	refused(Action{Verb: Delete, Topic: "orders"}, http.MethodPost, "dead?t=orders", "do", "delete", "which", "all")
	assert.NotContains(t, s.get("dead?t=orders"), "Delete…")
	refused(Action{Verb: Cancel, Topic: "orders"}, http.MethodPost, "message?t=orders&uuid=l1")
	refused(Action{Verb: Pause, Topic: "orders"}, http.MethodPost, "group?t=orders&g=billing", "do", "pause")
	refused(Action{Verb: Resume, Topic: "orders"}, http.MethodPost, "group?t=orders&g=billing", "do", "resume")
	assert.EqualValues(t, 3, s.letters("orders"))
	for _, e := range s.audited() {
		assert.Equal(t, Refused, e.Stage)
	}
}

func formOf(pairs ...string) map[string][]string {
	form := map[string][]string{}
	for i := 0; i < len(pairs); i += 2 {
		form[pairs[i]] = append(form[pairs[i]], pairs[i+1])
	}
	return form
}

// What is not in Config.Topics, and does not match the pattern, cannot be reached.
func TestTopicsAndPattern(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Topics, c.Pattern, c.Authorize = []string{"planned"}, "or*", everything })
	s.world("orders")
	s.publish("secrets", order("x"))
	page := s.get("")
	assert.Contains(t, text(page), "2 topics")
	assert.Contains(t, text(s.get("topic?t=planned")), "There is no stream yet")
	for _, ref := range []string{"topic?t=secrets", "dead?t=secrets", "delayed?t=secrets", "message?t=secrets&id=1-1", "topic?t=orders.dead%7Borders%7D"} {
		answer, _ := s.do(http.MethodGet, ref, nil)
		assert.Equal(t, http.StatusNotFound, answer.StatusCode, ref)
	}
	answer, _ := s.post("dead?t=secrets", "do", "delete", "which", "all")
	assert.Equal(t, http.StatusNotFound, answer.StatusCode)
}

// A payload is on no page, unless Render returns it, and then as text.
func TestRender(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) {
		c.Render = func(_ *http.Request, topic string, msg *message.Message) string {
			if topic != "orders" || msg.UUID == "l2" {
				return ""
			}
			return "<b>" + string(msg.Payload) + "\u202e</b>" + strings.Repeat("x", maxPayload)
		}
	})
	s.world("orders")
	page := s.get("message?t=orders&from=delayed&uuid=l1")
	assert.Contains(t, page, "&lt;b&gt;"+secret+`l1\u202e&lt;/b&gt;`)
	assert.Contains(t, page, "The rest is not shown.")
	assert.NotContains(t, s.get("message?t=orders&from=delayed&uuid=l2"), secret)
	assert.NotContains(t, s.get("dead?t=orders"), secret)
}

func TestCancel(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	s.world("orders")
	_, page := s.post("message?t=orders&from=delayed&uuid=l1")
	assert.Contains(t, page, "The message is cancelled.")
	assert.NotContains(t, page, "l1")
	assert.Contains(t, page, "l2")
	_, page = s.post("message?t=orders&from=delayed&uuid=l1")
	assert.Contains(t, page, "not delayed any more")
	a := Action{Verb: Cancel, Topic: "orders", ID: "l1"}
	events := s.audited()
	require.Len(t, events, 4)
	assert.Equal(t, []AuditEvent{{Action: a, Stage: Begun}, {Action: a, Stage: Ended, Done: 1}, {Action: a, Stage: Begun}}, events[:3])
	assert.ErrorContains(t, events[3].Err, "not found")
}

func TestPause(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.Authorize = everything })
	s.world("orders")
	group := "group?t=orders&g=billing"
	assert.Contains(t, s.get(group), "Pause the group")
	_, page := s.post(group, "do", "pause")
	assert.Contains(t, page, "The group is paused.")
	assert.Contains(t, page, "Paused since 20")
	assert.Contains(t, page, "Resume the group")
	paused, err := goxstreams.Paused(t.Context(), s.client, "orders")
	require.NoError(t, err)
	assert.Len(t, paused, 1)
	eventually(t, func() bool { return strings.Contains(s.get(""), "1 paused") })
	assert.Contains(t, s.get("topic?t=orders"), "paused since 20")
	_, page = s.post(group, "do", "resume")
	assert.Contains(t, page, "The group is resumed.")
	assert.Contains(t, page, "Pause the group")
	a := Action{Topic: "orders", Group: "billing"}
	pause, resume := a, a
	pause.Verb, resume.Verb = Pause, Resume
	assert.Equal(t, []AuditEvent{{Action: pause, Stage: Begun}, {Action: pause, Stage: Ended, Done: 1}, {Action: resume, Stage: Begun}, {Action: resume, Stage: Ended, Done: 1}}, s.audited())
	for want, form := range map[string][]string{"Pause, or resume?": nil, "no such group": {"do", "pause"}} {
		ref := group
		if form != nil {
			ref += "x"
		}
		answer, page := s.post(ref, form...)
		assert.GreaterOrEqual(t, answer.StatusCode, 400)
		assert.Contains(t, text(page), want)
	}
}

func TestFormats(t *testing.T) {
	t.Parallel()
	assert.Equal(t, "1,234,567", number(1234567))
	assert.Equal(t, "–", number(-1))
	assert.Equal(t, "123", number(123))
	assert.Equal(t, "0.5", rate(0.5))
	assert.Equal(t, "1,000", rate(999.6))
	assert.Equal(t, "–", rate(-1))
	assert.Equal(t, `a\u202e\x00\xff`, safe("a\u202e\x00\xff"))
	assert.Equal(t, "12…", short(3, "12345"))
	assert.Equal(t, "a\n    b", lines("a\r\n\tb"))
	for text, d := range map[string]time.Duration{"90m": 90 * time.Minute, "3d": 72 * time.Hour, " 1h ": time.Hour, "0s": 0} {
		got, err := parseAge(text)
		require.NoError(t, err)
		assert.Equal(t, d, got)
	}
	for _, text := range []string{"", "x", "-1h", "9999999999d", "1dd"} {
		_, err := parseAge(text)
		assert.Error(t, err, text)
	}
	id, err := parseID("5-0")
	require.NoError(t, err)
	assert.Equal(t, "4-18446744073709551615", id.previous().String())
	assert.Equal(t, id, id.previous().next())
}

func FuzzSafe(f *testing.F) {
	f.Add("a\u202e\xff<script>")
	f.Fuzz(func(t *testing.T, s string) {
		assert.NotRegexp(t, `[\x00-\x1f\x7f]`, safe(s))
		assert.NotContains(t, safe(s), "\u202e")
	})
}
