package goxstreams_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestDocs_Imports: each package imports what stands below it in ARCHITECTURE's tree, and
// what it is not to know it does not.
func TestDocs_Imports(t *testing.T) {
	const (
		module    = "github.com/goxstreams/watermill-goxstreams/internal/"
		goRedis   = "github.com/redis/go-redis"
		watermill = "github.com/ThreeDotsLabs/watermill"
		message   = watermill + "/message"
	)
	below := map[string][]string{
		".":        {"consume", "xstream", "pipeline", "redisx"},
		"consume":  {"takeover", "lease", "poll", "ledger", "xstream", "pipeline", "redisx"},
		"takeover": {"lease", "ledger", "xstream", "redisx"},
		"lease":    {"ledger", "xstream", "redisx"},
		"poll":     {"xstream", "pipeline", "redisx"},
		"xstream":  {"pipeline", "redisx"},
		"pipeline": {"redisx"},
		"redisx":   nil,
		"ledger":   nil,
	}
	unknown := map[string][]string{
		"consume": {message, goRedis}, "takeover": {message, goRedis}, "lease": {message, goRedis}, "poll": {watermill, goRedis},
		"xstream": {watermill}, "pipeline": {watermill}, "redisx": {watermill}, "ledger": {watermill, goRedis, "net"},
	}
	for dir, allowed := range below {
		path := dir
		if dir != "." {
			path = filepath.Join("internal", dir)
		}
		files, err := filepath.Glob(filepath.Join(path, "*.go"))
		require.NoError(t, err)
		require.NotEmpty(t, files)
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
			require.NoError(t, err)
			for _, spec := range parsed.Imports {
				imported, err := strconv.Unquote(spec.Path.Value)
				require.NoError(t, err)
				if layer, ours := strings.CutPrefix(imported, module); ours {
					require.Contains(t, allowed, layer, "%s imports what does not stand below it", file)
				}
				for _, foreign := range unknown[dir] {
					require.False(t, imported == foreign || strings.HasPrefix(imported, foreign+"/"), "%s imports %s", file, imported)
				}
			}
		}
	}
}

// TestDocs_LogLines: docs/operations.md explains every line that the library
// logs, and no other.
func TestDocs_LogLines(t *testing.T) {
	docs, err := os.ReadFile("docs/operations.md")
	require.NoError(t, err)
	_, explained, found := strings.Cut(string(docs), "## Log lines")
	require.True(t, found)
	rows := map[string]bool{} // whether the code has it
	for line := range strings.Lines(explained) {
		if first, _, ok := strings.Cut(strings.TrimPrefix(line, "| "), " |"); ok && first != "error" && first != "info" && !strings.HasPrefix(line, "|-") {
			rows[first] = false
		}
	}
	lines := 0
	for _, file := range libraryFiles(t) {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		ast.Inspect(parsed, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || !logs(call.Fun) {
				return true
			}
			lines++
			text := strings.TrimSpace(constantText(call.Args[0]))
			require.NotEmpty(t, text, "%s logs what is not written there", file)
			text = strings.TrimPrefix(text, "The  ") // the middleware's name is between
			text = strings.TrimSuffix(text, ":")     // the error's text follows
			_, ok = rows[text]
			require.True(t, ok, "%s: %q is not explained", file, text)
			rows[text] = true
			return true
		})
	}
	require.Greater(t, lines, 30)
	for text, used := range rows {
		require.True(t, used, "nothing logs %q", text)
	}
}

// logs reports whether it is a logger's Error or Info.
func logs(f ast.Expr) bool {
	selector, ok := f.(*ast.SelectorExpr)
	if !ok || selector.Sel.Name != "Error" && selector.Sel.Name != "Info" {
		return false
	}
	switch of := selector.X.(type) {
	case *ast.SelectorExpr:
		return of.Sel.Name == "log" || of.Sel.Name == "logger" || of.Sel.Name == "Log"
	case *ast.Ident:
		return of.Name == "log" || of.Name == "logger"
	}
	return false
}

// constantText is what is constant in a sum of strings.
func constantText(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, _ := strconv.Unquote(e.Value)
		return text
	case *ast.BinaryExpr:
		return constantText(e.X) + constantText(e.Y)
	}
	return ""
}

// TestDocs_Faults: CONTRIBUTING.md says where each fault's test is, and there is one of
// each.
func TestDocs_Faults(t *testing.T) {
	text, err := os.ReadFile("CONTRIBUTING.md")
	require.NoError(t, err)
	files, err := filepath.Glob("*_test.go")
	require.NoError(t, err)
	name := regexp.MustCompile(`(?m)^func TestFault(\d+)_`)
	all := make(map[int]bool)
	for _, file := range files {
		source, err := os.ReadFile(file)
		require.NoError(t, err)
		var faults []int
		for _, match := range name.FindAllStringSubmatch(string(source), -1) {
			n, _ := strconv.Atoi(match[1])
			all[n] = true
			faults = append(faults, n)
		}
		if len(faults) == 0 {
			continue
		}
		slices.Sort(faults)
		row := fmt.Sprint("| ", file, " | ", strings.ReplaceAll(strings.Trim(fmt.Sprint(slices.Compact(faults)), "[]"), " ", ", "), " |\n")
		require.Contains(t, string(text), row)
	}
	for n := 1; n <= 64; n++ {
		require.True(t, all[n], "fault %d has no test", n)
	}
}

// TestDocs_Copies: what the plugins have a copy of each, so as not to import what is internal
// to the library, is the same in both. The library's own module does not hold them.
func TestDocs_Copies(t *testing.T) {
	if _, err := os.Stat("plugin"); os.IsNotExist(err) {
		t.Skip("not in the repository")
	}
	prom, err := os.ReadFile("plugin/goxprom/internal/statswatch/statswatch.go")
	require.NoError(t, err)
	otel, err := os.ReadFile("plugin/goxotel/internal/statswatch/statswatch.go")
	require.NoError(t, err)
	require.Equal(t, string(prom), string(otel))
}
