package redisx

import (
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"strings"

	"github.com/redis/go-redis/v9"
)

// IsReply reports whether err is an error reply of the server, as opposed to a
// broken connection: the command has arrived and this is its result.
func IsReply(err error) bool {
	_, ok := errors.AsType[redis.Error](err)
	return ok
}

// ReplyHas reports whether err is an error reply that contains one of the given
// codes or texts.
func ReplyHas(err error, prefixes ...string) bool {
	return IsReply(err) && slices.ContainsFunc(prefixes, func(p string) bool { return strings.Contains(err.Error(), p) })
}

// ReplyError is an error with the text of an error reply.
type ReplyError string

func (e ReplyError) Error() string { return string(e) }

// RedisError makes it a redis.Error.
func (ReplyError) RedisError() {}

// Redacted returns err without the arguments that a server quotes when it does not
// know a command: they may contain a payload, or the password of HELLO or AUTH.
func Redacted(err error) error {
	const quote = ", with args beginning with"
	if !ReplyHas(err, quote) {
		return err
	}
	text, _, _ := strings.Cut(err.Error(), quote)
	return ReplyError(text)
}

// IsDenied reports whether err says that the server does not permit the command, by
// its ACL or within a script, or does not know it. Retrying is pointless then.
func IsDenied(err error) bool {
	return ReplyHas(err, "NOPERM", "unknown command", "unknown subcommand", "Unknown subcommand",
		"ACL failure in script", "executing the script can't", "Unknown Redis command called from")
}

// IsClosed reports whether err says that the client was closed.
func IsClosed(err error) bool { return errors.Is(err, redis.ErrClosed) }

// NotReady reports whether err says that no server can serve the command yet, so
// that waiting may help: the server is unreachable, it is loading its data, it is a
// replica that will be promoted, or it has too many clients. Errors that only a
// change of configuration can fix do not count.
func NotReady(err error) bool {
	var untrusted *tls.CertificateVerificationError
	switch {
	case err == nil, IsClosed(err), errors.Is(err, ErrTwoServers), errors.As(err, &untrusted):
		return false
	case !IsReply(err):
		return true
	}
	return ReplyHas(err, "LOADING", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "TRYAGAIN", "NOREPLICAS", "MISCONF", "BUSY ", "max number of clients")
}

// OutOfMemory reports whether err says that the server refused the command, which may need
// memory, because it has none left. Nothing was stored. It is not among NotReady's errors:
// the server answers, and serves what needs no memory.
func OutOfMemory(err error) bool { return ReplyHas(err, "OOM ") }

// neverSent reports whether err alone shows that the command cannot have reached
// the server: see Sent.
func neverSent(err error) bool {
	if errors.Is(err, redis.ErrPoolTimeout) || errors.Is(err, redis.ErrPoolExhausted) || IsClosed(err) {
		return true
	}
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}
