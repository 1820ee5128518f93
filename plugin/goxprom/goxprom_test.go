package goxprom

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/alicebob/miniredis/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// enough is a bound that only a hanging test reaches.
const enough = 30 * time.Second

// fake is a Source whose answers the test decides.
type fake struct {
	group  string
	mu     sync.Mutex
	stats  []goxstreams.SubscriptionStats
	topics func(ctx context.Context, topic string) (goxstreams.TopicStats, error)
}

func (f *fake) Stats() []goxstreams.SubscriptionStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	stats := slices.Clone(f.stats)
	for i := range stats {
		stats[i].Group = f.group
	}
	return stats
}

func (f *fake) set(stats ...goxstreams.SubscriptionStats) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stats = stats
}

func (f *fake) TopicStats(ctx context.Context, topic string) (goxstreams.TopicStats, error) {
	return f.topics(ctx, topic)
}

// collect collects what a group's fake says.
func collect(t *testing.T, config Config, group string, source *fake) *Collector {
	t.Helper()
	source.group = group
	c := NewCollector(config)
	c.Add(source)
	return c
}

// gathered returns the values of all series, by name and labels.
func gathered(t *testing.T, c prometheus.Collector) map[string]float64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(c))
	families, err := registry.Gather()
	require.NoError(t, err)
	values := map[string]float64{}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			values[family.GetName()+"{"+strings.Join(labels, ",")+"}"] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return values
}

func TestAllMetrics(t *testing.T) {
	source := &fake{
		stats: []goxstreams.SubscriptionStats{{
			Topic: "orders", InFlight: 1, Waiting: 2, Delivered: 3, Retried: 4, Acked: 5, Nacked: 6,
			Claimed: 7, Released: 8, Broken: 9, Dead: 10, Lost: 11,
		}},
		topics: func(_ context.Context, topic string) (goxstreams.TopicStats, error) {
			return goxstreams.TopicStats{
				Topic: topic, Group: "billing", Length: 12, Lag: 13, Pending: 14, OldestPending: 1500 * time.Millisecond,
				Consumers: 16, DeadLetters: 17,
			}, nil
		},
	}
	c := collect(t, Config{}, "billing", source)
	problems, err := testutil.CollectAndLint(c)
	require.NoError(t, err)
	require.Empty(t, problems)

	want := map[string]float64{
		"subscriptions": 1, "in_flight": 1, "waiting": 2, "up": 1, "outage_seconds": 0,
		"delivered_total": 3, "retried_total": 4, "acked_total": 5, "nacked_total": 6,
		"claimed_total": 7, "released_total": 8, "broken_total": 9, "dead_total": 10, "lost_total": 11,
		"topic_stats_success": 1, "topic_length": 12, "topic_lag": 13, "topic_pending": 14,
		"topic_oldest_pending_seconds": 1.5, "topic_consumers": 16, "topic_dead_letters": 17,
	}
	got := map[string]float64{}
	for name, v := range gathered(t, c) {
		name, ok := strings.CutSuffix(strings.TrimPrefix(name, "goxstreams_"), `{group="billing",topic="orders"}`)
		require.True(t, ok, name)
		got[name] = v
	}
	require.Equal(t, want, got)
	require.ElementsMatch(t, names(c), keys(want), "Describe tells of all")

	quiet := collect(t, Config{TopicTimeout: -1}, "billing", source)
	require.Len(t, gathered(t, quiet), 14, "without the topic's")
	require.Len(t, names(quiet), 14)
}

var nameInDesc = regexp.MustCompile(`fqName: "goxstreams_(\w+)"`)

func names(c prometheus.Collector) (names []string) {
	descs := make(chan *prometheus.Desc, 100)
	c.Describe(descs)
	close(descs)
	for d := range descs {
		names = append(names, nameInDesc.FindStringSubmatch(d.String())[1])
	}
	return names
}

func keys(m map[string]float64) (keys []string) {
	for key := range m {
		keys = append(keys, key)
	}
	return keys
}

// What Redis does not tell is absent, and not 0.
func TestWhatIsNotKnownIsAbsent(t *testing.T) {
	source := &fake{stats: []goxstreams.SubscriptionStats{{Topic: "no lag"}, {Topic: "no group"}, {Topic: "no answer"}}}
	source.topics = func(_ context.Context, topic string) (goxstreams.TopicStats, error) {
		switch topic {
		case "no lag":
			return goxstreams.TopicStats{Group: "g", Lag: -1}, nil
		case "no group":
			return goxstreams.TopicStats{Length: 5}, nil
		}
		return goxstreams.TopicStats{}, errors.New("no answer")
	}
	topicMetrics := map[string][]string{}
	for series := range gathered(t, collect(t, Config{}, "g", source)) {
		name, labels, _ := strings.Cut(series, "{")
		if name, ok := strings.CutPrefix(name, "goxstreams_topic_"); ok {
			topic := strings.Split(labels, `"`)[3]
			topicMetrics[topic] = append(topicMetrics[topic], name)
		}
	}
	require.ElementsMatch(t, topicMetrics["no lag"], []string{"stats_success", "length", "pending", "oldest_pending_seconds", "consumers", "dead_letters"})
	require.ElementsMatch(t, topicMetrics["no group"], []string{"stats_success", "length"})
	require.ElementsMatch(t, topicMetrics["no answer"], []string{"stats_success"})
}

// TestCountersOnlyGrow: Stats of a topic over time, and what Delivered and Acked
// must say.
func TestCountersOnlyGrow(t *testing.T) {
	type stats = goxstreams.SubscriptionStats
	sub := func(delivered, acked int64) stats { return stats{Topic: "orders", Delivered: delivered, Acked: acked} }
	for name, steps := range map[string][]struct {
		open             []stats
		delivered, acked float64
	}{
		"one of two closes": {
			{[]stats{sub(100, 100), sub(50, 49)}, 150, 149},
			{[]stats{sub(60, 59)}, 150, 149}, // 10 at least, but not known to be more than the other's end
			{[]stats{sub(70, 69)}, 160, 159},
		},
		"two of three close, one by one": {
			{[]stats{sub(10, 10), sub(20, 20), sub(30, 30)}, 60, 60},
			{[]stats{sub(10, 10), sub(20, 20)}, 60, 60},
			{[]stats{sub(15, 15)}, 60, 60},
			{[]stats{sub(16, 16)}, 61, 61},
		},
		"another in the place of the only one": {
			{[]stats{sub(100, 100)}, 100, 100},
			{[]stats{sub(7, 6)}, 107, 106},
		},
		"all close, and one opens later": {
			{[]stats{sub(100, 100), sub(10, 10)}, 110, 110},
			{nil, 110, 110},
			{[]stats{sub(3, 3)}, 113, 113},
		},
		"another one opens": {
			{[]stats{sub(5, 5)}, 5, 5},
			{[]stats{sub(5, 5), sub(1, 0)}, 6, 5},
		},
		// Delivered counts a message before it is taken, and takes that back if
		// nobody does.
		"nobody takes a message": {
			{[]stats{sub(1001, 1000)}, 1001, 1000},
			{[]stats{sub(1000, 1000)}, 1001, 1000},
			{[]stats{sub(1001, 1000)}, 1001, 1000},
			{[]stats{sub(1003, 1002)}, 1003, 1002},
		},
	} {
		t.Run(name, func(t *testing.T) {
			source := &fake{}
			c := collect(t, Config{TopicTimeout: -1}, "g", source)
			for i, step := range steps {
				source.set(step.open...)
				got := gathered(t, c)
				require.Equal(t, step.delivered, got[`goxstreams_delivered_total{group="g",topic="orders"}`], "delivered, step %d", i)
				require.Equal(t, step.acked, got[`goxstreams_acked_total{group="g",topic="orders"}`], "acked, step %d", i)
				require.Equal(t, float64(len(step.open)), got[`goxstreams_subscriptions{group="g",topic="orders"}`])
				_, up := got[`goxstreams_up{group="g",topic="orders"}`]
				require.Equal(t, len(step.open) > 0, up)
			}
		})
	}
}

// A Redis that hangs holds up neither the scrape, longer than its bound, nor is it
// asked by more and more goroutines.
func TestHangingRedis(t *testing.T) {
	var mu sync.Mutex
	asked := 0
	hang := make(chan struct{})
	source := &fake{stats: []goxstreams.SubscriptionStats{{Topic: "orders", Delivered: 1}}}
	source.topics = func(context.Context, string) (goxstreams.TopicStats, error) { // heeds no context, like go-redis
		mu.Lock()
		asked++
		mu.Unlock()
		<-hang
		return goxstreams.TopicStats{Group: "g", Length: 5}, nil
	}
	c := collect(t, Config{TopicTimeout: 10 * time.Millisecond}, "g", source)
	for range 3 {
		got := gathered(t, c)
		require.Equal(t, 1.0, got[`goxstreams_delivered_total{group="g",topic="orders"}`])
		require.Equal(t, 0.0, got[`goxstreams_topic_stats_success{group="g",topic="orders"}`])
		require.NotContains(t, got, `goxstreams_topic_length{group="g",topic="orders"}`)
	}
	mu.Lock()
	require.Equal(t, 1, asked)
	mu.Unlock()
	close(hang)
	require.Eventually(t, func() bool {
		return gathered(t, c)[`goxstreams_topic_length{group="g",topic="orders"}`] == 5
	}, enough, time.Millisecond)
}

// Two Prometheuses scrape, while subscriptions come and go.
func TestConcurrentScrapes(t *testing.T) {
	source := &fake{topics: func(context.Context, string) (goxstreams.TopicStats, error) { return goxstreams.TopicStats{}, nil }}
	c := collect(t, Config{}, "g", source)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(c)
	var scrapes sync.WaitGroup
	for range 4 {
		scrapes.Go(func() {
			for i := range int64(50) {
				source.set(goxstreams.SubscriptionStats{Topic: "a", Delivered: i, Acked: i}, goxstreams.SubscriptionStats{Topic: "b", Delivered: i % 7})
				if _, err := registry.Gather(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	c.Add(&fake{group: "h", stats: source.Stats(), topics: source.topics})
	scrapes.Wait()
}

// A topic's name may be any bytes; a label's value may not.
func TestNamesThatAreNotUTF8(t *testing.T) {
	source := &fake{stats: []goxstreams.SubscriptionStats{{Topic: "a\xff", Delivered: 1}, {Topic: "a\xfe", Delivered: 2}}}
	got := gathered(t, collect(t, Config{TopicTimeout: -1}, "g", source))
	require.Equal(t, 1.0, got[`goxstreams_delivered_total{group="g",topic="\"a\\xff\""}`])
	require.Equal(t, 2.0, got[`goxstreams_delivered_total{group="g",topic="\"a\\xfe\""}`])
}

// subscribe makes a Subscriber whose messages of the topics fail by nacking, or are acked.
func subscribe(t *testing.T, client *redis.Client, group, topic string, ack func(n int64) bool) *goxstreams.Subscriber {
	t.Helper()
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: client, ConsumerGroup: group, BlockTime: 20 * time.Millisecond,
		Retry: &goxstreams.Retry{MaxRetries: 2, InitialInterval: time.Millisecond},
	}, nil)
	require.NoError(t, err)
	messages, err := subscriber.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	var handled sync.WaitGroup
	handled.Go(func() {
		for msg := range messages {
			delivery, _ := goxstreams.DeliveryFromContext(msg.Context())
			if ack(delivery.Count) {
				msg.Ack()
			} else {
				msg.Nack()
			}
		}
	})
	t.Cleanup(func() {
		require.NoError(t, subscriber.Close())
		handled.Wait()
	})
	return subscriber
}

// Two Subscribers of two groups, over one server, through an outage.
func TestSubscribers(t *testing.T) {
	server := miniredis.RunT(t)
	client := redis.NewClient(&redis.Options{Addr: server.Addr(), MaxRetries: -1})
	defer client.Close()
	billing := subscribe(t, client, "billing", "orders", func(n int64) bool { return n == 3 }) // at its last delivery
	shipping := subscribe(t, client, "shipping", "orders", func(int64) bool { return false })

	c := NewCollector(Config{TopicTimeout: enough})
	c.Add(billing, shipping)

	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	require.NoError(t, err)
	const n = 5
	for range n {
		require.NoError(t, publisher.Publish("orders", message.NewMessage(watermill.NewUUID(), nil)))
	}
	want := map[string]float64{}
	for group, ends := range map[string]struct{ acked, nacked, dead float64 }{"billing": {n, 2 * n, 0}, "shipping": {0, 3 * n, n}} {
		for name, v := range map[string]float64{
			"subscriptions": 1, "in_flight": 0, "waiting": 0, "up": 1, "outage_seconds": 0,
			"delivered_total": 3 * n, "retried_total": 2 * n, "acked_total": ends.acked, "nacked_total": ends.nacked,
			"claimed_total": 0, "released_total": 0, "broken_total": 0, "dead_total": ends.dead, "lost_total": 0,
			"topic_stats_success": 1, "topic_length": n, "topic_pending": 0, "topic_oldest_pending_seconds": 0,
			"topic_consumers": 1, "topic_dead_letters": n, // one stream for both
		} {
			want[fmt.Sprintf("goxstreams_%s{group=%q,topic=%q}", name, group, "orders")] = v
		}
	}
	lags := []string{`goxstreams_topic_lag{group="billing",topic="orders"}`, `goxstreams_topic_lag{group="shipping",topic="orders"}`}
	var got map[string]float64
	settled := func() bool {
		got = gathered(t, c)
		for _, lag := range lags { // miniredis has a number of its own there
			if _, ok := got[lag]; !ok {
				return false
			}
			delete(got, lag)
		}
		return mapsEqual(got, want)
	}
	if !waitFor(settled) {
		require.Equal(t, want, got)
	}

	server.SetError("LOADING Redis is loading the dataset in memory")
	down := waitFor(func() bool {
		got = gathered(t, c)
		return got[`goxstreams_up{group="billing",topic="orders"}`] == 0 && got[`goxstreams_up{group="shipping",topic="orders"}`] == 0 &&
			got[`goxstreams_outage_seconds{group="billing",topic="orders"}`] > 0
	})
	require.True(t, down, "%v", got)
	require.Equal(t, 0.0, got[`goxstreams_topic_stats_success{group="billing",topic="orders"}`])
	require.NotContains(t, got, `goxstreams_topic_pending{group="billing",topic="orders"}`)
	require.Equal(t, 3.0*n, got[`goxstreams_delivered_total{group="billing",topic="orders"}`], "counters are there during an outage")

	server.SetError("")
	if !waitFor(settled) {
		require.Equal(t, want, got)
	}
}

func mapsEqual(a, b map[string]float64) bool {
	for key := range a {
		if a[key] != b[key] {
			return false
		}
	}
	return len(a) == len(b)
}

// waitFor is Eventually without a goroutine: what it asks may fail the test.
func waitFor(done func() bool) bool {
	for deadline := time.Now().Add(enough); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

var metricInText = regexp.MustCompile(`goxstreams_\w+`)

// The dashboard, the READMEs and the Collector speak of the same metrics.
func TestDashboard(t *testing.T) {
	var known []string
	for _, name := range names(NewCollector(Config{})) {
		known = append(known, "goxstreams_"+name)
	}
	for _, file := range []string{"../../dashboards/goxstreams.json", "../../dashboards/README.md", "README.md"} {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		found := slices.Compact(slices.Sorted(slices.Values(metricInText.FindAllString(string(text), -1))))
		require.NotEmpty(t, found, file)
		for _, name := range found {
			require.True(t, slices.Contains(known, name) || strings.HasSuffix(name, "_"), "%s: %s", file, name)
		}
		if file == "README.md" {
			for _, name := range known {
				require.Contains(t, found, name, "%s explains every metric", file)
			}
		}
	}
}

func TestValuesAreNumbers(t *testing.T) {
	source := &fake{stats: []goxstreams.SubscriptionStats{{Topic: "t", Err: errors.New("down"), Since: time.Now().Add(-time.Minute)}, {Topic: "t"}}}
	got := gathered(t, collect(t, Config{TopicTimeout: -1}, "g", source))
	require.Equal(t, 0.0, got[`goxstreams_up{group="g",topic="t"}`], "one of two is enough")
	outage := got[`goxstreams_outage_seconds{group="g",topic="t"}`]
	require.True(t, outage >= 60 && !math.IsInf(outage, 0), "%v", outage)
}
