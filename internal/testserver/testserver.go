// Package testserver gives tests a Redis server: one that the whole test binary
// shares (Addr, Client), servers of a test's own that it may freeze, restart and
// kill (Private), and a Cluster that the binary shares too (Cluster).
//
// The shared server is chosen at first use: the first of these that works. The
// choice and the failures are reported to stderr.
//
//  1. the server at REDIS_ADDR, if that is set;
//  2. a container, by testcontainers-go, of the image GOXSTREAMS_TEST_IMAGE
//     (default: the official redis image);
//  3. redis-server or valkey-server from the PATH, on a free port;
//  4. the embedded server, miniredis: sufficient for many tests, but it is not
//     Redis. Tests of Redis's own behavior call RequireReal.
//
// With GOXSTREAMS_TEST_REAL=1 (set in CI) the absence of a real server is a
// failure. Then nothing replaces the server that the environment names, either: a
// run for one image does not pass on another server.
//
// Servers end with the tests, even if those panic or are killed. The package needs
// a Unix.
package testserver

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
)

const (
	envAddr  = "REDIS_ADDR"
	envImage = "GOXSTREAMS_TEST_IMAGE"
	envReal  = "GOXSTREAMS_TEST_REAL"

	// defaultImage is the newest official image that .ci/run also tests on.
	defaultImage = "redis:8.6"
)

// parallelTests is the default of -parallel: these tests mostly wait, so it need
// not be the number of processors. With 8, two processors are idle for two thirds
// of the time.
const parallelTests = "20"

// Main is a package's TestMain. It runs the tests, ends the shared servers, checks
// for leaked goroutines (opts are further exceptions) and exits. A test binary that
// starts itself as a child must branch off before Main, or be given an address.
func Main(m *testing.M, opts ...goleak.Option) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", parallelTests); err != nil {
			panic(err)
		}
	}
	goleak.VerifyTestMain(closing{m}, append(opts, ryukConnection())...)
}

// closing runs m, and closes the shared servers before goleak checks.
type closing struct{ m *testing.M }

func (c closing) Run() int {
	code := c.m.Run()
	if err := errors.Join(shared.close(), sharedCluster.close()); err != nil {
		stderr("testserver: closing what is shared: %v", err)
		code = max(code, 1)
	}
	if names := skipped.list(); len(names) > 0 {
		stderr("testserver: NOT TESTED for want of a real server: %s", strings.Join(names, ", "))
	}
	return code
}

// Addr returns the address of the shared server.
func Addr(t testing.TB) string {
	t.Helper()
	srv, err := shared.get()
	if err != nil {
		t.Fatalf("testserver: no server: %v", err)
	}
	return srv.Addr()
}

// Client returns a client of the shared server, which t's cleanup closes.
func Client(t testing.TB) *redis.Client {
	t.Helper()
	return newClient(t, Addr(t))
}

// RequireReal skips t if the shared server is the embedded one.
func RequireReal(t testing.TB) {
	t.Helper()
	Addr(t)
	requireReal(t, shared.srv)
}

// IsEmbedded reports whether the shared server is the embedded one.
func IsEmbedded(t testing.TB) bool {
	t.Helper()
	Addr(t)
	return shared.srv.embedded
}

func requireReal(t testing.TB, srv *Server) {
	t.Helper()
	if srv.embedded {
		notTested(t, "it needs a real server, and this is the embedded one")
	}
}

// notTested skips t visibly; if a real server is required, it fails t.
func notTested(t testing.TB, why string) {
	t.Helper()
	if realOnly() {
		t.Fatalf("testserver: %s is set: %s", envReal, why)
	}
	skipped.add(t.Name())
	t.Skipf("NOT TESTED: %s: %s (set %s, or have Docker or redis-server)", t.Name(), why, envAddr)
}

func newClient(t testing.TB, addr string) *redis.Client {
	client := redis.NewClient(&redis.Options{Addr: addr})
	t.Cleanup(func() {
		if err := client.Close(); err != nil && !errors.Is(err, redis.ErrClosed) {
			t.Errorf("testserver: closing the client: %v", err)
		}
	})
	return client
}

func realOnly() bool { return os.Getenv(envReal) == "1" }

func stderr(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// shared starts lazily: listing tests, fuzz workers and tests without Redis start
// no server.
var shared sharedServer

type sharedServer struct {
	once sync.Once
	srv  *Server
	err  error
}

func (s *sharedServer) get() (*Server, error) {
	s.once.Do(func() { s.srv, s.err = choose(stderr, sharedOptions(realStarters)) })
	return s.srv, s.err
}

func (s *sharedServer) close() error {
	s.once.Do(func() { s.err = errors.New("closed") })
	if s.srv == nil {
		return nil
	}
	return s.srv.close()
}

// skipped collects the names of the tests that found no real server.
var skipped nameList

type nameList struct {
	mu    sync.Mutex
	names []string
}

func (l *nameList) add(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.names = append(l.names, name)
}

func (l *nameList) list() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.names
}
