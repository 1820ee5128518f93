package redisx

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Client is a redis.UniversalClient whose kind is known. What differs from kind to
// kind is here, and nowhere else:
//
//   - *redis.Client: one server, or with NewFailoverClient the master that Sentinel
//     names; each new connection asks anew where that is.
//   - *redis.ClusterClient: the node of a key's slot. NewFailoverClusterClient and
//     ClusterSlots make one over servers that know nothing of a Cluster.
//   - *redis.Ring: the shard of a key.
//   - anything else, such as struct{ redis.UniversalClient }: somebody's own client.
//     Its commands go through it, and that is all that is known of it.
type Client struct{ redis.UniversalClient }

// IsNil also sees a nil pointer in the interface, which is what forgetting to make
// the client leaves there.
func IsNil(c redis.UniversalClient) bool {
	switch c := c.(type) {
	case nil:
		return true
	case *redis.Client:
		return c == nil
	case *redis.ClusterClient:
		return c == nil
	case *redis.Ring:
		return c == nil
	}
	return false
}

// Single returns the client if it is that of one server, else nil. Its pipelines
// are one connection, so that a raw MULTI can be among their commands.
func (c Client) Single() *redis.Client {
	single, _ := c.UniversalClient.(*redis.Client)
	return single
}

// Wrapped reports whether it is somebody's own client.
func (c Client) Wrapped() bool {
	switch c.UniversalClient.(type) {
	case *redis.Client, *redis.ClusterClient, *redis.Ring:
		return false
	}
	return true
}

// Node returns the client of the server that has the key; nil of a wrapped client.
func (c Client) Node(ctx context.Context, key string) (*redis.Client, error) {
	switch c := c.UniversalClient.(type) {
	case *redis.Client:
		return c, nil
	case *redis.ClusterClient:
		return c.MasterForKey(ctx, key)
	case *redis.Ring:
		return c.GetShardClientForKey(key)
	}
	return nil, nil
}

// Master returns where to ask what decides about a key: a Cluster's client may be
// told to send reads to replicas, and one that lags behind shows entries as acked
// or deleted that are not. Elsewhere it is via.
func (c Client) Master(ctx context.Context, via Processor, key string) (Processor, error) {
	if cluster, ok := c.UniversalClient.(*redis.ClusterClient); ok {
		return cluster.MasterForKey(ctx, key)
	}
	return via, nil
}

// Refresh makes a Cluster's client ask where the slots are now, if the error may
// be about that. By itself it does so when it is redirected, and else after ten
// seconds or more; but what is sent to a node's own client (see Node) is not
// redirected. It asks in the background, and every 200 ms at most.
func (c Client) Refresh(err error) {
	cluster, ok := c.UniversalClient.(*redis.ClusterClient)
	var broken net.Error
	if ok && (ReplyHas(err, "MOVED ", "ASK ", "CLUSTERDOWN", "READONLY") || errors.As(err, &broken)) {
		cluster.ReloadState(context.Background())
	}
}

// Rerouted waits until a Cluster's client knows where the slots are now, if err is
// a redirection. It reports whether trying again makes sense.
func (c Client) Rerouted(ctx context.Context, err error) bool {
	if !ReplyHas(err, "MOVED ") {
		return false
	}
	cluster, ok := c.UniversalClient.(*redis.ClusterClient)
	// ForEachMaster asks where they are, before it calls.
	return ok && cluster.ForEachMaster(ctx, func(context.Context, *redis.Client) error { return nil }) == nil
}

// OneServer returns an error if a script cannot have both keys.
func (c Client) OneServer(ctx context.Context, a, b string) error {
	if c.Single() != nil || c.Wrapped() || slot(a) == slot(b) {
		return nil
	}
	na, err := c.Node(ctx, a)
	if err != nil {
		return err
	}
	nb, err := c.Node(ctx, b)
	if err != nil {
		return err
	}
	if na != nb {
		return ErrTwoServers
	}
	// One server. A node of a Cluster refuses keys of two slots all the same.
	_, err = DoOnce(ctx, na, "eval", "return 1", 2, a, b)
	if ReplyHas(err, "CROSSSLOT") {
		return ErrTwoServers
	}
	return err
}

// ErrTwoServers says that two keys are in different slots of a Cluster, or on
// different shards.
var ErrTwoServers = errors.New("the keys are in different slots")

// SameRead returns what two keys must have in common for one command to read both:
// nothing where there is one server, else the hash tag.
func (c Client) SameRead(key string) string {
	if c.Single() != nil || c.Wrapped() {
		return ""
	}
	return TagOf(key)
}

// CallTimeout is about how long one command may take by the client's own options
// when the server does not answer: the wait for a connection, the dial, the write
// and the read. Without a limit (a negative ReadTimeout, say) go-redis's own
// defaults stand in for the missing ones.
func (c Client) CallTimeout() time.Duration {
	dial, read, write, pool := 5*time.Second, 3*time.Second, 3*time.Second, 4*time.Second
	set := func(d *time.Duration, opt time.Duration) {
		if opt > 0 {
			*d = opt
		}
	}
	switch c := c.UniversalClient.(type) {
	case *redis.Client:
		o := c.Options()
		set(&dial, o.DialTimeout)
		set(&read, o.ReadTimeout)
		set(&write, o.WriteTimeout)
		set(&pool, o.PoolTimeout)
	case *redis.ClusterClient:
		o := c.Options()
		set(&dial, o.DialTimeout)
		set(&read, o.ReadTimeout)
		set(&write, o.WriteTimeout)
		set(&pool, o.PoolTimeout)
	case *redis.Ring:
		o := c.Options()
		set(&dial, o.DialTimeout)
		set(&read, o.ReadTimeout)
		set(&write, o.WriteTimeout)
		set(&pool, o.PoolTimeout)
	}
	return pool + dial + write + read
}

// PoolTimeout is how long a call may wait for its turn, by the client's options.
func (c Client) PoolTimeout() time.Duration {
	if single := c.Single(); single != nil && single.Options().PoolTimeout > 0 {
		return single.Options().PoolTimeout
	}
	return 4 * time.Second // go-redis's default
}

// HashTag is Redis's rule: what stands between the first "{" and the first "}"
// after it; "" if there is none.
func HashTag(key string) string {
	_, rest, _ := strings.Cut(key, "{")
	return rest[:max(0, strings.Index(rest, "}"))]
}

// TagOf is what a key's slot is made of.
func TagOf(key string) string {
	if tag := HashTag(key); tag != "" {
		return tag
	}
	return key
}

// slot is a key's slot in a Cluster: CRC16 (XMODEM) of its tag.
func slot(key string) uint16 {
	var crc uint16
	for _, b := range []byte(TagOf(key)) {
		crc ^= uint16(b) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
	}
	return crc % 16384
}
