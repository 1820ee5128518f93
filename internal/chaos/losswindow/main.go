// Losswindow measures what an acknowledged Publish is worth when the server dies: how many messages for which Publish returned nil
// are gone afterwards, and how old the oldest of them was when the server died. It prints a Markdown table.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// patience bounds one run, which takes some 15 s.
const patience = 3 * time.Minute

func main() {
	runs := flag.Int("n", 5, "repetitions of each case")
	only := flag.String("only", "", "only the cases whose name contains this")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := table(ctx, os.Stdout, *runs, *only); err != nil {
		fmt.Fprintln(os.Stderr, "losswindow:", err)
		os.Exit(1)
	}
}

func table(ctx context.Context, out io.Writer, runs int, only string) error {
	fmt.Fprintln(out, "| case | runs | acknowledged | refused | lost: median, most | window in ms: median, most | lasting ms: median, most |")
	fmt.Fprintln(out, "|---|---|---|---|---|---|---|")
	for _, c := range cases {
		if !strings.Contains(c.name, only) {
			continue
		}
		losses, err := c.measure(ctx, runs)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		fmt.Fprintln(out, row(c.name, losses))
	}
	fmt.Fprint(out, legend)
	return nil
}

const legend = `
One producer, one message a call, each call after the last one's answer. Acknowledged: Publish returned nil, and with WAIT n
that many of the two replicas said that they have the message. Refused: an error instead, all of the retries counted. Lost: acknowledged, and not in the
stream when a master serves again. Window: how long before the SIGKILL the oldest lost message was acknowledged. Lasting: from
there to the newest lost one.

- SIGKILL ends a process and leaves the page cache: what Redis has written is there after the restart, synced or not. A power
  cut or a kernel's crash loses what is not synced, and is not measured here. For appendfsync everysec Redis's documentation
  says one second of writes; with always it is synced before the answer.
- All servers are on one machine: what the master has given to the kernel reaches its replicas even after its death. With a
  network between them, what is on its way is lost: at the least what is written in one trip, with a replica that lags, its lag.
- "cut, then killed": for 3 s no replica takes anything from the master, which goes on serving; then it is killed. The replicas
  are frozen for that time, then killed, too (or they would read what the kernel kept for them, which a cut line does not
  deliver), and started again with their data. Sentinel reaches the master until its end.
- WAIT is the caller's, on the connection that wrote: on another one it says nothing about the message. WAIT 1 of two replicas
  says that one of them has it, not that Sentinel promotes that one: it takes the one that it believes to be furthest, by an INFO
  that may be old. In "cut" the replicas are frozen one after the other, and forget by their restart how far they were: what was
  acknowledged between the two freezes is lost when the first one is promoted.
`

// A loss is the result of one run.
type loss struct {
	acknowledged, refused, lost int
	window, lasting             time.Duration
}

func row(name string, losses []loss) string {
	var acknowledged, refused int
	var lost []int
	var windows, lasting []int64
	for _, l := range losses {
		acknowledged += l.acknowledged
		refused += l.refused
		lost = append(lost, l.lost)
		windows = append(windows, l.window.Milliseconds())
		lasting = append(lasting, l.lasting.Milliseconds())
	}
	slices.Sort(lost)
	slices.Sort(windows)
	slices.Sort(lasting)
	n := len(losses)
	return fmt.Sprintf("| %s | %d | %d | %d | %d, %d | %d, %d | %d, %d |",
		name, n, acknowledged, refused, lost[n/2], lost[n-1], windows[n/2], windows[n-1], lasting[n/2], lasting[n-1])
}
