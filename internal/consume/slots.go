package consume

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
)

// slot is a goroutine that takes one entry at a time all the way to its outcome, while
// there are any. There are MaxConcurrency of them at most: that is the bound on
// unsettled messages, and with one, the order.
type slot struct {
	s     *Subscription
	state atomic.Int32
	entry atomic.Pointer[ledger.Entry] // in hand
	task  Task
}

// slots are those of a subscription, and the calls of its user's functions outside of
// them.
type slots struct {
	mu      sync.Mutex
	running map[*slot]struct{}
	free    []*slot       // that have run, for the next to start
	none    chan struct{} // closed when none runs; nil: nobody waits for that
	calls   sync.WaitGroup
}

// A slot that is in a function of the user's when CloseTimeout is over is detached:
// nobody waits for it, and it ends when that function returns.
const (
	slotRuns int32 = iota
	slotCalls
	slotDetached
)

func (s *Subscription) startSlot() {
	go s.slots.one(s).run()
}

// one returns a slot that counts as running.
func (ss *slots) one(s *Subscription) *slot {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var sl *slot
	if n := len(ss.free) - 1; n >= 0 {
		sl, ss.free = ss.free[n], ss.free[:n]
	} else {
		sl = &slot{s: s}
	}
	ss.running[sl] = struct{}{}
	return sl
}

func (sl *slot) run() {
	s := sl.s
	ended := false
	defer func() {
		// A function of the user's has ended its goroutine (t.FailNow does): it failed.
		if e := sl.entry.Load(); e != nil && sl.state.Load() == slotCalls {
			s.GiveBack(&Task{Entry: e}, e.Count())
		}
		if !ended {
			s.ledger.SlotEnded()
			s.update()
		}
		s.slots.mu.Lock()
		defer s.slots.mu.Unlock()
		if s.slots.forget(sl); ended {
			s.slots.free = append(s.slots.free, sl)
		}
	}()
	for {
		e, fx := s.ledger.Take(time.Now())
		if ended = e == nil; ended {
			s.apply(fx)
			return
		}
		s.apply(fx)
		sl.entry.Store(e)
		sl.task = Task{e, sl}
		if e.Death != nil || s.acquire(&sl.task) {
			s.work.Handle(&sl.task)
		}
		sl.entry.Store(nil)
	}
}

// forget is called with the mutex held.
func (ss *slots) forget(sl *slot) {
	delete(ss.running, sl)
	if len(ss.running) == 0 && ss.none != nil {
		close(ss.none)
		ss.none = nil
	}
}

// detachPause is how often slots are looked at that did not end with CloseTimeout.
// Those that are not in a function of the user's do so by themselves.
const detachPause = 10 * time.Millisecond

// awaitSlots waits until no slot runs. After CloseTimeout it leaves those behind that
// are in a function of the user's.
func (s *Subscription) awaitSlots() {
	abandon := s.life.abandon
	var again <-chan time.Time
	for {
		s.slots.mu.Lock()
		if len(s.slots.running) == 0 {
			s.slots.mu.Unlock()
			return
		}
		if s.slots.none == nil {
			s.slots.none = make(chan struct{})
		}
		none := s.slots.none
		s.slots.mu.Unlock()
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

func (s *Subscription) detachSlots() {
	n := 0
	s.slots.mu.Lock()
	var left []string
	for sl := range s.slots.running {
		if sl.state.CompareAndSwap(slotCalls, slotDetached) {
			s.slots.forget(sl)
			n++
			if e := sl.entry.Load(); e != nil {
				left = append(left, e.ID)
			}
		}
	}
	s.slots.mu.Unlock()
	for _, id := range left {
		s.shared.poller.Disown(s.cfg.Topic, id) // it is no orphan while the function is at work
	}
	if n > 0 {
		s.cfg.Log.Info("A function of the config did not return within CloseTimeout; its message is handled again once its lease has run out",
			s.cfg.Fields.Add(watermill.LogFields{"entries": n}))
	}
}
