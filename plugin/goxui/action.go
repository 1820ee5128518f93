package goxui

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// Verb is what somebody wants to do.
type Verb string

// The verbs.
const (
	View        Verb = "view"         // numbers, names, entry IDs and reasons; with an empty Topic: the list of topics
	ViewMessage Verb = "view message" // a message's metadata, and what Config.Render returns
	Replay      Verb = "replay"       // dead letters
	Delete      Verb = "delete"       // dead letters
	Cancel      Verb = "cancel"       // a delayed message
	Pause       Verb = "pause"        // a group
	Resume      Verb = "resume"       // a group
)

// Changes reports whether the verb is more than looking.
func (v Verb) Changes() bool { return v != View && v != ViewMessage }

// Action is what Config.Authorize decides about.
type Action struct {
	Verb  Verb
	Topic string
	Group string // of Pause and Resume, and of View for the page of a group
	ID    string // the entry, or a delayed message's UUID: of ViewMessage and Cancel

	// Count is how many dead letters were confirmed to be replayed or deleted; 0 before.
	Count int64
}

// Stage says when an AuditEvent happens.
type Stage string

// The stages of something that is changed.
const (
	Refused Stage = "refused" // by Config.Authorize, whose error is in Err
	Begun   Stage = "begun"
	Ended   Stage = "ended"
)

// AuditEvent is what Config.Audit is told.
type AuditEvent struct {
	Action Action
	Stage  Stage

	// Done is how many were changed. For replays and deletes after a lost answer, up to 100
	// more may have been.
	Done int64

	Err error // why not all is done; nil: all is
}

// errReadOnly is the answer without Config.Authorize.
var errReadOnly = errors.New("the page is read-only")

// permitted is Config.Authorize with its default.
func (h *Handler) permitted(r *http.Request, a Action) error {
	if h.config.Authorize != nil {
		return h.config.Authorize(r, a)
	}
	if a.Verb.Changes() {
		return errReadOnly
	}
	return nil
}

// authorize is permitted for what the request is about to do.
func (h *Handler) authorize(r *http.Request, a Action) error {
	err := h.permitted(r, a)
	if err == nil {
		return nil
	}
	h.audit(r, AuditEvent{Action: a, Stage: Refused, Err: err})
	return failure{http.StatusForbidden, "Not allowed: " + err.Error()}
}

// audit tells Config.Audit. A panic there must not end the process, since jobs are told of
// outside of a request.
func (h *Handler) audit(r *http.Request, e AuditEvent) {
	if h.config.Audit == nil {
		return
	}
	defer func() {
		if p := recover(); p != nil {
			h.config.Logger.Error("Config.Audit panicked", fmt.Errorf("panic: %v", p), watermill.LogFields{"topic": e.Action.Topic})
		}
	}()
	h.config.Audit(r, e)
}

// seeOther leads the browser to a page, so that a reload repeats nothing. The reference is
// relative: only the browser knows where the Handler is mounted.
func seeOther(w http.ResponseWriter, to string) error {
	w.Header().Set("Location", to)
	w.WriteHeader(http.StatusSeeOther)
	return nil
}

// link returns a reference to a page.
func link(page string, pairs ...string) string {
	values := make(url.Values)
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			values.Add(pairs[i], pairs[i+1])
		}
	}
	if len(values) == 0 {
		return "./" + page
	}
	return page + "?" + values.Encode()
}

// cancelDelayed cancels a delayed message.
func (h *Handler) cancelDelayed(w http.ResponseWriter, r *http.Request) error {
	topic, err := h.topic(r)
	if err != nil {
		return err
	}
	a := Action{Verb: Cancel, Topic: topic, ID: r.URL.Query().Get("uuid")}
	if a.ID == "" {
		return failure{http.StatusBadRequest, "Which message? The UUID is missing."}
	}
	if err := h.authorize(r, a); err != nil {
		return err
	}
	schedule, err := goxstreams.NewSchedule(h.config.Client, topic)
	if err != nil {
		return err
	}
	h.audit(r, AuditEvent{Action: a, Stage: Begun})
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), maxChange) // also if the browser goes
	defer cancel()
	e := AuditEvent{Action: a, Stage: Ended, Err: schedule.Cancel(ctx, a.ID)}
	if e.Err == nil {
		e.Done = 1
	}
	h.audit(r, e)
	notice := "cancelled"
	var missing *goxstreams.NotFoundError
	switch {
	case errors.As(e.Err, &missing):
		notice = "not-delayed"
	case e.Err != nil:
		return e.Err
	}
	h.collector.expire()
	return seeOther(w, link("delayed", "t", topic, "notice", notice))
}

// pauseGroup pauses or resumes a group.
func (h *Handler) pauseGroup(w http.ResponseWriter, r *http.Request) error {
	s, err := h.state(r)
	if err != nil {
		return err
	}
	a := Action{Topic: s.Name, Group: r.URL.Query().Get("g")}
	if g := s.group(a.Group); g != nil {
		a.Group = g.Name
	}
	do, notice := goxstreams.Pause, "paused"
	switch a.Verb = Verb(r.PostFormValue("do")); {
	case a.Verb == Resume:
		do, notice = goxstreams.Resume, "resumed"
	case a.Verb != Pause:
		return failure{http.StatusBadRequest, "Pause, or resume?"}
	case a.Group == "":
		return failure{http.StatusBadRequest, "Which group?"}
	}
	if err := h.authorize(r, a); err != nil {
		return err
	}
	h.audit(r, AuditEvent{Action: a, Stage: Begun})
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), maxChange) // also if the browser goes
	defer cancel()
	e := AuditEvent{Action: a, Stage: Ended, Err: do(ctx, h.config.Client, a.Topic, a.Group)}
	if e.Err == nil {
		e.Done = 1
	}
	h.audit(r, e)
	if e.Err != nil && !refused(e.Err) && !unanswered(e.Err) { // such as no such group
		return failure{http.StatusConflict, explain(e.Err)}
	}
	if e.Err != nil {
		return e.Err
	}
	h.collector.expire()
	return seeOther(w, link("group", "t", a.Topic, "g", a.Group, "notice", notice))
}

// notices are what a page can say about what was just done, by the names in URLs: text from
// a URL is not repeated, since anybody can make up a URL.
var notices = map[string]string{
	"cancelled":   "The message is cancelled.",
	"not-delayed": "The message is not delayed any more: it is in the stream already, or was cancelled.",
	"paused":      "The group is paused.",
	"resumed":     "The group is resumed.",
}

// maxChange is how long a single change may take.
const maxChange = 10 * time.Second
