package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/spf13/cobra"
)

// trimFlags say what is kept.
type trimFlags struct {
	keepLast, hardMaxLen int64
	keepFor              string
	ignore               []string
	dryRun, yes          bool
}

func (a *app) trimCommand() *cobra.Command {
	var f trimFlags
	cmd := &cobra.Command{
		Use:   "trim TOPIC",
		Short: "Delete entries that every group has acked",
		Long: `Delete entries from the start of a stream, those that every consumer group has acked and every fan-out has
read, except for the last --keep-last and those younger than --keep-for. Without groups, only these two
decide. Beyond --hard-max-len the oldest entries go even if they are not acked.

It takes the server for a hundredth of its time at most, some 50,000 small entries a second; interrupted, it can be run
again. --dry-run reads what would be deleted, and takes longer. TOPIC can be a dead-letter stream.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "" {
				return usagef("TOPIC is empty")
			}
			return a.trim(cmd.Context(), args[0], f)
		},
	}
	flags := cmd.Flags()
	flags.Int64Var(&f.keepLast, "keep-last", 0, "how many `entries` to keep, the newest")
	flags.StringVar(&f.keepFor, "keep-for", "", "the `age` below which entries are kept, such as 90m, 12h, 3d")
	flags.Int64Var(&f.hardMaxLen, "hard-max-len", 0, "the most `entries` to keep, acked or not")
	flags.StringArrayVar(&f.ignore, "ignore-group", nil, "a `group` for which nothing is kept, such as an abandoned one; repeatable")
	flags.BoolVar(&f.dryRun, "dry-run", false, "show what would be done, and do nothing")
	flags.BoolVarP(&f.yes, "yes", "y", false, "do not ask")
	return cmd
}

// trimmed is what the command reports.
type trimmed struct {
	Topic   text             `json:"topic"`
	Result  string           `json:"result"`
	Trimmed count            `json:"trimmed"`
	Length  count            `json:"length"`
	CutOff  map[string]count `json:"cut_off,omitempty"` // by group
	Pinned  *pinned          `json:"pinned_by,omitempty"`
	Held    *held            `json:"held_by,omitempty"`
}

// held is a group that has vanished, and may be recreated.
type held struct {
	Group text      `json:"group"`
	Until time.Time `json:"until"`
}

// pinned is the entry that keeps others from being trimmed.
type pinned struct {
	Group    text    `json:"group"`
	Consumer text    `json:"consumer,omitempty"`
	ID       string  `json:"id"`
	Age      float64 `json:"age_seconds"`
}

func (f trimFlags) retention() (r goxstreams.Retention, err error) {
	r = goxstreams.Retention{KeepLast: f.keepLast, HardMaxLen: f.hardMaxLen, IgnoreGroups: f.ignore}
	if f.keepFor != "" {
		if r.KeepFor, err = parseAge(f.keepFor); err != nil || r.KeepFor <= 0 {
			return r, usagef("--keep-for: %q is not an age such as 90m, 12h or 3d", f.keepFor)
		}
	}
	switch {
	case r.KeepLast < 0:
		return r, usagef("--keep-last: %d is negative", r.KeepLast)
	case r.HardMaxLen < 0:
		return r, usagef("--hard-max-len: %d is negative", r.HardMaxLen)
	case r.KeepLast == 0 && r.KeepFor == 0 && r.HardMaxLen == 0:
		return r, usagef("what is to be kept? (--keep-last, --keep-for, --hard-max-len)")
	case r.HardMaxLen > 0 && r.HardMaxLen < r.KeepLast:
		return r, usagef("--hard-max-len: %d is less than --keep-last (%d)", r.HardMaxLen, r.KeepLast)
	}
	return r, nil
}

func (a *app) trim(ctx context.Context, topic string, f trimFlags) error {
	r, err := f.retention()
	if err != nil {
		return err
	}
	if err := a.mayAsk(f.dryRun, f.yes, false); err != nil {
		return err
	}
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	report, verb := trimmed{Topic: text(topic), Result: "would trim"}, "would be trimmed"
	var result goxstreams.TrimResult
	if f.dryRun || !f.yes {
		if result, err = goxstreams.PlanTrim(ctx, client, topic, r); err != nil {
			return topicError(err, topic)
		}
	}
	if !f.dryRun {
		if !f.yes {
			a.describeTrim(result, "would be trimmed")
			if err := a.confirm(ctx, "Trim %s of %q?", entries(result.Trimmed), topic); err != nil {
				return err
			}
		}
		report.Result, verb = "trimmed", "trimmed"
		if result, err = goxstreams.Trim(ctx, client, topic, r); err != nil {
			if result.Trimmed > 0 {
				a.notef("%s trimmed before that.", entries(result.Trimmed))
			}
			return topicError(err, topic)
		}
	}
	report.Trimmed, report.Length = count(result.Trimmed), count(result.Length)
	for group, n := range result.CutOff {
		if report.CutOff == nil {
			report.CutOff = make(map[string]count)
		}
		report.CutOff[group] = count(n)
	}
	if pin := result.Pin; pin.ID != "" {
		report.Pinned = &pinned{text(pin.Group), text(pin.Consumer), pin.ID, pin.Age.Seconds()}
	}
	if result.HeldBy != "" {
		report.Held = &held{text(result.HeldBy), result.HeldUntil.UTC()}
	}
	if a.forScripts() {
		listing := a.newListing(report)
		return cmp.Or(listing.row(report), listing.flush())
	}
	a.describeTrim(result, verb)
	if f.dryRun {
		a.notef("Nothing is done.")
	}
	return nil
}

// describeTrim says what is trimmed, what is cut off, and what keeps the rest.
func (a *app) describeTrim(result goxstreams.TrimResult, verb string) {
	a.notef("%s %s, %s left.", entries(result.Trimmed), verb, entries(result.Length))
	var cut []string
	for _, group := range slices.Sorted(maps.Keys(result.CutOff)) {
		cut = append(cut, fmt.Sprintf("%d of %s", result.CutOff[group], cmp.Or(group, "the slowest fan-out")))
	}
	if len(cut) > 0 {
		a.notef("Of these not acked: %s.", strings.Join(cut, ", "))
	}
	if pin := result.Pin; pin.ID != "" {
		holder := "not delivered yet"
		if pin.Consumer != "" {
			holder = "with " + pin.Consumer
		}
		a.notef("The rest is kept for %s, whose oldest entry %s is %s old, %s.", cmp.Or(pin.Group, "a fan-out"), pin.ID, ago(pin.Age), holder)
	}
	if result.HeldBy != "" {
		a.notef("The rest is kept until %s, since the group %s has vanished and may be recreated.", result.HeldUntil.UTC().Format(time.RFC3339), result.HeldBy)
	}
}
