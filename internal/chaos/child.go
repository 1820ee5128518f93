package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// endTimeout is how long a child may take to end by itself. On a busy machine, after a fault, it needs more than its CloseTimeout.
const endTimeout = time.Minute

// hash spreads a name and a number over the seeds.
func hash(name string, number int) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s/%d", name, number)
	return h.Sum64()
}

// A Place is where one child process runs after the other.
type Place struct {
	role    Role
	journal *Journal

	mu       sync.Mutex
	process  *os.Process
	gone     chan struct{} // closed when the process has ended and that is logged
	expected bool          // we ended it
	revival  *time.Timer   // starts the successor of a process that ended by itself
	err      error         // of that start
}

func newPlace(role Role, journal *Journal) *Place { return &Place{role: role, journal: journal} }

func (p *Place) name() string { return p.role.Process }

// start starts the next process, unless there is one.
func (p *Place) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.startLocked()
}

func (p *Place) startLocked() error {
	if p.runningLocked() {
		return nil
	}
	p.role.Life++
	cmd, wait, err := p.role.spawn()
	if err != nil {
		return fmt.Errorf("start %s: %w", p.name(), err)
	}
	p.process, p.gone, p.expected = cmd.Process, make(chan struct{}), false
	p.journal.write(p.event(rules.Spawned))
	go p.reap(p.event(rules.Ended), wait, p.gone)
	return nil
}

func (p *Place) event(kind rules.Kind) rules.Event {
	return rules.Event{Kind: kind, Process: p.name(), Life: p.role.Life, PID: p.process.Pid}
}

// reap waits for the process's end and logs it.
func (p *Place) reap(event rules.Event, wait <-chan error, gone chan struct{}) {
	err := <-wait
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		event.Error = err.Error()
	}
	if !p.expected {
		event.Kind = rules.Died
		p.revival = time.AfterFunc(revivalDelay, p.revive)
	}
	p.journal.write(event)
	close(gone)
}

// revivalDelay is how long a supervisor takes to notice that a process is gone.
const revivalDelay = 200 * time.Millisecond

// revive starts the successor of a process that ended by itself, unless somebody has ended the place meanwhile.
func (p *Place) revive() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.revival != nil {
		p.err = errors.Join(p.err, p.startLocked())
	}
}

// spawn starts the process on a thread that lives until the process has ended: Pdeathsig kills the process when that thread
// dies, which may be before this program does.
func (r Role) spawn() (*exec.Cmd, <-chan error, error) {
	role, err := json.Marshal(r)
	if err != nil {
		return nil, nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	output, err := os.OpenFile(filepath.Join(r.Dir, r.Process+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, nil, err
	}
	defer output.Close()
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), roleEnv+"="+string(role))
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	return cmd, ended, <-started
}

func (p *Place) runningLocked() bool {
	if p.process == nil {
		return false
	}
	select {
	case <-p.gone:
		return false
	default:
		return true
	}
}

// signal sends sig to the process if one runs, and logs it first. ends says that the process is to end, without a successor.
func (p *Place) signal(sig syscall.Signal, kind rules.Kind, ends bool) (gone <-chan struct{}, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ends {
		p.revival = nil
	}
	if !p.runningLocked() {
		return p.gone, p.err
	}
	p.expected = p.expected || ends
	if kind != "" {
		p.journal.write(p.event(kind))
	}
	if err := p.process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return nil, fmt.Errorf("%s to %s: %w", sig, p.name(), err)
	}
	return p.gone, nil
}

// kill returns when the process is gone.
func (p *Place) kill() error {
	gone, err := p.signal(syscall.SIGKILL, "", true)
	if err == nil && gone != nil {
		<-gone
	}
	return err
}

func (p *Place) stop() error {
	_, err := p.signal(syscall.SIGSTOP, rules.Stopped, false)
	return err
}

func (p *Place) thaw() error {
	_, err := p.signal(syscall.SIGCONT, rules.Continued, false)
	return err
}

// close sends SIGTERM, and SIGKILL if the process has not ended in time.
func (p *Place) close() error {
	gone, err := p.signal(syscall.SIGTERM, rules.Closing, true)
	if err != nil || gone == nil {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-time.After(endTimeout):
		return errors.Join(fmt.Errorf("%s does not end in %v", p.name(), endTimeout), p.kill())
	}
}
