package deploy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Role is what a server says it is.
type Role string

const (
	RoleMaster   Role = "master"
	RoleReplica  Role = "slave"
	RoleSentinel Role = "sentinel"
)

// A Node is one server. Its methods may be called from any goroutine, except Kill, Stop and Restart concurrently.
type Node struct {
	Name string
	Addr string // the same over restarts

	server server
	client *redis.Client
	// started, if not nil, is called after each start.
	started func(ctx context.Context) error
	id      string // a Cluster node's own
}

// A server runs a Node. Its methods return when they have taken effect.
type server interface {
	start(ctx context.Context) error
	running() bool
	kill() error
	stop(ctx context.Context) error
	freeze() error
	thaw() error
	disconnect() error
	connect() error
	close() error
}

func newNode(name, addr string, s server) *Node {
	return &Node{Name: name, Addr: addr, server: s, client: newClient(addr)}
}

// newClient returns a client for administration: it retries nothing, and respects the context.
func newClient(addr string) *redis.Client {
	return redis.NewClient(&redis.Options{Addr: addr, MaxRetries: -1, DialerRetries: 1, ContextTimeoutEnabled: true, PoolSize: 4})
}

func (n *Node) String() string { return n.Name + " (" + n.Addr + ")" }

// Client is a client of this very server, for administration. The deployment closes it.
func (n *Node) Client() *redis.Client { return n.client }

// Running reports whether the server was started and has not ended since. A frozen server is running.
func (n *Node) Running() bool { return n.server.running() }

// Role asks the server.
func (n *Node) Role(ctx context.Context) (Role, error) {
	r, err := n.role(ctx)
	return r.Role, err
}

// A role is the answer of ROLE.
type role struct {
	Role
	master string // of a replica: its master's address
	link   string // of a replica: "connected" if it is
}

func (n *Node) role(ctx context.Context) (role, error) {
	answer, err := n.client.Do(ctx, "role").Slice()
	if err != nil {
		return role{}, fmt.Errorf("role of %s: %w", n, err)
	}
	r := role{Role: Role(fmt.Sprint(answer[0]))}
	if r.Role == RoleReplica {
		r.master = net.JoinHostPort(fmt.Sprint(answer[1]), fmt.Sprint(answer[2]))
		r.link = fmt.Sprint(answer[3])
	}
	return r, nil
}

// replicates returns an error while the node is no replica of that master, or its link is not up.
func (n *Node) replicates(ctx context.Context, master *Node) error {
	r, err := n.role(ctx)
	if err != nil {
		return err
	}
	if r.Role != RoleReplica || r.master != master.Addr || r.link != "connected" {
		return fmt.Errorf("%s does not follow %s yet: %+v", n, master, r)
	}
	return nil
}

// is returns an error while the node has another role.
func (n *Node) is(ctx context.Context, want Role) error {
	if have, err := n.Role(ctx); err != nil || have != want {
		return fmt.Errorf("%s is no %s yet: %q, %v", n, want, have, err)
	}
	return nil
}

// Kill ends the server with SIGKILL and waits until it is gone. One that is not running is left alone.
func (n *Node) Kill() error { return n.did("kill", n.server.kill()) }

// Stop ends the server with SIGTERM and waits until it is gone; a frozen one is thawed for it.
func (n *Node) Stop(ctx context.Context) error { return n.did("stop", n.server.stop(ctx)) }

// Freeze suspends the server: the kernel still accepts connections, and nothing is answered.
func (n *Node) Freeze() error { return n.did("freeze", n.server.freeze()) }

// Thaw resumes a frozen server, which then handles what has arrived meanwhile.
func (n *Node) Thaw() error { return n.did("thaw", n.server.thaw()) }

// Disconnect takes a container off its network, unnoticed by its peers. For a process it returns errors.ErrUnsupported.
func (n *Node) Disconnect() error { return n.did("disconnect", n.server.disconnect()) }

// Connect undoes Disconnect: the container has its address again.
func (n *Node) Connect() error { return n.did("connect", n.server.connect()) }

// Restart stops the server if it runs, starts it at its address with the data that it kept, and waits until it has loaded them
// and answers. It may not be the master any more: see Settle.
func (n *Node) Restart(ctx context.Context) error { return n.did("restart", n.restart(ctx)) }

func (n *Node) restart(ctx context.Context) error {
	if err := n.server.stop(ctx); err != nil {
		return err
	}
	return n.start(ctx)
}

func (n *Node) start(ctx context.Context) error {
	if err := n.server.start(ctx); err != nil {
		return err
	}
	if n.started == nil {
		return nil
	}
	return n.started(ctx)
}

func (n *Node) did(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", what, n, err)
}

func (n *Node) close() error { return errors.Join(n.client.Close(), n.server.close()) }

// ping uses no go-redis client, which waits for a second after failed dials.
func ping(addr string) error {
	conn, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "*1\r\n$4\r\nPING\r\n"); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err == nil && answer != "+PONG\r\n" {
		err = errors.New(strings.TrimSpace(answer)) // -LOADING
	}
	return err
}

// infoField returns one field of INFO server.
func (n *Node) infoField(ctx context.Context, name string) (string, error) {
	text, err := n.client.Info(ctx, "server").Result()
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+":"); ok {
			return value, nil
		}
	}
	return "", fmt.Errorf("INFO of %s has no %s", n, name)
}
