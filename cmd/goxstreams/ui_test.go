package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// startUI serves pages until the test stops it, and returns their address and what it notes.
func startUI(t *testing.T, args ...string) (site string, notes *syncBuffer, stop func() int) {
	t.Helper()
	return startUIWith(t, redis.NewClient(&redis.Options{Addr: testserver.Addr(t)}), args...)
}

func startUIWith(t *testing.T, client *redis.Client, args ...string) (site string, notes *syncBuffer, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	var out syncBuffer
	notes = &syncBuffer{}
	ended := make(chan int, 1)
	go func() {
		ended <- runWith(ctx, client, append([]string{"ui", "--listen", "127.0.0.1:0", "--interval", "100ms"}, args...), streams{out: &out, err: notes})
	}()
	serving := regexp.MustCompile(`Serving (http://\S+/)`)
	await(t, func() bool { return serving.MatchString(notes.String()) })
	stop = func() int {
		cancel()
		select {
		case code := <-ended:
			return code
		case <-time.After(30 * time.Second):
			t.Fatal("it does not end: " + notes.String())
			return 0
		}
	}
	return serving.FindStringSubmatch(notes.String())[1], notes, stop
}

// browse sends a request as a browser does.
func browse(t *testing.T, method, at, host string, form url.Values) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, at, strings.NewReader(form.Encode()))
	require.NoError(t, err)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Sec-Fetch-Site", "same-origin")
	if host != "" {
		r.Host = host
	}
	answer, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	return answer.StatusCode, string(body)
}

func TestUI(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "1", err: errors.New("x")}, death{handler: "a", payload: "2", err: errors.New("x")})
	letters := "dead?t=" + url.QueryEscape(topic)
	all := url.Values{"do": {"delete"}, "which": {"all"}}
	letter := deadOf(t, client, topic)[0]
	message := "message?from=dead&id=" + letter + "&t=" + url.QueryEscape(topic)

	site, notes, stop := startUI(t, topic)
	status, page := browse(t, http.MethodGet, site, "", nil)
	assert.Equal(t, http.StatusOK, status)
	assert.Contains(t, page, topic)
	_, page = browse(t, http.MethodGet, site+message, "", nil)
	assert.Contains(t, page, "not shown")
	status, page = browse(t, http.MethodPost, site+letters, "", all)
	assert.Equal(t, http.StatusForbidden, status)
	assert.Contains(t, page, "read-only")
	status, _ = browse(t, http.MethodGet, site, "evil.example", nil)
	assert.Equal(t, http.StatusMisdirectedRequest, status)
	status, _ = browse(t, http.MethodGet, site, "localhost:80", nil)
	assert.Equal(t, http.StatusOK, status)
	assert.Zero(t, stop())
	assert.Contains(t, notes.String(), `delete "`+topic+`": refused: the page is read-only`)

	site, notes, stop = startUI(t, "--pattern", topic+"*", "--write", "--payloads", "--host", "ops.example")
	status, page = browse(t, http.MethodGet, site+message, "ops.example", nil)
	assert.Equal(t, http.StatusOK, status)
	assert.NotContains(t, page, "not shown")
	status, page = browse(t, http.MethodPost, site+letters, "ops.example", all)
	require.Equal(t, http.StatusOK, status)
	job := regexp.MustCompile(`job\?id=\w+`).FindString(page)
	count := regexp.MustCompile(`name="count" value="(\d+)"`).FindStringSubmatch(page)
	require.NotNil(t, count, page)
	_, _ = browse(t, http.MethodPost, site+job, "ops.example", url.Values{"do": {"confirm"}, "count": count[1:]})
	await(t, func() bool { return client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val() == 0 })
	assert.Zero(t, stop())
	assert.Contains(t, notes.String(), `delete "`+topic+`": `+count[1]+` done`)
}

func TestUIArguments(t *testing.T) {
	for want, args := range map[string][]string{
		"a topic is empty":             {"ui", ""},
		"--host is empty":              {"ui", "--host", ""},
		"--interval must be at least":  {"ui", "--interval", "1ms"},
		"no --output":                  {"ui", "--json"},
		"--write needs an address of ": {"ui", "--write", "--listen", ":0"},
	} {
		_, notes := ran(t, exitUsage, args...)
		assert.Contains(t, notes, want)
	}
	_, notes := ran(t, exitFailed, "ui", "--listen", "127.0.0.1:bogus")
	assert.Contains(t, notes, "--listen: ")
}

// The pages need the rights that README.md names, and no others.
func TestUIRights(t *testing.T) {
	testserver.RequireReal(t)
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "1", err: errors.New("x")}, death{handler: "a", payload: "2", err: errors.New("x")})
	ran(t, 0, "publish", topic, "y")
	read := &redis.XReadGroupArgs{Group: "a", Consumer: "c", Streams: []string{topic, ">"}}
	require.NoError(t, client.XReadGroup(t.Context(), read).Err())
	ran(t, 0, "publish", topic, "x", "--in", "1h", "--uuid", "later")
	rights := "+xlen +xinfo +xpending +xrange +xrevrange +zcard +zrange +hlen +hgetall +eval +zrank +zscore +zcount +zrangebyscore +hmget +scan"
	write := " +xdel +xadd +zrem +hdel +hget +hset +time"
	args := []any{"acl", "setuser", topic, "reset", "on", ">secret", "~" + topic + "*"}
	for _, r := range strings.Fields(rights + write) {
		args = append(args, r)
	}
	require.NoError(t, client.Do(t.Context(), args...).Err())
	t.Cleanup(func() { client.Do(context.Background(), "acl", "deluser", topic) })
	user := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Username: topic, Password: "secret"})
	site, notes, stop := startUIWith(t, user, "--pattern", topic+"*", "--write")
	q := "t=" + url.QueryEscape(topic)
	pending, err := client.XPendingExt(t.Context(), &redis.XPendingExtArgs{Stream: topic, Group: "a", Start: "-", End: "+", Count: 1}).Result()
	require.NoError(t, err)
	for _, ref := range []string{"", "topic?" + q, "group?g=a&" + q, "dead?" + q, "delayed?" + q, "message?from=delayed&uuid=later&" + q,
		"message?from=dead&id=" + deadOf(t, client, topic)[0] + "&" + q, "message?id=" + pending[0].ID + "&" + q} {
		status, page := browse(t, http.MethodGet, site+ref, "", nil)
		assert.Equal(t, http.StatusOK, status, ref)
		assert.NotContains(t, page, "unknown", ref)
		assert.NotContains(t, page, "refuses", ref)
	}
	for ref, form := range map[string]url.Values{
		"group?g=a&" + q: {"do": {"pause"}}, "message?from=delayed&uuid=later&" + q: {},
	} {
		status, page := browse(t, http.MethodPost, site+ref, "", form)
		assert.Equal(t, http.StatusOK, status, page)
	}
	ids := deadOf(t, client, topic)
	for i, verb := range []string{"replay", "delete"} {
		_, page := browse(t, http.MethodPost, site+"dead?"+q, "", url.Values{"do": {verb}, "which": {"chosen"}, "id": {ids[i]}})
		job := regexp.MustCompile(`job\?id=\w+`).FindString(page)
		_, _ = browse(t, http.MethodPost, site+job, "", url.Values{"do": {"confirm"}, "count": {"1"}})
		await(t, func() bool {
			_, page := browse(t, http.MethodGet, site+job, "", nil)
			return strings.Contains(page, "1 of 1 dead letters")
		})
	}
	assert.Empty(t, deadOf(t, client, topic))
	assert.Zero(t, stop(), notes.String())
}
