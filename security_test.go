package goxstreams_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// rights are the ACL permissions that each feature needs, as in the table of
// docs/rights.md: TestRights_Docs compares the two. The tests here create users
// with exactly these.
var rights = []struct {
	feature string
	sets    []string // the backquoted parts of the row, in order
}{
	{"Publisher", []string{"+xadd", "+multi +exec", "+xcfgset"}},
	{"Subscriber with a group", []string{"+eval +xgroup|create +xreadgroup +xack +xclaim +xpending +xrange +xadd"}},
	{"DeadLetterQueue", []string{"+xlen +xrange +xrevrange", "+xdel", "+eval +xadd +xdel +xinfo|groups"}},
	{"TopicStats", []string{"+xlen +xinfo|groups +xpending", "+eval +zcard +zrange", "+eval +time +xrange +hgetall +hget"}},
	{"delayed messages", []string{"+eval +time +zscore +zadd +hget +hset +zrange +xadd", "+eval +time +zrange +zrangebyscore +hget +xadd +zrem +hdel"}},
	{"Pause, Resume", []string{"+eval +time +hget +hset +xinfo|groups", "+hgetall", "+hmget", "+hdel"}},
	{"Schedule", []string{"+eval +zcard +zrange +zrank +zscore +zcount +zrangebyscore +hmget", "+zrem +hdel", "+zscore +zadd"}},
	{"Recur", []string{"+eval +time +hget +hset +xadd"}},
	{"removing consumers' names", []string{"+xinfo|consumers +xgroup|delconsumer"}},
	{"groups of many consumers with very many pending entries", []string{"+xgroup|createconsumer +xinfo|consumers"}},
	{"a Close that does not wait for reads, topics that share reads", []string{"+client|id +client|unblock"}},
	{"a lost group", []string{"+xinfo|groups +xinfo|stream +xinfo|consumers"}},
	{"a move to the dead-letter stream that had no answer", []string{"+xrevrange"}},
	{"DeleteAcked", []string{"+xackdel", "+xdel +xinfo|groups", "+hgetall +time"}},
	{"Retention, Trim", []string{"+eval +time +xlen +xinfo|groups +xpending +xrange +xtrim +hgetall +hget +hset +hincrby", "+xinfo|stream", "+hdel"}},
	{"fan-out", []string{"+xread", "+xinfo|stream", "+eval +hset +expire +time +hdel +xinfo|stream +xrange"}},
}

// rightsOf returns the commands of some of a feature's sets; of all sets if none is
// given.
func rightsOf(t testing.TB, feature string, sets ...int) []string {
	t.Helper()
	for _, r := range rights {
		if r.feature != feature {
			continue
		}
		var commands []string
		for i, set := range r.sets {
			if len(sets) == 0 || slices.Contains(sets, i) {
				commands = append(commands, strings.Fields(set)...)
			}
		}
		return commands
	}
	require.FailNow(t, "no such feature", feature)
	return nil
}

// allRights returns the permissions of all features, except for commands that the
// server does not know.
func allRights(t testing.TB, admin *redis.Client) []string {
	t.Helper()
	var all []string
	for _, r := range rights {
		all = append(all, rightsOf(t, r.feature)...)
	}
	slices.Sort(all)
	return knownRights(t, admin, slices.Compact(all))
}

// newCommands are commands that not every server has.
var newCommands = []string{"xackdel", "xcfgset"}

func knownRights(t testing.TB, admin *redis.Client, commands []string) []string {
	t.Helper()
	known := slices.Clone(commands)
	for _, name := range newCommands {
		if slices.Contains(known, "+"+name) && !knows(t, admin, name) {
			known = slices.DeleteFunc(known, func(c string) bool { return c == "+"+name })
		}
	}
	return known
}

func knows(t testing.TB, admin *redis.Client, command string) bool {
	t.Helper()
	reply, err := admin.Do(context.Background(), "command", "info", command).Slice()
	require.NoError(t, err)
	return len(reply) == 1 && reply[0] != nil
}

// userOf returns a client of a new user with exactly the given permissions, on the
// keys that begin with the topic.
func userOf(t testing.TB, admin *redis.Client, topic string, commands ...string) *redis.Client {
	t.Helper()
	rules := append([]string{"resetkeys", "resetchannels", "-@all", "~" + topic + "*"}, knownRights(t, admin, commands)...)
	return aclUser(t, admin, rules...)
}

// aclEnv makes the tests' clients users with minimal permissions.
const aclEnv = "GOXSTREAMS_TEST_ACL"

// leastRights returns a client of a user with the permissions of all features, on
// all keys (tests have several topics each).
func leastRights(t testing.TB, admin *redis.Client) *redis.Client {
	t.Helper()
	testserver.RequireReal(t)
	return aclUser(t, admin, append([]string{"resetchannels", "-@all"}, allRights(t, admin)...)...)
}

// adminCommands are commands that tests send to a server, and the library does not:
// they are sent over another client, with all permissions. TestRights_AdminCommands
// checks the separation.
var adminCommands = []string{
	"acl", "client kill", "client list", "client pause", "client unpause", "command", "config", "copy", "debug", "del", "dump", "exists",
	"flushall", "get", "info", "keys", "lrange", "memory", "object", "persist", "pexpire", "ping", "rename", "restore", "rpush", "set", "sadd", "slowlog", "type", "unlink",
	"xautoclaim", "xgroup destroy", "xgroup setid", "xinfo", "xnack", "xsetid",
}

func isAdminCommand(cmd redis.Cmder) bool {
	name := cmd.Name()
	if args := cmd.Args(); len(args) > 1 {
		switch sub := strings.ToLower(fmt.Sprint(args[1])); name {
		case "client", "xgroup":
			return slices.Contains(adminCommands, name+" "+sub)
		case "xinfo":
			return len(args) > 3 && strings.EqualFold(fmt.Sprint(args[3]), "full")
		}
	}
	return slices.Contains(adminCommands, name)
}

// divertAdmin is a hook that sends a test's own commands as the administrator, and
// fails the test if any other one is denied: then the table of docs/rights.md lacks
// it.
func divertAdmin(t testing.TB, admin *redis.Client) redis.Hook {
	denied := func(cmds ...redis.Cmder) {
		for _, cmd := range cmds {
			err := cmd.Err()
			if err == nil || strings.Contains(err.Error(), "'client|setinfo'") { // go-redis's own command, which is optional
				continue
			}
			if strings.HasPrefix(err.Error(), "NOPERM") {
				t.Errorf("%s=1: the user with all rights of docs/rights.md's table was refused: %v", aclEnv, err)
			}
		}
	}
	return &hook{
		process: func(ctx context.Context, cmd redis.Cmder, next func() error) error {
			if isAdminCommand(cmd) {
				return admin.Process(ctx, cmd)
			}
			err := next()
			if err != nil && cmd.Err() != nil {
				denied(cmd)
			}
			return err
		},
		pipeline: func(ctx context.Context, cmds []redis.Cmder, next func() error) error {
			if !slices.ContainsFunc(cmds, isAdminCommand) {
				err := next()
				denied(cmds...)
				return err
			}
			run := admin.Pipelined
			if cmds[0].Name() == "multi" { // added by go-redis
				run, cmds = admin.TxPipelined, cmds[1:len(cmds)-1]
			}
			_, err := run(ctx, func(pipe redis.Pipeliner) error {
				for _, cmd := range cmds {
					_ = pipe.Process(ctx, cmd)
				}
				return nil
			})
			return err
		},
	}
}

// libraryFiles returns the library's source files, without its other modules, its
// tests and the files that only these use.
func libraryFiles(t testing.TB) (files []string) {
	t.Helper()
	for _, pattern := range []string{"*.go", "internal/*/*.go"} {
		found, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range found {
			dir := filepath.Dir(file)
			_, err := os.Stat(filepath.Join(dir, "go.mod"))
			if strings.HasSuffix(file, "_test.go") || dir != "." && err == nil || filepath.Base(dir) == "testserver" {
				continue
			}
			files = append(files, file)
		}
	}
	return files
}

// TestRights_AdminCommands: the library never sends the commands that the tests
// send as the administrator. (Commands within its scripts are not diverted, and are
// quoted differently.)
func TestRights_AdminCommands(t *testing.T) {
	for _, file := range libraryFiles(t) {
		source, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, name := range adminCommands {
			words := strings.Fields(name)
			quoted := `"` + strings.Join(words, `", "`) + `"`
			switch name {
			case "xinfo": // the library does not use its FULL form
				quoted = `"full"`
			case "info": // optional: only for an error's text
				continue
			}
			assert.False(t, strings.Contains(strings.ToLower(string(source)), quoted), "%s in %s", name, file)
			for _, r := range rights {
				if len(words) == 1 && name != "xinfo" {
					assert.NotContains(t, strings.Fields(strings.Join(r.sets, " ")), "+"+name)
				}
			}
		}
	}
}

// TestRights_Docs: the table in docs/rights.md is the one that is tested here.
func TestRights_Docs(t *testing.T) {
	page, err := os.ReadFile("docs/rights.md")
	require.NoError(t, err)
	_, table, ok := strings.Cut(string(page), "## Rights\n")
	require.True(t, ok)
	backquoted := regexp.MustCompile("`(\\+[^`]*)`")
	i := 0
	for line := range strings.Lines(table) {
		if !strings.HasPrefix(line, "| ") {
			if i > 0 {
				break
			}
			continue
		}
		cells := strings.Split(strings.ReplaceAll(line, `\|`, "\x00"), "|")
		require.Len(t, cells, 5, line)
		feature := strings.TrimSpace(cells[1])
		if feature == "for" {
			continue
		}
		require.Less(t, i, len(rights), "docs/rights.md has more rows: %s", line)
		var sets []string
		for _, m := range backquoted.FindAllStringSubmatch(cells[2], -1) {
			sets = append(sets, strings.ReplaceAll(m[1], "\x00", "|"))
		}
		assert.Equal(t, rights[i].feature, feature)
		assert.Equal(t, rights[i].sets, sets, feature)
		assert.NotEmpty(t, strings.TrimSpace(cells[3]), "what is without it")
		i++
	}
	assert.Equal(t, len(rights), i, "rows")
}

// A life is a subscription by a user with few permissions, and messages that use
// each of them: one is handled, one redelivered, one dead-lettered, one is
// malformed, and one belongs to a dead consumer.
type life struct {
	topic       string
	admin, user *redis.Client
	log         logRecorder
	sub         *goxstreams.Subscriber
	refused     *refusals
	handled     *tally
	want        []string // UUIDs of the messages to be handled
	dying       int      // messages to be dead-lettered
}

// refusals counts a client's commands that the server has denied, and all reads:
// whether one was denied is in the raw reply.
type refusals struct {
	mu    sync.Mutex
	n     map[string]int
	reads int
}

func (r *refusals) hook() redis.Hook {
	return &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		err := next()
		r.mu.Lock()
		defer r.mu.Unlock()
		if cmd.Name() == "xreadgroup" {
			r.reads++
		}
		if err != nil && !errors.Is(err, redis.Nil) {
			r.n[strings.ToLower(fmt.Sprint(cmd.Args()[0]))]++
		}
		return err
	}}
}

func (r *refusals) total(reads bool) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if reads {
		return r.reads
	}
	for _, times := range r.n {
		n += times
	}
	return n
}

// beginLife subscribes as a user with the given permissions, and waits until the
// first message is handled.
func beginLife(t testing.TB, admin *redis.Client, change func(*goxstreams.SubscriberConfig), commands ...string) *life {
	t.Helper()
	l := &life{topic: topic(t), admin: admin, log: newLogRecorder(), refused: &refusals{n: make(map[string]int)}, handled: newTally()}
	l.user = userOf(t, admin, l.topic, commands...)
	l.user.AddHook(l.refused.hook())
	config := claiming(l.user)
	config.BlockTime = 50 * time.Millisecond // 7.0 still serves a read that is blocking
	config.Retry = quickRetry()
	config.Retry.MaxRetries = 1
	config.MaxConcurrency = 4
	config.CloseTimeout = patience
	if change != nil {
		change(&config)
	}
	l.sub = newSubscriberLog(t, config, l.log)
	messages := subscribe(t, l.sub, l.topic)
	go func() {
		for msg := range messages {
			d, _ := goxstreams.DeliveryFromContext(msg.Context())
			switch p := string(msg.Payload); {
			case p == "dies", p == "flaky" && d.Count == 1:
				msg.Nack()
			default:
				l.handled.add(msg)
				msg.Ack()
			}
		}
	}()
	l.want = publish(t, admin, l.topic, "first")
	eventually(t, func() bool { return l.handled.has(l.want) })
	return l
}

// goOn publishes messages that use the permissions.
func (l *life) goOn(t testing.TB) {
	t.Helper()
	uuids := publish(t, l.admin, l.topic, "good", "flaky")
	l.want = append(l.want, uuids...)
	publish(t, l.admin, l.topic, "dies")
	addRaw(t, l.admin, l.topic, "no", "message")
	l.dying += 2
}

// leaveBehind leaves an entry of a dead consumer, to be claimed.
func (l *life) leaveBehind(t testing.TB) {
	t.Helper()
	ctx := context.Background()
	uuids := publish(t, l.admin, l.topic, "left behind")
	l.want = append(l.want, uuids...)
	entries := entriesOf(t, l.admin, l.topic) // none, if it is handled and deleted already
	for _, e := range entries[max(0, len(entries)-1):] {
		require.NoError(t, l.admin.Do(ctx, "xclaim", l.topic, testGroup, "dead", 0, e.id, "force", "retrycount", 1, "justid").Err())
	}
}

// requireWell requires that nothing is lost and only the right messages are dead,
// and closes the subscription.
func (l *life) requireWell(t testing.TB) {
	t.Helper()
	eventually(t, func() bool { return l.handled.has(l.want) }, "a message is not handled")
	// The dying message may be read last: before that nothing is pending either.
	eventually(t, func() bool {
		return l.admin.XLen(context.Background(), goxstreams.DeadLetterTopic(l.topic)).Val() >= int64(l.dying)
	}, "a message is not dead")
	eventuallySettled(t, l.admin, l.topic, testGroup)
	eventually(t, func() bool { return stats(t, l.sub).InFlight == 0 })
	eventually(t, func() bool { return stats(t, l.sub).Err == nil }, "Stats shows an outage that is over")
	require.NoError(t, l.sub.Close())
	letters := lettersIn(t, l.admin, goxstreams.DeadLetterTopic(l.topic))
	kinds := map[goxstreams.DeadKind]int{goxstreams.Exhausted: 0, goxstreams.Broken: 0}
	for _, d := range letters {
		kinds[d.Kind]++
	}
	assert.Equal(t, map[goxstreams.DeadKind]int{goxstreams.Exhausted: l.dying / 2, goxstreams.Broken: l.dying / 2}, kinds, "dead letters")
	assert.Equal(t, len(l.want), l.handled.len(), "handled messages")
}

// requireNotPermitted is for an error from within a script, which each server words in its
// own way.
func requireNotPermitted(t testing.TB, err error) {
	t.Helper()
	require.Error(t, err)
	require.Regexp(t, "NOPERM|no permissions|can't run this command", err.Error())
}

// TestRights_Sufficient: each feature works for a user with exactly the permissions
// that docs/rights.md lists for it, on the topic's keys.
func TestRights_Sufficient(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	admin := testserver.Client(t)
	feature := func(name string, test func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
	required := rightsOf(t, "Subscriber with a group")

	feature("Publisher", func(t *testing.T) {
		topic := topic(t)
		one := newPublisher(t, userOf(t, admin, topic, rightsOf(t, "Publisher", 0)...))
		require.NoError(t, one.Publish(topic, numbered(1)...))
		requireRefused(t, one.Publish(topic, numbered(2)...), "NOPERM")
		several := newPublisher(t, userOf(t, admin, topic, rightsOf(t, "Publisher", 0, 1)...))
		require.NoError(t, several.Publish(topic, numbered(2)...))
		require.Len(t, stored(t, admin, topic), 3)
		requireRefused(t, several.Publish("other"+topic, numbered(1)...), "NOPERM")
		if knows(t, admin, "xidmprecord") {
			idempotent := func(sets ...int) *goxstreams.Publisher {
				return newIdempotent(t, userOf(t, admin, topic, rightsOf(t, "Publisher", sets...)...), goxstreams.Idempotence{})
			}
			requireRefused(t, idempotent(0).Publish(topic, numbered(1)...), "Idempotence")
			twice := numbered(1)
			for range 2 {
				require.NoError(t, idempotent(0, 2).Publish(topic, twice...))
			}
			require.Len(t, stored(t, admin, topic), 4)
		}
	})
	feature("TopicStats", func(t *testing.T) {
		topic := topic(t)
		require.NoError(t, admin.XGroupCreateMkStream(t.Context(), topic, testGroup, "0").Err())
		got, err := newSubscriber(t, grouped(userOf(t, admin, topic, rightsOf(t, "TopicStats")...))).TopicStats(t.Context(), topic)
		require.NoError(t, err)
		require.Equal(t, int64(0), got.Lag)
		for _, command := range rightsOf(t, "TopicStats", 0) {
			user := userOf(t, admin, topic, without(rightsOf(t, "TopicStats"), strings.TrimPrefix(command, "+"))...)
			_, err := newSubscriber(t, grouped(user)).TopicStats(t.Context(), topic)
			requireRefused(t, err, "NOPERM")
		}
		publishN(t, admin, topic, 1)
		got, err = newSubscriber(t, grouped(userOf(t, admin, topic, rightsOf(t, "TopicStats")...))).TopicStats(t.Context(), topic)
		require.NoError(t, err)
		require.Equal(t, testGroup, got.Pin.Group)
		require.Zero(t, got.CutOff)
		for set, unknown := range []func(goxstreams.TopicStats) int64{
			1: func(got goxstreams.TopicStats) int64 { return got.Delayed },
			2: func(got goxstreams.TopicStats) int64 { return got.CutOff },
		} {
			if set == 0 {
				continue // above
			}
			for _, command := range rightsOf(t, "TopicStats", set) {
				user := userOf(t, admin, topic, without(rightsOf(t, "TopicStats"), strings.TrimPrefix(command, "+"))...)
				got, err := newSubscriber(t, grouped(user)).TopicStats(t.Context(), topic)
				require.NoError(t, err, command)
				require.EqualValues(t, -1, unknown(got), command)
			}
		}
	})
	feature("delayed messages", func(t *testing.T) {
		topic := topic(t)
		all := rightsOf(t, "delayed messages", 0)
		for _, command := range all {
			pub := newPublisher(t, userOf(t, admin, topic, without(all, strings.TrimPrefix(command, "+"))...))
			requireNotPermitted(t, pub.Publish(topic, message.NewMessage("now", nil), delayedBy("a", time.Hour)))
			require.Empty(t, delayedIn(t, newSchedule(t, admin, topic)), command)
			require.Empty(t, stored(t, admin, topic), command)
		}
		publishedIn(t, userOf(t, admin, topic, all...), topic, delayedBy("a", time.Millisecond))
		mover := rightsOf(t, "delayed messages", 1)
		for _, command := range slices.DeleteFunc(slices.Clone(mover), func(c string) bool { return slices.Contains(required, c) }) {
			log := newLogRecorder()
			user := userOf(t, admin, topic, without(slices.Concat(required, mover), strings.TrimPrefix(command, "+"))...)
			sub := newSubscriberLog(t, grouped(user), log)
			subscribe(t, sub, topic)
			eventually(t, func() bool {
				return slices.ContainsFunc(log.Infos(), func(line string) bool { return strings.Contains(line, "No permission to move delayed messages") })
			}, command)
			require.NoError(t, stats(t, sub).Err)
			require.Len(t, delayedIn(t, newSchedule(t, admin, topic)), 1, command)
			require.NoError(t, sub.Close())
		}
		messages := subscribe(t, newSubscriber(t, grouped(userOf(t, admin, topic, slices.Concat(required, mover)...))), topic)
		msg := next(t, messages)
		require.Equal(t, "a", msg.UUID)
		msg.Ack()
		if knows(t, admin, "xidmprecord") {
			user := userOf(t, admin, topic, slices.Concat(all, rightsOf(t, "Publisher", 0, 2))...)
			require.NoError(t, newIdempotent(t, user, goxstreams.Idempotence{}).Publish(topic, delayedBy("b", time.Hour)))
		}
	})
	feature("Retention", func(t *testing.T) {
		topic := topic(t)
		keeping := func(user *redis.Client) goxstreams.SubscriberConfig {
			config := grouped(user)
			config.Retention.KeepLast = 1
			return config
		}
		trimmer := rightsOf(t, "Retention, Trim", 0)
		for _, command := range slices.DeleteFunc(slices.Clone(trimmer), func(c string) bool { return slices.Contains(required, c) }) {
			log := newLogRecorder()
			sub := newSubscriberLog(t, keeping(userOf(t, admin, topic, without(slices.Concat(required, trimmer), strings.TrimPrefix(command, "+"))...)), log)
			messages := subscribe(t, sub, topic)
			publishN(t, admin, topic, 2)
			require.Len(t, collect(messages, 2, patience), 2)
			if command == "+hincrby" || command == "+hset" || command == "+hget" { // asked for before anything is counted
				require.NoError(t, admin.Del(t.Context(), topic+".retention{"+topic+"}").Err())
			}
			eventually(t, func() bool {
				return slices.ContainsFunc(log.Infos(), func(line string) bool { return strings.Contains(line, "No permission to trim") })
			}, command)
			require.NoError(t, stats(t, sub).Err)
			require.NoError(t, sub.Close())
			length := admin.XLen(t.Context(), topic).Val()
			_, err := goxstreams.Trim(t.Context(), userOf(t, admin, topic, without(trimmer, strings.TrimPrefix(command, "+"))...), topic, goxstreams.Retention{KeepLast: 1})
			if command != "+hget" { // only those that trim in turns read the hash
				requireNotPermitted(t, err)
			}
			if command != "+eval" && command != "+hget" {
				require.ErrorContains(t, err, "to run "+strings.ToUpper(strings.Split(strings.TrimPrefix(command, "+"), "|")[0])+": nothing is done")
				require.Equal(t, length, admin.XLen(t.Context(), topic).Val(), "nothing is done")
			}
		}
		subscribe(t, newSubscriber(t, keeping(userOf(t, admin, topic, slices.Concat(required, trimmer)...))), topic)
		eventually(t, func() bool { return admin.XLen(t.Context(), topic).Val() == 1 })
		publishN(t, admin, topic, 1)
		eventually(t, func() bool { return admin.XLen(t.Context(), topic).Val() == 1 })
		_, err := goxstreams.Trim(t.Context(), userOf(t, admin, topic, trimmer...), topic, goxstreams.Retention{HardMaxLen: 1})
		require.NoError(t, err)
	})
	feature("Schedule", func(t *testing.T) {
		topic := topic(t)
		publishedIn(t, admin, topic, delayedBy("a", time.Hour), delayedBy("b", time.Hour))
		user := newSchedule(t, userOf(t, admin, topic, rightsOf(t, "Schedule")...), topic)
		require.Len(t, delayedIn(t, user), 2)
		n, err := user.Count(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 2, n)
		_, err = user.Get(t.Context(), "a")
		require.NoError(t, err)
		requireNotPermitted(t, newSchedule(t, userOf(t, admin, topic, rightsOf(t, "Schedule", 0, 2)...), topic).Cancel(t.Context(), "a"))
		require.NoError(t, user.Reschedule(t.Context(), "a", time.Now().Add(2*time.Hour)))
		require.NoError(t, user.Cancel(t.Context(), "a"))
		requireNotPermitted(t, newSchedule(t, userOf(t, admin, topic, rightsOf(t, "Schedule", 0, 1)...), topic).Reschedule(t.Context(), "b", time.Now()))
		require.Len(t, delayedIn(t, user), 1)
	})
	feature("Recur", func(t *testing.T) {
		topic := topic(t)
		pub := newPublisher(t, userOf(t, admin, topic, rightsOf(t, "Recur")...))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = pub.Recur(ctx, atEach(topic, 10*time.Millisecond)) }()
		eventually(t, func() bool { return admin.XLen(t.Context(), topic).Val() > 1 })
	})
	feature("Pause, Resume", func(t *testing.T) {
		topic := topic(t)
		createGroup(t, admin, topic, testGroup)
		user := userOf(t, admin, topic, rightsOf(t, "Pause, Resume", 0)...)
		pause(t, user, topic)
		_, err := goxstreams.Paused(t.Context(), user, topic)
		requireNotPermitted(t, err)
		paused, err := goxstreams.Paused(t.Context(), userOf(t, admin, topic, rightsOf(t, "Pause, Resume", 1)...), topic)
		require.NoError(t, err)
		require.Contains(t, paused, testGroup)
		st, err := newSubscriber(t, grouped(userOf(t, admin, topic, append(rightsOf(t, "Pause, Resume", 2), rightsOf(t, "TopicStats")...)...))).TopicStats(t.Context(), topic)
		require.NoError(t, err)
		require.Equal(t, paused[testGroup], st.PausedSince)
		sub := newSubscriber(t, grouped(userOf(t, admin, topic, append(rightsOf(t, "Pause, Resume", 2), required...)...)))
		subscribe(t, sub, topic)
		eventuallyPaused(t, sub, true)
		resume(t, user, topic)
		eventuallyPaused(t, sub, false)
		for _, command := range rightsOf(t, "Pause, Resume", 0) {
			user := userOf(t, admin, topic, without(rightsOf(t, "Pause, Resume", 0), strings.TrimPrefix(command, "+"))...)
			require.Error(t, goxstreams.Pause(t.Context(), user, topic, testGroup), command)
			paused, err := goxstreams.Paused(t.Context(), admin, topic)
			require.NoError(t, err)
			require.Empty(t, paused)
		}
	})
	feature("Subscriber with a group", func(t *testing.T) {
		l := beginLife(t, admin, nil, required...)
		l.goOn(t)
		l.leaveBehind(t)
		l.requireWell(t)
	})
	feature("all", func(t *testing.T) { // nothing is denied
		l := beginLife(t, admin, nil, allRights(t, admin)...)
		l.goOn(t)
		l.leaveBehind(t)
		require.NoError(t, admin.XGroupDestroy(t.Context(), l.topic, testGroup).Err())
		eventually(t, func() bool { return admin.XPending(t.Context(), l.topic, testGroup).Err() == nil }, "the group is not made again")
		l.want = slices.Concat(l.want, publish(t, admin, l.topic, "after"))
		eventually(t, func() bool { return l.handled.has(l.want[len(l.want)-1:]) })
		require.NoError(t, l.sub.Close())
		l.refused.mu.Lock()
		defer l.refused.mu.Unlock()
		for _, line := range l.log.Errors() {
			assert.NotContains(t, line, "NOPERM")
		}
		for _, line := range l.log.Infos() {
			assert.NotContains(t, line, "No permission")
		}
	})
	feature("DeadLetterQueue", func(t *testing.T) {
		topic := topic(t)
		letters := lettersOf(t, admin, topic, 3)
		stream := goxstreams.DeadLetterTopic(topic)
		look := rightsOf(t, "DeadLetterQueue", 0)
		q := queueOf(t, userOf(t, admin, topic, look...), stream)
		n, err := q.Count(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 3, n)
		for _, err := range q.All(t.Context(), "") {
			require.NoError(t, err)
		}
		for _, do := range []func(context.Context, ...string) (int, error){q.Delete, q.Replay, q.ReplayToAll} {
			_, err = do(t.Context(), letters[0].ID)
			require.ErrorContains(t, err, "NOPERM")
			require.Len(t, entriesOf(t, admin, stream), 3)
			require.Len(t, entriesOf(t, admin, topic), 1)
		}
		q = queueOf(t, userOf(t, admin, topic, append(rightsOf(t, "DeadLetterQueue", 1), look...)...), stream)
		_, err = q.Delete(t.Context(), letters[0].ID)
		require.NoError(t, err)
		replay := append(rightsOf(t, "DeadLetterQueue", 2), look...)
		for _, missing := range []string{"eval", "xadd", "xdel"} {
			q = queueOf(t, userOf(t, admin, topic, without(replay, missing)...), stream)
			_, err = q.Replay(t.Context(), letters[1].ID)
			require.Error(t, err)
			if missing != "xadd" { // 7.0 does not say which command it denies to a script
				require.Contains(t, strings.ToLower(err.Error()), missing)
			}
			require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
			require.Len(t, entriesOf(t, admin, topic), 1, "it is in both streams: %v", err)
			require.Len(t, entriesOf(t, admin, stream), 2)
		}
		q = queueOf(t, userOf(t, admin, topic, replay...), stream)
		n2, err := q.Replay(t.Context(), letters[1].ID, letters[2].ID)
		require.NoError(t, err)
		require.Equal(t, 2, n2)
	})
	feature("removing consumers' names", func(t *testing.T) {
		l := beginLife(t, admin, nil, append(rightsOf(t, "removing consumers' names"), required...)...)
		l.requireWell(t)
		require.Empty(t, consumersOf(t, admin, l.topic))
	})
	feature("groups of many consumers", func(t *testing.T) {
		l := beginLife(t, admin, nil, append(rightsOf(t, "groups of many consumers with very many pending entries"), required...)...)
		l.leaveBehind(t)
		l.requireWell(t)
		require.NotContains(t, strings.Join(l.log.Errors(), "\n"), "NOPERM")
	})
	feature("a Close that does not wait for reads", func(t *testing.T) {
		commands := rightsOf(t, "a Close that does not wait for reads, topics that share reads")
		l := beginLife(t, admin, func(c *goxstreams.SubscriberConfig) { c.BlockTime = 10 * patience }, append(commands, required...)...)
		l.requireWell(t) // it closes, with a read that would wait for minutes
		assert.NotContains(t, strings.Join(l.log.Infos(), "\n"), "CLIENT UNBLOCK")
	})
	feature("a lost group", func(t *testing.T) {
		l := beginLife(t, admin, nil, append(rightsOf(t, "a lost group"), required...)...)
		require.NoError(t, admin.Del(t.Context(), l.topic).Err())
		l.goOn(t) // read from the start of a new stream
		l.requireWell(t)
	})
	feature("DeleteAcked", func(t *testing.T) {
		for i := range 2 {
			if i == 0 && !knows(t, admin, "xackdel") {
				continue
			}
			for _, fanOut := range []bool{false, true} {
				commands := append(rightsOf(t, "DeleteAcked", i, 2), required...)
				if fanOut {
					commands = append(commands, rightsOf(t, "Retention, Trim")...)
				}
				l := beginLife(t, admin, func(c *goxstreams.SubscriberConfig) { c.DeleteAcked = true }, commands...)
				if fanOut {
					sub := newSubscriber(t, goxstreams.SubscriberConfig{Client: admin, StartID: "0"})
					go settling(subscribe(t, sub, l.topic), func(*message.Message) ([]*message.Message, error) { return nil, nil })
					l.goOn(t)
					eventually(t, func() bool { return len(entriesOf(t, admin, l.topic)) == 0 }, "what the fan-out has read stays")
					require.NoError(t, sub.Close())
				}
				l.goOn(t)
				l.requireWell(t)
				require.Empty(t, entriesOf(t, admin, l.topic), "%v", commands)
				said := logLinesWith(l.log.Infos(), "No permission to trim the stream")
				if fanOut {
					require.Empty(t, said)
				} else {
					require.Len(t, said, 1)
				}
			}
		}
	})
	feature("fan-out", func(t *testing.T) {
		for _, tt := range []struct {
			start string
			sets  []int
			said  int
		}{{"0", []int{0}, 1}, {"$", []int{0, 1}, 1}, {"$", []int{0, 1, 2}, 0}} {
			topic, log := topic(t), newLogRecorder()
			commands := rightsOf(t, "fan-out", tt.sets...)
			config := goxstreams.SubscriberConfig{Client: userOf(t, admin, topic, commands...), StartID: tt.start, CloseTimeout: patience}
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			for range 2 {
				want := publish(t, admin, topic, "x")
				msg := next(t, messages)
				require.Equal(t, want[0], msg.UUID)
				msg.Ack()
			}
			positions := topic + ".fanout{" + topic + "}"
			if tt.said == 0 {
				last := entriesOf(t, admin, topic)[1].id
				eventually(t, func() bool {
					return slices.ContainsFunc(admin.HVals(t.Context(), positions).Val(), func(told string) bool { return strings.HasPrefix(told, last+" ") })
				}, "it does not say how far it has come")
			}
			require.NoError(t, sub.Close())
			require.Zero(t, admin.Exists(t.Context(), positions).Val())
			require.Len(t, logLinesWith(log.Infos(), "No permission to store the read position of a fan-out"), tt.said)
			require.Empty(t, log.Errors())
		}
	})
}

// A fan-out that once lacked permission to store its position stores it as soon as
// it may. Found by internal/sim: it never did.
func TestRights_FanOutForOnce(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	topic, log, client := topic(t), newLogRecorder(), newClient(t)
	positions := topic + ".fanout{" + topic + "}"
	var denied atomic.Int64
	config := goxstreams.SubscriberConfig{Client: newClient(t, &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if isScript(cmd, "'HSET'") && denied.Add(1) == 1 {
			return redisx.ReplyError("NOPERM User worker has no permissions to run the 'hset' command")
		}
		return next()
	}})}
	subscribe(t, newSubscriberLog(t, config, log), topic)
	publish(t, client, topic, "x")
	eventually(t, func() bool { return client.Exists(t.Context(), positions).Val() == 1 }, "it does not say how far it has come")
	require.Len(t, logLinesWith(log.Infos(), "No permission to store the read position of a fan-out"), 1)
}

// without returns the permissions except one.
func without(commands []string, command string) []string {
	return slices.DeleteFunc(slices.Clone(commands), func(c string) bool { return c == "+"+command })
}

// TestRights_Without: each permission that is missing from the start has the effect
// that docs/rights.md describes, and none of them loses a message.
func TestRights_Without(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	admin := testserver.Client(t)
	all := allRights(t, admin)
	// Degradation is logged, or visible.
	said := map[string]string{
		"client|id":      "CLIENT UNBLOCK",
		"client|unblock": "CLIENT UNBLOCK",
		"hmget":          "Pause and Resume have no effect",
	}
	for _, command := range []string{
		"xinfo|consumers", "xgroup|delconsumer", "xgroup|createconsumer", "client|id", "client|unblock", "xinfo|groups", "xinfo|stream",
		"xdel", "xlen", "xrevrange", "xread", "multi", "exec", "hgetall", "hget", "hmget", "hset", "hdel", "expire", "time", "xtrim", "hincrby",
	} {
		t.Run("goes on/"+command, func(t *testing.T) {
			t.Parallel()
			l := beginLife(t, admin, nil, without(all, command)...)
			l.goOn(t)
			l.leaveBehind(t)
			l.requireWell(t)
			if text := said[command]; text != "" {
				n := 0
				for _, line := range l.log.Infos() {
					if strings.Contains(line, text) {
						n++
					}
				}
				assert.Equal(t, 1, n, "it is to be said once: %v", l.log.Infos())
			}
			names := consumersOf(t, admin, l.topic)
			switch command {
			case "xinfo|consumers", "xgroup|delconsumer":
				assert.NotEmpty(t, names, "names stay in the group")
			default:
				assert.Subset(t, []string{"dead", "released"}, names)
			}
		})
	}
	t.Run("error at start", func(t *testing.T) {
		refused := func(t *testing.T, commands []string, change func(*goxstreams.SubscriberConfig)) string {
			topic := topic(t)
			config := grouped(userOf(t, admin, topic, commands...))
			config.WaitForRedis = patience // waiting is pointless
			change(&config)
			began := time.Now()
			_, err := newSubscriber(t, config).Subscribe(t.Context(), topic)
			require.ErrorContains(t, err, "NOPERM")
			require.ErrorContains(t, err, topic)
			require.Less(t, time.Since(began), patience/2)
			require.Zero(t, admin.Exists(t.Context(), topic).Val(), "something was made")
			return err.Error()
		}
		same := func(*goxstreams.SubscriberConfig) {}
		for _, command := range []string{"eval", "xreadgroup", "xack", "xclaim", "xpending", "xrange"} {
			for _, change := range []func(*goxstreams.SubscriberConfig){same, func(c *goxstreams.SubscriberConfig) { c.DeleteAcked = true }} {
				require.Contains(t, refused(t, without(all, command), change), "the permission for "+strings.ToUpper(command)+" is missing")
			}
		}
		text := refused(t, without(without(all, "xclaim"), "xreadgroup"), same)
		require.Contains(t, text, "the permission for XREADGROUP, XCLAIM is missing")
		require.Contains(t, refused(t, without(all, "xgroup|create"), same), "xgroup|create")
		refused(t, without(all, "xinfo|stream"), func(c *goxstreams.SubscriberConfig) { c.ConsumerGroup = "" })
	})
	t.Run("several groups without XACKDEL", func(t *testing.T) {
		topic := topic(t)
		createGroup(t, admin, topic, "another")
		config := grouped(userOf(t, admin, topic, without(all, "xackdel")...))
		config.DeleteAcked = true
		messages := subscribe(t, newSubscriber(t, config), topic)
		want := publishN(t, admin, topic, 3)
		require.Len(t, collect(messages, 3, patience), 3)
		eventuallySettled(t, admin, topic, testGroup)
		require.Equal(t, want, stored(t, admin, topic), "the other group needs them")
		config.ConsumerGroup = "another"
		subscribed := subscribe(t, newSubscriber(t, config), topic)
		require.Len(t, collect(subscribed, 3, patience), 3)
		eventually(t, func() bool { return admin.XLen(t.Context(), topic).Val() == 0 })
	})
}

// TestRights_TakenAway: a required permission is revoked at run time, or was never
// granted. This is logged once, Stats shows it, and when the permission is granted
// everything continues: nothing is lost, nothing dies that should not, no dead
// letter is stored twice.
func TestRights_TakenAway(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	admin := testserver.Client(t)
	all := allRights(t, admin)
	rules := func(deny ...string) func(t *testing.T, l *life) {
		return func(t *testing.T, l *life) { setUser(t, admin, l.user.Options().Username, deny...) }
	}
	kill := func(t *testing.T, l *life) {
		require.NoError(t, admin.ClientKillByFilter(t.Context(), "USER", l.user.Options().Username).Err())
	}
	for _, tt := range []struct {
		name       string
		take, give func(t *testing.T, l *life)
		err        string
	}{
		{"DeleteAcked, xackdel and xdel", rules("-xackdel", "-xdel"), rules("+xackdel"), "XDEL"},
		{"DeleteAcked by script, xdel", rules("-xdel"), rules("+xdel"), "XDEL"},
		{"DeleteAcked by script, xack", rules("-xack"), rules("+xack"), "XACK"},
		{"xreadgroup", rules("-xreadgroup"), rules("+xreadgroup"), "'xreadgroup'"},
		{"xack", rules("-xack"), rules("+xack"), "'xack'"},
		{"xclaim", rules("-xclaim"), rules("+xclaim"), "'xclaim'|can't run this command"}, // 7.0 does not name it within a script
		{"xpending", rules("-xpending"), rules("+xpending"), "'xpending'"},
		{"xrange", rules("-xrange"), rules("+xrange"), "'xrange'|can't run this command"},
		{"xadd", rules("-xadd"), rules("+xadd"), "dead-letter: moving"},
		{"eval", rules("-eval"), rules("+eval"), "'eval'"},
		{"DeleteAcked, eval", rules("-eval"), rules("+eval"), "'eval'"},
		{"DeleteAcked, hgetall", rules("-hgetall"), rules("+hgetall"), "hgetall"},
		{"xgroup|create", func(t *testing.T, l *life) {
			rules("-xgroup|create")(t, l)
			require.NoError(t, admin.Del(t.Context(), l.topic).Err())
		}, rules("+xgroup|create"), "NOGROUP"},
		{"keys", rules("resetkeys", "~other"), func(t *testing.T, l *life) { rules("resetkeys", "~"+l.topic+"*")(t, l) }, "NOPERM"},
		{"dead-letter stream", func(t *testing.T, l *life) { rules("resetkeys", "~"+l.topic)(t, l) },
			func(t *testing.T, l *life) { rules("resetkeys", "~"+l.topic+"*")(t, l) }, "NOPERM"},
		{"password", func(t *testing.T, l *life) {
			rules("resetpass", ">another")(t, l)
			kill(t, l)
		}, func(t *testing.T, l *life) { rules(">"+l.user.Options().Password)(t, l) }, "WRONGPASS"},
		{"user disabled", func(t *testing.T, l *life) {
			rules("off")(t, l)
			kill(t, l)
		}, rules("on"), "WRONGPASS"},
		{"all", rules("-@all"), rules(all...), "NOPERM"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			commands := all
			var change func(*goxstreams.SubscriberConfig)
			if strings.HasPrefix(tt.name, "DeleteAcked") {
				change = func(c *goxstreams.SubscriberConfig) { c.DeleteAcked = true }
				if strings.Contains(tt.name, "script") {
					commands = without(all, "xackdel")
				} else if strings.Contains(tt.name, "xackdel") && !knows(t, admin, "xackdel") {
					t.Skip("the server has no XACKDEL")
				}
			}
			l := beginLife(t, admin, change, commands...)
			tt.take(t, l)
			l.goOn(t)
			l.leaveBehindIfGroup(t)
			shows := func() bool {
				err := stats(t, l.sub).Err
				return err != nil && slices.ContainsFunc(strings.Split(tt.err, "|"), func(text string) bool {
					return strings.Contains(strings.ToLower(err.Error()), strings.ToLower(text))
				})
			}
			eventually(t, shows, "Stats does not show it: %v", func() any { return stats(t, l.sub).Err }())
			assert.WithinDuration(t, time.Now(), stats(t, l.sub).Since, patience)
			reads := tt.name == "xreadgroup"
			before := l.refused.total(reads)
			eventually(t, func() bool { return l.refused.total(reads) >= before+5 }, "it does not try again")
			assert.True(t, shows())
			began, ended := outageLogged(l.log)
			assert.Equal(t, 1, began, "logged: %v", l.log.Errors())
			assert.Zero(t, ended)
			assert.LessOrEqual(t, len(l.log.Errors()), 4, "a flood: %v", l.log.Errors()) // including the malformed entry and the lost group
			tt.give(t, l)
			l.requireWell(t)
			began, ended = outageLogged(l.log)
			assert.Equal(t, 1, began, "logged: %v", l.log.Errors())
			assert.Equal(t, 1, ended, "logged: %v", l.log.Infos())
			if change != nil {
				assert.Empty(t, entriesOf(t, admin, l.topic), "acked entries stay")
			}
		})
	}
}

// leaveBehindIfGroup is leaveBehind while there is a group.
func (l *life) leaveBehindIfGroup(t testing.TB) {
	t.Helper()
	if l.admin.XPending(context.Background(), l.topic, testGroup).Err() == nil {
		l.leaveBehind(t)
	}
}

// TestRights_PasswordSet: a server that required no password requires one from now
// on.
func TestRights_PasswordSet(t *testing.T) {
	t.Parallel()
	server := testserver.Private(t)
	admin, topic, log := server.Client(), topic(t), newLogRecorder()
	sub := newSubscriberLog(t, claiming(server.Client()), log)
	handled := newTally()
	handled.handle(subscribe(t, sub, topic), nil)
	want := publish(t, admin, topic, "before")
	eventually(t, func() bool { return handled.has(want) })
	require.NoError(t, admin.Do(t.Context(), "acl", "setuser", "boss", "on", ">boss", "~*", "&*", "+@all").Err())
	boss := redis.NewClient(&redis.Options{Addr: server.Addr(), Username: "boss", Password: "boss"})
	t.Cleanup(func() { _ = boss.Close() })
	require.NoError(t, boss.ConfigSet(t.Context(), "requirepass", "secret").Err())
	require.NoError(t, boss.ClientKillByFilter(t.Context(), "USER", "default").Err())
	want = append(want, publish(t, boss, topic, "meanwhile")...)
	eventually(t, func() bool { err := stats(t, sub).Err; return err != nil && strings.Contains(err.Error(), "NOAUTH") })
	began, _ := outageLogged(log)
	assert.Equal(t, 1, began, "logged: %v", log.Errors())
	require.NoError(t, boss.ConfigSet(t.Context(), "requirepass", "").Err())
	eventually(t, func() bool { return handled.has(want) })
	eventually(t, func() bool { return stats(t, sub).Err == nil })
}

// TestRights_PipelineRefused: the server rejects the connection for a pipeline,
// since the password was changed. go-redis returns that error, and leaves the
// pipeline's commands without one: concurrent calls of Publish, and acks, appeared
// to have succeeded.
func TestRights_PipelineRefused(t *testing.T) {
	testserver.RequireReal(t)
	admin, topic := testserver.Client(t), topic(t)
	client := userOf(t, admin, topic, allRights(t, admin)...)
	letters := lettersOf(t, admin, topic, 2)
	var shared atomic.Bool
	client.AddHook(&hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		if cmd.Name() == "xadd" {
			time.Sleep(time.Millisecond) // so that others arrive meanwhile, in some round
		}
		return next()
	}, pipeline: func(_ context.Context, cmds []redis.Cmder, next func() error) error {
		if len(cmds) > 1 && cmds[0].Name() == "xadd" {
			shared.Store(true)
		}
		return next()
	}})
	pub := newPublisher(t, client)
	setUser(t, admin, client.Options().Username, "resetpass", ">another")
	before := len(entriesOf(t, admin, topic))
	eventually(t, func() bool {
		errs := make([]error, 8)
		var calls sync.WaitGroup
		for i := range errs {
			calls.Go(func() { errs[i] = pub.Publish(topic, numbered(1)...) })
		}
		calls.Wait()
		for _, err := range errs {
			requireRefused(t, err, "WRONGPASS")
		}
		return shared.Load()
	}, "no calls shared a pipeline")
	requireRefused(t, pub.Publish(topic, numbered(3)...), "WRONGPASS")
	require.Len(t, entriesOf(t, admin, topic), before)
	q := queueOf(t, client, goxstreams.DeadLetterTopic(topic))
	for _, do := range []func(context.Context, ...string) (int, error){q.Delete, q.Replay, q.ReplayToAll} {
		n, err := do(t.Context(), idsOf(letters)...)
		require.ErrorContains(t, err, "WRONGPASS")
		require.Zero(t, n)
	}
}

// TestRights_ClusterWithoutMULTI: in a Cluster the permission for MULTI was not
// checked: the messages ran one by one, all were stored, and Publish returned an
// error that says that none is.
func TestRights_ClusterWithoutMULTI(t *testing.T) {
	t.Parallel()
	server := testserver.Cluster(t)
	admin := server.Client()
	name := watermill.NewShortUUID()
	setUser := func(rules ...any) {
		t.Helper()
		require.NoError(t, admin.ForEachMaster(t.Context(), func(ctx context.Context, node *redis.Client) error {
			return node.Do(ctx, append([]any{"acl", "setuser", name}, rules...)...).Err()
		}))
	}
	setUser("on", ">"+name, "~*", "+@all", "-multi")
	client := server.Client(func(o *redis.ClusterOptions) { o.Username, o.Password = name, name })
	pub, topic := newPublisher(t, client), topic(t)
	requireRefused(t, pub.Publish(topic, numbered(3)...), "'multi'")
	require.Empty(t, stored(t, admin, topic))
	require.NoError(t, pub.Publish(topic, numbered(1)...))
	setUser("+multi")
	require.NoError(t, pub.Publish(topic, numbered(3)...))
	setUser("-multi") // at run time: this cannot be known in advance
	require.ErrorIs(t, pub.Publish(topic, numbered(3)...), goxstreams.ErrOutcomeUnknown)
	before := len(stored(t, admin, topic))
	requireRefused(t, pub.Publish(topic, numbered(3)...), "'multi'")
	require.Len(t, stored(t, admin, topic), before)
}
