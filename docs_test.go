package goxstreams_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestDocs_Imports: each package imports only packages below it in ARCHITECTURE's
// tree, and not those that it must not know.
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

// TestDocs_LogLines: docs/operations.md explains every line that the library logs,
// and no others.
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

// constantText returns the constant parts of a sum of strings.
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

// TestDocs_Faults: CONTRIBUTING.md lists the test file of each fault, and each
// fault has a test.
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

// TestDocs_Copies: the plugins' copies of a package, made so that they do not
// import the library's internals, are equal. The library's own module does not
// contain the plugins.
func TestDocs_Copies(t *testing.T) {
	if _, err := os.Stat("plugin"); os.IsNotExist(err) {
		t.Skip("not in the repository")
	}
	for _, file := range []string{"statswatch.go", "metrics.go"} {
		prom, err := os.ReadFile("plugin/goxprom/internal/statswatch/" + file)
		require.NoError(t, err)
		otel, err := os.ReadFile("plugin/goxotel/internal/statswatch/" + file)
		require.NoError(t, err)
		require.Equal(t, string(prom), string(otel), file)
	}
}

// markdown returns the paths of all Markdown files of the repository.
func markdown(t *testing.T) []string {
	t.Helper()
	var files []string
	require.NoError(t, filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if entry != nil && entry.IsDir() && entry.Name() == ".git" {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".md") {
			files = append(files, filepath.ToSlash(path))
		}
		return err
	}))
	require.Contains(t, files, "docs/README.md")
	return files
}

// readText returns a file's text.
func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(text)
}

// prose returns a Markdown text without code blocks and code spans.
func prose(text string) string {
	text = regexp.MustCompile("(?ms)^ *```.*?^ *```").ReplaceAllString(text, "")
	text = regexp.MustCompile(`(?m)^\n(    .*\n)+`).ReplaceAllString(text, "\n") // not a list's second line
	return regexp.MustCompile("`[^`\n]*`").ReplaceAllString(text, "")
}

// anchors returns the anchors that GitHub gives to the headings of a Markdown text.
func anchors(text string) map[string]bool {
	text = regexp.MustCompile("(?ms)^ *```.*?^ *```").ReplaceAllString(text, "")
	link := regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
	dropped := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	all := make(map[string]bool)
	for _, heading := range regexp.MustCompile(`(?m)^#+ +(.*?) *$`).FindAllStringSubmatch(text, -1) {
		name := strings.ToLower(link.ReplaceAllString(heading[1], "$1"))
		name = strings.ReplaceAll(dropped.ReplaceAllString(name, ""), " ", "-")
		unique := name
		for n := 1; all[unique]; n++ {
			unique = fmt.Sprint(name, "-", n)
		}
		all[unique] = true
	}
	return all
}

// checkLink fails the test if a link in a file leads nowhere.
func checkLink(t *testing.T, file, link string) {
	t.Helper()
	path, anchor, _ := strings.Cut(link, "#")
	target := file
	if path != "" {
		target = filepath.Join(filepath.Dir(file), path)
		_, err := os.Stat(target)
		assert.NoError(t, err, "%s: the link %s leads nowhere", file, link)
		if err != nil {
			return
		}
	}
	assert.False(t, strings.HasPrefix(filepath.ToSlash(target), "../"), "%s: the link %s leaves the repository", file, link)
	if anchor != "" && strings.HasSuffix(target, ".md") {
		assert.True(t, anchors(readText(t, target))[anchor], "%s: %s has no anchor #%s", file, target, anchor)
	}
}

// TestDocs_Links: every relative link of a Markdown file leads to a file, a directory
// or a heading.
func TestDocs_Links(t *testing.T) {
	link := regexp.MustCompile(`\]\(\s*([^)\s]+)\s*\)`)
	links := 0
	for _, file := range markdown(t) {
		for _, match := range link.FindAllStringSubmatch(prose(readText(t, file)), -1) {
			if strings.Contains(match[1], "://") || strings.HasPrefix(match[1], "mailto:") {
				continue
			}
			links++
			checkLink(t, file, match[1])
		}
	}
	require.Greater(t, links, 150)
}

// TestDocs_Mentions: the pages and anchors named in comments of the code exist,
// relative to the file's directory or to the root.
func TestDocs_Mentions(t *testing.T) {
	mention := regexp.MustCompile(`[\w./-]+\.md(#[\w-]+)?`)
	mentions := 0
	require.NoError(t, filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || filepath.Ext(path) != ".go" && entry.Name() != "Makefile" && filepath.Ext(path) != ".yaml" {
			return err
		}
		for line := range strings.Lines(readText(t, path)) {
			_, comment, ok := strings.Cut(line, "// ")
			if filepath.Ext(path) != ".go" {
				_, comment, ok = strings.Cut(line, "# ")
			}
			if !ok {
				continue
			}
			for _, link := range mention.FindAllString(comment, -1) {
				mentions++
				page, _, _ := strings.Cut(link, "#")
				from := path
				if _, err := os.Stat(filepath.Join(filepath.Dir(path), page)); err != nil {
					from = "."
				}
				checkLink(t, from, link)
			}
		}
		return nil
	}))
	require.Greater(t, mentions, 10)
}

// TestDocs_Pages: README stays short, the index of docs lists every page, and long
// pages begin with a table of contents.
func TestDocs_Pages(t *testing.T) {
	require.Less(t, len(readText(t, "README.md")), 15_000, "README.md: move something to docs")
	index := readText(t, "docs/README.md")
	for _, file := range markdown(t) {
		name, ok := strings.CutPrefix(file, "docs/")
		if !ok || name == "README.md" {
			continue
		}
		assert.Contains(t, index, "]("+name+")", "docs/README.md does not name the page")
		text := readText(t, file)
		if strings.Count(text, "\n") <= 60 || strings.Count(text, "\n## ") < 3 {
			continue
		}
		top, _, _ := strings.Cut(text, "\n## ")
		for anchor := range anchors(regexp.MustCompile("(?m)^###+ .*$|^# .*$").ReplaceAllString(text, "")) {
			assert.Contains(t, top, "](#"+anchor+")", "%s: its table of contents lacks a section", file)
		}
	}
}

// TestDocs_GoBlocks: each Go block in a Markdown file is a contiguous part of the
// source that the comment above it names, `<!-- from: FILE NAME -->`: a file, or a
// function, a type or a Type.Method in it. So it compiles. White space is ignored.
func TestDocs_GoBlocks(t *testing.T) {
	block := regexp.MustCompile("(?ms)^([^\n]*)\n```go\n(.*?)^```")
	source := regexp.MustCompile(`^<!-- from: (\S+)(?: (\S+))? -->$`)
	words := func(text string) string { return " " + strings.Join(strings.Fields(text), " ") + " " }
	blocks := 0
	for _, file := range markdown(t) {
		text := readText(t, file)
		found := block.FindAllStringSubmatch(text, -1)
		assert.Equal(t, strings.Count(text, "```go"), len(found), "%s: a block of Go that begins in another way", file)
		for _, match := range found {
			blocks++
			from := source.FindStringSubmatch(match[1])
			if assert.NotNil(t, from, "%s: no comment says where this is from:\n%s", file, match[2]) {
				assert.Contains(t, words(sourceOf(t, from[1], from[2])), words(match[2]), "%s: the block differs from %s %s", file, from[1], from[2])
			}
		}
	}
	require.Greater(t, blocks, 25)
}

// sourceOf returns the text of a Go file, or of one declaration in it with its comment.
func sourceOf(t *testing.T, file, name string) string {
	t.Helper()
	text := readText(t, file)
	if name == "" {
		return text
	}
	set := token.NewFileSet()
	parsed, err := parser.ParseFile(set, file, text, parser.ParseComments|parser.SkipObjectResolution)
	require.NoError(t, err)
	for _, declaration := range parsed.Decls {
		start := declaration.Pos()
		var named string
		switch d := declaration.(type) {
		case *ast.FuncDecl:
			named = d.Name.Name
			if d.Recv != nil {
				named = receiver(d.Recv.List[0].Type) + "." + named
			}
			if d.Doc != nil {
				start = d.Doc.Pos()
			}
		case *ast.GenDecl:
			if spec, ok := d.Specs[0].(*ast.TypeSpec); ok {
				named = spec.Name.Name
			}
			if d.Doc != nil {
				start = d.Doc.Pos()
			}
		}
		if named == name {
			return text[set.Position(start).Offset:set.Position(declaration.End()).Offset]
		}
	}
	require.Fail(t, "not found", "%s has no %s", file, name)
	return ""
}

// receiver returns the name of a receiver's type.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}
