package goxstreams_test

import (
	"maps"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// offline returns a client for tests that send nothing.
func offline(t testing.TB) *redis.Client {
	client := redis.NewClient(&redis.Options{Addr: "192.0.2.1:6379"})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	return client
}

// mistakes returns the fields that a constructor's error names, one per line.
func mistakes(t *testing.T, err error, typeName string) []string {
	t.Helper()
	if err == nil {
		return nil
	}
	var fields []string
	for line := range strings.Lines(err.Error()) {
		rest, ok := strings.CutPrefix(line, "goxstreams: "+typeName+".")
		require.True(t, ok, "which field? %q", line)
		field, text, ok := strings.Cut(rest, ": ")
		require.True(t, ok && text != "", "what about it? %q", line)
		fields = append(fields, field)
	}
	return fields
}

func TestSubscriberConfig_Mistakes(t *testing.T) {
	type config = goxstreams.SubscriberConfig
	client := offline(t)
	retry := func(r goxstreams.Retry) *goxstreams.Retry { return &r }
	for _, tt := range []struct {
		name   string
		config config
		fields []string
	}{
		{"none", config{Client: client}, nil},
		{"none, with a group", config{Client: client, ConsumerGroup: "g"}, nil},
		{"no client", config{}, []string{"Client"}},
		{"nil *Client", config{Client: (*redis.Client)(nil)}, []string{"Client"}},
		{"nil *ClusterClient", config{Client: (*redis.ClusterClient)(nil)}, []string{"Client"}},
		{"nil *Ring", config{Client: (*redis.Ring)(nil)}, []string{"Client"}},

		{"negative numbers", config{Client: client, MaxConcurrency: -1, BatchSize: -1}, []string{"MaxConcurrency", "BatchSize"}},
		{
			"negative durations",
			config{Client: client, ConsumerGroup: "g", BlockTime: -1, ClaimMinIdle: -1, ClaimInterval: -1, CloseTimeout: -1, ConsumerTimeout: -1},
			[]string{"BlockTime", "ClaimMinIdle", "ClaimInterval", "CloseTimeout", "ConsumerTimeout"},
		},
		{
			// A plain number is in nanoseconds; as milliseconds it would be 0,
			// which Redis treats as forever, or as at once.
			"numbers taken for durations",
			config{Client: client, ConsumerGroup: "g", BlockTime: 5, ClaimMinIdle: 60, ClaimInterval: 1, CloseTimeout: 25, ConsumerTimeout: 10},
			[]string{"BlockTime", "ClaimMinIdle", "ClaimInterval", "CloseTimeout", "ConsumerTimeout"},
		},

		{"StartID $", config{Client: client, ConsumerGroup: "g", StartID: "$"}, nil},
		{"StartID 0", config{Client: client, StartID: "0"}, nil},
		{"StartID, milliseconds", config{Client: client, StartID: "1700000000000"}, nil},
		{"StartID, whole", config{Client: client, StartID: "1700000000000-12"}, nil},
		{"StartID >", config{Client: client, ConsumerGroup: "g", StartID: ">"}, []string{"StartID"}},
		{"StartID, text", config{Client: client, StartID: "latest"}, []string{"StartID"}},
		{"StartID, negative", config{Client: client, StartID: "-1"}, []string{"StartID"}},
		{"StartID, half", config{Client: client, StartID: "1700000000000-"}, []string{"StartID"}},
		{"StartID, exclusive", config{Client: client, StartID: "(1-1"}, []string{"StartID"}},
		{"StartID, a line too many", config{Client: client, StartID: "1-1\n"}, []string{"StartID"}},
		{"StartID, signed", config{Client: client, StartID: "+1-+1"}, []string{"StartID"}},
		{"StartID over 64 bits", config{Client: client, StartID: "99999999999999999999"}, []string{"StartID"}},

		{"ClaimInterval over ClaimMinIdle", config{Client: client, ConsumerGroup: "g", ClaimMinIdle: time.Second, ClaimInterval: 2 * time.Second}, []string{"ClaimInterval"}},
		{"ClaimInterval over the default", config{Client: client, ConsumerGroup: "g", ClaimInterval: 61 * time.Second}, []string{"ClaimInterval"}},
		{"ClaimInterval equal", config{Client: client, ConsumerGroup: "g", ClaimMinIdle: time.Second, ClaimInterval: time.Second}, nil},
		// The interval's default is above this, which is not the user's mistake.
		{"short ClaimMinIdle", config{Client: client, ConsumerGroup: "g", ClaimMinIdle: 300 * time.Millisecond}, nil},

		{
			"group's options without a group",
			config{Client: client, Consumer: "c", NoAck: true, ClaimMinIdle: time.Second},
			[]string{"Consumer", "NoAck", "ClaimMinIdle"},
		},
		{"DeleteAcked without a group", config{Client: client, DeleteAcked: true}, []string{"DeleteAcked"}},
		{"Retry without a group", config{Client: client, Retry: &goxstreams.Retry{}}, []string{"Retry"}},
		{"NoAck and Retry", config{Client: client, ConsumerGroup: "g", NoAck: true, Retry: &goxstreams.Retry{}}, []string{"NoAck"}},
		{"NoAck and DeleteAcked", config{Client: client, ConsumerGroup: "g", NoAck: true, DeleteAcked: true}, []string{"NoAck"}},
		{"NoAck", config{Client: client, ConsumerGroup: "g", NoAck: true}, nil},
		{"Retention", config{Client: client, ConsumerGroup: "g", Retention: goxstreams.Retention{
			KeepLast: 5, KeepFor: time.Hour, HardMaxLen: 5, IgnoreGroups: []string{"old"},
		}, KeepDeadLetters: time.Hour}, nil},
		{"Retention of a fan-out", config{Client: client, Retention: goxstreams.Retention{KeepLast: 5}}, nil},
		{
			"Retention, negative",
			config{Client: client, ConsumerGroup: "g", Retention: goxstreams.Retention{KeepLast: -1, KeepFor: -1, HardMaxLen: -1}, KeepDeadLetters: -1},
			[]string{"Retention.KeepLast", "Retention.KeepFor", "Retention.HardMaxLen", "KeepDeadLetters"},
		},
		{
			"Retention, too little",
			config{Client: client, ConsumerGroup: "g", Retention: goxstreams.Retention{KeepLast: 2, KeepFor: 1, HardMaxLen: 1}, KeepDeadLetters: 1},
			[]string{"Retention.KeepFor", "Retention.HardMaxLen", "KeepDeadLetters"},
		},
		{
			"Retention, groups",
			config{Client: client, ConsumerGroup: "g", Retention: goxstreams.Retention{KeepLast: 2, IgnoreGroups: []string{"", "g"}}},
			[]string{"Retention.IgnoreGroups", "Retention.IgnoreGroups"},
		},
		{"Retention, only groups", config{Client: client, Retention: goxstreams.Retention{IgnoreGroups: []string{"x"}}}, []string{"Retention.IgnoreGroups"}},
		{"DeleteAcked and groups", config{Client: client, ConsumerGroup: "g", DeleteAcked: true, Retention: goxstreams.Retention{IgnoreGroups: []string{"x"}}}, nil},
		{"DeleteAcked and HardMaxLen", config{Client: client, ConsumerGroup: "g", DeleteAcked: true, Retention: goxstreams.Retention{HardMaxLen: 1}}, nil},
		{"DeleteAcked and KeepLast", config{Client: client, ConsumerGroup: "g", DeleteAcked: true, Retention: goxstreams.Retention{KeepLast: 1}}, []string{"DeleteAcked"}},
		{"KeepDeadLetters without a group", config{Client: client, KeepDeadLetters: time.Hour}, []string{"KeepDeadLetters"}},
		{
			"Retry, negative",
			config{Client: client, ConsumerGroup: "g", Retry: retry(goxstreams.Retry{
				MaxRetries: -2, InitialInterval: -1, MaxInterval: -1, Multiplier: -1, RandomizationFactor: -1,
			})},
			[]string{"Retry.MaxRetries", "Retry.InitialInterval", "Retry.MaxInterval", "Retry.Multiplier", "Retry.RandomizationFactor"},
		},
		{
			"Retry, not numbers",
			config{Client: client, ConsumerGroup: "g", Retry: retry(goxstreams.Retry{Multiplier: math.NaN(), RandomizationFactor: math.NaN()})},
			[]string{"Retry.Multiplier", "Retry.RandomizationFactor"},
		},
		{
			"Retry, too much",
			config{Client: client, ConsumerGroup: "g", Retry: retry(goxstreams.Retry{
				InitialInterval: 2 * time.Second, MaxInterval: time.Second, Multiplier: math.Inf(1), RandomizationFactor: 1.1,
			})},
			[]string{"Retry.MaxInterval", "Retry.Multiplier", "Retry.RandomizationFactor"},
		},
		{"Retry, too little", config{Client: client, ConsumerGroup: "g", Retry: retry(goxstreams.Retry{Multiplier: 0.5})}, []string{"Retry.Multiplier"}},
		{"Retry, no retries", config{Client: client, ConsumerGroup: "g", Retry: retry(goxstreams.Retry{MaxRetries: -1})}, nil},
		{"Retry, long first interval", config{Client: client, ConsumerGroup: "g", Retry: retry(goxstreams.Retry{InitialInterval: time.Hour})}, nil},

		{
			"all at once",
			config{
				StartID: "x", MaxConcurrency: -1, BatchSize: -1, BlockTime: -1, WaitForRedis: -1, ClaimMinIdle: -1, ClaimInterval: time.Hour,
				CloseTimeout: -1, ConsumerTimeout: -1, Consumer: "c", NoAck: true, DeleteAcked: true, Retry: retry(goxstreams.Retry{MaxRetries: -2}),
			},
			[]string{
				"Client", "StartID", "MaxConcurrency", "BatchSize", "BlockTime", "WaitForRedis", "ClaimMinIdle", "ClaimInterval",
				"CloseTimeout", "ConsumerTimeout", "Retry.MaxRetries",
				"Consumer", "NoAck", "DeleteAcked", "ClaimMinIdle", "Retry", // need a group
				"NoAck", "NoAck", // exclude Retry and DeleteAcked
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sub, err := goxstreams.NewSubscriber(tt.config, nil)
			require.ElementsMatch(t, tt.fields, mistakes(t, err, "SubscriberConfig"), "%v", err)
			require.Equal(t, err == nil, sub != nil)
		})
	}
}

func TestPublisherConfig_Mistakes(t *testing.T) {
	type config = goxstreams.PublisherConfig
	client := offline(t)
	for _, tt := range []struct {
		name   string
		config config
		fields []string
	}{
		{"none", config{Client: client}, nil},
		{"caps", config{Client: client, DefaultMaxLen: 5, MaxLens: map[string]int64{"a": 0, "b": 1}}, nil},
		{"no client", config{}, []string{"Client"}},
		{"nil *Client", config{Client: (*redis.Client)(nil)}, []string{"Client"}},
		{"all at once", config{DefaultMaxLen: -1, MaxLens: map[string]int64{"a": -1, "b": 1, "c": -2}},
			[]string{"Client", "DefaultMaxLen", `MaxLens["a"]`, `MaxLens["c"]`}},
		{"marshaler", config{Client: client, Marshaler: goxstreams.BodyMarshaler{Field: "x", MetadataField: "x"}}, []string{"Marshaler"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pub, err := goxstreams.NewPublisher(tt.config, nil)
			require.ElementsMatch(t, tt.fields, mistakes(t, err, "PublisherConfig"), "%v", err)
			require.Equal(t, err == nil, pub != nil)
		})
	}
}

// A config with several mistakes always gives the same error text.
func TestConfig_MistakesInOneOrder(t *testing.T) {
	for range 20 {
		_, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
			Consumer: "c", NoAck: true, DeleteAcked: true, ClaimMinIdle: time.Second, Retry: &goxstreams.Retry{},
		}, nil)
		_, again := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
			Consumer: "c", NoAck: true, DeleteAcked: true, ClaimMinIdle: time.Second, Retry: &goxstreams.Retry{},
		}, nil)
		require.Equal(t, err.Error(), again.Error())
		lens := map[string]int64{"a": -1, "b": -1, "c": -1, "d": -1}
		_, err = goxstreams.NewPublisher(goxstreams.PublisherConfig{MaxLens: lens}, nil)
		_, again = goxstreams.NewPublisher(goxstreams.PublisherConfig{MaxLens: maps.Clone(lens)}, nil)
		require.Equal(t, err.Error(), again.Error())
	}
}

// The caller's config stays unchanged: no defaults are written into it, and later
// changes by the caller have no effect.
func TestConfig_Untouched(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	topic := topic(t)
	retry := &goxstreams.Retry{InitialInterval: time.Millisecond}
	config := goxstreams.SubscriberConfig{Client: client, ConsumerGroup: testGroup, Retry: retry, CloseTimeout: time.Second}
	sub, err := goxstreams.NewSubscriber(config, watermill.NopLogger{})
	require.NoError(t, err)
	defer func() { require.NoError(t, sub.Close()) }()
	retry.MaxRetries = -1
	publish(t, client, topic, "a")
	messages := subscribe(t, sub, topic)
	next(t, messages).Nack()
	again := next(t, messages) // -1 would have made it dead
	require.EqualValues(t, 2, delivery(t, again).Count)
	require.Zero(t, delivery(t, again).MaxRetries)
	again.Ack()
	require.NoError(t, sub.Close())

	require.Equal(t, &goxstreams.Retry{InitialInterval: time.Millisecond, MaxRetries: -1}, retry)
	require.Same(t, retry, config.Retry)
	config.Retry, config.Client = nil, nil
	require.Equal(t, goxstreams.SubscriberConfig{ConsumerGroup: testGroup, CloseTimeout: time.Second}, config)
}

// A mistake that only a topic reveals is returned by Subscribe, before anything is
// created.
func TestSubscribe_Mistakes(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	config := grouped(client)
	config.DeadLetterTopic = func(topic string) string { return topic }
	sub := newSubscriber(t, config)
	name := topic(t)
	_, err := sub.Subscribe(t.Context(), name)
	require.ErrorContains(t, err, "SubscriberConfig.DeadLetterTopic")
	require.ErrorContains(t, err, name)
	require.Zero(t, client.Exists(t.Context(), name).Val())

	for _, config := range []goxstreams.SubscriberConfig{grouped(client), {Client: client}} {
		sub := newSubscriber(t, config)
		_, err = sub.Subscribe(t.Context(), "")
		require.ErrorContains(t, err, "topic is empty")
		require.ErrorContains(t, sub.SubscribeInitialize(""), "topic is empty")
		require.NoError(t, sub.Close())
		_, err = sub.Subscribe(t.Context(), name)
		require.ErrorIs(t, err, goxstreams.ErrSubscriberClosed)
	}

	require.NoError(t, client.Set(t.Context(), name, "a string", 0).Err())
	_, err = newSubscriber(t, grouped(client)).Subscribe(t.Context(), name)
	require.ErrorContains(t, err, "WRONGTYPE")
}
