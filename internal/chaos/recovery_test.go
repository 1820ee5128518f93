package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// TestRecovery: a fault's recovery ends when each consumer has received something; the time of other faults does not count.
func TestRecovery(t *testing.T) {
	var events []rules.Event
	runs := int64(0)
	at := func(seconds int, e rules.Event) {
		e.Mono, e.Life = time.Duration(seconds)*time.Second, 1
		events = append(events, e)
	}
	fault := func(number, from, to int) {
		at(from, rules.Event{Kind: rules.Injected, Process: "runner", Strike: &rules.Effect{Number: number, Fault: "client-kill"}})
		at(to, rules.Event{Kind: rules.Healed, Process: "runner", Strike: &rules.Effect{Number: number, Fault: "client-kill"}})
	}
	handle := func(seconds int, process, uuid string) {
		runs++
		at(seconds, rules.Event{Kind: rules.Publishing, Process: "producer-1", Topic: "orders", UUIDs: []string{uuid}})
		at(seconds, rules.Event{Kind: rules.Published, Process: "producer-1", Topic: "orders", UUIDs: []string{uuid}})
		e := rules.Event{Kind: rules.Started, Process: process, Topic: "orders", ID: uuid, UUID: uuid, Run: runs, Count: 1}
		at(seconds, e)
		e.Kind = rules.Acked
		at(seconds, e)
	}
	for _, process := range []string{"consumer-1", "consumer-2", "producer-1"} {
		at(0, rules.Event{Kind: rules.Spawned, Process: process})
	}
	fault(1, 1, 2)
	handle(3, "consumer-1", "plain-1")
	fault(2, 4, 64)
	handle(66, "consumer-2", "plain-2")
	handle(66, "consumer-1", "plain-3")
	at(126, rules.Event{Kind: rules.Settled, Process: "runner"})

	e := rules.Sift(rules.Rules{ClaimMinIdle: 2 * time.Second}, events, nil)
	assert.Equal(t, 4*time.Second, recovery(e, e.Faults[0]), "from 2 to 4 and from 64 to 66")
	assert.Equal(t, 2*time.Second, recovery(e, e.Faults[1]))
}
