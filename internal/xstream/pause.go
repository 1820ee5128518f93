package xstream

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/goxstreams/watermill-goxstreams/internal/pipeline"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// A group that is paused has a field in a hash beside its stream: when that began, in
// milliseconds of the server's clock. Resuming sets it to resumed instead of deleting it, so
// that a subscription can tell this from a lost key.

// ControlKey is the key of that hash: "orders.control{orders}" for "orders".
func ControlKey(key string) string { return Beside(key, "control") }

// pausedField is how the names of the hash's fields begin; the group's name follows.
const pausedField = "paused:"

const resumed = "0"

// pauseScript pauses a group. It may run twice: the first time counts.
const pauseScript = `-- pause
local since = redis.call('HGET', KEYS[1], ARGV[1])
if since and since ~= ARGV[2] then return 1 end
local t = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000)))
return 1`

// Pause pauses the group.
func (s *Stream) Pause(ctx context.Context) error {
	_, err := redisx.Do(ctx, s.Via, "eval", pauseScript, 1, ControlKey(s.Key), pausedField+s.Group, resumed)
	return err
}

// resumeScript returns 0 if the group was never paused. It may run twice.
const resumeScript = `-- resume
if not redis.call('HGET', KEYS[1], ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1`

// Resume ends a pause. It returns false if the group was never paused.
func (s *Stream) Resume(ctx context.Context) (bool, error) {
	v, err := redisx.Do(ctx, s.Via, "eval", resumeScript, 1, ControlKey(s.Key), pausedField+s.Group, resumed)
	return v == int64(1), err
}

// Control is what the hash says about a group.
type Control struct {
	Since time.Time // when the group was paused, by the server's clock; zero: it is not paused
	Known bool      // it was paused at some time; false: never, or the hash was lost
}

// parseControl parses the field's value; nil: there is none.
func parseControl(v any) Control {
	if v == nil {
		return Control{}
	}
	if v == resumed {
		return Control{Known: true}
	}
	since, err := parseScore(v)
	if err != nil {
		since = time.UnixMilli(0) // written by hand, and not to be ignored
	}
	return Control{Since: since, Known: true}
}

// Control asks whether the group is paused.
func (s *Stream) Control(ctx context.Context) (Control, error) {
	v, err := s.ask(ctx, s.controlArgs()...)
	return s.control(ctx, v, err)
}

// controlArgs asks for the field by HMGET: the answer of HGET, nil as a rule, is an error to
// a client's Limiter and hooks.
func (s *Stream) controlArgs() []any {
	return []any{"hmget", ControlKey(s.Key), pausedField + s.Group}
}

func (s *Stream) control(ctx context.Context, v any, err error) (Control, error) {
	if redisx.ReplyHas(err, "ASK ") { // as a rule: most topics have no such hash
		v, err = s.follow(ctx, ControlKey(s.Key), s.controlArgs()...)
	}
	if err != nil {
		return Control{}, err
	}
	fields, ok := v.([]any)
	if !ok || len(fields) != 1 {
		return Control{}, errReply
	}
	return parseControl(fields[0]), nil
}

// Paused returns the groups of the topic that are paused, and since when.
func (s *Stream) Paused(ctx context.Context) (map[string]time.Time, error) {
	v, err := s.ask(ctx, "hgetall", ControlKey(s.Key))
	if err != nil {
		return nil, err
	}
	paused := make(map[string]time.Time)
	add := func(field, value any) {
		name, ok := strings.CutPrefix(fmt.Sprint(field), pausedField)
		if c := parseControl(value); ok && !c.Since.IsZero() {
			paused[name] = c.Since
		}
	}
	switch v := v.(type) {
	case map[any]any:
		for field, value := range v {
			add(field, value)
		}
	case []any:
		for i := 0; i+1 < len(v); i += 2 {
			add(v[i], v[i+1])
		}
	}
	return paused, nil
}

// Tick is what a subscription asks every second. Each answer has its own error.
type Tick struct {
	Delayed    bool // delayed messages wait
	DelayedErr error

	Control    Control
	ControlErr error
}

// Tick asks for both, or for one, in one round trip.
func (s *Stream) Tick(ctx context.Context, delayed, control bool) (t Tick) {
	var commands [][]any
	if delayed {
		commands = append(commands, []any{"zrange", DueKey(s.Key), 0, 0})
	}
	if control {
		commands = append(commands, s.controlArgs())
	}
	answers := s.askAll(ctx, commands)
	if delayed {
		var v any
		v, t.DelayedErr = answers[0].value()
		rows, ok := v.([]any)
		t.Delayed = t.DelayedErr == nil && (!ok || len(rows) > 0)
		answers = answers[1:]
	}
	if control {
		v, err := answers[0].value()
		t.Control, t.ControlErr = s.control(ctx, v, err)
	}
	return t
}

// answer is the outcome of one of several commands.
type answer struct {
	cmd redisx.OnceCmd
	err error // the command was not sent, or has no answer: it must not be read
}

func (a answer) value() (any, error) {
	if a.err != nil {
		return nil, a.err
	}
	v, err := a.cmd.Result()
	return v, redisx.Redacted(err)
}

// askAll is ask for several commands, which must all be read-only, in one pipeline.
func (s *Stream) askAll(ctx context.Context, commands [][]any) []answer {
	answers := make([]answer, len(commands))
	again := true
	for tries := 0; again && tries < 2; tries++ {
		again = false
		via, err := s.together(ctx)
		cmds := make([]redis.Cmder, len(commands))
		for i, args := range commands {
			answers[i] = answer{cmd: redisx.NewOnce(ctx, args...)}
			cmds[i] = answers[i].cmd
		}
		if err == nil {
			err = via.Do(ctx, cmds...)
		}
		for i := range answers {
			answers[i].err = err
			_, err := answers[i].value()
			again = again || s.Client.Rerouted(ctx, err) ||
				err != nil && !redisx.IsReply(err) && !redisx.IsClosed(err) && ctx.Err() == nil // the connection may have been stale
		}
	}
	return answers
}

// together returns what sends several commands to the master at once.
func (s *Stream) together(ctx context.Context) (*pipeline.Pipeline, error) {
	master, err := s.Client.Master(ctx, s.Via, s.Key)
	if err != nil {
		return nil, err
	}
	switch master := master.(type) {
	case *pipeline.Pipeline:
		return master, nil
	case *redis.Client: // a node of a Cluster
		return pipeline.New(redisx.Client{UniversalClient: master}, 0, true), nil
	}
	return pipeline.New(s.Client, 0, true), nil
}
