package xstream

import (
	"context"
	"errors"
	"fmt"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// deniedFunction is for scripts that must be atomic: a command that is denied to a
// script aborts it without a rollback. It returns an error if the command would be
// denied. (Trying the command on an ID that does not exist would count as a write,
// after which a server that is out of memory rejects nothing more. The embedded
// server has neither the function nor ACLs.)
const deniedFunction = `
local function denied(...)
  if not redis.acl_check_cmd or redis.acl_check_cmd(...) then return nil end
  return redis.error_reply('NOPERM no permissions to run ' .. (...) .. ': nothing is done')
end`

// evenIfFull begins a script that consumers need in order to go on, and that stores no more
// than a field of a hash, or a group. A Redis that is out of memory refuses a command that
// may need some, but in a script only before its first write. Deleting a field that does not
// exist is a write, needs no memory and changes nothing. Without the permission for HDEL the
// script works unless Redis is full.
const evenIfFull = `
redis.pcall('HDEL', KEYS[1], '')
`

// clockFunction returns the server's clock in milliseconds, rounded down unless a function is
// given. stamp writes it without an exponent.
const clockFunction = `
local function clock(round)
  local t = redis.call('TIME')
  return t[1] * 1000 + (round or math.floor)(t[2] / 1000)
end
local function stamp(ms) return string.format('%.0f', ms) end`

// rightsScript returns an error that names the commands that are denied.
const rightsScript = deniedFunction + `
local missing = {}
local function need(name, ...)
  if denied(...) then missing[#missing + 1] = name end
end
local key, group = KEYS[1], ARGV[1]
need('XREADGROUP', 'XREADGROUP', 'GROUP', group, 'c', 'STREAMS', key, '>')
need('XACK', 'XACK', key, group, '0-1')
need('XCLAIM', 'XCLAIM', key, group, 'c', 0, '0-1')
need('XPENDING', 'XPENDING', key, group)
need('XRANGE', 'XRANGE', key, '-', '+')
if #missing == 0 then return 1 end
return redis.error_reply('NOPERM the permission for ' .. table.concat(missing, ', ') .. ' is missing')`

// CheckRights returns an error that names the permissions which a consumer of the
// group lacks.
func (s *Stream) CheckRights(ctx context.Context) error {
	_, err := redisx.Do(ctx, s.Via, "eval", rightsScript, 1, s.Key, s.Group)
	if redisx.ReplyHas(err, "'eval'", "unknown command") {
		return fmt.Errorf("the permission for EVAL is missing: %w", err)
	}
	return err
}

// ErrUnsupported is the library's exported error of that name.
var ErrUnsupported = errors.New("goxstreams: not supported by the server")

// Unsupported returns the error for a feature that this server lacks.
func (s *Stream) Unsupported(ctx context.Context, what string) error {
	return fmt.Errorf("%w: %s; this is %s", ErrUnsupported, what, s.Version(ctx))
}
