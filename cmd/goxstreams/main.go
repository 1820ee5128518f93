// Command goxstreams shows the streams that watermill-goxstreams reads and writes,
// and looks after their dead letters. See README.md.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// The exit codes; 0 is success.
const (
	exitFailed      = 1   // nothing or not all is done, and the message says why
	exitUsage       = 2   // wrong arguments; nothing is done
	exitPartly      = 3   // some entries were not found, or could not be changed; the others are
	exitInterrupted = 130 // by Ctrl-C, as a shell reports it
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process at once
	os.Exit(run(ctx, os.Args[1:], streams{
		in: os.Stdin, out: os.Stdout, err: os.Stderr,
		asks:  term.IsTerminal(int(os.Stdin.Fd())),
		draws: term.IsTerminal(int(os.Stderr.Fd())),
		size:  sizeOf(os.Stdout),
	}))
}

// sizeOf returns what tells a terminal's size, and nil if the file is none.
func sizeOf(f *os.File) func() (width, height int) {
	fd := int(f.Fd())
	if !term.IsTerminal(fd) {
		return nil
	}
	return func() (width, height int) {
		width, height, err := term.GetSize(fd)
		if err != nil || width <= 0 || height <= 0 {
			return 80, 24
		}
		return width, height
	}
}

// streams are where the command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
	asks     bool // in is a terminal: somebody can be asked
	draws    bool // err is a terminal: a progress bar can be seen

	size func() (width, height int) // of the terminal that out is; nil: out is not a terminal
}

// app is one run of the command.
type app struct {
	streams
	out    *bufio.Writer // over streams.out
	conn   connection
	format string                // of the output
	json   bool                  // the flag that is short for one
	client redis.UniversalClient // nil until it is needed

	began bool // the arguments were right
}

// errPartly says that some entries do not exist or could not be changed, each of which was named.
var errPartly = errors.New("some do not exist, or could not be changed")

// usageError is a mistake in the arguments that only the command itself finds.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// run runs the command and returns its exit code.
func run(ctx context.Context, args []string, s streams) int { return runWith(ctx, nil, args, s) }

// runWith is run with a client other than that of REDIS_URL.
func runWith(ctx context.Context, client redis.UniversalClient, args []string, s streams) int {
	redis.SetLogger(silence{}) // what matters comes as an error too
	a := &app{streams: s, out: bufio.NewWriter(s.out), client: client}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(s.in)
	root.SetOut(s.out)
	root.SetErr(s.err)
	cmd, err := root.ExecuteContextC(ctx)
	if a.client != nil {
		_ = a.client.Close()
	}
	err = errors.Join(err, a.out.Flush())
	var plugin status
	if errors.As(err, &plugin) {
		return int(plugin)
	}
	code := a.exitCode(ctx, err)
	switch {
	case code == 0:
	case code == exitUsage:
		a.notef("goxstreams: %v\n%s", err, advice(cmd))
	default:
		a.notef("goxstreams: %s", explain(err))
	}
	return code
}

// advice says where the right arguments of a command can be looked up.
func advice(cmd *cobra.Command) string {
	see := fmt.Sprintf("See %s --help.", cmd.CommandPath())
	if cmd.HasSubCommands() {
		return see
	}
	return fmt.Sprintf("Usage: %s\n%s", cmd.UseLine(), see)
}

func (a *app) exitCode(ctx context.Context, err error) int {
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage) || !a.began:
		return exitUsage
	case ctx.Err() != nil:
		return exitInterrupted
	case errors.Is(err, errPartly):
		return exitPartly
	}
	return exitFailed
}

// explain returns the error's text, with advice where there is any.
func explain(err error) string {
	// A server quotes the arguments of a command that it does not know, among them passwords.
	text, _, _ := strings.Cut(err.Error(), ", with args beginning with")
	var reply redis.Error
	if !errors.As(err, &reply) {
		return text
	}
	switch reply := reply.Error(); {
	case strings.HasPrefix(reply, "NOPERM"):
		return text + "\nThe user of the connection lacks a right: see \"Rights\" in the command's README."
	case strings.HasPrefix(reply, "NOAUTH"):
		return text + "\nGive the password in REDIS_URL, redis://user:password@host:port, or in a profile."
	case strings.HasPrefix(reply, "MOVED"):
		return text + "\nThe server is part of a Redis Cluster: use --cluster."
	}
	return text
}

// notef writes a line to stderr, safe for a terminal, after what was written to stdout.
func (a *app) notef(format string, args ...any) {
	_ = a.out.Flush() // its error comes again at the end
	_, _ = fmt.Fprintln(a.err, safeLines(fmt.Sprintf(format, args...)))
}

// printf prints to stdout. Its error is that of the last flush.
func (a *app) printf(format string, args ...any) { _, _ = fmt.Fprintf(a.out, format, args...) }

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "goxstreams",
		Short: "Look at Redis Streams and their consumer groups, and deal with dead letters",
		Long: `goxstreams shows the streams that watermill-goxstreams reads and writes, and looks
after their dead letters. What changes something shows it with --dry-run, and asks before.

The server is that of --profile, --url or REDIS_URL, such as rediss://user:password@host:6379/0, or
redis+sentinel://user:password@host1,host2/master/0. A Redis Cluster is noticed.

Exit codes: 0 all is done; 1 failed; 2 wrong arguments; 3 some entries were not found, or could
not be changed, the others are; 130 interrupted. Those of check are a monitoring plugin's.`,
		Version:       version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.began = true
			return a.checkOutput(cmd)
		},
	}
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	a.conn.addTo(root)
	a.addOutput(root)
	root.AddCommand(a.topicsCommand(), a.groupsCommand(), a.groupCommand(), a.consumersCommand(), a.pendingCommand(),
		a.tailCommand(), a.getCommand(), a.publishCommand(), a.delayedCommand(), a.deadCommand(), a.trimCommand(),
		a.topCommand(), a.checkCommand(), a.exporterCommand(), a.uiCommand())
	return root
}

// silence is a logger for go-redis.
type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}
