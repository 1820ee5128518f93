package goxstreams

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// maxWaiting bounds the nacked messages whose leases are kept up while they
	// wait for their retry.
	maxWaiting = 10_000

	// maxGrace is the time before CloseTimeout in which handlers are told to
	// come to an end.
	maxGrace = time.Second

	// lastWords is the time after CloseTimeout in which Redis can be told what
	// was abandoned. A command that has no answer by then is not sent again.
	lastWords = time.Second
)

// subscription is one call of Subscribe: its goroutines, and what they share.
//
// The poller fills queue; the claimer fills claims and suspects; slots take from
// them, and from retries what is due. The acker and the keeper look after what
// is in leases. All of them end before the output channel closes.
type subscription struct {
	cfg         SubscriberConfig
	client      redisx.Client
	topic       string
	deadLetters string
	retry       Retry
	stream      xstream.Stream
	shared      *shared
	log         watermill.LoggerAdapter
	logFields   watermill.LogFields
	parent      context.Context // Subscribe's
	base        context.Context // of parent the values, without its end
	calling     context.Context // of base, for OnBroken and OnDead: ends when they are to come to an end
	endCalls    context.CancelCauseFunc
	ctx         context.Context // for commands; it ends lastWords after CloseTimeout
	cancelCtx   context.CancelFunc

	output   chan *message.Message
	leases   leases
	reader   *reader
	acker    *acker
	claimer  *claimer
	position *position // in fan-out; else nil
	health   health
	stats    counters

	typed *typed // a Consumer's part; nil without

	deletes    xstream.Delete
	kept       atomic.Bool // DeleteAcked may have kept something for a fan-out
	overflowed atomic.Bool // something of ours is pending that is not held: see pushRetry
	once       struct{ severalGroups, overflow, janitor, trim sync.Once }

	closing   chan struct{} // nothing new is taken
	abandon   chan struct{} // CloseTimeout is over
	withdraw  chan struct{} // an offered message is taken back: closing, or abandon where it would be lost
	done      chan struct{} // the output channel is closed
	closeOnce sync.Once
	giveUp    func() // closes abandon

	calls       sync.WaitGroup // of OnBroken and OnDead
	brokenCalls chan struct{}

	regrouping sync.Mutex
	progress   progress // guarded by regrouping

	mu       sync.Mutex
	ready    *sync.Cond
	queue    []*held
	claims   []*held
	suspects []*held
	retries  waitHeap
	timer    *time.Timer // for the retry that is due first; nil: none is to come
	timerAt  time.Time
	prefetch int
	slots    map[*slot]struct{} // that run
	noSlots  chan struct{}      // closed when none runs; nil: nobody waits for that
	idle     int                // slots that wait for work
	busy     int                // slots that have an entry in hand
	alone    bool               // a suspect is in hand
	parked   bool               // the reader waits for room
	stopping bool               // nothing new is taken
	drained  bool               // nothing more comes from the reader
}

func newSubscription(s *Subscriber, ctx context.Context, topic string) *subscription {
	sub := &subscription{
		cfg:         s.config,
		client:      s.shared.client,
		shared:      s.shared,
		topic:       topic,
		typed:       s.typed,
		parent:      ctx,
		base:        context.WithoutCancel(ctx),
		retry:       *s.config.Retry,
		log:         s.logger,
		output:      make(chan *message.Message),
		leases:      leases{m: make(map[string]*held)},
		deletes:     xstream.DeleteNever,
		closing:     make(chan struct{}),
		abandon:     make(chan struct{}),
		done:        make(chan struct{}),
		brokenCalls: make(chan struct{}, maxBrokenCalls),
		slots:       make(map[*slot]struct{}),
	}
	sub.giveUp = sync.OnceFunc(func() {
		sub.endCalls(ErrSubscriberClosed)
		sub.leases.cancelAll(ErrSubscriberClosed)
		close(sub.abandon)
		time.AfterFunc(lastWords, sub.cancelCtx)
	})
	sub.calling, sub.endCalls = context.WithCancelCause(sub.base)
	sub.ctx, sub.cancelCtx = context.WithCancel(context.Background())
	sub.stream = xstream.Stream{Client: sub.client, Via: sub.shared.line, Key: topic, Group: s.config.ConsumerGroup}
	if !sub.fanOut() {
		sub.deadLetters = s.config.DeadLetterTopic(topic)
		sub.stream.Consumer = sub.shared.consumer
	}
	sub.logFields = watermill.LogFields{
		"provider": "redis", "topic": topic,
		"consumer_group": sub.stream.Group, "consumer_uuid": sub.stream.Consumer,
	}
	sub.withdraw = sub.closing
	if sub.cfg.NoAck {
		sub.withdraw = sub.abandon
	}
	sub.ready = sync.NewCond(&sub.mu)
	sub.reader = newReader(sub)
	sub.acker = newAcker(sub)
	sub.claimer = newClaimer(sub)
	if sub.fanOut() {
		sub.position = newPosition(sub)
	}
	return sub
}

func (s *subscription) fanOut() bool { return s.cfg.ConsumerGroup == "" }

// leased reports whether entries stay pending until they are acked.
func (s *subscription) leased() bool { return !s.fanOut() && !s.cfg.NoAck }

// start runs the subscription until its parent ends or close is called.
func (s *subscription) start() {
	latest.Store(s)
	s.shared.open.Add(1)
	go s.reader.run()
	if s.leased() {
		go s.acker.run()
		go s.claimer.keep()
	}
	if s.fanOut() {
		go s.position.run()
	} else {
		go s.claimer.run()
	}
	go func() {
		select {
		case <-s.parent.Done():
			s.close()
		case <-s.closing:
		}
		s.drain()
	}()
}

// close begins the end; done tells when it is over.
func (s *subscription) close() {
	s.closeOnce.Do(func() {
		s.mu.Lock()
		s.stopping = true
		s.mu.Unlock()
		close(s.closing)
	})
}

// isClosing is asked of failures: it knows of the end of Subscribe's context
// before close has run, since a handler may see that end as soon.
func (s *subscription) isClosing() bool {
	select {
	case <-s.closing:
		return true
	default:
		return s.parent.Err() != nil
	}
}

func (s *subscription) isAbandoned() bool {
	select {
	case <-s.abandon:
		return true
	default:
		return false
	}
}

// drain is the way from close to the closed channel: stop reading, release what
// nobody has in hand, let handlers finish, see their acks off.
func (s *subscription) drain() {
	s.log.Debug("Closing subscription", s.logFields)
	grace := min(maxGrace, s.cfg.CloseTimeout/2)
	cancel := time.AfterFunc(s.cfg.CloseTimeout-grace, func() {
		s.endCalls(ErrSubscriberClosed)
		s.leases.cancelAll(ErrSubscriberClosed)
	})
	abandon := time.AfterFunc(s.cfg.CloseTimeout, s.giveUp)
	defer s.cancelCtx()
	defer s.endCalls(nil)
	go s.noticeClosed()

	s.reader.leave()
	s.mu.Lock()
	s.drained = true
	s.idle = 0
	s.ready.Broadcast()
	s.mu.Unlock()
	s.releaseHeld()
	s.awaitSlots()
	s.waitCalls()
	if s.fanOut() {
		<-s.position.done
	}
	s.claimer.halt()

	if s.leased() {
		if n := s.acker.end(); n > 0 {
			s.log.Error("Closed before all acks reached Redis; their messages will be handled again",
				fmt.Errorf("%d acks did not arrive within CloseTimeout", n), s.logFields)
		}
	}
	s.reader.seat.Release()
	s.removeConsumer()
	cancel.Stop()
	abandon.Stop()
	s.shared.open.Add(-1)
	close(s.output)
	s.log.Debug("Subscription closed", s.logFields)
	latest.CompareAndSwap(s, nil)
	close(s.done)
}

// noticeClosed ends the drain at once if the client was closed before the Subscriber:
// nothing can be acked or released any more.
func (s *subscription) noticeClosed() {
	var err error
	if s.fanOut() {
		_, err = s.stream.Info(s.ctx)
	} else {
		_, _, err = s.stream.PendingSummary(s.ctx)
	}
	if redisx.IsClosed(err) {
		s.giveUp()
	}
}

// removeConsumer takes the consumer's name out of the group, unless other
// subscriptions of the topic have it or something is pending under it; in fan-out
// it takes the position back.
func (s *subscription) removeConsumer() {
	if _, outage := s.health.outage(); outage != nil || s.isAbandoned() {
		return // Close does not wait for Redis on account of a name
	}
	if s.fanOut() {
		s.position.remove()
		return
	}
	if s.shared.poller.Has(s.topic) {
		return
	}
	if err := s.stream.RemoveConsumer(s.ctx); err != nil {
		s.log.Debug("The consumer's name stays in the group: "+err.Error(), s.logFields)
	}
}

// waitCalls waits for OnBroken and OnDead, until CloseTimeout.
func (s *subscription) waitCalls() {
	done := make(chan struct{})
	go func() { s.calls.Wait(); close(done) }()
	select {
	case <-done:
	case <-s.abandon:
	}
}

func (s *subscription) entryFields(h *held) watermill.LogFields {
	return s.logFields.Add(watermill.LogFields{"xid": h.id, "deliveries": h.count})
}
