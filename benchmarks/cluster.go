package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

const (
	masters   = 3
	slotCount = 16384
	// A new Cluster serves once its masters have seen each other for the node
	// timeout; afterwards a busy machine must not exceed it.
	formingTimeout = "2000" // ms
	servingTimeout = "15000"
)

// spread has the flags of `cluster`.
type spread struct {
	binary                 string
	topics, messages, call int
	rounds                 int
}

// cluster measures publishing and consuming at the same time, with topics on
// one, two and three masters.
func cluster(args []string, out io.Writer) error {
	s := spread{}
	f := flag.NewFlagSet("cluster", flag.ContinueOnError)
	f.StringVar(&s.binary, "redis", "redis-server", "`binary` to start as the masters")
	f.IntVar(&s.topics, "topics", 6, "topics, spread over the masters evenly")
	f.IntVar(&s.messages, "messages", 300_000, "messages, over all topics")
	f.IntVar(&s.call, "call", 100, "messages of one Publish call")
	f.IntVar(&s.rounds, "rounds", 3, "rounds to report the medians of, after one to warm up")
	if err := f.Parse(args); err != nil {
		return err
	}
	if s.topics < masters || s.messages < s.topics || s.call < 1 || s.rounds < 1 {
		return fmt.Errorf("-topics must be %d at least, -messages as many, -call and -rounds positive", masters)
	}
	c, err := startCluster(s.binary)
	if err != nil {
		return err
	}
	stop := onceOrSignal(c.stop)
	defer stop()
	return s.measure(c, out)
}

func (s spread) measure(c *nodes, out io.Writer) error {
	// By number of masters, then the rate and each process's CPU.
	results := make([][][]float64, masters)
	for round := range s.rounds + 1 {
		for i := range masters {
			row, err := s.round(c, i+1)
			if err != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "round %d, %d masters: %s msg/s\n", round, i+1, format(row[0]))
			if round > 0 {
				results[i] = append(results[i], row)
			}
		}
	}
	fmt.Fprintf(out, "\n### Cluster\n\n%d topics, published in calls of %d and consumed at the same time. CPU in percent of one core.\n\n", s.topics, s.call)
	return s.table(c, results, out)
}

func (s spread) table(c *nodes, results [][][]float64, out io.Writer) error {
	fmt.Fprint(out, "| masters with topics | msg/s | against one | client CPU |")
	for i := range masters {
		fmt.Fprintf(out, " server %d CPU |", i+1)
	}
	fmt.Fprintf(out, "\n|--:|--:|--:|--:|%s\n", strings.Repeat("--:|", masters))
	for i, rounds := range results {
		var ratios []float64
		for r, row := range rounds {
			ratios = append(ratios, row[0]/results[0][r][0])
		}
		fmt.Fprintf(out, "| %d | %s | %s |", i+1, format(column(rounds, 0)), format(median(ratios)))
		for k := 1; k <= masters+1; k++ {
			fmt.Fprintf(out, " %s %% |", format(column(rounds, k)))
		}
		fmt.Fprintln(out)
	}
	e := &env{admin: c.clients[0]}
	m, err := e.machine()
	fmt.Fprintf(out, "\n%s\n", m)
	return err
}

// column returns the median of one column.
func column(rows [][]float64, k int) float64 {
	var values []float64
	for _, row := range rows {
		values = append(values, row[k])
	}
	return median(values)
}

// round returns the rate, the client's CPU and each server's, with topics on so
// many masters.
func (s spread) round(c *nodes, on int) (_ []float64, err error) {
	client := redis.NewClusterClient(&redis.ClusterOptions{Addrs: c.addrs()})
	defer client.Close()
	topics, err := s.topicsOn(c, client, on)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, topic := range topics {
			err = errors.Join(err, client.Del(context.Background(), topic).Err())
		}
	}()
	before, err := c.cpu()
	if err != nil {
		return nil, err
	}
	own, start := processCPU(), time.Now()
	each := s.messages / s.topics
	if err := s.flow(client, topics, each); err != nil {
		return nil, err
	}
	took := time.Since(start).Seconds()
	own = processCPU() - own
	after, err := c.cpu()
	if err != nil {
		return nil, err
	}
	row := []float64{float64(each*s.topics) / took, 100 * own.Seconds() / took}
	for i := range after {
		row = append(row, 100*(after[i]-before[i])/took)
	}
	return row, nil
}

// topicsOn returns topics whose slots are on the first so many masters, in turn.
func (s spread) topicsOn(c *nodes, client *redis.ClusterClient, on int) ([]string, error) {
	e := &env{}
	var topics []string
	for len(topics) < s.topics {
		topic := e.topic()
		slot, err := client.ClusterKeySlot(context.Background(), topic).Result()
		if err != nil {
			return nil, err
		}
		if c.master(int(slot)) == len(topics)%on {
			topics = append(topics, topic)
		}
	}
	return topics, nil
}

// flow publishes to each topic from its own goroutine, and consumes all of them with
// one Subscriber, until everything has arrived.
func (s spread) flow(client *redis.ClusterClient, topics []string, each int) (err error) {
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	sub, err := goxstreams.NewSubscriber(oursConfig(client, options{concurrency: 1}), nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sub.Close(), pub.Close()) }()
	arrived := newTally(each*len(topics), 1)
	for _, topic := range topics {
		if _, err := subscribe(sub, topic, options{workers: 1}, func(p []byte) error { arrived.got(p); return nil }); err != nil {
			return err
		}
	}
	err = atOnce(len(topics), func(i int) error {
		for first := 0; first < each; first += s.call {
			if err := publishAll(pub, topics[i], payloads(i*each+first, min(s.call, each-first), payloadSize))(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := arrived.wait(); err != nil {
		return err
	}
	return arrived.check()
}

// nodes are the masters of a Cluster.
type nodes struct {
	servers []*server
	clients []*redis.Client
}

// startCluster starts the masters and makes them one Cluster.
func startCluster(binary string) (_ *nodes, err error) {
	c := &nodes{}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	for range masters {
		srv, err := startServer(binary, "--cluster-enabled", "yes", "--cluster-node-timeout", formingTimeout)
		if err != nil {
			return nil, err
		}
		c.servers = append(c.servers, srv)
		c.clients = append(c.clients, redis.NewClient(&redis.Options{Addr: srv.addr}))
	}
	if err := c.form(); err != nil {
		return nil, fmt.Errorf("forming a Cluster: %w", err)
	}
	return c, nil
}

func (c *nodes) stop() {
	for i := range c.servers {
		_ = c.clients[i].Close()
		c.servers[i].stop()
	}
}

func (c *nodes) addrs() []string {
	var addrs []string
	for _, srv := range c.servers {
		addrs = append(addrs, srv.addr)
	}
	return addrs
}

// master returns which master has a slot.
func (c *nodes) master(slot int) int {
	i := 0
	for slot >= slotCount*(i+1)/masters {
		i++
	}
	return i
}

// form gives each master its slots and lets each pair meet.
func (c *nodes) form() error {
	ctx := context.Background()
	for i, client := range c.clients {
		// Different epochs from the start, or the nodes would have to agree on them first.
		if err := client.Do(ctx, "cluster", "set-config-epoch", i+1).Err(); err != nil {
			return err
		}
		if err := client.ClusterAddSlotsRange(ctx, slotCount*i/masters, slotCount*(i+1)/masters-1).Err(); err != nil {
			return err
		}
		for _, peer := range c.servers[:i] {
			host, port, err := net.SplitHostPort(peer.addr)
			if err != nil {
				return err
			}
			if err := client.ClusterMeet(ctx, host, port).Err(); err != nil {
				return err
			}
		}
	}
	for _, client := range c.clients {
		if err := awaitCluster(client); err != nil {
			return err
		}
		if err := client.ConfigSet(ctx, "cluster-node-timeout", servingTimeout).Err(); err != nil {
			return err
		}
	}
	return nil
}

// awaitCluster waits until a master serves and knows all slots' masters.
func awaitCluster(client *redis.Client) error {
	var text string
	var err error
	for range 2000 {
		text, err = client.ClusterInfo(context.Background()).Result()
		if strings.Contains(text, "cluster_state:ok") && strings.Contains(text, fmt.Sprintf("cluster_slots_ok:%d\r", slotCount)) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.Join(err, errors.New(text))
}

// cpu returns the CPU time of each master, in seconds.
func (c *nodes) cpu() ([]float64, error) {
	var all []float64
	for _, client := range c.clients {
		used, err := serverCPU(client)
		if err != nil {
			return nil, err
		}
		all = append(all, used)
	}
	return all, nil
}
