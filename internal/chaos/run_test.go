package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/chaos/deploy"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

func TestMain(m *testing.M) {
	if playRole() {
		return
	}
	flag.Parse()
	// A run uses a third of a processor.
	if err := flag.Set("test.parallel", "4"); err != nil {
		fail(err)
	}
	os.Exit(m.Run())
}

// testSettings are those of short runs, with less load because children run with the race detector too.
func testSettings() Settings {
	settings := defaultSettings()
	settings.Rate, settings.Gap, settings.MaxDelay = 4, time.Second, 3*time.Second
	return settings
}

func testRun(t *testing.T, settings Settings, faults string) Outcome {
	t.Helper()
	t.Parallel()
	chosen, err := chooseFaults(strings.Split(faults, ","), settings.Deployment)
	require.NoError(t, err)
	outcome, err := runFaults(t.Context(), settings, chosen, t.TempDir(), t.Output())
	requireServer(t, err)
	require.NoError(t, err)
	report(t.Output(), outcome)
	assert.NotZero(t, outcome.Verdict.Handled)
	return outcome
}

const cutFaults = "cut-before-reply,cut-middle-reply,cut-after-reply"

// TestRun is two minutes of load with fixed seeds. Recovery times are printed and not asserted: the machine may be busy.
func TestRun(t *testing.T) {
	for _, test := range []struct {
		name string
		Settings
		faults string
	}{
		{"single", Settings{Deployment: single, Seed: 1, For: 30 * time.Second}, "consumer-kill,producer-kill,consumer-stop-long," +
			"rolling-restart,redis-kill-always,redis-freeze-short,client-kill,out-of-memory,partition,group-destroy"},
		{"sentinel", Settings{Deployment: sentinel, Seed: 2, For: 20 * time.Second}, "failover,master-kill,consumer-kill,client-kill"},
		{"cluster", Settings{Deployment: cluster, Seed: 3, For: 20 * time.Second}, "shard-failover,slot-move,shard-kill,consumer-kill"},
		{"overlapping", Settings{Deployment: single, Seed: 4, For: 30 * time.Second, Overlap: 3}, "all"},
		{"idempotent", Settings{Deployment: container, Seed: 5, For: 20 * time.Second, Repeat: true, Idempotence: true},
			cutFaults + ",producer-kill,client-kill,redis-disconnect"},
	} {
		t.Run(test.name, func(t *testing.T) {
			settings := testSettings()
			settings.Deployment, settings.Seed, settings.For = test.Deployment, test.Seed, test.For
			settings.Overlap, settings.Repeat, settings.Idempotence = max(test.Overlap, 1), test.Repeat, test.Idempotence
			assert.Empty(t, testRun(t, settings, test.faults).Verdict.Violations)
		})
	}
}

// TestRepeatedWithoutIdempotence: what is published again is stored again, and the checker sees it.
func TestRepeatedWithoutIdempotence(t *testing.T) {
	settings := testSettings()
	settings.Repeat, settings.For, settings.Rate = true, 10*time.Second, 20
	assert.Equal(t, []string{rules.RuleStoredTwice}, testRun(t, settings, cutFaults).Verdict.Broken())
}

// TestDelayedAreChecked: the checker sees delayed messages that come early, twice or never.
func TestDelayedAreChecked(t *testing.T) {
	settings := testSettings()
	settings.For, settings.Rate, settings.Gap, settings.MaxDelay = 4*time.Second, 20, 200*time.Millisecond, 5*time.Second
	for name, test := range map[string]struct {
		comes, stays bool
		broken       []string
	}{
		"early":           {true, false, []string{rules.RuleEarly}},
		"early and twice": {true, true, []string{rules.RuleEarly, rules.RuleStoredTwice}},
		"never":           {false, false, []string{rules.RuleVanished, rules.RuleTorn}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sabotage := &Fault{Name: "sabotage", hold: atOnce, inject: func(ctx context.Context, b *Bench, s Strike, effect func(rules.Effect)) (func(context.Context) error, error) {
				topic := pick(s, topics).Name
				effect(rules.Effect{Target: []string{topic}})
				schedule, err := goxstreams.NewSchedule(b.deployment.Client(), topic)
				if err != nil {
					return nil, err
				}
				for delayed, err := range schedule.All(ctx) {
					if err != nil {
						return nil, err
					}
					if time.Until(delayed.Due) < 3*time.Second { // more than the rule's tolerance
						continue
					}
					if test.comes {
						err = b.deployment.Client().XAdd(ctx, &redis.XAddArgs{Stream: topic, Values: delayed.Fields}).Err()
					}
					if !test.stays {
						err = errors.Join(err, schedule.Cancel(ctx, delayed.UUID))
					}
					return healed, err
				}
				return healed, nil
			}}
			outcome, err := runFaults(t.Context(), settings, []*Fault{sabotage}, t.TempDir(), t.Output())
			requireServer(t, err)
			require.NoError(t, err)
			assert.Subset(t, outcome.Verdict.Broken(), test.broken)
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

// TestGoOn: a producer begins with the call whose outcome its predecessor never learned, with the same messages.
func TestGoOn(t *testing.T) {
	d, err := deploy.Single(t.Context(), deploy.Config{})
	requireServer(t, err)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	settings, ctx := testSettings(), t.Context()
	settings.Repeat = true
	for _, test := range []struct {
		name   string
		events []rules.Kind
		stored int
	}{
		{"nothing", nil, 0},
		{"open", []rules.Kind{rules.Publishing, rules.Published, rules.Publishing}, 2},
		{"unknown", []rules.Kind{rules.Publishing, rules.Unknown}, 2},
		{"known", []rules.Kind{rules.Publishing, rules.Unknown, rules.Publishing, rules.Published}, 0},
		{"refused", []rules.Kind{rules.Publishing, rules.Refused}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			uuids := []string{"plain-1", "broken-2"}
			c := child{role: Role{Dir: t.TempDir(), Process: "producer-1", Settings: settings}, client: d.Client()}
			c.journal, err = openJournal(c.role.Dir, c.role.Process, 1)
			require.NoError(t, err)
			for _, kind := range test.events {
				c.journal.write(rules.Event{Kind: kind, Topic: test.name, UUIDs: uuids})
			}
			publisher, err := newPublisher(settings, c.client, nil)
			require.NoError(t, err)
			require.NoError(t, c.goOn(publisher))
			entries, err := entriesOf(ctx, c.client, test.name)
			require.NoError(t, err)
			var stored []string
			for _, e := range entries {
				stored = append(stored, e.UUID)
			}
			assert.Equal(t, uuids[:test.stored], append([]string{}, stored...))
			require.NoError(t, c.goOn(publisher), "it is known now")
			assert.EqualValues(t, test.stored, c.client.XLen(ctx, test.name).Val())
		})
	}
	assert.Equal(t, makeMessage(settings, "flaky-1").Payload, makeMessage(settings, "flaky-1").Payload)
	_, err = goxstreams.DefaultMarshaler{}.Unmarshal(must(rules.Saboteur{}.Marshal("t", makeMessage(settings, "broken-1"))))
	assert.Error(t, err)
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// TestOverlap: each lane is free when the next fault comes, and all lanes are used.
func TestOverlap(t *testing.T) {
	settings := testSettings()
	settings.For, settings.Overlap = time.Hour, 3
	faults, err := chooseFaults([]string{"all"}, single)
	require.NoError(t, err)
	free := make(map[int]time.Duration)
	atOnce := 0
	for _, s := range schedule(settings, faults) {
		assert.GreaterOrEqual(t, s.Offset, free[s.Lane])
		for lane, until := range free {
			if lane != s.Lane && until > s.Offset {
				atOnce++
			}
		}
		free[s.Lane] = s.Offset + s.Fault.takes + s.Hold
	}
	assert.Len(t, free, 3)
	assert.NotZero(t, atOnce)
}

// TestNetwork: a fault's effect on a process's connections ends with the fault, and that of another one continues.
func TestNetwork(t *testing.T) {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { server.Close() })
	go func() {
		for {
			conn, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				conn.Close()
			}()
		}
	}()
	network := newNetwork()
	t.Cleanup(network.close)
	process, first, second := []string{"consumer-1"}, Strike{Number: 1}, Strike{Number: 2}
	routes, err := network.routes(process[0], []string{server.Addr().String()})
	require.NoError(t, err)
	echoes := func(patience time.Duration) bool {
		conn, err := net.Dial("tcp", routes[server.Addr().String()])
		require.NoError(t, err)
		defer conn.Close()
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		_, err = conn.Write([]byte("x"))
		require.NoError(t, err)
		_, err = conn.Read(make([]byte, 1))
		return err == nil
	}
	const long, short = time.Minute, 200 * time.Millisecond
	assert.True(t, echoes(long))
	require.NoError(t, network.poison(first, process, nothing("upstream")))
	require.NoError(t, network.poison(second, process, nothing("upstream")))
	assert.False(t, echoes(short))
	require.NoError(t, network.cure(first, process))
	assert.False(t, echoes(short), "the second one goes on")
	require.NoError(t, network.cure(second, process))
	assert.True(t, echoes(long))
}

// TestSchedule: the seed decides a run's faults, and all of them come before one is repeated.
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
	for _, deployment := range []string{single, container, sentinel, cluster} {
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

// TestJournal: two processes of one place write to one file; all events are read, in the order of time.
func TestJournal(t *testing.T) {
	dir := t.TempDir()
	first, err := openJournal(dir, "consumer-1", 1)
	require.NoError(t, err)
	second, err := openJournal(dir, "consumer-1", 2)
	require.NoError(t, err)
	first.write(rules.Event{Kind: rules.Started, UUID: "a"})
	second.write(rules.Event{Kind: rules.Started, UUID: "b"})
	first.write(rules.Event{Kind: rules.Acked, UUID: "a"})
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
	var events []rules.Event
	for i := range 50 {
		noise := i % 7
		events = append(events,
			rules.Event{Kind: rules.Sampled, Process: "consumer-1", Sample: &rules.Sample{Goroutines: 60 + noise, Heap: (4 + i) << 20}},
			rules.Event{Kind: rules.Sampled, Process: "runner", Sample: &rules.Sample{Connections: 30 + noise, Pending: noise * 50, Consumers: 12}})
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
