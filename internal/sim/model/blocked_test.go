package model_test

import (
	"strings"
	"testing"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// TestDifferential_Blocked has a read wait while something happens to its stream or its
// group, on the model and on a real server.
func TestDifferential_Blocked(t *testing.T) {
	testserver.RequireReal(t)
	addr := testserver.Addr(t)
	_, config := realVersion(t, addr)
	d := &duel{t: t, addr: addr, config: config}
	for _, read := range []string{
		"xreadgroup group g c block 0 streams A >",
		"xreadgroup group g c block 0 streams B A > >",
		"xreadgroup group g c count 1 noack block 0 streams A >",
		"xread block 0 streams A $",
		"xread block 0 streams A B 5-0 $",
	} {
		for _, events := range []string{
			"del A",
			"pexpire A 0",
			"hset H f v; del A; hset A f v",
			"multi; del A; hset A f v; exec",
			"multi; del A; xadd A 9-9 a b; exec",
			"multi; del A; xgroup create A g 0 mkstream; xadd A 9-9 a b; exec",
			"xgroup destroy A g",
			"multi; xgroup destroy A g; xgroup create A g 0; exec",
			"multi; xgroup destroy A g; xgroup create A g $; exec; xadd A 9-9 a b",
			"xgroup delconsumer A g c; xadd A 9-9 a b",
			"xgroup setid A g 0",
			"xgroup setid A g 0; xadd A 9-9 a b",
			"xgroup setid A g 9-9; xadd A 9-8 a b; xadd A 9-10 a b",
			"multi; xadd A 9-9 a b; xdel A 9-9; exec",
			"multi; xadd A 9-9 a b; xadd B 9-9 a b; xadd A 9-10 a b; exec",
			"multi; xadd A 9-9 a b; xreadgroup group g d streams A >; exec; xadd A 9-10 a b",
			"xadd A maxlen 0 9-9 a b",
			"xadd A 9-9 a b; xadd A 9-10 a b",
			"xadd B 9-9 a b",
			"xtrim A maxlen 0",
		} {
			var steps []step
			add := func(other bool, commands string) {
				for command := range strings.SplitSeq(commands, "; ") {
					args := strings.Fields(command)
					for i, a := range args {
						if key, ok := map[string]string{"A": "a", "B": "b", "H": "hash"}[a]; ok {
							args[i] = prefix + key
						}
					}
					steps = append(steps, step{args: args, other: other})
				}
			}
			add(false, "xadd A 5-5 a b; xgroup create A g $; xgroup create B g $ mkstream")
			add(true, read)
			add(false, events)
			add(false, "xinfo groups A; xinfo consumers A g; xpending A g; xinfo groups B; xinfo consumers B g")
			if diff := d.difference(steps); diff != "" {
				t.Errorf("%s\nwhile %s: %s", events, read, diff)
			}
		}
	}
}
