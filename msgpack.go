package goxstreams

// The little of MessagePack that we need, in the place of a dependency: maps
// and arrays of strings. Decoding goes without reflection and without a copy:
// the strings are parts of the one they are read from, so that no length it
// states is ever allocated.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/ThreeDotsLabs/watermill/message"
)

// packMetadata encodes metadata as watermill-redisstream does, in the same byte
// forms; nil if there is none.
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

// unpackMetadata adds to metadata what packed holds. Bytes that follow the map
// are ignored, as watermill-redisstream does.
// packPair returns what packMetadata makes of one key and its value.
func packPair(key, value string) string {
	return string(appendString(appendString(nil, key), value))
}

func unpackMetadata(packed string, metadata message.Metadata) error {
	if packed == "" {
		return nil
	}
	n, rest, err := cutCount(packed, fixMap, map16)
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

// UnpackFields decodes the fields that a stream entry had before it became a
// dead letter, from a MessagePack array of strings: name, value, name, value,
// ... in the order of the entry, names that occur twice and values that are not
// text included. An odd number of strings is an error, and so is whatever
// follows the array.
func UnpackFields(packed []byte) ([]string, error) {
	s := string(packed)
	n, rest, err := cutCount(s, fixArray, array16)
	if err != nil {
		return nil, fmt.Errorf("goxstreams: unpack fields: MessagePack array: %w", err)
	}
	if n%2 != 0 {
		return nil, fmt.Errorf("goxstreams: unpack fields: %d names and values, an odd number", n)
	}
	if uint64(n) > uint64(len(rest)) { // each takes a byte at least
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

// MessagePack's first bytes. The form with four bytes of length comes next
// after the one with two.
const (
	fixMap, fixArray, fixStr = 0x80, 0x90, 0xa0 // the length in the low bits
	nilValue                 = 0xc0
	bin8, bin16, bin32       = 0xc4, 0xc5, 0xc6
	str8, str16, str32       = 0xd9, 0xda, 0xdb
	array16, map16           = 0xdc, 0xde
)

// appendCount begins a map or an array of n.
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

// appendLen takes n below 4 GiB for granted: Redis takes no value above 512
// MiB.
func appendLen(b []byte, code16 byte, n int) []byte {
	if n < 1<<16 {
		return binary.BigEndian.AppendUint16(append(b, code16), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(b, code16+1), uint32(n))
}

var errTruncated = errors.New("truncated")

// cutCount takes the beginning of a map or an array off s. Nil is an empty one.
func cutCount(s string, fix, code16 byte) (n uint32, rest string, err error) {
	if s == "" {
		return 0, s, errTruncated
	}
	switch code := s[0]; {
	case code&0xf0 == fix:
		return uint32(code & 0x0f), s[1:], nil
	case code == nilValue:
		return 0, s[1:], nil
	case code == code16:
		return cutLen(s, 2)
	case code == code16+1:
		return cutLen(s, 4)
	default:
		return 0, s, fmt.Errorf("it cannot begin with byte 0x%02x", code)
	}
}

// cutString takes a string off s, in whichever form some writer may have
// chosen: text, binary, or nil for an empty one. On an error rest is where the
// string began.
func cutString(s string) (value, rest string, err error) {
	n, rest, err := cutStringLen(s)
	if err != nil {
		return "", s, err
	}
	if uint64(n) > uint64(len(rest)) {
		return "", s, errTruncated
	}
	return rest[:n], rest[n:], nil
}

func cutStringLen(s string) (n uint32, rest string, err error) {
	if s == "" {
		return 0, s, errTruncated
	}
	switch code := s[0]; {
	case code&0xe0 == fixStr:
		return uint32(code & 0x1f), s[1:], nil
	case code == nilValue:
		return 0, s[1:], nil
	case code == str8, code == bin8:
		return cutLen(s, 1)
	case code == str16, code == bin16:
		return cutLen(s, 2)
	case code == str32, code == bin32:
		return cutLen(s, 4)
	default:
		return 0, s, fmt.Errorf("a string cannot begin with byte 0x%02x", code)
	}
}

// cutLen takes a first byte off s and the length of so many bytes that follows
// it.
func cutLen(s string, size int) (n uint32, rest string, err error) {
	if len(s) < 1+size {
		return 0, s, errTruncated
	}
	for i := range size {
		n = n<<8 | uint32(s[1+i])
	}
	return n, s[1+size:], nil
}
