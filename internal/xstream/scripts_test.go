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
	var buf Buffer
	_, err = read.Do(t.Context(), client, &buf)
	require.NoError(t, err)
	return client, s, ids
}

// A renewal renews what is ours, reports what is not in the stream any more, and
// leaves alone what somebody else has, however idle it is.
func TestRenew(t *testing.T) {
	client, s, ids := newStream(t, 2300) // more than one page of the script's
	ask := ids[2000:2200]
	require.NoError(t, client.XClaimJustID(t.Context(), &redis.XClaimArgs{Stream: s.Key, Group: s.Group, Consumer: "other", Messages: ask[:10]}).Err())
	require.NoError(t, client.XDel(t.Context(), s.Key, ask[10:30]...).Err())
	require.NoError(t, client.XAck(t.Context(), s.Key, s.Group, ask[30:40]...).Err())
	renewed, trimmed, err := s.Renew(t.Context(), ask)
	require.NoError(t, err)
	assert.Equal(t, 160, len(renewed))
	assert.Equal(t, 20, len(trimmed))
	for _, id := range ask[10:30] {
		assert.True(t, trimmed[id], id)
	}
	rows, err := s.Pending(t.Context(), 0, "-", "+", 10, "other")
	require.NoError(t, err)
	require.Len(t, rows, 10)
	rows, err = s.Pending(t.Context(), 0, ask[10], ask[29], 100, "")
	require.NoError(t, err)
	require.Empty(t, rows, "what is not in the stream is not pending any more")
	renewed, trimmed, err = s.Renew(t.Context(), ask[:40])
	require.NoError(t, err)
	require.Empty(t, renewed)
	require.Empty(t, trimmed)
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
	n, _, err := s.PendingSummary(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 500, n)
}

// DeleteAcked keeps what a fan-out has not come to; when it has, or is gone, that
// goes too. Sequence numbers may be larger than Lua's numbers are exact.
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
			_, err := read.Do(t.Context(), client, new(Buffer))
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
			kept, err := s.AckAndDelete(t.Context(), by, all[1:]...) // the first stays pending
			require.NoError(t, err)
			require.EqualValues(t, 4, kept)
			require.Equal(t, []string{ids[0], ids[2], ids[3], ids[4], ids[5]}, left())

			// One is gone, the other is before the last. What is pending holds all up.
			require.NoError(t, s.RemovePosition(t.Context(), "one"))
			_, _, err = s.TrimAcked(t.Context())
			require.NoError(t, err)
			require.Len(t, left(), 5)
			_, err = s.AckAndDelete(t.Context(), by, all[0])
			require.NoError(t, err)
			more, later, err := s.TrimAcked(t.Context())
			require.NoError(t, err)
			require.False(t, more)
			require.True(t, later, "a fan-out has not come to the last one")
			require.Equal(t, []string{ids[5]}, left())
			require.NoError(t, s.SetPosition(t.Context(), "two", ids[5], time.Minute))
			_, later, err = s.TrimAcked(t.Context())
			require.NoError(t, err)
			require.False(t, later)
			require.Empty(t, left())
		})
	}
}

// What is larger than an argument may be goes to a script in pieces, and is stored
// whole.
func TestDeadLetter_Pieces(t *testing.T) {
	client, s, ids := newStream(t, 1)
	fields := []string{"small", "x", "", strings.Repeat("a", maxPiece+1), "large", strings.Repeat("b", 3*maxPiece), "exact", strings.Repeat("c", maxPiece)}
	dead := s.Key + ".dead"
	id, err := s.DeadLetter(t.Context(), dead, ids[0], 1, DeleteNever, fields)
	require.NoError(t, err)
	queue := New(s.Client, dead, "")
	e, err := queue.Entry(t.Context(), id)
	require.NoError(t, err)
	require.True(t, assert.ObjectsAreEqual(fields, e.Fields))
	again, err := s.DeadLetter(t.Context(), dead, ids[0], 1, DeleteNever, fields)
	require.NoError(t, err)
	require.Empty(t, again, "moved before")
	move := &Replay{ID: id, Topic: s.Key, Fields: fields}
	require.NoError(t, queue.Replay(t.Context(), []*Replay{move}))
	require.NoError(t, move.Err)
	require.NoError(t, queue.Replay(t.Context(), []*Replay{move}))
	require.ErrorIs(t, move.Err, ErrMissing)
	require.EqualValues(t, 2, client.XLen(t.Context(), s.Key).Val())
}
