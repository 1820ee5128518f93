package browsertest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxui"
)

// enough is a bound that only a hanging test reaches.
const enough = time.Minute

// browser is the one browser of all tests.
var browser context.Context

type running struct{ m *testing.M }

// Run starts the browser.
func (r running) Run() int {
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]), chromedp.NoSandbox) // as root there is no sandbox
	allocator, stop := chromedp.NewExecAllocator(context.Background(), options...)
	defer stop()
	ctx, end := chromedp.NewContext(allocator)
	defer end()
	if err := chromedp.Do(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "browsertest: no Chromium (Debian's package chromium):", err)
		return 1
	}
	browser = ctx
	return r.m.Run()
}

func TestMain(m *testing.M) {
	if addr := os.Getenv(envChild); addr != "" {
		child(addr)
		return
	}
	os.Exit(running{m}.Run())
}

// site is the pages on a server.
type site struct {
	t      *testing.T
	client *redis.Client
	url    string
}

func serve(t *testing.T, client *redis.Client, config goxui.Config) *site {
	t.Helper()
	config.Client = client
	if config.Interval == 0 {
		config.Interval = 200 * time.Millisecond
	}
	handler, err := goxui.New(config)
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.Handle("/ops/", handler)
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	t.Cleanup(handler.Close)
	return &site{t, client, server.URL + "/ops/"}
}

// everything is an Authorize that allows everything.
func everything(*http.Request, goxui.Action) error { return nil }

// world returns a site with a topic of everything, on a server of its own.
func world(t *testing.T, letters int) *site {
	t.Helper()
	server := testserver.Private(t)
	s := serve(t, server.Client(), goxui.Config{Authorize: everything})
	s.fill(letters)
	return s
}

// order is a message.
func order(i int) *message.Message {
	msg := message.NewMessage(fmt.Sprintf("order-%d", i), []byte("a-secret-payload"))
	msg.Metadata.Set("tenant", "t7")
	return msg
}

// fill fills the topic orders: the group billing lets messages die, holds some, and has not read others.
func (s *site) fill(letters int) {
	s.t.Helper()
	ctx := s.t.Context()
	var orders []*message.Message
	for i := range letters {
		orders = append(orders, order(i))
	}
	s.die("orders", orders...)
	s.publish("orders", order(1001), order(1002), order(1003), order(1004))
	require.NoError(s.t, s.client.XReadGroup(ctx, &redis.XReadGroupArgs{Group: "billing", Consumer: "pod-7", Streams: []string{"orders", ">"}, Count: 3}).Err())
	for i := range 3 {
		msg := order(2000 + i)
		delay.Message(msg, delay.For(time.Hour+time.Duration(i)*time.Minute))
		s.publish("orders", msg)
	}
}

func (s *site) publish(topic string, messages ...*message.Message) {
	s.t.Helper()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: s.client}, nil)
	require.NoError(s.t, err)
	require.NoError(s.t, publisher.Publish(topic, messages...))
	require.NoError(s.t, publisher.Close())
}

// die lets messages die of one of two reasons.
func (s *site) die(topic string, messages ...*message.Message) {
	s.t.Helper()
	var dead sync.WaitGroup
	dead.Add(len(messages))
	subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
		Client: s.client, ConsumerGroup: "billing", MaxConcurrency: 20, OnDead: func(context.Context, goxstreams.DeadMessage) { dead.Done() },
	}, nil)
	require.NoError(s.t, err)
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	require.NoError(s.t, err)
	router.AddMiddleware(goxstreams.Retry{MaxRetries: -1}.Middleware)
	router.AddConsumerHandler("bill", topic, subscriber, func(msg *message.Message) error {
		if msg.UUID[len(msg.UUID)-1]%2 == 0 {
			return goxstreams.Permanent(errors.New("the card was declined"))
		}
		return goxstreams.Permanent(errors.New("unknown currency XXX"))
	})
	done := make(chan error, 1)
	go func() { done <- router.Run(context.Background()) }()
	<-router.Running()
	s.publish(topic, messages...)
	dead.Wait()
	require.NoError(s.t, router.Close())
	require.NoError(s.t, <-done)
}

// letters returns how many dead letters there are.
func (s *site) letters() int64 {
	s.t.Helper()
	n, err := s.client.XLen(s.t.Context(), goxstreams.DeadLetterTopic("orders")).Result()
	require.NoError(s.t, err)
	return n
}

// tab is a page in the browser.
type tab struct {
	t   *testing.T
	ctx context.Context
	url string

	mu       sync.Mutex
	problems []string
	expected bool // the console may say something
}

// step is something to do in a tab.
type step = chromedp.Action[chromedp.Void]

// send is a command of the browser's protocol.
func send[P any](command cdp.Command[P, cdp.Empty], params P) step {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, command, params)
		return err
	})
}

// open opens a tab. What the console says against a page, such as what its Content-Security-Policy
// forbids, fails the test.
func (s *site) open(ref string, before ...step) *tab {
	s.t.Helper()
	ctx, cancel := chromedp.NewContext(browser)
	s.t.Cleanup(cancel)
	require.NoError(s.t, chromedp.Do(ctx))
	ctx, cancelTime := context.WithTimeout(ctx, enough)
	s.t.Cleanup(cancelTime)
	p := &tab{t: s.t, ctx: ctx, url: s.url}
	require.NoError(s.t, chromedp.Listen(ctx, func(event any) {
		p.mu.Lock()
		defer p.mu.Unlock()
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			p.problems = append(p.problems, e.ExceptionDetails.Text)
		case *log.EventEntryAdded:
			if !p.expected {
				p.problems = append(p.problems, e.Entry.Text+" "+e.Entry.URL)
			}
		}
	}))
	s.t.Cleanup(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.problems) > 0 {
			s.t.Errorf("the browser complains: %q", p.problems)
		}
	})
	p.do(append(before, send(log.Enable, cdp.Empty{}))...)
	p.visit(ref)
	return p
}

func (p *tab) do(steps ...step) {
	p.t.Helper()
	require.NoError(p.t, chromedp.Do(p.ctx, steps...))
}

func (p *tab) visit(ref string) {
	p.t.Helper()
	p.do(chromedp.Navigate(p.url + ref))
}

// eval returns the value of an expression.
func eval[T any](p *tab, expression string) T {
	p.t.Helper()
	v, err := chromedp.Run(p.ctx, chromedp.Evaluate[T](expression))
	require.NoError(p.t, err)
	return v
}

// sees waits until the page has a text.
func (p *tab) sees(texts ...string) {
	p.t.Helper()
	for _, text := range texts {
		p.until(fmt.Sprintf("document.body && document.body.innerText.replace(/\\s+/g, ' ').includes(%q)", text))
	}
}

// until waits until an expression is true, also across pages.
func (p *tab) until(expression string) {
	p.t.Helper()
	for {
		holds, err := chromedp.Run(p.ctx, chromedp.Evaluate[bool](expression))
		if holds {
			return
		}
		if p.ctx.Err() != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), 5*time.Second)
			text, _ := chromedp.Run(ctx, chromedp.Evaluate[string]("location.href + ' ' + document.body.innerText"))
			cancel()
			require.FailNow(p.t, "never", "%s (%v)\n%s", expression, err, text)
		}
		timer := time.NewTimer(20 * time.Millisecond)
		select {
		case <-timer.C:
		case <-p.ctx.Done():
		}
	}
}

// click clicks with the mouse on a link or a button that has a text.
func (p *tab) click(text string) {
	p.t.Helper()
	path := fmt.Sprintf(`//*[self::a or self::button][contains(normalize-space(.), %q)]`, text)
	p.do(chromedp.Click(path, chromedp.NodeVisible))
}
