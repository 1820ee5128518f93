package goxui

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"strings"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// letterFilter is which dead letters of a topic somebody wants. A letter must meet all of it. What is
// compared is what pages show, since that is what somebody has in mind, and what a form can send.
type letterFilter struct {
	Kinds          []string // none: any but foreign
	Reason         string   // which the reason contains
	Handler, Group string
	Older, Newer   string           // ages such as 90m, 12h, 3d
	ids            map[entryID]bool // chosen one by one; nil: all that match
	after, until   entryID          // what is not after the one, or not before the other, does not match; zero: no bound
}

// foreign is the kind of what is no dead letter of the topic, such as an entry that somebody wrote
// by hand. It can be deleted; but a letter says itself into which topic it is replayed, and whoever
// may write to the dead-letter stream must not choose that.
const foreign = "foreign"

var kinds = []string{
	string(goxstreams.Exhausted), string(goxstreams.PermanentFailure), string(goxstreams.Filtered), string(goxstreams.Broken), foreign,
}

// parseFilter reads the fields of a form.
func parseFilter(form url.Values, now time.Time) (letterFilter, error) {
	f := letterFilter{
		Reason: form.Get("reason"), Handler: form.Get("handler"), Group: form.Get("group"), Older: form.Get("older"), Newer: form.Get("newer"),
	}
	for _, kind := range form["kind"] {
		if !slices.Contains(kinds, kind) {
			return f, failure{400, "Kind: there is no such kind."}
		}
		if !slices.Contains(f.Kinds, kind) {
			f.Kinds = append(f.Kinds, kind)
		}
	}
	moment := func(field, value string) (entryID, error) {
		if value == "" {
			return entryID{}, nil
		}
		age, err := parseAge(value)
		if err != nil {
			return entryID{}, failure{400, field + ": " + err.Error() + "."}
		}
		return entryID{ms: uint64(max(now.Add(-age).UnixMilli(), 1))}, nil
	}
	var err error
	if f.until, err = moment("Older than", f.Older); err != nil {
		return f, err
	}
	newest, err := moment("Newer than", f.Newer)
	f.after = newest.previous()
	return f, err
}

// choose narrows the filter to IDs.
func (f *letterFilter) choose(ids []string) error {
	f.ids = make(map[entryID]bool, len(ids))
	for _, s := range ids {
		id, err := parseID(s)
		if err != nil {
			return failure{400, "ID: " + err.Error() + "."}
		}
		f.ids[id] = true
		if len(f.ids) == 1 || id.previous().compare(f.after) < 0 {
			f.after = id.previous()
		}
		if len(f.ids) == 1 || id.next().compare(f.until) > 0 {
			f.until = id.next()
		}
	}
	return nil
}

// values returns the fields of the form.
func (f letterFilter) values() []string {
	pairs := []string{"reason", f.Reason, "handler", f.Handler, "group", f.Group, "older", f.Older, "newer", f.Newer}
	for _, kind := range f.Kinds {
		pairs = append(pairs, "kind", kind)
	}
	return pairs
}

// Set reports whether somebody has set something.
func (f letterFilter) Set() bool {
	return len(f.Kinds) > 0 || f.Reason != "" || f.Handler != "" || f.Group != "" || f.Older != "" || f.Newer != ""
}

// Has reports whether a kind is chosen.
func (f letterFilter) Has(kind string) bool { return slices.Contains(f.Kinds, kind) }

// kindOf returns the kind of a letter of the topic, given the error that it came with.
func kindOf(topic string, d goxstreams.DeadMessage, err error) string {
	if err != nil || d.Topic != topic {
		return foreign
	}
	return string(d.Kind)
}

func (f letterFilter) matches(topic string, d goxstreams.DeadMessage, err error) bool {
	kind := kindOf(topic, d, err)
	if f.ids != nil {
		id, _ := parseID(d.ID)
		return f.ids[id]
	}
	if len(f.Kinds) == 0 && kind == foreign {
		return false
	}
	return (len(f.Kinds) == 0 || slices.Contains(f.Kinds, kind)) && strings.Contains(safe(d.Reason), safe(f.Reason)) &&
		(f.Handler == "" || safe(d.Handler) == safe(f.Handler)) && (f.Group == "" || safe(d.Group) == safe(f.Group))
}

// letter is a dead letter that matches.
type letter struct {
	goxstreams.DeadMessage
	Kind string // one of kinds
}

// scan calls f with each letter after an ID that matches, oldest first, and seen with the ID of each
// letter, also of those that do not match. It ends when one of them returns false, at the filter's
// end, or with an error.
func (f letterFilter) scan(ctx context.Context, queue *goxstreams.DeadLetterQueue, topic string, after entryID, match func(letter) bool, seen func(entryID) bool) error {
	if after.compare(f.after) < 0 {
		after = f.after
	}
	from := ""
	if after != (entryID{}) {
		from = after.String()
	}
	for d, err := range queue.All(ctx, from) {
		if err != nil && d.ID == "" {
			return err
		}
		id, _ := parseID(d.ID)
		if f.until != (entryID{}) && id.compare(f.until) >= 0 {
			return nil
		}
		if f.matches(topic, d, err) && !match(letter{d, kindOf(topic, d, err)}) || !seen(id) {
			return nil
		}
	}
	return ctx.Err()
}

// queue returns the dead letters of a topic.
func (h *Handler) queue(topic string) (*goxstreams.DeadLetterQueue, error) {
	return goxstreams.NewDeadLetterQueue(h.config.Client, h.config.DeadLetterTopic(topic))
}

// outcomes takes the error of a call about letters apart: why some of them cannot be moved, and, if it
// is of no use to go on, why. Letters that do not exist any more are in neither.
func outcomes(err error, ids []string) (failed []error, stop error) {
	if err == nil {
		return nil, nil
	}
	joined, ok := errors.Unwrap(err).(interface{ Unwrap() []error })
	if !ok {
		return nil, err
	}
	for _, e := range joined.Unwrap() {
		id, _, _ := strings.Cut(e.Error(), ": ")
		switch {
		case errors.As(e, new(*goxstreams.NotFoundError)):
		case !slices.Contains(ids, id) || refused(e) || errors.Is(e, goxstreams.ErrOutcomeUnknown) || unanswered(e):
			stop = e
		default:
			failed = append(failed, e)
		}
	}
	return failed, stop
}
