package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

func (a *app) delayedCommand() *cobra.Command {
	delayed := &cobra.Command{
		Use:   "delayed",
		Short: "List, show, cancel and reschedule delayed messages",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usagef("which: delayed list, show, cancel or reschedule?")
		},
	}
	delayed.AddCommand(a.listDelayedCommand(), a.showDelayedCommand(), a.cancelCommand(), a.rescheduleCommand())
	return delayed
}

// schedule returns the Schedule of a topic.
func (a *app) schedule(ctx context.Context, topic string) (*goxstreams.Schedule, error) {
	if topic == "" {
		return nil, usagef("TOPIC is empty")
	}
	client, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	return goxstreams.NewSchedule(client, topic)
}

// errNotDelayed is about a UUID.
var errNotDelayed = errors.New("not found: it is in the stream already, was cancelled, or was never delayed")

// delayedError puts errNotDelayed in the place of the library's error about a UUID.
func delayedError(err error) error {
	if errors.As(err, new(*goxstreams.NotFoundError)) {
		return errNotDelayed
	}
	return err
}

// delayedRow is a delayed message for scripts.
type delayedRow struct {
	Topic    text            `json:"topic"`
	UUID     text            `json:"uuid"`
	Due      time.Time       `json:"due"`
	In       float64         `json:"in_seconds"` // negative: it is overdue
	Size     count           `json:"size"`       // bytes of all its fields
	Metadata map[string]text `json:"metadata,omitempty"`
	Payload  *text           `json:"payload,omitempty"`
	Fields   [][2]text       `json:"fields,omitempty"` // name, value: of what is no message, and of show
	Error    text            `json:"error,omitempty"`  // why it cannot be read
}

func newDelayedRow(topic string, d goxstreams.DelayedMessage, err error) delayedRow {
	row := delayedRow{Topic: text(topic), UUID: text(d.UUID), Due: d.Due.UTC(), In: time.Until(d.Due).Seconds()}
	for _, field := range d.Fields {
		row.Size += count(len(field))
	}
	switch {
	case err != nil:
		row.Size, row.Error = unknown, text(err.Error())
	case d.Message == nil:
		row.Fields = fieldPairs(d.Fields)
	default:
		row.setMessage(d.Message)
	}
	return row
}

func (r *delayedRow) setMessage(msg *message.Message) {
	r.Metadata, r.Payload = texts(msg.Metadata), new(text(msg.Payload))
}

const dueFormat = "2006-01-02T15:04:05.000Z"

// until returns how long it is until a time.
func until(due time.Time) string {
	if in := time.Until(due); in >= 0 {
		return ago(in)
	}
	return "overdue " + ago(time.Since(due))
}

// delayedListing prints delayed messages.
type delayedListing struct{ *listing }

func (a *app) newDelayedListing(like any) delayedListing {
	return delayedListing{a.newListing(like, "UUID", "DUE", "IN", "SIZE")}
}

// delayed prints one; for scripts as value, which has row in it.
func (l delayedListing) delayed(row delayedRow, value any) error {
	if err := l.row(value, string(row.UUID), row.Due.Format(dueFormat), until(row.Due), row.Size); err != nil {
		return err
	}
	if row.Error != "" && !l.a.forScripts() {
		l.a.notef("%s: %s", row.UUID, row.Error)
	}
	return nil
}

func (a *app) listDelayedCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:   "list TOPIC",
		Short: "List delayed messages, in the order in which they are due",
		Long: `List the delayed messages of a topic that are not in the stream yet, in the order in which they are due. DUE
is by the server's clock, IN by this machine's, SIZE the bytes of all fields.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit < 0 {
				return usagef("--limit cannot be negative")
			}
			return a.listDelayed(cmd.Context(), args[0], a.defaultLimit(cmd, limit))
		},
	}
	addLimit(cmd.Flags(), &limit)
	return cmd
}

func (a *app) listDelayed(ctx context.Context, topic string, limit int) error {
	schedule, err := a.schedule(ctx, topic)
	if err != nil {
		return err
	}
	listing := a.newDelayedListing(delayedRow{})
	listed, more := 0, false
	for d, err := range schedule.All(ctx) {
		if err != nil && d.UUID == "" {
			return err
		}
		if more = limit > 0 && listed == limit; more {
			break
		}
		listed++
		row := newDelayedRow(topic, d, err)
		if err := listing.delayed(row, row); err != nil {
			return err
		}
	}
	if err := listing.flush(); err != nil {
		return err
	}
	switch {
	case more:
		a.notef("There are more: --limit 0 is all.")
	case listed == 0:
		a.notef("%q has no delayed messages.", topic)
	}
	return nil
}

func (a *app) showDelayedCommand() *cobra.Command {
	var body goxstreams.BodyMarshaler
	cmd := &cobra.Command{
		Use:   "show TOPIC UUID...|-",
		Short: "Show all of a delayed message",
		Long: `Show all of delayed messages: when they are due, and the message, JSON with line breaks, what is no
text as a hex dump. What a terminal would obey is escaped.
` + uuidsHelp,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeDelayed,
		RunE: func(cmd *cobra.Command, args []string) error {
			uuids, err := a.readUUIDs(cmd.Context(), args[1:])
			if err != nil {
				return err
			}
			return a.showDelayed(cmd.Context(), args[0], uuids, body)
		},
	}
	addBody(cmd.Flags(), &body)
	return cmd
}

func (a *app) showDelayed(ctx context.Context, topic string, uuids []string, body goxstreams.BodyMarshaler) error {
	schedule, err := a.schedule(ctx, topic)
	if err != nil {
		return err
	}
	listing := a.newListing(delayedRow{})
	shown, missing := 0, false
	for _, uuid := range uuids {
		d, err := schedule.Get(ctx, uuid)
		switch err = delayedError(err); {
		case err == errNotDelayed:
			a.notef("%s: %v", uuid, err)
			missing = true
			continue
		case err != nil && d.UUID == "":
			return err
		}
		if shown++; shown > 1 && !a.forScripts() {
			a.printf("\n")
		}
		if err := a.showOneDelayed(listing, newDelayedRow(topic, d, err), d, body); err != nil {
			return err
		}
	}
	if err := listing.flush(); err != nil {
		return err
	}
	if missing {
		return errPartly
	}
	return nil
}

// showOneDelayed shows a message, or says why it is not delayed.
func (a *app) showOneDelayed(listing *listing, row delayedRow, d goxstreams.DelayedMessage, body goxstreams.BodyMarshaler) error {
	row.Fields = fieldPairs(d.Fields)
	msg := d.Message
	if msg == nil && row.Error == "" {
		var err error
		if msg, err = decode(valuesOf(d.Fields), body); err != nil {
			row.Error = text(err.Error())
		} else {
			row.setMessage(msg)
		}
	}
	if a.forScripts() {
		return listing.row(row)
	}
	a.showLine("UUID", d.UUID)
	a.showLine("Due", fmt.Sprintf("%s (%s)", row.Due.Format(dueFormat), inWords(d.Due)))
	if row.Error != "" {
		a.showLine("Problem", string(row.Error))
		a.showFields(d.Fields)
		return nil
	}
	a.showContents(msg, d.Fields)
	return nil
}

// inWords is until for the middle of a sentence.
func inWords(due time.Time) string {
	if time.Until(due) >= 0 {
		return "in " + until(due)
	}
	return until(due)
}

const uuidsHelp = `
"-" in place of the UUIDs reads them from standard input, one on a line.
`

// readUUIDs returns each UUID once, in the order given.
func (a *app) readUUIDs(ctx context.Context, args []string) ([]string, error) {
	var uuids []string
	seen := make(map[string]bool)
	err := a.eachID(ctx, args, func(uuid string) error {
		if uuid == "" {
			return usagef("a UUID is empty")
		}
		if !seen[uuid] {
			seen[uuid] = true
			uuids = append(uuids, uuid)
		}
		return nil
	})
	return uuids, err
}

// completeDelayed completes a topic, and UUIDs of its delayed messages.
func (a *app) completeDelayed(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.completeTopic(cmd, args, prefix)
	}
	return a.complete(cmd, func(ctx context.Context) ([]string, error) {
		schedule, err := a.schedule(ctx, args[0])
		if err != nil {
			return nil, err
		}
		var uuids []string
		for d, err := range schedule.All(ctx) {
			if err != nil && d.UUID == "" || len(uuids) == defaultLimit {
				return uuids, err
			}
			if !slices.Contains(args[1:], d.UUID) {
				uuids = append(uuids, d.UUID)
			}
		}
		return uuids, nil
	})
}

// delayedQuestion asks how many messages of a topic are delayed, within a pipeline.
type delayedQuestion struct {
	count *redis.IntCmd
	first *redis.ZSliceCmd
}

func askDelayed(ctx context.Context, pipe redis.Pipeliner, topic string) delayedQuestion {
	key := dueKey(topic)
	return delayedQuestion{pipe.ZCard(ctx, key), pipe.ZRangeWithScores(ctx, key, 0, 0)}
}

// dueKey has what waits to be due: docs/delayed.md.
func dueKey(topic string) string { return beside(topic, "due") }

// delayedState is how many messages of a topic are delayed.
type delayedState struct {
	delayed count
	overdue *float64 // seconds since the first of them has been due; nil: not known
}

func (q delayedQuestion) answer() (delayedState, error) {
	first, err := q.first.Result()
	if err = errors.Join(q.count.Err(), err); err != nil {
		return delayedState{delayed: unknown}, err
	}
	s := delayedState{count(q.count.Val()), new(0.0)}
	if len(first) > 0 {
		*s.overdue = max(0, time.Since(time.UnixMilli(int64(first[0].Score))).Seconds())
	}
	return s, nil
}

// cells returns what a table shows.
func (s delayedState) cells() (delayed count, overdue string) {
	if s.overdue == nil || s.delayed == 0 {
		return s.delayed, "-"
	}
	return s.delayed, ago(time.Duration(*s.overdue * float64(time.Second)))
}
