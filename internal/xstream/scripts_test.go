package xstream

import (
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
	s := New(redisx.Client{UniversalClient: client}, fmt.Sprint(t.Name(), "-", time.Now().UnixNano()), "group")
	s.Consumer = "consumer"
	made, err := s.CreateGroup(t.Context(), "0")
	require.NoError(t, err)
	require.True(t, made)
	made, err = s.CreateGroup(t.Context(), "0")
	require.NoError(t, err)
	require.False(t, made)
	var ids []string
	for i := range entries {
		ids = append(ids, client.XAdd(t.Context(), &redis.XAddArgs{Stream: s.Key, ID: fmt.Sprintf("%d-1", i+1), Values: []string{"a", "b"}}).Val())
	}
	read := Read{Group: s.Group, Consumer: s.Consumer, From: []Cursor{{s.Key, ">"}}, Count: entries + 1, Block: -1}
	_, err = read.Do(t.Context(), client)
	require.NoError(t, err)
	return client, s, ids
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
	_, _, err = s.DeadLetter(t.Context(), s.Key+".dead", ids[0], DeleteNever, nil, []string{"a", "b"})
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

// DeleteAcked keeps entries that a fan-out has not read; once it has, or is gone,
// they are deleted too. Sequence numbers may exceed the exact range of Lua's
// numbers.
func TestPositions(t *testing.T) {
	for _, by := range []Delete{DeleteByScript, DeleteByServer} {
		t.Run(string(by), func(t *testing.T) {
			client, s, ids := newStream(t, 4)
			if by == DeleteByServer && redisx.IsDenied(s.HasAckAndDelete(t.Context())) {
				t.Skip("this server has no XACKDEL")
			}
			const large = "9007199254740993"
			for _, seq := range []string{large, "9007199254740994"} {
				ids = append(ids, client.XAdd(t.Context(), &redis.XAddArgs{Stream: s.Key, ID: "5-" + seq, Values: []string{"a", "b"}}).Val())
			}
			read := Read{Group: s.Group, Consumer: s.Consumer, From: []Cursor{{s.Key, ">"}}, Count: 10, Block: -1}
			_, err := read.Do(t.Context(), client)
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
			require.NoError(t, s.SetPosition(t.Context(), "one", "2-1", time.Minute))
			require.NoError(t, s.SetPosition(t.Context(), "two", "5-"+large, time.Minute))
			require.NoError(t, s.AckAndDelete(t.Context(), by, all[1:]...)) // the first stays pending
			require.Equal(t, []string{ids[0], ids[2], ids[3], ids[4], ids[5]}, left())

			// One is gone, the other is before the last entry. The pending entry
			// blocks everything after it.
			require.NoError(t, s.RemovePosition(t.Context(), "one"))
			trimmed, err := s.Trim(t.Context(), Retention{}, 0)
			require.NoError(t, err)
			require.Zero(t, trimmed.Trimmed)
			require.Equal(t, Pin{Group: s.Group, Consumer: s.Consumer, ID: ids[0], Age: trimmed.Pin.Age}, trimmed.Pin)
			require.Len(t, left(), 5)
			require.NoError(t, s.AckAndDelete(t.Context(), by, all[0]))
			trimmed, err = s.Trim(t.Context(), Retention{}, 0)
			require.NoError(t, err)
			require.False(t, trimmed.More)
			require.Equal(t, Pin{Consumer: "two", ID: ids[5], Age: trimmed.Pin.Age}, trimmed.Pin, "a fan-out has not come to the last one")
			require.Equal(t, []string{ids[5]}, left())
			require.NoError(t, s.SetPosition(t.Context(), "two", ids[5], time.Minute))
			trimmed, err = s.Trim(t.Context(), Retention{}, 0)
			require.NoError(t, err)
			require.Equal(t, Pin{}, trimmed.Pin)
			require.Empty(t, left())
		})
	}
}

// A step of the server's clock lets all positions expire. They are kept for another
// minute, in which a living fan-out stores its own again.
func TestTrim_ExpiredPosition(t *testing.T) {
	client, s, ids := newStream(t, 2)
	all := []any{ids[0], ids[1]}
	require.NoError(t, s.SetPosition(t.Context(), "living", ids[0], time.Hour))
	server, err := client.Time(t.Context()).Result()
	require.NoError(t, err)
	expired := func(mark string) { // as if the clock had been set forward since
		value := fmt.Sprintf("%s %d%s", ids[0], server.Unix()-1, mark)
		require.NoError(t, client.HSet(t.Context(), PositionsKey(s.Key), "living", value).Err())
	}
	expired("")
	require.NoError(t, s.AckAndDelete(t.Context(), DeleteByScript, all...))
	require.EqualValues(t, 1, client.XLen(t.Context(), s.Key).Val(), "the fan-out has not read the second one")
	_, err = s.Trim(t.Context(), Retention{}, 0)
	require.NoError(t, err)
	require.EqualValues(t, 1, client.XLen(t.Context(), s.Key).Val())
	expired("!") // it died
	_, err = s.Trim(t.Context(), Retention{}, 0)
	require.NoError(t, err)
	require.Zero(t, client.XLen(t.Context(), s.Key).Val())
	require.Zero(t, client.Exists(t.Context(), PositionsKey(s.Key)).Val())
}

// A value that is too large for an argument is sent to a script in pieces, and
// stored whole.
func TestDeadLetter_Pieces(t *testing.T) {
	client, s, ids := newStream(t, 1)
	fields := []string{"small", "x", "", strings.Repeat("a", maxPiece+1), "large", strings.Repeat("b", 3*maxPiece), "exact", strings.Repeat("c", maxPiece)}
	dead := s.Key + ".dead"
	id, how, err := s.DeadLetter(t.Context(), dead, ids[0], DeleteNever, nil, fields)
	require.NoError(t, err)
	require.Equal(t, Mine, how)
	queue := New(s.Client, dead, "")
	e, err := queue.Entry(t.Context(), id)
	require.NoError(t, err)
	require.True(t, assert.ObjectsAreEqual(fields, e.Fields))
	again, how, err := s.DeadLetter(t.Context(), dead, ids[0], DeleteNever, nil, fields)
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
		id, _, err := s.DeadLetter(t.Context(), dead, ids[i], DeleteNever, nil, letter(i))
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
			id, how, err := s.DeadLetter(t.Context(), dead, ids[i], DeleteNever, marks(i), letter(i))
			require.NoError(t, err)
			require.Equal(t, Mine, how)
			require.Equal(t, moved[i], id)
		}
	}
	require.Nil(t, pendingRow(t, s, ids[0]), "it is not to come again")
	_, how, err := s.DeadLetter(t.Context(), dead, ids[2], DeleteNever, marks(2), letter(2))
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
			made, err := s.CreateGroupAt(t.Context(), info.Last, info)
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
			made, err = s.CreateGroupAt(t.Context(), info.Last, info)
			require.NoError(t, err)
			require.False(t, made, "it is there")
		})
	}
}
