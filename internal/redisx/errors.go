package redisx

import (
	"crypto/tls"
	"errors"
	"net"
	"strings"

	"github.com/redis/go-redis/v9"
)

// IsReply reports whether err is an answer of the server, as opposed to a
// broken connection: the command arrived, and this is what became of it.
func IsReply(err error) bool {
	var reply redis.Error
	return errors.As(err, &reply)
}

// ReplyHas reports whether err is the server's answer with one of these error
// codes or beginnings.
func ReplyHas(err error, prefixes ...string) bool {
	if err == nil || !IsReply(err) {
		return false
	}
	for _, p := range prefixes {
		if strings.Contains(err.Error(), p) {
			return true
		}
	}
	return false
}

// ReplyError is an error with the text of a server's answer.
type ReplyError string

func (e ReplyError) Error() string { return string(e) }

// RedisError makes it a redis.Error.
func (ReplyError) RedisError() {}

// Redacted returns err without what a server quotes of a command that it does not
// know: its arguments, among them a payload, or the password of HELLO and AUTH.
func Redacted(err error) error {
	const quote = ", with args beginning with"
	if !ReplyHas(err, quote) {
		return err
	}
	text, _, _ := strings.Cut(err.Error(), quote)
	return ReplyError(text)
}

// IsDenied reports whether err says that this server does not let us use the
// command: by its ACL, also within a script, or because it does not know it. Trying
// again later is of no use then.
func IsDenied(err error) bool {
	return ReplyHas(err, "NOPERM", "unknown command", "unknown subcommand", "Unknown subcommand",
		"ACL failure in script", "executing the script can't", "Unknown Redis command called from")
}

// IsClosed reports whether err says that the client was closed.
func IsClosed(err error) bool { return errors.Is(err, redis.ErrClosed) }

// NotReady reports whether err says that there is no server yet that could do what
// was asked, so that waiting may help: it cannot be reached, it is loading its
// data, it is a replica that will be promoted, or there are too many clients. A
// refusal that only a change of the configuration ends is none.
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

// neverSent reports whether err came before a command could reach the server, as
// far as the error alone tells: see Sent.
func neverSent(err error) bool {
	if errors.Is(err, redis.ErrPoolTimeout) || errors.Is(err, redis.ErrPoolExhausted) || IsClosed(err) {
		return true
	}
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}
