package goxstreamstest

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// memoryConn is one end of a buffered connection in memory. (net.Pipe has no buffer, and
// deadlocks when both sides write.)
type memoryConn struct {
	in, out  *memoryBuffer
	deadline atomic.Pointer[time.Time] // of reads; writes never wait
}

type memoryBuffer struct {
	mu     sync.Mutex
	data   bytes.Buffer
	closed bool
	change chan struct{} // closed at the next change
}

func newMemoryConn() (a, b *memoryConn) {
	x, y := &memoryBuffer{change: make(chan struct{})}, &memoryBuffer{change: make(chan struct{})}
	return &memoryConn{in: x, out: y}, &memoryConn{in: y, out: x}
}

func (b *memoryBuffer) update(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
	close(b.change)
	b.change = make(chan struct{})
}

func (c *memoryConn) Read(p []byte) (int, error) {
	for {
		c.in.mu.Lock()
		change, closed := c.in.change, c.in.closed
		if c.in.data.Len() > 0 {
			defer c.in.mu.Unlock()
			return c.in.data.Read(p)
		}
		c.in.mu.Unlock()
		if closed {
			return 0, io.EOF
		}
		if !c.await(change) {
			return 0, os.ErrDeadlineExceeded
		}
	}
}

// await waits for a change, until the deadline for reads.
func (c *memoryConn) await(change <-chan struct{}) bool {
	var timeout <-chan time.Time
	if d := c.deadline.Load(); d != nil && !d.IsZero() {
		timer := time.NewTimer(time.Until(*d))
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case <-change:
		return true
	case <-timeout:
		return false
	}
}

func (c *memoryConn) Write(p []byte) (n int, err error) {
	c.out.update(func() {
		if c.out.closed {
			err = io.ErrClosedPipe
			return
		}
		n, err = c.out.data.Write(p)
	})
	return n, err
}

func (c *memoryConn) Close() error {
	for _, b := range []*memoryBuffer{c.in, c.out} {
		b.update(func() { b.closed = true })
	}
	return nil
}

func (c *memoryConn) SetReadDeadline(d time.Time) error { c.deadline.Store(&d); return nil }
func (c *memoryConn) SetDeadline(d time.Time) error     { return c.SetReadDeadline(d) }
func (*memoryConn) SetWriteDeadline(time.Time) error    { return nil }
func (*memoryConn) LocalAddr() net.Addr                 { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }
func (*memoryConn) RemoteAddr() net.Addr                { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }
