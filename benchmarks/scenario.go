package main

import (
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

// A scenario is a measurement that several systems take part in.
type scenario struct {
	group   *scenarioGroup
	name    string
	options options
	// systems are those that can do it, with the number of messages for about
	// a second.
	systems map[string]int
	measure func(*trial) (metrics, error)
}

// A scenarioGroup becomes one table.
type scenarioGroup struct {
	name, note string
	columns    []string
	ratio      string // the column whose ratios are reported
	most       int    // maximum number of rounds; 0: no maximum
}

var throughput = []string{rate, allocs, clientCPU, serverCPUs, commands}

var (
	publishGroup = &scenarioGroup{name: "Publish", columns: throughput, ratio: rate,
		note: "asynq has no call for several tasks."}
	subscribeGroup = &scenarioGroup{name: "Subscribe", columns: throughput, ratio: rate,
		note: "A full stream, until everything is acked. MC is MaxConcurrency; redisstream's is always 1. One goroutine ranges over the channel, or 100."}
	routerGroup = &scenarioGroup{name: "Router", columns: throughput, ratio: rate,
		note: "A Watermill router with a handler that does nothing. gochannel's messages are published meanwhile, one at a time. asynq has a server of its own instead of the router."}
	slowGroup = &scenarioGroup{name: "Slow handlers", columns: throughput, ratio: rate,
		note: "5 ms each, 100 at once; redisstream's are one at a time."}
	keysGroup = &scenarioGroup{name: "Order per key", columns: throughput,
		note: "OrderingKey, MaxConcurrency 100: handlers that do nothing, with 10,000 keys and without any; and 10,000 messages whose handlers take 0 to 5 ms at random."}
	latencyGroup = &scenarioGroup{name: "Latency", columns: []string{p50, p99, sent}, ratio: p50,
		note: "From the call of Publish to the handler. Half of the maximum: of what publisher and subscriber together reached just before, 50,000/s at most. " +
			"asynq looks for tasks once a second by default; \"polling fast\" is every 10 ms."}
	nackGroup = &scenarioGroup{name: "Redelivery", columns: throughput, ratio: rate,
		note: "Every message is nacked once and comes again without a backoff: through Redis, counted there, with ours; in memory with redisstream; " +
			"asynq moves tasks to retry every 10 ms here, 5 s by default."}
	memoryGroup = &scenarioGroup{name: "Memory", columns: []string{heap, held}, ratio: heap,
		note: "100,000 messages of 1 KiB waiting, the handler blocked, MaxConcurrency 1: how the heap has grown after 2 s, and what was read from Redis."}
	topicsGroup = &scenarioGroup{name: "1,000 topics", most: 3, ratio: rate,
		columns: []string{connections, rate, idleClient, idleServer, p50, p99, p50Ratio, p99Ratio},
		note: "On one Subscriber; Publisher and latency on the same client (ours; redisstream closes its clients, so has two). ours has go-redis's default PoolSize; " +
			"redisstream blocks a connection for each topic, so has PoolSize 2,100. msg/s: 100 messages waiting in each topic. " +
			"Idle: percent of one core over 10 s. Latency: 200 messages/s over all topics, and over one."}
)

// scenarios are all that `go run .` measures, in order.
var scenarios = []*scenario{
	{publishGroup, "publish, calls of 1", options{}, counts(15_000, 15_000, 20_000, 20_000, 10_000, 0), publish(1, 1)},
	{publishGroup, "publish, calls of 100", options{}, counts(300_000, 20_000, 400_000, 300_000, 0, 0), publish(100, 1)},
	{publishGroup, "publish, calls of 1 from 64 goroutines", options{}, counts(100_000, 40_000, 150_000, 0, 20_000, 0), publish(1, 64)},

	{subscribeGroup, "subscribe, MC 1", options{}, counts(200_000, 15_000, 400_000, 200_000, 0, 0), consume},
	{subscribeGroup, "subscribe, MC 100", options{concurrency: 100}, counts(200_000, 0, 400_000, 0, 0, 0), consume},
	{subscribeGroup, "subscribe, MC 100, 100 goroutines", options{concurrency: 100, workers: 100}, counts(200_000, 0, 300_000, 0, 0, 0), consume},

	{subscribeGroup, "worker, MC 1", options{worker: true}, counts(200_000, 0, 400_000, 0, 0, 0), consume},
	{subscribeGroup, "worker, MC 100", options{worker: true, concurrency: 100}, counts(200_000, 0, 0, 0, 0, 0), consume},

	{subscribeGroup, "worker, batches of 100", options{worker: true, batch: 100}, counts(400_000, 0, 400_000, 0, 0, 0), consume},

	{routerGroup, "router, MC 1", options{router: true}, counts(100_000, 12_000, 0, 100_000, 3_000, 100_000), consume},
	{routerGroup, "router, MC 100", options{router: true, concurrency: 100}, counts(100_000, 0, 0, 0, 10_000, 0), consume},

	{slowGroup, "5 ms handlers, MC 100", options{concurrency: 100, workers: 100}, counts(20_000, 200, 20_000, 0, 10_000, 0), slowly},

	{keysGroup, "no keys", options{concurrency: 100, workers: 100}, counts(200_000, 0, 0, 0, 0, 0), consume},
	{keysGroup, "10,000 keys", options{concurrency: 100, workers: 100, keys: 10_000}, counts(200_000, 0, 0, 0, 0, 0), consume},
	{keysGroup, "0 to 5 ms, 1,000 keys", options{concurrency: 100, workers: 100, keys: 1_000}, counts(10_000, 0, 0, 0, 0, 0), variously},
	{keysGroup, "0 to 5 ms, 20 keys", options{concurrency: 100, workers: 100, keys: 20}, counts(10_000, 0, 0, 0, 0, 0), variously},
	{keysGroup, "0 to 5 ms, 1 key", options{concurrency: 100, workers: 100, keys: 1}, counts(10_000, 0, 0, 0, 0, 0), variously},

	{latencyGroup, "latency at 200/s", options{}, counts(600, 600, 600, 0, 600, 0), latencySlow},
	{latencyGroup, "latency at 200/s, polling fast", options{fastCheck: true}, counts(0, 0, 0, 0, 600, 0), latencySlow},
	{latencyGroup, "latency at half of the maximum", options{}, counts(100_000, 10_000, 100_000, 0, 0, 0), latencyHalf},

	{nackGroup, "redelivery, MC 1", options{fastRetry: true}, counts(10_000, 10_000, 0, 0, 2_000, 0), nacked},
	{nackGroup, "redelivery, MC 100", options{fastRetry: true, concurrency: 100}, counts(10_000, 0, 0, 0, 10_000, 0), nacked},

	{memoryGroup, "memory", options{}, counts(100_000, 100_000, 100_000, 0, 0, 0), memory},
	{topicsGroup, "1,000 topics", options{}, counts(100_000, 100_000, 0, 0, 0, 0), manyTopics},
}

// counts are numbers of messages in systemOrder; 0: not for this one.
func counts(n ...int) map[string]int {
	m := make(map[string]int)
	for i, name := range systemOrder {
		if n[i] > 0 {
			m[name] = n[i]
		}
	}
	return m
}

// publish measures calls with size messages each, from a number of goroutines.
func publish(size, goroutines int) func(*trial) (metrics, error) {
	return func(t *trial) (metrics, error) {
		topic, err := t.newTopic()
		if err != nil {
			return nil, err
		}
		calls := make([][]func() error, goroutines)
		for i := range calls {
			calls[i] = publishing(t, topic, size, t.n*(i+1)/goroutines-t.n*i/goroutines)
		}
		warm, err := t.newTopic()
		if err != nil {
			return nil, err
		}
		if err := atOnce(goroutines, func(int) error { return t.backend.batch(warm, payloads(0, size, payloadSize))() }); err != nil {
			return nil, err // this also connects them
		}
		m, err := t.measure(t.n, func() error {
			return atOnce(goroutines, func(i int) error { return callAll(calls[i]) })
		})
		if err != nil {
			return nil, err
		}
		return m, t.filled(topic, t.n)
	}
}

// publishing returns the calls that publish n messages: the same call many times, and
// a smaller one if n is no multiple of size.
func publishing(t *trial, topic string, size, n int) []func() error {
	whole := t.backend.batch(topic, payloads(0, size, payloadSize))
	calls := make([]func() error, n/size, n/size+1)
	for i := range calls {
		calls[i] = whole
	}
	if rest := n % size; rest > 0 {
		calls = append(calls, t.backend.batch(topic, payloads(0, rest, payloadSize)))
	}
	return calls
}

func callAll(calls []func() error) error {
	for _, call := range calls {
		if err := call(); err != nil {
			return err
		}
	}
	return nil
}

// atOnce calls f in n goroutines and waits for them.
func atOnce(n int, f func(i int) error) error {
	if n == 1 {
		return f(0)
	}
	errs := make([]error, n)
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() { errs[i] = f(i) })
	}
	calls.Wait()
	return errors.Join(errs...)
}

// consume measures how fast a full topic is consumed by a handler that does
// nothing.
func consume(t *trial) (metrics, error) {
	return consuming(t, 1, func(int32) error { return nil })
}

// slowly is consume with handlers of 5 ms.
func slowly(t *trial) (metrics, error) {
	return consuming(t, 1, func(int32) error {
		time.Sleep(5 * time.Millisecond)
		return nil
	})
}

// variously is consume with handlers of 0 to 5 ms.
func variously(t *trial) (metrics, error) {
	return consuming(t, 1, func(int32) error {
		time.Sleep(time.Duration(rand.IntN(5_000)) * time.Microsecond)
		return nil
	})
}

var errOnce = errors.New("nacked once")

// nacked is consume with handlers that fail at the first delivery.
func nacked(t *trial) (metrics, error) {
	return consuming(t, 2, func(times int32) error {
		if times == 1 {
			return errOnce
		}
		return nil
	})
}

// consuming fills a topic and measures until every message has been handled the given
// number of times and acked. work gets the number of deliveries of its message.
func consuming(t *trial, times int, work func(int32) error) (metrics, error) {
	topic, err := t.newTopic()
	if err != nil {
		return nil, err
	}
	if t.keeps() {
		if err := t.fill(topic, t.n, payloadSize); err != nil {
			return nil, err
		}
	}
	return consumeTopic(t, topic, times, work)
}

func consumeTopic(t *trial, topic string, times int, work func(int32) error) (metrics, error) {
	arrived := newTally(t.n, times)
	m, err := t.measure(t.n, func() error {
		if err := t.backend.consume(topic, func(payload []byte) error { return work(arrived.got(payload)) }); err != nil {
			return err
		}
		if !t.keeps() {
			if err := t.fill(topic, t.n, payloadSize); err != nil {
				return err
			}
		}
		return t.drain(topic, arrived)
	})
	if err != nil {
		return nil, err
	}
	return m, arrived.check()
}
