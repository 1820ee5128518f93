package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// This file alone builds commands and reads replies. Two rules hold in it:
//
//   - A command that must not run twice is a onceCmd: go-redis resends what timed
//     out or lost its connection (three times by default), and the first copy
//     may have run.
//   - XCLAIM always says which delivery count it means, so that the count stays
//     exact whatever happens to the answer.

// onceCmd is a command that go-redis does not send again.
type onceCmd struct{ *redis.Cmd }

// NoRetry overrides go-redis's answer, which is no.
func (onceCmd) NoRetry() bool { return true }

// onceRawCmd is onceCmd for a reply that is not parsed.
type onceRawCmd struct{ *redis.RawCmd }

// NoRetry overrides go-redis's answer, which is no.
func (onceRawCmd) NoRetry() bool { return true }

// onceStringCmd is onceCmd for a reply that is a string.
type onceStringCmd struct{ *redis.StringCmd }

// NoRetry overrides go-redis's answer, which is no.
func (onceStringCmd) NoRetry() bool { return true }

func newOnce(ctx context.Context, args ...any) onceCmd {
	return onceCmd{redis.NewCmd(ctx, args...)}
}

// processor is what can run a command: a client, or one connection of it.
type processor interface {
	Process(ctx context.Context, cmd redis.Cmder) error
}

func doOnce(ctx context.Context, p processor, args ...any) (any, error) {
	cmd := newOnce(ctx, args...)
	if err := p.Process(ctx, cmd); err != nil {
		return nil, discreet(err) // and cmd may be still under way
	}
	return cmd.Val(), nil
}

// do is for a command that may run twice: it is sent again if the connection
// broke, which one may have been for long. (go-redis would try three more times;
// but in a pipeline with commands that must not run twice it does not.)
func do(ctx context.Context, p processor, args ...any) (any, error) {
	v, err := doOnce(ctx, p, args...)
	if err != nil && !isReply(err) && ctx.Err() == nil {
		v, err = doOnce(ctx, p, args...)
	}
	return v, err
}

// entry is what a stream holds. Its fields are name, value, name, value, ... in
// the stream's order, duplicates included, which go-redis's map would lose.
type entry struct {
	id     string
	fields []string
}

// pendingEntry is a row of XPENDING.
type pendingEntry struct {
	id       string
	consumer string
	idle     time.Duration
	count    int64
}

// groupInfo is what XINFO GROUPS says of our group.
type groupInfo struct {
	lastDelivered string
	pending       int64
	consumers     int64
	lag           int64 // -1 if the server cannot tell
}

// stream is a topic as one consumer of one group sees it.
type stream struct {
	client   redis.UniversalClient
	via      processor // what commands go through: the client, or a line over it
	key      string
	group    string
	consumer string
}

// newStream returns a stream whose commands go to the client by themselves.
func newStream(client redis.UniversalClient, key, group string) stream {
	return stream{client: client, via: client, key: key, group: group}
}

// master is where to ask what decides about an entry: a Cluster client may be
// told to send reads to replicas, and one that lags behind shows entries as
// acked or deleted that are not.
func (s *stream) master(ctx context.Context) (processor, error) {
	if _, ok := s.client.(*redis.ClusterClient); ok {
		return s.node(ctx)
	}
	return s.via, nil
}

func (s *stream) node(ctx context.Context) (redis.UniversalClient, error) {
	switch c := s.client.(type) {
	case *redis.ClusterClient:
		return c.MasterForKey(ctx, s.key)
	case *redis.Ring:
		return c.GetShardClientForKey(s.key)
	}
	return s.client, nil
}

// lookAgain makes a Cluster's client ask where the slots are now, if the error
// may be about that. By itself it does so when it is redirected, and else once a
// minute; but what is sent to a node's own client (see master and newLink) is
// not redirected. It asks in the background, and every 200 ms at most.
func lookAgain(client redis.UniversalClient, err error) {
	cluster, ok := client.(*redis.ClusterClient)
	var broken net.Error
	if ok && (replyHas(err, "MOVED ", "ASK ", "CLUSTERDOWN", "READONLY") || errors.As(err, &broken)) {
		cluster.ReloadState(context.Background())
	}
}

// ask sends a command to the master that only reads, or else may run twice.
func (s *stream) ask(ctx context.Context, args ...any) (any, error) {
	master, err := s.master(ctx)
	if err != nil {
		return nil, err
	}
	v, err := do(ctx, master, args...)
	if replyHas(err, "MOVED ") && s.reroute(ctx) {
		if master, err = s.master(ctx); err == nil {
			v, err = do(ctx, master, args...)
		}
	}
	return v, err
}

// reroute is lookAgain for who cannot try again later: it waits for the answer.
func (s *stream) reroute(ctx context.Context) bool {
	cluster, ok := s.client.(*redis.ClusterClient)
	// ForEachMaster asks where they are, before it calls.
	return ok && cluster.ForEachMaster(ctx, func(context.Context, *redis.Client) error { return nil }) == nil
}

// createGroup makes the group, and the stream with it, to deliver what comes
// after start. That the group exists already is success.
func (s *stream) createGroup(ctx context.Context, start string) error {
	_, err := do(ctx, s.via, "xgroup", "create", s.key, s.group, start, "mkstream")
	if replyHas(err, "BUSYGROUP") {
		return nil
	}
	return err
}

// reading is what was read of one stream.
type reading struct {
	key     string
	entries []entry
}

// createConsumer makes the consumer known to the group. Before 7.2 one that waits
// for its first entry is not.
func (s *stream) createConsumer(ctx context.Context) error {
	_, err := do(ctx, s.via, "xgroup", "createconsumer", s.key, s.group, s.consumer)
	return err
}

// cursor is a stream and the ID after which to read it: ">" is what the group has
// not delivered yet.
type cursor struct{ key, after string }

// read reads streams of one group, up to count entries of each, on the connection
// given. It waits for the first of them up to block; a negative block does not
// wait. It returns none, without an error, when there are none. The buffer is there to
// be used again.
func (s *stream) read(ctx context.Context, p processor, buf *replyBuffer, from []cursor, count int, block time.Duration, noAck bool) ([]reading, error) {
	args := make([]any, 0, 10+2*len(from))
	if s.group == "" {
		args = append(args, "xread")
	} else {
		args = append(args, "xreadgroup", "group", s.group, s.consumer)
	}
	args = append(args, "count", count)
	if block >= 0 {
		args = append(args, "block", block.Milliseconds())
	}
	if noAck {
		args = append(args, "noack")
	}
	args = append(args, "streams")
	for _, c := range from {
		args = append(args, c.key)
	}
	for _, c := range from {
		args = append(args, c.after)
	}
	buf.b = buf.b[:0] // what a failed read has left
	if err := p.Process(ctx, redis.NewRawWriteToCmd(ctx, buf, args...)); err != nil {
		return nil, discreet(err) // and in a line it may be still under way
	}
	readings, err := buf.take().readings()
	return readings, discreet(err)
}

// readNow is read of what is there, of this stream, through what other commands go
// through too.
func (s *stream) readNow(ctx context.Context, from cursor, count int, noAck bool) ([]entry, error) {
	read := func() ([]reading, error) {
		return s.read(ctx, s.via, new(replyBuffer), []cursor{from}, count, -1, noAck)
	}
	readings, err := read()
	if replyHas(err, "MOVED ") && s.reroute(ctx) {
		readings, err = read()
	}
	if err != nil || len(readings) == 0 {
		return nil, err
	}
	return readings[0].entries, nil
}

// claim takes the entry over with the delivery count given, if it has been idle
// for minIdle at least. It returns nil when it has not, or when it is not
// pending any more, or when it is not in the stream any more; in the last case
// the server drops it from the pending entries.
func (s *stream) claim(ctx context.Context, id string, minIdle time.Duration, count int64) (*entry, error) {
	return s.firstEntry(ctx, "xclaim", s.key, s.group, s.consumer, minIdle.Milliseconds(), id, "retrycount", count)
}

// firstEntry sends a command that answers with entries.
func (s *stream) firstEntry(ctx context.Context, args ...any) (*entry, error) {
	v, err := doOnce(ctx, s.via, args...)
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

// claimFrom is claim of what is pending in another consumer's name with one
// delivery less, however idle.
func (s *stream) claimFrom(ctx context.Context, consumer, id string, count int64) (*entry, error) {
	return s.firstEntry(ctx, "eval", claimFromScript, 1, s.key, s.group, id, consumer, s.consumer, count)
}

// renew resets the idle time of those of the entries that have been idle for
// minIdle at least, and returns which these were.
func (s *stream) renew(ctx context.Context, minIdle time.Duration, ids []string) (map[string]bool, error) {
	return s.claimIDs(ctx, s.consumer, minIdle, ids)
}

// assign gives the entries to a consumer with the delivery count given, under
// the same condition as renew.
func (s *stream) assign(ctx context.Context, consumer string, minIdle time.Duration, count int64, ids []string) (map[string]bool, error) {
	return s.claimIDs(ctx, consumer, minIdle, ids, "retrycount", count)
}

// restore puts the entries back among the pending ones, even where the group
// does not know them (minIdle is only asked of what it knows).
func (s *stream) restore(ctx context.Context, minIdle time.Duration, count int64, ids []string) (map[string]bool, error) {
	return s.claimIDs(ctx, s.consumer, minIdle, ids, "retrycount", count, "force")
}

func (s *stream) claimIDs(ctx context.Context, consumer string, minIdle time.Duration, ids []string, opts ...any) (map[string]bool, error) {
	args := make([]any, 0, 6+len(ids)+len(opts))
	args = append(args, "xclaim", s.key, s.group, consumer, minIdle.Milliseconds())
	for _, id := range ids {
		args = append(args, id)
	}
	v, err := doOnce(ctx, s.via, append(append(args, opts...), "justid")...)
	if err != nil {
		return nil, err
	}
	rows, _ := v.([]any)
	got := make(map[string]bool, len(rows))
	for _, row := range rows {
		if id, ok := row.(string); ok {
			got[id] = true
		}
	}
	return got, nil
}

// ack acks the entries, given as strings or pointers to them. It may run twice.
func (s *stream) ack(ctx context.Context, ids ...any) error {
	_, err := doOnce(ctx, s.via, append([]any{"xack", s.key, s.group}, ids...)...)
	return err
}

// ackAndDelete acks the entries and deletes those that no other group needs
// any more, with XACKDEL (Redis 8.2).
func (s *stream) ackAndDelete(ctx context.Context, ids ...any) error {
	args := []any{"xackdel", s.key, s.group, "acked", "ids", len(ids)}
	_, err := doOnce(ctx, s.via, append(args, ids...)...)
	return err
}

// deniedFunction is for scripts of which one half must not happen without the other:
// a command that is denied to a script ends it, and undoes nothing. It returns an
// error if the command would be denied. (To try it on an ID that no entry has would
// be a write, after which a server that is full of memory refuses nothing. The
// embedded server has neither the function nor ACLs.)
const deniedFunction = `
local function denied(...)
  if not redis.acl_check_cmd or redis.acl_check_cmd(...) then return nil end
  return redis.error_reply('NOPERM no permissions to run ' .. (...) .. ': nothing is done')
end`

// hasAckAndDelete asks the server for XACKDEL, of an ID that no stream has, so that
// nothing happens. denied is true of the error where it is not to be had. (The node
// is asked, since a Cluster's client writes to stderr of commands that it does not
// know.)
func (s *stream) hasAckAndDelete(ctx context.Context) error {
	_, err := s.ask(ctx, "xackdel", s.key, s.group, "acked", "ids", 1, "0-1")
	return err
}

// groupCount returns how many groups the stream has.
func (s *stream) groupCount(ctx context.Context) (int, error) {
	v, err := s.ask(ctx, "xinfo", "groups", s.key)
	groups, _ := v.([]any)
	return len(groups), err
}

// ackDeleteScript is ackAndDelete for a server without XACKDEL. Only where
// there is one group can it know that no other one needs the entry. Deleting
// only what XACK took keeps an entry that was acked in vain (its lease was
// lost, say) for whoever has it. A stream that is gone is no error for XACK either.
const ackDeleteScript = deniedFunction + `
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then
  if string.find(groups.err, 'no such key') then return redis.status_reply('OK') end
  return groups
end
if #groups > 1 then return redis.error_reply('SEVERALGROUPS') end
local missing = denied('XDEL', KEYS[1], '0-1')
if missing then return missing end
for i = 2, #ARGV do
  if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then
    redis.call('XDEL', KEYS[1], ARGV[i])
  end
end
return redis.status_reply('OK')`

func (s *stream) ackAndDeleteByScript(ctx context.Context, ids ...any) error {
	_, err := doOnce(ctx, s.via, append([]any{"eval", ackDeleteScript, 1, s.key, s.group}, ids...)...)
	return err
}

// pending returns the entries that have been idle for idle at least, from the
// ID start on ("(" before an ID: after it), at most count. A consumer's name
// limits it to that consumer's.
func (s *stream) pending(ctx context.Context, idle time.Duration, start, end string, count int, consumer string) ([]pendingEntry, error) {
	args := []any{"xpending", s.key, s.group}
	if idle > 0 {
		args = append(args, "idle", idle.Milliseconds())
	}
	args = append(args, start, end, count)
	if consumer != "" {
		args = append(args, consumer)
	}
	v, err := s.ask(ctx, args...)
	if err != nil {
		return nil, err
	}
	rows, _ := v.([]any)
	out := make([]pendingEntry, 0, len(rows))
	for _, row := range rows {
		cols, ok := row.([]any)
		if !ok || len(cols) != 4 {
			return nil, fmt.Errorf("goxstreams: XPENDING: unexpected row %v", row)
		}
		id, _ := cols[0].(string)
		name, _ := cols[1].(string)
		idle, _ := cols[2].(int64)
		n, _ := cols[3].(int64)
		out = append(out, pendingEntry{id, name, time.Duration(idle) * time.Millisecond, n})
	}
	return out, nil
}

// pendingSummary returns how many entries of the group are pending, and the
// first of their IDs.
func (s *stream) pendingSummary(ctx context.Context) (count int64, first string, err error) {
	v, err := s.ask(ctx, "xpending", s.key, s.group)
	if err != nil {
		return 0, "", err
	}
	if cols, ok := v.([]any); ok && len(cols) > 1 {
		if n, ok := cols[0].(int64); ok {
			first, _ = cols[1].(string) // nil if there is none
			return n, first, nil
		}
	}
	return 0, "", fmt.Errorf("goxstreams: XPENDING: unexpected reply %v", v)
}

// look returns the entry as the stream holds it, and its row among the pending
// ones; nil for what is not there. The stream is asked first: an entry that is
// acked and deleted in between does not look deleted while pending.
func (s *stream) look(ctx context.Context, id string) (*entry, *pendingEntry, error) {
	v, err := s.ask(ctx, "xrange", s.key, id, id)
	if err != nil {
		return nil, nil, err
	}
	entries, err := parseEntries(v)
	if err != nil {
		return nil, nil, err
	}
	rows, err := s.pending(ctx, 0, id, id, 1, "")
	if err != nil {
		return nil, nil, err
	}
	var e *entry
	var p *pendingEntry
	if len(entries) > 0 {
		e = &entries[0]
	}
	if len(rows) > 0 {
		p = &rows[0]
	}
	return e, p, nil
}

// groupInfo returns what the server knows of the group.
func (s *stream) groupInfo(ctx context.Context) (groupInfo, error) {
	v, err := s.ask(ctx, "xinfo", "groups", s.key)
	if err != nil {
		if replyHas(err, "no such key") {
			return groupInfo{}, errNoGroup
		}
		return groupInfo{}, err
	}
	groups, _ := v.([]any)
	for _, g := range groups {
		if lookup(g, "name") != s.group {
			continue
		}
		var info groupInfo
		info.lastDelivered, _ = lookup(g, "last-delivered-id").(string)
		info.pending, _ = lookup(g, "pending").(int64)
		info.consumers, _ = lookup(g, "consumers").(int64)
		lag, known := lookup(g, "lag").(int64)
		if info.lag = lag; !known {
			info.lag = -1
		}
		return info, nil
	}
	return groupInfo{}, errNoGroup
}

// consumerInfo is what XINFO CONSUMERS says of one of them.
type consumerInfo struct {
	name    string
	pending int64
	idle    time.Duration // since it took or renewed something, at least
}

func (s *stream) consumers(ctx context.Context) ([]consumerInfo, error) {
	v, err := s.ask(ctx, "xinfo", "consumers", s.key, s.group)
	if err != nil {
		return nil, err
	}
	rows, _ := v.([]any)
	all := make([]consumerInfo, len(rows))
	for i, row := range rows {
		all[i].name, _ = lookup(row, "name").(string)
		all[i].pending, _ = lookup(row, "pending").(int64)
		idle, _ := lookup(row, "idle").(int64)
		all[i].idle = time.Duration(idle) * time.Millisecond
	}
	return all, nil
}

// unknown reports whether the group does not know the consumer, which had something
// pending a moment ago: it was made anew since, by somebody else.
func (s *stream) unknown(ctx context.Context) bool {
	consumers, err := s.consumers(ctx)
	return err == nil && !slices.ContainsFunc(consumers, func(c consumerInfo) bool { return c.name == s.consumer })
}

// errNoGroup stands for NOGROUP where the server says it by leaving out.
var errNoGroup = redisReply("NOGROUP no such group")

type redisReply string

func (e redisReply) Error() string { return string(e) }
func (redisReply) RedisError()     {}

// lastID returns the greatest ID that the stream ever had; "0-0" without a
// stream.
func (s *stream) lastID(ctx context.Context) (string, error) {
	v, err := s.ask(ctx, "xinfo", "stream", s.key)
	if err != nil {
		if replyHas(err, "no such key") {
			return "0-0", nil
		}
		return "", err
	}
	if id, ok := lookup(v, "last-generated-id").(string); ok {
		return id, nil
	}
	return "", fmt.Errorf("goxstreams: XINFO STREAM %s: no last-generated-id", s.key)
}

// lookup finds a name in a reply that is a map (RESP3) or a flat list (RESP2).
func lookup(v any, name string) any {
	switch v := v.(type) {
	case map[any]any:
		return v[name]
	case []any:
		for i := 0; i+1 < len(v); i += 2 {
			if v[i] == name {
				return v[i+1]
			}
		}
	}
	return nil
}

// removeConsumersScript removes consumers with nothing pending: the one named
// in ARGV[2], or if that is empty all that are idle for ARGV[3] milliseconds.
// XGROUP DELCONSUMER drops what is pending for good, so that asking and
// removing must be one step. It returns how many; -1 if that named has something.
const removeConsumersScript = `
local removed = 0
for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local f = {}
  for i = 1, #c, 2 do f[c[i]] = c[i + 1] end
  if f['pending'] == 0 and (f['name'] == ARGV[2] or (ARGV[2] == '' and f['idle'] >= tonumber(ARGV[3]))) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], f['name'])
    removed = removed + 1
  elseif f['name'] == ARGV[2] then
    return -1
  end
end
return removed`

// removeConsumer removes the consumer, unless something is pending in its name. It
// returns whether nothing is.
func (s *stream) removeConsumer(ctx context.Context) (bool, error) {
	v, err := doOnce(ctx, s.via, "eval", removeConsumersScript, 1, s.key, s.group, s.consumer, 0)
	if groupLost(err) {
		return true, nil
	}
	return err == nil && v != int64(-1), err
}

func (s *stream) removeIdleConsumers(ctx context.Context, idle time.Duration) (int64, error) {
	v, err := doOnce(ctx, s.via, "eval", removeConsumersScript, 1, s.key, s.group, "", idle.Milliseconds())
	n, _ := v.(int64)
	return n, err
}

// buryScript moves an entry to the dead-letter stream, once: only while it is
// pending in the caller's name, with the delivery count that it knows. Run again after a lost
// answer it finds the entry acked and stores nothing. The rights to what follows
// XADD are asked for before.
const buryScript = deniedFunction + `
local p = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if #p == 0 or p[1][2] ~= ARGV[4] or p[1][4] ~= tonumber(ARGV[3]) then return false end
local missing, groups
if ARGV[5] == 'xackdel' then
  missing = denied('XACKDEL', KEYS[1], ARGV[1], 'ACKED', 'IDS', 1, ARGV[2])
else
  missing = denied('XACK', KEYS[1], ARGV[1], ARGV[2])
end
if ARGV[5] == 'xdel' then
  missing = missing or denied('XDEL', KEYS[1], ARGV[2])
  groups = #redis.call('XINFO', 'GROUPS', KEYS[1])
end
if missing then return missing end
local id = redis.call('XADD', KEYS[2], '*', unpack(ARGV, 6))
if ARGV[5] == 'xackdel' then
  redis.call('XACKDEL', KEYS[1], ARGV[1], 'ACKED', 'IDS', 1, ARGV[2])
else
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  if groups == 1 then redis.call('XDEL', KEYS[1], ARGV[2]) end
end
return id`

// bury moves an entry to the dead-letter stream and returns its ID there, or ""
// if it is not ours to move any more. acking is how it leaves the topic: by xack,
// xackdel, or xdel.
func (s *stream) bury(ctx context.Context, deadLetters, id string, count int64, acking string, fields []any) (string, error) {
	args := append([]any{"eval", buryScript, 2, s.key, deadLetters, s.group, id, count, s.consumer, acking}, fields...)
	v, err := doOnce(ctx, s.via, args...)
	if err == redis.Nil {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	deadID, _ := v.(string)
	return deadID, nil
}

// addIfPending is the first half of bury without the right to EVAL; to ack is the
// second. Its window: where the process ends, an answer is lost, or the entry is
// settled elsewhere between these commands, it is stored twice. (MULTI would close
// most of that, and open a worse one: its XACK runs even if its XADD fails.)
func (s *stream) addIfPending(ctx context.Context, deadLetters, id string, count int64, fields []any) (string, error) {
	rows, err := s.pending(ctx, 0, id, id, 1, "")
	if err != nil || len(rows) == 0 || rows[0].count != count || rows[0].consumer != s.consumer {
		return "", err
	}
	if err := s.ack(ctx, "0-1"); err != nil {
		return "", err // without the right to XACK it would be stored at each try
	}
	v, err := doOnce(ctx, s.via, append([]any{"xadd", deadLetters, "*"}, fields...)...)
	if err != nil {
		return "", err
	}
	deadID, _ := v.(string)
	return deadID, nil
}

// length returns the number of entries.
func (s *stream) length(ctx context.Context) (int64, error) {
	v, err := s.ask(ctx, "xlen", s.key)
	n, _ := v.(int64)
	return n, err
}

// page returns at most count entries from start to end.
func (s *stream) page(ctx context.Context, start, end string, count int) ([]entry, error) {
	v, err := s.ask(ctx, "xrange", s.key, start, end, "count", count)
	if err != nil {
		return nil, err
	}
	return parseEntries(v)
}

// newest returns the ID of the last entry; "" without any.
func (s *stream) newest(ctx context.Context) (string, error) {
	v, err := s.ask(ctx, "xrevrange", s.key, "+", "-", "count", 1)
	if err != nil {
		return "", err
	}
	entries, err := parseEntries(v)
	if err != nil || len(entries) == 0 {
		return "", err
	}
	return entries[0].id, nil
}

// entries returns those of the entries that are in the stream.
func (s *stream) entries(ctx context.Context, ids []string) (map[string]entry, error) {
	node, err := s.node(ctx)
	if err != nil {
		return nil, err
	}
	cmds, err := node.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for _, id := range ids {
			pipe.Do(ctx, "xrange", s.key, id, id)
		}
		return nil
	})
	if err != nil {
		return nil, discreet(err)
	}
	found := make(map[string]entry, len(ids))
	for _, cmd := range cmds {
		entries, err := parseEntries(cmd.(*redis.Cmd).Val())
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			found[e.id] = e
		}
	}
	return found, nil
}

// delete deletes the entries and returns what became of each.
func (s *stream) delete(ctx context.Context, ids []string) ([]error, error) {
	cmds := make([]onceCmd, len(ids))
	for i, id := range ids {
		cmds[i] = newOnce(ctx, "xdel", s.key, id)
	}
	s.pipeline(ctx, cmds)
	errs := make([]error, len(ids))
	for i, cmd := range cmds {
		if errs[i] = outcome(cmd.Err()); errs[i] == nil && cmd.Val() == int64(0) {
			errs[i] = errMissing
		}
	}
	return errs, nil
}

// pipeline sends the commands together, once. Each has its own error then.
func (s *stream) pipeline(ctx context.Context, cmds []onceCmd) {
	if len(cmds) == 0 {
		return
	}
	all := make([]redis.Cmder, len(cmds))
	for i, cmd := range cmds {
		all[i] = cmd
	}
	execPipeline(ctx, s.client, all)
}

// replayScript moves a dead letter to its topic, while it is there. XADD comes
// first: it can fail, and nothing undoes what a script has done before. The right
// to XDEL is asked for before that.
const replayScript = deniedFunction + `
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return false end
local missing = denied('XDEL', KEYS[1], ARGV[1])
if missing then return missing end
local id = redis.call('XADD', KEYS[2], '*', unpack(ARGV, 2))
redis.call('XDEL', KEYS[1], ARGV[1])
return id`

// maxUnpack is below what Lua's unpack takes, 8,000 values less what a call needs.
const maxUnpack = 7_900

// move is a dead letter on its way to a topic.
type move struct {
	id     string
	topic  string
	fields []string
	err    *error // what became of it
}

// replay moves dead letters.
func (s *stream) replay(ctx context.Context, moves []move) {
	var cmds []onceCmd
	var scripted []move
	for _, m := range moves {
		if len(m.fields) > maxUnpack {
			*m.err = s.replayInTwo(ctx, m)
			continue
		}
		args := []any{"eval", replayScript, 2, s.key, m.topic, m.id}
		for _, f := range m.fields {
			args = append(args, f)
		}
		cmds, scripted = append(cmds, newOnce(ctx, args...)), append(scripted, m)
	}
	s.pipeline(ctx, cmds)
	for i, m := range scripted {
		switch err := cmds[i].Err(); {
		case err == redis.Nil:
			*m.err = errMissing
		case noScripts(err):
			*m.err = s.replayInTwo(ctx, m)
		default:
			*m.err = outcome(err)
		}
	}
}

// replayInTwo is for what a script cannot take, or for where there are none.
func (s *stream) replayInTwo(ctx context.Context, m move) error {
	args := []any{"xadd", m.topic, "*"}
	for _, f := range m.fields {
		args = append(args, f)
	}
	if _, err := do(ctx, s.via, "xdel", s.key, "0-1"); err != nil {
		return err // without that right it would stay in both
	}
	if _, err := doOnce(ctx, s.via, args...); err != nil {
		return outcome(err)
	}
	v, err := doOnce(ctx, s.via, "xdel", s.key, m.id)
	if err == nil && v == int64(0) {
		return nil // moved or deleted by somebody else just now
	}
	return outcome(err)
}

// knowsIdempotence reports whether XADD IDMP can be relied on. The server is asked for
// XIDMPRECORD, which came with Redis 8.6.2 and what that mended: what 8.6.0 and 8.6.1
// remember does not outlive a rewrite of the AOF as commands. It is asked without the
// arguments that it needs, so that nothing happens, and that no right is needed.
func (s *stream) knowsIdempotence(ctx context.Context) (bool, error) {
	_, err := s.ask(ctx, "xidmprecord", s.key)
	switch {
	case replyHas(err, "unknown command"):
		return false, nil
	case replyHas(err, "wrong number of arguments", "NOPERM"):
		return true, nil
	case err == nil:
		return false, errors.New("XIDMPRECORD without arguments is no error")
	}
	return false, err
}

// setIdempotence sets for how long and how many UUIDs the stream remembers. It makes
// the stream if need be: what is remembered before it is set would be forgotten. It
// may run twice.
func (s *stream) setIdempotence(ctx context.Context, window time.Duration, maxIDs int64) error {
	set := func() error {
		_, err := s.ask(ctx, "xcfgset", s.key, "idmp-duration", int64(window/time.Second), "idmp-maxsize", maxIDs)
		return err
	}
	err := set()
	if !replyHas(err, "no such key") {
		return err
	}
	// An entry with the least ID there is, trimmed away in the same step, leaves an
	// empty stream. One that ever had an entry refuses the ID, before it trims.
	_, err = s.ask(ctx, "xadd", s.key, "maxlen", 0, "0-1", "-", "-")
	if err != nil && !replyHas(err, "equal or smaller") {
		return err
	}
	return set()
}

// unsupported is the error for what this server does not have.
func (s *stream) unsupported(ctx context.Context, what string) error {
	return fmt.Errorf("%w: %s; this is %s", ErrUnsupported, what, s.version(ctx))
}

// version is what the server says that it is. It is for messages only: Valkey says
// that it is Redis 7.2.4 as well, and services have features of their own.
func (s *stream) version(ctx context.Context) string {
	v, _ := s.ask(ctx, "info", "server")
	info, _ := v.(string)
	for _, server := range []struct{ field, name string }{{"valkey_version:", "Valkey "}, {"redis_version:", "Redis "}} {
		if _, after, ok := strings.Cut(info, server.field); ok {
			version, _, _ := strings.Cut(after, "\r\n")
			return server.name + version
		}
	}
	return "a server that does not say its version"
}

// exists returns an error if the server knows that the group is not there.
func (s *stream) exists(ctx context.Context) error {
	_, err := s.groupInfo(ctx)
	switch {
	case groupLost(err):
		return fmt.Errorf("group %q of topic %q does not exist any more", s.group, s.key)
	case denied(err):
		return nil
	}
	return err
}

// parseEntries reads the entries of an answer that go-redis has parsed.
func parseEntries(v any) ([]entry, error) {
	rows, ok := v.([]any)
	if !ok && v != nil {
		return nil, fmt.Errorf("goxstreams: entries expected, got %T", v)
	}
	entries := make([]entry, 0, len(rows))
	for _, row := range rows {
		pair, ok := row.([]any)
		if !ok || len(pair) != 2 {
			continue // before 7.0 XCLAIM answers nil for what was deleted
		}
		id, ok := pair[0].(string)
		if !ok {
			return nil, fmt.Errorf("goxstreams: an entry's ID expected, got %T", pair[0])
		}
		values, _ := pair[1].([]any)
		fields := make([]string, len(values))
		for i, v := range values {
			fields[i], _ = v.(string)
		}
		entries = append(entries, entry{id, fields})
	}
	return entries, nil
}

// compareIDs orders entry IDs. A missing sequence number is zero.
func compareIDs(a, b string) int {
	am, as := splitID(a)
	bm, bs := splitID(b)
	switch {
	case am < bm || am == bm && as < bs:
		return -1
	case am == bm && as == bs:
		return 0
	}
	return 1
}

func splitID(id string) (ms, seq uint64) {
	head, tail, _ := strings.Cut(id, "-")
	ms, _ = strconv.ParseUint(head, 10, 64)
	seq, _ = strconv.ParseUint(tail, 10, 64)
	return ms, seq
}
