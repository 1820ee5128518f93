package goxstreams_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/components/requeuer"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// delayedBy returns a message that is delayed, of the UUID and payload given.
func delayedBy(uuid string, d time.Duration) *message.Message {
	msg := message.NewMessage(uuid, []byte(uuid))
	delay.Message(msg, delay.For(d))
	return msg
}

func newSchedule(t testing.TB, client redis.UniversalClient, topic string) *goxstreams.Schedule {
	t.Helper()
	schedule, err := goxstreams.NewSchedule(client, topic)
	require.NoError(t, err)
	return schedule
}

func delayedIn(t testing.TB, schedule *goxstreams.Schedule) (all []goxstreams.DelayedMessage) {
	t.Helper()
	for d, err := range schedule.All(t.Context()) {
		require.NoError(t, err)
		all = append(all, d)
	}
	return all
}

// serverTime is the server's clock in milliseconds, rounded down.
func serverTime(t testing.TB, client redis.UniversalClient) time.Time {
	t.Helper()
	now, err := client.Time(t.Context()).Result()
	require.NoError(t, err)
	return now.Truncate(time.Millisecond)
}

// publishedIn adds messages to what waits in a process that ends: nobody but Subscribers
// sees to them.
func publishedIn(t testing.TB, client redis.UniversalClient, topic string, msgs ...*message.Message) {
	t.Helper()
	pub := newPublisher(t, client)
	require.NoError(t, pub.Publish(topic, msgs...))
	require.NoError(t, pub.Close())
}

// What is delayed comes not before its time, by the server's clock: to the millisecond,
// whatever "until" was rounded to. What is not delayed does not wait for it.
func TestDelayed_Comes(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]time.Duration{"less than a second": 250 * time.Millisecond, "more": 1300 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			messages := subscribe(t, newSubscriber(t, grouped(client)), topic)
			before := serverTime(t, client)
			require.NoError(t, newPublisher(t, client).Publish(topic, delayedBy("later", d), message.NewMessage("now", nil)))
			first := next(t, messages)
			require.Equal(t, "now", first.UUID)
			first.Ack()
			later := next(t, messages)
			require.Equal(t, "later", later.UUID)
			require.Equal(t, "later", string(later.Payload))
			require.Equal(t, d.String(), later.Metadata.Get(delay.DelayedForKey))
			require.GreaterOrEqual(t, delivery(t, later).Time(), before.Add(d))
			later.Ack()
			eventuallySettled(t, client, topic, testGroup)
			require.Empty(t, delayedIn(t, newSchedule(t, client, topic)))
			keys, err := client.Exists(t.Context(), topic+".due{"+topic+"}", topic+".delayed{"+topic+"}").Result()
			require.NoError(t, err)
			require.Zero(t, keys)
		})
	}
}

// A message waits without a Subscriber, and without its Publisher's process. Each kind of
// Subscriber moves what is due, in the order in which it is due.
func TestDelayed_MovedByAnySubscriber(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]goxstreams.SubscriberConfig{
		"group": {ConsumerGroup: "g"}, "fan-out": {}, "NoAck": {ConsumerGroup: "g", NoAck: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			var msgs []*message.Message
			for _, i := range rand.Perm(700) { // more than one script moves
				msgs = append(msgs, delayedBy(fmt.Sprint(i), time.Duration(1000+i)*time.Millisecond))
			}
			publishedIn(t, client, topic, msgs...)
			var want []string
			for _, d := range delayedIn(t, newSchedule(t, client, topic)) {
				want = append(want, d.UUID)
			}
			require.Len(t, want, len(msgs))
			require.NotEqual(t, uuids(msgs), want)

			config.Client = client
			sub, err := goxstreams.NewSubscriber(config, nil)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, sub.Close()) })
			got := collect(subscribe(t, sub, topic), len(want), patience)
			require.Equal(t, want, uuids(got))
			require.NoError(t, stats(t, sub).Err)
		})
	}
}

// Several processes move at once, each message once.
func TestDelayed_MovedOnce(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	handled := newTally()
	for range 5 {
		go handled.handle(subscribe(t, newSubscriber(t, grouped(newClient(t))), topic), func(*message.Message) {})
	}
	const n = 2000
	var all sync.WaitGroup
	for p := range 4 {
		pub := newPublisher(t, newClient(t))
		all.Go(func() {
			for i := range n / 4 {
				if err := pub.Publish(topic, delayedBy(fmt.Sprint(p, "-", i), time.Duration(rand.IntN(1500))*time.Millisecond)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	eventuallyAll(t, handled.len, n)
	eventuallySettled(t, client, topic, testGroup)
	added, err := client.XLen(t.Context(), topic).Result()
	require.NoError(t, err)
	require.EqualValues(t, n, added)
}

// A call that is repeated, since its outcome was not known, leaves one message waiting. A
// different message with the UUID of one that waits must not replace it, nor be lost: it
// is an error, and nothing of its call is stored.
func TestDelayed_UUIDs(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	pub, schedule := newPublisher(t, client), newSchedule(t, client, topic)
	msg := delayedBy("a", time.Hour)
	for range 3 {
		require.NoError(t, pub.Publish(topic, msg, msg))
	}
	first := delayedIn(t, schedule)
	require.Len(t, first, 1)
	unchanged := func() {
		t.Helper()
		now := delayedIn(t, schedule)
		require.Len(t, now, 1)
		require.Equal(t, first[0].Due, now[0].Due)
		require.Equal(t, first[0].Fields, now[0].Fields)
	}
	unchanged()

	other := delayedBy("a", time.Hour)
	other.Payload = []byte("other")
	err := pub.Publish(topic, message.NewMessage("plain", nil), delayedBy("b", time.Hour), other)
	require.ErrorContains(t, err, "another message with the UUID a waits")
	require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
	unchanged()
	require.Zero(t, client.XLen(t.Context(), topic).Val())
	require.ErrorContains(t, pub.Publish(topic, delayedBy("c", time.Hour), msg, func() *message.Message {
		other := delayedBy("c", time.Hour)
		other.Payload = nil
		return other
	}()), "another message with the UUID c waits", "within one call")
	unchanged()

	require.ErrorContains(t, pub.Publish(topic, delayedBy("", time.Hour)), "UUID is empty")
}

// A message that waits is repeated after it was due, or after it was rescheduled: nothing
// is stored, as before.
func TestDelayed_RepeatedLate(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	idle := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isScript(cmd, "-- move") { // which a Publisher does at once that stores something
			return errors.New("not now")
		}
		return next()
	}})
	schedule := newSchedule(t, client, topic)
	msg := delayedBy("a", 1100*time.Millisecond)
	publishedIn(t, idle, topic, msg)
	due := delayedIn(t, schedule)[0].Due
	eventually(t, func() bool { return serverTime(t, client).After(due.Add(time.Second)) })
	requireWaiting := func(why string) {
		t.Helper()
		publishedIn(t, idle, topic, msg, message.NewMessage("other", nil))
		require.Len(t, delayedIn(t, schedule), 1, why)
		added, err := client.XRange(t.Context(), topic, "-", "+").Result()
		require.NoError(t, err)
		for _, e := range added {
			require.Equal(t, "other", e.Values[goxstreams.UUIDHeaderKey], why)
		}
	}
	requireWaiting("overdue")
	require.NoError(t, schedule.Reschedule(t.Context(), "a", time.Now().Add(time.Hour)))
	requireWaiting("rescheduled")
	different := delayedBy("a", time.Second)
	require.ErrorContains(t, newPublisher(t, idle).Publish(topic, different), "another message with the UUID a waits", "its metadata differ")
}

// What somebody has deleted a half of is scheduled anew.
func TestDelayed_Halves(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	schedule := newSchedule(t, client, topic)
	publishedIn(t, client, topic, delayedBy("a", time.Hour), delayedBy("b", time.Hour))
	require.NoError(t, client.ZRem(t.Context(), topic+".due{"+topic+"}", "a").Err())
	require.NoError(t, client.HDel(t.Context(), topic+".delayed{"+topic+"}", "b").Err())
	publishedIn(t, client, topic, delayedBy("a", 2*time.Hour), delayedBy("b", 3*time.Hour))
	all := delayedIn(t, schedule)
	require.Len(t, all, 2)
	require.WithinDuration(t, time.Now().Add(2*time.Hour), all[0].Due, patience)
	require.WithinDuration(t, time.Now().Add(3*time.Hour), all[1].Due, patience)
}

// What is due while Redis is out of memory waits until there is some again, which Stats shows.
func TestDelayed_RedisFull(t *testing.T) {
	t.Parallel()
	client, topic := testserver.Private(t).Client(), topic(t)
	sub := newSubscriber(t, grouped(client))
	messages := subscribe(t, sub, topic)
	publishedIn(t, client, topic, delayedBy("a", 100*time.Millisecond), delayedBy("b", 200*time.Millisecond))
	setFull(t, client, true)
	eventually(t, func() bool { return stats(t, sub).Err != nil })
	require.ErrorContains(t, stats(t, sub).Err, "move delayed messages: OOM")
	require.Len(t, delayedIn(t, newSchedule(t, client, topic)), 2)
	setFull(t, client, false)
	require.Equal(t, []string{"a", "b"}, uuids(collect(messages, 2, patience)))
	eventually(t, func() bool { return stats(t, sub).Err == nil })
}

// A nil message is an error, wherever it stands.
func TestDelayed_Nil(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	pub := newPublisher(t, client)
	require.ErrorContains(t, pub.Publish(topic, nil, delayedBy("a", time.Hour)), "message 1 of 2 (UUID \"\"): the message is nil")
	require.ErrorContains(t, pub.Publish(topic, delayedBy("a", time.Hour), nil), "message 2 of 2 (UUID \"\"): the message is nil")
	require.Empty(t, delayedIn(t, newSchedule(t, client, topic)))
}

// Close waits for a move that is under way, which is the Publisher's last.
func TestDelayed_PublisherCloses(t *testing.T) {
	t.Parallel()
	moving, release := make(chan struct{}), make(chan struct{})
	var moves atomic.Int64
	client, topic := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isScript(cmd, "-- move") && moves.Add(1) == 1 {
			close(moving)
			<-release
		}
		return next()
	}}), topic(t)
	pub := newPublisher(t, client)
	for i := range 100 {
		require.NoError(t, pub.Publish(topic, delayedBy(fmt.Sprint(i), time.Duration(50*i)*time.Millisecond)))
	}
	<-moving
	closed := make(chan error)
	go func() { closed <- pub.Close() }()
	during(t, 200*time.Millisecond, func() bool { return true }, "time for Close to begin")
	select {
	case <-closed:
		require.Fail(t, "Close does not wait for the move")
	default:
	}
	close(release)
	require.NoError(t, <-closed)
	n := moves.Load()
	during(t, time.Second, func() bool { return moves.Load() == n }, "it moves after Close")
	require.NotEmpty(t, delayedIn(t, newSchedule(t, newClient(t), topic)))
}

// Bad metadata give an error that names the key, and nothing of the call is stored.
func TestDelayed_BadInput(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	pub := newPublisher(t, client)
	soon := time.Now().Add(time.Minute).UTC().Format(time.RFC3339)
	for name, metadata := range map[string]message.Metadata{
		delay.DelayedUntilKey + ": is missing":                     {delay.DelayedForKey: "1m0s"},
		delay.DelayedUntilKey + `: "tomorrow" is no time`:          {delay.DelayedUntilKey: "tomorrow", delay.DelayedForKey: "1m0s"},
		delay.DelayedUntilKey + `: "1700000000" is no time`:        {delay.DelayedUntilKey: "1700000000"},
		delay.DelayedUntilKey + ": 9999-12-31T23:59:59Z is more":   {delay.DelayedUntilKey: "9999-12-31T23:59:59Z"},
		delay.DelayedForKey + `: "soon" is no duration`:            {delay.DelayedUntilKey: soon, delay.DelayedForKey: "soon"},
		delay.DelayedForKey + `: "60" is no duration`:              {delay.DelayedUntilKey: soon, delay.DelayedForKey: "60"},
		delay.DelayedForKey + ": is negative: -1s":                 {delay.DelayedUntilKey: soon, delay.DelayedForKey: "-1s"},
		delay.DelayedForKey + ": 2562047h47m16.854775807s is more": {delay.DelayedUntilKey: soon, delay.DelayedForKey: "2562047h47m16.854775807s"},
	} {
		t.Run(name, func(t *testing.T) {
			bad := message.NewMessage(watermill.NewUUID(), nil)
			bad.Metadata = metadata
			err := pub.Publish(topic, message.NewMessage("fine", nil), delayedBy("later", time.Hour), bad)
			require.ErrorContains(t, err, name)
			require.ErrorContains(t, err, "message 3 of 3")
		})
	}
	require.Zero(t, client.XLen(t.Context(), topic).Val())
	require.Empty(t, delayedIn(t, newSchedule(t, client, topic)))

	_, err := goxstreams.NewSchedule(nil, "")
	require.ErrorContains(t, err, "NewSchedule.c")
	require.ErrorContains(t, err, "NewSchedule.topic")
	require.ErrorContains(t, newSchedule(t, client, topic).Reschedule(t.Context(), "a", time.Time{}), "zero time")
	require.ErrorContains(t, newSchedule(t, client, topic).Reschedule(t.Context(), "a", time.Now().AddDate(11, 0, 0)), "ten years")
}

// A message that is published again with the metadata that it came with, as Watermill's
// Requeuer does, was delayed already.
func TestDelayed_NotTwice(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	pub := newPublisher(t, client)
	msg := delayedBy("a", time.Hour)
	msg.Metadata.Set(delay.DelayedUntilKey, time.Now().Add(-2*time.Second).UTC().Format(time.RFC3339))
	require.NoError(t, pub.Publish(topic, msg))
	require.EqualValues(t, 1, client.XLen(t.Context(), topic).Val())

	until := time.Now().Add(2 * time.Hour).UTC().Truncate(time.Second)
	msg.Metadata.Set(delay.DelayedUntilKey, until.Format(time.RFC3339))
	require.NoError(t, pub.Publish(topic, msg))
	all := delayedIn(t, newSchedule(t, client, topic))
	require.Len(t, all, 1)
	require.True(t, until.Equal(all[0].Due), "%v is %v", all[0].Due, until)
	require.Equal(t, msg.Metadata, all[0].Message.Metadata)
	require.Equal(t, "a", all[0].UUID)
}

// Redis has ended the call's connection. What waits is there once after a repetition.
func TestDelayed_OutcomeUnknown(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	lost, _ := loseReply(1, func(cmd redis.Cmder) bool { return isScript(cmd, "-- schedule") })
	client, topic := newClient(t, lost), topic(t)
	pub, msg := newPublisher(t, client), delayedBy("a", time.Hour)
	require.ErrorIs(t, pub.Publish(topic, msg), goxstreams.ErrOutcomeUnknown)
	require.NoError(t, pub.Publish(topic, msg))
	require.Len(t, delayedIn(t, newSchedule(t, client, topic)), 1)
}

// Messages are cancelled and rescheduled in the very milliseconds in which they are moved.
// What was cancelled successfully never comes. What was rescheduled successfully comes
// once, and not before its new time. Whoever is told NotFoundError finds the message in
// the stream.
func TestDelayed_CancelAndReschedule(t *testing.T) {
	t.Parallel()
	batches := 40
	if os.Getenv(longTests) != "" {
		batches = 1000
	}
	raceWithMoves(t, topic(t), batches, func() redis.UniversalClient { return newClient(t) }, nil)
}

// The same while the topic's slot moves: then calls may be refused, which change nothing.
func TestDelayed_CancelAndRescheduleWhileTheSlotMoves(t *testing.T) {
	t.Parallel()
	cluster := testserver.Cluster(t)
	topic, batches := topicOfOwnSlot(t, cluster.Client()), 8
	if os.Getenv(longTests) != "" {
		batches = 1000
	}
	raceWithMoves(t, topic, batches, func() redis.UniversalClient { return cluster.Client() }, func() { cluster.MoveSlot(topic, nil) })
}

// raceWithMoves publishes batches of a hundred messages. It calls moveSlot (which may be
// nil) again and again meanwhile.
func raceWithMoves(t *testing.T, topic string, batches int, newClient func() redis.UniversalClient, moveSlot func()) {
	const size, workers = 100, 4
	client := newClient()
	for range 2 {
		messages := subscribe(t, newSubscriber(t, grouped(newClient())), topic)
		go func() {
			for msg := range messages {
				msg.Ack()
			}
		}()
	}
	schedule := newSchedule(t, client, topic)
	tallies := make([]racedTally, workers)
	var all sync.WaitGroup
	for w := range workers {
		pub := newPublisher(t, newClient())
		tallies[w] = racedTally{client: client, topic: topic, fates: make(map[string]fate)}
		all.Go(func() {
			for batch := range batches / workers {
				if err := tallies[w].race(t.Context(), pub, schedule, fmt.Sprint(w, "-", batch, "-"), size); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	defer func() { <-done }() // also if moveSlot ends the test
	for moving := moveSlot != nil; moving; {
		moveSlot()
		select {
		case <-done:
			moving = false
		default:
		}
	}
	<-done
	fates := make(map[string]fate)
	var operations, missed, rescheduled, cancelled, refused int
	for _, tally := range tallies {
		refused += tally.refused
		operations, missed = operations+tally.operations, missed+tally.missed
		rescheduled, cancelled = rescheduled+tally.rescheduled, cancelled+tally.cancelled
		maps.Copy(fates, tally.fates)
	}
	require.Equal(t, batches*size, len(fates))
	eventually(t, func() bool { n, err := schedule.Count(t.Context()); return err == nil && n == 0 })
	times := entryTimes(t, client, topic)
	for uuid, f := range fates {
		at := times[uuid]
		switch {
		case f.cancelled:
			require.Empty(t, at, "%s was cancelled", uuid)
		default:
			require.Len(t, at, 1, uuid)
			require.False(t, at[0].Before(f.notBefore), "%s is in the stream at %v, and was rescheduled to %v", uuid, at[0], f.notBefore)
		}
		if f.missed != "" {
			missed := goxstreams.Delivery{ID: f.missed}.Time()
			require.False(t, at[0].After(missed), "%s is in the stream at %v, and was not found at %v already", uuid, at[0], missed)
		}
	}
	require.Equal(t, batches*size-cancelled, len(times))
	t.Logf("%d messages, %d operations: %d cancelled, %d rescheduled, %d too late; %d calls refused", len(fates), operations, cancelled, rescheduled, missed, refused)
	require.NotZero(t, cancelled)
	require.NotZero(t, rescheduled)
}

// fate is what must become of a message.
type fate struct {
	cancelled bool
	notBefore time.Time // what it was rescheduled to last
	missed    string    // the stream's last entry when it was first not found: it was in the stream by then
}

type racedTally struct {
	client                                              redis.UniversalClient
	topic                                               string
	fates                                               map[string]fate
	operations, missed, rescheduled, cancelled, refused int
}

// call calls until a Cluster does not refuse it for moving the topic's keys.
func (r *racedTally) call(f func() error) error {
	for {
		err := f()
		if err == nil || !strings.Contains(err.Error(), "TRYAGAIN") {
			return err
		}
		r.refused++
	}
}

// race publishes messages that are due within some milliseconds, a few of them later, and
// then cancels and reschedules them at random, while they are moved.
func (r *racedTally) race(ctx context.Context, pub message.Publisher, schedule *goxstreams.Schedule, prefix string, n int) error {
	var msgs []*message.Message
	for i := range n {
		d := time.Duration(rand.IntN(60)) * time.Millisecond
		if i%10 == 0 {
			d = time.Hour // which is not moved meanwhile, however slow the machine is
		}
		msgs = append(msgs, delayedBy(prefix+strconv.Itoa(i), d))
	}
	if err := r.call(func() error { return pub.Publish(r.topic, msgs...) }); err != nil {
		return err
	}
	for _, i := range rand.Perm(n) {
		uuid := msgs[i].UUID
		f := fate{}
		for step := 0; step < 3 && !f.cancelled; step++ {
			cancels := rand.IntN(3) == 0
			if step == 2 && i%10 == 0 {
				cancels = true // it would wait for an hour
			}
			at := time.Now().Add(time.Duration(rand.IntN(20)-5) * time.Millisecond)
			err := r.call(func() error {
				if cancels {
					return schedule.Cancel(ctx, uuid)
				}
				return schedule.Reschedule(ctx, uuid, at)
			})
			r.operations++
			var missing *goxstreams.NotFoundError
			switch {
			case errors.As(err, &missing):
				if !slices.Equal(missing.IDs, []string{uuid}) || missing.Topic != r.topic {
					return fmt.Errorf("%s is said to be missing: %w", uuid, err)
				}
				r.missed++
				if f.missed != "" {
					continue
				}
				last, err := r.client.XRevRangeN(ctx, r.topic, "+", "-", 1).Result()
				if err != nil || len(last) == 0 {
					return fmt.Errorf("%s is missing, and the stream has no entry: %w", uuid, err)
				}
				f.missed = last[0].ID
			case err != nil:
				return err
			case f.missed != "":
				return fmt.Errorf("%s was found after it had not been", uuid)
			case cancels:
				f.cancelled = true
				r.cancelled++
			default:
				f.notBefore = at
				r.rescheduled++
			}
		}
		r.fates[uuid] = f
	}
	return nil
}

// entryTimes returns when each message was added to the stream.
func entryTimes(t testing.TB, client redis.UniversalClient, topic string) map[string][]time.Time {
	t.Helper()
	times := make(map[string][]time.Time)
	for from := "-"; ; {
		entries, err := client.XRangeN(t.Context(), topic, from, "+", 1000).Result()
		require.NoError(t, err)
		for _, e := range entries {
			uuid := e.Values[goxstreams.UUIDHeaderKey].(string)
			times[uuid] = append(times[uuid], goxstreams.Delivery{ID: e.ID}.Time())
			from = "(" + e.ID
		}
		if len(entries) < 1000 {
			return times
		}
	}
}

// A message that is rescheduled to a time that is over comes at once, and one that is
// rescheduled to a later time does not come before.
func TestDelayed_Reschedule(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	publishedIn(t, client, topic, delayedBy("sooner", time.Hour), delayedBy("later", 2*time.Hour))
	schedule := newSchedule(t, client, topic)
	require.NoError(t, schedule.Reschedule(t.Context(), "sooner", time.Now().Add(-time.Hour)))
	at := time.Now().Add(3 * time.Hour)
	require.NoError(t, schedule.Reschedule(t.Context(), "later", at))
	messages := subscribe(t, newSubscriber(t, grouped(client)), topic)
	msg := next(t, messages)
	require.Equal(t, "sooner", msg.UUID)
	msg.Ack()
	all := delayedIn(t, schedule)
	require.Len(t, all, 1)
	require.Equal(t, "later", all[0].UUID)
	require.Equal(t, at.Add(time.Millisecond-1).UnixMilli(), all[0].Due.UnixMilli())
}

// All returns each message once, page by page, also where many are due at the same time,
// and while they are cancelled in the loop.
func TestDelayed_All(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	schedule := newSchedule(t, client, topic)
	at := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	var msgs []*message.Message
	for i := range 350 {
		msg := message.NewMessage(fmt.Sprintf("%03d", i), nil)
		msg.Metadata.Set(delay.DelayedUntilKey, at)
		msgs = append(msgs, msg)
	}
	publishedIn(t, client, topic, msgs...)
	for name, step := range map[string]int{"nothing is cancelled": 0, "some": 7, "the last of a page": 100, "all": 1} {
		if name == "all" {
			continue // at the end
		}
		t.Run(name, func(t *testing.T) { requireAll(t, schedule, uuids(msgs), step) })
		publishedIn(t, client, topic, msgs...)
	}
	requireContinues(t, schedule, uuids(msgs))
	publishedIn(t, client, topic, msgs...)
	requireAll(t, schedule, uuids(msgs), 1)
	require.Empty(t, delayedIn(t, schedule))
}

// requireContinues reads pages of 60, and cancels what it continues after.
func requireContinues(t *testing.T, schedule *goxstreams.Schedule, want []string) {
	t.Helper()
	var got []string
	for more, last := true, (goxstreams.DelayedMessage{}); more; {
		more = false
		for d, err := range schedule.After(t.Context(), last.Due, last.UUID) {
			require.NoError(t, err)
			got, last = append(got, d.UUID), d
			if more = len(got)%60 == 0; more {
				break
			}
		}
		if more {
			require.NoError(t, schedule.Cancel(t.Context(), last.UUID))
		}
	}
	require.Equal(t, want, got)
}

func requireAll(t *testing.T, schedule *goxstreams.Schedule, want []string, cancelEach int) {
	t.Helper()
	var got []string
	for d, err := range schedule.All(t.Context()) {
		require.NoError(t, err)
		got = append(got, d.UUID)
		if cancelEach > 0 && len(got)%cancelEach == 0 {
			require.NoError(t, schedule.Cancel(t.Context(), d.UUID))
		}
	}
	require.Equal(t, want, got)
}

// What a stream is trimmed to holds for what is moved too.
func TestDelayed_MaxLen(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, DefaultMaxLen: 100}, nil)
	require.NoError(t, err)
	var msgs []*message.Message
	for i := range 1000 {
		msgs = append(msgs, delayedBy(fmt.Sprint(i), 100*time.Millisecond))
	}
	require.NoError(t, pub.Publish(topic, msgs...))
	schedule := newSchedule(t, client, topic)
	eventually(t, func() bool { n, err := schedule.Count(t.Context()); return err == nil && n == 0 })
	require.Less(t, client.XLen(t.Context(), topic).Val(), int64(500))
}

// With Idempotence a UUID is stored once, whenever its message is due.
func TestDelayed_Idempotence(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic := newClient(t), topic(t)
	pub := newIdempotent(t, client, goxstreams.Idempotence{})
	msg := delayedBy("a", 50*time.Millisecond)
	for range 3 {
		require.NoError(t, pub.Publish(topic, msg))
		eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() == 1 })
		eventually(t, func() bool { n, err := newSchedule(t, client, topic).Count(t.Context()); return err == nil && n == 0 })
	}
	require.EqualValues(t, 1, client.XLen(t.Context(), topic).Val())
	require.ErrorContains(t, pub.Publish(topic, msg, message.NewMessage("", nil)), "UUID is empty")
}

// What somebody else has written among what waits: it is a malformed entry, or its loss is
// logged; what follows comes.
func TestDelayed_Damaged(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	due, delayed := topic+".due{"+topic+"}", topic+".delayed{"+topic+"}"
	publishedIn(t, client, topic, delayedBy("fine", 1500*time.Millisecond))
	for i, damaged := range []string{"", "x", "3:ab", "1:0", "1:00:1:a", "1:00:1:a3:b", "99999999999:a",
		"3:-100:1:a1:b", "3:1e30:1:a1:b", "4:0x100:1:a1:b", "20:100000000000000000000:1:a1:b", strings.Repeat("1:0", 8100),
	} {
		uuid := "damaged-" + strconv.Itoa(i)
		require.NoError(t, client.ZAdd(t.Context(), due, redis.Z{Score: 1, Member: uuid}).Err())
		require.NoError(t, client.HSet(t.Context(), delayed, uuid, damaged).Err())
	}
	require.NoError(t, client.ZAdd(t.Context(), due, redis.Z{Score: 2, Member: "without fields"}).Err())
	schedule := newSchedule(t, client, topic)
	n := 0
	for d, err := range schedule.All(t.Context()) {
		got, gotErr := schedule.Get(t.Context(), d.UUID)
		require.Equal(t, err, gotErr)
		require.Equal(t, []any{d.UUID, d.Due, d.Fields}, []any{got.UUID, got.Due, got.Fields})
		require.Equal(t, d.Message == nil, got.Message == nil)
		if d.UUID != "fine" {
			n++
		}
		if err != nil {
			require.ErrorContains(t, err, d.UUID)
		}
	}
	require.Equal(t, 13, n)
	_, err := schedule.Get(t.Context(), "none")
	var missing *goxstreams.NotFoundError
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"none"}, missing.IDs)

	log := newLogRecorder()
	config := grouped(client)
	broken := make(chan goxstreams.BrokenMessage, 100)
	config.OnBroken = func(_ context.Context, b goxstreams.BrokenMessage) error { broken <- b; return nil }
	messages := subscribe(t, newSubscriberLog(t, config, log), topic)
	msg := next(t, messages)
	require.Equal(t, "fine", msg.UUID)
	msg.Ack()
	for range 12 {
		b := <-broken
		require.Equal(t, "goxstreams_delayed", b.Fields[0])
	}
	eventually(t, func() bool {
		return slices.ContainsFunc(log.Errors(), func(line string) bool {
			return strings.Contains(line, "Delayed message lost") && strings.Contains(line, "without fields")
		})
	}, "%v", log.Errors())
	require.Empty(t, delayedIn(t, schedule))
}

// The components of Watermill that delay, on Redis alone: a Publisher that delays by
// default, and a message that fails and is requeued with a growing delay.
func TestDelayed_WatermillComponents(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	requeued := topic + ".requeued"
	pub := newPublisher(t, client)
	delaying, err := delay.NewPublisher(pub, delay.PublisherConfig{DefaultDelayGenerator: func(delay.DefaultDelayGeneratorParams) (delay.Delay, error) {
		return delay.For(300 * time.Millisecond), nil
	}})
	require.NoError(t, err)

	logger := watermill.NopLogger{}
	requeue, err := requeuer.NewRequeuer(requeuer.Config{
		Subscriber: newSubscriber(t, grouped(client)), SubscribeTopic: requeued, Publisher: pub,
		GeneratePublishTopic: func(p requeuer.GeneratePublishTopicParams) (string, error) {
			return p.Message.Metadata.Get(middleware.PoisonedTopicKey), nil
		},
	}, logger)
	require.NoError(t, err)
	go func() { _ = requeue.Run(t.Context()) }()
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	require.NoError(t, err)
	poison, err := middleware.PoisonQueue(pub, requeued)
	require.NoError(t, err)
	router.AddMiddleware(poison, (&middleware.DelayOnError{InitialInterval: 200 * time.Millisecond, MaxInterval: time.Second, Multiplier: 2}).Middleware)
	var mu sync.Mutex
	var at []time.Time
	router.AddConsumerHandler("h", topic, newSubscriber(t, grouped(client)), func(msg *message.Message) error {
		mu.Lock()
		defer mu.Unlock()
		if at = append(at, time.Now()); len(at) < 4 {
			return errors.New("not yet")
		}
		return nil
	})
	go func() { _ = router.Run(t.Context()) }()
	<-router.Running()
	began := time.Now()
	require.NoError(t, delaying.Publish(topic, message.NewMessage(watermill.NewUUID(), nil)))
	eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return len(at) == 4 })
	previous := began
	for i, want := range []time.Duration{300, 600, 1000, 1000} { // the first delay was 300 ms, and is doubled
		require.GreaterOrEqual(t, at[i].Sub(previous), want*time.Millisecond-time.Second, "delay %d", i)
		previous = at[i]
	}
	require.GreaterOrEqual(t, at[0].Sub(began), 300*time.Millisecond)
	require.GreaterOrEqual(t, at[3].Sub(began), 2*time.Second, "doubled each time")
}

// ProduceAt and ProduceIn.
func TestDelayed_Producer(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	producer := goxstreams.NewProducer[string](newPublisher(t, client), goxstreams.ProducerConfig{})
	at := time.Now().Add(90 * time.Minute)
	require.NoError(t, producer.ProduceAt(t.Context(), "at", topic, at))
	require.NoError(t, producer.ProduceIn(t.Context(), "in", topic, time.Hour))
	require.NoError(t, producer.ProduceAt(t.Context(), "past", topic, time.Now().Add(-time.Minute)))
	require.NoError(t, producer.ProduceIn(t.Context(), "now", topic, 0))
	require.ErrorContains(t, producer.ProduceAt(t.Context(), "never", topic, time.Time{}), "zero time")
	require.ErrorContains(t, producer.ProduceIn(t.Context(), "never", topic, -1), "negative")
	require.EqualValues(t, 2, client.XLen(t.Context(), topic).Val())
	all := delayedIn(t, newSchedule(t, client, topic))
	require.Len(t, all, 2)
	for i, want := range []string{"in", "at"} {
		var event string
		require.NoError(t, json.Unmarshal(all[i].Message.Payload, &event))
		require.Equal(t, want, event)
	}
	require.WithinDuration(t, at, all[1].Due, patience)
}

// TopicStats tells how many wait, and whether anybody moves them.
func TestDelayed_TopicStats(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, testGroup)
	for _, config := range []goxstreams.SubscriberConfig{grouped(client), {Client: client}} {
		sub := newSubscriber(t, config)
		st, err := sub.TopicStats(t.Context(), topic)
		require.NoError(t, err)
		require.Zero(t, st.Delayed)
		publishedIn(t, client, topic, delayedBy("a", time.Hour), delayedBy("b", 2*time.Hour))
		st, err = sub.TopicStats(t.Context(), topic)
		require.NoError(t, err)
		require.EqualValues(t, 2, st.Delayed)
		require.Zero(t, st.Overdue)
		require.NoError(t, newSchedule(t, client, topic).Reschedule(t.Context(), "b", time.Now().Add(-time.Minute)))
		st, err = sub.TopicStats(t.Context(), topic)
		require.NoError(t, err)
		require.InDelta(t, time.Minute, st.Overdue, float64(patience), "by this machine's clock")
		require.NoError(t, newSchedule(t, client, topic).Cancel(t.Context(), "a"))
		require.NoError(t, newSchedule(t, client, topic).Cancel(t.Context(), "b"))
	}
}
