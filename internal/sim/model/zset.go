package model

import (
	"math"
	"slices"
	"strconv"
	"strings"
)

// zset is a sorted set, in the order of its scores and, where these are the same, of its members.
type zset struct{ members []scored }

type scored struct {
	member string
	score  float64
}

func (z *zset) clone() *zset { return &zset{slices.Clone(z.members)} }

// rank returns where a member is; -1 if it is not there.
func (z *zset) rank(member string) int {
	if z == nil {
		return -1
	}
	return slices.IndexFunc(z.members, func(m scored) bool { return m.member == member })
}

func (z *zset) put(member string, score float64) {
	at, _ := slices.BinarySearchFunc(z.members, scored{member, score}, func(a, b scored) int {
		switch {
		case a.score < b.score:
			return -1
		case a.score > b.score:
			return 1
		}
		return strings.Compare(a.member, b.member)
	})
	z.members = slices.Insert(z.members, at, scored{member, score})
}

// text returns a score as the server writes it.
func (s *Server) text(score float64) string {
	switch {
	case math.IsInf(score, 1):
		return "inf"
	case math.IsInf(score, -1):
		return "-inf"
	case s.version == Redis70:
		return strconv.FormatFloat(score, 'g', 17, 64)
	}
	return strconv.FormatFloat(score, 'f', -1, 64)
}

func (s *Server) rows(members []scored, withScores bool) any {
	if !withScores {
		list := make([]any, len(members))
		for i, m := range members {
			list[i] = m.member
		}
		return list
	}
	list := make(scores, len(members))
	for i, m := range members {
		list[i] = memberScore{m.member, double(s.text(m.score))}
	}
	return list
}

const (
	errFloat    = Error("ERR value is not a valid float")
	errMinMax   = Error("ERR min or max is not a float")
	errXXNX     = Error("ERR XX and NX options at the same time are not compatible")
	errGTLTNX   = Error("ERR GT, LT, and/or NX options at the same time are not compatible")
	maxDecimals = 64
)

// parseFloat takes the spellings that Go and C have in common.
func parseFloat(s string) (float64, bool) {
	f, err := strconv.ParseFloat(s, 64)
	ok := err == nil && !math.IsNaN(f) && len(s) < maxDecimals && !strings.Contains(s, "_")
	return f, ok
}

// bound is an end of a range of scores.
type bound struct {
	score     float64
	exclusive bool
}

func (s *Server) parseBound(arg string) (bound, error) {
	text, exclusive := strings.CutPrefix(arg, "(")
	if s.version == Redis70 {
		text = strings.TrimLeft(text, " ")
	}
	if text == "" {
		return bound{0, exclusive}, nil // as strtod has it
	}
	f, ok := parseFloat(text)
	if !ok {
		return bound{}, errMinMax
	}
	return bound{f, exclusive}, nil
}

func (s *Server) parseBounds(low, high string) (a, b bound, err error) {
	if a, err = s.parseBound(low); err == nil {
		b, err = s.parseBound(high)
	}
	return a, b, err
}

// between returns the members of a range of scores.
func (z *zset) between(low, high bound) []scored {
	if z == nil {
		return nil
	}
	from := slices.IndexFunc(z.members, func(m scored) bool { return m.score > low.score || m.score == low.score && !low.exclusive })
	if from < 0 {
		return nil
	}
	rest := z.members[from:]
	to := slices.IndexFunc(rest, func(m scored) bool { return m.score > high.score || m.score == high.score && high.exclusive })
	if to < 0 {
		to = len(rest)
	}
	return rest[:to]
}

func zadd(r *request) any {
	var nx, xx, gt, lt, ch bool
	options := map[string]*bool{"nx": &nx, "xx": &xx, "gt": &gt, "lt": &lt, "ch": &ch}
	i := 2
	for ; i < len(r.args); i++ {
		set := options[strings.ToLower(r.arg(i))]
		if set == nil {
			break
		}
		*set = true
	}
	pairs := r.args[i:]
	switch {
	case len(pairs) == 0 || len(pairs)%2 != 0:
		return errSyntax
	case nx && xx:
		return errXXNX
	case gt && nx || lt && nx || gt && lt:
		return errGTLTNX
	}
	var all []scored
	for ; len(pairs) > 0; pairs = pairs[2:] {
		f, ok := parseFloat(pairs[0])
		if !ok {
			return errFloat
		}
		all = append(all, scored{pairs[1], f})
	}
	z, err := value[zset](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if z == nil {
		if xx {
			return int64(0)
		}
		z = new(zset)
		r.s.data.keys[r.arg(1)] = z
	}
	added, changed := int64(0), int64(0)
	for _, m := range all {
		rank := z.rank(m.member)
		switch {
		case rank < 0 && xx:
		case rank < 0:
			z.put(m.member, m.score)
			added++
		case nx || gt && m.score <= z.members[rank].score || lt && m.score >= z.members[rank].score || m.score == z.members[rank].score:
		default:
			z.members = slices.Delete(z.members, rank, rank+1)
			z.put(m.member, m.score)
			changed++
		}
	}
	if ch {
		return added + changed
	}
	return added
}

func zrem(r *request) any {
	z, err := value[zset](r.s, r.arg(1))
	if err != nil {
		return err
	}
	n := int64(0)
	for _, member := range r.args[2:] {
		if rank := z.rank(member); rank >= 0 {
			z.members = slices.Delete(z.members, rank, rank+1)
			n++
		}
	}
	if n > 0 && len(z.members) == 0 {
		r.s.remove(r.arg(1))
	}
	return n
}

func zscore(r *request) any {
	z, err := value[zset](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if rank := z.rank(r.arg(2)); rank >= 0 {
		return double(r.s.text(z.members[rank].score))
	}
	return nil
}

func zrank(r *request) any {
	if len(r.args) > 3 && (r.s.version == Redis70 || len(r.args) > 4) {
		return errArity(r.s.commands["zrank"])
	}
	if len(r.args) == 4 {
		return errSyntax // WITHSCORE
	}
	z, err := value[zset](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if rank := z.rank(r.arg(2)); rank >= 0 {
		return int64(rank)
	}
	return nil
}

func zcard(r *request) any {
	z, err := value[zset](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if z == nil {
		return int64(0)
	}
	return int64(len(z.members))
}

func zcount(r *request) any {
	low, high, err := r.s.parseBounds(r.arg(2), r.arg(3))
	if err != nil {
		return err
	}
	z, err := value[zset](r.s, r.arg(1))
	if err != nil {
		return err
	}
	return int64(len(z.between(low, high)))
}

// zrange is by rank, without the other options of ZRANGE.
func zrange(r *request) any {
	withScores := false
	for _, option := range r.args[4:] {
		if !strings.EqualFold(option, "withscores") {
			return errSyntax
		}
		withScores = true
	}
	from, err := parseInt(r.arg(2))
	if err != nil {
		return err
	}
	to, err := parseInt(r.arg(3))
	if err != nil {
		return err
	}
	z, err := value[zset](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if z == nil {
		return r.s.rows(nil, false)
	}
	n := int64(len(z.members))
	if from < 0 {
		from = max(0, from+n)
	}
	if to < 0 {
		to += n
	}
	if from > to || from >= n {
		return r.s.rows(nil, false)
	}
	return r.s.rows(z.members[from:min(to+1, n)], withScores)
}

func zrangebyscore(r *request) any {
	withScores, offset, count := false, int64(0), int64(-1)
	for i := 4; i < len(r.args); i++ {
		switch {
		case strings.EqualFold(r.arg(i), "withscores"):
			withScores = true
		case strings.EqualFold(r.arg(i), "limit") && i+2 < len(r.args):
			var err error
			if offset, err = parseInt(r.arg(i + 1)); err == nil {
				count, err = parseInt(r.arg(i + 2))
			}
			if err != nil {
				return err
			}
			i += 2
		default:
			return errSyntax
		}
	}
	low, high, err := r.s.parseBounds(r.arg(2), r.arg(3))
	if err != nil {
		return err
	}
	z, err := value[zset](r.s, r.arg(1))
	if err != nil {
		return err
	}
	members := z.between(low, high)
	if offset < 0 || offset >= int64(len(members)) {
		return r.s.rows(nil, false)
	}
	members = members[offset:]
	if count >= 0 {
		members = members[:min(count, int64(len(members)))]
	}
	return r.s.rows(members, withScores)
}
