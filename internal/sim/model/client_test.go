package model_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// rawClient reads replies as they come, with the type of each value.
type rawClient struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
}

type (
	bulk    string
	simple  string
	failure string
	missing string // "_", "$-1" or "*-1"
	number  string // ","
	list    []any
	dict    []any
)

func newRawClient(t testing.TB, conn net.Conn) *rawClient {
	return &rawClient{t, conn, bufio.NewReader(conn)}
}

func dialRaw(t testing.TB, addr string) *rawClient {
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	return newRawClient(t, conn)
}

func (c *rawClient) send(args ...string) {
	b := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, a := range args {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(a), a)
	}
	_, err := c.conn.Write(b)
	require.NoError(c.t, err)
}

func (c *rawClient) do(args ...string) any {
	c.send(args...)
	return c.receive()
}

func (c *rawClient) receive() any {
	require.NoError(c.t, c.conn.SetReadDeadline(time.Now().Add(30*time.Second)))
	v, err := c.read()
	require.NoError(c.t, err)
	return v
}

// receiveWithin returns false when no reply has begun by then.
func (c *rawClient) receiveWithin(d time.Duration) (any, bool) {
	require.NoError(c.t, c.conn.SetReadDeadline(time.Now().Add(d)))
	if _, err := c.r.Peek(1); err != nil {
		return nil, false
	}
	return c.receive(), true
}

func (c *rawClient) read() (any, error) {
	line, err := c.r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	line = line[:len(line)-2]
	text := line[1:]
	switch line[0] {
	case '+':
		return simple(text), nil
	case '-':
		return failure(text), nil
	case ':':
		return strconv.ParseInt(text, 10, 64)
	case '_':
		return missing(line), nil
	case ',':
		return number(text), nil
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return nil, err
	}
	if n < 0 {
		return missing(line), nil
	}
	switch line[0] {
	case '$':
		b := make([]byte, n+2)
		_, err := io.ReadFull(c.r, b)
		return bulk(b[:n]), err
	case '*':
		v, err := c.readAll(n)
		return list(v), err
	case '%':
		v, err := c.readAll(2 * n)
		return dict(v), err
	}
	return nil, fmt.Errorf("a reply that begins with %q", line)
}

func (c *rawClient) readAll(n int) ([]any, error) {
	all := make([]any, n)
	for i := range all {
		var err error
		if all[i], err = c.read(); err != nil {
			return nil, err
		}
	}
	return all, nil
}
