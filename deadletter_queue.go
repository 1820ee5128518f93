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

// DeadLetterQueue lists, replays and deletes the messages of a dead-letter stream.
// It keeps no state and is safe for concurrent use. You can also subscribe to dead
// letters: the stream is a topic like any other.
type DeadLetterQueue struct {
	stream xstream.Stream
}

// deadPage is how many dead letters are read or sent per round trip.
const deadPage = 100

// NewDeadLetterQueue returns the queue of a dead-letter stream, such as
// DeadLetterTopic("orders"). The caller owns the client.
func NewDeadLetterQueue(c redis.UniversalClient, deadLetterTopic string) (*DeadLetterQueue, error) {
	errs := configErrors{typeName: "NewDeadLetterQueue"}
	errs.arguments("c", c, "deadLetterTopic", deadLetterTopic)
	if err := errs.err(); err != nil {
		return nil, err
	}
	return &DeadLetterQueue{xstream.New(redisx.Client{UniversalClient: c}, deadLetterTopic, "")}, nil
}

// Count returns the number of dead letters of all groups of the topic.
func (q *DeadLetterQueue) Count(ctx context.Context) (int64, error) {
	n, err := q.stream.Length(ctx)
	return n, q.wrap("count", err)
}

// All returns the dead letters after the given ID, or all of them if it is empty,
// oldest first, up to the newest one when the loop starts. It keeps one page of
// them in memory. The loop may replay or delete the letters that it has received.
// To continue later, keep the last ID.
//
// For an entry that is not a dead letter, All yields an error along with the
// entry's raw Fields, and continues. If Redis does not answer, All yields an error
// with an empty ID, and stops.
func (q *DeadLetterQueue) All(ctx context.Context, after string) iter.Seq2[DeadMessage, error] {
	return func(yield func(DeadMessage, error) bool) {
		start, last, err := "-", "", error(nil)
		if after != "" {
			start, err = entryID(after)
			start = "(" + start
		}
		if err == nil {
			last, err = q.stream.Newest(ctx)
		}
		for more := last != ""; err == nil && more; {
			var entries []xstream.Entry
			entries, err = q.stream.Page(ctx, start, last, deadPage)
			for _, e := range entries {
				d, broken := readLetter(e)
				if !yield(d, q.wrap("read", broken)) {
					return
				}
				start = "(" + e.ID
			}
			more = len(entries) == deadPage
		}
		if err != nil {
			yield(DeadMessage{}, q.wrap("read", err))
		}
	}
}

// ReadDeadLetter returns the dead letter that an entry of a dead-letter stream is, as All does,
// given the entry's ID and its fields: name, value, .. It is for entries that were kept elsewhere,
// such as in a file. What is no dead letter of this library, or a broken one, gives an error, and
// a DeadMessage with the ID and the Fields given.
func ReadDeadLetter(id string, fields []string) (DeadMessage, error) {
	if len(fields)%2 != 0 {
		return DeadMessage{ID: id, Fields: fields}, fmt.Errorf("goxstreams: entry %s has %d names and values, an odd number", id, len(fields))
	}
	d, err := readLetter(xstream.Entry{ID: id, Fields: fields})
	if err != nil {
		err = fmt.Errorf("goxstreams: %w", err)
	}
	return d, err
}

// Replay moves dead letters back to their topic, for the group in which they died.
// It adds an entry with the same fields to the end of the topic, which is delivered
// as if for the first time. Other groups' Subscribers of this library ack the entry
// without delivering it; Subscribers of other libraries handle it. Replay returns
// the number of messages moved.
//
// Each move is atomic: whatever fails, the message is in exactly one of the two
// streams. There are two exceptions. A message with more than 3,900 fields is in
// both streams if the connection breaks during the move, and twice in the topic if
// two calls replay it concurrently. And after ErrOutcomeUnknown, up to 100 of the
// messages may have been moved: another call reports those as not found.
//
// IDs without an entry are reported in a *NotFoundError; the others are replayed.
// An entry stays in the dead-letter stream if it is not a dead letter of this
// library (use Watermill's Requeuer) or if its group no longer exists (use
// ReplayToAll to reach the existing groups). A malformed ID fails the call before
// anything is moved.
func (q *DeadLetterQueue) Replay(ctx context.Context, ids ...string) (int, error) {
	n, err := q.replay(ctx, ids, false)
	return n, q.wrap("replay", err)
}

// ReplayToAll is like Replay, but delivers to every group of the topic, whichever
// library reads it.
func (q *DeadLetterQueue) ReplayToAll(ctx context.Context, ids ...string) (int, error) {
	n, err := q.replay(ctx, ids, true)
	return n, q.wrap("replay to all", err)
}

func (q *DeadLetterQueue) replay(ctx context.Context, ids []string, toAll bool) (int, error) {
	known := make(map[[2]string]error) // group lookups by topic and group
	send := func(ctx context.Context, ids []string) ([]error, error) {
		found, err := q.stream.Entries(ctx, ids)
		if err != nil {
			return nil, err
		}
		errs := make([]error, len(ids))
		moves := make([]*xstream.Replay, 0, len(ids))
		var at []int // index in ids of each move
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
					if known[key] = topic.HasGroup(ctx); redisx.IsDenied(known[key]) {
						known[key] = nil
					}
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

// Delete deletes dead letters and returns the number deleted. IDs without an entry
// are reported in a *NotFoundError; the others are deleted. A malformed ID fails
// the call before anything is deleted.
func (q *DeadLetterQueue) Delete(ctx context.Context, ids ...string) (int, error) {
	n, err := q.each(ctx, ids, q.stream.Delete)
	return n, q.wrap("delete", err)
}

// each applies do to the IDs, one page at a time, and counts the successes. It
// continues after missing IDs, and stops after the page in which anything else
// failed. Duplicate IDs are processed once.
func (q *DeadLetterQueue) each(ctx context.Context, ids []string, do func(context.Context, []string) ([]error, error)) (done int, err error) {
	asked := make(map[string]bool, len(ids))
	var unique, missing []string
	for _, id := range ids {
		if id, err = entryID(id); err != nil {
			return 0, err
		}
		if !asked[id] {
			asked[id] = true
			unique = append(unique, id)
		}
	}
	var failed []error
	for page := range slices.Chunk(unique, deadPage) {
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
	q.stream.Client.Refresh(err)
	return wrap(err, "dead letters in %q: %s", q.stream.Key, what)
}

// NotFoundError lists dead letters that do not exist: they were already replayed or
// deleted, perhaps by somebody else.
type NotFoundError struct {
	Topic string // the dead-letter stream
	IDs   []string
}

// Error names at most ten of the IDs.
func (e *NotFoundError) Error() string {
	const most = 10
	if len(e.IDs) <= most {
		return "not found: " + strings.Join(e.IDs, ", ")
	}
	return fmt.Sprintf("not found: %s and %d more", strings.Join(e.IDs[:most], ", "), len(e.IDs)-most)
}

// entryID checks that id is an entry ID, and returns it in Redis's canonical form.
func entryID(id string) (string, error) {
	if id == "$" || !isStartID(id) {
		return "", fmt.Errorf("%q is not an entry ID such as 1700000000000-0", id)
	}
	ms, seq := xstream.SplitID(id)
	return fmt.Sprintf("%d-%d", ms, seq), nil
}
