package goxstreams

import (
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestDispatch_RetryTakesNobodysTurn: a slot that was roused for a new entry
// takes a retry that fell due meanwhile, before that one's own timer. The other
// slot must hear of the new entry then, although each was announced once only.
func TestDispatch_RetryTakesNobodysTurn(t *testing.T) {
	s := &subscription{shared: &shared{}, cfg: SubscriberConfig{MaxConcurrency: 2}, slots: map[*slot]struct{}{new(slot): {}, new(slot): {}}}
	s.ready = sync.NewCond(&s.mu)
	taken := make(chan *held, s.cfg.MaxConcurrency)
	for range s.cfg.MaxConcurrency {
		go func() { taken <- s.next() }()
	}
	idle := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.idle
	}
	require.Eventually(t, func() bool { return idle() == s.cfg.MaxConcurrency }, 30*time.Second, time.Millisecond)

	fresh, retry := &held{id: "2-0"}, &held{id: "1-0", due: time.Now()}
	s.mu.Lock()
	s.queueLocked(fresh)
	s.rouseLocked(1)
	s.retries.push(retry) // due, and its timer has yet to fire
	s.mu.Unlock()

	got := map[*held]bool{}
	for range s.cfg.MaxConcurrency {
		select {
		case h := <-taken:
			got[h] = true
		case <-time.After(30 * time.Second):
			t.Fatalf("taken: %d; one slot sleeps beside the other entry", len(got))
		}
	}
	require.Equal(t, map[*held]bool{fresh: true, retry: true}, got)
}
