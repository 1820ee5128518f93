package goxstreams

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
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

func newOnce(ctx context.Context, args ...any) onceCmd {
	return onceCmd{redis.NewCmd(ctx, args...)}
}

// processor is what can run a command: a client, or one connection of it.
type processor interface {
	Process(ctx context.Context, cmd redis.Cmder) error
}

func doOnce(ctx context.Context, p processor, args ...any) (any, error) {
	cmd := newOnce(ctx, args...)
	err := p.Process(ctx, cmd)
	return cmd.Val(), err
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
}

// stream is a topic as one consumer of one group sees it.
type stream struct {
	client   redis.UniversalClient
	key      string
	group    string
	consumer string
}

// master is where to ask what decides about an entry: a Cluster client may be
// told to send reads to replicas, and one that lags behind shows entries as
// acked or deleted that are not.
func (s *stream) master(ctx context.Context) (redis.UniversalClient, error) {
	if cluster, ok := s.client.(*redis.ClusterClient); ok {
		return cluster.MasterForKey(ctx, s.key)
	}
	return s.client, nil
}

// ask sends a command that only reads to the master.
func (s *stream) ask(ctx context.Context, args ...any) (any, error) {
	master, err := s.master(ctx)
	if err != nil {
		return nil, err
	}
	return master.Do(ctx, args...).Result()
}

// createGroup makes the group, and the stream with it, to deliver what comes
// after start. That the group exists already is success.
func (s *stream) createGroup(ctx context.Context, start string) error {
	err := s.client.Do(ctx, "xgroup", "create", s.key, s.group, start, "mkstream").Err()
	if replyHas(err, "BUSYGROUP") {
		return nil
	}
	return err
}

// read waits up to block for entries that the group has not delivered yet. It
// returns none, without an error, when there are none.
func (s *stream) read(ctx context.Context, p processor, count int, block time.Duration, noAck bool) ([]entry, error) {
	args := []any{"xreadgroup", "group", s.group, s.consumer, "count", count, "block", block.Milliseconds()}
	if noAck {
		args = append(args, "noack")
	}
	return readReply(doOnce(ctx, p, append(args, "streams", s.key, ">")...))
}

// readAfter waits up to block for entries after the ID, without a group.
func (s *stream) readAfter(ctx context.Context, p processor, after string, count int, block time.Duration) ([]entry, error) {
	return readReply(doOnce(ctx, p, "xread", "count", count, "block", block.Milliseconds(), "streams", s.key, after))
}

// claim takes the entry over with the delivery count given, if it has been idle
// for minIdle at least. It returns nil when it has not, or when it is not
// pending any more, or when it is not in the stream any more; in the last case
// the server drops it from the pending entries.
func (s *stream) claim(ctx context.Context, id string, minIdle time.Duration, count int64) (*entry, error) {
	v, err := doOnce(ctx, s.client, "xclaim", s.key, s.group, s.consumer, minIdle.Milliseconds(), id, "retrycount", count)
	if err != nil {
		return nil, err
	}
	entries, err := parseEntries(v)
	if err != nil || len(entries) == 0 {
		return nil, err
	}
	return &entries[0], nil
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
	v, err := doOnce(ctx, s.client, append(append(args, opts...), "justid")...)
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

// ack acks the entries. It may be sent again.
func (s *stream) ack(ctx context.Context, ids []string) error {
	return s.client.Do(ctx, s.withIDs([]any{"xack", s.key, s.group}, ids)...).Err()
}

func (s *stream) withIDs(args []any, ids []string) []any {
	for _, id := range ids {
		args = append(args, id)
	}
	return args
}

// ackAndDelete acks the entries and deletes those that no other group needs
// any more, with XACKDEL (Redis 8.2).
func (s *stream) ackAndDelete(ctx context.Context, ids []string) error {
	args := []any{"xackdel", s.key, s.group, "acked", "ids", len(ids)}
	return s.client.Do(ctx, s.withIDs(args, ids)...).Err()
}

// ackDeleteScript is ackAndDelete for a server without XACKDEL. Only where
// there is one group can it know that no other one needs the entry. Deleting
// only what XACK took keeps an entry that was acked in vain (its lease was
// lost, say) for whoever has it.
const ackDeleteScript = `
if #redis.call('XINFO', 'GROUPS', KEYS[1]) > 1 then
  return redis.error_reply('SEVERALGROUPS')
end
for i = 2, #ARGV do
  if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then
    redis.call('XDEL', KEYS[1], ARGV[i])
  end
end
return redis.status_reply('OK')`

func (s *stream) ackAndDeleteByScript(ctx context.Context, ids []string) error {
	return s.client.Do(ctx, s.withIDs([]any{"eval", ackDeleteScript, 1, s.key, s.group}, ids)...).Err()
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

// pendingCount returns how many entries of the group are pending.
func (s *stream) pendingCount(ctx context.Context) (int64, error) {
	v, err := s.ask(ctx, "xpending", s.key, s.group)
	if err != nil {
		return 0, err
	}
	if cols, ok := v.([]any); ok && len(cols) > 0 {
		if n, ok := cols[0].(int64); ok {
			return n, nil
		}
	}
	return 0, fmt.Errorf("goxstreams: XPENDING: unexpected reply %v", v)
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
	master, err := s.master(ctx)
	if err != nil {
		return groupInfo{}, err
	}
	groups, err := master.XInfoGroups(ctx, s.key).Result()
	if err != nil {
		if replyHas(err, "no such key") {
			return groupInfo{}, errNoGroup
		}
		return groupInfo{}, err
	}
	for _, g := range groups {
		if g.Name == s.group {
			return groupInfo{g.LastDeliveredID, g.Pending, g.Consumers}, nil
		}
	}
	return groupInfo{}, errNoGroup
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
// removing must be one step.
const removeConsumersScript = `
local removed = 0
for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local f = {}
  for i = 1, #c, 2 do f[c[i]] = c[i + 1] end
  if f['pending'] == 0 and (f['name'] == ARGV[2] or (ARGV[2] == '' and f['idle'] >= tonumber(ARGV[3]))) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], f['name'])
    removed = removed + 1
  end
end
return removed`

func (s *stream) removeConsumer(ctx context.Context) error {
	return s.client.Do(ctx, "eval", removeConsumersScript, 1, s.key, s.group, s.consumer, 0).Err()
}

func (s *stream) removeIdleConsumers(ctx context.Context, idle time.Duration) (int64, error) {
	return s.client.Do(ctx, "eval", removeConsumersScript, 1, s.key, s.group, "", idle.Milliseconds()).Int64()
}

// buryScript moves an entry to the dead-letter stream, once: only while it is
// pending with the delivery count that the caller knows. Run again after a lost
// answer it finds the entry acked and stores nothing.
const buryScript = `
local p = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if #p == 0 or p[1][4] ~= tonumber(ARGV[3]) then return false end
local id = redis.call('XADD', KEYS[2], '*', unpack(ARGV, 4))
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
return id`

// bury moves an entry to the dead-letter stream and returns its ID there, or ""
// if it is not ours to move any more.
func (s *stream) bury(ctx context.Context, deadLetters, id string, count int64, fields []any) (string, error) {
	args := append([]any{"eval", buryScript, 2, s.key, deadLetters, s.group, id, count}, fields...)
	v, err := doOnce(ctx, s.client, args...)
	if err == redis.Nil {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	deadID, _ := v.(string)
	return deadID, nil
}

// buryInTwo is bury without the right to EVAL. Its window: where the process
// ends, the answer is lost, or the entry is settled elsewhere between the two
// commands, it is stored twice. (MULTI would close most of that, and open a
// worse one: its XACK runs even if its XADD fails.)
func (s *stream) buryInTwo(ctx context.Context, deadLetters, id string, count int64, fields []any) (string, error) {
	rows, err := s.pending(ctx, 0, id, id, 1, "")
	if err != nil || len(rows) == 0 || rows[0].count != count {
		return "", err
	}
	v, err := doOnce(ctx, s.client, append([]any{"xadd", deadLetters, "*"}, fields...)...)
	if err != nil {
		return "", err
	}
	deadID, _ := v.(string)
	return deadID, s.ack(ctx, []string{id})
}

// readReply takes the entries out of the answer of XREAD and XREADGROUP for a
// single stream.
func readReply(v any, err error) ([]entry, error) {
	if err == redis.Nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	switch v := v.(type) {
	case map[any]any: // RESP3: stream -> entries
		for _, entries := range v {
			return parseEntries(entries)
		}
	case []any: // RESP2: [[stream, entries]]
		for _, row := range v {
			if pair, ok := row.([]any); ok && len(pair) == 2 {
				return parseEntries(pair[1])
			}
		}
	}
	return nil, nil
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

// link is a connection of its own for reads that block, and what it takes to
// wake such a read: it does not heed its context.
type link struct {
	conn  processor
	close func()
	node  *redis.Client // the connection's node, for CLIENT UNBLOCK; nil: cannot wake
	id    int64
}

// borrowed counts the pool connections that blocked reads of this process hold,
// for each client, over all Subscribers: more than half of a pool they do not
// take, so that they cannot starve whoever else uses the client.
var borrowed = struct {
	sync.Mutex
	n map[*redis.Client]int
}{n: map[*redis.Client]int{}}

// readGrace is added to a read's BLOCK for the answer to arrive (go-redis adds
// as much).
const readGrace = 10 * time.Second

// unwakableBlock bounds a read that cannot be woken: Close waits for it.
const unwakableBlock = time.Second

// newLink opens a connection for reads that block up to block. The connection
// is the client's, with its hooks, as long as its pool has room for that; else
// one made from the same options.
func newLink(ctx context.Context, client redis.UniversalClient, key string, block time.Duration) (*link, error) {
	var node *redis.Client
	switch c := client.(type) {
	case *redis.Client:
		node = c
	case *redis.ClusterClient:
		master, err := c.MasterForKey(ctx, key)
		if err != nil {
			return nil, err
		}
		node = master
	case *redis.Ring:
		shard, err := c.GetShardClientForKey(key)
		if err != nil {
			return nil, err
		}
		node = shard
	default: // someone's own client: it has no connection to hold on to
		return &link{conn: client, close: func() {}}, nil
	}

	l := &link{node: node}
	borrowed.Lock()
	limit := node.Options().PoolSize
	if n := node.Options().MaxActiveConns; n > 0 {
		limit = min(limit, n)
	}
	own := borrowed.n[node] >= limit/2
	if !own {
		borrowed.n[node]++
	}
	borrowed.Unlock()

	if own {
		opt := *node.Options()
		opt.PoolSize, opt.MinIdleConns, opt.MaxIdleConns, opt.MaxActiveConns = 1, 0, 0, 0
		// The pool must not replace the connection, whose ID is known.
		opt.ConnMaxIdleTime, opt.ConnMaxLifetime = -1, -1
		opt.ReadTimeout = block + readGrace
		c := redis.NewClient(&opt)
		l.conn, l.close = hooked(node, c), func() { _ = c.Close() }
	} else {
		c := node.WithTimeout(block + readGrace).EphemeralConn()
		l.conn = hooked(node, c)
		l.close = func() {
			// Not back into the pool: a CLIENT UNBLOCK still under way would wake
			// a stranger's command there.
			_ = c.Close()
			borrowed.Lock()
			if borrowed.n[node]--; borrowed.n[node] == 0 {
				delete(borrowed.n, node)
			}
			borrowed.Unlock()
		}
	}

	v, err := doOnce(ctx, l.conn, "client", "id")
	if err == nil {
		l.id, _ = v.(int64)
		err = l.wake(ctx) // nothing blocks yet: it only asks for the right
	}
	switch {
	case err == nil:
	case denied(err):
		l.node = nil
	default:
		l.close()
		return nil, err
	}
	return l, nil
}

// hooked returns a processor that runs commands on p, through the client's
// hooks: whoever traces or meters the client sees the reads too. p has none of
// them, because WithTimeout drops them. The Conn in between is there for its
// hooks and never takes a connection.
func hooked(client *redis.Client, p processor) processor {
	conn := client.EphemeralConn()
	conn.AddHook(divert{p})
	return conn
}

// divert is the innermost hook: it sends commands another way.
type divert struct{ to processor }

func (divert) DialHook(next redis.DialHook) redis.DialHook { return next }

func (d divert) ProcessHook(redis.ProcessHook) redis.ProcessHook { return d.to.Process }

func (divert) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// wakable reports whether wake can end a read.
func (l *link) wakable() bool { return l.node != nil && l.id != 0 }

// wake ends the read that blocks on the link, if one does: sent too early, it
// does nothing.
func (l *link) wake(ctx context.Context) error {
	_, err := doOnce(ctx, l.node, "client", "unblock", l.id)
	return err
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
