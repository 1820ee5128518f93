package redisx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestMain(m *testing.M) { testserver.Main(m) }

func TestSent_Outcome(t *testing.T) {
	written := func() *Sent {
		s := NewSent("*")
		b, err := s.MarshalBinary()
		require.NoError(t, err)
		require.Equal(t, "*", string(b))
		return s
	}
	dial := &net.OpError{Op: "dial", Err: io.EOF}
	for _, tt := range []struct {
		name    string
		sent    *Sent
		err     error
		unknown bool
	}{
		{"no error", written(), nil, false},
		{"not written", NewSent("*"), io.EOF, false},
		{"written", written(), io.EOF, true},
		{"an answer", written(), ReplyError("ERR no"), false},
		{"redirected, and not reached there", written(), fmt.Errorf("node: %w", dial), false},
		{"no turn", written(), redis.ErrPoolTimeout, false},
		{"closed", written(), redis.ErrClosed, false},
	} {
		err := tt.sent.Outcome(tt.err)
		assert.Equal(t, tt.unknown, errors.Is(err, ErrOutcomeUnknown), tt.name)
		if tt.err == nil {
			assert.NoError(t, err, tt.name)
		} else {
			assert.ErrorIs(t, err, tt.err, tt.name)
		}
	}
}

func TestRedacted(t *testing.T) {
	const secret = "ERR unknown command 'XACKDEL', with args beginning with: 'secret' "
	assert.NotContains(t, Redacted(ReplyError(secret)).Error(), "secret")
	assert.True(t, IsDenied(Redacted(ReplyError(secret))))
	assert.Equal(t, io.EOF, Redacted(io.EOF))
}

func TestNotReady(t *testing.T) {
	for err, want := range map[error]bool{
		io.EOF: true, context.DeadlineExceeded: true, redis.ErrPoolTimeout: true, redis.ErrClosed: false,
		ReplyError("LOADING Redis is loading the dataset in memory"):        true,
		ReplyError("READONLY You can't write against a read only replica."): true,
		ReplyError("ERR max number of clients reached"):                     true,
		ReplyError("WRONGPASS invalid username-password pair"):              false,
		ReplyError("NOAUTH Authentication required."):                       false,
		ReplyError("NOPERM no"):                                             false,
		ReplyError("WRONGTYPE Operation against a key"):                     false,
		ErrTwoServers: false,
	} {
		assert.Equal(t, want, NotReady(err), "%v", err)
	}
	assert.False(t, NotReady(nil))
}

// Connections that lead elsewhere are reopened; but a name with several addresses
// leads elsewhere each time.
func TestRoute_Follow(t *testing.T) {
	node := redis.NewClient(&redis.Options{Dialer: func(context.Context, string, string) (net.Conn, error) {
		_, other := net.Pipe()
		return other, nil
	}})
	t.Cleanup(func() { require.NoError(t, node.Close()) })
	l := &Conn{}
	assert.True(t, l.LeadsTo("b:1"), "not connected yet")
	at := "a:1"
	l.remote.Store(&at)
	assert.True(t, l.LeadsTo("a:1"))
	assert.False(t, l.LeadsTo("b:1"))

	asked := make(chan bool, 1)
	moved := false
	r := NewRoute(Client{node}, 0, func(string) bool { asked <- true; return moved })
	// ask checks once, and returns whether connections that lead elsewhere would be reopened.
	ask := func() bool {
		r.asked = time.Time{}
		r.Ask(t.Context())
		for {
			r.mu.Lock()
			busy := r.busy
			r.mu.Unlock()
			if !busy {
				break
			}
			time.Sleep(time.Millisecond)
		}
		select {
		case <-asked:
			return true
		default:
			return false
		}
	}
	for range maxMoves + 1 {
		assert.True(t, ask(), "none of these is a move")
	}
	moved = true
	for range maxMoves {
		assert.True(t, ask())
	}
	assert.False(t, ask(), "again and again")
	r.moves[0] = time.Now().Add(-2 * time.Minute)
	assert.True(t, ask())
	assert.False(t, ask(), "again and again")
}

// A dedicated connection neither uses the pool nor needs it.
func TestOpenConn(t *testing.T) {
	testserver.RequireReal(t)
	client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), PoolSize: 1, PoolTimeout: time.Second})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	c := Client{client}
	l, err := c.OpenConn(t.Context(), client, "key", 10*time.Second)
	require.NoError(t, err)
	defer l.Close()
	require.True(t, l.Wakable())
	read := make(chan error, 1)
	go func() {
		read <- l.Process(context.Background(), redis.NewCmd(context.Background(), "blpop", t.Name(), 10))
	}()
	for woken := false; !woken; {
		woken = l.Wake(t.Context()) // through the pool, which the read does not occupy
		select {
		case err := <-read:
			require.True(t, woken, "the read has ended by itself: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
}
