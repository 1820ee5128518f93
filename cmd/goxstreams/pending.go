package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

// pendingFilter is what pending shows.
type pendingFilter struct {
	consumer      string
	minIdle       time.Duration
	minDeliveries int64
	limit         int
}

func (a *app) pendingCommand() *cobra.Command {
	var f pendingFilter
	cmd := &cobra.Command{
		Use:   "pending TOPIC GROUP",
		Short: "List what a group has been given and has not acked",
		Long: `List what a group has been given and has not acked, oldest first. AGE is that of the entry, IDLE
the time since its holder took it or renewed its lease. What is pending at the consumer "released"
was given back, and is taken by the next one that looks.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.minIdle < 0 || f.minDeliveries < 0 || f.limit < 0 {
				return usagef("--min-idle, --min-deliveries and --limit cannot be negative")
			}
			f.limit = a.defaultLimit(cmd, f.limit)
			return a.pending(cmd.Context(), args[0], args[1], f)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.consumer, "consumer", "", "only this consumer's")
	flags.DurationVar(&f.minIdle, "min-idle", 0, "only what nobody has renewed for this long, such as 2m")
	flags.Int64Var(&f.minDeliveries, "min-deliveries", 0, "only what was delivered this often")
	addLimit(flags, &f.limit)
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

func (a *app) pending(ctx context.Context, topic, group string, f pendingFilter) error {
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	const page = 1000
	query := redis.XPendingExtArgs{Stream: topic, Group: group, Idle: f.minIdle, Start: "-", End: "+", Count: page, Consumer: f.consumer}
	table := newTable(a.out, "ID", "AGE", "IDLE", "DELIVERIES", "CONSUMER")
	shown := 0
	for {
		rows, err := client.XPendingExt(ctx, &query).Result()
		if err != nil {
			if noGroup(err) {
				return fmt.Errorf("topic %q has no group %q (see goxstreams groups)", topic, group)
			}
			return err
		}
		for _, p := range rows {
			if p.RetryCount < f.minDeliveries {
				continue
			}
			if f.limit > 0 && shown == f.limit {
				a.notef("There are more: --limit 0 shows all.")
				return table.Flush()
			}
			shown++
			age := time.Since(timeOf(p.ID))
			if a.json {
				err = a.printJSON(pendingRow{p.ID, text(p.Consumer), p.RetryCount, p.Idle.Milliseconds(), age.Milliseconds()})
			} else {
				err = table.row(p.ID, ago(age), ago(p.Idle), p.RetryCount, p.Consumer)
			}
			if err != nil {
				return err
			}
		}
		if len(rows) < page {
			break
		}
		query.Start = "(" + rows[len(rows)-1].ID
	}
	if shown == 0 {
		a.notef("Nothing is pending that is asked for.")
	}
	return table.Flush()
}

func noGroup(err error) bool { return refused(err) && strings.HasPrefix(err.Error(), "NOGROUP") }

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
