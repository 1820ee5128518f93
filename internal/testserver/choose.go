package testserver

import (
	"cmp"
	"errors"
	"fmt"
	"os"
)

// starters are the ways to start a server; tests replace them.
type starters struct {
	external  func(addr string) (*Server, error)
	container func(image string, args ...string) (*Server, error)
	process   func(args ...string) (*Server, error)
	embedded  func() (*Server, error)
}

var realStarters = starters{startExternal, startContainer, startProcess, startEmbedded}

// option is one available server or Cluster.
type option[S fmt.Stringer] struct {
	name  string
	start func() (S, error)
}

// sharedOptions lists the servers that the whole test binary can share, the
// preferred one first.
func sharedOptions(s starters) []option[*Server] {
	var options []option[*Server]
	if addr := os.Getenv(envAddr); addr != "" {
		options = append(options, option[*Server]{"server at " + addr, func() (*Server, error) { return s.external(addr) }})
		if realOnly() {
			return options
		}
	}
	options = append(options, privateOptions(s)...)
	if !realOnly() {
		options = append(options, option[*Server]{"embedded server", s.embedded})
	}
	return options
}

// privateOptions lists the servers that a test can have for itself. The server at
// REDIS_ADDR belongs to somebody else and is never among them.
func privateOptions(s starters, args ...string) []option[*Server] {
	return ownOptions(s, func(start func(args ...string) (*Server, error)) (*Server, error) { return start(args...) })
}

// clusterOptions lists the Clusters, made of the same servers.
func clusterOptions(s starters) []option[*cluster] {
	return ownOptions(s, startCluster)
}

// ownOptions lists what can be assembled from servers that this package starts.
func ownOptions[S fmt.Stringer](s starters, assemble func(start func(args ...string) (*Server, error)) (S, error)) []option[S] {
	named := os.Getenv(envImage)
	image := cmp.Or(named, defaultImage)
	container := func(args ...string) (*Server, error) { return s.container(image, args...) }
	options := []option[S]{{"container of " + image, func() (S, error) { return assemble(container) }}}
	if named != "" && realOnly() {
		return options
	}
	return append(options, option[S]{"redis-server of the PATH", func() (S, error) { return assemble(s.process) }})
}

// choose starts the first option that works.
func choose[S fmt.Stringer](logf func(format string, args ...any), options []option[S]) (S, error) {
	var errs []error
	for _, o := range options {
		srv, err := o.start()
		if err == nil {
			logf("testserver: using the %s: %s", o.name, srv)
			return srv, nil
		}
		err = fmt.Errorf("no %s: %w", o.name, err)
		logf("testserver: %v", err)
		errs = append(errs, err)
	}
	var none S
	return none, errors.Join(errs...)
}
