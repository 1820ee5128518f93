package xstream

import (
	"context"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// A fan-out subscription is no group, so that nobody would know which entries it has
// not come to. It says so in a hash beside the stream: its name -> the last entry
// that it needs no more, and until when that holds (the server's clock, in seconds).
// A subscription that died is forgotten then.

// PositionsKey is that hash's key: "orders.fanout{orders}" for "orders". It is named
// as a dead-letter stream is, for the same reasons: one slot, one key pattern.
func PositionsKey(key string) string {
	if redisx.HashTag(key) != "" {
		return key + ".fanout"
	}
	return key + ".fanout{" + key + "}"
}

const positionScript = `
local ends = redis.call('TIME')[1] + ARGV[3]
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. string.format('%.0f', ends))
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1`

// SetPosition says that the fan-out of that name needs nothing up to the ID, for the
// time given.
func (s *Stream) SetPosition(ctx context.Context, name, id string, ttl time.Duration) error {
	_, err := redisx.Do(ctx, s.Via, "eval", positionScript, 1, PositionsKey(s.Key), name, id, int64(ttl/time.Second))
	return err
}

// RemovePosition says that the fan-out is gone.
func (s *Stream) RemovePosition(ctx context.Context, name string) error {
	_, err := redisx.Do(ctx, s.Via, "hdel", PositionsKey(s.Key), name)
	return err
}
