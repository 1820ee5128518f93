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

// unparsed returns the reply without a copy: it must not change later.
func unparsed(reply []byte) resp { return resp(unsafe.String(unsafe.SliceData(reply), len(reply))) }

// resp is the unparsed rest of a reply.
type resp string

var errReply = errors.New("goxstreams: unexpected reply")

// head cuts the start of a value off: its type, and its length or text. A null
// value has the length -1.
func (r *resp) head() (kind byte, n int, text string, err error) {
	end := strings.IndexByte(string(*r), '\r') // no line contains another one
	if end < 1 || len(*r) < end+2 {
		return 0, 0, "", fmt.Errorf("%w: it ends too early", errReply)
	}
	kind, text = (*r)[0], string((*r)[1:end])
	rest := (*r)[end+2:]
	*r = rest
	switch kind {
	case '*', '%', '$', '=', '~':
		if n, err = strconv.Atoi(text); err != nil || n < -1 {
			return 0, 0, "", fmt.Errorf("%w: a length expected", errReply) // without the text, which may be part of a payload
		}
		if n > len(rest) { // each element takes at least one byte
			return 0, 0, "", fmt.Errorf("%w: it ends too early", errReply)
		}
	case '_':
		n = -1
	}
	return kind, n, text, nil
}

// list cuts the start of a list off, and returns its number of elements; for a map,
// twice the number of its keys; 0 for null.
func (r *resp) list() (int, error) {
	kind, n, text, err := r.head()
	switch {
	case err != nil:
		return 0, err
	case n < 0:
		return 0, nil
	case kind == '*', kind == '~':
		return n, nil
	case kind == '%':
		return 2 * n, nil
	case kind == '-':
		return 0, redisx.ReplyError(text)
	}
	return 0, fmt.Errorf("%w: a list expected, have %q", errReply, kind)
}

// bulk cuts a string off. If the value is an error, it returns that as an error.
func (r *resp) bulk() (string, error) {
	kind, n, text, err := r.head()
	switch {
	case err != nil:
		return "", err
	case kind == '+':
		return text, nil
	case kind == '-':
		return "", redisx.ReplyError(text)
	case n < 0: // null, in RESP2 or RESP3
		return "", nil
	case kind != '$':
		return "", fmt.Errorf("%w: a string expected, have %q", errReply, kind)
	case len(*r) < n+2:
		return "", fmt.Errorf("%w: it ends too early", errReply)
	}
	s := string((*r)[:n])
	*r = (*r)[n+2:]
	return s, nil
}

// readings parses the reply to XREAD or XREADGROUP: [[stream, entries], ...], or a
// map in RESP3. It returns an error reply as an error.
func (r resp) readings() ([]Reading, error) {
	inMap, whole := strings.HasPrefix(string(r), "%"), len(r)
	n, err := r.list()
	if err != nil || n == 0 {
		return nil, err
	}
	if inMap {
		n /= 2
	}
	all := make([]Reading, n)
	for i := range all {
		if !inMap {
			if pair, err := r.list(); err != nil || pair != 2 {
				return nil, malformed(err, "a stream and its entries expected")
			}
		}
		if all[i].Key, err = r.bulk(); err != nil {
			return nil, err
		}
		if all[i].Entries, err = r.entries(whole); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// entries cuts a list of entries off: [[id, [name, value, ...]], ...]. The size is the
// reply's.
func (r *resp) entries(size int) ([]Entry, error) {
	n, err := r.list()
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, 0, n)
	var fields []string // backing array for several entries
	for i := range n {
		if pair, err := r.list(); err != nil || pair != 2 {
			return nil, malformed(err, "an entry's ID and fields expected")
		}
		id, err := r.bulk()
		if err != nil {
			return nil, err
		}
		k, err := r.list()
		if err != nil {
			return nil, err
		}
		if cap(fields)-len(fields) < k {
			fields = make([]string, 0, min(k*(n-i), max(k, 1024)))
		}
		from := len(fields)
		for range k {
			s, err := r.bulk()
			if err != nil {
				return nil, err
			}
			fields = append(fields, s)
		}
		entries = append(entries, Entry{id, fields[from:len(fields):len(fields)]})
	}
	if size < smallReply {
		return own(entries, -1, size), nil
	}
	return own(entries, smallString, size), nil
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

func malformed(err error, expected string) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: %s", errReply, expected)
}
