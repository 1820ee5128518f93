package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// anOutage is a thousand dead letters, of which a hundred, spread among the others, are to be replayed.
func anOutage() []death {
	deaths := make([]death, 1000)
	for i := range deaths {
		d := death{handler: "billing", payload: strconv.Itoa(i)}
		switch {
		case i%10 == 3:
			d.err = fmt.Errorf("charge order-%d: payment gateway: status 503", i)
		case i%10 == 4:
			d.handler, d.err = "shipping", fmt.Errorf("label order-%d: payment gateway: status 503", i)
		case i%2 == 0 || i%10 == 5:
			d.err = goxstreams.Permanent(fmt.Errorf("order-%d: the amount is negative", i))
		default:
			d.err = fmt.Errorf("order-%d: context deadline exceeded", i)
		}
		deaths[i] = d
	}
	return deaths
}

func TestTheRightHundredOfAThousand(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, anOutage()...)
	all := deadOf(t, client, topic)
	require.Len(t, all, 1000)

	out, _ := ran(t, 0, "dead", "summary", topic)
	rows := strings.Split(strings.TrimSpace(out), "\n")
	require.Len(t, rows, 5, out)
	assert.Regexp(t, `^COUNT +KIND +GROUP +HANDLER +OLDEST +NEWEST +EXAMPLE +REASON$`, rows[0])
	assert.Regexp(t, `^500 +permanent +billing +billing .* #: the amount is negative$`, rows[1])
	assert.Regexp(t, `^300 +exhausted +billing +billing .* #: context deadline exceeded$`, rows[2])
	assert.Regexp(t, `^100 +exhausted +(billing|shipping) .* (charge|label) #: payment gateway: status 503$`, rows[3])
	assert.Regexp(t, `^100 +exhausted +(billing|shipping) .* (charge|label) #: payment gateway: status 503$`, rows[4])

	filter := []string{topic, "--reason", "status 503", "--handler", "billing", "--kind", "exhausted", "--newer-than", "1h"}
	out, notes := ran(t, 0, append([]string{"dead", "replay", "--dry-run"}, filter...)...)
	assert.Equal(t, 101, strings.Count(out, "\n"))
	assert.Contains(t, notes, "100 dead letters would be replayed to the group in which they died. Nothing is done.")
	assert.Equal(t, all, deadOf(t, client, topic), "--dry-run changed something")
	length := client.XLen(t.Context(), topic).Val()

	c := onTest(t)
	c.in = "y\n"
	require.Zero(t, c.run(append([]string{"dead", "replay"}, filter...)...), c.err.String())
	assert.Contains(t, c.err.String(), fmt.Sprintf("Replay 100 dead letters of %q to the group in which they died? [y/N] ", topic))
	assert.Contains(t, c.err.String(), "100 dead letters replayed.\n")
	assert.Len(t, deadOf(t, client, topic), 900)
	assert.Equal(t, length+100, client.XLen(t.Context(), topic).Val())

	var want []string
	for i := 3; i < 1000; i += 10 {
		want = append(want, strconv.Itoa(i))
	}
	got := received(t, client, topic, "billing", 100)
	slices.Sort(want)
	slices.Sort(got)
	assert.Equal(t, want, got)

	_, notes = ran(t, 0, append([]string{"dead", "list"}, filter...)...)
	assert.Contains(t, notes, "No dead letter of")
}

func TestFilters(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "1", err: errors.New("no route (E42)")})
	die(t, client, topic, death{handler: "b", payload: "2", err: goxstreams.Permanent(errors.New("too late"))})
	die(t, client, topic, death{handler: "b", payload: "3", err: errors.New("no luck")})
	// One that is old: the same letter with an early ID, in a stream of its own name.
	old := topic + "-old"
	age := time.Now().Add(-72 * time.Hour)
	entries, err := client.Do(t.Context(), "xrange", goxstreams.DeadLetterTopic(topic), "-", "+").Slice()
	require.NoError(t, err)
	for i, e := range entries {
		id := fmt.Sprintf("%d-%d", age.Add(time.Duration(i)*24*time.Hour).UnixMilli(), i)
		require.NoError(t, client.Do(t.Context(), append([]any{"xadd", old, id}, e.([]any)[1].([]any)...)...).Err())
	}

	for _, tt := range []struct {
		want string
		args []string
	}{
		{"1 2 3", nil},
		{"2", []string{"--kind", "permanent"}},
		{"1 2 3", []string{"--kind", "permanent,exhausted"}},
		{"", []string{"--kind", "broken"}},
		{"1 3", []string{"--reason", "no "}},
		{"1", []string{"--reason", "(E42)"}},
		{"2 3", []string{"--reason-regexp", "^too|luck$"}},
		{"2 3", []string{"--handler", "b"}},
		{"1", []string{"--group", "a"}},
		{"3", []string{"--handler", "b", "--reason", "no"}},
		{"1 2", []string{"--limit", "2"}},
		{"1 2 3", []string{"--newer-than", "1h"}},
		{"", []string{"--older-than", "1h"}},
		{"1 2 3", []string{"--older-than", "12h", "--stream", old}},
		{"1 2", []string{"--older-than", "1.5d", "--stream", old}},
		{"2 3", []string{"--newer-than", "60h", "--stream", old}},
		{"2", []string{"--newer-than", age.Add(24 * time.Hour).Format(time.RFC3339), "--older-than", age.Add(25 * time.Hour).Format(time.RFC3339), "--stream", old}},
	} {
		rows := parsed(t, append([]string{"dead", "list", topic}, tt.args...)...)
		assert.Equal(t, strings.Fields(tt.want), append([]string{}, column(rows, "payload")...), "%v", tt.args)
	}
	_, notes := ran(t, 0, "dead", "list", topic, "-n", "2")
	assert.Contains(t, notes, "There are more")
}

func TestShow(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic,
		death{handler: "a", uuid: "u1", payload: `{"order":17,"items":["x"]}`, err: errors.New("no stock"), meta: map[string]string{"trace": "t1"}},
		death{handler: "a", payload: "\xff\x00binary", err: errors.New("later")})
	ids := deadOf(t, client, topic)
	slices.Sort(ids)

	byReason := func(reason string) string {
		return fmt.Sprint(parsed(t, "dead", "list", topic, "--reason", reason)[0]["id"])
	}
	out, _ := ran(t, 0, "dead", "show", topic, byReason("no stock"), byReason("later"))
	for _, want := range []string{"no stock", "exhausted", "u1", "  trace: t1\n", "Payload, 26 bytes\n  {\n    \"order\": 17,\n    \"items\": [\n", "|..binary|"} {
		assert.Contains(t, out, want)
	}
	row := parsed(t, "dead", "show", topic, byReason("later"))[0]
	assert.Equal(t, map[string]any{"base64": "/wBiaW5hcnk="}, row["payload"])
	assert.Len(t, row["fields"], 3)

	out, notes := ran(t, exitPartly, "dead", "show", topic, "1-1", ids[0])
	assert.Contains(t, notes, "1-1: not found")
	assert.Contains(t, out, ids[0])
}

// What is in a dead letter is written by whoever made the message fail, and read on a terminal.
func TestHostileLetters(t *testing.T) {
	const evil = "a\x1b[2J\x1b]0;owned\x07\r\nroot\u009b31m\u202egnp\x7f\xff\u2028"
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{
		handler: "a", uuid: evil, payload: evil, err: errors.New(evil), meta: map[string]string{evil: evil},
	}, death{handler: "a", payload: `{"x": "` + "\u009b31m\u202e\x7f" + `"}`, err: errors.New("json")})
	body := topic + "-body"
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: body, Values: []string{evil, evil}}).Err())
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: goxstreams.DeadLetterTopic(topic), Values: []string{evil, evil}}).Err())
	require.NoError(t, client.XGroupCreate(t.Context(), body, evil, "0").Err())
	require.NoError(t, client.XReadGroup(t.Context(), &redis.XReadGroupArgs{Group: evil, Consumer: evil, Streams: []string{body, ">"}}).Err())
	ids := deadOf(t, client, topic)
	entry := stored(t, client, body)[0].ID

	for _, args := range [][]string{
		{"get", body, entry}, {"get", topic, stored(t, client, topic)[0].ID}, {"consumers", body, evil}, {"pending", "ack", body, evil, "--all", "--dry-run"},
		{"dead", "list", topic}, {"dead", "list", topic, "--foreign"}, {"dead", "summary", topic}, append([]string{"dead", "show", topic}, ids...),
		{"dead", "delete", topic, "--all", "--dry-run"}, {"tail", topic}, {"tail", body}, {"tail", goxstreams.DeadLetterTopic(topic)},
		{"groups", body}, {"pending", body, evil}, {"dead", "list", topic, "--reason", evil}, {"topics", topic + "*"},
	} {
		for _, args := range [][]string{args, slices.Concat(args, []string{"--json"}), slices.Concat(args, []string{"-o", "csv"})} {
			out, notes := ran(t, 0, args...)
			assert.Equal(t, safeLines(out), out, "%v", args)
			assert.Equal(t, safeLines(notes), notes, "%v", args)
			assert.NotContains(t, out, "\nroot", "%v: a line of the attacker's", args)
		}
	}
	for _, args := range [][]string{
		{"pending", body, "no" + evil}, {"consumers", body, "no" + evil}, {"group", "reset", body, "no" + evil, "--to", "end", "--yes"},
		{"group", "delete", body + evil, evil, "--yes"}, {"pending", "ack", body, "no" + evil, "--all", "--yes"},
	} {
		_, notes := ran(t, exitFailed, args...)
		assert.Equal(t, safeLines(notes), notes, "%v", args)
	}
	c := onTest(t)
	c.in = "n\n"
	assert.Equal(t, exitFailed, c.run("pending", "release", body, evil, "--all"))
	assert.Equal(t, safeLines(c.err.String()), c.err.String())
	row := parsed(t, "tail", body)[0]
	assert.Contains(t, row["fields"], safe(evil))
}

func TestReplayOfSome(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "gone", payload: "1", err: errors.New("x")}, death{handler: "here", payload: "2", err: errors.New("x")})
	require.NoError(t, client.XGroupDestroy(t.Context(), topic, "gone").Err())
	gone := fmt.Sprint(parsed(t, "dead", "list", topic, "--group", "gone")[0]["id"])
	here := fmt.Sprint(parsed(t, "dead", "list", topic, "--group", "here")[0]["id"])

	_, notes := ran(t, exitPartly, "dead", "replay", topic, "--yes", "1-1", gone, here)
	assert.Contains(t, notes, "1-1: not found")
	assert.Contains(t, notes, fmt.Sprintf("%s: topic %q has no such group: \"gone\"\n", gone, topic))
	assert.Contains(t, notes, "1 dead letter replayed, 2 failed.\n")
	assert.Equal(t, []string{gone}, deadOf(t, client, topic))
	assert.Equal(t, []string{"2"}, received(t, client, topic, "here", 1))

	c := onTest(t)
	assert.Equal(t, exitPartly, c.run("dead", "replay", topic, "--yes", "--json", gone, here))
	rows := lines(t, c.out.String())
	assert.Equal(t, []string{"failed", "failed"}, column(rows, "result"))
	assert.Equal(t, []string{here, gone}, column(rows, "id"), "what is not there is known before")

	rows = parsed(t, "dead", "replay", topic, "--yes", "--to-all", gone)
	assert.Equal(t, []map[string]any{{"id": gone, "result": "replayed"}}, rows)
	assert.Equal(t, []string{"1"}, received(t, client, topic, "here", 1))
}

// lossy is a connection that breaks when a script's answer has come, and is not read yet.
type lossy struct {
	net.Conn
	ran  func() // waits until the scripts have run
	sent *atomic.Bool
}

func (l lossy) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("eval")) {
		l.sent.Store(true)
	}
	return l.Conn.Write(p)
}

func (l lossy) Read(p []byte) (int, error) {
	if l.sent.Load() {
		l.ran()
		return 0, io.EOF
	}
	return l.Conn.Read(p)
}

// When the answer is lost, nobody knows what became of the letters. It says so, and it can be run again.
func TestReplayWithoutAnAnswer(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "1", err: errors.New("x")})
	multiply(t, client, topic, 120)
	broken := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		ran := func() { await(t, func() bool { return len(deadOf(t, client, topic)) == 20 }) }
		return lossy{conn, ran, new(atomic.Bool)}, err
	}})
	var out, notes syncBuffer
	code := runWith(t.Context(), broken, []string{"dead", "replay", topic, "--all", "--yes", "--json"}, streams{out: &out, err: &notes})
	assert.Equal(t, exitFailed, code, notes.String())
	assert.Equal(t, slices.Repeat([]string{"unknown"}, 100), column(lines(t, out.String()), "result"))
	assert.Contains(t, notes.String(), "0 dead letters replayed, of 100 it is not known.\n")
	assert.Contains(t, notes.String(), "run it again for the rest: ")

	_, text := ran(t, 0, "dead", "replay", topic, "--all", "--yes")
	assert.Equal(t, "20 dead letters replayed.\n", text)
	assert.Empty(t, deadOf(t, client, topic))
	assert.Len(t, stored(t, client, topic), 121, "each once, and the first one's own")
}

// A letter says into which topic a replay puts it. Who can write to one dead-letter stream must not
// reach other topics by it.
func TestForeignLetters(t *testing.T) {
	client, mine, other := testserver.Client(t), topic(t), topic(t)
	die(t, client, other, death{handler: "a", payload: "theirs", err: errors.New("x")})
	die(t, client, mine, death{handler: "a", payload: "mine", err: errors.New("x")})
	entries, err := client.Do(t.Context(), "xrange", goxstreams.DeadLetterTopic(other), "-", "+").Slice()
	require.NoError(t, err)
	stream := goxstreams.DeadLetterTopic(mine)
	planted, err := client.Do(t.Context(), append([]any{"xadd", stream, "*"}, entries[0].([]any)[1].([]any)...)...).Text()
	require.NoError(t, err)
	junk, err := client.XAdd(t.Context(), &redis.XAddArgs{Stream: stream, Values: []string{"a", "b"}}).Result()
	require.NoError(t, err)

	_, notes := ran(t, 0, "dead", "replay", mine, "--all", "--yes")
	assert.Contains(t, notes, "2 entries of")
	assert.Contains(t, notes, "1 dead letter replayed.")
	_, notes = ran(t, exitPartly, "dead", "replay", mine, "--yes", planted, junk)
	assert.Contains(t, notes, fmt.Sprintf("%s: it died in topic %q", planted, other))
	assert.Contains(t, notes, "is not a dead letter of this library")
	assert.Len(t, stored(t, client, other), 1)

	assert.Equal(t, []string{planted, junk}, column(parsed(t, "dead", "list", mine, "--foreign"), "id"))
	ran(t, 0, "dead", "show", mine, planted, junk)
	ran(t, 0, "dead", "delete", mine, "--yes", junk)
	ran(t, 0, "dead", "delete", mine, "--yes", "--foreign")
	assert.Empty(t, deadOf(t, client, mine))
}

func TestConfirmation(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", err: errors.New("x")}, death{handler: "a", err: errors.New("y")})
	all := deadOf(t, client, topic)

	for _, answer := range []string{"n\n", "\n", "x", "yy\n"} {
		c := onTest(t)
		c.in = answer
		assert.Equal(t, exitFailed, c.run("dead", "delete", topic, "--all"))
		assert.Contains(t, c.err.String(), "Delete 2 dead letters of")
		assert.Contains(t, c.err.String(), "nothing is done")
		assert.Equal(t, all, deadOf(t, client, topic))
	}
	for _, args := range [][]string{
		{"dead", "delete", topic, "--all"}, {"dead", "replay", topic, all[0]}, // no terminal
		{"dead", "delete", topic, "--yes"}, {"dead", "replay", topic, "--yes", "--limit", "5"}, // not everything
		{"dead", "delete", topic, "--yes", "--all", "--kind", "broken"}, {"dead", "delete", topic, "--yes", "--all", all[0]},
		{"dead", "delete", topic, "--yes", "abc"}, {"dead", "delete", topic, "--yes", "--kind", "none"},
		{"dead", "delete", topic, "--yes", "--reason-regexp", "("}, {"dead", "list", topic, "--older-than", "tomorrow"},
		{"dead", "list", topic, "--older-than", "-1h"}, {"dead", "list", topic, "--newer-than", "999999999d"}, {"dead", "list", topic, "--limit", "-1"},
		{"dead", "delete", "", "--yes", "--all"}, {"dead"}, {"dead", "bury"}, {"bury"}, {"groups"}, {"topics", "a", "b"}, {"topics", "--bogus"},
		{"tail", topic, "--lines", "-1"}, {"pending", topic, "a", "--min-idle", "-1s"},
	} {
		_, notes := ran(t, exitUsage, args...)
		assert.NotEmpty(t, notes)
		assert.Equal(t, all, deadOf(t, client, topic), "%v", args)
	}
	c := onTest(t)
	c.in = "yes\n"
	require.Zero(t, c.run("dead", "delete", topic, "--all"))
	assert.Empty(t, deadOf(t, client, topic))
	_, notes := ran(t, 0, "dead", "delete", topic, "--all", "--yes")
	assert.Contains(t, notes, "0 dead letters deleted.")
}

// What was not counted when somebody said yes is not moved.
func TestNewDeathsAreNotMoved(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", err: errors.New("x")}, death{handler: "a", err: errors.New("x")})
	c := onTest(t)
	in := answering(func() string {
		die(t, client, topic, death{handler: "a", err: errors.New("x")})
		return "y\n"
	})
	code := run(t.Context(), []string{"--url", c.url, "dead", "delete", topic, "--all"}, streams{in: in, out: &c.out, err: &c.err, asks: true})
	require.Zero(t, code, c.err.String())
	assert.Contains(t, c.err.String(), "2 dead letters deleted.")
	assert.Len(t, deadOf(t, client, topic), 1)
}

// answering is a terminal at which somebody does something before the answer.
type answering func() string

func (a answering) Read(p []byte) (int, error) { return copy(p, a()), nil }

func TestInterrupt(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "p", err: errors.New("x")})
	multiply(t, client, topic, 950)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	// Interrupted while it asks: nothing is done.
	c := onTest(t)
	in := answering(func() string { cancel(); <-t.Context().Done(); return "" })
	code := run(ctx, []string{"--url", c.url, "dead", "delete", topic, "--all"}, streams{in: in, out: &c.out, err: &c.err, asks: true})
	assert.Equal(t, exitInterrupted, code)
	assert.Contains(t, c.err.String(), "interrupted: nothing is done")
	assert.Len(t, deadOf(t, client, topic), 950)

	// Interrupted in the middle: what is done is counted.
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	out := writing(func(p []byte) {
		if strings.Contains(string(p), `"deleted"`) {
			cancel()
		}
	})
	c = onTest(t)
	code = run(ctx, []string{"--url", c.url, "dead", "delete", topic, "--all", "--yes", "--json"}, streams{out: out, err: &c.err})
	assert.Equal(t, exitInterrupted, code)
	left := len(deadOf(t, client, topic))
	assert.Less(t, left, 950)
	assert.NotZero(t, left)
	assert.Contains(t, c.err.String(), fmt.Sprintf("%d dead letters deleted.\n", 950-left))
	assert.Contains(t, c.err.String(), "run it again")

	ran(t, 0, "dead", "delete", topic, "--all", "--yes")
	assert.Empty(t, deadOf(t, client, topic))
}

// writing is an output that does something.
type writing func(p []byte)

func (w writing) Write(p []byte) (int, error) { w(p); return len(p), nil }

// multiply makes n copies of a topic's only dead letter.
func multiply(t *testing.T, client redis.UniversalClient, topic string, n int) {
	t.Helper()
	stream := goxstreams.DeadLetterTopic(topic)
	entries, err := client.Do(t.Context(), "xrange", stream, "-", "+").Slice()
	require.NoError(t, err)
	args := append([]any{"xadd", stream, "*"}, entries[0].([]any)[1].([]any)...)
	_, err = client.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
		for range n - 1 {
			pipe.Do(t.Context(), args...)
		}
		return nil
	})
	require.NoError(t, err)
}

func TestProgressBar(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "p", err: errors.New("x")})
	multiply(t, client, topic, 500)
	c := onTest(t)
	c.draws = true
	require.Zero(t, c.run("dead", "replay", topic, "--all", "--yes"))
	assert.Contains(t, c.err.String(), "replay")
	assert.Contains(t, c.err.String(), "/500")
	assert.NotContains(t, c.out.String(), "%")
	assert.Len(t, stored(t, client, topic), 501)
}
