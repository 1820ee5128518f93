package consume

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// The duties of the subscription that can fail independently.
const (
	dutyOpen       = "open"
	dutyRead       = "read"
	dutyAck        = "ack"
	dutyRenew      = "renew leases"
	dutyClaim      = "claim"
	dutyLook       = "look for abandoned messages"
	dutyDeadLetter = "dead-letter"
	dutyDelayed    = "move delayed messages"
	dutyPause      = "pause or resume"
	dutyPosition   = "store the read position"
	dutyTrim       = "trim the stream"
	dutyTrimDead   = "trim the dead-letter stream"
)

// health tracks the current outage for Stats, and logs it once, however many
// goroutines notice it.
type health struct {
	mu      sync.Mutex
	failing map[string]error
	since   time.Time
	denied  map[string]bool // by duty: the missing permission is logged already
}

// mark notes how a duty went that others may have to do: without the permission it has not
// failed. It returns true if the missing permission is to be logged.
func (s *Subscription) mark(duty string, err error) (isNew bool) {
	denied := redisx.IsDenied(err)
	if err != nil && !denied {
		s.markFailed(duty, err)
		return false
	}
	h := &s.health
	h.mu.Lock()
	isNew = denied && !h.denied[duty]
	h.denied[duty] = denied
	h.mu.Unlock()
	s.markHealthy(duty)
	return isNew
}

// markFailed notes that a duty failed. If the group is missing, it is recreated; if
// that fails too, the next failure tries again.
func (s *Subscription) markFailed(duty string, err error) {
	s.shared.client.Refresh(err)
	if xstream.GroupLost(err) {
		_ = s.keeper.Regroup(s.life.ctx)
		s.update()
	}
	h := &s.health
	h.mu.Lock()
	first := len(h.failing) == 0
	if first {
		h.failing = make(map[string]error)
		h.since = time.Now()
	}
	err = fmt.Errorf("%s: %w", duty, err)
	h.failing[duty] = err
	h.mu.Unlock()
	if redisx.IsClosed(err) && s.IsClosing() {
		s.life.giveUp() // a closed client never recovers
	}
	if first && !s.IsClosing() {
		s.cfg.Log.Error("Redis is unavailable to the subscription; retrying", err, s.cfg.Fields)
	}
}

func (s *Subscription) markHealthy(duty string) {
	h := &s.health
	h.mu.Lock()
	_, failed := h.failing[duty]
	delete(h.failing, duty)
	recovered := failed && len(h.failing) == 0
	since := h.since
	h.mu.Unlock()
	if recovered {
		s.cfg.Log.Info("Redis is available to the subscription again after "+time.Since(since).Round(time.Millisecond).String(), s.cfg.Fields)
	}
}

// outage returns when the current outage started, and its errors.
func (h *health) outage() (time.Time, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.failing) == 0 {
		return time.Time{}, nil
	}
	var errs []error
	for _, duty := range slices.Sorted(maps.Keys(h.failing)) {
		errs = append(errs, h.failing[duty])
	}
	return h.since, errors.Join(errs...)
}
