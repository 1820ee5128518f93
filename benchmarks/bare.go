package main

import (
	"context"
	"errors"
	"sync"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// bare is the least that a Watermill Pub/Sub with our entries can do: a call is a
// MULTI, a message goes over an unbuffered channel and its ack comes back, one at a
// time, while the next batch is read. No retries, leases, contexts of its own. Its
// distance from raw is the price of Watermill's interface and of the entries, its
// distance from ours the price of this library.
type bare struct {
	stream
	watermillBackend
	client *redis.Client
}

func newBare(e *env, o options) (backend, error) {
	client := e.client(o.pool)
	sub := &bareSubscriber{client: client}
	sub.ctx, sub.cancel = context.WithCancel(context.Background())
	return &bare{stream{e.admin}, watermillBackend{pub: barePublisher{client}, sub: sub, options: o}, client}, nil
}

func (b *bare) close() error {
	return errors.Join(b.watermillBackend.close(), b.client.Close())
}

type barePublisher struct{ client *redis.Client }

func (p barePublisher) Publish(topic string, msgs ...*message.Message) error {
	_, err := p.client.TxPipelined(context.Background(), func(pipe redis.Pipeliner) error {
		for _, msg := range msgs {
			values, err := goxstreams.DefaultMarshaler{}.Marshal(topic, msg)
			if err != nil {
				return err
			}
			pipe.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, Values: values})
		}
		return nil
	})
	return err
}

func (barePublisher) Close() error { return nil }

const bareBatch = 100 // our BatchSize

type bareSubscriber struct {
	client  *redis.Client
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu  sync.Mutex
	err error
}

func (s *bareSubscriber) Subscribe(_ context.Context, topic string) (<-chan *message.Message, error) {
	batches := make(chan []redis.XMessage, 1)
	acks := make(chan string, 2*bareBatch)
	output := make(chan *message.Message)
	s.running.Go(func() { s.read(topic, batches) })
	s.running.Go(func() { s.deliver(batches, output, acks) })
	s.running.Go(func() { s.ackAll(topic, acks) })
	return output, nil
}

func (s *bareSubscriber) read(topic string, batches chan<- []redis.XMessage) {
	defer close(batches)
	for s.ctx.Err() == nil {
		streams, err := s.client.XReadGroup(s.ctx, &redis.XReadGroupArgs{
			Group: group, Consumer: "bare", Streams: []string{topic, ">"}, Count: bareBatch, Block: rawBlock,
		}).Result()
		switch {
		case errors.Is(err, redis.Nil):
			continue
		case err != nil:
			s.fail(err)
			return
		}
		select {
		case batches <- streams[0].Messages:
		case <-s.ctx.Done():
		}
	}
}

func (s *bareSubscriber) deliver(batches <-chan []redis.XMessage, output chan<- *message.Message, acks chan<- string) {
	defer close(acks)
	defer close(output)
	for batch := range batches {
		for _, entry := range batch {
			msg, err := goxstreams.DefaultMarshaler{}.Unmarshal(entry.Values)
			if err != nil {
				s.fail(err)
				return
			}
			select {
			case output <- msg:
			case <-s.ctx.Done():
				return
			}
			select {
			case <-msg.Acked():
				acks <- entry.ID
			case <-msg.Nacked():
				s.fail(errors.New("bare: nacked"))
				return
			case <-s.ctx.Done():
				return
			}
		}
	}
}

// ackAll acks what was collected during the last call.
func (s *bareSubscriber) ackAll(topic string, acks <-chan string) {
	for id := range acks {
		ids := []string{id}
		for len(acks) > 0 {
			ids = append(ids, <-acks)
		}
		s.fail(s.client.XAck(context.WithoutCancel(s.ctx), topic, group, ids...).Err())
	}
}

// fail keeps the first error for Close, and stops everything. Errors while closing
// do not count.
func (s *bareSubscriber) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil || s.ctx.Err() != nil {
		return
	}
	s.err = err
	s.cancel()
}

func (s *bareSubscriber) Close() error {
	s.cancel()
	s.running.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
