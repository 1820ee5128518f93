package main

import (
	"context"
	"errors"
	"io"
	"log"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
)

// asynqBackend is asynq, a task queue over Redis lists and an alternative to this
// library. A topic is a queue.
type asynqBackend struct {
	redis     *redis.Client
	client    *asynq.Client
	inspector *asynq.Inspector
	servers   []*asynq.Server
	options   options
}

// asynqPoll is how often asynq polls with fastCheck and fastRetry; its defaults
// are 1s for new tasks and 5s for retries.
const asynqPoll = 10 * time.Millisecond

func newAsynq(e *env, o options) (backend, error) {
	client := e.client(o.pool)
	return &asynqBackend{
		redis: client, client: asynq.NewClientFromRedisClient(client),
		inspector: asynq.NewInspectorFromRedisClient(e.admin), options: o,
	}, nil
}

// batch enqueues one by one: asynq has no call for several.
func (b *asynqBackend) batch(topic string, payloads [][]byte) func() error {
	return func() error {
		for _, p := range payloads {
			if _, err := b.client.Enqueue(asynq.NewTask("bench", p), asynq.Queue(topic)); err != nil {
				return err
			}
		}
		return nil
	}
}

func (b *asynqBackend) prepare(string) error { return nil }

func (b *asynqBackend) consume(topic string, h handler) error {
	config := asynq.Config{
		Concurrency: b.options.concurrency,
		Queues:      map[string]int{topic: 1},
		LogLevel:    asynq.FatalLevel,
		Logger:      quiet{log.New(io.Discard, "", 0)},
	}
	if b.options.fastRetry {
		config.RetryDelayFunc = func(int, error, *asynq.Task) time.Duration { return 0 }
		config.DelayedTaskCheckInterval = asynqPoll
	}
	if b.options.fastRetry || b.options.fastCheck {
		config.TaskCheckInterval = asynqPoll
	}
	server := asynq.NewServerFromRedisClient(b.redis, config)
	b.servers = append(b.servers, server)
	return server.Start(asynq.HandlerFunc(func(_ context.Context, t *asynq.Task) error { return h(t.Payload()) }))
}

func (b *asynqBackend) left(topic string) (int64, error) {
	q, err := b.inspector.GetQueueInfo(topic)
	if err != nil {
		return 0, err
	}
	return int64(q.Active + q.Retry + q.Archived), nil
}

func (b *asynqBackend) stored(topic string) (int64, error) {
	q, err := b.inspector.GetQueueInfo(topic)
	if err != nil {
		return 0, err
	}
	return int64(q.Size), nil
}

func (b *asynqBackend) remove(topic string) error {
	err := b.inspector.DeleteQueue(topic, true)
	if errors.Is(err, asynq.ErrQueueNotFound) {
		return nil
	}
	return err
}

func (b *asynqBackend) close() error {
	for _, s := range b.servers {
		s.Shutdown()
	}
	return b.redis.Close()
}

// quiet is a logger for asynq.
type quiet struct{ *log.Logger }

func (q quiet) Debug(args ...any) { q.Print(args...) }
func (q quiet) Info(args ...any)  { q.Print(args...) }
func (q quiet) Warn(args ...any)  { q.Print(args...) }
func (q quiet) Error(args ...any) { q.Print(args...) }
