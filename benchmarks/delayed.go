package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"slices"
	"strconv"
	"time"

	"github.com/ThreeDotsLabs/watermill/components/delay"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
)

// waits has the flags of `delayed`.
type waits struct {
	target
	messages, waiting, burst int
	delay                    time.Duration
}

// delayed measures delayed messages: how late they are, compared with asynq's scheduled
// tasks; what very many of them cost while they wait; and how fast a burst is moved.
func delayed(args []string, out io.Writer) error {
	w := &waits{}
	f := flag.NewFlagSet("delayed", flag.ContinueOnError)
	w.flags(f)
	f.IntVar(&w.messages, "messages", 1000, "messages whose lateness is measured, published over 10s")
	f.DurationVar(&w.delay, "delay", time.Second, "their delay")
	f.IntVar(&w.waiting, "waiting", 1_000_000, "messages that wait while the server's idle CPU is measured")
	f.IntVar(&w.burst, "burst", 100_000, "messages due at once")
	if err := f.Parse(args); err != nil {
		return err
	}
	if w.messages < 1 || w.delay < 2*time.Millisecond || w.waiting < 1 || w.burst < 1 {
		return errors.New("-messages, -delay, -waiting and -burst must be positive")
	}
	e, closeAll, err := w.open(1)
	if err != nil {
		return err
	}
	defer closeAll()
	m, err := e.machine()
	if err != nil {
		return err
	}
	for _, measure := range []func(*env, io.Writer) error{w.lateness, w.latenessAsynq, w.idle, w.moveBurst} {
		if err := measure(e, out); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "\n%s\n", m)
	return nil
}

// arrivals collects how late messages are.
type arrivals struct {
	late chan time.Duration
	n    int
}

func (a arrivals) report(out io.Writer, what string) error {
	var all []time.Duration
	for len(all) < a.n {
		select {
		case d := <-a.late:
			all = append(all, d)
		case <-time.After(time.Minute):
			return fmt.Errorf("%s: %d of %d messages did not arrive", what, a.n-len(all), a.n)
		}
	}
	slices.Sort(all)
	_, err := fmt.Fprintf(out, "%s: late by %.1f ms (p50), %.1f ms (p99), %.1f ms at most\n", what,
		millis(all[a.n/2]), millis(all[a.n*99/100]), millis(all[a.n-1]))
	return err
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// due is the payload of a message: when it is due.
func (w *waits) due() []byte { return strconv.AppendInt(nil, time.Now().Add(w.delay).UnixMicro(), 10) }

func sinceDue(payload []byte) time.Duration {
	micros, _ := strconv.ParseInt(string(payload), 10, 64)
	return time.Since(time.UnixMicro(micros))
}

func (w *waits) publish(send func(i int) error) error {
	tick := time.NewTicker(10 * time.Second / time.Duration(w.messages))
	defer tick.Stop()
	for i := range w.messages {
		<-tick.C
		if err := send(i); err != nil {
			return err
		}
	}
	return nil
}

// consumed subscribes, and calls handle with each message.
func consumed(client redis.UniversalClient, topic string, handle func(*message.Message)) (*goxstreams.Subscriber, error) {
	return subscribed(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "bench", MaxConcurrency: 100}, topic, handle)
}

// subscribed subscribes, and acks each message once handle has returned.
func subscribed(config goxstreams.SubscriberConfig, topic string, handle func(*message.Message)) (*goxstreams.Subscriber, error) {
	sub, err := goxstreams.NewSubscriber(config, nil)
	if err != nil {
		return nil, err
	}
	messages, err := sub.Subscribe(context.Background(), topic)
	if err != nil {
		return nil, err
	}
	go func() {
		for msg := range messages {
			handle(msg)
			msg.Ack()
		}
	}()
	return sub, nil
}

func delayedMessage(uuid string, payload []byte, d time.Duration) *message.Message {
	msg := message.NewMessage(uuid, payload)
	delay.Message(msg, delay.For(d))
	return msg
}

// lateness measures a Publisher and a Subscriber. Both move the messages if the delay is
// below two seconds, else only the Subscriber does.
func (w *waits) lateness(e *env, out io.Writer) error {
	client, topic := e.client(0), e.topic()
	defer client.Close()
	a := arrivals{make(chan time.Duration, w.messages), w.messages}
	sub, err := consumed(client, topic, func(msg *message.Message) { a.late <- sinceDue(msg.Payload) })
	if err != nil {
		return err
	}
	defer sub.Close()
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	err = w.publish(func(i int) error { return pub.Publish(topic, delayedMessage(strconv.Itoa(i), w.due(), w.delay)) })
	if err != nil {
		return err
	}
	return a.report(out, fmt.Sprintf("here, a delay of %v", w.delay))
}

func (w *waits) latenessAsynq(e *env, out io.Writer) error {
	client := e.client(0)
	defer client.Close()
	a := arrivals{make(chan time.Duration, w.messages), w.messages}
	server := asynq.NewServerFromRedisClient(client, asynq.Config{Concurrency: 100, Logger: quiet{log.New(io.Discard, "", 0)}, LogLevel: asynq.FatalLevel})
	err := server.Start(asynq.HandlerFunc(func(_ context.Context, t *asynq.Task) error { a.late <- sinceDue(t.Payload()); return nil }))
	if err != nil {
		return err
	}
	defer server.Shutdown()
	producer := asynq.NewClientFromRedisClient(client)
	err = w.publish(func(int) error {
		_, err := producer.Enqueue(asynq.NewTask("bench", w.due()), asynq.ProcessIn(w.delay))
		return err
	})
	if err != nil {
		return err
	}
	return a.report(out, fmt.Sprintf("asynq, default config, a delay of %v", w.delay))
}

// store publishes n messages that are due at that time.
func store(e *env, topic string, n int, at time.Time) error {
	client := e.client(0)
	defer client.Close()
	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		return err
	}
	defer pub.Close()
	payload := make([]byte, 100)
	var batch []*message.Message
	for i := range n {
		batch = append(batch, delayedMessage(strconv.Itoa(i), payload, time.Until(at)))
		if len(batch) == 100 || i == n-1 {
			if err := pub.Publish(topic, batch...); err != nil {
				return err
			}
			batch = batch[:0]
		}
	}
	return nil
}

// idle measures what very many waiting messages take of the server's memory and CPU, with
// four Subscribers.
func (w *waits) idle(e *env, out io.Writer) error {
	topic := e.topic()
	memory := func() (float64, error) {
		fields, err := info(e.admin, "memory")
		if err != nil {
			return 0, err
		}
		return strconv.ParseFloat(fields["used_memory"], 64)
	}
	before, err := memory()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := store(e, topic, w.waiting, time.Now().Add(24*time.Hour)); err != nil {
		return err
	}
	took := time.Since(began)
	after, err := memory()
	if err != nil {
		return err
	}
	share := func() (float64, error) {
		const span = 10 * time.Second
		a, err := serverCPU(e.admin)
		if err != nil {
			return 0, err
		}
		time.Sleep(span)
		b, err := serverCPU(e.admin)
		return 100 * (b - a) / span.Seconds(), err
	}
	with := func(topic string) (cpu float64, err error) {
		for range 4 {
			client := e.client(0)
			defer client.Close()
			sub, err := consumed(client, topic, func(*message.Message) {})
			if err != nil {
				return 0, err
			}
			defer sub.Close()
		}
		return share()
	}
	empty, err := with(e.topic())
	if err != nil {
		return err
	}
	full, err := with(topic)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d waiting: published at %.0f/s, %.0f bytes each (payload 100), server CPU with 4 idle Subscribers %.2f %%; without waiting messages %.2f %%\n",
		w.waiting, float64(w.waiting)/took.Seconds(), (after-before)/float64(w.waiting), full, empty)
	return e.admin.Unlink(context.Background(), topic+".due{"+topic+"}", topic+".delayed{"+topic+"}").Err()
}

// moveBurst measures how fast messages move that are due at once, with two Subscribers,
// and how long messages without a delay wait meanwhile.
func (w *waits) moveBurst(e *env, out io.Writer) error {
	ctx, topic := context.Background(), e.topic()
	at := time.Now().Add(time.Duration(w.burst/20)*time.Millisecond + 10*time.Second)
	if err := store(e, topic, w.burst, at); err != nil {
		return err
	}
	for _, set := range [][2]string{{"slowlog-log-slower-than", "1000"}, {"slowlog-max-len", "10000"}} {
		if err := e.admin.ConfigSet(ctx, set[0], set[1]).Err(); err != nil {
			return err
		}
	}
	if err := e.admin.SlowLogReset(ctx).Err(); err != nil {
		return err
	}
	client := e.client(0)
	defer client.Close()
	for range 2 { // they move, and do not handle: what is measured is the moving
		sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "bench"}, nil)
		if err != nil {
			return err
		}
		if _, err := sub.Subscribe(ctx, topic); err != nil {
			return err
		}
		defer sub.Close()
	}
	time.Sleep(time.Until(at) - 100*time.Millisecond)
	var pings []time.Duration
	var first, last time.Time
	for n := int64(0); n < int64(w.burst); {
		began := time.Now()
		var err error
		if n, err = e.admin.XLen(ctx, topic).Result(); err != nil {
			return err
		}
		last = time.Now()
		if n > 0 {
			if first.IsZero() {
				first = began
			}
			pings = append(pings, last.Sub(began))
		}
	}
	slow, err := e.admin.SlowLogGet(ctx, -1).Result()
	if err != nil {
		return err
	}
	var longest time.Duration
	for _, s := range slow {
		longest = max(longest, s.Duration)
	}
	slices.Sort(pings)
	_, err = fmt.Fprintf(out, "burst of %d: moved at %.0f/s; longest command on the server %.1f ms; another client's command meanwhile %.1f ms (p50), %.1f ms (p99)\n",
		w.burst, float64(w.burst)/last.Sub(first).Seconds(), millis(longest), millis(pings[len(pings)/2]), millis(pings[len(pings)*99/100]))
	return err
}
