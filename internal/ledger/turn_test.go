package ledger

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// busySubscription has fresh messages all the time, and one entry that waits for its turn.
type busySubscription struct {
	l     *Ledger
	now   time.Time
	asked time.Time // zero: not
	ends  map[*Entry]time.Time
	read  int
}

func (s *busySubscription) apply(fx Effects) {
	if fx.Turn {
		s.asked = s.now
	}
}

// wait lets time pass until the entry is taken, and returns how long that took. Handlers take that long, and the turn comes
// while the slots are busy again.
func (s *busySubscription) wait(t *testing.T, id string, handler func(n int) time.Duration, limit time.Duration) time.Duration {
	const step = 20 * time.Millisecond
	began := s.now
	for ; s.now.Sub(began) < limit; s.now = s.now.Add(step) {
		for e, at := range s.ends {
			if !s.now.Before(at) {
				delete(s.ends, e)
				s.apply(s.l.Acked(s.now, e))
				s.apply(s.l.Confirmed(s.now, len(s.l.acks)))
			}
		}
		for s.l.fresh.len() < 5 {
			s.read++
			fx, _ := s.l.Add(s.now, s.now, read(fmt.Sprint(s.read)))
			s.apply(fx)
		}
		for len(s.ends) < s.l.cfg.Slots {
			s.l.use.slots = len(s.ends) + 1
			taken, fx := s.l.Take(s.now, nil)
			if s.apply(fx); len(taken) == 0 {
				break
			}
			e := taken[0]
			s.l.Claimed(s.now, e)
			if e.ID == id {
				return s.now.Sub(began)
			}
			s.ends[e] = s.now.Add(handler(s.read))
		}
		if s.apply(s.l.Effects(s.now)); !s.asked.IsZero() && s.now.After(s.asked) {
			s.asked = time.Time{}
			s.apply(s.l.HaveTurn(s.now, func() {}))
		}
	}
	require.FailNow(t, "it starves")
	return 0
}

// A suspect begins when the handlers that were running at its turn have ended. One that must run alone has turns that double until
// they are long enough for that, and others as much time. However long handlers take.
func TestTurn_SlowHandlers(t *testing.T) {
	for _, slots := range []int{1, 4} {
		for _, handler := range []time.Duration{20 * time.Millisecond, 3 * time.Second, 15 * time.Second, time.Minute, time.Hour} {
			for next, most := range map[int64]time.Duration{3: 2*handler + time.Second, 5: 15*handler + time.Second} {
				t.Run(fmt.Sprint(slots, " ", handler, " ", next), func(t *testing.T) {
					s := &busySubscription{l: newLedger(slots), now: start, ends: make(map[*Entry]time.Time)}
					s.apply(s.l.Offer(start, []*Entry{claim("1000000000", next)}, false))
					took := s.wait(t, "1000000000", func(int) time.Duration { return handler }, 100*handler+time.Minute)
					require.LessOrEqual(t, took, most)
				})
			}
		}
	}
}

// A handler that took very long has no effect once it has ended.
func TestTurn_AfterASlowHandler(t *testing.T) {
	s := &busySubscription{l: newLedger(4), now: start, ends: make(map[*Entry]time.Time)}
	s.apply(s.l.Offer(start, []*Entry{claim("1000000000", 5)}, false))
	slow := 20 * time.Minute
	took := s.wait(t, "1000000000", func(n int) time.Duration {
		if n <= 5 {
			return slow
		}
		return time.Duration(20+20*(n%3)) * time.Millisecond
	}, time.Hour)
	require.LessOrEqual(t, took, 2*slow)
}

// takeClaimed has a slot take and claim an entry of a dead consumer.
func takeClaimed(l *Ledger, next int64) *Entry {
	l.Offer(start, []*Entry{claim("9", next)}, false)
	_, e := take(l, start)
	l.Claimed(start, e.SetCount(next, next+1))
	return e
}

// A suspect of ours that could not be fetched blocks no others, and is a suspect when it is tried again, with one slot, too.
func TestTurn_OrphanWithOneSlot(t *testing.T) {
	for _, next := range []int64{3, 5} {
		l := newLedger(1)
		l.Offer(start, []*Entry{(&Entry{ID: "9"}).SetCount(next, next)}, false)
		_, e := take(l, start)
		require.NotNil(t, e)
		l.Retry(start, e, at(1))
		check(t, l)
		taken, fx := l.Take(at(2), nil)
		require.Empty(t, taken)
		require.True(t, fx.Turn)
		_, again := take(l, at(2))
		require.Equal(t, e, again)
		require.NotNil(t, l.origin(e))
		check(t, l)
	}
}

// What must run alone waits for calls of OnBroken that are under way, unless they hang; and none begins while it waits.
func TestTurn_BesideCalls(t *testing.T) {
	l := newLedger(2)
	l.Add(start, start, read("1", "2"))
	for range 2 {
		_, e := take(l, start)
		broken(l, start, e)
	}
	call, _ := l.TakeBroken(start)
	require.NotNil(t, call)
	l.use.callers = 1
	l.Offer(at(1), []*Entry{claim("9", 5)}, false)
	id, _ := take(l, at(1))
	require.Empty(t, id)
	other, fx := l.TakeBroken(at(1))
	require.Nil(t, other)
	require.Equal(t, at(5), fx.Timer)
	id, e := take(l, at(5))
	require.Equal(t, "9", id, "it hangs")
	check(t, l)
	l.Remove(at(6), e)
	require.Equal(t, 1, l.Effects(at(6)).Callers)
	other, _ = l.TakeBroken(at(6))
	require.NotNil(t, other)
}

// A snoozed message is as suspect as it was before: its count is the same.
func TestTurn_Snoozed(t *testing.T) {
	for _, next := range []int64{3, 5} {
		for _, keyed := range []bool{false, true} {
			l := newLedger(2, func(c *Config) { c.Keyed = keyed })
			e := takeClaimed(l, next)
			if keyed {
				require.True(t, line(l, start, e, "a"))
			}
			l.Claimed(start, e.SetCount(next-1, next)) // its count is lowered
			l.Uncounted(e, next)
			require.Equal(t, next-1, l.RestoreCount(e))
			l.Retry(start, e, at(1))
			check(t, l)
			taken, fx := l.Take(at(1), nil)
			require.Empty(t, taken)
			require.True(t, fx.Turn)
			check(t, l)
			_, again := take(l, at(1))
			require.Equal(t, e, again)
			require.NotNil(t, l.origin(e))
			l.Claimed(at(1), e.SetCount(next, next+1))
			l.Retry(at(1), e, at(2)) // its handler failed
			_, again = take(l, at(2))
			require.Equal(t, e, again)
			require.Nil(t, l.origin(e), "a retry of ours")
			check(t, l)
		}
	}
}

// With one slot a snoozed message comes before its successors, whatever it is.
func TestTurn_SnoozedInOrder(t *testing.T) {
	for _, next := range []int64{3, 5} {
		l := newLedger(1)
		e := takeClaimed(l, next)
		l.Uncounted(e, next)
		l.Retry(start, e, at(1))
		require.Equal(t, e, l.head)
		check(t, l)
	}
}

// A pause makes nothing less suspect.
func TestTurn_HeldBack(t *testing.T) {
	for _, next := range []int64{3, 5} {
		l := newLedger(2)
		e := takeClaimed(l, next)
		l.Pause()
		require.True(t, l.HoldBack(start, e))
		check(t, l)
		l.Resume(start)
		_, again := take(l, start)
		require.Equal(t, e, again)
		require.NotNil(t, l.origin(e))
		check(t, l)
	}
}

// That nothing is read beside an entry that runs alone, until its ack has arrived, does not mean that there is no other work.
func TestTurn_SlowAck(t *testing.T) {
	l := newLedger(2)
	l.Offer(start, []*Entry{claim("8", 5), claim("9", 5)}, false)
	_, e := take(l, start)
	l.Claimed(start, e)
	l.Acked(at(0.1), e)
	l.Effects(at(0.2))
	require.False(t, l.Confirmed(at(2), 1).Turn, "others have as much time")
	require.Equal(t, at(3), l.nextTime(at(2)), "or a second")
}
