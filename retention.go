package goxstreams

import (
	"context"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/consume"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// Retention says how much of a topic stays in Redis. Entries are trimmed from the start of
// the stream, and only those that every consumer group has acked and every fan-out
// subscription has read; what a group has not acked yet stays, together with everything
// after it, however much that is. For a topic without groups and fan-outs, number and age
// alone decide.
//
// The zero value trims nothing. With KeepLast and KeepFor an entry stays that one of them
// keeps.
type Retention struct {
	// KeepLast is the number of entries to keep: the newest ones. Default: 0, no entry is
	// kept for its number.
	KeepLast int64

	// KeepFor is how long to keep entries, by their IDs and the server's clock. Default: 0,
	// no entry is kept for its age. Minimum: 1ms.
	KeepFor time.Duration

	// HardMaxLen is an emergency brake that protects Redis's memory: beyond this number of
	// entries the oldest are cut off, acked or not. This loses messages. They are
	// counted for each group that had not acked them, see TopicStats.CutOff, and logged.
	// Default: 0, no limit. At least KeepLast.
	HardMaxLen int64

	// IgnoreGroups are groups for which nothing is kept, such as one that nobody
	// consumes any more but that must not be destroyed. What they have not acked is lost
	// to them, and not counted, unless HardMaxLen cuts it off.
	IgnoreGroups []string
}

// isZero reports whether nothing is trimmed.
func (r Retention) isZero() bool { return r.KeepLast == 0 && r.KeepFor == 0 && r.HardMaxLen == 0 }

// validate checks the fields, whose names in the errors begin with prefix.
func (r Retention) validate(prefix string, errs *configErrors) {
	atLeast(errs, prefix+"KeepLast", r.KeepLast, 0)
	atLeast(errs, prefix+"KeepFor", r.KeepFor, time.Millisecond)
	atLeast(errs, prefix+"HardMaxLen", r.HardMaxLen, 0)
	errs.addIf(r.HardMaxLen > 0 && r.HardMaxLen < r.KeepLast, prefix+"HardMaxLen", "is %d; it must be at least KeepLast (%d)", r.HardMaxLen, r.KeepLast)
	errs.addIf(slices.Contains(r.IgnoreGroups, ""), prefix+"IgnoreGroups", "contains an empty name")
}

func (r Retention) internal() xstream.Retention {
	in := xstream.Retention{KeepLast: r.KeepLast, KeepFor: r.KeepFor, HardMaxLen: r.HardMaxLen, Ignore: r.IgnoreGroups}
	if r.KeepLast == 0 && r.KeepFor == 0 {
		in.KeepLast = xstream.KeepAll
	}
	return in
}

// retention returns what the subscriptions trim; nil: nothing. DeleteAcked is a Retention
// that keeps nothing.
func (c *SubscriberConfig) retention() *xstream.Retention {
	in := c.Retention.internal()
	switch {
	case c.DeleteAcked:
		in.KeepLast = 0
	case c.Retention.isZero():
		return nil
	}
	return &in
}

// Pin is the oldest entry of a topic that a group has not acked, or that a fan-out has not
// read. Retention keeps it and all entries after it.
type Pin struct {
	Group    string        // empty: a fan-out subscription
	Consumer string        // for which it is pending; empty if it was not delivered yet. Of a fan-out, a random name
	ID       string        // empty: every group has acked everything
	Age      time.Duration // since it was published, by its ID and the server's clock
}

// TrimResult is the result of Trim.
type TrimResult struct {
	Trimmed int64 // entries that were removed, including those that were cut off
	Length  int64 // entries that are left

	// Pin is the entry that kept others from being trimmed. Its ID is empty if all that
	// Retention does not keep is gone, or a vanished group keeps it.
	Pin Pin

	// HeldBy is a group that has vanished: what it had not acked is kept until HeldUntil, by
	// the server's clock, so that its consumers can recreate it. Empty if no such group kept
	// others from being trimmed.
	HeldBy    string
	HeldUntil time.Time

	// CutOff is how many of the trimmed entries each group had not acked: HardMaxLen has cut
	// them off. The empty name stands for the fan-out that has read least. Groups with
	// none are missing.
	CutOff map[string]int64
}

func (r *TrimResult) add(t xstream.Trimming) {
	r.Trimmed += t.Trimmed
	r.Length, r.Pin = t.Length, Pin(t.Pin)
	r.HeldBy, r.HeldUntil = t.HeldBy, t.HeldUntil
	for group, n := range t.Cut {
		if r.CutOff == nil {
			r.CutOff = make(map[string]int64)
		}
		r.CutOff[group] += n
	}
}

// Trim trims a topic, or a dead-letter stream, as SubscriberConfig.Retention does
// continuously: for cron jobs, and topics whose consumers do not. It removes everything
// that may go, in small steps that together take the server's time for a hundredth at most,
// some 50,000 small entries a second, and returns what it has done also with an error.
// Beyond HardMaxLen it takes up to half of it. It may run several times at once.
//
// What a group had not acked that has vanished is kept for a minute after the first call that
// finds it missing, unless beyond HardMaxLen, so that its consumers can recreate it:
// TrimResult.HeldBy is its name.
func Trim(ctx context.Context, c redis.UniversalClient, topic string, r Retention) (TrimResult, error) {
	return trim(ctx, c, topic, r, "Trim", false)
}

// PlanTrim returns what Trim would do, and changes nothing. It reads what would be
// trimmed, so it takes longer than Trim.
func PlanTrim(ctx context.Context, c redis.UniversalClient, topic string, r Retention) (TrimResult, error) {
	return trim(ctx, c, topic, r, "PlanTrim", true)
}

// trimPause is the pause between the steps of PlanTrim, of a millisecond each.
const trimPause = consume.RetentionInterval / consume.MaxTrims

func trim(ctx context.Context, c redis.UniversalClient, topic string, r Retention, name string, plan bool) (result TrimResult, err error) {
	errs := configErrors{typeName: name}
	errs.arguments("c", c, "topic", topic)
	errs.addIf(r.isZero(), "r", "keeps everything: set KeepLast, KeepFor or HardMaxLen")
	r.validate("r.", &errs)
	if err := errs.err(); err != nil {
		return result, err
	}
	stream := xstream.New(redisx.Client{UniversalClient: c}, topic, "")
	err = stream.OneSlot(ctx)
	var t xstream.Trimming
	for more := true; more && err == nil; {
		var rest time.Duration
		if plan {
			t, err = stream.Plan(ctx, r.internal(), t.Last, result.Trimmed)
			more, rest = t.Trimmed > 0, trimPause
		} else {
			t, err = stream.Trim(ctx, r.internal(), "", "", 0)
			more, rest = t.More || t.Over, 100*t.Cost
			if t.Over {
				rest = t.Cost // at most half of the server's time
			}
		}
		if err != nil {
			break
		}
		result.add(t)
		if more {
			err = pause(ctx, rest)
		}
	}
	return result, wrap(err, "trim %q", topic)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
