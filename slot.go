package goxstreams

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
)

// slot is a goroutine that takes one entry at a time all the way to its
// outcome. There are MaxConcurrency of them at most: that is the bound on
// unsettled messages, and with one, the order.
type slot struct {
	s     *subscription
	state atomic.Int32
	entry atomic.Pointer[held] // in hand
}

// A slot that is in a function of the user's when CloseTimeout is over is detached:
// nobody waits for it, and it ends when that function returns.
const (
	slotRuns int32 = iota
	slotCalls
	slotDetached
)

func (sl *slot) run() {
	s := sl.s
	defer func() {
		// A function of the user's has ended its goroutine (t.FailNow does): it failed.
		if h := sl.entry.Load(); h != nil && sl.state.Load() == slotCalls {
			s.giveBack(h, h.count)
			s.free()
		}
		s.slotEnded(sl)
	}()
	for h := s.next(); h != nil; h = s.next() {
		h.slot = sl
		sl.entry.Store(h)
		s.handle(h)
		sl.entry.Store(nil)
		s.free()
	}
}

// user calls a function of the user's in the slot that has the entry, and turns its
// panic into an error. It does not return if the subscription has ended meanwhile.
func (h *held) user(f func() error) error {
	sl := h.slot
	if sl == nil { // a goroutine of its own
		return guard(f)
	}
	sl.state.Store(slotCalls)
	err := guard(f)
	if !sl.state.CompareAndSwap(slotCalls, slotRuns) {
		runtime.Goexit()
	}
	return err
}

// startSlotLocked begins a slot.
func (s *subscription) startSlotLocked() {
	sl := &slot{s: s}
	s.slots[sl] = struct{}{}
	go sl.run()
}

func (s *subscription) slotEnded(sl *slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetSlotLocked(sl)
	s.rouseForAllLocked() // one that ended by a function of the user's leaves work
}

func (s *subscription) forgetSlotLocked(sl *slot) {
	delete(s.slots, sl)
	if len(s.slots) == 0 && s.noSlots != nil {
		close(s.noSlots)
		s.noSlots = nil
	}
}

// detachPause is how often slots are looked at that did not end with CloseTimeout.
// Those that are not in a function of the user's do so by themselves.
const detachPause = 10 * time.Millisecond

// awaitSlots waits until no slot runs. After CloseTimeout it leaves those behind that
// are in a function of the user's.
func (s *subscription) awaitSlots() {
	abandon := s.abandon
	var again <-chan time.Time
	for {
		s.mu.Lock()
		if len(s.slots) == 0 {
			s.mu.Unlock()
			return
		}
		if s.noSlots == nil {
			s.noSlots = make(chan struct{})
		}
		none := s.noSlots
		s.mu.Unlock()
		select {
		case <-none:
			return
		case <-abandon:
			abandon = nil
		case <-again:
		}
		s.detachSlots()
		again = time.After(detachPause)
	}
}

func (s *subscription) detachSlots() {
	s.mu.Lock()
	n := 0
	var left []string
	for sl := range s.slots {
		if sl.state.CompareAndSwap(slotCalls, slotDetached) {
			s.forgetSlotLocked(sl)
			n++
			if h := sl.entry.Load(); h != nil {
				left = append(left, h.id)
			}
		}
	}
	s.mu.Unlock()
	for _, id := range left {
		s.shared.poller.Disown(s.topic, id) // it is no orphan while the function is at work
	}
	if n > 0 {
		s.log.Info("A function of the config did not return within CloseTimeout; its message is handled again once its lease has run out",
			s.logFields.Add(watermill.LogFields{"entries": n}))
	}
}
