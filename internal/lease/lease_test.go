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

// holder is a consumer that has entries, as a subscription does.
type holder struct {
	*Keeper
	t      *testing.T
	client *redis.Client
	stream *xstream.Stream
	ledger *ledger.Ledger
	buf    xstream.Buffer
}

func newHolder(t *testing.T, minIdle time.Duration) *holder {
	t.Helper()
	testserver.RequireReal(t)
	client := testserver.Client(t)
	stream := xstream.New(redisx.Client{UniversalClient: client}, fmt.Sprint(t.Name(), "-", time.Now().UnixNano()), "group")
	stream.Consumer = "holder"
	_, err := stream.CreateGroup(t.Context(), "0")
	require.NoError(t, err)
	l := ledger.New(ledger.Config{Slots: 1000, Leased: true, Bounds: ledger.NewBounds(), Lost: errLost})
	return &holder{
		Keeper: New(Config{Stream: &stream, Ledger: l, MinIdle: minIdle, Deletes: xstream.DeleteNever, Log: watermill.NopLogger{}}),
		t:      t, client: client, stream: &stream, ledger: l,
	}
}

func (h *holder) publish(ids ...string) {
	h.t.Helper()
	for _, id := range ids {
		require.NoError(h.t, h.client.XAdd(h.t.Context(), &redis.XAddArgs{Stream: h.stream.Key, ID: id, Values: []string{"id", id}}).Err())
	}
}

// read reads what there is, as the poller would, and has slots take it.
func (h *holder) read() (taken []*ledger.Entry) {
	h.t.Helper()
	sent := time.Now()
	read := xstream.Read{Group: "group", Consumer: "holder", From: []xstream.Cursor{{Key: h.stream.Key, After: ">"}}, Count: 1000, Block: -1}
	readings, err := read.Do(h.t.Context(), h.client, &h.buf)
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
		e, _ := h.ledger.Take(time.Now())
		if e == nil {
			return taken
		}
		taken = append(taken, e)
	}
}

func (h *holder) wait(entries ...*ledger.Entry) {
	for _, e := range entries {
		h.ledger.Retry(time.Now(), e, time.Now().Add(time.Hour), false)
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

// remake is another group with the same name, that begins after the ID.
func (h *holder) remake(start string) {
	h.t.Helper()
	_, err := h.client.TxPipelined(h.t.Context(), func(p redis.Pipeliner) error {
		p.XGroupDestroy(h.t.Context(), h.stream.Key, "group")
		p.XGroupCreate(h.t.Context(), h.stream.Key, "group", start)
		return nil
	})
	require.NoError(h.t, err)
}

// Whatever a group that was made anew delivers again, or has delivered since, all that
// waited in the old one is put back.
func TestRenew_GroupMadeAnew(t *testing.T) {
	for _, tt := range []struct {
		name    string
		n       int
		start   string
		then    []string // published after that, and read
		renewed bool     // before that
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

// The same after an outage that was longer than a lease, where others may also have
// taken and acked what is missing.
func TestRenew_AfterALongOutage(t *testing.T) {
	for _, remade := range []bool{true, false} {
		t.Run(fmt.Sprint("GroupMadeAnew", remade), func(t *testing.T) {
			h := newHolder(t, 50*time.Millisecond)
			h.publish("1-1", "2-1", "3-1", "4-1")
			waiting := h.read()
			h.wait(waiting...)
			time.Sleep(1200 * time.Millisecond) // the outage: a lease, and what consumerIsNew allows for
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

// A single entry that is not pending any more, and nothing was read since: acked by hand,
// or the group was made anew. While a handler has it, it is put back; else the server's
// memory of the consumer tells.
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

// failing fails some of the commands that go through it.
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

// What is ours is put back by several commands. One fails: what it left out is put back
// later, and not given up beside what is there.
func TestRegroup_Halfway(t *testing.T) {
	h := newHolder(t, time.Minute)
	const n = 2*xstream.MaxOwned + 50
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprintf("%d-1", i+1))
	}
	h.publish(ids...)
	h.wait(h.read()...)
	restores := 0
	h.client.AddHook(failing{fail: func(cmd redis.Cmder) error {
		if isScript(cmd, "restore") {
			if restores++; restores == 2 {
				return io.EOF
			}
		}
		return nil
	}})
	require.NoError(t, h.client.XGroupDestroy(t.Context(), h.stream.Key, "group").Err())
	require.Error(t, h.Regroup(t.Context()))
	require.Len(t, h.pending(), xstream.MaxOwned)
	require.NoError(t, h.Renew(t.Context(), 0))
	require.Len(t, h.pending(), n)
	require.Zero(t, h.Lost.Load())
}

// An entry that was seen pending in our name, and is acked by the time that it is taken,
// is none of ours; nor does it look like one of a group that was made anew.
func TestTake_AckedOrphan(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1", "2-1", "3-1")
	h.read() // by somebody else, as far as the second ledger knows
	other := ledger.New(ledger.Config{Slots: 10, Leased: true, Bounds: ledger.NewBounds(), Lost: errLost})
	k := New(Config{Stream: h.stream, Ledger: other, MinIdle: time.Minute, Deletes: xstream.DeleteNever, Log: watermill.NopLogger{}})
	var orphans []*ledger.Entry
	for _, id := range []string{"1-1", "2-1", "3-1"} {
		orphans = append(orphans, (&ledger.Entry{ID: id}).SetCount(1, 1))
	}
	other.Offer(time.Now(), orphans, false)
	require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1", "3-1").Err())
	e, _ := other.Take(time.Now())
	ok, err := k.Take(t.Context(), e)
	require.NoError(t, err)
	require.False(t, ok)
	require.False(t, other.Owned(e))
	require.NoError(t, k.Renew(t.Context(), 0))
	require.Empty(t, h.pending(), "acked entries are put back")
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

// What is trimmed is counted as lost, once, and what others took ends its message's
// context.
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
	require.True(t, h.ledger.IsGone(entries[0]))
	require.True(t, entries[1].Lost())
	require.True(t, entries[2].Lost(), "4-1 is pending: 3-1 was acked by itself")
	require.False(t, entries[3].Lost())
	require.Equal(t, []string{"4-1"}, h.pending())
}

// XGROUP DELCONSUMER of a living consumer takes what waits for its retry away. What was read
// since made the consumer again, and was acked: the group knows it well.
func TestRenew_ConsumerDeletedAndReadOn(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1")
	h.wait(h.read()...)
	require.NoError(t, h.client.XGroupDelConsumer(t.Context(), h.stream.Key, "group", "holder").Err())
	h.publish("2-1")
	h.ledger.Acked(time.Now(), h.read()[0])
	n, _, err := h.Ack(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoError(t, h.Renew(t.Context(), 0))
	require.Equal(t, []string{"1-1"}, h.pending())
}

// A consumer that was away for longer than a lease, while others took and settled what it
// had. That the server has seen it since, by a read the answer to which it has not seen,
// makes the group no other one.
func TestRenew_AnswerNotSeen(t *testing.T) {
	h := newHolder(t, 50*time.Millisecond)
	h.publish("1-1", "2-1")
	waiting := h.read()
	h.wait(waiting...)
	require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1").Err())
	time.Sleep(1200 * time.Millisecond) // away: a lease, and what consumerIsNew allows for
	h.publish("3-1")
	require.NoError(t, h.client.XReadGroup(t.Context(), &redis.XReadGroupArgs{
		Group: "group", Consumer: "holder", Streams: []string{h.stream.Key, ">"}, Block: -1,
	}).Err())
	require.NoError(t, h.Renew(t.Context(), 0))
	require.Equal(t, []string{"3-1"}, h.pending(), "what was settled would come again")
	require.True(t, waiting[0].Lost())
}

// What is given back is put back before, if the group was lost; not if it was settled.
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
			var give []Counted
			for i, e := range h.read() {
				give = append(give, Counted{e, int64(i)})
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

// A move whose answer was lost, and which had not happened: another consumer has taken the
// entry over and moved it since. That letter is not ours: who moved it tells OnDead.
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
			moved, how, err := mover.DeadLetter(t.Context(), letters, "1-1", xstream.DeleteNever, nil, letter(test.by))
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

// readOn reads a message and acks it.
func (h *holder) readOn(id string) {
	h.t.Helper()
	h.publish(id)
	h.ledger.Acked(time.Now(), h.read()[0])
	_, _, err := h.Ack(h.t.Context())
	require.NoError(h.t, err)
}

// A message that waits for its retry is acked by hand, while others are read. It looks as if
// the group were another one; but only once.
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

// A consumer that was away for so long that others have settled what it had, and removed its
// name. The group does not know it.
func TestRenew_AwayForLong(t *testing.T) {
	for _, timeout := range []time.Duration{100 * time.Millisecond, time.Hour} {
		t.Run(timeout.String(), func(t *testing.T) {
			h := newHolder(t, 50*time.Millisecond)
			h.Keeper.cfg.Timeout = timeout
			h.publish("1-1", "2-1")
			h.wait(h.read()...)
			require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1").Err())
			require.NoError(t, h.client.XGroupDelConsumer(t.Context(), h.stream.Key, "group", "holder").Err())
			time.Sleep(110 * time.Millisecond) // away
			require.NoError(t, h.Renew(t.Context(), 0))
			if timeout == time.Hour {
				require.Len(t, h.pending(), 2, "it may be another group")
			} else {
				require.Empty(t, h.pending())
			}
		})
	}
}

// The first try to give back was done, but its answer lost. Others have settled the messages
// since, and the server has seen this consumer later than it knows.
func TestRelease_Repeated(t *testing.T) {
	h := newHolder(t, time.Minute)
	h.publish("1-1", "2-1")
	var give []Counted
	for _, e := range h.read() {
		give = append(give, Counted{e, 0})
		h.ledger.Releasing(time.Now(), e)
	}
	require.NoError(t, h.Release(t.Context(), give))
	require.NoError(t, h.client.XAck(t.Context(), h.stream.Key, "group", "1-1", "2-1").Err())
	h.progress.active = time.Now().Add(-10 * time.Second)
	require.NoError(t, h.Release(t.Context(), give))
	require.Zero(t, h.client.XPending(t.Context(), h.stream.Key, "group").Val().Count)
}
