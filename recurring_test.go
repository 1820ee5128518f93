package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// atEach is a Recurring whose messages have their occurrences as payloads.
func atEach(topic string, every time.Duration) goxstreams.Recurring {
	return goxstreams.Recurring{Name: "tick", Topic: topic, Schedule: goxstreams.Every(every), Message: func(at time.Time) (*message.Message, error) {
		return message.NewMessage(watermill.NewUUID(), []byte(fmt.Sprint(at.UnixMilli()))), nil
	}}
}

// recur runs it in a process of its own, as far as Redis can tell, until stop.
func recur(t testing.TB, r goxstreams.Recurring, logger watermill.LoggerAdapter) (stop func()) {
	t.Helper()
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: newClient(t)}, logger)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := pub.Recur(ctx, r); err != nil {
			t.Error(err)
		}
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

// occurrences are those that were published, in the order of the stream.
func occurrences(t testing.TB, client redis.UniversalClient, topic string) (all []int64) {
	t.Helper()
	entries, err := client.XRange(t.Context(), topic, "-", "+").Result()
	require.NoError(t, err)
	for _, e := range entries {
		var at int64
		_, err := fmt.Sscan(e.Values["payload"].(string), &at)
		require.NoError(t, err)
		published, _, _ := strings.Cut(e.ID, "-")
		require.GreaterOrEqual(t, published, fmt.Sprint(at), "before its time")
		all = append(all, at)
	}
	return all
}

// Several processes publish each occurrence once, in order and without a gap, while some
// of them end and others begin.
func TestRecurring_Once(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	const every = 50 * time.Millisecond
	recur(t, atEach(topic, every), nil) // this one goes on
	for range 10 {
		stops := []func(){recur(t, atEach(topic, every), nil), recur(t, atEach(topic, every), nil)}
		n := len(occurrences(t, client, topic))
		eventually(t, func() bool { return len(occurrences(t, client, topic)) > n+1 })
		for _, stop := range stops {
			stop()
		}
	}
	all := occurrences(t, client, topic)
	require.GreaterOrEqual(t, len(all), 20)
	for i := range all[1:] {
		require.Equal(t, every.Milliseconds(), all[i+1]-all[i], "after occurrence %d", i)
	}
}

// What was missed while no process ran comes once, or not.
func TestRecurring_Missed(t *testing.T) {
	t.Parallel()
	for name, skip := range map[string]bool{"comes once": false, "is skipped": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			hour := time.Hour.Milliseconds()
			now := serverTime(t, client).UnixMilli()
			if now%hour > hour-2*patience.Milliseconds() {
				t.Skip("the next occurrence would come during the test")
			}
			last := now/hour*hour - 5*hour
			require.NoError(t, client.HSet(t.Context(), topic+".recurring{"+topic+"}", "tick", last).Err())
			r := atEach(topic, time.Hour)
			r.SkipMissed = skip
			stop := recur(t, r, nil)
			if skip { // it is two seconds before it is known that no other process is late
				during(t, 3*time.Second, func() bool { return client.XLen(t.Context(), topic).Val() == 0 })
				return
			}
			eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() == 1 })
			stop()
			recur(t, r, nil)
			during(t, 300*time.Millisecond, func() bool { return client.XLen(t.Context(), topic).Val() == 1 })
			require.Equal(t, []int64{now / hour * hour}, occurrences(t, client, topic), "the last one of them")
		})
	}
}

// A process that starts while another one is late leaves nothing out: what seems to be
// missed is that one's to publish, or comes one by one.
func TestRecurring_AnotherIsLate(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	const every = 100
	publishAs := func(at int64) {
		t.Helper()
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []any{goxstreams.UUIDHeaderKey, at, "payload", at}}).Err())
		require.NoError(t, client.HSet(t.Context(), topic+".recurring{"+topic+"}", "tick", at).Err())
	}
	first := serverTime(t, client).UnixMilli()/every*every - 10*every
	publishAs(first)
	recur(t, atEach(topic, every*time.Millisecond), nil)
	during(t, 500*time.Millisecond, func() bool { return client.XLen(t.Context(), topic).Val() == 1 }, "it takes what is late for missed")
	publishAs(first + every)
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() > 20 })
	for i, at := range occurrences(t, client, topic) {
		require.Equal(t, first+int64(i)*every, at)
	}
}

// While Redis does not answer nothing is published, and then nothing is missing.
func TestRecurring_Outage(t *testing.T) {
	t.Parallel()
	var away atomic.Bool
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: newClient(t, &hook{process: func(_ context.Context, _ redis.Cmder, next func() error) error {
		if away.Load() {
			return errors.New("no route to host")
		}
		return next()
	}})}, nil)
	require.NoError(t, err)
	client, topic := newClient(t), topic(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- pub.Recur(ctx, atEach(topic, 100*time.Millisecond)) }()
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() > 1 })
	away.Store(true)
	during(t, 500*time.Millisecond, func() bool { return true })
	n := client.XLen(t.Context(), topic).Val()
	away.Store(false)
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() > n+5 })
	cancel()
	require.NoError(t, <-done)
	all := occurrences(t, client, topic)
	for i := range all[1:] {
		require.EqualValues(t, 100, all[i+1]-all[i])
	}
}

// However long the way to the server is, Message is not called before its occurrence, and
// once for each; again only if the server did not answer, or its clock was set.
func TestRecurring_NotEarly(t *testing.T) {
	t.Parallel()
	began := time.Now()
	var failed atomic.Int64 // commands, on a busy machine
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: newClient(t, &hook{process: func(_ context.Context, _ redis.Cmder, next func() error) error {
		time.Sleep(30 * time.Millisecond) // the way to the server
		err := next()
		if err != nil {
			failed.Add(1)
		}
		return err
	}})}, nil)
	require.NoError(t, err)
	client, topic := newClient(t), topic(t)
	r := atEach(topic, 200*time.Millisecond)
	fine, calls, occurrences := r.Message, int64(0), map[int64]bool{}
	r.Message = func(at time.Time) (*message.Message, error) {
		if now := time.Now(); now.Before(at) {
			t.Errorf("called at %v for %v", now, at)
		}
		calls++
		occurrences[at.UnixMilli()] = true
		return fine(at)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- pub.Recur(ctx, r) }()
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() > 3 })
	unanswered := failed.Load() // before a command is canceled
	cancel()
	require.NoError(t, <-done)
	now := time.Now()
	if set := now.Round(0).Sub(began.Round(0)) - now.Sub(began); set.Abs() < time.Millisecond { // else the machine's clock, which is the server's, was set
		require.LessOrEqual(t, calls, int64(len(occurrences))+unanswered)
	}
}

// A Message that fails, or panics, is logged and called again; others may publish the
// occurrence meanwhile.
func TestRecurring_MessageFails(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	log := newLogRecorder()
	r := atEach(topic, 100*time.Millisecond)
	fine := r.Message
	calls := 0
	r.Message = func(at time.Time) (*message.Message, error) {
		switch calls++; calls {
		case 1:
			return nil, errors.New("no data yet")
		case 2:
			panic("nil map")
		case 3:
			return nil, nil
		}
		return fine(at)
	}
	recur(t, r, log)
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() > 3 })
	require.True(t, slices.ContainsFunc(log.Errors(), func(line string) bool { return strings.Contains(line, "no data yet") }), "%v", log.Errors())
	all := occurrences(t, client, topic)
	for i := range all[1:] {
		require.EqualValues(t, 100, all[i+1]-all[i])
	}
}

// panicky is a schedule that panics the first time.
type panicky struct {
	every time.Duration
	once  *sync.Once
}

func (p panicky) Next(t time.Time) time.Time {
	p.once.Do(func() { panic("no time zones") })
	return inclusive(p.every).Next(t.Add(1))
}

// A Schedule that panics ended the process.
func TestRecurring_SchedulePanics(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	log := newLogRecorder()
	r := atEach(topic, 100*time.Millisecond)
	r.Schedule = panicky{100 * time.Millisecond, new(sync.Once)}
	recur(t, r, log)
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() > 3 })
	require.Len(t, logLinesWith(log.Errors(), "no time zones"), 1, "%v", log.Errors())
}

// inclusive is a schedule whose Next returns the time itself at an occurrence.
type inclusive time.Duration

func (i inclusive) Next(t time.Time) time.Time {
	return t.Add(time.Duration(i) - 1).Truncate(time.Duration(i))
}

// A Schedule whose Next returns the time that it was given: the first occurrence was published,
// and then none, without a word.
func TestRecurring_InclusiveSchedule(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	log := newLogRecorder()
	r := atEach(topic, 100*time.Millisecond)
	r.Schedule = inclusive(100 * time.Millisecond)
	stop := recur(t, r, log)
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() > 3 })
	stop()
	all := occurrences(t, client, topic)
	for i := range all[1:] {
		require.EqualValues(t, 100, all[i+1]-all[i])
	}
	require.Len(t, logLinesWith(log.Errors(), "Schedule.Next(t) returned a time that is not after t"), 1, "%v", log.Errors())
}

// The server's clock was a day ahead when the last occurrence was published, and was set back.
// Nobody learned why nothing was published.
func TestRecurring_LastInTheFuture(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	state := topic + ".recurring{" + topic + "}"
	require.NoError(t, client.HSet(t.Context(), state, "tick", serverTime(t, client).Add(24*time.Hour).UnixMilli()).Err())
	log, r := newLogRecorder(), atEach(topic, 100*time.Millisecond)
	stop := recur(t, r, log)
	eventually(t, func() bool { return len(logLinesWith(log.Errors(), "lies in the future")) == 1 })
	stop()
	require.Zero(t, client.XLen(t.Context(), topic).Val())
	// What docs/delayed.md says to do.
	require.NoError(t, client.HDel(t.Context(), state, "tick").Err())
	log = newLogRecorder()
	recur(t, r, log)
	eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() > 1 })
	require.Empty(t, log.Errors())
}

// A Schedule that has an end, and bad input.
func TestRecurring_Config(t *testing.T) {
	t.Parallel()
	pub := newPublisher(t, newClient(t))
	topic := topic(t)
	err := pub.Recur(t.Context(), goxstreams.Recurring{}, atEach(topic, 0), atEach(topic, time.Hour))
	for _, want := range []string{
		"Recurring.Name: is required", "Recurring.Topic: is required", "Recurring.Schedule: is required", "Recurring.Message: is required",
		"Recurring.Schedule: Every(0s) is not positive", `Recurring.Name: "tick" is there twice for topic`,
	} {
		require.ErrorContains(t, err, want)
	}
	require.NoError(t, pub.Recur(t.Context()))

	next := goxstreams.Every(time.Hour).Next(time.Date(2026, 11, 28, 15, 0, 0, 0, time.UTC))
	require.True(t, next.Equal(time.Date(2026, 11, 28, 16, 0, 0, 0, time.UTC)), "%v", next)
	require.Equal(t, time.UnixMilli(2), goxstreams.Every(1).Next(time.UnixMilli(1)))
}
