package model

import (
	"math"
	"strconv"
	"strings"
)

func exists(r *request) any {
	n := int64(0)
	for _, key := range r.args[1:] {
		if r.s.lookup(key) != nil {
			n++
		}
	}
	return n
}

func del(r *request) any {
	n := int64(0)
	for _, key := range r.args[1:] {
		if r.s.lookup(key) != nil {
			r.s.remove(key)
			n++
		}
	}
	return n
}

func flushAll(r *request) any {
	for _, key := range byName(r.s.data.keys) {
		r.s.remove(key)
	}
	return status("OK")
}

func typeOf(r *request) any {
	switch r.s.lookup(r.arg(1)).(type) {
	case *stream:
		return status("stream")
	case *hash:
		return status("hash")
	case *zset:
		return status("zset")
	}
	return status("none")
}

func expire(r *request) any  { return expireIn(r, 1000) }
func pexpire(r *request) any { return expireIn(r, 1) }

func expireIn(r *request, unit int64) any {
	if len(r.args) > 3 {
		return Error("ERR Unsupported option " + r.arg(3))
	}
	n, err := parseInt(r.arg(2))
	if err != nil {
		return err
	}
	const most = 1 << 53 // milliseconds; what Redis takes beyond that makes no difference
	if n > most/unit || n < -most/unit {
		return Error("ERR invalid expire time in '" + strings.ToLower(r.arg(0)) + "' command")
	}
	key := r.arg(1)
	if r.s.lookup(key) == nil {
		return int64(0)
	}
	if n <= 0 {
		r.s.remove(key)
		return int64(1)
	}
	r.s.data.expires[key] = r.s.now() + n*unit
	return int64(1)
}

func ttl(r *request) any {
	ms := pttl(r).(int64)
	if ms > 0 {
		return (ms + 500) / 1000
	}
	return ms
}

func pttl(r *request) any {
	if r.s.lookup(r.arg(1)) == nil {
		return int64(-2)
	}
	if at, ok := r.s.data.expires[r.arg(1)]; ok {
		return at - r.s.now()
	}
	return int64(-1)
}

// hash keeps the order in which its fields were added, as small ones do in Redis.
type hash struct {
	order  []string
	values map[string]string
}

func (h *hash) clone() *hash {
	c := &hash{values: make(map[string]string, len(h.values))}
	c.order = append(c.order, h.order...)
	for f, v := range h.values {
		c.values[f] = v
	}
	return c
}

func hset(r *request) any {
	if len(r.args)%2 != 0 {
		return errArity(r.s.commands["hset"])
	}
	h, err := value[hash](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if h == nil {
		h = &hash{values: make(map[string]string)}
		r.s.data.keys[r.arg(1)] = h
	}
	added := int64(0)
	for i := 2; i < len(r.args); i += 2 {
		if _, ok := h.values[r.arg(i)]; !ok {
			h.order = append(h.order, r.arg(i))
			added++
		}
		h.values[r.arg(i)] = r.arg(i + 1)
	}
	return added
}

func hincrby(r *request) any {
	by, err := parseInt(r.arg(3))
	if err != nil {
		return err
	}
	h, err := value[hash](r.s, r.arg(1))
	if err != nil {
		return err
	}
	now := int64(0)
	if h != nil {
		if v, ok := h.values[r.arg(2)]; ok {
			if now, err = parseInt(v); err != nil {
				return Error("ERR hash value is not an integer")
			}
		}
	}
	if by < 0 && now < math.MinInt64-by || by > 0 && now > math.MaxInt64-by {
		return Error("ERR increment or decrement would overflow")
	}
	now += by
	hset(&request{s: r.s, client: r.client, args: []string{"hset", r.arg(1), r.arg(2), strconv.FormatInt(now, 10)}, inside: r.inside})
	return now
}

func hget(r *request) any {
	h, err := value[hash](r.s, r.arg(1))
	if err != nil || h == nil {
		return orNil(err)
	}
	if v, ok := h.values[r.arg(2)]; ok {
		return v
	}
	return nil
}

func hmget(r *request) any {
	h, err := value[hash](r.s, r.arg(1))
	if err != nil {
		return err
	}
	values := make([]any, len(r.args)-2)
	for i, f := range r.args[2:] {
		if h == nil {
			continue
		}
		if v, ok := h.values[f]; ok {
			values[i] = v
		}
	}
	return values
}

// orNil keeps a missing error from becoming a reply that is not nil.
func orNil(err error) any {
	if err == nil {
		return nil
	}
	return err
}

func hdel(r *request) any {
	h, err := value[hash](r.s, r.arg(1))
	if err != nil {
		return err
	}
	n := int64(0)
	if h == nil {
		return n
	}
	for _, f := range r.args[2:] {
		if _, ok := h.values[f]; !ok {
			continue
		}
		delete(h.values, f)
		for i, o := range h.order {
			if o == f {
				h.order = append(h.order[:i], h.order[i+1:]...)
				break
			}
		}
		n++
	}
	if len(h.values) == 0 {
		r.s.remove(r.arg(1))
	}
	return n
}

func hgetall(r *request) any {
	h, err := value[hash](r.s, r.arg(1))
	if err != nil {
		return err
	}
	all := flatMap{}
	if h != nil {
		for _, f := range h.order {
			all = append(all, f, h.values[f])
		}
	}
	return all
}

func hlen(r *request) any {
	h, err := value[hash](r.s, r.arg(1))
	if err != nil {
		return err
	}
	if h == nil {
		return int64(0)
	}
	return int64(len(h.values))
}
