package main

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

// pendingFilter is what pending shows, or changes.
type pendingFilter struct {
	consumer      string
	minIdle       time.Duration
	minDeliveries int64
	limit         int
}

func (f *pendingFilter) addTo(a *app, cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.consumer, "consumer", "", "only this consumer's")
	flags.DurationVar(&f.minIdle, "min-idle", 0, "only what nobody has renewed for this long, such as 2m")
	flags.Int64Var(&f.minDeliveries, "min-deliveries", 0, "only what was delivered this often")
	_ = cmd.RegisterFlagCompletionFunc("consumer", a.completeConsumer)
}

func (f *pendingFilter) check() error {
	switch {
	case f.minIdle < 0:
		return usagef("--min-idle cannot be negative")
	case f.minDeliveries < 0:
		return usagef("--min-deliveries cannot be negative")
	case f.limit < 0:
		return usagef("--limit cannot be negative")
	}
	return nil
}

// isSet reports whether something narrows the choice.
func (f *pendingFilter) isSet() bool { return f.consumer != "" || f.minIdle > 0 || f.minDeliveries > 0 }

func (a *app) pendingCommand() *cobra.Command {
	var f pendingFilter
	cmd := &cobra.Command{
		Use:   "pending TOPIC GROUP",
		Short: "List a group's pending entries; claim, release or ack them",
		Long: `List a group's pending entries, delivered and not acked, oldest first. AGE is that of the entry, IDLE
the time since its consumer received it or renewed its lease. Entries of the consumer "released" are
claimed by the next consumer that looks.

A topic that is called claim, release or ack: goxstreams pending -- claim GROUP`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			f.limit = a.defaultLimit(cmd, f.limit)
			return a.pending(cmd.Context(), args[0], args[1], f)
		},
	}
	f.addTo(a, cmd)
	addLimit(cmd.Flags(), &f.limit)
	cmd.AddCommand(a.claimCommand(), a.releaseCommand(), a.ackCommand())
	return cmd
}

// pendingRow is a line of pending.
type pendingRow struct {
	ID         string `json:"id"`
	Consumer   text   `json:"consumer"`
	Deliveries int64  `json:"deliveries"`
	IdleMS     int64  `json:"idle_ms"`
	AgeMS      int64  `json:"age_ms"`
}

func newPendingRow(p redis.XPendingExt) pendingRow {
	return pendingRow{p.ID, text(p.Consumer), p.RetryCount, p.Idle.Milliseconds(), time.Since(timeOf(p.ID)).Milliseconds()}
}

func (a *app) newPendingListing(like any) *listing {
	return a.newListing(like, "ID", "AGE", "IDLE", "DELIVERIES", "CONSUMER")
}

// pending prints a row about an entry, of which value is for scripts.
func (l *listing) pending(p redis.XPendingExt, value any) error {
	return l.row(value, p.ID, ago(time.Since(timeOf(p.ID))), ago(p.Idle), p.RetryCount, p.Consumer)
}

func (a *app) pending(ctx context.Context, topic, group string, f pendingFilter) error {
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	listing := a.newPendingListing(pendingRow{})
	shown := 0
	for p, err := range pendingEntries(ctx, client, topic, group, f) {
		if err != nil {
			return err
		}
		if f.limit > 0 && shown == f.limit {
			a.notef("There are more: --limit 0 shows all.")
			break
		}
		shown++
		if err := listing.pending(p, newPendingRow(p)); err != nil {
			return err
		}
	}
	if shown == 0 {
		a.notef("No pending entry matches.")
	}
	return listing.flush()
}

// pendingEntries returns what the filter leaves of a group's pending entries, whatever its limit is.
func pendingEntries(ctx context.Context, client redis.UniversalClient, topic, group string, f pendingFilter) iter.Seq2[redis.XPendingExt, error] {
	const page = 1000
	return func(yield func(redis.XPendingExt, error) bool) {
		query := redis.XPendingExtArgs{Stream: topic, Group: group, Idle: f.minIdle, Start: "-", End: "+", Count: page, Consumer: f.consumer}
		for {
			rows, err := client.XPendingExt(ctx, &query).Result()
			if err != nil {
				yield(redis.XPendingExt{}, groupError(err, topic, group))
				return
			}
			for _, p := range rows {
				if p.RetryCount >= f.minDeliveries && !yield(p, nil) {
					return
				}
			}
			if len(rows) < page {
				return
			}
			last, err := parseID(rows[len(rows)-1].ID)
			if err != nil {
				yield(redis.XPendingExt{}, err)
				return
			}
			query.Start = last.next().String()
		}
	}
}

func noGroup(err error) bool { return refused(err) && strings.HasPrefix(err.Error(), "NOGROUP") }

// groupError says in other words that there is no such group.
func groupError(err error, topic, group string) error {
	if noGroup(err) {
		return fmt.Errorf("topic %q has no group %q (see goxstreams groups)", topic, group)
	}
	return topicError(err, topic)
}

// topicError says in other words that there is no such stream.
func topicError(err error, topic string) error {
	switch {
	case noSuchKey(err):
		return fmt.Errorf("there is no stream %q (see goxstreams topics)", topic)
	case refused(err) && strings.HasPrefix(err.Error(), "WRONGTYPE"):
		return fmt.Errorf("the key %q is no stream (see goxstreams topics)", topic)
	}
	return err
}
