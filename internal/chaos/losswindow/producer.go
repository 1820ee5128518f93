package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// waitFor is how long WAIT waits for a replica, which takes a millisecond when there is one.
const waitFor = 100 * time.Millisecond

// A producer publishes single messages as fast as it can, until end.
type producer struct {
	client    redis.UniversalClient
	publisher *goxstreams.Publisher
	topic     string
	wait      int
	connects  atomic.Int64

	stop, done chan struct{}
	ending     sync.Once

	// acknowledged has the times of acknowledgment, by UUID. It and refused belong to run until done is closed.
	acknowledged map[string]time.Time
	refused      int
}

func newProducer(options redis.UniversalOptions, topic string, wait int) (*producer, error) {
	p := &producer{
		topic: topic, wait: wait, acknowledged: map[string]time.Time{},
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	// WAIT counts for the writes of its own connection only, so there is one; on a new one it would return at once.
	options.PoolSize = 1
	options.OnConnect = func(context.Context, *redis.Conn) error {
		p.connects.Add(1)
		return nil
	}
	p.client = redis.NewUniversalClient(&options)
	var err error
	p.publisher, err = goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: p.client}, nil)
	return p, err
}

func (p *producer) run() {
	defer close(p.done)
	for {
		select {
		case <-p.stop:
			return
		default:
		}
		uuid := watermill.NewUUID()
		if err := p.publish(uuid); err == nil {
			p.acknowledged[uuid] = time.Now()
			continue
		}
		p.refused++
		select { // a refusal takes no time
		case <-p.stop:
			return
		case <-time.After(time.Millisecond):
		}
	}
}

func (p *producer) publish(uuid string) error {
	before := p.connects.Load()
	if err := p.publisher.Publish(p.topic, message.NewMessage(uuid, []byte("payload"))); err != nil || p.wait == 0 {
		return err
	}
	before = max(before, 1) // the first call connects
	replicas, err := p.client.Do(context.Background(), "wait", p.wait, waitFor.Milliseconds()).Int()
	switch {
	case err != nil:
		return err
	case replicas < p.wait:
		return errors.New("not enough replicas have it")
	case p.connects.Load() != before:
		return errors.New("WAIT went to another connection")
	}
	return nil
}

// end stops run and waits for it.
func (p *producer) end() {
	p.ending.Do(func() {
		close(p.stop)
		<-p.done
		_ = p.publisher.Close()
		_ = p.client.Close()
	})
}

// loss compares what was acknowledged with what is stored.
func (p *producer) loss(there map[string]bool, killed time.Time) loss {
	l := loss{acknowledged: len(p.acknowledged), refused: p.refused}
	var oldest, newest time.Time
	for uuid, at := range p.acknowledged {
		if there[uuid] {
			continue
		}
		l.lost++
		if oldest.IsZero() || at.Before(oldest) {
			oldest = at
		}
		if at.After(newest) {
			newest = at
		}
	}
	if l.lost > 0 {
		l.window, l.lasting = killed.Sub(oldest), newest.Sub(oldest)
	}
	return l
}

// stored returns the UUIDs that are in the stream.
func stored(ctx context.Context, client redis.UniversalClient, topic string) (map[string]bool, error) {
	const page = 10_000
	there := map[string]bool{}
	for start := "-"; ; {
		entries, err := client.XRangeN(ctx, topic, start, "+", page).Result()
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			msg, err := goxstreams.DefaultMarshaler{}.Unmarshal(e.Values)
			if err != nil {
				return nil, err
			}
			there[msg.UUID] = true
			start = "(" + e.ID
		}
		if len(entries) < page {
			return there, nil
		}
	}
}
