package goxstreams

import (
	"cmp"
	"context"
	"errors"
	"slices"
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
	// Below the 30s that Watermill's router and Kubernetes allow by default.
	defaultCloseTimeout    = 25 * time.Second
	defaultConsumerTimeout = 10 * time.Minute
)

// SubscriberConfig configures a Subscriber. Only Client is required. NewSubscriber
// copies the config and never changes it.
type SubscriberConfig struct {
	// Client is required. The caller owns it: the Subscriber never closes it.
	// Blocking reads do not use its pool. The Subscriber opens its own connections
	// for them, with the client's options: one per topic, at most eight (in a
	// Cluster, at most eight per slot). The options of a wrapped client, such as
	// struct{ redis.UniversalClient }, are unknown: then blocking reads share one
	// connection of its pool and use it for 100ms at a time.
	Client redis.UniversalClient

	// Unmarshaler converts an entry to a message. Default: DefaultMarshaler{}.
	Unmarshaler Unmarshaler

	// ConsumerGroup is the Redis consumer group: its consumers share the topic, and
	// each message goes to one of them. Empty means fan-out: every subscription
	// receives every message, and Redis stores no state of its deliveries.
	// Consumer, NoAck, DeleteAcked, ClaimMinIdle, Retry and KeepDeadLetters require a
	// group.
	ConsumerGroup string

	// Consumer is the prefix of the consumer's name in the group. A random suffix
	// makes the name unique, and each further subscription of the same topic adds a
	// number. Close removes it from the group unless entries are still pending for it.
	// Default: the host name.
	Consumer string

	// StartID is the entry ID after which a newly created group or a fan-out
	// subscription starts: an ID such as "1700000000000-0", "0" for the whole
	// stream, or "$" for new entries only. Default: "0" for a group, "$" for
	// fan-out.
	StartID string

	// MaxConcurrency is the maximum number of unsettled messages per Subscribe
	// call. Default: 1, which also preserves order: a nacked message is redelivered
	// before its successors, which wait for it.
	MaxConcurrency int

	// OrderingKey returns the key of a message, such as a customer's number. Messages
	// with the same key are handled one at a time, in stream order: a nacked one is
	// redelivered before its successors, which wait for it without a slot. Messages with
	// different keys are handled concurrently, up to MaxConcurrency; with an empty key
	// there is no order. It holds within a subscription: two processes of a group can
	// handle messages with the same key at the same time. A dead message, and one that
	// OnBroken gets, frees its key.
	//
	// It is called in stream order, by one goroutine at a time, for messages that were
	// just read, and otherwise concurrently. It must be quick, must return the same key
	// for the same message, and must not change the message. If it panics, the entry is
	// malformed. Default: no keys.
	OrderingKey func(*message.Message) string

	// BatchSize is the maximum number of entries per read. The number of entries
	// read ahead of the handlers adapts to their speed: about a tenth of a second
	// of work, at most twice BatchSize. Default: 500.
	BatchSize int

	// BlockTime is how long one read blocks while the topic is idle, in whole
	// milliseconds. A longer BlockTime saves commands on idle topics and does not
	// delay new entries. But a subscription needs up to BlockTime to notice that
	// its server is no longer the master but still answers, and up to BlockTime
	// plus the client's ReadTimeout to notice a connection that was dropped
	// silently, as some load balancers do with idle ones. Keep it below the load
	// balancer's idle timeout. It is limited to half of ClaimMinIdle: the lease of an
	// entry counts from when its read was sent. Default: 5s.
	BlockTime time.Duration

	// WaitForRedis is how long Subscribe waits, instead of failing, for a Redis
	// that is unreachable or not ready (for example, loading, still a replica, or, for a
	// new group, out of memory).
	// Meanwhile Stats shows the subscription with its error, and one error is
	// logged. Close and the end of Subscribe's context end the wait. Errors that
	// only a change of configuration can fix, such as a wrong password, still fail
	// at once. Default: 0, do not wait.
	WaitForRedis time.Duration

	// NoAck reads with XREADGROUP NOACK: at-most-once delivery. Nothing is ever
	// pending, so nothing is retried, and entries that were read ahead are lost
	// with the process.
	NoAck bool

	// DeleteAcked deletes entries from the stream once every group has acked them
	// and every fan-out subscription has read them (goxstreams' CleaneUp). This
	// includes entries acked before the option was set. With Redis 8.2 or a single group an
	// entry is deleted when it is acked. Otherwise it is trimmed within seconds, if all entries
	// before it have been acked, too. Excludes Retention.KeepLast and KeepFor.
	DeleteAcked bool

	// Retention trims the topic: entries that every group has acked and every fan-out
	// has read, except for those that it keeps. Each second one of the topic's consumers does
	// this, in steps of about a millisecond. Consumers with different values trim
	// what any of them allows. Default: nothing is trimmed.
	Retention Retention

	// KeepDeadLetters is how long dead letters are kept, by the time of their death.
	// If a group consumes the dead-letter stream, what it has not acked stays.
	// Default: 0, they are not trimmed. Minimum: 1ms.
	KeepDeadLetters time.Duration

	// ClaimMinIdle is how long a message may be pending without a lease renewal
	// before its consumer counts as dead (goxstreams' FailIdle). It does not limit
	// handlers: a living process renews its leases every third of ClaimMinIdle,
	// however long a handler takes. All consumers of a group must use the same
	// value: a consumer with a shorter one takes messages from living consumers.
	// Default: 60s. Minimum: 10ms.
	ClaimMinIdle time.Duration

	// ClaimInterval is how often the subscription looks for messages of dead
	// consumers, and for messages that closed consumers released (goxstreams'
	// ReadInterval, FailReadTime). At most ClaimMinIdle. Default: 1s, or
	// ClaimMinIdle if that is less.
	ClaimInterval time.Duration

	// Retry says when and how often nacked messages are redelivered. Its limit is
	// checked before Unmarshal. Default: no limit, with a backoff that doubles from
	// 100ms to 30s. It cannot be set for fan-out, which redelivers a nacked message
	// after 100ms.
	Retry *Retry

	// OnBroken handles malformed entries: those that the Unmarshaler rejects. If it
	// returns nil, the entry is acked and dropped. If it returns an error for which
	// IsDead is true, such as ErrDead, the entry moves to the dead-letter stream.
	// After any other error, or a panic, OnBroken is called again after Retry's
	// delay; meanwhile other entries are delivered. Its context ends a second
	// before CloseTimeout. Default: the entry moves to the dead-letter stream. With
	// NoAck and fan-out nothing is moved.
	OnBroken func(context.Context, BrokenMessage) error

	// OnDead is called after a message has moved to the dead-letter stream, at most
	// once per message. It keeps the message's slot while it runs, so a slow OnDead
	// delays the next message. Its context ends as OnBroken's does.
	OnDead func(context.Context, DeadMessage)

	// OnOutcome is called with the outcome of each delivery, for metrics, audit logs
	// and tests. It runs in the message's slot, before an ack or a retry is carried out
	// and after a move to the dead-letter stream; the next message waits for it. It is
	// not called for deliveries that end without a decision: those released because the
	// subscription closes (a retry that was reported may be released, too), those lost to
	// another consumer, and those nacked with NoAck. A panic is logged and has no
	// further effect.
	OnOutcome func(Outcome)

	// DeadLetterTopic returns the dead-letter stream of a topic. In a Cluster both
	// must hash to the same slot. Default: the function DeadLetterTopic.
	DeadLetterTopic func(topic string) string

	// CloseTimeout bounds the drain. When the subscription closes, running handlers
	// have this long to finish. In its last second (its second half, if it is below
	// 2s) their contexts are canceled. Default: 25s.
	CloseTimeout time.Duration

	// ConsumerTimeout is the idle time after which a consumer without pending
	// entries is removed from the group. Default: 10m.
	ConsumerTimeout time.Duration
}

// withDefaults returns a copy with the defaults filled in.
func (c SubscriberConfig) withDefaults() SubscriberConfig {
	c.Unmarshaler = cmp.Or[Unmarshaler](c.Unmarshaler, DefaultMarshaler{})
	if c.StartID == "" {
		c.StartID = "0"
		if c.ConsumerGroup == "" {
			c.StartID = "$"
		}
	}
	c.MaxConcurrency = cmp.Or(c.MaxConcurrency, defaultMaxConcurrency)
	c.BatchSize = cmp.Or(c.BatchSize, defaultBatchSize)
	c.BlockTime = cmp.Or(c.BlockTime, defaultBlockTime)
	c.ClaimMinIdle = cmp.Or(c.ClaimMinIdle, defaultClaimMinIdle)
	if c.ConsumerGroup != "" {
		c.BlockTime = min(c.BlockTime, c.ClaimMinIdle/2)
	}
	c.ClaimInterval = cmp.Or(c.ClaimInterval, min(defaultClaimInterval, c.ClaimMinIdle))
	c.CloseTimeout = cmp.Or(c.CloseTimeout, defaultCloseTimeout)
	c.ConsumerTimeout = cmp.Or(c.ConsumerTimeout, defaultConsumerTimeout)
	c.Retention.IgnoreGroups = slices.Clone(c.Retention.IgnoreGroups)
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
	return c
}

// isStartID reports whether Redis accepts the ID as a start position: "$", or one
// or two 64-bit numbers.
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

// minLease is the minimum ClaimMinIdle: renewals, a third of it apart, must not
// overlap.
const minLease = 10 * time.Millisecond

// validate returns every mistake in the config, as the caller gave it.
func (c SubscriberConfig) validate() error {
	errs := configErrors{typeName: "SubscriberConfig"}
	errs.addIf(redisx.IsNil(c.Client), "Client", "is required")
	errs.addIf(c.StartID != "" && !isStartID(c.StartID), "StartID", `is %q; it must be "$", "0" or an entry ID such as "1700000000000-0"`, c.StartID)
	atLeast(&errs, "MaxConcurrency", c.MaxConcurrency, 0)
	atLeast(&errs, "BatchSize", c.BatchSize, 0)
	atLeast(&errs, "BlockTime", c.BlockTime, time.Millisecond) // BLOCK 0 would block forever
	atLeast(&errs, "WaitForRedis", c.WaitForRedis, time.Millisecond)
	atLeast(&errs, "ClaimMinIdle", c.ClaimMinIdle, minLease)
	atLeast(&errs, "ClaimInterval", c.ClaimInterval, time.Millisecond)
	atLeast(&errs, "CloseTimeout", c.CloseTimeout, time.Millisecond)
	atLeast(&errs, "ConsumerTimeout", c.ConsumerTimeout, time.Millisecond)
	atLeast(&errs, "KeepDeadLetters", c.KeepDeadLetters, time.Millisecond)
	minIdle := cmp.Or(max(c.ClaimMinIdle, 0), defaultClaimMinIdle) // a negative one is reported above
	errs.addIf(c.ClaimInterval > minIdle, "ClaimInterval", "is %v; it must not exceed ClaimMinIdle (%v)", c.ClaimInterval, minIdle)
	if c.Retry != nil {
		c.Retry.validate(&errs)
	}
	c.Retention.validate("Retention.", &errs)
	ignored := c.Retention.IgnoreGroups
	errs.addIf(len(ignored) > 0 && c.Retention.isZero() && !c.DeleteAcked, "Retention.IgnoreGroups", "needs KeepLast, KeepFor, HardMaxLen or DeleteAcked")
	errs.addIf(c.ConsumerGroup != "" && slices.Contains(ignored, c.ConsumerGroup), "Retention.IgnoreGroups", "contains the ConsumerGroup: its messages would be lost")
	errs.addIf(c.DeleteAcked && (c.Retention.KeepLast != 0 || c.Retention.KeepFor != 0), "DeleteAcked", "excludes Retention.KeepLast and Retention.KeepFor: it keeps nothing")
	errs.marshaler("Unmarshaler", c.Unmarshaler)
	const needsGroup = "needs a ConsumerGroup"
	fanOut := c.ConsumerGroup == ""
	errs.addIf(fanOut && c.Consumer != "", "Consumer", needsGroup)
	errs.addIf(fanOut && c.NoAck, "NoAck", needsGroup)
	errs.addIf(fanOut && c.DeleteAcked, "DeleteAcked", needsGroup)
	errs.addIf(fanOut && c.ClaimMinIdle != 0, "ClaimMinIdle", needsGroup)
	errs.addIf(fanOut && c.Retry != nil, "Retry", needsGroup)
	errs.addIf(fanOut && c.KeepDeadLetters != 0, "KeepDeadLetters", needsGroup)
	errs.addIf(c.NoAck && c.Retry != nil, "NoAck", "excludes Retry: nothing is pending, so nothing can be redelivered")
	errs.addIf(c.NoAck && c.DeleteAcked, "NoAck", "excludes DeleteAcked: nothing is acked")
	return errs.err()
}

// Subscriber is a Watermill Subscriber over Redis Streams. It is safe for
// concurrent use.
type Subscriber struct {
	config SubscriberConfig
	logger watermill.LoggerAdapter
	client redisx.Client
	shared *consume.Shared
	typed  typed // the Consumer's part; empty without a Consumer

	mu     sync.Mutex
	subs   map[*subscription]struct{} // including those still being opened
	open   sync.WaitGroup             // counts them
	closed bool
}

var (
	_ message.Subscriber           = (*Subscriber)(nil)
	_ message.SubscribeInitializer = (*Subscriber)(nil)
)

// subscriberName is the Subscriber's name in Watermill's logs and metadata.
const subscriberName = "goxstreams.Subscriber"

// NewSubscriber returns a Subscriber. The error lists every mistake in the config.
// A nil logger discards all logs.
func NewSubscriber(config SubscriberConfig, logger watermill.LoggerAdapter) (*Subscriber, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	logger = cmp.Or[watermill.LoggerAdapter](logger, watermill.NopLogger{})
	s := &Subscriber{
		config: config.withDefaults(),
		logger: logger,
		client: redisx.Client{UniversalClient: config.Client},
		subs:   make(map[*subscription]struct{}),
	}
	s.shared = consume.NewShared(s.client, s.settings())
	return s, nil
}

// String returns the Subscriber's name for Watermill's logs and metadata.
func (s *Subscriber) String() string { return subscriberName }

// Subscribe returns a channel of the topic's messages. It creates the stream and
// the group if necessary. A fan-out subscription receives everything that is
// published after Subscribe has returned.
//
// The end of ctx closes this subscription, as Close closes all: reading stops at
// once, delivered messages keep a live context until a second before CloseTimeout,
// their acks reach Redis, undelivered messages are released, and then the channel
// closes. A message's context carries the values of ctx.
func (s *Subscriber) Subscribe(ctx context.Context, topic string) (<-chan *message.Message, error) {
	sub, err := s.subscribe(ctx, topic, nil)
	if err != nil {
		return nil, err
	}
	return sub.output, nil
}

// subscribe opens a subscription. With a handler it calls that instead of sending to
// the channel.
func (s *Subscriber) subscribe(ctx context.Context, topic string, handler func(*message.Message)) (*subscription, error) {
	sub, err := s.start(ctx, topic, handler)
	return sub, wrap(err, "subscribe to %q", topic)
}

func (s *Subscriber) start(ctx context.Context, topic string, handler func(*message.Message)) (*subscription, error) {
	if topic == "" {
		return nil, errors.New("the topic is empty")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	sub := newSubscription(ctx, s, topic, handler) // calls DeadLetterTopic, which may call Close
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		sub.Close()
		return nil, ErrSubscriberClosed
	}
	s.open.Add(1)
	s.subs[sub] = struct{}{}
	s.mu.Unlock()

	if err := sub.Open(); err != nil {
		s.ended(sub)
		return nil, err
	}
	latest.Store(sub)
	sub.Start()
	go func() {
		<-sub.Done()
		latest.CompareAndSwap(sub, nil)
		s.ended(sub)
	}()
	return sub, nil
}

func (s *Subscriber) ended(sub *subscription) {
	s.mu.Lock()
	delete(s.subs, sub)
	s.mu.Unlock()
	close(sub.output)
	s.open.Done()
}

// SubscribeInitialize creates the topic's stream and the group, so that messages
// published from now on are kept for the group. It may be called repeatedly. For
// fan-out it does nothing.
func (s *Subscriber) SubscribeInitialize(topic string) error {
	if topic == "" {
		return errors.New("goxstreams: initialize: the topic is empty")
	}
	if s.config.ConsumerGroup == "" {
		return nil
	}
	st := xstream.New(s.client, topic, s.config.ConsumerGroup)
	return wrap(st.CreateGroup(context.Background(), s.config.StartID, s.config.ClaimMinIdle), "initialize %q", topic)
}

// Close closes all subscriptions, as the end of their contexts does, and returns
// when their channels are closed: after CloseTimeout at the latest, plus one
// command's timeout if Redis does not answer. It does not close the client. It may
// be called repeatedly, and always returns nil.
func (s *Subscriber) Close() error {
	s.mu.Lock()
	s.closed = true
	for sub := range s.subs {
		sub.Close() // subscriptions still being opened give up or close at once
	}
	s.mu.Unlock()
	s.open.Wait()
	return nil
}
