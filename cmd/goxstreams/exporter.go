package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

func (a *app) exporterCommand() *cobra.Command {
	e := exporter{}
	listen := ""
	cmd := &cobra.Command{
		Use:   "exporter [TOPIC...]",
		Short: "Serve metrics of topics and groups to Prometheus",
		Long: `Serve /metrics to Prometheus: what Redis holds of topics, their dead letters and delayed messages, and all their groups, be
there consumers or not. The names are those of plugin/goxprom, which knows in addition what a process does.
/healthz answers 200 for as long as the exporter runs, whatever Redis does: that is in the metrics.

The topics are the arguments, and what --pattern finds by SCAN at the start and every --discover. A scrape
asks about all of them, a hundred in each round trip, and waits for --timeout at most. SIGTERM and Ctrl-C end it
when the scrapes under way have ended.`,
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
			return a.completeTopic(cmd, nil, prefix)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			e.topics = args
			if err := e.validate(); err != nil {
				return err
			}
			client, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			e.client, e.groups = client, make(map[string][]string)
			return a.serve(cmd.Context(), &e, listen)
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&e.patterns, "pattern", nil, "topics whose names match, such as 'orders*'; may be given several times")
	flags.StringVar(&listen, "listen", "localhost:9850", "address to serve at; ':9850' is all of the machine's")
	flags.DurationVar(&e.timeout, "timeout", 2*time.Second, "how long a scrape waits for Redis; less than Prometheus's scrape_timeout")
	flags.DurationVar(&e.discover, "discover", time.Minute, "how often --pattern is looked for: SCAN reads all names of the database")
	return cmd
}

// exporter is a prometheus.Collector of what Redis holds.
type exporter struct {
	client   redis.UniversalClient
	topics   []string
	patterns []string
	timeout  time.Duration
	discover time.Duration

	mu         sync.Mutex
	found      map[string]bool // by the patterns
	discovered time.Time
	groups     map[string][]string // by topic, when Redis last said so
	round      *round              // the questions under way; nil: none are
}

// round is one look at all topics, which scrapes at the same time share.
type round struct {
	done   chan struct{}
	states []topicState // when it is done
}

func (e *exporter) validate() error {
	switch {
	case len(e.topics) == 0 && len(e.patterns) == 0:
		return usagef("which topics: names, or --pattern?")
	case slices.Contains(e.topics, "") || slices.Contains(e.patterns, ""):
		return usagef("a topic, or --pattern, is empty")
	case e.timeout <= 0:
		return usagef("--timeout must be more than 0")
	case e.discover <= 0:
		return usagef("--discover must be more than 0")
	}
	return nil
}

// serve serves until the context ends.
func (a *app) serve(ctx context.Context, e *exporter, listen string) error {
	registry := prometheus.NewRegistry()
	if err := registry.Register(e); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprint(w, "goxstreams exporter: /metrics, /healthz\n")
	})
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	a.notef("Serving http://%s/metrics", listener.Addr())
	discovery, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { e.keepDiscovering(discovery, a) })
	defer running.Wait()
	defer stop()

	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: e.timeout + 30*time.Second, IdleTimeout: 2 * time.Minute}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), e.timeout+time.Second)
	defer cancel()
	err = server.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close() // somebody reads too slowly
	}
	return err
}

// keepDiscovering looks for the patterns at once, and now and then.
func (e *exporter) keepDiscovering(ctx context.Context, a *app) {
	if len(e.patterns) == 0 {
		return
	}
	ticker := time.NewTicker(e.discover)
	defer ticker.Stop()
	failing := false
	for {
		err := e.discoverNow(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && !failing:
			a.notef("Looking for topics fails: %s", explain(err))
		case err == nil && failing:
			a.notef("Looking for topics works again.")
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (e *exporter) discoverNow(ctx context.Context) error {
	found := make(map[string]bool)
	for _, pattern := range e.patterns {
		names, err := streamNames(ctx, e.client, pattern)
		if err != nil {
			return err
		}
		for _, name := range names {
			found[name] = true
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.found, e.discovered = found, time.Now()
	maps.DeleteFunc(e.groups, func(topic string, _ []string) bool { return !found[topic] && !slices.Contains(e.topics, topic) })
	return nil
}

// allLocked returns the topics to ask about.
func (e *exporter) allLocked() []string {
	all := slices.AppendSeq(slices.Clone(e.topics), maps.Keys(e.found))
	slices.Sort(all)
	return slices.Compact(all)
}

// ask asks Redis about all topics, unless somebody is asking already: a server that does not answer is
// not asked again and again. It returns nil if there is no answer in time.
func (e *exporter) ask() []topicState {
	e.mu.Lock()
	r := e.round
	if r == nil {
		r = &round{done: make(chan struct{})}
		e.round = r
		topics := e.allLocked()
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), e.timeout)
			defer cancel()
			r.states = states(ctx, e.client, topics, question{cutOff: true})
			e.mu.Lock()
			defer e.mu.Unlock()
			e.round = nil
			close(r.done)
		}()
	}
	e.mu.Unlock()
	timer := time.NewTimer(e.timeout)
	defer timer.Stop()
	select {
	case <-r.done:
		return r.states
	case <-timer.C:
		return nil
	}
}

// The metrics. Those of topics and groups are goxprom's.
var (
	groupSuccess = desc("group_stats_success", "1 if Redis answered the questions about the topic and the group in time, 0 if not.", "topic", "group")
	groupLag     = desc("group_lag", "Consumer lag: entries not delivered to the group yet; absent if Redis cannot tell.", "topic", "group")
	groupPending = desc("group_pending_entries", "Entries delivered to the group and not acked.", "topic", "group")
	groupOldest  = desc("group_oldest_pending_age_seconds", "Time since the oldest of the pending entries was published; 0 if nothing is pending.", "topic", "group")
	groupPaused  = desc("group_paused", "1 if the group is paused, 0 if not; absent without the permission to read that.", "topic", "group")
	groupCutOff  = desc("group_cut_off_entries", "Entries that HardMaxLen cut off before the group acked them, over all times; absent without the permission to read it.", "topic", "group")
	groupNames   = desc("group_consumers", "Names of consumers in the group.", "topic", "group")
	topicEntries = desc("topic_entries", "Entries in the stream, acked ones included.", "topic")
	topicLetters = desc("topic_dead_letters", "Entries in the topic's dead-letter stream, of all groups.", "topic", "dead_letter_topic")
	topicDelayed = desc("topic_delayed_messages", "Delayed messages that are not in the stream yet; absent without the permission to count them.", "topic")
	topicOverdue = desc("topic_delayed_overdue_seconds", "Time since the first of the delayed messages was due; 0 if none is.", "topic")

	exporterUp        = desc("exporter_redis_up", "1 if Redis answered in time, be it with errors, 0 if not.")
	exporterTopics    = desc("exporter_topics", "Topics that the exporter asks about.")
	exporterDiscovery = desc("exporter_discovery_age_seconds", "Time since --pattern was last looked for with success; absent before the first time.")

	descs = []*prometheus.Desc{
		groupSuccess, groupLag, groupPending, groupOldest, groupNames, groupPaused, groupCutOff, topicEntries, topicLetters, topicDelayed, topicOverdue,
		exporterUp, exporterTopics, exporterDiscovery,
	}
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("goxstreams_"+name, help, labels, nil)
}

// Describe implements prometheus.Collector.
func (e *exporter) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (e *exporter) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		for i, l := range labels {
			labels[i] = label(l)
		}
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	all := e.ask()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.patterns) > 0 && !e.discovered.IsZero() {
		gauge(exporterDiscovery, time.Since(e.discovered).Seconds())
	}
	gauge(exporterTopics, float64(len(e.allLocked())))
	if all == nil {
		for _, topic := range e.allLocked() {
			all = append(all, topicState{topic: topic, length: unknown, deadLetters: unknown, delayedState: delayedState{delayed: unknown}, err: errors.New("no answer in time")})
		}
	}
	up := 1.0
	if brokenOf(all) != nil {
		up = 0
	}
	gauge(exporterUp, up)
	for _, s := range all {
		e.collectLocked(gauge, s)
	}
}

func (e *exporter) collectLocked(gauge func(d *prometheus.Desc, v float64, labels ...string), s topicState) {
	if s.length != unknown {
		gauge(topicEntries, float64(s.length), s.topic)
	}
	if s.deadLetters != unknown {
		gauge(topicLetters, float64(s.deadLetters), s.topic, s.deadTopic)
	}
	if s.overdue != nil {
		gauge(topicDelayed, float64(s.delayed), s.topic)
		gauge(topicOverdue, *s.overdue, s.topic)
	}
	if s.err == nil {
		e.groups[s.topic] = nil
	}
	told := make(map[string]bool)
	for _, g := range s.groups {
		told[g.Name] = true
		success := 1.0
		if s.err != nil {
			success = 0
		} else {
			e.groups[s.topic] = append(e.groups[s.topic], g.Name)
		}
		gauge(groupSuccess, success, s.topic, g.Name)
		if g.Lag >= 0 {
			gauge(groupLag, float64(g.Lag), s.topic, g.Name)
		}
		gauge(groupPending, float64(g.Pending), s.topic, g.Name)
		gauge(groupNames, float64(g.Consumers), s.topic, g.Name)
		if g.paused != nil {
			gauge(groupPaused, float64(*g.paused), s.topic, g.Name)
		}
		if g.cutOff != nil {
			gauge(groupCutOff, *g.cutOff, s.topic, g.Name)
		}
		if g.err == nil {
			gauge(groupOldest, g.oldest.Seconds(), s.topic, g.Name)
		}
	}
	for _, name := range e.groups[s.topic] { // there were when Redis last answered
		if !told[name] {
			gauge(groupSuccess, 0, s.topic, name)
		}
	}
}

// label returns a name as a label's value, which must be UTF-8, as goxprom does.
func label(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strconv.Quote(s)
}
