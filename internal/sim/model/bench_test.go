package model_test

import (
	"fmt"
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/sim/model"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

func BenchmarkXAdd(b *testing.B) {
	s := model.New(model.Config{Version: model.Redis86})
	ours, theirs := net.Pipe()
	s.Serve(theirs)
	c := newRawClient(b, ours)
	defer ours.Close()
	for b.Loop() {
		c.do("xadd", "s", "maxlen", "~", "1000", "*", "uuid", "x", "payload", "y")
	}
}

// BenchmarkRenew renews ten leases a call.
func BenchmarkRenew(b *testing.B) {
	s := model.New(model.Config{Version: model.Redis86})
	_, err := s.Do("xgroup", "create", "s", "g", "0", "mkstream")
	require.NoError(b, err)
	var ids []string
	for i := range 1000 {
		id := fmt.Sprintf("%d-1", i+1)
		_, err := s.Do("xadd", "s", id, "uuid", "x", "payload", "y")
		require.NoError(b, err)
		if i < 10 {
			ids = append(ids, id)
		}
	}
	_, err = s.Do("xreadgroup", "group", "g", "c", "streams", "s", ">")
	require.NoError(b, err)
	var args []any
	for _, a := range recorded(func(s xstream.Stream) { _, _ = s.Renew(b.Context(), ids) }, xstream.Stream{Key: "s", Group: "g", Consumer: "c"}) {
		args = append(args, a)
	}
	for b.Loop() {
		if _, err := s.Do(args...); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkTake runs the shortest of the library's scripts.
func BenchmarkTake(b *testing.B) {
	s := model.New(model.Config{Version: model.Redis86})
	for _, args := range [][]any{{"xgroup", "create", "s", "g", "0", "mkstream"}, {"xadd", "s", "1-1", "a", "b"}, {"xreadgroup", "group", "g", "c", "streams", "s", ">"}} {
		_, err := s.Do(args...)
		require.NoError(b, err)
	}
	var args []any
	for _, a := range recorded(func(s xstream.Stream) { _, _, _ = s.Take(b.Context(), "1-1", "", 1, 0, 1) }, xstream.Stream{Key: "s", Group: "g", Consumer: "c"}) {
		args = append(args, a)
	}
	for b.Loop() {
		if _, err := s.Do(args...); err != nil {
			b.Fatal(err)
		}
	}
}
