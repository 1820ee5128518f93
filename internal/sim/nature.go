package sim

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// The natures of messages, in addition to those that package rules must know. These
// messages succeed in the end. A UUID begins with the nature.
const (
	snoozing = "snoozing" // returns Snooze at first
	hanging  = "hanging"  // takes very long, unless its context ends
	panicky  = "panicky"  // panics at first
	killer   = "killer"   // ends its process at first
	closer   = "closer"   // closes its Subscriber, once
	steady   = "steady"   // takes a second or two, like all messages of its schedule
)

// A task is a message's payload: what its handler does. A count is the last delivery
// that does so.
type task struct {
	Work    time.Duration // before anything else
	Hang    bool          // Work does not end by itself while there is load
	Fails   int64
	Panics  int64
	Kills   int64
	Snoozes int // times
	Close   bool
}

// always is above any limit of deliveries.
const always = 1 << 30

// limits are what all groups of a schedule allow.
type limits struct {
	fails   int64 // how often an innocent message may fail
	minIdle time.Duration
	poison  bool // messages that always fail are dead-lettered
	deadly  bool // so are those that always end their process, soon enough
}

// drawNature returns a nature that all groups can finish.
func drawNature(dice *rand.Rand, trouble float64, l limits) string {
	if !chance(dice, trouble) {
		return rules.Plain
	}
	switch n := dice.IntN(100); {
	case n < 30 && l.fails > 0:
		return rules.Flaky
	case n < 40 && l.poison:
		return rules.Poison
	case n < 52:
		return rules.Broken
	case n < 62:
		return rules.Slow
	case n < 74:
		return snoozing
	case n < 84 && l.fails > 0:
		return panicky
	case n < 90:
		return hanging
	case n < 93 && l.fails > 0:
		return killer
	case n < 95 && l.deadly:
		return rules.Deadly
	case n < 97:
		return closer
	}
	return rules.Plain
}

// makeTask returns the same task for the same UUID.
func makeTask(seed uint64, uuid string, l limits) task {
	dice := newDice(seed, uuid, 0)
	t := task{Work: between(dice, 0, 40*time.Millisecond)}
	if chance(dice, 0.05) {
		t.Work *= 20
	}
	first := func() int64 { return 1 + dice.Int64N(max(l.fails, 1)) }
	switch rules.Nature(uuid) {
	case rules.Flaky:
		t.Fails = first()
	case panicky:
		t.Panics = first()
	case killer:
		t.Kills = min(first(), 2)
	case rules.Poison:
		t.Fails = always
	case rules.Deadly:
		t.Kills = always
	case rules.Slow:
		t.Work = between(dice, l.minIdle, 3*l.minIdle)
	case snoozing:
		t.Snoozes = 1 + dice.IntN(3)
	case hanging:
		t.Hang, t.Work = true, between(dice, 2*l.minIdle, 6*l.minIdle)
	case closer:
		t.Close = true
	case steady:
		t.Work = between(dice, time.Second, 3*time.Second)
	}
	return t
}

func makeMessage(seed uint64, uuid string, l limits) *message.Message {
	payload, err := json.Marshal(makeTask(seed, uuid, l))
	if err != nil {
		panic(err) // numbers only
	}
	msg := message.NewMessage(uuid, payload)
	msg.Metadata.Set("nature", rules.Nature(uuid))
	return msg
}

var (
	errTask = errors.New("the task fails")
	errLate = errors.New("the task wants to come later")
)
