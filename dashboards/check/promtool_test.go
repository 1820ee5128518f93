package main

import (
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
)

// promtool runs Prometheus's promtool, which Debian's package prometheus has. Without it
// the test is skipped, and fails where GOXSTREAMS_TEST_REAL is set, as CI does.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil && os.Getenv("GOXSTREAMS_TEST_REAL") == "" {
		t.Skip("no promtool: install Debian's package prometheus")
	}
	require.NoError(t, err, "install Debian's package prometheus")
	output, err := exec.Command(path, args...).CombinedOutput()
	require.NoError(t, err, "promtool %v\n%s", args, output)
}
