package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/chaos/deploy"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// The deployments by their names.
const (
	single    = "single"
	container = "container"
	sentinel  = "sentinel"
	cluster   = "cluster"
)

const (
	// startTimeout is for all servers together, and for one to come back.
	startTimeout = 2 * time.Minute
	// patience is how long a run may make no progress at its end. A run that makes some, however slowly, is waited for.
	patience = time.Minute
)

// A Bench is a run under way.
type Bench struct {
	settings   Settings
	dir        string // of the logs
	out        io.Writer
	journal    *Journal
	deployment deploy.Deployment
	network    *Network
	consumers  []*Place
	producers  []*Place
	publisher  *goxstreams.Publisher // for what faults publish
	began      time.Duration

	servers  sync.Mutex // held by a fault that needs healthy servers
	moving   sync.Mutex // held while keys move from server to server: that connection must not be cut
	printing sync.Mutex
}

// runFaults makes a run with these faults, and checks it. dir gets the logs.
func runFaults(ctx context.Context, settings Settings, faults []*Fault, dir string, out io.Writer) (Outcome, error) {
	b, err := newBench(ctx, settings, dir, out)
	if err != nil {
		return Outcome{}, err
	}
	if settings.trims() { // retention takes what a destroyed group had pending for acked
		fmt.Fprintln(out, "retention: the last 20, and what is not acked; no group-destroy")
		faults = slices.DeleteFunc(slices.Clone(faults), func(f *Fault) bool { return f.Name == "group-destroy" })
	}
	outcome, err := b.run(ctx, schedule(settings, faults))
	return outcome, errors.Join(err, b.close())
}

func newBench(ctx context.Context, settings Settings, dir string, out io.Writer) (*Bench, error) {
	journal, err := openJournal(dir, "runner", 1)
	if err != nil {
		return nil, err
	}
	b := &Bench{settings: settings, dir: dir, out: out, journal: journal, network: newNetwork()}
	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	b.deployment, err = startDeployment(starting, settings, filepath.Join(dir, "servers"))
	if err == nil {
		b.publisher, err = newPublisher(settings, b.deployment.Client(), nil)
	}
	if err == nil {
		err = b.place()
	}
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

func startDeployment(ctx context.Context, settings Settings, dir string) (deploy.Deployment, error) {
	config := deploy.Config{AOF: deploy.Always, Dir: dir}
	if settings.Idempotence {
		// As Idempotence's documentation says for streams that are deleted and recreated by a subscriber.
		config.Args = []string{"--stream-idmp-duration", "600", "--stream-idmp-maxsize", "10000"}
	}
	switch settings.Deployment {
	case single:
		return orNone(deploy.Single(ctx, config))
	case container:
		config.Image = cmp.Or(os.Getenv("GOXSTREAMS_TEST_IMAGE"), defaultImage)
		return orNone(deploy.Container(ctx, config))
	case sentinel:
		return orNone(deploy.Sentinel(ctx, config))
	case cluster:
		return orNone(deploy.Cluster(ctx, config))
	}
	return nil, fmt.Errorf("-deployment is %q; it must be %s, %s, %s or %s", settings.Deployment, single, container, sentinel, cluster)
}

const defaultImage = "goxstreams-test/redis:8.6"

// orNone keeps a nil pointer from becoming a Deployment.
func orNone[D deploy.Deployment](d D, err error) (deploy.Deployment, error) {
	if err != nil {
		return nil, err
	}
	return d, nil
}

// place makes a place for each process.
func (b *Bench) place() error {
	for i := range b.settings.Consumers {
		p, err := b.newPlace(consumerRole, i+1)
		if err != nil {
			return err
		}
		b.consumers = append(b.consumers, p)
	}
	for i := range b.settings.Producers {
		p, err := b.newPlace(producerRole, i+1)
		if err != nil {
			return err
		}
		b.producers = append(b.producers, p)
	}
	return nil
}

func (b *Bench) newPlace(role string, number int) (*Place, error) {
	process := fmt.Sprintf("%s-%d", role, number)
	options := b.deployment.Options()
	var addrs []string
	for _, n := range b.deployment.Nodes() {
		addrs = append(addrs, n.Addr)
	}
	routes, err := b.network.routes(process, addrs)
	if err != nil {
		return nil, err
	}
	return newPlace(Role{
		Role: role, Process: process, Dir: b.dir, Settings: b.settings,
		Redis: Redis{Addrs: options.Addrs, MasterName: options.MasterName, Cluster: options.IsClusterMode, Routes: routes},
	}, b.journal), nil
}

func (b *Bench) consumer(s Strike) *Place { return pick(s, b.consumers) }
func (b *Bench) producer(s Strike) *Place { return pick(s, b.producers) }

func names(places []*Place) []string {
	var all []string
	for _, p := range places {
		all = append(all, p.name())
	}
	return all
}

func (b *Bench) close() error {
	var errs []error
	for _, p := range append(b.consumers, b.producers...) {
		errs = append(errs, p.kill())
	}
	b.network.close()
	if b.deployment != nil {
		errs = append(errs, b.deployment.Close())
	}
	return errors.Join(append(errs, b.journal.close())...)
}

func (b *Bench) printf(format string, args ...any) {
	b.printing.Lock()
	defer b.printing.Unlock()
	fmt.Fprintf(b.out, "%8.2fs  %s\n", (monotonic() - b.began).Seconds(), fmt.Sprintf(format, args...))
}

// run is a run from start to end: load, faults, the end of the load, the rest of the work, the end of the consumers.
func (b *Bench) run(ctx context.Context, strikes []Strike) (Outcome, error) {
	b.began = monotonic()
	// All servers are on this machine, and have its clock.
	b.journal.write(rules.Event{Kind: rules.Clocked, Clock: time.Duration(time.Now().UnixNano()) - monotonic()})
	if err := b.startPlaces(append(b.consumers, b.producers...)); err != nil {
		return Outcome{}, err
	}
	measuring, cancel := context.WithCancel(ctx)
	var measurer sync.WaitGroup
	defer measurer.Wait()
	defer cancel()
	if b.settings.SampleEvery > 0 {
		measurer.Go(func() { b.measure(measuring) })
	}
	if err := b.strikeAll(ctx, strikes); err != nil {
		return Outcome{}, err
	}
	if err := wait(ctx, b.began+b.settings.For-monotonic()); err != nil {
		return Outcome{}, err
	}
	cancel()
	var errs []error
	for _, p := range b.producers {
		errs = append(errs, p.close())
	}
	b.settle(ctx)
	for _, p := range b.consumers {
		errs = append(errs, p.close())
	}
	if err := errors.Join(errs...); err != nil {
		return Outcome{}, err
	}
	return b.outcome(ctx)
}

func (b *Bench) startPlaces(places []*Place) error {
	for _, p := range places {
		if err := p.start(); err != nil {
			return err
		}
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(max(d, 0))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// strikeAll runs all lanes concurrently. The first error ends them all.
func (b *Bench) strikeAll(ctx context.Context, strikes []Strike) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var lanes sync.WaitGroup
	for lane := range b.settings.Overlap {
		lanes.Go(func() {
			for _, s := range strikes {
				if s.Lane != lane {
					continue
				}
				err := wait(ctx, b.began+s.Offset-monotonic())
				if err == nil {
					err = b.strike(ctx, s)
				}
				if err != nil {
					fail(fmt.Errorf("%s: %w", s.Fault.Name, err))
					return
				}
			}
		})
	}
	lanes.Wait()
	return context.Cause(ctx)
}

// strike injects the fault, holds it and heals it.
func (b *Bench) strike(ctx context.Context, s Strike) error {
	if s.Fault.servers {
		b.servers.Lock()
		defer b.servers.Unlock()
	}
	injecting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	heal, err := s.Fault.inject(injecting, b, s, func(e rules.Effect) {
		e.Number, e.Fault = s.Number, s.Fault.Name
		b.journal.write(rules.Event{Kind: rules.Injected, Strike: &e})
		b.printf("fault %d: %s %s", s.Number, e.Fault, strings.Join(e.Target, " "))
	})
	if err != nil {
		return err
	}
	if err := wait(ctx, s.Hold); err != nil {
		return err
	}
	healing, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := heal(healing); err != nil {
		return err
	}
	b.journal.write(rules.Event{Kind: rules.Healed, Strike: &rules.Effect{Number: s.Number, Fault: s.Fault.Name}})
	b.printf("fault %d: healed", s.Number)
	return nil
}

// settle waits until everything is handled, or nothing changes any more. The checker finds what is left then.
func (b *Bench) settle(ctx context.Context) {
	b.printf("the producers have ended; waiting until everything is worked off")
	var last string
	for changed := monotonic(); monotonic()-changed < patience; {
		now, done := b.progress(ctx)
		if done {
			b.journal.write(rules.Event{Kind: rules.Settled})
			b.printf("everything is worked off")
			return
		}
		if now != last {
			last, changed = now, monotonic()
		}
		if wait(ctx, 100*time.Millisecond) != nil {
			return
		}
	}
	b.printf("nothing has changed for %v: %s", patience, last)
}

func (b *Bench) progress(ctx context.Context) (text string, done bool) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	done = true
	for _, topic := range topics {
		p, err := progressOf(ctx, b.deployment.Client(), topic.Name)
		waiting, waitingErr := waitingIn(ctx, b.deployment.Client(), topic.Name)
		err = errors.Join(err, waitingErr)
		text += fmt.Sprintf(" %s: %d pending, delivered up to %q, %d not due yet", topic.Name, p.pending, p.delivered, len(waiting))
		if err != nil {
			text += fmt.Sprintf(" (%v)", err)
		}
		done = done && err == nil && p.done && len(waiting) == 0
	}
	return text, done
}

// An Outcome is a run that has ended.
type Outcome struct {
	Settings Settings
	Evidence *rules.Evidence
	Verdict  rules.Verdict
}

func (b *Bench) outcome(ctx context.Context) (Outcome, error) {
	final, err := finalState(ctx, b.deployment.Client())
	if err != nil {
		return Outcome{}, err
	}
	events, err := readJournals(b.dir)
	if err != nil {
		return Outcome{}, err
	}
	if b.settings.trims() {
		events = append(events, trimmed(events, final)...)
	}
	evidence := rules.Sift(b.settings.rules(), events, final)
	return Outcome{b.settings, evidence, rules.Check(evidence)}, nil
}

// runInScratch makes a run in a temporary folder, which it keeps only if the run failed or broke a rule.
func runInScratch(ctx context.Context, settings Settings, faults []*Fault, out io.Writer) (Outcome, error) {
	dir, err := os.MkdirTemp("", "chaos")
	if err != nil {
		return Outcome{}, err
	}
	outcome, err := runFaults(ctx, settings, faults, dir, out)
	if err != nil || len(outcome.Verdict.Violations) > 0 {
		fmt.Fprintf(out, "the logs are in %s\n", dir)
		return outcome, err
	}
	return outcome, os.RemoveAll(dir)
}
