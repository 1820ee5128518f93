package testserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
)

const (
	// dockerTimeout limits a question to Docker, which answers in milliseconds
	// unless it hangs.
	dockerTimeout = 10 * time.Second
	// pullTimeout limits an image's download. An unreachable registry is noticed
	// within dockerTimeout.
	pullTimeout = 3 * time.Minute
)

var redisPort = network.MustParsePort("6379/tcp")

// startContainer starts a container of the image.
func startContainer(image string, args ...string) (*Server, error) {
	docker, err := connectDocker()
	if err != nil {
		return nil, err
	}
	command, err := serverCommand(docker, image)
	if err != nil {
		return nil, err
	}
	command = slices.Concat(command, baseArgs, args)
	for attempt := 1; ; attempt++ {
		srv, err := runContainer(docker, image, command)
		if err == nil || attempt == portAttempts || !portTaken(err) {
			return srv, err
		}
	}
}

// connectDocker runs once: without Docker every test would wait for the same
// answer.
var connectDocker = sync.OnceValues(func() (*testcontainers.DockerProvider, error) {
	type answer struct {
		provider testcontainers.GenericProvider
		err      error
	}
	answers := make(chan answer, 1)
	go func() { // testcontainers-go takes no context here, and a hanging Docker would hang the tests
		provider, err := testcontainers.ProviderDefault.GetProvider()
		answers <- answer{provider, err}
	}()
	select {
	case a := <-answers:
		if a.err != nil {
			return nil, a.err
		}
		return a.provider.(*testcontainers.DockerProvider), nil
	case <-time.After(dockerTimeout):
		return nil, fmt.Errorf("no answer from Docker within %s", dockerTimeout)
	}
})

// serverCommand returns the command of the image, to which server arguments can be
// appended. It is the image's own command, because official images have an
// entrypoint that expects it, and because it names the server: redis-server or
// valkey-server.
func serverCommand(docker *testcontainers.DockerProvider, image string) ([]string, error) {
	images.Lock()
	defer images.Unlock()
	if known, ok := images.known[image]; ok {
		return known.command, known.err
	}
	command, err := inspectImage(docker, image)
	images.known[image] = imageAnswer{command, err}
	return command, err
}

// images caches the results of serverCommand, so that an unavailable image is not
// tried again by every test.
var images = struct {
	sync.Mutex
	known map[string]imageAnswer
}{known: map[string]imageAnswer{}}

type imageAnswer struct {
	command []string
	err     error
}

func inspectImage(docker *testcontainers.DockerProvider, image string) ([]string, error) {
	defer docker.Close()
	ctx, cancel := context.WithTimeout(context.Background(), pullTimeout)
	defer cancel()
	needed := []string{image}
	if !docker.Config().Config.RyukDisabled {
		//lint:ignore SA1019 the name is public nowhere else, and without that image no container starts
		needed = append(needed, testcontainers.ReaperDefaultImage)
	}
	for _, name := range needed {
		if err := haveImage(ctx, docker.Client(), name); err != nil && name != image {
			return nil, fmt.Errorf("%w (set TESTCONTAINERS_RYUK_DISABLED=true to do without it)", err)
		} else if err != nil {
			return nil, err
		}
	}
	inspected, err := docker.Client().ImageInspect(ctx, image)
	if err != nil {
		return nil, err
	}
	return inspected.Config.Cmd, nil
}

// haveImage pulls the image unless it exists. testcontainers-go would do so too,
// but would try for a quarter of an hour.
func haveImage(ctx context.Context, docker client.APIClient, name string) error {
	_, err := docker.ImageInspect(ctx, name)
	if !errdefs.IsNotFound(err) {
		return err
	}
	stderr("testserver: pulling %s", name)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	unreachable := time.AfterFunc(dockerTimeout, cancel)
	pull, err := docker.ImagePull(ctx, name, client.ImagePullOptions{})
	if err != nil {
		return fmt.Errorf("pull %s: %w", name, err)
	}
	unreachable.Stop()
	return pull.Wait(ctx)
}

// turns are the starts that go on at the same time: Docker takes as long for many at
// once as for one after another, and then each of them would wait for all.
var turns = make(chan struct{}, 2)

func runContainer(docker *testcontainers.DockerProvider, image string, command []string) (_ *Server, err error) {
	turns <- struct{}{}
	defer func() { <-turns }()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	host, bind, err := publishedHost(ctx, docker)
	if err != nil {
		return nil, err
	}
	// The port is fixed, because one that Docker picks changes with a restart.
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	created, err := docker.CreateContainer(ctx, testcontainers.ContainerRequest{
		Image:        image,
		Cmd:          command,
		ExposedPorts: []string{redisPort.String()},
		HostConfigModifier: func(hc *container.HostConfig) {
			hc.PortBindings = network.PortMap{redisPort: {{HostIP: bind, HostPort: strconv.Itoa(port)}}}
		},
	})
	c := &box{Container: created, docker: docker, revoke: func() {}}
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	if docker.Config().Config.RyukDisabled { // otherwise Ryuk removes what is left behind
		if c.revoke, err = lastWill(`exec "$@"`, c.cli("rm", "--force", "--volumes", c.GetContainerID())...); err != nil {
			return nil, errors.Join(err, c.close())
		}
	}
	if err := c.Start(ctx); err != nil {
		return nil, errors.Join(err, c.close())
	}
	addr := net.JoinHostPort(host, strconv.Itoa(port))
	info, err := await(addr, startTimeout, c.alive)
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	return &Server{addr: addr, version: info.version(), backend: c}, nil
}

// publishedHost returns the host at which the containers' ports are reached, and
// the address to bind them to: the loopback interface if possible, so that nobody
// else can reach a server without a password.
func publishedHost(ctx context.Context, docker *testcontainers.DockerProvider) (host string, bind netip.Addr, err error) {
	host, err = docker.DaemonHost(ctx)
	if err != nil {
		return "", netip.Addr{}, err
	}
	if host == "localhost" || host == "127.0.0.1" {
		return "127.0.0.1", netip.MustParseAddr("127.0.0.1"), nil
	}
	return host, netip.IPv4Unspecified(), nil
}

// box is a container that runs a server.
type box struct {
	testcontainers.Container
	docker *testcontainers.DockerProvider
	revoke func()
}

// alive returns an error if the container has ended.
func (c *box) alive() error {
	ctx, cancel := context.WithTimeout(context.Background(), dockerTimeout)
	defer cancel()
	state, err := c.State(ctx)
	if err != nil || state.Running {
		return err
	}
	return fmt.Errorf("the container ended (exit %d):\n%s", state.ExitCode, c.lastWords(ctx))
}

func (c *box) lastWords(ctx context.Context) string {
	logs, err := c.Logs(ctx)
	if err != nil {
		return err.Error()
	}
	defer logs.Close()
	text, _ := io.ReadAll(logs)
	return strings.TrimSpace(string(text))
}

// call makes one call of Docker's API for the container, with a client of its own:
// closing the shared client's idle connections can break a concurrent call of
// another test.
func (c *box) call(f func(ctx context.Context, docker client.APIClient, id string) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	docker, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return err
	}
	defer docker.Close() // idle connections would outlive the test
	return f(ctx, docker, c.GetContainerID())
}

func (c *box) freeze() error {
	return c.call(func(ctx context.Context, docker client.APIClient, id string) error {
		_, err := docker.ContainerPause(ctx, id, client.ContainerPauseOptions{})
		return err
	})
}

func (c *box) thaw() error {
	return c.call(func(ctx context.Context, docker client.APIClient, id string) error {
		_, err := docker.ContainerUnpause(ctx, id, client.ContainerUnpauseOptions{})
		return err
	})
}

func (c *box) kill() error {
	_ = c.thaw() // Docker does not kill a paused container; thawing one that is not paused fails harmlessly
	return c.call(func(ctx context.Context, docker client.APIClient, id string) error {
		_, err := docker.ContainerKill(ctx, id, client.ContainerKillOptions{Signal: "KILL"})
		return err
	})
}

func (c *box) restart() error {
	return c.call(func(ctx context.Context, docker client.APIClient, id string) error {
		grace := 5
		_, err := docker.ContainerRestart(ctx, id, client.ContainerRestartOptions{Timeout: &grace})
		return err
	})
}

func (c *box) restartCommand() []string { return c.cli("restart", c.GetContainerID()) }

// cli returns a command line of the docker program, for the Docker that
// testcontainers-go found.
func (c *box) cli(args ...string) []string {
	return append([]string{"docker", "--host", c.docker.Client().DaemonHost()}, args...)
}

// peerAddr returns the container's own address, not the published one, which
// belongs to this machine.
func (c *box) peerAddr() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dockerTimeout)
	defer cancel()
	ip, err := c.ContainerIP(ctx)
	if err == nil && ip == "" {
		err = errors.New("the container has no address of its own")
	}
	return net.JoinHostPort(ip, strconv.Itoa(int(redisPort.Num()))), err
}

func (c *box) close() error {
	if c.Container == nil {
		return nil
	}
	_ = c.thaw() // as in kill
	err := testcontainers.TerminateContainer(c.Container, testcontainers.StopTimeout(0))
	c.revoke()
	return err
}
