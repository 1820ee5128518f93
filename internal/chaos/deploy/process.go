package deploy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A setting is a line of a server's config.
type setting struct{ name, value string }

// nodePlan says how to start a node that is a process.
type nodePlan struct {
	name     string
	settings []setting
	args     []string // on the command line, where they win over the file
	bus      bool     // a Cluster's: it needs a port for the other nodes
}

// startNode starts a process at a free port of its own, and waits until it answers.
func (b *base) startNode(ctx context.Context, plan nodePlan) (*Node, error) {
	binary, err := b.config.binary()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.config.Dir, plan.name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	for {
		n, err := tryNode(ctx, binary, dir, plan)
		if !errors.Is(err, errPortTaken) || ctx.Err() != nil {
			return n, err
		}
	}
}

func tryNode(ctx context.Context, binary, dir string, plan nodePlan) (*Node, error) {
	port, err := reservePort()
	if err != nil {
		return nil, err
	}
	settings := slices.Concat([]setting{
		{"bind", "127.0.0.1"}, {"port", strconv.Itoa(port.number)}, {"dir", dir},
	}, plan.settings)
	if plan.bus {
		settings = append(settings, setting{"cluster-port", strconv.Itoa(port.number + busOffset)})
	}
	p := &process{binary: binary, dir: dir, port: port, args: plan.args}
	n := newNode(plan.name, fmt.Sprintf("127.0.0.1:%d", port.number), p)
	p.node = n
	if err := writeConfig(p.configFile(), settings); err != nil {
		return nil, errors.Join(err, n.close())
	}
	if err := p.startOnce(ctx); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

// writeConfig writes a file, because Sentinel and Redis update their config in it.
func writeConfig(file string, settings []setting) error {
	var text strings.Builder
	for _, s := range settings {
		fmt.Fprintf(&text, "%s %s\n", s.name, s.value)
	}
	return os.WriteFile(file, []byte(text.String()), 0o644)
}

// The ports are below those that the kernel gives to clients (32768 and above): while a server is down, a client could get its
// port, even one that dials that server, and would then talk to itself. The same is true of a Cluster's bus.
const (
	firstPort = 32000
	busOffset = 384
	ports     = 384
)

// A port stays ours while no server listens on it.
type port struct {
	number int
	claim  io.Closer
}

func reservePort() (port, error) {
	number, claim, err := ReservePort(firstPort, ports, 0, busOffset)
	return port{number, claim}, err
}

// ReservePort returns one of the count ports from first on, which is the caller's until the claim is closed, even while
// nothing listens on it: no other caller of ReservePort on this machine gets it. The ports at the offsets from it are free.
func ReservePort(first, count int, offsets ...int) (number int, claim io.Closer, err error) {
	for number := first; number < first+count; number++ {
		// What tells other processes is a socket without a file: it ends with its process.
		claim, err := net.Listen("unix", fmt.Sprintf("@goxstreams-chaos-port-%d", number))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		} else if err != nil {
			return 0, nil, err
		}
		if !slices.ContainsFunc(offsets, func(offset int) bool { return !free(number + offset) }) {
			return number, claim, nil
		}
		claim.Close()
	}
	return 0, nil, fmt.Errorf("no port is free from %d to %d", first, first+count-1)
}

func free(port int) bool {
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return false
	}
	l.Close()
	return true
}

// errPortTaken says that another program took the port.
var errPortTaken = errors.New("the port is taken")

// A process is a server that is a child of this process.
type process struct {
	binary string
	args   []string
	dir    string
	port   port
	node   *Node

	mu   sync.Mutex
	cmd  *exec.Cmd
	gone chan struct{} // closed when cmd has ended; nil before the first start
}

func (p *process) configFile() string { return filepath.Join(p.dir, "server.conf") }
func (p *process) logFile() string    { return filepath.Join(p.dir, "server.log") }

// start tries again while the port is taken: it belongs to this node, so another program has it only for a moment.
func (p *process) start(ctx context.Context) error {
	for {
		err := p.startOnce(ctx)
		if !errors.Is(err, errPortTaken) {
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// startOnce runs the server and waits until it answers.
func (p *process) startOnce(ctx context.Context) error {
	log, err := os.OpenFile(p.logFile(), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	before, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	cmd, gone, err := p.spawn(log)
	if err != nil {
		return err
	}
	for {
		err := p.answers(ctx, cmd)
		if err == nil {
			return nil
		}
		select {
		case <-gone:
			return p.ended(cmd, log, before)
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("no answer from %s (%w): %w", p.node, context.Cause(ctx), err), p.kill())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// answers returns an error until the server answers, and not another one in its place.
func (p *process) answers(ctx context.Context, cmd *exec.Cmd) error {
	if err := ping(p.node.Addr); err != nil {
		return err
	}
	return attempt(ctx, func(ctx context.Context) error {
		pid, err := p.node.infoField(ctx, "process_id")
		if err == nil && pid != strconv.Itoa(cmd.Process.Pid) {
			err = fmt.Errorf("process %s has the port", pid)
		}
		return err
	})
}

// ended says why the server ended at its start.
func (p *process) ended(cmd *exec.Cmd, log io.ReaderAt, before int64) error {
	text := make([]byte, 16<<10)
	n, _ := log.ReadAt(text, before)
	words := strings.TrimSpace(string(text[:n]))
	if strings.Contains(words, "Address already in use") {
		return fmt.Errorf("%s: %w", p.node.Addr, errPortTaken)
	}
	return fmt.Errorf("%s: %s\n%s", p.binary, cmd.ProcessState, words)
}

// spawn starts the process on a thread that lives until the process has ended: Pdeathsig kills the process when that thread
// dies, which may be before this program does.
func (p *process) spawn(log *os.File) (*exec.Cmd, <-chan struct{}, error) {
	cmd := exec.Command(p.binary, slices.Concat([]string{p.configFile()}, p.args)...)
	cmd.Stdout, cmd.Stderr = log, log
	// A group of its own: Ctrl-C reaches only this program, which ends the servers in its own time.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	gone := make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait()
		close(gone)
	}()
	if err := <-started; err != nil {
		return nil, nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cmd, p.gone = cmd, gone
	return cmd, gone, nil
}

// current returns the process that was started last, and a channel that is closed when it has ended.
func (p *process) current() (*exec.Cmd, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd, p.gone
}

func (p *process) running() bool {
	cmd, gone := p.current()
	if cmd == nil {
		return false
	}
	select {
	case <-gone:
		return false
	default:
		return true
	}
}

func (p *process) kill() error {
	if !p.running() {
		return nil
	}
	cmd, gone := p.current()
	if err := signal(cmd, syscall.SIGKILL); err != nil {
		return err
	}
	<-gone
	return nil
}

// askAgain is when a server that still runs is asked again to end. It refuses while it takes
// part in a failover, for example, and then forgets that it was asked. (By default it waits
// for its replicas for 10 s.)
const askAgain = 12 * time.Second

func (p *process) stop(ctx context.Context) error {
	if !p.running() {
		return nil
	}
	cmd, gone := p.current()
	for {
		if err := errors.Join(signal(cmd, syscall.SIGTERM), signal(cmd, syscall.SIGCONT)); err != nil {
			return err
		}
		select {
		case <-gone:
			return nil
		case <-time.After(askAgain):
		case <-ctx.Done():
			return fmt.Errorf("it does not end: %w", context.Cause(ctx))
		}
	}
}

// signal is no error if the process has ended already.
func signal(cmd *exec.Cmd, sig syscall.Signal) error {
	if err := cmd.Process.Signal(sig); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

func (p *process) freeze() error {
	return p.sendUntil(syscall.SIGSTOP, func(state byte) bool { return state == 'T' })
}
func (p *process) thaw() error {
	return p.sendUntil(syscall.SIGCONT, func(state byte) bool { return state != 'T' })
}

// sendUntil sends the signal and waits until the process is in the state that done accepts.
func (p *process) sendUntil(sig syscall.Signal, done func(state byte) bool) error {
	if !p.running() {
		return errors.New("it is not running")
	}
	cmd, _ := p.current()
	if err := cmd.Process.Signal(sig); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return until(ctx, func(context.Context) error {
		state, err := processState(cmd.Process.Pid)
		if err == nil && !done(state) {
			err = fmt.Errorf("state %c after %s", state, sig)
		}
		return err
	})
}

// processState returns the letter that ps shows: T is stopped.
func processState(pid int) (byte, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(stat), ") ")
	if !ok || rest == "" {
		return 0, fmt.Errorf("unknown form: %s", stat)
	}
	return rest[0], nil
}

func (p *process) disconnect() error { return errors.ErrUnsupported }
func (p *process) connect() error    { return errors.ErrUnsupported }

func (p *process) close() error { return errors.Join(p.kill(), p.port.claim.Close()) }
