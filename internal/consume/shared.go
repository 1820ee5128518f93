package consume

import (
	"os"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/pipeline"
	"github.com/goxstreams/watermill-goxstreams/internal/poll"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

const (
	// subscriberConns is 2, so that a slow command does not hold up the others.
	subscriberConns = 2
)

// Shared is what the subscriptions of a Subscriber share: a pipeline for commands,
// the blocking connections, the consumer's name, and limits.
type Shared struct {
	client   redisx.Client
	pipe     *pipeline.Pipeline // for all commands except blocking reads
	poller   *poll.Poller
	consumer string

	// The looks at all topics happen at the same time, to share a pipeline.
	epoch time.Time
	tick  time.Duration

	Bounds *ledger.Bounds
}

// SharedConfig holds fields of SubscriberConfig.
type SharedConfig struct {
	Client        redisx.Client
	Group         string
	Consumer      string // prefix of the name
	NoAck         bool
	BlockTime     time.Duration
	BatchSize     int
	ClaimInterval time.Duration
	Log           watermill.LoggerAdapter
}

// NewShared returns a Shared. It opens no connections.
func NewShared(c SharedConfig) *Shared {
	client, log := c.Client, c.Log
	s := &Shared{
		client: client, pipe: pipeline.New(client, subscriberConns, true), consumer: consumerName(c.Consumer),
		epoch: time.Now(), tick: c.ClaimInterval - c.ClaimInterval/10 + jitter(c.ClaimInterval/10),
		Bounds: ledger.NewBounds(),
	}
	s.poller = poll.New(poll.Config{
		Client: client, Pipeline: s.pipe, Group: c.Group, Consumer: s.consumer, NoAck: c.NoAck, Block: c.BlockTime, Batch: c.BatchSize,
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
	if prefix == "" {
		if host, err := os.Hostname(); err == nil {
			prefix = host
		}
	}
	if prefix == "" {
		prefix = "consumer"
	}
	return prefix + "-" + watermill.NewShortUUID()
}

// untilTick returns the time until the next look at the groups.
func (s *Shared) untilTick() time.Duration {
	return s.tick - time.Since(s.epoch)%s.tick
}
