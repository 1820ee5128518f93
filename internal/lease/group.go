package lease

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/ledger"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// progress is how far the group has read, as far as this subscription knows: where
// to resume if the group is lost, and by which entries to recognize the stream.
type progress struct {
	read  xstream.Mark // the greatest entry read here
	known string       // the group's last-delivered-id when last seen
	older xstream.Mark // an entry that was read some time earlier
	at    time.Time    // when older was set

	active  time.Time // when the server last saw the consumer take or renew an entry, or was probed
	taken   time.Time // the same without probes, which keep no idle name in the group
	missing time.Time // when the group did not know the consumer, if it has had no entry since
}

// progressAge is the minimum age difference between read and older: what a failover
// loses is younger.
const progressAge = 10 * time.Second

// SawEntry remembers the last entry of a read.
func (k *Keeper) SawEntry(e xstream.Entry) {
	m := e.Mark()
	k.seen.Lock()
	defer k.seen.Unlock()
	p := &k.progress
	p.active, p.taken, p.missing = time.Now(), time.Now(), time.Time{}
	if xstream.CompareIDs(m.ID, p.read.ID) <= 0 {
		return
	}
	if p.read.ID == "" {
		p.older, p.at = m, time.Now()
	} else if time.Since(p.at) > progressAge {
		p.older, p.at = p.read, time.Now()
	}
	p.read = m
}

// SeeGroup asks for the group's last-delivered-id, which it remembers, and its number of consumers.
func (k *Keeper) SeeGroup(ctx context.Context) (consumers int64, err error) {
	info, err := k.cfg.Stream.GroupInfo(ctx)
	if err == nil {
		k.seen.Lock()
		defer k.seen.Unlock()
		k.progress.known = info.LastDelivered
	}
	return info.Consumers, err
}

// SawMissing remembers that the group does not know the consumer. Call it before the
// consumer is added: a server before 7.2 does not say that it has had no entry since.
func (k *Keeper) SawMissing() {
	k.seen.Lock()
	defer k.seen.Unlock()
	k.progress.missing = time.Now()
}

// wasActive remembers that the consumer has entries, by the answer to a command.
func (k *Keeper) wasActive(sent time.Time) {
	k.seen.Lock()
	defer k.seen.Unlock()
	k.progress.active = time.Now()
	if !sent.IsZero() {
		k.progress.taken = time.Now()
	}
	if sent.After(k.progress.missing) {
		k.progress.missing = time.Time{}
	}
}

// Probe sends a write that changes nothing.
func (k *Keeper) Probe(ctx context.Context) error {
	err := k.cfg.Stream.Probe(ctx)
	if err == nil {
		k.wasActive(time.Time{}) // which says nothing about entries
	}
	return err
}

// consumerIsNew reports whether the group does not know the consumer, or has never seen it
// take an entry; with byClocks, also whether it saw the consumer active only more than a second
// before it last was. That alone proves nothing, since a lost or late answer looks the same.
// In a group that was repaired in part it is known by other entries.
func (k *Keeper) consumerIsNew(ctx context.Context, byClocks bool) (bool, error) {
	known := k.progressNow()
	consumers, err := k.cfg.Stream.Consumers(ctx)
	if err == nil && k.partly {
		return true, nil
	}
	for _, c := range consumers {
		if c.Name == k.cfg.Stream.Consumer {
			return c.Inactive < 0 || !known.missing.IsZero() || byClocks && c.Inactive+time.Second < time.Since(known.active), err
		}
	}
	return true, err
}

// forgotten reports whether others may have removed the consumer's name since it was idle: then
// that the group does not know it proves nothing.
func (k *Keeper) forgotten() bool {
	return k.cfg.Timeout > 0 && time.Since(k.progressNow().taken) >= k.cfg.Timeout
}

func (k *Keeper) progressNow() progress {
	k.seen.Lock()
	defer k.seen.Unlock()
	return k.progress
}

// beganAnew reports whether the stream is not the one that was read: it was deleted
// and recreated. Its IDs may be smaller than the old ones, or even equal.
func (k *Keeper) beganAnew(ctx context.Context) (anew bool, info xstream.Info, err error) {
	p, s := k.progressNow(), k.cfg.Stream
	info, err = s.Info(ctx)
	if redisx.IsDenied(err) {
		return false, xstream.Info{}, nil
	}
	if err != nil || p.read.ID == "" {
		return false, info, err
	}
	e, err := s.Entry(ctx, p.read.ID)
	switch {
	case err != nil:
		return false, info, err
	case e != nil:
		return e.Mark() != p.read, info, nil
	case xstream.CompareIDs(info.Last, p.read.ID) < 0: // or a failover has lost the last entries
	case info.First == "0-0", xstream.CompareIDs(info.First, p.read.ID) > 0, xstream.CompareIDs(info.MaxDeleted, p.read.ID) >= 0:
		return false, info, nil // trimmed or deleted: no entry that was read is left
	}
	there, err := s.Has(ctx, p.older)
	return !there && err == nil, info, err
}

// checkGroup restores everything if the group does not know this consumer: then it was
// recreated by somebody who did not know of the entries. It waits for a repair that is under
// way.
func (k *Keeper) checkGroup(ctx context.Context) (lost bool, err error) {
	if err := k.begin(ctx); err != nil {
		return false, err
	}
	defer k.end()
	if lost, err = k.consumerIsNew(ctx, false); lost && err == nil {
		if k.forgotten() {
			return false, nil
		}
		err = k.remade(ctx)
	}
	return lost, err
}

// Regroup recreates a lost group, and restores our entries in it. Another consumer
// may have recreated it first, or the group may be lost on another server only.
func (k *Keeper) Regroup(ctx context.Context) error {
	if err := k.begin(ctx); err != nil {
		return err
	}
	defer k.end()
	anew, info, err := k.beganAnew(ctx)
	if err != nil {
		return err
	}
	if anew {
		k.forgetAll(time.Now())
	}
	if _, err := k.cfg.Stream.GroupInfo(ctx); err == nil {
		return k.restore(ctx)
	} else if !xstream.GroupLost(err) && !redisx.IsDenied(err) {
		return err
	}
	p := k.progressNow()
	start := p.known
	if read := p.read.ID; xstream.CompareIDs(read, start) > 0 {
		start = read
	}
	if start == "" || info.Last != "" && xstream.CompareIDs(info.Last, start) < 0 {
		start = "0" // everything in it is, or may be, new
	}
	entries := k.toRestore(!anew) // in a stream that began anew the ID of what may have been moved may be another entry's
	// What was acked stays until all consumers have renewed, and so have restored what they had.
	made, err := k.cfg.Stream.CreateGroupAt(ctx, start, info, counted(entries, k.cfg.Ledger.RestoreCount), k.cfg.MinIdle, k.cfg.Trims)
	if err != nil {
		return err
	}
	if made {
		k.cfg.Log.Error("The consumer group was lost and has been recreated; pending entries of crashed consumers are lost",
			errors.New("group lost"), k.cfg.Fields.Add(watermill.LogFields{"start_id": start}))
		if err := k.ackHandled(ctx, entries); err != nil {
			return err
		}
	}
	return k.restore(ctx)
}

// forgetAll drops our entries of a stream that is gone. Handlers may finish, but
// their messages are not acked, since the ID may belong to another entry now.
func (k *Keeper) forgetAll(now time.Time) {
	k.seen.Lock()
	k.progress = progress{active: k.progress.active, taken: k.progress.taken}
	k.seen.Unlock()
	if !k.cfg.Ledger.Leased() {
		return
	}
	k.cfg.Ledger.Reclaim()
	n := k.cfg.Ledger.Gone(now, slices.Concat(k.cfg.Ledger.Renewals(now, 0), k.cfg.Ledger.ToRestore(false))...)
	if n == 0 {
		return
	}
	k.Lost.Add(int64(n))
	k.cfg.Log.Error("Messages lost", errors.New("the stream was deleted and recreated while they were pending"),
		k.cfg.Fields.Add(watermill.LogFields{"entries": n}))
}

// toRestore returns our entries, with those that a pause has released or that are
// being released, except those that are to be acked: the restore might arrive after their
// XACK. Those that are handled meanwhile must be acked once more: see ackHandled.
func (k *Keeper) toRestore(anew bool) []*ledger.Entry {
	if !k.cfg.Ledger.Leased() {
		return nil
	}
	k.partly = true
	k.cfg.Ledger.Reclaim()
	return k.cfg.Ledger.ToRestore(anew)
}

func (k *Keeper) ackHandled(ctx context.Context, restored []*ledger.Entry) error {
	for ids := range slices.Chunk(k.cfg.Ledger.ToAck(restored, nil), MaxAck) {
		if err := k.cfg.Stream.Ack(ctx, k.cfg.Deletes, ids...); err != nil {
			return err
		}
	}
	return nil
}

// restore makes our entries pending again.
func (k *Keeper) restore(ctx context.Context) error {
	for chunk := range slices.Chunk(k.toRestore(false), xstream.MaxOwned) {
		sent := time.Now()
		standings, err := k.cfg.Stream.Restore(ctx, counted(chunk, k.cfg.Ledger.RestoreCount))
		if err != nil {
			return err
		}
		others := make(map[*ledger.Entry]xstream.Standing)
		restored := split(chunk, standings, others)
		k.cfg.Ledger.Restored(sent, restored...)
		if len(restored) > 0 {
			k.wasActive(sent)
		}
		if err := k.ackHandled(ctx, restored); err != nil {
			return err
		}
		k.stand(others)
	}
	k.partly = false
	return nil
}

// CheckReleased looks after entries that a pause has released: nobody takes them until it ends,
// so if all of them are not pending any more, somebody who did not know of them recreated the
// group, and they are restored. If it is a single one, which may have been acked by hand, or while
// others may take some, the group must also have forgotten this consumer, in the latter case not
// for having been idle. Entries that others have are dropped.
func (k *Keeper) CheckReleased(ctx context.Context, entries []*ledger.Entry, others bool) error {
	if err := k.begin(ctx); err != nil {
		return err
	}
	defer k.end()
	// A repair may have made some ours again.
	still := k.cfg.Ledger.Withdrawals()
	entries = slices.DeleteFunc(slices.Clone(entries), func(e *ledger.Entry) bool { return !slices.Contains(still, e) })
	if len(entries) == 0 {
		return nil
	}
	var taken []*ledger.Entry
	settled := 0
	for chunk := range slices.Chunk(entries, xstream.MaxOwned) {
		standings, err := k.cfg.Stream.Standings(ctx, Released, idsOf(chunk))
		if err != nil {
			return err
		}
		for _, e := range chunk {
			switch how := standings[e.ID]; how {
			case "":
				continue
			case xstream.Settled:
				settled++
			case xstream.Trimmed:
				k.CountLost(1, e)
			}
			taken = append(taken, e)
		}
	}
	surely := !others && len(entries) > 1
	lost := surely && settled == len(entries)
	if settled > 0 && !surely {
		isNew, err := k.consumerIsNew(ctx, false)
		if redisx.IsDenied(err) {
			isNew, err = true, nil // as in isRemade
		}
		if err != nil {
			return err
		}
		lost = isNew && !(others && k.forgotten())
	}
	if lost {
		return k.remade(ctx)
	}
	k.cfg.Ledger.Remove(time.Now(), taken...)
	return nil
}
