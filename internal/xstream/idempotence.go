package xstream

import (
	"context"
	"errors"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// KnowsIdempotence reports whether XADD IDMP can be relied on. The server is asked for
// XIDMPRECORD, which came with Redis 8.6.2 and what that mended: what 8.6.0 and 8.6.1
// remember does not outlive a rewrite of the AOF as commands. It is asked without the
// arguments that it needs, so that nothing happens, and that no right is needed.
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

// SetIdempotence sets for how long and how many UUIDs the stream remembers. It makes
// the stream if need be: what is remembered before it is set would be forgotten. It
// may run twice.
func (s *Stream) SetIdempotence(ctx context.Context, window time.Duration, maxIDs int64) error {
	set := func() error {
		_, err := s.ask(ctx, "xcfgset", s.Key, "idmp-duration", int64(window/time.Second), "idmp-maxsize", maxIDs)
		return err
	}
	err := set()
	if !redisx.ReplyHas(err, "no such key") {
		return err
	}
	// An entry with the least ID there is, trimmed away in the same step, leaves an
	// empty stream. One that ever had an entry refuses the ID, before it trims.
	_, err = s.ask(ctx, "xadd", s.Key, "maxlen", 0, "0-1", "-", "-")
	if err != nil && !redisx.ReplyHas(err, "equal or smaller") {
		return err
	}
	return set()
}
