package redisx

import (
	"cmp"
	"context"
	"errors"
	"net"
	"reflect"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Client is a redis.UniversalClient whose kind is known. All differences between
// the kinds are handled here:
//
//   - *redis.Client: one server, or with NewFailoverClient the master that Sentinel
//     names; each new connection looks it up again.
//   - *redis.ClusterClient: the node of a key's slot. NewFailoverClusterClient and
//     ClusterSlots create one for servers that are not a Cluster.
//   - *redis.Ring: the shard of a key.
//   - any other type, such as struct{ redis.UniversalClient }: a wrapped client.
//     Commands go through it; nothing else is known about it.
type Client struct{ redis.UniversalClient }

// IsNil also recognizes a nil pointer in the interface, the result of forgetting to
// create the client.
func IsNil(c redis.UniversalClient) bool {
	v := reflect.ValueOf(c)
	return !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil()
}

// Single returns the client if it is a single server's, otherwise nil. Its
// pipelines use one connection, so their commands can include a raw MULTI.
func (c Client) Single() *redis.Client {
	single, _ := c.UniversalClient.(*redis.Client)
	return single
}

// Wrapped reports whether the client's type is not one of go-redis's.
func (c Client) Wrapped() bool {
	switch c.UniversalClient.(type) {
	case *redis.Client, *redis.ClusterClient, *redis.Ring:
		return false
	}
	return true
}

// Node returns the client of the server that has the key; nil for a wrapped client.
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

// Master returns the client for commands whose answers must be current. A
// Cluster client may send reads to replicas, and a replica that lags behind shows
// entries as acked or deleted that are not. Other clients are returned as they are.
func (c Client) Master(ctx context.Context, key string) (Client, error) {
	if cluster, ok := c.UniversalClient.(*redis.ClusterClient); ok {
		master, err := cluster.MasterForKey(ctx, key)
		return Client{master}, err
	}
	return c, nil
}

// Refresh makes a Cluster client reload the slots if the error suggests that they
// have moved. By itself the client does so when it is redirected, and otherwise
// after at least ten seconds; but commands sent to a node's own client (see Node)
// are not redirected. The reload runs in the background, at most every 200 ms.
func (c Client) Refresh(err error) {
	cluster, ok := c.UniversalClient.(*redis.ClusterClient)
	var broken net.Error
	if ok && (ReplyHas(err, "MOVED ", "ASK ", "CLUSTERDOWN", "READONLY") || errors.As(err, &broken)) {
		cluster.ReloadState(context.Background())
	}
}

// OneServer returns an error if one script cannot use both keys.
func (c Client) OneServer(ctx context.Context, a, b string) error {
	if c.Single() != nil || c.Wrapped() || TagOf(a) == TagOf(b) {
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
	// They are on one server. But a node of a Cluster still rejects keys of two
	// slots.
	_, err = DoOnce(ctx, na, "eval", "return 1", 2, a, b)
	if ReplyHas(err, "CROSSSLOT") {
		return ErrTwoServers
	}
	return err
}

// ErrTwoServers means that two keys are in different slots of a Cluster, or on
// different shards.
var ErrTwoServers = errors.New("the keys are in different slots")

// SameRead returns what two keys must have in common so that one command can read
// both: nothing on a single server, otherwise the hash tag.
func (c Client) SameRead(key string) string {
	if c.Single() != nil || c.Wrapped() {
		return ""
	}
	return TagOf(key)
}

// CallTimeout returns about how long one command may take if the server does not
// answer, according to the client's options: the wait for a connection, the dial,
// the write and the read. An option without a limit (a negative ReadTimeout, for
// example) counts as go-redis's default.
func (c Client) CallTimeout() time.Duration {
	sum := func(pool, dial, write, read time.Duration) time.Duration {
		return or(pool, defaultPoolTimeout) + or(dial, 5*time.Second) + or(write, 3*time.Second) + or(read, 3*time.Second)
	}
	switch c := c.UniversalClient.(type) {
	case *redis.Client:
		o := c.Options()
		return sum(o.PoolTimeout, o.DialTimeout, o.WriteTimeout, o.ReadTimeout)
	case *redis.ClusterClient:
		o := c.Options()
		return sum(o.PoolTimeout, o.DialTimeout, o.WriteTimeout, o.ReadTimeout)
	case *redis.Ring:
		o := c.Options()
		return sum(o.PoolTimeout, o.DialTimeout, o.WriteTimeout, o.ReadTimeout)
	}
	return sum(0, 0, 0, 0)
}

const defaultPoolTimeout = 4 * time.Second // go-redis's

func or(opt, otherwise time.Duration) time.Duration { return cmp.Or(max(opt, 0), otherwise) }

// PoolTimeout returns how long a call may wait for its turn, according to the
// client's options.
func (c Client) PoolTimeout() time.Duration {
	if single := c.Single(); single != nil {
		return or(single.Options().PoolTimeout, defaultPoolTimeout)
	}
	return defaultPoolTimeout
}

// HashTag returns a key's hash tag by Redis's rule: the text between the first "{"
// and the first "}" after it; "" if there is none.
func HashTag(key string) string {
	_, rest, _ := strings.Cut(key, "{")
	return rest[:max(0, strings.Index(rest, "}"))]
}

// TagOf returns the part of a key that determines its slot.
func TagOf(key string) string {
	if tag := HashTag(key); tag != "" {
		return tag
	}
	return key
}
