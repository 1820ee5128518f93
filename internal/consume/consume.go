// Package consume is one subscription: it reads entries, hands them to slots, sees to their
// leases, and drains. What an entry means, and what becomes of it, its Work decides. It
// knows no messages.
package consume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"

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

	// minPatience is for how long a subscription takes nothing new, at first, for the
	// sake of a message that must be alone: see ledger.Config. Most handlers end within
	// that.
	minPatience = 5 * time.Second

	// maxCallers bounds how many calls of CallBroken can hang.
	maxCallers = 16
)

// Work is what is done with entries. It brings each to its outcome, by a method of
// Subscription that ends it: Settle, Drop, Again, Snooze, Aside, GiveBack, Broken,
// MoveFailed, NotOurs or Abandoned; or by HandOver where that returns false.
type Work interface {
	// Handle is called in a slot, with an entry that is ours and has its fields, or has died
	// already and waits to be moved.
	Handle(*Task)
	// CallBroken is called, beside the slots, with what Broken was called with before.
	CallBroken(*Task)
}

// Config is what a subscription goes by. Its fields are those of SubscriberConfig,
// checked and with their defaults, but for these.
type Config struct {
	Topic, Group    string
	StartID         string
	MaxConcurrency  int
	BatchSize       int
	WaitForRedis    time.Duration
	NoAck           bool
	DeleteAcked     bool
	ClaimMinIdle    time.Duration
	ClaimInterval   time.Duration
	CloseTimeout    time.Duration
	ConsumerTimeout time.Duration

	DeadLetters string        // the topic's dead-letter stream
	Suspect     int64         // the delivery from which on a claimed message may be what crashed its holder; 0: none is
	Last        int64         // the last delivery that is granted; 0: there is no limit
	TakeAgain   time.Duration // the pause after an entry could not be taken for its retry
	LeaseLost   error         // the cause of a context that ends because its lease is lost
	Closed      error         // because the subscription closes

	Log    watermill.LoggerAdapter
	Fields watermill.LogFields // of every line
}

// Subscription is the goroutines of one call of Subscribe, and what they share. Which
// entries it has, and what is to be done next, the ledger knows. The poller adds to it,
// the finder offers it what dead consumers left; slots take from it, and the keeper
// looks after the leases. All of them have ended when Done is closed.
type Subscription struct {
	cfg    Config
	work   Work
	shared *Shared
	stream xstream.Stream

	ledger   *ledger.Ledger
	keeper   *lease.Keeper
	finder   *takeover.Finder
	reader   *reader
	mode     mode
	health   health
	life     life
	loops    loops
	slots    slots
	overflow sync.Once // something of ours is pending that the ledger has not, which was said

	claimed, lost atomic.Int64
}

// life is the contexts and the end of a subscription.
type life struct {
	parent  context.Context // Subscribe's
	base    context.Context // of parent the values, without its end
	calling context.Context // of base, for the user's functions beside the slots: ends when they are to come to an end
	ctx     context.Context // for commands; it ends lastWords after CloseTimeout

	endCalls  context.CancelCauseFunc
	cancelCtx context.CancelFunc

	closing chan struct{} // nothing new is taken
	abandon chan struct{} // CloseTimeout is over
	done    chan struct{} // all has ended

	closeOnce sync.Once
	giveUp    func()      // closes abandon
	drained   atomic.Bool // nothing more comes from the reader
}

// New returns a subscription that is to be opened and started. It is not the end of ctx
// that its messages' contexts have, but its values.
func New(ctx context.Context, shared *Shared, cfg Config, work Work) *Subscription {
	s := &Subscription{
		cfg: cfg, work: work, shared: shared,
		stream: xstream.Stream{Client: shared.client, Via: shared.pipe, Key: cfg.Topic, Group: cfg.Group},
		loops:  newLoops(),
		life: life{
			parent: ctx, base: context.WithoutCancel(ctx),
			closing: make(chan struct{}), abandon: make(chan struct{}), done: make(chan struct{}),
		},
	}
	l := &s.life
	l.calling, l.endCalls = context.WithCancelCause(l.base)
	l.ctx, l.cancelCtx = context.WithCancel(context.Background())
	l.giveUp = sync.OnceFunc(func() {
		s.cancelHandlers()
		close(l.abandon)
		time.AfterFunc(lastWords, l.cancelCtx)
	})
	if cfg.Group != "" {
		s.stream.Consumer = shared.consumer
	}
	s.cfg.Fields = cfg.Fields.Add(watermill.LogFields{"consumer_uuid": s.stream.Consumer})
	s.ledger = ledger.New(ledger.Config{
		Slots: cfg.MaxConcurrency, Leased: cfg.Group != "" && !cfg.NoAck, Serve: cfg.NoAck, Suspect: cfg.Suspect, Last: cfg.Last,
		Patience: max(minPatience, cfg.ClaimMinIdle/6), Callers: maxCallers, Bounds: shared.Bounds, Lost: cfg.LeaseLost,
	})
	s.keeper = lease.New(lease.Config{Stream: &s.stream, Ledger: s.ledger, MinIdle: cfg.ClaimMinIdle, Timeout: cfg.ConsumerTimeout, Deletes: xstream.DeleteNever, Log: cfg.Log, Fields: s.cfg.Fields})
	s.finder = takeover.New(takeover.Config{
		Stream: &s.stream, Ledger: s.ledger, Keeper: s.keeper, Bounds: shared.Bounds,
		MinIdle: cfg.ClaimMinIdle, Interval: cfg.ClaimInterval, Page: max(cfg.BatchSize, cfg.MaxConcurrency),
		Timeout: cfg.ConsumerTimeout, Log: cfg.Log, Fields: s.cfg.Fields,
	})
	s.slots.running = make(map[*slot]struct{})
	s.reader = newReader(s)
	s.mode = modeOf(s)
	return s
}

// Open does what must be done before Subscribe returns, and waits for Redis if the config
// says so. Where it fails, the subscription has ended.
func (s *Subscription) Open(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-s.life.closing:
			cancel(s.cfg.Closed)
		case <-ctx.Done():
		}
	}()
	deadline := time.Now().Add(s.cfg.WaitForRedis)
	for pause := (backoff{}); ; {
		err := s.mode.open(ctx)
		switch {
		case err == nil:
			s.markHealthy(dutyOpen)
			return nil
		case ctx.Err() != nil:
			s.ledger.Stop()
			return context.Cause(ctx)
		case !redisx.NotReady(err) || !time.Now().Before(deadline):
			s.ledger.Stop()
			return err
		}
		s.markFailed(dutyOpen, err)
		pause.wait(ctx.Done())
	}
}

// checkDeadLetters refuses a dead-letter stream that entries cannot be moved to
// in one step.
func (s *Subscription) checkDeadLetters(ctx context.Context) error {
	letters := s.cfg.DeadLetters
	if letters == "" || letters == s.cfg.Topic {
		return fmt.Errorf("SubscriberConfig.DeadLetterTopic: returned %q for this topic", letters)
	}
	err := s.shared.client.OneServer(ctx, s.cfg.Topic, letters)
	if errors.Is(err, redisx.ErrTwoServers) {
		return fmt.Errorf("SubscriberConfig.DeadLetterTopic: the dead-letter stream %q is in another slot of the Cluster than the topic, or on another shard; "+
			"give both a common hash tag", letters)
	}
	return err
}

const needsAckDel = "SubscriberConfig.DeleteAcked on a topic with several groups needs XACKDEL (Redis 8.2)"

// checkDeleteAcked asks the server whether it has XACKDEL.
func (s *Subscription) checkDeleteAcked(ctx context.Context) error {
	positions := xstream.PositionsKey(s.cfg.Topic)
	if err := s.shared.client.OneServer(ctx, s.cfg.Topic, positions); err != nil {
		return fmt.Errorf("SubscriberConfig.DeleteAcked: the positions of fan-outs, %q: %w", positions, err)
	}
	err := s.stream.HasAckAndDelete(ctx)
	if err == nil {
		s.keeper.SetDeletes(xstream.DeleteByServer)
		return nil
	}
	if !redisx.IsDenied(err) {
		return err
	}
	groups, err := s.stream.Groups(ctx)
	if err != nil {
		return err
	}
	if groups > 1 {
		return s.stream.Unsupported(ctx, needsAckDel)
	}
	s.keeper.SetDeletes(xstream.DeleteByScript)
	return nil
}

// Start runs the subscription until its parent ends or Close is called.
func (s *Subscription) Start() {
	go s.reader.run()
	s.mode.start()
	go func() {
		select {
		case <-s.life.parent.Done():
			s.Close()
		case <-s.life.closing:
		}
		s.drain()
	}()
}

// Close begins the end; Done tells when it is over.
func (s *Subscription) Close() {
	s.life.closeOnce.Do(func() {
		s.ledger.Stop()
		close(s.life.closing)
	})
}

// IsClosing is asked of failures: it knows of the end of Subscribe's context
// before Close has run, since a handler may see that end as soon.
func (s *Subscription) IsClosing() bool {
	select {
	case <-s.life.closing:
		return true
	default:
		return s.life.parent.Err() != nil
	}
}

func (s *Subscription) isAbandoned() bool {
	select {
	case <-s.life.abandon:
		return true
	default:
		return false
	}
}

// cancelHandlers ends the contexts of what the user's code has in hand.
func (s *Subscription) cancelHandlers() {
	s.life.endCalls(s.cfg.Closed)
	s.ledger.CancelAll(s.cfg.Closed)
}

// drain is the way from Close to Done: stop reading, release what
// nobody has in hand, let handlers finish, see their acks off.
func (s *Subscription) drain() {
	s.cfg.Log.Debug("Closing subscription", s.cfg.Fields)
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
	s.lost.Add(int64(s.ledger.End(time.Now())))
	s.awaitSlots()
	s.waitCalls()
	s.loops.end()
	if n := s.ledger.EndAcks(); n > 0 {
		s.cfg.Log.Error("Closed before all acks reached Redis; their messages will be handled again",
			fmt.Errorf("%d acks did not arrive within CloseTimeout", n), s.cfg.Fields)
	}
	s.reader.seat.Release()
	s.leave()
	cancel.Stop()
	abandon.Stop()
	s.cfg.Log.Debug("Subscription closed", s.cfg.Fields)
	close(s.life.done)
}

// noticeClosed ends the drain at once if the client was closed before the Subscriber:
// nothing can be acked or released any more.
func (s *Subscription) noticeClosed() {
	err := s.mode.ping(s.life.ctx)
	if redisx.IsClosed(err) {
		s.life.giveUp()
	}
}

// leave takes back what Redis knows of the subscription. Close does not wait for a Redis
// that is away on account of that.
func (s *Subscription) leave() {
	if _, outage := s.health.outage(); outage == nil && !s.isAbandoned() {
		s.mode.leave(s.life.ctx)
	}
}

// waitCalls waits for OnBroken and OnDead, until CloseTimeout.
func (s *Subscription) waitCalls() {
	done := make(chan struct{})
	go func() { s.slots.calls.Wait(); close(done) }()
	select {
	case <-done:
	case <-s.life.abandon:
	}
}

// Done is closed when the subscription has ended.
func (s *Subscription) Done() <-chan struct{} { return s.life.done }

// Closing is closed when nothing new is taken any more, and Abandon when CloseTimeout is
// over, or the client is closed.
func (s *Subscription) Closing() <-chan struct{} { return s.life.closing }
func (s *Subscription) Abandon() <-chan struct{} { return s.life.abandon }

// Base has the values of Subscribe's context, and no end. Calling is derived from it, for
// functions of the user's beside the slots: it ends a second before CloseTimeout.
func (s *Subscription) Base() context.Context    { return s.life.base }
func (s *Subscription) Calling() context.Context { return s.life.calling }

// Consumer returns the consumer's name; empty in fan-out.
func (s *Subscription) Consumer() string { return s.stream.Consumer }

// Retries reports whether an entry that fails comes again.
func (s *Subscription) Retries() bool { return s.mode.retries() }

// IsLost reports whether the entry is another consumer's, or nobody's any more.
func (s *Subscription) IsLost(t *Task) bool { return t.Lost() || s.ledger.IsGone(t.Entry) }

// Fields is what a log line says of an entry.
func (s *Subscription) Fields(t *Task) watermill.LogFields {
	return s.cfg.Fields.Add(watermill.LogFields{"xid": t.ID, "deliveries": t.Count()})
}

// Stats is what a subscription has, and has done; the outage under way, and since when.
type Stats struct {
	InFlight, Waiting       int
	Claimed, Released, Lost int64
	Since                   time.Time
	Err                     error
}

// Stats returns them.
func (s *Subscription) Stats() Stats {
	st := Stats{
		Claimed: s.claimed.Load(), Released: s.keeper.GivenBack.Load(),
		Lost: s.lost.Load() + s.keeper.Lost.Load() + s.finder.Lost.Load(),
	}
	st.InFlight, st.Waiting = s.ledger.Counts()
	st.Since, st.Err = s.health.outage()
	return st
}
