package model

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

type group struct {
	lastID    ID
	read      int64 // entries that it has read since the stream was made; -1: not known
	pending   sorted[*pending]
	consumers map[string]*consumer
}

type consumer struct {
	name    string
	pending sorted[*pending]
	seen    int64
	active  int64 // -1: never
}

// pending is an entry that is delivered and not acked.
type pending struct {
	owner *consumer
	at    int64 // of the delivery
	count int64
}

func newGroup(id ID, read int64) *group {
	return &group{lastID: id, read: read, consumers: make(map[string]*consumer)}
}

func (g *group) clone() *group {
	c := newGroup(g.lastID, g.read)
	for name, old := range g.consumers {
		c.consumers[name] = &consumer{name: name, seen: old.seen, active: old.active}
	}
	c.pending = make(sorted[*pending], 0, len(g.pending))
	for _, it := range g.pending {
		owner := c.consumers[it.value.owner.name]
		p := &pending{owner, it.value.at, it.value.count}
		c.pending = append(c.pending, item[*pending]{it.id, p})
		owner.pending = append(owner.pending, item[*pending]{it.id, p})
	}
	return c
}

func (g *group) make(name string, now int64) *consumer {
	c := &consumer{name: name, seen: now, active: -1}
	g.consumers[name] = c
	return c
}

// consumer returns the consumer, makes it if need be, and notes that it was seen.
func (g *group) consumer(name string, now int64) *consumer {
	c := g.consumers[name]
	if c == nil {
		c = g.make(name, now)
	}
	c.seen = now
	return c
}

// own makes a pending entry the consumer's.
func (g *group) own(id ID, p *pending, c *consumer) {
	if p.owner == c {
		return
	}
	if p.owner != nil {
		p.owner.pending.remove(id)
	}
	p.owner = c
	c.pending.put(id, p)
}

func (g *group) ack(id ID) bool {
	p, ok := g.pending.get(id)
	if ok {
		g.pending.remove(id)
		p.owner.pending.remove(id)
	}
	return ok
}

func byName[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }

func findGroup(r *request, key, name string) (*stream, *group, error) {
	s, err := value[stream](r.s, key)
	if s == nil || err != nil {
		return nil, nil, err
	}
	return s, s.groups[name], nil
}

func errNoGroup(key, group string) Error {
	return Error("NOGROUP No such key '" + key + "' or consumer group '" + group + "'")
}

func errNoGroupOfKey(key, group string) Error {
	return Error("NOGROUP No such consumer group '" + group + "' for key name '" + key + "'")
}

const errXGroupKey = Error("ERR The XGROUP subcommand requires the key to exist. Note that for CREATE you may want to " +
	"use the MKSTREAM option to create an empty stream automatically.")

func errSubSyntax(r *request) Error {
	return Error(fmt.Sprintf("ERR unknown subcommand or wrong number of arguments for '%.128s'. Try %s HELP.", r.arg(1), strings.ToUpper(r.arg(0))))
}

// groupOptions parses what may follow an ID.
func groupOptions(r *request, create bool) (mkstream bool, read int64, err error) {
	read = -1
	for i := 5; i < len(r.args); i++ {
		switch opt := strings.ToLower(r.args[i]); {
		case create && opt == "mkstream":
			mkstream = true
		case opt == "entriesread" && i+1 < len(r.args):
			i++
			if read, err = parseInt(r.args[i]); err != nil {
				return mkstream, read, err
			}
			if read < -1 {
				return mkstream, read, Error("ERR value for ENTRIESREAD must be positive or -1")
			}
		default:
			return mkstream, read, errSubSyntax(r)
		}
	}
	return mkstream, read, nil
}

func xgroupCreate(r *request) any {
	mkstream, read, err := groupOptions(r, true)
	if err != nil {
		return err
	}
	s, err := value[stream](r.s, r.arg(2))
	switch {
	case err != nil:
		return err
	case s == nil && !mkstream:
		return errXGroupKey
	case len(r.args) > 8:
		return errSubSyntax(r)
	}
	var id ID
	if r.arg(4) != "$" {
		if id, err = parseID(r.arg(4), 0); err != nil {
			return err
		}
	} else if s != nil {
		id = s.lastID
	}
	if s == nil {
		s = r.s.makeStream(r.arg(2))
		r.s.signal(r.arg(2))
	}
	read = s.readAtMost(read, r.s.version)
	if s.groups[r.arg(3)] != nil {
		return Error("BUSYGROUP Consumer Group name already exists")
	}
	s.groups[r.arg(3)] = newGroup(id, read)
	return status("OK")
}

// xgroupTarget returns the stream and the group that a subcommand needs.
func xgroupTarget(r *request) (*stream, *group, error) {
	s, g, err := findGroup(r, r.arg(2), r.arg(3))
	switch {
	case err != nil:
		return nil, nil, err
	case s == nil:
		return nil, nil, errXGroupKey
	case g == nil:
		return s, nil, errNoGroupOfKey(r.arg(2), r.arg(3))
	}
	return s, g, nil
}

func xgroupSetID(r *request) any {
	_, read, err := groupOptions(r, false)
	if err != nil {
		return err
	}
	s, g, err := xgroupTarget(r)
	switch {
	case err != nil:
		return err
	case len(r.args) > 7:
		return errSubSyntax(r)
	}
	var id ID
	switch r.arg(4) {
	case "$":
		id = s.lastID
	case "-":
	case "+":
		id = maxID
	default:
		if id, err = parseID(r.arg(4), 0); err != nil {
			return err
		}
	}
	g.lastID, g.read = id, s.readAtMost(read, r.s.version)
	return status("OK")
}

func xgroupDestroy(r *request) any {
	s, g, err := xgroupTarget(r)
	switch {
	case g != nil:
		delete(s.groups, r.arg(3))
		r.s.signal(r.arg(2))
		return int64(1)
	case s != nil:
		return int64(0)
	}
	return err
}

func xgroupCreateConsumer(r *request) any {
	_, g, err := xgroupTarget(r)
	switch {
	case err != nil:
		return err
	case g.consumers[r.arg(4)] != nil:
		return int64(0)
	}
	g.make(r.arg(4), r.s.now())
	return int64(1)
}

func xgroupDelConsumer(r *request) any {
	_, g, err := xgroupTarget(r)
	if err != nil {
		return err
	}
	c := g.consumers[r.arg(4)]
	if c == nil {
		return int64(0)
	}
	for _, it := range c.pending {
		g.pending.remove(it.id)
	}
	delete(g.consumers, c.name)
	return int64(len(c.pending))
}

func xack(r *request) any {
	_, g, err := findGroup(r, r.arg(1), r.arg(2))
	if err != nil {
		return err
	}
	n := int64(0)
	if g == nil {
		return n
	}
	ids, err := parseIDs(r.args[3:])
	if err != nil {
		return err
	}
	for _, id := range ids {
		if g.ack(id) {
			n++
		}
	}
	return n
}

// xackdel answers for each entry: 1 acked and deleted, 2 acked and kept for another
// group, -1 not pending.
func xackdel(r *request) any {
	if _, err := value[stream](r.s, r.arg(1)); err != nil {
		return err
	}
	given, how, err := parseAckDel(r)
	if err != nil {
		return err
	}
	s, g, err := findGroup(r, r.arg(1), r.arg(2))
	if err != nil {
		return err
	}
	if g == nil {
		return slices.Repeat([]any{int64(-1)}, len(given))
	}
	ids, err := parseIDs(given)
	if err != nil {
		return err
	}
	replies := make([]any, len(ids))
	for i, id := range ids {
		replies[i] = int64(-1)
		if !g.ack(id) {
			continue
		}
		replies[i] = int64(1)
		switch {
		case how == "acked" && s.needed(id):
			replies[i] = int64(2)
			continue
		case how == "delref":
			for _, other := range s.groups {
				other.ack(id)
			}
		}
		s.delete(id)
	}
	return replies
}

func parseAckDel(r *request) (given []string, how string, err error) {
	for i := 3; i < len(r.args); i++ {
		switch opt := strings.ToLower(r.args[i]); {
		case (opt == "keepref" || opt == "delref" || opt == "acked") && how == "":
			how = opt
		case opt == "ids" && i+1 < len(r.args):
			n, err := parseInt(r.args[i+1])
			if err != nil || n <= 0 {
				return nil, how, Error("ERR Number of IDs must be a positive integer")
			}
			if n > int64(len(r.args)-i-2) {
				return nil, how, Error("ERR The `numids` parameter must match the number of arguments")
			}
			given = r.args[i+2 : i+2+int(n)]
			i += 1 + int(n)
		default:
			return nil, how, errSyntax
		}
	}
	if given == nil {
		return nil, how, errSyntax
	}
	return given, how, nil
}

// needed reports whether a group has yet to read or ack the entry.
func (s *stream) needed(id ID) bool {
	for _, g := range s.groups {
		if _, ok := g.pending.get(id); ok || g.lastID.less(id) {
			return true
		}
	}
	return false
}
