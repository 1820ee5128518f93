package ledger

import (
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func newKeyed(slots int) *Ledger { return newLedger(slots, func(c *Config) { c.Keyed = true }) }

// readKeyed has entries with IDs from..to read, with the key.
func readKeyed(l *Ledger, now time.Time, key string, from, to int) (fx Effects) {
	var ids, keys []string
	for i := from; i <= to; i++ {
		ids, keys = append(ids, fmt.Sprint(i)), append(keys, key)
	}
	l.Add(now, now, read(ids...))
	batch := l.TakeUnkeyed(len(ids))
	_, fx = l.Keyed(now, batch, keys)
	l.TakeUnkeyed(1) // there are no more: the keyer ends
	return fx
}

// While entries wait behind others, as many are read ahead as without keys; only half of
// them must be left until more are read. If slots find nothing to do for a while, more is
// read, but nothing that costs more memory than its ID.
func TestRoom_Keys(t *testing.T) {
	l := newKeyed(4)
	require.Equal(t, 14, l.Room(10))
	readKeyed(l, start, "slow", 1, 14)
	check(t, l)
	id, slow := take(l, start)
	require.Equal(t, "1", id)
	require.Zero(t, l.Room(10))
	require.Equal(t, at(0.1), l.nextTime(start))
	require.False(t, l.Effects(at(0.09)).Room)
	fx := l.Effects(at(0.1))
	require.True(t, fx.Room, "slots are idle")
	require.Equal(t, 13, l.Room(10))
	readKeyed(l, at(0.1), "slow", 15, 17)
	check(t, l)
	require.Equal(t, 2, l.keys.thin, "14 of them may keep their fields")
	readKeyed(l, at(0.1), "quick", 18, 18)
	id, quick := take(l, at(0.2))
	require.Equal(t, "18", id)
	require.Zero(t, l.Room(10))
	l.Acked(at(0.2), quick)

	for n := 2; n <= 17; n++ { // all follow, in order
		l.Acked(at(1), slow)
		id, slow = take(l, at(1))
		require.Equal(t, fmt.Sprint(n), id)
		require.Equal(t, n > 15, slow.Fields == nil)
		check(t, l)
	}
	require.EqualValues(t, slow.Count(), slow.Next, "fetching it again does not count")
	require.Positive(t, l.Room(10))
}

// What follows an entry that waits for its retry costs no read-ahead, but there is a limit,
// which is told once.
func TestRoom_KeysBehindARetry(t *testing.T) {
	l := newKeyed(2)
	require.Positive(t, l.Room(10))
	readKeyed(l, start, "bad", 1, 5)
	_, bad := take(l, start)
	l.Retry(start, bad, at(3600))
	require.Equal(t, 4, l.keys.thin)
	told := 0
	for n := 6; l.Room(10) > 0; n += 10 {
		if readKeyed(l, start, "bad", n, n+9).Crowded {
			told++
		}
		require.Less(t, n, maxWaiting)
	}
	check(t, l)
	require.InDelta(t, maxWaiting/2, l.keys.thin, 10)
	require.Equal(t, 1, told)
	id, _ := take(l, at(1))
	require.Empty(t, id)
	id, _ = take(l, at(3600))
	require.Equal(t, "1", id)
}

// line is lineUp without the effects.
func line(l *Ledger, now time.Time, e *Entry, key string) bool {
	ok, _ := lineUp(l, now, e, key)
	return ok
}

// lineUp gives an entry its key as a slot does; false: it waits for it.
func lineUp(l *Ledger, now time.Time, e *Entry, key string) (ok bool, fx Effects) {
	how, fx := l.Line(now, e, key)
	if how == Counted {
		l.Uncounted(e, e.Count())
		how, fx = l.Line(now, e, key)
	}
	return how == First, fx
}

// A claimed entry whose key is taken waits before those that were read, and takes neither a
// slot nor the place of the one that must run alone.
func TestLine(t *testing.T) {
	l := newKeyed(4)
	readKeyed(l, start, "a", 10, 12)
	_, holder := take(l, start)
	l.Offer(start, []*Entry{claim("5", 2)}, false)
	id, old := take(l, start)
	require.Equal(t, "5", id)
	l.Claimed(start, old.SetCount(2, 3))
	ok := line(l, start, old, "a")
	require.False(t, ok)
	require.EqualValues(t, 1, l.RestoreCount(old), "its delivery has not begun")
	check(t, l)
	l.Acked(start, holder)
	l.Confirmed(start, 1)
	id, e := take(l, start)
	require.Equal(t, "5", id)
	l.Claimed(start, e)
	require.EqualValues(t, 2, l.RestoreCount(e))
	l.Offer(start, []*Entry{claim("6", 5)}, false)
	l.Acked(start, e)
	l.Confirmed(start, 1)
	id, e = take(l, at(1))
	require.Equal(t, "6", id, "alone")
	ok = line(l, at(1), e, "a")
	require.False(t, ok, "11 has the key")
	check(t, l)
	id, e = take(l, at(1))
	require.Equal(t, "11", id, "nothing runs alone")
	l.Acked(at(1), e)
	l.Confirmed(at(1), 1)
	require.Equal(t, "6", l.lonely.peek().ID)
	check(t, l)
}

// Entries whose keys are being computed when the ledger is closed are released, and so are
// those that wait behind others.
func TestClose_Keys(t *testing.T) {
	l := newKeyed(2)
	readKeyed(l, start, "a", 1, 3)
	l.Add(start, start, read("4"))
	released := claim("5", 2)
	released.Released = true
	l.Offer(start, []*Entry{released}, false)
	with := l.TakeUnkeyed(2)
	require.Len(t, with, 2)
	queued, _ := l.Close(start)
	require.Len(t, queued, 4, "all but 5, which is not ours: the user's function may never return")
	l.Claimed(start, released)
	late, _ := l.Keyed(start, with, []string{"a", "a"})
	require.Equal(t, []*Entry{released}, late)
	l.Remove(start, append(queued, late...)...)
	require.NotNil(t, with[0].Fields, "the keyer may be reading them")
	require.Empty(t, l.entries)
	require.Zero(t, l.cfg.Bounds.Ahead())
	require.Zero(t, l.keys.ahead+l.keys.thin+l.use.in[Keying])
}

// A slot that finds nothing to do has more read, however few entries wait behind others.
func TestRoom_KeysFewBehind(t *testing.T) {
	l := newKeyed(4)
	readKeyed(l, start, "a", 1, 3)
	readKeyed(l, start, "b", 4, 4)
	readKeyed(l, start, "c", 5, 5)
	require.Len(t, takeAllKeyed(l), 3)
	require.Zero(t, l.Room(0))
	fx := l.Effects(at(0.1))
	require.True(t, fx.Room, "a slot is idle")
	require.Equal(t, 1, l.Room(0))
}

// The same if the read-ahead limit shrinks after the last change.
func TestRoom_KeysTimer(t *testing.T) {
	l := newKeyed(4)
	l.Room(10)
	readKeyed(l, start, "a", 1, 5)
	take(l, start)
	require.Zero(t, l.Room(0))
	require.Equal(t, at(0.1), l.nextTime(start), "the timer is set, or nobody looks again")
	require.True(t, l.Effects(at(0.1)).Room)
}

func takeAllKeyed(l *Ledger) (ids []string) {
	for {
		id, _ := take(l, start)
		if id == "" {
			return ids
		}
		ids = append(ids, id)
	}
}

// An entry that is claimed while the ledger is closed does not wait for its key: nobody
// would release it.
func TestLine_AfterClose(t *testing.T) {
	l := newKeyed(4)
	readKeyed(l, start, "a", 10, 10)
	_, holder := take(l, start)
	l.Offer(start, []*Entry{claim("5", 2)}, false)
	_, old := take(l, start)
	l.Claimed(start, old)
	l.Close(start)
	how, _ := l.Line(start, old, "a")
	require.Equal(t, Late, how)
	l.Remove(start, old, holder)
	require.Zero(t, l.End(start))
	require.Empty(t, l.entries)
	check(t, l)
}

// What waits behind an entry whose function never returns is undelivered too.
func TestEnd_Behind(t *testing.T) {
	l := newLedger(2, func(c *Config) { c.Keyed, c.Leased, c.Serve = true, false, true })
	readKeyed(l, start, "a", 1, 3)
	take(l, start)
	l.Add(start, start, read("4"))
	with := l.TakeUnkeyed(1)
	l.Close(start)
	require.Equal(t, 3, l.End(start))
	late, _ := l.Keyed(start, with, []string{"a"})
	require.Empty(t, late)
	require.NotNil(t, with[0].Fields, "the keyer may be reading them")
	require.Zero(t, l.cfg.Bounds.Ahead())
	check(t, l)
}

// A closed ledger that still delivers does not lose what waits behind a stray.
func TestClose_BehindStray(t *testing.T) {
	l := newLedger(2, func(c *Config) { c.Keyed, c.Leased, c.Serve = true, false, true })
	readKeyed(l, start, "a", 1, 1)
	l.Gone(start, l.entries["1"])
	readKeyed(l, start, "a", 1, 2)
	l.Close(start)
	id, e := take(l, start)
	require.Equal(t, "1", id)
	l.Acked(start, e)
	id, _ = take(l, start)
	require.Equal(t, "1", id)
	require.Equal(t, 1, l.End(start), "2")
}

// However many entries dead consumers have left: no more are claimed than may wait for their keys.
func TestTake_CrowdedClaims(t *testing.T) {
	l := newKeyed(2)
	readKeyed(l, start, "a", 1, 1)
	_, bad := take(l, start)
	l.Retry(start, bad, at(3600))
	n := 0
	for i := range maxWaiting {
		l.Offer(start, []*Entry{claim(strconv.Itoa(i+2), 2)}, false)
		_, e := take(l, start)
		if e == nil {
			require.Zero(t, l.Effects(start).Slots)
			break
		}
		n++
		l.Claimed(start, e)
		ok := line(l, start, e, "a")
		require.False(t, ok)
	}
	require.InDelta(t, maxWaiting/2, n, 10)
	id, _ := take(l, at(3600))
	require.Equal(t, "1", id)
}

// A message that must run alone, and that could not be fetched again, still runs alone.
func TestReadmit_Keys(t *testing.T) {
	l := newKeyed(4)
	readKeyed(l, start, "a", 1, 1)
	_, holder := take(l, start)
	l.Retry(start, holder, at(10))
	l.Offer(start, []*Entry{claim("6", 5)}, false)
	id, lonely := take(l, start)
	require.Equal(t, "6", id)
	l.Claimed(start, lonely)
	ok := line(l, start, lonely, "a")
	require.False(t, ok)
	_, holder = take(l, at(10))
	l.Acked(at(10), holder)
	l.Confirmed(at(10), 1)
	id, _ = take(l, at(11))
	require.Equal(t, "6", id)
	require.Equal(t, lonely, l.apart.alone)
	l.Retry(at(11), lonely, at(12)) // Redis did not answer
	check(t, l)
	readKeyed(l, at(11), "b", 7, 7)
	id, other := take(l, at(11))
	require.Equal(t, "7", id)
	id, _ = take(l, at(12))
	require.Empty(t, id, "7 runs")
	check(t, l)
	l.Acked(at(13), other)
	id, _ = take(l, at(13))
	require.Equal(t, "6", id)
	require.Equal(t, lonely, l.apart.alone)
	l.Claimed(at(13), lonely.SetCount(5, 6))
	l.Retry(at(13), lonely, at(14)) // its handler failed
	id, _ = take(l, at(14))
	require.Equal(t, "6", id)
	require.Nil(t, l.apart.alone, "a retry of ours")
	check(t, l)
}

// What must run alone, and waits for its key instead, leaves its turn to the next one, and comes before
// those whose keys are not known once it has its own.
func TestTake_LonelyBehindItsKey(t *testing.T) {
	l := newKeyed(2)
	readKeyed(l, start, "a", 1, 1)
	l.Offer(start, []*Entry{claim("3", 5), claim("4", 5), claim("5", 5)}, false)
	id, e := take(l, start)
	require.Equal(t, "3", id)
	l.Claimed(start, e)
	ok := line(l, start, e, "a")
	require.False(t, ok, "1 has the key")
	id, e = take(l, start)
	require.Equal(t, "4", id, "at once")
	l.Claimed(start, e)
	ok = line(l, start, e, "b")
	require.True(t, ok)
	l.Acked(at(1), e)
	l.Confirmed(at(1), 1)
	id, e = take(l, at(1))
	require.Equal(t, "1", id, "others have their turn")
	l.Acked(at(1), e)
	l.Confirmed(at(1), 1)
	check(t, l)
	id, _ = take(l, at(3))
	require.Equal(t, "3", id, "before 5")
	check(t, l)
}
