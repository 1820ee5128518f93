package sim

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// A message is lost with its group if its holder ends before it can have noticed that, which
// takes it half of ClaimMinIdle in which it reaches a healthy server.
func TestEndedSoon(t *testing.T) {
	const minIdle = 20 * time.Second
	freeze := &rules.Effect{Number: 2, Fault: "freeze"}
	stop := &rules.Effect{Number: 2, Fault: "stop", Local: true}
	for _, test := range []struct {
		name string
		then []rules.Event // after the loss, with the time since then
		want bool
	}{
		{"Soon", []rules.Event{{Mono: 9 * time.Second, Kind: rules.Died}}, true},
		{"Later", []rules.Event{{Mono: 11 * time.Second, Kind: rules.Died}}, false},
		{"SoonInOrder", []rules.Event{{Mono: 9 * time.Second, Kind: rules.Closing}, {Mono: 11 * time.Second, Kind: rules.Ended}}, true},
		{"AnotherHolder", []rules.Event{{Mono: time.Second, Kind: rules.Died, Process: "other"}}, false},
		{"InAnOutage", []rules.Event{
			{Mono: time.Second, Kind: rules.Injected, Strike: freeze}, {Mono: time.Minute, Kind: rules.Died},
		}, true},
		{"AfterAnOutage", []rules.Event{
			{Mono: time.Second, Kind: rules.Injected, Strike: freeze}, {Mono: 30 * time.Second, Kind: rules.Healed, Strike: freeze},
			{Mono: time.Minute, Kind: rules.Died},
		}, false},
		{"SoonAfterAnOutage", []rules.Event{
			{Mono: time.Second, Kind: rules.Injected, Strike: freeze}, {Mono: 30 * time.Second, Kind: rules.Healed, Strike: freeze},
			{Mono: 38 * time.Second, Kind: rules.Died},
		}, true},
		{"WhileOthersWereStopped", []rules.Event{
			{Mono: time.Second, Kind: rules.Injected, Strike: stop}, {Mono: time.Second, Kind: rules.Stopped, Process: "other"},
			{Mono: time.Minute, Kind: rules.Died},
		}, false},
		{"WhileItWasStopped", []rules.Event{
			{Mono: time.Second, Kind: rules.Injected, Strike: stop}, {Mono: time.Second, Kind: rules.Stopped},
			{Mono: time.Minute, Kind: rules.Died},
		}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			const loss = time.Minute
			loses := &rules.Effect{Number: 1, Fault: "destroy group", Loses: []string{"orders"}, Group: true}
			events := []rules.Event{
				{Mono: 1, Kind: rules.Spawned, Process: "holder", Life: 1}, {Mono: 1, Kind: rules.Spawned, Process: "other", Life: 1},
				{Mono: 2, Kind: rules.Started, Process: "holder", Life: 1, Topic: "orders", ID: "1-1", UUID: "flaky-1", Run: 1},
				{Mono: loss, Kind: rules.Injected, Strike: loses}, {Mono: loss, Kind: rules.Healed, Strike: loses},
			}
			for _, e := range test.then {
				if e.Mono += loss; e.Process == "" && e.Strike == nil {
					e.Process = "holder"
				}
				e.Life = 1
				events = append(events, e)
			}
			evidence := rules.Sift(rules.Rules{ClaimMinIdle: minIdle}, events, nil)
			require.Equal(t, test.want, endedSoon(evidence, rules.Violation{Rule: rules.RuleLost, Topic: "orders", ID: "1-1", UUID: "flaky-1"}))
		})
	}
}
