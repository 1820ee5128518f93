package model

import (
	"maps"
	"math"
	"slices"
	"strings"
)

type stream struct {
	entries    sorted[entry]
	lastID     ID
	maxDeleted ID
	added      int64
	groups     map[string]*group
	node       node       // that the last entry is in
	ends       map[int]ID // by node: its last entry, which may be deleted
	idmp       idempotence
}

// entry is what a stream holds. Its fields are never changed.
type entry struct {
	fields []string
	node   int
}

// node is a piece of a stream, of which approximate trimming removes whole ones.
type node struct{ number, entries, bytes int }

const (
	maxNodeEntries = 100
	maxNodeBytes   = 4096
)

func (s *stream) clone() *stream {
	c := *s
	c.entries = slices.Clone(s.entries)
	c.groups = make(map[string]*group, len(s.groups))
	for name, g := range s.groups {
		c.groups[name] = g.clone()
	}
	c.idmp = s.idmp.clone()
	c.ends = maps.Clone(s.ends)
	return &c
}

func (s *stream) first() ID {
	if len(s.entries) == 0 {
		return ID{}
	}
	return s.entries[0].id
}

func (s *stream) add(id ID, fields []string) {
	size := 0
	for _, f := range fields {
		size += len(f)
	}
	n := &s.node
	emptied := len(s.entries) == 0 || s.entries[len(s.entries)-1].value.node != n.number
	if emptied || n.entries >= maxNodeEntries || n.bytes+size >= maxNodeBytes {
		*n = node{number: n.number + 1}
	}
	n.entries++
	n.bytes += size + 5*len(fields)/2 + 8 // roughly what it takes
	s.entries = append(s.entries, item[entry]{id, entry{fields, n.number}})
	if s.ends == nil {
		s.ends = make(map[int]ID)
	}
	s.ends[n.number] = id
	s.lastID = id
	s.added++
}

// delete deletes an entry as XDEL does: it leaves a tombstone.
func (s *stream) delete(id ID) bool {
	if !s.entries.remove(id) {
		return false
	}
	if s.maxDeleted.less(id) {
		s.maxDeleted = id
	}
	return true
}

// trimming is what XADD and XTRIM have in common.
type trimming struct {
	by     string // "maxlen", "minid" or ""
	approx bool
	maxLen int64
	minID  ID
	limit  int64
}

// parse parses the option at args[i], and returns the next one's index; i if it is no
// option of trimming.
func (t *trimming) parse(args []string, i int, limited *bool) (int, error) {
	more := len(args) - 1 - i
	if more == 0 {
		return i, nil
	}
	switch opt := strings.ToLower(args[i]); opt {
	case "maxlen", "minid":
		if t.by != "" {
			return i, Error("ERR syntax error, MAXLEN and MINID options at the same time are not compatible")
		}
		t.by, t.approx = opt, false
		i++
		if more >= 2 && (args[i] == "~" || args[i] == "=") {
			t.approx = args[i] == "~"
			i++
		}
		var err error
		if opt == "minid" {
			t.minID, err = parseID(args[i], 0)
		} else if t.maxLen, err = parseInt(args[i]); err == nil && t.maxLen < 0 {
			err = Error("ERR The MAXLEN argument must be >= 0.")
		}
		return i + 1, err
	case "limit":
		var err error
		if t.limit, err = parseInt(args[i+1]); err == nil && t.limit < 0 {
			err = Error("ERR The LIMIT argument must be >= 0.")
		}
		*limited = true
		return i + 2, err
	}
	return i, nil
}

func (t *trimming) check(xadd, limited bool) error {
	switch {
	case t.limit != 0 && t.by == "":
		return Error("ERR syntax error, LIMIT cannot be used without specifying a trimming strategy")
	case !xadd && t.by == "":
		return Error("ERR syntax error, XTRIM must be called with a trimming strategy")
	case limited && !t.approx:
		return Error("ERR syntax error, LIMIT cannot be used without the special ~ option")
	case !limited && t.approx:
		t.limit = 100 * maxNodeEntries
	}
	return nil
}

func (s *stream) trim(t trimming) int64 {
	n := 0
	switch t.by {
	case "":
		return 0
	case "maxlen":
		n = max(0, len(s.entries)-int(min(t.maxLen, math.MaxInt32)))
	case "minid":
		n, _ = s.entries.find(t.minID)
	}
	if t.approx {
		whole := 0
		for whole < n {
			end := whole
			for end < len(s.entries) && s.entries[end].value.node == s.entries[whole].value.node {
				end++
			}
			number := s.entries[whole].value.node
			if end > n || t.limit > 0 && int64(end) > t.limit || t.by == "minid" && !s.ends[number].less(t.minID) {
				break
			}
			delete(s.ends, number)
			whole = end
		}
		n = whole
	}
	clear(s.entries[:n])
	s.entries = s.entries[n:]
	return int64(n)
}

// slice returns copies of the entries from start to end.
func (s *stream) slice(start, end ID, count int64, reverse bool) entries {
	part := s.entries.between(start, end)
	n := len(part)
	if count > 0 && count < int64(n) {
		n = int(count)
	}
	if !reverse {
		return entries(slices.Clone(part[:n]))
	}
	out := slices.Clone(part[len(part)-n:])
	slices.Reverse(out)
	return entries(out)
}

func xadd(r *request) any {
	var t trimming
	var noMake, limited bool
	var producer, iid string
	var id *ID
	seqGiven, i := true, 2
	for ; i < len(r.args) && r.args[i] != "*"; i++ {
		opt := strings.ToLower(r.args[i])
		if next, err := t.parse(r.args, i, &limited); err != nil {
			return err
		} else if next != i {
			i = next - 1
			continue
		}
		if opt == "nomkstream" {
			noMake = true
			continue
		}
		if opt == "idmp" && r.s.version == Redis86 && len(r.args)-1-i >= 2 {
			if producer != "" {
				return Error("ERR syntax error, IDMP/IDMPAUTO specified multiple times")
			}
			if producer, iid = r.args[i+1], r.args[i+2]; producer == "" {
				return Error("ERR syntax error, IDMP requires a non-empty producer ID")
			} else if iid == "" {
				return Error("ERR syntax error, IDMP requires a non-empty idempotent ID")
			}
			i += 2
			continue
		}
		given := r.args[i]
		if rest, ok := strings.CutSuffix(given, "-*"); ok {
			given, seqGiven = rest+"-0", false
		}
		parsed, err := parseID(given, 0)
		if err != nil {
			return err
		}
		id = &parsed
		break
	}
	if err := t.check(true, limited); err != nil {
		return err
	}
	if id != nil && producer != "" {
		return Error("ERR syntax error, IDMP/IDMPAUTO can be used only with auto-generated IDs")
	}
	fields := r.args[min(i+1, len(r.args)):]
	if len(fields) < 2 || len(fields)%2 == 1 {
		return errArity(r.s.commands["xadd"])
	}
	if id != nil && seqGiven && *id == (ID{}) {
		return Error("ERR The ID specified in XADD must be greater than 0-0")
	}
	s, err := value[stream](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if s == nil {
		if noMake {
			return nil
		}
		s = r.s.makeStream(r.arg(1))
	}
	now := r.s.now()
	if first, ok := s.idmp.lookup(producer, iid, now); ok {
		return first.String()
	}
	if s.lastID == maxID {
		return Error("ERR The stream has exhausted the last possible ID, unable to add more items")
	}
	added, ok := s.newID(id, seqGiven, now)
	if !ok {
		return Error("ERR The ID specified in XADD is equal or smaller than the target stream top item")
	}
	s.add(added, slices.Clone(fields))
	s.idmp.record(producer, iid, added, now)
	s.trim(t)
	r.s.signal(r.arg(1))
	return added.String()
}

func (s *stream) newID(given *ID, seqGiven bool, now int64) (ID, bool) {
	if given == nil {
		if s.lastID.ms < uint64(now) {
			return ID{uint64(now), 0}, true
		}
		return s.lastID.next()
	}
	id := *given
	if !seqGiven && id.ms == s.lastID.ms {
		if s.lastID.seq == math.MaxUint64 {
			return id, false
		}
		id.seq = s.lastID.seq + 1
	}
	return id, s.lastID.less(id)
}

func (s *Server) makeStream(key string) *stream {
	st := &stream{groups: make(map[string]*group), idmp: newIdempotence()}
	s.data.keys[key] = st
	return st
}

func parseIDs(args []string) ([]ID, error) {
	ids := make([]ID, len(args))
	for i, a := range args {
		var err error
		if ids[i], err = parseID(a, 0); err != nil {
			return nil, err
		}
	}
	return ids, nil
}

func xdel(r *request) any {
	s, err := value[stream](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if s == nil {
		return int64(0)
	}
	ids, err := parseIDs(r.args[2:])
	if err != nil {
		return err
	}
	n := int64(0)
	for _, id := range ids {
		if s.delete(id) {
			n++
		}
	}
	return n
}

func xtrim(r *request) any {
	var t trimming
	var limited bool
	for i := 2; i < len(r.args); {
		next, err := t.parse(r.args, i, &limited)
		if err != nil {
			return err
		}
		if next == i {
			return errSyntax
		}
		i = next
	}
	if err := t.check(false, limited); err != nil {
		return err
	}
	s, err := value[stream](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if s == nil {
		return int64(0)
	}
	return s.trim(t)
}

func xlen(r *request) any {
	s, err := value[stream](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if s == nil {
		return int64(0)
	}
	return int64(len(s.entries))
}

func xrange(r *request) any    { return rangeOf(r, r.arg(2), r.arg(3), false) }
func xrevrange(r *request) any { return rangeOf(r, r.arg(3), r.arg(2), true) }

const errSyntax = Error("ERR syntax error")

func rangeOf(r *request, from, to string, reverse bool) any {
	start, err := parseRangeID(from, false)
	if err != nil {
		return err
	}
	end, err := parseRangeID(to, true)
	if err != nil {
		return err
	}
	count := int64(-1)
	for i := 4; i < len(r.args); i += 2 {
		if !strings.EqualFold(r.args[i], "count") || i+1 == len(r.args) {
			return errSyntax
		}
		if count, err = parseInt(r.args[i+1]); err != nil {
			return err
		}
		count = max(0, count)
	}
	s, err := value[stream](r.s, r.arg(1))
	switch {
	case err != nil:
		return err
	case s == nil:
		return []any{}
	case count == 0:
		return nullArray{}
	}
	return s.slice(start, end, count, reverse)
}
