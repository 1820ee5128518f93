package goxstreams_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// A mute loses the answer to the next command of a name, after the server has run
// it, and counts how often the command was sent from then on.
type mute struct {
	mu   sync.Mutex
	word []byte // as it stands in a command; nil: nothing is lost
	sent int
	lost bool
}

func (m *mute) next(command string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.word, m.sent, m.lost = []byte("\r\n"+command+"\r\n"), 0, false
	if strings.HasPrefix(command, "--") { // a script's first line
		m.word = []byte("\r\n" + command + "\n")
	}
}

// done reports whether an answer was lost, and how often its command was sent.
func (m *mute) done() (lost bool, sent int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lost, m.sent
}

func (m *mute) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &muteConn{turnConn: turnConn{Conn: conn}, m: m}, nil
}

type muteConn struct {
	turnConn
	m    *mute
	lose bool
}

func (c *muteConn) Write(b []byte) (int, error) {
	c.m.mu.Lock()
	if n := bytes.Count(bytes.ToLower(b), c.m.word); c.m.word != nil && n > 0 {
		c.m.sent += n
		c.lose = !c.m.lost
		c.m.lost = true
	}
	c.m.mu.Unlock()
	return c.turnConn.Write(b)
}

func (c *muteConn) Read(b []byte) (int, error) {
	n, err := c.turnConn.Read(b)
	if !c.lose || err != nil {
		return n, err
	}
	c.readAll(b[:n])
	_ = c.Close()
	return 0, io.EOF
}

// TestResend: go-redis, as it is by default, sends a command again when the answer
// is lost: MaxRetries 3. What this library sends it does not, and nothing is stored
// or counted twice.
func TestResend(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t)
	admin := testserver.Client(t)
	open := func(t *testing.T) (*mute, *redis.Client) {
		m := &mute{}
		client := redis.NewClient(&redis.Options{Addr: testserver.Addr(t), Dialer: m.dial})
		t.Cleanup(func() { _ = client.Close() })
		return m, client
	}
	requireLost := func(t *testing.T, m *mute, most int) {
		t.Helper()
		lost, sent := m.done()
		require.True(t, lost, "no answer was lost")
		require.LessOrEqual(t, sent, most, "it was sent again")
	}
	t.Run("go-redis itself stores twice", func(t *testing.T) { // else the rest proves nothing
		m, client := open(t)
		topic := topic(t)
		m.next("xadd")
		require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"a", "b"}}).Err())
		require.Len(t, entriesOf(t, admin, topic), 2)
	})
	t.Run("Publish", func(t *testing.T) {
		for _, n := range []int{1, 3} {
			m, client := open(t)
			topic := topic(t)
			pub := newPublisher(t, client)
			require.NoError(t, pub.Publish(topic+"-", numbered(2)...)) // asks for MULTI
			m.next("xadd")
			err := pub.Publish(topic, numbered(n)...)
			require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
			requireLost(t, m, n)
			require.Len(t, stored(t, admin, topic), n)
		}
	})
	t.Run("Replay and Delete", func(t *testing.T) {
		m, client := open(t)
		topic := topic(t)
		letters := lettersOf(t, admin, topic, 2)
		q := queueOf(t, client, goxstreams.DeadLetterTopic(topic))
		m.next("eval")
		_, err := q.Replay(t.Context(), letters[0].ID)
		require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		requireLost(t, m, 1)
		m.next("xdel")
		_, err = q.Delete(t.Context(), letters[1].ID)
		require.ErrorIs(t, err, goxstreams.ErrOutcomeUnknown)
		requireLost(t, m, 1)
		require.Len(t, entriesOf(t, admin, topic), 2)
		require.Empty(t, entriesOf(t, admin, goxstreams.DeadLetterTopic(topic)))
	})
	for _, command := range []string{"-- dead-letter", "-- take", "xack", "xreadgroup"} {
		t.Run("Subscriber/"+command, func(t *testing.T) {
			t.Parallel()
			m, client := open(t)
			topic, log := topic(t), newLogRecorder()
			config := claiming(client)
			config.BlockTime = 100 * time.Millisecond
			config.Retry = quickRetry()
			config.Retry.MaxRetries = 2
			config.ClaimMinIdle = 10 * time.Minute // no renewals, nothing else is claimed
			config.ClaimInterval = 50 * time.Millisecond
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			m.next(command)
			publish(t, admin, topic, "flaky", "dies")
			msg := next(t, messages)
			require.Equal(t, "flaky", string(msg.Payload))
			require.EqualValues(t, 1, delivery(t, msg).Count)
			msg.Nack()
			msg = next(t, messages)
			require.EqualValues(t, 2, delivery(t, msg).Count, "a claim is counted once")
			msg.Ack()
			for count := range int64(3) {
				msg = next(t, messages)
				require.Equal(t, "dies", string(msg.Payload))
				require.EqualValues(t, count+1, delivery(t, msg).Count)
				msg.Nack()
			}
			eventuallySettled(t, admin, topic, testGroup)
			eventually(t, func() bool { lost, _ := m.done(); return lost }, "no answer was lost")
			require.NoError(t, sub.Close())
			letters := lettersIn(t, admin, goxstreams.DeadLetterTopic(topic))
			require.Len(t, letters, 1)
			require.EqualValues(t, 3, letters[0].Deliveries)
			began, _ := outageLogged(log)
			assert.LessOrEqual(t, began, 1, strings.Join(log.Errors(), "\n"))
		})
	}
}
