package rules

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// A handler that begins in a pause breaks a rule, unless its process could not know of the pause, or Redis has lost it.
func TestPaused(t *testing.T) {
	const bound, recovery = 1500 * time.Millisecond, 20 * time.Second
	at := func(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
	fault := func(from, to float64, e Effect) []Event {
		e.Number = 1
		return []Event{{Mono: at(from), Kind: Injected, Strike: &e}, {Mono: at(to), Kind: Healed, Strike: &e}}
	}
	for name, tt := range map[string]struct {
		started float64
		more    []Event
		broken  bool
	}{
		"before":                  {started: 5},
		"soon":                    {started: 11.4},
		"too late":                {started: 11.6, broken: true},
		"much too late":           {started: 59, broken: true},
		"after Resume":            {started: 60.1},
		"stopped":                 {started: 35, more: []Event{{Mono: at(11), Kind: Stopped, Process: "p", Life: 1}, {Mono: at(20), Kind: Continued, Process: "p", Life: 1}}},
		"stopped long ago":        {started: 45, more: []Event{{Mono: at(11), Kind: Stopped, Process: "p", Life: 1}, {Mono: at(20), Kind: Continued, Process: "p", Life: 1}}, broken: true},
		"stopped when it knew":    {started: 35, more: []Event{{Mono: at(12), Kind: Stopped, Process: "p", Life: 1}, {Mono: at(20), Kind: Continued, Process: "p", Life: 1}}, broken: true},
		"another is cut off":      {started: 35, more: fault(11, 20, Effect{Isolates: []string{"q"}}), broken: true},
		"cut off":                 {started: 35, more: fault(11, 20, Effect{Isolates: []string{"p"}})},
		"frozen":                  {started: 35, more: fault(11, 20, Effect{})},
		"the pause itself":        {started: 35, more: fault(9, 60, Effect{Ails: []string{testTopic}, Pauses: true}), broken: true},
		"lost":                    {started: 35, more: fault(20, 20, Effect{Loses: Everything, Destroys: true})},
		"lost by a failover":      {started: 35, more: fault(9, 11, Effect{Loses: Everything})},
		"before it was lost":      {started: 15, more: fault(20, 20, Effect{Loses: Everything, Destroys: true}), broken: true},
		"only the stream is lost": {started: 59, more: fault(20, 20, Effect{Loses: []string{testTopic}, Stream: true}), broken: true},
	} {
		t.Run(name, func(t *testing.T) {
			events := append([]Event{
				{Mono: 1, Kind: Spawned, Process: "p", Life: 1},
				{Mono: at(10), Kind: Paused, Topic: testTopic},
				{Mono: at(tt.started), Kind: Started, Process: "p", Life: 1, Topic: testTopic, ID: "1-1", UUID: "plain-1", Run: 1, Count: 1},
				{Mono: at(60), Kind: Resuming, Topic: testTopic},
				{Mono: at(100), Kind: Settled},
			}, tt.more...)
			verdict := Check(Sift(Rules{PauseBound: bound, PauseRecovery: recovery, ClaimMinIdle: 3 * time.Second, Topics: map[string]Topic{testTopic: {Name: testTopic, MaxConcurrency: 1}}}, events, nil))
			broken := false
			for _, v := range verdict.Violations {
				broken = broken || v.Rule == RulePaused
			}
			assert.Equal(t, tt.broken, broken, "%v", verdict.Violations)
		})
	}
}
