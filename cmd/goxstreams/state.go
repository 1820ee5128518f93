package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
)

// topicState is what Redis holds of a topic.
type topicState struct {
	topic, deadTopic string

	err error // the first of the answers that is one: what belongs to it is unknown

	exists              bool
	length, deadLetters count
	added               count // since the stream began, if it was asked for
	groups              []groupState

	delayedState
	delayedErr error // the server refuses to say that: the rest is known all the same
}

// groupState is what Redis holds of a group.
type groupState struct {
	redis.XInfoGroup
	oldest time.Duration // since the first of the pending entries was published; 0: nothing is pending
	err    error         // oldest is not known
	paused *int          // 1 if the group is paused, 0 if not; nil: not known
	cutOff *float64      // entries that HardMaxLen cut off before the group acked them; nil: not known, or not asked for
}

// question is what to ask about topics.
type question struct {
	deadTopic     string // empty: the default one
	added, cutOff bool
}

// statesPage is how many topics are asked about at once.
const statesPage = 100

// states asks about topics: two round trips for a page of them. A context that ends in between ends
// it; a client that is waiting for an answer does not heed it.
func states(ctx context.Context, client redis.UniversalClient, topics []string, q question) []topicState {
	all := make([]topicState, 0, len(topics))
	for page := range slices.Chunk(topics, statesPage) {
		all = append(all, q.page(ctx, client, page)...)
	}
	return all
}

func (q question) page(ctx context.Context, client redis.UniversalClient, topics []string) []topicState {
	type answers struct {
		length, dead *redis.IntCmd
		delayed      delayedQuestion
		control      *redis.MapStringStringCmd
		retention    *redis.MapStringStringCmd
		stream       *redis.XInfoStreamCmd
		groups       *redis.XInfoGroupsCmd
	}
	page := make([]topicState, len(topics))
	asked := make([]answers, len(topics))
	_, _ = client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i, topic := range topics {
			s := &page[i]
			*s = topicState{topic: topic, deadTopic: q.deadTopic, length: unknown, deadLetters: unknown, added: unknown}
			if s.deadTopic == "" {
				s.deadTopic = goxstreams.DeadLetterTopic(topic)
			}
			asked[i] = answers{length: pipe.XLen(ctx, topic), dead: pipe.XLen(ctx, s.deadTopic), groups: pipe.XInfoGroups(ctx, topic), delayed: askDelayed(ctx, pipe, topic), control: pipe.HGetAll(ctx, controlKey(topic))}
			if q.added {
				asked[i].stream = pipe.XInfoStream(ctx, topic)
			}
			if q.cutOff {
				asked[i].retention = pipe.HGetAll(ctx, retentionKey(topic))
			}
		}
		return nil
	}) // the error is one of theirs
	for i, a := range asked {
		s := &page[i]
		s.length, s.deadLetters = s.number(a.length), s.number(a.dead)
		var err error
		if s.delayedState, err = a.delayed.answer(); err != nil && refused(err) {
			s.delayedErr = err
		} else if err != nil {
			s.fail(err)
		}
		switch groups, err := a.groups.Result(); {
		case noSuchKey(err):
		case err != nil:
			s.fail(err)
		default:
			s.exists = true
			for _, g := range groups {
				s.groups = append(s.groups, groupState{XInfoGroup: g, paused: pausedIn(a.control, g.Name), cutOff: cutOffIn(a.retention, g.Name)})
			}
		}
		for _, beside := range []*redis.MapStringStringCmd{a.control, a.retention} {
			if beside != nil && beside.Err() != nil && !refused(beside.Err()) {
				s.fail(beside.Err())
			}
		}
		if a.stream == nil {
			continue
		}
		if info, err := a.stream.Result(); err == nil && info.EntriesAdded > 0 {
			s.added = count(info.EntriesAdded)
		} else if err != nil && !noSuchKey(err) {
			s.fail(err)
		}
	}
	askOldest(ctx, client, page)
	return page
}

// askOldest asks for the ages of the groups' oldest pending entries.
func askOldest(ctx context.Context, client redis.UniversalClient, page []topicState) {
	asked := make(map[[2]int]*redis.XPendingCmd)
	_, _ = client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i, s := range page {
			for j, g := range s.groups {
				if g.Pending > 0 {
					asked[[2]int{i, j}] = pipe.XPending(ctx, s.topic, g.Name)
				}
			}
		}
		return nil
	}) // the error is one of theirs
	for at, cmd := range asked {
		s := &page[at[0]]
		g := &s.groups[at[1]]
		switch summary, err := cmd.Result(); {
		case err != nil:
			g.err = err
			s.fail(err)
		case summary.Count > 0:
			if published := timeOf(summary.Lower); published.UnixMilli() > 0 {
				g.oldest = max(0, time.Since(published))
			}
		}
	}
}

// beside is a key that the library keeps beside a topic, named as a dead-letter stream is.
func beside(topic, what string) string {
	return topic + "." + what + strings.TrimPrefix(goxstreams.DeadLetterTopic(topic), topic+".dead")
}

// controlKey has which groups are paused: docs/pause.md.
func controlKey(topic string) string { return beside(topic, "control") }

// retentionKey has what HardMaxLen has cut off: docs/retention.md.
func retentionKey(topic string) string { return beside(topic, "retention") }

// cutOffIn returns how many entries were cut off before the group acked them; nil if that was
// not asked for, or the server refuses to say.
func cutOffIn(retention *redis.MapStringStringCmd, group string) *float64 {
	if retention == nil || retention.Err() != nil {
		return nil
	}
	n, err := strconv.ParseFloat(cmp.Or(retention.Val()["cut "+group], "0"), 64)
	if err != nil {
		return nil
	}
	return &n
}

// pausedIn returns 1 if the group is paused, and 0 if not; nil if the server refuses to say.
func pausedIn(control *redis.MapStringStringCmd, group string) *int {
	fields, err := control.Result()
	switch since := fields["paused:"+group]; {
	case err != nil:
		return nil
	case since == "" || since == "0":
		return new(0)
	}
	return new(1)
}

// yesNo returns "yes", "no", or "-" for what is not known.
func yesNo(v *int) string {
	switch {
	case v == nil:
		return "-"
	case *v > 0:
		return "yes"
	}
	return "no"
}

func (s *topicState) number(cmd *redis.IntCmd) count {
	if err := cmd.Err(); err != nil {
		s.fail(err)
		return unknown
	}
	return count(cmd.Val())
}

// fail keeps the first error, or the first that is not the server's answer.
func (s *topicState) fail(err error) {
	if s.err == nil || refused(s.err) && !refused(err) {
		s.err = err
	}
}

// brokenOf returns the first error that is no answer of the server's: it does not answer at all.
func brokenOf(all []topicState) error {
	for _, s := range all {
		if s.err != nil && !refused(s.err) {
			return s.err
		}
	}
	return nil
}

// bounded returns what f does, or an error when the time is over. A client that waits for an answer
// heeds no context: f goes on, and what it returns then is lost.
func bounded[T any](ctx context.Context, bound time.Duration, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, bound, fmt.Errorf("no answer within %v", bound))
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		defer cancel()
		value, err := f(ctx)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		select {
		case r := <-done: // its cancel was it
			return r.value, r.err
		default:
		}
		var none T
		return none, context.Cause(ctx)
	}
}
