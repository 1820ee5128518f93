package goxstreams_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// The consumers of these tests are processes: killing or stopping a process cannot
// be simulated within one.

func init() { children[consumerRole] = consumerChild }

const (
	consumerRole = "consumer"

	// childArgsEnv holds childArgs as JSON.
	childArgsEnv = "GOXSTREAMS_TEST_CHILD_ARGS"
)

// childArgs are the instructions for a consumerChild.
type childArgs struct {
	Addr, Topic    string
	Consumer       string
	MaxConcurrency int
	ClaimMinIdle   time.Duration
	ClaimInterval  time.Duration
	MaxRetries     int
	Handle         time.Duration // how long the handler takes
	Hold           bool          // "hold" is kept until its context ends at its first delivery, and takes a second later on
}

// A killerPayload kills the process that handles it.
const killerPayload = "kill"

// report is a line that a child writes about a message. The system takes it at
// once: lines written before a child is killed are not lost.
type report struct {
	Event string // "start", "ack", "lost" (its context ended with ErrLeaseLost), "closed" (with ErrSubscriberClosed)
	UUID  string
	Count int64
	At    time.Time
}

// consumerChild consumes until its standard input ends, then closes.
func consumerChild() {
	var args childArgs
	must(json.Unmarshal([]byte(os.Getenv(childArgsEnv)), &args))
	client := redis.NewClient(&redis.Options{Addr: args.Addr})
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client:         client,
		ConsumerGroup:  testGroup,
		Consumer:       args.Consumer,
		MaxConcurrency: args.MaxConcurrency,
		ClaimMinIdle:   args.ClaimMinIdle,
		ClaimInterval:  args.ClaimInterval,
		Retry:          &goxstreams.Retry{MaxRetries: args.MaxRetries, InitialInterval: 10 * time.Millisecond},
		CloseTimeout:   5 * time.Second,
		WaitForRedis:   patience,
	}, nil)
	must(err)
	messages, err := sub.Subscribe(context.Background(), args.Topic)
	must(err)

	var out sync.Mutex
	tell := func(event string, msg *message.Message) {
		d, _ := goxstreams.DeliveryFromContext(msg.Context())
		line, err := json.Marshal(report{event, msg.UUID, d.Count, time.Now()})
		must(err)
		out.Lock()
		defer out.Unlock()
		_, err = os.Stdout.Write(append(line, '\n'))
		must(err)
	}
	go func() {
		for msg := range messages {
			go handleAsChild(args, msg, tell)
		}
	}()
	_, _ = io.Copy(io.Discard, os.Stdin)
	must(sub.Close())
	must(client.Close())
}

func handleAsChild(args childArgs, msg *message.Message, tell func(string, *message.Message)) {
	tell("start", msg)
	d, _ := goxstreams.DeliveryFromContext(msg.Context())
	payload := string(msg.Payload)
	if payload == killerPayload {
		must(syscall.Kill(os.Getpid(), syscall.SIGKILL))
		select {} // the signal may take a moment
	}
	done := time.After(args.Handle)
	if args.Hold && payload == "hold" {
		done = time.After(time.Second)
		if d.Count == 1 {
			done = nil
		}
	}
	select {
	case <-done:
		tell("ack", msg)
		msg.Ack()
	case <-msg.Context().Done():
		switch cause := context.Cause(msg.Context()); {
		case errors.Is(cause, goxstreams.ErrLeaseLost):
			tell("lost", msg)
		case errors.Is(cause, goxstreams.ErrSubscriberClosed):
			tell("closed", msg)
		default:
			must(fmt.Errorf("a message's context ended because of: %w", cause))
		}
		msg.Nack()
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// child is a process that a test has started.
type child struct {
	t     testing.TB
	name  string
	cmd   *exec.Cmd
	stdin io.Closer
	ended chan struct{} // closed when it has ended and all its reports are read

	mu      sync.Mutex
	reports []report
}

func startChild(t testing.TB, name string, args childArgs) *child {
	t.Helper()
	return startRole(t, consumerRole, name, args)
}

// startRole starts a process that plays a role, with its instructions.
func startRole(t testing.TB, role, name string, args any) *child {
	t.Helper()
	data, err := json.Marshal(args)
	require.NoError(t, err)
	c := &child{t: t, name: name, cmd: exec.Command(os.Args[0]), ended: make(chan struct{})}
	c.cmd.Env = append(os.Environ(), childEnv+"="+role, childArgsEnv+"="+string(data))
	c.cmd.Stderr = os.Stderr
	c.stdin, err = c.cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := c.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, c.cmd.Start())
	go func() {
		defer close(c.ended)
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			var r report
			if json.Unmarshal(lines.Bytes(), &r) != nil {
				continue // cut off by SIGKILL, or not a report
			}
			c.mu.Lock()
			c.reports = append(c.reports, r)
			c.mu.Unlock()
		}
		_ = c.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		<-c.ended
	})
	return c
}

func (c *child) signal(sig syscall.Signal) {
	c.t.Helper()
	require.NoError(c.t, c.cmd.Process.Signal(sig))
}

// kill returns when the process has ended.
func (c *child) kill() {
	c.t.Helper()
	c.signal(syscall.SIGKILL)
	<-c.ended
}

// close lets the process close its Subscriber and end by itself.
func (c *child) close() {
	c.t.Helper()
	_ = c.stdin.Close()
	select {
	case <-c.ended:
		require.True(c.t, c.cmd.ProcessState.Success(), "child %s: %s", c.name, c.cmd.ProcessState)
	case <-time.After(patience):
		require.FailNow(c.t, "the child does not end")
	}
}

func (c *child) all() []report {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.reports)
}

// told returns the UUIDs in the child's reports of this kind.
func (c *child) told(event string) map[string]int {
	uuids := make(map[string]int)
	for _, r := range c.all() {
		if r.Event == event {
			uuids[r.UUID]++
		}
	}
	return uuids
}

// under returns the messages that the child has started and not finished.
func (c *child) under() map[string]bool {
	uuids := make(map[string]bool)
	for _, r := range c.all() {
		if r.Event == "start" {
			uuids[r.UUID] = true
		} else {
			delete(uuids, r.UUID)
		}
	}
	return uuids
}

// handling is the time in which a process worked on a message with a valid lease.
type handling struct {
	process    string
	start, end time.Time
}

// handlings returns the child's handlings by message. A message that it was
// handling when it was stopped counts until then: it did nothing afterwards, and
// between its continuation and the notice that the lease was lost, the end of the
// context applies. A message that it was handling when it was killed counts until
// its end.
func (c *child) handlings(stopped, continued, killed time.Time) map[string][]handling {
	open := make(map[string]time.Time)
	all := make(map[string][]handling)
	for _, r := range c.all() {
		if r.Event == "start" {
			open[r.UUID] = r.At
			continue
		}
		end := r.At
		if open[r.UUID].Before(stopped) && end.After(continued) {
			end = stopped
		}
		all[r.UUID] = append(all[r.UUID], handling{c.name, open[r.UUID], end})
		delete(open, r.UUID)
	}
	for uuid, start := range open {
		require.False(c.t, killed.IsZero(), "%s is still at work on %s", c.name, uuid)
		all[uuid] = append(all[uuid], handling{c.name, start, killed})
	}
	return all
}

// TestTwoProcesses: one process of a group is stopped for longer than
// ClaimMinIdle and continued, the other is killed in mid-work.
func TestTwoProcesses(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "given"} {
		t.Run("Consumer="+name, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			twoProcesses(t, name)
		})
	}
}

func twoProcesses(t *testing.T, consumer string) {
	client, topic := newClient(t), topic(t)
	args := childArgs{
		Addr: client.Options().Addr, Topic: topic, Consumer: consumer, MaxConcurrency: 4,
		ClaimMinIdle: 2 * time.Second, ClaimInterval: 200 * time.Millisecond,
		Handle: 20 * time.Millisecond, Hold: true,
	}
	createGroup(t, client, topic, testGroup)

	// The first one is full of messages that it keeps.
	sleeper := startChild(t, "sleeper", args)
	sleepers := publish(t, client, topic, "hold", "hold", "hold", "hold")
	eventually(t, func() bool { return len(sleeper.under()) == len(sleepers) })

	// The second one keeps some too, and has room for others.
	args.MaxConcurrency = 8
	victim := startChild(t, "victim", args)
	victims := publish(t, client, topic, "hold", "hold", "hold")
	eventually(t, func() bool { return len(victim.under()) == len(victims) })
	quick := publishN(t, client, topic, 200)

	eventually(t, func() bool { return len(victim.told("ack")) > 0 })
	sleeper.signal(syscall.SIGSTOP)
	stopped := time.Now()
	// Proof that it was stopped for long enough: the other one has received its
	// messages, and is handling them.
	eventually(t, func() bool { return hasAll(victim.told("start"), sleepers) }, "the stopped process's messages are not taken over")
	continued := time.Now()
	sleeper.signal(syscall.SIGCONT)
	eventually(t, func() bool { return hasAll(sleeper.told("lost"), sleepers) }, "the continued process does not notice that its leases are lost")

	// Both work, until one is killed while it handles other messages than those
	// that it keeps.
	quick = append(quick, publishN(t, client, topic, 400)...)
	eventually(t, func() bool { return len(sleeper.told("ack")) > 0 && len(victim.under()) > len(victims) })
	victim.kill()
	killed := time.Now()
	inHand := victim.under()
	require.Subset(t, keys(inHand), victims)
	everything := slices.Concat(sleepers, victims, quick)
	eventually(t, func() bool {
		acked := victim.told("ack")
		for uuid := range sleeper.told("ack") {
			acked[uuid]++
		}
		return hasAll(acked, everything)
	}, "not everything is handled")
	eventuallySettled(t, client, topic, testGroup)
	sleeper.close()
	require.Subset(t, keys(sleeper.told("ack")), victims, "what the killed process had in hand")

	byVictim := victim.handlings(time.Time{}, time.Time{}, killed)
	bySleeper := sleeper.handlings(stopped, continued, time.Time{})
	for _, uuid := range everything {
		hs := append(byVictim[uuid], bySleeper[uuid]...)
		slices.SortFunc(hs, func(a, b handling) int { return a.start.Compare(b.start) })
		for i := 1; i < len(hs); i++ {
			assert.False(t, hs[i].start.Before(hs[i-1].end), "message %s was handled by two at once: %+v", uuid, hs)
		}
	}
	for uuid, n := range sleeper.told("ack") {
		assert.Equal(t, 1, n, "the process that was never killed acked %s more than once", uuid)
	}
	assert.Zero(t, client.XLen(t.Context(), goxstreams.DeadLetterTopic(topic)).Val())
}

func hasAll(m map[string]int, uuids []string) bool {
	return !slices.ContainsFunc(uuids, func(uuid string) bool { return m[uuid] == 0 })
}

func keys[V any](m map[string]V) []string {
	var ks []string
	for k := range m {
		ks = append(ks, k)
	}
	return ks
}

// TestKillerMessage: a message kills every process that handles it. At the end it
// is dead, and none of the others is.
func TestKillerMessage(t *testing.T) {
	t.Parallel()
	for _, maxRetries := range []int{-1, 1, 3} {
		for _, concurrency := range []int{1, 32} {
			t.Run(fmt.Sprintf("MaxRetries=%d/MaxConcurrency=%d", maxRetries, concurrency), func(t *testing.T) {
				t.Parallel()
				testserver.RequireReal(t)
				killAndCount(t, maxRetries, concurrency)
			})
		}
	}
}

func killAndCount(t *testing.T, maxRetries, concurrency int) {
	client, topic := newClient(t), topic(t)
	args := childArgs{
		Addr: client.Options().Addr, Topic: topic, MaxConcurrency: concurrency,
		ClaimMinIdle: time.Second, ClaimInterval: 100 * time.Millisecond,
		MaxRetries: maxRetries, Handle: 5 * time.Millisecond,
	}
	createGroup(t, client, topic, testGroup)
	innocent := publishN(t, client, topic, 50)
	killer := publish(t, client, topic, killerPayload)[0]
	innocent = append(innocent, publishN(t, client, topic, 50)...)

	runs, handled, everHandled := 0, 0, make(map[string]int)
	count := func(c *child) {
		runs += c.told("start")[killer]
		for uuid := range c.told("ack") {
			if everHandled[uuid]++; everHandled[uuid] == 1 {
				handled++
			}
		}
	}
	c := startChild(t, "child 0", args)
	deaths := 0
	settled := func() bool {
		info, err := client.XInfoGroups(t.Context(), topic).Result()
		require.NoError(t, err)
		return info[0].Pending == 0 && info[0].Lag == 0
	}
	for deadline := time.Now().Add(2 * patience); ; time.Sleep(10 * time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "not settled, and no death since the last of %d", deaths)
		select {
		case <-c.ended:
			count(c)
			deaths++
			require.LessOrEqual(t, runs, max(maxRetries, 0)+2, "the killer runs too often")
			require.Equal(t, deaths, runs, "a process died of something else: %s", c.cmd.ProcessState)
			c = startChild(t, fmt.Sprint("child ", deaths), args)
			deadline = time.Now().Add(2 * patience)
			continue
		default:
		}
		if settled() {
			break
		}
	}
	c.close()
	count(c)

	assert.Equal(t, max(maxRetries, 0)+2, runs, "the killer's runs: its crashes have one in reserve, and no more")
	assert.Equal(t, len(innocent), handled, "innocent messages handled")
	assert.True(t, hasAll(everHandled, innocent))
	dead := deadLetters(t, client, topic)
	require.Len(t, dead, 1, "dead messages")
	assert.Equal(t, killer, dead[0].UUID)
	assert.Equal(t, "exhausted", dead[0].Metadata.Get(goxstreams.DeadKindKey))
	assert.Equal(t, fmt.Sprint(max(maxRetries, 0)+3), dead[0].Metadata.Get(goxstreams.DeadDeliveriesKey))
}

// deadLetters returns the topic's decoded dead letters.
func deadLetters(t testing.TB, client redis.UniversalClient, topic string) []*message.Message {
	t.Helper()
	entries, err := client.XRange(context.Background(), goxstreams.DeadLetterTopic(topic), "-", "+").Result()
	require.NoError(t, err)
	var msgs []*message.Message
	for _, e := range entries {
		msg, err := goxstreams.DefaultMarshaler{}.Unmarshal(e.Values)
		require.NoError(t, err)
		msgs = append(msgs, msg)
	}
	return msgs
}

// TestRollingRestart: three consumers are closed and replaced in turn, twice, under
// load. Their leases would not expire within the test: it finishes in time only
// because closing consumers release unhandled messages.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 8} {
		t.Run(fmt.Sprintf("MaxConcurrency=%d", concurrency), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t)
			rollingRestart(t, concurrency)
		})
	}
}

func rollingRestart(t *testing.T, concurrency int) {
	topic := topic(t)
	var mu sync.Mutex
	handled := make(map[string]int)
	counts := make(map[int64]int)
	total := func() int { mu.Lock(); defer mu.Unlock(); return len(handled) }

	type consumer struct {
		sub  *goxstreams.Subscriber
		done chan struct{}
	}
	start := func() consumer {
		config := grouped(newClient(t))
		config.MaxConcurrency = concurrency
		config.ClaimMinIdle = 5 * time.Minute
		config.CloseTimeout = patience
		c := consumer{newSubscriber(t, config), make(chan struct{})}
		messages := subscribe(t, c.sub, topic)
		go func() {
			defer close(c.done)
			var handlers sync.WaitGroup
			defer handlers.Wait()
			for msg := range messages {
				handlers.Go(func() {
					time.Sleep(5 * time.Millisecond) // the work
					d, _ := goxstreams.DeliveryFromContext(msg.Context())
					mu.Lock()
					handled[msg.UUID]++
					counts[d.Count]++
					mu.Unlock()
					msg.Ack()
				})
			}
		}()
		return c
	}

	client := newClient(t)
	createGroup(t, client, topic, testGroup)
	consumers := []consumer{start(), start(), start()}

	// The load: always more than is handled.
	var published []string
	enough, publishing := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(publishing)
		pub := newPublisher(t, client)
		for {
			select {
			case <-enough:
				return
			default:
			}
			if len(published) > total()+500 {
				time.Sleep(time.Millisecond)
				continue
			}
			for range 10 {
				msg := message.NewMessage(fmt.Sprint(len(published)), nil)
				if err := pub.Publish(topic, msg); !assert.NoError(t, err) {
					return
				}
				published = append(published, msg.UUID)
			}
		}
	}()
	for range 2 {
		for i := range consumers {
			before := total()
			eventually(t, func() bool { return total() >= before+50 })
			require.NoError(t, consumers[i].sub.Close())
			<-consumers[i].done
			consumers[i] = start()
		}
	}
	close(enough)
	<-publishing
	eventuallyAll(t, total, len(published))
	for _, c := range consumers {
		require.NoError(t, c.sub.Close())
		<-c.done
	}
	for _, uuid := range published {
		assert.Equal(t, 1, handled[uuid], "message %s", uuid)
	}
	assert.Equal(t, map[int64]int{1: len(published)}, counts, "messages by delivery count")
	assert.Empty(t, pendingOf(t, client, topic, testGroup))
	t.Logf("%d messages", len(published))
}
