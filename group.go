package goxstreams

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/ThreeDotsLabs/watermill"
)

// regroup makes the group again after it was lost, and puts what this
// subscription holds back into it.
func (s *subscription) regroup() error {
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	ctx := s.ctx
	if _, err := s.stream.groupInfo(ctx); err == nil {
		return s.restoreLocked(ctx) // another consumer was faster
	} else if !groupLost(err) && !denied(err) {
		return err
	}
	start := s.lastKnown
	if compareIDs(s.lastRead, start) > 0 {
		start = s.lastRead
	}
	last, err := s.stream.lastID(ctx)
	if denied(err) {
		last, err = start, nil
	}
	if err != nil {
		return err
	}
	if start == "" || compareIDs(last, start) < 0 {
		start = "0" // the stream began anew, and all that is in it is new
		s.lastRead, s.lastKnown = "", ""
	}
	if err := s.stream.createGroup(ctx, start); err != nil {
		return err
	}
	s.log.Error("The consumer group was lost and is made again; what dead consumers held is not pending any more",
		errors.New("group lost"), s.logFields.Add(watermill.LogFields{"start_id": start}))
	return s.restoreLocked(ctx)
}

// restoreLocked puts what is ours back among the pending entries. An entry that
// somebody else got meanwhile is not as idle as that, and stays theirs. One that
// is settled just now may be put back after its XACK, and come again: what is
// put back is not acked here, since it might as well have been given back.
func (s *subscription) restoreLocked(ctx context.Context) error {
	if !s.leased() {
		return nil
	}
	now := time.Now()
	ours := s.leases.ours()
	for count, ids := range s.leases.byCount(ours) {
		for chunk := range slices.Chunk(ids, maxRenewal) {
			got, err := s.stream.restore(ctx, s.cfg.ClaimMinIdle, count, chunk)
			if err != nil {
				return err
			}
			for _, h := range ours {
				if got[h.id] {
					s.leases.confirm(now, now, h)
				}
			}
		}
	}
	return nil
}

// restoreIfRemade asks whether the group was made anew by someone who did not
// know what this subscription holds: the entry was ours a moment ago, nobody
// can have claimed it since, and nothing of ours is pending any more that was then.
// It then puts all back.
func (s *subscription) restoreIfRemade(h *held) (bool, error) {
	if s.leases.claimable(h, s.cfg.ClaimMinIdle) {
		return false, nil
	}
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	ctx := s.ctx
	rows, err := s.stream.pending(ctx, 0, "-", "+", maxRenewal, s.stream.consumer)
	if err != nil {
		return false, err
	}
	for _, p := range rows {
		if p.id == h.id {
			return true, nil // put back meanwhile
		}
		if s.leases.hasBefore(p.id, h) {
			return false, nil // what came later may be of the new group
		}
	}
	if !s.leases.stillOurs(h) {
		return false, nil
	}
	s.log.Error("The consumer group was made anew, or all that is held here was acked elsewhere; putting it back", errors.New("group lost"), s.logFields)
	return true, s.restoreLocked(ctx)
}

// sawGroup remembers how far the group has got, for regroup.
func (s *subscription) sawGroup(lastDelivered string) {
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	s.lastKnown = lastDelivered
}
