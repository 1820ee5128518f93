package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
	"github.com/redis/go-redis/v9"
)

// DeadLetterQueue is for looking at a dead-letter stream, and for emptying it. It
// keeps no state, and may be used by several goroutines at once. Dead letters can
// also be subscribed to: the stream is a topic like any other.
type DeadLetterQueue struct {
	stream xstream.Stream
}

// deadPage is how many dead letters are read, or sent, in one round trip.
const deadPage = 100

// NewDeadLetterQueue returns the queue of a dead-letter stream, such as
// DeadLetterTopic("orders"). The client stays the caller's.
func NewDeadLetterQueue(c redis.UniversalClient, deadLetterTopic string) (*DeadLetterQueue, error) {
	errs := configErrors{typeName: "NewDeadLetterQueue"}
	if redisx.IsNil(c) {
		errs.add("c", "a client is required")
	}
	if deadLetterTopic == "" {
		errs.add("deadLetterTopic", "is empty")
	}
	if err := errs.err(); err != nil {
		return nil, err
	}
	return &DeadLetterQueue{xstream.New(redisx.Client{UniversalClient: c}, deadLetterTopic, "")}, nil
}

// Count returns the number of dead letters, of all groups of the topic.
func (q *DeadLetterQueue) Count(ctx context.Context) (int64, error) {
	n, err := q.stream.Length(ctx)
	return n, q.wrap("count", err)
}

// All returns the dead letters after the ID given, or all if it is empty, oldest
// first, up to the last one that is there when the loop begins. It holds a page
// of them in memory. What it returned may be replayed or deleted in the loop; to
// go on another day, keep the last ID.
//
// An entry that is no dead letter comes with an error, and its raw Fields; the
// loop goes on after it. When Redis does not answer, the error comes with an
// empty ID, and ends the loop.
func (q *DeadLetterQueue) All(ctx context.Context, after string) iter.Seq2[DeadMessage, error] {
	return func(yield func(DeadMessage, error) bool) {
		err := q.all(ctx, after, func(d DeadMessage, err error) bool {
			return yield(d, q.wrap("read", err))
		})
		if err != nil {
			yield(DeadMessage{}, q.wrap("read", err))
		}
	}
}

func (q *DeadLetterQueue) all(ctx context.Context, after string, yield func(DeadMessage, error) bool) error {
	start := "-"
	if after != "" {
		id, err := entryID(after)
		if err != nil {
			return err
		}
		start = "(" + id
	}
	last, err := q.stream.Newest(ctx)
	for err == nil && last != "" {
		var entries []xstream.Entry
		entries, err = q.stream.Page(ctx, start, last, deadPage)
		for _, e := range entries {
			if !yield(readLetter(e)) {
				return nil
			}
		}
		if len(entries) < deadPage {
			break
		}
		start = "(" + entries[len(entries)-1].ID
	}
	return err
}

// Replay puts dead letters back into their topic, for the group in which they
// died: an entry with the same fields, at the end of the topic, delivered as if
// for the first time. This library's Subscribers of other groups ack it without
// showing it to anybody; those of other libraries handle it. It returns how many
// were put back.
//
// Each is moved in one step, so that it is in one of the two streams, whatever
// breaks. Two windows: with more than 3,900 fields it is in both if the connection
// breaks in between, and twice in the topic if two calls replay it at once; and after
// ErrOutcomeUnknown the last ones, 100 at most, may have been moved: those are missing
// when asked for again.
//
// IDs that are not there give a *NotFoundError; the others are replayed. What
// cannot be replayed stays: an entry that is no dead letter of this library
// (Watermill's requeuer is for those), one whose group does not exist any more
// (ReplayToAll reaches those that do). An ID that is none gives an error, before
// anything is done.
func (q *DeadLetterQueue) Replay(ctx context.Context, ids ...string) (int, error) {
	n, err := q.replay(ctx, ids, false)
	return n, q.wrap("replay", err)
}

// ReplayToAll is Replay to every group of the topic, whatever the library.
func (q *DeadLetterQueue) ReplayToAll(ctx context.Context, ids ...string) (int, error) {
	n, err := q.replay(ctx, ids, true)
	return n, q.wrap("replay to all", err)
}

func (q *DeadLetterQueue) replay(ctx context.Context, ids []string, toAll bool) (int, error) {
	known := make(map[[2]string]error) // topics and groups
	send := func(ctx context.Context, ids []string) ([]error, error) {
		found, err := q.stream.Entries(ctx, ids)
		if err != nil {
			return nil, err
		}
		errs := make([]error, len(ids))
		moves := make([]*xstream.Replay, 0, len(ids))
		var at []int // which of the IDs these are
		for i, id := range ids {
			e, ok := found[id]
			if !ok {
				errs[i] = xstream.ErrMissing
				continue
			}
			d, err := readLetter(e)
			group := d.Group
			if err == nil && !toAll {
				key := [2]string{d.Topic, d.Group}
				if _, ok := known[key]; !ok {
					topic := xstream.New(q.stream.Client, d.Topic, d.Group)
					known[key] = topic.GroupExists(ctx)
				}
				err = known[key]
			}
			if errs[i] = err; err != nil {
				continue
			}
			if toAll {
				group = ""
			}
			moves = append(moves, &xstream.Replay{ID: id, Topic: d.Topic, Fields: append(d.Fields, replayMark(d.Replays+1, group)...)})
			at = append(at, i)
		}
		if err := q.stream.Replay(ctx, moves); err != nil {
			return nil, err
		}
		for i, m := range moves {
			errs[at[i]] = m.Err
		}
		return errs, nil
	}
	return q.each(ctx, ids, send)
}

// Delete deletes dead letters and returns how many. IDs that are not there give a
// *NotFoundError; the others are deleted. An ID that is none gives an error,
// before anything is done.
func (q *DeadLetterQueue) Delete(ctx context.Context, ids ...string) (int, error) {
	n, err := q.each(ctx, ids, q.stream.Delete)
	return n, q.wrap("delete", err)
}

// each does something with the IDs, a page at a time, and counts the successes.
// It goes on after what is missing, and stops after the page in which anything
// else went wrong. An ID that is given twice is taken once.
func (q *DeadLetterQueue) each(ctx context.Context, ids []string, do func(context.Context, []string) ([]error, error)) (done int, err error) {
	ids = slices.Clone(ids)
	for i := range ids {
		if ids[i], err = entryID(ids[i]); err != nil {
			return 0, err
		}
	}
	asked := make(map[string]bool, len(ids))
	ids = slices.DeleteFunc(ids, func(id string) bool {
		again := asked[id]
		asked[id] = true
		return again
	})
	var missing []string
	var failed []error
	for page := range slices.Chunk(ids, deadPage) {
		errs, err := []error(nil), ctx.Err() // before anything is sent
		if err == nil {
			errs, err = do(ctx, page)
		}
		if err != nil {
			failed = append(failed, err)
		}
		for i, err := range errs {
			switch {
			case err == nil:
				done++
			case errors.Is(err, xstream.ErrMissing):
				missing = append(missing, page[i])
			default:
				failed = append(failed, fmt.Errorf("%s: %w", page[i], err))
			}
		}
		if len(failed) > 0 {
			break
		}
	}
	if len(missing) > 0 {
		failed = append(failed, &NotFoundError{Topic: q.stream.Key, IDs: missing})
	}
	return done, errors.Join(failed...)
}

func (q *DeadLetterQueue) wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	q.stream.Client.Refresh(err)
	return fmt.Errorf("goxstreams: dead letters in %q: %s: %w", q.stream.Key, what, err)
}

// NotFoundError names the dead letters that were asked for and are not there:
// replayed or deleted before, maybe by somebody else.
type NotFoundError struct {
	Topic string // the dead-letter stream
	IDs   []string
}

// Error names ten of the IDs at most.
func (e *NotFoundError) Error() string {
	const most = 10
	if len(e.IDs) <= most {
		return "not found: " + strings.Join(e.IDs, ", ")
	}
	return fmt.Sprintf("not found: %s and %d more", strings.Join(e.IDs[:most], ", "), len(e.IDs)-most)
}

// entryID checks that the ID is one of an entry, and returns it as Redis writes it.
func entryID(id string) (string, error) {
	if id == "$" || !isStartID(id) {
		return "", fmt.Errorf("%q is no entry ID such as 1700000000000-0", id)
	}
	ms, seq := xstream.SplitID(id)
	return fmt.Sprintf("%d-%d", ms, seq), nil
}
