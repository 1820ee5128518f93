package main

import (
	"runtime"
	"sync"
	"time"
)

// memory measures the heap of a subscription whose handler blocks.
func memory(t *trial) (metrics, error) {
	topic, err := t.newTopic()
	if err != nil {
		return nil, err
	}
	if err := t.fill(topic, t.n, 1<<10); err != nil {
		return nil, err
	}
	gate, arrived := make(chan struct{}), newTally(t.n, 1)
	before := heapInUse()
	if t.began != nil {
		t.began(t)
	}
	open := sync.OnceFunc(func() { close(gate) })
	defer open() // or the blocked handlers never end
	err = t.backend.consume(topic, func(payload []byte) error {
		<-gate
		arrived.got(payload)
		return nil
	})
	if err != nil {
		return nil, err
	}
	time.Sleep(t.duration(2 * time.Second))
	after := heapInUse()
	if t.ended != nil {
		t.ended(t)
	}
	pending, err := t.backend.left(topic)
	if err != nil {
		return nil, err
	}
	open()
	if err := t.drain(topic, arrived); err != nil {
		return nil, err
	}
	return metrics{heap: max(0, after-before) / (1 << 20), held: float64(pending)}, arrived.check()
}

// heapInUse returns what lives on the heap, in bytes.
func heapInUse() float64 {
	runtime.GC()
	runtime.GC() // objects with finalizers, or in a sync.Pool, are freed by the second one
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	return float64(mem.HeapAlloc)
}
