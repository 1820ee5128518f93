package sim

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// A producer is a process that publishes.
type producer struct {
	*node
	publisher *goxstreams.Publisher
	calls     chan Call // unbuffered: a worker that is free takes the next one
	closing   chan struct{}
	once      sync.Once
	workers   sync.WaitGroup
}

// bootProducer starts a producer. It takes over from the one before it where that was.
func (s *simulation) bootProducer(spec Producer, life int, calls chan Call) *producer {
	p := &producer{
		node:  s.newNode(spec.name(), life, redis.Options{ReadTimeout: time.Second, DialTimeout: 2 * time.Second}),
		calls: calls, closing: make(chan struct{}),
	}
	var err error
	p.publisher, err = goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: p.client, Marshaler: rules.Saboteur{}}, s.logger(p.node))
	if err != nil {
		panic(err)
	}
	for range spec.Workers {
		p.workers.Add(1)
		go p.work()
	}
	return p
}

func (p *producer) work() {
	defer p.workers.Done()
	for {
		select {
		case call := <-p.calls:
			p.pass()
			p.publish(call)
		case <-p.closing:
			return
		case <-p.dead:
			return
		}
	}
}

func (p *producer) publish(call Call) {
	messages := make([]*message.Message, len(call.UUIDs))
	for i, uuid := range call.UUIDs {
		messages[i] = makeMessage(p.sim.schedule.Seed, uuid, p.sim.limits)
	}
	event := rules.Event{Kind: rules.Publishing, Topic: call.Topic, UUIDs: call.UUIDs, Delays: p.sim.delay(messages)}
	p.log(everyGroup, event)
	event.Delays = nil
	err := p.publisher.Publish(call.Topic, messages...)
	p.pass()
	switch {
	case err == nil:
		event.Kind = rules.Published
	case errors.Is(err, goxstreams.ErrOutcomeUnknown):
		event.Kind, event.Error = rules.Unknown, err.Error()
	default:
		event.Kind, event.Error = rules.Refused, err.Error()
	}
	p.log(everyGroup, event)
}

func (p *producer) close() {
	p.once.Do(func() { close(p.closing) })
	p.workers.Wait()
	_ = p.publisher.Close()
	p.exit()
}

// feed gives a producer's calls to its workers, each at its time.
func (s *simulation) feed(ctx context.Context, calls []Call, to chan<- Call) {
	for _, call := range calls {
		select {
		case <-time.After(call.At - s.elapsed()):
		case <-ctx.Done():
			return
		}
		select {
		case to <- call:
		case <-ctx.Done():
			return
		}
	}
}
