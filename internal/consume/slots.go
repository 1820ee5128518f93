package consume

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
)

// slot is a goroutine that takes entries from the ledger and brings each to its
// outcome, one or one batch at a time, until there are none left. At most
// MaxConcurrency slots run: this bounds the unsettled messages, and with one slot it
// preserves the order.
type slot struct {
	s     *Subscription
	state atomic.Int32
	entry *ledger.Entry   // that the user's function is about, in slotCalls
	taken []*ledger.Entry // what Take returned
	round int             // the number of that call
	tasks []Task          // those of taken that are handled

	keys   bool   // it runs key
	silent bool   // Redis did not answer while what was taken was acquired
	left   func() // gives up on the message's handler, in slotCalls; nil: it is another function
}

// slots are the slots of a subscription, and the calls of the user's functions
// outside of them.
type slots struct {
	mu      sync.Mutex
	running map[*slot]struct{}
	none    chan struct{} // signals that none runs
	calls   sync.WaitGroup
}

// A slot that is in a user's function when CloseTimeout has passed is detached:
// nobody waits for it, and it ends when the function returns.
const (
	slotRuns int32 = iota
	slotCalls
	slotDetached
)

// one returns a slot that counts as running.
func (ss *slots) one(s *Subscription) *slot {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	sl := &slot{s: s}
	ss.running[sl] = struct{}{}
	return sl
}

func (sl *slot) run() {
	s := sl.s
	ended := false
	defer func() {
		if sl.exited(); !ended {
			go s.slots.one(s).run() // in its place
		}
		s.slots.end(sl)
	}()
	for {
		var fx ledger.Effects
		sl.taken, fx = s.ledger.Take(time.Now(), sl.taken[:0])
		if ended = len(sl.taken) == 0; ended {
			s.apply(fx)
			return
		}
		s.apply(fx)
		sl.round = sl.taken[0].Round()
		if sl.acquire(); len(sl.tasks) > 0 {
			s.work.Handle(sl.tasks)
		}
	}
}

// call calls a user's function. It does not return if the slot was detached meanwhile; then
// left was called, unless it is nil. If the function calls runtime.Goexit, exited is called, if
// it is not nil, or else the slot's end sees that it was called.
func (sl *slot) call(f, left, exited func()) {
	returned := false
	sl.left = left
	sl.state.Store(slotCalls)
	defer func() {
		if !returned && exited != nil && sl.state.CompareAndSwap(slotCalls, slotRuns) {
			exited()
		}
	}()
	f()
	if returned = true; !sl.state.CompareAndSwap(slotCalls, slotRuns) {
		runtime.Goexit()
	}
}

// exited releases what the slot has, if a user's function called runtime.Goexit (as
// t.FailNow does): it failed.
func (sl *slot) exited() {
	if sl.state.Load() != slotCalls {
		return // or detached
	}
	for _, e := range sl.s.ledger.Running(sl.taken, sl.round) {
		count := e.Count()
		if e != sl.entry {
			count-- // the rest of a batch
		}
		sl.s.GiveBack(&Task{Entry: e}, count)
	}
}

// acquire makes tasks of what is ours, and first of its key. The entries of a batch are
// fetched at the same time: one that Redis does not answer must not delay the others.
func (sl *slot) acquire() {
	s := sl.s
	clear(sl.tasks)
	sl.tasks, sl.silent = sl.tasks[:0], false
	for _, e := range sl.taken {
		sl.tasks = append(sl.tasks, Task{e, sl})
	}
	if len(sl.tasks) == 1 {
		if t := &sl.tasks[0]; t.Death == nil && !(s.acquire(t) && s.first(t)) {
			sl.tasks = sl.tasks[:0]
		}
		return
	}
	ours := make([]bool, len(sl.tasks))
	var fetching sync.WaitGroup
	for i := range sl.tasks {
		t := &sl.tasks[i]
		if ours[i] = t.Fields != nil; !ours[i] {
			fetching.Go(func() { ours[i] = s.acquire(t) })
		}
	}
	fetching.Wait()
	kept := sl.tasks[:0]
	for i, t := range sl.tasks {
		if ours[i] && s.first(&sl.tasks[i]) {
			kept = append(kept, t)
		}
	}
	sl.tasks = kept
}

// first reports whether no other entry comes before this one, because of its key.
func (s *Subscription) first(t *Task) bool {
	if !s.cfg.Keyed || t.HasKey() {
		return true
	}
	key := s.work.Key(t)
	how, fx := s.ledger.Line(time.Now(), t.Entry, key)
	if count := t.Count(); how == ledger.Counted {
		if !t.slot.silent { // otherwise each of a batch would wait; such a crash counts as a delivery then
			_, err := s.keeper.Recount(s.life.ctx, t.Entry, count-1)
			t.slot.silent = unavailable(err)
		}
		s.ledger.Uncounted(t.Entry, count)
		how, fx = s.ledger.Line(time.Now(), t.Entry, key)
	}
	s.apply(fx)
	if how == ledger.Late {
		s.GiveBack(t, t.Count()-1)
	}
	return how == ledger.First && s.acquire(t) // the key may have become free meanwhile
}

// keyBatch is how many entries the keyer takes at a time: enough to take the ledger's mutex
// rarely, and few enough for the first one to start soon.
const keyBatch = 64

// key is what the keyer runs: it computes the keys of a batch, then those of what was read, in
// stream order, until there is nothing left. It counts as a slot, since it calls the user's functions.
func (sl *slot) key(batch []*ledger.Entry) {
	s := sl.s
	sl.keys = true
	ended, keys := false, make([]string, 0, keyBatch)
	defer func() {
		if !ended && sl.state.Load() == slotCalls { // the user's function called runtime.Goexit: it failed
			s.keyed(batch[:len(keys)], keys)
			s.GiveBack(&Task{Entry: sl.entry}, sl.entry.Count())
			go s.slots.one(s).key(batch[len(keys)+1:])
		}
		s.slots.end(sl)
	}()
	for {
		if len(batch) == 0 {
			batch = s.ledger.TakeUnkeyed(keyBatch)
		}
		if ended = len(batch) == 0; ended {
			return
		}
		for _, e := range batch {
			sl.tasks = append(sl.tasks[:0], Task{e, sl})
			key := ""
			if s.acquire(&sl.tasks[0]) {
				key = s.work.Key(&sl.tasks[0])
			}
			keys = append(keys, key)
		}
		s.keyed(batch, keys)
		batch, keys = nil, keys[:0]
	}
}

// keyed gives back what the keyer has taken.
func (s *Subscription) keyed(entries []*ledger.Entry, keys []string) {
	late, fx := s.ledger.Keyed(time.Now(), entries, keys)
	s.apply(fx)
	if len(late) > 0 {
		s.mode.late(late)
	}
}

func (ss *slots) end(sl *slot) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.forget(sl)
}

// forget must be called with the mutex locked.
func (ss *slots) forget(sl *slot) {
	delete(ss.running, sl)
	if len(ss.running) == 0 {
		poke(ss.none)
	}
}

// detachPause is how often to check on slots that are still running after
// CloseTimeout. Those that are not in a user's function end soon.
const detachPause = 10 * time.Millisecond

// awaitSlots waits until no slot runs. After CloseTimeout it detaches slots that
// are in a user's function.
func (s *Subscription) awaitSlots() {
	abandon := s.life.abandon.Done()
	var again <-chan time.Time
	for {
		s.slots.mu.Lock()
		n := len(s.slots.running)
		s.slots.mu.Unlock()
		if n == 0 {
			return
		}
		select {
		case <-s.slots.none: // or none ran earlier
			continue
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
	var handled []func()
	for sl := range s.slots.running {
		if !sl.state.CompareAndSwap(slotCalls, slotDetached) {
			continue
		}
		if s.slots.forget(sl); sl.left == nil {
			n++
		} else {
			handled = append(handled, sl.left)
		}
	}
	s.slots.mu.Unlock()
	var leaving sync.WaitGroup
	for _, leave := range handled {
		leaving.Go(leave)
	}
	leaving.Wait()
	if n > 0 {
		s.cfg.Log.Info("A function of the config did not return within CloseTimeout; its message will be redelivered when its lease expires",
			s.cfg.Fields.Add(watermill.LogFields{"entries": n}))
	}
}
