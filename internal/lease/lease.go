// Package lease maintains the leases of a subscription's entries: it renews, acks
// and releases them, and restores them in a group that was lost. It asks the ledger
// for work, and tells it the server's answers. It starts no goroutines, and knows
// nothing about messages.
package lease

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// Released is the consumer that owns released entries. No process reads as this
// consumer; takeover looks at its entries first.
const Released = "released"

// MaxAck is the maximum number of IDs per XACK: 1,000 IDs take the server 0.6 ms.
const MaxAck = 1000

// Config configures a Keeper.
type Config struct {
	Stream  *xstream.Stream
	Ledger  *ledger.Ledger
	MinIdle time.Duration // idle time after which others may claim an entry that was not renewed
	Timeout time.Duration // idle time after which others may remove a consumer; 0: never
	Deletes bool          // acked entries are deleted
	Trims   bool          // the subscription trims the stream: acked entries leave it; also if it deletes them
	Log     watermill.LoggerAdapter
	Fields  watermill.LogFields
}

// Keeper maintains the leases of a subscription.
type Keeper struct {
	cfg Config

	// Counters.
	Lost, GivenBack atomic.Int64

	round    chan struct{} // capacity 1: one renewal, or one repair of the group, at a time
	partly   bool          // a repair has started and not finished: missing entries must be restored; guarded by round
	seen     sync.Mutex
	progress progress // guarded by seen
}

// New returns a Keeper.
func New(cfg Config) *Keeper {
	return &Keeper{cfg: cfg, round: make(chan struct{}, 1)}
}

// Ack acks the next entries that the ledger has for it, in the configured way.
func (k *Keeper) Ack(ctx context.Context) (ledger.Effects, error) {
	entries := k.cfg.Ledger.Acks(MaxAck)
	if ids := k.cfg.Ledger.ToAck(entries, make([]any, 0, len(entries))); len(ids) > 0 {
		if err := k.cfg.Stream.Ack(ctx, k.cfg.Deletes, ids...); err != nil {
			return ledger.Effects{}, err
		}
	}
	return k.cfg.Ledger.Confirmed(time.Now(), len(entries)), nil
}

// Take delivers an entry once more: it claims a candidate, or counts a retry. It
// returns false if the entry is not ours; Ledger.Owned reports whether it will be
// again.
func (k *Keeper) Take(ctx context.Context, e *ledger.Entry) (bool, error) {
	fields, err := k.Recount(ctx, e, e.Next)
	e.Fields = fields
	return fields != nil, err
}

// Recount sets the delivery count of an entry of ours, or of a candidate, which it claims,
// and returns its fields; nil if it is not ours.
func (k *Keeper) Recount(ctx context.Context, e *ledger.Entry, count int64) ([]string, error) {
	sent := time.Now()
	take := func() (*xstream.Entry, xstream.Standing, error) {
		return k.cfg.Stream.Take(ctx, e.ID, e.Owner, e.Count(), e.Idle, count)
	}
	got, how, err := take()
	if how == xstream.Settled && e.Owner != "" && e.Withdrawn { // by others, or the group was recreated
		if _, err = k.checkGroup(ctx); err == nil || redisx.IsDenied(err) {
			got, how, err = take() // a repair may have restored it meanwhile
		}
	}
	if err != nil {
		return nil, err
	}
	if how != xstream.Mine {
		return nil, k.refused(ctx, e, how)
	}
	k.wasActive(sent)
	e.SetCount(count, xstream.OneMore(count))
	if !k.cfg.Ledger.Claimed(sent, e) {
		return nil, nil
	}
	return got.Fields, nil
}

// Move moves an entry of ours to a dead-letter stream, and returns its ID there; ""
// if it is not ours. After an error that is not a reply the entry may have been
// moved: then pass unsure = true the next time, and the dead letter is looked up by
// its marks. It is also looked up if the entry is not pending: a proxy may have
// sent the command twice.
func (k *Keeper) Move(ctx context.Context, e *ledger.Entry, topic string, unsure bool, marks, letter []string) (string, error) {
	k.cfg.Ledger.Moving(e, ledger.MaybeMoved)
	var look []string
	if unsure {
		look = marks
	}
	id, how, err := k.cfg.Stream.DeadLetter(ctx, topic, e.ID, k.cfg.Deletes, look, letter)
	if err == nil && how != xstream.Mine && how != xstream.Elsewhere && !unsure {
		unsure = true
		found := how
		if id, how, err = k.cfg.Stream.DeadLetter(ctx, topic, e.ID, k.cfg.Deletes, marks, letter); how != xstream.Mine && how != xstream.Moved {
			how = found // the change that the first command found
		}
	}
	switch {
	case err == nil && (how == xstream.Mine || how == xstream.Moved):
		k.cfg.Ledger.Moving(e, ledger.Moved)
	case err == nil:
		k.cfg.Ledger.Moving(e, ledger.NotMoved)
		err = k.refused(ctx, e, how)
	case redisx.IsReply(err) && !unsure:
		k.cfg.Ledger.Moving(e, ledger.NotMoved)
	}
	return id, err
}

// refused handles the standing of an entry that a command did not find as expected.
// If it is not pending, the other entries show whether it was settled elsewhere or
// the group was recreated.
func (k *Keeper) refused(ctx context.Context, e *ledger.Entry, how xstream.Standing) error {
	switch {
	case e.Owner == "" && !k.cfg.Ledger.Owned(e): // not an orphan after all
	case e.Owner == "" && how == xstream.Settled:
		return k.Renew(ctx, 0)
	case e.Owner == "":
		k.stand(map[*ledger.Entry]xstream.Standing{e: how})
	case how == xstream.Trimmed: // a candidate
		k.CountLost(1, e)
	}
	return nil
}

// stand handles entries that are not ours as they should be.
func (k *Keeper) stand(standings map[*ledger.Entry]xstream.Standing) {
	now, lost := time.Now(), 0
	var last *ledger.Entry
	for e, how := range standings {
		switch {
		case !k.cfg.Ledger.Owned(e): // acked in the meantime
		case how == xstream.Trimmed, how == xstream.Gone && !k.cfg.Trims:
			lost += k.cfg.Ledger.Gone(now, e)
			last = e
		default:
			k.cfg.Ledger.Lose(now, e)
			k.cfg.Log.Info("Lease lost: another consumer has claimed or settled the message", k.entryFields(e))
		}
	}
	k.CountLost(lost, last)
}

// CountLost counts and logs messages that were deleted from the stream while pending; e
// is one of them, if it is known.
func (k *Keeper) CountLost(n int, e *ledger.Entry) {
	switch k.Lost.Add(int64(n)); {
	case n == 0:
	case n == 1 && e != nil:
		k.cfg.Log.Error("Message lost", errTrimmed, k.entryFields(e))
	default:
		k.cfg.Log.Error("Messages lost", errTrimmed, k.cfg.Fields.Add(watermill.LogFields{"entries": n}))
	}
}

var errTrimmed = errors.New("trimmed or deleted while pending")

func (k *Keeper) entryFields(e *ledger.Entry) watermill.LogFields {
	return k.cfg.Fields.Add(watermill.LogFields{"xid": e.ID, "deliveries": e.Count()})
}

// begin waits for its turn to renew, or to repair the group. It is a channel rather
// than a mutex, since a round waits for Redis.
func (k *Keeper) begin(ctx context.Context) error {
	select {
	case k.round <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (k *Keeper) end() { <-k.round }

// Renew renews the leases that were not confirmed for the given age.
func (k *Keeper) Renew(ctx context.Context, age time.Duration) error {
	if err := k.begin(ctx); err != nil {
		return err
	}
	defer k.end()
	if k.partly {
		if err := k.restore(ctx); err != nil {
			return err
		}
	}
	var renewed []*ledger.Entry
	var last time.Time
	others := make(map[*ledger.Entry]xstream.Standing)
	for entries := range slices.Chunk(k.cfg.Ledger.Renewals(time.Now(), age), xstream.MaxOwned) {
		sent := time.Now()
		standings, err := k.cfg.Stream.Renew(ctx, idsOf(entries))
		if err != nil {
			return err // the rest would wait for the same answer
		}
		ours := split(entries, standings, others)
		if renewed = append(renewed, ours...); len(ours) > 0 {
			last = sent
		}
		defer k.cfg.Ledger.Renewed(sent, ours...) // after the missing entries have been compared with the previous state
	}
	remade, err := k.isRemade(ctx, others, renewed)
	if len(renewed) > 0 {
		k.wasActive(last)
	}
	switch {
	case err != nil:
		return err
	case remade:
		return k.remade(ctx)
	}
	k.stand(others)
	return nil
}

// split returns the entries that have no standing: they are ours. It adds the standings of the
// rest to others.
func split(entries []*ledger.Entry, standings map[string]xstream.Standing, others map[*ledger.Entry]xstream.Standing) (ours []*ledger.Entry) {
	for _, e := range entries {
		if how := standings[e.ID]; how == "" {
			ours = append(ours, e)
		} else {
			others[e] = how
		}
	}
	return ours
}

func idsOf(entries []*ledger.Entry) []string {
	ids := make([]string, len(entries))
	for i, e := range entries {
		ids[i] = e.ID
	}
	return ids
}

// isRemade reports whether entries are no longer pending because the group was recreated or
// the consumer removed, and not because other consumers took or acked them: ARCHITECTURE.md has
// the rules. Restoring one that a handler has costs nothing. Another single one is restored if
// something was read since, but not a second time: somebody may be acking it by hand.
func (k *Keeper) isRemade(ctx context.Context, others map[*ledger.Entry]xstream.Standing, renewed []*ledger.Entry) (bool, error) {
	var missing []*ledger.Entry
	now, expired, forgotten, sure := time.Now(), false, false, false
	for e, how := range others {
		if how != xstream.Settled {
			continue
		}
		m := k.cfg.Ledger.Missing(now, e, k.cfg.MinIdle, renewed)
		if !m.Ours || m.Taken {
			continue
		}
		missing = append(missing, e)
		expired = expired || m.Age > k.cfg.MinIdle
		forgotten = forgotten || k.cfg.Timeout > 0 && m.Age > k.cfg.Timeout
		sure = sure || e.InHand() || m.ReadOn
	}
	switch {
	case len(missing) == 0, forgotten:
		return false, nil
	case !expired && (len(missing) > 1 || sure):
		k.cfg.Ledger.PutBack(now, missing...)
		return true, nil
	}
	isNew, err := k.consumerIsNew(ctx, !expired)
	if redisx.IsDenied(err) {
		return true, nil // restoring entries that were acked elsewhere does less harm than losing them
	}
	return isNew, err
}

// remade restores entries that are missing because another consumer, which did not
// know of them, recreated the group or the whole stream.
func (k *Keeper) remade(ctx context.Context) error {
	anew, _, err := k.beganAnew(ctx)
	if err != nil {
		return err
	}
	if anew {
		k.forgetAll(time.Now())
		return nil
	}
	k.cfg.Log.Error("The consumer group was recreated, or all entries of this consumer were acked elsewhere; restoring them", errors.New("group lost"), k.cfg.Fields)
	return k.restore(ctx)
}

// Release releases entries for any consumer to take, with the count of Give. Entries
// that cannot be released are claimed when their leases expire. If the group was lost,
// they are first restored in it.
func (k *Keeper) Release(ctx context.Context, entries []*ledger.Entry) error {
	released := make(map[string]bool)
	done := func(ids map[string]bool) {
		before := len(released)
		maps.Copy(released, ids)
		k.GivenBack.Add(int64(len(released) - before))
	}
	left, err := k.assign(ctx, entries, done)
	if len(left) == 0 || err != nil && !xstream.GroupLost(err) {
		return err
	}
	lost := err != nil
	if lost {
		err = k.Regroup(ctx)
	} else {
		lost, err = k.checkGroup(ctx)
	}
	denied := redisx.IsDenied(err)
	switch {
	case err != nil && !denied:
		return err
	case lost && !denied:
		left = entries // what was released before the loss is lost, too
	}
	if lost || denied { // otherwise others have them, an attempt without an answer has released them, or a repair has restored them
		if err := k.putBack(ctx, left); err != nil {
			return err
		}
	}
	_, err = k.assign(ctx, left, done)
	return err
}

// putBack restores entries that are to be released. Some may have come after Close, and be in
// no ledger.
func (k *Keeper) putBack(ctx context.Context, entries []*ledger.Entry) error {
	entries = slices.DeleteFunc(slices.Clone(entries), (*ledger.Entry).Gone)
	for chunk := range slices.Chunk(entries, xstream.MaxOwned) {
		if _, err := k.cfg.Stream.Restore(ctx, counted(chunk, given)); err != nil {
			return err
		}
	}
	return nil
}

func given(e *ledger.Entry) int64 { return e.Give }

func counted(entries []*ledger.Entry, count func(*ledger.Entry) int64) []xstream.Counted {
	all := make([]xstream.Counted, len(entries))
	for i, e := range entries {
		all[i] = xstream.Counted{ID: e.ID, Count: count(e)}
	}
	return all
}

// assign releases entries. It returns those that are not ours, and
// those that it did not send because Redis is unavailable: each further command
// would have to wait for it too.
func (k *Keeper) assign(ctx context.Context, entries []*ledger.Entry, done func(map[string]bool)) (left []*ledger.Entry, err error) {
	entries = slices.DeleteFunc(slices.Clone(entries), (*ledger.Entry).Gone)
	slices.SortFunc(entries, func(a, b *ledger.Entry) int { return xstream.CompareIDs(a.ID, b.ID) })
	for chunk := range slices.Chunk(entries, xstream.MaxOwned) {
		assigned, failure := k.cfg.Stream.Assign(ctx, Released, counted(chunk, given))
		done(assigned)
		for _, e := range chunk {
			if !assigned[e.ID] {
				left = append(left, e)
			}
		}
		if err = errors.Join(err, failure); failure != nil && !redisx.IsReply(failure) {
			return left, err
		}
	}
	return left, err
}
