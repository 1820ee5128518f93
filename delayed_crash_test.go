package goxstreams_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// longTests is the environment variable that gives the tests of delayed and recurring
// messages the sizes of docs/delayed.md, and has them check times: on a machine that does
// nothing else. Run them one by one: each takes one to ten minutes.
const longTests = "GOXSTREAMS_TEST_LONG"

func init() {
	children[moverRole] = moverChild
	children[recurrerRole] = recurrerChild
}

const (
	moverRole    = "mover"
	recurrerRole = "recurrer"
)

// delayedArgs are the instructions for a moverChild and a recurrerChild.
type delayedArgs struct {
	Addr  string
	Nodes map[string]string // of a Cluster: see ClusterServer.Addrs
	Topic string
	Every time.Duration // of a recurrerChild
}

func (a delayedArgs) client() redis.UniversalClient {
	if a.Addr != "" {
		return redis.NewClient(&redis.Options{Addr: a.Addr})
	}
	return redis.NewClusterClient(&redis.ClusterOptions{
		Addrs: slices.Collect(maps.Keys(a.Nodes)),
		NewClient: func(opt *redis.Options) *redis.Client {
			if addr, ok := a.Nodes[opt.Addr]; ok {
				opt.Addr = addr
			}
			return redis.NewClient(opt)
		},
	})
}

func readDelayedArgs() (args delayedArgs) {
	must(json.Unmarshal([]byte(os.Getenv(childArgsEnv)), &args))
	return args
}

// moverChild subscribes, reports that, and acks what comes.
func moverChild() {
	args := readDelayedArgs()
	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: args.client(), ConsumerGroup: testGroup, MaxConcurrency: 100,
		ClaimMinIdle: time.Second, ClaimInterval: 200 * time.Millisecond, WaitForRedis: patience,
	}, nil)
	must(err)
	messages, err := sub.Subscribe(context.Background(), args.Topic)
	must(err)
	tellStart(time.Now().String())
	for msg := range messages {
		msg.Ack()
	}
}

// recurrerChild publishes recurring messages until its standard input ends. It reports
// each occurrence that it would publish.
func recurrerChild() {
	args := readDelayedArgs()
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: args.client()}, nil)
	must(err)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	r := atEach(args.Topic, args.Every)
	fine := r.Message
	r.Message = func(at time.Time) (*message.Message, error) {
		tellStart(at.String())
		return fine(at)
	}
	must(pub.Recur(ctx, r))
}

// tellStart reports that something begins.
func tellStart(what string) {
	line, err := json.Marshal(report{Event: "start", UUID: what, At: time.Now()})
	must(err)
	_, err = os.Stdout.Write(append(line, '\n'))
	must(err)
}

// eventuallyStarted waits until the process is at work: before that, it cannot stand in for
// those that are killed.
func eventuallyStarted(t testing.TB, c *child) {
	t.Helper()
	eventually(t, func() bool { return len(c.told("start")) > 0 })
}

// A disturbance is a time in which a fault was under way.
type disturbance struct {
	what     string
	from, to time.Time
}

// recovery is how long after the end of a fault messages may be late because of it.
const recovery = 2 * time.Second

// crashes is a test in which processes that move messages are killed.
type crashes struct {
	n             int
	calm, trouble time.Duration // messages are due in both, and faults come in the second one
	killEvery     time.Duration
	faultEvery    time.Duration

	client redis.UniversalClient
	args   delayedArgs
	// fault is what happens to the servers. It may kill a process meanwhile.
	fault     func(topic string, kill func())
	faultName string
}

// run has each message moved once, and none before it was due. It returns how late they
// were: in the calm, and with faults.
func (c crashes) run(t *testing.T, newTopic func() string) {
	var due map[string]time.Time
	lead := 3 * time.Second
	if os.Getenv(longTests) != "" {
		lead = 30 * time.Second
	}
	for ; len(due) != c.n; lead *= 2 { // the machine may be so slow that the first ones are due before all are published
		c.args.Topic = newTopic()
		due = waitingMessages(t, c.client, c.args.Topic, c.n, lead, c.calm+c.trouble)
	}
	first := slices.MinFunc(slices.Collect(maps.Values(due)), time.Time.Compare)
	ready, faults := c.disturb(t, first.Add(c.calm), first.Add(c.calm+c.trouble))
	schedule := newSchedule(t, c.client, c.args.Topic)
	eventually(t, func() bool { left, err := schedule.Count(t.Context()); return err == nil && left == 0 })
	info, err := c.client.XInfoStream(t.Context(), c.args.Topic).Result()
	require.NoError(t, err)
	require.EqualValues(t, c.n, info.EntriesAdded)
	late, after := make(map[string][]time.Duration), make(map[string][]time.Duration)
	times := entryTimes(t, c.client, c.args.Topic)
	require.Equal(t, c.n, len(times))
	for uuid, at := range times {
		when, known := due[uuid]
		require.True(t, known, "%s is from nowhere", uuid)
		require.Len(t, at, 1, "%s is in the stream more than once", uuid)
		require.False(t, at[0].Before(when), "%s is in the stream at %v, and was due at %v", uuid, at[0], when)
		if when.Before(ready) {
			continue // there was nobody to move it
		}
		f := faultOf(faults, when)
		late[f.what] = append(late[f.what], at[0].Sub(when))
		after[f.what] = append(after[f.what], min(at[0].Sub(when), max(0, at[0].Sub(f.to))))
	}
	for _, what := range slices.Sorted(maps.Keys(late)) {
		limit := 50 * time.Millisecond
		if what == undisturbed {
			after[what] = late[what]
		} else {
			limit = recovery
		}
		p99 := percentile(after[what], 99)
		t.Logf("%s: %d messages, late by %v (median), %v (p99), %v at most; since the end of the fault, if they were due before that: %v (p99), %v at most",
			what, len(late[what]), percentile(late[what], 50), percentile(late[what], 99), slices.Max(late[what]), p99, slices.Max(after[what]))
		if os.Getenv(longTests) != "" && p99 > limit {
			t.Errorf("%s: the p99 is %v, and must be at most %v", what, p99, limit)
		}
	}
}

func percentile(all []time.Duration, p int) time.Duration {
	slices.Sort(all)
	return all[len(all)*p/100]
}

const (
	undisturbed = "undisturbed"
	killed      = "a process killed"
)

// faultOf returns what disturbed a message that was due at that time: the last fault, and
// rather one of the servers than the killing of a process.
func faultOf(faults []disturbance, due time.Time) disturbance {
	of := disturbance{what: undisturbed}
	for _, f := range faults {
		if !due.Before(f.from) && due.Before(f.to.Add(recovery)) && (of.what == undisturbed || f.what != killed) {
			of = f
		}
	}
	return of
}

// waitingMessages publishes n messages that are due at random times in the span, which
// begins after lead. It returns when each of those that are not due yet is due.
func waitingMessages(t *testing.T, client redis.UniversalClient, topic string, n int, lead, span time.Duration) map[string]time.Time {
	t.Helper()
	begin := time.Now().Add(lead)
	for batch := range slices.Chunk(make([]struct{}, n), 1000) {
		var msgs []*message.Message
		for range batch {
			msgs = append(msgs, delayedBy(watermill.NewUUID(), max(0, time.Until(begin))+rand.N(span)))
		}
		publishedIn(t, client, topic, msgs...)
	}
	due := make(map[string]time.Time)
	for _, d := range delayedIn(t, newSchedule(t, client, topic)) {
		due[d.UUID] = d.Due
	}
	return due
}

// disturb kills processes that move the topic's messages and disturbs their servers from
// one time to the other. It returns when all processes were ready at first. They live until
// the test ends.
func (c crashes) disturb(t *testing.T, from, to time.Time) (ready time.Time, faults []disturbance) {
	t.Helper()
	started := 0
	start := func() *child {
		started++
		return startRole(t, moverRole, fmt.Sprint("mover ", started), c.args)
	}
	movers := []*child{start(), start(), start(), start()}
	allStarted := func() {
		for _, mover := range movers {
			eventuallyStarted(t, mover)
		}
	}
	allStarted()
	ready = time.Now()
	kill := func() {
		allStarted()
		began := time.Now()
		i := started % len(movers)
		movers[i].kill()
		faults = append(faults, disturbance{killed, began, time.Now()})
		movers[i] = start()
	}
	select {
	case <-time.After(time.Until(from)):
	case <-t.Context().Done():
		return ready, nil
	}
	kills, others := time.NewTicker(c.killEvery), time.NewTicker(c.faultEvery)
	defer kills.Stop()
	defer others.Stop()
	for end := time.After(time.Until(to)); ; {
		select {
		case <-kills.C:
			kill()
		case <-others.C:
			began := time.Now()
			c.fault(c.args.Topic, kill)
			faults = append(faults, disturbance{c.faultName, began, time.Now()})
		case <-end:
			return ready, faults
		}
	}
}

// Processes that move messages are killed, and Redis restarts: each message is in the
// stream once, and none before it was due.
func TestDelayed_Crashes(t *testing.T) {
	testserver.RequireReal(t)
	c := crashes{n: 3000, calm: time.Second, trouble: 5 * time.Second, killEvery: 500 * time.Millisecond, faultEvery: 2 * time.Second}
	if os.Getenv(longTests) != "" {
		c = crashes{n: 120_000, calm: 12 * time.Second, trouble: time.Minute, killEvery: 2 * time.Second, faultEvery: 10 * time.Second}
	} else {
		t.Parallel()
	}
	server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always", "--stream-node-max-entries", "100")
	c.client, c.args.Addr = server.Client(), server.Addr()
	c.fault, c.faultName = func(string, func()) { server.Restart() }, "the server restarted"
	c.run(t, func() string { return topic(t) })
}

// The same in a Cluster, while the topic's slot moves from master to master. A process is
// killed while half of the slot has moved.
func TestDelayed_CrashesWhileTheSlotMoves(t *testing.T) {
	cluster := testserver.Cluster(t)
	c := crashes{n: 2000, calm: time.Second, trouble: 4 * time.Second, killEvery: 700 * time.Millisecond, faultEvery: 800 * time.Millisecond}
	if os.Getenv(longTests) != "" {
		c = crashes{n: 120_000, calm: 12 * time.Second, trouble: time.Minute, killEvery: 2 * time.Second, faultEvery: 5 * time.Second}
	} else {
		t.Parallel()
	}
	client := cluster.Client()
	c.client, c.args.Nodes = client, cluster.Addrs()
	c.fault, c.faultName = func(topic string, kill func()) { cluster.MoveSlot(topic, kill) }, "the slot moved"
	c.run(t, func() string { return topicOfOwnSlot(t, client) })
}

// Processes that publish recurring messages are killed, one after the other: each
// occurrence is published once.
func TestRecurring_Crashes(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	n, every, killEvery := 20, 100*time.Millisecond, 300*time.Millisecond
	if os.Getenv(longTests) != "" {
		n, every, killEvery = 600, time.Second, 2*time.Second
	}
	client, topic := newClient(t), topic(t)
	args := delayedArgs{Addr: client.Options().Addr, Topic: topic, Every: every}
	var processes []*child
	started := 0
	start := func() *child {
		started++
		return startRole(t, recurrerRole, fmt.Sprint("recurrer ", started), args)
	}
	for range 5 {
		processes = append(processes, start())
	}
	for _, c := range processes {
		eventuallyStarted(t, c)
	}
	kills := time.NewTicker(killEvery)
	defer kills.Stop()
	dead := 0
	for n += int(client.XLen(t.Context(), topic).Val()); dead == 0 || int(client.XLen(t.Context(), topic).Val()) < n; {
		<-kills.C
		i := rand.IntN(len(processes))
		processes[i].kill()
		dead++
		processes[i] = start()
		eventuallyStarted(t, processes[i])
	}
	var closing sync.WaitGroup
	for _, c := range processes {
		closing.Go(func() { _ = c.stdin.Close(); <-c.ended })
	}
	closing.Wait()
	all := occurrences(t, client, topic)
	for i := range all[1:] {
		require.Equal(t, every.Milliseconds(), all[i+1]-all[i], "after occurrence %d", i)
	}
	entries, err := client.XRange(t.Context(), topic, "-", "+").Result()
	require.NoError(t, err)
	var late []time.Duration
	for i, e := range entries {
		late = append(late, goxstreams.Delivery{ID: e.ID}.Time().Sub(time.UnixMilli(all[i])))
	}
	slices.Sort(late)
	t.Logf("%d occurrences in %v, %d processes killed; late by %v (median), %v (p99), %v at most", len(all),
		time.Duration(all[len(all)-1]-all[0])*time.Millisecond, dead, late[len(late)/2], late[len(late)*99/100], late[len(late)-1])
}
