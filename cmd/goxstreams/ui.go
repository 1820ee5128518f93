package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxui"
	"github.com/spf13/cobra"
)

// operationsPage is what the flags of ui say.
type operationsPage struct {
	listen          string
	pattern         string
	hosts           []string
	write, payloads bool
	interval        time.Duration
}

func (a *app) uiCommand() *cobra.Command {
	var p operationsPage
	cmd := &cobra.Command{
		Use:   "ui [TOPIC...]",
		Short: "Serve the operations page to a browser",
		Long: `Serve pages with topics, groups, consumers, pending entries, dead letters and delayed messages. They change
nothing unless --write is given, and show no payload unless --payloads is.

The topics are the arguments, and what --pattern finds by SCAN; without both, all streams. There is no
password: whoever reaches the address may use it, also other users of this machine. So --write needs an
address of this machine alone, such as the default; for others, serve plugin/goxui in a program of yours, behind
your authentication. SIGTERM and Ctrl-C end it, and a replay under way between two calls.`,
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
			return a.completeTopic(cmd, nil, prefix)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.ui(cmd.Context(), p, args) },
	}
	flags := cmd.Flags()
	flags.StringVar(&p.listen, "listen", "localhost:9860", "address to serve at; ':9860' is all of the machine's")
	flags.StringVar(&p.pattern, "pattern", "", "topics whose names match, such as 'orders*'")
	flags.StringArrayVar(&p.hosts, "host", nil, "a name by which browsers reach it, such as that of a proxy; others are refused (default localhost and the address of --listen; any if that is all of the machine's)")
	flags.BoolVar(&p.write, "write", false, "allow to replay, delete, cancel, pause and resume")
	flags.BoolVar(&p.payloads, "payloads", false, "show payloads")
	flags.DurationVar(&p.interval, "interval", 2*time.Second, "how often to look while somebody looks")
	return cmd
}

func (a *app) ui(ctx context.Context, p operationsPage, topics []string) error {
	switch {
	case slices.Contains(topics, ""):
		return usagef("a topic is empty")
	case slices.Contains(p.hosts, ""):
		return usagef("--host is empty")
	case p.interval < 100*time.Millisecond:
		return usagef("--interval must be at least 100ms")
	case a.forScripts():
		return usagef("ui prints nothing: no --output")
	}
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", p.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer listener.Close()
	address, _ := listener.Addr().(*net.TCPAddr)
	if p.write && !address.IP.IsLoopback() {
		return usagef("--write needs an address of this machine alone for --listen: whoever reaches %s could delete messages", address)
	}
	if len(p.hosts) == 0 && !address.IP.IsUnspecified() {
		p.hosts = []string{"localhost", address.IP.String(), "127.0.0.1", "::1"}
	}
	notes := pageNotes{a: a, mu: new(sync.Mutex)}
	config := goxui.Config{Client: client, Topics: topics, Pattern: p.pattern, Hosts: p.hosts, Interval: p.interval, Logger: notes, Audit: notes.audit}
	if p.write {
		config.Authorize = func(*http.Request, goxui.Action) error { return nil }
	}
	if p.payloads {
		config.Render = func(_ *http.Request, _ string, msg *message.Message) string { return block(msg.Payload) }
	}
	handler, err := goxui.New(config)
	if err != nil {
		return err
	}
	defer handler.Close()
	notes.notef("Serving http://%s/", listener.Addr())
	return serveHandler(ctx, handler, listener)
}

// serveHandler serves until the context ends.
func serveHandler(ctx context.Context, handler *goxui.Handler, listener net.Listener) error {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	handler.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err := server.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close() // somebody reads too slowly
	}
	return err
}

// pageNotes prints what the pages change, and what goes wrong, one line after the other.
type pageNotes struct {
	watermill.NopLogger
	a  *app
	mu *sync.Mutex
}

func (n pageNotes) notef(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.a.notef(format, args...)
}

// Error implements watermill.LoggerAdapter.
func (n pageNotes) Error(msg string, err error, _ watermill.LogFields) {
	n.notef("%s: %s", msg, explain(err))
}

// With implements watermill.LoggerAdapter.
func (n pageNotes) With(watermill.LogFields) watermill.LoggerAdapter { return n }

// audit is a goxui.Config.Audit.
func (n pageNotes) audit(r *http.Request, e goxui.AuditEvent) {
	if !e.Action.Verb.Changes() {
		return
	}
	text := fmt.Sprintf("%s %s: %s %q", time.Now().UTC().Format(time.RFC3339), r.RemoteAddr, e.Action.Verb, e.Action.Topic)
	if e.Stage == goxui.Ended {
		text += fmt.Sprintf(": %d done", e.Done)
	} else {
		text += ": " + string(e.Stage)
	}
	if e.Err != nil {
		text += ": " + explain(e.Err)
	}
	n.notef("%s", text)
}
