package sim

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLists(t *testing.T) {
	for _, list := range []string{"", "1", "1-3", "1-3,5,7-8"} {
		require.Equal(t, list, formatList(parseList(list)))
	}
}

// Two faults and a call are needed; everything else is left out.
func TestShrink(t *testing.T) {
	s := &Schedule{Groups: []Group{{}}}
	for n := 1; n <= 50; n++ {
		s.Faults = append(s.Faults, Fault{Number: n})
		s.Calls = append(s.Calls, Call{Number: n})
	}
	s.Consumers = []Consumer{{Number: 1, Groups: []int{0}}, {Number: 2, Groups: []int{0}}}
	out := Shrink(s, 1000, func(s *Schedule) bool {
		has := func(n int) bool { return slices.ContainsFunc(s.Faults, func(f Fault) bool { return f.Number == n }) }
		return has(7) && has(31) && slices.ContainsFunc(s.Calls, func(c Call) bool { return c.Number == 20 })
	})
	require.Equal(t, Without{Faults: "1-6,8-30,32-50", Calls: "1-19,21-50", Consumers: "1"}, out)
	require.Equal(t, `Without{Faults: "1-6,8-30,32-50", Calls: "1-19,21-50", Consumers: "1"}`, out.GoString())
	less := out.Apply(s)
	require.Len(t, less.Faults, 2)
	require.Len(t, less.Consumers, 1, "each group is served")
	require.Len(t, s.Faults, 50, "the schedule is not changed")
}
