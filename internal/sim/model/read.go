package model

import (
	"strings"
)

// read is an XREAD or XREADGROUP.
type read struct {
	s               *Server
	grouped         bool // XREADGROUP
	group, consumer string
	noAck           bool
	count, block    int64 // block is -1 without BLOCK
	keys            []string
	after           []ID // maxID stands for ">"
}

func xread(r *request) any      { return readStreams(r, "xread") }
func xreadgroup(r *request) any { return readStreams(r, "xreadgroup") }

func readStreams(r *request, name string) any {
	rd := &read{s: r.s, block: -1}
	after, err := rd.parse(r.args, name)
	if err != nil {
		return err
	}
	if err := rd.resolve(after, name); err != nil {
		return err
	}
	reply := rd.run()
	if _, wait := reply.(blocked); wait && (r.inside || rd.block < 0) {
		return nullArray{}
	}
	return reply
}

func (rd *read) parse(args []string, name string) (after []string, err error) {
	grouped := name == "xreadgroup"
	for i := 1; i < len(args); i++ {
		more := len(args) - 1 - i
		switch opt := strings.ToLower(args[i]); {
		case opt == "block" && more > 0:
			i++
			if rd.block, err = parseInt(args[i]); err != nil {
				return nil, Error("ERR timeout is not an integer or out of range")
			}
			if rd.block < 0 {
				return nil, Error("ERR timeout is negative")
			}
		case opt == "count" && more > 0:
			i++
			if rd.count, err = parseInt(args[i]); err != nil {
				return nil, err
			}
		case opt == "streams" && more > 0:
			rest := args[i+1:]
			if len(rest)%2 != 0 {
				return nil, rd.s.errUnbalanced(name)
			}
			if grouped && !rd.grouped {
				return nil, Error("ERR Missing GROUP option for XREADGROUP")
			}
			rd.keys = rest[:len(rest)/2]
			return rest[len(rest)/2:], nil
		case opt == "group" && more >= 2:
			if !grouped {
				return nil, Error("ERR The GROUP option is only supported by XREADGROUP. You called XREAD instead.")
			}
			rd.grouped, rd.group, rd.consumer = true, args[i+1], args[i+2]
			i += 2
		case opt == "noack":
			if !grouped {
				return nil, Error("ERR The NOACK option is only supported by XREADGROUP. You called XREAD instead.")
			}
			rd.noAck = true
		default:
			return nil, errSyntax
		}
	}
	return nil, errSyntax
}

func (s *Server) errUnbalanced(name string) Error {
	symbol := "ID or '$'"
	switch {
	case s.version == Redis70:
		name = "XREAD"
	case name == "xreadgroup":
		name, symbol = "'xreadgroup'", "ID or '>'"
	case s.version == Redis86:
		name, symbol = "'xread'", "ID, '+', or '$'"
	default:
		name = "'xread'"
	}
	return Error("ERR Unbalanced " + name + " list of streams: for each stream key an " + symbol + " must be specified.")
}

// resolve turns what is given as IDs into some, and asks for each stream and group.
func (rd *read) resolve(after []string, name string) error {
	rd.after = make([]ID, len(rd.keys))
	for i, key := range rd.keys {
		s, g, err := rd.find(key)
		switch {
		case err != nil:
			return err
		case rd.grouped && g == nil:
			return rd.errNoGroup(key)
		}
		switch sign := after[i]; sign {
		case "+", "$":
			if sign == "+" && rd.s.version == Redis70 {
				break
			}
			if rd.grouped {
				return Error("ERR The " + sign + " ID is meaningless in the context of XREADGROUP: you want to read the history of " +
					"this consumer by specifying a proper ID, or use the > ID to get new messages. The " + sign + " ID would just return an empty result set.")
			}
			if s != nil {
				rd.after[i] = s.lastID
				if sign == "+" {
					rd.after[i], _ = s.lastID.previous()
				}
			}
			continue
		case ">":
			if !rd.grouped {
				return Error("ERR The > ID can be specified only when calling XREADGROUP using the GROUP <group> <consumer> option.")
			}
			rd.after[i] = maxID
			continue
		}
		if rd.after[i], err = parseID(after[i], 0); err != nil {
			return err
		}
	}
	return nil
}

func (rd *read) find(key string) (*stream, *group, error) {
	s, err := value[stream](rd.s, key)
	if s == nil || err != nil {
		return nil, nil, err
	}
	return s, s.groups[rd.group], nil
}

func (rd *read) errNoGroup(key string) Error {
	return Error("NOGROUP No such key '" + key + "' or consumer group '" + rd.group + "' in XREADGROUP with GROUP option")
}

// run serves the read with what there is. It returns blocked when that is nothing.
func (rd *read) run() any {
	for _, key := range rd.keys { // when it is run again, this may have changed
		if _, g, err := rd.find(key); err != nil {
			return err
		} else if rd.grouped && g == nil {
			return rd.errNoGroup(key)
		}
	}
	var found readings
	for i, key := range rd.keys {
		s, g, _ := rd.find(key)
		if s == nil {
			continue
		}
		if !rd.grouped {
			if last := len(s.entries) - 1; last >= 0 && rd.after[i].less(s.entries[last].id) {
				found = append(found, reading{key, rd.entries(s, rd.after[i])})
			}
			continue
		}
		now := rd.s.now()
		if rd.s.version != Redis70 {
			g.consumer(rd.consumer, now)
		}
		if rd.after[i] != maxID {
			found = append(found, reading{key, rd.history(s, g.consumer(rd.consumer, now), rd.after[i])})
		} else if last := len(s.entries) - 1; last >= 0 && g.lastID.less(s.entries[last].id) {
			found = append(found, reading{key, rd.deliver(s, g)})
		}
	}
	if found == nil {
		return blocked{rd}
	}
	return found
}

func (rd *read) entries(s *stream, after ID) entries {
	start, ok := after.next()
	if !ok {
		return entries{}
	}
	return s.slice(start, maxID, max(0, rd.count), false)
}

// deliver gives the consumer what the group has not read.
func (rd *read) deliver(s *stream, g *group) entries {
	now := rd.s.now()
	c := g.consumer(rd.consumer, now)
	fresh := rd.entries(s, g.lastID)
	for _, e := range fresh {
		s.advance(g, e.id, rd.s.version)
		if rd.noAck {
			continue
		}
		if p, ok := g.pending.get(e.id); ok { // after XGROUP SETID
			g.own(e.id, p, c)
			p.at, p.count = now, 1
		} else {
			p := &pending{c, now, 1}
			g.pending.put(e.id, p)
			c.pending.put(e.id, p)
		}
		c.active = now
	}
	return fresh
}

// history delivers once more what is pending in the consumer's name.
func (rd *read) history(s *stream, c *consumer, after ID) entries {
	found := entries{}
	start, ok := after.next()
	if !ok {
		return found
	}
	for _, it := range c.pending.between(start, maxID) {
		if rd.count > 0 && int64(len(found)) >= rd.count {
			break
		}
		e, there := s.entries.get(it.id)
		if there {
			it.value.at = rd.s.now()
			it.value.count++
		}
		found = append(found, item[entry]{it.id, e})
	}
	return found
}

// serve70 is how Redis 7.0 serves a blocked read when a key was changed.
func (rd *read) serve70(key string) any {
	s, g, err := rd.find(key)
	switch {
	case s == nil && rd.grouped:
		return Error("UNBLOCKED the stream key no longer exists")
	case s == nil || err != nil:
		return blocked{rd}
	case rd.grouped && g == nil:
		return Error("NOGROUP the consumer group this client was blocked on no longer exists")
	}
	var found entries
	if g != nil && rd.grouped {
		if !g.lastID.less(s.lastID) {
			return blocked{rd}
		}
		found = rd.deliver(s, g)
	} else {
		for i, k := range rd.keys {
			if k == key {
				if !rd.after[i].less(s.lastID) {
					return blocked{rd}
				}
				found = rd.entries(s, rd.after[i])
			}
		}
	}
	return readings{{key, found}}
}
