package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

const idsHelp = `
"-" in place of the IDs reads them from standard input, one on a line.
`

// readIDs returns each ID once, in the order given: those of the arguments, or, for "-", those of
// standard input. It returns nil if there are no arguments, and only then: of no lines an empty list.
func (a *app) readIDs(ctx context.Context, args []string) ([]entryID, error) {
	if len(args) == 0 {
		return nil, nil
	}
	ids := make([]entryID, 0, len(args))
	seen := make(map[entryID]bool)
	err := a.eachID(ctx, args, func(s string) error {
		id, err := parseID(s)
		if err == nil && !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
		return err
	})
	return ids, err
}

// eachID calls use for the arguments, or, for "-", for the lines of standard input.
func (a *app) eachID(ctx context.Context, args []string, use func(string) error) error {
	if fromInput(args) {
		if len(args) > 1 {
			return usagef(`IDs, or "-" for those of standard input: not both`)
		}
		return readLines(ctx, a.in, func(line string, _ bool) error { return use(line) })
	}
	for _, arg := range args {
		if err := use(arg); err != nil {
			return err
		}
	}
	return nil
}

// readLines calls use for each line that is not empty, and says whether more has been read already. An error
// of use comes with the line's number.
func readLines(ctx context.Context, in io.Reader, use func(line string, more bool) error) error {
	lines := bufio.NewReaderSize(interruptible{ctx, in}, 1<<16)
	for n := 1; ; n++ {
		line, err := lines.ReadString('\n')
		if line = strings.TrimSpace(line); line != "" {
			if err := use(line, lines.Buffered() > 0); err != nil {
				return lineError(n, err)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
}

// lineError keeps the kind of the error.
func lineError(n int, err error) error {
	var mistake usageError
	if errors.As(err, &mistake) {
		return usagef("line %d: %w", n, mistake.error)
	}
	return fmt.Errorf("line %d: %w", n, err)
}

// confirm asks on the terminal, and returns an error unless the answer is yes.
func (a *app) confirm(ctx context.Context, format string, args ...any) error {
	_ = a.out.Flush() // its error comes again at the end
	_, _ = fmt.Fprintf(a.err, "%s [y/N] ", safe(fmt.Sprintf(format, args...)))
	line, _ := bufio.NewReader(interruptible{ctx, a.in}).ReadString('\n')
	if ctx.Err() != nil {
		a.notef("")
		return errors.New("interrupted: nothing is done")
	}
	if line = strings.ToLower(strings.TrimSpace(line)); line != "y" && line != "yes" {
		return errors.New("nothing is done")
	}
	return nil
}

// mayAsk returns an error if the command would change something unasked: it has no --yes, and nobody
// can answer, for lack of a terminal or because standard input is read for something else.
func (a *app) mayAsk(dryRun, yes, readsInput bool) error {
	switch {
	case dryRun || yes:
		return nil
	case readsInput:
		return usagef("standard input is read, so that nobody can be asked there: --yes, or --dry-run to see what would be done")
	case !a.asks:
		return usagef("there is no terminal to ask on: --yes, or --dry-run to see what would be done")
	}
	return nil
}

// fromInput reports whether the arguments say that standard input is read.
func fromInput(args []string) bool { return slices.Contains(args, "-") }

// interruptible is a reader whose Read ends with the context. The read under way ends with the process.
type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (i interruptible) Read(p []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	buf := make([]byte, len(p))
	done := make(chan result, 1)
	go func() {
		n, err := i.r.Read(buf)
		done <- result{n, err}
	}()
	select {
	case <-i.ctx.Done():
		return 0, i.ctx.Err()
	case r := <-done:
		return copy(p, buf[:r.n]), r.err
	}
}
