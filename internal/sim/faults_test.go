package sim

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// The patches that reintroduce old faults (faults/find) apply to the present code.
func TestFaultsApply(t *testing.T) {
	patches, err := filepath.Glob("faults/row*.patch")
	require.NoError(t, err)
	require.NotEmpty(t, patches)
	for _, patch := range patches {
		check := exec.Command("git", "apply", "--check", "internal/sim/"+patch)
		check.Dir = "../.."
		out, err := check.CombinedOutput()
		require.NoError(t, err, "%s: %s", patch, out)
	}
}
