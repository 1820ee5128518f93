package redisx

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// Sent is an argument of a command that knows whether the command was written to a
// connection: only then does go-redis ask for its value. This tells apart failures
// before the write (in the dial, the TLS handshake, the credentials, OnConnect, a
// Limiter, a hook, or the wait for a connection) from those after which the server
// may have the command, whatever the error looks like.
type Sent struct {
	value   []byte
	written atomic.Bool
}

// NewSent returns an argument with the given value.
func NewSent(value string) *Sent { return &Sent{value: []byte(value)} }

var asterisk = []byte("*")

// Asterisk sets the value to "*", of a command that is not written yet.
func (s *Sent) Asterisk() {
	s.value = asterisk
	s.written.Store(false)
}

// MarshalBinary is called by go-redis when it writes the command.
func (s *Sent) MarshalBinary() ([]byte, error) {
	s.written.Store(true)
	return s.value, nil
}

// String is for hooks that print commands.
func (s *Sent) String() string { return string(s.value) }

// ErrOutcomeUnknown means that a command may have run.
var ErrOutcomeUnknown = errors.New("goxstreams: outcome unknown")

// Outcome returns the command's error, wrapped in ErrOutcomeUnknown if the command
// may have run without an answer.
func (s *Sent) Outcome(err error) error {
	// The error counts too: a Cluster client may write a command, be redirected,
	// and then fail to reach the other node.
	if err == nil || IsReply(err) || neverSent(err) || !s.written.Load() {
		return Redacted(err)
	}
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
}
