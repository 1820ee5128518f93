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

// Pending returns at most count entries that have been idle for at least idle,
// starting at the ID start. A consumer's name limits it to that consumer.
func (s *Stream) Pending(ctx context.Context, idle time.Duration, start, end string, count int, consumer string) ([]Pending, error) {
	return pendingOf(s.ask(ctx, s.pendingArgs(idle, start, end, count, consumer)...))
}

// PendingOn returns all pending entries of a consumer, in pages of count, over a
// connection of the caller's.
func (s *Stream) PendingOn(ctx context.Context, p redisx.Processor, consumer string, count int) (all []Pending, err error) {
	for start := "-"; ; {
		rows, err := pendingOf(redisx.DoOnce(ctx, p, s.pendingArgs(0, start, "+", count, consumer)...))
		if err != nil {
			return nil, err
		}
		all = append(all, rows...)
		if len(rows) < count {
			return all, nil
		}
		start = After(rows[len(rows)-1].ID)
	}
}

func pendingOf(v any, err error) ([]Pending, error) {
	rows := read(v, err)
	all := make([]Pending, 0, len(rows.rest))
	for rows.more() {
		row := rows.list()
		all = append(all, Pending{row.text(), row.text(), row.millis(), row.number()})
	}
	return all, rows.failed()
}

// Summary is the summary form of XPENDING.
type Summary struct {
	Count     int64
	First     string           // the lowest ID; "" if nothing is pending
	Consumers map[string]int64 // consumers with pending entries, and their numbers
}

// PendingSummary summarizes the pending entries of the group. Unlike GroupInfo, its
// cost does not grow with the number of groups.
func (s *Stream) PendingSummary(ctx context.Context) (Summary, error) {
	sum := Summary{Consumers: make(map[string]int64)}
	reply := read(s.ask(ctx, "xpending", s.Key, s.Group))
	sum.Count, sum.First, _ = reply.number(), reply.text(), reply.text() // nil, if nothing is pending
	for rows := reply.list(); rows.more(); {
		row := rows.list()
		name := row.text()
		sum.Consumers[name], _ = strconv.ParseInt(row.text(), 10, 64)
	}
	return sum, reply.failed()
}

// GroupInfo is the entry of a group in XINFO GROUPS.
type GroupInfo struct {
	LastDelivered string
	Consumers     int64
	Lag           int64 // -1 if the server cannot tell
}

// GroupInfo returns the server's information about the group. Use it rarely: the
// reply contains all groups of the stream.
func (s *Stream) GroupInfo(ctx context.Context) (GroupInfo, error) {
	v, err := s.askAt(ctx, s.Key, "xinfo", "groups", s.Key)
	if err != nil {
		if redisx.ReplyHas(err, "no such key") {
			return GroupInfo{}, ErrNoGroup
		}
		return GroupInfo{}, err
	}
	groups, _ := v.([]any)
	for _, row := range groups {
		g := table(row)
		if g["name"] != s.Group {
			continue
		}
		var info GroupInfo
		info.LastDelivered, _ = g["last-delivered-id"].(string)
		info.Consumers, _ = g["consumers"].(int64)
		lag, known := g["lag"].(int64)
		if info.Lag = lag; !known {
			info.Lag = -1
		}
		return info, nil
	}
	return GroupInfo{}, ErrNoGroup
}

// HasGroup returns an error if the group does not exist.
func (s *Stream) HasGroup(ctx context.Context) error {
	_, err := s.GroupInfo(ctx)
	if GroupLost(err) {
		return fmt.Errorf("topic %q has no such group: %q", s.Key, s.Group)
	}
	return err
}

// ConsumerInfo is the entry of a consumer in XINFO CONSUMERS.
type ConsumerInfo struct {
	Name    string
	Pending int64
	Idle    time.Duration // minimum time since it took or renewed an entry

	// Inactive is the time since it last took or renewed an entry; -1 if it never
	// did. Before Redis 7.2 it is unknown, and equal to Idle.
	Inactive time.Duration
}

// Consumers returns the group's consumers.
func (s *Stream) Consumers(ctx context.Context) ([]ConsumerInfo, error) {
	rows := read(s.ask(ctx, "xinfo", "consumers", s.Key, s.Group))
	var all []ConsumerInfo
	for rows.more() {
		row, c := table(next[any](rows)), ConsumerInfo{}
		c.Name, _ = row["name"].(string)
		c.Pending, _ = row["pending"].(int64)
		idle, _ := row["idle"].(int64)
		c.Idle = time.Duration(idle) * time.Millisecond
		c.Inactive = c.Idle
		if inactive, ok := row["inactive"].(int64); ok {
			c.Inactive = max(-1, time.Duration(inactive)*time.Millisecond)
		}
		all = append(all, c)
	}
	return all, rows.failed()
}

// removeConsumersScript removes consumers with nothing pending: the one named in
// ARGV[2], or if that is empty, all that have been idle for ARGV[3] milliseconds.
// XGROUP DELCONSUMER drops pending entries for good, so the check and the removal
// must be one step. It returns the number removed; -1 if the named consumer has
// pending entries.
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

// RemoveConsumer removes the consumer, unless entries are pending for it. It reports
// whether the group does not know the consumer now.
func (s *Stream) RemoveConsumer(ctx context.Context) (bool, error) {
	v, err := s.eval(ctx, removeConsumersScript, s.Group, s.Consumer, 0)
	if GroupLost(err) {
		return true, nil
	}
	n, _ := v.(int64)
	return err == nil && n >= 0, err
}

// RemoveIdleConsumers removes the consumers that have been idle for the given time
// and have nothing pending.
func (s *Stream) RemoveIdleConsumers(ctx context.Context, idle time.Duration) (int64, error) {
	v, err := s.eval(ctx, removeConsumersScript, s.Group, "", idle.Milliseconds())
	n, _ := v.(int64)
	return n, err
}
