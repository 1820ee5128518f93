package consume

import (
	"cmp"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/pipeline"
	"github.com/goxstreams/watermill-goxstreams/internal/poll"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/takeover"
)

// subscriberConns is 2, so that a slow command does not hold up the others.
const subscriberConns = 2

// Shared is what the subscriptions of a Subscriber share: a pipeline for commands,
// the blocking connections, the first part of their consumers' names, and limits.
type Shared struct {
	client   redisx.Client
	pipe     *pipeline.Pipeline // for all commands except blocking reads
	poller   *poll.Poller
	consumer string

	mu    sync.Mutex
	names map[nameKey]bool // consumers that are in use

	// The looks at all topics happen at the same time, to share a pipeline.
	epoch time.Time
	tick  time.Duration

	Bounds *ledger.Bounds
}

type nameKey struct{ topic, consumer string }

// NewShared returns a Shared for subscriptions with that Config, whose fields for one topic it
// does not use. It opens no connections.
func NewShared(client redisx.Client, c Config) *Shared {
	log := c.Log
	s := &Shared{
		client: client, pipe: pipeline.New(client, subscriberConns), consumer: consumerName(c.Consumer),
		epoch: time.Now(), tick: c.ClaimInterval - c.ClaimInterval/10 + takeover.Jitter(c.ClaimInterval/10),
		names: make(map[nameKey]bool), Bounds: ledger.NewBounds(),
	}
	s.poller = poll.New(poll.Config{
		Client: client, Pipeline: s.pipe, Group: c.Group, NoAck: c.NoAck, Block: c.BlockTime, Batch: c.BatchSize,
		Unwakable: func() {
			if client.Wrapped() {
				log.Info("The client's type is not one of go-redis's: its topics share one connection of its pool, for 0.1s at a time", nil)
				return
			}
			log.Info("No permission for CLIENT ID and CLIENT UNBLOCK: Close waits up to 1s for the current read; "+
				"topics that share a connection may be noticed 0.1s late", nil)
		},
	})
	return s
}

// consumerName returns a unique name: two processes on one host, or two hosts with
// the same name, differ in the suffix.
func consumerName(prefix string) string {
	host, _ := os.Hostname()
	return cmp.Or(prefix, host, "consumer") + "-" + watermill.NewShortUUID()
}

// nameFor returns a consumer that no other subscription of the topic is, nor was when it
// left entries pending. As far as possible it is the same for all topics: only then can one
// command read several.
func (s *Shared) nameFor(topic string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := s.consumer
	for i := 2; s.names[nameKey{topic, name}]; i++ {
		name = fmt.Sprint(s.consumer, "-", i)
	}
	s.names[nameKey{topic, name}] = true
	return name
}

// returnName is called when nothing is pending for the consumer any more.
func (s *Shared) returnName(topic, consumer string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.names, nameKey{topic, consumer})
}

// next returns the time of the next tick of that length. All topics tick together, to
// share a pipeline.
func (s *Shared) next(tick time.Duration) time.Time {
	return s.epoch.Add((time.Since(s.epoch)/tick + 1) * tick)
}

// until returns the time until then.
func (s *Shared) until(tick time.Duration) time.Duration { return time.Until(s.next(tick)) }
