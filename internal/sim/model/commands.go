package model

import (
	"fmt"
	"strconv"
	"strings"
)

// request is one call of a command. args[0] is its name.
type request struct {
	s      *Server
	client *client // nil of Do
	args   []string
	inside bool // a script or a transaction: it must not block
}

func (r *request) arg(i int) string { return r.args[i] }

type command struct {
	name    string // "xgroup|create" of a subcommand
	arity   int    // negative: at least
	flags   flags
	run     func(*request) any
	subs    map[string]*command
	only    []Version // none: all
	control bool      // is not queued by MULTI
}

type flags int

const (
	write    flags = 1 << iota
	memory         // is refused by a server that is out of memory
	noScript       // is not allowed in scripts
)

func commandsOf(v Version) map[string]*command {
	all := make(map[string]*command)
	for _, c := range commandTable {
		has := len(c.only) == 0
		for _, only := range c.only {
			has = has || only == v
		}
		if !has {
			continue
		}
		of, name := all, c.name
		if group, sub, ok := strings.Cut(name, "|"); ok {
			of, name = all[group].subs, sub
		}
		cmd := *c
		if cmd.run == nil {
			cmd.subs = make(map[string]*command)
		}
		of[name] = &cmd
		of[strings.ToUpper(name)] = &cmd
	}
	return all
}

func lookupCommand(in map[string]*command, name string) *command {
	if c := in[name]; c != nil {
		return c
	}
	return in[strings.ToLower(name)]
}

func (s *Server) find(args []string) (*command, error) {
	c := lookupCommand(s.commands, args[0])
	if c == nil {
		return nil, s.unknownCommand(args)
	}
	if c.subs != nil && len(args) > 1 {
		sub := lookupCommand(c.subs, args[1])
		if sub == nil {
			return nil, Error(fmt.Sprintf("ERR unknown subcommand '%.128s'. Try %s HELP.", args[1], strings.ToUpper(c.name)))
		}
		c = sub
	}
	if c.arity >= 0 && len(args) != c.arity || len(args) < -c.arity {
		return nil, errArity(c)
	}
	return c, nil
}

func errArity(c *command) Error {
	return Error("ERR wrong number of arguments for '" + c.name + "' command")
}

func (s *Server) unknownCommand(args []string) Error {
	var b strings.Builder
	fmt.Fprintf(&b, "ERR unknown command '%.128s'", args[0])
	if s.version != Redis86 || len(args) > 1 {
		b.WriteString(", with args beginning with: ")
	}
	size := 0
	for _, a := range args[1:] {
		if size >= 128 {
			break
		}
		a = a[:min(len(a), 128-size)]
		size += len(a) + 3
		b.WriteString("'" + a + "' ")
	}
	return Error(b.String())
}

// refused returns why a command that writes is refused.
func (s *Server) refused(c *command, queued bool) (Error, bool) {
	if s.refusal.isOOM() {
		return s.refusal, c.flags&memory != 0 || queued
	}
	return s.refusal, s.refusal != "" && c.flags&write != 0
}

func (e Error) isOOM() bool { return strings.HasPrefix(string(e), "OOM ") }

// handle executes what a client has sent.
func (s *Server) handle(c *client, args []string) any {
	s.clock = s.now()
	defer func() { s.clock = 0 }()
	r := &request{s: s, client: c, args: args}
	cmd, err := s.find(args)
	refused := Error("")
	if err == nil {
		var is bool
		if refused, is = s.refused(cmd, c.multi && !cmd.control); is {
			err = refused
		}
	}
	switch {
	case err != nil:
		c.aborted = c.multi
		return err.(Error)
	case c.multi && !cmd.control:
		r.inside = true
		c.queued = append(c.queued, r)
		return status("QUEUED")
	}
	reply := cmd.run(r)
	if b, ok := reply.(blocked); ok {
		s.block(c, b.read)
		return nil
	}
	s.serveWaiters()
	return reply
}

// run executes a command of Do, of a transaction or a script.
func (s *Server) run(r *request) any {
	r.inside = true
	cmd, err := s.find(r.args)
	if err != nil {
		return err.(Error)
	}
	return cmd.run(r)
}

func multi(r *request) any {
	switch {
	case r.client == nil:
		return Error("ERR MULTI needs a connection")
	case r.client.multi:
		if r.s.version == Valkey91 {
			r.client.aborted = true
			return Error("ERR Command 'multi' not allowed inside a transaction")
		}
		return Error("ERR MULTI calls can not be nested")
	}
	r.client.multi = true
	return status("OK")
}

func (c *client) endMulti() (queued []*request, aborted bool) {
	queued, aborted = c.queued, c.aborted
	c.multi, c.aborted, c.queued = false, false, nil
	return queued, aborted
}

func exec(r *request) any {
	if r.client == nil || !r.client.multi {
		return Error("ERR EXEC without MULTI")
	}
	queued, aborted := r.client.endMulti()
	if aborted {
		return Error("EXECABORT Transaction discarded because of previous errors.")
	}
	for _, q := range queued {
		cmd, _ := r.s.find(q.args)
		if refused, is := r.s.refused(cmd, false); is {
			return Error("EXECABORT Transaction discarded because of: " + string(refused))
		}
	}
	replies := make([]any, len(queued))
	for i, q := range queued {
		replies[i] = r.s.run(q)
	}
	return replies
}

func discard(r *request) any {
	if r.client == nil || !r.client.multi {
		return Error("ERR DISCARD without MULTI")
	}
	r.client.endMulti()
	return status("OK")
}

func ping(r *request) any {
	switch len(r.args) {
	case 1:
		return status("PONG")
	case 2:
		return r.arg(1)
	}
	return errArity(r.s.commands["ping"])
}

func selectDB(r *request) any {
	switch n, err := parseInt(r.arg(1)); {
	case err != nil && r.s.version == Redis70:
		return Error("ERR invalid DB index")
	case err != nil:
		return errInteger
	case n != 0:
		return Error("ERR DB index is out of range")
	}
	return status("OK")
}

func serverTime(r *request) any {
	now := r.s.time()
	return []any{strconv.FormatInt(now.Unix(), 10), strconv.Itoa(now.Nanosecond() / 1000)}
}

// identity is how the versions call themselves.
var identity = map[Version]struct{ server, version, info string }{
	Redis70:  {"redis", "7.0.15", "redis_version:7.0.15\r\nredis_mode:standalone\r\n"},
	Redis86:  {"redis", "8.6.3", "redis_version:8.6.3\r\nredis_mode:standalone\r\n"},
	Valkey91: {"valkey", "9.1.2", "redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:9.1.2\r\nserver_mode:standalone\r\n"},
}

// info has the section about the server, and no other.
func info(r *request) any {
	for _, section := range r.args[1:] {
		switch strings.ToLower(section) {
		case "server", "default", "all", "everything":
		default:
			return ""
		}
	}
	return "# Server\r\n" + identity[r.s.version].info
}

func hello(r *request) any {
	c := r.client
	if c == nil {
		return Error("ERR HELLO needs a connection")
	}
	proto, name := c.proto, c.name
	if len(r.args) > 1 {
		n, err := parseInt(r.arg(1))
		if err != nil {
			return Error("ERR Protocol version is not an integer or out of range")
		}
		if n != 2 && n != 3 {
			return Error("NOPROTO unsupported protocol version")
		}
		proto = int(n)
	}
	for i := 2; i < len(r.args); i++ {
		switch opt := strings.ToLower(r.arg(i)); {
		case opt == "auth" && i+2 < len(r.args):
			i += 2 // the default user has no password
		case opt == "setname" && i+1 < len(r.args):
			i++
			name = r.arg(i)
		default:
			return Error("ERR Syntax error in HELLO option '" + r.arg(i) + "'")
		}
	}
	c.proto, c.name = proto, name
	id := identity[r.s.version]
	return flatMap{"server", id.server, "version", id.version, "proto", int64(proto), "id", c.id, "mode", "standalone", "role", "master", "modules", []any{}}
}

func clientID(r *request) any {
	if r.client == nil {
		return int64(0)
	}
	return r.client.id
}

func clientSetName(r *request) any {
	if strings.ContainsFunc(r.arg(2), func(c rune) bool { return c < '!' || c > '~' }) {
		return Error("ERR Client names cannot contain spaces, newlines or special characters.")
	}
	if r.client != nil {
		r.client.name = r.arg(2)
	}
	return status("OK")
}

func clientGetName(r *request) any {
	if r.client == nil || r.client.name == "" {
		return nil
	}
	return r.client.name
}

func clientSetInfo(r *request) any {
	switch strings.ToLower(r.arg(2)) {
	case "lib-name", "lib-ver":
		return status("OK")
	}
	return Error("ERR Unrecognized option '" + r.arg(2) + "'")
}

func clientUnblock(r *request) any {
	var reply any = nullArray{}
	if len(r.args) == 4 {
		switch strings.ToLower(r.arg(3)) {
		case "timeout":
		case "error":
			reply = Error("UNBLOCKED client unblocked via CLIENT UNBLOCK")
		default:
			return Error("ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR")
		}
	}
	id, err := parseInt(r.arg(2))
	if err != nil {
		return err
	}
	c := r.s.clients[id]
	if c == nil || c.waiter == nil {
		return int64(0)
	}
	r.s.answer(c.waiter, reply)
	return int64(1)
}
