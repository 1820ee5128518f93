package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

// connection is how to reach Redis.
type connection struct {
	profile string
	url     string
	cluster bool

	ca          string // files
	certificate string
	key         string

	password, sentinelPassword string // of the profile, in place of the URL's
}

func (c *connection) addTo(cmd *cobra.Command) {
	flags := cmd.PersistentFlags()
	flags.StringVar(&c.url, "url", "", "redis://, rediss:// (TLS), unix://, redis+sentinel:// or rediss+sentinel:// (default $REDIS_URL, or redis://localhost:6379); better in REDIS_URL, since others see arguments")
	flags.StringVar(&c.profile, "profile", "", "the connection of this name in goxstreams/profiles.json of the user's configuration directory")
	flags.BoolVar(&c.cluster, "cluster", false, "the server is part of a Redis Cluster, also where it does not say so; more nodes: ?addr=host:port&addr=host:port in the URL")
	flags.StringVar(&c.ca, "tls-ca", "", "file of the authorities that the server's certificate may be from, PEM")
	flags.StringVar(&c.certificate, "tls-cert", "", "file of the client's certificate, PEM")
	flags.StringVar(&c.key, "tls-key", "", "file of the client certificate's key, PEM")
	_ = cmd.RegisterFlagCompletionFunc("profile", completeProfile)
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
var errURL = usagef("the URL (of --url, REDIS_URL or the profile) cannot be read: want redis://[user:password@]host[:port][/database], " +
	"rediss:// for TLS, unix://[user:password@]/path, or redis+sentinel://[user:password@]sentinel[:port][,sentinel[:port]...]/master[/database]; " +
	"special characters in the password must be percent-encoded; options after ? are those of go-redis. It is not shown, since a password may be in it")

func (c *connection) open(ctx context.Context) (redis.UniversalClient, error) {
	if err := c.useProfile(); err != nil {
		return nil, err
	}
	address := cmp.Or(c.url, os.Getenv("REDIS_URL"), "redis://localhost:6379")
	if scheme, rest, ok := strings.Cut(address, "+sentinel://"); ok && (scheme == "redis" || scheme == "rediss") {
		return c.sentinel(scheme, rest)
	}
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
	opts.Password = cmp.Or(c.password, opts.Password)
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
	opts.Password = cmp.Or(c.password, opts.Password)
	if err := c.secure(opts.TLSConfig); err != nil {
		return nil, err
	}
	return redis.NewClient(opts), nil
}

// masterNames are those that Sentinel's configuration takes.
var masterNames = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// sentinel opens what stands after redis+sentinel://. The form is that of redis-py's and Java's
// tools: user and password are the master's, and go to Sentinel as options.
func (c *connection) sentinel(scheme, rest string) (redis.UniversalClient, error) {
	if c.cluster {
		return nil, usagef("--cluster, or a URL with +sentinel: not both")
	}
	authority, path := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority, path = rest[:i], rest[i:]
	}
	user, hosts := "", authority
	if i := strings.LastIndex(authority, "@"); i >= 0 {
		user, hosts = authority[:i+1], authority[i+1:]
	}
	addrs, err := sentinelAddrs(hosts)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(scheme + "://" + user + addrs[0] + path) // a URL has one host only
	if err != nil || u.Fragment != "" {
		return nil, errURL
	}
	query := u.Query()
	if query.Has("addr") || query.Has("master_name") {
		return nil, errURL // both stand elsewhere
	}
	master, database, _ := strings.Cut(strings.Trim(u.Path, "/"), "/")
	if !masterNames.MatchString(master) {
		return nil, errURL
	}
	ofSentinel := url.UserPassword(query.Get("sentinel_username"), cmp.Or(c.sentinelPassword, query.Get("sentinel_password")))
	query.Del("sentinel_username")
	query.Del("sentinel_password")
	plain := url.URL{Scheme: scheme, User: ofSentinel, Host: addrs[0], Path: database, RawQuery: query.Encode()}
	opts, err := redis.ParseFailoverURL(plain.String())
	if err != nil {
		return nil, errURL
	}
	opts.MasterName, opts.SentinelAddrs = master, addrs
	password, _ := u.User.Password()
	opts.Username = cmp.Or(u.User.Username(), opts.Username)
	opts.Password = cmp.Or(c.password, password, opts.Password)
	opts.DialerRetries = 1
	if opts.TLSConfig != nil {
		opts.TLSConfig.ServerName = "" // the name of whichever host is dialed, not of the first
	}
	if err := c.secure(opts.TLSConfig); err != nil {
		return nil, err
	}
	return redis.NewFailoverClient(opts), nil
}

// sentinelAddrs takes a list of hosts apart.
func sentinelAddrs(hosts string) ([]string, error) {
	var addrs []string
	for host := range strings.SplitSeq(hosts, ",") {
		u, err := url.Parse("redis://" + host)
		if err != nil || u.Hostname() == "" || u.Host != host || strings.Contains(u.Hostname(), ":") && host[0] != '[' {
			return nil, errURL
		}
		addrs = append(addrs, net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "26379")))
	}
	return addrs, nil
}

// secure puts the files of the flags into config.
func (c *connection) secure(config *tls.Config) error {
	if c.ca == "" && c.certificate == "" && c.key == "" {
		return nil
	}
	if config == nil {
		return usagef("--tls-ca, --tls-cert and --tls-key need a URL that begins with rediss:// or rediss+sentinel://")
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
