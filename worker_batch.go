package goxstreams

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/consume"
)

// BatchWorker handles the messages of a topic in batches, decoded into an E: for inserts of
// many rows, bulk requests and the like. Its methods are called concurrently if
// SubscriberConfig.MaxConcurrency is greater than 1.
type BatchWorker[E any] interface {
	// ProcessBatch handles messages, in stream order. It returns one error for each, at
	// its index, or nil if all have succeeded. Each message is settled by its own error,
	// as by Worker.Process's: it is acked, or comes again in a later batch. If the number
	// of errors is wrong, all messages have failed.
	//
	// After a panic, ProcessBatch is called again at once with ever smaller parts of the
	// batch, until a single message panics. That message has failed; it is retried in
	// batches of one. The others count as delivered once, but can be handled several times:
	// ProcessBatch must be idempotent, or undo what it did before it panicked.
	//
	// A crash counts as a delivery of each message that was in a batch. The messages come
	// again in batches that halve with each crash, and a message's last delivery has the
	// process to itself: one that crashes its process costs no other, whatever
	// Retry.MaxRetries is.
	//
	// ctx carries no single message's lease. It ends a second before CloseTimeout, and when
	// the leases of all messages are lost.
	ProcessBatch(ctx context.Context, batch []Message[E]) []error

	// ProcessBroken and ProcessDead handle single messages: see Worker.
	ProcessBroken(ctx context.Context, broken BrokenMessage) error
	ProcessDead(ctx context.Context, dead Message[E]) error
}

const defaultMaxSize = 100

// BatchConsumerConfig configures a BatchConsumer. Topic and Subscriber.Client are required.
type BatchConsumerConfig struct {
	// Subscriber is ConsumerConfig.Subscriber. MaxConcurrency is the maximum number of
	// concurrent batches. With OrderingKey a batch has at most one message of each key. A
	// failed message holds back those of its key, but no others, whatever MaxConcurrency
	// is.
	Subscriber SubscriberConfig

	// Topic, Name and Codec are those of ConsumerConfig.
	Topic string
	Name  string
	Codec Codec

	// MaxSize is the maximum number of messages in a batch. Default: 100.
	MaxSize int

	// MaxWait is how long a message waits for its batch to have MaxSize messages. The
	// first message counts: of those that were read, or from when it is due as a retry.
	// What waits has no slot, and is released uncounted if the subscription closes.
	// Default: 0, do not wait. Messages that arrive while batches are handled make up the
	// next one in any case.
	MaxWait time.Duration
}

// BatchConsumer runs a BatchWorker on a topic.
type BatchConsumer[E any] struct {
	consumer *Consumer[E]
	worker   BatchWorker[E]
}

// NewBatchConsumer returns a BatchConsumer. The error lists every mistake in the config. A
// nil logger discards all logs.
func NewBatchConsumer[E any](worker BatchWorker[E], config BatchConsumerConfig, logger watermill.LoggerAdapter) (*BatchConsumer[E], error) {
	errs := configErrors{typeName: "BatchConsumerConfig"}
	if worker == nil {
		errs.errs = append(errs.errs, errors.New("goxstreams: NewBatchConsumer: a worker is required"))
	}
	atLeast(&errs, "MaxSize", config.MaxSize, 0)
	atLeast(&errs, "MaxWait", config.MaxWait, 0)
	config.MaxSize = cmp.Or(config.MaxSize, defaultMaxSize)
	b := &BatchConsumer[E]{worker: worker}
	var err error
	b.consumer, err = newConsumer(single[E]{worker}, ConsumerConfig{
		Subscriber: config.Subscriber, Topic: config.Topic, Name: config.Name, Codec: config.Codec,
	}, errs, logger)
	if err != nil {
		return nil, err
	}
	t := &b.consumer.subscriber.typed
	t.batch, t.maxSize, t.maxWait = b.process, config.MaxSize, config.MaxWait
	return b, nil
}

// single is a BatchWorker without its batches.
type single[E any] struct{ BatchWorker[E] }

func (single[E]) Process(context.Context, Message[E]) error { panic("called by nobody") }

// Run handles batches until ctx ends: see Consumer.Run.
func (b *BatchConsumer[E]) Run(ctx context.Context) error { return b.consumer.Run(ctx) }

// Stats returns the state of each active Run: see Subscriber.Stats.
func (b *BatchConsumer[E]) Stats() []SubscriptionStats { return b.consumer.Stats() }

// TopicStats asks Redis for the state of a topic: see Subscriber.TopicStats.
func (b *BatchConsumer[E]) TopicStats(ctx context.Context, topic string) (TopicStats, error) {
	return b.consumer.TopicStats(ctx, topic)
}

// process passes messages to the worker, and finds those that make it panic: it halves a
// part that panicked, and after a message that panicked alone it begins with small parts
// again, in case all of them do. It stops when stop returns true.
func (b *BatchConsumer[E]) process(ctx context.Context, batch []*batched, stop func() bool) []error {
	errs := make([]error, len(batch))
	size, bad := len(batch), 0 // there is a message that panics before bad
	for from := 0; from < len(batch); {
		to := min(from+size, len(batch))
		if from < bad {
			to = from + max(1, (bad-from)/2)
		}
		got, err := b.call(ctx, batch[from:to])
		switch {
		case err == nil:
			copy(errs[from:], got)
			from, size = to, 2*size
		case to-from == 1:
			errs[from] = err
			batch[from].h.Single = true
			from, size, bad = to, 1, 0
		case stop():
			return append(errs[:from], slices.Repeat([]error{fmt.Errorf("not handled: %w", context.Canceled)}, len(batch)-from)...)
		default:
			bad = to
		}
	}
	return errs
}

// call calls the worker once, and returns its errors, or a panic.
func (b *BatchConsumer[E]) call(ctx context.Context, batch []*batched) (errs []error, err error) {
	messages := make([]Message[E], len(batch))
	err = guard(func() (err error) {
		for i, m := range batch {
			if m.body == nil { // it was passed on already, and may have been changed
				if m.body, err = b.consumer.decode(m.msg.Payload); err != nil {
					return err
				}
			}
			messages[i] = Message[E]{ID: m.h.ID, RetryCount: max(m.h.Count()-1, 0), Body: *m.body.(*E), Metadata: m.msg.Metadata}
			m.body = nil
		}
		errs = b.worker.ProcessBatch(ctx, messages)
		return nil
	})
	if err == nil && errs != nil && len(errs) != len(batch) {
		errs = slices.Repeat([]error{fmt.Errorf("goxstreams: ProcessBatch returned %d errors for %d messages", len(errs), len(batch))}, len(batch))
	}
	return errs, err
}

// batched is a message of a batch.
type batched struct {
	h *consume.Task
	decoded
}

// handleBatch brings the entries of a batch to their outcomes.
func (s *subscription) handleBatch(tasks []consume.Task) {
	all := make([]batched, 0, len(tasks))
	for i := range tasks {
		if m, ok := s.prepare(&tasks[i]); ok {
			all = append(all, batched{&tasks[i], m})
		}
	}
	ctx, cancel := context.WithCancelCause(s.Calling())
	defer cancel(nil)
	var begun atomic.Pointer[[]*batched]
	var lost context.CancelCauseFunc = func(cause error) { // called for a message whose lease is lost
		b := begun.Load()
		if b == nil || slices.ContainsFunc(*b, func(m *batched) bool { return !m.h.Lost() }) {
			return
		}
		cancel(cause)
	}
	batch := make([]*batched, 0, len(all))
	for i := range all {
		m := &all[i]
		switch {
		case !m.h.Attach(&lost):
			s.Drop(m.h)
		case s.Begin(m.h):
			batch = append(batch, m)
			s.stats.delivered.Add(1)
			if m.h.Count() > 1 {
				s.stats.retried.Add(1)
			}
		}
	}
	if len(batch) == 0 {
		return
	}
	begun.Store(&batch)
	lost(ErrLeaseLost) // they may all have been, while the batch began
	var errs []error
	stop := func() bool { return ctx.Err() != nil || s.IsClosing() }
	leave := func() {
		var leaving sync.WaitGroup
		for _, m := range batch {
			leaving.Go(func() { s.Left(&consume.Task{Entry: m.h.Entry}) })
		}
		leaving.Wait()
	}
	exited := func() { s.settleBatch(ctx, batch, slices.Repeat([]error{errExited}, len(batch))) }
	batch[0].h.Direct(func() { errs = s.typed.batch(ctx, batch, stop) }, leave, exited)
	s.settleBatch(ctx, batch, errs)
}

var errExited = errors.New("goxstreams: ProcessBatch called runtime.Goexit")

// settleBatch carries out what the errors of a batch decide.
func (s *subscription) settleBatch(ctx context.Context, batch []*batched, errs []error) {
	returned := time.Now()
	acked := make([]*consume.Task, 0, len(batch))
	for i, m := range batch {
		if errs[i] == nil {
			acked = append(acked, m.h)
		}
	}
	s.settleAcked(acked)
	var dead []*consume.Task // ProcessDead may take long: the others come first
	for i, m := range batch {
		if errs[i] == nil {
			continue
		}
		d := &deliveryContext{Context: s.Base(), sub: s, msg: m.msg, id: m.h.ID, count: m.h.Count(), returned: returned}
		d.own.Store(&cancelable{Context: ctx})
		d.handler.Store(&noRouter)
		m.msg.SetContext(d)
		err := user(m.h, func() error { return s.retry.judge(d, usable(errs[i])) }) // ShouldRetry is the user's
		if !errors.Is(err, context.Canceled) || !s.IsClosing() && ctx.Err() == nil {
			s.log.Error("ProcessBatch failed", err, s.Fields(m.h).Add(watermill.LogFields{"handler_name": s.typed.name, "message_uuid": m.msg.UUID}))
		}
		if s.nacked(m.h, d) {
			dead = append(dead, m.h)
		}
	}
	for _, h := range dead {
		s.dead(h)
	}
}

// settleAcked acks what a batch has handled, even if an OnOutcome calls runtime.Goexit.
func (s *subscription) settleAcked(tasks []*consume.Task) {
	s.stats.acked.Add(int64(len(tasks)))
	defer func() { s.SettleAll(tasks) }()
	if s.cfg.OnOutcome == nil {
		return
	}
	for ; len(tasks) > 0; tasks = tasks[1:] {
		s.told(tasks[0], OutcomeAcked, 0, nil, nil)
		s.Settle(tasks[0])
	}
}
