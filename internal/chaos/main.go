package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
)

func main() {
	if playRole() {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	passed, err := command(ctx, os.Args[1:], os.Stdout)
	if err != nil {
		fail(err)
	}
	if !passed {
		os.Exit(1)
	}
}

// command does what the arguments say, and reports whether no rule was broken.
func command(ctx context.Context, args []string, out io.Writer) (passed bool, err error) {
	settings := defaultSettings()
	flags := flag.NewFlagSet("chaos", flag.ExitOnError)
	flags.Uint64Var(&settings.Seed, "seed", settings.Seed, "the faults' `seed`: the same one makes the same faults at the same times")
	flags.DurationVar(&settings.For, "for", settings.For, "how long there is load")
	flags.StringVar(&settings.Deployment, "deployment", settings.Deployment, "single, container, sentinel or cluster")
	flags.IntVar(&settings.Consumers, "consumers", settings.Consumers, "processes that consume")
	flags.IntVar(&settings.Producers, "producers", settings.Producers, "processes that publish")
	flags.Float64Var(&settings.Rate, "rate", settings.Rate, "calls of Publish a second, of each producer")
	flags.DurationVar(&settings.MaxDelay, "delay", settings.MaxDelay, "the longest delay of a message; 0: none is delayed")
	flags.IntVar(&settings.Overlap, "overlap", settings.Overlap, "`faults` under way at once")
	flags.BoolVar(&settings.Repeat, "repeat", false, "calls of Publish whose outcome is unknown are made again")
	flags.BoolVar(&settings.Idempotence, "idempotence", false, "with PublisherConfig.Idempotence, and -repeat; the servers must have it (8.6.2)")
	names := flags.String("faults", "", "all, none, or `names` separated by commas (default all; with -soak none)")
	alone := flags.Bool("one-by-one", false, "a run of its own for each fault, of the length of -for each")
	soaking := flags.Bool("soak", false, "watch goroutines, memory and connections, which must not grow")
	if err := flags.Parse(args); err != nil {
		return false, err
	}
	settings.Repeat = settings.Repeat || settings.Idempotence
	if err := settings.validate(); err != nil {
		return false, err
	}
	switch {
	case *names == "" && *soaking:
		*names = "none"
	case *names == "":
		*names = "all"
	}
	faults, err := chooseFaults(strings.Split(*names, ","), settings.Deployment)
	if err != nil {
		return false, err
	}
	fmt.Fprintf(out, "seed %d, %s, %v, %d consumers, %d producers\n",
		settings.Seed, settings.Deployment, settings.For, settings.Consumers, settings.Producers)
	switch {
	case *alone:
		return oneByOne(ctx, settings, faults, out)
	case *soaking:
		return soak(ctx, settings, faults, out)
	}
	outcome, err := runInScratch(ctx, settings, faults, out)
	if err != nil {
		return false, err
	}
	report(out, outcome)
	return outcome.passed(), nil
}

// oneByOne makes a run for each fault, with this fault repeated.
func oneByOne(ctx context.Context, settings Settings, faults []*Fault, out io.Writer) (passed bool, err error) {
	passed = true
	var rows []Row
	for _, fault := range faults {
		fmt.Fprintf(out, "\n%s\n", fault.Name)
		outcome, err := runInScratch(ctx, settings, []*Fault{fault}, out)
		if err != nil {
			return false, fmt.Errorf("%s: %w", fault.Name, err)
		}
		report(out, outcome)
		passed = passed && outcome.passed()
		rows = append(rows, slices.DeleteFunc(outcome.rows(), Row.empty)...)
	}
	fmt.Fprintln(out)
	printTable(out, rows)
	return passed, nil
}

func (o Outcome) passed() bool { return len(o.Verdict.Violations) == 0 }
