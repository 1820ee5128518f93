package goxstreams_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/pprof"
	"slices"
	"strconv"
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
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// patience is how long a test waits for a condition: far longer than an idle
// machine needs. The condition ends the wait, so it costs nothing.
const patience = 75 * time.Second

// testGroup is the consumer group of tests that need only one; topics are unique.
const testGroup = "group"

// topic returns a stream name that no other test uses.
func topic(t testing.TB) string {
	t.Helper()
	return t.Name() + "-" + watermill.NewShortUUID()
}

// newClient returns a client of the shared server with the given hooks. t's cleanup
// closes it. With GOXSTREAMS_TEST_ACL=1 its user has exactly the permissions that
// docs/rights.md lists: see leastRights.
func newClient(t testing.TB, hooks ...redis.Hook) *redis.Client {
	t.Helper()
	client := testserver.Client(t)
	if os.Getenv(aclEnv) == "1" {
		admin := client
		client = leastRights(t, admin)
		hooks = append(hooks, divertAdmin(t, admin))
	}
	for _, h := range hooks {
		client.AddHook(h)
	}
	return client
}

func newPublisher(t testing.TB, client redis.UniversalClient) *goxstreams.Publisher {
	t.Helper()
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	require.NoError(t, err)
	return pub
}

// newSubscriber returns a Subscriber that t's cleanup closes. Durations that the
// config leaves empty are set to short ones.
func newSubscriber(t testing.TB, config goxstreams.SubscriberConfig) *goxstreams.Subscriber {
	t.Helper()
	return newSubscriberLog(t, config, nil)
}

func newSubscriberLog(t testing.TB, config goxstreams.SubscriberConfig, logger watermill.LoggerAdapter) *goxstreams.Subscriber {
	t.Helper()
	if config.Client == nil {
		config.Client = newClient(t)
	}
	if config.ClaimInterval == 0 {
		config.ClaimInterval = 50 * time.Millisecond
	}
	if config.CloseTimeout == 0 {
		config.CloseTimeout = time.Second // for messages that a test leaves unsettled
	}
	shortBlocks(t, &config)
	sub, err := goxstreams.NewSubscriber(config, logger)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sub.Close()) })
	return sub
}

// shortBlocks makes Close fast on the embedded server: that has no CLIENT UNBLOCK, so that Close waits for a read.
func shortBlocks(t testing.TB, config *goxstreams.SubscriberConfig) {
	t.Helper()
	if config.BlockTime == 0 && testserver.IsEmbedded(t) {
		config.BlockTime = 100 * time.Millisecond
	}
}

// grouped returns the config of a consumer of testGroup, with defaults for the
// rest.
func grouped(client redis.UniversalClient) goxstreams.SubscriberConfig {
	return goxstreams.SubscriberConfig{Client: client, ConsumerGroup: testGroup}
}

// quickRetry is for tests that nack: no limit, and hardly any delay.
func quickRetry() *goxstreams.Retry {
	return &goxstreams.Retry{InitialInterval: time.Millisecond, MaxInterval: 10 * time.Millisecond}
}

func subscribe(t testing.TB, sub message.Subscriber, topic string) <-chan *message.Message {
	t.Helper()
	messages, err := sub.Subscribe(context.Background(), topic)
	require.NoError(t, err)
	return messages
}

// publish publishes messages with the given payloads and returns their UUIDs.
func publish(t testing.TB, client redis.UniversalClient, topic string, payloads ...string) []string {
	t.Helper()
	msgs := make([]*message.Message, len(payloads))
	for i, p := range payloads {
		msgs[i] = message.NewMessage(watermill.NewUUID(), message.Payload(p))
	}
	require.NoError(t, newPublisher(t, client).Publish(topic, msgs...))
	return uuids(msgs)
}

// publishN publishes n messages with the payloads "0", "1", ...
func publishN(t testing.TB, client redis.UniversalClient, topic string, n int) []string {
	t.Helper()
	var ids []string
	for from := 0; from < n; from += 1000 {
		var payloads []string
		for i := from; i < min(n, from+1000); i++ {
			payloads = append(payloads, fmt.Sprint(i))
		}
		ids = append(ids, publish(t, client, topic, payloads...)...)
	}
	return ids
}

func uuids(msgs []*message.Message) []string {
	ids := make([]string, len(msgs))
	for i, m := range msgs {
		ids[i] = m.UUID
	}
	return ids
}

func payloads(msgs []*message.Message) []string {
	ps := make([]string, len(msgs))
	for i, m := range msgs {
		ps[i] = string(m.Payload)
	}
	return ps
}

// next returns the next message, unsettled. It fails the test if none comes.
func next(t testing.TB, messages <-chan *message.Message) *message.Message {
	t.Helper()
	select {
	case msg, open := <-messages:
		require.True(t, open, "the channel is closed")
		return msg
	case <-time.After(patience):
		require.FailNow(t, "no message came")
		return nil
	}
}

// collect acks and returns messages: n, or fewer if none arrives within the timeout
// or the channel closes.
func collect(messages <-chan *message.Message, n int, timeout time.Duration) []*message.Message {
	var got []*message.Message
	patience := time.NewTimer(timeout)
	defer patience.Stop()
	for len(got) < n {
		select {
		case msg, open := <-messages:
			if !open {
				return got
			}
			msg.Ack()
			got = append(got, msg)
			patience.Reset(timeout)
		case <-patience.C:
			return got
		}
	}
	return got
}

// eventually waits until the condition holds, and fails the test if it does not
// within patience.
func eventually(t testing.TB, condition func() bool, msgAndArgs ...any) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			require.FailNow(t, "it never happened", msgAndArgs...)
		}
	}
}

// eventuallyAll waits until the count is n, and fails the test if it does not grow
// within patience.
func eventuallyAll(t testing.TB, count func() int, n int) {
	t.Helper()
	for before := count(); before < n; before = count() {
		eventually(t, func() bool { return count() > before }, "%d of %d", before, n)
	}
}

// stats returns the state of the Subscriber's only subscription.
func stats(t testing.TB, sub *goxstreams.Subscriber) goxstreams.SubscriptionStats {
	t.Helper()
	all := sub.Stats()
	require.Len(t, all, 1)
	return all[0]
}

// delivery returns the delivery in a message's context.
func delivery(t testing.TB, msg *message.Message) goxstreams.Delivery {
	t.Helper()
	d, ok := goxstreams.DeliveryFromContext(msg.Context())
	require.True(t, ok, "the message has no delivery")
	return d
}

// pendingOf returns the group's pending entries, in the order of their IDs.
func pendingOf(t testing.TB, client redis.UniversalClient, topic, group string) []redis.XPendingExt {
	t.Helper()
	rows, err := client.XPendingExt(context.Background(), &redis.XPendingExtArgs{
		Stream: topic, Group: group, Start: "-", End: "+", Count: 1_000_000,
	}).Result()
	require.NoError(t, err)
	return rows
}

// eventuallyLater waits until the server's clock has passed the entry's
// millisecond: a stream that is recreated within it repeats the IDs of the old one,
// and nobody could distinguish the entries.
func eventuallyLater(t testing.TB, client *redis.Client, id string) {
	t.Helper()
	clock := topic(t) // not TIME, which a user with minimal permissions may not run
	eventually(t, func() bool {
		now := addRaw(t, client, clock, "a", "")
		return goxstreams.Delivery{ID: now}.Time().After(goxstreams.Delivery{ID: id}.Time())
	})
}

// eventuallySettled waits until nothing of the group is pending.
func eventuallySettled(t testing.TB, client redis.UniversalClient, topic, group string) {
	t.Helper()
	eventually(t, func() bool { return len(pendingOf(t, client, topic, group)) == 0 }, "entries stay pending")
}

// readAs reads n new entries as the consumer and leaves them pending, like a
// process that then dies. It returns their IDs.
func readAs(t testing.TB, client redis.UniversalClient, topic, group, consumer string, n int) []string {
	t.Helper()
	streams, err := client.XReadGroup(context.Background(), &redis.XReadGroupArgs{
		Group: group, Consumer: consumer, Streams: []string{topic, ">"}, Count: int64(n), Block: -1,
	}).Result()
	require.NoError(t, err)
	require.Len(t, streams[0].Messages, n)
	var ids []string
	for _, m := range streams[0].Messages {
		ids = append(ids, m.ID)
	}
	return ids
}

// createGroup creates the group at the start of the stream.
func createGroup(t testing.TB, client redis.UniversalClient, topic, group string) {
	t.Helper()
	require.NoError(t, client.XGroupCreateMkStream(context.Background(), topic, group, "0").Err())
}

// closed reports whether the channel closes within the timeout; messages that
// arrive before that are left unsettled.
func closed(messages <-chan *message.Message, timeout time.Duration) bool {
	deadline := time.After(timeout)
	for {
		select {
		case _, open := <-messages:
			if !open {
				return true
			}
		case <-deadline:
			return false
		}
	}
}

// A turnConn records what was sent since the last reply, so that a test which loses
// a reply can wait until the server has sent it: by then it has run everything that
// was sent, however slow it is.
type turnConn struct {
	net.Conn
	sent     []byte
	answered bool
}

func (c *turnConn) Write(b []byte) (int, error) {
	if c.answered {
		c.sent, c.answered = c.sent[:0], false
	}
	c.sent = append(c.sent, b...)
	return c.Conn.Write(b)
}

func (c *turnConn) Read(b []byte) (int, error) {
	c.answered = true
	return c.Conn.Read(b)
}

// readAll reads the replies to everything that was sent, the beginning of which has
// been read.
func (c *turnConn) readAll(beginning []byte) {
	commands := bufio.NewReader(bytes.NewReader(c.sent))
	answers := bufio.NewReader(io.MultiReader(bytes.NewReader(beginning), c.Conn))
	_ = c.SetReadDeadline(time.Now().Add(patience))
	for skipValue(commands) == nil && skipValue(answers) == nil {
	}
}

// skipValue reads a RESP value, which commands and replies are.
func skipValue(r *bufio.Reader) error {
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	n, _ := strconv.Atoi(strings.TrimSpace(line[1:]))
	switch line[0] {
	case '$', '=', '!':
		if n >= 0 {
			_, err = r.Discard(n + len("\r\n"))
		}
	case '%':
		n *= 2
		fallthrough
	case '*', '~':
		for ; n > 0 && err == nil; n-- {
			err = skipValue(r)
		}
	}
	return err
}

// hook lets a test observe a client's commands, and inject faults. It handles
// single commands and pipelines alike.
type hook struct {
	// process runs the command by calling next, or does not. It returns the
	// command's error.
	process func(ctx context.Context, cmd redis.Cmder, next func() error) error
	// pipeline does the same for pipelines. If it is nil, each command is passed to
	// process by itself, except in a transaction, which is left untouched.
	pipeline func(ctx context.Context, cmds []redis.Cmder, next func() error) error
}

func (h *hook) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

func (h *hook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if h.process == nil {
			return next(ctx, cmd)
		}
		err := h.process(ctx, cmd, func() error { return next(ctx, cmd) })
		cmd.SetErr(err)
		return err
	}
}

func (h *hook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if h.pipeline == nil && (h.process == nil || slices.ContainsFunc(cmds, func(cmd redis.Cmder) bool { return cmd.Name() == "multi" })) {
			return next(ctx, cmds)
		}
		if h.pipeline == nil {
			var first error
			for _, cmd := range cmds {
				err := h.process(ctx, cmd, func() error { return next(ctx, []redis.Cmder{cmd}) })
				cmd.SetErr(err)
				first = cmp.Or(first, err)
			}
			return first
		}
		return h.pipeline(ctx, cmds, func() error { return next(ctx, cmds) })
	}
}

// isScript reports whether the command runs a script that contains the text.
func isScript(cmd redis.Cmder, text string) bool {
	return cmd.Name() == "eval" && strings.Contains(fmt.Sprint(cmd.Args()[1]), text)
}

// isRenewal reports whether the command renews leases.
func isRenewal(cmd redis.Cmder) bool { return isScript(cmd, "-- renew") }

// isMove reports whether the command moves a message to the dead-letter stream, or
// back from it.
func isMove(cmd redis.Cmder) bool { return isScript(cmd, "'XADD'") }

// isRelease reports whether the command releases entries, or leaves them with
// another count.
func isRelease(cmd redis.Cmder) bool { return isScript(cmd, "-- assign") }

// isClaim reports whether the command delivers an entry here once more.
func isClaim(cmd redis.Cmder) bool { return isScript(cmd, "-- take") }

// countCommands returns a hook that counts commands by their lower-case names.
func countCommands() (*hook, *commandCounts) {
	counts := &commandCounts{n: make(map[string]int)}
	return &hook{
		process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
			counts.add(cmd)
			return next()
		},
		pipeline: func(_ context.Context, cmds []redis.Cmder, next func() error) error {
			counts.add(cmds...)
			return next()
		},
	}, counts
}

type commandCounts struct {
	mu sync.Mutex
	n  map[string]int
}

func (c *commandCounts) add(cmds ...redis.Cmder) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, cmd := range cmds {
		c.n[cmd.Name()]++
	}
}

func (c *commandCounts) of(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[name]
}

// logRecorder is a logger that records Error and Info.
type logRecorder struct {
	fields watermill.LogFields
	*logLines
}

type logLines struct {
	mu     sync.Mutex
	errors []string
	infos  []string
}

func newLogRecorder() logRecorder { return logRecorder{nil, &logLines{}} }

func (l logRecorder) Error(msg string, err error, fields watermill.LogFields) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.logLines.errors = append(l.logLines.errors, fmt.Sprintf("%s: %v %v", msg, err, l.fields.Add(fields)))
}

func (l logRecorder) Info(msg string, fields watermill.LogFields) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.logLines.infos = append(l.logLines.infos, fmt.Sprintf("%s %v", msg, l.fields.Add(fields)))
}

func (logRecorder) Debug(string, watermill.LogFields) {}
func (logRecorder) Trace(string, watermill.LogFields) {}

func (l logRecorder) With(fields watermill.LogFields) watermill.LoggerAdapter {
	return logRecorder{l.fields.Add(fields), l.logLines}
}

// Errors returns everything logged at Error so far.
func (l logRecorder) Errors() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.logLines.errors...)
}

// Infos returns everything logged at Info so far.
func (l logRecorder) Infos() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.logLines.infos...)
}

// connections returns the lines of CLIENT LIST for the named clients.
func connections(t testing.TB, admin redis.UniversalClient, name string) []string {
	t.Helper()
	list, err := admin.(*redis.Client).ClientList(context.Background()).Result()
	require.NoError(t, err)
	var conns []string
	for line := range strings.Lines(list) {
		if strings.Contains(line, " name="+name+" ") {
			conns = append(conns, line)
		}
	}
	return conns
}

// addPending publishes a message and delivers it to the consumer in one step, so
// that no other consumer gets it. It stays pending: its consumer died. It returns
// the entry's ID.
func addPending(t testing.TB, client *redis.Client, topic, consumer, payload string) string {
	t.Helper()
	values, err := goxstreams.DefaultMarshaler{}.Marshal(topic, message.NewMessage(watermill.NewUUID(), message.Payload(payload)))
	require.NoError(t, err)
	var add *redis.StringCmd
	_, err = client.TxPipelined(context.Background(), func(p redis.Pipeliner) error {
		add = p.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, Values: values})
		p.XReadGroup(context.Background(), &redis.XReadGroupArgs{
			Group: testGroup, Consumer: consumer, Streams: []string{topic, ">"}, Count: 1, Block: -1,
		})
		return nil
	})
	require.NoError(t, err)
	return add.Val()
}

// panicking panics in Unmarshal for the payload "broken", until told to stop.
type panicking struct{ goxstreams.DefaultMarshaler }

func (p panicking) Unmarshal(values map[string]any) (*message.Message, error) {
	if values["payload"] == "broken" {
		panic("Unmarshal")
	}
	return p.DefaultMarshaler.Unmarshal(values)
}

type redisError string

func (e redisError) Error() string { return string(e) }

func (redisError) RedisError() {}

func poisonOf(topic string) string { return topic + ".poison" }

var errOdd = errors.New("odd")

// eventuallyBlocked waits until a client of the server is in a blocking read.
func eventuallyBlocked(t *testing.T, client *redis.Client) {
	t.Helper()
	eventually(t, func() bool { return blocked(t, client) > 0 }, "nobody reads")
}

// blocked returns how many clients of the server are in a blocking read.
func blocked(t *testing.T, client *redis.Client) int {
	t.Helper()
	list, err := client.ClientList(context.Background()).Result()
	require.NoError(t, err)
	n := 0
	for line := range strings.Lines(list) {
		if strings.Contains(line, " flags=b") && strings.Contains(line, " cmd=xread") {
			n++
		}
	}
	return n
}

const (
	// minIdle is ClaimMinIdle in tests that wait for it to expire: long enough that
	// a lease does not expire by itself on a busy machine.
	minIdle = 1500 * time.Millisecond
	// claimInterval is ClaimInterval in these tests.
	claimInterval = 100 * time.Millisecond
	// claimTime is the guaranteed maximum time of a takeover.
	claimTime = minIdle*4/3 + 2*claimInterval
	// slack is what a busy machine may add to that: an upper bound only shows that
	// nothing else was waited for. (Exact times are tested in virtual time.)
	slack = 5 * time.Second
)

// claiming is grouped, with the times above.
func claiming(client redis.UniversalClient) goxstreams.SubscriberConfig {
	config := grouped(client)
	config.ClaimMinIdle = minIdle
	config.ClaimInterval = claimInterval
	return config
}

// during checks a condition repeatedly for the given time. It is for things that
// must not happen: the caller says why they would have happened by then.
func during(t testing.TB, d time.Duration, condition func() bool, msgAndArgs ...any) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if !condition() {
			require.FailNow(t, "it happened", msgAndArgs...)
		}
	}
}

// tally counts what several consumers have handled.
type tally struct {
	mu      sync.Mutex
	uuids   map[string]int
	entries map[string]int // by entry ID
	counts  map[int64]int  // by delivery count
}

func newTally() *tally {
	return &tally{uuids: make(map[string]int), entries: make(map[string]int), counts: make(map[int64]int)}
}

func (c *tally) add(msg *message.Message) {
	d, _ := goxstreams.DeliveryFromContext(msg.Context())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uuids[msg.UUID]++
	c.entries[d.ID]++
	c.counts[d.Count]++
}

// has reports whether each of the messages was handled.
func (c *tally) has(uuids []string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.uuids) >= len(uuids) && hasAll(c.uuids, uuids)
}

func (c *tally) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.uuids)
}

// total returns how many messages were handled, counting repeated handlings.
func (c *tally) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, times := range c.uuids {
		n += times
	}
	return n
}

// handle acks every message after calling work, each in a goroutine of its own
// as Watermill's router does, and counts it.
func (c *tally) handle(messages <-chan *message.Message, work func(*message.Message)) {
	go func() {
		var handlers sync.WaitGroup
		for msg := range messages {
			handlers.Go(func() {
				if work != nil {
					work(msg)
				}
				c.add(msg)
				msg.Ack()
			})
		}
		handlers.Wait()
	}()
}

// claimAs takes the entry over, like a consumer that considers its owner dead.
func claimAs(t testing.TB, client redis.UniversalClient, topic, consumer, id string) {
	t.Helper()
	got, err := client.XClaim(context.Background(), &redis.XClaimArgs{
		Stream: topic, Group: testGroup, Consumer: consumer, Messages: []string{id},
	}).Result()
	require.NoError(t, err)
	require.Len(t, got, 1)
}

// leaseLost waits until the message's context has ended because of a lost lease.
func leaseLost(t testing.TB, msg *message.Message) {
	t.Helper()
	select {
	case <-msg.Context().Done():
		require.ErrorIs(t, context.Cause(msg.Context()), goxstreams.ErrLeaseLost)
	case <-time.After(patience):
		require.FailNow(t, "the context of a message whose lease is lost does not end")
	}
}

// loseReply returns a hook that reports a broken connection after the n-th command
// for which match is true has run; and the number of commands that it did that to.
func loseReply(n int64, match func(cmd redis.Cmder) bool) (*hook, *atomic.Int64) {
	var seen, lost atomic.Int64
	return &hook{process: func(_ context.Context, cmd redis.Cmder, next func() error) error {
		err := next()
		if err != nil || !match(cmd) || seen.Add(1) != n {
			return err
		}
		lost.Add(1)
		return io.EOF
	}}, &lost
}

func isCommand(name string, args ...any) func(redis.Cmder) bool {
	return func(cmd redis.Cmder) bool {
		if cmd.Name() != name {
			return false
		}
		for _, arg := range args {
			if !slices.Contains(cmd.Args(), arg) {
				return false
			}
		}
		return true
	}
}

// aclUser returns a client with all permissions except as the rules say.
func aclUser(t testing.TB, admin *redis.Client, rules ...string) *redis.Client {
	t.Helper()
	name := watermill.NewShortUUID()
	setUser(t, admin, name, append([]string{"on", ">" + name, "~*", "&*", "+@all"}, rules...)...)
	t.Cleanup(func() { admin.Do(context.Background(), "acl", "deluser", name) })
	client := redis.NewClient(&redis.Options{Addr: admin.Options().Addr, Username: name, Password: name})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func setUser(t testing.TB, admin *redis.Client, name string, rules ...string) {
	t.Helper()
	args := []any{"acl", "setuser", name}
	for _, rule := range rules {
		args = append(args, rule)
	}
	require.NoError(t, admin.Do(context.Background(), args...).Err())
}

// picky rejects entries with the field "broken".
type picky struct{ goxstreams.BodyMarshaler }

func (p picky) Unmarshal(values map[string]any) (*message.Message, error) {
	if _, ok := values["broken"]; ok {
		return nil, errors.New("this is broken")
	}
	return p.BodyMarshaler.Unmarshal(values)
}

func addRaw(t testing.TB, client *redis.Client, topic string, fields ...string) string {
	t.Helper()
	id, err := client.XAdd(context.Background(), &redis.XAddArgs{Stream: topic, Values: fields}).Result()
	require.NoError(t, err)
	return id
}

// hasCommand reports whether the server knows the command.
func hasCommand(t testing.TB, client *redis.Client, name string) bool {
	t.Helper()
	v, err := client.Do(context.Background(), "command", "info", name).Slice()
	require.NoError(t, err)
	return len(v) > 0 && v[0] != nil
}

func consumersOf(t testing.TB, client *redis.Client, topic string) []string {
	t.Helper()
	infos, err := client.XInfoConsumers(context.Background(), topic, testGroup).Result()
	require.NoError(t, err)
	var names []string
	for _, info := range infos {
		names = append(names, info.Name)
	}
	return names
}

// outageLogged counts the starts and ends of outages in a log.
func outageLogged(log logRecorder) (began, ended int) {
	for _, l := range log.Errors() {
		if strings.Contains(l, "is unavailable to the subscription") {
			began++
		}
	}
	for _, l := range log.Infos() {
		if strings.Contains(l, "is available to the subscription again") {
			ended++
		}
	}
	return began, ended
}

// eventuallyLogged waits until that many outages have started and ended in the log:
// Stats knows of an end a moment earlier.
func eventuallyLogged(t testing.TB, log logRecorder, outages int) {
	t.Helper()
	eventually(t, func() bool { _, ended := outageLogged(log); return ended >= outages }, "the end is not logged")
	began, ended := outageLogged(log)
	assert.Equal(t, outages, began, "logged: %v", log.Errors())
	assert.Equal(t, outages, ended)
}

// While a gate is locked, it holds back what connections have read.
type gate struct{ sync.RWMutex }

func (g *gate) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	return gatedConn{conn, g}, err
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c gatedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.gate.RLock()
	defer c.gate.RUnlock()
	return n, err
}

// A mute drops the reply to the next command of a name, after the server has run
// it, and counts how often the command was sent after that.
type mute struct {
	mu   sync.Mutex
	word []byte // as written in a command; nil: nothing is dropped
	sent int
	lost bool
}

func (m *mute) next(command string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.word, m.sent, m.lost = []byte("\r\n"+command+"\r\n"), 0, false
	if strings.HasPrefix(command, "--") { // a script's first line
		m.word = []byte("\r\n" + command + "\n")
	}
}

// done reports whether a reply was dropped, and how often its command was sent.
func (m *mute) done() (lost bool, sent int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lost, m.sent
}

func (m *mute) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &muteConn{turnConn: turnConn{Conn: conn}, m: m}, nil
}

type muteConn struct {
	turnConn
	m    *mute
	lose bool
}

func (c *muteConn) Write(b []byte) (int, error) {
	c.m.mu.Lock()
	if n := bytes.Count(bytes.ToLower(b), c.m.word); c.m.word != nil && n > 0 {
		c.m.sent += n
		c.lose = !c.m.lost
		c.m.lost = true
	}
	c.m.mu.Unlock()
	return c.turnConn.Write(b)
}

func (c *muteConn) Read(b []byte) (int, error) {
	n, err := c.turnConn.Read(b)
	if !c.lose || err != nil {
		return n, err
	}
	c.readAll(b[:n])
	_ = c.Close()
	return 0, io.EOF
}

// startedBy runs f, and returns a function that counts the goroutines which f has
// started, directly or indirectly: other goroutines of the process do not matter.
func startedBy(t testing.TB, f func()) (left func() int) {
	t.Helper()
	const key = "started-by"
	label := fmt.Sprintf("%q:%q", key, t.Name()) // as in the profile
	pprof.Do(context.Background(), pprof.Labels(key, t.Name()), func(context.Context) { f() })
	return func() (n int) {
		var profile bytes.Buffer
		require.NoError(t, pprof.Lookup("goroutine").WriteTo(&profile, 1))
		alike := 0 // goroutines with the stack and the labels that follow
		for line := range strings.Lines(profile.String()) {
			if number, _, ok := strings.Cut(line, " @ "); ok && !strings.HasPrefix(line, "#") {
				alike, _ = strconv.Atoi(number)
			} else if strings.HasPrefix(line, "# labels: ") && strings.Contains(line, label) {
				n += alike
			}
		}
		return n
	}
}
