package xstream

import (
	"context"
	"errors"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// KnowsIdempotence reports whether XADD IDMP is reliable. It checks for
// XIDMPRECORD, which came with Redis 8.6.2 and its fix: what 8.6.0 and 8.6.1
// remember does not survive a rewrite of the AOF as commands. It sends the command
// without arguments, so that nothing happens and no permission is needed.
func (s *Stream) KnowsIdempotence(ctx context.Context) (bool, error) {
	_, err := s.ask(ctx, "xidmprecord", s.Key)
	switch {
	case redisx.ReplyHas(err, "unknown command"):
		return false, nil
	case redisx.ReplyHas(err, "wrong number of arguments", "NOPERM"):
		return true, nil
	case err == nil:
		return false, errors.New("XIDMPRECORD without arguments is no error")
	}
	return false, err
}

// SetIdempotence sets how long, and how many, UUIDs the stream remembers. It
// creates the stream if necessary, since a later change of the settings would
// forget the UUIDs. It may run twice.
func (s *Stream) SetIdempotence(ctx context.Context, window time.Duration, maxIDs int64) error {
	set := func() error {
		_, err := s.ask(ctx, "xcfgset", s.Key, "idmp-duration", int64(window/time.Second), "idmp-maxsize", maxIDs)
		return err
	}
	err := set()
	if !redisx.ReplyHas(err, "no such key") {
		return err
	}
	// Adding an entry with the lowest possible ID and trimming it in the same step
	// leaves an empty stream. A stream that ever had an entry rejects the ID before
	// it trims.
	_, err = s.ask(ctx, "xadd", s.Key, "maxlen", 0, "0-1", "-", "-")
	if err != nil && !redisx.ReplyHas(err, "equal or smaller") {
		return err
	}
	return set()
}
