// Package takeover finds what dead holders left in a group: entries that are pending in
// the names of others, and that nobody renews. It starts no goroutine, and knows no
// handlers.
//
// Redis counts idle time also while it is frozen or down, or refuses writes, when no
// holder can renew: after an outage all that is pending looks abandoned. So an entry is
// offered on its second sighting, between which the server answered writes of ours for
// long enough that a living holder has renewed. What was seen is the condition of the
// claim: the owner, the count, and an idle time that has only grown.
package takeover

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// sweepPage is the rows of one XPENDING.
	sweepPage = 500

	// A sweep that took the time t is not repeated before sweepRest * t, times
	// the number of consumers, which do the same: sweeping costs the server a
	// twentieth of its time at most, however long the list of pending entries.
	// To find what the dead have left in time, consumers that are gone are looked
	// at in between, where the rest is more than a third of MinIdle.
	sweepRest = 20

	// sweepCost is the server's time for an entry of the list (Redis 7.0; later
	// ones take a third), for the first sweep, whose time is not known yet.
	sweepCost = 60 * time.Nanosecond

	// sweepLimit * MinIdle is the longest rest.
	sweepLimit = 10

	// XINFO GROUPS, of which the cost grows with the stream's groups, takes a
	// thousandth of the server's time at most, over all consumers; and is asked once
	// in groupLimit at least.
	groupRest  = 1000
	groupLimit = time.Minute

	// reconnectTime is what a living holder may need after an outage until it
	// renews, where a third of MinIdle is less: go-redis dials once a second
	// after many failures, and renewals pause for up to 1.5 s.
	reconnectTime = 3 * time.Second
)

// RenewalsPerLease is how often a lease is renewed before it runs out. An entry that
// was seen idle gets that much time for its holder to be heard of again.
const RenewalsPerLease = 3

// Config is what a Finder needs.
type Config struct {
	Stream   *xstream.Stream
	Ledger   *ledger.Ledger
	Keeper   *lease.Keeper
	Bounds   *ledger.Bounds
	MinIdle  time.Duration // after which a holder that did not renew counts as dead
	Interval time.Duration // between two looks
	Page     int           // of what was released, how much is offered at a time
	Timeout  time.Duration // after which an idle consumer with nothing pending is removed
	Log      watermill.LoggerAdapter
	Fields   watermill.LogFields
}

// Finder looks for them.
type Finder struct {
	cfg  Config
	Lost atomic.Int64 // entries that were found trimmed

	seen map[string]sighting

	// The last sweep of the whole list, and the last one for consumers that are gone.
	sweptAt, goneAt     time.Time
	sweepTook, goneTook time.Duration
	cursor              string // where the sweep goes on that found too much
	noConsumers         bool   // XINFO CONSUMERS is denied

	good   time.Time // the last look at which everything was answered
	steady time.Time // writes have been answered since then, and a living holder could renew; zero: the last one was not

	nextJanitor time.Time
	noJanitor   bool      // its script is denied
	nextGroup   time.Time // XINFO GROUPS is asked again
	consumers   int64     // by its last answer
	trimmed     int       // entries that the look under way found deleted
}

// sighting is an entry that was seen idle for MinIdle.
type sighting struct {
	owner string
	count int64
	idle  time.Duration
	at    time.Time // not before the server looked
}

// idleBy returns how long it must have been idle by then if nobody has touched it: what
// a server whose clock steps shows is too little, or no sign.
func (s sighting) idleBy(now time.Time) time.Duration {
	elapsed := max(0, now.Sub(s.at)-time.Millisecond) // rounded by the server
	return s.idle + elapsed - elapsed/100             // whose clock may be slower
}

// New returns a Finder.
func New(cfg Config) *Finder {
	f := &Finder{cfg: cfg, seen: make(map[string]sighting)}
	f.nextJanitor = time.Now().Add(jitter(cfg.Timeout / 2))
	return f
}

// Look looks once, and offers what it finds to the ledger.
func (f *Finder) Look(ctx context.Context) (ledger.Effects, error) {
	now := time.Now()
	if now.Sub(f.good) >= max(f.third(), 2*f.cfg.Interval) {
		f.steady = time.Time{} // this process may have been stopped together with the server
	}
	candidates, more, err := f.look(ctx)
	if err != nil {
		f.steady = time.Time{}
	} else {
		f.good = time.Now()
	}
	return f.cfg.Ledger.Offer(time.Now(), candidates, more), err
}

func (f *Finder) third() time.Duration { return f.cfg.MinIdle / RenewalsPerLease }

func (f *Finder) look(ctx context.Context) (candidates []*ledger.Entry, more bool, err error) {
	ours := f.cfg.Ledger.Pending() // before the server counts
	sum, err := f.cfg.Stream.PendingSummary(ctx)
	if err != nil {
		return nil, false, err
	}
	if err := f.group(ctx); err != nil {
		return nil, false, err
	}
	f.janitor(ctx)
	if !f.cfg.Ledger.Leased() {
		return nil, false, nil
	}
	mine := sum.Consumers[f.cfg.Stream.Consumer]
	if sum.Count == mine && mine <= ours {
		return nil, false, nil
	}
	defer f.sayTrimmed()
	if err := f.probe(ctx); err != nil {
		return nil, false, err
	}
	if n := sum.Consumers[lease.Released]; n > 0 {
		if candidates, more, err = f.released(ctx); err != nil {
			return candidates, more, err
		}
		if sum.Count -= n; sum.Count == mine && mine <= ours {
			return candidates, more, nil
		}
	}
	if err := f.sweep(ctx, sum.Count); err != nil {
		return candidates, more, err
	}
	return append(candidates, f.ripe(ledger.MaxCandidates-f.cfg.Ledger.Candidates()-len(candidates))...), more, nil
}

// probe finds out whether a living holder could renew: the server answers a write.
func (f *Finder) probe(ctx context.Context) error {
	sent := time.Now()
	if err := f.cfg.Keeper.Probe(ctx); err != nil {
		return err
	}
	now := time.Now()
	if now.Sub(sent) >= f.third() {
		f.steady = time.Time{} // it was held up
	}
	if f.steady.IsZero() {
		f.steady = now
		if !f.good.IsZero() && now.Sub(f.good) >= f.third() {
			f.steady = now.Add(reconnectTime)
		}
	}
	return nil
}

// group looks at how far the group has got, and how many consumers it has.
func (f *Finder) group(ctx context.Context) error {
	start := time.Now()
	if start.Before(f.nextGroup) {
		return nil
	}
	info, err := f.cfg.Stream.GroupInfo(ctx)
	if redisx.IsDenied(err) { // then without what it tells
		f.nextGroup = start.Add(groupLimit)
		return nil
	}
	if err != nil {
		return err
	}
	f.consumers = info.Consumers
	f.cfg.Keeper.SawGroup(info.LastDelivered)
	f.nextGroup = start.Add(min(groupRest*time.Since(start)*time.Duration(max(1, info.Consumers)), groupLimit))
	return nil
}

// released returns what was given back by consumers that closed, and whether there is
// more.
func (f *Finder) released(ctx context.Context) (candidates []*ledger.Entry, more bool, err error) {
	room := ledger.MaxCandidates - f.cfg.Ledger.Candidates()
	if room <= 0 {
		return nil, false, nil
	}
	rows, err := f.cfg.Stream.Pending(ctx, 0, "-", "+", f.cfg.Page, lease.Released)
	if err != nil {
		return nil, false, err
	}
	trimmed, err := f.ackTrimmed(ctx, rows)
	if err != nil {
		return nil, false, err
	}
	for _, p := range rows {
		f.drop(p.ID)
		if !trimmed[p.ID] {
			e := &ledger.Entry{ID: p.ID, Owner: lease.Released, Released: true}
			candidates = append(candidates, e.SetCount(p.Count, xstream.OneMore(p.Count)))
		}
	}
	return candidates, len(rows) == f.cfg.Page, nil
}

// sweep looks at what has been idle for MinIdle: in the whole list of pending entries,
// as often as that may be, else among those of consumers that are gone.
func (f *Finder) sweep(ctx context.Context, pending int64) error {
	start, third := time.Now(), f.third()
	longest := sweepLimit * f.cfg.MinIdle
	if f.noConsumers {
		longest = third
	}
	// By the consumers that there are now: many may have come since.
	rest := func(took time.Duration) time.Duration {
		return min(sweepRest*took*time.Duration(max(1, f.consumers)), longest)
	}
	estimate := time.Duration(pending) * sweepCost
	if f.sweptAt.IsZero() && rest(estimate) > third {
		// Pretend a sweep just finished, so that consumers started together do not
		// sweep together.
		f.sweptAt, f.sweepTook = start, jitter(estimate)
	}
	switch {
	case start.Sub(f.sweptAt) >= rest(f.sweepTook):
		if err := f.sweepAll(ctx); err != nil {
			return err
		}
		// A server that stood still meanwhile does not say how long it takes.
		f.sweptAt, f.sweepTook = time.Now(), min(time.Since(start), 10*(estimate+time.Millisecond))
	case !f.noConsumers && start.Sub(f.goneAt) >= min(rest(f.goneTook), third):
		err := f.sweepGone(ctx)
		if redisx.IsDenied(err) {
			f.noConsumers = true // then in the whole list all the same
			return nil
		}
		if err != nil {
			return err
		}
		f.goneAt, f.goneTook = time.Now(), time.Since(start)
	}
	return nil
}

// sweepAll goes through the whole list, or goes on where it found too much.
func (f *Finder) sweepAll(ctx context.Context) error {
	if f.cursor == "" {
		f.cursor = "-"
	}
	whole := f.cursor == "-"
	again := make(map[string]sighting)
	next, err := f.sight(ctx, f.cursor, "", again)
	if err != nil {
		return err
	}
	f.cursor = next
	if whole && next == "" {
		f.cfg.Bounds.Candidates.Use(len(again) - len(f.seen))
		f.seen = again // what was not seen again was renewed, settled or claimed
	} else {
		f.remember(again)
	}
	return nil
}

// sweepGone looks at the entries of consumers that have done nothing for MinIdle: a
// holder would have renewed. What this costs does not grow with what the living hold.
func (f *Finder) sweepGone(ctx context.Context) error {
	// An idle one may have been removed: see sweep, and createConsumer.
	if err := f.cfg.Stream.CreateConsumer(ctx); err != nil && !redisx.IsDenied(err) {
		return err
	}
	consumers, err := f.cfg.Stream.Consumers(ctx)
	if err != nil {
		return err
	}
	again := make(map[string]sighting)
	for _, other := range consumers {
		if other.Pending == 0 || other.Idle < f.cfg.MinIdle || other.Name == lease.Released {
			continue
		}
		if _, err := f.sight(ctx, "-", other.Name, again); err != nil {
			return err
		}
	}
	f.remember(again)
	return nil
}

func (f *Finder) remember(again map[string]sighting) {
	for id, first := range again {
		_, known := f.seen[id]
		if !known && len(f.seen) >= f.most() {
			continue
		}
		if !known {
			f.cfg.Bounds.Candidates.Use(1)
		}
		f.seen[id] = first
	}
}

func (f *Finder) most() int { return f.cfg.Bounds.Most(&f.cfg.Bounds.Candidates, len(f.seen)) }

func (f *Finder) drop(id string) {
	if _, ok := f.seen[id]; ok {
		f.cfg.Bounds.Candidates.Use(-1)
		delete(f.seen, id)
	}
}

// Forget drops all that was seen.
func (f *Finder) Forget() {
	f.cfg.Bounds.Candidates.Use(-len(f.seen))
	clear(f.seen)
}

// sight adds what has been idle for MinIdle, from the ID start on, of one consumer or of
// all. It returns where to go on; "" at the end of the list.
func (f *Finder) sight(ctx context.Context, start, consumer string, again map[string]sighting) (next string, err error) {
	for most := f.most(); len(again) < most; {
		asked := time.Now()
		rows, err := f.cfg.Stream.Pending(ctx, f.cfg.MinIdle, start, "+", sweepPage, consumer)
		if err != nil {
			return "", err
		}
		at := time.Now()
		trimmed, err := f.ackTrimmed(ctx, rows)
		if err != nil {
			return "", err
		}
		for _, p := range rows {
			if p.Consumer == lease.Released || trimmed[p.ID] || f.cfg.Ledger.Has(p.ID) {
				continue
			}
			first, ok := f.seen[p.ID]
			if !ok || first.owner != p.Consumer || first.count != p.Count || p.Idle < first.idleBy(asked) {
				first = sighting{p.Consumer, p.Count, p.Idle, at} // it was touched since, or is new
			}
			again[p.ID] = first
		}
		if len(rows) < sweepPage {
			return "", nil
		}
		start = "(" + rows[len(rows)-1].ID
	}
	return start, nil
}

// ackTrimmed acks what was deleted from the stream while it was pending, of all that
// a dead consumer left at once: nobody can handle it any more.
func (f *Finder) ackTrimmed(ctx context.Context, rows []xstream.Pending) (map[string]bool, error) {
	ids := make([]string, 0, len(rows))
	for _, p := range rows {
		if !f.cfg.Ledger.Has(p.ID) {
			ids = append(ids, p.ID)
		}
	}
	trimmed, err := f.cfg.Stream.AckTrimmed(ctx, ids)
	if n := len(trimmed); n > 0 {
		f.trimmed += n
		f.Lost.Add(int64(n))
	}
	return trimmed, err
}

// sayTrimmed logs what ackTrimmed has found.
func (f *Finder) sayTrimmed() {
	if f.trimmed > 0 {
		f.cfg.Log.Error("Messages lost", lease.ErrTrimmed, f.cfg.Fields.Add(watermill.LogFields{"entries": f.trimmed}))
		f.trimmed = 0
	}
}

// ripe takes from what was seen that which was long enough ago, n at most.
func (f *Finder) ripe(n int) []*ledger.Entry {
	now := time.Now()
	var ripe []*ledger.Entry
	for id, first := range f.seen {
		since := first.at
		if f.steady.After(since) {
			since = f.steady
		}
		if now.Sub(since) >= f.third() {
			e := &ledger.Entry{ID: id, Owner: first.owner, Idle: first.idleBy(now)}
			ripe = append(ripe, e.SetCount(first.count, xstream.OneMore(first.count)))
		}
	}
	slices.SortFunc(ripe, func(a, b *ledger.Entry) int { return xstream.CompareIDs(a.ID, b.ID) })
	ripe = ripe[:min(len(ripe), max(0, n))] // the rest stays seen
	for _, e := range ripe {
		f.drop(e.ID)
	}
	return ripe
}

// janitor removes consumers that have been idle for long and hold nothing.
func (f *Finder) janitor(ctx context.Context) {
	now := time.Now()
	if f.noJanitor || now.Before(f.nextJanitor) {
		return
	}
	f.nextJanitor = now.Add(jitter(f.cfg.Timeout / 2))
	n, err := f.cfg.Stream.RemoveIdleConsumers(ctx, f.cfg.Timeout)
	switch {
	case redisx.IsDenied(err) || redisx.ReplyHas(err, "script"):
		f.noJanitor = true
		f.cfg.Log.Info("No right to remove idle consumers by a script; their names stay in the group", f.cfg.Fields)
	case err != nil:
		f.cfg.Log.Debug("Removing idle consumers failed: "+err.Error(), f.cfg.Fields)
	case n > 0:
		f.cfg.Log.Debug("Removed idle consumers", f.cfg.Fields)
	}
}

// jitter spreads a duration over [d/2, 3d/2).
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d/2 + rand.N(d)
}
