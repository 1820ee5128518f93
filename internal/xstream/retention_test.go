package xstream

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// A topic is a stream with several groups and fan-outs, and an independent opinion about
// what Retention may trim from it.
type topicState struct {
	t      *testing.T
	client *redis.Client
	s      Stream
}

func newTopic(t *testing.T) topicState {
	t.Helper()
	testserver.RequireReal(t)
	return newTopicOf(t, testserver.Client(t))
}

func newTopicOf(t *testing.T, client *redis.Client) topicState {
	return topicState{t, client, New(redisx.Client{UniversalClient: client}, fmt.Sprint(t.Name(), "-", time.Now().UnixNano()), "")}
}

func (p topicState) ids() []string {
	p.t.Helper()
	entries, err := p.client.XRange(p.t.Context(), p.s.Key, "-", "+").Result()
	require.NoError(p.t, err)
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.ID)
	}
	return ids
}

func (p topicState) add(id, value string) {
	p.t.Helper()
	require.NoError(p.t, p.client.XAdd(p.t.Context(), &redis.XAddArgs{Stream: p.s.Key, ID: id, Values: []string{"payload", value}}).Err())
}

func (p topicState) read(group, consumer string, n int64) (ids []string) {
	p.t.Helper()
	streams, err := p.client.XReadGroup(p.t.Context(), &redis.XReadGroupArgs{Group: group, Consumer: consumer, Streams: []string{p.s.Key, ">"}, Count: n, Block: -1}).Result()
	if err == redis.Nil {
		return nil
	}
	require.NoError(p.t, err)
	for _, m := range streams[0].Messages {
		ids = append(ids, m.ID)
	}
	return ids
}

func (p topicState) group(name string) {
	p.t.Helper()
	require.NoError(p.t, p.client.XGroupCreateMkStream(p.t.Context(), p.s.Key, name, "0").Err())
}

// unacked returns the IDs in the stream that the group has not acked: pending, or not
// delivered yet.
func (p topicState) unacked(ids []string, name string) map[string]bool {
	p.t.Helper()
	groups, err := p.client.XInfoGroups(p.t.Context(), p.s.Key).Result()
	require.NoError(p.t, err)
	at := slices.IndexFunc(groups, func(g redis.XInfoGroup) bool { return g.Name == name })
	unacked := make(map[string]bool)
	rows, err := p.client.XPendingExt(p.t.Context(), &redis.XPendingExtArgs{Stream: p.s.Key, Group: name, Start: "-", End: "+", Count: 100_000}).Result()
	require.NoError(p.t, err)
	for _, r := range rows {
		unacked[r.ID] = true
	}
	for _, id := range ids {
		if CompareIDs(id, groups[at].LastDeliveredID) > 0 {
			unacked[id] = true
		}
	}
	return unacked
}

// all trims until there is nothing more to trim.
func (p topicState) all(r Retention) (sum Trimming) {
	p.t.Helper()
	sum.Cut = make(map[string]int64)
	for more := true; more; {
		got, err := p.s.Trim(p.t.Context(), r, "", "", 0)
		require.NoError(p.t, err)
		require.True(p.t, got.Ran)
		sum.Trimmed += got.Trimmed
		for group, n := range got.Cut {
			sum.Cut[group] += n
		}
		sum.Length, sum.Pin = got.Length, got.Pin
		more = got.More || got.Over
	}
	return sum
}

// Whatever groups and fan-outs do, exactly those entries are trimmed that all of them are
// done with and that Retention does not keep, the oldest first; and HardMaxLen counts
// exactly what it cuts off, for each group. PlanTrim foresees both.
func TestTrim_Random(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			dice := rand.New(rand.NewPCG(seed, 1))
			p := newTopic(t)
			ctx := t.Context()
			names := []string{"a", "b c", "d"}[:dice.IntN(4)]
			for _, name := range names {
				p.group(name)
			}
			at := 1_000 + dice.Uint64N(1000)
			size := []int{1, 100, 3000, 50_000}[dice.IntN(4)]
			positions := make(map[string]string)
			for range 20 {
				pipe := p.client.Pipeline()
				for range 1 + dice.IntN(1000/(1+size/100)+10) {
					at += dice.Uint64N(3)
					id := fmt.Sprintf("%d-%d", at, []uint64{0, 7, 1 << 60}[dice.IntN(3)]+dice.Uint64N(10_000))
					pipe.XAdd(ctx, &redis.XAddArgs{Stream: p.s.Key, ID: id, Values: []string{"payload", strings.Repeat("x", 1+dice.IntN(size))}})
					at++
				}
				_, err := pipe.Exec(ctx)
				require.NoError(t, err)
				for _, name := range names {
					ids := p.read(name, "consumer", 1+dice.Int64N(500))
					ids = slices.DeleteFunc(ids, func(string) bool { return dice.IntN(200) == 0 })
					if len(ids) > 0 {
						require.NoError(t, p.client.XAck(ctx, p.s.Key, name, ids...).Err())
					}
					if dice.IntN(4) == 0 { // late acks
						rows := p.client.XPendingExt(ctx, &redis.XPendingExtArgs{Stream: p.s.Key, Group: name, Start: "-", End: "+", Count: 10}).Val()
						for _, r := range rows {
							require.NoError(t, p.client.XAck(ctx, p.s.Key, name, r.ID).Err())
						}
					}
					stream := p.ids()
					if len(stream) > 0 && dice.IntN(12) == 0 {
						require.NoError(t, p.client.XGroupSetID(ctx, p.s.Key, name, stream[dice.IntN(len(stream))]).Err())
					}
				}
				stream := p.ids()
				if len(stream) == 0 {
					continue
				}
				if dice.IntN(5) == 0 {
					require.NoError(t, p.client.XDel(ctx, p.s.Key, stream[dice.IntN(len(stream))]).Err())
				}
				if name := fmt.Sprint("fan-out ", dice.IntN(2)); dice.IntN(8) == 0 {
					positions[name] = stream[dice.IntN(len(stream))]
					require.NoError(t, p.s.SetPosition(ctx, name, positions[name], Info{}, time.Hour))
				} else if dice.IntN(8) == 0 {
					delete(positions, name)
					require.NoError(t, p.s.RemovePosition(ctx, name))
				}
				r := Retention{KeepLast: []int64{0, KeepAll, 5, 200}[dice.IntN(4)]}
				if dice.IntN(3) == 0 {
					r.KeepFor = time.Since(time.UnixMilli(int64(at - dice.Uint64N(500))))
				}
				if dice.IntN(4) == 0 {
					r.HardMaxLen = max(1, r.KeepLast) + dice.Int64N(1500)
				}
				if len(names) > 1 && dice.IntN(5) == 0 {
					r.Ignore = names[:1]
				}
				p.check(r, names, positions)
			}
		})
	}
}

// check trims, and compares what remains with what should.
func (p topicState) check(r Retention, names []string, positions map[string]string) {
	p.t.Helper()
	before := p.ids()
	unacked := make(map[string]map[string]bool)
	for _, name := range names {
		unacked[name] = p.unacked(before, name)
	}
	needed := func(id string) bool {
		for _, name := range names {
			if unacked[name][id] && !slices.Contains(r.Ignore, name) {
				return true
			}
		}
		for _, position := range positions {
			if CompareIDs(id, position) > 0 {
				return true
			}
		}
		return false
	}
	// A pending entry that was deleted still keeps what follows it, until its group is rid of it.
	lowest := ""
	for _, name := range names {
		for id := range unacked[name] {
			if !slices.Contains(r.Ignore, name) && (lowest == "" || CompareIDs(id, lowest) < 0) {
				lowest = id
			}
		}
	}
	counted := len(names) - len(r.Ignore)
	oldest := time.Now().Add(-r.KeepFor).UnixMilli()
	n := 0
	for ; n < len(before); n++ {
		ms, _ := SplitID(before[n])
		if r.KeepLast < 0 || counted == 0 && r.KeepLast == 0 && r.KeepFor == 0 || int64(len(before)-n) <= r.KeepLast ||
			r.KeepFor > 0 && int64(ms) >= oldest || needed(before[n]) || lowest != "" && CompareIDs(before[n], lowest) >= 0 {
			break
		}
	}
	want := before[n:]
	cut := make(map[string]int64)
	if r.HardMaxLen > 0 && int64(len(want)) > r.HardMaxLen {
		gone := want[:len(want)-int(r.HardMaxLen)]
		want = want[len(gone):]
		for _, id := range gone {
			for _, name := range names {
				if unacked[name][id] {
					cut[name]++
				}
			}
			if slices.ContainsFunc(slices.Collect(maps.Values(positions)), func(position string) bool { return CompareIDs(id, position) > 0 }) {
				cut[""]++
			}
		}
	}

	planned := Trimming{Cut: make(map[string]int64)}
	for last := ""; ; {
		got, err := p.s.Plan(p.t.Context(), r, last, planned.Trimmed)
		require.NoError(p.t, err)
		for group, n := range got.Cut {
			planned.Cut[group] += n
		}
		planned.Trimmed, last = planned.Trimmed+got.Trimmed, got.Last
		if got.Trimmed == 0 {
			break
		}
	}
	length, err := p.client.XLen(p.t.Context(), p.s.Key).Result()
	require.NoError(p.t, err)
	require.EqualValues(p.t, len(before), length, "a plan changes nothing")
	earlier := p.totals(names)
	got := p.all(r)
	after := p.ids()
	if r.KeepFor > 0 && len(after) < len(want) { // time goes on
		for _, id := range want[:len(want)-len(after)] {
			require.False(p.t, needed(id), "%s is needed; %+v", id, r)
		}
		return
	}
	require.Equal(p.t, len(want), len(after), "%+v: of %d", r, len(before))
	require.True(p.t, slices.Equal(want, after), "%+v", r)
	require.EqualValues(p.t, len(before)-len(want), got.Trimmed)
	require.EqualValues(p.t, len(want), got.Length)
	require.Equal(p.t, cut, got.Cut)
	if r.KeepFor == 0 {
		require.Equal(p.t, got.Trimmed, planned.Trimmed, "%+v", r)
		require.Equal(p.t, cut, planned.Cut)
	}
	for name, total := range p.totals(names) {
		require.Equal(p.t, earlier[name]+cut[name], total, "the total of %q", name)
	}
}

func (p topicState) totals(names []string) map[string]int64 {
	p.t.Helper()
	totals := make(map[string]int64)
	for _, name := range append([]string{""}, names...) {
		s := p.s
		s.Group = name
		_, n, err := s.Floor(p.t.Context())
		require.NoError(p.t, err)
		totals[name] = n
	}
	return totals
}

// Of those that ask within an interval one trims. The others learn how long to wait.
func TestTrim_Interval(t *testing.T) {
	p := newTopic(t)
	p.group("a")
	for i := range 10 {
		p.add(fmt.Sprintf("%d-1", i+1), "x")
	}
	first, err := p.s.Trim(t.Context(), Retention{KeepLast: 3}, "", "", time.Hour)
	require.NoError(t, err)
	require.True(t, first.Ran)
	require.Equal(t, 5*time.Hour, first.Wait, "nothing was trimmed: there is no hurry")
	for range 2 {
		next, err := p.s.Trim(t.Context(), Retention{KeepLast: 3}, "", "", time.Hour)
		require.NoError(t, err)
		require.False(t, next.Ran)
		require.LessOrEqual(t, next.Wait, 5*time.Hour)
		require.Greater(t, next.Wait, 4*time.Hour)
	}
	// A clock that was set back by days must not stop it for days.
	set := 0
	for field := range p.client.HGetAll(t.Context(), RetentionKey(p.s.Key)).Val() {
		if strings.HasPrefix(field, "next") {
			set++
			require.NoError(t, p.client.HSet(t.Context(), RetentionKey(p.s.Key), field, time.Now().Add(6*time.Hour).UnixMilli()).Err())
		}
	}
	require.Equal(t, 1, set)
	next, err := p.s.Trim(t.Context(), Retention{KeepLast: 3}, "", "", time.Hour)
	require.NoError(t, err)
	require.True(t, next.Ran)
}

// A group that vanished a moment ago has lost its position, and its consumers recreate it:
// nothing is trimmed until they have, or a minute has passed.
func TestTrim_VanishedGroup(t *testing.T) {
	p := newTopic(t)
	p.group("stays")
	p.group("vanishes")
	for i := range 10 {
		p.add(fmt.Sprintf("%d-1", i+1), "x")
	}
	ctx := t.Context()
	require.Len(t, p.read("stays", "consumer", 100), 10)
	for _, id := range p.ids() {
		require.NoError(t, p.client.XAck(ctx, p.s.Key, "stays", id).Err())
	}
	require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed)
	require.NoError(t, p.client.XGroupDestroy(ctx, p.s.Key, "vanishes").Err())
	require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed, "it may be recreated")
	p.group("vanishes")
	require.Len(t, p.read("vanishes", "consumer", 100), 10, "nothing is missing")
	// It counts from when the absence was noticed, however long ago the group was seen.
	require.NoError(t, p.client.XGroupDestroy(ctx, p.s.Key, "vanishes").Err())
	field := func(group string) string { return p.client.HGet(ctx, RetentionKey(p.s.Key), "group "+group).Val() }
	require.NoError(t, p.client.HSet(ctx, RetentionKey(p.s.Key), "group vanishes", time.Now().Add(-time.Hour).UnixMilli()).Err())
	require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed)
	require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed)
	ago := func(d time.Duration) string {
		return fmt.Sprintf("hold %d %d", time.Now().Add(-d).UnixMilli(), vanishedFor)
	}
	require.NoError(t, p.client.HSet(ctx, RetentionKey(p.s.Key), "group vanishes", ago(-time.Hour)).Err()) // the clock was set back
	require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed)
	require.Less(t, field("vanishes"), ago(-time.Minute), "it does not last until the clock has caught up")
	require.NoError(t, p.client.HSet(ctx, RetentionKey(p.s.Key), "group vanishes", ago(vanishedFor*time.Millisecond)).Err())
	require.EqualValues(t, 7, p.all(Retention{KeepLast: 3}).Trimmed)
	require.Equal(t, map[string]string{"group stays": field("stays"), "floor stays": "(10-1"}, p.client.HGetAll(ctx, RetentionKey(p.s.Key)).Val(), "and it is forgotten")
}

// Redis may have lost everything, and have new messages: who trims first, before the groups
// and positions are there again, would take these for messages that concern nobody. So nobody
// trims without its own; and a group that is recreated holds for the others. HardMaxLen still
// applies.
func TestTrim_OwnLost(t *testing.T) {
	for _, own := range []string{"group", "fan-out"} {
		t.Run(own, func(t *testing.T) {
			p := newTopic(t)
			ctx := t.Context()
			for i := range 10 {
				p.add(fmt.Sprintf("%d-1", i+1), "x")
			}
			trim := func(r Retention) int64 {
				got, err := p.s.Trim(ctx, r, own, "", 0)
				require.NoError(t, err)
				return got.Trimmed
			}
			require.Zero(t, trim(Retention{KeepLast: 3}))
			require.EqualValues(t, 2, trim(Retention{KeepLast: 3, HardMaxLen: 8}))
			if own == "fan-out" {
				require.NoError(t, p.s.SetPosition(ctx, own, "8-1", Info{}, time.Minute))
				require.EqualValues(t, 5, trim(Retention{KeepLast: 3}))
				return
			}
			first := p.s
			first.Group = own
			made, err := first.CreateGroupAt(ctx, "0", Info{}, nil, time.Hour, true)
			require.NoError(t, err)
			require.True(t, made)
			p.read(own, "consumer", 100)
			require.NoError(t, p.client.XAck(ctx, p.s.Key, own, p.ids()...).Err())
			require.Zero(t, trim(Retention{KeepLast: 3}), "another group may be lost, and not be there again yet")
		})
	}
}

// Nothing is trimmed from the caller's oldest entry on, though no group shows that it is needed,
// unless somebody has deleted that entry: then it pins nothing.
func TestTrim_Oldest(t *testing.T) {
	for oldest, left := range map[string][]string{"3-0": {"3-0", "4-0"}, "2-0": nil, "": nil} {
		t.Run(oldest, func(t *testing.T) {
			p := newTopic(t)
			for _, id := range []string{"1-0", "2-0", "3-0", "4-0"} {
				p.add(id, "value")
			}
			require.NoError(t, p.client.XGroupCreate(t.Context(), p.s.Key, "group", "$").Err())
			require.NoError(t, p.client.XDel(t.Context(), p.s.Key, "2-0").Err())
			got, err := p.s.Trim(t.Context(), Retention{}, "group", oldest, 0)
			require.NoError(t, err)
			require.Equal(t, left, p.ids())
			if left != nil {
				require.Equal(t, oldest, got.Pin.ID)
			}
		})
	}
}

// A group that vanishes a second time is held for as it was the first time, also if nobody
// has looked since the first hold ended.
func TestTrim_VanishedAgain(t *testing.T) {
	for _, tt := range []struct {
		name string
		back func(p topicState)
	}{
		{"seen", func(p topicState) { p.group("lost"); require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed) }},
		{"recreated by its consumer", func(p topicState) {
			lost := p.s
			lost.Group = "lost"
			require.NoError(t, lost.hold(t.Context(), 0, false))
			p.group("lost")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newTopic(t)
			ctx := t.Context()
			p.group("lost")
			for i := range 10 {
				p.add(fmt.Sprintf("%d-1", i+1), "x")
			}
			require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed)
			require.NoError(t, p.client.XGroupDestroy(ctx, p.s.Key, "lost").Err())
			require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed)
			tt.back(p)
			was := p.client.HGet(ctx, RetentionKey(p.s.Key), "group lost").Val()
			word, _, _ := strings.Cut(was, " ")
			long := fmt.Sprintf("%s %d %d", word, time.Now().Add(-time.Hour).UnixMilli(), vanishedFor)
			require.NoError(t, p.client.HSet(ctx, RetentionKey(p.s.Key), "group lost", long).Err())
			require.NoError(t, p.client.XGroupDestroy(ctx, p.s.Key, "lost").Err())
			require.Zero(t, p.all(Retention{KeepLast: 3}).Trimmed)
		})
	}
}

// A group that was recreated has not got all of its pending entries back: nothing is deleted
// for a while, by whatever way. A group that nobody had seen, and one without Retention,
// leave no trace.
func TestHold(t *testing.T) {
	eachWay(t, func(t *testing.T, client *redis.Client, byServer bool) {
		p := newTopicOf(t, client)
		ctx, lost := t.Context(), p.s
		lost.Group = "lost"
		mine := p.s
		mine.Group, mine.Consumer = "stays", "consumer"
		require.NoError(t, lost.hold(ctx, time.Hour, false))
		require.Zero(t, p.client.Exists(ctx, RetentionKey(p.s.Key)).Val())
		p.group("stays")
		p.group("lost")
		for i := range 10 {
			p.add(fmt.Sprintf("%d-1", i+1), "x")
		}
		ids := p.read("stays", "consumer", 100)
		require.Len(t, p.read("lost", "consumer", 100), 10)
		require.Zero(t, p.all(Retention{}).Trimmed)
		ack := func(ids ...string) {
			args := make([]any, len(ids))
			for i, id := range ids {
				args[i] = id
			}
			require.NoError(t, mine.Ack(ctx, true, args...))
		}

		// Missing, before anybody has trimmed.
		require.NoError(t, p.client.XGroupDestroy(ctx, p.s.Key, "lost").Err())
		ack(ids[0], ids[1])
		_, _, err := mine.DeadLetter(ctx, Beside(p.s.Key, "dead"), ids[2], true, nil, []string{"a", "b"})
		require.NoError(t, err)
		require.Equal(t, ids, p.ids())
		// Recreated, with nothing pending.
		require.NoError(t, lost.hold(ctx, time.Hour, false))
		require.NoError(t, p.client.XGroupCreate(ctx, p.s.Key, "lost", ids[9]).Err())
		ack(ids[3:8]...)
		_, _, err = mine.DeadLetter(ctx, Beside(p.s.Key, "dead"), ids[8], true, nil, []string{"a", "b"})
		require.NoError(t, err)
		require.Zero(t, p.all(Retention{KeepFor: time.Millisecond}).Trimmed)
		require.Equal(t, ids, p.ids())

		long := fmt.Sprintf("hold %d %d", time.Now().Add(-2*time.Hour).UnixMilli(), time.Hour.Milliseconds())
		require.NoError(t, p.client.HSet(ctx, RetentionKey(p.s.Key), "group lost", long).Err())
		require.EqualValues(t, 9, p.all(Retention{KeepFor: time.Millisecond}).Trimmed)
		ack(ids[9])
		if byServer {
			require.Empty(t, p.ids())
		}
	})
}

// A group that is created at "0" while the stream is being trimmed gets everything that
// the stream had at that moment.
func TestTrim_GroupCreatedMeanwhile(t *testing.T) {
	p := newTopic(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const entries = 20_000
	pipe := p.client.Pipeline()
	for i := range entries {
		pipe.XAdd(ctx, &redis.XAddArgs{Stream: p.s.Key, ID: fmt.Sprintf("%d-1", i+1), Values: []string{"a", "b"}})
	}
	_, err := pipe.Exec(ctx)
	require.NoError(t, err)
	trimming := make(chan error, 1)
	go func() {
		r := p.s
		for ctx.Err() == nil {
			if _, err := r.Trim(ctx, Retention{KeepLast: 1}, "", "", 0); err != nil && ctx.Err() == nil {
				trimming <- err
				return
			}
		}
		trimming <- nil
	}()
	for i := range 20 {
		name := fmt.Sprint("group ", i)
		tx := p.client.TxPipeline()
		tx.XGroupCreate(ctx, p.s.Key, name, "0")
		all := tx.XRange(ctx, p.s.Key, "-", "+")
		_, err := tx.Exec(ctx)
		require.NoError(t, err)
		got := p.read(name, "consumer", entries)
		require.Len(t, got, len(all.Val()))
		for n, e := range all.Val() {
			require.Equal(t, e.ID, got[n])
		}
		half := got[:len(got)/2] // what follows stays
		for chunk := range slices.Chunk(half, 1000) {
			require.NoError(t, p.client.XAck(ctx, p.s.Key, name, chunk...).Err())
		}
		if i > 0 {
			before := fmt.Sprint("group ", i-1)
			require.NoError(t, p.client.XGroupDestroy(ctx, p.s.Key, before).Err())
			require.NoError(t, p.client.HDel(ctx, RetentionKey(p.s.Key), "group "+before).Err()) // on purpose, a minute ago
		}
	}
	cancel()
	require.NoError(t, <-trimming)
}
