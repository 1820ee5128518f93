package goxstreams_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// An authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	a := &authority{key: key}
	a.cert, _ = a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, key)
	return a
}

// sign returns the certificate, and its PEM.
func (a *authority) sign(t testing.TB, c *x509.Certificate, key *ecdsa.PrivateKey) (*x509.Certificate, []byte) {
	t.Helper()
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent := a.cert
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, a.key)
	require.NoError(t, err)
	signed, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return signed, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// issue returns a certificate for 127.0.0.1 and its key, as PEM.
func (a *authority) issue(t testing.TB, name string) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	_, cert = a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, private)
	der, err := x509.MarshalECPrivateKey(private)
	require.NoError(t, err)
	return cert, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// client returns the TLS config of a client that trusts a, with a certificate by
// the same or another authority.
func (a *authority) client(t testing.TB, issuer *authority) *tls.Config {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	cert, err := tls.X509KeyPair(issuer.issue(t, "client"))
	require.NoError(t, err)
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &cert, nil // whatever authorities the server names
	}}
}

// tlsServer starts a redis-server from the PATH that accepts only TLS, and only
// clients with a certificate by the authority. (A container would need the files in
// it; this tests the client's side.)
func tlsServer(t testing.TB, a *authority) (addr string, admin *redis.Client) {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		testserver.RequireReal(t)
		t.Skip("NOT TESTED: it needs a redis-server on the PATH")
	}
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, content, 0o600))
		return path
	}
	cert, key := a.issue(t, "server")
	args := []string{
		"--bind", "127.0.0.1", "--port", "0", "--dir", dir, "--save", "", "--tls-auth-clients", "yes",
		"--tls-cert-file", file("cert", cert), "--tls-key-file", file("key", key),
		"--tls-ca-cert-file", file("ca", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})),
	}
	for range 5 { // another program may take the port meanwhile
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		addr = l.Addr().String()
		require.NoError(t, l.Close())
		_, port, _ := net.SplitHostPort(addr)
		server := exec.Command(binary, append(args, "--tls-port", port)...)
		require.NoError(t, server.Start())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = server.Wait() }()
		t.Cleanup(func() { _ = server.Process.Kill(); <-ended })
		admin = tlsClient(t, &redis.Options{Addr: addr, TLSConfig: a.client(t, a)})
		for {
			if admin.Ping(context.Background()).Err() == nil {
				return addr, admin
			}
			select {
			case <-ended:
			case <-time.After(10 * time.Millisecond):
				continue
			}
			break
		}
	}
	require.FailNow(t, "redis-server does not start")
	return "", nil
}

func tlsClient(t testing.TB, opts *redis.Options) *redis.Client {
	t.Helper()
	client := redis.NewClient(opts)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// TestTLS: certificates on both sides and an ACL user. Reads have their own
// connections, made from the client's options, and are woken by CLIENT UNBLOCK: a
// BlockTime of minutes delays nothing.
func TestTLS(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	addr, admin := tlsServer(t, a)
	for _, pool := range []int{1, 10} {
		t.Run(fmt.Sprintf("PoolSize=%d", pool), func(t *testing.T) {
			topic, log := topic(t), newLogRecorder()
			user := userOf(t, admin, topic, append(allRights(t, admin), "+client|setname")...).Options() // for ClientName
			name := watermill.NewShortUUID()
			client := tlsClient(t, &redis.Options{
				Addr: addr, Username: user.Username, Password: user.Password, TLSConfig: a.client(t, a), PoolSize: pool, ClientName: name,
			})
			config := claiming(client)
			config.BlockTime = 10 * patience
			config.CloseTimeout = patience
			config.Retry = quickRetry()
			config.Retry.MaxRetries = 1
			sub := newSubscriberLog(t, config, log)
			messages := subscribe(t, sub, topic)
			eventually(t, func() bool { return blockedReads(t, admin, name) == 1 }, "no read waits")
			pub := newPublisher(t, client)
			msgs := append(numbered(2), messagesOf("dies")...)
			require.NoError(t, pub.Publish(topic, msgs...))
			for range msgs[:2] {
				next(t, messages).Ack()
			}
			next(t, messages).Nack()
			next(t, messages).Nack()
			eventually(t, func() bool { return stats(t, sub).Dead == 1 })
			// Another topic joins the read, which must be woken for that.
			second := subscribe(t, sub, topic+"2")
			third := subscribe(t, sub, topic+"3")
			for i, messages := range []<-chan *message.Message{second, third} {
				require.NoError(t, pub.Publish(fmt.Sprint(topic, i+2), numbered(1)...))
				next(t, messages).Ack()
			}
			require.NoError(t, sub.Close()) // the current reads would take minutes
			assert.Empty(t, log.Errors())
			assert.NotContains(t, strings.Join(log.Infos(), "\n"), "No permission")
		})
	}
}

// eventuallyTold repeats the call until its error is about the certificate. A
// server that rejects the client's certificate reports it after the handshake, and
// closes: a request on its way may see the end of the connection first.
func eventuallyTold(t *testing.T, call func() error) {
	t.Helper()
	eventually(t, func() bool {
		err := call()
		require.Error(t, err)
		return strings.Contains(err.Error(), "certificate")
	})
}

// TestTLS_WrongCertificate: without a certificate that the server, or the client,
// trusts, calls return that error, and nothing is stored. A certificate that
// expires, or is replaced by a wrong one, at run time is an outage: nothing is
// lost.
func TestTLS_WrongCertificate(t *testing.T) {
	t.Parallel()
	a, stranger := newAuthority(t), newAuthority(t)
	addr, admin := tlsServer(t, a)
	topic := topic(t)
	createGroup(t, admin, topic, testGroup)
	for name, config := range map[string]*tls.Config{
		"the client's is not trusted": a.client(t, stranger),
		"the server's is not trusted": stranger.client(t, a),
		"the client has none":         {RootCAs: a.client(t, a).RootCAs},
	} {
		t.Run(name, func(t *testing.T) {
			client := tlsClient(t, &redis.Options{Addr: addr, TLSConfig: config, DialerRetries: 1, MaxRetries: -1})
			for n := 1; n <= 2; n++ {
				eventuallyTold(t, func() error { return newPublisher(t, client).Publish(topic, numbered(n)...) })
			}
			eventuallyTold(t, func() error {
				_, err := newSubscriber(t, grouped(client)).Subscribe(t.Context(), topic)
				return err
			})
			require.Empty(t, entriesOf(t, admin, topic))
		})
	}
	t.Run("in mid-run", func(t *testing.T) {
		good, bad := a.client(t, a), a.client(t, stranger)
		var wrong atomic.Bool
		config := good.Clone()
		config.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if wrong.Load() {
				return bad.GetClientCertificate(r)
			}
			return good.GetClientCertificate(r)
		}
		user := userOf(t, admin, topic, allRights(t, admin)...).Options()
		client := tlsClient(t, &redis.Options{Addr: addr, Username: user.Username, Password: user.Password, TLSConfig: config})
		log, handled := newLogRecorder(), newTally()
		sub := newSubscriberLog(t, claiming(client), log)
		handled.handle(subscribe(t, sub, topic), nil)
		want := publish(t, admin, topic, "before")
		eventually(t, func() bool { return handled.has(want) })
		wrong.Store(true)
		require.NoError(t, admin.ClientKillByFilter(t.Context(), "USER", user.Username).Err())
		want = append(want, publish(t, admin, topic, "meanwhile")...)
		eventually(t, func() bool {
			err := stats(t, sub).Err
			return err != nil && strings.Contains(err.Error(), "certificate")
		}, "Stats does not show it")
		wrong.Store(false)
		eventually(t, func() bool { return handled.has(want) })
		eventually(t, func() bool { return stats(t, sub).Err == nil })
		eventually(t, func() bool { began, ended := outageLogged(log); return began >= 1 && began == ended }, "the outage's end is not logged")
		eventuallySettled(t, admin, topic, testGroup)
	})
}
