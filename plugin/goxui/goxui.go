// Package goxui is an operations page: an http.Handler that shows topics, groups,
// consumers, pending entries, dead letters and delayed messages, and lets those who may
// replay, delete, cancel, pause and resume. See docs/operations-page.md.
//
// Pages are rendered by the server and work without JavaScript. With it they are updated
// while they are looked at, by server-sent events.
package goxui

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
)

// Config configures a Handler. Only Client is required.
type Config struct {
	// Client is used for everything. The caller owns it.
	Client redis.UniversalClient

	// Topics are shown whether they exist or not. Pattern is one of Redis's, such as
	// "orders*": streams whose names match are shown too. They are looked for by SCAN, at
	// most once a minute while somebody looks at a page. Default: Topics alone, or without
	// Topics the pattern "*". Of more than 10,000 topics the first by name are shown. What
	// is not shown cannot be reached by its URL either.
	Topics  []string
	Pattern string

	// DeadLetterTopic is SubscriberConfig.DeadLetterTopic. Default:
	// goxstreams.DeadLetterTopic.
	DeadLetterTopic func(topic string) string

	// Authorize decides whether a request may do something; an error refuses it, and its
	// text is shown. It is called for each page and for each topic in the list of topics,
	// to hide what may not be seen, and to decide which buttons a page has, so it should be
	// fast. Default: everybody who reaches the Handler may see everything, and nobody may
	// change anything.
	Authorize func(r *http.Request, a Action) error

	// Audit is called when something was refused, and before and after something is
	// changed. A replay or a delete ends later than its request: r is then the request that
	// confirmed it, and its context is not canceled. Audit may be called by several
	// goroutines at once.
	Audit func(r *http.Request, e AuditEvent)

	// Render returns what the page of a message shows of its payload, as text; nothing if
	// it is empty. At most 64 KiB are shown. Default: no payload is shown, only its size.
	Render func(r *http.Request, topic string, msg *message.Message) string

	// Interval is the time between two looks at Redis while somebody looks at a page. All
	// viewers share one look. Default 2 s, at least 100 ms. It becomes longer, up to
	// 30 s, if a look takes more than a hundredth of it: with thousands of topics.
	Interval time.Duration

	// Hosts are the names by which the pages are reached, without ports. Other names are
	// refused, which stops DNS rebinding: without it, any web page can make a browser talk
	// to a server of its user's machine or private network under a name of its own. Set it
	// unless every request is authenticated. Default: any name.
	Hosts []string

	// Logger gets errors. Default: none are logged.
	Logger watermill.LoggerAdapter
}

// Handler serves the pages. Mount it at a path that ends in a slash: it looks at what
// follows the last slash, so http.StripPrefix makes no difference. It has no state in Redis.
// Replays and deletes under way live in the process: with several processes behind a load
// balancer, requests of one browser must reach the same one.
type Handler struct {
	config    Config
	csrf      *http.CrossOriginProtection
	collector *collector
	jobs      jobs

	asking  chan struct{} // one for each request that waits for Redis
	viewers atomic.Int64  // of events

	ctx  context.Context // until Close
	stop context.CancelFunc

	mu      sync.Mutex
	closed  bool
	running sync.WaitGroup // looks, questions and jobs
}

// maxAsking bounds how many requests wait for Redis at a time: one that hangs must not
// collect goroutines.
const maxAsking = 16

// New returns a Handler. It does not ask Redis yet.
func New(config Config) (*Handler, error) {
	var errs []error
	fail := func(field, problem string) { errs = append(errs, fmt.Errorf("goxui: Config.%s: %s", field, problem)) }
	if isNil(config.Client) {
		fail("Client", "a client is required")
	}
	if slices.Contains(config.Topics, "") {
		fail("Topics", "one is empty")
	}
	if slices.Contains(config.Hosts, "") {
		fail("Hosts", "one is empty")
	}
	if config.Interval == 0 {
		config.Interval = 2 * time.Second
	}
	if config.Interval < 100*time.Millisecond {
		fail("Interval", fmt.Sprintf("%v is less than 100ms", config.Interval))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if config.Pattern == "" && len(config.Topics) == 0 {
		config.Pattern = "*"
	}
	if config.DeadLetterTopic == nil {
		config.DeadLetterTopic = goxstreams.DeadLetterTopic
	}
	if config.Logger == nil {
		config.Logger = watermill.NopLogger{}
	}
	config.Topics, config.Hosts = slices.Clone(config.Topics), slices.Clone(config.Hosts)
	h := &Handler{config: config, csrf: http.NewCrossOriginProtection(), asking: make(chan struct{}, maxAsking)}
	h.ctx, h.stop = context.WithCancel(context.Background())
	h.collector = newCollector(h)
	return h, nil
}

func isNil(c redis.UniversalClient) bool {
	v := reflect.ValueOf(c)
	return c == nil || v.Kind() == reflect.Pointer && v.IsNil()
}

// Close ends the replays and deletes under way, between two calls of 100 letters, and the
// events of all pages, and waits for what is being asked of Redis. Call it before
// http.Server.Shutdown, which would wait for the events. It may be called more than once.
func (h *Handler) Close() {
	h.stop()
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.running.Wait()
}

// spawn runs f in a goroutine for which Close waits, or returns false after Close. A panic of f, which
// may call functions of the Config, is an error, and not the end of the process.
func (h *Handler) spawn(f func(), panicked func(error)) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.running.Go(func() {
		defer func() {
			if p := recover(); p != nil {
				err := fmt.Errorf("panic: %v", p)
				h.config.Logger.Error("A panic", fmt.Errorf("%w\n%s", err, debug.Stack()), nil)
				panicked(failure{http.StatusInternalServerError, "Something is wrong here: see the log."})
			}
		}()
		f()
	})
	return true
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	secure(w.Header())
	name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	route, found := routes[name]
	err := h.reachedBy(r)
	switch {
	case err != nil:
	case isolated(r):
		err = failure{http.StatusForbidden, "The request comes from another site."}
	case !found:
		err = failure{http.StatusNotFound, "There is no such page."}
	case r.Method == http.MethodPost && route.post != nil:
		if err = h.sameOrigin(r); err == nil {
			r.Body = http.MaxBytesReader(w, r.Body, maxForm)
			err = route.post(h, w, r)
		}
	case (r.Method == http.MethodGet || r.Method == http.MethodHead) && route.get != nil:
		err = route.get(h, w, r)
	default:
		err = failure{http.StatusMethodNotAllowed, "The page does not take this method."}
	}
	if err != nil {
		h.fail(w, r, err)
	}
}

// maxForm is far more than all check boxes of a page.
const maxForm = 256 << 10

// route is what answers under a name.
type route struct {
	get, post func(h *Handler, w http.ResponseWriter, r *http.Request) error
}

var routes map[string]route

func init() {
	routes = map[string]route{
		"":          {get: (*Handler).topicsPage},
		"topic":     {get: (*Handler).topicPage},
		"group":     {get: (*Handler).groupPage, post: (*Handler).pauseGroup},
		"dead":      {get: (*Handler).deadPage, post: (*Handler).startJob},
		"delayed":   {get: (*Handler).delayedPage},
		"message":   {get: (*Handler).messagePage, post: (*Handler).cancelDelayed},
		"job":       {get: (*Handler).jobPage, post: (*Handler).changeJob},
		"events":    {get: (*Handler).events},
		"style.css": {get: static("style.css", "text/css; charset=utf-8")},
		"live.js":   {get: static("live.js", "text/javascript; charset=utf-8")},
		"icon.svg":  {get: static("icon.svg", "image/svg+xml")},
	}
}

// secure sets headers of every answer. Pages have no inline script, style or handler, so none
// that somebody injects would run. With a Referrer-Policy of no-referrer, browsers would send
// "Origin: null" with forms, which is no origin to compare.
func secure(header http.Header) {
	header.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "+
		"form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("X-Frame-Options", "DENY") // for browsers that do not know frame-ancestors
	header.Set("Referrer-Policy", "same-origin")
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	header.Set("Cache-Control", "no-store")
}

// sameOrigin refuses what another site makes a browser send. CrossOriginProtection compares
// Sec-Fetch-Site, or, where a browser does not send it (old ones; to plain HTTP), Origin with
// Host. A request with neither passes there, as one of a program that is no browser; but some
// browsers before 2020 sent forms like that, so it does not pass here.
func (h *Handler) sameOrigin(r *http.Request) error {
	if r.Header.Get("Sec-Fetch-Site") == "" && r.Header.Get("Origin") == "" {
		return failure{http.StatusForbidden, "The request has neither of the headers Sec-Fetch-Site and Origin, so it might come from another site."}
	}
	if err := h.csrf.Check(r); err != nil {
		return failure{http.StatusForbidden, "The request comes from another site."}
	}
	return nil
}

// isolated reports whether another site asks for something that it could neither show nor read: it may
// link to a page, and nothing else. Otherwise it could hold connections of events.
func isolated(r *http.Request) bool {
	return r.Header.Get("Sec-Fetch-Site") == "cross-site" && r.Header.Get("Sec-Fetch-Mode") != "navigate"
}

// reachedBy refuses names that are not in Config.Hosts.
func (h *Handler) reachedBy(r *http.Request) error {
	if len(h.config.Hosts) == 0 {
		return nil
	}
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.Trim(host, "[]")
	if slices.ContainsFunc(h.config.Hosts, func(allowed string) bool { return strings.EqualFold(allowed, host) }) {
		return nil
	}
	return failure{http.StatusMisdirectedRequest, "The page is not served under this name."}
}

// ask runs f, which asks Redis, for as long as a page may take in the worst case. A client that
// waits for an answer heeds no context: f goes on then, and its result is lost.
func ask[T any](h *Handler, r *http.Request, f func(ctx context.Context) (T, error)) (T, error) {
	const bound = 3 * time.Second
	type result struct {
		value T
		err   error
	}
	var none T
	select {
	case h.asking <- struct{}{}:
	default:
		return none, failure{http.StatusServiceUnavailable, "Too many requests wait for Redis."}
	}
	ctx, cancel := context.WithTimeout(r.Context(), bound)
	done := make(chan result, 1)
	if !h.spawn(func() {
		defer func() { <-h.asking }()
		defer cancel()
		value, err := f(ctx)
		done <- result{value, err}
	}, func(err error) { done <- result{none, err} }) {
		cancel()
		<-h.asking
		return none, errClosed
	}
	timer := time.NewTimer(bound)
	defer timer.Stop()
	select {
	case got := <-done:
		return got.value, got.err
	case <-timer.C:
		return none, errNoAnswer
	case <-h.ctx.Done():
		return none, errClosed
	}
}

// errClosed is the answer after Close.
var errClosed = failure{http.StatusServiceUnavailable, "The page is being closed."}
