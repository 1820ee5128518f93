package model_test

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/model"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

var (
	sequences = flag.Int("sequences", 200, "how many random sequences of commands run on the model and on a real server")
	firstSeed = flag.Uint64("seed", 1, "the first one's seed")
)

const commandsEach = 60

// TestDifferential runs random commands on the model and on a real server, and
// compares the answers.
func TestDifferential(t *testing.T) {
	testserver.RequireReal(t)
	addr := testserver.Addr(t)
	version, config := realVersion(t, addr)
	t.Logf("the model is Redis or Valkey %s", version)
	failed := 0
	for i := range uint64(*sequences) {
		seed := *firstSeed + i
		steps := random{rand.New(rand.NewPCG(seed, 0))}.sequence(commandsEach, version)
		d := &duel{t: t, addr: addr, config: config}
		diff := d.difference(steps)
		if diff == "" {
			continue
		}
		steps = shrink(steps, func(steps []step) bool {
			fewer := d.difference(steps)
			if fewer != "" {
				diff = fewer
			}
			return fewer != ""
		})
		var b strings.Builder
		for _, s := range steps {
			fmt.Fprintln(&b, "  ", s)
		}
		t.Errorf("seed %d differs after\n%s%s", seed, &b, diff)
		if failed++; failed == 5 {
			break
		}
	}
}

func realVersion(t *testing.T, addr string) (string, model.Config) {
	c := dialRaw(t, addr)
	defer c.conn.Close()
	info, _ := c.do("info", "server").(bulk)
	for text, v := range map[string]struct {
		name    string
		version model.Version
	}{
		"\nredis_version:7.0.":  {"7.0", model.Redis70},
		"\nredis_version:8.6.":  {"8.6", model.Redis86},
		"\nvalkey_version:9.1.": {"9.1", model.Valkey91},
	} {
		if strings.Contains(string(info), text) {
			return v.name, model.Config{Version: v.version}
		}
	}
	t.Skip("no version of the model is this server's")
	return "", model.Config{}
}

// shrink leaves out steps for as long as the rest still fails.
func shrink(steps []step, fails func([]step) bool) []step {
	for size := len(steps) / 2; size > 0; size /= 2 {
		for i := 0; i+size <= len(steps); {
			if fewer := slices.Delete(slices.Clone(steps), i, i+size); fails(fewer) {
				steps = fewer
			} else {
				i += size
			}
		}
	}
	return steps
}

// duel is the model and a real server, with the same commands.
type duel struct {
	admin  *redis.Client // of the real server; nil until it is needed
	t      *testing.T
	addr   string
	config model.Config
	runs   int
}

// side is two connections to one of them.
type side struct {
	main, other *rawClient
	otherID     string
	made        []string // IDs that the server made, in the order in which they were seen
}

func (d *duel) sides() (m, r *side) {
	s := model.New(d.config)
	connect := func() *rawClient {
		ours, theirs := net.Pipe()
		s.Serve(theirs)
		return newRawClient(d.t, ours)
	}
	m = &side{main: connect(), other: connect()}
	r = &side{main: dialRaw(d.t, d.addr), other: dialRaw(d.t, d.addr)}
	for _, s := range []*side{m, r} {
		s.otherID = fmt.Sprint(s.other.do("client", "id"))
	}
	return m, r
}

// difference runs the steps on both and returns the first difference, or "".
func (d *duel) difference(steps []step) string {
	d.runs++
	name := fmt.Sprintf("model:%d:%d:", time.Now().UnixNano(), d.runs)
	m, r := d.sides()
	defer func() {
		r.main.do("discard")
		for _, key := range []string{"a", "b", "dead", "none", "hash", "scores"} {
			r.main.do("del", name+key)
		}
		for _, key := range []string{name + "a", name + "b"} {
			for _, beside := range []string{"fanout", "due", "delayed", "recurring", "retention"} {
				r.main.do("del", xstream.Beside(key, beside))
			}
		}
		for _, s := range []*side{m, r} {
			_ = s.main.conn.Close()
			_ = s.other.conn.Close()
		}
	}()
	blocked := false
	for i, st := range steps {
		if st.other && blocked {
			continue
		}
		if slices.ContainsFunc(st.args, func(arg string) bool { return strings.Contains(arg, "*") }) {
			awaitMillisecond()
		}
		if st.other {
			m.other.send(m.actual(st.args, name)...)
			r.other.send(r.actual(st.args, name)...)
			d.awaitRead(r)
			blocked = true
		} else {
			got, want := m.main.do(m.actual(st.args, name)...), r.main.do(r.actual(st.args, name)...)
			if diff := compare(st.args, m.symbolic(got), r.symbolic(want)); diff != "" {
				return fmt.Sprintf("step %d: %s:\n%s", i, st, diff)
			}
		}
		if blocked {
			got, want, diff := d.blocked(m, r, false)
			if diff == "" && got != nil {
				blocked = false
				diff = compare([]string{"blocked"}, m.symbolic(got), r.symbolic(want))
			}
			if diff != "" {
				return fmt.Sprintf("step %d: %s: the blocked read:\n%s", i, st, diff)
			}
		}
	}
	if blocked {
		for _, s := range []*side{m, r} {
			s.main.do("discard")
			s.main.do("client", "unblock", s.otherID)
		}
		if got, want, diff := d.blocked(m, r, true); diff != "" {
			return diff
		} else if diff := compare([]string{"unblocked"}, m.symbolic(got), r.symbolic(want)); diff != "" {
			return diff
		}
	}
	return ""
}

// awaitRead waits until the real server has run the read: what follows on another connection
// must not overtake it.
func (d *duel) awaitRead(r *side) {
	d.t.Helper()
	if d.admin == nil {
		d.admin = testserver.Client(d.t)
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		client, err := d.admin.Do(context.Background(), "client", "list", "id", r.otherID).Text()
		require.NoError(d.t, err)
		if strings.Contains(client, " cmd=xread") {
			return
		}
	}
	d.t.Error("the server has not run the read")
}

// awaitMillisecond has the IDs that the servers make differ from those before, as no
// two streams then have the same one.
func awaitMillisecond() {
	for from := time.Now().UnixMilli(); time.Now().UnixMilli() == from; {
		runtime.Gosched()
	}
}

// blocked returns the answers to the blocked read, if both have come.
func (d *duel) blocked(m, r *side, must bool) (got, want any, diff string) {
	const soon, late = 2 * time.Millisecond, time.Second
	wait := soon
	if must {
		wait = late
	}
	want, answered := r.other.receiveWithin(wait)
	if answered || must {
		got, ok := m.other.receiveWithin(late)
		if !ok {
			return nil, nil, fmt.Sprintf("the model does not answer, Redis: %v", want)
		}
		return got, want, ""
	}
	got, ok := m.other.receiveWithin(soon)
	if !ok {
		return nil, nil, ""
	}
	if want, ok = r.other.receiveWithin(late); !ok {
		return nil, nil, fmt.Sprintf("Redis does not answer, the model: %v", got)
	}
	return got, want, ""
}

// actual returns the arguments as this side needs them.
func (s *side) actual(args []string, name string) []string {
	out := make([]string, len(args))
	for i, a := range args {
		a = strings.ReplaceAll(a, prefix, name)
		if n := 0; len(a) == 2 {
			if _, err := fmt.Sscanf(a, "#%d", &n); err == nil {
				a = "0-1"
				if n < len(s.made) {
					a = s.made[n]
				}
			}
		}
		out[i] = a
	}
	return out
}

var (
	madeID   = regexp.MustCompile(`\b1[0-9]{12}-[0-9]+`)
	deadline = regexp.MustCompile(` 1[0-9]{9}$`)
	clock    = regexp.MustCompile(`^1[0-9]{12}$`)
)

// symbolic replaces IDs and times that the server has made.
func (s *side) symbolic(v any) any {
	text := func(text string) string {
		text = madeID.ReplaceAllStringFunc(text, func(id string) string {
			i := slices.Index(s.made, id)
			if i < 0 {
				i = len(s.made)
				s.made = append(s.made, id)
			}
			return fmt.Sprint("#", i)
		})
		return clock.ReplaceAllString(deadline.ReplaceAllString(text, " DEADLINE"), "CLOCK")
	}
	each := func(values []any) []any {
		out := make([]any, len(values))
		for i, v := range values {
			out[i] = s.symbolic(v)
		}
		return out
	}
	switch v := v.(type) {
	case bulk:
		return bulk(text(string(v)))
	case simple:
		return simple(text(string(v)))
	case failure:
		return failure(text(string(v)))
	case number:
		return number(text(string(v)))
	case list:
		return list(each(v))
	case dict:
		return dict(each(v))
	}
	return v
}

// compare returns how the answers differ. Idle times may do so by what a command takes.
func compare(args []string, got, want any) string {
	name := strings.ToLower(strings.Join(args[:min(2, len(args))], " "))
	if sameShape(name, got, want, "") {
		return ""
	}
	return fmt.Sprintf("  model: %s\n  real:  %s", show(got), show(want))
}

func show(v any) string {
	each := func(open string, values []any, end string) string {
		parts := make([]string, len(values))
		for i, v := range values {
			parts[i] = show(v)
		}
		return open + strings.Join(parts, " ") + end
	}
	switch v := v.(type) {
	case list:
		return each("[", v, "]")
	case dict:
		return each("{", v, "}")
	case bulk:
		return fmt.Sprintf("%q", string(v))
	case failure:
		return "error " + string(v)
	}
	return fmt.Sprint(v)
}

const (
	tolerance = 1500      // of times, in milliseconds
	longTime  = 1_000_000 // a greater number is one: until a delayed message is due
)

func sameShape(name string, got, want any, label string) bool {
	if strings.HasPrefix(name, "hello") && (label == "id" || label == "modules") {
		return true
	}
	if reflect.TypeOf(got) != reflect.TypeOf(want) {
		return false
	}
	switch got := got.(type) {
	case list:
		return sameLists(name, got, want.(list))
	case dict:
		return sameLists(name, got, want.(dict))
	case int64:
		want := want.(int64)
		switch {
		case label == "idle" || label == "inactive" || got > longTime && want > longTime:
			return got-want < tolerance && want-got < tolerance && (got < 0) == (want < 0)
		case strings.HasPrefix(label, "radix-tree-"):
			return true
		}
		return got == want
	}
	return got == want
}

func sameLists(name string, got, want []any) bool {
	if len(got) != len(want) {
		return false
	}
	for i := range got {
		label := ""
		if i > 0 {
			if s, ok := got[i-1].(bulk); ok {
				label = string(s)
			}
		}
		if _, ok := got[i].(int64); ok && i == 2 && len(got) == 4 { // a row of XPENDING
			label = "idle"
		}
		if !sameShape(name, got[i], want[i], label) {
			return false
		}
	}
	return true
}
