package goxstreams

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// progress is how far the group has come, as far as this subscription knows: where
// to go on if the group is lost, and by which entries to know the stream again.
type progress struct {
	read  xstream.Mark // the greatest that was read here
	known string       // the group's last-delivered-id when last seen
	older xstream.Mark // one that was read some time before
	at    time.Time    // since when
}

// progressAge is how much older that is: what a failover loses is younger.
const progressAge = 10 * time.Second

// sawEntry remembers the last entry of a read.
func (s *subscription) sawEntry(e xstream.Entry) {
	if !s.leased() {
		return
	}
	m := e.Mark()
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	p := &s.progress
	if xstream.CompareIDs(m.ID, p.read.ID) <= 0 {
		return
	}
	if p.read.ID == "" {
		p.older, p.at = m, time.Now()
	} else if time.Since(p.at) > progressAge {
		p.older, p.at = p.read, time.Now()
	}
	p.read = m
}

// sawGroup remembers how far the group has got.
func (s *subscription) sawGroup(lastDelivered string) {
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	s.progress.known = lastDelivered
}

// beganAnew reports whether the stream is another one than that which was read: it
// was deleted, and made again. Its IDs may be smaller than those of the old one, or
// even the same. last is the greatest ID that it has.
func (s *subscription) beganAnew(ctx context.Context) (anew bool, last string, err error) {
	p := s.progress
	info, err := s.stream.Info(ctx)
	if redisx.IsDenied(err) {
		return false, "", nil
	}
	if err != nil || p.read.ID == "" {
		return false, info.Last, err
	}
	e, err := s.stream.Entry(ctx, p.read.ID)
	switch {
	case err != nil:
		return false, "", err
	case e != nil:
		return e.Mark() != p.read, info.Last, nil
	case xstream.CompareIDs(info.Last, p.read.ID) < 0: // or a failover has lost the last ones
	case info.First == "0-0", xstream.CompareIDs(info.First, p.read.ID) > 0, xstream.CompareIDs(info.MaxDeleted, p.read.ID) >= 0:
		return false, info.Last, nil // trimmed or deleted: nothing that is there was read
	}
	there, err := s.stream.Has(ctx, p.older)
	return !there && err == nil, info.Last, err
}

// regroup makes the group again after it was lost, and puts what this
// subscription holds back into it.
func (s *subscription) regroup() error {
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	ctx := s.ctx
	anew, last, err := s.beganAnew(ctx)
	if err != nil {
		return err
	}
	start := s.progress.known
	if read := s.progress.read.ID; xstream.CompareIDs(read, start) > 0 {
		start = read
	}
	if anew || start == "" || last != "" && xstream.CompareIDs(last, start) < 0 {
		start = "0" // all that is in it is new, or may be
	}
	if anew {
		s.forgetAll()
	}
	if _, err := s.stream.GroupInfo(ctx); err == nil {
		return s.restoreLocked(ctx) // another consumer was faster, or the loss was another server's
	} else if !xstream.GroupLost(err) && !redisx.IsDenied(err) {
		return err
	}
	made, err := s.stream.CreateGroup(ctx, start)
	if err != nil {
		return err
	}
	if made {
		s.log.Error("The consumer group was lost and is made again; what dead consumers held is not pending any more",
			errors.New("group lost"), s.logFields.Add(watermill.LogFields{"start_id": start}))
	}
	return s.restoreLocked(ctx)
}

// forgetAll gives up what is held of a stream that is gone. Handlers may finish; what
// they settle is not acked, since the ID may be another entry's by now.
func (s *subscription) forgetAll() {
	s.progress = progress{}
	ours := s.leases.ours()
	s.leases.bereave(ours...)
	if len(ours) > 0 {
		s.stats.lost.Add(int64(len(ours)))
		s.log.Error("Messages lost", errors.New("the stream was deleted, and began anew, while they were pending"),
			s.logFields.Add(watermill.LogFields{"entries": len(ours)}))
	}
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
		for chunk := range slices.Chunk(ids, maxAssigned) {
			got, err := s.stream.Restore(ctx, s.cfg.ClaimMinIdle, count, chunk)
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

// restoreIfRemade asks whether the group was made anew by a consumer that did not
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
	rows, err := s.stream.Pending(ctx, 0, "-", "+", maxAssigned, s.stream.Consumer)
	if err != nil {
		return false, err
	}
	for _, p := range rows {
		if p.ID == h.id {
			return true, nil // put back meanwhile
		}
		if s.leases.hasBefore(p.ID, h) {
			return false, nil // what came later may be of the new group
		}
	}
	if !s.leases.stillOurs(h) {
		return false, nil
	}
	anew, _, err := s.beganAnew(ctx)
	if err != nil {
		return false, err
	}
	if anew {
		s.forgetAll()
		return false, nil
	}
	s.log.Error("The consumer group was made anew, or all that is held here was acked elsewhere; putting it back", errors.New("group lost"), s.logFields)
	return true, s.restoreLocked(ctx)
}
