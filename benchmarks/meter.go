package main

import (
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// Names of what is measured: the columns of the tables, the keys of the JSON.
const (
	rate        = "msg/s"
	allocs      = "allocs/msg"
	clientCPU   = "client µs/msg"
	serverCPUs  = "server µs/msg"
	commands    = "cmds/msg"
	p50         = "p50 ms"
	p99         = "p99 ms"
	sent        = "sent/s"
	heap        = "heap MiB"
	held        = "pending"
	connections = "connections"
	idleClient  = "idle client CPU %"
	idleServer  = "idle server CPU %"
	p50Ratio    = "p50 / one topic's"
	p99Ratio    = "p99 / one topic's"
)

// metrics are the results of one measurement.
type metrics map[string]float64

// usage has counters as of some moment.
type usage struct {
	at       time.Time
	mallocs  uint64
	client   time.Duration
	server   float64 // seconds
	commands int64
}

// usage reads the server's figures at the beginning of a measurement first and
// at its end last, so that asking is not part of what is measured.
func (e *env) usage(beginning bool) (u usage, err error) {
	if beginning {
		err = e.serverUsage(&u)
	}
	own := func() {
		u.client = processCPU()
		var mem runtime.MemStats
		runtime.ReadMemStats(&mem)
		u.mallocs = mem.Mallocs
	}
	if beginning {
		own()
		u.at = time.Now()
		return u, err
	}
	u.at = time.Now()
	own()
	return u, e.serverUsage(&u)
}

func (e *env) serverUsage(u *usage) (err error) {
	if u.server, err = serverCPU(e.admin); err != nil {
		return err
	}
	// The server's numbers do not include this INFO, e.calls does.
	before := e.calls.Load()
	fields, err := info(e.admin, "stats")
	if err != nil {
		return err
	}
	total, err := strconv.ParseInt(fields["total_commands_processed"], 10, 64)
	u.commands = total - before
	return err
}

// processCPU returns this process's CPU time.
func processCPU() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0 // cannot happen: both arguments are valid
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// measure runs f, which handles n messages, and returns the cost of a message.
func (t *trial) measure(n int, f func() error) (metrics, error) {
	runtime.GC()
	before, err := t.usage(true)
	if err != nil {
		return nil, err
	}
	if t.began != nil {
		t.began(t)
	}
	err = f()
	if t.ended != nil {
		t.ended(t)
	}
	if err != nil {
		return nil, err
	}
	after, err := t.usage(false)
	if err != nil {
		return nil, err
	}
	per := func(x float64) float64 { return x / float64(n) }
	return metrics{
		rate:       float64(n) / after.at.Sub(before.at).Seconds(),
		allocs:     per(float64(after.mallocs - before.mallocs)),
		clientCPU:  per(float64((after.client - before.client).Microseconds())),
		serverCPUs: per((after.server - before.server) * 1e6),
		commands:   per(float64(after.commands - before.commands)),
	}, nil
}
