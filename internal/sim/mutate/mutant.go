package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// A mutant is one small change to a file.
type mutant struct {
	file     string // below the repository's root
	line     int
	from, to int // offsets of what is replaced
	with     string
	what     string
}

func (m mutant) String() string { return fmt.Sprintf("%s:%d: %s", m.file, m.line, m.what) }

// mutants returns all mutants of a package's files, except tests.
func mutants(root, dir string) (all []mutant, err error) {
	files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil {
		return nil, err
	}
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		f := &file{name: filepath.Join(dir, filepath.Base(path)), source: source, set: token.NewFileSet()}
		parsed, err := parser.ParseFile(f.set, path, source, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		ast.Inspect(parsed, f.visit)
		all = append(all, f.found...)
	}
	return all, nil
}

type file struct {
	name   string
	source []byte
	set    *token.FileSet
	found  []mutant
}

// Operators and their replacements.
var swapped = map[token.Token]token.Token{
	token.LSS: token.LEQ, token.LEQ: token.LSS, token.GTR: token.GEQ, token.GEQ: token.GTR, token.EQL: token.NEQ, token.NEQ: token.EQL,
	token.LAND: token.LOR, token.LOR: token.LAND, token.ADD: token.SUB, token.SUB: token.ADD,
}

func (f *file) visit(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.GenDecl: // constants are a matter of taste; bounds are mutated where they are used
		return n.Tok != token.IMPORT && n.Tok != token.CONST
	case *ast.BinaryExpr:
		if with, ok := swapped[n.Op]; ok {
			at := f.offset(n.OpPos)
			f.add(n.OpPos, at, at+len(n.Op.String()), with.String(), fmt.Sprintf("%s for %s", with, n.Op))
		}
	case *ast.BasicLit:
		if number, err := strconv.Atoi(n.Value); err == nil && n.Kind == token.INT {
			f.replace(n, strconv.Itoa(number+1), fmt.Sprintf("%d for %d", number+1, number))
		}
	case *ast.IfStmt:
		f.replace(n.Cond, "!("+f.text(n.Cond)+")", "not")
	case *ast.CaseClause:
		for _, e := range n.List {
			if _, name := e.(*ast.Ident); !name { // of a switch without a tag, as most are here
				f.replace(e, "!("+f.text(e)+")", "not")
			}
		}
	case *ast.ExprStmt:
		if f.logs(n) {
			return false
		}
		f.replace(n, "", "left out: "+f.text(n))
	case *ast.IncDecStmt:
		f.replace(n, "", "left out: "+f.text(n))
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE {
			f.replace(n, "", "left out: "+f.text(n))
		}
	}
	return true
}

// logs reports whether the statement only logs: it calls a method of something that is
// named log.
func (f *file) logs(n *ast.ExprStmt) bool {
	call, ok := n.X.(*ast.CallExpr)
	if !ok {
		return false
	}
	method, ok := call.Fun.(*ast.SelectorExpr)
	return ok && (f.text(method.X) == "log" || strings.HasSuffix(strings.ToLower(f.text(method.X)), ".log"))
}

func (f *file) offset(p token.Pos) int { return f.set.Position(p).Offset }

func (f *file) text(n ast.Node) string { return string(f.source[f.offset(n.Pos()):f.offset(n.End())]) }

func (f *file) replace(n ast.Node, with, what string) {
	f.add(n.Pos(), f.offset(n.Pos()), f.offset(n.End()), with, what)
}

func (f *file) add(pos token.Pos, from, to int, with, what string) {
	what, _, _ = strings.Cut(what, "\n")
	f.found = append(f.found, mutant{file: f.name, line: f.set.Position(pos).Line, from: from, to: to, with: with, what: what})
}
