package main

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *app) consumersCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "consumers TOPIC GROUP",
		Short: "List a group's consumers: pending, idle",
		Long: `List a group's consumers. PENDING counts the entries that were delivered to it and not acked. IDLE is the
time since it last asked for anything, INACTIVE since it last received something or renewed a lease: before
Redis 7.2 that is IDLE. "released" is no process: entries there were released, and are claimed by the
next consumer that looks.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.consumers(cmd.Context(), args[0], args[1])
		},
	}
}

// consumerRow is a line of consumers.
type consumerRow struct {
	Topic      text  `json:"topic"`
	Group      text  `json:"group"`
	Consumer   text  `json:"consumer"`
	Pending    int64 `json:"pending"`
	IdleMS     int64 `json:"idle_ms"`
	InactiveMS count `json:"inactive_ms"` // unknown: it was never given anything
}

func (a *app) consumers(ctx context.Context, topic, group string) error {
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	consumers, err := client.XInfoConsumers(ctx, topic, group).Result()
	if err != nil {
		return groupError(err, topic, group)
	}
	listing := a.newListing(consumerRow{}, "CONSUMER", "PENDING", "IDLE", "INACTIVE")
	for _, c := range consumers {
		row := consumerRow{text(topic), text(group), text(c.Name), c.Pending, c.Idle.Milliseconds(), unknown}
		inactive := "-"
		if c.Inactive >= 0 {
			row.InactiveMS, inactive = count(c.Inactive.Milliseconds()), ago(c.Inactive)
		}
		if err := listing.row(row, c.Name, c.Pending, ago(c.Idle), inactive); err != nil {
			return err
		}
	}
	if len(consumers) == 0 {
		a.notef("%q has no consumers.", group)
	}
	return listing.flush()
}
