package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// keepingLast is the config of a group's consumer that keeps n entries.
func keepingLast(client redis.UniversalClient, group string, n int64) goxstreams.SubscriberConfig {
	config := grouped(client)
	config.ConsumerGroup, config.MaxConcurrency = group, 100
	config.Retention = goxstreams.Retention{KeepLast: n}
	return config
}

func eventuallyLength(t testing.TB, client redis.UniversalClient, topic string, n int64) {
	t.Helper()
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() == n }, "the stream has %d", n)
}

func trim(t testing.TB, client redis.UniversalClient, topic string, r goxstreams.Retention) goxstreams.TrimResult {
	t.Helper()
	got, err := goxstreams.Trim(t.Context(), client, topic, r)
	require.NoError(t, err)
	return got
}

// Three groups: one keeps up, one has entries pending, and one has not begun. Nothing
// that any of them needs is trimmed, and all of it comes when they return. Then the
// stream is as long as it should be, exactly.
func TestRetention_SlowestGroup(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	for _, group := range []string{"fast", "stopped", "late"} {
		createGroup(t, client, topic, group)
	}
	fast := newSubscriber(t, keepingLast(client, "fast", 100))
	messages := subscribe(t, fast, topic)
	want := publishN(t, client, topic, 1000)
	readAs(t, client, topic, "stopped", "died", 300)
	require.Len(t, collect(messages, 1000, patience), 1000)
	eventuallySettled(t, client, topic, "fast")
	got := trim(t, client, topic, goxstreams.Retention{KeepLast: 100})
	require.Zero(t, got.Trimmed)
	require.EqualValues(t, 1000, got.Length)
	require.Contains(t, []string{"late", "stopped"}, got.Pin.Group)

	late := newSubscriber(t, keepingLast(client, "late", 100))
	require.ElementsMatch(t, want, uuids(collect(subscribe(t, late, topic), 1000, patience)))
	eventuallySettled(t, client, topic, "late")
	got = trim(t, client, topic, goxstreams.Retention{KeepLast: 100})
	require.EqualValues(t, 1000, got.Length, "everything is pending or unread in the stopped group")
	require.Equal(t, "stopped", got.Pin.Group)
	require.Equal(t, "died", got.Pin.Consumer)

	config := keepingLast(client, "stopped", 100)
	config.ClaimMinIdle = 100 * time.Millisecond
	returned := newTally()
	stopped := newSubscriber(t, config)
	go returned.handle(subscribe(t, stopped, topic), func(*message.Message) {})
	eventually(t, func() bool { return returned.has(want) })
	eventuallyLength(t, client, topic, 100)
	require.Equal(t, want[900:], stored(t, client, topic))
	eventually(t, func() bool { return stats(t, fast).Trimmed+stats(t, late).Trimmed+stats(t, stopped).Trimmed == 900 })
	require.Zero(t, stats(t, stopped).Lost+stats(t, fast).Lost)
	require.EqualValues(t, 0, client.XInfoGroups(t.Context(), topic).Val()[0].Lag, "XTRIM keeps the lag known")
}

// An entry stays that KeepLast or KeepFor keeps.
func TestRetention_KeepFor(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	now := time.Now()
	for i := range 50 {
		id := fmt.Sprintf("%d-1", now.Add(-time.Hour+time.Duration(i)*time.Minute).UnixMilli())
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: id, Values: []string{"a", "b"}}).Err())
	}
	// No group: by number and age.
	require.EqualValues(t, 11, trim(t, client, topic, goxstreams.Retention{KeepFor: 49*time.Minute + 30*time.Second}).Trimmed)
	require.Zero(t, trim(t, client, topic, goxstreams.Retention{KeepFor: time.Minute, KeepLast: 39}).Trimmed)
	require.Zero(t, trim(t, client, topic, goxstreams.Retention{KeepFor: time.Hour, KeepLast: 1}).Trimmed)
	require.EqualValues(t, 9, trim(t, client, topic, goxstreams.Retention{KeepFor: time.Minute, KeepLast: 30}).Trimmed)

	createGroup(t, client, topic, testGroup)
	ids := readAs(t, client, topic, testGroup, "somebody", 10)
	require.NoError(t, client.XAck(t.Context(), topic, testGroup, ids[:4]...).Err())
	got := trim(t, client, topic, goxstreams.Retention{KeepFor: time.Minute})
	require.EqualValues(t, 4, got.Trimmed)
	require.Equal(t, ids[4], got.Pin.ID)
	require.Equal(t, "somebody", got.Pin.Consumer)
	require.Greater(t, got.Pin.Age, 30*time.Minute)
	require.NoError(t, client.XAck(t.Context(), topic, testGroup, ids...).Err())
	got = trim(t, client, topic, goxstreams.Retention{KeepFor: time.Minute})
	require.EqualValues(t, 6, got.Trimmed)
	require.Equal(t, goxstreams.Pin{Group: testGroup, ID: got.Pin.ID, Age: got.Pin.Age}, got.Pin, "not delivered yet")

	// A group that is left out on purpose.
	got = trim(t, client, topic, goxstreams.Retention{KeepLast: 5, IgnoreGroups: []string{testGroup}})
	require.EqualValues(t, 15, got.Trimmed)
	require.EqualValues(t, 5, got.Length)
}

// Nothing is as old as a KeepFor that begins before the clock did; HardMaxLen applies.
func TestRetention_KeepForever(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	const century = 100 * 365 * 24 * time.Hour
	createGroup(t, client, topic, testGroup)
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: "0-1", Values: []string{"a", "b"}}).Err())
	publishN(t, client, topic, 9)
	ids := readAs(t, client, topic, testGroup, "x", 10)
	require.NoError(t, client.XAck(t.Context(), topic, testGroup, ids...).Err())
	for keep, want := range map[*goxstreams.Retention]int64{{KeepFor: century}: 10, {KeepFor: math.MaxInt64, KeepLast: 1}: 10, {KeepFor: century, HardMaxLen: 5}: 5} {
		planned, err := goxstreams.PlanTrim(t.Context(), client, topic, *keep)
		require.NoError(t, err)
		require.Equal(t, want, planned.Length)
	}
	require.EqualValues(t, 10, trim(t, client, topic, goxstreams.Retention{KeepFor: century}).Length)

	config := grouped(client)
	config.Retention, config.KeepDeadLetters = goxstreams.Retention{KeepFor: century, HardMaxLen: 5}, century
	letters := goxstreams.DeadLetterTopic(topic)
	addRaw(t, client, letters, "a", "b")
	sub := newSubscriber(t, config)
	subscribe(t, sub, topic)
	eventuallyLength(t, client, topic, 5)
	eventually(t, func() bool { return client.Exists(t.Context(), xstream.RetentionKey(letters)).Val() == 1 }, "nobody looked at the dead letters")
	require.NoError(t, stats(t, sub).Err)
	require.EqualValues(t, 1, client.XLen(t.Context(), letters).Val())
}

// A fan-out that has not read an entry keeps it, however slow it is; once it is gone,
// its entries may go, too.
func TestRetention_FanOut(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	slow := newSubscriber(t, goxstreams.SubscriberConfig{Client: client, BatchSize: 1})
	unread := subscribe(t, slow, topic)
	messages := subscribe(t, newSubscriber(t, keepingLast(client, testGroup, 10)), topic)
	want := publishN(t, client, topic, 500)
	require.Len(t, collect(messages, 500, patience), 500)
	eventuallySettled(t, client, topic, testGroup)
	require.Equal(t, want[:5], uuids(collect(unread, 5, patience)))
	got := trim(t, client, topic, goxstreams.Retention{KeepLast: 10})
	require.Greater(t, got.Length, int64(400), "it has read ahead a little")
	require.Empty(t, got.Pin.Group)
	require.NotEmpty(t, got.Pin.Consumer)
	require.Equal(t, want[5:], uuids(collect(unread, 495, patience)))
	eventuallyLength(t, client, topic, 10)

	// Fan-outs alone, without a group.
	alone := topic + "-alone"
	config := goxstreams.SubscriberConfig{Client: client, StartID: "0", Retention: goxstreams.Retention{KeepLast: 3}}
	publishN(t, client, alone, 20)
	all := subscribe(t, newSubscriber(t, config), alone)
	require.Len(t, collect(all, 20, patience), 20)
	eventuallyLength(t, client, alone, 3)
}

// A stream is deleted and recreated with smaller IDs. What the fan-out has not read of it is
// neither trimmed nor deleted before it has noticed: its position in the old stream was beyond
// all of it.
func TestRetention_FanOutStreamRecreated(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	addWithID(client, topic, "9999999999999-0")
	fanOut := newSubscriber(t, goxstreams.SubscriberConfig{Client: client, MaxConcurrency: 100})
	messages := subscribe(t, fanOut, topic)
	require.NoError(t, client.Del(t.Context(), topic).Err())
	want := publishN(t, client, topic, 50)
	trim(t, client, topic, goxstreams.Retention{KeepLast: 1})
	require.ElementsMatch(t, want, uuids(collect(messages, 50, patience)))
	eventually(t, func() bool { return trim(t, client, topic, goxstreams.Retention{KeepLast: 1}).Length == 1 })
	require.Zero(t, stats(t, fanOut).Lost)
}

// setFull lets a server be out of memory, or not.
func setFull(t testing.TB, client *redis.Client, full bool) {
	t.Helper()
	limit := map[bool]string{false: "0", true: "1"}[full]
	require.NoError(t, client.ConfigSet(context.Background(), "maxmemory", limit).Err())
}

// A fan-out that begins while Redis is out of memory keeps what it has not read, from the
// start: acks and deletions go on there.
func TestRetention_FanOutBeginsRedisFull(t *testing.T) {
	t.Parallel()
	client, topic := testserver.Private(t).Client(), topic(t)
	const n = 50
	config := grouped(client)
	config.DeleteAcked, config.MaxConcurrency = true, n
	group := subscribe(t, newSubscriber(t, config), topic)
	want := publishN(t, client, topic, n)
	var unacked []*message.Message
	for len(unacked) < n {
		unacked = append(unacked, next(t, group))
	}
	setFull(t, client, true)
	fanOut := newSubscriber(t, goxstreams.SubscriberConfig{Client: client, BatchSize: 1, StartID: "0"})
	messages := subscribe(t, fanOut, topic)
	first := next(t, messages)
	for _, msg := range unacked {
		msg.Ack()
	}
	eventuallySettled(t, client, topic, testGroup)
	first.Ack()
	require.Equal(t, want[1:], uuids(collect(messages, n-1, patience)))
	eventually(t, func() bool { return stats(t, fanOut).InFlight == 0 })
	require.NoError(t, stats(t, fanOut).Err)
}

// A fan-out whose position Redis refuses to store is not protected from Retention and
// DeleteAcked: Subscribe fails, and later Stats shows it.
func TestRetention_PositionRefused(t *testing.T) {
	t.Parallel()
	var refused atomic.Bool
	refused.Store(true)
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if refused.Load() && isScript(cmd, "-- position") {
			return redisError("OOM command not allowed when used memory > 'maxmemory'.")
		}
		return next()
	}})
	topic, log := topic(t), newLogRecorder()
	sub := newSubscriberLog(t, goxstreams.SubscriberConfig{Client: client}, log)
	_, err := sub.Subscribe(t.Context(), topic)
	require.ErrorContains(t, err, "OOM")
	refused.Store(false)
	messages := subscribe(t, sub, topic)
	refused.Store(true)
	publish(t, client, topic, "x")
	next(t, messages).Ack()
	eventually(t, func() bool { return stats(t, sub).Err != nil }, "nobody learns of it")
	require.ErrorContains(t, stats(t, sub).Err, "store the read position: OOM")
	refused.Store(false)
	eventually(t, func() bool { return stats(t, sub).Err == nil })
	eventuallyLogged(t, log, 1)
}

// HardMaxLen cuts off what nobody has acked. It is counted to the message, for each group,
// in TopicStats and in the result, and logged; consumers that had it count it as lost.
func TestRetention_HardMaxLen(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic, log := newClient(t), topic(t), newLogRecorder()
	for _, group := range []string{"all", "some", "none"} {
		createGroup(t, client, topic, group)
	}
	publishN(t, client, topic, 5000)
	ids := readAs(t, client, topic, "all", "x", 5000)
	require.NoError(t, client.XAck(t.Context(), topic, "all", ids...).Err())
	ids = readAs(t, client, topic, "some", "x", 3000)
	require.NoError(t, client.XAck(t.Context(), topic, "some", ids[100:2000]...).Err()) // pending: 100 and 1,000
	r := goxstreams.Retention{KeepLast: 500, HardMaxLen: 2500}
	planned, err := goxstreams.PlanTrim(t.Context(), client, topic, r)
	require.NoError(t, err)
	got := trim(t, client, topic, r)
	require.EqualValues(t, 2500, got.Trimmed)
	require.EqualValues(t, 2500, got.Length)
	require.Equal(t, map[string]int64{"some": 600, "none": 2500}, got.CutOff)
	require.Equal(t, got.CutOff, planned.CutOff)
	require.Equal(t, [2]int64{got.Trimmed, got.Length}, [2]int64{planned.Trimmed, planned.Length})
	of := func(group string) int64 {
		config := grouped(client)
		config.ConsumerGroup = group
		st, err := newSubscriber(t, config).TopicStats(t.Context(), topic)
		require.NoError(t, err)
		return st.CutOff
	}
	require.Equal(t, [3]int64{0, 600, 2500}, [3]int64{of("all"), of("some"), of("none")})

	config := keepingLast(client, "none", 0)
	config.Retention, config.MaxConcurrency, config.BatchSize = goxstreams.Retention{HardMaxLen: 2000}, 1, 1
	sub := newSubscriberLog(t, config, log)
	next(t, subscribe(t, sub, topic)) // it is pending, and cut off
	eventuallyLength(t, client, topic, 2000)
	eventually(t, func() bool { return len(logLinesWith(log.Errors(), "Messages cut off before they were acked")) == 1 })
	require.Contains(t, strings.Join(log.Errors(), "\n"), "entries_by_group:none: 500, some: 500")
	require.Equal(t, [3]int64{0, 1100, 3000}, [3]int64{of("all"), of("some"), of("none")})
}

// HardMaxLen acts at the next look, an interval later at most: also if nothing was trimmed
// for long, and whoever else trims. Each Retention has its own turn.
func TestRetention_HardMaxLenInTime(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, "abandoned")
	publishN(t, client, topic, 90)
	stream := xstream.New(redisx.Client{UniversalClient: client}, topic, "")
	const interval = time.Hour // as if no time passed
	run := func(r xstream.Retention) xstream.Trimming {
		got, err := stream.Trim(t.Context(), r, "", "", interval)
		require.NoError(t, err)
		return got
	}
	brake, other := xstream.Retention{KeepLast: xstream.KeepAll, HardMaxLen: 100}, xstream.Retention{KeepLast: 1000}
	for range 2 {
		require.Equal(t, 5*interval, run(other).Wait.Round(time.Minute), "nothing to trim: a longer pause")
	}
	require.False(t, run(other).Ran)
	require.True(t, run(brake).Ran, "another's turn is not its own")
	got := run(brake)
	require.False(t, got.Ran)
	require.LessOrEqual(t, got.Wait, interval, "it looks again in time")
	for range 2 {
		publishN(t, client, topic, 50)
		got = run(brake)
		require.EqualValues(t, 100, got.Length)
		require.NotEmpty(t, got.Cut)
		require.LessOrEqual(t, got.Wait, interval)
		require.False(t, run(brake).Ran)
	}
	// A Retention that nobody has any more is forgotten.
	beside := xstream.RetentionKey(topic)
	require.NoError(t, client.HSet(t.Context(), beside, "next 0 1 0 0", time.Now().Add(-2*time.Hour).UnixMilli()).Err())
	trim(t, client, topic, goxstreams.Retention{KeepLast: 50})
	fields, err := client.HGetAll(t.Context(), beside).Result()
	require.NoError(t, err)
	require.NotContains(t, fields, "next 0 1 0 0")
	require.Contains(t, fields, "next 0 1000 0 0")
}

// The number of groups does not limit how much a run of HardMaxLen cuts off, only the number
// of pending entries does; and all are counted, whatever was deleted in between.
func TestRetention_HardMaxLenManyGroups(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	publishN(t, client, topic, 2500)
	const groups = 300
	_, err := client.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
		for i := range groups {
			pipe.XGroupCreate(t.Context(), topic, fmt.Sprint("g", i), "0")
		}
		return nil
	})
	require.NoError(t, err)
	ids := readAs(t, client, topic, "g0", "x", 2000)
	require.NoError(t, client.XAck(t.Context(), topic, "g0", ids[1500:1510]...).Err())
	require.NoError(t, client.XDel(t.Context(), topic, ids[10:1400]...).Err()) // far more than what is left around them
	stream := xstream.New(redisx.Client{UniversalClient: client}, topic, "")
	total := map[string]int64{}
	for runs := 1; ; runs++ {
		got, err := stream.Trim(t.Context(), xstream.Retention{KeepLast: xstream.KeepAll, HardMaxLen: 510}, "", "", 0)
		require.NoError(t, err)
		for group, n := range got.Cut {
			total[group] += n
		}
		if !got.Over {
			break
		}
		require.Less(t, runs, 4)
		require.Greater(t, got.Cost, 3*time.Millisecond, "pauses grow with it")
	}
	require.Len(t, total, groups)
	require.EqualValues(t, 590, total["g0"], "10 are acked")
	require.EqualValues(t, 600, total["g1"])
}

// A group is lost and recreated by one of its consumers, while another one is busy and does
// not notice: what that one has, and the other groups have acked, is kept until it is back.
func TestRetention_GroupRecreated(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, deletes := range []bool{false, true} {
		t.Run(fmt.Sprint("DeleteAcked=", deletes), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := func(group string) goxstreams.SubscriberConfig {
				config := keepingLast(newClient(t), group, 0)
				if config.DeleteAcked = deletes; !deletes {
					config.Retention = goxstreams.Retention{KeepFor: time.Millisecond}
				}
				config.Retry, config.ClaimMinIdle = quickRetry(), time.Minute
				return config
			}
			createGroup(t, client, topic, "other")
			createGroup(t, client, topic, testGroup)
			few := config(testGroup)
			few.MaxConcurrency = 3
			busy := newSubscriber(t, few)
			output := subscribe(t, busy, topic)
			ids := publishN(t, client, topic, 20)
			inHand := []*message.Message{next(t, output), next(t, output), next(t, output)} // and it reads no more
			handled := newTally()
			handled.handle(subscribe(t, newSubscriber(t, config(testGroup)), topic), nil) // recreates the group
			others := subscribe(t, newSubscriber(t, config("other")), topic)
			require.Len(t, collect(others, len(ids), patience), len(ids))
			eventuallySettled(t, client, topic, "other")
			eventually(t, func() bool { return handled.len()+stats(t, busy).InFlight == len(ids) })
			beside := xstream.RetentionKey(topic)
			at := func() (all string) {
				for field, value := range client.HGetAll(t.Context(), beside).Val() {
					if strings.HasPrefix(field, "next ") {
						all = max(all, value)
					}
				}
				return all
			}
			eventually(t, func() bool { return client.HGet(t.Context(), beside, "group "+testGroup).Err() == nil })

			require.NoError(t, client.XGroupDestroy(t.Context(), topic, testGroup).Err())
			eventually(t, func() bool { return client.XPending(t.Context(), topic, testGroup).Err() == nil }, "not recreated")
			for range 2 {
				was := at()
				eventually(t, func() bool { return at() != was }, "nobody trims")
			}
			for _, msg := range inHand {
				msg.Nack()
			}
			handled.handle(output, nil)
			eventually(t, func() bool { return handled.has(ids) }, "lost")
			require.Zero(t, stats(t, busy).Lost)
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// Others destroy and recreate the group, without what is pending, while its only consumer is
// stopped. If it looks whether it may trim before it renews its leases, it keeps what it has.
func TestRetention_GroupRecreatedWhileStopped(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	admin, topic := newClient(t), topic(t)
	var stopped, looks atomic.Bool
	trims := make(chan error, 100)
	config := deleting(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		trim := len(cmd.Args()) > 1 && strings.HasPrefix(fmt.Sprint(cmd.Args()[1]), "-- retention")
		switch {
		case stopped.Load() && !(trim && looks.Load()):
			return errors.New("the process is stopped")
		case !trim || !looks.Load():
			return next()
		}
		err := next()
		trims <- err
		return err
	}}), testGroup)
	config.Retry, config.MaxConcurrency = quickRetry(), 5
	messages := subscribe(t, newSubscriber(t, config), topic)
	ids := publishN(t, admin, topic, 5)
	var inHand []*message.Message
	for range ids {
		inHand = append(inHand, next(t, messages))
	}
	stopped.Store(true)
	require.NoError(t, admin.XGroupDestroy(t.Context(), topic, testGroup).Err())
	require.NoError(t, admin.XGroupCreate(t.Context(), topic, testGroup, "$").Err())
	looks.Store(true)
	require.NoError(t, <-trims)
	require.EqualValues(t, len(ids), admin.XLen(t.Context(), topic).Val())
	looks.Store(false)
	stopped.Store(false)
	for _, msg := range inHand {
		msg.Nack()
	}
	handled := newTally()
	handled.handle(messages, nil)
	eventually(t, func() bool { return handled.has(ids) }, "lost")
	eventuallySettled(t, admin, topic, testGroup)
}

// An entry that is pending but was deleted keeps nothing, at the start of the stream or in
// the middle, and is not what TopicStats names.
func TestRetention_DeletedWhilePending(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, testGroup)
	createGroup(t, client, topic, "other")
	publishN(t, client, topic, 1000)
	ids := readAs(t, client, topic, testGroup, "dead", 1000)
	require.Equal(t, ids, readAs(t, client, topic, "other", "dead", 1000))
	gone := slices.Concat(ids[:100], ids[200:201], ids[300:302], ids[850:851], ids[950:951])
	require.NoError(t, client.XDel(t.Context(), topic, gone...).Err())
	for _, group := range []string{testGroup, "other"} {
		for i, id := range ids[:900] { // the 900th is the first that is needed
			if !slices.Contains(gone, id) {
				require.NoError(t, client.XAck(t.Context(), topic, group, ids[i]).Err())
			}
		}
	}
	sub := newSubscriber(t, grouped(client))
	pinned := func() goxstreams.Pin {
		st, err := sub.TopicStats(t.Context(), topic)
		require.NoError(t, err)
		return st.Pin
	}
	require.Equal(t, ids[900], pinned().ID)
	for _, r := range []goxstreams.Retention{{KeepLast: 700}, {KeepLast: 10}} {
		planned, err := goxstreams.PlanTrim(t.Context(), client, topic, r)
		require.NoError(t, err)
		got := trim(t, client, topic, r)
		planned.Pin.Age, got.Pin.Age = 0, 0
		require.Equal(t, got, planned)
		if r.KeepLast == 700 {
			require.EqualValues(t, 700, got.Length)
			require.Empty(t, got.Pin)
			continue
		}
		require.EqualValues(t, 99, got.Length)
		require.Equal(t, ids[900], got.Pin.ID)
		require.Equal(t, "dead", got.Pin.Consumer)
	}
	// Nothing is left that is pending: what follows is not delivered yet.
	require.NoError(t, client.XDel(t.Context(), topic, ids[900:]...).Err())
	require.Empty(t, pinned())
	later := publishN(t, client, topic, 1)
	require.Equal(t, entriesOf(t, client, topic)[0].id, pinned().ID)
	require.Empty(t, pinned().Consumer)
	require.Len(t, later, 1)
	readAs(t, client, topic, testGroup, "x", 1)
	require.NoError(t, client.XAck(t.Context(), topic, testGroup, entriesOf(t, client, topic)[0].id).Err())
	eventually(t, func() bool {
		return trim(t, client, topic, goxstreams.Retention{KeepFor: time.Millisecond, IgnoreGroups: []string{"other"}}).Length == 0
	})
}

// A vanished group keeps what it had not acked, for a minute, and nothing before that: groups
// that come and go do not stop trimming. PlanTrim says so, too.
func TestRetention_GroupVanished(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, old := range []bool{false, true} {
		t.Run(fmt.Sprint("seen by an older version=", old), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			beside := xstream.RetentionKey(topic)
			r := goxstreams.Retention{KeepLast: 10}
			createGroup(t, client, topic, "stays")
			createGroup(t, client, topic, "pod")
			publishN(t, client, topic, 100)
			ids := readAs(t, client, topic, "stays", "x", 100)
			readAs(t, client, topic, "pod", "x", 100)
			require.NoError(t, client.XAck(t.Context(), topic, "stays", ids[:20]...).Err())
			require.NoError(t, client.XAck(t.Context(), topic, "pod", ids[:50]...).Err())
			require.EqualValues(t, 20, trim(t, client, topic, r).Trimmed)
			if old {
				require.NoError(t, client.HDel(t.Context(), beside, "floor stays", "floor pod").Err())
			}
			require.NoError(t, client.XAck(t.Context(), topic, "stays", ids...).Err())
			require.NoError(t, client.XGroupDestroy(t.Context(), topic, "pod").Err())

			before := client.HGetAll(t.Context(), beside).Val()
			planned, err := goxstreams.PlanTrim(t.Context(), client, topic, r)
			require.NoError(t, err)
			require.Equal(t, before, client.HGetAll(t.Context(), beside).Val(), "PlanTrim changes nothing")
			got := trim(t, client, topic, r)
			require.Equal(t, map[bool]int64{false: 30, true: 0}[old], got.Trimmed)
			require.Equal(t, "pod", got.HeldBy)
			require.InDelta(t, time.Minute, time.Until(got.HeldUntil), float64(30*time.Second))
			require.Empty(t, got.Pin)
			require.InDelta(t, got.HeldUntil.UnixMilli(), planned.HeldUntil.UnixMilli(), 30_000)
			planned.HeldUntil = got.HeldUntil
			require.Equal(t, got, planned)
			again, err := goxstreams.PlanTrim(t.Context(), client, topic, r)
			require.NoError(t, err)
			require.Equal(t, got.HeldUntil, again.HeldUntil)
			ignoring := goxstreams.Retention{KeepLast: 15, IgnoreGroups: []string{"pod"}}
			require.Empty(t, trim(t, client, topic, ignoring).HeldBy)

			require.NoError(t, client.HSet(t.Context(), beside, "group pod", "hold 1 1").Err()) // as if it were longer ago
			got = trim(t, client, topic, r)
			require.EqualValues(t, 10, got.Length)
			require.Empty(t, got.HeldBy)
			for field := range client.HGetAll(t.Context(), beside).Val() {
				require.NotContains(t, field, "pod", "it is forgotten")
			}
		})
	}
}

// A group that goes back to an earlier entry and vanishes then keeps what it would have read.
func TestRetention_VanishedAfterSetID(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, testGroup)
	publishN(t, client, topic, 50)
	ids := readAs(t, client, topic, testGroup, "x", 50)
	require.NoError(t, client.XAck(t.Context(), topic, testGroup, ids...).Err())
	require.EqualValues(t, 10, trim(t, client, topic, goxstreams.Retention{KeepLast: 40}).Trimmed)
	require.NoError(t, client.XGroupSetID(t.Context(), topic, testGroup, "0").Err())
	require.Zero(t, trim(t, client, topic, goxstreams.Retention{KeepLast: 1}).Trimmed)
	require.NoError(t, client.XGroupDestroy(t.Context(), topic, testGroup).Err())
	require.Zero(t, trim(t, client, topic, goxstreams.Retention{KeepLast: 1}).Trimmed)
}

// What pins the floor for long is logged once, with its group.
func TestRetention_AbandonedGroup(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic, log := newClient(t), topic(t), newLogRecorder()
	old := fmt.Sprintf("%d-1", time.Now().Add(-time.Hour).UnixMilli())
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: old, Values: []string{"a", "b"}}).Err())
	createGroup(t, client, topic, "abandoned")
	config := keepingLast(client, testGroup, 1)
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	publishN(t, client, topic, 5)
	require.Len(t, collect(messages, 5, patience), 5)
	held := func() []string { return logLinesWith(log.Errors(), "Retention is held up") }
	eventually(t, func() bool { return len(held()) == 1 })
	require.Contains(t, held()[0], "pinned_by_group:abandoned")
	require.Contains(t, held()[0], old)
	st, err := sub.TopicStats(t.Context(), topic)
	require.NoError(t, err)
	require.Equal(t, "abandoned", st.Pin.Group)
	require.Equal(t, old, st.Pin.ID)
	require.InDelta(t, time.Hour, st.Pin.Age, float64(5*time.Minute))
	require.EqualValues(t, 6, client.XLen(t.Context(), topic).Val())

	ignoring := keepingLast(client, testGroup, 1)
	ignoring.Retention.IgnoreGroups = []string{"abandoned"}
	subscribe(t, newSubscriber(t, ignoring), topic)
	eventuallyLength(t, client, topic, 1)
	require.Len(t, held(), 1)
}

// XGROUP SETID to an earlier ID has the group read again what is kept, and keeps it;
// to a later one it lets go of what is skipped.
func TestRetention_SetID(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, testGroup)
	want := publishN(t, client, topic, 100)
	ids := readAs(t, client, topic, testGroup, "x", 100)
	require.NoError(t, client.XAck(t.Context(), topic, testGroup, ids...).Err())
	r := goxstreams.Retention{KeepLast: 50}
	require.EqualValues(t, 50, trim(t, client, topic, r).Trimmed)
	require.NoError(t, client.XGroupSetID(t.Context(), topic, testGroup, "0").Err())
	require.Zero(t, trim(t, client, topic, goxstreams.Retention{KeepLast: 10}).Trimmed)
	messages := subscribe(t, newSubscriber(t, keepingLast(client, testGroup, 10)), topic)
	require.ElementsMatch(t, want[50:], uuids(collect(messages, 50, patience)))
	eventuallyLength(t, client, topic, 10)

	another := topic + "-forward"
	createGroup(t, client, another, testGroup)
	publishN(t, client, another, 20)
	require.Zero(t, trim(t, client, another, goxstreams.Retention{KeepLast: 1}).Trimmed)
	require.NoError(t, client.XGroupSetID(t.Context(), another, testGroup, "$").Err())
	require.EqualValues(t, 19, trim(t, client, another, goxstreams.Retention{KeepLast: 1}).Trimmed)
}

// A group at the last ID that there can be, and an entry with that ID: nothing follows it.
func TestRetention_LastPossibleID(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	const lastID = "18446744073709551615-18446744073709551615"
	sub := newSubscriber(t, grouped(client))
	pinned := func() string {
		st, err := sub.TopicStats(t.Context(), topic)
		require.NoError(t, err)
		return st.Pin.ID
	}
	both := func(r goxstreams.Retention) goxstreams.TrimResult {
		planned, err := goxstreams.PlanTrim(t.Context(), client, topic, r)
		require.NoError(t, err)
		got := trim(t, client, topic, r)
		require.Equal(t, got, planned)
		return got
	}
	publishN(t, client, topic, 10)
	createGroup(t, client, topic, testGroup)
	require.NoError(t, client.XGroupSetID(t.Context(), topic, testGroup, lastID).Err())
	require.Empty(t, pinned())
	require.EqualValues(t, 7, both(goxstreams.Retention{KeepLast: 3}).Trimmed)
	require.EqualValues(t, 3, both(goxstreams.Retention{KeepFor: time.Millisecond}).Trimmed)

	require.NoError(t, client.XGroupSetID(t.Context(), topic, testGroup, "0").Err())
	for _, id := range []string{"18446744073709551615-1", lastID} {
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: id, Values: []string{"a", "b"}}).Err())
	}
	require.Equal(t, "18446744073709551615-1", pinned())
	require.Equal(t, []string{"18446744073709551615-1", lastID}, readAs(t, client, topic, testGroup, "x", 2))
	require.NoError(t, client.XAck(t.Context(), topic, testGroup, "18446744073709551615-1").Err())
	got := both(goxstreams.Retention{KeepFor: 100 * 365 * 24 * time.Hour, KeepLast: 1, HardMaxLen: 1})
	require.EqualValues(t, 1, got.Length)
	require.Empty(t, got.CutOff)
	require.Equal(t, lastID, pinned())
	require.NoError(t, client.XAck(t.Context(), topic, testGroup, lastID).Err())
	require.Empty(t, pinned())
}

// Dead letters, replays and delayed messages: nothing of them is lost by the shortest
// Retention there is, and dead letters themselves stay unless KeepDeadLetters says so.
func TestRetention_WithEverything(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	config := limited(client, -1)
	config.ConsumerGroup, config.Retention = testGroup, goxstreams.Retention{KeepFor: time.Millisecond}
	handled := newTally()
	refuse := true // guarded by the messages' order
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	go func() {
		for msg := range messages {
			if refuse && string(msg.Payload) == "7" {
				refuse = false
				msg.Nack()
				continue
			}
			handled.add(msg)
			msg.Ack()
		}
	}()
	want := publishN(t, client, topic, 10)
	later := delayedBy("later", 300*time.Millisecond)
	publishedIn(t, client, topic, later)
	eventuallyDies(t, client, topic)
	queue := queueOf(t, client, goxstreams.DeadLetterTopic(topic))
	letters := allLetters(t, client, topic)
	require.Len(t, letters, 1)
	eventually(t, func() bool { return handled.len() == 10 })
	eventuallyLength(t, client, topic, 0)
	n, err := queue.Replay(t.Context(), letters[0].ID)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	eventually(t, func() bool { return handled.has(append(want, "later")) })
	eventuallyLength(t, client, topic, 0)
	require.Zero(t, stats(t, sub).Lost)
	require.EqualValues(t, 11, handled.total(), "each of them once")
}

// KeepDeadLetters trims the dead-letter stream by age; without it nothing goes.
func TestRetention_DeadLetters(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	letters := goxstreams.DeadLetterTopic(topic)
	old := fmt.Sprintf("%d-1", time.Now().Add(-48*time.Hour).UnixMilli())
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: letters, ID: old, Values: []string{"a", "b"}}).Err())
	addRaw(t, client, letters, "a", "b")
	kept := grouped(client)
	kept.Retention.KeepLast = 1
	first := newSubscriber(t, kept)
	messages := subscribe(t, first, topic)
	publishN(t, client, topic, 2)
	require.Len(t, collect(messages, 2, patience), 2)
	eventuallyLength(t, client, topic, 1)
	require.EqualValues(t, 2, client.XLen(t.Context(), letters).Val())
	kept.KeepDeadLetters = 24 * time.Hour
	subscribe(t, newSubscriber(t, kept), topic)
	eventuallyLength(t, client, letters, 1)
}

// A full server refuses what needs memory. What frees memory must work nevertheless: Trim,
// HardMaxLen, Subscribers, dead letters, DeleteAcked; and it must not forget what a fan-out
// has not read or a lost group needs.
func TestRetention_OutOfMemory(t *testing.T) {
	t.Parallel()
	client := testserver.Private(t).Client()
	full := func(t *testing.T, full bool) {
		require.NoError(t, client.ConfigSet(context.WithoutCancel(t.Context()), "maxmemory", map[bool]string{true: "1", false: "0"}[full]).Err())
		if full {
			require.ErrorContains(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: "x", Values: []string{"a", "b"}}).Err(), "OOM")
			t.Cleanup(func() { _ = client.ConfigSet(context.WithoutCancel(t.Context()), "maxmemory", "0") })
		}
	}
	t.Run("Trim", func(t *testing.T) {
		topic := topic(t)
		createGroup(t, client, topic, testGroup)
		publishN(t, client, topic, 100)
		ids := readAs(t, client, topic, testGroup, "x", 100)
		require.NoError(t, client.XAck(t.Context(), topic, testGroup, ids[:50]...).Err())
		full(t, true)
		require.EqualValues(t, 50, trim(t, client, topic, goxstreams.Retention{KeepLast: 1}).Trimmed)
		got := trim(t, client, topic, goxstreams.Retention{HardMaxLen: 10})
		require.EqualValues(t, 10, got.Length)
		require.Equal(t, map[string]int64{testGroup: 40}, got.CutOff)
	})
	t.Run("Subscriber", func(t *testing.T) {
		topic := topic(t)
		letters := goxstreams.DeadLetterTopic(topic)
		config := keepingLast(client, testGroup, 5)
		config.KeepDeadLetters = time.Hour
		sub := newSubscriber(t, config)
		output := subscribe(t, sub, topic)
		publishN(t, client, topic, 50)
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: letters, ID: "1-1", Values: []string{"a", "b"}}).Err())
		first := next(t, output)
		full(t, true)
		for _, stream := range []string{topic, letters} { // nothing is known: not which groups there are, either
			require.NoError(t, client.Del(t.Context(), xstream.RetentionKey(stream)).Err())
		}
		first.Ack()
		require.Len(t, collect(output, 49, patience), 49)
		eventuallyLength(t, client, topic, 5)
		eventuallyLength(t, client, letters, 0)
		require.NoError(t, stats(t, sub).Err)
	})
	t.Run("DeleteAcked", func(t *testing.T) {
		topic := topic(t)
		config := keepingLast(client, testGroup, 0)
		config.Retention, config.DeleteAcked = goxstreams.Retention{}, true
		output := subscribe(t, newSubscriber(t, config), topic)
		fan := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client, StartID: "0", BatchSize: 1}), topic)
		want := publishN(t, client, topic, 20)
		inHand := make([]*message.Message, 20)
		for i := range inHand {
			inHand[i] = next(t, output)
		}
		next(t, fan).Ack()
		positions := topic + ".fanout{" + topic + "}"
		full(t, true)
		for name := range client.HGetAll(t.Context(), positions).Val() { // as if its process had been cut off
			full(t, false)
			require.NoError(t, client.HSet(t.Context(), positions, name, "0-0 1").Err())
			full(t, true)
		}
		for _, msg := range inHand {
			msg.Ack()
		}
		eventuallySettled(t, client, topic, testGroup)
		require.Subset(t, stored(t, client, topic), want[5:], "the fan-out has not read them")
		require.Equal(t, want[1:], uuids(collect(fan, 19, patience)))
		eventuallyLength(t, client, topic, 0) // it stores what it has read
	})
	t.Run("Hold", func(t *testing.T) {
		topic := topic(t)
		config := keepingLast(client, testGroup, 0)
		config.Retention, config.DeleteAcked = goxstreams.Retention{}, true
		createGroup(t, client, topic, "lost")
		output := subscribe(t, newSubscriber(t, config), topic)
		beside := xstream.RetentionKey(topic)
		publishN(t, client, topic, 1)
		msg := next(t, output)
		eventually(t, func() bool { return client.HGet(t.Context(), beside, "group lost").Err() == nil })
		full(t, true)
		require.NoError(t, client.XGroupDestroy(t.Context(), topic, "lost").Err())
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
		require.Contains(t, client.HGet(t.Context(), beside, "group lost").Val(), "hold ")
		require.EqualValues(t, 1, client.XLen(t.Context(), topic).Val())
	})
}

// In a Cluster everything is in the topic's slot.
func TestRetention_Cluster(t *testing.T) {
	onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
		createGroup(t, client, topic, "other")
		config := keepingLast(client, testGroup, 5)
		config.KeepDeadLetters = time.Hour
		messages := subscribe(t, newSubscriber(t, config), topic)
		publishN(t, client, topic, 50)
		require.Len(t, collect(messages, 50, patience), 50)
		eventuallySettled(t, client, topic, testGroup)
		r := goxstreams.Retention{KeepLast: 5, HardMaxLen: 40}
		planned, err := goxstreams.PlanTrim(t.Context(), client, topic, r)
		require.NoError(t, err)
		require.Equal(t, map[string]int64{"other": 10}, planned.CutOff)
		require.Equal(t, "other", trim(t, client, topic, goxstreams.Retention{KeepLast: 5}).Pin.Group)
		require.Len(t, collect(subscribe(t, newSubscriber(t, keepingLast(client, "other", 5)), topic), 50, patience), 50)
		eventuallyLength(t, client, topic, 5)
	})
}

func TestTrim_Mistakes(t *testing.T) {
	_, err := goxstreams.Trim(t.Context(), nil, "", goxstreams.Retention{})
	require.Equal(t, []string{"c", "topic", "r"}, mistakes(t, err, "Trim"))
	_, err = goxstreams.PlanTrim(t.Context(), offline(t), "x", goxstreams.Retention{KeepLast: -1, HardMaxLen: -2})
	require.Equal(t, []string{"r.KeepLast", "r.HardMaxLen"}, mistakes(t, err, "PlanTrim"))
}

// The config is copied: what its owner changes later changes nothing.
func TestRetention_IgnoreGroupsCopied(t *testing.T) {
	t.Parallel()
	asked := make(chan string, 100)
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isScript(cmd, "-- retention") {
			asked <- fmt.Sprint(cmd.Args()...)
		}
		return next()
	}})
	topic := topic(t)
	groups := []string{"abandoned"}
	config := grouped(client)
	config.Retention = goxstreams.Retention{KeepLast: 5, IgnoreGroups: groups}
	sub := newSubscriber(t, config)
	groups[0] = "needed"
	subscribe(t, sub, topic)
	got := <-asked
	require.Contains(t, got, "abandoned")
	require.NotContains(t, got, "needed")
}
