package model

import (
	"math"
	"slices"
	"strconv"
	"strings"
)

// ID is the ID of a stream's entry.
type ID struct{ ms, seq uint64 }

var maxID = ID{math.MaxUint64, math.MaxUint64}

func (a ID) compare(b ID) int {
	switch {
	case a.ms < b.ms || a.ms == b.ms && a.seq < b.seq:
		return -1
	case a == b:
		return 0
	}
	return 1
}

func (a ID) less(b ID) bool { return a.compare(b) < 0 }

func (a ID) String() string {
	b := strconv.AppendUint(make([]byte, 0, 40), a.ms, 10)
	return string(strconv.AppendUint(append(b, '-'), a.seq, 10))
}

// next returns the least ID above a; false if there is none.
func (a ID) next() (ID, bool) {
	switch {
	case a.seq < math.MaxUint64:
		return ID{a.ms, a.seq + 1}, true
	case a.ms < math.MaxUint64:
		return ID{a.ms + 1, 0}, true
	}
	return ID{}, false
}

func (a ID) previous() (ID, bool) {
	switch {
	case a.seq > 0:
		return ID{a.ms, a.seq - 1}, true
	case a.ms > 0:
		return ID{a.ms - 1, math.MaxUint64}, true
	}
	return maxID, false
}

const errInvalidID = Error("ERR Invalid stream ID specified as stream command argument")

// parseID parses <ms> or <ms>-<seq>.
func parseID(s string, missingSeq uint64) (ID, error) {
	head, tail, both := strings.Cut(s, "-")
	id := ID{seq: missingSeq}
	var ok bool
	if id.ms, ok = parseUint(head); !ok {
		return id, errInvalidID
	}
	if both {
		if id.seq, ok = parseUint(tail); !ok {
			return id, errInvalidID
		}
	}
	return id, nil
}

// parseUint parses as string2ull does, which takes what strtoull does: spaces, zeros
// and a sign before the number, but no negative number in its usual spelling.
func parseUint(s string) (uint64, bool) {
	if n, err := parseInt(s); err == nil {
		return uint64(n), n >= 0
	}
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	negative := strings.HasPrefix(s, "-")
	if negative || strings.HasPrefix(s, "+") {
		s = s[1:]
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if negative {
		n = -n
	}
	return n, err == nil
}

// parseRangeID parses an end of a range, "-" and "+" and "(" included.
func parseRangeID(s string, end bool) (ID, error) {
	missing := uint64(0)
	if end {
		missing = math.MaxUint64
	}
	if len(s) > 1 && s[0] == '(' {
		id, err := parseID(s[1:], missing)
		if err != nil {
			return id, err
		}
		if end {
			if id, ok := id.previous(); ok {
				return id, nil
			}
			return id, Error("ERR invalid end ID for the interval")
		}
		if id, ok := id.next(); ok {
			return id, nil
		}
		return id, Error("ERR invalid start ID for the interval")
	}
	switch s {
	case "-":
		return ID{}, nil
	case "+":
		return maxID, nil
	}
	return parseID(s, missing)
}

// sorted is a list in the order of its IDs.
type sorted[T any] []item[T]

type item[T any] struct {
	id    ID
	value T
}

func (l sorted[T]) find(id ID) (int, bool) {
	if n := len(l); n > 0 && l[n-1].id.less(id) {
		return n, false
	}
	return slices.BinarySearchFunc(l, id, func(it item[T], id ID) int { return it.id.compare(id) })
}

func (l sorted[T]) get(id ID) (v T, ok bool) {
	if i, ok := l.find(id); ok {
		return l[i].value, true
	}
	return v, false
}

// put adds a value whose ID is not in the list.
func (l *sorted[T]) put(id ID, v T) {
	i, _ := l.find(id)
	*l = slices.Insert(*l, i, item[T]{id, v})
}

// remove moves the shorter part of the list: most removals are near an end.
func (l *sorted[T]) remove(id ID) bool {
	i, ok := l.find(id)
	if !ok {
		return false
	}
	s := *l
	if i < len(s)/2 {
		copy(s[1:i+1], s[:i])
		s[0] = item[T]{}
		*l = s[1:]
		return true
	}
	*l = slices.Delete(s, i, i+1)
	return true
}

// between returns the part from start to end, both included.
func (l sorted[T]) between(start, end ID) sorted[T] {
	from, _ := l.find(start)
	to, found := l.find(end)
	if found {
		to++
	}
	return l[from:max(from, to)]
}
