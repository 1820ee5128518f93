package rules

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// A record is a log under construction: what would be a run.
type record struct {
	events []Event
	final  map[string]TopicState
	now    time.Duration
	runs   int64
	topic  string // of what the tests of progress tell
}

const (
	testTopic    = "orders" // MaxConcurrency 1
	testWide     = "mails"
	testMinIdle  = 2 * time.Second
	testInterval = 200 * time.Millisecond
	testRetries  = 4
)

var testStart = time.UnixMilli(1_800_000_000_000)

func newRecord() *record {
	r := &record{final: map[string]TopicState{testTopic: {}, testWide: {}}}
	for _, process := range []string{"consumer-1", "consumer-2", "producer-1"} {
		r.add(Event{Kind: Spawned, Process: process, Life: 1})
	}
	return r
}

// add logs an event, a millisecond after the last one.
func (r *record) add(e Event) *record {
	r.now += time.Millisecond
	e.Mono, e.Wall = r.now, testStart.Add(r.now)
	r.events = append(r.events, e)
	return r
}

func (r *record) wait(d time.Duration) *record { r.now += d; return r }

func testID(number int) string { return fmt.Sprintf("%d-%d", testStart.UnixMilli(), number) }

// publish adds a call of Publish with this outcome, and what is stored of it.
func (r *record) publish(outcome Kind, stored bool, numbers ...int) *record {
	e := Event{Process: "producer-1", Life: 1, Topic: testTopic}
	for _, n := range numbers {
		e.UUIDs = append(e.UUIDs, testUUID(n))
		if stored {
			r.store(n)
		}
	}
	e.Kind = Publishing
	r.add(e)
	e.Kind = outcome
	return r.add(e)
}

func testUUID(number int) string { return fmt.Sprintf("plain-%d", number) }

func (r *record) store(number int) {
	state := r.final[testTopic]
	state.Entries = append(state.Entries, Entry{testID(number), testUUID(number)})
	r.final[testTopic] = state
}

// start begins a handler run; end, with its number, ends it.
func (r *record) start(process string, number int, count int64) (run Event) {
	return r.startOf(testUUID(number), process, 1, number, count)
}

func (r *record) startOf(uuid, process string, life, number int, count int64) (run Event) {
	r.runs++
	run = Event{
		Kind: Started, Process: process, Life: life, Run: r.runs, Topic: testTopic, ID: testID(number), UUID: uuid,
		Count: count, Consumer: process,
	}
	r.add(run)
	return run
}

// publishOf adds a call with one message of another nature, stored.
func (r *record) publishOf(uuid string, number int) *record {
	e := Event{Kind: Publishing, Process: "producer-1", Life: 1, Topic: testTopic, UUIDs: []string{uuid}}
	r.add(e)
	e.Kind = Published
	r.add(e)
	state := r.final[testTopic]
	state.Entries = append(state.Entries, Entry{testID(number), uuid})
	r.final[testTopic] = state
	return r
}

// failedOf adds a message that consumer-1 fails to handle.
func (r *record) failedOf(uuid string, number int) *record {
	return r.publishOf(uuid, number).handleOf(uuid, "consumer-1", number, 1)
}

func (r *record) handleOf(uuid, process string, number int, count int64) *record {
	return r.end(r.startOf(uuid, process, 1, number, count), Nacked)
}

// forget has Redis forget what is pending, and not how far the group has read.
func (r *record) forget() *record {
	return r.fault(Effect{Fault: "forget", Loses: Everything, Group: true, Keeps: true}, 0)
}

// crashes has the message handled in lives 1 to n of consumer-1, each of which it ends.
func (r *record) crashes(uuid string, number, n int) *record {
	for life := 1; life <= n; life++ {
		r.crash(life, func() { r.end(r.startOf(uuid, "consumer-1", life, number, int64(life)), Crashed) })
	}
	return r
}

// crash is a life of consumer-1 that ends by itself.
func (r *record) crash(life int, while func()) {
	if life > 1 {
		r.add(Event{Kind: Spawned, Process: "consumer-1", Life: life})
	}
	while()
	r.add(Event{Kind: Died, Process: "consumer-1", Life: life, Error: "signal: killed"})
}

func (r *record) pause(d time.Duration) *record {
	r.add(Event{Kind: Paused, Topic: testTopic})
	return r.wait(d).add(Event{Kind: Resuming, Topic: testTopic})
}

func (r *record) end(run Event, kind Kind) *record {
	run.Kind = kind
	return r.add(run)
}

func (r *record) handle(process string, number int, count int64, kind Kind) *record {
	return r.end(r.start(process, number, count), kind)
}

func (r *record) process(kind Kind, process string) *record {
	return r.add(Event{Kind: kind, Process: process, Life: 1})
}

// fault is one from now on; healing it takes d.
func (r *record) fault(e Effect, d time.Duration) *record {
	e.Number = len(r.events)
	r.add(Event{Kind: Injected, Process: "runner", Strike: &e})
	r.wait(d)
	return r.add(Event{Kind: Healed, Process: "runner", Strike: &e})
}

func (r *record) pend(number int, consumer string) *record {
	state := r.final[testTopic]
	state.Pending = append(state.Pending, Pending{testID(number), consumer, 1})
	r.final[testTopic] = state
	return r
}

func (r *record) deadLetter(number int, uuid string) *record {
	state := r.final[testTopic]
	state.Dead = append(state.Dead, Letter{
		ID: fmt.Sprintf("%d-%d", testStart.Add(r.now).UnixMilli(), len(state.Dead)), EntryID: testID(number), UUID: uuid,
		Deliveries: testRetries + 1, At: r.now,
	})
	r.final[testTopic] = state
	return r.add(Event{Kind: Dead, Process: "consumer-1", Life: 1, Topic: testTopic, ID: testID(number), UUID: uuid})
}

func (r *record) check() Verdict {
	return r.checkBy(testRules())
}

func (r *record) checkBy(rules Rules) Verdict {
	r.wait(time.Minute).process(Settled, "runner")
	return Check(Sift(rules, slices.Clone(r.events), r.final))
}

func testRules() Rules {
	return Rules{
		ClaimMinIdle: testMinIdle, ClaimInterval: testInterval, MaxRetries: testRetries,
		Topics: map[string]Topic{testTopic: {Name: testTopic, MaxConcurrency: 1}, testWide: {Name: testWide, MaxConcurrency: 8}},
	}
}

// TestCheck: each breach is reported, and nothing that only looks like one.
func TestCheck(t *testing.T) {
	tests := []struct {
		name   string
		story  func(*record)
		broken string // the rules, separated by commas
	}{
		{"clean", func(r *record) {
			r.publish(Published, true, 1, 2).publish(Unknown, false, 3).publish(Unknown, true, 4).publish(Refused, false, 5)
			r.handle("consumer-1", 1, 1, Nacked).handle("consumer-1", 1, 2, Acked).handle("consumer-2", 2, 1, Acked)
			r.handle("consumer-1", 4, 1, Acked)
		}, ""},

		{"never delivered", func(r *record) { r.publish(Published, true, 1) }, RuleLost},
		{"of unknown outcome, stored, and never delivered", func(r *record) { r.publish(Unknown, true, 1) }, RuleLost},
		{"failed and forgotten", func(r *record) { r.publish(Published, true, 1).handle("consumer-1", 1, 1, Nacked) }, RuleLost},
		{"not stored, and nothing happened", func(r *record) { r.publish(Published, false, 1) }, RuleVanished},
		{"not stored, and the fault was before", func(r *record) {
			r.fault(Effect{Fault: "flushall", Loses: Everything, Destroys: true}, 0).wait(time.Minute).publish(Published, false, 1)
		}, RuleVanished},
		{"not stored, and the fault was another topic's", func(r *record) {
			r.publish(Published, false, 1).fault(Effect{Fault: "stream-delete", Loses: []string{testWide}, Destroys: true}, 0)
		}, RuleVanished},
		{"not stored, and only the group was lost", func(r *record) {
			r.publish(Published, false, 1).fault(Effect{Fault: "group-destroy", Loses: Everything, Group: true}, 0)
		}, RuleVanished},
		{"not stored, and written long before Redis was killed", func(r *record) {
			r.publish(Published, false, 1).wait(time.Minute).fault(Effect{Fault: "redis-kill-everysec", Loses: Everything}, 0)
		}, RuleVanished},
		{"stored twice", func(r *record) {
			r.publish(Published, true, 1).handle("consumer-1", 1, 1, Acked)
			state := r.final[testTopic]
			state.Entries = append(state.Entries, Entry{testID(2), testUUID(1)})
			r.final[testTopic] = state
			again := r.start("consumer-1", 2, 1)
			r.end(again, Acked)
		}, RuleStoredTwice},
		{"stored once by a repetition", func(r *record) {
			r.publish(Unknown, false, 1).publish(Published, true, 1).handle("consumer-1", 1, 1, Acked)
		}, ""},
		{"stored, and again by a repetition", func(r *record) {
			r.publish(Unknown, true, 1).publish(Published, false, 1).handle("consumer-1", 1, 1, Acked)
			r.final[testTopic] = TopicState{Entries: []Entry{{testID(1), testUUID(1)}, {testID(2), testUUID(1)}}}
			again := r.start("consumer-1", 2, 1)
			r.end(again, Acked)
		}, RuleStoredTwice},
		{"a repetition that does not store what was destroyed", func(r *record) {
			r.publish(Unknown, false, 1)
			r.fault(Effect{Fault: "flushall", Loses: Everything, Destroys: true}, 0)
			r.publish(Published, false, 1)
		}, RuleVanished},
		{"refused but stored", func(r *record) { r.publish(Refused, true, 1).handle("consumer-1", 1, 1, Acked) }, RuleRefused},
		{"half a batch", func(r *record) {
			r.publish(Unknown, false, 1, 2)
			r.store(1)
			r.handle("consumer-1", 1, 1, Acked)
		}, RuleTorn},
		{"a batch out of order", func(r *record) {
			r.publish(Published, false, 2, 1)
			r.store(1)
			r.store(2)
			r.handle("consumer-1", 1, 1, Acked).handle("consumer-1", 2, 1, Acked)
		}, RuleTorn},

		{"pending", func(r *record) { r.publish(Published, true, 1).pend(1, "consumer-1") }, RulePending},
		{"handled and pending", func(r *record) {
			r.publish(Published, true, 1).handle("consumer-1", 1, 1, Acked).pend(1, "consumer-1")
		}, RulePending},

		{"two at once", func(r *record) {
			r.publish(Published, true, 1)
			first, second := r.start("consumer-1", 1, 1), r.start("consumer-2", 1, 2)
			r.end(first, Acked).end(second, Acked)
		}, RuleOverlap},
		{"two at once: stopped too shortly", func(r *record) {
			r.publish(Published, true, 1)
			first := r.start("consumer-1", 1, 1)
			r.process(Stopped, "consumer-1").wait(testMinIdle/2).process(Continued, "consumer-1")
			second := r.start("consumer-2", 1, 2)
			r.end(first, Acked).end(second, Acked)
		}, RuleOverlap},
		{"two at once: Redis was frozen", func(r *record) {
			r.publish(Published, true, 1)
			first := r.start("consumer-1", 1, 1)
			r.fault(Effect{Fault: "redis-freeze-long", Breaks: true}, 5*testMinIdle)
			second := r.start("consumer-2", 1, 2)
			r.end(first, Acked).end(second, Acked)
		}, RuleOverlap},
		{"two at once: the other one was stopped before", func(r *record) {
			r.process(Stopped, "consumer-1").wait(2*testMinIdle).process(Continued, "consumer-1").wait(2 * testMinIdle)
			r.publish(Published, true, 1)
			first, second := r.start("consumer-1", 1, 1), r.start("consumer-2", 1, 2)
			r.end(first, Acked).end(second, Acked)
		}, RuleOverlap},
		{"one after the death of the other", func(r *record) {
			r.publish(Published, true, 1)
			r.start("consumer-1", 1, 1)
			r.process(Ended, "consumer-1").handle("consumer-2", 1, 2, Acked)
		}, ""},
		{"one while the other is stopped", func(r *record) {
			r.publish(Published, true, 1)
			first := r.start("consumer-1", 1, 1)
			r.process(Stopped, "consumer-1").wait(2*testMinIdle).handle("consumer-2", 1, 2, Acked)
			r.process(Continued, "consumer-1").end(first, Lost)
		}, ""},
		{"one while the other is stopped by the machine", func(r *record) {
			r.publish(Published, true, 1)
			first := r.start("consumer-1", 1, 1)
			second := r.wait(2*testMinIdle).start("consumer-2", 1, 2)
			r.add(Event{Kind: Stalled, Process: "consumer-1", Life: 1, Took: 2 * testMinIdle}).end(first, Acked).end(second, Acked)
		}, ""},
		{"one while the other is stopped twice, with no time to renew", func(r *record) {
			r.publish(Published, true, 1)
			first := r.start("consumer-1", 1, 1)
			for range 2 {
				r.process(Stopped, "consumer-1").wait(testMinIdle*2/3).process(Continued, "consumer-1")
			}
			second := r.start("consumer-2", 1, 2)
			r.end(first, Acked).end(second, Acked)
		}, ""},
		{"one while the other is cut off", func(r *record) {
			r.publish(Published, true, 1)
			first := r.start("consumer-1", 1, 1)
			r.fault(Effect{Fault: "partition", Isolates: []string{"consumer-1"}, Breaks: true}, 2*testMinIdle)
			second := r.start("consumer-2", 1, 2)
			r.end(first, Acked).end(second, Acked)
		}, ""},
		{"what was read ahead is begun after an absence", func(r *record) {
			r.publish(Published, true, 1)
			r.process(Stopped, "consumer-1").wait(2 * testMinIdle)
			second := r.start("consumer-2", 1, 2)
			first := r.process(Continued, "consumer-1").start("consumer-1", 1, 1)
			r.end(first, Lost).end(second, Acked)
		}, ""},

		{"order", func(r *record) {
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked).handle("consumer-1", 1, 1, Acked)
		}, RuleOrder},
		{"order: of two consumers", func(r *record) {
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked).handle("consumer-2", 1, 1, Acked)
		}, ""},
		{"order: a second delivery", func(r *record) {
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked).handle("consumer-1", 1, 2, Acked)
		}, ""},
		{"order: released by one who closed", func(r *record) {
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked)
			r.process(Closing, "consumer-2").process(Ended, "consumer-2").handle("consumer-1", 1, 1, Acked)
		}, ""},
		{"order: released by one who was told to close twice", func(r *record) {
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked).process(Closing, "consumer-2")
			r.handle("consumer-1", 1, 1, Acked).process(Closing, "consumer-2").process(Ended, "consumer-2")
		}, ""},
		{"order: released by one who closed its subscriptions and lives on", func(r *record) {
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked)
			r.process(Reopened, "consumer-2").handle("consumer-1", 1, 1, Acked)
		}, ""},
		{"order: released by another one in a pause", func(r *record) {
			r.process(Spawned, "consumer-2").publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked).pause(time.Minute).handle("consumer-1", 1, 1, Acked)
		}, ""},
		{"order: a pause of one alone", func(r *record) {
			r.process(Closing, "consumer-2").process(Ended, "consumer-2").wait(time.Minute)
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked).pause(time.Minute).handle("consumer-1", 1, 1, Acked)
		}, RuleOrder},
		{"order: published after a pause", func(r *record) {
			r.process(Spawned, "consumer-2").pause(time.Minute).publish(Published, true, 1, 2)
			r.handle("consumer-1", 2, 1, Acked).handle("consumer-1", 1, 1, Acked)
		}, RuleOrder},
		{"order: published after the other one had opened others", func(r *record) {
			r.process(Reopened, "consumer-2").wait(time.Minute)
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked).handle("consumer-1", 1, 1, Acked)
		}, RuleOrder},
		{"order: published after the other one closed", func(r *record) {
			r.process(Closing, "consumer-2").process(Ended, "consumer-2").wait(time.Minute)
			r.publish(Published, true, 1, 2).handle("consumer-1", 2, 1, Acked).handle("consumer-1", 1, 1, Acked)
		}, RuleOrder},
		{"overtaken", func(r *record) {
			r.publish(Published, true, 1, 2).handle("consumer-1", 1, 1, Nacked).handle("consumer-1", 2, 1, Acked)
			r.handle("consumer-1", 1, 2, Acked)
		}, RuleRetryOrder},
		{"too many", func(r *record) {
			r.publish(Published, true, 1, 2)
			first, second := r.start("consumer-1", 1, 1), r.start("consumer-1", 2, 1)
			r.end(first, Acked).end(second, Acked)
		}, RuleConcurrency},

		{"a delivery past the limit", func(r *record) {
			r.publish(Published, true, 1).handle("consumer-1", 1, testRetries+3, Acked)
		}, RuleLimit},
		{"too many failures", func(r *record) {
			r.publish(Published, true, 1)
			for count := range int64(testRetries + 2) {
				r.handle("consumer-1", 1, count+1, Nacked)
			}
			r.deadLetter(1, "poison-1")
		}, RuleLimit},
		{"as many failures as runs are granted, one of a process that ended before Redis knew", func(r *record) {
			r.publishOf("poison-1", 1)
			for count := range int64(testRetries + 1) {
				r.end(r.startOf("poison-1", "consumer-1", 1, 1, count+1), Nacked)
			}
			r.process(Ended, "consumer-1").end(r.startOf("poison-1", "consumer-2", 1, 1, testRetries+2), Nacked).deadLetter(1, "poison-1")
		}, ""},
		{"as many failures as runs are granted, one of a process that was cut off then", func(r *record) {
			r.publishOf("poison-1", 1)
			for count := range int64(testRetries + 1) {
				r.end(r.startOf("poison-1", "consumer-1", 1, 1, count+1), Nacked)
			}
			r.fault(Effect{Fault: "partition", Isolates: []string{"consumer-1"}, Breaks: true}, 2*testMinIdle)
			r.end(r.startOf("poison-1", "consumer-2", 1, 1, testRetries+2), Nacked).deadLetter(1, "poison-1")
		}, ""},
		{"too many runs", func(r *record) {
			r.publish(Published, true, 1)
			for range testRetries + 3 {
				r.handle("consumer-1", 1, 1, Lost)
			}
			r.handle("consumer-1", 1, 1, Acked)
		}, RuleLimit},
		{"a group that begins anew while an entry is read ahead reads it again", func(r *record) {
			r.publish(Published, true, 1).add(Event{Kind: Delivered, Process: "consumer-1", Life: 1, Topic: testTopic, ID: testID(1), UUID: testUUID(1), Count: 1})
			r.fault(Effect{Fault: "destroy group", Loses: Everything, Group: true}, 0).wait(2 * late)
			for range testRetries + 3 {
				r.handle("consumer-1", 1, 1, Acked)
			}
		}, ""},
		{"a group that begins anew before an entry is read does not", func(r *record) {
			r.fault(Effect{Fault: "destroy group", Loses: Everything, Group: true}, 0).wait(2 * late)
			r.publish(Published, true, 1)
			for range testRetries + 3 {
				r.handle("consumer-1", 1, 1, Acked)
			}
		}, RuleLimit},
		{"shutdowns are no runs", func(r *record) {
			r.publish(Published, true, 1)
			for range 2 * testRetries {
				r.handle("consumer-1", 1, 1, Closed)
			}
			r.handle("consumer-1", 1, 1, Acked)
		}, ""},

		{"a dead poison", func(r *record) { r.publish(Published, true, 1).deadLetter(1, "poison-1") }, ""},
		{"a poison that lives", func(r *record) {
			e := Event{Kind: Publishing, Process: "producer-1", Life: 1, Topic: testTopic, UUIDs: []string{"poison-9"}}
			r.add(e)
			e.Kind = Published
			r.add(e)
			r.final[testTopic] = TopicState{Entries: []Entry{{testID(9), "poison-9"}}}
			run := r.start("consumer-1", 9, 1)
			r.end(run, Nacked)
		}, RuleImmortal},
		{"dead twice", func(r *record) { r.publish(Published, true, 1).deadLetter(1, "poison-1").deadLetter(1, "poison-1") }, RuleDeadTwice},
		{"dead twice, the first time forgotten by Redis", func(r *record) {
			r.publish(Published, true, 1).deadLetter(1, "poison-1")
			r.fault(Effect{Fault: "group-destroy", Loses: Everything, Group: true}, 0).deadLetter(1, "poison-1")
		}, ""},
		{"dead twice, delivered anew long after Redis lost how far the group had read", func(r *record) {
			r.failedOf("poison-1", 1).fault(Effect{Fault: "failover", Loses: Everything}, time.Second).wait(time.Minute)
			r.deadLetter(1, "poison-1").end(r.startOf("poison-1", "consumer-1", 1, 1, 1), Nacked).deadLetter(1, "poison-1")
		}, ""},
		{"dead twice, delivered again after Redis lost something, but not as if it were new", func(r *record) {
			r.failedOf("poison-1", 1).fault(Effect{Fault: "failover", Loses: Everything}, time.Second).wait(time.Minute)
			r.deadLetter(1, "poison-1").end(r.startOf("poison-1", "consumer-1", 1, 1, 2), Nacked).deadLetter(1, "poison-1")
		}, RuleDeadTwice},
		{"dead twice, delivered anew, though Redis kept how far the group had read", func(r *record) {
			r.failedOf("poison-1", 1).fault(Effect{Fault: "delete consumer", Loses: Everything, Group: true, Keeps: true}, 0).wait(time.Minute)
			r.deadLetter(1, "poison-1").end(r.startOf("poison-1", "consumer-1", 1, 1, 1), Nacked).deadLetter(1, "poison-1")
		}, RuleDeadTwice},
		{"dead twice, delivered anew, though it came long after the loss", func(r *record) {
			r.fault(Effect{Fault: "failover", Loses: Everything}, time.Second).wait(time.Minute).failedOf("poison-1", 1).wait(time.Minute)
			r.deadLetter(1, "poison-1").end(r.startOf("poison-1", "consumer-1", 1, 1, 1), Nacked).deadLetter(1, "poison-1")
		}, RuleDeadTwice},
		{"dead twice, put back by a former holder that was away when the group was lost", func(r *record) {
			r.failedOf("poison-1", 1).process(Stopped, "consumer-1").wait(testMinIdle)
			r.handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1").forget()
			r.process(Continued, "consumer-1").handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1")
		}, ""},
		{"dead twice, and a former holder was not away for long", func(r *record) {
			r.failedOf("poison-1", 1).process(Stopped, "consumer-1").wait(testMinIdle / 2)
			r.handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1").forget()
			r.process(Continued, "consumer-1").handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1")
		}, RuleDeadTwice},
		{"dead twice, and the group was lost when a former holder was back", func(r *record) {
			r.failedOf("poison-1", 1).process(Stopped, "consumer-1").wait(testMinIdle)
			r.handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1")
			r.process(Continued, "consumer-1").forget().handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1")
		}, RuleDeadTwice},
		{"dead twice, and a former holder is still away", func(r *record) {
			r.failedOf("poison-1", 1).process(Stopped, "consumer-1").wait(testMinIdle)
			r.handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1").forget()
			r.handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1").process(Continued, "consumer-1")
		}, RuleDeadTwice},
		{"dead twice, and a former holder was killed", func(r *record) {
			r.failedOf("poison-1", 1).process(Stopped, "consumer-1").wait(testMinIdle)
			r.handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1").forget()
			r.process(Ended, "consumer-1").handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1")
		}, RuleDeadTwice},
		{"dead twice, and who was away when the group was lost had never had it", func(r *record) {
			r.publishOf("poison-1", 1).process(Stopped, "consumer-1").wait(testMinIdle)
			r.handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1").forget()
			r.process(Continued, "consumer-1").handleOf("poison-1", "consumer-2", 1, 2).deadLetter(1, "poison-1")
		}, RuleDeadTwice},
		{"a deadly one, dead in time", func(r *record) {
			r.publishOf("deadly-1", 1).crashes("deadly-1", 1, testRetries+2).deadLetter(1, "deadly-1")
		}, ""},
		{"a deadly one, dead too late", func(r *record) {
			r.publishOf("deadly-1", 1).crashes("deadly-1", 1, testRetries+3).deadLetter(1, "deadly-1")
		}, RuleLimit},
		{"a deadly one that is forgotten", func(r *record) { r.publishOf("deadly-1", 1).crashes("deadly-1", 1, 2) }, RuleImmortal},
		{"an innocent killed by another one each time, alone in its subscription from the third on", func(r *record) {
			r.publish(Published, true, 1).crashes(testUUID(1), 1, testRetries+2).deadLetter(1, testUUID(1))
		}, ""},
		{"an innocent killed by others twice", func(r *record) {
			r.publish(Published, true, 1).crashes(testUUID(1), 1, 2).deadLetter(1, testUUID(1))
		}, RuleInnocent},
		{"a suspect with company", func(r *record) {
			r.publish(Published, true, 2).publishOf("deadly-1", 1).crashes("deadly-1", 1, suspectFrom-1)
			r.crash(suspectFrom, func() {
				run := r.startOf("deadly-1", "consumer-1", suspectFrom, 1, suspectFrom)
				other := r.startOf(testUUID(2), "consumer-1", suspectFrom, 2, 1)
				r.end(other, Acked).end(run, Crashed)
			})
			r.deadLetter(1, "deadly-1")
		}, RuleConcurrency},
		{"one in its last delivery with company", func(r *record) {
			r.publish(Published, true, 2).publishOf("deadly-1", 1).crashes("deadly-1", 1, testRetries+1)
			r.crash(testRetries+2, func() {
				run := r.startOf("deadly-1", "consumer-1", testRetries+2, 1, testRetries+2)
				other := r.startOf(testUUID(2), "consumer-1", testRetries+2, 2, 1)
				r.end(other, Acked).end(run, Crashed)
			})
			r.deadLetter(1, "deadly-1")
		}, RuleSuspect + "," + RuleConcurrency},
		{"two suspects", func(r *record) {
			r.publishOf("deadly-1", 1).publishOf("deadly-2", 2)
			for life := 1; life <= suspectFrom; life++ {
				r.crash(life, func() {
					run := r.startOf("deadly-1", "consumer-1", life, 1, int64(life))
					other := r.startOf("deadly-2", "consumer-1", life, 2, int64(life))
					r.end(other, Crashed).end(run, Crashed)
				})
			}
			r.deadLetter(1, "deadly-1").deadLetter(2, "deadly-2")
		}, RuleSuspect + "," + RuleConcurrency},
		{"a broken one, dead", func(r *record) { r.publishOf("broken-1", 1).deadLetter(1, "broken-1") }, ""},
		{"a broken one, not dead", func(r *record) { r.publishOf("broken-1", 1) }, RuleImmortal},
		{"a broken one, dead twice", func(r *record) { r.publishOf("broken-1", 1).deadLetter(1, "broken-1").deadLetter(1, "broken-1") }, RuleDeadTwice},
		{"a broken one that is handled", func(r *record) {
			run := r.publishOf("broken-1", 1).startOf("broken-1", "consumer-1", 1, 1, 1)
			r.end(run, Nacked).deadLetter(1, "broken-1")
		}, RuleHandled},
		{"an innocent dead", func(r *record) { r.publish(Published, true, 1).deadLetter(1, testUUID(1)) }, RuleInnocent},
		{"a process that panics", func(r *record) { r.process(Died, "consumer-1") }, RuleDied},

		{"a group destroyed while the holder lives", func(r *record) {
			r.publish(Published, true, 1)
			run := r.start("consumer-1", 1, 1)
			r.fault(Effect{Fault: "group-destroy", Loses: Everything, Group: true, Held: map[string]string{testID(1): "consumer-1"}}, 0)
			r.end(run, Nacked)
		}, RuleLost},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := newRecord()
			test.story(r)
			v := r.check()
			assert.Equal(t, test.broken, strings.Join(v.Broken(), ","), "%v", v.Violations)
		})
	}
}

// TestRedisLoses: what Redis has lost is counted, and nothing else is blamed on it.
func TestRedisLoses(t *testing.T) {
	r := newRecord()
	r.publish(Published, false, 1, 2, 3).handle("consumer-1", 1, 1, Acked)
	r.fault(Effect{Fault: "flushall", Loses: Everything, Destroys: true}, 0)
	r.publish(Published, true, 4).handle("consumer-1", 4, 1, Acked)
	v := r.check()
	assert.Empty(t, v.Violations)
	var lost []string
	for _, l := range v.LostByRedis {
		lost = append(lost, l.UUID)
		assert.Equal(t, "flushall", l.Fault.Fault)
	}
	assert.Equal(t, []string{testUUID(2), testUUID(3)}, lost, "not 1, which was handled before")
}

// TestCulprit: what may have lost a message is not blamed for what was destroyed later.
func TestCulprit(t *testing.T) {
	r := newRecord()
	kill := Effect{Fault: "redis-kill-everysec", Loses: Everything}
	r.publish(Published, false, 1).fault(kill, 0)
	r.fault(Effect{Fault: "flushall", Loses: Everything, Destroys: true}, 0)
	r.wait(time.Minute).publish(Published, false, 2).fault(kill, 0)
	v := r.check()
	assert.Empty(t, v.Violations)
	culprits := make(map[string]string)
	for _, l := range v.LostByRedis {
		culprits[l.UUID] = l.Fault.Fault
	}
	assert.Equal(t, map[string]string{testUUID(1): "flushall", testUUID(2): "redis-kill-everysec"}, culprits)
}

// TestRedisForgets: with the group Redis forgets what a dead holder had. The living holders put theirs back.
func TestRedisForgets(t *testing.T) {
	r := newRecord()
	r.publish(Published, true, 1, 2)
	r.start("consumer-1", 1, 1)
	r.handle("consumer-2", 2, 1, Acked).process(Ended, "consumer-1")
	r.fault(Effect{Fault: "group-destroy", Loses: Everything, Group: true, Held: map[string]string{testID(1): "consumer-1"}}, 0)
	v := r.check()
	assert.Empty(t, v.Violations)
	assert.Len(t, v.LostByRedis, 1)
}

// TestRedisForgets_Noticing: a holder who dies before it can notice cannot put back what it had; one that closes, or dies later, can.
func TestRedisForgets_Noticing(t *testing.T) {
	for _, test := range []struct {
		name    string
		started bool
		closes  bool
		after   time.Duration
		broken  []string
	}{
		{name: "dies soon", started: true, after: testMinIdle / 6},
		{name: "dies soon, with what it had read ahead", after: testMinIdle / 6},
		{name: "dies later", started: true, after: testMinIdle / 2, broken: []string{RuleLost}},
		{name: "dies later, with what it had read ahead", after: testMinIdle / 2, broken: []string{RuleLost}},
		{name: "closes", started: true, closes: true, after: testMinIdle / 6, broken: []string{RuleLost}},
		{name: "closes, with what it had read ahead", closes: true, after: testMinIdle / 6, broken: []string{RuleLost}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRecord()
			r.publish(Published, true, 1)
			if test.started {
				r.start("consumer-1", 1, 1)
			}
			r.fault(Effect{Fault: "group-destroy", Loses: Everything, Group: true, Held: map[string]string{testID(1): "consumer-1"}}, 0)
			if r.wait(test.after); test.closes {
				r.process(Closing, "consumer-1")
			}
			r.add(Event{Kind: Ended, Process: "consumer-1", Life: 1, Error: map[bool]string{false: "killed"}[test.closes]})
			assert.Equal(t, test.broken, r.check().Broken())
		})
	}
}

// TestReach: neither an absence nor an outage counts, nor both at a time twice.
func TestReach(t *testing.T) {
	r := newRecord().wait(time.Second)
	from := r.now
	r.process(Stopped, "consumer-1").wait(2 * time.Second)
	r.fault(Effect{Fault: "freeze"}, 3*time.Second).process(Continued, "consumer-1").wait(time.Second)
	r.fault(Effect{Fault: "freeze of mails", Ails: []string{testWide}}, 4*time.Second)
	r.fault(Effect{Fault: "clock step", Idle: true}, 5*time.Second).wait(6 * time.Second)
	r.process(Settled, "runner")
	e := Sift(testRules(), r.events, r.final)
	for _, test := range []struct {
		process, topic string
		want           time.Duration
	}{
		{"consumer-1", testTopic, 16 * time.Second}, {"consumer-2", testTopic, 18 * time.Second}, {"consumer-1", testWide, 12 * time.Second},
	} {
		assert.InDelta(t, test.want, e.Reach(test.process, test.topic, from, r.now), float64(20*time.Millisecond), "%s of %s", test.process, test.topic)
	}
}

// TestDuplicates: more than one success is counted, and is no violation.
func TestDuplicates(t *testing.T) {
	r := newRecord()
	r.publish(Published, true, 1).handle("consumer-1", 1, 1, Acked).process(Ended, "consumer-1").handle("consumer-2", 1, 2, Acked)
	v := r.check()
	assert.Empty(t, v.Violations)
	assert.Len(t, v.Duplicates, 1)
}

// TestExcusedOverlaps are counted too.
func TestExcusedOverlaps(t *testing.T) {
	r := newRecord()
	r.publish(Published, true, 1)
	first := r.start("consumer-1", 1, 1)
	r.process(Stopped, "consumer-1").wait(2*testMinIdle).handle("consumer-2", 1, 2, Acked)
	r.process(Continued, "consumer-1").end(first, Lost)
	assert.Equal(t, 1, r.check().ExcusedOverlaps)
}

// TestMaxRetries: without a limit nothing is past it, and nothing is suspect; without retries the second delivery is the last one.
func TestMaxRetries(t *testing.T) {
	rules := testRules()
	r := newRecord()
	r.publish(Published, true, 1).handle("consumer-1", 1, 20, Nacked).handle("consumer-1", 1, 21, Acked)
	rules.MaxRetries = 0
	assert.Empty(t, r.checkBy(rules).Violations)
	rules.MaxRetries = -1
	assert.Equal(t, []string{RuleLimit}, r.checkBy(rules).Broken())

	r = newRecord()
	r.publish(Published, true, 1).crashes(testUUID(1), 1, 2).deadLetter(1, testUUID(1))
	assert.Equal(t, 1, r.checkBy(rules).Victims, "its second and last delivery ended with its process")
}

// TestTrimmed: what left the stream after it was handled has not vanished, what left it before has.
func TestTrimmed(t *testing.T) {
	trim := Event{Kind: Trimmed, Process: "consumer-1", Life: 1, Topic: testTopic, ID: testID(1), UUID: testUUID(1)}
	r := newRecord()
	r.publish(Published, false, 1).handle("consumer-1", 1, 1, Acked).add(trim)
	assert.Empty(t, r.check().Violations)

	r = newRecord()
	r.publish(Published, false, 1).add(trim).handle("consumer-1", 1, 1, Acked)
	assert.Equal(t, []string{RuleVanished}, r.check().Broken())

	for _, there := range []bool{false, true} {
		r = newRecord().process(Spawned, "consumer-9")
		r.add(Event{Kind: Subscribed, Process: "consumer-9", Life: 1, Topic: testTopic})
		if !there {
			r.process(Ended, "consumer-9")
		}
		r.fault(Effect{Fault: "flushall", Loses: Everything, Destroys: true}, time.Second).publish(Published, false, 1).add(trim)
		if there {
			assert.Equal(t, []string{RuleVanished}, r.check().Broken())
		} else {
			assert.Empty(t, r.check().Violations, "there was no group")
		}
	}
}

// TestOrderOfViolations: the same evidence gives the same verdict, in the same order.
func TestOrderOfViolations(t *testing.T) {
	r := newRecord()
	for process := range 20 {
		name := fmt.Sprintf("consumer-%d", 10+process)
		r.process(Spawned, name)
		n := 2 * process
		r.publish(Published, true, n+1, n+2).handle(name, n+2, 1, Acked).handle(name, n+1, 1, Acked).process(Died, name)
	}
	first := r.check()
	assert.Len(t, first.Violations, 40)
	for range 10 {
		assert.Equal(t, first.Violations, r.check().Violations)
	}
}
