package model_test

import (
	"context"
	"encoding"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// step is a command of a random sequence. In its arguments prefix stands for what all
// keys of the sequence begin with, and "#2" for the third ID that the server has made.
type step struct {
	args  []string
	other bool // sent on the second connection, which it may block
}

const prefix = "@P@"

func (s step) String() string {
	who := ""
	if s.other {
		who = "other: "
	}
	args := slices.Clone(s.args)
	for i := range args {
		if len(args[i]) > 100 { // a script; the seed tells which
			args[i] = args[i][:40] + "..."
		}
	}
	return who + fmt.Sprintf("%q", args)
}

// random makes commands over few keys, groups, consumers and IDs.
type random struct{ *rand.Rand }

func pick[T any](r random, from ...T) T { return from[r.IntN(len(from))] }

func (r random) key() string {
	return prefix + pick(r, "a", "a", "a", "b", "b", "dead", "none", "hash", "scores")
}
func (r random) stream() string   { return prefix + pick(r, "a", "a", "b") }
func (r random) group() string    { return pick(r, "g", "g", "g", "h", "nogroup") }
func (r random) consumer() string { return pick(r, "c", "c", "d", "e") }
func (r random) small() string    { return fmt.Sprint(r.IntN(5)) }

func (r random) number() string {
	if r.IntN(12) == 0 {
		return pick(r, "-1", "x", "", "007", "+1", "1.5", "9223372036854775808", "-0", " 1")
	}
	return r.small()
}

func (r random) id() string {
	switch r.IntN(40) {
	case 0:
		return pick(r, "-", "+", "$", ">", "*", "x", "5-", "-5", "05-1", "+5-1", "5-x", "5-*", "0", "0-0", "", "(1-1", "18446744073709551615",
			"18446744073709551615-18446744073709551615", "99999999999999999999", "1-1-1", " 1")
	case 1:
		return fmt.Sprint("#", r.IntN(4))
	case 2:
		return r.small()
	}
	return fmt.Sprintf("%d-%d", r.IntN(12), r.IntN(3))
}

func (r random) ids() []string {
	ids := make([]string, 1+r.IntN(4))
	for i := range ids {
		ids[i] = r.id()
	}
	return ids
}

func (r random) end(end string) string {
	if r.IntN(3) == 0 {
		return end
	}
	return pick(r, "", "", "(") + r.id()
}

// maybe returns the options half of the time.
func (r random) maybe(options ...string) []string {
	if r.IntN(2) == 0 {
		return nil
	}
	return options
}

func words(parts ...any) []string {
	var all []string
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			all = append(all, p)
		case []string:
			all = append(all, p...)
		}
	}
	return all
}

// sequence returns commands of which the first ones make streams and groups.
func (r random) sequence(n int, version string) []step {
	steps := []step{{args: words("hset", prefix+"hash", "f", "v")}, {args: words("zadd", prefix+"scores", "1", "a", "2.5", "b", "2.5", "c")}}
	if r.IntN(2) == 0 {
		steps = append(steps, step{args: words("hello", "3")})
	}
	for _, key := range []string{"a", "b"} {
		for i := range 1 + r.IntN(8) {
			steps = append(steps, step{args: words("xadd", prefix+key, fmt.Sprintf("%d-%d", i+1, r.IntN(3)), "f", fmt.Sprint("v", i))})
		}
		steps = append(steps,
			step{args: words("xgroup", "create", prefix+key, "g", "0")},
			step{args: words("xgroup", "create", prefix+key, "h", r.id())},
			step{args: words("xreadgroup", "group", "g", "c", "count", r.small(), "streams", prefix+key, ">")},
		)
	}
	for len(steps) < n {
		switch r.IntN(20) {
		case 0:
			steps = append(steps, step{args: words("multi")})
			for range r.IntN(4) {
				steps = append(steps, step{args: r.command(version)})
			}
			steps = append(steps, step{args: words(pick(r, "exec", "exec", "exec", "discard"))})
		case 1:
			steps = append(steps, step{other: true, args: r.blocking()})
		case 2, 3, 4, 5, 6:
			steps = append(steps, step{args: r.script()})
		case 7, 8:
			steps = append(steps, step{args: r.delayed(version)})
		default:
			steps = append(steps, step{args: r.command(version)})
		}
	}
	return steps
}

func (r random) blocking() []string {
	block := []string{"block", pick(r, "0", "0", "0", "60000")}
	key := r.stream()
	keys := pick(r, []string{key}, []string{key}, []string{prefix + "a", prefix + "b"})
	after := make([]string, len(keys))
	if r.IntN(4) == 0 {
		for i := range keys {
			after[i] = pick(r, "$", r.id())
		}
		return words("xread", block, r.maybe("count", r.small()), "streams", keys, after)
	}
	for i := range keys {
		after[i] = ">"
	}
	return words("xreadgroup", "group", pick(r, "g", "h"), r.consumer(), r.maybe("count", r.small()), block, pick(r, nil, nil, []string{"noack"}), "streams", keys, after)
}

func (r random) command(version string) []string {
	args := r.wellFormed(version)
	if i := r.IntN(len(args)); r.IntN(15) == 0 && !strings.HasPrefix(args[i], prefix) { // one argument fewer, or more, or another
		switch r.IntN(3) {
		case 0:
			args = append(args[:i:i], args[i+1:]...)
		case 1:
			args = words(args, pick(r, r.id(), "x", "count", "noack"))
		default:
			if i > 0 {
				args[i] = pick(r, r.number(), r.id(), "x", "")
			}
		}
	}
	if len(args) == 0 || r.IntN(10) == 0 {
		args = words(pick(r, "foo", "XLEN", "xgroup", "xinfo", "ping", "client", "script"), args)
	}
	if strings.EqualFold(args[0], "hello") || strings.EqualFold(args[0], "info") {
		return words("ping")
	}
	return args
}

func (r random) wellFormed(version string) []string {
	switch r.IntN(34) {
	case 0, 1, 2, 3, 4:
		return words("xadd", r.stream(), r.maybe(r.trim()...), r.idOrNext(), "f", fmt.Sprint("v", r.IntN(100)))
	case 5:
		return words("xadd", r.key(), r.maybe("nomkstream"), r.maybe(r.trim()...), r.id(), "f", "v", r.maybe("g", "w"))
	case 6, 7:
		return words("xdel", r.key(), r.ids())
	case 8:
		return words("xtrim", r.key(), r.trim())
	case 9:
		return words(pick(r, "xlen", "type", "exists", "hgetall", "hlen", "ttl"), r.key())
	case 10:
		return words("xrange", r.key(), r.end("-"), r.end("+"), r.maybe("count", r.number()))
	case 11:
		return words("xrevrange", r.key(), r.end("+"), r.end("-"), r.maybe("count", r.number()))
	case 12:
		return words("xread", r.maybe("count", r.number()), r.maybe("block", "1"), "streams", r.key(), pick(r, r.id(), "$", "0"))
	case 13, 14, 15:
		return words("xreadgroup", "group", r.group(), r.consumer(), r.maybe("count", r.small()), pick(r, nil, nil, nil, []string{"noack"}), "streams", r.stream(), pick(r, ">", ">", r.id()))
	case 16:
		return words("xreadgroup", "group", r.group(), r.consumer(), "streams", r.key(), r.key(), pick(r, ">", r.id()), pick(r, ">", r.id()))
	case 17, 18:
		return words("xack", r.stream(), r.group(), r.ids())
	case 19:
		return words("xpending", r.key(), r.group())
	case 20, 21:
		return words("xpending", r.stream(), r.group(), r.maybe("idle", pick(r, "5000", "15000", "0")), r.end("-"), r.end("+"), pick(r, "10", "10", r.number()), r.maybe(r.consumer()))
	case 22, 23, 24:
		return words("xclaim", r.stream(), r.group(), r.consumer(), pick(r, "0", "0", "5000", "15000", "-1", "x"), r.ids(), r.claimOptions())
	case 25:
		return words("xgroup", "create", r.stream(), r.group(), pick(r, "$", "0", r.id()), r.maybe("mkstream"), pick(r, nil, nil, []string{"entriesread", r.number()}))
	case 26:
		return words("xgroup", pick(r, "createconsumer", "createconsumer", "delconsumer"), r.stream(), r.group(), r.consumer())
	case 27:
		if r.IntN(3) > 0 {
			return words("xgroup", "setid", r.stream(), r.group(), r.id(), pick(r, nil, nil, []string{"entriesread", r.number()}))
		}
		return words("xgroup", "destroy", r.stream(), r.group())
	case 28:
		return words("xinfo", "stream", r.stream())
	case 29:
		return words("xinfo", "groups", r.stream())
	case 30:
		return words("xinfo", "consumers", r.stream(), r.group())
	case 31:
		if r.IntN(3) > 0 {
			return words(pick(r, "hset", "hset", "hget", "hdel", "hincrby"), r.key(), pick(r, "f", "g"), r.maybe(pick(r, "v", "3", "-4", "9223372036854775807", " 1", "01")))
		}
		return words(pick(r, "del", "expire", "pexpire", "flush"), r.key(), r.maybe(pick(r, "1000", "0", "-1", "x")))
	case 32:
		if version != "8.6" {
			return words(pick(r, "xackdel", "xidmprecord", "xcfgset"), r.key(), r.group(), "acked", "ids", "1", r.id())
		}
		ids := r.ids()
		return words("xackdel", r.stream(), r.group(), pick(r, "acked", "acked", "keepref", "delref"), "ids", pick(r, fmt.Sprint(len(ids)), fmt.Sprint(len(ids)), r.number()), ids)
	}
	if version != "8.6" {
		return words("ping")
	}
	if r.IntN(4) == 0 {
		return words("xcfgset", r.stream(), r.maybe("idmp-duration", pick(r, "100", "200", r.number())), r.maybe("idmp-maxsize", pick(r, "1", "2", r.number())))
	}
	return words("xadd", r.stream(), r.maybe("nomkstream"), "idmp", pick(r, "p", "q"), pick(r, "1", "2", "3", ""), pick(r, "*", "*", "*", r.id()), "f", "v")
}

// sorted returns a command of a sorted set.
func (r random) sorted() []string {
	key, member := prefix+pick(r, "scores", "scores", "scores", "hash", "none", "a"), func() string { return pick(r, "a", "b", "c", "d", "e") }
	score := func() string {
		if r.IntN(12) == 0 {
			return pick(r, "x", "", " 1", "nan", "1e3", "-0.5", "1..2")
		}
		return pick(r, "-1", "0", "0.1", "1", "2.5", "3", "4102444800000", "inf", "-inf")
	}
	end := func(infinite string) string { return pick(r, infinite, pick(r, "", "", "(")+score()) }
	switch r.IntN(9) {
	case 0, 1, 2:
		options := pick(r, nil, nil, words("nx"), words("xx"), words("gt"), words("lt", "ch"), words("ch"), words("xx", "gt"), words("nx", "xx"), words("NX", "gt"))
		return words("zadd", key, options, score(), member(), r.maybe(score(), member()))
	case 3:
		return words("zrem", key, member(), r.maybe(member(), member()))
	case 4:
		return words(pick(r, "zscore", "zrank"), key, member())
	case 5:
		return pick(r, words("zcard", key), words("zcount", key, end("-inf"), end("+inf")))
	case 6:
		return words("zrange", key, r.rank(), r.rank(), r.maybe("withscores"))
	case 7:
		return words("zrangebyscore", key, end("-inf"), end("+inf"), r.maybe("withscores"), r.maybe("limit", r.rank(), r.rank()))
	}
	return words("hmget", pick(r, key, prefix+"hash"), "f", r.maybe("g", "f"))
}

func (r random) rank() string { return pick(r, "0", "0", "1", "2", "-1", "-2", r.number()) }

// delayed returns a command of a sorted set, or a call of one of the scripts for delayed messages. These are
// due at once or in years, so that both servers agree.
func (r random) delayed(version string) []string {
	if r.IntN(2) == 0 {
		return r.sorted()
	}
	key := r.stream()
	if r.IntN(4) == 0 {
		key = xstream.DueKey(key)
		return pick(r, words("zrange", key, "0", "-1", "withscores"), words("zcard", key), words("type", key), words("exists", key, xstream.DelayedKey(r.stream())),
			words("zrem", key, "u1"), words("hdel", xstream.DelayedKey(r.stream()), "u2"), words("hset", xstream.DelayedKey(r.stream()), "u2", pick(r, "", "5:x", "nonsense")),
			words("hgetall", xstream.DelayedKey(r.stream())), words("del", key))
	}
	return recorded(func(s xstream.Stream) { r.callDelayed(s, version) }, xstream.Stream{Key: key})
}

var farAway = time.UnixMilli(4102444800000)

func (r random) callDelayed(s xstream.Stream, version string) {
	ctx := context.Background()
	uuid := func() string { return pick(r, "u1", "u2", "u3", "u4") }
	due := func() time.Time {
		return pick(r, time.UnixMilli(1), time.UnixMilli(2), farAway, farAway.Add(time.Second), farAway.Add(-time.Second))
	}
	switch r.IntN(13) {
	case 0, 1, 2, 3, 4:
		producer := ""
		if version == "8.6" && r.IntN(3) == 0 {
			producer = "p"
		}
		call := xstream.NewScheduling(ctx, s.Key, pick(r, int64(0), 0, 0, 100), producer)
		for range 1 + r.IntN(3) {
			at := pick(r, xstream.Due(""), xstream.DueIn(0), xstream.DueIn(time.Hour), xstream.DueAt(farAway), xstream.DueAt(due()))
			_ = call.Add(uuid(), at, func(args []any) ([]any, error) { return append(args, "f", pick(r, "v", "w")), nil })
		}
		_, _ = call.Send(s.Via)
	case 5, 6:
		_, _ = s.Move(ctx)
	case 7:
		s.Group = pick(r, "g", "h")
		if r.IntN(2) == 0 {
			_ = s.Pause(ctx)
		} else {
			_, _ = s.Resume(ctx)
		}
	case 12:
		_ = s.Cancel(ctx, uuid())
	case 8, 9:
		_ = s.Reschedule(ctx, uuid(), due())
	case 10:
		_, _ = s.DelayedSummary(ctx)
	case 11:
		switch r.IntN(3) {
		case 0:
			_, _ = s.DelayedGet(ctx, uuid())
		case 1:
			_, _ = s.DelayedPage(ctx, xstream.Waiting{}, 1+r.IntN(3))
		default:
			at := pick(r, time.Time{}, time.UnixMilli(5), time.UnixMilli(7), farAway)
			_, _ = s.Recur(ctx, pick(r, "one", "two"), pick(r, time.Time{}, time.UnixMilli(5)), at, 0, []any{"f", "v"})
		}
	}
}

func (r random) idOrNext() string {
	return pick(r, r.id(), "*", fmt.Sprintf("%d-*", r.IntN(12)), fmt.Sprintf("%d-%d", 8+r.IntN(20), r.IntN(3)))
}

func (r random) trim() []string {
	limit := pick(r, nil, nil, nil, nil, nil, []string{"limit", r.number()})
	switch r.IntN(4) {
	case 0:
		return words("minid", pick(r, nil, []string{"="}, []string{"~"}), r.id(), limit)
	case 1:
		return words("maxlen", "~", pick(r, "0", "1", "100"), limit)
	}
	return words("maxlen", pick(r, nil, nil, []string{"="}), r.number(), limit)
}

func (r random) claimOptions() []string {
	var options []string
	for range r.IntN(3) {
		options = append(options, pick(r,
			[]string{"justid"}, []string{"force"}, []string{"idle", pick(r, "10000", "20000", r.number())}, []string{"retrycount", r.number()},
			[]string{"time", pick(r, "0", "99999999999999", r.number())}, []string{"lastid", r.id()}, []string{"JUSTID"})...)
	}
	return options
}

// script returns a call of one of the library's scripts, or of one that shows how
// values are converted.
func (r random) script() []string {
	if r.IntN(5) == 0 {
		return words("eval", pick(r, conversions...), pick(r, "2", "2", "2", r.number()), r.key(), r.key(), r.group(), r.id(), r.id())
	}
	return recorded(func(s xstream.Stream) { r.call(s) }, xstream.Stream{Key: r.stream(), Group: r.group(), Consumer: r.consumer()})
}

var conversions = []string{
	"return redis.call('xrange', KEYS[1], '-', '+')",
	"return redis.call('xreadgroup', 'group', ARGV[1], 'c', 'count', 2, 'streams', KEYS[1], '>')",
	"return redis.call('xreadgroup', 'group', ARGV[1], 'c', 'streams', KEYS[1], 0)",
	"return redis.pcall('xread', 'streams', KEYS[1], 0)",
	"return redis.pcall('xgroup', 'create', KEYS[1], 'g', 0)",
	"return redis.pcall('xgroup', 'foo', KEYS[1], 'g', 0)",
	"local e = redis.pcall('xadd', KEYS[1], ARGV[2], 'a') return {e.err or 'none', e.ok or 'none'}",
	"return redis.call('xadd', KEYS[1], ARGV[2], 1.5, 2)",
	"return redis.call('hgetall', KEYS[1])",
	"return redis.call('xinfo', 'groups', KEYS[1])",
	"return {1, 2.9, -2.9, 'x', true, false, {1, {2}}, nil, 3}",
	"return redis.status_reply('fine')",
	"return redis.error_reply('-CODE text')",
	"return redis.error_reply('text')",
	"return {err = 'CODE in a table'}",
	"return {ok = 'in a table', 1}",
	"return #KEYS * 10 + #ARGV",
	"return redis.sha1hex(ARGV[1] or '')",
	"\n\nlocal x = 1\nreturn redis.call('xlen')",
	"error({err = 'CODE raised'})",
	"error('text')",
	"return redis.call(1)",
	"return redis.call()",
	"return redis.call('xlen', {})",
	"return redis.call('ping')",
	"return redis.call('multi')",
	"return redis.call('xack', KEYS[1], ARGV[1], unpack(ARGV, 2))",
	"redis.call('del', KEYS[1]) return redis.call('xadd', KEYS[1], '1-1', 'a', 'b')",
	"redis.call('xadd', KEYS[1], '*', 'a', 'b') redis.call('xdel', KEYS[2], ARGV[2]) return 1",
	"redis.pcall('xgroup', 'destroy', KEYS[1], ARGV[1]) return redis.pcall('xgroup', 'create', KEYS[1], ARGV[1], ARGV[2])",
	"return string.format('%.0f %s', 12345678901, tostring(1.5)) .. 3 .. 4.25",
	"return tonumber('0x10') + tonumber('12')",
	"local t = {} for w in string.gmatch('3 4 5', '%d+') do t[#t + 1] = w end return table.concat(t, '-', 2, 3)",
	"for i = 1, 250 do redis.call('xadd', KEYS[1], (1000 + i) .. '-1', 'f', 'v') end return redis.call('xlen', KEYS[1])",
	"foo = 1",
	"return foo",
	"return redis.acl_check_cmd('xadd', KEYS[1], '*', 'a', 'b')",
	"return redis.acl_check_cmd('foo')",
}

// call calls one of the commands of the library that are scripts.
func (r random) call(s xstream.Stream) {
	ctx := context.Background()
	var ids []string
	var any []any
	var counted []xstream.Counted
	for i := range 1 + r.IntN(5) {
		id := fmt.Sprintf("%d-%d", 2*i+r.IntN(2), r.IntN(3))
		ids, any, counted = append(ids, id), append(any, id), append(counted, xstream.Counted{ID: id, Count: r.Int64N(4)})
	}
	deletes := r.IntN(3) > 0
	switch r.IntN(16) {
	case 0, 1:
		_, _ = s.Renew(ctx, ids)
	case 2, 3:
		_, _, _ = s.Take(ctx, ids[0], pick(r, "", r.consumer()), r.Int64N(4), time.Duration(r.IntN(2))*5*time.Second, r.Int64N(4))
	case 4:
		_, _ = s.Assign(ctx, r.consumer(), counted)
	case 5:
		_, _ = s.Restore(ctx, counted)
	case 6, 7:
		_ = s.Ack(ctx, deletes, any...)
	case 8, 9:
		r.trimOf(ctx, s, ids[0])
	case 10:
		_, _ = s.AckTrimmed(ctx, ids)
	case 11:
		marks := pick(r, nil, []string{"<" + ids[0] + ">", "<m>"})
		_, _, _ = s.DeadLetter(ctx, prefix+"dead", ids[0], deletes, marks, []string{"uuid", "u", "metadata", "<m><" + ids[0] + ">"})
	case 12:
		dead := s
		dead.Key = prefix + "dead"
		_ = dead.Replay(ctx, []*xstream.Replay{{ID: pick(r, "#0", "#1", "#2"), Topic: s.Key, Fields: []string{"a", "b"}}})
	case 13:
		_, _ = s.Info(ctx)
	case 14:
		switch r.IntN(3) {
		case 0:
			info, _ := s.Info(ctx)
			_ = s.SetPosition(ctx, pick(r, "one", "two"), ids[0], info, time.Hour)
		case 1:
			_ = s.RemovePosition(ctx, pick(r, "one", "two"))
		default:
			_ = s.CheckRights(ctx)
		}
	default:
		if r.IntN(2) == 0 {
			_, _ = s.RemoveConsumer(ctx)
		} else {
			_, _ = s.RemoveIdleConsumers(ctx, time.Duration(r.IntN(2))*time.Hour)
		}
	}
}

// trimOf calls one of the scripts of retention. All IDs are old enough for any KeepFor but the
// longest, and of two intervals the second one ends long after the test.
func (r random) trimOf(ctx context.Context, s xstream.Stream, id string) {
	keep := xstream.Retention{KeepLast: pick(r, int64(0), 0, 1, 3, xstream.KeepAll), HardMaxLen: pick(r, int64(0), 0, 1, 4)}
	keep.KeepFor = pick(r, 0, 0, time.Hour, 100*365*24*time.Hour)
	if r.IntN(3) == 0 {
		keep.Ignore = []string{r.group()}
	}
	switch r.IntN(8) {
	case 0:
		_, _ = s.Plan(ctx, keep, pick(r, "", id), r.Int64N(3))
	case 1:
		_, _, _ = s.Floor(ctx)
	default:
		_, _ = s.Trim(ctx, keep, "", "", pick(r, 0, 0, 0, time.Hour))
	}
}

var errRecorded = errors.New("recorded, not sent")

// recorder notes the first command that is sent through it.
type recorder struct{ args []string }

func (rec *recorder) note(cmd redis.Cmder) error {
	if look, ok := cmd.(*redis.Cmd); ok && cmd.Name() == "zrange" { // by which MoveDue finds out whether to run its script
		look.SetVal([]any{"u1"})
		return nil
	}
	if rec.args == nil {
		for _, a := range cmd.Args() {
			if m, ok := a.(encoding.BinaryMarshaler); ok {
				b, _ := m.MarshalBinary()
				a = string(b)
			}
			rec.args = append(rec.args, fmt.Sprint(a))
		}
	}
	return errRecorded
}

func (rec *recorder) DialHook(next redis.DialHook) redis.DialHook { return next }

func (rec *recorder) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(_ context.Context, cmd redis.Cmder) error { return rec.note(cmd) }
}

func (rec *recorder) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(_ context.Context, cmds []redis.Cmder) error { return rec.note(cmds[0]) }
}

func recorded(call func(xstream.Stream), s xstream.Stream) []string {
	rec := new(recorder)
	client := redis.NewClient(&redis.Options{})
	defer client.Close()
	client.AddHook(rec)
	s.Client, s.Via = redisx.Client{UniversalClient: client}, client
	call(s)
	return rec.args
}
