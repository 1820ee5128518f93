package goxstreams

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
)

const (
	// releasedConsumer is the name that released entries are parked under. No
	// process reads in it.
	releasedConsumer = "released"

	// releasedMinAge keeps two claimers that found the same released entry
	// apart: the second one's min-idle is what it saw plus the time since, which
	// an entry that was claimed in between does not show unless the second
	// command took longer than this to arrive.
	releasedMinAge = 100 * time.Millisecond

	// maxSightings bounds the entries that a claimer keeps in mind.
	maxSightings = 10_000

	// sweepPage is the rows of one XPENDING.
	sweepPage = 500

	// A sweep that took the time t is not repeated before sweepRest * t, times
	// the number of consumers, which do the same: sweeping costs the server a
	// twentieth of its time at most, however long the list of pending entries.
	sweepRest = 20

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

	seen      map[string]sighting
	cursor    string // where the sweep goes on that found too much
	nextSweep time.Time

	answered  time.Duration // time in which Redis answered
	lastReply time.Time     // zero: the last command failed
	lastGood  time.Time     // the last reply at all
	resumeAt  time.Time     // after an outage: nothing is claimed before

	nextJanitor time.Time

	waitedSince  time.Time // a suspect waits for its turn since then
	nextSuspects time.Time // no suspect is offered before

	orphaned atomic.Bool // a claim failed, and may have happened

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
			s.failing(dutyLook, err)
			if groupLost(err) {
				_ = s.regroup() // tried again at the next tick
			}
		} else {
			s.works(dutyLook)
		}
		timer.Reset(s.cfg.ClaimInterval - s.cfg.ClaimInterval/10 + jitter(s.cfg.ClaimInterval/10))
	}
}

// tick is one look at the group.
func (c *claimer) tick(ctx context.Context) error {
	s := c.s
	start := time.Now()
	info, err := s.stream.groupInfo(ctx)
	switch {
	case err == nil:
		s.sawGroup(info.lastDelivered)
	case denied(err): // then without what it tells
		if info.pending, err = s.stream.pendingCount(ctx); err != nil {
			return err
		}
	default:
		return err
	}
	c.answer(start)
	c.janitor(ctx)
	if !s.leased() {
		return nil
	}

	if c.orphaned.Swap(false) {
		if err := s.findOrphans(ctx); err != nil {
			c.orphaned.Store(true)
			return err
		}
	}
	if info.pending > s.leases.pendingSince(start) { // else all that is pending is ours
		if err := c.findReleased(ctx); err != nil {
			return err
		}
		if err := c.sweep(ctx, max(1, info.consumers)); err != nil {
			return err
		}
	} else {
		clear(c.seen)
	}
	if s.offerClaims(c.ripe()) {
		s.reader.interrupt(s.readerParked)
	}
	c.patience()
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
	rows, err := s.stream.pending(ctx, releasedMinAge, "-", "+", max(s.cfg.BatchSize, s.cfg.MaxConcurrency), releasedConsumer)
	if err != nil {
		return err
	}
	now := time.Now()
	hs := make([]*held, 0, len(rows))
	for _, p := range rows {
		delete(c.seen, p.id)
		hs = append(hs, &held{id: p.id, count: p.count, next: p.count + 1, since: now.Add(-p.idle), released: true})
	}
	s.offerClaims(hs)
	return nil
}

// sweep sights what has been idle for ClaimMinIdle.
func (c *claimer) sweep(ctx context.Context, consumers int64) error {
	s := c.s
	start := time.Now()
	if start.Before(c.nextSweep) {
		return nil
	}
	if c.cursor == "" {
		c.cursor = "-"
	}
	again := make(map[string]sighting)
	whole := c.cursor == "-"
	for {
		rows, err := s.stream.pending(ctx, s.cfg.ClaimMinIdle, c.cursor, "+", sweepPage, "")
		if err != nil {
			return err
		}
		at := time.Now()
		for _, p := range rows {
			if p.consumer == releasedConsumer || s.leases.has(p.id) {
				continue
			}
			first, ok := c.seen[p.id]
			if !ok || first.count != p.count {
				first = sighting{p.count, at, c.answered}
			}
			again[p.id] = first
		}
		if len(rows) < sweepPage {
			c.cursor = "-"
			break
		}
		c.cursor = "(" + rows[len(rows)-1].id
		whole = whole && len(again) < maxSightings
		if len(again) >= maxSightings {
			break
		}
	}
	if whole {
		c.seen = again // what was not seen again was renewed, settled or claimed
	} else {
		for id, first := range again {
			if len(c.seen) < maxSightings {
				c.seen[id] = first
			}
		}
	}
	// But never so late that the dead are not noticed: one sweep may have met a
	// server that stood still.
	rest := min(sweepRest*time.Since(start)*time.Duration(consumers), s.cfg.ClaimMinIdle/renewalsPerLease)
	c.nextSweep = time.Now().Add(rest)
	return nil
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
		if first.count+1 >= s.retry.suspectFrom() && now.Before(c.nextSuspects) {
			continue
		}
		if min(c.answered-first.answered, now.Sub(first.at)) >= s.cfg.ClaimMinIdle/renewalsPerLease {
			delete(c.seen, id)
			hs = append(hs, &held{
				id: id, count: first.count, next: first.count + 1,
				since: first.at.Add(-s.cfg.ClaimMinIdle),
			})
		}
	}
	slices.SortFunc(hs, func(a, b *held) int { return compareIDs(a.id, b.id) })
	return hs
}

// janitor removes consumers that have been idle for long and hold nothing.
func (c *claimer) janitor(ctx context.Context) {
	s := c.s
	now := time.Now()
	if now.Before(c.nextJanitor) {
		return
	}
	c.nextJanitor = now.Add(jitter(s.cfg.ConsumerTimeout / 2))
	n, err := s.stream.removeIdleConsumers(ctx, s.cfg.ConsumerTimeout)
	switch {
	case noScripts(err) || replyHas(err, "script"):
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
			s.failing(dutyRenew, err)
			if groupLost(err) {
				_ = s.regroup()
			}
			pause.d = min(max(minBackoff, 2*pause.d), maxBackoff)
			next = min(every, jitter(pause.d))
		} else {
			pause.reset()
			s.works(dutyRenew)
		}
		timer.Reset(next)
	}
}

// renew renews what was not confirmed for age.
func (c *claimer) renew(age time.Duration) error {
	s := c.s
	c.renewing.Lock()
	defer c.renewing.Unlock()
	for _, r := range s.leases.renewals(age) {
		ids := make([]string, len(r.held))
		for i, h := range r.held {
			ids[i] = h.id
		}
		got, err := s.stream.renew(s.ctx, time.Since(r.youngest), ids)
		if err != nil {
			return err // the others would wait for the same answer
		}
		now := time.Now()
		for _, h := range r.held {
			if got[h.id] {
				s.leases.confirm(now, h)
			} else if s.leases.stillOurs(h) {
				if _, err := s.verify(h); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
