package testserver

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// envOrphan makes the test binary a child that starts a private server, prints its address and waits to be killed.
const envOrphan = "TESTSERVER_ORPHAN"

func TestMain(m *testing.M) {
	if kind := os.Getenv(envOrphan); kind != "" {
		srv, err := backends[kind](nil)
		if err != nil {
			panic(err)
		}
		os.Stdout.WriteString(srv.Addr() + "\n")
		select {}
	}
	Main(m)
}

// backends starts a server of each kind that tests can have for themselves.
var backends = map[string]func(args []string) (*Server, error){
	"container": func(args []string) (*Server, error) {
		return choose(func(string, ...any) {}, privateOptions(realStarters, args...)[:1])
	},
	"process": func(args []string) (*Server, error) { return startProcess(args...) },
}

func TestChoiceOrder(t *testing.T) {
	const addr, image = "192.0.2.1:6379", "example/redis:1"
	tests := map[string]struct {
		env     map[string]string
		failing []string
		tried   []string // the last one is chosen, unless it fails
	}{
		"address first":              {env: map[string]string{envAddr: addr}, tried: []string{"external"}},
		"container next":             {tried: []string{"container"}},
		"process next":               {failing: []string{"container"}, tried: []string{"container", "process"}},
		"embedded last":              {failing: []string{"container", "process"}, tried: []string{"container", "process", "embedded"}},
		"address falls":              {env: map[string]string{envAddr: addr}, failing: []string{"external"}, tried: []string{"external", "container"}},
		"image falls":                {env: map[string]string{envImage: image}, failing: []string{"container"}, tried: []string{"container", "process"}},
		"real falls":                 {env: map[string]string{envReal: "1"}, failing: []string{"container"}, tried: []string{"container", "process"}},
		"real has no embedded":       {env: map[string]string{envReal: "1"}, failing: []string{"container", "process"}, tried: []string{"container", "process"}},
		"real address does not fall": {env: map[string]string{envReal: "1", envAddr: addr, envImage: image}, failing: []string{"external"}, tried: []string{"external"}},
		"real image does not fall":   {env: map[string]string{envReal: "1", envImage: image}, failing: []string{"container"}, tried: []string{"container"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			for _, name := range []string{envAddr, envImage, envReal} {
				t.Setenv(name, tt.env[name])
			}
			var tried []string
			try := func(kind string) (*Server, error) {
				tried = append(tried, kind)
				for _, f := range tt.failing {
					if f == kind {
						return nil, errors.New("no " + kind)
					}
				}
				return &Server{addr: kind}, nil
			}
			var log strings.Builder
			srv, err := choose(func(format string, args ...any) { log.WriteString(format) }, sharedOptions(starters{
				external:  func(a string) (*Server, error) { assert.Equal(t, addr, a); return try("external") },
				container: func(i string, _ ...string) (*Server, error) { return try("container") },
				process:   func(...string) (*Server, error) { return try("process") },
				embedded:  func() (*Server, error) { return try("embedded") },
			}))
			assert.Equal(t, tt.tried, tried)
			assert.NotEmpty(t, log.String())
			if last := tried[len(tried)-1]; err == nil {
				assert.Equal(t, last, srv.Addr())
			} else {
				assert.Contains(t, tt.failing, last)
				assert.Nil(t, srv)
			}
		})
	}
}

func TestPrivateIsNeverTheAddressOfTheEnvironment(t *testing.T) {
	t.Setenv(envAddr, "192.0.2.1:6379")
	t.Setenv(envReal, "")
	for _, o := range privateOptions(realStarters) {
		assert.NotContains(t, o.name, "192.0.2.1")
	}
}

func TestWithoutARealServer(t *testing.T) {
	none := starters{
		container: func(string, ...string) (*Server, error) { return nil, errors.New("no Docker") },
		process:   func(...string) (*Server, error) { return nil, errors.New("no redis-server") },
	}
	t.Setenv(envImage, "")
	before := len(skipped.names)
	for real, want := range map[string]string{"": "skip", "1": "fatal"} {
		t.Setenv(envReal, real)

		r := &recorder{TB: t}
		r.run(func() { private(r, none) })
		assert.Equal(t, want, r.outcome)
		assert.Contains(t, r.message, "no Docker")
		assert.Contains(t, r.message, "no redis-server")

		r = &recorder{TB: t}
		r.run(func() { requireReal(r, &Server{embedded: true}) })
		assert.Equal(t, want, r.outcome)

		r = &recorder{TB: t}
		r.run(func() { clusterFor(r, &lazyCluster{starters: none}) })
		assert.Equal(t, want, r.outcome)
		assert.Contains(t, r.message, "no Docker")
		assert.Contains(t, r.message, "no redis-server")
	}
	assert.Len(t, skipped.names[before:], 3)
	skipped.names = skipped.names[:before] // these skips of fake tests do not count
}

// A recorder is a test that ends when it is skipped or fails, like a real one.
type recorder struct {
	testing.TB
	outcome, message string
}

func (r *recorder) Fatalf(format string, args ...any) { r.end("fatal", format, args) }
func (r *recorder) Skipf(format string, args ...any)  { r.end("skip", format, args) }
func (r *recorder) end(outcome, format string, args []any) {
	r.outcome, r.message = outcome, fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func (r *recorder) run(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
}

func TestSharedServerAnswers(t *testing.T) {
	client := Client(t)
	require.NoError(t, client.Ping(t.Context()).Err())
	assert.Equal(t, Addr(t), client.Options().Addr)
	t.Logf("shared server: %s", shared.srv)
}

func TestEmbedded(t *testing.T) {
	srv, err := startEmbedded()
	require.NoError(t, err)
	require.NoError(t, ping(srv.Addr()))
	require.NoError(t, srv.close())
	require.Error(t, ping(srv.Addr()))
}

func TestPrivateLife(t *testing.T) {
	for kind := range backends {
		t.Run(kind, func(t *testing.T) {
			srv := mustStart(t, kind, "--appendonly", "yes", "--appendfsync", "always")
			addr, client := srv.Addr(), srv.Client()
			require.NoError(t, client.Set(t.Context(), "k", "v", 0).Err())

			began := time.Now()
			srv.Restart()
			t.Logf("restarted in %s", time.Since(began))
			eventually(t, client, "v")

			run := runID(addr)
			command := srv.RestartCommand()
			if _, err := exec.LookPath(command[0]); err == nil {
				out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
				require.NoError(t, err, string(out))
				poll(t, "the restart", func() bool { id := runID(addr); return id != "" && id != run })
				eventually(t, client, "v")
			}

			srv.Freeze()
			require.ErrorIs(t, ping(addr), os.ErrDeadlineExceeded)
			srv.Thaw()
			eventually(t, client, "v")

			srv.Kill()
			require.Error(t, ping(addr))
			srv.Restart()
			eventually(t, client, "v")

			srv.Freeze() // a server left frozen is closed nevertheless
			require.NoError(t, srv.close())
			require.Error(t, ping(addr))
		})
	}
}

// A server that does not start reports why, without a long wait.
func TestStartFails(t *testing.T) {
	for kind, start := range backends {
		t.Run(kind, func(t *testing.T) {
			mustStart(t, kind)
			srv, err := start([]string{"--no-such-option", "x"})
			require.Nil(t, srv)
			require.ErrorContains(t, err, "no-such-option")
			assert.NotContains(t, err.Error(), "no answer")
		})
	}
}

func TestProcessNoticesThatItsPortIsTaken(t *testing.T) {
	srv := mustStart(t, "process")
	p := srv.backend.(*process)
	second := &process{binary: p.binary, args: p.args, dir: t.TempDir(), addr: p.addr, revoke: func() {}}
	_, err := second.start()
	require.Error(t, err)
	require.NoError(t, second.close())
	_, err = await(srv.Addr(), startTimeout, nil)
	require.NoError(t, err)
}

func TestImageThatCannotBePulled(t *testing.T) {
	if _, err := connectDocker(); err != nil {
		t.Skip(err)
	}
	began := time.Now()
	_, err := startContainer("registry.invalid/goxstreams/none:1")
	require.Error(t, err)
	assert.Less(t, time.Since(began), 3*dockerTimeout, "testcontainers-go would try for a quarter of an hour")
	_, again := startContainer("registry.invalid/goxstreams/none:1")
	assert.ErrorIs(t, again, err, "it is tried again")
}

// A test binary that is killed runs no cleanup, and still leaves no server behind.
func TestKilledBinaryLeavesNoServer(t *testing.T) {
	for kind := range backends {
		t.Run(kind, func(t *testing.T) {
			mustStart(t, kind)
			child := exec.Command(os.Args[0])
			child.Env = append(os.Environ(), envOrphan+"="+kind)
			child.Stderr = os.Stderr
			out, err := child.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, child.Start())
			line, readErr := bufio.NewReader(out).ReadString('\n')
			addr := strings.TrimSpace(line)
			if readErr == nil {
				_, readErr = await(addr, startTimeout, nil)
			}
			require.NoError(t, child.Process.Kill())
			_ = child.Wait()
			require.NoError(t, readErr)

			poll(t, "the server's end", func() bool { return ping(addr) != nil })
		})
	}
}

// mustStart starts a server of that kind, or skips if that kind is not available:
// one kind is enough for a real server. Only an image that was requested must be
// available.
func mustStart(t *testing.T, kind string, args ...string) *Server {
	t.Helper()
	began := time.Now()
	srv, err := backends[kind](args)
	if err != nil && kind == "container" && os.Getenv(envImage) != "" {
		notTested(t, err.Error())
	} else if err != nil {
		t.Skip(err)
	}
	t.Logf("%s after %s", srv, time.Since(began))
	srv.tb = t
	t.Cleanup(func() { _ = srv.close() })
	return srv
}

// eventually waits until the server answers the client again; then it must still
// have its data.
func eventually(t *testing.T, client *redis.Client, want string) {
	t.Helper()
	poll(t, "an answer", func() bool {
		got, err := client.Get(t.Context(), "k").Result()
		if err == nil {
			require.Equal(t, want, got)
		}
		require.NotErrorIs(t, err, redis.Nil)
		return err == nil
	})
}

func poll(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(startTimeout); !done(); time.Sleep(5 * time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "waited in vain for %s", what)
	}
}

// runID identifies the server's current run; it is empty while the server does not
// answer.
func runID(addr string) string {
	if ping(addr) != nil {
		return ""
	}
	info, _ := serverInfo(addr)
	return info["run_id"]
}

// A test that checks for leaks while the shared server runs finds none of the
// server's goroutines.
func TestLeakOptions(t *testing.T) {
	kinds := maps.Clone(backends)
	kinds["embedded"] = func([]string) (*Server, error) { return startEmbedded() }
	for kind, start := range kinds {
		t.Run(kind, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			srv, err := start(nil)
			if err != nil {
				t.Skip(err)
			}
			defer srv.close()
			client := redis.NewClient(&redis.Options{Addr: srv.Addr()})
			require.NoError(t, client.Ping(t.Context()).Err())
			require.NoError(t, client.Close())
			goleak.VerifyNone(t, append(LeakOptions(), before)...)
		})
	}
}
