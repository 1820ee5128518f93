package goxstreams

// The part of MessagePack that this library needs, instead of a dependency: maps
// and arrays of strings. Decoding uses no reflection and copies nothing: the
// decoded strings are parts of the input, so a length in the input never causes an
// allocation.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/ThreeDotsLabs/watermill/message"
)

// packMetadata encodes metadata as watermill-redisstream does, byte for byte; nil
// if there is none.
func packMetadata(metadata message.Metadata) []byte {
	if len(metadata) == 0 {
		return nil
	}
	size := 5
	keys := make([]string, 0, len(metadata))
	for key, value := range metadata {
		size += 10 + len(key) + len(value)
		keys = append(keys, key)
	}
	slices.Sort(keys)
	packed := appendCount(make([]byte, 0, size), fixMap, map16, len(metadata))
	for _, key := range keys {
		packed = appendString(packed, key)
		packed = appendString(packed, metadata[key])
	}
	return packed
}

// packPair returns one key and its value as packMetadata encodes them.
func packPair(key, value string) string {
	return string(appendString(appendString(nil, key), value))
}

// unpackMetadata adds the packed entries to metadata. Like watermill-redisstream, it
// ignores bytes that follow the map.
func unpackMetadata(packed string, metadata message.Metadata) error {
	if packed == "" {
		return nil
	}
	n, rest, err := mapForm.cut(packed)
	if err != nil {
		return fmt.Errorf("MessagePack map: %w", err)
	}
	var key, value string
	for range n {
		if key, rest, err = cutString(rest); err != nil {
			return fmt.Errorf("key at byte %d of the MessagePack map: %w", len(packed)-len(rest), err)
		}
		if value, rest, err = cutString(rest); err != nil {
			return fmt.Errorf("value at byte %d of the MessagePack map: %w", len(packed)-len(rest), err)
		}
		metadata[key] = value
	}
	return nil
}

// packFields encodes an entry's raw fields for a dead letter: see UnpackFields.
func packFields(fields []string) string {
	size := 5
	for _, s := range fields {
		size += 5 + len(s)
	}
	packed := appendCount(make([]byte, 0, size), fixArray, array16, len(fields))
	for _, s := range fields {
		packed = appendString(packed, s)
	}
	return string(packed)
}

// UnpackFields decodes the original fields of a dead letter from a MessagePack
// array of strings: name, value, name, value, ..., in the entry's order, including
// duplicate names and binary values. It returns an error for an odd number of
// strings, and for bytes that follow the array.
func UnpackFields(packed []byte) ([]string, error) {
	s := string(packed)
	n, rest, err := arrayForm.cut(s)
	if err != nil {
		return nil, fmt.Errorf("goxstreams: unpack fields: MessagePack array: %w", err)
	}
	if n%2 != 0 {
		return nil, fmt.Errorf("goxstreams: unpack fields: %d names and values, an odd number", n)
	}
	if uint64(n) > uint64(len(rest)) { // each takes at least one byte
		return nil, fmt.Errorf("goxstreams: unpack fields: %d names and values in %d bytes: %w", n, len(rest), errTruncated)
	}
	var fields []string
	if n > 0 {
		fields = make([]string, 0, n)
	}
	var field string
	for range n {
		if field, rest, err = cutString(rest); err != nil {
			return nil, fmt.Errorf("goxstreams: unpack fields: string at byte %d: %w", len(s)-len(rest), err)
		}
		fields = append(fields, field)
	}
	if rest != "" {
		return nil, fmt.Errorf("goxstreams: unpack fields: %d bytes follow the array", len(rest))
	}
	return fields, nil
}

// First bytes of MessagePack values. The code of each form with a 4-byte length
// follows the one with a 2-byte length.
const (
	fixMap, fixArray, fixStr = 0x80, 0x90, 0xa0 // with the length in the low bits
	nilValue                 = 0xc0
	bin8, bin16, bin32       = 0xc4, 0xc5, 0xc6
	str8, str16, str32       = 0xd9, 0xda, 0xdb
	array16, array32         = 0xdc, 0xdd
	map16, map32             = 0xde, 0xdf
)

// appendCount starts a map or an array of n elements.
func appendCount(b []byte, fix, code16 byte, n int) []byte {
	if n < 16 {
		return append(b, fix|byte(n))
	}
	return appendLen(b, code16, n)
}

func appendString(b []byte, s string) []byte {
	switch n := len(s); {
	case n < 32:
		b = append(b, fixStr|byte(n))
	case n < 1<<8:
		b = append(b, str8, byte(n))
	default:
		b = appendLen(b, str16, n)
	}
	return append(b, s...)
}

// appendLen assumes that n is below 4 GiB: Redis accepts no value above 512 MiB.
func appendLen(b []byte, code16 byte, n int) []byte {
	if n < 1<<16 {
		return binary.BigEndian.AppendUint16(append(b, code16), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(b, code16+1), uint32(n))
}

var errTruncated = errors.New("truncated")

// form is how values of one type begin: with fix and the length in the bits of mask, or with
// one of the codes, and a length of as many bytes.
type form struct {
	name      string
	fix, mask byte
	codes     map[byte]int
}

// A string may also be written as binary.
var (
	mapForm    = form{"it", fixMap, 0x0f, map[byte]int{map16: 2, map32: 4}}
	arrayForm  = form{"it", fixArray, 0x0f, map[byte]int{array16: 2, array32: 4}}
	stringForm = form{"a string", fixStr, 0x1f, map[byte]int{str8: 1, bin8: 1, str16: 2, bin16: 2, str32: 4, bin32: 4}}
)

// cut cuts the start of a value off s. Nil is an empty one.
func (f *form) cut(s string) (n uint32, rest string, err error) {
	if s == "" {
		return 0, s, errTruncated
	}
	code := s[0]
	if code&^f.mask == f.fix {
		return uint32(code & f.mask), s[1:], nil
	}
	if code == nilValue {
		return 0, s[1:], nil
	}
	size, ok := f.codes[code]
	if !ok {
		return 0, s, fmt.Errorf("%s cannot begin with byte 0x%02x", f.name, code)
	}
	if len(s) < 1+size {
		return 0, s, errTruncated
	}
	for i := range size {
		n = n<<8 | uint32(s[1+i])
	}
	return n, s[1+size:], nil
}

// cutString cuts a string off s, in any form that a writer may have chosen: text,
// binary, or nil for an empty one. After an error, rest starts at that string.
func cutString(s string) (value, rest string, err error) {
	n, rest, err := stringForm.cut(s)
	if err != nil {
		return "", s, err
	}
	if uint64(n) > uint64(len(rest)) {
		return "", s, errTruncated
	}
	return rest[:n], rest[n:], nil
}
