package main

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/pprof"
	"strings"
)

// profiles writes pprof profiles of the measured part of the last round, for each
// system and scenario: <scenario>.<system>.cpu and so on. All but the CPU's count
// from the program's start, so there is also one from before:
//
//	go tool pprof -base x.allocs.before x.allocs
type profiles struct {
	dirs map[string]string // by kind: cpu, allocs, mutex, block
	cpu  *os.File
	errs []error
}

func (p *profiles) install(e *env) {
	if p.dirs["mutex"] != "" {
		runtime.SetMutexProfileFraction(10)
	}
	if p.dirs["block"] != "" {
		runtime.SetBlockProfileRate(10_000) // ns
	}
	e.began = func(t *trial) {
		p.snapshots(t, ".before")
		p.startCPU(t)
	}
	e.ended = func(t *trial) {
		p.stopCPU()
		p.snapshots(t, "")
	}
}

func (p *profiles) startCPU(t *trial) {
	p.cpu = p.create("cpu", t, "")
	if p.cpu != nil {
		p.note(pprof.StartCPUProfile(p.cpu))
	}
}

func (p *profiles) stopCPU() {
	if p.cpu != nil {
		pprof.StopCPUProfile()
		p.note(p.cpu.Close())
	}
}

func (p *profiles) snapshots(t *trial, suffix string) {
	for _, kind := range []string{"allocs", "mutex", "block"} {
		if f := p.create(kind, t, suffix); f != nil {
			p.note(errors.Join(pprof.Lookup(kind).WriteTo(f, 0), f.Close()))
		}
	}
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// create returns nil if this kind of profile was not requested.
func (p *profiles) create(kind string, t *trial, suffix string) *os.File {
	dir := p.dirs[kind]
	if dir == "" {
		return nil
	}
	name := notInNames.ReplaceAllString(strings.ToLower(t.scenario.name), "-")
	p.note(os.MkdirAll(dir, 0o755))
	f, err := os.Create(filepath.Join(dir, name+"."+t.system+"."+kind+suffix))
	if err != nil {
		p.note(err)
		return nil
	}
	return f
}

func (p *profiles) note(err error) {
	if err != nil {
		p.errs = append(p.errs, err)
	}
}
