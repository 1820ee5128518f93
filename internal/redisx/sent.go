package redisx

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// Sent is an argument of a command that knows whether the command was written to
// a connection: go-redis asks it for its value then, and not before. So what
// fails while dialing, in a TLS handshake, for want of credentials, in OnConnect,
// at a Limiter, in a hook, or while waiting for a connection, is told from what
// may have reached the server, whatever the error looks like.
type Sent struct {
	value []byte
	begun atomic.Bool
}

// NewSent returns an argument with that value.
func NewSent(value string) *Sent { return &Sent{value: []byte(value)} }

var asterisk = []byte("*")

// Asterisk makes it the argument "*".
func (s *Sent) Asterisk() { s.value = asterisk }

// MarshalBinary is called by go-redis when it writes the command.
func (s *Sent) MarshalBinary() ([]byte, error) {
	s.begun.Store(true)
	return s.value, nil
}

// String is for hooks that print commands.
func (s *Sent) String() string { return string(s.value) }

// ErrOutcomeUnknown is said of a command that may have run.
var ErrOutcomeUnknown = errors.New("goxstreams: outcome unknown")

// Outcome returns the command's error, as ErrOutcomeUnknown if the command may have
// run without an answer.
func (s *Sent) Outcome(err error) error {
	// The error is asked too: a Cluster's client writes a command, is redirected,
	// and then fails to reach the other node.
	if err == nil || IsReply(err) || neverSent(err) || !s.begun.Load() {
		return Redacted(err)
	}
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
}
