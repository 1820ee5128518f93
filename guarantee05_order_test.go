package goxstreams_test

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// Guarantee 5: with MaxConcurrency 1 messages come in the stream's order.

// All connections are cut again and again, with answers on their way. With a name of its
// own for the consumer, given by its user, what had been read was found by a claim that
// counted, and after what was read since.
func TestFault46_OrderWhileConnectionsAreCut(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, consumer := range []string{"", "pod-1"} {
		t.Run(fmt.Sprintf("Consumer%q", consumer), func(t *testing.T) {
			t.Parallel()
			const n = 1500
			server := testserver.Private(t)
			admin, topic := server.Client(), topic(t)
			config := grouped(server.Client())
			config.Consumer = consumer
			messages := subscribe(t, newSubscriber(t, config), topic)
			ctx, cancel := context.WithCancel(t.Context())
			var cutting sync.WaitGroup
			defer func() { cancel(); cutting.Wait() }()
			cutting.Go(func() {
				for ctx.Err() == nil {
					_ = admin.ClientKillByFilter(ctx, "TYPE", "normal", "SKIPME", "yes").Err()
					time.Sleep(20 * time.Millisecond)
				}
			})
			publisher := server.Client()
			cutting.Go(func() {
				for i := 0; i < n; {
					// Whether it was stored is known by its ID.
					id := fmt.Sprintf("%d-0", i+1)
					err := publisher.Do(ctx, "xadd", topic, id, "_watermill_message_uuid", id, "payload", i).Err()
					if err == nil || len(publisher.XRange(ctx, topic, id, id).Val()) > 0 {
						i++
					}
					if ctx.Err() != nil {
						return
					}
					time.Sleep(2 * time.Millisecond)
				}
			})
			for i := range n {
				msg := next(t, messages)
				require.Equal(t, strconv.Itoa(i), string(msg.Payload), "message %d", i)
				require.EqualValues(t, 1, delivery(t, msg).Count, "message %d", i)
				msg.Ack()
			}
			cancel()
			eventuallySettled(t, server.Client(), topic, testGroup)
		})
	}
}
