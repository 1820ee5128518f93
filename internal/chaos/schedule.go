package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// A Strike is one fault at its time.
type Strike struct {
	Number int
	Lane   int // strikes of one lane come one after the other
	Fault  *Fault
	Offset time.Duration // after the start of the load
	Hold   time.Duration // from the injection to the healing
	Dice   uint64        // whom it strikes
}

// pick returns the strike's choice among things.
func pick[T any](s Strike, things []T) T { return things[s.Dice%uint64(len(things))] }

// schedule depends only on the settings. Every fault comes once before one is repeated.
func schedule(s Settings, faults []*Fault) []Strike {
	if len(faults) == 0 {
		return nil
	}
	dice := rand.New(rand.NewPCG(s.Seed, hash("schedule", 0)))
	var strikes []Strike
	var deck []*Fault
	free := slices.Repeat([]time.Duration{s.ClaimMinIdle}, max(s.Overlap, 1)) // when each lane is free
	var serversFree time.Duration
	for {
		offset := slices.Min(free)
		if offset >= s.For {
			return strikes
		}
		lane := slices.Index(free, offset)
		if len(deck) == 0 {
			deck = slices.Clone(faults)
			dice.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		if deck[0].servers {
			offset = max(offset, serversFree)
		}
		strike := Strike{
			Number: len(strikes) + 1, Lane: lane, Fault: deck[0], Offset: offset, Hold: deck[0].hold(s, dice), Dice: dice.Uint64(),
		}
		deck = deck[1:]
		if offset < s.For {
			strikes = append(strikes, strike)
		}
		free[lane] = offset + strike.Fault.takes + strike.Hold
		if strike.Fault.servers {
			serversFree = free[lane]
		}
		free[lane] += s.Gap/4 + time.Duration(dice.Int64N(int64(s.Gap)))
	}
}

// chooseFaults returns the faults with these names, or all that this deployment can have.
func chooseFaults(names []string, deployment string) ([]*Fault, error) {
	possible := slices.DeleteFunc(allFaults(), func(f *Fault) bool {
		return f.on != nil && !slices.Contains(f.on, deployment)
	})
	switch {
	case slices.Equal(names, []string{"all"}):
		return possible, nil
	case slices.Equal(names, []string{"none"}):
		return nil, nil
	}
	var chosen []*Fault
	for _, name := range names {
		i := slices.IndexFunc(possible, func(f *Fault) bool { return f.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("-faults: there is no %q for %s; there are: %s", name, deployment, strings.Join(faultNames(possible), ", "))
		}
		chosen = append(chosen, possible[i])
	}
	return chosen, nil
}

func faultNames(faults []*Fault) []string {
	var names []string
	for _, f := range faults {
		names = append(names, f.Name)
	}
	return names
}
