package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// delayedFlags are what cancel and reschedule have in common.
type delayedFlags struct{ dryRun, yes bool }

func (f *delayedFlags) addTo(flags *pflag.FlagSet) {
	flags.BoolVar(&f.dryRun, "dry-run", false, "show what would be done, and do nothing")
	flags.BoolVarP(&f.yes, "yes", "y", false, "do not ask")
}

// delayedChange cancels or reschedules delayed messages.
type delayedChange struct {
	tally
	delayedFlags
	topic    string
	schedule *goxstreams.Schedule
	uuids    []string
	verb     string
	to       *time.Time // when they are due from now on; nil: they are cancelled
}

func (a *app) cancelCommand() *cobra.Command {
	var f delayedFlags
	cmd := &cobra.Command{
		Use:   "cancel TOPIC UUID...|-",
		Short: "Cancel delayed messages for good",
		Long: `Cancel delayed messages for good: they are never delivered. A message that is due meanwhile is in the
stream already: it is named, and not cancelled.
` + uuidsHelp,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeDelayed,
		RunE: func(cmd *cobra.Command, args []string) error {
			c := &delayedChange{tally: tally{a: a, verbed: "cancelled", byUUID: true}, delayedFlags: f, topic: args[0], verb: "cancel"}
			return c.run(cmd.Context(), args[1:])
		},
	}
	f.addTo(cmd.Flags())
	return cmd
}

func (a *app) rescheduleCommand() *cobra.Command {
	var f delayedFlags
	cmd := &cobra.Command{
		Use:   "reschedule TOPIC TIME UUID...|-",
		Short: "Change when delayed messages are due",
		Long: `Change when delayed messages are due. TIME is a time such as 2026-11-24T06:00:00Z, or a duration from now, such as
90m, 12h or 3d, also with a plus sign. A time in the past, or 0s, makes them due at once. Their metadata do not
change.
` + uuidsHelp,
		Args: cobra.MinimumNArgs(3),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.completeDelayed(cmd, args, prefix)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			to, err := parseDue(args[1], time.Now())
			if err != nil {
				return err
			}
			c := &delayedChange{tally: tally{a: a, verbed: "rescheduled", byUUID: true}, delayedFlags: f, topic: args[0], verb: "reschedule", to: &to}
			return c.run(cmd.Context(), args[2:])
		},
	}
	f.addTo(cmd.Flags())
	return cmd
}

// maxDelay is the library's.
const maxDelay = 10 * 365 * 24 * time.Hour

// parseDue reads a time, or a duration from now.
func parseDue(value string, now time.Time) (time.Time, error) {
	at, err := time.Parse(time.RFC3339, value)
	if d, ageErr := parseAge(value); ageErr == nil {
		at, err = now.Add(d), nil
	}
	switch {
	case err != nil || at.IsZero():
		return at, usagef("TIME: %q is neither a time such as 2026-11-24T06:00:00Z, nor a duration from now such as 90m, 12h or 3d", value)
	case at.Sub(now) > maxDelay:
		return at, usagef("TIME: %s is more than ten years away", value)
	}
	return at, nil
}

func (c *delayedChange) run(ctx context.Context, args []string) error {
	if c.topic == "" {
		return usagef("TOPIC is empty")
	}
	err := c.a.mayAsk(c.dryRun, c.yes, fromInput(args))
	if err != nil {
		return err
	}
	if c.uuids, err = c.a.readUUIDs(ctx, args); err != nil {
		return err
	}
	if c.schedule, err = c.a.schedule(ctx, c.topic); err != nil {
		return err
	}
	if c.dryRun {
		return c.pretend(ctx)
	}
	c.listing = c.a.newListing(changedRow{})
	if !c.yes {
		if err := c.ask(ctx); err != nil {
			return err
		}
	}
	err = cmp.Or(c.change(ctx), c.listing.flush())
	return c.end(ctx, err, delayedMessages(c.done))
}

// chosen calls use for each of the messages, and reports those that do not exist.
func (c *delayedChange) chosen(ctx context.Context, use func(delayedRow) error) error {
	for _, uuid := range c.uuids {
		d, err := c.schedule.Get(ctx, uuid)
		switch err = delayedError(err); {
		case err == errNotDelayed:
			c.failed++
			err = c.report(uuid, "failed", err)
		case err == nil || d.UUID != "":
			err = use(newDelayedRow(c.topic, d, err))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// delayedChoice is a row of a dry run.
type delayedChoice struct {
	delayedRow
	Result string `json:"result"`
}

func (c *delayedChange) pretend(ctx context.Context) error {
	listing := c.a.newDelayedListing(delayedChoice{})
	c.listing = listing.listing
	var chosen int64
	err := c.chosen(ctx, func(row delayedRow) error {
		chosen++
		return listing.delayed(row, delayedChoice{row, "would be " + c.verbed})
	})
	if err = cmp.Or(err, listing.flush()); err != nil {
		return err
	}
	c.a.notef("%s would be %s%s. Nothing is done.", delayedMessages(chosen), c.verbed, c.target())
	if c.failed > 0 {
		return errPartly
	}
	return nil
}

// target says where a rescheduled message goes.
func (c *delayedChange) target() string {
	if c.to == nil {
		return ""
	}
	return " to " + c.to.UTC().Format(dueFormat)
}

// ask shows when the messages are due, and wants a yes. Nothing else is changed then.
func (c *delayedChange) ask(ctx context.Context) error {
	var found []string
	var first, last time.Time
	err := c.chosen(ctx, func(row delayedRow) error {
		found = append(found, string(row.UUID))
		if first.IsZero() || row.Due.Before(first) {
			first = row.Due
		}
		if row.Due.After(last) {
			last = row.Due
		}
		return nil
	})
	if c.uuids = found; err != nil || len(found) == 0 {
		return err
	}
	due := first.Format(dueFormat)
	if !first.Equal(last) {
		due = fmt.Sprintf("from %s to %s", due, last.Format(dueFormat))
	}
	return c.a.confirm(ctx, "%s %s of %q, due %s%s?", capital(c.verb), delayedMessages(int64(len(found))), c.topic, due, c.target())
}

// change changes one message after the other.
func (c *delayedChange) change(ctx context.Context) error {
	for _, uuid := range c.uuids {
		if ctx.Err() != nil {
			return ctx.Err() // between two calls: what is counted is all that is done
		}
		err := delayedError(c.changeOne(context.WithoutCancel(ctx), uuid))
		result := c.verbed
		switch {
		case err == nil:
			c.done++
		case errors.Is(err, goxstreams.ErrOutcomeUnknown) || err != errNotDelayed && !refused(err):
			result = "unknown"
			c.unknown++
		default:
			result = "failed"
			c.failed++
		}
		if err := c.report(uuid, result, err); err != nil {
			return err
		}
		if err != nil && err != errNotDelayed {
			return err
		}
	}
	return nil
}

func (c *delayedChange) changeOne(ctx context.Context, uuid string) error {
	if c.to == nil {
		return c.schedule.Cancel(ctx, uuid)
	}
	return c.schedule.Reschedule(ctx, uuid, *c.to)
}

// delayedMessages returns "1 delayed message", "2 delayed messages".
func delayedMessages(n int64) string {
	if n == 1 {
		return "1 delayed message"
	}
	return fmt.Sprintf("%d delayed messages", n)
}
