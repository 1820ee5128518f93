package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// startServer starts a redis-server of the PATH by a config, in which PORT is a free one, and returns its address.
func startServer(t *testing.T, config []string, args ...string) string {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		testserver.RequireReal(t)
		t.Skip("NOT TESTED: it needs a redis-server on the PATH")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	_, port, _ := net.SplitHostPort(addr)
	dir := t.TempDir()
	file := filepath.Join(dir, "redis.conf")
	text := strings.Join(append([]string{"bind 127.0.0.1", "dir " + dir}, config...), "\n") + "\n"
	require.NoError(t, os.WriteFile(file, []byte(strings.ReplaceAll(text, "PORT", port)), 0o600))
	cmd := exec.Command(binary, append([]string{file}, args...)...)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	await(t, func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return addr
}

// sentinelFor starts a Sentinel that watches the server as "orders-1", and returns its address.
func sentinelFor(t *testing.T, addr string, config ...string) string {
	t.Helper()
	host, port, err := net.SplitHostPort(addr)
	require.NoError(t, err)
	return startServer(t, append([]string{fmt.Sprintf("sentinel monitor orders-1 %s %s 1", host, port)}, config...), "--sentinel")
}

func TestSentinel(t *testing.T) {
	const secret, sentinelSecret = "hunter2", "swordfish"
	master := testserver.Private(t)
	client, topic := master.Client(), topic(t)
	require.NoError(t, client.XAdd(t.Context(), &redis.XAddArgs{Stream: topic, Values: []string{"body", "b"}}).Err())
	require.NoError(t, client.ConfigSet(t.Context(), "requirepass", secret).Err())
	sentinel := sentinelFor(t, master.Addr(), "port PORT", "requirepass "+sentinelSecret, "sentinel auth-pass orders-1 "+secret, "sentinel sentinel-pass "+sentinelSecret)
	down := "127.0.0.1:1"
	run := func(code int, args ...string) string {
		t.Helper()
		var c command
		require.Equal(t, code, c.run(args...), "%v: %s", args, c.err.String())
		assert.NotContains(t, c.err.String(), secret)
		assert.NotContains(t, c.err.String(), sentinelSecret)
		return c.out.String() + c.err.String()
	}
	url := fmt.Sprintf("redis+sentinel://:%s@%s,%s/orders-1/0?sentinel_password=%s", secret, down, sentinel, sentinelSecret)
	assert.Contains(t, run(0, "topics", "--url", url), topic)

	dir := profiles(t, fmt.Sprintf(`{"prod": {"url": "redis+sentinel://%s,%s/orders-1", "password_env": "PROD_PASSWORD", "sentinel_password_file": "sentinel.txt"}}`, sentinel, down))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "sentinel.txt"), []byte(sentinelSecret+"\n"), 0o600))
	t.Setenv("PROD_PASSWORD", secret)
	t.Setenv("REDIS_URL", "redis://127.0.0.1:1")
	assert.Contains(t, run(0, "topics", "--profile", "prod"), topic)

	run(exitFailed, "topics", "--url", fmt.Sprintf("redis+sentinel://:%s@%s/no-master?sentinel_password=%s", secret, sentinel, sentinelSecret))
	run(exitFailed, "topics", "--url", fmt.Sprintf("redis+sentinel://:%s@%s/orders-1?sentinel_password=x", secret, sentinel))
	run(exitUsage, "topics", "--cluster", "--url", url)
}

// selfSigned writes a certificate for 127.0.0.1, and its key.
func selfSigned(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "redis"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	require.NoError(t, err)
	secret, err := x509.MarshalECPrivateKey(private)
	require.NoError(t, err)
	dir := t.TempDir()
	write := func(name, kind string, data []byte) string {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600))
		return file
	}
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "EC PRIVATE KEY", secret)
}

// TLS with a client certificate, to a server, and by way of a Sentinel, whose host has not the name of the first in the list.
func TestTLS(t *testing.T) {
	cert, key := selfSigned(t)
	config := []string{"port 0", "tls-port PORT", "tls-cert-file " + cert, "tls-key-file " + key, "tls-ca-cert-file " + cert, "tls-replication yes"}
	master := startServer(t, append(config, `save ""`))
	sentinel := sentinelFor(t, master, config...)
	for _, args := range [][]string{
		{"--url", "rediss://" + master}, {"--url", "rediss+sentinel://localhost:1," + sentinel + "/orders-1"},
	} {
		var c command
		assert.Zero(t, c.run(append(args, "topics", "--tls-ca", cert, "--tls-cert", cert, "--tls-key", key)...), "%v: %s", args, c.err.String())
	}
	var c command
	assert.Equal(t, exitFailed, c.run("--url", "rediss://"+master, "topics", "--tls-ca", cert), "without a client certificate")
	profiles(t, fmt.Sprintf(`{"prod": {"url": "rediss+sentinel://localhost:1,%s/orders-1", "tls_ca": %q, "tls_cert": %q, "tls_key": %q}}`, sentinel, cert, cert, key))
	c = command{}
	assert.Zero(t, c.run("--profile", "prod", "topics"), c.err.String())
}

func TestSentinelURL(t *testing.T) {
	c := connection{}
	for url, want := range map[string][]string{
		"a": {"a:26379"}, "a:1,b": {"a:1", "b:26379"}, "[::1]:5,::2": nil, "[::1],[::2]:7": {"[::1]:26379", "[::2]:7"},
		"": nil, "a,": nil, "a:x": nil, "a:1:2": nil, "u@a": nil, "a b": nil,
	} {
		got, err := sentinelAddrs(url)
		assert.Equal(t, want, got, url)
		assert.Equal(t, want == nil, err != nil, url)
	}
	for _, rest := range []string{
		"", "host", "host/", "/master", "u:p@/master", "host/master/x", "host/master/0/1", "host/master?addr=b:1", "host/master?master_name=x",
		"host/master?bogus=1", "host/ma:ster", "host/m@ster", "host/master#x", "u:12/34@host/master", "u:1?2@host/master", "u:%zz@host/master",
	} {
		_, err := c.sentinel("redis", rest)
		assert.ErrorIs(t, err, errURL, rest)
	}
	for _, rest := range []string{"h/m", "h/m/", "h/m/3", "u:p%2F%40@h:1,i:2/m-1.x_y/3?dial_timeout=1s&sentinel_username=s"} {
		client, err := c.sentinel("rediss", rest)
		require.NoError(t, err, rest)
		require.NoError(t, client.Close())
	}
}

// profiles writes the file of them, and returns its directory.
func profiles(t *testing.T, text string) string {
	t.Helper()
	home := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", home)
	t.Setenv("HOME", home) // where there is no XDG
	t.Setenv("AppData", home)
	file, err := profilesFile()
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o700))
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	return filepath.Dir(file)
}

func TestProfiles(t *testing.T) {
	const secret = "hunter2"
	addr := testserver.Addr(t)
	dir := profiles(t, fmt.Sprintf(`{
		"here": {"url": "redis://%[1]s"},
		"in-url": {"url": "redis://user:hunter2@%[1]s"},
		"in-option": {"url": "redis+sentinel://%[1]s/m?sentinel_password=hunter2"},
		"badly-encoded": {"url": "redis://user:%%hunter2@%[1]s"},
		"unknown": {"url": "redis://%[1]s", "password": "hunter2"},
		"no-url": {},
		"no-variable": {"url": "redis://%[1]s", "password_env": "GOXSTREAMS_NO_SUCH_VARIABLE"},
		"no-file": {"url": "redis://%[1]s", "password_file": "none.txt"},
		"empty-file": {"url": "redis://%[1]s", "password_file": "empty.txt"},
		"both": {"url": "redis://%[1]s", "password_file": "empty.txt", "password_env": "X"},
		"no-sentinel": {"url": "redis://%[1]s", "sentinel_password_env": "SECRET"},
		"wrong": {"url": "redis://nobody@%[1]s", "password_env": "SECRET"},
		"tls": {"url": "rediss://%[1]s", "tls_ca": "empty.txt"},
		"number": {"url": 7}
	}`, addr))
	t.Setenv("SECRET", secret)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "empty.txt"), []byte("\n"), 0o600))
	for _, tt := range []struct {
		profile, want string
		code          int
	}{
		{"here", "", 0},
		{"in-url", "password_env or password_file", exitUsage},
		{"in-option", "password_env or password_file", exitUsage},
		{"badly-encoded", "percent-encoded", exitUsage},
		{"unknown", `unknown field "password"`, exitUsage},
		{"no-url", "url is missing", exitUsage},
		{"no-variable", "GOXSTREAMS_NO_SUCH_VARIABLE is not set", exitUsage},
		{"no-file", "password_file: open " + dir, exitUsage},
		{"empty-file", "empty.txt is empty", exitUsage},
		{"both", "password_env, or password_file: not both", exitUsage},
		{"no-sentinel", "+sentinel", exitUsage},
		{"wrong", "", exitFailed},
		{"tls", "no certificate in " + filepath.Join(dir, "empty.txt"), exitFailed},
		{"number", "cannot unmarshal number", exitUsage},
		{"none", `"none" is none of those in`, exitUsage},
	} {
		var c command
		assert.Equal(t, tt.code, c.run("--profile", tt.profile, "topics", topic(t)), "%s: %s", tt.profile, c.err.String())
		assert.Contains(t, c.err.String(), tt.want, tt.profile)
		assert.NotContains(t, c.err.String(), secret, tt.profile)
	}
	var c command
	assert.Equal(t, exitUsage, c.run("--profile", "here", "--url", "redis://"+addr, "topics"))
	out, _ := ran(t, 0, "__complete", "topics", "--profile", "")
	assert.Contains(t, out, "both\nempty-file\nhere\n")

	profiles(t, "[]")
	c = command{}
	assert.Equal(t, exitUsage, c.run("--profile", "here", "topics"))
	assert.Contains(t, c.err.String(), "want an object of profiles")
	require.NoError(t, os.Remove(filepath.Join(os.Getenv("XDG_CONFIG_HOME"), "goxstreams", "profiles.json")))
	c = command{}
	assert.Equal(t, exitUsage, c.run("--profile", "here", "topics"))
	assert.Contains(t, c.err.String(), "there is no ")
}

// A Unix socket in front of the shared server.
func TestUnixSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "redis.sock")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	forward(t, l, testserver.Addr(t))
	var c command
	assert.Zero(t, c.run("--url", "unix://"+socket, "topics", topic(t)), c.err.String())
}

// forward connects whoever dials the listener to the server.
func forward(t *testing.T, l net.Listener, addr string) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				go pipe(ctx, conn, addr)
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		_ = l.Close()
		<-done
	})
}

func pipe(ctx context.Context, conn net.Conn, addr string) {
	defer conn.Close()
	server, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return
	}
	defer server.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close(); _ = server.Close() })
	defer stop()
	back := make(chan struct{})
	go func() { defer close(back); copyAll(conn, server) }()
	copyAll(server, conn)
	<-back
}

func copyAll(to, from net.Conn) {
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			_ = to.Close()
			return
		}
	}
}
