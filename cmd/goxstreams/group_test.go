package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// groupOf returns "last-delivered pending" of a group; "" if there is none.
func groupOf(t *testing.T, client redis.UniversalClient, topic, group string) string {
	t.Helper()
	groups, err := client.XInfoGroups(t.Context(), topic).Result()
	require.NoError(t, err)
	for _, g := range groups {
		if g.Name == group {
			return fmt.Sprintf("%s %d", g.LastDeliveredID, g.Pending)
		}
	}
	return ""
}

func TestGroupCreate(t *testing.T) {
	testserver.RequireReal(t) // the embedded server says less of a stream
	client, topic := testserver.Client(t), topic(t)
	_, notes := ran(t, exitFailed, "group", "create", topic, "g", "--yes")
	assert.Contains(t, notes, "--mkstream")
	_, notes = ran(t, 0, "group", "create", topic, "g", "--mkstream", "--dry-run")
	assert.Contains(t, notes, fmt.Sprintf("Group \"g\" of %q would be created after 0-0, with 0 entries to handle. Nothing is done.", topic))
	assert.Zero(t, client.Exists(t.Context(), topic).Val())
	ran(t, 0, "group", "create", topic, "g", "--mkstream", "--from", "end", "--yes")
	assert.Equal(t, "0-0 0", groupOf(t, client, topic, "g"))

	ids := pend(t, client, topic, "c1", 3)
	old := fmt.Sprintf("%d-0", time.Now().Add(-time.Hour).UnixMilli())
	for from, want := range map[string]struct {
		after string
		lag   float64
	}{"start": {"0-0", 3}, "end": {ids[2], 0}, ids[0]: {ids[0], 2}, "1h": {"", 3}, "2099-01-01T00:00:00Z": {ids[2], 0}, old: {old, 3}, "99999999999999-0": {ids[2], 0}} {
		c := onTest(t)
		c.in = "y\n"
		require.Zero(t, c.run("group", "create", topic, "g-"+from, "--from", from, "--json"), c.err.String())
		row := lines(t, c.out.String())[0]
		assert.Equal(t, want.lag, row["lag"], from)
		assert.Equal(t, "created", row["result"])
		if want.after != "" {
			assert.Equal(t, want.after+" 0", groupOf(t, client, topic, "g-"+from))
		}
	}
	_, notes = ran(t, exitFailed, "group", "create", topic, "g", "--yes")
	assert.Contains(t, notes, "has a group \"g\" already")
	c := onTest(t)
	c.in = "n\n"
	assert.Equal(t, exitFailed, c.run("group", "create", topic, "no"))
	assert.Contains(t, c.err.String(), fmt.Sprintf("Create group \"no\" of %q after 0-0, with 3 entries to handle? [y/N]", topic))
	assert.Empty(t, groupOf(t, client, topic, "no"))
}

func TestGroupReset(t *testing.T) {
	testserver.RequireReal(t)
	client, topic := testserver.Client(t), topic(t)
	ids := pend(t, client, topic, "c1", 4)
	for range 2 {
		id, err := client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"_watermill_message_uuid", "x", "payload", "p"}}).Result()
		require.NoError(t, err)
		ids = append(ids, id)
	}
	require.NoError(t, client.XAck(t.Context(), topic, "g", ids[0], ids[1]).Err())
	_, notes := ran(t, 0, "group", "reset", topic, "g", "--to", "start", "--dry-run")
	assert.Contains(t, notes, fmt.Sprintf("from %s to 0-0: 4 entries delivered again, 2 entries still pending. Nothing is done.", ids[3]))
	_, notes = ran(t, 0, "group", "reset", topic, "g", "--to", "end", "--dry-run")
	assert.Contains(t, notes, fmt.Sprintf("from %s to %s: 2 entries skipped", ids[3], ids[5]))
	_, notes = ran(t, 0, "group", "reset", topic, "g", "--to", ids[3], "--dry-run")
	assert.Contains(t, notes, "nothing changes")
	assert.Equal(t, ids[3]+" 2", groupOf(t, client, topic, "g"))

	c := onTest(t)
	c.in = "y\n"
	require.Zero(t, c.run("group", "reset", topic, "g", "--to", ids[1]), c.err.String())
	assert.Contains(t, c.err.String(), fmt.Sprintf("Reset group \"g\" of %q from %s to %s: 2 entries delivered again", topic, ids[3], ids[1]))
	assert.Equal(t, ids[1]+" 2", groupOf(t, client, topic, "g"))
	row := parsed(t, "group", "reset", topic, "g", "--to", ids[4], "--yes")[0]
	assert.Equal(t, 3.0, row["entries_skipped"])
	assert.Equal(t, ids[4]+" 2", groupOf(t, client, topic, "g"))
	out, _ := ran(t, 0, "group", "reset", topic, "g", "--to", "start", "--yes", "-o", "csv")
	assert.Equal(t, "5", csvRows(t, out)[0]["entries_again"])
	assert.Len(t, received(t, client, topic, "g", 6), 6)

	// A group that comes past the place to which it was to skip is not sent back.
	require.NoError(t, client.XGroupSetID(t.Context(), topic, "g", ids[0]).Err())
	c = onTest(t)
	in := answering(func() string {
		require.NoError(t, client.XGroupSetID(t.Context(), topic, "g", ids[5]).Err())
		return "y\n"
	})
	assert.Equal(t, exitFailed, run(t.Context(), []string{"--url", c.url, "group", "reset", topic, "g", "--to", ids[3]}, streams{in: in, out: &c.out, err: &c.err, asks: true}))
	assert.Contains(t, c.err.String(), "has changed since")
	assert.True(t, strings.HasPrefix(groupOf(t, client, topic, "g"), ids[5]))
}

// Consumers need not be stopped: they are given again what they have acked, and not what they hold.
func TestGroupResetWhileConsumersRun(t *testing.T) {
	testserver.RequireReal(t)
	client, topic := testserver.Client(t), topic(t)
	for i := range 3 {
		ran(t, 0, "publish", topic, fmt.Sprint(i))
	}
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "g", MaxConcurrency: 3}, nil)
	require.NoError(t, err)
	messages, err := sub.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	next := func() *message.Message {
		select {
		case msg := <-messages:
			return msg
		case <-time.After(30 * time.Second):
			require.Fail(t, "nothing comes")
			return nil
		}
	}
	held := next()
	var others, again []string // in any order: there are three slots
	for range 2 {
		msg := next()
		others = append(others, string(msg.Payload))
		msg.Ack()
	}
	await(t, func() bool { return strings.HasSuffix(groupOf(t, client, topic, "g"), " 1") })
	ran(t, 0, "group", "reset", topic, "g", "--to", "start", "--yes")
	for range 2 {
		msg := next()
		again = append(again, string(msg.Payload))
		msg.Ack()
	}
	assert.ElementsMatch(t, others, again)
	held.Ack()
	await(t, func() bool { return strings.HasSuffix(groupOf(t, client, topic, "g"), " 0") })
	require.NoError(t, sub.Close())
}

func TestGroupDelete(t *testing.T) {
	testserver.RequireReal(t)
	client, topic := testserver.Client(t), topic(t)
	pend(t, client, topic, "c1", 3)
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"body", "b"}}).Err())
	_, notes := ran(t, 0, "group", "delete", topic, "g", "--dry-run")
	assert.Contains(t, notes, "would be deleted with 3 entries pending at 1 consumers, and 1 entry not yet delivered. Nothing is done.")
	read := &redis.XReadGroupArgs{Group: "g", Consumer: "c2", Streams: []string{topic, ">"}}
	c := onTest(t)
	in := answering(func() string {
		require.NoError(t, client.XReadGroup(t.Context(), read).Err())
		return "y\n"
	})
	assert.Equal(t, exitFailed, run(t.Context(), []string{"--url", c.url, "group", "delete", topic, "g"}, streams{in: in, out: &c.out, err: &c.err, asks: true}))
	assert.Contains(t, c.err.String(), "has changed since")
	assert.NotEmpty(t, groupOf(t, client, topic, "g"))
	assert.Equal(t, "deleted", parsed(t, "group", "delete", topic, "g", "--yes")[0]["result"])
	assert.Empty(t, groupOf(t, client, topic, "g"))
	for _, args := range [][]string{{"delete", topic, "g", "--yes"}, {"reset", topic, "g", "--to", "end", "--yes"}, {"delete", topic + "-none", "g", "--yes"}} {
		_, notes = ran(t, exitFailed, append([]string{"group"}, args...)...)
		assert.Regexp(t, "has no group|there is no stream", notes)
	}
}

func TestGroupUsage(t *testing.T) {
	topic := topic(t)
	for _, tt := range []struct {
		want string
		args []string
	}{
		{"which", nil}, {"--to", []string{"reset", topic, "g", "--yes"}}, {"--to", []string{"reset", topic, "g", "--yes", "--to", "tomorrow"}},
		{"--to", []string{"reset", topic, "g", "--yes", "--to", "1-2-3"}}, {"--from", []string{"create", topic, "g", "--yes", "--from", ""}},
		{"--from", []string{"create", topic, "g", "--yes", "--from", "-1h"}}, {"no terminal", []string{"create", topic, "g"}},
		{"no terminal", []string{"delete", topic, "g"}}, {"is empty", []string{"delete", topic, "", "--yes"}}, {"arg", []string{"delete", topic}},
	} {
		_, notes := ran(t, exitUsage, append([]string{"group"}, tt.args...)...)
		assert.Contains(t, notes, tt.want, "%v", tt.args)
	}
}

func TestGroupPause(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	_, notes := ran(t, exitFailed, "group", "pause", topic, "g", "--yes")
	assert.Contains(t, notes, "there is no stream")
	require.NoError(t, client.XGroupCreateMkStream(t.Context(), topic, "g", "0").Err())
	_, notes = ran(t, exitFailed, "group", "pause", topic, "none", "--yes")
	assert.Contains(t, notes, "has no group \"none\"")
	paused := func() bool {
		all, err := goxstreams.Paused(t.Context(), client, topic)
		require.NoError(t, err)
		return !all["g"].IsZero()
	}
	_, notes = ran(t, 0, "group", "pause", topic, "g", "--dry-run")
	assert.Contains(t, notes, "would be paused")
	assert.False(t, paused())
	_, notes = ran(t, 0, "group", "pause", topic, "g", "--yes")
	assert.Contains(t, notes, fmt.Sprintf("Group \"g\" of %q paused", topic))
	assert.True(t, paused())
	row := parsed(t, "groups", topic)[0]
	assert.EqualValues(t, 1, row["paused"])
	out, _ := ran(t, 0, "groups", topic)
	assert.Regexp(t, `(?m)PAUSED$`, out)
	assert.Regexp(t, `(?m)^g .* yes$`, out)
	row = parsed(t, "group", "resume", topic, "g", "--yes")[0]
	assert.Equal(t, "resumed", row["result"])
	assert.False(t, paused())
	assert.EqualValues(t, 0, parsed(t, "groups", topic)[0]["paused"])
	c := onTest(t)
	c.in = "n\n"
	assert.NotZero(t, c.run("group", "pause", topic, "g"))
	assert.False(t, paused())
}
