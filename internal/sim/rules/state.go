package rules

import (
	"cmp"
	"fmt"
	"time"
)

// A Topic is one stream and how it is consumed.
type Topic struct {
	Name           string
	MaxConcurrency int
	// Named: the consumers have given names, which outlive their processes. Else each subscription has one of its own.
	Named bool
	// Keys: there is an OrderingKey, with so many different keys, and MaxConcurrency is more than 1. See KeyOf.
	Keys int
}

// A TopicState is what Redis has of a topic in the end. Unless the journal says by Trimmed what left the stream on purpose,
// whatever is missing was lost.
type TopicState struct {
	Entries []Entry
	Pending []Pending
	Dead    []Letter
	Waiting []string // UUIDs of delayed messages that are due, or were long ago: none should be
}

// An Entry is one message in the stream.
type Entry struct{ ID, UUID string }

// A Pending entry was delivered, and neither acked nor moved.
type Pending struct {
	ID, Consumer string
	Count        int64
}

// A Letter is one message in the dead-letter stream.
type Letter struct {
	ID, EntryID, UUID, Consumer, Reason string
	Deliveries                          int64
	At                                  time.Duration // when it was stored, on the time axis of Event.Mono
}

// CompareIDs orders entry IDs as Redis does.
func CompareIDs(a, b string) int {
	ams, aseq := splitID(a)
	bms, bseq := splitID(b)
	return cmp.Or(cmp.Compare(ams, bms), cmp.Compare(aseq, bseq))
}

func splitID(id string) (ms, seq uint64) {
	// An ID without a sequence number, or none at all, leaves zeros.
	_, _ = fmt.Sscanf(id, "%d-%d", &ms, &seq)
	return ms, seq
}
