package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// roleEnv holds a Role as JSON. A process that has it is a child.
const roleEnv = "GOXSTREAMS_CHAOS_ROLE"

const (
	producerRole = "producer"
	consumerRole = "consumer"
)

// A Role says what a child does.
type Role struct {
	Role     string
	Process  string
	Life     int // 1 is the first process in this place
	Dir      string
	Settings Settings
	Redis    Redis
}

// Redis says how to reach it.
type Redis struct {
	Addrs      []string
	MasterName string
	Cluster    bool
	// Routes leads to each server through the process's own proxy.
	Routes map[string]string
}

// The timeouts of children are short, to keep runs short. go-redis retries three times what may be sent twice.
const clientTimeout = time.Second

func (r Redis) client() redis.UniversalClient {
	dialer := net.Dialer{Timeout: clientTimeout}
	return redis.NewUniversalClient(&redis.UniversalOptions{
		Addrs: r.Addrs, MasterName: r.MasterName, IsClusterMode: r.Cluster,
		DialTimeout: clientTimeout, ReadTimeout: clientTimeout, WriteTimeout: clientTimeout,
		Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if route, ok := r.Routes[addr]; ok {
				addr = route
			}
			return dialer.DialContext(ctx, network, addr)
		},
	})
}

// playRole does what a child was started for, and reports whether this process is one.
func playRole() bool {
	text := os.Getenv(roleEnv)
	if text == "" {
		return false
	}
	var role Role
	if err := json.Unmarshal([]byte(text), &role); err != nil {
		fail(fmt.Errorf("%s: %w", roleEnv, err))
	}
	if err := role.play(); err != nil {
		fail(err)
	}
	return true
}

// quiet keeps go-redis from logging the errors that every fault causes.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

func init() { redis.SetLogger(quiet{}) }

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func (r Role) play() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	journal, err := openJournal(r.Dir, r.Process, r.Life)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(r.Dir, r.Process+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	client := r.Redis.client()
	defer client.Close()
	c := child{
		role: r, journal: journal, client: client,
		logger: watermill.NewSlogLogger(slog.New(slog.NewTextHandler(log, nil))),
		dice:   rand.New(rand.NewPCG(r.Settings.Seed, hash(r.Process, r.Life))),
	}
	go c.watchTime(ctx)
	if r.Settings.SampleEvery > 0 {
		go c.sample(ctx)
	}
	if r.Role == producerRole {
		return c.produce(ctx)
	}
	return c.consume(ctx)
}

// A child is what all roles have in common.
type child struct {
	role    Role
	journal *Journal
	client  redis.UniversalClient
	logger  watermill.LoggerAdapter
	dice    *rand.Rand
}

// watchTime logs when the process did not run for a while. SIGSTOP is not the only reason: on a busy machine a process waits
// for the CPU, and a lease that it does not renew meanwhile is not the library's fault.
func (c child) watchTime(ctx context.Context) {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	limit := c.role.Settings.ClaimMinIdle / 8
	for last := monotonic(); ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := monotonic()
		if took := now - last; took > limit {
			c.journal.write(rules.Event{Kind: rules.Stalled, Took: took})
		}
		last = now
	}
}

func (c child) sample(ctx context.Context) {
	ticker := time.NewTicker(c.role.Settings.SampleEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		runtime.GC()
		var memory runtime.MemStats
		runtime.ReadMemStats(&memory)
		c.journal.write(rules.Event{Kind: rules.Sampled, Sample: &rules.Sample{Goroutines: runtime.NumGoroutine(), Heap: int(memory.HeapAlloc)}})
	}
}
