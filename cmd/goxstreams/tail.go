package main

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// tailOptions are what tail shows, and how it decodes.
type tailOptions struct {
	lines  int64
	follow bool
	body   goxstreams.BodyMarshaler
}

func (a *app) tailCommand() *cobra.Command {
	var o tailOptions
	cmd := &cobra.Command{
		Use:   "tail TOPIC",
		Short: "Show a stream's last messages, and what comes",
		Long: `Show a stream's last messages, decoded: ID, time, UUID, metadata, payload. It joins no group, and
takes nothing from anybody. Entries of watermill-redisstream's format, which is the default, and of
goxstreams' (BodyMarshaler) are told apart by their fields; of others the fields are shown.
On a line a payload is cut to 500 characters; json and csv have all of it.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeTopic,
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.lines < 0 {
				return usagef("--lines cannot be negative")
			}
			return a.tail(cmd.Context(), args[0], o)
		},
	}
	flags := cmd.Flags()
	flags.Int64VarP(&o.lines, "lines", "n", 10, "how many of those that are there")
	flags.BoolVarP(&o.follow, "follow", "f", false, "go on with what comes, until Ctrl-C")
	addBody(flags, &o.body)
	return cmd
}

func addBody(flags *pflag.FlagSet, body *goxstreams.BodyMarshaler) {
	flags.StringVar(&body.Field, "body-field", "body", "BodyMarshaler's field")
	flags.StringVar(&body.MetadataField, "metadata-field", "", "BodyMarshaler's metadata field")
}

func (a *app) tail(ctx context.Context, topic string, o tailOptions) error {
	client, err := a.connect(ctx)
	if err != nil {
		return err
	}
	// One at least: with --lines 0 what comes begins after it.
	newest, err := client.XRevRangeN(ctx, topic, "+", "-", max(o.lines, 1)).Result()
	if err != nil {
		return topicError(err, topic)
	}
	if len(newest) == 0 && !o.follow {
		a.notef("There is nothing in %q.", topic)
	}
	last := "0"
	if len(newest) > 0 {
		last = newest[0].ID
	}
	slices.Reverse(newest)
	if o.lines == 0 {
		newest = nil
	}
	listing := a.newListing(messageRow{})
	for {
		for _, e := range newest {
			if err := a.printEntry(listing, e, o.body); err != nil {
				return err
			}
		}
		if err := cmp.Or(listing.flush(), a.out.Flush()); err != nil || !o.follow || ctx.Err() != nil {
			return err
		}
		// A read that waits does not heed the context: it must be short.
		read, err := client.XRead(ctx, &redis.XReadArgs{Streams: []string{topic, last}, Count: 100, Block: 500 * time.Millisecond}).Result()
		switch {
		case errors.Is(err, redis.Nil):
			newest = nil
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		default:
			newest = read[0].Messages
			last = newest[len(newest)-1].ID
		}
	}
}

// messageRow is a row of tail for scripts.
type messageRow struct {
	ID       string          `json:"id"`
	Time     time.Time       `json:"time"`
	UUID     text            `json:"uuid,omitempty"`
	Metadata map[string]text `json:"metadata,omitempty"`
	Payload  *text           `json:"payload,omitempty"`
	Fields   map[string]text `json:"fields,omitempty"` // of what is no message
	Error    text            `json:"error,omitempty"`  // why not
}

func (a *app) printEntry(listing *listing, e redis.XMessage, body goxstreams.BodyMarshaler) error {
	row := messageRow{ID: e.ID, Time: timeOf(e.ID)}
	msg, err := decode(e.Values, body)
	if err == nil {
		row.UUID, row.Metadata, row.Payload = text(msg.UUID), texts(msg.Metadata), new(text(msg.Payload))
	} else {
		row.Error = text(err.Error())
		row.Fields = make(map[string]text, len(e.Values))
		for name, value := range e.Values {
			s, _ := value.(string)
			row.Fields[safe(name)] = text(s)
		}
	}
	if a.forScripts() {
		return listing.row(row)
	}
	parts := []string{row.ID, row.Time.Format("2006-01-02T15:04:05.000Z")}
	if row.Payload == nil {
		parts = append(parts, "no message ("+safe(err.Error())+"):")
		parts = appendPairs(parts, row.Fields)
	} else {
		if msg.UUID != "" {
			parts = append(parts, safe(msg.UUID))
		}
		parts = append(appendPairs(parts, row.Metadata), short(string(*row.Payload), 500))
	}
	a.printf("%s\n", strings.Join(parts, " "))
	return nil
}

func appendPairs(parts []string, pairs map[string]text) []string {
	for _, name := range slices.Sorted(maps.Keys(pairs)) {
		parts = append(parts, safe(name)+"="+short(string(pairs[name]), 100))
	}
	return parts
}

// decode makes a message of an entry by the format that its fields look like.
func decode(values map[string]any, body goxstreams.BodyMarshaler) (*message.Message, error) {
	if _, ok := values[goxstreams.UUIDHeaderKey]; !ok {
		if _, ok := values[body.Field]; ok {
			return body.Unmarshal(values)
		}
	}
	return goxstreams.DefaultMarshaler{}.Unmarshal(values)
}

// texts is metadata for JSON, in which a name must be UTF-8.
func texts(metadata message.Metadata) map[string]text {
	m := make(map[string]text, len(metadata))
	for name, value := range metadata {
		m[safe(name)] = text(value)
	}
	return m
}
