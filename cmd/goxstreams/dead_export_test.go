package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// rawEntries returns all entries of a stream, to the byte.
func rawEntries(t *testing.T, client redis.UniversalClient, stream string) []entry {
	t.Helper()
	entries, err := entriesIn(client.Do(t.Context(), "xrange", stream, "-", "+"))
	require.NoError(t, err)
	return entries
}

// exportOf writes the export of a topic to a file, and returns its path and its lines.
func exportOf(t *testing.T, args ...string) (path string, lines []string) {
	t.Helper()
	out, _ := ran(t, 0, append([]string{"dead", "export"}, args...)...)
	return fileOf(t, out), strings.Split(strings.TrimSuffix(out, "\n"), "\n")
}

func fileOf(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "letters.jsonl")
	require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// variety makes dead letters of all kinds, with what files do not like.
func variety(t *testing.T, client redis.UniversalClient, topic string) []entry {
	t.Helper()
	for _, d := range []death{
		{handler: "a", payload: `{"n":1}`, err: errors.New("a \"quote\", a \\, a line\nand a tab\t"), meta: message.Metadata{"tenant": "t7"}},
		{handler: "a", payload: "\x00\xff\xfe\r\n", err: goxstreams.Permanent(errors.New("\x1b[0m \u202e \ufffd")), meta: message.Metadata{"bin\xff": "\xff\x00", "é": "ü"}},
		{handler: "a", payload: "", err: errors.New("x")},
	} {
		die(t, client, topic, d) // one after the other: in this order
	}
	// One that is broken, with a field twice, as the library stores it.
	broken := []string{"same", "1", "same", "2", "\xff", "\x00"}
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: broken}).Err())
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "a", Retry: &goxstreams.Retry{MaxRetries: 1}}, nil)
	require.NoError(t, err)
	_, err = sub.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	await(t, func() bool { return len(deadOf(t, client, topic)) == 4 })
	require.NoError(t, sub.Close())
	return rawEntries(t, client, goxstreams.DeadLetterTopic(topic))
}

func TestExportImport(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	letters := variety(t, client, topic)
	stream := goxstreams.DeadLetterTopic(topic)
	file, lines := exportOf(t, topic)
	require.Len(t, lines, 4)
	for i, line := range lines {
		var row map[string]any
		require.NoError(t, json.Unmarshal([]byte(line), &row), line)
		assert.Equal(t, letters[i].id, row["id"])
		assert.NotContains(t, row, "payload", "the entry has it")
		assert.Equal(t, safeLines(line), line)
	}
	assert.Contains(t, lines[0], `"metadata":{"tenant":"t7"}`)
	assert.Equal(t, letters, rawEntries(t, client, stream), "an export changes nothing")

	// On a server without them they are stored as they were, IDs and all.
	copied := topic + "-copy"
	_, notes := ran(t, 0, "dead", "import", topic, file, "--stream", copied)
	assert.Contains(t, notes, "4 dead letters imported, 0 were there already.")
	assert.Equal(t, letters, rawEntries(t, client, copied))

	// Again, and where they come from, nothing is stored.
	for _, to := range []string{copied, stream} {
		_, notes = ran(t, 0, "dead", "import", topic, file, "--stream", to)
		assert.Contains(t, notes, "0 dead letters imported, 4 were there already.")
		assert.Equal(t, letters, rawEntries(t, client, to))
	}

	// What was deleted comes back, with an ID of its own, since IDs only grow. A dry run says so.
	require.NoError(t, client.XDel(t.Context(), stream, letters[1].id, letters[3].id).Err())
	out, notes := ran(t, 0, "dead", "import", topic, file, "--dry-run")
	assert.Contains(t, notes, "2 dead letters would be imported, 2 are there already. Nothing is stored.")
	assert.Contains(t, out, letters[1].id)
	assert.NotContains(t, out, letters[0].id)
	assert.Len(t, rawEntries(t, client, stream), 2)
	rows := parsed(t, "dead", "import", topic, file)
	assert.Equal(t, []string{"present", "imported", "present", "imported"}, column(rows, "result"))
	now := rawEntries(t, client, stream)
	require.Len(t, now, 4)
	assert.Equal(t, []entry{letters[0], letters[2]}, now[:2])
	assert.Equal(t, [][]string{letters[1].fields, letters[3].fields}, [][]string{now[2].fields, now[3].fields})
	assert.Equal(t, []any{now[2].id, now[3].id}, []any{rows[1]["stored_id"], rows[3]["stored_id"]})

	// And can be replayed.
	ran(t, 0, "dead", "replay", topic, "--yes", now[2].id)
	assert.Equal(t, []string{"\x00\xff\xfe\r\n"}, received(t, client, topic, "a", 1))
}

// Standard input can be read once only, and the export is read twice.
func TestImportFromStandardInput(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	letters := variety(t, client, topic)
	_, lines := exportOf(t, topic, "--kind", "permanent,broken")
	letters = slices.DeleteFunc(letters, func(e entry) bool { return strings.Contains(e.fields[3], "exhausted") })
	require.Len(t, letters, 2)
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	for i, args := range [][]string{{topic}, {topic, "-"}} {
		c := onTest(t)
		copied := fmt.Sprintf("%s-copy%d", topic, i)
		code := run(t.Context(), append([]string{"--url", c.url, "dead", "import", "--stream", copied}, args...),
			streams{in: strings.NewReader(strings.Join(lines, "\n\n")), out: &c.out, err: &c.err})
		require.Zero(t, code, c.err.String())
		assert.Equal(t, letters, rawEntries(t, client, copied))
	}
	left, err := os.ReadDir(temp)
	require.NoError(t, err)
	assert.Empty(t, left, "the copy is removed")
}

// A line that is not as it should be is named with what is wrong, and nothing is stored of any line.
func TestImportChecksFirst(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "pay\xff", err: errors.New("why"), meta: message.Metadata{"tenant": "t7"}})
	_, lines := exportOf(t, topic)
	good := lines[0]
	const base64 = `{"base64":"cGF5/w=="}`
	require.Contains(t, good, base64)
	for want, line := range map[string]string{
		"line 2: no JSON object":                                               good[:len(good)-1],
		"line 2: not UTF-8":                                                    strings.Replace(good, "t7", "t\xff", 1),
		"line 2: id: is missing":                                               strings.Replace(good, `"id":`, `"ID":`, 1),
		`line 2: id: "0-0" is no entry ID`:                                     `{"id":"0-0"}`,
		`line 2: id: "7" is no entry ID`:                                       `{"id":"7"}`,
		"line 2: entry: is missing, or no list":                                `{"id":"7-1"}`,
		"line 2: entry: the 1. field is not a name and a value":                `{"id":"7-1","entry":[["a"]]}`,
		`line 2: entry: the 1. field: want a string, or {"base64": ".."}`:      `{"id":"7-1","entry":[["a",1]]}`,
		`line 2: entry: the 3. field: illegal base64 data`:                     strings.Replace(good, base64, `{"base64":"?"}`, 1),
		"line 2: entry: the 3. field: half of a UTF-16 pair":                   strings.Replace(good, base64, `"pay\ud800"`, 1),
		"line 2: entry: goxstreams: entry 7-1 is not a dead letter":            `{"id":"7-1","entry":[["a","b"]]}`,
		"line 2: reason: differs from what the entry says":                     strings.Replace(good, `"reason":"why"`, `"reason":"because"`, 1),
		"line 2: metadata: differs from what the entry says":                   strings.Replace(good, `"t7"`, `"t8"`, 1),
		"line 2: tenant: the entry has no such thing":                          strings.Replace(good, `"id":`, `"tenant":"t7","id":`, 1),
		fmt.Sprintf("line 2: topic: the letter died in %q, not in", topic+"!"): strings.ReplaceAll(good, topic, topic+"!"),
	} {
		if strings.Contains(want, "topic:") { // an honest export of another topic
			die(t, client, topic+"!", death{handler: "a", err: errors.New("x")})
			_, others := exportOf(t, topic+"!")
			line = others[0]
		}
		_, notes := ran(t, exitFailed, "dead", "import", topic, fileOf(t, good+"\n"+line+"\n"), "--stream", topic+"-copy")
		assert.Contains(t, notes, want)
		assert.Contains(t, notes, "1. Nothing is stored")
		assert.Zero(t, client.Exists(t.Context(), topic+"-copy").Val(), want)
	}
	_, notes := ran(t, exitFailed, "dead", "import", topic, filepath.Join(t.TempDir(), "none"))
	assert.Contains(t, notes, "no such file")
	ran(t, exitUsage, "dead", "import", topic, "a", "b")
	ran(t, exitUsage, "dead", "import", "", "a")
	_, notes = ran(t, 0, "dead", "import", topic, fileOf(t, ""))
	assert.Contains(t, notes, "0 dead letters imported, 0 were there already.")

	// What is written for reading need not be there, and other tools may write the rest in their way.
	var row map[string]any
	require.NoError(t, json.Unmarshal([]byte(good), &row))
	short, err := json.MarshalIndent(map[string]any{"entry": row["entry"], "id": row["id"]}, "", "")
	require.NoError(t, err)
	ran(t, 0, "dead", "import", topic, fileOf(t, strings.ReplaceAll(string(short), "\n", " ")), "--stream", topic+"-copy")
	assert.Equal(t, rawEntries(t, client, goxstreams.DeadLetterTopic(topic)), rawEntries(t, client, topic+"-copy"))
}

// manyLetters stores n different dead letters, and returns the file of their export.
func manyLetters(t *testing.T, client redis.UniversalClient, topic string, n int) string {
	t.Helper()
	die(t, client, topic, death{handler: "a", payload: "p", err: errors.New("x"), uuid: "uuid-000000"})
	stream := goxstreams.DeadLetterTopic(topic)
	one := rawEntries(t, client, stream)[0]
	_, err := client.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
		for i := 1; i < n; i++ {
			fields := anys(one.fields)
			fields[1] = fmt.Sprintf("uuid-%06d", i)
			pipe.Do(t.Context(), append([]any{"xadd", stream, "*"}, fields...)...)
		}
		return nil
	})
	require.NoError(t, err)
	file, lines := exportOf(t, topic)
	require.Len(t, lines, n)
	return file
}

// requireEachOnce requires that two streams hold the same entries, whatever their IDs and order.
func requireEachOnce(t *testing.T, client redis.UniversalClient, want, got string) {
	t.Helper()
	fields := func(stream string) (all [][]string) {
		for _, e := range rawEntries(t, client, stream) {
			all = append(all, e.fields)
		}
		return all
	}
	require.ElementsMatch(t, fields(want), fields(got))
}

// Several that import the same at once, while letters die and are deleted, store each once.
func TestImportsAtOnce(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	file := manyLetters(t, client, topic, 450)
	copied := topic + "-copy"
	var imports sync.WaitGroup
	commands := make([]*command, 3)
	var stored, present atomic.Int64
	for i := range commands {
		commands[i] = onTest(t)
		imports.Go(func() {
			c := commands[i]
			if code := c.run("dead", "import", topic, file, "--stream", copied); code != 0 {
				t.Errorf("%d: %s", code, c.err.String())
			}
			var s, p int64
			_, err := fmt.Sscanf(c.err.String(), "%d dead letters imported, %d were", &s, &p)
			assert.NoError(t, err, c.err.String())
			stored.Add(s)
			present.Add(p)
		})
	}
	imports.Wait()
	requireEachOnce(t, client, goxstreams.DeadLetterTopic(topic), copied)
	assert.EqualValues(t, 450, stored.Load())
	assert.EqualValues(t, 900, present.Load())
}

// A stream may have an entry several times, if somebody has written it by hand. Then an import makes it as many as
// the export has.
func TestImportOfCopies(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "p", err: errors.New("x")})
	multiply(t, client, topic, 3)
	file, _ := exportOf(t, topic)
	ids := deadOf(t, client, topic)
	ran(t, 0, "dead", "delete", topic, "--yes", ids[0], ids[1])
	_, notes := ran(t, 0, "dead", "import", topic, file)
	assert.Contains(t, notes, "2 dead letters imported, 1 were there already.")
	assert.Len(t, deadOf(t, client, topic), 3)
}

func TestInterruptedImport(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	file := manyLetters(t, client, topic, 950)
	copied := topic + "-copy"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := writing(func(p []byte) {
		if strings.Contains(string(p), `"imported"`) {
			cancel()
		}
	})
	c := onTest(t)
	code := run(ctx, []string{"--url", c.url, "dead", "import", topic, file, "--stream", copied, "--json"}, streams{out: out, err: &c.err})
	assert.Equal(t, exitInterrupted, code)
	n := len(rawEntries(t, client, copied))
	assert.Greater(t, n, 0)
	assert.Less(t, n, 950)
	assert.Contains(t, c.err.String(), fmt.Sprintf("%d dead letters imported, 0 were there already.", n))
	assert.Contains(t, c.err.String(), "run it again for the rest")

	_, notes := ran(t, 0, "dead", "import", topic, file, "--stream", copied)
	assert.Contains(t, notes, fmt.Sprintf("%d dead letters imported, %d were there already.", 950-n, n))
	assert.Equal(t, rawEntries(t, client, goxstreams.DeadLetterTopic(topic)), rawEntries(t, client, copied))
}

// deaf is a connection that breaks when the answer to a transaction has come, and is not read yet.
type deaf struct {
	net.Conn
	ran  func()
	sent *atomic.Bool
}

func (d deaf) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("exec\r\n")) {
		d.sent.Store(true)
	}
	return d.Conn.Write(p)
}

func (d deaf) Read(p []byte) (int, error) {
	if d.sent.Load() {
		d.ran()
		return 0, io.EOF
	}
	return d.Conn.Read(p)
}

// When the answer is lost, nobody knows what was stored. It says so, and the next run looks.
func TestImportWithoutAnAnswer(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	file := manyLetters(t, client, topic, 250)
	copied := topic + "-copy"
	broken := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		stored := func() { await(t, func() bool { return client.XLen(context.Background(), copied).Val() == 100 }) }
		return deaf{conn, stored, new(atomic.Bool)}, err
	}})
	var out, notes syncBuffer
	code := runWith(t.Context(), broken, []string{"dead", "import", topic, file, "--stream", copied}, streams{out: &out, err: &notes})
	assert.Equal(t, exitFailed, code, notes.String())
	assert.Contains(t, notes.String(), "0 dead letters imported, 0 were there already, of 100 it is not known.")
	assert.Contains(t, notes.String(), "run it again for the rest: ")

	_, text := ran(t, 0, "dead", "import", topic, file, "--stream", copied)
	assert.Contains(t, text, "150 dead letters imported, 100 were there already.")
	assert.Equal(t, rawEntries(t, client, goxstreams.DeadLetterTopic(topic)), rawEntries(t, client, copied))
}

// A file with an ID of the future must not stop what dies from being stored until then.
func TestImportOfTheFuture(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "p", err: errors.New("x")})
	_, lines := exportOf(t, topic)
	id := deadOf(t, client, topic)[0]
	future := strings.Replace(lines[0], id, "18446744073709551615-18446744073709551615", 1)
	ran(t, 0, "dead", "import", topic, fileOf(t, future), "--stream", topic+"-copy")
	stored := rawEntries(t, client, topic+"-copy")
	require.Len(t, stored, 1)
	ms, err := strconv.ParseInt(strings.Split(stored[0].id, "-")[0], 10, 64)
	require.NoError(t, err)
	assert.Less(t, ms, int64(1)<<50)
}

func TestExportOfForeign(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	die(t, client, topic, death{handler: "a", payload: "p", err: errors.New("x")})
	stream := goxstreams.DeadLetterTopic(topic)
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: stream, Values: []string{"a", "b", "a", "c"}}).Err())
	out, notes := ran(t, 0, "dead", "export", topic)
	assert.Equal(t, 1, strings.Count(out, "\n"))
	assert.Contains(t, notes, "1 entries of")
	ours := fileOf(t, out)
	foreign, lines := exportOf(t, topic, "--foreign")
	require.Len(t, lines, 1)
	_, notes = ran(t, exitFailed, "dead", "import", topic, foreign, "--stream", topic+"-copy")
	assert.Contains(t, notes, "line 1: entry: goxstreams: entry")
	_, notes = ran(t, exitFailed, "dead", "import", topic, ours, "--stream", topic+"-copy", "--foreign")
	assert.Contains(t, notes, "line 1: topic: --foreign is for")
	ran(t, 0, "dead", "import", topic, foreign, "--stream", topic+"-copy", "--foreign")
	assert.Equal(t, rawEntries(t, client, stream)[1:], rawEntries(t, client, topic+"-copy"))
}

func TestInterruptedExport(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	manyLetters(t, client, topic, 950)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := onTest(t)
	code := run(ctx, []string{"--url", c.url, "dead", "export", topic}, streams{out: writing(func([]byte) { cancel() }), err: &c.err})
	assert.Equal(t, exitInterrupted, code)
	assert.Contains(t, c.err.String(), "the export is not complete")
}

// What is taken of a file is what the library takes for a dead letter of the topic, and exporting it gives the
// same again.
func FuzzImportLine(f *testing.F) {
	f.Add(`{"id":"1-1","entry":[["_watermill_message_uuid","u"],["metadata","\u0081¥topic"],["payload",{"base64":"/w=="}],["_goxstreams_fields",""]]}`)
	f.Add(`{"id":"1-1","entry":[["a","\\ufffd\ufffd\ud800"]]}`)
	f.Fuzz(func(t *testing.T, line string) {
		for _, foreign := range []bool{false, true} {
			s := &selection{topic: "orders", letterFilter: letterFilter{foreign: foreign}}
			e, err := parseLine([]byte(line))
			if err != nil || s.verify(e) != nil {
				continue
			}
			row, d, err := newExportRow(e.id, e.fields)
			if foreign == (err == nil && d.Topic == "orders") {
				t.Fatalf("%q: %v %v", line, d, err)
			}
			again, err := jsonLine(row)
			if err != nil {
				t.Fatal(err)
			}
			e2, err := parseLine(again)
			if err == nil {
				err = s.verify(e2)
			}
			if err != nil || digestOf(e2.fields) != digestOf(e.fields) {
				t.Fatalf("%q becomes %q: %v", line, again, err)
			}
		}
	})
}
