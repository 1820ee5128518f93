package interop

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// The README's comparison with watermill-redisstream: the two alternate within
// one run, on one server, and only their ratio says something.
//
//	go test -run '^$' -bench . -benchtime 5x ./...

const benchPayload = 100 // bytes

func benchClient(b *testing.B) *redis.Client {
	client := redis.NewClient(&redis.Options{Addr: testserver.Addr(b)})
	b.Cleanup(func() { _ = client.Close() })
	return client
}

func benchMessages(n int) []*message.Message {
	payload := make([]byte, benchPayload)
	msgs := make([]*message.Message, n)
	for i := range msgs {
		msgs[i] = message.NewMessage(watermill.NewUUID(), payload)
	}
	return msgs
}

type side struct {
	name string
	pub  func(b *testing.B) message.Publisher
	sub  func(b *testing.B, group string) message.Subscriber
}

var sides = []side{
	{
		"ours",
		func(b *testing.B) message.Publisher {
			pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: benchClient(b)}, nil)
			require.NoError(b, err)
			return pub
		},
		func(b *testing.B, group string) message.Subscriber {
			sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: benchClient(b), ConsumerGroup: group}, nil)
			require.NoError(b, err)
			return sub
		},
	},
	{
		"redisstream",
		func(b *testing.B) message.Publisher {
			pub, err := redisstream.NewPublisher(redisstream.PublisherConfig{Client: redis.NewClient(&redis.Options{Addr: testserver.Addr(b)})}, nil)
			require.NoError(b, err)
			b.Cleanup(func() { _ = pub.Close() })
			return pub
		},
		func(b *testing.B, group string) message.Subscriber {
			sub, err := redisstream.NewSubscriber(redisstream.SubscriberConfig{
				Client: redis.NewClient(&redis.Options{Addr: testserver.Addr(b)}), ConsumerGroup: group,
			}, nil)
			require.NoError(b, err)
			return sub
		},
	},
}

// compare runs f for both sides, n messages at a time, in a number of rounds for
// each b.N that changes who begins, and reports the medians of their rates, and
// of the ratio of ours to theirs within a round.
func compare(b *testing.B, rounds int, n [2]int, f func(b *testing.B, s side, n int) time.Duration) {
	var rates [2][]float64
	var ratios []float64
	for round := range rounds * b.N {
		var rate [2]float64
		for i := range sides {
			i = (i + round) % 2
			rate[i] = float64(n[i]) / f(b, sides[i], n[i]).Seconds()
			rates[i] = append(rates[i], rate[i])
		}
		ratios = append(ratios, rate[0]/rate[1])
	}
	b.ReportMetric(0, "ns/op")
	for i, s := range sides {
		b.ReportMetric(median(rates[i]), s.name+"/s")
	}
	b.ReportMetric(median(ratios), "ratio")
}

func median(xs []float64) float64 {
	slices.Sort(xs)
	return xs[len(xs)/2]
}

func BenchmarkSubscribe(b *testing.B) {
	compare(b, 1, [2]int{400_000, 20_000}, func(b *testing.B, s side, n int) time.Duration {
		topic := watermill.NewUUID()
		fill(b, topic, n)
		sub := s.sub(b, "bench")
		defer func() { _ = sub.Close() }()
		start := time.Now()
		messages, err := sub.Subscribe(context.Background(), topic)
		require.NoError(b, err)
		for range n {
			(<-messages).Ack()
		}
		took := time.Since(start)
		benchClient(b).Del(context.Background(), topic)
		return took
	})
}

func fill(b *testing.B, topic string, n int) {
	pub := sides[0].pub(b)
	msgs := benchMessages(1000)
	for range n / len(msgs) {
		require.NoError(b, pub.Publish(topic, msgs...))
	}
}

func BenchmarkPublish(b *testing.B) {
	for _, size := range []int{100, 1} {
		b.Run(fmt.Sprintf("CallsOf%d", size), func(b *testing.B) {
			rounds, total := 1, [2]int{300_000, 20_000}
			if size == 1 {
				rounds, total = 50, [2]int{1_000, 1_000}
			}
			compare(b, rounds, total, func(b *testing.B, s side, n int) time.Duration {
				topic := watermill.NewUUID()
				pub := s.pub(b)
				msgs := benchMessages(size)
				require.NoError(b, pub.Publish(topic, msgs...)) // connects
				start := time.Now()
				for range n / size {
					require.NoError(b, pub.Publish(topic, msgs...))
				}
				took := time.Since(start)
				benchClient(b).Del(context.Background(), topic)
				return took
			})
		})
	}
}

// BenchmarkLatency sends a message when the last one has arrived: its rate is
// the inverse of the time from Publish to the handler.
func BenchmarkLatency(b *testing.B) {
	compare(b, 10, [2]int{1_000, 1_000}, func(b *testing.B, s side, n int) time.Duration {
		topic := watermill.NewUUID()
		pub, sub := s.pub(b), s.sub(b, "bench")
		defer func() { _ = sub.Close() }()
		messages, err := sub.Subscribe(context.Background(), topic)
		require.NoError(b, err)
		msgs := benchMessages(1)
		start := time.Now()
		for range n {
			require.NoError(b, pub.Publish(topic, msgs...))
			(<-messages).Ack()
		}
		took := time.Since(start)
		benchClient(b).Del(context.Background(), topic)
		return took
	})
}
