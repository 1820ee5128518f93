package goxui

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
)

// collector asks Redis about all topics, for all viewers together. It has no loop: who looks at a
// snapshot that is too old starts a round, and all who look meanwhile share it. So nothing is
// asked while nobody looks.
type collector struct {
	handler *Handler

	mu      sync.Mutex
	last    *snapshot
	round   bool          // under way
	due     time.Time     // of the next round
	took    time.Duration // by the last round
	names   []string      // of the topics, when they were last listed
	listing time.Time     // of the next list of names
}

// snapshot is what Redis last said of all topics. It does not change.
type snapshot struct {
	at     time.Time     // zero: Redis has not said anything yet
	topics []*topicState // by name
	more   bool          // there are topics beyond maxTopics

	err error // why it is not newer

	newer chan struct{} // closed when there is a newer one, be it with an error
}

// topicState is what Redis holds of a topic. A number of -1 is not known.
type topicState struct {
	Name, Dead string

	Exists          bool
	Length, Letters int64
	Delayed         int64
	Overdue         time.Duration // of the first delayed message
	Groups          []groupState  // by name

	In []float32 // entries added per second, in each round; -1: not known

	added int64     // entries since the stream began
	at    time.Time // of the round that said so
	err   error     // why something is not known
}

// groupState is what Redis holds of a group.
type groupState struct {
	Name                    string
	Consumers, Pending, Lag int64
	Oldest                  time.Duration // since the first of the pending entries was published; 0: none; -1: not known
	LastDelivered           string
	Paused                  time.Time // since when; zero: it is not

	Out []float32 // entries read per second, in each round; -1: not known

	read int64
}

const (
	maxTopics   = 10_000
	maxPoints   = 60               // of a chart
	listEvery   = time.Minute      // SCAN reads all names of the database
	share       = 100              // a round is at most this part of the time
	restAtMost  = time.Minute      // whatever a round took
	roundBound  = 10 * time.Second // for an answer
	topicsAtOne = 100              // in a pipeline
)

func newCollector(h *Handler) *collector {
	return &collector{handler: h, last: &snapshot{newer: make(chan struct{})}}
}

// look returns the last snapshot, and when the next round is due. It starts one that is.
func (c *collector) look() (*snapshot, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.round && !time.Now().Before(c.due) {
		c.round = c.handler.spawn(c.ask, c.fail)
	}
	return c.last, c.due
}

// recent is look for a page: it waits for a round that is under way, but not for long.
func (c *collector) recent(ctx context.Context) *snapshot {
	s, _ := c.look()
	bound := 150 * time.Millisecond
	switch {
	case s.at.IsZero() && s.err == nil:
		bound = time.Second // nothing can be shown yet
	case time.Since(s.at) < 2*c.handler.config.Interval || s.err != nil:
		return s
	}
	timer := time.NewTimer(bound)
	defer timer.Stop()
	select {
	case <-s.newer:
	case <-timer.C:
	case <-ctx.Done():
	}
	s, _ = c.look()
	return s
}

// expire makes the next round due at once: somebody has changed something, and wants to see it.
func (c *collector) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.due = time.Time{}
}

// find returns the state of a topic, or nil. It is known by its name or by what a page shows of it: a
// form cannot send a name that is not UTF-8.
func (s *snapshot) find(topic string) *topicState {
	i, found := slices.BinarySearchFunc(s.topics, topic, func(t *topicState, name string) int { return cmp.Compare(t.Name, name) })
	if !found {
		i = slices.IndexFunc(s.topics, func(t *topicState) bool { return safe(t.Name) == topic })
	}
	if i < 0 {
		return nil
	}
	return s.topics[i]
}

// ask is a round.
func (c *collector) ask() {
	ctx, cancel := context.WithTimeout(c.handler.ctx, roundBound)
	defer cancel()
	c.mu.Lock()
	last, names, list := c.last, c.names, !time.Now().Before(c.listing)
	c.mu.Unlock()

	next := &snapshot{newer: make(chan struct{})}
	began := time.Now()
	var err error
	if list {
		names, err = c.list(ctx)
	}
	listed := time.Now()
	if err == nil {
		next.more = len(names) > maxTopics
		next.topics, err = c.states(ctx, names[:min(len(names), maxTopics)], last)
	}
	next.at = time.Now()
	rest := func(atLeast, took, atMost time.Duration) time.Time {
		return time.Now().Add(max(atLeast, min(share*took, atMost)))
	}

	if err != nil {
		c.fail(err)
		return
	}
	if last.err != nil {
		c.handler.config.Logger.Info("The operations page has answers of Redis again", nil)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if list {
		c.names, c.listing = names, rest(listEvery, listed.Sub(began), 10*listEvery)
	}
	// One that took long once has waited, as for the end of an outage, and was no work for the server.
	took := next.at.Sub(listed)
	c.due = rest(c.handler.config.Interval, min(took, cmp.Or(c.took, took)), restAtMost)
	c.took, c.round, c.last = took, false, next
	close(last.newer)
}

// fail ends a round with an error: the last snapshot stays, and says so.
func (c *collector) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := c.last
	if last.err == nil && c.handler.ctx.Err() == nil {
		c.handler.config.Logger.Error("The operations page has no answer of Redis", errors.New(explain(err)), nil)
	}
	c.due, c.round = time.Now().Add(c.handler.config.Interval), false
	c.last = &snapshot{at: last.at, topics: last.topics, more: last.more, err: err, newer: make(chan struct{})}
	close(last.newer)
}

// list returns the sorted names of all topics, without those dead-letter streams whose topic is
// among them.
func (c *collector) list(ctx context.Context) ([]string, error) {
	config := c.handler.config
	names := make(map[string]bool)
	for _, name := range config.Topics {
		names[name] = true
	}
	if config.Pattern != "" {
		var mu sync.Mutex
		err := onMasters(ctx, config.Client, func(ctx context.Context, node redis.Cmdable) error {
			scan := node.ScanType(ctx, 0, config.Pattern, 1000, "stream").Iterator()
			for scan.Next(ctx) {
				mu.Lock()
				names[scan.Val()] = true
				mu.Unlock()
			}
			return scan.Err()
		})
		if err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Collect(maps.Keys(names)) {
		if dead := config.DeadLetterTopic(name); names[name] && dead != name && !slices.Contains(config.Topics, dead) {
			delete(names, dead)
		}
	}
	return slices.Sorted(maps.Keys(names)), nil
}

// onMasters calls f for each server that has names of its own.
func onMasters(ctx context.Context, client redis.UniversalClient, f func(context.Context, redis.Cmdable) error) error {
	switch client := client.(type) {
	case *redis.ClusterClient:
		return client.ForEachMaster(ctx, func(ctx context.Context, node *redis.Client) error { return f(ctx, node) })
	case *redis.Ring:
		return client.ForEachShard(ctx, func(ctx context.Context, node *redis.Client) error { return f(ctx, node) })
	}
	return f(ctx, client)
}

// states asks about topics, two round trips for a hundred of them. What the server refuses is not
// known, and is no error.
func (c *collector) states(ctx context.Context, names []string, last *snapshot) ([]*topicState, error) {
	all := make([]*topicState, 0, len(names))
	for page := range slices.Chunk(names, topicsAtOne) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		states, err := c.page(ctx, page)
		if err != nil {
			return nil, err
		}
		for _, s := range states {
			s.rates(last.find(s.Name))
		}
		all = append(all, states...)
	}
	return all, nil
}

func (c *collector) page(ctx context.Context, names []string) ([]*topicState, error) {
	type answers struct {
		length, letters, delayed, control *redis.IntCmd
		first                             *redis.ZSliceCmd
		stream                            *redis.XInfoStreamCmd
		groups                            *redis.XInfoGroupsCmd
	}
	client := c.handler.config.Client
	states, asked := make([]*topicState, len(names)), make([]answers, len(names))
	_, _ = client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i, name := range names {
			s := &topicState{Name: name, Dead: c.handler.config.DeadLetterTopic(name)}
			due := beside(name, "due")
			states[i] = s
			asked[i] = answers{
				length: pipe.XLen(ctx, name), letters: pipe.XLen(ctx, s.Dead),
				delayed: pipe.ZCard(ctx, due), first: pipe.ZRangeWithScores(ctx, due, 0, 0),
				stream: pipe.XInfoStream(ctx, name), groups: pipe.XInfoGroups(ctx, name), control: pipe.HLen(ctx, beside(name, "control")),
			}
		}
		return nil
	}) // the error is one of theirs
	var broken error
	for i, a := range asked {
		s := states[i]
		s.at, s.added = time.Now(), -1
		s.Length, s.Letters, s.Delayed = s.number(a.length), s.number(a.letters), s.number(a.delayed)
		if first, err := a.first.Result(); s.knows(err) && len(first) > 0 {
			s.Overdue = max(0, time.Since(time.UnixMilli(int64(first[0].Score))))
		}
		if info, err := a.stream.Result(); err == nil {
			s.Exists = true
			if s.added = info.EntriesAdded; s.added == 0 {
				s.added = s.Length // of a server that does not count
			}
		} else if !replyHas(err, "no such key") {
			s.knows(err)
		}
		if groups, err := a.groups.Result(); err == nil {
			for _, g := range groups {
				s.Groups = append(s.Groups, groupState{
					Name: g.Name, Consumers: g.Consumers, Pending: g.Pending, Lag: max(-1, g.Lag), LastDelivered: g.LastDeliveredID, read: g.EntriesRead,
				})
			}
			slices.SortFunc(s.Groups, func(a, b groupState) int { return cmp.Compare(a.Name, b.Name) })
		} else if !replyHas(err, "no such key") {
			s.knows(err)
		}
		if s.number(a.control) > 0 { // few groups were ever paused
			paused, err := goxstreams.Paused(ctx, client, s.Name)
			s.knows(err)
			for j := range s.Groups {
				s.Groups[j].Paused = paused[s.Groups[j].Name]
			}
		}
		if s.err != nil && !refused(s.err) {
			broken = s.err
		}
	}
	if broken != nil {
		return nil, broken
	}
	return states, c.oldest(ctx, states)
}

// oldest asks for the ages of the groups' oldest pending entries.
func (c *collector) oldest(ctx context.Context, states []*topicState) error {
	type question struct {
		s   *topicState
		g   *groupState
		cmd *redis.XPendingCmd
	}
	var asked []question
	_, _ = c.handler.config.Client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for _, s := range states {
			for i := range s.Groups {
				if g := &s.Groups[i]; g.Pending > 0 {
					asked = append(asked, question{s, g, pipe.XPending(ctx, s.Name, g.Name)})
				}
			}
		}
		return nil
	}) // the error is one of theirs
	for _, q := range asked {
		summary, err := q.cmd.Result()
		if err != nil && !refused(err) {
			return err
		}
		q.g.Oldest = -1
		if q.s.knows(err) {
			if at := timeOf(summary.Lower); !at.IsZero() {
				q.g.Oldest = max(0, time.Since(at))
			}
		}
	}
	return nil
}

// number returns a number that was asked for, or -1.
func (s *topicState) number(cmd *redis.IntCmd) int64 {
	if !s.knows(cmd.Err()) {
		return -1
	}
	return cmd.Val()
}

// knows reports whether there is no error, and keeps the first one, or the first that is not the
// server's answer.
func (s *topicState) knows(err error) bool {
	if err != nil && (s.err == nil || refused(s.err) && !refused(err)) {
		s.err = err
	}
	return err == nil
}

// rates continues the charts of the last round.
func (s *topicState) rates(last *topicState) {
	if last == nil {
		last = &topicState{added: -1}
	}
	elapsed := s.at.Sub(last.at).Seconds()
	per := func(points []float32, now, then int64) []float32 {
		v := float32(-1)
		if now >= then && then >= 0 { // what became less began anew
			v = float32(float64(now-then) / elapsed)
		}
		// A copy: the last snapshot is being read.
		return append(slices.Clone(points[max(0, len(points)-maxPoints+1):]), v)
	}
	s.In = per(last.In, s.added, last.added)
	for i := range s.Groups {
		g, before := &s.Groups[i], groupState{read: -1}
		if j, found := slices.BinarySearchFunc(last.Groups, g.Name, func(g groupState, name string) int { return cmp.Compare(g.Name, name) }); found {
			before = last.Groups[j]
		}
		if g.Lag < 0 { // without a lag Redis does not know what is read either
			g.read = -1
		}
		g.Out = per(before.Out, g.read, before.read)
	}
}

// Pending returns the sum of the groups' pending entries.
func (s *topicState) Pending() (n int64) {
	for _, g := range s.Groups {
		n += g.Pending
	}
	return n
}

// Lag returns the greatest lag of a group; -1 if one is not known.
func (s *topicState) Lag() (n int64) {
	for _, g := range s.Groups {
		if g.Lag < 0 {
			return -1
		}
		n = max(n, g.Lag)
	}
	return n
}

// Oldest returns the greatest age of a group's oldest pending entry.
func (s *topicState) Oldest() (d time.Duration) {
	for _, g := range s.Groups {
		d = max(d, g.Oldest)
	}
	return d
}

// Paused returns how many groups are paused.
func (s *topicState) Paused() (n int) {
	for _, g := range s.Groups {
		if !g.Paused.IsZero() {
			n++
		}
	}
	return n
}

// Problem returns why something is not known; nothing if all is.
func (s *topicState) Problem() string {
	if s.err == nil {
		return ""
	}
	return explain(s.err)
}

// group returns the state of a group, or nil. It is found as a topic is.
func (s *topicState) group(name string) *groupState {
	i := slices.IndexFunc(s.Groups, func(g groupState) bool { return g.Name == name })
	if i < 0 {
		i = slices.IndexFunc(s.Groups, func(g groupState) bool { return safe(g.Name) == name })
	}
	if i < 0 {
		return nil
	}
	return &s.Groups[i]
}

// beside is a key under which the library keeps something of a topic: delayed messages (docs/delayed.md),
// or what is paused (docs/pause.md). It is named as a dead-letter stream is.
func beside(topic, what string) string {
	return topic + "." + what + strings.TrimPrefix(goxstreams.DeadLetterTopic(topic), topic+".dead")
}
