package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// raw is go-redis by hand, the upper bound for any library over it: no messages,
// retries or leases.
type raw struct {
	stream
	client  *redis.Client
	options options
	gather  gatherer
	closed  atomic.Bool
	running sync.WaitGroup

	mu  sync.Mutex
	err error
}

const (
	rawBatch = 500
	rawBlock = time.Second
)

func newRaw(e *env, o options) (backend, error) {
	client := e.client(o.pool)
	return &raw{stream: stream{e.admin}, client: client, options: o, gather: gatherer{client: client}}, nil
}

func add(topic string, payload []byte) *redis.XAddArgs {
	return &redis.XAddArgs{Stream: topic, Values: []any{"payload", payload}}
}

func (b *raw) batch(topic string, payloads [][]byte) func() error {
	if len(payloads) == 1 {
		return func() error { return b.gather.publish(add(topic, payloads[0])) }
	}
	return func() error {
		pipe := b.client.Pipeline()
		for _, p := range payloads {
			pipe.XAdd(context.Background(), add(topic, p))
		}
		_, err := pipe.Exec(context.Background())
		return err
	}
}

// A gatherer collects the calls that arrive while a pipeline is in flight, for the
// next one.
type gatherer struct {
	client *redis.Client
	mu     sync.Mutex
	queue  []*gathered
	flying bool
}

type gathered struct {
	args *redis.XAddArgs
	done chan error
}

func (g *gatherer) publish(args *redis.XAddArgs) error {
	call := &gathered{args, make(chan error, 1)}
	g.mu.Lock()
	g.queue = append(g.queue, call)
	first := !g.flying
	g.flying = true
	g.mu.Unlock()
	if first { // the others wait for this one, or for the one after it
		g.fly()
	}
	return <-call.done
}

func (g *gatherer) fly() {
	g.mu.Lock()
	calls := g.queue
	g.queue = nil
	g.mu.Unlock()
	if len(calls) == 1 {
		calls[0].done <- g.client.XAdd(context.Background(), calls[0].args).Err()
	} else {
		g.pipeline(calls)
	}
	g.handOver()
}

func (g *gatherer) pipeline(calls []*gathered) {
	pipe := g.client.Pipeline()
	cmds := make([]*redis.StringCmd, len(calls))
	for i, call := range calls {
		cmds[i] = pipe.XAdd(context.Background(), call.args)
	}
	_, _ = pipe.Exec(context.Background()) // each command has its own error
	for i, call := range calls {
		call.done <- cmds[i].Err()
	}
}

// handOver continues in a new goroutine if calls have arrived meanwhile, so that the
// first caller's Publish returns.
func (g *gatherer) handOver() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.queue) == 0 {
		g.flying = false
		return
	}
	go g.fly()
}

func (b *raw) consume(topic string, h handler) error {
	if b.options.workers == 1 {
		b.running.Go(func() { b.read(topic, func(entries []redis.XMessage) { b.handleAll(topic, entries, h) }) })
		return nil
	}
	entries, acks := make(chan redis.XMessage, rawBatch), make(chan string, rawBatch)
	var workers sync.WaitGroup
	for range b.options.workers {
		workers.Go(func() {
			for entry := range entries {
				if b.handle(entry, h) {
					acks <- entry.ID
				}
			}
		})
	}
	b.running.Go(func() { b.ackAll(topic, acks) })
	b.running.Go(func() {
		b.read(topic, func(read []redis.XMessage) {
			for _, entry := range read {
				entries <- entry
			}
		})
		close(entries)
		workers.Wait()
		close(acks)
	})
	return nil
}

// read reads until close.
func (b *raw) read(topic string, take func([]redis.XMessage)) {
	for !b.closed.Load() {
		streams, err := b.client.XReadGroup(context.Background(), &redis.XReadGroupArgs{
			Group: group, Consumer: "raw", Streams: []string{topic, ">"}, Count: rawBatch, Block: rawBlock,
		}).Result()
		if errors.Is(err, redis.Nil) {
			continue
		}
		if err != nil {
			b.fail(err)
			return
		}
		take(streams[0].Messages)
	}
}

func (b *raw) handle(entry redis.XMessage, h handler) bool {
	payload, ok := entry.Values["payload"].(string)
	if !ok {
		b.fail(errors.New("an entry without payload"))
		return false
	}
	if err := h([]byte(payload)); err != nil {
		b.fail(err)
		return false
	}
	return true
}

func (b *raw) handleAll(topic string, entries []redis.XMessage, h handler) {
	ids := make([]string, 0, len(entries))
	for _, entry := range entries {
		if b.handle(entry, h) {
			ids = append(ids, entry.ID)
		}
	}
	b.ack(topic, ids)
}

// ackAll acks what was collected during the last call.
func (b *raw) ackAll(topic string, acks <-chan string) {
	for id := range acks {
		ids := []string{id}
		for len(acks) > 0 {
			ids = append(ids, <-acks)
		}
		b.ack(topic, ids)
	}
}

func (b *raw) ack(topic string, ids []string) {
	if len(ids) == 0 {
		return
	}
	if err := b.client.XAck(context.Background(), topic, group, ids...).Err(); err != nil {
		b.fail(err)
	}
}

// fail keeps the first error for close. Errors while closing do not count.
func (b *raw) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil && !b.closed.Load() {
		b.err = err
	}
}

func (b *raw) close() error {
	b.closed.Store(true)
	err := b.client.Close() // ends the reads
	b.running.Wait()
	return errors.Join(err, b.err)
}
