package ledger

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var (
	start   = time.Unix(1000, 0)
	errLost = errors.New("lost")
)

func at(seconds float64) time.Time {
	return start.Add(time.Duration(seconds * float64(time.Second)))
}

func newLedger(slots int, change ...func(*Config)) *Ledger {
	cfg := Config{Slots: slots, Leased: true, Suspect: 3, Last: 5, Patience: 5 * time.Second, Callers: 2, Bounds: NewBounds(), Lost: errLost, Compare: byNumber}
	for _, c := range change {
		c(&cfg)
	}
	return New(cfg)
}

// byNumber compares IDs, which are numbers here.
func byNumber(a, b string) int {
	x, _ := strconv.Atoi(a)
	y, _ := strconv.Atoi(b)
	return x - y
}

func read(ids ...string) (entries []*Entry) {
	for _, id := range ids {
		entries = append(entries, (&Entry{ID: id, Fields: []string{"a", "b"}}).SetCount(1, 2))
	}
	return entries
}

// claim returns a candidate with the given next delivery count.
func claim(id string, next int64) *Entry {
	return (&Entry{ID: id, Owner: "dead"}).SetCount(next-1, next)
}

// take takes an entry as a slot, and returns its ID; "" if there is none.
func take(l *Ledger, now time.Time) (id string, e *Entry) {
	if l.Effects(now); l.apart.asked {
		l.HaveTurn(now, func() {})
	}
	l.use.slots = l.use.in[Running] + 1 // this slot, whatever the effects have requested
	taken, _ := l.Take(now, nil)
	if len(taken) == 0 {
		return "", nil
	}
	return taken[0].ID, taken[0]
}

// broken has OnBroken called with an entry.
func broken(l *Ledger, now time.Time, e *Entry) (dropped *Entry, ok bool) {
	e.Broken = errors.New("broken")
	return l.Retry(now, e, now)
}

func takeAll(l *Ledger, now time.Time) (ids []string) {
	for l.use.in[Running] < l.cfg.Slots {
		id, e := take(l, now)
		if e == nil {
			break
		}
		ids = append(ids, id)
	}
	return ids
}

// Each state, and the result of each event in it.
func TestEvents(t *testing.T) {
	// in brings an entry into a state.
	in := map[State]func(l *Ledger) *Entry{
		Candidate: func(l *Ledger) *Entry { e := claim("1", 2); l.Offer(start, []*Entry{e}, false); return e },
		Queued:    func(l *Ledger) *Entry { e := read("1")[0]; l.Add(start, start, []*Entry{e}); return e },
		Running:   func(l *Ledger) *Entry { l.Add(start, start, read("1")); _, e := take(l, start); return e },
		Calling: func(l *Ledger) *Entry {
			l.Add(start, start, read("1"))
			_, e := take(l, start)
			broken(l, start, e)
			e, _ = l.TakeBroken(start)
			return e
		},
		Waiting: func(l *Ledger) *Entry {
			l.Add(start, start, read("1"))
			_, e := take(l, start)
			l.Retry(start, e, at(10))
			return e
		},
		Acked: func(l *Ledger) *Entry {
			l.Add(start, start, read("1"))
			_, e := take(l, start)
			l.Acked(start, e)
			return e
		},
		Releasing: func(l *Ledger) *Entry {
			e := read("1")[0]
			l.Add(start, start, []*Entry{e})
			l.Releasing(start, e)
			return e
		},
	}
	events := map[string]func(l *Ledger, e *Entry){
		"read again": func(l *Ledger, e *Entry) { l.Add(at(1), at(1), read("1")) },
		"offered":    func(l *Ledger, e *Entry) { l.Offer(at(1), []*Entry{claim("1", 2)}, false) },
		"lost":       func(l *Ledger, e *Entry) { l.Lose(at(1), e) },
		"gone":       func(l *Ledger, e *Entry) { l.Gone(at(1), e) },
		"removed":    func(l *Ledger, e *Entry) { l.Remove(at(1), e) },
		"closed":     func(l *Ledger, e *Entry) { l.Close(at(1)) },
	}
	type outcome struct {
		state State // of the entry
		here  State // of the entry under its ID
	}
	same := func(s State) outcome { return outcome{s, s} }
	want := map[string]map[State]outcome{
		"read again": {Candidate: {None, Queued}}, // otherwise already ours
		"offered":    {},
		"lost":       {Queued: {}, Waiting: {}, Candidate: {}},
		"gone":       {Waiting: {}},
		"removed":    {Candidate: {}, Queued: {}, Running: {}, Calling: {}, Waiting: {}, Acked: {}, Releasing: {}},
		"closed":     {Candidate: {}, Queued: same(Releasing), Waiting: same(Releasing)},
	}
	for event, apply := range events {
		for state, bring := range in {
			t.Run(fmt.Sprint(event, "/", state), func(t *testing.T) {
				l := newLedger(1)
				e := bring(l)
				require.Equal(t, state, e.state)
				apply(l, e)
				expect, ok := want[event][state]
				if !ok {
					expect = same(state)
				}
				require.Equal(t, expect.state, e.state)
				here := None
				if other := l.entries["1"]; other != nil {
					here = other.state
				}
				require.Equal(t, expect.here, here)
				check(t, l)
			})
		}
	}
}

// What a slot takes.
func TestTake(t *testing.T) {
	for _, tt := range []struct {
		name  string
		slots int
		do    func(l *Ledger)
		at    float64
		want  []string
	}{
		{"nothing", 2, func(l *Ledger) {}, 0, nil},
		{"in order", 1, func(l *Ledger) { l.Add(start, start, read("1", "2")) }, 0, []string{"1"}},
		{"with one slot what waits holds up the others", 1, func(l *Ledger) {
			l.Add(start, start, read("1", "2"))
			_, e := take(l, start)
			l.Retry(start, e, at(10))
		}, 9, nil},
		{"until it is due", 1, func(l *Ledger) {
			l.Add(start, start, read("1", "2"))
			_, e := take(l, start)
			l.Retry(start, e, at(10))
		}, 10, []string{"1"}},
		{"or lost", 1, func(l *Ledger) {
			l.Add(start, start, read("1", "2"))
			_, e := take(l, start)
			l.Retry(start, e, at(10))
			l.Lose(at(1), e)
		}, 1, []string{"2"}},
		{"but not what waits to be moved", 1, func(l *Ledger) {
			l.Add(start, start, read("1", "2"))
			_, e := take(l, start)
			e.Death = "dead"
			l.Retry(start, e, at(10))
		}, 1, []string{"2"}},
		{"what was claimed is older than what was read", 1, func(l *Ledger) {
			l.Add(start, start, read("5"))
			l.Offer(start, []*Entry{claim("1", 2)}, false)
		}, 0, []string{"1"}},
		{"an orphan keeps its place", 1, func(l *Ledger) {
			l.Offer(start, []*Entry{(&Entry{ID: "1"}).SetCount(1, 1)}, false)
			l.Add(start, start, read("2"))
			l.Offer(start, []*Entry{claim("0", 2)}, false)
		}, 0, []string{"0"}},
		{"fresh ones, and others, in turn", 6, func(l *Ledger) {
			l.Add(start, start, read("1", "2", "3", "4", "5"))
			l.Offer(start, []*Entry{claim("a", 2), claim("b", 2)}, false)
		}, 0, []string{"a", "1", "b", "2", "3", "4"}},
		{"half of the slots at most for what is not fresh", 4, func(l *Ledger) {
			l.Add(start, start, read("1", "2", "3"))
			l.Offer(start, []*Entry{claim("a", 2), claim("b", 2), claim("c", 2)}, false)
		}, 0, []string{"a", "1", "b", "2"}},
		{"all of them if nothing is fresh", 3, func(l *Ledger) {
			l.Offer(start, []*Entry{claim("a", 2), claim("b", 2), claim("c", 2)}, false)
		}, 0, []string{"a", "b", "c"}},
		{"one suspect at a time", 3, func(l *Ledger) {
			l.Offer(start, []*Entry{claim("a", 3), claim("b", 3)}, false)
		}, 0, []string{"a"}},
		{"beside others", 3, func(l *Ledger) {
			l.Offer(start, []*Entry{claim("a", 3), claim("b", 3)}, false)
			l.Add(start, start, read("1", "2", "3"))
		}, 0, []string{"a", "1", "2"}},
		{"what is delivered for the last time is alone", 3, func(l *Ledger) {
			l.Offer(start, []*Entry{claim("a", 5), claim("b", 2)}, false)
			l.Add(start, start, read("1"))
		}, 0, []string{"a"}},
		{"it waits for what runs, and nothing new is taken", 3, func(l *Ledger) {
			l.Add(start, start, read("1"))
			take(l, start)
			l.Offer(start, []*Entry{claim("a", 5)}, false)
			l.Add(start, start, read("2"))
		}, 4, nil},
		{"what was released has crashed nobody", 3, func(l *Ledger) {
			a := claim("a", 5)
			a.Released = true
			l.Offer(start, []*Entry{a, claim("b", 2)}, false)
		}, 0, []string{"a", "b"}},
		{"with no limit nothing is suspect", 3, func(l *Ledger) {
			l.cfg.Suspect, l.cfg.Last = 0, 0
			l.Offer(start, []*Entry{claim("a", 50), claim("b", 50)}, false)
		}, 0, []string{"a", "b"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLedger(tt.slots)
			tt.do(l)
			check(t, l)
			require.Equal(t, tt.want, takeAll(l, at(tt.at)))
			check(t, l)
		})
	}
}

// Entries that are not fresh may all be slow: they take half of the slots, one
// after the other, and no more while fresh ones arrive.
func TestTake_PastIsSlow(t *testing.T) {
	l := newLedger(4)
	l.Offer(start, []*Entry{claim("a", 2), claim("b", 2), claim("c", 2), claim("d", 2)}, false)
	for i := range 20 {
		l.Add(start, start, read(fmt.Sprint(i)))
		for l.fresh.len() > 0 {
			id, e := take(l, start)
			require.NotNil(t, e)
			if id == fmt.Sprint(i) {
				l.Acked(start, e)
			}
		}
	}
	require.Equal(t, 2, l.use.past)
	require.Equal(t, 2, l.use.in[Running])
}

// A slot takes a retry that became due before its timer fired; the new entry for
// which the slot was started gets another one, which is started then.
func TestTake_StartsTheNextSlot(t *testing.T) {
	l := newLedger(2)
	l.Add(start, start, read("1"))
	_, e := take(l, start)
	l.Retry(start, e, at(1))
	require.Equal(t, 0, l.Effects(start).Slots)
	l.use.slots = 0
	fx, _ := l.Add(at(1), at(1), read("2"))
	require.Equal(t, 1, fx.Slots)
	first, fx := l.Take(at(1), nil)
	require.Len(t, first, 1)
	require.Equal(t, 1, fx.Slots, "one slot sleeps beside the other entry")
	second, fx := l.Take(at(1), nil)
	require.Len(t, second, 1)
	require.Equal(t, 0, fx.Slots)
}

// While suspects run one by one, alone, other work gets half of the time; and a
// very slow handler does not stop everything.
func TestTake_Lonely(t *testing.T) {
	l := newLedger(2)
	l.Add(start, start, read("1", "2", "3", "4", "5", "6"))
	_, slow := take(l, start)
	l.Offer(at(1), []*Entry{claim("a", 5), claim("b", 5)}, false)
	id, _ := take(l, at(1))
	require.Empty(t, id, "it waits for the slow one")
	require.Equal(t, at(6), l.nextTime(at(1)), "not for longer than its patience")
	id, quick := take(l, at(6))
	require.Equal(t, "2", id, "the others go on")
	l.Acked(at(7), quick)
	id, quick = take(l, at(7))
	require.Equal(t, "3", id, "for as long as they have waited")
	l.Acked(at(10), quick)
	l.Confirmed(at(10), len(l.acks))
	id, quick = take(l, at(10.5))
	require.Equal(t, "4", id)
	l.Acked(at(11), quick)
	id, _ = take(l, at(11))
	require.Empty(t, id, "then it is its turn again")
	l.Acked(at(12), slow)
	id, a := take(l, at(12))
	require.Equal(t, "a", id, "as soon as what ran at its turn has ended")
	require.Zero(t, l.Room(10), "nothing is read meanwhile")
	l.Acked(at(14), a)
	id, _ = take(l, at(14))
	require.Empty(t, id, "its ack has not arrived: another's crash would count for it")
	l.Confirmed(at(14), len(l.acks))
	id, next := take(l, at(14))
	require.Equal(t, "5", id, "b has to wait")
	l.Acked(at(16.9), next)
	id, _ = take(l, at(16.9))
	require.Equal(t, "6", id)
	id, _ = take(l, at(17))
	require.Empty(t, id, "a took from 11 to 14")
}

// The call of OnBroken with a suspect, or with what must run alone, may crash the process like a handler:
// it is as lonely. If it hangs, that ends.
func TestTakeBroken_Suspects(t *testing.T) {
	for _, next := range []int64{3, 5} { // a suspect, a lonely one
		for _, hangs := range []bool{false, true} {
			t.Run(fmt.Sprint(next, " hangs=", hangs), func(t *testing.T) {
				l := newLedger(3)
				l.Add(start, start, read("1", "2", "3"))
				_, other := take(l, start)
				broken(l, start, other)
				l.Offer(start, []*Entry{claim("a", next), claim("b", next)}, false)
				for id, e := take(l, start); id != "a"; id, e = take(l, start) {
					require.NotNil(t, e)
					l.Acked(start, e)
					l.Confirmed(start, len(l.acks))
				}
				a := l.entries["a"]
				l.Claimed(start, a)
				broken(l, start, a)
				check(t, l)
				e, _ := l.TakeBroken(start)
				require.Equal(t, a, e, "before those that came earlier")
				e, fx := l.TakeBroken(start)
				if next == 5 {
					require.Nil(t, e, "nothing runs beside it")
					require.Equal(t, at(5), fx.Timer)
				} else {
					require.Equal(t, other, e)
				}
				for id, e := take(l, start); e != nil; id, e = take(l, start) {
					require.NotEqual(t, 5, next)
					require.NotEqual(t, "b", id)
					l.Acked(start, e)
					l.Confirmed(start, len(l.acks))
				}
				if hangs {
					_, e := take(l, at(4.9))
					require.Nil(t, e)
				} else {
					l.Acked(at(4.9), a)
					_, e := take(l, at(4.9))
					require.Nil(t, e, "its ack has not arrived")
					l.Confirmed(at(4.9), 1)
				}
				check(t, l)
				id, e := take(l, at(5))
				require.NotNil(t, e)
				if next == 5 {
					require.NotEqual(t, "b", id, "others have their turn")
					e, _ := l.TakeBroken(at(5))
					require.Equal(t, other, e)
				} else {
					require.Equal(t, "b", id)
				}
				check(t, l)
			})
		}
	}
}

// Suspects, and what must run alone, wait for the ledger's turn, and everything else does not wait for
// them. The turn ends with such an entry's outcome, and when there is none any more.
func TestTurn(t *testing.T) {
	for _, next := range []int64{3, 5} { // a suspect, a lonely one
		for name, end := range map[string]func(l *Ledger, e *Entry){
			"retry":    func(l *Ledger, e *Entry) { l.Retry(start, e, at(1)) },
			"released": func(l *Ledger, e *Entry) { l.Releasing(start, e) },
			"removed":  func(l *Ledger, e *Entry) { l.Remove(start, e) },
			"held":     func(l *Ledger, e *Entry) { l.HoldBack(start, e) },
			"acked": func(l *Ledger, e *Entry) {
				l.Acked(start, e)
				require.Len(t, l.Acks(10), 1)
				l.Confirmed(start, 1)
			},
		} {
			t.Run(fmt.Sprint(name, " ", next), func(t *testing.T) {
				l := newLedger(2)
				fx := l.Offer(start, []*Entry{claim("a", next), claim("b", next)}, false)
				require.True(t, fx.Turn)
				require.Zero(t, fx.Slots)
				require.False(t, l.Effects(start).Turn, "it was asked for")
				l.Add(start, start, read("1"))
				l.use.slots = 1
				taken, fx := l.Take(start, nil)
				require.Equal(t, "1", taken[0].ID, "in the meantime")
				require.False(t, fx.Turn)
				l.Remove(start, taken[0])
				ended := 0
				fx = l.HaveTurn(start, func() { ended++ })
				require.Equal(t, 1, fx.Slots)
				taken, _ = l.Take(start, nil)
				require.Equal(t, "a", taken[0].ID)
				l.Claimed(start, taken[0])
				require.Zero(t, ended)
				end(l, taken[0])
				require.Equal(t, 1, ended)
				l.Effects(start)
				require.True(t, l.apart.asked, "for b")
				l.Remove(start, l.entries["b"])
				if a := l.entries["a"]; a != nil {
					l.Remove(start, a)
				}
				l.HaveTurn(start, func() { ended++ })
				require.Equal(t, 2, ended, "nothing needs it any more")
				check(t, l)
			})
		}
	}
}

// A turn is not kept while nothing can use it.
func TestTurn_OfNoUse(t *testing.T) {
	for name, change := range map[string]func(l *Ledger){
		"closed": func(l *Ledger) { l.Close(start) },
		"paused": (*Ledger).Pause,
		"taken by others": func(l *Ledger) {
			for _, e := range slices.Collect(maps.Values(l.entries)) {
				if e.Owner != "" {
					l.Remove(start, e)
				}
			}
			l.Effects(start)
		},
		"a retry comes first": func(l *Ledger) {
			l.Retry(start, l.entries["1"], at(1))
			l.Effects(start)
		},
	} {
		for _, next := range []int64{3, 5} { // a suspect, a lonely one
			l := newLedger(1)
			l.Offer(start, []*Entry{claim("a", next)}, false)
			require.True(t, l.apart.asked)
			l.Add(start, start, read("1"))
			l.use.slots = 1
			l.Take(start, nil)
			ended := false
			l.HaveTurn(start, func() { ended = true })
			require.False(t, ended, "1 may take long, and a must not wait for another turn then")
			change(l)
			require.True(t, ended, name)
			check(t, l)
		}
	}
}

// No turn is asked for while it could not be used: a handler may take an hour.
func TestTurn_NoFreeSlot(t *testing.T) {
	l := newLedger(1)
	l.Add(start, start, read("1"))
	_, slow := take(l, start)
	require.False(t, l.Offer(start, []*Entry{claim("a", 3)}, false).Turn)
	require.True(t, l.Acked(at(3600), slow).Turn)
	l.HaveTurn(at(3600), func() {})
	id, _ := take(l, at(3600))
	require.Equal(t, "a", id)
}

// A pause does not count as time for which others must be given as much.
func TestTurn_Pause(t *testing.T) {
	for _, isBroken := range []bool{false, true} {
		l := newLedger(2)
		l.Offer(start, []*Entry{claim("a", 5), claim("b", 5), claim("c", 5)}, false)
		_, a := take(l, start)
		if isBroken {
			l.Claimed(start, a)
			broken(l, start, a)
		}
		l.Pause()
		if !isBroken {
			l.Remove(at(1), a) // others have it
		}
		l.Resume(at(3600))
		if isBroken {
			e, _ := l.TakeBroken(at(3600))
			require.Equal(t, a, e)
			_, e = take(l, at(3604))
			require.Nil(t, e, "the call of OnBroken runs alone")
			l.Remove(at(3604), a)
		}
		id, _ := take(l, at(3609))
		require.Equal(t, "b", id)
		check(t, l)
	}
}

// A turn is not over with an entry that others have taken: the running handlers have ended for the
// next one, too.
func TestTake_LonelyTakenByOthers(t *testing.T) {
	l := newLedger(2)
	l.Add(start, start, read("1", "2", "3", "4"))
	_, slow := take(l, start)
	l.Offer(at(1), []*Entry{claim("a", 5), claim("b", 5), claim("c", 5)}, false)
	id, _ := take(l, at(1))
	require.Empty(t, id, "it waits for the slow one")
	l.Acked(at(3), slow)
	l.Confirmed(at(3), len(l.acks))
	id, a := take(l, at(3))
	require.Equal(t, "a", id)
	l.Remove(at(3), a)
	id, b := take(l, at(3))
	require.Equal(t, "b", id)
	l.Claimed(at(3), b)
	l.Acked(at(4), b)
	l.Confirmed(at(4), len(l.acks))
	for _, want := range []string{"2", "3"} {
		id, fresh := take(l, at(4))
		require.Equal(t, want, id, "others have their turn: c waits")
		l.Acked(at(4), fresh)
	}
	l.Confirmed(at(4), len(l.acks))
	id, c := take(l, at(7))
	require.Equal(t, "c", id)
	l.Remove(at(13), c)
	id, _ = take(l, at(13))
	require.Equal(t, "4", id, "it took too long to find out")
}

// Nothing is read while an entry runs alone: that no other work is here does not
// mean that there is none. A topic's fresh messages waited until the last such
// entry had run.
func TestTake_LonelyOneAfterTheOther(t *testing.T) {
	l := newLedger(2)
	l.Offer(start, []*Entry{claim("a", 5), claim("b", 5)}, false)
	_, a := take(l, start)
	require.Zero(t, l.Room(1))
	l.Acked(at(3), a)
	fx := l.Confirmed(at(3), 1)
	require.True(t, fx.Room)
	require.Positive(t, l.Room(1), "the others' turn")
	id, _ := take(l, at(3))
	require.Empty(t, id)
	l.Add(at(3.1), at(3.1), read("1", "2"))
	id, fresh := take(l, at(3.1))
	require.Equal(t, "1", id)
	l.Acked(at(5.9), fresh)
	id, fresh = take(l, at(5.9))
	require.Equal(t, "2", id)
	l.Acked(at(5.95), fresh)
	l.Confirmed(at(5.95), len(l.acks))
	id, _ = take(l, at(5.99))
	require.Empty(t, id, "a took from 0 to 3")
	id, _ = take(l, at(6))
	require.Equal(t, "b", id)
}

// An orphan whose claim got no answer is claimed again later. Then it shared its last
// delivery with whatever else ran, as a retry does.
func TestTake_LonelyOrphan(t *testing.T) {
	l := newLedger(2)
	l.Offer(start, []*Entry{(&Entry{ID: "a"}).SetCount(5, 5)}, false)
	_, a := take(l, start)
	_, ok := l.Retry(start, a, at(1))
	require.True(t, ok)
	l.Add(at(0.5), at(0.5), read("1"))
	_, other := take(l, at(0.5))
	id, _ := take(l, at(2))
	require.Empty(t, id, "1 is running")
	l.Acked(at(3), other)
	id, _ = take(l, at(3))
	require.Equal(t, "a", id)
	l.Add(at(3), at(3), read("2"))
	id, _ = take(l, at(3))
	require.Empty(t, id, "a is running alone")
}

// The same of a suspect: no other one runs beside it.
func TestTake_SuspectOrphan(t *testing.T) {
	l := newLedger(2)
	l.Offer(start, []*Entry{(&Entry{ID: "a"}).SetCount(3, 3)}, false)
	_, a := take(l, start)
	_, ok := l.Retry(start, a, at(1))
	require.True(t, ok)
	l.Offer(start, []*Entry{claim("b", 3)}, false)
	_, b := take(l, start)
	require.Equal(t, "b", b.ID)
	id, _ := take(l, at(2))
	require.Empty(t, id, "b is running")
	l.Acked(at(3), b)
	l.Confirmed(at(3), 1)
	id, _ = take(l, at(3))
	require.Equal(t, "a", id)
}

// Without other work a suspect waits no longer than it takes to know that.
func TestTake_LonelyOnly(t *testing.T) {
	l := newLedger(2)
	l.Offer(start, []*Entry{claim("a", 5), claim("b", 5)}, false)
	id, a := take(l, start)
	require.Equal(t, "a", id)
	l.Acked(at(3), a)
	l.Confirmed(at(3), 1)
	require.Equal(t, at(4), l.nextTime(at(3)))
	id, _ = take(l, at(3.9))
	require.Empty(t, id)
	id, _ = take(l, at(4))
	require.Equal(t, "b", id)
}

// The read-ahead limit.
func TestRoom(t *testing.T) {
	l := newLedger(3)
	require.Equal(t, 13, l.Room(10))
	l.Add(start, start, read("1", "2", "3", "4"))
	require.Equal(t, 3, l.Room(0)-0+3, "no room beside what is queued") // parked
	take(l, start)
	take(l, start)
	require.Equal(t, 1+10, l.Room(10))
	id, _ := take(l, start)
	require.Equal(t, "3", id)
	l.Room(0)
	require.True(t, l.parked)
	fx := l.Acked(start, l.entries["1"])
	require.False(t, fx.Room, "what is queued comes first")
	take(l, start)
	fx = l.Acked(start, l.entries["2"])
	require.True(t, fx.Room)
}

// Retries have at most half of the slots while there is other work: so there is room to read
// that, also while they have all of them.
func TestRoom_Retries(t *testing.T) {
	l := newLedger(4)
	l.Add(start, start, read("1", "2", "3", "4"))
	for _, id := range []string{"1", "2", "3", "4"} {
		take(l, start)
		l.Retry(start, l.entries[id], at(1))
	}
	require.Equal(t, 4, l.Room(0))
	for range 4 {
		take(l, at(1))
	}
	require.Equal(t, 2, l.Room(0))
	l.Add(at(1), at(1), read("5"))
	require.Zero(t, l.Room(0), "one waits for a slot")
}

// While very many entries wait to be moved to the dead-letter stream, nothing more
// is read.
func TestRoom_Dead(t *testing.T) {
	l := newLedger(1)
	for i := range maxWaiting / 2 {
		require.Positive(t, l.Room(1), "%d wait", i)
		l.Add(start, start, read(fmt.Sprint(i)))
		_, e := take(l, start)
		e.Death = "dead"
		dropped, ok := l.Retry(start, e, at(60))
		require.True(t, ok)
		require.Nil(t, dropped)
	}
	require.Zero(t, l.Room(1))
	check(t, l)
}

// An entry that may have been moved is tried again, whatever happened to its
// stream: only the dead-letter stream knows.
func TestGone_Moving(t *testing.T) {
	l := newLedger(1)
	l.Add(start, start, read("1"))
	_, e := take(l, start)
	l.Moving(e, MaybeMoved)
	l.Retry(start, e, at(1))
	require.Zero(t, l.Gone(start, e))
	require.Equal(t, Waiting, e.state)
	l.Moving(e, NotMoved)
	require.Equal(t, 1, l.Gone(start, e))
	require.Equal(t, None, e.state)
}

// Entries that no handler has are released at the end.
func TestClose(t *testing.T) {
	l := newLedger(2)
	l.Add(start, start, read("1", "2", "3", "4"))
	take(l, start)
	_, e := take(l, start)
	l.Retry(start, e, at(60))
	l.Offer(start, []*Entry{claim("a", 2)}, false)
	queued, retries := l.Close(at(1))
	slices.SortFunc(queued, func(a, b *Entry) int { return int(a.ID[0]) - int(b.ID[0]) })
	require.Len(t, queued, 2)
	require.Equal(t, "3", queued[0].ID)
	require.Len(t, retries, 1)
	require.Equal(t, "2", retries[0].ID)
	id, _ := take(l, at(1))
	require.Empty(t, id)
	_, ok := l.Retry(at(1), l.entries["1"], at(2))
	require.False(t, ok, "whoever has it gives it back")
	require.Equal(t, 2, l.cfg.Bounds.Ahead()-0+2)
}

// An entry that is pending for us with a lost answer is released too: nobody has handled it.
func TestClose_Orphan(t *testing.T) {
	l := newLedger(1)
	l.Add(start, start, read("5"))
	take(l, start)
	l.Offer(start, []*Entry{(&Entry{ID: "1"}).SetCount(2, 2), claim("2", 2)}, false)
	queued, _ := l.Close(start)
	require.Equal(t, []string{"1"}, ids(queued))
}

// An entry that a recreated group delivers to us while its claim is under way is another
// delivery: the claim will be refused.
func TestAdd_BeingClaimed(t *testing.T) {
	l := newLedger(1)
	l.Offer(start, []*Entry{claim("1", 3)}, false)
	_, e := take(l, start)
	l.Add(start, start, read("1"))
	l.Remove(start, e)
	id, _ := take(l, start)
	require.Equal(t, "1", id)
	check(t, l)
}

// A ledger whose entries cannot be released still delivers them.
func TestClose_Serve(t *testing.T) {
	l := newLedger(1, func(c *Config) { c.Serve, c.Leased = true, false })
	l.Add(start, start, read("1", "2"))
	queued, _ := l.Close(start)
	require.Empty(t, queued)
	for _, want := range []string{"1", "2", ""} {
		id, e := take(l, start)
		require.Equal(t, want, id)
		if e != nil {
			l.Acked(start, e)
		}
	}
}

// A message's context ends when its lease is lost, whichever of Attach and Lose
// comes first.
func TestAttach(t *testing.T) {
	for _, lostFirst := range []bool{false, true} {
		l := newLedger(1)
		l.Add(start, start, read("1"))
		_, e := take(l, start)
		var cause error
		if lostFirst {
			l.Lose(start, e)
		}
		cancel := context.CancelCauseFunc(func(err error) { cause = err })
		require.Equal(t, !lostFirst, e.Attach(&cancel))
		if !lostFirst {
			l.Lose(start, e)
			require.Equal(t, errLost, cause)
		}
		_, ok := l.Retry(start, e, at(1))
		require.True(t, ok)
		require.Equal(t, None, e.state, "it is another consumer's")
	}
}

// Acks after the end are not sent, and do not count against the unacked limit of
// the Subscriber's other topics.
func TestEndAcks(t *testing.T) {
	l := newLedger(2)
	l.Add(start, start, read("1", "2"))
	_, one := take(l, start)
	_, two := take(l, start)
	l.Acked(start, one)
	require.EqualValues(t, 1, l.cfg.Bounds.Unacked.used.Load())
	require.Equal(t, 1, l.EndAcks())
	l.Acked(start, two)
	require.Len(t, l.acks, 1)
	require.Zero(t, l.cfg.Bounds.Unacked.used.Load())
}

// An entry that is not pending was taken from us if others are pending that were
// ours as long; not if all entries that were read with it or before are missing.
func TestMissing(t *testing.T) {
	l := newLedger(4)
	l.Add(at(0), at(0), read("1", "1b"))
	l.Add(at(1), at(1), read("2"))
	one, sibling, two := l.entries["1"], l.entries["1b"], l.entries["2"]
	missing := func(e *Entry, others ...*Entry) Missing {
		m := l.Missing(at(10), e, time.Minute, others)
		m.Ours, m.Age = false, 0
		return m
	}
	require.Equal(t, Missing{}, missing(two))
	require.Equal(t, Missing{ReadOn: true}, missing(one), "2 may be of another group, whether it is here still or not")
	require.Equal(t, Missing{ReadOn: true}, missing(one, two))
	require.Equal(t, Missing{ReadOn: true, Taken: true}, missing(one, sibling))
	require.Equal(t, 10*time.Second, l.Missing(at(10), one, 0, nil).Age)
	l.Renewed(at(2), one, two)
	require.Equal(t, Missing{Taken: true}, missing(one, two))
	l.Add(at(3), at(3), read("2")) // again, by another group
	require.Equal(t, Missing{ReadOn: true}, missing(one, two))
	l.Renewed(at(4), one, two)
	candidate := (&Entry{ID: "3", Owner: "dead"}).SetCount(1, 2)
	l.Offer(at(5), []*Entry{candidate}, false)
	require.Equal(t, Missing{}, missing(one), "3 is not ours")
	l.Claimed(at(6), candidate)
	require.Equal(t, Missing{ReadOn: true}, missing(one))
	l.PutBack(at(10), one)
	require.Equal(t, Missing{}, missing(one), "it may be acked by hand again")
	require.True(t, l.Missing(at(10).Add(ackedByHand+1), one, time.Minute, nil).ReadOn)
	for taken := (*Entry)(nil); taken != one; {
		_, taken = take(l, at(10))
		require.NotNil(t, taken)
	}
	require.True(t, missing(one).ReadOn, "it is delivered again: what happens now is another event")
}

// Entries that were restored were lost too: that they are pending does not mean that one
// which is still missing was taken by itself.
func TestMissing_OthersRestored(t *testing.T) {
	l := newLedger(4)
	l.Add(at(0), at(0), read("1", "2"))
	one, two := l.entries["1"], l.entries["2"]
	missing := func(seconds float64) Missing {
		m := l.Missing(at(seconds), one, time.Minute, []*Entry{two})
		m.Ours, m.Age = false, 0
		return m
	}
	require.Equal(t, Missing{Taken: true}, missing(1))
	l.Restored(at(1))
	require.Equal(t, Missing{Taken: true}, missing(1), "nothing was restored")
	l.Restored(at(1), two)
	require.Equal(t, Missing{ReadOn: true}, missing(2))
	require.Equal(t, time.Second, l.Missing(at(2), two, 0, nil).Age, "restoring renews")
	l.Renewed(at(3), one, two)
	require.Equal(t, Missing{Taken: true}, missing(4))
}

// What may have been moved, and was found not pending while its lease was good, is nobody
// else's, however long it takes to learn whether it was moved.
func TestUnclaimed(t *testing.T) {
	const lease = 3 * time.Second
	for _, test := range []struct {
		name    string
		move    Move
		looks   []float64 // seconds after it was read
		expired bool
	}{
		{"Looked", MaybeMoved, []float64{1, 4, 7}, false},
		{"LookedAtTheEnd", MaybeMoved, []float64{3, 6, 9}, false},
		{"LookedTooLate", MaybeMoved, []float64{4, 5, 6, 7}, true},
		{"LookedOnce", MaybeMoved, []float64{1}, true},
		{"NotMoving", NotMoved, []float64{1, 4, 7}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLedger(4)
			l.Add(at(0), at(0), read("1"))
			e := l.entries["1"]
			l.Moving(e, test.move)
			for _, look := range test.looks {
				l.Missing(at(look), e, lease, nil)
			}
			l.Moving(e, NotMoved)
			require.Equal(t, test.expired, l.Missing(at(9), e, 0, nil).Age > lease)
		})
	}
}

// A message that never ends keeps an entry in its last delivery from running; but
// not fresh entries.
func TestTake_LonelyBesideOneThatNeverEnds(t *testing.T) {
	l := newLedger(4)
	l.Add(start, start, read("endless"))
	take(l, start)
	l.Offer(start, []*Entry{claim("a", 5)}, false)
	l.HaveTurn(start, func() {})
	require.Zero(t, l.Room(10), "nothing is read for its sake")
	require.Equal(t, at(5), l.nextTime(start))
	l.Effects(at(5))
	require.Positive(t, l.Room(10), "but not for ever")
	served := 0
	for now := 5.0; now < 65; now += 0.5 {
		if l.Room(10) > 0 {
			l.Add(at(now), at(now), read(fmt.Sprint(now)))
		}
		if id, e := take(l, at(now)); e != nil {
			require.NotEqual(t, "a", id)
			served++
			l.Acked(at(now), e)
			l.Confirmed(at(now), len(l.acks))
		}
	}
	require.GreaterOrEqual(t, served, 50, "of 120: half of the time")
}

// A head that waits for an hour does not make other work last as long after it for
// a lonely entry.
func TestTake_LonelyBehindAHead(t *testing.T) {
	l := newLedger(1)
	l.Add(start, start, read("1", "2", "3"))
	_, head := take(l, start)
	l.Offer(start, []*Entry{claim("a", 5)}, false)
	l.Retry(start, head, at(3600))
	l.Effects(at(1))
	id, head := take(l, at(3600))
	require.Equal(t, "1", id)
	l.Effects(at(3610)) // it takes longer than the patience
	l.Acked(at(3611), head)
	now := 3611.0
	for id = ""; id != "a"; now++ {
		var e *Entry
		l.Add(at(now), at(now), read(fmt.Sprint(now))) // there is always other work
		if id, e = take(l, at(now)); e != nil && id != "a" {
			l.Acked(at(now), e)
		}
		require.Less(t, now, 3700.0, "it starves")
	}
}

// A slot that starts after the end finds nothing, whatever was queued.
func TestEnd(t *testing.T) {
	l := newLedger(2, func(c *Config) { c.Serve, c.Leased = true, false })
	fx, _ := l.Add(start, start, read("1", "2"))
	require.Equal(t, 1, fx.Slots)
	l.Close(start)
	require.Equal(t, 2, l.End(start))
	taken, fx := l.Take(start, nil)
	require.Empty(t, taken)
	require.Equal(t, Effects{}, fx)
	require.Zero(t, l.cfg.Bounds.Ahead())
}

// An entry that turns out to be malformed while the subscription closes is
// released; and the number that wait for OnBroken is limited.
func TestBroken(t *testing.T) {
	l := newLedger(1)
	l.Add(start, start, read("1"))
	_, e := take(l, start)
	l.Stop()
	_, ok := broken(l, start, e)
	require.False(t, ok)
	l = newLedger(1)
	for i := range maxWaiting + 10 {
		l.Add(start, start, read(fmt.Sprint(i)))
		_, e := take(l, start)
		dropped, ok := broken(l, start, e)
		require.True(t, ok)
		require.Equal(t, i >= maxWaiting, dropped == e, "entry %d", i)
	}
	check(t, l)
}

// Nothing is added after the end.
func TestClose_NothingIsAdded(t *testing.T) {
	l := newLedger(1, func(c *Config) { c.Serve, c.Leased = true, false })
	l.Close(start)
	fx, ok := l.Add(start, start, read("1"))
	require.False(t, ok)
	require.Equal(t, Effects{}, fx)
	require.Zero(t, l.cfg.Bounds.Ahead())
}

// An entry that was lost, and is delivered to us again while its handler still
// runs, is another delivery.
func TestAdd_LostBefore(t *testing.T) {
	l := newLedger(2)
	l.Add(start, start, read("1"))
	_, old := take(l, start)
	l.Lose(start, old)
	l.Add(start, start, read("1"))
	_, e := take(l, start)
	require.NotSame(t, old, e)
	require.False(t, e.Lost())
	l.Retry(start, old, at(1))
	require.Same(t, e, l.entries["1"])
	require.Empty(t, l.strays)
	check(t, l)
}

// What is ours, and what must be pending for us: see what the lease and the poller rest on.
func TestOwns(t *testing.T) {
	l := newLedger(4)
	l.Add(start, start, read("running", "gone", "lost", "waits", "moving"))
	l.Offer(start, []*Entry{claim("theirs", 2)}, false)
	entries := make(map[string]*Entry)
	for range 4 {
		id, e := take(l, start)
		entries[id] = e
	}
	require.Contains(t, entries, "running")
	require.Equal(t, int64(5), l.Pending())
	l.Gone(start, l.entries["gone"])
	l.Lose(start, l.entries["lost"])
	l.Moving(l.entries["moving"], MaybeMoved)
	for id, owns := range map[string]bool{"running": true, "gone": false, "waits": true, "moving": true, "theirs": true, "unknown": false} {
		require.Equal(t, owns, l.Has(id), id)
	}
	require.Equal(t, int64(2), l.Pending(), "running and waits")
	l.Acked(start, l.entries["running"])
	require.Equal(t, int64(1), l.Pending())
	require.True(t, l.Has("running"), "its ack has not arrived")
}

// check checks the invariants of a ledger.
func check(t *testing.T, l *Ledger) {
	t.Helper()
	counts := make(map[State]int)
	seen := make(map[*Entry]string)
	place := func(where string, entries ...*Entry) {
		for _, e := range entries {
			require.Empty(t, seen[e], "entry %s is in %s too", e.ID, where)
			seen[e] = where
		}
	}
	for _, q := range []struct {
		name   string
		q      *queue
		states []State
	}{
		{"fresh", &l.fresh, []State{Queued}}, {"unkeyed", &l.keys.queue, []State{Queued}}, {"claims", &l.claims, []State{Candidate, Queued}}, {"released", &l.keys.released, []State{Candidate}},
		{"suspects", &l.suspects, []State{Candidate, Queued}}, {"lonely", &l.lonely, []State{Candidate, Queued}},
	} {
		place(q.name, q.q.entries...)
		for _, e := range q.q.entries {
			require.Contains(t, q.states, e.state, "entry %s in %s", e.ID, q.name)
		}
	}
	ahead, slim := 0, 0
	for key, ln := range l.keys.lanes {
		require.Equal(t, key, ln.key)
		place("behind others", ln.behind...)
		require.Same(t, ln, ln.holder.lane)
		require.Nil(t, ln.holder.behind)
		require.Contains(t, []State{Queued, Running, Waiting, Calling}, ln.holder.state, "what holds %s", key)
		require.True(t, slices.IsSortedFunc(ln.behind, func(a, b *Entry) int { return l.cfg.Compare(a.ID, b.ID) }))
		for _, e := range ln.behind {
			require.Same(t, ln, e.lane)
			require.Equal(t, Queued, e.state)
			if e.slim {
				slim++
				require.False(t, l.cfg.Leased && e.Fields != nil)
			} else {
				ahead++
			}
		}
	}
	require.Equal(t, ahead, l.keys.ahead)
	require.Equal(t, slim, l.keys.thin)
	for _, q := range []*queue{&l.retries, &l.singles, &l.recalls} {
		place("a queue by due time", q.entries...)
		require.True(t, slices.IsSortedFunc(q.entries, func(a, b *Entry) int { return a.due.Compare(b.due) }))
		for _, e := range q.entries {
			require.Equal(t, Waiting, e.state)
		}
	}
	if l.head != nil {
		place("head", l.head)
		require.Equal(t, Waiting, l.head.state)
	}
	acks := 0
	for _, e := range l.acks {
		if e.state == Acked {
			acks++
			place("acks", e)
		}
	}
	past, dead := 0, 0
	all := slices.Clone(l.strays)
	for id, e := range l.entries {
		require.Equal(t, id, e.ID)
		require.NotEqual(t, None, e.state, "entry %s is forgotten", id)
		all = append(all, e)
	}
	for _, e := range all {
		counts[e.state]++
		switch e.state {
		case Queued, Candidate, Waiting, Acked:
			require.NotEmpty(t, seen[e], "entry %s is %d, and in no place", e.ID, e.state)
		case Keying:
			require.Empty(t, seen[e])
		case Running:
			require.Empty(t, seen[e])
			if e.past {
				past += 1 + e.spare
			}
		}
		if e.state == Waiting && e.Death != nil {
			dead++
		}
	}
	for state := Candidate; state <= Releasing; state++ {
		require.Equal(t, counts[state], l.use.in[state], "entries in state %d", state)
	}
	require.LessOrEqual(t, l.use.in[Running], l.capacity())
	require.Equal(t, past, l.use.past)
	require.Equal(t, dead, l.use.dead)
	require.Equal(t, counts[Queued], l.cfg.Bounds.Ahead())
	require.EqualValues(t, counts[Waiting]+slim, l.cfg.Bounds.Waiting.used.Load())
	if !l.ended {
		require.EqualValues(t, counts[Acked], l.cfg.Bounds.Unacked.used.Load())
		require.Equal(t, counts[Acked], acks)
	}
	if l.apart.alone != nil {
		require.LessOrEqual(t, l.use.in[Running], 1, "something runs beside the one that must be alone")
	}
	require.LessOrEqual(t, l.use.slots, l.cfg.Slots)
}

// Whatever happens, an entry is in one state, counted once against each limit, in
// at most one slot, and never forgotten: at the end all entries were handled,
// except those taken away.
func TestRandom(t *testing.T) {
	seeds := uint64(100)
	if testing.Short() {
		seeds = 24 // as many of each kind
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 14))
			slots := 1 + r.IntN(4)
			keyed := seed%2 == 1
			size := int(seed/4%3) * 2
			l := newLedger(slots, func(c *Config) {
				c.Keyed, c.Leased, c.Batch, c.Wait = keyed, seed%4 != 3, size, time.Duration(size)*time.Second
			})
			slotOf, left := make(map[*Entry]**Entry), make(map[**Entry]int) // the entries of a slot
			keyOf := func(e *Entry) string { return []string{"", "a", "b", "c"}[len(e.ID)*7%3+int(e.ID[len(e.ID)-1])%2] }
			keying, taken := false, make(map[string]string) // the last fresh entry of each key
			offered := make(map[string]bool)
			aside := make(map[*Entry]bool) // have given up their keys
			now, ids := start, 0
			came, done := make(map[string]bool), make(map[string]bool)
			var running, calling []*Entry
			timer, asked := time.Time{}, false
			apply := func(fx Effects) {
				for {
					if !fx.Timer.IsZero() {
						timer = fx.Timer
					}
					keying, asked = keying || fx.Key, asked || fx.Turn
					var e *Entry
					var next Effects
					switch {
					case fx.Slots > 0: // a slot takes, and keeps it until the outcome
						fx.Slots--
						var batch []*Entry
						batch, next = l.Take(now, nil)
						require.True(t, slices.IsSortedFunc(batch, func(a, b *Entry) int { return byNumber(a.ID, b.ID) }))
						require.LessOrEqual(t, len(batch), max(1, size))
						began := false
						for _, e := range batch {
							require.NotContains(t, running, e)
							if e.past && !e.single() && e.Owner != "" && len(batch) > 1 {
								require.LessOrEqual(t, len(batch), l.most(e))
							}
							if key := keyOf(e); keyed && key != "" && !aside[e] {
								if !e.HasKey() {
									ok, more := lineUp(l, now, e, key)
									next.Slots, next.Turn = next.Slots+more.Slots, next.Turn || more.Turn
									if next.Callers += more.Callers; !ok {
										continue
									}
								}
								for _, other := range running {
									require.False(t, key == keyOf(other) && !aside[other], "two of a key at once")
								}
								if !offered[e.ID] {
									require.GreaterOrEqual(t, byNumber(e.ID, cmp.Or(taken[key], "0")), 0, "out of order")
									taken[key] = e.ID
								}
							}
							began = true
							running = append(running, e)
							slotOf[e] = &batch[0]
						}
						if began {
							left[&batch[0]] = 0
							for _, e := range batch {
								if slotOf[e] == &batch[0] {
									left[&batch[0]]++
								}
							}
						} else if len(batch) > 0 {
							next.Slots++ // the slot takes another one
						}
					case fx.Callers > 0:
						fx.Callers--
						if e, next = l.TakeBroken(now); e != nil {
							calling = append(calling, e)
						}
					default:
						return
					}
					fx.Slots += next.Slots
					fx.Callers += next.Callers
					fx.Timer, fx.Key, fx.Turn = next.Timer, next.Key, next.Turn
				}
			}
			slotGoesOn := func(e *Entry) { // once its whole batch has come to its outcome
				slot := slotOf[e]
				if delete(slotOf, e); slot != nil {
					if left[slot]--; left[slot] > 0 {
						apply(l.Effects(now))
						return
					}
				}
				apply(Effects{Slots: 1})
			}
			callerGoesOn := func() { apply(Effects{Callers: 1}) }
			pick := func(from *[]*Entry) *Entry {
				if len(*from) == 0 {
					return nil
				}
				i := r.IntN(len(*from))
				e := (*from)[i]
				*from = slices.Delete(*from, i, i+1)
				return e
			}
			finish := func(e *Entry) {
				done[e.ID] = true
				apply(l.Acked(now, e))
			}
			step := func(events int) {
				now = now.Add(time.Duration(r.IntN(3000)) * time.Millisecond)
				if !timer.IsZero() && !timer.After(now) {
					apply(l.Effects(now))
				}
				if asked && r.IntN(20) > 0 {
					asked = false
					turns := 1
					apply(l.HaveTurn(now, func() {
						require.Equal(t, 1, turns, "ended twice")
						turns--
					}))
				}
				if keying && r.IntN(2) == 0 {
					batch := l.TakeUnkeyed(1 + r.IntN(3))
					if keying = len(batch) > 0; keying {
						check(t, l)
						var keys []string
						for _, e := range batch {
							if e.Owner != "" {
								l.Claimed(now, e)
							}
							keys = append(keys, keyOf(e))
						}
						late, fx := l.Keyed(now, batch, keys)
						require.Empty(t, late)
						apply(fx)
					}
				}
				switch r.IntN(events) {
				case 0, 1:
					if e := pick(&running); e != nil {
						finish(e)
						slotGoesOn(e)
					}
				case 2:
					_ = l.Acks(3)
					apply(l.Confirmed(now, min(3, len(l.acks))))
				case 3:
					if e := pick(&calling); e != nil {
						finish(e)
						callerGoesOn()
					}
				case 4:
					var entries []*Entry
					for range 1 + r.IntN(4) {
						ids++
						entries = append(entries, read(fmt.Sprint(ids))...)
						came[fmt.Sprint(ids)] = true
					}
					fx, _ := l.Add(now, now, entries)
					apply(fx)
				case 5:
					var entries []*Entry
					for range 1 + r.IntN(3) {
						ids++
						entries = append(entries, claim(fmt.Sprint(ids), int64(2+r.IntN(4))))
						offered[fmt.Sprint(ids)] = true
						came[fmt.Sprint(ids)] = true
					}
					apply(l.Offer(now, entries, false))
				case 6:
					if e := pick(&running); e != nil {
						if e.Owner != "" {
							l.Claimed(now, e)
						}
						aside[e] = aside[e] || r.IntN(3) == 0
						e.Stuck = aside[e]
						dropped, ok := l.Retry(now, e, now.Add(time.Duration(r.IntN(9000))*time.Millisecond))
						require.Nil(t, dropped)
						require.True(t, ok)
						slotGoesOn(e)
					}
				case 7:
					if e := pick(&running); e != nil {
						broken(l, now, e)
						slotGoesOn(e)
					}
				case 8:
					if e := pick(&calling); e != nil {
						l.Retry(now, e, now.Add(time.Second))
						callerGoesOn()
					}
				case 9:
					for _, e := range l.entries {
						if e.state != Running && e.state != Acked && e.state != Calling && r.IntN(20) == 0 {
							done[e.ID] = true // taken away
							l.Lose(now, e)
							break
						}
					}
					apply(l.Effects(now))
				case 10:
					if l.paused {
						apply(l.Resume(now))
					} else if r.IntN(3) == 0 {
						l.Pause()
					}
				case 11:
					if l.paused && len(running) > 0 {
						e := pick(&running)
						if e.Owner != "" {
							l.Claimed(now, e)
						}
						if !aside[e] { // its handler has not begun yet
							require.True(t, l.HoldBack(now, e))
							slotGoesOn(e)
						} else {
							running = append(running, e)
						}
					}
				case 12:
					withdrawn := l.Withdraw()
					require.True(t, l.paused && l.cfg.Leased || len(withdrawn) == 0)
					if len(withdrawn) > 0 {
						check(t, l)
						require.True(t, l.Withdrawn(now, withdrawn, "released", r.IntN(3) > 0, false))
					}
				}
				if l.paused {
					require.Nil(t, l.next(now), "taken during a pause")
					require.Zero(t, l.Room(10))
				}
				check(t, l)
			}
			for range 500 {
				step(13)
			}
			if l.paused {
				apply(l.Resume(now))
			}
			for i := 0; len(l.entries) > 0; i++ {
				require.Less(t, i, 20000, "left: %v", l.entries)
				step(4)
			}
			require.Equal(t, came, done)
		})
	}
}

// BenchmarkLedger measures the cost of a message that is read, taken, and acked.
func BenchmarkLedger(b *testing.B) {
	for _, slots := range []int{1, 100} {
		b.Run(fmt.Sprint("Slots", slots), func(b *testing.B) {
			l := newLedger(slots)
			const batch = 100
			entries := make([]Entry, batch)
			pointers := make([]*Entry, batch)
			ids := make([]string, batch)
			var taken []*Entry
			for i := range ids {
				ids[i] = fmt.Sprint(i)
			}
			for b.Loop() {
				for i := range entries {
					entries[i] = Entry{ID: ids[i]}
					pointers[i] = entries[i].SetCount(1, 2)
				}
				now := time.Now()
				l.Add(now, now, pointers)
				for range pointers {
					l.use.slots = l.use.in[Running] + 1
					taken, _ = l.Take(time.Now(), taken[:0])
					l.Acked(time.Now(), taken...)
				}
				l.Confirmed(now, batch)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batch, "ns/message")
		})
	}
}
