package goxstreams_test

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// In goxstreams a batch leaves out what it cannot convert, stores the rest, and
// returns no error: the producer takes the event for stored. Here such an event
// fails the call, the error names it, and nothing is stored.
func TestFault23_ABatchSkipsWhatItCannotConvert(t *testing.T) {
	client, topic := newClient(t), topic(t)
	events := make([]any, 1000)
	for i := range events {
		events[i] = i
	}
	events[637] = make(chan int) // there is no JSON for it
	producer := goxstreams.NewProducer[any](newPublisher(t, client), goxstreams.ProducerConfig{})
	err := producer.ProduceBatch(t.Context(), events, topic)
	require.ErrorContains(t, err, "events[637]")
	require.ErrorContains(t, err, topic)
	var unsupported *json.UnsupportedTypeError
	require.ErrorAs(t, err, &unsupported, "the Codec's own error")
	require.Zero(t, client.Exists(t.Context(), topic).Val(), "something was stored")
	require.NotErrorIs(t, err, goxstreams.ErrOutcomeUnknown)

	err = producer.Produce(t.Context(), events[637], topic)
	require.ErrorContains(t, err, "events[0]")
	require.Zero(t, client.Exists(t.Context(), topic).Val())

	// The same by a Codec, which may refuse an event for what is in it.
	refusing := goxstreams.NewProducer[int](newPublisher(t, client), goxstreams.ProducerConfig{Codec: evenCodec{}})
	err = refusing.ProduceBatch(t.Context(), []int{0, 2, 4, 5}, topic)
	require.ErrorContains(t, err, "events[3]")
	require.ErrorIs(t, err, errOdd)
	require.Zero(t, client.Exists(t.Context(), topic).Val())
	require.NoError(t, refusing.ProduceBatch(t.Context(), []int{0, 2, 4}, topic))
	require.EqualValues(t, 3, client.XLen(t.Context(), topic).Val())
}

var errOdd = errors.New("odd")

type evenCodec struct{}

func (evenCodec) Encode(event any) ([]byte, error) {
	if event.(int)%2 != 0 {
		return nil, errOdd
	}
	return json.Marshal(event)
}

func (evenCodec) Decode(payload []byte, event any) error { return json.Unmarshal(payload, event) }
