package goxstreams

import (
	"slices"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// maxAssigned bounds one XCLAIM: 1,000 IDs take the server less than a millisecond.
const maxAssigned = 1000

// giveBack releases one entry, with the deliveries that are to count.
func (s *subscription) giveBack(h *held, count int64) {
	if s.leased() {
		s.release(map[int64][]*held{s.parkCount(h, count): {h}})
	}
	s.leases.remove(h)
}

// parkCount keeps a dead entry that could not be moved dead for whoever claims
// it, which counts as no more than this delivery of it.
func (s *subscription) parkCount(h *held, count int64) int64 {
	if h.doom != nil && s.retry.MaxRetries != 0 {
		return max(h.count-1, int64(max(s.retry.MaxRetries, 0))+2)
	}
	return max(count, 0)
}

// releaseHeld gives back everything that no slot has in hand: prefetched entries
// as if they had never been read, waiting ones with their count.
func (s *subscription) releaseHeld() {
	s.mu.Lock()
	queue, retries, found := s.queue, s.retries, append(s.claims, s.suspects...)
	if s.cfg.NoAck {
		queue = nil
	} else {
		s.queue = nil
		s.shared.ahead.Add(-int64(len(queue)))
	}
	s.shared.waiting.used.Add(-int64(len(retries)))
	s.retries, s.claims, s.suspects = nil, nil, nil
	if s.timer != nil {
		s.timer.Stop()
	}
	s.mu.Unlock()

	s.leases.remove(found...)
	if s.leased() {
		byCount := make(map[int64][]*held)
		for _, h := range queue {
			byCount[h.count-1] = append(byCount[h.count-1], h)
		}
		for _, h := range retries {
			c := s.parkCount(h, h.next-1)
			byCount[c] = append(byCount[c], h)
		}
		s.release(byCount)
	}
	s.leases.remove(queue...)
	s.leases.remove(retries...)
}

// release parks entries with the consumer named released, where every claimer
// looks first. What cannot be released is claimed when its lease has run out.
func (s *subscription) release(byCount map[int64][]*held) {
	s.part(byCount)
	for count, hs := range byCount {
		for chunk := range slices.Chunk(hs, maxAssigned) {
			if s.isAbandoned() {
				continue
			}
			refused, err := s.park(count, chunk)
			if err == nil && len(refused) > 0 {
				// A renewal may have crossed: then these are ours, and younger.
				var again []*held
				for _, h := range refused {
					if ours, err := s.verify(h); err == nil && ours {
						again = append(again, h)
					}
				}
				_, err = s.park(count, again)
			}
			if err != nil {
				s.log.Error("Release failed; the messages come again when their leases have run out", err,
					s.logFields.Add(watermill.LogFields{"entries": len(chunk)}))
				if !redisx.IsReply(err) {
					return // Redis is away: the others would each wait for it too
				}
			}
		}
	}
}

// part ends the renewals of what is to be released. One that was sent, but
// arrived late, would take the entries back: to the server they look idle for
// long enough once they have been released for as long as the renewal was on
// its way.
func (s *subscription) part(byCount map[int64][]*held) {
	s.claimer.renewing.Lock()
	defer s.claimer.renewing.Unlock()
	for _, hs := range byCount {
		for _, h := range hs {
			s.leases.move(h, parting, nil)
		}
	}
}

func (s *subscription) park(count int64, hs []*held) (refused []*held, err error) {
	hs = s.leases.there(hs)
	if len(hs) == 0 {
		return nil, nil
	}
	ids := make([]string, len(hs))
	idle := s.leases.idle(hs[0])
	for i, h := range hs {
		ids[i] = h.id
		idle = min(idle, s.leases.idle(h))
	}
	got, err := s.stream.Assign(s.ctx, releasedConsumer, idle, count, ids)
	if err != nil {
		return nil, err
	}
	s.stats.released.Add(int64(len(got)))
	return slices.DeleteFunc(slices.Clone(hs), func(h *held) bool { return got[h.id] }), nil
}
