package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// dockerTimeout bounds a command of Docker's, which takes well below a second unless it hangs.
const dockerTimeout = 20 * time.Second

// Container starts one server in a container of config.Image. It has a network and an address of its own, at which this machine
// reaches it without a published port, so that its Node can Disconnect and Connect. That takes a Docker on this very machine.
func Container(ctx context.Context, config Config) (*SingleDeployment, error) {
	b, err := newBase(config)
	if err != nil {
		return nil, err
	}
	n, err := b.startContainer(ctx)
	if err != nil {
		return nil, b.failed("a container of "+config.Image, err)
	}
	return b.single(n), nil
}

func (b *base) startContainer(ctx context.Context) (*Node, error) {
	// The image's own command is kept: it names the server, redis-server or valkey-server.
	command, err := docker(ctx, "image", "inspect", "--format", `{{join .Config.Cmd "\n"}}`, b.config.Image)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoServer, err)
	}
	dir := filepath.Join(b.config.Dir, "container")
	if err := os.Mkdir(dir, 0o777); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o777); err != nil { // the image's user writes to it
		return nil, err
	}
	network, ip, err := createNetwork(ctx)
	if err != nil {
		return nil, err
	}
	c := &box{network: network, ip: ip, addr: net.JoinHostPort(ip, "6379")}
	if c.revoke, err = lastWill(`docker rm --force --volumes "$1"; docker network rm "$1"`, network); err != nil {
		return nil, errors.Join(err, c.close())
	}
	args := []string{"create", "--name", network, "--network", network, "--ip", ip, "--volume", dir + ":/data", b.config.Image}
	args = slices.Concat(args, strings.Split(command, "\n"), []string{"--dir", "/data", "--logfile", "server.log"})
	for _, s := range b.config.persistence() {
		args = append(args, "--"+s.name, strings.Trim(s.value, `"`))
	}
	if _, err := docker(ctx, append(args, b.config.Args...)...); err != nil {
		return nil, errors.Join(err, c.close())
	}
	n := newNode("container", c.addr, c)
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

// createNetwork returns a network's name and an address in it. Only a network with a given subnet lets a container have
// the same address again.
func createNetwork(ctx context.Context) (name, ip string, err error) {
	for i := range 256 {
		name = fmt.Sprintf("goxstreams-chaos-%d-%d", os.Getpid(), i)
		_, err = docker(ctx, "network", "create", "--subnet", fmt.Sprintf("10.213.%d.0/24", i), name)
		if err == nil {
			return name, fmt.Sprintf("10.213.%d.10", i), nil
		}
		if !strings.Contains(err.Error(), "overlaps") { // another network has these addresses
			return "", "", err
		}
	}
	return "", "", err
}

// docker runs the program instead of using a client library: it finds the Docker that the user means, and adds no dependency.
func docker(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, dockerTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("docker %s: %w: %s", args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(out)), nil
}

// A box is a server in a container. The network's name is the container's, too.
type box struct {
	network string
	ip      string
	addr    string
	revoke  func()
}

func (c *box) start(ctx context.Context) error {
	if _, err := docker(ctx, "start", c.network); err != nil {
		return err
	}
	return until(ctx, func(context.Context) error {
		err := ping(c.addr)
		if err != nil && !c.running() {
			log, _ := docker(ctx, "logs", "--tail", "20", c.network)
			err = fmt.Errorf("%w; the container has ended: %s", err, log)
		}
		return err
	})
}

func (c *box) running() bool {
	state, err := c.call("inspect", "--format", "{{.State.Running}}")
	return err == nil && state == "true"
}

func (c *box) paused() bool {
	state, err := c.call("inspect", "--format", "{{.State.Paused}}")
	return err == nil && state == "true"
}

// call runs a command of Docker's on the container.
func (c *box) call(args ...string) (string, error) {
	return docker(context.Background(), append(args, c.network)...)
}

func (c *box) kill() error {
	if !c.running() {
		return nil
	}
	if err := c.unpause(); err != nil { // Docker kills no paused container
		return err
	}
	if _, err := c.call("kill"); err != nil {
		return err
	}
	_, err := c.call("wait")
	return err
}

// stop does not use docker stop, which sends SIGKILL after a while.
func (c *box) stop(ctx context.Context) error {
	if !c.running() {
		return nil
	}
	if err := c.unpause(); err != nil {
		return err
	}
	if _, err := c.call("kill", "--signal", "TERM"); err != nil {
		return err
	}
	_, err := docker(ctx, "wait", c.network)
	return err
}

func (c *box) unpause() error {
	if !c.paused() {
		return nil
	}
	return c.thaw()
}

// freeze asks again when the kernel has not stopped all threads soon enough for Docker, as on a busy machine.
func (c *box) freeze() error {
	ctx, cancel := context.WithTimeout(context.Background(), dockerTimeout)
	defer cancel()
	return until(ctx, func(context.Context) error {
		if c.paused() {
			return nil
		}
		_, err := c.call("pause")
		return err
	})
}

func (c *box) thaw() error { _, err := c.call("unpause"); return err }

func (c *box) disconnect() error {
	_, err := c.call("network", "disconnect", c.network)
	return err
}

// connect waits until the server is reached again, if it runs.
func (c *box) connect() error {
	if _, err := c.call("network", "connect", "--ip", c.ip, c.network); err != nil {
		return err
	}
	if !c.running() || c.paused() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), dockerTimeout)
	defer cancel()
	return until(ctx, func(context.Context) error { return ping(c.addr) })
}

// close removes by name. A container that was not created yet is no error to Docker.
func (c *box) close() error {
	_, err := c.call("rm", "--force", "--volumes")
	if _, gone := c.call("network", "rm"); gone != nil {
		err = errors.Join(err, gone)
	}
	if c.revoke != nil {
		c.revoke()
	}
	return err
}

// lastWill has a shell run the script with args if this process ends before revoke is called: containers are children of
// Docker's, and do not end with us.
//
// The shell reads from a pipe whose other end only this process has, so the read returns when this process is gone.
func lastWill(script string, args ...string) (revoke func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command("sh", append([]string{"-c", "read -r _\n" + script, "sh"}, args...)...)
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is meant for us
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, err
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		w.Close()
	}, nil
}
