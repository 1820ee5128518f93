package main

import (
	"cmp"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// entryID is the ID of a stream's entry: milliseconds of the server's clock, and a number.
type entryID struct{ ms, seq uint64 }

func parseID(s string) (entryID, error) {
	ms, seq, ok := strings.Cut(s, "-")
	if !ok {
		seq = "0"
	}
	var id entryID
	var errMS, errSeq error
	id.ms, errMS = strconv.ParseUint(ms, 10, 64)
	id.seq, errSeq = strconv.ParseUint(seq, 10, 64)
	if errMS != nil || errSeq != nil {
		return id, usagef("%q is no entry ID such as 1700000000000-0", s)
	}
	return id, nil
}

func (id entryID) String() string { return fmt.Sprintf("%d-%d", id.ms, id.seq) }

func (id entryID) compare(other entryID) int {
	return cmp.Or(cmp.Compare(id.ms, other.ms), cmp.Compare(id.seq, other.seq))
}

// previous returns the greatest ID that is less, and 0-0 for itself.
func (id entryID) previous() entryID {
	switch {
	case id.seq > 0:
		return entryID{id.ms, id.seq - 1}
	case id.ms > 0:
		return entryID{id.ms - 1, math.MaxUint64}
	}
	return id
}

// next returns the least ID that is greater.
func (id entryID) next() entryID {
	if id.seq == math.MaxUint64 {
		return entryID{id.ms + 1, 0}
	}
	return entryID{id.ms, id.seq + 1}
}

func (id entryID) time() time.Time { return time.UnixMilli(int64(id.ms)).UTC() }

// timeOf is when Redis stored an entry. What is no ID gives the zero time.
func timeOf(id string) time.Time {
	parsed, err := parseID(id)
	if err != nil {
		return time.Time{}
	}
	return parsed.time()
}
