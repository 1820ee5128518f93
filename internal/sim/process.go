package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// A consumer is a process that consumes all topics, with a Subscriber for each of its
// groups.
type consumer struct {
	*node
	spec    Consumer
	place   *place
	members []*member
	closing chan struct{}
	done    chan struct{} // closed when all Subscribers are
	once    sync.Once
	runs    atomic.Int64

	diceMu sync.Mutex
	dice   *rand.Rand
}

// A member is a consumer as a member of a group.
type member struct {
	*consumer
	number  int // of the group
	group   Group
	sub     *goxstreams.Subscriber
	handler message.HandlerFunc
}

func (s *simulation) bootConsumer(spec Consumer, place *place, life int) *consumer {
	c := &consumer{
		node: s.newNode(spec.name(), life, redis.Options{
			ReadTimeout: spec.ReadTimeout, DialTimeout: 2 * time.Second, Protocol: spec.Protocol,
		}),
		spec: spec, place: place, closing: make(chan struct{}), done: make(chan struct{}),
		dice: newDice(s.schedule.Seed, spec.name(), life),
	}
	for _, number := range spec.Groups {
		m := &member{consumer: c, number: number, group: s.schedule.Groups[number]}
		m.handler = m.wrap(m.handle)
		var err error
		if m.sub, err = goxstreams.NewSubscriber(m.config(), s.logger(c.node)); err != nil {
			panic(err)
		}
		c.members = append(c.members, m)
		for _, topic := range s.schedule.Topics {
			s.goes(func() { m.consume(topic) })
			if s.schedule.Twice && m.group.Name != "" {
				s.goes(func() { m.consume(topic) })
			}
		}
	}
	return c
}

// prefix returns how the consumer's name in its groups begins.
func (n *node) prefix() string { return fmt.Sprintf("%s.%d", n.name, n.life) }

func (m *member) config() goxstreams.SubscriberConfig {
	g := m.group
	config := goxstreams.SubscriberConfig{
		Client: m.client, ConsumerGroup: g.Name, MaxConcurrency: g.MaxConcurrency, BatchSize: m.spec.BatchSize,
		BlockTime: m.spec.BlockTime, CloseTimeout: g.CloseTimeout, Retention: m.sim.schedule.Retention,
	}
	if g.Name == "" {
		return config
	}
	config.Consumer, config.ClaimInterval, config.NoAck = m.prefix(), g.ClaimInterval, g.NoAck
	if g.NoAck {
		return config
	}
	retry := m.retry()
	config.ClaimMinIdle, config.Retry, config.DeleteAcked, config.OnDead = g.ClaimMinIdle, &retry, g.DeleteAcked, m.onDead
	if g.Keys > 0 {
		config.OrderingKey = func(msg *message.Message) string { return rules.KeyOf(msg.UUID, g.Keys) }
	}
	if g.Mood.OnBroken {
		config.OnBroken = m.onBroken
	}
	if g.Mood.Unmarshaler {
		config.Unmarshaler = unmarshaler{m: m}
	}
	return config
}

func (m *member) retry() goxstreams.Retry {
	return goxstreams.Retry{
		MaxRetries: m.group.MaxRetries, InitialInterval: m.group.RetryDelay, MaxInterval: m.group.MaxRetryDelay,
		OnRetryHook: func(int, time.Duration) { _ = m.misbehave(context.Background()) },
	}
}

// retryDelay returns Retry's delay after a failed delivery.
func (g Group) retryDelay(count int64) time.Duration {
	d := g.RetryDelay
	for ; count > 1 && d < g.MaxRetryDelay; count-- {
		d *= 2
	}
	return min(d, g.MaxRetryDelay)
}

// wrap puts the middlewares around the handler, as a router does.
func (m *member) wrap(h message.HandlerFunc) message.HandlerFunc {
	if !m.group.Middlewares || !m.group.leased() {
		return h
	}
	letters := goxstreams.DeadLetter{Topic: func(string) string { _ = m.misbehave(context.Background()); return "" }}
	h = letters.Middleware(h)
	h = m.retry().Middleware(h)
	return middleware.Recoverer(h)
}

// consume handles a topic until the subscription ends. It subscribes again while Redis
// cannot be reached.
func (m *member) consume(topic string) {
	for {
		messages, err := m.sub.Subscribe(context.Background(), topic)
		if err == nil {
			m.log(m.number, rules.Event{Kind: rules.Subscribed, Topic: topic})
			for msg := range messages {
				m.sim.goes(func() { m.settle(msg) })
			}
			return
		}
		select {
		case <-m.closing:
			return
		case <-m.dead:
			return
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// settle handles a message and acks or nacks it, as a router does.
func (m *member) settle(msg *message.Message) {
	m.sim.handlers.Add(1)
	defer m.sim.handlers.Add(-1)
	err := m.call(msg)
	m.pass()
	if err != nil {
		msg.Nack()
	} else {
		msg.Ack()
	}
}

func (m *member) call(msg *message.Message) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	_, err = m.handler(msg)
	return err
}

// handle does the message's task, and logs it.
func (m *member) handle(msg *message.Message) ([]*message.Message, error) {
	m.pass()
	event := rules.Event{Kind: rules.Started, UUID: msg.UUID, Run: m.runs.Add(1)}
	delivery, ok := goxstreams.DeliveryFromContext(msg.Context())
	if !ok {
		m.sim.complain(m.number, "no delivery", event, "the message's context has no delivery")
	}
	event.Topic, event.ID, event.Count, event.Consumer = delivery.Topic, delivery.ID, delivery.Count, delivery.Consumer
	m.log(m.number, event)
	m.sim.begin(m.number, event)
	err := m.work(msg, &event)
	m.pass()
	event.Error = ""
	if err != nil {
		event.Error = err.Error()
	}
	if event.Kind == rules.Crashed {
		m.crash(event)
	}
	m.log(m.number, event)
	if panics := (panicked{}); errors.As(err, &panics) {
		panic(err)
	}
	return nil, err
}

type panicked struct{}

func (panicked) Error() string { return "the handler panics" }

// work does the message's task, and notes the outcome in the event.
func (m *member) work(msg *message.Message, event *rules.Event) error {
	var t task
	if err := json.Unmarshal(msg.Payload, &t); err != nil || msg.Metadata.Get("nature") != rules.Nature(msg.UUID) {
		m.sim.complain(m.number, "message changed", *event, fmt.Sprintf("payload %q, metadata %v", msg.Payload, msg.Metadata))
	}
	msg.Payload, msg.Metadata = nil, nil // a handler may change its message: a redelivery is as published
	ctx, calm := msg.Context(), (<-chan struct{})(nil)
	if t.Hang {
		calm = m.sim.calm
	}
	m.take(ctx, t.Work, calm)
	m.pass()
	if t.Close && m.group.leased() && m.sim.once("close", m.number, msg.UUID) {
		m.closeFromInside()
	}
	if err := ctx.Err(); err != nil {
		event.Kind = rules.Closed
		if errors.Is(context.Cause(ctx), goxstreams.ErrLeaseLost) {
			event.Kind = rules.Lost
		}
		return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
	}
	if m.group.leased() {
		return m.fail(t, event)
	}
	event.Kind = rules.Acked
	return nil
}

// take waits for the time that a task takes.
func (m *member) take(ctx context.Context, d time.Duration, calm <-chan struct{}) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-calm:
	case <-ctx.Done():
	case <-m.dead:
	}
	m.await()
}

// fail fails as the task says. If it does not, it succeeds.
func (m *member) fail(t task, event *rules.Event) error {
	event.Kind, event.Delay = rules.Nacked, m.group.retryDelay(event.Count)
	switch {
	case event.Count <= t.Kills:
		event.Kind = rules.Crashed
		return nil
	case event.Count <= max(t.Panics, t.Fails):
		if !m.group.Middlewares && m.isClosing() {
			event.Kind = rules.Closed // a plain Nack may be due to the shutdown, so it is not counted
		}
		if event.Count <= t.Panics {
			return panicked{}
		}
		return errTask
	case m.group.Middlewares && m.sim.count("snooze", m.number, event.UUID) < t.Snoozes:
		event.Delay = time.Duration(1+event.Run%5) * 300 * time.Millisecond
		return goxstreams.Snooze(errLate, event.Delay)
	}
	event.Kind, event.Delay = rules.Acked, 0
	return nil
}

func (c *consumer) isClosing() bool { return isClosed(c.closing) }

// crash ends the process and the goroutine.
func (m *member) crash(event rules.Event) {
	m.log(everyGroup, event)
	if m.kill(rules.Died, "by "+event.UUID, event.Count%2 == 0) {
		m.sim.goes(m.close)
		m.place.startLater(200*time.Millisecond + time.Duration(event.Count)*time.Second)
	}
	runtime.Goexit()
}

// close ends the process cleanly.
func (c *consumer) close() {
	c.await() // a stopped process does not notice
	c.once.Do(func() {
		close(c.closing)
		var subs sync.WaitGroup
		for _, m := range c.members {
			m.log(m.number, rules.Event{Kind: rules.Closing})
			subs.Add(1)
			c.sim.goes(func() {
				defer subs.Done()
				_ = m.sub.Close()
				m.log(m.number, rules.Event{Kind: rules.Ended})
			})
		}
		c.sim.goes(func() {
			subs.Wait()
			c.exit()
			close(c.done)
		})
	})
	<-c.done
}

// closeFromInside calls Close from a function of the user's. Another process replaces
// this one.
func (m *member) closeFromInside() {
	m.sim.goes(func() {
		m.close()
		m.place.startLater(time.Second)
	})
	_ = m.sub.Close()
}

// misbehave sometimes does what a function of the user's should not do.
func (m *member) misbehave(ctx context.Context) error {
	m.await()
	if m.isDead() || isClosed(m.sim.calm) {
		return nil
	}
	mood := m.group.Mood
	x, d := m.roll()
	for _, p := range []struct {
		chance float64
		do     func() error
	}{
		{mood.Fail, func() error { return errTask }},
		{mood.Panic, func() error { panic("a function of the user's") }},
		{mood.Slow, func() error { m.take(ctx, d/4, m.sim.calm); return nil }},
		{mood.Hang, func() error { return m.hang(d) }},
		{mood.Close, func() error { m.closeFromInside(); return nil }},
	} {
		if x -= p.chance; x < 0 {
			return p.do()
		}
	}
	return nil
}

// longestHook is how long a function of the user's may hang.
const longestHook = 6 * time.Second

func (m *member) roll() (x float64, d time.Duration) {
	m.diceMu.Lock()
	defer m.diceMu.Unlock()
	return m.dice.Float64(), between(m.dice, 0, longestHook)
}

// hang ignores its context: for a while in a running process, and for longer than anybody
// should wait when it closes.
func (m *member) hang(d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-m.sim.calm:
	case <-m.dead:
	case <-m.closing:
		<-m.sim.over
	}
	return nil
}

func (m *member) onBroken(ctx context.Context, _ goxstreams.BrokenMessage) error {
	if err := m.misbehave(ctx); err != nil {
		return err
	}
	return goxstreams.ErrDead
}

func (m *member) onDead(ctx context.Context, dead goxstreams.DeadMessage) {
	m.await()
	m.log(m.number, rules.Event{
		Kind: rules.Dead, Topic: dead.Topic, ID: dead.EntryID, UUID: rules.UUIDOf(dead),
		Count: dead.Deliveries, Consumer: dead.Consumer, Error: dead.Reason,
	})
	_ = m.misbehave(ctx)
}

// An unmarshaler is an Unmarshaler of the user's.
type unmarshaler struct {
	goxstreams.DefaultMarshaler
	m *member
}

func (u unmarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	uuid, _ := values[goxstreams.UUIDHeaderKey].(string)
	if rules.Nature(uuid) == rules.Broken {
		if err := u.m.misbehave(context.Background()); err != nil {
			return nil, err
		}
	}
	return u.DefaultMarshaler.Unmarshal(values)
}
