package xstream

import (
	"context"
	"math"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// XCLAIM has no condition "if it is still mine", so each command here is a script that checks
// the owner and acts in one step. Each may run twice, since an answer can be lost.

// Standing is the state in which a script found a pending entry of the caller's.
type Standing string

// Standings of an entry.
const (
	Mine      Standing = "mine"      // ours: the script has acted on it
	Elsewhere Standing = "elsewhere" // pending for another consumer
	Settled   Standing = "settled"   // in the stream, but not pending: acked, or the group was recreated
	Trimmed   Standing = "trimmed"   // was pending, but not in the stream; now acked
	Gone      Standing = "gone"      // neither in the stream nor pending
	Moved     Standing = "moved"     // moved to the dead-letter stream by another consumer
)

// standingFunction returns an entry's standing for a consumer, and its row of
// XPENDING. It acks an entry that is no longer in the stream.
const standingFunction = `
local function standing(id, me)
  local p = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
  local there = redis.call('XRANGE', KEYS[1], id, id)[1]
  if not p then return there and 'settled' or 'gone' end
  if not there then
    redis.call('XACK', KEYS[1], ARGV[1], id)
    return 'trimmed'
  end
  return p[2] == me and 'mine' or 'elsewhere', p, there
end`

// mineFunction returns which entries from first to last, in ID order, are pending
// for a consumer.
const mineFunction = `
local function mine(first, last, me)
  local found, from = {}, first
  while true do
    local rows = redis.call('XPENDING', KEYS[1], ARGV[1], from, last, 1000, me)
    for _, p in ipairs(rows) do found[p[1]] = true end
    if #rows < 1000 then return found end
    from = '(' .. rows[#rows][1]
  end
end`

// renewScript returns the IDs that it did not renew, each with its standing. XCLAIM
// removes entries that are no longer in the stream from the pending entries.
const renewScript = `-- renew` + standingFunction + mineFunction + `
local me, ids, others = ARGV[2], {}, {}
local found = mine(ARGV[3], ARGV[#ARGV], me)
for i = 3, #ARGV do
  if found[ARGV[i]] then
    ids[#ids + 1] = ARGV[i]
  else
    others[#others + 1] = ARGV[i]
    others[#others + 1] = (standing(ARGV[i], me))
  end
end
if #ids == 0 then return others end
ids[#ids + 1] = 'JUSTID'
for _, id in ipairs(redis.call('XCLAIM', KEYS[1], ARGV[1], me, 0, unpack(ids))) do found[id] = nil end
for _, id in ipairs(ids) do
  if found[id] then
    others[#others + 1] = id
    others[#others + 1] = 'trimmed'
  end
end
return others`

// MaxOwned is the maximum number of entries per call of Renew, Assign or Restore:
// 250 take the server about 1 ms.
const MaxOwned = 250

// Renew resets the idle time of the entries that are pending for the consumer, and
// returns the standings of the others. Pass at most MaxOwned IDs, in ID order.
func (s *Stream) Renew(ctx context.Context, ids []string) (map[string]Standing, error) {
	return standings(s.eval(ctx, renewScript, appendAll([]any{s.Group, s.Consumer}, ids)...))
}

func standings(v any, err error) (map[string]Standing, error) {
	reply := read(v, err)
	found := make(map[string]Standing, len(reply.rest)/2)
	for reply.more() {
		id := reply.text()
		found[id] = Standing(reply.text())
	}
	return found, reply.failed()
}

// takeScript retries an entry of the caller's, or takes over an entry that was seen
// pending for another consumer. The count and the idle time, which only grows, show
// whether that consumer has touched it since. If the script runs a second time, it
// finds the entry taken.
const takeScript = `-- take` + standingFunction + `
local id, me, owner, count, idle, next = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local how, p, entry = standing(id, me)
if p and owner ~= '' then
  local done = p[2] == me and p[4] == tonumber(next)
  local same = p[2] == owner and p[4] == tonumber(count) and p[3] >= tonumber(idle)
  how = (done or same) and 'mine' or 'elsewhere'
end
if how ~= 'mine' then return {how} end
redis.call('XCLAIM', KEYS[1], ARGV[1], me, 0, id, 'RETRYCOUNT', next, 'JUSTID')
return {how, entry}`

// Take delivers an entry once more, with next as its new count. Without an owner it
// must already be pending for the consumer. Otherwise it must be pending for the
// owner with that count, and have been idle for at least that time.
func (s *Stream) Take(ctx context.Context, id, owner string, count int64, idle time.Duration, next int64) (*Entry, Standing, error) {
	reply := read(s.eval(ctx, takeScript, s.Group, id, s.Consumer, owner, count, idle.Milliseconds(), next))
	how := Standing(reply.text())
	if how != Mine {
		return nil, how, reply.failed()
	}
	e := reply.entry()
	return &e, how, reply.failed()
}

// assignScript returns the IDs that it has assigned.
const assignScript = `-- assign` + mineFunction + `
local me, to, given = ARGV[2], ARGV[3], {}
local found = mine(ARGV[4], ARGV[#ARGV - 1], me)
for i = 4, #ARGV, 2 do
  if found[ARGV[i]] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], to, 0, ARGV[i], 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
    given[#given + 1] = ARGV[i]
  end
end
return given`

// Counted is an entry and a delivery count.
type Counted struct {
	ID    string
	Count int64
}

func appendCounted(args []any, entries []Counted) []any {
	for _, e := range entries {
		args = append(args, e.ID, e.Count)
	}
	return args
}

// Assign assigns the entries that are pending for the consumer to another one, with
// the given delivery counts, and returns their IDs. Pass at most MaxOwned entries,
// in ID order.
func (s *Stream) Assign(ctx context.Context, to string, entries []Counted) (map[string]bool, error) {
	reply := read(s.eval(ctx, assignScript, appendCounted([]any{s.Group, s.Consumer, to}, entries)...))
	return reply.texts(), reply.failed()
}

// restoreScript returns the IDs that are not the caller's, each with its standing. Without a
// count it restores none.
const restoreScript = `-- restore` + standingFunction + `
local me, others = ARGV[2], {}
for i = 3, #ARGV, 2 do
  local how = standing(ARGV[i], me)
  if how == 'settled' and ARGV[i + 1] ~= '' then
    redis.call('XCLAIM', KEYS[1], ARGV[1], me, 0, ARGV[i], 'FORCE', 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
  elseif how ~= 'mine' then
    others[#others + 1] = ARGV[i]
    others[#others + 1] = how
  end
end
return others`

// Restore makes the entries, at most MaxOwned, pending for the consumer again,
// unless they are pending for another one. It returns the standings of those.
func (s *Stream) Restore(ctx context.Context, entries []Counted) (map[string]Standing, error) {
	return standings(s.eval(ctx, restoreScript, appendCounted([]any{s.Group, s.Consumer}, entries)...))
}

// Standings returns the standings of the entries, at most MaxOwned, that are not pending for
// the consumer.
func (s *Stream) Standings(ctx context.Context, consumer string, ids []string) (map[string]Standing, error) {
	args := []any{s.Group, consumer}
	for _, id := range ids {
		args = append(args, id, "")
	}
	return standings(s.eval(ctx, restoreScript, args...))
}

// OneMore returns the next delivery count. It stays at the maximum, which XNACK
// FATAL sets.
func OneMore(count int64) int64 { return count + min(1, math.MaxInt64-count) }

// Probe sends a command that writes nothing but that the server treats as a write:
// if it is answered, a living consumer can renew its leases. (A server that is out
// of memory rejects XGROUP CREATECONSUMER, but accepts renewals.)
func (s *Stream) Probe(ctx context.Context) error {
	_, err := redisx.Do(ctx, s.Via, "xclaim", s.Key, s.Group, s.Consumer, 0, "0-1", "justid")
	return err
}
