package model

import (
	"slices"
	"strings"
)

// idempotence is what a stream remembers for XADD IDMP.
type idempotence struct {
	seconds, size     int64
	producers         map[string][]remembered // the oldest first
	added, duplicates int64
}

type remembered struct {
	iid string
	id  ID
	at  int64
}

func newIdempotence() idempotence {
	return idempotence{seconds: 100, size: 100, producers: make(map[string][]remembered)}
}

func (i idempotence) clone() idempotence {
	producers := make(map[string][]remembered, len(i.producers))
	for p, list := range i.producers {
		producers[p] = slices.Clone(list)
	}
	i.producers = producers
	return i
}

func (i *idempotence) forget(producer string, now int64) {
	list := i.producers[producer]
	n := 0
	for n < len(list) && now-list[n].at > i.seconds*1000 {
		n++
	}
	if n == len(list) {
		delete(i.producers, producer)
	} else if n > 0 {
		i.producers[producer] = list[n:]
	}
}

func (i *idempotence) lookup(producer, iid string, now int64) (ID, bool) {
	if producer == "" {
		return ID{}, false
	}
	i.forget(producer, now)
	for _, r := range i.producers[producer] {
		if r.iid == iid {
			i.duplicates++
			return r.id, true
		}
	}
	return ID{}, false
}

func (i *idempotence) record(producer, iid string, id ID, now int64) {
	if producer == "" {
		return
	}
	list := i.producers[producer]
	if int64(len(list)) >= i.size {
		list = list[1:]
	}
	i.producers[producer] = append(list, remembered{iid, id, now})
	i.added++
}

func (i *idempotence) tracked() (n int64) {
	for _, list := range i.producers {
		n += int64(len(list))
	}
	return n
}

func xcfgset(r *request) any {
	seconds, size := int64(-1), int64(-1)
	for i := 2; i < len(r.args); i += 2 {
		opt := strings.ToLower(r.args[i])
		if i+1 == len(r.args) || opt != "idmp-duration" && opt != "idmp-maxsize" {
			return errSyntax
		}
		n, err := parseInt(r.args[i+1])
		switch {
		case err != nil:
			return err
		case opt == "idmp-duration":
			if seconds = n; n < 1 || n > 86400 {
				return Error("ERR IDMP-DURATION must be between 1 and 86400 seconds")
			}
		default:
			if size = n; n < 1 || n > 10000 {
				return Error("ERR IDMP-MAXSIZE must be between 1 and 10000 entries")
			}
		}
	}
	s, err := value[stream](r.s, r.arg(1))
	switch {
	case err != nil:
		return err
	case s == nil:
		return errNoKey
	case seconds < 0 && size < 0:
		return Error("ERR At least one parameter must be specified")
	}
	m := &s.idmp
	if seconds > 0 && seconds != m.seconds {
		m.seconds = seconds
		clear(m.producers)
	}
	if size > 0 && size != m.size {
		m.size = size
		clear(m.producers)
	}
	return status("OK")
}

func xidmprecord(r *request) any {
	s, err := value[stream](r.s, r.arg(1))
	switch {
	case err != nil:
		return err
	case s == nil:
		return errNoKey
	}
	id, err := parseID(r.arg(4), 0)
	if err != nil {
		return err
	}
	if _, ok := s.entries.get(id); !ok {
		return Error("ERR No such message in stream")
	}
	s.idmp.record(r.arg(2), r.arg(3), id, r.s.now())
	return status("OK")
}

const errNoKey = Error("ERR no such key")
