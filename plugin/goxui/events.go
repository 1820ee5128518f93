package goxui

import (
	"net/http"
	"time"
)

const (
	maxViewers = 200 // of events; other pages can be reloaded
	heartbeat  = 20 * time.Second
	writeBound = 10 * time.Second
)

// events tells a page when it is time to look again, by server-sent events without content: the page
// then asks for itself, and is authorized again.
func (h *Handler) events(w http.ResponseWriter, r *http.Request) error {
	var j *job
	if r.URL.Query().Has("job") {
		var err error
		if j, err = h.jobOf(r, r.URL.Query().Get("job")); err != nil {
			return err
		}
	} else if err := h.authorize(r, Action{Verb: View, Topic: r.URL.Query().Get("t")}); err != nil {
		return err
	}
	if h.viewers.Add(1) > maxViewers {
		h.viewers.Add(-1)
		return failure{http.StatusServiceUnavailable, "Too many pages are open."}
	}
	defer h.viewers.Add(-1)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // nginx
	out := http.NewResponseController(w)
	send := func(text string) error {
		_ = out.SetWriteDeadline(time.Now().Add(writeBound)) // not every server has one
		if _, err := w.Write([]byte(text)); err != nil {
			return err
		}
		return out.Flush()
	}
	next := h.waiter(j)
	// The first look is for what has changed since the page was made, or the connection broke.
	if send("retry: 2000\ndata: look\n\n") != nil {
		return nil // the browser has gone, or what is between cannot flush: the page is not live then
	}
	for {
		text := ": still here\n\n"
		if newer, ok := next(r.Context().Done()); !ok {
			return nil
		} else if newer {
			text = "data: look\n\n"
		}
		if send(text) != nil {
			return nil
		}
	}
}

// waiter returns what waits until there is something new to see. It returns false as its second result
// when nobody waits any more.
func (h *Handler) waiter(j *job) func(gone <-chan struct{}) (newer, ok bool) {
	if j != nil {
		state := h.jobs.state(j)
		return func(gone <-chan struct{}) (bool, bool) {
			newer, ok := h.wait(gone, state.newer, heartbeat)
			state = h.jobs.state(j)
			if newer { // not more often than somebody can see
				_, ok = h.wait(gone, nil, progress)
			}
			return newer, ok
		}
	}
	last, due := h.collector.look()
	return func(gone <-chan struct{}) (bool, bool) {
		for began := time.Now(); time.Since(began) < heartbeat; {
			newer, ok := h.wait(gone, last.newer, min(heartbeat, max(time.Until(due), 50*time.Millisecond)))
			last, due = h.collector.look()
			if newer || !ok {
				return newer, ok
			}
		}
		return false, true
	}
}

// wait waits for something new, for a while.
func (h *Handler) wait(gone, newer <-chan struct{}, most time.Duration) (isNewer, ok bool) {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-newer:
		return true, true
	case <-timer.C:
		return false, true
	case <-gone:
	case <-h.ctx.Done():
	}
	return false, false
}
