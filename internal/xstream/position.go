package xstream

import (
	"cmp"
	"context"
	"fmt"
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
// -> the last entry that it no longer needs; when that expires (the server's clock, in
// seconds); and what the stream was like, see Info.life: a position says nothing about a stream
// that was deleted and recreated, where its ID may be beyond entries that nobody has read. The
// expiry removes subscriptions that died. The hash itself expires a day later, so that no step
// of the clock removes it.

// PositionsKey is the key of that hash: "orders.fanout{orders}" for "orders".
func PositionsKey(key string) string { return Beside(key, "fanout") }

const positionScript = `-- position` + evenIfFull + `
local ends = redis.call('TIME')[1] + ARGV[3]
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. string.format('%.0f', ends) .. ' ' .. ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[3] + 86400)
return 1`

// SetPosition stores, also while Redis is out of memory, for the given time, that the named fan-out needs no entries
// up to the ID, of the stream that is described by the info.
func (s *Stream) SetPosition(ctx context.Context, name, id string, of Info, ttl time.Duration) error {
	_, err := redisx.Do(ctx, s.Via, "eval", positionScript, 1, PositionsKey(s.Key), name, id, int64(ttl/time.Second), of.life())
	return err
}

// RemovePosition removes the fan-out's position.
func (s *Stream) RemovePosition(ctx context.Context, name string) error {
	_, err := redisx.Do(ctx, s.Via, "hdel", PositionsKey(s.Key), name)
	return err
}

// life returns what lets beganAnew recognize that the stream is another one: the number of
// entries that were added (-1: unknown), the last ID, the first ID, and the first entry's
// digest.
func (i Info) life() string {
	return fmt.Sprint(i.Added, " ", cmp.Or(i.Last, "0-0"), " ", cmp.Or(i.First, "0-0"), " ", i.FirstPrint)
}

// beganAnewFunction returns whether the stream is not the one that life describes, and was
// deleted and recreated since, or has lost its end in a failover: the numbers in it never
// decrease, and an ID keeps its entry. A position then counts for nothing until its fan-out,
// which looks at the same numbers, has noticed and stored a new one. (After an XSETID to
// smaller ones too.) Without the permission for XINFO STREAM it returns false.
const beganAnewFunction = printFunction + `
local stream
local function beganAnew(life)
  local added, last, first, digest = string.match(life, '^(%-?%d+) (%d+%-%d+) (%d+%-%d+) (%x*)$')
  if not added then return false end
  if not stream then
    stream = {}
    local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
    for i = 1, #info, 2 do stream[info[i]] = info[i + 1] end
  end
  if not stream['last-generated-id'] then return false end
  if less(stream['last-generated-id'], last) or (stream['entries-added'] or math.huge) < tonumber(added) then return true end
  local now = stream['first-entry']
  if not now or first == '0-0' then return false end
  return less(now[1], first) or now[1] == first and digest ~= '' and digest ~= fingerprint(now[2])
end`
