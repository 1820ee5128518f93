package goxstreams

import (
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// "Until" is rounded down to seconds, so that it and "for" must be read together: a delay
// that has just begun has all of its digits, is never early, and never begins anew.
func TestDelayed_Due(t *testing.T) {
	second := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	at := func(ms int) time.Time { return second.Add(time.Duration(ms) * time.Millisecond) }
	for name, tt := range map[string]struct {
		created, published time.Time
		delay              time.Duration
		want               xstream.Due
	}{
		"at once":                              {at(300), at(300), 1500 * time.Millisecond, xstream.DueIn(1500 * time.Millisecond)},
		"a little later":                       {at(300), at(310), 1500 * time.Millisecond, xstream.DueIn(1500 * time.Millisecond)},
		"in the next second, which it ends in": {at(490), at(510), 1500 * time.Millisecond, xstream.DueIn(1490 * time.Millisecond)},
		"much later":                           {at(300), at(9300), time.Minute, xstream.DueAt(at(60_000))},
		"a short delay, at once":               {at(300), at(300), 200 * time.Millisecond, xstream.DueIn(200 * time.Millisecond)},
		"consumed, and published again":        {at(300), at(1850), 1500 * time.Millisecond, xstream.DueAt(at(1000))},
		"consumed long ago":                    {at(300), at(90_000_000), time.Hour, xstream.DueAt(at(3_600_000))},
		"a short one, consumed":                {at(900), at(1950), 50 * time.Millisecond, xstream.DueAt(at(0))},
	} {
		t.Run(name, func(t *testing.T) {
			until := tt.created.Add(tt.delay).Truncate(time.Second)
			got := due(tt.published, until, tt.delay)
			require.Equal(t, tt.want, got)
		})
	}
	require.Equal(t, xstream.DueAt(at(60_000)), due(at(0), at(60_000), time.Second), "written by hand: until counts")
}

type nextFunc func(time.Time) time.Time

func (f nextFunc) Next(t time.Time) time.Time { return f(t) }

// A Schedule whose Next returns the time that it was given, at an occurrence, goes on. It was
// taken for one that has ended.
func TestRecurring_After(t *testing.T) {
	t0 := time.UnixMilli(1_795_000_000_000)
	inclusive := func(every time.Duration) nextFunc {
		return func(t time.Time) time.Time { return t.Add(every - 1).Truncate(every) }
	}
	for name, tt := range map[string]struct {
		next nextFunc
		want time.Duration // after t0; -1: there are no more
		logs int
	}{
		"after t":                     {Every(time.Second).Next, time.Second, 0},
		"no more":                     {func(time.Time) time.Time { return time.Time{} }, -1, 0},
		"t itself":                    {inclusive(time.Second), time.Second, 1},
		"t itself, each millisecond":  {inclusive(time.Millisecond), time.Millisecond, 1},
		"t itself, each nanosecond":   {func(t time.Time) time.Time { return t }, time.Millisecond, 1},
		"before t":                    {func(t time.Time) time.Time { return t0.Add(-time.Second) }, -1, 1},
		"several in a millisecond":    {func(t time.Time) time.Time { return t.Add(time.Nanosecond) }, time.Millisecond, 0},
		"a fraction of a millisecond": {func(t time.Time) time.Time { return t.Add(1500 * time.Microsecond) }, time.Millisecond, 0},
		"one of them in the next one": {func(t time.Time) time.Time { return later(t, t0.Add(500*time.Microsecond), t0.Add(time.Millisecond)) }, time.Millisecond, 0},
	} {
		t.Run(name, func(t *testing.T) {
			log := watermill.NewCaptureLogger()
			r := recurrence{Recurring: Recurring{Schedule: tt.next}, p: &Publisher{logger: log}}
			got := r.after(t0)
			if tt.want < 0 {
				require.Zero(t, got)
			} else {
				require.Equal(t, tt.want, got.Sub(t0))
			}
			r.after(t0)
			require.Len(t, log.Captured()[watermill.ErrorLogLevel], tt.logs)
		})
	}
}

// later returns the first of the times that is after t.
func later(t time.Time, times ...time.Time) time.Time {
	for _, at := range times {
		if at.After(t) {
			return at
		}
	}
	return time.Time{}
}

// The last missed occurrence is found however many were missed, in few steps.
func TestRecurring_LastMissed(t *testing.T) {
	began := time.UnixMilli(1_795_000_000_300)
	for every, missed := range map[time.Duration]time.Duration{
		time.Millisecond: 1000 * time.Hour, time.Second: 10_000 * time.Hour, time.Hour: 100 * time.Hour, 24 * time.Hour: 30 * time.Hour,
	} {
		calls := 0
		r := recurrence{Recurring: Recurring{Schedule: counting{Every(every), &calls}}, began: began}
		first := Every(every).Next(began.Add(-missed))
		want := time.UnixMilli(began.UnixMilli() / every.Milliseconds() * every.Milliseconds())
		require.True(t, want.Equal(r.lastMissed(first)), every)
		require.Less(t, calls, 1100, every)
	}
}

type counting struct {
	Every
	calls *int
}

func (c counting) Next(t time.Time) time.Time {
	*c.calls++
	return c.Every.Next(t)
}
