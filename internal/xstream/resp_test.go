package xstream

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// wire encodes a reply: strings as bulk strings, lists as lists.
func wire(v any) string {
	switch v := v.(type) {
	case string:
		return fmt.Sprintf("$%d\r\n%s\r\n", len(v), v)
	case []any:
		var b strings.Builder
		fmt.Fprintf(&b, "*%d\r\n", len(v))
		for _, e := range v {
			b.WriteString(wire(e))
		}
		return b.String()
	case raw:
		return string(v)
	}
	panic(v)
}

type raw string

func TestReadings(t *testing.T) {
	one := []any{"1-0", []any{"name", "value", "name", "line\r\nbreak", "", "\x00\xff"}}
	two := []any{"2-0", []any{"k", "v"}}
	want := []Reading{
		{"a", []Entry{{"1-0", []string{"name", "value", "name", "line\r\nbreak", "", "\x00\xff"}}, {"2-0", []string{"k", "v"}}}},
		{"b", []Entry{{"1-0", []string{"name", "value", "name", "line\r\nbreak", "", "\x00\xff"}}}},
	}
	streams := []any{[]any{"a", []any{one, two}}, []any{"b", []any{one}}}
	for name, reply := range map[string]string{
		"RESP2": wire(streams),
		"RESP3": "%2\r\n" + wire("a") + wire([]any{one, two}) + wire("b") + wire([]any{one}),
	} {
		got, err := resp(reply).readings()
		require.NoError(t, err, name)
		require.Equal(t, want, got, name)
		for i := range reply {
			_, err := resp(reply[:i]).readings()
			require.Error(t, err, "%s, cut at %d: %q", name, i, reply[:i])
		}
	}
	for _, reply := range []string{"*-1\r\n", "_\r\n", "*0\r\n", "%0\r\n"} {
		got, err := resp(reply).readings()
		assert.NoError(t, err, reply)
		assert.Empty(t, got, reply)
	}
	_, err := resp("-NOGROUP No such key 'k'\r\n").readings()
	assert.True(t, GroupLost(err), err)
	for _, reply := range []string{
		"", "\r\n", ":1\r\n", "+OK\r\n", "*x\r\n", "*-2\r\n", "*1000000000\r\n", "$3\r\nabc\r\n",
		wire([]any{"a"}), wire([]any{[]any{"a"}}), wire([]any{[]any{"a", "b"}}),
		wire([]any{[]any{"a", []any{[]any{"1-0"}}}}),
		wire([]any{[]any{"a", []any{[]any{raw(":1\r\n"), []any{}}}}}),
		wire([]any{[]any{"a", []any{[]any{"1-0", []any{raw("$9999999999\r\n")}}}}}),
	} {
		_, err := resp(reply).readings()
		assert.ErrorIs(t, err, errReply, "%q", reply)
	}
}

// An entry that is kept must not keep the entries that were read with it in memory.
func TestReadingsOwnTheirIDs(t *testing.T) {
	reply := wire([]any{[]any{"a", []any{[]any{"1-0", []any{"k", strings.Repeat("x", 100)}}, []any{"2-0", []any{"k", "v"}}}}})
	got, err := resp(reply).readings()
	require.NoError(t, err)
	allocs := testing.AllocsPerRun(10, func() { _, _ = resp(reply).readings() })
	assert.LessOrEqual(t, allocs, 4.0, "the readings, the entries, their fields, their IDs")
	assert.Equal(t, "1-0", got[0].Entries[0].ID)
	assert.Equal(t, "2-0", got[0].Entries[1].ID)
}

// FuzzReadings: whatever the input, the parser neither panics nor takes much more
// memory than its size.
func FuzzReadings(f *testing.F) {
	f.Add(wire([]any{[]any{"a", []any{[]any{"1-0", []any{"k", "v"}}}}}))
	f.Add("%1\r\n$1\r\na\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nk\r\n$1\r\nv\r\n")
	f.Add("-ERR no\r\n")
	f.Add("*1\r\n*2\r\n$1\r\na\r\n*1\r\n*2\r\n$3\r\n1-0\r\n_\r\n")
	f.Fuzz(func(t *testing.T, reply string) {
		got, err := resp(reply).readings()
		if err != nil {
			return
		}
		size := 0
		for _, r := range got {
			for _, e := range r.Entries {
				size += len(e.ID)
				for _, field := range e.Fields {
					size += len(field)
				}
			}
		}
		if size > len(reply) {
			t.Fatalf("%d bytes out of %d", size, len(reply))
		}
	})
}

// A truncated reply must not precede the next one.
func TestReplyBuffer(t *testing.T) {
	var buf Buffer
	read := func(s string) {
		_, err := io.CopyN(&buf, strings.NewReader(s), int64(len(s)))
		require.NoError(t, err)
	}
	_, err := buf.Write([]byte("*1\r\n"))
	require.NoError(t, err)
	read("$3\r\nabc\r\n")
	assert.Equal(t, resp("*1\r\n$3\r\nabc\r\n"), buf.take())
	assert.Empty(t, buf.take())
	_, err = io.CopyN(&buf, strings.NewReader("short"), 100)
	assert.Error(t, err)
	read(strings.Repeat("x", 2*keepBuffer))
	assert.Len(t, buf.take(), len("short")+2*keepBuffer)
	assert.LessOrEqual(t, cap(buf.b), keepBuffer, "a buffer for rare large replies is not kept")
}

// A reply that was taken stays unchanged, whatever comes next and however large
// each is: a large buffer leaves with its reply.
func TestReplyBuffer_SmallAndLarge(t *testing.T) {
	var buf Buffer
	var want []string
	var got []resp
	for i, size := range []int{10, keepBuffer - 1, keepBuffer + 1, 10, 4 * keepBuffer, keepBuffer + 1, keepBuffer + 1, 1, 4 * keepBuffer} {
		reply := strings.Repeat(string(rune('a'+i)), size)
		want = append(want, reply)
		for rest := reply; rest != ""; { // in pieces, as its fields arrive
			n := min(len(rest), 100_000)
			_, err := io.CopyN(&buf, strings.NewReader(rest), int64(n))
			require.NoError(t, err)
			rest = rest[n:]
		}
		got = append(got, buf.take())
		assert.LessOrEqual(t, cap(buf.b), keepBuffer)
	}
	for i := range want {
		assert.True(t, want[i] == string(got[i]), "reply %d", i)
	}
}

func TestAfter(t *testing.T) {
	for id, want := range map[string]string{
		"0-0":                    "0-1",
		"1700000000000-9":        "1700000000000-10",
		"5-18446744073709551615": "6-0",
		"18446744073709551615-0": "18446744073709551615-1",
		"18446744073709551615-18446744073709551615": "(18446744073709551615-18446744073709551615",
	} {
		assert.Equal(t, want, After(id))
	}
}
