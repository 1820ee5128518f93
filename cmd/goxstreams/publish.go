package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/spf13/cobra"
)

// publishFlags say what is published, and how.
type publishFlags struct {
	uuid      string
	metadata  []string
	file      string
	jsonLines bool
	in, at    string // when it is due
	body      goxstreams.BodyMarshaler
}

func (a *app) publishCommand() *cobra.Command {
	var f publishFlags
	cmd := &cobra.Command{
		Use:   "publish TOPIC [PAYLOAD|-]",
		Short: "Publish a message, or many as JSON lines",
		Long: `Publish a message: the payload is the argument, or, byte for byte, standard input ("-") or --file. The
stream is made where there is none.

With --json-lines each line of standard input, or of --file, is a message, as goxstreams tail -o json
prints it: {"payload": "..", "uuid": "..", "metadata": {"name": "value"}}. Only the payload is needed; one that is
no text is {"base64": ".."}. The ID and the time are ignored: a message gets new ones. A line that
is no message ends it; how many were published before is said.

With --in or --at the messages are delayed: a Subscriber of the topic moves them into the stream when they are
due. goxstreams delayed lists, cancels and reschedules them.`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			delayed, err := f.delay(time.Now())
			if err := cmp.Or(f.check(args), err); err != nil {
				return err
			}
			return a.publish(cmd.Context(), args[0], f, delayed, args[1:])
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.uuid, "uuid", "", "the message's UUID (default a new one)")
	flags.StringArrayVarP(&f.metadata, "metadata", "m", nil, "name=value; several times for several")
	flags.StringVar(&f.file, "file", "", "the payload, or with --json-lines the messages, are in this file")
	flags.BoolVar(&f.jsonLines, "json-lines", false, "each line is a message")
	flags.StringVar(&f.in, "in", "", "deliver it after this time, such as 90s, 10m, 12h or 3d")
	flags.StringVar(&f.at, "at", "", "deliver it at this time, such as 2026-11-24T06:00:00Z")
	flags.StringVar(&f.body.Field, "body-field", "", "write goxstreams' format, BodyMarshaler, with this field (its own name for it: body); it has no UUID")
	flags.StringVar(&f.body.MetadataField, "metadata-field", "", "BodyMarshaler's metadata field")
	return cmd
}

func (f *publishFlags) check(args []string) error {
	switch {
	case args[0] == "":
		return usagef("TOPIC is empty")
	case f.jsonLines && (f.uuid != "" || len(f.metadata) > 0):
		return usagef("--json-lines, or --uuid and --metadata: not both")
	case f.jsonLines && len(args) > 1 && args[1] != "-":
		return usagef("--json-lines reads standard input or --file: PAYLOAD cannot be given too")
	case f.file != "" && len(args) > 1:
		return usagef("--file, or PAYLOAD: not both")
	case !f.jsonLines && f.file == "" && len(args) == 1:
		return usagef(`the payload is missing: an argument, "-" for standard input, or --file`)
	case f.body.Field == "" && f.body.MetadataField != "":
		return usagef("--metadata-field needs --body-field")
	case f.body.Field != "" && f.uuid != "":
		return usagef("--uuid, or --body-field: that format has no UUID")
	case f.body.Field != "" && f.body.MetadataField == "" && len(f.metadata) > 0:
		return usagef("--metadata with --body-field needs --metadata-field")
	}
	for _, key := range []string{delay.DelayedUntilKey, delay.DelayedForKey} {
		if (f.in != "" || f.at != "") && slices.ContainsFunc(f.metadata, func(pair string) bool { return strings.HasPrefix(pair, key+"=") }) {
			return usagef("--in or --at, or --metadata %s: not both", key)
		}
	}
	return nil
}

// delay returns what delays a message, from when it is sent; nil: nothing does.
func (f *publishFlags) delay(now time.Time) (func() delay.Delay, error) {
	switch {
	case f.in != "" && f.at != "":
		return nil, usagef("--in, or --at: not both")
	case f.in != "":
		period, err := parseAge(f.in)
		if err != nil {
			return nil, usagef("--in: %q is no time from now such as 90s, 10m, 12h or 3d", f.in)
		}
		if period > maxDelay {
			return nil, usagef("--in: %s is more than ten years", f.in)
		}
		return func() delay.Delay { return delay.For(period) }, nil
	case f.at != "":
		at, err := time.Parse(time.RFC3339, f.at)
		switch {
		case err != nil:
			return nil, usagef("--at: %q is no time such as 2026-11-24T06:00:00Z", f.at)
		case at.Before(now):
			return nil, usagef("--at: %s is in the past", f.at)
		case at.Sub(now) > maxDelay:
			return nil, usagef("--at: %s is more than ten years away", f.at)
		}
		return func() delay.Delay { return delay.Until(at.UTC()) }, nil
	}
	return nil, nil
}

func (a *app) publish(ctx context.Context, topic string, f publishFlags, delayed func() delay.Delay, payload []string) error {
	in := a.in
	if f.file != "" {
		file, err := os.Open(f.file)
		if err != nil {
			return usagef("--file: %w", err)
		}
		defer file.Close()
		in = file
	}
	p, err := a.newPublication(ctx, topic, f)
	if err != nil {
		return err
	}
	defer p.publisher.Close() // it may be moving what was due at once
	p.delay = delayed
	if f.jsonLines {
		return p.lines(ctx, in)
	}
	var data []byte
	if len(payload) == 1 && payload[0] != "-" {
		data = []byte(payload[0])
	} else if data, err = io.ReadAll(interruptible{ctx, in}); err != nil {
		return fmt.Errorf("the payload: %w", err)
	}
	msg, err := newMessage(f.uuid, data, f.metadata)
	if err != nil {
		return err
	}
	if err := p.send(msg); err != nil {
		return err
	}
	return p.end()
}

// newMessage makes the message of the flags.
func newMessage(uuid string, payload []byte, metadata []string) (*message.Message, error) {
	if uuid == "" {
		uuid = watermill.NewUUID()
	}
	msg := message.NewMessage(uuid, payload)
	for _, pair := range metadata {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return nil, usagef("--metadata: %q is not name=value", pair)
		}
		if _, ok := msg.Metadata[name]; ok {
			return nil, usagef("--metadata: %q is given twice", name)
		}
		msg.Metadata.Set(name, value)
	}
	return msg, nil
}

// publication is the messages on their way to a topic.
type publication struct {
	a         *app
	topic     string
	publisher *goxstreams.Publisher
	delay     func() delay.Delay // nil: none
	listing   *listing
	done      int64
	last      *message.Message
}

// publishedRow says for scripts that a message is published.
type publishedRow struct {
	UUID text `json:"uuid"`
}

func (a *app) newPublication(ctx context.Context, topic string, f publishFlags) (*publication, error) {
	client, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	config := goxstreams.PublisherConfig{Client: client}
	if f.body.Field != "" {
		config.Marshaler = f.body
	}
	publisher, err := goxstreams.NewPublisher(config, nil)
	return &publication{a: a, topic: topic, publisher: publisher, listing: a.newListing(publishedRow{})}, err
}

// send publishes messages: all or none.
func (p *publication) send(msgs ...*message.Message) error {
	if len(msgs) == 0 {
		return nil
	}
	if p.delay != nil {
		for _, msg := range msgs {
			delay.Message(msg, p.delay())
		}
	}
	err := p.publisher.Publish(p.topic, msgs...)
	if errors.Is(err, goxstreams.ErrOutcomeUnknown) && len(msgs) > 1 {
		return fmt.Errorf("of %d more it is not known: %w", len(msgs), err)
	}
	if err != nil {
		return err
	}
	for _, msg := range msgs {
		p.done, p.last = p.done+1, msg
		if p.a.forScripts() {
			if err := p.listing.row(publishedRow{text(msg.UUID)}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *publication) published() string {
	verbed := "published"
	if p.delay != nil {
		verbed = "delayed"
	}
	if p.done == 1 {
		return "1 message is " + verbed
	}
	return fmt.Sprintf("%d messages are %s", p.done, verbed)
}

func (p *publication) end() error {
	if err := p.listing.flush(); err != nil {
		return err
	}
	until := ""
	if p.done == 1 && p.delay != nil {
		until = " until " + p.last.Metadata.Get(delay.DelayedUntilKey)
	}
	if p.done == 1 && !p.a.forScripts() {
		p.a.notef("%s%s: UUID %s.", p.published(), until, p.last.UUID)
	} else {
		p.a.notef("%s%s.", p.published(), until)
	}
	return nil
}

// lines publishes what comes, batch by batch, and at once what waits for more.
func (p *publication) lines(ctx context.Context, in io.Reader) error {
	msgs := make([]*message.Message, 0, batch)
	err := readLines(ctx, in, func(line string, more bool) error {
		msg, err := parseMessage(line)
		if err != nil {
			return err
		}
		if msgs = append(msgs, msg); len(msgs) == batch || !more {
			err = p.send(msgs...)
			msgs = msgs[:0]
		}
		return err
	})
	if err == nil {
		err = p.send(msgs...)
	}
	var mistake usageError
	switch {
	case err == nil:
		return p.end()
	case !errors.As(err, &mistake):
		return fmt.Errorf("%s; %w", p.published(), err)
	case p.done > 0:
		return fmt.Errorf("%s; %w", p.published(), mistake.error) // more than nothing is done
	}
	return err
}

// messageLine is a message as tail prints it.
type messageLine struct {
	ID       json.RawMessage            `json:"id"`   // ignored
	Time     json.RawMessage            `json:"time"` // ignored
	UUID     json.RawMessage            `json:"uuid"`
	Metadata map[string]json.RawMessage `json:"metadata"`
	Payload  json.RawMessage            `json:"payload"`
}

func parseMessage(line string) (*message.Message, error) {
	var m messageLine
	decoder := json.NewDecoder(strings.NewReader(line))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&m); err != nil {
		return nil, usageError{err}
	}
	if decoder.More() {
		return nil, usagef("something follows the message")
	}
	if len(m.Payload) == 0 {
		return nil, usagef("payload is missing")
	}
	payload, err := parseText("payload", m.Payload)
	if err != nil {
		return nil, err
	}
	uuid := watermill.NewUUID()
	if len(m.UUID) > 0 {
		if uuid, err = parseText("uuid", m.UUID); err != nil {
			return nil, err
		}
	}
	msg := message.NewMessage(uuid, []byte(payload))
	for name, value := range m.Metadata {
		if msg.Metadata[name], err = parseText("metadata "+name, value); err != nil {
			return nil, err
		}
	}
	return msg, nil
}

func parseText(field string, data json.RawMessage) (string, error) {
	var t text
	if err := t.UnmarshalJSON(data); err != nil {
		return "", usagef("%s: %w", field, err)
	}
	return string(t), nil
}
