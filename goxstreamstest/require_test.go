package goxstreamstest_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/goxstreamstest"
)

// fakeTB is a test that may fail. Whatever it does not override is t's.
type fakeTB struct {
	testing.TB
	text   string
	failed bool
}

func (f *fakeTB) Helper() {}

func (f *fakeTB) Fatal(args ...any) {
	f.failed, f.text = true, fmt.Sprint(args...)
	runtime.Goexit()
}

func (f *fakeTB) Fatalf(format string, args ...any) { f.Fatal(fmt.Sprintf(format, args...)) }

// failure returns what a test says that fails; "" if it passes.
func failure(t *testing.T, test func(testing.TB)) string {
	t.Helper()
	f := &fakeTB{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		test(f)
	}()
	<-done
	if f.failed && f.text == "" {
		t.Error("it failed without a word")
	}
	return f.text
}

func requireContains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q does not contain %q", text, part)
		}
	}
}

// Each assertion passes for what it is about, and fails for everything else, with what was
// wanted, what happened, and the handler's error.
func TestRequire(t *testing.T) {
	results := map[string]*goxstreamstest.Result{
		"acked":            {Outcome: goxstreams.Outcome{Kind: goxstreams.OutcomeAcked}},
		"retried after 2s": {Outcome: goxstreams.Outcome{Kind: goxstreams.OutcomeRetried, Delay: 2 * time.Second, Err: errDown}},
		"snoozed after 2s": {Outcome: goxstreams.Outcome{Kind: goxstreams.OutcomeSnoozed, Delay: 2 * time.Second, Err: errDown}},
		"dead (permanent): the bank does not answer": {Outcome: goxstreams.Outcome{
			Kind: goxstreams.OutcomeDead, Err: errDown, Dead: &goxstreams.DeadMessage{Kind: goxstreams.PermanentFailure, Reason: errDown.Error()},
		}},
	}
	for _, tt := range []struct {
		want    string
		require func(*goxstreamstest.Result, testing.TB)
		passes  string // the only result that it passes for
	}{
		{"acked", (*goxstreamstest.Result).RequireAcked, "acked"},
		{"retried after 2s", retried(2 * time.Second), "retried after 2s"},
		{"retried after 1s", retried(time.Second), ""},
		{"retried after 2.000000001s", retried(2*time.Second + 1), ""},
		{"retried after 1s to 2s", func(r *goxstreamstest.Result, tb testing.TB) { r.RequireRetriedBetween(tb, time.Second, 2*time.Second) }, "retried after 2s"},
		{"retried after 3s to 4s", func(r *goxstreamstest.Result, tb testing.TB) {
			r.RequireRetriedBetween(tb, 3*time.Second, 4*time.Second)
		}, ""},
		{"snoozed after 2s", snoozed(2 * time.Second), "snoozed after 2s"},
		{"snoozed after 0s", snoozed(0), ""},
		{"snoozed after 2s to 3s", func(r *goxstreamstest.Result, tb testing.TB) {
			r.RequireSnoozedBetween(tb, 2*time.Second, 3*time.Second)
		}, "snoozed after 2s"},
		{"dead (permanent)", dead(goxstreams.PermanentFailure, ""), "dead (permanent): the bank does not answer"},
		{`dead (permanent), with a reason that contains "not answer"`, dead(goxstreams.PermanentFailure, "not answer"), "dead (permanent): the bank does not answer"},
		{`dead (permanent), with a reason that contains "the post"`, dead(goxstreams.PermanentFailure, "the post"), ""},
		{"dead (exhausted)", dead(goxstreams.Exhausted, ""), ""},
	} {
		for got, result := range results {
			result.Delivery = goxstreams.Delivery{Topic: "orders", ID: "1-0", Count: 2, MaxRetries: 5}
			text := failure(t, func(tb testing.TB) { tt.require(result, tb) })
			if got == tt.passes {
				if text != "" {
					t.Errorf("%s: %s", got, text)
				}
				continue
			}
			requireContains(t, text, "delivery 2 of 1-0 in the topic orders (MaxRetries 5)", "want:  "+tt.want+"\n", "got:   "+got)
			if strings.Contains(text, "error: the bank does not answer") != (result.Err != nil) {
				t.Errorf("the handler's error: %s", text)
			}
		}
	}
}

// TestRequire_NoLimit: where only a middleware has a limit, no failure says "MaxRetries 0".
func TestRequire_NoLimit(t *testing.T) {
	result := &goxstreamstest.Result{}
	result.Delivery = goxstreams.Delivery{Topic: "orders", ID: "1-0", Count: 2}
	text := failure(t, func(tb testing.TB) { result.RequireSnoozed(tb, time.Hour) })
	requireContains(t, text, "delivery 2 of 1-0 in the topic orders\n")
}
