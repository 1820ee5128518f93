package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// piped runs the command with a text on its standard input, which is no terminal.
func piped(t *testing.T, code int, in string, args ...string) (out, notes string) {
	t.Helper()
	var stdout, stderr syncBuffer
	got := run(t.Context(), append([]string{"--url", onTest(t).url}, args...), streams{in: strings.NewReader(in), out: &stdout, err: &stderr})
	require.Equal(t, code, got, "%v\n%s\n%s", args, stdout.String(), stderr.String())
	return stdout.String(), stderr.String()
}

func TestPublish(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	file := filepath.Join(t.TempDir(), "payload")
	require.NoError(t, os.WriteFile(file, []byte("\xff\n"), 0o600))
	_, notes := ran(t, 0, "publish", topic, "one", "--uuid", "u1", "-m", "a=b=c", "--metadata", "d=")
	assert.Equal(t, "1 message is published: UUID u1.\n", notes)
	piped(t, 0, "two\n", "publish", topic, "-")
	ran(t, 0, "publish", topic, "--file", file)
	ran(t, 0, "publish", topic, "", "--json")
	ran(t, 0, "publish", topic, "body", "--body-field", "b", "--metadata-field", "ctx", "-m", "k=v")
	rows := parsed(t, "tail", topic, "--body-field", "b", "--metadata-field", "ctx")
	require.Len(t, rows, 5)
	assert.Equal(t, map[string]any{"a": "b=c", "d": ""}, rows[0]["metadata"])
	assert.Equal(t, []string{"one", "two\n", "map[base64:/wo=]", "", "body"}, column(rows, "payload"))
	assert.Equal(t, map[string]any{"k": "v"}, rows[4]["metadata"])
	assert.Len(t, stored(t, client, topic), 5)
}

// What tail prints can be published, byte for byte.
func TestPublishJSONLines(t *testing.T) {
	client, from, to := testserver.Client(t), topic(t), topic(t)
	const evil = "a\x1b[2J\r\n\u202e\xff"
	ran(t, 0, "publish", from, evil, "--uuid", evil, "-m", "k="+evil)
	for i := range 250 {
		ran(t, 0, "publish", from, fmt.Sprint(i))
	}
	out, _ := ran(t, 0, "tail", from, "-n", "1000", "-o", "json")
	rows, notes := piped(t, 0, out, "publish", to, "--json-lines", "-o", "json")
	assert.Equal(t, "251 messages are published.\n", notes)
	assert.Len(t, lines(t, rows), 251)
	a, b := stored(t, client, from), stored(t, client, to)
	require.Len(t, b, len(a))
	for i := range a {
		assert.Equal(t, a[i].Values, b[i].Values)
	}
	file := filepath.Join(t.TempDir(), "messages")
	require.NoError(t, os.WriteFile(file, []byte(out), 0o600))
	ran(t, 0, "publish", to, "--json-lines", "--file", file)
	assert.Len(t, stored(t, client, to), 502)
	_, notes = piped(t, 0, "\n", "publish", to, "--json-lines", "-")
	assert.Equal(t, "0 messages are published.\n", notes)
	// It stops at a line that is none, and says how far it came.
	_, notes = piped(t, exitFailed, strings.Repeat(`{"payload": "x"}`+"\n", 150)+"{}\n", "publish", to, "--json-lines")
	assert.Contains(t, notes, "100 messages are published; line 151: payload is missing")
	assert.Len(t, stored(t, client, to), 602)
}

func TestPublishUsage(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	for _, tt := range []struct {
		want, in string
		args     []string
	}{
		{"payload is missing", "", []string{topic}},
		{"TOPIC is empty", "", []string{"", "x"}},
		{"--metadata", "", []string{topic, "x", "-m", "a"}},
		{"--metadata", "", []string{topic, "x", "-m", "=a"}},
		{"--metadata", "", []string{topic, "x", "-m", "a=1", "-m", "a=2"}},
		{"--file", "", []string{topic, "x", "--file", "y"}},
		{"--file: open", "", []string{topic, "--file", "/none/of/it"}},
		{"--json-lines", "", []string{topic, "x", "--json-lines"}},
		{"--json-lines", "", []string{topic, "--json-lines", "--uuid", "u"}},
		{"--metadata-field", "", []string{topic, "x", "--metadata-field", "m"}},
		{"--body-field", "", []string{topic, "x", "--body-field", "b", "--uuid", "u"}},
		{"--metadata-field", "", []string{topic, "x", "--body-field", "b", "-m", "a=b"}},
		{`line 1: json: unknown field "reason"`, `{"reason": "x", "payload": "y"}`, []string{topic, "--json-lines"}},
		{"line 2: payload: want a string", "\n" + `{"payload": {"a": 1}}`, []string{topic, "--json-lines"}},
		{"line 1: payload: want a string", `{"payload": null}`, []string{topic, "--json-lines"}},
		{"line 1: payload: illegal base64", `{"payload": {"base64": "?"}}`, []string{topic, "--json-lines"}},
		{"line 1: uuid: want a string", `{"payload": "x", "uuid": 5}`, []string{topic, "--json-lines"}},
		{"line 1: metadata a: want a string", `{"payload": "x", "metadata": {"a": 5}}`, []string{topic, "--json-lines"}},
		{"line 1: something follows", `{"payload": "x"} {}`, []string{topic, "--json-lines"}},
		{"line 1: ", `payload`, []string{topic, "--json-lines"}},
	} {
		_, notes := piped(t, exitUsage, tt.in, append([]string{"publish"}, tt.args...)...)
		assert.Contains(t, notes, tt.want, "%v", tt.args)
	}
	assert.Zero(t, client.Exists(t.Context(), topic).Val())
}

func TestGet(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	ran(t, 0, "publish", topic, `{"n":1}`, "--uuid", "u1", "-m", "k=v")
	twice, err := client.Do(t.Context(), "xadd", topic, "*", "a", "1", "a", "2").Text()
	require.NoError(t, err)
	id := stored(t, client, topic)[0].ID
	out, notes := ran(t, exitPartly, "get", topic, id, "1-1", twice)
	assert.Contains(t, notes, "1-1: not found")
	for _, want := range []string{"ID          " + id, "UUID        u1", "  k: v\n", "Payload, 7 bytes\n  {\n    \"n\": 1\n", "Problem     ", "Field a, 1 bytes\n  1\n", "Field a, 1 bytes\n  2\n", "Fields      "} {
		assert.Contains(t, out, want)
	}
	rows := parsed(t, "get", topic, id, twice)
	assert.Equal(t, "u1", rows[0]["uuid"])
	assert.Len(t, rows[0]["fields"], 3)
	assert.Equal(t, []any{[]any{"a", "1"}, []any{"a", "2"}}, rows[1]["fields"])
	out, _ = piped(t, 0, id+"\n", "get", topic, "-", "-o", "csv")
	assert.Equal(t, `{"n":1}`, csvRows(t, out)[0]["payload"])
	_, notes = ran(t, exitUsage, "get", topic, "x")
	assert.Contains(t, notes, "no entry ID")
	ran(t, exitPartly, "get", topic+"-none", id)
	require.NoError(t, client.Set(t.Context(), topic+"-text", "x", 0).Err())
	_, notes = ran(t, exitFailed, "get", topic+"-text", id)
	assert.Contains(t, notes, "is no stream")
}

func TestConsumers(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	pend(t, client, topic, "c1", 3)
	rows := parsed(t, "consumers", topic, "g")
	require.Len(t, rows, 1)
	assert.Equal(t, "c1", rows[0]["consumer"])
	assert.Equal(t, 3.0, rows[0]["pending"])
	out, _ := ran(t, 0, "consumers", topic, "g")
	assert.Regexp(t, `^CONSUMER +PENDING +IDLE +INACTIVE\nc1 +3 +\d+s +(\d+s|-)\n$`, out)
	require.NoError(t, client.XGroupCreate(t.Context(), topic, "empty", "0").Err())
	_, notes := ran(t, 0, "consumers", topic, "empty")
	assert.Contains(t, notes, "has no consumers")
	_, notes = ran(t, exitFailed, "consumers", topic, "none")
	assert.Contains(t, notes, "has no group")
	_, notes = ran(t, exitFailed, "consumers", goxstreams.DeadLetterTopic(topic), "g")
	assert.Contains(t, notes, "there is no stream")
	out, _ = ran(t, 0, "__complete", "consumers", topic, "")
	assert.ElementsMatch(t, []string{"empty", "g", ":4"}, strings.Fields(out))
	for _, args := range [][]string{{"pending", topic, "g", "--consumer", ""}, {"pending", "claim", topic, "g", "--to", ""}} {
		out, _ = ran(t, 0, append([]string{"__complete"}, args...)...)
		assert.Equal(t, "c1\n:4\n", out)
	}
	out, _ = ran(t, 0, "__complete", "group", "reset", topic, "g", "--to", "")
	assert.Equal(t, "start\nend\n:4\n", out)
}
