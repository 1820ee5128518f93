package goxstreams_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/cenkalti/backoff/v5"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

type order struct {
	Article  string
	Quantity int
}

// testWorker records its calls, and then does what its functions say; nil: it
// returns nil.
type testWorker[E any] struct {
	onProcess func(context.Context, goxstreams.Message[E]) error
	onBroken  func(context.Context, goxstreams.BrokenMessage) error
	onDead    func(context.Context, goxstreams.Message[E]) error

	mu        sync.Mutex
	processed []goxstreams.Message[E]
	broken    []goxstreams.BrokenMessage
	dead      []goxstreams.Message[E]
}

func (w *testWorker[E]) Process(ctx context.Context, msg goxstreams.Message[E]) error {
	return record(w, &w.processed, w.onProcess, ctx, msg)
}

func (w *testWorker[E]) ProcessBroken(ctx context.Context, broken goxstreams.BrokenMessage) error {
	return record(w, &w.broken, w.onBroken, ctx, broken)
}

func (w *testWorker[E]) ProcessDead(ctx context.Context, dead goxstreams.Message[E]) error {
	return record(w, &w.dead, w.onDead, ctx, dead)
}

func record[E, T any](w *testWorker[E], calls *[]T, then func(context.Context, T) error, ctx context.Context, arg T) error {
	w.mu.Lock()
	*calls = append(*calls, arg)
	w.mu.Unlock()
	if then == nil {
		return nil
	}
	return then(ctx, arg)
}

func (w *testWorker[E]) calls() (processed []goxstreams.Message[E], broken []goxstreams.BrokenMessage, dead []goxstreams.Message[E]) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append(processed, w.processed...), append(broken, w.broken...), append(dead, w.dead...)
}

// counts returns how often each method was called.
func (w *testWorker[E]) counts() [3]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return [3]int{len(w.processed), len(w.broken), len(w.dead)}
}

// fails returns the errors in order, and then nil.
func fails[T any](errs ...error) func(context.Context, T) error {
	var n atomic.Int64
	return func(context.Context, T) error {
		if i := int(n.Add(1)) - 1; i < len(errs) {
			return errs[i]
		}
		return nil
	}
}

// panics panics the first time, and then returns err.
func panics[T any](err error) func(context.Context, T) error {
	var once sync.Once
	return func(context.Context, T) error {
		once.Do(func() { panic("what a pity") })
		return err
	}
}

// limited returns the config of a worker's Subscriber with a limit and hardly any
// delay.
func limited(client redis.UniversalClient, maxRetries int) goxstreams.SubscriberConfig {
	config := grouped(client)
	config.Retry = &goxstreams.Retry{MaxRetries: maxRetries, InitialInterval: time.Millisecond, MaxInterval: 10 * time.Millisecond}
	return config
}

func newConsumer[E any](t testing.TB, worker goxstreams.Worker[E], config goxstreams.ConsumerConfig, logger watermill.LoggerAdapter) *goxstreams.Consumer[E] {
	t.Helper()
	if config.Subscriber.Client == nil {
		config.Subscriber.Client = newClient(t)
	}
	if config.Subscriber.ClaimInterval == 0 {
		config.Subscriber.ClaimInterval = 50 * time.Millisecond
	}
	if config.Subscriber.CloseTimeout == 0 {
		config.Subscriber.CloseTimeout = patience
	}
	shortBlocks(t, &config.Subscriber)
	consumer, err := goxstreams.NewConsumer(worker, config, logger)
	require.NoError(t, err)
	return consumer
}

// runner is a Consumer or a BatchConsumer.
type runner interface{ Run(context.Context) error }

// running is its active Run.
type running struct {
	cancel context.CancelFunc
	ended  chan struct{}
}

// run runs a Consumer until stop is called, or the test ends.
func run(t testing.TB, consumer runner) *running {
	t.Helper()
	return runWith(t, context.Background(), consumer)
}

func runWith(t testing.TB, ctx context.Context, consumer runner) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	r := &running{cancel, make(chan struct{})}
	go func() {
		defer close(r.ended)
		assert.NoError(t, consumer.Run(ctx))
	}()
	t.Cleanup(func() { r.stop(t) })
	return r
}

// start runs a new Consumer.
func start[E any](t testing.TB, worker goxstreams.Worker[E], config goxstreams.ConsumerConfig) *running {
	t.Helper()
	return run(t, newConsumer(t, worker, config, nil))
}

func (r *running) stop(t testing.TB) {
	t.Helper()
	r.cancel()
	select {
	case <-r.ended:
	case <-time.After(2 * patience):
		require.FailNow(t, "Run does not return")
	}
}

// produce produces events with a default Producer.
func produce[E any](t testing.TB, client redis.UniversalClient, topic string, events ...E) {
	t.Helper()
	producer := goxstreams.NewProducer[E](newPublisher(t, client), goxstreams.ProducerConfig{})
	require.NoError(t, producer.ProduceBatch(context.Background(), events, topic))
}

// entryIDs returns the IDs of all entries of the stream.
func entryIDs(t testing.TB, client redis.UniversalClient, topic string) []string {
	t.Helper()
	entries, err := client.XRange(context.Background(), topic, "-", "+").Result()
	require.NoError(t, err)
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.ID)
	}
	return ids
}

// deadOf returns the dead letters of the topic.
func deadOf(t testing.TB, client redis.UniversalClient, topic string) []goxstreams.DeadMessage {
	t.Helper()
	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic(topic))
	require.NoError(t, err)
	var dead []goxstreams.DeadMessage
	for d, err := range queue.All(context.Background(), "") {
		require.NoError(t, err)
		dead = append(dead, d)
	}
	return dead
}

// eventuallyDone waits until the group has read everything and nothing of it is
// pending.
func eventuallyDone(t testing.TB, client redis.UniversalClient, topic string) {
	t.Helper()
	eventually(t, func() bool {
		groups, err := client.XInfoGroups(context.Background(), topic).Result()
		require.NoError(t, err)
		if len(groups) != 1 || groups[0].Pending != 0 {
			return false
		}
		ids := entryIDs(t, client, topic)
		return len(ids) == 0 || groups[0].LastDeliveredID == ids[len(ids)-1]
	}, "entries stay pending")
}

func TestWorker_Process(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	refused := errors.New("refused")
	var counts []int64 // Redis's state while the worker has the message
	worker := &testWorker[order]{}
	worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
		rows := pendingOf(t, client, topic, testGroup)
		if assert.Len(t, rows, 1) {
			counts = append(counts, rows[0].RetryCount)
		}
		if msg.RetryCount < 2 {
			return refused
		}
		return nil
	}
	pub := newPublisher(t, client)
	producer := goxstreams.NewProducer[order](pub, goxstreams.ProducerConfig{
		Metadata: func(context.Context) message.Metadata { return message.Metadata{"trace": "4711"} },
	})
	require.NoError(t, producer.Produce(t.Context(), order{"cup", 4}, topic))
	start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 3), Topic: topic})
	eventually(t, func() bool { return worker.counts()[0] == 3 })
	eventuallyDone(t, client, topic)

	processed, broken, dead := worker.calls()
	require.Len(t, processed, 3)
	id := entryIDs(t, client, topic)[0]
	for i, msg := range processed {
		require.Equal(t, goxstreams.Message[order]{
			ID: id, RetryCount: int64(i), Body: order{"cup", 4}, Metadata: message.Metadata{"trace": "4711"},
		}, msg)
	}
	require.Equal(t, []int64{1, 2, 3}, counts, "Redis's delivery counts")
	require.Empty(t, broken)
	require.Empty(t, dead)
	require.Empty(t, deadOf(t, client, topic))
}

// errCode is a handler's own error type, with data.
type errCode int

func (e errCode) Error() string { return fmt.Sprint("code ", int(e)) }

func TestWorker_DeadByRetries(t *testing.T) {
	t.Parallel()
	for _, maxRetries := range []int{-1, 1, 2} {
		t.Run(fmt.Sprintf("MaxRetries=%d", maxRetries), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			worker := &testWorker[order]{}
			worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error { return errCode(msg.RetryCount) }
			produce(t, client, topic, order{"unicorn", 1})
			start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, maxRetries), Topic: topic})
			eventually(t, func() bool { return worker.counts()[2] == 1 })
			eventuallyDone(t, client, topic)

			processed, broken, dead := worker.calls()
			retries := max(maxRetries, 0)
			require.Len(t, processed, retries+1)
			require.Empty(t, broken)
			require.Len(t, dead, 1)
			require.ErrorIs(t, dead[0].Err, goxstreams.ErrRetriesExhausted)
			require.ErrorIs(t, dead[0].Err, goxstreams.ErrDead)
			require.NotErrorIs(t, dead[0].Err, goxstreams.ErrPermanent)
			var code errCode
			require.ErrorAs(t, dead[0].Err, &code)
			require.EqualValues(t, retries, code, "the last error of Process")
			dead[0].Err = nil
			require.Equal(t, processed[retries], dead[0], "what ProcessDead gets, beside the error")
			require.Empty(t, deadOf(t, client, topic), "nil: acked and gone")
			require.Len(t, entryIDs(t, client, topic), 1, "the entry stays for other groups")
		})
	}
}

func TestWorker_ErrorsThatSayMore(t *testing.T) {
	t.Parallel()
	t.Run("Permanent", func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](fmt.Errorf("ship: %w", goxstreams.Permanent(errCode(410))))}
		produce(t, client, topic, order{"unicorn", 1})
		start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 5), Topic: topic})
		eventually(t, func() bool { return worker.counts()[2] == 1 })
		eventuallyDone(t, client, topic)
		require.Equal(t, [3]int{1, 0, 1}, worker.counts())
		_, _, dead := worker.calls()
		require.ErrorIs(t, dead[0].Err, goxstreams.ErrPermanent)
		require.NotErrorIs(t, dead[0].Err, goxstreams.ErrRetriesExhausted)
		require.ErrorIs(t, dead[0].Err, errCode(410))
		require.EqualError(t, dead[0].Err, "ship: code 410")
	})
	// However the error was marked as permanent: ProcessDead can check it.
	for name, tt := range map[string]struct {
		err    error
		change func(*goxstreams.Retry)
	}{
		"ErrDead":     {fmt.Errorf("%w: %w", goxstreams.ErrDead, errCode(410)), func(*goxstreams.Retry) {}},
		"backoff":     {backoff.Permanent(errCode(410)), func(*goxstreams.Retry) {}},
		"ShouldRetry": {errCode(410), func(r *goxstreams.Retry) { r.ShouldRetry = func(middleware.RetryParams) bool { return false } }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](tt.err)}
			produce(t, client, topic, order{"unicorn", 1})
			config := limited(client, 5)
			tt.change(config.Retry)
			start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
			eventually(t, func() bool { return worker.counts() == [3]int{1, 0, 1} })
			_, _, dead := worker.calls()
			require.ErrorIs(t, dead[0].Err, goxstreams.ErrPermanent)
			require.ErrorIs(t, dead[0].Err, errCode(410))
		})
	}
	t.Run("RetryAfter", func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		const delay = 100 * time.Millisecond
		var at []time.Time
		worker := &testWorker[order]{}
		worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
			at = append(at, time.Now())
			if msg.RetryCount == 0 {
				return goxstreams.RetryAfter(errCode(429), delay)
			}
			return nil
		}
		produce(t, client, topic, order{"cup", 1})
		config := grouped(client)
		config.Retry = &goxstreams.Retry{MaxRetries: 1, InitialInterval: time.Hour}
		start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
		eventually(t, func() bool { return worker.counts()[0] == 2 }, "the backoff's delay, not RetryAfter's")
		eventuallyDone(t, client, topic)
		require.GreaterOrEqual(t, at[1].Sub(at[0]), delay)
		processed, _, dead := worker.calls()
		require.EqualValues(t, 1, processed[1].RetryCount, "it counts")
		require.Empty(t, dead)
	})
	t.Run("Snooze", func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		early := goxstreams.Snooze(errors.New("too early"), time.Millisecond)
		worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](early, early, early)}
		produce(t, client, topic, order{"cup", 1})
		start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, -1), Topic: topic})
		eventually(t, func() bool { return worker.counts()[0] == 4 })
		eventuallyDone(t, client, topic)
		processed, _, dead := worker.calls()
		for _, msg := range processed {
			require.Zero(t, msg.RetryCount)
		}
		require.Empty(t, dead)
	})
}

// The result of ProcessDead decides; Process is not called again.
func TestWorker_ProcessDead(t *testing.T) {
	t.Parallel()
	other := errors.New("the archive is down")
	type verdict = func(context.Context, goxstreams.Message[order]) error
	for name, tt := range map[string]struct {
		onDead  func() verdict
		asked   int
		letters int
	}{
		"nil":           {func() verdict { return nil }, 1, 0},
		"ErrDead":       {func() verdict { return fails[goxstreams.Message[order]](goxstreams.ErrDead) }, 1, 1},
		"wraps ErrDead": {func() verdict { return fails[goxstreams.Message[order]](fmt.Errorf("no idea: %w", goxstreams.ErrDead)) }, 1, 1},
		"Permanent":     {func() verdict { return fails[goxstreams.Message[order]](goxstreams.Permanent(other)) }, 1, 1},
		"the own error": {func() verdict {
			return func(_ context.Context, dead goxstreams.Message[order]) error { return dead.Err }
		}, 1, 1},
		"other, nil":     {func() verdict { return fails[goxstreams.Message[order]](other, other, other, other, other) }, 6, 0},
		"other, ErrDead": {func() verdict { return fails[goxstreams.Message[order]](other, other, goxstreams.ErrDead) }, 3, 1},
		"panic, nil":     {func() verdict { return panics[goxstreams.Message[order]](nil) }, 2, 0},
		"panic, ErrDead": {func() verdict { return panics[goxstreams.Message[order]](goxstreams.ErrDead) }, 2, 1},
	} {
		for _, concurrency := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s, MaxConcurrency=%d", name, concurrency), func(t *testing.T) {
				t.Parallel()
				client, topic := newClient(t), topic(t)
				worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](errCode(1), errCode(2))}
				verdict := tt.onDead()
				var counts []int64
				worker.onDead = func(ctx context.Context, dead goxstreams.Message[order]) error {
					rows := pendingOf(t, client, topic, testGroup)
					if assert.Len(t, rows, 1) {
						counts = append(counts, rows[0].RetryCount)
					}
					if verdict == nil {
						return nil
					}
					return verdict(ctx, dead)
				}
				produce(t, client, topic, order{"unicorn", 1})
				config := limited(client, 1)
				config.MaxConcurrency = concurrency
				start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic, Name: "ship"})
				eventually(t, func() bool { return worker.counts()[2] == tt.asked }, "ProcessDead")
				eventuallyDone(t, client, topic)

				processed, _, dead := worker.calls()
				require.Len(t, processed, 2, "calls of Process")
				require.Len(t, dead, tt.asked, "calls of ProcessDead")
				for i, d := range dead {
					require.EqualValues(t, 1, d.RetryCount)
					require.Equal(t, order{"unicorn", 1}, d.Body)
					require.ErrorIs(t, d.Err, goxstreams.ErrRetriesExhausted)
					require.ErrorIs(t, d.Err, errCode(2))
					require.Equal(t, counts[0], counts[i], "to be asked again is no delivery: %v", counts)
				}
				letters := deadOf(t, client, topic)
				require.Len(t, letters, tt.letters)
				for _, d := range letters {
					require.Equal(t, "ship", d.Handler)
					require.Equal(t, goxstreams.Exhausted, d.Kind)
					require.Equal(t, "code 2", d.Reason)
					require.Equal(t, processed[0].ID, d.EntryID)
					require.EqualValues(t, 2, d.Deliveries)
					require.JSONEq(t, `{"Article": "unicorn", "Quantity": 1}`, string(d.Message.Payload))
				}
			})
		}
	}
}

// The topic's Subscriber does not know the handler's name; a Consumer does.
func TestWorker_DeadLetterNamesTheHandler(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{
		onProcess: fails[goxstreams.Message[order]](goxstreams.Permanent(errCode(1))),
		onBroken:  fails[goxstreams.BrokenMessage](goxstreams.ErrDead),
		onDead:    fails[goxstreams.Message[order]](goxstreams.ErrDead),
	}
	produce(t, client, topic, order{"unicorn", 1})
	publish(t, client, topic, "no JSON")
	start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic})
	eventually(t, func() bool { return len(deadOf(t, client, topic)) == 2 })
	for _, d := range deadOf(t, client, topic) {
		require.Equal(t, testGroup+":"+topic, d.Handler, "%s", d.Kind)
	}
}

// A graceful restart while a dead message waits to be processed: the next Consumer
// continues with ProcessDead, however often that happens.
func TestWorker_ProcessDeadAfterRestart(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // releases by idle time
	for name, tt := range map[string]struct {
		err       error
		kind      error
		marshaler goxstreams.Marshaler
	}{
		"exhausted":            {errCode(1), goxstreams.ErrRetriesExhausted, goxstreams.DefaultMarshaler{}},
		"permanent":            {goxstreams.Permanent(errCode(1)), goxstreams.ErrPermanent, goxstreams.DefaultMarshaler{}},
		"BodyMarshaler":        {errCode(1), goxstreams.ErrRetriesExhausted, goxstreams.BodyMarshaler{}},
		"marshaler of the own": {errCode(1), goxstreams.ErrRetriesExhausted, ownMarshaler{}},
	} {
		for _, concurrency := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s, MaxConcurrency=%d", name, concurrency), func(t *testing.T) {
				t.Parallel()
				client, topic := newClient(t), topic(t)
				pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: tt.marshaler}, nil)
				require.NoError(t, err)
				require.NoError(t, goxstreams.NewProducer[order](pub, goxstreams.ProducerConfig{}).Produce(t.Context(), order{"unicorn", 1}, topic))

				config := goxstreams.ConsumerConfig{Subscriber: limited(client, 3), Topic: topic}
				config.Subscriber.Unmarshaler = tt.marshaler.(goxstreams.Unmarshaler)
				config.Subscriber.MaxConcurrency = concurrency
				first := &testWorker[order]{}
				first.onProcess = func(context.Context, goxstreams.Message[order]) error { return tt.err }
				busy := func(context.Context, goxstreams.Message[order]) error { return errors.New("no time") }
				first.onDead = busy
				r := start(t, first, config)
				eventually(t, func() bool { return first.counts()[2] >= 2 })
				r.stop(t)
				_, _, dead := first.calls()
				require.ErrorIs(t, dead[0].Err, tt.kind)

				var counts []int64
				for range 5 { // more than the crashes that ProcessDead may have
					rows := pendingOf(t, client, topic, testGroup)
					require.Len(t, rows, 1)
					counts = append(counts, rows[0].RetryCount)
					next := &testWorker[order]{onDead: busy}
					r := start(t, next, config)
					eventually(t, func() bool { return next.counts()[2] >= 2 }, "ProcessDead is not asked after the restart")
					r.stop(t)
					require.Zero(t, next.counts()[0], "calls of Process")
				}
				for _, n := range counts {
					require.Equal(t, counts[0], n, "a restart is no delivery: %v", counts)
				}
				last := &testWorker[order]{}
				start(t, last, config)
				eventually(t, func() bool { return last.counts()[2] == 1 })
				eventuallyDone(t, client, topic)
				_, _, dead = last.calls()
				require.Zero(t, last.counts()[0], "calls of Process")
				require.Equal(t, order{"unicorn", 1}, dead[0].Body)
				require.ErrorIs(t, dead[0].Err, goxstreams.ErrDead)
				require.Empty(t, deadOf(t, client, topic))
			})
		}
	}
}

// ownMarshaler is an Unmarshaler of another package.
type ownMarshaler struct{}

func (ownMarshaler) Marshal(_ string, msg *message.Message) (map[string]any, error) {
	return map[string]any{"own": string(msg.Payload)}, nil
}

func (ownMarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	payload, ok := values["own"].(string)
	if !ok {
		return nil, errors.New("no field own")
	}
	return message.NewMessage("", message.Payload(payload)), nil
}

// A message that crashes process after process is moved without another call. The
// crashes are simulated: each consumer of the message leaves it with a higher
// count.
func TestWorker_CrashesByCount(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	const maxRetries = 2
	for count, want := range map[int64][3]int{ // of the delivery that the crashed process had
		maxRetries + 1: {1, 0, 0}, // the one in reserve
		maxRetries + 2: {0, 0, 1},
		maxRetries + 3: {0, 0, 1},
		maxRetries + 4: {0, 0, 1},
		maxRetries + 5: {0, 0, 0}, // three crashes since it died
		maxRetries + 9: {0, 0, 0},
	} {
		t.Run(fmt.Sprint(count), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			createGroup(t, client, topic, testGroup)
			produce(t, client, topic, order{"bomb", 1})
			id := readAs(t, client, topic, testGroup, "crashed", 1)[0]
			require.NoError(t, client.Do(t.Context(), "XCLAIM", topic, testGroup, "crashed", 0, id, "RETRYCOUNT", count, "JUSTID").Err())
			worker := &testWorker[order]{}
			config := limited(client, maxRetries)
			config.ClaimMinIdle = minIdle // a suspect may wait up to a sixth of that
			start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
			eventuallyDone(t, client, topic)
			require.Equal(t, want, worker.counts(), "calls of Process, ProcessBroken, ProcessDead")
			letters := deadOf(t, client, topic)
			if want != [3]int{} {
				require.Empty(t, letters)
				return
			}
			require.Len(t, letters, 1)
			require.Equal(t, goxstreams.Exhausted, letters[0].Kind)
			require.Equal(t, count+1, letters[0].Deliveries)
		})
	}
}

func TestWorker_ProcessBroken(t *testing.T) {
	t.Parallel()
	other := errors.New("the database is down")
	type verdict = func(context.Context, goxstreams.BrokenMessage) error
	outcomes := map[string]struct {
		onBroken func() verdict
		asked    int
		letters  int
	}{
		"nil":     {func() verdict { return nil }, 1, 0},
		"ErrDead": {func() verdict { return fails[goxstreams.BrokenMessage](goxstreams.ErrDead) }, 1, 1},
		"wraps ErrDead": {func() verdict {
			return fails[goxstreams.BrokenMessage](fmt.Errorf("what is it: %w", goxstreams.ErrDead))
		}, 1, 1},
		"other, nil":     {func() verdict { return fails[goxstreams.BrokenMessage](other, other) }, 3, 0},
		"other, ErrDead": {func() verdict { return fails[goxstreams.BrokenMessage](other, goxstreams.ErrDead) }, 2, 1},
		"panic, nil":     {func() verdict { return panics[goxstreams.BrokenMessage](nil) }, 2, 0},
		"panic, ErrDead": {func() verdict { return panics[goxstreams.BrokenMessage](goxstreams.ErrDead) }, 2, 1},
	}
	entries := map[string]struct {
		fields []string
		why    string
	}{
		"no message": {[]string{"b", "\x00\xff", "a", "1", "a", "2"}, `field "_watermill_message_uuid" is missing`},
		"no E":       {[]string{"_watermill_message_uuid", "u", "metadata", "", "payload", `{"Article": 7}`, "x", "y"}, "decode the payload into goxstreams_test.order: json: cannot unmarshal"},
		"no JSON":    {[]string{"_watermill_message_uuid", "u", "payload", "\xc0"}, "decode the payload into goxstreams_test.order: invalid character"},
	}
	for entry, e := range entries {
		for name, tt := range outcomes {
			t.Run(entry+", "+name, func(t *testing.T) {
				t.Parallel()
				client, topic := newClient(t), topic(t)
				worker := &testWorker[order]{onBroken: tt.onBroken()}
				id, err := client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: e.fields}).Result()
				require.NoError(t, err)
				produce(t, client, topic, order{"cup", 1})
				start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 5), Topic: topic})
				eventually(t, func() bool { return worker.counts() == [3]int{1, tt.asked, 0} })
				eventuallyDone(t, client, topic)

				_, broken, dead := worker.calls()
				require.Empty(t, dead)
				for i, b := range broken {
					require.ErrorIs(t, b.Err, goxstreams.ErrBroken)
					require.ErrorContains(t, b.Err, e.why)
					b.Err = nil
					require.Equal(t, goxstreams.BrokenMessage{Topic: topic, ID: id, Fields: e.fields, RetryCount: int64(i)}, b)
				}
				letters := deadOf(t, client, topic)
				require.Len(t, letters, tt.letters)
				for _, d := range letters {
					require.Equal(t, goxstreams.Broken, d.Kind)
					require.Equal(t, e.fields, d.Fields)
					require.Contains(t, d.Reason, e.why)
					require.Nil(t, d.Message)
				}
			})
		}
	}
}

// Malformed entries stop nothing: not while ProcessBroken fails, nor while it
// hangs.
func TestWorker_BrokenStopsNothing(t *testing.T) {
	t.Parallel()
	for name, hang := range map[string]bool{"fails": false, "hangs": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			worker := &testWorker[order]{}
			worker.onBroken = func(ctx context.Context, _ goxstreams.BrokenMessage) error {
				if hang {
					<-ctx.Done()
				}
				return errors.New("not now")
			}
			const n = 3
			for i := range n {
				publish(t, client, topic, "no JSON")
				produce(t, client, topic, order{"cup", i})
			}
			config := limited(client, 0)
			config.CloseTimeout = 500 * time.Millisecond
			r := start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
			eventually(t, func() bool { return worker.counts()[0] == n && worker.counts()[1] >= n })
			r.stop(t)
			processed, _, _ := worker.calls()
			for i, msg := range processed {
				require.Equal(t, i, msg.Body.Quantity, "the order")
			}
			require.Len(t, pendingOf(t, client, topic, testGroup), n, "the broken ones are kept")
		})
	}
}

// A ProcessBroken that always fails to handle its entry: the limit applies to it
// too.
func TestWorker_ProcessBrokenWithoutEnd(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{}
	worker.onBroken = func(context.Context, goxstreams.BrokenMessage) error { return errors.New("not now") }
	publish(t, client, topic, "no JSON")
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"no", "message"}}).Err())
	start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 2), Topic: topic})
	eventually(t, func() bool { return len(deadOf(t, client, topic)) == 2 })
	eventuallyDone(t, client, topic)
	require.Equal(t, [3]int{0, 2 * (2 + 2), 0}, worker.counts())
}

type panickyCodec struct{ decode, encode bool }

func (c panickyCodec) Encode(event any) ([]byte, error) {
	if c.encode {
		panic("cannot encode")
	}
	return json.Marshal(event)
}

func (c panickyCodec) Decode(payload []byte, event any) error {
	if c.decode {
		panic("cannot decode")
	}
	return json.Unmarshal(payload, event)
}

// A panic is that message's error, even in Run, which has no Recoverer.
func TestWorker_Panics(t *testing.T) {
	t.Parallel()
	t.Run("Process", func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		worker := &testWorker[order]{}
		worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
			if msg.Body.Article == "bomb" {
				panic("bang")
			}
			return nil
		}
		produce(t, client, topic, order{"bomb", 1}, order{"cup", 1})
		log := newLogRecorder()
		run(t, newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic}, log))
		eventually(t, func() bool { return worker.counts() == [3]int{3, 0, 1} })
		eventuallyDone(t, client, topic)
		_, _, dead := worker.calls()
		require.ErrorContains(t, dead[0].Err, "panic: bang")
		require.ErrorContains(t, dead[0].Err, "worker_test.go", "the stack")
		require.ErrorIs(t, dead[0].Err, goxstreams.ErrRetriesExhausted)
		require.Len(t, log.Errors(), 2)
		require.Contains(t, log.Errors()[0], "Process failed: panic: bang")
	})
	t.Run("Codec.Decode", func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		worker := &testWorker[order]{}
		produce(t, client, topic, order{"cup", 1})
		start(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic, Codec: panickyCodec{decode: true}})
		eventually(t, func() bool { return worker.counts() == [3]int{0, 1, 0} })
		eventuallyDone(t, client, topic)
		_, broken, _ := worker.calls()
		require.ErrorIs(t, broken[0].Err, goxstreams.ErrBroken)
		require.ErrorContains(t, broken[0].Err, "cannot decode")
	})
	t.Run("Codec.Encode", func(t *testing.T) {
		client, topic := newClient(t), topic(t)
		producer := goxstreams.NewProducer[order](newPublisher(t, client), goxstreams.ProducerConfig{Codec: panickyCodec{encode: true}})
		require.Panics(t, func() { _ = producer.Produce(t.Context(), order{}, topic) }, "the caller's own")
		require.Zero(t, client.Exists(t.Context(), topic).Val())
	})
	t.Run("Context", func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		worker := &testWorker[order]{}
		var calls atomic.Int64
		produce(t, client, topic, order{"cup", 1})
		start(t, worker, goxstreams.ConsumerConfig{
			Subscriber: limited(client, 1), Topic: topic,
			Context: func(ctx context.Context, _ message.Metadata) context.Context {
				if calls.Add(1) < 4 { // twice before Process, once before ProcessDead
					panic("no context")
				}
				return ctx
			},
		})
		eventually(t, func() bool { return worker.counts() == [3]int{0, 0, 1} })
		eventuallyDone(t, client, topic)
		_, _, dead := worker.calls()
		require.ErrorContains(t, dead[0].Err, "no context")
	})
}

// A Process that calls runtime.Goexit, as t.FailNow does, has failed. Run calls it in the
// goroutine of a slot, which must not end with it.
func TestWorker_Goexit(t *testing.T) {
	t.Parallel()
	for _, hang := range []bool{false, true} {
		t.Run(fmt.Sprintf("after CloseTimeout=%t", hang), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t) // delivery counts set back
			client, topic := newClient(t), topic(t)
			worker := &testWorker[order]{}
			begun, finish, exited := make(chan struct{}), make(chan struct{}), make(chan struct{})
			worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
				if msg.Body.Article == "cup" || msg.RetryCount > 0 {
					return nil
				}
				defer close(exited)
				close(begun)
				if hang {
					<-finish
				}
				runtime.Goexit()
				return nil
			}
			produce(t, client, topic, order{"bomb", 1}, order{"cup", 1})
			config := limited(client, 1)
			config.CloseTimeout = 500 * time.Millisecond
			consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic}, nil)
			r := run(t, consumer)
			<-begun
			if !hang {
				eventually(t, func() bool { return worker.counts() == [3]int{3, 0, 0} })
				eventuallyDone(t, client, topic)
				processed, _, _ := worker.calls()
				require.Equal(t, "bomb", processed[1].Body.Article, "it holds the order")
				require.EqualValues(t, 1, processed[1].RetryCount)
				require.EqualValues(t, 1, consumer.Stats()[0].Nacked)
				return
			}
			r.stop(t)
			close(finish)
			<-exited
			rows := pendingOf(t, client, topic, testGroup)
			require.NotEmpty(t, rows)
			require.Zero(t, rows[0].RetryCount)
			require.NotEqual(t, "released", rows[0].Consumer, "its handler has it")
		})
	}
}

// A message that a middleware has acked is acked, although its handler hangs; and one whose
// OnOutcome hangs as well does not hold up Run.
func TestConsumer_AckedEarlyAndHangs(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{}
	begun, finish := make(chan struct{}), make(chan struct{})
	defer close(finish)
	worker.onProcess = func(context.Context, goxstreams.Message[order]) error {
		close(begun)
		<-finish
		return nil
	}
	told := make(chan goxstreams.Outcome, 1)
	config := limited(client, 1)
	config.CloseTimeout = 500 * time.Millisecond
	config.OnOutcome = func(o goxstreams.Outcome) { told <- o; <-finish }
	consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic, Middlewares: []message.HandlerMiddleware{
		func(next message.HandlerFunc) message.HandlerFunc {
			return func(msg *message.Message) ([]*message.Message, error) {
				msg.Ack()
				return next(msg)
			}
		},
	}}, nil)
	produce(t, client, topic, order{"cup", 1})
	r := run(t, consumer)
	<-begun
	r.stop(t)
	require.Equal(t, goxstreams.OutcomeAcked, (<-told).Kind)
	require.Empty(t, pendingOf(t, client, topic, testGroup))
}

func TestConsumer_RunDrains(t *testing.T) {
	testserver.RequireReal(t) // the embedded server's goroutines are this process's too
	for _, concurrency := range []int{1, 5} {
		t.Run(fmt.Sprintf("MaxConcurrency=%d", concurrency), func(t *testing.T) {
			topic := topic(t)
			admin := newClient(t)
			const n = 40
			for i := range n {
				produce(t, admin, topic, order{"cup", i})
			}
			here := goleak.IgnoreCurrent()
			client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t)})
			worker := &testWorker[order]{}
			var atWork sync.WaitGroup
			atWork.Add(concurrency)
			finish := make(chan struct{})
			worker.onProcess = func(ctx context.Context, msg goxstreams.Message[order]) error {
				atWork.Done()
				<-finish
				return ctx.Err() // it has not ended: CloseTimeout is far away
			}
			config := grouped(client)
			config.MaxConcurrency = concurrency
			log := newLogRecorder()
			consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic}, log)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { ended <- consumer.Run(ctx) }()
			atWork.Wait()
			cancel()
			select {
			case <-ended:
				require.Fail(t, "Run returned while Process was at work")
			case <-time.After(50 * time.Millisecond):
			}
			close(finish)
			require.NoError(t, <-ended)

			require.NoError(t, client.Close()) // nothing is in flight any more
			goleak.VerifyNone(t, append(testserver.LeakOptions(), here)...)
			require.Equal(t, concurrency, worker.counts()[0], "nothing new was begun")
			groups, err := admin.XInfoGroups(t.Context(), topic).Result()
			require.NoError(t, err)
			rows := pendingOf(t, admin, topic, testGroup)
			for _, row := range rows { // read ahead, and released
				require.Equal(t, "released", row.Consumer)
				require.Zero(t, row.RetryCount)
			}
			if read := groups[0].EntriesRead; read > 0 { // Redis 7
				require.EqualValues(t, concurrency, read-int64(len(rows)), "acks that arrived")
			}
			require.Empty(t, log.Errors())

			// Another one handles the rest, without delay.
			rest := &testWorker[order]{}
			config.Client, config.ClaimMinIdle = admin, time.Hour
			start(t, rest, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
			eventually(t, func() bool { return rest.counts()[0] == n-concurrency })
			eventuallyDone(t, admin, topic)
			processed, _, _ := rest.calls()
			for _, msg := range processed {
				require.Zero(t, msg.RetryCount, "a shutdown is no delivery")
			}
		})
	}
}

// A worker that hangs delays Run no longer than CloseTimeout. Its context ends
// before that.
func TestConsumer_RunIsBounded(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // delivery counts set back
	for _, method := range []string{"Process", "ProcessBroken", "ProcessDead"} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			begun, cause, finish := make(chan struct{}), make(chan error, 1), make(chan struct{})
			var hung sync.WaitGroup
			hang := func(ctx context.Context) error {
				hung.Add(1)
				defer hung.Done()
				close(begun)
				<-ctx.Done()
				cause <- context.Cause(ctx)
				<-finish // and ignores it
				return nil
			}
			t.Cleanup(hung.Wait)
			finished := sync.OnceFunc(func() { close(finish) })
			t.Cleanup(finished)
			worker := &testWorker[order]{}
			switch method {
			case "Process":
				worker.onProcess = func(ctx context.Context, _ goxstreams.Message[order]) error { return hang(ctx) }
				produce(t, client, topic, order{"cup", 1})
			case "ProcessBroken":
				worker.onBroken = func(ctx context.Context, _ goxstreams.BrokenMessage) error { return hang(ctx) }
				publish(t, client, topic, "no JSON")
			case "ProcessDead":
				worker.onProcess = fails[goxstreams.Message[order]](goxstreams.Permanent(errCode(1)))
				worker.onDead = func(ctx context.Context, _ goxstreams.Message[order]) error { return hang(ctx) }
				produce(t, client, topic, order{"unicorn", 1})
			}
			config := limited(client, 3)
			config.CloseTimeout = time.Second
			r := start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
			<-begun
			began := time.Now()
			r.stop(t)
			require.GreaterOrEqual(t, time.Since(began), config.CloseTimeout)
			require.ErrorIs(t, <-cause, goxstreams.ErrSubscriberClosed)
			require.Len(t, pendingOf(t, client, topic, testGroup), 1, "it is kept")
			finished() // too late: this acks nothing
			hung.Wait()
			require.Len(t, pendingOf(t, client, topic, testGroup), 1)

			// The next consumer continues with the message when the lease has
			// expired.
			next := &testWorker[order]{}
			config.ClaimMinIdle = minIdle
			start(t, next, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
			eventuallyDone(t, client, topic)
			want := map[string][3]int{"Process": {1, 0, 0}, "ProcessBroken": {0, 1, 0}, "ProcessDead": {0, 0, 1}}
			require.Equal(t, want[method], next.counts())
			if method == "Process" {
				processed, _, _ := next.calls()
				require.Zero(t, processed[0].RetryCount, "a shutdown is no delivery")
			}
		})
	}
}

func TestConsumer_RunAgain(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{}
	consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: grouped(client), Topic: topic}, nil)
	for i := range 3 { // one after the other
		r := run(t, consumer)
		produce(t, client, topic, order{"cup", i})
		eventually(t, func() bool { return worker.counts()[0] == i+1 })
		r.stop(t)
	}
	// At once: two subscriptions of one group.
	var meet sync.WaitGroup
	meet.Add(2)
	worker.onProcess = func(context.Context, goxstreams.Message[order]) error {
		meet.Done()
		meet.Wait()
		return nil
	}
	run(t, consumer)
	run(t, consumer)
	produce(t, client, topic, order{"cup", 3}, order{"cup", 4})
	eventually(t, func() bool { return worker.counts()[0] == 5 })
	eventuallyDone(t, client, topic)

	// A Run that cannot start returns an error.
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, consumer.Run(ended), context.Canceled)
	require.NoError(t, client.Set(t.Context(), topic+"-text", "", time.Minute).Err())
	consumer = newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: grouped(client), Topic: topic + "-text"}, nil)
	require.ErrorContains(t, consumer.Run(t.Context()), "WRONGTYPE")
}

// startRouter runs a router, which is closed at the end of the test.
func startRouter(t testing.TB, router *message.Router) {
	t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		assert.NoError(t, router.Run(context.Background()))
	}()
	t.Cleanup(func() {
		require.NoError(t, router.Close())
		<-ended
	})
	<-router.Running()
}

func newRouter(t testing.TB) *message.Router {
	t.Helper()
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	require.NoError(t, err)
	return router
}

// In a router, other middlewares work as usual. Watermill's Retry calls the handler
// several times for one delivery: each time with a fresh body.
func TestConsumer_AddTo(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	var mu sync.Mutex
	seen := make(map[string][]int64) // by article: the retry counts
	worker := &testWorker[map[string]any]{}
	worker.onProcess = func(ctx context.Context, msg goxstreams.Message[map[string]any]) error {
		article, _ := msg.Body["Article"].(string)
		mu.Lock()
		defer mu.Unlock()
		seen[article] = append(seen[article], msg.RetryCount)
		clear(msg.Body) // changes by one attempt are not seen by the next
		msg.Metadata.Set("attempts", msg.Metadata.Get("attempts")+"x")
		switch {
		case article == "bomb":
			panic("bang")
		case article == "unicorn":
			return errCode(404)
		case article == "gone":
			return goxstreams.Permanent(errCode(410))
		case article == "kettle" && len(seen[article]) < 3:
			return errCode(503)
		}
		return nil
	}
	worker.onDead = func(context.Context, goxstreams.Message[map[string]any]) error { return goxstreams.ErrDead }
	produce(t, client, topic, order{"bomb", 1}, order{"unicorn", 1}, order{"gone", 1}, order{"kettle", 1}, order{"cup", 1})
	router := newRouter(t)
	router.AddMiddleware(
		middleware.CorrelationID,
		middleware.Recoverer,
		middleware.Retry{MaxRetries: 2, InitialInterval: time.Millisecond, Logger: watermill.NopLogger{}}.Middleware,
	)
	consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic}, nil)
	require.NotNil(t, consumer.AddTo(router))
	require.Contains(t, router.Handlers(), testGroup+":"+topic, "the default name")
	require.Panics(t, func() { consumer.AddTo(router) }, "the name is taken")
	other := newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 1), Topic: topic, Name: "other"}, nil)
	other.AddTo(router) // the same topic and group: they share it
	startRouter(t, router)
	eventually(t, func() bool { return len(deadOf(t, client, topic)) == 3 })
	eventuallyDone(t, client, topic)

	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, map[string][]int64{
		"bomb":    {0, 0, 0, 1}, // a panic of Process is an error to Watermill's Retry
		"unicorn": {0, 0, 0, 1}, // which stops at a dead message: the error of the last delivery
		"gone":    {0},          // Watermill's Retry honors Permanent
		"kettle":  {0, 0, 0},
		"cup":     {0},
	}, seen)
	for _, d := range deadOf(t, client, topic) {
		require.Contains(t, []string{testGroup + ":" + topic, "other"}, d.Handler)
		require.NotContains(t, d.Message.Metadata, "attempts", "the message as it was published")
		require.NotContains(t, d.Message.Metadata, middleware.CorrelationIDMetadataKey)
	}
}

// A router's own Retry middleware gives way to the Consumer's policy.
func TestConsumer_AddToIsInnermost(t *testing.T) {
	t.Parallel()
	for name, outer := range map[string]goxstreams.Retry{
		"ShouldRetry": {ShouldRetry: func(middleware.RetryParams) bool { return false }},
		"MaxRetries":  {MaxRetries: -1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			worker := &testWorker[order]{}
			worker.onProcess = func(context.Context, goxstreams.Message[order]) error { return errCode(1) }
			produce(t, client, topic, order{"unicorn", 1})
			router := newRouter(t)
			router.AddMiddleware(outer.Middleware)
			newConsumer(t, worker, goxstreams.ConsumerConfig{Subscriber: limited(client, 5), Topic: topic}, nil).AddTo(router)
			startRouter(t, router)
			eventually(t, func() bool { return worker.counts()[2] == 1 })
			eventuallyDone(t, client, topic)
			require.Equal(t, [3]int{6, 0, 1}, worker.counts())
		})
	}
}

// A Consumer's middlewares see each delivery, the first one outermost, and what becomes of
// it; with a router and without. What they return as an error counts, and so does their panic.
func TestConsumer_Middlewares(t *testing.T) {
	t.Parallel()
	for _, routed := range []bool{false, true} {
		t.Run(fmt.Sprintf("router=%v", routed), func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			var mu sync.Mutex
			var seen []string
			see := func(name string) message.HandlerMiddleware {
				return func(h message.HandlerFunc) message.HandlerFunc {
					return func(msg *message.Message) ([]*message.Message, error) {
						_, err := h(msg)
						mu.Lock()
						defer mu.Unlock()
						seen = append(seen, fmt.Sprintf("%s %d %s", name, delivery(t, msg).RetryCount(), goxstreams.OutcomeOf(msg, err)))
						return []*message.Message{message.NewMessage("dropped", nil)}, err
					}
				}
			}
			panicsFirst := func(h message.HandlerFunc) message.HandlerFunc {
				return func(msg *message.Message) ([]*message.Message, error) {
					if delivery(t, msg).RetryCount() == 0 {
						panic("a middleware's")
					}
					return h(msg)
				}
			}
			worker := &testWorker[order]{onProcess: fails[goxstreams.Message[order]](errors.New("refused"), goxstreams.Permanent(errors.New("no")))}
			consumer := newConsumer(t, worker, goxstreams.ConsumerConfig{
				Subscriber: limited(client, 5), Topic: topic, Middlewares: []message.HandlerMiddleware{panicsFirst, see("outer"), see("inner")},
			}, nil)
			produce(t, client, topic, order{"cup", 4})
			if routed {
				router := newRouter(t)
				consumer.AddTo(router)
				startRouter(t, router)
			} else {
				run(t, consumer)
			}
			eventually(t, func() bool { return worker.counts()[2] == 1 })
			eventuallyDone(t, client, topic)
			require.Equal(t, [3]int{2, 0, 1}, worker.counts())
			mu.Lock()
			defer mu.Unlock()
			require.Equal(t, []string{"inner 1 retried", "outer 1 retried", "inner 2 dead", "outer 2 dead"}, seen)
		})
	}
}

func TestNewConsumer_Errors(t *testing.T) {
	worker := &testWorker[order]{}
	client := redis.NewClient(&redis.Options{})
	t.Cleanup(func() { _ = client.Close() })
	_, err := goxstreams.NewConsumer[order](nil, goxstreams.ConsumerConfig{Subscriber: goxstreams.SubscriberConfig{
		OnBroken:       func(context.Context, goxstreams.BrokenMessage) error { return nil },
		OnDead:         func(context.Context, goxstreams.DeadMessage) {},
		MaxConcurrency: -1,
		StartID:        "yesterday",
		Retry:          &goxstreams.Retry{MaxRetries: -2},
		Unmarshaler:    goxstreams.BodyMarshaler{MetadataField: "body"},
	}}, nil)
	for _, part := range []string{
		"a worker is required",
		"ConsumerConfig.Topic: is required",
		"ConsumerConfig.Subscriber.OnBroken: cannot be set: it is the worker's ProcessBroken",
		"ConsumerConfig.Subscriber.OnDead: cannot be set: it is the worker's ProcessDead",
		"SubscriberConfig.Client: is required",
		"SubscriberConfig.MaxConcurrency: is negative: -1",
		"SubscriberConfig.StartID: ",
		"SubscriberConfig.Retry.MaxRetries: is -2",
		"SubscriberConfig.Retry: needs a ConsumerGroup",
		"SubscriberConfig.Unmarshaler: BodyMarshaler",
	} {
		require.ErrorContains(t, err, part)
	}
	require.Len(t, strings.Split(err.Error(), "\n"), 10, "%v", err)

	for name, change := range map[string]func(*goxstreams.ConsumerConfig){
		"ConsumerConfig.Topic": func(c *goxstreams.ConsumerConfig) { c.Topic = "" },
		"Subscriber.OnBroken":  func(c *goxstreams.ConsumerConfig) { c.Subscriber.OnBroken = worker.ProcessBroken },
		"ConsumerConfig.Middlewares[1]: is nil": func(c *goxstreams.ConsumerConfig) {
			c.Middlewares = []message.HandlerMiddleware{goxstreams.Retry{}.Middleware, nil}
		},
		"SubscriberConfig.Client": func(c *goxstreams.ConsumerConfig) { c.Subscriber.Client = nil },
	} {
		config := goxstreams.ConsumerConfig{Subscriber: grouped(client), Topic: "orders"}
		_, err := goxstreams.NewConsumer(worker, config, nil)
		require.NoError(t, err)
		change(&config)
		consumer, err := goxstreams.NewConsumer(worker, config, nil)
		require.ErrorContains(t, err, name)
		require.Len(t, strings.Split(err.Error(), "\n"), 1, "%v", err)
		require.Nil(t, consumer)
	}
}

// lineCodec writes an order as a line of text.
type lineCodec struct{}

func (lineCodec) Encode(event any) ([]byte, error) {
	o := event.(order)
	return fmt.Appendf(nil, "%d x %s", o.Quantity, o.Article), nil
}

func (lineCodec) Decode(payload []byte, event any) error {
	quantity, article, ok := strings.Cut(string(payload), " x ")
	n, err := strconv.Atoi(quantity)
	if !ok || err != nil {
		return fmt.Errorf("%q is no order", payload)
	}
	*event.(*order) = order{article, n}
	return nil
}

func TestConsumer_Codec(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	producer := goxstreams.NewProducer[order](newPublisher(t, client), goxstreams.ProducerConfig{Codec: lineCodec{}})
	require.NoError(t, producer.Produce(t.Context(), order{"cup", 4}, topic))
	produce(t, client, topic, order{"in JSON", 1})
	require.NoError(t, producer.Produce(t.Context(), order{"unicorn", 1}, topic))
	require.Equal(t, "4 x cup", client.XRange(t.Context(), topic, "-", "+").Val()[0].Values["payload"])
	worker := &testWorker[order]{}
	worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
		if msg.Body.Article == "unicorn" {
			return goxstreams.Permanent(errCode(1))
		}
		return nil
	}
	start(t, worker, goxstreams.ConsumerConfig{Subscriber: grouped(client), Topic: topic, Codec: lineCodec{}})
	eventually(t, func() bool { return worker.counts() == [3]int{2, 1, 1} })
	eventuallyDone(t, client, topic)
	processed, broken, dead := worker.calls()
	require.Equal(t, order{"cup", 4}, processed[0].Body)
	require.Equal(t, order{"unicorn", 1}, dead[0].Body, "decoded by the same Codec")
	require.ErrorContains(t, broken[0].Err, "is no order")
}

type traceKey struct{}

func TestConsumer_ContextAndMetadata(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	shared := message.Metadata{"service": "shop"} // the caller's map, shared by all
	producer := goxstreams.NewProducer[order](newPublisher(t, client), goxstreams.ProducerConfig{
		Metadata: func(ctx context.Context) message.Metadata {
			if trace, ok := ctx.Value(traceKey{}).(string); ok {
				return message.Metadata{"trace": trace}
			}
			return shared
		},
	})
	require.NoError(t, producer.Produce(context.WithValue(t.Context(), traceKey{}, "4711"), order{"unicorn", 1}, topic))
	require.NoError(t, producer.ProduceBatch(t.Context(), []order{{"cup", 1}, {"cup", 2}}, topic))
	require.Equal(t, message.Metadata{"service": "shop"}, shared)

	worker := &testWorker[order]{}
	var mu sync.Mutex
	var traces []any
	look := func(ctx context.Context, msg goxstreams.Message[order]) {
		mu.Lock()
		defer mu.Unlock()
		traces = append(traces, ctx.Value(traceKey{}))
		_, ok := goxstreams.DeliveryFromContext(ctx)
		assert.Equal(t, msg.Err == nil, ok, "Process knows its delivery")
		msg.Metadata.Set("service", "changed") // the message's own map
	}
	worker.onProcess = func(ctx context.Context, msg goxstreams.Message[order]) error {
		look(ctx, msg)
		if msg.Body.Article == "unicorn" {
			return goxstreams.Permanent(errCode(1))
		}
		return nil
	}
	worker.onDead = func(ctx context.Context, dead goxstreams.Message[order]) error { look(ctx, dead); return nil }
	ctx := context.WithValue(t.Context(), traceKey{}, "Run's")
	runWith(t, ctx, newConsumer(t, worker, goxstreams.ConsumerConfig{
		Subscriber: grouped(client), Topic: topic,
		Context: func(ctx context.Context, metadata message.Metadata) context.Context {
			assert.Equal(t, "Run's", ctx.Value(traceKey{}))
			if metadata.Get("trace") == "" {
				return ctx
			}
			return context.WithValue(ctx, traceKey{}, metadata.Get("trace"))
		},
	}, nil))
	eventually(t, func() bool { return worker.counts() == [3]int{3, 0, 1} })
	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, []any{"4711", "4711", "Run's", "Run's"}, traces)
	processed, _, _ := worker.calls()
	processed[1].Metadata.Set("own", "1")
	require.NotContains(t, processed[2].Metadata, "own", "two messages share their metadata")
}

// A Context that returns nil is a mistake. It is reported, and costs no message.
func TestConsumer_ContextReturnsNil(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{}
	var fixed atomic.Bool
	produce(t, client, topic, order{"cup", 1})
	log := newLogRecorder()
	run(t, newConsumer(t, worker, goxstreams.ConsumerConfig{
		Subscriber: limited(client, 1), Topic: topic,
		Context: func(ctx context.Context, _ message.Metadata) context.Context {
			if fixed.Load() {
				return ctx
			}
			return nil
		},
	}, log))
	eventually(t, func() bool { return len(log.Errors()) >= 5 })
	for _, line := range log.Errors() {
		require.Contains(t, line, "ConsumerConfig.Context returned nil")
	}
	require.Equal(t, [3]int{}, worker.counts())
	require.Len(t, pendingOf(t, client, topic, testGroup), 1)
	fixed.Store(true)
	eventually(t, func() bool { return worker.counts() == [3]int{0, 0, 1} }, "its retries are used up, it is not lost")
	eventuallyDone(t, client, topic)
}

// kindOfE passes the events, and entries of another program, through a Consumer.
func kindOfE[E any](t *testing.T, want []E, raw ...string) {
	t.Run(fmt.Sprintf("%T", *new(E)), func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		produce(t, client, topic, want[:len(want)-len(raw)]...)
		publish(t, client, topic, raw...)
		publish(t, client, topic, "no JSON")
		worker := &testWorker[E]{}
		worker.onProcess = func(context.Context, goxstreams.Message[E]) error { return goxstreams.Permanent(errCode(1)) }
		start(t, worker, goxstreams.ConsumerConfig{Subscriber: grouped(client), Topic: topic})
		eventually(t, func() bool { return worker.counts() == [3]int{len(want), 1, len(want)} })
		eventuallyDone(t, client, topic)
		processed, broken, dead := worker.calls()
		for i := range want {
			require.Equal(t, want[i], processed[i].Body)
			require.Equal(t, want[i], dead[i].Body)
		}
		require.NotContains(t, broken[0].Err.Error(), "nil")
	})
}

func TestConsumer_KindsOfE(t *testing.T) {
	t.Parallel()
	kindOfE(t, []order{{"cup", 1}, {}, {}}, "null")
	kindOfE(t, []*order{{"cup", 1}, nil, nil}, "null")
	kindOfE(t, []map[string]int{{"cup": 1}, {}, nil, nil}, "null")
	kindOfE(t, []any{"cup", 1.5, map[string]any{"a": []any{true}}, nil, nil, "x"}, "null", `"x"`)
	kindOfE(t, []string{"cup", "", "häuser", ""}, "null")
	kindOfE(t, [][]byte{[]byte("\x00\xff"), {}})
	kindOfE(t, []int{7, -7})
	kindOfE(t, []struct{}{{}, {}}, `{"unknown": 1}`)
	kindOfE(t, []json.RawMessage{json.RawMessage(`{"a":1}`), json.RawMessage("null")}, "null")
}

func TestProducer(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	producer := goxstreams.NewProducer[order](newPublisher(t, client), goxstreams.ProducerConfig{})
	stored := func(t *testing.T, topic string) (payloads []string) {
		for _, e := range client.XRange(t.Context(), topic, "-", "+").Val() {
			payloads = append(payloads, e.Values["payload"].(string))
		}
		return payloads
	}
	t.Run("in order", func(t *testing.T) {
		topic := topic(t)
		require.NoError(t, producer.Produce(t.Context(), order{"0", 0}, topic))
		events := make([]order, 100)
		want := []string{`{"Article":"0","Quantity":0}`}
		for i := range events {
			events[i] = order{strconv.Itoa(i + 1), i + 1}
			want = append(want, fmt.Sprintf(`{"Article":"%d","Quantity":%[1]d}`, i+1))
		}
		require.NoError(t, producer.ProduceBatch(t.Context(), events, topic))
		require.Equal(t, want, stored(t, topic))
		uuids := make(map[any]bool)
		for _, e := range client.XRange(t.Context(), topic, "-", "+").Val() {
			uuids[e.Values[goxstreams.UUIDHeaderKey]] = true
		}
		require.Len(t, uuids, 101)
		require.NotContains(t, uuids, "")
	})
	t.Run("in one call", func(t *testing.T) {
		pub := &countingPublisher{}
		producer := goxstreams.NewProducer[order](pub, goxstreams.ProducerConfig{})
		require.NoError(t, producer.ProduceBatch(t.Context(), make([]order, 10), "topic"))
		require.Equal(t, []int{10}, pub.calls, "the messages of each call: all or none")
	})
	t.Run("nothing", func(t *testing.T) {
		topic := topic(t)
		require.NoError(t, producer.ProduceBatch(t.Context(), nil, topic))
		require.NoError(t, producer.ProduceBatch(t.Context(), []order{}, topic))
		require.Zero(t, client.Exists(t.Context(), topic).Val())
	})
	t.Run("context", func(t *testing.T) {
		topic := topic(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errors.New("the user left"))
		require.ErrorIs(t, producer.Produce(ctx, order{}, topic), context.Canceled)
		require.ErrorIs(t, producer.ProduceBatch(ctx, []order{{}, {}}, topic), context.Canceled)
		late, cancelLate := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
		defer cancelLate()
		err := producer.Produce(late, order{}, topic)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, topic)
		require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		require.Zero(t, client.Exists(t.Context(), topic).Val())
	})
	t.Run("its end later on is ignored", func(t *testing.T) {
		topic := topic(t)
		ctx, cancel := context.WithCancel(t.Context())
		producer := goxstreams.NewProducer[order](newPublisher(t, client), goxstreams.ProducerConfig{
			Metadata: func(context.Context) message.Metadata { cancel(); return nil },
		})
		require.NoError(t, producer.ProduceBatch(ctx, []order{{}, {}}, topic))
		require.Len(t, stored(t, topic), 2)
	})
	t.Run("no Publisher", func(t *testing.T) {
		producer := goxstreams.NewProducer[order](nil, goxstreams.ProducerConfig{})
		require.ErrorContains(t, producer.Produce(t.Context(), order{}, "topic"), "nil Publisher")
		require.ErrorContains(t, producer.ProduceBatch(t.Context(), []order{{}}, "topic"), "nil Publisher")
	})
	t.Run("what Publish refuses", func(t *testing.T) {
		topic := topic(t)
		producer := goxstreams.NewProducer[order](newPublisher(t, client), goxstreams.ProducerConfig{
			Metadata: func(context.Context) message.Metadata { return message.Metadata{goxstreams.UUIDHeaderKey: "mine"} },
		})
		require.ErrorContains(t, producer.ProduceBatch(t.Context(), []order{{}, {}}, topic), "reserved")
		require.Zero(t, client.Exists(t.Context(), topic).Val())
		require.ErrorContains(t, producer.Produce(t.Context(), order{}, ""), "the topic is empty")
	})
	t.Run("outcome unknown", func(t *testing.T) {
		hook, lost := loseReply(1, isCommand("xadd"))
		unlucky := newClient(t, hook)
		producer := goxstreams.NewProducer[order](newPublisher(t, unlucky), goxstreams.ProducerConfig{})
		require.ErrorIs(t, producer.Produce(t.Context(), order{}, topic(t)), goxstreams.ErrOutcomeUnknown)
		require.EqualValues(t, 1, lost.Load())
	})
}

type countingPublisher struct{ calls []int }

func (p *countingPublisher) Publish(_ string, messages ...*message.Message) error {
	p.calls = append(p.calls, len(messages))
	return nil
}

func (*countingPublisher) Close() error { return nil }

func TestConsumer_FanOut(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := goxstreams.SubscriberConfig{Client: client, StartID: "0"}
	var workers []*testWorker[order]
	for range 2 {
		worker := &testWorker[order]{}
		var failed atomic.Int64
		worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
			switch {
			case msg.Body.Article == "kettle" && failed.Add(1) < 3:
				return errCode(503)
			case msg.Body.Article == "unicorn":
				return goxstreams.Permanent(errCode(410))
			}
			return nil
		}
		worker.onBroken = fails[goxstreams.BrokenMessage](errors.New("not now"), goxstreams.ErrDead)
		worker.onDead = fails[goxstreams.Message[order]](errors.New("not now"), goxstreams.ErrDead)
		workers = append(workers, worker)
		start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
	}
	produce(t, client, topic, order{"cup", 1}, order{"kettle", 1}, order{"unicorn", 1})
	publish(t, client, topic, "no JSON")
	produce(t, client, topic, order{"cup", 2})
	for _, worker := range workers {
		eventually(t, func() bool { return worker.counts() == [3]int{6, 2, 2} })
		processed, broken, dead := worker.calls()
		require.EqualValues(t, 2, processed[3].RetryCount, "counted by the subscription itself")
		require.Equal(t, order{"cup", 2}, processed[5].Body)
		require.Equal(t, order{"unicorn", 1}, dead[1].Body)
		require.ErrorIs(t, dead[1].Err, goxstreams.ErrPermanent)
		require.ErrorIs(t, dead[1].Err, errCode(410))
		require.Equal(t, "no JSON", fieldOf(broken[1].Fields, "payload"))
	}
	require.Empty(t, deadOf(t, client, topic), "every subscriber would store it")
}

func fieldOf(fields []string, name string) string {
	for i := 0; i+1 < len(fields); i += 2 {
		if fields[i] == name {
			return fields[i+1]
		}
	}
	return ""
}

func TestConsumer_NoAck(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	worker := &testWorker[order]{}
	worker.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
		if msg.Body.Article == "unicorn" {
			return goxstreams.Permanent(errCode(410))
		}
		return errCode(503)
	}
	worker.onBroken = func(context.Context, goxstreams.BrokenMessage) error { return errCode(1) }
	produce(t, client, topic, order{"unicorn", 1}, order{"kettle", 1})
	publish(t, client, topic, "no JSON")
	produce(t, client, topic, order{"cup", 1})
	config := grouped(client)
	config.NoAck = true
	r := start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
	eventually(t, func() bool { return worker.counts()[0] == 3 && worker.counts()[1] == 1 })
	r.stop(t)
	require.Equal(t, [3]int{3, 1, 0}, worker.counts(), "at most once, whatever the worker says")
	require.Empty(t, pendingOf(t, client, topic, testGroup))
	require.Empty(t, deadOf(t, client, topic))
}

func TestConsumer_MaxConcurrency(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	const concurrency, n = 8, 200
	worker := &testWorker[order]{}
	var now, most atomic.Int64
	full := make(chan struct{})
	isFull := sync.OnceFunc(func() { close(full) })
	worker.onProcess = func(ctx context.Context, msg goxstreams.Message[order]) error {
		defer now.Add(-1)
		at := now.Add(1)
		for m := most.Load(); at > m && !most.CompareAndSwap(m, at); m = most.Load() {
		}
		if at == concurrency {
			isFull()
		}
		<-full
		if msg.Body.Quantity%10 == 0 && msg.RetryCount < 2 {
			return errCode(msg.Body.Quantity)
		}
		if msg.Body.Quantity%50 == 1 {
			return goxstreams.Permanent(errCode(msg.Body.Quantity))
		}
		return nil
	}
	worker.onDead = func(_ context.Context, dead goxstreams.Message[order]) error {
		var code errCode
		if assert.ErrorAs(t, dead.Err, &code) {
			assert.EqualValues(t, dead.Body.Quantity, code, "another message's error")
		}
		return goxstreams.ErrDead
	}
	events := make([]order, n)
	for i := range events {
		events[i].Quantity = i
	}
	produce(t, client, topic, events...)
	config := limited(client, 3)
	config.MaxConcurrency = concurrency
	start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
	eventually(t, func() bool { return worker.counts() == [3]int{n + 2*n/10, 0, n / 50} })
	eventuallyDone(t, client, topic)
	require.EqualValues(t, concurrency, most.Load(), "at once")
	require.Len(t, deadOf(t, client, topic), n/50)
}

// A dead-letter stream is a topic like any other. Its entries have their own
// format, whatever the topic's format is.
func TestConsumer_OverDeadLetters(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: goxstreams.BodyMarshaler{}}, nil)
	require.NoError(t, err)
	producer := goxstreams.NewProducer[order](pub, goxstreams.ProducerConfig{})
	require.NoError(t, producer.ProduceBatch(t.Context(), []order{{"unicorn", 1}, {"unicorn", 2}}, topic))
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"body", "no JSON"}}).Err())
	config := goxstreams.ConsumerConfig{Subscriber: limited(client, -1), Topic: topic, Name: "ship"}
	config.Subscriber.Unmarshaler = goxstreams.BodyMarshaler{}
	start(t, &testWorker[order]{
		onProcess: func(context.Context, goxstreams.Message[order]) error { return errCode(410) },
		onBroken:  fails[goxstreams.BrokenMessage](goxstreams.ErrDead),
		onDead:    func(context.Context, goxstreams.Message[order]) error { return goxstreams.ErrDead },
	}, config)
	eventually(t, func() bool { return len(deadOf(t, client, topic)) == 3 })

	second := &testWorker[order]{}
	second.onProcess = func(_ context.Context, msg goxstreams.Message[order]) error {
		if msg.Body.Quantity == 2 {
			return errCode(500)
		}
		return nil
	}
	second.onDead = func(context.Context, goxstreams.Message[order]) error { return goxstreams.ErrDead } // there is no further stream
	second.onBroken = func(context.Context, goxstreams.BrokenMessage) error { return goxstreams.ErrDead }
	config.Topic = goxstreams.DeadLetterTopic(topic)
	config.Subscriber.Retry = &goxstreams.Retry{MaxRetries: -1, InitialInterval: time.Millisecond, MaxInterval: time.Hour}
	config.Subscriber.MaxConcurrency = 5
	log := newLogRecorder()
	run(t, newConsumer(t, second, config, log))
	eventually(t, func() bool { return second.counts() == [3]int{2, 1, 1} })
	eventually(t, func() bool { return len(pendingOf(t, client, config.Topic, testGroup)) == 2 })
	processed, broken, _ := second.calls()
	for _, msg := range processed {
		require.Equal(t, "unicorn", msg.Body.Article)
		require.Equal(t, "code 410", msg.Metadata.Get(middleware.ReasonForPoisonedKey))
		require.Equal(t, "ship", msg.Metadata.Get(middleware.PoisonedHandlerKey))
	}
	fields, err := goxstreams.UnpackFields([]byte(fieldOf(broken[0].Fields, "payload")))
	require.NoError(t, err)
	require.Equal(t, []string{"body", "no JSON"}, fields)
	require.Len(t, deadOf(t, client, topic), 3, "the entries of the stream stay where they are")
	require.Zero(t, client.Exists(t.Context(), goxstreams.DeadLetterTopic(config.Topic)).Val(), "dead letters of dead letters")
	eventually(t, func() bool { return len(logLinesWith(log.Errors(), "died on a dead-letter stream")) == 2 }, log)
}

// goxstreamsEvent is the event type of testdata/goxstreams.json, which goxstreams
// itself wrote (v0 of October 2023, Produce and ProduceBatch, "ctx" by a Producer
// WithCtxTransmmiter): the raw fields of each entry.
type goxstreamsEvent struct {
	Message, Name string
	Foo, Bar      int
	SubEvent      struct {
		BarBar string
		FooFoo struct{ FooFooFoo int }
	}
}

func goxstreamsEvents() []goxstreamsEvent {
	events := []goxstreamsEvent{
		{Message: "message", Name: "name", Foo: 712, Bar: 947},
		{Bar: -1},
		{Message: "häuser <&> \u2028 \"quoted\" \x00", Name: "名前", Foo: 1 << 40},
	}
	events[0].SubEvent.BarBar, events[0].SubEvent.FooFoo.FooFooFoo = "1234", 777
	events[2].SubEvent.BarBar, events[2].SubEvent.FooFoo.FooFooFoo = `\`, -7
	return events
}

func goxstreamsFixture(t testing.TB) (fixture struct{ Plain, Ctx [][]string }) {
	t.Helper()
	data, err := os.ReadFile("testdata/goxstreams.json")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(data, &fixture))
	return fixture
}

// A stream that goxstreams wrote is consumed here.
func TestInterop_FromGoxstreams(t *testing.T) {
	t.Parallel()
	fixture := goxstreamsFixture(t)
	trace := message.Metadata{"trace_id": "my_trace_id", "any_info": "info <&>"}
	for name, tt := range map[string]struct {
		entries   [][]string
		marshaler goxstreams.BodyMarshaler
		metadata  message.Metadata
	}{
		"plain":                      {fixture.Plain, goxstreams.BodyMarshaler{}, message.Metadata{}},
		"plain, metadata is awaited": {fixture.Plain, goxstreams.BodyMarshaler{MetadataField: "ctxField"}, message.Metadata{}},
		"ctx":                        {fixture.Ctx, goxstreams.BodyMarshaler{MetadataField: "ctxField"}, trace},
		"ctx is not asked for":       {fixture.Ctx, goxstreams.BodyMarshaler{}, message.Metadata{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			var ids []string
			for _, fields := range tt.entries {
				id, err := client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: fields}).Result()
				require.NoError(t, err)
				ids = append(ids, id)
			}
			worker := &testWorker[goxstreamsEvent]{}
			config := grouped(client)
			config.Unmarshaler = tt.marshaler
			start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
			eventually(t, func() bool { return worker.counts()[0] == len(tt.entries) })
			eventuallyDone(t, client, topic)
			processed, broken, dead := worker.calls()
			require.Empty(t, broken)
			require.Empty(t, dead)
			for i, event := range goxstreamsEvents() {
				require.Equal(t, goxstreams.Message[goxstreamsEvent]{ID: ids[i], Body: event, Metadata: tt.metadata}, processed[i])
			}
			if len(tt.entries) > 3 { // a Transmitter that returned no map
				require.Equal(t, goxstreamsEvents()[0], processed[3].Body)
				require.Equal(t, message.Metadata{}, processed[3].Metadata)
			}
		})
	}
}

// What is produced here has the bytes that goxstreams writes, and nothing else;
// in the context field also the UUID, which its receivers do not look for.
func TestInterop_ToGoxstreams(t *testing.T) {
	t.Parallel()
	fixture := goxstreamsFixture(t)
	client := newClient(t)
	stored := func(marshaler goxstreams.BodyMarshaler) (entries [][]string) {
		topic := topic(t)
		pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: marshaler}, nil)
		require.NoError(t, err)
		producer := goxstreams.NewProducer[goxstreamsEvent](pub, goxstreams.ProducerConfig{
			Metadata: func(context.Context) message.Metadata {
				return message.Metadata{"trace_id": "my_trace_id", "any_info": "info <&>"}
			},
		})
		events := goxstreamsEvents()
		require.NoError(t, producer.Produce(t.Context(), events[0], topic))
		require.NoError(t, producer.ProduceBatch(t.Context(), events[1:], topic))
		reply, err := client.Do(t.Context(), "XRANGE", topic, "-", "+").Slice()
		require.NoError(t, err)
		for _, e := range reply {
			var fields []string
			for _, f := range e.([]any)[1].([]any) {
				fields = append(fields, f.(string))
			}
			entries = append(entries, fields)
		}
		return entries
	}
	require.Equal(t, fixture.Plain, stored(goxstreams.BodyMarshaler{}))

	got := stored(goxstreams.BodyMarshaler{MetadataField: "ctxField"})
	require.Len(t, got, 3)
	for i, fields := range got {
		require.Len(t, fields, 4)
		var metadata map[string]string
		require.NoError(t, json.Unmarshal([]byte(fields[3]), &metadata))
		require.NotEmpty(t, metadata[goxstreams.UUIDHeaderKey])
		delete(metadata, goxstreams.UUIDHeaderKey)
		rest, err := json.Marshal(metadata)
		require.NoError(t, err)
		require.Equal(t, fixture.Ctx[i], append(fields[:3:3], string(rest)))
	}
}

// Whoever forgets BodyMarshaler is told so, in both directions.
func TestInterop_ForgottenBodyMarshaler(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		writes goxstreams.Marshaler
		reads  goxstreams.Unmarshaler
		want   string
	}{
		"to read":  {goxstreams.BodyMarshaler{}, nil, `field "_watermill_message_uuid" is missing, but field "body" is present: use BodyMarshaler for the format of goxstreams`},
		"to write": {nil, goxstreams.BodyMarshaler{}, `field "body" is missing, but field "_watermill_message_uuid" is present: use DefaultMarshaler for this format`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Marshaler: tt.writes}, nil)
			require.NoError(t, err)
			require.NoError(t, goxstreams.NewProducer[order](pub, goxstreams.ProducerConfig{}).Produce(t.Context(), order{"cup", 1}, topic))
			worker := &testWorker[order]{}
			config := grouped(client)
			config.Unmarshaler = tt.reads
			start(t, worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: topic})
			eventually(t, func() bool { return worker.counts() == [3]int{0, 1, 0} })
			_, broken, _ := worker.calls()
			require.ErrorIs(t, broken[0].Err, goxstreams.ErrBroken)
			require.ErrorContains(t, broken[0].Err, tt.want)
		})
	}
}
