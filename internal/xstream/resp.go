package xstream

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Reads are the bulk of the traffic, and go-redis's own parser allocates an
// interface and a string for each name, value and list: 17 allocations per message,
// two thirds of all. So reads receive the raw reply, and parse it here: the strings
// are parts of the reply.

// Buffer receives the raw reply to a read (redis.RawWriteToCmd), and is reused for
// the next one. go-redis's RawCmd starts with an empty buffer each time, and grows
// it step by step to five times the necessary size.
type Buffer struct {
	b     []byte
	small []byte // the buffer to reuse, while b is a larger one
	large int    // the size of the last large reply
}

// maxLarge is the maximum size allocated in advance.
const maxLarge = 2 << 20

// keepBuffer is the maximum size of an idle buffer.
const keepBuffer = 256 << 10

// grow makes room for n more bytes; for a large reply, as much at once as the last
// large one needed.
func (r *Buffer) grow(n int) {
	need := len(r.b) + n
	if need <= keepBuffer || cap(r.b) > keepBuffer {
		r.b = slices.Grow(r.b, n)
		return
	}
	r.small = r.b
	r.b = append(make([]byte, 0, max(need, min(r.large, maxLarge))), r.b...)
}

func (r *Buffer) Write(p []byte) (int, error) {
	r.grow(len(p))
	r.b = append(r.b, p...)
	return len(p), nil
}

// ReadFrom is called by io.CopyN for each string.
func (r *Buffer) ReadFrom(src io.Reader) (int64, error) {
	limited, ok := src.(*io.LimitedReader)
	if !ok {
		return 0, fmt.Errorf("goxstreams: a reply comes from a %T", src)
	}
	n, size := int(limited.N), len(r.b)
	r.grow(n)
	r.b = r.b[:size+n]
	read, err := io.ReadFull(limited.R, r.b[size:])
	r.b = r.b[:size+read]
	limited.N -= int64(read)
	return int64(read), err
}

// take returns the reply and empties the buffer.
func (r *Buffer) take() resp {
	if cap(r.b) <= keepBuffer {
		reply := resp(r.b)
		r.b = r.b[:0]
		return reply
	}
	// Copying a large buffer would cost more than everything else: give it away.
	reply := resp(unsafe.String(unsafe.SliceData(r.b), len(r.b)))
	if len(r.b) < cap(r.b)/2 {
		reply = resp(strings.Clone(string(reply))) // do not keep unused capacity
	}
	r.large = len(r.b)
	r.b, r.small = r.small[:0], nil
	return reply
}

// resp is the unparsed rest of a reply.
type resp string

var errReply = errors.New("goxstreams: unexpected reply")

// head cuts the start of a value off: its type, and its length or text. A null
// value has the length -1.
func (r *resp) head() (kind byte, n int, text string, err error) {
	text, rest, ok := strings.Cut(string(*r), "\r\n")
	if !ok || text == "" {
		return 0, 0, "", fmt.Errorf("%w: it ends too early", errReply)
	}
	*r = resp(rest)
	kind, text = text[0], text[1:]
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
	inMap := strings.HasPrefix(string(r), "%")
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
		if all[i].Entries, err = r.entries(); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// entries cuts a list of entries off: [[id, [name, value, ...]], ...].
func (r *resp) entries() ([]Entry, error) {
	size := len(*r)
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
		return own(entries, -1), nil
	}
	return own(entries, smallString), nil
}

const (
	// Strings up to smallString bytes are copied out of a reply, unless the reply
	// is smaller than smallReply.
	smallString = 512
	smallReply  = 32 << 10
)

// own moves the IDs, and in large replies all small strings, to a string of their
// own: an ID, a UUID and metadata are kept while a message is in flight, and must
// not keep the payloads of a hundred others in memory.
func own(entries []Entry, small int) []Entry {
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
