package poll

import (
	"cmp"
	"slices"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// This file decides which of a connection's topics are read next, as which consumer, and for
// how long that may block.

// part is a topic's part in a read: a seat that has room, or those of fan-outs at one
// position in the stream.
type part struct {
	topic *topic
	seats []*Seat
	after string
	count int  // maximum number of entries
	more  bool // seats with room at other positions are next
}

func (p part) isUrgent() bool {
	return slices.ContainsFunc(p.seats, func(s *Seat) bool { return s.urgent })
}

// older compares parts by when they were last read: the topics, and then the seats.
func older(a, b part) int {
	return cmp.Or(cmp.Compare(a.topic.read, b.topic.read), cmp.Compare(a.seats[0].read, b.seats[0].read))
}

// readKey is what parts must have in common to be read with one command.
type readKey struct{ slot, consumer string }

func (c *conn) readKey(p part) readKey {
	key := readKey{consumer: p.seats[0].consumer}
	if c.p.cfg.Client.Wrapped() { // it may be one of a Cluster or a Ring, and gets only one connection
		key.slot = redisx.TagOf(p.topic.key)
	}
	return key
}

// oneRead keeps the parts that the next command reads. The others come in turn: first those
// of subscriptions that failed or may have orphans; then the topic that was read longest ago,
// as the consumer for which that was longest ago.
//
// While the streams are empty, the connection waits as a consumer that covers all topics: it sees
// every new entry, since the group is the same for all. If no consumer does, a few that cover
// them together take turns, and one of these waits, but only for sharedBlock.
func (c *conn) oneRead() {
	clear(c.rest)
	c.parts, c.rest, c.block = c.chosen(c.parts, c.rest[:0])
	for _, p := range c.parts {
		p.topic.read = c.time
		for _, s := range p.seats {
			s.read = c.time
		}
	}
}

// chosen returns the parts of the next read, those of other reads on the same server, and the
// longest time for which it may block; -1: not at all.
func (c *conn) chosen(parts, rest []part) (next, others []part, block time.Duration) {
	if c.alone && len(parts) > 0 {
		return []part{slices.MinFunc(parts, older)}, rest, -1
	}
	if !slices.ContainsFunc(parts, func(p part) bool { return c.readKey(p) != c.readKey(parts[0]) }) {
		return parts, rest, c.p.cfg.Block
	}
	turns, topics := c.turnsOf(parts)
	candidates, waiting := parts, readKey{}
	urgent := slices.DeleteFunc(slices.Clone(parts), func(p part) bool { return !p.isUrgent() })
	switch {
	case len(urgent) > 0:
		candidates = urgent
	case c.dry:
		covering := cover(turns)
		candidates = nil
		for _, t := range covering {
			candidates = append(candidates, t.parts...)
		}
		// It must be the same one each time.
		waiting = slices.MinFunc(covering, func(a, b turn) int {
			return cmp.Or(cmp.Compare(len(b.parts), len(a.parts)), cmp.Compare(a.key.slot, b.key.slot), cmp.Compare(a.key.consumer, b.key.consumer))
		}).key
	}
	key := c.readKey(slices.MinFunc(candidates, older))
	covers := func(t turn) bool { return t.key == key && len(t.parts) == topics }
	switch {
	case len(urgent) > 0:
		block = -1
	case slices.ContainsFunc(turns, covers):
		block = c.p.cfg.Block
	case key == waiting:
		block = min(sharedBlock, c.p.cfg.Block)
	default:
		block = -1
	}
	for _, p := range parts {
		switch k := c.readKey(p); {
		case k == key:
			next = append(next, p)
		case k.slot == key.slot:
			rest = append(rest, p)
		}
	}
	return next, rest, block
}

// turn is the parts of a read.
type turn struct {
	key   readKey
	parts []part
}

func (c *conn) turnsOf(parts []part) (turns []turn, topics int) {
	index := make(map[readKey]int)
	for i, p := range parts {
		if i == 0 || p.topic != parts[i-1].topic {
			topics++
		}
		key := c.readKey(p)
		at, ok := index[key]
		if !ok {
			at = len(turns)
			index[key] = at
			turns = append(turns, turn{key: key})
		}
		turns[at].parts = append(turns[at].parts, p)
	}
	return turns, topics
}

// cover returns turns that cover all topics: one, if there is one that does; otherwise few.
func cover(turns []turn) (covering []turn) {
	slices.SortStableFunc(turns, func(a, b turn) int {
		return cmp.Or(cmp.Compare(len(b.parts), len(a.parts)), older(slices.MinFunc(a.parts, older), slices.MinFunc(b.parts, older)))
	})
	covered := make(map[*topic]bool)
	for _, t := range turns {
		if slices.ContainsFunc(t.parts, func(p part) bool { return !covered[p.topic] }) {
			covering = append(covering, t)
			for _, p := range t.parts {
				covered[p.topic] = true
			}
		}
	}
	return covering
}
