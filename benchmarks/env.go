package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/redis/go-redis/v9"
)

// An env is what all measurements of a run share.
type env struct {
	addr  string
	size  float64 // scales message counts and durations
	admin *redis.Client
	calls atomic.Int64 // commands that admin sent, which do not count
	began func(*trial) // called just before the measured part
	ended func(*trial) // and just after it
}

func newEnv(addr string, size float64) (*env, error) {
	e := &env{addr: addr, size: size, admin: redis.NewClient(&redis.Options{Addr: addr})}
	e.admin.AddHook(counter{&e.calls})
	if err := e.admin.Ping(context.Background()).Err(); err != nil {
		_ = e.admin.Close()
		return nil, fmt.Errorf("no Redis at %s (flag -addr; without it a redis-server is started): %w", addr, err)
	}
	return e, nil
}

func (e *env) close() { _ = e.admin.Close() }

// client returns a client as users have it; pool 0 is the default PoolSize.
func (e *env) client(pool int) *redis.Client {
	return redis.NewClient(&redis.Options{Addr: e.addr, PoolSize: pool})
}

// count scales a number of messages.
func (e *env) count(n int) int { return max(20, int(float64(n)*e.size)) }

// duration scales a time.
func (e *env) duration(d time.Duration) time.Duration {
	return max(100*time.Millisecond, time.Duration(float64(d)*e.size))
}

// topic returns a name that no measurement had before.
func (e *env) topic() string { return "bench:" + watermill.NewShortUUID() }

// info returns a section of INFO.
func info(client redis.Cmdable, section string) (map[string]string, error) {
	text, err := client.Info(context.Background(), section).Result()
	fields := make(map[string]string)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			fields[name] = value
		}
	}
	return fields, err
}

// serverCPU returns the CPU time that the server has used, in seconds.
func serverCPU(client redis.Cmdable) (float64, error) {
	fields, err := info(client, "cpu")
	if err != nil {
		return 0, err
	}
	user, err := strconv.ParseFloat(fields["used_cpu_user"], 64)
	if err != nil {
		return 0, err
	}
	sys, err := strconv.ParseFloat(fields["used_cpu_sys"], 64)
	return user + sys, err
}

// counter is a hook that counts the commands of a client.
type counter struct{ n *atomic.Int64 }

func (c counter) DialHook(next redis.DialHook) redis.DialHook { return next }

func (c counter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		c.n.Add(1)
		return next(ctx, cmd)
	}
}

func (c counter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		c.n.Add(int64(len(cmds)))
		return next(ctx, cmds)
	}
}
