package main

import (
	"context"
	"errors"
	"fmt"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

func (a *app) exportCommand() *cobra.Command {
	var f letterFilter
	cmd := &cobra.Command{
		Use:   "export TOPIC",
		Short: "Write dead letters to standard output, for dead import",
		Long: `Write a topic's dead letters to standard output, oldest first, one JSON object per line, whatever
--output says: all fields of the entry as they are ("entry"; what is not UTF-8 is {"base64": ".."}), its
ID, and, for reading, how the message died, its UUID and its metadata. goxstreams dead import stores
them again, here or on another server. They stay in the dead-letter stream.

It holds a page of letters in memory, however many there are. What dies while it runs is not exported.
` + filterHelp,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.choose(cmd.Context(), args[0], f, nil, 0)
			if err != nil {
				return err
			}
			return a.export(cmd.Context(), s)
		},
	}
	f.addTo(cmd)
	f.addForeign(cmd.Flags())
	return cmd
}

// exportRow is a line of an export: an entry, and what it says for somebody who reads the file.
type exportRow struct {
	letterRow
	Entry [][2]text `json:"entry"` // name, value: all fields, in the stream's order
}

func newExportRow(id string, fields []string) (exportRow, goxstreams.DeadMessage, error) {
	d, err := goxstreams.ReadDeadLetter(id, fields)
	row := exportRow{newLetterRow(d), fieldPairs(fields)}
	row.Payload, row.Fields = nil, nil // the entry has both
	if err != nil {
		row.Error = text(err.Error())
	}
	return row, d, err
}

func (a *app) export(ctx context.Context, s *selection) error {
	bar, err := a.newBar(ctx, s, "export")
	if err != nil {
		return err
	}
	var exported, gone int64
	var page []entryID
	write := func() error {
		entries, err := entriesOf(ctx, a.client, s.stream, page)
		if err != nil {
			return err
		}
		for _, id := range page {
			fields, ok := entries[id.String()]
			if !ok {
				gone++
				continue
			}
			exported++
			row, _, _ := newExportRow(id.String(), fields)
			if err := a.printJSON(row); err != nil {
				return err
			}
		}
		page = page[:0]
		bar.set(s.seen)
		return nil
	}
	for d, err := range s.all(ctx) {
		if err == nil {
			id, _ := parseID(d.ID) // Redis wrote it
			page = append(page, id)
		}
		if err == nil && len(page) == batch {
			err = write()
		}
		if ctx.Err() != nil {
			err = errors.New("interrupted: the export is not complete")
		}
		if err != nil {
			bar.end()
			return err
		}
	}
	err = write()
	bar.end()
	if err != nil {
		return err
	}
	s.note(a)
	if gone > 0 {
		a.notef("%d were replayed or deleted meanwhile, and are left out.", gone)
	}
	a.notef("%s exported.", number(exported))
	return nil
}

// entry is one of a stream with its fields as they are: name, value, ..
type entry struct {
	id     string
	fields []string
}

// entriesIn reads the answer to XRANGE. go-redis's own type for it loses the order of the fields,
// and all but one of those with the same name.
func entriesIn(cmd *redis.Cmd) ([]entry, error) {
	answer, err := cmd.Slice()
	if err != nil {
		return nil, err
	}
	entries := make([]entry, len(answer))
	for i, e := range answer {
		parts, ok := e.([]any)
		if ok = ok && len(parts) == 2; ok {
			entries[i].id, ok = parts[0].(string)
		}
		if ok {
			entries[i].fields, ok = stringsIn(parts[1])
		}
		if !ok {
			return nil, fmt.Errorf("XRANGE: the server's answer has no entry at %d, but %T", i, e)
		}
	}
	return entries, nil
}

func stringsIn(answer any) ([]string, bool) {
	values, ok := answer.([]any)
	all := make([]string, len(values))
	for i := 0; ok && i < len(values); i++ {
		all[i], ok = values[i].(string)
	}
	return all, ok
}
