package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/chaos/deploy"
)

func TestMain(m *testing.M) {
	if playRole() {
		return
	}
	os.Exit(m.Run())
}

// TestRun is a short run of each deployment. Recovery times are printed and not asserted: the machine may be busy.
func TestRun(t *testing.T) {
	for _, test := range []struct {
		deployment string
		seed       uint64
		load       time.Duration
		faults     string
	}{
		{single, 1, 40 * time.Second, "consumer-kill,producer-kill,consumer-stop-long,rolling-restart,redis-kill-always,redis-freeze-short," +
			"client-kill,out-of-memory,partition,group-destroy,cut-before-reply,cut-middle-reply"},
		{sentinel, 2, 25 * time.Second, "failover,master-kill,consumer-kill,client-kill"},
		{cluster, 3, 25 * time.Second, "shard-failover,slot-move,shard-kill,consumer-kill"},
	} {
		t.Run(test.deployment, func(t *testing.T) {
			settings := defaultSettings()
			settings.Deployment, settings.Seed, settings.For, settings.Gap = test.deployment, test.seed, test.load, time.Second
			faults, err := chooseFaults(strings.Split(test.faults, ","), test.deployment)
			require.NoError(t, err)
			outcome, err := runFaults(t.Context(), settings, faults, t.TempDir(), t.Output())
			requireServer(t, err)
			require.NoError(t, err)
			report(t.Output(), outcome)
			assert.Empty(t, outcome.Verdict.Violations)
			assert.NotZero(t, outcome.Verdict.Handled)
		})
	}
}

// requireServer skips a test that has no redis-server, unless there must be one.
func requireServer(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, deploy.ErrNoServer) {
		return
	}
	if os.Getenv("GOXSTREAMS_TEST_REAL") == "1" {
		require.NoError(t, err, "GOXSTREAMS_TEST_REAL=1 demands a redis-server in the PATH")
	}
	t.Skipf("it needs a redis-server in the PATH: %v", err)
}

// TestSchedule: a seed is a run's faults, and each fault comes before one comes again.
func TestSchedule(t *testing.T) {
	settings := defaultSettings()
	settings.For = time.Hour
	faults, err := chooseFaults([]string{"all"}, single)
	require.NoError(t, err)
	type choice struct {
		fault        string
		offset, hold time.Duration
		dice         uint64
	}
	choices := func() (all []choice) {
		for _, s := range schedule(settings, faults) {
			all = append(all, choice{s.Fault.Name, s.Offset, s.Hold, s.Dice})
		}
		return all
	}
	first := choices()
	assert.Equal(t, first, choices())
	require.Greater(t, len(first), len(faults))
	seen := make(map[string]bool)
	for _, c := range first[:len(faults)] {
		seen[c.fault] = true
	}
	assert.Len(t, seen, len(faults))
	settings.Seed++
	assert.NotEqual(t, first, choices())
}

func TestChooseFaults(t *testing.T) {
	for _, deployment := range []string{single, sentinel, cluster} {
		all, err := chooseFaults([]string{"all"}, deployment)
		require.NoError(t, err)
		chosen, err := chooseFaults(faultNames(all), deployment)
		require.NoError(t, err)
		assert.Equal(t, faultNames(all), faultNames(chosen))
	}
	_, err := chooseFaults([]string{"slot-move"}, single)
	assert.ErrorContains(t, err, `no "slot-move" for single`)
	none, err := chooseFaults([]string{"none"}, single)
	require.NoError(t, err)
	assert.Empty(t, none)
}

// TestJournal: two processes of one place write to one file; all is read, in the order of time.
func TestJournal(t *testing.T) {
	dir := t.TempDir()
	first, err := openJournal(dir, "consumer-1", 1)
	require.NoError(t, err)
	second, err := openJournal(dir, "consumer-1", 2)
	require.NoError(t, err)
	first.write(Event{Kind: Started, UUID: "a"})
	second.write(Event{Kind: Started, UUID: "b"})
	first.write(Event{Kind: Acked, UUID: "a"})
	require.NoError(t, first.close())
	require.NoError(t, second.close())
	events, err := readJournals(dir)
	require.NoError(t, err)
	var got []string
	for _, e := range events {
		got = append(got, string(e.Kind)+" "+e.UUID)
	}
	assert.Equal(t, []string{"started a", "started b", "acked a"}, got)

	require.NoError(t, os.WriteFile(filepath.Join(dir, "torn.jsonl"), []byte(`{"kind":`), 0o600))
	_, err = readJournals(dir)
	assert.ErrorContains(t, err, "torn.jsonl")
}

// TestTrends: what grows with the messages is found, what is noisy is not.
func TestTrends(t *testing.T) {
	var events []Event
	for i := range 50 {
		noise := i % 7
		events = append(events,
			Event{Kind: Sampled, Process: "consumer-1", Sample: &Sample{Goroutines: 60 + noise, Heap: (4 + i) << 20}},
			Event{Kind: Sampled, Process: "runner", Sample: &Sample{Connections: 30 + noise, Pending: noise * 50, Consumers: 12}})
	}
	grown := make(map[string]bool)
	for _, trend := range trendsOf(events) {
		grown[trend.name] = !trend.flat()
	}
	assert.Equal(t, map[string]bool{
		"consumer-1 goroutines": false, "consumer-1 heap": true, "connections": false, "pending": false, "consumers": false,
	}, grown)
}

// TestUnknownDeployment is an error of the flag's, before anything is started.
func TestUnknownDeployment(t *testing.T) {
	_, err := startDeployment(context.Background(), Settings{Deployment: "ring"}, t.TempDir())
	assert.ErrorContains(t, err, "-deployment")
}
