package goxstreams_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// deleting is the config of a group's consumer with DeleteAcked.
func deleting(client redis.UniversalClient, group string) goxstreams.SubscriberConfig {
	config := limited(client, 1)
	config.ConsumerGroup, config.DeleteAcked = group, true
	return config
}

// Without XACKDEL, several groups delete together: what all of them have acked, from the
// start of the stream.
func TestDeleteAcked_SeveralGroupsEverywhere(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	groups := []string{"a", "b", "c"}
	for _, group := range groups {
		createGroup(t, client, topic, group)
	}
	ids := publishN(t, client, topic, 300)
	for i, group := range groups {
		require.Equal(t, ids, stored(t, client, topic), "%s needs them", group)
		require.Len(t, collect(subscribe(t, newSubscriber(t, deleting(client, group)), topic), len(ids), patience), len(ids))
		eventuallySettled(t, client, topic, group)
		if i < len(groups)-1 {
			continue
		}
		eventually(t, func() bool { return len(stored(t, client, topic)) == 0 })
	}
}

// A nacked message stays until it is acked. A dead one leaves the stream like an
// acked one: when no group needs it any more. Here the group whose messages die
// finishes first, and finishes last.
func TestDeleteAcked_DeadInOneOfTwoGroups(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, deadFirst := range []bool{true, false} {
		t.Run(map[bool]string{true: "First", false: "Last"}[deadFirst], func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			createGroup(t, client, topic, "acks")
			createGroup(t, client, topic, testGroup)
			want := publishN(t, client, topic, 20)
			acks := func() {
				require.Len(t, collect(subscribe(t, newSubscriber(t, deleting(client, "acks")), topic), 20, patience), 20)
				eventuallySettled(t, client, topic, "acks")
			}
			dies := func() {
				messages := subscribe(t, newSubscriber(t, deleting(client, testGroup)), topic)
				for i := range 20 {
					next(t, messages).Nack()
					require.Subset(t, stored(t, client, topic), want[i:], "nacked, and gone")
					next(t, messages).Nack()
				}
				eventually(t, func() bool { return len(allLetters(t, client, topic)) == 20 })
				eventuallySettled(t, client, topic, testGroup)
			}
			first, last := dies, acks
			if !deadFirst {
				first, last = acks, dies
			}
			first()
			require.Equal(t, want, stored(t, client, topic), "the other group needs them")
			last()
			eventually(t, func() bool { return len(stored(t, client, topic)) == 0 })
		})
	}
}

// A group is destroyed while others consume. What they acked before, and the destroyed
// group had not, is trimmed too, a minute later: until then the group may be recreated.
func TestDeleteAcked_GroupDestroyed(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	messages := subscribe(t, newSubscriber(t, deleting(client, testGroup)), topic)
	createGroup(t, client, topic, "destroyed")
	before := publishN(t, client, topic, 5)
	require.Len(t, collect(messages, 5, patience), 5)
	eventuallySettled(t, client, topic, testGroup)
	beside := topic + ".retention{" + topic + "}"
	eventually(t, func() bool { return client.HGet(t.Context(), beside, "group destroyed").Err() == nil })
	require.Equal(t, before, stored(t, client, topic), "the other group needs them")

	require.NoError(t, client.XGroupDestroy(t.Context(), topic, "destroyed").Err())
	publishN(t, client, topic, 5)
	require.Len(t, collect(messages, 5, patience), 5)
	eventuallySettled(t, client, topic, testGroup)
	require.Subset(t, stored(t, client, topic), before, "the other group may be recreated")
	eventually(t, func() bool {
		return strings.HasPrefix(client.HGet(t.Context(), beside, "group destroyed").Val(), "hold ")
	})
	require.NoError(t, client.HSet(t.Context(), beside, "group destroyed", "hold 1 1").Err()) // as if it were longer ago
	eventually(t, func() bool { return len(stored(t, client, topic)) == 0 })
}

// With one group and no XACKDEL, a message dies after another group was added: it
// moves to the dead-letter stream, and stays in the stream for the other group.
func TestDeleteAcked_DeadAfterAnotherGroupCame(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	messages := subscribe(t, newSubscriber(t, deleting(client, testGroup)), topic)
	createGroup(t, client, topic, "other")
	want := publishN(t, client, topic, 1)
	next(t, messages).Nack()
	next(t, messages).Nack()
	eventuallyDies(t, client, topic)
	require.Equal(t, want, stored(t, client, topic), "the other group needs it")
	got := collect(subscribe(t, newSubscriber(t, limitedOf(client, "other")), topic), 1, patience)
	require.Equal(t, want, uuids(got))
}

// Somebody trims the stream just when a group is created, and so sees it. The group was
// taken for one that had been lost, and nothing that was acked was deleted for a minute.
func TestDeleteAcked_NewGroupIsSeen(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	admin, topic := newClient(t), topic(t)
	created := false
	client := newClient(t, &hook{process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
		err := next()
		if cmd.Name() == "xgroup" && strings.EqualFold(fmt.Sprint(cmd.Args()[1]), "create") {
			created = true
			_, err := goxstreams.Trim(ctx, admin, topic, goxstreams.Retention{KeepLast: 1})
			assert.NoError(t, err)
		}
		return err
	}})
	messages := subscribe(t, newSubscriber(t, deleting(client, "new")), topic)
	require.True(t, created)
	publish(t, admin, topic, "x")
	next(t, messages).Ack()
	eventuallySettled(t, admin, topic, "new")
	require.Empty(t, stored(t, admin, topic), "deleted with the ack")
}

// A group is lost, and SubscribeInitialize recreates it before its consumers notice: what was
// pending for them must not be deleted until they have restored it.
func TestDeleteAcked_LostGroupIsInitialized(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, "lost")
	messages := subscribe(t, newSubscriber(t, deleting(client, "stays")), topic)
	ids := publishN(t, client, topic, 3)
	readAs(t, client, topic, "lost", "consumer", 3)
	_, err := goxstreams.Trim(t.Context(), client, topic, goxstreams.Retention{KeepLast: 100})
	require.NoError(t, err)
	require.NoError(t, client.XGroupDestroy(t.Context(), topic, "lost").Err())
	config := limitedOf(client, "lost")
	config.StartID = "$"
	require.NoError(t, newSubscriber(t, config).SubscribeInitialize(topic))
	require.Len(t, collect(messages, 3, patience), 3)
	eventuallySettled(t, client, topic, "stays")
	require.Equal(t, ids, stored(t, client, topic))
}

func limitedOf(client redis.UniversalClient, group string) goxstreams.SubscriberConfig {
	config := limited(client, 1)
	config.ConsumerGroup = group
	return config
}

// Entries are trimmed while they are pending: their acks find nothing to delete,
// but still remove the pending entries.
func TestDeleteAcked_TrimmedWhilePending(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	config := deleting(client, testGroup)
	config.MaxConcurrency = 10
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	want := publishN(t, client, topic, 10)
	held := map[string]func() bool{}
	for range 10 {
		msg := next(t, messages)
		held[msg.UUID] = msg.Ack
	}
	require.NoError(t, client.XTrimMaxLen(t.Context(), topic, 5).Err())
	for _, ack := range held {
		ack()
	}
	eventuallySettled(t, client, topic, testGroup)
	require.Empty(t, stored(t, client, topic))
	require.Len(t, held, len(want))
	eventually(t, func() bool { return stats(t, sub).Acked == 10 })
}

// In a Cluster two groups delete together.
func TestDeleteAcked_TwoGroupsOnCluster(t *testing.T) {
	onEachMaster(t, func(t *testing.T, client *redis.ClusterClient, topic string) {
		createGroup(t, client, topic, "a")
		createGroup(t, client, topic, "b")
		want := publishN(t, client, topic, 20)
		for i, group := range []string{"a", "b"} {
			if i == 1 {
				require.Equal(t, want, stored(t, client, topic))
			}
			require.Len(t, collect(subscribe(t, newSubscriber(t, deleting(client, group)), topic), 20, patience), 20)
			eventuallySettled(t, client, topic, group)
		}
		eventually(t, func() bool { return len(stored(t, client, topic)) == 0 })
	})
}

// quietEnv makes TestDeleteAcked_QuietOnCluster's second process run the test.
const quietEnv = "GOXSTREAMS_QUIET_CLUSTER"

// go-redis writes "info for cmd=... not found" to stderr if a Cluster client gets a
// command that no node knows. So the library sends such checks to a node. [The test
// looks at the stderr of another process, since go-redis has one global logger.]
func TestDeleteAcked_QuietOnCluster(t *testing.T) {
	if os.Getenv(quietEnv) == "" {
		t.Parallel()
		testserver.RequireReal(t)
		cmd := exec.Command(os.Args[0], "-test.run=^TestDeleteAcked_QuietOnCluster$")
		cmd.Env = append(os.Environ(), quietEnv+"=1")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.NotContains(t, string(out), "info for cmd=")
		return
	}
	client, _ := clusterOfOne(t)
	topic := topic(t)
	_, _ = newSubscriber(t, deleting(client, testGroup)).Subscribe(t.Context(), topic)
	_ = newIdempotent(t, client, goxstreams.Idempotence{}).Publish(topic, numbered(1)...)
}

// TestDeleteAcked: acked entries leave the stream when nobody needs them.
func TestDeleteAcked(t *testing.T) {
	t.Parallel()
	consume := func(t *testing.T, client *redis.Client, topic, group string, n int) *goxstreams.Subscriber {
		t.Helper()
		config := grouped(client)
		config.ConsumerGroup = group
		config.DeleteAcked = true
		config.Retry = quickRetry()
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		next(t, messages).Nack() // it stays
		require.Len(t, collect(messages, n, patience), n)
		eventuallySettled(t, client, topic, group)
		return sub
	}
	t.Run("OneGroup", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		publishN(t, client, topic, 50)
		sub := consume(t, client, topic, "a", 50)
		require.NoError(t, sub.Close())
		assert.Zero(t, client.XLen(t.Context(), topic).Val())
	})
	t.Run("SeveralGroups", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		publishN(t, client, topic, 50)
		createGroup(t, client, topic, "a")
		createGroup(t, client, topic, "b")
		require.NoError(t, consume(t, client, topic, "a", 50).Close())
		assert.EqualValues(t, 50, client.XLen(t.Context(), topic).Val(), "the other group needs them")
		b := consume(t, client, topic, "b", 50)
		eventually(t, func() bool { return client.XLen(t.Context(), topic).Val() == 0 })
		require.NoError(t, b.Close())
	})
	t.Run("AnotherGroupLater", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		config := grouped(client)
		config.ConsumerGroup = "a"
		config.DeleteAcked = true
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		createGroup(t, client, topic, "b")
		publishN(t, client, topic, 10)
		require.Len(t, collect(messages, 10, patience), 10)
		eventuallySettled(t, client, topic, "a")
		config = grouped(client)
		config.ConsumerGroup = "b"
		assert.Len(t, collect(subscribe(t, newSubscriber(t, config), topic), 10, patience), 10, "the later group's messages are deleted")
	})
}

// DeleteAcked by script: the stream is deleted while the last message is being
// handled and the subscription closes.
func TestDeleteAcked_CloseWithoutStream(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	client, name := named(t)
	config := grouped(client)
	config.DeleteAcked = true
	config.CloseTimeout = patience
	log := newLogRecorder()
	sub := newSubscriberLog(t, config, log)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "x")
	msg := next(t, messages)
	done := make(chan struct{})
	go func() { defer close(done); _ = sub.Close() }()
	// Nobody reads any more and could recreate the group, or a reader is left and
	// has recreated it.
	eventually(t, func() bool { return blockedReads(t, admin, name) == 0 })
	require.NoError(t, admin.Del(t.Context(), topic).Err())
	msg.Ack()
	<-done
	for _, line := range log.Errors() {
		require.NotContains(t, line, "Closed before all acks", "it waits for acks that nothing can take")
	}
}
