package ledger

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func batches(size int) func(*Config) {
	return func(c *Config) { c.Batch = size }
}

func ids(entries []*Entry) (ids []string) {
	for _, e := range entries {
		ids = append(ids, e.ID)
	}
	return ids
}

// takeBatch takes a batch as a slot.
func takeBatch(l *Ledger) []*Entry {
	l.use.slots++ // this slot, whatever the effects have requested
	batch, _ := l.Take(start, nil)
	return batch
}

// Messages that share no batch take a slot each. They have half of the slots, however few
// entries that is, while fresh ones wait.
func TestBatch_PastIsSlow(t *testing.T) {
	slow := func() (ids []string) {
		for i := range 10 {
			ids = append(ids, fmt.Sprint(1000+i))
		}
		return ids
	}()
	for name, prepare := range map[string]func(*testing.T, *Ledger){
		"Single": func(t *testing.T, l *Ledger) {
			l.Add(start, start, read(slow...))
			batch := takeBatch(l)
			require.Len(t, batch, 10)
			for _, e := range batch {
				e.Single = true
				l.Retry(start, e, start)
			}
		},
		"Claim": func(t *testing.T, l *Ledger) {
			for _, id := range slow {
				l.Offer(start, []*Entry{claim(id, 9)}, false)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLedger(4, batches(100), func(c *Config) { c.Suspect, c.Last = 0, 0 })
			prepare(t, l)
			running := 0
			for i := range 40 {
				l.Add(start, start, read(fmt.Sprint(i)))
				for l.fresh.len() > 0 {
					batch := takeBatch(l)
					require.Len(t, batch, 1)
					if batch[0].ID == fmt.Sprint(i) {
						l.Acked(start, batch...)
					} else {
						running++
					}
				}
			}
			require.Equal(t, 2, running)
			require.Equal(t, 200, l.use.past)
		})
	}
}

// A message that shares no batch takes none in and joins none, also after a pause has held
// it back or withdrawn it.
func TestBatch_SingleStaysAlone(t *testing.T) {
	for _, withdrawn := range []bool{false, true} {
		t.Run(fmt.Sprint("withdrawn ", withdrawn), func(t *testing.T) {
			l := newLedger(1, batches(10), func(c *Config) { c.Leased = true })
			l.Add(start, start, read("1", "2", "3", "4"))
			batch := takeBatch(l)
			require.Len(t, batch, 4)
			l.Pause()
			batch[2].Single = true
			for _, e := range batch {
				require.True(t, l.HoldBack(start, e))
			}
			if withdrawn {
				require.True(t, l.Withdrawn(start, l.Withdraw(), "released", true, false))
			}
			l.Resume(start)
			for _, want := range [][]string{{"1", "2"}, {"3"}, {"4"}} {
				batch := takeBatch(l)
				require.Equal(t, want, ids(batch))
				l.Acked(start, batch...)
			}
		})
	}
}

// What may have crashed its consumer is as suspect after a pause as it was before.
func TestWithdrawn_Suspects(t *testing.T) {
	l := newLedger(4, batches(8), func(c *Config) { c.Leased, c.Suspect, c.Last = true, 5, 7 })
	all := []*Entry{claim("1", 1), claim("2", 3), claim("3", 5), claim("4", 7)}
	all[0].Released = true
	l.Offer(start, all, false)
	for range 100 {
		if batch := takeBatch(l); len(batch) > 0 {
			for _, e := range batch {
				e.SetCount(e.Next, e.Next+1)
				l.Claimed(start, e)
			}
			l.Pause()
			for _, e := range batch {
				require.True(t, l.HoldBack(start, e))
			}
			require.True(t, l.Withdrawn(start, l.Withdraw(), "released", true, false))
			l.Resume(start.Add(time.Hour))
		}
	}
	require.Equal(t, []string{"3"}, ids(l.suspects.entries))
	require.Equal(t, []string{"4"}, ids(l.lonely.entries))
	require.Equal(t, []string{"1", "2"}, ids(l.claims.entries))
	require.Equal(t, 8, l.most(all[0]))
	require.Equal(t, 2, l.most(all[1]))
}

// Withdrawn entries that are reclaimed are queued in stream order, with what was read since.
func TestReclaim(t *testing.T) {
	l := newLedger(1, func(c *Config) { c.Leased = true })
	l.Add(start, start, read("1", "2", "3", "4", "5"))
	l.Pause()
	withdrawn := l.Withdraw()
	require.Len(t, withdrawn, 5)
	require.True(t, l.Withdrawn(start, withdrawn, "released", true, false))
	require.Equal(t, []string{"1", "2", "3", "4", "5"}, ids(l.Withdrawals()))
	require.Empty(t, l.Renewals(start, 0))
	l.Resume(start)
	first := takeBatch(l)[0] // another consumer has recreated the group
	require.True(t, first.Withdrawn)
	l.Own(first)
	l.Reclaim()
	require.Empty(t, l.Withdrawals())
	require.ElementsMatch(t, withdrawn, l.Renewals(start, 0))
	require.Equal(t, []string{"2", "3", "4", "5"}, ids(l.fresh.entries))
	for _, e := range withdrawn {
		require.EqualValues(t, 1, e.Count())
		require.EqualValues(t, 1, e.Next)
	}
}

// A claim that waited for its key is in no larger batch than without one.
func TestBatch_ShareOfKeyed(t *testing.T) {
	l := newLedger(2, func(c *Config) { c.Keyed, c.Batch, c.Suspect, c.Last = true, 16, 9, 10 })
	for i := range 4 {
		readKeyed(l, start, fmt.Sprint("key", i), 11+i, 11+i)
	}
	holders := takeBatch(l)
	require.Len(t, holders, 4)
	l.Offer(start, []*Entry{claim("1", 4), claim("2", 4), claim("3", 4), claim("4", 4)}, false)
	for n := 0; n < 4; {
		claims := takeBatch(l)
		require.NotEmpty(t, claims)
		require.LessOrEqual(t, len(claims), 2, "an eighth of 16")
		for _, e := range claims {
			e.SetCount(e.Next, e.Next+1)
			l.Claimed(start, e)
			ok := line(l, start, e, fmt.Sprint("key", n))
			require.False(t, ok)
			n++
		}
	}
	l.Acked(start, holders...)
	l.Confirmed(start, len(holders))
	for n := 0; n < 4; {
		freed := takeBatch(l)
		require.NotEmpty(t, freed)
		require.LessOrEqual(t, len(freed), 2)
		n += len(freed)
	}
}

// A slot that ends before its batch has come to its outcomes gives back what it still has, but nothing
// that another slot has taken since.
func TestRunning(t *testing.T) {
	l := newLedger(2, func(c *Config) { c.Batch = 2 })
	l.Add(start, start, read("1", "2"))
	l.use.slots = 2
	batch, _ := l.Take(start, nil)
	require.Len(t, batch, 2)
	round := batch[0].Round()
	l.Retry(start, batch[0], start)
	again, _ := l.Take(start, nil)
	require.Equal(t, batch[:1], again)
	require.Equal(t, batch[1:], l.Running(batch, round))
	require.Equal(t, again, l.Running(again, again[0].Round()))
}
