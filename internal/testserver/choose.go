package testserver

import (
	"cmp"
	"errors"
	"fmt"
	"os"
)

// starters are the ways to have a server; tests put others in their place.
type starters struct {
	external  func(addr string) (*Server, error)
	container func(image string, args ...string) (*Server, error)
	process   func(args ...string) (*Server, error)
	embedded  func() (*Server, error)
}

var realStarters = starters{startExternal, startContainer, startProcess, startEmbedded}

// An option is one server that may be had.
type option struct {
	name  string
	start func() (*Server, error)
}

// sharedOptions lists the servers that will do for the whole test binary, the preferred one first.
func sharedOptions(s starters) []option {
	var options []option
	if addr := os.Getenv(envAddr); addr != "" {
		options = append(options, option{"server at " + addr, func() (*Server, error) { return s.external(addr) }})
		if realOnly() {
			return options
		}
	}
	options = append(options, privateOptions(s)...)
	if !realOnly() {
		options = append(options, option{"embedded server", s.embedded})
	}
	return options
}

// privateOptions lists the servers that a test may have for itself. The one at REDIS_ADDR is somebody's: it is never among them.
func privateOptions(s starters, args ...string) []option {
	named := os.Getenv(envImage)
	image := cmp.Or(named, defaultImage)
	options := []option{{"container of " + image, func() (*Server, error) { return s.container(image, args...) }}}
	if named != "" && realOnly() {
		return options
	}
	return append(options, option{"redis-server of the PATH", func() (*Server, error) { return s.process(args...) }})
}

// choose starts the first option that can be started.
func choose(logf func(format string, args ...any), options []option) (*Server, error) {
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
	return nil, errors.Join(errs...)
}
