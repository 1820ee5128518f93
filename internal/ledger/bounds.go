package ledger

import "sync/atomic"

const (
	// maxAhead limits the entries that a Subscriber has read ahead, over all its
	// topics. maxWaiting limits the entries whose leases are renewed while they
	// wait for their retry. maxUnacked limits the acks that have not reached Redis:
	// beyond it nothing more is read, since their messages are all handled again if
	// the process ends now.
	maxAhead   = 10_000
	maxWaiting = 10_000
	maxUnacked = 10_000

	// MaxCandidates limits the entries of other consumers that are remembered.
	MaxCandidates = 10_000

	// minShare is each ledger's minimum share of a quota, however many ledgers
	// there are.
	minShare = 100
)

// Bounds are the limits that the ledgers of a Subscriber share.
type Bounds struct {
	Open       atomic.Int64 // number of ledgers
	Waiting    Quota
	Unacked    Quota
	Candidates Quota
	ahead      atomic.Int64
}

// NewBounds returns the bounds of a Subscriber.
func NewBounds() *Bounds {
	return &Bounds{Waiting: Quota{all: maxWaiting}, Unacked: Quota{all: maxUnacked}, Candidates: Quota{all: MaxCandidates}}
}

// Quota limits the number of something.
type Quota struct {
	all  int
	used atomic.Int64
}

// Use counts n more; a negative n counts fewer.
func (q *Quota) Use(n int) { q.used.Add(int64(n)) }

// Most returns how many a ledger that has own of them may have: what the others
// leave, and at least a fair share.
func (b *Bounds) Most(q *Quota, own int) int {
	return max(q.all-int(q.used.Load())+own, q.all/int(max(1, b.Open.Load())), minShare)
}

func (b *Bounds) over(q *Quota, own int) bool { return own > b.Most(q, own) }
func (b *Bounds) full(q *Quota, own int) bool { return own >= minShare && own >= b.Most(q, own) }

// Ahead returns the number of entries read ahead.
func (b *Bounds) Ahead() int { return int(b.ahead.Load()) }
