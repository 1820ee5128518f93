// Package takeover finds entries that dead consumers left in a group: entries that
// are pending for other consumers, and that nobody renews. It starts no goroutines,
// and knows nothing about handlers.
//
// Redis counts idle time also while no consumer can renew. So an entry is claimed only after
// it was found idle twice, and writes of ours were answered in between for long enough that a
// living consumer would have renewed; and only in the state that was found.
package takeover

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// sweepPage is the maximum number of rows per XPENDING.
	sweepPage = 500

	// A sweep that took the time t is not repeated before sweepRest * t * the
	// number of consumers, which all sweep: so sweeps cost the server at most a
	// twentieth of its time. If that pause is longer than a third of MinIdle, the
	// entries of idle consumers are looked at in between.
	sweepRest = 20

	// sweepCost is the server's time per pending entry (Redis 7.0; later versions
	// need a third). It estimates the first sweep, whose duration is not known yet.
	sweepCost = 60 * time.Nanosecond

	// sweepLimit * MinIdle is the longest pause between sweeps.
	sweepLimit = 10

	// The cost of XINFO GROUPS grows with the number of groups. Over all consumers
	// it takes at most a thousandth of the server's time; but it is sent at least
	// once per groupLimit.
	groupRest  = 1000
	groupLimit = time.Minute

	// reconnectTime is how long a living consumer may need after an outage until it
	// renews, if a third of MinIdle is shorter: after many failures go-redis dials
	// once a second, and renewals pause for up to 1.5 s.
	reconnectTime = 3 * time.Second
)

// RenewalsPerLease is how often a lease is renewed before it expires. An entry that
// was found idle gets one such period for its consumer to renew it.
const RenewalsPerLease = 3

// Config configures a Finder.
type Config struct {
	lease.Config // as of the Keeper
	Keeper       *lease.Keeper
	Bounds       *ledger.Bounds
	Interval     time.Duration // between two looks
	Page         int           // maximum of released entries offered at a time
}

// Finder finds abandoned entries.
type Finder struct {
	cfg  Config
	seen map[string]idleEntry

	// The last sweep of the whole list, and the last sweep of idle consumers.
	sweptAt, goneAt     time.Time
	sweepTook, goneTook time.Duration
	cursor              string // where a sweep that found too much continues
	noConsumers         bool   // XINFO CONSUMERS is denied

	good   time.Time // the last look without errors; at first, when the subscription was opened
	steady time.Time // since then writes have been answered, so a living consumer could renew; zero: the last look failed, or came late

	nextJanitor time.Time
	noJanitor   bool      // its script is denied
	nextGroup   time.Time // when to send XINFO GROUPS again
	consumers   int64     // by the last XINFO GROUPS
	trimmed     int       // entries that the current look found to be deleted
}

// idleEntry is an entry that was found idle for MinIdle.
type idleEntry struct {
	owner string
	count int64
	idle  time.Duration
	at    time.Time // not before the server looked
}

// idleBy returns the minimum idle time by now if nobody has touched the entry. If
// the server shows less, the entry was touched, or the server's clock was stepped.
func (s idleEntry) idleBy(now time.Time) time.Duration {
	elapsed := max(0, now.Sub(s.at)-time.Millisecond) // the server rounds to milliseconds
	return s.idle + elapsed - elapsed/100             // the server's clock may be slower
}

// New returns a Finder.
func New(cfg Config) *Finder {
	now := time.Now()
	return &Finder{cfg: cfg, seen: make(map[string]idleEntry), good: now, steady: now, nextJanitor: now.Add(Jitter(cfg.Timeout / 2))}
}

// Look looks once, and offers what it finds to the ledger.
func (f *Finder) Look(ctx context.Context) (ledger.Effects, error) {
	now := time.Now()
	if now.Sub(f.good) >= max(f.third(), 2*f.cfg.Interval) {
		f.steady = time.Time{} // this process may have been stopped together with the server
	}
	f.trimmed = 0
	candidates, more, err := f.look(ctx)
	f.cfg.Keeper.CountLost(f.trimmed, nil)
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
	mine, free := sum.Consumers[f.cfg.Stream.Consumer], sum.Consumers[lease.Released]
	sum.Count -= free
	ourOwn := sum.Count == mine && mine <= ours
	if ourOwn && free == 0 {
		return nil, false, nil
	}
	if err := f.probe(ctx); err != nil {
		return nil, false, err
	}
	if free > 0 && !f.cfg.Ledger.IsPaused() { // after a pause each consumer first takes what it has released itself
		candidates, more, err = f.released(ctx)
	}
	if err != nil || ourOwn {
		return candidates, more, err
	}
	if err := f.sweep(ctx, sum.Count); err != nil {
		return candidates, more, err
	}
	return append(candidates, f.ripe(ledger.MaxCandidates-f.cfg.Ledger.Candidates()-len(candidates))...), more, nil
}

// probe checks that the server answers writes, so that a living consumer could
// renew.
func (f *Finder) probe(ctx context.Context) error {
	sent := time.Now()
	if err := f.cfg.Keeper.Probe(ctx); err != nil {
		return err
	}
	now := time.Now()
	if now.Sub(sent) >= f.third() {
		f.steady = time.Time{} // it was delayed
	}
	if f.steady.IsZero() {
		f.steady = now
		if now.Sub(f.good) >= f.third() {
			f.steady = now.Add(reconnectTime)
		}
	}
	return nil
}

// group reads the group's position and its number of consumers.
func (f *Finder) group(ctx context.Context) error {
	start := time.Now()
	if start.Before(f.nextGroup) {
		return nil
	}
	consumers, err := f.cfg.Keeper.SeeGroup(ctx)
	if redisx.IsDenied(err) { // continue without it
		f.nextGroup = start.Add(groupLimit)
		return nil
	}
	if err != nil {
		return err
	}
	f.consumers = consumers
	f.nextGroup = start.Add(min(groupRest*time.Since(start)*time.Duration(max(1, consumers)), groupLimit))
	return nil
}

// released returns entries released by consumers that closed, and whether there are
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

// sweep looks for entries that have been idle for MinIdle: in the whole list of
// pending entries if that is due, otherwise among those of idle consumers.
func (f *Finder) sweep(ctx context.Context, pending int64) error {
	start, third := time.Now(), f.third()
	longest := sweepLimit * f.cfg.MinIdle
	if f.noConsumers {
		longest = third
	}
	// Use the current number of consumers: many may have joined since.
	rest := func(took time.Duration) time.Duration {
		return min(sweepRest*took*time.Duration(max(1, f.consumers)), longest)
	}
	estimate := time.Duration(pending) * sweepCost
	if f.sweptAt.IsZero() && rest(estimate) > third {
		// Pretend a sweep just finished, so that consumers started together do not
		// sweep together.
		f.sweptAt, f.sweepTook = start, Jitter(estimate)
	}
	switch {
	case start.Sub(f.sweptAt) >= rest(f.sweepTook):
		if err := f.sweepAll(ctx); err != nil {
			return err
		}
		// The duration means nothing if the server was frozen meanwhile, so limit
		// it.
		f.sweptAt, f.sweepTook = time.Now(), min(time.Since(start), 10*(estimate+time.Millisecond))
	case !f.noConsumers && start.Sub(f.goneAt) >= min(rest(f.goneTook), third):
		err := f.sweepGone(ctx)
		if redisx.IsDenied(err) {
			f.noConsumers = true // sweep the whole list instead
			return nil
		}
		if err != nil {
			return err
		}
		f.goneAt, f.goneTook = time.Now(), time.Since(start)
	}
	return nil
}

// sweepAll goes through the whole list, or continues where the previous sweep
// stopped.
func (f *Finder) sweepAll(ctx context.Context) error {
	if f.cursor == "" {
		f.cursor = "-"
	}
	whole := f.cursor == "-"
	again := make(map[string]idleEntry)
	next, err := f.scan(ctx, f.cursor, "", again)
	if err != nil {
		return err
	}
	f.cursor = next
	if whole && next == "" {
		f.cfg.Bounds.Candidates.Use(len(again) - len(f.seen))
		f.seen = again // entries not found again were renewed, settled or claimed
	} else {
		f.remember(again)
	}
	return nil
}

// sweepGone looks at the entries of consumers that have been idle for MinIdle: a
// living consumer would have renewed. Its cost does not depend on the entries of
// living consumers.
func (f *Finder) sweepGone(ctx context.Context) error {
	consumers, err := f.cfg.Stream.Consumers(ctx)
	if err != nil {
		return err
	}
	us := func(c xstream.ConsumerInfo) bool { return c.Name == f.cfg.Stream.Consumer }
	if !slices.ContainsFunc(consumers, us) { // it was removed as idle, or the group recreated: see sweep and CreateConsumer
		f.cfg.Keeper.SawMissing()
		if err := f.cfg.Stream.CreateConsumer(ctx); err != nil && !redisx.IsDenied(err) {
			return err
		}
	}
	again := make(map[string]idleEntry)
	for _, other := range consumers {
		if other.Pending == 0 || other.Idle < f.cfg.MinIdle || other.Name == lease.Released {
			continue
		}
		if _, err := f.scan(ctx, "-", other.Name, again); err != nil {
			return err
		}
	}
	f.remember(again)
	return nil
}

func (f *Finder) remember(again map[string]idleEntry) {
	for id, first := range again {
		if _, known := f.seen[id]; !known {
			if len(f.seen) >= f.most() {
				continue
			}
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

// Forget drops all entries found idle.
func (f *Finder) Forget() {
	f.cfg.Bounds.Candidates.Use(-len(f.seen))
	clear(f.seen)
}

// scan adds the entries that have been idle for MinIdle, from the ID start, of one
// consumer or of all. It returns where to continue; "" at the end of the list.
func (f *Finder) scan(ctx context.Context, start, consumer string, again map[string]idleEntry) (next string, err error) {
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
				first = idleEntry{p.Consumer, p.Count, p.Idle, at} // touched since, or new
			}
			again[p.ID] = first
		}
		if len(rows) < sweepPage {
			return "", nil
		}
		start = xstream.After(rows[len(rows)-1].ID)
	}
	return start, nil
}

// ackTrimmed acks entries that were deleted from the stream while pending, all that
// a dead consumer left at once: nobody can handle them any more.
func (f *Finder) ackTrimmed(ctx context.Context, rows []xstream.Pending) (map[string]bool, error) {
	ids := make([]string, 0, len(rows))
	for _, p := range rows {
		if !f.cfg.Ledger.Has(p.ID) {
			ids = append(ids, p.ID)
		}
	}
	trimmed, err := f.cfg.Stream.AckTrimmed(ctx, ids)
	f.trimmed += len(trimmed)
	return trimmed, err
}

// ripe removes from seen and returns the entries that were found idle long enough
// ago, at most n.
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
	ripe = ripe[:min(len(ripe), max(0, n))] // the rest stays in seen
	for _, e := range ripe {
		f.drop(e.ID)
	}
	return ripe
}

// janitor removes consumers that have been idle for Timeout and have nothing
// pending.
func (f *Finder) janitor(ctx context.Context) {
	now := time.Now()
	if f.noJanitor || now.Before(f.nextJanitor) {
		return
	}
	f.nextJanitor = now.Add(Jitter(f.cfg.Timeout / 2))
	n, err := f.cfg.Stream.RemoveIdleConsumers(ctx, f.cfg.Timeout)
	switch {
	case redisx.IsDenied(err) || redisx.ReplyHas(err, "script"):
		f.noJanitor = true
		f.cfg.Log.Info("No permission to remove idle consumers by a script; their names remain in the group", f.cfg.Fields)
	case err != nil:
		f.cfg.Log.Debug("Removing idle consumers failed: "+err.Error(), f.cfg.Fields)
	case n > 0:
		f.cfg.Log.Debug("Removed idle consumers", f.cfg.Fields)
	}
}

// Jitter returns a random duration from [d/2, 3d/2).
func Jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d/2 + rand.N(d)
}
