package ledger

import "sync/atomic"

const (
	// maxAhead bounds the entries that a Subscriber has read ahead, over all its
	// topics; maxWaiting those whose leases are kept up while they wait for their
	// retry; maxUnacked the acks that have not arrived, before nothing more is read:
	// they are all handled again if the process ends now.
	maxAhead   = 10_000
	maxWaiting = 10_000
	maxUnacked = 10_000

	// MaxCandidates bounds the entries of other consumers that are kept in mind.
	MaxCandidates = 10_000

	// minShare is what a ledger may have of each, however many others there are.
	minShare = 100
)

// Bounds is what the ledgers of a Subscriber may have together.
type Bounds struct {
	Open       atomic.Int64 // ledgers
	Waiting    Quota
	Unacked    Quota
	Candidates Quota
	ahead      atomic.Int64
}

// NewBounds returns the bounds of a Subscriber.
func NewBounds() *Bounds {
	return &Bounds{Waiting: Quota{all: maxWaiting}, Unacked: Quota{all: maxUnacked}, Candidates: Quota{all: MaxCandidates}}
}

// Quota is how many of something there may be.
type Quota struct {
	all  int
	used atomic.Int64
}

// Use counts n more, or less.
func (q *Quota) Use(n int) { q.used.Add(int64(n)) }

// Most returns how many one may have that has own of them: what the others leave, and
// a share of its own whatever they have.
func (b *Bounds) Most(q *Quota, own int) int {
	return max(q.all-int(q.used.Load())+own, q.all/int(max(1, b.Open.Load())), minShare)
}

func (b *Bounds) over(q *Quota, own int) bool { return own > b.Most(q, own) }
func (b *Bounds) full(q *Quota, own int) bool { return own >= minShare && own >= b.Most(q, own) }

// Ahead returns how many entries are read ahead.
func (b *Bounds) Ahead() int { return int(b.ahead.Load()) }
