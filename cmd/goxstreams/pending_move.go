package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

// released is the consumer in whose name the library gives entries back. No process reads in it,
// and those that look take what is pending there at once.
const released = "released"

// pendingMove claims, releases or acks pending entries.
type pendingMove struct {
	tally
	client redis.UniversalClient
	pendingFilter
	topic, group string
	ids          []entryID // these, whatever the filter says; nil: those that match
	verb         string
	to           string // the consumer that gets them; "": they are acked
	dryRun, yes  bool
}

// pendingMoveFlags are what claim, release and ack have in common.
type pendingMoveFlags struct {
	pendingFilter
	all, dryRun, yes bool
}

const pendingMoveHelp = `
Each entry is looked at and changed in one step, and only if its consumer and its count are those
that were listed: what has changed since is named, and left alone. What a living consumer holds is
listed with an idle time below a third of its ClaimMinIdle, and may be in its handler right now:
--min-idle leaves it out.
`

func (f *pendingMoveFlags) addTo(a *app, cmd *cobra.Command) {
	f.pendingFilter.addTo(a, cmd)
	flags := cmd.Flags()
	flags.IntVarP(&f.limit, "limit", "n", 0, "only the first of those that match; 0: all that match")
	flags.BoolVar(&f.all, "all", false, "all that is pending in the group: needed where there is neither an ID nor a filter")
	flags.BoolVar(&f.dryRun, "dry-run", false, "show what would be done, and do nothing")
	flags.BoolVarP(&f.yes, "yes", "y", false, "do not ask")
}

// run checks the flags and arguments, and runs the command.
func (f *pendingMoveFlags) run(ctx context.Context, a *app, args []string, verb, verbed, to string) error {
	named := len(args) > 2
	switch {
	case args[0] == "" || args[1] == "":
		return usagef("TOPIC or GROUP is empty")
	case named && (f.all || f.isSet() || f.limit != 0):
		return usagef("IDs, or filters: not both")
	case f.all && f.isSet():
		return usagef("--all, or filters: not both")
	case !named && !f.all && !f.isSet():
		return usagef("which ones: IDs, filters, or --all?")
	}
	if err := cmp.Or(f.check(), a.mayAsk(f.dryRun, f.yes, fromInput(args[2:]))); err != nil {
		return err
	}
	ids, err := a.readIDs(ctx, args[2:])
	if err != nil {
		return err
	}
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	m := &pendingMove{tally: tally{a: a, verbed: verbed}, client: client, pendingFilter: f.pendingFilter, topic: args[0], group: args[1],
		ids: ids, verb: verb, to: to, dryRun: f.dryRun, yes: f.yes}
	return m.run(ctx)
}

func (a *app) claimCommand() *cobra.Command {
	var f pendingMoveFlags
	var to string
	cmd := &cobra.Command{
		Use:   "claim TOPIC GROUP --to CONSUMER [ID...|-]",
		Short: "Give pending entries to a consumer",
		Long: `Give pending entries to a consumer, whose lease begins anew; the count of deliveries stays. It handles
them once it looks at what is pending in its own name: one of this library after ClaimMinIdle. For
whichever consumer is free it is goxstreams pending release.
` + pendingMoveHelp + idsHelp,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch to {
			case "":
				return usagef("--to: the consumer that gets them is missing")
			case released:
				return usagef("--to: %q is for goxstreams pending release", released)
			}
			return f.run(cmd.Context(), a, args, "claim", "claimed", to)
		},
	}
	f.addTo(a, cmd)
	cmd.Flags().StringVar(&to, "to", "", "the consumer that gets them; made where there is none of that name")
	_ = cmd.RegisterFlagCompletionFunc("to", a.completeConsumer)
	return cmd
}

func (a *app) releaseCommand() *cobra.Command {
	var f pendingMoveFlags
	cmd := &cobra.Command{
		Use:   "release TOPIC GROUP [ID...|-]",
		Short: "Release pending entries to whichever consumer is free",
		Long: `Release pending entries as the library does when it closes: they go to the consumer "released", from
which the next consumer that looks claims them at once. The released delivery does not count.
` + pendingMoveHelp + idsHelp,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd.Context(), a, args, "release", "released", released)
		},
	}
	f.addTo(a, cmd)
	return cmd
}

func (a *app) ackCommand() *cobra.Command {
	var f pendingMoveFlags
	cmd := &cobra.Command{
		Use:   "ack TOPIC GROUP [ID...|-]",
		Short: "Ack pending entries: the group does not get them again",
		Long: `Ack pending entries: the group does not get them again, whether they were handled or not. They stay
in the stream. A living consumer that waits to retry one may put it back: ack it again then.
` + pendingMoveHelp + idsHelp,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd.Context(), a, args, "ack", "acked", "")
		},
	}
	f.addTo(a, cmd)
	return cmd
}

// errNotPending is about an ID.
var errNotPending = errors.New("it is not pending in the group: it was acked, or never delivered")

// problems are what pendingMoveScript says of an entry that it left alone.
var problems = map[string]error{
	"settled": errNotPending,
	"changed": errors.New("it has changed since it was listed: a consumer has taken it, or renewed its lease"),
	"trimmed": errors.New("it is not in the stream any more, and not pending either"),
}

// rows returns what is chosen. An error with an ID is about that entry alone, one without ends the loop.
func (m *pendingMove) rows(ctx context.Context) iter.Seq2[redis.XPendingExt, error] {
	if m.ids != nil {
		return m.byID(ctx)
	}
	return func(yield func(redis.XPendingExt, error) bool) {
		chosen := 0
		for p, err := range pendingEntries(ctx, m.client, m.topic, m.group, m.pendingFilter) {
			if err == nil && m.to == released && p.Consumer == released {
				continue // to release it again would subtract a delivery that never was
			}
			if m.limit > 0 && chosen == m.limit {
				m.a.notef("There are more: --limit 0 is all.")
				return
			}
			chosen++
			if !yield(p, err) || err != nil {
				return
			}
		}
	}
}

func (m *pendingMove) byID(ctx context.Context) iter.Seq2[redis.XPendingExt, error] {
	return func(yield func(redis.XPendingExt, error) bool) {
		for page := range slices.Chunk(m.ids, batch) {
			found, err := m.find(ctx, page)
			if err != nil {
				yield(redis.XPendingExt{}, err)
				return
			}
			for _, id := range page {
				p, ok := found[id.String()]
				var err error
				switch {
				case !ok:
					p.ID, err = id.String(), errNotPending
				case m.to == released && p.Consumer == released:
					err = errors.New("it is released already")
				}
				if !yield(p, err) {
					return
				}
			}
		}
	}
}

// find asks for the entries with these IDs, in one round trip.
func (m *pendingMove) find(ctx context.Context, ids []entryID) (map[string]redis.XPendingExt, error) {
	asked := make([]*redis.XPendingExtCmd, len(ids))
	_, _ = m.client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i, id := range ids {
			asked[i] = pipe.XPendingExt(ctx, &redis.XPendingExtArgs{Stream: m.topic, Group: m.group, Start: id.String(), End: id.String(), Count: 1})
		}
		return nil
	}) // the error is one of theirs
	found := make(map[string]redis.XPendingExt)
	for _, cmd := range asked {
		rows, err := cmd.Result()
		if err != nil {
			return nil, groupError(err, m.topic, m.group)
		}
		for _, p := range rows {
			found[p.ID] = p
		}
	}
	return found, nil
}

func (m *pendingMove) run(ctx context.Context) error {
	if m.dryRun {
		return m.pretend(ctx)
	}
	rows := m.rows(ctx)
	m.listing = m.a.newListing(moveRow{})
	if !m.yes {
		counted, err := m.ask(ctx)
		if err != nil {
			return err
		}
		rows = counted
	}
	err := m.move(ctx, rows)
	return m.end(ctx, err, entries(m.done))
}

// pendingChoice is a row of a dry run.
type pendingChoice struct {
	pendingRow
	Result string `json:"result"`
	Error  text   `json:"error,omitempty"`
}

func (m *pendingMove) pretend(ctx context.Context) error {
	m.listing = m.a.newPendingListing(pendingChoice{})
	var chosen int64
	for p, err := range m.rows(ctx) {
		switch {
		case err != nil && p.ID == "":
			return err
		case err != nil:
			m.failed++
			err = m.report(p.ID, "failed", err)
		default:
			chosen++
			err = m.listing.pending(p, pendingChoice{newPendingRow(p), "would be " + m.verbed, ""})
		}
		if err != nil {
			return err
		}
	}
	if err := m.listing.flush(); err != nil {
		return err
	}
	m.a.notef("%s would be %s. Nothing is done.", entries(chosen), m.verbed)
	if m.failed > 0 {
		return errPartly
	}
	return nil
}

// holding is what one consumer holds of the entries that are asked about.
type holding struct {
	count       int64
	least, most time.Duration // idle
	deliveries  int64         // the most
	example     string
}

// ask counts what is chosen, says whose it is, and wants a yes. It returns what it counted: nothing
// else is changed then.
func (m *pendingMove) ask(ctx context.Context) (iter.Seq2[redis.XPendingExt, error], error) {
	var counted []redis.XPendingExt
	holdings := make(map[string]*holding)
	for p, err := range m.rows(ctx) {
		if err != nil && p.ID == "" {
			return nil, err
		} else if err != nil {
			m.failed++
			if err := m.report(p.ID, "failed", err); err != nil {
				return nil, err
			}
			continue
		}
		h := holdings[p.Consumer]
		if h == nil {
			h = &holding{least: p.Idle, example: p.ID}
			holdings[p.Consumer] = h
		}
		h.count++
		h.least, h.most, h.deliveries = min(h.least, p.Idle), max(h.most, p.Idle), max(h.deliveries, p.RetryCount)
		counted = append(counted, p)
	}
	rows := func(yield func(redis.XPendingExt, error) bool) {
		for _, p := range counted {
			if !yield(p, nil) {
				return
			}
		}
	}
	if len(counted) == 0 {
		return rows, nil
	}
	t := newTable(m.a.err, "COUNT", "CONSUMER", "LEAST IDLE", "MOST IDLE", "MOST DELIVERIES", "EXAMPLE")
	_ = m.a.out.Flush() // its error comes again at the end
	for _, name := range slices.Sorted(maps.Keys(holdings)) {
		h := holdings[name]
		if err := t.row(h.count, name, ago(h.least), ago(h.most), h.deliveries, h.example); err != nil {
			return nil, err
		}
	}
	if err := t.Flush(); err != nil {
		return nil, err
	}
	to := ""
	if m.verb == "claim" {
		to = fmt.Sprintf(" for %q", m.to)
	}
	return rows, m.a.confirm(ctx, "%s %s of %q, pending in group %q%s?", capital(m.verb), entries(int64(len(counted))), m.topic, m.group, to)
}

func (m *pendingMove) move(ctx context.Context, rows iter.Seq2[redis.XPendingExt, error]) error {
	chosen := make([]redis.XPendingExt, 0, batch)
	for p, err := range rows {
		switch {
		case ctx.Err() != nil:
			return ctx.Err() // between two calls: what is counted is all that is done
		case err != nil && p.ID == "":
			return err
		case err != nil:
			m.failed++
			if err := m.report(p.ID, "failed", err); err != nil {
				return err
			}
			continue
		}
		if chosen = append(chosen, p); len(chosen) == batch {
			if err := m.moveBatch(ctx, chosen); err != nil {
				return err
			}
			chosen = chosen[:0]
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return cmp.Or(m.moveBatch(ctx, chosen), m.listing.flush())
}

// pendingMoveScript changes those of the entries that are as they were listed, or are, after a lost
// answer, as it left them. XCLAIM has no "only if". It returns for each what it found.
const pendingMoveScript = `
local group, to, idle, found = ARGV[1], ARGV[2], tonumber(ARGV[3]), {}
for i = 4, #ARGV, 4 do
  local id, owner, count, next = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local p, how = redis.call('XPENDING', KEYS[1], group, id, id, 1)[1], 'done'
  if not p then
    how = 'settled'
  elseif to ~= '' and p[2] == to and p[4] == tonumber(next) and owner ~= to then
    how = 'done'
  elseif p[2] ~= owner or p[4] ~= tonumber(count) or p[3] < idle then
    how = 'changed'
  elseif to == '' then
    redis.call('XACK', KEYS[1], group, id)
  elseif #redis.call('XCLAIM', KEYS[1], group, to, 0, id, 'RETRYCOUNT', next, 'JUSTID') == 0 then
    how = 'trimmed'
  end
  found[#found + 1] = how
end
return found`

func (m *pendingMove) moveBatch(ctx context.Context, rows []redis.XPendingExt) error {
	if len(rows) == 0 {
		return nil
	}
	args := make([]any, 0, 3+4*len(rows))
	args = append(args, m.group, m.to, m.minIdle.Milliseconds())
	for _, p := range rows {
		next := p.RetryCount
		if m.to == released {
			next = max(next-1, 0)
		}
		args = append(args, p.ID, p.Consumer, p.RetryCount, next)
	}
	found, err := m.client.Eval(context.WithoutCancel(ctx), pendingMoveScript, []string{m.topic}, args...).StringSlice()
	if err == nil && len(found) != len(rows) {
		err = fmt.Errorf("the server answered about %d of %d entries", len(found), len(rows))
	}
	for i, p := range rows {
		result, problem := m.verbed, err
		if err == nil {
			problem = problems[found[i]]
		}
		switch {
		case err != nil && !refused(err):
			result = "unknown"
			m.unknown++
		case problem != nil:
			result = "failed"
			m.failed++
		default:
			m.done++
		}
		if err := m.report(p.ID, result, problem); err != nil {
			return err
		}
	}
	if err != nil {
		return groupError(err, m.topic, m.group)
	}
	return nil
}

// entries returns "1 entry", "2 entries".
func entries(n int64) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}
