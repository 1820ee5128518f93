package xstream

import (
	"context"
	"time"
)

// Claim takes the entry over with the delivery count given, if it has been idle
// for minIdle at least. It returns nil when it has not, or when it is not
// pending any more, or when it is not in the stream any more; in the last case
// the server drops it from the pending entries.
func (s *Stream) Claim(ctx context.Context, id string, minIdle time.Duration, count int64) (*Entry, error) {
	return s.firstEntry(s.once(ctx, "xclaim", s.Key, s.Group, s.Consumer, minIdle.Milliseconds(), id, "retrycount", count))
}

func (s *Stream) firstEntry(v any, err error) (*Entry, error) {
	if err != nil {
		return nil, err
	}
	entries, err := parseEntries(v)
	if err != nil || len(entries) == 0 {
		return nil, err
	}
	return &entries[0], nil
}

// claimFromScript claims an entry while it is in the name of a certain consumer,
// with the count that the claimer saw: it may have been claimed, failed, and come
// back to that name since.
const claimFromScript = `
local p = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if #p == 0 or p[1][2] ~= ARGV[3] or p[1][4] + 1 ~= tonumber(ARGV[5]) then return {} end
return redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, ARGV[2], 'RETRYCOUNT', ARGV[5])`

// ClaimFrom is Claim of what is pending in another consumer's name with one
// delivery less, however idle.
func (s *Stream) ClaimFrom(ctx context.Context, consumer, id string, count int64) (*Entry, error) {
	return s.firstEntry(s.eval(ctx, claimFromScript, s.Group, id, consumer, s.Consumer, count))
}

// renewScript resets the idle time of those of the entries that are pending in the
// consumer's name. XCLAIM has no "only if still mine". It drops what is not in the
// stream any more from the pending entries, and leaves it out of its answer.
const renewScript = `
local mine, from = {}, ARGV[3]
while true do
  local rows = redis.call('XPENDING', KEYS[1], ARGV[1], from, ARGV[#ARGV], 1000, ARGV[2])
  for _, p in ipairs(rows) do mine[p[1]] = true end
  if #rows < 1000 then break end
  from = '(' .. rows[#rows][1]
end
local ids, args = {}, {}
for i = 3, #ARGV do
  if mine[ARGV[i]] then
    ids[#ids + 1] = ARGV[i]
    args[#args + 1] = ARGV[i]
  end
end
if #ids == 0 then return {{}, {}} end
args[#args + 1] = 'JUSTID'
return {redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(args)), ids}`

// MaxRenewal is the most entries of one renewal: it takes the server some 1 ms.
const MaxRenewal = 250

// Renew resets the idle time of those of the entries, MaxRenewal at most and in the
// order of their IDs, that are still pending in the consumer's name. It returns
// which these are, and which of them were not in the stream any more: these are not
// pending any more either.
func (s *Stream) Renew(ctx context.Context, ids []string) (renewed, trimmed map[string]bool, err error) {
	args := make([]any, 0, 2+len(ids))
	args = append(args, s.Group, s.Consumer)
	for _, id := range ids {
		args = append(args, id)
	}
	v, err := s.eval(ctx, renewScript, args...)
	if err != nil {
		return nil, nil, err
	}
	lists, _ := v.([]any)
	if len(lists) != 2 {
		return nil, nil, errReply
	}
	renewed, trimmed = stringSet(lists[0]), stringSet(lists[1])
	for id := range renewed {
		delete(trimmed, id)
	}
	return renewed, trimmed, nil
}

// Assign gives those of the entries that have been idle for minIdle at least to a
// consumer, with the delivery count given, and returns which these were.
func (s *Stream) Assign(ctx context.Context, consumer string, minIdle time.Duration, count int64, ids []string) (map[string]bool, error) {
	return s.claimIDs(ctx, consumer, minIdle, count, ids)
}

// Restore puts the entries back among the pending ones, even where the group
// does not know them (minIdle is only asked of what it knows).
func (s *Stream) Restore(ctx context.Context, minIdle time.Duration, count int64, ids []string) (map[string]bool, error) {
	return s.claimIDs(ctx, s.Consumer, minIdle, count, ids, "force")
}

func (s *Stream) claimIDs(ctx context.Context, consumer string, minIdle time.Duration, count int64, ids []string, opts ...any) (map[string]bool, error) {
	args := make([]any, 0, 8+len(ids)+len(opts))
	args = append(args, "xclaim", s.Key, s.Group, consumer, minIdle.Milliseconds())
	for _, id := range ids {
		args = append(args, id)
	}
	v, err := s.once(ctx, append(append(args, "retrycount", count), append(opts, "justid")...)...)
	if err != nil {
		return nil, err
	}
	return stringSet(v), nil
}
