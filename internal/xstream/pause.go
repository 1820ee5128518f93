package xstream

import (
	"context"
	"strconv"
	"strings"
	"time"

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
const pauseScript = `-- pause` + evenIfFull + clockFunction + `
local since = redis.call('HGET', KEYS[1], ARGV[1])
if since and since ~= ARGV[2] then return 1 end
redis.call('HSET', KEYS[1], ARGV[1], stamp(clock()))
return 1`

// Pause pauses the group.
func (s *Stream) Pause(ctx context.Context) error {
	_, err := redisx.Do(ctx, s.Via, "eval", pauseScript, 1, ControlKey(s.Key), pausedField+s.Group, resumed)
	return err
}

// resumeScript returns 0 if the group was never paused. It may run twice.
const resumeScript = `-- resume` + evenIfFull + `
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
	s, _ := v.(string)
	ms, _ := strconv.ParseFloat(s, 64) // 0: written by hand, and not to be ignored
	return Control{Since: time.UnixMilli(int64(ms)), Known: true}
}

// Control asks whether the group is paused, by HMGET: the answer of HGET, nil as a rule, is an
// error to a client's Limiter and hooks.
func (s *Stream) Control(ctx context.Context) (Control, error) {
	reply := read(s.askAt(ctx, ControlKey(s.Key), "hmget", ControlKey(s.Key), pausedField+s.Group))
	return parseControl(next[any](reply)), reply.failed()
}

// Paused returns the groups of the topic that are paused, and since when.
func (s *Stream) Paused(ctx context.Context) (map[string]time.Time, error) {
	v, err := s.ask(ctx, "hgetall", ControlKey(s.Key))
	if err != nil {
		return nil, err
	}
	paused := make(map[string]time.Time)
	for field, value := range table(v) {
		name, ok := strings.CutPrefix(field, pausedField)
		if c := parseControl(value); ok && !c.Since.IsZero() {
			paused[name] = c.Since
		}
	}
	return paused, nil
}
