package goxstreams

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"

	"github.com/goxstreams/watermill-goxstreams/internal/consume"
	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

// maxDelay is the longest delay: a message that waits for more than ten years is a
// mistake in a unit, or in a year.
const maxDelay = 10 * 365 * 24 * time.Hour

// dueOf returns when a message is due, according to the metadata of Watermill's
// components/delay; the zero value for a message without them.
func dueOf(msg *message.Message, now time.Time) (xstream.Due, error) {
	until, period := msg.Metadata.Get(delay.DelayedUntilKey), msg.Metadata.Get(delay.DelayedForKey)
	if until == "" && period == "" {
		return "", nil
	}
	fail := func(key, format string, args ...any) (xstream.Due, error) {
		return "", fmt.Errorf("metadata %s: %s", key, fmt.Sprintf(format, args...))
	}
	if until == "" {
		return fail(delay.DelayedUntilKey, "is missing, while %s is set", delay.DelayedForKey)
	}
	at, err := time.Parse(time.RFC3339, until)
	if err != nil {
		return fail(delay.DelayedUntilKey, "%q is no time in the format of RFC 3339", until)
	}
	if at.Sub(now) > maxDelay {
		return fail(delay.DelayedUntilKey, "%s is more than ten years away", until)
	}
	if period == "" {
		return xstream.DueAt(at), nil
	}
	d, err := time.ParseDuration(period)
	switch {
	case err != nil:
		return fail(delay.DelayedForKey, "%q is no duration", period)
	case d < 0:
		return fail(delay.DelayedForKey, "is negative: %s", period)
	case d > maxDelay:
		return fail(delay.DelayedForKey, "%s is more than ten years", period)
	}
	return due(now, at, d), nil
}

// due returns when a message is due that was delayed for d, until some time in the second
// that begins at until, since the metadata round that time down to seconds. If both agree
// with now, the delay has just begun, and d has all digits. If not, the message was created
// earlier, or was consumed and is published again: then until counts, so that it is not
// delayed twice. Where the delay began less than a second ago, that can make until + 1s
// the best known time: a message must not be early.
func due(now, until time.Time, d time.Duration) xstream.Due {
	age := now.Add(d).Sub(until) // of the delay, and less than a second of rounding
	switch {
	case age < 0: // written by hand: the two do not belong together
		return xstream.DueAt(until)
	case age < time.Second:
		return xstream.DueIn(d)
	case age < 2*time.Second && now.Before(until):
		return xstream.DueIn(until.Add(time.Second).Sub(now))
	}
	return xstream.DueAt(until)
}

// duesOf returns when each of the messages is due; nil if none is delayed.
func duesOf(messages []*message.Message) ([]xstream.Due, error) {
	var dues []xstream.Due
	for i, msg := range messages {
		if msg == nil {
			return nil, atMessage(i, messages, errNilMessage)
		}
		due, err := dueOf(msg, time.Now())
		if err != nil {
			return nil, atMessage(i, messages, err)
		}
		if due == "" {
			continue
		}
		if msg.UUID == "" {
			return nil, atMessage(i, messages, errors.New("the UUID is empty, by which a delayed message is known"))
		}
		if dues == nil {
			dues = make([]xstream.Due, len(messages))
		}
		dues[i] = due
	}
	return dues, nil
}

// schedule is send for a call in which messages are delayed.
func (p *Publisher) schedule(topic string, messages []*message.Message, dues []xstream.Due) error {
	err := p.client.OneServer(messages[0].Context(), topic, xstream.DueKey(topic))
	if errors.Is(err, redisx.ErrTwoServers) {
		err = fmt.Errorf("delayed messages of this topic would be in another slot of the Cluster; give its name a hash tag: %w", err)
	}
	if err != nil {
		return fmt.Errorf("nothing is stored: %w", err)
	}
	call := xstream.NewScheduling(messages[0].Context(), topic, p.maxLen(topic), p.producerID())
	for i, msg := range messages {
		err = call.Add(msg.UUID, dues[i], func(args []any) ([]any, error) { return p.appendFields(args, topic, msg) })
		if err != nil {
			return atMessage(i, messages, err)
		}
	}
	p.calls.add(1)
	defer p.calls.add(-1)
	return p.whilePrepared(call.Context(), topic, len(messages), func() error {
		untilNext, err := p.sendScheduling(call)
		if err == nil {
			p.soon.in(topic, untilNext)
		}
		return err
	})
}

// sendScheduling sends the call, and repeats it while a Cluster refuses it because it moves
// the topic's keys between two nodes, for at most half of the time that a call may take.
func (p *Publisher) sendScheduling(call *xstream.Scheduling) (untilNext time.Duration, err error) {
	end := time.Now().Add(p.client.CallTimeout() / 2)
	for pause := 5 * time.Millisecond; ; pause *= 2 {
		untilNext, err = call.Send(p.pipe)
		if err == nil || !redisx.ReplyHas(err, "TRYAGAIN") || time.Now().Add(pause).After(end) {
			return untilNext, err
		}
		<-time.After(pause)
	}
}

// soonest is the longest delay that a Publisher watches itself: Subscribers learn of longer
// ones in time.
const soonest = 2 * consume.DelayedInterval

// soon moves a Publisher's delayed messages that are due before Subscribers learn of them.
// If it fails, the topic's Subscribers move them, at most a second late.
type soon struct {
	client redisx.Client
	logger watermill.LoggerAdapter

	mu         sync.Mutex
	topics     map[string]*appointment
	generation int   // Close begins another one
	runs       calls // appointments, and moves under way
}

// appointment is the next move of a topic.
type appointment struct {
	at    time.Time
	timer *time.Timer
}

// in schedules a move after the given time, unless that is longer than soonest.
func (s *soon) in(topic string, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inLocked(topic, wait)
}

func (s *soon) inLocked(topic string, wait time.Duration) {
	if wait < 0 || wait > soonest {
		return
	}
	at := time.Now().Add(wait)
	if a := s.topics[topic]; a != nil {
		if at.Before(a.at) && a.timer.Stop() {
			a.at = at
			a.timer.Reset(wait)
		}
		return
	}
	if s.topics == nil {
		s.topics = make(map[string]*appointment)
	}
	generation := s.generation
	s.runs.add(1)
	s.topics[topic] = &appointment{at, time.AfterFunc(wait, func() {
		defer s.runs.add(-1)
		s.move(topic, generation)
	})}
}

// move moves the topic's due messages.
func (s *soon) move(topic string, generation int) {
	s.mu.Lock()
	delete(s.topics, topic)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), s.client.CallTimeout())
	defer cancel()
	stream := xstream.New(s.client, topic, "")
	for {
		moved, err := stream.Move(ctx)
		if err != nil {
			s.logger.Debug("Delayed messages are left to the topic's Subscribers: "+err.Error(), watermill.LogFields{"topic": topic})
			return
		}
		consume.LogLostDelayed(s.logger, watermill.LogFields{"topic": topic}, moved)
		s.mu.Lock()
		over := s.generation != generation
		if !over && moved.Next != 0 {
			s.inLocked(topic, moved.Next)
		}
		s.mu.Unlock()
		if over || moved.Next != 0 {
			return
		}
	}
}

// end drops all appointments. It returns a channel that is closed when no move is running.
func (s *soon) end() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation++
	for topic, a := range s.topics {
		if a.timer.Stop() {
			delete(s.topics, topic)
			s.runs.add(-1)
		}
	}
	return s.runs.idle()
}
