package xstream

import (
	"context"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Retention says which entries of a stream may go, the oldest first: those that every
// group has acked and every fan-out has read, if they are neither among the last KeepLast
// nor younger than KeepFor. Beyond HardMaxLen the oldest go in any case.
type Retention struct {
	KeepLast   int64         // 0: none are kept for their number; KeepAll: only HardMaxLen applies
	KeepFor    time.Duration // 0: none are kept for their age
	HardMaxLen int64         // 0: no limit
	Ignore     []string      // groups for which nothing is kept
}

// KeepAll as Retention.KeepLast trims nothing but what exceeds HardMaxLen.
const KeepAll = -1

// RetentionKey is the key of a hash beside the stream: "orders.retention{orders}". Its
// fields are "next RETENTION", the time of the next trimming by it; "floor NAME", the first
// entry that a group needed lately, in XRANGE's form; "group NAME", when a group was last seen,
// or "hold FROM FOR" if it is missing and what it needs is kept for a while, or "back FROM FOR" if
// that is so because it was recreated; and "cut NAME", the number of entries that HardMaxLen has
// cut off before the group acked them (with the empty name: before the slowest fan-out had read them).
func RetentionKey(key string) string { return Beside(key, "retention") }

// floorFunction returns the groups that count, and with lowest('0-1') the floor: what must
// stay. All entries from floor.id on are needed, or if floor.after is set, those that follow
// it. The floor is nil if nobody needs anything. KEYS[2] holds the positions of fan-outs, ARGV[1]
// the number of ignored groups, which follow it.
//
// The oldest pending entry of a group comes from XPENDING's list: the summary has all
// consumers. After XGROUP SETID entries can be pending that will also be read again.
//
// It may be pending and no longer in the stream, since somebody deleted it: then it keeps
// nothing. Redis tells that only with a copy of an entry. So the floor is computed with such
// ones, and only if it is reached, and the first entry that is left is another one, again
// from there on. settle does this, a few times at most, and returns the floor, the ID of the
// first entry that is left, if any, and whether this is another floor.
const floorFunction = fanOutsFunction + `
local lastID = '18446744073709551615-18446744073709551615'
local needAll = {id = lastID, after = true}
-- XRANGE, also from after the last ID that there can be.
local function range(from, to, n)
  if from == '(' .. lastID then return {} end
  return redis.call('XRANGE', KEYS[1], from, to, 'COUNT', n)
end
local function lower(a, b)
  return less(a.id, b.id) or a.id == b.id and b.after and not a.after
end
local positions, ignored
local function lowest(from)
  local floor
  for _, p in ipairs(positions) do
    if p.pending and less(p.id, from) then
      local first = redis.call('XPENDING', KEYS[1], p.group, from, '+', 1)[1]
      p.id, p.pending, p.consumer = p.last, false, ''
      if first and not less(p.last, first[1]) then p.id, p.pending, p.consumer = first[1], true, first[2] end
      p.after = not p.pending
    end
    if not ignored[p.group] and (not floor or lower(p, floor)) then floor = p end
  end
  return floor
end
local function groupsOf()
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
  if groups.err then
    groups = string.find(groups.err, 'no such key') and {} or redis.call('XINFO', 'GROUPS', KEYS[1])
  end
  local all, counted = {}, {}
  positions, ignored = {}, {}
  for i = 2, 1 + ARGV[1] do ignored[ARGV[i]] = true end
  for _, g in ipairs(groups) do
    local f = {}
    for i = 1, #g, 2 do f[g[i]] = g[i + 1] end
    local group = {name = f['name'], last = f['last-delivered-id'], pending = tonumber(f['pending']) or 0}
    if not string.find(group.last, '-') then group.last = group.last .. '-0' end -- the embedded server has "0"
    all[#all + 1] = group
    positions[#positions + 1] = {id = '0-0', last = group.last, pending = true, group = group.name}
    if not ignored[group.name] then counted[#counted + 1] = group end
  end
  local least, name = fanOuts()
  if least then positions[#positions + 1] = {id = least, after = true, group = '', consumer = name} end
  return counted, all, least, groups
end
local function settle(floor)
  local moved = false
  for _ = 1, 10 do
    local first = range((floor.after and '(' or '') .. floor.id, '+', 1)[1]
    if not first or floor.after or first[1] == floor.id then return floor, first and first[1], moved end
    floor = lowest(first[1])
    moved = true
  end
  return floor, not floor.after and floor.id, moved
end
local function pin(floor, id)
  return id and not floor.held and {floor.group, floor.consumer, id} or {}
end
-- The vanished group for which everything from the floor on is held, and until when.
local function holder(floor)
  return floor and floor.held and {floor.group, floor.held} or {}
end
local function hold(holds)
  for _, h in ipairs(holds) do positions[#positions + 1] = h end
end`

// pageFunction returns the IDs of at most n entries, and stops after a quarter of a
// megabyte of fields, since Redis copies these too.
const pageFunction = `
local function page(from, to, n)
  local ids, bytes, count = {}, 0, 1
  while #ids < n and bytes < 262144 do
    local asked = math.min(count, n - #ids)
    local rows = range(from, to, asked)
    for _, e in ipairs(rows) do
      ids[#ids + 1] = e[1]
      for _, f in ipairs(e[2]) do bytes = bytes + #f end
    end
    if #rows < asked then break end
    from = '(' .. ids[#ids]
    count = math.max(1, math.min(100, math.floor(65536 * #ids / (bytes + 1))))
  end
  return ids
end
-- How many of the entries to look at in one run, so that the pending ones among them, which
-- are listed for each group, stay bounded.
local function bounded(n, groups)
  local rows = 0
  for _, g in ipairs(groups) do rows = rows + math.min(n, g.pending) end
  return math.max(1, math.min(n, math.floor(n * 4000 / math.max(1, rows))))
end
-- For each group, how many of these entries it has not acked: name, number, ... What is
-- pending in between is listed once for each group, and matched with the IDs, since some may
-- have been deleted; if very many have, each ID is looked up.
local function unacked(ids, groups, least)
  local counts, is = {}, {}
  for _, id in ipairs(ids) do is[id] = true end
  local function count(name, last, pending)
    local low, high = 1, #ids + 1 -- the first ID after last
    while low < high do
      local mid = math.floor((low + high) / 2)
      if less(last, ids[mid]) then high = mid else low = mid + 1 end
    end
    local n = #ids + 1 - low
    if pending > 0 and low > 1 then
      local rows = redis.call('XPENDING', KEYS[1], name, ids[1], ids[low - 1], 2 * low)
      if #rows < 2 * low then
        for _, row in ipairs(rows) do if is[row[1]] then n = n + 1 end end
      else
        for i = 1, low - 1 do n = n + #redis.call('XPENDING', KEYS[1], name, ids[i], ids[i], 1) end
      end
    end
    if n > 0 then counts[#counts + 1] = name; counts[#counts + 1] = n end
  end
  for _, g in ipairs(groups) do count(g.name, g.last, g.pending) end
  if least then count('', least, 0) end
  return counts
end`

// rightsFunction returns an error that names a command which is denied, before anything is
// read or written.
const rightsFunction = deniedFunction + `
local missing = denied('TIME') or denied('XLEN', KEYS[1]) or denied('XRANGE', KEYS[1], '-', '+') or denied('XINFO', 'GROUPS', KEYS[1])
  or denied('XPENDING', KEYS[1], 'group') or denied('HGETALL', KEYS[2]) or denied('HGETALL', KEYS[3])
if missing then return missing end`

// boundFunction returns up to which entry a Retention allows to trim: the floor, or what
// is old enough, whichever comes first; and how many entries its KeepLast allows. Without
// a group nothing but number and age decides, and if neither is limited, nothing goes.
const boundFunction = `
local now = clock()
local options = 2 + ARGV[1]
local keepLast, keepFor, hard = tonumber(ARGV[options]), tonumber(ARGV[options + 1]), tonumber(ARGV[options + 2])
local function boundOf(floor, groups)
  if keepLast < 0 or #groups == 0 and keepLast == 0 and keepFor == 0 then return nil, 0 end
  if keepFor >= now then return nil, 0 end -- since before the clock began: nothing is old
  local bound = floor or needAll
  if keepFor > 0 then
    local age = {id = string.format('%.0f-0', now - keepFor), after = false}
    if lower(age, bound) then bound = age end
  end
  return bound, math.max(0, redis.call('XLEN', KEYS[1]) - keepLast)
end`

// Bounds of one run of retentionScript, which takes the server about a millisecond. XTRIM
// by nodes takes some 0.05 us for an entry and 2 us for a node, of which large entries need
// one each (measured on 7.0, 8.6 and Valkey). The number of nodes is not asked for unless
// there is much to trim, since XINFO STREAM copies two entries.
const (
	fewTrimmed  = 400  // entries, however large, that are trimmed without asking
	maxTrimTime = 1000 // microseconds that one run may take, about
	maxCut      = 500  // entries that HardMaxLen cuts off, fewer if very many are pending; or that a plan lists
	groupTime   = 10   // microseconds that a group takes, about
)

// retentionScript trims a bounded number of entries: whole nodes, and what remains of the first
// one by its number.
//
// Of the consumers with the same Retention that ask within an interval one trims; the others
// are told how long to wait, unless the stream exceeds HardMaxLen: then each cuts off, and does
// only that. So does one whose own group, or position, is not there: then Redis may have lost
// those of others, too, and what nobody has read yet would seem to concern nobody.
//
// It begins with a write that does nothing, see evenIfFull: trimming is what a server that is out
// of memory needs.
//
// Given where to continue, and how many entries come before that, it is a plan: it writes nothing,
// and lists a page of what would go.
const retentionScript = `-- retention` + rightsFunction + floorFunction + heldFunction + pageFunction + boundFunction + `
local interval, few, time, most, vanished, spent = tonumber(ARGV[options + 3]), tonumber(ARGV[options + 4]),
  tonumber(ARGV[options + 5]), tonumber(ARGV[options + 6]), tonumber(ARGV[options + 7]), tonumber(ARGV[options + 8])
local own, oldest, from, before = ARGV[options + 9], ARGV[options + 10], ARGV[options + 11], tonumber(ARGV[options + 12])
local plan = from ~= ''
local mine, rest = 'next ' .. table.concat(ARGV, ' ', 1, options + 2), 0
if interval > 0 then
  rest = (tonumber(redis.call('HGET', KEYS[3], mine) or 0) or 0) - now
  if rest > 5 * interval then rest = 0 end -- the clock was set back
  if rest > 0 and hard == 0 then return {rest} end
  if rest > 0 and redis.call('XLEN', KEYS[1]) <= hard then return {math.min(rest, interval)} end
end
if not plan then
  missing = denied('XTRIM', KEYS[1], 'MINID', '0') or denied('HSET', KEYS[3], '', '') or denied('HINCRBY', KEYS[3], '', 1)
  if missing then return missing end
  redis.call('XTRIM', KEYS[1], 'MINID', '~', '0', 'LIMIT', 1) -- trims nothing, see above
end
local groups, all, least, listed = groupsOf()
local bound, excess, floor = nil, 0, nil
local there = own == '' or redis.call('HGET', KEYS[2], own)
for _, g in ipairs(all) do there = there or g.name == own end
if not there then
  if hard == 0 then return {interval} end
  rest = math.max(rest, 1)
end
if rest <= 0 then
  floor = lowest('0-1')
  local holds, known, floors = held(KEYS[3], listed, now, vanished, plan)
  for _, p in ipairs(plan and {} or positions) do
    local name, was = p.last and p.group, floors[p.group]
    if name and not known[name] then redis.call('HSET', KEYS[3], 'group ' .. name, stamp(now)) end
    if name and (not known[name] or known[name] == 'seen' and (not was or lower(p, was))) then
      redis.call('HSET', KEYS[3], 'floor ' .. name, (p.after and '(' or '') .. p.id)
    end
  end
  hold(holds)
  if oldest ~= '' and not ignored[own] and #range(oldest, oldest, 1) > 0 then
    hold({{id = oldest, group = own, consumer = ''}})
  end
  floor = lowest(plan and from ~= '-' and string.sub(from, 2) or '0-1')
  bound, excess = boundOf(floor, groups)
  excess = excess - before
end

local trimmed, n, more, ids, pinned, by, cut = 0, math.min(excess, plan and most or few), 0, {}, {}, {}, {}
-- Trims, or lists, what the bound allows, up to a number of entries, and returns how many.
local function trim(limit)
  local to = bound.after and bound.id or '(' .. bound.id
  if plan then
    ids = page(from, to, limit)
    return #ids
  end
  local trimmed = redis.call('XTRIM', KEYS[1], 'MINID', '~', bound.id, 'LIMIT', limit)
  if trimmed >= limit then return trimmed end
  local rows = range('-', to, limit - trimmed)
  if #rows > 0 then redis.call('XTRIM', KEYS[1], 'MAXLEN', redis.call('XLEN', KEYS[1]) - #rows) end
  return trimmed + #rows
end
local function quota()
  local info, is = redis.pcall('XINFO', 'STREAM', KEYS[1]), {}
  if info.err then return few end
  for i = 1, #info, 2 do is[info[i]] = info[i + 1] end
  local nodes = (is['radix-tree-keys'] or is['length']) / math.max(1, is['length'])
  return math.floor(time / (0.05 + 2 * nodes))
end
local function advance()
  trimmed = trimmed + trim(n - trimmed)
  if trimmed == n and n == few and excess > n then
    n = math.min(excess, n + quota())
    trimmed = trimmed + trim(n - trimmed)
  end
  if trimmed == n and excess > n or #ids > 0 then more = 1 end -- a page of a plan may be short of n
end
if bound and excess > 0 then
  advance()
  if more == 0 and trimmed < n and bound == floor then
    local id, moved
    if not floor.held then floor, id, moved = settle(floor) end
    if moved then
      bound = boundOf(floor, groups)
      advance()
    end
    if more == 0 and trimmed < n and bound == floor then pinned, by = pin(floor, id), holder(floor) end
  end
end

local length = redis.call('XLEN', KEYS[1]) - before - #ids
if hard > 0 and length > hard and more == 0 then
  ids = page(plan and from or '-', '+', bounded(math.min(length - hard, most), all))
  cut = unacked(ids, all, least)
  trimmed, length = trimmed + #ids, length - #ids
  if not plan then
    for i = 1, #cut, 2 do redis.call('HINCRBY', KEYS[3], 'cut ' .. cut[i], cut[i + 1]) end
    redis.call('XTRIM', KEYS[1], 'MAXLEN', length)
  end
end
local wait = trimmed > 0 and interval or 5 * interval
wait = math.max(wait, math.min(5 * interval, #all * spent / 10)) -- a hundredth of the time
if interval > 0 and rest <= 0 then redis.call('HSET', KEYS[3], mine, stamp(now + wait)) end
if hard > 0 then wait = math.min(wait, interval) end
return {wait, trimmed, length, more, now, pinned, cut, by, #all, ids[#ids] or ''}`

// Pin is an entry that must stay, and whose absence would let others go.
type Pin struct {
	Group    string // empty: a fan-out
	Consumer string // that has it; empty: it was not delivered yet. Of a fan-out, its name
	ID       string // empty: nothing must stay
	Age      time.Duration
}

// Trimming is the result of one run.
type Trimming struct {
	Wait    time.Duration // until the next run
	Ran     bool          // not somebody else, within the interval
	Trimmed int64         // entries that are gone now
	Length  int64         // entries that are left
	More    bool          // there is more to trim
	Over    bool          // there is more to cut off
	Cost    time.Duration // that the run took on the server, at most and about
	Pin     Pin           // what stopped it
	Cut     map[string]int64
	Last    string // of a plan: the last entry that would go

	// The vanished group that stopped it: it may be recreated, so what it had not acked stays.
	HeldBy    string
	HeldUntil time.Time
}

// holdScript has what the group needed kept for a while.
const holdScript = `-- hold` + evenIfFull + heldFunction + `
redis.call('HSET', KEYS[1], ARGV[1], 'back ' .. stamp(clock()) .. ' ' .. ARGV[2])
return 1`

// hold keeps Retention and DeleteAcked of all groups from deleting anything for a while, if
// the group was lost, that is, if it is missing, and the caller or somebody who trims the
// stream has seen it: until its consumers have restored what was pending for them, nobody
// else knows that it is needed. If Redis has lost everything, that goes for the other groups,
// too. It must come before the group is created: once that is there, whoever trims may have
// seen it. Without the permission it does nothing.
func (s *Stream) hold(ctx context.Context, d time.Duration, known bool) error {
	key, field := RetentionKey(s.Key), "group "+s.Group
	if !known {
		v, err := s.askAt(ctx, key, "hmget", key, field)
		if seen, ok := v.([]any); err != nil || !ok || len(seen) != 1 || seen[0] == nil {
			return allowed(err)
		}
	}
	_, err := redisx.Do(ctx, s.Via, "xpending", s.Key, s.Group, "-", "+", 1)
	if GroupLost(err) {
		_, err = s.once(ctx, "eval", holdScript, 1, key, field, max(vanishedFor, d.Milliseconds()))
	}
	return allowed(err)
}

// allowed returns err, unless it says that a permission is missing.
func allowed(err error) error {
	if redisx.IsDenied(err) {
		return nil
	}
	return err
}

// Trim trims a bounded number of entries, unless somebody else has done so within the
// interval. 0 continues a run at once. own is the caller's group, or the name of its position,
// which must be there; it may be empty. Nothing is trimmed from its oldest entry on, if it is not
// empty: the group may have been recreated by others a moment ago, without what is pending for us.
func (s *Stream) Trim(ctx context.Context, r Retention, own, oldest string, interval time.Duration) (Trimming, error) {
	return r.trimming(s.once(ctx, s.retentionArgs(r, interval, own, oldest, "", 0)...))
}

// Plan tells what Trim would trim, page by page. It continues after the ID, before which
// there are as many entries; it is done when none is trimmed.
func (s *Stream) Plan(ctx context.Context, r Retention, after string, before int64) (Trimming, error) {
	from := "-"
	if after != "" {
		from = "(" + after
	}
	return r.trimming(s.ask(ctx, s.retentionArgs(r, 0, "", "", from, before)...))
}

func (s *Stream) retentionArgs(r Retention, interval time.Duration, own, oldest, from string, before int64) []any {
	args := appendAll([]any{"eval", retentionScript, 3, s.Key, PositionsKey(s.Key), RetentionKey(s.Key), len(r.Ignore)}, r.Ignore)
	return append(args, r.KeepLast, r.KeepFor.Milliseconds(), r.HardMaxLen,
		interval.Milliseconds(), fewTrimmed, maxTrimTime, maxCut, vanishedFor, groupTime, own, oldest, from, before)
}

func (r Retention) trimming(v any, err error) (t Trimming, _ error) {
	reply := read(v, err)
	if t.Wait = reply.millis(); !reply.more() {
		return t, reply.failed()
	}
	t.Ran = true
	t.Trimmed, t.Length, t.More = reply.number(), reply.number(), reply.number() == 1
	t.Over = r.HardMaxLen > 0 && t.Length > r.HardMaxLen
	t.Pin, t.Cut = reply.pin(), reply.counts()
	if held := reply.list(); held.more() {
		t.HeldBy, t.HeldUntil = held.text(), time.UnixMilli(held.number())
	}
	t.Cost = time.Duration(maxTrimTime+groupTime*reply.number()) * time.Microsecond
	t.Last = reply.text()
	return t, reply.failed()
}

func (a *answer) pin() (p Pin) {
	now, cols := a.number(), a.list()
	if !cols.more() {
		return p
	}
	p = Pin{Group: cols.text(), Consumer: cols.text(), ID: cols.text()}
	if at, _ := SplitID(p.ID); at > 0 && at <= uint64(max(now, 0)) { // an ID need not be a time
		p.Age = time.Duration(uint64(now)-at) * time.Millisecond
	}
	return p
}

func (a *answer) counts() map[string]int64 {
	counts := make(map[string]int64)
	for rows := a.list(); rows.more(); {
		name := rows.text()
		counts[name] = rows.number()
	}
	return counts
}

// floorScript returns what pins the floor, and what HardMaxLen has cut off of a group.
const floorScript = `-- floor` + rightsFunction + floorFunction + `
local cut = redis.call('HGET', KEYS[3], 'cut ' .. ARGV[2 + ARGV[1]])
groupsOf()
local floor, pinned = lowest('0-1'), {}
if floor then pinned = pin(settle(floor)) end
return {redis.call('TIME')[1] * 1000, pinned, tonumber(cut or 0)}`

// Floor returns the oldest entry that a group has not acked or a fan-out has not read, of
// all of them, and how many entries HardMaxLen has cut off before this group acked them.
func (s *Stream) Floor(ctx context.Context) (p Pin, cut int64, err error) {
	reply := read(s.ask(ctx, "eval", floorScript, 3, s.Key, PositionsKey(s.Key), RetentionKey(s.Key), 0, s.Group))
	return reply.pin(), reply.number(), reply.failed()
}

// OneSlot returns an error if the stream and what is beside it are not in one slot.
func (s *Stream) OneSlot(ctx context.Context) error {
	if err := s.Client.OneServer(ctx, s.Key, PositionsKey(s.Key)); err != nil {
		return err
	}
	return s.Client.OneServer(ctx, s.Key, RetentionKey(s.Key))
}
