package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// requireIdempotence skips the test if the server has no XADD IDMP. It asks the
// server itself: TestIdempotence_Unsupported tests such servers.
func requireIdempotence(t testing.TB) {
	t.Helper()
	testserver.RequireReal(t)
	if !hasCommand(t, newClient(t), "xidmprecord") {
		t.Skip("the server has no XADD IDMP (Redis 8.6.2)")
	}
}

func newIdempotent(t testing.TB, client redis.UniversalClient, i goxstreams.Idempotence) *goxstreams.Publisher {
	t.Helper()
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Idempotence: &i}, nil)
	require.NoError(t, err)
	return pub
}

// publishUntilKnown repeats the messages as long as their outcome is unknown, as it
// is after the first attempt, whose connection is cut.
func publishUntilKnown(t testing.TB, pub *goxstreams.Publisher, w *wire, topic string, msgs []*message.Message) {
	t.Helper()
	w.loseAnswer(true)
	err := pub.Publish(topic, msgs...)
	require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
	w.loseAnswer(false)
	for errors.Is(err, goxstreams.ErrOutcomeUnknown) {
		err = pub.Publish(topic, msgs...)
	}
	require.NoError(t, err)
}

// The connection is cut when the server has run a call, and the caller publishes
// the same messages again. Each UUID is stored once, in the order of the first
// attempt. Without Idempotence each is stored twice, which shows that the test
// would notice.
func TestIdempotence_CutConnections(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	protocols(t, func(t *testing.T, protocol int) {
		for _, n := range []int{1, 2, 1000} {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				client, w := wired(t, func(o *redis.Options) { o.Protocol = protocol })
				for copies, pub := range map[int]*goxstreams.Publisher{
					1: newIdempotent(t, client, goxstreams.Idempotence{}),
					2: newPublisher(t, client),
				} {
					topic := topic(t)
					require.NoError(t, pub.Publish(topic, numbered(2)...)) // the checks that are made once
					var want []string
					for range 3 {
						msgs := numbered(n)
						publishUntilKnown(t, pub, w, topic, msgs)
						for range copies {
							want = append(want, uuids(msgs)...)
						}
					}
					require.Equal(t, want, stored(t, newClient(t), topic)[2:])
				}
			})
		}
	})
}

// A process crashes before it knows the outcome of its call, and another one
// publishes the messages again: although it configures the stream too, nothing is
// forgotten.
func TestIdempotence_NextProcess(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, w := wired(t, nil)
	topic, msgs := topic(t), numbered(1000)
	require.NoError(t, newIdempotent(t, client, goxstreams.Idempotence{}).Publish(topic+"-other", numbered(2)...)) // connects
	crashed := newIdempotent(t, client, goxstreams.Idempotence{})
	require.NoError(t, crashed.Publish(topic, msgs[:1]...))
	w.loseAnswer(true)
	require.ErrorIs(t, crashed.Publish(topic, msgs...), goxstreams.ErrOutcomeUnknown)
	w.loseAnswer(false)
	require.NoError(t, newIdempotent(t, newClient(t), goxstreams.Idempotence{}).Publish(topic, msgs...))
	require.Equal(t, uuids(msgs), stored(t, client, topic))
	require.Equal(t, [2]int64{600, 10_000}, settings(t, client, topic), "the defaults")
}

// settings returns how long, in seconds, and how many UUIDs the stream remembers.
func settings(t testing.TB, client redis.UniversalClient, topic string) [2]int64 {
	t.Helper()
	info, err := client.XInfoStream(context.Background(), topic).Result()
	require.NoError(t, err)
	return [2]int64{info.IDMPDuration, info.IDMPMaxSize}
}

// Many processes start at once, and each publishes the same messages: configuring
// the stream does not forget what others have published meanwhile.
func TestIdempotence_ConcurrentPublishers(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	topic, msgs := topic(t), numbered(50)
	var publishing sync.WaitGroup
	for range 8 {
		pub := newIdempotent(t, newClient(t), goxstreams.Idempotence{Window: time.Hour, MaxIDs: 500})
		publishing.Go(func() {
			for i := range msgs {
				if err := pub.Publish(topic, msgs[i]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	publishing.Wait()
	require.ElementsMatch(t, uuids(msgs), stored(t, newClient(t), topic))
	require.Equal(t, [2]int64{3600, 500}, settings(t, newClient(t), topic))
}

// After Window the UUID is stored again.
func TestIdempotence_Window(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic, msg := newClient(t), topic(t), numbered(1)
	pub := newIdempotent(t, client, goxstreams.Idempotence{Window: time.Second})
	began := time.Now()
	require.NoError(t, pub.Publish(topic, msg...))
	eventually(t, func() bool {
		require.NoError(t, pub.Publish(topic, msg...))
		return len(stored(t, client, topic)) == 2
	}, "it is remembered for ever")
	require.GreaterOrEqual(t, time.Since(began), time.Second-10*time.Millisecond)
}

// MaxIDs limits what is remembered: a call with more messages, which could not be
// repeated, is rejected, and one with exactly that many works.
func TestIdempotence_MaxIDs(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic, msgs := newClient(t), topic(t), numbered(101)
	pub := newIdempotent(t, client, goxstreams.Idempotence{MaxIDs: 100})
	err := pub.Publish(topic, msgs...)
	require.ErrorContains(t, err, "Idempotence.MaxIDs")
	require.ErrorContains(t, err, "101")
	require.Empty(t, stored(t, client, topic))
	for range 2 {
		require.NoError(t, pub.Publish(topic, msgs[:100]...))
	}
	require.Equal(t, uuids(msgs[:100]), stored(t, client, topic))
	require.NoError(t, pub.Publish(topic, msgs[100]))
	require.NoError(t, pub.Publish(topic, msgs[0]), "forgotten for the newest")
	require.Len(t, stored(t, client, topic), 102)
}

// Publishers share UUIDs only with the same ProducerID.
func TestIdempotence_ProducerID(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic, msg := newClient(t), topic(t), numbered(1)
	for _, step := range []struct {
		id    string
		total int
	}{{"", 1}, {"goxstreams", 1}, {"a", 2}, {"b", 3}, {"a", 3}, {"", 3}} {
		require.NoError(t, newIdempotent(t, client, goxstreams.Idempotence{ProducerID: step.id}).Publish(topic, msg...))
		require.Len(t, stored(t, client, topic), step.total, "%q", step.id)
	}
}

// Only the UUID counts: twice in one call, with another payload, and after the
// entry was deleted.
func TestIdempotence_SameUUID(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic := newClient(t), topic(t)
	pub := newIdempotent(t, client, goxstreams.Idempotence{})
	a, b := message.NewMessage("a", []byte("first")), message.NewMessage("a", []byte("second"))
	require.NoError(t, pub.Publish(topic, a, b, message.NewMessage("b", nil)))
	require.Equal(t, []string{"a", "b"}, stored(t, client, topic))
	entries := client.XRange(t.Context(), topic, "-", "+").Val()
	require.Equal(t, "first", entries[0].Values["payload"])
	require.NoError(t, client.XDel(t.Context(), topic, entries[0].ID).Err())
	require.NoError(t, pub.Publish(topic, a))
	require.Equal(t, []string{"b"}, stored(t, client, topic))
	require.NoError(t, pub.Publish(topic+"-other", a))
	require.Equal(t, []string{"a"}, stored(t, client, topic+"-other"))
}

// A message without a UUID cannot be remembered.
func TestIdempotence_EmptyUUID(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	pub := newIdempotent(t, client, goxstreams.Idempotence{})
	err := pub.Publish(topic, numbered(1)[0], message.NewMessage("", nil))
	require.ErrorContains(t, err, "UUID is empty")
	require.ErrorContains(t, err, "PublisherConfig.Idempotence")
	require.ErrorContains(t, err, "message 2 of 2")
	require.NotErrorIs(t, err, goxstreams.ErrUnsupported)
	require.ErrorContains(t, pub.Publish(topic, nil), "nil")
	require.Zero(t, client.Exists(t.Context(), topic).Val())
}

// On a server without it the first Publish says what is needed and which server it
// found, and stores nothing.
func TestIdempotence_Unsupported(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	pub := newIdempotent(t, client, goxstreams.Idempotence{})
	if err := client.Do(t.Context(), "xidmprecord").Err(); !strings.Contains(err.Error(), "unknown command") {
		t.Skip("the server has XADD IDMP")
	}
	for _, n := range []int{1, 2} {
		err := pub.Publish(topic, numbered(n)...)
		require.ErrorIs(t, err, goxstreams.ErrUnsupported)
		require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		require.ErrorContains(t, err, "PublisherConfig.Idempotence")
		require.ErrorContains(t, err, serverName(t, client))
	}
	require.Zero(t, client.Exists(t.Context(), topic).Val())
	require.NoError(t, newPublisher(t, client).Publish(topic, numbered(2)...), "without it all goes on")
}

// serverName returns the server's name as an error should give it.
func serverName(t testing.TB, client redis.UniversalClient) string {
	t.Helper()
	info, err := client.Info(context.Background(), "server").Result()
	if err != nil {
		return "a server of unknown version"
	}
	name := map[string]string{"redis_version": "Redis ", "valkey_version": "Valkey "}
	found := ""
	for line := range strings.Lines(info) {
		field, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if prefix := name[field]; prefix != "" {
			found = prefix + value // Valkey names Redis's version first
		}
	}
	return found
}

// 8.6.0 and 8.6.1 forget UUIDs when they rewrite the AOF as commands. They have
// XADD IDMP and XCFGSET, but not XIDMPRECORD. [A hook simulates them.]
func TestIdempotence_BeforeXIDMPRECORD(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if cmd.Name() == "xidmprecord" {
			return redisError("ERR unknown command 'xidmprecord', with args beginning with: ")
		}
		return next()
	}})
	topic := topic(t)
	err := newIdempotent(t, client, goxstreams.Idempotence{}).Publish(topic, numbered(1)...)
	require.ErrorIs(t, err, goxstreams.ErrUnsupported)
	require.Zero(t, client.Exists(t.Context(), topic).Val())
}

// Without permission for XCFGSET the first Publish fails; XADD and XCFGSET are all
// that is needed.
func TestIdempotence_Rights(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	admin, topic := newClient(t), topic(t)
	err := newIdempotent(t, aclUser(t, admin, "-xcfgset"), goxstreams.Idempotence{}).Publish(topic, numbered(1)...)
	require.ErrorIs(t, err, goxstreams.ErrUnsupported)
	require.ErrorContains(t, err, "PublisherConfig.Idempotence")
	require.ErrorContains(t, err, "xcfgset")
	require.Zero(t, admin.Exists(t.Context(), topic).Val())

	msgs := numbered(1)
	pub := newIdempotent(t, aclUser(t, admin, "-@all", "+xadd", "+xcfgset"), goxstreams.Idempotence{})
	for range 2 {
		require.NoError(t, pub.Publish(topic, msgs...))
	}
	require.Equal(t, uuids(msgs), stored(t, admin, topic))
}

// A stream that is deleted is recreated with the server's settings; the Publisher
// notices, and configures it before it stores anything.
func TestIdempotence_StreamDeleted(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	protocols(t, func(t *testing.T, protocol int) {
		client, _ := wired(t, func(o *redis.Options) { o.Protocol = protocol })
		topic := topic(t)
		pub := newIdempotent(t, client, goxstreams.Idempotence{Window: time.Hour, MaxIDs: 500})
		for _, n := range []int{1, 1, 300} {
			msgs := numbered(n)
			for range 2 {
				require.NoError(t, pub.Publish(topic, msgs...))
			}
			require.Equal(t, uuids(msgs), stored(t, client, topic))
			require.Equal(t, [2]int64{3600, 500}, settings(t, client, topic))
			require.NoError(t, client.Del(t.Context(), topic).Err())
		}
	})
}

// Configuring a new stream leaves nothing in it: groups find only the messages,
// even a group that created the stream before, and nothing that others stored
// meanwhile is lost.
func TestIdempotence_SetsUpAnEmptyStream(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic := newClient(t), topic(t)
	before, fanOut := topic+"-group", topic+"-fanout"
	sub := newSubscriber(t, grouped(client))
	grouped, all := subscribe(t, sub, before), subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), fanOut)
	pub := newIdempotent(t, client, goxstreams.Idempotence{})
	for topic, messages := range map[string]<-chan *message.Message{before: grouped, fanOut: all} {
		want := numbered(3)
		require.NoError(t, pub.Publish(topic, want...))
		require.Equal(t, uuids(want), uuids(collect(messages, 3, patience)))
	}
	require.Zero(t, stats(t, sub).Broken)

	old := publish(t, client, topic, "a", "b")
	added := numbered(1)
	// Somebody creates the stream just after it was found missing.
	late := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if cmd.Name() == "xcfgset" && len(stored(t, client, topic+"-late")) == 0 {
			err := next()
			old = append(old, publish(t, client, topic+"-late", "c")...)
			return err
		}
		return next()
	}})
	require.NoError(t, pub.Publish(topic, added...))
	require.Equal(t, append(old[:2:2], uuids(added)...), stored(t, client, topic))
	require.NoError(t, newIdempotent(t, late, goxstreams.Idempotence{}).Publish(topic+"-late", added...))
	require.Equal(t, append(old[2:3:3], uuids(added)...), stored(t, client, topic+"-late"))
}

// A call with one message remains one XADD in one round trip, calls share
// pipelines, and the stream is configured once.
func TestIdempotence_RoundTrips(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, w := wired(t, nil)
	h, counts := countCommands()
	client.AddHook(h)
	topic := topic(t)
	ready := make(chan struct{}, 20)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{
		Client: client, Marshaler: signalMarshaler{ready: ready}, Idempotence: &goxstreams.Idempotence{},
	}, nil)
	require.NoError(t, err)
	require.NoError(t, pub.Publish(topic, numbered(2)...))
	w.executed()
	for _, n := range []int{1, 100} {
		adds, turns := w.sent()
		require.NoError(t, pub.Publish(topic, numbered(n)...))
		addsNow, turnsNow := w.sent()
		require.Equal(t, n, addsNow-adds)
		require.Equal(t, 1, turnsNow-turns)
		require.Equal(t, n > 1, w.executed())
	}
	arrived, release := w.hold()
	_, turns := w.sent()
	var publishing sync.WaitGroup
	publishing.Go(func() { require.NoError(t, pub.Publish(topic, numbered(1)...)) })
	arrived()
	for len(ready) > 0 {
		<-ready
	}
	for range 10 {
		publishing.Go(func() { require.NoError(t, pub.Publish(topic, numbered(1)...)) })
	}
	for range 10 {
		<-ready
	}
	release()
	publishing.Wait()
	_, turnsNow := w.sent()
	require.Less(t, turnsNow-turns, 11, "the one under way, and less than one for each that came meanwhile")
	require.Equal(t, 2, counts.of("xcfgset"), "one finds the stream missing, one sets it")
	require.Equal(t, 1, counts.of("xidmprecord"))
}

// MaxLen trims, but trimmed UUIDs are still remembered.
func TestIdempotence_MaxLen(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic := newClient(t), topic(t)
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, DefaultMaxLen: 10, Idempotence: &goxstreams.Idempotence{}}, nil)
	require.NoError(t, err)
	msgs := numbered(1000)
	for range 2 {
		require.NoError(t, pub.Publish(topic, msgs...))
	}
	got := stored(t, client, topic)
	require.Less(t, len(got), 500)
	require.Equal(t, uuids(msgs)[1000-len(got):], got)
}

func TestIdempotence_Cluster(t *testing.T) {
	onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
		pub := newIdempotent(t, client, goxstreams.Idempotence{Window: time.Hour})
		if info, err := client.Do(t.Context(), "command", "info", "xidmprecord").Slice(); err != nil || info[0] == nil {
			require.ErrorIs(t, pub.Publish(topic, numbered(1)...), goxstreams.ErrUnsupported)
			return
		}
		var want []string
		for _, n := range []int{1, 1, 100} {
			msgs := numbered(n)
			for range 2 {
				require.NoError(t, pub.Publish(topic, msgs...))
			}
			want = append(want, uuids(msgs)...)
		}
		require.Equal(t, want, stored(t, client, topic))
		require.EqualValues(t, 3600, settings(t, client, topic)[0])
		for _, n := range []int{1, 2} {
			require.NoError(t, client.Del(t.Context(), topic).Err())
			require.NoError(t, pub.Publish(topic, numbered(n)...))
			require.EqualValues(t, 3600, settings(t, client, topic)[0], "a deleted stream is set anew")
		}
	})
}

// A lost answer on a Cluster: published again, stored once.
func TestIdempotence_LostAnswerOnCluster(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, w := clusterOfOne(t)
	pub := newIdempotent(t, client, goxstreams.Idempotence{})
	for _, n := range []int{1, 100} {
		topic, msgs := topic(t), numbered(n)
		require.NoError(t, pub.Publish(topic, numbered(2)...))
		publishUntilKnown(t, pub, w, topic, msgs)
		require.Equal(t, uuids(msgs), stored(t, client, topic)[2:])
	}
}

// UUIDs survive a restart of the server, with its AOF rewritten in either way: as a
// snapshot, or as commands, for which XIDMPRECORD exists.
func TestIdempotence_Restart(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	for _, snapshot := range []string{"yes", "no"} {
		t.Run("Snapshot="+snapshot, func(t *testing.T) {
			t.Parallel()
			rememberedAfterRestart(t, testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always", "--aof-use-rdb-preamble", snapshot))
		})
	}
}

func rememberedAfterRestart(t *testing.T, server *testserver.Server) {
	client, topic, msgs := server.Client(), topic(t), numbered(10)
	require.NoError(t, newIdempotent(t, client, goxstreams.Idempotence{}).Publish(topic, msgs...))
	require.NoError(t, client.BgRewriteAOF(t.Context()).Err())
	eventually(t, func() bool {
		info := client.Info(t.Context(), "persistence").Val()
		return strings.Contains(info, "aof_rewrite_in_progress:0") && strings.Contains(info, "aof_rewrite_scheduled:0") &&
			strings.Contains(info, "aof_last_bgrewrite_status:ok")
	})
	server.Restart()
	require.NoError(t, newIdempotent(t, server.Client(), goxstreams.Idempotence{}).Publish(topic, msgs...))
	require.Equal(t, uuids(msgs), stored(t, server.Client(), topic))
}

// Events can have UUIDs of their own: produced again, they are stored once.
func TestIdempotence_Producer(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic := newClient(t), topic(t)
	producer := goxstreams.NewProducer[string](newIdempotent(t, client, goxstreams.Idempotence{}), goxstreams.ProducerConfig{
		UUID: func(_ context.Context, event any) string { return "order " + event.(string) },
	})
	for range 2 {
		require.NoError(t, producer.Produce(t.Context(), "1", topic))
		require.NoError(t, producer.ProduceBatch(t.Context(), []string{"1", "2", "3"}, topic))
	}
	require.Equal(t, []string{"order 1", "order 2", "order 3"}, stored(t, client, topic))
}

// ProducerConfig.UUID works with any Publisher; without it each event gets a new
// UUID.
func TestProducer_UUID(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := goxstreams.ProducerConfig{UUID: func(context.Context, any) string { return "mine" }}
	require.NoError(t, goxstreams.NewProducer[string](newPublisher(t, client), config).Produce(t.Context(), "1", topic))
	require.Equal(t, []string{"mine"}, stored(t, client, topic))
	require.NoError(t, goxstreams.NewProducer[string](newPublisher(t, client), goxstreams.ProducerConfig{}).ProduceBatch(t.Context(), []string{"1", "2"}, topic))
	got := stored(t, client, topic)
	slices.Sort(got)
	require.Len(t, slices.Compact(got), 3)
}

// A replay is not a Publish: it is stored although its UUID is remembered.
func TestIdempotence_Replay(t *testing.T) {
	t.Parallel()
	requireIdempotence(t)
	client, topic := newClient(t), topic(t)
	config := limited(client, -1)
	messages := subscribe(t, newSubscriber(t, config), topic)
	msgs := numbered(1)
	require.NoError(t, newIdempotent(t, client, goxstreams.Idempotence{}).Publish(topic, msgs...))
	next(t, messages).Nack()
	letter := eventuallyDies(t, client, topic)
	n, err := queueOf(t, client, goxstreams.DeadLetterTopic(topic)).Replay(t.Context(), letter.ID)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Equal(t, uuids(msgs), uuids(collect(messages, 1, patience)))
}

// The caller's config is copied, and every mistake in it is listed.
func TestIdempotence_Config(t *testing.T) {
	t.Parallel()
	client := newClient(t)
	for name, c := range map[string]struct {
		i    goxstreams.Idempotence
		want []string
	}{
		"none":          {goxstreams.Idempotence{}, nil},
		"Redis's most":  {goxstreams.Idempotence{ProducerID: "p", Window: 86_400 * time.Second, MaxIDs: 10_000}, nil},
		"Redis's least": {goxstreams.Idempotence{Window: time.Second, MaxIDs: 1}, nil},
		"negative":      {goxstreams.Idempotence{Window: -time.Second, MaxIDs: -1}, []string{"Window", "negative", "MaxIDs"}},
		"too much":      {goxstreams.Idempotence{Window: 25 * time.Hour, MaxIDs: 10_001}, []string{"Window", "24h0m0s", "MaxIDs", "10000"}},
		"a number":      {goxstreams.Idempotence{Window: 60}, []string{"Window", "whole seconds"}},
		"a fraction":    {goxstreams.Idempotence{Window: 1500 * time.Millisecond}, []string{"Window"}},
	} {
		given := c.i
		_, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, Idempotence: &c.i}, watermill.NopLogger{})
		require.Equal(t, given, c.i, "the caller's is changed")
		if c.want == nil {
			require.NoError(t, err, name)
			continue
		}
		for _, part := range c.want {
			require.ErrorContains(t, err, part, name)
		}
		require.ErrorContains(t, err, "PublisherConfig.Idempotence.", name)
	}
}
