package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
	"github.com/redis/go-redis/v9"
)

// Idempotence makes a Publisher store each message's UUID once in a topic. Who gets
// ErrOutcomeUnknown publishes the same messages again, until the error is nil: what
// is stored already is not stored a second time.
//
// Redis remembers the UUIDs beside the stream (XADD IDMP), through restarts and
// failovers as it does the entries. It needs Redis 8.6.2, which is asked of the
// server at a topic's first Publish; without, Publish fails with ErrUnsupported and
// stores nothing. (8.6.0 and 8.6.1 count as without: by 8.6.2's release notes they lose
// UUIDs when they rewrite the AOF as commands.)
//
//   - Every message needs a UUID. What has a UUID that was published to the topic
//     before is not stored, though its payload may differ or the first one be
//     deleted: do not publish with it what is meant to come again, as Watermill's
//     Requeuer does. DeadLetterQueue's replays are no Publish, and do come.
//   - All Publishers of a topic need the same Window and MaxIDs: one that comes with
//     others sets them anew, and what Redis remembered of the topic is forgotten.
//   - A stream that was deleted and made again by a Publisher is set anew; one that
//     somebody else made, such as a Subscriber its group's, has the server's settings
//     until another Publisher comes. Set these too, stream-idmp-duration and
//     stream-idmp-maxsize, if that may happen.
//
// On an ACL it needs the right to XCFGSET besides XADD.
type Idempotence struct {
	// ProducerID is in whose name Redis remembers UUIDs. Publishers with the same
	// one know each other's UUIDs: whichever process publishes a message again, it
	// is stored once. They share MaxIDs too; where several publish very much, give
	// each its own, which must outlive a restart (a StatefulSet's host name, say).
	// Default "goxstreams", for all.
	ProducerID string

	// Window is how long Redis remembers a UUID, in whole seconds up to 24 hours
	// (Redis's limit). It must exceed the longest time between a message's first
	// Publish and its last. Default 10 minutes: twice the 5 minutes that Kubernetes
	// waits at most before it restarts a container. (Redis's own is 100s.)
	Window time.Duration

	// MaxIDs is how many UUIDs of a ProducerID Redis remembers of a topic, the newest
	// ones, within Window; each takes about 130 bytes. 1 to 10,000 (Redis's limit), and
	// no call of Publish may have more messages. Default 10,000: publishing as many
	// per Window or fewer, Window alone counts. (Redis's own is 100.)
	MaxIDs int64
}

// Defaults of Idempotence, and the limits of Redis's XCFGSET.
const (
	defaultProducerID = "goxstreams"
	defaultWindow     = 10 * time.Minute
	maxWindow         = 86_400 * time.Second
	mostIDs           = 10_000
)

func (i Idempotence) withDefaults() *Idempotence {
	if i.ProducerID == "" {
		i.ProducerID = defaultProducerID
	}
	if i.Window == 0 {
		i.Window = defaultWindow
	}
	if i.MaxIDs == 0 {
		i.MaxIDs = mostIDs
	}
	return &i
}

func (i Idempotence) validate(errs *configErrors) {
	switch {
	case i.Window < 0:
		errs.add("Idempotence.Window", "is negative: %v", i.Window)
	case i.Window > maxWindow:
		errs.add("Idempotence.Window", "is %v; Redis remembers for %v at most", i.Window, maxWindow)
	case i.Window%time.Second != 0:
		errs.add("Idempotence.Window", "is %v; it must be whole seconds", i.Window)
	}
	switch {
	case i.MaxIDs < 0:
		errs.add("Idempotence.MaxIDs", "is negative: %d", i.MaxIDs)
	case i.MaxIDs > mostIDs:
		errs.add("Idempotence.MaxIDs", "is %d; Redis remembers %d at most", i.MaxIDs, mostIDs)
	}
}

// takes returns an error for a call that could not be repeated: its first UUIDs would
// be forgotten for its last ones, and then be stored again one after the other.
func (i Idempotence) takes(messages int) error {
	if int64(messages) > i.MaxIDs {
		return fmt.Errorf("%d messages in one call are more than the PublisherConfig.Idempotence.MaxIDs %d that Redis remembers", messages, i.MaxIDs)
	}
	return nil
}

var errNoUUID = errors.New("the UUID is empty, which PublisherConfig.Idempotence goes by")

// maxRemade bounds how often one call finds its stream deleted and makes it again.
const maxRemade = 10

// sendIdempotent is send for a stream that is set to remember. Its XADDs do not make
// the stream (NOMKSTREAM), or a deleted one would come back with the server's own
// settings. An answer of nil says that it is gone, and that nothing is stored.
func (p *Publisher) sendIdempotent(topic string, call *xstream.Publishing) error {
	if err := p.config.Idempotence.takes(call.Len()); err != nil {
		return err
	}
	for range maxRemade {
		if err := p.prepare(call.Context(), topic); err != nil {
			return fmt.Errorf("nothing is stored: %w", err)
		}
		err := p.send(topic, call)
		if errors.Is(err, redis.Nil) {
			p.prepared.Delete(topic)
			call = call.Again()
			continue
		}
		if redisx.ReplyHas(err, "Invalid stream ID") { // a server that does not know IDMP has taken over
			p.prepared.Delete(topic)
		}
		return err
	}
	return errors.New("nothing is stored: the stream is deleted again and again")
}

// prepare sets the topic's stream to remember UUIDs, and makes it if need be, once.
// That several goroutines or processes do so at once changes nothing: XCFGSET
// forgets the UUIDs only if it changes a value.
func (p *Publisher) prepare(ctx context.Context, topic string) error {
	if _, ok := p.prepared.Load(topic); ok {
		return nil
	}
	s := xstream.New(p.client, topic, "")
	known, err := s.KnowsIdempotence(ctx)
	if err == nil && !known {
		return s.Unsupported(ctx, "PublisherConfig.Idempotence needs XADD IDMP and XIDMPRECORD (Redis 8.6.2)")
	}
	if err == nil {
		err = s.SetIdempotence(ctx, p.config.Idempotence.Window, p.config.Idempotence.MaxIDs)
	}
	if redisx.IsDenied(err) {
		return fmt.Errorf("%w: PublisherConfig.Idempotence: %w", ErrUnsupported, redisx.Redacted(err))
	}
	if err != nil {
		p.client.Refresh(err)
		return fmt.Errorf("PublisherConfig.Idempotence: %w", redisx.Redacted(err))
	}
	p.prepared.Store(topic, struct{}{})
	return nil
}
