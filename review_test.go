package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Bugs that an adversarial review found, each with what went wrong.

// Dead messages that Redis refuses to move were tried again at a fixed delay, and
// before anything new: with enough of them nothing else was ever handled.
func TestReview_UnmovableDoNotStarve(t *testing.T) {
	t.Parallel()
	const bad = 500
	// starve kills many messages with that client, and expects the last one.
	starve := func(t *testing.T, admin, client *redis.Client, topic string, refuse func()) {
		var mu sync.Mutex
		tries := make(map[string][]time.Time) // to move an entry
		client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
			if isMove(cmd) {
				mu.Lock()
				id := fmt.Sprint(cmd.Args()[6])
				tries[id] = append(tries[id], time.Now())
				mu.Unlock()
			}
			return next()
		}})
		publishN(t, admin, topic, bad)
		publish(t, admin, topic, "good")
		begin, handled := make(chan struct{}), make(chan struct{})
		messages := subscribe(t, newSubscriber(t, limited(client, 3)), topic)
		go settling(messages, goxstreams.Retry{}.Middleware(func(msg *message.Message) ([]*message.Message, error) {
			<-begin
			if string(msg.Payload) != "good" {
				return nil, goxstreams.Permanent(errBad)
			}
			close(handled)
			return nil, nil
		}))
		refuse()
		close(begin)
		eventuallyAll(t, func() int { // each of the bad ones is tried, and then the good one is handled
			select {
			case <-handled:
				return bad + 1
			default:
			}
			mu.Lock()
			defer mu.Unlock()
			return len(tries)
		}, bad+1)

		const n = 5
		eventually(t, func() bool {
			mu.Lock()
			defer mu.Unlock()
			for _, times := range tries {
				if len(times) < n {
					continue
				}
				for i := 1; i < n; i++ { // 40 ms, doubling, half of it at least
					assert.GreaterOrEqual(t, times[i].Sub(times[i-1]), 10*time.Millisecond<<i, "try %d", i)
				}
				return true
			}
			return false
		}, "it does not try again")
		eventually(t, func() bool { return len(pendingOf(t, admin, topic, testGroup)) == bad }, "the dead are to stay pending, alone")
	}
	t.Run("OOM", func(t *testing.T) {
		t.Parallel()
		server := testserver.Private(t)
		admin := server.Client()
		starve(t, admin, server.Client(), topic(t), func() {
			require.NoError(t, admin.ConfigSet(t.Context(), "maxmemory", "1").Err())
		})
	})
	t.Run("NOPERM", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t) // it has ACLs
		admin, topic := newClient(t), topic(t)
		starve(t, admin, aclUser(t, admin, "resetkeys", "~"+topic), topic, func() {})
	})
}

// errText and errUnwrap are errors whose methods panic when their pointers are
// nil, and such a nil pointer is what `var err *errText; return err` returns.
type errText struct{ text string }

func (e *errText) Error() string { return e.text }

type errUnwrap struct{ err error }

func (*errUnwrap) Error() string   { return "text" }
func (e *errUnwrap) Unwrap() error { return e.err }

// A handler that returned a nil pointer as its error ended the process: the
// methods of the error panicked in the library's own goroutines.
func TestReview_TypedNilErrors(t *testing.T) {
	t.Parallel()
	for _, failure := range []error{(*errText)(nil), (*errUnwrap)(nil)} {
		name := fmt.Sprintf("%T", failure)
		t.Run("handler/"+name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			config := limited(client, 1)
			handler, calls := failing(always(failure)...)
			messages := subscribe(t, newSubscriber(t, config), topic)
			go settling(messages, config.Retry.Middleware(goxstreams.DeadLetter{}.Middleware(handler)))
			publish(t, client, topic, "x")
			letter := eventuallyDies(t, client, topic)
			require.EqualValues(t, 2, calls.Load())
			require.Equal(t, goxstreams.Exhausted, letter.Kind)
			require.Contains(t, letter.Reason, name)
		})
		t.Run("OnBroken/"+name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			var retryCounts []int64
			config := limited(client, 3)
			config.OnBroken = func(_ context.Context, b goxstreams.BrokenMessage) error {
				if retryCounts = append(retryCounts, b.RetryCount); len(retryCounts) == 1 {
					return failure
				}
				return nil
			}
			sub := newSubscriber(t, config)
			subscribe(t, sub, topic)
			require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"no", "message"}}).Err())
			eventuallyDone(t, client, topic)
			require.NoError(t, sub.Close())
			require.Equal(t, []int64{0, 1}, retryCounts)
		})
		t.Run("worker/"+name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			worker := &testWorker[order]{
				onProcess: fails[goxstreams.Message[order]](always(failure)...),
				onDead:    fails[goxstreams.Message[order]](failure, nil),
			}
			produce(t, client, topic, order{"cup", 1})
			start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic})
			eventuallyDone(t, client, topic)
			require.Equal(t, [3]int{2, 0, 2}, worker.counts())
			_, _, dead := worker.calls()
			require.ErrorIs(t, dead[0].Err, goxstreams.ErrRetriesExhausted)
		})
	}
}

// A cannot renew its lease; B takes the message and snoozes. The Snooze took B's
// delivery off Redis's count, so that A's late failure passed for the holder's:
// the message was dead while B had it, without any failure of B's.
func TestReview_SnoozeKeepsTheFence(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // the embedded one claims what is not idle
	client, topic := newClient(t), topic(t)
	noRenewals := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isRenewal(cmd) {
			return errors.New("cut")
		}
		return next()
	}}
	open := func(name string, client *redis.Client, h message.HandlerFunc) *goxstreams.Subscriber {
		config := grouped(client)
		config.Consumer, config.ClaimMinIdle, config.ClaimInterval = name, 500*time.Millisecond, 20*time.Millisecond
		sub := newSubscriber(t, config)
		go settling(subscribe(t, sub, topic), goxstreams.Retry{}.Middleware(h))
		return sub
	}
	publish(t, client, topic, "x")
	hasIt, fail := make(chan struct{}), make(chan struct{})
	subA := open("A", newClient(t, noRenewals), func(*message.Message) ([]*message.Message, error) {
		close(hasIt)
		<-fail
		return nil, goxstreams.Permanent(errors.New("A says no"))
	})
	<-hasIt
	var calls atomic.Int64
	subB := open("B", client, func(*message.Message) ([]*message.Message, error) {
		if calls.Add(1) == 1 {
			return nil, goxstreams.Snooze(errOther, 3*time.Second) // for as long as that it waits, to be seen
		}
		return nil, goxstreams.Permanent(errors.New("B says no"))
	})
	eventually(t, func() bool { return stats(t, subB).Waiting == 1 }, "B does not snooze")
	close(fail)
	eventually(t, func() bool { return stats(t, subA).InFlight == 0 }, "A does not let go")
	letter := eventuallyDies(t, client, topic)
	require.Equal(t, "B says no", letter.Reason)
	require.EqualValues(t, 2, calls.Load())
	require.EqualValues(t, 2, letter.Deliveries, "a Snooze does not count")
	require.Zero(t, stats(t, subA).Dead)
}

// A is frozen; B takes its message, and gives it back when it closes, with A's
// count: A's late failure buried what was not A's any more.
func TestReview_FenceByName(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	publish(t, client, topic, "x")
	ids, counts := make(chan string), make(chan int64, 2)
	fail := make(chan struct{})
	config := grouped(client)
	config.ClaimMinIdle = time.Minute
	messages := subscribe(t, newSubscriber(t, config), topic)
	go settling(messages, goxstreams.Retry{}.Middleware(func(msg *message.Message) ([]*message.Message, error) {
		d := delivery(t, msg)
		if counts <- d.Count; d.Count > 1 {
			return nil, nil
		}
		ids <- d.ID
		<-fail
		return nil, goxstreams.Permanent(errBad)
	}))
	id := <-ids
	for i, consumer := range []string{"B", "released"} { // with 2, then with 1 again
		require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, consumer, 0, id, "retrycount", 2-i, "justid").Err())
	}
	close(fail)
	eventuallyDone(t, client, topic)
	require.Empty(t, deadOf(t, client, topic))
	require.EqualValues(t, 1, <-counts)
	require.EqualValues(t, 2, <-counts, "it is to come again")
}

// "For ever" written as math.MaxInt overflowed into a negative count, which Redis
// ignores: what died was taken for somebody else's then, and never moved.
func TestReview_MaxRetriesMaxInt(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{
		onProcess: fails[goxstreams.Message[order]](errOther, goxstreams.Permanent(errBad)),
		onDead:    fails[goxstreams.Message[order]](errOther, goxstreams.ErrDead),
	}
	produce(t, client, topic, order{"cup", 1})
	start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, math.MaxInt), Topic: topic})
	letter := eventuallyDies(t, client, topic)
	require.Equal(t, goxstreams.PermanentFailure, letter.Kind)
	require.EqualValues(t, 2, letter.Deliveries)
	require.Equal(t, [3]int{2, 0, 2}, worker.counts())
}

// A dead message whose stream was deleted before it could be moved vanished: it
// was neither in the log nor in Stats.
func TestReview_DeletedBeforeTheMove(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"entry", "stream"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			client, topic, log := newClient(t), topic(t), newLogRecorder()
			var full atomic.Bool
			full.Store(true)
			tried := make(chan struct{}, 1000)
			config := limited(newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
				if full.Load() && isMove(cmd) {
					tried <- struct{}{}
					return redisError("OOM command not allowed when used memory > 'maxmemory'.")
				}
				return next()
			}}), -1)
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "x")
			msg := next(t, messages)
			id := delivery(t, msg).ID
			msg.Nack()
			<-tried
			if what == "stream" {
				require.NoError(t, client.Del(t.Context(), topic).Err())
			} else {
				require.NoError(t, client.XDel(t.Context(), topic, id).Err())
			}
			full.Store(false)
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "the deleted message stays in flight")
			eventually(t, func() bool { return client.XPending(t.Context(), topic, testGroup).Err() == nil }, "the group is not made again")
			eventuallySettled(t, client, topic, testGroup)
			said := func() []string {
				return append(logLinesWith(log.Errors(), "Message lost"), logLinesWith(log.Errors(), "Messages lost")...)
			}
			eventually(t, func() bool { return stats(t, sub).Lost == 1 && len(said()) == 1 }, "it is not said")
			// A further try to move it, after 80 ms at most, says nothing more.
			during(t, 300*time.Millisecond, func() bool { return stats(t, sub).Lost == 1 && len(said()) == 1 }, "it is said again")
			require.Zero(t, stats(t, sub).Dead)
			if what == "stream" {
				require.Contains(t, said()[0], "entries:1")
			} else {
				require.Contains(t, said()[0], id)
			}
		})
	}
}

// A middleware gave up on a handler that went on, and gave the message a new
// context, while the subscription read the handler's name from it: a data race,
// which the race detector finds here, and a dead letter without the name.
func TestReview_StragglerSetsContext(t *testing.T) {
	t.Parallel()
	const n = 20
	client, topic := newClient(t), topic(t)
	config := limited(client, 3)
	config.MaxConcurrency = n
	var stragglers sync.WaitGroup
	hardTimeout := func(message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) {
			stragglers.Go(func() { msg.SetContext(context.Background()) })
			return nil, goxstreams.Permanent(errBad)
		}
	}
	publishN(t, client, topic, n)
	stop := routed(t, newSubscriber(t, config), topic, nil, goxstreams.Retry{}.Middleware, hardTimeout)
	eventually(t, func() bool { return len(deadOf(t, client, topic)) == n })
	stop()
	stragglers.Wait()
	for _, letter := range deadOf(t, client, topic) {
		require.Equal(t, "handler", letter.Handler)
	}
}

// A message that dies on a dead-letter stream was an Error in the log each time
// that it came again, for ever.
func TestReview_DeadOnADeadLetterStream(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	bury(t, client, topic, "x")
	stream := goxstreams.DeadLetterTopic(topic)
	for came := int64(0); came < 10; { // two processes
		log := newLogRecorder()
		sub := newSubscriberLog(t, limited(client, -1), log)
		handler, _ := failing(always(errOther)...)
		go settling(subscribe(t, sub, stream), handler)
		came += 5
		eventually(t, func() bool {
			rows := pendingOf(t, client, stream, testGroup)
			return len(rows) == 1 && rows[0].RetryCount >= came
		}, "it does not come again")
		require.Len(t, logLinesWith(log.Errors(), "died on a dead-letter stream"), 1)
		require.NoError(t, sub.Close())
		require.Len(t, pendingOf(t, client, stream, testGroup), 1)
		require.Len(t, deadOf(t, client, topic), 1)
	}
}

// A worker whose ProcessDead heeds the end of its context at a shutdown was told
// on at Error, as if it had failed.
func TestReview_ShutdownInProcessDead(t *testing.T) {
	t.Parallel()
	client, topic, log := newClient(t), topic(t), newLogRecorder()
	entered := make(chan struct{})
	worker := &testWorker[order]{
		onProcess: fails[goxstreams.Message[order]](goxstreams.Permanent(errBad)),
		onDead: func(ctx context.Context, _ goxstreams.Message[order]) error {
			close(entered)
			<-ctx.Done()
			return ctx.Err()
		},
	}
	produce(t, client, topic, order{"cup", 1})
	config := limited(client, 5)
	config.CloseTimeout = 500 * time.Millisecond
	r := run(t, newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic}, log))
	<-entered
	// What the middlewares say of another test's message may come here too: they
	// write to the log of the newest subscription.
	ours := func() []string {
		return slices.DeleteFunc(log.Errors(), func(line string) bool { return !strings.Contains(line, topic) })
	}
	before := ours()
	require.Len(t, before, 1, "that of Process")
	r.stop(t)
	require.Equal(t, before, ours())

	successor := &testWorker[order]{}
	start(t, successor, goxstreams.ConsumerConfig{Subscriber: limited(client, 5), Topic: topic})
	eventuallyDone(t, client, topic)
	require.Equal(t, [3]int{0, 0, 1}, successor.counts())
}

// Redis's greatest delivery count (XNACK FATAL sets it) overflowed into the least
// one by the next delivery: what had no retry left had all of them.
func TestReview_GreatestCount(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	open := func(t *testing.T, maxRetries int, owner string) (*redis.Client, string, *goxstreams.Subscriber) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		crashed(t, client, topic, math.MaxInt64)
		id := onlyPending(t, client, topic).ID
		require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, owner, 0, id, "justid").Err())
		config := limited(client, maxRetries)
		// A suspect's turn has to come within a sixth of ClaimMinIdle, or it waits for another one.
		config.ClaimMinIdle = minIdle
		return client, topic, newSubscriber(t, config)
	}
	t.Run("with a limit", func(t *testing.T) {
		client, topic, sub := open(t, 3, "crashed")
		subscribe(t, sub, topic)
		require.EqualValues(t, math.MaxInt64, eventuallyDies(t, client, topic).Deliveries)
		require.Zero(t, stats(t, sub).Delivered)
	})
	for _, owner := range []string{"crashed", "released"} {
		t.Run("without a limit, "+owner, func(t *testing.T) {
			client, topic, sub := open(t, 0, owner)
			messages := subscribe(t, sub, topic)
			for range 3 {
				msg := next(t, messages)
				require.EqualValues(t, math.MaxInt64, delivery(t, msg).Count)
				msg.Nack()
			}
			next(t, messages).Ack()
			eventuallySettled(t, client, topic, testGroup)
		})
	}
}

// The context of a worker's own call that was canceled looked like a shutdown:
// the failure was never said.
func TestReview_CanceledIsSaid(t *testing.T) {
	t.Parallel()
	client, topic, log := newClient(t), topic(t), newLogRecorder()
	worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](fmt.Errorf("rpc: %w", context.Canceled))}
	produce(t, client, topic, order{"cup", 1})
	run(t, newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, -1), Topic: topic}, log))
	eventually(t, func() bool { return worker.counts() == [3]int{1, 0, 1} })
	lines := logLinesWith(log.Errors(), "Process failed")
	require.Len(t, lines, 1)
	require.Contains(t, lines[0], "rpc: context canceled")
}

// A worker that ends its goroutine, as t.FailNow in one does, held its slot for
// good: with MaxConcurrency 1 the topic stood still.
func TestReview_Goexit(t *testing.T) {
	t.Parallel()
	type msg = goxstreams.Message[order]
	for name, tt := range map[string]struct {
		worker *testWorker[order]
		counts [3]int
	}{
		"Process":       {&testWorker[order]{onProcess: goexits[msg](nil)}, [3]int{3, 0, 0}},
		"ProcessDead":   {&testWorker[order]{onProcess: fails[msg](goxstreams.Permanent(errBad)), onDead: goexits[msg](nil)}, [3]int{2, 0, 2}},
		"ProcessBroken": {&testWorker[order]{onBroken: goexits[goxstreams.BrokenMessage](nil)}, [3]int{2, 2, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			if name == "ProcessBroken" {
				require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"no", "message"}}).Err())
			}
			produce(t, client, topic, order{"cup", 1}, order{"cup", 2})
			start(t, tt.worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 3), Topic: topic})
			eventually(t, func() bool { return tt.worker.counts() == tt.counts }, "not all are handled")
			eventuallyDone(t, client, topic)
			require.Empty(t, deadOf(t, client, topic))
		})
	}
}

// goexits ends the goroutine the first time, and then returns err.
func goexits[T any](err error) func(context.Context, T) error {
	var once sync.Once
	return func(context.Context, T) error {
		once.Do(runtime.Goexit)
		return err
	}
}

// DeadLetter.Topic was not asked where SubscriberConfig.Retry decided that the
// message dies, after the middlewares; and a Topic that panicked ended the process.
func TestReview_TopicOfTheDead(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		topic     func(string) string
		elsewhere int
		logged    int
	}{
		"named":  {elsewhere("bad"), 1, 0},
		"panics": {func(string) string { panic("what a pity") }, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic, log := newClient(t), topic(t), newLogRecorder()
			config := grouped(client)
			config.Retry = &goxstreams.Retry{ShouldRetry: func(middleware.RetryParams) bool { return false }}
			sub := newSubscriberLog(t, config, log)
			handler, calls := failing(always(errOther)...)
			go settling(subscribe(t, sub, topic), goxstreams.DeadLetter{Topic: tt.topic}.Middleware(handler))
			publish(t, client, topic, "x")
			eventually(t, func() bool { return stats(t, sub).Dead == 1 })
			require.EqualValues(t, 1, calls.Load())
			require.Len(t, lettersIn(t, client, elsewhere("bad")(topic)), tt.elsewhere)
			require.Len(t, deadOf(t, client, topic), 1-tt.elsewhere)
			require.Len(t, logLinesWith(log.Errors(), "DeadLetter panicked"), tt.logged)
		})
	}
}

// A middleware that copies messages takes their delivery from the worker, which
// then saw a RetryCount of -1.
//
// Not in parallel: that copies have no verdict is written to the log of the newest
// subscription, which may be one that is to have an empty log.
func TestReview_RetryCountOfACopy(t *testing.T) {
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{}
	router := newRouter(t)
	consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic}, nil)
	consumer.AddTo(router).AddMiddleware(func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) { return h(msg.Copy()) }
	})
	produce(t, client, topic, order{"cup", 1})
	startRouter(t, router)
	eventuallyDone(t, client, topic)
	processed, _, _ := worker.calls()
	require.Len(t, processed, 1)
	require.Equal(t, order{"cup", 1}, processed[0].Body)
	require.Zero(t, processed[0].RetryCount)
}

// uncomparable is a client that cannot be a map's key.
type uncomparable struct {
	redis.UniversalClient
	_ []string
}

// Replay kept the groups that it knows by their client, and panicked where that is
// of a type that cannot be compared.
func TestReview_UncomparableClient(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	letter := bury(t, client, topic, "x")[0]
	n, err := queueOf(t, uncomparable{UniversalClient: client}, goxstreams.DeadLetterTopic(topic)).Replay(t.Context(), letter.ID)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Empty(t, deadOf(t, client, topic))
}

// With a context that had ended before, the calls of a DeadLetterQueue tried all
// the same, and could not say what had become of the letters.
func TestReview_QueueOfAnEndedContext(t *testing.T) {
	t.Parallel()
	counter, counts := countCommands()
	client, topic := newClient(t), topic(t)
	letter := bury(t, client, topic, "x")[0]
	q := queueOf(t, newClient(t, counter), goxstreams.DeadLetterTopic(topic))
	ended, end := context.WithCancel(t.Context())
	end()
	for _, do := range []func(context.Context, ...string) (int, error){q.Delete, q.Replay, q.ReplayToAll} {
		n, err := do(ended, letter.ID)
		require.ErrorIs(t, err, context.Canceled)
		require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		require.Zero(t, n)
	}
	require.Empty(t, counts.n)
	require.Len(t, deadOf(t, client, topic), 1)
}
