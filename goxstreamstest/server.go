package goxstreamstest

import (
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
)

// Server is an embedded server, empty at first. The package comment says what it is not
// good for.
type Server struct {
	tb     testing.TB
	server *server.Server
	listen sync.Once
	addr   string
}

// NewServer starts an embedded server of the test's own, which the test's cleanup ends.
// It also works within a bubble of testing/synctest, if it is started there.
func NewServer(tb testing.TB) *Server {
	tb.Helper()
	mini := miniredis.NewMiniRedis()
	first, err := mini.Dial() // which starts it without a listener: in a bubble's time, one would be waited for
	if err != nil {
		tb.Fatalf("goxstreamstest: start the embedded server: %v", err)
	}
	_ = first.Close()
	tb.Cleanup(mini.Close)
	s := &Server{tb: tb, server: mini.Server()}
	s.server.SetPreHook(shortenBlock)
	return s
}

// maxBlock bounds a read's BLOCK. The embedded server has no CLIENT UNBLOCK, so that
// Close waits for the end of a read.
const maxBlock = 50 * time.Millisecond

// shortenBlock is run before each command. The arguments are those that the command gets.
func shortenBlock(_ *server.Peer, cmd string, args ...string) (done bool) {
	if cmd != "XREADGROUP" && cmd != "XREAD" {
		return false
	}
	for i, arg := range args[:max(len(args)-1, 0)] {
		switch strings.ToUpper(arg) {
		case "STREAMS":
			return false
		case "BLOCK":
			if ms, err := strconv.Atoi(args[i+1]); err == nil && ms > int(maxBlock.Milliseconds()) {
				args[i+1] = strconv.FormatInt(maxBlock.Milliseconds(), 10)
			}
			return false
		}
	}
	return false
}

// Client returns a client of the server, which the test's cleanup closes. Its connections
// are in memory.
func (s *Server) Client() *redis.Client {
	s.tb.Helper()
	client := redis.NewClient(&redis.Options{
		Addr: "127.0.0.1:6379", // never dialed; a name would be looked up
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			ours, theirs := newMemoryConn()
			s.server.ServeConn(theirs)
			return ours, nil
		},
	})
	s.tb.Cleanup(func() {
		if err := client.Close(); err != nil && !errors.Is(err, redis.ErrClosed) {
			s.tb.Errorf("goxstreamstest: close the client: %v", err)
		}
	})
	return client
}

// Addr returns an address such as "127.0.0.1:41234", at which the server listens from the
// first call on, for programs that make their own client. Do not call it within a bubble of
// testing/synctest, the time of which stands still while a network connection is open.
func (s *Server) Addr() string {
	s.tb.Helper()
	s.listen.Do(func() {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			s.tb.Fatalf("goxstreamstest: %v", err)
		}
		s.addr = listener.Addr().String()
		var accepting sync.WaitGroup
		accepting.Go(func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return // closed below
				}
				s.server.ServeConn(conn)
			}
		})
		s.tb.Cleanup(func() {
			_ = listener.Close()
			accepting.Wait()
		})
	})
	return s.addr
}
