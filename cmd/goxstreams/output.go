package main

import (
	"encoding/csv"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// The formats of --output.
const (
	formatTable = "table" // for reading
	formatJSON  = "json"  // one object per line
	formatCSV   = "csv"   // a header, and the same fields
)

var formats = []string{formatTable, formatJSON, formatCSV}

func (a *app) addOutput(cmd *cobra.Command) {
	flags := cmd.PersistentFlags()
	flags.StringVarP(&a.format, "output", "o", formatTable, "table, json (one object per line) or csv")
	flags.BoolVar(&a.json, "json", false, "short for --output json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
}

// checkOutput makes one format of the flags.
func (a *app) checkOutput(cmd *cobra.Command) error {
	if !slices.Contains(formats, a.format) {
		return usagef("--output: %q is none of %s", a.format, strings.Join(formats, ", "))
	}
	if a.json {
		if a.format != formatJSON && cmd.Flags().Changed("output") {
			return usagef("--json, or --output %s: not both", a.format)
		}
		a.format = formatJSON
	}
	return nil
}

// forScripts reports whether a program is to read the output.
func (a *app) forScripts() bool { return a.format != formatTable }

// listing prints rows in the format of --output.
type listing struct {
	a     *app
	table *table

	csv     *csv.Writer
	columns []string
}

// newListing returns a listing whose CSV has the columns of like, a struct with JSON names, and
// whose table has the titles.
func (a *app) newListing(like any, titles ...any) *listing {
	l := &listing{a: a, table: newTable(a.out, titles...)}
	if a.format == formatCSV {
		l.csv = csv.NewWriter(a.out)
		for _, f := range jsonFields(like) {
			l.columns = append(l.columns, f.name)
		}
		_ = l.csv.Write(l.columns) // its error is Flush's
	}
	return l
}

// row prints one row: for scripts value, a struct with JSON names, else the cells.
func (l *listing) row(value any, cells ...any) error {
	switch l.a.format {
	case formatJSON:
		return l.a.printJSON(value)
	case formatCSV:
		return l.csvRow(value)
	}
	return l.table.row(cells...)
}

// csvRow leaves the columns empty that the value does not have.
func (l *listing) csvRow(value any) error {
	record := make([]string, len(l.columns))
	for _, f := range jsonFields(value) {
		cell, err := csvCell(f.value)
		if err != nil {
			return err
		}
		if i := slices.Index(l.columns, f.name); i >= 0 {
			record[i] = cell
		}
	}
	return l.csv.Write(record)
}

// flush prints the rows that are held: a table those of a page, CSV a few kilobytes.
func (l *listing) flush() error {
	if l.csv != nil {
		l.csv.Flush()
		return l.csv.Error()
	}
	return l.table.Flush()
}

// jsonField is a field of a struct under its name in JSON.
type jsonField struct {
	name  string
	value reflect.Value
}

// jsonFields returns the fields in their order, those of embedded structs among them.
func jsonFields(value any) []jsonField {
	v := reflect.Indirect(reflect.ValueOf(value))
	var fields []jsonField
	for _, f := range reflect.VisibleFields(v.Type()) {
		if !f.Anonymous {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			fields = append(fields, jsonField{name, v.FieldByIndex(f.Index)})
		}
	}
	return fields
}

// csvCell returns text as the table shows it, nothing for what is not known or absent, and lists and
// maps as JSON.
func csvCell(v reflect.Value) (string, error) {
	switch kind := v.Kind(); {
	case kind == reflect.Pointer && v.IsNil(), (kind == reflect.Map || kind == reflect.Slice) && v.Len() == 0:
		return "", nil
	case kind == reflect.Pointer:
		return csvCell(v.Elem())
	case kind == reflect.String:
		return safe(v.String()), nil
	}
	switch value := v.Interface().(type) {
	case count:
		if value == unknown {
			return "", nil
		}
		return value.String(), nil
	case time.Time:
		return value.Format(time.RFC3339Nano), nil
	case bool, int, int64, float64:
		return fmt.Sprint(value), nil
	default:
		line, err := jsonLine(value)
		return string(line), err
	}
}

// printJSON prints v on a line of its own.
func (a *app) printJSON(v any) error {
	line, err := jsonLine(v)
	if err != nil {
		return err
	}
	_, err = a.out.Write(append(line, '\n'))
	return err
}

// table prints columns. It holds its rows until flush.
type table struct {
	*tabwriter.Writer
	titles []any
	rows   int
}

// newTable returns a table that begins with its titles when it has a row.
func newTable(w io.Writer, titles ...any) *table {
	return &table{Writer: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0), titles: titles}
}

// tablePage is how many rows are held at most. Columns may differ in width from page to page.
const tablePage = 500

func (t *table) row(cells ...any) error {
	if t.rows == 0 {
		t.line(t.titles)
	}
	t.line(cells)
	if t.rows++; t.rows%tablePage == 0 {
		return t.Flush()
	}
	return nil
}

func (t *table) line(cells []any) {
	format := strings.Repeat("\t%v", len(cells))[1:] + "\n"
	cells = slices.Clone(cells)
	for i, cell := range cells {
		if s, ok := cell.(string); ok {
			cells[i] = safe(s)
		}
	}
	_, _ = fmt.Fprintf(t, format, cells...) // its error is Flush's
}
