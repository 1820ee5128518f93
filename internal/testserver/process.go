package testserver

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// portAttempts is how often a server is started again because another program took
// its port.
const portAttempts = 5

// startProcess starts a redis-server or valkey-server from the PATH.
func startProcess(args ...string) (*Server, error) {
	binary, err := lookServer()
	if err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		srv, err := runProcess(binary, args)
		if err == nil || attempt == portAttempts || !portTaken(err) {
			return srv, err
		}
	}
}

func lookServer() (string, error) {
	redis, err := exec.LookPath("redis-server")
	if err != nil {
		if valkey, err := exec.LookPath("valkey-server"); err == nil {
			return valkey, nil
		}
	}
	return redis, err
}

func runProcess(binary string, args []string) (_ *Server, err error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "testserver")
	if err != nil {
		return nil, err
	}
	p := &process{
		binary: binary,
		args:   slices.Concat([]string{"--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--dir", dir}, baseArgs, args),
		dir:    dir,
		addr:   fmt.Sprintf("127.0.0.1:%d", port),
	}
	// Prepare lastWill first, so that no server ever runs without it.
	p.revoke, err = lastWill(`kill -9 "$(cat "$1")"; rm -rf "$2"`, p.pidFile(), dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	info, err := p.start()
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	return &Server{addr: p.addr, version: info.version(), backend: p}, nil
}

// freePort returns a TCP port that is free at this moment, below the range of
// ephemeral ports: while a server is down, a client could otherwise get its port,
// even one that dials the server and then talks to itself.
func freePort() (int, error) {
	const first, last = 15000, 32000
	for {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+rand.IntN(last-first)))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		} else if err != nil {
			return 0, err
		}
		defer l.Close()
		return l.Addr().(*net.TCPAddr).Port, nil
	}
}

// portTaken reports whether Redis's or Docker's error says that the port was taken
// in the meantime: "Address already in use", "port is already allocated".
func portTaken(err error) bool { return strings.Contains(err.Error(), " already ") }

// process is a redis-server that is a child of this process.
type process struct {
	binary string
	args   []string
	dir    string
	addr   string
	revoke func()

	mu  sync.Mutex
	cmd *exec.Cmd
	// gone is closed when cmd has ended.
	gone chan struct{}
	// kept means that a clean exit was caused by RestartCommand, and cmd must be
	// started again.
	kept bool
}

func (p *process) pidFile() string { return filepath.Join(p.dir, "testserver.pid") }
func (p *process) logFile() string { return filepath.Join(p.dir, "testserver.log") }

// start runs the server and waits until it answers.
func (p *process) start() (info, error) {
	p.mu.Lock()
	err := p.spawnLocked()
	cmd, gone := p.cmd, p.gone
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}
	info, err := await(p.addr, startTimeout, func() error {
		select {
		case <-gone:
			log, _ := os.ReadFile(p.logFile())
			return fmt.Errorf("%s: %s\n%s", p.binary, cmd.ProcessState, bytes.TrimSpace(log))
		default:
			return nil
		}
	})
	if err != nil {
		return nil, err
	}
	if pid := strconv.Itoa(cmd.Process.Pid); info["process_id"] != pid {
		return nil, fmt.Errorf("%s is already taken by process %s", p.addr, info["process_id"])
	}
	p.mu.Lock()
	p.kept = true
	p.mu.Unlock()
	return info, nil
}

func (p *process) spawnLocked() error {
	log, err := os.OpenFile(p.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(p.binary, p.args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C ends the test, which ends the server
	if err := cmd.Start(); err != nil {
		return err
	}
	p.cmd, p.gone = cmd, make(chan struct{})
	go p.reap(cmd, p.gone)
	return os.WriteFile(p.pidFile(), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600)
}

// reap waits for the end of cmd. It is the only caller of cmd.Wait, and ends with
// the process.
func (p *process) reap(cmd *exec.Cmd, gone chan struct{}) {
	_ = cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	// Do not restart after a crash: the test must see it, and a server that cannot
	// start must not be started forever.
	if p.kept && cmd.ProcessState.Success() {
		if err := p.spawnLocked(); err != nil {
			stderr("testserver: restarting %s: %v", p.binary, err)
		}
	}
	close(gone)
}

// stop ends the server for good: with sig, and after 5 s with SIGKILL.
func (p *process) stop(sig syscall.Signal) error {
	p.mu.Lock()
	p.kept = false
	cmd, gone := p.cmd, p.gone
	p.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := signal(cmd, sig); err != nil {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-time.After(5 * time.Second):
	}
	err := signal(cmd, syscall.SIGKILL)
	<-gone
	return err
}

// signal ignores that the process has already ended.
func signal(cmd *exec.Cmd, sig syscall.Signal) error {
	if err := cmd.Process.Signal(sig); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

func (p *process) freeze() error { return p.send(syscall.SIGSTOP) }
func (p *process) thaw() error   { return p.send(syscall.SIGCONT) }
func (p *process) kill() error   { return p.stop(syscall.SIGKILL) }

func (p *process) send(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Signal(sig)
}

func (p *process) restart() error {
	if err := p.stop(syscall.SIGTERM); err != nil {
		return err
	}
	_, err := p.start()
	return err
}

// restartCommand ends the server; reap starts it again.
func (p *process) restartCommand() []string {
	return []string{"sh", "-c", `kill "$(cat "$1")"`, "sh", p.pidFile()}
}

func (p *process) peerAddr() (string, error) { return p.addr, nil }

func (p *process) close() error {
	err := p.stop(syscall.SIGKILL)
	p.revoke()
	return errors.Join(err, os.RemoveAll(p.dir))
}
