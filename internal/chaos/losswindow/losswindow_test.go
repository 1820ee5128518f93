package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestLoss(t *testing.T) {
	killed := time.Now()
	p := &producer{refused: 2, acknowledged: map[string]time.Time{
		"there": killed.Add(-3 * time.Second), "old": killed.Add(-2 * time.Second), "new": killed.Add(-time.Second),
	}}
	l := p.loss(map[string]bool{"there": true}, killed)
	require.Equal(t, loss{acknowledged: 3, refused: 2, lost: 2, window: 2 * time.Second, lasting: time.Second}, l)
	require.Equal(t, "| x | 2 | 3 | 2 | 2, 2 | 2000, 2000 | 1000, 1000 |", row("x", []loss{{}, l}))
}

// These are certain: without persistence everything is lost, with appendfsync always nothing.
func TestSingle(t *testing.T) {
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("GOXSTREAMS_TEST_REAL") == "1" {
			t.Fatalf("GOXSTREAMS_TEST_REAL=1, and there is no server: %v", err)
		}
		t.Skipf("not tested, it needs a real server: %v", err)
	}
	for _, c := range cases {
		switch {
		case strings.Contains(c.name, "always"):
			losses, err := c.measure(t.Context(), 1)
			require.NoError(t, err)
			require.NotZero(t, losses[0].acknowledged)
			require.Zero(t, losses[0].lost)
		case strings.Contains(c.name, "no persistence"):
			losses, err := c.measure(t.Context(), 1)
			require.NoError(t, err)
			require.NotZero(t, losses[0].acknowledged)
			require.NotZero(t, losses[0].lost)
		}
	}
}
