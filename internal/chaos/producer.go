package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// A Task is a message's payload: what its handler does.
type Task struct {
	Fails  int64         // the last delivery count that fails
	Poison bool          // fails always
	Deadly bool          // ends the process
	Work   time.Duration // before that
}

const (
	largestBatch = 20
	// Now and then there is more to do at once than the consumers can: faults shall find messages read ahead, and a backlog.
	burstEvery = 40
	burst      = 20
	// repeatDelay is the time from a call of unknown outcome to its repetition.
	repeatDelay = 20 * time.Millisecond
	// One message in delayEvery is delayed.
	delayEvery = 10
)

// A call is one of Publish's, and its repetitions.
type call struct {
	topic  string
	uuids  []string
	delays map[string]time.Duration // by UUID
	// since is when the delays began: a repetition has the same messages, down to their metadata. Zero: with the first call.
	since time.Time
	// unknown: the outcome of an earlier call of the same is.
	unknown bool
}

// newPublisher returns a Publisher whose broken messages are broken.
func newPublisher(settings Settings, client redis.UniversalClient, logger watermill.LoggerAdapter) (*goxstreams.Publisher, error) {
	config := goxstreams.PublisherConfig{Client: client, Marshaler: rules.Saboteur{}}
	if settings.Idempotence {
		config.Idempotence = &goxstreams.Idempotence{}
	}
	return goxstreams.NewPublisher(config, logger)
}

// produce publishes until it is told to end.
func (c child) produce(ctx context.Context) error {
	publisher, err := newPublisher(c.role.Settings, c.client, c.logger)
	if err != nil {
		return err
	}
	if c.role.Settings.Repeat {
		if err := c.goOn(publisher); err != nil {
			return err
		}
	}
	ticker := time.NewTicker(time.Duration(float64(time.Second) / c.role.Settings.Rate))
	defer ticker.Stop()
	for number := 0; ; {
		select {
		case <-ctx.Done():
			return publisher.Close()
		case <-ticker.C:
		}
		topic, calls := topics[c.dice.IntN(len(topics))].Name, 1
		if c.dice.IntN(burstEvery) == 0 {
			calls = burst
		}
		for range calls {
			uuids := make([]string, 1)
			if c.dice.IntN(3) == 0 || calls > 1 {
				uuids = make([]string, 2+c.dice.IntN(largestBatch-1))
			}
			delays := make(map[string]time.Duration)
			for i := range uuids {
				number++
				uuids[i] = fmt.Sprintf("%s-%s-%d-%d", c.nature(), c.role.Process, c.role.Life, number)
				if c.role.Settings.MaxDelay > 0 && c.dice.IntN(delayEvery) == 0 {
					delays[uuids[i]] = time.Duration(c.dice.Int64N(int64(c.role.Settings.MaxDelay)))
				}
			}
			if err := c.publish(publisher, &call{topic: topic, uuids: uuids, delays: delays}); err != nil {
				return err
			}
		}
	}
}

// goOn makes the call again whose outcome the last process in this place did not come to know.
func (c child) goOn(publisher *goxstreams.Publisher) error {
	events, err := readJournal(filepath.Join(c.role.Dir, c.role.Process+".jsonl"), nil)
	if err != nil {
		return err
	}
	var first, last rules.Event // of the last call
	for _, e := range events {
		if len(e.UUIDs) == 0 {
			continue
		}
		if last = e; !slices.Equal(first.UUIDs, e.UUIDs) {
			first = e
		}
	}
	if last.Kind != rules.Publishing && last.Kind != rules.Unknown {
		return nil
	}
	return c.publish(publisher, &call{last.Topic, last.UUIDs, first.Delays, first.Wall, true})
}

func (c child) nature() string {
	switch n := c.dice.IntN(1000); {
	case n < 50:
		return rules.Flaky
	case n < 60:
		return rules.Poison
	case n < 63:
		return rules.Slow
	case n < 68:
		return rules.Broken
	}
	return rules.Plain
}

// makeMessage makes the same message of the same UUID, in whichever process.
func makeMessage(settings Settings, uuid string) *message.Message {
	dice := rand.New(rand.NewPCG(settings.Seed, hash(uuid, 0)))
	task := Task{Work: time.Duration(dice.IntN(20_000)) * time.Microsecond}
	switch rules.Nature(uuid) {
	case rules.Flaky:
		task.Fails = 1 + dice.Int64N(2)
	case rules.Poison:
		task.Poison = true
	case rules.Slow:
		task.Work = 2 * settings.ClaimMinIdle
	case rules.Deadly:
		// What was claimed with it is done by then, and not a victim of every one of its crashes.
		task.Deadly, task.Work = true, settings.ClaimMinIdle/4
	}
	payload, err := json.Marshal(task)
	if err != nil {
		panic(err) // numbers only
	}
	return message.NewMessage(uuid, payload)
}

// publish publishes the messages, and again until that succeeds where calls are repeated and the outcome was unknown once. Its
// error is one that no repetition helps against.
func (c child) publish(publisher *goxstreams.Publisher, call *call) error {
	for {
		kind, err := publish(c.journal, publisher, c.role.Settings, call)
		if errors.Is(err, goxstreams.ErrUnsupported) {
			return err
		}
		call.unknown = kind == rules.Unknown
		if !call.unknown || !c.role.Settings.Repeat {
			return nil
		}
		time.Sleep(repeatDelay)
	}
}

// publish makes one call and logs what came of it.
func publish(journal *Journal, publisher *goxstreams.Publisher, settings Settings, call *call) (rules.Kind, error) {
	event := rules.Event{Kind: rules.Publishing, Topic: call.topic, UUIDs: call.uuids, Delays: call.delays}
	if began := journal.write(event).Wall; call.since.IsZero() {
		call.since = began
	}
	messages := make([]*message.Message, len(call.uuids))
	for i, uuid := range call.uuids {
		messages[i] = makeMessage(settings, uuid)
		if d, ok := call.delays[uuid]; ok {
			delayMessage(messages[i], call.since, d)
		}
	}
	event.Delays = nil
	err := publisher.Publish(call.topic, messages...)
	switch {
	case err == nil:
		event.Kind = rules.Published
	case call.unknown || errors.Is(err, goxstreams.ErrOutcomeUnknown):
		event.Kind, event.Error = rules.Unknown, err.Error()
	default:
		event.Kind, event.Error = rules.Refused, err.Error()
	}
	journal.write(event)
	return event.Kind, err
}

// delayMessage is delay.Message at an earlier time.
func delayMessage(msg *message.Message, since time.Time, d time.Duration) {
	delay.Message(msg, delay.For(d))
	msg.Metadata.Set(delay.DelayedUntilKey, since.Add(d).UTC().Format(time.RFC3339))
}
