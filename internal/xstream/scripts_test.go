package xstream

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestMain(m *testing.M) { testserver.Main(m) }

// newStream returns a stream with entries, all of which the consumer has read.
func newStream(t *testing.T, entries int) (*redis.Client, Stream, []string) {
	t.Helper()
	testserver.RequireReal(t)
	client := testserver.Client(t)
	s, ids := newStreamOf(t, client, entries)
	return client, s, ids
}

func newStreamOf(t *testing.T, client *redis.Client, entries int) (Stream, []string) {
	t.Helper()
	s := New(redisx.Client{UniversalClient: client}, fmt.Sprint(t.Name(), "-", time.Now().UnixNano()), "group")
	s.Consumer = "consumer"
	require.NoError(t, s.CreateGroup(t.Context(), "0", time.Minute))
	require.NoError(t, s.CreateGroup(t.Context(), "0", time.Minute))
	var ids []string
	for i := range entries {
		ids = append(ids, client.XAdd(t.Context(), &redis.XAddArgs{Stream: s.Key, ID: fmt.Sprintf("%d-1", i+1), Values: []string{"a", "b"}}).Val())
	}
	readNew(t, client, s)
	return s, ids
}

// readNew reads what the group has not read yet.
func readNew(t *testing.T, client *redis.Client, s Stream) {
	t.Helper()
	read := Read{Group: s.Group, Consumer: s.Consumer, From: []Cursor{{s.Key, ">"}}, Count: 10_000, Block: -1}
	_, err := read.Do(t.Context(), client, new(Replies))
	require.NoError(t, err)
}

// mixed returns one entry of each standing, in ID order.
func mixed(t *testing.T) (*redis.Client, Stream, map[Standing]string) {
	t.Helper()
	client, s, ids := newStream(t, 5)
	require.NoError(t, client.XClaimJustID(t.Context(), &redis.XClaimArgs{Stream: s.Key, Group: s.Group, Consumer: "other", Messages: ids[1:2]}).Err())
	require.NoError(t, client.XAck(t.Context(), s.Key, s.Group, ids[2], ids[4]).Err())
	require.NoError(t, client.XDel(t.Context(), s.Key, ids[3:]...).Err())
	return client, s, map[Standing]string{Mine: ids[0], Elsewhere: ids[1], Settled: ids[2], Trimmed: ids[3], Gone: ids[4]}
}

func pendingRow(t *testing.T, s Stream, id string) *Pending {
	t.Helper()
	rows, err := s.Pending(t.Context(), 0, id, id, 1, "")
	require.NoError(t, err)
	if len(rows) == 0 {
		return nil
	}
	return &rows[0]
}

// A renewal renews our entries, and returns the standing of the others; it does not
// touch another consumer's entries, however idle they are.
func TestRenew(t *testing.T) {
	_, s, of := mixed(t)
	ids := []string{of[Mine], of[Elsewhere], of[Settled], of[Trimmed], of[Gone]}
	others, err := s.Renew(t.Context(), ids)
	require.NoError(t, err)
	require.Equal(t, map[string]Standing{of[Elsewhere]: Elsewhere, of[Settled]: Settled, of[Trimmed]: Trimmed, of[Gone]: Gone}, others)
	require.Equal(t, "other", pendingRow(t, s, of[Elsewhere]).Consumer)
	require.Nil(t, pendingRow(t, s, of[Trimmed]), "what is not in the stream is not pending any more")
	others, err = s.Renew(t.Context(), ids[3:4])
	require.NoError(t, err)
	require.Equal(t, map[string]Standing{of[Trimmed]: Gone}, others, "again")
}

func TestRenew_ManyPages(t *testing.T) {
	client, s, ids := newStream(t, 2300) // more than one page of the script
	ask := ids[2000:2250]
	require.NoError(t, client.XClaimJustID(t.Context(), &redis.XClaimArgs{Stream: s.Key, Group: s.Group, Consumer: "other", Messages: ask[:10]}).Err())
	others, err := s.Renew(t.Context(), ask)
	require.NoError(t, err)
	require.Len(t, others, 10)
}

// Take counts a delivery of an entry that is ours, or that was found elsewhere and
// not touched since; it may run twice.
func TestTake(t *testing.T) {
	client, s, of := mixed(t)
	for range 2 {
		e, how, err := s.Take(t.Context(), of[Mine], "", 1, 0, 2)
		require.NoError(t, err)
		require.Equal(t, Mine, how)
		require.Equal(t, []string{"a", "b"}, e.Fields)
		require.EqualValues(t, 2, pendingRow(t, s, of[Mine]).Count)
	}
	for _, how := range []Standing{Elsewhere, Settled, Trimmed, Gone} {
		e, got, err := s.Take(t.Context(), of[how], "", 1, 0, 2)
		require.NoError(t, err)
		require.Equal(t, how, got)
		require.Nil(t, e)
	}
	id := of[Elsewhere]
	require.NoError(t, client.Do(t.Context(), "xclaim", s.Key, s.Group, "other", 0, id, "idle", 5000, "retrycount", 3, "justid").Err())
	for _, tt := range []struct {
		name, owner string
		count       int64
		idle        time.Duration
		want        Standing
	}{
		{"another owner", "third", 3, 0, Elsewhere},
		{"another count", "other", 2, 0, Elsewhere},
		{"touched since", "other", 3, time.Minute, Elsewhere},
		{"as seen", "other", 3, 4 * time.Second, Mine},
		{"again", "other", 3, 4 * time.Second, Mine},
		{"taken, and counted since", "other", 7, 0, Elsewhere},
	} {
		_, how, err := s.Take(t.Context(), id, tt.owner, tt.count, tt.idle, tt.count+1)
		require.NoError(t, err)
		require.Equal(t, tt.want, how, tt.name)
	}
	row := pendingRow(t, s, id)
	require.Equal(t, s.Consumer, row.Consumer)
	require.EqualValues(t, 4, row.Count)
}

func TestAssign(t *testing.T) {
	_, s, of := mixed(t)
	entries := []Counted{{of[Mine], 7}, {of[Elsewhere], 8}, {of[Settled], 9}}
	given, err := s.Assign(t.Context(), "heir", entries)
	require.NoError(t, err)
	require.Equal(t, map[string]bool{of[Mine]: true}, given)
	row := pendingRow(t, s, of[Mine])
	require.Equal(t, "heir", row.Consumer)
	require.EqualValues(t, 7, row.Count)
	given, err = s.Assign(t.Context(), "heir", entries)
	require.NoError(t, err)
	require.Empty(t, given, "it is not ours any more")
}

func TestRestore(t *testing.T) {
	_, s, of := mixed(t)
	entries := []Counted{{of[Mine], 7}, {of[Elsewhere], 8}, {of[Settled], 9}, {of[Gone], 1}}
	for range 2 {
		others, err := s.Restore(t.Context(), entries)
		require.NoError(t, err)
		require.Equal(t, map[string]Standing{of[Elsewhere]: Elsewhere, of[Gone]: Gone}, others)
		require.EqualValues(t, 1, pendingRow(t, s, of[Mine]).Count, "it was not lost")
		require.EqualValues(t, 9, pendingRow(t, s, of[Settled]).Count)
	}
}

// Without a group an entry has no standing.
func TestOwnership_NoGroup(t *testing.T) {
	client, s, ids := newStream(t, 1)
	require.NoError(t, client.XGroupDestroy(t.Context(), s.Key, s.Group).Err())
	_, err := s.Renew(t.Context(), ids)
	require.True(t, GroupLost(err), "%v", err)
	_, _, err = s.Take(t.Context(), ids[0], "", 1, 0, 2)
	require.True(t, GroupLost(err), "%v", err)
	_, err = s.Assign(t.Context(), "heir", []Counted{{ids[0], 1}})
	require.True(t, GroupLost(err), "%v", err)
	_, err = s.Restore(t.Context(), []Counted{{ids[0], 1}})
	require.True(t, GroupLost(err), "%v", err)
	_, _, err = s.DeadLetter(t.Context(), s.Key+".dead", ids[0], false, nil, []string{"a", "b"})
	require.True(t, GroupLost(err), "%v", err)
	require.True(t, GroupLost(s.Probe(t.Context())))
}

func TestAckTrimmed(t *testing.T) {
	client, s, ids := newStream(t, 1000)
	for i := 0; i < len(ids); i += 2 {
		require.NoError(t, client.XDel(t.Context(), s.Key, ids[i]).Err())
	}
	require.NoError(t, client.XAck(t.Context(), s.Key, s.Group, ids[0]).Err(), "somebody else was faster")
	trimmed, err := s.AckTrimmed(t.Context(), ids)
	require.NoError(t, err)
	require.Equal(t, 499, len(trimmed))
	sum, err := s.PendingSummary(t.Context())
	require.NoError(t, err)
	require.Equal(t, Summary{Count: 500, First: ids[1], Consumers: map[string]int64{"consumer": 500}}, sum)
}

// eachWay runs the test as a user for whom the server itself deletes what was acked, if it has
// XACKDEL, and as one for whom a script does.
func eachWay(t *testing.T, test func(t *testing.T, client *redis.Client, byServer bool)) {
	t.Helper()
	testserver.RequireReal(t)
	client := testserver.Client(t)
	_, err := redisx.Do(t.Context(), client, "xackdel", "none", "group", "acked", "ids", 1, "0-1")
	if redisx.IsDenied(err) {
		t.Run("XDEL", func(t *testing.T) { test(t, client, false) })
		return
	}
	t.Run("XACKDEL", func(t *testing.T) { test(t, client, true) })
	t.Run("XDEL", func(t *testing.T) {
		name := fmt.Sprint("user-", time.Now().UnixNano())
		require.NoError(t, client.ACLSetUser(t.Context(), name, "on", ">secret", "~*", "+@all", "-xackdel").Err())
		defer client.ACLDelUser(context.Background(), name)
		options := *client.Options()
		options.Username, options.Password = name, "secret"
		user := redis.NewClient(&options)
		defer user.Close()
		test(t, user, false)
	})
}

// DeleteAcked keeps entries that a fan-out has not read; once it has, or is gone,
// they are deleted too. Sequence numbers may exceed the exact range of Lua's
// numbers.
func TestPositions(t *testing.T) {
	eachWay(t, func(t *testing.T, client *redis.Client, _ bool) {
		s, ids := newStreamOf(t, client, 4)
		const large = "9007199254740993"
		for _, seq := range []string{large, "9007199254740994"} {
			ids = append(ids, client.XAdd(t.Context(), &redis.XAddArgs{Stream: s.Key, ID: "5-" + seq, Values: []string{"a", "b"}}).Val())
		}
		read := Read{Group: s.Group, Consumer: s.Consumer, From: []Cursor{{s.Key, ">"}}, Count: 10, Block: -1}
		_, err := read.Do(t.Context(), client, new(Replies))
		require.NoError(t, err)
		all := make([]any, len(ids))
		for i, id := range ids {
			all[i] = id
		}
		left := func() []string {
			var left []string
			for _, m := range client.XRange(t.Context(), s.Key, "-", "+").Val() {
				left = append(left, m.ID)
			}
			return left
		}
		require.NoError(t, s.SetPosition(t.Context(), "one", "2-1", Info{}, time.Minute))
		require.NoError(t, s.SetPosition(t.Context(), "two", "5-"+large, Info{}, time.Minute))
		require.NoError(t, s.Ack(t.Context(), true, all[1:]...)) // the first stays pending
		require.Equal(t, []string{ids[0], ids[2], ids[3], ids[4], ids[5]}, left())

		// One is gone, the other is before the last entry. The pending entry
		// blocks everything after it.
		require.NoError(t, s.RemovePosition(t.Context(), "one"))
		trimmed, err := s.Trim(t.Context(), Retention{}, "", "", 0)
		require.NoError(t, err)
		require.Zero(t, trimmed.Trimmed)
		require.Equal(t, Pin{Group: s.Group, Consumer: s.Consumer, ID: ids[0], Age: trimmed.Pin.Age}, trimmed.Pin)
		require.Len(t, left(), 5)
		require.NoError(t, s.Ack(t.Context(), true, all[0]))
		trimmed, err = s.Trim(t.Context(), Retention{}, "", "", 0)
		require.NoError(t, err)
		require.False(t, trimmed.More)
		require.Equal(t, Pin{Consumer: "two", ID: ids[5], Age: trimmed.Pin.Age}, trimmed.Pin, "a fan-out has not come to the last one")
		require.Equal(t, []string{ids[5]}, left())
		require.NoError(t, s.SetPosition(t.Context(), "two", ids[5], Info{}, time.Minute))
		trimmed, err = s.Trim(t.Context(), Retention{}, "", "", 0)
		require.NoError(t, err)
		require.Equal(t, Pin{}, trimmed.Pin)
		require.Empty(t, left())
	})
}

// A step of the server's clock lets all positions expire. They are kept for another
// minute, in which a living fan-out stores its own again.
func TestTrim_ExpiredPosition(t *testing.T) {
	client, s, ids := newStream(t, 2)
	all := []any{ids[0], ids[1]}
	require.NoError(t, s.SetPosition(t.Context(), "living", ids[0], Info{}, time.Hour))
	expired := func(mark string) { // as if the clock had been set forward since
		setExpired(t, client, s, ids[0], time.Second, mark)
	}
	expired("")
	require.NoError(t, s.Ack(t.Context(), true, all...))
	require.EqualValues(t, 1, client.XLen(t.Context(), s.Key).Val(), "the fan-out has not read the second one")
	_, err := s.Trim(t.Context(), Retention{}, "", "", 0)
	require.NoError(t, err)
	require.EqualValues(t, 1, client.XLen(t.Context(), s.Key).Val())
	expired("!") // it died
	_, err = s.Trim(t.Context(), Retention{}, "", "", 0)
	require.NoError(t, err)
	require.Zero(t, client.XLen(t.Context(), s.Key).Val())
	require.Zero(t, client.Exists(t.Context(), PositionsKey(s.Key)).Val())
}

// A stream that is deleted and recreated may have smaller IDs than the old one: a position of a
// fan-out in that one says nothing about it. Until the fan-out has stored a new one, all of its
// entries are unread.
func TestPosition_StreamBeganAnew(t *testing.T) {
	for _, test := range []struct {
		name string
		then []string // what becomes of the stream: "ID" or "ID payload" adds an entry; or a command
		anew bool
	}{
		{"nothing happened", nil, false},
		{"added", []string{"6-1", "7-1"}, false},
		{"trimmed", []string{"xtrim maxlen 1", "6-1"}, false},
		{"emptied", []string{"xtrim maxlen 0", "6-1"}, false},
		{"deleted from both ends", []string{"xdel 2-1", "xdel 5-1", "6-1"}, false},
		{"set to a greater ID", []string{"xsetid 9-1", "10-1"}, false},
		{"set to fewer entries", []string{"xtrim maxlen 2", "xsetid 5-1 entriesadded 3 maxdeletedid 3-1"}, true},
		{"recreated, smaller IDs", []string{"del", "1-1", "1-2", "1-3"}, true},
		{"recreated, fewer entries", []string{"del", "2-1", "3-1", "8-1"}, true},
		{"recreated, grown past the position", []string{"del", "1-1", "2-1", "3-1", "4-1", "5-1", "6-1"}, true},
		{"recreated, the same IDs", []string{"del", "2-1 other", "3-1", "4-1", "5-1", "6-1"}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			testserver.RequireReal(t)
			client := testserver.Client(t)
			s := New(redisx.Client{UniversalClient: client}, fmt.Sprint(t.Name(), "-", time.Now().UnixNano()), "group")
			change := func(step string) {
				t.Helper()
				words := strings.Fields(step)
				args := []any{words[0], s.Key}
				if strings.Contains(words[0], "-") {
					args, words = []any{"xadd", s.Key, words[0], "payload", strings.Join(words[1:], "")}, nil
				}
				for _, word := range words[min(1, len(words)):] {
					args = append(args, word)
				}
				require.NoError(t, client.Do(t.Context(), args...).Err())
			}
			for _, id := range []string{"2-1", "3-1", "4-1", "5-1"} {
				change(id)
			}
			info, err := s.Info(t.Context())
			require.NoError(t, err)
			require.NoError(t, s.SetPosition(t.Context(), "fan-out", "5-1", info, time.Minute))
			for _, step := range test.then {
				change(step)
			}
			least := func(read int) {
				t.Helper()
				length := client.XLen(t.Context(), s.Key).Val()
				trimmed, err := s.Trim(t.Context(), Retention{KeepFor: time.Millisecond}, "", "", 0)
				require.NoError(t, err)
				require.EqualValues(t, read, trimmed.Trimmed)
				require.Equal(t, length, trimmed.Trimmed+trimmed.Length)
			}
			page, err := s.Page(t.Context(), "-", "5-1", 10)
			require.NoError(t, err)
			if !test.anew {
				least(len(page))
				return
			}
			least(0)
			// The fan-out has noticed, and read one of the new ones.
			info, err = s.Info(t.Context())
			require.NoError(t, err)
			require.NoError(t, s.SetPosition(t.Context(), "fan-out", page[0].ID, info, time.Minute))
			least(1)
			require.NoError(t, s.RemovePosition(t.Context(), "fan-out"))
			require.Zero(t, client.Exists(t.Context(), PositionsKey(s.Key)).Val())
		})
	}
}

// setExpired stores the position of a fan-out that expired some time ago.
func setExpired(t *testing.T, client *redis.Client, s Stream, id string, since time.Duration, mark string) {
	t.Helper()
	now, err := client.Time(t.Context()).Result()
	require.NoError(t, err)
	value := fmt.Sprintf("%s %d%s", id, now.Add(-since).Unix(), mark)
	require.NoError(t, client.HSet(t.Context(), PositionsKey(s.Key), "living", value).Err())
}

func setFull(t *testing.T, client *redis.Client, full bool) {
	t.Helper()
	limit := map[bool]string{false: "0", true: "1"}[full]
	require.NoError(t, client.ConfigSet(t.Context(), "maxmemory", limit).Err())
}

// A Redis that is out of memory accepts acks and deletions, so it must accept the positions of
// fan-outs, too, and must not take a position that it cannot mark for that of a dead fan-out.
func TestPosition_RedisFull(t *testing.T) {
	t.Parallel()
	client := testserver.Private(t).Client()
	s, ids := newStreamOf(t, client, 4)
	length := func() int64 { return client.XLen(t.Context(), s.Key).Val() }
	setFull(t, client, true)
	require.NoError(t, s.SetPosition(t.Context(), "living", ids[0], Info{}, time.Hour))
	require.NoError(t, s.SetPosition(t.Context(), "living", ids[1], Info{}, time.Hour))
	require.NoError(t, s.Ack(t.Context(), true, ids[0], ids[1], ids[2]))
	require.EqualValues(t, 2, length(), "the fan-out has read two")

	setFull(t, client, false)
	setExpired(t, client, s, ids[1], time.Second, "")
	setFull(t, client, true)
	require.NoError(t, s.Ack(t.Context(), true, ids[3]))
	require.EqualValues(t, 2, length(), "a step of the clock loses a place")
	require.Contains(t, client.HGet(t.Context(), PositionsKey(s.Key), "living").Val(), "!")

	// The mark is refused for another reason.
	setFull(t, client, false)
	require.NoError(t, client.ACLSetUser(t.Context(), "user", "on", ">secret", "~*", "+@all", "-hset").Err())
	options := *client.Options()
	options.Username, options.Password = "user", "secret"
	user := redis.NewClient(&options)
	defer user.Close()
	theirs := s
	theirs.Client = redisx.Client{UniversalClient: user}
	theirs.Via = theirs.Client
	for i, since := range []time.Duration{30 * time.Second, 2 * time.Minute} {
		setExpired(t, client, s, ids[1], since, "")
		added := client.XAdd(t.Context(), &redis.XAddArgs{Stream: s.Key, Values: []string{"a", "b"}}).Val()
		readNew(t, client, s)
		require.NoError(t, theirs.Ack(t.Context(), true, added))
		require.EqualValues(t, 3, length())
		require.EqualValues(t, 1-i, client.Exists(t.Context(), PositionsKey(s.Key)).Val(), "expired for %s", since)
	}
}

// A Redis that is out of memory answers XGROUP CREATE with OOM whether the group exists or not.
// A consumer of a group that exists, or existed, needs it to make room.
func TestCreateGroup_RedisFull(t *testing.T) {
	t.Parallel()
	client := testserver.Private(t).Client()
	s, ids := newStreamOf(t, client, 3)
	setFull(t, client, true)
	require.NoError(t, s.CreateGroup(t.Context(), "0", time.Minute))
	other := s
	other.Group = "other"
	err := other.CreateGroup(t.Context(), "0", time.Minute)
	require.True(t, redisx.OutOfMemory(err), err)
	other.Consumer = "other"
	require.NoError(t, other.CreateConsumer(t.Context()))

	info, err := s.Info(t.Context())
	require.NoError(t, err)
	for _, start := range []string{ids[0], "0"} {
		require.NoError(t, client.XGroupDestroy(t.Context(), s.Key, s.Group).Err())
		for _, want := range []bool{true, false} {
			made, err := s.CreateGroupAt(t.Context(), start, info, nil, time.Minute, false)
			require.NoError(t, err)
			require.Equal(t, want, made)
		}
	}
}

// A value that is too large for an argument is sent to a script in pieces, and
// stored whole.
func TestDeadLetter_Pieces(t *testing.T) {
	client, s, ids := newStream(t, 1)
	fields := []string{"small", "x", "", strings.Repeat("a", maxPiece+1), "large", strings.Repeat("b", 3*maxPiece), "exact", strings.Repeat("c", maxPiece)}
	dead := s.Key + ".dead"
	id, how, err := s.DeadLetter(t.Context(), dead, ids[0], false, nil, fields)
	require.NoError(t, err)
	require.Equal(t, Mine, how)
	queue := New(s.Client, dead, "")
	e, err := queue.Entry(t.Context(), id)
	require.NoError(t, err)
	require.True(t, assert.ObjectsAreEqual(fields, e.Fields))
	again, how, err := s.DeadLetter(t.Context(), dead, ids[0], false, nil, fields)
	require.NoError(t, err)
	require.Empty(t, again, "moved before")
	require.Equal(t, Settled, how)
	move := &Replay{ID: id, Topic: s.Key, Fields: fields}
	require.NoError(t, queue.Replay(t.Context(), []*Replay{move}))
	require.NoError(t, move.Err)
	require.NoError(t, queue.Replay(t.Context(), []*Replay{move}))
	require.ErrorIs(t, move.Err, ErrMissing)
	require.EqualValues(t, 2, client.XLen(t.Context(), s.Key).Val())
}

// A move whose answer was lost is found by the marks in the letter's metadata,
// whatever happened to the consumer and the group since.
func TestDeadLetter_Marks(t *testing.T) {
	client, s, ids := newStream(t, 3)
	dead := s.Key + ".dead"
	letter := func(i int) []string {
		return []string{"uuid", "x", "metadata", fmt.Sprint("<id ", ids[i], "><group g>")}
	}
	marks := func(i int) []string { return []string{fmt.Sprint("<id ", ids[i], ">"), "<group g>"} }
	var moved []string
	for i := range 2 {
		id, _, err := s.DeadLetter(t.Context(), dead, ids[i], false, nil, letter(i))
		require.NoError(t, err)
		moved = append(moved, id)
	}
	for range 150 { // more than a page of other letters
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: dead, Values: []string{"uuid", "y", "metadata", "<id 0-0>"}}).Err())
	}
	require.NoError(t, client.XGroupDelConsumer(t.Context(), s.Key, s.Group, s.Consumer).Err())
	_, err := s.Restore(t.Context(), []Counted{{ids[0], 1}}) // as if it had been lost with its group
	require.NoError(t, err)
	for range 2 {
		for i := range 2 {
			id, how, err := s.DeadLetter(t.Context(), dead, ids[i], false, marks(i), letter(i))
			require.NoError(t, err)
			require.Equal(t, Mine, how)
			require.Equal(t, moved[i], id)
		}
	}
	require.Nil(t, pendingRow(t, s, ids[0]), "it is not to come again")
	_, how, err := s.DeadLetter(t.Context(), dead, ids[2], false, marks(2), letter(2))
	require.NoError(t, err)
	require.Equal(t, Settled, how, "it was not moved, and is not ours")
	require.EqualValues(t, 152, client.XLen(t.Context(), dead).Val())
}

// A group is recreated at its position, unless the stream was recreated since it
// was looked at.
func TestCreateGroupAt(t *testing.T) {
	testserver.RequireReal(t)
	client := testserver.Client(t)
	for _, test := range []struct {
		name    string
		before  []string // the stream's IDs when it is looked at
		trim    string   // MINID
		after   []string
		deleted bool // in between
		made    bool
	}{
		{name: "Same", before: []string{"1000-1", "1000-2"}, made: true},
		{name: "Grown", before: []string{"1000-1", "1000-2"}, after: []string{"1000-3", "10000-1"}, made: true},
		{name: "Trimmed", before: []string{"999-1", "1000-2"}, trim: "1000-2", made: true},
		{name: "TrimmedEmpty", before: []string{"999-1", "1000-2"}, trim: "1000-3", made: true},
		{name: "Deleted", before: []string{"1000-1"}, deleted: true},
		{name: "SmallerLast", before: []string{"1000-1"}, deleted: true, after: []string{"999-1"}},
		{name: "SmallerFirst", before: []string{"1000-1"}, deleted: true, after: []string{"999-1", "1001-1"}},
		{name: "SmallerSequence", before: []string{"1000-10"}, deleted: true, after: []string{"1000-9", "1001-1"}},
		{name: "Fewer", before: []string{"1000-1", "1000-2"}, deleted: true, after: []string{"2000-1"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := New(redisx.Client{UniversalClient: client}, fmt.Sprint(t.Name(), "-", time.Now().UnixNano()), "group")
			add := func(ids []string) {
				for _, id := range ids {
					require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: s.Key, ID: id, Values: []string{"a", "b"}}).Err())
				}
			}
			add(test.before)
			info, err := s.Info(t.Context())
			require.NoError(t, err)
			if test.deleted {
				require.NoError(t, client.Del(t.Context(), s.Key).Err())
			}
			if test.trim != "" {
				require.NoError(t, client.XTrimMinID(t.Context(), s.Key, test.trim).Err())
			}
			add(test.after)
			made, err := s.CreateGroupAt(t.Context(), info.Last, info, nil, time.Minute, false)
			require.Equal(t, test.made, made)
			if !test.made {
				require.ErrorContains(t, err, "CHANGED")
				require.Zero(t, client.Exists(t.Context(), s.Key).Val()-int64(min(1, len(test.after))), "nothing is made")
				return
			}
			require.NoError(t, err)
			group, err := s.GroupInfo(t.Context())
			require.NoError(t, err)
			require.Equal(t, info.Last, group.LastDelivered)
			made, err = s.CreateGroupAt(t.Context(), info.Last, info, nil, time.Minute, false)
			require.NoError(t, err)
			require.False(t, made, "it is there")
		})
	}
}
