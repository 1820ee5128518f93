package sim

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// A kind is a kind of fault.
type kind struct {
	name   string
	server bool // it affects the whole server: one at a time
	apart  bool // it is drawn separately
	hold   func(dice *rand.Rand, minIdle time.Duration) time.Duration
	on     func(*Schedule, *rand.Rand) []string
	not    func(*Schedule) bool // true for schedules that cannot have it
	// inject makes it happen, and calls strike first with what it may do. It returns a
	// function that heals it; nil: nothing is left to heal.
	inject func(s *simulation, f Fault) (heal func())
}

// times returns a random hold, in multiples of ClaimMinIdle.
func times(least, most float64) func(*rand.Rand, time.Duration) time.Duration {
	return func(dice *rand.Rand, minIdle time.Duration) time.Duration {
		return time.Duration((least + (most-least)*dice.Float64()) * float64(min(minIdle, 20*time.Second)))
	}
}

// lasting returns a random hold from least up to most.
func lasting(least, most time.Duration) func(*rand.Rand, time.Duration) time.Duration {
	return func(dice *rand.Rand, _ time.Duration) time.Duration { return between(dice, least, most) }
}

func atOnce(*rand.Rand, time.Duration) time.Duration { return 0 }

// deletes excludes faults that make Redis forget pending entries, because DeleteAcked and
// Retention consider entries that are not pending acked.
func deletes(s *Schedule) bool { return s.trims() }

func (s *Schedule) kinds() []kind {
	return slices.DeleteFunc(allKinds(), func(k kind) bool { return k.apart || k.not != nil && k.not(s) })
}

func kindOf(name string) kind {
	all := allKinds()
	return all[slices.IndexFunc(all, func(k kind) bool { return k.name == name })]
}

func allKinds() []kind {
	return []kind{
		// Of processes.
		{name: "kill", hold: times(0, 2), on: (*Schedule).process, inject: kill},
		{name: "kill everybody", hold: lasting(0, 5*time.Second), on: (*Schedule).processes, inject: kill},
		{name: "stop", hold: times(0.2, 3), on: (*Schedule).process, inject: stop},
		{name: "restart", hold: lasting(0, 3*time.Second), on: (*Schedule).consumer, inject: restart},
		{name: "rolling restart", hold: atOnce, on: (*Schedule).consumers, inject: rollingRestart},

		// Of the network.
		{name: "partition", hold: times(0.2, 3), on: (*Schedule).process, inject: partition},
		{name: "partition everybody", server: true, hold: times(0.2, 2), on: (*Schedule).processes, inject: partition},
		{name: "refuse dials", hold: times(0.2, 2), on: (*Schedule).process, inject: refuseDials},
		{name: "slow", hold: lasting(time.Second, 20*time.Second), on: nobody, inject: slowDown},
		{name: "cut", hold: atOnce, on: nobody, inject: cutOnce},
		{name: "cut before commands", hold: lasting(time.Second, 20*time.Second), on: nobody, inject: cutAt(beforeCommand)},
		{name: "cut before replies", hold: lasting(time.Second, 20*time.Second), on: nobody, inject: cutAt(beforeReply)},
		{name: "cut in replies", hold: lasting(time.Second, 20*time.Second), on: nobody, inject: cutAt(midReply)},
		{name: "cut every 20 ms", hold: lasting(time.Second, 6*time.Second), on: nobody, inject: cutOften,
			not: func(s *Schedule) bool { return s.Latency > time.Millisecond }},

		// Of the server.
		{name: "freeze", server: true, hold: times(0.1, 4), on: nobody, inject: freeze},
		{name: "refuse writes", server: true, hold: times(0.1, 3), on: nobody, inject: refuseWrites},
		{name: "server restart", server: true, hold: lasting(100*time.Millisecond, 10*time.Second), on: nobody, inject: restartServer(true)},
		{name: "server restart without data", server: true, hold: lasting(100*time.Millisecond, 10*time.Second), on: nobody, inject: restartServer(false)},
		{name: "failover", server: true, hold: lasting(100*time.Millisecond, 2*time.Second), on: nobody, inject: failOver},
		{name: "clock step", hold: atOnce, on: nobody, inject: stepClock},

		// Of an administrator.
		{name: "flush", server: true, hold: atOnce, on: nobody, inject: flush},
		{name: "delete stream", server: true, hold: atOnce, on: nobody, inject: deleteStream},
		{name: "delete stream, smaller IDs", server: true, hold: atOnce, on: nobody, inject: smallerIDs},
		{name: "trim", server: true, hold: atOnce, on: nobody, inject: trim},
		{name: "destroy group", server: true, hold: atOnce, on: nobody, inject: destroyGroup},
		{name: "delete consumer", server: true, hold: atOnce, on: nobody, inject: deleteConsumer, not: deletes},
		{name: "ack by hand", server: true, hold: atOnce, on: nobody, inject: ackByHand, not: deletes},
		{name: "stranger", server: true, hold: atOnce, on: nobody, inject: stranger},
		{name: "wrong dead-letter key", hold: times(0.2, 3), on: nobody, inject: spoilDeadLetters},
		{name: "pause", apart: true, inject: pauseGroup},
		{name: "lose the answer to a move", apart: true, inject: ambush},
	}
}

// strike logs what the fault may do to the group, or to everyGroup.
func (s *simulation) strike(f Fault, group int, e rules.Effect) {
	e.Number, e.Fault, e.Target = f.Number, f.Kind, f.On
	if len(e.Loses) > 0 {
		s.lossy.Store(true)
		s.lost.Store(int64(s.elapsed()))
	}
	s.journal.add(group, rules.Event{Kind: rules.Injected, Strike: &e})
}

// happen injects the fault at its time, and heals it.
func (s *simulation) happen(f Fault) {
	if !s.waitUntil(f.At) {
		return
	}
	heal := kindOf(f.Kind).inject(s, f)
	if heal != nil {
		s.wait(f.Hold)
		heal()
	}
	s.journal.add(everyGroup, rules.Event{Kind: rules.Healed, Strike: &rules.Effect{Number: f.Number, Fault: f.Kind}})
}

func (s *simulation) each(f Fault, do func(*place)) {
	for _, name := range f.On {
		if p := s.places[name]; p != nil { // it may have been left out
			do(p)
		}
	}
}

func kill(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Local: true})
	s.each(f, func(p *place) { p.kill(f.Dice%2 == 0) })
	return func() { s.each(f, (*place).start) }
}

func stop(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Local: true})
	var stopped []*node
	s.each(f, func(p *place) {
		if r := p.current(); r != nil {
			r.base().stop()
			stopped = append(stopped, r.base())
		}
	})
	return func() {
		for _, n := range stopped {
			n.cont()
		}
	}
}

func restart(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Local: true})
	s.each(f, func(p *place) { s.goes(p.close) })
	return func() {
		s.each(f, func(p *place) {
			s.goes(func() { p.close(); p.start() })
		})
	}
}

func rollingRestart(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Local: true})
	s.each(f, func(p *place) {
		if s.isLoaded() {
			p.close()
			p.start()
		}
	})
	return nil
}

// partition blocks all traffic. If everybody is cut off, that is like a server that is
// down: no excuse for the library.
func partition(s *simulation, f Fault) func() {
	e := rules.Effect{Breaks: true}
	if len(f.On) < len(s.places) {
		e.Isolates = f.On
	}
	s.strike(f, everyGroup, e)
	return s.network.influence(f.On, (*lane).block, (*lane).unblock)
}

func refuseDials(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Breaks: true, Isolates: f.On})
	return s.network.influence(f.On,
		func(l *lane) { l.set(func(l *lane) { l.refused++ }); l.cut() },
		func(l *lane) { l.set(func(l *lane) { l.refused-- }) })
}

func slowDown(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{})
	factor := int((20*time.Millisecond + time.Duration(f.Dice%uint64(80*time.Millisecond))) / s.schedule.Latency)
	return s.network.influence(nil,
		func(l *lane) { l.set(func(l *lane) { l.slowness += factor }) },
		func(l *lane) { l.set(func(l *lane) { l.slowness -= factor }) })
}

func cutOnce(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Breaks: true})
	s.cutAll(f.Dice)
	return nil
}

// cutAll breaks all connections. What is in transit may or may not arrive.
func (s *simulation) cutAll(dice uint64) {
	if dice%2 == 0 {
		s.server.CutAll()
		return
	}
	s.network.influence(nil, (*lane).cut, func(*lane) {})()
}

const cutRate = 0.08

// cutAt cuts connections at some of what is sent over them.
func cutAt(at point) func(*simulation, Fault) func() {
	return func(s *simulation, f Fault) func() {
		s.strike(f, everyGroup, rules.Effect{Breaks: true})
		return s.network.influence(nil,
			func(l *lane) { l.set(func(l *lane) { l.cuts[at] += cutRate }) },
			func(l *lane) { l.set(func(l *lane) { l.cuts[at] -= cutRate }) })
	}
}

func cutOften(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Breaks: true})
	ended := make(chan struct{})
	s.goes(func() {
		for !isClosed(ended) {
			s.cutAll(f.Dice)
			time.Sleep(20 * time.Millisecond)
		}
	})
	return func() { close(ended) }
}

func freeze(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Breaks: true})
	s.server.Freeze()
	return s.server.Thaw
}

var refusals = []string{
	"NOREPLICAS Not enough good replicas to write.",
	"READONLY You can't write against a read only replica.",
	"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
	"OOM command not allowed when used memory > 'maxmemory'.",
	"NOPERM this user has no permissions to run the command",
}

func (f Fault) refusal() string { return refusals[f.Dice%uint64(len(refusals))] }

func refuseWrites(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Denies: strings.HasPrefix(f.refusal(), "NOPERM ")})
	s.server.RefuseWrites(f.refusal())
	return func() { s.server.RefuseWrites("") }
}

func restartServer(keep bool) func(*simulation, Fault) func() {
	return func(s *simulation, f Fault) func() {
		e := rules.Effect{Breaks: true}
		if !keep {
			e.Loses, e.Destroys = rules.Everything, true
		}
		s.strike(f, everyGroup, e)
		s.server.Freeze()
		data := s.server.Snapshot()
		s.snapshots.Add(1)
		accept := s.network.influence(nil, func(l *lane) { l.set(func(l *lane) { l.refused++ }) }, func(l *lane) { l.set(func(l *lane) { l.refused-- }) })
		s.server.CutAll()
		if !keep {
			data = nil
		}
		return func() {
			s.server.Restore(data)
			s.snapshots.Add(-1)
			s.lossy.Store(true)
			accept()
		}
	}
}

// failOver promotes a replica that lacks the last writes, and whose clock may differ.
func failOver(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Breaks: true, Loses: rules.Everything})
	data := s.server.Snapshot()
	s.snapshots.Add(1)
	return func() {
		s.network.failOver(f.Number)
		s.server.Restore(data)
		s.snapshots.Add(-1)
		s.lossy.Store(true)
		s.lost.Store(int64(s.elapsed()))
		if f.Dice%4 == 0 {
			s.wait(s.step(time.Duration(f.Dice%4001)*time.Millisecond - 2*time.Second))
		}
	}
}

// stepClock sets the server's clock. After a step back idle times are too short by as
// much, so entries of dead processes are taken over late. Leases of living processes do
// not depend on idle times.
func stepClock(s *simulation, f Fault) func() {
	steps := []time.Duration{-2 * time.Minute, -30 * time.Second, -time.Second, 5 * time.Second, time.Minute, 10 * time.Minute, time.Hour}
	step := steps[f.Dice%uint64(len(steps))]
	s.strike(f, everyGroup, rules.Effect{Local: step > 0, Idle: step < 0})
	s.wait(s.step(step))
	return nil
}

// step sets the server's clock, and returns how far it is behind its latest time.
func (s *simulation) step(d time.Duration) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock += d
	s.latest = max(s.latest, s.clock)
	s.server.StepClock(d)
	s.clockedLocked()
	return s.latest - s.clock
}

func flush(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Loses: rules.Everything, Destroys: true})
	s.do("FLUSHALL")
	return nil
}

func deleteStream(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Loses: []string{f.Topic}, Destroys: true, Stream: true})
	s.do("DEL", f.Topic)
	return nil
}

// smallerIDs recreates the stream with IDs below those that were read.
func smallerIDs(s *simulation, f Fault) func() {
	deleteStream(s, f)
	for i := range 1 + f.Dice%3 {
		uuid := fmt.Sprintf("plain-hand-%d-%d", f.Number, i)
		s.store(f.Topic, fmt.Sprintf("%d-%d", f.Number, i+1), makeMessage(s.schedule.Seed, uuid, s.limits))
	}
	return nil
}

func trim(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Loses: []string{f.Topic}, Destroys: true, Stream: true})
	s.do("XTRIM", f.Topic, "MAXLEN", strconv.FormatUint(f.Dice%20, 10))
	return nil
}

const (
	// nobodys is the holder of entries that nobody restores.
	nobodys = "released"
	// theStranger takes entries, and is not one of our consumers.
	theStranger = "stranger"
)

// held returns who has the pending entries of the consumers that Redis is to forget.
func (s *simulation) held(topic, group string, forgets func(consumer string) bool) map[string]string {
	held := make(map[string]string)
	for _, p := range s.pending(topic, group) {
		if !forgets(p.Consumer) {
			continue
		}
		if held[p.ID] = p.Consumer; p.Consumer == theStranger {
			held[p.ID] = nobodys
		}
	}
	return held
}

// restart returns where a destroyed group begins again; "": its consumers recreate it.
func (f Fault) restart() string { return []string{"", "0", "$"}[f.Dice%3] }

// destroyGroup notes the holders of pending entries, because nobody restores those of dead consumers.
func destroyGroup(s *simulation, f Fault) func() {
	group := s.schedule.Groups[f.Group]
	held := s.held(f.Topic, group.Name, func(string) bool { return true })
	start := f.restart()
	if start == "$" { // nobody reads what was not read yet
		for _, e := range s.unread(f.Topic, group.Name) {
			held[e.ID] = nobodys
		}
	}
	s.strike(f, f.Group, rules.Effect{Loses: []string{f.Topic}, Group: true, Held: held})
	s.do("XGROUP", "DESTROY", f.Topic, group.Name)
	if start != "" {
		s.do("XGROUP", "CREATE", f.Topic, group.Name, start)
	}
	return nil
}

// deleteConsumer removes a consumer with its pending entries. A living one restores them.
func deleteConsumer(s *simulation, f Fault) func() {
	group := s.schedule.Groups[f.Group].Name
	pending := s.pending(f.Topic, group)
	if len(pending) == 0 {
		return nil
	}
	victim := pending[f.Dice%uint64(len(pending))].Consumer
	held := s.held(f.Topic, group, func(consumer string) bool { return consumer == victim })
	s.strike(f, f.Group, rules.Effect{Loses: []string{f.Topic}, Group: true, Held: held, Keeps: true})
	s.do("XGROUP", "DELCONSUMER", f.Topic, group, victim)
	return nil
}

// ackByHand acks entries that nobody has handled, which settles them.
func ackByHand(s *simulation, f Fault) func() {
	group := s.schedule.Groups[f.Group].Name
	pending := s.pending(f.Topic, group)
	if len(pending) == 0 {
		return nil
	}
	p := pending[f.Dice%uint64(len(pending))]
	s.strike(f, f.Group, rules.Effect{Loses: []string{f.Topic}, Group: true, Held: map[string]string{p.ID: nobodys}, Keeps: true})
	s.do("XACK", f.Topic, group, p.ID)
	return nil
}

// stranger takes pending entries, and does nothing with them.
func stranger(s *simulation, f Fault) func() {
	group := s.schedule.Groups[f.Group].Name
	pending := s.pending(f.Topic, group)
	if len(pending) == 0 {
		return nil
	}
	s.strike(f, f.Group, rules.Effect{Loses: []string{f.Topic}, Group: true, Keeps: true})
	args := []any{"XCLAIM", f.Topic, group, theStranger, "0"}
	for _, p := range pending[:1+f.Dice%uint64(len(pending))] {
		args = append(args, p.ID)
	}
	s.do(append(args, "JUSTID")...)
	return nil
}

// spoilDeadLetters puts a key of another type in place of the dead-letter stream, unless
// that exists.
func spoilDeadLetters(s *simulation, f Fault) func() {
	key := goxstreams.DeadLetterTopic(f.Topic)
	s.strike(f, everyGroup, rules.Effect{Ails: []string{f.Topic}})
	if s.do("EXISTS", key) != int64(0) {
		return nil
	}
	s.do("HSET", key, "no", "stream")
	return func() { s.mendDeadLetters(f.Topic) }
}

func (s *simulation) mendDeadLetters(topic string) {
	if key := goxstreams.DeadLetterTopic(topic); s.do("TYPE", key) == "hash" {
		s.do("DEL", key)
	}
}

// ambush waits for a move to the topic's dead-letter stream, and loses its answer. At the same
// time Redis forgets the consumer that made the move, or all pending entries, so the pending
// entries do not tell what became of this one.
func ambush(s *simulation, f Fault) func() {
	words := [][]byte{[]byte("-- dead-letter"), []byte("\n" + f.Topic + "\r"), []byte("\n" + s.schedule.Groups[f.Group].Name + "\r")}
	var caught atomic.Bool
	return s.network.influence(nil,
		func(l *lane) {
			l.set(func(l *lane) {
				l.ambush = func(sent []byte) (spring func()) {
					others := func(word []byte) bool { return !bytes.Contains(sent, word) }
					if slices.ContainsFunc(words, others) || caught.Swap(true) {
						return nil
					}
					return func() { s.goes(func() { s.forget(f, l.process, l.life) }) }
				}
			})
		},
		func(l *lane) { l.set(func(l *lane) { l.ambush = nil }) })
}

// forget removes a process's consumer, or recreates the group at its position.
func (s *simulation) forget(f Fault, process string, life int) {
	group, anew := s.schedule.Groups[f.Group].Name, f.Dice%2 == 0
	held := s.held(f.Topic, group, func(consumer string) bool {
		by, number := parsePrefix(consumer)
		return anew || by == process && number == life
	})
	s.strike(f, f.Group, rules.Effect{Breaks: true, Loses: []string{f.Topic}, Group: true, Held: held, Keeps: true})
	if anew {
		at := s.delivered(f.Topic, group)
		s.do("XGROUP", "DESTROY", f.Topic, group)
		s.do("XGROUP", "CREATE", f.Topic, group, at)
		return
	}
	for _, name := range s.consumers(f.Topic, group) {
		if by, number := parsePrefix(name); by == process && number == life {
			s.do("XGROUP", "DELCONSUMER", f.Topic, group, name)
		}
	}
}
