// Package lease keeps the leases of what a subscription has: it renews them, acks,
// gives back, and puts back what a lost group has lost. It asks the ledger for work, and
// tells it what the server said. It starts no goroutine, and knows no messages.
package lease

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// Released is the consumer in whose name is what was given back. No process reads in
// it; takeover looks there first.
const Released = "released"

// MaxAck bounds one XACK: 1,000 IDs take the server 0.6 ms.
const MaxAck = 1000

// Config is what a Keeper needs.
type Config struct {
	Stream  *xstream.Stream
	Ledger  *ledger.Ledger
	MinIdle time.Duration  // after which others may claim what was not renewed
	Timeout time.Duration  // after which they may remove a consumer; 0: they do not
	Deletes xstream.Delete // what becomes of what is acked
	Log     watermill.LoggerAdapter
	Fields  watermill.LogFields
}

// Keeper is the leases of a subscription.
type Keeper struct {
	cfg     Config
	kept    atomic.Bool // DeleteAcked may have kept something for a fan-out
	several sync.Once   // groups, which was said
	denied  sync.Once   // to trim, likewise

	// Sums, for whoever counts.
	Lost, GivenBack atomic.Int64

	round    chan struct{} // holds one: one renewal, or repair of the group, at a time
	partly   bool          // a repair has begun, and not ended: what is missing is to be put back
	seen     sync.Mutex
	progress progress // guarded by seen
}

// New returns a Keeper.
func New(cfg Config) *Keeper {
	k := &Keeper{cfg: cfg, round: make(chan struct{}, 1)}
	k.kept.Store(cfg.Deletes != xstream.DeleteNever) // by a process before this one
	return k
}

// SetDeletes is said when the server was asked what it can.
func (k *Keeper) SetDeletes(d xstream.Delete) {
	k.cfg.Deletes = d
	k.kept.Store(d != xstream.DeleteNever)
}

// Ack acks the next entries that are to be acked, in the way that the config asks for.
func (k *Keeper) Ack(ctx context.Context) (n int, fx ledger.Effects, err error) {
	entries := k.cfg.Ledger.Acks(MaxAck)
	if len(entries) == 0 {
		return 0, fx, nil
	}
	if ids := k.cfg.Ledger.ToAck(entries, make([]any, 0, len(entries))); len(ids) > 0 {
		if err := k.ack(ctx, ids); err != nil {
			return 0, fx, err
		}
	}
	return len(entries), k.cfg.Ledger.Confirmed(time.Now(), len(entries)), nil
}

// errSeveralGroups is logged once.
var errSeveralGroups = errors.New("this server has no XACKDEL (Redis 8.2)")

func (k *Keeper) ack(ctx context.Context, ids []any) error {
	s := k.cfg.Stream
	if k.cfg.Deletes == xstream.DeleteNever {
		return s.Ack(ctx, ids...)
	}
	kept, err := s.AckAndDelete(ctx, k.cfg.Deletes, ids...)
	if xstream.SeveralGroups(err) {
		// A group was added since Subscribe looked. Its messages matter more than the
		// memory.
		k.several.Do(func() {
			k.cfg.Log.Error("DeleteAcked: the topic has several groups now and this server no XACKDEL; acked entries stay", errSeveralGroups, k.cfg.Fields)
		})
		return s.Ack(ctx, ids...)
	}
	if kept > 0 {
		k.kept.Store(true)
	}
	return err
}

// maxTrims bounds what one call of Trim deletes: a hundred entries each.
const maxTrims = 50

// Trim deletes what DeleteAcked had to keep for a fan-out, once that has come to it.
func (k *Keeper) Trim(ctx context.Context) error {
	if k.cfg.Deletes == xstream.DeleteNever || !k.kept.Swap(false) {
		return nil
	}
	for range maxTrims {
		more, later, err := k.cfg.Stream.TrimAcked(ctx)
		if redisx.IsDenied(err) {
			k.denied.Do(func() {
				k.cfg.Log.Info("No right to delete by a script what a fan-out needed longer than the group did; it stays in the stream: "+err.Error(), k.cfg.Fields)
			})
			return nil
		}
		if err != nil || later {
			k.kept.Store(true)
		}
		if err != nil || !more {
			return err
		}
	}
	k.kept.Store(true) // there is more
	return nil
}

// Take has an entry delivered once more: it claims a candidate, or counts a retry. It
// returns false if it is not ours: see Ledger.Owned for whether it is again.
func (k *Keeper) Take(ctx context.Context, e *ledger.Entry) (bool, error) {
	sent := time.Now()
	got, how, err := k.cfg.Stream.Take(ctx, e.ID, e.Owner, e.Count(), e.Idle, e.Next)
	if err != nil {
		return false, err
	}
	if how != xstream.Mine {
		return false, k.refused(ctx, e, how)
	}
	k.wasActive()
	e.Fields = got.Fields
	e.SetCount(e.Next, xstream.OneMore(e.Next))
	return k.cfg.Ledger.Claimed(sent, e), nil
}

// Recount sets the delivery count of an entry of ours, and returns its fields; nil if
// it is not ours.
func (k *Keeper) Recount(ctx context.Context, e *ledger.Entry, count int64) ([]string, error) {
	sent := time.Now()
	got, how, err := k.cfg.Stream.Take(ctx, e.ID, "", 0, 0, count)
	if err != nil {
		return nil, err
	}
	if how != xstream.Mine {
		return nil, k.refused(ctx, e, how)
	}
	k.wasActive()
	e.SetCount(count, xstream.OneMore(count))
	k.cfg.Ledger.Renewed(sent, e)
	return got.Fields, nil
}

// Move moves an entry of ours to a dead-letter stream, and returns its ID there; "" if
// it is not ours. After an error that is no reply it may have been moved: then unsure is
// true the next time, and the letter is looked for by its marks. So it is where the entry
// is not pending: somebody on the way may have sent the command twice.
func (k *Keeper) Move(ctx context.Context, e *ledger.Entry, topic string, unsure bool, marks, letter []string) (string, error) {
	k.cfg.Ledger.Moving(e, true)
	var look []string
	if unsure {
		look = marks
	}
	id, how, err := k.cfg.Stream.DeadLetter(ctx, topic, e.ID, k.cfg.Deletes, look, letter)
	if err == nil && how != xstream.Mine && how != xstream.Elsewhere && !unsure {
		unsure = true
		found := how
		if id, how, err = k.cfg.Stream.DeadLetter(ctx, topic, e.ID, k.cfg.Deletes, marks, letter); how != xstream.Mine && how != xstream.Moved {
			how = found // what the first one has changed
		}
	}
	switch {
	case err != nil && (!redisx.IsReply(err) || unsure):
		return "", err
	case err != nil:
		k.cfg.Ledger.Moving(e, false)
		return "", err
	case how == xstream.Moved:
		k.cfg.Ledger.Moved(e)
		return "", nil
	case how != xstream.Mine:
		k.cfg.Ledger.Moving(e, false)
		return "", k.refused(ctx, e, how)
	}
	k.cfg.Ledger.Moved(e)
	if k.cfg.Deletes != xstream.DeleteNever {
		k.kept.Store(true) // a fan-out may need it still
	}
	return id, nil
}

// refused acts on the standing of an entry that somebody wanted to act on. Of one that
// is not pending all the others tell whether it was settled elsewhere, or the group was
// made anew.
func (k *Keeper) refused(ctx context.Context, e *ledger.Entry, how xstream.Standing) error {
	switch {
	case e.Owner == "" && !k.cfg.Ledger.Owned(e): // an orphan that was none
	case e.Owner == "" && how == xstream.Settled:
		return k.Renew(ctx, 0)
	case e.Owner == "":
		k.stand(map[*ledger.Entry]xstream.Standing{e: how})
	case how == xstream.Trimmed: // a candidate
		k.lost(1, e)
	}
	return nil
}

// stand notes the standing of entries that are not ours as they should be.
func (k *Keeper) stand(standings map[*ledger.Entry]xstream.Standing) {
	now, lost := time.Now(), 0
	var last *ledger.Entry
	for e, how := range standings {
		switch {
		case !k.cfg.Ledger.Owned(e): // acked meanwhile
		case how == xstream.Trimmed, how == xstream.Gone && k.cfg.Deletes == xstream.DeleteNever:
			lost += k.cfg.Ledger.Gone(now, e)
			last = e
		default:
			k.cfg.Ledger.Lose(now, e)
			k.cfg.Log.Info("Lease lost: another consumer has the message, or settled it", k.entryFields(e))
		}
	}
	k.lost(lost, last)
}

// lost counts and logs messages that were deleted from the stream while they were
// pending; e is one of them.
func (k *Keeper) lost(n int, e *ledger.Entry) {
	switch k.Lost.Add(int64(n)); n {
	case 0:
	case 1:
		k.cfg.Log.Error("Message lost", ErrTrimmed, k.entryFields(e))
	default:
		k.cfg.Log.Error("Messages lost", ErrTrimmed, k.cfg.Fields.Add(watermill.LogFields{"entries": n}))
	}
}

// ErrTrimmed is why a message was lost.
var ErrTrimmed = errors.New("trimmed or deleted while pending")

func (k *Keeper) entryFields(e *ledger.Entry) watermill.LogFields {
	return k.cfg.Fields.Add(watermill.LogFields{"xid": e.ID, "deliveries": e.Count()})
}

// begin waits for its turn to renew, or to repair the group. It is a channel, and no mutex,
// since a round waits for Redis.
func (k *Keeper) begin(ctx context.Context) error {
	select {
	case k.round <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (k *Keeper) end() { <-k.round }

// Renew renews what was not known to be ours for age.
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
	others := make(map[*ledger.Entry]xstream.Standing)
	for entries := range slices.Chunk(k.cfg.Ledger.Renewals(time.Now(), age, xstream.CompareIDs), xstream.MaxOwned) {
		ids := make([]string, len(entries))
		for i, e := range entries {
			ids[i] = e.ID
		}
		sent := time.Now()
		standings, err := k.cfg.Stream.Renew(ctx, ids)
		if err != nil {
			return err // the rest would wait for the same answer
		}
		var ours []*ledger.Entry
		for _, e := range entries {
			if how := standings[e.ID]; how == "" {
				ours = append(ours, e)
			} else {
				others[e] = how
			}
		}
		renewed = append(renewed, ours...)
		defer k.cfg.Ledger.Renewed(sent, ours...) // what is missing is compared with what was known before
	}
	remade, err := k.isRemade(ctx, others, renewed)
	if len(renewed) > 0 {
		k.wasActive()
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

// isRemade reports whether entries are not pending any more because the group was made
// anew, or the consumer removed, and not because others took or acked them.
//
// Several go missing at once for no other reason while their leases are good. Of a single
// one it is assumed as long as a handler has it: to put it back costs nothing then. So it
// is if something was read since, which may be of the new group: better twice than never,
// but not thrice, since somebody may be acking it by hand.
// Else the server's memory of the consumer tells. Where leases may have run out others had
// the right to take, and to settle: then only a group that never knew the consumer is another;
// after Timeout not even that, since they remove the names of those who are away.
func (k *Keeper) isRemade(ctx context.Context, others map[*ledger.Entry]xstream.Standing, renewed []*ledger.Entry) (bool, error) {
	var missing []*ledger.Entry
	now, expired, forgotten, sure := time.Now(), false, false, false
	for e, how := range others {
		if how != xstream.Settled || !k.cfg.Ledger.Owned(e) {
			continue
		}
		m := k.cfg.Ledger.Missing(now, e, k.cfg.MinIdle, renewed)
		if m.Taken {
			continue
		}
		missing = append(missing, e)
		expired = expired || m.Expired
		forgotten = forgotten || k.cfg.Timeout > 0 && k.cfg.Ledger.Missing(now, e, k.cfg.Timeout, nil).Expired
		sure = sure || e.InHand() || m.ReadOn
	}
	switch {
	case len(missing) == 0, forgotten:
		return false, nil
	case !expired && (len(missing) > 1 || sure):
		k.cfg.Ledger.PutBack(now, missing...)
		return true, nil
	}
	return k.consumerIsNew(ctx, !expired)
}

// remade puts back what a consumer that did not know of it left out when it made the
// group anew, or the whole stream.
func (k *Keeper) remade(ctx context.Context) error {
	anew, _, err := k.beganAnew(ctx)
	if err != nil {
		return err
	}
	if anew {
		k.forgetAll(time.Now())
		return nil
	}
	k.cfg.Log.Error("The consumer group was made anew, or all that is held here was acked elsewhere; putting it back", errors.New("group lost"), k.cfg.Fields)
	return k.restore(ctx)
}

// Counted is an entry, and the deliveries that it is given back with.
type Counted struct {
	Entry *ledger.Entry
	Count int64
}

// Release gives entries back, to whoever is quickest. What cannot be released is
// claimed when its lease has run out. If the group was lost, they are put back into it
// before.
func (k *Keeper) Release(ctx context.Context, entries []Counted) error {
	given := func(n int) { k.GivenBack.Add(int64(n)) }
	left, err := k.assign(ctx, Released, entries, given)
	if len(left) == 0 || err != nil && !xstream.GroupLost(err) {
		return err
	}
	if err != nil {
		err = k.Regroup(ctx)
	} else if isNew, asked := k.consumerIsNew(ctx, false); asked != nil || !isNew {
		return asked // they were taken, or settled, elsewhere; or given back before, by a try without an answer
	}
	if err != nil {
		return err
	}
	for chunk := range slices.Chunk(left, xstream.MaxOwned) {
		if _, err := k.cfg.Stream.Restore(ctx, counted(chunk)); err != nil {
			return err
		}
	}
	_, err = k.assign(ctx, Released, left, given)
	return err
}

func counted(entries []Counted) []xstream.Counted {
	all := make([]xstream.Counted, len(entries))
	for i, c := range entries {
		all[i] = xstream.Counted{ID: c.Entry.ID, Count: c.Count}
	}
	return all
}

// Abandon leaves an entry in our name, with the count given, until its lease runs out.
func (k *Keeper) Abandon(ctx context.Context, e *ledger.Entry, count int64) error {
	_, err := k.assign(ctx, k.cfg.Stream.Consumer, []Counted{{e, count}}, func(int) {})
	return err
}

// assign gives entries to a consumer, and returns those that are not ours to give, or were
// not asked for: Redis is away then, and the others would each wait for it too.
func (k *Keeper) assign(ctx context.Context, to string, entries []Counted, done func(int)) (left []Counted, err error) {
	entries = slices.DeleteFunc(slices.Clone(entries), func(c Counted) bool { return k.cfg.Ledger.IsGone(c.Entry) })
	slices.SortFunc(entries, func(a, b Counted) int { return xstream.CompareIDs(a.Entry.ID, b.Entry.ID) })
	for chunk := range slices.Chunk(entries, xstream.MaxOwned) {
		given, failure := k.cfg.Stream.Assign(ctx, to, counted(chunk))
		done(len(given))
		for _, c := range chunk {
			if !given[c.Entry.ID] {
				left = append(left, c)
			}
		}
		if err = errors.Join(err, failure); failure != nil && !redisx.IsReply(failure) {
			return left, err
		}
	}
	return left, err
}
