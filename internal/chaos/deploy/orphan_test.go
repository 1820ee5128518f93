package deploy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// startAndHang makes this test binary a process that starts servers and does not end them.
const startAndHang = "CHAOS_DEPLOY_START_AND_HANG"

func TestMain(m *testing.M) {
	if os.Getenv(startAndHang) == "" {
		os.Exit(m.Run())
	}
	if err := hang(os.Getenv(startAndHang)); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func hang(image string) error {
	d, err := Single(context.Background(), Config{})
	if err != nil {
		return err
	}
	addrs := d.Node().Addr
	if err := d.Node().Freeze(); err != nil { // a frozen one must end, too
		return err
	}
	if c, err := Container(context.Background(), Config{Image: image}); err == nil {
		addrs += " " + c.Node().Addr
	} else if !errors.Is(err, ErrNoServer) {
		return errors.Join(err, d.Close())
	}
	fmt.Println(addrs)
	select {}
}

func TestServersEndWithTheirParent(t *testing.T) {
	t.Parallel()
	needServer(t)
	ctx := testContext(t)
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), startAndHang+"=goxstreams-test/redis:8.6", "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.NotContains(t, line, "error")
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait(), "it was killed")
	for _, addr := range strings.Fields(line) {
		require.NoError(t, until(ctx, func(context.Context) error {
			return refuses(addr)
		}))
	}
}

// refuses returns an error while something listens at the address.
func refuses(addr string) error {
	conn, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return nil
	}
	return errors.Join(fmt.Errorf("%s still listens", addr), conn.Close())
}
