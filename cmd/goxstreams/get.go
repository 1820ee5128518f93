package main

import (
	"context"
	"errors"
	"slices"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

func (a *app) getCommand() *cobra.Command {
	var body goxstreams.BodyMarshaler
	cmd := &cobra.Command{
		Use:   "get TOPIC ID...|-",
		Short: "Show all of a stream's entries with these IDs",
		Long: `Show all of a stream's entries with these IDs: the message, JSON with line breaks, what is no text as a
hex dump, and the entry's fields. What a terminal would obey is escaped. It takes nothing from anybody.
` + idsHelp,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			ids, err := a.readIDs(cmd.Context(), args[1:])
			if err != nil {
				return err
			}
			return a.get(cmd.Context(), args[0], ids, body)
		},
	}
	addBody(cmd.Flags(), &body)
	return cmd
}

// entryRow is an entry for scripts.
type entryRow struct {
	ID       string          `json:"id"`
	Time     time.Time       `json:"time"`
	UUID     text            `json:"uuid,omitempty"`
	Metadata map[string]text `json:"metadata,omitempty"`
	Payload  *text           `json:"payload,omitempty"`
	Error    text            `json:"error,omitempty"` // why it is no message
	Fields   [][2]text       `json:"fields"`          // name, value
}

var errNoEntry = errors.New("not found: it was trimmed or deleted, or never was there")

func (a *app) get(ctx context.Context, topic string, ids []entryID, body goxstreams.BodyMarshaler) error {
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	listing := a.newListing(entryRow{})
	shown, missing := 0, false
	for page := range slices.Chunk(ids, batch) {
		found, err := entriesOf(ctx, client, topic, page)
		if err != nil {
			return topicError(err, topic)
		}
		for _, id := range page {
			fields, ok := found[id.String()]
			if !ok {
				a.notef("%s: %v", id, errNoEntry)
				missing = true
				continue
			}
			if shown++; shown > 1 && !a.forScripts() {
				a.printf("\n")
			}
			if err := a.showEntry(listing, id, fields, body); err != nil {
				return err
			}
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

// entriesOf returns the fields of entries, in their order, as name, value, ...
func entriesOf(ctx context.Context, client redis.UniversalClient, topic string, ids []entryID) (map[string][]string, error) {
	asked := make([]*redis.Cmd, len(ids))
	_, _ = client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i, id := range ids {
			// Not XRange, which makes a map of the fields: several may have one name.
			asked[i] = pipe.Do(ctx, "xrange", topic, id.String(), id.String())
		}
		return nil
	}) // the error is one of theirs
	found := make(map[string][]string)
	for i, cmd := range asked {
		entries, err := entriesIn(cmd)
		if err != nil {
			return nil, err
		}
		if len(entries) > 0 {
			found[ids[i].String()] = entries[0].fields
		}
	}
	return found, nil
}

// valuesOf returns the fields as a Marshaler knows them.
func valuesOf(fields []string) map[string]any {
	values := make(map[string]any, len(fields)/2)
	for i := 0; i+1 < len(fields); i += 2 {
		values[fields[i]] = fields[i+1]
	}
	return values
}

func (a *app) showEntry(listing *listing, id entryID, fields []string, body goxstreams.BodyMarshaler) error {
	msg, err := decode(valuesOf(fields), body)
	if a.forScripts() {
		row := entryRow{ID: id.String(), Time: id.time(), Fields: fieldPairs(fields)}
		if err != nil {
			row.Error = text(err.Error())
		} else {
			row.UUID, row.Metadata, row.Payload = text(msg.UUID), texts(msg.Metadata), new(text(msg.Payload))
		}
		return listing.row(row)
	}
	a.showID(id.String())
	if err != nil {
		a.showLine("Problem", err.Error())
		a.showFields(fields)
		return nil
	}
	a.showMessage(msg, fields)
	return nil
}
