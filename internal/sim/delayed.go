package sim

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// delay delays messages as their schedule has it, and returns the delays that are longer than none.
func (s *simulation) delay(messages []*message.Message) map[string]time.Duration {
	var delays map[string]time.Duration
	for _, msg := range messages {
		d, ok := s.delays[msg.UUID]
		if !ok {
			continue
		}
		if delay.Message(msg, delay.For(d.For)); d.For > 0 {
			if delays == nil {
				delays = make(map[string]time.Duration)
			}
			delays[msg.UUID] = d.For
		}
	}
	return delays
}

// change has a producer cancel or reschedule a message.
func (s *simulation) change(d Delay) {
	if !s.waitUntil(d.Change.At) {
		return
	}
	p := s.places[(Producer{Number: d.Change.Producer}).name()]
	if p == nil { // it was left out
		return
	}
	if r := p.current(); r != nil {
		r.base().pass()
		r.base().change(d)
	}
}

func (n *node) change(d Delay) {
	schedule, err := goxstreams.NewSchedule(n.client, d.Topic)
	if err != nil {
		panic(err)
	}
	event := rules.Event{Kind: rules.Changing, Topic: d.Topic, UUID: d.UUID, Run: int64(d.Number)}
	at := n.sim.serverTime().Add(d.Change.For).Truncate(time.Millisecond)
	if !d.Change.Cancel {
		event.Due = at.UnixMilli()
	}
	n.log(everyGroup, event)
	if d.Change.Cancel {
		err = schedule.Cancel(context.Background(), d.UUID)
	} else {
		err = schedule.Reschedule(context.Background(), d.UUID, at)
	}
	n.pass()
	missing := (*goxstreams.NotFoundError)(nil)
	switch {
	case err == nil:
		event.Kind = rules.Changed
	case errors.As(err, &missing):
		event.Kind = rules.NotFound
	default:
		event.Kind, event.Error = rules.Unsure, err.Error()
	}
	n.log(everyGroup, event)
}

func (s *simulation) serverTime() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Add(s.clock)
}

// clocked logs what the server's clock shows from now on.
func (s *simulation) clocked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clockedLocked()
}

func (s *simulation) clockedLocked() {
	began := time.Duration(s.journal.began.UnixNano() - 1) // when Mono was 0
	s.journal.add(everyGroup, rules.Event{Kind: rules.Clocked, Clock: began + s.clock})
}

// waits returns the delayed messages of a topic that wait.
func (s *simulation) waits(topic string) []string {
	var uuids []string
	for _, uuid := range list(s.do("ZRANGE", xstream.DueKey(topic), "0", "-1")) {
		uuids = append(uuids, text(uuid))
	}
	return uuids
}

// waiting returns how many there are, and whether some are due.
func (s *simulation) waiting(topic string) (n int, due bool) {
	if n = len(s.waits(topic)); n == 0 {
		return 0, false
	}
	overdue, _ := s.do("ZCOUNT", xstream.DueKey(topic), "-inf", s.serverTime().UnixMilli()).(int64)
	return n, overdue > 0
}

// leftOver complains of what is left in the hash of delayed messages, and of those that the library found without it: here
// nobody but the library writes or deletes either.
func (s *simulation) leftOver() {
	for _, topic := range s.schedule.Topics {
		waits := s.waits(topic)
		fields := list(s.do("HGETALL", xstream.DelayedKey(topic)))
		for i := 0; i < len(fields); i += 2 {
			if uuid := text(fields[i]); !slices.Contains(waits, uuid) {
				s.complain(0, "left over", rules.Event{Topic: topic, UUID: uuid}, "its fields are stored, though it does not wait")
			}
		}
	}
	if words := "Delayed message lost"; s.journal.logged(words) {
		s.complain(0, "left over", rules.Event{}, "the library has logged: "+words)
	}
}
