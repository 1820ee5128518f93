package goxstreams_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
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
			beside := topic + ".retention{" + topic + "}"
			at := func() string { return client.HGet(t.Context(), beside, "next").Val() }
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
