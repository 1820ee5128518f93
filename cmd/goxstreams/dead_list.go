package main

import (
	"cmp"
	"context"
	"io"
	"maps"
	"regexp"
	"slices"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/spf13/cobra"
)

func (a *app) listCommand() *cobra.Command {
	var f letterFilter
	var limit int
	cmd := &cobra.Command{
		Use:               "list TOPIC",
		Short:             "List dead letters, oldest first",
		Long:              "List a topic's dead letters, oldest first.\n" + filterHelp,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.choose(cmd.Context(), args[0], f, nil, a.defaultLimit(cmd, limit))
			if err != nil {
				return err
			}
			return a.list(cmd.Context(), s)
		},
	}
	f.addTo(cmd)
	f.addForeign(cmd.Flags())
	addLimit(cmd.Flags(), &limit)
	return cmd
}

func (a *app) list(ctx context.Context, s *selection) error {
	listing := a.newLetterListing()
	none := true
	for d, err := range s.all(ctx) {
		if err == nil {
			err = listing.letter(d, "")
		}
		if err != nil {
			return err
		}
		none = false
	}
	if err := listing.flush(); err != nil {
		return err
	}
	if none && !a.forScripts() {
		s.noteNone(a)
	}
	s.note(a)
	return nil
}

func (a *app) newLetterListing() *listing {
	return a.newListing(letterRow{}, "ID", "AGE", "KIND", "GROUP", "HANDLER", "DELIVERIES", "REPLAYS", "REASON")
}

// letter prints a row about a letter: what it is, and, for scripts, what is done to it.
func (l *listing) letter(d goxstreams.DeadMessage, result string) error {
	row := newLetterRow(d)
	row.Result = result
	return l.row(row, d.ID, ago(time.Since(timeOf(d.ID))), dash(string(d.Kind)), dash(d.Group), dash(d.Handler), d.Deliveries, d.Replays, short(d.Reason, 80))
}

// dash is s for a table, cut to 40 characters, and never empty.
func dash(s string) string { return cmp.Or(short(s, 40), "-") }

// letterRow is a dead letter for scripts.
type letterRow struct {
	ID         string          `json:"id"`
	Result     string          `json:"result,omitempty"` // of replay and delete
	Error      text            `json:"error,omitempty"`
	DiedAt     *time.Time      `json:"died_at,omitempty"`
	Kind       text            `json:"kind,omitempty"`
	Topic      text            `json:"topic,omitempty"`
	Group      text            `json:"group,omitempty"`
	Handler    text            `json:"handler,omitempty"`
	Consumer   text            `json:"consumer,omitempty"`
	Reason     text            `json:"reason,omitempty"`
	EntryID    text            `json:"entry_id,omitempty"`
	Deliveries int64           `json:"deliveries"`
	Replays    int             `json:"replays"`
	UUID       text            `json:"uuid,omitempty"`
	Metadata   map[string]text `json:"metadata,omitempty"`
	Payload    *text           `json:"payload,omitempty"`
	Fields     [][2]text       `json:"fields,omitempty"` // name, value: of what has no message, and by show
}

func newLetterRow(d goxstreams.DeadMessage) letterRow {
	row := letterRow{
		ID: d.ID, Kind: text(d.Kind), Topic: text(d.Topic), Group: text(d.Group), Handler: text(d.Handler), Consumer: text(d.Consumer),
		Reason: text(d.Reason), EntryID: text(d.EntryID), Deliveries: d.Deliveries, Replays: d.Replays,
	}
	if !d.DiedAt.IsZero() {
		row.DiedAt = &d.DiedAt
	}
	if d.Message == nil {
		row.Fields = fieldPairs(d.Fields)
		return row
	}
	row.UUID, row.Metadata, row.Payload = text(d.Message.UUID), texts(d.Message.Metadata), new(text(d.Message.Payload))
	return row
}

func fieldPairs(fields []string) [][2]text {
	pairs := make([][2]text, 0, len(fields)/2)
	for i := 0; i+1 < len(fields); i += 2 {
		pairs = append(pairs, [2]text{text(fields[i]), text(fields[i+1])})
	}
	return pairs
}

func (a *app) summaryCommand() *cobra.Command {
	var f letterFilter
	cmd := &cobra.Command{
		Use:   "summary TOPIC",
		Short: "Count dead letters by kind, group, handler and reason",
		Long: `Count a topic's dead letters by kind, group, handler and reason. Numbers, and words with digits,
are "#" in the reasons, so that those that differ by an ID are one; after HTTP, status, code, SQLSTATE and
errno they stay. EXAMPLE is the newest one's ID, for goxstreams dead show.
` + filterHelp,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.choose(cmd.Context(), args[0], f, nil, 0)
			if err != nil {
				return err
			}
			return a.summary(cmd.Context(), s)
		},
	}
	f.addTo(cmd)
	return cmd
}

func (a *app) summary(ctx context.Context, s *selection) error {
	sum := summary{}
	bar, err := a.newBar(ctx, s, "looking")
	if err != nil {
		return err
	}
	for d, err := range s.all(ctx) {
		if err != nil {
			bar.end()
			return err
		}
		sum.add(d)
		bar.set(s.seen)
	}
	bar.end()
	if a.forScripts() {
		listing := a.newListing(causeRow{})
		for _, row := range sum.sorted() {
			if err := listing.row(row); err != nil {
				return err
			}
		}
		if err := listing.flush(); err != nil {
			return err
		}
	} else if err := a.printSummary(a.out, sum, 0); err != nil {
		return err
	} else if total := sum.total(); total > 0 {
		a.notef("%s in all.", number(total))
	} else {
		s.noteNone(a)
	}
	s.note(a)
	return nil
}

// cause is what letters of one row of a summary have in common.
type cause struct {
	Kind    text `json:"kind"`
	Group   text `json:"group"`
	Handler text `json:"handler"`
	Reason  text `json:"reason"`
}

// causeRow is a row of a summary.
type causeRow struct {
	Count int64 `json:"count"`
	cause
	Oldest string `json:"oldest_id"`
	Newest string `json:"newest_id"`
}

// summary has a row for each cause.
type summary map[cause]*causeRow

// maxCauses bounds the memory, however many reasons there are. Further ones are one row.
const maxCauses = 1000

// variable is what tells one letter's reason from another's with the same cause.
var variable = regexp.MustCompile(`(?i)(\b(?:http|status|code|sqlstate|errno)[ :=]*)?[0-9a-z_-]*[0-9][0-9a-z_-]*(?:[.:][0-9a-z_-]*[0-9][0-9a-z_-]*)*`)

func (sum summary) add(d goxstreams.DeadMessage) {
	reason := variable.ReplaceAllStringFunc(d.Reason, func(s string) string {
		if variable.FindStringSubmatch(s)[1] != "" {
			return s
		}
		return "#"
	})
	c := cause{text(d.Kind), text(d.Group), text(d.Handler), text(reason)}
	row := sum[c]
	if row == nil && len(sum) >= maxCauses {
		c = cause{"", "", "", "(other reasons)"}
		row = sum[c]
	}
	if row == nil {
		row = &causeRow{cause: c, Oldest: d.ID}
		sum[c] = row
	}
	row.Count++
	row.Newest = d.ID
}

func (sum summary) total() (n int64) {
	for _, row := range sum {
		n += row.Count
	}
	return n
}

// sorted returns the rows, the most frequent cause first.
func (sum summary) sorted() []*causeRow {
	return slices.SortedFunc(maps.Values(sum), func(a, b *causeRow) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Oldest, b.Oldest))
	})
}

// printSummary prints a row for each cause, or for so many.
func (a *app) printSummary(w io.Writer, sum summary, most int) error {
	t := newTable(w, "COUNT", "KIND", "GROUP", "HANDLER", "OLDEST", "NEWEST", "EXAMPLE", "REASON")
	for i, row := range sum.sorted() {
		if most > 0 && i == most {
			a.notef("and %d causes more", len(sum)-most)
			break
		}
		age := func(id string) string { return ago(time.Since(timeOf(id))) }
		if err := t.row(row.Count, dash(string(row.Kind)), dash(string(row.Group)), dash(string(row.Handler)),
			age(row.Oldest), age(row.Newest), row.Newest, short(string(row.Reason), 80)); err != nil {
			return err
		}
	}
	return t.Flush()
}
