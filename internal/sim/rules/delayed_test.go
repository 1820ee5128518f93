package rules

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

const (
	testMoveBound = 2 * time.Second
	testPunctual  = time.Second
	testDelay     = 10 * time.Second
)

// clocked says that the server's clock is ahead of the time on the axis of testStart.
func (r *record) clocked(ahead time.Duration) *record {
	return r.add(Event{Kind: Clocked, Clock: time.Duration(testStart.UnixNano()) + ahead})
}

// delay publishes messages of one call, of which those with an even number are delayed.
func (r *record) delay(outcome Kind, numbers ...int) *record {
	e := Event{Kind: Publishing, Process: "producer-1", Life: 1, Topic: testTopic, Delays: make(map[string]time.Duration)}
	for _, n := range numbers {
		e.UUIDs = append(e.UUIDs, testUUID(n))
		if n%2 == 0 {
			e.Delays[testUUID(n)] = testDelay
		}
	}
	r.add(e)
	e.Kind, e.Delays = outcome, nil
	return r.add(e)
}

// move has the message in the stream now, by a clock that is ahead, and handled.
func (r *record) move(number int, ahead time.Duration) *record {
	id := fmt.Sprintf("%d-%d", testStart.Add(r.now+ahead).UnixMilli(), number)
	r.add(Event{Kind: Stored, Topic: testTopic, ID: id, UUID: testUUID(number)})
	state := r.final[testTopic]
	state.Entries = append(state.Entries, Entry{id, testUUID(number)})
	r.final[testTopic] = state
	r.runs++
	run := Event{
		Kind: Started, Process: "consumer-1", Life: 1, Run: r.runs, Topic: testTopic, ID: id, UUID: testUUID(number), Count: 1, Consumer: "consumer-1",
	}
	r.add(run)
	return r.end(run, Acked)
}

// call is one of Cancel or, with a time until the message is due, Reschedule.
func (r *record) call(outcome Kind, number int, until time.Duration) *record {
	r.runs++
	e := Event{Kind: Changing, Process: "producer-1", Life: 1, Topic: testTopic, UUID: testUUID(number), Run: r.runs}
	if until != 0 {
		e.Due = testStart.Add(r.now + until).UnixMilli()
	}
	r.add(e)
	e.Kind = outcome
	return r.add(e)
}

func (r *record) cancel(outcome Kind, number int) *record { return r.call(outcome, number, 0) }

// TestDelayed: each breach is found, and what looks like one and is none is not.
func TestDelayed(t *testing.T) {
	lossy := Effect{Fault: "failover", Loses: Everything}
	tests := []struct {
		name   string
		story  func(*record)
		broken string // the rules, separated by semicolons
	}{
		{"moved on time", func(r *record) { r.delay(Published, 1, 2).move(1, 0).wait(testDelay).move(2, 0) }, ""},
		{"of unknown outcome, and moved on time", func(r *record) { r.delay(Unknown, 2).wait(testDelay).move(2, 0) }, ""},
		{"of unknown outcome, and not stored", func(r *record) { r.delay(Unknown, 2).wait(testDelay) }, ""},

		{"out of order, long after another one closed", func(r *record) {
			r.delay(Published, 2, 4).process(Closing, "consumer-2").process(Ended, "consumer-2").wait(testDelay+time.Second).move(4, 0).move(2, -time.Second)
		}, RuleOrder},
		{"out of order, and maybe released by another one that closed", func(r *record) {
			r.delay(Published, 2, 4).wait(testDelay+time.Second).process(Closing, "consumer-2").process(Ended, "consumer-2").move(4, 0).move(2, -time.Second)
		}, ""},

		{"early", func(r *record) { r.delay(Published, 2).wait(testDelay-10*time.Millisecond).move(2, 0) }, RuleEarly},
		{"early, as only its ID says", func(r *record) {
			r.delay(Published, 2).wait(testDelay).move(2, -10*time.Millisecond)
		}, RuleEarly},
		{"early, with an ID that is ahead", func(r *record) {
			r.delay(Published, 2).wait(testDelay/2).move(2, testDelay)
		}, RuleEarly},
		{"of unknown outcome, and early", func(r *record) { r.delay(Unknown, 2).move(2, 0) }, RuleEarly},
		{"due since the clock was set forward", func(r *record) {
			r.delay(Published, 2).clocked(testDelay).move(2, testDelay)
		}, ""},
		{"due while the clock was ahead", func(r *record) {
			r.delay(Published, 2).clocked(testDelay).wait(time.Millisecond).clocked(0).move(2, testDelay)
		}, ""},
		{"early, though the clock was set forward", func(r *record) {
			r.delay(Published, 2).clocked(testDelay/2).move(2, testDelay/2)
		}, RuleEarly},
		{"early, though the clock was set forward before", func(r *record) {
			r.clocked(testDelay).delay(Published, 2).move(2, testDelay)
		}, RuleEarly},
		{"rescheduled, and due", func(r *record) {
			r.delay(Published, 2).call(Changed, 2, time.Second).wait(time.Second).move(2, 0)
		}, ""},
		{"perhaps rescheduled, and due", func(r *record) {
			r.delay(Published, 2).call(Unsure, 2, time.Second).wait(time.Second).move(2, 0)
		}, ""},
		{"rescheduled by a call that was repeated when it was done", func(r *record) {
			r.delay(Published, 2).call(NotFound, 2, -time.Second).move(2, 0)
		}, ""},
		{"rescheduled, and moved when it was due before", func(r *record) {
			r.delay(Published, 2).call(Changed, 2, 2*testDelay).wait(testDelay).move(2, 0)
		}, RuleEarly},
		{"rescheduled, which was lost", func(r *record) {
			r.delay(Published, 2).call(Changed, 2, 2*testDelay).fault(lossy, 0).wait(testDelay).move(2, 0)
		}, ""},
		{"rescheduled twice, and moved by the first time", func(r *record) {
			r.delay(Published, 2).call(Changed, 2, time.Second).call(Changed, 2, testDelay).wait(time.Second).move(2, 0)
		}, RuleEarly},

		{"never moved", func(r *record) { r.delay(Published, 2).wait(2 * testDelay) }, RuleMoved + ";" + RuleVanished},
		{"never moved, and still there", func(r *record) {
			r.delay(Published, 2).wait(2 * testDelay)
			r.final[testTopic] = TopicState{Waiting: []string{testUUID(2)}}
		}, RuleWaiting + ";" + RuleMoved},
		{"moved late", func(r *record) { r.delay(Published, 2).wait(testDelay+testMoveBound*11/10).move(2, 0) }, RuleMoved},
		{"moved nearly late, by who had not known of it", func(r *record) {
			r.delay(Published, 2).call(Changed, 2, known/2).wait(known/2+testMoveBound*9/10).move(2, 0)
		}, ""},
		{"moved late, since the clock was set back", func(r *record) {
			r.delay(Published, 2).clocked(-testDelay).wait(2*testDelay+testMoveBound*9/10).move(2, -testDelay)
		}, ""},
		{"moved late, though the clock was set forward", func(r *record) {
			r.delay(Published, 2).clocked(testDelay).wait(testMoveBound*11/10).move(2, testDelay)
		}, RuleMoved},
		{"moved late, since the server was not well", func(r *record) {
			r.delay(Published, 2).fault(Effect{Fault: "freeze"}, 2*testDelay).wait(testRecovery).move(2, 0)
		}, ""},
		{"moved late, though the server was well again", func(r *record) {
			r.delay(Published, 2).fault(Effect{Fault: "freeze"}, 2*testDelay).wait(testRecovery+testMoveBound*11/10).move(2, 0)
		}, RuleMoved},
		{"moved late, since permissions were missing until shortly before", func(r *record) {
			r.delay(Published, 2).fault(Effect{Fault: "refuse", Denies: true}, testDelay).wait(time.Minute).move(2, 0)
		}, ""},
		{"moved late, since nobody was there", func(r *record) {
			r.delay(Published, 2).process(Stopped, "consumer-1").wait(2*testDelay).process(Continued, "consumer-1").move(2, 0)
		}, ""},
		{"rescheduled, and moved late", func(r *record) {
			r.delay(Published, 2).call(Changed, 2, time.Second).wait(time.Second+testMoveBound*11/10).move(2, 0)
		}, RuleMoved},

		{"moved nearly too late for one who knew of it", func(r *record) {
			r.delay(Published, 2).wait(testDelay+testPunctual*9/10).move(2, 0)
		}, ""},
		{"moved too late for one who knew of it", func(r *record) {
			r.delay(Published, 2).wait(testDelay+testPunctual*11/10).move(2, 0)
		}, RuleMoved},
		{"moved too late for one who knew of it, when a fault had been healed for long", func(r *record) {
			r.fault(Effect{Fault: "freeze"}, time.Second).wait(testDelay).delay(Published, 2).wait(testDelay+testPunctual*11/10).move(2, 0)
		}, RuleMoved},
		{"moved soon after a fault", func(r *record) {
			r.delay(Published, 2).fault(Effect{Fault: "freeze"}, testDelay+testPunctual*11/10).move(2, 0)
		}, ""},
		{"moved soon after somebody was back", func(r *record) {
			r.delay(Published, 2).process(Stopped, "consumer-1").wait(testDelay+testPunctual*11/10).process(Continued, "consumer-1").move(2, 0)
		}, ""},
		{"moved soon after it was rescheduled", func(r *record) {
			r.delay(Published, 2).call(Changed, 2, known*9/10).wait(known*9/10+testPunctual*11/10).move(2, 0)
		}, ""},
		{"moved late after it was rescheduled", func(r *record) {
			r.delay(Published, 2).call(Changed, 2, known*11/10).wait(known*11/10+testPunctual*11/10).move(2, 0)
		}, RuleMoved},

		{"cancelled", func(r *record) { r.delay(Published, 2).cancel(Changed, 2).wait(2 * testDelay) }, ""},
		{"perhaps cancelled", func(r *record) { r.delay(Published, 2).cancel(Unsure, 2).wait(2 * testDelay) }, ""},
		{"perhaps cancelled, and moved", func(r *record) {
			r.delay(Published, 2).cancel(Unsure, 2).wait(testDelay).move(2, 0)
		}, ""},
		{"cancelled, and moved", func(r *record) { r.delay(Published, 2).cancel(Changed, 2).wait(testDelay).move(2, 0) }, RuleCancelled},
		{"moved, and cancelled", func(r *record) { r.delay(Published, 2).wait(testDelay).move(2, 0).cancel(Changed, 2) }, RuleCancelled},
		{"cancelled, which was lost, and moved", func(r *record) {
			r.delay(Published, 2).cancel(Changed, 2).fault(lossy, 0).wait(testDelay).move(2, 0)
		}, ""},
		{"cancelled, and moved, though all was lost", func(r *record) {
			r.delay(Published, 2).cancel(Changed, 2).fault(Effect{Fault: "flush", Loses: Everything, Destroys: true}, 0)
			r.wait(testDelay).move(2, 0)
		}, RuleCancelled},
		{"cancelled, and published once more", func(r *record) {
			r.delay(Unknown, 2).cancel(Changed, 2).delay(Published, 2).wait(testDelay).move(2, 0)
		}, ""},
		{"one of a call cancelled", func(r *record) {
			r.delay(Published, 2, 3, 4).move(3, 0).cancel(Changed, 2).wait(testDelay).move(4, 0)
		}, ""},

		{"not found after it was moved", func(r *record) {
			r.delay(Published, 2).wait(testDelay).move(2, 0).cancel(NotFound, 2)
		}, ""},
		{"not found after it was cancelled", func(r *record) { r.delay(Published, 2).cancel(Unsure, 2).cancel(NotFound, 2) }, ""},
		{"not found before it was published", func(r *record) {
			r.cancel(NotFound, 2).delay(Published, 2).wait(testDelay).move(2, 0)
		}, ""},
		{"not found, and not due", func(r *record) {
			r.delay(Published, 2).cancel(NotFound, 2).wait(testDelay).move(2, 0)
		}, RuleNotFound},
		{"not found, and due, and moved after that", func(r *record) {
			r.delay(Published, 2).wait(testDelay).cancel(NotFound, 2).wait(10*time.Millisecond).move(2, 0)
		}, RuleNotFound},
		{"not found, since it was lost", func(r *record) {
			r.delay(Published, 2).fault(Effect{Fault: "flush", Loses: Everything, Destroys: true}, 0).cancel(NotFound, 2)
		}, ""},
		{"not found, though only the group was lost", func(r *record) {
			r.delay(Published, 2).fault(Effect{Fault: "group-destroy", Loses: Everything, Group: true}, 0).cancel(NotFound, 2)
			r.wait(testDelay).move(2, 0)
		}, RuleNotFound},

		{"stored twice", func(r *record) { r.delay(Published, 2).wait(testDelay).move(2, 0).move(2, 0) }, RuleStoredTwice},
		{"moved again, since that was lost", func(r *record) {
			r.delay(Published, 2).wait(testDelay).move(2, 0).fault(lossy, 0).move(2, 0)
		}, ""},
		{"half a call", func(r *record) { r.delay(Unknown, 1, 2).move(1, 0).wait(2 * testDelay) }, RuleTorn},
		{"the other half of a call", func(r *record) { r.delay(Unknown, 1, 2).wait(testDelay).move(2, 0) }, RuleTorn},
		{"half a call, since the stream was lost", func(r *record) {
			r.delay(Published, 1, 2).fault(Effect{Fault: "delete", Loses: Everything, Destroys: true, Stream: true}, 0).wait(testDelay).move(2, 0)
		}, ""},
		{"lost while only the stream was lost", func(r *record) {
			r.delay(Published, 2).fault(Effect{Fault: "delete", Loses: Everything, Destroys: true, Stream: true}, 0).wait(2 * testDelay)
		}, RuleVanished},
		{"lost with the stream", func(r *record) {
			r.delay(Published, 2).wait(testDelay).fault(Effect{Fault: "delete", Loses: Everything, Destroys: true, Stream: true}, 0)
		}, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := newServed("consumer-1").clocked(0)
			test.story(r)
			rules := progressRules()
			rules.Delayed = &Delayed{Bound: testMoveBound, Punctual: testPunctual, Denied: time.Hour}
			var broken []string
			if test.broken != "" {
				broken = strings.Split(test.broken, ";")
			}
			slices.Sort(broken)
			assert.Equal(t, broken, r.checkBy(rules).Broken())
		})
	}
}

// TestDelayedWithoutClock: what takes a clock to judge is not judged without.
func TestDelayedWithoutClock(t *testing.T) {
	r := newServed("consumer-1")
	r.delay(Published, 2).cancel(NotFound, 2).move(2, 0)
	assert.Empty(t, r.check().Violations)
	assert.Equal(t, 1, r.check().Delayed)

	r.delay(Published, 4).cancel(Changed, 4).move(4, 0)
	assert.Equal(t, []string{RuleCancelled}, r.check().Broken())
}
