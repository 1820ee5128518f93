package goxstreams

import (
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Sentinels, to be compared with errors.Is.
var (
	// ErrSubscriberClosed is returned by Subscribe after Close. It is also the
	// cause of a message context that ends because its subscription closes.
	ErrSubscriberClosed = errors.New("goxstreams: subscriber closed")

	// ErrOutcomeUnknown means that the connection broke between a command and
	// its answer: all of the call's messages are stored, or none is. The
	// library does not send them again, because the second copy could not be
	// told from the first. With PublisherConfig.Idempotence the caller may publish
	// them again.
	ErrOutcomeUnknown = errors.New("goxstreams: outcome unknown")

	// ErrLeaseLost is the cause of a message context that ended because
	// another consumer may have the message by now.
	ErrLeaseLost = errors.New("goxstreams: lease lost")

	// ErrBroken is matched by the reason of a BrokenMessage: the entry could
	// not be unmarshaled.
	ErrBroken = errors.New("goxstreams: broken entry")

	// ErrDead is matched by every error that says a message is dead:
	// ErrRetriesExhausted and ErrPermanent.
	ErrDead = errors.New("goxstreams: dead message")

	// ErrRetriesExhausted means that the retry limit is used up.
	ErrRetriesExhausted = fmt.Errorf("%w: retries exhausted", ErrDead)

	// ErrPermanent means that trying again was judged to be of no use.
	ErrPermanent = fmt.Errorf("%w: permanent error", ErrDead)

	// ErrNacked is what Retry.ShouldRetry sees for a message that was nacked
	// without saying why.
	ErrNacked = errors.New("goxstreams: message nacked")

	// ErrUnsupported means that the server, or the right to use it, lacks what
	// an option needs. The message names both.
	ErrUnsupported = errors.New("goxstreams: not supported by the server")
)

// configErrors collects every mistake of a config, each naming its field.
type configErrors struct {
	typeName string // what the fields belong to
	errs     []error
}

func (c *configErrors) add(field, format string, args ...any) {
	if c.typeName != "" {
		field = c.typeName + "." + field
	}
	c.errs = append(c.errs, fmt.Errorf("goxstreams: %s: %s", field, fmt.Sprintf(format, args...)))
}

func (c *configErrors) err() error { return errors.Join(c.errs...) }

// isReply reports whether err is an answer of the server, as opposed to a
// broken connection: the command arrived, and this is what became of it.
func isReply(err error) bool {
	var reply redis.Error
	return errors.As(err, &reply)
}

// replyHas reports whether err is the server's answer with one of these error
// codes or beginnings.
func replyHas(err error, prefixes ...string) bool {
	if err == nil || !isReply(err) {
		return false
	}
	for _, p := range prefixes {
		if strings.Contains(err.Error(), p) {
			return true
		}
	}
	return false
}

// discreet returns err without what a server quotes of a command that it does not
// know: its arguments, among them a payload, or the password of HELLO and AUTH.
func discreet(err error) error {
	const quote = ", with args beginning with"
	if !replyHas(err, quote) {
		return err
	}
	text, _, _ := strings.Cut(err.Error(), quote)
	return redisReply(text)
}

// groupLost reports whether err says that the group, or the whole stream, is
// gone. UNBLOCKED is what Redis 7.0 says to a read that was waiting then.
func groupLost(err error) bool {
	return replyHas(err, "NOGROUP", "UNBLOCKED the stream key no longer exists")
}

// denied reports whether err says that this server does not let us use the
// command: by its ACL, because it does not know it, or because scripts are not
// offered. Trying again later is of no use then, another way is.
func denied(err error) bool {
	return replyHas(err, "NOPERM", "unknown command", "unknown subcommand", "Unknown subcommand")
}

// noScripts reports whether err says that scripts cannot be had, as opposed to
// what a script wanted to do.
func noScripts(err error) bool {
	return replyHas(err, "unknown command", "'eval'")
}

// neverSent reports whether err came before the command could reach the
// server: then nothing of it has happened.
func neverSent(err error) bool {
	if errors.Is(err, redis.ErrPoolTimeout) || errors.Is(err, redis.ErrPoolExhausted) || errors.Is(err, redis.ErrClosed) {
		return true
	}
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}
