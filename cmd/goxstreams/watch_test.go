package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// backlog makes a topic with a group "a" that has not read 3 entries and not acked 2, which are two hours
// old, a group "b" that has read all, and a dead letter.
func backlog(t *testing.T, client redis.UniversalClient, topic string) {
	t.Helper()
	old := time.Now().Add(-2 * time.Hour).UnixMilli()
	for i := range 5 {
		id := redis.XAddArgs{Stream: topic, ID: idOf(old + int64(i)), Values: []string{"body", "b"}}
		require.NoError(t, client.XAdd(t.Context(), &id).Err())
	}
	for group, n := range map[string]int64{"a": 2, "b": 5} {
		require.NoError(t, client.XGroupCreate(t.Context(), topic, group, "0").Err())
		read := &redis.XReadGroupArgs{Group: group, Consumer: "c", Streams: []string{topic, ">"}, Count: n}
		entries, err := client.XReadGroup(t.Context(), read).Result()
		require.NoError(t, err)
		if group == "b" {
			for _, e := range entries[0].Messages {
				require.NoError(t, client.XAck(t.Context(), topic, group, e.ID).Err())
			}
		}
	}
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: goxstreams.DeadLetterTopic(topic), Values: []string{"x", "y"}}).Err())
}

func idOf(ms int64) string { return entryID{ms: uint64(ms)}.String() }

func TestCheck(t *testing.T) {
	testserver.RequireReal(t) // the embedded server has no lag
	client, topic := testserver.Client(t), topic(t)
	backlog(t, client, topic)
	ok, warning, critical, unknown := int(statusOK), int(statusWarning), int(statusCritical), int(statusUnknown)
	for _, tt := range []struct {
		code int
		args string
		want string
	}{
		{ok, "T --max-lag 3,10", `^GOXSTREAMS OK - T: a lag 3, b lag 0 \| 'lag_a'=3;3;10;0 'lag_b'=0;3;10;0\n$`},
		{warning, "T --max-lag 2,10", `^GOXSTREAMS WARNING - T: a lag 3 \(WARNING is more than 2\) \| 'lag_a'=3;2;10;0 `},
		{critical, "T --max-lag 1,2", `^GOXSTREAMS CRITICAL - T: a lag 3 \(CRITICAL is more than 2\) \|`},
		{critical, "T --max-lag 2", `a lag 3 \(CRITICAL is more than 2\) \| 'lag_a'=3;;2;0`},
		{warning, "T --max-lag 2,", `a lag 3 \(WARNING is more than 2\) \| 'lag_a'=3;2;;0`},
		{ok, "T b --max-lag 0,0 --max-oldest 0s,0s", `^GOXSTREAMS OK - T: b lag 0, b oldest 0s \| 'lag_b'=0;0;0;0 'oldest_b'=0s;0;0;0\n$`},
		{warning, "T a --max-oldest 1h,3h", `^GOXSTREAMS WARNING - T: a oldest 2h \(WARNING is more than 1h\) \| 'oldest_a'=72\d\d(\.\d+)?s;3600;10800;0\n$`},
		{critical, "T --max-dead 0", `^GOXSTREAMS CRITICAL - T: dead 1 \(CRITICAL is more than 0\) \| 'dead'=1;;0;0\n$`},
		{ok, "T --max-dead 0 --stream T-other", `^GOXSTREAMS OK - T: dead 0 \|`},
		{critical, "T --max-lag 1,2 --max-dead 0, --max-oldest 1h,", `a lag 3 .*, a oldest 2h .*, dead 1 \(WARNING`},
		{unknown, "T none --max-lag 1", `^GOXSTREAMS UNKNOWN - T: it does not have group "none"\n$`},
		{unknown, "T-none --max-dead 1", `^GOXSTREAMS UNKNOWN - T-none: there is no such stream`},
		// Wrong arguments must not look like CRITICAL.
		{unknown, "", `^GOXSTREAMS UNKNOWN - accepts between 1 and 2`},
		{unknown, "T", `^GOXSTREAMS UNKNOWN - which: --max-lag`},
		{unknown, "T --bogus", `^GOXSTREAMS UNKNOWN - unknown flag: --bogus\n$`},
		{unknown, "T --max-lag 3,2", `"--max-lag" flag: WARNING is more than CRITICAL`},
		{unknown, "T --max-lag ,", `both thresholds are empty`},
		{unknown, "T --max-lag -1", `"-1" is not a number of 0 or more`},
		{unknown, "T --max-dead x,1", `"x" is not a number of 0 or more`},
		{unknown, "T --max-oldest 5", `"5" is no age such as 90s`},
		{unknown, "T --max-lag 1 --timeout 0s", `--timeout must be more than 0`},
		{unknown, "T --max-lag 1 -o bogus", `--output: "bogus" is none of`},
		{unknown, "T --max-lag 1 --json", `no --output`},
		{critical, "T --max-lag 1 --url redis://127.0.0.1:1", `^GOXSTREAMS CRITICAL - Redis does not answer: dial`},
		{unknown, "T --max-lag 1 --url bogus", `^GOXSTREAMS UNKNOWN - the URL`},
	} {
		args := strings.Fields("check " + strings.ReplaceAll(tt.args, "T", topic))
		out, notes := ran(t, tt.code, args...)
		assert.Regexp(t, strings.ReplaceAll(tt.want, "T:", topic+":"), strings.ReplaceAll(out, topic+"-none", "T-none"), "%v", args)
		assert.Equal(t, 1, strings.Count(out, "\n"), out)
		assert.Empty(t, notes)
	}

	// What Redis does not know is not 0, and does not hide what is known.
	require.NoError(t, client.XDel(t.Context(), topic, stored(t, client, topic)[3].ID).Err())
	out, _ := ran(t, unknown, "check", topic, "a", "--max-lag", "100")
	assert.Equal(t, "GOXSTREAMS UNKNOWN - "+topic+": a lag is not known | 'lag_a'=U\n", out)
	ran(t, critical, "check", topic, "a", "--max-lag", "100", "--max-oldest", "1h")

	// Names cannot pretend to be performance data.
	evil := topic + "|'x'=1"
	require.NoError(t, client.XGroupCreateMkStream(t.Context(), evil, "g|'=", "0").Err())
	out, _ = ran(t, ok, "check", evil, "--max-lag", "1")
	assert.Equal(t, 1, strings.Count(out, "|"), out)
	assert.Contains(t, out, `| 'lag_g\x7c\x27\x3d'=0;;1;0`)
}

// silent is a server that accepts connections and never answers.
func silent(t *testing.T) (addr string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var accepted sync.WaitGroup
	accepted.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			accepted.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(io.Discard, conn)
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		accepted.Wait() // until the clients have gone
	})
	return listener.Addr().String()
}

func TestCheckOfASilentServer(t *testing.T) {
	c := &command{url: "redis://" + silent(t) + "?read_timeout=2s&max_retries=-1"}
	began := time.Now()
	code := c.run("check", "orders", "--max-lag", "1", "--timeout", "100ms")
	assert.Equal(t, int(statusCritical), code)
	assert.Equal(t, "GOXSTREAMS CRITICAL - Redis does not answer: no answer within 100ms\n", c.out.String())
	assert.Less(t, time.Since(began), 2*time.Second, "it does not wait for the client")
}

// scrape returns the series of /metrics, without comments.
func scrape(t *testing.T, url string) map[string]string {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	response, err := http.DefaultClient.Do(request)
	require.NoError(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, response.StatusCode, string(body))
	series := make(map[string]string)
	for line := range strings.Lines(string(body)) {
		if line = strings.TrimSpace(line); !strings.HasPrefix(line, "#") {
			i := strings.LastIndex(line, " ")
			series[strings.TrimPrefix(line[:i], "goxstreams_")] = line[i+1:]
		}
	}
	return series
}

var servingAt = regexp.MustCompile(`Serving (http://\S+)/metrics`)

// startExporter runs the exporter until the test stops it, and returns its address.
func startExporter(t *testing.T, client redis.UniversalClient, args ...string) (url string, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	var out, notes syncBuffer
	ended := make(chan int, 1)
	go func() {
		ended <- runWith(ctx, client, append([]string{"exporter", "--listen", "127.0.0.1:0"}, args...), streams{out: &out, err: &notes})
	}()
	await(t, func() bool { return servingAt.MatchString(notes.String()) })
	stop = func() int {
		cancel()
		select {
		case code := <-ended:
			return code
		case <-time.After(30 * time.Second):
			t.Fatal("it does not end: " + notes.String())
			return 0
		}
	}
	return servingAt.FindStringSubmatch(notes.String())[1], stop
}

func TestExporter(t *testing.T) {
	testserver.RequireReal(t) // the embedded server has no lag
	client, topic := testserver.Client(t), topic(t)
	backlog(t, client, topic)
	require.NoError(t, goxstreams.Pause(t.Context(), client, topic, "b"))
	_, err := goxstreams.Trim(t.Context(), client, topic, goxstreams.Retention{HardMaxLen: 4}) // which only b has acked
	require.NoError(t, err)
	missing := topic + "!"
	overdueIn(t, client, topic, 2*time.Hour)
	url, stop := startExporter(t, redis.NewClient(&redis.Options{Addr: testserver.Addr(t)}), missing, "--pattern", topic, "--timeout", "30s", "--discover", "50ms")
	await(t, func() bool { return scrape(t, url+"/metrics")["exporter_topics"] == "2" })
	got := scrape(t, url+"/metrics")
	oldest := `group_oldest_pending_age_seconds{group="a",topic="` + topic + `"}`
	assert.Regexp(t, `^72\d\d`, got[oldest])
	overdue := `topic_delayed_overdue_seconds{topic="` + topic + `"}`
	assert.Regexp(t, `^72\d\d`, got[overdue])
	delete(got, overdue)
	assert.Contains(t, got, "exporter_discovery_age_seconds")
	delete(got, oldest)
	delete(got, "exporter_discovery_age_seconds")
	want := map[string]string{
		"exporter_redis_up": "1", "exporter_topics": "2",
		`topic_entries{topic="T"}`: "4", `topic_entries{topic="T!"}`: "0",
		`topic_dead_letters{dead_letter_topic="T.dead{T}",topic="T"}`: "1", `topic_dead_letters{dead_letter_topic="T!.dead{T!}",topic="T!"}`: "0",
		`topic_delayed_messages{topic="T"}`:  "2",
		`topic_delayed_messages{topic="T!"}`: "0", `topic_delayed_overdue_seconds{topic="T!"}`: "0",
		`group_stats_success{group="a",topic="T"}`: "1", `group_stats_success{group="b",topic="T"}`: "1",
		`group_lag{group="a",topic="T"}`: "3", `group_lag{group="b",topic="T"}`: "0",
		`group_pending_entries{group="a",topic="T"}`: "2", `group_pending_entries{group="b",topic="T"}`: "0",
		`group_consumers{group="a",topic="T"}`: "1", `group_consumers{group="b",topic="T"}`: "1",
		`group_paused{group="a",topic="T"}`: "0", `group_paused{group="b",topic="T"}`: "1",
		`group_cut_off_entries{group="a",topic="T"}`: "1", `group_cut_off_entries{group="b",topic="T"}`: "0",
		`group_oldest_pending_age_seconds{group="b",topic="T"}`: "0",
	}
	for name, v := range got {
		short := strings.ReplaceAll(name, topic, "T")
		assert.Equal(t, want[short], v, name)
		delete(want, short)
	}
	assert.Empty(t, want)

	// What Redis does not know is absent. A group that is gone is gone.
	require.NoError(t, client.XDel(t.Context(), topic, stored(t, client, topic)[3].ID).Err())
	require.NoError(t, client.XGroupDestroy(t.Context(), topic, "b").Err())
	got = scrape(t, url+"/metrics")
	assert.NotContains(t, got, `group_lag{group="a",topic="`+topic+`"}`)
	assert.NotContains(t, got, `group_stats_success{group="b",topic="`+topic+`"}`)

	for path, want := range map[string]int{"/healthz": 200, "/": 200, "/other": 404} {
		response, err := http.Get(url + path)
		require.NoError(t, err)
		require.NoError(t, response.Body.Close())
		assert.Equal(t, want, response.StatusCode, path)
	}
	assert.Zero(t, stop(), "SIGTERM is no failure")
	_, err = net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	assert.Error(t, err)
}

// gate is a hook that holds up, or refuses, what is sent while it is closed.
type gate struct {
	mu    sync.Mutex
	err   error
	hang  chan struct{}
	asked int
}

func (g *gate) set(err error, hang chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.err, g.hang, g.asked = err, hang, 0
}

func (g *gate) DialHook(next redis.DialHook) redis.DialHook { return next }

func (g *gate) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (g *gate) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		g.mu.Lock()
		err, hang := g.err, g.hang
		g.asked++
		g.mu.Unlock()
		if hang != nil {
			<-hang // heeds no context, like go-redis
		}
		if err != nil {
			for _, cmd := range cmds {
				cmd.SetErr(err)
			}
			return err
		}
		return next(ctx, cmds)
	}
}

// A Redis that fails or hangs is visible, holds up no scrape for longer than its bound, and is not asked by
// more and more of them.
func TestExporterWithoutRedis(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	backlog(t, client, topic)
	g := &gate{}
	watched := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), MaxRetries: -1})
	watched.AddHook(g)
	url, stop := startExporter(t, watched, topic, "--timeout", "200ms")
	success := `group_stats_success{group="a",topic="` + topic + `"}`
	await(t, func() bool { return scrape(t, url+"/metrics")[success] == "1" })

	g.set(errors.New("connection refused"), nil)
	got := scrape(t, url+"/metrics")
	assert.Equal(t, map[string]string{
		"exporter_redis_up": "0", "exporter_topics": "1", success: "0", `group_stats_success{group="b",topic="` + topic + `"}`: "0",
	}, got)

	hang := make(chan struct{})
	g.set(nil, hang)
	for range 3 {
		began := time.Now()
		got = scrape(t, url+"/metrics")
		assert.Equal(t, "0", got["exporter_redis_up"])
		assert.Equal(t, "0", got[success])
		assert.Less(t, time.Since(began), 20*time.Second)
	}
	g.mu.Lock()
	assert.Equal(t, 1, g.asked)
	g.mu.Unlock()
	g.set(nil, nil)
	close(hang)
	await(t, func() bool { return scrape(t, url+"/metrics")[success] == "1" })
	assert.Zero(t, stop())
}

func TestExporterArguments(t *testing.T) {
	for want, args := range map[string][]string{
		"which topics":                    {"exporter"},
		"is empty":                        {"exporter", "--pattern", ""},
		"--timeout must be more than 0":   {"exporter", "a", "--timeout", "0s"},
		"--discover must be more than 0s": {"exporter", "a", "--discover", "-1s"},
	} {
		_, notes := ran(t, exitUsage, args...)
		assert.Contains(t, notes, strings.TrimSuffix(want, "s"))
	}
	_, notes := ran(t, exitFailed, "exporter", "a", "--listen", "127.0.0.1:bogus")
	assert.Contains(t, notes, "--listen: ")
}

// The names follow Prometheus's rules.
func TestExporterNames(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	backlog(t, client, topic)
	e := &exporter{client: client, topics: []string{topic, "a\xff"}, timeout: 30 * time.Second, groups: map[string][]string{}}
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(e))
	problems, err := testutil.GatherAndLint(registry)
	require.NoError(t, err)
	assert.Empty(t, problems)
}

func TestTop(t *testing.T) {
	testserver.RequireReal(t) // the embedded server has no lag
	client, topic := testserver.Client(t), topic(t)
	backlog(t, client, topic)
	require.NoError(t, goxstreams.Pause(t.Context(), client, topic, "b"))
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic + "-lone", Values: []string{"x", "y"}}).Err())

	out, _ := ran(t, 0, "top", topic+"*", "--count", "1")
	rows := strings.Split(strings.TrimSpace(out), "\n")
	require.Len(t, rows, 5, out)
	assert.Regexp(t, `^\d{4}-\d\d-\d\dT\S+Z  topics: 2$`, rows[0])
	assert.Regexp(t, `^TOPIC +GROUP +LENGTH +IN/S +LAG +OUT/S +PENDING +OLDEST +CONSUMERS +PAUSED +DEAD +DELAYED +OVERDUE$`, rows[1])
	assert.Regexp(t, ` a +5 +- +3 +- +2 +2h +1 +no +1 +0 +-$`, rows[2])
	assert.Regexp(t, ` b +5 +- +0 +- +0 +- +1 +yes +1 +0 +-$`, rows[3])
	assert.Regexp(t, `-lone +- +1 +- +- +- +- +- +- +- +0 +0 +-$`, rows[4])

	// Rates are known from the second look on.
	c := onTest(t)
	var cancel context.CancelFunc
	c.ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int, 1)
	go func() { code <- c.run("top", topic, "--json", "--interval", "100ms", "--sort", "pending") }()
	looks := func() []map[string]any {
		all := c.out.String()
		return lines(t, all[:strings.LastIndex(all, "\n")+1])
	}
	await(t, func() bool { return len(looks()) >= 4 })
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"body", "b"}}).Err())
	read := &redis.XReadGroupArgs{Group: "b", Consumer: "c", Streams: []string{topic, ">"}}
	require.NoError(t, client.XReadGroup(t.Context(), read).Err())
	rate := func(name string) func() bool {
		return func() bool {
			for _, row := range looks() {
				if v, _ := row[name].(float64); v > 0 && v < 11 && row["group"] == "b" {
					return true
				}
			}
			return false
		}
	}
	await(t, rate("in_per_second"))
	await(t, rate("out_per_second"))
	cancel()
	assert.Equal(t, 0, <-code)
	assert.Equal(t, []string{"a", "b"}, column(looks()[:2], "group"))
	assert.Equal(t, []string{"<nil>", "<nil>"}, column(looks()[:2], "in_per_second"))

	for _, args := range [][]string{{"top", "--interval", "1ms"}, {"top", "--count", "-1"}, {"top", "--sort", "bogus"}, {"top", "a", "b"}} {
		ran(t, exitUsage, args...)
	}
	ran(t, exitFailed, "top", "--url", "redis://127.0.0.1:1")
}

// On a terminal each look is painted over the last one, and what is too long or too wide is left out.
func TestTopOnATerminal(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	for _, group := range []string{"a", "b", "c", "d\x1b[2J"} {
		require.NoError(t, client.XGroupCreateMkStream(t.Context(), topic, group, "0").Err())
	}
	c := onTest(t)
	code := run(t.Context(), []string{"--url", c.url, "top", topic, "--count", "2", "--interval", "100ms", "--sort", "topic"},
		streams{out: &c.out, err: &c.err, size: func() (int, int) { return 30, 5 }})
	require.Zero(t, code, c.err.String())
	painted := strings.Split(c.out.String(), "\x1b[H")
	require.Len(t, painted, 3)
	assert.Equal(t, "\x1b[2J", painted[0])
	for _, p := range painted[1:] {
		text, ok := strings.CutSuffix(p, "\x1b[J")
		require.True(t, ok)
		rows := strings.Split(strings.TrimSuffix(text, "\x1b[K\n"), "\x1b[K\n")
		assert.Len(t, rows, 4)
		for _, row := range rows {
			assert.LessOrEqual(t, len(row), 30)
			assert.NotContains(t, row, "\x1b")
		}
	}
}

// An outage in the middle ends nothing.
func TestTopThroughAnOutage(t *testing.T) {
	client, topic := testserver.Client(t), topic(t)
	require.NoError(t, client.XGroupCreateMkStream(t.Context(), topic, "a", "0").Err())
	g := &gate{}
	watched := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), MaxRetries: -1})
	watched.AddHook(g)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out, notes syncBuffer
	code := make(chan int, 1)
	go func() {
		code <- runWith(ctx, watched, []string{"top", topic, "--interval", "100ms", "--json"}, streams{out: &out, err: &notes})
	}()
	await(t, func() bool { return out.String() != "" })
	g.set(errors.New("connection refused"), nil)
	await(t, func() bool { return strings.Contains(notes.String(), "Redis does not answer: connection refused") })
	seen := len(out.String())
	g.set(nil, nil)
	await(t, func() bool { return len(out.String()) > seen })
	cancel()
	assert.Zero(t, <-code)
}

// README.md explains every metric of the exporter, and what it has in common with goxprom has goxprom's name.
func TestExporterIsDocumented(t *testing.T) {
	name := regexp.MustCompile(`fqName: "(goxstreams_\w+)"`)
	ours, err := os.ReadFile("README.md")
	require.NoError(t, err)
	table, err := os.ReadFile("../../plugin/goxprom/internal/statswatch/metrics.go")
	require.NoError(t, err)
	for _, d := range descs {
		metric := name.FindStringSubmatch(d.String())[1]
		assert.Contains(t, string(ours), "`"+metric+"`")
		if kind, suffix, _ := strings.Cut(strings.TrimPrefix(metric, "goxstreams_"), "_"); kind != "exporter" {
			assert.Contains(t, string(table), kind+"."+strings.TrimSuffix(suffix, "_seconds")+`"`)
		}
	}
}
