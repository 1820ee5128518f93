// Package model is a Redis server in memory, of one node, for simulations in virtual
// time. All time comes from package time, and whoever waits is durably blocked.
//
// It has the commands that the library and its simulation use, with the answers of the
// versions named below. Anything else is an unknown command or a syntax error.
package model

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Version is a server whose commands and answers are modelled.
type Version int

// The versions.
const (
	Redis70 Version = iota
	Redis86
	Valkey91
)

// Config is what a server is like.
type Config struct{ Version Version }

// Server is one server. Make it inside the bubble that it is used in.
type Server struct {
	version  Version
	commands map[string]*command

	mu      sync.Mutex // held while a command runs, never over a wait
	frozen  bool
	queue   []turn // clients whose input arrived while the server was frozen
	refusal Error
	offset  time.Duration // of the server's clock
	clock   int64         // while a command runs
	data    *Data
	clients map[int64]*client
	lastID  int64 // of a client
	waiters []*waiter
	ready   []string // keys that a waiter may be served from
	scripts map[string]string
	lua     *interpreter
}

// Data is what a server stores.
type Data struct {
	keys    map[string]any   // *stream, *hash or *zset
	expires map[string]int64 // in milliseconds of the server's clock
}

func newData() *Data { return &Data{make(map[string]any), make(map[string]int64)} }

func (d *Data) clone() *Data {
	c := newData()
	maps.Copy(c.expires, d.expires)
	for key, v := range d.keys {
		switch v := v.(type) {
		case *stream:
			c.keys[key] = v.clone()
		case *hash:
			c.keys[key] = v.clone()
		case *zset:
			c.keys[key] = v.clone()
		}
	}
	return c
}

// New returns an empty server.
func New(cfg Config) *Server {
	s := &Server{version: cfg.Version, data: newData(), clients: make(map[int64]*client), scripts: make(map[string]string)}
	s.commands = commandsOf(cfg.Version)
	s.lua = newInterpreter(s)
	return s
}

// Do runs a command as an administrator who is neither frozen nor refused. A command
// that would block returns nil instead. Replies are those of RESP2: a map is a list of
// its keys and values, and what is missing is nil without an error.
func (s *Server) Do(args ...any) (any, error) {
	words := make([]string, len(args))
	for i, a := range args {
		switch a := a.(type) {
		case string:
			words[i] = a
		case []byte:
			words[i] = string(a)
		default:
			words[i] = fmt.Sprint(a)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	refusal := s.refusal
	s.refusal = ""
	s.clock = s.now()
	reply := s.run(&request{s: s, args: words})
	s.refusal = refusal
	s.serveWaiters()
	s.clock = 0
	if err, ok := reply.(Error); ok {
		return nil, err
	}
	return plain(reply), nil
}

// turn is a client that waits for the server to go on.
type turn struct {
	client *client
	begin  chan bool
}

// enter begins a turn, during which the caller has the server for itself. It returns
// false if the client was cut off before.
func (s *Server) enter(c *client) bool {
	s.mu.Lock()
	if c.cut {
		s.mu.Unlock()
		return false
	}
	if !s.frozen && len(s.queue) == 0 {
		return true
	}
	t := turn{c, make(chan bool, 1)}
	s.queue = append(s.queue, t)
	s.mu.Unlock()
	return <-t.begin
}

// leave ends a turn. Whoever has waited longest is given the next one, and the locked
// mutex with it.
func (s *Server) leave() {
	if s.frozen || len(s.queue) == 0 {
		s.mu.Unlock()
		return
	}
	t := s.queue[0]
	s.queue = s.queue[1:]
	t.begin <- true
}

// Freeze stops the server as SIGSTOP does. Connections can be made meanwhile.
func (s *Server) Freeze() {
	s.mu.Lock()
	s.frozen = true
	s.mu.Unlock()
}

// Thaw lets a frozen server go on: it executes what has arrived, in the order of arrival.
func (s *Server) Thaw() {
	s.mu.Lock()
	s.frozen = false
	s.leave()
}

// RefuseWrites has commands that write answered with the reply, until it is called
// with "". If the reply is an OOM error, only commands that may need memory are refused.
func (s *Server) RefuseWrites(reply string) {
	s.mu.Lock()
	s.refusal = Error(reply)
	s.mu.Unlock()
}

// StepClock changes the server's wall clock. As in Redis, idle times, expiry and the
// end of a blocking read are reckoned by it.
func (s *Server) StepClock(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offset += d
	for _, w := range s.waiters {
		s.setTimer(w)
	}
}

// CutAll closes all connections. What has arrived on them and was not executed is lost.
func (s *Server) CutAll() {
	s.mu.Lock()
	cut := s.cutAll()
	s.mu.Unlock()
	closeAll(cut)
}

func (s *Server) cutAll() []*client {
	var cut []*client
	for _, id := range slices.Sorted(maps.Keys(s.clients)) {
		cut = append(cut, s.clients[id])
		s.drop(s.clients[id])
	}
	return cut
}

func closeAll(clients []*client) {
	for _, c := range clients {
		_ = c.conn.Close()
	}
}

// Snapshot returns a copy of the data.
func (s *Server) Snapshot() *Data {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.data.clone()
}

// Restore is a restart with the data given; without any if that is nil. A frozen server
// is not frozen any more.
func (s *Server) Restore(d *Data) {
	if d == nil {
		d = newData()
	}
	s.mu.Lock()
	cut := s.cutAll()
	s.data, s.frozen, s.lastID, s.ready = d.clone(), false, 0, nil
	clear(s.scripts)
	s.mu.Unlock()
	closeAll(cut)
}

func (s *Server) time() time.Time { return time.Now().Add(s.offset) }

// now is the server's clock in milliseconds. It stands still while a command runs.
func (s *Server) now() int64 {
	if s.clock != 0 {
		return s.clock
	}
	return s.time().UnixMilli()
}

func (s *Server) lookup(key string) any {
	if at, ok := s.data.expires[key]; ok && at <= s.now() {
		s.remove(key)
	}
	return s.data.keys[key]
}

func (s *Server) remove(key string) {
	delete(s.data.keys, key)
	delete(s.data.expires, key)
	s.signal(key)
}

const errWrongType = Error("WRONGTYPE Operation against a key holding the wrong kind of value")

// value returns what a key holds; nil without the key.
func value[T any](s *Server, key string) (v *T, err error) {
	switch held := s.lookup(key).(type) {
	case nil:
		return nil, nil
	case *T:
		return held, nil
	}
	return nil, errWrongType
}

const errInteger = Error("ERR value is not an integer or out of range")

// parseInt parses as string2ll does: one spelling of each number.
func parseInt(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || len(s) > 1 && (s[0] == '0' || s[0] == '+' || s[0] == '-' && s[1] == '0') {
		return 0, errInteger
	}
	return n, nil
}
