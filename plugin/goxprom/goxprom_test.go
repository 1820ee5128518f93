package goxprom

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
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

// gathered returns the values of all series, by name and labels; a histogram's is how
// often it was observed.
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
			v := m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			values[family.GetName()+"{"+strings.Join(labels, ",")+"}"] = v
		}
	}
	return values
}

func TestAllMetrics(t *testing.T) {
	source := &fake{
		stats: []goxstreams.SubscriptionStats{{
			Topic: "orders", InFlight: 1, Waiting: 2, Delivered: 3, Retried: 4, Acked: 5, Nacked: 6,
			Claimed: 7, Released: 8, Broken: 9, Dead: 10, Lost: 11, Trimmed: 21, Err: errors.New("down"), Since: time.Now().Add(-time.Hour),
		}},
		topics: func(_ context.Context, topic string) (goxstreams.TopicStats, error) {
			return goxstreams.TopicStats{
				Topic: topic, Group: "billing", Length: 12, Lag: 13, Pending: 14, OldestPending: 1500 * time.Millisecond, PausedSince: time.Now(),
				Consumers: 16, DeadLetterTopic: "orders.dead", DeadLetters: 17, Delayed: 19, Overdue: 20 * time.Second,
				Pin: goxstreams.Pin{Group: "audit", ID: "1-1", Age: 22 * time.Second}, CutOff: 23,
			}, nil
		},
	}
	c := collect(t, Config{}, "billing", source)
	c.handled(goxstreams.Delivery{Topic: "orders", Group: "billing", ID: "1-0"}, time.Second, nil, "")
	c.publishDone("orders", 18, time.Second, nil)
	problems, err := testutil.CollectAndLint(c)
	require.NoError(t, err)
	require.Empty(t, problems)

	want := map[string]float64{}
	for name, v := range map[string]float64{
		"messages_delivered_total": 3, "messages_redelivered_total": 4, "messages_acked_total": 5, "messages_nacked_total": 6,
		"messages_claimed_total": 7, "messages_released_total": 8, "entries_malformed_total": 9, "messages_dead_lettered_total": 10,
		"messages_lost_total": 11, "subscriptions_open": 1, "subscriptions_failing": 1, "subscriptions_outage_seconds": 3600,
		"messages_in_flight": 1, "messages_awaiting_retry": 2,
		"group_stats_success": 1, "group_lag": 13, "group_pending_entries": 14, "group_oldest_pending_age_seconds": 1.5, "group_consumers": 16, "group_paused": 1,
		"entries_trimmed_total": 21, "group_cut_off_entries": 23,
		"message_latency_seconds": 1,
	} {
		want["goxstreams_"+name+`{group="billing",topic="orders"}`] = v
	}
	want[`goxstreams_topic_entries{topic="orders"}`] = 12
	want[`goxstreams_topic_dead_letters{dead_letter_topic="orders.dead",topic="orders"}`] = 17
	want[`goxstreams_topic_delayed_messages{topic="orders"}`] = 19
	want[`goxstreams_topic_delayed_overdue_seconds{topic="orders"}`] = 20
	want[`goxstreams_topic_pin_age_seconds{group="audit",topic="orders"}`] = 22
	want[`goxstreams_handler_duration_seconds{group="billing",success="true",topic="orders"}`] = 1
	want[`goxstreams_publisher_messages_total{outcome="stored",topic="orders"}`] = 18
	want[`goxstreams_publisher_messages_total{outcome="failed",topic="orders"}`] = 0
	want[`goxstreams_publisher_messages_total{outcome="unknown",topic="orders"}`] = 0
	want[`goxstreams_publisher_duration_seconds{outcome="stored",topic="orders"}`] = 1

	got := gathered(t, c)
	const outage = `goxstreams_subscriptions_outage_seconds{group="billing",topic="orders"}`
	require.InDelta(t, want[outage], got[outage], enough.Seconds())
	got[outage] = want[outage]
	require.Equal(t, want, got)
	require.ElementsMatch(t, names(c), namesIn(want), "Describe tells of all")

	quiet := collect(t, Config{TopicTimeout: -1}, "billing", source)
	require.Len(t, gathered(t, quiet), 15, "without what Redis is asked for, and without measurements")
	require.Len(t, names(quiet), 15+4)
}

// namesIn returns the names of metrics, each once, without goxstreams_.
func namesIn(series map[string]float64) (names []string) {
	for name := range series {
		name, _, _ = strings.Cut(strings.TrimPrefix(name, "goxstreams_"), "{")
		names = append(names, name)
	}
	slices.Sort(names)
	return slices.Compact(names)
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

// What Redis does not tell is absent, and not 0.
func TestWhatIsNotKnownIsAbsent(t *testing.T) {
	source := &fake{stats: []goxstreams.SubscriptionStats{{Topic: "no lag"}, {Topic: "no group"}, {Topic: "no right"}, {Topic: "no answer"}}}
	source.topics = func(_ context.Context, topic string) (goxstreams.TopicStats, error) {
		switch topic {
		case "no lag":
			return goxstreams.TopicStats{Group: "g", Lag: -1, CutOff: -1}, nil
		case "no group":
			return goxstreams.TopicStats{Length: 5}, nil
		case "no right":
			return goxstreams.TopicStats{Delayed: -1}, nil
		}
		return goxstreams.TopicStats{}, errors.New("no answer")
	}
	asked := map[string][]string{}
	topic := regexp.MustCompile(`[{,]topic="([^"]*)"`)
	for series := range gathered(t, collect(t, Config{}, "g", source)) {
		name, labels, _ := strings.Cut(strings.TrimPrefix(series, "goxstreams_"), "{")
		if strings.HasPrefix(name, "group_") || strings.HasPrefix(name, "topic_") {
			of := topic.FindStringSubmatch("{" + labels)[1]
			asked[of] = append(asked[of], name)
		}
	}
	require.ElementsMatch(t, asked["no lag"], []string{
		"group_stats_success", "group_pending_entries", "group_oldest_pending_age_seconds", "group_consumers", "group_paused", "topic_entries", "topic_dead_letters",
		"topic_delayed_messages", "topic_delayed_overdue_seconds",
	})
	require.ElementsMatch(t, asked["no group"], []string{"group_stats_success", "topic_entries", "topic_delayed_messages", "topic_delayed_overdue_seconds"})
	require.ElementsMatch(t, asked["no right"], []string{"group_stats_success", "topic_entries"})
	require.ElementsMatch(t, asked["no answer"], []string{"group_stats_success"})
}

// What belongs to a topic is there once, however many groups the process has; a dead-letter
// stream of a group's own is one more. The user of one group may not read delayed messages.
func TestTopicsHaveNoGroup(t *testing.T) {
	c := NewCollector(Config{})
	delayed := map[string]int64{"a": 3, "b": -1, "c": 3}
	for group, deadLetters := range map[string]string{"a": "dead", "b": "dead", "c": "dead of c"} {
		c.Add(&fake{group: group, stats: []goxstreams.SubscriptionStats{{Topic: "orders"}}, topics: func(context.Context, string) (goxstreams.TopicStats, error) {
			return goxstreams.TopicStats{Group: group, Length: 5, DeadLetterTopic: deadLetters, DeadLetters: int64(len(deadLetters)), Delayed: delayed[group], Overdue: time.Second}, nil
		}})
	}
	got := gathered(t, c)
	for series := range got {
		if !strings.HasPrefix(series, "goxstreams_topic_") {
			delete(got, series)
		}
	}
	require.Equal(t, map[string]float64{
		`goxstreams_topic_entries{topic="orders"}`:                                    5,
		`goxstreams_topic_delayed_messages{topic="orders"}`:                           3,
		`goxstreams_topic_delayed_overdue_seconds{topic="orders"}`:                    1,
		`goxstreams_topic_dead_letters{dead_letter_topic="dead",topic="orders"}`:      4,
		`goxstreams_topic_dead_letters{dead_letter_topic="dead of c",topic="orders"}`: 9,
	}, got)
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
				require.Equal(t, step.delivered, got[`goxstreams_messages_delivered_total{group="g",topic="orders"}`], "delivered, step %d", i)
				require.Equal(t, step.acked, got[`goxstreams_messages_acked_total{group="g",topic="orders"}`], "acked, step %d", i)
				require.Equal(t, float64(len(step.open)), got[`goxstreams_subscriptions_open{group="g",topic="orders"}`])
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
		require.Equal(t, 1.0, got[`goxstreams_messages_delivered_total{group="g",topic="orders"}`])
		require.Equal(t, 0.0, got[`goxstreams_group_stats_success{group="g",topic="orders"}`])
		require.NotContains(t, got, `goxstreams_topic_entries{topic="orders"}`)
	}
	mu.Lock()
	require.Equal(t, 1, asked)
	mu.Unlock()
	close(hang)
	require.Eventually(t, func() bool {
		return gathered(t, c)[`goxstreams_topic_entries{topic="orders"}`] == 5
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
	require.Equal(t, 1.0, got[`goxstreams_messages_delivered_total{group="g",topic="\"a\\xff\""}`])
	require.Equal(t, 2.0, got[`goxstreams_messages_delivered_total{group="g",topic="\"a\\xfe\""}`])
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
			"subscriptions_open": 1, "subscriptions_failing": 0, "subscriptions_outage_seconds": 0, "messages_in_flight": 0, "messages_awaiting_retry": 0,
			"messages_delivered_total": 3 * n, "messages_redelivered_total": 2 * n, "messages_acked_total": ends.acked, "messages_nacked_total": ends.nacked,
			"messages_claimed_total": 0, "messages_released_total": 0, "entries_malformed_total": 0, "messages_dead_lettered_total": ends.dead, "messages_lost_total": 0, "entries_trimmed_total": 0, "group_cut_off_entries": 0,
			"group_stats_success": 1, "group_pending_entries": 0, "group_oldest_pending_age_seconds": 0, "group_consumers": 1, "group_paused": 0,
		} {
			want[fmt.Sprintf("goxstreams_%s{group=%q,topic=%q}", name, group, "orders")] = v
		}
	}
	want[`goxstreams_topic_entries{topic="orders"}`] = n
	want[`goxstreams_topic_dead_letters{dead_letter_topic="orders.dead{orders}",topic="orders"}`] = n // one stream for both groups
	delayed := message.NewMessage(watermill.NewUUID(), nil)
	delay.Message(delayed, delay.For(time.Hour))
	require.NoError(t, publisher.Publish("orders", delayed))
	want[`goxstreams_topic_delayed_messages{topic="orders"}`] = 1
	want[`goxstreams_topic_delayed_overdue_seconds{topic="orders"}`] = 0
	lags := []string{`goxstreams_group_lag{group="billing",topic="orders"}`, `goxstreams_group_lag{group="shipping",topic="orders"}`}
	pins := func(series string, _ float64) bool { return strings.HasPrefix(series, "goxstreams_topic_pin_age") } // its XCLAIM moves a group back
	var got map[string]float64
	settled := func() bool {
		got = gathered(t, c)
		maps.DeleteFunc(got, pins)
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
		return got[`goxstreams_subscriptions_failing{group="billing",topic="orders"}`] == 1 && got[`goxstreams_subscriptions_failing{group="shipping",topic="orders"}`] == 1 &&
			got[`goxstreams_subscriptions_outage_seconds{group="billing",topic="orders"}`] > 0
	})
	require.True(t, down, "%v", got)
	require.Equal(t, 0.0, got[`goxstreams_group_stats_success{group="billing",topic="orders"}`])
	require.NotContains(t, got, `goxstreams_group_pending_entries{group="billing",topic="orders"}`)
	require.Equal(t, 3.0*n, got[`goxstreams_messages_delivered_total{group="billing",topic="orders"}`], "counters are there during an outage")

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

var metricInText = regexp.MustCompile("`(goxstreams_\\w+)`")

// The README's table has every metric, with its type and labels, and no other.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("README.md")
	require.NoError(t, err)
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| `goxstreams_.*$").FindAllString(string(text), -1) {
		for _, name := range metricInText.FindAllStringSubmatch(strings.Split(row, "|")[1], -1) {
			documented = append(documented, strings.TrimPrefix(name[1], "goxstreams_"))
		}
	}
	require.ElementsMatch(t, documented, names(NewCollector(Config{})))
	for _, name := range metricInText.FindAllStringSubmatch(string(text), -1) {
		require.Contains(t, documented, strings.TrimPrefix(name[1], "goxstreams_"))
	}
}

func TestValuesAreNumbers(t *testing.T) {
	source := &fake{stats: []goxstreams.SubscriptionStats{{Topic: "t", Err: errors.New("down"), Since: time.Now().Add(-time.Minute)}, {Topic: "t"}}}
	got := gathered(t, collect(t, Config{TopicTimeout: -1}, "g", source))
	require.Equal(t, 1.0, got[`goxstreams_subscriptions_failing{group="g",topic="t"}`], "of two")
	outage := got[`goxstreams_subscriptions_outage_seconds{group="g",topic="t"}`]
	require.True(t, outage >= 60 && !math.IsInf(outage, 0), "%v", outage)
}
