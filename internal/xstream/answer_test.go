package xstream

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// Whatever a server sends as a table, it is one, and what is missing in it is nil.
func TestTable(t *testing.T) {
	want := map[string]any{"name": "g", "lag": int64(3)}
	require.Equal(t, want, table([]any{"name", "g", "lag", int64(3)}))
	require.Equal(t, want, table(map[any]any{"name": "g", "lag": int64(3)}))
	for _, hostile := range []any{nil, "text", int64(1), []any{"name"}, []any{[]any{}, "g", "name", "g"}, map[any]any{1.5: "g"}} {
		require.Nil(t, table(hostile)["name"], "%v", hostile)
	}
}
