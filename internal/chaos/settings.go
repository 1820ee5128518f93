package main

import (
	"fmt"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

const group = "chaos"

// topics are all the combinations of order and names, and one with ordering keys.
var topics = []rules.Topic{
	{Name: "orders", MaxConcurrency: 1},
	{Name: "payments", MaxConcurrency: 1, Named: true},
	{Name: "mails", MaxConcurrency: 8},
	{Name: "events", MaxConcurrency: 4, Named: true, Keys: 20},
}

// clockTolerance is how far the machine's clock may be from where it was, and has gone, when the run began.
const clockTolerance = 50 * time.Millisecond

// Settings describe a run. The same settings give the same faults.
type Settings struct {
	Seed       uint64
	For        time.Duration
	Deployment string
	Faults     []string
	Consumers  int
	Producers  int
	Rate       float64       // calls of Publish a second, of each producer
	MaxDelay   time.Duration // of delayed messages; 0: none is delayed

	ClaimMinIdle  time.Duration
	ClaimInterval time.Duration
	MaxRetries    int
	// Gap is the longest time from the end of a fault to the next one.
	Gap time.Duration
	// Overlap is how many faults may be under way at once.
	Overlap int
	// Repeat: a call of unknown outcome is repeated until it succeeds, also by the producer's successor.
	Repeat bool
	// Idempotence is PublisherConfig's.
	Idempotence bool
	// SampleEvery is how often each process logs its size; 0: never.
	SampleEvery time.Duration
}

func defaultSettings() Settings {
	return Settings{
		Seed: 1, For: 2 * time.Minute, Deployment: single, Consumers: 3, Producers: 2, Rate: 8, MaxDelay: 30 * time.Second,
		ClaimMinIdle: 2 * time.Second, ClaimInterval: 200 * time.Millisecond, MaxRetries: 4, Gap: 4 * time.Second, Overlap: 1,
	}
}

// retention is what the consumers keep: in a third of the runs, by the seed, little more than what is not acked. (Not where
// calls are repeated: the rule about those counts what is in the stream.)
func (s Settings) retention() goxstreams.Retention {
	if s.Seed%3 != 0 || s.Repeat {
		return goxstreams.Retention{}
	}
	return goxstreams.Retention{KeepLast: 20}
}

func (s Settings) trims() bool { return s.retention().KeepLast > 0 }

func (s Settings) validate() error {
	switch {
	case s.For <= 0:
		return fmt.Errorf("-for is %v; it must be more than 0", s.For)
	case s.Consumers < 1:
		return fmt.Errorf("-consumers is %d; it must be 1 or more", s.Consumers)
	case s.Producers < 1:
		return fmt.Errorf("-producers is %d; it must be 1 or more", s.Producers)
	case s.Rate <= 0:
		return fmt.Errorf("-rate is %v; it must be more than 0", s.Rate)
	case s.MaxDelay < 0 || s.MaxDelay > patience/2:
		return fmt.Errorf("-delay is %v; it must be from 0 to %v", s.MaxDelay, patience/2)
	case s.Overlap < 1:
		return fmt.Errorf("-overlap is %d; it must be 1 or more", s.Overlap)
	}
	return nil
}

// rules returns what the checker must know. Progress and CloseBound are not set: on a busy machine, whose processes wait for the
// CPU, any bound on a duration would fail runs in which nothing was wrong. The simulation sets them.
func (s Settings) rules() rules.Rules {
	all := make(map[string]rules.Topic)
	for _, t := range topics {
		all[t.Name] = t
	}
	return rules.Rules{
		ClaimMinIdle: s.ClaimMinIdle, ClaimInterval: s.ClaimInterval, MaxRetries: s.MaxRetries, Topics: all,
		// A producer that is stopped between its log and its call publishes a message that was created earlier. Such a one is due
		// by its "until", which has whole seconds.
		Delayed: &rules.Delayed{Tolerance: time.Second + clockTolerance},
	}
}
