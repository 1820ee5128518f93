package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// What a message is. Its UUID begins with it, so that it can be read in every log.
const (
	plain  = "plain"
	flaky  = "flaky"  // fails at first, then succeeds
	slow   = "slow"   // takes so much longer than ClaimMinIdle that others would take it over if its lease were not renewed
	poison = "poison" // always fails
)

func natureOf(uuid string) string {
	nature, _, _ := strings.Cut(uuid, "-")
	return nature
}

// A Task is a message's payload: what its handler does.
type Task struct {
	Fails  int64         // the last delivery count that fails
	Poison bool          // fails always
	Work   time.Duration // before that
}

const (
	largestBatch = 20
	// Now and then there is more to do at once than the consumers can: faults shall find messages read ahead, and a backlog.
	burstEvery = 40
	burst      = 20
)

// produce publishes until it is told to end.
func (c child) produce(ctx context.Context) error {
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: c.client}, c.logger)
	if err != nil {
		return err
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
			messages := make([]*message.Message, 1)
			if c.dice.IntN(3) == 0 || calls > 1 {
				messages = make([]*message.Message, 2+c.dice.IntN(largestBatch-1))
			}
			for i := range messages {
				number++
				messages[i] = c.makeMessage(number)
			}
			c.publish(publisher, topic, messages)
		}
	}
}

func (c child) makeMessage(number int) *message.Message {
	nature, task := plain, Task{Work: time.Duration(c.dice.IntN(20_000)) * time.Microsecond}
	switch n := c.dice.IntN(1000); {
	case n < 50:
		nature, task.Fails = flaky, 1+c.dice.Int64N(2)
	case n < 60:
		nature, task.Poison = poison, true
	case n < 63:
		nature, task.Work = slow, 2*c.role.Settings.ClaimMinIdle
	}
	payload, err := json.Marshal(task)
	if err != nil {
		panic(err) // numbers only
	}
	return message.NewMessage(fmt.Sprintf("%s-%s-%d-%d", nature, c.role.Process, c.role.Life, number), payload)
}

func (c child) publish(publisher *goxstreams.Publisher, topic string, messages []*message.Message) {
	event := Event{Kind: Publishing, Topic: topic}
	for _, msg := range messages {
		event.UUIDs = append(event.UUIDs, msg.UUID)
	}
	c.journal.write(event)
	err := publisher.Publish(topic, messages...)
	switch {
	case err == nil:
		event.Kind = Published
	case errors.Is(err, goxstreams.ErrOutcomeUnknown):
		event.Kind, event.Error = Unknown, err.Error()
	default:
		event.Kind, event.Error = Refused, err.Error()
	}
	c.journal.write(event)
}
