package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// crowd has the flags of `consumers`.
type crowd struct {
	target
	consumers, clients, churn int // churn: how many leave and join in a minute
	rate                      float64
	pending                   []int
	settle, time              time.Duration
}

// sweepCommands are what the group costs without messages: leases, abandoned entries,
// names.
var sweepCommands = []string{"xpending", "xinfo|groups", "xinfo|consumers", "xclaim", "eval", "evalsha"}

// consumers measures what many consumers of one group cost the server.
func consumers(args []string, out io.Writer) error {
	c, err := parseCrowd(args)
	if err != nil {
		return err
	}
	e, closeAll, err := c.open(1)
	if err != nil {
		return err
	}
	defer closeAll()
	m, err := e.machine()
	if err != nil {
		return err
	}
	for _, pending := range c.pending {
		if err := c.measure(e, pending, out); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "\n%s\n", m)
	return nil
}

func parseCrowd(args []string) (*crowd, error) {
	c := &crowd{}
	f := flag.NewFlagSet("consumers", flag.ContinueOnError)
	c.flags(f)
	f.IntVar(&c.consumers, "consumers", 200, "consumers of the group")
	f.IntVar(&c.clients, "clients", 4, "go-redis clients that they share")
	f.IntVar(&c.churn, "churn", 50, "consumers that leave, and others that join, each minute")
	f.Float64Var(&c.rate, "rate", 500, "messages per second")
	pending := f.String("pending", "0,1000000", "`numbers` of entries pending with a consumer that does nothing")
	f.DurationVar(&c.settle, "settle", 20*time.Second, "how long to wait after all have joined at once")
	f.DurationVar(&c.time, "time", 40*time.Second, "how long; with pending entries less than 60s, ClaimMinIdle")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	for text := range strings.SplitSeq(*pending, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("-pending: %q is no number of entries", text)
		}
		c.pending = append(c.pending, n)
	}
	if c.consumers < 1 || c.clients < 1 || c.churn < 0 || c.rate <= 0 || c.settle <= 0 || c.time <= 0 {
		return nil, errors.New("-consumers, -clients, -rate, -settle and -time must be positive")
	}
	return c, nil
}

// measure runs the crowd once and reports.
func (c *crowd) measure(e *env, pending int, out io.Writer) (err error) {
	t := &trial{env: e, system: "ours"}
	if err := t.open(options{}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	topic, err := t.newTopic()
	if err != nil {
		return err
	}
	if err := t.more(topic, pending); err != nil {
		return err
	}
	ids, err := t.read(topic, idler, pending)
	if err != nil {
		return err
	}
	clients := make([]*redis.Client, c.clients)
	for i := range clients {
		clients[i] = e.client(0)
		defer clients[i].Close()
	}
	p := &people{topic: topic, clients: clients, watch: newStopwatch(int(c.rate * c.time.Seconds()))}
	defer func() { err = errors.Join(err, p.closeAll()) }()
	if err := c.joining(t, p, pending, out); err != nil {
		return err
	}
	if err := t.renew(topic, ids); err != nil { // or they look abandoned before the end of the run
		return err
	}
	return c.working(t, p, pending, out)
}

// idler is the consumer that holds the pending entries and does nothing.
const idler = "idle"

// renew makes the entries of the idler look freshly read.
func (t *trial) renew(topic string, ids []string) error {
	for some := range slices.Chunk(ids, 1000) {
		err := t.admin.XClaimJustID(context.Background(), &redis.XClaimArgs{Stream: topic, Group: group, Consumer: idler, Messages: some}).Err()
		if err != nil {
			return err
		}
	}
	return nil
}

// joining reports the cost of all consumers joining at once.
func (c *crowd) joining(t *trial, p *people, pending int, out io.Writer) error {
	fmt.Fprintf(os.Stderr, "%d consumers join, %d entries are pending\n", c.consumers, pending)
	return c.report(t, out, func() (string, error) {
		err := atOnce(c.consumers, func(int) error { return p.join() })
		time.Sleep(c.settle)
		return fmt.Sprintf("%d pending: %d consumers join at once", pending, c.consumers), err
	})
}

// working reports the cost of their work, while some leave and join.
func (c *crowd) working(t *trial, p *people, pending int, out io.Writer) error {
	fmt.Fprintf(os.Stderr, "messages for %v\n", c.time)
	var delays metrics
	err := c.report(t, out, func() (title string, err error) {
		if delays, err = c.traffic(t, p); err != nil {
			return "", err
		}
		return fmt.Sprintf("%d pending: %d consumers, %s messages/s, %d left and as many joined", pending, c.consumers, format(delays[sent]), p.left.Load()), nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\np50 %s ms, p99 %s ms\n", format(delays[p50]), format(delays[p99]))
	return t.settledBut(p.topic, int64(pending))
}

// report runs f, which returns a title, and writes what the server did meanwhile.
func (c *crowd) report(t *trial, out io.Writer, f func() (string, error)) error {
	before, err := commandStats(t.admin)
	if err != nil {
		return err
	}
	cpu, err := serverCPU(t.admin)
	if err != nil {
		return err
	}
	start := time.Now()
	title, err := f()
	if err != nil {
		return err
	}
	took := time.Since(start)
	after, err := commandStats(t.admin)
	if err != nil {
		return err
	}
	cpuAfter, err := serverCPU(t.admin)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\n### %s, %v\n\n", title, took.Round(100*time.Millisecond))
	writeShares(out, before, after, took)
	fmt.Fprintf(out, "| server's CPU, all | | %s |\n", share((cpuAfter-cpu)*1e6, took))
	return nil
}

// traffic sends messages while consumers leave and join.
func (c *crowd) traffic(t *trial, p *people) (metrics, error) {
	ctx, stop := context.WithCancel(context.Background())
	var churn sync.WaitGroup
	var churned error
	churn.Go(func() { churned = c.come(ctx, p) })
	delays, err := timed(t, p.watch, []string{p.topic}, c.rate)
	stop()
	churn.Wait()
	return delays, errors.Join(err, churned)
}

// come lets one consumer leave and another join, at an even pace.
func (c *crowd) come(ctx context.Context, p *people) error {
	if c.churn == 0 {
		return nil
	}
	tick := time.NewTicker(time.Minute / time.Duration(c.churn))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := errors.Join(p.leave(), p.join()); err != nil {
			return err
		}
	}
}

// people are the consumers of the group at the moment.
type people struct {
	topic   string
	clients []*redis.Client
	watch   *stopwatch
	left    atomic.Int64

	mu      sync.Mutex
	present []*goxstreams.Subscriber
	joined  int
}

func (p *people) join() error {
	p.mu.Lock()
	client := p.clients[p.joined%len(p.clients)]
	p.joined++
	p.mu.Unlock()
	sub, err := goxstreams.NewSubscriber(oursConfig(client, options{concurrency: 1}), nil)
	if err != nil {
		return err
	}
	messages, err := sub.Subscribe(context.Background(), p.topic)
	if err != nil {
		return err
	}
	go p.handle(messages)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.present = append(p.present, sub)
	return nil
}

func (p *people) handle(messages <-chan *message.Message) {
	for msg := range messages {
		_ = p.watch.handle(msg.Payload) // never fails
		msg.Ack()
	}
}

func (p *people) leave() error {
	p.mu.Lock()
	i := rand.IntN(len(p.present))
	sub := p.present[i]
	p.present = slices.Delete(p.present, i, i+1)
	p.mu.Unlock()
	p.left.Add(1)
	return sub.Close()
}

func (p *people) closeAll() error {
	return atOnce(len(p.present), func(i int) error { return p.present[i].Close() })
}

// A commandStat is a line of INFO commandstats.
type commandStat struct{ calls, usec float64 }

// commandStats returns them by command. The time of what a script or a MULTI
// calls is counted there, and with EVAL or EXEC once more.
func commandStats(client redis.Cmdable) (map[string]commandStat, error) {
	fields, err := info(client, "commandstats")
	if err != nil {
		return nil, err
	}
	stats := make(map[string]commandStat)
	for name, line := range fields {
		var s commandStat
		if _, err := fmt.Sscanf(line, "calls=%g,usec=%g,", &s.calls, &s.usec); err != nil {
			return nil, fmt.Errorf("commandstats: %q: %w", line, err)
		}
		stats[strings.TrimPrefix(name, "cmdstat_")] = s
	}
	return stats, nil
}

// writeShares writes a table of each command's share of the time that passed,
// the greatest first, and of the sweeps and leases in sum.
func writeShares(w io.Writer, before, after map[string]commandStat, took time.Duration) {
	used := make(map[string]commandStat)
	for name, s := range after {
		d := commandStat{s.calls - before[name].calls, s.usec - before[name].usec}
		if d.calls > 0 && name != "info" { // the harness's
			used[name] = d
		}
	}
	names := slices.SortedFunc(maps.Keys(used), func(a, b string) int { return int(used[b].usec - used[a].usec) })
	fmt.Fprint(w, "| command | calls/s | share of wall time |\n|---|--:|--:|\n")
	var own float64
	for _, name := range names {
		s := used[name]
		fmt.Fprintf(w, "| %s | %s | %s |\n", cell(name), format(s.calls/took.Seconds()), share(s.usec, took))
		if slices.Contains(sweepCommands, name) {
			own += s.usec
		}
	}
	fmt.Fprintf(w, "| sweeps and leases: %s | | %s |\n", cell(strings.Join(sweepCommands, " + ")), share(own, took))
}

// cell escapes a text for a table.
func cell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

func share(usec float64, took time.Duration) string {
	return format(100*usec/float64(took.Microseconds())) + " %"
}
