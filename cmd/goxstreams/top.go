package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

// topOrders are what --sort takes: the rows that come first have the most of it.
var topOrders = map[string]func(topRow) float64{
	"lag":     func(r topRow) float64 { return float64(r.Lag) },
	"length":  func(r topRow) float64 { return float64(r.Length) },
	"in":      func(r topRow) float64 { return known(r.In) },
	"out":     func(r topRow) float64 { return known(r.Out) },
	"pending": func(r topRow) float64 { return float64(r.Pending) },
	"oldest":  func(r topRow) float64 { return known(r.Oldest) },
	"dead":    func(r topRow) float64 { return float64(r.DeadLetters) },
	"delayed": func(r topRow) float64 { return float64(r.Delayed) },
	"overdue": func(r topRow) float64 { return known(r.Overdue) },
	"topic":   func(topRow) float64 { return 0 },
}

var topSorts = []string{"lag", "length", "in", "out", "pending", "oldest", "dead", "delayed", "overdue", "topic"}

func known(v *float64) float64 {
	if v == nil {
		return -1
	}
	return *v
}

// top is what the flags say, and what was seen.
type top struct {
	a        *app
	pattern  string
	interval time.Duration
	count    int
	sort     string

	names  []string
	listed time.Time
	rows   []topRow
	last   map[string]topicState // nil: nothing was seen yet
	at     time.Time             // of last
	denied error                 // what the server refused to say of a topic
}

func (a *app) topCommand() *cobra.Command {
	t := &top{a: a}
	cmd := &cobra.Command{
		Use:   "top [PATTERN]",
		Short: "Watch topics and groups: length, lag, pending, rates, dead letters, delayed messages",
		Long: `Watch topics and their groups. IN/S is how many entries are added to the stream, OUT/S how many the
group is given for the first time, both per second since the last look; "-" is what is not known, as both are at
first. OLDEST is the age of the oldest pending entry. PAUSED is yes for a group that was paused ("group pause"). DELAYED messages are not in the stream yet, OVERDUE is how
long the first of them has been due.

A terminal is painted anew each time, as far as the rows fit. Elsewhere, and with json and csv, one look follows
the other. New topics are noticed within half a minute. Ctrl-C ends it.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			t.pattern = strings.Join(args, "")
			switch {
			case t.interval < 100*time.Millisecond:
				return usagef("--interval must be 100ms or more")
			case t.count < 0:
				return usagef("--count cannot be negative")
			case topOrders[t.sort] == nil:
				return usagef("--sort: %q is none of %s", t.sort, strings.Join(topSorts, ", "))
			}
			client, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			return t.run(cmd.Context(), client)
		},
	}
	flags := cmd.Flags()
	flags.DurationVar(&t.interval, "interval", 2*time.Second, "time from one look to the next")
	flags.IntVarP(&t.count, "count", "n", 0, "end after this many looks; 0: go on until Ctrl-C")
	flags.StringVar(&t.sort, "sort", "lag", "what has most of it comes first: "+strings.Join(topSorts, ", "))
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(topSorts, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// topRow is a topic and one of its groups, or a topic without groups.
type topRow struct {
	Time        time.Time `json:"time"`
	Topic       text      `json:"topic"`
	Group       *text     `json:"group"`
	Length      count     `json:"length"`
	In          *float64  `json:"in_per_second"`
	Lag         count     `json:"lag"`
	Out         *float64  `json:"out_per_second"`
	Pending     count     `json:"pending"`
	Oldest      *float64  `json:"oldest_pending_seconds"`
	Consumers   count     `json:"consumers"`
	Paused      *int      `json:"paused"` // 1: the group is paused
	DeadLetters count     `json:"dead_letters"`
	Delayed     count     `json:"delayed"`
	Overdue     *float64  `json:"overdue_seconds"`
}

func (t *top) run(ctx context.Context, client redis.UniversalClient) error {
	listing := t.a.newListing(topRow{})
	ticker := time.NewTicker(t.interval)
	defer ticker.Stop()
	for n := 1; ; n++ {
		failed := t.look(ctx, client)
		switch {
		case ctx.Err() != nil:
			return nil
		case failed != nil && t.last == nil:
			return failed // nothing was seen yet: most likely it is the address
		}
		if err := t.show(listing, n, failed); err != nil {
			return err
		}
		if n == t.count {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// look asks Redis, and makes rows of the answers. After an error the rows are the last ones.
func (t *top) look(ctx context.Context, client redis.UniversalClient) error {
	type answer struct {
		names  []string
		states []topicState
	}
	const relist, bound = 30 * time.Second, 10 * time.Second
	names := t.names
	list := time.Since(t.listed) > relist
	at := time.Now()
	got, err := bounded(ctx, bound, func(ctx context.Context) (answer, error) {
		if list {
			var err error
			if names, err = streamNames(ctx, client, t.pattern); err != nil {
				return answer{}, err
			}
		}
		all := states(ctx, client, names, question{added: true})
		return answer{names, all}, brokenOf(all)
	})
	if err != nil {
		return err
	}
	if list {
		t.names, t.listed = got.names, at
	}
	t.rows, t.denied = nil, nil
	last := make(map[string]topicState, len(got.states))
	for _, s := range got.states {
		last[s.topic] = s
		t.denied = cmp.Or(t.denied, s.err, s.delayedErr)
		t.rows = append(t.rows, t.rowsOf(s, at)...)
	}
	t.last, t.at = last, at
	order := topOrders[t.sort]
	slices.SortStableFunc(t.rows, func(a, b topRow) int { return cmp.Compare(order(b), order(a)) })
	return nil
}

// rowsOf returns the rows of a topic, compared with the last look.
func (t *top) rowsOf(s topicState, at time.Time) []topRow {
	before := t.last[s.topic]
	elapsed := at.Sub(t.at).Seconds()
	// rate is of what only grows: what became less began anew.
	rate := func(now, then int64, known bool) *float64 {
		if !known || now < then {
			return nil
		}
		return new(float64(now-then) / elapsed)
	}
	row := topRow{
		Time: at.UTC(), Topic: text(s.topic), Length: s.length, DeadLetters: s.deadLetters, Delayed: s.delayed, Overdue: s.overdue, Lag: unknown, Pending: unknown, Consumers: unknown,
		In: rate(int64(s.added), int64(before.added), before.exists && s.added != unknown && before.added != unknown),
	}
	if len(s.groups) == 0 {
		return []topRow{row}
	}
	rows := make([]topRow, len(s.groups))
	for i, g := range s.groups {
		r := row
		r.Group, r.Lag, r.Pending, r.Consumers = new(text(g.Name)), max(count(g.Lag), unknown), count(g.Pending), count(g.Consumers)
		r.Paused = g.paused
		if g.err == nil {
			r.Oldest = new(g.oldest.Seconds())
		}
		if j := slices.IndexFunc(before.groups, func(b groupState) bool { return b.Name == g.Name }); j >= 0 {
			b := before.groups[j]
			r.Out = rate(g.EntriesRead, b.EntriesRead, g.Lag >= 0 && b.Lag >= 0) // without a lag Redis knows neither
		}
		rows[i] = r
	}
	return rows
}

// show prints a look, or paints it on a terminal.
func (t *top) show(listing *listing, n int, failed error) error {
	switch {
	case failed != nil && (t.a.size == nil || t.a.forScripts()):
		t.a.notef("Redis does not answer: %s", explain(failed))
		return nil
	case t.a.forScripts():
		for _, r := range t.rows {
			if err := listing.row(r); err != nil {
				return err
			}
		}
		return errors.Join(listing.flush(), t.a.out.Flush())
	}
	lines, err := t.lines(failed)
	if err != nil {
		return err
	}
	if t.a.size == nil {
		if n > 1 {
			t.a.printf("\n")
		}
		t.a.printf("%s\n", strings.Join(lines, "\n"))
		return t.a.out.Flush()
	}
	width, height := t.a.size()
	if n == 1 {
		t.a.printf("\x1b[2J")
	}
	t.a.printf("\x1b[H")
	for i, line := range lines {
		if i == height-1 { // the last line stays free, for the cursor
			break
		}
		t.a.printf("%s\x1b[K\n", cut(line, width))
	}
	t.a.printf("\x1b[J")
	return t.a.out.Flush()
}

// lines returns a header and a table.
func (t *top) lines(failed error) ([]string, error) {
	header := fmt.Sprintf("%s  topics: %d", t.at.UTC().Format(time.RFC3339), len(t.last))
	if failed != nil {
		header += "  Redis does not answer: " + safe(explain(failed))
	}
	if t.denied != nil {
		header += "  Some numbers are not known: " + safe(explain(t.denied))
	}
	var buf bytes.Buffer
	table := newTable(&buf, "TOPIC", "GROUP", "LENGTH", "IN/S", "LAG", "OUT/S", "PENDING", "OLDEST", "CONSUMERS", "PAUSED", "DEAD", "DELAYED", "OVERDUE")
	for _, r := range t.rows {
		group := "-"
		if r.Group != nil {
			group = short(string(*r.Group), 40)
		}
		oldest := "-"
		if r.Oldest != nil && r.Pending > 0 {
			oldest = ago(time.Duration(*r.Oldest * float64(time.Second)))
		}
		delayed, overdue := delayedState{r.Delayed, r.Overdue}.cells()
		if err := table.row(short(string(r.Topic), 60), group, r.Length, perSecond(r.In), r.Lag, perSecond(r.Out), r.Pending, oldest, r.Consumers, yesNo(r.Paused), r.DeadLetters, delayed, overdue); err != nil {
			return nil, err
		}
	}
	err := table.Flush()
	return append([]string{header}, strings.Split(strings.TrimSuffix(buf.String(), "\n"), "\n")...), err
}

func perSecond(v *float64) string {
	switch {
	case v == nil:
		return "-"
	case *v > 0 && *v < 10:
		return fmt.Sprintf("%.1f", *v)
	}
	return fmt.Sprintf("%.0f", *v)
}

// cut returns as many characters of a line as are in a terminal's.
func cut(line string, width int) string {
	if utf8.RuneCountInString(line) <= width {
		return line
	}
	return string([]rune(line)[:width])
}
