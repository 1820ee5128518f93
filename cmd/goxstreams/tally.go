package main

import (
	"context"
	"errors"
	"fmt"
)

// tally counts what became of what a command changes, and reports it.
type tally struct {
	a       *app
	verbed  string
	byUUID  bool // what is changed has UUIDs, not IDs
	listing *listing
	bar     *bar

	done, failed, unknown int64
}

// moveRow says for scripts what became of an entry.
type moveRow struct {
	ID     string `json:"id"`
	Result string `json:"result"`
	Error  text   `json:"error,omitempty"`
}

// changedRow is moveRow of what has a UUID.
type changedRow struct {
	UUID   text   `json:"uuid"`
	Result string `json:"result"`
	Error  text   `json:"error,omitempty"`
}

// report says what became of an entry: for scripts of each, else of the first that failed.
func (t *tally) report(id, result string, err error) error {
	const most = 50
	if t.a.forScripts() {
		row := moveRow{ID: id, Result: result}
		if err != nil {
			row.Error = text(explain(err))
		}
		if t.byUUID {
			return t.listing.row(changedRow{text(id), row.Result, row.Error})
		}
		return t.listing.row(row)
	}
	if err != nil && t.failed+t.unknown <= most {
		t.bar.clear()
		t.a.notef("%s: %s", id, explain(err))
		if t.failed+t.unknown == most {
			t.a.notef("Further ones are only counted.")
		}
	}
	return nil
}

// end says how many are done, and returns the error that ends the command, given the one that ended the work.
func (t *tally) end(ctx context.Context, err error, done string) error {
	summary := done + " " + t.verbed
	if t.failed > 0 {
		summary += fmt.Sprintf(", %d failed", t.failed)
	}
	if t.unknown > 0 {
		summary += fmt.Sprintf(", of %d it is not known", t.unknown)
	}
	t.a.notef("%s.", summary)
	switch {
	case ctx.Err() != nil:
		return errors.New("interrupted: run it again for the rest")
	case err != nil:
		return fmt.Errorf("stopped; run it again for the rest: %w", err)
	case t.failed > 0:
		return errPartly
	}
	return nil
}
