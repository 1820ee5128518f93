package xstream

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// A delayed message waits beside its stream: its UUID in a sorted set, scored by the
// millisecond in which it is due by the server's clock, and its fields in a hash. Both
// keys are in the stream's slot: see Beside.
//
// The hash's values are strings one after the other, each as "length:bytes": the MAXLEN
// of the stream (0: none), the producer ID (empty: none), and the entry's fields. (A
// server has cmsgpack for this; the embedded one has not.)

// DueKey is the key of the sorted set: "orders.due{orders}" for "orders".
func DueKey(key string) string { return Beside(key, "due") }

// DelayedKey is the key of the hash: "orders.delayed{orders}" for "orders".
func DelayedKey(key string) string { return Beside(key, "delayed") }

// untilNextFunction returns for how many milliseconds nothing is due; -1: nothing waits.
const untilNextFunction = clockFunction + `
local function untilNext(now)
  local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
  return first[2] and math.max(0, first[2] - now) or -1
end`

// scheduleScript stores messages: those that are due are added to the stream, the others
// wait. It first checks everything that can be refused, so that it stores all or none:
// Redis does not roll a script back. A message that already waits under the same UUID with
// the same fields is left alone; with different fields it is another message, which must
// neither be replaced nor dropped.
//
// The arguments of each message are its UUID, when it is due (empty: now; "+ms": after
// that; "@ms": at that time), the number of its fields, and these.
const scheduleScript = `-- schedule` + deniedFunction + untilNextFunction + `
local maxlen, producer, now = ARGV[2], ARGV[3], clock(math.ceil)
local missing = denied('ZADD', KEYS[2], 0, '') or denied('ZSCORE', KEYS[2], '')
  or denied('HSET', KEYS[3], '', '') or denied('HGET', KEYS[3], '')
if missing then return missing end
local head = {'XADD', KEYS[1]}
if producer ~= '' then head[#head + 1] = 'NOMKSTREAM' end
if maxlen ~= '0' then head[#head + 1] = 'MAXLEN'; head[#head + 1] = '~'; head[#head + 1] = maxlen end
local function pack(i, n)
  local parts = {#maxlen, ':', maxlen, #producer, ':', producer}
  for f = i, i + n - 1 do
    parts[#parts + 1] = #ARGV[f]; parts[#parts + 1] = ':'; parts[#parts + 1] = ARGV[f]
  end
  return table.concat(parts)
end
local adds, waits, seen, i = {}, {}, {}, 4
while i <= #ARGV do
  local uuid, due, n, packed = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), nil
  local kind, at = string.sub(due, 1, 1), tonumber(string.sub(due, 2))
  local waiting = nil
  if due ~= '' then
    packed = pack(i + 3, n)
    waiting = seen[uuid] or redis.call('ZSCORE', KEYS[2], uuid) and redis.call('HGET', KEYS[3], uuid)
    if waiting and waiting ~= packed then
      return redis.error_reply('ERR goxstreams: another message with the UUID ' .. uuid .. ' waits to be due')
    end
    seen[uuid] = packed
  end
  if waiting then
    -- it comes when it is due
  elseif due == '' or kind == '@' and at < now or kind == '+' and at == 0 then
    local add = {unpack(head)}
    if producer ~= '' then add[#add + 1] = 'IDMP'; add[#add + 1] = producer; add[#add + 1] = uuid end
    add[#add + 1] = '*'
    for f = i + 3, i + 2 + n do add[#add + 1] = ARGV[f] end
    adds[#adds + 1] = add
  else
    if kind == '+' then at = now + at end
    waits[#waits + 1] = {at, uuid, packed}
  end
  i = i + 3 + n
end
missing = #adds > 0 and denied(unpack(adds[1]))
if missing then return missing end
untilNext(now) -- fails here, before anything is stored, if the key is not a sorted set
for _, add in ipairs(adds) do
  if not redis.call(unpack(add)) then return false end -- the first one: NOMKSTREAM, and there is no stream
end
for _, w in ipairs(waits) do
  redis.call('ZADD', KEYS[2], stamp(w[1]), w[2])
  redis.call('HSET', KEYS[3], w[2], w[3])
end
return untilNext(now)`

// Scheduling is a call of Publish in which messages are delayed.
type Scheduling struct {
	ctx  context.Context
	sent redisx.Sent // the ID of each XADD: "*"
	args []any
}

// NewScheduling returns a call. A positive maxLen trims the stream to about as many
// entries whenever one is added; a producer ID has the server store each UUID once. The
// context is there for its values.
func NewScheduling(ctx context.Context, key string, maxLen int64, producerID string) *Scheduling {
	c := &Scheduling{ctx: context.WithoutCancel(ctx)}
	c.args = []any{"eval", scheduleScript, 3, key, DueKey(key), DelayedKey(key), &c.sent, maxLen, producerID}
	return c
}

// Due is when a message is due, as scheduleScript takes it; the zero value: at once.
type Due string

// DueAt is a time by the server's clock, and DueIn a time from when the server gets to it.
// Both are in milliseconds, rounded up.
func DueAt(t time.Time) Due { return Due("@" + strconv.FormatInt(millis(t), 10)) }
func DueIn(d time.Duration) Due {
	return Due("+" + strconv.FormatInt((d+time.Millisecond-1).Milliseconds(), 10))
}

// millis rounds a time up to milliseconds.
func millis(t time.Time) int64 { return t.Add(time.Millisecond - 1).UnixMilli() }

// Add adds a message. Fields appends its fields to the arguments.
func (c *Scheduling) Add(uuid string, due Due, fields func(args []any) ([]any, error)) error {
	at := len(c.args) + 2
	args, err := fields(append(c.args, uuid, string(due), 0))
	if err != nil {
		return err
	}
	n := len(args) - at - 1
	if n > MaxFields {
		return fmt.Errorf("%d fields are more than the %d that a delayed message can have", n/2, MaxFields/2)
	}
	args[at] = n
	c.args = args
	return nil
}

// Context returns what the call's command runs in.
func (c *Scheduling) Context() context.Context { return c.ctx }

// Send sends the call, once. It may be sent again after redis.Nil, which says that the
// stream to which a producer ID belongs is gone. untilNext is how long it was, when the call was
// stored, until the first of the topic's delayed messages is due; negative: none waits.
func (c *Scheduling) Send(via redisx.Processor) (untilNext time.Duration, err error) {
	c.sent.Asterisk()
	cmd := redisx.NewOnce(c.ctx, c.args...)
	if err := via.Process(c.ctx, cmd); err != nil {
		return 0, c.sent.Outcome(err)
	}
	ms, ok := cmd.Val().(int64)
	if !ok {
		return 0, fmt.Errorf("%w: %w", redisx.ErrOutcomeUnknown, errReply)
	}
	return time.Duration(ms) * time.Millisecond, nil
}

// moveScript moves due messages into the stream. A value that cannot be unpacked is added
// as it is, as a malformed entry, so that it is not lost. If XADD with IDMP fails, as on a
// server that does not know it, the message is added without.
const moveScript = `-- move` + deniedFunction + untilNextFunction + `
local now = clock()
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1])
if #due == 0 then return {0, untilNext(now)} end
local missing = denied('XADD', KEYS[1], '*', 'f', 'v') or denied('ZREM', KEYS[2], '') or denied('HDEL', KEYS[3], '')
if missing then return missing end
local function parts(packed)
  local list, at = {}, 1
  while at <= #packed do
    local _, colon, n = string.find(packed, '^(%d+):', at)
    if not colon or colon + n > #packed then return nil end
    list[#list + 1] = string.sub(packed, colon + 1, colon + n)
    at = colon + n + 1
  end
  local fine = #list >= 4 and #list % 2 == 0 and #list <= tonumber(ARGV[3]) and string.find(list[1], '^%d+$') and #list[1] <= 15
  return fine and list or nil
end
local function add(uuid, packed, idempotent)
  local list = parts(packed) or {'0', '', 'goxstreams_delayed', packed}
  local args = {'XADD', KEYS[1]}
  if list[1] ~= '0' then args[3] = 'MAXLEN'; args[4] = '~'; args[5] = list[1] end
  if list[2] ~= '' and idempotent then
    args[#args + 1] = 'IDMP'; args[#args + 1] = list[2]; args[#args + 1] = uuid
  end
  args[#args + 1] = '*'
  for i = 3, #list do args[#args + 1] = list[i] end
  local reply = redis.pcall(unpack(args))
  if type(reply) ~= 'table' or not reply.err then return nil end
  if list[2] ~= '' and idempotent then return add(uuid, packed, false) end
  return reply
end
local moved, bytes, lost, failed = 0, 0, {}, nil
for _, uuid in ipairs(due) do
  local packed = redis.call('HGET', KEYS[3], uuid)
  local err = packed and add(uuid, packed, true)
  failed = failed or err
  if not err then
    redis.call('ZREM', KEYS[2], uuid)
    redis.call('HDEL', KEYS[3], uuid)
    if packed then moved = moved + 1 else lost[#lost + 1] = uuid end
  end
  bytes = bytes + #(packed or '')
  if bytes > tonumber(ARGV[2]) then break end
end
if failed and moved + #lost == 0 then return failed end
return {moved, untilNext(now), unpack(lost)}`

// maxMoved and maxMovedBytes bound one run of moveScript. 100 small messages take the server
// some 2 ms (`benchmarks delayed`); 250 took more than 5, which other clients noticed, and
// were moved no faster.
const (
	maxMoved      = 100
	maxMovedBytes = 1 << 20
)

// MoveResult is what became of the delayed messages that were due.
type MoveResult struct {
	Count int           // messages that are in the stream now
	Next  time.Duration // until the next one is due, 0 if it is already; negative: none waits
	Lost  []string      // UUIDs whose fields somebody else has deleted
}

// HasDelayed reports whether delayed messages wait. (ZRANGE is among the rights to move them.)
func (s *Stream) HasDelayed(ctx context.Context) (bool, error) {
	v, err := s.askAt(ctx, DueKey(s.Key), "zrange", DueKey(s.Key), 0, 0)
	rows, _ := v.([]any)
	return len(rows) > 0, err
}

// Move adds delayed messages that are due to the stream, a bounded number of them.
func (s *Stream) Move(ctx context.Context) (MoveResult, error) {
	reply := read(s.once(ctx, "eval", moveScript, 3, s.Key, DueKey(s.Key), DelayedKey(s.Key), maxMoved, maxMovedBytes, MaxFields+2))
	m := MoveResult{Count: int(reply.number()), Next: reply.millis()}
	for reply.more() {
		m.Lost = append(m.Lost, reply.text())
	}
	return m, reply.failed()
}

// Delayed is how many messages of a topic wait to be due.
type Delayed struct {
	Count int64
	First time.Time // when the first one is due, by the server's clock; zero: none waits
}

// delayedSummaryScript returns how many there are, and when the first one is due.
const delayedSummaryScript = `-- delayed
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return {redis.call('ZCARD', KEYS[1]), first[2]}`

// DelayedSummary tells how many messages wait.
func (s *Stream) DelayedSummary(ctx context.Context) (d Delayed, err error) {
	reply := read(s.ask(ctx, "eval", delayedSummaryScript, 1, DueKey(s.Key)))
	if d.Count = reply.number(); reply.more() {
		d.First = reply.score()
	}
	return d, reply.failed()
}

// Waiting is a delayed message.
type Waiting struct {
	UUID   string
	Due    time.Time // by the server's clock
	Fields []string
	Err    error // why there are none

	score string
}

// WaitingAt returns what DelayedPage needs to know of a message to continue after it.
func WaitingAt(due time.Time, uuid string) Waiting {
	return Waiting{UUID: uuid, Due: due, score: strconv.FormatInt(due.UnixMilli(), 10)}
}

// errPacked is for a value that this library has not written.
var errPacked = errors.New("what is stored of it cannot be read")

// delayedPageScript returns the messages that follow a score and a UUID, or if their number is 0
// only that of the UUID: the UUID, the score and the packed fields of each. By its rank the UUID is
// found at once; where it is gone, by the order of those with its score.
const delayedPageScript = `-- delayed page
local function follows(a, b) -- by bytes, which Lua's operators do in the C locale only
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x > y end
  end
  return #a > #b
end
local score, uuid, n = ARGV[1], ARGV[2], tonumber(ARGV[3])
local at = redis.call('ZSCORE', KEYS[1], uuid)
local rows = at and {uuid, at} or {}
if n > 0 then
  local from = 0
  if at == score then
    from = redis.call('ZRANK', KEYS[1], uuid) + 1
  elseif uuid ~= '' then
    from = redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. score)
    local ties = redis.call('ZRANGEBYSCORE', KEYS[1], score, score)
    for _, tie in ipairs(ties) do
      if follows(tie, uuid) then break end
      from = from + 1
    end
  end
  rows = redis.call('ZRANGE', KEYS[1], from, from + n - 1, 'WITHSCORES')
end
if #rows == 0 then return {} end
local uuids, page = {}, {}
for i = 1, #rows, 2 do uuids[#uuids + 1] = rows[i] end
local packed = redis.call('HMGET', KEYS[2], unpack(uuids))
for i, id in ipairs(uuids) do
  page[#page + 1] = id
  page[#page + 1] = rows[2 * i]
  page[#page + 1] = packed[i] or ''
end
return page`

// DelayedPage returns n messages that wait, at most, in the order in which they are due,
// after the one given (the zero value: from the first on).
func (s *Stream) DelayedPage(ctx context.Context, after Waiting, n int) ([]Waiting, error) {
	reply := read(s.ask(ctx, "eval", delayedPageScript, 2, DueKey(s.Key), DelayedKey(s.Key), after.score, after.UUID, n))
	var page []Waiting
	for reply.more() {
		w := Waiting{UUID: reply.text(), score: reply.text()}
		w.Due = reply.timeOf(w.score)
		w.Fields, w.Err = unpackDelayed(reply.text())
		page = append(page, w)
	}
	return page, reply.failed()
}

// DelayedGet returns the message that waits under a UUID, or ErrMissing.
func (s *Stream) DelayedGet(ctx context.Context, uuid string) (Waiting, error) {
	page, err := s.DelayedPage(ctx, Waiting{UUID: uuid}, 0)
	if err == nil && len(page) == 0 {
		err = ErrMissing
	}
	if err != nil {
		return Waiting{}, err
	}
	return page[0], nil
}

// unpackDelayed returns an entry's fields of what the hash has.
func unpackDelayed(packed string) ([]string, error) {
	var parts []string
	for packed != "" {
		digits, rest, ok := strings.Cut(packed, ":")
		n, err := strconv.ParseUint(digits, 10, 31)
		if !ok || err != nil || int(n) > len(rest) {
			return nil, errPacked
		}
		parts, packed = append(parts, rest[:n]), rest[n:]
	}
	if len(parts) < 4 || len(parts)%2 != 0 {
		return nil, errPacked
	}
	return parts[2:], nil
}

// cancelScript takes a message out of what waits.
const cancelScript = `-- cancel` + deniedFunction + `
local missing = denied('ZREM', KEYS[1], '') or denied('HDEL', KEYS[2], '')
if missing then return missing end
redis.call('HDEL', KEYS[2], ARGV[1])
return redis.call('ZREM', KEYS[1], ARGV[1])`

// Cancel deletes a delayed message. Its error is ErrMissing if none of that UUID waits.
func (s *Stream) Cancel(ctx context.Context, uuid string) error {
	sent := redisx.NewSent(uuid)
	v, err := s.once(ctx, "eval", cancelScript, 2, DueKey(s.Key), DelayedKey(s.Key), sent)
	if err == nil && v == int64(0) {
		err = ErrMissing
	}
	if errors.Is(err, ErrMissing) {
		return err
	}
	return sent.Outcome(err)
}

// rescheduleScript may run twice.
const rescheduleScript = `-- reschedule
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], 'XX', ARGV[2], ARGV[1])
return 1`

// Reschedule changes when a delayed message is due. Its error is ErrMissing if none of
// that UUID waits.
func (s *Stream) Reschedule(ctx context.Context, uuid string, at time.Time) error {
	v, err := redisx.Do(ctx, s.Via, "eval", rescheduleScript, 1, DueKey(s.Key), uuid, millis(at))
	if err == nil && v == int64(0) {
		return ErrMissing
	}
	return err
}

// RecurringKey is the key of the hash in which a topic's recurring messages say how far
// they have come: name -> the last occurrence, in milliseconds.
func RecurringKey(key string) string { return Beside(key, "recurring") }

// recurScript publishes an occurrence, once: for the first caller whose knowledge of the
// last one is up to date. It returns the last one and the server's clock. At first that
// stands for the last one.
const recurScript = `-- recur` + deniedFunction + clockFunction + `
local name, known, at, maxlen = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local now = clock()
local last = redis.call('HGET', KEYS[2], name)
if not last then
  last = stamp(now)
  redis.call('HSET', KEYS[2], name, last)
end
if at == '' or tonumber(last) ~= tonumber(known) or tonumber(at) > now then return {last, stamp(now)} end
local args = {'XADD', KEYS[1]}
if maxlen ~= '0' then args[3] = 'MAXLEN'; args[4] = '~'; args[5] = maxlen end
args[#args + 1] = '*'
for i = 6, #ARGV do args[#args + 1] = ARGV[i] end
local missing = denied('HSET', KEYS[2], name, at) or denied(unpack(args))
if missing then return missing end
redis.call(unpack(args))
redis.call('HSET', KEYS[2], name, at)
return {at, stamp(now)}`

// Recurrence is how far a recurring message has come.
type Recurrence struct {
	Last time.Time // the last occurrence that was published, or when this was first asked
	Now  time.Time // the server's clock
}

// Recur publishes the occurrence at that time, if the last one is still the one given and
// the time has come. Without a time it only asks. It may be repeated: an occurrence is
// published once.
func (s *Stream) Recur(ctx context.Context, name string, last, at time.Time, maxLen int64, fields []any) (Recurrence, error) {
	args := []any{"eval", recurScript, 2, s.Key, RecurringKey(s.Key), "*", name, stamp(last), stamp(at), maxLen}
	reply := read(redisx.Do(ctx, s.Via, append(args, fields...)...))
	return Recurrence{reply.score(), reply.score()}, reply.failed()
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return strconv.FormatInt(t.UnixMilli(), 10)
}
