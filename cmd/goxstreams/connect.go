package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/pflag"
)

// connection is how to reach Redis.
type connection struct {
	url         string
	cluster     bool
	ca          string // files
	certificate string
	key         string
}

func (c *connection) addTo(flags *pflag.FlagSet) {
	flags.StringVar(&c.url, "url", "", "redis://, rediss:// (TLS) or unix:// (default $REDIS_URL, or redis://localhost:6379); better in REDIS_URL, since others see arguments")
	flags.BoolVar(&c.cluster, "cluster", false, "the server is part of a Redis Cluster, also where it does not say so; more nodes: ?addr=host:port&addr=host:port in the URL")
	flags.StringVar(&c.ca, "tls-ca", "", "file of the authorities that the server's certificate may be from, PEM")
	flags.StringVar(&c.certificate, "tls-cert", "", "file of the client's certificate, PEM")
	flags.StringVar(&c.key, "tls-key", "", "file of the client certificate's key, PEM")
}

// connect returns the client that all commands share.
func (a *app) connect(ctx context.Context) (redis.UniversalClient, error) {
	if a.client != nil {
		return a.client, nil
	}
	client, err := a.conn.open(ctx)
	if err != nil {
		return nil, err
	}
	a.client = client
	return client, nil
}

// errURL does not quote the URL, nor what go-redis has against it: a password that is not
// encoded as it should be ends up in any part.
var errURL = usagef("the URL (--url or REDIS_URL) cannot be read: want redis://[user:password@]host[:port][/database], " +
	"rediss:// for TLS, unix://[user:password@]/path; special characters in the password must be percent-encoded; " +
	"options after ? are those of go-redis. It is not shown, since a password may be in it")

func (c *connection) open(ctx context.Context) (redis.UniversalClient, error) {
	address := cmp.Or(c.url, os.Getenv("REDIS_URL"), "redis://localhost:6379")
	u, err := url.Parse(address)
	if err != nil || u.Fragment != "" {
		return nil, errURL
	}
	if !c.cluster && !u.Query().Has("addr") {
		client, err := c.single(address)
		if err != nil || !inCluster(ctx, client) {
			return client, err
		}
		_ = client.Close()
	}
	opts, err := redis.ParseClusterURL(address)
	if err != nil {
		return nil, errURL
	}
	opts.DialerRetries = 1
	if err := c.secure(opts.TLSConfig); err != nil {
		return nil, err
	}
	return redis.NewClusterClient(opts), nil
}

func (c *connection) single(address string) (*redis.Client, error) {
	opts, err := redis.ParseURL(address)
	if err != nil {
		return nil, errURL
	}
	opts.DialerRetries = 1 // somebody waits for the answer
	if err := c.secure(opts.TLSConfig); err != nil {
		return nil, err
	}
	return redis.NewClient(opts), nil
}

// secure puts the files of the flags into config.
func (c *connection) secure(config *tls.Config) error {
	if c.ca == "" && c.certificate == "" && c.key == "" {
		return nil
	}
	if config == nil {
		return usagef("--tls-ca, --tls-cert and --tls-key need a URL that begins with rediss://")
	}
	if c.ca != "" {
		pem, err := os.ReadFile(c.ca)
		if err != nil {
			return fmt.Errorf("--tls-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("--tls-ca: no certificate in %s", c.ca)
		}
	}
	if (c.certificate == "") != (c.key == "") {
		return usagef("--tls-cert and --tls-key need each other")
	}
	if c.certificate != "" {
		pair, err := tls.LoadX509KeyPair(c.certificate, c.key)
		if err != nil {
			return fmt.Errorf("--tls-cert, --tls-key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return nil
}

// inCluster asks the server whether it is part of a Cluster, of which it has some of the
// streams only. HELLO needs no right. Where it fails, what comes next says why.
func inCluster(ctx context.Context, client *redis.Client) bool {
	v, err := client.Do(ctx, "hello").Result()
	if err != nil {
		return false
	}
	switch v := v.(type) {
	case map[any]any:
		return v["mode"] == "cluster"
	case []any: // RESP2: name, value, ..
		i := slices.Index(v, any("mode"))
		return i >= 0 && i+1 < len(v) && v[i+1] == "cluster"
	}
	return false
}

// refused reports whether err is the server's answer, as opposed to a broken connection.
func refused(err error) bool {
	var reply redis.Error
	return errors.As(err, &reply) && !errors.Is(err, redis.Nil)
}
