package goxotel

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/semconv/v1.43.0/messagingconv"
	"go.opentelemetry.io/otel/trace"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxotel/internal/statswatch"
)

// OnDead returns a SubscriberConfig.OnDead that makes a span of the move to the
// dead-letter stream, and within it calls next, which may be nil. The span has the
// kind of death and the reason (see Config.OmitErrorText) as attributes; its status
// is unset, since the move has succeeded. It stands in the message's trace as the
// delivery's span does. A malformed entry has no message that could tell of a trace:
// its span begins one.
func (t *Telemetry) OnDead(next func(context.Context, goxstreams.DeadMessage)) func(context.Context, goxstreams.DeadMessage) {
	return func(ctx context.Context, dead goxstreams.DeadMessage) {
		attributes := append(t.destination(dead.Topic, dead.Group),
			semconv.MessagingSystemKey.String(string(system)),
			semconv.MessagingOperationName(deadLetter), semconv.MessagingOperationTypeSettle,
			semconv.MessagingClientID(statswatch.Label(dead.Consumer)), EntryIDKey.String(dead.EntryID),
			DeliveryCountKey.Int64(dead.Deliveries), RetryCountKey.Int64(max(dead.Deliveries-1, 0)),
			DeadKindKey.String(dead.Kind.String()), ReplaysKey.Int(dead.Replays),
		)
		attributes = append(attributes, t.reason(dead.Reason)...)
		if dead.Handler != "" {
			attributes = append(attributes, HandlerKey.String(statswatch.Label(dead.Handler)))
		}
		var metadata message.Metadata
		if dead.Message != nil {
			attributes = append(attributes, semconv.MessagingMessageID(statswatch.Label(dead.Message.UUID)))
			metadata = dead.Message.Metadata
		}
		ctx, links := t.within(ctx, metadata)
		ctx, span := t.tracer.Start(ctx, deadLetter+" "+statswatch.Label(dead.Topic),
			trace.WithSpanKind(trace.SpanKindClient), trace.WithLinks(links...), trace.WithAttributes(attributes...))
		defer span.End()
		if next != nil {
			next(ctx, dead)
		}
	}
}

// Names of the operations that settle messages.
const (
	ack        = "ack"
	deadLetter = "dead_letter"
)

// Hook returns a hook for the client (client.AddHook), which measures the commands
// that settle messages, in messaging.client.operation.duration: "ack", which Redis
// gets for many messages at once, some time after their handlers have ended, and
// "dead_letter". There are no spans of acks, since an ack belongs to no single
// message's trace.
//
// The commands are known by the text that the library sends; what another version
// sends in another way is not measured.
func (t *Telemetry) Hook() redis.Hook { return hook{t} }

type hook struct{ t *Telemetry }

func (hook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h hook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		began := time.Now()
		err := next(ctx, cmd)
		h.t.settled(ctx, cmd, time.Since(began), err)
		return err
	}
}

func (h hook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		began := time.Now()
		err := next(ctx, cmds)
		took := time.Since(began)
		// go-redis may have given the pipeline's error to no command.
		refused := err != nil && !slices.ContainsFunc(cmds, func(cmd redis.Cmder) bool { return cmd.Err() != nil })
		for _, cmd := range cmds {
			if refused {
				h.t.settled(ctx, cmd, took, err)
			} else {
				h.t.settled(ctx, cmd, took, cmd.Err())
			}
		}
		return err
	}
}

// settled records a command, if it settles messages.
func (t *Telemetry) settled(ctx context.Context, cmd redis.Cmder, took time.Duration, err error) {
	operation, topic, group := settlement(cmd)
	if operation == "" {
		return
	}
	labels := append(t.destination(topic, group), t.operation.AttrOperationType(messagingconv.OperationTypeSettle))
	if err != nil {
		labels = append(labels, errorType(err))
	}
	t.operation.Record(ctx, took.Seconds(), operation, system, labels...)
}

// settlement returns what a command settles; "" if it is not such a command.
// XACK is followed by the topic and the group. The library's scripts begin with their
// names; the topic is their first key, and the group their first argument.
func settlement(cmd redis.Cmder) (operation, topic, group string) {
	args := cmd.Args()
	switch cmd.Name() {
	case "xack":
		if len(args) > 2 {
			return ack, fmt.Sprint(args[1]), fmt.Sprint(args[2])
		}
	case "eval":
		if len(args) < 5 {
			return "", "", ""
		}
		script, _ := args[1].(string)
		keys, _ := args[2].(int)
		switch {
		case keys < 1 || len(args) <= 3+keys:
			return "", "", ""
		case strings.HasPrefix(script, "-- ack\n"):
			operation = ack
		case strings.HasPrefix(script, "-- dead-letter\n"):
			operation = deadLetter
		default:
			return "", "", ""
		}
		return operation, fmt.Sprint(args[3]), fmt.Sprint(args[3+keys])
	}
	return "", "", ""
}
