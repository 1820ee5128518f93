package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

// A server is a redis-server that this program started.
type server struct {
	addr string
	dir  string
	stop func()
}

// keeper is a shell script that starts a server, and ends it when its standard input
// ends: so the server ends with this program, however that ends.
const keeper = `dir=$1; shift
"$@" & pid=$!
trap 'kill $pid; wait $pid; rm -rf "$dir"' EXIT
read -r _`

// startServer runs the binary on a free port, in a directory of its own,
// without persistence, and waits until it answers.
func startServer(binary string, args ...string) (*server, error) {
	path, err := exec.LookPath(binary)
	if err != nil {
		return nil, fmt.Errorf("no Redis: %w (name a redis-server with -redis, or a running server with -addr)", err)
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "benchmarks")
	if err != nil {
		return nil, err
	}
	log := filepath.Join(dir, "log")
	command := append([]string{"-c", keeper, "sh", dir, path, "--bind", "127.0.0.1", "--port", strconv.Itoa(port),
		"--dir", dir, "--logfile", log, "--save", "", "--appendonly", "no"}, args...)
	cmd := exec.Command("sh", command...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C ends this program, which ends the server
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	s := &server{addr: fmt.Sprintf("127.0.0.1:%d", port), dir: dir}
	s.stop = func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	}
	if err := awaitServer(s.addr, dir); err != nil {
		logged, _ := os.ReadFile(log)
		s.stop()
		return nil, fmt.Errorf("%s (flag -redis) does not answer: %w\n%s%s", path, err, output.Bytes(), logged)
	}
	return s, nil
}

// freePort returns a port below the range from which clients get theirs.
func freePort() (int, error) {
	for port := 21000 + os.Getpid()%500; port < 22000; port++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("no free port below 22000")
}

// awaitServer waits for the server that works in dir: if another program has taken
// the port, that may be a server too.
func awaitServer(addr, dir string) error {
	client := redis.NewClient(&redis.Options{Addr: addr, MaxRetries: -1})
	defer client.Close()
	var err error
	for range 500 {
		var config map[string]string
		if config, err = client.ConfigGet(context.Background(), "dir").Result(); err == nil {
			if config["dir"] != dir {
				return fmt.Errorf("%s was taken by another server meanwhile", addr)
			}
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}
