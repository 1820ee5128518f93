package goxstreams

import (
	"fmt"
	"time"
)

// This file decides who does what next: what a slot takes, whether there is room
// for a read, and when a nacked message is due.

// enqueue takes what the reader read at the moment given.
func (s *subscription) enqueue(entries []entry, at time.Time) {
	if len(entries) == 0 {
		return
	}
	batch := make([]held, len(entries)) // one allocation for the whole batch
	hs := make([]*held, len(entries))
	for i, e := range entries {
		batch[i] = held{id: e.id, fields: e.fields, count: 1, next: 2, state: queued, since: at}
		if e.fields == nil {
			batch[i].fields = []string{}
		}
		hs[i] = &batch[i]
	}
	s.regrouping.Lock()
	if id := entries[len(entries)-1].id; compareIDs(id, s.lastRead) > 0 {
		s.lastRead = id
	}
	s.regrouping.Unlock()
	hs = s.leases.add(hs)
	s.mu.Lock()
	s.queue = append(s.queue, hs...)
	s.rouseLocked(len(hs))
	late := s.drained
	s.mu.Unlock()
	if late { // an answer that Close did not wait for
		if s.cfg.NoAck {
			s.stats.lost.Add(int64(len(hs)))
		}
		s.releaseHeld()
	}
}

// offerClaims takes entries that look like nobody's; a slot with nothing else
// to do will claim them. It returns whether suspects are among what waits.
func (s *subscription) offerClaims(hs []*held) (suspects bool) {
	hs = s.leases.add(hs)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		s.leases.remove(hs...)
		return false
	}
	for _, h := range hs {
		switch {
		case h.next == h.count && h.count == 1:
			s.queue = append(s.queue, h) // read here, but the answer was lost: it keeps its place
		case h.next >= s.retry.suspectFrom() && !h.released:
			s.suspects = append(s.suspects, h)
		default:
			s.claims = append(s.claims, h)
		}
	}
	s.rouseLocked(len(hs))
	return len(s.suspects) > 0
}

// readerParked reports whether the reader has stopped for the suspects, or need not.
func (s *subscription) readerParked() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.parked || s.stopping || len(s.suspects) == 0
}

// suspectsWait reports whether a suspect waits for its turn.
func (s *subscription) suspectsWait() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.suspects) > 0 && !s.alone
}

// dropSuspects lets the subscription go on without them.
func (s *subscription) dropSuspects() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	dropped := s.suspects
	s.suspects = nil
	s.leases.remove(dropped...)
	s.rouseLocked(s.cfg.MaxConcurrency)
	s.signalRoomLocked()
	return len(dropped)
}

// next returns the next entry for a slot, or nil when there is no more work.
func (s *subscription) next() *held {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if h := s.takeLocked(); h != nil {
			s.busy++
			s.signalRoomLocked()
			return h
		}
		if s.stopping && (s.drained || !s.cfg.NoAck) {
			s.started--
			return nil
		}
		s.idle++
		s.ready.Wait() // who wakes it has taken it off idle
	}
}

func (s *subscription) takeLocked() *held {
	switch {
	case s.stopping:
		if s.cfg.NoAck { // cannot be released: whoever still reads gets it
			return shift(&s.queue)
		}
		return nil
	case s.alone:
		return nil
	case len(s.suspects) > 0:
		// A suspect is handled with nothing else in flight: what is there comes
		// to its end, nothing new is taken.
		if h := shift(&s.queue); h != nil {
			return h
		}
		if s.parked && s.busy == 0 && s.leases.active() == 0 {
			s.alone = true
			return shift(&s.suspects)
		}
		return nil
	case len(s.retries) > 0 && !time.Now().Before(s.retries[0].due):
		return s.retries.pop()
	case len(s.claims) > 0:
		return shift(&s.claims)
	}
	return shift(&s.queue)
}

func shift(q *[]*held) *held {
	if len(*q) == 0 {
		return nil
	}
	h := (*q)[0]
	(*q)[0] = nil
	*q = (*q)[1:]
	return h
}

// free notes that a slot has nothing in hand any more.
func (s *subscription) free() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
	if s.alone {
		s.alone = false
		s.rouseLocked(s.cfg.MaxConcurrency)
	}
	s.signalRoomLocked()
}

// settled lets a suspect's turn come when acks have arrived.
func (s *subscription) settled() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.suspects) > 0 {
		s.rouseLocked(1)
	}
	s.signalRoomLocked()
}

// rouseLocked sees to it that n slots look for work.
func (s *subscription) rouseLocked(n int) {
	for ; n > 0 && s.idle > 0; n-- {
		s.idle--
		s.ready.Signal()
	}
	if s.stopping && (s.drained || !s.cfg.NoAck) {
		return
	}
	for ; n > 0 && s.started < s.cfg.MaxConcurrency; n-- {
		s.started++
		s.slots.Go(s.slot)
	}
}

// signalRoomLocked makes the reader look again, if there is room now.
func (s *subscription) signalRoomLocked() {
	if !s.parked || s.roomLocked() == 0 {
		return
	}
	select {
	case s.room <- struct{}{}:
	default:
	}
}

// awaitRoom waits until there is room for a read, and returns for how many
// entries; 0 when the subscription stops.
func (s *subscription) awaitRoom(r *reader) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.stopping {
		if s.roomLocked() > 0 {
			s.prefetch = r.adapt(s.prefetch, s.cfg.BatchSize)
			if room := s.roomLocked(); room > 0 {
				s.parked = false
				return min(room, s.cfg.BatchSize)
			}
		}
		s.parked = true
		if len(s.suspects) > 0 {
			s.rouseLocked(1)
		}
		s.mu.Unlock()
		select {
		case <-s.room:
		case <-s.closing:
		}
		s.mu.Lock()
	}
	return 0
}

// roomLocked returns how many entries may be read now: one for each free slot,
// and the prefetch once half of the last one is consumed, so that the handlers
// have the other half meanwhile. One and a half times BatchSize, and the slots,
// bound what is held.
func (s *subscription) roomLocked() int {
	if s.alone || len(s.suspects) > 0 || len(s.queue) > s.prefetch/2 {
		return 0
	}
	if len(s.claims) >= s.cfg.MaxConcurrency { // they go first
		return 0
	}
	if s.leased() && s.acker.backlog() >= maxUnconfirmed {
		return 0
	}
	return max(0, s.cfg.MaxConcurrency-s.busy-len(s.claims)) + s.prefetch
}

// wait schedules the entry's next delivery.
func (s *subscription) wait(h *held, delay time.Duration) {
	if s.isClosing() {
		s.giveBack(h, h.count)
		return
	}
	h.due = time.Now().Add(delay)
	if s.fanOut() {
		h.count++
	}
	if !s.leases.move(h, waiting, nil) {
		s.leases.remove(h)
		return
	}
	if !s.pushRetry(h) { // close came in between
		s.giveBack(h, h.count)
	}
}

func (s *subscription) pushRetry(h *held) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.retries.push(h)
	if len(s.retries) > maxWaiting && s.leased() {
		s.leases.remove(s.retries.dropLatest())
		s.once.overflow.Do(func() {
			s.log.Error("Very many messages wait for a retry", fmt.Errorf(
				"more than %d: those that wait longest come again when their leases have run out, which may be later than they are due", maxWaiting), s.logFields)
		})
	}
	if s.timer == nil || h.due.Before(s.timerAt) {
		s.armLocked(h.due)
	}
	return true
}

func (s *subscription) manyWait() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.retries) >= maxWaiting
}

// again sees to the entry's next delivery: with MaxConcurrency 1 in this very
// slot, which it then returns true for, else when a slot is free.
func (s *subscription) again(h *held, delay time.Duration) bool {
	if s.cfg.MaxConcurrency == 1 || s.fanOut() && s.manyWait() {
		return s.waitInPlace(h, delay)
	}
	s.wait(h, delay)
	return false
}

// waitInPlace waits for the entry's next delivery without freeing the slot. It
// returns false if the subscription closes before.
func (s *subscription) waitInPlace(h *held, delay time.Duration) bool {
	s.leases.move(h, waiting, nil)
	if s.fanOut() {
		h.count++
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.closing:
		s.giveBack(h, h.count)
		return false
	}
}

// armLocked sets the timer for the retry that is due first.
func (s *subscription) armLocked(at time.Time) {
	if s.timer != nil {
		s.timer.Stop()
	}
	s.timerAt = at
	s.timer = time.AfterFunc(time.Until(at), s.retriesDue)
}

// retriesDue rouses slots for the retries that are due, and sets the timer for
// the first that is not.
func (s *subscription) retriesDue() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return
	}
	now, due := time.Now(), 0
	var first *held
	for _, h := range s.retries {
		if !h.due.After(now) {
			due++
		} else if first == nil || h.due.Before(first.due) {
			first = h
		}
	}
	s.rouseLocked(due)
	s.timer = nil
	if first != nil {
		s.armLocked(first.due)
	}
}
