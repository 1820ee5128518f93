package xstream

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/redis/go-redis/v9"
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

func parsed(reply string) ([]Reading, error) { return (&resp{rest: reply}).readings() }

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
		got, err := parsed(reply)
		require.NoError(t, err, name)
		require.Equal(t, want, got, name)
		for i := range reply {
			_, err := parsed(reply[:i])
			require.Error(t, err, "%s, cut at %d: %q", name, i, reply[:i])
		}
	}
	for _, reply := range []string{"*-1\r\n", "_\r\n", "*0\r\n", "%0\r\n"} {
		got, err := parsed(reply)
		assert.NoError(t, err, reply)
		assert.Empty(t, got, reply)
	}
	_, err := parsed("-NOGROUP No such key 'k'\r\n")
	assert.True(t, GroupLost(err), err)
	for _, reply := range []string{
		"", "\r\n", ":1\r\n", "+OK\r\n", "*x\r\n", "*-2\r\n", "*1000000000\r\n", "$3\r\nabc\r\n",
		wire([]any{"a"}), wire([]any{[]any{"a"}}), wire([]any{[]any{"a", "b"}}),
		wire([]any{[]any{"a", []any{[]any{"1-0"}}}}),
		wire([]any{[]any{"a", []any{[]any{raw(":1\r\n"), []any{}}}}}),
		wire([]any{[]any{"a", []any{[]any{"1-0", []any{raw("$9999999999\r\n")}}}}}),
	} {
		_, err := parsed(reply)
		assert.ErrorIs(t, err, errReply, "%q", reply)
	}
}

// After an error nothing more is looked at: a list that announces many elements would cost a search
// of the rest of the reply for each.
func TestReadings_EndAtTheFirstError(t *testing.T) {
	r := &resp{rest: "*1\r\n*2\r\n$3\r\n1-0\r\n*1000\r\n:1\r\n" + strings.Repeat("x", 5000)}
	entries := r.entries(0)
	require.ErrorIs(t, r.err, errReply)
	require.Len(t, entries, 1)
	require.Len(t, entries[0].Fields, 1)
	require.Len(t, r.rest, 5000)
}

// An entry that is kept must not keep the entries that were read with it in memory.
func TestReadingsOwnTheirIDs(t *testing.T) {
	reply := wire([]any{[]any{"a", []any{[]any{"1-0", []any{"k", strings.Repeat("x", 100)}}, []any{"2-0", []any{"k", "v"}}}}})
	got, err := parsed(reply)
	require.NoError(t, err)
	allocs := testing.AllocsPerRun(10, func() { _, _ = parsed(reply) })
	assert.LessOrEqual(t, allocs, 4.0, "the readings, the entries, their fields, their IDs")
	assert.Equal(t, "1-0", got[0].Entries[0].ID)
	assert.Equal(t, "2-0", got[0].Entries[1].ID)
}

// The strings of a large reply are copied only if that lets most of it go.
func TestReadingsOwnSmallStrings(t *testing.T) {
	for payload, copied := range map[int]bool{100: false, 10_000: true} {
		var entries []any
		for i := range 400 {
			entries = append(entries, []any{fmt.Sprintf("%d-0", i+1), []any{"uuid", strings.Repeat("u", 36), "payload", strings.Repeat("x", payload)}})
		}
		reply := wire([]any{[]any{"a", entries}})
		got, err := parsed(reply)
		require.NoError(t, err)
		require.Len(t, got[0].Entries, 400)
		first, last := uintptr(unsafe.Pointer(unsafe.StringData(reply))), uintptr(len(reply))
		for _, e := range got[0].Entries {
			for i, s := range append([]string{e.ID}, e.Fields...) {
				at := uintptr(unsafe.Pointer(unsafe.StringData(s)))
				large := i == 4 && payload > smallString
				require.Equal(t, copied && !large, at < first || at >= first+last, "%d bytes, string %d", payload, i)
			}
		}
	}
}

// Whatever the sizes of the replies before, a read returns what the stream has; a second
// read of large entries allocates no multiple of them; and what it returns keeps no buffer
// of a larger reply in memory.
func TestReplies(t *testing.T) {
	client, s, _ := newStream(t, 0)
	var replies Replies
	for i, size := range []int{10, 100_000, 100_000, 1 << 20, 3_000, 10, 70_000, 0, 70_000} {
		const n = 16
		payload := strings.Repeat(string(rune('a'+i)), size)
		for range min(n, n*size) {
			require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: s.Key, Values: []string{"payload", payload}}).Err())
		}
		read := Read{Group: s.Group, Consumer: s.Consumer, From: []Cursor{{s.Key, ">"}}, Count: n, Block: -1}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got, err := read.Do(t.Context(), client, &replies)
		runtime.ReadMemStats(&after)
		require.NoError(t, err)
		if size == 0 {
			require.Empty(t, got)
			continue
		}
		require.Len(t, got[0].Entries, n)
		for _, e := range got[0].Entries {
			require.True(t, e.Fields[1] == payload, "read %d", i)
		}
		if i == 2 || i == 8 { // as large as the one before, which had entries
			assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(3*n*size/2), "read %d", i)
		}
	}
	small, err := replies.receive(t.Context(), client, []any{"echo", "x"})
	require.NoError(t, err)
	require.Equal(t, "$1\r\nx\r\n", string(small))
	require.Less(t, cap(small), 100)
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
