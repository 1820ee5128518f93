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
	// subscriberConns: a command that takes long must not hold up the others.
	subscriberConns = 2
)

// Shared is what the subscriptions of a Subscriber have in common: a pipeline for
// commands, the connections that wait for entries, a consumer's name, and bounds.
type Shared struct {
	client   redisx.Client
	pipe     *pipeline.Pipeline // for all but reads that block
	poller   *poll.Poller
	consumer string

	// The looks at all topics come at the same time, to share a pipeline.
	epoch time.Time
	tick  time.Duration

	Bounds *ledger.Bounds
}

// SharedConfig has the fields of SubscriberConfig.
type SharedConfig struct {
	Client        redisx.Client
	Group         string
	Consumer      string // how its name begins
	NoAck         bool
	BlockTime     time.Duration
	BatchSize     int
	ClaimInterval time.Duration
	Log           watermill.LoggerAdapter
}

// NewShared opens no connection yet.
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
				log.Info("The client is not one of go-redis's own: its topics share one connection of its pool, and take it for 0.1s at a time", nil)
				return
			}
			log.Info("No right to CLIENT ID and CLIENT UNBLOCK: Close waits for the read under way, 1s at most; "+
				"of topics that share a connection one may be noticed 0.1s late", nil)
		},
	})
	return s
}

// consumerName is a name that no one else has: two processes on one host, or two
// hosts of one name, differ in the suffix.
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
