package xstream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// maxPiece is the size of the pieces into which a script's large arguments are cut.
// A server rejects an argument above proto-max-bulk-len, which is at least 1 MiB,
// and closes the connection; but a script may store larger values.
const maxPiece = 512 << 10

// joinFunction returns the arguments from the i-th, joined again. pieces lists the
// number of pieces of each; an empty string means one piece each.
const joinFunction = `
local function join(i, pieces)
  if pieces == '' then return unpack(ARGV, i) end
  local out = {}
  for n in string.gmatch(pieces, '%d+') do
    n = tonumber(n)
    out[#out + 1] = table.concat(ARGV, '', i, i + n - 1)
    i = i + n
  end
  return unpack(out)
end`

// cut appends the values to a script's arguments, large ones in pieces for
// joinFunction.
func cut(args []any, values []string) []any {
	large := slices.ContainsFunc(values, func(v string) bool { return len(v) > maxPiece })
	pieces := len(args)
	args = append(args, "")
	var counts strings.Builder
	for _, v := range values {
		n := 1
		for ; len(v) > maxPiece; n++ {
			args = append(args, v[:maxPiece])
			v = v[maxPiece:]
		}
		args = append(args, v)
		if large {
			fmt.Fprintf(&counts, "%d ", n)
		}
	}
	args[pieces] = counts.String()
	return args
}

// letterFunction searches a dead-letter stream for the dead letter of an entry: one
// whose metadata contains all marks. The last mark is the consumer's: if only that
// one is missing, another consumer has moved the entry. It searches the last 10,000
// letters from the end, and nothing if XREVRANGE is denied.
const letterFunction = `
local function letter(first, last)
  if last < first or denied('XREVRANGE', KEYS[2], '+', '-') then return nil end
  local from = '+'
  for page = 1, 100 do
    local rows = redis.call('XREVRANGE', KEYS[2], from, '-', 'COUNT', 100)
    for _, e in ipairs(rows) do
      local metadata, all = e[2][4] or '', true
      for i = first, last - 1 do all = all and string.find(metadata, ARGV[i], 1, true) end
      if all then return e[1], string.find(metadata, ARGV[last], 1, true) and 'mine' or 'moved' end
    end
    if #rows < 100 then return nil end
    from = '(' .. rows[#rows][1]
  end
end`

// deadLetterScript moves an entry to the dead-letter stream, once: only while it is
// pending for the caller. If an answer was lost before, it first searches for the
// dead letter, since the entry may also be no longer pending because the consumer
// or the group was removed or recreated. It checks the permissions for the commands
// after XADD in advance.
const deadLetterScript = `-- dead-letter` + deniedFunction + byServerFunction + standingFunction + joinFunction + letterFunction + heldFunction + `
local id, me, marks, vanished = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local deletes = #KEYS > 2
local xackdel = deletes and byServer(ARGV[1])
local moved, by_whom = letter(6, 5 + marks)
if moved then
  redis.call('XACK', KEYS[1], ARGV[1], id) -- it may have been put back
  return {by_whom, moved}
end
local how = standing(id, me)
if how ~= 'mine' then return {how} end
if not xackdel then
  local missing = denied('XACK', KEYS[1], ARGV[1], id)
  if deletes then missing = missing or denied('XDEL', KEYS[1], id) or denied('XINFO', 'GROUPS', KEYS[1]) end
  if missing then return missing end
end
local keep = not deletes or #redis.call('HGETALL', KEYS[3]) > 0 -- a fan-out may need it still
if not keep and not denied('XINFO', 'GROUPS', KEYS[1]) then
  local groups = redis.call('XINFO', 'GROUPS', KEYS[1])
  keep = not xackdel and #groups > 1 or #held(KEYS[4], groups, clock(), vanished) > 0
end
moved = redis.call('XADD', KEYS[2], '*', join(7 + marks, ARGV[6 + marks]))
if keep then
  redis.call('XACK', KEYS[1], ARGV[1], id) -- what must not stay: see retentionScript
elseif xackdel then
  redis.call('XACKDEL', KEYS[1], ARGV[1], 'ACKED', 'IDS', 1, id)
else
  redis.call('XACK', KEYS[1], ARGV[1], id)
  redis.call('XDEL', KEYS[1], id)
end
return {how, moved}`

// DeadLetter moves an entry to the dead-letter stream and returns its ID there; ""
// if the entry is no longer pending for the consumer. The marks are parts of the
// letter's metadata, by which to find a letter that an earlier call without an
// answer has added.
func (s *Stream) DeadLetter(ctx context.Context, deadLetters, id string, deletes bool, marks, fields []string) (string, Standing, error) {
	args := []any{"eval", deadLetterScript, 2, s.Key, deadLetters} // two keys less that need permission
	if deletes {
		args = []any{"eval", deadLetterScript, 4, s.Key, deadLetters, PositionsKey(s.Key), RetentionKey(s.Key)}
	}
	args = appendAll(append(args, s.Group, id, s.Consumer, len(marks), vanishedFor), marks)
	reply := read(s.once(ctx, cut(args, fields)...))
	how := Standing(reply.text())
	if how != Mine {
		return "", how, reply.failed()
	}
	return reply.text(), how, reply.failed()
}

// Entries returns the entries that are in the stream, by ID.
func (s *Stream) Entries(ctx context.Context, ids []string) (map[string]Entry, error) {
	cmds := make([]redis.Cmder, len(ids))
	for i, id := range ids {
		cmds[i] = redis.NewCmd(ctx, "xrange", s.Key, id, id)
	}
	if err := s.pipeline(ctx, cmds); err != nil {
		return nil, err
	}
	found := make(map[string]Entry, len(ids))
	for _, cmd := range cmds {
		entries, err := entriesOf(cmd.(*redis.Cmd).Val(), redisx.Redacted(cmd.Err()))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			found[e.ID] = e
		}
	}
	return found, nil
}

// pipeline sends the commands together, to the master. Afterwards each has its own
// error.
func (s *Stream) pipeline(ctx context.Context, cmds []redis.Cmder) error {
	master, err := s.Client.Master(ctx, s.Key)
	if err == nil && len(cmds) > 0 {
		redisx.ExecPipeline(ctx, master, cmds)
	}
	return err
}

// Delete deletes the entries and returns the outcome of each.
func (s *Stream) Delete(ctx context.Context, ids []string) ([]error, error) {
	cmds := make([]redis.Cmder, len(ids))
	sent := make([]*redisx.Sent, len(ids))
	for i, id := range ids {
		sent[i] = redisx.NewSent(id)
		cmds[i] = redisx.NewOnce(ctx, "xdel", s.Key, sent[i])
	}
	if err := s.pipeline(ctx, cmds); err != nil {
		return nil, err
	}
	errs := make([]error, len(ids))
	for i, cmd := range cmds {
		errs[i] = sent[i].Outcome(cmd.Err())
		if errs[i] == nil && cmd.(redisx.OnceCmd).Val() == int64(0) {
			errs[i] = ErrMissing
		}
	}
	return errs, nil
}

// replayScript moves a dead letter to its topic, if it exists. XADD comes first: it
// can fail, and a script is not rolled back. The permission for XDEL is checked
// before that.
const replayScript = deniedFunction + joinFunction + `
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return false end
local missing = denied('XDEL', KEYS[1], ARGV[1])
if missing then return missing end
local id = redis.call('XADD', KEYS[2], '*', join(3, ARGV[2]))
redis.call('XDEL', KEYS[1], ARGV[1])
return id`

// MaxFields is below the limit of Lua's unpack: 8,000 values, minus those that a
// call needs.
const MaxFields = 7_900

// Replay is a dead letter to be moved back to a topic.
type Replay struct {
	ID     string
	Topic  string
	Fields []string
	Err    error // the outcome; ErrMissing if the letter does not exist
}

// Replay moves dead letters.
func (s *Stream) Replay(ctx context.Context, moves []*Replay) error {
	var cmds []redis.Cmder
	var scripted []*Replay
	var sent []*redisx.Sent
	for _, m := range moves {
		if len(m.Fields) > MaxFields {
			m.Err = s.replayInTwo(ctx, m)
			continue
		}
		id := redisx.NewSent(m.ID)
		args := []any{"eval", replayScript, 2, s.Key, m.Topic, id}
		args = cut(args, m.Fields)
		cmds, scripted, sent = append(cmds, redisx.NewOnce(ctx, args...)), append(scripted, m), append(sent, id)
	}
	if err := s.pipeline(ctx, cmds); err != nil {
		return err
	}
	for i, m := range scripted {
		if m.Err = sent[i].Outcome(cmds[i].Err()); errors.Is(m.Err, redis.Nil) {
			m.Err = ErrMissing
		}
	}
	return nil
}

// replayInTwo replays a letter with more fields than a script can pass on, in two
// steps.
func (s *Stream) replayInTwo(ctx context.Context, m *Replay) error {
	sent := redisx.NewSent("*")
	args := appendAll([]any{"xadd", m.Topic, sent}, m.Fields)
	if _, err := redisx.Do(ctx, s.Via, "xdel", s.Key, "0-1"); err != nil {
		return err // without that permission it would stay in both streams
	}
	if _, err := s.once(ctx, args...); err != nil {
		return sent.Outcome(err)
	}
	_, err := s.once(ctx, "xdel", s.Key, m.ID)
	if err != nil && !redisx.IsReply(err) {
		return fmt.Errorf("%w: it is in the topic, and may still be in the dead-letter stream: %w", redisx.ErrOutcomeUnknown, err)
	}
	return err
}
