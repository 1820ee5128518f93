package browsertest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxui"
)

// envChild is the address of a server for which the test binary serves pages until it is killed.
const envChild = "BROWSERTEST_CHILD"

func child(addr string) {
	handler, err := goxui.New(goxui.Config{Client: redis.NewClient(&redis.Options{Addr: addr}), Authorize: everything})
	if err != nil {
		panic(err)
	}
	server := httptest.NewServer(handler)
	fmt.Println(server.URL + "/")
	_, _ = io.Copy(io.Discard, os.Stdin) // until the parent ends
}

// startChild starts pages in a process of their own.
func startChild(t *testing.T, addr string) (site string, kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envChild+"="+addr)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	cmd.Stderr = os.Stderr
	require.NoError(t, cmd.Start())
	kill = sync.OnceFunc(func() {
		_ = in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	return strings.TrimSpace(line), kill
}

// get returns a page, and how long it took.
func get(t *testing.T, at string) (string, time.Duration) {
	t.Helper()
	began := time.Now()
	answer, err := http.Get(at)
	require.NoError(t, err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, answer.StatusCode, "%s\n%s", at, body)
	return string(body), time.Since(began)
}

// begin starts and confirms a replay of all that match, and returns its page.
func begin(t *testing.T, site string, form url.Values) (job string, counted time.Duration, n string) {
	t.Helper()
	post := func(at string, form url.Values) *http.Response {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, at, strings.NewReader(form.Encode()))
		require.NoError(t, err)
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set("Sec-Fetch-Site", "same-origin")
		answer, err := http.DefaultClient.Do(r)
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		require.Equal(t, http.StatusOK, answer.StatusCode)
		return answer
	}
	began := time.Now()
	answer := post(site+"dead?t=orders", form)
	job = site + "job?" + answer.Request.URL.RawQuery
	var count []string
	require.Eventually(t, func() bool {
		page, _ := get(t, job)
		count = regexp.MustCompile(`name="count" value="(\d+)"`).FindStringSubmatch(page)
		return count != nil
	}, enough, 10*time.Millisecond)
	counted = time.Since(began)
	post(job, url.Values{"do": {"confirm"}, "count": {count[1]}})
	return job, counted, count[1]
}

// usedCPU returns the seconds that the server has worked.
func usedCPU(t *testing.T, client *redis.Client) (seconds float64) {
	t.Helper()
	info, err := client.Info(t.Context(), "cpu").Result()
	require.NoError(t, err)
	for _, m := range regexp.MustCompile(`used_cpu_(?:sys|user):([\d.]+)`).FindAllStringSubmatch(info, -1) {
		v, err := strconv.ParseFloat(m[1], 64)
		require.NoError(t, err)
		seconds += v
	}
	return seconds
}

// heap returns what the process holds.
func heap() float64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

// TestScale: 1,000 topics, 1,000,000 pending entries, 100,000 dead letters. Every page takes 200 ms at most, five
// viewers at most 1 % of the server; a filtered replay of 100,000 letters is killed in the middle, and after
// another one each is in the topic once. CONTRIBUTING.md has the command.
func TestScale(t *testing.T) {
	if os.Getenv("GOXSTREAMS_TEST_LONG") != "1" {
		t.Skip("only with GOXSTREAMS_TEST_LONG=1")
	}
	server := testserver.Private(t)
	client := server.Client()
	ctx := t.Context()
	pipe := client.Pipeline()
	flush := func() {
		_, err := pipe.Exec(ctx)
		require.NoError(t, err)
	}
	for i := range 1000 {
		topic := fmt.Sprintf("topic-%04d", i)
		for range 10 {
			pipe.XAdd(ctx, &redis.XAddArgs{Stream: topic, Values: []string{"payload", "x"}})
		}
		pipe.XGroupCreate(ctx, topic, "workers", "0")
		pipe.XReadGroup(ctx, &redis.XReadGroupArgs{Group: "workers", Consumer: "pod", Streams: []string{topic, ">"}, Count: 5})
	}
	flush()
	const pending, letters = 1_000_000, 100_000
	require.NoError(t, client.XGroupCreateMkStream(ctx, "big", "workers", "0").Err())
	for i := range pending / 1000 {
		for range 1000 {
			pipe.XAdd(ctx, &redis.XAddArgs{Stream: "big", Values: []string{"payload", "x"}})
		}
		pipe.XReadGroup(ctx, &redis.XReadGroupArgs{Group: "workers", Consumer: fmt.Sprint("pod-", i%100), Streams: []string{"big", ">"}, Count: 1000})
		flush()
	}
	s := &site{t: t, client: client}
	var orders []*message.Message
	for i := range letters {
		orders = append(orders, order(i))
	}
	for n := 0; n < letters; n += 10_000 {
		s.die("orders", orders[n:n+10_000]...)
	}
	require.NoError(t, client.XTrimMaxLen(ctx, "orders", 0).Err())
	var due []redis.Z
	for i := range 100_000 {
		due = append(due, redis.Z{Score: float64(time.Now().Add(time.Hour).UnixMilli() + int64(i)), Member: fmt.Sprint("delayed-", i)})
	}
	require.NoError(t, client.ZAdd(ctx, "orders.due{orders}", due...).Err())
	t.Log("filled")

	before := heap()
	pages := serve(t, client, goxui.Config{Authorize: everything, Interval: 2 * time.Second})
	first, took := get(t, pages.url)
	t.Logf("the very first page: %v", took)
	require.Contains(t, first, "topic-0000")
	letter, err := client.XRangeN(ctx, goxstreams.DeadLetterTopic("orders"), "-", "+", 1).Result()
	require.NoError(t, err)
	middle, err := client.XPending(ctx, "big", "workers").Result()
	require.NoError(t, err)
	for _, ref := range []string{
		"", "?sort=pending&page=10", "?q=999", "topic?t=big", "group?t=big&g=workers", "group?t=big&g=workers&consumer=pod-77&idle=1d",
		"group?t=big&g=workers&idle=1d", "group?t=big&g=workers&deliveries=9", "group?t=big&g=workers&after=" + middle.Higher,
		"dead?t=orders", "dead?t=orders&reason=nothing", "dead?t=orders&group=billing&kind=permanent&newer=1d", "delayed?t=orders", "message?t=big&id=" + middle.Lower,
		"message?t=orders&from=dead&id=" + letter[0].ID,
	} {
		var most time.Duration
		for range 10 {
			_, took := get(t, pages.url+ref)
			most = max(most, took)
		}
		t.Logf("%10v at most of 10: %s", most.Round(100*time.Microsecond), ref)
		assert.LessOrEqual(t, most, 200*time.Millisecond, ref)
	}

	// Five viewers, each of whom has a page that looks again whenever it should.
	watch := func(viewers int, refs ...string) float64 {
		ctx, stop := context.WithCancel(ctx)
		var all sync.WaitGroup
		for i := range viewers {
			all.Go(func() {
				ref := refs[i%len(refs)]
				r, err := http.NewRequestWithContext(ctx, http.MethodGet, pages.url+"events", nil)
				if !assert.NoError(t, err) {
					return
				}
				answer, err := http.DefaultClient.Do(r)
				if !assert.NoError(t, err) {
					return
				}
				defer answer.Body.Close()
				for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
					if lines.Text() == "data: look" {
						get(t, pages.url+ref)
					}
				}
			})
		}
		const window = 30 * time.Second
		timer := time.NewTimer(5 * time.Second) // all are there
		<-timer.C
		used, began := usedCPU(t, client), time.Now()
		timer.Reset(window)
		<-timer.C
		share := 100 * (usedCPU(t, client) - used) / time.Since(began).Seconds()
		stop()
		all.Wait()
		return share
	}
	idle := watch(0)
	one, five := watch(1, ""), watch(5, "", "topic?t=big", "group?t=big&g=workers", "", "group?t=topic-0001&g=workers")
	t.Logf("the server works %.2f %% of the time without viewers, %.2f %% with one, %.2f %% with five", idle, one, five)
	assert.LessOrEqual(t, five-idle, 1.0)
	t.Logf("the pages hold %.1f MB", heap()-before)

	// The replay.
	const filter = "permanent"
	form := url.Values{"do": {"replay"}, "which": {"all"}, "kind": {filter}, "group": {"billing"}}
	child, kill := startChild(t, server.Addr())
	_, _ = get(t, child)
	began := time.Now()
	_, counted, n := begin(t, child, form)
	require.Equal(t, strconv.Itoa(letters), n)
	require.Eventually(t, func() bool { return s.letters() < letters/2 }, enough, 5*time.Millisecond)
	half := time.Since(began)
	kill()
	left := s.letters()
	t.Logf("counting took %v; killed after %v with %d letters left", counted, half, left)
	require.Positive(t, left)
	s.exactlyOnce(letters)
	again, _ := startChild(t, server.Addr())
	_, _ = get(t, again)
	began = time.Now()
	job, _, n := begin(t, again, form)
	require.Equal(t, strconv.FormatInt(left, 10), n)
	require.Eventually(t, func() bool { page, _ := get(t, job); return strings.Contains(page, "Replayed ") }, enough, 5*time.Millisecond)
	rest := time.Since(began)
	t.Logf("the rest took %v: %v together for %d", rest, half+rest, letters)
	assert.LessOrEqual(t, half+rest, 30*time.Second)
	s.exactlyOnce(letters)
	assert.Zero(t, s.letters())
}

// exactlyOnce fails the test unless each message is in one of the two streams, once.
func (s *site) exactlyOnce(n int) {
	s.t.Helper()
	seen := make(map[string]int, n)
	for _, stream := range []string{"orders", goxstreams.DeadLetterTopic("orders")} {
		for start := "-"; ; {
			entries, err := s.client.XRangeN(s.t.Context(), stream, start, "+", 1000).Result()
			require.NoError(s.t, err)
			for _, e := range entries {
				uuid, _ := e.Values["_watermill_message_uuid"].(string)
				seen[uuid]++
				start = "(" + e.ID
			}
			if len(entries) < 1000 {
				break
			}
		}
	}
	assert.Len(s.t, seen, n)
	for uuid, times := range seen {
		if times != 1 {
			assert.Failf(s.t, "not once", "%s is there %d times", uuid, times)
			return
		}
	}
}
