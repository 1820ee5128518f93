package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"reflect"
	"slices"
	"time"
	"unicode/utf8"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
)

func (a *app) importCommand() *cobra.Command {
	var f letterFilter
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "import TOPIC [FILE]",
		Short: "Store the dead letters of an export",
		Long: `Store the dead letters that dead export wrote to FILE, or to standard input, in TOPIC's dead-letter
stream. Every line is checked before anything is stored, and each error names its line and field.

It may be run again: a letter whose fields are in the stream already, to the byte, is not stored
twice, also if the first run was interrupted or another one runs at the same time. But a letter that
was replayed or deleted since is not in the stream any more, and is stored again.

A letter keeps its ID if that is greater than all that the stream had, as it is on a new server; else
it gets a new one, and with it a new age.`,
		Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault // files
			}
			return a.completeTopic(cmd, args, prefix)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.choose(cmd.Context(), args[0], f, nil, 0)
			if err != nil {
				return err
			}
			file, err := a.openExport(cmd.Context(), args[1:])
			if err != nil {
				return err
			}
			defer file.Close()
			im := &importer{a: a, s: s, dryRun: dryRun, lacking: make(map[digest]int)}
			return im.run(cmd.Context(), file)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&dryRun, "dry-run", false, "check the lines, show what would be stored, and store nothing")
	f.addStream(flags)
	flags.BoolVar(&f.foreign, "foreign", false, "the export is of what is no dead letter of TOPIC (dead export --foreign)")
	return cmd
}

// spool is a copy of what can be read only once. It is gone when it is closed.
type spool struct{ *os.File }

func (s spool) Close() error { return errors.Join(s.File.Close(), os.Remove(s.Name())) }

// openExport returns the file, or a copy of standard input or of a pipe: it is read twice.
func (a *app) openExport(ctx context.Context, args []string) (io.ReadSeekCloser, error) {
	source := a.in
	if len(args) > 0 && args[0] != "-" {
		file, err := os.Open(args[0])
		if err != nil {
			return nil, err
		}
		if info, err := file.Stat(); err == nil && info.Mode().IsRegular() {
			return file, nil
		}
		defer file.Close()
		source = file
	}
	file, err := os.CreateTemp("", "goxstreams-import-")
	if err != nil {
		return nil, err
	}
	copied := spool{file}
	_, err = io.Copy(file, interruptible{ctx, source})
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("copying the export to %s: %w", file.Name(), err), copied.Close())
	}
	return copied, nil
}

// maxLine is the length of a line that no letter's reaches: Redis holds values of 512 MiB, and
// most are far from it.
const maxLine = 1 << 30

// exported is a line of an export.
type exported struct {
	line int64
	entry
	members map[string]json.RawMessage // of the object
}

// linesOf returns the entries of an export, and an error for each line that is none. An error in
// reading the file has no line, and ends the loop.
func linesOf(file io.Reader) iter.Seq2[exported, error] {
	return func(yield func(exported, error) bool) {
		lines := bufio.NewScanner(file)
		lines.Buffer(nil, maxLine)
		line := int64(0)
		for lines.Scan() {
			line++
			if len(bytes.TrimSpace(lines.Bytes())) == 0 {
				continue
			}
			e, err := parseLine(lines.Bytes())
			e.line = line
			if !yield(e, err) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(exported{}, fmt.Errorf("after line %d: %w", line, err))
		}
	}
}

func parseLine(line []byte) (e exported, err error) {
	if !utf8.Valid(line) {
		return e, errors.New("not UTF-8")
	}
	if err := json.Unmarshal(line, &e.members); err != nil || e.members == nil {
		return e, errors.New("no JSON object") // package json quotes what it cannot read
	}
	if err := json.Unmarshal(e.members["id"], &e.id); err != nil {
		return e, errors.New("id: is missing, or no string")
	}
	id, err := parseID(e.id)
	if err != nil || id.String() != e.id || id == (entryID{}) {
		return e, fmt.Errorf("id: %q is no entry ID such as 1700000000000-0", e.id)
	}
	if e.fields, err = parseEntry(e.members["entry"]); err != nil {
		return e, fmt.Errorf("entry: %w", err)
	}
	return e, nil
}

// verify returns what is wrong with the entry as a dead letter of the topic, and whether all that
// is written beside it for reading is true: who changes a word there must not believe that it is
// imported.
func (s *selection) verify(e exported) error {
	row, d, err := newExportRow(e.id, e.fields)
	switch foreign := err != nil || d.Topic != s.topic; {
	case foreign && !s.foreign && err != nil:
		return fmt.Errorf("entry: %w", err)
	case foreign && !s.foreign:
		return fmt.Errorf("topic: the letter died in %q, not in %q", d.Topic, s.topic)
	case !foreign && s.foreign:
		return fmt.Errorf("topic: --foreign is for what is no dead letter of %q, and this one is", s.topic)
	}
	data, err := json.Marshal(row.letterRow)
	if err != nil {
		return err
	}
	want := make(map[string]json.RawMessage)
	if err := json.Unmarshal(data, &want); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(e.members)) {
		switch expected, ok := want[name]; {
		case name == "entry" || name == "error": // what is compared with, and a sentence
		case !ok:
			return fmt.Errorf("%s: the entry has no such thing", safe(name))
		case !sameJSON(e.members[name], expected):
			return fmt.Errorf("%s: differs from what the entry says", safe(name))
		}
	}
	return nil
}

func sameJSON(a, b json.RawMessage) bool {
	if bytes.Equal(a, b) {
		return true
	}
	var va, vb any
	return json.Unmarshal(a, &va) == nil && json.Unmarshal(b, &vb) == nil && reflect.DeepEqual(va, vb)
}

// parseEntry reads the fields of an entry.
func parseEntry(data json.RawMessage) ([]string, error) {
	var pairs [][]json.RawMessage
	if err := json.Unmarshal(data, &pairs); err != nil || len(pairs) == 0 {
		return nil, errors.New(`is missing, or no list such as [["name", "value"]]`)
	}
	fields := make([]string, 0, 2*len(pairs))
	for i, pair := range pairs {
		if len(pair) != 2 {
			return nil, fmt.Errorf("the %d. field is not a name and a value", i+1)
		}
		for _, data := range pair {
			var t text
			if err := t.UnmarshalJSON(data); err != nil {
				return nil, fmt.Errorf("the %d. field: %w", i+1, err)
			}
			fields = append(fields, string(t))
		}
	}
	return fields, nil
}

// digest stands for the fields of an entry. Those of two deaths differ: in the entry's ID, or in
// the time.
type digest [sha256.Size]byte

func digestOf(fields []string) digest {
	h := sha256.New()
	var length [8]byte
	for _, f := range fields {
		_, _ = h.Write(binary.BigEndian.AppendUint64(length[:0], uint64(len(f)))) // so that no two lists are one text
		_, _ = io.WriteString(h, f)
	}
	return digest(h.Sum(nil))
}

// importer stores the letters of an export that its stream lacks.
type importer struct {
	a      *app
	s      *selection
	dryRun bool

	// lacking says how often the export has an entry more than the stream has it. A stream may
	// well hold an entry twice, if somebody has written it by hand.
	lacking map[digest]int
	last    entryID // the stream's newest entry that lacking knows of

	lines, stored, present int64
	unknown                int // of these the answer was lost
	bar                    *bar
	listing                *listing
}

func (im *importer) run(ctx context.Context, file io.ReadSeeker) error {
	if err := im.check(ctx, file); err != nil {
		return err
	}
	if err := im.catchUp(ctx, im.a.client); err != nil {
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if im.dryRun {
		return im.pretend(file)
	}
	im.listing, im.bar = im.a.newListing(importRow{}), im.a.barOf(im.lines, "import")
	err := im.store(ctx, file)
	im.bar.end()
	err = errors.Join(err, im.listing.flush())
	return im.report(ctx, err)
}

// check reads the whole export, and fails if a line is not as it should be.
func (im *importer) check(ctx context.Context, file io.Reader) error {
	const most = 20
	wrong := 0
	for e, err := range linesOf(file) {
		if err == nil {
			err = im.s.verify(e)
		}
		switch {
		case ctx.Err() != nil:
			return errors.New("interrupted: nothing is stored")
		case err != nil && e.line == 0:
			return err
		case err != nil:
			if wrong++; wrong <= most {
				im.a.notef("line %d: %v", e.line, err)
			}
		default:
			im.lines++
			im.lacking[digestOf(e.fields)]++
		}
	}
	if wrong > 0 {
		return fmt.Errorf("lines that are no dead letters of an export: %d. Nothing is stored", wrong)
	}
	return nil
}

// catchUp takes what the stream has got since the last time off what it lacks.
func (im *importer) catchUp(ctx context.Context, client processor) error {
	for {
		cmd := redis.NewCmd(ctx, "xrange", im.s.stream, "("+im.last.String(), "+", "count", batch)
		_ = client.Process(ctx, cmd) // its error is the command's
		page, err := entriesIn(cmd)
		if err != nil {
			return err
		}
		for _, e := range page {
			if d := digestOf(e.fields); im.lacking[d] > 0 {
				im.lacking[d]--
				im.present++
			}
		}
		if len(page) > 0 {
			if im.last, err = parseID(page[len(page)-1].id); err != nil {
				return err
			}
		}
		if len(page) < batch {
			return nil
		}
	}
}

// processor is a client, or a transaction.
type processor interface {
	Process(context.Context, redis.Cmder) error
}

// choose returns those of the letters that the stream lacks.
func (im *importer) choose(letters []exported) []exported {
	var chosen []exported
	taken := make(map[digest]int)
	for _, e := range letters {
		if d := digestOf(e.fields); taken[d] < im.lacking[d] {
			taken[d]++
			chosen = append(chosen, e)
		}
	}
	return chosen
}

// pretend shows what would be stored.
func (im *importer) pretend(file io.Reader) error {
	listing := im.a.newLetterListing()
	for e, err := range linesOf(file) {
		if err != nil {
			return changed(e, err)
		}
		d := digestOf(e.fields)
		if im.lacking[d] == 0 {
			continue
		}
		im.lacking[d]--
		im.stored++
		letter, err := goxstreams.ReadDeadLetter(e.id, e.fields)
		if err != nil {
			letter.Reason = err.Error()
		}
		if err := listing.letter(letter, "would be imported"); err != nil {
			return err
		}
	}
	if err := listing.flush(); err != nil {
		return err
	}
	im.a.notef("%s would be imported, %d are there already. Nothing is stored.", number(im.stored), im.present)
	return nil
}

// changed is about a line that was as it should be when it was checked.
func changed(e exported, err error) error {
	if e.line == 0 {
		return err
	}
	return fmt.Errorf("the export was changed while it was read: line %d: %w", e.line, err)
}

// pageSize bounds what is sent at once, in bytes; a single letter may have more.
const pageSize = 4 << 20

// store stores what the stream lacks, a page at a time.
func (im *importer) store(ctx context.Context, file io.Reader) error {
	var page []exported
	size := 0
	for e, err := range linesOf(file) {
		if err != nil {
			return changed(e, err)
		}
		page = append(page, e)
		for _, f := range e.fields {
			size += len(f)
		}
		if len(page) < batch && size < pageSize {
			continue
		}
		if err := im.storePage(ctx, page); err != nil {
			return err
		}
		im.bar.set(im.stored + im.present)
		page, size = page[:0], 0
	}
	return im.storePage(ctx, page)
}

// storePage stores those of the letters that the stream lacks, if nothing has been written to it
// since it was looked at: so it does not matter who else imports the same.
func (im *importer) storePage(ctx context.Context, page []exported) error {
	const most = 100
	for range most {
		if ctx.Err() != nil {
			return ctx.Err() // between two transactions: what is counted is all that is done
		}
		if len(im.choose(page)) == 0 {
			return im.tell(page, nil)
		}
		err := im.a.client.Watch(context.WithoutCancel(ctx), func(tx *redis.Tx) error { return im.try(tx, page) }, im.s.stream)
		if !errors.Is(err, redis.TxFailedErr) {
			return err
		}
	}
	return fmt.Errorf("%q changed each of %d times between looking at it and writing to it", im.s.stream, most)
}

// try is one transaction. It may be called again whatever became of it.
func (im *importer) try(tx *redis.Tx, page []exported) error {
	ctx := context.Background() // see storePage
	if err := im.catchUp(ctx, tx); err != nil {
		return err
	}
	newest, err := newestID(ctx, tx, im.s.stream)
	if err != nil {
		return err
	}
	chosen := im.choose(page)
	now := uint64(time.Now().UnixMilli())
	cmds, err := tx.TxPipelined(ctx, func(pipe redis.Pipeliner) error {
		for _, e := range chosen {
			id := "*"
			// An ID of the future would be the least for all that dies until then.
			if kept, _ := parseID(e.id); newest != nil && kept.compare(*newest) > 0 && kept.ms <= now {
				id, newest = e.id, &kept
			} else {
				newest = nil // which ID the server gives is not known
			}
			pipe.Do(ctx, append([]any{"xadd", im.s.stream, id}, anys(e.fields)...)...)
		}
		return nil
	})
	im.unknown = 0
	if err != nil && !refused(err) {
		im.unknown = len(chosen)
		return err
	}
	stored := make(map[int64]string)
	for i, e := range chosen {
		id, failed := cmds[i].(*redis.Cmd).Text()
		if failed != nil {
			continue
		}
		stored[e.line] = id
		im.lacking[digestOf(e.fields)]--
		im.stored++
		im.last, _ = parseID(id)
	}
	if err != nil {
		return err
	}
	return im.tell(page, stored)
}

// newestID returns the greatest ID that the stream has had, be it of an entry that is gone.
func newestID(ctx context.Context, client redis.Cmdable, stream string) (*entryID, error) {
	info, err := client.XInfoStream(ctx, stream).Result()
	if noSuchKey(err) {
		return &entryID{}, nil
	}
	if err != nil {
		return nil, err
	}
	id, err := parseID(info.LastGeneratedID)
	return &id, err
}

// importRow is a row of import for scripts.
type importRow struct {
	Line   int64  `json:"line"`
	ID     string `json:"id"` // in the export
	Result string `json:"result"`
	Stored string `json:"stored_id,omitempty"` // in the stream
}

// tell says, to scripts, what became of the letters, given the IDs of those that were stored.
func (im *importer) tell(page []exported, stored map[int64]string) error {
	if !im.a.forScripts() {
		return nil
	}
	for _, e := range page {
		row := importRow{e.line, e.id, "present", stored[e.line]}
		if row.Stored != "" {
			row.Result = "imported"
		}
		if err := im.listing.row(row); err != nil {
			return err
		}
	}
	return nil
}

// report says what was done, and returns the error with what to do about it.
func (im *importer) report(ctx context.Context, err error) error {
	summary := fmt.Sprintf("%s imported, %d were there already", number(im.stored), im.present)
	if im.unknown > 0 {
		summary += fmt.Sprintf(", of %d it is not known", im.unknown)
	}
	im.a.notef("%s.", summary)
	switch {
	case ctx.Err() != nil:
		return errors.New("interrupted: run it again for the rest")
	case err != nil:
		return fmt.Errorf("stopped; run it again for the rest: %w", err)
	}
	return nil
}

func anys(values []string) []any {
	all := make([]any, len(values))
	for i, v := range values {
		all[i] = v
	}
	return all
}
