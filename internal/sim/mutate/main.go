// Command mutate makes small changes to the packages that decide what happens to an
// entry, one at a time in a copy of the repository, and checks whether tests fail: those
// of the package, then the simulation. A change that no test detects means an untested
// rule, or code that does nothing.
//
//	go run ./mutate -n 100 -seeds 50
//	go run ./mutate -only 'lease/.*(not|left out)'
//
// Statements that only log are not mutated: no test should compare words for the reader,
// and those that matter (docs/operations.md) have a test of their own.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io/fs"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// packages are those that decide who owns an entry, and what is next.
var packages = []string{"ledger", "lease", "takeover", "consume"}

func main() {
	log.SetFlags(0)
	n := flag.Int("n", 100, "mutants")
	only := flag.String("only", "", "a regular expression: all mutants that it matches, as they are printed, and no others")
	list := flag.Bool("list", false, "only print the mutants, in the order in which they would be tried")
	seed := flag.Uint64("seed", 1, "decides which ones")
	seeds := flag.Int("seeds", 50, "of the simulation, for each mutant that the package's own tests do not see; 0: none")
	limit := flag.Duration("limit", 3*time.Minute, "for one run of tests; one that takes longer has seen the mutant")
	flag.Parse()
	root, err := filepath.Abs("../..")
	if err != nil {
		log.Fatal(err)
	}
	all, err := choose(root, *seed, *only)
	if err != nil {
		log.Fatal(err)
	}
	if *list {
		for _, m := range all {
			fmt.Println(m)
		}
		return
	}
	if *only != "" {
		*n = len(all)
	}
	if err := run(root, all, *n, *seeds, *limit); err != nil {
		log.Fatal(err)
	}
}

// choose returns the mutants that match only, in an order that the seed decides.
func choose(root string, seed uint64, only string) ([]mutant, error) {
	pattern, err := regexp.Compile(only)
	if err != nil {
		return nil, fmt.Errorf("-only: %w", err)
	}
	var all []mutant
	for _, p := range packages {
		found, err := mutants(root, filepath.Join("internal", p))
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	all = slices.DeleteFunc(all, func(m mutant) bool { return !pattern.MatchString(m.String()) })
	dice := rand.New(rand.NewPCG(seed, 0))
	dice.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all, nil
}

// run tries n of the mutants, as far as they compile.
func run(root string, all []mutant, n, seeds int, limit time.Duration) error {
	copied, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return err
	}
	defer os.RemoveAll(copied)
	if err := copyTree(root, copied); err != nil {
		return err
	}
	r := runner{root: copied, seeds: seeds, limit: limit}
	for _, p := range packages {
		dir := filepath.Join("internal", p)
		if !slices.ContainsFunc(all, func(m mutant) bool { return filepath.Dir(m.file) == dir }) {
			continue
		}
		if caught, out := r.caught(dir); caught != "" {
			return fmt.Errorf("%s fails without a mutant, %s:\n%s", p, caught, out)
		}
	}
	sums, made := make(map[string]int), 0
	for _, m := range all {
		if made == n {
			break
		}
		caught, err := r.try(m)
		if err != nil {
			return err
		}
		if caught == "compiler" {
			continue
		}
		made++
		if sums[caught]++; caught == "" {
			caught = "SURVIVES"
		}
		fmt.Printf("%3d  %-10s  %s\n", made, caught, m)
	}
	fmt.Printf("\n%d mutants of %d: %d seen by the package's own tests, %d by the simulation, %d by nobody: %.0f %%\n",
		made, len(all), sums["unit"], sums["simulation"], sums[""], 100*float64(made-sums[""])/float64(max(1, made)))
	return nil
}

type runner struct {
	root  string
	seeds int
	limit time.Duration
}

// try applies the mutant, and returns which tests detect it; "": none.
func (r runner) try(m mutant) (caught string, err error) {
	path := filepath.Join(r.root, m.file)
	source, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	defer func() {
		if undo := os.WriteFile(path, source, 0o644); err == nil {
			err = undo
		}
	}()
	changed := bytes.Join([][]byte{source[:m.from], []byte(m.with), source[m.to:]}, nil)
	if err := os.WriteFile(path, changed, 0o644); err != nil {
		return "", err
	}
	caught, _ = r.caught(filepath.Dir(m.file))
	return caught, nil
}

// caught returns which tests of the package fail.
func (r runner) caught(dir string) (who string, out []byte) {
	for _, check := range []struct {
		who, dir string
		args     []string
	}{
		{"unit", dir, nil},
		{"simulation", "internal/sim", []string{"-test.run=^TestSeeds$", "-shrink=0", "-seeds=" + strconv.Itoa(r.seeds)}},
	} {
		if check.who == "simulation" && r.seeds == 0 {
			continue
		}
		dir, tests := filepath.Join(r.root, check.dir), filepath.Join(r.root, check.who+".test")
		if out, err := output(2*r.limit, dir, "go", "test", "-c", "-o", tests, "."); err != nil {
			return "compiler", out
		}
		// Not by go test: it is the process with the tests that may have to be killed.
		if out, err := output(r.limit+10*time.Second, dir, tests, append(check.args, "-test.timeout="+r.limit.String())...); err != nil {
			return check.who, out
		}
	}
	return "", nil
}

func output(limit time.Duration, dir, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	command := exec.CommandContext(ctx, name, args...)
	command.Dir = dir
	command.WaitDelay = time.Second
	return command.CombinedOutput()
}

// copyTree copies the repository without its history.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, from)
		switch {
		case d.IsDir() && d.Name() == ".git":
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, name), 0o755)
		case !d.Type().IsRegular():
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, name), content, 0o644)
	})
}
