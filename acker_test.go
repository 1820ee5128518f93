package goxstreams

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestAcker_LateAck: what an OnBroken acks that outlived CloseTimeout reaches no
// one, and takes nothing of what the Subscriber's other topics may have unacked.
func TestAcker_LateAck(t *testing.T) {
	h := &shared{unacked: quota{all: maxUnconfirmed}}
	a := newAcker(&subscription{shared: h})
	close(a.done) // as run does when CloseTimeout is over
	a.add(&held{id: "1-0"})
	require.EqualValues(t, 1, h.unacked.used.Load())

	assert.Equal(t, 1, a.end(), "acks that did not arrive")
	a.add(&held{id: "2-0"})
	assert.Equal(t, 1, a.backlog())
	assert.Zero(t, h.unacked.used.Load())
}
