package sim

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/model"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// A Schedule is all that a seed decides: who takes part, what is published, and what
// goes wrong when. Its parts have numbers, by which they can be left out.
type Schedule struct {
	Seed    uint64
	Version model.Version
	Load    time.Duration // how long messages are published and faults come
	Latency time.Duration // of the network, one way
	Topics  []string
	Groups  []Group

	// Retention is that of all consumers; the zero value trims nothing.
	Retention goxstreams.Retention

	// Twice has each consumer of a group subscribe twice to each topic, with one Subscriber.
	// It is not drawn, but asked for.
	Twice bool

	Consumers []Consumer
	Producers []Producer
	Calls     []Call
	Delays    []Delay
	Faults    []Fault
}

// A Group is a consumer group and what its consumers have in common; without a name it
// is a fan-out.
type Group struct {
	Name           string
	NoAck          bool
	MaxConcurrency int
	Keys           int // ordering keys; 0: none
	ClaimMinIdle   time.Duration
	ClaimInterval  time.Duration
	MaxRetries     int
	RetryDelay     time.Duration // the first one
	MaxRetryDelay  time.Duration
	DeleteAcked    bool
	Middlewares    bool // Retry and DeadLetter around the handler; else it only nacks
	CloseTimeout   time.Duration
	Mood           Mood
}

// leased reports whether the rules hold for the group: those for at least once.
func (g Group) leased() bool { return g.Name != "" && !g.NoAck }

// A Mood is how often the user's functions do what they should not.
type Mood struct {
	Fail, Panic, Slow, Hang, Close float64
	OnBroken                       bool // there is one
	Unmarshaler                    bool // there is one of the user's
}

// A Consumer is a place for one process after the other that consumes all topics.
type Consumer struct {
	Number      int
	Groups      []int
	BatchSize   int
	BlockTime   time.Duration
	ReadTimeout time.Duration
	Protocol    int
	Start       time.Duration
}

func (c Consumer) name() string { return fmt.Sprintf("consumer-%d", c.Number) }

// A Producer is a place for one process after the other that publishes.
type Producer struct {
	Number  int
	Workers int
}

func (p Producer) name() string { return fmt.Sprintf("producer-%d", p.Number) }

// A Call is one call of Publish.
type Call struct {
	Number   int
	At       time.Duration
	Producer int
	Topic    string
	UUIDs    []string
}

// A Delay is one of a message, in its metadata.
type Delay struct {
	Number int
	UUID   string
	Topic  string
	For    time.Duration
	Change *Change // nil: it stays as it is
}

// A Change is a call of Schedule about a delayed message.
type Change struct {
	At       time.Duration
	Producer int
	Cancel   bool
	For      time.Duration // of Reschedule, from then on by the server's clock; negative: it is due
}

func (d Delay) String() string {
	text := fmt.Sprintf("delay %d: %s for %v", d.Number, d.UUID, d.For)
	if c := d.Change; c != nil && c.Cancel {
		text += fmt.Sprintf(", cancelled at %v", c.At)
	} else if c != nil {
		text += fmt.Sprintf(", rescheduled at %v for %v", c.At, c.For)
	}
	return text
}

// A Fault is something that goes wrong, and passes.
type Fault struct {
	Number int
	Kind   string
	At     time.Duration
	Hold   time.Duration
	On     []string // processes
	Topic  string
	Group  int
	Dice   uint64 // for what is decided when it happens
}

func (f Fault) String() string {
	text := fmt.Sprintf("fault %d at %v: %s", f.Number, f.At.Round(time.Millisecond), f.Kind)
	if f.Hold > 0 {
		text += fmt.Sprintf(" for %v", f.Hold.Round(time.Millisecond))
	}
	if len(f.On) > 0 {
		text += fmt.Sprintf(" on %v", f.On)
	}
	if f.Topic != "" {
		text += " of " + f.Topic
	}
	return text
}

// Draw makes the schedule of a seed.
func Draw(seed uint64) *Schedule {
	dice := newDice(seed, "schedule", 0)
	s := &Schedule{
		Seed:    seed,
		Version: pick(dice, model.Redis70, model.Redis86, model.Redis86, model.Valkey91),
		Load:    between(dice, 40*time.Second, 4*time.Minute),
		Latency: pick(dice, 20*time.Microsecond, 200*time.Microsecond, time.Millisecond, 3*time.Millisecond),
	}
	if chance(dice, 0.1) {
		s.Load *= 3
	}
	for i := range 1 + dice.IntN(3) {
		s.Topics = append(s.Topics, []string{"orders", "mails", "events"}[i])
	}
	s.drawGroups(dice)
	s.drawConsumers(dice)
	for i := range 1 + dice.IntN(3) {
		s.Producers = append(s.Producers, Producer{Number: i + 1, Workers: 1 + dice.IntN(3)})
	}
	s.drawCalls(newDice(seed, "calls", 0))
	s.drawRetention(newDice(seed, "retention", 0))
	s.drawFaults(newDice(seed, "faults", 0))
	s.drawSteady(newDice(seed, "steady load", 0))
	s.drawAmbushes(newDice(seed, "ambushes", 0))
	s.drawDelays(newDice(seed, "delays", 0))
	s.drawKeys(newDice(seed, "keys", 0))
	s.drawPauses(newDice(seed, "pauses", 0))
	return s
}

func (s *Schedule) drawGroups(dice *rand.Rand) {
	number := 1
	if chance(dice, 0.25) {
		number = 2
	}
	deleteAcked := chance(dice, 0.2) && (number == 1 || s.Version == model.Redis86)
	for i := range number {
		g := s.drawGroup(dice, []string{"billing", "shipping"}[i])
		g.DeleteAcked = deleteAcked
		s.Groups = append(s.Groups, g)
	}
	switch {
	case chance(dice, 0.12):
		g := s.drawGroup(dice, "")
		g.Mood = Mood{}
		s.Groups = append(s.Groups, g)
	case !deleteAcked && chance(dice, 0.1):
		g := s.drawGroup(dice, "audit")
		g.NoAck, g.Mood = true, Mood{}
		s.Groups = append(s.Groups, g)
	}
}

func (s *Schedule) drawGroup(dice *rand.Rand, name string) Group {
	g := Group{
		Name:           name,
		ClaimMinIdle:   pick(dice, 3*time.Second, 3*time.Second, 5*time.Second, 10*time.Second, 20*time.Second, 60*time.Second),
		MaxConcurrency: pick(dice, 1, 1, 1, 2, 4, 8, 32),
		MaxRetries:     pick(dice, -1, 0, 0, 1, 2, 3, 5, 10),
		RetryDelay:     pick(dice, 10*time.Millisecond, 100*time.Millisecond, time.Second, 5*time.Second),
		Middlewares:    chance(dice, 0.75),
		CloseTimeout:   pick(dice, 2*time.Second, 5*time.Second, 25*time.Second),
	}
	g.ClaimInterval = pick(dice, g.ClaimMinIdle/10, time.Second, time.Second, 3*time.Second)
	if g.MaxRetries > 3 {
		g.RetryDelay = min(g.RetryDelay, time.Second) // a topic with MaxConcurrency 1 waits for each of them
	}
	g.MaxRetryDelay = min(g.RetryDelay*time.Duration(1+dice.IntN(8)), 10*time.Second)
	if chance(dice, 0.5) {
		g.Mood = Mood{
			Fail: 0.2 * dice.Float64(), Panic: 0.1 * dice.Float64(), Slow: 0.2 * dice.Float64(), Hang: 0.05 * dice.Float64(),
			Close: 0.005 * dice.Float64(), OnBroken: chance(dice, 0.6), Unmarshaler: chance(dice, 0.3),
		}
	}
	return g
}

func (s *Schedule) drawConsumers(dice *rand.Rand) {
	for i := range 1 + dice.IntN(8)*dice.IntN(8)/7 {
		c := Consumer{
			Number:      i + 1,
			BatchSize:   pick(dice, 1, 2, 10, 100, 500),
			BlockTime:   pick(dice, time.Second, 5*time.Second, 5*time.Second),
			ReadTimeout: pick(dice, time.Second, 3*time.Second),
			Protocol:    pick(dice, 2, 3),
			Start:       between(dice, 0, 3*time.Second),
		}
		for g := range s.Groups {
			if i == 0 || len(s.Groups) == 1 || chance(dice, 0.7) {
				c.Groups = append(c.Groups, g)
			}
		}
		s.Consumers = append(s.Consumers, c)
	}
}

// drawKeys gives half of the groups that handle several messages at once an OrderingKey.
func (s *Schedule) drawKeys(dice *rand.Rand) {
	for i := range s.Groups {
		if g := &s.Groups[i]; g.leased() && g.MaxConcurrency > 1 && chance(dice, 0.5) {
			g.Keys = pick(dice, 2, 5, 20, 100)
		}
	}
}

// limits returns what all groups allow a message to be.
func (s *Schedule) limits() limits {
	l := limits{fails: 3, minIdle: time.Hour, poison: true, deadly: true}
	for _, g := range s.Groups {
		l.minIdle = min(l.minIdle, g.ClaimMinIdle)
		switch {
		case !g.leased():
			l.deadly = l.deadly && g.Name == ""
			continue
		case g.MaxRetries == 0:
			l.poison, l.deadly = false, false
			continue
		}
		l.fails = min(l.fails, int64(max(g.MaxRetries, 0)))
		if time.Duration(g.MaxRetries+3)*g.ClaimMinIdle > 2*time.Minute {
			l.deadly = false
		}
	}
	return l
}

const largestBatch = 12

func (s *Schedule) drawCalls(dice *rand.Rand) {
	l := s.limits()
	messages := pick(dice, 30, 100, 300, 600)
	trouble := pick(dice, 0.03, 0.15, 0.15, 0.4)
	number, patience := 0, s.Load/4 // what takes long must not take for ever
	for number < messages {
		c := Call{
			At:       between(dice, time.Second, s.Load),
			Producer: 1 + dice.IntN(len(s.Producers)),
			Topic:    pick(dice, s.Topics...),
		}
		size, repeats := 1, 1
		if chance(dice, 0.3) {
			size = 2 + dice.IntN(largestBatch-1)
		}
		if chance(dice, 0.05) { // a burst
			repeats = 10
		}
		for range repeats {
			c.UUIDs = nil
			for range size {
				number++
				nature := drawNature(dice, trouble, l)
				if nature == rules.Slow || nature == hanging {
					if patience -= 3 * l.minIdle; patience < 0 {
						nature = rules.Plain
					}
				}
				c.UUIDs = append(c.UUIDs, fmt.Sprintf("%s-%d", nature, number))
			}
			s.Calls = append(s.Calls, c)
		}
	}
	slices.SortStableFunc(s.Calls, func(a, b Call) int { return cmp.Compare(a.At, b.At) })
	for i := range s.Calls {
		s.Calls[i].Number = i + 1
	}
}

func (s *Schedule) drawFaults(dice *rand.Rand) {
	kinds := s.kinds()
	gap := pick(dice, 4*time.Second, 10*time.Second, 20*time.Second, 40*time.Second)
	if chance(dice, 0.3) { // few kinds, often
		dice.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
		kinds = kinds[:1+dice.IntN(3)]
	}
	var busy time.Duration // until when a fault of the server lasts
	for at := between(dice, 2*time.Second, gap); at < s.Load; at += between(dice, 0, 2*gap) {
		kind := pick(dice, kinds...)
		f := Fault{Kind: kind.name, At: at, Dice: dice.Uint64(), Topic: pick(dice, s.Topics...), Group: s.leasedGroup(dice)}
		f.Hold = kind.hold(dice, s.Groups[f.Group].ClaimMinIdle)
		f.On = kind.on(s, dice)
		if kind.server {
			if at < busy {
				continue
			}
			busy = at + f.Hold + time.Second
		}
		f.Number = len(s.Faults) + 1
		s.Faults = append(s.Faults, f)
	}
}

// drawSteady makes a few schedules ones in which every process has always work, none of it
// long, and one of them dies: what it leaves has to come to its turn all the same.
func (s *Schedule) drawSteady(dice *rand.Rand) {
	if !chance(dice, 0.03) {
		return
	}
	s.Load = 150 * time.Second
	s.Topics, s.Groups, s.Producers = s.Topics[:1], s.Groups[:1], s.Producers[:1]
	g := &s.Groups[0]
	g.MaxConcurrency, g.MaxRetries = pick(dice, 20, 32), pick(dice, -1, -1, 1, 3)
	g.ClaimMinIdle, g.ClaimInterval, g.Mood = 3*time.Second, time.Second, Mood{}
	s.Consumers = []Consumer{s.Consumers[0], s.Consumers[0]}
	s.Consumers[1].Number = 2
	for i := range s.Consumers {
		s.Consumers[i].Groups = []int{0}
	}
	s.Calls, s.Faults = nil, nil
	for at := time.Second; at < s.Load; at += between(dice, 0, 300*time.Millisecond) {
		number := len(s.Calls) + 1
		s.Calls = append(s.Calls, Call{
			Number: number, At: at, Producer: s.Producers[0].Number, Topic: s.Topics[0], UUIDs: []string{fmt.Sprintf("%s-%d", steady, number)},
		})
	}
	for at := 10 * time.Second; at < s.Load/2; at += between(dice, 5*time.Second, 30*time.Second) {
		s.Faults = append(s.Faults, Fault{
			Number: len(s.Faults) + 1, Kind: "kill", At: at, Hold: between(dice, 0, 20*time.Second),
			On: []string{s.Consumers[0].name()}, Topic: s.Topics[0], Dice: dice.Uint64(),
		})
	}
}

// drawAmbushes adds to a few schedules what chance hardly ever makes: that Redis forgets
// who has what just when an answer was lost.
func (s *Schedule) drawAmbushes(dice *rand.Rand) {
	if !chance(dice, 0.06) || s.trims() {
		return
	}
	for at := between(dice, 0, 10*time.Second); at < s.Load; at += between(dice, 5*time.Second, 30*time.Second) {
		s.Faults = append(s.Faults, Fault{
			Number: len(s.Faults) + 1, Kind: "lose the answer to a move", At: at, Hold: between(dice, 5*time.Second, 20*time.Second),
			Topic: pick(dice, s.Topics...), Group: s.leasedGroup(dice), Dice: dice.Uint64(),
		})
	}
}

// drawRetention has a third of the schedules trim the streams, most of them so closely that
// what is trimmed is missed at once if somebody needs it.
func (s *Schedule) drawRetention(dice *rand.Rand) {
	if !chance(dice, 0.4) || s.Groups[0].DeleteAcked {
		return
	}
	s.Retention = pick(dice, goxstreams.Retention{KeepLast: 1}, goxstreams.Retention{KeepLast: 20},
		goxstreams.Retention{KeepFor: time.Millisecond}, goxstreams.Retention{KeepFor: 10 * time.Second, KeepLast: 5})
}

// trims reports whether acked entries leave the streams.
func (s *Schedule) trims() bool {
	return s.Groups[0].DeleteAcked || s.Retention.KeepLast > 0 || s.Retention.KeepFor > 0
}

// drawDelays delays messages in a third of the schedules. Some are cancelled or rescheduled: most of these calls come before the
// message is due, and some about then.
func (s *Schedule) drawDelays(dice *rand.Rand) {
	if !chance(dice, 1.0/3) {
		return
	}
	share, changes := pick(dice, 0.1, 0.3, 0.9), pick(dice, 0, 0.1, 0.4)
	most := pick(dice, 2*time.Second, 15*time.Second, 40*time.Second)
	for _, call := range s.Calls {
		for _, uuid := range call.UUIDs {
			if !chance(dice, share) {
				continue
			}
			d := Delay{Number: len(s.Delays) + 1, UUID: uuid, Topic: call.Topic}
			switch x := dice.Float64(); {
			case x < 0.05: // none
			case x < 0.4:
				d.For = between(dice, 0, 2*time.Second)
			default:
				d.For = between(dice, 0, most)
			}
			if chance(dice, changes) {
				d.Change = &Change{
					At: call.At + between(dice, 0, d.For*5/4+200*time.Millisecond), Producer: 1 + dice.IntN(len(s.Producers)),
					Cancel: chance(dice, 0.5), For: between(dice, -5*time.Second, 20*time.Second),
				}
			}
			s.Delays = append(s.Delays, d)
		}
	}
}

// longest returns the longest time that a handler may take.
func (s *Schedule) longest() (longest time.Duration) {
	l := s.limits()
	for _, c := range s.Calls {
		for _, uuid := range c.UUIDs {
			longest = max(longest, makeTask(s.Seed, uuid, l).Work)
		}
	}
	return longest
}

func (s *Schedule) leasedGroup(dice *rand.Rand) int {
	for {
		if g := dice.IntN(len(s.Groups)); s.Groups[g].leased() {
			return g
		}
	}
}

func (s *Schedule) consumer(dice *rand.Rand) []string {
	return []string{s.Consumers[dice.IntN(len(s.Consumers))].name()}
}

func (s *Schedule) producer(dice *rand.Rand) []string {
	return []string{s.Producers[dice.IntN(len(s.Producers))].name()}
}

func (s *Schedule) process(dice *rand.Rand) []string {
	if chance(dice, 0.2) {
		return s.producer(dice)
	}
	return s.consumer(dice)
}

// processes are all of them.
func (s *Schedule) processes(*rand.Rand) []string {
	var all []string
	for _, c := range s.Consumers {
		all = append(all, c.name())
	}
	for _, p := range s.Producers {
		all = append(all, p.name())
	}
	return all
}

func (s *Schedule) consumers(*rand.Rand) []string {
	var all []string
	for _, c := range s.Consumers {
		all = append(all, c.name())
	}
	return all
}

func nobody(*Schedule, *rand.Rand) []string { return nil }
