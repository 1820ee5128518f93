package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
)

// PublisherConfig configures a Publisher. Only Client is required. The config is
// copied; nothing in it is changed.
type PublisherConfig struct {
	// Client is required. It stays the caller's: the Publisher does not close it.
	Client redis.UniversalClient

	// Marshaler turns a message into an entry's fields. Default:
	// DefaultMarshaler{}.
	Marshaler Marshaler

	// DefaultMaxLen trims each stream, as messages are added, to about as many
	// entries: never fewer. 0: unbounded. What is trimmed before every group has
	// handled it is lost; Stats().Lost counts what was pending.
	DefaultMaxLen int64

	// MaxLens is DefaultMaxLen by topic. 0: that topic is unbounded.
	MaxLens map[string]int64

	// Idempotence stores the same UUID once, so that a call with ErrOutcomeUnknown
	// can be repeated. It needs Redis 8.6.2. nil: off. &Idempotence{}: on, with its
	// defaults.
	Idempotence *Idempotence
}

func (c PublisherConfig) validate() error {
	errs := configErrors{typeName: "PublisherConfig"}
	if isNilClient(c.Client) {
		errs.add("Client", "is required")
	}
	if c.DefaultMaxLen < 0 {
		errs.add("DefaultMaxLen", "is negative: %d", c.DefaultMaxLen)
	}
	if m, ok := c.Marshaler.(BodyMarshaler); ok {
		if err := m.validate(); err != nil {
			errs.add("Marshaler", "%v", err)
		}
	}
	for _, topic := range slices.Sorted(maps.Keys(c.MaxLens)) {
		if n := c.MaxLens[topic]; n < 0 {
			errs.add(fmt.Sprintf("MaxLens[%q]", topic), "is negative: %d", n)
		}
	}
	if c.Idempotence != nil {
		c.Idempotence.validate(&errs)
	}
	return errs.err()
}

// Publisher is a Watermill Publisher over Redis Streams. It may be used by
// several goroutines at once; calls that come while one is under way share a
// pipeline.
type Publisher struct {
	config PublisherConfig
	client redis.UniversalClient
	single *redis.Client // nil: no raw MULTI in a pipeline (Cluster, Ring)
	logger watermill.LoggerAdapter
	quiet  bool // the logger discards everything

	probe sync.Mutex
	multi map[string]*question // whether MULTI is allowed, by the node's address; guarded by probe

	prepared sync.Map // topics whose streams are set for Idempotence

	line *line // what gathers while a pipeline is under way shares the next

	calls sync.RWMutex // held by each call; Close waits for it
}

var _ message.Publisher = (*Publisher)(nil)

// NewPublisher returns a Publisher. Its error names every mistake in the config.
// A nil logger logs nothing.
func NewPublisher(config PublisherConfig, logger watermill.LoggerAdapter) (*Publisher, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	if config.Marshaler == nil {
		config.Marshaler = DefaultMarshaler{}
	}
	config.MaxLens = maps.Clone(config.MaxLens)
	if config.Idempotence != nil {
		config.Idempotence = config.Idempotence.withDefaults()
	}
	if logger == nil {
		logger = watermill.NopLogger{}
	}
	single, _ := config.Client.(*redis.Client)
	_, quiet := logger.(watermill.NopLogger)
	return &Publisher{config: config, client: config.Client, single: single, line: newLine(config.Client, 1), logger: logger, quiet: quiet}, nil
}

// String names the Publisher in Watermill's logs and metadata.
func (p *Publisher) String() string { return "goxstreams.Publisher" }

// Publish adds the messages to the topic's stream, in their order, in one round
// trip: all of them, or none. It returns nil when Redis has stored them, and an
// error when it has not, with one exception: errors.Is(err, ErrOutcomeUnknown)
// says that the connection broke before the answer. Nothing is sent a second
// time. (The first call of several messages asks for the right to MULTI before.)
//
// The messages' contexts are there for their values (tracing); their end is
// ignored, the client's timeouts bound the call. To publish nothing does nothing.
func (p *Publisher) Publish(topic string, messages ...*message.Message) error {
	p.calls.RLock()
	defer p.calls.RUnlock()
	if len(messages) == 0 {
		return nil
	}
	if err := p.publish(topic, messages); err != nil {
		return fmt.Errorf("goxstreams: publish to %q: %w", topic, err)
	}
	if p.quiet {
		return nil
	}
	for _, msg := range messages {
		p.logger.Trace("Published to Redis stream", watermill.LogFields{"provider": "redis", "topic": topic, "message_uuid": msg.UUID})
	}
	return nil
}

func (p *Publisher) publish(topic string, messages []*message.Message) error {
	if topic == "" {
		return errors.New("the topic is empty")
	}
	call, err := p.marshal(topic, messages)
	if err != nil {
		return err
	}
	if p.config.Idempotence != nil {
		return p.sendIdempotent(call)
	}
	return p.send(call)
}

// marshal returns the call's commands.
func (p *Publisher) marshal(topic string, messages []*message.Message) (*publishing, error) {
	call := &publishing{topic: topic, adds: make([]onceStringCmd, len(messages))}
	prefix := p.addArgs(topic)
	for i, msg := range messages {
		args := make([]any, len(prefix), len(prefix)+usualArgs)
		copy(args, prefix)
		args, err := p.appendMessage(args, topic, msg)
		if err != nil {
			uuid := ""
			if msg != nil {
				uuid = msg.UUID
			}
			return nil, fmt.Errorf("marshal message %d of %d (UUID %q): %w", i+1, len(messages), uuid, err)
		}
		call.adds[i] = onceStringCmd{redis.NewStringCmd(context.Background(), args...)}
	}
	call.ctx = context.WithoutCancel(messages[0].Context())
	return call, nil
}

func (p *Publisher) send(call *publishing) error {
	if len(call.adds) > 1 {
		node, err := p.node(call.ctx, call.topic)
		if err == nil {
			err = p.probeMulti(call.ctx, node)
		}
		if err != nil {
			lookAgain(p.client, err)
			return fmt.Errorf("nothing is stored: %w", discreet(err))
		}
		call.node = node
	}
	if p.single == nil {
		return p.publishTx(call)
	}
	return p.share(call)
}

// usualArgs is the room for an ID, the UUID to remember, and what DefaultMarshaler
// returns.
const usualArgs = 1 + 3 + 6

// appendMessage appends what differs from message to message.
func (p *Publisher) appendMessage(args []any, topic string, msg *message.Message) ([]any, error) {
	if i := p.config.Idempotence; i != nil {
		if msg != nil && msg.UUID == "" {
			return nil, errNoUUID
		}
		if msg != nil {
			args = append(args, "idmp", i.ProducerID, msg.UUID)
		}
	}
	return appendFields(append(args, "*"), p.config.Marshaler, topic, msg)
}

// addArgs returns what is the same for all of a topic's messages.
func (p *Publisher) addArgs(topic string) []any {
	maxLen, ok := p.config.MaxLens[topic]
	if !ok {
		maxLen = p.config.DefaultMaxLen
	}
	args := []any{"xadd", topic}
	if p.config.Idempotence != nil {
		args = append(args, "nomkstream") // see sendIdempotent
	}
	if maxLen > 0 {
		args = append(args, "maxlen", "~", maxLen)
	}
	return args
}

// node returns the topic's; nil if the client is of a type that does not say.
func (p *Publisher) node(ctx context.Context, topic string) (*redis.Client, error) {
	s := newStream(p.client, topic, "")
	c, err := s.node(ctx)
	node, _ := c.(*redis.Client)
	return node, err
}

// A question is asked once: who comes meanwhile waits for its answer. A question
// without an error stays.
type question struct {
	answered chan struct{}
	err      error
}

// probeMulti makes sure, once for each node, that MULTI is allowed: where it is
// denied, what follows it in a pipeline runs all the same, but not as one.
func (p *Publisher) probeMulti(ctx context.Context, node *redis.Client) error {
	if node == nil {
		return nil
	}
	addr := node.Options().Addr
	p.probe.Lock()
	if q := p.multi[addr]; q != nil {
		p.probe.Unlock()
		<-q.answered
		return q.err
	}
	q := &question{answered: make(chan struct{}), err: errors.New("goxstreams: MULTI was not asked for: a panic")}
	if p.multi == nil {
		p.multi = make(map[string]*question)
	}
	p.multi[addr] = q
	p.probe.Unlock()
	defer close(q.answered)
	defer func() {
		if q.err != nil {
			p.forgetMulti(node)
		}
	}()
	q.err = askMulti(ctx, node)
	return q.err
}

func askMulti(ctx context.Context, node *redis.Client) error {
	multi, exec := newOnce(ctx, "multi"), newOnce(ctx, "exec")
	execPipeline(ctx, node, []redis.Cmder{multi, exec})
	for _, err := range []error{multi.Err(), exec.Err()} {
		if denied(err) {
			return fmt.Errorf("several messages in one call need the right to MULTI and EXEC: %w", err)
		}
		if err != nil { // nothing of the call was sent: not unknown
			return err
		}
	}
	return nil
}

// forgetMulti makes the next call ask again.
func (p *Publisher) forgetMulti(node *redis.Client) {
	p.probe.Lock()
	defer p.probe.Unlock()
	if node != nil {
		delete(p.multi, node.Options().Addr)
	}
}

// publishing is one call of Publish on its way: a bare XADD, or several within
// MULTI and EXEC.
type publishing struct {
	ctx   context.Context
	topic string
	node  *redis.Client // of several messages
	multi onceCmd       // around several
	adds  []onceStringCmd
	exec  onceRawCmd
}

// again returns the call's commands anew, to be sent once more.
func (c *publishing) again() *publishing {
	call := &publishing{ctx: c.ctx, topic: c.topic, adds: make([]onceStringCmd, len(c.adds))}
	for i, add := range c.adds {
		call.adds[i] = onceStringCmd{redis.NewStringCmd(context.Background(), add.Args()...)}
	}
	return call
}

// share sends the call in one round trip, with others that come at the same time.
func (p *Publisher) share(call *publishing) error {
	if len(call.adds) == 1 {
		_ = p.line.Process(call.ctx, call.adds[0])
		return call.bareResult()
	}
	call.multi, call.exec = newOnce(call.ctx, "multi"), onceRawCmd{redis.NewRawCmd(call.ctx, "exec")}
	cmds := make([]redis.Cmder, 0, len(call.adds)+2)
	cmds = append(cmds, call.multi)
	for _, add := range call.adds {
		cmds = append(cmds, add)
	}
	if err := p.line.do(call.ctx, append(cmds, call.exec)...); err != nil {
		return outcome(err)
	}
	err := call.executed()
	if denied(call.multi.Err()) || denied(err) {
		p.forgetMulti(call.node)
	}
	if call.multi.Err() != nil {
		return call.bareResult()
	}
	return outcome(err)
}

// executed reads EXEC's reply, which has the errors of the commands in it. Their
// IDs are of no use here, but a missing one is redis.Nil, as of a bare XADD.
func (c *publishing) executed() error {
	if err := c.exec.Err(); err != nil {
		return err
	}
	reply := resp(c.exec.Val())
	n, err := reply.list()
	if err != nil {
		// EXECABORT says that a command was refused, but not why.
		for _, add := range c.adds {
			if add.Err() != nil && isReply(add.Err()) && isReply(err) {
				return add.Err()
			}
		}
		return err
	}
	if n < len(c.adds) { // EXEC's nil: somebody had left a WATCH on the connection
		return redis.TxFailedErr
	}
	for range n {
		id, err := reply.bulk()
		if err != nil {
			return err
		}
		if id == "" {
			return redis.Nil
		}
	}
	return nil
}

// errQueued says that a command was queued in a transaction that nobody can
// execute: EXEC was denied to whoever began it on this connection. It is then
// never executed, so that nothing is stored.
var errQueued = redisReply("ERR queued on a connection whose EXEC was denied")

// bareResult reads the answers to messages that ran by themselves: a single
// one, or several whose MULTI was refused (the right to it was taken away since
// probeMulti asked).
func (c *publishing) bareResult() error {
	stored := 0
	var first error
	for _, add := range c.adds {
		err := add.Err()
		if err == nil && add.Val() == "QUEUED" {
			err = errQueued
		}
		if err == nil {
			stored++
		} else if first == nil {
			first = err
		}
	}
	switch stored {
	case len(c.adds):
		return nil
	case 0:
		return outcome(first)
	}
	return fmt.Errorf("%w: MULTI was refused, and %d of %d messages are stored: %w", ErrOutcomeUnknown, stored, len(c.adds), discreet(first))
}

// publishTx publishes a call by itself, where a pipeline is not one connection:
// the client routes the transaction to the key's node.
func (p *Publisher) publishTx(call *publishing) error {
	if len(call.adds) == 1 {
		return outcome(p.client.Process(call.ctx, call.adds[0]))
	}
	_, err := p.client.TxPipelined(call.ctx, func(pipe redis.Pipeliner) error {
		for _, add := range call.adds {
			_ = pipe.Process(call.ctx, add)
		}
		return nil
	})
	if replyHas(err, "'multi'") && denied(err) {
		// Taken away since probeMulti asked. The messages run one by one then, and
		// go-redis does not say what became of each.
		p.forgetMulti(call.node)
		return fmt.Errorf("%w: MULTI was refused, and the messages ran one by one: %w", ErrOutcomeUnknown, discreet(err))
	}
	return outcome(err)
}

// outcome tells an answer of the server, and what never reached it, from a
// connection that broke in between.
func outcome(err error) error {
	if err == nil || isReply(err) || neverSent(err) {
		return discreet(err)
	}
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
}

// Close waits for the calls under way. It does not close the client, and since
// there is nothing else to close, the Publisher can be used again: Watermill's
// router closes a handler's publisher when that handler ends, and one that other
// handlers share must outlive it.
func (p *Publisher) Close() error {
	p.calls.Lock()
	defer p.calls.Unlock()
	return nil
}
