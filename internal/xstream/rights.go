package xstream

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/redis/go-redis/v9"

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

// rightsScript returns the commands that are denied. The server checks the command
// and its keys.
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
return missing`

// CheckRights returns an error that names the permissions which a consumer of the
// group lacks.
func (s *Stream) CheckRights(ctx context.Context) error {
	v, err := redisx.Do(ctx, s.Via, "eval", rightsScript, 1, s.Key, s.Group)
	if redisx.ReplyHas(err, "'eval'", "unknown command") {
		return fmt.Errorf("the permission for EVAL is missing: %w", err)
	}
	if err != nil && err != redis.Nil {
		return err
	}
	rows, _ := v.([]any)
	var names []string
	for _, row := range rows {
		names = append(names, fmt.Sprint(row))
	}
	if len(names) > 0 {
		return redisx.ReplyError("NOPERM the permission for " + strings.Join(names, ", ") + " is missing")
	}
	return nil
}

// ErrUnsupported is the library's exported error of that name.
var ErrUnsupported = errors.New("goxstreams: not supported by the server")

// Unsupported returns the error for a feature that this server lacks.
func (s *Stream) Unsupported(ctx context.Context, what string) error {
	return fmt.Errorf("%w: %s; this is %s", ErrUnsupported, what, s.Version(ctx))
}
