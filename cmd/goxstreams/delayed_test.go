package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// scheduled returns when each of a topic's delayed messages is due.
func scheduled(t *testing.T, client redis.UniversalClient, topic string) map[string]time.Time {
	t.Helper()
	schedule, err := goxstreams.NewSchedule(client, topic)
	require.NoError(t, err)
	due := make(map[string]time.Time)
	for d, err := range schedule.All(t.Context()) {
		require.NoError(t, err)
		due[d.UUID] = d.Due
	}
	return due
}

// overdueIn delays two messages of a topic, one of which has been due for so long.
func overdueIn(t *testing.T, client redis.UniversalClient, topic string, overdue time.Duration) {
	t.Helper()
	ran(t, 0, "publish", topic, "x", "--uuid", "overdue", "--in", "1h")
	ran(t, 0, "publish", topic, "x", "--uuid", "waiting", "--in", "1h")
	schedule, err := goxstreams.NewSchedule(client, topic)
	require.NoError(t, err)
	require.NoError(t, schedule.Reschedule(t.Context(), "overdue", time.Now().Add(-overdue)))
}

func TestPublishDelayed(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	began := time.Now()
	_, notes := ran(t, 0, "publish", topic, "1", "--uuid", "in", "--in", "3d")
	assert.Regexp(t, `^1 message is delayed until 20\d\d-\S+Z: UUID in\.\n$`, notes)
	at := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	_, notes = ran(t, 0, "publish", topic, "2", "--uuid", "at", "--at", at.Format(time.RFC3339))
	assert.Equal(t, "1 message is delayed until "+at.Format(time.RFC3339)+": UUID at.\n", notes)
	ran(t, 0, "publish", topic, "3", "--body-field", "body", "--in", "2h")
	_, notes = piped(t, 0, `{"payload": "4", "uuid": "l1"}`+"\n"+`{"payload": "5", "uuid": "l2"}`, "publish", topic, "--json-lines", "--in", "4h")
	assert.Equal(t, "2 messages are delayed.\n", notes)
	due := scheduled(t, client, topic)
	require.Len(t, due, 5)
	near := func(want time.Time, uuid string) { assert.WithinDuration(t, want, due[uuid], time.Minute, uuid) }
	near(began.Add(72*time.Hour), "in")
	near(at, "at")
	near(began.Add(4*time.Hour), "l1")
	near(began.Add(4*time.Hour), "l2")
	assert.Zero(t, client.XLen(t.Context(), topic).Val())

	until := delay.DelayedUntilKey + "=2026-01-01T00:00:00Z"
	for want, args := range map[string][]string{
		"--in, or --at: not both":             {"--in", "1h", "--at", "2036-01-01T00:00:00Z"},
		`--in: "soon" is no time from now`:    {"--in", "soon"},
		`--in: "-1h" is no time from now`:     {"--in=-1h"},
		"--in: 3651d is more than ten years":  {"--in", "3651d"},
		`--at: "1h" is no time such as`:       {"--at", "1h"},
		"--at: 2026-01-01T00:00:00Z is in":    {"--at", "2026-01-01T00:00:00Z"},
		"--at: 9999-01-01T00:00:00Z is more":  {"--at", "9999-01-01T00:00:00Z"},
		"--metadata _watermill_delayed_until": {"--in", "1h", "-m", until},
	} {
		_, notes := ran(t, exitUsage, append([]string{"publish", topic, "x"}, args...)...)
		assert.Contains(t, notes, want)
	}
	assert.Len(t, scheduled(t, client, topic), 5)
}

func TestDelayedList(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	_, notes := ran(t, 0, "delayed", "list", topic)
	assert.Equal(t, fmt.Sprintf("%q has no delayed messages.\n", topic), notes)
	const evil = "a\x1b[2J\xff"
	ran(t, 0, "publish", topic, "x", "--uuid", evil, "--in", "49h")
	overdueIn(t, client, topic, 2*time.Hour) // after that: a Publisher moves what is due
	require.NoError(t, client.HSet(t.Context(), xstream.DelayedKey(topic), "waiting", "damaged").Err())

	out, notes := ran(t, 0, "delayed", "list", topic)
	got := strings.Split(out, "\n")
	require.Len(t, got, 5, out)
	assert.Regexp(t, `^UUID +DUE +IN +SIZE$`, got[0])
	assert.Regexp(t, `^overdue +20\d\d-\S{18}Z +overdue 2h +\d+$`, got[1])
	assert.Regexp(t, `^waiting +20\d\d-\S{18}Z +59m +-$`, got[2])
	assert.Regexp(t, `^a\\x1b\[2J\\xff +20\d\d-\S{18}Z +2d +\d+$`, got[3])
	assert.Contains(t, notes, "waiting: goxstreams: schedule of")
	out, notes = ran(t, 0, "delayed", "list", topic, "--limit", "2")
	assert.Equal(t, 3, strings.Count(out, "\n"))
	assert.Contains(t, notes, "There are more: --limit 0 is all.")
	_, notes = ran(t, 0, "delayed", "list", topic, "--limit", "3")
	assert.NotContains(t, notes, "There are more")

	rows := parsed(t, "delayed", "list", topic)
	require.Len(t, rows, 3)
	assert.InDelta(t, -7200, rows[0]["in_seconds"], 60)
	assert.InDelta(t, 49*3600, rows[2]["in_seconds"], 60)
	assert.Equal(t, []string{"x", "<nil>", "x"}, column(rows, "payload"))
	assert.Contains(t, rows[1]["error"], "cannot be read")
	assert.Nil(t, rows[1]["size"])
	assert.Equal(t, map[string]any{"base64": "YRtbMkr/"}, rows[2]["uuid"])
	due, err := time.Parse(time.RFC3339Nano, rows[2]["due"].(string))
	require.NoError(t, err)
	assert.True(t, due.Equal(scheduledAll(t, client, topic)[evil]))
	out, _ = ran(t, 0, "delayed", "list", topic, "-o", "csv")
	assert.Equal(t, "overdue", csvRows(t, out)[0]["uuid"])
	assert.True(t, strings.HasPrefix(out, "topic,uuid,due,in_seconds,size,metadata,payload,fields,error\n"), out)

	row := parsed(t, "topics", topic)
	assert.Empty(t, row, "without a stream it is no topic yet")
	ran(t, 0, "publish", topic, "x")
	row = parsed(t, "topics", topic)
	assert.Equal(t, 3.0, row[0]["delayed"])
	assert.InDelta(t, 7200, row[0]["overdue_seconds"], 60)
	out, _ = ran(t, 0, "top", topic, "--count", "1", "--sort", "overdue")
	assert.Regexp(t, ` 3 +2h\n$`, out)

	out, _ = ran(t, 0, "__complete", "delayed", "cancel", topic, "overdue", "")
	assert.Equal(t, "waiting\n:4\n", out, "what can be typed, and is not there yet")
	out, _ = ran(t, 0, "__complete", "delayed", "reschedule", topic, "1h", "overdue", "")
	assert.Equal(t, "waiting\n:4\n", out)
	out, _ = ran(t, 0, "__complete", "delayed", "reschedule", topic, "")
	assert.Equal(t, ":4\n", out)
	for _, args := range [][]string{{"list", ""}, {"list", topic, "--limit", "-1"}, {"show", topic}, {"show", topic, ""}, {"cancel", topic}, {}} {
		ran(t, exitUsage, append([]string{"delayed"}, args...)...)
	}
}

// scheduledAll is scheduled where some cannot be read.
func scheduledAll(t *testing.T, client redis.UniversalClient, topic string) map[string]time.Time {
	t.Helper()
	schedule, err := goxstreams.NewSchedule(client, topic)
	require.NoError(t, err)
	due := make(map[string]time.Time)
	for d := range schedule.All(t.Context()) {
		due[d.UUID] = d.Due
	}
	return due
}

func TestDelayedShow(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	ran(t, 0, "publish", topic, `{"n":1}`, "--uuid", "a", "-m", "k=v", "--in", "1h")
	ran(t, 0, "publish", topic, "two", "--body-field", "body", "--in", "2h")
	uuids := column(parsed(t, "delayed", "list", topic), "uuid")
	out, notes := ran(t, exitPartly, "delayed", "show", topic, "a", "none")
	assert.Contains(t, notes, "none: not found: it is in the stream already")
	for _, want := range []string{"UUID        a\n", "(in 59m)\n", "  k: v\n", "Payload, 7 bytes\n  {\n    \"n\": 1\n", "Fields      "} {
		assert.Contains(t, out, want)
	}
	assert.Equal(t, 1, strings.Count(out, "UUID "))
	out, _ = ran(t, 0, "delayed", "show", topic, uuids[1])
	assert.Contains(t, out, "Payload, 3 bytes\n  two\n")
	out, _ = ran(t, 0, "delayed", "show", topic, uuids[1], "--body-field", "other")
	assert.Contains(t, out, "Problem     ")
	assert.Contains(t, out, "Field body, 3 bytes\n  two\n")

	in, _ := piped(t, 0, "a\n\na\n"+uuids[1]+"\n", "delayed", "show", topic, "-", "--json")
	rows := lines(t, in)
	assert.Equal(t, []string{`{"n":1}`, "two"}, column(rows, "payload"))
	assert.Equal(t, "v", rows[0]["metadata"].(map[string]any)["k"])
	assert.Len(t, rows[0]["fields"], 3)
	require.NoError(t, client.HSet(t.Context(), xstream.DelayedKey(topic), "a", "damaged").Err())
	out, _ = ran(t, 0, "delayed", "show", topic, "a")
	assert.Contains(t, out, "cannot be read")
}

func TestDelayedCancel(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	for i, uuid := range []string{"a", "b", "c", "d", "e"} {
		ran(t, 0, "publish", topic, "x", "--uuid", uuid, "--in", fmt.Sprint(i+1, "h")) // each is due at another time
	}
	left := func(want ...string) {
		t.Helper()
		assert.ElementsMatch(t, want, column(parsed(t, "delayed", "list", topic), "uuid"))
	}
	out, notes := ran(t, exitPartly, "delayed", "cancel", topic, "a", "none", "--dry-run")
	assert.Regexp(t, `\na +20`, out)
	assert.Contains(t, notes, "none: not found: it is in the stream already, was cancelled, or was never delayed\n1 delayed message would be cancelled. Nothing is done.\n")
	out, _ = ran(t, exitPartly, "delayed", "cancel", topic, "a", "none", "--dry-run", "--json")
	rows := lines(t, out)
	assert.Equal(t, []string{"failed", "would be cancelled"}, sortedColumn(rows, "result"))
	left("a", "b", "c", "d", "e")

	_, notes = ran(t, exitUsage, "delayed", "cancel", topic, "a")
	assert.Contains(t, notes, "there is no terminal to ask on")
	_, notes = piped(t, exitUsage, "a\n", "delayed", "cancel", topic, "-")
	assert.Contains(t, notes, "standard input is read")
	c := onTest(t)
	c.in = "n\n"
	assert.Equal(t, exitFailed, c.run("delayed", "cancel", topic, "a", "b"))
	assert.Regexp(t, `Cancel 2 delayed messages of ".*", due from 20\S+ to 20\S+Z\? \[y/N\] `, c.err.String())
	left("a", "b", "c", "d", "e")
	c = onTest(t)
	c.in = "y\n"
	assert.Equal(t, exitPartly, c.run("delayed", "cancel", topic, "a", "none"))
	assert.Contains(t, c.err.String(), "none: not found")
	assert.Contains(t, c.err.String(), "1 delayed message cancelled, 1 failed.")
	left("b", "c", "d", "e")

	out, notes = piped(t, exitPartly, "b\nnone\nc\n", "delayed", "cancel", topic, "-", "--yes", "-o", "csv")
	assert.Equal(t, "uuid,result,error\nb,cancelled,\nnone,failed,\"not found: it is in the stream already, was cancelled, or was never delayed\"\nc,cancelled,\n", out)
	assert.Contains(t, notes, "2 delayed messages cancelled, 1 failed.\n")
	// One that cannot be read can be cancelled.
	require.NoError(t, client.HSet(t.Context(), xstream.DelayedKey(topic), "d", "damaged").Err())
	ran(t, 0, "delayed", "cancel", topic, "d", "--yes")
	left("e")
	assert.Zero(t, client.XLen(t.Context(), topic).Val())
}

func sortedColumn(rows []map[string]any, name string) []string {
	values := column(rows, name)
	slices.Sort(values)
	return values
}

// answerCutter is a hook that loses the answer to one of the scripts that cancel.
type answerCutter struct{ at, seen int }

func (c *answerCutter) DialHook(next redis.DialHook) redis.DialHook { return next }

func (c *answerCutter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (c *answerCutter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if len(cmd.Args()) > 1 && strings.HasPrefix(fmt.Sprint(cmd.Args()[1]), "-- cancel") {
			if c.seen++; c.seen == c.at {
				err = io.ErrUnexpectedEOF
				cmd.SetErr(err)
			}
		}
		return err
	}
}

// A Redis that stops answering ends it, and what is not known is said.
func TestDelayedCancelThroughAnOutage(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	for _, uuid := range []string{"a", "b", "c"} {
		ran(t, 0, "publish", topic, "x", "--uuid", uuid, "--in", "1h")
	}
	cutter := &answerCutter{at: 2}
	flaky := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), MaxRetries: -1})
	flaky.AddHook(cutter)
	var out, notes syncBuffer
	code := runWith(t.Context(), flaky, []string{"delayed", "cancel", topic, "a", "b", "c", "--yes", "--json"}, streams{out: &out, err: &notes})
	assert.Equal(t, exitFailed, code)
	rows := lines(t, out.String())
	assert.Equal(t, []string{"cancelled", "unknown"}, column(rows, "result"))
	assert.Contains(t, notes.String(), "1 delayed message cancelled, of 1 it is not known.")
	assert.Len(t, scheduled(t, client, topic), 1, "c, since b was cancelled; only its answer is lost")
}

func TestDelayedReschedule(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	ran(t, 0, "publish", topic, "x", "--uuid", "a", "--in", "1h")
	_, notes := ran(t, 0, "delayed", "reschedule", topic, "+3d", "a", "--dry-run")
	assert.Regexp(t, `1 delayed message would be rescheduled to 20\S+Z\. Nothing is done\.`, notes)
	assert.WithinDuration(t, time.Now().Add(time.Hour), scheduled(t, client, topic)["a"], time.Minute)
	c := onTest(t)
	c.in = "y\n"
	require.Zero(t, c.run("delayed", "reschedule", topic, "3d", "a"), c.err.String())
	assert.Regexp(t, `Reschedule 1 delayed message of ".*", due 20\S+Z to 20\S+Z\? \[y/N\] `, c.err.String())
	assert.WithinDuration(t, time.Now().Add(72*time.Hour), scheduled(t, client, topic)["a"], time.Minute)
	at := time.Now().Add(5 * time.Hour).UTC().Truncate(time.Second)
	out, _ := ran(t, 0, "delayed", "reschedule", topic, at.Format(time.RFC3339), "a", "--yes", "--json")
	assert.JSONEq(t, `{"uuid":"a","result":"rescheduled"}`, out)
	assert.True(t, at.Equal(scheduled(t, client, topic)["a"]))

	_, notes = ran(t, exitPartly, "delayed", "reschedule", topic, "1h", "none", "--yes")
	assert.Contains(t, notes, "none: not found")
	for _, value := range []string{"", "1", "+", "+-1h", "1y", "tomorrow", "0001-01-01T00:00:00Z", "3651d", "9999-01-01T00:00:00Z"} {
		_, notes = ran(t, exitUsage, "delayed", "reschedule", topic, value, "a", "--yes")
		assert.Contains(t, notes, "TIME: ")
	}
	assert.True(t, at.Equal(scheduled(t, client, topic)["a"]))
	piped(t, 0, "a\n", "delayed", "reschedule", topic, "0s", "-", "--yes")
	assert.Equal(t, []string{"x"}, received(t, client, topic, "g", 1))
}

func TestCheckOverdue(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	overdueIn(t, client, topic, 2*time.Hour)
	out, _ := ran(t, int(statusCritical), "check", topic, "--max-overdue", "1m,1h")
	assert.Regexp(t, `^GOXSTREAMS CRITICAL - .*: overdue 2h \(CRITICAL is more than 1h\) \| 'overdue'=72\d\d(\.\d+)?s;60;3600;0\n$`, out)
	ran(t, int(statusWarning), "check", topic, "--max-overdue", "1h,3h")
	ran(t, int(statusOK), "check", topic, "--max-overdue", "3h")
	out, _ = ran(t, int(statusUnknown), "check", topic, "--max-overdue", "3h", "--max-lag", "1")
	assert.Contains(t, out, "there is no such stream", "which would have groups")
	out, _ = ran(t, int(statusUnknown), "check", topic+"-none", "--max-overdue", "3h")
	assert.Contains(t, out, "there is no such stream")
	ran(t, 0, "publish", topic+"-none", "x")
	ran(t, int(statusOK), "check", topic+"-none", "--max-overdue", "0s")
}

func TestDueKey(t *testing.T) {
	for _, topic := range []string{"orders", "a.dead", "{a}b", "a{b}c", "a{b", "a}b", "{}", "a\xff", ".dead.dead"} {
		assert.Equal(t, xstream.DueKey(topic), dueKey(topic))
	}
}
