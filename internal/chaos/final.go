package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

const page = 1000

// finalState reads all topics: entries, dead letters, pending entries.
func finalState(ctx context.Context, client redis.UniversalClient) (map[string]rules.TopicState, error) {
	states := make(map[string]rules.TopicState)
	for _, topic := range topics {
		var state rules.TopicState
		var err error
		if state.Entries, err = entriesOf(ctx, client, topic.Name); err != nil {
			return nil, err
		}
		if state.Pending, err = pendingOf(ctx, client, topic.Name); err != nil {
			return nil, err
		}
		if state.Dead, err = lettersOf(ctx, client, topic.Name); err != nil {
			return nil, err
		}
		if state.Waiting, err = waitingIn(ctx, client, topic.Name); err != nil {
			return nil, err
		}
		states[topic.Name] = state
	}
	return states, nil
}

// trimmed returns an event for each entry that somebody had and that is not there any more. Only one that was handled, or is dead,
// may be missing: the rules see to that.
func trimmed(events []rules.Event, final map[string]rules.TopicState) []rules.Event {
	type place struct{ topic, id string }
	seen := make(map[place]string)
	last := time.Duration(0)
	for _, e := range events {
		if last = max(last, e.Mono); e.Kind == rules.Started || e.Kind == rules.Dead {
			seen[place{e.Topic, e.ID}] = e.UUID
		}
	}
	for topic, state := range final {
		for _, letter := range state.Dead {
			seen[place{topic, letter.EntryID}] = letter.UUID
		}
	}
	for topic, state := range final {
		for _, entry := range state.Entries {
			delete(seen, place{topic, entry.ID})
		}
	}
	var all []rules.Event
	for at, uuid := range seen {
		all = append(all, rules.Event{Kind: rules.Trimmed, Mono: last, Topic: at.topic, ID: at.id, UUID: uuid})
	}
	return all
}

func entriesOf(ctx context.Context, client redis.UniversalClient, topic string) ([]rules.Entry, error) {
	var entries []rules.Entry
	for from := "-"; ; {
		got, err := client.XRangeN(ctx, topic, from, "+", page).Result()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", topic, err)
		}
		for _, e := range got {
			uuid, ok := e.Values[goxstreams.UUIDHeaderKey].(string)
			if !ok {
				return nil, fmt.Errorf("entry %s of %s has no UUID", e.ID, topic)
			}
			entries = append(entries, rules.Entry{ID: e.ID, UUID: uuid})
			from = "(" + e.ID
		}
		if len(got) < page {
			return entries, nil
		}
	}
}

// pendingOf returns nothing if there is no group.
func pendingOf(ctx context.Context, client redis.UniversalClient, topic string) ([]rules.Pending, error) {
	var pending []rules.Pending
	for from := "-"; ; {
		got, err := client.XPendingExt(ctx, &redis.XPendingExtArgs{Stream: topic, Group: group, Start: from, End: "+", Count: page}).Result()
		if noGroup(err) {
			return nil, nil
		} else if err != nil {
			return nil, fmt.Errorf("pending of %s: %w", topic, err)
		}
		for _, p := range got {
			pending = append(pending, rules.Pending{ID: p.ID, Consumer: p.Consumer, Count: p.RetryCount})
			from = "(" + p.ID
		}
		if len(got) < page {
			return pending, nil
		}
	}
}

func noGroup(err error) bool {
	var reply redis.Error
	return errors.As(err, &reply) && (strings.HasPrefix(err.Error(), "NOGROUP") || strings.Contains(err.Error(), "no such key"))
}

// waitingIn returns the delayed messages that are not moved yet. In the end there must be none: none is delayed for longer than
// the end is waited for.
func waitingIn(ctx context.Context, client redis.UniversalClient, topic string) (uuids []string, err error) {
	schedule, err := goxstreams.NewSchedule(client, topic)
	if err != nil {
		return nil, err
	}
	for delayed, err := range schedule.All(ctx) {
		if delayed.UUID == "" {
			return nil, fmt.Errorf("delayed messages of %s: %w", topic, err)
		}
		uuids = append(uuids, delayed.UUID)
	}
	return uuids, nil
}

func lettersOf(ctx context.Context, client redis.UniversalClient, topic string) ([]rules.Letter, error) {
	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic(topic))
	if err != nil {
		return nil, err
	}
	var letters []rules.Letter
	for dead, err := range queue.All(ctx, "") {
		if err != nil {
			return nil, fmt.Errorf("dead letters of %s: %w", topic, err)
		}
		letters = append(letters, rules.Letter{
			ID: dead.ID, EntryID: dead.EntryID, UUID: rules.UUIDOf(dead), Consumer: dead.Consumer, Reason: dead.Reason,
			Deliveries: dead.Deliveries, At: monotonic() - time.Since(timeOf(dead.ID)),
		})
	}
	return letters, nil
}

// timeOf returns when the entry was added, by the server's clock.
func timeOf(id string) time.Time {
	text, _, _ := strings.Cut(id, "-")
	ms, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		panic(fmt.Sprintf("%q is no ID of Redis's", id))
	}
	return time.UnixMilli(ms)
}

// progress is how far a group is; done: nothing is left for it.
type progress struct {
	done      bool
	pending   int64
	delivered string
}

func progressOf(ctx context.Context, client redis.UniversalClient, topic string) (progress, error) {
	groups, err := client.XInfoGroups(ctx, topic).Result()
	if noGroup(err) {
		return progress{done: true}, nil // no stream, nothing to do
	} else if err != nil {
		return progress{}, err
	}
	for _, g := range groups {
		if g.Name != group {
			continue
		}
		// Not by the lag, which Redis does not always know.
		rest, err := client.XRangeN(ctx, topic, "("+g.LastDeliveredID, "+", 1).Result()
		return progress{g.Pending == 0 && len(rest) == 0, g.Pending, g.LastDeliveredID}, err
	}
	return progress{}, nil // the group has yet to be recreated
}
