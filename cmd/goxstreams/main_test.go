package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestTopicsGroupsPending(t *testing.T) {
	testserver.RequireReal(t) // the embedded server has no lag
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "1", err: errors.New("x")})
	for range 3 {
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"body", "b"}}).Err())
	}
	read := &redis.XReadGroupArgs{Group: "a", Consumer: "c1", Streams: []string{topic, ">"}, Count: 2}
	require.NoError(t, client.XReadGroup(t.Context(), read).Err())

	row := parsed(t, "topics", topic+"*")
	require.Len(t, row, 1, "the dead-letter stream is no row of its own")
	assert.Equal(t, map[string]any{
		"topic": topic, "length": 4.0, "groups": 1.0, "pending": 2.0, "max_lag": 1.0, "dead_letters": 1.0,
		"dead_letter_topic": goxstreams.DeadLetterTopic(topic), "delayed": 0.0, "overdue_seconds": 0.0,
	}, row[0])
	out, _ := ran(t, 0, "topics", topic+"*")
	assert.Regexp(t, `^TOPIC +LENGTH +GROUPS +PENDING +LAG +DEAD +DELAYED +OVERDUE\n`+topic+` +4 +1 +2 +1 +1 +0 +-\n$`, out)
	require.NoError(t, client.XTrimMaxLen(t.Context(), topic, 3).Err())

	entries := stored(t, client, topic)
	group := parsed(t, "groups", topic)
	require.Len(t, group, 1)
	assert.Equal(t, "a", group[0]["group"])
	assert.Equal(t, 2.0, group[0]["pending"])
	assert.Equal(t, entries[0].ID, group[0]["oldest_pending_id"])
	assert.Equal(t, entries[1].ID, group[0]["last_delivered_id"])
	out, _ = ran(t, 0, "groups", topic)
	assert.Regexp(t, `\na +\d +2 +1 +`+entries[1].ID, out)

	assert.Equal(t, []string{entries[0].ID, entries[1].ID}, column(parsed(t, "pending", topic, "a"), "id"))
	assert.Len(t, parsed(t, "pending", topic, "a", "--limit", "1"), 1)
	assert.Len(t, parsed(t, "pending", topic, "a", "--consumer", "c1", "--min-deliveries", "1"), 2)
	assert.Empty(t, parsed(t, "pending", topic, "a", "--min-deliveries", "2"))
	assert.Empty(t, parsed(t, "pending", topic, "a", "--min-idle", "1h"))
	out, _ = ran(t, 0, "pending", topic, "a")
	assert.Regexp(t, `^ID +AGE +IDLE +DELIVERIES +CONSUMER\n`+entries[0].ID+` +\d+\w +\d+\w +1 +c1\n`, out)

	_, notes := ran(t, exitFailed, "pending", topic, "nobody")
	assert.Contains(t, notes, `has no group "nobody"`)
	_, notes = ran(t, exitFailed, "groups", topic+"-none")
	assert.Contains(t, notes, "there is no stream")
	_, notes = ran(t, 0, "dead", "list", topic+"-none")
	assert.Contains(t, notes, "has no dead letters")
}

// More is pending than one answer of Redis's holds.
func TestPendingPages(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	const n = 2345
	_, err := client.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
		for range n {
			pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"body", "b"}})
		}
		pipe.XGroupCreate(t.Context(), topic, "g", "0")
		pipe.XReadGroup(t.Context(), &redis.XReadGroupArgs{Group: "g", Consumer: "c", Streams: []string{topic, ">"}, Count: n})
		return nil
	})
	require.NoError(t, err)
	rows := parsed(t, "pending", topic, "g")
	seen := make(map[string]bool)
	for _, id := range column(rows, "id") {
		seen[id] = true
	}
	assert.Len(t, rows, n)
	assert.Len(t, seen, n)
}

func TestTail(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	require.NoError(t, err)
	msg := message.NewMessage("uuid-1", []byte(`{"n":1}`))
	msg.Metadata.Set("k", "v")
	require.NoError(t, pub.Publish(topic, msg))
	add := func(fields ...string) {
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: fields}).Err())
	}
	add("body", "two", "ctx", `{"trace":"t"}`)
	add("x", "three")

	out, _ := ran(t, 0, "tail", topic, "--metadata-field", "ctx")
	got := strings.Split(out, "\n")
	require.Len(t, got, 4)
	assert.Regexp(t, `^\d+-\d+ \d{4}-\d\d-\d\dT[\d:.]{12}Z uuid-1 k=v {"n":1}$`, got[0])
	assert.Regexp(t, `Z trace=t two$`, got[1])
	assert.Regexp(t, `Z no message \(.* is missing\): x=three$`, got[2])
	rows := parsed(t, "tail", topic, "-n", "2")
	assert.Equal(t, []string{"two", "<nil>"}, column(rows, "payload"))
	assert.Equal(t, map[string]any{"x": "three"}, rows[1]["fields"])

	// It goes on with what comes, and ends when it is interrupted.
	c := onTest(t)
	var cancel context.CancelFunc
	c.ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int)
	go func() { code <- c.run("tail", topic, "-f", "-n", "1") }()
	await(t, func() bool { return strings.Contains(c.out.String(), "x=three") })
	add("body", "four")
	await(t, func() bool { return strings.HasSuffix(c.out.String(), " four\n") })
	assert.Equal(t, 2, strings.Count(c.out.String(), "\n"))
	cancel()
	assert.Equal(t, 0, <-code)

	groups, err := client.XInfoGroups(t.Context(), topic).Result()
	require.NoError(t, err)
	assert.Empty(t, groups)
}

func await(t *testing.T, condition func() bool) {
	t.Helper()
	require.Eventually(t, condition, 30*time.Second, 5*time.Millisecond)
}

// The password is nowhere, whatever is wrong with the URL. Most of these are passwords that are not encoded.
func TestPasswordIsNotPrinted(t *testing.T) {
	const secret = "hunter2"
	for _, url := range []string{
		"redis://user:" + secret + "@127.0.0.1:1/0",
		"redis://user:" + secret + "@127.0.0.1:1?addr=127.0.0.1:2",
		"redis://user:12/" + secret + "@127.0.0.1:6379/0",
		"redis://user:" + secret + "/x@127.0.0.1:6379/0",
		"redis://user:1?" + secret + "@127.0.0.1:6379/0",
		"redis://user:1#" + secret + "@127.0.0.1:6379/0",
		"redis://user:%" + secret + "@127.0.0.1:6379/0",
		"redis://user:1 " + secret + "@127.0.0.1:6379/0",
		"redis://user:" + secret + "@127.0.0.1:port/0",
		"redis://user:" + secret + "@127.0.0.1:1/database",
		secret + "://user@127.0.0.1",
		"user:" + secret + "@127.0.0.1:6379",
		secret + "@127.0.0.1:6379",
		"http://user:" + secret + "@127.0.0.1:6379",
		"redis+sentinel://user:" + secret + "@127.0.0.1:1/master",
		"redis+sentinel://127.0.0.1:1/master?sentinel_password=" + secret,
		"redis+sentinel://user:12/" + secret + "@127.0.0.1:1/master",
		"redis+sentinel://user:1?" + secret + "@127.0.0.1:1/master",
		"redis+sentinel://user:%" + secret + "@127.0.0.1:1/master",
		"redis+sentinel://user:" + secret + "@127.0.0.1:x/master",
	} {
		t.Setenv("REDIS_URL", url)
		for _, args := range [][]string{{"topics"}, {"topics", "--cluster"}, {"dead", "list", "orders"}, {"__complete", "groups", ""}} {
			var c command
			code := c.run(args...)
			assert.NotContains(t, c.out.String()+c.err.String(), secret, "%s %v", url, args)
			if args[0] != "__complete" {
				assert.Contains(t, []int{exitFailed, exitUsage}, code, "%s %v: %s", url, args, c.err.String())
				assert.NotEmpty(t, c.err.String())
			}
		}
	}
	t.Setenv("REDIS_URL", "redis://user:"+secret+"@"+testserver.Addr(t))
	var c command
	assert.Equal(t, exitFailed, c.run("topics"))
	assert.NotContains(t, c.err.String(), secret)
	t.Setenv("REDIS_URL", "redis://"+testserver.Addr(t)) // and it is used
	assert.Zero(t, c.run("topics"))
}

func TestTLSFlags(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty.pem")
	require.NoError(t, os.WriteFile(empty, nil, 0o600))
	for _, tt := range []struct {
		code int
		want string
		args []string
	}{
		{exitUsage, "need a URL that begins with rediss://", []string{"--url", "redis://127.0.0.1:1", "--tls-ca", empty}},
		{exitUsage, "need each other", []string{"--url", "rediss://127.0.0.1:1", "--tls-cert", empty}},
		{exitFailed, "no certificate in", []string{"--url", "rediss://127.0.0.1:1", "--tls-ca", empty}},
		{exitFailed, "--tls-ca: open", []string{"--url", "rediss://127.0.0.1:1", "--tls-ca", empty + "x"}},
		{exitFailed, "--tls-cert, --tls-key:", []string{"--cluster", "--url", "rediss://127.0.0.1:1", "--tls-cert", empty, "--tls-key", empty}},
	} {
		var c command
		assert.Equal(t, tt.code, c.run(append(tt.args, "topics")...), "%v", tt.args)
		assert.Contains(t, c.err.String(), tt.want)
	}
}

func TestCompletion(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	require.NoError(t, client.XGroupCreateMkStream(t.Context(), topic, "billing", "0").Err())
	out, _ := ran(t, 0, "__complete", "pending", "")
	assert.Contains(t, out, topic+"\n")
	out, _ = ran(t, 0, "__complete", "pending", topic, "")
	assert.Equal(t, "billing\n:4\n", out)
	out, _ = ran(t, 0, "__complete", "dead", "list", topic, "--kind", "")
	assert.Contains(t, out, "permanent\n")
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		out, _ = ran(t, 0, "completion", shell)
		assert.Contains(t, out, "goxstreams")
	}
}

// Commands that only read get along with a user who may do nothing else, and replay and delete with
// the rights that README.md names.
func TestRights(t *testing.T) {
	testserver.RequireReal(t)
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "1", err: errors.New("x")}, death{handler: "a", payload: "2", err: errors.New("x")})
	user := topic
	t.Cleanup(func() { client.Do(context.Background(), "acl", "deluser", user) })
	allow := func(rights string) *command {
		args := []any{"acl", "setuser", user, "reset", "on", ">secret", "~" + topic + "*"}
		for _, r := range strings.Fields(rights) {
			args = append(args, r)
		}
		require.NoError(t, client.Do(t.Context(), args...).Err())
		return &command{url: fmt.Sprintf("redis://%s:secret@%s", user, testserver.Addr(t))}
	}
	ids := deadOf(t, client, topic)
	reads := "+xlen +xrange +xrevrange"
	delayed := "+eval +zrange +zrank +zscore +zcount +zrangebyscore +hmget"
	export, _ := exportOf(t, topic)
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: ids[0], Values: []string{"body", "b"}}).Err())
	read := &redis.XReadGroupArgs{Group: "a", Consumer: "c1", Streams: []string{topic, ">"}}
	require.NoError(t, client.XReadGroup(t.Context(), read).Err())
	for _, uuid := range []string{"d1", "d2"} {
		ran(t, 0, "publish", topic, "x", "--in", "1h", "--uuid", uuid)
	}
	messages := filepath.Join(t.TempDir(), "messages")
	require.NoError(t, os.WriteFile(messages, []byte(`{"payload": "1"}`+"\n"+`{"payload": "2"}`), 0o600))
	for _, tt := range []struct {
		rights string
		args   []string
	}{
		{"+scan +xlen +xinfo|groups +zcard +zrange", []string{"topics", topic + "*"}},
		{"+xinfo|groups +xpending +hgetall", []string{"groups", topic}},
		{"+xpending", []string{"pending", topic, "a"}},
		{"+xrevrange", []string{"tail", topic}},
		{"+xrange", []string{"get", topic, ids[0]}},
		{"+xinfo|consumers", []string{"consumers", topic, "a"}},
		{"+xadd", []string{"publish", topic, "x"}},
		{"+eval +time +zscore +zadd +hget +hset +zrange", []string{"publish", topic, "x", "--in", "1h"}},
		{delayed, []string{"delayed", "list", topic}},
		{"+eval +zscore +hmget", []string{"delayed", "show", topic, "d1"}},
		{"+eval +zscore +hmget", []string{"delayed", "cancel", topic, "d1", "--dry-run"}},
		{"+eval +zscore +zadd", []string{"delayed", "reschedule", topic, "2h", "d1", "--yes"}},
		{"+eval +zrem +hdel", []string{"delayed", "cancel", topic, "d1", "--yes"}},
		{"+xadd +multi +exec", []string{"publish", topic, "--json-lines", "--file", messages}},
		{"+xpending", []string{"pending", "ack", topic, "a", "--all", "--dry-run"}},
		{"+xpending +eval +xclaim", []string{"pending", "release", topic, "a", "--all", "--yes"}},
		{"+xpending +eval +xclaim", []string{"pending", "claim", topic, "a", "--to", "c", "--all", "--yes"}},
		{"+xpending +eval +xack", []string{"pending", "ack", topic, "a", "--all", "--yes"}},
		{"+xinfo|stream +xrange +xgroup|create", []string{"group", "create", topic, "new", "--from", "1h", "--yes"}},
		{"+xinfo|stream +xinfo|groups +xrange", []string{"group", "reset", topic, "new", "--to", "2h", "--dry-run"}},
		{"+xinfo|stream +xinfo|groups +xrange +eval +xgroup|setid", []string{"group", "reset", topic, "new", "--to", "end", "--yes"}},
		{"+xinfo|groups", []string{"group", "pause", topic, "new", "--dry-run"}},
		{"+xinfo|groups +eval +time +hget +hset", []string{"group", "pause", topic, "new", "--yes"}},
		{"+xinfo|groups +eval +hget +hset", []string{"group", "resume", topic, "new", "--yes"}},
		{"+xinfo|groups", []string{"group", "delete", topic, "new", "--dry-run"}},
		{"+xinfo|groups +eval +xgroup|destroy", []string{"group", "delete", topic, "new", "--yes"}},
		{"+eval +time +xlen +xinfo|groups +xpending +xrange +hgetall", []string{"trim", topic, "--keep-last", "1000", "--hard-max-len", "1000", "--dry-run"}},
		{"+eval +time +xlen +xinfo|groups +xpending +xrange +hgetall +xtrim +hset +hincrby", []string{"trim", topic, "--keep-for", "1h", "--hard-max-len", "1000", "--yes"}},
		{reads, []string{"dead", "list", topic}},
		{reads, []string{"dead", "summary", topic}},
		{reads, []string{"dead", "show", topic, ids[0]}},
		{reads, []string{"dead", "replay", topic, "--all", "--dry-run"}},
		{reads, []string{"dead", "export", topic}},
		{"+xrange", []string{"dead", "import", topic, export, "--dry-run"}},
		{"+xrange +xinfo|stream +watch +unwatch +multi +exec +xadd", []string{"dead", "import", topic, export, "--stream", topic + "-copy"}},
		{"+xlen +xinfo|groups +xpending", []string{"check", topic, "--max-lag", "1000", "--max-oldest", "1h", "--max-dead", "1000"}},
		{"+xlen +xinfo|groups +zcard +zrange", []string{"check", topic, "--max-overdue", "1h"}},
		{"+scan +xlen +xinfo|groups +xinfo|stream +xpending +zcard +zrange +hgetall", []string{"top", topic + "*", "--count", "1"}},
		{reads + " +xdel", []string{"dead", "delete", topic, "--yes", ids[0]}},
		{reads + " +xdel +xadd +xinfo|groups +eval", []string{"dead", "replay", topic, "--yes", ids[1]}},
	} {
		c := allow(tt.rights)
		c.draws = true
		assert.Zero(t, c.run(tt.args...), "%v: %s", tt.args, c.err.String())
		assert.NotContains(t, c.err.String(), "not known", "%v", tt.args)
	}
	assert.Empty(t, deadOf(t, client, topic))
	c := allow("+xlen")
	assert.Equal(t, exitFailed, c.run("groups", topic))
	assert.Contains(t, c.err.String(), "lacks a right")
	c = allow("+xlen")
	assert.Equal(t, exitFailed, c.run("delayed", "list", topic))
	assert.Contains(t, c.err.String(), "lacks a right")

	// Without the rights to delayed messages they are unknown, and the rest is known.
	c = allow("+scan +xlen +xinfo|groups")
	assert.Zero(t, c.run("topics", topic, "--json"))
	assert.Contains(t, c.err.String(), "Some numbers are not known")
	row := lines(t, c.out.String())[0]
	assert.Nil(t, row["delayed"])
	assert.Nil(t, row["overdue_seconds"])
	assert.NotNil(t, row["length"])
	c = allow("+xlen +xinfo|groups +xpending")
	assert.Equal(t, int(statusUnknown), c.run("check", topic, "--max-overdue", "1h"))
	assert.Regexp(t, "overdue is not known, .*lacks a right.*'overdue'=U\n$", c.out.String())
	url, stop := startExporter(t, redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Username: user, Password: "secret"}), topic)
	await(t, func() bool {
		return scrape(t, url+"/metrics")[`group_stats_success{group="a",topic="`+topic+`"}`] == "1"
	})
	assert.NotContains(t, scrape(t, url+"/metrics"), `topic_delayed_messages{topic="`+topic+`"}`)
	assert.Zero(t, stop())
}

func TestCluster(t *testing.T) {
	cluster := testserver.Cluster(t)
	client := cluster.Client()
	names := make(map[string]bool)
	prefix := topic(t)
	for i := range 12 { // on all masters
		name := fmt.Sprintf("%s-%d", prefix, i)
		names[name] = true
		die(t, client, name, death{handler: "a", payload: name, err: errors.New("x")})
	}
	// The addresses by which the nodes know each other need not be those that reach them from here.
	command := func(code int, args ...string) []map[string]any {
		var out, notes syncBuffer
		got := runWith(t.Context(), cluster.Client(), append(args, "--json"), streams{out: &out, err: &notes})
		require.Equal(t, code, got, notes.String())
		return lines(t, out.String())
	}
	rows := command(0, "topics", prefix+"*")
	assert.Len(t, rows, len(names))
	assert.Len(t, command(0, "top", prefix+"*", "--count", "1"), len(names))
	for _, row := range rows {
		name := row["topic"].(string)
		assert.True(t, names[name])
		assert.Equal(t, 1.0, row["dead_letters"], name)
		assert.Equal(t, 1.0, row["groups"], name)
		assert.Len(t, command(0, "groups", name), 1)
		assert.Empty(t, command(0, "pending", name, "a"))
		assert.Len(t, command(0, "tail", name), 1)
		export, err := json.Marshal(command(0, "dead", "export", name)[0])
		require.NoError(t, err)
		assert.Equal(t, []string{"present"}, column(command(0, "dead", "import", name, fileOf(t, string(export))), "result"))
		assert.Equal(t, []string{"imported"}, column(command(0, "dead", "import", name, fileOf(t, string(export)), "--stream", name+"-copy"), "result"))
		assert.Len(t, command(0, "dead", "replay", name, "--all", "--yes"), 1)
		assert.Equal(t, []string{name}, received(t, client, name, "a", 1))
		id := pend(t, client, name, "c1", 1)[0] // in group g
		assert.Len(t, command(0, "consumers", name, "g"), 1)
		assert.Len(t, command(0, "get", name, id), 1)
		assert.Len(t, command(0, "pending", "release", name, "g", "--all", "--yes"), 3)
		assert.Len(t, command(0, "pending", "ack", name, "g", id, "--yes"), 1)
		assert.Len(t, command(0, "group", "reset", name, "g", "--to", "start", "--yes"), 1)
		assert.Len(t, command(0, "group", "delete", name, "g", "--yes"), 1)
		assert.Len(t, command(0, "publish", name, "later", "--in", "1h", "--uuid", "d"), 1)
		assert.Len(t, command(0, "delayed", "list", name), 1)
		assert.Equal(t, 1.0, command(0, "topics", name)[0]["delayed"])
		assert.Len(t, command(0, "delayed", "show", name, "d"), 1)
		assert.Len(t, command(0, "delayed", "reschedule", name, "2h", "d", "--yes"), 1)
		assert.Len(t, command(0, "delayed", "cancel", name, "d", "--yes"), 1)
	}
}

// With --json each line is one object, also of commands that have nothing to say.
func TestJSONOfNothing(t *testing.T) {
	for _, args := range [][]string{{"dead", "list", topic(t)}, {"dead", "summary", topic(t)}, {"delayed", "list", topic(t)}, {"tail", topic(t)}, {"topics", topic(t)}} {
		assert.Empty(t, parsed(t, args...))
	}
}

func TestSafe(t *testing.T) {
	for in, want := range map[string]string{
		"plain äöü 語 \"quoted\" back\\slash": "plain äöü 語 \"quoted\" back\\slash",
		"\x1b[0m\a\r\n\t":                    `\x1b[0m\a\r\n\t`,
		"\u009b \u202e \u200b \ufeff":        `\u009b \u202e \u200b \ufeff`,
		"\xff\xfe \ufffd":                    `\xff\xfe �`,
	} {
		assert.Equal(t, want, safe(in))
	}
	assert.Equal(t, "abc…", short("abcdefgh", 4))
	assert.Equal(t, "語語語…", short(strings.Repeat("語", 1000), 4))
	deep := strings.Repeat("[", 5000) + strings.Repeat("]", 5000)
	require.True(t, json.Valid([]byte(deep)))
	assert.Less(t, len(block([]byte(deep))), 20_000)
}

func FuzzSafe(f *testing.F) {
	f.Add("a\x1b\xff\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		for _, out := range []string{safe(s), short(s, 10), strings.ReplaceAll(block([]byte(s)), "\n", "")} {
			if strings.ContainsFunc(out, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u202e' }) {
				t.Errorf("%q becomes %q", s, out)
			}
		}
	})
}

// TestAdvice: a mistake in the arguments shows how the command in question is called.
func TestAdvice(t *testing.T) {
	for args, want := range map[string]string{
		"groups":            "Usage: goxstreams groups TOPIC [flags]\nSee goxstreams groups --help.\n",
		"topics --no-such":  "Usage: goxstreams topics [PATTERN] [flags]\nSee goxstreams topics --help.\n",
		"dead":              "See goxstreams dead --help.\n",
		"no-such":           "See goxstreams --help.\n",
		"dead replay topic": "Usage: goxstreams dead replay TOPIC [ID...|-] [flags]\nSee goxstreams dead replay --help.\n",
	} {
		c := &command{}
		require.Equal(t, exitUsage, c.run(strings.Fields(args)...), args)
		_, advice, _ := strings.Cut(c.err.String(), "\n")
		require.Equal(t, want, advice, args)
	}
}
