package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (a *app) deadCommand() *cobra.Command {
	dead := &cobra.Command{
		Use:   "dead",
		Short: "Find, understand, replay and delete dead letters",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usagef("which: dead summary, list, show, replay, delete, export or import?")
		},
	}
	dead.AddCommand(a.summaryCommand(), a.listCommand(), a.showCommand(), a.replayCommand(), a.deleteCommand(), a.exportCommand(), a.importCommand())
	return dead
}

// letterFilter is what the flags say of dead letters.
type letterFilter struct {
	stream               string
	kinds                []string
	reason, reasonRegexp string
	handler, group       string
	olderThan, newerThan string
	foreign              bool
}

const filterHelp = `
A letter must meet all filters. Its age is told by its ID: the time when Redis stored it.
Left out, and counted, is what is no dead letter of TOPIC, such as an entry that somebody wrote
by hand: who may write to the dead-letter stream must not choose where a replay goes.`

func (f *letterFilter) addTo(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringSliceVar(&f.kinds, "kind", nil, "exhausted, permanent, filtered or broken; several with commas")
	flags.StringVar(&f.reason, "reason", "", "the reason contains this")
	flags.StringVar(&f.reasonRegexp, "reason-regexp", "", "the reason matches this regular expression of Go's")
	flags.StringVar(&f.handler, "handler", "", "the handler's name")
	flags.StringVar(&f.group, "group", "", "the consumer group in which it died")
	flags.StringVar(&f.olderThan, "older-than", "", "an age such as 90m, 12h, 3d, or a time such as 2026-11-24T06:00:00Z")
	flags.StringVar(&f.newerThan, "newer-than", "", "likewise")
	_ = cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions(kinds, cobra.ShellCompDirectiveNoFileComp))
	f.addStream(flags)
}

func (f *letterFilter) addStream(flags *pflag.FlagSet) {
	flags.StringVar(&f.stream, "stream", "", "the dead-letter stream, where it has a name of its own")
}

func (f *letterFilter) addForeign(flags *pflag.FlagSet) {
	flags.BoolVar(&f.foreign, "foreign", false, "only what is no dead letter of TOPIC")
}

// isSet reports whether something narrows the choice.
func (f *letterFilter) isSet() bool {
	return len(f.kinds) > 0 || f.reason != "" || f.reasonRegexp != "" || f.handler != "" || f.group != "" ||
		f.olderThan != "" || f.newerThan != "" || f.foreign
}

var kinds = []string{string(goxstreams.Exhausted), string(goxstreams.PermanentFailure), string(goxstreams.Filtered), string(goxstreams.Broken)}

// selection is the dead letters that a command is about.
type selection struct {
	letterFilter
	topic string
	queue *goxstreams.DeadLetterQueue

	ids   []entryID // these, whatever the filters say; nil: those that match
	limit int       // of those that match; 0: all

	pattern      *regexp.Regexp
	after, until entryID // what is not after the one, or not before the other, does not match; zero: no bound

	// What the last loop over all has found.
	seen    int64 // letters that it looked at
	skipped int64 // those that are no dead letters of the topic
	more    bool  // the limit left some out
}

// choose makes a selection of the flags, or of IDs unless they are nil. It does not yet ask Redis for them.
func (a *app) choose(ctx context.Context, topic string, f letterFilter, ids []entryID, limit int) (*selection, error) {
	s := &selection{letterFilter: f, topic: topic, limit: limit, ids: ids}
	if err := s.prepare(time.Now()); err != nil {
		return nil, err
	}
	client, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	if s.stream == "" {
		s.stream = goxstreams.DeadLetterTopic(topic)
	}
	s.queue, err = goxstreams.NewDeadLetterQueue(client, s.stream)
	return s, err
}

// prepare checks the flags.
func (s *selection) prepare(now time.Time) (err error) {
	if s.topic == "" {
		return usagef("TOPIC is empty")
	}
	if s.limit < 0 {
		return usagef("--limit cannot be negative")
	}
	for _, kind := range s.kinds {
		if !slices.Contains(kinds, kind) {
			return usagef("--kind: %q is none of %s", kind, strings.Join(kinds, ", "))
		}
	}
	if s.reasonRegexp != "" {
		if s.pattern, err = regexp.Compile(s.reasonRegexp); err != nil {
			return usagef("--reason-regexp: %w", err)
		}
	}
	newest, err := moment("--older-than", s.olderThan, now)
	if err != nil {
		return err
	}
	s.until = newest
	oldest, err := moment("--newer-than", s.newerThan, now)
	s.after = oldest.previous()
	return err
}

// moment reads an age, or a time, as the first ID that an entry can have then; zero if it is empty.
func moment(flag, value string, now time.Time) (entryID, error) {
	if value == "" {
		return entryID{}, nil
	}
	at, err := time.Parse(time.RFC3339, value)
	if err != nil {
		age, err := parseAge(value)
		if err != nil {
			return entryID{}, usagef("%s: %q is neither an age such as 90m, 12h or 3d, nor a time such as 2026-11-24T06:00:00Z", flag, value)
		}
		at = now.Add(-age)
	}
	return entryID{ms: uint64(max(at.UnixMilli(), 1))}, nil
}

// parseAge is time.ParseDuration that knows days.
func parseAge(s string) (time.Duration, error) {
	unit := time.Duration(1)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		s, unit = days+"h", 24
	}
	d, err := time.ParseDuration(s)
	if err == nil && (d < 0 || d > math.MaxInt64/unit) {
		err = errors.New("out of range")
	}
	return d * unit, err
}

// all returns the chosen letters, oldest first, or in the order of the IDs. An error with an ID
// is about that letter alone, one without ends the loop.
func (s *selection) all(ctx context.Context) iter.Seq2[goxstreams.DeadMessage, error] {
	s.seen, s.skipped, s.more = 0, 0, false
	if s.ids != nil {
		return s.byID(ctx)
	}
	return func(yield func(goxstreams.DeadMessage, error) bool) {
		chosen := 0
		after := ""
		if s.after != (entryID{}) {
			after = s.after.String()
		}
		for d, err := range s.queue.All(ctx, after) {
			if err != nil && d.ID == "" {
				yield(d, err)
				return
			}
			if id, _ := parseID(d.ID); s.until != (entryID{}) && id.compare(s.until) >= 0 {
				return
			}
			s.seen++
			if !s.matches(d, err) {
				continue
			}
			if s.limit > 0 && chosen == s.limit {
				s.more = true
				return
			}
			chosen++
			if err != nil {
				d.Reason = err.Error()
			}
			if !yield(d, nil) {
				return
			}
		}
	}
}

func (s *selection) matches(d goxstreams.DeadMessage, err error) bool {
	foreign := err != nil || d.Topic != s.topic
	if foreign && !s.foreign {
		s.skipped++
	}
	return foreign == s.foreign &&
		(len(s.kinds) == 0 || slices.Contains(s.kinds, string(d.Kind))) &&
		strings.Contains(d.Reason, s.reason) &&
		(s.pattern == nil || s.pattern.MatchString(d.Reason)) &&
		(s.handler == "" || d.Handler == s.handler) &&
		(s.group == "" || d.Group == s.group)
}

// errGone is about an ID that is not in the dead-letter stream.
var errGone = errors.New("not found: it was replayed or deleted before, or never was there")

// byID reads on from one ID to a greater one for as long as a page of the library's is: from
// standard input may come thousands that follow each other.
func (s *selection) byID(ctx context.Context) iter.Seq2[goxstreams.DeadMessage, error] {
	return func(yield func(goxstreams.DeadMessage, error) bool) {
		w := walk{stop: func() {}}
		defer func() { w.stop() }()
		for _, id := range s.ids {
			s.seen++
			for n := 0; w.next != nil && w.at.compare(id) < 0 && n < batch; n++ {
				w.step()
			}
			if w.next == nil || w.at.compare(id) != 0 {
				w.stop()
				w.next, w.stop = iter.Pull2(s.queue.All(ctx, id.previous().String()))
				w.step()
			}
			d, err := w.letter, w.err
			switch {
			case err != nil && d.ID == "":
				yield(d, err)
				return
			case w.next == nil || w.at != id:
				d, err = goxstreams.DeadMessage{ID: id.String()}, errGone
			}
			if !yield(d, err) {
				return
			}
		}
	}
}

// walk is a loop over dead letters that stands at one of them.
type walk struct {
	next func() (goxstreams.DeadMessage, error, bool) // nil at the end
	stop func()

	letter goxstreams.DeadMessage
	err    error
	at     entryID // the letter's
}

func (w *walk) step() {
	var ok bool
	if w.letter, w.err, ok = w.next(); !ok {
		w.next = nil
		return
	}
	w.at, _ = parseID(w.letter.ID)
}

// note says what the last loop over all left out.
func (s *selection) note(a *app) {
	if s.more {
		a.notef("There are more: --limit 0 is all.")
	}
	if s.skipped > 0 {
		a.notef("%d entries of %q are left out: they are no dead letters of %q (see goxstreams dead list --foreign).", s.skipped, s.stream, s.topic)
	}
}

// noteNone says that nothing is chosen.
func (s *selection) noteNone(a *app) {
	if s.isSet() {
		a.notef("No dead letter of %q matches.", s.topic)
	} else {
		a.notef("%q has no dead letters: %q is empty, or not there.", s.topic, s.stream)
	}
}

// number returns "1 dead letter", "2 dead letters".
func number(n int64) string {
	if n == 1 {
		return "1 dead letter"
	}
	return fmt.Sprintf("%d dead letters", n)
}
