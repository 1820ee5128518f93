package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// monotonic returns the time of the machine's monotonic clock. Unlike time.Time's it can be compared between processes.
func monotonic() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err) // every Linux has it
	}
	return time.Duration(now.Nano())
}

// A Journal is the log of one process. Each line is one write to a file opened for appending, so a SIGKILL loses no line and
// tears none.
type Journal struct {
	file    *os.File
	process string
	life    int
}

func openJournal(dir, process string, life int) (*Journal, error) {
	file, err := os.OpenFile(filepath.Join(dir, process+".jsonl"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	return &Journal{file, process, life}, nil
}

// write adds the event with its time, and with this process unless it is about another one. It panics if it cannot: a process
// must not do what it cannot log.
func (j *Journal) write(e rules.Event) rules.Event {
	e.Wall, e.Mono = time.Now().Round(0), monotonic()
	if e.Process == "" {
		e.Process, e.Life, e.PID = j.process, j.life, os.Getpid()
	}
	line, err := json.Marshal(e)
	if err == nil {
		_, err = j.file.Write(append(line, '\n'))
	}
	if err != nil {
		panic(fmt.Sprintf("journal: %v", err))
	}
	return e
}

func (j *Journal) close() error { return j.file.Close() }

// readJournals returns all events of a run, in the order of time.
func readJournals(dir string) ([]rules.Event, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil {
		return nil, err
	}
	var events []rules.Event
	for _, name := range files {
		if events, err = readJournal(name, events); err != nil {
			return nil, err
		}
	}
	rules.Sort(events)
	return events, nil
}

func readJournal(name string, events []rules.Event) ([]rules.Event, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var e rules.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("%s: %w: %s", name, err, lines.Text())
		}
		events = append(events, e)
	}
	return events, lines.Err()
}
