package browsertest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxui"
)

// refs are all kinds of pages.
func (s *site) refs() map[string]string {
	s.t.Helper()
	letter, err := s.client.XRangeN(s.t.Context(), goxstreams.DeadLetterTopic("orders"), "-", "+", 1).Result()
	require.NoError(s.t, err)
	pending, err := s.client.XPendingExt(s.t.Context(), &redis.XPendingExtArgs{Stream: "orders", Group: "billing", Start: "-", End: "+", Count: 1}).Result()
	require.NoError(s.t, err)
	return map[string]string{
		"topics": "", "topic": "topic?t=orders", "group": "group?t=orders&g=billing", "dead": "dead?t=orders", "delayed": "delayed?t=orders",
		"letter": "message?t=orders&from=dead&id=" + letter[0].ID, "pending": "message?t=orders&id=" + pending[0].ID,
		"waiting": "message?t=orders&from=delayed&uuid=order-2000", "none": "dead?t=orders&reason=none",
	}
}

// From page to page by clicks, and each action once.
func TestEveryPageAndAction(t *testing.T) {
	t.Parallel()
	s := world(t, 6)
	p := s.open("")
	p.sees("1 topic", "orders")
	p.click("orders")
	p.sees("Published per second", "billing")
	p.click("billing")
	p.sees("pod-7", "Pending entries")
	p.click("Pause the group")
	p.sees("The group is paused.", "Paused since")
	p.click("Resume the group")
	p.sees("The group is resumed.", "Pause the group")
	p.do(chromedp.SetValue(`input[name=consumer]`, "nobody"))
	p.click("Show")
	p.sees("None.")
	p.do(chromedp.SetValue(`input[name=consumer]`, "pod-7"))
	p.click("Show")
	p.until(`document.querySelectorAll("#pending tbody tr").length === 3`)
	p.do(chromedp.Click("#pending tbody a"))
	p.sees("UUID order-1001", "tenant", "16 bytes, not shown")
	assert.False(t, eval[bool](p, `document.documentElement.outerHTML.includes("secret")`))

	p.click("orders")
	p.click("6 dead letters")
	p.sees("6 entries in orders.dead{orders}", "the card was declined", "unknown currency XXX")
	p.do(chromedp.Click("tbody a"))
	p.sees("Reason", "Handler", "bill", "UUID order-")
	p.click("Delete…")
	p.sees("Delete 1 dead letter of orders")
	p.click("Do nothing")
	p.do(chromedp.SetValue(`input[name=reason]`, "currency"), chromedp.Click(`.filter input[value=permanent]`))
	p.click("Show")
	p.until(`document.querySelectorAll("tbody tr").length === 3`)
	p.do(chromedp.Click(`thead input[type=checkbox]`)) // all of the page
	p.do(chromedp.Click(`tbody input[type=checkbox]`)) // but the first
	p.click("Replay…")
	p.sees("Replay 2 dead letters of orders")
	p.click("Replay 2")
	p.sees("Replayed 2 of 2 dead letters.")
	assert.EqualValues(t, 4, s.letters())
	p.click("Dead letters of orders")
	p.do(chromedp.Click(`input[name=which][value=all]`))
	p.click("Delete…")
	p.sees("Delete 4 dead letters of orders")
	p.click("Delete 4")
	p.sees("Deleted 4 of 4 dead letters.")
	assert.Zero(t, s.letters())

	p.click("orders")
	p.click("3 delayed messages")
	p.sees("order-2000", "in 59 min")
	p.click("Cancel…")
	p.sees("A message that is cancelled is never delivered.")
	p.click("Cancel this message")
	p.sees("The message is cancelled.", "2 delayed messages")
}

// A page changes by itself, without a reload, and keeps the focus; until somebody stops that.
func TestLive(t *testing.T) {
	t.Parallel()
	s := world(t, 2)
	p := s.open("")
	p.sees("1 topic")
	eval[bool](p, `window.same = true; document.querySelector("tbody a").focus(); true`)
	s.publish("another", order(1))
	s.publish("orders", order(2))
	p.until(`document.querySelector("tbody tr[data-key=orders] td").innerText === "7"`)
	assert.True(t, eval[bool](p, `window.same && document.activeElement.textContent === "orders"`))
	p.until(`document.querySelector(".chart polyline") !== null`)
	p.click("Pause updates")
	p.sees("Paused.", "Resume updates")
	s.publish("orders", order(3))
	other := s.open("")
	other.until(`document.querySelector("tbody tr[data-key=orders] td").innerText === "8"`)
	assert.Equal(t, "7", eval[string](p, `document.querySelector("tbody tr[data-key=orders] td").innerText`))
	p.click("Resume updates")
	p.until(`document.querySelector("tbody tr[data-key=orders] td").innerText === "8"`)
}

// A thousand letters are replayed, with a bar, while somebody else looks on.
func TestReplayAThousandAndTwoViewers(t *testing.T) {
	t.Parallel()
	s := world(t, 1000)
	p, other := s.open("dead?t=orders"), s.open("")
	other.sees("1,000")
	p.sees("1,000 entries")
	p.do(chromedp.Click(`input[name=which][value=all]`))
	p.click("Replay…")
	p.sees("Replay 1,000 dead letters of orders")
	p.click("Replay 1,000")
	p.sees("Replayed 1,000 of 1,000 dead letters.")
	assert.False(t, eval[bool](p, `document.body.hasAttribute("data-events")`), "it is over")
	other.until(`document.querySelector("tbody tr[data-key=orders] td[data-label=Dead]").innerText === "0"`)
	assert.Zero(t, s.letters())
	n, err := s.client.XLen(t.Context(), "orders").Result()
	require.NoError(t, err)
	assert.EqualValues(t, 2004, n)
}

// Redis goes away and comes back: the pages say so, and go on by themselves.
func TestRedisAwayAndBack(t *testing.T) {
	t.Parallel()
	server := testserver.Private(t, "--appendonly", "yes", "--appendfsync", "always")
	s := serve(t, server.Client(), goxui.Config{Authorize: everything})
	s.fill(2)
	p, group := s.open(""), s.open("group?t=orders&g=billing")
	p.sees("orders")
	group.sees("pod-7")
	for _, tab := range []*tab{p, group} {
		tab.mu.Lock()
		tab.expected = true // answers of 503
		tab.mu.Unlock()
	}
	server.Kill()
	p.sees("Redis does not answer. Numbers are from")
	group.sees("Redis does not answer.", "pod-7")
	p.sees("orders")
	server.Restart()
	p.until(`!document.body.innerText.includes("does not answer")`)
	group.until(`!document.body.innerText.includes("does not answer")`)
	s.publish("orders", order(7))
	p.until(`document.querySelector("tbody tr[data-key=orders] td").innerText === "7"`)
}

// Without JavaScript everything works.
func TestWithoutJavaScript(t *testing.T) {
	t.Parallel()
	s := world(t, 4)
	p := s.open("", send(emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true}))
	p.sees("1 topic", "orders")
	assert.True(t, eval[bool](p, `document.getElementById("live-toggle").hidden`), "no script runs")
	p.click("orders")
	p.click("4 dead letters")
	p.do(chromedp.Click(`tbody tr:nth-child(2) input[type=checkbox]`))
	p.click("Replay…")
	p.click("Replay 1")
	p.sees("Replayed 1 of 1 dead letters.")
	p.click("Dead letters of orders")
	p.do(chromedp.Click(`input[name=which][value=all]`))
	p.click("Delete…")
	p.click("Delete 3")
	p.sees("Deleted 3 of 3 dead letters.")
	assert.Zero(t, s.letters())
}

// With the keyboard alone: the focus can be seen, goes everywhere, and a letter is deleted.
func TestKeyboard(t *testing.T) {
	t.Parallel()
	s := world(t, 3)
	p := s.open("")
	p.sees("1 topic")
	// tab presses Tab until an element has the focus.
	tab := func(is string) {
		t.Helper()
		for range 60 {
			p.do(chromedp.KeyEvent(kb.Tab))
			if eval[bool](p, `(() => { const e = document.activeElement; return `+is+` })()`) {
				assert.NotEqual(t, "none", eval[string](p, `getComputedStyle(document.activeElement).outlineStyle`))
				return
			}
		}
		require.Fail(t, "cannot be reached: "+is)
	}
	tab(`e.textContent === "Skip to the content"`)
	assert.True(t, eval[bool](p, `document.activeElement.getBoundingClientRect().left >= 0`), "it is seen")
	p.do(chromedp.KeyEvent(kb.Enter))
	tab(`e.textContent.includes("dead letters of orders")`)
	p.do(chromedp.KeyEvent(kb.Enter))
	p.sees("3 entries")
	tab(`e.name === "do" && e.value === "delete"`)
	tab(`e.name === "id"`)
	p.do(chromedp.KeyEvent(" "))
	assert.Equal(t, 1, eval[int](p, `document.querySelectorAll("tbody input:checked").length`))
	p.visit("dead?t=orders")
	tab(`e.name === "which"`)
	p.do(chromedp.KeyEvent(kb.ArrowDown))
	tab(`e.name === "do" && e.value === "delete"`)
	p.do(chromedp.KeyEvent(kb.Enter))
	p.sees("Delete 3 dead letters")
	tab(`e.value === "confirm"`)
	p.do(chromedp.KeyEvent(kb.Enter))
	p.sees("Deleted 3 of 3")
	assert.Zero(t, s.letters())
}

// contrast returns what has too little of it: less than 4.5 to 1 (WCAG AA).
const contrast = `(() => {
	const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 }); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
	const parse = (s) => s.match(/[\d.]+/g).map(Number);
	const back = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3) } return [255, 255, 255] };
	const bad = [];
	for (const e of document.querySelectorAll("body *")) {
		if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.closest("[hidden]") || !e.checkVisibility()) continue;
		const a = light(parse(getComputedStyle(e).color).slice(0, 3)), b = light(back(e));
		const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
		if (ratio < 4.5) bad.push(e.outerHTML.slice(0, 100) + " " + ratio.toFixed(2));
	}
	return bad;
})()`

// At 400 pixels nothing is cut off or needs scrolling to the side; dark and light have contrast; everything
// that can be operated has a name for those who do not see it.
func TestNarrowDarkAndNamed(t *testing.T) {
	t.Parallel()
	s := world(t, 3)
	long := strings.Repeat("long-", 60)
	s.publish(long, order(1))
	require.NoError(t, s.client.XGroupCreate(t.Context(), long, long, "0").Err())
	refs := s.refs()
	refs["long topic"], refs["long group"] = "topic?t="+long, "group?t="+long+"&g="+long
	for _, scheme := range []string{"light", "dark"} {
		p := s.open("", chromedp.EmulateViewport(400, 800), colors(scheme))
		p.until(`document.body.innerText.includes("long-")`)
		for name, ref := range refs {
			p.visit(ref)
			p.do(chromedp.WaitVisible("h1"))
			assert.LessOrEqual(t, eval[int](p, `document.documentElement.scrollWidth`), 400, name)
			assert.Empty(t, eval[[]string](p, contrast), "%s, %s", name, scheme)
			p.named(name)
		}
		assert.Equal(t, scheme == "dark", eval[bool](p, `getComputedStyle(document.body).backgroundColor !== "rgb(255, 255, 255)"`))
	}
}

// colors makes the page dark or light.
func colors(scheme string) step {
	return send(emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	})
}

// named fails the test if something that can be operated has no name, or the page no landmark and heading.
func (p *tab) named(page string) {
	p.t.Helper()
	tree, err := chromedp.Run(p.ctx, func(ctx context.Context, t *chromedp.Target) (accessibility.GetFullAXTreeResult, error) {
		return cdp.Call(ctx, t, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
	})
	require.NoError(p.t, err)
	roles := map[string]int{}
	for _, n := range tree.Nodes {
		if n.Ignored || n.Role == nil {
			continue
		}
		role := strings.Trim(string(n.Role.Value), `"`)
		roles[role]++
		switch role {
		case "link", "button", "textbox", "searchbox", "checkbox", "radio", "combobox", "table", "progressbar", "image", "form", "group", "navigation":
			name := ""
			if n.Name != nil {
				name = strings.Trim(string(n.Name.Value), `"`)
			}
			assert.NotEmpty(p.t, name, "%s: a %s has no name", page, role)
		}
	}
	assert.Equal(p.t, 1, roles["main"], page)
	assert.Positive(p.t, roles["heading"], page)
}

var screenshots = flag.String("screenshots", "", "a directory: make the screenshots of the docs there")

// TestScreenshots makes the screenshots of the docs: CONTRIBUTING.md has the command.
func TestScreenshots(t *testing.T) {
	if *screenshots == "" {
		t.Skip("only with -screenshots")
	}
	s := world(t, 460)
	for i, name := range []string{"invoices", "mails", "reminders", "shipments"} {
		for n := range 30 * (i + 1) {
			s.publish(name, order(n))
		}
		require.NoError(t, s.client.XGroupCreate(t.Context(), name, "workers", "$").Err())
	}
	p := s.open("", chromedp.EmulateViewport(1000, 420))
	p.sees("5 topics")
	for i := range 25 { // something for the charts: a look later, something else is published
		at := eval[string](p, `document.querySelector("tbody").innerHTML`)
		for n := range 1 + i*i%7 {
			s.publish([]string{"orders", "invoices", "mails", "reminders", "shipments"}[(n*i)%5], order(n))
		}
		p.until(fmt.Sprintf(`document.querySelector("tbody").innerHTML !== %q`, at))
	}
	shot := func(name string) {
		png, err := chromedp.Run(p.ctx, chromedp.CaptureScreenshot())
		require.NoError(t, err)
		assert.Less(t, len(png), 150<<10, name)
		require.NoError(t, os.WriteFile(filepath.Join(*screenshots, name+".png"), png, 0o644))
	}
	shot("operations-topics")
	p.do(colors("dark"))
	p.visit("dead?t=orders&reason=currency")
	p.sees("unknown currency XXX")
	p.do(chromedp.EmulateViewport(1000, 560))
	shot("operations-dead-letters")
}
