package goxstreams_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// What a tracing middleware must know: a Snooze and a shutdown look like failures, by
// the handler's error.
func TestOutcomeOf(t *testing.T) {
	t.Parallel()
	errDown := errors.New("down")
	retry := goxstreams.Retry{MaxRetries: 5}.Middleware
	exhausted := goxstreams.Retry{MaxRetries: -1}.Middleware
	filter := goxstreams.DeadLetter{ShouldDeadLetter: isAny}.Middleware
	for name, tt := range map[string]struct {
		middleware message.HandlerMiddleware
		err        error
		want       goxstreams.OutcomeKind
	}{
		"Retry":                {retry, errDown, goxstreams.OutcomeRetried},
		"RetryAfter":           {retry, goxstreams.RetryAfter(errDown, time.Second), goxstreams.OutcomeRetried},
		"Snooze":               {retry, goxstreams.Snooze(errDown, time.Second), goxstreams.OutcomeSnoozed},
		"Permanent":            {retry, goxstreams.Permanent(errDown), goxstreams.OutcomeDead},
		"PermanentSnooze":      {retry, goxstreams.Permanent(goxstreams.Snooze(errDown, time.Second)), goxstreams.OutcomeDead},
		"Exhausted":            {exhausted, errDown, goxstreams.OutcomeDead},
		"DeadLetter":           {filter, errDown, goxstreams.OutcomeDead},
		"NoMiddleware":         {nil, errDown, ""},
		"SnoozeIsNotObeyed":    {nil, goxstreams.Snooze(errDown, time.Second), ""},
		"CanceledByTheHandler": {nil, context.Canceled, ""},
		"Success":              {retry, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			msg := outcomeMessage(t, newClient(t), goxstreams.SubscriberConfig{})
			defer msg.Ack()
			handler := returning(tt.err)
			if tt.middleware != nil {
				handler = tt.middleware(handler)
			}
			_, err := handler(msg)
			require.Equal(t, tt.want, goxstreams.OutcomeOf(msg, err))
			require.Empty(t, goxstreams.OutcomeOf(msg, nil), "an outer middleware has swallowed the error")
			require.Empty(t, goxstreams.OutcomeOf(msg.CopyWithContext(), err), "what becomes of a copy decides nothing")
			require.Empty(t, goxstreams.OutcomeOf(message.NewMessage("other", nil), errDown))
		})
	}
}

func returning(err error) message.HandlerFunc {
	return func(*message.Message) ([]*message.Message, error) { return nil, err }
}

// outcomeMessage returns a message of a subscription that the test's end closes.
func outcomeMessage(t *testing.T, client *redis.Client, config goxstreams.SubscriberConfig) *message.Message {
	t.Helper()
	config.Client, config.ConsumerGroup = client, testGroup
	topic := topic(t)
	publish(t, client, topic, "1")
	return next(t, subscribe(t, newSubscriber(t, config), topic))
}

func TestOutcomeOf_NoAck(t *testing.T) {
	t.Parallel()
	msg := outcomeMessage(t, newClient(t), goxstreams.SubscriberConfig{NoAck: true})
	defer msg.Ack()
	_, err := goxstreams.Retry{}.Middleware(returning(errors.New("down")))(msg)
	require.Empty(t, goxstreams.OutcomeOf(msg, err), "it is dropped, whatever was decided")
}

func TestOutcomeOf_Shutdown(t *testing.T) {
	t.Parallel()
	for name, middleware := range map[string]message.HandlerMiddleware{
		"Retry": goxstreams.Retry{MaxRetries: -1}.Middleware, "NoMiddleware": func(h message.HandlerFunc) message.HandlerFunc { return h },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			publish(t, client, topic, "1")
			sub := newSubscriber(t, grouped(client))
			ctx, cancel := context.WithCancel(t.Context())
			messages, err := sub.Subscribe(ctx, topic)
			require.NoError(t, err)
			msg := next(t, messages)
			cancel() // and the handler, which watches the same signal, gives up
			_, err = middleware(returning(ctx.Err()))(msg)
			require.Equal(t, goxstreams.OutcomeReleased, goxstreams.OutcomeOf(msg, err))
			if name == "NoMiddleware" {
				require.Empty(t, goxstreams.OutcomeOf(msg, errors.New("down")), "an error of the handler's own")
			}
			msg.Nack()
		})
	}
}

func TestOutcomeOf_LeaseLost(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	publish(t, client, topic, "1")
	config := grouped(client)
	config.ClaimMinIdle = time.Second // it is renewed, and so looked at, every sixth of that
	msg := next(t, subscribe(t, newSubscriber(t, config), topic))
	defer msg.Nack()
	id := delivery(t, msg).ID
	require.NoError(t, client.XClaimJustID(t.Context(), &redis.XClaimArgs{Stream: topic, Group: testGroup, Consumer: "other", Messages: []string{id}}).Err())
	_, err := goxstreams.Retry{}.Middleware(func(msg *message.Message) ([]*message.Message, error) {
		<-msg.Context().Done()
		return nil, msg.Context().Err()
	})(msg)
	require.ErrorIs(t, context.Cause(msg.Context()), goxstreams.ErrLeaseLost)
	require.Equal(t, goxstreams.OutcomeLeaseLost, goxstreams.OutcomeOf(msg, err))
}
