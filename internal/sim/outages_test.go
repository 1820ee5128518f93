package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/model"
)

// Nobody can renew a lease while the server refuses writes, is frozen or cannot be reached.
// All leases expire then, and the first consumer to be served again must not take messages
// that others still handle.
func TestNobodyIsRobbed(t *testing.T) {
	for _, outage := range slices.Concat(refusals, []string{"freeze", "partition"}) {
		for _, subscribers := range []int{4, 100} {
			for _, minIdle := range []time.Duration{3 * time.Second, time.Minute} {
				t.Run(fmt.Sprintf("%.10s/%d/%v", outage, subscribers, minIdle), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) { survive(t, outage, subscribers, minIdle) })
				})
			}
		}
	}
}

// outageLengths are in units of ClaimMinIdle/2.
var outageLengths = []time.Duration{1, 2, 3, 4, 6}

const (
	// outageRepeats is how often there is an outage of each length: the whole test should
	// take less than half a minute. With 100 Subscribers, or minutes, there are fewer.
	outageRepeats       = 20
	outageRepeatsOfMany = 1
	outageRepeatsOfLong = 4
	// outageHandlers is the number of handlers, with a message each throughout the test.
	outageHandlers = 40
)

// survive makes outages while all messages are being handled.
func survive(t *testing.T, outage string, subscribers int, minIdle time.Duration) {
	s := &simulation{schedule: &Schedule{Latency: 200 * time.Microsecond}, t: t, server: model.New(model.Config{Version: model.Redis86})}
	s.network = newNetwork(1, s.server.Serve)
	h := &holders{t: t, held: make(map[string]string), end: make(chan struct{})}
	ends := make([]func(), subscribers)
	for i := range ends {
		ends[i] = h.join(s, i, subscribers, minIdle)
	}
	for i := range outageHandlers {
		s.store("orders", "*", message.NewMessage(fmt.Sprint(i), nil))
	}
	time.Sleep(minIdle)
	h.mu.Lock()
	assert.Len(t, h.held, outageHandlers)
	h.mu.Unlock()
	for range repeatsOf(subscribers, minIdle) {
		for _, length := range lengthsOf(subscribers, minIdle) {
			heal := s.breakDown(outage)
			time.Sleep(length * minIdle / 2)
			heal()
			time.Sleep(minIdle + 5*time.Second)
		}
	}
	close(h.end)
	synctest.Wait()
	for _, end := range ends {
		s.goes(end)
	}
	s.group.Wait()
	time.Sleep(lingering)
}

func lengthsOf(subscribers int, minIdle time.Duration) []time.Duration {
	if subscribers > 4 && minIdle > 10*time.Second {
		return outageLengths[len(outageLengths)-1:] // to save time
	}
	return outageLengths
}

func repeatsOf(subscribers int, minIdle time.Duration) int {
	switch {
	case subscribers > 4:
		return outageRepeatsOfMany
	case minIdle > 10*time.Second:
		return outageRepeatsOfLong
	}
	return outageRepeats
}

// breakDown starts an outage, and returns a function that ends it.
func (s *simulation) breakDown(outage string) (heal func()) {
	switch outage {
	case "freeze":
		s.server.Freeze()
		return s.server.Thaw
	case "partition":
		return s.network.influence(nil, (*lane).block, (*lane).unblock)
	}
	s.server.RefuseWrites(outage)
	return func() { s.server.RefuseWrites("") }
}

// holders are handlers that run as long as the test.
type holders struct {
	t    *testing.T
	end  chan struct{}
	mu   sync.Mutex
	held map[string]string // by entry: its consumer
}

// join starts a Subscriber with slots for twice its share of the messages, and returns a
// function that ends it.
func (h *holders) join(s *simulation, number, of int, minIdle time.Duration) (end func()) {
	n := s.newNode(fmt.Sprint("consumer-", number), 1, redis.Options{ReadTimeout: time.Second, DialTimeout: 2 * time.Second})
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: n.client, ConsumerGroup: "billing", Consumer: n.prefix(), MaxConcurrency: max(1, 2*outageHandlers/of),
		ClaimMinIdle: minIdle, ClaimInterval: minIdle / 3, BlockTime: minIdle,
	}, nil)
	require.NoError(h.t, err)
	messages, err := sub.Subscribe(h.t.Context(), "orders")
	require.NoError(h.t, err)
	s.goes(func() {
		for msg := range messages {
			s.goes(func() { h.hold(msg) })
		}
	})
	return func() { _ = sub.Close(); n.exit() }
}

// hold is the handler.
func (h *holders) hold(msg *message.Message) {
	d, _ := goxstreams.DeliveryFromContext(msg.Context())
	h.mu.Lock()
	if other, ok := h.held[d.ID]; ok || d.Count > 1 {
		h.t.Errorf("%s has delivery %d of %s, which %s has", d.Consumer, d.Count, d.ID, other)
	}
	h.held[d.ID] = d.Consumer
	h.mu.Unlock()
	select {
	case <-h.end:
	case <-msg.Context().Done():
		if cause := context.Cause(msg.Context()); errors.Is(cause, goxstreams.ErrLeaseLost) {
			h.t.Errorf("%s: %v", d.Consumer, cause)
		}
	}
	msg.Ack()
}
