package goxstreams

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
	"github.com/redis/go-redis/v9"
)

// Idempotence makes a Publisher store each message UUID once per topic. After
// ErrOutcomeUnknown, publish the same messages again until the error is nil:
// messages that are already stored are not stored again.
//
// Redis remembers the UUIDs beside the stream (XADD IDMP), across restarts and
// failovers like the entries themselves. It needs Redis 8.6.2, which the first
// Publish to a topic checks; on older servers Publish fails with ErrUnsupported and
// stores nothing. (8.6.0 and 8.6.1 count as older: according to 8.6.2's release
// notes they lose UUIDs when they rewrite the AOF as commands.)
//
//   - Every message needs a UUID. A message whose UUID was already published to the
//     topic is not stored, even if its payload differs or the first entry was
//     deleted. So do not publish a message again on purpose, as Watermill's
//     Requeuer does. A replay by DeadLetterQueue is not a Publish, and works.
//   - All Publishers of a topic need the same Window and MaxIDs: a Publisher with
//     different values changes the stream's settings, and Redis forgets the topic's
//     UUIDs.
//   - If a Publisher recreates a deleted stream, it also restores the settings. If
//     anything else recreates it, such as a Subscriber that creates its group, the
//     stream has the server's default settings until another Publisher starts. If
//     that may happen, set stream-idmp-duration and stream-idmp-maxsize on the
//     server, too.
//
// With ACLs, the user needs XCFGSET in addition to XADD.
type Idempotence struct {
	// ProducerID is the producer under which Redis remembers UUIDs. Publishers with
	// the same ProducerID share their UUIDs: whichever process publishes a message
	// again, it is stored once. They also share MaxIDs. If several Publishers have
	// very high rates, give each its own ProducerID, one that survives a restart
	// (for example, a StatefulSet's host name). Default: "goxstreams", for all.
	ProducerID string

	// Window is how long Redis remembers a UUID, in whole seconds, at most 24 hours
	// (Redis's limit). It must exceed the longest time between a message's first
	// and last Publish. Default: 10 minutes, twice the 5 minutes that Kubernetes
	// waits at most before it restarts a container. (Redis's own default is 100s.)
	Window time.Duration

	// MaxIDs is how many UUIDs Redis remembers per ProducerID and topic within
	// Window, the newest ones; each takes about 130 bytes. From 1 to 10,000
	// (Redis's limit). One Publish call cannot have more messages. Default: 10,000;
	// if you publish at most that many messages per Window, only Window matters.
	// (Redis's own default is 100.)
	MaxIDs int64
}

// Defaults of Idempotence, and the limits of XCFGSET.
const (
	defaultProducerID = "goxstreams"
	defaultWindow     = 10 * time.Minute
	maxWindow         = 86_400 * time.Second
	mostIDs           = 10_000
)

func (i Idempotence) withDefaults() *Idempotence {
	i.ProducerID = cmp.Or(i.ProducerID, defaultProducerID)
	i.Window = cmp.Or(i.Window, defaultWindow)
	i.MaxIDs = cmp.Or(i.MaxIDs, mostIDs)
	return &i
}

func (i Idempotence) validate(errs *configErrors) {
	atLeast(errs, "Idempotence.Window", i.Window, 0)
	errs.addIf(i.Window > maxWindow, "Idempotence.Window", "is %v; Redis remembers for %v at most", i.Window, maxWindow)
	errs.addIf(i.Window > 0 && i.Window <= maxWindow && i.Window%time.Second != 0, "Idempotence.Window", "is %v; it must be whole seconds", i.Window)
	atLeast(errs, "Idempotence.MaxIDs", i.MaxIDs, 0)
	errs.addIf(i.MaxIDs > mostIDs, "Idempotence.MaxIDs", "is %d; Redis remembers %d at most", i.MaxIDs, mostIDs)
}

var errNoUUID = errors.New("the UUID is empty, but PublisherConfig.Idempotence requires one")

// maxRemade is how often one call recreates a deleted stream.
const maxRemade = 10

// producerID returns the ID by which Redis remembers UUIDs; empty without Idempotence.
func (p *Publisher) producerID() string {
	if p.config.Idempotence == nil {
		return ""
	}
	return p.config.Idempotence.ProducerID
}

// whilePrepared sends a call, with Idempotence to a stream configured for it. Then its XADDs
// do not create the stream (NOMKSTREAM), since a deleted stream would be recreated with
// the server's default settings. A nil reply means that the stream is gone and
// nothing is stored: send is called again.
func (p *Publisher) whilePrepared(ctx context.Context, topic string, messages int, send func() error) error {
	if p.config.Idempotence == nil {
		return send()
	}
	if most := p.config.Idempotence.MaxIDs; int64(messages) > most {
		// The call could not be repeated: its last UUIDs would evict its first ones, which
		// would then be stored again.
		return fmt.Errorf("%d messages in one call exceed PublisherConfig.Idempotence.MaxIDs (%d)", messages, most)
	}
	for range maxRemade {
		if err := p.prepare(ctx, topic); err != nil {
			return fmt.Errorf("nothing is stored: %w", err)
		}
		err := send()
		if errors.Is(err, redis.Nil) {
			p.prepared.Delete(topic)
			continue
		}
		if redisx.ReplyHas(err, "Invalid stream ID") { // a server without IDMP has taken over
			p.prepared.Delete(topic)
		}
		return err
	}
	return errors.New("nothing is stored: the stream keeps being deleted")
}

// prepare configures the topic's stream to remember UUIDs, and creates it if
// necessary, once per topic. Concurrent calls, also from other processes, are
// harmless: XCFGSET forgets UUIDs only if it changes a value.
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
