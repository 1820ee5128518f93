package sim

import (
	"context"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/sim/rules"
)

// do runs a command as an administrator. It ignores errors about what does not exist.
func (s *simulation) do(args ...any) any {
	v, err := s.server.Do(args...)
	if err != nil && !strings.HasPrefix(err.Error(), "NOGROUP") && !strings.Contains(err.Error(), "no such key") &&
		!strings.Contains(err.Error(), "requires the key to exist") && !strings.Contains(err.Error(), "equal or smaller") {
		s.t.Errorf("%v: %v", args, err)
	}
	return v
}

// store adds a message with the given ID.
func (s *simulation) store(topic, id string, msg *message.Message) {
	fields, err := goxstreams.DefaultMarshaler{}.Marshal(topic, msg)
	if err != nil {
		panic(err) // numbers only
	}
	args := []any{"XADD", topic, id}
	for _, name := range []string{goxstreams.UUIDHeaderKey, "metadata", "payload"} {
		args = append(args, name, fields[name])
	}
	s.do(args...)
}

func list(v any) []any {
	l, _ := v.([]any)
	return l
}

func text(v any) string {
	s, _ := v.(string)
	return s
}

// entries returns the stream's entries after an ID, which may be "-".
func (s *simulation) entries(topic, after string) []rules.Entry {
	if after != "-" {
		after = "(" + after
	}
	var entries []rules.Entry
	for _, item := range list(s.do("XRANGE", topic, after, "+")) {
		e := rules.Entry{ID: text(list(item)[0])}
		fields := list(list(item)[1])
		for i := 0; i+1 < len(fields); i += 2 {
			if text(fields[i]) == goxstreams.UUIDHeaderKey {
				e.UUID = text(fields[i+1])
			}
		}
		entries = append(entries, e)
	}
	return entries
}

func (s *simulation) pending(topic, group string) []rules.Pending {
	var pending []rules.Pending
	for _, item := range list(s.do("XPENDING", topic, group, "-", "+", "100000")) {
		p := list(item)
		count, _ := p[3].(int64)
		pending = append(pending, rules.Pending{ID: text(p[0]), Consumer: text(p[1]), Count: count})
	}
	return pending
}

// delivered returns the last ID delivered to the group; "" without a group.
func (s *simulation) delivered(topic, group string) string {
	for _, item := range list(s.do("XINFO", "GROUPS", topic)) {
		info := make(map[string]any)
		pairs := list(item)
		for i := 0; i+1 < len(pairs); i += 2 {
			info[text(pairs[i])] = pairs[i+1]
		}
		if text(info["name"]) == group {
			return text(info["last-delivered-id"])
		}
	}
	return ""
}

// consumers returns the names in the group.
func (s *simulation) consumers(topic, group string) (names []string) {
	for _, item := range list(s.do("XINFO", "CONSUMERS", topic, group)) {
		names = append(names, text(list(item)[1]))
	}
	return names
}

// unread returns the entries not delivered to the group yet.
func (s *simulation) unread(topic, group string) []rules.Entry {
	after := s.delivered(topic, group)
	if after == "" {
		after = "-"
	}
	return s.entries(topic, after)
}

// final returns what Redis has of the group's topics at the end.
func (s *simulation) final(group Group) map[string]rules.TopicState {
	states := make(map[string]rules.TopicState)
	for _, topic := range s.schedule.Topics {
		states[topic] = rules.TopicState{
			Entries: s.entries(topic, "-"), Pending: s.pending(topic, group.Name), Dead: s.letters(topic, group.Name),
			Waiting: s.waits(topic),
		}
	}
	return states
}

// letters returns the group's dead letters, as the library reads them.
func (s *simulation) letters(topic, group string) []rules.Letter {
	client := s.newNode("administrator", 0, redis.Options{}).client
	defer client.Close()
	queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic(topic))
	if err != nil {
		panic(err)
	}
	var letters []rules.Letter
	for dead, err := range queue.All(context.Background(), "") {
		if err != nil {
			s.t.Errorf("dead letters of %s: %v", topic, err)
			break
		}
		if dead.Group != group {
			continue
		}
		letters = append(letters, rules.Letter{
			ID: dead.ID, EntryID: dead.EntryID, UUID: rules.UUIDOf(dead), Consumer: dead.Consumer, Reason: dead.Reason,
			Deliveries: dead.Deliveries, At: dead.DiedAt.Sub(s.journal.began), // not by its ID: the server's clock steps
		})
	}
	return letters
}

// A watcher regularly looks at Redis, and logs what is stored and who has which entry.
type watcher struct {
	*simulation
	last    map[string]string            // by topic: the ID up to which it was looked at
	seen    map[string]map[string]string // by topic, by ID: all UUIDs that were ever there
	pending map[string]map[string]rules.Pending
}

// watchEvery is how often the watcher looks.
const watchEvery = 400 * time.Millisecond

func (s *simulation) newWatcher() *watcher {
	w := &watcher{
		simulation: s, last: make(map[string]string), seen: make(map[string]map[string]string),
		pending: make(map[string]map[string]rules.Pending),
	}
	for _, topic := range s.schedule.Topics {
		w.last[topic], w.seen[topic] = "-", make(map[string]string)
	}
	return w
}

func (w *watcher) run() {
	for !isClosed(w.settled) {
		time.Sleep(watchEvery)
		w.look()
	}
}

func (w *watcher) look() {
	anew := w.lossy.Swap(false)
	for _, topic := range w.schedule.Topics {
		if anew {
			w.last[topic] = "-"
		}
		for _, e := range w.entries(topic, w.last[topic]) {
			w.last[topic] = e.ID
			if _, ok := w.seen[topic][e.ID]; !ok {
				w.seen[topic][e.ID] = e.UUID
				w.journal.add(everyGroup, rules.Event{Kind: rules.Stored, Topic: topic, ID: e.ID, UUID: e.UUID})
			}
		}
		for i, g := range w.schedule.Groups {
			if g.leased() {
				w.holders(topic, i)
			}
		}
	}
}

// holders logs which consumer has which entry.
func (w *watcher) holders(topic string, group int) {
	key := topic + "/" + w.schedule.Groups[group].Name
	before, now := w.pending[key], make(map[string]rules.Pending)
	for _, p := range w.simulation.pending(topic, w.schedule.Groups[group].Name) {
		now[p.ID] = p
		process, life := parsePrefix(p.Consumer)
		if before[p.ID] != p && process != "" && !w.hasBegun(group, topic, p) {
			w.journal.add(group, rules.Event{
				Kind: rules.Delivered, Process: process, Life: life, Topic: topic, ID: p.ID, UUID: w.seen[topic][p.ID], Count: p.Count,
			})
		}
	}
	w.pending[key] = now
}
