package goxstreams_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
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

// Each test here is about an effect that topics which share reads and connections
// had, or might have, on one another.

// blockedReads returns how many connections of the named clients are in a blocking
// read.
func blockedReads(t testing.TB, admin redis.UniversalClient, name string) int {
	t.Helper()
	n := 0
	for _, conn := range connections(t, admin, name) {
		if strings.Contains(conn, " flags=b ") && strings.Contains(conn, " cmd=xread") {
			n++
		}
	}
	return n
}

// impatient returns a client of the server whose commands time out after a second.
func impatient(t testing.TB, server *testserver.Server) *redis.Client {
	t.Helper()
	opt := *server.Client().Options()
	opt.ReadTimeout = time.Second
	client := redis.NewClient(&opt)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// TestShared_ConsumersDenied: without permission for XINFO CONSUMERS the pause
// between two sweeps was not kept. Every second tick went through the whole list of
// pending entries, and every other one sent a denied command.
func TestShared_ConsumersDenied(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // ACL
	const consumers = 1000
	server := testserver.Private(t)
	admin := server.Client()
	ctx := context.Background()
	require.NoError(t, admin.Do(ctx, "acl", "setuser", "worker", "on", ">secret", "~*", "+@all", "-xinfo|consumers").Err())
	client := redis.NewClient(&redis.Options{Addr: server.Addr(), Username: "worker", Password: "secret"})
	t.Cleanup(func() { _ = client.Close() })
	var sweeps, asked, ticks atomic.Int64
	client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		var args []string
		for _, arg := range cmd.Args() {
			args = append(args, strings.ToLower(fmt.Sprint(arg)))
		}
		switch {
		case args[0] == "xpending" && slices.Contains(args, "idle") && !slices.Contains(args, "released"):
			sweeps.Add(1)
		case args[0] == "xinfo" && args[1] == "consumers":
			asked.Add(1)
		case args[0] == "xpending" && len(args) == 3:
			ticks.Add(1)
		}
		return next()
	}})
	topic := topic(t)
	createGroup(t, admin, topic, testGroup)
	publish(t, admin, topic, "held")
	readAs(t, admin, topic, testGroup, "other", 1) // otherwise there is nothing to look for
	_, err := admin.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i := range consumers {
			pipe.XGroupCreateConsumer(ctx, topic, testGroup, fmt.Sprint("c", i))
		}
		return nil
	})
	require.NoError(t, err)
	config := grouped(client)
	config.ClaimMinIdle = 30 * time.Second // of which a third is the longest rest then
	config.ClaimInterval = 20 * time.Millisecond
	subscribe(t, newSubscriber(t, config), topic)

	eventually(t, func() bool { return sweeps.Load() > 0 }, "never looked")
	eventually(t, func() bool { return ticks.Load() >= 50 })
	t.Logf("%d sweeps of the list, %d XINFO CONSUMERS in %d ticks", sweeps.Load(), asked.Load(), ticks.Load())
	assert.LessOrEqual(t, asked.Load(), int64(2), "asked again though denied")
	assert.Less(t, sweeps.Load(), ticks.Load()/4, "a sweep of 0.1ms is to be followed by a rest of 2s among 1000")
}

// TestShared_IdleChurnConnections: before Redis 7.2 an idle subscription's consumer
// does not exist, so Close could not remove it, and its name was not used again.
// Topics that had been opened and closed a different number of times then had
// different names, ten here, and could not share their reads.
func TestShared_IdleChurnConnections(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // CLIENT LIST
	const n, names, most = 30, 10, 7
	client, name := named(t)
	admin := newClient(t)
	config := grouped(client)
	config.ClaimInterval = time.Second
	sub := newSubscriber(t, config)
	base := topic(t)
	topics := make([]string, n)
	for i := range topics {
		topics[i] = fmt.Sprintf("%s-%d", base, i)
		for range i % names {
			ctx, cancel := context.WithCancel(context.Background())
			messages, err := sub.Subscribe(ctx, topics[i])
			require.NoError(t, err)
			eventually(t, func() bool { return blockedReads(t, admin, name) > 0 })
			cancel()
			require.True(t, closed(messages, patience))
		}
	}
	channels := make(map[string]<-chan *message.Message)
	for _, topic := range topics {
		channels[topic] = subscribe(t, sub, topic)
	}
	for topic, messages := range channels { // all of them read
		publish(t, admin, topic, "x")
		next(t, messages).Ack()
	}
	eventually(t, func() bool { return blockedReads(t, admin, name) > 0 })
	// All reads block again, within that time.
	during(t, 300*time.Millisecond, func() bool { return blockedReads(t, admin, name) <= most }, "they do not share reads")
}

// TestShared_TakeoverAmongTopics: each of a Subscriber's many topics had a fixed
// share of the candidates, so that a topic with many entries to take over took 100
// per ClaimMinIdle, though the other topics were idle.
func TestShared_TakeoverAmongTopics(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	const others, n = 120, 2000
	client, topic := newClient(t), topic(t)
	createGroup(t, client, topic, testGroup)
	publishN(t, client, topic, n)
	readAs(t, client, topic, testGroup, "dead", n)
	died := time.Now()
	config := claiming(client)
	// Long enough that the bound distinguishes the fault from a busy machine.
	config.ClaimMinIdle, config.ClaimInterval = 5*minIdle, 2*claimInterval
	config.MaxConcurrency = 50
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	manyTopics(t, sub, others)
	got := collect(messages, n, patience)
	t.Logf("%d after %s", len(got), time.Since(died))
	assert.Len(t, got, n)
	assert.LessOrEqual(t, time.Since(died), n/100*config.ClaimMinIdle/2, "twice as fast as 100 each ClaimMinIdle, at least")
}

// TestShared_KeyPrefixHook: a hook of the client adds a prefix to all keys. The
// reply to a read then names a different stream than was requested, and was
// dropped, so each message came late and counted twice.
func TestShared_KeyPrefixHook(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // CLIENT LIST
	const space = "ns:"
	client, name := named(t)
	plain := newClient(t)
	rewrite := func(cmd redis.Cmder) {
		args := cmd.Args()
		switch cmd.Name() {
		case "xadd", "xack", "xclaim", "xpending", "xrange":
			args[1] = space + fmt.Sprint(args[1])
		case "xgroup", "xinfo":
			args[2] = space + fmt.Sprint(args[2])
		case "eval":
			args[3] = space + fmt.Sprint(args[3])
		case "xreadgroup":
			keys := args[slices.Index(args, any("streams"))+1:]
			for i := range len(keys) / 2 {
				keys[i] = space + fmt.Sprint(keys[i])
			}
		}
	}
	client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		rewrite(cmd)
		return next()
	}, pipeline: func(_ context.Context, cmds []redis.Cmder, next func() error) error {
		for _, cmd := range cmds {
			rewrite(cmd)
		}
		return next()
	}})
	topic := topic(t)
	messages := subscribe(t, newSubscriber(t, claiming(client)), topic)
	eventually(t, func() bool { return blockedReads(t, plain, name) > 0 }, "nobody reads")
	publish(t, plain, space+topic, "hello")
	msg := next(t, messages)
	assert.Equal(t, "hello", string(msg.Payload))
	assert.EqualValues(t, 1, delivery(t, msg).Count, "it was claimed, late")
	msg.Ack()
}

// throttled returns the address of a proxy to the server. Its connections share
// that many bytes per second in the direction from the server.
func throttled(t testing.TB, to string, perSecond int) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	var mu sync.Mutex
	free := time.Now()
	take := func(n int) {
		mu.Lock()
		if now := time.Now(); free.Before(now) {
			free = now
		}
		free = free.Add(time.Duration(n) * time.Second / time.Duration(perSecond))
		until := free
		mu.Unlock()
		time.Sleep(time.Until(until)) // the throttle itself
	}
	go func() {
		for {
			down, err := ln.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", to)
			if err != nil {
				_ = down.Close()
				continue
			}
			hangUp := func() {
				_ = up.Close()
				_ = down.Close()
			}
			go func() {
				defer hangUp()
				_, _ = io.Copy(up, down)
			}()
			go func() {
				defer hangUp()
				for buf := make([]byte, 16<<10); ; {
					n, err := up.Read(buf)
					if err != nil {
						return
					}
					take(n)
					if _, err := down.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}

// TestShared_BulkReads: topics that catch up read much at a time, all of them in
// one pipeline, whose replies had to arrive within one ReadTimeout. If they did
// not, they were lost, and with a user-given name their messages came when their
// leases expired, counted as failed.
func TestShared_BulkReads(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n, each, size = 10, 100, 10 << 10
	// A pipeline of all entries takes 5s, one read half a second.
	const perSecond = 2 << 20
	client := redis.NewClient(&redis.Options{
		Addr: throttled(t, testserver.Addr(t), perSecond), ReadTimeout: 2 * time.Second,
	})
	t.Cleanup(func() { _ = client.Close() })
	admin := newClient(t)
	logs := newLogRecorder()
	config := grouped(client)
	config.ClaimInterval = 500 * time.Millisecond
	config.Consumer, config.ClaimMinIdle = "worker-7", 10*time.Second
	sub := newSubscriberLog(t, config, logs)
	topics, channels := manyTopics(t, sub, n)
	t.Cleanup(func() { admin.Del(context.Background(), topics...) })
	payloads := slices.Repeat([]string{strings.Repeat("x", size)}, each)
	handled := newTally()
	for _, messages := range channels {
		handled.handle(messages, nil)
	}
	began := time.Now()
	for _, topic := range topics {
		publish(t, admin, topic, payloads...)
	}
	eventuallyAll(t, handled.len, n*each)
	var claimed int64
	for _, s := range sub.Stats() {
		claimed += s.Claimed
	}
	t.Logf("after %s, at least %s", time.Since(began), n*each*size*time.Second/perSecond)
	assert.Empty(t, logs.Errors())
	assert.Zero(t, claimed)
	assert.Equal(t, n*each, handled.total(), "retries used up by nobody's failure")
}

// TestShared_LostAnswers: replies to reads are lost, of one topic or of several
// that are read at once. Each topic finds its own entries, in order.
func TestShared_LostAnswers(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n, each = 12, 60
	client, plain := newClient(t), newClient(t)
	var answered, lost atomic.Int64
	client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		err := next()
		if cmd.Name() == "xreadgroup" && err == nil && answered.Add(1)%8 == 0 {
			lost.Add(1)
			return &net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}
		}
		return err
	}})
	sub := newSubscriber(t, grouped(client))
	topics, channels := manyTopics(t, sub, n)
	var mu sync.Mutex
	got := make(map[string][]int)
	total := func() int {
		mu.Lock()
		defer mu.Unlock()
		sum := 0
		for _, is := range got {
			sum += len(is)
		}
		return sum
	}
	for topic, messages := range channels {
		go func() {
			for msg := range messages {
				i, err := strconv.Atoi(string(msg.Payload))
				assert.NoError(t, err)
				mu.Lock()
				got[topic] = append(got[topic], i)
				mu.Unlock()
				msg.Ack()
			}
		}()
	}
	for i := range each {
		for _, topic := range topics {
			publish(t, plain, topic, fmt.Sprint(i))
		}
	}
	eventuallyAll(t, total, n*each)
	for _, topic := range topics {
		eventuallySettled(t, plain, topic, testGroup)
	}
	t.Logf("%d answers lost", lost.Load())
	require.Positive(t, lost.Load())
	assert.Equal(t, n*each, total())
	mu.Lock()
	defer mu.Unlock()
	for topic, is := range got {
		assert.True(t, slices.IsSorted(is), "%s %v", topic, is)
	}
}

// TestShared_WaitsAmongTopics: each of a Subscriber's many topics had a fixed share
// of the retries that may wait in its process, 100 of them. The rest was left to be
// claimed, came long before it was due, and was counted.
func TestShared_WaitsAmongTopics(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	const n, others = 300, 120
	client, topic := newClient(t), topic(t)
	config := claiming(client)
	config.MaxConcurrency = 10
	config.Retry = &goxstreams.Retry{InitialInterval: time.Minute, MaxInterval: time.Minute}
	sub := newSubscriber(t, config)
	manyTopics(t, sub, others)
	messages := subscribe(t, sub, topic)
	publishN(t, client, topic, n)
	for range n {
		msg := next(t, messages)
		require.EqualValues(t, 1, delivery(t, msg).Count, "before the others' first")
		msg.Nack()
	}
	// Entries that nobody renews are claimed within claimTime.
	select {
	case msg := <-messages:
		assert.Fail(t, "again, though due after a minute", "count %d", delivery(t, msg).Count)
	case <-time.After(2 * minIdle):
	}
}

// TestShared_FrozenClose: while Redis was frozen, Close took as long as one topic
// after the other if topics shared their reads. Now it is bounded, and all
// goroutines end.
func TestShared_FrozenClose(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n = 60
	server := testserver.Private(t)
	client, plain := impatient(t, server), server.Client()
	config := grouped(client)
	config.CloseTimeout = 2 * time.Second
	config.BlockTime = time.Second
	sub, err := goxstreams.NewSubscriber(config, nil)
	require.NoError(t, err)
	var topics []string
	handled := newTally()
	left := startedBy(t, func() {
		var channels map[string]<-chan *message.Message
		topics, channels = manyTopics(t, sub, n)
		for _, messages := range channels {
			handled.handle(messages, nil)
		}
	})
	require.Greater(t, left(), n, "goroutines are not counted")
	for _, topic := range topics {
		publish(t, plain, topic, "x", "y")
	}
	eventually(t, func() bool { return handled.total() == 2*n })
	for _, topic := range topics {
		publish(t, plain, topic, "z") // so that some are in flight
	}
	server.Freeze()
	began := time.Now()
	done := make(chan error, 1)
	go func() { done <- sub.Close() }()
	select {
	case err = <-done:
	case <-time.After(patience):
		require.FailNow(t, "Close does not return")
	}
	took := time.Since(began)
	server.Thaw()
	require.NoError(t, err)
	t.Logf("closed after %s", took)
	assert.Less(t, took, config.CloseTimeout+time.Second+2*client.Options().ReadTimeout+slack, "a second for each of 60 topics")
	eventually(t, func() bool { return left() == 0 }, "goroutines are left")
}

// TestShared_FrozenLeader: some of the topics that share reads are closed while
// Redis is frozen, among them those that read for the others, and subscribed again.
// The others continue, and nothing is lost or delivered twice.
func TestShared_FrozenLeader(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n, rounds = 30, 2
	server := testserver.Private(t)
	client, plain := impatient(t, server), server.Client()
	config := claiming(client)
	config.CloseTimeout = 300 * time.Millisecond
	sub := newSubscriber(t, config)
	base := topic(t)
	name := func(i int) string { return fmt.Sprint(base, "-", i) }
	handled := newTally()
	var cancels [n]context.CancelFunc
	var ended [n]chan struct{}
	open := func(i int) {
		ctx, cancel := context.WithCancel(context.Background())
		messages, err := sub.Subscribe(ctx, name(i))
		require.NoError(t, err)
		done := make(chan struct{})
		cancels[i], ended[i] = cancel, done
		go func() {
			defer close(done)
			for msg := range messages {
				handled.add(msg)
				msg.Ack()
			}
		}()
	}
	for i := range n {
		open(i)
		defer func() { cancels[i]() }()
	}
	want := 0
	send := func(what string) {
		t.Helper()
		for i := range n {
			publish(t, plain, name(i), what)
			want++
		}
		began := time.Now()
		eventuallyAll(t, handled.len, want)
		t.Logf("%s: %s", what, time.Since(began))
		for i := range n {
			eventuallySettled(t, plain, name(i), testGroup)
		}
	}
	send("before")
	for round := range rounds {
		var comers []int
		for i := range n {
			if (i+round)%3 == 0 || i < 6 {
				comers = append(comers, i)
			}
		}
		server.Freeze()
		for _, i := range comers {
			cancels[i]()
		}
		for _, i := range comers {
			select {
			case <-ended[i]:
			case <-time.After(patience):
				require.FailNow(t, "the channel does not close while Redis is frozen")
			}
		}
		server.Thaw()
		for _, i := range comers {
			open(i)
		}
		send(fmt.Sprint("round ", round))
	}
	assert.Equal(t, want, handled.total())
}

// TestShared_SuspectsShared: topics that share reads have messages that may have
// crashed their process, each of which is handled by itself. Traffic in all of the
// topics must not keep them from running.
func TestShared_SuspectsShared(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	const n, crashed = 20, 3
	client := newClient(t)
	base := topic(t)
	topics := make([]string, n)
	for i := range topics {
		topics[i] = fmt.Sprintf("%s-%d", base, i)
		createGroup(t, client, topics[i], testGroup)
		publishN(t, client, topics[i], crashed)
		for _, id := range readAs(t, client, topics[i], testGroup, "dead", crashed) {
			require.NoError(t, client.Do(t.Context(), "xclaim", topics[i], testGroup, "dead", 0, id, "retrycount", 5, "justid").Err())
		}
	}
	config := claiming(client)
	config.MaxConcurrency = 4
	sub := newSubscriber(t, config)
	handled := newTally()
	for _, topic := range topics {
		handled.handle(subscribe(t, sub, topic), nil)
	}
	began, sent := time.Now(), 0
	dead := func() (left int) {
		for _, topic := range topics {
			for _, p := range pendingOf(t, client, topic, testGroup) {
				if p.Consumer == "dead" {
					left++
				}
			}
		}
		return left
	}
	eventually(t, func() bool {
		for _, topic := range topics {
			publish(t, client, topic, "traffic")
			sent++
		}
		return dead() == 0
	}, "suspects do not get their turn")
	t.Logf("after %s and %d others", time.Since(began), sent)
	eventuallyAll(t, handled.len, sent+n*crashed)
	for _, topic := range topics {
		eventuallySettled(t, client, topic, testGroup)
	}
	assert.Equal(t, sent+n*crashed, handled.total())
}

// TestShared_ClusterMove: topics with one hash tag share a read, and their slot
// moves to another node. They all continue there.
func TestShared_ClusterMove(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n, moves = 8, 2
	cluster := testserver.Cluster(t)
	sub := newSubscriber(t, grouped(cluster.Client()))
	tag := "{" + topicOfOwnSlot(t, cluster.Client()) + "}"
	handled := newTally()
	topics := make([]string, n)
	for i := range topics {
		topics[i] = fmt.Sprint(tag, "-", i)
		handled.handle(subscribe(t, sub, topics[i]), nil)
	}
	pub := newPublisher(t, cluster.Client())
	want := 0
	send := func() {
		for _, topic := range topics {
			eventually(t, func() bool { // while the slot moves it may be rejected
				return pub.Publish(topic, message.NewMessage(watermill.NewUUID(), nil)) == nil
			})
			want++
		}
	}
	send()
	eventually(t, func() bool { return handled.len() >= want }, "messages are missing")
	for range moves {
		cluster.MoveSlot(topics[0], send)
		send()
		began := time.Now()
		eventually(t, func() bool { return handled.len() >= want }, "messages are missing after the move")
		t.Logf("%s after the move", time.Since(began))
	}
}
