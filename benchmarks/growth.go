package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// A sweep measures how something grows.
type sweep struct {
	name    string
	xs      []int
	systems []string
	most    int // maximum number of rounds; 0: no maximum
	// work returns the options, the number of messages and what to do for an x.
	work func(system string, x int) (options, int, func(*trial) (metrics, error))
	// pictures are what is drawn of it, by metric.
	pictures []picture
}

var (
	payloadSizes   = []int{16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20}
	topicNumbers   = []int{1, 10, 100, 1000}
	groupSizes     = []int{1, 2, 5, 10, 50, 200}
	pendingNumbers = []int{0, 10_000, 100_000, 1_000_000}
	streamSystems  = []string{"ours", "redisstream", "raw"}
)

var sweeps = []sweep{
	{"payload-publish", payloadSizes, streamSystems, 0, payloadPublish, []picture{
		{"payload-publish", rate, "Publish in calls of 100 (at most 1 MiB a call)", "payload in bytes", "messages per second"}}},
	{"payload-subscribe", payloadSizes, streamSystems, 0, payloadSubscribe, []picture{
		{"payload-subscribe", rate, "Subscribe to a full stream, MaxConcurrency 1", "payload in bytes", "messages per second"}}},
	{"topics", topicNumbers, []string{"ours", "redisstream"}, 0, topicsGrow, []picture{
		{"topics-rate", rate, "One Subscriber, messages waiting in all topics", "topics", "messages per second, all topics"},
		{"topics-latency", p99, "One Subscriber, 200 messages per second over all topics", "topics", "p99 from Publish to handler, ms"}}},
	{"consumers", groupSizes, streamSystems, 0, consumersGrow, []picture{
		{"consumers", rate, "A full stream and the consumers of one group, in one process", "consumers", "messages per second, all consumers"}}},
	{"pending", pendingNumbers, streamSystems, 0, pendingGrow, []picture{
		{"pending-read", rate, "Subscribe to a full stream while another consumer holds entries", "entries pending with another consumer", "messages per second"}}},
	{"claim", pendingNumbers, []string{"ours", "redisstream"}, 1, claimGrow, []picture{
		{"pending-claim", rate, "Taking over what a dead consumer held, behind a living one's entries", "entries pending with a living consumer", "messages claimed per second"}}},
}

// growthData is what data.json holds.
type growthData struct {
	Machine machine `json:"machine"`
	Points  []point `json:"points"`
}

// A point is the median of a metric over the rounds.
type point struct {
	Sweep  string  `json:"sweep"`
	Metric string  `json:"metric"`
	System string  `json:"system"`
	X      int     `json:"x"`
	Y      float64 `json:"y"`
}

func growth(args []string) error {
	var where target
	f := flag.NewFlagSet("growth", flag.ContinueOnError)
	where.flags(f)
	dir := f.String("dir", "growth", "`directory` of data.json and the pictures")
	redraw := f.Bool("draw", false, "only draw the pictures from data.json")
	rounds := f.Int("rounds", 3, "rounds, of which the median is drawn")
	size := f.Float64("size", 1, "`factor` of message counts and durations")
	only := f.String("sweep", "", "measure the sweeps that match the `regexp`; the others stay as data.json has them")
	if err := f.Parse(args); err != nil {
		return err
	}
	matching, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-sweep: %w", err)
	}
	if *rounds < 1 || *size <= 0 {
		return errors.New("-rounds and -size must be positive")
	}
	file := filepath.Join(*dir, "data.json")
	if !*redraw {
		data, err := grow(where, matching, *rounds, *size)
		if err != nil {
			return err
		}
		if *only != "" {
			if err := data.keep(file, matching); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(*dir, 0o755); err != nil {
			return err
		}
		if err := writeJSON(file, data); err != nil {
			return err
		}
	}
	return drawAll(file, *dir)
}

// keep adds the old points of the sweeps that were not measured again.
func (d *growthData) keep(file string, measured *regexp.Regexp) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var old growthData
	if err := json.Unmarshal(text, &old); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, p := range old.Points {
		if !measured.MatchString(p.Sweep) {
			d.Points = append(d.Points, p)
		}
	}
	return nil
}

func grow(where target, matching *regexp.Regexp, rounds int, size float64) (*growthData, error) {
	e, closeAll, err := where.open(size)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	data := &growthData{}
	if data.Machine, err = e.machine(); err != nil {
		return nil, err
	}
	for i := range sweeps {
		if !matching.MatchString(sweeps[i].name) {
			continue
		}
		for _, x := range sweeps[i].xs {
			points, err := sweeps[i].measure(e, x, rounds)
			if err != nil {
				return nil, err
			}
			data.Points = append(data.Points, points...)
		}
	}
	if len(data.Points) == 0 {
		return nil, fmt.Errorf("-sweep: none of them matches %s", matching)
	}
	return data, nil
}

// measure returns the points of all systems at x.
func (s *sweep) measure(e *env, x, rounds int) ([]point, error) {
	all := make(map[string]map[string][]float64) // by system and metric
	if s.most > 0 {
		rounds = min(rounds, s.most)
	}
	for round := range rounds {
		for _, system := range s.systems {
			o, n, do := s.work(system, x)
			n = e.count(n)
			name := fmt.Sprintf("%s %d", s.name, x)
			m, err := e.run(&scenario{name: name, options: o, measure: do}, system, n)
			if err != nil {
				return nil, err
			}
			if all[system] == nil {
				all[system] = make(map[string][]float64)
			}
			for metric, v := range m {
				all[system][metric] = append(all[system][metric], v)
			}
			fmt.Fprintf(os.Stderr, "round %d, %s, %s: %s %s\n", round, name, system, format(m[s.pictures[0].metric]), s.pictures[0].metric)
		}
	}
	var points []point
	for _, system := range s.systems {
		for _, p := range s.pictures {
			points = append(points, point{s.name, p.metric, system, x, median(all[system][p.metric])})
		}
	}
	return points, nil
}

// messagesFor returns a number of messages for about half a second: by the systems'
// rates with small payloads, and fewer where the bytes take the time.
func messagesFor(system string, size int) int {
	n := map[string]int{"ours": 100_000, "redisstream": 7_000, "raw": 200_000}[system]
	const most = 128 << 20
	return max(100, min(n, most/size))
}

func payloadPublish(system string, size int) (options, int, func(*trial) (metrics, error)) {
	return options{}, messagesFor(system, size), func(t *trial) (metrics, error) {
		topic, err := t.newTopic()
		if err != nil {
			return nil, err
		}
		perCall := max(1, min(100, 1<<20/size))
		call := t.backend.batch(topic, payloads(0, perCall, size))
		calls := max(1, t.n/perCall)
		m, err := t.measure(calls*perCall, func() error {
			for range calls {
				if err := call(); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		return m, t.filled(topic, calls*perCall)
	}
}

func payloadSubscribe(system string, size int) (options, int, func(*trial) (metrics, error)) {
	return options{}, messagesFor(system, size), func(t *trial) (metrics, error) {
		topic, err := t.newTopic()
		if err != nil {
			return nil, err
		}
		if err := t.fill(topic, t.n, size); err != nil {
			return nil, err
		}
		return consumeTopic(t, topic, 1, func(int32) error { return nil })
	}
}

func topicsGrow(system string, number int) (options, int, func(*trial) (metrics, error)) {
	o := options{}
	if system == "redisstream" { // it blocks a connection for each topic
		o.pool = number*2 + 100
	}
	return o, messagesFor(system, payloadSize), func(t *trial) (metrics, error) {
		each := max(t.count(50), t.n/number) // or subscribing would be measured
		topics, err := fillTopics(t, number, each)
		if err != nil {
			return nil, err
		}
		var now inTurn
		m, err := backlogged(t, topics, each, &now)
		if err != nil {
			return nil, err
		}
		watch := newStopwatch(t.lowRate())
		now.set(watch.handle)
		delays, err := timed(t, watch, topics, slowRate)
		if err != nil {
			return nil, err
		}
		m[p99] = delays[p99]
		return m, t.allSettled(topics)
	}
}

// consumersGrow has that number of Subscribers, with a client each, share a stream.
func consumersGrow(system string, number int) (options, int, func(*trial) (metrics, error)) {
	return options{}, messagesFor(system, payloadSize), func(t *trial) (_ metrics, err error) {
		topic, err := t.newTopic()
		if err != nil {
			return nil, err
		}
		if err := t.fill(topic, t.n, payloadSize); err != nil {
			return nil, err
		}
		others := make([]backend, number)
		for i := range others {
			if others[i], err = systems[t.system](t.env, options{concurrency: 1, workers: 1}); err != nil {
				return nil, err
			}
		}
		defer func() { err = errors.Join(err, closeBackends(others)) }()
		arrived := newTally(t.n, 1)
		m, err := t.measure(t.n, func() error {
			err := atOnce(number, func(i int) error {
				return others[i].consume(topic, func(p []byte) error { arrived.got(p); return nil })
			})
			if err != nil {
				return err
			}
			return t.drain(topic, arrived)
		})
		if err != nil {
			return nil, err
		}
		return m, arrived.check()
	}
}

func closeBackends(backends []backend) error {
	return atOnce(len(backends), func(i int) error { return backends[i].close() })
}

func pendingGrow(system string, pending int) (options, int, func(*trial) (metrics, error)) {
	return options{}, messagesFor(system, payloadSize), func(t *trial) (metrics, error) {
		topic, err := t.newTopic()
		if err != nil {
			return nil, err
		}
		if pending, err = t.hold(topic, "other", pending); err != nil {
			return nil, err
		}
		if err := t.more(topic, t.n); err != nil {
			return nil, err
		}
		arrived := newTally(t.n, 1)
		m, err := t.measure(t.n, func() error {
			if err := t.backend.consume(topic, func(p []byte) error { arrived.got(p); return nil }); err != nil {
				return err
			}
			if err := arrived.wait(); err != nil {
				return err
			}
			return t.settledBut(topic, int64(pending))
		})
		if err != nil {
			return nil, err
		}
		return m, arrived.check()
	}
}

// hold fills a topic with n messages, scaled, and reads them for a consumer that does
// nothing. It returns how many.
func (t *trial) hold(topic, consumer string, n int) (int, error) {
	if n == 0 {
		return 0, nil
	}
	n = t.count(n)
	if err := t.more(topic, n); err != nil {
		return 0, err
	}
	_, err := t.read(topic, consumer, n)
	return n, err
}

// more adds n numbered messages to what the topic has.
func (t *trial) more(topic string, n int) error {
	for first := 0; first < n; first += fillCall {
		if err := t.backend.batch(topic, payloads(first, min(fillCall, n-first), payloadSize))(); err != nil {
			return err
		}
	}
	return nil
}

// read reads n entries for a consumer and returns their IDs.
func (t *trial) read(topic, consumer string, n int) ([]string, error) {
	var ids []string
	for len(ids) < n {
		streams, err := t.admin.XReadGroup(context.Background(), &redis.XReadGroupArgs{
			Group: group, Consumer: consumer, Streams: []string{topic, ">"}, Count: int64(min(10_000, n-len(ids))), Block: -1,
		}).Result()
		if err != nil {
			return nil, err
		}
		for _, entry := range streams[0].Messages {
			ids = append(ids, entry.ID)
		}
	}
	return ids, nil
}

// leastClaimMinIdle is a minimum for scaled times: entries must be read within it.
const leastClaimMinIdle = 3 * time.Second

// claimWindow is how long claims are counted. It ends before the entries of the
// living consumer, which nobody renews here, look abandoned too.
const claimWindow = 15 * time.Second

// claimGrow measures how fast entries are taken over that have been idle for an
// hour. They have the highest IDs: a consumer that looks for them has to pass those
// of a living one.
func claimGrow(system string, pending int) (options, int, func(*trial) (metrics, error)) {
	n := map[string]int{"ours": 10_000, "redisstream": 300}[system]
	return options{}, n, func(t *trial) (metrics, error) {
		idle := min(time.Minute, max(leastClaimMinIdle, t.duration(time.Minute)))
		if err := t.reopen(options{concurrency: 100, claimMinIdle: idle}); err != nil {
			return nil, err
		}
		topic, err := t.newTopic()
		if err != nil {
			return nil, err
		}
		if _, err := t.hold(topic, "living", pending); err != nil {
			return nil, err
		}
		if err := t.more(topic, t.n); err != nil {
			return nil, err
		}
		ids, err := t.read(topic, "dead", t.n)
		if err != nil {
			return nil, err
		}
		if err := t.abandon(topic, ids); err != nil {
			return nil, err
		}
		return t.claims(topic)
	}
}

// abandon makes entries look as if nobody had renewed them for an hour.
func (t *trial) abandon(topic string, ids []string) error {
	for len(ids) > 0 {
		some := ids[:min(100, len(ids))]
		ids = ids[len(some):]
		args := []any{"xclaim", topic, group, "dead", 0}
		for _, id := range some {
			args = append(args, id)
		}
		args = append(args, "idle", strconv.FormatInt(time.Hour.Milliseconds(), 10), "justid")
		if err := t.admin.Do(context.Background(), args...).Err(); err != nil {
			return err
		}
	}
	return nil
}

// claims returns the rate, from the first message that is taken over.
func (t *trial) claims(topic string) (metrics, error) {
	arrived := newTally(t.n, 1)
	var first atomic.Int64
	err := t.backend.consume(topic, func(p []byte) error {
		first.CompareAndSwap(0, int64(time.Since(epoch)))
		arrived.got(p)
		return nil
	})
	if err != nil {
		return nil, err
	}
	begin, err := awaitFirst(&first)
	if err != nil {
		return nil, err
	}
	select {
	case <-arrived.done:
	case <-time.After(claimWindow):
	}
	took := time.Since(epoch) - begin
	m := metrics{rate: float64(arrived.total.Load()) / took.Seconds()}
	if int(arrived.total.Load()) < t.n {
		return m, nil // there was no time for all
	}
	return m, arrived.check()
}

func awaitFirst(first *atomic.Int64) (time.Duration, error) {
	for deadline := time.Now().Add(claimPatience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if at := first.Load(); at > 0 {
			return time.Duration(at), nil
		}
	}
	return 0, fmt.Errorf("nothing was taken over within %v", claimPatience)
}

// claimPatience: ours looks twice, ClaimMinIdle/3 = 20s apart, before it claims.
const claimPatience = 40 * time.Second
