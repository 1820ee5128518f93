package consume

import (
	"errors"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/takeover"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// DelayedInterval is the longest time between two looks for delayed messages. Messages
	// with longer delays are moved on time. One with a shorter delay, whose Publisher has
	// died, can be late by this.
	DelayedInterval = time.Second

	// delayedPause is the shortest time between two looks of which one found nothing: where
	// many subscriptions look for messages that are due one after the other, most are late.
	delayedPause = 5 * time.Millisecond

	// delayedDenied is the pause between two looks while the permission is missing.
	delayedDenied = time.Minute
)

// tickLoop asks every second whether the group is paused and whether delayed messages wait,
// until the subscription closes, and moves those that are due into the stream. All subscriptions
// of the topic do this, without a leader: the script moves each message once.
func (s *Subscription) tickLoop() {
	var ask time.Time // when to ask for a pause again
	d := delayed{s: s}
	repeat(s.life.closing.Done(), nil, 0, func() time.Duration {
		wait := d.move() // first: a message may be due now
		next := time.Now().Add(wait)
		if s.isPausable() && !time.Now().Before(ask) {
			s.askPaused(s.life.ctx)
			ask = s.shared.next(DelayedInterval)
		}
		return time.Until(next)
	})
}

// delayed is what a subscription knows of the topic's delayed messages.
type delayed struct {
	s      *Subscription
	denied time.Time // until when not to ask for them
	known  bool      // that some wait: then they are moved without asking whether there are any
}

// move moves what is due, and returns the time until the next look.
func (d *delayed) move() time.Duration {
	s := d.s
	if time.Now().Before(d.denied) {
		return s.shared.until(DelayedInterval)
	}
	moved, waiting, err := xstream.MoveResult{Next: -1}, d.known, error(nil)
	if !d.known {
		waiting, err = s.stream.HasDelayed(s.life.ctx)
	}
	wait := s.shared.until(DelayedInterval)
	if waiting {
		sent := time.Now()
		moved, err = s.stream.Move(s.life.ctx)
		if moved.Next > 0 { // it counts from when the server answered, not from when the answer came
			moved.Next = max(0, moved.Next-time.Since(sent)/2)
		}
	}
	d.known = moved.Next >= 0
	if s.mark(dutyDelayed, err) {
		s.cfg.Log.Info("No permission to move delayed messages; other Subscribers of the topic must: "+err.Error(), s.cfg.Fields)
	}
	switch {
	case redisx.IsDenied(err):
		d.denied = time.Now().Add(takeover.Jitter(delayedDenied))
	case err == nil:
		LogLostDelayed(s.cfg.Log, s.cfg.Fields, moved)
		wait = untilDue(moved, wait)
	}
	return wait
}

// untilDue returns the time until the next look after one that found this; regular is the
// longest.
func untilDue(moved xstream.MoveResult, regular time.Duration) time.Duration {
	wait := regular
	if moved.Next >= 0 {
		wait = min(wait, moved.Next)
	}
	if moved.Count == 0 {
		wait = max(wait, takeover.Jitter(delayedPause))
	}
	return wait
}

// LogLostDelayed logs delayed messages whose fields were missing.
func LogLostDelayed(log watermill.LoggerAdapter, fields watermill.LogFields, moved xstream.MoveResult) {
	for _, uuid := range moved.Lost {
		log.Error("Delayed message lost", errors.New("its fields were deleted while it waited"), fields.Add(watermill.LogFields{"message_uuid": uuid}))
	}
}
