package main

import (
	"os/exec"
	"testing"
)

// The example fails when something is lost, on whichever server it finds.
func TestShow(t *testing.T) {
	t.Setenv("REDIS_ADDRS", "")
	t.Run("embedded", func(t *testing.T) {
		t.Setenv("PATH", "")
		if err := start(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("own Cluster", func(t *testing.T) {
		if _, err := exec.LookPath("redis-server"); err != nil {
			t.Skip(err)
		}
		if err := start(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
	})
}
