package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// keeping has the flags of `retention`.
type keeping struct {
	target
	messages, backlog int
	keepLast          int64
	stopped, steady   time.Duration
}

// retention measures what Retention keeps while a group is stopped, beside MAXLEN; how
// steady the server's memory is; and what a large backlog costs the server.
func retention(args []string, out io.Writer) error {
	k := &keeping{}
	f := flag.NewFlagSet("retention", flag.ContinueOnError)
	k.flags(f)
	f.IntVar(&k.messages, "messages", 1_000_000, "messages to publish while a group is stopped; 0 leaves this out")
	f.DurationVar(&k.stopped, "stopped", 10*time.Minute, "how long it is stopped")
	f.Int64Var(&k.keepLast, "keep-last", 100_000, "KeepLast, and MAXLEN")
	f.DurationVar(&k.steady, "steady", time.Hour, "how long memory is measured at a steady rate; 0 leaves this out")
	f.IntVar(&k.backlog, "backlog", 10_000_000, "acked entries to trim; 0 leaves this out")
	if err := f.Parse(args); err != nil {
		return err
	}
	if k.messages < 0 || k.backlog < 0 || k.steady < 0 || k.keepLast < 1 || k.stopped < time.Second {
		return errors.New("-messages, -backlog and -steady must not be negative, -keep-last must be positive, -stopped a second or more")
	}
	e, closeAll, err := k.open(1)
	if err != nil {
		return err
	}
	defer closeAll()
	m, err := e.machine()
	if err != nil {
		return err
	}
	for _, part := range []struct {
		wanted  bool
		measure func(*env, io.Writer) error
	}{{k.messages > 0, k.stoppedGroup}, {k.steady > 0, k.steadyMemory}, {k.backlog > 0, k.trimBacklog}} {
		if part.wanted {
			if err := part.measure(e, out); err != nil {
				return err
			}
		}
	}
	fmt.Fprintf(out, "\n%s\n", m)
	return nil
}

// arrived counts which of the numbered messages a group has handled.
type arrived struct {
	mu    sync.Mutex
	once  []bool
	n     int
	again int
}

func (a *arrived) handle(msg *message.Message) {
	i := binary.BigEndian.Uint32(msg.Payload)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.once[i] {
		a.again++
		return
	}
	a.once[i] = true
	a.n++
}

// consumer subscribes a group, and handles its messages.
func (k *keeping) consumer(e *env, group, topic string, r goxstreams.Retention, handle func(*message.Message), hooks ...redis.Hook) (end func(), err error) {
	client := e.client(0)
	for _, h := range hooks {
		client.AddHook(h)
	}
	sub, err := subscribed(goxstreams.SubscriberConfig{
		Client: client, ConsumerGroup: group, MaxConcurrency: 100, ClaimMinIdle: 5 * time.Second, Retention: r,
	}, topic, handle)
	if err != nil {
		return nil, err
	}
	return func() {
		_ = sub.Close()
		_ = client.Close()
	}, nil
}

// publishSteadily publishes messages of 100 bytes with these numbers, in batches of 100.
func publishSteadily(e *env, topic string, maxLen int64, from, to int, span time.Duration) error {
	client := e.client(0)
	defer client.Close()
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client, DefaultMaxLen: maxLen}, nil)
	if err != nil {
		return err
	}
	defer pub.Close()
	began := time.Now()
	for i := from; i < to; i += 100 {
		time.Sleep(time.Until(began.Add(time.Duration(float64(span) * float64(i-from) / float64(to-from)))))
		var batch []*message.Message
		for j := i; j < min(to, i+100); j++ {
			payload := make([]byte, 100)
			binary.BigEndian.PutUint32(payload, uint32(j))
			batch = append(batch, message.NewMessage(strconv.Itoa(j), payload))
		}
		if err := pub.Publish(topic, batch...); err != nil {
			return err
		}
	}
	return nil
}

// state is what Redis says of a topic.
type state struct {
	length   int64
	notAcked int64 // by the slowest group; -1: Redis cannot tell, since what it has not read was trimmed
	done     bool  // all groups have acked all entries
}

func look(e *env, topic string) (s state, err error) {
	ctx, pipe := context.Background(), e.admin.TxPipeline()
	groups, info := pipe.XInfoGroups(ctx, topic), pipe.XInfoStream(ctx, topic)
	if _, err := pipe.Exec(ctx); err != nil {
		return s, err
	}
	s.length, s.done = info.Val().Length, true
	for _, g := range groups.Val() {
		s.done = s.done && g.Pending == 0 && g.LastDeliveredID == info.Val().LastGeneratedID
		if g.Lag < 0 || s.notAcked < 0 {
			s.notAcked = -1
		} else {
			s.notAcked = max(s.notAcked, g.Lag+g.Pending)
		}
	}
	return s, nil
}

// stoppedGroup has one of three groups killed with entries pending, while messages come,
// and started again: with Retention, and at the same time on another topic with MAXLEN.
func (k *keeping) stoppedGroup(e *env, out io.Writer) error {
	ways := []struct {
		name      string
		retention goxstreams.Retention
		maxLen    int64
	}{{"Retention.KeepLast", goxstreams.Retention{KeepLast: k.keepLast}, 0}, {"MAXLEN", goxstreams.Retention{}, k.keepLast}}
	results, errs := make([]strings.Builder, len(ways)), make([]error, len(ways))
	var running sync.WaitGroup
	for i, way := range ways {
		running.Go(func() { errs[i] = k.stopGroup(e, &results[i], way.name, way.retention, way.maxLen) })
	}
	running.Wait()
	for i := range results {
		fmt.Fprint(out, results[i].String())
	}
	return errors.Join(errs...)
}

func (k *keeping) stopGroup(e *env, out io.Writer, name string, r goxstreams.Retention, maxLen int64) error {
	const killed, pending = "killed", 500
	ctx, topic := context.Background(), e.topic()
	defer e.admin.Unlink(ctx, topic)
	if err := e.admin.XGroupCreateMkStream(ctx, topic, killed, "0").Err(); err != nil {
		return err
	}
	handled := make(map[string]*arrived)
	start := func(group string) (func(), error) {
		handled[group] = &arrived{once: make([]bool, k.messages)}
		return k.consumer(e, group, topic, r, handled[group].handle)
	}
	for _, group := range []string{"one", "two"} {
		end, err := start(group)
		if err != nil {
			return err
		}
		defer end()
	}
	first := min(pending, k.messages)
	if err := publishSteadily(e, topic, maxLen, 0, first, 0); err != nil {
		return err
	}
	// This is what a killed process leaves behind.
	err := e.admin.XReadGroup(ctx, &redis.XReadGroupArgs{Group: killed, Consumer: "it", Streams: []string{topic, ">"}, Count: int64(first), Block: -1}).Err()
	if err != nil {
		return err
	}
	published := make(chan error, 1)
	go func() { published <- publishSteadily(e, topic, maxLen, first, k.messages, k.stopped) }()
	var longest int64
	excess := "unknown"
	var most int64
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for waiting := true; waiting; {
		select {
		case err := <-published:
			if err != nil {
				return err
			}
			waiting = false
		case <-tick.C:
			s, err := look(e, topic)
			if err != nil {
				return err
			}
			longest = max(longest, s.length)
			if s.notAcked >= 0 {
				most = max(most, s.length-s.notAcked)
				excess = strconv.FormatInt(most, 10)
			}
		}
	}
	began := time.Now()
	end, err := start(killed)
	if err != nil {
		return err
	}
	defer end()
	var length int64
	var caughtUp time.Duration
	for {
		s, err := look(e, topic)
		if err != nil {
			return err
		}
		if s.done && caughtUp == 0 {
			caughtUp = time.Since(began)
		}
		if length = s.length; s.done && length <= k.keepLast+100 { // a node
			break
		}
		if time.Since(began) > 5*time.Minute {
			return fmt.Errorf("%s: %+v after 5 minutes", name, s)
		}
		<-tick.C
	}
	lost := make(map[string]int)
	for group, a := range handled {
		a.mu.Lock()
		lost[group] = k.messages - a.n
		a.mu.Unlock()
	}
	_, err = fmt.Fprintf(out, "%s %d, %d messages in %v: lost by the stopped group %d, by the others %d; longest %d, at most %s more than was not acked; caught up after %.1f s, and %d left after %.1f s\n",
		name, k.keepLast, k.messages, k.stopped, lost[killed], lost["one"]+lost["two"], longest, excess, caughtUp.Seconds(), length, time.Since(began).Seconds())
	return err
}

// trims is a hook that adds up how long the runs of Retention take, as the client sees it:
// the server does not say, and this is more.
type trims struct {
	mu    sync.Mutex
	n     int
	total time.Duration
}

func (t *trims) DialHook(next redis.DialHook) redis.DialHook { return next }

func (t *trims) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (t *trims) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		args := cmd.Args()
		script, _ := args[min(1, len(args)-1)].(string)
		if !strings.HasPrefix(script, retentionMark) {
			return next(ctx, cmd)
		}
		began := time.Now()
		err := next(ctx, cmd)
		t.mu.Lock()
		defer t.mu.Unlock()
		t.n++
		t.total += time.Since(began)
		return err
	}
}

func (t *trims) report() (n int, total time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.n, t.total
}

// retentionMark begins the script that trims.
const retentionMark = "-- retention"

// slowest returns the longest run of Retention since the slow log was set up.
func (k *keeping) slowest(e *env) (longest time.Duration, err error) {
	slow, err := e.admin.SlowLogGet(context.Background(), -1).Result()
	for _, s := range slow {
		if len(s.Args) > 1 && strings.HasPrefix(s.Args[1], retentionMark) {
			longest = max(longest, s.Duration)
		}
	}
	return longest, err
}

// logSlow has the slow log keep what takes more than half a millisecond.
func logSlow(e *env) error {
	ctx := context.Background()
	for _, set := range [][2]string{{"slowlog-log-slower-than", "500"}, {"slowlog-max-len", "100000"}} {
		if err := e.admin.ConfigSet(ctx, set[0], set[1]).Err(); err != nil {
			return err
		}
	}
	return e.admin.SlowLogReset(ctx).Err()
}

// steadyMemory measures the server's memory at 2,000 messages a second, once the stream is
// as long as it is to stay.
func (k *keeping) steadyMemory(e *env, out io.Writer) error {
	const perSecond = 2000
	if err := logSlow(e); err != nil {
		return err
	}
	topic, watch := e.topic(), &trims{}
	defer e.admin.Unlink(context.Background(), topic)
	for _, group := range []string{"one", "two", "three"} {
		end, err := k.consumer(e, group, topic, goxstreams.Retention{KeepLast: k.keepLast}, func(*message.Message) {}, watch)
		if err != nil {
			return err
		}
		defer end()
	}
	if err := publishSteadily(e, topic, 0, 0, int(k.keepLast), 0); err != nil {
		return err
	}
	published := make(chan error, 1)
	go func() {
		published <- publishSteadily(e, topic, 0, 0, int(k.steady.Seconds()*perSecond), k.steady)
	}()
	var used []float64
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	began := time.Now()
	for waiting := true; waiting; {
		select {
		case err := <-published:
			if err != nil {
				return err
			}
			waiting = false
		case <-tick.C:
			fields, err := info(e.admin, "memory")
			if err != nil {
				return err
			}
			bytes, err := strconv.ParseFloat(fields["used_memory"], 64)
			if err != nil {
				return err
			}
			if time.Since(began) > 20*time.Second { // buffers and pools have their size
				used = append(used, bytes)
			}
		}
	}
	if len(used) == 0 {
		return errors.New("-steady is too short: memory is measured from the 20th second on, every 5 s")
	}
	longest, err := k.slowest(e)
	if err != nil {
		return err
	}
	n, total := watch.report()
	slices.Sort(used)
	least, most, median := used[0], used[len(used)-1], used[len(used)/2]
	_, err = fmt.Fprintf(out, "steady, %d/s for %v, 3 groups: used_memory %.1f MiB (median), from %+.1f %% to %+.1f %% of it; %d runs took %.3f %% of the time, the longest %.1f ms on the server\n",
		perSecond, k.steady, median/(1<<20), 100*(least/median-1), 100*(most/median-1), n, 100*total.Seconds()/time.Since(began).Seconds(), millis(longest))
	return err
}

// trimBacklog has very many acked entries trimmed while another client publishes.
func (k *keeping) trimBacklog(e *env, out io.Writer) error {
	ctx, topic := context.Background(), e.topic()
	defer e.admin.Unlink(ctx, topic)
	const fill = `for i = 1, ARGV[1] do redis.call('XADD', KEYS[1], '*', 'payload', ARGV[2]) end return 1`
	payload := strings.Repeat("x", 20)
	for left := k.backlog; left > 0; left -= 10_000 {
		if err := e.admin.Eval(ctx, fill, []string{topic}, min(left, 10_000), payload).Err(); err != nil {
			return err
		}
	}
	if err := e.admin.XGroupCreate(ctx, topic, "one", "$").Err(); err != nil {
		return err
	}
	if err := logSlow(e); err != nil {
		return err
	}
	before, err := serverCPU(e.admin)
	if err != nil {
		return err
	}
	watch := &trims{}
	began := time.Now()
	end, err := k.consumer(e, "one", topic, goxstreams.Retention{KeepLast: k.keepLast}, func(*message.Message) {}, watch)
	if err != nil {
		return err
	}
	defer end()
	var pings []time.Duration
	for {
		start := time.Now()
		n, err := e.admin.XLen(ctx, topic).Result()
		if err != nil {
			return err
		}
		pings = append(pings, time.Since(start))
		if n <= k.keepLast+100 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	took := time.Since(began)
	after, err := serverCPU(e.admin)
	if err != nil {
		return err
	}
	longest, err := k.slowest(e)
	if err != nil {
		return err
	}
	n, total := watch.report()
	slices.Sort(pings)
	_, err = fmt.Fprintf(out, "backlog of %d: trimmed in %.1f s by %d runs, which took %.2f %% of the time, the longest %.1f ms on the server; server CPU %.1f %%; another client's command meanwhile %.2f ms (p50), %.1f ms (p99)\n",
		k.backlog, took.Seconds(), n, 100*total.Seconds()/took.Seconds(), millis(longest), 100*(after-before)/took.Seconds(), millis(pings[len(pings)/2]), millis(pings[len(pings)*99/100]))
	return err
}
