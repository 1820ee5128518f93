package goxstreams

import (
	"fmt"
	"strings"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/poll"
)

// This file decides who does what next: what a slot takes, whether there is room
// for a read, and when a nacked message is due.

// enqueue takes what the reader read.
func (s *subscription) enqueue(b poll.Batch) {
	entries := b.Entries
	if s.fanOut() {
		if entries = s.position.unseen(entries); len(entries) == 0 {
			return
		}
	}
	batch := make([]held, len(entries)) // one allocation for the whole batch
	hs := make([]*held, len(entries))
	for i, e := range entries {
		batch[i] = held{id: e.ID, fields: e.Fields, count: 1, next: 2, state: queued, since: b.At, sent: b.Sent, begun: b.At}
		switch {
		case e.Fields == nil:
			batch[i].fields = []string{}
		case s.fanOut(): // kept until the message is acked
			batch[i].fields = own(e.Fields)
		}
		hs[i] = &batch[i]
	}
	s.sawEntry(entries[len(entries)-1])
	hs = s.leases.add(hs)
	s.mu.Lock()
	late := s.drained // an answer that Close did not wait for
	if late && s.cfg.NoAck {
		s.mu.Unlock()
		s.stats.lost.Add(int64(len(hs)))
		s.leases.remove(hs...)
		return
	}
	s.queueLocked(hs...)
	s.rouseLocked(len(hs))
	s.mu.Unlock()
	if late {
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
		case h.readHere():
			s.queueLocked(h) // it keeps its place
		case h.next >= s.retry.suspectFrom() && !h.released:
			s.suspects = append(s.suspects, h)
		default:
			s.claims = append(s.claims, h)
		}
	}
	s.rouseLocked(len(hs))
	return len(s.suspects) > 0
}

// claimRoom returns how many more entries may wait to be claimed.
func (s *subscription) claimRoom() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, maxCandidates-len(s.claims)-len(s.suspects))
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
	s.rouseForAllLocked()
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
			return s.unqueueLocked()
		}
		return nil
	case s.alone:
		return nil
	case len(s.suspects) > 0:
		// A suspect is handled with nothing else in flight: what is there comes
		// to its end, nothing new is taken.
		if h := s.unqueueLocked(); h != nil {
			return h
		}
		if s.parked && s.busy == 0 && s.leases.active() == 0 {
			s.alone = true
			return shift(&s.suspects)
		}
		return nil
	case len(s.retries) > 0 && !time.Now().Before(s.retries[0].due):
		s.shared.waiting.used.Add(-1)
		if len(s.claims)+len(s.queue) > 0 {
			s.rouseLocked(1) // this slot may have been roused for one of them, a moment before the retry's own timer
		}
		return s.retries.pop()
	case len(s.claims) > 0:
		return shift(&s.claims)
	}
	return s.unqueueLocked()
}

// queueLocked queues entries that are ours, for a slot to take.
func (s *subscription) queueLocked(hs ...*held) {
	s.queue = append(s.queue, hs...)
	s.shared.ahead.Add(int64(len(hs)))
}

func (s *subscription) unqueueLocked() *held {
	h := shift(&s.queue)
	if h != nil {
		s.shared.ahead.Add(-1)
	}
	return h
}

// shift takes the first out of a queue; nil if it is empty.
func shift[T any](q *[]*T) *T {
	if len(*q) == 0 {
		return nil
	}
	first := (*q)[0]
	(*q)[0] = nil
	*q = (*q)[1:]
	return first
}

// free notes that a slot has nothing in hand any more.
func (s *subscription) free() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
	if s.alone {
		s.alone = false
		s.rouseForAllLocked()
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
	for ; n > 0 && len(s.slots) < s.cfg.MaxConcurrency; n-- {
		s.startSlotLocked()
	}
}

// rouseForAllLocked sees to it that slots look for all the work there is.
func (s *subscription) rouseForAllLocked() {
	s.rouseLocked(len(s.queue) + len(s.claims) + len(s.suspects) + s.retries.due(time.Now()))
}

// signalRoomLocked makes the reader look again, if there is room now.
func (s *subscription) signalRoomLocked() {
	if s.parked && s.roomLocked() > 0 {
		s.parked = false
		s.reader.seat.Wake()
	}
}

// Room returns how many entries the reader may read now. After 0 the reader is
// parked: it is told when there is room again.
func (r *reader) Room() int {
	s := r.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parked = false
	if s.stopping {
		return 0
	}
	if s.roomLocked() > 0 {
		s.prefetch = min(r.adaptLocked(s.prefetch, s.cfg.BatchSize), r.fitsLocked())
		if room := min(s.roomLocked(), s.cfg.BatchSize, r.fitsLocked()); room > 0 {
			return room
		}
	}
	s.parked = true
	if len(s.suspects) > 0 {
		s.rouseLocked(1)
	}
	return 0
}

// roomLocked returns how many entries may be read now: one for each free slot,
// and the prefetch while no more than that is queued, so that the handlers have work
// while the next read is under way (with half of it they waited for the server: a
// tenth of the rate). Twice BatchSize, and the slots, bound what is held.
func (s *subscription) roomLocked() int {
	prefetch := s.prefetch
	if s.shared.ahead.Load() >= maxAhead {
		prefetch = 0
	}
	if s.alone || len(s.suspects) > 0 || len(s.queue) > prefetch {
		return 0
	}
	if len(s.claims) >= s.cfg.MaxConcurrency { // they go first
		return 0
	}
	if s.leased() && s.acker.full() {
		return 0
	}
	return max(0, s.cfg.MaxConcurrency-s.busy-len(s.claims)) + prefetch
}

// wait schedules the entry's next delivery.
func (s *subscription) wait(h *held, delay time.Duration) {
	if s.isClosing() {
		s.giveBack(h, h.next-1)
		return
	}
	h.due = time.Now().Add(delay)
	if !s.rest(h) {
		s.leases.remove(h)
		return
	}
	if !s.pushRetry(h) { // close came in between
		s.giveBack(h, h.next-1)
	}
}

// rest lets the entry wait. In fan-out its next delivery is counted here.
func (s *subscription) rest(h *held) bool {
	if s.fanOut() {
		h.count, h.next = h.next, h.next+1
	}
	return s.leases.move(h, waiting, nil)
}

// own returns the fields in memory of their own: what was read is a part of its whole
// reply, and would keep that for as long as it waits.
func own(fields []string) []string {
	clones := make([]string, len(fields))
	for i, f := range fields {
		clones[i] = strings.Clone(f)
	}
	return clones
}

func (s *subscription) pushRetry(h *held) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.retries.push(h)
	s.shared.waiting.used.Add(1)
	if most := s.shared.most(&s.shared.waiting, len(s.retries)); len(s.retries) > most && s.leased() {
		s.shared.waiting.used.Add(-1)
		s.overflowed.Store(true)
		s.leases.remove(s.retries.dropLatest())
		s.once.overflow.Do(func() {
			s.log.Error("Very many messages wait for a retry", fmt.Errorf(
				"more than %d: those that wait longest come again when their leases have run out, whenever they are due", most), s.logFields)
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
	return len(s.retries) >= s.shared.most(&s.shared.waiting, len(s.retries))
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
	s.rest(h)
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.closing:
		s.giveBack(h, h.next-1)
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
