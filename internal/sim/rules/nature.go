package rules

import "strings"

// What a message is. Its UUID begins with it and a hyphen ("poison-7"), so that it can be read in every log.
const (
	Plain  = "plain"
	Flaky  = "flaky"  // fails at first, then succeeds
	Slow   = "slow"   // takes so much longer than ClaimMinIdle that others would take it over if its lease were not renewed
	Poison = "poison" // always fails
	Broken = "broken" // no Unmarshaler can read it
	Deadly = "deadly" // ends the process that handles it
)

// Nature returns what the message with this UUID is.
func Nature(uuid string) string {
	nature, _, _ := strings.Cut(uuid, "-")
	return nature
}

// Doomed reports whether the message is to end in the dead-letter stream.
func Doomed(uuid string) bool {
	nature := Nature(uuid)
	return nature == Poison || nature == Broken || nature == Deadly
}
