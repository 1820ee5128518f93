package goxstreams_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// telling returns the config with a client and a group, and what its OnOutcome is told.
func telling(t *testing.T, config goxstreams.SubscriberConfig) (chan goxstreams.Outcome, goxstreams.SubscriberConfig) {
	t.Helper()
	outcomes := make(chan goxstreams.Outcome, 100)
	config.Client = newClient(t)
	config.ConsumerGroup = testGroup
	config.OnOutcome = func(o goxstreams.Outcome) { outcomes <- o }
	return outcomes, config
}

// requireOutcome waits for the next outcome, and compares what it says.
func requireOutcome(t *testing.T, outcomes <-chan goxstreams.Outcome, kind goxstreams.OutcomeKind, count int64, delay time.Duration, text string) goxstreams.Outcome {
	t.Helper()
	select {
	case o := <-outcomes:
		require.Equal(t, kind, o.Kind, "%+v", o)
		require.Equal(t, count, o.Count)
		require.Equal(t, delay, o.Delay)
		require.Equal(t, kind == goxstreams.OutcomeDead, o.Dead != nil)
		if text == "" {
			require.NoError(t, o.Err)
		} else {
			require.ErrorContains(t, o.Err, text)
		}
		return o
	case <-time.After(patience):
		require.FailNow(t, "OnOutcome was not told", "%s", kind)
	}
	return goxstreams.Outcome{}
}

// TestOnOutcome: each way for a message to end, or to come again, is told once, with the
// delay that it then has.
func TestOnOutcome(t *testing.T) {
	t.Parallel()
	const (
		acked, retried  = goxstreams.OutcomeAcked, goxstreams.OutcomeRetried
		snoozed, isDead = goxstreams.OutcomeSnoozed, goxstreams.OutcomeDead
	)
	type want struct {
		kind  goxstreams.OutcomeKind
		count int64
		delay time.Duration
		err   string
	}
	errDown := errors.New("it is down")
	policy := goxstreams.Retry{MaxRetries: 2, InitialInterval: 10 * time.Millisecond}
	limited := goxstreams.Retry{MaxRetries: 1, InitialInterval: 20 * time.Millisecond}.Middleware
	filter := goxstreams.DeadLetter{ShouldDeadLetter: func(err error) bool { return errors.Is(err, errDown) }}.Middleware
	for _, tt := range []struct {
		name       string
		middleware message.HandlerMiddleware // nil: it is acked or nacked, without an error
		errs       []error                   // what the handler returns, by delivery; then nil
		kind       goxstreams.DeadKind
		outcomes   []want
	}{
		{"acked", limited, nil, "", []want{{acked, 1, 0, ""}}},
		{"by the config", nil, []error{errDown, errDown}, "", []want{
			{retried, 1, 10 * time.Millisecond, ""}, {retried, 2, 20 * time.Millisecond, ""}, {acked, 3, 0, ""},
		}},
		{"the config's limit", nil, []error{errDown, errDown, errDown}, goxstreams.Exhausted, []want{
			{retried, 1, 10 * time.Millisecond, ""}, {retried, 2, 20 * time.Millisecond, ""}, {isDead, 3, 0, "exhausted"},
		}},
		{"by a middleware", limited, []error{errDown, errDown}, goxstreams.Exhausted, []want{
			{retried, 1, 20 * time.Millisecond, "it is down"}, {isDead, 2, 0, "it is down"},
		}},
		{"RetryAfter", limited, []error{goxstreams.RetryAfter(errDown, 3*time.Millisecond)}, "", []want{
			{retried, 1, 3 * time.Millisecond, "it is down"}, {acked, 2, 0, ""},
		}},
		{"Snooze", limited, []error{goxstreams.Snooze(errDown, 3*time.Millisecond)}, "", []want{
			{snoozed, 1, 3 * time.Millisecond, "it is down"}, {acked, 1, 0, ""},
		}},
		{"Permanent", limited, []error{goxstreams.Permanent(errDown)}, goxstreams.PermanentFailure, []want{{isDead, 1, 0, "it is down"}}},
		{"filtered", filter, []error{errDown}, goxstreams.Filtered, []want{{isDead, 1, 0, "it is down"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			outcomes, config := telling(t, goxstreams.SubscriberConfig{Retry: &policy})
			sub, topic := newSubscriber(t, config), topic(t)
			messages := subscribe(t, sub, topic)
			errs := tt.errs
			handler := func(*message.Message) ([]*message.Message, error) {
				if len(errs) == 0 {
					return nil, nil
				}
				err := errs[0]
				errs = errs[1:]
				return nil, err
			}
			if tt.middleware != nil {
				handler = tt.middleware(handler)
			}
			go func() {
				for msg := range messages {
					if _, err := handler(msg); err != nil {
						msg.Nack()
					} else {
						msg.Ack()
					}
				}
			}()
			id := publish(t, config.Client, topic, "x")[0]
			for _, w := range tt.outcomes {
				o := requireOutcome(t, outcomes, w.kind, w.count, w.delay, w.err)
				require.Equal(t, topic, o.Topic)
				require.Equal(t, testGroup, o.Group)
				require.Equal(t, 2, o.MaxRetries)
				require.NotEmpty(t, o.Consumer)
				if o.Dead != nil {
					require.Equal(t, tt.kind, o.Dead.Kind)
					require.Equal(t, o.ID, o.Dead.EntryID)
					require.Equal(t, id, o.Dead.Message.UUID)
					require.NotEmpty(t, o.Dead.ID, "it was moved before")
				}
			}
			eventuallySettled(t, config.Client, topic, testGroup)
			require.NoError(t, sub.Close())
			require.Empty(t, outcomes)
		})
	}
}

// The same of entries that are no messages.
func TestOnOutcome_Malformed(t *testing.T) {
	t.Parallel()
	errLater := errors.New("later")
	retry := goxstreams.Retry{InitialInterval: 10 * time.Millisecond}
	for _, tt := range []struct {
		name string
		errs []error // what OnBroken returns in turn; nil: there is none
		want []goxstreams.OutcomeKind
	}{
		{"no OnBroken", nil, []goxstreams.OutcomeKind{goxstreams.OutcomeDead}},
		{"dropped", []error{nil}, []goxstreams.OutcomeKind{goxstreams.OutcomeAcked}},
		{"dead, later", []error{errLater, goxstreams.ErrDead}, []goxstreams.OutcomeKind{goxstreams.OutcomeRetried, goxstreams.OutcomeDead}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			outcomes, config := telling(t, goxstreams.SubscriberConfig{Retry: &retry})
			if errs := tt.errs; errs != nil {
				config.OnBroken = func(context.Context, goxstreams.BrokenMessage) error {
					err := errs[0]
					errs = errs[1:]
					return err
				}
			}
			sub, topic := newSubscriber(t, config), topic(t)
			subscribe(t, sub, topic)
			addRaw(t, config.Client.(*redis.Client), topic, "no", "message")
			for i, kind := range tt.want {
				switch kind {
				case goxstreams.OutcomeRetried:
					requireOutcome(t, outcomes, kind, int64(i+1), 10*time.Millisecond, "later")
				case goxstreams.OutcomeDead:
					o := requireOutcome(t, outcomes, kind, int64(i+1), 0, "broken entry")
					require.ErrorIs(t, o.Err, goxstreams.ErrBroken)
					require.ErrorIs(t, o.Err, goxstreams.ErrDead)
					require.Equal(t, goxstreams.Broken, o.Dead.Kind)
				default:
					requireOutcome(t, outcomes, kind, int64(i+1), 0, "")
				}
			}
			eventuallySettled(t, config.Client, topic, testGroup)
			require.NoError(t, sub.Close())
			require.Empty(t, outcomes)
		})
	}
}

// outcomeWorker returns errors in turn.
type outcomeWorker struct{ process, dead chan error }

func (w outcomeWorker) Process(context.Context, goxstreams.Message[int]) error { return <-w.process }
func (w outcomeWorker) ProcessBroken(context.Context, goxstreams.BrokenMessage) error {
	return goxstreams.ErrDead
}
func (w outcomeWorker) ProcessDead(context.Context, goxstreams.Message[int]) error { return <-w.dead }

// And of what a Worker does with dead messages.
func TestOnOutcome_Worker(t *testing.T) {
	t.Parallel()
	outcomes, config := telling(t, goxstreams.SubscriberConfig{Retry: &goxstreams.Retry{MaxRetries: 1, InitialInterval: 10 * time.Millisecond}})
	worker := outcomeWorker{make(chan error, 9), make(chan error, 9)}
	topic := topic(t)
	consumer, err := goxstreams.NewConsumer(worker, goxstreams.ConsumerConfig{Topic: topic, Subscriber: config}, nil)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- consumer.Run(ctx) }()

	worker.process <- nil
	publish(t, config.Client, topic, "1")
	requireOutcome(t, outcomes, goxstreams.OutcomeAcked, 1, 0, "")

	worker.process <- errors.New("no stock")
	worker.process <- errors.New("no stock at all")
	worker.dead <- errors.New("the archive is full")
	worker.dead <- nil
	publish(t, config.Client, topic, "2")
	requireOutcome(t, outcomes, goxstreams.OutcomeRetried, 1, 10*time.Millisecond, "no stock")
	requireOutcome(t, outcomes, goxstreams.OutcomeRetried, 2, 20*time.Millisecond, "the archive is full")
	requireOutcome(t, outcomes, goxstreams.OutcomeAcked, 2, 0, "")

	worker.process <- goxstreams.Permanent(errors.New("negative"))
	worker.dead <- goxstreams.ErrDead
	publish(t, config.Client, topic, "3")
	o := requireOutcome(t, outcomes, goxstreams.OutcomeDead, 1, 0, "negative")
	require.ErrorIs(t, o.Err, goxstreams.ErrPermanent)

	publish(t, config.Client, topic, "no number")
	requireOutcome(t, outcomes, goxstreams.OutcomeDead, 1, 0, "broken entry")
	cancel()
	require.NoError(t, <-ended)
	require.Empty(t, outcomes)
}

// Without a group a dead message is told, and not stored; what NoAck drops and what is
// released has no outcome.
func TestOnOutcome_NotKept(t *testing.T) {
	t.Parallel()
	t.Run("fan-out", func(t *testing.T) {
		t.Parallel()
		outcomes, config := telling(t, goxstreams.SubscriberConfig{})
		config.ConsumerGroup = ""
		sub, topic := newSubscriber(t, config), topic(t)
		messages := subscribe(t, sub, topic)
		publish(t, config.Client, topic, "x")
		msg := next(t, messages)
		_, err := goxstreams.Retry{MaxRetries: -1}.Middleware(func(*message.Message) ([]*message.Message, error) {
			return nil, errors.New("no")
		})(msg)
		require.Error(t, err)
		msg.Nack()
		o := requireOutcome(t, outcomes, goxstreams.OutcomeDead, 1, 0, "no")
		require.Empty(t, o.Dead.ID)
	})
	t.Run("NoAck", func(t *testing.T) {
		t.Parallel()
		outcomes, config := telling(t, goxstreams.SubscriberConfig{NoAck: true})
		sub, topic := newSubscriber(t, config), topic(t)
		messages := subscribe(t, sub, topic)
		publish(t, config.Client, topic, "x", "y")
		next(t, messages).Nack()
		next(t, messages).Ack()
		requireOutcome(t, outcomes, goxstreams.OutcomeAcked, 1, 0, "")
		require.Empty(t, outcomes)
	})
	t.Run("released", func(t *testing.T) {
		t.Parallel()
		outcomes, config := telling(t, goxstreams.SubscriberConfig{})
		sub, topic := newSubscriber(t, config), topic(t)
		messages := subscribe(t, sub, topic)
		publish(t, config.Client, topic, "x")
		msg := next(t, messages)
		closing := make(chan error)
		go func() { closing <- sub.Close() }()
		eventually(t, func() bool { // until it has begun
			_, err := sub.Subscribe(context.Background(), topic)
			return errors.Is(err, goxstreams.ErrSubscriberClosed)
		})
		msg.Nack()
		require.NoError(t, <-closing)
		require.Empty(t, outcomes)
	})
}

// It is called before the message comes again, and before its successor if the order is kept.
func TestOnOutcome_InOrder(t *testing.T) {
	t.Parallel()
	var order []string // the slot and the handler take turns
	outcomes, config := telling(t, goxstreams.SubscriberConfig{Retry: &goxstreams.Retry{InitialInterval: time.Millisecond}})
	tell := config.OnOutcome
	config.OnOutcome = func(o goxstreams.Outcome) { order = append(order, o.Kind.String()); tell(o) }
	sub, topic := newSubscriber(t, config), topic(t)
	messages := subscribe(t, sub, topic)
	publish(t, config.Client, topic, "a", "b")
	for i := range 3 {
		msg := next(t, messages)
		order = append(order, string(msg.Payload))
		if i == 0 {
			msg.Nack()
		} else {
			msg.Ack()
		}
	}
	for range 3 {
		<-outcomes
	}
	require.True(t, slices.Equal([]string{"a", "retried", "a", "acked", "b", "acked"}, order), "%q", order)
}
