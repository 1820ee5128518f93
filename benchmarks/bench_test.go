package main

import (
	"slices"
	"testing"

	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/tests"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// The scenarios of `go run .` for go test -bench and benchstat:
//
//	go test -run '^$' -bench 'Subscribe/.*/system=ours' -count 10 . | tee new.txt
//	benchstat -col /system new.txt

func BenchmarkPublish1(b *testing.B)          { benchmark(b, "publish, calls of 1") }
func BenchmarkPublish100(b *testing.B)        { benchmark(b, "publish, calls of 100") }
func BenchmarkPublishParallel64(b *testing.B) { benchmark(b, "publish, calls of 1 from 64 goroutines") }
func BenchmarkSlowHandlers(b *testing.B)      { benchmark(b, "5 ms handlers, MC 100") }

func BenchmarkSubscribe(b *testing.B) {
	b.Run("MC1", func(b *testing.B) { benchmark(b, "subscribe, MC 1") })
	b.Run("MC100", func(b *testing.B) { benchmark(b, "subscribe, MC 100") })
	b.Run("MC100x100", func(b *testing.B) { benchmark(b, "subscribe, MC 100, 100 goroutines") })
}

func BenchmarkRouter(b *testing.B) {
	b.Run("MC1", func(b *testing.B) { benchmark(b, "router, MC 1") })
	b.Run("MC100", func(b *testing.B) { benchmark(b, "router, MC 100") })
}

func BenchmarkNacked(b *testing.B) {
	b.Run("MC1", func(b *testing.B) { benchmark(b, "redelivery, MC 1") })
	b.Run("MC100", func(b *testing.B) { benchmark(b, "redelivery, MC 100") })
}

// benchmark runs a scenario with b.N messages for each of its systems. The timer
// runs only in the scenario's measured part.
func benchmark(b *testing.B, name string) {
	i := slices.IndexFunc(scenarios, func(s *scenario) bool { return s.name == name })
	require.GreaterOrEqual(b, i, 0, name)
	for _, system := range systemOrder {
		if scenarios[i].systems[system] == 0 {
			continue
		}
		b.Run("system="+system, func(b *testing.B) {
			b.StopTimer()
			b.ReportAllocs()
			e := testEnv(b, 1)
			e.began = func(*trial) { b.StartTimer() }
			e.ended = func(*trial) { b.StopTimer() }
			m, err := e.run(scenarios[i], system, b.N)
			require.NoError(b, err)
			b.ReportMetric(m[rate], "msgs/s")
			b.ReportMetric(m[commands], "cmds/msg")
		})
	}
}

// BenchmarkWatermill is Watermill's own: one publisher, calls of one message,
// while the subscriber reads.
func BenchmarkWatermill(b *testing.B) {
	b.Run("system=ours", func(b *testing.B) {
		e := testEnv(b, 1)
		tests.BenchSubscriber(b, func(int) (message.Publisher, message.Subscriber) {
			client := e.client(0)
			pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
			require.NoError(b, err)
			sub, err := goxstreams.NewSubscriber(oursConfig(client, options{concurrency: 1}), nil)
			require.NoError(b, err)
			b.Cleanup(func() {
				require.NoError(b, sub.Close())
				require.NoError(b, client.Close())
			})
			return pub, sub
		})
	})
	b.Run("system=redisstream", func(b *testing.B) {
		e := testEnv(b, 1)
		tests.BenchSubscriber(b, func(int) (message.Publisher, message.Subscriber) {
			pub, err := redisstream.NewPublisher(redisstream.PublisherConfig{Client: e.client(0)}, nil)
			require.NoError(b, err)
			sub, err := redisstream.NewSubscriber(redisstream.SubscriberConfig{Client: e.client(0), ConsumerGroup: group}, nil)
			require.NoError(b, err)
			b.Cleanup(func() {
				require.NoError(b, sub.Close())
				require.NoError(b, pub.Close())
			})
			return pub, sub
		})
	})
}
