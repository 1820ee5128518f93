package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMutants(t *testing.T) {
	root := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(root, "p"), 0o755))
	source := `package p

const limit = 3

func f(a, b int) (n int) {
	if a < b && b > 0 {
		n++
		println(a)
		c.cfg.Log.Info("a < 0", a+1)
	}
	return n + limit
}
`
	require.NoError(t, os.WriteFile(filepath.Join(root, "p", "p.go"), []byte(source), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(root, "p", "p_test.go"), []byte(source), 0o644))
	all, err := mutants(root, "p")
	require.NoError(t, err)
	var got []string
	for _, m := range all {
		got = append(got, m.String()+" -> "+source[:m.from][len(source[:m.from])-2:]+m.with)
	}
	require.Equal(t, []string{
		"p/p.go:6: not -> f !(a < b && b > 0)",
		"p/p.go:6: || for && -> b ||",
		"p/p.go:6: <= for < -> a <=",
		"p/p.go:6: >= for > -> b >=",
		"p/p.go:6: 1 for 0 -> > 1",
		"p/p.go:7: left out: n++ -> \t\t",
		"p/p.go:8: left out: println(a) -> \t\t",
		"p/p.go:11: - for + -> n -",
	}, got)
}
