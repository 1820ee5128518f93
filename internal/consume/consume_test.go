package consume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestMain(m *testing.M) { testserver.Main(m) }

const patience = 30 * time.Second

var errClosed = errors.New("closed")

// work is a Work made of functions.
type work struct {
	handle, broken func(*Task)
}

func (w *work) Handle(t *Task)     { w.handle(t) }
func (w *work) CallBroken(t *Task) { w.broken(t) }

type setup struct {
	*Subscription
	t      *testing.T
	client *redis.Client
	work   *work
	seen   chan delivery
}

// delivery is what a test wants to know of a Task.
type delivery struct {
	id    string
	count int64
}

// newSetup makes a subscription that is not started yet.
func newSetup(t *testing.T, change func(*Config)) *setup {
	t.Helper()
	testserver.RequireReal(t)
	s := &setup{t: t, client: testserver.Client(t), work: &work{}, seen: make(chan delivery, 100)}
	cfg := Config{
		Topic: fmt.Sprint(t.Name(), "-", watermill.NewShortUUID()), Group: "group", StartID: "0", MaxConcurrency: 1, BatchSize: 10,
		ClaimMinIdle: time.Minute, ClaimInterval: 20 * time.Millisecond, CloseTimeout: 10 * time.Second, ConsumerTimeout: time.Minute,
		TakeAgain: time.Millisecond, LeaseLost: errors.New("lease lost"), Closed: errClosed, Log: watermill.NopLogger{},
	}
	if change != nil {
		change(&cfg)
	}
	cfg.DeadLetters = cfg.Topic + ".dead"
	shared := NewShared(SharedConfig{
		Client: redisx.Client{UniversalClient: s.client}, Group: cfg.Group, NoAck: cfg.NoAck, BlockTime: time.Second,
		BatchSize: cfg.BatchSize, ClaimInterval: cfg.ClaimInterval, Log: watermill.NopLogger{},
	})
	s.Subscription = New(t.Context(), shared, cfg, s.work)
	return s
}

// start starts it, with a Work that does these things with a Task, one after the other.
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
	require.NoError(s.t, s.Open(s.t.Context()))
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

// Each outcome, and the delivery that follows from it.
func TestOutcomes(t *testing.T) {
	var s *setup
	for _, test := range []struct {
		name    string
		outcome func(*Task)
		again   int64 // the count of the next delivery; 0: there is none
	}{
		{"Settle", func(t *Task) { s.Settle(t) }, 0},
		{"Again", func(t *Task) { s.Again(t, time.Millisecond) }, 2},
		{"Again, uncounted", func(t *Task) { t.Next = t.Count(); s.Again(t, time.Millisecond) }, 1},
		{"Aside", func(t *Task) { s.Aside(t, time.Millisecond) }, 2},
		{"GiveBack", func(t *Task) { s.GiveBack(t, t.Count()) }, 2},
		{"GiveBack, uncounted", func(t *Task) { s.GiveBack(t, t.Count()-1) }, 1},
		{"Broken", func(t *Task) { s.Broken(t) }, 0},
		{"MoveFailed", func(t *Task) { s.MoveFailed(t, 1, errors.New("refused")) }, 2},
		{"NotOurs", func(t *Task) { s.NotOurs(t) }, 2}, // it is ours: the group was lost, it seems, and it is put back
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

// What waits for its retry holds up the order of one slot, unless it waits aside.
func TestOutcomes_Order(t *testing.T) {
	const delay = 50 * time.Millisecond
	for _, aside := range []bool{false, true} {
		t.Run(fmt.Sprint("aside ", aside), func(t *testing.T) {
			s := newSetup(t, nil)
			ids := s.addFirst(2)
			s.start(func(t *Task) { s.schedule(t, aside, delay) })
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

// addFirst adds entries before the subscription is started.
func (s *setup) addFirst(n int) []string {
	s.t.Helper()
	_, err := s.stream.CreateGroup(s.t.Context(), "0")
	require.NoError(s.t, err)
	return s.add(n)
}

// CallBroken that hangs has no slot, and its entry is renewed and comes to no second call.
func TestBroken_HasNoSlot(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.ClaimMinIdle = 300 * time.Millisecond })
	calls, hang := make(chan string, 10), make(chan struct{})
	s.work.broken = func(t *Task) {
		calls <- t.ID
		<-hang
		s.Settle(t)
	}
	ids := s.addFirst(2)
	s.start(s.Broken)
	require.Equal(t, ids[0], s.next().id)
	require.Equal(t, ids[1], s.next().id)
	require.Equal(t, ids[0], <-calls)
	require.Eventually(t, func() bool { // a renewal, and nothing else, makes it younger
		rows := s.pending()
		return len(rows) == 1 && rows[0].ID == ids[0] && rows[0].Idle < 100*time.Millisecond && len(calls) == 0
	}, patience, time.Millisecond)
	close(hang)
	require.Eventually(t, func() bool { return len(s.pending()) == 0 }, patience, time.Millisecond)
	require.Empty(t, calls)
}

// What nobody took is given back, uncounted, when the subscription closes.
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

// A function of the user's that hangs holds up the end until CloseTimeout; its entry
// stays with this consumer, and its slot ends when the function returns.
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

// A function of the user's that ends its goroutine has failed.
func TestCall_Goexit(t *testing.T) {
	s := newSetup(t, nil)
	id := s.addFirst(1)[0]
	s.start(func(t *Task) { t.Call(runtime.Goexit) })
	require.Equal(t, delivery{id, 1}, s.next())
	require.Equal(t, delivery{id, 2}, s.next())
}

// In fan-out the subscription counts by itself, and nothing is pending anywhere.
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

// The end of Subscribe's context begins the end, and who asks sees it at once.
func TestOpen_Closed(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.WaitForRedis = time.Hour })
	s.shared.client.UniversalClient.(*redis.Client).AddHook(refused{})
	opened := make(chan error, 1)
	go func() { opened <- s.Open(t.Context()) }()
	require.Eventually(t, func() bool { return s.Stats().Err != nil }, patience, time.Millisecond, "it does not wait for Redis")
	s.Close()
	require.ErrorIs(t, <-opened, errClosed)
	require.True(t, s.IsClosing())
}

// refused is a server that is not there.
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

// A retry that could not be taken while Redis was away, and was settled elsewhere meanwhile:
// nobody tries to take it again, and the outage is over.
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

// failing fails the commands that it is told to.
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
