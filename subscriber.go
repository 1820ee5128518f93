package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/goxstreams/watermill-goxstreams/internal/consume"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
	"github.com/redis/go-redis/v9"
)

// Defaults of SubscriberConfig.
const (
	defaultMaxConcurrency = 1
	defaultBatchSize      = 500
	defaultBlockTime      = 5 * time.Second
	defaultClaimMinIdle   = time.Minute // goxstreams' FailIdle
	defaultClaimInterval  = time.Second // goxstreams' ReadInterval
	// Below the 30s that Watermill's router and Kubernetes give.
	defaultCloseTimeout    = 25 * time.Second
	defaultConsumerTimeout = 10 * time.Minute
)

// SubscriberConfig configures a Subscriber. Only Client is required. The config
// is copied; nothing in it is changed.
type SubscriberConfig struct {
	// Client is required. It stays the caller's: the Subscriber does not close
	// it. Reads that wait take none of its pool: for these the Subscriber opens
	// connections of its own with the client's options, one for each topic and eight
	// at most (in a Cluster: for each slot). A client of another type, such as
	// struct{ redis.UniversalClient }, has no options to be known: reads that wait
	// take one connection of its pool, for 100ms each.
	Client redis.UniversalClient

	// Unmarshaler turns an entry into a message. Default: DefaultMarshaler{}.
	Unmarshaler Unmarshaler

	// ConsumerGroup: the group's consumers share the topic, each message goes to
	// one of them. Empty: fan-out, every subscription gets every message and
	// nothing is stored about it in Redis; Consumer, NoAck, DeleteAcked,
	// ClaimMinIdle and Retry's place in Redis need a group.
	ConsumerGroup string

	// Consumer is how the name in the group begins. A random suffix makes it
	// unique; the name is removed again on Close, if nothing is pending under it.
	// All subscriptions of a Subscriber have the same. Default: the host's name.
	Consumer string

	// StartID is the entry after which a group that does not exist yet, or a
	// fan-out subscription, begins: an ID such as "1700000000000-0", "0" for the
	// whole stream, "$" for what is new. Default: "0" for a group, "$" in
	// fan-out.
	StartID string

	// MaxConcurrency is how many messages of one Subscribe call may be unsettled
	// at once. Default 1, which also keeps the order: a nacked message comes
	// again before its successors, and the topic waits for it.
	MaxConcurrency int

	// BatchSize is the most entries that one read takes. What is read ahead of
	// the handlers adapts: a tenth of a second of work, and twice BatchSize at
	// most. Default 500.
	BatchSize int

	// BlockTime is how long one read waits for entries, in whole milliseconds.
	// A longer time saves commands on an idle topic, and does not delay what comes.
	// But it is what goes by until a subscription notices that its connection was
	// dropped without a word, as some balancers do with idle ones (then BlockTime
	// and the client's ReadTimeout), or that its server is not the master any more
	// and goes on answering. Stay below the balancer's idle timeout. Default 5s.
	BlockTime time.Duration

	// WaitForRedis is how long Subscribe waits for a Redis that cannot be reached,
	// or that is there and not ready (loading, say, or a replica yet), instead of
	// failing. Meanwhile Stats shows the subscription with its error, and an error is
	// logged once; Close and the end of Subscribe's context end the wait. What only
	// a change of the configuration mends, such as a wrong password, fails at once
	// all the same. 0: it does not wait. Default 0.
	WaitForRedis time.Duration

	// NoAck reads with XREADGROUP NOACK: at most once. Nothing is pending, so
	// that nothing is retried, and what was read ahead is lost with the process.
	NoAck bool

	// DeleteAcked deletes entries from the stream once every group has acked them and
	// every fan-out has read them (goxstreams' CleaneUp), also those of before it was
	// set. Several groups on a topic need Redis 8.2; without, Subscribe fails with
	// ErrUnsupported.
	DeleteAcked bool

	// ClaimMinIdle is how long a message that is being handled may go without
	// its lease being renewed, before its holder counts as dead (goxstreams'
	// FailIdle). It bounds no handler: a living process renews every third of
	// it, however long the handler takes. All consumers of a group must have the
	// same: one with less takes from those with more. Default 60s; at least 10ms.
	ClaimMinIdle time.Duration

	// ClaimInterval is how often to look for messages whose holder is dead, and
	// for those released by consumers that closed (goxstreams' ReadInterval,
	// FailReadTime). At most ClaimMinIdle. Default 1s, or ClaimMinIdle if that is
	// less.
	ClaimInterval time.Duration

	// Retry says when nacked messages come again, and how often. Its limit is
	// checked before Unmarshal. Default: without limit, 100ms..30s, doubling. In
	// fan-out it cannot be set: a nacked message comes again after 100ms.
	Retry *Retry

	// OnBroken gets entries that the Unmarshaler rejects. nil: the entry is
	// acked and gone. An error that IsDead is true for, such as ErrDead: it moves
	// to the dead-letter stream. Any other, or a panic: it comes again after
	// Retry's delay. Meanwhile the topic goes on. Default: the entry moves to
	// the dead-letter stream. With NoAck and in fan-out nothing is moved. The
	// context ends a second before CloseTimeout.
	OnBroken func(context.Context, BrokenMessage) error

	// OnDead is told of every message that was moved to the dead-letter stream,
	// after the move, at most once. It runs in the message's place: what it
	// waits for, the next message waits for. Its context ends as OnBroken's does.
	OnDead func(context.Context, DeadMessage)

	// DeadLetterTopic names a topic's dead-letter stream. On Cluster both must
	// be in one slot. Default: DeadLetterTopic.
	DeadLetterTopic func(topic string) string

	// CloseTimeout bounds the drain: handlers that have a message when the
	// subscription closes get this long, the last second of it (the last half,
	// below 2s) with their contexts ended. Default 25s.
	CloseTimeout time.Duration

	// ConsumerTimeout is after how much idle time a consumer with nothing
	// pending is removed from the group. Default 10m.
	ConsumerTimeout time.Duration
}

// withDefaults returns a copy with the defaults filled in.
func (c SubscriberConfig) withDefaults() SubscriberConfig {
	if c.Unmarshaler == nil {
		c.Unmarshaler = DefaultMarshaler{}
	}
	if c.StartID == "" {
		c.StartID = "0"
		if c.ConsumerGroup == "" {
			c.StartID = "$"
		}
	}
	if c.MaxConcurrency == 0 {
		c.MaxConcurrency = defaultMaxConcurrency
	}
	if c.BatchSize == 0 {
		c.BatchSize = defaultBatchSize
	}
	if c.BlockTime == 0 {
		c.BlockTime = defaultBlockTime
	}
	if c.ClaimMinIdle == 0 {
		c.ClaimMinIdle = defaultClaimMinIdle
	}
	if c.ClaimInterval == 0 {
		c.ClaimInterval = min(defaultClaimInterval, c.ClaimMinIdle)
	}
	retry := defaultRetry
	switch {
	case c.Retry != nil:
		retry = *c.Retry
	case c.ConsumerGroup == "":
		retry = fanOutRetry
	}
	retry = retry.withDefaults()
	c.Retry = &retry
	if c.DeadLetterTopic == nil {
		c.DeadLetterTopic = DeadLetterTopic
	}
	if c.CloseTimeout == 0 {
		c.CloseTimeout = defaultCloseTimeout
	}
	if c.ConsumerTimeout == 0 {
		c.ConsumerTimeout = defaultConsumerTimeout
	}
	return c
}

// isStartID reports whether Redis takes the ID to start at: "$", or one or two
// numbers of 64 bits.
func isStartID(id string) bool {
	if id == "$" {
		return true
	}
	ms, seq, whole := strings.Cut(id, "-")
	_, err := strconv.ParseUint(ms, 10, 64)
	if whole && err == nil {
		_, err = strconv.ParseUint(seq, 10, 64)
	}
	return err == nil
}

// minLease keeps renewals apart from each other.
const minLease = 10 * time.Millisecond

// validate returns every mistake of the config as the caller gave it.
func (c SubscriberConfig) validate() error {
	errs := configErrors{typeName: "SubscriberConfig"}
	if redisx.IsNil(c.Client) {
		errs.add("Client", "is required")
	}
	if c.StartID != "" && !isStartID(c.StartID) {
		errs.add("StartID", `is %q; it must be "$", "0" or an entry ID such as "1700000000000-0"`, c.StartID)
	}
	for _, f := range []struct {
		name  string
		value int
	}{{"MaxConcurrency", c.MaxConcurrency}, {"BatchSize", c.BatchSize}} {
		if f.value < 0 {
			errs.add(f.name, "is negative: %d", f.value)
		}
	}
	for _, f := range []struct {
		name  string
		value time.Duration
		least time.Duration
	}{
		{"BlockTime", c.BlockTime, time.Millisecond}, // 0 ms would mean forever
		{"WaitForRedis", c.WaitForRedis, time.Millisecond},
		{"ClaimMinIdle", c.ClaimMinIdle, minLease},
		{"ClaimInterval", c.ClaimInterval, time.Millisecond},
		{"CloseTimeout", c.CloseTimeout, time.Millisecond},
		{"ConsumerTimeout", c.ConsumerTimeout, time.Millisecond},
	} {
		if f.value < 0 {
			errs.add(f.name, "is negative: %v", f.value)
		} else if f.value > 0 && f.value < f.least {
			errs.add(f.name, "is %v; it must be %v at least", f.value, f.least)
		}
	}
	minIdle := c.ClaimMinIdle
	if minIdle <= 0 { // a negative one is a mistake of its own
		minIdle = defaultClaimMinIdle
	}
	if c.ClaimInterval > minIdle {
		errs.add("ClaimInterval", "%v is over ClaimMinIdle %v", c.ClaimInterval, minIdle)
	}
	if c.Retry != nil {
		c.Retry.validate(&errs)
	}
	if m, ok := c.Unmarshaler.(BodyMarshaler); ok {
		if err := m.validate(); err != nil {
			errs.add("Unmarshaler", "%v", err)
		}
	}
	if c.ConsumerGroup == "" {
		for _, f := range []struct {
			name string
			set  bool
		}{
			{"Consumer", c.Consumer != ""}, {"NoAck", c.NoAck}, {"DeleteAcked", c.DeleteAcked},
			{"ClaimMinIdle", c.ClaimMinIdle != 0}, {"Retry", c.Retry != nil},
		} {
			if f.set {
				errs.add(f.name, "needs a ConsumerGroup")
			}
		}
	}
	if c.NoAck && c.Retry != nil {
		errs.add("NoAck", "excludes Retry: nothing is pending that could come again")
	}
	if c.NoAck && c.DeleteAcked {
		errs.add("NoAck", "excludes DeleteAcked: nothing is acked")
	}
	return errs.err()
}

// Subscriber is a Watermill Subscriber over Redis Streams. It may be used by
// several goroutines at once.
type Subscriber struct {
	config SubscriberConfig
	logger watermill.LoggerAdapter
	client redisx.Client
	shared *consume.Shared
	typed  *typed // a Consumer's part; nil without

	mu      sync.Mutex
	subs    map[*subscription]struct{} // those that open among them
	opening sync.WaitGroup
	closed  bool
}

var (
	_ message.Subscriber           = (*Subscriber)(nil)
	_ message.SubscribeInitializer = (*Subscriber)(nil)
)

// subscriberName is what Watermill's logs and metadata call a Subscriber.
const subscriberName = "goxstreams.Subscriber"

// NewSubscriber returns a Subscriber. Its error names every mistake in the
// config. A nil logger logs nothing.
func NewSubscriber(config SubscriberConfig, logger watermill.LoggerAdapter) (*Subscriber, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	if logger == nil {
		logger = watermill.NopLogger{}
	}
	config = config.withDefaults()
	client := redisx.Client{UniversalClient: config.Client}
	return &Subscriber{
		config: config,
		logger: logger,
		client: client,
		shared: consume.NewShared(consume.SharedConfig{
			Client: client, Group: config.ConsumerGroup, Consumer: config.Consumer, NoAck: config.NoAck,
			BlockTime: config.BlockTime, BatchSize: config.BatchSize, ClaimInterval: config.ClaimInterval, Log: logger,
		}),
		subs: make(map[*subscription]struct{}),
	}, nil
}

// String names the Subscriber in Watermill's logs and metadata.
func (s *Subscriber) String() string { return subscriberName }

// Subscribe returns the channel of the topic's messages. It makes the stream
// and the group if need be; in fan-out, whatever is published after it returned
// is received.
//
// The end of ctx closes this subscription as Close does all: reading stops at
// once, messages that were handed out keep a live context until CloseTimeout
// less a second, their acks reach Redis, what was not handed out is released,
// then the channel closes. A message's context has the values of ctx.
func (s *Subscriber) Subscribe(ctx context.Context, topic string) (<-chan *message.Message, error) {
	sub, err := s.subscribe(ctx, topic)
	if err != nil {
		return nil, fmt.Errorf("goxstreams: subscribe to %q: %w", topic, err)
	}
	return sub.output, nil
}

func (s *Subscriber) subscribe(ctx context.Context, topic string) (*subscription, error) {
	if topic == "" {
		return nil, errors.New("the topic is empty")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	sub := newSubscription(ctx, s, topic) // calls DeadLetterTopic, which may call Close
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, ErrSubscriberClosed
	}
	s.opening.Add(1)
	s.subs[sub] = struct{}{}
	s.mu.Unlock()
	defer s.opening.Done()

	if err := sub.Open(ctx); err != nil {
		s.forget(sub)
		return nil, err
	}
	sub.start(func() { s.forget(sub) })
	return sub, nil
}

func (s *Subscriber) forget(sub *subscription) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.subs, sub)
}

// SubscribeInitialize makes the topic's stream and the group, so that what is
// published from now on is kept for it. It may be called again; in fan-out there
// is nothing to do.
func (s *Subscriber) SubscribeInitialize(topic string) error {
	if topic == "" {
		return errors.New("goxstreams: initialize: the topic is empty")
	}
	if s.config.ConsumerGroup == "" {
		return nil
	}
	st := xstream.New(s.client, topic, s.config.ConsumerGroup)
	if _, err := st.CreateGroup(context.Background(), s.config.StartID); err != nil {
		return fmt.Errorf("goxstreams: initialize %q: %w", topic, err)
	}
	return nil
}

// Close closes all subscriptions, as the end of their contexts does, and
// returns when their channels are closed: after CloseTimeout at most, and a
// command's timeout if Redis does not answer. It does not close the client. It
// may be called again, and returns nil.
func (s *Subscriber) Close() error {
	s.mu.Lock()
	s.closed = true
	for sub := range s.subs {
		sub.Close() // those that open end it, or are closed at once
	}
	s.mu.Unlock()
	s.opening.Wait()
	s.mu.Lock()
	subs := make([]*subscription, 0, len(s.subs))
	for sub := range s.subs {
		subs = append(subs, sub)
	}
	s.mu.Unlock()
	for _, sub := range subs {
		<-sub.done
	}
	return nil
}
