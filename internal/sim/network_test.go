package sim

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// connected runs a test with both ends of a connection.
func connected(t *testing.T, f func(t *testing.T, l *lane, client, server net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		accepted := make(chan net.Conn, 1)
		n := newNetwork(1, func(c net.Conn) { accepted <- c })
		l := n.lane("process", 1, time.Millisecond)
		client, err := l.dial(context.Background(), "", "")
		require.NoError(t, err)
		server := <-accepted
		f(t, l, client, server)
		_, _ = client.Close(), server.Close()
	})
}

func write(t *testing.T, c net.Conn, s string) {
	t.Helper()
	n, err := c.Write([]byte(s))
	require.NoError(t, err)
	require.Equal(t, len(s), n)
}

func readAll(t *testing.T, c net.Conn, n int) string {
	t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	return string(b)
}

func TestNetworkKeepsOrderAndTakesTime(t *testing.T) {
	connected(t, func(t *testing.T, _ *lane, client, server net.Conn) {
		start := time.Now()
		for _, s := range []string{"a", "bc", "", "def"} {
			write(t, client, s)
		}
		require.Equal(t, "abcdef", readAll(t, server, 6))
		require.GreaterOrEqual(t, time.Since(start), time.Millisecond/2)
		write(t, server, "answer")
		require.Equal(t, "answer", readAll(t, client, 6))
	})
}

// What is written after an empty write arrives (a reader once waited for its deadline).
func TestNetworkEmptyWrite(t *testing.T) {
	connected(t, func(t *testing.T, _ *lane, client, server net.Conn) {
		got := make(chan string)
		go func() { got <- readAll(t, client, 1) }()
		write(t, server, "")
		write(t, server, "x")
		require.Equal(t, "x", <-got)
	})
}

func TestNetworkDeadline(t *testing.T) {
	connected(t, func(t *testing.T, _ *lane, client, _ net.Conn) {
		start := time.Now()
		require.NoError(t, client.SetReadDeadline(start.Add(time.Minute)))
		_, err := client.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.Equal(t, time.Minute, time.Since(start))

		failed := make(chan error)
		require.NoError(t, client.SetReadDeadline(time.Time{}))
		go func() { _, err := client.Read(make([]byte, 1)); failed <- err }()
		synctest.Wait()
		require.NoError(t, client.SetReadDeadline(time.Now())) // while it waits
		require.ErrorIs(t, <-failed, os.ErrDeadlineExceeded)
	})
}

func TestNetworkPartition(t *testing.T) {
	connected(t, func(t *testing.T, l *lane, client, server net.Conn) {
		end := l.network.influence([]string{"process"}, (*lane).block, (*lane).unblock)
		write(t, client, "late")
		require.NoError(t, server.SetReadDeadline(time.Now().Add(time.Hour)))
		_, err := server.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err = l.dial(ctx, "", "")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		end()
		require.NoError(t, server.SetReadDeadline(time.Time{}))
		require.Equal(t, "late", readAll(t, server, 4))
	})
}

// An influence also applies to lanes that are made later, and ends for them too.
func TestNetworkInfluenceOnLaterLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(1, func(c net.Conn) { c.Close() })
		end := n.influence(nil,
			func(l *lane) { l.set(func(l *lane) { l.refused++ }) },
			func(l *lane) { l.set(func(l *lane) { l.refused-- }) })
		l := n.lane("process", 1, time.Millisecond)
		_, err := l.dial(context.Background(), "", "")
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		end()
		c, err := l.dial(context.Background(), "", "")
		require.NoError(t, err)
		c.Close()
	})
}

func TestNetworkClose(t *testing.T) {
	connected(t, func(t *testing.T, _ *lane, client, server net.Conn) {
		write(t, client, "last words")
		require.NoError(t, client.Close())
		require.Equal(t, "last words", readAll(t, server, 10))
		_, err := server.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		_, err = client.Read(make([]byte, 1))
		require.ErrorIs(t, err, net.ErrClosed)
		require.ErrorIs(t, client.Close(), net.ErrClosed)
	})
}

func TestNetworkKill(t *testing.T) {
	for _, flush := range []bool{false, true} {
		connected(t, func(t *testing.T, l *lane, client, server net.Conn) {
			write(t, client, "on its way")
			l.kill(flush)
			got, err := io.ReadAll(server)
			if flush {
				require.NoError(t, err)
				require.Equal(t, "on its way", string(got))
			} else {
				require.ErrorIs(t, err, syscall.ECONNRESET)
				require.Empty(t, got)
			}
			_, err = client.Write([]byte("x"))
			require.Error(t, err)
			_, err = l.dial(context.Background(), "", "")
			require.ErrorIs(t, err, syscall.ECONNREFUSED)
		})
	}
}

// Each kind of cut lets the documented parts of a command and its reply arrive.
func TestNetworkCuts(t *testing.T) {
	for _, c := range []struct {
		at             point
		command, reply bool // whether they may arrive whole
	}{
		{beforeCommand, true, false}, // a part may be the whole
		{beforeReply, true, false},
		{midReply, true, true},
	} {
		for seed := range uint64(20) {
			connected(t, func(t *testing.T, l *lane, client, server net.Conn) {
				l.set(func(l *lane) { l.cuts[c.at], l.links[0].dice = 1, newDice(seed, "test", 0) })
				_, _ = client.Write([]byte("command"))
				require.NoError(t, server.SetReadDeadline(time.Now().Add(time.Second)))
				command := make([]byte, 7)
				_, err := io.ReadFull(server, command)
				if c.at != beforeCommand {
					require.NoError(t, err)
					write(t, server, "reply")
				}
				require.NoError(t, client.SetReadDeadline(time.Now().Add(time.Second)))
				reply, err := io.ReadAll(client)
				require.False(t, errors.Is(err, os.ErrDeadlineExceeded), "the connection is cut")
				if !c.reply {
					require.Empty(t, reply)
				}
			})
		}
	}
}
