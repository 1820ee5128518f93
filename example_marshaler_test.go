package goxstreams_test

import (
	"errors"
	"fmt"

	"github.com/ThreeDotsLabs/watermill/message"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// eventMarshaler stores a message as other programs expect it: the fields id,
// type and data.
type eventMarshaler struct{}

func (eventMarshaler) Marshal(topic string, msg *message.Message) (map[string]any, error) {
	return map[string]any{
		"id":   msg.UUID,
		"type": msg.Metadata.Get("type"),
		"data": []byte(msg.Payload),
	}, nil
}

func (eventMarshaler) Unmarshal(values map[string]any) (*message.Message, error) {
	data, ok := values["data"].(string)
	if !ok {
		return nil, errors.New("no data")
	}
	id, _ := values["id"].(string) // without one, the message gets the entry's ID
	kind, _ := values["type"].(string)

	msg := message.NewMessage(id, []byte(data))
	msg.Metadata.Set("type", kind)
	return msg, nil
}

// A custom marshaler determines the fields of a stream's entries. One that was written
// for watermill-redisstream (Marshaller, with a double l) works unchanged.
func ExampleMarshaler() {
	var (
		_ = goxstreams.PublisherConfig{Marshaler: eventMarshaler{}}
		_ = goxstreams.SubscriberConfig{Unmarshaler: eventMarshaler{}}
	)

	msg, err := eventMarshaler{}.Unmarshal(map[string]any{"id": "42", "type": "OrderPlaced", "data": `{"total":7}`})
	fmt.Println(msg.UUID, msg.Metadata, string(msg.Payload), err)

	_, err = eventMarshaler{}.Unmarshal(map[string]any{"id": "43"}) // such an entry is broken
	fmt.Println(err)
	// Output:
	// 42 map[type:OrderPlaced] {"total":7} <nil>
	// no data
}

// The wire format of watermill-redisstream.
func ExampleDefaultMarshaler() {
	msg := message.NewMessage("0193-4711", []byte("1 kettle"))
	msg.Metadata.Set("type", "OrderPlaced")
	values, err := goxstreams.DefaultMarshaler{}.Marshal("orders", msg)
	must(err)
	for _, field := range []string{goxstreams.UUIDHeaderKey, "metadata", "payload"} {
		fmt.Printf("%s: %q\n", field, values[field])
	}

	msg, err = goxstreams.DefaultMarshaler{}.Unmarshal(values)
	must(err)
	fmt.Println(msg.UUID, msg.Metadata, string(msg.Payload))
	// Output:
	// _watermill_message_uuid: "0193-4711"
	// metadata: "\x81\xa4type\xabOrderPlaced"
	// payload: "1 kettle"
	// 0193-4711 map[type:OrderPlaced] 1 kettle
}
