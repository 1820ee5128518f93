package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// safe returns s as one line that does nothing to a terminal but show: what cannot be printed
// is escaped as in Go. Nothing that Redis said is printed otherwise.
func safe(s string) string {
	printable := func(r rune) bool { return r != utf8.RuneError && strconv.IsPrint(r) }
	if strings.IndexFunc(s, func(r rune) bool { return !printable(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for i, size := 0, 0; i < len(s); i += size {
		var r rune
		if r, size = utf8.DecodeRuneInString(s[i:]); printable(r) {
			b.WriteRune(r)
			continue
		}
		quoted := strconv.Quote(s[i : i+size])
		b.WriteString(quoted[1 : len(quoted)-1])
	}
	return b.String()
}

// safeLines is safe, but for line ends.
func safeLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = safe(line)
	}
	return strings.Join(lines, "\n")
}

// short is safe, cut to a number of characters.
func short(s string, most int) string {
	if len(s) > 4*most+4 {
		s = s[:4*most+4] // more than enough of them
	}
	runes := []rune(safe(s))
	if len(runes) <= most {
		return string(runes)
	}
	return string(runes[:most-1]) + "…"
}

// block returns data for reading: JSON with line breaks, text as it is, anything else as a hex dump.
func block(data []byte) string {
	var text string
	switch {
	case !utf8.Valid(data):
		text = hex.Dump(data)
	case shallow(data) && json.Valid(data):
		var indented bytes.Buffer
		_ = json.Indent(&indented, data, "", "  ") // it is valid
		text = indented.String()
	default:
		text = string(data)
	}
	return "  " + strings.ReplaceAll(safeLines(strings.TrimSuffix(text, "\n")), "\n", "\n  ")
}

// shallow reports whether JSON is not nested so deeply that its indentation would be huge.
func shallow(data []byte) bool {
	depth := 0
	for _, c := range data {
		switch c {
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		}
		if depth > 50 {
			return false
		}
	}
	return true
}

// text is a string that somebody else has written. In JSON it is a string if it is UTF-8, and
// else an object {"base64": ".."}.
type text string

// MarshalJSON implements json.Marshaler.
func (t text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal(map[string]string{"base64": base64.StdEncoding.EncodeToString([]byte(t))})
}

// printJSON prints v on a line of its own. Package json leaves some of what a terminal obeys
// as it is; all of that stands in strings, where it can be escaped.
func (a *app) printJSON(v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var line []byte
	for _, r := range string(data) {
		switch {
		case strconv.IsPrint(r):
			line = utf8.AppendRune(line, r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			line = fmt.Appendf(line, `\u%04x\u%04x`, high, low)
		default:
			line = fmt.Appendf(line, `\u%04x`, r)
		}
	}
	_, err = a.out.Write(append(line, '\n'))
	return err
}

// table prints columns. It holds its rows until flush.
type table struct {
	*tabwriter.Writer
	titles []any
	rows   int
}

// newTable returns a table that begins with its titles when it has a row.
func newTable(w io.Writer, titles ...any) *table {
	return &table{Writer: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0), titles: titles}
}

// tablePage is how many rows are held at most. Columns may differ in width from page to page.
const tablePage = 500

func (t *table) row(cells ...any) error {
	if t.rows == 0 {
		t.line(t.titles)
	}
	t.line(cells)
	if t.rows++; t.rows%tablePage == 0 {
		return t.Flush()
	}
	return nil
}

func (t *table) line(cells []any) {
	format := strings.Repeat("\t%v", len(cells))[1:] + "\n"
	cells = slices.Clone(cells)
	for i, cell := range cells {
		if s, ok := cell.(string); ok {
			cells[i] = safe(s)
		}
	}
	_, _ = fmt.Fprintf(t, format, cells...) // its error is Flush's
}

// count is a number that may be unknown.
type count int64

const unknown count = -1

// String returns a dash for what is unknown.
func (c count) String() string {
	if c < 0 {
		return "-"
	}
	return strconv.FormatInt(int64(c), 10)
}

// MarshalJSON implements json.Marshaler: null for what is unknown.
func (c count) MarshalJSON() ([]byte, error) {
	if c < 0 {
		return []byte("null"), nil
	}
	return strconv.AppendInt(nil, int64(c), 10), nil
}

// ago returns a duration with one unit: "5s", "12m", "3h", "4d".
func ago(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
