package goxstreams_test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// TestClients_Follow moves topics from one server to another, and back, as a Ring
// does when a shard fails, Sentinel when it promotes another master, and a Cluster
// at a failover. A connection's server was chosen when it was opened; a server that
// stays up does not report that it is no longer the right one, and reads waited
// there forever. Now a subscription checks after each BlockTime.
func TestClients_Follow(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	for _, kind := range []struct {
		name  string
		setup func(t *testing.T) followed
	}{
		{"Ring, shard voted down", ringVotedDown},
		{"Ring, shard killed and restarted", ringKilled},
		{"Sentinel", sentinelFailover(0)},
		{"Sentinel, PoolSize 1", sentinelFailover(1)},
		{"Sentinel, FailoverClusterClient", sentinelClusterFailover},
		{"ClusterSlots", slotsMoved},
		{"Cluster failover", clusterFailover},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			f := kind.setup(t)
			group := grouped(f.client)
			group.BlockTime = 500 * time.Millisecond
			fanOut := goxstreams.SubscriberConfig{Client: f.client, BlockTime: group.BlockTime}
			working, listening := newSubscriber(t, group), newSubscriber(t, fanOut)
			var messages, everything []<-chan *message.Message
			for _, topic := range f.topics {
				messages = append(messages, subscribe(t, working, topic))
				everything = append(everything, subscribe(t, listening, topic))
			}
			for _, payload := range []string{"at first", "there", "and back"} {
				for i, topic := range f.topics {
					eventually(t, func() bool { // a dead connection of the pool may be noticed only now
						msg := message.NewMessage(payload, message.Payload(payload))
						return newPublisher(t, f.client).Publish(topic, msg) == nil
					}, "nothing can be published")
					for name, channel := range map[string]<-chan *message.Message{"group": messages[i], "fan-out": everything[i]} {
						require.True(t, arrives(channel, payload, 20*group.BlockTime), "%s: %q does not come to topic %d", name, payload, i)
					}
				}
				if payload != "and back" {
					f.move(t)
				}
			}
		})
	}
}

// followed is a client whose topics move to another server, and back, with each
// move.
type followed struct {
	client redis.UniversalClient
	topics []string
	move   func(t *testing.T)
}

// arrives acks messages until the payload arrives. Others may be delivered again if
// their acks are lost with the old server.
func arrives(messages <-chan *message.Message, payload string, within time.Duration) bool {
	timeout := time.After(within)
	for {
		select {
		case msg, open := <-messages:
			if !open {
				return false
			}
			msg.Ack()
			if string(msg.Payload) == payload {
				return true
			}
		case <-timeout:
			return false
		}
	}
}

// twoTopics returns topics that are on the node.
func twoTopics(t *testing.T, client redis.UniversalClient, addr string) []string {
	var topics []string
	for len(topics) < 2 {
		if topic := topic(t); nodeOf(t, client, topic) == addr {
			topics = append(topics, topic)
		}
	}
	return topics
}

// The Ring's own heartbeat considers the shard down, and up again, while this
// process's connections to it work all the time.
func ringVotedDown(t *testing.T) followed {
	first, second := testserver.Private(t).Addr(), testserver.Private(t).Addr()
	var down atomic.Bool
	ring := closing(t, redis.NewRing(&redis.RingOptions{
		Addrs:              map[string]string{"first": first, "second": second},
		HeartbeatFrequency: 20 * time.Millisecond,
		HeartbeatFn: func(_ context.Context, shard *redis.Client) bool {
			return shard.Options().Addr != first || !down.Load()
		},
	}))
	topics := twoTopics(t, ring, first)
	return followed{ring, topics, func(t *testing.T) {
		to := first
		if !down.Load() {
			to = second
		}
		down.Store(!down.Load())
		eventually(t, func() bool { return nodeOf(t, ring, topics[0]) == to }, "the Ring does not rebalance")
	}}
}

// The shard is killed, and later comes back empty.
func ringKilled(t *testing.T) followed {
	srv, second := testserver.Private(t), testserver.Private(t).Addr()
	first := srv.Addr()
	ring := closing(t, redis.NewRing(&redis.RingOptions{
		Addrs: map[string]string{"first": first, "second": second}, HeartbeatFrequency: 50 * time.Millisecond, DialerRetries: 1,
	}))
	topics := twoTopics(t, ring, first)
	killed := false
	return followed{ring, topics, func(t *testing.T) {
		to := first
		if killed {
			srv.Restart()
		} else {
			srv.Kill()
			to = second
		}
		killed = !killed
		eventually(t, func() bool { return nodeOf(t, ring, topics[0]) == to }, "the Ring does not rebalance")
	}}
}

// Sentinel promotes another master, while the old one stays reachable and is not
// demoted: it was cut off from the Sentinels only.
func sentinelFailover(poolSize int) func(t *testing.T) followed {
	return func(t *testing.T) followed {
		addrs := []string{testserver.Private(t).Addr(), testserver.Private(t).Addr()}
		opt, sentinel := failoverOptions(t, addrs[0])
		opt.PoolSize = poolSize
		client := closing(t, redis.NewFailoverClient(opt))
		return followed{client, []string{topic(t), topic(t), topic(t), topic(t)}, switchMaster(sentinel, addrs, func(addr string) bool {
			return runsOn(client, addr)
		})}
	}
}

func sentinelClusterFailover(t *testing.T) followed {
	addrs := []string{testserver.Private(t).Addr(), testserver.Private(t).Addr()}
	client, sentinel := newFailoverCluster(t, addrs[0], 0)
	topics := []string{topic(t), topic(t)}
	return followed{client, topics, switchMaster(sentinel, addrs, func(addr string) bool {
		return samePort(masterOf(t, client, topics[0]), addr)
	})}
}

func switchMaster(sentinel *fakeSentinel, addrs []string, leadsTo func(addr string) bool) func(t *testing.T) {
	at := 0
	return func(t *testing.T) {
		at = 1 - at
		sentinel.promote(addrs[at])
		eventually(t, func() bool { return leadsTo(addrs[at]) }, "the client does not follow")
	}
}

// samePort compares addresses on this machine: without a Cluster, a ClusterClient
// drops the host of a loopback address.
func samePort(a, b string) bool {
	_, p, _ := net.SplitHostPort(a)
	_, q, _ := net.SplitHostPort(b)
	return p == q
}

// runsOn reports whether the client's commands are run by the server at addr.
func runsOn(client *redis.Client, addr string) bool {
	info, err := client.Info(context.Background(), "server").Result()
	if err != nil {
		return false
	}
	direct := redis.NewClient(&redis.Options{Addr: addr})
	defer direct.Close()
	other, err := direct.Info(context.Background(), "server").Result()
	if err != nil {
		return false
	}
	runID := func(info string) string {
		_, rest, _ := strings.Cut(info, "run_id:")
		id, _, _ := strings.Cut(rest, "\r\n")
		return id
	}
	return runID(info) == runID(other)
}

// A program that shards its keys over plain servers moves some slots.
func slotsMoved(t *testing.T) followed {
	addrs := []string{testserver.Private(t).Addr(), testserver.Private(t).Addr()}
	var at atomic.Int32
	client := closing(t, redis.NewClusterClient(&redis.ClusterOptions{ClusterSlots: func(context.Context) ([]redis.ClusterSlot, error) {
		return []redis.ClusterSlot{{Start: 0, End: 16383, Nodes: []redis.ClusterNode{{Addr: addrs[at.Load()]}}}}, nil
	}}))
	topics := []string{topic(t), topic(t)}
	return followed{client, topics, func(t *testing.T) {
		at.Store(1 - at.Load())
		eventually(t, func() bool {
			client.ReloadState(context.Background())
			return samePort(masterOf(t, client, topics[0]), addrs[at.Load()])
		}, "the client does not follow")
	}}
}

// A replica takes its master's place, and then the master takes it back.
func clusterFailover(t *testing.T) followed {
	addrs := startPair(t)
	nodes := []*redis.Client{
		closing(t, redis.NewClient(&redis.Options{Addr: addrs[0]})), closing(t, redis.NewClient(&redis.Options{Addr: addrs[1]})),
	}
	client := closing(t, redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs}))
	topics := []string{topic(t), topic(t), topic(t)} // of three slots
	at := 0
	return followed{client, topics, func(t *testing.T) {
		at = 1 - at
		eventually(t, func() bool {
			_ = nodes[at].Do(t.Context(), "cluster", "failover").Err() // rejected until its link to the master is up
			role, err := nodes[at].Do(t.Context(), "role").Slice()
			return err == nil && role[0] == "master"
		}, "no failover")
	}}
}

// startPair starts a Cluster of one master, the first, and its replica.
func startPair(t *testing.T) []string {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil && os.Getenv("GOXSTREAMS_TEST_REAL") == "1" {
		require.NoError(t, err)
	} else if err != nil {
		t.Skip("NOT TESTED: it needs redis-server in the PATH")
	}
	addrs := make([]string, 2)
	nodes := make([]*redis.Client, 2)
	var firstBus string
	for i := range addrs {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		addrs[i] = listener.Addr().String()
		_, port, _ := net.SplitHostPort(addrs[i])
		bus, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		_, busPort, _ := net.SplitHostPort(bus.Addr().String())
		require.NoError(t, listener.Close())
		require.NoError(t, bus.Close())
		server := exec.Command(binary, "--bind", "127.0.0.1", "--port", port, "--cluster-enabled", "yes", "--cluster-port", busPort,
			"--cluster-node-timeout", "2000", "--dir", t.TempDir(), "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")
		require.NoError(t, server.Start())
		t.Cleanup(func() {
			assert.NoError(t, server.Process.Kill())
			_ = server.Wait()
		})
		nodes[i] = redis.NewClient(&redis.Options{Addr: addrs[i], DialerRetries: 1})
		defer nodes[i].Close()
		eventually(t, func() bool { return nodes[i].Ping(t.Context()).Err() == nil }, "redis-server does not answer")
		if i == 1 {
			id := nodes[0].Do(t.Context(), "cluster", "myid").Val()
			require.NoError(t, nodes[0].ClusterAddSlotsRange(t.Context(), 0, 16383).Err())
			_, firstPort, _ := net.SplitHostPort(addrs[0])
			require.NoError(t, nodes[1].Do(t.Context(), "cluster", "meet", "127.0.0.1", firstPort, firstBus).Err())
			eventually(t, func() bool { return nodes[1].Do(t.Context(), "cluster", "replicate", id).Err() == nil }, "no replica")
		}
		firstBus = busPort
	}
	eventually(t, func() bool {
		info, err := nodes[1].Info(t.Context(), "replication").Result()
		state := nodes[0].ClusterInfo(t.Context()).Val()
		return err == nil && strings.Contains(info, "master_link_status:up") && strings.Contains(state, "cluster_state:ok")
	}, "the replica does not follow")
	return addrs
}
