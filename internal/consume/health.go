package consume

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// What the subscription does that can fail by itself.
const (
	dutyOpen       = "open"
	dutyRead       = "read"
	dutyAck        = "ack"
	dutyRenew      = "renew leases"
	dutyClaim      = "claim"
	dutyLook       = "look for abandoned messages"
	dutyDeadLetter = "dead-letter"
)

// health is what Stats says of an outage, which is logged once, however many
// goroutines notice it.
type health struct {
	mu      sync.Mutex
	failing map[string]error
	since   time.Time
}

// markFailed notes that something failed. If it was for want of the group, that is made
// again; where that fails too, the next failure has it tried again.
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
		s.life.giveUp() // it never serves again
	}
	if first && !s.IsClosing() {
		s.cfg.Log.Error("Redis does not serve the subscription; trying again", err, s.cfg.Fields)
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
		s.cfg.Log.Info("Redis serves the subscription again after "+time.Since(since).Round(time.Millisecond).String(), s.cfg.Fields)
	}
}

// outage returns when the outage under way began, and its errors.
func (h *health) outage() (time.Time, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.failing) == 0 {
		return time.Time{}, nil
	}
	var errs []error
	for _, duty := range []string{dutyOpen, dutyRead, dutyAck, dutyRenew, dutyClaim, dutyLook, dutyDeadLetter} {
		if err := h.failing[duty]; err != nil {
			errs = append(errs, err)
		}
	}
	return h.since, errors.Join(errs...)
}
