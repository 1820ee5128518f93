package xstream

import (
	"fmt"
	"strconv"
	"time"
)

// answer reads the values of a reply that go-redis has parsed, one after the other. A value
// that is missing, or of another type, is an error; then the rest is empty. nil is the zero value.
type answer struct {
	rest []any
	err  *error // of the whole reply
}

func read(v any, err error) *answer {
	rest, ok := v.([]any)
	if !ok && err == nil {
		err = errReply
	}
	return &answer{rest, &err}
}

// failed returns the first error. (As a call, it comes after those before it in an expression.)
func (a *answer) failed() error { return *a.err }

func (a *answer) more() bool { return *a.err == nil && len(a.rest) > 0 }

func next[T any](a *answer) (v T) {
	ok := a.more()
	if ok {
		v, ok = a.rest[0].(T)
		ok = ok || a.rest[0] == nil
		a.rest = a.rest[1:]
	}
	if !ok && *a.err == nil {
		*a.err = errReply
	}
	return v
}

func (a *answer) text() string          { return next[string](a) }
func (a *answer) number() int64         { return next[int64](a) }
func (a *answer) millis() time.Duration { return time.Duration(a.number()) * time.Millisecond }
func (a *answer) list() *answer         { return &answer{next[[]any](a), a.err} }

// score reads a time in milliseconds, as a sorted set has it.
func (a *answer) score() time.Time { return a.timeOf(a.text()) }

func (a *answer) timeOf(score string) time.Time {
	ms, err := strconv.ParseFloat(score, 64)
	if err != nil && *a.err == nil {
		*a.err = errReply
	}
	return time.UnixMilli(int64(ms))
}

func (a *answer) entry() Entry {
	row := a.list()
	e := Entry{ID: row.text()}
	fields := row.list()
	e.Fields = make([]string, 0, len(fields.rest))
	for fields.more() {
		e.Fields = append(e.Fields, fields.text())
	}
	return e
}

// texts returns a list of strings as a set.
func (a *answer) texts() map[string]bool {
	set := make(map[string]bool, len(a.rest))
	for a.more() {
		set[a.text()] = true
	}
	return set
}

func entriesOf(v any, err error) ([]Entry, error) {
	rows := read(v, err)
	entries := make([]Entry, 0, len(rows.rest))
	for rows.more() {
		entries = append(entries, rows.entry())
	}
	return entries, rows.failed()
}

// table returns a reply that is a map (RESP3), or a flat list of names and values (RESP2).
func table(v any) map[string]any {
	t := make(map[string]any)
	fields, _ := v.(map[any]any)
	for name, value := range fields {
		t[fmt.Sprint(name)] = value
	}
	for row := read(v, nil); row.more(); {
		t[row.text()] = next[any](row)
	}
	return t
}
