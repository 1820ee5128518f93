package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Tests assert that there are results, never that anything is fast.

var testTarget target // REDIS_ADDR, else a server of our own

func TestMain(m *testing.M) { os.Exit(withServer(m)) }

func withServer(m *testing.M) int {
	testTarget = target{binary: "redis-server", addr: os.Getenv("REDIS_ADDR")}
	if testTarget.addr == "" {
		s, err := startServer(testTarget.binary)
		if err != nil {
			panic(err)
		}
		defer s.stop()
		testTarget.addr = s.addr
	}
	return m.Run()
}

// smallest is the scale of tests: with it e.count returns 20.
const smallest = 0.0001

func testEnv(t testing.TB, size float64) *env {
	e, err := newEnv(testTarget.addr, size)
	require.NoError(t, err)
	t.Cleanup(e.close)
	return e
}

func TestEveryScenarioWithEverySystem(t *testing.T) {
	var out bytes.Buffer
	file := filepath.Join(t.TempDir(), "results.json")
	profiles := t.TempDir()
	require.NoError(t, command([]string{"-addr", testTarget.addr, "-size", "0.0001", "-rounds", "1", "-json", file, "-profile", profiles}, &out))

	text, err := os.ReadFile(file)
	require.NoError(t, err)
	var r results
	require.NoError(t, json.Unmarshal(text, &r))
	assert.NotEmpty(t, r.Machine.Redis)
	assert.NotEmpty(t, r.Machine.Go)
	for _, s := range scenarios {
		for system := range s.systems {
			i := slices.IndexFunc(r.Measurements, func(m measurement) bool {
				return m.Round == 1 && m.Scenario == s.name && m.System == system
			})
			require.GreaterOrEqual(t, i, 0, "%s, %s", s.name, system)
			for _, c := range s.group.columns {
				assert.Contains(t, r.Measurements[i].Metrics, c, "%s, %s", s.name, system)
			}
			if slices.Contains(s.group.columns, rate) {
				assert.Positive(t, r.Measurements[i].Metrics[rate])
			}
			assert.Contains(t, out.String(), "| "+s.name+" | "+system+" |")
		}
	}
	for line := range strings.Lines(out.String()) {
		if strings.HasPrefix(line, "|") {
			assert.True(t, strings.HasSuffix(line, "|\n"), line)
		}
	}
	for _, kind := range []string{"cpu", "allocs", "allocs.before", "mutex", "block"} {
		assert.FileExists(t, filepath.Join(profiles, "subscribe-mc-1.ours."+kind))
	}
}

func TestNothingIsLeftInRedis(t *testing.T) {
	e := testEnv(t, smallest)
	_, err := e.run(scenarios[0], "ours", 10)
	require.NoError(t, err)
	keys, err := e.admin.Keys(t.Context(), "bench:*").Result()
	require.NoError(t, err)
	assert.Empty(t, keys)
}

// A measurement that lost or repeated a message must not pass for a result.
func TestTally(t *testing.T) {
	all := newTally(2, 1)
	for _, p := range payloads(0, 2, payloadSize) {
		all.got(p)
	}
	require.NoError(t, all.wait())
	require.NoError(t, all.check())

	twice := newTally(2, 1)
	twice.got(payloads(0, 1, payloadSize)[0])
	twice.got(payloads(0, 1, payloadSize)[0])
	require.NoError(t, twice.wait())
	require.ErrorContains(t, twice.check(), "message 0 arrived 2 times")

	foreign := newTally(1, 1)
	foreign.got(payloads(0, 1, payloadSize)[0])
	foreign.got([]byte("x"))
	require.ErrorContains(t, foreign.check(), "nobody sent")
}

func TestRatioIsWithinARound(t *testing.T) {
	r := &results{}
	s := scenarios[0]
	for round, v := range [][2]float64{{9, 1}, {10, 5}, {100, 10}, {30, 10}} {
		r.Measurements = append(r.Measurements,
			measurement{s.name, "ours", round, metrics{rate: v[0]}}, measurement{s.name, "raw", round, metrics{rate: v[1]}})
	}
	assert.InDelta(t, 3, r.ratio(s, "raw"), 1e-9) // the median of 2, 10 and 3; the warm-up does not count
	assert.Equal(t, "-", format(r.ratio(s, "ours")))
}

func TestFormat(t *testing.T) {
	for want, x := range map[string]float64{"0": 0, "0.0230": 0.02304, "1.05": 1.0467, "15.8": 15.83, "123": 123.4, "15,800": 15_834, "1,230,000": 1_234_567} {
		assert.Equal(t, want, format(x))
	}
}

func TestErrorsNameTheFlag(t *testing.T) {
	for flag, args := range map[string][]string{
		"-redis":   {"-redis", "no-such-server"},
		"-addr":    {"-addr", "127.0.0.1:1"},
		"-systems": {"-systems", "theirs"},
		"-run":     {"-run", "no such scenario"},
		"-rounds":  {"-rounds", "0"},
		"command":  {"nonsense"},
	} {
		require.ErrorContains(t, command(args, io.Discard), flag)
	}
}

func TestServerEnds(t *testing.T) {
	s, err := startServer("redis-server")
	require.NoError(t, err)
	require.Error(t, awaitServer(s.addr, "elsewhere"))
	began := time.Now()
	s.stop()
	assert.Less(t, time.Since(began), 10*time.Second)
	assert.NoDirExists(t, s.dir)
	_, err = newEnv(s.addr, 1)
	require.Error(t, err)
}
