package xstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unsafe"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Reads are the bulk of the traffic, and go-redis's own parser allocates an
// interface and a string for each name, value and list: 17 allocations per message,
// two thirds of all. So reads receive the raw reply, and parse it here: the strings
// are parts of the reply.

// Replies knows the replies of a connection, for the sake of the next one. go-redis has two
// ways to receive one raw. RawCmd grows its buffer step by step, and so allocates about five
// times the reply. RawWriteToCmd takes our buffer, but allocates for each string. The former
// is better for small entries, and by far the worse for large ones.
type Replies struct{ large int } // the size of the last one; 0: its entries were small

const (
	// largeEntry is the average size from which entries are large: there both ways are
	// about as fast.
	largeEntry = 2 << 10
	// maxBuffer is the maximum size that is allocated in advance.
	maxBuffer = 2 << 20
)

// receive runs a command and returns its reply.
func (r *Replies) receive(ctx context.Context, p redisx.Processor, args []any) ([]byte, error) {
	if r.large == 0 {
		cmd := redisx.NewOnceRaw(ctx, args...)
		if err := p.Process(ctx, cmd); err != nil {
			return nil, err // cmd may still be in flight
		}
		return cmd.Val(), nil
	}
	reply := &rawReply{expected: min(r.large+r.large/8, maxBuffer)}
	if err := p.Process(ctx, redis.NewRawWriteToCmd(ctx, reply, args...)); err != nil {
		return nil, err
	}
	if len(reply.b) < cap(reply.b)/2 {
		return bytes.Clone(reply.b), nil // its entries would keep the unused capacity in memory
	}
	return reply.b, nil
}

// rawReply receives a reply. It is made for io.CopyN, by which go-redis passes strings on: a
// bytes.Buffer would grow to make room for more.
type rawReply struct {
	b        []byte
	expected int // the reply's size
}

func (r *rawReply) Write(p []byte) (int, error) {
	r.b = append(r.b, p...)
	return len(p), nil
}

// ReadFrom reads what a reader is limited to.
func (r *rawReply) ReadFrom(from io.Reader) (int64, error) {
	limited, ok := from.(*io.LimitedReader)
	if !ok { // another version of go-redis
		all, err := io.ReadAll(from)
		r.b = append(r.b, all...)
		return int64(len(all)), err
	}
	have, n := len(r.b), int(limited.N)
	if cap(r.b)-have < n {
		r.b = append(make([]byte, 0, max(r.expected, have+n, 2*cap(r.b))), r.b...)
	}
	got, err := io.ReadFull(limited.R, r.b[have:have+n])
	r.b = r.b[:have+got]
	limited.N -= int64(got)
	return int64(got), err
}

// note notes the size of a reply, unless it has no entries.
func (r *Replies) note(size int, readings []Reading) {
	entries := 0
	for _, reading := range readings {
		entries += len(reading.Entries)
	}
	switch {
	case entries == 0:
	case size < largeEntry*entries:
		r.large = 0
	default:
		r.large = size
	}
}

// resp is the unparsed rest of a reply. After an error, all values are zero.
type resp struct {
	rest string
	err  error // the first one
}

// unparsed returns the reply without a copy: it must not change later.
func unparsed(reply []byte) *resp {
	return &resp{rest: unsafe.String(unsafe.SliceData(reply), len(reply))}
}

var errReply = errors.New("goxstreams: unexpected reply")

func (r *resp) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s", errReply, fmt.Sprintf(format, args...))
	}
}

// head cuts the start of a value off: its type, and its length or text. A null
// value has the length -1. If the value is an error, that is the parser's.
func (r *resp) head() (kind byte, n int, text string) {
	if r.err != nil {
		return 0, 0, ""
	}
	end := strings.IndexByte(r.rest, '\r') // no line contains another one
	if end < 1 || len(r.rest) < end+2 {
		r.fail("it ends too early")
		return 0, 0, ""
	}
	kind, text = r.rest[0], r.rest[1:end]
	r.rest = r.rest[end+2:]
	switch kind {
	case '*', '%', '$', '=', '~':
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < -1 {
			r.fail("a length expected") // without the text, which may be part of a payload
		} else if n > len(r.rest) { // each element takes at least one byte
			r.fail("it ends too early")
		}
	case '_':
		n = -1
	case '-':
		r.err = redisx.ReplyError(text)
	}
	return kind, n, text
}

// list cuts the start of a list off, and returns its number of elements; for a map,
// twice the number of its keys; 0 for null.
func (r *resp) list() int {
	kind, n, _ := r.head()
	switch {
	case r.err != nil, n < 0:
		return 0
	case kind == '%':
		return 2 * n
	case kind != '*' && kind != '~':
		r.fail("a list expected, have %q", kind)
	}
	return n
}

// pair cuts the start of a list of two elements off.
func (r *resp) pair(elements string) {
	if r.list() != 2 {
		r.fail("%s expected", elements)
	}
}

// bulk cuts a string off.
func (r *resp) bulk() string {
	kind, n, text := r.head()
	switch {
	case r.err != nil, n < 0: // null, in RESP2 or RESP3
		return ""
	case kind == '+':
		return text
	case kind != '$':
		r.fail("a string expected, have %q", kind)
		return ""
	case len(r.rest) < n+2:
		r.fail("it ends too early")
		return ""
	}
	s := r.rest[:n]
	r.rest = r.rest[n+2:]
	return s
}

// readings parses the reply to XREAD or XREADGROUP: [[stream, entries], ...], or a
// map in RESP3.
func (r *resp) readings() ([]Reading, error) {
	inMap, whole := strings.HasPrefix(r.rest, "%"), len(r.rest)
	n := r.list()
	if inMap {
		n /= 2
	}
	all := make([]Reading, n)
	for i := range all {
		if !inMap {
			r.pair("a stream and its entries")
		}
		all[i] = Reading{r.bulk(), r.entries(whole)}
		if r.err != nil {
			return nil, r.err
		}
	}
	return all, r.err
}

// entries cuts a list of entries off: [[id, [name, value, ...]], ...]. The size is the
// reply's.
func (r *resp) entries(size int) []Entry {
	n := r.list()
	entries := make([]Entry, 0, n)
	var fields []string // backing array for several entries
	for i := 0; i < n && r.err == nil; i++ {
		r.pair("an entry's ID and fields")
		id, k := r.bulk(), r.list()
		if cap(fields)-len(fields) < k {
			fields = make([]string, 0, min(k*(n-i), max(k, 1024)))
		}
		from := len(fields)
		for j := 0; j < k && r.err == nil; j++ {
			fields = append(fields, r.bulk())
		}
		entries = append(entries, Entry{id, fields[from:len(fields):len(fields)]})
	}
	if size < smallReply {
		return own(entries, -1, size)
	}
	return own(entries, smallString, size)
}

const (
	// Strings up to smallString bytes are copied out of a reply, unless the reply
	// is smaller than smallReply.
	smallString = 512
	smallReply  = 32 << 10
)

// own moves the IDs, and in large replies all small strings, to a string of their
// own: an ID, a UUID and metadata are kept while a message is in flight, and must
// not keep the payloads of a hundred others in memory. If that is most of the reply,
// nothing is gained.
func own(entries []Entry, small, reply int) []Entry {
	size := 0
	each := func(do func(s *string)) {
		for i := range entries {
			do(&entries[i].ID)
			for j := range entries[i].Fields {
				if f := &entries[i].Fields[j]; len(*f) <= small {
					do(f)
				}
			}
		}
	}
	each(func(s *string) { size += len(*s) })
	if size > reply/2 {
		return entries
	}
	var b strings.Builder
	b.Grow(size)
	each(func(s *string) { b.WriteString(*s) })
	rest := b.String()
	each(func(s *string) { n := len(*s); *s, rest = rest[:n], rest[n:] })
	return entries
}
