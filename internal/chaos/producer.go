package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"time"

	"github.com/ThreeDotsLabs/watermill"
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
)

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
			for i := range uuids {
				number++
				uuids[i] = fmt.Sprintf("%s-%s-%d-%d", c.nature(), c.role.Process, c.role.Life, number)
			}
			if err := c.publish(publisher, topic, uuids, false); err != nil {
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
	var last rules.Event
	for _, e := range events {
		if len(e.UUIDs) > 0 {
			last = e
		}
	}
	if last.Kind != rules.Publishing && last.Kind != rules.Unknown {
		return nil
	}
	return c.publish(publisher, last.Topic, last.UUIDs, true)
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
func (c child) publish(publisher *goxstreams.Publisher, topic string, uuids []string, unknown bool) error {
	for {
		kind, err := publish(c.journal, publisher, c.role.Settings, topic, uuids, unknown)
		if errors.Is(err, goxstreams.ErrUnsupported) {
			return err
		}
		unknown = kind == rules.Unknown
		if !unknown || !c.role.Settings.Repeat {
			return nil
		}
		time.Sleep(repeatDelay)
	}
}

// publish makes one call and logs what came of it. unknown: the outcome of an earlier call of the same is.
func publish(journal *Journal, publisher *goxstreams.Publisher, settings Settings, topic string, uuids []string, unknown bool) (rules.Kind, error) {
	messages := make([]*message.Message, len(uuids))
	for i, uuid := range uuids {
		messages[i] = makeMessage(settings, uuid)
	}
	event := rules.Event{Kind: rules.Publishing, Topic: topic, UUIDs: uuids}
	journal.write(event)
	err := publisher.Publish(topic, messages...)
	switch {
	case err == nil:
		event.Kind = rules.Published
	case unknown || errors.Is(err, goxstreams.ErrOutcomeUnknown):
		event.Kind, event.Error = rules.Unknown, err.Error()
	default:
		event.Kind, event.Error = rules.Refused, err.Error()
	}
	journal.write(event)
	return event.Kind, err
}
