package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
)

// mover replays or deletes dead letters.
type mover struct {
	tally
	s              *selection
	verb           string
	question       string // after the number and the topic
	do             func(ctx context.Context, ids ...string) (int, error)
	dryRun, assent bool
}

// moveFlags are what replay and delete have in common.
type moveFlags struct {
	letterFilter
	limit            int
	all, dryRun, yes bool
}

func (f *moveFlags) addTo(cmd *cobra.Command) {
	f.letterFilter.addTo(cmd)
	flags := cmd.Flags()
	flags.IntVarP(&f.limit, "limit", "n", 0, "only the first of those that match; 0: all that match")
	flags.BoolVar(&f.all, "all", false, "all dead letters of the topic: needed where there is neither an ID nor a filter")
	flags.BoolVar(&f.dryRun, "dry-run", false, "show what would be done, and do nothing")
	flags.BoolVarP(&f.yes, "yes", "y", false, "do not ask")
}

// mover checks the flags and arguments.
func (f *moveFlags) mover(ctx context.Context, a *app, args []string) (*mover, error) {
	named := len(args) > 1
	switch {
	case named && (f.all || f.isSet() || f.limit != 0):
		return nil, usagef("IDs, or filters: not both")
	case f.all && f.isSet():
		return nil, usagef("--all, or filters: not both")
	case !named && !f.all && !f.isSet():
		return nil, usagef("which ones: IDs, filters, or --all?")
	}
	if err := a.mayAsk(f.dryRun, f.yes, fromInput(args[1:])); err != nil {
		return nil, err
	}
	ids, err := a.readIDs(ctx, args[1:])
	if err != nil {
		return nil, err
	}
	s, err := a.choose(ctx, args[0], f.letterFilter, ids, f.limit)
	return &mover{tally: tally{a: a}, s: s, dryRun: f.dryRun, assent: f.yes}, err
}

func (a *app) replayCommand() *cobra.Command {
	var f moveFlags
	var toAll bool
	cmd := &cobra.Command{
		Use:   "replay TOPIC [ID...|-]",
		Short: "Put dead letters back into their topic, for the group in which they died",
		Long: `Put dead letters back into their topic, at its end, for the group in which they died: by ID, by
filters, or with --all. Each is moved in one step, so that this may be interrupted, and run again.
What dies while it runs is not touched.
` + idsHelp + filterHelp,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := f.mover(cmd.Context(), a, args)
			if err != nil {
				return err
			}
			m.verb, m.verbed, m.question, m.do = "replay", "replayed", "to the group in which they died", m.s.queue.Replay
			if toAll {
				m.question, m.do = "to all groups", m.s.queue.ReplayToAll
			}
			return m.run(cmd.Context())
		},
	}
	f.addTo(cmd)
	cmd.Flags().BoolVar(&toAll, "to-all", false, "to all groups of the topic: those handle it again that have handled it")
	return cmd
}

func (a *app) deleteCommand() *cobra.Command {
	var f moveFlags
	cmd := &cobra.Command{
		Use:               "delete TOPIC [ID...|-]",
		Short:             "Delete dead letters for good",
		Long:              "Delete dead letters for good: by ID, by filters, or with --all.\n" + idsHelp + filterHelp,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := f.mover(cmd.Context(), a, args)
			if err != nil {
				return err
			}
			m.verb, m.verbed, m.question, m.do = "delete", "deleted", "for good", m.s.queue.Delete
			return m.run(cmd.Context())
		},
	}
	f.addTo(cmd)
	f.addForeign(cmd.Flags())
	return cmd
}

func (m *mover) run(ctx context.Context) error {
	switch {
	case m.dryRun:
		return m.pretend(ctx)
	case !m.assent:
		if err := m.ask(ctx); err != nil {
			return err
		}
	}
	err := m.move(ctx)
	m.s.note(m.a)
	return m.end(ctx, err, number(m.done))
}

// pretend is run with --dry-run.
func (m *mover) pretend(ctx context.Context) error {
	m.listing = m.a.newLetterListing()
	var chosen, failed int64
	for d, err := range m.s.all(ctx) {
		switch err := m.problem(d, err); {
		case err != nil && d.ID == "":
			return err
		case err != nil:
			failed++
			if err := m.report(d.ID, "failed", err); err != nil {
				return err
			}
		default:
			chosen++
			if err := m.listing.letter(d, "would be "+m.verbed); err != nil {
				return err
			}
		}
	}
	if err := m.listing.flush(); err != nil {
		return err
	}
	m.s.note(m.a)
	m.a.notef("%s would be %s %s. Nothing is done.", number(chosen), m.verbed, m.question)
	if failed > 0 {
		return errPartly
	}
	return nil
}

// ask counts what is chosen, says so, and wants a yes. What is moved then is not more than that.
func (m *mover) ask(ctx context.Context) error {
	sum := summary{}
	var last entryID
	bar, err := m.a.newBar(ctx, m.s, "looking")
	if err != nil {
		return err
	}
	for d, err := range m.s.all(ctx) {
		if err := m.problem(d, err); err != nil && d.ID == "" {
			bar.end()
			return err
		} else if err == nil {
			sum.add(d)
			last, _ = parseID(d.ID)
		}
		bar.set(m.s.seen)
	}
	bar.end()
	if len(sum) == 0 {
		return nil // and move says so
	}
	if m.s.ids == nil {
		m.s.until = last.next()
	}
	if err := m.a.printSummary(m.a.err, sum, 10); err != nil {
		return err
	}
	return m.a.confirm(ctx, "%s %s of %q %s?", capital(m.verb), number(sum.total()), m.s.topic, m.question)
}

// batch is how many letters are moved in one call: a page of the library's.
const batch = 100

func (m *mover) move(ctx context.Context) error {
	var err error
	if m.bar, err = m.a.newBar(ctx, m.s, m.verb); err != nil {
		return err
	}
	defer m.bar.end()
	m.listing = m.a.newListing(moveRow{})
	ids := make([]string, 0, batch)
	for d, err := range m.s.all(ctx) {
		if ctx.Err() != nil {
			return ctx.Err() // between two calls: what is counted is all that is done
		}
		switch err := m.problem(d, err); {
		case err != nil && d.ID == "":
			return err
		case err != nil:
			m.failed++
			if err := m.report(d.ID, "failed", err); err != nil {
				return err
			}
			continue
		}
		if ids = append(ids, d.ID); len(ids) == batch {
			if err := m.moveBatch(ctx, ids); err != nil {
				return err
			}
			ids = ids[:0]
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return m.moveBatch(ctx, ids)
}

// problem returns why a letter cannot be moved, given the error that it came with. What is
// named by its ID can be deleted, whatever it is.
func (m *mover) problem(d goxstreams.DeadMessage, err error) error {
	switch {
	case d.ID == "" || err == errGone:
		return err
	case m.verb == "delete":
		return nil
	case err == nil && d.Topic != m.s.topic:
		return fmt.Errorf("it died in topic %q, not in %q", d.Topic, m.s.topic)
	}
	return err
}

// moveBatch moves letters, and reports on each. It returns an error if it is of no use to go on.
func (m *mover) moveBatch(ctx context.Context, ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	n, err := m.do(context.WithoutCancel(ctx), ids...)
	m.done += int64(n)
	failed, stop := outcomes(err, ids)
	for _, id := range ids {
		result, err := m.verbed, failed[id]
		switch {
		case err == nil && stop != nil && len(failed) == 0:
			result, err = "failed", stop
			m.failed++
		case errors.Is(err, goxstreams.ErrOutcomeUnknown):
			result = "unknown"
			m.unknown++
		case err != nil:
			result = "failed"
			m.failed++
		}
		if err := m.report(id, result, err); err != nil {
			return err
		}
	}
	m.bar.set(m.s.seen)
	return stop
}

// outcomes takes the error of a call of the library's apart: which letters failed, and whether
// others would too.
func outcomes(err error, ids []string) (failed map[string]error, stop error) {
	if err == nil {
		return nil, nil
	}
	joined, ok := errors.Unwrap(err).(interface{ Unwrap() []error })
	if !ok {
		return nil, err
	}
	failed = make(map[string]error)
	for _, e := range joined.Unwrap() {
		var missing *goxstreams.NotFoundError
		if errors.As(e, &missing) {
			for _, id := range missing.IDs {
				failed[id] = errGone
			}
			continue
		}
		id, _, _ := strings.Cut(e.Error(), ": ")
		if slices.Contains(ids, id) {
			failed[id] = errors.Unwrap(e)
		}
		var broken net.Error
		if failed[id] == nil || refused(e) || errors.Is(e, goxstreams.ErrOutcomeUnknown) || errors.As(e, &broken) {
			stop = e
		}
	}
	return failed, stop
}

// bar is a progress bar, or nothing where nobody would see it.
type bar struct{ *progressbar.ProgressBar }

// newBar returns a bar of the letters that are looked at.
func (a *app) newBar(ctx context.Context, s *selection, what string) (*bar, error) {
	total := int64(len(s.ids))
	if a.draws && s.ids == nil {
		var err error
		if total, err = s.queue.Count(ctx); err != nil {
			return nil, err
		}
	}
	return a.barOf(total, what), nil
}

// barOf returns a bar that ends at total.
func (a *app) barOf(total int64, what string) *bar {
	if !a.draws || total <= batch {
		return &bar{} // it would not be seen
	}
	return &bar{progressbar.NewOptions64(total, progressbar.OptionSetWriter(a.err), progressbar.OptionSetDescription(what),
		progressbar.OptionShowCount(), progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish())}
}

func (b *bar) set(n int64) {
	if b.ProgressBar != nil {
		_ = b.Set64(min(n, b.GetMax64()))
	}
}

// clear makes room for a line.
func (b *bar) clear() {
	if b != nil && b.ProgressBar != nil {
		_ = b.Clear()
	}
}

func (b *bar) end() { b.clear() }
