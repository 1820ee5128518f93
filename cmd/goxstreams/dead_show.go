package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/spf13/cobra"
)

func (a *app) showCommand() *cobra.Command {
	var f letterFilter
	cmd := &cobra.Command{
		Use:   "show TOPIC ID...|-",
		Short: "Show all of a dead letter",
		Long: `Show all of dead letters: how they died, and the message, JSON with line breaks, what is no text
as a hex dump. What a terminal would obey is escaped.
` + idsHelp,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			ids, err := a.readIDs(cmd.Context(), args[1:])
			if err != nil {
				return err
			}
			s, err := a.choose(cmd.Context(), args[0], f, ids, 0)
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
	listing := a.newListing(letterRow{})
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
		if a.forScripts() {
			row := newLetterRow(d)
			row.Fields = fieldPairs(d.Fields)
			if err != nil {
				row.Error = text(err.Error())
			}
			if err := listing.row(row); err != nil {
				return err
			}
			continue
		}
		if shown++; shown > 1 {
			a.printf("\n")
		}
		a.showLetter(d, err)
	}
	if err := listing.flush(); err != nil {
		return err
	}
	if missing {
		return errPartly
	}
	return nil
}

func (a *app) showLetter(d goxstreams.DeadMessage, err error) {
	a.showID(d.ID)
	if err != nil {
		a.showLine("Problem", err.Error())
		a.showFields(d.Fields)
		return
	}
	a.showLine("Died", d.DiedAt.Format(time.RFC3339Nano))
	a.showLine("Kind", string(d.Kind))
	a.showLine("Reason", d.Reason)
	a.showLine("Topic", d.Topic)
	a.showLine("Group", d.Group)
	a.showLine("Handler", d.Handler)
	a.showLine("Consumer", d.Consumer)
	a.showLine("Entry ID", d.EntryID)
	a.showLine("Deliveries", fmt.Sprint(d.Deliveries))
	a.showLine("Replays", fmt.Sprint(d.Replays))
	if d.Message == nil {
		a.showFields(d.Fields)
		return
	}
	a.showMessage(d.Message, d.Fields)
}

// showLine prints a line, unless the value is empty.
func (a *app) showLine(title, value string) {
	if value != "" {
		a.printf("%-12s%s\n", title, safe(value))
	}
}

func (a *app) showID(id string) {
	a.showLine("ID", id)
	a.showLine("Stored", fmt.Sprintf("%s (%s ago)", timeOf(id).Format(time.RFC3339), ago(time.Since(timeOf(id)))))
}

// showMessage shows a message, and the names of the fields that it was made of.
func (a *app) showMessage(msg *message.Message, fields []string) {
	a.showLine("UUID", msg.UUID)
	a.showContents(msg, fields)
}

// showContents is showMessage without the UUID.
func (a *app) showContents(msg *message.Message, fields []string) {
	if len(msg.Metadata) > 0 {
		a.printf("Metadata\n")
		for _, name := range slices.Sorted(maps.Keys(msg.Metadata)) {
			a.printf("  %s: %s\n", safe(name), safe(msg.Metadata[name]))
		}
	}
	a.printf("Payload, %d bytes\n%s\n", len(msg.Payload), block(msg.Payload))
	var sizes []string
	for i := 0; i+1 < len(fields); i += 2 {
		sizes = append(sizes, fmt.Sprintf("%s (%d bytes)", safe(short(fields[i], 80)), len(fields[i+1])))
	}
	a.showLine("Fields", strings.Join(sizes, ", "))
}

// showFields shows an entry that is no message.
func (a *app) showFields(fields []string) {
	for i := 0; i+1 < len(fields); i += 2 {
		a.printf("Field %s, %d bytes\n%s\n", safe(fields[i]), len(fields[i+1]), block([]byte(fields[i+1])))
	}
}
