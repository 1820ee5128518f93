// Package pipeline lets concurrent calls share a pipeline. It does not know what
// their commands do.
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
	// maxShared limits the commands in one shared pipeline: a call must not wait
	// for too many others.
	maxShared = 1000

	// maxBytes limits the size of a call that shares a pipeline. A larger call is
	// sent by itself, on another connection: if it takes long to transfer, or is so
	// large that the server closes the connection, that affects only its own
	// caller.
	maxBytes = 64 << 10

	// slowFlight is how long a pipeline may be in flight before the next call uses
	// another connection: longer than a round trip to a remote server. (If several
	// goroutines need connections at the same time, go-redis opens about twice as
	// many.)
	slowFlight = 100 * time.Millisecond
)

// Pipeline sends commands over one connection, and over up to the given number of
// connections while a pipeline takes long. Calls that arrive while a pipeline is in
// flight wait, and share the next one: a caller that finds a free connection sends at
// once, and then passes the connection to the first waiting call.
type Pipeline struct {
	client      redisx.Client
	connections int // 0: each call is sent by itself

	mu    sync.Mutex
	busy  int       // connections in use
	began time.Time // start of the last flight
	queue []*call
}

// New returns a Pipeline over the client. Only a single server's pipelines use one
// connection. With other clients a call would wait for the slowest node, so it is
// sent by itself.
//
// A caller returns when its context ends, even if its commands are in flight: unless
// that context cannot end, they run in a goroutine of their own, which the client's
// timeouts end.
func New(client redisx.Client, connections int) *Pipeline {
	if client.Single() == nil {
		connections = 0
	}
	return &Pipeline{client: client, connections: connections}
}

// call is a group of commands that stay together.
type call struct {
	cmds []redis.Cmder
	turn chan bool // for a waiting call: true: its caller has the connection; false: it was sent with others
}

// Process sends one command and returns its error. If that is ctx's error, the
// command may still be in flight, and must not be read.
func (l *Pipeline) Process(ctx context.Context, cmd redis.Cmder) error {
	if err := l.Do(ctx, cmd); err != nil {
		return err
	}
	return cmd.Err()
}

// Do sends the commands, in order and with nothing in between. Afterwards each has
// its own error. The error of Do itself means that they were not sent, or that ctx
// has ended and they may still be in flight.
func (l *Pipeline) Do(ctx context.Context, cmds ...redis.Cmder) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if l.connections == 0 || !small(cmds) {
		return l.run(ctx, func(ctx context.Context) { l.send(ctx, []*call{{cmds: cmds}}) })
	}
	l.mu.Lock()
	if l.busy == 0 || l.busy < l.connections && time.Since(l.began) > slowFlight {
		l.busy++
		return l.lead(ctx, &call{cmds: cmds})
	}
	c := &call{cmds: cmds, turn: make(chan bool, 1)}
	l.queue = append(l.queue, c)
	l.mu.Unlock()
	return l.await(ctx, c)
}

// await waits for the call's turn, or for its end. Waiting for a turn is like waiting for a
// connection, so that go-redis's PoolTimeout bounds it.
func (l *Pipeline) await(ctx context.Context, c *call) error {
	late := time.NewTimer(l.client.PoolTimeout())
	defer late.Stop()
	var slow <-chan time.Time
	if l.connections > 1 {
		timer := time.NewTimer(slowFlight)
		defer timer.Stop()
		slow = timer.C
	}
	for {
		select {
		case lead := <-c.turn:
			switch {
			case !lead:
				return nil
			case ctx.Err() != nil:
				l.pass()
				return ctx.Err()
			}
			l.mu.Lock()
			return l.lead(ctx, c)
		case <-slow:
			l.mu.Lock()
			if l.busy < l.connections && l.withdrawLocked(c) {
				l.busy++
				return l.lead(ctx, c)
			}
			l.mu.Unlock()
		case <-late.C:
			if l.withdraw(c) { // otherwise its turn has come
				return fmt.Errorf("earlier calls are still waiting for an answer: %w", redis.ErrPoolTimeout)
			}
		case <-ctx.Done():
			if !l.withdraw(c) {
				select {
				case lead := <-c.turn:
					if lead {
						l.pass()
					}
				default: // in flight
				}
			}
			return ctx.Err()
		}
	}
}

// lead sends the call together with waiting ones, and passes the connection on.
// l.mu must be locked; lead unlocks it.
func (l *Pipeline) lead(ctx context.Context, c *call) error {
	if l.connections > 1 {
		l.began = time.Now()
	}
	batch, n := []*call{c}, len(c.cmds)
	for _, next := range l.queue {
		if n += len(next.cmds); n > maxShared {
			break
		}
		batch = append(batch, next)
	}
	l.queue = slices.Delete(l.queue, 0, len(batch)-1)
	l.mu.Unlock()
	return l.run(ctx, func(ctx context.Context) { l.flight(ctx, batch) })
}

// run runs a flight: in a goroutine, if ctx may end, so that the caller can return. The
// flight then continues: it may carry other calls, and a Limiter would count its
// cancellation as a server failure.
func (l *Pipeline) run(ctx context.Context, flight func(context.Context)) error {
	if ctx.Done() == nil {
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
			c.turn <- false
		}
		l.pass()
	}()
	l.send(ctx, batch)
	sent = true
}

func (l *Pipeline) send(ctx context.Context, batch []*call) {
	if len(batch) == 1 && len(batch[0].cmds) == 1 {
		cmd := batch[0].cmds[0]
		cmd.SetErr(l.client.Process(ctx, cmd)) // a wrapped client may not have set it
		return
	}
	var cmds []redis.Cmder
	for _, c := range batch {
		cmds = append(cmds, c.cmds...)
	}
	if len(batch) > 1 {
		// A pipeline of several calls has no caller's values or cancellation.
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

// pass gives the connection to the first waiting call.
func (l *Pipeline) pass() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) == 0 {
		l.busy--
		return
	}
	l.queue[0].turn <- true
	l.queue = slices.Delete(l.queue, 0, 1)
}

// withdraw removes a call from the queue, if it is still there.
func (l *Pipeline) withdraw(c *call) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.withdrawLocked(c)
}

func (l *Pipeline) withdrawLocked(c *call) bool {
	i := slices.Index(l.queue, c)
	if i >= 0 {
		l.queue = slices.Delete(l.queue, i, i+1)
	}
	return i >= 0
}
