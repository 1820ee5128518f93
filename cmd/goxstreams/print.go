package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
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

// UnmarshalJSON is MarshalJSON's inverse. It refuses what would become other text: halves of a
// UTF-16 pair, which package json replaces.
func (t *text) UnmarshalJSON(data []byte) error {
	var plain *string
	if json.Unmarshal(data, &plain) == nil && plain != nil {
		if strings.Count(*plain, "\ufffd") != replacements(data) {
			return errors.New("half of a UTF-16 pair")
		}
		*t = text(*plain)
		return nil
	}
	var binary struct {
		Base64 *string `json:"base64"`
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if decoder.Decode(&binary) != nil || binary.Base64 == nil {
		return errors.New(`want a string, or {"base64": ".."}`)
	}
	raw, err := base64.StdEncoding.DecodeString(*binary.Base64)
	*t = text(raw)
	return err
}

// replacements returns how often a JSON string has U+FFFD, as it is or as \ufffd.
func replacements(data []byte) int {
	n := bytes.Count(data, []byte("\ufffd"))
	for i := 0; i < len(data); i++ {
		if data[i] == '\\' {
			i++ // what it escapes is no backslash
			if len(data) >= i+5 && strings.EqualFold(string(data[i:i+5]), "ufffd") {
				n++
			}
		}
	}
	return n
}

// jsonLine returns v as JSON. Package json leaves some of what a terminal obeys as it is; all of
// that stands in strings, where it can be escaped.
func jsonLine(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, err
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
	return line, nil
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
