package sim

import "testing"

// What seeds have found, shrunk. A change of what a seed draws (schedule.go) makes other
// schedules of these seeds: then find them again, in the library of before.
var regressions = []struct {
	fault   string
	seed    uint64
	without Without
}{
	{"a snoozed message died of other messages' crashes", 11, Without{Faults: "1-15", Calls: "1-113,115-247", Delays: "1-543"}},
	{"XGROUP DELCONSUMER lost what waited for its retry", 3011, Without{Faults: "1-2,4-10", Calls: "1-50,52,54-218", Consumers: "1", Producers: "1"}},
	{"a stream began anew while its group was made", 2589, Without{Faults: "5,12,19,22", Calls: "1-7,10,12-18,25-30,34-36,41-42,49-96", Consumers: "2"}},
	{"a consumer that was away put back what others had settled, after a clock step", 7856, Without{Faults: "1-10,12,14-17", Calls: "1-133,135-201", Consumers: "1"}},
	{"a consumer that was away put back what others had settled", 6036, Without{Faults: "1-5", Calls: "1-165,167-178,181-233", Consumers: "3"}},
	{"a fan-out that once lacked permission never reported its position again", 5039, Without{Faults: "1,3-7", Calls: "1-181,183-244", Consumers: "1-4", Producers: "1,3", Delays: "1-174"}},
	{"a lease expired while its read was blocked", 3379, Without{}},
	{"a move had no answer, its consumer was removed, and the process closed", 209539, Without{}},
	{"a consumer trimmed before it had recreated its group in a server without data", 50109, Without{Faults: "1-7,10-29", Calls: "1-23,25-41"}},
	{"a release met several broken connections", 21340, Without{}},
	{"a move had no answer, its consumer was removed, and the dead-letter stream refused it for longer than a lease", 204920, Without{Faults: "1-9,11-12,14-25,27", Calls: "1-43,45-51"}},
}

func TestRegressions(t *testing.T) {
	for _, r := range regressions {
		t.Run(r.fault, func(t *testing.T) {
			t.Parallel()
			for _, v := range runWatched(t, r.without.Apply(Draw(r.seed)), Options{}).Violations {
				t.Error(v)
			}
		})
	}
}
