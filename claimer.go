package goxstreams

import (
	"context"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// releasedConsumer is the name that released entries are parked under. No
	// process reads in it.
	releasedConsumer = "released"

	// maxCandidates bounds the entries that a Subscriber's claimers keep in mind.
	maxCandidates = 10_000

	// sweepPage is the rows of one XPENDING.
	sweepPage = 500

	// A sweep that took the time t is not repeated before sweepRest * t, times
	// the number of consumers, which do the same: sweeping costs the server a
	// twentieth of its time at most, however long the list of pending entries.
	// To find what the dead have left in time, consumers that are gone are looked
	// at in between, where the rest is more than a third of ClaimMinIdle.
	sweepRest = 20

	// sweepCost is the server's time for an entry of the list (Redis 7.0; later
	// ones take a third), for the first sweep, whose time is not known yet.
	sweepCost = 60 * time.Nanosecond

	// sweepLimit * ClaimMinIdle is the longest rest.
	sweepLimit = 10

	// XINFO GROUPS, of which the cost grows with the stream's groups, takes a
	// thousandth of the server's time at most, over all consumers; and is asked once
	// in groupLimit at least.
	groupRest  = 1000
	groupLimit = time.Minute

	// maxTrims bounds what one tick deletes for DeleteAcked: a hundred entries each.
	maxTrims = 50

	// reconnectTime is what a living holder may need after an outage until it
	// renews, where a third of ClaimMinIdle is less: go-redis dials once a second
	// after many failures, and the keeper pauses for up to 1.5 s.
	reconnectTime = 3 * time.Second

	// renewalsPerLease is how often a lease is renewed before it runs out. A
	// sighted entry gets that much time for its holder to be heard of again.
	renewalsPerLease = 3
)

// sighting is an entry that was seen idle for ClaimMinIdle.
type sighting struct {
	count    int64
	at       time.Time     // not before the server looked
	answered time.Duration // the claimer's answered time then
	own      bool          // in our own name, by a command whose answer was lost
}

// claimer looks for pending entries whose holders are gone, and keeps the
// leases of those that this process holds.
//
// Redis counts idle time also while it is frozen or down, when no holder can
// renew: after an outage all that is pending looks abandoned. So an entry is
// claimed on two sightings, between which Redis answered for long enough that a
// living holder has renewed. The second sighting is the claim's own min-idle.
type claimer struct {
	s *subscription

	seen map[string]sighting
	// The last sweep of the whole list, and the last one for consumers that are
	// gone.
	sweptAt, goneAt     time.Time
	sweepTook, goneTook time.Duration
	cursor              string // where the sweep goes on that found too much
	noConsumers         bool   // XINFO CONSUMERS is denied

	answered  time.Duration // time in which Redis answered
	lastReply time.Time     // zero: the last command failed
	lastGood  time.Time     // the last reply at all
	resumeAt  time.Time     // after an outage: nothing is claimed before

	nextJanitor time.Time
	nextGroup   time.Time // XINFO GROUPS is asked again
	consumers   int64     // by its last answer

	trimmed int // entries that the sweep under way found deleted

	waitedSince  time.Time // a suspect waits for its turn since then
	nextSuspects time.Time // no suspect is offered before

	// Held by each round of renewals: what is released after it is in nobody's
	// renewal any more.
	renewing sync.Mutex

	stop       chan struct{}
	done, kept chan struct{}
}

func newClaimer(s *subscription) *claimer {
	return &claimer{
		s: s, seen: make(map[string]sighting),
		stop: make(chan struct{}), done: make(chan struct{}), kept: make(chan struct{}),
	}
}

// halt ends both goroutines. The keeper goes on until here: messages are in
// hand while the subscription drains.
func (c *claimer) halt() {
	close(c.stop)
	if !c.s.fanOut() {
		<-c.done
	}
	if c.s.leased() {
		<-c.kept
	}
}

// run ticks until the subscription closes.
func (c *claimer) run() {
	defer close(c.done)
	defer c.forget()
	s := c.s
	c.nextJanitor = time.Now().Add(jitter(s.cfg.ConsumerTimeout / 2))
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.closing:
			return
		}
		if err := c.tick(s.ctx); err != nil {
			c.lastReply = time.Time{}
			s.markFailed(dutyLook, err)
			if xstream.GroupLost(err) {
				_ = s.regroup() // tried again at the next tick
			}
		} else {
			s.markHealthy(dutyLook)
		}
		timer.Reset(s.shared.untilTick())
	}
}

// tick is one look at the group.
func (c *claimer) tick(ctx context.Context) error {
	s := c.s
	start := time.Now()
	pending, _, err := s.stream.PendingSummary(ctx)
	if err != nil {
		return err
	}
	c.answer(start)
	if err := c.group(ctx); err != nil {
		return err
	}
	c.janitor(ctx)
	if !s.leased() {
		return nil
	}
	if err := c.trim(ctx); err != nil {
		return err
	}
	if pending > s.leases.pendingSince(start) { // else all that is pending is ours
		defer c.sayTrimmed()
		if err := c.findReleased(ctx); err != nil {
			return err
		}
		if err := c.sweep(ctx, pending); err != nil {
			return err
		}
	} else {
		c.forget()
	}
	if s.offerClaims(c.ripe()) {
		s.reader.seat.Wake() // the reader stops for suspects
	}
	if len(c.seen) == 0 && !s.leases.claiming() {
		s.markHealthy(dutyClaim) // what could not be claimed is settled, or in other hands
	}
	c.patience()
	return nil
}

// group looks at how far the group has got, and how many consumers it has.
func (c *claimer) group(ctx context.Context) error {
	start := time.Now()
	if start.Before(c.nextGroup) {
		return nil
	}
	info, err := c.s.stream.GroupInfo(ctx)
	if redisx.IsDenied(err) { // then without what it tells
		c.nextGroup = start.Add(groupLimit)
		return nil
	}
	if err != nil {
		return err
	}
	c.consumers = info.Consumers
	c.s.sawGroup(info.LastDelivered)
	c.nextGroup = start.Add(min(groupRest*time.Since(start)*time.Duration(max(1, info.Consumers)), groupLimit))
	return nil
}

// trim deletes what DeleteAcked had to keep for a fan-out, once that has come to it.
func (c *claimer) trim(ctx context.Context) error {
	s := c.s
	if s.deletes == xstream.DeleteNever || !s.kept.Swap(false) {
		return nil
	}
	for range maxTrims {
		more, later, err := s.stream.TrimAcked(ctx)
		if redisx.IsDenied(err) {
			s.once.trim.Do(func() {
				s.log.Info("No right to delete by a script what a fan-out needed longer than the group did; it stays in the stream: "+err.Error(), s.logFields)
			})
			return nil
		}
		if err != nil || later {
			s.kept.Store(true)
		}
		if err != nil || !more {
			return err
		}
	}
	s.kept.Store(true) // there is more
	return nil
}

// suspectPatience is the part of ClaimMinIdle that a subscription stands still
// for a suspect's turn. If its handlers take longer, it goes on for a whole
// ClaimMinIdle before it tries again: other consumers may have better luck, and
// one slow handler must not stop the topic.
const suspectPatience = 6

// patience ends the wait for a suspect's turn when it has lasted too long.
func (c *claimer) patience() {
	s := c.s
	now := time.Now()
	if !s.suspectsWait() {
		c.waitedSince = time.Time{}
		return
	}
	if c.waitedSince.IsZero() {
		c.waitedSince = now
	}
	if now.Sub(c.waitedSince) < s.cfg.ClaimMinIdle/suspectPatience {
		return
	}
	n := s.dropSuspects()
	c.waitedSince = time.Time{}
	c.nextSuspects = now.Add(s.cfg.ClaimMinIdle)
	s.log.Info("Messages suspected of crashing their process wait until nothing else is in flight", s.logFields.Add(watermill.LogFields{"entries": n}))
}

// answer counts the time since the last reply as time in which Redis answered.
// A gap much longer than a tick says nothing: this process may have been stopped
// together with the server.
func (c *claimer) answer(sent time.Time) {
	now, third := time.Now(), c.s.cfg.ClaimMinIdle/renewalsPerLease
	outage := c.lastReply.IsZero() || now.Sub(sent) >= third
	if outage && !c.lastGood.IsZero() && now.Sub(c.lastGood) >= third {
		c.resumeAt = now.Add(reconnectTime)
	}
	c.lastGood = now
	if !c.lastReply.IsZero() {
		c.answered += min(max(0, sent.Sub(c.lastReply)), 2*c.s.cfg.ClaimInterval)
	}
	c.lastReply = now
}

// findReleased offers what was released by consumers that closed.
func (c *claimer) findReleased(ctx context.Context) error {
	s := c.s
	if s.claimRoom() == 0 {
		return nil
	}
	rows, err := s.stream.Pending(ctx, 0, "-", "+", max(s.cfg.BatchSize, s.cfg.MaxConcurrency), releasedConsumer)
	if err != nil {
		return err
	}
	trimmed, err := c.ackTrimmed(ctx, rows)
	if err != nil {
		return err
	}
	now := time.Now()
	hs := make([]*held, 0, len(rows))
	for _, p := range rows {
		c.drop(p.ID)
		if trimmed[p.ID] {
			continue
		}
		hs = append(hs, &held{id: p.ID, count: p.Count, next: oneMore(p.Count), since: now.Add(-p.Idle), released: true})
	}
	s.offerClaims(hs)
	return nil
}

// sweep sights what has been idle for ClaimMinIdle: in the whole list of pending
// entries, as often as that may be, else among those of consumers that are gone.
func (c *claimer) sweep(ctx context.Context, pending int64) error {
	s := c.s
	start, third := time.Now(), s.cfg.ClaimMinIdle/renewalsPerLease
	longest := sweepLimit * s.cfg.ClaimMinIdle
	if c.noConsumers {
		longest = third
	}
	// By the consumers that there are now: many may have come since.
	rest := func(took time.Duration) time.Duration {
		return min(sweepRest*took*time.Duration(max(1, c.consumers)), longest)
	}
	estimate := time.Duration(pending) * sweepCost
	if c.sweptAt.IsZero() && rest(estimate) > third {
		// As if there had been one: those that come together must not sweep together.
		c.sweptAt, c.sweepTook = start, jitter(estimate)
	}
	switch {
	case start.Sub(c.sweptAt) >= rest(c.sweepTook):
		if err := c.sweepAll(ctx); err != nil {
			return err
		}
		// A server that stood still meanwhile does not say how long it takes.
		c.sweptAt, c.sweepTook = time.Now(), min(time.Since(start), 10*(estimate+time.Millisecond))
	case !c.noConsumers && start.Sub(c.goneAt) >= min(rest(c.goneTook), third):
		err := c.sweepGone(ctx)
		if redisx.IsDenied(err) {
			c.noConsumers = true // then in the whole list all the same
			return nil
		}
		if err != nil {
			return err
		}
		c.goneAt, c.goneTook = time.Now(), time.Since(start)
	}
	return nil
}

// sweepAll goes through the whole list, or goes on where it found too much.
func (c *claimer) sweepAll(ctx context.Context) error {
	if c.cursor == "" {
		c.cursor = "-"
	}
	whole := c.cursor == "-"
	again := make(map[string]sighting)
	next, err := c.sight(ctx, c.cursor, "", again)
	if err != nil {
		return err
	}
	c.cursor = next
	if whole && next == "" {
		c.s.shared.candidates.used.Add(int64(len(again) - len(c.seen)))
		c.seen = again // what was not seen again was renewed, settled or claimed
	} else {
		c.remember(again)
	}
	return nil
}

// sweepGone looks at the entries of consumers that have done nothing for
// ClaimMinIdle: a holder would have renewed. What this costs does not grow with what
// the living hold.
func (c *claimer) sweepGone(ctx context.Context) error {
	s := c.s
	// An idle one may have been removed: see sweep, and createConsumer.
	if err := s.stream.CreateConsumer(ctx); err != nil && !redisx.IsDenied(err) {
		return err
	}
	consumers, err := s.stream.Consumers(ctx)
	if err != nil {
		return err
	}
	again := make(map[string]sighting)
	for _, other := range consumers {
		if other.Pending == 0 || other.Idle < s.cfg.ClaimMinIdle || other.Name == releasedConsumer {
			continue
		}
		if _, err := c.sight(ctx, "-", other.Name, again); err != nil {
			return err
		}
	}
	c.remember(again)
	return nil
}

// sayTrimmed logs what ackTrimmed has found in a sweep.
func (c *claimer) sayTrimmed() {
	if c.trimmed > 0 {
		c.s.log.Error("Messages lost", errTrimmed, c.s.logFields.Add(watermill.LogFields{"entries": c.trimmed}))
		c.trimmed = 0
	}
}

func (c *claimer) remember(again map[string]sighting) {
	for id, first := range again {
		if _, ok := c.seen[id]; !ok && len(c.seen) < c.mostSeen() {
			c.s.shared.candidates.used.Add(1)
			c.seen[id] = first
		}
	}
}

func (c *claimer) mostSeen() int { return c.s.shared.most(&c.s.shared.candidates, len(c.seen)) }

func (c *claimer) drop(id string) {
	if _, ok := c.seen[id]; ok {
		c.s.shared.candidates.used.Add(-1)
		delete(c.seen, id)
	}
}

// forget is said of the sightings that are not kept any more.
func (c *claimer) forget() {
	c.s.shared.candidates.used.Add(-int64(len(c.seen)))
	clear(c.seen)
}

// sight adds what has been idle for ClaimMinIdle, from the ID start on, of one
// consumer or of all. It returns where to go on; "" at the end of the list.
func (c *claimer) sight(ctx context.Context, start, consumer string, again map[string]sighting) (next string, err error) {
	s := c.s
	for most := c.mostSeen(); len(again) < most; {
		rows, err := s.stream.Pending(ctx, s.cfg.ClaimMinIdle, start, "+", sweepPage, consumer)
		if err != nil {
			return "", err
		}
		at := time.Now()
		trimmed, err := c.ackTrimmed(ctx, rows)
		if err != nil {
			return "", err
		}
		for _, p := range rows {
			if p.Consumer == releasedConsumer || trimmed[p.ID] || s.leases.has(p.ID) {
				continue
			}
			first, ok := c.seen[p.ID]
			if !ok || first.count != p.Count {
				first = sighting{p.Count, at, c.answered, p.Consumer == s.stream.Consumer}
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
func (c *claimer) ackTrimmed(ctx context.Context, rows []xstream.Pending) (map[string]bool, error) {
	s := c.s
	ids := make([]string, 0, len(rows))
	for _, p := range rows {
		if !s.leases.has(p.ID) {
			ids = append(ids, p.ID)
		}
	}
	trimmed, err := s.stream.AckTrimmed(ctx, ids)
	if n := len(trimmed); n > 0 {
		c.trimmed += n
		s.stats.lost.Add(int64(n))
	}
	return trimmed, err
}

// ripe takes from the sightings those that are old enough.
func (c *claimer) ripe() []*held {
	s := c.s
	now := time.Now()
	if now.Before(c.resumeAt) {
		return nil
	}
	var hs []*held
	for id, first := range c.seen {
		if oneMore(first.count) >= s.retry.suspectFrom() && now.Before(c.nextSuspects) {
			continue
		}
		if min(c.answered-first.answered, now.Sub(first.at)) >= s.cfg.ClaimMinIdle/renewalsPerLease {
			hs = append(hs, &held{
				id: id, count: first.count, next: oneMore(first.count),
				since: first.at.Add(-s.cfg.ClaimMinIdle), orphan: first.own,
			})
		}
	}
	slices.SortFunc(hs, func(a, b *held) int { return xstream.CompareIDs(a.id, b.id) })
	hs = hs[:min(len(hs), s.claimRoom())] // the rest stays sighted
	for _, h := range hs {
		c.drop(h.id)
	}
	return hs
}

// oneMore stays at the greatest count, which XNACK FATAL sets.
func oneMore(count int64) int64 { return count + min(1, math.MaxInt64-count) }

// janitor removes consumers that have been idle for long and hold nothing.
func (c *claimer) janitor(ctx context.Context) {
	s := c.s
	now := time.Now()
	if now.Before(c.nextJanitor) {
		return
	}
	c.nextJanitor = now.Add(jitter(s.cfg.ConsumerTimeout / 2))
	n, err := s.stream.RemoveIdleConsumers(ctx, s.cfg.ConsumerTimeout)
	switch {
	case redisx.IsDenied(err) || redisx.ReplyHas(err, "script"):
		s.once.janitor.Do(func() {
			s.log.Info("No right to remove idle consumers by a script; their names stay in the group", s.logFields)
		})
	case err != nil:
		s.log.Debug("Removing idle consumers failed: "+err.Error(), s.logFields)
	case n > 0:
		s.log.Debug("Removed idle consumers", s.logFields)
	}
}

// keep renews leases until halt. What was confirmed in the last sixth of
// ClaimMinIdle is left for the next round, so that each lease is renewed within
// a third.
func (c *claimer) keep() {
	defer close(c.kept)
	s := c.s
	every := s.cfg.ClaimMinIdle / (2 * renewalsPerLease)
	pause := backoff{}
	timer := time.NewTimer(every)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-c.stop:
			return
		}
		next := every
		if err := c.renew(every * 9 / 10); err != nil {
			s.markFailed(dutyRenew, err)
			if xstream.GroupLost(err) {
				_ = s.regroup()
			}
			pause.d = min(max(minBackoff, 2*pause.d), maxBackoff)
			next = min(every, jitter(pause.d))
		} else {
			pause.reset()
			s.markHealthy(dutyRenew)
		}
		timer.Reset(next)
	}
}

// renew renews what was not confirmed for age.
func (c *claimer) renew(age time.Duration) error {
	s := c.s
	c.renewing.Lock()
	defer c.renewing.Unlock()
	for hs := range slices.Chunk(s.leases.renewals(age), xstream.MaxRenewal) {
		ids := make([]string, len(hs))
		for i, h := range hs {
			ids[i] = h.id
		}
		sent := time.Now()
		renewed, trimmed, err := s.stream.Renew(s.ctx, ids)
		if err != nil {
			return err // the others would wait for the same answer
		}
		now := time.Now()
		var gone []*held
		for _, h := range hs {
			switch {
			case renewed[h.id]:
				s.leases.confirm(sent, now, h)
			case trimmed[h.id]:
				gone = append(gone, h)
			case s.leases.stillOurs(h):
				if _, err := s.verify(h); err != nil {
					s.trimmed(gone...)
					return err
				}
			}
		}
		s.trimmed(gone...)
	}
	return nil
}
