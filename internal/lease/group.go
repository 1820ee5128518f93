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

// progress is how far the group has come, as far as this subscription knows: where
// to go on if the group is lost, and by which entries to know the stream again.
type progress struct {
	read  xstream.Mark // the greatest that was read here
	known string       // the group's last-delivered-id when last seen
	older xstream.Mark // one that was read some time before
	at    time.Time    // since when

	active time.Time // when the server last saw the consumer take or renew something
}

// progressAge is how much older that is: what a failover loses is younger.
const progressAge = 10 * time.Second

// SawEntry remembers the last entry of a read.
func (k *Keeper) SawEntry(e xstream.Entry) {
	m := e.Mark()
	k.seen.Lock()
	defer k.seen.Unlock()
	p := &k.progress
	p.active = time.Now()
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

// SawGroup remembers how far the group has got.
func (k *Keeper) SawGroup(lastDelivered string) {
	k.seen.Lock()
	defer k.seen.Unlock()
	k.progress.known = lastDelivered
}

func (k *Keeper) wasActive() {
	k.seen.Lock()
	defer k.seen.Unlock()
	k.progress.active = time.Now()
}

// Probe asks for a write that changes nothing.
func (k *Keeper) Probe(ctx context.Context) error {
	err := k.cfg.Stream.Probe(ctx)
	if err == nil {
		k.wasActive()
	}
	return err
}

// consumerIsNew reports whether the group does not know the consumer, or has seen it take
// nothing: then it is another group with the same name, or the consumer was removed. By
// clocks it is also asked whether that was more than a second after the consumer was last
// active, as far as is known here: an answer that was lost, or is late, looks like that too.
func (k *Keeper) consumerIsNew(ctx context.Context, byClocks bool) (bool, error) {
	active := k.progressNow().active
	consumers, err := k.cfg.Stream.Consumers(ctx)
	if redisx.IsDenied(err) {
		return true, nil // to put back what was acked elsewhere does less harm than to lose it
	}
	for _, c := range consumers {
		if c.Name == k.cfg.Stream.Consumer {
			return c.Inactive < 0 || byClocks && c.Inactive+time.Second < time.Since(active), err
		}
	}
	return true, err
}

func (k *Keeper) progressNow() progress {
	k.seen.Lock()
	defer k.seen.Unlock()
	return k.progress
}

// beganAnew reports whether the stream is another one than that which was read: it
// was deleted, and made again. Its IDs may be smaller than those of the old one, or
// even the same.
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
	case xstream.CompareIDs(info.Last, p.read.ID) < 0: // or a failover has lost the last ones
	case info.First == "0-0", xstream.CompareIDs(info.First, p.read.ID) > 0, xstream.CompareIDs(info.MaxDeleted, p.read.ID) >= 0:
		return false, info, nil // trimmed or deleted: nothing that is there was read
	}
	there, err := s.Has(ctx, p.older)
	return !there && err == nil, info, err
}

// Regroup makes the group again after it was lost, and puts what is ours back into it.
// Another consumer may be faster, or the loss was another server's.
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
		start = "0" // all that is in it is new, or may be
	}
	made, err := k.cfg.Stream.CreateGroupAt(ctx, start, info)
	if err != nil {
		return err
	}
	if made {
		k.cfg.Log.Error("The consumer group was lost and is made again; what dead consumers held is not pending any more",
			errors.New("group lost"), k.cfg.Fields.Add(watermill.LogFields{"start_id": start}))
	}
	return k.restore(ctx)
}

// forgetAll gives up what is ours of a stream that is gone. Handlers may finish; what
// they settle is not acked, since the ID may be another entry's by now.
func (k *Keeper) forgetAll(now time.Time) {
	k.seen.Lock()
	k.progress = progress{active: k.progress.active}
	k.seen.Unlock()
	n := k.cfg.Ledger.Gone(now, k.cfg.Ledger.Ours()...)
	if n == 0 {
		return
	}
	k.Lost.Add(int64(n))
	k.cfg.Log.Error("Messages lost", errors.New("the stream was deleted, and began anew, while they were pending"),
		k.cfg.Fields.Add(watermill.LogFields{"entries": n}))
}

// restore puts what is ours back among the pending entries, but for what is to be
// acked: that might come after its XACK.
func (k *Keeper) restore(ctx context.Context) error {
	if !k.cfg.Ledger.Leased() {
		return nil
	}
	k.partly = true
	ours := slices.DeleteFunc(k.cfg.Ledger.Ours(), func(e *ledger.Entry) bool { return !k.cfg.Ledger.Owned(e) })
	for chunk := range slices.Chunk(ours, xstream.MaxOwned) {
		counted := make([]xstream.Counted, len(chunk))
		for i, e := range chunk {
			counted[i] = xstream.Counted{ID: e.ID, Count: e.Count()}
		}
		sent := time.Now()
		standings, err := k.cfg.Stream.Restore(ctx, counted)
		if err != nil {
			return err
		}
		others := make(map[*ledger.Entry]xstream.Standing)
		for _, e := range chunk {
			if how := standings[e.ID]; how != "" {
				others[e] = how
			} else {
				k.cfg.Ledger.Renewed(sent, e)
			}
		}
		k.stand(others)
	}
	k.partly = false
	return nil
}
