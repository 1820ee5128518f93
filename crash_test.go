package goxstreams_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// The workers of these tests are processes that crash because of a message, and are
// restarted, as by an orchestrator.

func init() { children[crashRole] = crashChild }

const crashRole = "crash"

// crashArgs are the instructions for a crashChild.
type crashArgs struct {
	Addr, Topic    string
	Others         []string // more topics, whose messages take a while
	Subscribers    bool     // one for each topic
	Typed          bool     // a Consumer with a Worker; else a handler of plain messages
	MaxRetries     int      // of the Retry
	MaxConcurrency int      // of the Subscriber
	MaxSize        int      // of a BatchConsumer, instead of a Consumer
	Poison         string   // what Process does with the message "poison": "kill", "exit", "fail", "permanent"
	DeadCrashes    bool     // ProcessDead kills the process too
}

// crashOtherTakes is how long the handlers of the other topics take: longer than poison then does.
const crashOtherTakes = 300 * time.Millisecond

func (args crashArgs) topics() []string { return append([]string{args.Topic}, args.Others...) }

// crashLog is the list in Redis to which children write before each step, so that
// it survives them.
func crashLog(topic string) string { return topic + "-log" }

// unlessEnded returns err, unless the process was told to end before it had begun.
func unlessEnded(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

func crashChild() {
	var args crashArgs
	must(json.Unmarshal([]byte(os.Getenv(childArgsEnv)), &args))
	client := redis.NewClient(&redis.Options{Addr: args.Addr})
	config := goxstreams.SubscriberConfig{
		Client:         client,
		ConsumerGroup:  testGroup,
		MaxConcurrency: args.MaxConcurrency,
		ClaimMinIdle:   time.Second,
		ClaimInterval:  100 * time.Millisecond,
		CloseTimeout:   10 * time.Second,
		Retry:          &goxstreams.Retry{MaxRetries: args.MaxRetries, InitialInterval: 10 * time.Millisecond},
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	worker := crashWorker{args, client}
	switch {
	case args.MaxSize > 0:
		consumer, err := goxstreams.NewBatchConsumer(worker, goxstreams.BatchConsumerConfig{Subscriber: config, Topic: args.Topic, MaxSize: args.MaxSize}, nil)
		must(err)
		must(unlessEnded(ctx, consumer.Run(ctx)))
	case args.Typed:
		consumer, err := goxstreams.NewConsumer(worker, goxstreams.ConsumerConfig{Subscriber: config, Topic: args.Topic}, nil)
		must(err)
		must(unlessEnded(ctx, consumer.Run(ctx)))
	default:
		sub, err := goxstreams.NewSubscriber(config, nil)
		must(err)
		handler := config.Retry.Middleware(func(msg *message.Message) ([]*message.Message, error) {
			var body string
			must(json.Unmarshal(msg.Payload, &body))
			return nil, worker.Process(msg.Context(), goxstreams.Message[string]{Body: body})
		})
		var subscriptions sync.WaitGroup
		for _, topic := range args.topics() {
			if args.Subscribers {
				sub, err = goxstreams.NewSubscriber(config, nil)
				must(err)
			}
			messages, err := sub.Subscribe(ctx, topic)
			if must(unlessEnded(ctx, err)); err != nil {
				break
			}
			subscriptions.Go(func() {
				for msg := range messages {
					go func() {
						if topic != args.Topic {
							time.Sleep(crashOtherTakes) // its work
						}
						if _, err := handler(msg); err != nil {
							msg.Nack()
						} else {
							msg.Ack()
						}
					}()
				}
			})
		}
		subscriptions.Wait()
	}
	must(client.Close())
}

type crashWorker struct {
	args   crashArgs
	client *redis.Client
}

func (w crashWorker) begin(what, body string) {
	must(w.client.RPush(context.Background(), crashLog(w.args.Topic), what+" "+body).Err())
}

func (w crashWorker) Process(_ context.Context, msg goxstreams.Message[string]) error {
	w.begin("process", msg.Body)
	if msg.Body != "poison" {
		time.Sleep(5 * time.Millisecond)
		if w.args.Poison == "broken" {
			time.Sleep(crashOtherTakes)
		}
		w.begin("done", msg.Body)
		return nil
	}
	switch w.args.Poison {
	case "kill":
		if len(w.args.Others) > 0 {
			time.Sleep(crashOtherTakes / 3)
		}
		w.die()
	case "exit":
		os.Exit(3)
	case "permanent":
		return goxstreams.Permanent(errors.New("poison"))
	}
	return errors.New("poison")
}

// ProcessBatch begins all of its messages, and then handles one after the other.
func (w crashWorker) ProcessBatch(ctx context.Context, batch []goxstreams.Message[string]) []error {
	if i := slices.IndexFunc(batch, func(msg goxstreams.Message[string]) bool { return msg.Body == "poison" }); i >= 0 {
		w.begin("batch", fmt.Sprint(batch[i].RetryCount, " ", len(batch)))
	}
	errs := make([]error, len(batch))
	for i, msg := range batch {
		errs[i] = w.Process(ctx, msg)
	}
	return errs
}

func (w crashWorker) die() {
	must(syscall.Kill(os.Getpid(), syscall.SIGKILL))
	select {} // the signal may take a moment
}

func (w crashWorker) ProcessBroken(context.Context, goxstreams.BrokenMessage) error {
	w.begin("broken", "")
	if w.args.Poison == "broken" {
		time.Sleep(crashOtherTakes / 3)
		w.die()
	}
	return nil
}

func (w crashWorker) ProcessDead(_ context.Context, dead goxstreams.Message[string]) error {
	w.begin("dead", dead.Body)
	if w.args.DeadCrashes {
		w.die()
	}
	return goxstreams.ErrDead
}

// crashProcess is a running child.
type crashProcess struct {
	cmd   *exec.Cmd
	stdin io.Closer
	ended chan struct{}
}

func startCrashChild(t testing.TB, args crashArgs) *crashProcess {
	t.Helper()
	data, err := json.Marshal(args)
	require.NoError(t, err)
	p := &crashProcess{cmd: exec.Command(os.Args[0]), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), childEnv+"="+crashRole, childArgsEnv+"="+string(data))
	p.cmd.Stderr = os.Stderr
	p.stdin, err = p.cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, p.cmd.Start())
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
	})
	return p
}

// crashLoop runs processes, each restarted when it dies, until the group has
// nothing left to do. It returns the steps that were started, and how often a
// process died.
func crashLoop(t testing.TB, client *redis.Client, processes int, args crashArgs) (begun map[string]int, deaths int) {
	t.Helper()
	running := make([]*crashProcess, processes)
	for i := range running {
		running[i] = startCrashChild(t, args)
	}
	settled := func() bool {
		for _, topic := range args.topics() {
			groups, err := client.XInfoGroups(t.Context(), topic).Result()
			require.NoError(t, err)
			last := entryIDs(t, client, topic)
			if groups[0].Pending > 0 || groups[0].LastDeliveredID != last[len(last)-1] {
				return false
			}
		}
		return true
	}
	for deadline := time.Now().Add(2 * patience); !settled(); time.Sleep(10 * time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "not settled, and no death since the last of %d", deaths)
		for i, p := range running {
			select {
			case <-p.ended:
				deaths++
				require.Less(t, deaths, 50, "it never ends")
				running[i] = startCrashChild(t, args)
				deadline = time.Now().Add(2 * patience)
			default:
			}
		}
	}
	for _, p := range running {
		_ = p.stdin.Close()
	}
	for _, p := range running {
		select {
		case <-p.ended:
			if !p.cmd.ProcessState.Success() { // just before it was settled
				deaths++
			}
		case <-time.After(patience):
			require.FailNow(t, "a child does not end")
		}
	}
	begun = make(map[string]int)
	lines, err := client.LRange(t.Context(), crashLog(args.Topic), 0, -1).Result()
	require.NoError(t, err)
	for _, line := range lines {
		begun[line]++
	}
	return begun, deaths
}

// One message kills every process that handles it. Several processes run at once,
// with other messages in flight. At the end that message is dead, and no other one
// is.
func TestCrashLoop(t *testing.T) {
	t.Parallel()
	for _, args := range []crashArgs{
		{Poison: "kill", MaxRetries: -1, MaxConcurrency: 8},
		{Poison: "exit", MaxRetries: 2, MaxConcurrency: 8},
		{Poison: "kill", MaxRetries: 3, MaxConcurrency: 1},
		{Poison: "exit", MaxRetries: -1, MaxConcurrency: 1, Typed: true},
		{Poison: "kill", MaxRetries: 1, MaxConcurrency: 8, Typed: true},
		{Poison: "exit", MaxRetries: 3, MaxConcurrency: 8, Typed: true},
	} {
		t.Run(fmt.Sprintf("%s, MaxRetries=%d, MaxConcurrency=%d, typed=%t", args.Poison, args.MaxRetries, args.MaxConcurrency, args.Typed), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t) // claims by idle time
			client, topic := newClient(t), topic(t)
			args.Addr, args.Topic = client.Options().Addr, topic
			createGroup(t, client, topic, testGroup)
			var events []string
			for i := range 120 {
				events = append(events, fmt.Sprint("innocent ", i))
			}
			events[40] = "poison"
			produce(t, client, topic, events...)
			begun, deaths := crashLoop(t, client, 3, args)

			runs := begun["process poison"]
			require.Equal(t, max(args.MaxRetries, 0)+2, runs, "how often the poison is handled, over all processes")
			assert.Equal(t, runs, deaths, "processes that died")
			handled := 0
			for what := range begun {
				if strings.HasPrefix(what, "done innocent") {
					handled++
				}
			}
			assert.Equal(t, len(events)-1, handled, "innocents handled")
			want := 0
			if args.Typed {
				want = 1
			}
			assert.Equal(t, want, begun["dead poison"], "calls of ProcessDead")
			dead := deadOf(t, client, topic)
			require.Len(t, dead, 1, "dead letters")
			assert.Equal(t, `"poison"`, string(dead[0].Message.Payload))
			assert.Equal(t, goxstreams.Exhausted, dead[0].Kind)
			assert.EqualValues(t, runs+1, dead[0].Deliveries)
		})
	}
}

// A message kills every process that handles it, while messages of other topics are with
// handlers in the same process: none of these is dead at the end.
func TestCrashLoop_OtherTopics(t *testing.T) {
	t.Parallel()
	for _, maxRetries := range []int{-1, 1, 2, 3} {
		subscribers := maxRetries%2 != 0
		t.Run(fmt.Sprintf("MaxRetries=%d, several Subscribers=%t", maxRetries, subscribers), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t) // claims by idle time
			client := newClient(t)
			args := crashArgs{Addr: client.Options().Addr, Topic: topic(t), Others: []string{topic(t), topic(t)}, Subscribers: subscribers, Poison: "kill", MaxRetries: maxRetries, MaxConcurrency: 8}
			for _, topic := range args.topics() {
				createGroup(t, client, topic, testGroup)
			}
			for i := range 10 {
				for _, topic := range args.Others {
					produce(t, client, topic, fmt.Sprint(topic, " ", i))
				}
			}
			produce(t, client, args.Topic, "poison")
			begun, deaths := crashLoop(t, client, 1, args)
			assert.Equal(t, max(maxRetries, 0)+2, deaths)
			assert.Equal(t, deaths, begun["process poison"])
			require.Len(t, deadOf(t, client, args.Topic), 1)
			for _, topic := range args.Others {
				assert.Empty(t, deadOf(t, client, topic))
				for i := range 10 {
					assert.Positive(t, begun[fmt.Sprint("done ", topic, " ", i)])
				}
			}
		})
	}
}

// A message that may have crashed its process waits while one of another topic is with a handler. Other
// messages of its topic do not wait, and Close leaves it to others as it was.
func TestSuspectsTakeTurns(t *testing.T) {
	t.Parallel()
	testserver.RequireReal(t) // claims by idle time
	for _, slots := range []int{1, 8} {
		for _, count := range []int64{2, 4} { // a suspect, one with a single delivery left
			t.Run(fmt.Sprintf("MaxConcurrency=%d, count=%d", slots, count), func(t *testing.T) {
				t.Parallel()
				client := newClient(t)
				config := claiming(client)
				config.MaxConcurrency, config.Retry = slots, &goxstreams.Retry{MaxRetries: 3}
				leave := func(topic, payload string) {
					createGroup(t, client, topic, testGroup)
					publish(t, client, topic, payload)
					id := readAs(t, client, topic, testGroup, "dead", 1)[0]
					require.NoError(t, client.Do(t.Context(), "xclaim", topic, testGroup, "dead", 0, id, "retrycount", count, "justid").Err())
				}
				sub, a, b := newSubscriber(t, config), topic(t), topic(t)
				leave(a, "first")
				first := next(t, subscribe(t, sub, a))
				began := time.Now()
				leave(b, "second")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				messages, err := sub.Subscribe(ctx, b)
				require.NoError(t, err)
				var second *message.Message
				for i := 0; time.Since(began) < 2*minIdle; i++ { // then b's subscription knows of second
					publish(t, client, b, fmt.Sprint(i))
					msg := next(t, messages)
					if string(msg.Payload) == "second" {
						second, msg = msg, next(t, messages)
					}
					require.Equal(t, fmt.Sprint(i), string(msg.Payload))
					msg.Ack()
				}
				waits := time.Since(began) < 10*time.Second // a turn's longest time
				cancel()
				if _, open := <-messages; waits {
					require.False(t, open)
					require.Nil(t, second, "it ran beside first")
					p := pendingOf(t, client, b, testGroup)[0]
					require.Equal(t, "dead", p.Consumer)
					require.Equal(t, count, p.RetryCount)
				}
				first.Ack()
				require.Equal(t, "second", string(next(t, subscribe(t, sub, b)).Payload))
			})
		}
	}
}

// ProcessBroken kills its process, while other messages are with handlers: none of these is dead at the end.
func TestCrashLoop_ProcessBroken(t *testing.T) {
	t.Parallel()
	for _, maxRetries := range []int{-1, 1, 2, 3} {
		t.Run(fmt.Sprint("MaxRetries=", maxRetries), func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t) // claims by idle time
			client, topic := newClient(t), topic(t)
			createGroup(t, client, topic, testGroup)
			const innocents = 20
			for i := range innocents {
				produce(t, client, topic, fmt.Sprint("innocent ", i))
				if i == 4 {
					addRaw(t, client, topic, "payload", "malformed")
				}
			}
			begun, deaths := crashLoop(t, client, 1, crashArgs{
				Addr: client.Options().Addr, Topic: topic, Typed: true, MaxRetries: maxRetries, MaxConcurrency: 8, Poison: "broken",
			})
			assert.Equal(t, max(maxRetries, 0)+2, deaths)
			assert.Equal(t, deaths, begun["broken "])
			require.Len(t, deadOf(t, client, topic), 1)
			for i := range innocents {
				assert.Positive(t, begun[fmt.Sprint("done innocent ", i)])
			}
		})
	}
}

// ProcessDead kills its process. It is called three times for the message, however
// those calls ended; then the message is moved without it. Process is not called
// again.
func TestCrashLoop_ProcessDead(t *testing.T) {
	t.Parallel()
	const maxRetries = 2
	for poison, processed := range map[string]int{"fail": maxRetries + 1, "permanent": 1, "kill": maxRetries + 2} {
		t.Run(poison, func(t *testing.T) {
			t.Parallel()
			testserver.RequireReal(t) // claims by idle time
			client, topic := newClient(t), topic(t)
			createGroup(t, client, topic, testGroup)
			produce(t, client, topic, "innocent 1", "poison", "innocent 2")
			begun, _ := crashLoop(t, client, 2, crashArgs{
				Addr: client.Options().Addr, Topic: topic, Typed: true,
				MaxRetries: maxRetries, MaxConcurrency: 4, Poison: poison, DeadCrashes: true,
			})
			assert.Equal(t, processed, begun["process poison"], "calls of Process")
			assert.Equal(t, 3, begun["dead poison"], "calls of ProcessDead")
			assert.Positive(t, begun["done innocent 1"])
			assert.Positive(t, begun["done innocent 2"])
			dead := deadOf(t, client, topic)
			require.Len(t, dead, 1)
			assert.Equal(t, `"poison"`, string(dead[0].Message.Payload))
		})
	}
}
