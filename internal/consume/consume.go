// Package consume runs one subscription: it reads entries, passes them to slots,
// maintains their leases, and drains. A Work decides what an entry means and what
// happens to it. The package knows nothing about messages.
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
	// maxGrace is how long before CloseTimeout the handlers' contexts are canceled.
	maxGrace = time.Second

	// lastWords is how long after CloseTimeout commands about abandoned entries may
	// take. A command without an answer by then is not repeated.
	lastWords = time.Second

	// minPatience is how long, at first, a subscription takes no new entries while
	// a message waits to run alone: see ledger.Config. Most handlers finish within
	// that time.
	minPatience = 5 * time.Second

	// maxCallers is the maximum number of concurrent calls of CallBroken, some of
	// which may hang.
	maxCallers = 16
)

// Work processes entries. It must bring each entry to its outcome, by a method of
// Subscription that ends it: Settle, Drop, Again, Snooze, GiveBack, Broken,
// MoveFailed, NotOurs or Abandoned; or by a HandOver that returns false.
type Work interface {
	// Handle is called in a slot, with an entry that is ours and has its fields, or
	// that is already dead and waits to be moved; or with a batch of the former. The
	// slice is the slot's.
	Handle([]Task)
	// CallBroken is called outside of the slots, with an entry that was passed to
	// Broken.
	CallBroken(*Task)
	// MoveAgain is called with a dead entry whose last move had no answer, when the
	// subscription closes. It moves the entry if that has not happened.
	MoveAgain(*Task) error
	// Key returns the key of an entry that is ours and has its fields; "" if it has no
	// order. It is called in the order of the stream, for what was read.
	Key(*Task) string
}

// Config configures a subscription. The first group of fields is
// SubscriberConfig's, validated and with defaults.
type Config struct {
	Topic, Group    string
	Consumer        string // prefix of the consumers' names
	StartID         string
	MaxConcurrency  int           // batches, if MaxBatch is set
	MaxBatch        int           // entries that are handled together; 0: they are handled one by one
	MaxWait         time.Duration // how long a batch waits until it is full
	BatchSize       int
	BlockTime       time.Duration
	WaitForRedis    time.Duration
	NoAck           bool
	DeleteAcked     bool
	Retention       *xstream.Retention // nil: nothing is trimmed
	KeepDeadLetters time.Duration      // 0: dead letters are not trimmed
	ClaimMinIdle    time.Duration
	ClaimInterval   time.Duration
	CloseTimeout    time.Duration
	ConsumerTimeout time.Duration

	DeadLetters string        // the topic's dead-letter stream
	Suspect     int64         // the delivery count from which a claimed message may have crashed its consumer; 0: none
	Keyed       bool          // entries have keys, each of which preserves the order
	Last        int64         // the last allowed delivery count; 0: no limit
	TakeAgain   time.Duration // the pause after a failed attempt to take an entry for its retry
	LeaseLost   error         // the cause of contexts that end because the lease is lost
	Closed      error         // the cause of contexts that end because the subscription closes

	Log    watermill.LoggerAdapter
	Fields watermill.LogFields // of every log line
}

// Subscription is one call of Subscribe: its goroutines and what they share. All
// goroutines have ended when Done is closed.
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
	pause    *pause
	life     life
	loops    loops
	slots    slots
	apart    *isolation
	overflow sync.Once // logs once that an entry is pending for us without room in the ledger

	claimed, lost, trimmed atomic.Int64
}

// life holds the contexts of a subscription, and the stages of its end.
type life struct {
	parent  context.Context // Subscribe's context
	closing context.Context // derived from parent; ended: take nothing new
	base    context.Context // parent's values, never canceled
	calling context.Context // derived from base, for the user's functions outside of the slots; canceled when they should finish
	ctx     context.Context // for commands; ends lastWords after CloseTimeout

	close     context.CancelCauseFunc // of closing
	endCalls  context.CancelCauseFunc
	cancelCtx context.CancelFunc

	abandon context.Context // ended: CloseTimeout has passed, or the client is closed
	giveUp  func()          // ends abandon
	done    chan struct{}   // closed: everything has ended
}

// New returns a subscription, to be opened and started. The contexts of its
// messages carry ctx's values, but not its cancellation.
func New(ctx context.Context, shared *Shared, cfg Config, work Work) *Subscription {
	s := &Subscription{
		cfg: cfg, work: work, shared: shared,
		stream: xstream.Stream{Client: shared.client, Via: shared.pipe, Key: cfg.Topic, Group: cfg.Group},
		loops:  newLoops(), pause: newPause(), health: health{denied: make(map[string]bool)},
		life: life{parent: ctx, base: context.WithoutCancel(ctx), done: make(chan struct{})},
	}
	l := &s.life
	l.closing, l.close = context.WithCancelCause(ctx)
	l.calling, l.endCalls = context.WithCancelCause(l.base)
	l.ctx, l.cancelCtx = context.WithCancel(context.Background())
	abandon, end := context.WithCancel(context.Background())
	l.abandon, l.giveUp = abandon, sync.OnceFunc(func() {
		s.cancelHandlers()
		end()
		time.AfterFunc(lastWords, l.cancelCtx)
	})
	if cfg.Group != "" {
		s.stream.Consumer = shared.nameFor(cfg.Topic)
	}
	s.cfg.Fields = cfg.Fields.Add(watermill.LogFields{"consumer_uuid": s.stream.Consumer})
	s.ledger = ledger.New(ledger.Config{
		Slots: cfg.MaxConcurrency, Batch: cfg.MaxBatch, Wait: cfg.MaxWait, Keyed: cfg.Keyed, Compare: xstream.CompareIDs, Leased: cfg.Group != "" && !cfg.NoAck, Serve: cfg.NoAck, Suspect: cfg.Suspect, Last: cfg.Last,
		Patience: cfg.patience(), Callers: maxCallers, Bounds: shared.Bounds, Lost: cfg.LeaseLost,
	})
	leases := lease.Config{
		Stream: &s.stream, Ledger: s.ledger, MinIdle: cfg.ClaimMinIdle, Timeout: cfg.ConsumerTimeout, Deletes: cfg.DeleteAcked,
		Trims: cfg.Retention != nil, Log: cfg.Log, Fields: s.cfg.Fields,
	}
	s.keeper = lease.New(leases)
	s.finder = takeover.New(takeover.Config{
		Config: leases, Keeper: s.keeper, Bounds: shared.Bounds,
		Interval: cfg.ClaimInterval, Page: max(cfg.BatchSize, cfg.MaxConcurrency*max(1, cfg.MaxBatch)),
	})
	s.slots.running, s.slots.none = make(map[*slot]struct{}), make(chan struct{}, 1)
	s.reader = newReader(s)
	s.mode = modeOf(s)
	return s
}

// patience is the ledger's Patience. A suspect excludes those of other subscriptions for twice as long.
func (cfg Config) patience() time.Duration { return max(minPatience, cfg.ClaimMinIdle/6) }

// Open does what must happen before Subscribe returns, and waits for Redis if the
// config says so. After an error the subscription has ended.
func (s *Subscription) Open() error {
	s.apart = joinIsolation(s.shared.client)
	ctx := s.life.closing
	deadline := time.Now().Add(s.cfg.WaitForRedis)
	for pause := (backoff{}); ; {
		err := s.mode.open(ctx)
		switch {
		case err == nil:
			s.markHealthy(dutyOpen)
			return nil
		case ctx.Err() != nil:
			err = context.Cause(ctx)
			fallthrough
		case !redisx.NotReady(err) && !redisx.OutOfMemory(err) || !time.Now().Before(deadline):
			s.Close()
			s.apart.leave()
			s.shared.returnName(s.cfg.Topic, s.stream.Consumer)
			return err
		}
		s.markFailed(dutyOpen, err)
		pause.wait(ctx.Done())
	}
}

// checkDeadLetters rejects a dead-letter stream to which entries cannot be moved
// atomically.
func (s *Subscription) checkDeadLetters(ctx context.Context) error {
	letters := s.cfg.DeadLetters
	if letters == "" || letters == s.cfg.Topic {
		return fmt.Errorf("SubscriberConfig.DeadLetterTopic returned %q for this topic", letters)
	}
	err := s.shared.client.OneServer(ctx, s.cfg.Topic, letters)
	if errors.Is(err, redisx.ErrTwoServers) {
		return fmt.Errorf("SubscriberConfig.DeadLetterTopic: the dead-letter stream %q is in another slot of the Cluster than the topic, or on another shard; "+
			"give both a common hash tag", letters)
	}
	return err
}

// checkRetention rejects a topic that is in another slot than what is stored beside it.
func (s *Subscription) checkRetention(ctx context.Context) error {
	if s.cfg.Retention == nil {
		return nil
	}
	if err := s.stream.OneSlot(ctx); err != nil {
		return fmt.Errorf("SubscriberConfig.Retention and DeleteAcked: what is stored beside the topic, %q: %w", xstream.RetentionKey(s.cfg.Topic), err)
	}
	return nil
}

// Start runs the subscription until its parent context ends or Close is called.
func (s *Subscription) Start() {
	go s.reader.run()
	s.mode.start()
	s.loops.running.Go(s.tickLoop)
	s.startRetention()
	context.AfterFunc(s.life.closing, s.drain)
}

// Close starts the drain. Done is closed when it has finished.
func (s *Subscription) Close() {
	s.ledger.Stop()
	s.life.close(s.cfg.Closed)
}

// IsClosing reports whether the subscription is closing. Failures are judged by it: a handler may
// notice the end of Subscribe's context before closing has ended with it.
func (s *Subscription) IsClosing() bool {
	return s.life.closing.Err() != nil || s.life.parent.Err() != nil
}

func (s *Subscription) isAbandoned() bool { return s.life.abandon.Err() != nil }

// cancelHandlers cancels the contexts of the user's running functions.
func (s *Subscription) cancelHandlers() {
	s.life.endCalls(s.cfg.Closed)
	s.ledger.CancelAll(s.cfg.Closed)
}

// drain leads from Close to Done: stop reading, release the entries that no handler
// has, let the handlers finish, and send their acks.
func (s *Subscription) drain() {
	s.ledger.Stop()
	s.cfg.Log.Debug("Closing subscription", s.cfg.Fields)
	grace := min(maxGrace, s.cfg.CloseTimeout/2)
	cancel := time.AfterFunc(s.cfg.CloseTimeout-grace, s.cancelHandlers)
	abandon := time.AfterFunc(s.cfg.CloseTimeout, s.life.giveUp)
	defer s.life.cancelCtx()
	defer s.life.endCalls(nil)
	go s.noticeClosed()

	s.reader.leave()
	s.releaseAll()
	s.awaitSlots()
	// A slot may be requested but not yet running: it will find nothing.
	s.mode.ended(s.ledger.End(time.Now()))
	s.awaitSlots()
	s.await(func(wait func()) { go wait() }, s.slots.calls.Wait) // for OnBroken and OnDead
	s.loops.end()
	if n := s.ledger.EndAcks(); n > 0 {
		s.cfg.Log.Error("Closed before all acks reached Redis; their messages will be handled again",
			fmt.Errorf("%d acks did not reach Redis within CloseTimeout", n), s.cfg.Fields)
	}
	s.leave()
	cancel.Stop()
	abandon.Stop()
	s.apart.leave()
	s.cfg.Log.Debug("Subscription closed", s.cfg.Fields)
	close(s.life.done)
}

// noticeClosed ends the drain at once if the client was closed before the
// Subscriber: then nothing can be acked or released.
func (s *Subscription) noticeClosed() {
	if _, err := s.stream.Info(s.life.ctx); redisx.IsClosed(err) {
		s.life.giveUp()
	}
}

// leave removes the subscription's state from Redis. It does not make Close wait
// for an unavailable Redis.
func (s *Subscription) leave() {
	if _, outage := s.health.outage(); outage == nil && !s.isAbandoned() {
		s.mode.leave(s.life.ctx)
	}
}

// Done is closed when the subscription has ended.
func (s *Subscription) Done() <-chan struct{} { return s.life.done }

// Closing is closed when the subscription takes no new entries. Abandon is closed
// when CloseTimeout has passed, or the client is closed.
func (s *Subscription) Closing() <-chan struct{} { return s.life.closing.Done() }
func (s *Subscription) Abandon() <-chan struct{} { return s.life.abandon.Done() }

// Base carries the values of Subscribe's context and is never canceled. Calling is
// derived from it, for the user's functions outside of the slots; it is canceled a
// second before CloseTimeout.
func (s *Subscription) Base() context.Context    { return s.life.base }
func (s *Subscription) Calling() context.Context { return s.life.calling }

// Consumer returns the consumer's name; empty for fan-out.
func (s *Subscription) Consumer() string { return s.stream.Consumer }

// IsLost reports whether another consumer has the entry, or the entry is gone.
func (s *Subscription) IsLost(t *Task) bool { return t.Lost() || t.Gone() }

// Fields returns the log fields of an entry.
func (s *Subscription) Fields(t *Task) watermill.LogFields {
	return s.cfg.Fields.Add(watermill.LogFields{"xid": t.ID, "deliveries": t.Count()})
}

// Stats holds the counters of a subscription, and the current outage and its start.
type Stats struct {
	InFlight, Waiting       int
	Claimed, Released, Lost int64
	Trimmed                 int64
	Since                   time.Time
	Err                     error
	PausedSince             time.Time
}

// Stats returns the current Stats.
func (s *Subscription) Stats() Stats {
	st := Stats{
		Claimed: s.claimed.Load(), Released: s.keeper.GivenBack.Load(),
		Lost: s.lost.Load() + s.keeper.Lost.Load(), Trimmed: s.trimmed.Load(),
	}
	st.PausedSince = s.pause.state.Load().since
	st.InFlight, st.Waiting = s.ledger.Counts()
	st.Since, st.Err = s.health.outage()
	return st
}
