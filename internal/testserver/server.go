package testserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
)

const (
	// startTimeout limits a server's start once its image is available, and each
	// call of Docker that stops or restarts it. A start takes 0.3 s; on a CI machine
	// that compiles and tests meanwhile, it has taken more than 15 s.
	startTimeout = time.Minute
	// externalTimeout is shorter because that server should already be running.
	externalTimeout = 3 * time.Second
)

// baseArgs disable persistence; a test's own arguments follow them and take
// precedence.
var baseArgs = []string{"--save", "", "--appendonly", "no"}

// Server is a running Redis or Valkey. Its methods report failures to the test that
// it belongs to, and may be called from any goroutine of that test.
type Server struct {
	addr     string
	version  string
	embedded bool
	backend  backend    // nil for a server that this package did not start
	tb       testing.TB // nil for the shared server
}

// backend runs a server that this package has started. Its methods return when they
// have taken effect.
type backend interface {
	freeze() error
	thaw() error
	kill() error
	restart() error
	close() error
	restartCommand() []string
	peerAddr() (string, error) // where other servers of its kind reach it
}

// Private starts a real server for t alone, which t's cleanup ends. Without real
// servers it skips t as RequireReal does. args are further arguments of
// redis-server, such as "--appendonly", "yes".
func Private(t testing.TB, args ...string) *Server {
	t.Helper()
	return private(t, realStarters, args...)
}

func private(t testing.TB, s starters, args ...string) *Server {
	t.Helper()
	srv, err := choose(t.Logf, privateOptions(s, args...))
	if err != nil {
		notTested(t, "it needs a real server of its own: "+err.Error())
	}
	srv.tb = t
	t.Cleanup(func() { srv.check("close", srv.close()) })
	return srv
}

// Addr returns the server's host:port, which is the same after a restart.
func (s *Server) Addr() string { return s.addr }

// Client returns a client of the server, which the test's cleanup closes.
func (s *Server) Client() *redis.Client { return newClient(s.tb, s.addr) }

// Freeze suspends the server's process: connections stay open, and the kernel
// accepts new ones, but nothing is answered.
func (s *Server) Freeze() { s.check("freeze", s.backend.freeze()) }

// Thaw resumes a frozen server; it then processes what it received meanwhile.
func (s *Server) Thaw() { s.check("thaw", s.backend.thaw()) }

// Kill ends the server with SIGKILL. It stays down until Restart.
func (s *Server) Kill() { s.check("kill", s.backend.kill()) }

// Restart ends the server with SIGTERM, starts it again (with its data only if it
// has --appendonly yes) and waits until it answers.
func (s *Server) Restart() {
	err := s.backend.restart()
	if err == nil {
		_, err = await(s.addr, startTimeout, nil)
	}
	s.check("restart", err)
}

// RestartCommand returns a command line that restarts the server, for Watermill's
// Features.RestartServiceCommand. It may return before the server answers.
func (s *Server) RestartCommand() []string { return s.backend.restartCommand() }

func (s *Server) String() string { return s.version + " on " + s.addr }

func (s *Server) close() error {
	if s.backend == nil {
		return nil
	}
	return s.backend.close()
}

// check uses Errorf, not Fatalf, because tests inject faults from goroutines.
func (s *Server) check(what string, err error) {
	if err != nil {
		s.tb.Errorf("testserver: %s %s: %v", what, s, err)
	}
}

func startExternal(addr string) (*Server, error) {
	info, err := await(addr, externalTimeout, nil)
	if err != nil {
		return nil, err
	}
	return &Server{addr: addr, version: info.version()}, nil
}

func startEmbedded() (*Server, error) {
	m := miniredis.NewMiniRedis()
	if err := m.Start(); err != nil {
		return nil, err
	}
	return &Server{addr: m.Addr(), version: "miniredis", embedded: true, backend: embedded{m}}, nil
}

// embedded is only used as the shared server, which nobody freezes or restarts.
type embedded struct{ *miniredis.Miniredis }

func (e embedded) freeze() error            { panic("testserver: the embedded server cannot be frozen") }
func (e embedded) thaw() error              { panic("testserver: the embedded server cannot be frozen") }
func (e embedded) kill() error              { panic("testserver: the embedded server cannot be killed") }
func (e embedded) restart() error           { panic("testserver: the embedded server cannot be restarted") }
func (e embedded) restartCommand() []string { return nil }
func (e embedded) close() error             { e.Close(); return nil }
func (e embedded) peerAddr() (string, error) {
	panic("testserver: the embedded server has no peers")
}

// info is the reply to INFO server.
type info map[string]string

func (i info) version() string {
	if v := i["valkey_version"]; v != "" {
		return "Valkey " + v
	}
	return "Redis " + i["redis_version"]
}

// await polls addr until a server is ready, alive (which may be nil) reports that
// none ever will be, or the timeout expires.
func await(addr string, timeout time.Duration, alive func() error) (info, error) {
	for deadline := time.Now().Add(timeout); ; {
		err := ping(addr)
		if err == nil {
			return serverInfo(addr)
		}
		if alive != nil {
			if dead := alive(); dead != nil {
				return nil, dead
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no answer within %s: %w", timeout, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// ping does not use go-redis, which waits a second to try again after a failed
// dial.
func ping(addr string) error {
	conn, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	if _, err := io.WriteString(conn, "*1\r\n$4\r\nPING\r\n"); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err == nil && answer != "+PONG\r\n" {
		err = errors.New(strings.TrimSpace(answer)) // -LOADING, -NOAUTH
	}
	return err
}

func serverInfo(addr string) (info, error) {
	client := redis.NewClient(&redis.Options{Addr: addr})
	defer client.Close()
	text, err := client.Info(context.Background(), "server").Result()
	if err != nil {
		return nil, err
	}
	fields := info{}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			fields[name] = value
		}
	}
	return fields, nil
}
