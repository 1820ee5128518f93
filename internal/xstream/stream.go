package xstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"strconv"
	"strings"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/pipeline"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Entry is an entry of a stream. Its fields are name, value, name, value, ... in
// stream order, including duplicates, which go-redis's map would lose.
type Entry struct {
	ID     string
	Fields []string
}

// Stream is a topic, as seen by a consumer of a group if these are set.
type Stream struct {
	Client   redisx.Client
	Via      redisx.Processor // sends the commands: the client, or a pipeline over it
	Key      string
	Group    string
	Consumer string
}

// New returns a stream that sends its commands directly through the client.
func New(client redisx.Client, key, group string) Stream {
	return Stream{Client: client, Via: client, Key: key, Group: group}
}

// ask sends a command on the stream to the master: see askAt.
func (s *Stream) ask(ctx context.Context, args ...any) (any, error) {
	return s.askAt(ctx, s.Key, args...)
}

// askAt sends a command on the key, which is in the stream's slot, to the master. The command
// must be read-only, or safe to run twice. A node's own client does not follow a slot that has
// moved to another node, or is about to; but go-redis sends scripts to masters, and to where
// these say that the key is.
func (s *Stream) askAt(ctx context.Context, key string, args ...any) (any, error) {
	if s.Client.Single() != nil {
		return redisx.Do(ctx, s.Via, args...)
	}
	client, err := s.Client, error(nil)
	if args[0] != "eval" {
		client, err = s.Client.Master(ctx, key)
	}
	if err != nil {
		return nil, err
	}
	v, err := redisx.Do(ctx, pipeline.New(client, 0), args...) // which returns when ctx ends
	if redisx.ReplyHas(err, "MOVED ", "ASK ") {
		return redisx.Do(ctx, s.Via, append([]any{"eval", "return redis.call(unpack(ARGV))", 1, key}, args...)...)
	}
	return v, err
}

func appendAll(args []any, values []string) []any {
	for _, v := range values {
		args = append(args, v)
	}
	return args
}

func (s *Stream) once(ctx context.Context, args ...any) (any, error) {
	return redisx.DoOnce(ctx, s.Via, args...)
}

// eval runs a script on the stream, once.
func (s *Stream) eval(ctx context.Context, script string, args ...any) (any, error) {
	return s.once(ctx, append([]any{"eval", script, 1, s.Key}, args...)...)
}

// ErrNoGroup stands for NOGROUP where the server's reply merely lacks the group.
var ErrNoGroup error = redisx.ReplyError("NOGROUP no such group")

// GroupLost reports whether err says that the group, or the whole stream, is gone.
// UNBLOCKED is Redis 7.0's reply to a read that was blocking at that time.
func GroupLost(err error) bool {
	return redisx.ReplyHas(err, "NOGROUP", "UNBLOCKED the stream key no longer exists")
}

// Cursor is a stream and the ID after which to read it; ">" means the entries that
// were not yet delivered to the group.
type Cursor struct{ Key, After string }

// Reading is the result of reading one stream.
type Reading struct {
	Key     string
	Entries []Entry
}

// Read is a read of several streams, for a consumer of a group or without a group.
type Read struct {
	Group, Consumer string
	NoAck           bool
	From            []Cursor
	Count           int           // maximum entries per stream
	Block           time.Duration // negative: do not block
}

func (r *Read) args() []any {
	args := make([]any, 0, 10+2*len(r.From))
	if r.Group == "" {
		args = append(args, "xread")
	} else {
		args = append(args, "xreadgroup", "group", r.Group, r.Consumer)
	}
	args = append(args, "count", r.Count)
	if r.Block >= 0 {
		args = append(args, "block", r.Block.Milliseconds())
	}
	if r.NoAck {
		args = append(args, "noack")
	}
	args = append(args, "streams")
	for _, c := range r.From {
		args = append(args, c.Key)
	}
	for _, c := range r.From {
		args = append(args, c.After)
	}
	return args
}

// Do reads on the given connection. If there are no entries, it returns none,
// without an error.
func (r *Read) Do(ctx context.Context, p redisx.Processor, before *Replies) ([]Reading, error) {
	reply, err := before.receive(ctx, p, r.args())
	if err != nil {
		return nil, redisx.Redacted(err)
	}
	readings, err := unparsed(reply).readings()
	before.note(len(reply), readings)
	return readings, redisx.Redacted(err)
}

// CreateGroup creates the group, and the stream if necessary, to deliver the
// entries after start. An existing group is not an error. If it was lost, others may still
// have what was pending, and need the time of a lease to restore it.
func (s *Stream) CreateGroup(ctx context.Context, start string, lease time.Duration) error {
	if err := s.hold(ctx, lease, false); err != nil {
		return err
	}
	_, err := redisx.Do(ctx, s.Via, "xgroup", "create", s.Key, s.Group, start, "mkstream")
	if redisx.ReplyHas(err, "BUSYGROUP") || redisx.OutOfMemory(err) && s.HasGroup(ctx) == nil {
		return nil // a server that is out of memory does not look whether the group exists
	}
	return err
}

// createScript creates a group, unless the stream was recreated since it was looked
// at, and makes entries pending in it. Its first command has a server that is out of memory accept
// that: see evenIfFull. Without their group, consumers could make no room.
const createScript = `-- create` + deniedFunction + lessFunction + beganAnewFunction + `
redis.call('XACK', KEYS[1], ARGV[1], '0-1')
local missing = denied('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, '0-1', 'JUSTID') or denied('XRANGE', KEYS[1], '-', '+')
if missing and ARGV[5] then return missing end
if ARGV[3] ~= '' then
  if beganAnew(ARGV[3]) then return redis.error_reply('CHANGED the stream began anew') end
  if not stream['last-generated-id'] then return redis.error_reply('CHANGED the stream was deleted') end
end
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[2], 'MKSTREAM')
for i = 5, #ARGV, 2 do
  if redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, ARGV[i], 'FORCE', 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
  end
end
return 'OK'`

// CreateGroupAt creates a group that was there before as CreateGroup does, also while Redis is out of memory, and makes
// the entries pending for the consumer in the same step: nobody would read those again if the caller
// ended in between. (250 take the server about 1 ms; a lost group is rare.) If the
// caller deletes entries, it must not delete what concerns other groups that were lost with it. It
// returns an error if the stream was recreated since it was looked at, unless the group is to
// start at "0", or nothing is known of the stream.
func (s *Stream) CreateGroupAt(ctx context.Context, start string, seen Info, entries []Counted, lease time.Duration, deletes bool) (made bool, err error) {
	if err := s.hold(ctx, lease, deletes); err != nil {
		return false, err
	}
	life := ""
	if start != "0" && seen.Last != "" {
		life = seen.life()
	}
	_, err = s.eval(ctx, createScript, appendCounted([]any{s.Group, start, life, s.Consumer}, entries)...)
	if redisx.ReplyHas(err, "BUSYGROUP") {
		return false, nil
	}
	return err == nil, err
}

// CreateConsumer adds the consumer to the group. Before Redis 7.2 a consumer that
// waits for its first entry is not listed. A server that is out of memory refuses it; then
// the consumer is added by its first read of an entry.
func (s *Stream) CreateConsumer(ctx context.Context) error {
	_, err := redisx.Do(ctx, s.Via, "xgroup", "createconsumer", s.Key, s.Group, s.Consumer)
	if redisx.OutOfMemory(err) {
		return nil
	}
	return err
}

// Length returns the number of entries.
func (s *Stream) Length(ctx context.Context) (int64, error) {
	v, err := s.ask(ctx, "xlen", s.Key)
	n, _ := v.(int64)
	return n, err
}

// Page returns at most count entries from start to end.
func (s *Stream) Page(ctx context.Context, start, end string, count int) ([]Entry, error) {
	return entriesOf(s.ask(ctx, "xrange", s.Key, start, end, "count", count))
}

// Entry returns the entry; nil if the stream does not have it.
func (s *Stream) Entry(ctx context.Context, id string) (*Entry, error) {
	entries, err := s.Page(ctx, id, id, 1)
	if err != nil || len(entries) == 0 {
		return nil, err
	}
	return &entries[0], nil
}

// Newest returns the ID of the last entry; "" if there is none.
func (s *Stream) Newest(ctx context.Context) (string, error) {
	entries, err := entriesOf(s.ask(ctx, "xrevrange", s.Key, "+", "-", "count", 1))
	if err != nil || len(entries) == 0 {
		return "", err
	}
	return entries[0].ID, nil
}

// Info is the information of XINFO STREAM. If the stream does not exist, its IDs
// are "0-0".
type Info struct {
	Last       string // the greatest ID that the stream ever had
	First      string // ID of the first entry; "0-0" without entries
	FirstPrint string // digest of the first entry; "" if EVAL is denied
	MaxDeleted string // the greatest ID deleted by XDEL
	Added      int64  // number of entries ever added; -1 if the server does not say
}

// printFunction returns an entry's digest, of its first 4 KiB.
const printFunction = `
local function fingerprint(fields)
  return redis.sha1hex(string.sub(table.concat(fields, '\0'), 1, 4096))
end`

// infoScript is XINFO STREAM without the entries in its reply.
const infoScript = printFunction + `
local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
if info.err then return info end
for i = 1, #info, 2 do
  local name = info[i]
  local first = info[i + 1]
  if name == 'first-entry' and first then
    info[i + 1] = {first[1], fingerprint(first[2])}
  end
  if name == 'last-entry' then info[i + 1] = false end
end
return info`

// Info returns information about the stream.
func (s *Stream) Info(ctx context.Context) (Info, error) {
	info := Info{Last: "0-0", First: "0-0", MaxDeleted: "0-0"}
	v, err := s.ask(ctx, "eval", infoScript, 1, s.Key)
	if redisx.IsDenied(err) { // fan-outs work without EVAL
		v, err = s.ask(ctx, "xinfo", "stream", s.Key)
	}
	if redisx.ReplyHas(err, "no such key") {
		return info, nil
	}
	if err != nil {
		return info, err
	}
	t := table(v)
	last, ok := t["last-generated-id"].(string)
	if !ok {
		return info, fmt.Errorf("goxstreams: XINFO STREAM %s: no last-generated-id", s.Key)
	}
	info.Last = last
	if first, ok := t["first-entry"].([]any); ok && len(first) == 2 {
		info.First, _ = first[0].(string)
		info.FirstPrint, _ = first[1].(string)
	}
	if id, ok := t["max-deleted-entry-id"].(string); ok {
		info.MaxDeleted = id
	}
	added, ok := t["entries-added"].(int64)
	if info.Added = added; !ok {
		info.Added = -1
	}
	return info, nil
}

// Mark identifies an entry that was seen. Its ID alone does not: a stream that is
// deleted and recreated may reuse it.
type Mark struct {
	ID    string
	Print uint64 // fingerprint of the fields; 0: unknown
}

var printSeed = maphash.MakeSeed()

// Mark returns the entry's mark, valid in this process.
func (e Entry) Mark() Mark {
	var h maphash.Hash
	h.SetSeed(printSeed)
	for _, f := range e.Fields {
		_, _ = h.WriteString(f)
		_ = h.WriteByte(0)
	}
	return Mark{e.ID, max(1, h.Sum64())}
}

// Has reports whether the entry is in the stream.
func (s *Stream) Has(ctx context.Context, m Mark) (bool, error) {
	if m.ID == "" {
		return false, nil
	}
	e, err := s.Entry(ctx, m.ID)
	return e != nil && (m.Print == 0 || e.Mark() == m), err
}

// Version returns the server's name and version, for messages only: Valkey also
// calls itself Redis 7.2.4, and managed services have features of their own.
func (s *Stream) Version(ctx context.Context) string {
	v, _ := s.ask(ctx, "info", "server")
	info, _ := v.(string)
	for _, server := range []struct{ field, name string }{{"valkey_version:", "Valkey "}, {"redis_version:", "Redis "}} {
		if _, after, ok := strings.Cut(info, server.field); ok {
			version, _, _ := strings.Cut(after, "\r\n")
			return server.name + version
		}
	}
	return "a server of unknown version"
}

// ErrMissing means that an ID is not in the stream.
var ErrMissing = errors.New("not found")

// CompareIDs compares entry IDs. A missing sequence number counts as zero.
func CompareIDs(a, b string) int {
	am, as := SplitID(a)
	bm, bs := SplitID(b)
	return cmp.Or(cmp.Compare(am, bm), cmp.Compare(as, bs))
}

// After returns the ID after an entry's, to continue a list with. XPENDING's "(" says the
// same, but only to Redis: miniredis, the embedded server, does not know it there.
func After(id string) string {
	ms, seq := SplitID(id)
	if seq++; seq == 0 {
		if ms++; ms == 0 {
			return "(" + id // there is none after the last possible ID
		}
	}
	return strconv.FormatUint(ms, 10) + "-" + strconv.FormatUint(seq, 10)
}

// SplitID returns the two numbers of an entry ID.
func SplitID(id string) (ms, seq uint64) {
	head, tail, _ := strings.Cut(id, "-")
	ms, _ = strconv.ParseUint(head, 10, 64)
	seq, _ = strconv.ParseUint(tail, 10, 64)
	return ms, seq
}
