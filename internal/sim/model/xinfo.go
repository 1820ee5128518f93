package model

// advance moves the group on to an entry that it reads.
func (s *stream) advance(g *group, id ID, v Version) {
	from := g.lastID
	if v == Redis70 {
		from = id
	}
	behind := v != Redis70 && g.lastID.less(s.first())
	if g.read >= 0 && !behind && !s.tombstoneAfter(from, v) {
		g.read++
	} else if s.added > 0 {
		g.read = s.distance(id, v)
	}
	g.lastID = id
}

// readAtMost is what the option ENTRIESREAD sets.
func (s *stream) readAtMost(read int64, v Version) int64 {
	if v == Redis86 {
		return min(read, s.added)
	}
	return read
}

func (s *stream) tombstoneAfter(id ID, v Version) bool {
	if v == Redis70 && s.maxDeleted.less(s.first()) {
		return false
	}
	return len(s.entries) > 0 && s.maxDeleted != ID{} && !s.maxDeleted.less(id)
}

// distance is how many entries the stream ever had up to the ID; -1 if it cannot tell.
func (s *stream) distance(id ID, v Version) int64 {
	length, first := int64(len(s.entries)), s.first()
	switch {
	case s.added == 0:
		return 0
	case length == 0 && !s.lastID.less(id):
		return s.added
	case v != Redis70 && id != ID{} && id.less(s.maxDeleted):
		return -1
	case id == s.lastID:
		return s.added
	case s.lastID.less(id):
		return -1
	case s.maxDeleted == ID{} || s.maxDeleted.less(first):
		if id.less(first) {
			return s.added - length
		}
		if id == first {
			return s.added - length + 1
		}
	}
	return -1
}

// lag is how many entries the group has not read; nil if the server cannot tell.
func (s *stream) lag(g *group, v Version) any {
	if s.added == 0 {
		return int64(0)
	}
	if v == Redis86 {
		if len(s.entries) == 0 {
			return int64(0)
		}
		if g.lastID.less(s.first()) && s.maxDeleted.less(s.first()) {
			return int64(len(s.entries))
		}
	}
	behind := v == Redis86 && g.lastID.less(s.first())
	if g.read >= 0 && !behind && !s.tombstoneAfter(g.lastID, v) {
		return s.added - g.read
	}
	if n := s.distance(g.lastID, v); n >= 0 {
		return s.added - n
	}
	return nil
}

func xinfoStream(r *request) any {
	s, err := value[stream](r.s, r.arg(2))
	switch {
	case err != nil:
		return err
	case s == nil:
		return errNoKey
	case len(r.args) > 3: // FULL is not modelled
		return errSubSyntax(r)
	}
	info := flatMap{
		"length", int64(len(s.entries)),
		"radix-tree-keys", s.nodes(),
		"radix-tree-nodes", s.nodes() + 1,
		"last-generated-id", s.lastID.String(),
		"max-deleted-entry-id", s.maxDeleted.String(),
		"entries-added", s.added,
		"recorded-first-entry-id", s.first().String(),
	}
	if r.s.version == Redis86 {
		info = append(info,
			"idmp-duration", s.idmp.seconds,
			"idmp-maxsize", s.idmp.size,
			"pids-tracked", int64(len(s.idmp.producers)),
			"iids-tracked", s.idmp.tracked(),
			"iids-added", s.idmp.added,
			"iids-duplicates", s.idmp.duplicates,
		)
	}
	return append(info, "groups", int64(len(s.groups)), "first-entry", s.edge(false), "last-entry", s.edge(true))
}

func (s *stream) nodes() int64 {
	if len(s.entries) == 0 {
		return 0
	}
	return int64(s.entries[len(s.entries)-1].value.node - s.entries[0].value.node + 1)
}

func (s *stream) edge(last bool) any {
	e := s.slice(ID{}, maxID, 1, last)
	if len(e) == 0 {
		return nil
	}
	return []any{e[0].id.String(), plainFields(e[0].value.fields)}
}

func xinfoGroups(r *request) any {
	s, err := value[stream](r.s, r.arg(2))
	switch {
	case err != nil:
		return err
	case s == nil:
		return errNoKey
	}
	groups := []any{}
	for _, name := range byName(s.groups) {
		g := s.groups[name]
		var read any
		if g.read >= 0 {
			read = g.read
		}
		groups = append(groups, flatMap{
			"name", name,
			"consumers", int64(len(g.consumers)),
			"pending", int64(len(g.pending)),
			"last-delivered-id", g.lastID.String(),
			"entries-read", read,
			"lag", s.lag(g, r.s.version),
		})
	}
	return groups
}

func xinfoConsumers(r *request) any {
	s, g, err := findGroup(r, r.arg(2), r.arg(3))
	switch {
	case err != nil:
		return err
	case s == nil:
		return errNoKey
	case g == nil:
		return errNoGroupOfKey(r.arg(2), r.arg(3))
	}
	consumers, now := []any{}, r.s.now()
	for _, name := range byName(g.consumers) {
		c := g.consumers[name]
		info := flatMap{"name", name, "pending", int64(len(c.pending)), "idle", max(0, now-c.seen)}
		if r.s.version != Redis70 {
			inactive := int64(-1)
			if c.active >= 0 {
				inactive = now - c.active
			}
			info = append(info, "inactive", inactive)
		}
		consumers = append(consumers, info)
	}
	return consumers
}
