package sim

import (
	"context"
	"runtime"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// quiet keeps go-redis from logging the errors that every fault causes.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

func init() { redis.SetLogger(quiet{}) }

// A node is what all processes have in common: a way to the server, a client, an end.
type node struct {
	sim    *simulation
	name   string
	life   int
	lane   *lane
	client *redis.Client
	dead   chan struct{} // closed when it is killed: it does nothing more

	mu     sync.Mutex
	gone   bool
	halted chan struct{} // closed while the process is not stopped
	stops  int
}

func (s *simulation) newNode(name string, life int, opt redis.Options) *node {
	n := &node{
		sim: s, name: name, life: life, dead: make(chan struct{}), halted: closedChannel(),
		lane: s.network.lane(name, life, s.schedule.Latency),
	}
	opt.Addr = "10.0.0.1:6379" // never dialed; a name would be looked up outside the bubble
	opt.Dialer = n.lane.dial
	// go-redis keeps the timers of callers that wait for a connection in a global pool,
	// which bubbles must not share: so nobody may wait.
	opt.PoolSize, opt.PipelinePoolSize = 500, 500
	// go-redis holds a mutex while it asks for these.
	opt.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	n.client = redis.NewClient(&opt)
	return n
}

// log adds an event of the process, unless it is dead.
func (n *node) log(group int, e rules.Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.gone {
		n.logLocked(group, e)
	}
}

func (n *node) logLocked(group int, e rules.Event) {
	e.Process, e.Life = n.name, n.life
	n.sim.journal.add(group, e)
}

// end logs the process's end. It returns false if it had ended before.
func (n *node) end(kind rules.Kind, err string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.gone {
		return false
	}
	n.logLocked(everyGroup, rules.Event{Kind: kind, Error: err})
	n.gone = true
	close(n.dead)
	if n.stops > 0 {
		n.stops = 0
		n.lane.unblock()
		close(n.halted)
	}
	return true
}

// kill is SIGKILL, after which the machine sends what was written (flush), or the loss of
// the machine.
func (n *node) kill(kind rules.Kind, err string, flush bool) bool {
	if !n.end(kind, err) {
		return false
	}
	n.lane.kill(flush)
	_ = n.client.Close()
	return true
}

// exit is a clean end of the process: its connections are closed.
func (n *node) exit() {
	if n.end(rules.Ended, "") {
		_ = n.client.Close()
		n.lane.kill(true)
	}
}

// stop is SIGSTOP: nothing gets in or out, and the simulation's own code pauses.
func (n *node) stop() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.gone {
		return
	}
	if n.stops++; n.stops == 1 {
		n.halted = make(chan struct{})
		n.lane.block()
		n.logLocked(everyGroup, rules.Event{Kind: rules.Stopped})
	}
}

// cont is SIGCONT.
func (n *node) cont() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.gone || n.stops == 0 {
		return
	}
	if n.stops--; n.stops == 0 {
		n.logLocked(everyGroup, rules.Event{Kind: rules.Continued})
		n.lane.unblock()
		close(n.halted)
	}
}

// await waits while the process is stopped.
func (n *node) await() {
	for {
		n.mu.Lock()
		halted, stopped := n.halted, n.stops > 0
		n.mu.Unlock()
		if !stopped {
			return
		}
		<-halted
	}
}

// pass does so too. In a dead process it does not return: the goroutine ends.
func (n *node) pass() {
	if n.await(); n.isDead() {
		runtime.Goexit()
	}
}

func (n *node) isDead() bool {
	return isClosed(n.dead)
}

// A runner is a process.
type runner interface {
	base() *node
	// close ends it cleanly, and returns when it has ended.
	close()
}

func (n *node) base() *node { return n }

// A place is where one process runs after the other.
type place struct {
	sim  *simulation
	name string
	boot func(life int) runner

	mu    sync.Mutex
	now   runner // nil: none yet
	life  int
	ended bool // no process starts any more
}

// start starts a process, if none runs.
func (p *place) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended || p.now != nil && !p.now.base().isDead() {
		return
	}
	p.life++
	p.sim.journal.add(everyGroup, rules.Event{Kind: rules.Spawned, Process: p.name, Life: p.life})
	p.now = p.boot(p.life)
}

// startLater starts a successor after a delay, like a supervisor.
func (p *place) startLater(delay time.Duration) {
	p.sim.goes(func() {
		if p.sim.wait(delay) {
			p.start()
		}
	})
}

// current returns the running process; nil: none.
func (p *place) current() runner {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now == nil || p.now.base().isDead() {
		return nil
	}
	return p.now
}

// kill kills the running process.
func (p *place) kill(flush bool) {
	if r := p.current(); r != nil && r.base().kill(rules.Ended, "", flush) {
		p.sim.goes(r.close)
	}
}

// close ends the running process cleanly, and returns when it has ended.
func (p *place) close() {
	if r := p.current(); r != nil {
		r.close()
	}
}

// endForGood does so too, and no successor starts.
func (p *place) endForGood() {
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	p.close()
}
