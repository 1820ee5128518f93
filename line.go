package goxstreams

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// maxShared bounds the commands of one pipeline of several calls: a call must
// not wait for very many others.
const maxShared = 1000

// slowFlight is how long a call may be under way before the next one takes another
// lane: more than a round trip to a far server. (Where several goroutines want
// connections at once, go-redis opens about twice as many.)
const slowFlight = 100 * time.Millisecond

// line sends commands over one connection, and up to lanes of them where one
// takes long. What comes while a call is under way waits, and shares the next
// pipeline. There is no goroutine, and no delay: whoever finds the line free sends
// at once, and then passes it on to the first who waits.
//
// (go-redis's own AutoPipeline does likewise, but does not keep the commands of
// one call together, which MULTI and EXEC need.)
type line struct {
	client redis.UniversalClient
	lanes  int // 0: each call goes by itself

	mu    sync.Mutex
	busy  int       // lanes
	began time.Time // the last flight
	queue []*call
}

// newLine returns a line over the client. Only a single node's pipelines are one
// connection: in a Cluster a call would wait for the slowest of the nodes.
func newLine(client redis.UniversalClient, lanes int) *line {
	if _, ok := client.(*redis.Client); !ok {
		lanes = 0
	}
	return &line{client: client, lanes: lanes}
}

// call is some commands on their way. They stay together.
type call struct {
	cmds []redis.Cmder
	turn chan bool // for one that waits: true: the lane is yours; false: it is done
	left bool      // nobody waits for it any more; guarded by line.mu
}

// Process sends one command and returns its error. If that is the end of ctx,
// the command may still be under way, and must not be read.
func (l *line) Process(ctx context.Context, cmd redis.Cmder) error {
	if l.lanes == 0 {
		return l.client.Process(ctx, cmd)
	}
	if err := l.do(ctx, cmd); err != nil {
		return err
	}
	return cmd.Err()
}

// do sends the commands, in their order and with nothing in between. Each has its
// own error then, unless ctx ended before.
func (l *line) do(ctx context.Context, cmds ...redis.Cmder) error {
	l.mu.Lock()
	if l.busy == 0 || l.busy < l.lanes && time.Since(l.began) > slowFlight {
		l.busy++
		l.fly(ctx, &call{cmds: cmds})
		return nil
	}
	c := &call{cmds: cmds, turn: make(chan bool, 1)}
	l.queue = append(l.queue, c)
	l.mu.Unlock()
	var slow <-chan time.Time
	if l.lanes > 1 {
		timer := time.NewTimer(slowFlight)
		defer timer.Stop()
		slow = timer.C
	}
	for {
		select {
		case lead := <-c.turn:
			if !lead {
				return nil
			}
			if ctx.Err() != nil {
				l.pass()
				return ctx.Err()
			}
			l.mu.Lock()
			l.fly(ctx, c)
			return nil
		case <-slow:
			l.mu.Lock()
			if l.busy < l.lanes && l.unqueueLocked(c) {
				l.busy++
				l.fly(ctx, c)
				return nil
			}
			l.mu.Unlock()
		case <-ctx.Done():
			l.leave(c)
			return ctx.Err()
		}
	}
}

// fly sends the call with those that wait, and passes the lane on. l.mu is held
// before, and not after.
func (l *line) fly(ctx context.Context, c *call) {
	if l.lanes > 1 {
		l.began = time.Now()
	}
	batch := []*call{c}
	for n := len(c.cmds); len(l.queue) > 0 && n+len(l.queue[0].cmds) <= maxShared; {
		next := shift(&l.queue)
		n += len(next.cmds)
		batch = append(batch, next)
	}
	l.mu.Unlock()

	sent := false
	defer func() {
		var unsent []*call
		for _, c := range batch[1:] {
			switch {
			case !sent:
				for _, cmd := range c.cmds {
					cmd.SetErr(errors.New("a hook of the client panicked"))
				}
			case ctx.Err() != nil && c.failedBy(ctx.Err()):
				unsent = append(unsent, c)
				continue
			}
			c.turn <- false
		}
		l.mu.Lock()
		unsent = slices.DeleteFunc(unsent, func(c *call) bool { return c.left })
		l.queue = append(unsent, l.queue...)
		l.mu.Unlock()
		l.pass()
	}()
	l.send(ctx, batch)
	sent = true
}

// failedBy reports whether the call failed by the end of the context that it was
// sent under, another call's: while it waited for a connection, since go-redis
// looks at that only before it sends. (It sends nothing twice here.)
func (c *call) failedBy(end error) bool {
	for _, cmd := range c.cmds {
		if !errors.Is(cmd.Err(), end) {
			return false
		}
	}
	return true
}

func (l *line) send(ctx context.Context, batch []*call) {
	if len(batch) == 1 && len(batch[0].cmds) == 1 {
		_ = l.client.Process(ctx, batch[0].cmds[0])
		return
	}
	var cmds []redis.Cmder
	for _, c := range batch {
		cmds = append(cmds, c.cmds...)
	}
	execPipeline(ctx, l.client, cmds)
}

// execPipeline sends the commands together. Each has its own error then, also where
// go-redis has given it none: if the server refuses the connection that they were to
// be sent on (a password that was changed, say), it returns that answer, but leaves
// the commands as if they had succeeded, with nothing in their replies.
func execPipeline(ctx context.Context, client redis.UniversalClient, cmds []redis.Cmder) {
	pipe := client.Pipeline()
	for _, cmd := range cmds {
		_ = pipe.Process(ctx, cmd)
	}
	_, err := pipe.Exec(ctx)
	if err == nil || slices.ContainsFunc(cmds, func(cmd redis.Cmder) bool { return cmd.Err() != nil }) {
		return
	}
	for _, cmd := range cmds {
		cmd.SetErr(err)
	}
}

// pass gives the lane to the first who waits.
func (l *line) pass() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if next := shift(&l.queue); next != nil {
		next.turn <- true
		return
	}
	l.busy--
}

// leave takes back a call whose caller does not wait any more.
func (l *line) leave(c *call) {
	l.mu.Lock()
	waited := l.unqueueLocked(c)
	c.left = true // or it would be given a lane after it was under way in vain
	l.mu.Unlock()
	if waited {
		return
	}
	select {
	case lead := <-c.turn:
		if lead {
			l.pass()
		}
	default: // under way
	}
}

// unqueueLocked takes a call out of the queue, if it is still there.
func (l *line) unqueueLocked(c *call) bool {
	i := slices.Index(l.queue, c)
	if i >= 0 {
		l.queue = slices.Delete(l.queue, i, i+1)
	}
	return i >= 0
}
