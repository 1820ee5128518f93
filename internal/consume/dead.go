package consume

import (
	"time"
)

// This file is the way of dead entries to their stream.

// maxMovePause is the longest pause before a move is tried again.
const maxMovePause = 30 * time.Second

// KeepsDead reports whether there is a stream for dead entries: there is in a group
// that acks.
func (s *Subscription) KeepsDead() bool { return s.mode.deadLetters() }

// Recount has Redis count so many deliveries of the entry, and returns its fields as the
// stream has them; nil if it is not ours.
func (s *Subscription) Recount(t *Task, count int64) ([]string, error) {
	return s.keeper.Recount(s.life.ctx, t.Entry, count)
}

// Move moves an entry to a dead-letter stream, and returns the letter's ID there; "" if
// the entry is not ours: see lease.Keeper.Move. It does not end the entry.
func (s *Subscription) Move(t *Task, topic string, unsure bool, marks, letter []string) (string, error) {
	return s.keeper.Move(s.life.ctx, t.Entry, topic, unsure, marks, letter)
}

// MoveEnded notes that Redis was asked about a dead entry and has answered.
func (s *Subscription) MoveEnded() { s.markHealthy(dutyDeadLetter) }

// MoveFailed keeps a dead entry whose move failed so many times, to be tried again; its
// handler does not see it again.
func (s *Subscription) MoveFailed(t *Task, tries int, err error) {
	s.markFailed(dutyDeadLetter, err)
	if s.IsClosing() {
		s.GiveBack(t, t.Count())
		return
	}
	s.Aside(t, jitter(min(minBackoff<<min(tries, 11), maxMovePause)))
}

// NotOurs ends an entry that was to be moved and is not ours, or has it tried again: the
// group was lost, and it is put back.
func (s *Subscription) NotOurs(t *Task) {
	s.MoveEnded()
	if s.ledger.Owned(t.Entry) {
		s.Aside(t, minBackoff)
		return
	}
	s.Drop(t)
	s.cfg.Log.Info("A dead message was settled or claimed elsewhere before it could be moved", s.Fields(t))
}
