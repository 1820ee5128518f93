package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (a *app) groupCommand() *cobra.Command {
	group := &cobra.Command{
		Use:   "group",
		Short: "Create, reset, pause, resume and delete consumer groups",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usagef("which: group create, reset, pause, resume or delete? (groups TOPIC lists them)")
		},
	}
	group.AddCommand(a.createGroupCommand(), a.resetGroupCommand(), a.pauseGroupCommand(), a.resumeGroupCommand(), a.deleteGroupCommand())
	return group
}

// groupFlags are what the commands have in common.
type groupFlags struct {
	position    string // of create and reset
	dryRun, yes bool
}

const positionHelp = `
A position is "start" or "end" of the stream; an entry's ID: the group is given what comes after it; or
an age such as 90m, 12h, 3d, or a time such as 2026-11-24T06:00:00Z: what was stored since.
`

func (f *groupFlags) addTo(flags *pflag.FlagSet) {
	flags.BoolVar(&f.dryRun, "dry-run", false, "show what would be done, and do nothing")
	flags.BoolVarP(&f.yes, "yes", "y", false, "do not ask")
}

// groupChange is what a command does to a group.
type groupChange struct {
	Topic   text   `json:"topic"`
	Group   text   `json:"group"`
	Result  string `json:"result"`
	From    string `json:"from_id,omitempty"` // the last entry that was delivered
	To      string `json:"to_id,omitempty"`
	Again   count  `json:"entries_again"`   // delivered once more
	Skipped count  `json:"entries_skipped"` // not delivered any more
	Pending count  `json:"pending"`
	Lag     count  `json:"lag"` // not yet delivered
}

func (a *app) createGroupCommand() *cobra.Command {
	var f groupFlags
	var mkstream bool
	cmd := &cobra.Command{
		Use:               "create TOPIC GROUP",
		Short:             "Create a consumer group",
		Long:              "Create a consumer group, such as one for a service that is not deployed yet. Subscribers create theirs themselves.\n" + positionHelp,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := a.changeGroup(cmd.Context(), args, f, "--from")
			if err != nil {
				return err
			}
			return g.create(cmd.Context(), mkstream)
		},
	}
	cmd.Flags().StringVar(&f.position, "from", "start", "the position from which it is given entries")
	_ = cmd.RegisterFlagCompletionFunc("from", completePosition)
	cmd.Flags().BoolVar(&mkstream, "mkstream", false, "make the stream where there is none")
	f.addTo(cmd.Flags())
	return cmd
}

func (a *app) resetGroupCommand() *cobra.Command {
	var f groupFlags
	cmd := &cobra.Command{
		Use:   "reset TOPIC GROUP --to POSITION",
		Short: "Move a consumer group back, or ahead",
		Long: `Move a consumer group back, so that it handles entries again, or ahead, so that it skips them. What
is pending stays pending. Consumers need not be stopped, but while a group goes back, what one of them
holds may be given to another one, which handles it at the same time.
` + positionHelp,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.position == "" {
				return usagef("--to: the position is missing")
			}
			g, err := a.changeGroup(cmd.Context(), args, f, "--to")
			if err != nil {
				return err
			}
			return g.reset(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&f.position, "to", "", "the position from which it is given entries now")
	_ = cmd.RegisterFlagCompletionFunc("to", completePosition)
	f.addTo(cmd.Flags())
	return cmd
}

func (a *app) pauseGroupCommand() *cobra.Command {
	return a.controlGroupCommand("pause TOPIC GROUP", "Pause a consumer group: no handler begins any more", `Pause a consumer group on a topic, in all processes, until "group resume". Within about a second no handler
begins any more; running ones finish, and what was read ahead is released. It outlives the processes and
a restart of Redis. Groups of other libraries take no notice.`, (*groupChanger).pause)
}

func (a *app) resumeGroupCommand() *cobra.Command {
	return a.controlGroupCommand("resume TOPIC GROUP", "Resume a consumer group that was paused",
		`Resume a consumer group that was paused: its handlers continue within about a second.`, (*groupChanger).resume)
}

func (a *app) controlGroupCommand(use, short, long string, do func(*groupChanger, context.Context) error) *cobra.Command {
	var f groupFlags
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := a.changeGroup(cmd.Context(), args, f, "")
			if err != nil {
				return err
			}
			return do(g, cmd.Context())
		},
	}
	f.addTo(cmd.Flags())
	return cmd
}

func (a *app) deleteGroupCommand() *cobra.Command {
	var f groupFlags
	cmd := &cobra.Command{
		Use:   "delete TOPIC GROUP",
		Short: "Delete a consumer group",
		Long: `Delete a consumer group, with what is pending in it: nobody handles that any more. The entries stay in
the stream. Stop the group's consumers first: living ones make it again, and the command refuses
a group that has changed since it was looked at.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeTopicAndGroup,
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := a.changeGroup(cmd.Context(), args, f, "")
			if err != nil {
				return err
			}
			return g.delete(cmd.Context())
		},
	}
	f.addTo(cmd.Flags())
	return cmd
}

// groupChanger is a change that is under way.
type groupChanger struct {
	a            *app
	client       redis.UniversalClient
	topic, group string
	position     position
	groupFlags
}

// changeGroup checks the arguments.
func (a *app) changeGroup(ctx context.Context, args []string, f groupFlags, flag string) (*groupChanger, error) {
	if args[0] == "" || args[1] == "" {
		return nil, usagef("TOPIC or GROUP is empty")
	}
	g := &groupChanger{a: a, topic: args[0], group: args[1], groupFlags: f}
	var err error
	if flag != "" {
		if g.position, err = parsePosition(flag, f.position, time.Now()); err != nil {
			return nil, err
		}
	}
	if err := a.mayAsk(f.dryRun, f.yes, false); err != nil {
		return nil, err
	}
	g.client, err = a.connect(ctx)
	return g, err
}

// position is a place in a stream: after an entry, or at the end.
type position struct {
	after entryID
	end   bool
}

func parsePosition(flag, value string, now time.Time) (position, error) {
	switch value {
	case "start":
		return position{}, nil
	case "end":
		return position{end: true}, nil
	}
	if strings.Trim(value, "0123456789-") == "" {
		id, err := parseID(value)
		if err != nil {
			return position{}, usagef("%s: %w", flag, err)
		}
		return position{after: id}, nil
	}
	first, err := moment(flag, value, now)
	if err != nil {
		return position{}, usagef("%s: %q is neither start, end nor an ID, nor an age such as 90m, 12h or 3d, nor a time such as 2026-11-24T06:00:00Z", flag, value)
	}
	return position{after: first.previous()}, nil
}

// streamState is what Redis knows of a stream.
type streamState struct {
	last   entryID // the greatest ID that an entry has had
	length count
}

func (g *groupChanger) stream(ctx context.Context) (streamState, error) {
	info, err := g.client.XInfoStream(ctx, g.topic).Result()
	if err != nil {
		return streamState{}, err
	}
	last, err := parseID(info.LastGeneratedID)
	return streamState{last, count(info.Length)}, err
}

// in returns the ID after which the position is: the last one at most, lest entries to come are left out.
func (p position) in(s streamState) entryID {
	if p.end || p.after.compare(s.last) > 0 {
		return s.last
	}
	return p.after
}

// entriesBetween counts those after the one ID, up to the other. The payloads come with them: Redis counts a
// whole stream only.
func (g *groupChanger) entriesBetween(ctx context.Context, after, last entryID) (n count, err error) {
	const page = 1000
	for after.compare(last) < 0 {
		rows, err := g.client.XRangeN(ctx, g.topic, after.next().String(), last.String(), page).Result()
		if err != nil {
			return 0, topicError(err, g.topic)
		}
		n += count(len(rows))
		if len(rows) < page {
			break
		}
		if after, err = parseID(rows[page-1].ID); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// info returns what Redis knows of the group.
func (g *groupChanger) info(ctx context.Context) (redis.XInfoGroup, entryID, error) {
	groups, err := g.client.XInfoGroups(ctx, g.topic).Result()
	if err != nil {
		return redis.XInfoGroup{}, entryID{}, topicError(err, g.topic)
	}
	i := slices.IndexFunc(groups, func(info redis.XInfoGroup) bool { return info.Name == g.group })
	if i < 0 {
		return redis.XInfoGroup{}, entryID{}, fmt.Errorf("topic %q has no group %q (see goxstreams groups)", g.topic, g.group)
	}
	last, err := parseID(groups[i].LastDeliveredID)
	return groups[i], last, err
}

func (g *groupChanger) create(ctx context.Context, mkstream bool) error {
	s, err := g.stream(ctx)
	switch {
	case noSuchKey(err) && !mkstream:
		return fmt.Errorf("there is no stream %q (see goxstreams topics): --mkstream makes it", g.topic)
	case err != nil && !noSuchKey(err):
		return topicError(err, g.topic)
	}
	to := g.position.in(s)
	change := groupChange{To: to.String(), Lag: s.length}
	if to != (entryID{}) {
		if change.Lag, err = g.entriesBetween(ctx, to, s.last); err != nil {
			return err
		}
	}
	return g.run(ctx, change, "create", "created", fmt.Sprintf("after %s, with %s to handle", to, entries(int64(change.Lag))), func() error {
		create := g.client.XGroupCreate
		if mkstream {
			create = g.client.XGroupCreateMkStream
		}
		err := create(ctx, g.topic, g.group, change.To).Err()
		if refused(err) && strings.HasPrefix(err.Error(), "BUSYGROUP") {
			return fmt.Errorf("topic %q has a group %q already: goxstreams group reset moves it", g.topic, g.group)
		}
		return err
	})
}

// resetScript moves a group, unless it is to go ahead and has come to the place already.
const resetScript = lessFunction + findGroupFunction + `
local g = group(ARGV[1])
if not g then return 'gone' end
if less(ARGV[3], ARGV[2]) and not less(g['last-delivered-id'], ARGV[2]) then return 'changed' end
redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], ARGV[2])
return 'done'`

// deleteGroupScript deletes a group that nobody has used since.
const deleteGroupScript = findGroupFunction + `
local g = group(ARGV[1])
if not g then return 'gone' end
if g['last-delivered-id'] ~= ARGV[2] or g['pending'] ~= tonumber(ARGV[3]) then return 'changed' end
redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
return 'done'`

// lessFunction compares IDs as text: Lua's numbers are too small for them.
const lessFunction = `
local function less(a, b)
  local am, as = string.match(a, '^(%d+)-(%d+)$')
  local bm, bs = string.match(b, '^(%d+)-(%d+)$')
  if am ~= bm then return #am < #bm or (#am == #bm and am < bm) end
  return #as < #bs or (#as == #bs and as < bs)
end`

const findGroupFunction = `
local function group(name)
  for _, g in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local f = {}
    for i = 1, #g, 2 do f[g[i]] = g[i + 1] end
    if f['name'] == name then return f end
  end
end`

// eval runs one of the scripts above.
func (g *groupChanger) eval(ctx context.Context, script string, args ...any) error {
	answer, err := g.client.Eval(context.WithoutCancel(ctx), script, []string{g.topic}, append([]any{g.group}, args...)...).Text()
	switch {
	case err != nil:
		return topicError(err, g.topic)
	case answer == "gone":
		return fmt.Errorf("topic %q has no group %q any more", g.topic, g.group)
	case answer == "changed":
		return fmt.Errorf("group %q of %q has changed since it was looked at: consumers use it. Nothing is done", g.group, g.topic)
	}
	return nil
}

func (g *groupChanger) reset(ctx context.Context) error {
	info, from, err := g.info(ctx)
	if err != nil {
		return err
	}
	s, err := g.stream(ctx)
	if err != nil {
		return topicError(err, g.topic)
	}
	to := g.position.in(s)
	change := groupChange{From: from.String(), To: to.String(), Pending: count(info.Pending), Lag: unknown}
	what := "nothing changes"
	switch lag := count(info.Lag); {
	case to.compare(from) > 0:
		if change.Skipped = lag; lag < 0 || to.compare(s.last) < 0 {
			change.Skipped, err = g.entriesBetween(ctx, from, to)
		}
		what = entries(int64(change.Skipped)) + " skipped"
	case to.compare(from) < 0:
		if change.Again = s.length - lag; lag < 0 || to != (entryID{}) {
			change.Again, err = g.entriesBetween(ctx, to, from)
		}
		what = entries(int64(change.Again)) + " delivered again"
	}
	if err != nil {
		return err
	}
	if info.Lag >= 0 {
		change.Lag = max(count(info.Lag)-change.Skipped+change.Again, 0)
	}
	if info.Pending > 0 {
		what += fmt.Sprintf(", %s still pending", entries(info.Pending))
	}
	return g.run(ctx, change, "reset", "reset", fmt.Sprintf("from %s to %s: %s", from, to, what), func() error {
		return g.eval(ctx, resetScript, change.To, change.From)
	})
}

func (g *groupChanger) delete(ctx context.Context) error {
	info, from, err := g.info(ctx)
	if err != nil {
		return err
	}
	change := groupChange{From: from.String(), Pending: count(info.Pending), Lag: count(info.Lag)}
	what := fmt.Sprintf("with %s pending at %d consumers, and %s not yet delivered", entries(info.Pending), info.Consumers, lagging(info.Lag))
	return g.run(ctx, change, "delete", "deleted", what, func() error {
		return g.eval(ctx, deleteGroupScript, info.LastDeliveredID, info.Pending)
	})
}

func (g *groupChanger) pause(ctx context.Context) error {
	return g.control(ctx, "pause", "paused", goxstreams.Pause)
}

func (g *groupChanger) resume(ctx context.Context) error {
	return g.control(ctx, "resume", "resumed", goxstreams.Resume)
}

func (g *groupChanger) control(ctx context.Context, verb, verbed string, do func(context.Context, redis.UniversalClient, string, string) error) error {
	info, from, err := g.info(ctx)
	if err != nil {
		return err
	}
	change := groupChange{From: from.String(), Pending: count(info.Pending), Lag: count(info.Lag)}
	what := fmt.Sprintf("with %s pending at %d consumers, and %s not yet delivered", entries(info.Pending), info.Consumers, lagging(info.Lag))
	return g.run(ctx, change, verb, verbed, what, func() error { return do(ctx, g.client, g.topic, g.group) })
}

// lagging returns "1 entry", "2 entries", or that their number is not known.
func lagging(lag int64) string {
	if lag < 0 {
		return "an unknown number of entries"
	}
	return entries(lag)
}

// run shows the change, asks, and makes it.
func (g *groupChanger) run(ctx context.Context, change groupChange, verb, verbed, what string, do func() error) error {
	change.Topic, change.Group, change.Result = text(g.topic), text(g.group), verbed
	name := fmt.Sprintf("group %q of %q", g.group, g.topic)
	switch {
	case g.dryRun:
		change.Result = "would be " + verbed
	case !g.yes:
		if err := g.a.confirm(ctx, "%s %s %s?", capital(verb), name, what); err != nil {
			return err
		}
	}
	if !g.dryRun {
		if err := do(); err != nil {
			return err
		}
	}
	if g.a.forScripts() {
		listing := g.a.newListing(change)
		return cmp.Or(listing.row(change), listing.flush())
	}
	if g.dryRun {
		g.a.notef("%s would be %s %s. Nothing is done.", capital(name), verbed, what)
	} else {
		g.a.notef("%s %s %s.", capital(name), verbed, what)
	}
	return nil
}

func capital(s string) string { return strings.ToUpper(s[:1]) + s[1:] }
