package main

import (
	"fmt"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

const group = "chaos"

// topics are all the combinations of order and names.
var topics = []rules.Topic{
	{Name: "orders", MaxConcurrency: 1},
	{Name: "payments", MaxConcurrency: 1, Named: true},
	{Name: "mails", MaxConcurrency: 8},
	{Name: "events", MaxConcurrency: 4, Named: true},
}

// Settings is what a run is made of. The same settings make the same faults.
type Settings struct {
	Seed       uint64
	For        time.Duration
	Deployment string
	Faults     []string
	Consumers  int
	Producers  int
	Rate       float64 // calls of Publish a second, of each producer

	ClaimMinIdle  time.Duration
	ClaimInterval time.Duration
	MaxRetries    int
	// Gap is the longest time from the end of a fault to the next one.
	Gap time.Duration
	// Overlap is how many faults may be under way at once, each as if it were alone.
	Overlap int
	// Repeat: a call of unknown outcome is made again until it succeeds, also by the next process in the producer's place.
	Repeat bool
	// Idempotence is PublisherConfig's.
	Idempotence bool
	// SampleEvery is how often each process says how large it is; 0: never.
	SampleEvery time.Duration
}

func defaultSettings() Settings {
	return Settings{
		Seed: 1, For: 2 * time.Minute, Deployment: single, Consumers: 3, Producers: 2, Rate: 8,
		ClaimMinIdle: 2 * time.Second, ClaimInterval: 200 * time.Millisecond, MaxRetries: 4, Gap: 4 * time.Second, Overlap: 1,
	}
}

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
	case s.Overlap < 1:
		return fmt.Errorf("-overlap is %d; it must be 1 or more", s.Overlap)
	}
	return nil
}

// rules returns what the checker must know. Progress and CloseBound are not stated: on a busy machine, whose processes wait for
// their turn, nothing can be said of how long something takes that would not fail runs in which all was well. The simulation
// states them.
func (s Settings) rules() rules.Rules {
	all := make(map[string]rules.Topic)
	for _, t := range topics {
		all[t.Name] = t
	}
	return rules.Rules{ClaimMinIdle: s.ClaimMinIdle, ClaimInterval: s.ClaimInterval, MaxRetries: s.MaxRetries, Topics: all}
}
