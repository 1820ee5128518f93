package main

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

const payloadSize = 100 // bytes, unless a scenario has others

// A trial is one measurement of one system.
type trial struct {
	*env
	scenario *scenario
	system   string
	n        int // messages
	backend  backend
	topics   []string // to be removed
}

// run makes a trial and runs its scenario. n overrides the scenario's number of
// messages unless it is 0.
func (e *env) run(s *scenario, system string, n int) (m metrics, err error) {
	if n == 0 {
		n = e.count(s.systems[system])
	}
	t := &trial{env: e, scenario: s, system: system, n: n}
	defer func() {
		if e := t.close(); err == nil {
			err = e
		}
		if err != nil {
			err = fmt.Errorf("%s, %s: %w", s.name, system, err)
		}
	}()
	if err := t.open(s.options); err != nil {
		return nil, err
	}
	return s.measure(t)
}

func (t *trial) open(o options) (err error) {
	o.concurrency, o.workers = max(o.concurrency, 1), max(o.workers, 1)
	t.backend, err = systems[t.system](t.env, o)
	return err
}

// reopen lets a scenario measure with other options, or start again from scratch.
func (t *trial) reopen(o options) error {
	if err := t.close(); err != nil {
		return err
	}
	t.topics = nil
	return t.open(o)
}

func (t *trial) close() error {
	if t.backend == nil {
		return nil
	}
	errs := []error{t.backend.close()}
	for _, topic := range t.topics {
		errs = append(errs, t.backend.remove(topic))
	}
	t.backend = nil
	return errors.Join(errs...)
}

// newTopic returns a topic that is removed after the trial, with its group.
func (t *trial) newTopic() (string, error) {
	topic := t.topic()
	t.topics = append(t.topics, topic)
	return topic, t.backend.prepare(topic)
}

// keeps reports whether the system keeps what is published before somebody
// subscribes.
func (t *trial) keeps() bool {
	_, memory := t.backend.(*goChannel)
	return !memory
}

const (
	fillCall   = 500 // messages of one call
	fillers    = 16  // concurrent calls, for systems that take one message a time
	fillMemory = 4 << 20
)

// fill publishes n numbered messages.
func (t *trial) fill(topic string, n, size int) error {
	call := max(1, min(fillCall, fillMemory/size))
	if t.system == "asynq" {
		return t.fillAtOnce(topic, n, size)
	}
	for first := 0; first < n; first += call {
		if err := t.backend.batch(topic, payloads(first, min(call, n-first), size))(); err != nil {
			return err
		}
	}
	return t.filled(topic, n)
}

func (t *trial) fillAtOnce(topic string, n, size int) error {
	all := payloads(0, n, size)
	var calls sync.WaitGroup
	errs := make([]error, fillers)
	for i := range fillers {
		from, to := n*i/fillers, n*(i+1)/fillers
		calls.Go(func() { errs[i] = t.backend.batch(topic, all[from:to])() })
	}
	calls.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return t.filled(topic, n)
}

// filled fails unless the topic holds exactly n messages.
func (t *trial) filled(topic string, n int) error {
	if !t.keeps() {
		return nil
	}
	stored, err := t.backend.stored(topic)
	if err != nil {
		return err
	}
	if stored != int64(n) {
		return fmt.Errorf("%d messages are stored, not %d", stored, n)
	}
	return nil
}

// settled waits until nothing of the topic is pending.
func (t *trial) settled(topic string) error { return t.settledBut(topic, 0) }

// settledBut waits until only rest entries are pending, those of another consumer.
func (t *trial) settledBut(topic string, rest int64) error {
	for deadline := time.Now().Add(stalled); ; time.Sleep(time.Millisecond) {
		left, err := t.backend.left(topic)
		if err != nil {
			return err
		}
		if left == rest {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d messages are pending, not %d", left, rest)
		}
	}
}

func (t *trial) allSettled(topics []string) error {
	for _, topic := range topics {
		if err := t.settled(topic); err != nil {
			return err
		}
	}
	return nil
}

// drain waits until everything has arrived and is settled.
func (t *trial) drain(topic string, arrived *tally) error {
	if err := arrived.wait(); err != nil {
		return err
	}
	return t.settled(topic)
}
