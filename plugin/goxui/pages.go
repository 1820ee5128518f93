package goxui

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
)

//go:embed templates static
var files embed.FS

// rows is how many rows a page shows.
const rows = 50

// scanBound is how long a page looks for rows that match a filter, before it shows where to go on.
const scanBound = 60 * time.Millisecond

// page is what all pages have in common.
type page struct {
	Title  string
	Crumbs []crumb
	Notice string // what was just done
	Outage string // why what is shown is old, or is not shown

	Events  string // where events come from that tell the page to look again; empty: it does not change by itself
	Refresh int    // seconds until a browser without scripts looks again; 0: it does not

	Data any
}

// crumb is a link to a page above.
type crumb struct{ Text, URL string }

// templates has a template for each page.
var templates = func() map[string]*template.Template {
	functions := template.FuncMap{
		"safe": safe, "short": short, "lines": lines, "number": anyNumber, "rate": rate, "ago": ago, "age": ageOf, "link": link, "chart": newChart,
		"until": until, "asset": asset, "time": func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") },
	}
	all := make(map[string]*template.Template)
	for _, name := range []string{"topics", "topic", "group", "dead", "delayed", "message", "job", "error"} {
		all[name] = template.Must(template.New("layout.html").Funcs(functions).ParseFS(files, "templates/layout.html", "templates/"+name+".html"))
	}
	return all
}()

// anyNumber is number for the types that pages have.
func anyNumber(v any) string {
	if n, ok := v.(int); ok {
		return number(int64(n))
	}
	return number(v.(int64))
}

// versions are of the static files, so that browsers may keep them.
var versions = func() map[string]string {
	all := make(map[string]string)
	for _, name := range []string{"style.css", "live.js", "icon.svg"} {
		data, err := files.ReadFile("static/" + name)
		if err != nil {
			panic(err) // it is embedded
		}
		sum := sha256.Sum256(data)
		all[name] = hex.EncodeToString(sum[:8])
	}
	return all
}()

// asset returns a reference to a static file.
func asset(name string) string { return link(name, "v", versions[name]) }

func static(name, kind string) func(*Handler, http.ResponseWriter, *http.Request) error {
	data, err := files.ReadFile("static/" + name)
	if err != nil {
		panic(err) // it is embedded
	}
	return func(_ *Handler, w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("Content-Type", kind)
		if r.URL.Query().Get("v") == versions[name] {
			w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
		}
		_, _ = w.Write(data) // the browser may have gone
		return nil
	}
}

// show writes a page.
func (h *Handler) show(w http.ResponseWriter, status int, name string, p page) error {
	var b bytes.Buffer
	if err := templates[name].Execute(&b, p); err != nil {
		h.config.Logger.Error("A template failed", err, nil)
		return failure{http.StatusInternalServerError, "The page cannot be shown."}
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes()) // the browser may have gone
	return nil
}

// fail writes the page of an error.
func (h *Handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	p := page{Title: "Error", Outage: explain(err), Crumbs: []crumb{{"Topics", link("")}}}
	status := http.StatusInternalServerError
	var f failure
	switch {
	case errors.As(err, &f):
		status = f.status
	case refused(err), unanswered(err):
		status = http.StatusServiceUnavailable
	}
	if status >= 500 && r.Context().Err() == nil {
		h.config.Logger.Error("A page cannot be shown", errors.New(explain(err)), watermill.LogFields{"page": r.URL.Path})
	}
	if err := h.show(w, status, "error", p); err != nil {
		h.config.Logger.Error("A page cannot be shown", err, nil)
	}
}

// topic returns the topic of a request, if it is one that is shown and may be seen.
func (h *Handler) topic(r *http.Request) (string, error) {
	s, err := h.state(r)
	if err != nil {
		return "", err
	}
	return s.Name, nil
}

// state is topic with its state.
func (h *Handler) state(r *http.Request) (*topicState, error) {
	query := r.URL.Query()
	snapshot := h.collector.recent(r.Context())
	a := Action{Verb: View, Topic: query.Get("t"), Group: query.Get("g")}
	s := snapshot.find(a.Topic)
	if s != nil {
		a.Topic = s.Name
	}
	if err := h.authorize(r, a); err != nil {
		return nil, err
	}
	switch {
	case s != nil:
		return s, nil
	case snapshot.at.IsZero():
		return nil, errNoAnswer
	}
	return nil, failure{http.StatusNotFound, "There is no such topic. One that has just begun is found within a minute."}
}

// may reports whether a button makes sense.
func (h *Handler) may(r *http.Request, v Verb, topic, group string) bool {
	return h.permitted(r, Action{Verb: v, Topic: topic, Group: group}) == nil
}

// pageOf returns what the pages of a topic have in common.
func (h *Handler) pageOf(r *http.Request, title, topic string, data any) page {
	s, _ := h.collector.look()
	p := page{Title: title, Notice: notices[r.URL.Query().Get("notice")], Outage: outage(s), Data: data, Crumbs: []crumb{{"Topics", link("")}}}
	if topic != "" {
		p.Crumbs = append(p.Crumbs, crumb{safe(topic), link("topic", "t", topic)})
	}
	return p
}

// outage says why a snapshot is old.
func outage(s *snapshot) string {
	switch {
	case s.err == nil:
		return ""
	case s.at.IsZero():
		return explain(s.err)
	}
	return explain(s.err) + " Numbers are from " + s.at.UTC().Format("15:04:05 UTC") + "."
}

// topicsData is of the list of topics.
type topicsData struct {
	Topics        []*topicState
	Query, Sort   string
	Found         int
	More, Waiting bool
	Prev, Next    string // links; empty: there is no such page
	Sorts         []crumb
}

// orders are by what topics can be sorted, greatest first.
var orders = []struct {
	name, title string
	of          func(*topicState) int64
}{
	{"", "name", nil},
	{"lag", "lag", func(s *topicState) int64 { return s.Lag() }},
	{"pending", "pending", func(s *topicState) int64 { return s.Pending() }},
	{"oldest", "oldest pending", func(s *topicState) int64 { return int64(s.Oldest()) }},
	{"dead", "dead letters", func(s *topicState) int64 { return s.Letters }},
	{"delayed", "delayed", func(s *topicState) int64 { return s.Delayed }},
	{"length", "length", func(s *topicState) int64 { return s.Length }},
}

func (h *Handler) topicsPage(w http.ResponseWriter, r *http.Request) error {
	if err := h.authorize(r, Action{Verb: View}); err != nil {
		return err
	}
	query := r.URL.Query()
	d := topicsData{Query: query.Get("q"), Sort: query.Get("sort")}
	snapshot := h.collector.recent(r.Context())
	d.More, d.Waiting = snapshot.more, snapshot.at.IsZero()
	var all []*topicState
	for _, s := range snapshot.topics {
		if strings.Contains(safe(s.Name), safe(d.Query)) && h.may(r, View, s.Name, "") {
			all = append(all, s)
		}
	}
	for _, order := range orders {
		d.Sorts = append(d.Sorts, crumb{order.title, order.name})
		if order.name == d.Sort && order.of != nil {
			slices.SortStableFunc(all, func(a, b *topicState) int { return cmp.Compare(order.of(b), order.of(a)) })
		}
	}
	d.Found = len(all)
	at, _ := strconv.Atoi(query.Get("page"))
	at = max(0, min(at, (len(all)-1)/rows))
	to := func(n int) string { return link("", "q", d.Query, "sort", d.Sort, "page", strconv.Itoa(n)) }
	if at > 0 {
		d.Prev = to(at - 1)
	}
	if (at+1)*rows < len(all) {
		d.Next = to(at + 1)
	}
	d.Topics = all[at*rows : min(len(all), (at+1)*rows)]
	p := h.pageOf(r, "Topics", "", d)
	p.Crumbs, p.Events = nil, link("events")
	if d.Waiting {
		p.Refresh = 1
	}
	return h.show(w, http.StatusOK, "topics", p)
}

func (h *Handler) topicPage(w http.ResponseWriter, r *http.Request) error {
	s, err := h.state(r)
	if err != nil {
		return err
	}
	p := h.pageOf(r, safe(s.Name), "", s)
	p.Events = link("events", "t", s.Name)
	return h.show(w, http.StatusOK, "topic", p)
}

// groupData is of the page of a group.
type groupData struct {
	Topic, Group string
	State        *groupState // nil: it is gone
	pendingFilter
	Consumers []redis.XInfoConsumer
	Others    int // consumers that are not shown
	Pending   []redis.XPendingExt
	First     string // link to the first page; empty: this is it
	Next      string
	Looked    bool // the page was not filled, though there may be more

	Paused              time.Time // since when; zero: it is not
	MayPause, MayResume bool
}

// pendingFilter is which pending entries somebody wants.
type pendingFilter struct {
	Consumer, Idle, Deliveries string

	idle       time.Duration
	deliveries int64
}

func parsePendingFilter(query url.Values) (f pendingFilter, err error) {
	f = pendingFilter{Consumer: query.Get("consumer"), Idle: query.Get("idle"), Deliveries: query.Get("deliveries")}
	if f.Idle != "" {
		if f.idle, err = parseAge(f.Idle); err != nil {
			return f, failure{400, "Idle for: " + err.Error() + "."}
		}
	}
	if f.Deliveries != "" {
		if f.deliveries, err = strconv.ParseInt(f.Deliveries, 10, 64); err != nil || f.deliveries < 0 {
			return f, failure{400, "Deliveries: want a number of 0 or more."}
		}
	}
	return f, nil
}

// maxConsumers is how many consumers a page shows: those that hold most.
const maxConsumers = 100

func (h *Handler) groupPage(w http.ResponseWriter, r *http.Request) error {
	s, err := h.state(r)
	if err != nil {
		return err
	}
	query := r.URL.Query()
	d := groupData{Topic: s.Name, Group: query.Get("g")}
	if d.pendingFilter, err = parsePendingFilter(query); err != nil {
		return err
	}
	start := "-"
	if after := query.Get("after"); after != "" {
		id, err := parseID(after)
		if err != nil {
			return failure{400, "After: " + err.Error() + "."}
		}
		start, d.First = id.next().String(), d.link("")
	}
	if d.State = s.group(d.Group); d.State != nil {
		d.Group = d.State.Name
	}
	d.MayPause, d.MayResume = h.may(r, Pause, d.Topic, d.Group), h.may(r, Resume, d.Topic, d.Group)
	if d, err = ask(h, r, func(ctx context.Context) (groupData, error) { return d, d.read(ctx, h.config.Client, start) }); err != nil {
		if replyHas(err, "NOGROUP") || replyHas(err, "no such key") {
			err = failure{http.StatusNotFound, "There is no such group."}
		}
		return err
	}
	p := h.pageOf(r, safe(d.Group), s.Name, d)
	p.Events = link("events", "t", s.Name)
	return h.show(w, http.StatusOK, "group", p)
}

// link returns a reference to this page, after an entry.
func (d *groupData) link(after string) string {
	return link("group", "t", d.Topic, "g", d.Group, "consumer", d.Consumer, "idle", d.Idle, "deliveries", d.Deliveries, "after", after)
}

// Of returns a reference to what a consumer holds.
func (d groupData) Of(consumer string) string {
	return link("group", "t", d.Topic, "g", d.Group, "consumer", consumer)
}

// read asks Redis. It asks for pages of pending entries and filters them here: a server that filters by
// idle time looks at all of a million in one step.
func (d *groupData) read(ctx context.Context, client redis.UniversalClient, start string) error {
	paused, err := goxstreams.Paused(ctx, client, d.Topic)
	if err != nil && !refused(err) {
		return err
	}
	d.Paused = paused[d.Group]
	consumers, err := client.XInfoConsumers(ctx, d.Topic, d.Group).Result()
	if err != nil {
		return err
	}
	slices.SortStableFunc(consumers, func(a, b redis.XInfoConsumer) int { return cmp.Compare(b.Pending, a.Pending) })
	d.Consumers = consumers[:min(len(consumers), maxConsumers)]
	d.Others = len(consumers) - len(d.Consumers)
	if i := slices.IndexFunc(consumers, func(c redis.XInfoConsumer) bool { return safe(c.Name) == safe(d.Consumer) }); i >= 0 {
		d.Consumer = consumers[i].Name
	}
	ends := time.Now().Add(scanBound)
	query := redis.XPendingExtArgs{Stream: d.Topic, Group: d.Group, Start: start, End: "+", Count: rows + 1, Consumer: d.Consumer}
	for {
		entries, err := client.XPendingExt(ctx, &query).Result()
		if err != nil {
			return err
		}
		last := entryID{}
		for _, e := range entries {
			if e.Idle < d.idle || e.RetryCount < d.deliveries {
				last, _ = parseID(e.ID)
				continue
			}
			if len(d.Pending) == rows {
				d.Next = d.link(last.String())
				return nil
			}
			last, _ = parseID(e.ID)
			d.Pending = append(d.Pending, e)
		}
		switch {
		case len(entries) < int(query.Count):
			return nil
		case time.Now().After(ends):
			d.Next, d.Looked = d.link(last.String()), true
			return nil
		}
		query.Start, query.Count = last.next().String(), 1000
	}
}

// deadData is of the page of dead letters.
type deadData struct {
	Topic, Dead string
	letterFilter
	AllKinds          []string
	Count             int64
	Letters           []letter
	First, Next       string
	Looked            int // how many letters were looked at, if the page was not filled
	MayReplay, MayDel bool
}

func (h *Handler) deadPage(w http.ResponseWriter, r *http.Request) error {
	topic, err := h.topic(r)
	if err != nil {
		return err
	}
	query := r.URL.Query()
	d := deadData{
		Topic: topic, Dead: h.config.DeadLetterTopic(topic), AllKinds: kinds, MayReplay: h.may(r, Replay, topic, ""), MayDel: h.may(r, Delete, topic, ""),
	}
	if d.letterFilter, err = parseFilter(query, time.Now()); err != nil {
		return err
	}
	after := entryID{}
	if s := query.Get("after"); s != "" {
		if after, err = parseID(s); err != nil {
			return failure{400, "After: " + err.Error() + "."}
		}
		d.First = d.link("")
	}
	queue, err := h.queue(topic)
	if err != nil {
		return err
	}
	if d, err = ask(h, r, func(ctx context.Context) (deadData, error) { return d, d.read(ctx, queue, after) }); err != nil {
		return err
	}
	return h.show(w, http.StatusOK, "dead", h.pageOf(r, "Dead letters", topic, d))
}

// link returns a reference to this page, after a letter.
func (d *deadData) link(after string) string {
	return link("dead", append(d.values(), "t", d.Topic, "after", after)...)
}

func (d *deadData) read(ctx context.Context, queue *goxstreams.DeadLetterQueue, after entryID) (err error) {
	if d.Count, err = queue.Count(ctx); err != nil {
		return err
	}
	ends := time.Now().Add(scanBound)
	looked := 0
	last := after
	return d.scan(ctx, queue, d.Topic, after, func(l letter) bool {
		if len(d.Letters) == rows {
			d.Next = d.link(last.String())
			return false
		}
		l.Message, l.Fields = nil, nil // the list shows nothing of them, and they may be large
		d.Letters = append(d.Letters, l)
		return true
	}, func(id entryID) bool {
		last = id
		if looked++; time.Now().After(ends) {
			d.Next, d.Looked = d.link(last.String()), looked
			return false
		}
		return true
	})
}

// delayedData is of the page of delayed messages.
type delayedData struct {
	Topic       string
	Count       int64
	Messages    []goxstreams.DelayedMessage
	First, Next string
	MayCancel   bool
}

func (h *Handler) delayedPage(w http.ResponseWriter, r *http.Request) error {
	topic, err := h.topic(r)
	if err != nil {
		return err
	}
	d := delayedData{Topic: topic, MayCancel: h.may(r, Cancel, topic, "")}
	var due time.Time
	ms, uuid, ok := strings.Cut(r.URL.Query().Get("after"), "-")
	if ok {
		n, err := strconv.ParseInt(ms, 10, 64)
		if err != nil {
			return failure{400, "After: want milliseconds, a dash and a UUID."}
		}
		due, d.First = time.UnixMilli(n), link("delayed", "t", topic)
	}
	schedule, err := goxstreams.NewSchedule(h.config.Client, topic)
	if err != nil {
		return err
	}
	if d, err = ask(h, r, func(ctx context.Context) (delayedData, error) { return d, d.read(ctx, schedule, due, uuid) }); err != nil {
		return err
	}
	return h.show(w, http.StatusOK, "delayed", h.pageOf(r, "Delayed messages", topic, d))
}

func (d *delayedData) read(ctx context.Context, schedule *goxstreams.Schedule, due time.Time, uuid string) (err error) {
	if d.Count, err = schedule.Count(ctx); err != nil {
		return err
	}
	for m, err := range schedule.After(ctx, due, uuid) {
		if err != nil && m.UUID == "" {
			return err
		}
		if len(d.Messages) == rows {
			last := d.Messages[rows-1]
			d.Next = link("delayed", "t", d.Topic, "after", strconv.FormatInt(last.Due.UnixMilli(), 10)+"-"+last.UUID)
			break
		}
		m.Message, m.Fields = nil, nil
		d.Messages = append(d.Messages, m)
	}
	return nil
}

// until returns how long it is until a message is due.
func until(due time.Time) string {
	if in := time.Until(due); in >= 0 {
		return "in " + ago(in)
	}
	return "overdue for " + ago(time.Since(due))
}

// messageData is of the page of a message.
type messageData struct {
	Topic, ID, From string // From: "", "dead" or "delayed"

	UUID     string
	Metadata [][2]string
	Fields   []fieldSize
	More     bool // metadata or fields
	Size     int  // bytes of the payload
	Message  bool // it was decoded
	Payload  string
	Cut      bool // the payload is longer
	Rendered bool

	Letter    *letter // From dead
	Due       *time.Time
	MayReplay bool
	MayDel    bool
	MayCancel bool
}

// fieldSize is a field of an entry, without its value, which may be the payload.
type fieldSize struct {
	Name string
	Size int
}

// How much of a message is shown: its size is its publisher's matter.
const (
	maxPayload = 64 << 10 // bytes
	maxFields  = 200      // fields, or keys of metadata; of each value 4,000 characters
)

func (h *Handler) messagePage(w http.ResponseWriter, r *http.Request) error {
	topic, err := h.topic(r)
	if err != nil {
		return err
	}
	query := r.URL.Query()
	d := messageData{Topic: topic, ID: query.Get("id"), From: query.Get("from"), UUID: query.Get("uuid")}
	if err := h.authorize(r, Action{Verb: ViewMessage, Topic: topic, ID: cmp.Or(d.ID, d.UUID)}); err != nil {
		return err
	}
	title, read := "Message "+short(40, d.ID), h.readEntry
	switch d.From {
	case "dead":
		title, read = "Dead letter "+short(40, d.ID), h.readLetter
		d.MayReplay, d.MayDel = h.may(r, Replay, topic, ""), h.may(r, Delete, topic, "")
	case "delayed":
		title, read = "Delayed message "+short(40, d.UUID), h.readDelayed
		d.MayCancel = h.permitted(r, Action{Verb: Cancel, Topic: topic, ID: d.UUID}) == nil
	}
	type found struct {
		data messageData
		msg  *message.Message
	}
	f, err := ask(h, r, func(ctx context.Context) (found, error) {
		msg, err := read(ctx, &d)
		return found{d, msg}, err
	})
	if err != nil {
		return err
	}
	d = f.data
	if f.msg != nil {
		d.describe(f.msg)
		d.render(h, r, f.msg)
	}
	p := h.pageOf(r, title, topic, d)
	switch d.From {
	case "dead":
		p.Crumbs = append(p.Crumbs, crumb{"Dead letters", link("dead", "t", topic)})
	case "delayed":
		p.Crumbs = append(p.Crumbs, crumb{"Delayed messages", link("delayed", "t", topic)})
	}
	return h.show(w, http.StatusOK, "message", p)
}

// errNoMessage is about an entry or a UUID.
var errNoMessage = failure{http.StatusNotFound, "There is no such message any more: it was handled, trimmed, moved, cancelled or deleted."}

func (d *messageData) id() (entryID, error) {
	id, err := parseID(d.ID)
	if err != nil {
		return id, failure{400, "ID: " + err.Error() + "."}
	}
	return id, nil
}

func (h *Handler) readEntry(ctx context.Context, d *messageData) (*message.Message, error) {
	id, err := d.id()
	if err != nil {
		return nil, err
	}
	entries, err := h.config.Client.XRange(ctx, d.Topic, id.String(), id.String()).Result()
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return nil, errNoMessage
	}
	var names []string
	for name, value := range entries[0].Values {
		text, _ := value.(string)
		names = append(names, name, text)
	}
	d.fields(names)
	msg, err := goxstreams.DefaultMarshaler{}.Unmarshal(entries[0].Values)
	if err != nil {
		return nil, nil // of another format: there are its fields
	}
	return msg, nil
}

func (h *Handler) readLetter(ctx context.Context, d *messageData) (*message.Message, error) {
	id, err := d.id()
	if err != nil {
		return nil, err
	}
	queue, err := h.queue(d.Topic)
	if err != nil {
		return nil, err
	}
	err = letterFilter{ids: map[entryID]bool{id: true}, after: id.previous(), until: id.next()}.scan(ctx, queue, d.Topic, entryID{},
		func(l letter) bool { d.Letter = &l; return false }, func(entryID) bool { return true })
	switch {
	case err != nil:
		return nil, err
	case d.Letter == nil:
		return nil, errNoMessage
	}
	d.fields(d.Letter.Fields)
	return d.Letter.Message, nil
}

func (h *Handler) readDelayed(ctx context.Context, d *messageData) (*message.Message, error) {
	schedule, err := goxstreams.NewSchedule(h.config.Client, d.Topic)
	if err != nil {
		return nil, err
	}
	m, err := schedule.Get(ctx, d.UUID)
	if err != nil && errors.As(err, new(*goxstreams.NotFoundError)) {
		return nil, errNoMessage
	}
	if err != nil && m.UUID == "" {
		return nil, err
	}
	d.Due = &m.Due
	d.fields(m.Fields)
	return m.Message, nil
}

// fields keeps names and sizes.
func (d *messageData) fields(fields []string) {
	for i := 0; i+1 < len(fields); i += 2 {
		d.Fields = append(d.Fields, fieldSize{fields[i], len(fields[i+1])})
	}
	slices.SortStableFunc(d.Fields, func(a, b fieldSize) int { return cmp.Compare(a.Name, b.Name) })
	d.More = d.More || len(d.Fields) > maxFields
	d.Fields = d.Fields[:min(len(d.Fields), maxFields)]
}

func (d *messageData) describe(msg *message.Message) {
	d.Message, d.UUID, d.Size = true, msg.UUID, len(msg.Payload)
	for name, value := range msg.Metadata {
		d.Metadata = append(d.Metadata, [2]string{name, value})
	}
	slices.SortFunc(d.Metadata, func(a, b [2]string) int { return cmp.Compare(a[0], b[0]) })
	d.More = len(d.Metadata) > maxFields
	d.Metadata = d.Metadata[:min(len(d.Metadata), maxFields)]
}

// render shows what Config.Render allows.
func (d *messageData) render(h *Handler, r *http.Request, msg *message.Message) {
	if h.config.Render == nil {
		return
	}
	text := h.config.Render(r, d.Topic, msg)
	d.Rendered = text != ""
	if d.Cut = len(text) > maxPayload; d.Cut {
		text = strings.ToValidUTF8(text[:maxPayload], "")
	}
	d.Payload = text
}

// jobData is of the page of a job.
type jobData struct {
	ID    string
	Verb  Verb
	Topic string
	jobState
	Filter letterFilter
	May    bool
}

// Is reports whether the job is in a phase.
func (d jobData) Is(p string) bool { return string(d.Phase) == p }

func (h *Handler) jobPage(w http.ResponseWriter, r *http.Request) error {
	j, err := h.jobOf(r, r.URL.Query().Get("id"))
	if err != nil {
		return err
	}
	d := jobData{ID: j.ID, Verb: j.Verb, Topic: j.Topic, Filter: j.Filter, jobState: h.jobs.state(j), May: h.may(r, j.Verb, j.Topic, "")}
	title := "Replay dead letters"
	if j.Verb == Delete {
		title = "Delete dead letters"
	}
	p := h.pageOf(r, title, j.Topic, d)
	p.Crumbs = append(p.Crumbs, crumb{"Dead letters", link("dead", "t", j.Topic)})
	if d.Phase != ended {
		p.Events = link("events", "job", j.ID)
	}
	if d.Phase.active() {
		p.Refresh = 1
	}
	return h.show(w, http.StatusOK, "job", p)
}
