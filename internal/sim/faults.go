package sim

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// A kind of fault.
type kind struct {
	name   string
	server bool // it is about the server as a whole: one at a time
	apart  bool // it is drawn for itself
	hold   func(dice *rand.Rand, minIdle time.Duration) time.Duration
	on     func(*Schedule, *rand.Rand) []string
	not    func(*Schedule) bool // schedules that cannot have it
	// inject makes it happen, and says by strike what it may do, before it does it. It
	// returns what makes it pass; nil: it has passed.
	inject func(s *simulation, f Fault) (heal func())
}

// times returns a hold of so many ClaimMinIdles.
func times(least, most float64) func(*rand.Rand, time.Duration) time.Duration {
	return func(dice *rand.Rand, minIdle time.Duration) time.Duration {
		return time.Duration((least + (most-least)*dice.Float64()) * float64(min(minIdle, 20*time.Second)))
	}
}

// lasting returns a hold from least up to most.
func lasting(least, most time.Duration) func(*rand.Rand, time.Duration) time.Duration {
	return func(dice *rand.Rand, _ time.Duration) time.Duration { return between(dice, least, most) }
}

func atOnce(*rand.Rand, time.Duration) time.Duration { return 0 }

// deletes is for faults by which Redis forgets that entries are pending: what is not, DeleteAcked
// takes for acked.
func deletes(s *Schedule) bool { return s.Groups[0].DeleteAcked }

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

		// Of somebody who has the server's password.
		{name: "flush", server: true, hold: atOnce, on: nobody, inject: flush},
		{name: "delete stream", server: true, hold: atOnce, on: nobody, inject: deleteStream},
		{name: "delete stream, smaller IDs", server: true, hold: atOnce, on: nobody, inject: smallerIDs},
		{name: "trim", server: true, hold: atOnce, on: nobody, inject: trim},
		{name: "destroy group", server: true, hold: atOnce, on: nobody, inject: destroyGroup, not: deletes},
		{name: "delete consumer", server: true, hold: atOnce, on: nobody, inject: deleteConsumer, not: deletes},
		{name: "ack by hand", server: true, hold: atOnce, on: nobody, inject: ackByHand, not: deletes},
		{name: "stranger", server: true, hold: atOnce, on: nobody, inject: stranger},
		{name: "wrong dead-letter key", hold: times(0.2, 3), on: nobody, inject: spoilDeadLetters},
		{name: "lose the answer to a move", apart: true, inject: ambush},
	}
}

// strike logs what the fault is about to do to the group, or to everyGroup.
func (s *simulation) strike(f Fault, group int, e rules.Effect) {
	e.Number, e.Fault, e.Target = f.Number, f.Kind, f.On
	if len(e.Loses) > 0 {
		s.lossy.Store(true)
	}
	s.journal.add(group, rules.Event{Kind: rules.Injected, Strike: &e})
}

// happen has the fault happen at its time, and pass.
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

// partition lets nothing through. Where that is so for everybody, it is as if the server
// were away: no excuse.
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

// cutAll breaks all connections: what is on its way arrives or not.
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
	s.strike(f, everyGroup, rules.Effect{})
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
		accept := s.network.influence(nil, func(l *lane) { l.set(func(l *lane) { l.refused++ }) }, func(l *lane) { l.set(func(l *lane) { l.refused-- }) })
		s.server.CutAll()
		if !keep {
			data = nil
		}
		return func() {
			s.server.Restore(data)
			s.lossy.Store(true)
			accept()
		}
	}
}

// failOver is to a replica that has not got the last writes, and whose clock may be
// another one.
func failOver(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Breaks: true, Loses: rules.Everything})
	data := s.server.Snapshot()
	return func() {
		s.network.failOver(f.Number)
		s.server.Restore(data)
		s.lossy.Store(true)
		if f.Dice%4 == 0 {
			s.wait(s.step(time.Duration(f.Dice%4001)*time.Millisecond - 2*time.Second))
		}
	}
}

// stepClock sets the server's clock. After a step back idle times are too short, by as
// much, and so nobody takes over in time what dead processes left. What is held by the
// living does not go by idle times.
func stepClock(s *simulation, f Fault) func() {
	steps := []time.Duration{-2 * time.Minute, -30 * time.Second, -time.Second, 5 * time.Second, time.Minute, 10 * time.Minute, time.Hour}
	step := steps[f.Dice%uint64(len(steps))]
	s.strike(f, everyGroup, rules.Effect{Local: step > 0, Idle: step < 0})
	s.wait(s.step(step))
	return nil
}

// step sets the server's clock, and returns by how much it is behind what it was once.
func (s *simulation) step(d time.Duration) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock += d
	s.latest = max(s.latest, s.clock)
	s.server.StepClock(d)
	return s.latest - s.clock
}

func flush(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Loses: rules.Everything, Destroys: true})
	s.do("FLUSHALL")
	return nil
}

func deleteStream(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Loses: []string{f.Topic}, Destroys: true})
	s.do("DEL", f.Topic)
	return nil
}

// smallerIDs has the stream begin anew with IDs below those that were read.
func smallerIDs(s *simulation, f Fault) func() {
	deleteStream(s, f)
	for i := range 1 + f.Dice%3 {
		uuid := fmt.Sprintf("plain-hand-%d-%d", f.Number, i)
		s.store(f.Topic, fmt.Sprintf("%d-%d", f.Number, i+1), makeMessage(s.schedule.Seed, uuid, s.limits))
	}
	return nil
}

func trim(s *simulation, f Fault) func() {
	s.strike(f, everyGroup, rules.Effect{Loses: []string{f.Topic}, Destroys: true})
	s.do("XTRIM", f.Topic, "MAXLEN", strconv.FormatUint(f.Dice%20, 10))
	return nil
}

const (
	// nobodys is the holder of what nobody puts back.
	nobodys = "released"
	// theStranger takes entries, and is none of ours.
	theStranger = "stranger"
)

// restart returns where a group that is destroyed begins again; "": its consumers make it.
func (f Fault) restart() string { return []string{"", "0", "$"}[f.Dice%3] }

// destroyGroup notes who holds what: what dead holders held, nobody puts back.
func destroyGroup(s *simulation, f Fault) func() {
	group := s.schedule.Groups[f.Group]
	held := make(map[string]string)
	for _, p := range s.pending(f.Topic, group.Name) {
		if held[p.ID] = p.Consumer; p.Consumer == theStranger {
			held[p.ID] = nobodys
		}
	}
	start := f.restart()
	if start == "$" { // what was not read yet, nobody reads
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

// deleteConsumer forgets what a consumer holds. A living one puts it back.
func deleteConsumer(s *simulation, f Fault) func() {
	group := s.schedule.Groups[f.Group].Name
	pending := s.pending(f.Topic, group)
	if len(pending) == 0 {
		return nil
	}
	victim := pending[f.Dice%uint64(len(pending))].Consumer
	held := make(map[string]string)
	for _, p := range pending {
		if p.Consumer == victim {
			held[p.ID] = victim
		}
	}
	s.strike(f, f.Group, rules.Effect{Loses: []string{f.Topic}, Group: true, Held: held, Keeps: true})
	s.do("XGROUP", "DELCONSUMER", f.Topic, group, victim)
	return nil
}

// ackByHand acks what nobody has handled: that is settled then.
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

// stranger takes what is pending, and does nothing with it.
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

// spoilDeadLetters has a key of another type where dead letters are to go, if none are
// there yet.
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

// ambush waits for a move to the topic's dead-letter stream, and has its answer get lost. At
// once Redis forgets the consumer that has asked for it, or all that is pending: by what it
// has nobody can tell what became of the entry.
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

// forget removes a process's consumer, or makes the group anew where it was.
func (s *simulation) forget(f Fault, process string, life int) {
	group, held := s.schedule.Groups[f.Group].Name, make(map[string]string)
	anew := f.Dice%2 == 0
	for _, p := range s.pending(f.Topic, group) {
		if by, number := parsePrefix(p.Consumer); anew || by == process && number == life {
			held[p.ID] = p.Consumer
		}
	}
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
