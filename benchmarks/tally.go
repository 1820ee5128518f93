package main

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"
)

// stalled is how long nothing may arrive before a measurement fails.
const stalled = 30 * time.Second

// A tally notes which messages have arrived. A payload begins with the message's
// number.
type tally struct {
	seen    []atomic.Int32
	total   atomic.Int64
	want    int64
	foreign atomic.Int64
	done    chan struct{} // closed when all have arrived
}

// newTally expects n messages, each of them the given number of times.
func newTally(n, times int) *tally {
	return &tally{seen: make([]atomic.Int32, n), want: int64(n * times), done: make(chan struct{})}
}

// got notes an arrival and returns how often the message has arrived by now.
func (t *tally) got(payload []byte) int32 {
	i := number(payload)
	if i < 0 || i >= len(t.seen) {
		t.foreign.Add(1)
		return 0
	}
	times := t.seen[i].Add(1)
	if t.total.Add(1) == t.want {
		close(t.done)
	}
	return times
}

// wait returns when all have arrived.
func (t *tally) wait() error {
	tick := time.NewTicker(stalled)
	defer tick.Stop()
	for last := int64(-1); ; {
		select {
		case <-t.done:
			return nil
		case <-tick.C:
		}
		now := t.total.Load()
		if now == last {
			return fmt.Errorf("%d of %d messages arrived, and no more for %v", now, t.want, stalled)
		}
		last = now
	}
}

// check fails unless every message has arrived exactly as often as wanted.
func (t *tally) check() error {
	times := int32(t.want / int64(len(t.seen)))
	for i := range t.seen {
		if n := t.seen[i].Load(); n != times {
			return fmt.Errorf("message %d arrived %d times, not %d", i, n, times)
		}
	}
	if n := t.foreign.Load(); n > 0 {
		return fmt.Errorf("%d messages arrived that nobody sent", n)
	}
	return nil
}

// number returns a payload's number, -1 if it has none.
func number(payload []byte) int {
	if len(payload) < 8 {
		return -1
	}
	return int(binary.BigEndian.Uint64(payload))
}

// payloads returns n payloads, numbered from first, in memory of their own.
func payloads(first, n, size int) [][]byte {
	memory := make([]byte, n*size)
	out := make([][]byte, n)
	for i := range out {
		out[i] = memory[i*size : (i+1)*size : (i+1)*size]
		binary.BigEndian.PutUint64(out[i], uint64(first+i))
	}
	return out
}

// stamp notes in a payload when it was sent; sentAt reads it.
func stamp(payload []byte) {
	binary.BigEndian.PutUint64(payload[8:], uint64(time.Since(epoch)))
}

func sentAt(payload []byte) time.Duration {
	return time.Duration(binary.BigEndian.Uint64(payload[8:]))
}

// epoch makes stamps of the monotonic clock.
var epoch = time.Now()
