package goxprom

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/plugin/goxprom/internal/statswatch"
)

// errPanic is the error of a handler that did not return.
var errPanic = errors.New("panic")

// Middleware measures how long handlers take, and how old a message is when it has
// been handled. It is for a router, as the first of its middlewares, so that it sees
// what the others return; or for goxstreams.ConsumerConfig.Middlewares, with a router
// or without. Applied twice it measures twice.
//
// A delivery has failed (success="false") if the handler returned an error or
// panicked. A Snooze, and what a shutdown interrupted, are no failures: see
// goxstreams.OutcomeOf. The age is the difference of two clocks: the server's, by the
// entry's ID, and this machine's.
//
// Messages of other Subscribers pass through unmeasured.
func (c *Collector) Middleware(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) (produced []*message.Message, err error) {
		delivery, ours := goxstreams.DeliveryFromContext(msg.Context())
		if !ours {
			return h(msg)
		}
		began := time.Now()
		err = errPanic
		defer func() { c.handled(delivery, time.Since(began), err, goxstreams.OutcomeOf(msg, err)) }() // a panic goes on
		produced, err = h(msg)
		return produced, err
	}
}

func (c *Collector) handled(delivery goxstreams.Delivery, took time.Duration, err error, outcome goxstreams.OutcomeKind) {
	topic, group := statswatch.Label(delivery.Topic), statswatch.Label(delivery.Group)
	success := err == nil || outcome == goxstreams.OutcomeSnoozed || outcome == goxstreams.OutcomeReleased
	c.handlers.WithLabelValues(topic, group, strconv.FormatBool(success)).Observe(took.Seconds())
	if published := delivery.Time(); err == nil && !published.IsZero() {
		c.latency.WithLabelValues(topic, group).Observe(max(0, time.Since(published).Seconds()))
	}
}

// Values of the label outcome.
const (
	stored  = "stored"
	failed  = "failed"  // with goxstreams.Publisher: nothing is stored
	unknown = "unknown" // goxstreams.ErrOutcomeUnknown: all are stored, or none is
)

// Publisher returns a Publisher that counts messages and measures calls of pub. It is
// a decorator for Router.AddPublisherDecorators; its error is that pub is nil. Closing
// it closes pub.
func (c *Collector) Publisher(pub message.Publisher) (message.Publisher, error) {
	if pub == nil {
		return nil, errors.New("goxprom: Publisher: pub is required")
	}
	return &publisher{pub, c}, nil
}

type publisher struct {
	message.Publisher
	c *Collector
}

// String returns what Watermill would call the Publisher without the decorator.
func (p *publisher) String() string {
	if s, ok := p.Publisher.(fmt.Stringer); ok {
		return s.String()
	}
	return fmt.Sprintf("%T", p.Publisher)
}

func (p *publisher) Publish(topic string, messages ...*message.Message) error {
	if len(messages) == 0 {
		return p.Publisher.Publish(topic)
	}
	began := time.Now()
	err := p.Publisher.Publish(topic, messages...)
	p.c.publishDone(statswatch.Label(topic), len(messages), time.Since(began), err)
	return err
}

func (c *Collector) publishDone(topic string, n int, took time.Duration, err error) {
	outcome := stored
	switch {
	case errors.Is(err, goxstreams.ErrOutcomeUnknown):
		outcome = unknown
	case err != nil:
		outcome = failed
	}
	for _, o := range []string{stored, failed, unknown} { // all exist from the first call on: an increase needs a 0 before it
		c.published.WithLabelValues(topic, o)
	}
	c.published.WithLabelValues(topic, outcome).Add(float64(n))
	c.publishing.WithLabelValues(topic, outcome).Observe(took.Seconds())
}
