package xstream

import (
	"context"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Beside returns the key of a structure that belongs to a stream. The braces are a
// Cluster hash tag: they put both keys in one slot, as scripts require. The name starts
// with the stream's key, so that one ACL key pattern covers both.
func Beside(key, what string) string {
	if redisx.HashTag(key) != "" {
		return key + "." + what
	}
	return key + "." + what + "{" + key + "}"
}

// A fan-out subscription is not a group, so the server does not know which entries
// it has not read yet. It stores its position in a hash beside the stream: its name
// -> the last entry that it no longer needs, and when that expires (the server's
// clock, in seconds). The expiry removes subscriptions that died. The hash itself expires a
// day later, so that no step of the clock removes it.

// PositionsKey is the key of that hash: "orders.fanout{orders}" for "orders".
func PositionsKey(key string) string { return Beside(key, "fanout") }

const positionScript = `
local ends = redis.call('TIME')[1] + ARGV[3]
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. string.format('%.0f', ends))
redis.call('EXPIRE', KEYS[1], ARGV[3] + 86400)
return 1`

// SetPosition stores, for the given time, that the named fan-out needs no entries
// up to the ID.
func (s *Stream) SetPosition(ctx context.Context, name, id string, ttl time.Duration) error {
	_, err := redisx.Do(ctx, s.Via, "eval", positionScript, 1, PositionsKey(s.Key), name, id, int64(ttl/time.Second))
	return err
}

// RemovePosition removes the fan-out's position.
func (s *Stream) RemovePosition(ctx context.Context, name string) error {
	_, err := redisx.Do(ctx, s.Via, "hdel", PositionsKey(s.Key), name)
	return err
}
