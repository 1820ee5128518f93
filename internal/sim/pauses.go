package sim

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// drawPauses has an administrator pause and resume groups in a fifth of the schedules, whatever
// else goes wrong.
func (s *Schedule) drawPauses(dice *rand.Rand) {
	if !chance(dice, 0.2) {
		return
	}
	hold := pick(dice, 5*time.Second, 20*time.Second, time.Minute)
	for at := between(dice, time.Second, 20*time.Second); at < s.Load; {
		f := Fault{Number: len(s.Faults) + 1, Kind: "pause", At: at, Hold: between(dice, 0, hold), Topic: pick(dice, s.Topics...), Group: s.leasedGroup(dice)}
		s.Faults = append(s.Faults, f)
		at += f.Hold + between(dice, 15*time.Second, time.Minute) // pauses of one group must not overlap
	}
}

// pauseGroup pauses a group, as often as it takes until Redis has answered, and resumes it likewise.
func pauseGroup(s *simulation, f Fault) func() {
	s.strike(f, f.Group, rules.Effect{Ails: []string{f.Topic}, Pauses: true})
	group := s.schedule.Groups[f.Group].Name
	admin := s.newNode("admin", f.Number, redis.Options{ReadTimeout: time.Second, DialTimeout: time.Second})
	ctx, said := context.Background(), func(kind rules.Kind) { s.journal.add(f.Group, rules.Event{Kind: kind, Topic: f.Topic}) }
	again := func() { time.Sleep(100 * time.Millisecond) }
	err := goxstreams.Pause(ctx, admin.client, f.Topic, group)
	for ; err != nil && s.isLoaded(); err = goxstreams.Pause(ctx, admin.client, f.Topic, group) {
		again()
	}
	if err == nil {
		said(rules.Paused)
	}
	return func() {
		resume := func() error {
			said(rules.Resuming) // each time: a later pause may have begun, if the server refuses writes
			return goxstreams.Resume(ctx, admin.client, f.Topic, group)
		}
		for resume() != nil {
			if again(); s.isPaused(f) == noPause { // the group may be lost, and the pause with it
				break
			}
		}
		for s.snapshots.Load() > 0 || s.isPaused(f) == inForce { // a failover may bring it back
			again()
			_ = resume()
		}
		_ = admin.client.Close()
		admin.lane.kill(true)
	}
}

type pauseState int

const (
	noPause pauseState = iota
	resumed
	inForce
)

func (s *simulation) isPaused(f Fault) pauseState {
	switch value := s.do("HGET", xstream.ControlKey(f.Topic), "paused:"+s.schedule.Groups[f.Group].Name); value {
	case nil:
		return noPause
	default:
		if text(value) == "0" {
			return resumed
		}
		return inForce
	}
}
