package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// pend stores n messages, and gives what group g has not read to a consumer. It returns their IDs.
func pend(t *testing.T, client redis.UniversalClient, topic, consumer string, n int) []string {
	t.Helper()
	var ids []string
	for i := range n {
		id, err := client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"_watermill_message_uuid", fmt.Sprint(i), "payload", fmt.Sprint(i)}}).Result()
		require.NoError(t, err)
		ids = append(ids, id)
	}
	err := client.XGroupCreateMkStream(t.Context(), topic, "g", "0").Err()
	if err != nil {
		require.Contains(t, err.Error(), "BUSYGROUP")
	}
	read := &redis.XReadGroupArgs{Group: "g", Consumer: consumer, Streams: []string{topic, ">"}}
	require.NoError(t, client.XReadGroup(t.Context(), read).Err())
	return ids
}

// pendingOf returns "consumer deliveries" of what is pending in group g, by the ID.
func pendingOf(t *testing.T, client redis.UniversalClient, topic string) map[string]string {
	t.Helper()
	rows, err := client.XPendingExt(t.Context(), &redis.XPendingExtArgs{Stream: topic, Group: "g", Start: "-", End: "+", Count: 10000}).Result()
	require.NoError(t, err)
	all := make(map[string]string)
	for _, p := range rows {
		all[p.ID] = fmt.Sprintf("%s %d", p.Consumer, p.RetryCount)
	}
	return all
}

func TestPendingMove(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	ids := append(pend(t, client, topic, "c1", 3), pend(t, client, topic, "c2", 3)...)
	before := pendingOf(t, client, topic)

	out, notes := ran(t, 0, "pending", "release", topic, "g", "--consumer", "c1", "--dry-run")
	assert.Equal(t, 4, strings.Count(out, "\n"))
	assert.Contains(t, notes, "3 entries would be released. Nothing is done.")
	rows := parsed(t, "pending", "ack", topic, "g", "--all", "--limit", "2", "--dry-run")
	assert.Equal(t, []string{"would be acked", "would be acked"}, column(rows, "result"))
	assert.Equal(t, ids[:2], column(rows, "id"))
	_, notes = ran(t, 0, "pending", "claim", topic, "g", "--to", "c9", "--min-idle", "1h", "--yes")
	assert.Contains(t, notes, "0 entries claimed.")
	c := onTest(t)
	c.in = "n\n"
	assert.Equal(t, exitFailed, c.run("pending", "ack", topic, "g", "--all"))
	assert.Contains(t, c.err.String(), fmt.Sprintf("Ack 6 entries of %q, pending in group \"g\"? [y/N]", topic))
	assert.Regexp(t, `3 +c1 +\d+s +\d+s +1 `, c.err.String())
	assert.Equal(t, before, pendingOf(t, client, topic))

	// A claim leaves the count as it is, a release takes the delivery back, an ack ends it.
	_, notes = ran(t, exitPartly, "pending", "claim", topic, "g", "--to", "c9", "--yes", ids[0], "1-1", ids[3])
	assert.Contains(t, notes, "1-1: it is not pending in the group")
	assert.Contains(t, notes, "2 entries claimed, 1 failed.")
	rows = parsed(t, "pending", "release", topic, "g", "--consumer", "c9", "--yes", "--limit", "1")
	assert.Equal(t, []map[string]any{{"id": ids[0], "result": "released"}}, rows)
	c = onTest(t)
	c.in = "y\n"
	require.Zero(t, c.run("pending", "ack", topic, "g", "--consumer", "c2"), c.err.String())
	assert.Contains(t, c.err.String(), "2 entries acked.")
	assert.Equal(t, map[string]string{ids[0]: "released 0", ids[1]: "c1 1", ids[2]: "c1 1", ids[3]: "c9 1"}, pendingOf(t, client, topic))
	assert.Equal(t, int64(6), client.XLen(t.Context(), topic).Val())

	// What is released is not released again: that would give back a delivery that was none.
	_, notes = ran(t, 0, "pending", "release", topic, "g", "--consumer", "released", "--yes")
	assert.Contains(t, notes, "0 entries released.")
	_, notes = ran(t, exitPartly, "pending", "release", topic, "g", ids[0], "--dry-run")
	assert.Contains(t, notes, "it is released already")
	assert.Equal(t, []string{"failed"}, column(lines(t, firstOf(t, exitPartly, "pending", "release", topic, "g", ids[0], "--yes", "--json")), "result"))
	out = firstOf(t, exitPartly, "pending", "release", topic, "g", ids[0], ids[1], "--dry-run", "-o", "csv")
	assert.Equal(t, []string{"failed", "would be released"}, []string{csvRows(t, out)[0]["result"], csvRows(t, out)[1]["result"]})
}

func firstOf(t *testing.T, code int, args ...string) string {
	t.Helper()
	out, _ := ran(t, code, args...)
	return out
}

// A consumer of the library takes what the command releases at once, and the delivery that was given
// back does not count.
func TestReleaseIsTheLibrarys(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	ids := pend(t, client, topic, "crashed", 3)
	ran(t, 0, "pending", "release", topic, "g", "--all", "--yes")
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "g", ClaimMinIdle: 10 * time.Minute, ClaimInterval: 100 * time.Millisecond}, watermill.NopLogger{})
	require.NoError(t, err)
	messages, err := sub.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	for range ids {
		select {
		case msg := <-messages:
			require.NotNil(t, msg)
			msg.Ack()
		case <-time.After(30 * time.Second):
			t.Fatal("what was released is not taken")
		}
		for _, held := range pendingOf(t, client, topic) {
			assert.Regexp(t, ` [01]$`, held, "the released delivery counts")
		}
	}
	require.NoError(t, sub.Close())
	assert.Empty(t, pendingOf(t, client, topic))
}

// What has changed between the listing and the answer is left alone.
func TestPendingMoveOfTheChanged(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	ids := pend(t, client, topic, "c1", 5)
	for verb, args := range map[string][]string{"release": nil, "claim": {"--to", "c9"}, "ack": nil} {
		c := onTest(t)
		in := answering(func() string {
			require.NoError(t, client.XClaimJustID(t.Context(), &redis.XClaimArgs{Stream: topic, Group: "g", Consumer: "c2", Messages: ids[:1]}).Err())
			require.NoError(t, client.XClaim(t.Context(), &redis.XClaimArgs{Stream: topic, Group: "g", Consumer: "c1", Messages: ids[1:2]}).Err())
			require.NoError(t, client.XAck(t.Context(), topic, "g", ids[2]).Err())
			return "y\n"
		})
		code := run(t.Context(), append([]string{"--url", c.url, "pending", verb, topic, "g", "--consumer", "c1"}, args...), streams{in: in, out: &c.out, err: &c.err, asks: true})
		assert.Equal(t, exitPartly, code, c.err.String())
		assert.Contains(t, c.err.String(), ids[0]+": it has changed since it was listed")
		assert.Contains(t, c.err.String(), ids[1]+": it has changed since it was listed")
		assert.Contains(t, c.err.String(), ids[2]+": it is not pending")
		assert.Contains(t, c.err.String(), "2 entries "+map[string]string{"release": "released", "claim": "claimed", "ack": "acked"}[verb]+", 3 failed.")
		held := pendingOf(t, client, topic)
		assert.Equal(t, "c2", strings.Fields(held[ids[0]])[0])
		assert.Equal(t, "c1", strings.Fields(held[ids[1]])[0])
		require.NoError(t, client.XGroupDestroy(t.Context(), topic, "g").Err()) // and once more
		require.NoError(t, client.XGroupCreate(t.Context(), topic, "g", "0").Err())
		require.NoError(t, client.XReadGroup(t.Context(), &redis.XReadGroupArgs{Group: "g", Consumer: "c1", Streams: []string{topic, ">"}}).Err())
	}

	// One that is renewed between the listing and the script is not idle for so long any more. Lists are made of
	// IDs here, since a filter would not list it.
	m := &pendingMove{client: client, topic: topic, group: "g", to: "c9", tally: tally{a: &app{streams: streams{err: io.Discard}, out: bufio.NewWriter(io.Discard), format: formatTable}}}
	m.minIdle = time.Hour
	rows, err := m.find(t.Context(), []entryID{mustID(t, ids[0])})
	require.NoError(t, err)
	require.NoError(t, m.moveBatch(t.Context(), []redis.XPendingExt{rows[ids[0]]}))
	assert.Equal(t, int64(1), m.failed)
	assert.Equal(t, "c1 1", pendingOf(t, client, topic)[ids[0]])
}

func mustID(t *testing.T, s string) entryID {
	t.Helper()
	id, err := parseID(s)
	require.NoError(t, err)
	return id
}

func TestPendingMoveOfTheTrimmed(t *testing.T) {
	testserver.RequireReal(t)
	client, topic := testserver.Client(t), topic(t)
	ids := pend(t, client, topic, "c1", 2)
	require.NoError(t, client.XDel(t.Context(), topic, ids[0]).Err())
	_, notes := ran(t, exitPartly, "pending", "release", topic, "g", "--all", "--yes")
	assert.Contains(t, notes, ids[0]+": it is not in the stream any more")
	assert.Equal(t, map[string]string{ids[1]: "released 0"}, pendingOf(t, client, topic))
}

// An answer that is lost makes go-redis send the script again: it finds what it did.
func TestPendingMoveWithoutAnAnswer(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	pend(t, client, topic, "c1", 3)
	ran := func() {
		await(t, func() bool { return !strings.Contains(fmt.Sprint(pendingOf(t, client, topic)), "c1") })
	}
	var lost atomic.Bool
	broken := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err != nil || lost.Swap(true) {
			return conn, err
		}
		return lossy{conn, ran, new(atomic.Bool)}, nil // the first one
	}})
	var out, notes syncBuffer
	code := runWith(t.Context(), broken, []string{"pending", "release", topic, "g", "--all", "--yes", "--json"}, streams{out: &out, err: &notes})
	assert.Zero(t, code, notes.String())
	assert.Equal(t, []string{"released", "released", "released"}, column(lines(t, out.String()), "result"))
	for _, held := range pendingOf(t, client, topic) {
		assert.Equal(t, "released 0", held)
	}
}

func TestPendingMoveOfMany(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	const n = 2345
	_, err := client.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
		for range n {
			pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"body", "b"}})
		}
		pipe.XGroupCreate(t.Context(), topic, "g", "0")
		pipe.XReadGroup(t.Context(), &redis.XReadGroupArgs{Group: "g", Consumer: "c", Streams: []string{topic, ">"}, Count: n})
		return nil
	})
	require.NoError(t, err)
	_, notes := ran(t, 0, "pending", "release", topic, "g", "--all", "--yes")
	assert.Contains(t, notes, "2345 entries released.")
	ids := strings.Join(column(parsed(t, "pending", topic, "g"), "id"), "\n")
	var out, errs syncBuffer
	code := run(t.Context(), []string{"--url", onTest(t).url, "pending", "ack", topic, "g", "-", "--yes"}, streams{in: strings.NewReader(ids), out: &out, err: &errs})
	assert.Zero(t, code, errs.String())
	assert.Empty(t, pendingOf(t, client, topic))
}

func TestPendingMoveUsage(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	ids := pend(t, client, topic, "c1", 2)
	before := pendingOf(t, client, topic)
	for _, tt := range []struct {
		want string
		args []string
	}{
		{"which ones", []string{"release", topic, "g", "--yes"}},
		{"which ones", []string{"release", topic, "g", "--yes", "--limit", "3"}},
		{"not both", []string{"ack", topic, "g", "--yes", "--all", "--consumer", "c1"}},
		{"not both", []string{"ack", topic, "g", "--yes", "--all", ids[0]}},
		{"not both", []string{"ack", topic, "g", "--yes", "--min-idle", "1s", ids[0]}},
		{"--to", []string{"claim", topic, "g", "--yes", "--all"}},
		{"--to", []string{"claim", topic, "g", "--yes", "--all", "--to", "released"}},
		{"no terminal", []string{"ack", topic, "g", "--all"}},
		{"standard input is read", []string{"ack", topic, "g", "-"}},
		{"no entry ID", []string{"ack", topic, "g", "x", "--yes"}},
		{"--min-idle", []string{"ack", topic, "g", "--all", "--min-idle", "-1s", "--yes"}},
		{"--min-deliveries", []string{"ack", topic, "g", "--min-deliveries", "-1", "--all", "--yes"}},
		{"is empty", []string{"ack", topic, "", "--all", "--yes"}},
	} {
		_, notes := ran(t, exitUsage, append([]string{"pending"}, tt.args...)...)
		assert.Contains(t, notes, tt.want, "%v", tt.args)
	}
	assert.Equal(t, before, pendingOf(t, client, topic))
	for _, which := range [][]string{{ids[0]}, {"--all"}} {
		_, notes := ran(t, exitFailed, append([]string{"pending", "ack", topic, "nobody", "--yes"}, which...)...)
		assert.Contains(t, notes, `has no group "nobody"`)
	}
	// A topic of a verb's name can be listed.
	_, notes := ran(t, exitFailed, "pending", "--", "claim", "nobody")
	assert.Contains(t, notes, `topic "claim"`)
}
