package model

import (
	"strconv"
	"strings"
)

func xpending(r *request) any {
	if len(r.args) == 3 {
		_, g, err := findGroup(r, r.arg(1), r.arg(2))
		if err != nil {
			return err
		}
		if g == nil {
			return errNoGroup(r.arg(1), r.arg(2))
		}
		return g.summary()
	}
	if len(r.args) < 6 || len(r.args) > 9 {
		return errSyntax
	}
	idle, args := int64(0), r.args[3:]
	var err error
	if strings.EqualFold(args[0], "idle") {
		if idle, err = parseInt(args[1]); err != nil {
			return err
		}
		if len(r.args) < 8 {
			return errSyntax
		}
		args = args[2:]
	}
	count, err := parseInt(args[2])
	if err != nil {
		return err
	}
	start, err := parseRangeID(args[0], false)
	if err != nil {
		return err
	}
	end, err := parseRangeID(args[1], true)
	if err != nil {
		return err
	}
	_, g, err := findGroup(r, r.arg(1), r.arg(2))
	switch {
	case err != nil:
		return err
	case g == nil:
		return errNoGroup(r.arg(1), r.arg(2))
	}
	list := g.pending
	if len(args) > 3 {
		c := g.consumers[args[3]]
		if c == nil {
			return []any{}
		}
		list = c.pending
	}
	rows, now := []any{}, r.s.now()
	for _, it := range list.between(start, end) {
		if int64(len(rows)) >= count {
			break
		}
		if idle == 0 || now-it.value.at >= idle {
			rows = append(rows, []any{it.id.String(), it.value.owner.name, max(0, now-it.value.at), it.value.count})
		}
	}
	return rows
}

func (g *group) summary() any {
	n := len(g.pending)
	if n == 0 {
		return []any{int64(0), nil, nil, nullArray{}}
	}
	owners := []any{}
	for _, name := range byName(g.consumers) {
		if n := len(g.consumers[name].pending); n > 0 {
			owners = append(owners, []any{name, strconv.Itoa(n)})
		}
	}
	return []any{int64(n), g.pending[0].id.String(), g.pending[n-1].id.String(), owners}
}

// claim is XCLAIM's options.
type claim struct {
	ids           []ID
	minIdle       int64
	at            int64 // -1: now
	count         int64 // -1: one more
	lastID        ID
	force, justID bool
}

func parseClaim(args []string, now int64) (c claim, err error) {
	c.at, c.count = -1, -1
	if c.minIdle, err = parseInt(args[4]); err != nil {
		return c, Error("ERR Invalid min-idle-time argument for XCLAIM")
	}
	i := 5
	for ; i < len(args); i++ {
		id, err := parseID(args[i], 0)
		if err != nil {
			break
		}
		c.ids = append(c.ids, id)
	}
	for ; i < len(args); i++ {
		opt := strings.ToUpper(args[i])
		switch {
		case opt == "FORCE":
			c.force = true
			continue
		case opt == "JUSTID":
			c.justID = true
			continue
		case i+1 == len(args):
			return c, Error("ERR Unrecognized XCLAIM option '" + args[i] + "'")
		}
		i++
		switch opt {
		case "IDLE", "TIME", "RETRYCOUNT":
			n, err := parseInt(args[i])
			if err != nil {
				return c, Error("ERR Invalid " + opt + " option argument for XCLAIM")
			}
			switch opt {
			case "IDLE":
				c.at = now - n
			case "TIME":
				c.at = n
			default:
				c.count = n
			}
		case "LASTID":
			if c.lastID, err = parseID(args[i], 0); err != nil {
				return c, err
			}
		default:
			return c, Error("ERR Unrecognized XCLAIM option '" + args[i-1] + "'")
		}
	}
	if c.at < 0 || c.at > now {
		c.at = now
	}
	return c, nil
}

func xclaim(r *request) any {
	s, g, err := findGroup(r, r.arg(1), r.arg(2))
	switch {
	case err != nil:
		return err
	case g == nil:
		return errNoGroup(r.arg(1), r.arg(2))
	}
	now := r.s.now()
	cl, err := parseClaim(r.args, now)
	if err != nil {
		return err
	}
	if g.lastID.less(cl.lastID) {
		g.lastID = cl.lastID
	}
	var to *consumer
	if r.s.version != Redis70 {
		to = g.consumer(r.arg(3), now)
	}
	ids, claimed := []any{}, entries{}
	for _, id := range cl.ids {
		e, there := s.entries.get(id)
		p, _ := g.pending.get(id)
		if !there {
			g.ack(id)
			continue
		}
		if p == nil {
			if !cl.force {
				continue
			}
			p = &pending{at: now, count: 1}
			g.pending.put(id, p)
		}
		if p.owner != nil && cl.minIdle > 0 && now-p.at < cl.minIdle {
			continue
		}
		if to == nil {
			to = g.consumer(r.arg(3), now)
		}
		g.own(id, p, to)
		p.at = cl.at
		if cl.count >= 0 {
			p.count = cl.count
		} else if !cl.justID {
			p.count++
		}
		to.active = now
		if cl.justID {
			ids = append(ids, id.String())
		} else {
			claimed = append(claimed, item[entry]{id, e})
		}
	}
	if cl.justID {
		return ids
	}
	return claimed
}
