package rules

import (
	"cmp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

const (
	testBound        = 5 * time.Second
	testSuspectBound = 20 * time.Second
	testRecovery     = time.Second
	// testLong is too long to wait for anything but a suspect, whatever comes before.
	testLong = 15 * time.Second
)

func progressRules() Rules {
	rules := testRules()
	rules.Progress = &Progress{Bound: testBound, SuspectBound: testSuspectBound, Recovery: testRecovery}
	rules.CloseTimeout, rules.CloseBound = 4*time.Second, time.Second
	return rules
}

// newServed is a record whose consumers have subscribed, some time ago.
func newServed(processes ...string) *record {
	r := newRecord()
	for _, process := range processes {
		for _, topic := range []string{testTopic, testWide} {
			r.add(Event{Kind: Subscribed, Process: process, Life: 1, Topic: topic})
		}
	}
	return r.wait(time.Minute)
}

// putAs adds an entry to the stream.
func (r *record) putAs(uuid string, number int) {
	r.add(Event{Kind: Stored, Topic: r.topic, ID: testID(number), UUID: uuid})
	state := r.final[r.topic]
	state.Entries = append(state.Entries, Entry{testID(number), uuid})
	r.final[r.topic] = state
}

func (r *record) put(numbers ...int) {
	for _, n := range numbers {
		r.putAs(testUUID(n), n)
	}
}

// deliver has a process get the entry, not its handler.
func (r *record) deliver(process string, number int, count int64) *record {
	return r.add(Event{Kind: Delivered, Process: process, Life: 1, Topic: r.topic, ID: testID(number), UUID: testUUID(number), Count: count})
}

func (r *record) begin(process string, number int, count int64) Event {
	r.deliver(process, number, count)
	r.runs++
	run := Event{
		Kind: Started, Process: process, Life: 1, Run: r.runs, Topic: r.topic, ID: testID(number), UUID: testUUID(number), Count: count,
	}
	r.add(run)
	return run
}

func (r *record) nack(run Event, delay time.Duration) {
	run.Kind, run.Delay = Nacked, delay
	r.add(run)
}

// ack has the entry handled at last, so that no other rule is broken.
func (r *record) ack(process string, number int, count int64) {
	r.end(r.begin(process, number, count), Acked)
}

func TestProgress(t *testing.T) {
	const one, two = "consumer-1", "consumer-2"
	tests := []struct {
		name    string
		topic   string // testWide, if it is empty
		served  []string
		story   func(r *record)
		starves bool
	}{
		{name: "stored, and started in time", story: func(r *record) {
			r.put(1)
			r.wait(testBound*9/10).ack(one, 1, 1)
		}},
		{name: "stored, and started late", story: func(r *record) {
			r.put(1)
			r.wait(testBound*11/10).ack(one, 1, 1)
		}, starves: true},
		{name: "stored, and never started", story: func(r *record) {
			r.put(1)
			r.wait(time.Minute).deadLetter(9, "poison-9")
		}, starves: true},
		{name: "stored, and never started, by what Publish said", topic: testTopic, story: func(r *record) {
			r.publish(Published, true, 1).wait(testLong)
			r.ack(one, 1, 1)
		}, starves: true},
		{name: "nobody consumes", served: []string{}, story: func(r *record) {
			r.put(1)
			r.wait(testLong)
		}},
		{name: "nobody has a free slot", topic: testTopic, served: []string{one}, story: func(r *record) {
			run := r.begin(one, 9, 1)
			r.put(1)
			r.wait(testLong)
			r.end(run, Acked)
			r.ack(one, 1, 1)
		}},
		{name: "somebody has a free slot", topic: testTopic, story: func(r *record) {
			run := r.begin(one, 9, 1)
			r.put(1)
			r.wait(testLong)
			r.end(run, Acked)
			r.ack(one, 1, 1)
		}, starves: true},
		{name: "one slot of eight is free", served: []string{one}, story: func(r *record) {
			var runs []Event
			for n := range 7 {
				runs = append(runs, r.begin(one, 10+n, 1))
			}
			r.put(1)
			r.wait(testLong)
			for _, run := range runs {
				r.end(run, Acked)
			}
			r.ack(one, 1, 1)
		}, starves: true},
		{name: "no slot of eight is free", served: []string{one}, story: func(r *record) {
			var runs []Event
			for n := range 8 {
				runs = append(runs, r.begin(one, 10+n, 1))
			}
			r.put(1)
			r.wait(testLong)
			for _, run := range runs {
				r.end(run, Acked)
			}
			r.ack(one, 1, 1)
		}},
		{name: "a slot is free now and then", topic: testTopic, served: []string{one}, story: func(r *record) {
			for n := range 5 { // by entries that were published after it
				r.put(1 + n)
			}
			for n := range 4 {
				run := r.begin(one, 2+n, 1)
				r.wait(testBound * 6 / 10)
				r.end(run, Acked)
				r.wait(testBound * 6 / 10)
			}
			r.ack(one, 1, 2)
		}},
		{name: "read ahead by a busy process", topic: testTopic, story: func(r *record) {
			run := r.begin(one, 9, 1)
			r.put(1)
			r.deliver(one, 1, 1)
			r.wait(testLong)
			r.end(run, Acked)
			r.ack(one, 1, 1)
		}},
		{name: "read ahead by a process that is free", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.wait(testLong)
			r.ack(one, 1, 1)
		}, starves: true},
		{name: "it works its way through a backlog", served: []string{one}, story: func(r *record) {
			r.put(1, 2, 3, 4)
			for n := 1; n <= 4; n++ {
				r.wait(testBound*8/10).ack(one, n, 1)
			}
		}},
		{name: "what was stored later comes first", served: []string{one}, story: func(r *record) {
			r.put(1, 2, 3, 4)
			for _, n := range []int{2, 3, 4, 1} {
				r.wait(testBound*8/10).ack(one, n, 1)
			}
		}, starves: true},
		{name: "retries of one come before another, again and again", served: []string{one}, story: func(r *record) {
			r.put(1, 2)
			for count := range int64(4) {
				r.nack(r.begin(one, 1, count+1), 0)
				r.wait(testBound * 6 / 10)
			}
			r.ack(one, 1, 5)
			r.ack(one, 2, 1)
		}, starves: true},

		{name: "it works its way through what was left by another", story: func(r *record) {
			r.put(1, 2, 3, 4)
			for n := 1; n <= 4; n++ {
				r.deliver(one, n, 1)
			}
			r.process(Died, one).wait(testMinIdle*4/3 + 2*testInterval)
			for _, n := range []int{4, 3, 2, 1} {
				r.wait(testBound*8/10).ack(two, n, 2)
			}
		}},
		{name: "what was handled comes again before", served: []string{one}, story: func(r *record) {
			r.put(1, 2)
			r.ack(one, 1, 1)
			for count := range int64(3) {
				r.wait(testBound*8/10).ack(one, 1, count+2)
			}
			r.ack(one, 2, 1)
		}},

		{name: "the server is not well", story: func(r *record) {
			r.put(1)
			r.fault(Effect{Fault: "freeze"}, testLong).wait(testBound)
			r.ack(one, 1, 1)
		}},
		{name: "the server has been well for long", story: func(r *record) {
			r.put(1)
			r.fault(Effect{Fault: "freeze"}, testLong).wait(testRecovery + testBound*11/10)
			r.ack(one, 1, 1)
		}, starves: true},
		{name: "another topic's server is not well", story: func(r *record) {
			r.put(1)
			r.fault(Effect{Fault: "freeze", Ails: []string{testTopic}}, testLong)
			r.ack(one, 1, 1)
		}, starves: true},
		{name: "a fault of processes", story: func(r *record) {
			r.put(1)
			r.fault(Effect{Fault: "kill", Local: true}, testLong)
			r.ack(one, 1, 1)
		}, starves: true},
		{name: "Redis may have lost it", story: func(r *record) {
			r.put(1)
			r.fault(Effect{Fault: "flush", Loses: Everything}, 0).wait(testLong)
			r.ack(one, 1, 1)
		}},
		{name: "Redis may have lost what was before", story: func(r *record) {
			r.fault(Effect{Fault: "flush", Loses: Everything}, 0).wait(late)
			r.put(1)
			r.wait(testLong).ack(one, 1, 1)
		}, starves: true},

		{name: "the process is cut off", served: []string{one}, story: func(r *record) {
			r.put(1)
			r.fault(Effect{Fault: "partition", Isolates: []string{one}}, testLong)
			r.ack(one, 1, 1)
		}},
		{name: "another process is cut off", story: func(r *record) {
			r.put(1)
			r.fault(Effect{Fault: "partition", Isolates: []string{one}}, testLong)
			r.ack(one, 1, 1)
		}, starves: true},
		{name: "the process is stopped", served: []string{one}, story: func(r *record) {
			r.put(1)
			r.process(Stopped, one).wait(testLong).process(Continued, one).wait(testBound)
			r.ack(one, 1, 1)
		}},
		{name: "the process is stopped for good", served: []string{one}, story: func(r *record) {
			r.put(1)
			r.process(Stopped, one).wait(testLong)
		}},
		{name: "the process has just been started", served: []string{}, story: func(r *record) {
			r.put(1)
			r.wait(testLong).add(Event{Kind: Subscribed, Process: one, Life: 1, Topic: testWide}).wait(testBound)
			r.ack(one, 1, 1)
		}},
		{name: "the process closes", served: []string{one}, story: func(r *record) {
			r.put(1)
			r.process(Closing, one).wait(testBound).process(Ended, one).wait(testLong)
		}},

		{name: "a retry before its time", story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 1, 1), testLong)
			r.wait(testLong+testBound*9/10).ack(one, 1, 2)
		}},
		{name: "a retry that is late", story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 1, 1), testLong)
			r.wait(testLong+testBound*11/10).ack(one, 1, 2)
		}, starves: true},
		{name: "a retry waits for a process that is busy", topic: testTopic, story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 1, 1), 0)
			run := r.begin(one, 9, 1)
			r.wait(testLong)
			r.end(run, Acked)
			r.ack(one, 1, 2)
		}},
		{name: "another one waits for its retry, which was handled to success before", topic: testTopic, served: []string{one}, story: func(r *record) {
			r.put(9)
			r.ack(one, 9, 1)
			r.put(1)
			r.nack(r.begin(one, 9, 1), testLong)
			r.wait(testLong).ack(one, 9, 2)
			r.ack(one, 1, 1)
		}},
		{name: "another one waits for its retry, which is not in the stream any more", topic: testTopic, served: []string{one}, story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 9, 1), testLong)
			r.wait(testLong).ack(one, 1, 1)
		}},
		{name: "another one waited for its retry, and the topic waits on", topic: testTopic, served: []string{one}, story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 9, 1), testBound)
			r.wait(testBound+testBound*11/10).ack(one, 1, 1)
		}, starves: true},
		{name: "another one waits for its retry, beside free slots", served: []string{one}, story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 9, 1), testLong)
			r.wait(testLong).ack(one, 1, 1)
		}, starves: true},
		{name: "a retry that the server is asked for before its time", story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 1, 1), testLong)
			r.deliver(one, 1, 2)
			r.wait(testLong+testBound*9/10).ack(one, 1, 2)
		}},
		{name: "a retry is no suspect", story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 1, suspectFrom), 0)
			r.wait(testLong).ack(one, 1, suspectFrom+1)
		}, starves: true},
		{name: "another retry holds up the only slot", topic: testTopic, served: []string{one}, story: func(r *record) {
			r.put(1, 2)
			r.nack(r.begin(one, 1, 1), testLong)
			r.wait(testLong).ack(one, 1, 2)
			r.ack(one, 2, 1)
		}},
		{name: "another retry holds up one of many slots", served: []string{one}, story: func(r *record) {
			r.put(1, 2)
			r.nack(r.begin(one, 1, 1), testLong)
			r.wait(testLong).ack(one, 1, 2)
			r.ack(one, 2, 1)
		}, starves: true},
		{name: "a poison dies late", story: func(r *record) {
			r.putAs("poison-1", 1)
			r.nack(r.begin(one, 1, 1), 0)
			r.wait(testLong).add(Event{Kind: Dead, Process: one, Life: 1, Topic: testWide, ID: testID(1), UUID: "poison-1"})
		}, starves: true},
		{name: "a poison dies in time", story: func(r *record) {
			r.putAs("poison-1", 1)
			r.nack(r.begin(one, 1, 1), 0)
			r.add(Event{Kind: Dead, Process: one, Life: 1, Topic: testWide, ID: testID(1), UUID: "poison-1"}).wait(testLong)
		}},
		{name: "trimmed", story: func(r *record) {
			r.add(Event{Kind: Stored, Topic: testWide, ID: testID(1), UUID: testUUID(1)})
			r.add(Event{Kind: Trimmed, Topic: testWide, ID: testID(1), UUID: testUUID(1)}).wait(testLong)
		}},

		{name: "taken over in time", story: func(r *record) {
			r.put(1)
			r.begin(one, 1, 1)
			r.process(Died, one).wait(testMinIdle*4/3+2*testInterval+testBound*9/10).ack(two, 1, 2)
		}},
		{name: "taken over late", story: func(r *record) {
			r.put(1)
			r.begin(one, 1, 1)
			r.process(Died, one).wait(2*(testMinIdle*4/3+2*testInterval)+testBound*11/10).ack(two, 1, 2)
		}, starves: true},
		{name: "read ahead, and taken over late", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Died, one).wait(testLong).ack(two, 1, 2)
		}, starves: true},
		{name: "a retry that is taken over late", story: func(r *record) {
			r.put(1)
			r.nack(r.begin(one, 1, 1), time.Hour)
			r.process(Died, one).wait(testLong).ack(two, 1, 2)
		}, starves: true},
		{name: "taken over from a process that is away", story: func(r *record) {
			r.put(1)
			run := r.begin(one, 1, 1)
			r.process(Stopped, one).wait(3*time.Second).ack(two, 1, 2)
			r.process(Continued, one).end(run, Lost)
		}},
		{name: "read ahead by a process that is away, and not taken over", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Stopped, one).wait(testLong).ack(two, 1, 2)
			r.process(Continued, one)
		}, starves: true},
		{name: "read ahead by a process that is back, and not started", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Stopped, one).wait(3*time.Second).process(Continued, one)
			r.wait(2*testLong).ack(one, 1, 1)
		}, starves: true},
		{name: "read ahead by a process that is back, and taken in time", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Stopped, one).wait(3*time.Second).process(Continued, one)
			r.wait(testRecovery+testMinIdle*4/3+2*testInterval+testBound*9/10).ack(one, 1, 1)
		}},
		{name: "read ahead by a process that was not away for long", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Stopped, one).wait(testMinIdle/2).process(Continued, one)
			r.wait(testRecovery+testBound*11/10).ack(one, 1, 1)
		}, starves: true},
		{name: "taken over, and not started", story: func(r *record) {
			r.put(1)
			run := r.begin(one, 1, 1)
			r.process(Stopped, one).wait(3 * time.Second)
			r.deliver(two, 1, 2)
			r.process(Continued, one).end(run, Lost)
			r.wait(testBound*11/10).ack(two, 1, 2)
		}, starves: true},
		{name: "claimed for the second time, and not started", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, suspectFrom-1)
			r.wait(testLong).ack(one, 1, suspectFrom)
		}, starves: true},
		{name: "its handler returned just after it was left at CloseTimeout", story: func(r *record) {
			r.put(1)
			run := r.begin(one, 1, 1)
			r.process(Closing, one).wait(4*time.Second+1).end(run, Closed).process(Ended, one).wait(testMinIdle*4/3+testBound*9/10).ack(two, 1, 1)
		}},
		{name: "its handler returned in time", story: func(r *record) {
			r.put(1)
			run := r.begin(one, 1, 1)
			r.process(Closing, one).wait(3*time.Second).end(run, Closed).process(Ended, one).wait(testMinIdle*4/3+testBound*11/10).ack(two, 1, 1)
		}, starves: true},
		{name: "released, and taken in time", story: func(r *record) {
			r.put(1)
			r.end(r.begin(one, 1, 1), Closed)
			r.process(Closing, one).process(Ended, one).wait(2*testInterval+testBound*9/10).ack(two, 1, 1)
		}},
		{name: "not released, since the server was not well", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Closing, one).fault(Effect{Fault: "freeze"}, 0).process(Ended, one)
			r.wait(testRecovery+testMinIdle*4/3+2*testInterval+testBound*9/10).ack(two, 1, 2)
		}},
		{name: "not released, since it may not have arrived", story: func(r *record) {
			r.put(1)
			r.process(Stopped, one).deliver(one, 1, 1)
			r.wait(testMinIdle/2).process(Continued, one).process(Closing, one).process(Ended, one)
			r.wait(testMinIdle*4/3+2*testInterval+testBound*9/10).ack(two, 1, 2)
		}},
		{name: "not released, since it may not have arrived in an outage that was just over", story: func(r *record) {
			r.put(1)
			r.add(Event{Kind: Injected, Strike: &Effect{Number: 7, Fault: "freeze"}}).deliver(one, 1, 1)
			r.add(Event{Kind: Healed, Strike: &Effect{Number: 7, Fault: "freeze"}})
			r.wait(testRecovery/2).process(Closing, one).process(Ended, one)
			r.wait(testMinIdle*4/3+2*testInterval+testBound*9/10).ack(two, 1, 2)
		}},
		{name: "released late, though there was time to ask for what had not arrived", story: func(r *record) {
			r.put(1)
			r.process(Stopped, one).deliver(one, 1, 1)
			r.wait(testMinIdle/2).process(Continued, one).wait(testRecovery*11/10).process(Closing, one).process(Ended, one)
			r.wait(4*testInterval+testBound*11/10).ack(two, 1, 2)
		}, starves: true},
		{name: "released late, though it came before the absence", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Stopped, one).wait(testMinIdle/2).process(Continued, one).process(Closing, one).process(Ended, one)
			r.wait(4*testInterval+testBound*11/10).ack(two, 1, 2)
		}, starves: true},
		{name: "released by one who closes for long", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Closing, one).wait(testBound*8/10).process(Ended, one).wait(2*testInterval+testBound*9/10).ack(two, 1, 1)
		}},
		{name: "released, and taken late", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Closing, one).process(Ended, one).wait(4*testInterval+testBound*11/10).ack(two, 1, 1)
		}, starves: true},
		{name: "not released, since it was killed", story: func(r *record) {
			r.put(1)
			r.deliver(one, 1, 1)
			r.process(Closing, one).add(Event{Kind: Ended, Process: one, Life: 1, Error: "killed"})
			r.wait(4*testInterval+testBound*11/10).ack(two, 1, 2)
		}},
		{name: "not released in time, since the handler went on", story: func(r *record) {
			r.put(1)
			r.begin(one, 1, 1)
			r.process(Closing, one).process(Ended, one)
			r.wait(4*testInterval+testBound*11/10).ack(two, 1, 2)
		}},

		{name: "a suspect waits longer", story: func(r *record) {
			r.put(1)
			r.begin(one, 1, 2)
			r.process(Died, one).wait(testLong).ack(two, 1, 3)
		}},
		{name: "a suspect waits for too long", story: func(r *record) {
			r.put(1)
			r.begin(one, 1, 2)
			r.process(Died, one).wait(testSuspectBound+testLong).ack(two, 1, 3)
		}, starves: true},
		{name: "a suspect waits for others", story: func(r *record) {
			r.put(1)
			r.begin(one, 1, 2)
			r.process(Died, one)
			for n := range 2 {
				run := r.begin(two, 10+n, 3)
				r.wait(testSuspectBound * 11 / 10)
				r.end(run, Acked)
			}
			r.ack(two, 1, 3)
		}},
		{name: "an ordinary one waits while one runs alone", story: func(r *record) {
			run := r.begin(two, 9, testRetries+2)
			r.put(1)
			r.wait(testLong).end(run, Acked)
			r.ack(two, 1, 1)
		}},
		{name: "an ordinary one waits while one waits to run alone", story: func(r *record) {
			r.put(9)
			r.begin(one, 9, testRetries+1)
			r.process(Died, one)
			r.put(1)
			r.wait(testLong).ack(two, 9, testRetries+2)
			r.ack(two, 1, 1)
		}},
		{name: "an ordinary one waits while a suspect runs", story: func(r *record) {
			run := r.begin(two, 9, suspectFrom)
			r.put(1)
			r.wait(testLong).end(run, Acked)
			r.ack(two, 1, 1)
		}, starves: true},
		{name: "a broken one", story: func(r *record) {
			r.putAs("broken-1", 1)
			r.wait(testLong).add(Event{Kind: Dead, Process: one, Life: 1, Topic: testWide, ID: testID(1), UUID: "broken-1"})
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			served := test.served
			if served == nil {
				served = []string{one, two}
			}
			r := newServed(served...)
			r.topic = cmp.Or(test.topic, testWide)
			test.story(r)
			v := r.checkBy(progressRules())
			assert.Equal(t, test.starves, slices.Contains(v.Broken(), RuleProgress), "%v", v.Violations)
			rules := progressRules()
			rules.Progress = nil
			assert.NotContains(t, r.checkBy(rules).Broken(), RuleProgress, "it is not stated")
		})
	}
}

// TestProgressWithoutDeliveries: where nobody says who holds an entry, any process may.
func TestProgressWithoutDeliveries(t *testing.T) {
	tests := []struct {
		name    string
		story   func(r *record)
		starves bool
	}{
		{"all are free", func(r *record) {
			r.publish(Published, true, 1).wait(testLong).handle("consumer-1", 1, 1, Acked)
		}, true},
		{"one is busy, and may have read it ahead", func(r *record) {
			run := r.publish(Published, true, 2).start("consumer-1", 2, 1)
			r.publish(Published, true, 1).wait(testLong).end(run, Acked).handle("consumer-2", 1, 1, Acked)
		}, false},
		{"one has just ended, and may have read it ahead", func(r *record) {
			r.publish(Published, true, 1).wait(testBound*8/10).process(Died, "consumer-1").wait(testBound)
			r.handle("consumer-2", 1, 2, Acked)
		}, false},
		{"one has ended long ago", func(r *record) {
			r.process(Died, "consumer-1").wait(testLong)
			r.publish(Published, true, 1).wait(testLong).handle("consumer-2", 1, 1, Acked)
		}, true},
		{"one is away, and may have read it ahead", func(r *record) {
			r.publish(Published, true, 1).process(Stopped, "consumer-1").wait(testBound).process(Continued, "consumer-1")
			r.wait(testBound).handle("consumer-1", 1, 1, Acked)
		}, false},
		{"one is away for long", func(r *record) {
			r.publish(Published, true, 1).process(Stopped, "consumer-1").wait(testLong).process(Continued, "consumer-1")
			r.handle("consumer-2", 1, 2, Acked)
		}, true},
		{"two have ended since, and may have begun it", func(r *record) {
			r.publish(Published, true, 1).process(Died, "consumer-1")
			r.add(Event{Kind: Spawned, Process: "consumer-1", Life: 2})
			r.add(Event{Kind: Subscribed, Process: "consumer-1", Life: 2, Topic: testTopic})
			r.add(Event{Kind: Died, Process: "consumer-1", Life: 2}).wait(testLong).handle("consumer-2", 1, 3, Acked)
		}, false},
		{"of unknown outcome", func(r *record) {
			r.publish(Unknown, true, 1).wait(testLong).handle("consumer-1", 1, 1, Acked)
		}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := newServed("consumer-1", "consumer-2")
			test.story(r)
			v := r.checkBy(progressRules())
			assert.Equal(t, test.starves, slices.Contains(v.Broken(), RuleProgress), "%v", v.Violations)
		})
	}
}

// TestProgressWords: a violation says what waited since when, and who could have taken it.
func TestProgressWords(t *testing.T) {
	r := newServed("consumer-1")
	r.topic = testWide
	r.put(1)
	r.wait(testLong).ack("consumer-1", 1, 1)
	v := r.checkBy(progressRules())
	assert.Len(t, v.Violations, 1)
	assert.Equal(t, "progress: mails 1800000000000-1 plain-1: stored, and due since 1m0.005s, it was not started from 1m0.005s to "+
		"1m15.006s, though Redis was well and consumer-1/1 had a free slot", strings.TrimSpace(v.Violations[0].String()))
}

// TestProgressKeys: an entry waits while others of its key come first, and these must begin in time. Of three keys, 1 and 5 have
// the same; 3 and 7 have none.
func TestProgressKeys(t *testing.T) {
	const one = "consumer-1"
	tests := []struct {
		name   string
		story  func(r *record)
		starve string // the entry that waits for too long
	}{
		{"behind another that is handled", func(r *record) {
			r.put(1, 5)
			first := r.begin(one, 1, 1)
			r.deliver(one, 5, 1)
			r.wait(testLong).end(first, Acked)
			r.ack(one, 5, 1)
		}, ""},
		{"behind a retry", func(r *record) {
			r.put(1, 5)
			first := r.begin(one, 1, 1)
			r.deliver(one, 5, 1)
			r.nack(first, testLong)
			r.wait(testLong).ack(one, 1, 2)
			r.ack(one, 5, 1)
		}, ""},
		{"behind another that is late", func(r *record) {
			r.put(1, 5)
			r.deliver(one, 1, 1)
			r.deliver(one, 5, 1)
			r.wait(testLong).ack(one, 1, 1)
			r.ack(one, 5, 1)
		}, testID(1)},
		{"both late", func(r *record) {
			r.put(1, 5)
			r.deliver(one, 1, 1)
			r.deliver(one, 5, 1)
			r.wait(testLong).ack(one, 1, 1)
			r.wait(testLong).ack(one, 5, 1)
		}, testID(1) + testID(5)},
		{"behind one that was settled", func(r *record) {
			r.put(1, 5)
			r.deliver(one, 5, 1)
			r.ack(one, 1, 1)
			r.wait(testLong).ack(one, 5, 1)
		}, testID(5)},
		{"beside another key", func(r *record) {
			r.put(1, 6)
			first := r.begin(one, 1, 1)
			r.deliver(one, 6, 1)
			r.wait(testLong).ack(one, 6, 1)
			r.end(first, Acked)
		}, testID(6)},
		{"without a key", func(r *record) {
			r.put(3, 7)
			first := r.begin(one, 3, 1)
			r.deliver(one, 7, 1)
			r.wait(testLong).ack(one, 7, 1)
			r.end(first, Acked)
		}, testID(7)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := newServed(one)
			r.topic = testWide
			test.story(r)
			rules := progressRules()
			rules.Topics[testWide] = Topic{Name: testWide, MaxConcurrency: 8, Keys: 3}
			var starved string
			for _, v := range r.checkBy(rules).Violations {
				if v.Rule == RuleProgress {
					starved += v.ID
				}
			}
			assert.Equal(t, test.starve, starved)
		})
	}
}

// TestKeys: within a subscription the messages of a key are handled one by one, in order, and what failed comes first.
func TestKeys(t *testing.T) {
	const one, two = "consumer-1", "consumer-2"
	tests := []struct {
		name  string
		story func(r *record)
		rule  string
	}{
		{"in order", func(r *record) { r.ack(one, 1, 1); r.ack(one, 5, 1) }, ""},
		{"out of order", func(r *record) { r.ack(one, 5, 1); r.ack(one, 1, 1) }, RuleOrder},
		{"at once", func(r *record) { first := r.begin(one, 1, 1); r.ack(one, 5, 1); r.end(first, Acked) }, RuleKey},
		{"in two processes", func(r *record) { first := r.begin(one, 1, 1); r.ack(two, 5, 1); r.end(first, Acked) }, ""},
		{"overtaken", func(r *record) {
			r.nack(r.begin(one, 1, 1), time.Second)
			r.ack(one, 5, 1)
			r.wait(time.Second).ack(one, 1, 2)
		}, RuleRetryOrder},
		{"beside another key", func(r *record) {
			r.nack(r.begin(one, 5, 1), time.Second)
			r.ack(one, 6, 1)
			r.wait(time.Second).ack(one, 5, 2)
			r.ack(one, 4, 1)
		}, ""},
		{"without a key", func(r *record) { last := r.begin(one, 7, 1); r.ack(one, 3, 1); r.end(last, Acked) }, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := newServed(one, two)
			r.topic = testWide
			test.story(r)
			rules := progressRules()
			rules.Progress = nil
			rules.Topics[testWide] = Topic{Name: testWide, MaxConcurrency: 8, Keys: 3}
			var want []string
			if test.rule != "" {
				want = []string{test.rule}
			}
			assert.Equal(t, want, r.checkBy(rules).Broken())
		})
	}
}

func TestCloseLate(t *testing.T) {
	const process, most = "consumer-1", 5 * time.Second
	tests := []struct {
		name  string
		story func(r *record)
		late  bool
	}{
		{"in time", func(r *record) { r.process(Closing, process).wait(most*9/10).process(Ended, process) }, false},
		{"late", func(r *record) { r.process(Closing, process).wait(most).process(Ended, process) }, true},
		{"never", func(r *record) { r.process(Closing, process) }, true},
		{"stopped meanwhile", func(r *record) {
			r.process(Closing, process).process(Stopped, process).wait(most).process(Continued, process).process(Ended, process)
		}, false},
		{"cut off meanwhile", func(r *record) {
			r.process(Closing, process).fault(Effect{Isolates: []string{process}}, most).process(Ended, process)
		}, true},
		{"died meanwhile", func(r *record) { r.process(Closing, process).wait(most).process(Died, process) }, false},
		{"not asked to", func(r *record) { r.wait(most).process(Ended, process) }, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := newRecord()
			test.story(r)
			v := r.checkBy(progressRules())
			assert.Equal(t, test.late, slices.Contains(v.Broken(), RuleCloseLate), "%v", v.Violations)
			assert.NotContains(t, r.check().Broken(), RuleCloseLate, "it is not stated")
		})
	}
}
