package xstream

import (
	"context"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Ack acks the entries, given as strings or pointers to them. It may run twice.
func (s *Stream) Ack(ctx context.Context, ids ...any) error {
	_, err := s.once(ctx, append([]any{"xack", s.Key, s.Group}, ids...)...)
	return err
}

// Delete is how an acked entry leaves its stream.
type Delete string

// Ways to delete what is acked.
const (
	DeleteNever    Delete = "xack"
	DeleteByServer Delete = "xackdel" // Redis 8.2: once every group has acked it
	DeleteByScript Delete = "xdel"    // while the stream has one group only
)

// fanOutsFunction returns the least ID that a fan-out subscription has come to;
// nil if there is none. What comes after it must stay in the stream. KEYS[2] is
// where fan-outs say how far they are: see Position. IDs are compared as text, since
// Lua's numbers are too small for them.
const fanOutsFunction = `
local function less(a, b)
  local am, as = string.match(a, '^(%d+)-(%d+)$')
  local bm, bs = string.match(b, '^(%d+)-(%d+)$')
  if am ~= bm then return #am < #bm or (#am == #bm and am < bm) end
  return #as < #bs or (#as == #bs and as < bs)
end
local function fanOuts()
  local all, least = redis.call('HGETALL', KEYS[2]), nil
  if #all == 0 then return nil end
  local now = redis.call('TIME')
  for i = 1, #all, 2 do
    local id, ends = string.match(all[i + 1], '^(%d+-%d+) (%d+)$')
    if not id or tonumber(ends) < tonumber(now[1]) then
      redis.pcall('HDEL', KEYS[2], all[i])
    elseif not least or less(id, least) then
      least = id
    end
  end
  return least
end`

// ackDeleteScript acks entries and deletes those that nobody needs any more.
// Deleting only what XACK took keeps an entry that was acked in vain (its lease was
// lost, say) for whoever has it. A stream that is gone is no error for XACK either.
// It returns how many it had to keep for a fan-out.
const ackDeleteScript = deniedFunction + fanOutsFunction + `
local group, by = ARGV[1], ARGV[2]
if by == 'xdel' then
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
  if groups.err then
    if string.find(groups.err, 'no such key') then return 0 end
    return groups
  end
  if #groups > 1 then return redis.error_reply('SEVERALGROUPS') end
  local missing = denied('XDEL', KEYS[1], '0-1')
  if missing then return missing end
end
local least = fanOuts()
local keep, rest = {}, {}
for i = 3, #ARGV do
  local list = (least and less(least, ARGV[i])) and keep or rest
  list[#list + 1] = ARGV[i]
end
if by == 'xackdel' and #rest > 0 then
  redis.call('XACKDEL', KEYS[1], group, 'ACKED', 'IDS', #rest, unpack(rest))
elseif by == 'xdel' then
  for _, id in ipairs(rest) do
    if redis.call('XACK', KEYS[1], group, id) == 1 then redis.call('XDEL', KEYS[1], id) end
  end
end
if #keep > 0 then redis.call('XACK', KEYS[1], group, unpack(keep)) end
return #keep`

// AckAndDelete acks the entries and deletes those that nobody needs any more. It
// returns how many are kept for a fan-out that has not come to them.
func (s *Stream) AckAndDelete(ctx context.Context, by Delete, ids ...any) (kept int64, err error) {
	args := []any{"eval", ackDeleteScript, 2, s.Key, PositionsKey(s.Key), s.Group, string(by)}
	v, err := s.once(ctx, append(args, ids...)...)
	kept, _ = v.(int64)
	return kept, err
}

// SeveralGroups reports whether err says that the stream has several groups, and
// that the server cannot tell whether all of them have acked an entry.
func SeveralGroups(err error) bool { return redisx.ReplyHas(err, "SEVERALGROUPS") }

// HasAckAndDelete asks the server for XACKDEL, of an ID that no stream has, so that
// nothing happens. redisx.IsDenied is true of the error where it is not to be had.
// (The node is asked, since a Cluster's client writes to stderr of commands that it
// does not know.)
func (s *Stream) HasAckAndDelete(ctx context.Context) error {
	_, err := s.ask(ctx, "xackdel", s.Key, s.Group, "acked", "ids", 1, "0-1")
	return err
}

// trimScript deletes entries that every group has acked and every fan-out has come
// to, a hundred at most, from the beginning of the stream. It returns how many, and
// whether a fan-out keeps others.
const trimScript = fanOutsFunction + `
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then
  if string.find(groups.err, 'no such key') then return {0, 0} end
  return groups
end
local floor = nil -- the last entry that no group needs
for _, g in ipairs(groups) do
  local f = {}
  for i = 1, #g, 2 do f[g[i]] = g[i + 1] end
  local pending = redis.call('XPENDING', KEYS[1], f['name'])
  local last = f['last-delivered-id']
  if pending[1] > 0 and not less(last, pending[2]) then
    -- One before the pending one: sequence numbers are too large to count with.
    last = redis.call('XREVRANGE', KEYS[1], '(' .. pending[2], '-', 'COUNT', 1)
    last = #last > 0 and last[1][1] or '0-0'
  end
  if not floor or less(last, floor) then floor = last end
end
if not floor then return {0, 0} end
local least, kept = fanOuts(), 0
if least and less(least, floor) then floor, kept = least, 1 end
local ids = {}
for _, e in ipairs(redis.call('XRANGE', KEYS[1], '-', floor, 'COUNT', 100)) do ids[#ids + 1] = e[1] end
if #ids > 0 then redis.call('XDEL', KEYS[1], unpack(ids)) end
return {#ids, kept}`

// maxTrim is trimScript's most.
const maxTrim = 100

// TrimAcked deletes what every group has acked and every fan-out has come to, from
// the beginning of the stream on, some at a time. It returns whether there may be
// more, now or once a fan-out has gone on.
func (s *Stream) TrimAcked(ctx context.Context) (more, later bool, err error) {
	v, err := s.once(ctx, "eval", trimScript, 2, s.Key, PositionsKey(s.Key))
	if err != nil {
		return false, false, err
	}
	counts, _ := v.([]any)
	if len(counts) != 2 {
		return false, false, errReply
	}
	return counts[0] == int64(maxTrim), counts[1] == int64(1), nil
}

// ackTrimmedScript acks those of the entries that are not in the stream any more. It
// returns how many it looked at, and which it acked: what is in the stream makes it
// stop early if it is large, since looking at it copies it.
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

// AckTrimmed acks those of the pending entries that are not in the stream any more,
// and returns which these were.
func (s *Stream) AckTrimmed(ctx context.Context, ids []string) (trimmed map[string]bool, err error) {
	trimmed = make(map[string]bool)
	for len(ids) > 0 {
		args := make([]any, 0, 1+len(ids))
		args = append(args, s.Group)
		for _, id := range ids {
			args = append(args, id)
		}
		v, err := s.eval(ctx, ackTrimmedScript, args...)
		if err != nil {
			return trimmed, err
		}
		reply, _ := v.([]any)
		if len(reply) != 2 {
			return trimmed, errReply
		}
		seen, _ := reply[0].(int64)
		if seen <= 0 {
			return trimmed, errReply
		}
		for id := range stringSet(reply[1]) {
			trimmed[id] = true
		}
		ids = ids[min(int(seen), len(ids)):]
	}
	return trimmed, nil
}
