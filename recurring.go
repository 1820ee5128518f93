package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// Recurring is a message that is published on a schedule: see Publisher.Recur.
type Recurring struct {
	// Name identifies the message within its topic: processes that use the same Name
	// publish each occurrence once between them. Required.
	Name string

	// Topic is the topic to publish to. Required.
	Topic string

	// Schedule's Next returns the first occurrence after a time, never that time itself, or
	// the zero time if there are no more. A time that is not later is logged as an error,
	// and Next is called again with a millisecond more. A schedule parsed by robfig/cron is one; Every is another. Times
	// are truncated to milliseconds. All processes must use the same schedule, and the
	// same time zone where it depends on that. Required.
	Schedule interface{ Next(time.Time) time.Time }

	// Message returns the message for an occurrence. Every process calls it at that time,
	// and one of the messages is published. After an error, which is logged, it is called
	// again about a second later, until this or another process has published the
	// occurrence. Required.
	Message func(occurrence time.Time) (*message.Message, error)

	// SkipMissed drops occurrences that were missed while no process was running.
	// Default: the last of them is published when a process starts.
	SkipMissed bool
}

// Every is a schedule with an occurrence at each multiple of a duration since 1970, UTC:
// Every(time.Hour) means every full hour. The minimum is a millisecond.
type Every time.Duration

// Next returns the first occurrence after t.
func (e Every) Next(t time.Time) time.Time {
	every := max(1, time.Duration(e).Milliseconds())
	return time.UnixMilli((t.UnixMilli()/every + 1) * every)
}

func (r Recurring) validate(errs *configErrors) {
	errs.addIf(r.Name == "", "Name", "is required")
	errs.addIf(r.Topic == "", "Topic", "is required")
	errs.addIf(r.Schedule == nil, "Schedule", "is required")
	errs.addIf(r.Message == nil, "Message", "is required")
	every, ok := r.Schedule.(Every)
	errs.addIf(ok && every <= 0, "Schedule", "Every(%v) is not positive", time.Duration(every))
}

// Recur publishes recurring messages until ctx ends; then it returns nil. It returns an
// error that names every mistake in its arguments. Any number of processes may call it:
// there is no leader, and each occurrence is published once, by whichever process is
// first, and not before its time by the server's clock. An outage of Redis delays
// occurrences; they are dropped only if a process starts before the others have caught up,
// and these have published nothing for two seconds. For occurrences that were missed while
// no process was running, see SkipMissed.
//
// Redis stores each Name's last occurrence beside the topic, without an expiry. A Name that
// is new begins with the first occurrence after Recur was called. If the last occurrence lies
// in the future, because the server's clock was ahead and was set back, nothing is published
// until then, which is logged as an error: see docs/delayed.md. Idempotence does not
// apply to recurring messages, nor does a delay in their metadata.
func (p *Publisher) Recur(ctx context.Context, recurring ...Recurring) error {
	errs := configErrors{typeName: "Recurring"}
	names := make(map[[2]string]bool)
	for _, r := range recurring {
		r.validate(&errs)
		key := [2]string{r.Topic, r.Name}
		errs.addIf(names[key], "Name", "%q is there twice for topic %q", r.Name, r.Topic)
		names[key] = true
		err := p.client.OneServer(ctx, r.Topic, xstream.RecurringKey(r.Topic))
		errs.addIf(errors.Is(err, redisx.ErrTwoServers), "Topic", "the state of %q would be in another slot of the Cluster; give the topic a hash tag: %v", r.Topic, err)
	}
	if err := errs.err(); err != nil {
		return err
	}
	var all sync.WaitGroup
	for _, r := range recurring {
		all.Go(func() { p.recur(ctx, r) })
	}
	all.Wait()
	return nil
}

const (
	// recurAgain is the pause after an error, on average.
	recurAgain = time.Second

	// recurPause is the pause after an occurrence that was not due yet by the server's clock.
	recurPause = 5 * time.Millisecond

	// recurSettle is how long a process waits before it takes an occurrence for missed:
	// another process may be late.
	recurSettle = 2 * time.Second

	// maxClockAge is the longest time between two readings of the server's clock, which
	// may be set. A timer of this machine stops while the machine is suspended.
	maxClockAge = time.Minute
)

// recurrence is a Recurring that runs.
type recurrence struct {
	Recurring
	p      *Publisher
	stream xstream.Stream

	began time.Time // by the server's clock; zero: it was not asked yet. What is before it was missed
	first time.Time // the last occurrence when it began
	last  time.Time // the last occurrence that was published

	wrong bool // that Schedule is wrong is logged already
	ahead bool // that the last occurrence lies in the future is logged already

	asked time.Time // by this machine's clock
	clock time.Time // the server's then
}

// recur runs one of them until ctx ends.
func (p *Publisher) recur(ctx context.Context, r Recurring) {
	run := recurrence{Recurring: r, p: p, stream: xstream.New(p.client, r.Topic, "")}
	failed := false
	for {
		var wait time.Duration
		err := guard(func() (err error) { wait, err = run.step(ctx); return err }) // Schedule.Next may panic
		if err != nil && ctx.Err() == nil {
			if !failed {
				p.logger.Error("A recurring message was not published; retrying", err, run.logFields())
			}
			wait = recurAgain/2 + rand.N(recurAgain)
		}
		failed = err != nil
		if pause(ctx, min(wait, maxClockAge)) != nil {
			return
		}
	}
}

// step publishes the next occurrence if it is due. It returns when to call it again.
func (r *recurrence) step(ctx context.Context) (time.Duration, error) {
	if r.began.IsZero() || time.Since(r.asked) > maxClockAge {
		if err := r.ask(ctx, time.Time{}, nil); err != nil {
			return 0, err
		}
	}
	next, missed := r.next()
	// What seems missed may be another process's, which is late.
	if sure := r.began.Add(recurSettle); missed && r.clock.Before(sure) {
		if wait := sure.Sub(r.clock.Add(time.Since(r.asked))); wait > 0 {
			return wait, nil
		}
		return 0, r.ask(ctx, time.Time{}, nil)
	}
	if next.IsZero() {
		return maxClockAge, nil
	}
	if wait := next.Sub(r.clock.Add(time.Since(r.asked))); wait > 0 {
		return wait, nil
	}
	fields, err := r.fields(next)
	if err != nil {
		_ = r.ask(ctx, time.Time{}, nil) // another process may have published it
		return 0, err
	}
	last := r.last
	if err := r.ask(ctx, next, fields); err != nil || !r.last.Equal(last) {
		return 0, err
	}
	return recurPause, nil // the server found it too early
}

// ask publishes an occurrence unless another process has. Without one it only reads the
// last occurrence and the server's clock.
func (r *recurrence) ask(ctx context.Context, at time.Time, fields []any) error {
	state, err := r.stream.Recur(ctx, r.Name, r.last, at, r.p.maxLen(r.Topic), fields)
	if err != nil {
		return err
	}
	r.last, r.asked, r.clock = state.Last, time.Now(), state.Now // late by the answer's way at most, and never early
	if r.began.IsZero() {
		r.began, r.first = state.Now, state.Last
	}
	if r.last.After(r.first) { // some process is at work: from here on nothing is left out
		r.began = r.first
	}
	ahead := r.last.Sub(r.clock) > recurSettle
	if ahead && !r.ahead {
		r.p.logger.Error("The last occurrence of a recurring message lies in the future; nothing is published before then",
			errors.New("the server's clock was ahead, and was set back"), r.logFields().Add(watermill.LogFields{"last_occurrence": r.last}))
	}
	r.ahead = ahead
	return nil
}

func (r *recurrence) logFields() watermill.LogFields {
	return watermill.LogFields{"topic": r.Topic, "recurring": r.Name}
}

// next returns the occurrence to publish next, or the zero time if there are no more, and whether
// it was missed before this process started, and maybe others after it.
func (r *recurrence) next() (next time.Time, missed bool) {
	next = r.after(r.last)
	if next.IsZero() || next.After(r.began) {
		return next, false
	}
	if r.SkipMissed {
		return r.after(r.began), true
	}
	return r.lastMissed(next), true
}

// after returns the first occurrence after a time in whole milliseconds; the zero time if
// there are no more.
func (r *recurrence) after(t time.Time) time.Time {
	next := r.Schedule.Next(t)
	if next.IsZero() || next.Truncate(time.Millisecond).After(t) {
		return next.Truncate(time.Millisecond)
	}
	later := t.Add(time.Millisecond)
	if next.After(t) { // within the same millisecond, in which only one is published
		later = later.Add(-time.Nanosecond)
	} else if !r.wrong {
		r.wrong = true
		r.p.logger.Error("The Schedule of a recurring message is wrong; it is asked again from a millisecond later",
			fmt.Errorf("Schedule.Next(t) returned a time that is not after t: %v for %v", next, t), r.logFields())
	}
	if next = r.Schedule.Next(later).Truncate(time.Millisecond); next.After(t) {
		return next
	}
	return time.Time{}
}

// lastMissed returns the last missed occurrence, given the first one. It looks backwards
// from the process's start, in steps that double, since very many may have been missed.
func (r *recurrence) lastMissed(last time.Time) time.Time {
	for back := time.Second; r.began.Add(-back).After(last); back *= 2 {
		if next := r.after(r.began.Add(-back)); !next.IsZero() && !next.After(r.began) {
			last = next
			break
		}
	}
	for {
		next := r.after(last)
		if next.IsZero() || next.After(r.began) {
			return last
		}
		last = next
	}
}

// fields returns the fields of an occurrence's entry.
func (r *recurrence) fields(at time.Time) (fields []any, err error) {
	err = guard(func() error {
		msg, err := r.Message(at)
		if err == nil {
			fields, err = appendFields(nil, r.p.config.Marshaler, r.Topic, msg)
		}
		if err == nil && len(fields) > xstream.MaxFields {
			err = fmt.Errorf("%d fields are more than the %d that a script can add", len(fields)/2, xstream.MaxFields/2)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("the message of %s: %w", at.Format(time.RFC3339Nano), err)
	}
	return fields, nil
}
