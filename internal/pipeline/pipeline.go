// Package pipeline lets calls that come at the same time share a pipeline. It does
// not know what they are.
package pipeline

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

const (
	// maxShared bounds the commands of one pipeline of several calls: a call must
	// not wait for very many others.
	maxShared = 1000

	// maxBytes bounds the bytes of a call that shares a pipeline. A larger one goes
	// by itself, on another connection: what takes long to transfer, or is refused
	// together with its connection for its size, is its own caller's affair.
	maxBytes = 64 << 10

	// slowFlight is how long a call may be under way before the next one takes
	// another connection: more than a round trip to a far server. (Where several
	// goroutines want connections at once, go-redis opens about twice as many.)
	slowFlight = 100 * time.Millisecond
)

// Pipeline sends commands over one connection, and up to connections of them where one takes
// long. What comes while a call is under way waits, and shares the next pipeline.
// There is no delay: a caller that finds the line free sends at once, and then
// passes it on to the first that waits.
//
// (go-redis's own AutoPipeline does likewise, but does not keep the commands of
// one call together, which MULTI and EXEC need.)
type Pipeline struct {
	client      redisx.Client
	connections int // 0: each call goes by itself
	leave       bool

	mu     sync.Mutex
	busy   int       // connections
	began  time.Time // the last flight
	queue  []*call
	expiry *time.Timer // of calls that wait for too long; nil: none is set
}

// New returns a line over the client. Only a single server's pipelines are one
// connection: elsewhere a call would wait for the slowest of the nodes, and goes by
// itself.
//
// With leave a caller can go when its context ends, though its commands are under
// way: they then run in a goroutine of their own, which ends when the client's
// timeouts let it.
func New(client redisx.Client, connections int, leave bool) *Pipeline {
	if client.Single() == nil {
		connections = 0
	}
	return &Pipeline{client: client, connections: connections, leave: leave}
}

// call is some commands on their way. They stay together.
type call struct {
	cmds  []redis.Cmder
	turn  chan turn // for one that waits
	since time.Time // when it began to wait
}

// turn is the end of a call's wait.
type turn uint8

const (
	done turn = iota // it was sent with others
	lead             // the connection is its caller's
	late             // it has waited for too long
)

// Process sends one command and returns its error. If that is the end of ctx,
// the command may still be under way, and must not be read.
func (l *Pipeline) Process(ctx context.Context, cmd redis.Cmder) error {
	if err := l.Do(ctx, cmd); err != nil {
		return err
	}
	return cmd.Err()
}

// Do sends the commands, in their order and with nothing in between. Each has its
// own error then. The error of Do itself says that they were not sent, or that ctx
// has ended and they may still be under way.
func (l *Pipeline) Do(ctx context.Context, cmds ...redis.Cmder) error {
	if l.leave {
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if l.connections == 0 || !small(cmds) {
		return l.run(ctx, func(ctx context.Context) { l.send(ctx, []*call{{cmds: cmds}}) })
	}
	l.mu.Lock()
	if l.busy == 0 || l.busy < l.connections && time.Since(l.began) > slowFlight {
		l.busy++
		return l.lead(ctx, &call{cmds: cmds})
	}
	c := &call{cmds: cmds, turn: make(chan turn, 1), since: time.Now()}
	l.queue = append(l.queue, c)
	if l.expiry == nil {
		l.expiry = time.AfterFunc(l.client.PoolTimeout(), l.expire)
	}
	l.mu.Unlock()
	return l.await(ctx, c)
}

// await waits for the call's turn, or for its end.
func (l *Pipeline) await(ctx context.Context, c *call) error {
	var slow <-chan time.Time
	if l.connections > 1 {
		timer := time.NewTimer(slowFlight)
		defer timer.Stop()
		slow = timer.C
	}
	for {
		select {
		case t := <-c.turn:
			switch {
			case t == done:
				return nil
			case t == late:
				return fmt.Errorf("calls before this one have no answer: %w", redis.ErrPoolTimeout)
			case ctx.Err() != nil:
				l.pass()
				return ctx.Err()
			}
			l.mu.Lock()
			return l.lead(ctx, c)
		case <-slow:
			l.mu.Lock()
			if l.busy < l.connections && l.unqueueLocked(c) {
				l.busy++
				return l.lead(ctx, c)
			}
			l.mu.Unlock()
		case <-ctx.Done():
			l.abandon(c)
			return ctx.Err()
		}
	}
}

// expire ends the calls that have waited for longer than go-redis lets one wait for
// a connection: to wait for a turn is no different.
func (l *Pipeline) expire() {
	patience := l.client.PoolTimeout()
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) > 0 && time.Since(l.queue[0].since) >= patience {
		l.shiftLocked().turn <- late
	}
	l.expiry = nil
	if len(l.queue) > 0 {
		l.expiry = time.AfterFunc(patience-time.Since(l.queue[0].since), l.expire)
	}
}

// lead sends the call with those that wait, and passes the connection on. l.mu is held
// before, and not after.
func (l *Pipeline) lead(ctx context.Context, c *call) error {
	if l.connections > 1 {
		l.began = time.Now()
	}
	batch := []*call{c}
	for n := len(c.cmds); len(l.queue) > 0 && n+len(l.queue[0].cmds) <= maxShared; {
		next := l.shiftLocked()
		n += len(next.cmds)
		batch = append(batch, next)
	}
	l.mu.Unlock()
	return l.run(ctx, func(ctx context.Context) { l.flight(ctx, batch) })
}

// run runs a flight: with leave beside the caller, who can go. The flight goes on
// then: others may be in it, and a Limiter would take its end for the server's fault.
func (l *Pipeline) run(ctx context.Context, flight func(context.Context)) error {
	if !l.leave {
		flight(ctx)
		return nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		flight(context.WithoutCancel(ctx))
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *Pipeline) flight(ctx context.Context, batch []*call) {
	sent := false
	defer func() {
		for _, c := range batch[1:] {
			if !sent {
				for _, cmd := range c.cmds {
					cmd.SetErr(errors.New("a hook of the client panicked"))
				}
			}
			c.turn <- done
		}
		l.pass()
	}()
	l.send(ctx, batch)
	sent = true
}

func (l *Pipeline) send(ctx context.Context, batch []*call) {
	if len(batch) == 1 && len(batch[0].cmds) == 1 {
		_ = l.client.Process(ctx, batch[0].cmds[0])
		return
	}
	var cmds []redis.Cmder
	for _, c := range batch {
		cmds = append(cmds, c.cmds...)
	}
	if len(batch) > 1 {
		// Several callers' commands carry nobody's values, and end with nobody.
		ctx = context.Background()
	}
	redisx.ExecPipeline(ctx, l.client, cmds)
}

// small reports whether the commands may share a pipeline.
func small(cmds []redis.Cmder) bool {
	n := 0
	for _, cmd := range cmds {
		for _, arg := range cmd.Args() {
			switch arg := arg.(type) {
			case string:
				n += len(arg)
			case []byte:
				n += len(arg)
			}
		}
		if n > maxBytes {
			return false
		}
	}
	return true
}

// pass gives the connection to the first that waits.
func (l *Pipeline) pass() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if next := l.shiftLocked(); next != nil {
		next.turn <- lead
		return
	}
	l.busy--
}

// abandon takes back a call whose caller does not wait any more.
func (l *Pipeline) abandon(c *call) {
	l.mu.Lock()
	waited := l.unqueueLocked(c)
	l.mu.Unlock()
	if waited {
		return
	}
	select {
	case t := <-c.turn:
		if t == lead {
			l.pass()
		}
	default: // under way
	}
}

// unqueueLocked takes a call out of the queue, if it is still there.
func (l *Pipeline) unqueueLocked(c *call) bool {
	i := slices.Index(l.queue, c)
	if i >= 0 {
		l.queue = slices.Delete(l.queue, i, i+1)
	}
	return i >= 0
}

func (l *Pipeline) shiftLocked() *call {
	if len(l.queue) == 0 {
		return nil
	}
	first := l.queue[0]
	l.queue[0] = nil
	l.queue = l.queue[1:]
	return first
}
