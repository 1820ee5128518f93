package main

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

func (a *app) topicsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "topics [PATTERN]",
		Short: "List streams: length, groups, pending, lag, dead letters, delayed messages",
		Long: `List the streams of the database, or of all of a Cluster, by SCAN. PATTERN is one of Redis's,
such as 'orders*'. PENDING is the sum over the groups, LAG the greatest of them; "-" is what
Redis does not know. Dead letters are those in the topic's stream of the default name. DELAYED messages are not
in the stream yet, OVERDUE is how long the first of them has been due.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.topics(cmd.Context(), strings.Join(args, ""))
		},
	}
}

// topicRow is a line of topics.
type topicRow struct {
	Topic       text  `json:"topic"`
	Length      count `json:"length"`
	Groups      count `json:"groups"`
	Pending     count `json:"pending"` // of all groups
	MaxLag      count `json:"max_lag"`
	DeadLetters count `json:"dead_letters"`
	DeadTopic   text  `json:"dead_letter_topic"`
	Delayed     count `json:"delayed"`

	Overdue *float64 `json:"overdue_seconds"`
}

func (a *app) topics(ctx context.Context, pattern string) error {
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	names, err := streamNames(ctx, client, pattern)
	if err != nil {
		return err
	}
	listing := a.newListing(topicRow{}, "TOPIC", "LENGTH", "GROUPS", "PENDING", "LAG", "DEAD", "DELAYED", "OVERDUE")
	var denied error
	for page := range slices.Chunk(names, 100) {
		rows, err := topicRows(ctx, client, page)
		if err != nil && !refused(err) {
			return err
		}
		if denied == nil {
			denied = err
		}
		for _, r := range rows {
			delayed, overdue := delayedState{r.Delayed, r.Overdue}.cells()
			if err := listing.row(r, string(r.Topic), r.Length, r.Groups, r.Pending, r.MaxLag, r.DeadLetters, delayed, overdue); err != nil {
				return err
			}
		}
	}
	if denied != nil {
		a.notef("Some numbers are not known: %s", explain(denied))
	}
	return listing.flush()
}

// streamNames returns the sorted names of streams, without those dead-letter streams whose
// topic is among them.
func streamNames(ctx context.Context, client redis.UniversalClient, pattern string) ([]string, error) {
	if pattern == "" {
		pattern = "*"
	}
	names := make(map[string]bool) // SCAN may say one twice
	nodes, err := mastersOf(ctx, client)
	if err != nil {
		return nil, err
	}
	for _, node := range nodes {
		scan := node.ScanType(ctx, 0, pattern, 1000, "stream").Iterator()
		for scan.Next(ctx) {
			names[scan.Val()] = true
		}
		if err := scan.Err(); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Collect(maps.Keys(names)) {
		if names[name] {
			delete(names, goxstreams.DeadLetterTopic(name))
		}
	}
	return slices.Sorted(maps.Keys(names)), nil
}

func mastersOf(ctx context.Context, client redis.UniversalClient) ([]redis.Cmdable, error) {
	cluster, ok := client.(*redis.ClusterClient)
	if !ok {
		return []redis.Cmdable{client}, nil
	}
	var mu sync.Mutex
	var nodes []redis.Cmdable
	err := cluster.ForEachMaster(ctx, func(_ context.Context, node *redis.Client) error {
		mu.Lock()
		defer mu.Unlock()
		nodes = append(nodes, node)
		return nil
	})
	return nodes, err
}

// topicRows asks about streams. What the server refuses is unknown, and the error says why;
// after another error there are no rows. A stream that is gone has no row.
func topicRows(ctx context.Context, client redis.UniversalClient, names []string) ([]topicRow, error) {
	type answers struct {
		length, dead *redis.IntCmd
		groups       *redis.XInfoGroupsCmd
		delayed      delayedQuestion
	}
	asked := make([]answers, len(names))
	_, _ = client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i, name := range names {
			asked[i] = answers{pipe.XLen(ctx, name), pipe.XLen(ctx, goxstreams.DeadLetterTopic(name)), pipe.XInfoGroups(ctx, name), askDelayed(ctx, pipe, name)}
		}
		return nil
	}) // the error is one of theirs
	var first error
	fail := func(err error) {
		if first == nil || !refused(err) {
			first = err
		}
	}
	number := func(cmd *redis.IntCmd) count {
		if err := cmd.Err(); err != nil {
			fail(err)
			return unknown
		}
		return count(cmd.Val())
	}
	rows := make([]topicRow, 0, len(names))
	for i, name := range names {
		q := asked[i]
		r := topicRow{Topic: text(name), DeadTopic: text(goxstreams.DeadLetterTopic(name)), Length: number(q.length), DeadLetters: number(q.dead)}
		switch err := q.groups.Err(); {
		case err == nil:
			r.Groups = count(len(q.groups.Val()))
			for _, g := range q.groups.Val() {
				r.Pending += count(g.Pending)
				if r.MaxLag != unknown {
					r.MaxLag = max(r.MaxLag, count(g.Lag))
				}
				if g.Lag < 0 {
					r.MaxLag = unknown
				}
			}
		case noSuchKey(err):
			continue
		default:
			r.Groups, r.Pending, r.MaxLag = unknown, unknown, unknown
			fail(err)
		}
		delayed, err := q.delayed.answer()
		if err != nil {
			fail(err)
		}
		r.Delayed, r.Overdue = delayed.delayed, delayed.overdue
		rows = append(rows, r)
	}
	if first != nil && !refused(first) {
		return nil, first
	}
	return rows, first
}

func noSuchKey(err error) bool { return refused(err) && strings.Contains(err.Error(), "no such key") }

func (a *app) groupsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "groups TOPIC",
		Short: "List a topic's consumer groups",
		Long: `List a topic's consumer groups. LAG is how many entries a group has not read yet, "-" where
Redis does not know it. OLDEST is the age of the oldest entry that is pending. PAUSED is yes for a group that
was paused ("group pause").`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.groups(cmd.Context(), args[0]) },
	}
}

// groupRow is a line of groups.
type groupRow struct {
	Topic         text   `json:"topic"`
	Group         text   `json:"group"`
	Consumers     int64  `json:"consumers"`
	Pending       int64  `json:"pending"`
	Lag           count  `json:"lag"`
	LastDelivered string `json:"last_delivered_id"`
	OldestPending string `json:"oldest_pending_id,omitempty"`
	Paused        *int   `json:"paused"` // 1: the group is paused
}

func (a *app) groups(ctx context.Context, topic string) error {
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	groups, err := client.XInfoGroups(ctx, topic).Result()
	if err != nil {
		return topicError(err, topic)
	}
	control := client.HGetAll(ctx, controlKey(topic))
	if err := control.Err(); err != nil && !refused(err) {
		return err
	}
	listing := a.newListing(groupRow{}, "GROUP", "CONSUMERS", "PENDING", "LAG", "LAST DELIVERED", "OLDEST", "PAUSED")
	for _, g := range groups {
		r := groupRow{text(topic), text(g.Name), g.Consumers, g.Pending, count(g.Lag), g.LastDeliveredID, "", pausedIn(control, g.Name)}
		oldest := "-"
		if g.Pending > 0 {
			summary, err := client.XPending(ctx, topic, g.Name).Result()
			if err != nil && !noGroup(err) { // it may be gone since
				return err
			}
			if err == nil && summary.Count > 0 {
				r.OldestPending = summary.Lower
				oldest = ago(time.Since(timeOf(summary.Lower)))
			}
		}
		if err := listing.row(r, g.Name, r.Consumers, r.Pending, r.Lag, r.LastDelivered, oldest, yesNo(r.Paused)); err != nil {
			return err
		}
	}
	if len(groups) == 0 {
		a.notef("%q has no groups.", topic)
	}
	return listing.flush()
}
