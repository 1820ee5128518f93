package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
)

// Defaults of SubscriberConfig.
const (
	defaultMaxConcurrency = 1
	defaultBatchSize      = 100
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
	// it, and takes half of its connection pool at most for reads that wait
	// (what more it needs it opens with the same options).
	Client redis.UniversalClient

	// Unmarshaler turns an entry into a message. Default: DefaultMarshaler{}.
	Unmarshaler Unmarshaler

	// ConsumerGroup: the group's consumers share the topic, each message goes to
	// one of them. Empty: fan-out, every subscription gets every message and
	// nothing is stored about it in Redis; Consumer, NoAck, DeleteAcked,
	// ClaimMinIdle and Retry's place in Redis need a group.
	ConsumerGroup string

	// Consumer is the name in the group. It need not be unique. Default: the
	// host's name and a random suffix, for each subscription, removed again when
	// it closes with nothing pending.
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
	// most. Default 100.
	BatchSize int

	// BlockTime is how long one read waits for entries, in whole milliseconds.
	// A longer time saves commands on an idle topic and delays nothing. Default
	// 5s.
	BlockTime time.Duration

	// NoAck reads with XREADGROUP NOACK: at most once. Nothing is pending, so
	// that nothing is retried, and what was read ahead is lost with the process.
	NoAck bool

	// DeleteAcked deletes acked entries from the stream, once every group has
	// acked them (goxstreams' CleaneUp). Several groups on a topic need Redis
	// 8.2; without, Subscribe fails with ErrUnsupported.
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
	if isNilClient(c.Client) {
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
	if c.Consumer == releasedConsumer {
		errs.add("Consumer", "%q is where released messages are parked", releasedConsumer)
	}
	return errs.err()
}

// isNilClient also sees a nil pointer in the interface, which is what
// forgetting to make the client leaves there.
func isNilClient(c redis.UniversalClient) bool {
	switch c := c.(type) {
	case nil:
		return true
	case *redis.Client:
		return c == nil
	case *redis.ClusterClient:
		return c == nil
	case *redis.Ring:
		return c == nil
	}
	return false
}

// Subscriber is a Watermill Subscriber over Redis Streams. It may be used by
// several goroutines at once.
type Subscriber struct {
	config SubscriberConfig
	logger watermill.LoggerAdapter
	hub    *hub
	typed  *typed // a Consumer's part; nil without

	mu      sync.Mutex
	subs    map[*subscription]struct{}
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
	return &Subscriber{
		config: config,
		logger: logger,
		hub:    newHub(config),
		subs:   make(map[*subscription]struct{}),
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
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, ErrSubscriberClosed
	}
	s.opening.Add(1)
	s.mu.Unlock()
	defer s.opening.Done()

	if topic == "" {
		return nil, errors.New("the topic is empty")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	sub := newSubscription(s, ctx, topic)
	if err := sub.open(ctx); err != nil {
		s.hub.leave(topic, sub.ordinal, true) // nothing was read
		return nil, err
	}
	if sub.fanOut() {
		s.logger.Info("Subscribing without a consumer group: fan-out, every subscription gets every message", sub.logFields)
	} else {
		s.logger.Info("Subscribing to Redis stream", sub.logFields)
	}

	s.mu.Lock()
	s.subs[sub] = struct{}{}
	if s.closed { // Close waits for it
		sub.close()
	}
	sub.start()
	s.mu.Unlock()
	go func() {
		<-sub.done
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.subs, sub)
	}()
	return sub, nil
}

// open does what must be done before Subscribe returns.
func (s *subscription) open(ctx context.Context) error {
	if s.fanOut() {
		s.reader.after = s.cfg.StartID
		if s.cfg.StartID == "$" {
			last, err := s.stream.lastID(ctx)
			if err != nil {
				return err
			}
			s.reader.after = last
		}
		return nil
	}
	if err := s.checkDeadLetters(ctx); err != nil {
		return err
	}
	if err := s.stream.createGroup(ctx, s.cfg.StartID); err != nil {
		return err
	}
	if s.cfg.DeleteAcked {
		if err := s.checkDeleteAcked(ctx); err != nil {
			return err
		}
	}
	// The others count the consumers, to share what sweeping may cost.
	if err := s.stream.createConsumer(ctx); err != nil && !denied(err) {
		return err
	}
	return nil
}

// checkDeadLetters refuses a dead-letter stream that entries cannot be moved to
// in one step.
func (s *subscription) checkDeadLetters(ctx context.Context) error {
	if s.deadLetters == "" || s.deadLetters == s.topic {
		return fmt.Errorf("SubscriberConfig.DeadLetterTopic: returned %q for this topic", s.deadLetters)
	}
	cluster, ok := s.client.(*redis.ClusterClient)
	if !ok {
		return nil
	}
	a, err := cluster.ClusterKeySlot(ctx, s.topic).Result()
	if denied(err) {
		return nil // moving a dead letter will tell
	}
	if err != nil {
		return err
	}
	b, err := cluster.ClusterKeySlot(ctx, s.deadLetters).Result()
	if err != nil {
		return err
	}
	if a != b {
		return fmt.Errorf("SubscriberConfig.DeadLetterTopic: the dead-letter stream %q is in another slot of the Cluster than the topic; "+
			"give both a common hash tag", s.deadLetters)
	}
	return nil
}

const needsAckDel = "SubscriberConfig.DeleteAcked on a topic with several groups needs XACKDEL (Redis 8.2)"

// checkDeleteAcked asks the server whether it has XACKDEL.
func (s *subscription) checkDeleteAcked(ctx context.Context) error {
	err := s.stream.hasAckAndDelete(ctx)
	if err == nil || !denied(err) {
		return err
	}
	groups, err := s.stream.groupCount(ctx)
	if err != nil {
		return err
	}
	if groups > 1 {
		return s.stream.unsupported(ctx, needsAckDel)
	}
	s.ackDelByScript = true
	return nil
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
	st := newStream(s.config.Client, topic, s.config.ConsumerGroup)
	if err := st.createGroup(context.Background(), s.config.StartID); err != nil {
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
	s.mu.Unlock()
	s.opening.Wait()
	s.mu.Lock()
	subs := make([]*subscription, 0, len(s.subs))
	for sub := range s.subs {
		subs = append(subs, sub)
	}
	s.mu.Unlock()
	for _, sub := range subs {
		sub.close()
	}
	for _, sub := range subs {
		<-sub.done
	}
	return nil
}

// generatedConsumer is a name that no one else has: two processes on one host,
// or two hosts of one name, differ in the suffix.
func generatedConsumer() string {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "consumer"
	}
	return host + "-" + watermill.NewShortUUID()
}
