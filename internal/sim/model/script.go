package model

import (
	"crypto/sha1" // as Redis names scripts; it protects nothing
	"fmt"
	"math"
	"strconv"
	"strings"

	lua "github.com/yuin/gopher-lua"
	"github.com/yuin/gopher-lua/parse"
)

// interpreter runs scripts in one Lua state, whose globals they cannot change.
type interpreter struct {
	s      *Server
	l      *lua.LState
	failed *lua.LFunction
	protos map[string]*lua.FunctionProto // by their source
	client *client                       // whose script runs
	wrote  bool                          // the script has run a command that writes
}

func newInterpreter(s *Server) *interpreter {
	in := &interpreter{s: s, protos: make(map[string]*lua.FunctionProto)}
	in.l = lua.NewState(lua.Options{SkipOpenLibs: true, RegistrySize: 1024 * 16, RegistryMaxSize: 1024 * 256})
	for _, open := range []lua.LGFunction{lua.OpenBase, lua.OpenTable, lua.OpenString, lua.OpenMath} {
		in.l.Push(in.l.NewFunction(open))
		in.l.Call(0, 0)
	}
	for _, name := range []string{"dofile", "loadfile", "print", "module", "require", "collectgarbage", "newproxy", "_printregs"} {
		in.l.SetGlobal(name, lua.LNil)
	}
	in.l.SetGlobal("redis", in.l.SetFuncs(in.l.NewTable(), map[string]lua.LGFunction{
		"call":          func(l *lua.LState) int { return in.call(l, true) },
		"pcall":         func(l *lua.LState) int { return in.call(l, false) },
		"error_reply":   func(l *lua.LState) int { return in.errorReply(l) },
		"status_reply":  func(l *lua.LState) int { return in.field(l, "ok", l.CheckString(1)) },
		"sha1hex":       func(l *lua.LState) int { l.Push(lua.LString(sha1Hex(l.CheckString(1)))); return 1 },
		"acl_check_cmd": func(l *lua.LState) int { return in.aclCheck(l) },
	}))
	in.l.SetGlobal("unpack", in.l.NewFunction(unpack))
	in.failed = in.l.NewFunction(func(l *lua.LState) int { return in.describe(l) })
	in.protect()
	return in
}

// protect has a script that reads or sets an unknown global fail.
func (in *interpreter) protect() {
	globals := in.l.G.Global
	meta := in.l.NewTable()
	meta.RawSetString("__index", in.l.NewFunction(func(l *lua.LState) int {
		l.RaiseError("Script attempted to access nonexistent global variable '%s'", l.Get(2).String())
		return 0
	}))
	meta.RawSetString("__newindex", in.l.NewFunction(func(l *lua.LState) int {
		l.RaiseError("Attempt to modify a readonly table")
		return 0
	}))
	globals.Metatable = meta
}

const maxUnpack = 8000 // Lua's own limit of values in a call, about

func unpack(l *lua.LState) int {
	t, from := l.CheckTable(1), l.OptInt(2, 1)
	to := t.Len()
	if l.GetTop() >= 3 {
		to = l.CheckInt(3)
	}
	if to-from >= maxUnpack {
		l.RaiseError("too many results to unpack")
	}
	for i := from; i <= to; i++ {
		l.Push(t.RawGetInt(i))
	}
	return max(0, to-from+1)
}

func sha1Hex(s string) string { return fmt.Sprintf("%x", sha1.Sum([]byte(s))) }

const chunkName = "user_script"

func (in *interpreter) compile(source string) (*lua.FunctionProto, error) {
	if p := in.protos[source]; p != nil {
		return p, nil
	}
	chunk, err := parse.Parse(strings.NewReader(source), chunkName)
	if err == nil {
		var p *lua.FunctionProto
		if p, err = lua.Compile(chunk, chunkName); err == nil {
			in.protos[source] = p
			return p, nil
		}
	}
	return nil, Error("ERR Error compiling script (new function): " + strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", " "))
}

func (in *interpreter) strings(values []string) *lua.LTable {
	t := in.l.CreateTable(len(values), 0)
	for _, v := range values {
		t.Append(lua.LString(v))
	}
	return t
}

// run runs a script that was given with args: the number of keys, keys and arguments.
func (in *interpreter) run(r *request, source string) any {
	n, err := parseInt(r.arg(2))
	switch {
	case err != nil:
		return err
	case n > int64(len(r.args)-3):
		return Error("ERR Number of keys can't be greater than number of args")
	case n < 0:
		return Error("ERR Number of keys can't be negative")
	}
	proto, err := in.compile(source)
	if err != nil {
		return err
	}
	in.s.scripts[sha1Hex(source)] = source
	in.l.G.Global.RawSetString("KEYS", in.strings(r.args[3:3+n]))
	in.l.G.Global.RawSetString("ARGV", in.strings(r.args[3+n:]))
	in.client, in.wrote = r.client, false
	defer func() {
		in.l.SetTop(0)
		in.client = nil
	}()
	in.l.Push(in.l.NewFunctionFromProto(proto))
	if err := in.l.PCall(0, 1, in.failed); err != nil {
		return in.failure(err, source)
	}
	return in.reply(in.l.Get(-1))
}

// failure is what an error that ended the script is answered with.
func (in *interpreter) failure(err error, source string) any {
	api, ok := err.(*lua.ApiError)
	if !ok {
		return Error("ERR " + err.Error())
	}
	t, ok := api.Object.(*lua.LTable)
	if !ok {
		return Error("ERR " + err.Error())
	}
	msg, line := t.RawGetString("err").String(), t.RawGetString("line")
	name := " " + sha1Hex(source) + ","
	if in.s.version == Valkey91 {
		name = ""
	}
	if line != lua.LNil {
		msg += fmt.Sprintf(" script:%s on @%s:%s.", name, chunkName, line)
	}
	return Error(msg)
}

// describe is called with an error, at the place where it was raised.
func (in *interpreter) describe(l *lua.LState) int {
	t, ok := l.Get(1).(*lua.LTable)
	if !ok {
		t = l.NewTable()
		t.RawSetString("err", lua.LString("ERR "+l.Get(1).String()))
	}
	for level := 1; ; level++ {
		dbg, ok := l.GetStack(level)
		if !ok {
			break
		}
		if _, err := l.GetInfo("nSl", dbg, lua.LNil); err == nil && dbg.CurrentLine > 0 {
			t.RawSetString("line", lua.LNumber(dbg.CurrentLine))
			break
		}
	}
	l.Push(t)
	return 1
}

func (in *interpreter) field(l *lua.LState, name, s string) int {
	t := l.CreateTable(0, 1)
	t.RawSetString(name, lua.LString(s))
	l.Push(t)
	return 1
}

// errorReply gives an error without a code the code ERR.
func (in *interpreter) errorReply(l *lua.LState) int {
	msg := strings.TrimPrefix(l.CheckString(1), "-")
	if !strings.Contains(msg, " ") {
		msg = "ERR " + msg
	}
	return in.field(l, "err", msg)
}

func (in *interpreter) command() string {
	if in.s.version == Valkey91 {
		return ""
	}
	return "Redis "
}

// arguments returns those of a Lua function that is given a command.
func (in *interpreter) arguments(l *lua.LState, of string) ([]string, error) {
	n := l.GetTop()
	if n == 0 {
		return nil, Error("ERR Please specify at least one argument for this " + of)
	}
	args := make([]string, n)
	for i := range args {
		switch v := l.Get(i + 1).(type) {
		case lua.LString:
			args[i] = string(v)
		case lua.LNumber:
			if f := float64(v); f == math.Trunc(f) && math.Abs(f) < 1<<63 {
				args[i] = strconv.FormatInt(int64(f), 10)
			} else {
				args[i] = strconv.FormatFloat(f, 'g', 17, 64)
			}
		default:
			if in.s.version == Valkey91 {
				return nil, Error("ERR Command arguments must be strings or integers")
			}
			return nil, Error("ERR Lua redis lib command arguments must be strings or integers")
		}
	}
	return args, nil
}

func (in *interpreter) call(l *lua.LState, raise bool) int {
	reply := in.execute(l)
	v := in.value(reply)
	if _, failed := reply.(Error); failed && raise {
		l.Error(v, 1)
	}
	l.Push(v)
	return 1
}

func (in *interpreter) execute(l *lua.LState) any {
	lib := "redis lib "
	if in.s.version == Valkey91 {
		lib = ""
	}
	args, err := in.arguments(l, lib+"call")
	if err != nil {
		return err
	}
	s := in.s
	cmd, err := s.find(args)
	switch {
	case lookupCommand(s.commands, args[0]) == nil:
		return Error("ERR Unknown " + in.command() + "command called from script")
	case err != nil && strings.HasPrefix(string(err.(Error)), "ERR unknown sub"):
		if s.version == Valkey91 {
			return err
		}
		return Error("ERR Unknown " + in.command() + "command called from script")
	case err != nil:
		return Error("ERR Wrong number of args calling " + in.command() + "command from script")
	case cmd.flags&noScript != 0:
		name := "Redis "
		if s.version == Valkey91 {
			name = "Valkey "
		}
		return Error("ERR This " + name + "command is not allowed from script")
	}
	if refused, is := s.refused(cmd, false); is && !(in.wrote && refused.isOOM()) {
		return refused // a full server lets a script end what it has begun
	}
	in.wrote = in.wrote || cmd.flags&write != 0
	r := &request{s: s, client: in.client, args: args, inside: true}
	if s.version == Redis70 && cmd.name == "xread" || s.version == Redis70 && cmd.name == "xreadgroup" {
		for _, a := range args {
			if strings.EqualFold(a, "streams") {
				break
			}
			if strings.EqualFold(a, "block") {
				return Error("ERR " + strings.ToUpper(args[0]) + " command is not allowed with BLOCK option from scripts")
			}
		}
	}
	return cmd.run(r)
}

func (in *interpreter) aclCheck(l *lua.LState) int {
	args, err := in.arguments(l, "redis.acl_check_cmd() call")
	if err == nil && lookupCommand(in.s.commands, args[0]) == nil {
		lib := "redis"
		if in.s.version == Valkey91 {
			lib = "server"
		}
		err = Error("ERR Invalid command passed to " + lib + ".acl_check_cmd()")
	}
	if err != nil {
		l.Error(in.value(err), 1)
	}
	l.Push(lua.LTrue)
	return 1
}

// value is a reply as a script sees it.
func (in *interpreter) value(reply any) lua.LValue {
	switch v := reply.(type) {
	case nil, nullArray:
		return lua.LFalse
	case string:
		return lua.LString(v)
	case int64:
		return lua.LNumber(v)
	case status:
		t := in.l.CreateTable(0, 1)
		t.RawSetString("ok", lua.LString(v))
		return t
	case Error:
		t := in.l.CreateTable(0, 1)
		t.RawSetString("err", lua.LString(v))
		return t
	case flatMap:
		return in.list([]any(v))
	case []any:
		return in.list(v)
	case entries:
		t := in.l.CreateTable(len(v), 0)
		for _, e := range v {
			pair := in.l.CreateTable(2, 0)
			pair.Append(lua.LString(e.id.String()))
			if e.value.fields == nil {
				pair.Append(lua.LFalse)
			} else {
				pair.Append(in.strings(e.value.fields))
			}
			t.Append(pair)
		}
		return t
	}
	return in.value(plain(reply))
}

func (in *interpreter) list(values []any) *lua.LTable {
	t := in.l.CreateTable(len(values), 0)
	for _, v := range values {
		t.Append(in.value(v))
	}
	return t
}

// reply is what a script returned as a reply.
func (in *interpreter) reply(v lua.LValue) any {
	switch v := v.(type) {
	case lua.LString:
		return string(v)
	case lua.LNumber:
		return int64(v)
	case lua.LBool:
		if v {
			return int64(1)
		}
	case *lua.LTable:
		if s, ok := v.RawGetString("err").(lua.LString); ok {
			return Error(s)
		}
		if s, ok := v.RawGetString("ok").(lua.LString); ok {
			return status(s)
		}
		list := []any{}
		for i := 1; ; i++ {
			e := v.RawGetInt(i)
			if e == lua.LNil {
				return list
			}
			list = append(list, in.reply(e))
		}
	}
	return nil
}

func eval(r *request) any { return r.s.lua.run(r, r.arg(1)) }

func evalsha(r *request) any {
	source, ok := r.s.scripts[strings.ToLower(r.arg(1))]
	if !ok {
		if r.s.version == Valkey91 {
			return Error("NOSCRIPT No matching script.")
		}
		return Error("NOSCRIPT No matching script. Please use EVAL.")
	}
	return r.s.lua.run(r, source)
}

func scriptLoad(r *request) any {
	if _, err := r.s.lua.compile(r.arg(2)); err != nil {
		return err
	}
	sha := sha1Hex(r.arg(2))
	r.s.scripts[sha] = r.arg(2)
	return sha
}

func scriptExists(r *request) any {
	found := make([]any, 0, len(r.args)-2)
	for _, sha := range r.args[2:] {
		n := int64(0)
		if _, ok := r.s.scripts[strings.ToLower(sha)]; ok {
			n = 1
		}
		found = append(found, n)
	}
	return found
}

func scriptFlush(r *request) any {
	if len(r.args) > 2 && !strings.EqualFold(r.arg(2), "sync") && !strings.EqualFold(r.arg(2), "async") || len(r.args) > 3 {
		return Error("ERR SCRIPT FLUSH only support SYNC|ASYNC option")
	}
	clear(r.s.scripts)
	return status("OK")
}
