package consume

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

func entry(id string) xstream.Entry { return xstream.Entry{ID: id, Fields: []string{"id", id}} }

// A fan-out recognizes a stream that was deleted and recreated, or lost its end, and no
// other change.
func TestPosition_Differs(t *testing.T) {
	empty := xstream.Info{Last: "0-0", First: "0-0"}
	full := xstream.Info{Last: "9-0", First: "2-0", FirstPrint: "two", Added: 5}
	for _, test := range []struct {
		name    string
		start   string // after which it reads
		was     xstream.Info
		read    []string // since then
		now     xstream.Info
		differs bool
	}{
		{"Nothing happened", "0", full, nil, full, false},
		{"Added and trimmed", "0", full, []string{"10-0"}, xstream.Info{Last: "12-0", First: "7-0", FirstPrint: "seven", Added: 8}, false},
		{"Emptied", "0", full, nil, xstream.Info{Last: "9-0", First: "0-0", Added: 5}, false},
		{"Deleted", "0", full, nil, xstream.Info{Last: "0-0", First: "0-0", Added: 0}, true},
		{"Smaller IDs", "0", full, nil, xstream.Info{Last: "5-0", First: "4-0", Added: 5}, true},
		{"The end was lost", "0", full, []string{"10-0"}, xstream.Info{Last: "9-0", First: "2-0", FirstPrint: "two", Added: 5}, true},
		{"The end was lost, and the server does not count", "0", full, []string{"10-0"}, xstream.Info{Last: "9-0", First: "2-0", FirstPrint: "two", Added: -1}, true},
		{"The end was lost, others were added", "0", full, []string{"10-0", "11-0"}, xstream.Info{Last: "12-0", First: "2-0", FirstPrint: "two", Added: 6}, true},
		{"Another first entry", "0", full, nil, xstream.Info{Last: "9-0", First: "2-0", FirstPrint: "other", Added: 5}, true},
		{"EVAL was denied before", "0", xstream.Info{Last: "9-0", First: "2-0", Added: 5}, nil, full, false},
		{"EVAL is denied now", "0", full, nil, xstream.Info{Last: "9-0", First: "2-0", Added: 5}, false},
		{"An earlier first entry", "0", full, nil, xstream.Info{Last: "9-0", First: "1-0", Added: 5}, true},
		{"Fewer entries were added", "0", full, nil, xstream.Info{Last: "9-0", First: "2-0", FirstPrint: "two", Added: 4}, true},
		{"The server does not count", "0", full, nil, xstream.Info{Last: "9-0", First: "2-0", FirstPrint: "two", Added: -1}, false},
		{"It started beyond the end", "100-0", full, nil, xstream.Info{Last: "10-0", First: "2-0", FirstPrint: "two", Added: 6}, false},
		{"Empty, and added to", "0", empty, nil, xstream.Info{Last: "3-0", First: "3-0", Added: 1}, false},
		{"Empty, and read since", "0", empty, []string{"3-0"}, xstream.Info{Last: "3-0", First: "3-0", FirstPrint: "three", Added: 1}, false},
		{"Empty, read since, and recreated", "0", empty, []string{"3-0"}, xstream.Info{Last: "9-0", First: "1-0", Added: 2}, true},
		{"Empty, read since, and its end lost", "0", empty, []string{"3-0", "4-0"}, xstream.Info{Last: "3-0", First: "3-0", Added: 1}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := &position{recent: make(map[string]uint64), info: test.was, last: xstream.Mark{ID: test.start}}
			p.mark = p.last
			for _, id := range test.read {
				p.unseen([]xstream.Entry{entry(id)})
			}
			require.Equal(t, test.differs, p.seenLocked().differs(test.now))
		})
	}
}

// What is read again is delivered once; another entry under the same ID is another message.
// The entries belong to the caller, who may give them to others.
func TestPosition_Unseen(t *testing.T) {
	p := &position{recent: make(map[string]uint64), replay: map[string]uint64{"1-0": entry("1-0").Mark().Print, "3-0": 42}}
	read := []xstream.Entry{entry("1-0"), entry("2-0"), entry("3-0")}
	require.Equal(t, []xstream.Entry{entry("2-0"), entry("3-0")}, p.unseen(read))
	require.Equal(t, []xstream.Entry{entry("1-0"), entry("2-0"), entry("3-0")}, read)
	require.Empty(t, p.unseen(read))
	require.Equal(t, "3-0", p.last.ID)
	require.Equal(t, "1-0", p.first.ID)
}

// What a stream had delivered before it was reread is forgotten as it comes again, however long
// that takes: the reread may come after the fan-out was idle for a while.
func TestPosition_ReplayEnds(t *testing.T) {
	s := newSetup(t, func(c *Config) { c.Group = "" })
	s.add(1)
	require.NoError(t, s.Open()) // not started: nobody else looks
	p := s.mode.(fanOut).position
	p.replay = map[string]uint64{"1-0": entry("1-0").Mark().Print}
	for range 2 {
		p.at = time.Now().Add(-time.Hour)
		p.look(t.Context())
	}
	require.Empty(t, p.unseen([]xstream.Entry{entry("1-0")}))
	require.Empty(t, p.replay)
}

// Entries that were read while a look had its answer under way are not those with which an
// empty stream has begun: it seemed to have been recreated when its first entry was seen.
func TestPosition_ReadDuringALook(t *testing.T) {
	empty := xstream.Info{Last: "0-0", First: "0-0"}
	p := &position{recent: make(map[string]uint64), info: empty, last: xstream.Mark{ID: "0"}}
	p.mark = p.last
	last := p.last
	p.unseen([]xstream.Entry{entry("1-0"), entry("2-0")})
	p.looked(last, empty, "")
	p.unseen([]xstream.Entry{entry("3-0")})
	require.False(t, p.seenLocked().differs(xstream.Info{Last: "3-0", First: "1-0", FirstPrint: "one", Added: 3}))
	p.looked(p.last, xstream.Info{Last: "3-0", First: "1-0", FirstPrint: "one", Added: 3}, "")
	require.Empty(t, p.first)
}
