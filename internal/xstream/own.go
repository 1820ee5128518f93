package xstream

import (
	"context"
	"math"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// This file is who owns a pending entry. XCLAIM has no "only if it is still mine", so
// that each of these commands is a script: it looks at the owner, and acts in the same
// step, whatever the clocks say. Each may run twice, since an answer can be lost.

// Standing is what a script found that was asked to do something to a pending entry of
// the caller's.
type Standing string

// The standings.
const (
	Mine      Standing = "mine"      // it was done
	Elsewhere Standing = "elsewhere" // it is another consumer's
	Settled   Standing = "settled"   // it is not pending, though in the stream: acked, or the group was made anew
	Trimmed   Standing = "trimmed"   // it was not in the stream, and is not pending any more
	Gone      Standing = "gone"      // it is neither in the stream nor pending
	Moved     Standing = "moved"     // another consumer has moved it to the dead-letter stream
)

// standingFunction says how an entry stands to a consumer, and returns its row of
// XPENDING. One that is not in the stream any more is acked away.
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

// mineFunction returns which entries between the first and the last one, in the order
// of their IDs, are pending in a consumer's name.
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
// drops what is not in the stream any more from the pending entries.
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
local args = {}
for i, id in ipairs(ids) do args[i] = id end
args[#args + 1] = 'JUSTID'
for _, id in ipairs(redis.call('XCLAIM', KEYS[1], ARGV[1], me, 0, unpack(args))) do found[id] = nil end
for _, id in ipairs(ids) do
  if found[id] then
    others[#others + 1] = id
    others[#others + 1] = 'trimmed'
  end
end
return others`

// MaxOwned is the most entries of one call of Renew, Assign or Restore: 250 take the
// server some 1 ms.
const MaxOwned = 250

// Renew resets the idle time of those of the entries, MaxOwned at most and in the order
// of their IDs, that are pending in the consumer's name. It returns the standing of the
// others.
func (s *Stream) Renew(ctx context.Context, ids []string) (map[string]Standing, error) {
	args := make([]any, 0, 2+len(ids))
	args = append(args, s.Group, s.Consumer)
	for _, id := range ids {
		args = append(args, id)
	}
	return standings(s.eval(ctx, renewScript, args...))
}

func standings(v any, err error) (map[string]Standing, error) {
	if err != nil {
		return nil, err
	}
	list, _ := v.([]any)
	found := make(map[string]Standing, len(list)/2)
	for i := 0; i+1 < len(list); i += 2 {
		id, _ := list[i].(string)
		standing, _ := list[i+1].(string)
		found[id] = Standing(standing)
	}
	return found, nil
}

// takeScript is for a retry of the caller's own entry, and for the take-over of one that
// was seen in a consumer's name. Whether that has touched it since is told by its
// count and its idle time, which grows. A second run finds it taken.
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

// Take has an entry delivered once more: it gets the count given as next. Without an
// owner it must be the consumer's own already; else it must be pending in the owner's
// name, with that count, and have been idle for that time at least.
func (s *Stream) Take(ctx context.Context, id, owner string, count int64, idle time.Duration, next int64) (*Entry, Standing, error) {
	v, err := s.eval(ctx, takeScript, s.Group, id, s.Consumer, owner, count, idle.Milliseconds(), next)
	if err != nil {
		return nil, "", err
	}
	reply, _ := v.([]any)
	if len(reply) == 0 {
		return nil, "", errReply
	}
	how, _ := reply[0].(string)
	if Standing(how) != Mine {
		return nil, Standing(how), nil
	}
	entries, err := parseEntries(reply[1:])
	if err != nil || len(entries) != 1 {
		return nil, "", errReply
	}
	return &entries[0], Mine, nil
}

// assignScript returns the IDs that it gave away.
const assignScript = `-- assign` + mineFunction + `
local me, to, given, counts = ARGV[2], ARGV[3], {}, {}
local found = mine(ARGV[4], ARGV[#ARGV - 1], me)
for i = 4, #ARGV, 2 do
  if found[ARGV[i]] then
    local ids = counts[ARGV[i + 1]] or {}
    counts[ARGV[i + 1]] = ids
    ids[#ids + 1] = ARGV[i]
    given[#given + 1] = ARGV[i]
  end
end
for count, ids in pairs(counts) do
  ids[#ids + 1] = 'RETRYCOUNT'
  ids[#ids + 1] = count
  ids[#ids + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], to, 0, unpack(ids))
end
return given`

// Counted is an entry and a delivery count.
type Counted struct {
	ID    string
	Count int64
}

// Assign gives those of the entries, MaxOwned at most and in the order of their IDs,
// that are pending in the consumer's name to another one, with the delivery counts
// given. It returns which these were.
func (s *Stream) Assign(ctx context.Context, to string, entries []Counted) (map[string]bool, error) {
	args := make([]any, 0, 3+2*len(entries))
	args = append(args, s.Group, s.Consumer, to)
	for _, e := range entries {
		args = append(args, e.ID, e.Count)
	}
	v, err := s.eval(ctx, assignScript, args...)
	if err != nil {
		return nil, err
	}
	return stringSet(v), nil
}

// restoreScript returns the IDs that are not the caller's, each with its standing.
const restoreScript = `-- restore` + standingFunction + `
local me, others = ARGV[2], {}
for i = 3, #ARGV, 2 do
  local how = standing(ARGV[i], me)
  if how == 'settled' then
    redis.call('XCLAIM', KEYS[1], ARGV[1], me, 0, ARGV[i], 'FORCE', 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
  elseif how ~= 'mine' then
    others[#others + 1] = ARGV[i]
    others[#others + 1] = how
  end
end
return others`

// Restore makes the entries, MaxOwned at most, pending in the consumer's name again,
// unless they are in another one's. It returns the standing of those.
func (s *Stream) Restore(ctx context.Context, entries []Counted) (map[string]Standing, error) {
	args := make([]any, 0, 2+2*len(entries))
	args = append(args, s.Group, s.Consumer)
	for _, e := range entries {
		args = append(args, e.ID, e.Count)
	}
	return standings(s.eval(ctx, restoreScript, args...))
}

// OneMore returns the count of the delivery after it. It stays at the greatest, which
// XNACK FATAL sets.
func OneMore(count int64) int64 { return count + min(1, math.MaxInt64-count) }

// Probe writes nothing, by a command that the server takes for a write: where it is
// answered, a living consumer can renew its leases. (XGROUP CREATECONSUMER would be
// refused by a server that is full, which leases do not need.)
func (s *Stream) Probe(ctx context.Context) error {
	_, err := redisx.Do(ctx, s.Via, "xclaim", s.Key, s.Group, s.Consumer, 0, "0-1", "justid")
	return err
}
