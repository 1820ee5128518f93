package model

import (
	"bufio"
	"errors"
	"io"
	"strconv"
)

// A reply is a string (a bulk string), status, Error, int64, nil, nullArray, []any, flatMap, entries, readings, double or scores.
type (
	// Error is a server's error, with its code.
	Error  string
	status string

	nullArray struct{}

	// flatMap is keys and values in turn: a map in RESP3, an array in RESP2.
	flatMap []any

	entries []item[entry]

	// readings are a map from keys to entries in RESP3, pairs in RESP2.
	readings []reading

	// double is a number: of its own type in RESP3, a bulk string in RESP2.
	double string

	// scores are pairs in RESP3, members and scores in turn in RESP2.
	scores      []memberScore
	memberScore struct {
		member string
		score  double
	}
	reading struct {
		key     string
		entries entries
	}
)

func (e Error) Error() string { return string(e) }

// plain turns a reply into what RESP2 has: strings, int64, nil, []any and Error.
func plain(v any) any {
	switch v := v.(type) {
	case status:
		return string(v)
	case nullArray:
		return nil
	case double:
		return string(v)
	case scores:
		out := make([]any, 0, 2*len(v))
		for _, m := range v {
			out = append(out, m.member, string(m.score))
		}
		return out
	case flatMap:
		return plain([]any(v))
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = plain(v[i])
		}
		return out
	case entries:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = []any{e.id.String(), plainFields(e.value.fields)}
		}
		return out
	case readings:
		out := make([]any, len(v))
		for i, r := range v {
			out[i] = []any{r.key, plain(r.entries)}
		}
		return out
	}
	return v
}

func plainFields(fields []string) any {
	if fields == nil {
		return nil
	}
	out := make([]any, len(fields))
	for i, f := range fields {
		out[i] = f
	}
	return out
}

func appendHead(b []byte, kind byte, n int) []byte {
	b = strconv.AppendInt(append(b, kind), int64(n), 10)
	return append(b, "\r\n"...)
}

func appendBulk(b []byte, s string) []byte {
	b = append(appendHead(b, '$', len(s)), s...)
	return append(b, "\r\n"...)
}

func appendMissing(b []byte, proto int, resp2 string) []byte {
	if proto == 3 {
		return append(b, "_\r\n"...)
	}
	return append(b, resp2...)
}

func appendMapHead(b []byte, proto, pairs, resp2 int) []byte {
	if proto == 3 {
		return appendHead(b, '%', pairs)
	}
	return appendHead(b, '*', resp2)
}

func appendReply(b []byte, proto int, v any) []byte {
	switch v := v.(type) {
	case string:
		return appendBulk(b, v)
	case status:
		return append(append(append(b, '+'), v...), "\r\n"...)
	case Error:
		return append(append(append(b, '-'), v...), "\r\n"...)
	case int64:
		return appendHead(b, ':', int(v))
	case double:
		if proto == 3 {
			return append(append(append(b, ','), v...), "\r\n"...)
		}
		return appendBulk(b, string(v))
	case scores:
		if proto != 3 {
			return appendReply(b, proto, plain(v))
		}
		b = appendHead(b, '*', len(v))
		for _, m := range v {
			b = appendReply(b, proto, []any{m.member, m.score})
		}
	case nil:
		return appendMissing(b, proto, "$-1\r\n")
	case nullArray:
		return appendMissing(b, proto, "*-1\r\n")
	case []any:
		b = appendHead(b, '*', len(v))
		for _, e := range v {
			b = appendReply(b, proto, e)
		}
	case flatMap:
		b = appendMapHead(b, proto, len(v)/2, len(v))
		for _, e := range v {
			b = appendReply(b, proto, e)
		}
	case entries:
		b = appendHead(b, '*', len(v))
		for _, e := range v {
			b = appendEntry(b, proto, e)
		}
	case readings:
		b = appendMapHead(b, proto, len(v), len(v))
		for _, r := range v {
			if proto == 2 {
				b = appendHead(b, '*', 2)
			}
			b = appendReply(appendBulk(b, r.key), proto, r.entries)
		}
	default:
		panic("model: a reply of an unknown type")
	}
	return b
}

func appendEntry(b []byte, proto int, e item[entry]) []byte {
	b = appendBulk(appendHead(b, '*', 2), e.id.String())
	if e.value.fields == nil {
		return appendMissing(b, proto, "*-1\r\n")
	}
	b = appendHead(b, '*', len(e.value.fields))
	for _, f := range e.value.fields {
		b = appendBulk(b, f)
	}
	return b
}

var errProtocol = errors.New("model: a command is an array of bulk strings")

// readCommand reads one command.
func readCommand(r *bufio.Reader) ([]string, error) {
	n, err := readHead(r, '*')
	if err != nil {
		return nil, err
	}
	args := make([]string, n)
	for i := range args {
		size, err := readHead(r, '$')
		if err != nil {
			return nil, err
		}
		b := make([]byte, size+2)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		args[i] = string(b[:size])
	}
	return args, nil
}

func readHead(r *bufio.Reader, kind byte) (int, error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return 0, err
	}
	if len(line) < 4 || line[0] != kind {
		return 0, errProtocol
	}
	n, err := strconv.Atoi(string(line[1 : len(line)-2]))
	if err != nil || n < 0 {
		return 0, errProtocol
	}
	return n, nil
}
