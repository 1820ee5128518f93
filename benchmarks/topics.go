package main

import (
	"context"
	"strings"
	"time"
)

const (
	topicCount     = 1000
	perTopic       = 100 // messages waiting in each
	redisstreamMax = 2100
)

// manyTopics measures one Subscriber with 1,000 topics: first with messages
// waiting in all of them, then idle, then at a low rate; and the same low rate
// with one topic.
func manyTopics(t *trial) (metrics, error) {
	topics := max(2, t.n/perTopic)
	o := t.scenario.options
	if t.system == "redisstream" {
		o.pool = redisstreamMax
	}
	one, err := oneTopic(t, o)
	if err != nil {
		return nil, err
	}
	if err := t.reopen(o); err != nil {
		return nil, err
	}
	return severalTopics(t, topics, one)
}

func oneTopic(t *trial, o options) (metrics, error) {
	if err := t.reopen(o); err != nil {
		return nil, err
	}
	topic, err := t.newTopic()
	if err != nil {
		return nil, err
	}
	return latency(t, []string{topic}, slowRate, t.lowRate())
}

// lowRate returns the number of messages of a measurement at 200/s.
func (t *trial) lowRate() int { return max(20, int(slowRate*t.duration(5*time.Second).Seconds())) }

func severalTopics(t *trial, n int, one metrics) (metrics, error) {
	before, err := clients(t) // the system has not connected yet
	if err != nil {
		return nil, err
	}
	topics, err := fillTopics(t, n, perTopic)
	if err != nil {
		return nil, err
	}
	var now inTurn
	m, err := backlogged(t, topics, perTopic, &now)
	if err != nil {
		return nil, err
	}
	if err := idle(t, m, before); err != nil {
		return nil, err
	}
	watch := newStopwatch(t.lowRate())
	now.set(watch.handle)
	delays, err := timed(t, watch, topics, slowRate)
	if err != nil {
		return nil, err
	}
	m[p50], m[p99] = delays[p50], delays[p99]
	m[p50Ratio], m[p99Ratio] = delays[p50]/one[p50], delays[p99]/one[p99]
	return m, t.allSettled(topics)
}

// fillTopics makes n topics with a number of messages each, numbered across topics.
func fillTopics(t *trial, n, each int) ([]string, error) {
	topics := make([]string, n)
	for i := range topics {
		topic, err := t.newTopic()
		if err != nil {
			return nil, err
		}
		topics[i] = topic
		if each == 0 {
			continue
		}
		if err := t.backend.batch(topic, payloads(i*each, each, payloadSize))(); err != nil {
			return nil, err
		}
		if err := t.filled(topic, each); err != nil {
			return nil, err
		}
	}
	return topics, nil
}

// backlogged measures until all messages that wait in the topics, so many in each, have
// been handled.
func backlogged(t *trial, topics []string, each int, now *inTurn) (metrics, error) {
	arrived := newTally(len(topics)*each, 1)
	now.set(func(p []byte) error { arrived.got(p); return nil })
	m, err := t.measure(len(topics)*each, func() error {
		for _, topic := range topics {
			if err := t.backend.consume(topic, now.handle); err != nil {
				return err
			}
		}
		return arrived.wait()
	})
	if err != nil {
		return nil, err
	}
	if err := t.allSettled(topics); err != nil {
		return nil, err
	}
	return m, arrived.check()
}

// idle measures the cost of waiting, and the number of connections that wait, without
// those that were open before.
func idle(t *trial, m metrics, before int) error {
	client := processCPU()
	server, err := serverCPU(t.admin)
	if err != nil {
		return err
	}
	start := time.Now()
	time.Sleep(t.duration(10 * time.Second))
	client = processCPU() - client
	took := time.Since(start).Seconds()
	after, err := serverCPU(t.admin)
	if err != nil {
		return err
	}
	m[idleClient], m[idleServer] = 100*client.Seconds()/took, 100*(after-server)/took
	now, err := clients(t)
	m[connections] = float64(now - before)
	return err
}

// clients returns the number of connections to the server.
func clients(t *trial) (int, error) {
	list, err := t.admin.ClientList(context.Background()).Result()
	return strings.Count(list, "\n"), err
}
