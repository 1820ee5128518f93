package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/chaos/deploy"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// samples is how many samples a soak takes of each process, and of Redis.
const samples = 60

// soak makes a run that measures everything regularly. It fails if something has grown.
func soak(ctx context.Context, settings Settings, faults []*Fault, out io.Writer) (passed bool, err error) {
	settings.SampleEvery = max(settings.For/samples, time.Second)
	outcome, err := runInScratch(ctx, settings, faults, out)
	if err != nil {
		return false, err
	}
	report(out, outcome)
	trends := trendsOf(outcome.Evidence.Events)
	fmt.Fprintln(out, "\n| what | at first | in the end | allowed | |")
	fmt.Fprintln(out, "|---|--:|--:|--:|---|")
	passed = outcome.passed()
	for _, t := range trends {
		verdict := "flat"
		if !t.flat() {
			verdict, passed = "GROWN", false
		}
		fmt.Fprintf(out, "| %s | %.0f | %.0f | %.0f | %s |\n", t.name, t.first, t.last, t.allowed, verdict)
	}
	return passed, nil
}

// measure samples Redis until the context ends.
func (b *Bench) measure(ctx context.Context) {
	ticker := time.NewTicker(b.settings.SampleEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		s, err := b.sampleRedis(ctx)
		if err != nil {
			b.printf("no sample: %v", err) // a fault is under way
			continue
		}
		b.journal.write(rules.Event{Kind: rules.Sampled, Sample: &s})
		b.printf("%d connections, %d pending, %d consumers", s.Connections, s.Pending, s.Consumers)
	}
}

func (b *Bench) sampleRedis(ctx context.Context) (s rules.Sample, err error) {
	err = b.eachNode(ctx, func(ctx context.Context, n *deploy.Node) error {
		list, err := n.Client().ClientList(ctx).Result()
		s.Connections += strings.Count(list, "\n")
		return err
	})
	for _, topic := range topics {
		groups, groupsErr := b.deployment.Client().XInfoGroups(ctx, topic.Name).Result()
		if groupsErr != nil && !noGroup(groupsErr) {
			err = groupsErr
		}
		for _, g := range groups {
			s.Pending += int(g.Pending)
			s.Consumers += int(g.Consumers)
		}
	}
	return s, err
}

// A trend is a size early in a run and at its end. Early is the second fifth, because pools fill and batches adapt in the first;
// the end is the last fifth. Each is a median, because a single sample may hit a burst. A leak grows with the messages, that is
// by half or more between the two; slack keeps small numbers from failing by one or two.
type trend struct {
	name                 string
	first, last, allowed float64
}

const growth = 1.25

func (t trend) flat() bool { return t.last <= t.allowed }

// trendsOf returns the trends of everything that was sampled often enough.
func trendsOf(events []rules.Event) []trend {
	series := make(map[string][]float64)
	slack := make(map[string]float64)
	add := func(name string, value int, more float64) {
		series[name] = append(series[name], float64(value))
		slack[name] = more
	}
	for _, e := range events {
		switch s := e.Sample; {
		case s == nil:
		case s.Goroutines > 0:
			add(e.Process+" goroutines", s.Goroutines, 10)
			add(e.Process+" heap", s.Heap, 2<<20)
		default:
			add("connections", s.Connections, 10)
			add("pending", s.Pending, 500)
			add("consumers", s.Consumers, 4)
		}
	}
	var trends []trend
	for _, name := range slices.Sorted(maps.Keys(series)) {
		all := series[name]
		fifth := len(all) / 5
		if fifth == 0 {
			continue
		}
		first, last := median(all[fifth:2*fifth]), median(all[len(all)-fifth:])
		trends = append(trends, trend{name, first, last, first*growth + slack[name]})
	}
	return trends
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
