package xstream

import (
	"context"
	"maps"
)

// byServerFunction returns whether the server itself deletes what every group has acked:
// with XACKDEL, since Redis 8.2, if that is permitted. Elsewhere a script deletes, while the
// stream has only one group. (acl_check_cmd raises an error for an unknown command.)
const byServerFunction = `
local function byServer(group)
  local known, permitted = pcall(redis.acl_check_cmd, 'XACKDEL', KEYS[1], group, 'ACKED', 'IDS', 1, '0-1')
  return known and permitted
end`

// lessFunction compares IDs, as text, since Lua's numbers are too small for them.
const lessFunction = `
local function less(a, b)
  local am, as = string.match(a, '^(%d+)-(%d+)$')
  local bm, bs = string.match(b, '^(%d+)-(%d+)$')
  if am ~= bm then return #am < #bm or (#am == #bm and am < bm) end
  return #as < #bs or (#as == #bs and as < bs)
end`

// fanOutsFunction returns the lowest position of the fan-out subscriptions, and its
// fan-out's name; nil if there are none. Entries after it must stay in the stream. KEYS[2] holds the
// positions: see SetPosition. One that has expired is kept for another minute, with a
// mark: a step of the server's clock lets all of them expire, and a living fan-out stores
// its own again within seconds. If the mark is refused, as by a server that is out of memory,
// it is kept until it has been expired for a minute: that says nothing about its fan-out. A
// position in a stream that began anew since is its beginning.
const fanOutsFunction = lessFunction + beganAnewFunction + `
local function fanOuts()
  local all, least, name = redis.call('HGETALL', KEYS[2]), nil, nil
  if #all == 0 then return nil end
  local now = redis.call('TIME')
  for i = 1, #all, 2 do
    local fan = all[i]
    local id, ends, mark, life = string.match(all[i + 1], '^(%d+-%d+) (%d+)(!?) ?(.*)$')
    local gone = not id or tonumber(ends) < tonumber(now[1])
    if gone and id and mark == '' then
      redis.pcall('HDEL', KEYS[2], '') -- see evenIfFull
      local marked = redis.pcall('HSET', KEYS[2], fan, id .. ' ' .. string.format('%.0f', now[1] + 60) .. '! ' .. life)
      gone = type(marked) == 'table' and marked.err ~= nil and tonumber(ends) < now[1] - 60
    end
    if gone then
      redis.pcall('HDEL', KEYS[2], fan)
    else
      if beganAnew(life) then id = '0-0' end
      if not least or less(id, least) then least, name = id, fan end
    end
  end
  return least, name
end`

// heldFunction returns the holds: what must stay for now though every group has acked it,
// since one has vanished, or was recreated and has not got all of its pending entries back.
// Each is a position as in floorFunction, with the time until when it holds: the group's last
// known floor, or the beginning, if a Subscriber of an older version has seen it. It also
// returns which groups are known already, as "held" or "seen", and their known floors. key is
// RetentionKey; now and vanished, how long a hold lasts, are milliseconds. With look it stores nothing.
const heldFunction = clockFunction + `
local function held(key, groups, now, vanished, look)
  local present, known, floors, holds, named = {}, {}, {}, {}, {}
  for _, g in ipairs(groups) do
    for i = 1, #g, 2 do if g[i] == 'name' then present[g[i + 1]] = true end end
  end
  local function drop(field) if not look then redis.pcall('HDEL', key, field) end end
  local state = redis.call('HGETALL', key)
  for i = 1, #state, 2 do
    local name = string.match(state[i], '^floor (.*)$')
    local after, id = string.match(state[i + 1], '^(%(?)(%d+%-%d+)$')
    if name and id then floors[name] = {id = id, after = after == '('} end
  end
  for i = 1, #state, 2 do
    local name = string.match(state[i], '^group (.*)$')
    local word, from, lasts = string.match(state[i + 1], '^(%a+) (%d+) (%d+)$')
    local seen = tonumber(state[i + 1])
    local function keep()
      if not look then redis.pcall('HSET', key, state[i], word .. ' ' .. stamp(from) .. ' ' .. stamp(lasts)) end
    end
    if seen and seen < now - 3600000 and string.find(state[i], '^next') then
      drop(state[i]) -- of a Retention that nobody has any more
    end
    if name then named[name] = true end
    if name and not present[name] and word ~= 'hold' then
      word, from, lasts = 'hold', now, vanished
      keep()
    elseif name and present[name] and word == 'hold' then
      word = 'back' -- if it vanishes again, that is another loss
      keep()
    end
    if name and from then
      from, lasts = tonumber(from), tonumber(lasts)
      if now < from then -- the clock was set back
        from = now
        keep()
      end
      if now - from < lasts then
        local at = floors[name] or {id = '0-0', after = true}
        holds[#holds + 1] = {id = at.id, after = at.after, group = name, consumer = '', held = from + lasts}
        known[name] = 'held'
      elseif not present[name] then
        drop(state[i])
        drop('floor ' .. name)
      end
    elseif name and seen and seen <= now and seen > now - vanished / 4 then
      known[name] = 'seen'
    end
  end
  for name in pairs(floors) do
    if not named[name] then drop('floor ' .. name) end
  end
  return holds, known, floors
end`

// vanishedFor is how long the entries stay that a group had not acked, after it was found
// missing, in milliseconds: its consumers recreate it within seconds, and need them. A group
// that was destroyed on purpose costs a minute.
const vanishedFor = 60_000

// ackDeleteScript acks entries and deletes those that nobody needs any more, and that XACK has
// acked: an entry whose lease was lost stays for its new consumer. What a fan-out has not read,
// what another group may need where the server cannot tell, and what a vanished group may need,
// is left to retentionScript. A missing stream is not an error, as for XACK. It begins with a
// write that does nothing: see evenIfFull.
const ackDeleteScript = `-- ack` + deniedFunction + byServerFunction + fanOutsFunction + heldFunction + `
local group, vanished = ARGV[1], tonumber(ARGV[2])
local xackdel = byServer(group)
redis.call('XACK', KEYS[1], group, '0-0')
local groups = denied('XINFO', 'GROUPS', KEYS[1])
if not groups then
  groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
  if groups.err then
    if string.find(groups.err, 'no such key') then return 0 end
    return groups
  end
elseif not xackdel then
  return groups
else
  groups = nil
end
if groups and (not xackdel and #groups > 1 or #held(KEYS[3], groups, clock(), vanished) > 0) then
  return redis.call('XACK', KEYS[1], group, unpack(ARGV, 3))
end
if not xackdel then
  local missing = denied('XDEL', KEYS[1], '0-1')
  if missing then return missing end
end
local least = fanOuts()
local keep, rest = {}, {}
for i = 3, #ARGV do
  local list = (least and less(least, ARGV[i])) and keep or rest
  list[#list + 1] = ARGV[i]
end
if not xackdel then
  for _, id in ipairs(rest) do
    if redis.call('XACK', KEYS[1], group, id) == 1 then redis.call('XDEL', KEYS[1], id) end
  end
elseif #rest > 0 then
  redis.call('XACKDEL', KEYS[1], group, 'ACKED', 'IDS', #rest, unpack(rest))
end
if #keep > 0 then redis.call('XACK', KEYS[1], group, unpack(keep)) end
return 0`

// Ack acks the entries, and if it deletes, it deletes those that nobody needs any more. The IDs
// are strings or pointers to strings. It may run twice.
func (s *Stream) Ack(ctx context.Context, deletes bool, ids ...any) error {
	args := []any{"xack", s.Key, s.Group}
	if deletes {
		args = []any{"eval", ackDeleteScript, 3, s.Key, PositionsKey(s.Key), RetentionKey(s.Key), s.Group, vanishedFor}
	}
	_, err := s.once(ctx, append(args, ids...)...)
	return err
}

// ackTrimmedScript acks the entries that are no longer in the stream. It returns
// the number of entries checked, and the IDs acked. It stops early if the entries
// in the stream are large, since checking one copies it.
const ackTrimmedScript = `
local trimmed, seen, bytes = {}, 0, 0
for i = 2, #ARGV do
  seen = seen + 1
  local found = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])
  if #found == 0 then
    if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then trimmed[#trimmed + 1] = ARGV[i] end
  else
    for _, f in ipairs(found[1][2]) do bytes = bytes + #f end
    if bytes > 262144 then break end
  end
end
return {seen, trimmed}`

// AckTrimmed acks the pending entries that are no longer in the stream, and returns
// their IDs.
func (s *Stream) AckTrimmed(ctx context.Context, ids []string) (trimmed map[string]bool, err error) {
	trimmed = make(map[string]bool)
	for len(ids) > 0 {
		reply := read(s.eval(ctx, ackTrimmedScript, appendAll([]any{s.Group}, ids)...))
		seen := reply.number()
		maps.Copy(trimmed, reply.list().texts())
		if reply.failed() != nil {
			return trimmed, reply.failed()
		}
		ids = ids[min(max(int(seen), 1), len(ids)):]
	}
	return trimmed, nil
}
