package goxstreams_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// batchWorker records its batches, and then does what its function says. For broken and
// dead messages it is a testWorker.
type batchWorker struct {
	testWorker[string]
	onBatch func(ctx context.Context, batch []goxstreams.Message[string]) []error // nil: returns nil

	batches [][]goxstreams.Message[string]
}

func (w *batchWorker) Process(context.Context, goxstreams.Message[string]) error {
	panic("Process of a BatchWorker")
}

func (w *batchWorker) ProcessBatch(ctx context.Context, batch []goxstreams.Message[string]) []error {
	w.mu.Lock()
	w.batches = append(w.batches, batch)
	w.mu.Unlock()
	if w.onBatch == nil {
		return nil
	}
	return w.onBatch(ctx, batch)
}

// sizes returns the batches' sizes.
func (w *batchWorker) sizes() (sizes []int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.batches {
		sizes = append(sizes, len(b))
	}
	return sizes
}

// all returns what was passed to ProcessBatch, in its order.
func (w *batchWorker) all() []goxstreams.Message[string] {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Concat(w.batches...)
}

func bodies(batch []goxstreams.Message[string]) (bodies []string) {
	for _, msg := range batch {
		bodies = append(bodies, msg.Body)
	}
	return bodies
}

// each returns a function that returns an error for each message.
func each(f func(goxstreams.Message[string]) error) func(context.Context, []goxstreams.Message[string]) []error {
	return func(_ context.Context, batch []goxstreams.Message[string]) []error {
		errs := make([]error, len(batch))
		for i, msg := range batch {
			errs[i] = f(msg)
		}
		return errs
	}
}

func newBatchConsumer(t testing.TB, worker goxstreams.BatchWorker[string], config goxstreams.BatchConsumerConfig, logger watermill.LoggerAdapter) *goxstreams.BatchConsumer[string] {
	t.Helper()
	if config.Subscriber.ClaimInterval == 0 {
		config.Subscriber.ClaimInterval = 50 * time.Millisecond
	}
	if config.Subscriber.CloseTimeout == 0 {
		config.Subscriber.CloseTimeout = patience
	}
	shortBlocks(t, &config.Subscriber)
	consumer, err := goxstreams.NewBatchConsumer(worker, config, logger)
	require.NoError(t, err)
	return consumer
}

// numbers returns "0" to "n-1".
func numbers(n int) (numbers []string) {
	for i := range n {
		numbers = append(numbers, strconv.Itoa(i))
	}
	return numbers
}

func TestBatchConsumerConfig(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	_, err := goxstreams.NewBatchConsumer[string](nil, goxstreams.BatchConsumerConfig{MaxSize: -1, MaxWait: -time.Second, Subscriber: goxstreams.SubscriberConfig{
		Client: client, OnBroken: func(context.Context, goxstreams.BrokenMessage) error { return nil },
	}}, nil)
	require.Error(t, err)
	assert.Equal(t, strings.TrimSpace(`
goxstreams: NewBatchConsumer: a worker is required
goxstreams: BatchConsumerConfig.MaxSize: is negative: -1
goxstreams: BatchConsumerConfig.MaxWait: is negative: -1s
goxstreams: BatchConsumerConfig.Topic: is required
goxstreams: BatchConsumerConfig.Subscriber.OnBroken: cannot be set: it is the worker's ProcessBroken`), err.Error())
	_, err = goxstreams.NewBatchConsumer(&batchWorker{}, goxstreams.BatchConsumerConfig{Topic: "t"}, nil)
	require.ErrorContains(t, err, "SubscriberConfig.Client")
}

// Full batches begin at once, whatever MaxWait is, in stream order. What waits for its batch
// has no slot, and is released uncounted when the subscription closes.
func TestBatchWorker_Sizes(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	events := numbers(250)
	produce(t, client, topic, events...)
	w := &batchWorker{}
	config := goxstreams.BatchConsumerConfig{Subscriber: grouped(client), Topic: topic, MaxWait: time.Hour}
	r := run(t, newBatchConsumer(t, w, config, nil))
	eventually(t, func() bool { return len(w.all()) == 200 }, "two full batches")
	eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == 50 }, "the rest was read, and waits")
	r.stop(t)
	assert.Equal(t, []int{100, 100}, w.sizes())
	assert.Equal(t, events[:200], bodies(w.all()))
	for _, p := range pendingOf(t, client, topic, testGroup) {
		assert.Zero(t, p.RetryCount)
	}

	rest := &batchWorker{}
	config.MaxWait = 0
	run(t, newBatchConsumer(t, rest, config, nil))
	eventually(t, func() bool { return len(rest.all()) == 50 })
	eventuallyDone(t, client, topic)
	assert.Equal(t, events[200:], bodies(rest.all()))
	for _, msg := range rest.all() {
		assert.Zero(t, msg.RetryCount)
	}
}

// MaxWait counts from the first message: later ones join its batch, and do not put it off.
func TestBatchWorker_MaxWait(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	const wait = 500 * time.Millisecond
	called := make(chan time.Time, 1)
	w := &batchWorker{onBatch: func(context.Context, []goxstreams.Message[string]) []error {
		select {
		case called <- time.Now():
		default:
		}
		return nil
	}}
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: grouped(client), Topic: topic, MaxWait: wait}, nil))
	began := time.Now()
	for i := 0; ; i++ { // more often than MaxWait, for ever
		produce(t, client, topic, strconv.Itoa(i))
		select {
		case at := <-called:
			assert.GreaterOrEqual(t, at.Sub(began), wait)
			assert.Equal(t, "0", w.all()[0].Body)
			return
		case <-time.After(wait / 20):
			require.Less(t, time.Since(began), patience, "the batch never begins")
		}
	}
}

// A single message waits no longer than MaxWait, and one that is due again joins a later
// batch.
func TestBatchWorker_Retry(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(10)...)
	var snoozed atomic.Bool
	w := &batchWorker{onBatch: each(func(msg goxstreams.Message[string]) error {
		switch {
		case msg.Body == "3" && msg.RetryCount < 2:
			return errors.New("not yet")
		case msg.Body == "4":
			return goxstreams.Permanent(errors.New("never"))
		case msg.Body == "5" && snoozed.CompareAndSwap(false, true):
			return goxstreams.Snooze(errors.New("later"), time.Millisecond)
		case msg.Body == "6":
			return errors.New("exhausted")
		}
		return nil
	})}
	var outcomes sync.Map
	config := limited(client, 2)
	config.OnOutcome = func(o goxstreams.Outcome) {
		n, _ := outcomes.LoadOrStore(o.Kind, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
	}
	log := newLogRecorder()
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, Name: "the handler", MaxWait: time.Millisecond}, log))
	eventuallyDone(t, client, topic)
	deliveries := make(map[string][]int64)
	for _, msg := range w.all() {
		deliveries[msg.Body] = append(deliveries[msg.Body], msg.RetryCount)
	}
	for _, body := range numbers(10) {
		want := []int64{0}
		switch body {
		case "3", "6":
			want = []int64{0, 1, 2}
		case "5":
			want = []int64{0, 0}
		}
		assert.Equal(t, want, deliveries[body], body)
	}
	_, _, dead := w.calls()
	require.Len(t, dead, 2)
	byBody := map[string]error{dead[0].Body: dead[0].Err, dead[1].Body: dead[1].Err}
	assert.ErrorIs(t, byBody["4"], goxstreams.ErrPermanent)
	assert.ErrorContains(t, byBody["4"], "never")
	assert.ErrorIs(t, byBody["6"], goxstreams.ErrRetriesExhausted)
	for kind, want := range map[goxstreams.OutcomeKind]int64{goxstreams.OutcomeAcked: 10, goxstreams.OutcomeRetried: 4, goxstreams.OutcomeSnoozed: 1} {
		n, ok := outcomes.Load(kind)
		require.True(t, ok, kind)
		assert.Equal(t, want, n.(*atomic.Int64).Load(), kind) // ProcessDead acks two
	}
	assert.Contains(t, strings.Join(log.Errors(), "\n"), "ProcessBatch failed")
}

// A nacked message holds up no others, with MaxConcurrency 1 either.
func TestBatchWorker_OthersGoOn(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(50)...)
	w := &batchWorker{onBatch: each(func(msg goxstreams.Message[string]) error {
		if n, _ := strconv.Atoi(msg.Body); n%5 == 0 {
			return goxstreams.RetryAfter(errors.New("later"), time.Hour)
		}
		return nil
	})}
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: grouped(client), Topic: topic, MaxSize: 7}, nil))
	eventually(t, func() bool { return len(w.all()) == 50 })
	assert.Equal(t, numbers(50), bodies(w.all()))
	eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == 10 })
}

// Messages that panic are found by halving their batch, at once: after log2(n) more calls
// for the first one. They are retried alone, and end as any others. The rest is handled in
// its first delivery.
func TestBatchWorker_Panic(t *testing.T) {
	t.Parallel()
	const n = 100
	halvings := int(math.Ceil(math.Log2(n)))
	for name, tt := range map[string]struct {
		poison func(i int) bool
		calls  int // at most, for the first delivery
	}{
		"first": {func(i int) bool { return i == 0 }, 1 + 2*(halvings+1)},
		"last":  {func(i int) bool { return i == n-1 }, 1 + 2*(halvings+1)},
		"one":   {func(i int) bool { return i == 61 }, 1 + 2*(halvings+1)},
		"three": {func(i int) bool { return i == 3 || i == 4 || i == 80 }, 1 + 3*2*(halvings+1)},
		"all":   {func(i int) bool { return true }, 1 + halvings + n},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			produce(t, client, topic, numbers(n)...)
			done := make(map[string]int64)
			first, found, panicked := 0, 0, make(map[string]int)
			w := &batchWorker{onBatch: func(_ context.Context, batch []goxstreams.Message[string]) []error {
				if first++; batch[0].RetryCount > 0 {
					first--
					assert.Len(t, batch, 1, "a retry of what panicked")
				}
				for _, msg := range batch {
					if i, _ := strconv.Atoi(msg.Body); tt.poison(i) {
						if len(batch) == 1 {
							if panicked[msg.Body]++; found == 0 {
								found = first
							}
						}
						panic("poison")
					}
				}
				for _, msg := range batch {
					_, again := done[msg.Body]
					assert.False(t, again, "%s is handled twice", msg.Body)
					done[msg.Body] = msg.RetryCount
				}
				return nil
			}}
			log := newLogRecorder()
			run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: limited(client, 2), Topic: topic, MaxWait: time.Minute}, log))
			eventuallyDone(t, client, topic)
			_, _, dead := w.calls()
			poisons := 0
			for i, body := range numbers(n) {
				if !tt.poison(i) {
					assert.Equal(t, int64(0), done[body])
					continue
				}
				poisons++
				assert.Equal(t, 3, panicked[body], "deliveries of %s, each alone in the end", body)
			}
			assert.Len(t, done, n-poisons)
			require.Len(t, dead, poisons)
			for _, msg := range dead {
				assert.EqualValues(t, 2, msg.RetryCount)
				require.ErrorIs(t, msg.Err, goxstreams.ErrRetriesExhausted)
				require.ErrorContains(t, msg.Err, "panic: poison")
			}
			assert.LessOrEqual(t, found, 2+halvings, "calls until the first one was found: the batch, its halves, and it alone")
			assert.LessOrEqual(t, first, tt.calls, "calls of the first delivery")
			t.Logf("%d calls, the first one was found by %d", first, found)
		})
	}
}

// A panic that does not come again fails nothing.
func TestBatchWorker_PanicOnce(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(64)...)
	var once sync.Once
	w := &batchWorker{onBatch: func(_ context.Context, batch []goxstreams.Message[string]) []error {
		defer func() { // what a worker does to its batch does not reach the next call
			for i := range batch {
				batch[i].Body = "changed"
			}
		}()
		once.Do(func() { panic("what a pity") })
		for _, msg := range batch {
			assert.NotEqual(t, "changed", msg.Body)
		}
		return nil
	}}
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: limited(client, -1), Topic: topic, MaxWait: time.Minute, MaxSize: 64}, nil))
	eventuallyDone(t, client, topic)
	assert.Zero(t, w.counts()[2], "dead")
	assert.Equal(t, []int{64, 32, 16, 8, 4, 2, 1, 1}, w.sizes())
}

// decodesOnce panics when it decodes a payload for the second time, and not after that.
type decodesOnce struct{ seen *sync.Map }

func (decodesOnce) Encode(event any) ([]byte, error) { return json.Marshal(event) }

func (d decodesOnce) Decode(payload []byte, event any) error {
	times, _ := d.seen.LoadOrStore(string(payload), new(atomic.Int64))
	if times.(*atomic.Int64).Add(1) == 2 {
		panic("only once")
	}
	return json.Unmarshal(payload, event)
}

// What a worker may have changed is decoded again. A Codec that panics then ended the process.
func TestBatchWorker_CodecPanicsLater(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(2)...)
	var once sync.Once
	w := &batchWorker{onBatch: func(context.Context, []goxstreams.Message[string]) []error {
		once.Do(func() { panic("what a pity") })
		return nil
	}}
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{
		Subscriber: limited(client, 5), Topic: topic, MaxWait: time.Minute, MaxSize: 2, Codec: decodesOnce{new(sync.Map)},
	}, nil))
	eventuallyDone(t, client, topic)
	assert.Zero(t, w.counts()[2], "dead")
}

// What is wrong with the call fails all of its messages; an error does not.
func TestBatchWorker_Misbehaves(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		once func() []error
		want string
	}{
		"too few errors":  {func() []error { return []error{} }, "ProcessBatch returned 0 errors for 10 messages"},
		"too many errors": {func() []error { return make([]error, 11) }, "ProcessBatch returned 11 errors for 10 messages"},
		"Goexit":          {func() []error { runtime.Goexit(); return nil }, "ProcessBatch called runtime.Goexit"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			produce(t, client, topic, numbers(10)...)
			var once atomic.Bool
			w := &batchWorker{onBatch: func(context.Context, []goxstreams.Message[string]) []error {
				if once.CompareAndSwap(false, true) {
					return tt.once()
				}
				return nil
			}}
			log := newLogRecorder()
			run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: limited(client, 1), Topic: topic, MaxSize: 10, MaxWait: 100 * time.Millisecond}, log))
			eventuallyDone(t, client, topic)
			all := w.all()
			require.Len(t, all, 20)
			for _, msg := range all[10:] {
				assert.EqualValues(t, 1, msg.RetryCount)
			}
			assert.Contains(t, strings.Join(log.Errors(), "\n"), tt.want)
		})
	}
}

// A malformed entry goes to ProcessBroken; the rest of its batch is handled.
func TestBatchWorker_Broken(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(5)...)
	publish(t, client, topic, "{") // no JSON
	addRaw(t, client, topic, "no", "message")
	produce(t, client, topic, "5", "6")
	w := &batchWorker{}
	w.onBroken = func(context.Context, goxstreams.BrokenMessage) error { return nil }
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: grouped(client), Topic: topic, MaxSize: 9, MaxWait: time.Minute}, nil))
	eventuallyDone(t, client, topic)
	assert.Equal(t, []int{7}, w.sizes())
	assert.Equal(t, numbers(7), bodies(w.all()))
	assert.Equal(t, 2, w.counts()[1])
}

// With OrderingKey a batch has one message of each key, and each key its order, also with
// nacks and several batches at a time.
func TestBatchWorker_OrderingKey(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	const keys, each = 7, 40
	var events []string
	for i := range keys * each {
		events = append(events, fmt.Sprintf("%d %d", i%keys, i/keys))
	}
	produce(t, client, topic, events...)
	key := func(body string) string { k, _, _ := strings.Cut(strings.Trim(body, `"`), " "); return k }
	var mu sync.Mutex
	running, next := make(map[string]bool), make(map[string]int)
	largest := 0
	w := &batchWorker{onBatch: func(_ context.Context, batch []goxstreams.Message[string]) []error {
		errs := make([]error, len(batch))
		mu.Lock()
		largest = max(largest, len(batch))
		for i, msg := range batch {
			k := key(msg.Body)
			assert.False(t, running[k], "two of key %s at once", k)
			running[k] = true
			assert.Equal(t, fmt.Sprint(k, " ", next[k]), msg.Body)
			if next[k]++; next[k]%5 == 0 && msg.RetryCount == 0 {
				next[k]--
				errs[i] = errors.New("once more")
			}
		}
		mu.Unlock()
		time.Sleep(time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		for _, msg := range batch {
			running[key(msg.Body)] = false
		}
		return errs
	}}
	config := limited(client, 3)
	config.MaxConcurrency = 3
	config.OrderingKey = func(msg *message.Message) string { return key(string(msg.Payload)) }
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 5, MaxWait: time.Millisecond}, nil))
	eventuallyDone(t, client, topic)
	for k, n := range next {
		assert.Equal(t, each, n, k)
	}
	assert.Greater(t, largest, 1)
	assert.Zero(t, w.counts()[2], "dead")
}

// MaxConcurrency is the number of batches.
func TestBatchWorker_MaxConcurrency(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(40)...)
	var running atomic.Int64
	release := make(chan struct{})
	w := &batchWorker{onBatch: func(context.Context, []goxstreams.Message[string]) []error {
		running.Add(1)
		<-release
		return nil
	}}
	config := grouped(client)
	config.MaxConcurrency = 3
	consumer := newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 10, MaxWait: time.Minute}, nil)
	run(t, consumer)
	eventually(t, func() bool { return running.Load() == 3 })
	eventually(t, func() bool { return consumer.Stats()[0].InFlight >= 30 })
	assert.EqualValues(t, 3, running.Load())
	close(release)
	eventuallyDone(t, client, topic)
	assert.Equal(t, []int{10, 10, 10, 10}, w.sizes())
}

// A batch that is interrupted by Close is released uncounted; what was handled is acked.
func TestBatchWorker_Close(t *testing.T) {
	testserver.RequireReal(t) // delivery counts set back
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(20)...)
	began := make(chan struct{})
	w := &batchWorker{onBatch: func(ctx context.Context, batch []goxstreams.Message[string]) []error {
		close(began)
		<-ctx.Done()
		errs := make([]error, len(batch))
		for i := range batch[10:] {
			errs[10+i] = context.Cause(ctx)
		}
		return errs
	}}
	config := limited(client, 1)
	config.CloseTimeout = 2 * time.Second // of which the last one is for what a canceled handler returns
	r := run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 20, MaxWait: time.Minute}, nil))
	<-began
	r.stop(t)
	pending := pendingOf(t, client, topic, testGroup)
	require.Len(t, pending, 10)
	for _, p := range pending {
		assert.Zero(t, p.RetryCount)
	}
}

// A worker that panics while the subscription closes is not called for every half.
func TestBatchWorker_ClosePanics(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(64)...)
	began, release := make(chan struct{}), make(chan struct{})
	w := &batchWorker{onBatch: func(context.Context, []goxstreams.Message[string]) []error {
		close(began)
		<-release
		panic("what a pity")
	}}
	ctx, cancel := context.WithCancel(t.Context())
	r := runWith(t, ctx, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: limited(client, 1), Topic: topic, MaxSize: 64, MaxWait: time.Minute}, nil))
	<-began
	cancel()
	close(release)
	r.stop(t)
	assert.Equal(t, []int{64}, w.sizes())
	pending := pendingOf(t, client, topic, testGroup)
	require.Len(t, pending, 64)
	for _, p := range pending {
		assert.Zero(t, p.RetryCount)
	}
}

// Run returns at CloseTimeout although a batch does not. Its messages are not released, and
// this delivery does not count.
func TestBatchWorker_Hangs(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(20)...)
	began, release := make(chan struct{}), make(chan struct{})
	returned := make(chan struct{})
	w := &batchWorker{onBatch: func(context.Context, []goxstreams.Message[string]) []error {
		defer close(returned)
		close(began)
		<-release
		return nil
	}}
	config := limited(client, 1)
	config.CloseTimeout = 100 * time.Millisecond
	r := run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 20, MaxWait: time.Minute}, nil))
	<-began
	r.stop(t)
	pending := pendingOf(t, client, topic, testGroup)
	require.Len(t, pending, 20)
	for _, p := range pending {
		assert.Zero(t, p.RetryCount)
		assert.Less(t, p.Idle, patience, "not released")
	}
	close(release)
	<-returned
}

// An OnOutcome that hangs holds up the ack of its message, and not of those before it in the
// batch.
func TestBatchWorker_OnOutcomeHangs(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, testGroup)
	produce(t, client, topic, numbers(10)...)
	config := limited(client, 1)
	config.CloseTimeout = 100 * time.Millisecond
	release := make(chan struct{})
	returned := make(chan struct{})
	var calls atomic.Int64
	config.OnOutcome = func(goxstreams.Outcome) {
		if calls.Add(1) == 4 {
			defer close(returned)
			<-release
		}
	}
	r := run(t, newBatchConsumer(t, &batchWorker{}, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 10, MaxWait: time.Minute}, nil))
	eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == 7 }, "three are acked")
	r.stop(t)
	require.Len(t, pendingOf(t, client, topic, testGroup), 7)
	close(release)
	<-returned
}

// The batch's context ends when the leases of all messages are lost, not before. What was
// lost is neither acked nor retried here.
func TestBatchWorker_LeaseLost(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(3)...)
	ids := entryIDs(t, client, topic)
	contexts := make(chan context.Context, 1)
	w := &batchWorker{onBatch: func(ctx context.Context, batch []goxstreams.Message[string]) []error {
		contexts <- ctx
		<-ctx.Done()
		return slices.Repeat([]error{ctx.Err()}, len(batch))
	}}
	config := limited(client, 1)
	config.ClaimMinIdle = time.Second
	consumer := newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 3, MaxWait: time.Minute}, nil)
	run(t, consumer)
	ctx := <-contexts
	claimAs(t, client, topic, "thief", ids[0])
	claimAs(t, client, topic, "thief", ids[1])
	eventually(t, func() bool { return consumer.Stats()[0].InFlight == 1 }, "two leases are lost")
	require.NoError(t, ctx.Err())
	claimAs(t, client, topic, "thief", ids[2])
	select {
	case <-ctx.Done():
		require.ErrorIs(t, context.Cause(ctx), goxstreams.ErrLeaseLost)
	case <-time.After(patience):
		require.FailNow(t, "the context does not end")
	}
	eventually(t, func() bool { return consumer.Stats()[0].Nacked == 3 })
	for _, p := range pendingOf(t, client, topic, testGroup) {
		assert.Equal(t, "thief", p.Consumer)
	}
}

// A canceled context that is none of ours is an ordinary error, which is held back once for
// the whole batch.
func TestBatchWorker_Canceled(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	const n = 100
	produce(t, client, topic, numbers(n)...)
	w := &batchWorker{onBatch: each(func(msg goxstreams.Message[string]) error {
		if msg.RetryCount == 0 {
			return context.Canceled
		}
		return nil
	})}
	began := time.Now()
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: limited(client, 1), Topic: topic, MaxWait: time.Second}, nil))
	eventuallyDone(t, client, topic)
	assert.Less(t, time.Since(began), n/2*time.Second, "a second for each")
	assert.Len(t, w.all(), 2*n)
}

// Without leases, too, batches are full, and each message has its outcome.
func TestBatchWorker_Modes(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*goxstreams.SubscriberConfig){
		"NoAck":   func(c *goxstreams.SubscriberConfig) { c.NoAck = true },
		"fan-out": func(c *goxstreams.SubscriberConfig) { c.ConsumerGroup, c.StartID = "", "0" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			produce(t, client, topic, numbers(40)...)
			w := &batchWorker{onBatch: each(func(msg goxstreams.Message[string]) error {
				if msg.Body == "7" && msg.RetryCount == 0 {
					return errors.New("once more")
				}
				return nil
			})}
			config := grouped(client)
			change(&config)
			want := 41
			if config.NoAck {
				want = 40
			}
			run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 10, MaxWait: 100 * time.Millisecond}, nil))
			eventually(t, func() bool { return len(w.all()) == want })
			assert.Equal(t, 10, w.sizes()[0])
			first := slices.DeleteFunc(w.all(), func(msg goxstreams.Message[string]) bool { return msg.RetryCount > 0 })
			assert.Equal(t, numbers(40), bodies(first))
		})
	}
}

// One message kills every process that handles it, in a batch of many. Its batches halve
// with each crash. At the end it is dead, and no other message is, whatever the limit.
func TestBatchWorker_Crash(t *testing.T) {
	t.Parallel()
	for _, args := range []crashArgs{
		{Poison: "kill", MaxRetries: -1, MaxConcurrency: 1, MaxSize: 64},
		{Poison: "exit", MaxRetries: 2, MaxConcurrency: 2, MaxSize: 16},
		{Poison: "kill", MaxRetries: 8, MaxConcurrency: 1, MaxSize: 64},
	} {
		t.Run(fmt.Sprintf("%s, MaxRetries=%d, MaxConcurrency=%d, MaxSize=%d", args.Poison, args.MaxRetries, args.MaxConcurrency, args.MaxSize), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t) // claims by idle time
			client, topic := newClient(t), topic(t)
			args.Addr, args.Topic = client.Options().Addr, topic
			createGroup(t, client, topic, testGroup)
			var events []string
			for i := range 120 {
				events = append(events, fmt.Sprint("innocent ", i))
			}
			events[40] = "poison"
			produce(t, client, topic, events...)
			begun, deaths := crashLoop(t, client, 2, args)

			runs := max(args.MaxRetries, 0) + 2
			assert.Equal(t, runs, begun["process poison"], "how often the poison is handled, over all processes")
			assert.Equal(t, runs, deaths, "processes that died")
			handled, batches := 0, 0
			for what, times := range begun {
				if strings.HasPrefix(what, "done innocent") {
					handled++
				}
				var retries, size int
				if n, _ := fmt.Sscanf(what, "batch %d %d", &retries, &size); n == 2 {
					batches += times
					assert.LessOrEqual(t, size, max(1, args.MaxSize>>retries), "the batch of retry %d", retries)
					if retries == runs-1 {
						assert.Equal(t, 1, size, "its last delivery")
					}
				}
			}
			assert.Equal(t, runs, batches)
			assert.Equal(t, len(events)-1, handled, "innocents handled")
			assert.Equal(t, 1, begun["dead poison"], "calls of ProcessDead")
			dead := deadOf(t, client, topic)
			require.Len(t, dead, 1, "dead letters")
			assert.Equal(t, `"poison"`, string(dead[0].Message.Payload))
		})
	}
}

// A failed message holds back no others, however small the batches are.
func TestBatchWorker_SizeOne(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(10)...)
	w := &batchWorker{onBatch: each(func(msg goxstreams.Message[string]) error {
		if msg.Body == "0" {
			return goxstreams.RetryAfter(errors.New("later"), time.Hour)
		}
		return nil
	})}
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: grouped(client), Topic: topic, MaxSize: 1}, nil))
	eventually(t, func() bool { return len(w.all()) == 10 })
}

// What shares no batch waits for none: neither a dead message whose ProcessDead failed, nor
// one that panicked alone.
func TestBatchWorker_SinglesDoNotWait(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"dead", "panicked"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			produce(t, client, topic, numbers(3)...)
			second := make(chan struct{})
			w := &batchWorker{onBatch: each(func(msg goxstreams.Message[string]) error {
				switch {
				case msg.Body == "0":
					return goxstreams.RetryAfter(errors.New("again"), 0) // waits for a batch from then on
				case msg.Body == "1" && what == "dead":
					return goxstreams.Permanent(errors.New("never"))
				case msg.Body == "1" && msg.RetryCount == 0:
					panic("once")
				case msg.Body == "1":
					close(second)
				}
				return nil
			})}
			calls := 0
			w.onDead = func(context.Context, goxstreams.Message[string]) error {
				if calls++; calls == 1 {
					return errors.New("database down")
				}
				close(second)
				return nil
			}
			config := limited(client, 5)
			config.CloseTimeout = time.Second
			run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 3, MaxWait: time.Hour}, nil))
			select {
			case <-second:
			case <-time.After(10 * time.Second):
				t.Fatal("it waits for MaxWait")
			}
		})
	}
}

// A key with many messages does not keep batches from filling with those of others: full
// ones begin at once, whatever MaxWait is.
func TestBatchWorker_HotKey(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	var all []string
	for i := range 200 {
		all = append(all, fmt.Sprintf("hot %d", i))
	}
	for i := range 50 {
		all = append(all, fmt.Sprintf("%d 0", i))
	}
	produce(t, client, topic, all...)
	w := &batchWorker{}
	config := grouped(client)
	config.CloseTimeout = time.Second
	config.OrderingKey = keyOfJSON
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 10, MaxWait: time.Hour}, nil))
	eventually(t, func() bool { return len(w.sizes()) >= 5 })
}

func keyOfJSON(msg *message.Message) string {
	key, _, _ := strings.Cut(strings.Trim(string(msg.Payload), `"`), " ")
	return key
}

// A message that waited for its key does not wait for MaxWait once more, even if another one
// has come since.
func TestBatchWorker_FreedByItsKey(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	const wait = 4 * time.Second
	produce(t, client, topic, "a 1", "a 2", "a 3")
	var first, last time.Time
	w := &batchWorker{}
	done := make(chan struct{})
	w.onBatch = func(_ context.Context, batch []goxstreams.Message[string]) []error {
		switch batch[0].Body {
		case "a 1":
			first = time.Now()
			produce(t, client, topic, "b 1")
			eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == 4 }) // b waits before a 2 is free
		case "a 3":
			last = time.Now()
			close(done)
		}
		return nil
	}
	config := grouped(client)
	config.CloseTimeout = time.Second
	config.OrderingKey = keyOfJSON
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 10, MaxWait: wait}, nil))
	<-done
	require.Less(t, last.Sub(first), wait)
}

// A slow ProcessDead holds up no retry of its batch.
func TestBatchWorker_SlowDead(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(3)...)
	end, retried := make(chan struct{}), make(chan struct{})
	w := &batchWorker{onBatch: each(func(msg goxstreams.Message[string]) error {
		switch {
		case msg.Body == "0":
			return goxstreams.Permanent(errors.New("never"))
		case msg.Body == "1" && msg.RetryCount == 0:
			return errors.New("once")
		case msg.Body == "1":
			close(retried)
		}
		return nil
	})}
	w.onDead = func(context.Context, goxstreams.Message[string]) error { <-end; return nil }
	config := limited(client, 5)
	config.MaxConcurrency, config.CloseTimeout = 2, time.Second
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 3, MaxWait: 100 * time.Millisecond}, nil))
	select {
	case <-retried:
	case <-time.After(10 * time.Second):
		t.Error("it waits for ProcessDead")
	}
	close(end)
}

// An OnOutcome that ends its goroutine, as t.FailNow does, has nothing handled again.
func TestBatchWorker_OnOutcomeExits(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	produce(t, client, topic, numbers(10)...)
	w := &batchWorker{}
	var once sync.Once
	config := limited(client, 3)
	config.OnOutcome = func(goxstreams.Outcome) { once.Do(runtime.Goexit) }
	run(t, newBatchConsumer(t, w, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: topic, MaxSize: 10, MaxWait: 200 * time.Millisecond}, nil))
	eventuallyDone(t, client, topic)
	require.Len(t, w.all(), 10)
}
