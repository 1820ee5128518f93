package consume

import (
	"context"
	"errors"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/lease"
	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// mode is how a subscription's entries are read, kept and ended: in a group, with a
// lease or without (NoAck), or in fan-out. It is chosen once; nothing else asks which.
type mode interface {
	// open does what must be done before Subscribe returns.
	open(ctx context.Context) error
	// start begins what goes on beside reading and handling.
	start()
	// ping asks Redis for something small.
	ping(ctx context.Context) error

	// read returns those of the entries that are to be handled.
	read(entries []xstream.Entry) []xstream.Entry
	// late ends entries that came when nobody takes them any more.
	late(entries []*ledger.Entry)
	// reconnect is said before reading is tried again.
	reconnect(ctx context.Context)

	// offer returns what ends the offer of a message that nobody has taken: the
	// subscription's end, and that of its context.
	offer(ctx context.Context) (withdraw, ended <-chan struct{})
	// withdrawn ends the entry of such a message.
	withdrawn(h *Task)
	// handedOut is said once somebody has taken it.
	handedOut(h *Task)

	// retries reports whether a message that fails comes again.
	retries() bool
	// postponed prepares an entry that waits for its next delivery.
	postponed(h *Task)
	// deadLetters reports whether there is a dead-letter stream for what is dead.
	deadLetters() bool

	// release gives entries back.
	release(ctx context.Context, give []lease.Counted) error
	// abandoned leaves an entry that may be handled still.
	abandoned(h *Task)
	// leave takes back what Redis knows of the subscription.
	leave(ctx context.Context)
}

func modeOf(s *Subscription) mode {
	switch {
	case s.cfg.Group == "":
		return fanOut{s, newPosition(s)}
	case s.cfg.NoAck:
		return unleased{grouped{s}}
	}
	return leased{grouped{s}}
}

// grouped is what both kinds of groups have in common.
type grouped struct{ *Subscription }

func (m grouped) open(ctx context.Context) error {
	m.reader.seat = m.shared.poller.NewSeat(m.cfg.Topic, m.reader, "")
	if err := m.stream.CheckRights(ctx); err != nil {
		return err
	}
	if err := m.checkDeadLetters(ctx); err != nil {
		return err
	}
	if _, err := m.stream.CreateGroup(ctx, m.cfg.StartID); err != nil {
		return err
	}
	if m.cfg.DeleteAcked {
		if err := m.checkDeleteAcked(ctx); err != nil {
			return err
		}
	}
	// The others count the consumers, to share what sweeping may cost.
	if err := m.stream.CreateConsumer(ctx); err != nil && !redisx.IsDenied(err) {
		return err
	}
	return nil
}

func (m grouped) start() {
	m.cfg.Log.Info("Subscribing to Redis stream", m.cfg.Fields)
	m.loops.start(m.lookLoop)
}

func (m grouped) ping(ctx context.Context) error {
	_, err := m.stream.PendingSummary(ctx)
	return err
}

// leave takes the consumer's name out of the group, unless other subscriptions of the
// topic have it or something is pending under it.
func (m grouped) leave(ctx context.Context) {
	if m.shared.poller.Has(m.cfg.Topic) {
		return
	}
	if err := m.stream.RemoveConsumer(ctx); err != nil {
		m.cfg.Log.Debug("The consumer's name stays in the group: "+err.Error(), m.cfg.Fields)
	}
}

// leased: entries stay pending until they are acked.
type leased struct{ grouped }

func (m leased) start() {
	m.grouped.start()
	m.loops.startLast(m.renewLoop)
	m.loops.startLast(m.ackLoop)
}

func (m leased) read(entries []xstream.Entry) []xstream.Entry {
	m.keeper.SawEntry(entries[len(entries)-1])
	return entries
}

func (m leased) late(entries []*ledger.Entry) {
	give := make([]lease.Counted, len(entries))
	for i, e := range entries {
		give[i] = lease.Counted{Entry: e}
	}
	m.Subscription.release(give)
}

// reconnect: if the group is another one by now, that is to be seen before anything is
// read from it.
func (m leased) reconnect(ctx context.Context) {
	if err := m.keeper.Renew(ctx, 0); err != nil {
		m.markFailed(dutyRenew, err)
	}
	m.update()
}

func (m leased) offer(ctx context.Context) (withdraw, ended <-chan struct{}) {
	return m.life.closing, ctx.Done()
}

func (m leased) withdrawn(h *Task) { m.GiveBack(h, h.Count()-1) }

// handedOut: the fields can be read again.
func (m leased) handedOut(h *Task) { h.Fields = nil }

func (leased) retries() bool     { return true }
func (leased) postponed(h *Task) { h.Fields = nil }

func (leased) deadLetters() bool { return true }

func (m leased) release(ctx context.Context, give []lease.Counted) error {
	return m.keeper.Release(ctx, give)
}

// abandoned: the entry stays in this consumer's name until its lease has run out. This
// delivery does not count.
func (m leased) abandoned(h *Task) {
	m.shared.poller.Disown(m.cfg.Topic, h.ID) // it is no orphan while its handler is at work
	if err := m.keeper.Abandon(m.life.ctx, h.Entry, m.releaseCount(h.Entry, h.Count()-1)); err != nil && !redisx.IsClosed(err) {
		m.cfg.Log.Error("The message keeps a delivery that was not to count", err, m.Fields(h))
	}
}

// unleased: nothing is pending, so that nothing comes again and nothing can be given
// back.
type unleased struct{ grouped }

func (unleased) read(entries []xstream.Entry) []xstream.Entry { return entries }

func (m unleased) late(entries []*ledger.Entry) { m.lost.Add(int64(len(entries))) }
func (unleased) reconnect(context.Context)      {}

// offer: there is no lease to be lost, and a second left before CloseTimeout.
func (m unleased) offer(context.Context) (withdraw, ended <-chan struct{}) {
	return m.life.abandon, nil
}

func (m unleased) withdrawn(h *Task) {
	m.lost.Add(1)
	m.cfg.Log.Error("Message lost", errors.New("NoAck: nobody took it before CloseTimeout"), m.Fields(h))
	m.ledger.Remove(time.Now(), h.Entry)
}

func (unleased) handedOut(*Task)                                {}
func (unleased) retries() bool                                  { return false }
func (unleased) postponed(*Task)                                {}
func (unleased) deadLetters() bool                              { return false }
func (unleased) release(context.Context, []lease.Counted) error { return nil }
func (unleased) abandoned(*Task)                                {}

// fanOut: the subscription reads by itself, and nothing is stored about it but how far it
// is.
type fanOut struct {
	*Subscription
	position *position
}

func (m fanOut) open(ctx context.Context) error {
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
	m.reader.seat = m.shared.poller.NewSeat(m.cfg.Topic, m.reader, after)
	m.position.begin(ctx, after, info)
	return nil
}

func (m fanOut) start() {
	m.cfg.Log.Info("Subscribing without a consumer group: fan-out, every subscription gets every message", m.cfg.Fields)
	m.loops.start(m.position.run)
}

func (m fanOut) ping(ctx context.Context) error {
	_, err := m.stream.Info(ctx)
	return err
}

// read returns the entries in memory of their own: they are kept until they are acked,
// and what was read is a part of its whole reply.
func (m fanOut) read(entries []xstream.Entry) []xstream.Entry {
	entries = m.position.unseen(entries)
	for i, e := range entries {
		entries[i].Fields = own(e.Fields)
	}
	return entries
}

func (fanOut) late([]*ledger.Entry)      {}
func (fanOut) reconnect(context.Context) {}

func (m fanOut) offer(ctx context.Context) (withdraw, ended <-chan struct{}) {
	return m.life.closing, ctx.Done()
}

func (m fanOut) withdrawn(h *Task) { m.ledger.Remove(time.Now(), h.Entry) }
func (fanOut) handedOut(*Task)     {}
func (fanOut) retries() bool       { return true }

// postponed counts the next delivery, which nobody else does.
func (fanOut) postponed(h *Task) { h.SetCount(h.Next, h.Next+1) }

func (fanOut) deadLetters() bool                              { return false }
func (fanOut) release(context.Context, []lease.Counted) error { return nil }
func (fanOut) abandoned(*Task)                                {}
func (m fanOut) leave(context.Context)                        { m.position.remove() }
