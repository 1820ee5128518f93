package goxstreams

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/takeover"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// maxGrace is the time before CloseTimeout in which handlers are told to
	// come to an end.
	maxGrace = time.Second

	// lastWords is the time after CloseTimeout in which Redis can be told what
	// was abandoned. A command that has no answer by then is not sent again.
	lastWords = time.Second
)

// subscription is one call of Subscribe: its goroutines, and what they share. Which
// entries it has, and what is to be done next, the ledger knows. The poller adds to it,
// the finder offers it what dead consumers left; slots take from it, and the keeper
// looks after the leases. All of them end before the output channel closes.
type subscription struct {
	cfg         SubscriberConfig
	client      redisx.Client
	topic       string
	deadLetters string
	retry       Retry
	stream      xstream.Stream
	shared      *shared
	typed       *typed // a Consumer's part; nil without
	log         watermill.LoggerAdapter
	logFields   watermill.LogFields

	output   chan *message.Message
	ledger   *ledger.Ledger
	keeper   *lease.Keeper
	finder   *takeover.Finder
	reader   *reader
	mode     mode
	health   health
	stats    counters
	life     life
	loops    loops
	slots    slots
	overflow sync.Once // something of ours is pending that the ledger has not, which was said
}

// life is the contexts and the end of a subscription.
type life struct {
	parent  context.Context // Subscribe's
	base    context.Context // of parent the values, without its end
	calling context.Context // of base, for OnBroken and OnDead: ends when they are to come to an end
	ctx     context.Context // for commands; it ends lastWords after CloseTimeout

	endCalls  context.CancelCauseFunc
	cancelCtx context.CancelFunc

	closing chan struct{} // nothing new is taken
	abandon chan struct{} // CloseTimeout is over
	done    chan struct{} // the output channel is closed

	closeOnce sync.Once
	giveUp    func()      // closes abandon
	drained   atomic.Bool // nothing more comes from the reader
}

func newSubscription(s *Subscriber, ctx context.Context, topic string) *subscription {
	sub := &subscription{
		cfg:    s.config,
		client: s.shared.client,
		shared: s.shared,
		topic:  topic,
		typed:  s.typed,
		retry:  *s.config.Retry,
		log:    s.logger,
		output: make(chan *message.Message),
		loops:  newLoops(),
		life: life{
			parent: ctx, base: context.WithoutCancel(ctx),
			closing: make(chan struct{}), abandon: make(chan struct{}), done: make(chan struct{}),
		},
	}
	l := &sub.life
	l.calling, l.endCalls = context.WithCancelCause(l.base)
	l.ctx, l.cancelCtx = context.WithCancel(context.Background())
	l.giveUp = sync.OnceFunc(func() {
		sub.cancelHandlers()
		close(l.abandon)
		time.AfterFunc(lastWords, l.cancelCtx)
	})
	sub.stream = xstream.Stream{Client: sub.client, Via: sub.shared.pipe, Key: topic, Group: s.config.ConsumerGroup}
	if s.config.ConsumerGroup != "" {
		sub.deadLetters = s.config.DeadLetterTopic(topic)
		sub.stream.Consumer = sub.shared.consumer
	}
	sub.logFields = watermill.LogFields{
		"provider": "redis", "topic": topic,
		"consumer_group": sub.stream.Group, "consumer_uuid": sub.stream.Consumer,
	}
	suspect, last := sub.retry.suspects()
	sub.ledger = ledger.New(ledger.Config{
		Slots: sub.cfg.MaxConcurrency, Leased: sub.cfg.ConsumerGroup != "" && !sub.cfg.NoAck, Serve: sub.cfg.NoAck, Suspect: suspect, Last: last,
		Patience: max(minPatience, sub.cfg.ClaimMinIdle/6), Callers: maxBrokenCalls, Bounds: sub.shared.bounds, Lost: ErrLeaseLost,
	})
	sub.keeper = lease.New(lease.Config{Stream: &sub.stream, Ledger: sub.ledger, MinIdle: sub.cfg.ClaimMinIdle, Deletes: xstream.DeleteNever, Log: sub.log, Fields: sub.logFields})
	sub.finder = takeover.New(takeover.Config{
		Stream: &sub.stream, Ledger: sub.ledger, Keeper: sub.keeper, Bounds: sub.shared.bounds,
		MinIdle: sub.cfg.ClaimMinIdle, Interval: sub.cfg.ClaimInterval, Page: max(sub.cfg.BatchSize, sub.cfg.MaxConcurrency),
		Timeout: sub.cfg.ConsumerTimeout, Log: sub.log, Fields: sub.logFields,
	})
	sub.slots.running = make(map[*slot]struct{})
	sub.reader = newReader(sub)
	sub.mode = modeOf(sub)
	return sub
}

// minPatience is for how long a subscription takes nothing new, at first, for the sake
// of a message that must be alone: see ledger.Config. Most handlers end within that.
const minPatience = 5 * time.Second

// start runs the subscription until its parent ends or close is called.
func (s *subscription) start() {
	latest.Store(s)
	go s.reader.run()
	s.mode.start()
	go func() {
		select {
		case <-s.life.parent.Done():
			s.close()
		case <-s.life.closing:
		}
		s.drain()
	}()
}

// close begins the end; done tells when it is over.
func (s *subscription) close() {
	s.life.closeOnce.Do(func() {
		s.ledger.Stop()
		close(s.life.closing)
	})
}

// isClosing is asked of failures: it knows of the end of Subscribe's context
// before close has run, since a handler may see that end as soon.
func (s *subscription) isClosing() bool {
	select {
	case <-s.life.closing:
		return true
	default:
		return s.life.parent.Err() != nil
	}
}

func (s *subscription) isAbandoned() bool {
	select {
	case <-s.life.abandon:
		return true
	default:
		return false
	}
}

// cancelHandlers ends the contexts of what the user's code has in hand.
func (s *subscription) cancelHandlers() {
	s.life.endCalls(ErrSubscriberClosed)
	s.ledger.CancelAll(ErrSubscriberClosed)
}

// drain is the way from close to the closed channel: stop reading, release what
// nobody has in hand, let handlers finish, see their acks off.
func (s *subscription) drain() {
	s.log.Debug("Closing subscription", s.logFields)
	grace := min(maxGrace, s.cfg.CloseTimeout/2)
	cancel := time.AfterFunc(s.cfg.CloseTimeout-grace, s.cancelHandlers)
	abandon := time.AfterFunc(s.cfg.CloseTimeout, s.life.giveUp)
	defer s.life.cancelCtx()
	defer s.life.endCalls(nil)
	go s.noticeClosed()

	s.reader.leave()
	s.life.drained.Store(true)
	s.releaseAll()
	s.awaitSlots()
	// A slot may be asked for, and not have begun: it finds nothing any more.
	s.stats.lost.Add(int64(s.ledger.End(time.Now())))
	s.awaitSlots()
	s.waitCalls()
	s.loops.end()
	if n := s.ledger.EndAcks(); n > 0 {
		s.log.Error("Closed before all acks reached Redis; their messages will be handled again",
			fmt.Errorf("%d acks did not arrive within CloseTimeout", n), s.logFields)
	}
	s.reader.seat.Release()
	s.leave()
	cancel.Stop()
	abandon.Stop()
	close(s.output)
	s.log.Debug("Subscription closed", s.logFields)
	latest.CompareAndSwap(s, nil)
	close(s.life.done)
}

// releaseAll gives back everything that no slot has in hand: prefetched entries as if
// they had never been read, waiting ones with their count.
func (s *subscription) releaseAll() {
	queued, retries := s.ledger.Close(time.Now())
	give := make([]lease.Counted, 0, len(queued)+len(retries))
	for _, e := range queued {
		give = append(give, lease.Counted{Entry: e, Count: max(e.Count()-1, 0)})
	}
	for _, e := range retries {
		give = append(give, lease.Counted{Entry: e, Count: s.releaseCount(e, e.Next-1)})
	}
	s.release(give)
}

// release gives entries back; where that fails, they come again when their leases have
// run out.
func (s *subscription) release(give []lease.Counted) {
	if len(give) == 0 {
		return
	}
	entries := make([]*ledger.Entry, len(give))
	for i, g := range give {
		entries[i] = g.Entry
	}
	now := time.Now()
	s.ledger.Releasing(now, entries...)
	if !s.isAbandoned() {
		if err := s.mode.release(s.life.ctx, give); err != nil {
			s.log.Error("Release failed; the messages come again when their leases have run out", err,
				s.logFields.Add(watermill.LogFields{"entries": len(give)}))
		}
	}
	s.ledger.Remove(now, entries...)
}

// giveBack releases one entry, with the deliveries that are to count.
func (s *subscription) giveBack(h *task, count int64) {
	s.release([]lease.Counted{{Entry: h.Entry, Count: s.releaseCount(h.Entry, count)}})
}

// releaseCount keeps a dead entry that could not be moved dead for whoever claims
// it, which counts as no more than this delivery of it.
func (s *subscription) releaseCount(e *ledger.Entry, count int64) int64 {
	if e.Death != nil && s.retry.MaxRetries != 0 {
		return max(e.Count()-1, int64(max(s.retry.MaxRetries, 0))+2)
	}
	return max(count, 0)
}

// noticeClosed ends the drain at once if the client was closed before the Subscriber:
// nothing can be acked or released any more.
func (s *subscription) noticeClosed() {
	err := s.mode.ping(s.life.ctx)
	if redisx.IsClosed(err) {
		s.life.giveUp()
	}
}

// leave takes back what Redis knows of the subscription. Close does not wait for a Redis
// that is away on account of that.
func (s *subscription) leave() {
	if _, outage := s.health.outage(); outage == nil && !s.isAbandoned() {
		s.mode.leave(s.life.ctx)
	}
}

// waitCalls waits for OnBroken and OnDead, until CloseTimeout.
func (s *subscription) waitCalls() {
	done := make(chan struct{})
	go func() { s.slots.calls.Wait(); close(done) }()
	select {
	case <-done:
	case <-s.life.abandon:
	}
}

func (s *subscription) entryFields(e *ledger.Entry) watermill.LogFields {
	return s.logFields.Add(watermill.LogFields{"xid": e.ID, "deliveries": e.Count()})
}
