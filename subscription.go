package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
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
// The reader fills queue; the claimer fills claims and suspects; slots take from
// them, and from retries what is due. The acker and the keeper look after what
// is in leases. All of them end before the output channel closes.
type subscription struct {
	cfg         SubscriberConfig
	client      redis.UniversalClient
	topic       string
	deadLetters string
	retry       Retry
	stream      stream
	uniqueName  bool // the consumer's name was generated: no one else has it
	log         watermill.LoggerAdapter
	logFields   watermill.LogFields
	base        context.Context // the values of Subscribe's context, without its end
	calling     context.Context // of base, for OnBroken and OnDead: ends when they are to come to an end
	endCalls    context.CancelCauseFunc
	ctx         context.Context // for commands; it ends lastWords after CloseTimeout
	cancelCtx   context.CancelFunc

	output  chan *message.Message
	leases  leases
	reader  *reader
	acker   *acker
	claimer *claimer
	health  health
	stats   counters

	ackDelByScript bool
	noScripts      atomic.Bool
	once           struct{ unwakable, severalGroups, overflow, janitor sync.Once }

	closing  chan struct{} // nothing new is taken
	abandon  chan struct{} // CloseTimeout is over
	withdraw chan struct{} // an offered message is taken back: closing, or abandon where it would be lost
	done     chan struct{} // the output channel is closed
	close1   sync.Once

	slots       sync.WaitGroup
	calls       sync.WaitGroup // of OnBroken and OnDead
	brokenCalls chan struct{}

	regrouping sync.Mutex
	lastRead   string // the greatest ID read; guarded by regrouping
	lastKnown  string // the group's last-delivered-id when last seen; guarded by regrouping

	mu       sync.Mutex
	ready    *sync.Cond
	queue    []*held
	claims   []*held
	suspects []*held
	retries  waitHeap
	timer    *time.Timer // for the retry that is due first; nil: none is to come
	timerAt  time.Time
	prefetch int
	started  int           // slots that run
	idle     int           // slots that wait for work
	busy     int           // slots that have an entry in hand
	alone    bool          // a suspect is in hand
	parked   bool          // the reader waits for room
	room     chan struct{} // tells the reader to look for room again
	stopping bool          // nothing new is taken
	drained  bool          // nothing more comes from the reader
}

func newSubscription(s *Subscriber, ctx context.Context, topic string) *subscription {
	sub := &subscription{
		cfg:         s.config,
		client:      s.config.Client,
		topic:       topic,
		base:        context.WithoutCancel(ctx),
		retry:       *s.config.Retry,
		uniqueName:  s.config.Consumer == "",
		log:         s.logger,
		output:      make(chan *message.Message),
		leases:      leases{m: make(map[string]*held)},
		closing:     make(chan struct{}),
		abandon:     make(chan struct{}),
		done:        make(chan struct{}),
		brokenCalls: make(chan struct{}, maxBrokenCalls),
		room:        make(chan struct{}, 1),
	}
	sub.calling, sub.endCalls = context.WithCancelCause(sub.base)
	sub.ctx, sub.cancelCtx = context.WithCancel(context.Background())
	sub.stream = stream{client: sub.client, key: topic, group: s.config.ConsumerGroup}
	if !sub.fanOut() {
		sub.deadLetters = s.config.DeadLetterTopic(topic)
		sub.stream.consumer = s.config.Consumer
		if sub.uniqueName {
			sub.stream.consumer = generatedConsumer()
		}
	}
	sub.logFields = watermill.LogFields{
		"provider": "redis", "topic": topic,
		"consumer_group": sub.stream.group, "consumer_uuid": sub.stream.consumer,
	}
	sub.withdraw = sub.closing
	if sub.cfg.NoAck {
		sub.withdraw = sub.abandon
	}
	sub.ready = sync.NewCond(&sub.mu)
	sub.reader = &reader{s: sub, done: make(chan struct{})}
	sub.acker = newAcker(sub)
	sub.claimer = newClaimer(sub)
	return sub
}

func (s *subscription) fanOut() bool { return s.cfg.ConsumerGroup == "" }

// leased reports whether entries stay pending until they are acked.
func (s *subscription) leased() bool { return !s.fanOut() && !s.cfg.NoAck }

// start runs the subscription until ctx ends or close is called.
func (s *subscription) start(ctx context.Context) {
	go s.reader.run()
	if s.leased() {
		go s.acker.run()
		go s.claimer.keep()
	}
	if !s.fanOut() {
		go s.claimer.run()
	}
	go func() {
		select {
		case <-ctx.Done():
			s.close()
		case <-s.closing:
		}
		s.drain()
	}()
}

// close begins the end; done tells when it is over.
func (s *subscription) close() {
	s.close1.Do(func() {
		s.mu.Lock()
		s.stopping = true
		s.mu.Unlock()
		close(s.closing)
	})
}

func (s *subscription) isClosing() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
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
	abandon := time.AfterFunc(s.cfg.CloseTimeout, func() {
		close(s.abandon)
		time.AfterFunc(lastWords, s.cancelCtx)
	})
	defer s.cancelCtx()
	defer s.endCalls(nil)

	s.reader.interrupt(func() bool { return s.isAbandoned() })
	s.mu.Lock()
	s.drained = true
	s.idle = 0
	s.ready.Broadcast()
	s.mu.Unlock()
	s.releaseHeld()
	s.slots.Wait()
	s.waitCalls()
	s.claimer.halt()

	if s.leased() {
		close(s.acker.stop)
		<-s.acker.done
		if n := s.acker.backlog(); n > 0 {
			s.log.Error("Closed before all acks reached Redis; their messages will be handled again",
				fmt.Errorf("%d acks did not arrive within CloseTimeout", n), s.logFields)
		}
	}
	cancel.Stop()
	abandon.Stop()
	if !s.fanOut() && s.uniqueName && !s.isAbandoned() {
		if err := s.stream.removeConsumer(s.ctx); err != nil {
			s.log.Debug("The consumer's name stays in the group: "+err.Error(), s.logFields)
		}
	}
	close(s.output)
	s.log.Debug("Subscription closed", s.logFields)
	close(s.done)
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

// enqueue takes what the reader read at the moment given.
func (s *subscription) enqueue(entries []entry, at time.Time) {
	if len(entries) == 0 {
		return
	}
	batch := make([]held, len(entries)) // one allocation for the whole batch
	hs := make([]*held, len(entries))
	for i, e := range entries {
		batch[i] = held{id: e.id, fields: e.fields, count: 1, next: 2, state: queued, since: at}
		if e.fields == nil {
			batch[i].fields = []string{}
		}
		hs[i] = &batch[i]
	}
	s.regrouping.Lock()
	if id := entries[len(entries)-1].id; compareIDs(id, s.lastRead) > 0 {
		s.lastRead = id
	}
	s.regrouping.Unlock()
	hs = s.leases.add(hs)
	s.mu.Lock()
	s.queue = append(s.queue, hs...)
	s.rouseLocked(len(hs))
	late := s.drained
	s.mu.Unlock()
	if late { // an answer that Close did not wait for
		if s.cfg.NoAck {
			s.stats.lost.Add(int64(len(hs)))
		}
		s.releaseHeld()
	}
}

// offerClaims takes entries that look like nobody's; a slot with nothing else
// to do will claim them. It returns whether suspects are among what waits.
func (s *subscription) offerClaims(hs []*held) (suspects bool) {
	hs = s.leases.add(hs)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		s.leases.remove(hs...)
		return false
	}
	for _, h := range hs {
		switch {
		case h.next == h.count && h.count == 1:
			s.queue = append(s.queue, h) // read here, but the answer was lost: it keeps its place
		case h.next >= s.retry.suspectFrom() && !h.released:
			s.suspects = append(s.suspects, h)
		default:
			s.claims = append(s.claims, h)
		}
	}
	s.rouseLocked(len(hs))
	return len(s.suspects) > 0
}

// quiet reports whether the reader has stopped for the suspects, or need not.
func (s *subscription) quiet() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.parked || s.stopping || len(s.suspects) == 0
}

// suspectsWait reports whether a suspect waits for its turn.
func (s *subscription) suspectsWait() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.suspects) > 0 && !s.alone
}

// dropSuspects lets the subscription go on without them.
func (s *subscription) dropSuspects() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	dropped := s.suspects
	s.suspects = nil
	s.leases.remove(dropped...)
	s.rouseLocked(s.cfg.MaxConcurrency)
	s.signalRoomLocked()
	return len(dropped)
}

// next returns the next entry for a slot, or nil when there is no more work.
func (s *subscription) next() *held {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if h := s.takeLocked(); h != nil {
			s.busy++
			s.signalRoomLocked()
			return h
		}
		if s.stopping && (s.drained || !s.cfg.NoAck) {
			s.started--
			return nil
		}
		s.idle++
		s.ready.Wait() // who wakes it has taken it off idle
	}
}

func (s *subscription) takeLocked() *held {
	switch {
	case s.stopping:
		if s.cfg.NoAck { // cannot be released: whoever still reads gets it
			return shift(&s.queue)
		}
		return nil
	case s.alone:
		return nil
	case len(s.suspects) > 0:
		// A suspect is handled with nothing else in flight: what is there comes
		// to its end, nothing new is taken.
		if h := shift(&s.queue); h != nil {
			return h
		}
		if s.parked && s.busy == 0 && s.leases.active() == 0 {
			s.alone = true
			return shift(&s.suspects)
		}
		return nil
	case len(s.retries) > 0 && !time.Now().Before(s.retries[0].due):
		return s.retries.pop()
	case len(s.claims) > 0:
		return shift(&s.claims)
	}
	return shift(&s.queue)
}

func shift(q *[]*held) *held {
	if len(*q) == 0 {
		return nil
	}
	h := (*q)[0]
	(*q)[0] = nil
	*q = (*q)[1:]
	return h
}

// free notes that a slot has nothing in hand any more.
func (s *subscription) free() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
	if s.alone {
		s.alone = false
		s.rouseLocked(s.cfg.MaxConcurrency)
	}
	s.signalRoomLocked()
}

// settled lets a suspect's turn come when acks have arrived.
func (s *subscription) settled() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.suspects) > 0 {
		s.rouseLocked(1)
	}
	s.signalRoomLocked()
}

// rouseLocked sees to it that n slots look for work.
func (s *subscription) rouseLocked(n int) {
	for ; n > 0 && s.idle > 0; n-- {
		s.idle--
		s.ready.Signal()
	}
	if s.stopping && (s.drained || !s.cfg.NoAck) {
		return
	}
	for ; n > 0 && s.started < s.cfg.MaxConcurrency; n-- {
		s.started++
		s.slots.Go(s.slot)
	}
}

// signalRoomLocked makes the reader look again, if there is room now.
func (s *subscription) signalRoomLocked() {
	if !s.parked || s.roomLocked() == 0 {
		return
	}
	select {
	case s.room <- struct{}{}:
	default:
	}
}

// awaitRoom waits until there is room for a read, and returns for how many
// entries; 0 when the subscription stops.
func (s *subscription) awaitRoom(r *reader) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.stopping {
		if s.roomLocked() > 0 {
			s.prefetch = r.adapt(s.prefetch, s.cfg.BatchSize)
			if room := s.roomLocked(); room > 0 {
				s.parked = false
				return min(room, s.cfg.BatchSize)
			}
		}
		s.parked = true
		if len(s.suspects) > 0 {
			s.rouseLocked(1)
		}
		s.mu.Unlock()
		select {
		case <-s.room:
		case <-s.closing:
		}
		s.mu.Lock()
	}
	return 0
}

// roomLocked returns how many entries may be read now: one for each free slot,
// and the prefetch once half of the last one is consumed, so that the handlers
// have the other half meanwhile. One and a half times BatchSize, and the slots,
// bound what is held.
func (s *subscription) roomLocked() int {
	if s.alone || len(s.suspects) > 0 || len(s.queue) > s.prefetch/2 {
		return 0
	}
	if len(s.claims) >= s.cfg.MaxConcurrency { // they go first
		return 0
	}
	if s.leased() && s.acker.backlog() >= maxUnconfirmed {
		return 0
	}
	return max(0, s.cfg.MaxConcurrency-s.busy-len(s.claims)) + s.prefetch
}

// wait schedules the entry's next delivery.
func (s *subscription) wait(h *held, delay time.Duration) {
	if s.isClosing() {
		s.giveBack(h, h.count)
		return
	}
	h.due = time.Now().Add(delay)
	if s.fanOut() {
		h.count++
	}
	if !s.leases.move(h, waiting, nil) {
		s.leases.remove(h)
		return
	}
	if !s.pushRetry(h) { // close came in between
		s.giveBack(h, h.count)
	}
}

func (s *subscription) pushRetry(h *held) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.retries.push(h)
	if len(s.retries) > maxWaiting && s.leased() {
		s.leases.remove(s.retries.dropLatest())
		s.once.overflow.Do(func() {
			s.log.Error("Very many messages wait for a retry", fmt.Errorf(
				"more than %d: those that wait longest come again when their leases have run out, which may be later than they are due", maxWaiting), s.logFields)
		})
	}
	if s.timer == nil || h.due.Before(s.timerAt) {
		s.armLocked(h.due)
	}
	return true
}

func (s *subscription) manyWait() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.retries) >= maxWaiting
}

// again sees to the entry's next delivery: with MaxConcurrency 1 in this very
// slot, which it then returns true for, else when a slot is free.
func (s *subscription) again(h *held, delay time.Duration) bool {
	if s.cfg.MaxConcurrency == 1 || s.fanOut() && s.manyWait() {
		return s.waitInPlace(h, delay)
	}
	s.wait(h, delay)
	return false
}

// waitInPlace waits for the entry's next delivery without freeing the slot. It
// returns false if the subscription closes before.
func (s *subscription) waitInPlace(h *held, delay time.Duration) bool {
	s.leases.move(h, waiting, nil)
	if s.fanOut() {
		h.count++
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.closing:
		s.giveBack(h, h.count)
		return false
	}
}

// armLocked sets the timer for the retry that is due first.
func (s *subscription) armLocked(at time.Time) {
	if s.timer != nil {
		s.timer.Stop()
	}
	s.timerAt = at
	s.timer = time.AfterFunc(time.Until(at), s.retriesDue)
}

// retriesDue rouses slots for the retries that are due, and sets the timer for
// the first that is not.
func (s *subscription) retriesDue() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return
	}
	now, due := time.Now(), 0
	var first *held
	for _, h := range s.retries {
		if !h.due.After(now) {
			due++
		} else if first == nil || h.due.Before(first.due) {
			first = h
		}
	}
	s.rouseLocked(due)
	s.timer = nil
	if first != nil {
		s.armLocked(first.due)
	}
}

// giveBack releases one entry, with the deliveries that are to count.
func (s *subscription) giveBack(h *held, count int64) {
	if s.leased() {
		s.release(map[int64][]*held{s.parkCount(h, count): {h}})
	}
	s.leases.remove(h)
}

// parkCount keeps a dead entry that could not be moved dead for whoever claims
// it.
func (s *subscription) parkCount(h *held, count int64) int64 {
	if h.doom != nil && s.retry.MaxRetries != 0 {
		return max(count, int64(max(s.retry.MaxRetries, 0))+2)
	}
	return max(count, 0)
}

// releaseHeld gives back everything that no slot has in hand: prefetched entries
// as if they had never been read, waiting ones with their count.
func (s *subscription) releaseHeld() {
	s.mu.Lock()
	queue, retries, found := s.queue, s.retries, append(s.claims, s.suspects...)
	if s.cfg.NoAck {
		queue = nil
	} else {
		s.queue = nil
	}
	s.retries, s.claims, s.suspects = nil, nil, nil
	if s.timer != nil {
		s.timer.Stop()
	}
	s.mu.Unlock()

	s.leases.remove(found...)
	if s.leased() {
		byCount := make(map[int64][]*held)
		for _, h := range queue {
			byCount[h.count-1] = append(byCount[h.count-1], h)
		}
		for _, h := range retries {
			c := s.parkCount(h, h.count)
			byCount[c] = append(byCount[c], h)
		}
		s.release(byCount)
	}
	s.leases.remove(queue...)
	s.leases.remove(retries...)
}

// release parks entries with the consumer named released, where every claimer
// looks first. What cannot be released is claimed when its lease has run out.
func (s *subscription) release(byCount map[int64][]*held) {
	s.part(byCount)
	for count, hs := range byCount {
		for chunk := range slices.Chunk(hs, maxRenewal) {
			if s.isAbandoned() {
				continue
			}
			refused, err := s.park(count, chunk)
			if err == nil && len(refused) > 0 {
				// A renewal may have crossed: then these are ours, and younger.
				var again []*held
				for _, h := range refused {
					if ours, err := s.verify(h); err == nil && ours {
						again = append(again, h)
					}
				}
				_, err = s.park(count, again)
			}
			if err != nil {
				s.log.Error("Release failed; the messages come again when their leases have run out", err,
					s.logFields.Add(watermill.LogFields{"entries": len(chunk)}))
				if !isReply(err) {
					return // Redis is away: the others would each wait for it too
				}
			}
		}
	}
}

// part ends the renewals of what is to be released. One that was sent, but
// arrived late, would take the entries back: to the server they look idle for
// long enough once they have been released for as long as the renewal was on
// its way.
func (s *subscription) part(byCount map[int64][]*held) {
	s.claimer.renewing.Lock()
	defer s.claimer.renewing.Unlock()
	for _, hs := range byCount {
		for _, h := range hs {
			s.leases.move(h, parting, nil)
		}
	}
}

func (s *subscription) park(count int64, hs []*held) (refused []*held, err error) {
	if len(hs) == 0 {
		return nil, nil
	}
	ids := make([]string, len(hs))
	idle := s.leases.idle(hs[0])
	for i, h := range hs {
		ids[i] = h.id
		idle = min(idle, s.leases.idle(h))
	}
	got, err := s.stream.assign(s.ctx, releasedConsumer, idle, count, ids)
	if err != nil {
		return nil, err
	}
	s.stats.released.Add(int64(len(got)))
	return slices.DeleteFunc(slices.Clone(hs), func(h *held) bool { return got[h.id] }), nil
}

// regroup makes the group again after it was lost, and puts what this
// subscription holds back into it.
func (s *subscription) regroup() error {
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	ctx := s.ctx
	if _, err := s.stream.groupInfo(ctx); err == nil {
		return s.restoreLocked(ctx) // another consumer was faster
	} else if !groupLost(err) && !denied(err) {
		return err
	}
	start := s.lastKnown
	if compareIDs(s.lastRead, start) > 0 {
		start = s.lastRead
	}
	last, err := s.stream.lastID(ctx)
	if denied(err) {
		last, err = start, nil
	}
	if err != nil {
		return err
	}
	if start == "" || compareIDs(last, start) < 0 {
		start = "0" // the stream began anew, and all that is in it is new
		s.lastRead, s.lastKnown = "", ""
	}
	if err := s.stream.createGroup(ctx, start); err != nil {
		return err
	}
	s.log.Error("The consumer group was lost and is made again; what dead consumers held is not pending any more",
		errors.New("group lost"), s.logFields.Add(watermill.LogFields{"start_id": start}))
	return s.restoreLocked(ctx)
}

// restoreLocked puts what is ours back among the pending entries. An entry that
// somebody else got meanwhile is not as idle as that, and stays theirs.
func (s *subscription) restoreLocked(ctx context.Context) error {
	if !s.leased() {
		return nil
	}
	now := time.Now()
	ours := s.leases.ours()
	var late []string // settled while they were put back: their XACK may have come before
	for count, ids := range s.leases.byCount(ours) {
		for chunk := range slices.Chunk(ids, maxRenewal) {
			got, err := s.stream.restore(ctx, s.cfg.ClaimMinIdle, count, chunk)
			if err != nil {
				return err
			}
			for _, h := range ours {
				switch {
				case !got[h.id]:
				case s.leases.stillOurs(h):
					s.leases.confirm(now, h)
				default:
					late = append(late, h.id)
				}
			}
		}
	}
	if len(late) > 0 {
		return s.stream.ack(ctx, late)
	}
	return nil
}

// restoreIfRemade asks whether the group was made anew by someone who did not
// know what this subscription holds: the entry was ours a moment ago, nobody
// can have claimed it since, and nothing of ours is pending any more. It then
// puts all back.
func (s *subscription) restoreIfRemade(h *held) (bool, error) {
	if s.leases.idle(h) >= s.cfg.ClaimMinIdle {
		return false, nil
	}
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	ctx := s.ctx
	rows, err := s.stream.pending(ctx, 0, "-", "+", maxRenewal, s.stream.consumer)
	if err != nil {
		return false, err
	}
	for _, p := range rows {
		if p.id == h.id {
			return true, nil // put back meanwhile
		}
		if s.leases.has(p.id) {
			return false, nil
		}
	}
	if !s.leases.stillOurs(h) {
		return false, nil
	}
	s.log.Error("The consumer group was made anew; putting back what is held here", errors.New("group lost"), s.logFields)
	return true, s.restoreLocked(ctx)
}

// sawGroup remembers how far the group has got, for regroup.
func (s *subscription) sawGroup(lastDelivered string) {
	s.regrouping.Lock()
	defer s.regrouping.Unlock()
	s.lastKnown = lastDelivered
}

func (s *subscription) entryFields(h *held) watermill.LogFields {
	return s.logFields.Add(watermill.LogFields{"xid": h.id, "deliveries": h.count})
}

// counters are the sums of SubscriptionStats.
type counters struct {
	delivered, acked, nacked, claimed, released, broken, dead, lost atomic.Int64
}

func (s *subscription) snapshot() SubscriptionStats {
	st := SubscriptionStats{
		Topic:     s.topic,
		Delivered: s.stats.delivered.Load(), Acked: s.stats.acked.Load(), Nacked: s.stats.nacked.Load(),
		Claimed: s.stats.claimed.Load(), Released: s.stats.released.Load(), Broken: s.stats.broken.Load(),
		Dead: s.stats.dead.Load(), Lost: s.stats.lost.Load(),
	}
	st.InFlight, st.Waiting = s.leases.counts()
	st.Since, st.Err = s.health.outage()
	return st
}

// What the subscription does that can fail by itself.
const (
	dutyRead  = "read"
	dutyAck   = "ack"
	dutyRenew = "renew leases"
	dutyClaim = "claim"
	dutyLook  = "look for abandoned messages"
	dutyBury  = "dead-letter"
)

// health is what Stats says of an outage, which is logged once, however many
// goroutines notice it.
type health struct {
	mu      sync.Mutex
	failing map[string]error
	since   time.Time
}

func (s *subscription) failing(duty string, err error) {
	h := &s.health
	h.mu.Lock()
	first := len(h.failing) == 0
	if first {
		h.failing = make(map[string]error)
		h.since = time.Now()
	}
	err = fmt.Errorf("%s: %w", duty, err)
	h.failing[duty] = err
	h.mu.Unlock()
	if first && !s.isClosing() {
		s.log.Error("Redis does not serve the subscription; trying again", err, s.logFields)
	}
}

func (s *subscription) works(duty string) {
	h := &s.health
	h.mu.Lock()
	_, failed := h.failing[duty]
	delete(h.failing, duty)
	recovered := failed && len(h.failing) == 0
	since := h.since
	h.mu.Unlock()
	if recovered {
		s.log.Info("Redis serves the subscription again after "+time.Since(since).Round(time.Millisecond).String(), s.logFields)
	}
}

// outage returns when the outage under way began, and its errors.
func (h *health) outage() (time.Time, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.failing) == 0 {
		return time.Time{}, nil
	}
	var errs []error
	for _, duty := range []string{dutyRead, dutyAck, dutyRenew, dutyClaim, dutyLook, dutyBury} {
		if err := h.failing[duty]; err != nil {
			errs = append(errs, err)
		}
	}
	return h.since, errors.Join(errs...)
}

// jitter spreads a duration over [d/2, 3d/2).
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d/2 + rand.N(d)
}
