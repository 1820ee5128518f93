package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestConsumers(t *testing.T) {
	var out bytes.Buffer
	require.NoError(t, command([]string{"consumers", "-addr", testTarget.addr, "-consumers", "5", "-clients", "2", "-churn", "300", "-rate", "100", "-pending", "0,50", "-time", "500ms", "-settle", "100ms"}, &out))
	for _, want := range []string{"0 pending: 5 consumers join at once", "0 pending: 5 consumers, ", "50 pending: 5 consumers join at once", "50 pending: 5 consumers, ", "| xreadgroup |", `xinfo\|groups`, "| server's CPU, all |", "p99"} {
		assert.Contains(t, out.String(), want)
	}
	assert.NotContains(t, out.String(), ", 0 left")
	require.ErrorContains(t, command([]string{"consumers", "-pending", "many"}, &out), "-pending")
}

func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("starts three servers")
	}
	var out bytes.Buffer
	require.NoError(t, command([]string{"cluster", "-messages", "300", "-rounds", "1"}, &out))
	assert.Regexp(t, `\| 3 \| [\d,]+ \| [\d.]+ \| [\d.,]+ % \| `, out.String())
}
