package goxstreamstest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// RequireAcked fails the test unless the message was acked: handled, or dropped by
// ProcessBroken, ProcessDead or OnBroken.
func (r *Result) RequireAcked(tb testing.TB) {
	tb.Helper()
	r.require(tb, r.Kind == goxstreams.OutcomeAcked, "acked")
}

// RequireRetried fails the test unless the message comes again after exactly this delay,
// and the retry counts. For a policy with a RandomizationFactor, as without any Retry, see
// RequireRetriedBetween.
func (r *Result) RequireRetried(tb testing.TB, delay time.Duration) {
	tb.Helper()
	r.requireLater(tb, goxstreams.OutcomeRetried, delay, delay)
}

// RequireRetriedBetween is RequireRetried for a delay from least to most.
func (r *Result) RequireRetriedBetween(tb testing.TB, least, most time.Duration) {
	tb.Helper()
	r.requireLater(tb, goxstreams.OutcomeRetried, least, most)
}

// RequireSnoozed fails the test unless the message comes again after exactly this delay
// with the same count.
func (r *Result) RequireSnoozed(tb testing.TB, delay time.Duration) {
	tb.Helper()
	r.requireLater(tb, goxstreams.OutcomeSnoozed, delay, delay)
}

// RequireSnoozedBetween is RequireSnoozed for a delay from least to most, such as one that
// depends on the time.
func (r *Result) RequireSnoozedBetween(tb testing.TB, least, most time.Duration) {
	tb.Helper()
	r.requireLater(tb, goxstreams.OutcomeSnoozed, least, most)
}

// RequireDead fails the test unless the message was moved to the dead-letter stream, for
// such a kind of reason and with a reason that contains the text.
func (r *Result) RequireDead(tb testing.TB, kind goxstreams.DeadKind, reason string) {
	tb.Helper()
	want := fmt.Sprintf("dead (%s)", kind)
	if reason != "" {
		want += fmt.Sprintf(", with a reason that contains %q", reason)
	}
	r.require(tb, r.Dead != nil && r.Dead.Kind == kind && strings.Contains(r.Dead.Reason, reason), want)
}

func (r *Result) requireLater(tb testing.TB, kind goxstreams.OutcomeKind, least, most time.Duration) {
	tb.Helper()
	want := fmt.Sprintf("%s after %v", kind, least)
	if least != most {
		want = fmt.Sprintf("%s after %v to %v", kind, least, most)
	}
	r.require(tb, r.Kind == kind && least <= r.Delay && r.Delay <= most, want)
}

func (r *Result) require(tb testing.TB, ok bool, want string) {
	tb.Helper()
	if ok {
		return
	}
	limit := ""
	if r.MaxRetries != 0 { // 0 says nothing: a middleware may have a limit
		limit = fmt.Sprintf(" (MaxRetries %d)", r.MaxRetries)
	}
	text := fmt.Sprintf("goxstreamstest: delivery %d of %s in the topic %s%s\n\twant:  %s\n\tgot:   %s",
		r.Count, r.ID, r.Topic, limit, want, r)
	if r.Err != nil {
		text += "\n\terror: " + r.Err.Error()
	}
	tb.Fatal(text)
}

// String says what became of the delivery: "retried after 1s", for one.
func (r *Result) String() string {
	switch {
	case r.Dead != nil:
		return fmt.Sprintf("dead (%s): %s", r.Dead.Kind, r.Dead.Reason)
	case r.Kind == goxstreams.OutcomeRetried, r.Kind == goxstreams.OutcomeSnoozed:
		return fmt.Sprintf("%s after %v", r.Kind, r.Delay)
	}
	return r.Kind.String()
}
