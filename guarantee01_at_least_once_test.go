package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
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

// Guarantee 1: delivery is at least once. An entry stays pending until its message
// is acked or dead-lettered; an entry that is trimmed or deleted before that is
// counted and logged. This file also tests what that costs: memory, goroutines, the
// server's time.

// In a fan-out only the subscription has a message that waits for its retry, so it
// keeps the fields. They were parts of the reply that they arrived in, with a
// hundred messages and more, and kept the whole reply in memory, with its other
// messages' contexts and payloads: 1,000 snoozed messages of 9 kB took 1.9 GB.
//
// Now a message that waits, or is handled for long, takes about as much memory as
// its payload.
//
// [Not parallel: it measures memory.]
func TestFault31_WaitingMessagesKeepTheirReplies(t *testing.T) {
	testserver.RequireReal(t) // the embedded server's entries would count as this process's memory
	const (
		n, every = 5_000, 100 // every hundredth message waits
		size     = 9_000
		held     = n / every * size
		allowed  = 3*held + 8<<20
	)
	body := strings.Repeat("x", size-16)
	snoozed := func(*message.Message, <-chan struct{}) error { return goxstreams.Snooze(errFails, time.Hour) }
	inHand := func(_ *message.Message, end <-chan struct{}) error { <-end; return nil }
	for _, tt := range []struct {
		name   string
		config goxstreams.SubscriberConfig
		fields func(i int) []string
		handle func(msg *message.Message, end <-chan struct{}) error // of the messages that wait
	}{
		{"Snoozed", goxstreams.SubscriberConfig{}, nil, snoozed},
		{"RetryAfter", goxstreams.SubscriberConfig{}, nil, func(*message.Message, <-chan struct{}) error {
			return goxstreams.RetryAfter(errFails, time.Hour)
		}},
		// With the default policy, the only one for a fan-out.
		{"Malformed", goxstreams.SubscriberConfig{
			OnBroken: func(context.Context, goxstreams.BrokenMessage) error { return errFails },
		}, func(int) []string { return []string{"metadata", "\xc1", "payload", body} }, nil},
		{"InHand", goxstreams.SubscriberConfig{MaxConcurrency: 2 * n / every}, nil, inHand},
		// In a group the message is read again when it is due.
		{"GroupSnoozed", goxstreams.SubscriberConfig{ConsumerGroup: testGroup}, nil, snoozed},
		{"GroupInHand", goxstreams.SubscriberConfig{ConsumerGroup: testGroup, MaxConcurrency: 2 * n / every}, nil, inHand},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client, topic := newClient(t), topic(t)
			t.Cleanup(func() { newClient(t).Del(context.Background(), topic) })
			if tt.config.ConsumerGroup != "" {
				createGroup(t, client, topic, tt.config.ConsumerGroup)
			}
			for from := 0; from < n; from += 500 {
				_, err := client.Pipelined(t.Context(), func(p redis.Pipeliner) error {
					for i := from; i < from+500; i++ {
						fields := []string{goxstreams.UUIDHeaderKey, fmt.Sprint(i), "payload", body}
						if tt.fields != nil && i%every == 0 {
							fields = tt.fields(i)
						}
						p.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, Values: fields})
					}
					return nil
				})
				require.NoError(t, err)
			}
			config := tt.config
			config.Client, config.MaxConcurrency, config.StartID = client, max(50, config.MaxConcurrency), "0"
			before := heap()
			sub := newSubscriber(t, config)
			end := make(chan struct{})
			defer close(end)
			plainly(t, sub, topic, func(msg *message.Message) error {
				if i, err := strconv.Atoi(msg.UUID); err != nil || i%every == 0 {
					return tt.handle(msg, end)
				}
				return nil
			}, goxstreams.Retry{}.Middleware)
			eventuallyAll(t, func() int { return int(stats(t, sub).Acked) }, n-n/every)
			eventually(t, func() bool {
				s := stats(t, sub)
				return s.Waiting == n/every || s.Waiting == 0 && s.InFlight == n/every
			})
			used := heap() - before
			t.Logf("%d waiting messages of %d bytes take %d kB, %.1f times their size", n/every, size, used>>10, float64(used)/held)
			require.Less(t, used, int64(allowed), "bytes for %d bytes of messages that wait", held)
		})
	}
}

// heap returns the number of bytes in use.
func heap() int64 {
	runtime.GC()
	runtime.GC() // collects what finalizers and pools kept after the first one
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A stream was deleted and recreated, and its IDs started below those that the
// subscription had read: the server's clock was set back, a backup was restored, or
// the IDs were set explicitly. As soon as one ID was above them, the stream looked
// like the old one. The group was recreated at its old position, and a fan-out
// noticed nothing: the entries with smaller IDs were skipped without a log line.
//
// Now all entries of the new stream are delivered. (In a fan-out, where nobody
// knows what was read, some may be delivered twice.)
func TestFault37_NewStreamWithSmallerIDs(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	ids := []string{"900-1", "950-1", "1100-1"}
	for _, mode := range []string{"Group", "FanOut"} {
		// open subscribes. The function that it returns reports whether the reader
		// is blocking.
		open := func(t *testing.T, batchSize int) (*redis.Client, string, *goxstreams.Subscriber, <-chan *message.Message, func() bool) {
			client, topic := newClient(t), topic(t)
			own, name := named(t)
			config := goxstreams.SubscriberConfig{Client: own, BatchSize: batchSize, BlockTime: time.Minute} // it must notice earlier than that
			if mode == "Group" {
				config.ConsumerGroup = testGroup
			}
			sub := newSubscriber(t, config)
			return client, topic, sub, subscribe(t, sub, topic), func() bool {
				return slices.ContainsFunc(connections(t, client, name), func(line string) bool {
					return strings.Contains(line, " flags=b") && strings.Contains(line, " cmd=xread")
				})
			}
		}
		requireAll := func(t *testing.T, messages <-chan *message.Message) {
			t.Helper()
			seen := make(map[string]int)
			for !(seen[ids[0]] > 0 && seen[ids[1]] > 0 && seen[ids[2]] > 0) {
				select {
				case msg := <-messages:
					seen[string(msg.Payload)]++
					require.True(t, msg.Ack())
				case <-time.After(patience / 3):
					require.FailNow(t, "messages of the new stream are skipped", "seen: %v", seen)
				}
			}
			twice := 0
			for _, id := range ids {
				twice += seen[id] - 1
			}
			if mode == "Group" {
				require.Zero(t, twice, "%v", seen)
			} else {
				require.LessOrEqual(t, twice, 1, "%v", seen)
			}
		}
		add := func(p redis.Cmdable, topic string, ids ...string) {
			for _, id := range ids {
				p.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, ID: id, Values: []string{
					goxstreams.UUIDHeaderKey, id, "payload", id,
				}})
			}
		}
		// In one step nobody can see the stream empty, or with a smaller last ID;
		// in several steps somebody may.
		remake := map[string]func(t *testing.T, client *redis.Client, topic string){
			"InOneStep": func(t *testing.T, client *redis.Client, topic string) {
				_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
					p.Del(t.Context(), topic)
					add(p, topic, ids...)
					return nil
				})
				require.NoError(t, err)
			},
			"OneByOne": func(t *testing.T, client *redis.Client, topic string) {
				_, err := client.Pipelined(t.Context(), func(p redis.Pipeliner) error {
					p.Del(t.Context(), topic)
					add(p, topic, ids...)
					return nil
				})
				require.NoError(t, err)
			},
		}
		for how, remake := range remake {
			t.Run(mode+"/Parked"+how, func(t *testing.T) {
				t.Parallel()
				client, topic, _, messages, blocked := open(t, 0)
				add(client, topic, "1000-1", "1000-2", "1000-3")
				require.Len(t, collect(messages, 3, patience), 3)
				if mode == "Group" {
					eventuallySettled(t, client, topic, testGroup)
				}
				eventually(t, blocked, "nobody reads")
				remake(t, client, topic)
				requireAll(t, messages)
				add(client, topic, "1200-1")
				require.Equal(t, []string{"1200-1"}, payloads(collect(messages, 1, patience)))
			})
			t.Run(mode+"/NoRoom"+how, func(t *testing.T) {
				t.Parallel()
				client, topic, sub, messages, blocked := open(t, 1)
				add(client, topic, "1000-1", "1000-2", "1000-3", "1000-4", "1000-5", "1000-6", "1000-7", "1000-8", "1000-9")
				held := next(t, messages)
				// There is more to read, so a subscription that reads would not be
				// blocking.
				eventually(t, func() bool { return !blocked() && stats(t, sub).InFlight > 0 })
				remake(t, client, topic)
				require.True(t, held.Ack())
				fresh := make(chan *message.Message)
				go func() { // entries that were read ahead come first
					defer close(fresh)
					for msg := range messages {
						if strings.HasPrefix(string(msg.Payload), "1000-") {
							msg.Ack()
							continue
						}
						select {
						case fresh <- msg:
						case <-msg.Context().Done():
						}
					}
				}()
				requireAll(t, fresh)
				require.NoError(t, sub.Close())
			})
		}
	}
}

// A handler had a message when its stream was deleted and recreated, and an entry
// of the new stream got the same ID: IDs set explicitly, or the same millisecond.
// The subscription mistook the entry for its own, and the old handler's Ack acked
// the new message, which nobody had seen.
//
// Now the new message is delivered, and only its own Ack acks it.
func TestFault38_NewEntryWithTheSameID(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const id = "1000-1"
	add := func(p redis.Cmdable, topic, payload string) {
		p.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, ID: id, Values: []string{
			goxstreams.UUIDHeaderKey, payload, "payload", payload,
		}})
	}
	// open returns while the old message is being handled and the new one is in the
	// stream.
	open := func(t *testing.T, concurrency int) (*redis.Client, string, *message.Message, <-chan *message.Message) {
		client, topic := newClient(t), topic(t)
		config := claiming(client)
		config.MaxConcurrency = concurrency
		messages := subscribe(t, newSubscriber(t, config), topic)
		add(client, topic, "old")
		held := next(t, messages)
		require.Equal(t, "old", string(held.Payload))
		_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
			p.Del(t.Context(), topic)
			add(p, topic, "new")
			return nil
		})
		require.NoError(t, err)
		return client, topic, held, messages
	}
	groupIsThere := func(t *testing.T, client *redis.Client, topic string) {
		t.Helper()
		eventually(t, func() bool {
			groups, err := client.XInfoGroups(context.Background(), topic).Result()
			return err == nil && len(groups) == 1
		}, "the group is not made again")
	}
	handleNew := func(t *testing.T, client *redis.Client, topic string, messages <-chan *message.Message) {
		t.Helper()
		msg := next(t, messages)
		require.Equal(t, "new", string(msg.Payload))
		require.Len(t, pendingOf(t, client, topic, testGroup), 1)
		require.NoError(t, msg.Context().Err())
		require.True(t, msg.Ack())
		eventuallySettled(t, client, topic, testGroup)
	}
	for _, concurrency := range []int{1, 2} {
		t.Run(fmt.Sprint("AckedBefore/MaxConcurrency", concurrency), func(t *testing.T) {
			t.Parallel()
			client, topic, held, messages := open(t, concurrency)
			require.True(t, held.Ack()) // before anybody can have noticed
			handleNew(t, client, topic, messages)
		})
		t.Run(fmt.Sprint("AckedAfter/MaxConcurrency", concurrency), func(t *testing.T) {
			t.Parallel()
			client, topic, held, messages := open(t, concurrency)
			groupIsThere(t, client, topic)
			require.True(t, held.Ack())
			handleNew(t, client, topic, messages)
		})
		t.Run(fmt.Sprint("Nacked/MaxConcurrency", concurrency), func(t *testing.T) {
			t.Parallel()
			client, topic, held, messages := open(t, concurrency)
			groupIsThere(t, client, topic)
			require.True(t, held.Nack()) // the old stream no longer exists
			msg := next(t, messages)
			require.Equal(t, "new", string(msg.Payload))
			require.EqualValues(t, 1, delivery(t, msg).Count, "the old one's delivery is counted to the new one")
			require.True(t, msg.Ack())
			eventuallySettled(t, client, topic, testGroup)
		})
	}
	// One subscription handles both, with the same ID.
	t.Run("Together", func(t *testing.T) {
		t.Parallel()
		client, topic, held, messages := open(t, 2)
		msg := next(t, messages)
		require.Equal(t, "new", string(msg.Payload))
		require.True(t, held.Ack())
		// The ack of a later message has arrived: this one's would have arrived,
		// too.
		publish(t, client, topic, "later")
		require.Equal(t, []string{"later"}, payloads(collect(messages, 1, patience)))
		eventually(t, func() bool { return len(pendingOf(t, client, topic, testGroup)) <= 1 })
		rows := pendingOf(t, client, topic, testGroup)
		require.Len(t, rows, 1, "the old message's Ack has acked the new one")
		require.Equal(t, id, rows[0].ID)
		require.NoError(t, msg.Context().Err())
		require.True(t, msg.Ack())
		eventuallySettled(t, client, topic, testGroup)
	})
}

// MaxConcurrency is a limit, not a number of goroutines: with a million, the end of
// one suspect's turn made the subscription start a goroutine for each possible
// slot, 468,000 of them with 1.2 GB, to handle nothing.
//
// Now goroutines are started only for existing work.
//
// [Not parallel: it counts goroutines.]
func TestFault43_GoroutinesForWorkOnly(t *testing.T) {
	testserver.RequireReal(t)
	const live = 20
	allowed := func(before int) int { return before + 10*live + 200 }
	open := func(t *testing.T) (*redis.Client, string, goxstreams.SubscriberConfig) {
		client, topic := newClient(t), topic(t)
		crashed(t, client, topic, 5)
		config := grouped(client)
		config.MaxConcurrency = 1_000_000
		config.ClaimMinIdle = 300 * time.Millisecond
		config.Retry = &goxstreams.Retry{MaxRetries: 10}
		return client, topic, config
	}
	// The suspect runs, and others follow.
	t.Run("Handled", func(t *testing.T) {
		client, topic, config := open(t)
		before := runtime.NumGoroutine()
		peak := goroutines(t)
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		require.Equal(t, []string{"x"}, payloads(collect(messages, 1, patience)))
		eventuallySettled(t, client, topic, testGroup)
		publishN(t, client, topic, live)
		require.Len(t, collect(messages, live, patience), live)
		eventuallySettled(t, client, topic, testGroup)
		require.Less(t, peak(), allowed(before), "goroutines")
	})
	// A slow handler keeps the suspect waiting until it is put off.
	t.Run("PutOff", func(t *testing.T) {
		client, topic, config := open(t)
		log := newLogRecorder()
		putOff := func() bool { return strings.Contains(strings.Join(log.Infos(), "\n"), "suspected") }
		publish(t, client, topic, "slow")
		before := runtime.NumGoroutine()
		peak := goroutines(t)
		sub := newSubscriberLog(t, config, log)
		messages := subscribe(t, sub, topic)
		slow := next(t, messages)
		for string(slow.Payload) != "slow" { // the suspect came first
			slow.Ack()
			slow = next(t, messages)
		}
		// Time to be found idle twice, to wait, and to be put off, if that happens.
		deadline := time.Now().Add(4 * config.ClaimMinIdle)
		eventually(t, func() bool { return putOff() || time.Now().After(deadline) })
		publishN(t, client, topic, live)
		slow.Ack()
		eventuallyAll(t, func() int { collect(messages, 1, 100*time.Millisecond); return int(stats(t, sub).Acked) }, live+2)
		eventuallySettled(t, client, topic, testGroup)
		require.Less(t, peak(), allowed(before), "goroutines")
	})
}

// goroutines counts goroutines until its result is called, which returns the
// maximum.
func goroutines(t *testing.T) (peak func() int) {
	var most atomic.Int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			most.Store(max(most.Load(), int64(runtime.NumGoroutine())))
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	end := sync.OnceFunc(func() { close(stop); <-done })
	t.Cleanup(end)
	return func() int { end(); return int(most.Load()) }
}

// Each look at the group listed all groups of the topic. A thousand forgotten
// groups, in a topic with many Subscribers, took a fifth of the server's time and
// half of theirs while nothing happened.
//
// Now a look costs the same however many groups there are.
//
// [Not parallel to other tests: it measures the cost of a period of time. The
// server itself counts the time of its commands and the bytes of its replies.]
func TestFault44_IdleCostDoesNotGrowWithGroups(t *testing.T) {
	const groups, subscribers = 1000, 20
	// start returns a function that measures the costs of the next second and a half,
	// some 15 looks of each Subscriber.
	start := func(t *testing.T, groups int) (next func() (busy time.Duration, bytes int64)) {
		server, topic := testserver.Private(t), topic(t)
		admin := server.Client()
		_, err := admin.Pipelined(t.Context(), func(p redis.Pipeliner) error {
			for i := range groups {
				p.XGroupCreateMkStream(context.Background(), topic, fmt.Sprintf("a-group-that-somebody-left-%d", i), "0")
			}
			return nil
		})
		require.NoError(t, err)
		for range subscribers {
			config := grouped(server.Client())
			config.ClaimInterval = 100 * time.Millisecond
			sub := newSubscriber(t, config)
			subscribe(t, sub, topic)
			t.Cleanup(func() { _ = sub.Close() })
		}
		eventually(t, func() bool { return blocked(t, admin) == subscribers })
		return func() (time.Duration, int64) {
			require.NoError(t, admin.ConfigResetStat(t.Context()).Err())
			start := time.Now()
			time.Sleep(1500 * time.Millisecond)
			busy, bytes := commandTime(t, admin), infoNumber(t, admin, "total_net_output_bytes")
			took := time.Since(start).Seconds()
			return time.Duration(float64(busy) / took), int64(float64(bytes) / took)
		}
	}
	one, many := start(t, 0), start(t, groups)
	// A server counts time in which it waits for the machine, too: what is dear is dear
	// each time, and what a busy machine makes dear is not. The slack is a hundredth of
	// the server's time, and of the cost of a look.
	for attempt := 1; ; attempt++ {
		busy, bytes := one()
		busyMany, bytesMany := many()
		t.Logf("a second's commands of %d idle Subscribers: %v and %d bytes with one group, %v and %d bytes with %d", subscribers, busy, bytes, busyMany, bytesMany, groups+1)
		if busyMany < 3*busy+10*time.Millisecond && bytesMany < 3*bytes+100_000 {
			return
		}
		require.Less(t, attempt, 10, "idle Subscribers cost more with many groups")
	}
}

// commandTime returns the time that the server has spent in commands, from INFO.
func commandTime(t *testing.T, client *redis.Client) time.Duration {
	t.Helper()
	info, err := client.Info(context.Background(), "commandstats").Result()
	require.NoError(t, err)
	var sum time.Duration
	for line := range strings.Lines(info) {
		name, rest, ok := strings.Cut(line, ",usec=")
		if !ok || strings.Contains(name, "cmdstat_client|list") || strings.Contains(name, "cmdstat_info") {
			continue
		}
		usec, _, _ := strings.Cut(rest, ",")
		n, err := strconv.ParseInt(usec, 10, 64)
		require.NoError(t, err, "%s", line)
		sum += time.Duration(n) * time.Microsecond
	}
	return sum
}

// infoNumber returns a number from the server's INFO stats.
func infoNumber(t *testing.T, client *redis.Client, name string) int64 {
	t.Helper()
	info, err := client.Info(context.Background(), "stats").Result()
	require.NoError(t, err)
	_, rest, ok := strings.Cut(info, name+":")
	require.True(t, ok, "INFO has no %s", name)
	value, _, _ := strings.Cut(rest, "\r\n")
	n, err := strconv.ParseInt(value, 10, 64)
	require.NoError(t, err)
	return n
}

// The counters were wrong in three places: an entry that was trimmed while a
// subscription with DeleteAcked handled it counted as another consumer's; with
// NoAck, a message that was on offer at Close was lost without being counted; and a
// subscription's own entries that it found after a broken connection counted as
// taken over from others: 3,654, with one Subscriber.
//
// Now Lost counts lost messages, whoever loses them, and Claimed counts the entries
// of other consumers.
func TestFault45_CountsAreTrue(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)

	// trimmed returns a DeleteAcked subscription that has a message.
	trimmed := func(t *testing.T, retry *goxstreams.Retry) (*redis.Client, string, *goxstreams.Subscriber, logRecorder, *message.Message) {
		client, topic, log := newClient(t), topic(t), newLogRecorder()
		config := claiming(client)
		config.DeleteAcked, config.Retry = true, retry
		sub := newSubscriberLog(t, config, log)
		messages := subscribe(t, sub, topic)
		publish(t, client, topic, "x")
		return client, topic, sub, log, next(t, messages)
	}
	requireLost := func(t *testing.T, client *redis.Client, topic string, sub *goxstreams.Subscriber, log logRecorder) {
		t.Helper()
		elsewhere := func() bool {
			return slices.ContainsFunc(log.Infos(), func(l string) bool { return strings.Contains(l, "another consumer") })
		}
		eventually(t, func() bool { return elsewhere() || stats(t, sub).Lost > 0 }, "nobody notices")
		require.False(t, elsewhere(), "%s", log.Infos())
		require.EqualValues(t, 1, stats(t, sub).Lost)
		eventuallySettled(t, client, topic, testGroup)
	}
	t.Run("DeleteAcked/TrimmedWhileHandled", func(t *testing.T) {
		t.Parallel()
		client, topic, sub, log, msg := trimmed(t, nil)
		require.NoError(t, client.XTrimMaxLen(t.Context(), topic, 0).Err())
		requireLost(t, client, topic, sub, log)
		require.NoError(t, msg.Context().Err(), "nobody else can have it")
		require.True(t, msg.Ack())
		eventually(t, func() bool { return stats(t, sub).Acked == 1 && stats(t, sub).InFlight == 0 })
		require.EqualValues(t, 1, stats(t, sub).Lost)
	})
	t.Run("DeleteAcked/TrimmedWhileWaiting", func(t *testing.T) {
		t.Parallel()
		client, topic, sub, log, msg := trimmed(t, &goxstreams.Retry{InitialInterval: time.Hour, MaxInterval: time.Hour})
		require.True(t, msg.Nack())
		eventuallyWaits(t, sub)
		require.NoError(t, client.XTrimMaxLen(t.Context(), topic, 0).Err())
		requireLost(t, client, topic, sub, log)
	})
	t.Run("DeleteAcked/TrimmedAndDead", func(t *testing.T) {
		t.Parallel()
		client, topic, sub, log, msg := trimmed(t, &goxstreams.Retry{MaxRetries: -1})
		require.NoError(t, client.XTrimMaxLen(t.Context(), topic, 0).Err())
		require.True(t, msg.Nack())
		requireLost(t, client, topic, sub, log)
	})
	// A case that must look different: another consumer took the entry over, acked
	// it, and deleted it. That is not a loss.
	t.Run("DeleteAcked/SettledElsewhere", func(t *testing.T) {
		t.Parallel()
		client, topic, sub, log, msg := trimmed(t, nil)
		id := delivery(t, msg).ID
		claimAs(t, client, topic, "other", id)
		_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
			p.XAck(t.Context(), topic, testGroup, id)
			p.XDel(t.Context(), topic, id)
			return nil
		})
		require.NoError(t, err)
		leaseLost(t, msg)
		msg.Ack()
		eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
		require.Zero(t, stats(t, sub).Lost)
		require.Empty(t, log.Errors())
	})

	for _, concurrency := range []int{1, 2} {
		t.Run(fmt.Sprint("NoAck/OnOfferAtClose/MaxConcurrency", concurrency), func(t *testing.T) {
			t.Parallel()
			const n = 3
			client, topic := newClient(t), topic(t)
			log := &lostWatcher{logRecorder: newLogRecorder()}
			config := grouped(client)
			config.NoAck, config.MaxConcurrency, config.CloseTimeout = true, concurrency, 400*time.Millisecond
			sub := newSubscriberLog(t, config, log)
			log.sub.Store(sub)
			subscribe(t, sub, topic) // nobody receives
			publishN(t, client, topic, n)
			// Messages on offer; the others are read ahead, or in the stream.
			eventually(t, func() bool { return stats(t, sub).Delivered == int64(concurrency) })
			require.NoError(t, sub.Close())
			left := 0 // unread
			if streams, err := client.XReadGroup(context.Background(), &redis.XReadGroupArgs{
				Group: testGroup, Consumer: "rest", Streams: []string{topic, ">"}, Block: -1, NoAck: true,
			}).Result(); !errors.Is(err, redis.Nil) {
				require.NoError(t, err)
				left = len(streams[0].Messages)
			}
			require.Positive(t, n-left)
			require.EqualValues(t, n-left, log.lost.Load(), "Lost, when the last message was logged as lost: %s", log.Errors())
		})
	}

	t.Run("ConnectionsCut", func(t *testing.T) {
		t.Parallel()
		const n, left = 5000, 5
		server := testserver.Private(t)
		admin, topic := server.Client(), topic(t)
		createGroup(t, admin, topic, testGroup)
		publishN(t, admin, topic, n)
		config := grouped(server.Client())
		config.MaxConcurrency, config.BatchSize, config.ClaimMinIdle = 10, 20, time.Second
		sub := newSubscriber(t, config)
		messages := subscribe(t, sub, topic)
		handled := newTally()
		handled.handle(messages, nil)
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
					admin.ClientKillByFilter(context.Background(), "TYPE", "normal", "SKIPME", "yes")
				}
			}
		}()
		end := time.Now().Add(3 * time.Second)
		eventually(t, func() bool { return time.Now().After(end) || handled.len() == n || stats(t, sub).Claimed > 0 })
		close(stop)
		<-done
		eventuallyAll(t, handled.len, n)
		eventuallySettled(t, admin, topic, testGroup)
		require.Zero(t, stats(t, sub).Claimed, "nobody else was there to claim from")

		for range left {
			addPending(t, admin, topic, "died", "left")
		}
		eventuallyAll(t, handled.len, n+left)
		require.EqualValues(t, left, stats(t, sub).Claimed, "what others left")
	})
}

// lostWatcher remembers what Stats report of lost messages when one is logged:
// after Close they report nothing.
type lostWatcher struct {
	logRecorder
	sub  atomic.Pointer[goxstreams.Subscriber]
	lost atomic.Int64
}

func (l *lostWatcher) Error(msg string, err error, fields watermill.LogFields) {
	l.logRecorder.Error(msg, err, fields)
	for _, s := range l.sub.Load().Stats() {
		l.lost.Store(max(l.lost.Load(), s.Lost))
	}
}

// A fan-out reads a stream from which a group deletes acked entries. Redis did not
// know that the fan-out had not read so far: entries that the group acked first
// were gone. Of 2,000 messages the fan-out received 132, without any report.
//
// Now entries are deleted when the group has acked them and the fan-outs have read
// them. At the end the stream is still empty.
func TestFault49_FanOutBesideDeleteAcked(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	const n = 500
	emptied := func(t *testing.T, client *redis.Client, topic string) {
		t.Helper()
		eventually(t, func() bool { return client.XLen(context.Background(), topic).Val() == 0 }, "acked entries stay in the stream")
	}
	for _, tt := range []struct {
		name       string
		ownClients bool
		fail       bool // the group's messages die, and so leave the topic
		late       bool // the fan-out starts after the group
	}{
		{name: "OneClient"},
		{name: "TwoClients", ownClients: true},
		{name: "FanOutComesLater", late: true},
		{name: "DeadLettered", fail: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			other := client
			if tt.ownClients {
				other = newClient(t)
			}
			config := deleting(client, testGroup)
			config.MaxConcurrency, config.Retry = 10, nil
			handle := func(*message.Message) error { return nil }
			if tt.fail {
				config.Retry = &goxstreams.Retry{MaxRetries: -1}
				handle = func(*message.Message) error { return errFails }
			}
			group, fanOut := newSubscriber(t, config), newSubscriber(t, goxstreams.SubscriberConfig{Client: other})
			seen := newTally()
			var wg sync.WaitGroup
			listen := func() {
				messages := subscribe(t, fanOut, topic)
				wg.Go(func() {
					for msg := range messages {
						time.Sleep(2 * time.Millisecond) // the handler's work
						seen.add(msg)
						msg.Ack()
					}
				})
			}
			if !tt.late {
				listen()
			}
			plainly(t, group, topic, handle)
			if tt.late {
				listen()
			}
			want := publishN(t, client, topic, n)
			eventually(t, func() bool { s := stats(t, group); return s.Acked+s.Dead == n })
			deadline := time.Now().Add(patience / 3)
			eventually(t, func() bool { return seen.len() == n || time.Now().After(deadline) })
			require.Equal(t, n, seen.len(), "messages that the fan-out got")
			require.True(t, seen.has(want))
			emptied(t, client, topic)
			require.NoError(t, fanOut.Close())
			wg.Wait()
		})
	}
	// Nobody waits for a closed fan-out.
	t.Run("FanOutCloses", func(t *testing.T) {
		t.Parallel()
		client, topic := newClient(t), topic(t)
		config := deleting(client, testGroup)
		config.MaxConcurrency, config.Retry = 10, nil
		group, fanOut := newSubscriber(t, config), newSubscriber(t, goxstreams.SubscriberConfig{Client: client})
		messages := subscribe(t, fanOut, topic)
		plainly(t, group, topic, func(*message.Message) error { return nil })
		publishN(t, client, topic, n)
		require.Len(t, collect(messages, 10, patience), 10)
		eventually(t, func() bool { return stats(t, group).Acked == n })
		require.NoError(t, fanOut.Close())
		emptied(t, client, topic)
	})
}

// A consumer died, and its entries were trimmed before another one looked. Each of
// these entries took a slot, four round trips and a log line: 50,000 of them
// delayed the topic's next message by 11 s, with as many log lines.
//
// Now they are acked many at a time, beside the other work, and one line reports
// their number.
func TestFault52_ManyTrimmedEntries(t *testing.T) {
	t.Parallel()
	const n = 20_000
	const maxLines = 10
	// left returns a topic with entries that a dead consumer left.
	left := func(t *testing.T, n int) (*redis.Client, string, []string) {
		client, topic := testserver.Private(t).Client(), topic(t)
		createGroup(t, client, topic, testGroup)
		publishN(t, client, topic, n)
		return client, topic, readAs(t, client, topic, testGroup, "died", n)
	}
	open := func(t *testing.T, client *redis.Client) (*goxstreams.Subscriber, logRecorder) {
		log := newLogRecorder()
		config := grouped(client)
		config.ClaimMinIdle = 300 * time.Millisecond
		return newSubscriberLog(t, config, log), log
	}
	settled := func(client *redis.Client, topic string) bool {
		pending, err := client.XPending(context.Background(), topic, testGroup).Result()
		return err == nil && pending.Count == 0
	}
	requireTold := func(t *testing.T, sub *goxstreams.Subscriber, log logRecorder, lost int) {
		t.Helper()
		eventually(t, func() bool { return stats(t, sub).Lost >= int64(lost) && len(log.Errors()) > 0 }, "nobody says what is lost")
		require.EqualValues(t, lost, stats(t, sub).Lost)
		lines := log.Errors()
		require.LessOrEqual(t, len(lines), maxLines, "lines in the log, the first: %s", lines[0])
		if len(lines) == 1 {
			require.Contains(t, lines[0], fmt.Sprint(lost), "the line does not tell how many are lost")
		}
	}
	t.Run("All", func(t *testing.T) {
		t.Parallel()
		client, topic, _ := left(t, n)
		require.NoError(t, client.XTrimMaxLen(t.Context(), topic, 0).Err())
		sub, log := open(t, client)
		messages := subscribe(t, sub, topic)
		// Live messages one after the other, while the lost ones are found.
		var worst time.Duration
		for deadline := time.Now().Add(patience); !settled(client, topic); {
			require.True(t, time.Now().Before(deadline), "%d of %d", stats(t, sub).Lost, n)
			start := time.Now()
			publish(t, client, topic, "live")
			next(t, messages).Ack()
			worst = max(worst, time.Since(start))
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
		}
		t.Logf("the slowest live message took %v", worst)
		assert.Less(t, worst, time.Second, "a live message waits for those that are lost")
		requireTold(t, sub, log, n)
	})
	t.Run("EverySecond", func(t *testing.T) {
		t.Parallel()
		const n = 2_000
		client, topic, ids := left(t, n)
		var gone []string
		for i := 0; i < n; i += 2 {
			gone = append(gone, ids[i])
		}
		require.NoError(t, client.XDel(t.Context(), topic, gone...).Err())
		sub, log := open(t, client)
		require.Len(t, collect(subscribe(t, sub, topic), n/2, patience), n/2)
		eventually(t, func() bool { return settled(client, topic) })
		assert.EqualValues(t, n/2, stats(t, sub).Claimed)
		requireTold(t, sub, log, n/2)
	})
	// The same for the consumer's own entries that wait for retries.
	t.Run("OwnWaiting", func(t *testing.T) {
		t.Parallel()
		const n = 1_000
		client, topic := testserver.Private(t).Client(), topic(t)
		log := newLogRecorder()
		config := grouped(client)
		config.ClaimMinIdle, config.MaxConcurrency = 2*time.Second, 10
		config.Retry = &goxstreams.Retry{InitialInterval: time.Hour, MaxInterval: time.Hour}
		sub := newSubscriberLog(t, config, log)
		messages := subscribe(t, sub, topic)
		publishN(t, client, topic, n)
		for range n {
			next(t, messages).Nack()
		}
		eventually(t, func() bool { return stats(t, sub).Waiting == n })
		require.NoError(t, client.XTrimMaxLen(t.Context(), topic, 0).Err())
		eventually(t, func() bool { return settled(client, topic) })
		requireTold(t, sub, log, n)
	})
}

// restored resets a stream, with its groups, to the dump, and adds to it, in one
// step: like a failover to a replica that lacks the last entries.
func restored(t *testing.T, client *redis.Client, topic, dump string, then func(redis.Pipeliner)) {
	t.Helper()
	_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
		p.RestoreReplace(t.Context(), topic, 0, dump)
		then(p)
		return nil
	})
	require.NoError(t, err)
}

func addWithID(p redis.Cmdable, topic string, ids ...string) {
	for _, id := range ids {
		p.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, ID: id, Values: []string{goxstreams.UUIDHeaderKey, id, "payload", id}})
	}
}

// handledBy acks and collects the payloads that arrive until enough returns true.
func handledBy(t *testing.T, messages <-chan *message.Message, enough func(map[string]int) bool) map[string]int {
	t.Helper()
	seen := make(map[string]int)
	for !enough(seen) {
		select {
		case msg := <-messages:
			seen[string(msg.Payload)]++
			msg.Ack()
		case <-time.After(patience / 2):
			require.FailNow(t, "messages are missing", "seen: %v", seen)
		}
	}
	return seen
}

// eventuallyLooked waits until the topic's only fan-out has looked at its stream
// after it had read the entry, and has reported that position.
func eventuallyLooked(t *testing.T, client *redis.Client, topic, id string) {
	t.Helper()
	eventually(t, func() bool {
		for _, position := range client.HGetAll(context.Background(), topic+".fanout{"+topic+"}").Val() {
			if strings.HasPrefix(position, id+" ") {
				return true
			}
		}
		return false
	}, "nobody has looked after %s", id)
}

func stillFor(t *testing.T, messages <-chan *message.Message, d time.Duration) {
	t.Helper()
	select {
	case msg := <-messages:
		require.FailNow(t, "a message came again", string(msg.Payload))
	case <-time.After(d):
	}
}

// A failover loses the last entries. A fan-out mistook that for a recreated stream,
// and reread all of it; had it continued at its position, it would have skipped the
// entries that the new master added below.
func TestFanOut_TailLost(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, below := range []string{"1000-4", "1000-9"} {
		t.Run(below, func(t *testing.T) {
			t.Parallel()
			client, topic := newClient(t), topic(t)
			messages := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), topic)
			addWithID(client, topic, "1000-1", "1000-2", "1000-3")
			handledBy(t, messages, func(seen map[string]int) bool { return len(seen) == 3 })
			eventuallyLooked(t, client, topic, "1000-3")
			dump := client.Dump(t.Context(), topic).Val()
			addWithID(client, topic, "1000-5", "1000-6")
			handledBy(t, messages, func(seen map[string]int) bool { return len(seen) == 2 })
			eventuallyLooked(t, client, topic, "1000-6")
			restored(t, client, topic, dump, func(p redis.Pipeliner) { addWithID(p, topic, below) })
			seen := handledBy(t, messages, func(seen map[string]int) bool { return seen[below] > 0 })
			require.Equal(t, map[string]int{below: 1}, seen)
			addWithID(client, topic, "1001-1")
			handledBy(t, messages, func(seen map[string]int) bool { return seen["1001-1"] > 0 })
			stillFor(t, messages, 3*time.Second)
		})
	}
}

// A stream that is recreated several times, with the same IDs and other messages,
// is read from its start each time, and each entry once or, around the change,
// twice.
func TestFanOut_BeginsAnewAgain(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	messages := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), topic)
	for round := range 4 {
		_, err := client.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
			p.Del(t.Context(), topic)
			for i := range 10 - round {
				p.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, ID: fmt.Sprintf("1000-%d", i+1), Values: []string{
					goxstreams.UUIDHeaderKey, watermill.NewUUID(), "payload", fmt.Sprint(round, ".", i),
				}})
			}
			return nil
		})
		require.NoError(t, err)
		for payload, times := range handledBy(t, messages, func(seen map[string]int) bool { return len(seen) == 10-round }) {
			require.True(t, strings.HasPrefix(payload, fmt.Sprint(round, ".")), "%s in round %d", payload, round)
			require.LessOrEqual(t, times, 2, payload)
		}
		eventuallyLooked(t, client, topic, fmt.Sprintf("1000-%d", 10-round))
	}
	stillFor(t, messages, 3*time.Second)
}

// XTRIM ... ACKED leaves no trace except the missing entries.
func TestFanOut_AckedEntriesAreTrimmed(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	log := newLogRecorder()
	messages := subscribe(t, newSubscriberLog(t, goxstreams.SubscriberConfig{Client: client}, log), topic)
	createGroup(t, client, topic, testGroup)
	for round := range 4 {
		addWithID(client, topic, fmt.Sprintf("1000-%d", 2*round+1), fmt.Sprintf("1000-%d", 2*round+2))
		handledBy(t, messages, func(seen map[string]int) bool { return len(seen) == 2 })
		eventuallyLooked(t, client, topic, fmt.Sprintf("1000-%d", 2*round+2))
		for _, id := range readAs(t, client, topic, testGroup, "other", 2) {
			require.NoError(t, client.XAck(t.Context(), topic, testGroup, id).Err())
		}
		if err := client.Do(t.Context(), "XTRIM", topic, "MAXLEN", "=", 0, "ACKED").Err(); err != nil {
			require.ErrorContains(t, err, "syntax error") // before Redis 8.2
			require.NoError(t, client.XTrimMaxLen(t.Context(), topic, 0).Err())
		}
	}
	stillFor(t, messages, 2*time.Second)
	require.Empty(t, log.Errors())
}

// A failover has lost the last entries and the recently created group: the existing
// entries are delivered, and messages that are being handled can still be acked.
func TestGroup_TailLost(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	client, topic := newClient(t), topic(t)
	messages := subscribe(t, newSubscriber(t, claiming(client)), topic)
	addWithID(client, topic, "1000-1", "1000-2")
	held := next(t, messages)
	require.Equal(t, "1000-1", string(held.Payload))
	dump := client.Dump(t.Context(), topic).Val()
	addWithID(client, topic, "1000-5")
	require.True(t, held.Ack())
	msg := next(t, messages)
	require.True(t, msg.Ack())
	inHand := next(t, messages)
	require.Equal(t, "1000-5", string(inHand.Payload))
	restored(t, client, topic, dump, func(p redis.Pipeliner) {
		p.XGroupDestroy(t.Context(), topic, testGroup)
		addWithID(p, topic, "1000-3")
	})
	// With MaxConcurrency 1 it continues when the current message is settled.
	go func() {
		<-time.After(time.Second)
		inHand.Ack()
	}()
	handledBy(t, messages, func(seen map[string]int) bool { return seen["1000-3"] > 0 })
	addWithID(client, topic, "1000-9")
	handledBy(t, messages, func(seen map[string]int) bool { return seen["1000-9"] > 0 })
	eventuallySettled(t, client, topic, testGroup)
}

// watermill-redisstream checks which consumers are idle and have nothing pending,
// and then deletes them. Entries that such a consumer reads in between are lost:
// deleting a consumer drops its pending entries for good.
func TestFault16_ConsumerRemovalLosesMessages(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	admin := newClient(t)
	topic := topic(t)
	createGroup(t, admin, topic, testGroup)
	ctx := context.Background()
	for _, idler := range []string{"idler", "returns"} {
		require.NoError(t, admin.XGroupCreateConsumer(ctx, topic, testGroup, idler).Err())
	}
	// Right before the library deletes consumers by any means, the idle one reads a
	// message. It does so in one step with the XADD, so that nobody else gets it.
	var read atomic.Bool
	client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if strings.Contains(strings.ToLower(fmt.Sprint(cmd.Args())), "delconsumer") && !read.Swap(true) {
			addPending(t, admin, topic, "returns", "precious")
		}
		return next()
	}})
	config := grouped(client)
	config.ClaimMinIdle = time.Second
	config.ConsumerTimeout = 50 * time.Millisecond
	messages := subscribe(t, newSubscriber(t, config), topic)

	got := next(t, messages)
	require.Equal(t, "precious", string(got.Payload))
	require.EqualValues(t, 2, delivery(t, got).Count)
	got.Ack()
	eventuallySettled(t, admin, topic, testGroup)
	// The removal itself works: now that nothing is pending, both names go.
	eventually(t, func() bool {
		consumers, err := admin.XInfoConsumers(ctx, topic, testGroup).Result()
		require.NoError(t, err)
		for _, c := range consumers {
			if c.Name == "idler" || c.Name == "returns" {
				return false
			}
		}
		return true
	}, "idle consumers are not removed")
}

type contextKey struct{}

// watermill-redisstream resends a copy of a nacked message. The copy has lost its
// context, with its values and cancellation, and keeps the handler's changes of the
// metadata.
//
// Here each delivery is made from the entry again.
func TestFault05_RedeliveryIsAFreshMessage(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name        string
		group       string
		concurrency int
	}{{"GroupOrdered", testGroup, 1}, {"GroupConcurrent", testGroup, 2}, {"FanOut", "", 1}} {
		t.Run(tt.name, func(t *testing.T) {
			client := newClient(t)
			topic := topic(t)
			config := goxstreams.SubscriberConfig{Client: client, ConsumerGroup: tt.group, MaxConcurrency: tt.concurrency}
			if tt.group != "" {
				config.Retry = quickRetry()
			}
			sub := newSubscriber(t, config)
			messages, err := sub.Subscribe(context.WithValue(context.Background(), contextKey{}, "value"), topic)
			require.NoError(t, err)
			sent := message.NewMessage("uuid", message.Payload("payload"))
			sent.Metadata.Set("key", "value")
			require.NoError(t, newPublisher(t, client).Publish(topic, sent))

			for n := int64(1); n <= 3; n++ {
				msg := next(t, messages)
				require.Equal(t, "uuid", msg.UUID)
				require.Equal(t, "payload", string(msg.Payload))
				require.Equal(t, message.Metadata{"key": "value"}, msg.Metadata)
				require.Equal(t, "value", msg.Context().Value(contextKey{}))
				require.Equal(t, n, delivery(t, msg).Count)
				require.NoError(t, msg.Context().Err())

				msg.Metadata.Set("key", "changed")
				msg.Metadata.Set("more", "added")
				copy(msg.Payload, "changed")
				if n < 3 {
					require.True(t, msg.Nack())
				} else {
					require.True(t, msg.Ack())
				}
				eventually(t, func() bool { return msg.Context().Err() != nil }, "the context outlives the delivery")
			}
		})
	}
}

// watermill-redisstream: in a fan-out the first read asks for "$", the entries
// after the moment at which the server receives it. Messages published between
// Subscribe's return and that moment were lost: 10 of 20.
//
// Here that moment is delayed until the message exists.
func TestFault12_FanOutLosesNothingAfterSubscribe(t *testing.T) {
	t.Parallel()
	for _, old := range []int{0, 3} {
		t.Run(fmt.Sprint("OldEntries", old), func(t *testing.T) {
			published := make(chan struct{})
			client := newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, run func() error) error {
				if cmd.Name() == "xread" {
					<-published
				}
				return run()
			}})
			topic := topic(t)
			publishN(t, client, topic, old)
			one := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), topic)
			two := subscribe(t, newSubscriber(t, goxstreams.SubscriberConfig{Client: client}), topic)
			sent := publish(t, client, topic, "a", "b", "c")
			close(published)
			require.Equal(t, sent, uuids(collect(one, 3, patience)))
			require.Equal(t, sent, uuids(collect(two, 3, patience)))
		})
	}
}

// TestLostReplies: commands run, but their replies are lost.
func TestLostReplies(t *testing.T) {
	t.Parallel()
	for name, consumer := range map[string]string{"GeneratedName": "", "GivenName": "given"} {
		t.Run("XREADGROUP/"+name, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			hook, lost := loseReply(1, isCommand("xreadgroup"))
			config := grouped(newClient(t, hook))
			config.Consumer = consumer
			config.ClaimMinIdle = 5 * time.Minute // the reader finds it by itself
			messages := subscribe(t, newSubscriber(t, config), topic)
			publish(t, client, topic, "")
			msg := next(t, messages)
			assert.EqualValues(t, 1, lost.Load())
			assert.EqualValues(t, 1, delivery(t, msg).Count, "nobody has seen it before")
			msg.Ack()
			eventuallySettled(t, client, topic, testGroup)
		})
	}
	// Found by internal/chaos (-one-by-one -seed 7, cut-before-reply): an entry
	// whose read lost its reply keeps its place. If the claim of it, or the look
	// before, lost its reply too, its successors came first.
	t.Run("XREADGROUP/InOrder", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		createGroup(t, client, topic, testGroup)
		uuids := publishN(t, client, topic, 3)
		read, lost := loseReply(1, isCommand("xreadgroup"))
		claimed, lostToo := loseReply(1, isClaim)
		config := grouped(newClient(t, read, claimed))
		config.ClaimMinIdle = 5 * time.Minute
		config.Retry = quickRetry()
		messages := subscribe(t, newSubscriber(t, config), topic)
		for _, uuid := range uuids {
			msg := next(t, messages)
			assert.Equal(t, uuid, msg.UUID)
			assert.EqualValues(t, 1, delivery(t, msg).Count, "nobody has seen it before")
			msg.Ack()
		}
		assert.EqualValues(t, 1, lost.Load())
		assert.EqualValues(t, 1, lostToo.Load())
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("XCLAIM/Takeover", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		publish(t, client, topic, "")
		createGroup(t, client, topic, testGroup)
		readAs(t, client, topic, testGroup, "dead", 1)
		began := time.Now()
		hook, lost := loseReply(1, isClaim)
		messages := subscribe(t, newSubscriber(t, claiming(newClient(t, hook))), topic)
		msg := next(t, messages)
		assert.LessOrEqual(t, time.Since(began), claimTime+2*claimInterval+slack)
		assert.EqualValues(t, 1, lost.Load())
		assert.EqualValues(t, 2, delivery(t, msg).Count, "the lost claim reached nobody")
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	for _, concurrency := range []int{1, 4} {
		t.Run(fmt.Sprintf("XCLAIM/Retry/MaxConcurrency=%d", concurrency), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			hook, lost := loseReply(1, isClaim)
			config := grouped(newClient(t, hook))
			config.MaxConcurrency = concurrency
			config.Retry = quickRetry()
			messages := subscribe(t, newSubscriber(t, config), topic)
			publish(t, client, topic, "")
			for count := range int64(4) {
				msg := next(t, messages)
				assert.Equal(t, count+1, delivery(t, msg).Count)
				assert.Equal(t, count+1, pendingOf(t, client, topic, testGroup)[0].RetryCount)
				if count < 3 {
					msg.Nack()
				} else {
					msg.Ack()
				}
			}
			assert.EqualValues(t, 1, lost.Load())
			eventuallySettled(t, client, topic, testGroup)
		})
	}
	t.Run("XCLAIM/Renewal", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isRenewal)
		messages := subscribe(t, newSubscriber(t, claiming(newClient(t, hook))), topic)
		publish(t, client, topic, "")
		msg := next(t, messages)
		rival := newSubscriber(t, claiming(newClient(t)))
		subscribe(t, rival, topic)
		eventually(t, func() bool { return lost.Load() == 1 })
		during(t, claimTime+minIdle/3, func() bool { return msg.Context().Err() == nil && stats(t, rival).Claimed == 0 },
			"the lease is lost, though it was renewed")
		assert.EqualValues(t, 1, pendingOf(t, client, topic, testGroup)[0].RetryCount)
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("XCLAIM/Release", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isRelease)
		config := grouped(newClient(t, hook))
		config.ClaimMinIdle = 5 * time.Minute
		sub := newSubscriber(t, config)
		subscribe(t, sub, topic) // nobody receives what it offers
		publish(t, client, topic, "")
		eventually(t, func() bool { return stats(t, sub).InFlight == 1 })
		require.NoError(t, sub.Close())
		require.EqualValues(t, 1, lost.Load())
		config.Client = newClient(t)
		msg := next(t, subscribe(t, newSubscriber(t, config), topic))
		assert.EqualValues(t, 1, delivery(t, msg).Count)
		msg.Ack()
		eventuallySettled(t, client, topic, testGroup)
	})
	t.Run("XACK", func(t *testing.T) {
		t.Parallel()
		testserver.RequireReal(t)
		topic, client := topic(t), newClient(t)
		hook, lost := loseReply(1, isCommand("xack"))
		sub := newSubscriber(t, claiming(newClient(t, hook)))
		handled := newTally()
		handled.handle(subscribe(t, sub, topic), nil)
		uuids := publishN(t, client, topic, 20)
		eventually(t, func() bool { return handled.has(uuids) && lost.Load() == 1 })
		eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "acks that never end")
		require.NoError(t, sub.Close())
		assert.Empty(t, pendingOf(t, client, topic, testGroup))
		assert.Equal(t, map[int64]int{1: 20}, handled.counts)
	})
	for name, retryIn := range map[string]time.Duration{"AtOnce": time.Millisecond, "AfterRenewals": minIdle} {
		t.Run("EVAL/"+name, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client := topic(t), newClient(t)
			hook, lost := loseReply(1, isMove)
			config := claiming(newClient(t, hook))
			config.Retry = &goxstreams.Retry{MaxRetries: -1, InitialInterval: retryIn}
			sub := newSubscriber(t, config)
			messages := subscribe(t, sub, topic)
			uuid := publish(t, client, topic, "")[0]
			next(t, messages).Nack()
			eventually(t, func() bool { return lost.Load() == 1 })
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 }, "the dead message is kept")
			require.NoError(t, sub.Close())
			dead := deadLetters(t, client, topic)
			require.Len(t, dead, 1)
			assert.Equal(t, uuid, dead[0].UUID)
			assert.Empty(t, pendingOf(t, client, topic, testGroup))
		})
	}
}

// TestTrimmed: an entry is deleted from the stream while it is pending. Nothing can
// be done except report it.
func TestTrimmed(t *testing.T) {
	t.Parallel()
	isLost := func(log logRecorder, id string) func() bool {
		return func() bool {
			return slices.ContainsFunc(logLinesWith(log.Errors(), "lost: trimmed or deleted while pending"), func(l string) bool { return strings.Contains(l, id) })
		}
	}
	for _, at := range []string{"Acked", "Nacked", "Waiting", "Dead", "OfADeadConsumer"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			topic, client, log := topic(t), newClient(t), newLogRecorder()
			config := claiming(client)
			config.Retry = &goxstreams.Retry{InitialInterval: 50 * time.Millisecond}
			if at == "Waiting" {
				config.Retry.InitialInterval = 2 * minIdle
			}
			if at == "Dead" {
				config.Retry.MaxRetries = -1
			}
			lost := 1
			if at == "OfADeadConsumer" {
				lost = 700 // more than one look can check
			}
			publishN(t, client, topic, lost)
			createGroup(t, client, topic, testGroup)
			del := func(ids ...string) { require.NoError(t, client.XDel(t.Context(), topic, ids...).Err()) }
			if at == "OfADeadConsumer" {
				ids := readAs(t, client, topic, testGroup, "dead", lost)
				aged := []any{"xclaim", topic, testGroup, "dead", 0} // 7.0 takes the time separately for each entry that is read
				for _, id := range ids {
					aged = append(aged, id)
				}
				require.NoError(t, client.Do(t.Context(), append(aged, "idle", minIdle.Milliseconds(), "justid")...).Err())
				del(ids...)
			}
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			if at == "OfADeadConsumer" {
				eventually(t, isLost(log, fmt.Sprintf("entries:%d", lost)), "that they are lost is not logged")
			} else {
				msg := next(t, messages)
				id := delivery(t, msg).ID
				switch at {
				case "Acked":
					del(id)
					eventually(t, isLost(log, id))
					assert.NoError(t, msg.Context().Err(), "nobody else can have it")
					msg.Ack()
				case "Nacked", "Dead":
					del(id)
					msg.Nack()
				case "Waiting":
					msg.Nack()
					eventually(t, func() bool { return stats(t, sub).Waiting == 1 })
					del(id)
				}
				eventually(t, isLost(log, id), "that it is lost is not logged")
			}
			eventually(t, func() bool { return stats(t, sub).Lost == int64(lost) })
			eventually(t, func() bool { return stats(t, sub).InFlight == 0 })
			eventuallySettled(t, client, topic, testGroup)
			publish(t, client, topic, "last")
			msg := next(t, messages)
			assert.Equal(t, "last", string(msg.Payload))
			msg.Ack()
			require.NoError(t, sub.Close())
			assert.Empty(t, deadLetters(t, client, topic))
			assert.Len(t, log.Errors(), 1)
		})
	}
}

// With NoAck a group that is lost goes on after what was read: it began where it had last been
// looked at, so that everything since came a second time.
func TestNoAck_GroupLost(t *testing.T) {
	t.Parallel()
	client, topic := newClient(t), topic(t)
	config := grouped(client)
	config.NoAck, config.ClaimInterval = true, time.Minute
	handled := newTally()
	handled.handle(subscribe(t, newSubscriber(t, config), topic), nil)
	publishN(t, client, topic, 50)
	eventuallyAll(t, handled.len, 50)
	require.NoError(t, client.XGroupDestroy(t.Context(), topic, testGroup).Err())
	publishN(t, client, topic, 1)
	eventuallyAll(t, handled.len, 51)
	require.Equal(t, 51, handled.total())
}

// TestNoAck: at-most-once delivery.
func TestNoAck(t *testing.T) {
	t.Parallel()
	topic, client := topic(t), newClient(t)
	config := grouped(client)
	config.NoAck = true
	sub := newSubscriber(t, config)
	messages := subscribe(t, sub, topic)
	publish(t, client, topic, "nacked", "acked")
	msg := next(t, messages)
	assert.Equal(t, "nacked", string(msg.Payload))
	assert.Empty(t, pendingOf(t, client, topic, testGroup))
	msg.Nack()
	msg = next(t, messages)
	assert.Equal(t, "acked", string(msg.Payload), "it came again")
	msg.Ack()
	require.NoError(t, sub.Close())
	messages = subscribe(t, newSubscriber(t, config), topic)
	publish(t, client, topic, "last")
	msg = next(t, messages)
	assert.Equal(t, "last", string(msg.Payload), "it came again, to another consumer")
	msg.Ack()
	assert.Empty(t, pendingOf(t, client, topic, testGroup))
}

// TestFlakyConnection: one in ten commands, or their replies, are lost. Two
// consumers with failing and succeeding handlers lose nothing, dead-letter nothing
// twice and count correctly.
func TestFlakyConnection(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 16} {
		t.Run(fmt.Sprintf("MaxConcurrency=%d", concurrency), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			const maxRetries, each = 3, 150
			topic, client := topic(t), newClient(t)
			var n atomic.Int64
			var on atomic.Bool // once all have subscribed
			flaky := &hook{process: func(_ context.Context, _ redis.Cmder, next func() error) error {
				if !on.Load() {
					return next()
				}
				switch n.Add(1) % 20 {
				case 7:
					return io.EOF
				case 14:
					_ = next()
					return io.EOF
				}
				return next()
			}}
			handled := newTally()
			var subs []*goxstreams.Subscriber
			for range 2 {
				config := grouped(newClient(t, flaky))
				config.MaxConcurrency = concurrency
				config.Retry = &goxstreams.Retry{MaxRetries: maxRetries, InitialInterval: time.Millisecond, MaxInterval: 5 * time.Millisecond}
				sub := newSubscriber(t, config)
				messages := subscribe(t, sub, topic)
				subs = append(subs, sub)
				go func() {
					for msg := range messages {
						handled.add(msg)
						if string(msg.Payload) == "bad" {
							msg.Nack()
						} else {
							msg.Ack()
						}
					}
				}()
			}
			on.Store(true)
			var good, bad []string
			for range each {
				uuids := publish(t, client, topic, "good", "bad")
				good, bad = append(good, uuids[0]), append(bad, uuids[1])
			}
			eventually(t, func() bool {
				info, err := client.XInfoGroups(t.Context(), topic).Result()
				return err == nil && info[0].Pending == 0 && info[0].Lag == 0
			}, "something is stranded")
			for _, sub := range subs {
				require.NoError(t, sub.Close())
			}
			for _, uuid := range good {
				assert.Equal(t, 1, handled.uuids[uuid], "good message %s", uuid)
			}
			for _, uuid := range bad {
				assert.Equal(t, maxRetries+1, handled.uuids[uuid], "bad message %s", uuid)
			}
			assert.Equal(t, map[int64]int{1: 2 * each, 2: each, 3: each, 4: each}, handled.counts)
			assert.ElementsMatch(t, bad, uuids(deadLetters(t, client, topic)))
		})
	}
}

// A claim loses its reply while the reply to a read is on its way. A search for
// orphans then also finds the entries of the read, and must not take them for
// orphans.
func TestLostReplies_ReadUnderWay(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, admin := topic(t), newClient(t)
	createGroup(t, admin, topic, testGroup)
	var claimLost, reading, overlap atomic.Bool
	var looks atomic.Int64
	var read sync.Once
	h := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if args := cmd.Args(); cmd.Name() == "xpending" && len(args) == 7 && strings.HasPrefix(args[6].(string), "one-") {
			looks.Add(1)
			overlap.CompareAndSwap(false, reading.Load())
		}
		err := next()
		switch {
		case isClaim(cmd) && claimLost.CompareAndSwap(false, true):
			publish(t, admin, topic, "new")
			eventually(t, reading.Load)
			return io.EOF
		case cmd.Name() == "xreadgroup" && claimLost.Load() && len(pendingOf(t, admin, topic, testGroup)) == 2:
			read.Do(func() {
				reading.Store(true)
				time.Sleep(3 * claimInterval) // the longer, the more can go wrong
				reading.Store(false)
			})
		}
		return err
	}}
	config := claiming(newClient(t, h))
	config.Consumer = "one"
	config.MaxConcurrency = 4
	sub := newSubscriber(t, config)
	publish(t, admin, topic, "abandoned")
	readAs(t, admin, topic, testGroup, "dead", 1)
	messages := subscribe(t, sub, topic)
	first, second := next(t, messages), next(t, messages)
	counts := map[string]int64{string(first.Payload): delivery(t, first).Count, string(second.Payload): delivery(t, second).Count}
	require.Equal(t, map[string]int64{"abandoned": 2, "new": 1}, counts)
	select {
	case msg := <-messages:
		t.Errorf("%s comes twice at once", msg.Payload)
	case <-time.After(minIdle): // a longer time would find more
	}
	first.Ack()
	second.Ack()
	require.Positive(t, looks.Load())
	require.False(t, overlap.Load(), "it looks, and reads, at the same time")
}

// A fan-out reads something while it checks whether its stream was recreated: the
// entries counted twice looked like a new stream, and everything was delivered
// again.
func TestFanOut_ReadDuringALook(t *testing.T) {
	t.Parallel()
	topic, admin, log := topic(t), newClient(t), newLogRecorder()
	handled := newTally()
	var looks atomic.Int64
	h := &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if handled.len() > 0 && isScript(cmd, "'STREAM'") && looks.Add(1) == 1 {
			publish(t, admin, topic, "while it looks")
			eventually(t, func() bool { return handled.len() == 2 })
		}
		return next()
	}}
	sub := newSubscriberLog(t, goxstreams.SubscriberConfig{Client: newClient(t, h)}, log)
	handled.handle(subscribe(t, sub, topic), nil)
	publish(t, admin, topic, "before")
	eventually(t, func() bool { return looks.Load() >= 2 }, "it looks no more")
	publish(t, admin, topic, "last")
	eventually(t, func() bool { return looks.Load() >= 3 && handled.len() == 3 })
	require.Empty(t, log.Errors())
	require.Equal(t, 3, handled.total(), "something comes twice")
}
