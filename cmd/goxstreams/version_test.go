package main

import (
	"runtime/debug"
	"testing"

	"github.com/stretchr/testify/require"
)

// That of an installed command is compared by .ci/release.
func TestVersion(t *testing.T) {
	c := &command{}
	require.Zero(t, c.run("--version"))
	require.Equal(t, "goxstreams "+version()+"\n", c.out.String())
	require.Empty(t, c.err.String())
	require.NotEmpty(t, version())

	require.Equal(t, "v1.2.3", versionOf(&debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}))
	require.Equal(t, "(devel)", versionOf(&debug.BuildInfo{}))
}
