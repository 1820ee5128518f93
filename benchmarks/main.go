// Command benchmarks compares watermill-goxstreams with its alternatives, side by
// side in one process and on one Redis. README.md says what it can do.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/redis/go-redis/v9"
)

func main() {
	redis.SetLogger(silent{}) // it logs calls that end because a client is closed; they return errors too
	if err := command(os.Args[1:], os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "benchmarks:", err)
		os.Exit(1)
	}
}

type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

// command runs a subcommand, or the comparison.
func command(args []string, out io.Writer) error {
	if len(args) > 0 {
		switch args[0] {
		case "growth":
			return growth(args[1:])
		case "consumers":
			return consumers(args[1:], out)
		case "cluster":
			return cluster(args[1:], out)
		case "retention":
			return retention(args[1:], out)
		case "delayed":
			return delayed(args[1:], out)
		}
	}
	return compare(args, out)
}

// target has the flags that say where Redis is.
type target struct{ binary, addr string }

func (t *target) flags(f *flag.FlagSet) {
	f.StringVar(&t.binary, "redis", "redis-server", "`binary` to start as the server")
	f.StringVar(&t.addr, "addr", "", "`address` of a running server to use instead")
}

// open starts a server unless the flags name one. closeAll ends it, and so does a
// signal to this process.
func (t *target) open(size float64) (e *env, closeAll func(), err error) {
	addr, stop := t.addr, func() {}
	if addr == "" {
		s, err := startServer(t.binary)
		if err != nil {
			return nil, nil, err
		}
		stop = onceOrSignal(s.stop)
		addr = s.addr
	}
	e, err = newEnv(addr, size)
	if err != nil {
		stop()
		return nil, nil, err
	}
	return e, func() { e.close(); stop() }, nil
}

// onceOrSignal calls stop at a signal and ends the program then.
func onceOrSignal(stop func()) func() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		if _, ok := <-signals; ok {
			stop()
			os.Exit(130)
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
		stop()
	}
}

// comparison has the flags of the comparison.
type comparison struct {
	target
	run      *regexp.Regexp
	systems  []string
	rounds   int
	size     float64
	json     string
	profiles profiles
	progress io.Writer
}

func compare(args []string, out io.Writer) error {
	c, err := parseComparison(args)
	if err != nil {
		return err
	}
	e, closeAll, err := c.open(c.size)
	if err != nil {
		return err
	}
	defer closeAll()
	if len(c.profiles.dirs) > 0 {
		c.profiles.install(e)
	}
	r, err := c.measure(e)
	if err != nil {
		return err
	}
	r.tables(out)
	if c.json != "" {
		err = writeJSON(c.json, r)
	}
	return errors.Join(append(c.profiles.errs, err)...)
}

func parseComparison(args []string) (*comparison, error) {
	c := &comparison{progress: os.Stderr, profiles: profiles{dirs: make(map[string]string)}}
	f := flag.NewFlagSet("benchmarks", flag.ContinueOnError)
	c.flags(f)
	run := f.String("run", "", "measure the scenarios that match the `regexp`")
	names := f.String("systems", strings.Join(systemOrder, ","), "`list` of systems")
	f.IntVar(&c.rounds, "rounds", 7, "rounds to report, after one to warm up")
	f.Float64Var(&c.size, "size", 1, "`factor` of message counts and durations")
	f.StringVar(&c.json, "json", "", "`file` for the raw results")
	all := f.String("profile", "", "`directory` for all profiles below")
	dirs := make(map[string]*string)
	for kind, name := range map[string]string{"cpu": "cpuprofile", "allocs": "memprofile", "mutex": "mutexprofile", "block": "blockprofile"} {
		dirs[kind] = f.String(name, "", "`directory` for "+kind+" profiles")
	}
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	for kind, dir := range dirs {
		if *dir == "" {
			*dir = *all
		}
		if *dir != "" {
			c.profiles.dirs[kind] = *dir
		}
	}
	c.systems = strings.Split(*names, ",")
	return c, c.check(f.Args(), *run)
}

func (c *comparison) check(rest []string, run string) (err error) {
	if len(rest) > 0 {
		return fmt.Errorf("no such command: %q", rest[0])
	}
	for _, name := range c.systems {
		if !slices.Contains(systemOrder, name) {
			return fmt.Errorf("-systems: no %q; there are %s", name, strings.Join(systemOrder, ", "))
		}
	}
	if c.rounds < 1 || c.size <= 0 {
		return errors.New("-rounds and -size must be positive")
	}
	if c.run, err = regexp.Compile(run); err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	if !slices.ContainsFunc(scenarios, func(s *scenario) bool { return c.run.MatchString(s.name) }) {
		return fmt.Errorf("-run: no scenario matches %q", run)
	}
	return nil
}

// measure runs all rounds, and in each round of a scenario the systems in turn.
func (c *comparison) measure(e *env) (*results, error) {
	m, err := e.machine()
	if err != nil {
		return nil, err
	}
	r := &results{Machine: m}
	for _, s := range scenarios {
		if !c.run.MatchString(s.name) {
			continue
		}
		rounds := c.rounds
		if s.group.most > 0 {
			rounds = min(rounds, s.group.most)
		}
		for round := range rounds + 1 {
			if err := c.round(e, r, s, round); err != nil {
				return nil, err
			}
		}
	}
	return r, nil
}

func (c *comparison) round(e *env, r *results, s *scenario, round int) error {
	for _, system := range systemOrder {
		if s.systems[system] == 0 || !slices.Contains(c.systems, system) {
			continue
		}
		m, err := e.run(s, system, 0)
		if err != nil {
			return err
		}
		r.Measurements = append(r.Measurements, measurement{s.name, system, round, m})
		fmt.Fprintf(c.progress, "round %d, %s, %s: %s\n", round, s.name, system, summary(s, m))
	}
	return nil
}

func summary(s *scenario, m metrics) string {
	var parts []string
	for _, c := range s.group.columns {
		parts = append(parts, format(m[c])+" "+c)
	}
	return strings.Join(parts, ", ")
}
