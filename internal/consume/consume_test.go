package consume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

func TestMain(m *testing.M) { testserver.Main(m) }

const patience = 30 * time.Second

var errClosed = errors.New("closed")

// work is a Work made of functions.
type work struct {
	handle, broken func(*Task)
	key            func(*Task) string
}

func (w *work) Handle(tasks []Task)   { w.handle(&tasks[0]) }
func (w *work) CallBroken(t *Task)    { w.broken(t) }
func (w *work) MoveAgain(*Task) error { return nil }
func (w *work) Key(t *Task) string    { return w.key(t) }

type setup struct {
	*Subscription
	t      *testing.T
	client *redis.Client
	work   *work
	seen   chan delivery
}

// delivery is what a test checks of a Task.
type delivery struct {
	id    string
	count int64
}

// newSetup returns a subscription that is not started yet.
func newSetup(t *testing.T, change func(*Config)) *setup {
	t.Helper()
	testserver.RequireReal(t)
	s := &setup{t: t, client: testserver.Client(t), work: &work{}, seen: make(chan delivery, 100)}
	cfg := Config{
		Topic: fmt.Sprint(t.Name(), "-", watermill.NewShortUUID()), Group: "group", StartID: "0", MaxConcurrency: 1, BatchSize: 10, BlockTime: time.Second,
		ClaimMinIdle: time.Minute, ClaimInterval: 20 * time.Millisecond, CloseTimeout: 10 * time.Second, ConsumerTimeout: time.Minute,
		TakeAgain: time.Millisecond, LeaseLost: errors.New("lease lost"), Closed: errClosed, Log: watermill.NopLogger{},
	}
	if change != nil {
		change(&cfg)
	}
	cfg.DeadLetters = cfg.Topic + ".dead"
	s.Subscription = New(t.Context(), NewShared(redisx.Client{UniversalClient: s.client}, cfg), cfg, s.work)
	return s
}

// start starts it, with a Work that applies the steps to its Tasks, in order.
func (s *setup) start(steps ...func(*Task)) {
	s.t.Helper()
	s.work.handle = func(t *Task) {
		s.seen <- delivery{t.ID, t.Count()}
		step := s.Settle
		if len(steps) > 0 {
			step, steps = steps[0], steps[1:]
		}
		step(t)
	}
	require.NoError(s.t, s.Open())
	s.Start()
	s.t.Cleanup(s.end)
}

func (s *setup) end() {
	s.Close()
	select {
	case <-s.Done():
	case <-time.After(patience):
		assert.Fail(s.t, "the subscription does not end")
	}
}

func (s *setup) add(n int) (ids []string) {
	s.t.Helper()
	for range n {
		id, err := s.client.XAdd(s.t.Context(), &redis.XAddArgs{Stream: s.cfg.Topic, Values: []string{"a", "b"}}).Result()
		require.NoError(s.t, err)
		ids = append(ids, id)
	}
	return ids
}

func (s *setup) next() delivery {
	s.t.Helper()
	select {
	case d := <-s.seen:
		return d
	case <-time.After(patience):
		require.FailNow(s.t, "nothing is handled")
		return delivery{}
	}
}

func (s *setup) pending() []redis.XPendingExt {
	s.t.Helper()
	rows, err := s.client.XPendingExt(s.t.Context(), &redis.XPendingExtArgs{Stream: s.cfg.Topic, Group: "group", Start: "-", End: "+", Count: 100}).Result()
	require.NoError(s.t, err)
	return rows
}

// Each outcome, and the delivery that follows it.
func TestOutcomes(t *testing.T) {
	var s *setup
	for _, test := range []struct {
		name    string
		outcome func(*Task)
		again   int64 // the count of the next delivery; 0: no delivery
	}{
		{"Settle", func(t *Task) { s.Settle(t) }, 0},
		{"Again", func(t *Task) { s.Again(t, time.Millisecond) }, 2},
		{"Again, uncounted", func(t *Task) { t.Next = t.Count(); s.Again(t, time.Millisecond) }, 1},
		{"Again, aside", func(t *Task) { t.Stuck = true; s.Again(t, time.Millisecond) }, 2},
		{"GiveBack", func(t *Task) { s.GiveBack(t, t.Count()) }, 2},
		{"GiveBack, uncounted", func(t *Task) { s.GiveBack(t, t.Count()-1) }, 1},
		{"Broken", func(t *Task) { s.Broken(t, io.EOF) }, 0},
		{"MoveFailed", func(t *Task) { s.MoveFailed(t, 1, errors.New("refused")) }, 2},
		{"NotOurs", func(t *Task) { s.NotOurs(t) }, 2}, // it is ours: the group seems lost, and the entry is being restored
	} {
		t.Run(test.name, func(t *testing.T) {
			s = newSetup(t, nil)
			s.work.broken = func(t *Task) { s.Settle(t) }
			s.start(test.outcome)
			first := s.add(1)[0]
			require.Equal(t, delivery{first, 1}, s.next())
			if test.again > 0 {
				require.Equal(t, delivery{first, test.again}, s.next())
			}
			second := s.add(1)[0]
			require.Equal(t, delivery{second, 1}, s.next(), "and no other")
			require.Eventually(t, func() bool { return len(s.pending()) == 0 }, patience, time.Millisecond)
		})
	}
}

// With one slot, an entry that waits for its retry holds up its successors, unless
// it waits aside.
func TestOutcomes_Order(t *testing.T) {
	const delay = 50 * time.Millisecond
	for _, aside := range []bool{false, true} {
		t.Run(fmt.Sprint("aside ", aside), func(t *testing.T) {
			s := newSetup(t, nil)
			ids := s.addFirst(2)
			s.start(func(t *Task) { t.Stuck = aside; s.Again(t, delay) })
			order := []string{ids[0], ids[0], ids[1]}
			if aside {
				order[1], order[2] = ids[1], ids[0]
			}
			for _, id := range order {
				require.Equal(t, id, s.next().id)
			}
		})
	}
}

// Effects can be applied late, after those of a later change. A timer that was set by the
// later change must not be lost: a fan-out's retry waited until something else happened.
func TestApply_LateTimer(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.Group = "" })
	id := s.add(1)[0]
	waiting := make(chan struct{})
	s.start(func(t *Task) {
		s.Again(t, 100*time.Millisecond)
		close(waiting)
	})
	require.Equal(t, delivery{id, 1}, s.next())
	<-waiting
	s.apply(ledger.Effects{Timer: time.Now()})
	require.Equal(t, delivery{id, 2}, s.next())
}

// A retry that is due before the one for which the timer was set is not late.
func TestApply_EarlierTimer(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.Group, c.MaxConcurrency = "", 2 })
	ids := s.add(2)
	s.work.handle = func(t *Task) {
		s.seen <- delivery{t.ID, t.Count()}
		switch {
		case t.ID == ids[0]:
			s.Again(t, time.Hour)
		case t.Count() == 1:
			s.Again(t, 50*time.Millisecond)
		default:
			s.Settle(t)
		}
	}
	require.NoError(t, s.Open())
	s.Start()
	t.Cleanup(s.end)
	seen := []delivery{s.next(), s.next(), s.next()}
	require.Contains(t, seen, delivery{ids[1], 2})
}

// addFirst adds entries before the subscription is started.
func (s *setup) addFirst(n int) []string {
	s.t.Helper()
	err := s.stream.CreateGroup(s.t.Context(), "0", time.Minute)
	require.NoError(s.t, err)
	return s.add(n)
}

// A CallBroken that hangs occupies no slot; its entry is renewed and gets no second
// call.
func TestBroken_HasNoSlot(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.ClaimMinIdle = 300 * time.Millisecond })
	calls, hang := make(chan string, 10), make(chan struct{})
	s.work.broken = func(t *Task) {
		calls <- t.ID
		<-hang
		s.Settle(t)
	}
	ids := s.addFirst(2)
	s.start(func(t *Task) { s.Broken(t, io.EOF) })
	require.Equal(t, ids[0], s.next().id)
	require.Equal(t, ids[1], s.next().id)
	require.Equal(t, ids[0], <-calls)
	require.Eventually(t, func() bool { // only a renewal resets its idle time
		rows := s.pending()
		return len(rows) == 1 && rows[0].ID == ids[0] && rows[0].Idle < 100*time.Millisecond && len(calls) == 0
	}, patience, time.Millisecond)
	close(hang)
	require.Eventually(t, func() bool { return len(s.pending()) == 0 }, patience, time.Millisecond)
	require.Empty(t, calls)
}

// A message that nobody received is released, uncounted, when the subscription
// closes.
func TestHandOver_Withdrawn(t *testing.T) {
	for _, noAck := range []bool{false, true} {
		t.Run(fmt.Sprint("NoAck ", noAck), func(t *testing.T) {
			s := newSetup(t, func(c *Config) { c.NoAck, c.CloseTimeout = noAck, 200*time.Millisecond })
			id := s.addFirst(1)[0]
			taken := make(chan bool, 1)
			s.start(func(t *Task) {
				taken <- HandOver(context.Background(), s.Subscription, t, make(chan string), "message")
			})
			s.next()
			s.end()
			require.False(t, <-taken)
			if noAck {
				require.Empty(t, s.pending())
				require.EqualValues(t, 1, s.Stats().Lost)
				return
			}
			rows := s.pending()
			require.Len(t, rows, 1)
			require.Equal(t, redis.XPendingExt{ID: id, Consumer: "released", Idle: rows[0].Idle, RetryCount: 0}, rows[0])
			require.EqualValues(t, 1, s.Stats().Released)
		})
	}
}

// A later delivery that nobody received is released as if it had not happened, and the
// earlier ones count.
func TestHandOver_WithdrawnLater(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.CloseTimeout = 200 * time.Millisecond })
	id := s.addFirst(1)[0]
	again := func(t *Task) { s.Again(t, time.Millisecond) }
	s.start(again, again, func(t *Task) {
		HandOver(context.Background(), s.Subscription, t, make(chan string), "message")
	})
	for count := range 3 {
		require.Equal(t, delivery{id, int64(count + 1)}, s.next())
	}
	s.end()
	rows := s.pending()
	require.Len(t, rows, 1)
	require.EqualValues(t, 2, rows[0].RetryCount)
}

// A message that was received does not keep its entry's fields in memory; the next delivery
// has them again.
func TestHandOver_DropsFields(t *testing.T) {
	s := newSetup(t, nil)
	fields := make(chan []string, 3)
	first := func(t *Task) {
		fields <- t.Fields
		HandOver(context.Background(), s.Subscription, t, make(chan string, 1), "message")
		fields <- t.Fields
		s.Again(t, time.Millisecond)
	}
	s.addFirst(1)
	s.start(first, func(t *Task) { fields <- t.Fields; s.Settle(t) })
	require.Equal(t, []string{"a", "b"}, <-fields)
	require.Nil(t, <-fields)
	require.Equal(t, []string{"a", "b"}, <-fields)
}

// What a dead consumer left is delivered with a count that says so, once, also if the answer
// to the command that claimed it was lost.
func TestClaim(t *testing.T) {
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprint("answer lost ", lost), func(t *testing.T) {
			s := newSetup(t, func(c *Config) { c.ClaimMinIdle = 300 * time.Millisecond })
			var claims atomic.Int64
			s.shared.client.UniversalClient.(*redis.Client).AddHook(unanswered{func(cmd redis.Cmder) bool {
				return lost && isTake(cmd) && claims.Add(1) == 1
			}})
			id := s.addFirst(1)[0]
			require.NoError(t, s.client.XReadGroup(t.Context(), &redis.XReadGroupArgs{
				Group: "group", Consumer: "dead", Streams: []string{s.cfg.Topic, ">"},
			}).Err())
			s.start()
			require.Equal(t, delivery{id, 2}, s.next())
			require.Eventually(t, func() bool { return len(s.pending()) == 0 }, patience, time.Millisecond)
			require.Empty(t, s.seen)
		})
	}
}

func isTake(cmd redis.Cmder) bool {
	return cmd.Name() == "eval" && strings.HasPrefix(fmt.Sprint(cmd.Args()[1]), "-- take")
}

// unanswered makes selected commands run, and loses their answers.
type unanswered struct{ loses func(redis.Cmder) bool }

func (unanswered) DialHook(next redis.DialHook) redis.DialHook { return next }
func (u unanswered) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if u.loses(cmd) {
			err = io.ErrUnexpectedEOF
			cmd.SetErr(err)
		}
		return err
	}
}
func (u unanswered) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		err := next(ctx, cmds)
		for _, cmd := range cmds {
			if u.loses(cmd) {
				for _, cmd := range cmds {
					cmd.SetErr(io.ErrUnexpectedEOF)
				}
				return io.ErrUnexpectedEOF
			}
		}
		return err
	}
}

// With DeleteAcked an entry leaves the stream when it is acked. (xstream's tests delete by
// XACKDEL and without.)
func TestDeleteAcked(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.DeleteAcked, c.Retention = true, &xstream.Retention{} })
	s.start()
	s.add(2)
	s.next()
	s.next()
	require.Eventually(t, func() bool { return s.client.XLen(t.Context(), s.cfg.Topic).Val() == 0 }, patience, time.Millisecond)
	require.Empty(t, s.pending())
}

// denying makes selected commands fail as if the permission for them were missing.
type denying struct{ denies func(redis.Cmder) bool }

func (denying) DialHook(next redis.DialHook) redis.DialHook { return next }
func (d denying) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if d.denies(cmd) {
			err := redisx.ReplyError("NOPERM User default has no permissions to run this command")
			cmd.SetErr(err)
			return err
		}
		return next(ctx, cmd)
	}
}
func (d denying) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		for _, cmd := range cmds {
			if d.denies(cmd) {
				err := redisx.ReplyError("NOPERM User default has no permissions to run this command")
				for _, cmd := range cmds {
					cmd.SetErr(err)
				}
				return err
			}
		}
		return next(ctx, cmds)
	}
}

// A fan-out from the end of the stream must know where that is. One from an ID needs no
// permission to ask.
func TestFanOut_Denied(t *testing.T) {
	for start, opens := range map[string]bool{"0": true, "$": false} {
		t.Run(start, func(t *testing.T) {
			s := newSetup(t, func(c *Config) { c.Group, c.StartID = "", start })
			s.add(1)
			s.shared.client.UniversalClient.(*redis.Client).AddHook(denying{func(cmd redis.Cmder) bool {
				return cmd.Name() == "xinfo" || cmd.Name() == "eval"
			}})
			err := s.Open()
			require.Equal(t, opens, err == nil, "%v", err)
			if !opens {
				require.ErrorContains(t, err, "NOPERM")
			}
		})
	}
}

// An outage is logged once, however many duties fail, and so is its end; what fails because
// the subscription closes is no outage.
func TestHealth_LoggedOnce(t *testing.T) {
	log := watermill.NewCaptureLogger()
	s := newSetup(t, func(c *Config) { c.Log = log })
	count := func(level watermill.LogLevel) int { return len(log.Captured()[level]) }
	for range 2 {
		errorsBefore, infosBefore := count(watermill.ErrorLogLevel), count(watermill.InfoLogLevel)
		s.markFailed(dutyRead, io.EOF)
		s.markFailed(dutyAck, io.EOF)
		s.markFailed(dutyRead, io.EOF)
		s.markHealthy(dutyRead)
		require.Equal(t, errorsBefore+1, count(watermill.ErrorLogLevel))
		require.Equal(t, infosBefore, count(watermill.InfoLogLevel))
		s.markHealthy(dutyAck)
		s.markHealthy(dutyAck)
		require.Equal(t, infosBefore+1, count(watermill.InfoLogLevel))
	}
	s.Close()
	before := count(watermill.ErrorLogLevel)
	s.markFailed(dutyRead, io.EOF)
	require.Equal(t, before, count(watermill.ErrorLogLevel))
}

// A delayed message whose fields somebody has deleted is logged.
func TestDelayed_LostIsLogged(t *testing.T) {
	log := watermill.NewCaptureLogger()
	s := newSetup(t, func(c *Config) { c.Log = log })
	require.NoError(t, s.client.ZAdd(t.Context(), xstream.DueKey(s.cfg.Topic), redis.Z{Score: 1, Member: "the-uuid"}).Err())
	s.start()
	require.Eventually(t, func() bool {
		for _, m := range log.Captured()[watermill.ErrorLogLevel] {
			if m.Fields["message_uuid"] == "the-uuid" {
				return true
			}
		}
		return false
	}, patience, time.Millisecond)
}

// The next look for delayed messages is when the next one is due, at once if one is already;
// but who finds nothing pauses, and nobody waits for longer than usual.
func TestUntilDue(t *testing.T) {
	const regular = time.Second
	for _, test := range []struct {
		moved       xstream.MoveResult
		least, most time.Duration
	}{
		{xstream.MoveResult{Count: 3, Next: -1}, regular, regular},
		{xstream.MoveResult{Count: 3, Next: 0}, 0, 0},
		{xstream.MoveResult{Count: 1, Next: time.Millisecond}, time.Millisecond, time.Millisecond},
		{xstream.MoveResult{Count: 3, Next: time.Hour}, regular, regular},
		{xstream.MoveResult{Count: 0, Next: -1}, regular, regular},
		{xstream.MoveResult{Count: 0, Next: 0}, delayedPause / 2, delayedPause * 3 / 2},
		{xstream.MoveResult{Count: 0, Next: 100 * time.Millisecond}, 100 * time.Millisecond, 100 * time.Millisecond},
	} {
		wait := untilDue(test.moved, regular)
		require.GreaterOrEqual(t, wait, test.least, "%+v", test.moved)
		require.LessOrEqual(t, wait, test.most, "%+v", test.moved)
	}
}

// Less is read ahead for slow handlers, more for fast ones that handle all they are given. A
// fast topic that shares its connection reads at least two.
func TestPrefetch(t *testing.T) {
	const fast, slow = -time.Hour, time.Hour
	for _, test := range []struct {
		name               string
		took               time.Duration
		asked, got, before int
		want               int
	}{
		{"Fast", fast, 4, 4, 4, 8},
		{"FastFromNothing", fast, 0, 0, 0, 1},
		{"FastUpToTheBatch", fast, 9, 9, 9, 10},
		{"FastButNotFull", fast, 4, 3, 4, 4},
		{"FastShared", fast, 0, 1, 0, sharedPrefetch},
		{"FastSharedMore", fast, 0, 1, 5, 5},
		{"FastOneAskedFor", fast, 1, 0, 0, 0},
		{"Slow", slow, 8, 8, 8, 4},
		{"SlowShared", slow, 0, 1, 1, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newSetup(t, nil)
			r := s.reader
			r.prefetch, r.asked, r.got, r.last = test.before, test.asked, test.got, time.Now().Add(-test.took)
			require.Equal(t, test.want, r.adapted())
			r.prefetch = 3
			require.Equal(t, 3, r.adapted(), "nothing was read since")
		})
	}
}

// Names in the group are unique, and say whose they are.
func TestConsumerName(t *testing.T) {
	host, err := os.Hostname()
	require.NoError(t, err)
	for prefix, want := range map[string]string{"pod-1": "pod-1-", "": host + "-"} {
		name := consumerName(prefix)
		require.True(t, strings.HasPrefix(name, want), name)
		require.Greater(t, len(name), len(want))
		require.NotEqual(t, name, consumerName(prefix))
	}
}

// A user's function that hangs delays the drain until CloseTimeout; its entry stays
// pending for this consumer, and its slot ends when the function returns.
func TestCall_Hangs(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.CloseTimeout = 200 * time.Millisecond })
	id := s.addFirst(1)[0]
	hang, returned := make(chan struct{}), make(chan struct{})
	s.start(func(t *Task) {
		defer close(returned)
		t.Call(func() { <-hang })
		assert.Fail(s.t, "the slot goes on after the end")
	})
	s.next()
	s.end()
	rows := s.pending()
	require.Len(t, rows, 1)
	require.Equal(t, id, rows[0].ID)
	require.Equal(t, s.Consumer(), rows[0].Consumer)
	close(hang)
	<-returned
}

// A user's function that calls runtime.Goexit has failed.
func TestCall_Goexit(t *testing.T) {
	s := newSetup(t, nil)
	id := s.addFirst(1)[0]
	s.start(func(t *Task) { t.Call(runtime.Goexit) })
	require.Equal(t, delivery{id, 1}, s.next())
	require.Equal(t, delivery{id, 2}, s.next())
}

// A fan-out counts by itself, and nothing is pending in Redis.
func TestFanOut(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.Group = "" })
	s.start(func(t *Task) { s.Again(t, time.Millisecond) })
	id := s.add(1)[0]
	require.Equal(t, delivery{id, 1}, s.next())
	require.Equal(t, delivery{id, 2}, s.next())
	require.False(t, s.KeepsDead())
	groups, err := s.client.XInfoGroups(t.Context(), s.cfg.Topic).Result()
	require.NoError(t, err)
	require.Empty(t, groups)
}

// The end of Subscribe's context starts the drain, and IsClosing reports it at
// once.
func TestOpen_Closed(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.WaitForRedis = time.Hour })
	s.shared.client.UniversalClient.(*redis.Client).AddHook(refused{})
	opened := make(chan error, 1)
	go func() { opened <- s.Open() }()
	require.Eventually(t, func() bool { return s.Stats().Err != nil }, patience, time.Millisecond, "it does not wait for Redis")
	s.Close()
	require.ErrorIs(t, <-opened, errClosed)
	require.True(t, s.IsClosing())
}

// refused is an unreachable server.
type refused struct{}

func (refused) DialHook(next redis.DialHook) redis.DialHook { return next }
func (refused) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(_ context.Context, cmd redis.Cmder) error { return fail(cmd) }
}
func (refused) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(_ context.Context, cmds []redis.Cmder) (err error) {
		for _, cmd := range cmds {
			err = fail(cmd)
		}
		return err
	}
}

func fail(cmd redis.Cmder) error {
	err := redisx.ReplyError("LOADING Redis is loading the dataset in memory")
	cmd.SetErr(err)
	return err
}

// A retry that could not be taken while Redis was unavailable, and was settled
// elsewhere meanwhile: nobody tries to take it again, and the outage is over.
func TestHealth_ClaimSettledElsewhere(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.ClaimMinIdle = 300 * time.Millisecond })
	var away atomic.Bool
	s.shared.client.UniversalClient.(*redis.Client).AddHook(failing{func(cmd redis.Cmder) bool {
		return away.Load() && cmd.Name() == "eval" && strings.HasPrefix(fmt.Sprint(cmd.Args()[1]), "-- take")
	}})
	id := s.addFirst(1)[0]
	s.start(func(task *Task) {
		away.Store(true)
		s.Again(task, time.Millisecond)
	})
	s.next()
	require.Eventually(t, func() bool { return s.Stats().Err != nil }, patience, time.Millisecond)
	require.NoError(t, s.client.XAck(t.Context(), s.cfg.Topic, "group", id).Err())
	require.Eventually(t, func() bool { return s.Stats().Err == nil && s.Stats().InFlight == 0 }, patience, time.Millisecond)
}

// What was read with a lost answer, and cannot be fetched at once, still comes before its
// successors.
func TestKey_FetchedLate(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.Keyed, c.MaxConcurrency, c.TakeAgain = true, 2, 300*time.Millisecond })
	var failed atomic.Int64
	s.shared.client.UniversalClient.(*redis.Client).AddHook(failing{func(cmd redis.Cmder) bool {
		return cmd.Name() == "eval" && strings.HasPrefix(fmt.Sprint(cmd.Args()[1]), "-- take") && failed.Add(1) <= 2
	}})
	s.work.handle = func(t *Task) { s.seen <- delivery{t.ID, t.Count()}; s.Settle(t) }
	s.work.key = func(*Task) string { return "a" }
	ids := s.addFirst(2)
	require.NoError(t, s.Open())
	require.NoError(t, s.client.XReadGroup(t.Context(), &redis.XReadGroupArgs{
		Group: "group", Consumer: s.stream.Consumer, Streams: []string{s.cfg.Topic, ">"}, Count: 1,
	}).Err())
	s.reader.Orphans([]xstream.Pending{{ID: ids[0], Count: 1}})
	s.Start()
	t.Cleanup(s.end)
	require.Equal(t, delivery{ids[0], 1}, s.next())
	require.Equal(t, delivery{ids[1], 1}, s.next())
}

// What was given up stays pending for us, and is no orphan, until it is pending no longer.
func TestReader_OrphansGivenUp(t *testing.T) {
	s := newSetup(t, nil)
	s.work.handle = func(t *Task) { s.seen <- delivery{t.ID, t.Count()}; s.Settle(t) }
	ids := s.addFirst(3)
	require.NoError(t, s.Open())
	require.NoError(t, s.client.XReadGroup(t.Context(), &redis.XReadGroupArgs{
		Group: "group", Consumer: s.stream.Consumer, Streams: []string{s.cfg.Topic, ">"}, Count: 3,
	}).Err())
	s.reader.disowned.Store(ids[0], nil)
	pending := func(ids ...string) (rows []xstream.Pending) {
		for _, id := range ids {
			rows = append(rows, xstream.Pending{ID: id, Count: 1})
		}
		return rows
	}
	s.reader.Orphans(pending(ids[0], ids[1]))
	s.reader.Orphans(pending(ids[0], ids[2]))
	s.Start()
	t.Cleanup(s.end)
	require.Equal(t, delivery{ids[1], 1}, s.next())
	require.Equal(t, delivery{ids[2], 1}, s.next())
	s.reader.Orphans(pending())
	s.reader.Orphans(pending(ids[0]))
	require.Equal(t, delivery{ids[0], 1}, s.next())
}

// failing makes selected commands fail.
type failing struct{ fails func(redis.Cmder) bool }

func (failing) DialHook(next redis.DialHook) redis.DialHook { return next }
func (f failing) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if f.fails(cmd) {
			cmd.SetErr(io.ErrUnexpectedEOF)
			return io.ErrUnexpectedEOF
		}
		return next(ctx, cmd)
	}
}
func (f failing) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		for _, cmd := range cmds {
			if f.fails(cmd) {
				for _, cmd := range cmds {
					cmd.SetErr(io.ErrUnexpectedEOF)
				}
				return io.ErrUnexpectedEOF
			}
		}
		return next(ctx, cmds)
	}
}
