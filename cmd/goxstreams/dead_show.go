package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/spf13/cobra"
)

func (a *app) showCommand() *cobra.Command {
	var f letterFilter
	cmd := &cobra.Command{
		Use:   "show TOPIC ID...",
		Short: "Show all of a dead letter",
		Long: `Show all of dead letters: how they died, and the message, JSON with line breaks, what is no text
as a hex dump. What a terminal would obey is escaped.`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.choose(cmd.Context(), args[0], f, args[1:], 0)
			if err != nil {
				return err
			}
			return a.show(cmd.Context(), s)
		},
	}
	f.addStream(cmd.Flags())
	return cmd
}

func (a *app) show(ctx context.Context, s *selection) error {
	missing := false
	shown := 0
	for d, err := range s.all(ctx) {
		switch {
		case err != nil && d.ID == "":
			return err
		case err == errGone:
			a.notef("%s: %v", d.ID, err)
			missing = true
			continue
		}
		if a.json {
			row := newLetterRow(d)
			row.Fields = fieldPairs(d.Fields)
			if err != nil {
				row.Error = text(err.Error())
			}
			if err := a.printJSON(row); err != nil {
				return err
			}
			continue
		}
		if shown++; shown > 1 {
			a.printf("\n")
		}
		a.showLetter(d, err)
	}
	if missing {
		return errPartly
	}
	return nil
}

func (a *app) showLetter(d goxstreams.DeadMessage, err error) {
	line := func(title, value string) {
		if value != "" {
			a.printf("%-12s%s\n", title, safe(value))
		}
	}
	line("ID", d.ID)
	line("Stored", fmt.Sprintf("%s (%s ago)", timeOf(d.ID).Format(time.RFC3339), ago(time.Since(timeOf(d.ID)))))
	if err != nil {
		line("Problem", err.Error())
		a.showFields(d.Fields)
		return
	}
	line("Died", d.DiedAt.Format(time.RFC3339Nano))
	line("Kind", string(d.Kind))
	line("Reason", d.Reason)
	line("Topic", d.Topic)
	line("Group", d.Group)
	line("Handler", d.Handler)
	line("Consumer", d.Consumer)
	line("Entry ID", d.EntryID)
	line("Deliveries", fmt.Sprint(d.Deliveries))
	line("Replays", fmt.Sprint(d.Replays))
	if d.Message == nil {
		a.showFields(d.Fields)
		return
	}
	line("UUID", d.Message.UUID)
	if len(d.Message.Metadata) > 0 {
		a.printf("Metadata\n")
		for _, name := range slices.Sorted(maps.Keys(d.Message.Metadata)) {
			a.printf("  %s: %s\n", safe(name), safe(d.Message.Metadata[name]))
		}
	}
	a.printf("Payload, %d bytes\n%s\n", len(d.Message.Payload), block(d.Message.Payload))
	var fields []string
	for i := 0; i+1 < len(d.Fields); i += 2 {
		fields = append(fields, fmt.Sprintf("%s (%d bytes)", safe(short(d.Fields[i], 80)), len(d.Fields[i+1])))
	}
	line("Fields", strings.Join(fields, ", "))
}

// showFields shows an entry that is no message.
func (a *app) showFields(fields []string) {
	for i := 0; i+1 < len(fields); i += 2 {
		a.printf("Field %s, %d bytes\n%s\n", safe(fields[i]), len(fields[i+1]), block([]byte(fields[i+1])))
	}
}
