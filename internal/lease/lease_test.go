package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

func TestMain(m *testing.M) { testserver.Main(m) }

var errLost = errors.New("lost")

// holder is a consumer that has entries, like a subscription.
type holder struct {
	*Keeper
	t      *testing.T
	client *redis.Client
	stream *xstream.Stream
	ledger *ledger.Ledger
}

func newHolder(t *testing.T, minIdle time.Duration) *holder {
	t.Helper()
	testserver.RequireReal(t)
	client := testserver.Client(t)
	stream := xstream.New(redisx.Client{UniversalClient: client}, fmt.Sprint(t.Name(), "-", time.Now().UnixNano()), "group")
	stream.Consumer = "holder"
	err := stream.CreateGroup(t.Context(), "0", time.Minute)
	require.NoError(t, err)
	l := ledger.New(ledger.Config{Slots: 1000, Leased: true, Bounds: ledger.NewBounds(), Lost: errLost, Compare: xstream.CompareIDs})
	return &holder{
		Keeper: New(Config{Stream: &stream, Ledger: l, MinIdle: minIdle, Log: watermill.NopLogger{}}),
		t:      t, client: client, stream: &stream, ledger: l,
	}
}

func (h *holder) publish(ids ...string) {
	h.t.Helper()
	for _, id := range ids {
		require.NoError(h.t, h.client.XAdd(h.t.Context(), &redis.XAddArgs{Stream: h.stream.Key, ID: id, Values: []string{"id", id}}).Err())
	}
}

// read reads the available entries, like the poller, and has slots take them.
func (h *holder) read() (taken []*ledger.Entry) {
	h.t.Helper()
	sent := time.Now()
	read := xstream.Read{Group: "group", Consumer: "holder", From: []xstream.Cursor{{Key: h.stream.Key, After: ">"}}, Count: 1000, Block: -1}
	readings, err := read.Do(h.t.Context(), h.client, new(xstream.Replies))
	require.NoError(h.t, err)
	for _, r := range readings {
		var entries []*ledger.Entry
		for _, e := range r.Entries {
			entry := (&ledger.Entry{ID: e.ID, Fields: e.Fields}).SetCount(1, 2)
			entries = append(entries, entry)
			h.SawEntry(e)
		}
		h.ledger.Add(time.Now(), sent, entries)
	}
	for {
		before := len(taken)
		if taken, _ = h.ledger.Take(time.Now(), taken); len(taken) == before {
			return taken
		}
	}
}

func (h *holder) wait(entries ...*ledger.Entry) {
	for _, e := range entries {
		h.ledger.Retry(time.Now(), e, time.Now().Add(time.Hour))
	}
}

func (h *holder) pending() (ids []string) {
	h.t.Helper()
	rows, err := h.stream.Pending(h.t.Context(), 0, "-", "+", 10_000, "holder")
	require.NoError(h.t, err)
	for _, r := range rows {
		ids = append(ids, r.ID)
	}
	return ids
}

// remake recreates the group, to start after the ID.
func (h *holder) remake(start string) {
	h.t.Helper()
	_, err := h.client.TxPipelined(h.t.Context(), func(p redis.Pipeliner) error {
		p.XGroupDestroy(h.t.Context(), h.stream.Key, "group")
		p.XGroupCreate(h.t.Context(), h.stream.Key, "group", start)
		return nil
	})
	require.NoError(h.t, err)
}

// cutSecondRestore lets the second command that restores entries fail.
func (h *holder) cutSecondRestore() {
	restores := 0
	h.client.AddHook(failing{fail: func(cmd redis.Cmder) error {
		if isScript(cmd, "restore") {
			if restores++; restores == 2 {
				return io.EOF
			}
		}
		return nil
	}})
}

// releasing publishes and reads n entries, and begins their release.
func (h *holder) releasing(n int) []*ledger.Entry {
	for i := range n {
		h.publish(fmt.Sprint(i+1, "-1"))
	}
	entries := h.read()
	h.ledger.Releasing(time.Now(), entries...)
	return entries
}

func (h *holder) requireReleased(n int) {
	h.t.Helper()
	rows, err := h.stream.Pending(h.t.Context(), 0, "-", "+", 10_000, Released)
	require.NoError(h.t, err)
	require.Len(h.t, rows, n)
	require.EqualValues(h.t, n, h.GivenBack.Load())
}

// Whatever a recreated group delivers again, or has delivered since, all entries
// that waited in the old one are restored.
func TestRenew_GroupMadeAnew(t *testing.T) {
	for _, tt := range []struct {
		name    string
		n       int
		start   string
		then    []string // published and read after that
		renewed bool     // renewed before that
	}{
		{name: "Several", n: 4, start: "$"},
		{name: "SeveralAndOneMore", n: 4, start: "$", then: []string{"9-1"}},
		{name: "OneIsDeliveredAgain", n: 4, start: "3-1", renewed: true, then: []string{}},
		{name: "One", n: 1, start: "$"},
		{name: "OneAndOneMore", n: 1, start: "$", then: []string{"9-1"}},
		{name: "OneThatWasRenewedAndOneMore", n: 1, start: "$", renewed: true, then: []string{"9-1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHolder(t, time.Minute)
			var want []string
			for i := range tt.n {
				want = append(want, fmt.Sprintf("%d-1", i+1))
			}
			h.publish(want...)
			h.wait(h.read()...)
			if tt.renewed {
				require.NoError(t, h.Renew(t.Context(), 0))
			}
			h.remake(tt.start)
			if tt.then != nil {
				h.publish(tt.then...)
				h.read()
			}
			require.NoError(t, h.Renew(t.Context(), 0))
			require.Equal(t, append(want, tt.then...), h.pending())
			require.Zero(t, h.Lost.Load())
		})
	}
}

// The same after an outage that was longer than a lease, when others may also have
// taken and acked the missing entries.
func TestRenew_AfterALongOutage(t *testing.T) {
	for _, remade := range []bool{true, false} {
		t.Run(fmt.Sprint("GroupMadeAnew", remade), func(t *testing.T) {
			h := newHolder(t, 50*time.Millisecond)
			h.publish("1-1", "2-1", "3-1", "4-1")
			waiting := h.read()
			h.wait(waiting...)
			time.Sleep(1200 * time.Millisecond) // the outage: a lease, plus the tolerance of consumerIsNew
			if remade {
				h.remake("$")
			} else {
				require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1", "3-1", "4-1").Err())
			}
			require.NoError(t, h.Renew(t.Context(), 0))
			if remade {
				require.Len(t, h.pending(), 4)
			} else {
				require.Empty(t, h.pending(), "they were settled, and would come again")
				require.True(t, waiting[0].Lost())
			}
		})
	}
}

// A single entry is no longer pending, and nothing was read since: acked by hand,
// or the group was recreated. While a handler has it, it is restored; otherwise the
// server's record of the consumer decides.
func TestRenew_OneIsMissing(t *testing.T) {
	for _, inHand := range []bool{true, false} {
		t.Run(fmt.Sprint("InHand", inHand), func(t *testing.T) {
			h := newHolder(t, time.Minute)
			h.publish("1-1")
			e := h.read()[0]
			if inHand {
				cancel := context.CancelCauseFunc(func(error) {})
				require.True(t, e.Attach(&cancel))
			} else {
				h.wait(e)
			}
			require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1").Err())
			require.NoError(t, h.Renew(t.Context(), 0))
			require.Equal(t, inHand, len(h.pending()) == 1)
			require.Equal(t, !inHand, e.Lost())
		})
	}
}

// failing makes some of the commands that pass through it fail.
type failing struct {
	redis.Cmdable
	fail func(cmd redis.Cmder) error
}

func (f failing) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

func (f failing) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if err := f.fail(cmd); err != nil {
			return err
		}
		return next(ctx, cmd)
	}
}

func (f failing) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func isScript(cmd redis.Cmder, name string) bool {
	return cmd.Name() == "eval" && strings.HasPrefix(fmt.Sprint(cmd.Args()[1]), "-- "+name+"\n")
}

// Our entries are restored by several commands. One fails: its entries are restored
// later, and not given up because others are pending.
func TestRegroup_Halfway(t *testing.T) {
	h := newHolder(t, time.Minute)
	const n = 2*xstream.MaxOwned + 50
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprintf("%d-1", i+1))
	}
	h.publish(ids...)
	h.wait(h.read()...)
	h.cutSecondRestore()
	h.remake("$")
	require.Error(t, h.Regroup(t.Context()))
	require.Len(t, h.pending(), xstream.MaxOwned)
	require.NoError(t, h.Renew(t.Context(), 0))
	require.Len(t, h.pending(), n)
	require.Zero(t, h.Lost.Load())
}

// Who recreates the group does not lose its entries if it ends right after that.
func TestRegroup_AtOnce(t *testing.T) {
	h := newHolder(t, time.Minute)
	const n = xstream.MaxOwned + 50
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprintf("%d-1", i+1))
	}
	h.publish(ids...)
	entries := h.read()
	h.wait(entries[2:]...)
	h.ledger.Moving(entries[2], ledger.MaybeMoved) // without an answer: it is judged later
	h.ledger.Remove(time.Now(), entries[3])
	h.ledger.Offer(time.Now(), []*ledger.Entry{(&ledger.Entry{ID: ids[3]}).SetCount(1, 1)}, false) // an orphan, just found
	require.NoError(t, h.client.XGroupDestroy(t.Context(), h.stream.Key, "group").Err())
	require.NoError(t, h.client.XDel(t.Context(), h.stream.Key, ids[1]).Err())
	ended := errors.New("ended")
	h.client.AddHook(failing{fail: func(cmd redis.Cmder) error {
		if isScript(cmd, "create") {
			h.ledger.Acked(time.Now(), entries[0]) // while the command is on its way: its XACK finds no group
		}
		if isScript(cmd, "restore") {
			return ended
		}
		return nil
	}})
	require.ErrorIs(t, h.Regroup(t.Context()), ended)
	require.Equal(t, ids[2:], h.pending(), "neither what was acked nor what is deleted")
	rows, err := h.stream.Pending(t.Context(), 0, "-", "+", 1, "holder")
	require.NoError(t, err)
	require.EqualValues(t, 1, rows[0].Count)
}

// What may have been moved is not made pending in a stream that began anew: its ID is another entry's there, which would be acked
// unseen by the next attempt to move it.
func TestRegroup_StreamBeganAnew(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1", "2-1")
	entries := h.read()
	h.wait(entries...)
	h.ledger.Moving(entries[0], ledger.MaybeMoved)
	require.NoError(t, h.client.Del(t.Context(), h.stream.Key).Err())
	require.NoError(t, h.client.XAdd(t.Context(), &redis.XAddArgs{Stream: h.stream.Key, ID: "1-1", Values: []string{"id", "another"}}).Err())
	require.NoError(t, h.Regroup(t.Context()))
	require.Empty(t, h.pending())
}

// Who deletes entries holds for the groups that may have been lost with its own.
func TestRegroup_Holds(t *testing.T) {
	for _, deletes := range []bool{true, false} {
		h := newHolder(t, time.Minute)
		h.cfg.Trims = deletes
		h.publish("1-1")
		require.NoError(t, h.client.XGroupDestroy(t.Context(), h.stream.Key, "group").Err())
		require.NoError(t, h.Regroup(t.Context()))
		held, err := h.client.HExists(t.Context(), xstream.RetentionKey(h.stream.Key), "group group").Result()
		require.NoError(t, err)
		require.Equal(t, deletes, held)
	}
}

// An entry that was found pending for us, and is acked by the time it is taken, is
// not ours; nor does it look like one of a recreated group.
func TestTake_AckedOrphan(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1", "2-1", "3-1")
	h.read() // by another consumer, as far as the second ledger knows
	other := ledger.New(ledger.Config{Slots: 10, Leased: true, Bounds: ledger.NewBounds(), Lost: errLost, Compare: xstream.CompareIDs})
	k := New(Config{Stream: h.stream, Ledger: other, MinIdle: time.Minute, Log: watermill.NopLogger{}})
	var orphans []*ledger.Entry
	for _, id := range []string{"1-1", "2-1", "3-1"} {
		orphans = append(orphans, (&ledger.Entry{ID: id}).SetCount(1, 1))
	}
	other.Offer(time.Now(), orphans, false)
	require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1", "3-1").Err())
	entries, _ := other.Take(time.Now(), nil)
	e := entries[0]
	ok, err := k.Take(t.Context(), e)
	require.NoError(t, err)
	require.False(t, ok)
	require.False(t, other.Owned(e))
	require.NoError(t, k.Renew(t.Context(), 0))
	require.Empty(t, h.pending(), "acked entries are put back")
}

// An orphan that waits for its turn is restored with a lost group: once it was renewed, nobody
// has acked it.
func TestRenew_RestoresOrphans(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1")
	e := h.read()[0]
	h.ledger.Remove(time.Now(), e) // the answer was lost
	h.ledger.Offer(time.Now(), []*ledger.Entry{(&ledger.Entry{ID: e.ID}).SetCount(1, 1)}, false)
	require.NoError(t, h.Renew(t.Context(), 0))
	require.NoError(t, h.client.XGroupDestroy(t.Context(), h.stream.Key, "group").Err())
	require.NoError(t, h.Regroup(t.Context()))
	require.Equal(t, []string{"1-1"}, h.pending())
}

// A take whose answer was lost is done once.
func TestTake_AnswerLost(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1")
	e := h.read()[0]
	for range 2 {
		e.Fields, e.Next = nil, 2
		ok, err := h.Take(t.Context(), e)
		require.NoError(t, err)
		require.True(t, ok)
		require.EqualValues(t, 2, e.Count())
	}
	rows, err := h.stream.Pending(t.Context(), 0, "-", "+", 10, "")
	require.NoError(t, err)
	require.EqualValues(t, 2, rows[0].Count)
}

// A release finds the group recreated, and cannot restore all at once: the next attempt
// releases all.
func TestRelease_RepairFailsHalfway(t *testing.T) {
	h := newHolder(t, time.Minute)
	const n = 2*xstream.MaxOwned + 100
	entries := h.releasing(n)
	h.remake("$")
	h.cutSecondRestore()
	require.Error(t, h.Release(t.Context(), entries))
	require.NoError(t, h.Release(t.Context(), entries))
	h.requireReleased(n)
}

// The group is lost between two commands of a release: what the first one released is lost, too.
func TestRelease_GroupLostHalfway(t *testing.T) {
	h := newHolder(t, time.Minute)
	const n = xstream.MaxOwned + 100
	entries := h.releasing(n)
	assigns := 0
	h.client.AddHook(failing{fail: func(cmd redis.Cmder) error {
		if isScript(cmd, "assign") {
			if assigns++; assigns == 2 {
				return h.client.XGroupDestroy(t.Context(), h.stream.Key, "group").Err()
			}
		}
		return nil
	}})
	require.NoError(t, h.Release(t.Context(), entries))
	h.requireReleased(n)
}

// The group is lost while an entry that a pause has released is claimed again: a repair by
// another goroutine restores it too, and so does the claim, if it is the first to notice.
func TestTake_WithdrawnGroupRecreated(t *testing.T) {
	for _, by := range []string{"us", "another consumer"} {
		t.Run(by, func(t *testing.T) {
			h := newHolder(t, time.Minute)
			ids := []string{"1-1", "2-1", "3-1"}
			h.publish(ids...)
			require.NoError(t, h.client.XReadGroup(t.Context(), &redis.XReadGroupArgs{
				Group: "group", Consumer: "holder", Streams: []string{h.stream.Key, ">"}, Block: -1,
			}).Err())
			var entries []*ledger.Entry
			for _, id := range ids {
				entries = append(entries, (&ledger.Entry{ID: id}).SetCount(1, 2))
				h.SawEntry(xstream.Entry{ID: id, Fields: []string{"id", id}})
			}
			h.ledger.Add(time.Now(), time.Now(), entries)
			h.ledger.Pause()
			withdrawn := h.ledger.Withdraw()
			require.NoError(t, h.Release(t.Context(), withdrawn))
			require.True(t, h.ledger.Withdrawn(time.Now(), withdrawn, Released, true, false))
			require.Empty(t, h.pending())
			h.ledger.Resume(time.Now())
			taken, _ := h.ledger.Take(time.Now(), nil)
			require.Len(t, taken, 1)
			if by == "us" {
				require.NoError(t, h.client.XGroupDestroy(t.Context(), h.stream.Key, "group").Err())
				require.NoError(t, h.Regroup(t.Context()))
			} else {
				h.remake("3-1")
			}
			ok, err := h.Take(t.Context(), taken[0])
			require.NoError(t, err)
			require.True(t, ok)
			require.EqualValues(t, 1, taken[0].Count())
			require.Equal(t, ids, h.pending())
		})
	}
}

// A trimmed entry is counted as lost, once, and an entry that others took ends its
// message's context.
func TestRenew_TrimmedAndTaken(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1", "2-1", "3-1", "4-1")
	entries := h.read()
	var cause error
	cancel := context.CancelCauseFunc(func(err error) { cause = err })
	require.True(t, entries[1].Attach(&cancel))
	require.NoError(t, h.client.XDel(t.Context(), h.stream.Key, "1-1").Err())
	require.NoError(t, h.client.XClaimJustID(t.Context(), &redis.XClaimArgs{Stream: h.stream.Key, Group: "group", Consumer: "other", Messages: []string{"2-1"}}).Err())
	require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "3-1").Err())
	for range 2 {
		require.NoError(t, h.Renew(t.Context(), 0))
		require.EqualValues(t, 1, h.Lost.Load())
	}
	require.Equal(t, errLost, cause)
	require.True(t, entries[0].Gone())
	require.True(t, entries[1].Lost())
	require.True(t, entries[2].Lost(), "4-1 is pending: 3-1 was acked by itself")
	require.False(t, entries[3].Lost())
	require.Equal(t, []string{"4-1"}, h.pending())
}

// XGROUP DELCONSUMER of a living consumer removes its entries that wait for a
// retry. A later read recreated the consumer, and was acked: the group knows it
// well.
func TestRenew_ConsumerDeletedAndReadOn(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1")
	h.wait(h.read()...)
	require.NoError(t, h.client.XGroupDelConsumer(t.Context(), h.stream.Key, "group", "holder").Err())
	h.publish("2-1")
	h.ledger.Acked(time.Now(), h.read()[0])
	require.Len(t, h.ledger.Acks(MaxAck), 1)
	_, err := h.Ack(t.Context())
	require.NoError(t, err)
	require.Empty(t, h.ledger.Acks(MaxAck))
	require.NoError(t, h.Renew(t.Context(), 0))
	require.Equal(t, []string{"1-1"}, h.pending())
}

// A consumer was cut off for longer than a lease, while others took and settled its
// entries. The server has seen it since, by a read whose answer was lost: that does
// not make the group a different one.
func TestRenew_AnswerNotSeen(t *testing.T) {
	h := newHolder(t, 50*time.Millisecond)
	h.publish("1-1", "2-1")
	waiting := h.read()
	h.wait(waiting...)
	require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1").Err())
	time.Sleep(1200 * time.Millisecond) // cut off: a lease, plus the tolerance of consumerIsNew
	h.publish("3-1")
	require.NoError(t, h.client.XReadGroup(t.Context(), &redis.XReadGroupArgs{
		Group: "group", Consumer: "holder", Streams: []string{h.stream.Key, ">"}, Block: -1,
	}).Err())
	require.NoError(t, h.Renew(t.Context(), 0))
	require.Equal(t, []string{"3-1"}, h.pending(), "what was settled would come again")
	require.True(t, waiting[0].Lost())
}

// Entries to be released are restored first if the group was lost; not if they were
// settled.
func TestRelease_GroupLost(t *testing.T) {
	for _, test := range []struct {
		name     string
		happens  func(h *holder)
		released int
	}{
		{"Nothing", func(*holder) {}, 3},
		{"Destroyed", func(h *holder) {
			require.NoError(h.t, h.client.XGroupDestroy(h.t.Context(), h.stream.Key, "group").Err())
		}, 3},
		{"MadeAnew", func(h *holder) { h.remake("$") }, 3},
		{"ConsumerDeleted", func(h *holder) {
			require.NoError(h.t, h.client.XGroupDelConsumer(h.t.Context(), h.stream.Key, "group", "holder").Err())
		}, 3},
		{"Settled", func(h *holder) {
			require.NoError(h.t, h.client.XAck(h.t.Context(), h.stream.Key, "group", "1-1", "2-1").Err())
		}, 1},
		{"Taken", func(h *holder) {
			require.NoError(h.t, h.client.XClaimJustID(h.t.Context(), &redis.XClaimArgs{
				Stream: h.stream.Key, Group: "group", Consumer: "other", Messages: []string{"1-1", "3-1"},
			}).Err())
		}, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHolder(t, time.Minute)
			h.publish("1-1", "2-1", "3-1")
			give := h.read()
			for i, e := range give {
				e.Give = int64(i)
				h.ledger.Releasing(time.Now(), e)
			}
			test.happens(h)
			require.NoError(t, h.Release(t.Context(), give))
			rows, err := h.stream.Pending(t.Context(), 0, "-", "+", 100, Released)
			require.NoError(t, err)
			require.Len(t, rows, test.released)
			require.EqualValues(t, test.released, h.GivenBack.Load())
			if test.released == 3 {
				for i, row := range rows {
					require.EqualValues(t, i, row.Count)
				}
			}
			require.Empty(t, h.pending())
		})
	}
}

// While an entry is being released, another goroutine recreates the lost group: the release
// must not take what is missing in it for somebody else's.
func TestRelease_GroupRecreatedMeanwhile(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1", "2-1")
	entries := h.read()
	h.ledger.Releasing(time.Now(), entries[0])
	require.NoError(t, h.client.XGroupDestroy(t.Context(), h.stream.Key, "group").Err())
	require.NoError(t, h.Regroup(t.Context()))
	require.NoError(t, h.Release(t.Context(), entries[:1]))
	rows, err := h.stream.Pending(t.Context(), 0, "-", "+", 100, Released)
	require.NoError(t, err)
	require.Len(t, rows, 1)
	require.Equal(t, "1-1", rows[0].ID)
	require.Len(t, h.pending(), 1)
}

// A single entry to be released is restored first too.
func TestRelease_OneForgotten(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1")
	e := h.read()[0]
	h.ledger.Releasing(time.Now(), e)
	require.NoError(t, h.client.XGroupDelConsumer(t.Context(), h.stream.Key, "group", "holder").Err())
	e.Give = 1
	require.NoError(t, h.Release(t.Context(), []*ledger.Entry{e}))
	rows, err := h.stream.Pending(t.Context(), 0, "-", "+", 100, Released)
	require.NoError(t, err)
	require.Len(t, rows, 1)
}

// Entries that cannot be restored in a new group are not ours any more: one was deleted from
// the stream, one was read by another consumer.
func TestRegroup_NotOurs(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1", "2-1", "3-1")
	entries := h.read()
	h.wait(entries...)
	h.remake("2-1")
	require.NoError(t, h.client.XDel(t.Context(), h.stream.Key, "1-1").Err())
	require.NoError(t, h.client.XReadGroup(t.Context(), &redis.XReadGroupArgs{
		Group: "group", Consumer: "other", Streams: []string{h.stream.Key, ">"},
	}).Err())
	require.NoError(t, h.Regroup(t.Context()))
	require.Equal(t, []string{"2-1"}, h.pending())
	require.True(t, entries[0].Gone())
	require.EqualValues(t, 1, h.Lost.Load())
	require.False(t, entries[1].Lost())
	require.True(t, entries[2].Lost())
}

// A stream that was deleted and recreated has none of the entries that were read; one that
// was trimmed, or lost its end in a failover, is still the same.
func TestBeganAnew(t *testing.T) {
	for _, test := range []struct {
		name string
		anew []string // nil: it is the same stream, of which 10-1, 20-1 and 30-1 were read; else it is recreated with these
		then func(h *holder)
		want bool
	}{
		{name: "Nothing"},
		{name: "Added", then: func(h *holder) { h.publish("40-1") }},
		{name: "TrimmedWholly", then: func(h *holder) { h.client.XTrimMaxLen(h.t.Context(), h.stream.Key, 0) }},
		{name: "TrimmedPast", then: func(h *holder) { h.publish("40-1"); h.client.XTrimMinID(h.t.Context(), h.stream.Key, "40-1") }},
		{name: "Deleted", then: func(h *holder) { h.publish("40-1"); h.client.XDel(h.t.Context(), h.stream.Key, "20-1", "30-1") }},
		{name: "LostItsEnd", anew: []string{"10-1", "20-1"}},
		{name: "LostItsEndAndWasAddedTo", anew: []string{"10-1", "20-1", "40-1"}},
		{name: "RecreatedSmaller", anew: []string{"5-1", "6-1"}, want: true},
		{name: "RecreatedAround", anew: []string{"5-1", "40-1"}, want: true},
		{name: "RecreatedWithTheSameID", anew: []string{"30-1"}, then: func(h *holder) {
			h.client.Del(h.t.Context(), h.stream.Key)
			h.client.XAdd(h.t.Context(), &redis.XAddArgs{Stream: h.stream.Key, ID: "30-1", Values: []string{"id", "another"}})
		}, want: true},
		{name: "RecreatedLarger", anew: []string{"40-1"}}, // nothing of it can be taken for an old one
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHolder(t, time.Minute)
			h.publish("10-1", "20-1")
			h.read()
			h.progress.at = time.Now().Add(-2 * progressAge)
			h.publish("30-1")
			h.read()
			require.Equal(t, "20-1", h.progress.older.ID)
			if test.anew != nil {
				require.NoError(t, h.client.Del(t.Context(), h.stream.Key).Err())
				h.publish(test.anew...)
			}
			if test.then != nil {
				test.then(h)
			}
			anew, _, err := h.beganAnew(t.Context())
			require.NoError(t, err)
			require.Equal(t, test.want, anew)
		})
	}
}

// The older of the two remembered entries is one that a failover cannot have lost.
func TestSawEntry(t *testing.T) {
	h := newHolder(t, time.Minute)
	saw := func(id string) {
		h.SawEntry(xstream.Entry{ID: id, Fields: []string{"id", id}})
	}
	saw("1-1")
	saw("2-1")
	require.Equal(t, []string{"2-1", "1-1"}, []string{h.progress.read.ID, h.progress.older.ID})
	h.progress.at = time.Now().Add(-2 * progressAge)
	saw("3-1")
	require.Equal(t, []string{"3-1", "2-1"}, []string{h.progress.read.ID, h.progress.older.ID})
	require.WithinDuration(t, time.Now(), h.progress.at, progressAge/2)
	saw("2-5") // claimed, or read in a group that was set back
	require.Equal(t, []string{"3-1", "2-1"}, []string{h.progress.read.ID, h.progress.older.ID})
}

// A move whose answer was lost, and that had not happened: another consumer has
// taken the entry over and moved it since. That letter is not ours: the consumer
// that moved it calls OnDead.
func TestMove_ByAnother(t *testing.T) {
	for _, test := range []struct {
		by     string
		unsure bool
	}{{"other", true}, {"other", false}, {"holder", true}, {"holder", false}} {
		t.Run(fmt.Sprint(test.by, " unsure ", test.unsure), func(t *testing.T) {
			h := newHolder(t, time.Minute)
			h.publish("1-1")
			e := h.read()[0]
			letters := h.stream.Key + ".dead"
			letter := func(consumer string) []string {
				return []string{"uuid", "1-1", "metadata", "entry:1-1 consumer:" + consumer}
			}
			mover := *h.stream
			if mover.Consumer = test.by; test.by != "holder" {
				require.NoError(t, h.client.XClaimJustID(t.Context(), &redis.XClaimArgs{
					Stream: h.stream.Key, Group: "group", Consumer: test.by, Messages: []string{"1-1"},
				}).Err())
			}
			moved, how, err := mover.DeadLetter(t.Context(), letters, "1-1", false, nil, letter(test.by))
			require.NoError(t, err)
			require.Equal(t, xstream.Mine, how)
			id, err := h.Move(t.Context(), e, letters, test.unsure, []string{"entry:1-1", "consumer:holder"}, letter("holder"))
			require.NoError(t, err)
			if test.by == "holder" {
				require.Equal(t, moved, id)
			} else {
				require.Empty(t, id)
			}
			require.EqualValues(t, 1, h.client.XLen(t.Context(), letters).Val())
			require.False(t, h.ledger.Owned(e), "it would be put back")
			require.NoError(t, h.Renew(t.Context(), 0))
			require.Empty(t, h.pending())
		})
	}
}

// A move had no answer and had not happened, and then the group forgot the entry. It is
// put back and moved, however the others fared, and however long the dead-letter stream
// refuses it.
func TestMove_Forgotten(t *testing.T) {
	forgets := map[string]func(h *holder){
		"GroupMadeAnew": func(h *holder) { h.remake("$") },
		"ConsumerDeleted": func(h *holder) {
			require.NoError(h.t, h.client.XGroupDelConsumer(h.t.Context(), h.stream.Key, "group", "holder").Err())
		},
	}
	for name, forget := range forgets {
		for i := range 6 {
			others, readOn := i/2, i%2 == 1
			t.Run(fmt.Sprint(name, " with ", others, " others, read on: ", readOn), func(t *testing.T) {
				h := newHolder(t, time.Minute)
				want := []string{"1-1", "2-1", "3-1"}[:1+others]
				h.publish(want...)
				entries := h.read()
				h.wait(entries...)
				cut := true
				h.client.AddHook(failing{fail: func(cmd redis.Cmder) error {
					if cut && isScript(cmd, "dead-letter") {
						return io.EOF
					}
					return nil
				}})
				letters := h.stream.Key + ".dead"
				move := func(unsure bool) (string, error) {
					return h.Move(t.Context(), entries[0], letters, unsure, []string{"entry:1-1", "consumer:holder"},
						[]string{"uuid", "1-1", "metadata", "entry:1-1 consumer:holder"})
				}
				_, err := move(false)
				require.Error(t, err)
				forget(h)
				h.ledger.Renewed(time.Now().Add(-50*time.Second), entries...) // the lease is nearly over
				if readOn {                                                   // so that the group knows the consumer
					h.readOn("9-1")
				}
				require.NoError(t, h.Renew(t.Context(), 0))
				require.Equal(t, want[1:], append([]string{}, h.pending()...))
				h.Keeper.cfg.MinIdle = 30 * time.Second // it would be over, had it been pending
				cut = false
				id, err := move(true)
				require.NoError(t, err)
				require.Empty(t, id)
				require.True(t, h.ledger.Owned(entries[0]))
				require.Equal(t, want, h.pending())
				id, err = move(true)
				require.NoError(t, err)
				require.NotEmpty(t, id)
				require.True(t, entries[0].Move() == ledger.Moved)
				require.Equal(t, want[1:], append([]string{}, h.pending()...))
			})
		}
	}
}

// The same, but nobody looked while the lease was good: others may have claimed the entry,
// and settled it.
func TestMove_ForgottenForLong(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1")
	e := h.read()[0]
	h.wait(e)
	h.ledger.Moving(e, ledger.MaybeMoved) // without an answer
	require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1").Err())
	h.ledger.Renewed(time.Now().Add(-2*time.Minute), e)
	for range 2 {
		require.NoError(t, h.Renew(t.Context(), 0))
	}
	id, err := h.Move(t.Context(), e, h.stream.Key+".dead", true, []string{"entry:1-1", "consumer:holder"}, []string{"uuid", "1-1"})
	require.NoError(t, err)
	require.Empty(t, id)
	require.True(t, e.Lost())
	require.Empty(t, h.pending())
}

// readOn reads a message and acks it.
func (h *holder) readOn(id string) {
	h.t.Helper()
	h.publish(id)
	h.ledger.Acked(time.Now(), h.read()[0])
	_, err := h.Ack(h.t.Context())
	require.NoError(h.t, err)
}

// A message that waits for its retry is acked by hand, while others are read. This
// looks as if the group were a different one; but only once.
func TestRenew_AckedByHand(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1")
	waiting := h.read()[0]
	h.wait(waiting)
	for i, id := range []string{"2-1", "3-1"} {
		h.readOn(id)
		require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1").Err())
		require.NoError(t, h.Renew(t.Context(), 0))
		require.Equal(t, i == 0, len(h.pending()) == 1)
	}
	require.True(t, waiting.Lost())
}

// A consumer was cut off for so long that others have settled its entries, and
// removed its name. The group does not know it.
func TestRenew_AwayForLong(t *testing.T) {
	for _, timeout := range []time.Duration{100 * time.Millisecond, time.Hour} {
		t.Run(timeout.String(), func(t *testing.T) {
			h := newHolder(t, 50*time.Millisecond)
			h.Keeper.cfg.Timeout = timeout
			h.publish("1-1", "2-1")
			h.wait(h.read()...)
			require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1").Err())
			require.NoError(t, h.client.XGroupDelConsumer(t.Context(), h.stream.Key, "group", "holder").Err())
			time.Sleep(110 * time.Millisecond) // cut off
			require.NoError(t, h.Renew(t.Context(), 0))
			if timeout == time.Hour {
				require.Len(t, h.pending(), 2, "it may be another group")
			} else {
				require.Empty(t, h.pending())
			}
		})
	}
}

// The first attempt to release succeeded, but its answer was lost. Others have
// settled the messages since, and the server has seen this consumer later than it
// knows.
func TestRelease_Repeated(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1", "2-1")
	give := h.read()
	h.ledger.Releasing(time.Now(), give...)
	require.NoError(t, h.Release(t.Context(), give))
	require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1").Err())
	h.progress.active = time.Now().Add(-10 * time.Second)
	require.NoError(t, h.Release(t.Context(), give))
	require.Zero(t, h.client.XPending(t.Context(), h.stream.Key, "group").Val().Count)
}
