package main

import (
	"fmt"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestTrim(t *testing.T) {
	testserver.RequireReal(t)
	client, topic := testserver.Client(t), topic(t)
	ids := pend(t, client, topic, "c1", 10) // of group g
	require.NoError(t, client.XAck(t.Context(), topic, "g", ids[:6]...).Err())

	_, notes := ran(t, exitUsage, "trim", topic)
	assert.Contains(t, notes, "what is to be kept?")
	_, notes = ran(t, exitUsage, "trim", topic, "--keep-for", "soon")
	assert.Contains(t, notes, "--keep-for")
	_, notes = ran(t, exitUsage, "trim", topic, "--keep-last", "5", "--hard-max-len", "4")
	assert.Contains(t, notes, "less than --keep-last (5)")

	_, notes = ran(t, 0, "trim", topic, "--keep-last", "2", "--dry-run")
	assert.Contains(t, notes, "6 entries would be trimmed, 4 entries left.")
	assert.Contains(t, notes, fmt.Sprintf("The rest is kept for g, whose oldest entry %s is 0s old, with c1.", ids[6]))
	assert.Contains(t, notes, "Nothing is done.")
	assert.EqualValues(t, 10, client.XLen(t.Context(), topic).Val())

	c := onTest(t)
	c.in = "n\n"
	assert.Equal(t, exitFailed, c.run("trim", topic, "--keep-last", "2"))
	assert.Contains(t, c.err.String(), fmt.Sprintf("Trim 6 entries of %q? [y/N]", topic))
	assert.EqualValues(t, 10, client.XLen(t.Context(), topic).Val())

	out, _ := ran(t, 0, "trim", topic, "--keep-last", "2", "--yes", "--json")
	row := lines(t, out)[0]
	assert.Equal(t, "trimmed", row["result"])
	assert.EqualValues(t, 6, row["trimmed"])
	assert.EqualValues(t, 4, row["length"])
	assert.Equal(t, "g", row["pinned_by"].(map[string]any)["group"])

	_, notes = ran(t, 0, "trim", topic, "--hard-max-len", "3", "--yes")
	assert.Contains(t, notes, "Of these not acked: 1 of g.")
	_, notes = ran(t, 0, "trim", topic, "--keep-last", "1", "--ignore-group", "g", "--yes")
	assert.Contains(t, notes, "2 entries trimmed, 1 entry left.")
	assert.Equal(t, []redis.XMessage{{ID: ids[9], Values: client.XRange(t.Context(), topic, "-", "+").Val()[0].Values}}, client.XRange(t.Context(), topic, "-", "+").Val())

	// A group that has vanished keeps the rest for a minute.
	pend(t, client, topic, "c1", 3)
	ran(t, 0, "trim", topic, "--keep-last", "1", "--yes")
	require.NoError(t, client.XGroupDestroy(t.Context(), topic, "g").Err())
	for range 2 {
		_, notes = ran(t, 0, "trim", topic, "--keep-last", "1", "--dry-run")
		assert.Regexp(t, `The rest is kept until \d{4}-\S+Z, since the group g has vanished and may be recreated\.`, notes)
	}
	out, _ = ran(t, 0, "trim", topic, "--keep-last", "1", "--yes", "--json")
	row = lines(t, out)[0]
	assert.EqualValues(t, 0, row["trimmed"])
	assert.Equal(t, "g", row["held_by"].(map[string]any)["group"])
	assert.NotEmpty(t, row["held_by"].(map[string]any)["until"])
}
