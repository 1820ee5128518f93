package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// csvRows returns the rows of CSV by the names of its header.
func csvRows(t *testing.T, out string) []map[string]string {
	t.Helper()
	records, err := csv.NewReader(strings.NewReader(out)).ReadAll()
	require.NoError(t, err, out)
	require.NotEmpty(t, records, "no header")
	var rows []map[string]string
	for _, record := range records[1:] {
		row := make(map[string]string)
		for i, cell := range record {
			row[records[0][i]] = cell
		}
		rows = append(rows, row)
	}
	return rows
}

// CSV has what JSON has, in all listings.
func TestCSVIsJSON(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic,
		death{handler: "a", payload: "x,\"y\"\nz", uuid: "u1", err: errors.New("no, \"stock\""), meta: message.Metadata{"k": "v"}},
		death{handler: "a", payload: "\xff", err: errors.New("later")})
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"x", "y"}}).Err())
	read := &redis.XReadGroupArgs{Group: "a", Consumer: "c1", Streams: []string{topic, ">"}, Count: 2}
	require.NoError(t, client.XReadGroup(t.Context(), read).Err())
	ids := deadOf(t, client, topic)
	for _, args := range [][]string{
		{"topics", topic + "*"}, {"groups", topic}, {"pending", topic, "a"}, {"tail", topic}, {"dead", "list", topic}, {"dead", "summary", topic},
		{"dead", "show", topic, ids[0], ids[1]}, {"dead", "replay", topic, "--all", "--dry-run"}, {"dead", "delete", topic, ids[0], "--dry-run"},
	} {
		want := parsed(t, args...)
		out, _ := ran(t, 0, append(args, "-o", "csv")...)
		got := csvRows(t, out)
		require.Len(t, got, len(want), "%v", args)
		require.NotEmpty(t, got, "%v", args)
		for i, row := range want {
			for name, value := range row {
				require.Contains(t, got[i], name, "%v", args)
				switch value := value.(type) {
				case string:
					if !strings.HasSuffix(name, "_at") && name != "time" {
						assert.Equal(t, safe(value), got[i][name], "%v: %s", args, name)
					}
				case nil:
					assert.Empty(t, got[i][name])
				case float64:
					if !strings.HasSuffix(name, "_ms") {
						assert.Equal(t, fmt.Sprint(int64(value)), got[i][name], "%v: %s", args, name)
					}
				case map[string]any, []any:
					if m, ok := value.(map[string]any); ok && m["base64"] != nil {
						assert.Equal(t, `\xff`, got[i][name])
						continue
					}
					cell := got[i][name]
					if m, ok := value.(map[string]any); ok && len(m) == 0 {
						assert.Empty(t, cell)
						continue
					}
					data, err := json.Marshal(value)
					require.NoError(t, err)
					assert.JSONEq(t, string(data), cell, "%v: %s", args, name)
				}
			}
		}
	}
	// The header is there also where there is nothing.
	out, _ := ran(t, 0, "dead", "list", topic+"-none", "-o", "csv")
	assert.True(t, strings.HasPrefix(out, "id,result,error,died_at,kind,"), out)
	assert.Equal(t, 1, strings.Count(out, "\n"))
	out, _ = ran(t, 0, "dead", "delete", topic, "--yes", "-o", "csv", ids[0])
	assert.Equal(t, "id,result,error\n"+ids[0]+",deleted,\n", out)
}

func TestCSVCells(t *testing.T) {
	at := time.Date(2026, 11, 28, 1, 2, 3, 4000, time.UTC)
	assert.Equal(t, map[string]string{"topic": "a", "length": "", "groups": "0", "pending": "7", "max_lag": "", "dead_letters": "", "dead_letter_topic": `b\x1b`,
		"delayed": "3", "overdue_seconds": "1.5"},
		cells(t, topicRow{"a", unknown, 0, 7, unknown, unknown, "b\x1b", 3, new(1.5)}))
	row := cells(t, &letterRow{ID: "1-1", DiedAt: &at, Deliveries: 3, Payload: new(text("p\n")), Metadata: map[string]text{"k": "\u202e"}})
	assert.Equal(t, "2026-11-28T01:02:03.000004Z", row["died_at"])
	assert.Equal(t, "3", row["deliveries"])
	assert.Equal(t, `p\n`, row["payload"])
	assert.Equal(t, `{"k":"\u202e"}`, row["metadata"])
	assert.Empty(t, row["fields"])
	assert.Equal(t, map[string]string{"count": "2", "kind": "k", "group": "", "handler": "", "reason": "r", "oldest_id": "1-0", "newest_id": "2-0"},
		cells(t, causeRow{2, cause{Kind: "k", Reason: "r"}, "1-0", "2-0"}))
}

func cells(t *testing.T, row any) map[string]string {
	t.Helper()
	found := make(map[string]string)
	for _, f := range jsonFields(row) {
		cell, err := csvCell(f.value)
		require.NoError(t, err)
		found[f.name] = cell
	}
	return found
}

func TestOutputFlags(t *testing.T) {
	for _, args := range [][]string{{"-o", "xml"}, {"-o", "csv", "--json"}, {"--output", "table", "--json"}, {"-o", ""}} {
		_, notes := ran(t, exitUsage, append([]string{"topics", topic(t)}, args...)...)
		assert.Contains(t, notes, "--output")
	}
	ran(t, 0, "topics", topic(t), "-o", "json", "--json")
	out, _ := ran(t, 0, "__complete", "topics", "-o", "")
	assert.Equal(t, "table\njson\ncsv\n:4\n", out)
}

// IDs from standard input are those, and no others: none is not all.
func TestIDsFromStandardInput(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "1", err: errors.New("x")})
	multiply(t, client, topic, 5)
	all := deadOf(t, client, topic)
	piped := func(in string, args ...string) (int, string, string) {
		var out, notes syncBuffer
		s := streams{in: strings.NewReader(in), out: &out, err: &notes, asks: true}
		code := run(t.Context(), append([]string{"--url", onTest(t).url}, args...), s)
		return code, out.String(), notes.String()
	}
	code, out, _ := piped(all[3]+"\r\n\n  "+all[1]+"\n"+all[3], "dead", "show", topic, "-", "--json")
	assert.Zero(t, code)
	assert.Equal(t, []string{all[3], all[1]}, column(lines(t, out), "id"))

	for _, tt := range []struct {
		code int
		want string
		in   string
		args []string
	}{
		{exitUsage, `line 3: "id" is no entry ID`, all[0] + "\n\nid\n", []string{"-", "--yes"}},
		{exitUsage, "not both", all[0], []string{"-", all[1], "--yes"}},
		{exitUsage, "not both", all[0], []string{"-", "--all", "--yes"}},
		{exitUsage, "nobody can be asked there", all[0] + "\ny\n", []string{"-"}},
		{0, "0 dead letters deleted.", "\n", []string{"-", "--yes"}},
		{0, "0 dead letters would be deleted", "", []string{"-", "--dry-run"}},
	} {
		code, _, notes := piped(tt.in, append([]string{"dead", "delete", topic}, tt.args...)...)
		assert.Equal(t, tt.code, code, notes)
		assert.Contains(t, notes, tt.want)
		assert.Equal(t, all, deadOf(t, client, topic), "%v", tt.args)
	}
	code, _, notes := piped(all[3]+"\n"+all[0]+"\n", "dead", "delete", topic, "-", "--yes")
	assert.Zero(t, code, notes)
	assert.Equal(t, []string{all[1], all[2], all[4]}, deadOf(t, client, topic))
	stream := goxstreams.DeadLetterTopic(topic)
	require.NoError(t, client.Del(t.Context(), stream).Err())
}

// IDs are found in any order, with what is missing or foreign in between, and those that follow each other
// page by page.
func TestManyIDs(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "1", err: errors.New("x")})
	multiply(t, client, topic, 450)
	stream := goxstreams.DeadLetterTopic(topic)
	junk, err := client.XAdd(t.Context(), &redis.XAddArgs{Stream: stream, Values: []string{"a", "b"}}).Result()
	require.NoError(t, err)
	all := deadOf(t, client, topic)
	asked := slices.Concat(all[:3], []string{all[440], all[5], "1-1", all[100], junk}, all[300:420], []string{all[299], "9999999999999-0", all[0], all[449]})
	client.XDel(t.Context(), stream, all[310])
	want := slices.DeleteFunc(slices.Clone(asked), func(id string) bool { return id == "1-1" || id == "9999999999999-0" || id == all[310] })
	want = slices.Compact(want)
	seen := make(map[string]bool)
	want = slices.DeleteFunc(want, func(id string) bool { again := seen[id]; seen[id] = true; return again })
	out, notes := piped(t, exitPartly, strings.Join(asked, "\n"), "dead", "show", topic, "-", "-o", "json")
	assert.Equal(t, want, column(lines(t, out), "id"))
	assert.Equal(t, 3, strings.Count(notes, "not found"))

	counting := redis.NewClient(&redis.Options{Addr: testserver.Addr(t)})
	var reads atomic.Int64
	counting.AddHook(countHook{&reads})
	code := runWith(t.Context(), counting, []string{"dead", "show", topic, "-", "-o", "json"}, streams{in: strings.NewReader(strings.Join(all[:300], "\n")), out: io.Discard, err: io.Discard})
	assert.Zero(t, code)
	assert.NotZero(t, reads.Load())
	assert.Less(t, reads.Load(), int64(10), "a read for each ID")
}

// countHook counts commands.
type countHook struct{ n *atomic.Int64 }

func (h countHook) DialHook(next redis.DialHook) redis.DialHook { return next }
func (h countHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { h.n.Add(1); return next(ctx, cmd) }
}
func (h countHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
