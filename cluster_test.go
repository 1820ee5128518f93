package goxstreams_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// These tests repeat, on a Cluster of three masters, what the other tests show on
// one server. In addition they show that commands go to the key's master, that keys
// used together share a slot, and that slots move.

// onEachMaster runs the test for a topic on each master. With several masters a
// command that goes to any node fails for two of them.
func onEachMaster(t *testing.T, test func(t *testing.T, client *redis.ClusterClient, topic string)) {
	t.Parallel()
	client := testserver.Cluster(t).Client()
	var masters []string
	for len(masters) < 3 {
		topic := topicOfOwnSlot(t, client)
		master := masterOf(t, client, topic)
		if slices.Contains(masters, master) {
			continue
		}
		masters = append(masters, master)
		t.Run(fmt.Sprint("Master", len(masters)), func(t *testing.T) {
			t.Parallel()
			test(t, testserver.Cluster(t).Client(), topic)
		})
	}
}

// topicOfOwnSlot is topic, in a slot that no other test of this process uses: a
// slot moves with everything in it.
func topicOfOwnSlot(t testing.TB, client *redis.ClusterClient) string {
	t.Helper()
	for {
		topic := topic(t)
		slot, err := client.ClusterKeySlot(context.Background(), topic).Result()
		require.NoError(t, err)
		if _, taken := ownSlots.LoadOrStore(slot, true); !taken {
			return topic
		}
	}
}

var ownSlots sync.Map

// masterOf returns the address of the key's master, as far as the client knows.
func masterOf(t testing.TB, client *redis.ClusterClient, key string) string {
	t.Helper()
	master, err := client.MasterForKey(context.Background(), key)
	require.NoError(t, err)
	return master.Options().Addr
}

// rawEntries returns the entries of the stream: for each its ID, then its raw
// fields.
func rawEntries(t testing.TB, client redis.UniversalClient, stream string) [][]string {
	t.Helper()
	rows, err := client.Do(context.Background(), "xrange", stream, "-", "+").Slice()
	require.NoError(t, err)
	var entries [][]string
	for _, row := range rows {
		pair := row.([]any)
		entry := []string{pair[0].(string)}
		for _, field := range pair[1].([]any) {
			entry = append(entry, field.(string))
		}
		entries = append(entries, entry)
	}
	return entries
}

// originalFields returns the original fields that a dead letter contains.
func originalFields(t testing.TB, letter []string) []string {
	t.Helper()
	fields := letter[1:]
	i := slices.Index(fields, "_goxstreams_fields")
	require.GreaterOrEqual(t, i, 0, "no original fields in %q", letter)
	original, err := goxstreams.UnpackFields([]byte(fields[i+1]))
	require.NoError(t, err)
	return original
}

func TestCluster_PublishConsume(t *testing.T) {
	onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
		sub := newSubscriber(t, grouped(client))
		messages := subscribe(t, sub, topic)
		want := publish(t, client, topic, "single")
		want = append(want, publishN(t, client, topic, 200)...)
		want = append(want, publish(t, client, topic, "last")...)
		assert.Equal(t, want, uuids(collect(messages, len(want), patience)))
		eventuallySettled(t, client, topic, testGroup)
		info, err := client.XInfoGroups(t.Context(), topic).Result()
		require.NoError(t, err)
		assert.EqualValues(t, len(want), info[0].EntriesRead)
		assert.NoError(t, stats(t, sub).Err)
	})
}

func TestCluster_DeleteAcked(t *testing.T) {
	onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
		config := grouped(client)
		config.DeleteAcked = true
		want := publishN(t, client, topic, 20)
		got := collect(subscribe(t, newSubscriber(t, config), topic), len(want), patience)
		assert.Equal(t, want, uuids(got))
		eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() == 0 }, "acked entries stay")
		assert.Empty(t, pendingOf(t, client, topic, testGroup))
	})
}

func TestCluster_FanOut(t *testing.T) {
	onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
		publish(t, client, topic, "before")
		var out []<-chan *message.Message
		for range 2 {
			out = append(out, subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), topic))
		}
		want := publishN(t, client, topic, 20)
		for _, messages := range out {
			assert.Equal(t, want, uuids(collect(messages, len(want), patience)))
		}
	})
}

// TestCluster_DeadLetter: the topic and its dead-letter stream are in one slot, so
// that a message moves in one step.
func TestCluster_DeadLetter(t *testing.T) {
	t.Parallel()
	exhausted := func(t *testing.T, client *redis.ClusterClient, topic string) {
		const maxRetries = 2
		dead := make(chan goxstreams.DeadMessage, 10)
		config := grouped(client)
		config.Retry = &goxstreams.Retry{MaxRetries: maxRetries, InitialInterval: time.Millisecond}
		config.OnDead = func(_ context.Context, d goxstreams.DeadMessage) { dead <- d }
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		uuid := publish(t, client, topic, "dies")[0]
		original := rawEntries(t, client, topic)[0]
		for count := range int64(maxRetries + 1) {
			msg := next(t, messages)
			assert.Equal(t, uuid, msg.UUID)
			assert.Equal(t, count+1, delivery(t, msg).Count)
			rows := pendingOf(t, client, topic, testGroup)
			require.Len(t, rows, 1)
			assert.Equal(t, count+1, rows[0].RetryCount, "the count is not Redis's")
			msg.Nack()
		}
		publish(t, client, topic, "lives")
		msg := next(t, messages)
		assert.Equal(t, "lives", string(msg.Payload))
		msg.Ack()
		require.NoError(t, sub.Close())

		assert.Empty(t, pendingOf(t, client, topic, testGroup))
		letters := rawEntries(t, client, goxstreams.DeadLetterTopic(topic))
		require.Len(t, letters, 1)
		assert.Equal(t, original[1:], originalFields(t, letters[0]))
		require.Len(t, dead, 1)
		told := <-dead
		assert.Equal(t, letters[0][0], told.ID)
		assert.Equal(t, original[0], told.EntryID)
		assert.Equal(t, goxstreams.Exhausted, told.Kind)
		assert.EqualValues(t, maxRetries+1, told.Deliveries)
		assert.Equal(t, original[1:], told.Fields)
	}
	t.Run("Exhausted", func(t *testing.T) { onEachMaster(t, exhausted) })

	t.Run("TagOfItsOwn", func(t *testing.T) {
		onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
			topic = "prefix{" + topic + "}suffix"
			exhausted(t, client, topic)
			n, err := client.XLen(t.Context(), topic+".dead").Result()
			require.NoError(t, err)
			assert.EqualValues(t, 1, n)
		})
	})

	t.Run("Broken", func(t *testing.T) {
		onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
			fields := []string{"z", "1", "broken", "\x00\xff\r\n", "a", "", "z", "2"}
			config := grouped(client)
			config.Unmarshaler = picky{}
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			id, err := client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: fields}).Result()
			require.NoError(t, err)
			require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"body", "next"}}).Err())
			msg := next(t, messages)
			assert.Equal(t, "next", string(msg.Payload))
			msg.Ack()
			eventuallySettled(t, client, topic, testGroup)
			letters := rawEntries(t, client, goxstreams.DeadLetterTopic(topic))
			require.Len(t, letters, 1)
			assert.Equal(t, fields, originalFields(t, letters[0]))
			letter := deadLetters(t, client, topic)[0]
			assert.Equal(t, id, letter.Metadata.Get(goxstreams.DeadEntryIDKey))
			assert.Equal(t, goxstreams.Broken.String(), letter.Metadata.Get(goxstreams.DeadKindKey))
		})
	})
}

// TestCluster_Refused: a dead-letter stream to which entries cannot be moved in one
// step is rejected before anything is created.
func TestCluster_Refused(t *testing.T) {
	t.Parallel()
	client := testserver.Cluster(t).Client()
	other := func(topic string) string { return topic + ".elsewhere" }
	for name, tt := range map[string]struct {
		topic       string
		deadLetters func(string) string
	}{
		"another slot":           {topic(t), other},
		"a tag, another slot":    {topic(t) + "{a}", func(topic string) string { return topic[:len(topic)-3] + "{b}" }},
		"a brace without a tag":  {topic(t) + "}", nil},
		"an empty tag":           {topic(t) + "{}", nil},
		"a brace, another topic": {topic(t) + "}", other},
	} {
		t.Run(name, func(t *testing.T) {
			config := grouped(client)
			config.DeadLetterTopic = tt.deadLetters
			_, err := newSubscriber(t, config).Subscribe(t.Context(), tt.topic)
			require.ErrorContains(t, err, "SubscriberConfig.DeadLetterTopic")
			assert.ErrorContains(t, err, tt.topic)
			assert.Zero(t, client.Exists(t.Context(), tt.topic).Val(), "the stream is made")
		})
	}
	t.Run("Fan-out", func(t *testing.T) { // has no dead-letter stream
		topic := topic(t) + "}"
		messages := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), topic)
		want := publish(t, client, topic, "")
		assert.Equal(t, want, uuids(collect(messages, 1, patience)))
	})
}

func TestCluster_Takeover(t *testing.T) {
	onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
		const minIdle = 300 * time.Millisecond
		publish(t, client, topic, "")
		createGroup(t, client, topic, testGroup)
		config := claiming(client)
		config.ClaimMinIdle = minIdle
		sub := newSubscriber(t, config)
		before := time.Now()
		id := readAs(t, client, topic, testGroup, "dead", 1)[0]
		msg := next(t, subscribe(t, sub, topic))
		assert.GreaterOrEqual(t, time.Since(before), minIdle)
		d := delivery(t, msg)
		assert.Equal(t, id, d.ID)
		assert.EqualValues(t, 2, d.Count)
		rows := pendingOf(t, client, topic, testGroup)
		require.Len(t, rows, 1)
		assert.Equal(t, d.Consumer, rows[0].Consumer)
		assert.EqualValues(t, 2, rows[0].RetryCount)
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
}

// TestCluster_Close: prefetched messages are delivered to another consumer at once,
// as if they had never been read, and the current read is ended on the right node.
func TestCluster_Close(t *testing.T) {
	onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
		const n, before = 1000, 20
		want := publishN(t, client, topic, n)
		config := grouped(client)
		config.ClaimMinIdle = 5 * time.Minute // only released entries are redelivered within the test
		config.BlockTime, config.CloseTimeout = time.Minute, patience
		first := newSubscriber(t, config)
		messages := subscribe(t, first, topic)
		var handled []string
		var msg *message.Message
		for ahead := false; !ahead; { // on a busy machine the first ones may not be handled quickly enough
			require.Less(t, len(handled)+before, n, "nothing is prefetched")
			if msg != nil {
				msg.Ack()
				handled = append(handled, msg.UUID)
			}
			handled = append(handled, uuids(collect(messages, before, patience))...) // so quickly that the next ones are read ahead
			msg = next(t, messages)
			for end := time.Now().Add(time.Second); !ahead && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
				rows := pendingOf(t, client, topic, testGroup) // InFlight would count acks that are under way, too
				ahead = len(rows) > 0 && rows[len(rows)-1].ID != delivery(t, msg).ID
			}
		}
		msg.Ack()
		handled = append(handled, msg.UUID)
		require.NoError(t, first.Close())
		consumers, err := client.XInfoConsumers(t.Context(), topic, testGroup).Result()
		require.NoError(t, err)
		require.Len(t, consumers, 1)
		assert.Equal(t, "released", consumers[0].Name)
		rows := pendingOf(t, client, topic, testGroup)
		assert.NotEmpty(t, rows)
		for _, row := range rows {
			assert.Zero(t, row.RetryCount, "%+v", row)
		}

		second := newSubscriber(t, config)
		rest := newTally()
		rest.handle(subscribe(t, second, topic), nil)
		eventually(t, func() bool { return rest.len() == n-len(handled) }, "what was prefetched does not come")
		eventuallySettled(t, client, topic, testGroup)
		start := time.Now()
		require.NoError(t, second.Close())
		assert.Less(t, time.Since(start), patience/2, "Close waits for the read")
		assert.Equal(t, map[int64]int{1: n - len(handled)}, rest.counts)
		assert.True(t, rest.has(want[len(handled):]))
	})
}

// TestCluster_SlotMoves: a topic's slot moves to another master, and on to the
// third, while messages flow, some of which fail. Nothing is lost, and the counts
// continue.
func TestCluster_SlotMoves(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 16} {
		t.Run(fmt.Sprintf("MaxConcurrency=%d", concurrency), func(t *testing.T) {
			t.Parallel()
			const maxRetries = 3
			cluster := testserver.Cluster(t)
			client := cluster.Client()
			topic := topicOfOwnSlot(t, client)
			config := claiming(client)
			config.MaxConcurrency = concurrency
			config.Retry = &goxstreams.Retry{MaxRetries: maxRetries, InitialInterval: time.Millisecond, MaxInterval: 5 * time.Millisecond}
			log := newLogRecorder()
			sub := newSubscriberLog(t, config, log)
			var mu sync.Mutex
			counts := make(map[string][]int64) // of each message, in the order of its deliveries
			messages := subscribe(t, sub, topic)
			go func() {
				for msg := range messages {
					d, _ := goxstreams.DeliveryFromContext(msg.Context())
					mu.Lock()
					counts[msg.UUID] = append(counts[msg.UUID], d.Count)
					mu.Unlock()
					switch payload := string(msg.Payload); {
					case payload == "dies", payload == "fails twice" && d.Count <= 2:
						msg.Nack()
					default:
						msg.Ack()
					}
				}
			}()

			wantCounts := make(map[string][]int64)
			var dying []string
			stop := make(chan struct{})
			publisher := newPublisher(t, cluster.Client())
			publishing := make(chan struct{})
			var calls atomic.Int64
			go func() {
				defer close(publishing)
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					case <-time.After(2 * time.Millisecond): // so that the moves hit more of it
					}
					var msgs []*message.Message
					for _, payload := range [][]string{{"succeeds"}, {"fails twice"}, {"succeeds", "fails twice", "succeeds"}, {"dies"}}[i%4] {
						msg := message.NewMessage(watermill.NewUUID(), message.Payload(payload))
						msgs = append(msgs, msg)
						switch payload {
						case "succeeds":
							wantCounts[msg.UUID] = []int64{1}
						case "fails twice":
							wantCounts[msg.UUID] = []int64{1, 2, 3}
						case "dies":
							wantCounts[msg.UUID] = []int64{1, 2, 3, 4}
							dying = append(dying, msg.UUID)
						}
					}
					assert.NoError(t, publisher.Publish(topic, msgs...))
					calls.Add(1)
				}
			}()
			handled := func() int { mu.Lock(); defer mu.Unlock(); return len(counts) }
			flow := func() {
				before := handled()
				eventually(t, func() bool { return handled() > before+20 }, "nothing comes any more")
			}
			masters := []string{masterOf(t, client, topic)}
			for range 2 {
				flow()
				cluster.MoveSlot(topic, func() {
					before := calls.Load()
					eventually(t, func() bool { return calls.Load() > before+8 }, "nothing can be published halfway")
				})
				masters = append(masters, masterOf(t, cluster.Client(), topic))
			}
			flow()
			close(stop)
			<-publishing
			assert.Len(t, slices.Compact(masters), 3)

			eventually(t, func() bool {
				info, err := client.XInfoGroups(t.Context(), topic).Result()
				return err == nil && info[0].Pending == 0 && info[0].Lag == 0
			}, "something is stranded")
			require.NoError(t, sub.Close())
			movedIsNotLost(t, log)
			mu.Lock()
			defer mu.Unlock()
			assert.Equal(t, wantCounts, counts)
			assert.ElementsMatch(t, dying, uuids(deadLetters(t, client, topic)))
		})
	}
}

// movedIsNotLost checks that no group was recreated.
func movedIsNotLost(t testing.TB, log logRecorder) {
	t.Helper()
	for _, line := range log.Errors() {
		assert.NotContains(t, line, "consumer group was", "what moved is taken for lost")
	}
}

// TestCluster_SlotMovesIdle: a subscription that sends no command which would be
// redirected still finds the topic's new master.
func TestCluster_SlotMovesIdle(t *testing.T) {
	t.Parallel()
	for name, group := range map[string]string{"Group": testGroup, "FanOut": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster := testserver.Cluster(t)
			client, log := cluster.Client(), newLogRecorder()
			topic := topicOfOwnSlot(t, client)
			sub := newSubscriberLog(t, goxstreams.SubscriberConfig{Client: cluster.Client(), ConsumerGroup: group}, log)
			messages := subscribe(t, sub, topic)
			publish(t, client, topic, "before")
			next(t, messages).Ack()
			for range 2 {
				var want []string
				cluster.MoveSlot(topic, func() { want = publish(t, client, topic, "halfway") })
				want = append(want, publish(t, client, topic, "after")...)
				assert.Equal(t, want, uuids(collect(messages, 2, patience)))
			}
			eventually(t, func() bool { return stats(t, sub).Err == nil }, "the outage does not end")
			movedIsNotLost(t, log)
		})
	}
}

// TestCluster_SlotMovesInHand: messages that are being handled while the slot is in
// the middle of its move. Leases are renewed, acks arrive, and dead messages are
// moved once.
func TestCluster_SlotMovesInHand(t *testing.T) {
	t.Parallel()
	cluster := testserver.Cluster(t)
	client := cluster.Client()
	topic := topicOfOwnSlot(t, client)
	dead := make(chan goxstreams.DeadMessage, 10)
	config := claiming(cluster.Client())
	config.MaxConcurrency = 4
	config.Retry = &goxstreams.Retry{MaxRetries: 1, InitialInterval: time.Millisecond}
	config.OnDead = func(_ context.Context, d goxstreams.DeadMessage) { dead <- d }
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "kept", "acked", "nacked", "dies")
	out := make(map[string]*message.Message)
	for len(out) < 4 {
		msg := next(t, messages)
		if string(msg.Payload) == "dies" && delivery(t, msg).Count == 1 {
			msg.Nack()
			continue
		}
		out[string(msg.Payload)] = msg
	}

	cluster.MoveSlot(topic, func() {
		out["acked"].Ack()
		eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) == 3 }, "the ack does not arrive")
		out["nacked"].Nack()
		out["dies"].Nack()
		id := delivery(t, out["kept"]).ID
		during(t, minIdle*5/4, func() bool {
			rows := pendingOf(t, client, topic, testGroup)
			return slices.ContainsFunc(rows, func(row redis.XPendingExt) bool { return row.ID == id && row.Idle < minIdle })
		}, "the lease runs out")
	})
	assert.NoError(t, out["kept"].Context().Err())
	assert.EqualValues(t, 1, pendingOf(t, client, topic, testGroup)[0].RetryCount)
	out["kept"].Ack()
	msg := next(t, messages)
	assert.Equal(t, "nacked", string(msg.Payload))
	assert.EqualValues(t, 2, delivery(t, msg).Count)
	msg.Ack()
	eventuallySettled(t, client, topic, testGroup)
	assert.Zero(t, stats(t, sub).Claimed)
	require.NoError(t, sub.Close())
	require.Len(t, dead, 1)
	letters := deadLetters(t, client, topic)
	require.Len(t, letters, 1)
	assert.Equal(t, "dies", string(letters[0].Payload))
	assert.Equal(t, delivery(t, out["dies"]).ID, letters[0].Metadata.Get(goxstreams.DeadEntryIDKey))
}

// TestCluster_Stale: Subscribe with a client whose knowledge of the Cluster is out
// of date.
func TestCluster_Stale(t *testing.T) {
	t.Parallel()
	for name, group := range map[string]string{"Group": testGroup, "FanOut": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster := testserver.Cluster(t)
			client, stale := cluster.Client(), cluster.Client()
			topic := topicOfOwnSlot(t, client)
			before := masterOf(t, stale, topic)
			cluster.MoveSlot(topic, nil)
			require.Equal(t, before, masterOf(t, stale, topic), "the client is not stale")
			messages := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: stale, ConsumerGroup: group}), topic)
			want := publish(t, client, topic, "")
			assert.Equal(t, want, uuids(collect(messages, 1, patience)))
		})
	}
}
