// Command mutate makes small changes to the packages that decide what happens to an
// entry, one at a time in a copy of the repository, and looks whether the tests see them:
// the package's own, and then the simulation. A change that nobody sees is a rule that
// nothing holds, or code that does nothing.
//
//	go run ./mutate -n 100 -seeds 50
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
	"strconv"
	"strings"
	"time"
)

// packages are those that know what is whose, and what is next.
var packages = []string{"ledger", "lease", "takeover", "consume"}

func main() {
	log.SetFlags(0)
	n := flag.Int("n", 100, "mutants")
	seed := flag.Uint64("seed", 1, "decides which ones")
	seeds := flag.Int("seeds", 50, "of the simulation, for each mutant that the package's own tests do not see")
	limit := flag.Duration("limit", 3*time.Minute, "for one run of tests; one that takes longer has seen the mutant")
	flag.Parse()
	if err := run(*n, *seed, *seeds, *limit); err != nil {
		log.Fatal(err)
	}
}

func run(n int, seed uint64, seeds int, limit time.Duration) error {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	copied, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return err
	}
	defer os.RemoveAll(copied)
	if err := copyTree(root, copied); err != nil {
		return err
	}
	r := runner{root: copied, seeds: seeds, limit: limit}
	var all []mutant
	for _, p := range packages {
		found, err := mutants(root, filepath.Join("internal", p))
		if err != nil {
			return err
		}
		all = append(all, found...)
		if caught, out := r.caught(filepath.Join("internal", p)); caught != "" {
			return fmt.Errorf("%s fails without a mutant, %s:\n%s", p, caught, out)
		}
	}
	dice := rand.New(rand.NewPCG(seed, 0))
	dice.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
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

// try makes the mutant, and returns who sees it; "" if nobody does.
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

// caught returns who sees that something is wrong with the package.
func (r runner) caught(dir string) (who string, out []byte) {
	for _, check := range []struct {
		who, dir string
		command  []string
	}{
		{"compiler", ".", []string{"build", "."}},
		{"unit", ".", []string{"test", "-count=1", "-timeout", r.limit.String(), "./" + dir}},
		{"simulation", "internal/sim", []string{"test", "-count=1", "-timeout", r.limit.String(), "-run", "^TestSeeds$", ".", "-seeds", strconv.Itoa(r.seeds)}},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 2*r.limit) // go test itself heeds the limit
		command := exec.CommandContext(ctx, "go", check.command...)
		command.Dir = filepath.Join(r.root, check.dir)
		command.WaitDelay = time.Second
		out, err := command.CombinedOutput()
		cancel()
		if err != nil {
			return check.who, out
		}
	}
	return "", nil
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
