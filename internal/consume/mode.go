package consume

import (
	"context"
	"errors"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// mode is how a subscription reads, keeps and ends its entries: in a group with
// leases, in a group without them (NoAck), or as a fan-out. It is chosen once; no
// other code asks which.
type mode interface {
	// open does what must happen before Subscribe returns.
	open(ctx context.Context) error
	// start starts the background loops.
	start()

	// read returns the entries that are to be handled.
	read(entries []xstream.Entry) []xstream.Entry
	// late ends entries that arrived after the subscription stopped taking any.
	late(entries []*ledger.Entry)
	// ended counts entries that were read and will not be handled.
	ended(n int)
	// reconnect is called before reading is tried again.
	reconnect(ctx context.Context)

	// offer returns channels that end the offer of a message that nobody has
	// received yet: one for the end of the subscription, one for the end of the
	// message's context.
	offer(ctx context.Context) (withdraw, ended <-chan struct{})
	// withdrawn ends the entry of a withdrawn message.
	withdrawn(h *Task)
	// held is called with the entry of a message that must not be handed over, since the
	// group is paused. It returns true if the message is to be offered after all, or false if
	// the entry is somebody else's concern now.
	held(h *Task, resumed <-chan struct{}) bool
	// handedOut is called once a message has been received.
	handedOut(h *Task)

	// postponed prepares an entry that waits for its next delivery.
	postponed(h *Task)
	// release releases entries.
	release(ctx context.Context, give []*ledger.Entry) error
	// abandoned leaves an entry whose handler may still be running.
	abandoned(h *Task)
	// leave removes the subscription's state from Redis.
	leave(ctx context.Context)
}

func modeOf(s *Subscription) mode {
	switch {
	case s.cfg.Group == "":
		return fanOut{base{s}, newPosition(s)}
	case s.cfg.NoAck:
		return unleased{grouped{base{s}}}
	}
	return leased{grouped{base{s}}}
}

// Retries reports whether a failed entry is redelivered.
func (s *Subscription) Retries() bool { return !s.cfg.NoAck }

// KeepsDead reports whether dead entries are moved to a stream: they are in a group
// that acks.
func (s *Subscription) KeepsDead() bool { return s.ledger.Leased() }

// isPausable reports whether there is a group to pause.
func (s *Subscription) isPausable() bool { return s.cfg.Group != "" }

// base is what modes do unless they have their own way.
type base struct{ *Subscription }

func (m base) offer(ctx context.Context) (withdraw, ended <-chan struct{}) {
	return m.life.closing.Done(), ctx.Done()
}

func (base) late([]*ledger.Entry)                           {}
func (base) ended(int)                                      {}
func (base) reconnect(context.Context)                      {}
func (base) handedOut(*Task)                                {}
func (base) postponed(*Task)                                {}
func (base) release(context.Context, []*ledger.Entry) error { return nil }
func (base) abandoned(*Task)                                {}

// grouped is the common part of both group modes.
type grouped struct{ base }

func (m grouped) open(ctx context.Context) error {
	m.reader.seat = m.shared.poller.NewSeat(m.cfg.Topic, m.stream.Consumer, ">", m.reader)
	if err := m.stream.CheckRights(ctx); err != nil {
		return err
	}
	if err := m.checkDeadLetters(ctx); err != nil {
		return err
	}
	if err := m.stream.CreateGroup(ctx, m.cfg.StartID, m.cfg.ClaimMinIdle); err != nil {
		return err
	}
	if err := m.checkRetention(ctx); err != nil {
		return err
	}
	control, err := m.stream.Control(ctx)
	if err != nil && !redisx.IsDenied(err) {
		return err
	}
	m.obey(control, err)
	// Other consumers count the group's consumers, to share the cost of sweeps.
	if err := m.stream.CreateConsumer(ctx); err != nil && !redisx.IsDenied(err) {
		return err
	}
	return nil
}

func (m grouped) start() {
	m.cfg.Log.Info("Subscribing to Redis stream", m.cfg.Fields)
	m.loops.running.Go(m.lookLoop)
}

func (m grouped) read(entries []xstream.Entry) []xstream.Entry {
	m.keeper.SawEntry(entries[len(entries)-1])
	return entries
}

func (m grouped) reconnect(ctx context.Context) { m.askPaused(ctx) }

// leave removes the consumer's name from the group, unless entries are pending for it. If it
// is not known to be removed, no other subscription gets the name.
func (m grouped) leave(ctx context.Context) {
	removed, err := m.stream.RemoveConsumer(ctx)
	if err != nil {
		m.cfg.Log.Debug("The consumer's name was not removed from the group: "+err.Error(), m.cfg.Fields)
	}
	if removed {
		m.shared.returnName(m.cfg.Topic, m.stream.Consumer)
	}
}

// leased keeps entries pending until they are acked.
type leased struct{ grouped }

func (m leased) start() {
	m.grouped.start()
	m.loops.running.Go(m.renewLoop)
	m.loops.running.Go(m.ackLoop)
}

func (m leased) late(entries []*ledger.Entry) { m.Subscription.release(unread(entries)) }

// reconnect checks whether the group was recreated, before anything is read from
// it.
func (m leased) reconnect(ctx context.Context) {
	if err := m.keeper.Renew(ctx, 0); err != nil {
		m.markFailed(dutyRenew, err)
	}
	m.grouped.reconnect(ctx)
	m.update()
}

func (m leased) withdrawn(h *Task) { m.GiveBack(h, h.Count()-1) }

// held queues the entry again, to be released with what was read ahead.
func (m leased) held(h *Task, _ <-chan struct{}) bool {
	if !m.ledger.HoldBack(time.Now(), h.Entry) {
		m.withdrawn(h)
	}
	return false
}

// handedOut drops the fields: they can be read again.
func (m leased) handedOut(h *Task) { h.Fields = nil }

func (leased) postponed(h *Task) { h.Fields = nil }

func (m leased) release(ctx context.Context, give []*ledger.Entry) error {
	return m.keeper.Release(ctx, give)
}

// abandoned leaves the entry pending for this consumer until its lease expires.
// This delivery does not count.
func (m leased) abandoned(h *Task) {
	if _, err := m.Recount(h, m.releaseCount(h.Entry, h.Count()-1)); err != nil && !redisx.IsClosed(err) {
		m.cfg.Log.Error("The abandoned delivery counts as a retry: its count could not be restored", err, m.Fields(h))
	}
}

// unleased has nothing pending, so nothing can be redelivered or released.
type unleased struct{ grouped }

func (m unleased) late(entries []*ledger.Entry) { m.lost.Add(int64(len(entries))) }

func (m unleased) ended(n int) {
	if m.lost.Add(int64(n)); n > 0 {
		m.cfg.Log.Error("Messages lost", errors.New("NoAck: read, and not handled when the subscription closed"),
			m.cfg.Fields.Add(watermill.LogFields{"entries": n}))
	}
}

// offer withdraws at CloseTimeout only: there is no lease to lose.
func (m unleased) offer(context.Context) (withdraw, ended <-chan struct{}) {
	return m.life.abandon.Done(), nil
}

func (m unleased) withdrawn(h *Task) { m.drop(h, "not received before CloseTimeout") }

func (m unleased) drop(h *Task, why string) {
	m.lost.Add(1)
	m.cfg.Log.Error("Message lost", errors.New("NoAck: "+why), m.Fields(h))
	m.ledger.Remove(time.Now(), h.Entry)
}

// held waits: there is nothing to release.
func (m unleased) held(h *Task, resumed <-chan struct{}) bool {
	select {
	case <-resumed:
		return true
	case <-m.life.closing.Done():
		m.drop(h, "the group was paused when the subscription closed")
		return false
	}
}

// fanOut is a subscription without a group. Redis stores only its read position.
type fanOut struct {
	base
	position *position
}

func (m fanOut) open(ctx context.Context) error {
	if err := m.checkRetention(ctx); err != nil {
		return err
	}
	after := m.cfg.StartID
	info, err := m.stream.Info(ctx)
	if redisx.IsDenied(err) && after != "$" {
		info, err = xstream.Info{Last: "0-0", Added: -1}, nil
	}
	if err != nil {
		return err
	}
	if after == "$" {
		after = info.Last
	}
	m.reader.seat = m.shared.poller.NewSeat(m.cfg.Topic, "", after, m.reader)
	return m.position.begin(ctx, after, info)
}

func (m fanOut) start() {
	m.cfg.Log.Info("Subscribing without a consumer group: fan-out, every subscription gets every message", m.cfg.Fields)
	m.loops.running.Go(m.position.run)
}

// read copies the entries' fields: entries are kept until they are acked, and the
// originals would keep the whole reply in memory.
func (m fanOut) read(entries []xstream.Entry) []xstream.Entry {
	entries = m.position.unseen(entries)
	for i, e := range entries {
		entries[i].Fields = own(e.Fields)
	}
	return entries
}

func (fanOut) held(*Task, <-chan struct{}) bool { return true }
func (m fanOut) ended(n int)                    { m.lost.Add(int64(n)) }
func (m fanOut) withdrawn(h *Task)              { m.ledger.Remove(time.Now(), h.Entry) }
func (m fanOut) leave(context.Context)          { m.position.remove() }

// postponed counts the next delivery, since Redis does not.
func (fanOut) postponed(h *Task) { h.SetCount(h.Next, h.Next+1) }
