package goxui

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// job replays or deletes dead letters: it counts those that match, waits until somebody confirms the
// number, and then moves those and no others, whatever dies meanwhile. It lives in this process. If
// the process ends in between, each letter is moved or still there, and a new job does the rest.
type job struct {
	ID     string
	Verb   Verb
	Topic  string
	Filter letterFilter

	queue *goxstreams.DeadLetterQueue
	stop  context.CancelFunc // of what is under way; nil: nothing is
	last  entryID            // the last one that was counted

	jobState
}

// jobState is what changes.
type jobState struct {
	Phase   phase
	Seen    int64 // letters that were looked at, of about Total
	Total   int64
	Count   int64 // letters that match
	Skipped int64 // chosen letters that cannot be replayed, since they are no dead letters of the topic
	Done    int64 // moved
	Failed  int64 // could not be moved
	Gone    int64 // were there when they were counted, and not any more

	Problems []string // why some failed; a few of them
	Err      string   // why it ended early, or waits

	Waiting bool // Redis does not answer: it tries again

	changed time.Time
	newer   chan struct{} // closed when something has changed
}

// phase is how far a job is.
type phase string

const (
	counting phase = "counting"
	counted  phase = "counted" // waits for somebody to confirm
	moving   phase = "moving"
	ended    phase = "ended"
)

// active reports whether something goes on.
func (p phase) active() bool { return p == counting || p == moving }

// Share returns how much of the progress bar is done, in percent.
func (s jobState) Share() int64 {
	n, of := s.Seen, s.Total
	if s.Phase == moving || s.Phase == ended {
		n, of = s.Done+s.Failed+s.Gone, s.Count
	}
	if of == 0 {
		return 100
	}
	return min(100, 100*n/of)
}

// jobs are the jobs of a Handler, bounded in number.
type jobs struct {
	mu  sync.Mutex
	all []*job // oldest first
}

const (
	maxJobs    = 100 // the oldest that is not active is forgotten
	maxActive  = 8
	batch      = 100 // a page of the library's, so that a call is moved or not as a whole
	maxReasons = 5
	outageMost = time.Minute // how long a job waits for Redis
)

// add adds a job that is active.
func (js *jobs) add(j *job) error {
	js.mu.Lock()
	defer js.mu.Unlock()
	active := 0
	for _, other := range js.all {
		if other.Phase.active() {
			active++
		}
	}
	if active >= maxActive {
		return failure{http.StatusServiceUnavailable, "Too many replays and deletes are under way."}
	}
	if len(js.all) >= maxJobs {
		i := slices.IndexFunc(js.all, func(j *job) bool { return !j.Phase.active() })
		js.all = slices.Delete(js.all, i, i+1)
	}
	js.all = append(js.all, j)
	return nil
}

func (js *jobs) find(id string) *job {
	js.mu.Lock()
	defer js.mu.Unlock()
	if i := slices.IndexFunc(js.all, func(j *job) bool { return j.ID == id }); i >= 0 {
		return js.all[i]
	}
	return nil
}

// state returns how far the job is.
func (js *jobs) state(j *job) jobState {
	js.mu.Lock()
	defer js.mu.Unlock()
	return j.jobState
}

// change changes the job, and tells those who watch it.
func (js *jobs) change(j *job, f func()) {
	js.mu.Lock()
	defer js.mu.Unlock()
	f()
	close(j.newer)
	j.newer, j.changed = make(chan struct{}), time.Now()
}

// end ends the job with an error.
func (js *jobs) end(j *job, err error) {
	js.change(j, func() { j.Phase, j.stop, j.Err = ended, nil, explain(err) })
}

// startJob begins to count.
func (h *Handler) startJob(w http.ResponseWriter, r *http.Request) error {
	topic, err := h.topic(r)
	if err != nil {
		return err
	}
	if err := r.ParseForm(); err != nil {
		return failure{http.StatusBadRequest, "The form cannot be read."}
	}
	verb := Verb(r.PostForm.Get("do"))
	if verb != Replay && verb != Delete {
		return failure{http.StatusBadRequest, "Replay, or delete?"}
	}
	if err := h.authorize(r, Action{Verb: verb, Topic: topic}); err != nil {
		return err
	}
	filter, err := parseFilter(r.PostForm, time.Now())
	if err != nil {
		return err
	}
	if r.PostForm.Get("which") == "chosen" {
		if len(r.PostForm["id"]) == 0 {
			return failure{http.StatusBadRequest, "Nothing is selected."}
		}
		filter = letterFilter{}
		if err := filter.choose(r.PostForm["id"]); err != nil {
			return err
		}
	}
	if verb == Replay && filter.Has(foreign) {
		return failure{http.StatusBadRequest, "What is no dead letter of the topic cannot be replayed."}
	}
	queue, err := h.queue(topic)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(h.ctx)
	j := &job{ID: rand.Text(), Verb: verb, Topic: topic, Filter: filter, queue: queue, stop: stop}
	j.jobState = jobState{Phase: counting, newer: make(chan struct{}), changed: time.Now()}
	if err := h.jobs.add(j); err != nil {
		stop()
		return err
	}
	done := make(chan struct{})
	failed := func(err error) { h.jobs.end(j, err) }
	if !h.spawn(func() {
		defer close(done)
		defer stop()
		h.count(ctx, j)
	}, failed) {
		stop()
		failed(errClosed)
	}
	wait(r.Context(), done) // of few letters the number is known at once
	return seeOther(w, link("job", "id", j.ID))
}

// wait waits for a moment.
func wait(ctx context.Context, done <-chan struct{}) {
	timer := time.NewTimer(100 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// progress is how often viewers are told how far a job is.
const progress = 200 * time.Millisecond

// count counts the letters that match.
func (h *Handler) count(ctx context.Context, j *job) {
	total, err := j.queue.Count(ctx)
	h.jobs.change(j, func() { j.Total = total })
	var seen, matched, skipped int64
	told := time.Now()
	if err == nil {
		err = j.Filter.scan(ctx, j.queue, j.Topic, entryID{}, func(l letter) bool {
			if j.Verb == Replay && l.Kind == foreign {
				skipped++
				return true
			}
			matched++
			j.last, _ = parseID(l.ID)
			return true
		}, func(entryID) bool {
			if seen++; time.Since(told) > progress {
				told = time.Now()
				h.jobs.change(j, func() { j.Seen = seen })
			}
			return ctx.Err() == nil
		})
	}
	h.jobs.change(j, func() {
		j.Seen, j.Count, j.Skipped, j.Phase, j.stop = seen, matched, skipped, counted, nil
		if err == nil && matched > 0 {
			return
		}
		if j.Phase = ended; err != nil {
			j.Err = h.jobError(ctx, j, err)
		}
	})
}

// jobError returns what a job's page says about an error.
func (h *Handler) jobError(ctx context.Context, j *job, err error) string {
	if ctx.Err() != nil {
		return "It was stopped."
	}
	h.config.Logger.Error("Dead letters cannot be moved", errors.New(explain(err)), watermill.LogFields{"topic": j.Topic, "action": string(j.Verb)})
	return explain(err)
}

// changeJob confirms a job, or stops it.
func (h *Handler) changeJob(w http.ResponseWriter, r *http.Request) error {
	j, err := h.jobOf(r, r.URL.Query().Get("id"))
	if err != nil {
		return err
	}
	if err := r.ParseForm(); err != nil {
		return failure{http.StatusBadRequest, "The form cannot be read."}
	}
	s := h.jobs.state(j)
	a := Action{Verb: j.Verb, Topic: j.Topic, Count: s.Count}
	if err := h.authorize(r, a); err != nil {
		return err
	}
	if r.PostForm.Get("do") == "stop" {
		h.jobs.change(j, func() {
			switch {
			case j.stop != nil:
				j.stop()
			case j.Phase == counted:
				j.Phase, j.Err = ended, "It was stopped."
			}
		})
		return seeOther(w, link("job", "id", j.ID))
	}
	if r.PostForm.Get("count") != fmt.Sprint(s.Count) {
		return failure{http.StatusConflict, "The number to confirm is another one."}
	}
	ctx, stop := context.WithCancel(h.ctx)
	begins := false
	h.jobs.change(j, func() {
		if begins = j.Phase == counted; begins {
			j.Phase, j.stop = moving, stop
		}
	})
	if !begins { // somebody has confirmed it before, perhaps with a second click
		stop()
		return seeOther(w, link("job", "id", j.ID))
	}
	by := r.WithContext(context.WithoutCancel(r.Context()))
	h.audit(by, AuditEvent{Action: a, Stage: Begun})
	done := make(chan struct{})
	failed := func(err error) { h.jobs.end(j, err) }
	if !h.spawn(func() {
		defer close(done)
		defer stop()
		err := h.move(ctx, j)
		s := h.jobs.state(j)
		if err == nil && s.Failed > 0 {
			err = fmt.Errorf("%d could not be moved, such as: %s", s.Failed, s.Problems[0])
		}
		h.audit(by, AuditEvent{Action: a, Stage: Ended, Done: s.Done, Err: err})
		h.collector.expire()
	}, failed) {
		stop()
		failed(errClosed)
		h.audit(by, AuditEvent{Action: a, Stage: Ended, Err: errClosed})
	}
	wait(r.Context(), done)
	return seeOther(w, link("job", "id", j.ID))
}

// move moves the letters that were counted. It waits for a Redis that does not answer: whatever was
// moved by a call without an answer is not listed again, so that nothing is moved twice.
func (h *Handler) move(ctx context.Context, j *job) error {
	filter := j.Filter
	filter.until = j.last.next()
	from := entryID{}
	answered := time.Now()
	var err error
	for {
		before := from
		from, err = h.pass(ctx, j, filter, from)
		if err == nil || ctx.Err() != nil || refused(err) {
			break
		}
		if from != before {
			answered = time.Now()
		}
		if time.Since(answered) > outageMost {
			break
		}
		h.jobs.change(j, func() { j.Waiting = true })
		pause := time.NewTimer(500 * time.Millisecond)
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
	}
	h.jobs.change(j, func() {
		j.Phase, j.stop, j.Waiting = ended, nil, false
		if err != nil {
			j.Err = h.jobError(ctx, j, err)
		} else {
			j.Gone = max(0, j.Count-j.Done-j.Failed)
		}
	})
	return err
}

// pass moves the letters after an ID. It returns the last one of those that need no other look.
func (h *Handler) pass(ctx context.Context, j *job, filter letterFilter, from entryID) (entryID, error) {
	ids := make([]string, 0, batch)
	seen := from
	var failed error
	// A call that has begun ends: what is counted is all that is done.
	whole := context.WithoutCancel(ctx)
	call := func() bool {
		if len(ids) > 0 {
			failed = h.moveBatch(whole, j, ids)
			ids = ids[:0]
		}
		if failed == nil {
			from = seen
		}
		return failed == nil && ctx.Err() == nil
	}
	err := filter.scan(ctx, j.queue, j.Topic, from, func(l letter) bool {
		if j.Verb == Delete || l.Kind != foreign {
			ids = append(ids, l.ID)
		}
		return true
	}, func(id entryID) bool {
		seen = id
		return len(ids) < batch || call()
	})
	if failed == nil && err == nil {
		err = ctx.Err() // whoever stops it does not want the rest of a batch
	}
	if failed == nil && err == nil {
		call()
	}
	return from, errors.Join(failed, err)
}

// moveBatch moves some letters. Its error says that it is of no use to go on.
func (h *Handler) moveBatch(ctx context.Context, j *job, ids []string) error {
	do := j.queue.Replay
	if j.Verb == Delete {
		do = j.queue.Delete
	}
	n, err := do(ctx, ids...)
	failed, stop := outcomes(err, ids)
	h.jobs.change(j, func() {
		j.Done += int64(n)
		if stop != nil {
			return // they are looked at again
		}
		j.Failed += int64(len(failed))
		j.Waiting = false
		for _, e := range failed[:min(len(failed), maxReasons-len(j.Problems))] {
			j.Problems = append(j.Problems, explain(e))
		}
	})
	return stop
}

// jobOf returns a job whose topic the request may see.
func (h *Handler) jobOf(r *http.Request, id string) (*job, error) {
	j := h.jobs.find(id)
	if j == nil {
		return nil, failure{http.StatusNotFound, "There is no such replay or delete: it ended long ago, or the process was restarted. " +
			"What it had not moved is still among the dead letters."}
	}
	return j, h.authorize(r, Action{Verb: View, Topic: j.Topic})
}
