package xstream

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Pending is a row of XPENDING.
type Pending struct {
	ID       string
	Consumer string
	Idle     time.Duration
	Count    int64
}

func (s *Stream) pendingArgs(idle time.Duration, start, end string, count int, consumer string) []any {
	args := []any{"xpending", s.Key, s.Group}
	if idle > 0 {
		args = append(args, "idle", idle.Milliseconds())
	}
	args = append(args, start, end, count)
	if consumer != "" {
		args = append(args, consumer)
	}
	return args
}

// Pending returns the entries that have been idle for idle at least, from the
// ID start on ("(" before an ID: after it), at most count. A consumer's name
// limits it to that consumer's.
func (s *Stream) Pending(ctx context.Context, idle time.Duration, start, end string, count int, consumer string) ([]Pending, error) {
	v, err := s.ask(ctx, s.pendingArgs(idle, start, end, count, consumer)...)
	if err != nil {
		return nil, err
	}
	return parsePending(v)
}

// PendingOn is Pending of all of a consumer's, a page of count at a time, on a
// connection of the caller's.
func (s *Stream) PendingOn(ctx context.Context, p redisx.Processor, consumer string, count int) (all []Pending, err error) {
	for start := "-"; ; {
		v, err := redisx.DoOnce(ctx, p, s.pendingArgs(0, start, "+", count, consumer)...)
		if err != nil {
			return nil, err
		}
		rows, err := parsePending(v)
		if err != nil {
			return nil, err
		}
		all = append(all, rows...)
		if len(rows) < count {
			return all, nil
		}
		start = "(" + rows[len(rows)-1].ID
	}
}

func parsePending(v any) ([]Pending, error) {
	rows, _ := v.([]any)
	out := make([]Pending, 0, len(rows))
	for _, row := range rows {
		cols, ok := row.([]any)
		if !ok || len(cols) != 4 {
			return nil, fmt.Errorf("goxstreams: XPENDING: unexpected row %v", row)
		}
		id, _ := cols[0].(string)
		name, _ := cols[1].(string)
		idle, _ := cols[2].(int64)
		n, _ := cols[3].(int64)
		out = append(out, Pending{id, name, time.Duration(idle) * time.Millisecond, n})
	}
	return out, nil
}

// Summary is XPENDING's of a group.
type Summary struct {
	Count     int64
	First     string           // the first of the IDs; "" if nothing is pending
	Consumers map[string]int64 // those with something pending, and how much
}

// PendingSummary returns what is pending in the group. Unlike GroupInfo its cost does
// not grow with the stream's groups.
func (s *Stream) PendingSummary(ctx context.Context) (Summary, error) {
	v, err := s.ask(ctx, "xpending", s.Key, s.Group)
	if err != nil {
		return Summary{}, err
	}
	cols, _ := v.([]any)
	if len(cols) != 4 {
		return Summary{}, fmt.Errorf("goxstreams: XPENDING: unexpected reply %v", v)
	}
	sum := Summary{Consumers: make(map[string]int64)}
	sum.Count, _ = cols[0].(int64)
	sum.First, _ = cols[1].(string) // nil if there is none
	rows, _ := cols[3].([]any)
	for _, row := range rows {
		if row, ok := row.([]any); ok && len(row) == 2 {
			name, _ := row[0].(string)
			n, _ := row[1].(string)
			sum.Consumers[name], _ = strconv.ParseInt(n, 10, 64)
		}
	}
	return sum, nil
}

// GroupInfo is what XINFO GROUPS says of a group.
type GroupInfo struct {
	LastDelivered string
	Pending       int64
	Consumers     int64
	Lag           int64 // -1 if the server cannot tell
}

// GroupInfo returns what the server knows of the group. It is for rare moments: the
// answer has all groups of the stream in it.
func (s *Stream) GroupInfo(ctx context.Context) (GroupInfo, error) {
	v, err := s.ask(ctx, "xinfo", "groups", s.Key)
	if err != nil {
		if redisx.ReplyHas(err, "no such key") {
			return GroupInfo{}, ErrNoGroup
		}
		return GroupInfo{}, err
	}
	groups, _ := v.([]any)
	for _, g := range groups {
		if lookup(g, "name") != s.Group {
			continue
		}
		var info GroupInfo
		info.LastDelivered, _ = lookup(g, "last-delivered-id").(string)
		info.Pending, _ = lookup(g, "pending").(int64)
		info.Consumers, _ = lookup(g, "consumers").(int64)
		lag, known := lookup(g, "lag").(int64)
		if info.Lag = lag; !known {
			info.Lag = -1
		}
		return info, nil
	}
	return GroupInfo{}, ErrNoGroup
}

// Groups returns how many groups the stream has.
func (s *Stream) Groups(ctx context.Context) (int, error) {
	v, err := s.ask(ctx, "xinfo", "groups", s.Key)
	groups, _ := v.([]any)
	return len(groups), err
}

// GroupExists returns an error if the server knows that the group is not there.
func (s *Stream) GroupExists(ctx context.Context) error {
	_, err := s.GroupInfo(ctx)
	switch {
	case GroupLost(err):
		return fmt.Errorf("group %q of topic %q does not exist any more", s.Group, s.Key)
	case redisx.IsDenied(err):
		return nil
	}
	return err
}

// ConsumerInfo is what XINFO CONSUMERS says of one of them.
type ConsumerInfo struct {
	Name    string
	Pending int64
	Idle    time.Duration // since it took or renewed something, at least

	// Inactive is the time since it last took or renewed something; -1: it never did.
	// Before Redis 7.2 it is not known; Idle is the same then.
	Inactive time.Duration
}

// Consumers returns the group's.
func (s *Stream) Consumers(ctx context.Context) ([]ConsumerInfo, error) {
	v, err := s.ask(ctx, "xinfo", "consumers", s.Key, s.Group)
	if err != nil {
		return nil, err
	}
	rows, _ := v.([]any)
	all := make([]ConsumerInfo, len(rows))
	for i, row := range rows {
		all[i].Name, _ = lookup(row, "name").(string)
		all[i].Pending, _ = lookup(row, "pending").(int64)
		idle, _ := lookup(row, "idle").(int64)
		all[i].Idle = time.Duration(idle) * time.Millisecond
		all[i].Inactive = all[i].Idle
		if inactive, ok := lookup(row, "inactive").(int64); ok {
			all[i].Inactive = max(-1, time.Duration(inactive)*time.Millisecond)
		}
	}
	return all, nil
}

// removeConsumersScript removes consumers with nothing pending: the one named
// in ARGV[2], or if that is empty all that are idle for ARGV[3] milliseconds.
// XGROUP DELCONSUMER drops what is pending for good, so that asking and
// removing must be one step. It returns how many; -1 if that named has something.
const removeConsumersScript = `
local removed = 0
for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local f = {}
  for i = 1, #c, 2 do f[c[i]] = c[i + 1] end
  if f['pending'] == 0 and (f['name'] == ARGV[2] or (ARGV[2] == '' and f['idle'] >= tonumber(ARGV[3]))) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], f['name'])
    removed = removed + 1
  elseif f['name'] == ARGV[2] then
    return -1
  end
end
return removed`

// RemoveConsumer removes the consumer, unless something is pending in its name.
func (s *Stream) RemoveConsumer(ctx context.Context) error {
	_, err := s.eval(ctx, removeConsumersScript, s.Group, s.Consumer, 0)
	if GroupLost(err) {
		return nil
	}
	return err
}

// RemoveIdleConsumers removes those that have been idle for so long and have
// nothing pending.
func (s *Stream) RemoveIdleConsumers(ctx context.Context, idle time.Duration) (int64, error) {
	v, err := s.eval(ctx, removeConsumersScript, s.Group, "", idle.Milliseconds())
	n, _ := v.(int64)
	return n, err
}
