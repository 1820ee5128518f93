package rules

import (
	"strconv"
	"strings"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

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

// KeyOf returns the ordering key of the message with this UUID, of so many; "" for some: they have no order.
func KeyOf(uuid string, keys int) string {
	number, err := strconv.Atoi(uuid[strings.LastIndex(uuid, "-")+1:])
	if err != nil || keys == 0 || number%(keys+1) == keys {
		return ""
	}
	return strconv.Itoa(number % (keys + 1))
}

// A Saboteur is a marshaler of a producer that does not know the format: entries of Broken
// messages are malformed.
type Saboteur struct{ goxstreams.DefaultMarshaler }

// Marshal returns the fields of an entry.
func (s Saboteur) Marshal(topic string, msg *message.Message) (map[string]any, error) {
	fields, err := s.DefaultMarshaler.Marshal(topic, msg)
	if err == nil && Nature(msg.UUID) == Broken {
		fields["metadata"] = "this is no MessagePack"
	}
	return fields, err
}

// UUIDOf returns a dead message's UUID, also of a malformed entry.
func UUIDOf(dead goxstreams.DeadMessage) string {
	if dead.Message != nil {
		return dead.Message.UUID
	}
	for i := 0; i+1 < len(dead.Fields); i += 2 {
		if dead.Fields[i] == goxstreams.UUIDHeaderKey {
			return dead.Fields[i+1]
		}
	}
	return ""
}
