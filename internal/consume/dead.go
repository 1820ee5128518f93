package consume

import (
	"context"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/takeover"
)

// This file moves dead entries to their stream.

// maxMovePause is the longest pause between attempts to move an entry.
const maxMovePause = 30 * time.Second

// Recount sets the entry's delivery count in Redis, and returns its fields as
// stored in the stream; nil if the entry is not ours.
func (s *Subscription) Recount(t *Task, count int64) ([]string, error) {
	return s.keeper.Recount(s.life.ctx, t.Entry, count)
}

// Move moves an entry to a dead-letter stream, and returns its ID there; "" if the
// entry is not ours: see lease.Keeper.Move. It does not end the entry.
func (s *Subscription) Move(t *Task, topic string, unsure bool, marks, letter []string) (string, error) {
	return s.keeper.Move(s.life.ctx, t.Entry, topic, unsure, marks, letter)
}

// MoveEnded notes that Redis has answered a command about a dead entry.
func (s *Subscription) MoveEnded() { s.markHealthy(dutyDeadLetter) }

// MoveFailed keeps a dead entry whose move has failed the given number of times,
// and schedules another attempt; its handler is not called again.
func (s *Subscription) MoveFailed(t *Task, tries int, err error) {
	s.markFailed(dutyDeadLetter, err)
	if s.IsClosing() {
		if t.Move() == ledger.MaybeMoved {
			_ = s.settleMove(t)
		}
		if t.Move() != ledger.Moved {
			s.GiveBack(t, t.Count())
		}
		return
	}
	s.Again(t, takeover.Jitter(min(minBackoff<<min(tries, 11), maxMovePause)))
}

// settleMove repeats a move without an answer when the subscription closes, and ends the
// entry if it is in the dead-letter stream. If the entry were released, another consumer
// could move it again, since it would not know of this move.
func (s *Subscription) settleMove(t *Task) error {
	if s.isAbandoned() {
		return context.Canceled
	}
	err := s.try(func() error { return s.work.MoveAgain(t) })
	if t.Move() == ledger.Moved {
		s.Drop(t)
	}
	return err
}

// NotOurs ends an entry that was to be moved but is not ours. If the group was lost
// and the entry is being restored, the move is tried again.
func (s *Subscription) NotOurs(t *Task) {
	s.MoveEnded()
	if s.ledger.Owned(t.Entry) {
		s.Again(t, minBackoff)
		return
	}
	s.Drop(t)
	s.cfg.Log.Info("A dead message was settled or claimed elsewhere before it was moved", s.Fields(t))
}
